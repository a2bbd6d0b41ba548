//! Takes a secret out of what comes back: every byte of it becomes `*`, so that lengths stay as they are. Pure; a secret may be cut anywhere
//! between two pieces.

use zeroize::Zeroizing;

/// A shorter secret is not looked for: too much else would look like it.
const SECRET_BYTES_MIN: usize = 8;
const BASE64: [&[u8; 64]; 2] = [
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_",
];

/// What is looked for, and the end of the last piece that may be its beginning.
#[derive(Clone, Default)]
pub struct Mask {
    forms: Vec<Zeroizing<Vec<u8>>>,
    /// Whether a form begins with this byte.
    first: Vec<bool>,
    held: Zeroizing<Vec<u8>>,
}

impl Mask {
    /// For a secret as it is, in hexadecimal, in base64 wherever in a longer text it stands, and percent-encoded.
    pub fn of(secret: &str) -> Mask {
        let bytes = secret.as_bytes();
        if bytes.len() < SECRET_BYTES_MIN {
            return Mask::default();
        }
        let mut forms = vec![bytes.to_vec()];
        let hex = |digits: &[u8; 16]| -> Vec<u8> {
            bytes
                .iter()
                .flat_map(|byte| [digits[usize::from(byte >> 4)], digits[usize::from(byte & 15)]])
                .collect()
        };
        forms.extend([hex(b"0123456789abcdef"), hex(b"0123456789ABCDEF")]);
        for alphabet in BASE64 {
            forms.extend((0..3).map(|before| base64(bytes, before, alphabet)));
        }
        let percent = |byte: &u8| {
            let plain = byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
            if plain { vec![*byte] } else { format!("%{byte:02X}").into_bytes() }
        };
        forms.push(bytes.iter().flat_map(percent).collect());
        // As JSON writes it; some write a slash as it is.
        for escaped in [&b"\"\\/"[..], b"\"\\"] {
            let json = |byte: &u8| if escaped.contains(byte) { vec![b'\\', *byte] } else { vec![*byte] };
            forms.push(bytes.iter().flat_map(json).collect());
        }
        forms.sort();
        forms.dedup();
        let mut first = vec![false; 256];
        for form in &forms {
            first[usize::from(form[0])] = true;
        }
        Mask { forms: forms.into_iter().map(Zeroizing::new).collect(), first, held: Zeroizing::default() }
    }

    /// Whether there is anything to look for.
    pub fn is_idle(&self) -> bool {
        self.forms.is_empty()
    }

    /// Whether the name of a header, which is in lower case, holds it, in whatever case that was sent.
    pub fn is_in_name(&self, name: &str) -> bool {
        let holds = |form: &Zeroizing<Vec<u8>>| {
            let bytes = name.as_bytes();
            bytes.windows(form.len()).any(|window| window.eq_ignore_ascii_case(form))
        };
        self.forms.iter().any(holds)
    }

    /// The next piece, with what was held of the one before. Its end is held while it may be the beginning of a secret.
    pub fn piece(&mut self, piece: &[u8]) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut *self.held);
        bytes.extend_from_slice(piece);
        let mut at = 0;
        while at < bytes.len() {
            if !self.first[usize::from(bytes[at])] {
                at += 1;
                continue;
            }
            let rest = &bytes[at..];
            // The longest: one form may be the beginning of another.
            let found = self.forms.iter().filter(|form| rest.starts_with(form)).map(|form| form.len()).max();
            let may_be = self.forms.iter().any(|form| form.len() > rest.len() && form.starts_with(rest));
            match found {
                Some(length) => {
                    bytes[at..at + length].fill(b'*');
                    at += length;
                }
                None if may_be => break,
                None => at += 1,
            }
        }
        self.held = Zeroizing::new(bytes.split_off(at));
        bytes
    }

    /// What is left at the end.
    pub fn end(&mut self) -> Vec<u8> {
        std::mem::take(&mut *self.held)
    }
}

/// What of the base64 of a text with `before` bytes (modulo 3) in front of `bytes` depends on nothing else.
fn base64(bytes: &[u8], before: usize, alphabet: &[u8; 64]) -> Vec<u8> {
    let all: Vec<u8> = std::iter::repeat_n(0, before).chain(bytes.iter().copied()).collect();
    let whole = all.chunks_exact(3).flat_map(|three| {
        let word = three.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte));
        [18, 12, 6, 0].map(|shift| alphabet[(word >> shift & 63) as usize])
    });
    // The first characters hold bits of what stands before.
    whole.skip([0, 2, 3][before]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "s3cret/to\"ken+1";

    fn through(text: &[u8], cut: usize) -> Vec<u8> {
        let mut mask = Mask::of(SECRET);
        let mut out = mask.piece(&text[..cut]);
        out.extend(mask.piece(&text[cut..]));
        out.extend(mask.end());
        out
    }

    fn encoded(command: &str) -> String {
        let script = format!("printf '%s' '{SECRET}' | {command}");
        let output = std::process::Command::new("sh").args(["-c", &script]).output().expect("it runs");
        String::from_utf8(output.stdout).expect("text").trim_end().to_owned()
    }

    #[test]
    fn a_secret_is_masked_wherever_it_is_cut() {
        let text = format!("before {SECRET} between s3cret/to {SECRET}{SECRET} after s3cre");
        let stars = "*".repeat(SECRET.len());
        let wanted = format!("before {stars} between s3cret/to {stars}{stars} after s3cre");
        for cut in 0..=text.len() {
            assert_eq!(String::from_utf8_lossy(&through(text.as_bytes(), cut)), wanted, "{cut}");
        }
        let mut mask = Mask::of(SECRET);
        let bytewise: Vec<u8> = text.bytes().flat_map(|byte| mask.piece(&[byte])).collect::<Vec<_>>();
        assert_eq!([bytewise, mask.end()].concat(), wanted.as_bytes());
    }

    /// The oracle is other programs' idea of the encodings.
    #[test]
    fn encodings_are_masked() {
        for (form, keeps) in [
            (encoded("od -An -tx1 | tr -d ' \\n'"), 0),
            (encoded("od -An -tx1 | tr -d ' \\n' | tr a-f A-F"), 0),
            (encoded("base64 -w0"), 0),
            (encoded("sed 's/^/x:/' | base64 -w0"), 3),
            (encoded("sed 's/^/y/' | base64 -w0"), 2),
            (encoded("python3 -c 'import json,sys; print(json.dumps(sys.stdin.read())[1:-1])'"), 0),
            (
                encoded(
                    "python3 -c 'import urllib.parse,sys; print(urllib.parse.quote(sys.stdin.read(), safe=\"\"))'",
                ),
                0,
            ),
        ] {
            assert!(form.len() >= SECRET.len(), "{form}");
            let masked = through(form.as_bytes(), form.len() / 2);
            assert_eq!(masked.len(), form.len());
            let stars = masked.iter().filter(|byte| **byte == b'*').count();
            // What is left holds a few bits at either end.
            assert!(stars + keeps + 4 >= form.len(), "{form}: {}", String::from_utf8_lossy(&masked));
        }
    }

    #[test]
    fn what_is_no_secret_stays_as_it_is() {
        let text: Vec<u8> =
            (0..20_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for cut in [0, 1, 9_999, 20_000] {
            assert_eq!(through(&text, cut), text);
        }
        assert!(Mask::of("short").is_idle());
    }
}
