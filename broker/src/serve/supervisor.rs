//! One process for each sandbox, forked by the launcher: makes the sandbox, waits for its end, says what came of it.
//! It reads what the core has checked, and nothing that a workload wrote.

use std::ffi::OsString;
use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{RecvFlags, SendFlags};
use sandbox::{
    Caller, CommandPlan, Given, Host, Job, LaunchError, Next, Orders, Plan, Policy, PolicyName, Report,
    Stream, Terminal, Wishes, WorkspaceMode, WorkspaceWish,
};

use serde_json::{Value, json};

use super::inner::{FromSupervisor, Start, ToSupervisor, receive, send, until};
use crate::library::Policies;
use crate::protocol::{Code, Denial, Directory, Limits, Mode, Run, Variable};

/// Does it all; the descriptors are those of the request.
pub fn live(start: Start, descriptors: Vec<OwnedFd>, channel: &OwnedFd) {
    let said = match run(start, descriptors, channel) {
        Ok(ended) => ended,
        Err(refused) => refused,
    };
    // When nobody is there to hear it, the end is all there is.
    let _ = send(channel, &said, &[], SendFlags::empty());
}

fn denied(code: Code, message: impl Into<String>) -> FromSupervisor {
    FromSupervisor::Denied { denial: Denial::new(code, message) }
}

fn run(start: Start, descriptors: Vec<OwnedFd>, channel: &OwnedFd) -> Result<FromSupervisor, FromSupervisor> {
    let Start { sandbox, peer, run, handle, process } = start;
    let mut descriptors: Vec<Option<OwnedFd>> = descriptors.into_iter().map(Some).collect();
    let Run { policy, command, environment, path, streams, workspace, limits } = run;
    let policy = policy_named(&policy)?;
    let mut take = |at: usize| descriptors.get_mut(at).and_then(Option::take);
    let streams = streams.map(|stream| stream.and_then(&mut take));
    let wish = workspace.as_ref().map(|Directory { name, mode, .. }| WorkspaceWish {
        directory: name.into(),
        mode: if *mode == Mode::Ro { WorkspaceMode::ReadOnly } else { WorkspaceMode::ReadWrite },
    });
    let directory = workspace.and_then(|workspace| take(workspace.descriptor));
    let process = process.and_then(take);
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
    let plan = planned(&policy, wishes.clone(), &path)?;
    let given = Given { streams, workspace: directory, caller: (peer.uid, peer.gid), process };
    let shared = sandbox::shared_directory();
    let ran = if handle.is_some() {
        if policy.file().limits.output.is_some() {
            return Err(denied(
                Code::NotNarrower,
                "its policy caps output, which no sandbox that lives does yet",
            ));
        }
        let mut attendant = Attendant {
            channel,
            policy: &policy,
            wishes: &wishes,
            plan: &plan,
            under_way: Vec::new(),
            ready: FromSupervisor::Ready,
        };
        sandbox::live(&plan, &shared, given, |orders| attendant.attend(orders))
    } else {
        sandbox::run_given(&plan, &shared, given)
    };
    came_to(ran, &policy, &plan, sandbox.id)
}

fn policy_named(name: &str) -> Result<Policy, FromSupervisor> {
    let name: PolicyName = name.parse().map_err(|_| denied(Code::PolicyNotGranted, "no such policy"))?;
    let policy = Policies::of_host().load(name.as_str());
    policy.map_err(|error| denied(Code::PolicyNotGranted, error.to_string()))
}

fn words(command: Vec<String>, environment: Vec<Variable>) -> Wishes {
    Wishes {
        command: command.into_iter().map(OsString::from).collect(),
        env: environment.into_iter().map(|variable| (variable.name, variable.value.into())).collect(),
        terminal: Terminal::None,
        ..Wishes::default()
    }
}

fn planned(policy: &Policy, wishes: Wishes, path: &str) -> Result<Plan, FromSupervisor> {
    let job = Job::narrow(policy, wishes).map_err(|error| denied(Code::NotNarrower, error.to_string()))?;
    // Nobody's home: what the policy names below one is the embedded caller's to show.
    let host = Host::probe(policy, Caller::current(None, Some(path.into())));
    Plan::make(policy, &job, &host)
        .map_err(|error| FromSupervisor::NotStarted { message: error.to_string(), report: None })
}

fn came_to(
    ran: Result<Report, LaunchError>,
    policy: &Policy,
    plan: &Plan,
    id: String,
) -> Result<FromSupervisor, FromSupervisor> {
    match ran {
        Ok(report) => {
            let mut report = report.to_json(policy, plan).unwrap_or_default();
            report["sandbox"] = id.into();
            Ok(FromSupervisor::Ended { report })
        }
        Err(error) => {
            let outcome = serde_json::to_value(error.outcome()).ok();
            let report = outcome.map(|outcome| json!({ "outcome": outcome }));
            Err(FromSupervisor::NotStarted { message: error.to_string(), report })
        }
    }
}

/// Stands between the core and the init of a sandbox that lives.
struct Attendant<'a> {
    channel: &'a OwnedFd,
    policy: &'a Policy,
    /// What the sandbox was made with: its variables are those of every command in it.
    wishes: &'a Wishes,
    plan: &'a Plan,
    under_way: Vec<UnderWay>,
    /// What is said when the sandbox waits for commands.
    ready: FromSupervisor,
}

/// A command that runs.
struct UnderWay {
    number: u32,
    deadline: Option<Instant>,
    told_to_end: bool,
    killed: bool,
}

impl Attendant<'_> {
    /// Until it is told what is to become of the sandbox, or that has ended.
    fn attend(&mut self, orders: &Orders<'_>) -> io::Result<Next> {
        send(self.channel, &self.ready, &[], SendFlags::empty())?;
        loop {
            let soonest = self.under_way.iter().filter_map(|command| command.deadline).min();
            let left = soonest.map(until);
            let [signals, said] = [orders.signals(), orders.channel()];
            let mut waits = [
                PollFd::new(&signals, PollFlags::IN),
                PollFd::new(&said, PollFlags::IN),
                PollFd::new(self.channel, PollFlags::IN),
            ];
            match poll(&mut waits, left.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [signaled, said, asked] = waits.map(|wait| !wait.revents().is_empty());
            if signaled && orders.is_told_to_end() {
                return Ok(Next::End);
            }
            if said {
                let Some((number, outcome)) = orders.hear()? else { return Ok(Next::Ended) };
                self.tell_of(number, &outcome)?;
            }
            if asked && let Some(next) = self.obey(orders)? {
                return Ok(next);
            }
            if !self.enforce_deadlines(orders) {
                return Ok(Next::End);
            }
        }
    }

    fn tell_of(&mut self, number: u32, outcome: &sandbox::Outcome) -> io::Result<()> {
        let ended = self.under_way.iter().position(|command| command.number == number);
        let timed_out = ended.is_some_and(|at| self.under_way.swap_remove(at).told_to_end);
        let outcome = if timed_out { &sandbox::Outcome::TimedOut } else { outcome };
        self.say_executed(number, serde_json::to_value(outcome)?)
    }

    /// One request of the core's; what is to become of the sandbox, where that is not to go on.
    fn obey(&mut self, orders: &Orders<'_>) -> io::Result<Option<Next>> {
        let Some((request, descriptors)) = receive::<ToSupervisor>(self.channel, RecvFlags::empty())? else {
            return Ok(Some(Next::End));
        };
        let (number, command, environment, path, streams) = match request {
            ToSupervisor::Execute { number, command, environment, path, streams } => {
                (number, command, environment, path, streams)
            }
            ToSupervisor::Signal { number, signal } => {
                // It may just have ended.
                let _ = orders.signal(number, signal);
                return Ok(None);
            }
            ToSupervisor::Renew => {
                for command in std::mem::take(&mut self.under_way) {
                    let outcome =
                        json!({ "kind": "signaled", "signal": libc::SIGKILL, "ended_by": "hand_over" });
                    self.say_executed(command.number, outcome)?;
                }
                self.ready = FromSupervisor::Renewed;
                return Ok(Some(Next::Renew));
            }
        };
        let planned = self.command(command, environment, &path);
        let mut given = descriptors.iter();
        let streams = streams.map(|stream| if stream { given.next().map(AsFd::as_fd) } else { None });
        let begun = match planned {
            Ok(command) => orders.execute(number, &command, streams).map_err(|error| error.to_string()),
            Err(FromSupervisor::Denied { denial }) => Err(denial.message),
            Err(FromSupervisor::NotStarted { message, .. }) => Err(message),
            Err(_) => Err("it could not be planned".to_owned()),
        };
        match begun {
            Ok(()) => {
                let deadline =
                    self.plan.timeout_ms.map(|timeout| Instant::now() + Duration::from_millis(timeout));
                self.under_way.push(UnderWay { number, deadline, told_to_end: false, killed: false });
            }
            Err(message) => {
                self.say_executed(
                    number,
                    json!({ "kind": "setup_failed", "step": "command", "message": message }),
                )?;
            }
        }
        Ok(None)
    }

    fn say_executed(&self, number: u32, outcome: Value) -> io::Result<()> {
        send(self.channel, &FromSupervisor::Executed { number, outcome }, &[], SendFlags::empty())
    }

    fn command(
        &self,
        command: Vec<String>,
        environment: Vec<Variable>,
        path: &str,
    ) -> Result<CommandPlan, FromSupervisor> {
        let mut wishes = words(command, environment);
        wishes.env.splice(0..0, self.wishes.env.iter().cloned());
        wishes.workspace = self.wishes.workspace.clone();
        planned(self.policy, wishes, path).map(|plan| plan.command)
    }

    /// SIGTERM at the deadline, SIGKILL to the process group after the grace period; and where that has not helped after
    /// another, because somebody holds init up, the sandbox ends: then this is false.
    fn enforce_deadlines(&mut self, orders: &Orders<'_>) -> bool {
        let now = Instant::now();
        for command in &mut self.under_way {
            if command.deadline.is_some_and(|deadline| deadline <= now) {
                let signal = if command.told_to_end { libc::SIGKILL } else { libc::SIGTERM };
                if command.killed || orders.signal(command.number, signal).is_err() {
                    return false;
                }
                command.deadline = Some(now + Duration::from_millis(self.plan.grace_ms.max(100)));
                command.killed = command.told_to_end;
                command.told_to_end = true;
            }
        }
        true
    }
}
