//! Starts the workload from init: clone(2) that shares memory until execve(2), as posix_spawn(3) does it, because copying
//! init's page tables costs more than everything else in here.

use std::ffi::{CStr, CString};
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::order::Command;

/// How a command is started.
#[derive(Debug, Default)]
pub struct Setting<'a> {
    /// Standard input becomes the terminal of the new session.
    pub controlling_terminal: bool,
    /// It may run on these processors, wherever init itself may.
    pub processors: Option<CpuSet>,
    /// What becomes its standard streams; init's own where there is nothing.
    pub streams: [Option<BorrowedFd<'a>>; 3],
    /// What becomes its descriptor 3.
    pub door: Option<BorrowedFd<'a>>,
}

/// The descriptor of the door inside.
const DOOR: libc::c_int = 3;

struct Request<'a> {
    directory: &'a CStr,
    candidates: &'a [CString],
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    setting: &'a Setting<'a>,
    errno: AtomicI32,
}

/// The child's stack: it calls a dozen functions and no deeper. Not cleared: each page that is touched costs a fault.
const STACK_BYTES: usize = 32 * 1024;

/// Starts `command` as leader of a new session, all signals at their default and unblocked. Its candidates are tried in order
/// until one can be executed.
///
/// # Errors
/// As clone(2), dup2(2), chdir(2), or the most telling errno of the execve(2) calls: `EACCES` goes before `ENOENT`.
pub fn spawn(command: &Command, setting: &Setting<'_>) -> io::Result<Pid> {
    let request = Request {
        directory: &command.directory,
        candidates: &command.candidates,
        arguments: pointers(&command.arguments),
        environment: pointers(&command.environment),
        setting,
        errno: AtomicI32::new(0),
    };
    let mut stack = Vec::<u8>::with_capacity(STACK_BYTES);
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end.cast::<u8>();
    // The ABIs want the stack aligned to 16 bytes.
    let top = top.map_addr(|address| address & !15);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child runs on a stack of its own and ends in execve(2) or _exit(2); with CLONE_VFORK this thread, the
    // only one, sleeps until then, so `request` and `stack` outlive it and nobody else touches this memory.
    let pid = unsafe { libc::clone(child, top.cast(), flags, (&raw const request).cast_mut().cast()) };
    if pid == -1 {
        return Err(io::Error::last_os_error());
    }
    match (request.errno.load(Ordering::Relaxed), Pid::from_raw(pid)) {
        (0, Some(pid)) => Ok(pid),
        (errno, _) => {
            // SAFETY: reaps the child that has just failed; a null status is allowed.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
            Err(io::Error::from_raw_os_error(errno))
        }
    }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Runs in the parent's memory: nothing but system calls, no allocation, no lock, no unwinding.
extern "C" fn child(request: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `spawn` passes a Request that lives until this child has gone.
    let request = unsafe { &*request.cast::<Request<'_>>() };
    if let Some(processors) = &request.setting.processors {
        let _ = sched_setaffinity(None, processors);
    }
    // SAFETY: plain system calls on values; sigaction and sigset are valid when all zero (SIG_DFL, empty), and signal
    // dispositions are this process's own, since CLONE_SIGHAND is not given.
    unsafe {
        libc::setsid();
        // The copies on 0, 1 and 2 survive execve(2), the originals do not.
        let mut streams = (0..).zip(&request.setting.streams);
        let failed = streams.any(|(number, stream)| {
            stream.as_ref().is_some_and(|stream| libc::dup2(stream.as_raw_fd(), number) < 0)
        }) || request.setting.door.as_ref().is_some_and(|door| match door.as_raw_fd() {
            // A copy onto itself would still close at execve(2).
            DOOR => libc::fcntl(DOOR, libc::F_SETFD, 0) < 0,
            door => libc::dup2(door, DOOR) < 0,
        }) || libc::chdir(request.directory.as_ptr()) != 0
            || request.setting.controlling_terminal && libc::ioctl(0, libc::TIOCSCTTY, 0) != 0;
        if failed {
            request.errno.store(*libc::__errno_location(), Ordering::Relaxed);
            libc::_exit(127);
        }
        let default: libc::sigaction = std::mem::zeroed();
        for signal in 1..=libc::SIGRTMAX() {
            // The C library keeps two for itself and refuses; the kernel refuses SIGKILL and SIGSTOP.
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        }
        let none: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        let mut found = libc::ENOENT;
        for candidate in request.candidates {
            libc::execve(candidate.as_ptr(), request.arguments.as_ptr(), request.environment.as_ptr());
            match *libc::__errno_location() {
                libc::ENOENT | libc::ENOTDIR => {}
                // As execvp(3): a file that may not be run does not end the search, but is remembered.
                libc::EACCES => found = libc::EACCES,
                errno => {
                    found = errno;
                    break;
                }
            }
        }
        request.errno.store(found, Ordering::Relaxed);
        libc::_exit(127)
    }
}
