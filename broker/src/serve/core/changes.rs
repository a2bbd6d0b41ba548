//! What is held of workspaces that were not to be changed: listed, handed over, thrown away.

use serde_json::json;
use tokio::io::Interest;

use super::Core;
use super::askers::Asker;
use super::operate::no_such;
use crate::connection::{Connection, End};
use crate::protocol::{AllHeld, Code, Denial, Held, Mode, Named, Run, Sandbox, Shown};
use crate::serve::inner::{Done, Errand, ToLauncher, channel, packets, receive};

/// How many sandboxes' changes are held for one uid.
const HELD_MAX: usize = 64;

impl Core {
    /// Whether `run` may have its changes held.
    pub(super) fn may_hold(&self, run: &Run, asker: &Asker) -> Result<(), Denial> {
        let Some(workspace) = run.workspace.as_ref().filter(|workspace| workspace.mode == Mode::Cow) else {
            return Ok(());
        };
        if !workspace.name.starts_with('/') {
            let message =
                "a workspace of mode `cow` is called by its absolute path, so that the changes find it again";
            return Err(Denial::new(Code::NotNarrower, message));
        }
        let held = self.table().held.values().filter(|held| held.uid == asker.peer.uid).count();
        if held >= HELD_MAX {
            let message = format!("the changes of {HELD_MAX} sandboxes are held for you; discard some");
            return Err(Denial::new(Code::TooMany, message));
        }
        Ok(())
    }

    /// `ListChanges`
    pub(super) async fn list_changes(&self, connection: &Connection, asker: &Asker) -> Result<(), End> {
        let held = self.table().held.values().filter(|held| owns(asker, held)).cloned().collect();
        connection.reply(AllHeld { held }, false).await
    }

    /// `Changes`
    pub(super) async fn changes(
        &self,
        connection: &Connection,
        asker: &Asker,
        Named { sandbox }: Named,
    ) -> Result<(), End> {
        let Some(held) = self.claim(connection, asker, "Changes", "open", &sandbox).await? else {
            return Ok(());
        };
        match self.errand(&sandbox, Errand::Show).await {
            Ok(Some(directory)) => connection.hand_over(Shown { held, directory: 0 }, directory).await,
            Ok(None) => Err(End::Failed),
            Err(message) => self.failed(connection, message).await,
        }
    }

    /// `Discard`
    pub(super) async fn discard(
        &self,
        connection: &Connection,
        asker: &Asker,
        Named { sandbox }: Named,
    ) -> Result<(), End> {
        if self.claim(connection, asker, "Discard", "discard", &sandbox).await?.is_none() {
            return Ok(());
        }
        match self.errand(&sandbox, Errand::Discard).await {
            Ok(_) => {
                self.table().held.remove(&sandbox);
                connection.reply(json!({}), false).await
            }
            Err(message) => self.failed(connection, message).await,
        }
    }

    /// What is held for the asker of a sandbox that has ended, once it is recorded as `kind` what becomes of it; nothing where
    /// the answer was no, and has been given.
    async fn claim(
        &self,
        connection: &Connection,
        asker: &Asker,
        method: &str,
        kind: &str,
        id: &str,
    ) -> Result<Option<Held>, End> {
        let Some(held) = self.held_of(asker, id) else {
            no_such(connection, id).await?;
            return Ok(None);
        };
        // While it lives it may be another principal's by now, and what is handed over once is kept.
        let denial = if self.table().sandboxes.contains_key(id) {
            let message = "the sandbox lives, and what it changes is its own as long; `broker kill` ends it";
            Denial::new(Code::Lives, message)
        } else {
            let mut event = asker.event(kind);
            event["sandbox"] = id.into();
            if self.audit.record(event).await {
                return Ok(Some(held));
            }
            Denial::not_recorded()
        };
        self.deny(connection, asker, method, denial).await?;
        Ok(None)
    }

    fn held_of(&self, asker: &Asker, id: &str) -> Option<Held> {
        self.table().held.get(id).filter(|held| owns(asker, held)).cloned()
    }

    async fn failed(&self, connection: &Connection, message: String) -> Result<(), End> {
        let ended = super::not_started(format!("what is held: {message}"));
        self.not_started(connection, ended).await
    }

    async fn errand(&self, id: &str, what: Errand) -> Result<Option<rustix::fd::OwnedFd>, String> {
        use rustix::fd::AsFd;
        let text = |error: std::io::Error| error.to_string();
        let (ours, theirs) = channel().map_err(text)?;
        let message = ToLauncher::Errand { id: id.to_owned(), what };
        self.tell(&message, &[theirs.as_fd()]).await.map_err(text)?;
        drop(theirs);
        let ours = packets(ours).map_err(text)?;
        let hear = || receive::<Done>(&ours, rustix::net::RecvFlags::DONTWAIT);
        match ours.async_io(Interest::READABLE, hear).await.map_err(text)? {
            Some((Done::Well, descriptors)) => Ok(descriptors.into_iter().next()),
            Some((Done::Failed(message), _)) => Err(message),
            None => Err("the launcher's errand ended".to_owned()),
        }
    }
}

fn owns(asker: &Asker, held: &Held) -> bool {
    let Held { sandbox, uid, session, .. } = held.clone();
    asker.owns(&Sandbox {
        id: sandbox,
        policy: String::new(),
        uid,
        session,
        command: Vec::new(),
        started_ms: 0,
    })
}
