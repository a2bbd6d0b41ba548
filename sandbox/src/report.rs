//! What came of a run.

use serde::{Deserialize, Serialize};

use crate::plan::Plan;
use crate::policy::{Gap, Policy};

/// What came of a run. Its JSON form is what `--report` writes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Who or what ended it.
    pub ended_by: EndedBy,
    /// Each layer: what really was enforced.
    pub enforcement: Enforcement,
    /// What the policy allowed to be missing, and was.
    pub gaps: Vec<Gap>,
    /// What it used.
    pub usage: Usage,
    /// What was refused, as far as the kernel counts it. Refused system calls are not counted.
    pub denials: Denials,
    /// The sandbox's name while it lived.
    pub sandbox: String,
}

impl Report {
    /// The whole report, with the names and SHA-256 hashes of the policy and the plan it came from.
    ///
    /// # Errors
    /// As serde_json; none is known.
    pub fn to_json(&self, policy: &Policy, plan: &Plan) -> serde_json::Result<serde_json::Value> {
        let mut value = serde_json::to_value(self)?;
        value["policy"] = serde_json::json!({ "name": policy.name(), "sha256": policy.hash() });
        value["plan"] = plan.hash().into();
        Ok(value)
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Outcome {
    /// The command ended by itself.
    Exited {
        /// Its status.
        code: i32,
    },
    /// A signal ended the command.
    Signaled {
        /// Its number.
        signal: i32,
    },
    /// It took longer than it may.
    TimedOut,
    /// It wanted more memory than it may have.
    Oom,
    /// The command was found and could not be executed.
    NotExecutable {
        /// Why.
        errno: i32,
    },
    /// The command was not found.
    NotFound,
    /// The sandbox could not be set up.
    SetupFailed {
        /// The stage of the set-up.
        step: String,
        /// What it was about.
        object: String,
        /// Why.
        errno: Option<i32>,
        /// In words.
        message: String,
    },
}

impl Outcome {
    /// The exit status of `broker exec`.
    pub fn exit_status(&self) -> u8 {
        match self {
            Outcome::Exited { code } => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
            Outcome::Signaled { signal } => u8::try_from(128 + signal).unwrap_or(u8::MAX),
            Outcome::TimedOut => 124,
            Outcome::Oom => 137,
            Outcome::SetupFailed { .. } => 125,
            Outcome::NotExecutable { .. } => 126,
            Outcome::NotFound => 127,
        }
    }
}

/// Who or what ended a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndedBy {
    /// Its command, which ended, or could not be executed.
    Command,
    /// The policy's time, or less that was asked for.
    Policy,
    /// A limit on memory.
    Limit,
    /// A signal, from inside or passed on.
    Signal,
    /// The broker: its caller went away, or somebody who may had it ended.
    Broker,
    /// The host, which could not do what was planned.
    Host,
}

impl EndedBy {
    /// What an outcome says of it.
    pub fn of(outcome: &Outcome) -> EndedBy {
        match outcome {
            Outcome::Exited { .. } | Outcome::NotExecutable { .. } | Outcome::NotFound => EndedBy::Command,
            Outcome::TimedOut => EndedBy::Policy,
            Outcome::Oom => EndedBy::Limit,
            Outcome::Signaled { .. } => EndedBy::Signal,
            Outcome::SetupFailed { .. } => EndedBy::Host,
        }
    }
}

/// What was enforced. Nothing starts when a layer that the policy demands is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Enforcement {
    /// Namespaces (namespaces(7)), and who owns them.
    pub namespaces: Vec<&'static str>,
    /// The user that the workload was on the host.
    pub host_uid: Option<u32>,
    /// Mounts under the new root.
    pub mounts: usize,
    /// The Landlock ABI that was enforced in full.
    pub landlock_abi: u8,
    /// The system-call filter: instructions.
    pub seccomp_instructions: usize,
    /// Whether `socket(AF_UNIX)` was there.
    pub unix_sockets: crate::plan::UnixSockets,
    /// Capabilities left.
    pub capabilities: &'static str,
    /// Limits of the whole sandbox.
    pub cgroup: Option<crate::plan::CgroupPlan>,
    /// Limits of each process.
    pub rlimits: Vec<(crate::plan::Rlimit, u64)>,
    /// Milliseconds until SIGTERM.
    pub timeout_ms: Option<u64>,
    /// Milliseconds from SIGTERM to SIGKILL.
    pub grace_ms: u64,
    /// The workspace, how it was mounted, and what was protected in it.
    pub workspace: Option<crate::plan::WorkspacePlan>,
}

/// What a run used.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Usage {
    /// From clone3(2) to the end of init, milliseconds.
    pub wall_ms: f64,
    /// Processor time of all its processes, milliseconds.
    pub cpu_ms: f64,
    /// The most memory in use: of the control group, or else of the largest process.
    pub memory_peak_bytes: Option<u64>,
    /// The most processes and threads, where counted.
    pub pids_peak: Option<u64>,
    /// Bytes of output passed on by the relay, where there was one.
    pub output_bytes: Option<u64>,
}

/// What was refused, and how often.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Denials {
    /// Processes and threads over the limit.
    pub pids: u64,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// Bytes of output over the cap.
    pub output_bytes: u64,
    /// Why the caller's own stream took no more of the output: an errno.
    pub output_errno: Option<i32>,
}
