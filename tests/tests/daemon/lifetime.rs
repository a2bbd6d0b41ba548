//! Who may know of a sandbox and end it, and what dies with whom.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

use broker_tests::canary;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::lives::Peer;
use super::rows::python;
use super::*;

pub fn sleeping(daemon: &Daemon, uid: u32, token: &str) -> Child {
    let before = daemon.list(0).len();
    let mut command = daemon.broker(uid, &["exec"]);
    let run = command.args(["--", "sh", "-c", "sleep 600; :", token]).spawn().expect("it starts");
    assert!(within(Duration::from_secs(5), || daemon.list(0).len() > before), "{}", daemon.log());
    assert!(within(Duration::from_secs(5), || inside(token) > 0), "{}", daemon.log());
    run
}

/// Processes of a workload, which the client is not.
pub fn inside(token: &str) -> usize {
    let owner =
        |pid: &u32| fs::metadata(format!("/proc/{pid}")).is_ok_and(|found| found.uid() >= 0x7000_0000);
    broker_tests::carriers(token).iter().filter(|pid| owner(pid)).count()
}

#[test]
fn a_sandbox_is_its_caller_s_and_root_s() {
    let daemon = Daemon::start();
    let token = canary();
    let mut run = sleeping(&daemon, ADA, &token);
    let own = daemon.list(ADA);
    assert_eq!(own.len(), 1);
    assert_eq!(own[0]["uid"], ADA);
    assert_eq!(daemon.list(0).len(), 1);
    assert_eq!(daemon.list(EVE).len(), 0, "another's does not show");
    let id = own[0]["id"].as_str().expect("a name").to_owned();
    // The same answer, whether there is one or not.
    let answer = |id: &str| {
        let output = daemon.broker(EVE, &["kill", id]).output().expect("it runs");
        assert_eq!(output.status.code(), Some(1));
        text(&output.stderr).replace(id, "ID")
    };
    assert_eq!(answer(&id), answer("1-1"));
    assert_eq!(daemon.list(ADA).len(), 1);
    assert!(daemon.broker(ADA, &["kill", &id]).status().expect("it runs").success());
    assert_eq!(run.wait().expect("it ends").code(), Some(137));
    assert!(within(Duration::from_secs(2), || inside(&token) == 0));
    assert_eq!(daemon.list(0).len(), 0);
}

/// The core's death is its sandboxes' neither end nor loss: another core knows them and records how they ended.
#[test]
fn sandboxes_outlive_the_core() {
    let daemon = Daemon::start();
    let token = canary();
    let mut run = sleeping(&daemon, ADA, &token);
    let core = daemon.role("core").expect("there is a core");
    kill(Pid::from_raw(core), Signal::SIGKILL).expect("it lives");
    assert_eq!(run.wait().expect("its connection is gone").code(), Some(125));
    assert!(
        within(Duration::from_secs(5), || daemon.role("core").is_some_and(|pid| pid != core)),
        "{}",
        daemon.log()
    );
    assert!(within(Duration::from_secs(5), || UnixStream::connect(daemon.socket()).is_ok()));
    assert!(within(Duration::from_secs(5), || daemon.list(ADA).len() == 1), "the new core knows it");
    assert!(inside(&token) > 0, "it lives");
    let id = daemon.list(ADA)[0]["id"].as_str().expect("a name").to_owned();
    assert!(daemon.broker(ADA, &["kill", &id]).status().expect("it runs").success());
    assert!(within(Duration::from_secs(2), || inside(&token) == 0));
    let ended = |record: &Value| record["event"]["kind"] == "end" && record["event"]["sandbox"] == id;
    assert!(within(Duration::from_secs(2), || daemon.records().iter().any(ended)));
    assert!(daemon.audit("verify").status.success());
}

/// Acting with a caller's ids takes a parent-death signal away; it has to be there again.
#[test]
fn a_run_with_a_workspace_does_not_outlive_the_launcher_either() {
    let mut daemon = Daemon::start();
    let (token, own) = (canary(), folder_of(ADA));
    let mut command = daemon.broker(ADA, &["exec", "--workspace", &own.path().display().to_string()]);
    let mut run = command.args(["--", "sh", "-c", "sleep 600; :", &token]).spawn().expect("it starts");
    assert!(within(Duration::from_secs(5), || inside(&token) > 0), "{}", daemon.log());
    daemon.process.kill().expect("it lives");
    daemon.process.wait().expect("it is reaped");
    assert!(within(Duration::from_secs(2), || inside(&token) == 0), "a workload outlived its launcher");
    run.wait().expect("its connection is gone");
}

/// With the launcher everything goes: it holds the lifelines.
#[test]
fn nothing_outlives_the_launcher() {
    let mut daemon = Daemon::start();
    let token = canary();
    let mut run = sleeping(&daemon, ADA, &token);
    let core = daemon.role("core").expect("there is a core");
    daemon.process.kill().expect("it lives");
    daemon.process.wait().expect("it is reaped");
    assert!(within(Duration::from_secs(2), || inside(&token) == 0), "a workload outlived its launcher");
    assert!(within(Duration::from_secs(2), || !Path::new(&format!("/proc/{core}")).exists()));
    assert_eq!(run.wait().expect("its connection is gone").code(), Some(125));
}

#[test]
fn when_the_service_ends_nothing_of_it_is_left() {
    let mut daemon = Daemon::start();
    let token = canary();
    let mut runs = [sleeping(&daemon, ADA, &token), sleeping(&daemon, 0, &token)];
    daemon.stop();
    assert!(within(Duration::from_secs(2), || inside(&token) == 0));
    for run in &mut runs {
        assert_eq!(run.wait().expect("it ends").code(), Some(125));
    }
    assert!(!daemon.socket().exists());
}

/// An init that is ended from outside takes its sandbox along, and nobody else's.
#[test]
fn one_sandbox_s_end_is_no_other_s() {
    let daemon = Daemon::start();
    let (one, other) = (canary(), canary());
    let mut first = sleeping(&daemon, ADA, &one);
    let mut second = sleeping(&daemon, 0, &other);
    let own = daemon.list(ADA);
    let id = own[0]["id"].as_str().expect("a name");
    assert!(daemon.broker(0, &["kill", id]).status().expect("it runs").success());
    assert_eq!(first.wait().expect("it ends").code(), Some(137));
    assert!(inside(&one) == 0 && inside(&other) > 0);
    second.kill().expect("it lives");
    second.wait().expect("it is reaped");
    assert!(within(Duration::from_secs(2), || inside(&other) == 0));
}

/// `broker serve` once more, on the configuration of `daemon`.
fn serve(daemon: &Daemon) -> Child {
    let mut command = Command::new(program("broker"));
    command.args(["serve", "--config"]).arg(daemon.folder.path().join("config.toml"));
    command.stderr(Stdio::piped()).spawn().expect("it starts")
}

/// CB-21, first half. With the daemon its sandboxes end, and what they were addressed by is worth nothing to the next.
#[test]
fn cb_21_a_killed_daemon_leaves_nothing_that_the_next_would_obey() {
    let mut daemon = Daemon::start();
    let token = canary();
    let mut run = sleeping(&daemon, ADA, &token);
    let (id, handle) = Peer::new(&daemon).provision(None);
    let core = daemon.role("core").expect("there is a core");
    kill(Pid::from_raw(daemon.process.id().cast_signed()), Signal::SIGKILL).expect("it lives");
    daemon.process.wait().expect("it is reaped");
    assert!(within(Duration::from_secs(2), || inside(&token) == 0
        && !Path::new(&format!("/proc/{core}")).exists()));
    assert_eq!(run.wait().expect("it ends").code(), Some(125));
    // Its socket's path is there still, and nobody else can take it. The control: in a directory for all anybody can.
    let stale = daemon.socket();
    let take = |path: &Path| {
        let script = "import os, socket, sys; os.rename(sys.argv[1], sys.argv[1] + '.old'); \
                      socket.socket(socket.AF_UNIX).bind(sys.argv[1]); print('taken')";
        python(EVE, script, &[path.display().to_string()]).output().expect("python3 runs").status.success()
    };
    assert!(stale.exists() && !take(&stale));
    let open = folder_of(0);
    set_mode(open.path(), 0o777);
    let loose = open.path().join("broker.sock");
    drop(UnixListener::bind(&loose).expect("a socket"));
    assert!(take(&loose), "the control");
    daemon.process = serve(&daemon);
    assert!(within(Duration::from_secs(5), || UnixStream::connect(&stale).is_ok()), "{}", daemon.log());
    assert_eq!(daemon.list(0).len(), 0);
    let peer = Peer::new(&daemon);
    assert_eq!(peer.execute(&handle, "late", "true").0["error"], "io.broker.Control.NoSuchHandle");
    assert_eq!(daemon.broker(0, &["kill", &id]).output().expect("it runs").status.code(), Some(1));
    assert!(daemon.exec(ADA, &[], &["true"]).status.success());
    assert!(daemon.audit("verify").status.success());
}

/// CB-21, second half. Where the socket should stand somebody else was first: it is neither followed nor taken away nor used.
#[test]
fn cb_21_what_stands_where_the_socket_should_is_not_followed() {
    let mut daemon = Daemon::start();
    daemon.stop();
    let (socket, victim) = (daemon.socket(), daemon.folder.path().join("victim"));
    fs::write(&victim, "root's").expect("a file");
    set_mode(&victim, 0o600);
    let listener = UnixListener::bind(daemon.folder.path().join("others.sock")).expect("a socket");
    let ways: [(&str, &dyn Fn()); 6] = [
        ("a file", &|| fs::write(&socket, "Eve's").expect("a file")),
        ("a directory", &|| fs::create_dir(&socket).expect("a directory")),
        ("a link to a file", &|| std::os::unix::fs::symlink("victim", &socket).expect("a link")),
        ("a link to nothing", &|| std::os::unix::fs::symlink("absent", &socket).expect("a link")),
        ("a link to another's socket", &|| {
            std::os::unix::fs::symlink("others.sock", &socket).expect("a link")
        }),
        ("another's socket", &|| {
            fs::hard_link(daemon.folder.path().join("others.sock"), &socket).expect("a name")
        }),
    ];
    for (what, place) in ways {
        place();
        std::os::unix::fs::lchown(&socket, Some(EVE), Some(EVE)).expect("root gives it away");
        let before = fs::symlink_metadata(&socket).expect("it is there");
        let mut process = serve(&daemon);
        let refused = within(Duration::from_secs(5), || process.try_wait().expect("it is ours").is_some());
        assert!(refused, "{what}: it serves");
        let output = process.wait_with_output().expect("it has ended");
        assert!(
            !output.status.success() && text(&output.stderr).contains("broker.sock"),
            "{what}: {output:?}"
        );
        let after = fs::symlink_metadata(&socket).expect("it is there");
        assert_eq!((after.ino(), after.mode(), after.uid()), (before.ino(), before.mode(), EVE), "{what}");
        assert_eq!(fs::metadata(&victim).expect("it is there").mode() & 0o777, 0o600, "{what}");
        assert!(!daemon.folder.path().join("absent").exists(), "{what}");
        if before.is_dir() { fs::remove_dir(&socket) } else { fs::remove_file(&socket) }.expect("it can go");
    }
    drop(listener);
    // The control, and what is nobody's any more: a socket at which nobody answers is replaced by the daemon's own.
    fs::rename(daemon.folder.path().join("others.sock"), &socket).expect("a name");
    daemon.process = serve(&daemon);
    assert!(within(Duration::from_secs(5), || UnixStream::connect(&socket).is_ok()));
    assert_eq!(fs::metadata(&socket).expect("it is there").uid(), 0);
}
