//! The store of one host: SQLite, in WAL mode, every commit synced. One thread writes for the whole process: what waits while it syncs is
//! one transaction next. Another reads.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, params};
use tokio::sync::{oneshot, watch};

use super::{
    Entry, Found, Hash, Record, SLICE_BYTES_MAX, Session, StoreError, Writer, admitted, chained, genesis,
    now_ms,
};
use crate::event::Position;

/// How often it is looked whether other processes have written.
const LOOK: Duration = Duration::from_millis(50);
/// How long another process may hold the lock.
const PATIENCE: Duration = Duration::from_secs(20);
/// The most that one transaction does.
const BATCH_MAX: usize = 512;

const SCHEMA: &str = "
BEGIN;
CREATE TABLE sessions (key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, next INTEGER NOT NULL, head BLOB NOT NULL,
    epoch INTEGER NOT NULL DEFAULT 0, owner TEXT, lease_until_ms INTEGER NOT NULL DEFAULT 0, wanted_ms INTEGER) STRICT;
CREATE TABLE events (session INTEGER NOT NULL REFERENCES sessions, position INTEGER NOT NULL, epoch INTEGER NOT NULL,
    batch INTEGER NOT NULL, at_ms INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (session, position)) STRICT, WITHOUT ROWID;
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are appended only'); END;
CREATE TRIGGER events_are_kept BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are appended only'); END;
PRAGMA user_version = 1;
COMMIT;";

type Done = Box<dyn FnOnce(Result<(), String>) + Send>;
/// Does its part of a transaction; what it returns answers once that is committed, or not.
type Work = Box<dyn FnOnce(&Connection) -> Done + Send>;

/// See above.
#[derive(Clone)]
pub struct Sqlite {
    threads: Arc<Threads>,
    changes: Arc<watch::Sender<u64>>,
}

/// They end with the last who uses them, before that one goes on: nothing of a store that is closed runs.
struct Threads {
    writer: Option<Sender<Work>>,
    reader: Option<Sender<Work>>,
    running: Vec<JoinHandle<()>>,
}

impl Drop for Threads {
    fn drop(&mut self) {
        drop((self.writer.take(), self.reader.take()));
        for thread in self.running.drain(..) {
            let _ = thread.join();
        }
    }
}

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError::Failed(error.to_string())
}

/// SQLite's numbers have a sign; ours have none, and are small.
fn signed(number: u64) -> i64 {
    number.cast_signed()
}

impl Sqlite {
    /// Opens the file, and makes it where it is not there.
    ///
    /// # Errors
    /// Where that fails, or it is no store of this version's.
    pub fn open(path: &Path) -> Result<Sqlite, StoreError> {
        let text = |error: rusqlite::Error| StoreError::Failed(format!("{}: {error}", path.display()));
        let connect = || -> rusqlite::Result<Connection> {
            let connection = Connection::open(path)?;
            connection.busy_timeout(PATIENCE)?;
            connection.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA temp_store = MEMORY;")?;
            Ok(connection)
        };
        let writer = connect().map_err(text)?;
        let version = || writer.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
        if version().map_err(text)? == 0
            && let Err(error) = writer.execute_batch(SCHEMA)
        {
            // Somebody else may just have made it.
            let _ = writer.execute_batch("ROLLBACK");
            if version().map_err(text)? == 0 {
                return Err(text(error));
            }
        }
        match version().map_err(text)? {
            1 => {}
            other => {
                return Err(StoreError::Failed(format!(
                    "{} is a store of version {other}; this program knows 1",
                    path.display()
                )));
            }
        }
        let reader = connect().map_err(text)?;
        let changes = Arc::new(watch::channel(0).0);
        let (to_writer, work) = channel();
        let told = Arc::clone(&changes);
        let writing = std::thread::spawn(move || write(&writer, &work, &told));
        let (to_reader, questions) = channel::<Work>();
        let reading = std::thread::spawn(move || {
            while let Ok(question) = questions.recv() {
                question(&reader)(Ok(()));
            }
        });
        let threads =
            Threads { writer: Some(to_writer), reader: Some(to_reader), running: vec![writing, reading] };
        Ok(Sqlite { threads: Arc::new(threads), changes })
    }

    async fn ask<T: Send + 'static>(
        to: Option<&Sender<Work>>,
        work: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::new(move |connection| {
            let _ = connection.execute_batch("SAVEPOINT one");
            let done = work(connection);
            let _ = connection.execute_batch(if done.is_ok() {
                "RELEASE one"
            } else {
                "ROLLBACK TO one; RELEASE one"
            });
            Box::new(move |committed| {
                let _ = answer.send(committed.map_err(StoreError::Failed).and(done));
            })
        });
        let to = to.ok_or_else(|| failed("it is closed"))?;
        to.send(work).map_err(|_| failed("it is locked by another process, or closed"))?;
        answered.await.map_err(|_| failed("it is locked by another process, or closed"))?
    }

    pub(super) async fn create(&self, id: String, entries: Vec<Entry>, at_ms: u64) -> Result<(), StoreError> {
        Sqlite::ask(self.threads.writer.as_ref(), move |connection| {
            let made = connection.prepare_cached("INSERT INTO sessions (id, next, head, wanted_ms) VALUES (?1, 0, ?2, 0) ON CONFLICT DO NOTHING");
            if made.and_then(|mut made| made.execute(params![id, genesis(&id)])).map_err(failed)? == 0 {
                return Err(StoreError::Exists(id));
            }
            let key = connection.last_insert_rowid();
            insert(connection, key, &chained(entries, 0, 0, at_ms, genesis(&id)))
        })
        .await
    }

    pub(super) async fn append(
        &self,
        id: String,
        writer: Writer,
        entries: Vec<Entry>,
        at_ms: u64,
    ) -> Result<Position, StoreError> {
        let appended = Sqlite::ask(self.threads.writer.as_ref(), move |connection| {
            let Head { key, next, head, epoch } = head(connection, &id)?;
            let epoch = admitted(writer, epoch, next)?;
            insert(connection, key, &chained(entries, next, epoch, at_ms, head))?;
            if writer == Writer::Client {
                connection
                    .execute("UPDATE sessions SET wanted_ms = 0 WHERE key = ?1", [key])
                    .map_err(failed)?;
            }
            Ok(next)
        })
        .await?;
        if writer == Writer::Client {
            self.changes.send_modify(|count| *count += 1);
        }
        Ok(appended)
    }

    pub(super) async fn import(&self, id: String, records: Vec<Record>) -> Result<(), StoreError> {
        self.create(id.clone(), Vec::new(), 0).await?;
        // Nobody drives it unasked.
        Sqlite::ask(self.threads.writer.as_ref(), move |connection| {
            let key = head(connection, &id)?.key;
            connection
                .execute("UPDATE sessions SET wanted_ms = NULL WHERE key = ?1", [key])
                .map_err(failed)?;
            insert(connection, key, &records)
        })
        .await
    }

    pub(super) async fn slice(&self, id: String, from: Position, to: Position) -> Result<Found, StoreError> {
        Sqlite::ask(self.threads.reader.as_ref(), move |connection| {
            let Head { key, next, .. } = head(connection, &id)?;
            let mut found = connection
                .prepare_cached("SELECT position, epoch, batch, at_ms, kind, body, hash FROM events WHERE session = ?1 AND position >= ?2 AND position < ?3 ORDER BY position")
                .map_err(failed)?;
            let mut rows = found.query_map(params![key, signed(from), signed(to)], record).map_err(failed)?;
            let (mut records, mut bytes): (Vec<Record>, usize) = (Vec::new(), 0);
            // Two at least: the first is there to be chained to.
            while bytes <= SLICE_BYTES_MAX || records.len() < 2 {
                let Some(record) = rows.next().transpose().map_err(failed)? else {
                    return Ok(Found { records, next, cut: false });
                };
                bytes += record.body.len();
                records.push(record);
            }
            Ok(Found { records, next, cut: true })
        })
        .await
    }

    pub(super) async fn sessions(&self, id: Option<String>) -> Result<Vec<Session>, StoreError> {
        Sqlite::ask(self.threads.reader.as_ref(), move |connection| {
            let mut found = connection
                .prepare_cached("SELECT id, next, epoch, owner, lease_until_ms, wanted_ms FROM sessions WHERE ?1 IS NULL OR id = ?1 ORDER BY key")
                .map_err(failed)?;
            let rows = found.query_map([id], session).map_err(failed)?;
            rows.collect::<Result<_, _>>().map_err(failed)
        })
        .await
    }

    pub(super) async fn lease(&self, id: String, owner: String, span_ms: u64) -> Result<u64, StoreError> {
        Sqlite::ask(self.threads.writer.as_ref(), move |connection| {
            let (now, Head { key, epoch, .. }) = (now_ms(), head(connection, &id)?);
            let held = connection.query_row(
                "SELECT coalesce(owner, ''), lease_until_ms FROM sessions WHERE key = ?1",
                [key],
                |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?.cast_unsigned())),
            );
            let (other, until_ms) = held.map_err(failed)?;
            if until_ms > now {
                return Err(StoreError::Taken { owner: other, until_ms });
            }
            connection
                .execute(
                    "UPDATE sessions SET epoch = epoch + 1, owner = ?2, lease_until_ms = ?3, wanted_ms = 0 WHERE key = ?1",
                    params![key, owner, signed(now + span_ms)],
                )
                .map_err(failed)?;
            Ok(epoch + 1)
        })
        .await
    }

    pub(super) async fn renew(&self, id: String, epoch: u64, span_ms: u64) -> Result<(), StoreError> {
        self.under_lease(id, epoch, move |connection, key| {
            connection.execute(
                "UPDATE sessions SET lease_until_ms = ?2 WHERE key = ?1",
                params![key, signed(now_ms() + span_ms)],
            )
        })
        .await
    }

    pub(super) async fn release(
        &self,
        id: String,
        epoch: u64,
        wanted_ms: Option<u64>,
    ) -> Result<(), StoreError> {
        self.under_lease(id, epoch, move |connection, key| {
            connection.execute(
                "UPDATE sessions SET lease_until_ms = 0, wanted_ms = ?2 WHERE key = ?1",
                params![key, wanted_ms.map(signed)],
            )
        })
        .await
    }

    async fn under_lease(
        &self,
        id: String,
        epoch: u64,
        work: impl FnOnce(&Connection, i64) -> rusqlite::Result<usize> + Send + 'static,
    ) -> Result<(), StoreError> {
        Sqlite::ask(self.threads.writer.as_ref(), move |connection| {
            let now = head(connection, &id)?;
            if now.epoch != epoch {
                return Err(StoreError::Lost);
            }
            work(connection, now.key).map(drop).map_err(failed)
        })
        .await
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

/// Where a session's log ends.
struct Head {
    key: i64,
    next: Position,
    head: Hash,
    epoch: u64,
}

fn head(connection: &Connection, id: &str) -> Result<Head, StoreError> {
    let mut found = connection
        .prepare_cached("SELECT key, next, head, epoch FROM sessions WHERE id = ?1")
        .map_err(failed)?;
    let row = |row: &Row<'_>| {
        let (next, epoch) = (row.get::<_, i64>(1)?.cast_unsigned(), row.get::<_, i64>(3)?.cast_unsigned());
        Ok(Head { key: row.get(0)?, next, head: row.get(2)?, epoch })
    };
    found.query_row([id], row).optional().map_err(failed)?.ok_or_else(|| StoreError::NoSession(id.to_owned()))
}

fn insert(connection: &Connection, key: i64, records: &[Record]) -> Result<(), StoreError> {
    let Some(last) = records.last() else { return Ok(()) };
    let mut put = connection
        .prepare_cached("INSERT INTO events VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")
        .map_err(failed)?;
    for record in records {
        let Record { position, epoch, batch, at_ms, kind, body, hash } = record;
        put.execute(params![
            key,
            signed(*position),
            signed(*epoch),
            signed(*batch),
            signed(*at_ms),
            kind,
            body,
            hash
        ])
        .map_err(failed)?;
    }
    let mut moved = connection
        .prepare_cached("UPDATE sessions SET next = ?2, head = ?3 WHERE key = ?1")
        .map_err(failed)?;
    moved.execute(params![key, signed(last.position + 1), last.hash]).map(drop).map_err(failed)
}

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let number = |at: usize| row.get::<_, i64>(at).map(i64::cast_unsigned);
    Ok(Record {
        position: number(0)?,
        epoch: number(1)?,
        batch: number(2)?,
        at_ms: number(3)?,
        kind: row.get(4)?,
        body: row.get(5)?,
        hash: row.get(6)?,
    })
}

fn session(row: &Row<'_>) -> rusqlite::Result<Session> {
    let number = |at: usize| row.get::<_, i64>(at).map(i64::cast_unsigned);
    Ok(Session {
        id: row.get(0)?,
        events: number(1)?,
        epoch: number(2)?,
        owner: row.get(3)?,
        lease_until_ms: number(4)?,
        wanted_ms: row.get::<_, Option<i64>>(5)?.map(i64::cast_unsigned),
    })
}

/// Takes whatever waits as one transaction; looks for what others wrote when nothing does.
fn write(connection: &Connection, work: &Receiver<Work>, changes: &watch::Sender<u64>) {
    let version =
        || connection.query_row("PRAGMA data_version", [], |row| row.get::<_, i64>(0)).unwrap_or_default();
    let mut seen = version();
    loop {
        let first = match work.recv_timeout(LOOK) {
            Ok(first) => first,
            Err(RecvTimeoutError::Timeout) => {
                let now = version();
                if now != seen {
                    seen = now;
                    changes.send_modify(|count| *count += 1);
                }
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if connection.execute_batch("BEGIN IMMEDIATE").is_err() {
            // Another process has held the lock for as long as we wait. Whoever asked hears that it was not done.
            drop((first, work.try_iter().collect::<Vec<_>>()));
            continue;
        }
        let all = std::iter::once(first).chain(work.try_iter().take(BATCH_MAX));
        let done: Vec<Done> = all.map(|one| one(connection)).collect();
        let committed = connection.execute_batch("COMMIT").map_err(|error| {
            let _ = connection.execute_batch("ROLLBACK");
            error.to_string()
        });
        for answer in done {
            answer(committed.clone());
        }
    }
}
