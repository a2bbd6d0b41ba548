//! Rows KS-*: parts of the kernel that no workload needs. Most controls show the kernel's own code being reached with
//! harmless arguments; inside, the policy must have answered before, with the errno that it promises.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use broker_tests::{
    Case, Running, Sandbox, assert_refused, assert_refused_with, below, canary, cases, eventually, field,
};
use libc::{EACCES, ENOENT, ENOSYS, ENXIO, EPERM, EROFS};

const NONE: &[&str] = &[];
const OWN_MOUNTS: &[&str] = &["unshare", "--mount"];

/// A sandbox that cannot hold up the suite.
fn sandbox() -> Sandbox {
    Sandbox::new().option("--timeout").option("60s")
}

/// The row has no arguments, and EPERM is the answer to every case.
fn assert_all_eperm(row: &str, vacuous: &[&str]) {
    let sandbox = sandbox();
    let (control, inside) = (sandbox.control(row, NONE), sandbox.probe(row, NONE));
    assert_refused_with(row, &control, &inside, vacuous, |_| &[EPERM]);
}

/// Setting up a ring, with a bad and with a good structure, and using a descriptor as one. Oracle: EPERM, where the
/// control gets EFAULT, a ring, and EBADF.
#[test]
fn ks_01_io_uring_is_out_of_reach() {
    assert_all_eperm("KS-01", &[]);
}

/// Every command of `bpf`, perf events, and both kinds of userfaultfd. Oracle: EPERM exactly; the device is not there.
#[test]
fn ks_02_bpf_perf_and_userfaultfd_are_out_of_reach() {
    let sandbox = sandbox();
    let (control, inside) = (sandbox.control("KS-02", NONE), sandbox.probe("KS-02", NONE));
    // An older kernel has no such device.
    let vacuous: &[&str] =
        if std::path::Path::new("/dev/userfaultfd").exists() { &[] } else { &["/dev/userfaultfd"] };
    assert_refused_with("KS-02", &control, &inside, vacuous, |case| match case {
        "/dev/userfaultfd" => &[ENOENT, EACCES, EPERM],
        _ => &[EPERM],
    });
}

/// A key in the session keyring that the broker inherits and one in the user's keyring; the workload knows names and
/// numbers. Oracle: the token that is their payload, which the control prints.
#[test]
fn ks_03_the_keys_of_the_host_cannot_be_read() {
    let sandbox = sandbox();
    let token = canary();
    let probe = sandbox.probe_path();
    let planted = |command: &Command| {
        let plant = [probe.to_str().expect("a plain path"), "KS-03-plant", token.as_str()];
        cases(below(&plant, command).args(["{session}", "{user}"]))
    };
    let control = planted(Command::new(&probe).arg("KS-03"));
    let told = |cases: &[Case]| cases.iter().filter(|case| case.detail.contains(&token)).count();
    assert_eq!(told(&control), 2, "the control reads neither key: {control:?}");
    let inside = planted(sandbox.command().arg(&probe).arg("KS-03"));
    assert_eq!(told(&inside), 0, "{inside:?}");
    assert_refused_with(
        "KS-03",
        &control,
        &inside,
        NONE,
        |case| {
            if case == "/proc/keys" { &[0] } else { &[EPERM] }
        },
    );
}

/// The calls that administer a machine. Oracle: EPERM exactly, which for those that this kernel lacks is not its own
/// answer (ENOSYS).
#[test]
fn ks_04_administration_is_refused_and_not_merely_missing() {
    // Not in this kernel, or not in every: modules, kexec, port access, and calls that are long gone.
    let vacuous = [
        "init_module",
        "finit_module",
        "delete_module",
        "kexec_load",
        "kexec_file_load",
        "iopl",
        "ioperm",
        "nfsservctl",
        "uselib",
        "_sysctl",
        "sysfs",
        "lookup_dcookie",
    ];
    assert_all_eperm("KS-04", &vacuous);
}

/// All families and types, all netlink protocols, and protocols that change what a permitted family is. Oracle: EPERM
/// exactly, where the control gets a socket or EAFNOSUPPORT; and families that this host is known to have are open in
/// the control.
#[test]
fn ks_05_only_the_families_of_the_policy_exist() {
    let sandbox = sandbox();
    let (control, inside) = (sandbox.control("KS-05", NONE), sandbox.probe("KS-05", NONE));
    let made: BTreeSet<&str> = control
        .iter()
        .filter(|case| case.outcome == "open" && case.errno == 0)
        .map(|case| case.name.as_str())
        .collect();
    for live in ["socket 1 stream", "socketpair 1 raw", "socket 16 raw", "socket 17 raw", "netlink 0"] {
        assert!(made.contains(live), "{live} is not open in the control: {made:?}");
    }
    // The kernel has ping sockets, but for nobody by default, and says EACCES.
    assert_refused_with("KS-05", &control, &inside, &["ping 2", "ping 10"], |_| &[EPERM]);
}

/// What the policy leaves open works: the sweep would also pass if nothing did.
#[test]
fn ks_05_the_promised_families_do_exist() {
    let script = "import socket as s\n\
        for family in (s.AF_INET, s.AF_INET6):\n    \
            for kind in (s.SOCK_STREAM, s.SOCK_DGRAM):\n        s.socket(family, kind)\n\
        for kind in (s.SOCK_STREAM, s.SOCK_SEQPACKET):\n    s.socketpair(s.AF_UNIX, kind)\n\
        listener = s.create_server(('127.0.0.1', 0))\n\
        s.create_connection(listener.getsockname())\n\
        print('made')";
    let output = sandbox().command().args(["/usr/bin/python3", "-c", script]).output().expect("broker runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "made\n", "{output:?}");
}

/// 32-bit calls by `int 0x80`, from 64-bit and from 32-bit code, and a 32-bit program. Oracle: SIGSYS, seen by the
/// parent of the process that tried; all four work in the control.
#[test]
fn ks_07_foreign_architectures_are_killed() {
    let sandbox = sandbox();
    let (control, inside) = (sandbox.control("KS-07", NONE), sandbox.probe("KS-07", NONE));
    assert_refused("KS-07", &control, &inside, NONE);
    for case in &inside {
        assert_eq!((case.outcome.as_str(), case.detail.as_str()), ("killed", "signal 31"), "{case:?}");
    }
}

/// x32 numbers, which this kernel does not have, so that asking it proves nothing. Oracle: the filter itself, read
/// back from the kernel by ptrace on the host and run on every number: for init and for the workload.
#[test]
fn ks_08_the_filter_knows_no_x32_and_no_unknown_numbers() {
    let sandbox = sandbox();
    let inside = sandbox.probe("KS-08", NONE);
    let refused = |case: &Case| case.outcome != "open" && (case.errno == EPERM || case.errno == ENOSYS);
    assert!(inside.iter().all(refused), "reached: {inside:?}");

    let bare = sandbox.control("KS-08-filter", &[std::process::id().to_string()]);
    assert_eq!(bare[0].outcome, "open", "this very process seems to be filtered");
    let running = Running::start(sandbox.command().args(["sh", "-c", "echo ready; cat >/dev/null"]));
    assert!(eventually(5000, || running.confined().len() >= 3), "init, sh or cat is missing");
    for task in running.confined() {
        let verdicts = sandbox.control("KS-08-filter", &[task.to_string()]);
        assert!(verdicts.len() > 1000, "the filter of {task} was not read: {verdicts:?}");
        for case in verdicts.iter().skip(1) {
            let killed = case.name.starts_with("i386") || case.name == "other architecture";
            let wanted: &[i32] = if case.name.starts_with("x32") { &[EPERM, ENOSYS] } else { &[ENOSYS] };
            let right = if killed { case.outcome == "killed" } else { wanted.contains(&case.errno) };
            assert!(right, "task {task}: {case:?}");
        }
    }
}

/// Runs `command` as the foreground of a terminal of its own, of which only the standard output is not part. Returns
/// its cases and what could be read from the terminal afterwards, as if somebody had typed it.
fn at_terminal(command: &Command) -> (Vec<Case>, String) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pty");
    grantpt(&master).and_then(|()| unlockpt(&master)).expect("the pty is ours");
    let name = ptsname(&master, Vec::new()).expect("the pty's name").into_string().expect("an ASCII name");
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let slave =
        || -> OwnedFd { rustix::fs::open(&name, flags, rustix::fs::Mode::empty()).expect("the pty's end") };
    let typed = tempfile::NamedTempFile::new().expect("a file");
    // The shell is the session's leader and stays: the terminal would be hung up, and its input lost, with it.
    let script = "log=$0; stty -icanon -echo min 0 time 3; \"$@\"; cat >\"$log\"";
    let log = typed.path().to_str().expect("a plain path");
    let mut wrapped = below(&["setsid", "--ctty", "--wait", "sh", "-c", script, log], command);
    let cases = cases(wrapped.stdin(slave()).stderr(slave()).stdout(Stdio::piped()));
    (cases, std::fs::read_to_string(typed.path()).expect("what was typed"))
}

/// The broker in the foreground of a terminal, without and with `--tty`. Oracles: EPERM, for commands with high bits
/// too; and what the terminal's next reader gets to read, which in the control is the token.
#[test]
fn ks_09_nothing_can_be_typed_into_the_callers_terminal() {
    let bounded = sandbox();
    let token = canary();
    let (control, typed) = at_terminal(Command::new(bounded.probe_path()).args(["KS-09", &token]));
    assert!(typed.contains(&token), "the control types nothing: {typed:?} {control:?}");
    // With a terminal of its own it can open /dev/tty, and must fail where it types.
    let unopened: &[i32] = &[EPERM, ENXIO, ENOENT, EACCES];
    for (inside, at_tty) in [(sandbox(), unopened), (sandbox().option("--tty"), &[EPERM])] {
        let (inside, typed) = at_terminal(inside.command().arg(inside.probe_path()).args(["KS-09", &token]));
        assert_refused_with("KS-09", &control, &inside, NONE, |case| match case {
            "TIOCSTI /dev/tty" => at_tty,
            _ => &[EPERM],
        });
        assert!(!typed.contains(&token[..1]), "typed into the caller's terminal: {typed:?}");
    }
}

/// Settings of the process itself that exploits begin with. Oracle: EPERM exactly; the control is let through or told
/// what is wrong with the arguments.
#[test]
fn ks_10_a_process_cannot_change_how_it_is_run() {
    assert_all_eperm("KS-10", &[]);
}

/// Pages of a read-only file are moved through pipes and connections and written behind. The four ways are closed in
/// this kernel (CVE-2022-0847 and relatives), hence vacuous; opening for writing is live. Oracle: the file's bytes as
/// the host reads them, those of a file in `/usr` included.
#[test]
fn ks_11_a_read_only_file_stays_as_it_is() {
    let sandbox = sandbox();
    let original = canary();
    let shared = sandbox.probe_path().with_file_name("shared");
    std::fs::write(&shared, &original).expect("a file to share");
    let ways = ["splice then write", "tee then write", "sendfile", "vmsplice"];
    for target in [shared.clone(), "/usr/bin/env".into()] {
        let before = std::fs::read(&target).expect("the file is readable");
        let argument = [target.display().to_string()];
        // A running program cannot be opened for writing: the shared file is the control for both.
        let control = sandbox.control("KS-11", &[shared.display().to_string()]);
        let inside = sandbox.probe("KS-11", &argument);
        let after = std::fs::read(&target).expect("the file is readable");
        assert!(before == after, "{} has changed", target.display());
        assert_refused_with("KS-11", &control, &inside, &ways, |case| {
            if ways.contains(&case) { &[0, -1] } else { &[EROFS, EACCES, EPERM] }
        });
    }
}

/// Calls that are new, rare, or about other processes' memory. Oracle: EPERM exactly.
#[test]
fn ks_12_rarely_used_calls_are_refused() {
    // Kernels before 6.8, or booted without secret memory, do not have these.
    assert_all_eperm("KS-12", &["memfd_secret", "lsm_set_self_attr", "cachestat", "set_mempolicy_home_node"]);
}

/// Threads, a child, and init. Oracles: their status inside, and the same on the host, where nothing is hidden.
#[test]
fn ks_15_the_same_filter_is_on_every_task() {
    let sandbox = sandbox();
    let (control, inside) = (sandbox.control("KS-15", NONE), sandbox.probe("KS-15", NONE));
    assert_refused_with("KS-15", &control, &inside, NONE, |_| &[0]);

    let threads = "import threading,sys\n\
        for _ in range(3): threading.Thread(target=sys.stdin.read).start()\n\
        print('ready', flush=True)";
    let running = Running::start(sandbox.command().args(["/usr/bin/python3", "-c", threads]));
    assert!(eventually(5000, || running.statuses().len() >= 5), "init, python or a thread is missing");
    let statuses = running.statuses();
    let filters: BTreeSet<&str> =
        statuses.iter().map(|(_, status)| field(status, "Seccomp_filters")).collect();
    assert!(filters.len() == 1 && !filters.contains("0"), "filters differ: {filters:?}");
    for (task, status) in &statuses {
        let seen = (field(status, "Seccomp"), field(status, "NoNewPrivs"));
        assert_eq!(seen, ("2", "1"), "{}\n{status}", task.display());
    }
}

/// Mounting a hierarchy, also from a nested user namespace, and opening its dangerous files. Oracle: errnos; the
/// control does it in a mount namespace of its own, and opens what is mounted on the host.
#[test]
fn ks_16_control_groups_are_out_of_reach() {
    let sandbox = sandbox();
    let control = cases(&mut below(OWN_MOUNTS, Command::new(sandbox.probe_path()).arg("KS-16")));
    let inside = sandbox.probe("KS-16", NONE);
    // A host with the second version alone has none of these files.
    let first_version = std::path::Path::new("/sys/fs/cgroup/memory/release_agent").exists();
    let vacuous: &[&str] =
        if first_version { &[] } else { &["release_agent", "notify_on_release", "devices.allow", "tasks"] };
    assert_refused_with("KS-16", &control, &inside, vacuous, |case| {
        if case.contains("mount") { &[EPERM] } else { &[ENOENT, EACCES, EPERM, EROFS] }
    });
}

/// Mounting the kernel's own file systems, and opening system-wide settings for writing. Oracle: errnos; the control
/// mounts them in a namespace of its own and writes nothing.
#[test]
fn ks_18_kernel_file_systems_and_settings_are_out_of_reach() {
    let sandbox = sandbox();
    let control = cases(&mut below(OWN_MOUNTS, Command::new(sandbox.probe_path()).arg("KS-18")));
    let inside = sandbox.probe("KS-18", NONE);
    // The first asks for CAP_SYS_RESOURCE, which root does not have on every machine.
    let vacuous = ["user/max_user_namespaces"];
    assert_refused_with("KS-18", &control, &inside, &vacuous, |case| {
        if case.contains("mount") || case.contains("register") {
            &[EPERM]
        } else {
            &[ENOENT, EACCES, EPERM, EROFS]
        }
    });
}
