//! The plan: what will be done on this host, as data. Pure: no file is opened and no call is made here.
//!
//! It is what the launcher executes, what `broker policy explain` prints and what golden tests compare.

mod command;
mod error;
pub(crate) mod files;
mod limits;

use std::path::PathBuf;

use serde::Serialize;

pub use command::CommandPlan;
pub use error::PlanError;
pub use files::{Exec, Owner, Step};
pub use limits::{CgroupPlan, CgroupVersion, IoPlan, Rlimit};

use crate::host::Host;
use crate::job::{Job, Stream, Terminal, WorkspaceMode};
use crate::policy::{Gap, Policy};

/// The user and group that the workload sees itself as. Outside it is its slot's id, never 0.
pub const INNER_ID: u32 = 1000;

/// The name that uname(2) gives inside.
pub const HOSTNAME: &str = "sandbox";

/// The Landlock ABI up to which enforcement is tested here. A newer kernel is used at this level.
pub const LANDLOCK_ABI_TESTED: u8 = 7;

/// What will be done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The policy's name.
    pub policy: String,
    /// What every root begins with, whatever the policy: put together while the policy is still being read.
    pub base: Vec<Step>,
    /// What is put together under the new root after that, in order.
    pub files: Vec<Step>,
    /// The workspace, if there is one.
    pub workspace: Option<WorkspacePlan>,
    /// Limits of the whole sandbox.
    pub cgroup: Option<CgroupPlan>,
    /// Limits of each process (setrlimit(2)): name, value for soft and hard.
    pub rlimits: Vec<(Rlimit, u64)>,
    /// Milliseconds until `SIGTERM`.
    pub timeout_ms: Option<u64>,
    /// Milliseconds from `SIGTERM` to `SIGKILL`.
    pub grace_ms: u64,
    /// Bytes of output that are passed on.
    pub output_bytes_max: Option<u64>,
    /// The second fence.
    pub landlock: LandlockPlan,
    /// The system-call filter.
    pub seccomp: SeccompPlan,
    /// The standard streams.
    pub streams: StreamsPlan,
    /// What is run.
    pub command: CommandPlan,
    /// What the policy allows to be missing, and is.
    pub gaps: Vec<Gap>,
}

/// A workspace at `/workspace`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkspacePlan {
    /// The directory on the host.
    pub directory: PathBuf,
    /// How it is mounted.
    pub mode: WorkspaceMode,
    /// Paths below it that cannot be changed or made.
    pub protect: Vec<Protect>,
}

/// One protected path of a workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Protect {
    /// Below the workspace.
    pub path: PathBuf,
    /// What holds its place where nothing stands there.
    pub placeholder: Placeholder,
}

/// What holds the place of an absent protected path while a run lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Placeholder {
    /// An empty directory: git does not see it, rmdir(2) cannot destroy anything.
    Directory,
    /// A file with this content, where the directory that holds it exists.
    File(String),
}

/// The second fence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LandlockPlan {
    /// The ABI that is enforced, all of it.
    pub abi: u8,
    /// What is allowed beneath which path.
    pub rules: Vec<(PathBuf, LandlockAccess)>,
}

/// What a Landlock rule allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LandlockAccess {
    /// List directories.
    List,
    /// Read, list and execute.
    Read,
    /// Read, list and write to what is there.
    Update,
    /// Everything.
    Write,
}

/// The system-call filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SeccompPlan {
    /// Whether `socket(AF_UNIX)` is there.
    pub unix_sockets: UnixSockets,
}

/// Whether `socket(AF_UNIX)` is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnixSockets {
    /// EPERM.
    Refused,
    /// As the policy asks.
    Allowed,
}

/// How the standard streams reach the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamsPlan {
    /// One by one.
    Each([StreamPlan; 3]),
    /// Through a fresh pseudo-terminal.
    Terminal,
}

/// How one standard stream reaches the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum StreamPlan {
    /// As it is: a pipe.
    Pass,
    /// Through a pipe of ours.
    Relay,
    /// The sandbox's own `/dev/null`: locks and times of the host's would be a way from one sandbox to another.
    Null,
}

impl Plan {
    /// What `policy` and `job` come to on `host`.
    ///
    /// # Errors
    /// When this host cannot enforce what the policy demands.
    pub fn make(policy: &Policy, job: &Job, host: &Host) -> Result<Plan, PlanError> {
        if host.caller.uid != 0 {
            return Err(PlanError::NotRoot);
        }
        let mut gaps = Vec::new();
        let workspace = workspace(policy, job);
        let base = files::base(job.wishes.network.as_ref());
        let files = files::steps(policy, host, &base, job.wishes.network.as_ref())?;
        Ok(Plan {
            policy: policy.name().to_owned(),
            cgroup: limits::cgroup(policy, job, host, &mut gaps)?,
            rlimits: limits::rlimits(job),
            timeout_ms: job.limits.timeout.map(milliseconds),
            grace_ms: job.limits.grace.map_or(2_000, milliseconds),
            output_bytes_max: job.limits.output.map(|size| size.bytes()),
            landlock: landlock(policy, host, base.iter().chain(&files), workspace.as_ref())?,
            seccomp: seccomp(policy, workspace.as_ref(), &mut gaps)?,
            streams: streams(job),
            command: CommandPlan::make(policy, job, host, &files),
            base,
            files,
            workspace,
            gaps,
        })
    }

    /// What another command comes to in a sandbox of this plan.
    pub fn command_for(&self, policy: &Policy, job: &Job, host: &Host) -> CommandPlan {
        CommandPlan::make(policy, job, host, &self.files)
    }

    /// SHA-256 of the plan's JSON, in hexadecimal.
    pub fn hash(&self) -> String {
        crate::policy::hex_hash(&serde_json::to_vec(self).unwrap_or_default())
    }
}

fn milliseconds(span: crate::policy::Span) -> u64 {
    u64::try_from(span.duration().as_millis()).unwrap_or(u64::MAX)
}

fn workspace(policy: &Policy, job: &Job) -> Option<WorkspacePlan> {
    let wish = job.wishes.workspace.as_ref()?;
    let words = &policy.file().workspace;
    let directories = words
        .protect
        .iter()
        .filter(|path| !words.hold.contains_key(path))
        .map(|path| Protect { path: path.as_str().into(), placeholder: Placeholder::Directory });
    let held = words.hold.iter().map(|(path, text)| Protect {
        path: path.as_str().into(),
        placeholder: Placeholder::File(text.clone()),
    });
    // What cannot be written needs no protection.
    let mut protect: Vec<_> = match wish.mode {
        WorkspaceMode::ReadOnly => Vec::new(),
        WorkspaceMode::ReadWrite | WorkspaceMode::CopyOnWrite => directories.chain(held).collect(),
    };
    // A parent comes before what is below it: `.git` is covered whole where it is absent.
    protect.sort_by(|one, other| one.path.cmp(&other.path));
    Some(WorkspacePlan { directory: wish.directory.clone(), mode: wish.mode, protect })
}

fn landlock<'a>(
    policy: &Policy,
    host: &Host,
    steps: impl Iterator<Item = &'a Step>,
    workspace: Option<&WorkspacePlan>,
) -> Result<LandlockPlan, PlanError> {
    let floor = policy.file().landlock.floor.map_or(2, |floor| floor.abi());
    if host.landlock_abi < floor {
        return Err(PlanError::LandlockFloor { floor, found: host.landlock_abi });
    }
    let mut rules = vec![(PathBuf::from("/"), LandlockAccess::List)];
    for (path, access) in steps.filter_map(Step::landlock_rule) {
        // A rule holds for everything beneath, mounts too.
        if !rules.iter().any(|(above, allowed)| *allowed == access && path.starts_with(above)) {
            rules.push((path, access));
        }
    }
    rules.extend(workspace.map(|workspace| {
        let access = match workspace.mode {
            WorkspaceMode::ReadOnly => LandlockAccess::Read,
            WorkspaceMode::ReadWrite | WorkspaceMode::CopyOnWrite => LandlockAccess::Write,
        };
        (PathBuf::from(files::WORKSPACE), access)
    }));
    Ok(LandlockPlan { abi: host.landlock_abi.min(LANDLOCK_ABI_TESTED), rules })
}

fn seccomp(
    policy: &Policy,
    workspace: Option<&WorkspacePlan>,
    gaps: &mut Vec<Gap>,
) -> Result<SeccompPlan, PlanError> {
    if policy.file().syscalls.unix_sockets != Some(true) {
        return Ok(SeccompPlan { unix_sockets: UnixSockets::Refused });
    }
    if workspace.is_some() {
        let gap = Gap::UnixSocketsInWorkspace;
        if !policy.file().allow_gaps.contains(&gap) {
            return Err(PlanError::GapNotAllowed { gap });
        }
        gaps.push(gap);
    }
    Ok(SeccompPlan { unix_sockets: UnixSockets::Allowed })
}

fn streams(job: &Job) -> StreamsPlan {
    if job.wishes.terminal == Terminal::Fresh {
        return StreamsPlan::Terminal;
    }
    let capped = job.limits.output.is_some();
    let mut plans = job.wishes.streams.map(|stream| match stream {
        Stream::Pipe => StreamPlan::Pass,
        Stream::Other => StreamPlan::Relay,
        Stream::Null | Stream::Closed => StreamPlan::Null,
    });
    for (plan, stream) in plans.iter_mut().zip(job.wishes.streams).skip(1) {
        if capped && stream == Stream::Pipe {
            *plan = StreamPlan::Relay;
        }
    }
    StreamsPlan::Each(plans)
}
