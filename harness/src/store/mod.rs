//! Session logs: append-only, the truth of every session. Each record is chained to the one before it (SHA-256), so that what is torn or
//! edited is found. A driver appends under a lease: its epoch and the position it expects are checked with every append. People and other
//! programs append what is theirs to say without one. Two stores, one contract: `tests/store.rs` runs on both.

mod postgres;
mod sqlite;

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use crate::decide::Logged;
use crate::event::{Event, Position};

pub use postgres::{Connector, Postgres};
pub use sqlite::Sqlite;

/// A link of the chain.
pub type Hash = [u8; 32];
/// The longest event, in bytes.
pub const EVENT_BYTES_MAX: usize = 32 << 20;
/// The most events that one reading of a slice returns, and the most bytes of all but the last.
const SLICE_MAX: u64 = 2_000;
const SLICE_BYTES_MAX: usize = 16 << 20;

/// One event as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Where it stands.
    pub position: Position,
    /// Under which lease it was appended; 0 where under none.
    pub epoch: u64,
    /// Where its batch begins.
    pub batch: Position,
    /// When; milliseconds since 1970.
    pub at_ms: u64,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its fields, as they were written.
    pub body: String,
    /// Of all this and the record before it.
    #[serde(with = "hexadecimal")]
    pub hash: Hash,
}

/// Some events of a log.
#[derive(Debug)]
pub struct Slice {
    /// In their order.
    pub records: Vec<Record>,
    /// Whether there were no more of those asked for.
    pub is_last: bool,
}

/// What a store found.
struct Found {
    records: Vec<Record>,
    /// Where the log ends.
    next: Position,
    /// There was more than is read at once.
    cut: bool,
}

/// An event that is to be appended.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its type.
    pub kind: &'static str,
    /// Its fields.
    pub body: String,
}

impl From<&Event> for Entry {
    fn from(event: &Event) -> Entry {
        Entry { kind: event.kind(), body: event.body() }
    }
}

/// Who appends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// A driver, under its lease and where it thinks the log ends.
    Driver {
        /// Of its lease.
        epoch: u64,
        /// Where the first of its events is to stand.
        expected: Position,
    },
    /// Anybody else.
    Client,
}

/// A session as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Session {
    /// Its name.
    pub id: String,
    /// How many events it has.
    pub events: u64,
    /// Of its last lease.
    pub epoch: u64,
    /// Who has, or had, that.
    pub owner: Option<String>,
    /// Until then nobody else may drive it; milliseconds since 1970.
    pub lease_until_ms: u64,
    /// From then on somebody should; nobody has to where there is nothing.
    pub wanted_ms: Option<u64>,
}

/// Why a store did not do it.
#[derive(Debug)]
pub enum StoreError {
    /// There is no such session.
    NoSession(String),
    /// There is one already.
    Exists(String),
    /// Somebody else drives it.
    Taken {
        /// Who.
        owner: String,
        /// Until then, unless it is renewed.
        until_ms: u64,
    },
    /// The lease was lost: somebody else has one that is newer.
    Lost,
    /// Others have appended: the log ends elsewhere.
    Moved(Position),
    /// The log is torn, or was edited.
    Damaged {
        /// Which.
        session: String,
        /// Where.
        position: Position,
        /// How it shows.
        why: &'static str,
    },
    /// An event is longer than one may be.
    TooLong(usize),
    /// The store itself failed.
    Failed(String),
}

impl fmt::Display for StoreError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::NoSession(id) => {
                write!(out, "there is no session {id}; `harness list` shows those that are")
            }
            StoreError::Exists(id) => write!(out, "there is a session {id} already"),
            StoreError::Taken { owner, .. } => {
                write!(out, "{owner} drives it; it can be woken when that one's lease ends")
            }
            StoreError::Lost => out.write_str("the lease was lost: another driver has it"),
            StoreError::Moved(next) => write!(out, "others have appended: the log ends at {next}"),
            StoreError::Damaged { session, position, why } => {
                write!(out, "the log of {session} is damaged at event {position}: {why}")
            }
            StoreError::TooLong(bytes) => {
                write!(out, "an event of {bytes} bytes; {EVENT_BYTES_MAX} is the most")
            }
            StoreError::Failed(why) => write!(out, "the store: {why}"),
        }
    }
}

/// A store.
#[derive(Clone)]
pub enum Store {
    /// Of this host.
    Sqlite(Sqlite),
    /// Of many hosts.
    Postgres(Box<Postgres>),
}

macro_rules! either {
    ($self:ident, $store:ident => $done:expr) => {
        match $self {
            Store::Sqlite($store) => $done,
            Store::Postgres($store) => $done,
        }
    };
}

impl Store {
    /// The store in a file, which is made where it is not there.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn sqlite(path: &Path) -> Result<Store, StoreError> {
        Sqlite::open(path).map(Store::Sqlite)
    }

    /// Makes a session.
    ///
    /// # Errors
    /// `Exists`, `Failed`.
    pub async fn create(&self, id: &str, events: &[Event]) -> Result<(), StoreError> {
        let entries = entries(events)?;
        either!(self, store => store.create(id.to_owned(), entries, now_ms()).await)
    }

    /// Appends events, all or none, durably; at which time, they all have.
    ///
    /// # Errors
    /// `Lost`, `Moved`, `NoSession`, `TooLong`, `Failed`. After the last, whether it was appended is not known: the log says.
    pub async fn append(
        &self,
        id: &str,
        writer: Writer,
        events: &[Event],
        at_ms: u64,
    ) -> Result<Position, StoreError> {
        let entries = entries(events)?;
        either!(self, store => store.append(id.to_owned(), writer, entries, at_ms).await)
    }

    /// Events from `from` on, up to `to` or as many as are read at once, each checked against the one before it.
    ///
    /// # Errors
    /// `Damaged`, `NoSession`, `Failed`.
    pub async fn slice(&self, id: &str, from: Position, to: Position) -> Result<Slice, StoreError> {
        let capped = to.min(from.saturating_add(SLICE_MAX));
        let found = either!(self, store => store.slice(id.to_owned(), from.saturating_sub(1), capped).await)?;
        let Found { mut records, next, cut } = found;
        let damaged = |position, why| StoreError::Damaged { session: id.to_owned(), position, why };
        let mut before = genesis(id);
        if from > 0 && next > 0 {
            if records.is_empty() {
                return Ok(Slice { records, is_last: true });
            }
            let first = records.remove(0);
            if first.position + 1 != from {
                return Err(damaged(from - 1, "it is not there"));
            }
            before = first.hash;
        }
        for (position, record) in (from..).zip(&records) {
            if record.position != position {
                return Err(damaged(position, "it is not there"));
            }
            if link(&before, record) != record.hash {
                return Err(damaged(position, "it is not what was written"));
            }
            before = record.hash;
        }
        let end = from + records.len() as u64;
        if end < capped.min(next) && !cut {
            return Err(damaged(end, "the log ends before its end"));
        }
        Ok(Slice { records, is_last: end >= to.min(next) })
    }

    /// All of them, slice by slice.
    ///
    /// # Errors
    /// The same.
    pub async fn read(&self, id: &str, from: Position, to: Position) -> Result<Vec<Record>, StoreError> {
        let mut all = Vec::new();
        loop {
            let Slice { records, is_last } = self.slice(id, from + all.len() as u64, to).await?;
            all.extend(records);
            if is_last {
                return Ok(all);
            }
        }
    }

    /// Sessions, all of them.
    ///
    /// # Errors
    /// `Failed`.
    pub async fn sessions(&self) -> Result<Vec<Session>, StoreError> {
        either!(self, store => store.sessions(None).await)
    }

    /// One session.
    ///
    /// # Errors
    /// `NoSession`, `Failed`.
    pub async fn session(&self, id: &str) -> Result<Session, StoreError> {
        let found = either!(self, store => store.sessions(Some(id.to_owned())).await)?;
        found.into_iter().next().ok_or_else(|| StoreError::NoSession(id.to_owned()))
    }

    /// Takes the lease for `span_ms`: nobody else can append as a driver from here on. Its epoch.
    ///
    /// # Errors
    /// `Taken`, `NoSession`, `Failed`.
    pub async fn lease(&self, id: &str, owner: &str, span_ms: u64) -> Result<u64, StoreError> {
        either!(self, store => store.lease(id.to_owned(), owner.to_owned(), span_ms).await)
    }

    /// Keeps the lease for another `span_ms`.
    ///
    /// # Errors
    /// `Lost`, `NoSession`, `Failed`.
    pub async fn renew(&self, id: &str, epoch: u64, span_ms: u64) -> Result<(), StoreError> {
        either!(self, store => store.renew(id.to_owned(), epoch, span_ms).await)
    }

    /// Gives the lease back, and says when somebody should drive the session next.
    ///
    /// # Errors
    /// `Lost`, `NoSession`, `Failed`.
    pub async fn release(&self, id: &str, epoch: u64, wanted_ms: Option<u64>) -> Result<(), StoreError> {
        either!(self, store => store.release(id.to_owned(), epoch, wanted_ms).await)
    }

    /// Changes whenever others may have appended.
    pub fn changes(&self) -> watch::Receiver<u64> {
        either!(self, store => store.changes())
    }

    /// Puts a whole log in, as it was exported; it has to be whole.
    ///
    /// # Errors
    /// `Exists`, `Damaged`, `Failed`.
    pub async fn import(&self, id: &str, records: Vec<Record>) -> Result<(), StoreError> {
        let mut before = genesis(id);
        for (position, record) in (0..).zip(&records) {
            let damaged = |why| StoreError::Damaged { session: id.to_owned(), position, why };
            if record.position != position || link(&before, record) != record.hash {
                return Err(damaged("it does not follow from what stands before it"));
            }
            Event::parse(&record.kind, &record.body).map_err(|_| damaged("it is no event"))?;
            before = record.hash;
        }
        either!(self, store => store.import(id.to_owned(), records).await)
    }
}

impl Record {
    /// As the reducer follows it.
    ///
    /// # Errors
    /// Where it is no event of ours.
    pub fn logged(&self, session: &str) -> Result<Logged, StoreError> {
        let damaged = |_| StoreError::Damaged {
            session: session.to_owned(),
            position: self.position,
            why: "it is no event of this version's",
        };
        let event = Event::parse(&self.kind, &self.body).map_err(damaged)?;
        Ok(Logged { batch: self.batch, at_ms: self.at_ms, event })
    }
}

fn entries(events: &[Event]) -> Result<Vec<Entry>, StoreError> {
    let entries: Vec<Entry> = events.iter().map(Entry::from).collect();
    if let Some(entry) = entries.iter().find(|entry| entry.body.len() > EVENT_BYTES_MAX) {
        return Err(StoreError::TooLong(entry.body.len()));
    }
    // What cannot be read again would be the end of its session.
    match entries.iter().find_map(|entry| Event::parse(entry.kind, &entry.body).err()) {
        Some(error) => Err(StoreError::Failed(format!("an event that could not be read again: {error}"))),
        None => Ok(entries),
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What the first record is chained to.
fn genesis(id: &str) -> Hash {
    Sha256::digest(id.as_bytes()).into()
}

/// The chain's next link.
fn link(before: &Hash, record: &Record) -> Hash {
    let mut digest = Sha256::new();
    digest.update(before);
    for number in [record.position, record.epoch, record.batch, record.at_ms, record.kind.len() as u64] {
        digest.update(number.to_le_bytes());
    }
    digest.update(record.kind.as_bytes());
    digest.update(record.body.as_bytes());
    digest.finalize().into()
}

/// `entries` as records from `position` on, after `before`.
fn chained(
    entries: Vec<Entry>,
    mut position: Position,
    epoch: u64,
    at_ms: u64,
    mut before: Hash,
) -> Vec<Record> {
    let batch = position;
    let record = |Entry { kind, body }| {
        // What clients say stands for itself.
        let batch = if epoch == 0 { position } else { batch };
        let mut record = Record { position, epoch, batch, at_ms, kind: kind.to_owned(), body, hash: before };
        record.hash = link(&before, &record);
        (position, before) = (position + 1, record.hash);
        record
    };
    entries.into_iter().map(record).collect()
}

/// Whether a session that is at `next`, under `epoch`, takes what `writer` appends; the epoch that it is appended under.
fn admitted(writer: Writer, epoch: u64, next: Position) -> Result<u64, StoreError> {
    match writer {
        Writer::Client => Ok(0),
        Writer::Driver { epoch: own, .. } if own != epoch => Err(StoreError::Lost),
        Writer::Driver { expected, .. } if expected != next => Err(StoreError::Moved(next)),
        Writer::Driver { epoch, .. } => Ok(epoch),
    }
}

mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Hash;

    pub fn serialize<S: Serializer>(hash: &Hash, out: S) -> Result<S::Ok, S::Error> {
        let text: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        out.serialize_str(&text)
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Hash, D::Error> {
        let text = String::deserialize(from)?;
        let byte =
            |at: usize| text.get(2 * at..2 * at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let bytes: Option<Vec<u8>> = (0..32).map(byte).collect();
        let bytes = bytes.filter(|_| text.len() == 64).and_then(|bytes| Hash::try_from(bytes).ok());
        bytes.ok_or_else(|| serde::de::Error::custom("a hash is 64 hexadecimal digits"))
    }
}
