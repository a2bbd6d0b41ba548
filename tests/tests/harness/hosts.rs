//! Three hosts of harnesses on one store: network namespaces, each with a daemon and drivers of its own, and a hub with PostgreSQL and the
//! model's host. One host dies; another is cut off, and comes back.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use broker_tests::{program, within};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::scene::{ADA, Process, Server, free_port, set_mode, start_fake_in};

const LEASE: Duration = Duration::from_secs(3);
const HUB: &str = "10.99.7.1";

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split_whitespace()).output().expect("ip runs");
    assert!(done.status.success(), "ip {words}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Namespaces that go with the test.
struct Network(String);

impl Network {
    fn new() -> Network {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let network = Network(format!("bh{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed)));
        let hub = network.of("hub");
        ip(&format!("netns add {hub}"));
        ip(&format!("-n {hub} link set lo up"));
        ip(&format!("-n {hub} link add hub type bridge"));
        ip(&format!("-n {hub} addr add {HUB}/24 dev hub"));
        ip(&format!("-n {hub} link set hub up"));
        for number in 1..=3 {
            let host = network.of(&number.to_string());
            ip(&format!("netns add {host}"));
            ip(&format!("-n {host} link set lo up"));
            ip(&format!("-n {hub} link add to{number} type veth peer name wire netns {host}"));
            ip(&format!("-n {hub} link set to{number} master hub up"));
            ip(&format!("-n {host} addr add 10.99.7.{}/24 dev wire", 10 + number));
            ip(&format!("-n {host} link set wire up"));
        }
        network
    }

    fn of(&self, name: &str) -> String {
        format!("{}-{name}", self.0)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in ["hub", "1", "2", "3"] {
            let _ = Command::new("ip").args(["netns", "del", &self.of(name)]).output();
        }
    }
}

/// One host: a daemon, and drivers for whatever is due.
struct Host {
    folder: TempDir,
    daemon: Process,
    drivers: Process,
}

impl Host {
    fn socket(&self) -> PathBuf {
        self.folder.path().join("broker.sock")
    }

    /// As when its power goes.
    fn die(mut self) {
        let _ = killpg(self.drivers.pid(), Signal::SIGKILL);
        let _ = self.drivers.0.wait();
        let _ = self.daemon.0.kill();
        let _ = self.daemon.0.wait();
    }
}

struct Site {
    network: Network,
    shared: TempDir,
    hosts: Vec<Host>,
    _servers: [Process; 2],
    log: Server,
    store: &'static str,
}

const RULES: &str = r#"
rules:
  - name: done
    when: {tool_result_contains: "second part"}
    respond: {content: "Done."}
  - name: second
    when: {tool_result_contains: "first part"}
    respond: {tool_calls: [{name: bash, arguments: {command: "echo 2 >> ran; sleep 1; echo second part"}}]}
  - name: first
    when: {messages_contain: "work"}
    respond: {tool_calls: [{name: bash, arguments: {command: "echo 1 >> ran; sleep 1; echo first part"}}]}
"#;

impl Site {
    fn new() -> Site {
        let network = Network::new();
        let hub = network.of("hub");
        let shared = tempfile::Builder::new().prefix("broker-site-").tempdir().expect("a directory");
        set_mode(shared.path(), 0o755);
        fs::write(shared.path().join("rules.yaml"), RULES).expect("it is ours");
        let (model, fake) = (free_port(), free_port());
        let place = shared.path().display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {place}/{kind};\n"))
            .concat();
        let nginx = format!(
            "daemon off; pid {place}/pid; error_log {place}/errors; events {{}}\nhttp {{\n{temporary}access_log off;\n\
             server {{ listen {HUB}:{model}; if ($http_x_api_key != \"key-of-the-site\") {{ return 401; }}\n\
             location / {{ proxy_pass http://127.0.0.1:{fake}; proxy_buffering off; proxy_http_version 1.1; }} }} }}\n"
        );
        fs::write(shared.path().join("nginx.conf"), nginx).expect("it is ours");
        let inside = ["ip", "netns", "exec", hub.as_str()];
        let fake = start_fake_in(shared.path(), fake, &inside);
        let mut command = Command::new(inside[0]);
        command
            .args(&inside[1..])
            .args(["nginx", "-c"])
            .arg(shared.path().join("nginx.conf"))
            .stdin(Stdio::null());
        let nginx = Process(command.spawn().expect("it starts"));
        let log = Server::listening_at(HUB, &inside);
        let mut site = Site {
            network,
            shared,
            hosts: Vec::new(),
            _servers: [fake, nginx],
            log,
            store: "grant:log?user=harness&database=postgres",
        };
        for number in 1..=3 {
            let host = site.host(number, model);
            site.hosts.push(host);
        }
        site
    }

    fn host(&self, number: usize, model: u16) -> Host {
        let folder = tempfile::Builder::new().prefix("broker-host-").tempdir().expect("a directory");
        set_mode(folder.path(), 0o755);
        let place = folder.path().display();
        fs::create_dir(folder.path().join("state")).expect("a directory");
        fs::write(folder.path().join("key"), "key-of-the-site\n").expect("it is ours");
        let config = format!(
            "[server]\nsocket = \"{place}/broker.sock\"\nstate = \"{place}/state\"\n\
             [credential.model]\nsource = \"file:{place}/key\"\n\
             [grant.model]\nkind = \"http\"\nhost = \"api.anthropic.com\"\ncredential = \"model\"\n\
             inject = {{ header = \"x-api-key\", value = \"{{secret}}\" }}\n\
             allow = [ {{ methods = [\"POST\"], path = \"/v1/messages\" }} ]\nupstream = \"{HUB}:{model}\"\nupstream_tls = \"off\"\n\
             [grant.log]\nkind = \"tcp\"\nhost = \"log.test\"\nport = 5432\nupstream = \"{HUB}:{}\"\n\
             [[access]]\nuser = \"{ADA}\"\npolicies = [\"default\"]\ngrants = [\"model\", \"log\"]\n",
            self.log.port
        );
        fs::write(folder.path().join("config.toml"), config).expect("it is ours");
        let log = fs::File::create(folder.path().join("log")).expect("a log");
        let script = "mount -t tmpfs tools /usr/local/games && cp \"$TOOLS\" /usr/local/games && exec \"$@\"";
        // Not by ip(8), which covers /sys and with it the control groups.
        let mut command = Command::new("nsenter");
        command.args([
            &format!("--net=/run/netns/{}", self.network.of(&number.to_string())),
            "unshare",
            "--mount",
            "--propagation",
            "private",
        ]);
        command
            .args(["sh", "-c", script, "sh"])
            .arg(program("broker"))
            .args(["serve", "--config"])
            .arg(folder.path().join("config.toml"));
        command
            .env("TOOLS", program("harness-tools"))
            .stdin(Stdio::null())
            .stderr(log.try_clone().expect("a log"));
        let daemon = Process(command.spawn().expect("it starts"));
        let socket = folder.path().join("broker.sock");
        let answers = || {
            Command::new(program("broker"))
                .args(["ps", "--connect"])
                .arg(&socket)
                .output()
                .is_ok_and(|output| output.status.success())
        };
        assert!(
            within(Duration::from_secs(10), answers),
            "{}",
            fs::read_to_string(folder.path().join("log")).unwrap_or_default()
        );
        let mut drivers =
            self.harness(&socket, &["drive", "--sessions", "2", "--lease", &LEASE.as_secs().to_string()]);
        let drivers = drivers.process_group(0).stdout(Stdio::null()).stderr(log).spawn().expect("it starts");
        Host { folder, daemon, drivers: Process(drivers) }
    }

    fn harness(&self, socket: &PathBuf, words: &[&str]) -> Command {
        let mut command = Command::new(program("harness"));
        command.args(words).env("HARNESS_STORE", self.store).env("BROKER_SOCKET", socket);
        command.uid(ADA).gid(ADA).current_dir("/").stdin(Stdio::null());
        command
    }

    /// By a host that stays.
    fn ask(&self, words: &[&str]) -> String {
        let socket = self.hosts.last().expect("a host").socket();
        let output = self.harness(&socket, words).output().expect("it runs");
        assert!(output.status.success(), "{words:?}: {}", super::scene::said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn make(&self, session: &str) {
        let workspace = self.shared.path().join(session);
        fs::create_dir(&workspace).expect("a directory");
        std::os::unix::fs::chown(&workspace, Some(ADA), Some(ADA)).expect("root may");
        let task = format!("please work ({session})");
        self.ask(&[
            "run",
            "--detach",
            "--model",
            "scripted",
            "--session",
            session,
            "--task",
            &task,
            "--tools",
            "/usr/local/games/harness-tools",
            "--workspace",
            &workspace.display().to_string(),
        ]);
    }

    fn listed(&self) -> Vec<Value> {
        serde_json::from_str(&self.ask(&["list", "--json"])).expect("a list")
    }

    fn owners(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        self.listed().iter().map(|session| (text(&session["id"]), text(&session["owner"]))).collect()
    }

    fn all_done(&self) -> bool {
        self.listed().iter().all(|session| session["wanted_ms"].is_null())
    }

    /// Each log is whole, ends well, and everything that ran is a call that it says.
    fn check(&self, session: &str) {
        let events: Vec<Value> = self
            .ask(&["events", session])
            .lines()
            .map(|line| serde_json::from_str(line).expect("an event"))
            .collect();
        assert_eq!(events.last().expect("events")["stop_reason"]["type"], "end_turn", "{events:#?}");
        let calls = events.iter().filter(|event| event["type"] == "hand.call").count();
        let ran =
            fs::read_to_string(self.shared.path().join(session).join("ran")).expect("it ran").lines().count();
        assert!((2..=calls).contains(&ran), "{session}: {ran} runs of {calls} calls");
    }

    /// The drivers of a host: their numbers are in the lease's owner.
    fn pids_of(&self, host: usize) -> Vec<String> {
        let group = self.hosts[host].drivers.pid().as_raw();
        let all = fs::read_dir("/proc").expect("/proc").flatten();
        let pids = all
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.parse::<i32>().is_ok());
        let of_group = |pid: &String| {
            let pid = pid.parse().map(Pid::from_raw).expect("a number");
            nix::unistd::getpgid(Some(pid)).is_ok_and(|own| own.as_raw() == group)
        };
        pids.filter(of_group).collect()
    }

    fn driven_by(&self, host: usize) -> Vec<String> {
        let pids = self.pids_of(host);
        let own = |owner: &str| owner.rsplit(':').next().is_some_and(|pid| pids.iter().any(|own| own == pid));
        self.owners().into_iter().filter(|(_, owner)| own(owner)).map(|(session, _)| session).collect()
    }
}

/// What is still driven by somebody else than who had it.
fn taken_over(site: &Site, before: &[(String, String)], sessions: &[String]) -> bool {
    let now = site.owners();
    sessions.iter().all(|session| {
        let owner = |all: &[(String, String)]| {
            all.iter().find(|(id, _)| id == session).map(|(_, owner)| owner.clone())
        };
        owner(&now) != owner(before)
    })
}

#[test]
fn a_host_that_dies_is_taken_over_by_the_others() {
    let mut site = Site::new();
    let sessions: Vec<String> = (0..6).map(|number| format!("s{number}")).collect();
    sessions.iter().for_each(|session| site.make(session));
    assert!(within(Duration::from_secs(10), || !site.driven_by(0).is_empty()), "the first host has work");
    let (its, before) = (site.driven_by(0), site.owners());
    site.hosts.remove(0).die();
    let died = Instant::now();
    // Those that had just ended are done; of the others somebody else has the lease before it could have ended twice.
    let unfinished = |session: &String| {
        site.listed().iter().any(|one| one["id"] == *session && !one["wanted_ms"].is_null())
    };
    let its: Vec<String> = its.into_iter().filter(unfinished).collect();
    assert!(
        within(2 * LEASE, || taken_over(&site, &before, &its)),
        "{its:?} after {:?}: {:?}",
        died.elapsed(),
        site.owners()
    );
    assert!(
        within(Duration::from_secs(30), || site.all_done()),
        "{:#?} {}",
        site.listed(),
        site.ask(&["events", &sessions[0], "--to", "14"])
    );
    sessions.iter().for_each(|session| site.check(session));
}

/// The cable is pulled, for longer than the lease; whoever was cut off believes that it has its sessions, and comes back to find otherwise.
#[test]
fn a_host_that_is_cut_off_loses_its_sessions_and_nothing_else() {
    let site = Site::new();
    let sessions: Vec<String> = (0..4).map(|number| format!("c{number}")).collect();
    sessions.iter().for_each(|session| site.make(session));
    assert!(within(Duration::from_secs(10), || !site.driven_by(0).is_empty()), "the first host has work");
    let hub = site.network.of("hub");
    let (its, before) = (site.driven_by(0), site.owners());
    ip(&format!("-n {hub} link set to1 down"));
    let unfinished = |session: &String| {
        site.listed().iter().any(|one| one["id"] == *session && !one["wanted_ms"].is_null())
    };
    let its: Vec<String> = its.into_iter().filter(unfinished).collect();
    assert!(within(2 * LEASE, || taken_over(&site, &before, &its)), "{its:?}: {:?}", site.owners());
    std::thread::sleep(LEASE);
    ip(&format!("-n {hub} link set to1 up"));
    assert!(
        within(Duration::from_secs(30), || site.all_done()),
        "{:#?} {}",
        site.listed(),
        site.ask(&["events", &sessions[0], "--to", "14"])
    );
    sessions.iter().for_each(|session| site.check(session));
}
