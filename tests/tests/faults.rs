//! Every system call of the set-up fails once. Nothing may be left, and nothing may run less confined.
#![cfg(target_arch = "x86_64")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use broker_tests::inject::{self, Call, Verdict};
use broker_tests::{leftovers, program};

/// Calls that cannot fail, or whose failure is a crash of the C library or of Rust itself: memory and the end.
const SPARED: [i64; 10] = [
    // On Linux a descriptor is gone whatever close(2) returns.
    libc::SYS_close,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
];

fn broker(workspace: &Path) -> Command {
    let mut command = Command::new(program("broker"));
    command.args(["exec", "--embedded", "--policy", "default", "--workspace"]).arg(workspace);
    // The workload says with its status whether it is confined: 77 only with a filter, no capability and uid 1000.
    command.args(["--", "sh", "-c"]).arg(
        "grep -q '^Seccomp:.2$' /proc/self/status && grep -q '^CapEff:.0*$' /proc/self/status && \
         grep -q '^CapBnd:.0*$' /proc/self/status && grep -q '^NoNewPrivs:.1$' /proc/self/status && \
         [ $(id -u) = 1000 ] && [ ! -e /etc/shadow ] && exit 77; touch /workspace/unconfined; exit 78",
    );
    command
}

/// Method: a run is traced once to learn every call that each of the three processes makes before the workload's
/// execve(2); then each of them fails in a run of its own with EIO. Oracle: the host's mounts, processes, control groups,
/// locks and the workspace's content before and after, and a workload that tells its own confinement by its status.
#[test]
fn whatever_call_of_the_set_up_fails_nothing_is_left_and_nothing_runs_unconfined() {
    let workspace = tempfile::tempdir().expect("a workspace");
    fs::create_dir(workspace.path().join(".git")).expect("a directory to protect");
    let calls = calls_of_the_set_up(workspace.path());
    assert!(calls.len() > 200, "only {} calls seen", calls.len());
    assert!((0..4).all(|process| calls.iter().any(|call| call.0 == process)), "not all processes seen");
    let before = leftovers();
    let content = listing(workspace.path());
    let mut refused = 0;
    for target in &calls {
        let status = inject::run(&mut broker(workspace.path()), |call| {
            if (call.process, call.ordinal, call.number) == *target {
                Verdict::Return(-i64::from(libc::EIO))
            } else {
                Verdict::Pass
            }
        });
        match status.code() {
            Some(125) => refused += 1,
            // A call that does not matter for confinement, or that was made again, may fail.
            Some(77) => {}
            // Before main, and when even the message cannot be written.
            _ if status.signal() == Some(libc::SIGABRT) || status.code() == Some(101) => {}
            _ => assert!(
                status.code() != Some(78),
                "{target:?} fails and the workload runs unconfined: {status:?}"
            ),
        }
        broker_tests::settle(
            || leftovers() == before,
            || format!("{target:?}: {}", leftovers().beyond(&before)),
        );
        assert_eq!(listing(workspace.path()), content, "{target:?} left something in the workspace");
    }
    println!("{} calls failed in turn, {refused} runs refused to start", calls.len());
    assert!(refused > 100, "only {refused} of {} failures were noticed", calls.len());
}

fn calls_of_the_set_up(workspace: &Path) -> BTreeSet<(usize, usize, i64)> {
    let mut calls = BTreeSet::new();
    let mut executing = false;
    let status = inject::run(&mut broker(workspace), |call: &Call| {
        executing |= call.number == libc::SYS_execve;
        // What comes after the first execve is the workload, or waiting for it.
        if !executing && !SPARED.contains(&call.number) {
            calls.insert((call.process, call.ordinal, call.number));
        }
        Verdict::Pass
    });
    assert_eq!(status.code(), Some(77), "the traced run itself is confined");
    calls
}

fn listing(directory: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(directory).expect("the workspace can be read").flatten();
    names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
