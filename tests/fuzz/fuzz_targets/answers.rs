//! Any bytes as the stream of a model's answer, in any pieces: never a panic, never more than was sent, and the same however it was cut.

#![no_main]

use harness_core::message::{Progress, Stream};
use harness_core::sse::Parser;
use libfuzzer_sys::fuzz_target;

fn read(pieces: &[&[u8]]) -> Option<(Vec<serde_json::Value>, bool)> {
    let (mut parser, mut stream, mut whole) = (Parser::default(), Stream::default(), false);
    for piece in pieces {
        for sent in parser.take(piece).ok()? {
            whole |= stream.take(&sent).ok()? == Progress::Whole;
        }
    }
    Some((stream.into_answer().blocks, whole))
}

fuzz_target!(|data: &[u8]| {
    let (cut, stream) = data.split_first().map_or((0, data), |(cut, rest)| (usize::from(*cut), rest));
    let cut = cut.min(stream.len());
    let (head, tail) = stream.split_at(cut);
    assert_eq!(read(&[stream]), read(&[head, tail]));
});
