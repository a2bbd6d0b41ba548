//! Who may know of a sandbox and end it, and what dies with whom.

use super::*;

fn sleeping(daemon: &Daemon, uid: u32, token: &str) -> Child {
    let before = daemon.list(0).len();
    let mut command = daemon.broker(uid, &["exec"]);
    let run = command.args(["--", "sh", "-c", "sleep 600; :", token]).spawn().expect("it starts");
    assert!(within(Duration::from_secs(5), || daemon.list(0).len() > before), "{}", daemon.log());
    assert!(within(Duration::from_secs(5), || inside(token) > 0), "{}", daemon.log());
    run
}

/// Processes of a workload, which the client is not.
fn inside(token: &str) -> usize {
    let owner = |pid: &u32| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(format!("/proc/{pid}")).is_ok_and(|found| found.uid() >= 0x7000_0000)
    };
    broker_tests::carriers(token).iter().filter(|pid| owner(pid)).count()
}

#[test]
fn a_sandbox_is_its_caller_s_and_root_s() {
    let daemon = Daemon::start();
    let token = broker_tests::canary();
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
    let token = broker_tests::canary();
    let mut run = sleeping(&daemon, ADA, &token);
    let core = daemon.role("core").expect("there is a core");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(core), nix::sys::signal::Signal::SIGKILL)
        .expect("it lives");
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
    let (token, own) = (broker_tests::canary(), folder_of(ADA));
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
    let token = broker_tests::canary();
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
    let token = broker_tests::canary();
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
    let (one, other) = (broker_tests::canary(), broker_tests::canary());
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
