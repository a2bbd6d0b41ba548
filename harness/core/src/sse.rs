//! Server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>), as far as the Messages API uses them: `event` and
//! `data`. Bounded: what is too long is an error, however it arrives. Pure.

/// The longest line, in bytes.
pub const LINE_BYTES_MAX: usize = 4 << 20;
/// The longest data of one event, in bytes.
pub const DATA_BYTES_MAX: usize = 8 << 20;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sent {
    /// Its type; empty where none was said.
    pub event: String,
    /// Its lines, joined by newlines.
    pub data: String,
}

/// A stream that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// A line or an event is too long.
    TooLong,
    /// It is not UTF-8.
    NotText,
}

/// Puts events together from what was read.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    after_return: bool,
    begun: bool,
    event: String,
    data: Option<String>,
}

impl Parser {
    /// Takes what was read, and gives the events that are whole with it.
    ///
    /// # Errors
    /// Where it is too long or no text. Nothing more can be made of the stream then.
    pub fn take(&mut self, piece: &[u8]) -> Result<Vec<Sent>, Malformed> {
        let mut sent = Vec::new();
        for byte in piece {
            // Lines end with CR LF, LF or CR.
            let follows_return = std::mem::replace(&mut self.after_return, *byte == b'\r');
            match byte {
                b'\n' if follows_return => {}
                b'\n' | b'\r' => sent.extend(self.end_line()?),
                _ if self.line.len() >= LINE_BYTES_MAX => return Err(Malformed::TooLong),
                _ => self.line.push(*byte),
            }
        }
        Ok(sent)
    }

    fn end_line(&mut self) -> Result<Option<Sent>, Malformed> {
        let line = std::mem::take(&mut self.line);
        let mut line = std::str::from_utf8(&line).map_err(|_| Malformed::NotText)?;
        if !std::mem::replace(&mut self.begun, true) {
            line = line.strip_prefix('\u{feff}').unwrap_or(line);
        }
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            return Ok(self.data.take().map(|data| Sent { event, data }));
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event),
            "data" => match &mut self.data {
                Some(data) if data.len() + value.len() >= DATA_BYTES_MAX => return Err(Malformed::TooLong),
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            _ => {}
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(pieces: &[&[u8]]) -> Vec<Sent> {
        let mut parser = Parser::default();
        pieces.iter().flat_map(|piece| parser.take(piece).expect("it is well formed")).collect()
    }

    /// The examples of the standard (9.2.6), as far as they are about these fields.
    #[test]
    fn the_standard_s_examples_are_read_as_it_says() {
        let one = |event: &str, data: &str| Sent { event: event.into(), data: data.into() };
        assert_eq!(all(&[b"data: YHOO\ndata: +2\ndata: 10\n\n"]), [one("", "YHOO\n+2\n10")]);
        assert_eq!(
            all(&[b": test\n\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third\n\n"]),
            [one("", "first"), one("", "second"), one("", " third")]
        );
        assert_eq!(all(&[b"data\n\ndata\ndata\n\ndata:"]), [one("", ""), one("", "\n")]);
        assert_eq!(all(&[b"data:test\n\ndata: test\n\n"]), [one("", "test"), one("", "test")]);
        assert_eq!(
            all(&[b"\xef\xbb\xbfevent: a\r\ndata: 1\r\n\r\nevent: b\rdata: 2\r\r"]),
            [one("a", "1"), one("b", "2")]
        );
    }

    #[test]
    fn what_is_too_long_or_no_text_is_an_error() {
        assert_eq!(Parser::default().take(&vec![b'x'; LINE_BYTES_MAX + 1]), Err(Malformed::TooLong));
        let mut parser = Parser::default();
        let line = [b"data: ".as_slice(), &vec![b'x'; 1 << 20], b"\n"].concat();
        assert!((0..16).any(|_| parser.take(&line) == Err(Malformed::TooLong)));
        assert_eq!(Parser::default().take(b"data: \xff\n"), Err(Malformed::NotText));
    }

    proptest! {
        /// However a stream is cut, the same events come out.
        #[test]
        fn cuts_do_not_matter(text in "(event: [a-z]{0,4}|data: ?[a-zé:]{0,6}|:x|\u{20}){0,12}", ends in prop::collection::vec("\n|\r|\r\n|\n\n", 0..24), cuts in prop::collection::vec(0_usize..64, 0..8)) {
            let mut stream = String::new();
            for (number, line) in text.split(' ').enumerate() {
                stream.push_str(line);
                stream.push_str(ends.get(number).map_or("\n", String::as_str));
            }
            let bytes = stream.as_bytes();
            let whole = Parser::default().take(bytes);
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut <= bytes.len()).collect();
            cuts.sort_unstable();
            let (mut parser, mut pieces, mut from) = (Parser::default(), Vec::new(), 0);
            for cut in cuts.into_iter().chain([bytes.len()]) {
                pieces.extend(parser.take(&bytes[from..cut]).expect("short lines"));
                from = cut;
            }
            prop_assert_eq!(whole, Ok(pieces));
        }
    }
}
