//! The core: speaks with peers, decides, records, and has the launcher act. Its own uid, no capability, no secret; it never
//! forks and holds nothing that it could hand out but the channels of its sandboxes.

mod askers;
mod changes;
mod decide;
mod denials;
mod doors;
mod effects;
mod gate;
mod grants;
mod holders;
mod lives;
mod operate;
mod pool;
mod roles;
mod run;
mod scrape;
mod service;
mod upstream;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{RecvFlags, SendFlags};
use sandbox::PolicyName;
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

use super::audit::{Audit, bounded, now_ms};
use super::config::{Accounts, Config};
use super::inner::{FromSupervisor, Kind, Start, ToCore, ToLauncher, channel, packets, receive, send};
use super::metrics::Metrics;
use super::roles::Role;
use crate::connection::{Connection, End, Foreign};
use crate::protocol::{Code, Denial, Held, INTERFACE, Run, Sandbox};
use crate::wire::{self, Breach, Call};
use askers::{Asker, Principal};
use denials::Denials;
use gate::Gate;
use lives::Live;
use pool::Warm;
use roles::RoleLine;

/// What one uid may have at the same time.
const SANDBOXES_MAX: usize = 256;

/// The core.
pub struct Core {
    config: Config,
    accounts: Accounts,
    audit: Audit,
    launcher: UnixStream,
    metrics: Arc<Metrics>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    sandboxes: BTreeMap<String, Sandbox>,
    /// Those that wait for commands, by the kernel's name for the callers' end of their handle.
    lives: BTreeMap<String, Arc<Live>>,
    /// Those that are nobody's yet, and the policies of which some are being made.
    pool: BTreeMap<PolicyName, Vec<Warm>>,
    making: BTreeSet<PolicyName>,
    /// How many of each role answer.
    roles: BTreeMap<Role, usize>,
    /// The line to the vault.
    vault: Option<Arc<RoleLine>>,
    /// The line to the resolver.
    resolver: Option<Arc<RoleLine>>,
    /// Those that have grants, by their names.
    gates: BTreeMap<String, Arc<Gate>>,
    /// What sandboxes have changed, by their names.
    held: BTreeMap<String, Held>,
    connections: BTreeMap<u32, usize>,
    /// Uids among them that the configuration gives nothing.
    strangers: BTreeSet<u32>,
    denials: BTreeMap<u32, Denials>,
    /// Grants that sessions held, and may not ask for again.
    revoked: BTreeSet<(Principal, String)>,
    started: u64,
}

/// Why a core ends.
pub enum Why {
    /// Another could do no better.
    Unfit(String),
    /// Another is to take its place.
    Lost(String),
}

impl From<String> for Why {
    fn from(why: String) -> Why {
        Why::Lost(why)
    }
}

/// The launcher's first word.
pub struct Setup {
    pub config: Config,
    /// Those that listen: for peers and, where it is wanted, for Prometheus.
    sockets: Vec<OwnedFd>,
}

impl Setup {
    /// Waits for it.
    pub fn receive(launcher: &OwnedFd) -> Result<Setup, Why> {
        let setup = receive::<ToCore>(launcher, RecvFlags::empty()).map_err(|error| error.to_string())?;
        match setup {
            Some((ToCore::Setup(config), sockets)) => Ok(Setup { config, sockets }),
            _ => Err("the launcher said nothing".to_owned().into()),
        }
    }
}

/// Serves until the launcher goes away.
pub async fn serve(launcher: OwnedFd, Setup { config, sockets }: Setup) -> Result<(), Why> {
    let mut sockets = sockets.into_iter().map(listening);
    let listener = sockets.next().ok_or_else(|| "the launcher gave no socket".to_owned())??;
    let scraped = sockets.next().transpose()?;
    let metrics = Arc::new(Metrics::default());
    let audit = Audit::open(&config.server, Arc::clone(&metrics)).map_err(Why::Unfit)?;
    let launcher = packets(launcher).map_err(|error| format!("the launcher's channel: {error}"))?;
    let accounts = Accounts::read();
    let core = Arc::new(Core { config, accounts, audit, launcher, metrics, table: Mutex::default() });
    core.tell(&ToLauncher::Serving, &[]).await.map_err(|error| format!("the launcher: {error}"))?;
    if let Some(scraped) = scraped {
        tokio::spawn(scrape::serve(Arc::clone(&core), scraped));
    }
    core.fill_pool();
    let (told, knows) = oneshot::channel();
    tokio::select! {
        ended = hear(Arc::clone(&core), told) => ended.map_err(|error| format!("the launcher: {error}").into()),
        // Whoever asks for a sandbox that lives since before is not told that there is none.
        ended = async { let _ = knows.await; askers::accept(core, listener).await } => ended.map_err(|error| format!("accept: {error}").into()),
    }
}

fn listening(socket: OwnedFd) -> Result<UnixListener, String> {
    let socket = std::os::unix::net::UnixListener::from(socket);
    let socket = socket.set_nonblocking(true).and_then(|()| UnixListener::from_std(socket));
    socket.map_err(|error| format!("the socket: {error}"))
}

/// What the launcher says: sandboxes that live since before this core.
async fn hear(core: Arc<Core>, told: oneshot::Sender<()>) -> io::Result<()> {
    let mut told = Some(told);
    loop {
        let received = core
            .launcher
            .async_io(Interest::READABLE, || receive::<ToCore>(&core.launcher, RecvFlags::DONTWAIT))
            .await?;
        match received {
            None => return Ok(()),
            Some((ToCore::Living { sandbox, kind: Kind::Warm }, _)) => core.end_warm(&sandbox.id).await,
            Some((ToCore::Living { sandbox, kind }, descriptors)) => {
                let mut channels = descriptors.into_iter();
                let Some(channel) = channels.next() else { continue };
                let id = sandbox.id.clone();
                core.table().sandboxes.insert(id.clone(), sandbox.clone());
                let (core, channel) = (Arc::clone(&core), packets(channel)?);
                match (kind, channels.next()) {
                    (Kind::Live { handle }, Some(end)) => {
                        core.adopt(&sandbox, handle, channel, packets(end)?)
                    }
                    _ => drop(tokio::spawn(async move {
                        let ended = hear_supervisor(&channel).await;
                        core.finish(&id, &ended).await;
                    })),
                }
            }
            Some((ToCore::Told, _)) => {
                let _ = told.take().map(|told| told.send(()));
            }
            Some((ToCore::Role(role), descriptors)) => {
                if let Some(channel) = descriptors.into_iter().next() {
                    let (core, channel) = (Arc::clone(&core), packets(channel)?);
                    tokio::spawn(async move { core.attend_role(role, channel).await });
                }
            }
            Some((ToCore::Held(held), _)) => core.hold(Some(Box::new(held))),
            Some((ToCore::Stop, _)) => {
                // Tasks that were begun have their turn before.
                tokio::task::yield_now().await;
                core.audit.settle().await;
                return Ok(());
            }
            Some((ToCore::Ping, _)) => core.tell(&ToLauncher::Serving, &[]).await?,
            Some((ToCore::Setup(_), _)) => {}
        }
    }
}

impl Core {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One call after the other, until the peer goes or breaks the protocol.
    async fn converse(self: &Arc<Self>, connection: &mut Connection, asker: &Asker) -> End {
        loop {
            let (message, descriptors) = match connection.receive().await {
                Ok(received) => received,
                Err(end) => return end,
            };
            let done = match wire::call(&message) {
                Ok(call) => {
                    connection.quiet = call.oneway;
                    self.answer(connection, asker, call, descriptors).await
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
        let more = call.more;
        let (interface, method) = call.method.rsplit_once('.').unwrap_or((call.method.as_str(), ""));
        match (interface, method) {
            ("org.varlink.service", "GetInfo") => connection.reply(service::info(), false).await,
            ("org.varlink.service", "GetInterfaceDescription") => service::describe(connection, &call).await,
            (INTERFACE, "Run") => {
                self.run(connection, asker, parameters::<Run>(&call)?, descriptors, more).await
            }
            (INTERFACE, "Provision") => {
                self.provision(connection, asker, parameters(&call)?, descriptors).await
            }
            (INTERFACE, "Execute") => {
                self.execute(connection, asker, parameters(&call)?, descriptors, more).await
            }
            (INTERFACE, "HandOver") => {
                self.hand_over(connection, asker, parameters(&call)?, &descriptors).await
            }
            (INTERFACE, "Handle") => self.new_handle(connection, asker, parameters(&call)?).await,
            (INTERFACE, "Narrow") => self.narrow(connection, asker, parameters(&call)?).await,
            (INTERFACE, "List") => self.list(connection, asker).await,
            (INTERFACE, "Inspect") => self.inspect(connection, asker, parameters(&call)?).await,
            (INTERFACE, "Signal") => self.signal(connection, asker, parameters(&call)?).await,
            (INTERFACE, "Kill") => self.kill(connection, asker, parameters(&call)?).await,
            (INTERFACE, "ListChanges") => self.list_changes(connection, asker).await,
            (INTERFACE, "Changes") => self.changes(connection, asker, parameters(&call)?).await,
            (INTERFACE, "Discard") => self.discard(connection, asker, parameters(&call)?).await,
            (INTERFACE, "Derive") => self.derive(connection, asker, parameters(&call)?).await,
            (INTERFACE, "ListGrants") => self.list_grants(connection, asker).await,
            (INTERFACE, "Revoke") => self.revoke(connection, asker, parameters(&call)?).await,
            (INTERFACE, "AddCredential") => {
                self.add_credential(connection, asker, parameters(&call)?, descriptors).await
            }
            (INTERFACE, "RemoveCredential") => {
                self.remove_credential(connection, asker, parameters(&call)?).await
            }
            (INTERFACE, "ListCredentials") => self.list_credentials(connection, asker).await,
            (INTERFACE, "Metrics") => self.measured(connection, asker).await,
            (INTERFACE, "Records") => self.records(connection, asker, parameters(&call)?).await,
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

    fn hold(&self, held: Option<Box<Held>>) {
        self.table().held.extend(held.map(|held| (held.sandbox.clone(), *held)));
    }

    /// A name that nothing else has, and the time that is in it.
    fn next_name(&self) -> (String, u64) {
        let started_ms = now_ms();
        let mut table = self.table();
        table.started += 1;
        (format!("{started_ms:x}-{}", table.started), started_ms)
    }

    /// What `run` is called, and how it is listed.
    fn sandbox(&self, run: &Run, uid: u32, session: Option<String>) -> Sandbox {
        let (id, started_ms) = self.next_name();
        let command = run.command.iter().take(8).map(|word| bounded(word).to_owned()).collect();
        Sandbox { id, policy: run.policy.clone(), uid, session, command, started_ms }
    }

    /// A name and a place in the table, if there is room; the name of `warm` where that is used.
    fn book(&self, run: &Run, asker: &Asker, warm: Option<&Warm>) -> Result<Sandbox, Denial> {
        let uid = asker.peer.uid;
        let mut sandbox = self.sandbox(run, uid, asker.session.clone());
        if let Some(warm) = warm {
            sandbox.id = warm.id().to_owned();
        }
        let mut table = self.table();
        if table.sandboxes.values().filter(|sandbox| sandbox.uid == uid).count() >= SANDBOXES_MAX {
            return Err(Denial::new(Code::TooMany, format!("{SANDBOXES_MAX} sandboxes are yours already")));
        }
        table.sandboxes.insert(sandbox.id.clone(), sandbox.clone());
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
        let (outcome, by) = match ended {
            FromSupervisor::Ended { report, .. } => (report["outcome"].clone(), report["ended_by"].clone()),
            FromSupervisor::Denied { denial } => {
                (json!({ "kind": "denied", "code": denial.code }), "broker".into())
            }
            FromSupervisor::NotStarted { message, .. } => {
                (json!({ "kind": "not_started", "message": bounded(message) }), "host".into())
            }
            FromSupervisor::Ear { .. }
            | FromSupervisor::Ready { .. }
            | FromSupervisor::Renewed
            | FromSupervisor::Executed { .. } => (Value::Null, Value::Null),
        };
        self.metrics.ended(by.as_str().unwrap_or_default());
        self.close_gate(id).await;
        self.audit.record(json!({ "kind": "end", "sandbox": id, "outcome": outcome, "ended_by": by })).await;
        {
            let mut table = self.table();
            table.sandboxes.remove(id);
            if let FromSupervisor::Ended { held, .. } = ended {
                table.held.remove(id);
                table.held.extend(held.clone().map(|held| (id.to_owned(), *held)));
            }
        }
        let _ = self.tell(&ToLauncher::Forget { id: id.to_owned() }, &[]).await;
    }
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
