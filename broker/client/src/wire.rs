//! The Varlink wire (<https://varlink.org/Method-Call>): JSON objects, each ended by a NUL byte; descriptors ride on the
//! first byte of a message, as sd-varlink does it. Here is what needs no socket.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The longest message, in bytes, without its NUL.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// The most bytes that may be sent ahead of an answer.
const AHEAD_BYTES_MAX: usize = 64 << 10;
/// The most descriptors that ride on one message.
pub const DESCRIPTORS_MAX: usize = 16;

/// A call as it arrives.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call<'a> {
    /// `interface.Method`.
    pub method: String,
    /// Its parameters, still to be parsed by the method.
    #[serde(borrow)]
    pub parameters: Option<&'a RawValue>,
    /// No reply is wanted.
    #[serde(default)]
    pub oneway: bool,
    /// Several replies are welcome.
    #[serde(default)]
    pub more: bool,
}

/// A reply as it leaves or arrives.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply<T> {
    /// What was asked for, or what is known of the error.
    pub parameters: T,
    /// Another one follows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
    /// `interface.Error`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Why a peer is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Breach {
    /// More bytes without a NUL than a message may have.
    TooLong,
    /// More descriptors than a message may carry.
    TooManyDescriptors,
    /// Bytes that are no call.
    Malformed(String),
    /// The peer went away in the middle of a message.
    Torn,
}

impl std::fmt::Display for Breach {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Breach::TooLong => write!(out, "a message of more than {MESSAGE_BYTES_MAX} bytes"),
            Breach::TooManyDescriptors => {
                write!(out, "more than {DESCRIPTORS_MAX} descriptors on one message")
            }
            Breach::Malformed(why) => write!(out, "a message that is no call: {why}"),
            Breach::Torn => out.write_str("a message without an end"),
        }
    }
}

/// The bytes of a message without their NUL, and its descriptors.
pub type Message<D> = (Vec<u8>, Vec<D>);

/// Puts messages together from what was read; `D` is a descriptor.
#[derive(Debug)]
pub struct Assembler<D> {
    bytes: Vec<u8>,
    searched: usize,
    descriptors: Vec<(usize, Vec<D>)>,
}

impl<D> Default for Assembler<D> {
    fn default() -> Self {
        Assembler { bytes: Vec::new(), searched: 0, descriptors: Vec::new() }
    }
}

impl<D> Assembler<D> {
    /// Takes what one recvmsg(2) gave. The kernel never reads on past the bytes that carried descriptors, so they belong to
    /// the last message that begins in, or goes on through, this piece.
    pub fn take(&mut self, piece: &[u8], descriptors: Vec<D>) -> Result<(), Breach> {
        if !descriptors.is_empty() {
            let begin = piece[..piece.len().saturating_sub(1)].iter().rposition(|byte| *byte == 0);
            let at = begin.map_or(0, |end| end + 1);
            let held: usize = self.descriptors.iter().map(|(_, held)| held.len()).sum();
            if held + descriptors.len() > DESCRIPTORS_MAX {
                return Err(Breach::TooManyDescriptors);
            }
            self.descriptors.push((self.bytes.len() + at, descriptors));
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }

    /// The next whole message.
    pub fn take_message(&mut self) -> Result<Option<Message<D>>, Breach> {
        let found = self.bytes[self.searched..].iter().position(|byte| *byte == 0);
        let Some(end) = found.map(|at| self.searched + at) else {
            self.searched = self.bytes.len();
            let too_long = self.bytes.len() > MESSAGE_BYTES_MAX;
            return if too_long { Err(Breach::TooLong) } else { Ok(None) };
        };
        if end > MESSAGE_BYTES_MAX {
            return Err(Breach::TooLong);
        }
        let rest = self.bytes.split_off(end + 1);
        let mut message = std::mem::replace(&mut self.bytes, rest);
        message.pop();
        self.searched = 0;
        let mut own = Vec::new();
        for (at, descriptors) in std::mem::take(&mut self.descriptors) {
            if at <= end {
                own.extend(descriptors);
            } else {
                self.descriptors.push((at - end - 1, descriptors));
            }
        }
        Ok(Some((message, own)))
    }

    /// Whether more waits here than anybody has to send before the call at hand is answered.
    pub fn is_overfull(&self) -> bool {
        self.bytes.len() > AHEAD_BYTES_MAX
    }

    /// Whether a message has begun and not ended.
    pub fn is_torn(&self) -> bool {
        !self.bytes.is_empty()
    }
}

/// Parses one message as a call.
pub fn call(message: &[u8]) -> Result<Call<'_>, Breach> {
    serde_json::from_slice(message).map_err(|error| Breach::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_however_they_are_cut() {
        let wire = b"{\"method\":\"a.B\"}\0{\"method\":\"c.D\",\"parameters\":{}}\0";
        for cut in 1..wire.len() {
            let mut assembler = Assembler::<u8>::default();
            let mut messages = Vec::new();
            for piece in wire.chunks(cut) {
                assembler.take(piece, Vec::new()).expect("no descriptor came");
                while let Some((message, _)) = assembler.take_message().expect("short messages") {
                    messages.push(call(&message).expect("a call").method);
                }
            }
            assert_eq!(messages, ["a.B", "c.D"], "cut every {cut} bytes");
            assert!(!assembler.is_torn());
        }
    }

    #[test]
    fn descriptors_belong_to_the_message_they_rode_on() {
        let mut assembler = Assembler::default();
        // Glued: the kernel reads up to and with the bytes that carry descriptors.
        assembler.take(b"{\"method\":\"a.B\"}\0{\"method\":\"c.D\"}\0", vec![7]).expect("one descriptor");
        assert_eq!(assembler.take_message().expect("a message").expect("whole").1, Vec::<i32>::new());
        assert_eq!(assembler.take_message().expect("a message").expect("whole").1, [7]);
        // Cut after its first bytes.
        assembler.take(b"{\"meth", vec![8, 9]).expect("two descriptors");
        assert_eq!(assembler.take_message(), Ok(None));
        assembler.take(b"od\":\"e.F\"}\0", Vec::new()).expect("no descriptor");
        assert_eq!(assembler.take_message().expect("a message").expect("whole").1, [8, 9]);
    }

    #[test]
    fn too_much_is_a_breach() {
        let mut assembler = Assembler::default();
        assert_eq!(assembler.take(b"{", vec![0; 17]), Err(Breach::TooManyDescriptors));
        let mut assembler = Assembler::default();
        assembler.take(b"{", vec![0; 10]).expect("ten");
        assert_eq!(assembler.take(b"x", vec![0; 10]), Err(Breach::TooManyDescriptors));
        let mut assembler = Assembler::<u8>::default();
        assembler.take(&vec![b'x'; MESSAGE_BYTES_MAX + 1], Vec::new()).expect("only bytes");
        assert_eq!(assembler.take_message(), Err(Breach::TooLong));
    }

    #[test]
    fn what_is_no_call_is_malformed() {
        let deep = format!("{{\"method\":\"a.B\",\"parameters\":{}}}", "[".repeat(100_000));
        let texts: [&[u8]; 10] = [
            b"",
            b"null",
            b"[]",
            b"{}",
            b"{\"method\":1}",
            b"{\"method\":\"a.B\",\"method\":\"c.D\"}",
            b"{\"method\":\"a.B\",\"upgrade\":true}",
            b"{\"method\":\"\xff\"}",
            b"{\"method\":\"a.B\"} x",
            deep.as_bytes(),
        ];
        for text in texts {
            assert!(matches!(call(text), Err(Breach::Malformed(_))), "{:?}", String::from_utf8_lossy(text));
        }
    }
}
