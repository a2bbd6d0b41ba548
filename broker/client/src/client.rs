//! The daemon's clients: `broker exec`, `ps`, `kill`. Blocking; one call after the other.

use std::io::{self, BufRead, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::protocol::INTERFACE;
use crate::rights;
use crate::wire::{DESCRIPTORS_MAX, Reply};

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

/// Why there is no answer, or not the one that was wanted.
#[derive(Debug)]
pub enum ClientError {
    /// The socket failed, or the daemon went away.
    Socket(io::Error),
    /// The daemon said no: the error's name without its interface, and what is known of it.
    Refused {
        /// `Denied`, `NotStarted`, ...
        name: String,
        /// Its parameters.
        parameters: Value,
    },
}

impl std::fmt::Display for ClientError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ClientError::Socket(error) => write!(out, "the daemon: {error}"),
            ClientError::Refused { name, parameters } => {
                match (parameters["message"].as_str(), name.as_str()) {
                    (Some(message), "Denied") => {
                        write!(out, "denied ({}): {message}", parameters["code"].as_str().unwrap_or_default())
                    }
                    (Some(message), _) => out.write_str(message),
                    (None, "NoSuchSandbox") => write!(
                        out,
                        "no sandbox {} that you may know of; `broker ps` lists those that live, `broker diff` those whose changes are held",
                        parameters["sandbox"].as_str().unwrap_or_default()
                    ),
                    (None, name) => write!(out, "the daemon answers {name}: {parameters}"),
                }
            }
        }
    }
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> ClientError {
        ClientError::Socket(error)
    }
}

impl Client {
    /// To the daemon that listens at `socket`.
    pub fn connect(socket: &Path) -> io::Result<Client> {
        Ok(Client { stream: BufReader::new(UnixStream::connect(socket)?) })
    }

    /// How long a reply is waited for; for ever where nothing is said. The next reply can be waited for again.
    ///
    /// # Errors
    /// As setsockopt(2).
    pub fn wait_for(&self, limit: Option<std::time::Duration>) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(limit)
    }

    /// One call, one reply.
    pub fn call<T: DeserializeOwned>(
        &mut self,
        method: &str,
        parameters: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.send(method, parameters, false, &[])?;
        Ok(self.reply()?.0)
    }

    /// On a connection that was handed over.
    pub fn on(stream: UnixStream) -> Client {
        Client { stream: BufReader::new(stream) }
    }

    /// One call, one reply that hands one descriptor over.
    pub fn call_for_descriptor<T: DeserializeOwned>(
        &mut self,
        method: &str,
        parameters: &impl Serialize,
    ) -> Result<(T, OwnedFd), ClientError> {
        self.call_with(method, parameters, &[])
    }

    /// The same, of a call that hands descriptors over too.
    pub fn call_with<T: DeserializeOwned>(
        &mut self,
        method: &str,
        parameters: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(T, OwnedFd), ClientError> {
        self.send(method, parameters, false, descriptors)?;
        let mut begin = [0; 4096];
        // It rides on the first byte; the rest may come in pieces.
        let received = rights::receive(self.stream.get_ref(), &mut begin, RecvFlags::empty())?;
        let mut bytes = begin[..received.bytes].to_vec();
        if bytes.last().is_some_and(|last| *last != 0) {
            self.stream.read_until(0, &mut bytes)?;
        }
        let (reply, _) = parsed(bytes)?;
        let descriptor = received.descriptors.into_iter().next();
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "it handed nothing over");
        Ok((reply, descriptor.ok_or_else(missing)?))
    }

    /// Sends a call; `more` asks for several replies.
    pub fn send(
        &mut self,
        method: &str,
        parameters: &impl Serialize,
        more: bool,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let call =
            json!({ "method": format!("{INTERFACE}.{method}"), "parameters": parameters, "more": more });
        let mut bytes = serde_json::to_vec(&call)?;
        bytes.push(0);
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let stream = self.stream.get_ref();
        let sent = sendmsg(stream.as_fd(), &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        // The descriptors went with the first byte; the rest is only bytes.
        io::Write::write_all(&mut &*stream, &bytes[sent..])
    }

    /// The next reply, and whether another follows.
    pub fn reply<T: DeserializeOwned>(&mut self) -> Result<(T, bool), ClientError> {
        let mut bytes = Vec::new();
        self.stream.read_until(0, &mut bytes)?;
        parsed(bytes)
    }
}

/// A whole reply, and whether another follows.
fn parsed<T: DeserializeOwned>(mut bytes: Vec<u8>) -> Result<(T, bool), ClientError> {
    if bytes.pop() != Some(0) {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it went away before it answered").into());
    }
    let Reply { parameters, continues, error } =
        serde_json::from_slice::<Reply<Value>>(&bytes).map_err(io::Error::from)?;
    match error {
        Some(name) => {
            let name = name.rsplit('.').next().unwrap_or_default().to_owned();
            Err(ClientError::Refused { name, parameters })
        }
        None => Ok((serde_json::from_value(parameters).map_err(io::Error::from)?, continues)),
    }
}
