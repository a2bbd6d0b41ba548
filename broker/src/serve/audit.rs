//! The audit record: JSON lines, each with the SHA-256 of the one before, durable before what it tells of is done.
//!
//! One thread writes; whoever waits for a record shares its fdatasync(2) with all who wait at that moment. What is durable goes
//! to the journal too.

mod chain;
mod journal;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::config::Server;
use super::metrics::Metrics;
use crate::say::complain;
use chain::Line;
pub use chain::{Verified, from, of_sandbox, show, verify};
use journal::Journal;

/// The longest text that is recorded of anything that a peer chose, in bytes.
pub const TEXT_BYTES_MAX: usize = 4096;

/// The writer's end.
#[derive(Debug, Clone)]
pub struct Audit {
    queue: mpsc::Sender<Waiting>,
    metrics: Arc<Metrics>,
}

impl Audit {
    /// Goes on with the record of `server`, and verifies its newest part first.
    pub fn open(server: &Server, metrics: Arc<Metrics>) -> Result<Audit, String> {
        let directory = server.record();
        let (verified, first) = chain::resume(&directory).map_err(|why| {
            let place = directory.display();
            format!("the audit record in {place} is broken: {why}; keep it for whoever looks into that, and move it away to begin a new one")
        })?;
        let mut writer = Writer {
            file: opened(chain::newest(&directory), OpenOptions::new().append(true))?,
            head: opened(chain::head(&directory), OpenOptions::new().write(true))?,
            bytes_max: server.audit_bytes.bytes(),
            directory,
            verified,
            first,
            journal: Journal::connect(),
        };
        let (queue, waiting) = mpsc::channel();
        std::thread::spawn(move || writer.run(&waiting));
        Ok(Audit { queue, metrics })
    }

    /// Records `event`; whether it is durable.
    pub async fn record(&self, event: Value) -> bool {
        let began = Instant::now();
        let durable = self.write(Some(event)).await;
        self.metrics.recorded_in(began.elapsed());
        durable
    }

    /// Returns when everything that was to be recorded before is.
    pub async fn settle(&self) {
        self.write(None).await;
    }

    async fn write(&self, event: Option<Value>) -> bool {
        let (done, durable) = tokio::sync::oneshot::channel();
        self.queue.send((event, done)).is_ok() && durable.await.unwrap_or(false)
    }
}

fn opened(path: PathBuf, how: &mut OpenOptions) -> Result<File, String> {
    let file = how.create(true).mode(0o600).open(&path);
    file.map_err(|error| format!("cannot write {}: {error}", path.display()))
}

struct Writer {
    file: File,
    head: File,
    directory: PathBuf,
    bytes_max: u64,
    verified: Verified,
    /// The number of the file's first record.
    first: u64,
    journal: Option<Journal>,
}

type Waiting = (Option<Value>, tokio::sync::oneshot::Sender<bool>);

impl Writer {
    fn run(&mut self, waiting: &mpsc::Receiver<Waiting>) {
        while let Ok(first) = waiting.recv() {
            let (events, done): (Vec<Option<Value>>, Vec<_>) =
                std::iter::once(first).chain(waiting.try_iter()).unzip();
            let before = self.verified.clone();
            let written = self.rotate().and_then(|whole| {
                self.append(events.into_iter().flatten()).map_err(|error| {
                    self.verified = before;
                    // No half a line stays; where even that cannot be had, the next start finds it and refuses.
                    self.file.set_len(whole).err().unwrap_or(error)
                })
            });
            if let Err(error) = &written {
                complain!("the audit record cannot be written: {error}; what it was for is denied");
            }
            for done in done {
                let _ = done.send(written.is_ok());
            }
            if let (Ok(lines), Some(journal)) = (&written, &self.journal) {
                lines.iter().for_each(|line| journal.tell(line));
            }
        }
    }

    /// Begins a new file where the one at hand is long enough; how long that is which is written now.
    fn rotate(&mut self) -> io::Result<u64> {
        let whole = self.file.metadata()?.len();
        if whole < self.bytes_max || self.verified.records == self.first {
            return Ok(whole);
        }
        let newest = chain::newest(&self.directory);
        std::fs::rename(&newest, chain::closed(&self.directory, self.first))?;
        self.file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&newest)?;
        File::open(&self.directory)?.sync_all()?;
        self.first = self.verified.records;
        Ok(0)
    }

    fn append(&mut self, events: impl Iterator<Item = Value>) -> io::Result<Vec<Line>> {
        let mut text = Vec::new();
        let mut lines = Vec::new();
        for event in events {
            let line = Line::after(&self.verified, now_ms(), event);
            self.verified = Verified { records: line.sequence + 1, last: line.hash.clone() };
            serde_json::to_writer(&mut text, &line)?;
            text.push(b'\n');
            lines.push(line);
        }
        self.file.write_all(&text)?;
        self.file.sync_data()?;
        // What is cut off at the end is seen by the head, which is written after. It is always as long.
        let head = format!("{:020} {}\n", self.verified.records, self.verified.last);
        self.head.write_all_at(head.as_bytes(), 0)?;
        Ok(lines)
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
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
