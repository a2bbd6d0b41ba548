//! PID 1 of a sandbox. It holds no secret and no right: it went the same way as the workload, under the same filter. It starts the
//! workload, reaps, passes on signals that come from outside, and says once how the workload ended.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, WaitOptions, WaitStatus, kill_process, wait};

use crate::confine::{Confined, Failure, Stage};
use crate::order::{Command, ORDER_BYTES_MAX, Order};
use crate::sys::{Setting, exit_now, spawn};

/// What init, or the child that becomes it, says on its channel: one message of [`MESSAGE_BYTES`] bytes. `number` is
/// the order's, 0 for the one command of a sandbox that ends with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// The set-up failed.
    SetupFailed { stage: Stage, object: usize, errno: i32 },
    /// The command could not be executed.
    ExecFailed { errno: i32, number: u32 },
    /// The command ended by itself.
    Exited { code: i32, number: u32 },
    /// A signal ended the command.
    Signaled { signal: i32, number: u32 },
    /// The sandbox is confined and waits for orders.
    Ready,
}

/// Three words of four bytes.
pub(crate) const MESSAGE_BYTES: usize = 12;

impl Message {
    fn encode(self) -> [u8; MESSAGE_BYTES] {
        let words: [i32; 3] = match self {
            Message::SetupFailed { stage, object, errno } => {
                [(stage as i32) << 8, i32::try_from(object).unwrap_or(i32::MAX), errno]
            }
            Message::ExecFailed { errno, number } => [1, errno, number.cast_signed()],
            Message::Exited { code, number } => [2, code, number.cast_signed()],
            Message::Signaled { signal, number } => [3, signal, number.cast_signed()],
            Message::Ready => [4, 0, 0],
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
        let number = word(8).cast_unsigned();
        match word(0) {
            1 => Some(Message::ExecFailed { errno: word(4), number }),
            2 => Some(Message::Exited { code: word(4), number }),
            3 => Some(Message::Signaled { signal: word(4), number }),
            4 => Some(Message::Ready),
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
    say_and_end(status, Message::SetupFailed { stage, object, errno })
}

/// The life of init: one command, and its end is the sandbox's. Only what is confined gets here.
pub(crate) fn live(_: &Confined, command: &Command, setting: &Setting<'_>, status: &OwnedFd) -> ! {
    let begun = prepare(status).and_then(|(signals, null)| {
        let workload = spawn(command, setting)?;
        // What is at the other end of the streams sees the end of the workload, not of init.
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
        Ok((workload, signals))
    });
    match begun {
        Ok((workload, signals)) => tend(workload, &signals, status),
        Err(error) => say_and_end(status, exec_failed(&error, 0)),
    }
}

/// The life of an init that waits for orders, until nobody is there to give any. Only what is confined gets here.
pub(crate) fn serve(_: &Confined, channel: &OwnedFd, door: Option<BorrowedFd<'_>>) -> ! {
    match prepare(channel) {
        Ok((signals, _)) => {
            say(channel, Message::Ready);
            obey(channel, &signals, door)
        }
        Err(error) => say_and_end(channel, exec_failed(&error, 0)),
    }
}

fn exec_failed(error: &io::Error, number: u32) -> Message {
    Message::ExecFailed { errno: error.raw_os_error().unwrap_or(libc::EINVAL), number }
}

/// Everything that may fail, before the workload is there to lower a limit of init's.
fn prepare(status: &OwnedFd) -> io::Result<(SignalFd, OwnedFd)> {
    // Changing the uid has cleared it, so it could not be set before.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    if launcher_is_gone(status) {
        exit_now(1);
    }
    SigSet::all().thread_block()?;
    let signals = SignalFd::with_flags(&SigSet::all(), SfdFlags::SFD_CLOEXEC)?;
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    Ok((signals, null))
}

/// One order or one death after the other.
fn obey(channel: &OwnedFd, signals: &SignalFd, door: Option<BorrowedFd<'_>>) -> ! {
    let mut commands: Vec<(Pid, u32)> = Vec::new();
    loop {
        let mut waits = [PollFd::new(channel, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        if poll(&mut waits, None).is_err() {
            continue;
        }
        let [ordered, died] = waits.map(|wait| !wait.revents().is_empty());
        // Deaths first: an order may come for a number whose command has just ended.
        if died && let Ok(Some(_)) = signals.read_signal() {
            reap(|pid, status| {
                if let Some(at) = commands.iter().position(|(command, _)| *command == pid) {
                    let (_, number) = commands.swap_remove(at);
                    if let Some(message) = ended(status, number) {
                        say(channel, message);
                    }
                }
            });
        }
        if !ordered {
            continue;
        }
        match receive(channel) {
            Ok(Some((Order::Start { number, streams, command }, given))) => {
                let mut given = given.iter();
                let mut stream =
                    |bit: u32| if streams & (1 << bit) == 0 { None } else { given.next().map(AsFd::as_fd) };
                let streams = [stream(0), stream(1), stream(2)];
                match spawn(&command, &Setting { streams, door, ..Setting::default() }) {
                    Ok(pid) => commands.push((pid, number)),
                    Err(error) => say(channel, exec_failed(&error, number)),
                }
            }
            Ok(Some((Order::Signal { number, signal }, _))) => {
                let command = commands.iter().find(|(_, other)| *other == number);
                pass_on(command.map(|(pid, _)| *pid), signal);
            }
            Ok(None) | Err(_) => exit_now(0),
        }
    }
}

fn pass_on(command: Option<Pid>, signal: i32) {
    if let (Some(pid), Some(signal)) = (command, rustix::process::Signal::from_named_raw(signal)) {
        // It may just have ended; what it had started in its own group goes with it.
        let _ = match signal {
            rustix::process::Signal::KILL => rustix::process::kill_process_group(pid, signal),
            other => kill_process(pid, other),
        };
    }
}

/// An order with its streams; nothing when the giver has gone.
fn receive(channel: &OwnedFd) -> io::Result<Option<(Order, Vec<OwnedFd>)>> {
    let mut bytes = vec![0_u8; ORDER_BYTES_MAX];
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(channel, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let streams: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        })
        .collect();
    if received.bytes == 0 {
        return Ok(None);
    }
    let order = Order::decode(&bytes[..received.bytes]);
    let order = order.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADMSG))?;
    Ok(Some((order, streams)))
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
            let mut message = None;
            reap(|pid, status| {
                if pid == workload {
                    message = ended(status, 0);
                }
            });
            if let Some(message) = message {
                // The kernel ends everything else in this namespace when init ends.
                say_and_end(status, message);
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

/// Reaps everything that has ended.
fn reap(mut each: impl FnMut(Pid, WaitStatus)) {
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        each(pid, status);
    }
}

fn ended(status: WaitStatus, number: u32) -> Option<Message> {
    let code = status.exit_status().map(|code| Message::Exited { code, number });
    code.or(status.terminating_signal().map(|signal| Message::Signaled { signal, number }))
}

fn say(channel: &OwnedFd, message: Message) {
    // Shorter than PIPE_BUF, so it arrives whole or not at all; if not, the launcher sees the end of the channel.
    let _ = rustix::io::write(channel.as_fd(), &message.encode());
}

fn say_and_end(channel: &OwnedFd, message: Message) -> ! {
    say(channel, message);
    exit_now(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_comes_back_as_it_was() {
        let failed = Stage::ALL.map(|stage| Message::SetupFailed { stage, object: 7, errno: libc::EIO });
        let others = [
            Message::ExecFailed { errno: 2, number: 0 },
            Message::Exited { code: 255, number: u32::MAX },
            Message::Signaled { signal: 9, number: 7 },
            Message::Ready,
        ];
        for message in failed.into_iter().chain(others) {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        assert_eq!(Message::decode(&[0; 11]), None);
        assert_eq!(Message::decode(&[0xff; MESSAGE_BYTES]), None);
        assert_eq!(Message::decode(&Message::Ready.encode()[1..]), None);
    }
}
