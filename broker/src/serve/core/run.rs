//! `Run`: one command in a sandbox of its own. [`Core::run`] tells the story.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use serde_json::json;
use tokio::net::UnixStream;

use super::decide::decide;
use super::grants::may_have;
use super::pool::Warm;
use super::{Asker, Core, hear_supervisor, not_started};
use crate::connection::{Connection, End, Foreign};
use crate::protocol::{Denial, Ran, Run, Sandbox};
use crate::serve::audit::bounded;
use crate::serve::inner::{FromSupervisor, Kind, Start, ToLauncher, ToSupervisor, packets};
use crate::serve::metrics::Begun;

impl Core {
    /// The life of a run: record, start, wait, record, answer.
    pub(super) async fn run(
        self: &Arc<Self>,
        connection: &mut Connection,
        asker: &Asker,
        run: Run,
        descriptors: Vec<Foreign>,
        more: bool,
    ) -> Result<(), End> {
        let allowed = decide(&run, &asker.rights, &descriptors)
            .and_then(|()| self.may_hold(&run, asker))
            .and_then(|()| may_have(&run.grants, &asker.rights, &self.config))
            .and_then(|()| self.not_revoked(asker, &run.grants));
        if let Err(denial) = allowed {
            return self.deny(connection, asker, "Run", denial).await;
        }
        let warm = self.take_warm(&run).await;
        let sandbox = match self.book(&run, asker, warm.as_ref()) {
            Ok(sandbox) => sandbox,
            Err(denial) => return self.refuse(connection, asker, "Run", warm, denial).await,
        };
        let id = sandbox.id.clone();
        let command: Vec<&str> = run.command.iter().map(|word| bounded(word)).take(64).collect();
        let mut event = asker.event("start");
        event["sandbox"] = id.as_str().into();
        event["policy"] = run.policy.as_str().into();
        event["command"] = json!(command);
        if !run.grants.is_empty() {
            event["grants"] = json!(run.grants);
        }
        if !self.audit.record(event).await {
            self.table().sandboxes.remove(&id);
            return self.refuse(connection, asker, "Run", warm, Denial::not_recorded()).await;
        }
        self.metrics.begun(Begun::Run);
        let started = match warm {
            Some(warm) => self.use_warm(warm, sandbox, run, &descriptors).await,
            None => self.start_for(connection, asker, sandbox, run, Kind::Run, None, &descriptors).await,
        };
        let ended = match started {
            Ok(channel) => {
                drop(descriptors);
                match self.hear_ear(&id, &channel).await {
                    None => self.watch(connection, &id, &channel, more).await,
                    Some(ended) => Ok(ended),
                }
            }
            Err(error) => Ok(not_started(error.to_string())),
        };
        let (ended, gone) = match ended {
            Ok(ended) => (ended, None),
            Err((ended, end)) => (ended, Some(end)),
        };
        // Its end is no act that would have to wait for its record.
        self.table().sandboxes.remove(&id);
        let (core, finished) = (Arc::clone(self), ended.clone());
        tokio::spawn(async move { core.finish(&id, &finished).await });
        if let Some(end) = gone {
            return Err(end);
        }
        match ended {
            FromSupervisor::Ended { report, held } => {
                self.hold(held);
                let sandbox = report["sandbox"].as_str().unwrap_or_default().to_owned();
                connection.reply(Ran { sandbox, report: Some(report) }, false).await
            }
            FromSupervisor::Denied { denial } => self.deny(connection, asker, "Run", denial).await,
            ended => self.not_started(connection, ended).await,
        }
    }

    /// Has the launcher start one, with the caller's descriptors; the line to its supervisor.
    #[allow(clippy::too_many_arguments, reason = "who asks, for what, and with which descriptors")]
    pub(super) async fn start_for(
        self: &Arc<Self>,
        connection: &Connection,
        asker: &Asker,
        sandbox: Sandbox,
        run: Run,
        kind: Kind,
        cores_handle: Option<BorrowedFd<'_>>,
        descriptors: &[Foreign],
    ) -> io::Result<UnixStream> {
        let count = descriptors.len();
        let made = self.listening(&sandbox, &run.grants, count + 1).await.map_err(io::Error::other)?;
        let (listen, door) = made.unzip();
        let start = Start { sandbox, run, kind, asker: Some(count), listen };
        let last = [Some(asker.socket(connection)), door.as_ref().map(AsFd::as_fd)].into_iter().flatten();
        let given: Vec<_> =
            cores_handle.into_iter().chain(descriptors.iter().map(AsFd::as_fd)).chain(last).collect();
        self.start(start, &given).await.and_then(packets)
    }

    /// Has one that was made ahead run its only command.
    async fn use_warm(
        &self,
        warm: Warm,
        sandbox: Sandbox,
        run: Run,
        descriptors: &[Foreign],
    ) -> io::Result<UnixStream> {
        let Run { command, environment, path, streams, .. } = run;
        let streams = streams.each();
        let given: Vec<_> = streams.iter().flatten().map(|number| descriptors[*number].as_fd()).collect();
        let streams = streams.map(|stream| stream.is_some());
        let first = ToSupervisor::Run { command, environment, path, streams };
        self.assign(warm, sandbox, Kind::Run, None, &first, &given).await
    }

    /// Denies what a sandbox was taken for already.
    pub(super) async fn refuse(
        &self,
        connection: &Connection,
        asker: &Asker,
        method: &str,
        warm: Option<Warm>,
        denial: Denial,
    ) -> Result<(), End> {
        if let Some(warm) = warm {
            self.end_warm(warm.id()).await;
        }
        self.deny(connection, asker, method, denial).await
    }

    /// Waits for the end of a sandbox; a caller that goes away ends it. With `more` the caller is told of its beginning.
    async fn watch(
        &self,
        connection: &mut Connection,
        id: &str,
        channel: &UnixStream,
        more: bool,
    ) -> Result<FromSupervisor, (FromSupervisor, End)> {
        let mut ended = std::pin::pin!(hear_supervisor(channel));
        let gone = async {
            if more
                && let Err(end) = connection.reply(Ran { sandbox: id.to_owned(), report: None }, true).await
            {
                return end;
            }
            connection.gone().await
        };
        tokio::select! {
            ended = &mut ended => Ok(ended),
            gone = gone => {
                let _ = self.tell(&ToLauncher::End { id: id.to_owned() }, &[]).await;
                Err((ended.await, gone))
            }
        }
    }
}
