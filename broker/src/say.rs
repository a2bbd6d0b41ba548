//! What is said to people: one line for an error, whatever is in it, and output that is not lost in silence.

use std::io::{ErrorKind, Write};

/// One line on standard error.
macro_rules! complain {
    ($($argument:tt)*) => { eprintln!("broker: {}", $crate::say::one_line(&format!($($argument)*))) };
}
pub(crate) use complain;

/// `text` without what would begin another line or tell a terminal something.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

/// JSON for a terminal too: also what JSON need not escape is, where it would tell a terminal something or turn a line round.
pub fn tame(json: &str) -> String {
    let mut tame = String::with_capacity(json.len());
    for character in json.chars() {
        let turns =
            matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if turns || character.is_control() && character != '\n' {
            tame.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            tame.push(character);
        }
    }
    tame
}

/// On standard output.
///
/// # Errors
/// In words, unless it is only that the reader has seen enough.
pub fn print(text: &str) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(format!("standard output: {error}")),
        _ => Ok(()),
    }
}
