//! New namespaces, other namespaces, and chosen process ids.

use crate::case::Reporter;
use crate::kernel::raw::{self, NOWHERE, address, call};

/// `CLONE_NEW*` by name; time is not in libc's list, and lies where `clone` has its exit signal.
const KINDS: [(&str, i64); 8] = [
    ("user", libc::CLONE_NEWUSER as i64),
    ("mnt", libc::CLONE_NEWNS as i64),
    ("pid", libc::CLONE_NEWPID as i64),
    ("net", libc::CLONE_NEWNET as i64),
    ("ipc", libc::CLONE_NEWIPC as i64),
    ("uts", libc::CLONE_NEWUTS as i64),
    ("cgroup", libc::CLONE_NEWCGROUP as i64),
    ("time", 0x80),
];

/// `struct clone_args`, as the kernel of 5.7 and later reads it.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// PR-06.
pub fn create(reporter: &Reporter, _: &[String]) {
    for (name, flag) in KINDS {
        let case = format!("unshare {name}");
        reporter.in_child(&case, |reporter| reporter.syscall(&case, call(libc::SYS_unshare, &[flag])));
    }
    for (name, flag) in KINDS.into_iter().filter(|(name, _)| *name != "time") {
        clone(reporter, &format!("clone {name}"), flag);
    }
    // The kernel drops the upper half; a filter that compares all 64 bits with its list would not match.
    clone(reporter, "clone user, high bits", i64::from(libc::CLONE_NEWUSER) | 0x7fff_ffff_0000_0000);
    for (name, flag) in KINDS {
        let arguments = CloneArgs {
            flags: flag.unsigned_abs(),
            exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
            ..CloneArgs::default()
        };
        clone3(reporter, &format!("clone3 {name}"), &arguments);
    }
    let size = size_of::<CloneArgs>() as i64;
    reporter.syscall("clone3 bad pointer", call(libc::SYS_clone3, &[NOWHERE, size]));
    reporter.syscall("clone3 nothing", call(libc::SYS_clone3, &[0, 0]));
}

fn clone(reporter: &Reporter, case: &str, flags: i64) {
    // Without a stack `clone` is `fork` with more flags.
    let child = call(libc::SYS_clone, &[flags | i64::from(libc::SIGCHLD), 0, 0, 0, 0]);
    leave_child(child);
    reporter.syscall(case, child);
    reap(child);
}

fn clone3(reporter: &Reporter, case: &str, arguments: &CloneArgs) {
    let child = call(libc::SYS_clone3, &[address(arguments), size_of::<CloneArgs>() as i64]);
    leave_child(child);
    reporter.syscall(case, child);
    reap(child);
}

fn leave_child(child: i64) {
    if child == 0 {
        // SAFETY: ends the child that the raw call made, without the parent's exit handlers.
        unsafe { libc::_exit(0) };
    }
}

fn reap(child: i64) {
    if child > 0 {
        raw::wait(i32::try_from(child).expect("a process id"));
    }
}

/// PR-07. Its control runs in a pid namespace of its own, so that `/proc/1` is nobody's.
pub fn enter(reporter: &Reporter, _: &[String]) {
    for process in ["self", "1"] {
        for name in ["user", "mnt", "pid", "pid_for_children", "net", "ipc", "uts", "cgroup", "time"] {
            let case = format!("setns /proc/{process}/ns/{name}");
            reporter.in_child(&case, |reporter| {
                let path = std::ffi::CString::new(format!("/proc/{process}/ns/{name}")).expect("no NUL");
                let namespace = raw::open(&path, libc::O_RDONLY);
                let entered = if namespace < 0 { namespace } else { call(libc::SYS_setns, &[namespace, 0]) };
                reporter.syscall(&case, entered);
            });
        }
    }
    let all = KINDS
        .iter()
        .filter(|(name, _)| *name != "user" && *name != "time")
        .fold(0, |mask, (_, flag)| mask | flag);
    reporter.in_child("setns pidfd of init", |reporter| {
        let init = call(libc::SYS_pidfd_open, &[1, 0]);
        let entered = if init < 0 { init } else { call(libc::SYS_setns, &[init, all]) };
        reporter.syscall("setns pidfd of init", entered);
    });
    reporter.syscall("setns bad descriptor", call(libc::SYS_setns, &[-1, 0]));
    // Other ways to a namespace's descriptor, tried on a bad one: its owner's, its parent's, a process's.
    for (case, command) in
        [("NS_GET_USERNS", 0xb701), ("NS_GET_PARENT", 0xb702), ("PIDFD_GET_NET_NAMESPACE", 0xff04)]
    {
        reporter.syscall(case, call(libc::SYS_ioctl, &[-1, command, 0]));
    }
}

/// PR-12. Its control runs in a pid namespace of its own, where a chosen number harms nobody.
pub fn choose_pid(reporter: &Reporter, _: &[String]) {
    let wanted = [4242_i32];
    let arguments = CloneArgs {
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        set_tid: address(&wanted).unsigned_abs(),
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    clone3(reporter, "clone3 set_tid", &arguments);
    let last = raw::open(c"/proc/sys/kernel/ns_last_pid", libc::O_WRONLY);
    let written = if last < 0 { last } else { call(libc::SYS_write, &[last, address(b"5000"), 4]) };
    reporter.syscall("ns_last_pid", written);
}
