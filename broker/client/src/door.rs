//! A door: a `SOCK_SEQPACKET` socket whose holder asks for private connections on grants (`io.broker.Grant`).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags};
use serde_json::{Value, json};

use crate::protocol::GRANT_INTERFACE;
use crate::rights::{self, Received};

/// The longest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// A door that is held. Blocking; asked by one at a time.
#[derive(Debug)]
pub struct Door(OwnedFd);

impl From<OwnedFd> for Door {
    fn from(door: OwnedFd) -> Door {
        Door(door)
    }
}

impl Door {
    /// A private connection on a grant; on the only one of this door where none is named.
    ///
    /// # Errors
    /// `BrokenPipe` and `UnexpectedEof` where the door is dead: revoked, expired, or its gateway gone. `PermissionDenied` with the
    /// reason where the connection is refused.
    pub fn open(&self, grant: Option<&str>) -> io::Result<UnixStream> {
        let parameters = grant.map_or_else(|| json!({}), |grant| json!({ "grant": grant }));
        let call = json!({ "method": format!("{GRANT_INTERFACE}.Open"), "parameters": parameters });
        rustix::net::send(&self.0, call.to_string().as_bytes(), SendFlags::NOSIGNAL)?;
        let mut answer = vec![0; ANSWER_BYTES_MAX];
        let Received { bytes, descriptors } = rights::receive(&self.0, &mut answer, RecvFlags::empty())?;
        if bytes == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the grant has ended"));
        }
        let said: Value =
            serde_json::from_slice(answer[..bytes].strip_suffix(&[0]).unwrap_or(&answer[..bytes]))?;
        match descriptors.into_iter().next() {
            Some(connection) if said["error"].is_null() => Ok(connection.into()),
            _ => {
                let why = said["parameters"]["message"].as_str().unwrap_or("it is refused").to_owned();
                Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
            }
        }
    }
}
