//! What `io.broker.Control` says, as types. The interface's own file, `io.broker.Control.varlink`, is what peers see.

use sandbox::{ByteSize, Count, Cpus, EnvName, PolicyName, Span};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::grant::{GrantId, Kind, Name, Narrowing};

/// The interface as it is served by `org.varlink.service.GetInterfaceDescription`.
pub const DESCRIPTION: &str = include_str!("io.broker.Control.varlink");
/// Its name.
pub const INTERFACE: &str = "io.broker.Control";

/// What is spoken at a door.
pub const GRANT_INTERFACE: &str = "io.broker.Grant";

/// Parameters of `Run`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// A policy by name.
    pub policy: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Variables, nothing else is inherited.
    pub environment: Vec<Variable>,
    /// The caller's `$PATH`.
    pub path: String,
    /// Its standard streams.
    pub streams: Streams,
    /// What is mounted at `/workspace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Directory>,
    /// What is tighter than the policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Grants of the configuration by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<Name>,
}

/// What becomes the standard streams: positions of descriptors; `/dev/null` where there is none.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Streams {
    /// Standard input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<usize>,
    /// Standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<usize>,
    /// Standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<usize>,
}

impl Streams {
    /// In the order of their numbers.
    pub fn each(&self) -> [Option<usize>; 3] {
        [self.input, self.output, self.error]
    }
}

/// Parameters of `Provision`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provision {
    /// A policy by name.
    pub policy: String,
    /// Variables for every command in it.
    pub environment: Vec<Variable>,
    /// The caller's `$PATH`.
    pub path: String,
    /// What is mounted at `/workspace`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<Directory>,
    /// What is tighter than the policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Grants of the configuration by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<Name>,
    /// It lives on without a handle until nobody has used it for as long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<Span>,
}

/// A reply to `Provision` and `Handle`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Provisioned {
    /// The sandbox's name.
    pub sandbox: String,
    /// The position of its handle.
    pub handle: usize,
}

/// Parameters of `Execute`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Execute {
    /// The position of the handle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handle: Option<usize>,
    /// Instead of a handle: one of the caller's own by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// The caller's name for what it does.
    pub effect: String,
    /// The command and its arguments.
    pub command: Vec<String>,
    /// Variables, beside those of the sandbox.
    pub environment: Vec<Variable>,
    /// The caller's `$PATH`.
    pub path: String,
    /// Its standard streams.
    pub streams: Streams,
}

/// A reply to `Execute`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Executed {
    /// The sandbox's name.
    pub sandbox: String,
    /// How far it is.
    pub state: Progress,
    /// How it ended, once it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Value>,
}

/// Parameters of `HandOver`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandOver {
    /// The position of the handle.
    pub handle: usize,
    /// How the next holder gets it.
    pub mode: Taking,
}

/// How another principal gets a sandbox whose handle it was passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Taking {
    /// What runs in it is ended; the same files get new namespaces.
    Fresh,
    /// As it runs.
    Live,
}

/// Parameters of `Narrow`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Narrow {
    /// The session that the channel is for.
    pub session: String,
    /// What may be asked for on it.
    pub policies: Vec<PolicyName>,
    /// Which grants sandboxes may have that are asked for on it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub grants: Vec<Name>,
}

/// A reply to `Narrow`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Minted {
    /// The position of the channel.
    pub channel: usize,
}

/// A reply to `Inspect`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Inspected {
    /// As it is listed.
    pub sandbox: Sandbox,
    /// What runs in it, where it lives on.
    pub running: Vec<Running>,
}

/// A command that runs in a sandbox that lives.
#[derive(Debug, Serialize, Deserialize)]
pub struct Running {
    /// Its caller's name for it.
    pub effect: String,
}

/// A reply to `Metrics`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    /// In Prometheus' text format.
    pub text: String,
}

/// Parameters of `Records`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordsFrom {
    /// The first that is wanted.
    pub from: u64,
}

/// A reply to `Records`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Recorded {
    /// Oldest first.
    pub records: Vec<Value>,
}

/// How far a command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// This call has begun it.
    Started,
    /// An earlier call has begun it, and it has not ended.
    Running,
    /// It has ended.
    Finished,
}

/// One variable.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variable {
    /// Its name.
    pub name: EnvName,
    /// Its value.
    pub value: String,
}

/// A directory that the caller has opened.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Directory {
    /// The position of its descriptor.
    pub descriptor: usize,
    /// What reports call it.
    pub name: String,
    /// How it is mounted.
    pub mode: Mode,
}

/// How a workspace is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Read-only.
    Ro,
    /// Writable.
    Rw,
    /// Writable inside; what was written is kept apart, until the caller has it or has it thrown away.
    Cow,
}

/// What a sandbox changed in a workspace of mode `cow`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The sandbox's name.
    pub sandbox: String,
    /// Whose it was.
    pub uid: u32,
    /// With which group.
    pub gid: u32,
    /// For which of its sessions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// Milliseconds since 1970: the workspace as it was then is what was changed.
    pub since_ms: u64,
    /// What the caller called the workspace.
    pub workspace: String,
    /// What the policy protects in it.
    pub protect: Vec<String>,
}

/// A reply to `Changes`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Shown {
    /// What they are.
    pub held: Held,
    /// The position of the directory that holds them.
    pub directory: usize,
}

/// A reply to `ListChanges`.
#[derive(Debug, Serialize, Deserialize)]
pub struct AllHeld {
    /// All of the caller's.
    pub held: Vec<Held>,
}

/// Limits that may only tighten the policy's.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Wall-clock time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    /// Processes and threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<Count>,
    /// Processor time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Cpus>,
}

/// A reply to `Run`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ran {
    /// The sandbox's name.
    pub sandbox: String,
    /// With the last reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Value>,
}

/// Parameters of methods that name a sandbox.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Its name.
    pub sandbox: String,
}

/// Parameters of `Signal`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signal {
    /// Its name.
    pub sandbox: String,
    /// As in signal(7).
    pub signal: i32,
    /// The command that it is for, where the sandbox lives on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<String>,
}

/// A sandbox that lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its name.
    pub id: String,
    /// The policy's name.
    pub policy: String,
    /// Who asked for it.
    pub uid: u32,
    /// For which of its sessions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<String>,
    /// What runs in it.
    pub command: Vec<String>,
    /// Milliseconds since 1970.
    pub started_ms: u64,
}

/// A reply to `List`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sandboxes {
    /// All that the caller may know of.
    pub sandboxes: Vec<Sandbox>,
}

/// Why a request was denied. The codes are stable: scripts and the audit record depend on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The configuration does not give the caller this policy, or there is none of that name.
    PolicyNotGranted,
    /// A wish is wider than the policy, or cannot be carried out at all.
    NotNarrower,
    /// A descriptor is not there, or is none that may go in.
    Descriptor,
    /// The caller has as many sandboxes or connections as it may have.
    TooMany,
    /// The act could not be recorded.
    Audit,
    /// The signal is none that is passed on.
    Signal,
    /// The configuration does not give the caller this right.
    NotYours,
    /// The sandbox still lives.
    Lives,
    /// The configuration does not give the caller this grant, or there is none of that name.
    GrantNotGranted,
    /// Two grants answer at one place, or the vault lacks what one needs.
    Grant,
}

/// A grant that a sandbox has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Has {
    /// The sandbox.
    pub sandbox: String,
    /// The grant.
    pub grant: GrantId,
    /// What is spoken.
    pub kind: Kind,
    /// The name that the workload uses.
    pub host: String,
    /// How many connections were made on it.
    pub uses: u64,
    /// How many are open.
    pub open: u64,
    /// Whether it was revoked, or has expired.
    pub revoked: bool,
}

/// A reply to `ListGrants`.
#[derive(Debug, Serialize, Deserialize)]
pub struct AllGrants {
    /// All that the caller may know of.
    pub grants: Vec<Has>,
}

/// Parameters of `Derive`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Derive {
    /// A grant of the configuration.
    pub grant: Name,
    /// By how much it is made narrower.
    #[serde(default)]
    pub by: Option<Narrowing>,
}

/// A reply to `Derive`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Derived {
    /// The grant's own name.
    pub grant: GrantId,
    /// Under which name, in the place of a sandbox's, it is listed.
    pub held: String,
    /// The position of the door.
    pub door: usize,
}

/// Parameters of `Revoke`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// The grant, and all that was derived from it.
    pub grant: GrantId,
    /// Of this sandbox alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

/// A reply to `Revoke`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Revoked {
    /// How many sandboxes had it.
    pub sandboxes: u64,
    /// How many connections were cut.
    pub connections: u64,
}

/// Parameters of `AddCredential`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddCredential {
    /// Its name in the store.
    pub name: Name,
    /// The position of a pipe that it can be read from.
    pub secret: usize,
}

/// Parameters of `RemoveCredential`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveCredential {
    /// Its name in the store.
    pub name: Name,
}

/// A reply to `ListCredentials`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Credentials {
    /// Names in the store. What they stand for never comes out.
    pub names: Vec<Name>,
}

/// A denial: the code, and for people why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Stable.
    pub code: Code,
    /// In words.
    pub message: String,
}

impl Denial {
    /// What cannot be recorded is not done.
    pub fn not_recorded() -> Denial {
        Denial::new(Code::Audit, "the act cannot be recorded, so it is not done")
    }

    /// A right that the configuration does not give.
    pub fn not_yours(verb: &str) -> Denial {
        Denial::new(Code::NotYours, format!("the right `{verb}` is not yours; the administrator grants it"))
    }

    /// With a message.
    pub fn new(code: Code, message: impl Into<String>) -> Denial {
        Denial { code, message: message.into() }
    }
}
