//! What the launcher of a sandbox that lives tells its init: one packet is one order. Init reads nobody else.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::plan::CommandPlan;

/// The longest order, in bytes: a socket's buffer holds it whole.
pub(crate) const ORDER_BYTES_MAX: usize = 128 << 10;

/// One order. `number` is the giver's name for a command.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Start a command. Bit N of `streams` says that a descriptor for standard stream N comes with the packet.
    Start { number: u32, streams: u32, command: Command },
    /// Pass a signal on to it; `SIGKILL` to its process group.
    Signal { number: u32, signal: i32 },
}

/// What execve(2) gets, and where.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) directory: CString,
    pub(crate) candidates: Vec<CString>,
    pub(crate) arguments: Vec<CString>,
    pub(crate) environment: Vec<CString>,
}

impl Command {
    /// The command of a plan.
    pub(crate) fn of(plan: &CommandPlan) -> io::Result<Command> {
        let environment = plan.environment.iter().map(|(name, value)| {
            let mut text = name.clone().into_bytes();
            text.push(b'=');
            text.extend(value.clone().into_vec());
            CString::new(text)
        });
        let candidates = plan.candidates.iter().map(|path| CString::new(path.as_os_str().as_bytes()));
        let arguments = plan.arguments.iter().map(|argument| CString::new(argument.as_bytes()));
        Ok(Command {
            directory: CString::new(plan.directory.as_os_str().as_bytes())?,
            candidates: candidates.collect::<Result<_, _>>()?,
            arguments: arguments.collect::<Result<_, _>>()?,
            environment: environment.collect::<Result<_, _>>()?,
        })
    }

    fn lists(&self) -> [&[CString]; 3] {
        [&self.candidates, &self.arguments, &self.environment]
    }
}

const START: u32 = 1;
const SIGNAL: u32 = 2;

impl Order {
    /// Words of four bytes: the kind and the number; then the signal, or three counts and the strings, each ended by NUL.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut words = |list: &[u32]| bytes.extend(list.iter().flat_map(|word| word.to_ne_bytes()));
        match self {
            Order::Signal { number, signal } => words(&[SIGNAL, *number, signal.cast_unsigned()]),
            Order::Start { number, streams, command } => {
                words(&[START, *number, *streams]);
                let counts = command.lists().map(|list| u32::try_from(list.len()).unwrap_or(u32::MAX));
                words(&counts);
                bytes.extend(command.directory.as_bytes_with_nul());
                for text in command.lists().into_iter().flatten() {
                    bytes.extend(text.as_bytes_with_nul());
                }
            }
        }
        bytes
    }

    /// The order in `bytes`, if it is one.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Order> {
        let mut rest = bytes;
        let mut word = || {
            let (word, after) = rest.split_first_chunk::<4>()?;
            rest = after;
            Some(u32::from_ne_bytes(*word))
        };
        match (word()?, word()?) {
            (SIGNAL, number) => Some(Order::Signal { number, signal: word()?.cast_signed() }),
            (START, number) => {
                let streams = word()?;
                let counts = [word()?, word()?, word()?];
                let mut texts = rest
                    .split_inclusive(|byte| *byte == 0)
                    .map(|text| CString::from_vec_with_nul(text.to_vec()).ok());
                let directory = texts.next()??;
                let mut list = |count: u32| (0..count).map(|_| texts.next()?).collect::<Option<Vec<_>>>();
                let [candidates, arguments, environment] =
                    [list(counts[0])?, list(counts[1])?, list(counts[2])?];
                let command = Command { directory, candidates, arguments, environment };
                texts.next().is_none().then_some(Order::Start { number, streams, command })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(list: &[&str]) -> Vec<CString> {
        list.iter().map(|text| CString::new(*text).expect("no NUL")).collect()
    }

    fn start() -> Order {
        let command = Command {
            directory: c"/workspace".into(),
            candidates: texts(&["/bin/sh", "/usr/bin/sh"]),
            arguments: texts(&["sh", "-c", ""]),
            environment: texts(&["PATH=/bin"]),
        };
        Order::Start { number: 7, streams: 5, command }
    }

    #[test]
    fn every_order_comes_back_as_it_was() {
        for order in [start(), Order::Signal { number: u32::MAX, signal: 15 }] {
            assert_eq!(Order::decode(&order.encode()).as_ref(), Some(&order));
        }
    }

    #[test]
    fn what_is_no_order_is_refused() {
        let whole = start().encode();
        for length in 0..whole.len() {
            assert_eq!(Order::decode(&whole[..length]), None, "cut to {length} bytes");
        }
        assert_eq!(Order::decode(&[whole.as_slice(), b"more\0"].concat()), None);
        assert_eq!(Order::decode(&[9; 12]), None);
    }
}
