//! The gate of one sandbox, or of one grant that is held outside of any: what there is of grants, what of them is used and open, and how
//! that is cut.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{SendFlags, Shutdown, shutdown};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::grant::{Grant, GrantId, Narrowing};
use crate::protocol::{Has, Sandbox};
use crate::serve::gateway::{Granted, Place, ToGateway};
use crate::serve::inner::send;

/// How late the connections of a grant may be cut that has expired, or carried more than it may. Nothing new is made on one that has
/// expired from that instant on; how much was carried is known as late as this.
const CUT_PAUSE: Duration = Duration::from_millis(200);
/// Connections that are open at the same time, of one sandbox, of all of one uid's, and of all together: each takes two descriptors
/// of the core's.
const OPEN_MAX: usize = 1024;
pub(super) const OPEN_OF_UID_MAX: usize = 2048;
pub(super) const OPEN_ALL_MAX: usize = 4096;
/// What was asked for at the doors of one uid, and at all, and is open: each takes one more.
pub(super) const NEAR_OF_UID_MAX: usize = 1024;
pub(super) const NEAR_ALL_MAX: usize = 4096;
/// Doors of one gate, and how many are made of it at all: each is recorded.
const DOORS_MAX: usize = 64;
const DERIVED_MAX: usize = 10_000;
/// Refusals of one sandbox that are recorded one by one.
const REFUSED_MAX: u64 = 64;

/// See above.
pub(super) struct Gate {
    pub(super) id: String,
    /// Whose it is; of a grant that is held outside of any sandbox, as a sandbox of that name would be listed.
    pub(super) of: Sandbox,
    pub(super) granted: Vec<Granted>,
    pub(super) gateway: UnixStream,
    pub(super) state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    /// Each grant, and each that was derived from one.
    pub(super) grants: BTreeMap<GrantId, Account>,
    /// Copies of what listens inside, so that nobody there can take its place.
    pub(super) listeners: Vec<(Option<GrantId>, OwnedFd)>,
    pub(super) open: BTreeMap<u64, Open>,
    /// The gateway's ends of connections that were asked for at a door.
    pub(super) near: BTreeMap<u64, (GrantId, OwnedFd)>,
    pub(super) doors: BTreeMap<u64, Door>,
    doors_made: u64,
    derived: usize,
    pub(super) unknown: BTreeSet<String>,
    pub(super) unknown_more: u64,
    pub(super) refused: u64,
    /// Connections that are being made.
    pub(super) making: usize,
    /// Somebody looks after what expires.
    watched: bool,
}

/// What is counted of a grant, those derived from it included.
pub(super) struct Account {
    pub(super) grant: Grant,
    /// By the boot clock, which counts while the host sleeps and which nobody sets (clock_gettime(2)).
    until: Option<Duration>,
    pub(super) uses: u64,
    /// Of connections that are closed.
    bytes: u64,
    /// Of those that are open, where bytes are limited.
    seen: u64,
    derived: usize,
    pub(super) revoked: bool,
}

impl Account {
    pub(super) fn new(grant: Grant) -> Account {
        let until = grant.expires.map(|span| boot_clock() + span.duration());
        Account { grant, until, uses: 0, bytes: 0, seen: 0, derived: 0, revoked: false }
    }

    fn expired(&self) -> bool {
        self.until.is_some_and(|until| boot_clock() >= until)
    }
}

/// A door: who holds its other end may ask for connections on these.
pub(super) struct Door {
    pub(super) grants: Vec<GrantId>,
    /// The gateway's end.
    pub(super) near: OwnedFd,
}

/// A connection, both ends.
pub(super) struct Open {
    pub(super) grant: GrantId,
    pub(super) workload: OwnedFd,
    pub(super) upstream: OwnedFd,
    /// How much of it was added up already.
    pub(super) seen: u64,
}

impl Open {
    /// As the kernel counted them, from the workload and to it.
    pub(super) fn bytes(&self) -> (u64, u64) {
        sandbox::tcp_bytes(&self.upstream).unwrap_or_default()
    }
}

impl State {
    /// The grant and those that it was derived from, unless one of them is at its end.
    fn living(&self, id: &GrantId) -> Result<(), &'static str> {
        if !self.grants.contains_key(id) {
            return Err("it is not granted");
        }
        self.grants.iter().filter(|(above, _)| id.is_within(above)).try_for_each(|(above, account)| {
            if account.revoked {
                Err("the grant was revoked")
            } else if account.expired() {
                Err("the grant has expired")
            } else if account.grant.bytes.is_some_and(|most| self.carried(above) >= most.bytes()) {
                Err("the grant has carried all that it may")
            } else if account.grant.uses.is_some_and(|most| account.uses >= most) {
                Err("the grant is used up")
            } else {
                Ok(())
            }
        })
    }

    fn keep_door(&mut self, door: Door) -> u64 {
        self.doors_made += 1;
        self.doors.insert(self.doors_made, door);
        self.doors_made
    }

    fn count(&mut self, id: &GrantId, mut one: impl FnMut(&mut Account)) {
        self.grants.iter_mut().filter(|(above, _)| id.is_within(above)).for_each(|(_, account)| one(account));
    }

    /// Forgets what was derived and nobody can use any more.
    fn sweep(&mut self, roots: &[GrantId]) {
        if self.grants.len() == roots.len() {
            return;
        }
        let near = self.near.values().map(|(of, _)| of);
        let used = near.chain(self.open.values().map(|open| &open.grant));
        let used: BTreeSet<GrantId> =
            used.chain(self.doors.values().flat_map(|door| &door.grants)).cloned().collect();
        self.grants.retain(|id, _| roots.contains(id) || used.iter().any(|used| used.is_within(id)));
    }

    /// What went through, as it was when somebody looked last.
    fn carried(&self, id: &GrantId) -> u64 {
        self.grants.get(id).map_or(0, |account| account.bytes + account.seen)
    }

    /// Looks at each connection once, for all whose bytes are limited.
    fn look(&mut self) {
        let State { open, grants, .. } = self;
        let mut limited: Vec<_> =
            grants.iter_mut().filter(|(_, account)| account.grant.bytes.is_some()).collect();
        for open in open.values_mut() {
            if !limited.iter().any(|(id, _)| open.grant.is_within(id)) {
                continue;
            }
            let (sent, received) = open.bytes();
            let more = (sent + received).saturating_sub(open.seen);
            open.seen += more;
            for (_, account) in limited.iter_mut().filter(|(id, _)| open.grant.is_within(id)) {
                account.seen += more;
            }
        }
    }
}

impl Gate {
    pub(super) fn new(of: Sandbox, granted: Vec<Granted>, gateway: UnixStream) -> Gate {
        let account = |granted: &Granted| (GrantId::from(&granted.name), Account::new(granted.grant.clone()));
        let state = State { grants: granted.iter().map(account).collect(), ..State::default() };
        Gate { id: of.id.clone(), of, granted, gateway, state: Mutex::new(state) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The grants of the configuration that it has.
    pub(super) fn roots(&self) -> Vec<GrantId> {
        self.granted.iter().map(|granted| GrantId::from(&granted.name)).collect()
    }

    /// What listens inside, in the order in which it is handed out.
    pub(super) fn places(&self) -> Vec<(Place, Option<SocketAddr>)> {
        let of = |granted: &Granted| {
            let (name, addresses) = (granted.name.clone(), granted.addresses);
            granted.grant.ports().into_iter().flat_map(move |(port, tls)| {
                let place = Place::Listener { grant: name.clone(), tls };
                addresses.map(|address| (place.clone(), Some(SocketAddr::new(address, port))))
            })
        };
        std::iter::once((Place::Names, None)).chain(self.granted.iter().flat_map(of)).collect()
    }

    pub(super) async fn tell(&self, message: &ToGateway, given: &[OwnedFd]) -> io::Result<()> {
        let given: Vec<_> = given.iter().map(AsFd::as_fd).collect();
        let tell = || send(&self.gateway, message, &given, SendFlags::DONTWAIT);
        self.gateway.async_io(Interest::WRITABLE, tell).await
    }

    /// Cuts what is open on `id` and on what was derived from it, the workload's sides of all before any upstream's; how many
    /// there were. Nothing more is opened.
    pub(super) fn cut(&self, id: &GrantId) -> u64 {
        let mut state = self.state();
        state
            .grants
            .iter_mut()
            .filter(|(below, _)| below.is_within(id))
            .for_each(|(_, account)| account.revoked = true);
        let state = &*state;
        let ours = |of: &GrantId| of.is_within(id);
        // A listener that was shut down refuses, and its port is not free.
        let listeners =
            state.listeners.iter().filter(|(of, _)| of.as_ref().is_some_and(ours)).map(|(_, socket)| socket);
        // Whoever holds a copy of the other end, and in whatever message one travels: it is dead.
        let near = state.near.values().filter(|(of, _)| ours(of)).map(|(_, near)| near);
        let is_dead = |of: &GrantId| state.grants.get(of).is_none_or(|account| account.revoked);
        let doors =
            state.doors.values().filter(|door| door.grants.iter().all(is_dead)).map(|door| &door.near);
        let open: Vec<&Open> = state.open.values().filter(|open| ours(&open.grant)).collect();
        let workloads = open.iter().map(|open| &open.workload);
        let upstreams = open.iter().map(|open| &open.upstream);
        for end in doors.chain(workloads).chain(near).chain(listeners).chain(upstreams) {
            let _ = shutdown(end, Shutdown::Both);
        }
        u64::try_from(open.len()).unwrap_or(u64::MAX)
    }

    /// Connections to upstreams that are open or being made, and those that were asked for at doors.
    pub(super) fn open(&self) -> (usize, usize) {
        let state = self.state();
        (state.open.len() + state.making, state.near.len())
    }

    /// Whether this refusal is recorded for itself.
    pub(super) fn one_more_refused(&self) -> bool {
        let mut state = self.state();
        state.refused += 1;
        state.refused <= REFUSED_MAX
    }

    /// Refusals that were not, by their codes.
    pub(super) fn not_recorded(&self) -> Vec<(&'static str, u64)> {
        let state = self.state();
        let all =
            [("name-not-granted", state.unknown_more), ("grant", state.refused.saturating_sub(REFUSED_MAX))];
        all.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    pub(super) fn has(&self) -> Vec<Has> {
        let state = self.state();
        let has = |(id, account): (&GrantId, &Account)| Has {
            sandbox: self.id.clone(),
            grant: id.clone(),
            kind: account.grant.kind,
            host: account.grant.host.to_string(),
            uses: account.uses,
            open: state.open.values().filter(|open| open.grant == *id).count() as u64,
            revoked: account.revoked || account.expired(),
        };
        state.grants.iter().map(has).collect()
    }

    /// What a connection on `id` goes to, and that it was counted.
    pub(super) fn book(&self, id: &GrantId) -> Result<Grant, &'static str> {
        let mut state = self.state();
        state.living(id)?;
        if state.open.len() + state.making >= OPEN_MAX {
            return Err("too many connections are open");
        }
        state.count(id, |account| account.uses += 1);
        state.making += 1;
        Ok(state.grants[id].grant.clone())
    }

    /// Keeps the gateway's end of a connection that was asked for at a door.
    pub(super) fn keep_near(&self, number: u64, id: &GrantId, near: OwnedFd) -> Result<(), &'static str> {
        let mut state = self.state();
        state.living(id)?;
        if state.near.len() >= OPEN_MAX {
            return Err("too many connections are open");
        }
        state.near.insert(number, (id.clone(), near));
        Ok(())
    }

    /// A connection, or what a door gave, that is at its end.
    pub(super) fn take_open(&self, number: u64) -> Option<Open> {
        let mut state = self.state();
        if let Some((_, near)) = state.near.remove(&number) {
            let _ = shutdown(&near, Shutdown::Both);
        }
        let open = state.open.remove(&number);
        if let Some(open) = &open {
            let (sent, received) = open.bytes();
            state.count(&open.grant, |account| {
                account.bytes += sent + received;
                account.seen = account.seen.saturating_sub(open.seen);
            });
        }
        state.sweep(&self.roots());
        open
    }

    /// One that is derived from `parent`, and its door, of which `near` is the gateway's end.
    pub(super) fn derive(
        &self,
        parent: &GrantId,
        by: &Narrowing,
        near: OwnedFd,
    ) -> Result<(GrantId, u64), String> {
        let mut state = self.state();
        state.living(parent)?;
        if state.doors.len() >= DOORS_MAX {
            return Err(format!("{DOORS_MAX} doors are there already"));
        }
        state.derived += 1;
        if state.derived > DERIVED_MAX {
            return Err(format!("{DERIVED_MAX} were derived here already"));
        }
        let account = state.grants.get_mut(parent).ok_or("it is not granted")?;
        let narrowed = account.grant.narrowed(parent, by)?;
        account.derived += 1;
        let id = parent.child(account.derived);
        state.grants.insert(id.clone(), Account::new(narrowed));
        let number = state.keep_door(Door { grants: vec![id.clone()], near });
        Ok((id, number))
    }

    /// Keeps the gateway's end of a new door; its number.
    pub(super) fn keep_door(&self, door: Door) -> u64 {
        self.state().keep_door(door)
    }

    /// Nobody holds the other end any more, or whoever does has broken the rules. What was derived for it alone is forgotten.
    pub(super) fn close_door(&self, number: u64) {
        let mut state = self.state();
        let Some(door) = state.doors.remove(&number) else { return };
        let _ = shutdown(&door.near, Shutdown::Both);
        state.sweep(&self.roots());
    }

    /// Nobody can use it any more: there is no door and no connection.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state();
        state.doors.is_empty() && state.open.is_empty() && state.near.is_empty() && state.making == 0
    }

    /// Has what expires, or carries too much, cut in time; once.
    pub(super) fn watch(self: &Arc<Self>) {
        let mut state = self.state();
        let is_limited = |account: &Account| account.until.is_some() || account.grant.bytes.is_some();
        if !state.watched && state.grants.values().any(is_limited) {
            state.watched = true;
            tokio::spawn(cut_in_time(Arc::downgrade(self)));
        }
    }

    fn overdue(&self) -> Vec<GrantId> {
        let mut state = self.state();
        state.look();
        let is_over = |(id, account): &(&GrantId, &Account)| {
            let most = account.grant.bytes.map(sandbox::ByteSize::bytes);
            !account.revoked && (account.expired() || most.is_some_and(|most| state.carried(id) >= most))
        };
        state.grants.iter().filter(is_over).map(|(id, _)| id.clone()).collect()
    }
}

fn boot_clock() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.try_into().unwrap_or_default())
}

/// For as long as the gate is there.
async fn cut_in_time(gate: std::sync::Weak<Gate>) {
    while let Some(gate) = gate.upgrade() {
        for id in gate.overdue() {
            gate.cut(&id);
        }
        drop(gate);
        tokio::time::sleep(CUT_PAUSE).await;
    }
}
