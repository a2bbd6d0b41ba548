//! What is asked of sandboxes that are there: list, inspect, signal, kill; and of the daemon itself: what was counted and recorded.

use serde_json::json;

use super::Core;
use super::askers::Asker;
use crate::connection::{Connection, End};
use crate::protocol::{
    Code, Denial, INTERFACE, Inspected, Measured, Named, Recorded, RecordsFrom, Sandbox, Sandboxes, Signal,
};
use crate::serve::audit::{self, bounded};
use crate::serve::config::Verb;
use crate::serve::inner::{ToLauncher, ToSupervisor};
use crate::serve::metrics::Gauges;

impl Core {
    pub(super) async fn list(&self, connection: &Connection, asker: &Asker) -> Result<(), End> {
        let known = |sandbox: &&Sandbox| Core::may(asker, sandbox, Verb::List);
        let sandboxes = self.table().sandboxes.values().filter(known).cloned().collect();
        connection.reply(Sandboxes { sandboxes }, false).await
    }

    pub(super) async fn inspect(
        &self,
        connection: &Connection,
        asker: &Asker,
        Named { sandbox }: Named,
    ) -> Result<(), End> {
        let Some(found) = self.known(asker, &sandbox, Verb::List) else {
            return no_such(connection, &sandbox).await;
        };
        let running = self.live_named(&sandbox).map(|live| live.effects.running()).unwrap_or_default();
        connection.reply(Inspected { sandbox: found, running }, false).await
    }

    pub(super) async fn signal(
        &self,
        connection: &Connection,
        asker: &Asker,
        Signal { sandbox, signal, effect }: Signal,
    ) -> Result<(), End> {
        if !sandbox::PASSED_ON.iter().any(|passed| *passed as i32 == signal) {
            let denial = Denial::new(Code::Signal, format!("signal {signal} is not passed on"));
            return self.deny(connection, asker, "Signal", denial).await;
        }
        if self.known(asker, &sandbox, Verb::Kill).is_none() {
            return no_such(connection, &sandbox).await;
        }
        if !self.recorded(asker, "signal", &sandbox).await {
            return self.deny(connection, asker, "Signal", Denial::not_recorded()).await;
        }
        match (self.live_named(&sandbox), effect) {
            (Some(live), Some(effect)) => {
                let Some(number) = live.effects.number_of(asker.principal(), &effect) else {
                    let denial = Denial::new(Code::Signal, "no command of that name was begun in it");
                    return self.deny(connection, asker, "Signal", denial).await;
                };
                // One that has ended hears nothing more.
                let _ = live.tell(&ToSupervisor::Signal { number, signal }, &[]).await;
            }
            _ => {
                self.tell(&ToLauncher::Signal { id: sandbox, signal }, &[]).await.map_err(|_| End::Failed)?
            }
        }
        connection.reply(json!({}), false).await
    }

    pub(super) async fn kill(
        &self,
        connection: &Connection,
        asker: &Asker,
        Named { sandbox }: Named,
    ) -> Result<(), End> {
        if self.known(asker, &sandbox, Verb::Kill).is_none() {
            return no_such(connection, &sandbox).await;
        }
        if !self.recorded(asker, "kill", &sandbox).await {
            return self.deny(connection, asker, "Kill", Denial::not_recorded()).await;
        }
        self.tell(&ToLauncher::End { id: sandbox }, &[]).await.map_err(|_| End::Failed)?;
        connection.reply(json!({}), false).await
    }

    pub(super) async fn measured(&self, connection: &Connection, asker: &Asker) -> Result<(), End> {
        if !asker.rights.may(Verb::Metrics) {
            return self.deny(connection, asker, "Metrics", Denial::not_yours("metrics")).await;
        }
        connection.reply(Measured { text: self.metrics_text() }, false).await
    }

    pub(super) async fn records(
        &self,
        connection: &Connection,
        asker: &Asker,
        RecordsFrom { from }: RecordsFrom,
    ) -> Result<(), End> {
        if !asker.rights.may(Verb::Audit) {
            return self.deny(connection, asker, "Records", Denial::not_yours("audit")).await;
        }
        let state = self.config.server.record();
        let read = tokio::task::spawn_blocking(move || audit::from(&state, from)).await;
        match read {
            Ok(Ok(records)) => connection.reply(Recorded { records }, false).await,
            _ => Err(End::Failed),
        }
    }

    /// What is counted, and what is there now.
    pub(super) fn metrics_text(&self) -> String {
        let gauges = {
            let table = self.table();
            Gauges {
                connections: table.connections.values().sum(),
                sandboxes: table.sandboxes.len(),
                descriptors: std::fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or_default(),
                roles: table.roles.iter().map(|(role, there)| (role.name(), *there)).collect(),
                pool: table
                    .pool
                    .iter()
                    .map(|(policy, warm)| (policy.as_str().to_owned(), warm.len()))
                    .collect(),
            }
        };
        self.metrics.text(&gauges)
    }

    /// A sandbox that the asker may know of, for what `verb` allows with those of others.
    fn known(&self, asker: &Asker, id: &str, verb: Verb) -> Option<Sandbox> {
        let sandbox = self.table().sandboxes.get(id).cloned();
        sandbox.filter(|sandbox| Core::may(asker, sandbox, verb))
    }

    async fn recorded(&self, asker: &Asker, what: &str, id: &str) -> bool {
        let mut event = asker.event(what);
        event["sandbox"] = id.into();
        self.audit.record(event).await
    }
}

/// The same answer for what is not there and for what is another's.
pub(super) async fn no_such(connection: &Connection, id: &str) -> Result<(), End> {
    let parameters = Named { sandbox: bounded(id).to_owned() };
    connection.error(format!("{INTERFACE}.NoSuchSandbox"), parameters).await
}
