//! The name server inside: granted names have the addresses that are listened at, and no other name exists (RFC 1035). Pure.

use std::net::IpAddr;

/// The longest question that is looked at (RFC 1035, 4.2.1).
pub const QUESTION_BYTES_MAX: usize = 512;
const HEADER_BYTES: usize = 12;
/// How long an answer may be kept, in seconds. An address is never another name's.
const SECONDS: u32 = 60;

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// Flags of an answer: it is one, with authority, and recursion was there to be had.
const ANSWER: u16 = 0b1000_0100_1000_0000;
const RECURSION_DESIRED: u16 = 0b1_0000_0000;
const OPERATION: u16 = 0b0111_1000_0000_0000;
const NOT_IMPLEMENTED: u16 = 4;
const NAME_ERROR: u16 = 3;

/// What is said to a question.
#[derive(Debug, PartialEq, Eq)]
pub struct Answered {
    /// The answer, as it is sent.
    pub bytes: Vec<u8>,
    /// The name that does not exist, where that was the answer.
    pub unknown: Option<String>,
}

/// The answer to `question`; nothing where it is none. A name is asked for in lower case, without a dot at its end.
pub fn answer(question: &[u8], addresses: impl Fn(&str) -> Option<[IpAddr; 2]>) -> Option<Answered> {
    let word = |at: usize| Some(u16::from_be_bytes([*question.get(at)?, *question.get(at + 1)?]));
    let (flags, questions) = (word(2)?, word(4)?);
    if question.len() > QUESTION_BYTES_MAX || flags & 0x8000 != 0 {
        return None;
    }
    let (name, end) = read_name(question)?;
    let (kind, class) = (word(end)?, word(end + 2)?);
    let asked = &question[HEADER_BYTES..end + 4];
    let found = addresses(&name);
    let ordinary = flags & OPERATION == 0 && questions == 1 && class == CLASS_IN;
    let (code, found) = match found {
        _ if !ordinary => (NOT_IMPLEMENTED, None),
        None => (NAME_ERROR, None),
        Some(found) => (
            0,
            found.into_iter().find(|address| {
                (kind == TYPE_A && address.is_ipv4()) || (kind == TYPE_AAAA && address.is_ipv6())
            }),
        ),
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + asked.len() + 28);
    bytes.extend_from_slice(&question[..2]);
    bytes.extend((ANSWER | flags & RECURSION_DESIRED | code).to_be_bytes());
    for count in [1, u16::from(found.is_some()), 0, 0] {
        bytes.extend(count.to_be_bytes());
    }
    bytes.extend_from_slice(asked);
    if let Some(address) = found {
        // The name of the question, by a pointer to it.
        bytes.extend([0xc0, 0x0c]);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        bytes.extend(SECONDS.to_be_bytes());
        let octets = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        bytes.extend(u16::try_from(octets.len()).unwrap_or_default().to_be_bytes());
        bytes.extend(octets);
    }
    Some(Answered { bytes, unknown: (code == NAME_ERROR).then_some(name) })
}

/// The name of the first question, and where it ends. No question has a pointer in it.
fn read_name(question: &[u8]) -> Option<(String, usize)> {
    let (mut name, mut at) = (String::new(), HEADER_BYTES);
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            return Some((name, at));
        }
        let label = question.get(at..at + length).filter(|_| length < 64)?;
        at += length;
        if !name.is_empty() {
            name.push('.');
        }
        // What is no letter of a host's name stays visible as what it is, and is no granted name's.
        for byte in label {
            match byte {
                b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => name.push(char::from(*byte)),
                b'A'..=b'Z' => name.push(char::from(byte.to_ascii_lowercase())),
                other => name.push_str(&format!("\\{other:03}")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.').filter(|label| !label.is_empty()) {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        bytes
    }

    fn table(name: &str) -> Option<[IpAddr; 2]> {
        (name == "api.test").then(|| sandbox::addresses(1))
    }

    fn codes(answered: &Answered) -> (u16, u16) {
        (u16::from_be_bytes([answered.bytes[2], answered.bytes[3]]) & 15, answered.bytes[7].into())
    }

    #[test]
    fn granted_names_have_addresses_and_no_other_exists() {
        for name in ["api.test", "API.Test"] {
            let answered = answer(&question(name, TYPE_A), table).expect("a question");
            assert_eq!((codes(&answered), answered.unknown), ((0, 1), None));
            assert_eq!(answered.bytes[answered.bytes.len() - 4..], [198, 19, 0, 1]);
        }
        assert_eq!(answer(&question("api.test", TYPE_AAAA), table).map(|said| codes(&said)), Some((0, 1)));
        // A mail exchanger it has none, but it is there.
        assert_eq!(answer(&question("api.test", 15), table).map(|said| codes(&said)), Some((0, 0)));
        for name in ["evil.test", "api.test.evil", "x.api.test", "", "a\0b"] {
            let answered = answer(&question(name, TYPE_A), table).expect("a question");
            assert_eq!(codes(&answered), (NAME_ERROR, 0), "{name}");
            assert!(answered.unknown.is_some());
        }
    }

    /// Whatever a workload sends is answered or not, and never more than the question and one address.
    #[test]
    fn what_is_no_question_is_not_answered() {
        let whole = question("api.test", TYPE_A);
        for end in 0..whole.len() {
            assert_eq!(answer(&whole[..end], table), None, "{end}");
        }
        let mut pointer = whole.clone();
        pointer[HEADER_BYTES] = 0xc0;
        assert_eq!(answer(&pointer, table), None);
        let mut of_an_answer = whole.clone();
        of_an_answer[2] |= 0x80;
        assert_eq!(answer(&of_an_answer, table), None);
        let mut seed = 7_u64;
        for _ in 0..100_000 {
            let mut changed = whole.clone();
            for _ in 0..3 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) as usize % changed.len();
                changed[at] = (seed >> 56) as u8;
            }
            if let Some(answered) = answer(&changed, table) {
                assert!(answered.bytes.len() <= changed.len() + 28);
            }
        }
    }
}
