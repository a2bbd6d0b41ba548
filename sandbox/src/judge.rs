//! What a run came to: from what init, the kernel's counters and the relay say to a [`Report`].

use std::io;

use crate::cgroup::Counts;
use crate::confine::Stage;
use crate::init::Message;
use crate::launch::LaunchError;
use crate::plan::{Plan, Step};
use crate::relay::Copied;
use crate::report::{Denials, EndedBy, Enforcement, Outcome, Report, Usage};
use crate::slot::Slot;
use crate::supervise::{End, Ended};

/// The report of a run that has ended.
pub(crate) fn report(
    plan: &Plan,
    slot: &Slot,
    seccomp_instructions: usize,
    counts: Option<Counts>,
    (ended, copied): (Ended, Option<Copied>),
) -> Result<Report, LaunchError> {
    let outcome = outcome(plan, &ended, counts)?;
    Ok(Report {
        ended_by: if ended.end == End::Told { EndedBy::Broker } else { EndedBy::of(&outcome) },
        outcome,
        enforcement: enforcement(plan, seccomp_instructions, slot),
        gaps: plan.gaps.clone(),
        usage: usage(&ended, counts, copied),
        denials: denials(counts, copied),
        sandbox: format!("{}-{}", std::process::id(), slot.number()),
    })
}

fn outcome(plan: &Plan, ended: &Ended, counts: Option<Counts>) -> Result<Outcome, LaunchError> {
    let oom = counts.is_some_and(|counts| counts.oom_kills > 0);
    Ok(match ended.message {
        Some(message @ Message::SetupFailed { .. }) => return Err(confine_error(plan, message)),
        Some(message @ Message::ExecFailed { .. }) => of_command(message),
        _ if ended.end == End::Deadline => Outcome::TimedOut,
        Some(Message::Signaled { signal: libc::SIGKILL, .. }) if oom => Outcome::Oom,
        Some(message) => of_command(message),
        // The kernel takes init with the whole group when memory runs out (memory.oom.group).
        None if oom => Outcome::Oom,
        None => Outcome::Signaled { signal: libc::SIGKILL },
    })
}

/// How one command ended.
pub(crate) fn of_command(message: Message) -> Outcome {
    match message {
        Message::ExecFailed { errno: libc::ENOENT | libc::ENOTDIR, .. } => Outcome::NotFound,
        Message::ExecFailed { errno, .. } => Outcome::NotExecutable { errno },
        Message::Exited { code, .. } => Outcome::Exited { code },
        Message::Signaled { signal, .. } => Outcome::Signaled { signal },
        Message::Ready | Message::SetupFailed { .. } => Outcome::Signaled { signal: libc::SIGKILL },
    }
}

/// What a failed set-up is to the caller.
pub(crate) fn confine_error(plan: &Plan, message: Message) -> LaunchError {
    let Message::SetupFailed { stage, object, errno } = message else {
        return LaunchError::Call { what: "set-up", source: io::Error::from_raw_os_error(libc::EPROTO) };
    };
    let object = object_name(plan, stage, object);
    LaunchError::Confine { stage: stage.name(), object, source: io::Error::from_raw_os_error(errno) }
}

/// What the child's number means.
fn object_name(plan: &Plan, stage: Stage, object: usize) -> String {
    let step = |step: &Step| format!("{}", step.path().display());
    match stage {
        Stage::Base => plan.base.get(object).map(step),
        Stage::Files => plan.files.get(object).map(step),
        Stage::Workspace => {
            plan.workspace.as_ref().map(|workspace| workspace.directory.display().to_string())
        }
        Stage::Rlimits => plan.rlimits.get(object).map(|(limit, _)| format!("{limit:?}")),
        Stage::Root if object == 1 => Some(plan.command.directory.display().to_string()),
        _ => None,
    }
    .unwrap_or_else(|| format!("call {object}"))
}

fn enforcement(plan: &Plan, seccomp_instructions: usize, slot: &Slot) -> Enforcement {
    let is_mount =
        |step: &&Step| !matches!(step, Step::Directory { .. } | Step::Symlink { .. } | Step::File { .. });
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
        mounts: plan.base.iter().chain(&plan.files).filter(is_mount).count()
            + usize::from(plan.workspace.is_some()),
        landlock_abi: plan.landlock.abi,
        seccomp_instructions,
        unix_sockets: plan.seccomp.unix_sockets,
        capabilities: "none; securebits locked; no_new_privs",
        cgroup: plan.cgroup.clone(),
        rlimits: plan.rlimits.clone(),
        timeout_ms: plan.timeout_ms,
        grace_ms: plan.grace_ms,
        workspace: plan.workspace.clone(),
    }
}

fn usage(ended: &Ended, counts: Option<Counts>, copied: Option<Copied>) -> Usage {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let children = getrusage(UsageWho::RUSAGE_CHILDREN).ok();
    let cpu_us = children
        .map_or(0, |used| used.user_time().num_microseconds() + used.system_time().num_microseconds());
    let largest = children.and_then(|used| u64::try_from(used.max_rss()).ok()).map(|kib| kib << 10);
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
        output_errno: copied.and_then(|copied| copied.error),
    }
}
