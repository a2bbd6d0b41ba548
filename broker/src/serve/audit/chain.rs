//! The record as it stands in its files: what holds it together, and how it is read. `audit.jsonl` is the newest part; older
//! ones are called `audit-N.jsonl`, N the number of their first record.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// What the first record names as the one before.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// The most that [`from`] returns, in bytes of the files.
const READ_BYTES_MAX: usize = 512 << 10;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Line {
    pub(super) sequence: u64,
    pub(super) time_ms: u64,
    pub(super) event: Value,
    pub(super) previous: String,
    pub(super) hash: String,
}

impl Line {
    /// The next one of `verified`.
    pub(super) fn after(verified: &Verified, time_ms: u64, event: Value) -> Line {
        let (sequence, previous) = (verified.records, verified.last.clone());
        let hash = hash(sequence, time_ms, &event, &previous);
        Line { sequence, time_ms, event, previous, hash }
    }
}

/// The SHA-256 over everything else of the line.
fn hash(sequence: u64, time_ms: u64, event: &Value, previous: &str) -> String {
    let text = format!("{sequence}\n{time_ms}\n{event}\n{previous}");
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The file that is written.
pub(super) fn newest(directory: &Path) -> PathBuf {
    directory.join("audit.jsonl")
}

/// What it is called when it is written no more.
pub(super) fn closed(directory: &Path, first: u64) -> PathBuf {
    directory.join(format!("audit-{first:012}.jsonl"))
}

/// What knows the last record: without it, records cut off at the end would not be missed.
pub(super) fn head(directory: &Path) -> PathBuf {
    directory.join("audit.head")
}

/// All parts, oldest first.
fn parts(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let listed = match std::fs::read_dir(directory) {
        Ok(listed) => listed,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("{}: {error}", directory.display())),
    };
    let is_part = |name: &str| name.starts_with("audit-") && name.ends_with(".jsonl");
    let mut parts: Vec<PathBuf> = listed
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(is_part))
        .map(|entry| entry.path())
        .collect();
    parts.sort();
    let newest = newest(directory);
    parts.extend(newest.exists().then_some(newest));
    Ok(parts)
}

/// A record that holds together.
#[derive(Debug, Clone)]
pub struct Verified {
    /// How many there are.
    pub records: u64,
    /// The hash of the last.
    pub last: String,
}

/// Checks the chain from its first record to its head.
///
/// # Errors
/// Which record breaks it, and how.
pub fn verify(directory: &Path) -> Result<Verified, String> {
    follow(directory, &parts(directory)?, Verified { records: 0, last: GENESIS.to_owned() })
}

/// The same for the newest part alone, which is what is gone on with; the number of its first record.
pub(super) fn resume(directory: &Path) -> Result<(Verified, u64), String> {
    let parts = parts(directory)?;
    // A newest part that is empty, or not there yet, goes on after the one before.
    let mut begin = parts.len();
    let mut start = None;
    while start.is_none() && begin > 0 {
        begin -= 1;
        start = first(&parts[begin])?;
    }
    let start = start.map_or((0, GENESIS.to_owned()), |line| (line.sequence, line.previous));
    let before = Verified { records: start.0, last: start.1 };
    let verified = follow(directory, &parts[begin..], before)?;
    let is_newest = parts.get(begin).is_some_and(|part| *part == newest(directory));
    let first = if is_newest { start.0 } else { verified.records };
    Ok((verified, first))
}

fn follow(directory: &Path, parts: &[PathBuf], mut verified: Verified) -> Result<Verified, String> {
    let head = read_head(directory)?;
    let first = verified.records;
    for part in parts {
        read(part, |line| {
            let at = format!("record {}", verified.records);
            if line.sequence != verified.records {
                return Err(format!(
                    "{at}: its number is {}: records were removed or reordered",
                    line.sequence
                ));
            }
            if line.previous != verified.last {
                return Err(format!("{at}: it does not follow the record before it"));
            }
            if line.hash != hash(line.sequence, line.time_ms, &line.event, &line.previous) {
                return Err(format!("{at}: it was edited"));
            }
            verified.records += 1;
            verified.last = line.hash;
            match &head {
                Some((records, last)) if *records == verified.records && *last != verified.last => {
                    Err(format!("{at}: it is not the one that the head knows"))
                }
                _ => Ok(()),
            }
        })?;
    }
    match head {
        // A crash between a record and its head leaves more records than the head knows of.
        Some((records, _)) if records > verified.records => Err(format!(
            "the head knows {records} records, there are {}: the end was cut off",
            verified.records
        )),
        None if verified.records > first + 1 => Err("the head is missing".to_owned()),
        _ => Ok(verified),
    }
}

/// How many records the head knows, and the hash of the last of them.
fn read_head(directory: &Path) -> Result<Option<(u64, String)>, String> {
    let path = head(directory);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    if text.is_empty() {
        return Ok(None);
    }
    let parsed = text
        .trim_end()
        .split_once(' ')
        .and_then(|(count, hash)| Some((count.parse().ok()?, hash.to_owned())));
    parsed.map(Some).ok_or_else(|| format!("{} is no head", path.display()))
}

/// What the record says of one sandbox, oldest first. Parts that ended before it began are not read.
pub fn of_sandbox(
    directory: &Path,
    sandbox: &str,
    started_ms: u64,
    mut each: impl FnMut(&Value),
) -> Result<(), String> {
    let parts = parts(directory)?;
    let is_older = |next: &PathBuf| matches!(first(next), Ok(Some(line)) if line.time_ms < started_ms);
    let begin = parts.iter().skip(1).take_while(|next| is_older(next)).count();
    for part in &parts[begin..] {
        read(part, |line| {
            if line.event["sandbox"] == sandbox {
                each(&line.event);
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Records from number `from` on, oldest first, as many as fit into one answer.
pub fn from(directory: &Path, from: u64) -> Result<Vec<Value>, String> {
    let parts = parts(directory)?;
    let is_older = |next: &PathBuf| matches!(first(next), Ok(Some(line)) if line.sequence <= from);
    let begin = parts.iter().skip(1).take_while(|next| is_older(next)).count();
    let (mut found, mut bytes) = (Vec::new(), 0);
    for part in &parts[begin..] {
        read(part, |line| {
            if line.sequence >= from && bytes < READ_BYTES_MAX {
                let line = serde_json::to_value(line).map_err(|error| error.to_string())?;
                bytes += line.to_string().len();
                found.push(line);
            }
            Ok(())
        })?;
    }
    Ok(found)
}

/// Every record, oldest first, as it stands.
pub fn show(directory: &Path, mut each: impl FnMut(&str)) -> Result<(), String> {
    for part in parts(directory)? {
        read(&part, |line| {
            each(&serde_json::to_string(&line).unwrap_or_default());
            Ok(())
        })?;
    }
    Ok(())
}

fn first(part: &Path) -> Result<Option<Line>, String> {
    lines(part)?.next().transpose()
}

fn read(part: &Path, mut each: impl FnMut(Line) -> Result<(), String>) -> Result<(), String> {
    lines(part)?.try_for_each(|line| each(line?))
}

fn lines(part: &Path) -> Result<impl Iterator<Item = Result<Line, String>>, String> {
    let path = part.to_owned();
    let file = File::open(part).map_err(|error| format!("{}: {error}", part.display()))?;
    Ok(BufReader::new(file).split(b'\n').enumerate().map(move |(number, text)| {
        let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
        serde_json::from_slice(&text)
            .map_err(|error| format!("{}:{}: not a record: {error}", path.display(), number + 1))
    }))
}
