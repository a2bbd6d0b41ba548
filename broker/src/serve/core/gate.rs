//! The gate of one sandbox: what it was granted, what of it is used and open, and how that is cut.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{SendFlags, Shutdown, shutdown};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::grant::Name;
use crate::protocol::Has;
use crate::serve::gateway::{Granted, Place, ToGateway};
use crate::serve::inner::send;

/// How late the connections of a grant that has expired may be cut. Nothing new is made on it from the first instant on.
const EXPIRY_PAUSE: Duration = Duration::from_millis(200);
/// Connections that are open at the same time, of one sandbox, of all of one uid's, and of all together: each takes two descriptors
/// of the core's.
const OPEN_MAX: usize = 1024;
pub(super) const OPEN_OF_UID_MAX: usize = 2048;
pub(super) const OPEN_ALL_MAX: usize = 4096;
/// Refusals of one sandbox that are recorded one by one.
const REFUSED_MAX: u64 = 64;

/// Of one sandbox.
pub(super) struct Gate {
    pub(super) id: String,
    pub(super) uid: u32,
    pub(super) granted: Vec<Granted>,
    pub(super) gateway: UnixStream,
    /// By the boot clock, which counts while the host sleeps and which nobody sets (clock_gettime(2)).
    pub(super) since: Duration,
    pub(super) state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    /// Copies of what listens inside, so that nobody there can take its place.
    pub(super) listeners: Vec<(Option<Name>, OwnedFd)>,
    pub(super) open: BTreeMap<u64, Open>,
    pub(super) uses: BTreeMap<Name, u64>,
    pub(super) revoked: BTreeSet<Name>,
    pub(super) unknown: BTreeSet<String>,
    pub(super) unknown_more: u64,
    pub(super) refused: u64,
    /// Connections that are being made.
    pub(super) making: usize,
}

/// A connection, both ends.
pub(super) struct Open {
    pub(super) grant: Name,
    pub(super) workload: OwnedFd,
    pub(super) upstream: OwnedFd,
}

impl Open {
    /// As the kernel counted them, from the workload and to it.
    pub(super) fn bytes(&self) -> (u64, u64) {
        sandbox::tcp_bytes(&self.upstream).unwrap_or_default()
    }
}

impl Gate {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Cuts what is open on `grant`, the workload's sides of all before any upstream's; how many there were. Nothing more is opened.
    pub(super) fn cut(&self, grant: &Name) -> u64 {
        let mut state = self.state();
        state.revoked.insert(grant.clone());
        // A listener that was shut down refuses, and its port is not free.
        for (_, listener) in state.listeners.iter().filter(|(of, _)| of.as_ref() == Some(grant)) {
            let _ = shutdown(listener, Shutdown::Both);
        }
        let open: Vec<&Open> = state.open.values().filter(|open| open.grant == *grant).collect();
        for end in open.iter().map(|open| &open.workload).chain(open.iter().map(|open| &open.upstream)) {
            let _ = shutdown(end, Shutdown::Both);
        }
        u64::try_from(open.len()).unwrap_or(u64::MAX)
    }

    /// Connections that are open or being made.
    pub(super) fn open(&self) -> usize {
        let state = self.state();
        state.open.len() + state.making
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

    pub(super) fn expired(&self, granted: &Granted) -> bool {
        let age = boot_clock().saturating_sub(self.since);
        granted.grant.expires.is_some_and(|span| age >= span.duration())
    }

    pub(super) fn has(&self) -> Vec<Has> {
        let state = self.state();
        let has = |granted: &Granted| Has {
            sandbox: self.id.clone(),
            grant: granted.name.clone(),
            kind: granted.grant.kind,
            host: granted.grant.host.to_string(),
            uses: state.uses.get(&granted.name).copied().unwrap_or_default(),
            open: state.open.values().filter(|open| open.grant == granted.name).count() as u64,
            revoked: state.revoked.contains(&granted.name) || self.expired(granted),
        };
        self.granted.iter().map(has).collect()
    }

    /// Where a connection on `grant` goes, and that it was counted.
    pub(super) fn book(&self, grant: &Name) -> Result<SocketAddr, &'static str> {
        let granted =
            self.granted.iter().find(|granted| granted.name == *grant).ok_or("it is not granted")?;
        let expired = self.expired(granted);
        let mut state = self.state();
        if state.revoked.contains(grant) {
            return Err("the grant was revoked");
        }
        if expired {
            return Err("the grant has expired");
        }
        if state.open.len() + state.making >= OPEN_MAX {
            return Err("too many connections are open");
        }
        let uses = state.uses.entry(grant.clone()).or_default();
        if granted.grant.uses.is_some_and(|most| *uses >= most) {
            return Err("the grant is used up");
        }
        let upstream = granted.grant.upstream.ok_or("it has no upstream")?;
        *uses += 1;
        state.making += 1;
        Ok(upstream)
    }
}

pub(super) fn boot_clock() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.try_into().unwrap_or_default())
}

/// Cuts what has expired, for as long as the sandbox is there.
pub(super) async fn cut_when_expired(gate: std::sync::Weak<Gate>) {
    while let Some(gate) = gate.upgrade() {
        let expired =
            |granted: &&Granted| gate.expired(granted) && !gate.state().revoked.contains(&granted.name);
        let expired: Vec<Name> =
            gate.granted.iter().filter(expired).map(|granted| granted.name.clone()).collect();
        for name in expired {
            gate.cut(&name);
        }
        drop(gate);
        tokio::time::sleep(EXPIRY_PAUSE).await;
    }
}
