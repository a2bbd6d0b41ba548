//! The store of many hosts: PostgreSQL, on connections that a grant gives. Times of leases are the server's.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Mutex, watch};
use tokio_postgres::{Client, Config, NoTls, Row, Transaction};

use super::{
    Entry, Found, Hash, Record, SLICE_BYTES_MAX, Session, StoreError, Writer, admitted, chained, genesis,
};
use crate::event::Position;

/// How often it is looked whether others have written.
const LOOK: Duration = Duration::from_millis(200);
/// How long the server may take for one thing.
const PATIENCE: Duration = Duration::from_secs(10);

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS sessions (key BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id TEXT NOT NULL UNIQUE, next BIGINT NOT NULL,
    head BYTEA NOT NULL, epoch BIGINT NOT NULL DEFAULT 0, owner TEXT, lease_until_ms BIGINT NOT NULL DEFAULT 0, wanted_ms BIGINT);
CREATE TABLE IF NOT EXISTS events (session BIGINT NOT NULL REFERENCES sessions, position BIGINT NOT NULL, epoch BIGINT NOT NULL,
    batch BIGINT NOT NULL, at_ms BIGINT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, hash BYTEA NOT NULL,
    PRIMARY KEY (session, position));
CREATE OR REPLACE FUNCTION events_stay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'events are appended only'; END $$;
CREATE OR REPLACE TRIGGER events_stay BEFORE UPDATE OR DELETE OR TRUNCATE ON events EXECUTE FUNCTION events_stay();";

/// The server's time, in milliseconds since 1970.
const NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint";

/// Makes a connection to the server.
pub type Connector =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = std::io::Result<UnixStream>> + Send>> + Send + Sync>;

/// See above.
#[derive(Clone)]
pub struct Postgres {
    connector: Connector,
    config: Config,
    /// The one connection; there is none where it has failed.
    client: Arc<Mutex<Option<Client>>>,
    changes: Arc<watch::Sender<u64>>,
}

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError::Failed(error.to_string())
}

fn said(error: &tokio_postgres::Error) -> StoreError {
    let why = error.as_db_error().map(|error| error.message().to_owned());
    StoreError::Failed(why.unwrap_or_else(|| error.to_string()))
}

fn signed(number: u64) -> i64 {
    number.cast_signed()
}

impl Postgres {
    /// On connections of `connector`, as `user` in `database`.
    ///
    /// # Errors
    /// Where the server cannot be reached, or the tables not be made.
    pub async fn open(connector: Connector, user: &str, database: &str) -> Result<Postgres, StoreError> {
        let mut config = Config::new();
        config.user(user).dbname(database).application_name("harness");
        // Who is cut off in the middle of a transaction does not hold up who takes over.
        config.options("-c idle_in_transaction_session_timeout=2000 -c lock_timeout=5000");
        let store =
            Postgres { connector, config, client: Arc::default(), changes: Arc::new(watch::channel(0).0) };
        store
            .with(async |transaction| {
                // Two that make the same table at once are in each other's way.
                transaction
                    .execute("SELECT pg_advisory_xact_lock(7310)", &[])
                    .await
                    .map_err(|error| said(&error))?;
                transaction.batch_execute(SCHEMA).await.map_err(|error| said(&error))
            })
            .await?;
        let changes = Arc::downgrade(&store.changes);
        tokio::spawn(async move {
            while let Some(changes) = changes.upgrade() {
                changes.send_modify(|count| *count += 1);
                drop(changes);
                tokio::time::sleep(LOOK).await;
            }
        });
        Ok(store)
    }

    /// One transaction. What it came to is not known where the connection fails at its end; the log says.
    async fn with<T>(
        &self,
        work: impl AsyncFnOnce(&Transaction<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut kept = self.client.lock().await;
        let client = match kept.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => tokio::time::timeout(PATIENCE, self.connect()).await.map_err(failed)??,
        };
        let client = kept.insert(client);
        let all = async {
            let transaction = client.transaction().await.map_err(|error| said(&error))?;
            let done = work(&transaction).await?;
            transaction.commit().await.map_err(|error| said(&error))?;
            Ok(done)
        };
        let done = tokio::time::timeout(PATIENCE, all).await;
        match done {
            Ok(Err(StoreError::Failed(why))) => {
                *kept = None;
                Err(StoreError::Failed(why))
            }
            Ok(done) => done,
            Err(_) => {
                *kept = None;
                Err(failed("the server does not answer"))
            }
        }
    }

    async fn connect(&self) -> Result<Client, StoreError> {
        let stream = (self.connector)().await.map_err(failed)?;
        let (client, connection) =
            self.config.connect_raw(stream, NoTls).await.map_err(|error| said(&error))?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(client)
    }

    pub(super) async fn create(&self, id: String, entries: Vec<Entry>, at_ms: u64) -> Result<(), StoreError> {
        self.with(async |transaction| {
            make(transaction, &id, chained(entries, 0, 0, at_ms, genesis(&id))).await
        })
        .await
    }

    pub(super) async fn import(&self, id: String, records: Vec<Record>) -> Result<(), StoreError> {
        self.with(async |transaction| {
            make(transaction, &id, records).await?;
            // Nobody drives it unasked.
            let unasked =
                transaction.execute("UPDATE sessions SET wanted_ms = NULL WHERE id = $1", &[&id]).await;
            unasked.map(drop).map_err(|error| said(&error))
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
        self.with(async |transaction| {
            let Head { key, next, head, epoch } = head(transaction, &id, " FOR UPDATE").await?;
            let epoch = admitted(writer, epoch, next)?;
            insert(transaction, key, chained(entries, next, epoch, at_ms, head)).await?;
            if writer == Writer::Client {
                let wanted =
                    transaction.execute("UPDATE sessions SET wanted_ms = 0 WHERE key = $1", &[&key]).await;
                wanted.map_err(|error| said(&error))?;
            }
            Ok(next)
        })
        .await
    }

    pub(super) async fn slice(&self, id: String, from: Position, to: Position) -> Result<Found, StoreError> {
        self.with(async |transaction| {
            let Head { key, next, .. } = head(transaction, &id, "").await?;
            // What was appended in between is for the next reading.
            let (to, most) = (signed(to.min(next)), SLICE_BYTES_MAX as i64);
            let rows = transaction
                .query(
                    "SELECT position, epoch, batch, at_ms, kind, body, hash FROM (SELECT *, sum(octet_length(body)) OVER (ORDER BY position) - octet_length(body) AS before
                         FROM events WHERE session = $1 AND position >= $2 AND position < $3) AS sums WHERE before <= $4 OR position <= $2 + 1 ORDER BY position",
                    &[&key, &signed(from), &to, &most],
                )
                .await
                .map_err(|error| said(&error))?;
            let records: Vec<Record> = rows.iter().map(record).collect::<Result<_, _>>()?;
            let cut = records.iter().map(|record| record.body.len()).sum::<usize>() > SLICE_BYTES_MAX;
            Ok(Found { records, next, cut })
        })
        .await
    }

    pub(super) async fn sessions(&self, id: Option<String>) -> Result<Vec<Session>, StoreError> {
        self.with(async |transaction| {
            let rows = transaction
                .query(
                    "SELECT id, next, epoch, owner, lease_until_ms, wanted_ms FROM sessions WHERE $1::text IS NULL OR id = $1 ORDER BY key",
                    &[&id],
                )
                .await
                .map_err(|error| said(&error))?;
            let number = |row: &Row, at: usize| row.get::<_, i64>(at).cast_unsigned();
            let session = |row: &Row| Session {
                id: row.get(0),
                events: number(row, 1),
                epoch: number(row, 2),
                owner: row.get(3),
                lease_until_ms: number(row, 4),
                wanted_ms: row.get::<_, Option<i64>>(5).map(i64::cast_unsigned),
            };
            Ok(rows.iter().map(session).collect())
        })
        .await
    }

    pub(super) async fn lease(&self, id: String, owner: String, span_ms: u64) -> Result<u64, StoreError> {
        self.with(async |transaction| {
            let Head { key, epoch, .. } = head(transaction, &id, " FOR UPDATE").await?;
            let taken = format!(
                "UPDATE sessions SET epoch = epoch + 1, owner = $2, lease_until_ms = {NOW} + $3, wanted_ms = 0
                 WHERE key = $1 AND lease_until_ms <= {NOW}"
            );
            let taken = transaction
                .execute(&taken, &[&key, &owner, &signed(span_ms)])
                .await
                .map_err(|error| said(&error))?;
            if taken == 1 {
                return Ok(epoch + 1);
            }
            let held = transaction
                .query_one("SELECT coalesce(owner, ''), lease_until_ms FROM sessions WHERE key = $1", &[&key])
                .await
                .map_err(|error| said(&error))?;
            Err(StoreError::Taken { owner: held.get(0), until_ms: held.get::<_, i64>(1).cast_unsigned() })
        })
        .await
    }

    pub(super) async fn renew(&self, id: String, epoch: u64, span_ms: u64) -> Result<(), StoreError> {
        self.with(async |transaction| {
            let now = head(transaction, &id, " FOR UPDATE").await?;
            if now.epoch != epoch {
                return Err(StoreError::Lost);
            }
            let renewed = format!("UPDATE sessions SET lease_until_ms = {NOW} + $2 WHERE key = $1");
            transaction
                .execute(&renewed, &[&now.key, &signed(span_ms)])
                .await
                .map(drop)
                .map_err(|error| said(&error))
        })
        .await
    }

    pub(super) async fn release(
        &self,
        id: String,
        epoch: u64,
        wanted_ms: Option<u64>,
    ) -> Result<(), StoreError> {
        self.with(async |transaction| {
            let now = head(transaction, &id, " FOR UPDATE").await?;
            if now.epoch != epoch {
                return Err(StoreError::Lost);
            }
            let released = "UPDATE sessions SET lease_until_ms = 0, wanted_ms = $2 WHERE key = $1";
            let wanted = wanted_ms.map(signed);
            transaction.execute(released, &[&now.key, &wanted]).await.map(drop).map_err(|error| said(&error))
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

async fn head(transaction: &Transaction<'_>, id: &str, lock: &str) -> Result<Head, StoreError> {
    let found = format!("SELECT key, next, head, epoch FROM sessions WHERE id = $1{lock}");
    let row = transaction.query_opt(&found, &[&id]).await.map_err(|error| said(&error))?;
    let row = row.ok_or_else(|| StoreError::NoSession(id.to_owned()))?;
    let head = Hash::try_from(row.get::<_, &[u8]>(2)).map_err(|_| StoreError::Damaged {
        session: id.to_owned(),
        position: row.get::<_, i64>(1).cast_unsigned(),
        why: "its end has no hash",
    })?;
    let (next, epoch) = (row.get::<_, i64>(1).cast_unsigned(), row.get::<_, i64>(3).cast_unsigned());
    Ok(Head { key: row.get(0), next, head, epoch })
}

async fn make(transaction: &Transaction<'_>, id: &str, records: Vec<Record>) -> Result<(), StoreError> {
    let made = transaction
        .query_opt(
            "INSERT INTO sessions (id, next, head, wanted_ms) VALUES ($1, 0, $2, 0) ON CONFLICT DO NOTHING RETURNING key",
            &[&id, &genesis(id).as_slice()],
        )
        .await
        .map_err(|error| said(&error))?;
    let made = made.ok_or_else(|| StoreError::Exists(id.to_owned()))?;
    insert(transaction, made.get(0), records).await
}

async fn insert(transaction: &Transaction<'_>, key: i64, records: Vec<Record>) -> Result<(), StoreError> {
    let Some(last) = records.last() else { return Ok(()) };
    let (next, hash) = (signed(last.position + 1), last.hash.to_vec());
    let column =
        |of: fn(&Record) -> u64| records.iter().map(|record| signed(of(record))).collect::<Vec<i64>>();
    let kinds: Vec<&str> = records.iter().map(|record| record.kind.as_str()).collect();
    let bodies: Vec<&str> = records.iter().map(|record| record.body.as_str()).collect();
    let hashes: Vec<&[u8]> = records.iter().map(|record| record.hash.as_slice()).collect();
    let put = transaction
        .execute(
            "INSERT INTO events SELECT $1, * FROM unnest($2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[], $7::text[], $8::bytea[])",
            &[
                &key,
                &column(|record| record.position),
                &column(|record| record.epoch),
                &column(|record| record.batch),
                &column(|record| record.at_ms),
                &kinds,
                &bodies,
                &hashes,
            ],
        )
        .await;
    put.map_err(|error| said(&error))?;
    let moved = transaction
        .execute("UPDATE sessions SET next = $2, head = $3 WHERE key = $1", &[&key, &next, &hash])
        .await;
    moved.map(drop).map_err(|error| said(&error))
}

fn record(row: &Row) -> Result<Record, StoreError> {
    let number = |at: usize| row.get::<_, i64>(at).cast_unsigned();
    let hash = Hash::try_from(row.get::<_, &[u8]>(6)).map_err(|_| failed("a record without a hash"))?;
    Ok(Record {
        position: number(0),
        epoch: number(1),
        batch: number(2),
        at_ms: number(3),
        kind: row.get(4),
        body: row.get(5),
        hash,
    })
}
