//! What the launcher, the core and a sandbox's supervisor say to each other: one `SOCK_SEQPACKET` packet is one message
//! and its descriptors. Nobody else is ever at either end.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::time::Instant;

use rustix::event::Timespec;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::UnixStream;

use super::config::Config;
use super::roles::Role;
use crate::grant::GrantId;
use crate::protocol::{Denial, Held, Run, Sandbox, Variable};
use crate::rights;

/// The longest packet; what a peer may send is cut to fit long before.
pub const PACKET_BYTES_MAX: usize = 160 << 10;
/// Two ends of a channel, one of a handle, three streams, a workspace, the asker's socket, a door.
pub const DESCRIPTORS_MAX: usize = 9;

/// From the launcher to the core.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToCore {
    /// First of all: the configuration, with the sockets that listen: for peers and, where it is wanted, for Prometheus.
    Setup(Config),
    /// Are you there?
    Ping,
    /// End, when what is to be recorded is.
    Stop,
    /// What a sandbox has changed, and nobody has thrown away.
    Held(Held),
    /// A role that waits for work. The descriptor is the line to it.
    Role(Role),
    /// A sandbox that lives already, with the core's end of its channel and, where it has a handle, of that.
    Living {
        /// As it is listed.
        sandbox: Sandbox,
        /// What it is for.
        kind: Kind,
    },
    /// That was all that lives already.
    Told,
}

/// What a sandbox is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One command, whose end is its own.
    Run,
    /// It waits for commands, whoever holds its handle: the kernel's name for the end of it that the caller gets.
    Live {
        /// `socket:[N]`
        handle: String,
    },
    /// It waits for somebody to be made for.
    Warm,
}

/// From the core to the launcher.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToLauncher {
    /// Start a sandbox. Descriptors: the core's end of its channel, the supervisor's, the core's end of its handle where it
    /// lives, then those of the request.
    Start(Box<Start>),
    /// One that was warm is somebody's now; with the core's end of its handle where it lives.
    Assign {
        /// As it is listed.
        sandbox: Sandbox,
        /// What it is for.
        kind: Kind,
    },
    /// Peers are served; or, the answer to a ping.
    Serving,
    /// A signal for its command.
    Signal {
        /// The sandbox.
        id: String,
        /// Its number.
        signal: i32,
    },
    /// End it at once.
    End {
        /// The sandbox.
        id: String,
    },
    /// Show what a sandbox has changed, or throw it away. The descriptor is the line for the answer.
    Errand {
        /// The sandbox.
        id: String,
        /// Which of the two.
        what: Errand,
    },
    /// Start the gateway of a sandbox that is about to be. The descriptor is its line to the core.
    Gateway {
        /// The sandbox.
        id: String,
    },
    /// End it, whatever it does.
    EndGateway {
        /// The sandbox.
        id: String,
    },
    /// The core has recorded how it ended.
    Forget {
        /// The sandbox.
        id: String,
    },
}

/// What is done with what a sandbox has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Errand {
    /// The answer carries its directory.
    Show,
    /// Until nothing of it is left.
    Discard,
}

/// The answer to an errand.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Done {
    /// It is.
    Well,
    /// Why it is not.
    Failed(String),
}

/// What is started.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// As it is listed.
    pub sandbox: Sandbox,
    /// What was asked for; positions count from the request's first descriptor.
    pub run: Run,
    /// What it is for. Where it waits, the command of `run` is none.
    pub kind: Kind,
    /// The position of the socket that the asker connected with: who that is, the kernel says. Nobody asks for a warm one.
    pub asker: Option<usize>,
    /// Who is to listen on its network, where anybody is.
    pub listen: Option<Listen>,
}

/// What listens on a sandbox's network.
#[derive(Debug, Serialize, Deserialize)]
pub struct Listen {
    /// Where, beside the place where names are asked for.
    pub at: Vec<SocketAddr>,
    /// The authority to be trusted inside, PEM.
    pub authority: Option<String>,
    /// The position of the door that every command inside has.
    pub door: usize,
    /// What can be asked for there.
    pub grants: Vec<GrantId>,
}

/// From the core to the supervisor of a sandbox that lives.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToSupervisor {
    /// Run a command in it. The descriptors are its streams.
    Execute {
        /// The core's name for it.
        number: u32,
        /// The command and its arguments.
        command: Vec<String>,
        /// Variables.
        environment: Vec<Variable>,
        /// The caller's `$PATH`.
        path: String,
        /// Which of the standard streams are given.
        streams: [bool; 3],
    },
    /// It was warm: this command is its only one, and its end is the sandbox's.
    Run {
        /// The command and its arguments.
        command: Vec<String>,
        /// Variables.
        environment: Vec<Variable>,
        /// The caller's `$PATH`.
        path: String,
        /// Which of the standard streams are given.
        streams: [bool; 3],
    },
    /// It was warm: these are the variables of every command in it.
    Serve {
        /// Variables.
        environment: Vec<Variable>,
    },
    /// Pass a signal to one of its commands.
    Signal {
        /// The core's name for it.
        number: u32,
        /// As in signal(7).
        signal: i32,
    },
    /// How this command ended is recorded.
    Noted {
        /// The core's name for it.
        number: u32,
    },
    /// Another core is there: say again how those ended that were not recorded.
    Again,
    /// End every process in it, and begin again over the same files.
    Renew,
}

/// From a supervisor to the core.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromSupervisor {
    /// What listens on its network, before anybody is there: where names are asked for, then the others, over several messages.
    Ear {
        /// Nothing follows.
        whole: bool,
    },
    /// The sandbox waits for commands.
    Ready {
        /// The hash of its policy.
        policy: String,
        /// What it changes in its workspace, where that is held apart.
        held: Option<Box<Held>>,
    },
    /// It does so again, and nothing of what ran in it before is left.
    Renewed,
    /// A command in it has ended, or could not be begun.
    Executed {
        /// The core's name for it.
        number: u32,
        /// How.
        outcome: Value,
    },
    /// It ran, and nothing of it is left. The last word.
    Ended {
        /// The report.
        report: Value,
        /// What it changed in its workspace, where that is held apart, and there is anything.
        held: Option<Box<Held>>,
    },
    /// It was not allowed after all. The last word.
    Denied {
        /// Why.
        denial: Denial,
    },
    /// This host could not. The last word.
    NotStarted {
        /// In words.
        message: String,
        /// What there is of a report.
        report: Option<Value>,
    },
}

/// A new channel.
pub fn channel() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends one message; `EAGAIN` where `flags` say not to wait.
pub fn send<T: Serialize>(
    to: impl AsFd,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    send_bytes(to, &serde_json::to_vec(message)?, descriptors, flags)
}

/// As [`send`], of a message that is written already.
pub fn send_bytes(
    to: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    if bytes.len() > PACKET_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    rustix::io::retry_on_intr(|| {
        sendmsg(&to, &[IoSlice::new(bytes)], &mut control, flags | SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// Receives one message; nothing at the end of the channel.
pub fn receive<T: DeserializeOwned>(
    from: impl AsFd,
    flags: RecvFlags,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    receive_into(from, &mut vec![0_u8; PACKET_BYTES_MAX], flags)
}

/// As [`receive`], into memory of the caller's.
pub fn receive_into<T: DeserializeOwned>(
    from: impl AsFd,
    bytes: &mut [u8],
    flags: RecvFlags,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let received = match rights::receive(from, bytes, flags) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => return Ok(None),
        other => other?,
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let descriptors = received.descriptors;
    Ok(Some((serde_json::from_slice(&bytes[..received.bytes])?, descriptors)))
}

/// A channel of packets, to be waited for. tokio has no type of its own for them; it only waits, and never reads or writes.
pub fn packets(channel: OwnedFd) -> io::Result<UnixStream> {
    let channel = std::os::unix::net::UnixStream::from(channel);
    channel.set_nonblocking(true)?;
    UnixStream::from_std(channel)
}

/// From now until `then`, as poll(2) takes it.
pub fn until(then: Instant) -> Timespec {
    let left = then.saturating_duration_since(Instant::now());
    Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() }
}
