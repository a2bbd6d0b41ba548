//! Waits for a running sandbox: its end, its deadline, signals to pass on. Then sees to it that nothing of it is left.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use crate::cgroup::Group;
use crate::init::{MESSAGE_BYTES, Message};
use crate::streams::CallersTerminal;

/// The signals that are passed on to the command.
pub const PASSED_ON: [NixSignal; 6] = [
    NixSignal::SIGHUP,
    NixSignal::SIGINT,
    NixSignal::SIGQUIT,
    NixSignal::SIGTERM,
    NixSignal::SIGUSR1,
    NixSignal::SIGUSR2,
];

/// What a launcher sends to end a sandbox at once.
const END: i32 = libc::SIGALRM;

/// What was sent to a process that has a sandbox.
#[derive(Debug, Default)]
pub struct Heard {
    /// Its launcher has told it to end the sandbox.
    pub end: bool,
    /// Signals for the command.
    pub passed_on: Vec<i32>,
}

/// The signals of this process that become events, from before the child is made until the end.
pub(crate) struct Signals {
    arrived: SignalFd,
    before: SigSet,
}

impl Signals {
    /// Blocks them, so that none is lost.
    pub(crate) fn block() -> io::Result<Signals> {
        let mut wanted = SigSet::from_iter(PASSED_ON);
        wanted.add(NixSignal::SIGWINCH);
        wanted.add(NixSignal::SIGALRM);
        let before = wanted.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK)?;
        let arrived = SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals { arrived, before })
    }
}

impl Signals {
    /// All that have arrived.
    pub(crate) fn heard(&self) -> Heard {
        let mut heard = Heard::default();
        while let Ok(Some(signal)) = self.arrived.read_signal() {
            match signal.ssi_signo.cast_signed() {
                END => heard.end = true,
                number => heard.passed_on.push(number),
            }
        }
        heard
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.arrived.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        let _ = self.before.thread_set_mask();
    }
}

/// A sandbox that runs.
pub(crate) struct Running<'a> {
    pub(crate) init: OwnedFd,
    pub(crate) status: OwnedFd,
    pub(crate) started: Instant,
    pub(crate) group: Option<&'a Group>,
    pub(crate) terminal: Option<&'a CallersTerminal>,
    pub(crate) signals: &'a Signals,
}

/// How it ended, before it is judged.
#[derive(Debug)]
pub(crate) struct Ended {
    /// What init said; nothing when init itself was ended.
    pub(crate) message: Option<Message>,
    pub(crate) end: End,
    pub(crate) wall: Duration,
}

/// What brought the end about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Its command, or whatever became of that.
    Itself,
    /// The deadline had passed.
    Deadline,
    /// The launcher was told to.
    Told,
}

enum Event {
    Message(Option<Message>),
    Deadline,
    Signal(i32),
}

impl Running<'_> {
    /// Waits until the command has ended, and then until everything else in its sandbox has.
    pub(crate) fn wait(&self, timeout: Option<Duration>, grace: Duration) -> io::Result<Ended> {
        let mut deadline = timeout.map(|timeout| self.started + timeout);
        let mut end = End::Itself;
        let message = loop {
            match self.next(deadline)? {
                Event::Message(message) => break message,
                Event::Deadline if end == End::Deadline => break None,
                Event::Deadline => {
                    end = End::Deadline;
                    deadline = Some(Instant::now() + grace);
                    self.send(Signal::TERM)?;
                }
                Event::Signal(libc::SIGWINCH) => {
                    if let Some(terminal) = self.terminal {
                        terminal.resize();
                    }
                }
                Event::Signal(END) => {
                    end = End::Told;
                    break None;
                }
                Event::Signal(number) => {
                    if let Some(signal) = Signal::from_named_raw(number) {
                        self.send(signal)?;
                    }
                }
            }
        };
        self.end()?;
        Ok(Ended { message, end, wall: self.started.elapsed() })
    }

    fn next(&self, deadline: Option<Instant>) -> io::Result<Event> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            let mut waits =
                [PollFd::new(&self.status, PollFlags::IN), PollFd::new(&self.signals.arrived, PollFlags::IN)];
            match poll(&mut waits, left.as_ref()) {
                Ok(0) => return Ok(Event::Deadline),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [said, arrived] = waits.map(|wait| !wait.revents().is_empty());
            if said {
                return Ok(Event::Message(self.read_message()?));
            }
            if arrived && let Ok(Some(signal)) = self.signals.arrived.read_signal() {
                return Ok(Event::Signal(signal.ssi_signo.cast_signed()));
            }
        }
    }

    fn read_message(&self) -> io::Result<Option<Message>> {
        let mut bytes = [0_u8; MESSAGE_BYTES];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(&self.status, &mut bytes))?;
        Ok(Message::decode(&bytes[..length]))
    }

    /// To init, which passes it on to the command. It may just have ended.
    fn send(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.init, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends init, and with it every process of its namespace.
    fn end(&self) -> io::Result<()> {
        if let Some(group) = self.group {
            group.lift_quotas();
        }
        self.send(Signal::KILL)?;
        rustix::io::retry_on_intr(|| waitid(WaitId::PidFd(self.init.as_fd()), WaitIdOptions::EXITED))?;
        Ok(())
    }
}
