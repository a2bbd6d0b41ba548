//! The system calls that no safe wrapper has, and nothing else. All `unsafe` of this crate is in this module.
#![allow(unsafe_code, reason = "the one module that may: each block says why it is sound")]

mod spawn;

use std::io;
use std::mem::size_of;

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub use spawn::{Setting, spawn};

/// `CLONE_INTO_CGROUP` of clone3(2); libc's constant is 0 on some targets.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// `KEYCTL_JOIN_SESSION_KEYRING` of keyctl(2).
const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;

/// Which side of a clone3(2) or fork(2) returned.
#[derive(Debug)]
pub enum Side {
    /// The child.
    Child,
    /// The parent, with a pidfd of the child and its number.
    Parent {
        /// Refers to the child whatever becomes of its number.
        pidfd: OwnedFd,
        /// Its number, in the caller's namespace.
        pid: rustix::process::Pid,
    },
}

/// clone3(2) with `namespaces` (`CLONE_NEW*`), a pidfd, handlers cleared, and into `cgroup` where that is given.
///
/// The caller has one thread, so the child may go on in ordinary Rust.
///
/// # Errors
/// As clone3(2).
pub fn clone3(namespaces: i32, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Side> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: an all-zero clone_args is valid: no stack, no tls, no flags.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(namespaces.cast_unsigned()) | libc::CLONE_PIDFD as u64;
    arguments.pidfd = (&raw mut pidfd).addr() as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: without CLONE_VM the child has its own copy of memory, as after fork(2); `arguments` and `pidfd` outlive
    // the call; the caller is single-threaded, so no lock of the allocator can be held by anybody.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Side::Child),
        pid => {
            // SAFETY: the kernel has stored a new descriptor there, which nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
            Ok(Side::Parent { pidfd, pid: pid.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))? })
        }
    }
}

/// `mount_attr` of mount_setattr(2).
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct MountAttributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// `MS_PRIVATE` and the like; 0 leaves it.
    pub propagation: u64,
    /// For `MOUNT_ATTR_IDMAP`.
    pub userns_fd: u64,
}

/// How far a change of mount attributes reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// One mount.
    One,
    /// It and all below it.
    All,
}

/// mount_setattr(2) on the mount that `mount` refers to.
///
/// # Errors
/// As mount_setattr(2).
pub fn mount_setattr(mount: impl AsFd, attributes: MountAttributes, reach: Reach) -> io::Result<()> {
    let flags = match reach {
        Reach::One => libc::AT_EMPTY_PATH,
        Reach::All => libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
    };
    // SAFETY: the path is an empty C string, `attributes` has the layout of `mount_attr` and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    check(result)
}

/// keyctl(2): a new, empty session keyring.
///
/// # Errors
/// As keyctl(2).
pub fn join_new_session_keyring() -> io::Result<()> {
    // SAFETY: a null name asks for an anonymous keyring; no memory is passed.
    check(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>())
    })
}

/// Closes every descriptor but those in `kept`, in a forked child that will never drop what it inherited.
///
/// # Errors
/// As close_range(2).
pub fn close_all_but(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers: Vec<u32> = kept.iter().map(|fd| fd.as_raw_fd().cast_unsigned()).collect();
    numbers.sort_unstable();
    let mut first = 0;
    for number in numbers.into_iter().chain([u32::MAX]) {
        if number > first {
            // SAFETY: the owners of these descriptors are values of the parent, which this process only has copies of
            // and exits without dropping.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, number - 1, 0) })?;
        }
        first = number.saturating_add(1);
    }
    Ok(())
}

/// _exit(2): ends this process without running what its parent had registered.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: never returns and touches no memory.
    unsafe { libc::_exit(code) }
}

/// Drops every capability of this kernel from the bounding set (capabilities(7)).
///
/// # Errors
/// As prctl(2), but for the end of the list.
pub fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            // The first number that this kernel does not have.
            return if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 {
                Ok(())
            } else {
                Err(error)
            };
        }
    }
    Ok(())
}

/// Sets the securebits (capabilities(7)).
///
/// # Errors
/// As prctl(2).
pub fn set_securebits(bits: libc::c_ulong) -> io::Result<()> {
    // SAFETY: PR_SET_SECUREBITS takes a number and touches no memory.
    check(i64::from(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0) }))
}

/// Brings `lo` up in the network namespace of the caller.
///
/// # Errors
/// As socket(2) or ioctl(2).
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is valid; the name is NUL-terminated within it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = (*from).cast_signed() as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads the ifreq, which outlives the call.
    check(i64::from(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) }))
}

/// A new namespace of `kind`, as `/proc/PID/ns/NAME` names it, of a child that ends before this returns. The child runs
/// `inside` first, and the parent then `outside`, with its directory in `/proc`. The caller has one thread.
///
/// # Errors
/// As clone3(2), or what either of the two said.
pub fn namespace_of_child(
    kind: i32,
    name: &str,
    inside: Option<&dyn Fn() -> io::Result<()>>,
    outside: impl FnOnce(&std::path::Path) -> io::Result<()>,
) -> io::Result<OwnedFd> {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    let (wait, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (hear, say) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match clone3(kind, None)? {
        Side::Child => {
            drop((go, hear));
            if let Some(inside) = inside {
                let done = inside().err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
                let _ = rustix::io::write(&say, &done.to_ne_bytes());
            }
            let _ = rustix::io::read(&wait, &mut [0_u8; 1]);
            exit_now(0)
        }
        Side::Parent { pid, pidfd } => {
            drop(say);
            let folder = std::path::PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
            let mut errno = [0; 4];
            let heard = if inside.is_some() { rustix::io::read(&hear, &mut errno) } else { Ok(4) };
            let made = match heard {
                Ok(4) if errno == [0; 4] => outside(&folder).and_then(|()| {
                    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                    Ok(openat(CWD, folder.join("ns").join(name), flags, Mode::empty())?)
                }),
                Ok(4) => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
                _ => Err(io::Error::from_raw_os_error(libc::ECHILD)),
            };
            drop(go);
            waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
            made
        }
    }
}

/// How much of what was sent into a Unix socket its other end has not read (`SIOCOUTQ`, unix(7)): bytes of the kernel's
/// buffers, 0 when it has read everything.
///
/// # Errors
/// As ioctl(2).
pub fn unread_by_peer(socket: impl AsFd) -> io::Result<i32> {
    let mut unread: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which TIOCOUTQ is another name of, writes an int, which outlives the call.
    check(i64::from(unsafe {
        libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ as _, &raw mut unread)
    }))?;
    Ok(unread)
}

/// The file that a Unix socket is bound to (`SIOCUNIXFILE`, linux/un.h), opened with `O_PATH`. A socket that was accepted has
/// the file of the one that listened, and nobody else can give a socket that file. Takes `CAP_NET_ADMIN`.
///
/// # Errors
/// As ioctl(2); `ENOENT` where it is bound to none.
pub fn file_of_socket(socket: impl AsFd) -> io::Result<OwnedFd> {
    const SIOCUNIXFILE: libc::c_ulong = 0x89e0;
    // SAFETY: SIOCUNIXFILE takes no argument.
    let file = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCUNIXFILE as _, 0) };
    check(i64::from(file))?;
    // SAFETY: the kernel has made this descriptor for the caller, and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(file) })
}

/// What a TCP connection has sent and received, in bytes of its data (`TCP_INFO`, tcp(7)): without what was sent again. Of one that
/// the other side has reset, what was received may be one too few.
///
/// # Errors
/// As getsockopt(2); `ENOPROTOOPT` where the kernel is older than these counts (5.5).
pub fn tcp_bytes(socket: impl AsFd) -> io::Result<(u64, u64)> {
    // linux/tcp.h, struct tcp_info: tcpi_state, tcpi_bytes_received, tcpi_bytes_sent, tcpi_bytes_retrans.
    const RECEIVED: usize = 128;
    const SENT: usize = 200;
    const SENT_AGAIN: usize = 208;
    // net/tcp_states.h
    const ESTABLISHED: u8 = 1;
    const FIN_WAIT_1: u8 = 4;
    const FIN_WAIT_2: u8 = 5;
    let mut info = [0_u8; 216];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes no more than `length` bytes into `info`, and both outlive the call.
    check(i64::from(unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    }))?;
    if (length as usize) < info.len() {
        return Err(io::Error::from_raw_os_error(libc::ENOPROTOOPT));
    }
    let count = |at: usize| info[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    // The other side's end counts as a byte received (RFC 9293, 3.4); these are the states before it.
    let open = [ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2].contains(&info[0]);
    let received = count(RECEIVED).saturating_sub(u64::from(!open));
    Ok((count(SENT).saturating_sub(count(SENT_AGAIN)), received))
}

/// Makes the end of a child be told again, whatever the caller had set: where `SIGCHLD` is ignored the kernel reaps children
/// itself, and neither init nor the launcher would ever learn how theirs ended (signal(7)).
pub fn hear_of_children() {
    // SAFETY: an all-zero sigaction is SIG_DFL with an empty mask; it outlives the call.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGCHLD, &raw const default, std::ptr::null_mut());
    }
}

/// Overwrites the arguments that this process was started with, which `/proc/PID/cmdline` shows to everybody who sees it.
pub fn forget_arguments() {
    // SAFETY: glibc and musl set it before main to argv[0], and nothing changes it.
    unsafe extern "C" {
        static program_invocation_name: *mut libc::c_char;
    }
    let length: usize = std::env::args_os().map(|argument| argument.len() + 1).sum();
    // SAFETY: the kernel lays the arguments out one after another, each with its NUL, in memory that this process may
    // write (execve(2)); `length` is their sum. The standard library reads them from there when it is asked, and nobody asks
    // it in a process that is about to become init.
    unsafe { std::ptr::write_bytes(program_invocation_name, 0, length) };
}

/// The Landlock ABI of the running kernel; 0 where there is none or it may not be used.
pub fn landlock_abi() -> u8 {
    const VERSION: u32 = 1;
    // SAFETY: with LANDLOCK_CREATE_RULESET_VERSION the attribute is null and nothing is read.
    let abi =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, VERSION) };
    u8::try_from(abi).unwrap_or(0)
}

/// Lends one of the three standard descriptors, if it is open.
pub fn standard_stream(number: i32) -> Option<BorrowedFd<'static>> {
    assert!((0..3).contains(&number), "only the standard streams are ever lent for ever");
    // SAFETY: F_GETFD takes no memory.
    let open = unsafe { libc::fcntl(number, libc::F_GETFD) } != -1;
    // SAFETY: this process never closes its standard descriptors, so the loan may last for ever.
    open.then(|| unsafe { BorrowedFd::borrow_raw(number) })
}

/// Takes over descriptor 3, the first that a service manager passes (sd_listen_fds(3)); once.
pub fn take_passed_descriptor() -> Option<OwnedFd> {
    const FIRST: i32 = 3;
    static TAKEN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    // SAFETY: F_SETFD takes a number and no memory; it fails where nothing is open.
    let open = unsafe { libc::fcntl(FIRST, libc::F_SETFD, libc::FD_CLOEXEC) } != -1;
    let taken = TAKEN.swap(true, std::sync::atomic::Ordering::Relaxed);
    // SAFETY: it is open, was there before this program began, and nobody else takes it over.
    (open && !taken).then(|| unsafe { OwnedFd::from_raw_fd(FIRST) })
}

/// Makes it descriptor 3 of what this process executes, in the place of what was there.
///
/// # Errors
/// As dup2(2).
pub fn pass_descriptor(descriptor: OwnedFd) -> io::Result<()> {
    const FIRST: i32 = 3;
    if descriptor.as_raw_fd() == FIRST {
        let own = std::os::fd::IntoRawFd::into_raw_fd(descriptor);
        // SAFETY: F_SETFD takes a number and no memory.
        return check(unsafe { libc::fcntl(own, libc::F_SETFD, 0) }.into());
    }
    // SAFETY: takes two numbers; whoever owned this number is about to be replaced by another program.
    check(unsafe { libc::dup2(descriptor.as_raw_fd(), FIRST) }.into())
}

/// The number of a descriptor, for a struct that carries one.
pub fn raw(fd: &OwnedFd) -> u64 {
    u64::from(fd.as_raw_fd().cast_unsigned())
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
