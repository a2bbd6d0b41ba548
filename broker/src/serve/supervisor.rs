//! One process for each sandbox, forked by the launcher: makes the sandbox, waits for its end, says what came of it.
//! It reads what the core has checked, and nothing that a workload wrote.

use std::ffi::OsString;
use std::io;

use rustix::fd::{AsFd, OwnedFd};
use rustix::net::SendFlags;
use sandbox::{
    Caller, Ear, EndedBy, Given, Host, Job, LaunchError, Network, Outcome, Plan, Policy, PolicyName, Report,
    Stream, Terminal, Wishes, WorkspaceMode, WorkspaceWish,
};
use serde_json::json;

use super::attendant::{Attendant, Only};
use super::changes;
use super::config::{Accounts, Config, Peer};
use super::inner::{DESCRIPTORS_MAX, FromSupervisor, Kind, Listen, Start, send};
use super::peer::Door;
use crate::library::Policies;
use crate::protocol::{Code, Denial, Directory, Held, Limits, Mode, Run, Sandbox, Variable};

/// What it knows of the service, from the launcher, whose copy it is.
pub struct Service<'a> {
    pub config: &'a Config,
    pub accounts: &'a Accounts,
    pub door: Door,
}

/// Does it all; the descriptors are those of the request.
pub fn live(
    start: Start,
    descriptors: Vec<OwnedFd>,
    network: Option<OwnedFd>,
    service: &Service<'_>,
    channel: &OwnedFd,
) {
    let said = match run(start, descriptors, network, service, channel) {
        Ok(ended) => ended,
        Err(refused) => refused,
    };
    // When nobody is there to hear it, the end is all there is.
    let _ = send(channel, &said, &[], SendFlags::empty());
}

fn denied(code: Code, message: impl Into<String>) -> FromSupervisor {
    FromSupervisor::Denied { denial: Denial::new(code, message) }
}

fn run(
    start: Start,
    descriptors: Vec<OwnedFd>,
    network: Option<OwnedFd>,
    service: &Service<'_>,
    channel: &OwnedFd,
) -> Result<FromSupervisor, FromSupervisor> {
    let Start { sandbox, run, kind, asker, listen } = start;
    let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
    let socket = asker.and_then(|at| descriptors.get_mut(at).and_then(Option::take));
    let (peer, process) = service.asker(socket, &kind, &sandbox, &run)?;
    let state = service.config.server.state.as_path();
    let Run { policy, command, environment, path, streams, workspace, limits, grants: _ } = run;
    let policy = policy_named(&policy)?;
    let mut take = |at: usize| descriptors.get_mut(at).and_then(Option::take);
    let streams = streams.each().map(|stream| stream.and_then(&mut take));
    let wish = workspace.as_ref().map(|Directory { name, mode, .. }| WorkspaceWish {
        directory: name.into(),
        mode: match mode {
            Mode::Ro => WorkspaceMode::ReadOnly,
            Mode::Rw => WorkspaceMode::ReadWrite,
            Mode::Cow => WorkspaceMode::CopyOnWrite,
        },
    });
    let directory = workspace.and_then(|workspace| take(workspace.descriptor));
    let door = listen.as_ref().and_then(|listen| take(listen.door));
    let Limits { timeout, memory, pids, cpus } = limits.unwrap_or_default();
    let kinds = streams.each_ref().map(|given| if given.is_some() { Stream::Pipe } else { Stream::Closed });
    let wishes = Wishes {
        workspace: wish,
        timeout,
        memory,
        pids,
        cpus,
        streams: kinds,
        ..words(command, environment)
    };
    let (network, told) =
        hearing(network, listen, channel).map_err(|error| not_started(format!("its network: {error}")))?;
    let wishes = Wishes { network: told, ..wishes };
    let host = Host::probe(&policy, caller(&path));
    let plan = planned(&policy, wishes.clone(), &host)?;
    let held = held(&sandbox, &plan, (peer.uid, peer.gid));
    let place = held.as_ref().map(|held| {
        changes::place(state, &held.sandbox).and_then(|place| changes::note(state, held).map(|()| place))
    });
    let place = place.transpose().map_err(|error| not_started(format!("the state directory: {error}")))?;
    let given = Given {
        streams,
        workspace: directory,
        caller: (peer.uid, peer.gid),
        process,
        changes: place,
        network,
        door,
    };
    let shared = sandbox::shared_directory();
    let mut only = None;
    let ran = if kind == Kind::Run {
        sandbox::run_given(&plan, &shared, given)
    } else {
        if policy.file().limits.output.is_some() {
            return Err(denied(
                Code::NotNarrower,
                "its policy caps output, which no sandbox that lives does yet",
            ));
        }
        let mut attendant = Attendant::new(channel, &policy, &host, wishes, &plan, held.clone());
        let ran = sandbox::live(&plan, &shared, given, |orders| attendant.attend(orders));
        only = attendant.only;
        ran
    };
    let held = held.filter(|held| !matches!(changes::settle(state, &held.sandbox), Ok(false)));
    came_to(ran, &policy, &plan, sandbox.id, only).map(|ended| match ended {
        FromSupervisor::Ended { mut report, .. } => {
            report["changes"] = held.is_some().into();
            FromSupervisor::Ended { report, held }
        }
        other => other,
    })
}

impl Service<'_> {
    /// Who asks, and its process. The core has decided already, and reads what peers send: what it says of them is not believed.
    fn asker(
        &self,
        socket: Option<OwnedFd>,
        kind: &Kind,
        sandbox: &Sandbox,
        run: &Run,
    ) -> Result<(Peer, Option<OwnedFd>), FromSupervisor> {
        let nobody = || denied(Code::PolicyNotGranted, "nobody who may have it has asked for it");
        let Some(socket) = socket else {
            let pooled = run.policy.parse().is_ok_and(|policy| self.config.pool.warm.contains_key(&policy));
            let root = Peer { uid: 0, gid: 0 };
            return if *kind == Kind::Warm && pooled && run.workspace.is_none() {
                Ok((root, None))
            } else {
                Err(nobody())
            };
        };
        let (peer, process) = self.door.peer_of(socket).map_err(|_| nobody())?;
        let rights = self.config.rights(peer, self.accounts);
        let may = run.policy.parse().is_ok_and(|policy| rights.may_use(&policy))
            && run.grants.iter().all(|grant| rights.may_grant(grant))
            && sandbox.uid == peer.uid;
        if may { Ok((peer, process)) } else { Err(nobody()) }
    }
}

/// Its network, with who listens there, of which the core has what it takes to hear; and what is said of it inside.
fn hearing(
    ready: Option<OwnedFd>,
    listen: Option<Listen>,
    channel: &OwnedFd,
) -> io::Result<(Option<OwnedFd>, Option<Network>)> {
    let Some(Listen { at, authority, grants, .. }) = listen else { return Ok((ready, None)) };
    let network = ready.map_or_else(sandbox::network_namespace, Ok)?;
    let Ear { names, listeners } = sandbox::make_ear(&network, &at)?;
    let sockets: Vec<_> = std::iter::once(&names).chain(&listeners).map(AsFd::as_fd).collect();
    let pieces = sockets.chunks(DESCRIPTORS_MAX);
    let last = pieces.len() - 1;
    for (at, piece) in pieces.enumerate() {
        send(channel, &FromSupervisor::Ear { whole: at == last }, piece, SendFlags::empty())?;
    }
    let grants = grants.iter().map(ToString::to_string).collect();
    Ok((Some(network), Some(Network { authority, grants })))
}

/// What is noted of changes that are held apart.
fn held(sandbox: &Sandbox, plan: &Plan, (uid, gid): (u32, u32)) -> Option<Box<Held>> {
    let workspace = plan.workspace.as_ref().filter(|plan| plan.mode == WorkspaceMode::CopyOnWrite)?;
    Some(Box::new(Held {
        sandbox: sandbox.id.clone(),
        uid,
        gid,
        session: sandbox.session.clone(),
        since_ms: super::audit::now_ms(),
        workspace: workspace.directory.display().to_string(),
        protect: workspace.protect.iter().map(|protect| protect.path.display().to_string()).collect(),
    }))
}

fn not_started(message: String) -> FromSupervisor {
    FromSupervisor::NotStarted { message, report: None }
}

/// Nobody's home: what the policy names below one is the embedded caller's to show.
pub(super) fn caller(path: &str) -> Caller {
    Caller::current(None, Some(path.into()))
}

fn policy_named(name: &str) -> Result<Policy, FromSupervisor> {
    let name: PolicyName = name.parse().map_err(|_| denied(Code::PolicyNotGranted, "no such policy"))?;
    let policy = Policies::of_host().load(name.as_str());
    policy.map_err(|error| denied(Code::PolicyNotGranted, error.to_string()))
}

pub(super) fn words(command: Vec<String>, environment: Vec<Variable>) -> Wishes {
    Wishes {
        command: command.into_iter().map(OsString::from).collect(),
        env: environment.into_iter().map(|variable| (variable.name, variable.value.into())).collect(),
        terminal: Terminal::None,
        ..Wishes::default()
    }
}

pub(super) fn narrowed(policy: &Policy, wishes: Wishes) -> Result<Job, FromSupervisor> {
    Job::narrow(policy, wishes).map_err(|error| denied(Code::NotNarrower, error.to_string()))
}

fn planned(policy: &Policy, wishes: Wishes, host: &Host) -> Result<Plan, FromSupervisor> {
    Plan::make(policy, &narrowed(policy, wishes)?, host)
        .map_err(|error| FromSupervisor::NotStarted { message: error.to_string(), report: None })
}

fn came_to(
    ran: Result<Report, LaunchError>,
    policy: &Policy,
    plan: &Plan,
    id: String,
    only: Option<Only>,
) -> Result<FromSupervisor, FromSupervisor> {
    match ran {
        Ok(mut report) => {
            let killed = Outcome::Signaled { signal: libc::SIGKILL };
            match only {
                Some(Only::Refused(refused)) => return Err(refused),
                Some(Only::Ended { outcome, wall_ms }) => {
                    let oom = report.denials.oom_kills > 0 && outcome == killed;
                    report.outcome = if oom { Outcome::Oom } else { outcome };
                    report.ended_by = EndedBy::of(&report.outcome);
                    report.usage.wall_ms = wall_ms;
                }
                Some(Only::UnderWay { .. }) if report.ended_by == EndedBy::Broker => report.outcome = killed,
                _ => {}
            }
            let mut report = report.to_json(policy, plan).unwrap_or_default();
            report["sandbox"] = id.into();
            Ok(FromSupervisor::Ended { report, held: None })
        }
        Err(error) => {
            let outcome = serde_json::to_value(error.outcome()).ok();
            let report = outcome.map(|outcome| json!({ "outcome": outcome }));
            Err(FromSupervisor::NotStarted { message: error.to_string(), report })
        }
    }
}
