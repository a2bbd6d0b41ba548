//! The values a policy is written in. Each has one checked constructor; what passed it needs no second check.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a word of a policy was not understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WordError {
    word: String,
    wanted: &'static str,
}

impl WordError {
    fn new(word: &str, wanted: &'static str) -> Self {
        WordError { word: word.chars().take(80).collect(), wanted }
    }
}

impl fmt::Display for WordError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "`{}` is not {}", self.word.escape_debug(), self.wanted)
    }
}

impl std::error::Error for WordError {}

macro_rules! text_word {
    ($name:ident, $wanted:literal, $check:expr) => {
        impl TryFrom<String> for $name {
            type Error = WordError;
            fn try_from(text: String) -> Result<Self, WordError> {
                let check: fn(&str) -> bool = $check;
                if check(&text) { Ok($name(text)) } else { Err(WordError::new(&text, $wanted)) }
            }
        }
        impl FromStr for $name {
            type Err = WordError;
            fn from_str(text: &str) -> Result<Self, WordError> {
                $name::try_from(text.to_owned())
            }
        }
        impl From<$name> for String {
            fn from(word: $name) -> String {
                word.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(&self.0)
            }
        }
        impl $name {
            /// As written.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
    };
}

/// The longest path that the kernel takes in one call (`PATH_MAX` less its NUL).
const PATH_BYTES_MAX: usize = 4095;

fn is_clean_path(path: &str) -> bool {
    path.len() <= PATH_BYTES_MAX
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| part != "." && part != "..")
        && !path.contains("//")
}

/// The name of a policy: letters, digits, `-` and `_`, at most 64.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct PolicyName(String);
text_word!(PolicyName, "a policy name (letters, digits, `-`, `_`; at most 64)", |text| {
    (1..=64).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        && !text.starts_with('-')
});

/// A host path that a policy shows: absolute, or `~/...` for the caller's home; no `.`, `..`, `//`, trailing `/`
/// or control character.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct HostPath(String);
text_word!(
    HostPath,
    "an absolute path or one below `~/`, without `.`, `..`, `//`, a trailing `/` or control characters",
    |text| {
        let below = text.strip_prefix("~/").or_else(|| text.strip_prefix('/'));
        below.is_some_and(|below| !below.is_empty() && !below.ends_with('/')) && is_clean_path(text)
    }
);

/// A path below the workspace: relative, no `.`, `..`, `//`, trailing `/` or control character.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct InnerPath(String);
text_word!(
    InnerPath,
    "a path below the workspace, without `.`, `..`, `//`, a leading or trailing `/` or control characters",
    |text| !text.is_empty() && !text.starts_with('/') && !text.ends_with('/') && is_clean_path(text)
);

/// The name of an environment variable (POSIX: letters, digits and `_`, no digit first).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct EnvName(String);
text_word!(EnvName, "an environment variable's name", |text| {
    text.bytes().next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
});

macro_rules! number_word {
    ($name:ident, $inner:ty, $parse:ident, $print:ident) => {
        impl TryFrom<String> for $name {
            type Error = WordError;
            fn try_from(text: String) -> Result<Self, WordError> {
                text.parse()
            }
        }
        impl FromStr for $name {
            type Err = WordError;
            fn from_str(text: &str) -> Result<Self, WordError> {
                $parse(text).map($name)
            }
        }
        impl From<$name> for String {
            fn from(word: $name) -> String {
                $print(word.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(&$print(self.0))
            }
        }
    };
}

/// An amount of memory or storage: `64MiB`, `2GiB`, `512KiB`, `100B`. Never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct ByteSize(u64);
number_word!(ByteSize, u64, parse_bytes, print_bytes);

const BYTE_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl ByteSize {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// `count` MiB.
    pub const fn mebibytes(count: u64) -> Self {
        ByteSize(count << 20)
    }
}

fn parse_bytes(text: &str) -> Result<u64, WordError> {
    let error = || WordError::new(text, "a size (`64MiB`, `2GiB`, `512KiB`, `100B`)");
    let (unit, factor) = BYTE_UNITS
        .iter()
        .find(|(unit, _)| text.ends_with(unit))
        .map(|&(unit, factor)| (unit, factor))
        .ok_or_else(error)?;
    let digits = &text[..text.len() - unit.len()];
    parse_digits(digits)
        .and_then(|count| count.checked_mul(factor))
        .filter(|&bytes| bytes > 0)
        .ok_or_else(error)
}

fn parse_digits(digits: &str) -> Option<u64> {
    if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
}

fn print_bytes(bytes: u64) -> String {
    let (unit, factor) =
        BYTE_UNITS.into_iter().find(|(_, factor)| bytes.is_multiple_of(*factor)).unwrap_or(("B", 1));
    format!("{}{unit}", bytes / factor)
}

/// A length of time: `500ms`, `30s`, `5m`, `2h`. Never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Span(u64);
number_word!(Span, u64, parse_span, print_span);

const SPAN_UNITS: [(&str, u64); 4] = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];

impl Span {
    /// As the standard library's.
    pub fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

fn parse_span(text: &str) -> Result<u64, WordError> {
    let error = || WordError::new(text, "a duration (`500ms`, `30s`, `5m`, `2h`)");
    let (unit, factor) = SPAN_UNITS.into_iter().find(|(unit, _)| text.ends_with(unit)).ok_or_else(error)?;
    let digits = &text[..text.len() - unit.len()];
    // A year is the most that a timer here can be asked for.
    parse_digits(digits)
        .and_then(|count| count.checked_mul(factor))
        .filter(|ms| (1..=31_536_000_000).contains(ms))
        .ok_or_else(error)
}

fn print_span(ms: u64) -> String {
    let units = [("h", 3_600_000), ("m", 60_000), ("s", 1_000)];
    let (unit, factor) =
        units.into_iter().find(|(_, factor)| ms.is_multiple_of(*factor)).unwrap_or(("ms", 1));
    format!("{}{unit}", ms / factor)
}

/// A share of processors: `0.5` is half of one. Kept in thousandths; from 0.01 to 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "f64", into = "f64")]
#[schemars(with = "f64")]
pub struct Cpus(u32);

impl Cpus {
    /// In thousandths of one processor.
    pub fn thousandths(self) -> u32 {
        self.0
    }
}

impl TryFrom<f64> for Cpus {
    type Error = WordError;
    fn try_from(count: f64) -> Result<Self, WordError> {
        if (0.01..=1024.0).contains(&count) {
            // In range, so the conversion cannot wrap.
            Ok(Cpus((count * 1000.0).round() as u32))
        } else {
            Err(WordError::new(&count.to_string(), "a number of processors from 0.01 to 1024"))
        }
    }
}

impl FromStr for Cpus {
    type Err = WordError;
    fn from_str(text: &str) -> Result<Self, WordError> {
        let wanted = "a number of processors from 0.01 to 1024";
        text.parse::<f64>().map_err(|_| WordError::new(text, wanted)).and_then(Cpus::try_from)
    }
}

impl From<Cpus> for f64 {
    fn from(cpus: Cpus) -> f64 {
        f64::from(cpus.0) / 1000.0
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", f64::from(*self))
    }
}

/// A number of things, never zero.
pub type Count = std::num::NonZeroU32;
