//! Signals to processes that are not ours: by number, to everyone, and by way of descriptors.

use crate::case::Reporter;
use crate::kernel::raw::{self, address, call, judge};

/// PR-01: `PID` of a process on the host, whose command line holds the token that comes in two halves.
pub fn foreign(reporter: &Reporter, arguments: &[String]) {
    let pid: i64 = arguments[0].parse().expect("a process id");
    // Two halves, so that our own command line does not hold the whole.
    let token = format!("{}{}", arguments[1], arguments[2]);
    let seen = raw::visible_processes().into_iter().find(|process| {
        let command = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        command.windows(token.len()).any(|window| window == token.as_bytes())
    });
    raw::found(reporter, "list", seen.map(|process| format!("process {process}")));

    let gone = [libc::ESRCH];
    judge(reporter, "kill", call(libc::SYS_kill, &[pid, 0]), &gone);
    judge(reporter, "kill everyone", call(libc::SYS_kill, &[-1, 0]), &gone);
    judge(reporter, "kill group", call(libc::SYS_kill, &[-pid, 0]), &gone);
    judge(reporter, "tkill", call(libc::SYS_tkill, &[pid, 0]), &gone);
    judge(reporter, "tgkill", call(libc::SYS_tgkill, &[pid, pid, 0]), &gone);
    // SAFETY: siginfo_t is plain data, and all zeroes is a value of it.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    info.si_code = libc::SI_QUEUE;
    judge(reporter, "rt_sigqueueinfo", call(libc::SYS_rt_sigqueueinfo, &[pid, 0, address(&info)]), &gone);
    judge(
        reporter,
        "rt_tgsigqueueinfo",
        call(libc::SYS_rt_tgsigqueueinfo, &[pid, pid, 0, address(&info)]),
        &gone,
    );
    judge(reporter, "pidfd_open", call(libc::SYS_pidfd_open, &[pid, 0]), &gone);
    judge(reporter, "getpgid", call(libc::SYS_getpgid, &[pid]), &gone);
    let mut limit = [0_u64; 2];
    let limit = raw::address_mut(&mut limit);
    judge(reporter, "prlimit64", call(libc::SYS_prlimit64, &[pid, 7, 0, limit]), &gone);
}

/// PR-05: SIGKILL to everyone but init and ourselves. `open` says that it went out; who died is the host's to see.
pub fn everyone(reporter: &Reporter, _: &[String]) {
    let own = raw::sleeper();
    for target in [1, -1] {
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            call(libc::SYS_kill, &[target, i64::from(signal)]);
        }
    }
    match raw::wait(own) {
        raw::End::Signaled(_) => reporter.open("kill everyone", "our own sleeper died of it"),
        end => reporter.denied("kill everyone", 0, &format!("{end:?}")),
    }
}

/// PR-14: makes the kernel send SIGUSR1 to the host's process `PID` by way of descriptors.
pub fn by_descriptor(reporter: &Reporter, arguments: &[String]) {
    let pid: i64 = arguments[0].parse().expect("a process id");
    let gone = [libc::ESRCH];
    let signal = i64::from(libc::SIGUSR1);
    for (case, extended) in [("F_SETOWN", false), ("F_SETOWN_EX", true)] {
        let mut pair = [0_i32; 2];
        let (family, kind) = (i64::from(libc::AF_UNIX), i64::from(libc::SOCK_STREAM));
        if call(libc::SYS_socketpair, &[family, kind, 0, raw::address_mut(&mut pair)]) < 0 {
            reporter.not_applicable(case, raw::errno(), "no socket pair");
            continue;
        }
        let near = i64::from(pair[0]);
        let pid_owner = [1_i32, i32::try_from(pid).expect("a process id fits")]; // F_OWNER_PID
        let owned = if extended {
            call(libc::SYS_fcntl, &[near, 15, address(&pid_owner)]) // F_SETOWN_EX
        } else {
            call(libc::SYS_fcntl, &[near, i64::from(libc::F_SETOWN), pid])
        };
        judge(reporter, case, owned, &gone);
        call(libc::SYS_fcntl, &[near, 10, signal]); // F_SETSIG
        call(libc::SYS_fcntl, &[near, i64::from(libc::F_SETFL), i64::from(libc::O_ASYNC | libc::O_NONBLOCK)]);
        call(libc::SYS_write, &[i64::from(pair[1]), address(b"x"), 1]);
    }
    // The standard streams are the caller's: being their owner must not mean being heard by the caller's processes.
    for stream in 0..3 {
        let case = format!("F_SETOWN on {stream}");
        judge(reporter, &case, call(libc::SYS_fcntl, &[stream, i64::from(libc::F_SETOWN), pid]), &gone);
        call(libc::SYS_fcntl, &[stream, i64::from(libc::F_SETOWN), 0]);
    }
    let pidfd = call(libc::SYS_pidfd_open, &[pid, 0]);
    let sent = if pidfd < 0 { pidfd } else { call(libc::SYS_pidfd_send_signal, &[pidfd, signal, 0, 0]) };
    judge(reporter, "pidfd_send_signal", sent, &gone);
}

/// PR-14: a signal to our process group, which may reach across a pid namespace, whatever numbers are visible in it.
/// `open` says that it went out; who got it is the host's to see.
pub fn group(reporter: &Reporter, _: &[String]) {
    // SAFETY: ignoring a signal has no precondition.
    unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
    reporter.syscall("group", call(libc::SYS_kill, &[0, i64::from(libc::SIGUSR1)]));
}

/// PR-14: takes a write lease on `FILE` and holds it until the standard input ends.
pub fn lease(reporter: &Reporter, arguments: &[String]) {
    // The break is announced by SIGIO, which would end us: an attacker ignores it.
    // SAFETY: ignoring a signal has no precondition.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let path = std::ffi::CString::new(arguments[0].as_str()).expect("a path without NUL");
    let file = raw::open(&path, libc::O_RDWR);
    let taken = if file < 0 { file } else { call(libc::SYS_fcntl, &[file, 1024, i64::from(libc::F_WRLCK)]) };
    reporter.syscall("F_SETLEASE", taken);
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
}
