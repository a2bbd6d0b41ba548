//! What the rows about processes, kernel surface and network share: raw calls, children whose end is seen, and
//! verdicts for rows whose refusals are other than the usual errnos.

use std::ffi::CStr;

use crate::case::Reporter;

/// An address where nothing is mapped: the kernel answers `EFAULT` if it gets as far as looking.
pub const NOWHERE: i64 = 8;

/// How a forked child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With this status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
}

/// Makes a system call; -1 means: look at [`errno`].
pub fn call(number: i64, arguments: &[i64]) -> i64 {
    let mut six = [0_i64; 6];
    six[..arguments.len()].copy_from_slice(arguments);
    // SAFETY: the rows pass integers, addresses where nothing is mapped, or addresses of values of the right type
    // that outlive the call.
    unsafe { libc::syscall(number, six[0], six[1], six[2], six[3], six[4], six[5]) }
}

/// Why the last call failed.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Where `value` lies, for a system call.
pub fn address<T: ?Sized>(value: &T) -> i64 {
    std::ptr::from_ref(value).cast::<u8>() as i64
}

/// Where `value` lies, for a system call that writes there.
pub fn address_mut<T: ?Sized>(value: &mut T) -> i64 {
    std::ptr::from_mut(value).cast::<u8>() as i64
}

/// Opens a file the way an attacker's own code would, without a library that adds flags.
pub fn open(path: &CStr, flags: i32) -> i64 {
    call(libc::SYS_openat, &[i64::from(libc::AT_FDCWD), path.as_ptr() as i64, i64::from(flags), 0o600])
}

/// Closes what [`call`] returned, if it is a descriptor.
pub fn close(descriptor: i64) {
    if descriptor >= 0 {
        call(libc::SYS_close, &[descriptor]);
    }
}

/// Like [`Reporter::syscall`], for calls whose refusal has errnos of its own (`ESRCH` for a foreign process).
pub fn judge(reporter: &Reporter, case: &str, result: i64, refusals: &[i32]) {
    let errno = if result < 0 { errno() } else { 0 };
    if result < 0 && (refusals.contains(&errno) || [libc::EPERM, libc::ENOSYS, libc::EACCES].contains(&errno))
    {
        reporter.denied(case, errno, "");
    } else {
        reporter.open(case, &format!("returned {result}, errno {errno}"));
    }
}

/// `open` when `found` says what was found, `denied` otherwise: for cases that look rather than call.
pub fn found(reporter: &Reporter, case: &str, found: Option<String>) {
    match found {
        Some(what) => reporter.open(case, &what),
        None => reporter.denied(case, 0, "nothing found"),
    }
}

/// Forks a child that runs `attempt` and exits with what it returns; `None` when it cannot be forked.
pub fn spawn(attempt: impl FnOnce() -> i32) -> Option<i32> {
    // SAFETY: the child runs `attempt`, which only makes system calls, and ends without returning to our caller.
    match unsafe { libc::fork() } {
        -1 => None,
        // SAFETY: ends the child at once, without the parent's exit handlers.
        0 => unsafe { libc::_exit(attempt()) },
        child => Some(child),
    }
}

/// Waits for a child.
pub fn wait(child: i32) -> End {
    let mut status = 0;
    call(libc::SYS_wait4, &[i64::from(child), address_mut(&mut status), 0, 0]);
    if libc::WIFSIGNALED(status) {
        End::Signaled(libc::WTERMSIG(status))
    } else {
        End::Exited(libc::WEXITSTATUS(status))
    }
}

/// A child that only waits to be killed.
pub fn sleeper() -> i32 {
    spawn(|| {
        // Whatever happens to the parent, this does not stay.
        call(libc::SYS_prctl, &[i64::from(libc::PR_SET_PDEATHSIG), i64::from(libc::SIGKILL)]);
        std::thread::sleep(std::time::Duration::from_secs(60));
        0
    })
    .expect("a child for the attack to aim at")
}

/// Kills and reaps a child of ours.
pub fn kill(child: i32) {
    call(libc::SYS_kill, &[i64::from(child), i64::from(libc::SIGKILL)]);
    wait(child);
}

/// Runs `attempt` in a child that must end by itself: `open` when it exits with 42, `killed` when by a signal.
pub fn survives(reporter: &Reporter, case: &str, attempt: impl FnOnce() -> i32) {
    match spawn(attempt).map(wait) {
        Some(End::Exited(42)) => reporter.open(case, "ran to its end"),
        Some(End::Exited(status)) => reporter.denied(case, status, "the attempt's own exit status"),
        Some(End::Signaled(signal)) => reporter.killed(case, signal),
        None => reporter.not_applicable(case, errno(), "no child"),
    }
}

/// The numbers of the processes that `/proc` shows.
pub fn visible_processes() -> Vec<i32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// One field of a `/proc/.../status` file.
pub fn field(status: &str, name: &str) -> Option<String> {
    status.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
}
