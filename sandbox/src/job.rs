//! One run: what is to be run, narrowed by what was asked for.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::policy::{ByteSize, Count, Cpus, EnvName, Limits, Policy, Span};

/// What is asked for, on top of a policy. Nothing in here can widen it.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// A directory to mount at `/workspace`.
    pub workspace: Option<WorkspaceWish>,
    /// Environment variables with their values.
    pub env: Vec<(EnvName, OsString)>,
    /// A tighter deadline.
    pub timeout: Option<Span>,
    /// Less memory.
    pub memory: Option<ByteSize>,
    /// Fewer processes.
    pub pids: Option<Count>,
    /// Less processor time.
    pub cpus: Option<Cpus>,
    /// What each standard stream is.
    pub streams: [Stream; 3],
    /// Whether a pseudo-terminal takes the place of the streams.
    pub terminal: Terminal,
    /// What is to be heard of its network; nothing where nobody listens.
    pub network: Option<Network>,
}

/// What a workload is told of who listens on its network ([`crate::make_ear`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The certificate of the only authority that is trusted inside (PEM), where TLS is spoken there.
    pub authority: Option<String>,
    /// What can be asked for through descriptor 3, by name.
    pub grants: Vec<String>,
}

/// A workspace and how it is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceWish {
    /// The directory on the host.
    pub directory: PathBuf,
    /// How.
    pub mode: WorkspaceMode,
}

/// How a workspace is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkspaceMode {
    /// Cannot be written.
    ReadOnly,
    /// Can be written; what is written belongs to the workspace's owner.
    ReadWrite,
    /// Can be written inside; the workspace stays as it is, and what was written is kept beside it.
    CopyOnWrite,
}

/// What one of the caller's standard streams is, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// A pipe: can be handed in.
    Pipe,
    /// `/dev/null`: can be handed in.
    #[default]
    Null,
    /// A terminal, file, socket or anything else: is relayed.
    Other,
    /// Not open: `/dev/null` takes its place.
    Closed,
}

/// Whether the run gets a pseudo-terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Terminal {
    /// No; the streams are pipes.
    #[default]
    None,
    /// A fresh one.
    Fresh,
}

/// A policy and the wishes, narrowed to what both allow.
#[derive(Debug, Clone)]
pub struct Job {
    pub(crate) wishes: Wishes,
    pub(crate) limits: Limits,
}

/// Why the wishes cannot be granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NarrowError {
    /// There is no command.
    NoCommand,
    /// A limit was asked for that is wider than the policy's.
    Wider {
        /// Which.
        limit: &'static str,
        /// As asked for.
        asked: String,
        /// As the policy says.
        policy: String,
    },
    /// An argument or a variable holds a NUL byte, which execve(2) cannot carry.
    Nul {
        /// What holds it.
        what: &'static str,
    },
}

impl fmt::Display for NarrowError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NarrowError::NoCommand => out.write_str("no command was given"),
            NarrowError::Wider { limit, asked, policy } => {
                write!(
                    out,
                    "{limit} {asked} is more than the policy's {policy}; ask for less, or use another policy"
                )
            }
            NarrowError::Nul { what } => write!(out, "{what} holds a NUL byte"),
        }
    }
}

impl std::error::Error for NarrowError {}

impl Job {
    /// The wishes as far as `policy` allows them.
    ///
    /// # Errors
    /// When a wish is wider than the policy, or cannot be carried out at all.
    pub fn narrow(policy: &Policy, wishes: Wishes) -> Result<Job, NarrowError> {
        if wishes.command.is_empty() {
            return Err(NarrowError::NoCommand);
        }
        let has_nul = |text: &OsString| text.as_encoded_bytes().contains(&0);
        if wishes.command.iter().any(has_nul) {
            return Err(NarrowError::Nul { what: "an argument" });
        }
        if wishes.env.iter().any(|(_, value)| has_nul(value)) {
            return Err(NarrowError::Nul { what: "an environment variable" });
        }
        let base = &policy.file().limits;
        let limits = Limits {
            memory: tighter("memory", base.memory, wishes.memory)?,
            pids: tighter("pids", base.pids, wishes.pids)?,
            cpus: tighter("cpus", base.cpus, wishes.cpus)?,
            timeout: tighter("timeout", base.timeout, wishes.timeout)?,
            ..base.clone()
        };
        Ok(Job { wishes, limits })
    }
}

fn tighter<T>(limit: &'static str, policy: Option<T>, wish: Option<T>) -> Result<Option<T>, NarrowError>
where
    T: PartialOrd + fmt::Display + Copy,
{
    match (policy, wish) {
        (Some(policy), Some(asked)) if asked > policy => {
            Err(NarrowError::Wider { limit, asked: asked.to_string(), policy: policy.to_string() })
        }
        (policy, wish) => Ok(wish.or(policy)),
    }
}
