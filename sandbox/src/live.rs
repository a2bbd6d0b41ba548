//! A sandbox that lives: made once, given commands one after the other or several at a time, ended when nobody wants it any
//! more. A command in it costs one fork of its init, not a new sandbox.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Instant;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
    socketpair,
};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use crate::init::{self, MESSAGE_BYTES, Message};
use crate::judge;
use crate::launch::{Given, LaunchError, Parts, call, lend, make_init, with_parts};
use crate::open;
use crate::order::{Command, ORDER_BYTES_MAX, Order};
use crate::plan::{CommandPlan, Plan};
use crate::relay::Copied;
use crate::report::{Outcome, Report};
use crate::supervise::{Ended, Signals};
use crate::workspace::Workspace;

/// The line to the init of a sandbox that lives.
pub struct Orders<'a> {
    channel: OwnedFd,
    signals: &'a Signals,
}

impl Orders<'_> {
    /// Readable when [`Orders::hear`] has something to say.
    pub fn channel(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Readable when this process has been sent a signal.
    pub fn signals(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// Whether the launcher has told this process to end the sandbox.
    pub fn is_told_to_end(&self) -> bool {
        self.signals.end_was_sent()
    }

    /// Starts a command under a number that no other living one has; a stream that is nothing is `/dev/null`.
    ///
    /// # Errors
    /// `EMSGSIZE` where its words are too long together, `EAGAIN` where init does not listen; as sendmsg(2) where it has gone.
    pub fn execute(
        &self,
        number: u32,
        command: &CommandPlan,
        streams: [Option<BorrowedFd<'_>>; 3],
    ) -> io::Result<()> {
        let given: Vec<BorrowedFd<'_>> = streams.iter().flatten().copied().collect();
        let mask = (0..).zip(&streams).map(|(bit, stream)| u32::from(stream.is_some()) << bit).sum();
        let order = Order::Start { number, streams: mask, command: Command::of(command)? }.encode();
        if order.len() > ORDER_BYTES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !given.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&given));
        }
        // Whoever wedges init must not wedge this process too.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.channel, &[IoSlice::new(&order)], &mut control, flags)?;
        Ok(())
    }

    /// Passes a signal on to a command; `SIGKILL` to its process group.
    ///
    /// # Errors
    /// `EAGAIN` where init does not listen; as send(2) where it has gone.
    pub fn signal(&self, number: u32, signal: i32) -> io::Result<()> {
        let order = Order::Signal { number, signal }.encode();
        rustix::net::send(&self.channel, &order, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
        Ok(())
    }

    /// How the next command ended that did; nothing when the whole sandbox has.
    ///
    /// # Errors
    /// As read(2).
    pub fn hear(&self) -> io::Result<Option<(u32, Outcome)>> {
        Ok(match receive(&self.channel)? {
            Some(
                message @ (Message::ExecFailed { number, .. }
                | Message::Exited { number, .. }
                | Message::Signaled { number, .. }),
            ) => Some((number, judge::of_command(message))),
            _ => None,
        })
    }
}

fn receive(channel: &OwnedFd) -> io::Result<Option<Message>> {
    let mut bytes = [0_u8; MESSAGE_BYTES];
    let length = rustix::io::retry_on_intr(|| rustix::io::read(channel, &mut bytes))?;
    Ok(Message::decode(&bytes[..length]))
}

/// Makes the sandbox of `plan`, whose own command is not run, lets `attend` give orders, and ends it when that returns. The
/// report is of the whole sandbox. The caller has one thread.
///
/// # Errors
/// As [`crate::run`].
pub fn live(
    plan: &Plan,
    shared: &Path,
    given: Given,
    attend: impl FnOnce(&Orders<'_>) -> io::Result<()>,
) -> Result<Report, LaunchError> {
    let lent = lend(plan, given)?;
    with_parts(plan, shared, lent.as_ref(), |parts, workspace| stay(parts, workspace, attend))
}

fn stay(
    parts: &Parts<'_>,
    workspace: Option<&Workspace>,
    attend: impl FnOnce(&Orders<'_>) -> io::Result<()>,
) -> Result<(Ended, Option<Copied>), LaunchError> {
    let Parts { plan, slot, group, signals, .. } = *parts;
    let trees = open::trees(plan, workspace, slot.uid()).map_err(LaunchError::Tree)?;
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (channel, said) = pair.map_err(|error| call("channel")(error.into()))?;
    let started = Instant::now();
    let init = make_init(parts, workspace, trees, [None, None, None], said, |confined, said| {
        init::serve(confined, said)
    })?;
    let first = receive(&channel).map_err(call("channel"))?;
    let attended = match first {
        Some(Message::Ready) => attend(&Orders { channel, signals }),
        _ => Ok(()),
    };
    if let Some(group) = group {
        group.lift_quotas();
    }
    let killed = pidfd_send_signal(&init, Signal::KILL);
    if let Err(error) = killed
        && error != rustix::io::Errno::SRCH
    {
        return Err(call("the end")(error.into()));
    }
    let waited = rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(init.as_fd()), WaitIdOptions::EXITED));
    waited.map_err(|error| call("the end")(error.into()))?;
    attended.map_err(call("orders"))?;
    let message = match first {
        Some(Message::Ready) => Some(Message::Exited { code: 0, number: 0 }),
        other => other,
    };
    Ok((Ended { message, timed_out: false, wall: started.elapsed() }, None))
}
