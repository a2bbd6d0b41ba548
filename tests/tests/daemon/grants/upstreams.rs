//! Upstreams that tell the secret where nobody looks, or never answer; and who asks and says nothing.

use std::io::Read;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::stages::Process;
use super::*;

/// Answers in the clear with what it was sent as a bearer, in the place that the path names; `open` counts its connections.
struct Hostile {
    port: u16,
    open: Arc<AtomicUsize>,
}

impl Hostile {
    fn start() -> Hostile {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let open = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&open);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let counted = Arc::clone(&counted);
                counted.fetch_add(1, Ordering::SeqCst);
                std::thread::spawn(move || {
                    let _ = answer(&mut stream);
                    counted.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Hostile { port, open }
    }

    fn grant(&self) -> String {
        format!(
            "[grant.api]\nkind = \"http\"\nhost = \"api.test\"\ncredential = \"api\"\nplain = true\nupstream_tls = \"off\"\n\
             inject = {{ header = \"Authorization\", value = \"Bearer {{secret}}\" }}\nallow = [ {READ_ALL} ]\nupstream = \"127.0.0.1:{}\"\n",
            self.port
        )
    }
}

fn answer(stream: &mut std::net::TcpStream) -> std::io::Result<()> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = text(&head);
    let line =
        |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned();
    let token = line("authorization: Bearer ");
    let hex: String = token.bytes().map(|byte| format!("{byte:02x}")).collect();
    let reply = match head.split(' ').nth(1).unwrap_or_default() {
        "/reason" => format!("HTTP/1.1 200 {token}\r\nContent-Length: 2\r\n\r\nok"),
        "/name" => format!("HTTP/1.1 200 OK\r\nX-{token}: 1\r\nContent-Length: 2\r\n\r\nok"),
        "/hex" => format!("HTTP/1.1 200 OK\r\nX-{hex}: 1\r\nContent-Length: 2\r\n\r\nok"),
        "/coding" => format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n{:x}\r\n{token}\r\n0\r\n\r\n",
            token.len()
        ),
        "/hang" => return stream.read_exact(&mut byte),
        _ => format!("HTTP/1.1 200 OK\r\nX-Value: {token}\r\nContent-Length: {}\r\n\r\n{token}", token.len()),
    };
    std::io::Write::write_all(stream, reply.as_bytes())
}

#[test]
fn no_part_of_a_reply_tells_the_secret() {
    let (secret, hostile) = (secret(), Hostile::start());
    let daemon = daemon(&hostile.grant(), &secret);
    let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
    for (path, status) in
        [("value", "200"), ("reason", "200"), ("name", "502"), ("hex", "502"), ("coding", "502")]
    {
        let output = run(&daemon, &["api"], &format!("curl -sSi --raw http://api.test/{path}"));
        let (reply, errors) = said(&output);
        assert!(reply.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {reply} {errors}");
        let lower = reply.to_lowercase();
        assert!(!lower.contains(&secret.to_lowercase()) && !lower.contains(&hex), "{path}: {reply}");
    }
    // The control: it does tell whoever asks it.
    let mut command = Command::new("curl");
    let asked = command.args(["-sSi", "-H", &format!("authorization: Bearer {secret}")]);
    let told = asked.arg(format!("http://127.0.0.1:{}/reason", hostile.port)).output().expect("curl runs");
    assert!(said(&told).0.starts_with(&format!("HTTP/1.1 200 {secret}")), "{told:?}");
}

/// A request that nobody waits for any more ends at the upstream too, and its place is free again.
#[test]
fn what_nobody_waits_for_is_given_up() {
    let (secret, hostile) = (secret(), Hostile::start());
    let daemon = daemon(&hostile.grant(), &secret);
    let script = "
import socket, sys
for n in range(1300):
    s = socket.create_connection(('api.test', 80), 20); s.sendall(b'GET /hang HTTP/1.1\\r\\nHost: api.test\\r\\n\\r\\n'); s.close()
s = socket.create_connection(('api.test', 80), 20); s.sendall(b'GET /value HTTP/1.1\\r\\nHost: api.test\\r\\n\\r\\n'); print(s.recv(12), flush=True)
sys.stdin.read()";
    let mut command = daemon.broker(ADA, &["exec", "--grant", "api"]);
    let command = command.args(["--", "python3", "-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut run = Process(command.spawn().expect("it starts"));
    let mut line = String::new();
    let out = run.0.stdout.as_mut().expect("a pipe");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("text");
    assert_eq!(line, "b'HTTP/1.1 200'\n", "{}", daemon.log());
    let open = || hostile.open.load(Ordering::SeqCst);
    assert!(within(Duration::from_secs(10), || open() <= 1), "{} are open: {}", open(), daemon.log());
}

/// Who asks at doors for more than anybody may have, and sends nothing, is refused; others and the daemon are as they were.
#[test]
fn idle_connections_of_one_user_take_nobody_else_s_place() {
    let (secret, hostile) = (secret(), Hostile::start());
    let more = format!(
        "{}[[access]]\nuser = \"{EVE}\"\npolicies = [\"default\"]\ngrants = [\"api\"]\n",
        hostile.grant()
    );
    let daemon = daemon(&more, &secret);
    let flood = "
import json, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
door, kept = socket.socket(fileno=3), []
for n in range(1000):
    door.send(json.dumps({'method': 'io.broker.Grant.Open'}).encode()); reply, fds, _, _ = socket.recv_fds(door, 4096, 1)
    if not fds: break
    kept += fds
print(len(kept), flush=True); sys.stdin.read()";
    let descriptors = || {
        let core = daemon.role("core").expect("it lives");
        fs::read_dir(format!("/proc/{core}/fd")).expect("root may").count()
    };
    let (before, mut floods, mut kept) = (descriptors(), Vec::new(), 0);
    for _ in 0..5 {
        let mut command = daemon.broker(ADA, &["grant", "derive", "api"]);
        let command =
            command.args(["--", "python3", "-c", flood]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut run = Process(command.spawn().expect("it starts"));
        let mut line = String::new();
        let out = run.0.stdout.as_mut().expect("a pipe");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("text");
        kept += line.trim().parse::<usize>().expect("a number");
        floods.push(run);
    }
    assert_eq!(kept, 1024, "{}", daemon.log());
    assert!(descriptors() < before + kept + 100, "{} {before}", descriptors());
    let output = daemon.exec(EVE, &["--grant", "api"], &["curl", "-sS", "-m", "10", "http://api.test/value"]);
    assert!(said(&output).0.starts_with("***"), "{output:?} {}", daemon.log());
    drop(floods);
    assert!(within(Duration::from_secs(10), || descriptors() <= before), "{} {before}", descriptors());
}
