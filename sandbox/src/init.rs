//! PID 1 of a sandbox. It holds no secret and no right: it went the same way as the workload, under the same filter. It starts the
//! workload, reaps, passes on signals that come from outside, and says once how the workload ended.

use std::io;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, WaitOptions, kill_process, wait};

use crate::confine::{Confined, Failure, Stage};
use crate::sys::{Image, exit_now, spawn};

/// What init, or the child that becomes it, says on the status pipe: one message of [`MESSAGE_BYTES`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// The set-up failed.
    SetupFailed { stage: Stage, object: usize, errno: i32 },
    /// The command could not be executed.
    ExecFailed { errno: i32 },
    /// The command ended by itself.
    Exited { code: i32 },
    /// A signal ended the command.
    Signaled { signal: i32 },
}

/// Three words of four bytes.
pub(crate) const MESSAGE_BYTES: usize = 12;

impl Message {
    fn encode(self) -> [u8; MESSAGE_BYTES] {
        let words: [i32; 3] = match self {
            Message::SetupFailed { stage, object, errno } => {
                [(stage as i32) << 8, i32::try_from(object).unwrap_or(i32::MAX), errno]
            }
            Message::ExecFailed { errno } => [1, errno, 0],
            Message::Exited { code } => [2, code, 0],
            Message::Signaled { signal } => [3, signal, 0],
        };
        let mut bytes = [0; MESSAGE_BYTES];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// The message in `bytes`, if it is one.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Message> {
        let bytes: [u8; MESSAGE_BYTES] = bytes.try_into().ok()?;
        let word = |at: usize| i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        match word(0) {
            1 => Some(Message::ExecFailed { errno: word(4) }),
            2 => Some(Message::Exited { code: word(4) }),
            3 => Some(Message::Signaled { signal: word(4) }),
            stage if stage & 0xff == 0 => {
                let stage = *Stage::ALL.get(usize::try_from(stage >> 8).ok()?)?;
                Some(Message::SetupFailed { stage, object: usize::try_from(word(4)).ok()?, errno: word(8) })
            }
            _ => None,
        }
    }
}

/// Says that the set-up failed, and ends.
pub(crate) fn setup_failed(status: &OwnedFd, failure: &Failure) -> ! {
    let Failure { stage, object, errno } = *failure;
    say(status, Message::SetupFailed { stage, object, errno })
}

/// The life of init. Only what is confined gets here.
pub(crate) fn live(_: &Confined, image: &Image, status: &OwnedFd) -> ! {
    match start(image, status) {
        Ok((workload, signals)) => tend(workload, &signals, status),
        Err(error) => {
            say(status, Message::ExecFailed { errno: error.raw_os_error().unwrap_or(libc::EINVAL) })
        }
    }
}

fn start(image: &Image, status: &OwnedFd) -> io::Result<(Pid, SignalFd)> {
    // Changing the uid has cleared it, so it could not be set before.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if launcher_is_gone(status) {
        exit_now(1);
    }
    SigSet::all().thread_block()?;
    let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC)?;
    // Before the workload is there to lower a limit of init's; afterwards nothing may fail any more.
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let workload = spawn(image)?;
    // What is at the other end of the streams sees the end of the workload, not of init.
    let _ = rustix::stdio::dup2_stdin(&null);
    let _ = rustix::stdio::dup2_stdout(&null);
    let _ = rustix::stdio::dup2_stderr(&null);
    Ok((workload, signals))
}

fn launcher_is_gone(status: &OwnedFd) -> bool {
    let mut ends = [PollFd::new(status, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut ends, Some(&now)).is_ok() && ends[0].revents().contains(PollFlags::ERR)
}

fn tend(workload: Pid, signals: &SignalFd, status: &OwnedFd) -> ! {
    loop {
        let Ok(Some(arrived)) = signals.read_signal() else {
            continue;
        };
        let number = arrived.ssi_signo.cast_signed();
        if number == libc::SIGCHLD {
            if let Some(message) = reap(workload) {
                // The kernel ends everything else in this namespace when init ends.
                say(status, message);
            }
        } else if arrived.ssi_pid == 0 && arrived.ssi_code == libc::SI_USER {
            // A sender outside the namespace has no number in it. What the workload sends is not passed on.
            if let Some(signal) = rustix::process::Signal::from_named_raw(number) {
                // It may just have ended.
                let _ = kill_process(workload, signal);
            }
        }
    }
}

/// Reaps everything that has ended; the message if the workload is among it.
fn reap(workload: Pid) -> Option<Message> {
    let mut message = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == workload {
            let code = status.exit_status().map(|code| Message::Exited { code });
            message = code.or(status.terminating_signal().map(|signal| Message::Signaled { signal }));
        }
    }
    message
}

fn say(status: &OwnedFd, message: Message) -> ! {
    // Shorter than PIPE_BUF, so it arrives whole or not at all; if not, the launcher sees the end of the pipe.
    let _ = rustix::io::write(status.as_fd(), &message.encode());
    exit_now(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_comes_back_as_it_was() {
        let failed = Stage::ALL.map(|stage| Message::SetupFailed { stage, object: 7, errno: libc::EIO });
        let others = [
            Message::ExecFailed { errno: 2 },
            Message::Exited { code: 255 },
            Message::Signaled { signal: 9 },
        ];
        for message in failed.into_iter().chain(others) {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        assert_eq!(Message::decode(&[0; 11]), None);
        assert_eq!(Message::decode(&[0xff; MESSAGE_BYTES]), None);
        assert_eq!(Message::decode(&Message::Exited { code: 0 }.encode()[1..]), None);
    }
}
