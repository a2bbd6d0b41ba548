//! One process for each sandbox, forked by the launcher: makes the sandbox, waits for its end, says what came of it.
//! It reads one request, which the core has checked, and nothing that a workload wrote.

use std::ffi::OsString;

use rustix::fd::OwnedFd;
use rustix::net::SendFlags;
use sandbox::{
    Caller, Given, Host, Job, Plan, PolicyName, Stream, Terminal, Wishes, WorkspaceMode, WorkspaceWish,
};

use super::inner::{FromSupervisor, Start, send};
use crate::library::Policies;
use crate::protocol::{Code, Denial, Directory, Limits, Mode, Run};

/// Does it all; the descriptors are those of the request.
pub fn live(start: Start, descriptors: Vec<OwnedFd>, channel: &OwnedFd) {
    let said = match run(start, descriptors) {
        Ok(ended) => ended,
        Err(refused) => refused,
    };
    // When nobody is there to hear it, the end is all there is.
    let _ = send(channel, &said, &[], SendFlags::empty());
}

fn denied(code: Code, message: impl Into<String>) -> FromSupervisor {
    FromSupervisor::Denied { denial: Denial::new(code, message) }
}

fn run(start: Start, descriptors: Vec<OwnedFd>) -> Result<FromSupervisor, FromSupervisor> {
    let Start { sandbox, peer, run, process } = start;
    let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
    let not_narrower = |error: &dyn std::fmt::Display| denied(Code::NotNarrower, error.to_string());
    let Run { policy, command, environment, path, streams, workspace, limits } = run;
    let name: PolicyName = policy.parse().map_err(|_| denied(Code::PolicyNotGranted, "no such policy"))?;
    let policy = Policies::of_host()
        .load(name.as_str())
        .map_err(|error| denied(Code::PolicyNotGranted, error.to_string()))?;
    let mut take = |at: usize| descriptors.get_mut(at).and_then(Option::take);
    let given_streams = streams.map(|stream| stream.and_then(&mut take));
    let wish = workspace.as_ref().map(|Directory { name, mode, .. }| WorkspaceWish {
        directory: name.into(),
        mode: if *mode == Mode::Ro { WorkspaceMode::ReadOnly } else { WorkspaceMode::ReadWrite },
    });
    let directory = workspace.and_then(|workspace| take(workspace.descriptor));
    let process = process.and_then(take);
    let Limits { timeout, memory, pids, cpus } = limits.unwrap_or_default();
    let wishes = Wishes {
        command: command.into_iter().map(OsString::from).collect(),
        workspace: wish,
        env: environment.into_iter().map(|variable| (variable.name, variable.value.into())).collect(),
        timeout,
        memory,
        pids,
        cpus,
        streams: std::array::from_fn(
            |at| if given_streams[at].is_some() { Stream::Pipe } else { Stream::Closed },
        ),
        terminal: Terminal::None,
    };
    let job = Job::narrow(&policy, wishes).map_err(|error| not_narrower(&error))?;
    // Nobody's home: what the policy names below one is the embedded caller's to show.
    let host = Host::probe(&policy, Caller::current(None, Some(path.into())));
    let plan = Plan::make(&policy, &job, &host)
        .map_err(|error| FromSupervisor::NotStarted { message: error.to_string(), report: None })?;
    let given = Given { streams: given_streams, workspace: directory, caller: (peer.uid, peer.gid), process };
    match sandbox::run_given(&plan, &sandbox::shared_directory(), given) {
        Ok(report) => {
            let mut report = report.to_json(&policy, &plan).unwrap_or_default();
            report["sandbox"] = sandbox.id.into();
            Ok(FromSupervisor::Ended { report })
        }
        Err(error) => {
            let outcome = serde_json::to_value(error.outcome()).ok();
            let report = outcome.map(|outcome| serde_json::json!({ "outcome": outcome }));
            Err(FromSupervisor::NotStarted { message: error.to_string(), report })
        }
    }
}
