//! Who the workload is, to itself and to the host.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use broker_tests::{Running, assert_refused_with, below, cases, eventually, field};
use libc::{EACCES, EAGAIN, ENOMEM, EPERM, ESRCH};

use crate::{NONE, Victim, sandbox};

/// The lowest host uid that a sandbox may run as.
const SLOT_MIN: u32 = 0x7000_0000;

/// The status of init, of a shell, and of the `cat` that it starts after its first line.
fn settled(running: &Running) -> Vec<(PathBuf, String)> {
    let there = eventually(5000, || running.statuses().len() >= 3);
    assert!(there, "init, sh or cat is missing: {:?}", running.statuses());
    running.statuses()
}

/// Reads what every visible task holds and tries to get more; both are started with inheritable and ambient
/// capabilities (CVE-2022-24769). Second oracle: the same files read on the host, init among them.
#[test]
fn pr_08_nobody_inside_has_or_gets_a_capability() {
    let sandbox = sandbox();
    let generous = ["setpriv", "--inh-caps", "+net_raw", "--ambient-caps", "+net_raw"];
    let control = cases(&mut below(&generous, Command::new(sandbox.probe_path()).arg("PR-08")));
    let inside = cases(&mut below(&generous, sandbox.command().arg(sandbox.probe_path()).arg("PR-08")));
    assert_refused_with("PR-08", &control, &inside, NONE, |_| &[0, EPERM]);

    let script = ["sh", "-c", "echo ready; cat >/dev/null"];
    let running = Running::start(&mut below(&generous, sandbox.command().args(script)));
    let statuses = settled(&running);
    for (task, status) in &statuses {
        for name in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(status, name), "0000000000000000", "{name} of {}\n{status}", task.display());
        }
        assert_eq!(field(status, "NoNewPrivs"), "1", "{}\n{status}", task.display());
    }
}

/// Two sandboxes at the same time, started by root with supplementary groups. Oracle: `Uid`, `Gid` and `Groups` of
/// their tasks as the host's kernel prints them, and the owner of a file that they made.
#[test]
fn pr_09_each_sandbox_has_a_host_user_of_its_own_that_is_not_root() {
    let sandbox = sandbox();
    let script = ["sh", "-c", "echo x >/tmp/mine; echo ready; cat >/dev/null"];
    let grouped = ["setpriv", "--groups", "4,24"];
    let both = [(); 2].map(|()| Running::start(&mut below(&grouped, sandbox.command().args(script))));
    let users = both.each_ref().map(|running| {
        let statuses = settled(running);
        let ids = |name| statuses.iter().flat_map(move |(_, status)| field(status, name).split_whitespace());
        let first: u32 = ids("Uid").next().and_then(|id| id.parse().ok()).expect("a user");
        assert!(ids("Uid").all(|id| id == first.to_string()), "tasks differ: {statuses:?}");
        assert!(first >= SLOT_MIN, "host uid {first}");
        let groups = ids("Gid").map(|id| id.parse::<u32>().expect("a group"));
        assert!(groups.into_iter().all(|id| id >= SLOT_MIN), "a group of the host's: {statuses:?}");
        assert!(
            statuses.iter().all(|(_, status)| field(status, "Groups").is_empty()),
            "groups: {statuses:?}"
        );
        let workload = running.confined().into_iter().max().expect("a process");
        let made = std::fs::metadata(format!("/proc/{workload}/root/tmp/mine")).expect("the file it made");
        assert_eq!((made.uid(), made.gid() >= SLOT_MIN), (first, true), "the owner of its file");
        first
    });
    assert_ne!(users[0], users[1], "two sandboxes share a host user");
}

/// Identity calls, most of them no-ops that only a policy refuses. Oracle: EPERM exactly, and `getgroups` empty
/// although the broker was started with groups.
#[test]
fn pr_09_no_identity_can_be_changed() {
    let sandbox = sandbox();
    let grouped = ["setpriv", "--groups", "4,24"];
    let control = cases(&mut below(&grouped, Command::new(sandbox.probe_path()).arg("PR-09")));
    let inside = cases(&mut below(&grouped, sandbox.command().arg(sandbox.probe_path()).arg("PR-09")));
    assert_refused_with(
        "PR-09",
        &control,
        &inside,
        NONE,
        |case| {
            if case == "groups" { &[0] } else { &[EPERM] }
        },
    );
}

/// Real-time classes, negative nice values, locked memory, and the host's processes. Oracle: errnos. `oom_score_adj`
/// asks for CAP_SYS_RESOURCE, which root does not have on every machine.
#[test]
fn pr_15_no_larger_share_of_the_machine_can_be_taken() {
    let sandbox = sandbox();
    let mut victim = Victim::new("victim");
    let control = sandbox.control("PR-15", &[victim.id()]);
    let inside = sandbox.probe("PR-15", &[victim.id()]);
    let own = std::fs::read_to_string("/proc/self/status").expect("our own status");
    let effective = u64::from_str_radix(field(&own, "CapEff"), 16).expect("a set of capabilities");
    let without_resource = effective & (1 << 24) == 0;
    let vacuous: &[&str] = if without_resource { &["oom_score_adj"] } else { &[] };
    assert_refused_with("PR-15", &control, &inside, vacuous, |case| match case {
        "host affinity" | "host nice" => &[ESRCH, EPERM],
        "mlock 64 MiB" => &[ENOMEM, EAGAIN, EPERM],
        "SCHED_FIFO" | "SCHED_RR" | "SCHED_DEADLINE" | "ioprio" => &[EPERM],
        _ => &[EPERM, EACCES],
    });
    assert_eq!(victim.killer(), None);
}
