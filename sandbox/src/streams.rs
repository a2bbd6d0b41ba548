//! The caller's standard streams: what they are, and what the workload gets in their place.

use std::io;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, fstat, fstatfs, makedev, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};

use crate::job::Stream;
use crate::open;
use crate::plan::{StreamPlan, StreamsPlan};
use crate::relay::{Direction, Flow};
use crate::sys::standard_stream;

/// `PIPEFS_MAGIC`: a pipe that has no name in any filesystem.
const PIPEFS_MAGIC: u64 = 0x5049_5045;

/// What the standard streams of this process are.
pub fn classify() -> [Stream; 3] {
    [0, 1, 2].map(|number| standard_stream(number).map_or(Stream::Closed, |stream| kind(stream)))
}

fn kind(stream: BorrowedFd<'_>) -> Stream {
    let Ok(found) = fstat(stream) else {
        return Stream::Other;
    };
    match FileType::from_raw_mode(found.st_mode) {
        // A FIFO with a name could be opened again through /proc, in the other direction.
        FileType::Fifo
            if fstatfs(stream).is_ok_and(|system| u64::try_from(system.f_type) == Ok(PIPEFS_MAGIC)) =>
        {
            Stream::Pipe
        }
        FileType::CharacterDevice if found.st_rdev == makedev(1, 3) => Stream::Null,
        _ => Stream::Other,
    }
}

/// Makes `streams` the standard streams of this process; `/dev/null` where there is none.
pub(crate) fn install(streams: [Option<OwnedFd>; 3]) -> io::Result<()> {
    let [input, output, errors] = streams;
    let or_null = |stream: Option<OwnedFd>| stream.map_or_else(null, Ok);
    rustix::stdio::dup2_stdin(or_null(input)?)?;
    rustix::stdio::dup2_stdout(or_null(output)?)?;
    Ok(rustix::stdio::dup2_stderr(or_null(errors)?)?)
}

/// What goes in, and what a relay has to copy.
pub(crate) struct Streams {
    /// Nothing where the sandbox's own `/dev/null` goes.
    pub(crate) inside: [Option<OwnedFd>; 3],
    pub(crate) flows: Vec<Flow>,
    pub(crate) terminal: Option<CallersTerminal>,
}

/// The streams of `plan`.
pub(crate) fn make(plan: StreamsPlan, terminals: &OwnedFd) -> io::Result<Streams> {
    match plan {
        StreamsPlan::Each(plans) => each(plans),
        StreamsPlan::Terminal => fresh_terminal(terminals),
    }
}

fn each(plans: [StreamPlan; 3]) -> io::Result<Streams> {
    let mut flows = Vec::new();
    let mut inside = [None, None, None];
    for ((number, plan), place) in (0..).zip(plans).zip(&mut inside) {
        *place = match (plan, standard_stream(number)) {
            (StreamPlan::Pass, Some(stream)) => Some(stream.try_clone_to_owned()?),
            (StreamPlan::Relay, Some(stream)) => {
                let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
                let callers = stream.try_clone_to_owned()?;
                if number == 0 {
                    flows.push(Flow { from: callers, to: write, direction: Direction::In });
                    Some(read)
                } else {
                    flows.push(Flow { from: read, to: callers, direction: Direction::Out });
                    Some(write)
                }
            }
            (StreamPlan::Null, _) | (_, None) => None,
        };
    }
    Ok(Streams { inside, flows, terminal: None })
}

fn null() -> io::Result<OwnedFd> {
    Ok(open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

fn fresh_terminal(terminals: &OwnedFd) -> io::Result<Streams> {
    let (outside, inside) = open::terminal(terminals)?;
    let mut flows = Vec::new();
    if let Some(input) = standard_stream(0) {
        let (from, to) = (input.try_clone_to_owned()?, outside.try_clone()?);
        flows.push(Flow { from, to, direction: Direction::InTerminal });
    }
    if let Some(output) = standard_stream(1) {
        let (from, to) = (outside.try_clone()?, output.try_clone_to_owned()?);
        flows.push(Flow { from, to, direction: Direction::Out });
    }
    let terminal = CallersTerminal::take(outside)?;
    let inside = [Some(inside.try_clone()?), Some(inside.try_clone()?), Some(inside)];
    Ok(Streams { inside, flows, terminal: Some(terminal) })
}

/// The caller's own terminal, in raw mode while a fresh one is used through it.
pub(crate) struct CallersTerminal {
    outside: OwnedFd,
    before: Option<Termios>,
}

impl CallersTerminal {
    fn take(outside: OwnedFd) -> io::Result<CallersTerminal> {
        let before = match standard_stream(0).filter(|input| isatty(input)) {
            Some(input) => {
                let before = tcgetattr(input)?;
                let mut raw = before.clone();
                raw.make_raw();
                // What was typed ahead is for the command.
                tcsetattr(input, OptionalActions::Drain, &raw)?;
                Some(before)
            }
            None => None,
        };
        let terminal = CallersTerminal { outside, before };
        terminal.resize();
        Ok(terminal)
    }

    /// The fresh terminal gets the size of the caller's.
    pub(crate) fn resize(&self) {
        let callers = [0, 1].into_iter().filter_map(standard_stream).find(|stream| isatty(stream));
        if let Some(size) = callers.and_then(|stream| tcgetwinsize(stream).ok()) {
            let _ = tcsetwinsize(self.outside.as_fd(), size);
        }
    }
}

impl Drop for CallersTerminal {
    fn drop(&mut self) {
        if let (Some(before), Some(input)) = (&self.before, standard_stream(0)) {
            let _ = tcsetattr(input, OptionalActions::Drain, before);
        }
    }
}
