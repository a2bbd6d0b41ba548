//! Rows PR-*: a workload against other processes: the host's, its own init, and those that should end with it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use broker_tests::{
    OWN_PIDS, Running, Sandbox, assert_refused_with, below, canary, carriers, cases, eventually, field,
};
use libc::{EACCES, EAGAIN, ENOENT, ENOMEM, ENOSYS, EPERM, EROFS, ESRCH};

/// The lowest host uid that a sandbox may run as.
const SLOT_MIN: u32 = 0x7000_0000;
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
        Victim(command.arg0(token).arg("60").process_group(0).spawn().expect("a process to attack"))
    }

    fn id(&self) -> String {
        self.0.id().to_string()
    }

    fn killer(&mut self) -> Option<i32> {
        self.0.try_wait().expect("it is our child").and_then(|status| status.signal())
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

/// Init's descriptors are asked for through a pidfd, 64 of them. Oracle: EPERM for each, not EBADF, which would say
/// that the right was granted and only the number was free.
#[test]
fn pr_03_the_descriptors_of_init_cannot_be_taken() {
    let sandbox = sandbox();
    let control = own_pids(&sandbox, "PR-03", &[]);
    assert_refused_with("PR-03", &control, &sandbox.probe("PR-03", NONE), NONE, |_| &[EPERM]);
}

/// SIGKILL to everyone. Oracles: a process of the host and a second sandbox, both alive afterwards; the control kills
/// a bystander in its own pid namespace.
#[test]
fn pr_05_killing_everyone_ends_nobody_outside() {
    let sandbox = sandbox();
    let script = "sleep 20 & victim=$!; \"$0\" PR-05 >&2; wait $victim; echo $?";
    let mut control = Command::new("sh");
    control.args(["-c", script]).arg(sandbox.probe_path());
    let control = below(&OWN_PIDS[..5], &control).output().expect("unshare runs");
    assert_eq!(String::from_utf8_lossy(&control.stdout), "137\n", "the control's bystander lives: {control:?}");

    let mut victim = Victim::new("bystander");
    let neighbour = Running::start(sandbox.command().args(["sh", "-c", "echo ready; cat >/dev/null; exit 5"]));
    let inside = sandbox.probe("PR-05", NONE);
    assert!(inside.iter().all(|case| case.outcome == "open"), "nothing was sent: {inside:?}");
    assert_eq!(victim.killer(), None, "the host's process was killed");
    assert_eq!(neighbour.finish().code(), Some(5), "the neighbour was hit");
}

/// The same lines run in a plain shell and in a sandbox; both have to come to the same end, as a shell tells it.
/// Signals to init are among them: they must change nothing.
#[test]
fn pr_05_the_status_of_the_command_comes_back_exactly() {
    let sandbox = sandbox();
    for script in [
        "exit 0",
        "exit 1",
        "exit 124",
        "exit 255",
        "kill -TERM $$",
        "kill -SEGV $$",
        "kill -KILL $$",
        "kill -USR1 $$",
        "sh -c 'kill -KILL $$'; exit 3",
        "(sleep 0.05; exit 9) & exit 4",
        "sh -c 'exit 200' & wait; exit 6",
    ] {
        let host = Command::new("sh").args(["-c", script]).status().expect("sh runs");
        let wanted = host.code().or(host.signal().map(|signal| 128 + signal));
        assert_eq!(sandbox.shell(script).status.code(), wanted, "{script}");
    }
    for (script, wanted) in [
        ("kill -TERM 1; kill -KILL 1; kill -INT 1; exit 9", 9),
        // A grandchild kills the command, and everybody but itself and init.
        ("(kill -KILL -1; sleep 30) & sleep 20; exit 2", 137),
    ] {
        let started = Instant::now();
        let ended = sandbox.shell(script);
        assert_eq!(ended.status.code(), Some(wanted), "{script}: {ended:?}");
        assert!(started.elapsed() < Duration::from_secs(10), "{script}: the end was not noticed");
    }
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
    let statuses = running.statuses();
    assert!(statuses.len() >= 3, "init, sh and cat are missing: {statuses:?}");
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
        let statuses = running.statuses();
        assert!(statuses.len() >= 3, "init, sh and cat are missing: {statuses:?}");
        let ids = |name| statuses.iter().flat_map(move |(_, status)| field(status, name).split_whitespace());
        let first: u32 = ids("Uid").next().and_then(|id| id.parse().ok()).expect("a user");
        assert!(ids("Uid").all(|id| id == first.to_string()), "tasks differ: {statuses:?}");
        assert!(first >= SLOT_MIN, "host uid {first}");
        let groups = ids("Gid").map(|id| id.parse::<u32>().expect("a group"));
        assert!(groups.into_iter().all(|id| id >= SLOT_MIN), "a group of the host's: {statuses:?}");
        assert!(statuses.iter().all(|(_, status)| field(status, "Groups").is_empty()), "groups: {statuses:?}");
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
    assert_refused_with("PR-09", &control, &inside, NONE, |case| if case == "groups" { &[0] } else { &[EPERM] });
}

/// Daemons that ignore every polite signal, one of which holds the standard output, and 50 stopped grandchildren, all
/// with a token in their command lines. Oracle: the host's `/proc`; the control leaves them all running.
#[test]
fn pr_10_nothing_outlives_the_command() {
    let sandbox = sandbox();
    let token = canary();
    let log = tempfile::tempfile().expect("a file");
    // Into a file: they hold it open, and a pipe would not end before they do.
    let mut control = Command::new(sandbox.probe_path());
    control.args(["PR-10", "50", &token]).stdout(log).stdin(Stdio::null());
    assert!(control.status().expect("the probe runs").success());
    let left = carriers(&token);
    for pid in &left {
        Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill runs");
    }
    assert_eq!(left.len(), 52, "the control left none to look for");
    assert!(eventually(5000, || carriers(&token).is_empty()), "the control's processes stay");

    let token = canary();
    let started = Instant::now();
    let inside = sandbox.probe("PR-10", &["50", &token]);
    assert!(inside[0].outcome == "open", "they were not started: {inside:?}");
    assert!(started.elapsed() < Duration::from_secs(5), "held up for {:?} by those left behind", started.elapsed());
    let gone = eventually(1000, || carriers(&token).is_empty());
    assert!(gone, "still there one second later: {:?}", carriers(&token));
}

/// 10,000 processes become init's under a limit of 128, so that one init that does not wait for them stops all
/// forking. The control has such an init: the probe itself.
#[test]
fn pr_11_init_reaps_what_it_inherits() {
    let sandbox = Sandbox::new().option("--timeout").option("60s").option("--pids").option("128");
    let no_shell = &OWN_PIDS[..5];
    let control = cases(&mut below(no_shell, Command::new(sandbox.probe_path()).args(["PR-11", "200"])));
    let inside = sandbox.probe("PR-11", &["10000"]);
    assert_refused_with("PR-11", &control, &inside, NONE, |_| &[0]);
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

/// Descriptors whose owner is told of input by SIGUSR1. Oracle: a process of the host, which SIGUSR1 ends; it ends in
/// the control.
#[test]
fn pr_14_descriptors_cannot_signal_the_host() {
    let sandbox = sandbox();
    let mut victim = Victim::new("victim");
    let control = sandbox.control("PR-14", &[victim.id()]);
    assert!(eventually(2000, || File::open(format!("/proc/{}/exe", victim.id())).is_err()), "the control is tame");
    assert_eq!(victim.killer(), Some(libc::SIGUSR1));

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
    assert!(eventually(2000, || File::open(format!("/proc/{group}/exe")).is_err()), "the control is tame");
    assert_eq!(victim.killer(), Some(libc::SIGUSR1));

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
    assert!(running.first_line.contains("F_SETLEASE"), "the attempt did not run: {}", running.first_line);
    assert_eq!(blocked(&file), None, "a lease from inside holds: {}", running.first_line);
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
