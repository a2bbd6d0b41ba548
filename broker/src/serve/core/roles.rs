//! The lines to the roles that are always there: whether they answer, and what is asked of the vault.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{RecvFlags, SendFlags};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::askers::Asker;
use super::decide::all_named;
use super::{Core, Table, not_started};
use crate::connection::{Connection, End, Foreign};
use crate::grant::{GrantId, Host, Name, Source};
use crate::protocol::{AddCredential, Code, Credentials, Denial, RemoveCredential};
use crate::rights;
use crate::serve::config::Verb;
use crate::serve::gateway::ToGateway;
use crate::serve::inner::{channel, receive, send};
use crate::serve::roles::{Answer, Ask, Role};

/// Of one role.
pub(super) struct RoleLine {
    channel: UnixStream,
    waiting: Mutex<Waiting>,
}

/// Who waits for which answer.
#[derive(Default)]
struct Waiting {
    asked: u64,
    told: BTreeMap<u64, oneshot::Sender<Answer>>,
}

impl RoleLine {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing where the role has gone, or is asked more than it answers.
    async fn ask(&self, ask: &Ask, given: &[BorrowedFd<'_>]) -> Option<Answer> {
        let (told, answer) = oneshot::channel();
        {
            let mut waiting = self.waiting();
            waiting.asked += 1;
            let number = waiting.asked;
            send(&self.channel, &(number, ask), given, SendFlags::DONTWAIT).ok()?;
            waiting.told.insert(number, told);
        }
        answer.await.ok()
    }
}

impl Core {
    /// Knows of a role for as long as it is there.
    pub(super) async fn attend_role(&self, role: Role, channel: UnixStream) {
        let line = Arc::new(RoleLine { channel, waiting: Mutex::default() });
        let (told, mut there) = oneshot::channel();
        line.waiting().told.insert(0, told);
        if send(&line.channel, &(0, Ask::Ping), &[], SendFlags::DONTWAIT).is_err() {
            return;
        }
        let hear = || receive::<(u64, Answer)>(&line.channel, RecvFlags::DONTWAIT);
        let mut up = false;
        while let Ok(Some(((number, answer), _))) = line.channel.async_io(Interest::READABLE, hear).await {
            let told = line.waiting().told.remove(&number);
            let _ = told.map(|told| told.send(answer));
            if !up && there.try_recv().is_ok() {
                up = true;
                let mut table = self.table();
                *table.roles.entry(role).or_default() += 1;
                match role {
                    Role::Vault => table.vault = Some(Arc::clone(&line)),
                    Role::Resolver => table.resolver = Some(Arc::clone(&line)),
                    Role::Gateway => {}
                }
            }
        }
        let mut table = self.table();
        // Another one may have answered before the end of this one was heard.
        if let Some(there) = table.roles.get_mut(&role).filter(|_| up) {
            *there = there.saturating_sub(1);
        }
        let Table { vault, resolver, .. } = &mut *table;
        for known in [vault, resolver] {
            if known.as_ref().is_some_and(|known| Arc::ptr_eq(known, &line)) {
                *known = None;
            }
        }
        drop(table);
        // Who waits hears that no answer comes.
        line.waiting().told.clear();
    }

    /// What the name of a host stands for.
    pub(super) async fn resolve(&self, host: &Host) -> Result<Vec<IpAddr>, String> {
        let resolver = self.table().resolver.clone();
        let answer = match resolver {
            Some(resolver) => resolver.ask(&Ask::Resolve(host.clone()), &[]).await,
            None => None,
        };
        match answer {
            Some(Answer::Addresses(addresses)) => Ok(addresses),
            Some(Answer::Failed(why)) => Err(why),
            _ => Err("the resolver does not answer".to_owned()),
        }
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
            Ok(_) => {
                self.renew(name).await;
                connection.reply(json!({}), false).await
            }
            Err(why) => self.not_started(connection, not_started(why)).await,
        }
    }

    /// Has every gateway take what the store holds now as `name`, if it is there: sandboxes go on, and use it with their next request.
    async fn renew(&self, name: &Name) {
        let stored = Source::Store(name.clone());
        let of_store = |credential: &Name| {
            self.config.credential.get(credential).is_some_and(|own| own.source == stored)
        };
        let gates: Vec<_> = self.table().gates.values().cloned().collect();
        for gate in gates {
            for granted in &gate.granted {
                if !granted.grant.credential.as_ref().is_some_and(of_store) {
                    continue;
                }
                let Ok((vaults, gateways)) = channel() else { continue };
                let renewed = match self.provide(&granted.name, vaults).await {
                    Ok(()) => gate.tell(&ToGateway::Renew(granted.name.clone()), &[gateways]).await.is_ok(),
                    Err(_) => false,
                };
                // What was taken back is used no longer.
                if !renewed {
                    gate.cut(&GrantId::from(&granted.name));
                }
            }
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
