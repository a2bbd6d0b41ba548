//! The story of a run: [`run`]. The process that gets here has one thread and holds no secret.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fd::AsFd;
use rustix::pipe::{PipeFlags, pipe_with};
use seccompiler::BpfProgram;

use crate::cgroup::{Counts, Entry, Group, GroupError};
use crate::confine::{Prepared, Stage, Trees, confine};
use crate::init::{self, Message};
use crate::open;
use crate::plan::{Plan, Step};
use crate::policy::Policy;
use crate::relay::{Copied, Relay};
use crate::report::{Denials, Enforcement, Named, Outcome, Report, Usage};
use crate::seccomp;
use crate::slot::{Slot, SlotError};
use crate::streams::{self, Streams};
use crate::supervise::{Ended, Running, Signals};
use crate::sys::{self, Image, Side};
use crate::workspace::{Workspace, WorkspaceError};

/// Every namespace but those of users, which comes last, and control groups, which comes after the move into one.
const NAMESPACES: i32 =
    libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// Why nothing was started, or it is not known how it ended.
#[derive(Debug)]
pub enum LaunchError {
    /// No uid of its own.
    Slot(SlotError),
    /// No limits.
    Group(GroupError),
    /// A tree of the policy cannot be shown.
    Tree(open::OpenError),
    /// The workspace cannot be used.
    Workspace(WorkspaceError),
    /// A system call of the launcher itself failed.
    Call {
        /// What it was for.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The child could not be confined.
    Confine {
        /// The stage.
        stage: &'static str,
        /// What it was about.
        object: String,
        /// Why.
        source: io::Error,
    },
}

impl fmt::Display for LaunchError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LaunchError::Slot(error) => error.fmt(out),
            LaunchError::Group(error) => error.fmt(out),
            LaunchError::Tree(error) => write!(
                out,
                "cannot show {} inside: {}",
                error.path.display(),
                error.source
            ),
            LaunchError::Workspace(error) => error.fmt(out),
            LaunchError::Call { what, source } => write!(out, "{what}: {source}"),
            LaunchError::Confine {
                stage,
                object,
                source,
            } => {
                write!(
                    out,
                    "cannot confine: {stage}: {object}: {source}; `broker doctor` tells what this host lacks"
                )
            }
        }
    }
}

impl std::error::Error for LaunchError {}

impl LaunchError {
    /// As the report says it.
    pub fn outcome(&self) -> Outcome {
        let (step, object, source) = match self {
            LaunchError::Slot(SlotError::Io { path, source }) => {
                ("slot", path.display().to_string(), Some(source))
            }
            LaunchError::Slot(SlotError::Full) => ("slot", String::new(), None),
            LaunchError::Group(error) => ("cgroup", error.path.display().to_string(), Some(&error.source)),
            LaunchError::Tree(error) => ("files", error.path.display().to_string(), Some(&error.source)),
            LaunchError::Workspace(error) => match error {
                WorkspaceError::Open { path, source }
                | WorkspaceError::Idmap { path, source, .. }
                | WorkspaceError::Hold { path, source } => {
                    ("workspace", path.display().to_string(), Some(source))
                }
                WorkspaceError::Link { path } => ("workspace", path.display().to_string(), None),
            },
            LaunchError::Call { what, source } => ("launch", (*what).to_owned(), Some(source)),
            LaunchError::Confine {
                stage,
                object,
                source,
            } => (*stage, object.clone(), Some(source)),
        };
        let errno = source.and_then(io::Error::raw_os_error);
        Outcome::SetupFailed {
            step: step.to_owned(),
            object,
            errno,
            message: self.to_string(),
        }
    }
}

fn call(what: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::Call { what, source }
}

/// Runs the command of `plan` in a sandbox of its own, and returns when nothing of it is left.
///
/// `slots` is the directory of uid slots that all runs on this host share. The caller has one thread.
///
/// # Errors
/// When the sandbox cannot be set up as planned. Then nothing was executed, and nothing is left either.
pub fn run(policy: &Policy, plan: &Plan, slots: &Path) -> Result<Report, LaunchError> {
    let filter = seccomp::compile(plan.seccomp)
        .map_err(|error| call("system-call filter")(io::Error::other(error)))?;
    let signals = Signals::block().map_err(call("signals"))?;
    let slot = Slot::take(slots).map_err(LaunchError::Slot)?;
    let group = plan
        .cgroup
        .as_ref()
        .map(|limits| Group::make(limits, slot.number()))
        .transpose()
        .map_err(LaunchError::Group)?;
    let workspace = open_workspace(plan, &slot);
    let ended = workspace.and_then(|workspace| {
        let ended = launch(plan, &filter, &slot, group.as_ref(), workspace.as_ref(), &signals);
        if let Some(workspace) = &workspace {
            workspace.release();
        }
        ended
    });
    let counts = group.as_ref().map(Group::counts);
    if let Some(group) = &group {
        group.remove();
    }
    let (ended, copied) = ended?;
    Ok(Report {
        outcome: outcome(plan, &ended, counts)?,
        enforcement: enforcement(plan, &filter, &slot),
        gaps: plan.gaps.clone(),
        usage: usage(&ended, counts, copied),
        denials: denials(counts, copied),
        sandbox: format!("{}-{}", std::process::id(), slot.number()),
        policy: Named {
            name: policy.name().to_owned(),
            sha256: policy.hash(),
        },
        plan: plan.hash(),
    })
}

fn open_workspace(plan: &Plan, slot: &Slot) -> Result<Option<Workspace>, LaunchError> {
    plan.workspace
        .as_ref()
        .map(|plan| Workspace::open(plan, slot.uid()))
        .transpose()
        .map_err(LaunchError::Workspace)
}

/// From the host's trees to the end of the sandbox.
fn launch(
    plan: &Plan,
    filter: &BpfProgram,
    slot: &Slot,
    group: Option<&Group>,
    workspace: Option<&Workspace>,
    signals: &Signals,
) -> Result<(Ended, Option<Copied>), LaunchError> {
    let entry = group.map(Group::entry).transpose().map_err(LaunchError::Group)?;
    let system = open::system_trees(plan).map_err(LaunchError::Tree)?;
    let terminals = open::terminals().map_err(call("devpts"))?;
    let Streams {
        inside,
        flows,
        terminal,
    } = streams::make(plan.streams, &terminals, slot.uid()).map_err(call("standard streams"))?;
    let image = image(plan).map_err(call("command"))?;
    let (status, said) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| call("status pipe")(error.into()))?;
    let relay = (!flows.is_empty()).then(|| Relay::start(flows, plan.output_bytes_max, slot.relay_uid()));
    let relay = relay.transpose().map_err(call("relay"))?;
    let workspace_mount = workspace
        .map(|workspace| workspace.mount.try_clone())
        .transpose()
        .map_err(call("workspace"))?;
    let protect = workspace
        .map(|workspace| workspace.protect.clone())
        .unwrap_or_default();
    let trees = Trees {
        system,
        workspace: workspace_mount,
        protect,
        terminals,
    };
    let started = Instant::now();
    let into = match &entry {
        Some(Entry::Clone(group)) => Some(group.as_fd()),
        _ => None,
    };
    let init = match sys::clone3(NAMESPACES, into).map_err(call("clone3"))? {
        Side::Child => {
            let kept = [said.as_fd(), slot.lock().as_fd()];
            let prepared = Prepared {
                plan,
                filter,
                trees,
                entry,
                uid: slot.uid(),
                streams: inside,
                kept,
            };
            match confine(prepared) {
                Ok(confined) => init::live(&confined, &image, &said),
                Err(failure) => init::setup_failed(&said, &failure),
            }
        }
        Side::Parent { pidfd, .. } => pidfd,
    };
    // What the child has, the parent gives up: the ends of streams above all.
    drop((trees, inside, said, entry));
    let running = Running {
        init,
        status,
        started,
        group,
        terminal: terminal.as_ref(),
        signals,
    };
    let timeout = plan.timeout_ms.map(Duration::from_millis);
    let ended = running
        .wait(timeout, Duration::from_millis(plan.grace_ms))
        .map_err(call("waiting"))?;
    let copied = relay.map(Relay::finish).transpose().map_err(call("relay"))?;
    Ok((ended, copied))
}

/// What execve(2) gets.
fn image(plan: &Plan) -> io::Result<Image> {
    let command = &plan.command;
    let candidates = command
        .candidates
        .iter()
        .map(|path| CString::new(path.as_os_str().as_bytes()));
    let arguments = command
        .arguments
        .iter()
        .map(|argument| CString::new(argument.as_bytes()));
    let environment = command.environment.iter().map(|(name, value)| {
        let mut text = name.clone().into_bytes();
        text.push(b'=');
        text.extend(value.clone().into_vec());
        CString::new(text)
    });
    Ok(Image::new(
        candidates.collect::<Result<_, _>>()?,
        arguments.collect::<Result<_, _>>()?,
        environment.collect::<Result<_, _>>()?,
        plan.streams == crate::plan::StreamsPlan::Terminal,
    ))
}

fn outcome(plan: &Plan, ended: &Ended, counts: Option<Counts>) -> Result<Outcome, LaunchError> {
    let oom = counts.is_some_and(|counts| counts.oom_kills > 0);
    Ok(match ended.message {
        Some(Message::SetupFailed { stage, object, errno }) => {
            return Err(LaunchError::Confine {
                stage: stage.name(),
                object: object_name(plan, stage, object),
                source: io::Error::from_raw_os_error(errno),
            });
        }
        Some(Message::ExecFailed {
            errno: libc::ENOENT | libc::ENOTDIR,
        }) => Outcome::NotFound,
        Some(Message::ExecFailed { errno }) => Outcome::NotExecutable { errno },
        _ if ended.timed_out => Outcome::TimedOut,
        Some(Message::Signaled {
            signal: libc::SIGKILL,
        }) if oom => Outcome::Oom,
        Some(Message::Signaled { signal }) => Outcome::Signaled { signal },
        Some(Message::Exited { code }) => Outcome::Exited { code },
        // The kernel takes init with the whole group when memory runs out (memory.oom.group).
        None if oom => Outcome::Oom,
        None => Outcome::Signaled {
            signal: libc::SIGKILL,
        },
    })
}

/// What the child's number means.
fn object_name(plan: &Plan, stage: Stage, object: usize) -> String {
    let step = |step: &Step| format!("{}", step.path().display());
    match stage {
        Stage::Files => plan.files.get(object).map(step),
        Stage::Workspace => plan
            .workspace
            .as_ref()
            .map(|workspace| workspace.directory.display().to_string()),
        Stage::Rlimits => plan.rlimits.get(object).map(|(limit, _)| format!("{limit:?}")),
        Stage::Root if object == 1 => Some(plan.command.directory.display().to_string()),
        _ => None,
    }
    .unwrap_or_else(|| format!("call {object}"))
}

fn enforcement(plan: &Plan, filter: &BpfProgram, slot: &Slot) -> Enforcement {
    let is_mount = |step: &&Step| {
        !matches!(
            step,
            Step::Directory { .. } | Step::Symlink { .. } | Step::File { .. }
        )
    };
    Enforcement {
        namespaces: vec![
            "user (last, owns none of the others)",
            "mount",
            "pid",
            "network (loopback only)",
            "ipc",
            "uts",
            "cgroup",
        ],
        host_uid: Some(slot.uid()),
        mounts: plan.files.iter().filter(is_mount).count() + usize::from(plan.workspace.is_some()),
        landlock_abi: plan.landlock.abi,
        seccomp_instructions: filter.len(),
        unix_sockets: plan.seccomp.unix_sockets,
        capabilities: "none; securebits locked; no_new_privs",
        cgroup: plan.cgroup.clone(),
        rlimits: plan.rlimits.clone(),
    }
}

fn usage(ended: &Ended, counts: Option<Counts>, copied: Option<Copied>) -> Usage {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let children = getrusage(UsageWho::RUSAGE_CHILDREN).ok();
    let cpu_us = children.map_or(0, |used| {
        used.user_time().num_microseconds() + used.system_time().num_microseconds()
    });
    let largest = children
        .and_then(|used| u64::try_from(used.max_rss()).ok())
        .map(|kib| kib << 10);
    Usage {
        wall_ms: ended.wall.as_secs_f64() * 1000.0,
        cpu_ms: cpu_us as f64 / 1000.0,
        memory_peak_bytes: counts.and_then(|counts| counts.memory_peak_bytes).or(largest),
        pids_peak: counts.and_then(|counts| counts.pids_peak),
        output_bytes: copied.map(|copied| copied.output_bytes),
    }
}

fn denials(counts: Option<Counts>, copied: Option<Copied>) -> Denials {
    Denials {
        pids: counts.map_or(0, |counts| counts.pids_refused),
        oom_kills: counts.map_or(0, |counts| counts.oom_kills),
        output_bytes: copied.map_or(0, |copied| copied.dropped_bytes),
    }
}

/// Where the slots are, for everybody who starts sandboxes on this host.
pub fn default_slots() -> PathBuf {
    PathBuf::from("/run/broker/slots")
}
