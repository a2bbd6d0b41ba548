//! The lines to the roles that are always there: whether they answer, and what is asked of the vault.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{RecvFlags, SendFlags};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::askers::Asker;
use super::decide::all_named;
use super::{Core, not_started};
use crate::connection::{Connection, End, Foreign};
use crate::grant::Name;
use crate::protocol::{AddCredential, Code, Credentials, Denial, RemoveCredential};
use crate::rights;
use crate::serve::config::Verb;
use crate::serve::inner::{receive, send};
use crate::serve::roles::{Answer, Ask, Role};

/// Of one role. It answers what it is asked one after the other.
pub(super) struct RoleLine {
    channel: UnixStream,
    waiting: Mutex<VecDeque<oneshot::Sender<Answer>>>,
}

impl RoleLine {
    /// Nothing where the role has gone, or is asked more than it answers.
    async fn ask(&self, ask: &Ask, given: &[BorrowedFd<'_>]) -> Option<Answer> {
        let (told, answer) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            send(&self.channel, ask, given, SendFlags::DONTWAIT).ok()?;
            waiting.push_back(told);
        }
        answer.await.ok()
    }
}

impl Core {
    /// Knows of a role for as long as it is there.
    pub(super) async fn attend_role(&self, role: Role, channel: UnixStream) {
        let line = Arc::new(RoleLine { channel, waiting: Mutex::default() });
        let (told, mut there) = oneshot::channel();
        line.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(told);
        if send(&line.channel, &Ask::Ping, &[], SendFlags::DONTWAIT).is_err() {
            return;
        }
        let hear = || receive::<Answer>(&line.channel, RecvFlags::DONTWAIT);
        let mut up = false;
        while let Ok(Some((answer, _))) = line.channel.async_io(Interest::READABLE, hear).await {
            let told = line.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let _ = told.map(|told| told.send(answer));
            if !up && there.try_recv().is_ok() {
                up = true;
                let mut table = self.table();
                *table.roles.entry(role).or_default() += 1;
                if role == Role::Vault {
                    table.vault = Some(Arc::clone(&line));
                }
            }
        }
        let mut table = self.table();
        // Another one may have answered before the end of this one was heard.
        if let Some(there) = table.roles.get_mut(&role).filter(|_| up) {
            *there = there.saturating_sub(1);
        }
        if table.vault.as_ref().is_some_and(|vault| Arc::ptr_eq(vault, &line)) {
            table.vault = None;
        }
        drop(table);
        // Who waits hears that no answer comes.
        line.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    async fn ask_vault(&self, ask: &Ask, given: &[BorrowedFd<'_>]) -> Result<Answer, String> {
        let vault = self.table().vault.clone();
        let answer = match vault {
            Some(vault) => vault.ask(ask, given).await,
            None => None,
        };
        match answer {
            Some(Answer::Failed(why)) => Err(why),
            Some(answer) => Ok(answer),
            None => Err("the vault does not answer; try again".to_owned()),
        }
    }

    /// Has the vault say on `line` what goes into `grant`. The core has made that line, and does not read it.
    pub(super) async fn provide(&self, grant: &Name, line: OwnedFd) -> Result<(), String> {
        self.ask_vault(&Ask::Provide(grant.clone()), &[line.as_fd()]).await.map(drop)
    }

    /// `AddCredential`
    pub(super) async fn add_credential(
        &self,
        connection: &Connection,
        asker: &Asker,
        AddCredential { name, secret }: AddCredential,
        descriptors: Vec<Foreign>,
    ) -> Result<(), End> {
        let is_pipe = |()| {
            if rights::is_pipe(&descriptors[secret]) {
                Ok(())
            } else {
                Err(Denial::new(Code::Descriptor, "a secret comes through a pipe"))
            }
        };
        if let Err(denial) = all_named(&[secret], &descriptors).and_then(is_pipe) {
            return self.deny(connection, asker, "AddCredential", denial).await;
        }
        let ask = Ask::Keep(name.clone());
        self.keep_credential(
            connection,
            asker,
            "AddCredential",
            "credential-add",
            &name,
            &ask,
            &[descriptors[secret].as_fd()],
        )
        .await
    }

    /// `RemoveCredential`
    pub(super) async fn remove_credential(
        &self,
        connection: &Connection,
        asker: &Asker,
        RemoveCredential { name }: RemoveCredential,
    ) -> Result<(), End> {
        let ask = Ask::Forget(name.clone());
        self.keep_credential(connection, asker, "RemoveCredential", "credential-remove", &name, &ask, &[])
            .await
    }

    #[allow(clippy::too_many_arguments, reason = "who asks for what, and how it is called in the record")]
    async fn keep_credential(
        &self,
        connection: &Connection,
        asker: &Asker,
        method: &str,
        kind: &str,
        name: &Name,
        ask: &Ask,
        given: &[BorrowedFd<'_>],
    ) -> Result<(), End> {
        if !asker.rights.may(Verb::Credential) {
            return self.deny(connection, asker, method, Denial::not_yours("credential")).await;
        }
        let mut event = asker.event(kind);
        event["credential"] = name.as_str().into();
        if !self.audit.record(event).await {
            return self.deny(connection, asker, method, Denial::not_recorded()).await;
        }
        match self.ask_vault(ask, given).await {
            Ok(_) => connection.reply(json!({}), false).await,
            Err(why) => self.not_started(connection, not_started(why)).await,
        }
    }

    /// `ListCredentials`
    pub(super) async fn list_credentials(&self, connection: &Connection, asker: &Asker) -> Result<(), End> {
        if !asker.rights.may(Verb::Credential) {
            return self.deny(connection, asker, "ListCredentials", Denial::not_yours("credential")).await;
        }
        match self.ask_vault(&Ask::List, &[]).await {
            Ok(Answer::Kept(names)) => connection.reply(Credentials { names }, false).await,
            Ok(_) => connection.reply(Value::Null, false).await,
            Err(why) => self.not_started(connection, not_started(why)).await,
        }
    }
}
