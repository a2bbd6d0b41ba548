//! The audit record: JSON lines, each with the SHA-256 of the one before, durable before what it tells of is done.
//!
//! One thread writes; whoever waits for a record shares its fdatasync(2) with all who wait at that moment.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::say::complain;

/// What the first record names as the one before.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// The longest text that is recorded of anything that a peer chose, in bytes.
pub const TEXT_BYTES_MAX: usize = 4096;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    sequence: u64,
    time_ms: u64,
    event: Value,
    previous: String,
    hash: String,
}

/// The SHA-256 over everything else of the line.
fn hash(sequence: u64, time_ms: u64, event: &Value, previous: &str) -> String {
    let text = format!("{sequence}\n{time_ms}\n{event}\n{previous}");
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The writer's end.
#[derive(Debug, Clone)]
pub struct Audit {
    queue: mpsc::Sender<Waiting>,
}

impl Audit {
    /// Goes on with the record in `directory`, and verifies what is there first.
    pub fn open(directory: &Path) -> Result<Audit, String> {
        let verified = verify(directory)?;
        let path = record(directory);
        let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        let file = opened.map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        let head = head(directory);
        let (queue, waiting) = mpsc::channel();
        let mut writer = Writer { file, head, sequence: verified.records, previous: verified.last };
        std::thread::spawn(move || writer.run(&waiting));
        Ok(Audit { queue })
    }

    /// Records `event`; whether it is durable.
    pub async fn record(&self, event: Value) -> bool {
        let (done, durable) = tokio::sync::oneshot::channel();
        self.queue.send((event, done)).is_ok() && durable.await.unwrap_or(false)
    }
}

struct Writer {
    file: File,
    head: PathBuf,
    sequence: u64,
    previous: String,
}

type Waiting = (Value, tokio::sync::oneshot::Sender<bool>);

impl Writer {
    fn run(&mut self, waiting: &mpsc::Receiver<Waiting>) {
        while let Ok(first) = waiting.recv() {
            let group: Vec<Waiting> = std::iter::once(first).chain(waiting.try_iter()).collect();
            let whole = self.file.metadata().map(|found| found.len());
            let (sequence, previous) = (self.sequence, self.previous.clone());
            let durable = whole.and_then(|whole| {
                self.append(group.iter().map(|(event, _)| event)).map_err(|error| {
                    (self.sequence, self.previous) = (sequence, previous);
                    // No half a line stays; where even that cannot be had, the next start finds it and refuses.
                    self.file.set_len(whole).err().unwrap_or(error)
                })
            });
            if let Err(error) = &durable {
                complain!("the audit record cannot be written: {error}; what it was for is denied");
            }
            for (_, done) in group {
                let _ = done.send(durable.is_ok());
            }
        }
    }

    fn append<'a>(&mut self, events: impl Iterator<Item = &'a Value>) -> io::Result<()> {
        let mut text = Vec::new();
        for event in events {
            let time_ms = now_ms();
            let hash = hash(self.sequence, time_ms, event, &self.previous);
            let previous = std::mem::replace(&mut self.previous, hash.clone());
            let line = Line { sequence: self.sequence, time_ms, event: event.clone(), previous, hash };
            serde_json::to_writer(&mut text, &line)?;
            text.push(b'\n');
            self.sequence += 1;
        }
        self.file.write_all(&text)?;
        self.file.sync_data()?;
        // What is cut off at the end is seen by the head, which is written after.
        std::fs::write(&self.head, format!("{} {}\n", self.sequence, self.previous))
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn record(directory: &Path) -> PathBuf {
    directory.join("audit.jsonl")
}

fn head(directory: &Path) -> PathBuf {
    directory.join("audit.head")
}

/// A record that holds together.
#[derive(Debug)]
pub struct Verified {
    /// How many there are.
    pub records: u64,
    /// The hash of the last.
    pub last: String,
}

/// Checks the chain from its first record to its head.
///
/// # Errors
/// Which line breaks it, and how.
pub fn verify(directory: &Path) -> Result<Verified, String> {
    let head = read_head(directory)?;
    let mut verified = Verified { records: 0, last: GENESIS.to_owned() };
    read(directory, |line| {
        let at = format!("record {}", verified.records);
        if line.sequence != verified.records {
            return Err(format!("{at}: its number is {}: records were removed or reordered", line.sequence));
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
    match head {
        // A crash between a record and its head leaves more records than the head knows of.
        Some((records, _)) if records > verified.records => Err(format!(
            "the head knows {records} records, there are {}: the end was cut off",
            verified.records
        )),
        None if verified.records > 1 => Err("the head is missing".to_owned()),
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
    let parsed = text
        .trim_end()
        .split_once(' ')
        .and_then(|(count, hash)| Some((count.parse().ok()?, hash.to_owned())));
    parsed.map(Some).ok_or_else(|| format!("{} is no head", path.display()))
}

/// What was executed in a sandbox: effect to number and, where it has ended, outcome.
pub fn effects(directory: &Path, sandbox: &str) -> BTreeMap<String, (u32, Option<Value>)> {
    let mut effects = BTreeMap::new();
    // The record was verified when this process began.
    let _ = read(directory, |Line { event, .. }| {
        let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
        let number = event["number"].as_u64().and_then(|number| u32::try_from(number).ok());
        match (text("kind").as_str(), number) {
            _ if text("sandbox") != sandbox => {}
            ("execute", Some(number)) => {
                effects.insert(text("effect"), (number, None));
            }
            ("executed", _) => {
                if let Some((_, outcome)) = effects.get_mut(&text("effect")) {
                    *outcome = Some(event["outcome"].clone());
                }
            }
            _ => {}
        }
        Ok(())
    });
    effects
}

/// Prints every record, oldest first, as it stands.
pub fn show(directory: &Path, mut each: impl FnMut(&str)) -> Result<(), String> {
    read(directory, |line| {
        each(&serde_json::to_string(&line).unwrap_or_default());
        Ok(())
    })
}

fn read(directory: &Path, mut each: impl FnMut(Line) -> Result<(), String>) -> Result<(), String> {
    let path = record(directory);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    for (number, text) in BufReader::new(file).split(b'\n').enumerate() {
        let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
        let line = serde_json::from_slice(&text)
            .map_err(|error| format!("{}:{}: not a record: {error}", path.display(), number + 1))?;
        each(line)?;
    }
    Ok(())
}

/// Text that a peer chose, cut to what is recorded. JSON escapes the rest.
pub fn bounded(text: &str) -> &str {
    cut(text, TEXT_BYTES_MAX)
}

/// The same for what anybody can have recorded.
pub fn short(text: &str) -> &str {
    cut(text, 200)
}

fn cut(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
