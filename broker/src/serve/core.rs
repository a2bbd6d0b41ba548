//! The core: speaks with peers, decides, records, and has the launcher act. Its own uid, no capability, no secret; it never
//! forks and holds nothing that it could hand out but the channels of its sandboxes.

mod decide;
mod lives;
mod run;
mod service;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

use super::audit::{Audit, bounded, now_ms, short};
use super::config::{Accounts, Config, Peer, Rights, Verb};
use super::inner::{FromSupervisor, Start, ToCore, ToLauncher, channel, receive, send};
use crate::connection::{Connection, End, Foreign};
use crate::protocol::{Code, Denial, INTERFACE, Named, Run, Sandbox, Sandboxes, Signal};
use crate::say::complain;
use crate::wire::{self, Breach, Call};
use lives::Live;

/// What one uid may have at the same time, and all together.
const CONNECTIONS_MAX: usize = 64;
const SANDBOXES_MAX: usize = 256;
const CONNECTIONS_ALL_MAX: usize = 1024;
/// Denials and breaches of one uid that are recorded one by one.
const DENIALS_A_SECOND: u32 = 20;

/// The core.
pub struct Core {
    config: Config,
    accounts: Accounts,
    audit: Audit,
    launcher: UnixStream,
    table: Mutex<Table>,
}

/// Who asks.
struct Asker {
    peer: Peer,
    rights: Rights,
}

#[derive(Default)]
struct Table {
    sandboxes: BTreeMap<String, Sandbox>,
    /// Those that wait for commands, by the kernel's name for the callers' end of their handle.
    lives: BTreeMap<String, Arc<Live>>,
    connections: BTreeMap<u32, usize>,
    denials: BTreeMap<u32, Denials>,
    started: u64,
}

/// Denials and breaches of one uid.
struct Denials {
    /// When the second began that counts.
    since: Instant,
    /// How many were recorded in it.
    recorded: u32,
    /// How many were not, since the last that was.
    folded: u64,
}

impl Denials {
    fn now() -> Denials {
        Denials { since: Instant::now(), recorded: 0, folded: 0 }
    }
}

/// Serves until the launcher goes away. The listening socket is what it gave.
pub async fn serve(launcher: OwnedFd) -> Result<(), String> {
    let setup = receive::<ToCore>(&launcher, RecvFlags::empty()).map_err(|error| error.to_string())?;
    let Some((ToCore::Setup(config), mut descriptors)) = setup else {
        return Err("the launcher said nothing".to_owned());
    };
    let listener = descriptors.pop().ok_or("the launcher gave no socket")?;
    let listener = std::os::unix::net::UnixListener::from(listener);
    let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
    let listener = listener.map_err(|error| format!("the socket: {error}"))?;
    let audit = Audit::open(&config.server.state)?;
    let launcher = packets(launcher).map_err(|error| format!("the launcher's channel: {error}"))?;
    let accounts = Accounts::read();
    let core = Arc::new(Core { config, accounts, audit, launcher, table: Mutex::default() });
    core.tell(&ToLauncher::Serving, &[]).await.map_err(|error| format!("the launcher: {error}"))?;
    tokio::select! {
        ended = hear(Arc::clone(&core)) => ended.map_err(|error| format!("the launcher: {error}")),
        ended = accept(core, listener) => ended.map_err(|error| format!("accept: {error}")),
    }
}

/// What the launcher says: sandboxes that live since before this core.
async fn hear(core: Arc<Core>) -> io::Result<()> {
    loop {
        let received = core
            .launcher
            .async_io(Interest::READABLE, || receive::<ToCore>(&core.launcher, RecvFlags::DONTWAIT))
            .await?;
        match received {
            None => return Ok(()),
            Some((ToCore::Living { sandbox, handle }, descriptors)) => {
                let mut channels = descriptors.into_iter();
                let Some(channel) = channels.next() else { continue };
                let id = sandbox.id.clone();
                core.table().sandboxes.insert(id.clone(), sandbox);
                let (core, channel) = (Arc::clone(&core), packets(channel)?);
                match handle.zip(channels.next()) {
                    Some((name, handle)) => core.adopt(id, name, channel, packets(handle)?),
                    None => drop(tokio::spawn(async move {
                        let ended = hear_supervisor(&channel).await;
                        core.finish(&id, &ended).await;
                    })),
                }
            }
            Some((ToCore::Ping, _)) => core.tell(&ToLauncher::Serving, &[]).await?,
            Some((ToCore::Setup(_), _)) => {}
        }
    }
}

async fn accept(core: Arc<Core>, listener: UnixListener) -> io::Result<()> {
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            // Out of descriptors: those who wait are served when somebody goes.
            Err(error) => {
                complain!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let core = Arc::clone(&core);
        tokio::spawn(async move {
            if let Ok(peer) = peer(&stream)
                && core.enter(peer)
            {
                let rights = core.config.rights(peer, &core.accounts);
                let asker = Asker { peer, rights };
                let end = core.converse(Connection::new(stream), &asker).await;
                core.leave(peer);
                if let End::Breach(breach) = end
                    && let Some(repeated) = core.denial_to_record(peer).await
                {
                    let why = breach.to_string();
                    let event = json!({ "kind": "breach", "uid": peer.uid, "why": short(&why), "repeated": repeated });
                    core.audit.record(event).await;
                }
            }
        });
    }
}

/// By the kernel's word at connect(2), never by the peer's.
fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let found = stream.peer_cred()?;
    Ok(Peer { uid: found.uid(), gid: found.gid() })
}

impl Core {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, peer: Peer) -> bool {
        let mut table = self.table();
        let all: usize = table.connections.values().sum();
        let own = table.connections.entry(peer.uid).or_default();
        let room = *own < CONNECTIONS_MAX && (all < CONNECTIONS_ALL_MAX || peer.uid == 0);
        *own += usize::from(room);
        room
    }

    fn leave(&self, peer: Peer) {
        let mut table = self.table();
        if let Some(own) = table.connections.get_mut(&peer.uid) {
            *own -= 1;
            if *own == 0 {
                table.connections.remove(&peer.uid);
            }
        }
    }

    /// One call after the other, until the peer goes or breaks the protocol.
    async fn converse(self: &Arc<Self>, mut connection: Connection, asker: &Asker) -> End {
        loop {
            let (message, descriptors) = match connection.receive().await {
                Ok(received) => received,
                Err(end) => return end,
            };
            let done = match wire::call(&message) {
                Ok(call) => {
                    connection.quiet = call.oneway;
                    self.answer(&mut connection, asker, call, descriptors).await
                }
                Err(breach) => Err(breach.into()),
            };
            if let Err(end) = done {
                return end;
            }
            // Whoever sends call after call waits for its turn like everybody.
            tokio::task::yield_now().await;
        }
    }

    async fn answer(
        self: &Arc<Self>,
        connection: &mut Connection,
        asker: &Asker,
        call: Call<'_>,
        descriptors: Vec<Foreign>,
    ) -> Result<(), End> {
        let Asker { peer, rights } = asker;
        let more = call.more;
        let (interface, method) = call.method.rsplit_once('.').unwrap_or((call.method.as_str(), ""));
        match (interface, method) {
            ("org.varlink.service", "GetInfo") => connection.reply(service::info(), false).await,
            ("org.varlink.service", "GetInterfaceDescription") => service::describe(connection, &call).await,
            (INTERFACE, "Run") => {
                let run = parameters::<Run>(&call)?;
                self.run(connection, asker, run, descriptors, more).await
            }
            (INTERFACE, "Provision") => {
                let wish = parameters(&call)?;
                self.provision(connection, asker, wish, descriptors).await
            }
            (INTERFACE, "Execute") => {
                let wish = parameters(&call)?;
                self.execute(connection, asker, wish, descriptors, more).await
            }
            (INTERFACE, "List") => {
                let known = |sandbox: &&Sandbox| sandbox.uid == peer.uid || rights.may(Verb::List);
                let sandboxes = self.table().sandboxes.values().filter(known).cloned().collect();
                connection.reply(Sandboxes { sandboxes }, false).await
            }
            (INTERFACE, "Signal") => {
                let Signal { sandbox, signal } = parameters(&call)?;
                if !sandbox::PASSED_ON.iter().any(|passed| *passed as i32 == signal) {
                    let message = format!("signal {signal} is not passed on");
                    return self
                        .deny(connection, asker.peer, method, Denial::new(Code::Signal, message))
                        .await;
                }
                self.act(connection, asker, &sandbox, ToLauncher::Signal { id: sandbox.clone(), signal })
                    .await
            }
            (INTERFACE, "Kill") => {
                let Named { sandbox } = parameters(&call)?;
                self.act(connection, asker, &sandbox, ToLauncher::End { id: sandbox.clone() }).await
            }
            ("org.varlink.service" | INTERFACE, _) => {
                let error = "org.varlink.service.MethodNotFound".to_owned();
                connection.error(error, json!({ "method": bounded(&call.method) })).await
            }
            _ => {
                let error = "org.varlink.service.InterfaceNotFound".to_owned();
                connection.error(error, json!({ "interface": bounded(interface) })).await
            }
        }
    }

    async fn not_started(&self, connection: &Connection, ended: FromSupervisor) -> Result<(), End> {
        let FromSupervisor::NotStarted { message, report } = ended else {
            return Err(End::Failed);
        };
        let parameters = json!({ "message": message, "report": report });
        connection.error(format!("{INTERFACE}.NotStarted"), parameters).await
    }

    /// A name and a place in the table, if there is room.
    fn book(&self, run: &Run, peer: Peer) -> Result<Sandbox, Denial> {
        let mut table = self.table();
        if table.sandboxes.values().filter(|sandbox| sandbox.uid == peer.uid).count() >= SANDBOXES_MAX {
            return Err(Denial::new(Code::TooMany, format!("{SANDBOXES_MAX} sandboxes are yours already")));
        }
        table.started += 1;
        let started_ms = now_ms();
        let id = format!("{:x}-{}", started_ms, table.started);
        let command = run.command.iter().take(8).map(|word| bounded(word).to_owned()).collect();
        let sandbox =
            Sandbox { id: id.clone(), policy: run.policy.clone(), uid: peer.uid, command, started_ms };
        table.sandboxes.insert(id, sandbox.clone());
        Ok(sandbox)
    }

    /// Has the launcher start it; the core's end of its channel.
    async fn start(&self, start: Start, given: &[BorrowedFd<'_>]) -> io::Result<OwnedFd> {
        let (ours, theirs) = channel()?;
        let all = [&[ours.as_fd(), theirs.as_fd()], given].concat();
        self.tell(&ToLauncher::Start(Box::new(start)), &all).await?;
        Ok(ours)
    }

    async fn tell(&self, message: &ToLauncher, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let send = || send(&self.launcher, message, descriptors, SendFlags::DONTWAIT);
        self.launcher.async_io(Interest::WRITABLE, send).await
    }

    async fn finish(&self, id: &str, ended: &FromSupervisor) {
        let outcome = match ended {
            FromSupervisor::Ended { report } => report["outcome"].clone(),
            FromSupervisor::Denied { denial } => json!({ "kind": "denied", "code": denial.code }),
            FromSupervisor::NotStarted { message, .. } => {
                json!({ "kind": "not_started", "message": bounded(message) })
            }
            FromSupervisor::Ready | FromSupervisor::Executed { .. } => Value::Null,
        };
        self.audit.record(json!({ "kind": "end", "sandbox": id, "outcome": outcome })).await;
        self.table().sandboxes.remove(id);
        let _ = self.tell(&ToLauncher::Forget { id: id.to_owned() }, &[]).await;
    }

    /// Acts on a sandbox that the peer may know of.
    async fn act(
        &self,
        connection: &mut Connection,
        asker: &Asker,
        id: &str,
        message: ToLauncher,
    ) -> Result<(), End> {
        let Asker { peer, rights } = asker;
        let owner = self.table().sandboxes.get(id).map(|sandbox| sandbox.uid);
        // The same answer for what is not there and for what is another's.
        if !owner.is_some_and(|owner| owner == peer.uid || rights.may(Verb::Kill)) {
            let parameters = Named { sandbox: bounded(id).to_owned() };
            return connection.error(format!("{INTERFACE}.NoSuchSandbox"), parameters).await;
        }
        let what = if matches!(message, ToLauncher::End { .. }) { "kill" } else { "signal" };
        if !self.audit.record(json!({ "kind": what, "sandbox": id, "uid": peer.uid })).await {
            return self.deny(connection, asker.peer, what, Denial::not_recorded()).await;
        }
        self.tell(&message, &[]).await.map_err(|_| End::Failed)?;
        connection.reply(json!({}), false).await
    }

    /// How many were not recorded since the last that was; nothing where this one is not either. Only repetition is folded
    /// together: the first of a second are recorded one by one, and who asks more often waits.
    async fn denial_to_record(&self, peer: Peer) -> Option<u64> {
        let repeated = {
            let mut table = self.table();
            let denials = table.denials.entry(peer.uid).or_insert_with(Denials::now);
            if denials.since.elapsed() >= Duration::from_secs(1) {
                (denials.since, denials.recorded) = (Instant::now(), 0);
            }
            if denials.recorded < DENIALS_A_SECOND {
                denials.recorded += 1;
                Some(std::mem::take(&mut denials.folded))
            } else {
                denials.folded += 1;
                None
            }
        };
        if repeated.is_none() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        repeated
    }

    async fn deny(
        &self,
        connection: &Connection,
        peer: Peer,
        method: &str,
        denial: Denial,
    ) -> Result<(), End> {
        let Denial { code, message } = denial;
        if let Some(repeated) = self.denial_to_record(peer).await {
            let event = json!({
                "kind": "deny", "uid": peer.uid, "method": method, "code": code, "message": short(&message), "repeated": repeated,
            });
            self.audit.record(event).await;
        }
        connection.error(format!("{INTERFACE}.Denied"), json!({ "code": code, "message": message })).await
    }
}

/// A channel of packets, to be waited for. tokio has no type of its own for them; it only waits, and never reads or writes.
fn packets(channel: OwnedFd) -> io::Result<UnixStream> {
    let channel = std::os::unix::net::UnixStream::from(channel);
    channel.set_nonblocking(true)?;
    UnixStream::from_std(channel)
}

/// The next message of a supervisor; that it was ended, where there is none.
async fn hear_supervisor(channel: &UnixStream) -> FromSupervisor {
    let heard = || receive::<FromSupervisor>(channel, RecvFlags::DONTWAIT);
    match channel.async_io(Interest::READABLE, heard).await {
        Ok(Some((said, _))) => said,
        Ok(None) => not_started("its supervisor was ended".to_owned()),
        Err(error) => not_started(format!("its supervisor: {error}")),
    }
}

fn not_started(message: String) -> FromSupervisor {
    FromSupervisor::NotStarted { message, report: None }
}

fn parameters<'a, T: serde::Deserialize<'a>>(call: &Call<'a>) -> Result<T, End> {
    let text = call.parameters.map_or("{}", |parameters| parameters.get());
    serde_json::from_str(text).map_err(|error| Breach::Malformed(error.to_string()).into())
}
