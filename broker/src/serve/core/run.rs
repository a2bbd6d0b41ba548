//! `Run`: one command in a sandbox of its own. [`Core::run`] tells the story.

use std::os::fd::AsFd;

use serde_json::json;
use tokio::net::UnixStream;

use super::decide::decide;
use super::{Asker, Core, hear_supervisor, not_started, packets};
use crate::connection::{Connection, End, Foreign};
use crate::protocol::{Denial, Ran, Run};
use crate::serve::audit::bounded;
use crate::serve::inner::{FromSupervisor, Start, ToLauncher};
use crate::serve::metrics::Begun;

impl Core {
    /// The life of a run: record, start, wait, record, answer.
    pub(super) async fn run(
        &self,
        connection: &mut Connection,
        asker: &Asker,
        run: Run,
        descriptors: Vec<Foreign>,
        more: bool,
    ) -> Result<(), End> {
        let allowed = decide(&run, &asker.rights, &descriptors).and_then(|()| self.book(&run, asker));
        let sandbox = match allowed {
            Ok(sandbox) => sandbox,
            Err(denial) => return self.deny(connection, asker, "Run", denial).await,
        };
        let id = sandbox.id.clone();
        let command: Vec<&str> = run.command.iter().map(|word| bounded(word)).take(64).collect();
        let mut event = asker.event("start");
        event["sandbox"] = id.as_str().into();
        event["policy"] = run.policy.as_str().into();
        event["command"] = json!(command);
        if !self.audit.record(event).await {
            self.table().sandboxes.remove(&id);
            return self.deny(connection, asker, "Run", Denial::not_recorded()).await;
        }
        self.metrics.begun(Begun::Run);
        let process = run.workspace.as_ref().and_then(|_| asker.process(connection));
        let start = Start {
            sandbox,
            peer: asker.peer.into(),
            run,
            handle: None,
            process: process.as_ref().map(|_| descriptors.len()),
        };
        let given: Vec<_> =
            descriptors.iter().map(AsFd::as_fd).chain(process.as_deref().map(AsFd::as_fd)).collect();
        let ended = match self.start(start, &given).await.and_then(packets) {
            Ok(channel) => {
                drop(descriptors);
                self.watch(connection, &id, &channel, more).await
            }
            Err(error) => Ok(not_started(format!("the launcher: {error}"))),
        };
        let (ended, gone) = match ended {
            Ok(ended) => (ended, None),
            Err((ended, end)) => (ended, Some(end)),
        };
        self.finish(&id, &ended).await;
        if let Some(end) = gone {
            return Err(end);
        }
        match ended {
            FromSupervisor::Ended { report } => {
                connection.reply(Ran { sandbox: id, report: Some(report) }, false).await
            }
            FromSupervisor::Denied { denial } => self.deny(connection, asker, "Run", denial).await,
            ended => self.not_started(connection, ended).await,
        }
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
