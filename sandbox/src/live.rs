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

use crate::confine::Trees;
use crate::init::{self, MESSAGE_BYTES, Message};
use crate::judge;
use crate::launch::{Given, LaunchError, Parts, call, lend, make_init, with_parts};
use crate::open;
use crate::order::{Command, ORDER_BYTES_MAX, Order};
use crate::plan::files::WORKSPACE;
use crate::plan::{CommandPlan, Plan, Step};
use crate::relay::Copied;
use crate::report::{Outcome, Report};
use crate::supervise::{End, Ended, Heard, Signals};
use crate::workspace::{Workspace, clone_there};

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

    /// What was sent to this process.
    pub fn heard(&self) -> Heard {
        self.signals.heard()
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

/// What is to become of a sandbox that lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It ends, because somebody who may wants it to.
    End,
    /// It has ended.
    Ended,
    /// Every process in it ends, and a new init, in new namespaces, waits for orders over the same files.
    Renew,
}

/// Makes the sandbox of `plan`, whose own command is not run, lets `attend` give orders, and does what that returns. The
/// report is of the whole sandbox. The caller has one thread.
///
/// # Errors
/// As [`crate::run`].
pub fn live(
    plan: &Plan,
    shared: &Path,
    given: Given,
    attend: impl FnMut(&Orders<'_>) -> io::Result<Next>,
) -> Result<Report, LaunchError> {
    let (lent, brought) = lend(plan, given)?;
    with_parts(plan, shared, lent.as_ref(), brought, |parts, workspace| stay(parts, workspace, attend))
}

fn stay(
    parts: &Parts<'_>,
    workspace: Option<&Workspace>,
    mut attend: impl FnMut(&Orders<'_>) -> io::Result<Next>,
) -> Result<(Ended, Option<Copied>), LaunchError> {
    let Parts { plan, slot, .. } = *parts;
    let started = Instant::now();
    let mut trees = open::trees(plan, workspace, slot.uid()).map_err(LaunchError::Tree)?;
    loop {
        let (init, channel) = make_serving(parts, workspace, trees)?;
        let first = receive(&channel).map_err(call("channel"))?;
        if first != Some(Message::Ready) {
            end(parts, &init)?;
            return Ok((Ended { message: first, end: End::Itself, wall: started.elapsed() }, None));
        }
        // Init ends with its line, so that is kept until the files are.
        let orders = Orders { channel, signals: parts.signals };
        let next = attend(&orders);
        let kept = match next {
            Ok(Next::Renew) => Some(Kept::of(plan, &init).map_err(call("keeping the files"))),
            _ => None,
        };
        end(parts, &init)?;
        let by = if next.map_err(call("orders"))? == Next::End { End::Told } else { End::Itself };
        let Some(kept) = kept else {
            // Its init was ended by nobody here where it ended before it was told to.
            let message = (by == End::Told).then_some(Message::Exited { code: 0, number: 0 });
            return Ok((Ended { message, end: by, wall: started.elapsed() }, None));
        };
        trees = kept?.into_trees(parts, workspace)?;
    }
}

/// An init that waits for orders, and the line to it.
fn make_serving(
    parts: &Parts<'_>,
    workspace: Option<&Workspace>,
    trees: Trees,
) -> Result<(OwnedFd, OwnedFd), LaunchError> {
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (channel, said) = pair.map_err(|error| call("channel")(error.into()))?;
    let init = make_init(parts, workspace, trees, [None, None, None], said, |confined, said| {
        init::serve(confined, said, parts.door.as_ref().map(AsFd::as_fd))
    })?;
    Ok((init, channel))
}

/// Ends init, and with it every process of its namespace.
fn end(parts: &Parts<'_>, init: &OwnedFd) -> Result<(), LaunchError> {
    if let Some(group) = parts.group {
        group.lift_quotas();
    }
    match pidfd_send_signal(init, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(call("the end")(error.into())),
    }
    let waited = rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(init.as_fd()), WaitIdOptions::EXITED));
    waited.map(drop).map_err(|error| call("the end")(error.into()))
}

/// The files of a sandbox whose processes end: its private places and its workspace, as detached mounts.
struct Kept {
    private: Vec<OwnedFd>,
    workspace: Option<OwnedFd>,
}

impl Kept {
    /// Cloned in the mount namespace of `init`. The places are mounts of ours on a root that nobody inside can write, so no
    /// name on the way to them is the workload's.
    fn of(plan: &Plan, init: &OwnedFd) -> io::Result<Kept> {
        let private = plan.files.iter().filter_map(|step| match step {
            Step::Private { path, .. } => Some(path.as_path()),
            _ => None,
        });
        let workspace = plan.workspace.as_ref().map(|_| Path::new(WORKSPACE));
        let mut all = clone_there(init, &private.chain(workspace).collect::<Vec<_>>())?;
        let workspace = workspace.and_then(|_| all.pop());
        Ok(Kept { private: all, workspace })
    }

    fn into_trees(self, parts: &Parts<'_>, workspace: Option<&Workspace>) -> Result<Trees, LaunchError> {
        let fresh = open::trees(parts.plan, workspace, parts.slot.uid()).map_err(LaunchError::Tree)?;
        Ok(Trees { private: self.private, workspace: self.workspace, ..fresh })
    }
}
