//! Stands between the core and the init of a sandbox that waits for commands.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{RecvFlags, SendFlags};
use sandbox::{CommandPlan, Host, Next, Orders, Outcome, Plan, Policy, Wishes};
use serde_json::{Value, json};

use super::inner::{FromSupervisor, ToSupervisor, receive, send, until};
use super::supervisor::{caller, narrowed, words};
use crate::protocol::{Held, Variable};

/// The number of the one command of a sandbox that was warm; the core's begin at 1.
const ONLY: u32 = 0;

/// See above.
pub(super) struct Attendant<'a> {
    channel: &'a OwnedFd,
    policy: &'a Policy,
    host: &'a Host,
    /// What the sandbox was made with: its variables are those of every command in it.
    wishes: Wishes,
    plan: &'a Plan,
    under_way: Vec<UnderWay>,
    /// How commands ended, as long as the core may lose it.
    unrecorded: BTreeMap<u32, Value>,
    /// What is said when the sandbox waits for commands.
    ready: FromSupervisor,
    /// What became of its only command, where it has no other.
    pub(super) only: Option<Only>,
}

/// A command whose end is its sandbox's.
pub(super) enum Only {
    /// It runs.
    UnderWay { since: Instant },
    /// It has ended.
    Ended { outcome: Outcome, wall_ms: f64 },
    /// It was not begun, and why.
    Refused(FromSupervisor),
}

/// A command that runs.
struct UnderWay {
    number: u32,
    deadline: Option<Instant>,
    told_to_end: bool,
    killed: bool,
}

/// A command as it was asked for.
struct Asked {
    number: u32,
    command: Vec<String>,
    environment: Vec<Variable>,
    path: String,
    streams: [bool; 3],
}

impl<'a> Attendant<'a> {
    pub(super) fn new(
        channel: &'a OwnedFd,
        policy: &'a Policy,
        host: &'a Host,
        wishes: Wishes,
        plan: &'a Plan,
        held: Option<Box<Held>>,
    ) -> Attendant<'a> {
        let ready = FromSupervisor::Ready { policy: policy.hash(), held };
        Attendant {
            channel,
            policy,
            host,
            wishes,
            plan,
            under_way: Vec::new(),
            unrecorded: BTreeMap::new(),
            ready,
            only: None,
        }
    }

    /// Until it is told what is to become of the sandbox, or that has ended.
    pub(super) fn attend(&mut self, orders: &Orders<'_>) -> io::Result<Next> {
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
            if signaled {
                let heard = orders.heard();
                if heard.end {
                    return Ok(Next::End);
                }
                // Which command they are for is known only where there is just one.
                for signal in heard.passed_on.iter().filter(|_| self.only.is_some()) {
                    let _ = orders.signal(ONLY, *signal);
                }
            }
            if said {
                let Some((number, outcome)) = orders.hear()? else { return Ok(Next::Ended) };
                self.tell_of(number, outcome)?;
            }
            let next = if asked { self.obey(orders)? } else { None };
            if let Some(next) = next.or(self.enforce_deadlines(orders)) {
                return Ok(next);
            }
            if matches!(self.only, Some(Only::Ended { .. } | Only::Refused(_))) {
                return Ok(Next::Ended);
            }
        }
    }

    fn tell_of(&mut self, number: u32, outcome: Outcome) -> io::Result<()> {
        let ended = self.under_way.iter().position(|command| command.number == number);
        let timed_out = ended.is_some_and(|at| self.under_way.swap_remove(at).told_to_end);
        let outcome = if timed_out { Outcome::TimedOut } else { outcome };
        if self.end_only(&outcome) {
            return Ok(());
        }
        self.say_executed(number, serde_json::to_value(outcome)?)
    }

    /// Notes how the only command ended, where there is one.
    fn end_only(&mut self, outcome: &Outcome) -> bool {
        let Some(Only::UnderWay { since }) = self.only else { return false };
        self.only =
            Some(Only::Ended { outcome: outcome.clone(), wall_ms: since.elapsed().as_secs_f64() * 1e3 });
        true
    }

    /// One request of the core's; what is to become of the sandbox, where that is not to go on.
    fn obey(&mut self, orders: &Orders<'_>) -> io::Result<Option<Next>> {
        let Some((request, descriptors)) = receive::<ToSupervisor>(self.channel, RecvFlags::empty())? else {
            return Ok(Some(Next::End));
        };
        match request {
            ToSupervisor::Execute { number, command, environment, path, streams } => {
                self.begin(orders, Asked { number, command, environment, path, streams }, &descriptors)?;
            }
            ToSupervisor::Run { command, environment, path, streams } => {
                self.only = Some(Only::UnderWay { since: Instant::now() });
                self.begin(
                    orders,
                    Asked { number: ONLY, command, environment, path, streams },
                    &descriptors,
                )?;
            }
            ToSupervisor::Serve { environment } => self.wishes.env = words(Vec::new(), environment).env,
            ToSupervisor::Signal { number, signal } => {
                // It may just have ended.
                let _ = orders.signal(number, signal);
            }
            ToSupervisor::Noted { number } => drop(self.unrecorded.remove(&number)),
            ToSupervisor::Again => {
                for (number, outcome) in &self.unrecorded {
                    let said = FromSupervisor::Executed { number: *number, outcome: outcome.clone() };
                    send(self.channel, &said, &[], SendFlags::empty())?;
                }
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
        }
        Ok(None)
    }

    fn begin(&mut self, orders: &Orders<'_>, asked: Asked, descriptors: &[OwnedFd]) -> io::Result<()> {
        let Asked { number, command, environment, path, streams } = asked;
        let mut given = descriptors.iter();
        let streams = streams.map(|stream| if stream { given.next().map(AsFd::as_fd) } else { None });
        let begun = self.command(command, environment, &path).and_then(|command| {
            orders.execute(number, &command, streams).map_err(|error| not_begun(error.to_string()))
        });
        let refused = match begun {
            Ok(()) => {
                let deadline =
                    self.plan.timeout_ms.map(|timeout| Instant::now() + Duration::from_millis(timeout));
                self.under_way.push(UnderWay { number, deadline, told_to_end: false, killed: false });
                return Ok(());
            }
            Err(refused) => refused,
        };
        if self.only.is_some() {
            self.only = Some(Only::Refused(refused));
            return Ok(());
        }
        let message = match refused {
            FromSupervisor::Denied { denial } => denial.message,
            FromSupervisor::NotStarted { message, .. } => message,
            _ => String::new(),
        };
        self.say_executed(number, json!({ "kind": "setup_failed", "step": "command", "message": message }))
    }

    fn say_executed(&mut self, number: u32, outcome: Value) -> io::Result<()> {
        self.unrecorded.insert(number, outcome.clone());
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
        let host = Host { caller: caller(path), ..self.host.clone() };
        Ok(self.plan.command_for(self.policy, &narrowed(self.policy, wishes)?, &host))
    }

    /// SIGTERM at the deadline, SIGKILL to the process group after the grace period; and where that has not helped after
    /// another, because somebody holds init up, the sandbox ends. Of an only command the sandbox ends with the grace period.
    fn enforce_deadlines(&mut self, orders: &Orders<'_>) -> Option<Next> {
        let now = Instant::now();
        for command in &mut self.under_way {
            if command.deadline.is_some_and(|deadline| deadline <= now) {
                if self.only.is_some() && command.told_to_end {
                    self.end_only(&Outcome::TimedOut);
                    return Some(Next::Ended);
                }
                let signal = if command.told_to_end { libc::SIGKILL } else { libc::SIGTERM };
                if command.killed || orders.signal(command.number, signal).is_err() {
                    return Some(Next::End);
                }
                command.deadline = Some(now + Duration::from_millis(self.plan.grace_ms.max(100)));
                command.killed = command.told_to_end;
                command.told_to_end = true;
            }
        }
        None
    }
}

fn not_begun(message: String) -> FromSupervisor {
    FromSupervisor::NotStarted { message, report: None }
}
