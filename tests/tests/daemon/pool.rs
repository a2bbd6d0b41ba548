//! What is made before anybody asks: as confined as what is made then, used once, and nobody's when it is too old.

use serde_json::json;

use super::lives::Peer;
use super::*;

const POOL: &str = "[pool]\nnetworks = 2\nwarm = { default = 2 }\n";

/// How many wait, by the daemon's own count.
fn warm(daemon: &Daemon, policy: &str) -> u64 {
    let peer = Peer::new(daemon);
    peer.send("Metrics", &json!({}), false, &[]);
    let text = peer.reply().0["parameters"]["text"].as_str().unwrap_or_default().to_owned();
    let name = format!("broker_pool{{policy=\"{policy}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.and_then(|count| count.parse().ok()).unwrap_or_default()
}

fn wait_for(daemon: &Daemon, policy: &str, count: u64) {
    assert!(within(Duration::from_secs(10), || warm(daemon, policy) == count), "{}", daemon.log());
}

fn full(daemon: &Daemon) {
    wait_for(daemon, "default", 2);
}

/// The network namespaces of the inits that there are, as the kernel names them.
fn networks(daemon: &Daemon) -> Vec<String> {
    let inits = children(daemon.process.id()).into_iter().flat_map(|pid| children(pid.cast_unsigned()));
    let name = |pid: i32| Some(fs::read_link(format!("/proc/{pid}/ns/net")).ok()?.display().to_string());
    inits.filter_map(name).collect()
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)))
}

/// For a daemon's mount namespace: `/etc/broker/policies` is `folder`, whatever the host has there.
fn policies(folder: &Path) -> String {
    format!(
        "mount -t tmpfs none $STATE && mkdir $STATE/up $STATE/work && \
         mount -t overlay none -o lowerdir=/etc,upperdir=$STATE/up,workdir=$STATE/work /etc && \
         mkdir -p /etc/broker/policies && mount --bind {} /etc/broker/policies",
        folder.display()
    )
}

/// What a program finds inside is the same, but for what is each sandbox's own.
#[test]
fn a_warm_sandbox_is_as_confined_as_a_new_one() {
    let script = "import os
status = {line.split(':')[0]: line.split(':')[1].strip() for line in open('/proc/self/status')}
print([status[key] for key in ('CapEff', 'CapBnd', 'NoNewPrivs', 'Seccomp', 'Uid', 'Groups')])
print(sorted(os.listdir('/')), os.listdir('/tmp'), os.getcwd(), sorted(os.environ))
print(sorted(os.listdir('/proc/self/fd')), sorted(pid for pid in os.listdir('/proc') if pid.isdigit()))
print([line.split()[3:6:2] for line in open('/proc/self/mountinfo')])
print(open('/proc/net/dev').read().count(':'), open('/proc/self/uid_map').read().split()[0])";
    let look = |daemon: &Daemon| daemon.exec(ADA, &["--env", "A=b"], &["python3", "-c", script]);
    let (new, pooled) = (Daemon::start(), Daemon::start_with("true", POOL));
    full(&pooled);
    let (one, other) = (look(&new), look(&pooled));
    assert!(one.status.success(), "{}", text(&one.stderr));
    assert_eq!(text(&one.stdout), text(&other.stdout), "{}", text(&other.stderr));
}

#[test]
fn each_warm_sandbox_is_used_once() {
    let daemon = Daemon::start_with("true", POOL);
    let mut seen = std::collections::BTreeSet::new();
    for turn in 0..6 {
        full(&daemon);
        let made = networks(&daemon);
        let script =
            "ls /tmp; touch /tmp/here; readlink /proc/self/ns/net /proc/self/ns/mnt /proc/self/ns/pid";
        let output = daemon.exec(ADA, &[], &["sh", "-c", script]);
        let said = text(&output.stdout);
        assert_eq!(said.lines().count(), 3, "it is empty: {said} {}", text(&output.stderr));
        assert!(made.iter().any(|network| said.starts_with(network)), "it was there before: {made:?} {said}");
        assert!(seen.insert(said), "turn {turn}");
    }
    let started = daemon.records().iter().filter(|record| record["event"]["kind"] == "start").count();
    assert_eq!(started, 6, "what nobody used is in no record");
    assert!(within(Duration::from_secs(2), || daemon.list(0).is_empty()), "nor in the list");
}

#[test]
fn statuses_and_reports_of_warm_sandboxes_are_those_of_new_ones() {
    let folder = tempfile::tempdir().expect("a directory");
    let policies = "mkdir -p /etc/broker && mount -t tmpfs none /etc/broker && mkdir /etc/broker/policies && \
        printf 'extends = \"default\"\\n[limits]\\ntimeout = \"1s\"\\ngrace = \"200ms\"\\nmemory = \"64MiB\"\\n' > /etc/broker/policies/short.toml";
    let mut daemon = Daemon::start_with(policies, "[pool]\nwarm = { short = 2 }\n");
    let hog = "x = bytearray(200 << 20); x[::4096] = b'a' * len(x[::4096])";
    for (command, code, kind, by) in [
        (vec!["sh", "-c", "exit 7"], 7, "exited", "command"),
        (vec!["no-such-command"], 127, "not_found", "command"),
        (vec!["sh", "-c", "kill -9 $$"], 137, "signaled", "signal"),
        (vec!["sh", "-c", "trap '' TERM; while :; do :; done"], 124, "timed_out", "policy"),
        (vec!["python3", "-c", hog], 137, "oom", "limit"),
    ] {
        wait_for(&daemon, "short", 2);
        let path = folder.path().join("report");
        let output =
            daemon.exec(0, &["--policy", "short", "--report", &path.display().to_string()], &command);
        let report = fs::read(&path).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
        let report: Value = serde_json::from_slice(&report).expect("JSON");
        let said = (output.status.code(), &report["outcome"]["kind"], &report["ended_by"]);
        assert_eq!(said, (Some(code), &json!(kind), &json!(by)), "{command:?}: {report}");
    }
    daemon.stop();
}

/// Whoever goes away, or has it ended, ends it; a signal reaches the command.
#[test]
fn a_warm_sandbox_ends_as_a_new_one_does() {
    let daemon = Daemon::start_with("true", POOL);
    for (way, code) in [("TERM", 143), ("kill", 137)] {
        full(&daemon);
        let mut words = daemon.broker(0, &["exec", "--report", "-"]);
        let child = words
            .args(["--", "sleep", "600"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it runs");
        assert!(within(Duration::from_secs(5), || !daemon.list(0).is_empty()));
        std::thread::sleep(Duration::from_millis(200));
        if way == "kill" {
            let id = daemon.list(0)[0]["id"].as_str().expect("a name").to_owned();
            assert!(daemon.broker(0, &["kill", &id]).status().expect("it runs").success());
        } else {
            let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it lives");
        }
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(code), "{way}: {}", text(&output.stderr));
        let by = report(&output)["ended_by"].clone();
        assert_eq!(by, json!(if way == "kill" { "broker" } else { "signal" }));
        assert!(within(Duration::from_secs(2), || daemon.list(0).is_empty()));
    }
}

/// A policy that was changed since holds from the next run on.
#[test]
fn what_was_made_under_an_older_policy_is_not_used() {
    let policy = |more: &str| format!("extends = \"default\"\n[env.set]\nWHICH = \"{more}\"\n");
    let folder = tempfile::tempdir().expect("a directory");
    set_mode(folder.path(), 0o755);
    let file = folder.path().join("mine.toml");
    fs::write(&file, policy("old")).expect("a policy");
    let daemon = Daemon::start_with(&policies(folder.path()), "[pool]\nwarm = { mine = 1 }\n");
    let which = || text(&daemon.exec(0, &["--policy", "mine"], &["sh", "-c", "echo $WHICH"]).stdout);
    wait_for(&daemon, "mine", 1);
    assert_eq!(which(), "old\n");
    wait_for(&daemon, "mine", 1);
    fs::write(&file, policy("new")).expect("a policy");
    assert_eq!(which(), "new\n", "the one that waited is old");
    wait_for(&daemon, "mine", 1);
    assert_eq!(which(), "new\n");
}

#[test]
fn a_sandbox_that_lives_may_have_been_warm() {
    let daemon = Daemon::start_with("true", POOL);
    full(&daemon);
    let peer = Peer::new(&daemon);
    let (id, handle) = peer.provision(None);
    assert_eq!(peer.execute(&handle, "one", "echo x > /tmp/file; cat /tmp/file").1, "x\n");
    daemon.kill_core();
    full(&daemon);
    let peer = Peer::new(&daemon);
    assert_eq!(peer.execute(&handle, "two", "cat /tmp/file").1, "x\n", "the next core knows whose it is");
    let ids: Vec<Value> = daemon.list(0).iter().map(|sandbox| sandbox["id"].clone()).collect();
    assert_eq!(ids, [json!(id)]);
    drop(handle);
    assert!(within(Duration::from_secs(2), || daemon.list(0).is_empty()));
    let live = || children(daemon.process.id()).len();
    assert!(
        within(Duration::from_secs(2), || live() == 5),
        "core, two roles and two of the pool: {}",
        live()
    );
}

/// What cannot be told to a warm sandbox ends it: none is left that nobody has.
#[test]
fn words_that_fit_no_packet_leave_no_warm_sandbox_behind() {
    let daemon = Daemon::start_with("true", POOL);
    let peer = Peer::new(&daemon);
    let words = vec!["\u{1}".repeat(4096); 7];
    for _ in 0..3 {
        full(&daemon);
        let run = json!({ "policy": "default", "command": words, "environment": [], "path": "/bin", "streams": {} });
        peer.send("Run", &run, false, &[]);
        assert_eq!(peer.reply().0["error"], "io.broker.Control.NotStarted");
    }
    full(&daemon);
    let live = || children(daemon.process.id()).len();
    assert!(
        within(Duration::from_secs(2), || live() == 5),
        "core, two roles and two of the pool: {}",
        live()
    );
}
