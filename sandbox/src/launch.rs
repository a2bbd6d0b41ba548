//! The story of a run: [`run`]. The process that gets here has one thread and holds no secret.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::pipe::{PipeFlags, pipe_with};
use seccompiler::BpfProgram;

use crate::cgroup::{Entry, Group, GroupError};
use crate::confine::{Confined, Prepared, Trees, confine};
use crate::init;
use crate::judge;
use crate::open;
use crate::order::Command;
use crate::pin::Pin;
use crate::plan::Plan;
use crate::relay::{Copied, Relay};
use crate::report::{Outcome, Report};
use crate::seccomp;
use crate::slot::{Slot, SlotError};
use crate::streams::{self, Streams};
use crate::supervise::{Ended, Running, Signals};
use crate::sys::{self, Setting, Side};
use crate::workspace::{Lent, Workspace, WorkspaceError};

/// Every namespace but those of users, which comes last, of control groups, which comes after the move into one, and of
/// networks, which may be there already.
const NAMESPACES: i32 = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

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
            LaunchError::Tree(error) => {
                write!(out, "cannot show {} inside: {}", error.path.display(), error.source)
            }
            LaunchError::Workspace(error) => error.fmt(out),
            LaunchError::Call { what, source } => write!(out, "{what}: {source}"),
            LaunchError::Confine { stage, object, source } => {
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
                | WorkspaceError::Overlay { path, source, .. }
                | WorkspaceError::Hold { path, source } => {
                    ("workspace", path.display().to_string(), Some(source))
                }
                WorkspaceError::Link { path } => ("workspace", path.display().to_string(), None),
            },
            LaunchError::Call { what, source } => ("launch", (*what).to_owned(), Some(source)),
            LaunchError::Confine { stage, object, source } => (*stage, object.clone(), Some(source)),
        };
        let errno = source.and_then(io::Error::raw_os_error);
        Outcome::SetupFailed { step: step.to_owned(), object, errno, message: self.to_string() }
    }
}

pub(crate) fn call(what: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::Call { what, source }
}

/// What somebody else has opened for a run, and who that is.
#[derive(Debug)]
pub struct Given {
    /// Standard input, output, error: pipes, or nothing for `/dev/null`.
    pub streams: [Option<OwnedFd>; 3],
    /// The directory of the plan's workspace, opened by the caller's own right.
    pub workspace: Option<OwnedFd>,
    /// The caller's uid and gid.
    pub caller: (u32, u32),
    /// The caller itself (pidfd_open(2)).
    pub process: Option<OwnedFd>,
    /// Where the changes to a workspace go that is not to be changed itself: a path that is not there yet.
    pub changes: Option<PathBuf>,
    /// A network namespace that nobody has been in, as [`network_namespace`] makes it; nothing where one is made now.
    pub network: Option<OwnedFd>,
    /// A socket that every command inside has as its descriptor 3.
    pub door: Option<OwnedFd>,
}

/// As [`run`], with what a caller has handed over. Standard streams of this process are replaced.
///
/// # Errors
/// As [`run`].
pub fn run_given(plan: &Plan, shared: &Path, given: Given) -> Result<Report, LaunchError> {
    let (lent, brought) = lend(plan, given)?;
    with_parts(plan, shared, lent.as_ref(), brought, launch)
}

/// What a sandbox gets that was made before it.
#[derive(Default)]
pub(crate) struct Brought {
    network: Option<OwnedFd>,
    door: Option<OwnedFd>,
}

/// Takes what was given: the streams become this process's own.
pub(crate) fn lend(plan: &Plan, given: Given) -> Result<(Option<Lent>, Brought), LaunchError> {
    let Given { streams, workspace, caller: (uid, gid), process, changes, network, door } = given;
    streams::install(streams).map_err(call("standard streams"))?;
    let lent = workspace.map(|directory| Lent { directory, uid, gid, process, changes });
    if plan.workspace.is_some() && lent.is_none() {
        return Err(call("workspace")(io::Error::from_raw_os_error(libc::EBADF)));
    }
    Ok((lent, Brought { network, door }))
}

/// Runs the command of `plan` in a sandbox of its own, and returns when nothing of it is left.
///
/// `shared` is the directory of uid slots and
/// placeholders, the same for all runs on this host.
/// The caller has one thread.
///
/// # Errors
/// When the sandbox cannot be set up as planned. Then nothing was executed, and nothing is left either.
pub fn run(plan: &Plan, shared: &Path) -> Result<Report, LaunchError> {
    with_parts(plan, shared, None, Brought::default(), launch)
}

/// Takes what a sandbox needs from this host, has it `lived`, and gives everything back.
pub(crate) fn with_parts(
    plan: &Plan,
    shared: &Path,
    lent: Option<&Lent>,
    brought: Brought,
    lived: impl FnOnce(&Parts<'_>, Option<&Workspace>) -> Result<(Ended, Option<Copied>), LaunchError>,
) -> Result<Report, LaunchError> {
    sys::hear_of_children();
    let filter = seccomp::compile(plan.seccomp)
        .map_err(|error| call("system-call filter")(io::Error::other(error)))?;
    let signals = Signals::block().map_err(call("signals"))?;
    let slot = Slot::take(&shared.join("slots")).map_err(LaunchError::Slot)?;
    let group = plan.cgroup.as_ref().map(|limits| Group::make(limits, slot.number()));
    let group = group.transpose().map_err(LaunchError::Group)?;
    let workspace =
        plan.workspace.as_ref().map(|plan| Workspace::open(plan, slot.uid(), shared, lent)).transpose();
    let ended = workspace.map_err(LaunchError::Workspace).and_then(|workspace| {
        let Brought { network, door } = brought;
        let (group, network) = (group.as_ref(), Cell::new(network));
        let parts = Parts { plan, filter: &filter, slot: &slot, group, signals: &signals, network, door };
        let ended = lived(&parts, workspace.as_ref());
        if let Some(workspace) = &workspace {
            workspace.release();
        }
        ended
    });
    let counts = group.as_ref().map(Group::counts);
    if let Some(group) = &group {
        group.remove();
        group.sweep(|number| Slot::take_free(&shared.join("slots"), number));
    }
    judge::report(plan, &slot, filter.len(), counts, ended?)
}

/// What a launch is made of.
pub(crate) struct Parts<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) filter: &'a BpfProgram,
    pub(crate) slot: &'a Slot,
    pub(crate) group: Option<&'a Group>,
    pub(crate) signals: &'a Signals,
    /// For the first init; another gets one of its own.
    pub(crate) network: Cell<Option<OwnedFd>>,
    pub(crate) door: Option<OwnedFd>,
}

/// From the host's trees to the end of the sandbox.
fn launch(parts: &Parts<'_>, workspace: Option<&Workspace>) -> Result<(Ended, Option<Copied>), LaunchError> {
    let Parts { plan, slot, group, signals, .. } = *parts;
    let pin = Pin::here();
    let command = Command::of(&plan.command).map_err(call("command"))?;
    let controlling_terminal = plan.streams == crate::plan::StreamsPlan::Terminal;
    let door = parts.door.as_ref().map(AsFd::as_fd);
    let setting = Setting { controlling_terminal, processors: pin.processors(), streams: [None; 3], door };
    let trees = open::trees(plan, workspace, slot.uid()).map_err(LaunchError::Tree)?;
    let streams = streams::make(plan.streams, &trees.terminals).map_err(call("standard streams"))?;
    let Streams { inside, flows, terminal } = streams;
    let relay = (!flows.is_empty()).then(|| Relay::start(flows, plan.output_bytes_max, slot.relay_uid()));
    let relay = relay.transpose().map_err(call("relay"))?;
    let (status, said) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| call("status pipe")(error.into()))?;
    let started = Instant::now();
    let init = make_init(parts, workspace, trees, inside, said, |confined, said| {
        init::live(confined, &command, &setting, said)
    })?;
    let running = Running { init, status, started, group, terminal: terminal.as_ref(), signals };
    let (timeout, grace) = (plan.timeout_ms.map(Duration::from_millis), Duration::from_millis(plan.grace_ms));
    let ended = running.wait(timeout, grace).map_err(call("waiting"))?;
    let copied = relay.map(Relay::finish).transpose().map_err(call("relay"))?;
    Ok((ended, copied))
}

/// The child that confines itself and then lives as init. What it has, the parent gives up: the ends of streams above all.
pub(crate) fn make_init(
    parts: &Parts<'_>,
    workspace: Option<&Workspace>,
    trees: Trees,
    streams: [Option<OwnedFd>; 3],
    said: OwnedFd,
    live: impl FnOnce(&Confined, &OwnedFd),
) -> Result<OwnedFd, LaunchError> {
    let Parts { plan, filter, slot, group, .. } = *parts;
    let entry = group.map(Group::entry).transpose().map_err(LaunchError::Group)?;
    let into = match &entry {
        Some(Entry::Clone(group)) => Some(group.as_fd()),
        _ => None,
    };
    let network = parts.network.take();
    let new = if network.is_some() { NAMESPACES } else { NAMESPACES | libc::CLONE_NEWNET };
    match sys::clone3(new, into).map_err(call("clone3"))? {
        Side::Child => {
            let locks = workspace.into_iter().flat_map(Workspace::locks).chain([slot.lock()]);
            let own = parts.door.iter().chain([&said]).map(AsFd::as_fd);
            let kept = locks.map(AsFd::as_fd).chain(own).collect();
            let prepared = Prepared { plan, filter, trees, entry, network, uid: slot.uid(), streams, kept };
            match confine(prepared) {
                Ok(confined) => live(&confined, &said),
                Err(failure) => init::setup_failed(&said, &failure),
            }
            sys::exit_now(1)
        }
        Side::Parent { pidfd, .. } => Ok(pidfd),
    }
}

/// Forks a process that has `given`, `channel` and the standard streams of this one, runs `body` and ends; it dies with this
/// one. Returns its pidfd. The caller has one thread.
///
/// # Errors
/// As clone3(2).
pub fn fork_supervisor(
    given: Vec<OwnedFd>,
    channel: OwnedFd,
    body: impl FnOnce(Vec<OwnedFd>, OwnedFd),
) -> io::Result<OwnedFd> {
    let launcher = nix::unistd::getpid();
    match sys::clone3(0, None)? {
        Side::Parent { pidfd, .. } => Ok(pidfd),
        Side::Child => {
            let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
            let own = given.iter().chain([&channel]).map(AsFd::as_fd);
            let kept: Vec<BorrowedFd<'_>> = standard.into_iter().chain(own).collect();
            let ready = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
                .map_err(io::Error::from)
                .and_then(|()| sys::close_all_but(&kept));
            if ready.is_err() || nix::unistd::getppid() != launcher {
                sys::exit_now(1);
            }
            body(given, channel);
            sys::exit_now(0)
        }
    }
}

/// A network namespace with nothing but loopback, that nobody is in. It belongs to the caller's user namespace. The caller has
/// one thread.
///
/// # Errors
/// As clone3(2) with `CLONE_NEWNET`.
pub fn network_namespace() -> io::Result<OwnedFd> {
    sys::namespace_of_child(libc::CLONE_NEWNET, "net", Some(&sys::loopback_up), |_| Ok(()))
}

/// What all who start sandboxes on this host share.
pub fn shared_directory() -> PathBuf {
    PathBuf::from("/run/broker")
}
