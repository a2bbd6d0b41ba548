//! Namespaces made ahead: network, ipc, uts and mount, with loopback up and an empty root that nothing of the host is in.
//!
//! Making them is the dear part of a start, and needs no plan. So a process of its own begins with it while this one still
//! parses and plans; the sandbox's init then joins what is ready (setns(2)), and the maker is ended.

use std::io;

use nix::sched::CloneFlags;
use rustix::fd::{AsFd, OwnedFd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use crate::confine::{self, Failure, Stage};
use crate::init::{MESSAGE_BYTES, Message, setup_failed};
use crate::sys::{self, Side};

/// Everything that a sandbox does not share, but for processes, users and control groups, which init makes itself.
pub(crate) const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNET
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWNS);

/// Namespaces under way or ready, for one sandbox. Whoever drops it unused gives them up.
#[derive(Debug)]
pub struct Nest {
    maker: OwnedFd,
    said: OwnedFd,
    release: OwnedFd,
}

/// What the maker says when it is done; no stage of the set-up has this code.
const READY: [u8; MESSAGE_BYTES] = [0xee; MESSAGE_BYTES];

impl Nest {
    /// Begins. The caller has one thread.
    ///
    /// # Errors
    /// When no process can be made. What fails in it is told by [`Nest::ready`].
    pub fn begin() -> io::Result<Nest> {
        let (said, say) = pipe_with(PipeFlags::CLOEXEC)?;
        let (released, release) = pipe_with(PipeFlags::CLOEXEC)?;
        match sys::clone3(0, None)? {
            Side::Parent { pidfd, .. } => Ok(Nest { maker: pidfd, said, release }),
            Side::Child => {
                drop((said, release));
                make_and_wait(&say, &released)
            }
        }
    }

    /// Waits until they are ready.
    pub(crate) fn ready(&self) -> io::Result<Result<(), Message>> {
        let mut bytes = [0_u8; MESSAGE_BYTES];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&self.said, &mut bytes))?;
        if bytes == READY {
            return Ok(Ok(()));
        }
        Message::decode(&bytes[..length]).map(Err).ok_or_else(|| io::Error::from_raw_os_error(libc::EPIPE))
    }

    /// Moves the calling process in, and ends the maker.
    pub(crate) fn join(&self) -> io::Result<()> {
        nix::sched::setns(self.maker.as_fd(), NAMESPACES)?;
        // Not by a signal: the maker has no number in the namespace of the process that joins.
        Ok(rustix::io::write(&self.release, b"x").map(drop)?)
    }
}

impl Drop for Nest {
    fn drop(&mut self) {
        // It has nothing but its namespaces, so there is nothing to be told if it has gone already.
        let _ = pidfd_send_signal(&self.maker, Signal::KILL);
        let _ =
            rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(self.maker.as_fd()), WaitIdOptions::EXITED));
    }
}

fn make_and_wait(say: &OwnedFd, released: &OwnedFd) -> ! {
    if let Err(failure) = make() {
        setup_failed(say, &failure);
    }
    let _ = rustix::io::write(say, &READY);
    // Until init has joined, or everybody who could has gone.
    let _ = rustix::io::retry_on_intr(|| rustix::io::read(released, &mut [0_u8; 1]));
    sys::exit_now(0)
}

fn make() -> Result<(), Failure> {
    let failed = |object| Failure::at(Stage::Namespaces, object);
    nix::sched::unshare(NAMESPACES).map_err(io::Error::from).map_err(failed(0))?;
    sys::loopback_up().map_err(failed(1))?;
    rustix::system::sethostname(crate::plan::HOSTNAME.as_bytes())
        .map_err(io::Error::from)
        .map_err(failed(2))?;
    confine::make_root()
}
