//! Confines the process itself, for good: a part of a daemon that waits on its channel, holds what others must not see, and has
//! no use for the rest of the system.

use std::io;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};

use crate::confine;
use crate::plan::{LANDLOCK_ABI_TESTED, LandlockAccess, LandlockPlan};
use crate::seccomp;
use crate::sys;

/// What a role reaches of networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reachable {
    /// A namespace of its own, with nothing in it.
    Nothing,
    /// The host's.
    Host,
}

/// The most descriptors of a role; of one that serves, each connection takes three.
const OPEN_FILES: u64 = 1024;
const OPEN_FILES_TO_SERVE: u64 = 4096;

/// What a role may call: wait, read, write, receive descriptors, keep memory, end. It neither forks, executes, opens nor
/// connects.
const CALLS: [libc::c_long; 25] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_ppoll,
    libc::SYS_close,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What a process that speaks with peers calls beyond that: it accepts, connects, waits for many at once, has threads and files. It
/// executes nothing.
const SERVER_CALLS: [libc::c_long; 49] = [
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_geteuid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_getuid,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_membarrier,
    libc::SYS_mprotect,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_pwrite64,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_renameat,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Older names of the same calls, which the C library still uses where they are to be had.
#[cfg(target_arch = "x86_64")]
const SERVER_CALLS_OLD: [libc::c_long; 6] = [
    libc::SYS_access,
    libc::SYS_epoll_wait,
    libc::SYS_open,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_stat,
];
#[cfg(not(target_arch = "x86_64"))]
const SERVER_CALLS_OLD: [libc::c_long; 0] = [];

/// Confines a process that speaks with peers and has given up its ids ([`crate::become_nobody`]): it reads below `read` and writes
/// below `write`, sends no signal to what is not confined like it, and executes nothing. From here on another call than those that
/// serving takes ends it.
///
/// # Errors
/// As the call that failed; also where a path is not there. The process is then of no use, and has to end.
pub fn confine_server(read: &Path, write: &Path) -> io::Result<()> {
    let filter = seccomp::nothing_but(&[&CALLS[..], &SERVER_CALLS, &SERVER_CALLS_OLD].concat(), &[])?;
    let abi = sys::landlock_abi().min(LANDLOCK_ABI_TESTED);
    let rules = vec![(read.to_owned(), LandlockAccess::Read), (write.to_owned(), LandlockAccess::Write)];
    nix::sys::prctl::set_no_new_privs()?;
    confine::landlock_restrict(&LandlockPlan { abi, rules })?;
    seccompiler::apply_filter(&filter).map_err(io::Error::other)
}

/// What a process that serves calls and a client of ours does not: it makes no socket, binds and connects none. Descriptors are
/// handed to it.
const CLIENT_CALLS_NOT: [libc::c_long; 4] =
    [libc::SYS_accept4, libc::SYS_bind, libc::SYS_connect, libc::SYS_socket];

/// What a client's store calls beyond that.
#[cfg(target_arch = "x86_64")]
const CLIENT_CALLS: [libc::c_long; 10] = [
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_getcwd,
    libc::SYS_getrusage,
    libc::SYS_lstat,
    libc::SYS_pipe2,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const CLIENT_CALLS: [libc::c_long; 8] = [
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_getcwd,
    libc::SYS_getrusage,
    libc::SYS_pipe2,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Confines a client that has connected already, whoever it is: it writes below `write`, reads nothing else, executes nothing,
/// sends no signal to what is not confined like it, cannot be traced by its user's other processes, and makes no connection: it
/// uses those it was handed. From here on another call ends it. The caller has one thread.
///
/// # Errors
/// As the call that failed; also where the path is not there. The process has to end then.
pub fn confine_client(write: Option<&Path>) -> io::Result<()> {
    let calls = [&CALLS[..], &SERVER_CALLS, &SERVER_CALLS_OLD, &CLIENT_CALLS].concat();
    let calls: Vec<_> = calls.into_iter().filter(|call| !CLIENT_CALLS_NOT.contains(call)).collect();
    let filter = seccomp::nothing_but(&calls, &[])?;
    let abi = sys::landlock_abi().min(LANDLOCK_ABI_TESTED);
    let rules = write.map(|path| (path.to_owned(), LandlockAccess::Write)).into_iter().collect();
    setrlimit(Resource::RLIMIT_CORE, 1, 1)?;
    nix::sys::prctl::set_dumpable(false)?;
    nix::sys::prctl::set_no_new_privs()?;
    confine::landlock_restrict(&LandlockPlan { abi, rules })?;
    seccompiler::apply_filter(&filter).map_err(io::Error::other)
}

/// What a role does beside waiting and talking on the channels that it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Nothing.
    Wait,
    /// It keeps files that others opened for it.
    Keep,
    /// It serves sockets that others made for it.
    Serve,
    /// It asks servers of names.
    Resolve,
}

/// Of a role that keeps files.
const KEEP_CALLS: [libc::c_long; 7] = [
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_statx,
];

/// Of a role that serves sockets. A connected socket is the whole network to its holder, so none is made, connected or bound, and
/// no option is set but those below.
const SERVE_CALLS: [libc::c_long; 15] = [
    libc::SYS_accept4,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_writev,
];
#[cfg(target_arch = "x86_64")]
const SERVE_CALLS_OLD: [libc::c_long; 1] = [libc::SYS_epoll_wait];
#[cfg(not(target_arch = "x86_64"))]
const SERVE_CALLS_OLD: [libc::c_long; 0] = [];

/// Of a role that asks servers of names, beside those of one that serves.
const RESOLVE_CALLS: [libc::c_long; 5] =
    [libc::SYS_socket, libc::SYS_bind, libc::SYS_connect, libc::SYS_setsockopt, libc::SYS_ioctl];

/// Calls of a role that serves, that are allowed with these arguments alone: which argument, and its value.
const SERVE_ARGUMENTS: [(libc::c_long, &[(u8, u64)]); 3] = [
    (libc::SYS_setsockopt, &[(1, libc::IPPROTO_TCP as u64), (2, libc::TCP_NODELAY as u64)]),
    (libc::SYS_ioctl, &[(1, libc::FIONBIO)]),
    (libc::SYS_ioctl, &[(1, libc::TIOCOUTQ)]),
];

/// Gives up everything but the standard descriptors: no file, no other process, no capability, and from the filter on no call
/// but the few that waiting takes; any other ends the process. `uid` is the role's own, and its group's number too. The
/// caller is root and has one thread.
///
/// # Errors
/// As the call that failed. The process is then of no use, and has to end.
pub fn confine_role(uid: u32, network: Reachable, work: Work) -> io::Result<()> {
    let filter = match work {
        Work::Wait => seccomp::nothing_but(&CALLS, &[]),
        Work::Keep => seccomp::nothing_but(&[&CALLS[..], &KEEP_CALLS].concat(), &[]),
        Work::Serve => {
            seccomp::nothing_but(&[&CALLS[..], &SERVE_CALLS, &SERVE_CALLS_OLD].concat(), &SERVE_ARGUMENTS)
        }
        Work::Resolve => {
            seccomp::nothing_but(&[&CALLS[..], &SERVE_CALLS, &SERVE_CALLS_OLD, &RESOLVE_CALLS].concat(), &[])
        }
    }?;
    let abi = sys::landlock_abi().min(LANDLOCK_ABI_TESTED);
    let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    sys::close_all_but(&standard)?;
    let own = if network == Reachable::Nothing { CloneFlags::CLONE_NEWNET } else { CloneFlags::empty() };
    unshare(own | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    confine::stand_on_nothing()?;
    let open_files = if work == Work::Serve { OPEN_FILES_TO_SERVE } else { OPEN_FILES };
    for (limit, value) in [(Resource::RLIMIT_CORE, 1), (Resource::RLIMIT_NOFILE, open_files)] {
        setrlimit(limit, value, value)?;
    }
    confine::become_nobody(uid)?;
    // A part of a daemon that is gone is nobody's; a change of ids clears it, so it is set after that.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    nix::sys::prctl::set_dumpable(false)?;
    nix::sys::prctl::set_no_new_privs()?;
    confine::landlock_restrict(&LandlockPlan { abi, rules: Vec::new() })?;
    seccompiler::apply_filter(&filter).map_err(io::Error::other)
}
