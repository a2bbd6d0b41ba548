//! Rows PR-*: a workload against other processes: the host's, its own init, and those that should end with it.

#[path = "processes/identity.rs"]
mod identity;
#[path = "processes/lifetime.rs"]
mod lifetime;
#[path = "processes/signals.rs"]
mod signals;

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use broker_tests::{OWN_PIDS, Running, Sandbox, assert_refused_with, below, canary, carriers, cases};
use libc::{EACCES, ENOENT, ENOSYS, EPERM, EROFS, ESRCH};

const NONE: &[&str] = &[];

/// A sandbox that cannot hold up the suite.
fn sandbox() -> Sandbox {
    Sandbox::new().option("--timeout").option("60s")
}

/// A process on the host that nobody may touch; it is ended when the test is over.
struct Victim(Child);

impl Victim {
    /// With `token` as its name, in a process group of its own.
    fn new(token: &str) -> Self {
        let mut command = Command::new("sleep");
        let child = command.arg0(token).arg("60").process_group(0).spawn().expect("a process to attack");
        // execve(2) lets the parent go on a moment before the new command line shows.
        let shows =
            || std::fs::read(format!("/proc/{}/cmdline", child.id())).is_ok_and(|line| !line.is_empty());
        assert!(broker_tests::within(Duration::from_secs(2), shows));
        Victim(child)
    }

    fn id(&self) -> String {
        self.0.id().to_string()
    }

    /// The signal that has ended it by now.
    fn killer(&mut self) -> Option<i32> {
        self.0.try_wait().expect("it is our child").and_then(|status| status.signal())
    }

    /// The signal that ends it within two seconds.
    fn killed_by(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.killer().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.killer()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The control of `row` in a pid namespace of its own: the host's init is nothing to practise on.
fn own_pids(sandbox: &Sandbox, row: &str, arguments: &[&str]) -> Vec<broker_tests::Case> {
    cases(&mut below(OWN_PIDS, Command::new(sandbox.probe_path()).arg(row).args(arguments)))
}

/// A named process of the host is attacked by its number. Oracles: the numbers that `/proc` shows inside, the errno
/// of each call, and the process itself.
#[test]
fn pr_01_processes_of_the_host_cannot_be_seen_or_signalled() {
    let sandbox = sandbox();
    let token = canary();
    let mut victim = Victim::new(&token);
    let (front, back) = token.split_at(12);
    let arguments = [victim.id(), front.to_owned(), back.to_owned()];
    let control = sandbox.control("PR-01", &arguments);
    let inside = sandbox.probe("PR-01", &arguments);
    assert_refused_with("PR-01", &control, &inside, NONE, |case| match case {
        "list" => &[0],
        _ => &[ESRCH, EPERM],
    });
    assert_eq!(victim.killer(), None, "the host's process was killed");
}

/// Init and a sibling are attached to, and init's memory and records read. Oracle: the kernel's errnos; the control,
/// with a shell as init, is open in every case.
#[test]
fn pr_02_init_and_siblings_cannot_be_traced() {
    let sandbox = sandbox();
    let control = own_pids(&sandbox, "PR-02", &[]);
    let inside = sandbox.probe("PR-02", NONE);
    assert_refused_with("PR-02", &control, &inside, NONE, |case| {
        if case.starts_with("/proc") { &[EACCES, EPERM, ENOENT] } else { &[EPERM] }
    });
}

/// The broker's command line says what the host calls things; init is made from the broker. Oracle: a token in the name
/// of the report, which the host sees in a command line and nobody inside does.
#[test]
fn pr_02_the_command_line_of_init_tells_nothing_about_the_host() {
    let token = canary();
    let folder = tempfile::tempdir().expect("a folder for the report");
    let sandbox = sandbox().option("--report").option(folder.path().join(&token).display().to_string());
    let script =
        ["sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/comm | tr '\\0\\n' '  '; echo; cat >/dev/null"];
    let running = Running::start(sandbox.command().args(script));
    assert!(!carriers(&token).is_empty(), "the host does not show the token either");
    assert!(
        running.first_line.contains("/proc/[0-9]*"),
        "no command line is visible: {}",
        running.first_line
    );
    assert!(!running.first_line.contains(&token), "visible inside: {}", running.first_line);
}

/// Init's descriptors are asked for through a pidfd, 64 of them. Oracle: EPERM for each, not EBADF, which would say
/// that the right was granted and only the number was free.
#[test]
fn pr_03_the_descriptors_of_init_cannot_be_taken() {
    let sandbox = sandbox();
    let control = own_pids(&sandbox, "PR-03", &[]);
    assert_refused_with("PR-03", &control, &sandbox.probe("PR-03", NONE), NONE, |_| &[EPERM]);
}

/// Each kind of namespace by each call that makes one. Oracle: EPERM from the policy where the kernel itself would
/// say yes to `unshare(CLONE_NEWUSER)`, ENOSYS for `clone3`, whose flags no filter can read.
#[test]
fn pr_06_no_namespace_can_be_made() {
    let sandbox = sandbox();
    let control = sandbox.control("PR-06", NONE);
    let inside = sandbox.probe("PR-06", NONE);
    assert_refused_with("PR-06", &control, &inside, NONE, |case| {
        if case.starts_with("clone3") { &[ENOSYS] } else { &[EPERM] }
    });
}

/// Every namespace file of oneself and of init, and a pidfd of init. Oracle: errnos; the control enters or is told
/// EINVAL, which is the kernel's own answer.
#[test]
fn pr_07_no_namespace_can_be_entered() {
    let sandbox = sandbox();
    let control = own_pids(&sandbox, "PR-07", &[]);
    let inside = sandbox.probe("PR-07", NONE);
    assert_refused_with("PR-07", &control, &inside, NONE, |case| {
        if case.contains("/proc/") { &[EPERM, EACCES, ENOENT] } else { &[EPERM] }
    });
}

/// A chosen process id would let a process pose as one that somebody looked at before. Oracle: errnos; the control,
/// root of its own pid namespace, gets the number it asks for.
#[test]
fn pr_12_process_ids_cannot_be_chosen() {
    let sandbox = sandbox();
    let control = own_pids(&sandbox, "PR-12", &[]);
    let inside = sandbox.probe("PR-12", NONE);
    assert_refused_with("PR-12", &control, &inside, NONE, |case| match case {
        "clone3 set_tid" => &[ENOSYS],
        _ => &[EACCES, EPERM, EROFS, ENOENT],
    });
}
