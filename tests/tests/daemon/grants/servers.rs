//! Servers on loopback that end with the test.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::super::*;

/// A port that nobody listens at.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port()
}

fn answers(port: u16) -> bool {
    TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).is_ok()
}

/// A program that serves until this is dropped.
pub struct Server(Child);

impl Server {
    pub fn start(command: &mut Command, port: u16) -> Server {
        let server = Server(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("it starts"),
        );
        assert!(within(Duration::from_secs(10), || answers(port)), "{command:?} does not listen");
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

static MARKS: AtomicUsize = AtomicUsize::new(0);

/// nginx with TLS, as `api.test`: it knows one bearer, whom it calls ada, and nobody else; everything it does is in its log.
pub struct Nginx {
    pub port: u16,
    folder: TempDir,
    _server: Server,
}

impl Nginx {
    pub fn start(secret: &str) -> Nginx {
        Nginx::of_host(secret, "api.test")
    }

    /// With a certificate for `host`.
    pub fn of_host(secret: &str, host: &str) -> Nginx {
        let folder = tempfile::Builder::new().prefix("broker-nginx-").tempdir().expect("a directory");
        set_mode(folder.path(), 0o755);
        let script = format!(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca && \
             openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout own.key -out own.csr -subj /CN={host} && \
             printf subjectAltName=DNS:{host} > names && \
             openssl x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out own.pem"
        );
        let made = Command::new("sh")
            .args(["-c", &script])
            .current_dir(folder.path())
            .output()
            .expect("openssl runs");
        assert!(made.status.success(), "{}", text(&made.stderr));
        let (port, place) = (free_port(), folder.path().display().to_string());
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {place}/{kind};\n"))
            .concat();
        let configuration = format!(
            "daemon off; pid {place}/pid; error_log {place}/errors; events {{}}\nhttp {{\n{temporary}\
             map $http_authorization $who {{ default nobody; \"Bearer {secret}\" ada; }}\n\
             log_format seen '$who $request_method $request_uri $status $http_x_trace';\naccess_log {place}/seen seen;\n\
             server {{ listen 127.0.0.1:{port} ssl; server_name {host};\n\
             ssl_certificate {place}/own.pem; ssl_certificate_key {place}/own.key;\n\
             if ($who = nobody) {{ return 401; }}\n\
             location /away {{ return 302 https://elsewhere.test/; }}\n\
             location /echo {{ add_header X-Echo $http_authorization; return 200 \"you sent $http_authorization.\\n\"; }}\n\
             location / {{ return 200 \"hello $who\\n\"; }} }} }}\n"
        );
        fs::write(folder.path().join("nginx.conf"), configuration).expect("it is ours");
        let mut command = Command::new("nginx");
        command.arg("-c").arg(folder.path().join("nginx.conf"));
        let server = Server::start(&mut command, port);
        Nginx { port, folder, _server: server }
    }

    pub fn authority(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// `user method path status` of each request that was answered by now. nginx notes one after it has answered, and its
    /// one process does one thing after the other: what it has answered before this request, it has noted by its answer.
    pub fn seen(&self) -> Vec<String> {
        let mark = format!("/mark-{}", MARKS.fetch_add(1, Ordering::Relaxed));
        let asked = Command::new("curl")
            .args(["-sSk", "-o", "/dev/null", &format!("https://127.0.0.1:{}{mark}", self.port)])
            .status();
        assert!(asked.expect("curl runs").success());
        let log = || fs::read_to_string(self.folder.path().join("seen")).expect("a log");
        assert!(within(Duration::from_secs(5), || log().contains(&mark)), "nginx notes what it does");
        let own = |line: &&str| !line.contains(" /mark-");
        log().lines().filter(own).map(|line| line.trim_end_matches([' ', '-']).to_owned()).collect()
    }
}

/// Counts what comes, and sends as much back.
pub struct Echo {
    pub port: u16,
    pub bytes: Arc<Mutex<u64>>,
}

impl Echo {
    pub fn start() -> Echo {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let bytes = Arc::new(Mutex::new(0));
        let counted = Arc::clone(&bytes);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let counted = Arc::clone(&counted);
                std::thread::spawn(move || echo(stream, &counted));
            }
        });
        Echo { port, bytes }
    }

    pub fn bytes(&self) -> u64 {
        *self.bytes.lock().expect("nobody panicked")
    }
}

fn echo(mut stream: TcpStream, counted: &Mutex<u64>) {
    let mut piece = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut piece) {
        *counted.lock().expect("nobody panicked") += count as u64;
        if std::io::Write::write_all(&mut stream, &piece[..count]).is_err() {
            return;
        }
    }
}

/// An HTTP server that says it would keep a connection, and closes it after one answer.
pub struct OneAnswer {
    pub port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl OneAnswer {
    pub fn start() -> OneAnswer {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&heads);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                    head.push(byte[0]);
                }
                kept.lock().expect("nobody panicked").push(text(&head).to_lowercase());
                let _ = std::io::Write::write_all(
                    &mut stream,
                    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes",
                );
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        OneAnswer { port, heads }
    }

    /// Each request's, in lower case.
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().expect("nobody panicked").clone()
    }
}
