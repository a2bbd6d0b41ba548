//! The vault: holds secrets, and gives each to the gateway of a sandbox that has a grant for it, bound to what its own copy of the
//! configuration says of that grant. It opens nothing: files are the launcher's to open. It never forks.

mod store;

use rustix::event::{PollFd, PollFlags, poll};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::SendFlags;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::config::Config;
use super::inner::{send_bytes, until};
use crate::grant::{Grant, Name, Source};
pub use store::{KEY_BYTES, Store};

/// How long whoever sends a secret may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest secret, in bytes.
pub const SECRET_BYTES_MAX: usize = 16 << 10;

/// From the vault to a gateway, on a line that the core made and does not read.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provided {
    /// What the configuration says of the grant, and its secret, if it has one. The descriptor is the host's bundle of authorities.
    Secret {
        /// By the vault's own copy.
        grant: Box<Grant>,
        /// As it is stored.
        secret: Option<Zeroizing<String>>,
    },
    /// It has no such secret.
    Missing {
        /// In words, for the operator.
        why: String,
    },
}

/// What it knows.
#[derive(Default)]
pub struct Vault {
    pub config: Config,
    /// The host's bundle of authorities.
    pub bundle: Option<OwnedFd>,
    /// Of files.
    pub read: BTreeMap<Name, Zeroizing<String>>,
    pub store: Option<Store>,
}

impl Vault {
    /// Answers for `grant`, on `line`.
    pub fn provide(&self, name: &Name, line: &OwnedFd) -> io::Result<()> {
        let answer = match self.config.grant.get(name) {
            None => Provided::Missing { why: "the vault's configuration has no such grant".into() },
            Some(grant) => {
                match grant.credential.as_ref().map(|credential| self.secret(credential)).transpose() {
                    Ok(secret) => Provided::Secret { grant: Box::new(grant.clone()), secret },
                    Err(why) => Provided::Missing { why },
                }
            }
        };
        let bundle: Vec<_> = self.bundle.iter().map(AsFd::as_fd).collect();
        let bytes = Zeroizing::new(serde_json::to_vec(&answer)?);
        send_bytes(line, &bytes, &bundle, SendFlags::DONTWAIT)
    }

    /// Keeps a credential in the store, or forgets it.
    pub fn keep(&mut self, name: &Name, secret: Option<Zeroizing<String>>) -> Result<(), String> {
        let store = self.store.as_mut().ok_or("the store is not there; the service's log says why")?;
        if secret.is_none() && store.get(name).is_none() {
            return Err(format!("there is no credential {name} in the store"));
        }
        store.set(name, secret).map_err(|error| format!("it cannot be kept: {error}"))
    }

    fn secret(&self, credential: &Name) -> Result<Zeroizing<String>, String> {
        let source = self.config.credential.get(credential).map(|credential| &credential.source);
        let found = match source {
            Some(Source::Store(name)) => self.store.as_ref().and_then(|store| store.get(name)),
            Some(_) => self.read.get(credential).cloned(),
            None => None,
        };
        found.ok_or_else(|| match source {
            Some(Source::Store(name)) => {
                format!("credential {credential} is not in the store; `broker credential add {name}` puts it there")
            }
            _ => format!("credential {credential} could not be read; the service's log says why"),
        })
    }
}

/// A secret, read to its end; one newline there is not its own.
///
/// # Errors
/// In words that hold nothing of it.
pub fn read_secret(from: OwnedFd) -> Result<Zeroizing<String>, String> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(SECRET_BYTES_MAX + 1));
    let limit = u64::try_from(SECRET_BYTES_MAX + 1).unwrap_or(u64::MAX);
    let mut from = std::fs::File::from(from).take(limit);
    let then = Instant::now() + PATIENCE;
    loop {
        let mut waits = [PollFd::new(from.get_ref(), PollFlags::IN)];
        if !matches!(poll(&mut waits, Some(&until(then))), Ok(1..)) {
            return Err("the secret does not come".to_owned());
        }
        // Of the room that is there already: what a vector leaves behind as it grows is not wiped.
        let mut piece = Zeroizing::new([0; 4096]);
        match from.read(&mut *piece) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&piece[..count]),
            Err(error) => return Err(format!("it cannot be read: {error}")),
        }
    }
    if bytes.len() > SECRET_BYTES_MAX {
        return Err(format!("the secret is longer than {SECRET_BYTES_MAX} bytes; it is not taken"));
    }
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    // What could end a header, or hide in it, is no secret of ours.
    let fault = if bytes.is_empty() {
        Some("is empty")
    } else if bytes.contains(&b'\r') {
        Some("holds a carriage return; was it saved with DOS line ends?")
    } else if bytes.contains(&b'\n') {
        Some("has more than one line")
    } else if !bytes.iter().all(|byte| (32..127).contains(byte)) {
        Some("holds a byte that is no printable ASCII")
    } else if bytes.first() == Some(&b' ') || bytes.last() == Some(&b' ') {
        Some("begins or ends with a blank")
    } else {
        None
    };
    if let Some(fault) = fault {
        return Err(format!("the secret {fault}; it is not taken"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| "it is no text".to_owned())?;
    Ok(Zeroizing::new(text.to_owned()))
}
