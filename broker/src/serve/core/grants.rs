//! What a sandbox reaches of networks: its gate. The core makes each connection to an upstream, counts it, keeps a copy of both of its
//! ends, and cuts them when the grant is revoked. It never reads one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{RecvFlags, Shutdown, shutdown};
use serde_json::json;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::askers::{Asker, Principal};
use super::gate::{Door, Gate, NEAR_ALL_MAX, NEAR_OF_UID_MAX, OPEN_ALL_MAX, OPEN_OF_UID_MAX, Open};
use super::{Core, not_started};
use crate::connection::{Connection, End};
use crate::grant::{Grant, GrantId, Host, Kind, Name, ambiguous};
use crate::protocol::{AllGrants, Code, Denial, Revoke, Revoked, Sandbox};
use crate::serve::audit::bounded;
use crate::serve::config::{Config, Rights, Verb};
use crate::serve::gateway::{FromGateway, Granted, Place, ToGateway};
use crate::serve::inner::{DESCRIPTORS_MAX, FromSupervisor, Listen, ToLauncher, channel, packets, receive};

/// So many revocations of sessions are remembered.
const REVOKED_MAX: usize = 100_000;
/// How long an upstream may take to take a connection.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// Grants of one sandbox: the lines to the vault of all of them are one packet's descriptors.
const GRANTS_MAX: usize = 8;
/// Names that nobody granted, of one sandbox, that are recorded one by one.
const UNKNOWN_MAX: usize = 64;
/// Requests that are being recorded, of one sandbox.
const RECORDING_MAX: usize = 64;

/// Whether a sandbox with all of `names` may be asked for.
pub(super) fn may_have(names: &[Name], rights: &Rights, config: &Config) -> Result<(), Denial> {
    if let Some(name) = names.iter().find(|name| !rights.may_grant(name) || !config.grant.contains_key(*name))
    {
        let all: Vec<&str> = config.grant.keys().map(Name::as_str).collect();
        let message = if rights.may_all() {
            format!("there is no [grant.{name}] in the configuration; there are: {}", all.join(", "))
        } else {
            format!("grant {name} is not yours to use, or there is none; the administrator grants it")
        };
        return Err(Denial::new(Code::GrantNotGranted, message));
    }
    if names.len() > GRANTS_MAX {
        return Err(Denial::new(Code::Grant, format!("a sandbox has no more than {GRANTS_MAX} grants")));
    }
    if let Some((one, other)) = ambiguous(&config.grant, names) {
        let message =
            format!("grants {one} and {other} answer at the same host and port; ask for one of them");
        return Err(Denial::new(Code::Grant, message));
    }
    Ok(())
}

impl Core {
    /// What is to listen in a sandbox that is about to be, and the door to it; nothing for one without grants.
    pub(super) async fn listening(
        self: &Arc<Self>,
        sandbox: &Sandbox,
        grants: &[Name],
        door: usize,
    ) -> Result<Option<(Listen, OwnedFd)>, String> {
        if grants.is_empty() {
            return Ok(None);
        }
        let text = |error: io::Error| error.to_string();
        let (gate, authority) = self.open_gate(sandbox.clone(), grants).await?;
        let (near, far) = channel().map_err(text)?;
        let copy = near.try_clone().map_err(text)?;
        let grants = gate.roots();
        let number = gate.keep_door(Door { grants: grants.clone(), near: copy });
        let told = ToGateway::Door { number, grants: grants.clone(), derived: None, answers: None };
        gate.tell(&told, &[near]).await.map_err(text)?;
        let at = gate.places().into_iter().filter_map(|(_, address)| address).collect();
        Ok(Some((Listen { at, authority, door, grants }, far)))
    }

    /// Makes a gateway, which then knows what goes into `grants`; the authority that it speaks TLS as.
    pub(super) async fn open_gate(
        self: &Arc<Self>,
        of: Sandbox,
        grants: &[Name],
    ) -> Result<(Arc<Gate>, Option<String>), String> {
        let text = |error: io::Error| error.to_string();
        let id = of.id.clone();
        let (ours, theirs) = channel().map_err(text)?;
        self.tell(&ToLauncher::Gateway { id: id.clone() }, &[theirs.as_fd()]).await.map_err(text)?;
        drop(theirs);
        let granted: Vec<Granted> = self.granted(grants);
        let mut lines = Vec::new();
        for granted in granted.iter().filter(|granted| granted.grant.kind == Kind::Http) {
            let (vaults, gateways) = channel().map_err(text)?;
            self.provide(&granted.name, vaults).await?;
            lines.push(gateways);
        }
        let gateway = packets(ours).map_err(text)?;
        let gate = Arc::new(Gate::new(of, granted.clone(), gateway));
        self.table().gates.insert(id, Arc::clone(&gate));
        gate.tell(&ToGateway::Setup(granted), &lines).await.map_err(text)?;
        let hear = || receive::<FromGateway>(&gate.gateway, RecvFlags::DONTWAIT);
        let authority = match gate.gateway.async_io(Interest::READABLE, hear).await.map_err(text)? {
            Some((FromGateway::Ready { authority }, _)) => authority,
            Some((FromGateway::Unfit { why }, _)) => return Err(why),
            _ => return Err("its gateway ended before it was ready; the service's log says how".to_owned()),
        };
        gate.watch();
        tokio::spawn(Arc::clone(self).attend_gateway(Arc::clone(&gate)));
        Ok((gate, authority))
    }

    /// One address for each host, in the order of their names.
    fn granted(&self, grants: &[Name]) -> Vec<Granted> {
        let grants = || grants.iter().filter_map(|name| self.config.grant.get_key_value(name));
        let hosts: BTreeSet<&Host> = grants().map(|(_, grant)| &grant.host).collect();
        let numbers: BTreeMap<&Host, u16> = hosts.into_iter().zip(1..).collect();
        let granted = |(name, grant): (&Name, &Grant)| Granted {
            name: name.clone(),
            grant: grant.clone(),
            addresses: sandbox::addresses(numbers[&grant.host]),
        };
        grants().map(granted).collect()
    }

    /// Passes what listens inside on to the gateway. What else the supervisor said instead, if it did.
    pub(super) async fn hear_ear(&self, id: &str, supervisor: &UnixStream) -> Option<FromSupervisor> {
        let gate = self.table().gates.get(id).cloned()?;
        let mut places = gate.places().into_iter().map(|(place, _)| place);
        loop {
            let hear = || receive::<FromSupervisor>(supervisor, RecvFlags::DONTWAIT);
            let (whole, sockets) = match supervisor.async_io(Interest::READABLE, hear).await {
                Ok(Some((FromSupervisor::Ear { whole }, sockets))) => (whole, sockets),
                Ok(Some((said, _))) => return Some(said),
                Ok(None) => return Some(not_started("its supervisor was ended".to_owned())),
                Err(error) => return Some(not_started(format!("its supervisor: {error}"))),
            };
            debug_assert!(sockets.len() <= DESCRIPTORS_MAX);
            let of: Vec<Place> = places.by_ref().take(sockets.len()).collect();
            if let Err(error) = gate.tell(&ToGateway::Listen(of.clone()), &sockets).await {
                return Some(not_started(format!("its gateway: {error}")));
            }
            let grant = |place: &Place| match place {
                Place::Names => None,
                Place::Listener { grant, .. } => Some(GrantId::from(grant)),
            };
            gate.state().listeners.extend(of.iter().map(grant).zip(sockets));
            if whole {
                return None;
            }
        }
    }

    async fn attend_gateway(self: Arc<Self>, gate: Arc<Gate>) {
        let recording = Arc::new(Semaphore::new(RECORDING_MAX));
        loop {
            let hear = || receive::<FromGateway>(&gate.gateway, RecvFlags::DONTWAIT);
            let Ok(Some((said, given))) = gate.gateway.async_io(Interest::READABLE, hear).await else {
                break;
            };
            match said {
                FromGateway::Open { number, grant } => {
                    let (core, gate) = (Arc::clone(&self), Arc::clone(&gate));
                    tokio::spawn(async move {
                        let made = core.connect(&gate, number, &grant, given.into_iter().next()).await;
                        let told = match made {
                            Ok(upstream) => gate.tell(&ToGateway::Opened { number }, &[upstream]).await,
                            Err(why) => gate.tell(&ToGateway::Refused { number, why }, &[]).await,
                        };
                        if told.is_err() {
                            core.closed(&gate, number).await;
                        }
                    });
                }
                FromGateway::Closed { number } => {
                    let (core, gate) = (Arc::clone(&self), Arc::clone(&gate));
                    tokio::spawn(async move {
                        core.closed(&gate, number).await;
                        core.close_idle(&gate).await;
                    });
                }
                FromGateway::Pair { number, grant } => self.pair(&gate, number, &grant).await,
                FromGateway::Derive { number, grant, by } => {
                    self.derive_inside(&gate, number, grant, by).await
                }
                FromGateway::Drop { grant } => drop(gate.cut(&grant)),
                FromGateway::DoorClosed { number } => {
                    gate.close_door(number);
                    self.close_idle(&gate).await;
                }
                FromGateway::Asked { grant, method, path, status } => {
                    // The gateway's own word, recorded beside the connection's, and not waited for one by one.
                    let event = json!({ "kind": "request", "sandbox": gate.id, "grant": grant, "claimed": true,
                        "method": bounded(&method), "path": bounded(&path), "status": status });
                    let Ok(permit) = Arc::clone(&recording).acquire_owned().await else { break };
                    let core = Arc::clone(&self);
                    tokio::spawn(async move {
                        core.audit.record(event).await;
                        drop(permit);
                    });
                }
                FromGateway::Unknown { name } => self.unknown(&gate, name).await,
                FromGateway::Ready { .. } | FromGateway::Unfit { .. } => {}
            }
        }
        // Without its gateway nothing of a sandbox's goes on, and what comes is refused; what is held elsewhere can be asked for anew.
        if self.table().sandboxes.contains_key(&gate.id) {
            self.cut_all(&gate).await;
        } else {
            self.close_gate(&gate.id).await;
        }
    }

    async fn cut_all(&self, gate: &Gate) {
        for root in gate.roots() {
            gate.cut(&root);
        }
        let left: Vec<u64> = gate.state().open.keys().copied().collect();
        for number in left {
            self.closed(gate, number).await;
        }
    }

    async fn unknown(&self, gate: &Gate, name: String) {
        {
            let mut state = gate.state();
            if state.unknown.len() >= UNKNOWN_MAX {
                state.unknown_more += u64::from(!state.unknown.contains(&name));
                return;
            }
            if !state.unknown.insert(name.clone()) {
                return;
            }
        }
        let event =
            json!({ "kind": "deny", "code": "name-not-granted", "sandbox": gate.id, "name": bounded(&name) });
        self.audit.record(event).await;
    }

    /// Makes a connection, once it is recorded; what the gateway gets of it.
    async fn connect(
        &self,
        gate: &Gate,
        number: u64,
        grant: &GrantId,
        workload: Option<OwnedFd>,
    ) -> Result<OwnedFd, String> {
        let workload = workload.ok_or("it came without the workload's end")?;
        let granted = match self.room(gate).and_then(|()| gate.book(grant)) {
            Ok(granted) => granted,
            Err(why) => {
                let _ = shutdown(&workload, Shutdown::Both);
                self.refused(gate, grant, why).await;
                return Err(why.to_owned());
            }
        };
        let made = self.make(gate, number, grant, workload, &granted).await;
        gate.state().making -= 1;
        made
    }

    /// Records what was refused at a gate.
    pub(super) async fn refused(&self, gate: &Gate, grant: &GrantId, why: &str) {
        if gate.one_more_refused() {
            let event = json!({ "kind": "deny", "code": "grant", "sandbox": gate.id, "grant": grant, "message": bounded(why) });
            self.audit.record(event).await;
        }
    }

    /// Whether one more may be opened, for its user and at all.
    fn room(&self, gate: &Gate) -> Result<(), &'static str> {
        self.has_room(gate, |(open, _)| open, [OPEN_OF_UID_MAX, OPEN_ALL_MAX])
    }

    /// Whether one more may be asked for at a door. Who asks, and then says nothing, takes nobody's room but its own.
    pub(super) fn room_at_doors(&self, gate: &Gate) -> Result<(), &'static str> {
        self.has_room(gate, |(_, near)| near, [NEAR_OF_UID_MAX, NEAR_ALL_MAX])
    }

    fn has_room(
        &self,
        gate: &Gate,
        count: impl Fn((usize, usize)) -> usize,
        [of_uid, at_all]: [usize; 2],
    ) -> Result<(), &'static str> {
        let table = self.table();
        let all: usize = table.gates.values().map(|gate| count(gate.open())).sum();
        let of = table.gates.values().filter(|other| other.of.uid == gate.of.uid);
        let own: usize = of.map(|gate| count(gate.open())).sum();
        if all >= at_all || own >= of_uid { Err("too many connections are open") } else { Ok(()) }
    }

    async fn make(
        &self,
        gate: &Gate,
        number: u64,
        grant: &GrantId,
        workload: OwnedFd,
        granted: &Grant,
    ) -> Result<OwnedFd, String> {
        let addresses = match self.addresses_of(granted).await {
            Ok(addresses) => addresses,
            Err(why) => {
                self.refused(gate, grant, &why).await;
                return Err(why);
            }
        };
        let event = json!({ "kind": "open", "sandbox": gate.id, "grant": grant, "number": number, "upstream": addresses });
        if !self.audit.record(event).await {
            return Err("it cannot be recorded".to_owned());
        }
        let made = match timeout(CONNECT_TIME_MAX, TcpStream::connect(&*addresses)).await {
            Ok(Ok(stream)) => stream.into_std().map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("it did not answer in time".to_owned()),
        };
        let made = made.and_then(|stream| {
            let _ = stream.set_nodelay(true);
            let upstream = OwnedFd::from(stream);
            Ok((upstream.try_clone().map_err(|error| error.to_string())?, upstream))
        });
        let (theirs, upstream) = match made {
            Ok(made) => made,
            Err(why) => {
                let event = json!({ "kind": "close", "sandbox": gate.id, "grant": grant, "number": number, "failed": why });
                self.audit.record(event).await;
                return Err(why);
            }
        };
        let mut state = gate.state();
        // It may have been revoked meanwhile.
        if state.grants.get(grant).is_none_or(|account| account.revoked) {
            let _ = shutdown(&workload, Shutdown::Both);
            return Err("the grant was revoked".to_owned());
        }
        state.open.insert(number, Open { grant: grant.clone(), workload, upstream, seen: 0 });
        Ok(theirs)
    }

    pub(super) async fn closed(&self, gate: &Gate, number: u64) {
        let Some(open) = gate.take_open(number) else { return };
        let (sent, received) = open.bytes();
        let _ = shutdown(&open.upstream, Shutdown::Both);
        let event = json!({ "kind": "close", "sandbox": gate.id, "grant": open.grant, "number": number,
            "sent_bytes": sent, "received_bytes": received });
        self.audit.record(event).await;
    }

    /// Nothing of a sandbox that has ended is open.
    pub(super) async fn close_gate(&self, id: &str) {
        let Some(gate) = self.table().gates.remove(id) else { return };
        self.cut_all(&gate).await;
        for (code, repeated) in gate.not_recorded() {
            let event = json!({ "kind": "deny", "code": code, "sandbox": id, "repeated": repeated });
            self.audit.record(event).await;
        }
        let _ = self.tell(&ToLauncher::EndGateway { id: id.to_owned() }, &[]).await;
    }

    /// Gates of sandboxes that the asker may do `verb` with.
    fn gates(&self, asker: &Asker, verb: Verb) -> Vec<Arc<Gate>> {
        self.table().gates.values().filter(|gate| Core::may(asker, &gate.of, verb)).cloned().collect()
    }

    /// `ListGrants`
    pub(super) async fn list_grants(&self, connection: &Connection, asker: &Asker) -> Result<(), End> {
        let grants = self.gates(asker, Verb::List).iter().flat_map(|gate| gate.has()).collect();
        connection.reply(AllGrants { grants }, false).await
    }

    /// A session that held what was revoked gets it no more, as long as this core lives: another door would undo it.
    fn not_again(&self, gates: &[Arc<Gate>], grant: &GrantId) {
        let mut table = self.table();
        for gate in gates.iter().filter(|gate| gate.of.session.is_some()) {
            let principal = Principal { uid: gate.of.uid, session: gate.of.session.clone() };
            if table.revoked.len() < REVOKED_MAX {
                table.revoked.insert((principal, grant.root().to_owned()));
            }
        }
    }

    /// Whether it was revoked from the asker's session before.
    pub(super) fn not_revoked(&self, asker: &Asker, grants: &[Name]) -> Result<(), Denial> {
        let Some(own) = &asker.session else { return Ok(()) };
        let table = self.table();
        // Those above it too: a session makes no way around by one below itself.
        let ends = own.match_indices('/').map(|(at, _)| at).chain([own.len()]);
        let mut sessions =
            ends.map(|end| Principal { uid: asker.peer.uid, session: Some(own[..end].to_owned()) });
        let is_revoked =
            |of: &Principal, grant: &&Name| table.revoked.contains(&(of.clone(), grant.as_str().to_owned()));
        let found = sessions.find_map(|of| grants.iter().find(|grant| is_revoked(&of, grant)));
        match found {
            Some(grant) => {
                let message = format!("grant {grant} was revoked from this session");
                Err(Denial::new(Code::GrantNotGranted, message))
            }
            None if table.revoked.len() >= REVOKED_MAX && !grants.is_empty() => {
                let message = "more was revoked than can be remembered; until the service is restarted no session gets a grant";
                Err(Denial::new(Code::GrantNotGranted, message))
            }
            None => Ok(()),
        }
    }

    /// `Revoke`: cut first, recorded then. It only takes away.
    pub(super) async fn revoke(
        &self,
        connection: &Connection,
        asker: &Asker,
        Revoke { grant, sandbox }: Revoke,
    ) -> Result<(), End> {
        let wanted = |gate: &Arc<Gate>| {
            sandbox.as_ref().is_none_or(|id| *id == gate.id) && gate.state().grants.contains_key(&grant)
        };
        let gates: Vec<_> = self.gates(asker, Verb::Revoke).into_iter().filter(wanted).collect();
        let connections = gates.iter().map(|gate| gate.cut(&grant)).sum();
        self.not_again(&gates, &grant);
        for gate in &gates {
            let mut event = asker.event("revoke");
            event["sandbox"] = gate.id.as_str().into();
            event["grant"] = json!(grant);
            self.audit.record(event).await;
        }
        let sandboxes = u64::try_from(gates.len()).unwrap_or(u64::MAX);
        connection.reply(Revoked { sandboxes, connections }, false).await
    }
}
