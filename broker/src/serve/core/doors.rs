//! Grants as descriptors: a door, whose holder asks for private connections on a grant, and for narrower doors. The core makes both
//! ends of each, and keeps a copy of the gateway's: shutting that down is the end of all copies of the other, wherever they are.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::json;

use super::askers::Asker;
use super::gate::Gate;
use super::grants::may_have;
use super::{Core, not_started};
use crate::connection::{Connection, End};
use crate::grant::{GrantId, Name, Narrowing};
use crate::protocol::{Code, Denial, Derive, Derived, Sandbox};
use crate::serve::audit::bounded;
use crate::serve::gateway::ToGateway;
use crate::serve::inner::channel;

/// Doors that one uid holds outside of sandboxes: each has a gateway.
const HELD_MAX: usize = 64;

impl Core {
    /// A connection on `grant` for whoever asked at a door: the gateway gets both ends.
    pub(super) async fn pair(&self, gate: &Gate, number: u64, grant: &GrantId) {
        let made = || -> io::Result<_> {
            let (near, far) =
                socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            Ok((near.try_clone()?, near, far))
        };
        let kept = self.room_at_doors(gate).map_err(str::to_owned).and_then(|()| {
            let (copy, near, far) = made().map_err(|error| error.to_string())?;
            gate.keep_near(number, grant, copy)?;
            Ok([near, far])
        });
        let told = match kept {
            Ok(ends) => gate.tell(&ToGateway::Opened { number }, &ends).await,
            Err(why) => {
                self.refused(gate, grant, &why).await;
                gate.tell(&ToGateway::Refused { number, why }, &[]).await
            }
        };
        if told.is_err() {
            self.closed(gate, number).await;
        }
    }

    /// A narrower door, for whoever asked at one.
    pub(super) async fn derive_inside(&self, gate: &Arc<Gate>, number: u64, parent: GrantId, by: Narrowing) {
        match self.new_door(gate, &parent, &by).await {
            Ok((door, id, ends)) => {
                let (grants, derived) = (vec![id], Some((parent, by)));
                let told = ToGateway::Door { number: door, grants, derived, answers: Some(number) };
                if gate.tell(&told, &ends).await.is_err() {
                    gate.close_door(door);
                }
            }
            Err(why) => {
                self.refused(gate, &parent, &why).await;
                let _ = gate.tell(&ToGateway::Refused { number, why }, &[]).await;
            }
        }
    }

    /// A grant that is derived, once that is recorded: the number of its door, its name, and the gateway's and the holder's end.
    async fn new_door(
        &self,
        gate: &Arc<Gate>,
        parent: &GrantId,
        by: &Narrowing,
    ) -> Result<(u64, GrantId, [OwnedFd; 2]), String> {
        let text = |error: io::Error| error.to_string();
        let (near, far) = channel().map_err(text)?;
        let (id, door) = gate.derive(parent, by, near.try_clone().map_err(text)?)?;
        let how = serde_json::to_string(by).unwrap_or_default();
        let event =
            json!({ "kind": "derive", "sandbox": gate.id, "grant": id, "from": parent, "by": bounded(&how) });
        if !self.audit.record(event).await {
            gate.close_door(door);
            return Err("it cannot be recorded".to_owned());
        }
        gate.watch();
        Ok((door, id, [near, far]))
    }

    /// `Derive`: a door that the asker holds, outside of any sandbox, with a gateway of its own.
    pub(super) async fn derive(
        self: &Arc<Self>,
        connection: &Connection,
        asker: &Asker,
        Derive { grant, by }: Derive,
    ) -> Result<(), End> {
        let by = by.unwrap_or_default();
        let allowed = may_have(std::slice::from_ref(&grant), &asker.rights, &self.config)
            .and_then(|()| self.not_revoked(asker, std::slice::from_ref(&grant)))
            .and_then(|()| self.may_hold_a_door(asker.peer.uid));
        if let Err(denial) = allowed {
            return self.deny(connection, asker, "Derive", denial).await;
        }
        let of = self.holder(asker);
        let mut event = asker.event("hold");
        event["sandbox"] = of.id.as_str().into();
        event["grant"] = grant.as_str().into();
        if !self.audit.record(event).await {
            return self.deny(connection, asker, "Derive", Denial::not_recorded()).await;
        }
        let id = of.id.clone();
        match self.hold_door(of, &grant, by).await {
            Ok((grant, far)) => connection.hand_over(Derived { grant, held: id, door: 0 }, far).await,
            Err(why) => {
                self.close_gate(&id).await;
                self.not_started(connection, not_started(why)).await
            }
        }
    }

    async fn hold_door(
        self: &Arc<Self>,
        of: Sandbox,
        grant: &Name,
        by: Narrowing,
    ) -> Result<(GrantId, OwnedFd), String> {
        let (gate, _) = self.open_gate(of, std::slice::from_ref(grant)).await?;
        let parent = GrantId::from(grant);
        let (number, id, [near, far]) = self.new_door(&gate, &parent, &by).await?;
        let told =
            ToGateway::Door { number, grants: vec![id.clone()], derived: Some((parent, by)), answers: None };
        gate.tell(&told, &[near]).await.map_err(|error| error.to_string())?;
        Ok((id, far))
    }

    fn may_hold_a_door(&self, uid: u32) -> Result<(), Denial> {
        let table = self.table();
        let is_held = |gate: &&Arc<Gate>| gate.of.uid == uid && !table.sandboxes.contains_key(&gate.id);
        if table.gates.values().filter(is_held).count() >= HELD_MAX {
            return Err(Denial::new(Code::TooMany, format!("{HELD_MAX} grants are held by you already")));
        }
        Ok(())
    }

    /// What a gate belongs to that is no sandbox's.
    fn holder(&self, asker: &Asker) -> Sandbox {
        let (name, started_ms) = self.next_name();
        Sandbox {
            id: format!("held-{name}"),
            policy: String::new(),
            uid: asker.peer.uid,
            session: asker.session.clone(),
            command: Vec::new(),
            started_ms,
        }
    }

    /// Ends a gate that is no sandbox's, when nobody can use it any more.
    pub(super) async fn close_idle(&self, gate: &Gate) {
        let is_held = !self.table().sandboxes.contains_key(&gate.id);
        if is_held && gate.is_idle() {
            self.close_gate(&gate.id).await;
        }
    }
}
