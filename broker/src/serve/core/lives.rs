//! Sandboxes that live: made by `Provision`, used by `Execute` by whoever holds the handle, ended with its last copy.
//! Who may use one, and what becomes of it on the way to another, is in [`super::holders`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{RwLock, watch};

use super::askers::{Asker, Principal};
use super::decide::{all_named, all_pipes, is_lendable, may_use};
use super::effects::{Asked, Effects};
use super::grants::may_have;
use super::holders::{Holder, Renewals};
use super::operate::no_such;
use super::{Core, hear_supervisor, not_started};
use crate::connection::{Connection, End, Foreign};
use crate::protocol::{
    Code, Denial, Execute, Executed, Named, Progress, Provision, Provisioned, Run, Sandbox, Streams,
};
use crate::rights::name_of;
use crate::serve::audit::{self, bounded};
use crate::serve::inner::{FromSupervisor, Kind, ToLauncher, ToSupervisor, channel, packets, send};
use crate::serve::metrics::Begun;

/// A sandbox that waits for commands.
pub struct Live {
    pub(super) id: String,
    channel: UnixStream,
    /// Our end of the handle; the others are the callers'.
    pub(super) handle: Mutex<Arc<UnixStream>>,
    /// How long it lives on when nobody uses it, where it is kept.
    keep: Option<Duration>,
    pub(super) effects: Effects,
    /// One who proves holding it at a time.
    pub(super) proof: Mutex<()>,
    /// Whose it is, and stays while an order is given.
    pub(super) holder: RwLock<Holder>,
    pub(super) renewals: Renewals,
}

impl Live {
    pub(super) async fn tell(
        &self,
        message: &ToSupervisor,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let send = || send(&self.channel, message, descriptors, SendFlags::DONTWAIT);
        self.channel.async_io(Interest::WRITABLE, send).await
    }

    /// Returns when the last copy of the handle is closed, or somebody writes into it, which nobody has to.
    async fn let_go(&self) {
        let handle = self.handle();
        let read =
            || rustix::net::recv(&*handle, &mut [0; 1][..], RecvFlags::DONTWAIT).map_err(io::Error::from);
        let _ = handle.async_io(Interest::READABLE, read).await;
    }

    /// Returns when nobody wants it any more.
    async fn unwanted(&self) {
        match self.keep {
            None => self.let_go().await,
            Some(keep) => self.effects.idle_for(keep).await,
        }
    }

    pub(super) fn handle(&self) -> Arc<UnixStream> {
        Arc::clone(&self.handle.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The longest that a sandbox is kept for without being used.
const KEEP_MAX: Duration = Duration::from_secs(24 * 60 * 60);

fn may_be_kept(keep: Option<Duration>) -> Result<(), Denial> {
    if keep.is_none_or(|keep| keep <= KEEP_MAX) {
        return Ok(());
    }
    Err(Denial::new(Code::NotNarrower, "a sandbox is kept for 24h without use at most"))
}

impl Core {
    /// Makes a sandbox that lives, and hands its handle over.
    pub(super) async fn provision(
        self: &Arc<Self>,
        connection: &mut Connection,
        asker: &Asker,
        wish: Provision,
        descriptors: Vec<Foreign>,
    ) -> Result<(), End> {
        let Provision { policy, environment, path, workspace, limits, grants, keep } = wish;
        let keep = keep.map(|keep| keep.duration());
        let named: Vec<usize> = workspace.iter().map(|workspace| workspace.descriptor).collect();
        // A sandbox that waits has no command; what stands here is never run.
        let command = vec!["(none)".to_owned()];
        let run = Run {
            policy,
            command,
            environment,
            path,
            streams: Streams::default(),
            workspace,
            limits,
            grants,
        };
        let (ours, theirs) = channel().map_err(|_| End::Failed)?;
        let allowed = may_use(&run.policy, &asker.rights)
            .and_then(|()| all_named(&named, &descriptors))
            .and_then(|()| is_lendable(run.workspace.as_ref(), &descriptors))
            .and_then(|()| self.may_hold(&run, asker))
            .and_then(|()| may_have(&run.grants, &asker.rights, &self.config))
            .and_then(|()| self.not_revoked(asker, &run.grants))
            .and_then(|()| may_be_kept(keep));
        if let Err(denial) = allowed {
            return self.deny(connection, asker, "Provision", denial).await;
        }
        let warm = self.take_warm(&run).await;
        let sandbox = match self.book(&run, asker, warm.as_ref()) {
            Ok(sandbox) => sandbox,
            Err(denial) => return self.refuse(connection, asker, "Provision", warm, denial).await,
        };
        let id = sandbox.id.clone();
        let began = Instant::now();
        let mut event = asker.event("provision");
        event["sandbox"] = id.as_str().into();
        event["policy"] = run.policy.as_str().into();
        if !run.grants.is_empty() {
            event["grants"] = json!(run.grants);
        }
        if let Some(keep) = keep {
            event["keep_ms"] = json!(keep.as_millis());
        }
        if !self.audit.record(event).await {
            self.table().sandboxes.remove(&id);
            return self.refuse(connection, asker, "Provision", warm, Denial::not_recorded()).await;
        }
        self.metrics.begun(Begun::Provision);
        let name = name_of(&theirs);
        let kind = Kind::Live { handle: name.clone() };
        let was_warm = warm.is_some();
        let started = match warm {
            Some(warm) => {
                let first = ToSupervisor::Serve { environment: run.environment };
                self.assign(warm, sandbox, kind, Some(ours.as_fd()), &first, &[]).await
            }
            None => {
                self.start_for(connection, asker, sandbox, run, kind, Some(ours.as_fd()), &descriptors).await
            }
        };
        drop(descriptors);
        let (channel, handle) = match started.and_then(|channel| Ok((channel, packets(ours)?))) {
            Ok(started) => started,
            Err(error) => {
                let ended = not_started(format!("the launcher: {error}"));
                self.finish(&id, &ended).await;
                return self.not_started(connection, ended).await;
            }
        };
        let holder = Holder::new(asker.principal());
        let live = Arc::new(Live::new(id.clone(), channel, handle, Effects::default(), holder, keep));
        if !was_warm {
            let said = match self.hear_ear(&id, &live.channel).await {
                Some(ended) => ended,
                None => hear_supervisor(&live.channel).await,
            };
            match said {
                FromSupervisor::Ready { held, .. } => self.hold(held),
                FromSupervisor::Denied { denial } => {
                    self.finish(&id, &FromSupervisor::Denied { denial: denial.clone() }).await;
                    return self.deny(connection, asker, "Provision", denial).await;
                }
                ended => {
                    self.finish(&id, &ended).await;
                    return self.not_started(connection, ended).await;
                }
            }
        }
        self.metrics.started_in(began.elapsed());
        self.keep(name, live);
        // If it cannot be handed over, its last copy closes here, and the sandbox ends.
        connection.hand_over(Provisioned { sandbox: id, handle: 0 }, theirs).await
    }

    /// `Handle`: a new one in the place of what handles a sandbox had.
    pub(super) async fn new_handle(
        &self,
        connection: &Connection,
        asker: &Asker,
        Named { sandbox }: Named,
    ) -> Result<(), End> {
        let owned = self.live_owned(asker, &sandbox);
        let Some(live) = owned.filter(|live| live.keep.is_some()) else {
            return no_such(connection, &sandbox).await;
        };
        let mut event = asker.event("handle");
        event["sandbox"] = sandbox.as_str().into();
        if !self.audit.record(event).await {
            return self.deny(connection, asker, "Handle", Denial::not_recorded()).await;
        }
        let (ours, theirs) = channel().map_err(|_| End::Failed)?;
        let (name, ours) = (name_of(&theirs), packets(ours).map_err(|_| End::Failed)?);
        {
            let mut table = self.table();
            table.lives.retain(|_, other| !Arc::ptr_eq(other, &live));
            *live.handle.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(ours);
            table.lives.insert(name, live);
        }
        connection.hand_over(Provisioned { sandbox, handle: 0 }, theirs).await
    }

    /// Takes over a sandbox that an earlier core has made, with what the record knows of its commands.
    pub(super) fn adopt(
        self: &Arc<Self>,
        sandbox: &Sandbox,
        name: String,
        channel: UnixStream,
        handle: UnixStream,
    ) {
        let id = sandbox.id.clone();
        let first = Principal { uid: sandbox.uid, session: sandbox.session.clone() };
        let (effects, mut holder, mut keep) = (Effects::default(), Holder::new(first), None);
        // The record was verified when this process began.
        let _ = audit::of_sandbox(&self.config.server.record(), &id, sandbox.started_ms, |event| {
            effects.follow(event);
            holder.follow(event);
            keep = keep.or(event["keep_ms"].as_u64().map(Duration::from_millis));
        });
        self.belongs_to(&id, holder.principal());
        let live = Arc::new(Live::new(id, channel, handle, effects, holder, keep));
        self.keep(name, Arc::clone(&live));
        tokio::spawn(async move { live.tell(&ToSupervisor::Again, &[]).await });
    }

    /// Notes how commands end, and ends the sandbox with the last copy of its handle.
    fn keep(self: &Arc<Self>, name: String, live: Arc<Live>) {
        self.table().lives.insert(name, Arc::clone(&live));
        let core = Arc::clone(self);
        tokio::spawn(async move {
            let mut held = true;
            let ended = loop {
                let said = tokio::select! {
                    said = hear_supervisor(&live.channel) => said,
                    () = live.unwanted(), if held => {
                        held = false;
                        core.table().lives.retain(|_, other| !Arc::ptr_eq(other, &live));
                        let _ = core.tell(&ToLauncher::End { id: live.id.clone() }, &[]).await;
                        continue;
                    }
                };
                match said {
                    FromSupervisor::Executed { number, outcome } => core.note_end(&live, number, outcome),
                    FromSupervisor::Renewed => {
                        // What listened did so in the namespace that is gone.
                        core.close_gate(&live.id).await;
                        live.renewals.one_more();
                    }
                    FromSupervisor::Ready { .. } | FromSupervisor::Ear { .. } => {}
                    ended => break ended,
                }
            };
            core.table().lives.retain(|_, other| !Arc::ptr_eq(other, &live));
            live.effects.end();
            live.renewals.no_more();
            core.finish(&live.id, &ended).await;
        });
    }

    /// Who waits hears of it at once: until it is recorded the supervisor keeps it, for a core that comes after this one.
    fn note_end(self: &Arc<Self>, live: &Arc<Live>, number: u32, outcome: Value) {
        let event = live.effects.ended(number, &outcome).map(
            |effect| json!({ "kind": "executed", "sandbox": live.id, "effect": effect, "number": number, "outcome": outcome }),
        );
        let (core, live) = (Arc::clone(self), Arc::clone(live));
        tokio::spawn(async move {
            let known = match event {
                Some(event) => core.audit.record(event).await,
                None => true,
            };
            if known {
                let _ = live.tell(&ToSupervisor::Noted { number }, &[]).await;
            }
        });
    }

    /// Runs a command in the sandbox whose handle was presented.
    pub(super) async fn execute(
        self: &Arc<Self>,
        connection: &mut Connection,
        asker: &Asker,
        wish: Execute,
        descriptors: Vec<Foreign>,
        more: bool,
    ) -> Result<(), End> {
        let Execute { handle, sandbox, effect, command, environment, path, streams } = wish;
        let streams = streams.each();
        let named: Vec<usize> = streams.iter().flatten().copied().chain(handle).collect();
        let allowed = all_named(&named, &descriptors).and_then(|()| all_pipes(&streams, &descriptors));
        if let Err(denial) = allowed {
            return self.deny(connection, asker, "Execute", denial).await;
        }
        let live = match self.named_live(asker, handle, sandbox, &descriptors) {
            Ok(live) => live,
            Err(missing) => {
                drop(descriptors);
                return self.missing(connection, asker, missing).await;
            }
        };
        let Asked { number, heard, is_new } = match live.effects.ask(asker.principal(), &effect) {
            Ok(asked) => asked,
            Err(denial) => return self.deny(connection, asker, "Execute", denial).await,
        };
        if !is_new {
            drop(descriptors);
            let outcome = heard.borrow().clone();
            let state = if outcome.is_some() { Progress::Finished } else { Progress::Running };
            return connection.reply(Executed { sandbox: live.id.clone(), state, outcome }, false).await;
        }
        // Nobody else takes it over until the order is given.
        let holding = match self.take_over(&live, asker).await {
            Ok(holding) => holding,
            Err(why) => {
                live.effects.forget(number);
                return match why {
                    FromSupervisor::Denied { denial } => {
                        self.deny(connection, asker, "Execute", denial).await
                    }
                    ended => self.not_started(connection, ended).await,
                };
            }
        };
        let mut event = asker.event("execute");
        event["sandbox"] = live.id.as_str().into();
        event["effect"] = effect.as_str().into();
        event["number"] = number.into();
        event["command"] = command.iter().map(|word| bounded(word)).take(64).collect();
        if !self.audit.record(event).await {
            live.effects.forget(number);
            return self.deny(connection, asker, "Execute", Denial::not_recorded()).await;
        }
        self.metrics.begun(Begun::Execute);
        let given: Vec<_> = streams.iter().flatten().map(|number| descriptors[*number].as_fd()).collect();
        let order = ToSupervisor::Execute {
            number,
            command,
            environment,
            path,
            streams: streams.map(|stream| stream.is_some()),
        };
        let told = live.tell(&order, &given).await;
        drop((holding, descriptors));
        if let Err(error) = told {
            // Its words are too long together, or the supervisor is gone: it was not begun, and that is how it ended.
            let outcome = json!({ "kind": "setup_failed", "step": "command", "message": error.to_string() });
            self.note_end(&live, number, outcome);
        }
        self.wait(connection, &live, heard, more).await
    }

    /// Until the command has ended. It goes on when its caller goes away: whoever asks again under its name finds it.
    async fn wait(
        &self,
        connection: &mut Connection,
        live: &Live,
        mut heard: watch::Receiver<Option<Value>>,
        more: bool,
    ) -> Result<(), End> {
        let sandbox = live.id.clone();
        if more {
            let begun = Executed { sandbox: sandbox.clone(), state: Progress::Started, outcome: None };
            connection.reply(begun, true).await?;
        }
        let ended = tokio::select! {
            ended = heard.wait_for(Option::is_some) => ended.map(|outcome| outcome.clone()).ok(),
            end = connection.gone() => return Err(end),
        };
        match ended {
            Some(outcome) => {
                connection.reply(Executed { sandbox, state: Progress::Finished, outcome }, false).await
            }
            None => self.not_started(connection, not_started("the sandbox ended".to_owned())).await,
        }
    }
}

impl Live {
    fn new(
        id: String,
        channel: UnixStream,
        handle: UnixStream,
        effects: Effects,
        holder: Holder,
        keep: Option<Duration>,
    ) -> Live {
        Live {
            id,
            channel,
            handle: Mutex::new(Arc::new(handle)),
            keep,
            effects,
            proof: Mutex::new(()),
            holder: RwLock::new(holder),
            renewals: Renewals::default(),
        }
    }
}
