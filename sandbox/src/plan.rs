//! The plan: what will be done on this host, as data. Pure: no file is opened and no call is made here.
//!
//! It is what the launcher executes, what `broker policy explain` prints and what golden tests compare.

mod command;
pub(crate) mod files;

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

pub use command::CommandPlan;
pub use files::{Exec, Owner, Step};

use crate::host::{Cgroups, Controller, Host};
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

/// Limits of the whole sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CgroupPlan {
    /// v1 or v2.
    pub version: CgroupVersion,
    /// Bytes.
    pub memory_bytes_max: Option<u64>,
    /// Processes and threads, init included.
    pub pids_max: Option<u32>,
    /// Thousandths of a processor.
    pub cpu_thousandths: Option<u32>,
}

/// Which kind of hierarchy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CgroupVersion {
    /// One a controller.
    V1,
    /// One for all.
    V2,
}

/// The limits of setrlimit(2) that are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rlimit {
    /// 1, which the kernel treats as "run no core handler either" (core(5)); 0 would still run a `|handler`.
    Core,
    /// Open descriptors.
    OpenFiles,
    /// Size of a file.
    FileSize,
    /// Locked memory.
    LockedMemory,
    /// Real-time priority.
    RealTimePriority,
    /// Niceness.
    Nice,
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
    /// As it is: a pipe or `/dev/null`.
    Pass,
    /// Through a pipe of ours.
    Relay,
    /// `/dev/null`.
    Null,
}

/// Why this host cannot do what the policy demands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanError {
    /// The kernel's Landlock is older than the policy's floor.
    LandlockFloor {
        /// As demanded.
        floor: u8,
        /// As found; 0 for none.
        found: u8,
    },
    /// A limit has no controller here.
    NoController {
        /// The limit's controller.
        controller: Controller,
    },
    /// Two protections exclude each other on this kernel, and the policy does not name the gap.
    GapNotAllowed {
        /// The gap to name in `allow_gaps`.
        gap: Gap,
    },
    /// The policy names a place that is the sandbox's own.
    Reserved {
        /// Which.
        path: PathBuf,
    },
    /// Only root can be the caller here.
    NotRoot,
}

impl fmt::Display for PlanError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlanError::LandlockFloor { floor, found: 0 } => {
                write!(
                    out,
                    "the policy demands Landlock ABI {floor}, and this kernel has no Landlock (boot with `lsm=landlock,...`)"
                )
            }
            PlanError::LandlockFloor { floor, found } => {
                write!(
                    out,
                    "the policy demands Landlock ABI {floor}, this kernel has {found}; lower `landlock.floor` or use a newer kernel"
                )
            }
            PlanError::NoController { controller } => write!(
                out,
                "no control group on this host can limit {}; mount the controller, or name the gap: allow_gaps = [\"{}\"]",
                controller.name(),
                Gap::NoCgroup
            ),
            PlanError::GapNotAllowed { gap } => {
                write!(
                    out,
                    "what the policy asks for leaves a gap on this kernel; name it to accept it: allow_gaps = [\"{gap}\"]"
                )
            }
            PlanError::Reserved { path } => {
                write!(
                    out,
                    "{} cannot be shown: inside, that place is the sandbox's own; name what is needed below it",
                    path.display()
                )
            }
            PlanError::NotRoot => {
                out.write_str("only root can start a sandbox on this host without the daemon; run as root")
            }
        }
    }
}

impl std::error::Error for PlanError {}

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
        let base = files::base();
        let files = files::steps(policy, host, &base)?;
        Ok(Plan {
            policy: policy.name().to_owned(),
            cgroup: cgroup(policy, job, host, &mut gaps)?,
            rlimits: rlimits(job),
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
        WorkspaceMode::ReadWrite => directories.chain(held).collect(),
    };
    // A parent comes before what is below it: `.git` is covered whole where it is absent.
    protect.sort_by(|one, other| one.path.cmp(&other.path));
    Some(WorkspacePlan { directory: wish.directory.clone(), mode: wish.mode, protect })
}

fn cgroup(
    policy: &Policy,
    job: &Job,
    host: &Host,
    gaps: &mut Vec<Gap>,
) -> Result<Option<CgroupPlan>, PlanError> {
    let limits = &job.limits;
    let mut wanted = Vec::new();
    wanted.extend(limits.memory.map(|_| Controller::Memory));
    wanted.extend(limits.pids.map(|_| Controller::Pids));
    wanted.extend(limits.cpus.map(|_| Controller::Cpu));
    if wanted.is_empty() {
        return Ok(None);
    }
    let (version, offered) = match &host.cgroups {
        Cgroups::V2 { controllers } => (CgroupVersion::V2, controllers.as_slice()),
        Cgroups::V1 { controllers } => (CgroupVersion::V1, controllers.as_slice()),
        Cgroups::None => (CgroupVersion::V2, [].as_slice()),
    };
    if let Some(missing) = wanted.iter().find(|controller| !offered.contains(controller)) {
        if !policy.file().allow_gaps.contains(&Gap::NoCgroup) {
            return Err(PlanError::NoController { controller: *missing });
        }
        gaps.push(Gap::NoCgroup);
    }
    let has = |controller| offered.contains(&controller);
    let plan = CgroupPlan {
        version,
        memory_bytes_max: limits.memory.map(|size| size.bytes()).filter(|_| has(Controller::Memory)),
        // Init counts too, and is not the workload's.
        pids_max: limits.pids.map(|count| count.get().saturating_add(1)).filter(|_| has(Controller::Pids)),
        cpu_thousandths: limits.cpus.map(|cpus| cpus.thousandths()).filter(|_| has(Controller::Cpu)),
    };
    Ok(if wanted.iter().any(|controller| has(*controller)) { Some(plan) } else { None })
}

fn rlimits(job: &Job) -> Vec<(Rlimit, u64)> {
    let mut list = vec![(Rlimit::Core, 1), (Rlimit::RealTimePriority, 0), (Rlimit::Nice, 0)];
    list.push((Rlimit::LockedMemory, 8 << 20));
    list.extend(job.limits.open_files.map(|count| (Rlimit::OpenFiles, u64::from(count.get()))));
    list.extend(job.limits.file_size.map(|size| (Rlimit::FileSize, size.bytes())));
    list
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
            WorkspaceMode::ReadWrite => LandlockAccess::Write,
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
        Stream::Pipe | Stream::Null => StreamPlan::Pass,
        Stream::Other => StreamPlan::Relay,
        Stream::Closed => StreamPlan::Null,
    });
    for (plan, stream) in plans.iter_mut().zip(job.wishes.streams).skip(1) {
        if capped && stream == Stream::Pipe {
            *plan = StreamPlan::Relay;
        }
    }
    StreamsPlan::Each(plans)
}
