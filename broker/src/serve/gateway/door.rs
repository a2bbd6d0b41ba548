//! A door: where programs that know us ask for private connections on grants, and for narrower doors (`io.broker.Grant`). Nothing can be
//! sent in with a message: it is received without room for descriptors.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::net::{RecvFlags, SendFlags};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::Gateway;
use super::line::{Failure, FromGateway};
use crate::connection::{PATIENCE, hand_over};
use crate::grant::{GrantId, Narrowing};
use crate::protocol::GRANT_INTERFACE;
use crate::serve::inner::packets;
use crate::wire::{self, Call, Reply};

/// The longest message.
const MESSAGE_BYTES_MAX: usize = 16 << 10;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Which {
    grant: Option<GrantId>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Narrower {
    grant: Option<GrantId>,
    by: Option<Narrowing>,
}

/// What goes with an answer.
enum Then {
    Nothing,
    HandOver(OwnedFd),
    Drop(GrantId),
}

/// Serves a door until nobody holds its other end, or somebody breaks its rules.
pub(super) async fn serve(gateway: Rc<Gateway>, number: u64, near: OwnedFd, grants: Vec<GrantId>) {
    if let Ok(socket) = packets(near) {
        let mut message = vec![0; MESSAGE_BYTES_MAX];
        while let Ok(Some(length)) = receive(&socket, &mut message).await {
            let text = message[..length].strip_suffix(&[0]).unwrap_or(&message[..length]);
            let Ok(call) = wire::call(text) else { break };
            let (reply, then) = match answer(&gateway, &grants, &call).await {
                Ok((parameters, then)) => (Reply { parameters, continues: false, error: None }, then),
                Err(error) => {
                    let parameters = json!({ "message": error.to_string() });
                    let error = Some(format!("{GRANT_INTERFACE}.Denied"));
                    (Reply { parameters, continues: false, error }, Then::Nothing)
                }
            };
            let descriptor = if let Then::HandOver(far) = &then { Some(far) } else { None };
            if !matches!(timeout(PATIENCE, send(&socket, &reply, descriptor)).await, Ok(Ok(()))) {
                break;
            }
            // It may be the end of this door.
            if let Then::Drop(grant) = then {
                let _ = gateway.line.say(&FromGateway::Drop { grant }, None).await;
            }
        }
    }
    let _ = gateway.line.say(&FromGateway::DoorClosed { number }, None).await;
    gateway.forget(&grants);
}

/// The length of the next message; nothing at the end, which an empty one is too.
async fn receive(socket: &UnixStream, message: &mut [u8]) -> io::Result<Option<usize>> {
    let read = || rustix::net::recv(socket, &mut *message, RecvFlags::DONTWAIT).map_err(io::Error::from);
    let (length, _) = socket.async_io(Interest::READABLE, read).await?;
    Ok((length > 0).then_some(length))
}

/// At most one descriptor is on its way to whoever does not read.
async fn send(socket: &UnixStream, reply: &Reply<Value>, descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(reply)?;
    bytes.push(0);
    match descriptor {
        Some(far) => hand_over(socket, &bytes, far).await,
        None => {
            let say = || Ok(rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL).map(drop)?);
            socket.async_io(Interest::WRITABLE, say).await
        }
    }
}

async fn answer(
    gateway: &Rc<Gateway>,
    grants: &[GrantId],
    call: &Call<'_>,
) -> Result<(Value, Then), Failure> {
    let which = |named: Option<GrantId>| match (named, grants) {
        (Some(named), _) if grants.contains(&named) => Ok(named),
        (None, [only]) => Ok(only.clone()),
        (Some(named), _) => Err(format!("{named} is no grant of this door")),
        (None, _) => Err("this door has several grants; name one".to_owned()),
    };
    match call.method.strip_prefix(GRANT_INTERFACE).and_then(|method| method.strip_prefix('.')) {
        Some("Open") => {
            let grant = which(parameters::<Which>(call)?.grant)?;
            let far = gateway.open(&grant).await?;
            Ok((json!({ "grant": grant, "connection": 0 }), Then::HandOver(far)))
        }
        Some("Derive") => {
            let Narrower { grant, by } = parameters(call)?;
            let (grant, far) = gateway.line.derive(&which(grant)?, by.unwrap_or_default()).await?;
            Ok((json!({ "grant": grant, "door": 0 }), Then::HandOver(far)))
        }
        Some("Drop") => {
            let grant = which(parameters::<Which>(call)?.grant)?;
            Ok((json!({ "grant": grant }), Then::Drop(grant)))
        }
        _ => Err(format!("{GRANT_INTERFACE} has the methods Open, Derive and Drop").into()),
    }
}

fn parameters<T: DeserializeOwned>(call: &Call<'_>) -> Result<T, serde_json::Error> {
    serde_json::from_str(call.parameters.map_or("{}", |parameters| parameters.get()))
}
