//! Who asks: peers of the listening socket by the kernel's word, and holders of narrower channels that those have minted.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};

use super::Core;
use super::grants::may_have;
use crate::connection::{Connection, End};
use crate::protocol::{Code, Denial, Minted, Narrow, Sandbox};
use crate::say::complain;
use crate::serve::config::{Peer, Rights, Verb};

/// What one uid may have at the same time, and all together.
const CONNECTIONS_MAX: usize = 64;
const CONNECTIONS_ALL_MAX: usize = 1024;
/// What those whom the configuration gives nothing may have, all together.
const STRANGERS_MAX: usize = 256;
/// The longest name of a session, with those above it, in bytes.
const SESSION_BYTES_MAX: usize = 200;

/// Who asks, and with what rights.
pub(super) struct Asker {
    pub peer: Peer,
    pub rights: Rights,
    /// The session that a narrower channel was minted for.
    pub session: Option<String>,
    /// Of a narrower channel, the socket that who minted it first connected with.
    pub origin: Option<Arc<OwnedFd>>,
}

/// Whose a sandbox is: a user, or one of its sessions. What runs in a sandbox is no other principal's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Principal {
    pub uid: u32,
    pub session: Option<String>,
}

impl Principal {
    /// Who did what a record tells of.
    pub fn of(event: &Value) -> Principal {
        let uid = event["uid"].as_u64().and_then(|uid| u32::try_from(uid).ok());
        Principal { uid: uid.unwrap_or(u32::MAX), session: event["session"].as_str().map(str::to_owned) }
    }
}

impl Asker {
    pub fn principal(&self) -> Principal {
        Principal { uid: self.peer.uid, session: self.session.clone() }
    }

    /// Whether `sandbox` is the asker's own. A user's own connection sees all of its sessions', a session's channel those of
    /// that session and of the ones below it.
    pub fn owns(&self, sandbox: &Sandbox) -> bool {
        let below = |own: &str| {
            let of = sandbox.session.as_deref().unwrap_or_default();
            of.strip_prefix(own).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        sandbox.uid == self.peer.uid && self.session.as_deref().is_none_or(below)
    }

    /// The socket that says who asks, to whoever asks the kernel; `connection` is the asker's.
    pub fn socket<'a>(&'a self, connection: &'a Connection) -> BorrowedFd<'a> {
        self.origin.as_ref().map_or_else(|| connection.as_fd(), |origin| origin.as_fd())
    }

    /// The beginning of a record of what this asker did.
    pub fn event(&self, kind: &str) -> Value {
        let mut event = json!({ "kind": kind, "uid": self.peer.uid });
        if let Some(session) = &self.session {
            event["session"] = session.as_str().into();
        }
        event
    }
}

pub(super) async fn accept(core: Arc<Core>, listener: UnixListener) -> io::Result<()> {
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            // Out of descriptors: those who wait are served when somebody goes.
            Err(error) => {
                complain!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(peer) = peer(&stream) else { continue };
        let rights = core.config.rights(peer, &core.accounts);
        if core.enter(peer, &rights) {
            let connection = Connection::new(stream);
            let asker = Asker { peer, rights, session: None, origin: None };
            tokio::spawn(Arc::clone(&core).attend(connection, asker));
        }
    }
}

/// By the kernel's word at connect(2), never by the peer's.
pub(super) fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let found = stream.peer_cred()?;
    Ok(Peer { uid: found.uid(), gid: found.gid() })
}

impl Core {
    /// Serves one connection that has entered, to its end. The type is written out because one of its calls makes another.
    fn attend(
        self: Arc<Self>,
        mut connection: Connection,
        asker: Asker,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let end = self.converse(&mut connection, &asker).await;
            connection.hang_up();
            drop(connection);
            self.leave(asker.peer);
            if let End::Breach(breach) = end {
                self.breach(&asker, &breach).await;
            }
        })
    }

    fn enter(&self, peer: Peer, rights: &Rights) -> bool {
        let mut table = self.table();
        let all: usize = table.connections.values().sum();
        let strangers: usize = table.strangers.iter().filter_map(|uid| table.connections.get(uid)).sum();
        let stranger = *rights == Rights::default();
        let room =
            if stranger { strangers < STRANGERS_MAX } else { all < CONNECTIONS_ALL_MAX || peer.uid == 0 };
        let own = table.connections.get(&peer.uid).copied().unwrap_or_default();
        if !room || own >= CONNECTIONS_MAX {
            return false;
        }
        table.connections.insert(peer.uid, own + 1);
        if stranger {
            table.strangers.insert(peer.uid);
        }
        true
    }

    fn leave(&self, peer: Peer) {
        let mut table = self.table();
        if let Some(own) = table.connections.get_mut(&peer.uid) {
            *own -= 1;
            if *own == 0 {
                table.connections.remove(&peer.uid);
                table.strangers.remove(&peer.uid);
            }
        }
    }

    /// Mints a channel for a session of the asker's, with no more rights than were asked for and the asker has.
    pub(super) async fn narrow(
        self: &Arc<Self>,
        connection: &mut Connection,
        asker: &Asker,
        wish: Narrow,
    ) -> Result<(), End> {
        let session = match below(asker.session.as_deref(), &wish.session) {
            Ok(session) => session,
            Err(denial) => return self.deny(connection, asker, "Narrow", denial).await,
        };
        let rights = asker.rights.narrowed(&wish.policies, &wish.grants);
        if let Some(policy) = wish.policies.iter().find(|policy| !rights.may_use(policy)) {
            let message = format!("policy {:?} is not yours to pass on", policy.as_str());
            let denial = Denial::new(Code::PolicyNotGranted, message);
            return self.deny(connection, asker, "Narrow", denial).await;
        }
        let allowed = may_have(&wish.grants, &asker.rights, &self.config)
            .and_then(|()| self.not_revoked(asker, &wish.grants));
        if let Err(denial) = allowed {
            return self.deny(connection, asker, "Narrow", denial).await;
        }
        // Whoever has minted it: a channel with no right of its own is no stranger's.
        if !self.enter(asker.peer, &self.config.rights(asker.peer, &self.accounts)) {
            let denial =
                Denial::new(Code::TooMany, format!("{CONNECTIONS_MAX} connections are yours already"));
            return self.deny(connection, asker, "Narrow", denial).await;
        }
        let Ok(origin) = asker.socket(connection).try_clone_to_owned() else {
            self.leave(asker.peer);
            return Err(End::Failed);
        };
        let origin = Some(Arc::new(origin));
        let minted = Asker { peer: asker.peer, rights, session: Some(session), origin };
        let mut event = minted.event("derive");
        event["policies"] = json!(wish.policies);
        if !wish.grants.is_empty() {
            event["grants"] = json!(wish.grants);
        }
        if !self.audit.record(event).await {
            self.leave(asker.peer);
            return self.deny(connection, asker, "Narrow", Denial::not_recorded()).await;
        }
        let Ok((ours, theirs)) = UnixStream::pair() else {
            self.leave(asker.peer);
            return Err(End::Failed);
        };
        tokio::spawn(Arc::clone(self).attend(Connection::new(ours), minted));
        let theirs = theirs.into_std().map_err(|_| End::Failed)?;
        let _ = theirs.set_nonblocking(false);
        connection.hand_over(Minted { channel: 0 }, theirs.into()).await
    }

    /// Whether `asker` may do `verb` with what is not its own.
    pub(super) fn may(asker: &Asker, sandbox: &Sandbox, verb: Verb) -> bool {
        asker.owns(sandbox) || asker.rights.may(verb)
    }
}

/// The name of a session: one word, after those of the sessions above it.
fn below(above: Option<&str>, name: &str) -> Result<String, Denial> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let session = above.map_or_else(|| name.to_owned(), |above| format!("{above}/{name}"));
    if !name.is_empty() && name.bytes().all(plain) && session.len() <= SESSION_BYTES_MAX {
        return Ok(session);
    }
    let message = format!(
        "a session's name has letters, digits, `.`, `_` and `-`, {SESSION_BYTES_MAX} with those above it"
    );
    Err(Denial::new(Code::NotNarrower, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(session: Option<&str>) -> Asker {
        let session = session.map(str::to_owned);
        Asker { peer: Peer { uid: 7, gid: 7 }, rights: Rights::default(), session, origin: None }
    }

    fn sandbox(uid: u32, session: Option<&str>) -> Sandbox {
        let session = session.map(str::to_owned);
        Sandbox { id: "a".into(), policy: "default".into(), uid, session, command: Vec::new(), started_ms: 0 }
    }

    #[test]
    fn a_session_owns_what_is_below_it_and_nothing_beside_it() {
        assert!(asker(None).owns(&sandbox(7, Some("a/b"))) && !asker(None).owns(&sandbox(8, None)));
        let own = asker(Some("a"));
        assert!(own.owns(&sandbox(7, Some("a"))) && own.owns(&sandbox(7, Some("a/b"))));
        for other in [None, Some("ab"), Some("b"), Some("")] {
            assert!(!own.owns(&sandbox(7, other)), "{other:?}");
        }
        assert!(!own.owns(&sandbox(8, Some("a"))));
    }

    #[test]
    fn a_session_s_name_is_a_word_below_its_own() {
        assert_eq!(below(None, "a").as_deref(), Ok("a"));
        assert_eq!(below(Some("a"), "b-1").as_deref(), Ok("a/b-1"));
        for name in ["", "a/b", "ü", "a b", "a\n", &"x".repeat(SESSION_BYTES_MAX + 1)] {
            assert!(below(None, name).is_err(), "{name:?}");
        }
        assert!(below(Some(&"x".repeat(SESSION_BYTES_MAX)), "y").is_err());
    }
}
