//! Signals by ways other than `kill`, and leases, which make others wait.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use broker_tests::{Running, assert_refused_with, cases, cases_in};
use libc::{EACCES, EPERM, ESRCH};

use crate::{NONE, Victim, sandbox};

/// Descriptors whose owner is told of input by SIGUSR1. Oracle: a process of the host, which SIGUSR1 ends; it ends in
/// the control.
#[test]
fn pr_14_descriptors_cannot_signal_the_host() {
    let sandbox = sandbox();
    let mut victim = Victim::new("victim");
    let control = sandbox.control("PR-14", &[victim.id()]);
    assert_eq!(victim.killed_by(), Some(libc::SIGUSR1), "the control is tame");

    let mut victim = Victim::new("victim");
    let inside = sandbox.probe("PR-14", &[victim.id()]);
    assert_refused_with("PR-14", &control, &inside, NONE, |_| &[ESRCH, EPERM]);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(victim.killer(), None, "the host's process was signalled");
}

/// A signal to the process group crosses a pid namespace if the group does. Oracles: a process in the broker's own
/// group, and the group's and session's numbers inside, which are 0 where they lie outside.
#[test]
fn pr_14_the_process_group_ends_at_the_sandbox() {
    let sandbox = sandbox();
    let mut victim = Victim::new("victim");
    let group = i32::try_from(victim.0.id()).expect("a process id");
    let probe = sandbox.probe_path();
    cases(Command::new(&probe).arg("PR-14-group").stdin(Stdio::null()).process_group(group));
    assert_eq!(victim.killed_by(), Some(libc::SIGUSR1), "the control is tame");

    let mut victim = Victim::new("victim");
    let group = i32::try_from(victim.0.id()).expect("a process id");
    cases(sandbox.command().arg(&probe).arg("PR-14-group").process_group(group));
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(victim.killer(), None, "a process in the broker's group was signalled");

    let stat = sandbox.shell("cat /proc/self/stat");
    let stat = String::from_utf8_lossy(&stat.stdout).into_owned();
    let numbers = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect::<Vec<_>>());
    let numbers = numbers.unwrap_or_else(|| panic!("no stat: {stat}"));
    assert!(numbers[2] != "0" && numbers[3] != "0", "group or session lies outside: {stat}");
}

/// A write lease on a file of the workspace makes every other who opens it wait. Oracle: the host opens the file at
/// once and without blocking, which in the control gives EWOULDBLOCK.
#[test]
fn pr_14_a_lease_cannot_hold_up_the_host() {
    let blocked = |path: &std::path::Path| {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK;
        rustix::fs::open(path, flags, rustix::fs::Mode::empty()).err()
    };
    let workspace = tempfile::tempdir().expect("a workspace");
    let file = workspace.path().join("file");
    std::fs::write(&file, "x").expect("a file");
    let bounded = sandbox();
    let control = Running::start(Command::new(bounded.probe_path()).arg("PR-14-lease").arg(&file));
    assert!(control.first_line.contains("open"), "no lease on the host: {}", control.first_line);
    assert_eq!(blocked(&file), Some(rustix::io::Errno::WOULDBLOCK), "the control is tame");
    drop(control);

    let inside = sandbox().option("--workspace").option(workspace.path().display().to_string());
    let command = &mut inside.command();
    let running = Running::start(command.arg(inside.probe_path()).args(["PR-14-lease", "/workspace/file"]));
    let told = cases_in(&running.first_line);
    assert_eq!(told.len(), 1, "the attempt did not run: {}", running.first_line);
    // EAGAIN, say, would mean that only chance was in the way.
    assert!(told[0].outcome == "open" || [EPERM, EACCES].contains(&told[0].errno), "{told:?}");
    assert_eq!(blocked(&file), None, "a lease from inside holds: {}", running.first_line);
}
