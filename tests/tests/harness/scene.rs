//! The hosts of these tests: servers on loopback, a daemon in a mount namespace of its own, and a user who has a harness.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use broker_tests::{canary, program, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// A user without any right of root's.
pub const ADA: u32 = 54_321;

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port()
}

/// A process that ends with the test.
pub struct Process(pub Child);

impl Process {
    fn serving(command: &mut Command, port: u16) -> Process {
        let process = Process(command.stdin(Stdio::null()).spawn().expect("it starts"));
        let answers = || TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).is_ok();
        assert!(within(Duration::from_secs(20), answers), "{command:?} does not listen");
        process
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id().cast_signed())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some(root) = self.root.take() {
            let _ = fs::remove_dir_all(root);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = kill(self.pid(), Signal::SIGTERM);
        if !within(Duration::from_secs(5), || matches!(self.0.try_wait(), Ok(Some(_)))) {
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

pub struct Scene {
    pub folder: TempDir,
    pub key: String,
    daemon: Option<Process>,
    _nginx: Process,
    pub fake: Option<Process>,
    postgres: Option<Server>,
    pub fake_port: u16,
    /// What nginx serves files from: one of them says that it is to refuse.
    root: Option<PathBuf>,
}

/// What the scripted model does: it looks, mends, tests. What it says next depends on what it has seen last, so that a call that was
/// interrupted is made again.
pub const SCRIPT: &str = r#"
rules:
  - name: done
    when: {tool_result_contains: "tests passed"}
    respond: {content: "Mended."}
  - name: test
    when: {tool_result_contains: "1 replaced"}
    respond: {content: "Now test.", tool_calls: [{name: bash, arguments: {command: "echo ran >> ran; sleep 0.15; python3 check.py"}}]}
  - name: mended
    when: {tool_result_contains: "is not in /workspace"}
    respond: {tool_calls: [{name: bash, arguments: {command: "echo ran >> ran; sleep 0.15; python3 check.py"}}]}
  - name: edit
    when: {tool_result_contains: "def add"}
    respond: {content: "A bug.", tool_calls: [{name: edit, arguments: {path: sums.py, old_string: "a - b", new_string: "a + b"}}]}
  - name: look
    when: {messages_contain: "mend"}
    respond: {content: "Look.", tool_calls: [{name: read, arguments: {path: sums.py}}]}
"#;

impl Scene {
    pub fn new(rules: &str) -> Scene {
        Scene::with(rules, "")
    }

    /// `more` goes into nginx's server.
    pub fn with(rules: &str, more: &str) -> Scene {
        let folder = tempfile::Builder::new().prefix("broker-harness-").tempdir().expect("a directory");
        let place = folder.path();
        set_mode(place, 0o755);
        let key = canary();
        let (fake_port, nginx_port) = (free_port(), free_port());
        fs::write(place.join("rules.yaml"), rules).expect("it is ours");
        let fake = start_fake(place, fake_port);
        let name = place.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {name}/{kind};\n"))
            .concat();
        let nginx = format!(
            "daemon off; pid {name}/pid; error_log {name}/errors; events {{}}\nhttp {{\n{temporary}\
             map $http_x_api_key $who {{ default nobody; \"{key}\" agent; }}\nlimit_req_zone $who zone=few:1m rate=60r/m;\n\
             log_format seen '$who $request_method $request_uri $status'; access_log {name}/seen seen;\n\
             log_format body escape=json '{{\"version\":\"$http_anthropic_version\",\"type\":\"$content_type\",\"accept\":\"$http_accept\",\"body\":\"$request_body\"}}';\n\
             access_log {name}/bodies body; client_body_buffer_size 4m; client_max_body_size 4m;\n\
             server {{ listen 127.0.0.1:{nginx_port}; if ($who = nobody) {{ return 401; }}\n{more}\n\
             location / {{ proxy_pass http://127.0.0.1:{fake_port}; proxy_buffering off; proxy_http_version 1.1; }} }} }}\n"
        );
        fs::write(place.join("nginx.conf"), nginx).expect("it is ours");
        let mut command = Command::new("nginx");
        let nginx = Process::serving(command.arg("-c").arg(place.join("nginx.conf")), nginx_port);
        for folder in ["workspace", "sessions", "state"] {
            fs::create_dir(place.join(folder)).expect("a directory");
            std::os::unix::fs::chown(place.join(folder), Some(ADA), Some(ADA)).expect("root may");
        }
        std::os::unix::fs::chown(place.join("state"), Some(0), Some(0)).expect("root may");
        let mut scene = Scene {
            folder,
            key,
            daemon: None,
            _nginx: nginx,
            fake: Some(fake),
            postgres: None,
            fake_port,
            root: None,
        };
        scene.reset();
        scene.configure(nginx_port, "");
        scene.start_daemon();
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The workspace as it was in the beginning.
    pub fn reset(&self) {
        let _ = fs::remove_file(self.path("workspace/ran"));
        let check = "from sums import add\nassert add(2, 3) == 5\nprint('tests', 'passed')\n";
        for (file, text) in [("sums.py", "def add(a, b):\n    return a - b\n"), ("check.py", check)] {
            let path = self.path("workspace").join(file);
            fs::write(&path, text).expect("it is ours");
            std::os::unix::fs::chown(path, Some(ADA), Some(ADA)).expect("root may");
        }
    }

    fn configure(&self, nginx_port: u16, more: &str) {
        let place = self.folder.path().display();
        let text = format!(
            "[server]\nsocket = \"{place}/broker.sock\"\nstate = \"{place}/state\"\n\
             [credential.model]\nsource = \"file:{place}/key\"\n\
             [grant.model]\nkind = \"http\"\nhost = \"api.anthropic.com\"\ncredential = \"model\"\n\
             inject = {{ header = \"x-api-key\", value = \"{{secret}}\" }}\n\
             allow = [ {{ methods = [\"POST\"], path = \"/v1/messages\" }} ]\n\
             upstream = \"127.0.0.1:{nginx_port}\"\nupstream_tls = \"off\"\n{more}\
             [[access]]\nuser = \"{ADA}\"\npolicies = [\"default\"]\ngrants = [\"model\"{}]\n",
            if more.is_empty() { "" } else { ", \"log\"" }
        );
        fs::write(self.path("config.toml"), text).expect("it is ours");
        fs::write(self.path("key"), format!("{}\n", self.key)).expect("it is ours");
        set_mode(&self.path("key"), 0o600);
    }

    pub fn start_daemon(&mut self) {
        // The helper stands where every policy shows it: below /usr, on a filesystem that only this daemon has.
        let script = "mount -t tmpfs tools /usr/local/games && cp \"$TOOLS\" /usr/local/games && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
        command.arg(program("broker")).args(["serve", "--config"]).arg(self.path("config.toml"));
        let log = fs::File::options().create(true).append(true).open(self.path("log")).expect("a log");
        command.env("TOOLS", program("harness-tools")).stdin(Stdio::null()).stderr(log);
        self.daemon = Some(Process(command.spawn().expect("it starts")));
        let answers = || {
            let output = self.broker(&["grant", "list"]).output();
            output.is_ok_and(|output| output.status.success())
        };
        assert!(within(Duration::from_secs(10), answers), "{}", self.log());
    }

    /// `kill -9` of the launcher, and with it everything; then another.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("it runs");
        let _ = daemon.0.kill();
        let _ = daemon.0.wait();
        drop(daemon);
        self.start_daemon();
    }

    /// The processes of one role, and all that the daemon has started where none is named.
    pub fn roles(&self, role: &str) -> Vec<Pid> {
        let daemon = self.daemon.as_ref().expect("it runs").0.id();
        let children =
            fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children")).unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok());
        let is = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == role.as_bytes())
        };
        pids.filter(is).map(Pid::from_raw).collect()
    }

    pub fn kill_role(&self, role: &str) {
        for pid in self.roles(role) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn broker(&self, words: &[&str]) -> Command {
        let mut command = Command::new(program("broker"));
        command.args(words).arg("--connect").arg(self.path("broker.sock")).stdin(Stdio::null());
        command
    }

    /// A server of its own, and a grant for it: the store of many hosts.
    pub fn start_postgres(&mut self) {
        let server = Server::postgres();
        let config = fs::read_to_string(self.path("config.toml")).expect("it is ours");
        let (_, nginx) = config.split_once("upstream = \"127.0.0.1:").expect("it is there");
        let nginx = nginx.split('"').next().and_then(|port| port.parse().ok()).expect("a port");
        let grant = format!(
            "[grant.log]\nkind = \"tcp\"\nhost = \"log.test\"\nport = 5432\nupstream = \"127.0.0.1:{}\"\n",
            server.port
        );
        self.postgres = Some(server);
        self.configure(nginx, &grant);
        self.kill_daemon();
    }

    pub fn store(&self) -> String {
        match &self.postgres {
            None => format!("sqlite:{}", self.path("sessions/log.sqlite").display()),
            Some(_) => "grant:log?user=harness&database=postgres".to_owned(),
        }
    }

    /// `harness WORD...` as a user, with the store.
    pub fn harness(&self, words: &[&str]) -> Command {
        let mut command = Command::new(program("harness"));
        command.args(words).env("HARNESS_STORE", self.store()).env("BROKER_SOCKET", self.path("broker.sock"));
        command.uid(ADA).gid(ADA).current_dir("/").stdin(Stdio::null());
        command
    }

    /// A new session with the workspace, its events as lines.
    pub fn run(&self, session: &str, more: &[&str]) -> Command {
        let workspace = self.path("workspace").display().to_string();
        let mut words = vec!["run", "--model", "scripted", "--session", session, "--lease", "0.4"];
        if !more.contains(&"--output") {
            words.extend(["--output", "json"]);
        }
        words.extend(["--tools", "/usr/local/games/harness-tools", "--workspace", &workspace]);
        words.extend(more);
        if !more.contains(&"--task") {
            words.extend(["--task", "please mend sums.py"]);
        }
        let mut command = self.harness(&words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn wake(&self, session: &str) -> Output {
        self.harness(&["wake", session, "--output", "json", "--lease", "0.4"]).output().expect("it runs")
    }

    pub fn events(&self, session: &str) -> Vec<Value> {
        let output = self.harness(&["events", session]).output().expect("it runs");
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(|line| serde_json::from_str(line).expect("an event"))
            .collect()
    }

    pub fn of_type(&self, session: &str, kind: &str) -> Vec<Value> {
        self.events(session).into_iter().filter(|event| event["type"] == kind).collect()
    }

    /// Another model's host, on loopback.
    pub fn ask_at(&mut self, port: u16) {
        self.configure(port, "");
        self.kill_daemon();
    }

    /// What nginx has let through and refused.
    pub fn seen(&self) -> Vec<String> {
        fs::read_to_string(self.path("seen")).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// At once, in the middle of whatever it says.
    pub fn kill_fake(&mut self) {
        if let Some(fake) = &mut self.fake {
            let _ = fake.0.kill();
        }
        self.fake = None;
    }

    pub fn restart_fake(&mut self) {
        self.fake = Some(start_fake(self.folder.path(), self.fake_port));
    }

    pub fn keeps(&mut self, root: PathBuf) {
        self.root = Some(root);
    }

    pub fn refuse(&self, refuses: bool) {
        let file = self.root.as_ref().expect("there is one").join("refuse");
        let done = if refuses { fs::write(&file, "") } else { fs::remove_file(&file) };
        done.expect("it is ours");
    }

    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("it runs").0.id()
    }
}

/// PostgreSQL, on loopback and on a socket of its own; it trusts whoever reaches it.
pub struct Server {
    pub port: u16,
    _process: Process,
    folder: TempDir,
}

impl Server {
    pub fn postgres() -> Server {
        Server::listening_at("127.0.0.1", &[])
    }

    /// Started behind `wrapper`, as `ip netns exec`.
    pub fn listening_at(address: &str, wrapper: &[&str]) -> Server {
        let folder = tempfile::Builder::new().prefix("broker-postgres-").tempdir().expect("a directory");
        let owner = nix::unistd::User::from_name("postgres").ok().flatten().expect("PostgreSQL is installed");
        std::os::unix::fs::chown(folder.path(), Some(owner.uid.as_raw()), None).expect("root may");
        let programs = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed").flatten().next();
        let programs = programs.expect("a version").path().join("bin");
        let as_owner = |name: &str| {
            let words =
                [wrapper, &["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]].concat();
            let mut command = Command::new(words[0]);
            command.args(&words[1..]).arg(programs.join(name));
            command.arg("-D").arg(folder.path().join("data")).current_dir(folder.path());
            command.stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let made =
            as_owner("initdb").args(["-U", "harness", "--auth=trust", "-N"]).status().expect("it runs");
        assert!(made.success());
        let trust = "local all all trust\nhost all all 0.0.0.0/0 trust\n";
        fs::write(folder.path().join("data/pg_hba.conf"), trust).expect("root may");
        let port = free_port();
        let mut command = as_owner("postgres");
        command
            .args(["-p", &port.to_string(), "-h", address, "-k"])
            .arg(folder.path())
            .args(["-c", "fsync=off"]);
        let process = Process(command.stdin(Stdio::null()).spawn().expect("it starts"));
        let server = Server { port, _process: process, folder };
        assert!(within(Duration::from_secs(20), || server.sql("SELECT 1")), "PostgreSQL answers");
        server
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join(format!(".s.PGSQL.{}", self.port))
    }

    /// As the server's own administrator; whether it was done.
    pub fn sql(&self, text: &str) -> bool {
        let mut command = Command::new("psql");
        command.arg("-h").arg(self.folder.path()).args([
            "-p",
            &self.port.to_string(),
            "-U",
            "harness",
            "-d",
            "postgres",
        ]);
        let done = command
            .args(["-v", "ON_ERROR_STOP=1", "-qAtc", text])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        done.is_ok_and(|status| status.success())
    }
}

/// The Messages server that scripts/test installs.
fn fake(place: &Path, port: u16, wrapper: &[&str]) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let program = root.join("target/fakellm/bin/fakellm");
    assert!(program.exists(), "{} is not installed: run scripts/test", program.display());
    let mut command = match wrapper {
        [] => Command::new(program),
        [first, more @ ..] => {
            let mut command = Command::new(first);
            command.args(more).arg(program);
            command
        }
    };
    command.args(["serve", "--port", &port.to_string(), "--config"]).arg(place.join("rules.yaml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).current_dir(place);
    command
}

fn start_fake(place: &Path, port: u16) -> Process {
    Process::serving(&mut fake(place, port, &[]), port)
}

/// In another network: it is asked for when it is needed.
pub fn start_fake_in(place: &Path, port: u16, wrapper: &[&str]) -> Process {
    Process(fake(place, port, wrapper).spawn().expect("it starts"))
}

pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("it is ours");
}

pub fn said(output: &Output) -> String {
    format!(
        "{} {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Lines of a child as they come.
pub struct Lines(std::io::Lines<BufReader<ChildStdout>>);

impl Lines {
    pub fn of(child: &mut Child) -> Lines {
        Lines(BufReader::new(child.stdout.take().expect("a pipe")).lines())
    }

    /// The next event; nothing where there are no more.
    pub fn event(&mut self) -> Option<Value> {
        let line = self.0.next()?.ok()?;
        serde_json::from_str(&line).ok()
    }

    /// Until one is like that.
    pub fn until(&mut self, like: impl Fn(&Value) -> bool) -> Option<Value> {
        loop {
            let event = self.event()?;
            if like(&event) {
                return Some(event);
            }
        }
    }
}
