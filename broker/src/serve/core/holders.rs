//! Whose a sandbox that lives is. The handle is the right to use it; who uses it is one principal at a time, and what ran for
//! the one before has ended by then, unless that one has said otherwise.

use std::sync::{Arc, PoisonError};

use rustix::net::{RecvFlags, SendFlags};
use serde_json::{Value, json};
use tokio::sync::{RwLockReadGuard, watch};

use super::askers::{Asker, Principal};
use super::decide::all_named;
use super::lives::Live;
use super::operate::no_such;
use super::{Core, not_started};
use crate::connection::{Connection, End, Foreign};
use crate::protocol::{Code, Denial, HandOver, INTERFACE, Taking};
use crate::rights::name_of;
use crate::serve::inner::{FromSupervisor, ToSupervisor};

/// What proves that a descriptor is the other end of a handle.
const NONCE_BYTES: usize = 32;

/// The principal that uses it, and how the next one gets it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Holder {
    principal: Principal,
    next: Taking,
}

impl Holder {
    pub fn new(principal: Principal) -> Holder {
        Holder { principal, next: Taking::Fresh }
    }

    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// What the record says of it. A hand-over counts when it is done: one that was only begun is begun again.
    pub fn follow(&mut self, event: &Value) {
        match event["kind"].as_str() {
            Some("give") => self.next = if event["mode"] == "live" { Taking::Live } else { Taking::Fresh },
            Some("handed_over") => *self = Holder::new(Principal::of(event)),
            _ => {}
        }
    }
}

/// Why there is no sandbox to execute in.
pub(super) enum Missing {
    /// The descriptor is no handle of one that lives.
    Handle(usize),
    /// There is none of that name, or it is another's.
    Sandbox(String),
    /// Neither or both were named.
    Name,
}

/// How often a sandbox began again; the end of counting when it has ended.
pub(super) struct Renewals(watch::Sender<Option<u64>>);

impl Default for Renewals {
    fn default() -> Renewals {
        Renewals(watch::channel(Some(0)).0)
    }
}

impl Renewals {
    pub fn one_more(&self) {
        self.0.send_modify(|count| *count = count.map(|count| count + 1));
    }

    pub fn no_more(&self) {
        self.0.send_replace(None);
    }
}

impl Live {
    /// Whether `descriptor` is a copy of the callers' end of the handle: what is sent into our end comes out of it.
    fn is_other_end(&self, descriptor: &Foreign) -> bool {
        let _one = self.proof.lock().unwrap_or_else(PoisonError::into_inner);
        let mut nonce = [0; NONCE_BYTES];
        let mut heard = [0; NONCE_BYTES];
        let random = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty());
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        random == Ok(NONCE_BYTES)
            && rustix::net::send(&*self.handle(), &nonce, flags) == Ok(NONCE_BYTES)
            && rustix::net::recv(descriptor, &mut heard[..], RecvFlags::DONTWAIT)
                .is_ok_and(|(length, _)| length == NONCE_BYTES)
            && heard == nonce
    }

    /// Ends what runs in it, and begins again over the same files.
    async fn renew(&self) -> Result<(), FromSupervisor> {
        let ended = || not_started("the sandbox ended".to_owned());
        let mut renewals = self.renewals.0.subscribe();
        let before = *renewals.borrow_and_update();
        self.tell(&ToSupervisor::Renew, &[]).await.map_err(|_| ended())?;
        let after = renewals.wait_for(|count| *count != before).await.map_err(|_| ended())?;
        after.map(drop).ok_or_else(ended)
    }
}

impl Core {
    /// The sandbox whose handle `descriptor` is.
    pub(super) fn live_held(&self, descriptor: &Foreign) -> Option<Arc<Live>> {
        let live = self.table().lives.get(&name_of(descriptor)).cloned();
        live.filter(|live| live.is_other_end(descriptor))
    }

    /// The sandbox of that name that lives.
    pub(super) fn live_named(&self, id: &str) -> Option<Arc<Live>> {
        self.table().lives.values().find(|live| live.id == id).cloned()
    }

    /// The sandbox of that name that lives, if it is the asker's own: who it is, is the right, where no handle is.
    pub(super) fn live_owned(&self, asker: &Asker, id: &str) -> Option<Arc<Live>> {
        let owned = self.table().sandboxes.get(id).is_some_and(|sandbox| asker.owns(sandbox));
        if owned { self.live_named(id) } else { None }
    }

    /// The sandbox that is named by its handle or, one's own, by its name.
    pub(super) fn named_live(
        &self,
        asker: &Asker,
        handle: Option<usize>,
        sandbox: Option<String>,
        descriptors: &[Foreign],
    ) -> Result<Arc<Live>, Missing> {
        match (handle, sandbox) {
            (Some(handle), None) => self.live_held(&descriptors[handle]).ok_or(Missing::Handle(handle)),
            (None, Some(id)) => self.live_owned(asker, &id).ok_or(Missing::Sandbox(id)),
            _ => Err(Missing::Name),
        }
    }

    pub(super) async fn missing(
        &self,
        connection: &Connection,
        asker: &Asker,
        missing: Missing,
    ) -> Result<(), End> {
        match missing {
            Missing::Handle(handle) => {
                connection.error(format!("{INTERFACE}.NoSuchHandle"), json!({ "handle": handle })).await
            }
            Missing::Sandbox(id) => no_such(connection, &id).await,
            Missing::Name => {
                let message = "either a handle or a sandbox of one's own is named";
                self.deny(connection, asker, "Execute", Denial::new(Code::Descriptor, message)).await
            }
        }
    }

    /// Makes the asker the principal of the sandbox, if it is not. Nobody else becomes it while what is returned is held.
    pub(super) async fn take_over<'a>(
        &self,
        live: &'a Live,
        asker: &Asker,
    ) -> Result<RwLockReadGuard<'a, Holder>, FromSupervisor> {
        let principal = asker.principal();
        let holder = live.holder.read().await;
        if holder.principal == principal {
            return Ok(holder);
        }
        drop(holder);
        let mut holder = live.holder.write().await;
        if holder.principal == principal {
            return Ok(holder.downgrade());
        }
        let event = |kind: &str| {
            let mut event = asker.event(kind);
            event["sandbox"] = live.id.as_str().into();
            event["mode"] = json!(holder.next);
            event["from"] = json!({ "uid": holder.principal.uid, "session": holder.principal.session });
            event
        };
        let denied = || FromSupervisor::Denied { denial: Denial::not_recorded() };
        if !self.audit.record(event("hand_over")).await {
            return Err(denied());
        }
        if holder.next == Taking::Fresh {
            live.renew().await?;
        }
        if !self.audit.record(event("handed_over")).await {
            return Err(denied());
        }
        self.belongs_to(&live.id, &principal);
        *holder = Holder::new(principal);
        Ok(holder.downgrade())
    }

    /// Whose it is listed as, and may be asked for by its name.
    pub(super) fn belongs_to(&self, id: &str, principal: &Principal) {
        if let Some(sandbox) = self.table().sandboxes.get_mut(id) {
            sandbox.uid = principal.uid;
            sandbox.session = principal.session.clone();
        }
    }

    /// `HandOver`: how the next principal gets it.
    pub(super) async fn hand_over(
        &self,
        connection: &Connection,
        asker: &Asker,
        HandOver { handle, mode }: HandOver,
        descriptors: &[Foreign],
    ) -> Result<(), End> {
        if let Err(denial) = all_named(&[handle], descriptors) {
            return self.deny(connection, asker, "HandOver", denial).await;
        }
        let Some(live) = self.live_held(&descriptors[handle]) else {
            return connection.error(format!("{INTERFACE}.NoSuchHandle"), json!({ "handle": handle })).await;
        };
        let mut holder = live.holder.write().await;
        if holder.principal != asker.principal() {
            let denial =
                Denial::new(Code::NotYours, "another principal holds it; only that one says how it goes on");
            return self.deny(connection, asker, "HandOver", denial).await;
        }
        let mut event = asker.event("give");
        event["sandbox"] = live.id.as_str().into();
        event["mode"] = json!(mode);
        if !self.audit.record(event).await {
            return self.deny(connection, asker, "HandOver", Denial::not_recorded()).await;
        }
        holder.next = mode;
        connection.reply(json!({}), false).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn principal(uid: u32) -> Principal {
        Principal { uid, session: None }
    }

    #[test]
    fn a_hand_over_counts_when_it_is_done_and_its_mode_once() {
        let mut holder = Holder::new(principal(1));
        holder.follow(&json!({ "kind": "give", "mode": "live" }));
        assert_eq!(holder.next, Taking::Live);
        holder.follow(&json!({ "kind": "hand_over", "uid": 2 }));
        assert_eq!(holder.principal, principal(1), "only begun");
        holder.follow(&json!({ "kind": "handed_over", "uid": 2, "session": "a" }));
        assert_eq!(holder, Holder::new(Principal { uid: 2, session: Some("a".into()) }));
    }
}
