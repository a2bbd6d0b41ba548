//! A Varlink connection of the daemon: what [`crate::wire`] says, on a socket.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use passfd::FdPassingExt;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::RecvFlags;
use serde::Serialize;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::rights::{self, Received};
use crate::wire::{Assembler, Breach, Reply};

/// How long a peer may take to finish a message that it has begun, and to take one of ours.
pub const PATIENCE: Duration = Duration::from_secs(5);
const PIECE_BYTES: usize = 8192;

/// Why a connection ends.
#[derive(Debug)]
pub enum End {
    /// The peer has closed it.
    Closed,
    /// The peer broke the protocol.
    Breach(Breach),
    /// The peer was too slow, or the socket failed.
    Failed,
}

impl From<Breach> for End {
    fn from(breach: Breach) -> End {
        End::Breach(breach)
    }
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    assembler: Assembler<Foreign>,
    /// The call at hand wants no reply.
    pub quiet: bool,
}

impl Connection {
    /// On a socket that was accepted.
    pub fn new(stream: UnixStream) -> Connection {
        Connection { stream, assembler: Assembler::default(), quiet: false }
    }

    /// Ends it for the peer, whoever else still has a copy of our end (shutdown(2)).
    pub fn hang_up(&self) {
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
    }

    /// The next message and its descriptors.
    pub async fn receive(&mut self) -> Result<(Vec<u8>, Vec<Foreign>), End> {
        loop {
            if let Some(message) = self.assembler.take_message()? {
                return Ok(message);
            }
            if self.assembler.is_torn() {
                timeout(PATIENCE, self.fill()).await.map_err(|_| End::Failed)??;
            } else {
                self.fill().await?;
            }
        }
    }

    /// Returns only when the peer has gone, or has said more than anybody has to listen to meanwhile.
    pub async fn gone(&mut self) -> End {
        loop {
            if let Err(end) = self.fill().await {
                return end;
            }
            if self.assembler.is_overfull() {
                return End::Breach(Breach::TooLong);
            }
        }
    }

    /// Reads once. Nothing is lost where this is given up.
    async fn fill(&mut self) -> Result<(), End> {
        let mut piece = [0_u8; PIECE_BYTES];
        let read = self.stream.async_io(Interest::READABLE, || read_once(&self.stream, &mut piece));
        let (length, descriptors) = read.await.map_err(|error| match error.raw_os_error() {
            Some(libc::ECONNRESET) => End::Closed,
            Some(libc::EMSGSIZE) => End::Breach(Breach::TooManyDescriptors),
            _ => End::Failed,
        })?;
        if length == 0 {
            return Err(if self.assembler.is_torn() { End::Breach(Breach::Torn) } else { End::Closed });
        }
        self.assembler.take(&piece[..length], descriptors)?;
        Ok(())
    }

    /// Sends a reply that hands `descriptor` over, on its first byte. What was said before has been read by then: a peer that
    /// does not read has at most one descriptor of ours in flight.
    pub async fn hand_over<T: Serialize>(&self, parameters: T, descriptor: OwnedFd) -> Result<(), End> {
        let reply = Reply { parameters, continues: false, error: None };
        let mut bytes = serde_json::to_vec(&reply).map_err(|_| End::Failed)?;
        bytes.push(0);
        match timeout(PATIENCE, hand_over(&self.stream, &bytes, &descriptor)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(End::Failed),
        }
    }

    /// Sends a reply.
    pub async fn reply<T: Serialize>(&self, parameters: T, continues: bool) -> Result<(), End> {
        self.send(&Reply { parameters, continues, error: None }).await
    }

    /// Sends an error, `interface.Name`.
    pub async fn error<T: Serialize>(&self, name: String, parameters: T) -> Result<(), End> {
        self.send(&Reply { parameters, continues: false, error: Some(name) }).await
    }

    async fn send<T: Serialize>(&self, reply: &Reply<T>) -> Result<(), End> {
        if self.quiet {
            return Ok(());
        }
        let mut bytes = serde_json::to_vec(reply).map_err(|_| End::Failed)?;
        bytes.push(0);
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            let written = self.stream.async_io(Interest::WRITABLE, || self.stream.try_write(left));
            let written = timeout(PATIENCE, written).await;
            let count = written.map_err(|_| End::Failed)?.map_err(|error| {
                if error.kind() == io::ErrorKind::BrokenPipe { End::Closed } else { End::Failed }
            })?;
            left = &left[count..];
        }
        Ok(())
    }
}

/// Sends `bytes` with `descriptor` on their first byte, once what was said before has been read. The caller says how long that may take.
///
/// # Errors
/// As sendmsg(2).
pub async fn hand_over(to: &UnixStream, bytes: &[u8], descriptor: &OwnedFd) -> io::Result<()> {
    while sandbox::unread_by_peer(to).is_ok_and(|unread| unread > 0) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (socket, number) = (to.as_raw_fd(), descriptor.as_raw_fd());
    to.async_io(Interest::WRITABLE, || socket.send_fd_with_payload(number, bytes)).await
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A descriptor that a peer has sent. But for pipes and what was opened with `O_PATH`, it is closed where nobody waits: close(2) can
/// take as long as the peer likes (a socket that lingers), or whoever serves the file.
#[derive(Debug)]
pub struct Foreign(Option<OwnedFd>);

impl AsFd for Foreign {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Some(descriptor) => descriptor.as_fd(),
            // Taken only while it is dropped; then it names nothing that could be read.
            None => rustix::fs::CWD,
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let Some(descriptor) = self.0.take() else { return };
        if !rights::is_pipe(&descriptor) && !rights::is_path(&descriptor) {
            tokio::task::spawn_blocking(move || drop(descriptor));
        }
    }
}

fn read_once(stream: &UnixStream, piece: &mut [u8]) -> io::Result<(usize, Vec<Foreign>)> {
    let Received { bytes, descriptors } = rights::receive(stream, piece, RecvFlags::DONTWAIT)?;
    Ok((bytes, descriptors.into_iter().map(|own| Foreign(Some(own))).collect()))
}
