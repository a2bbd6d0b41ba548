//! The launcher: the only role with capabilities. It starts the core, forks a supervisor for each sandbox, and keeps the
//! registry of those that live, which outlives the core. One thread; no secret; it reads what the core says, and nothing else.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use super::config::{Accounts, Config};
use super::inner::{Kind, Start, ToCore, ToLauncher, channel, receive, send, until};
use super::peer::Door;
use super::roles::{self, Roles};
use super::supervisor::{self, Service};
use super::{CANNOT_SERVE, changes};
use crate::protocol::Sandbox;
use crate::say::complain;

/// Until a core that has ended is started again; doubled for one that ends at once, up to the longest.
const RESTART_PAUSE: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// After so long without a request something can be made ahead.
const IDLE: Duration = Duration::from_millis(5);
/// How long a core that is told to stop may take.
const SETTLE_MAX: Duration = Duration::from_secs(2);
/// As many uids as gateways have.
const GATEWAYS_MAX: u32 = 1 << 20;
/// What tells a supervisor to end its sandbox at once.
const END: Signal = Signal::ALARM;

/// A sandbox that lives, or whose end the core has not recorded yet.
struct Living {
    sandbox: Sandbox,
    kind: Kind,
    /// The core's end of its channel, and of its handle, for a core that comes after this one.
    channels: Vec<OwnedFd>,
    /// Nothing once it was reaped.
    supervisor: Option<OwnedFd>,
    /// The core has recorded its end, which it may hear of before it is reaped here.
    forgotten: bool,
}

/// The launcher's state.
pub struct Launcher {
    config: Config,
    /// For peers; for Prometheus.
    listeners: Vec<UnixListener>,
    door: Door,
    /// As they were when the core was started.
    accounts: Accounts,
    signals: SignalFd,
    /// How often systemd is told that the core answers, and when the core was asked last.
    watchdog: Option<(Duration, Instant)>,
    living: BTreeMap<String, Living>,
    /// Network namespaces that nobody has been in.
    networks: Vec<OwnedFd>,
    roles: Roles,
    /// By their sandboxes, and how many there were.
    gateways: BTreeMap<String, Child>,
    gateways_made: u32,
    /// Processes that show or remove what sandboxes have changed.
    errands: Vec<OwnedFd>,
}

/// The core, as the launcher has it.
struct Core {
    process: Child,
    channel: OwnedFd,
}

impl Core {
    /// Gives it time to record how the last sandboxes ended.
    fn settle(&self) {
        let then = Instant::now() + SETTLE_MAX;
        if send(&self.channel, &ToCore::Stop, &[], SendFlags::DONTWAIT).is_ok() {
            let _ = poll(&mut [PollFd::new(&self.channel, PollFlags::empty())], Some(&until(then)));
        }
    }
}

enum Turn {
    Go,
    CoreEnded,
    Stop,
}

impl Launcher {
    /// With sockets that listen.
    pub fn new(config: Config, listeners: Vec<UnixListener>) -> io::Result<Launcher> {
        let mut wanted = SigSet::empty();
        for signal in [NixSignal::SIGTERM, NixSignal::SIGINT, NixSignal::SIGCHLD] {
            wanted.add(signal);
        }
        wanted.thread_block()?;
        let signals = SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        nix::unistd::setgroups(&[])?;
        // A sandbox that lives takes three descriptors here. Each has its own limit in its policy.
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
        let door = listeners.first().map(Door::of).ok_or(io::ErrorKind::InvalidInput)??;
        let watchdog = sd_notify::watchdog_enabled().map(|limit| (limit / 3, Instant::now()));
        Ok(Launcher {
            config,
            listeners,
            door,
            accounts: Accounts::default(),
            signals,
            watchdog,
            living: BTreeMap::new(),
            networks: Vec::new(),
            roles: Roles::new(),
            gateways: BTreeMap::new(),
            gateways_made: 0,
            errands: Vec::new(),
        })
    }

    /// Runs until it is told to stop, and leaves nothing behind.
    pub fn run(&mut self) -> io::Result<()> {
        let mut pause = RESTART_PAUSE;
        loop {
            let started = Instant::now();
            match self.start_core() {
                Ok(mut core) => {
                    let stop = self.serve(&core)?;
                    if stop {
                        core.settle();
                    }
                    let _ = core.process.kill();
                    let ended = core.process.wait()?;
                    if stop {
                        return self.end_all();
                    }
                    if ended.code() == Some(CANNOT_SERVE.into()) {
                        self.end_all()?;
                        return Err(io::Error::other("the core cannot serve; see the line before"));
                    }
                }
                Err(error) => complain!("the core cannot be started: {error}"),
            }
            pause = if started.elapsed() > RESTART_PAUSE_MAX { RESTART_PAUSE } else { pause };
            complain!("the core ended; it is started again in {} ms", pause.as_millis());
            if self.told_to_stop(pause)? {
                return self.end_all();
            }
            pause = (pause * 2).min(RESTART_PAUSE_MAX);
        }
    }

    /// Waits, and hears meanwhile whether that is all.
    fn told_to_stop(&mut self, pause: Duration) -> io::Result<bool> {
        let then = Instant::now() + pause;
        loop {
            match poll(&mut [PollFd::new(&self.signals, PollFlags::IN)], Some(&until(then))) {
                Ok(0) => return Ok(false),
                Ok(_) if self.stop_was_asked_for() => return Ok(true),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn stop_was_asked_for(&self) -> bool {
        let mut stop = false;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            stop |= signal.ssi_signo.cast_signed() != libc::SIGCHLD;
        }
        stop
    }

    /// The core gets a channel as its standard input, and nothing else.
    fn start_core(&mut self) -> io::Result<Core> {
        self.accounts = Accounts::read();
        let (ours, theirs) = channel()?;
        let process = Command::new("/proc/self/exe")
            .arg0("broker")
            .args(["role", "core"])
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        let sockets: Vec<_> = self.listeners.iter().map(AsFd::as_fd).collect();
        send(&ours, &ToCore::Setup(self.config.clone()), &sockets, SendFlags::empty())?;
        for living in self.living.values().filter(|living| !living.forgotten) {
            let channels: Vec<_> = living.channels.iter().map(AsFd::as_fd).collect();
            let (sandbox, kind) = (living.sandbox.clone(), living.kind.clone());
            send(&ours, &ToCore::Living { sandbox, kind }, &channels, SendFlags::empty())?;
        }
        send(&ours, &ToCore::Told, &[], SendFlags::empty())?;
        self.roles.introduce(&ours)?;
        for held in changes::all(&self.config.server.state) {
            send(&ours, &ToCore::Held(held), &[], SendFlags::empty())?;
        }
        Ok(Core { process, channel: ours })
    }

    /// Whether to stop for good.
    fn serve(&mut self, core: &Core) -> io::Result<bool> {
        loop {
            match self.turn(core)? {
                Turn::Go => {}
                Turn::CoreEnded => return Ok(false),
                Turn::Stop => return Ok(true),
            }
        }
    }

    fn turn(&mut self, core: &Core) -> io::Result<Turn> {
        let alive: Vec<(&String, &OwnedFd)> =
            self.living.iter().filter_map(|(id, living)| Some((id, living.supervisor.as_ref()?))).collect();
        let mut waits =
            vec![PollFd::new(&core.channel, PollFlags::IN), PollFd::new(&self.signals, PollFlags::IN)];
        waits.extend(alive.iter().map(|(_, supervisor)| PollFd::new(*supervisor, PollFlags::IN)));
        // That one has ended is heard with SIGCHLD too; its channel is only watched so that no end is slept through.
        waits.extend(self.roles.channels().map(|channel| PollFd::new(channel, PollFlags::empty())));
        let next_ping = self.watchdog.map(|(interval, last)| last + interval);
        // What can be made ahead is made when nobody has asked for anything for a moment.
        let lacks = self.networks.len() < self.config.pool.networks.into();
        let idle = lacks.then(|| Instant::now() + IDLE);
        let next = idle.into_iter().chain(next_ping).chain(self.roles.due()).min().map(until);
        match poll(&mut waits, next.as_ref()) {
            Ok(0) if lacks => {
                drop(waits);
                match sandbox::network_namespace() {
                    Ok(network) => self.networks.push(network),
                    Err(error) => {
                        complain!("no network namespace can be made ahead: {error}");
                        self.config.pool.networks = 0;
                    }
                }
                return Ok(Turn::Go);
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = waits.iter().map(|wait| !wait.revents().is_empty()).collect();
        let ended: Vec<String> = alive
            .iter()
            .zip(&ready[2..])
            .filter(|(_, ready)| **ready)
            .map(|((id, _), _)| (*id).clone())
            .collect();
        for id in ended {
            let Some(living) = self.living.get_mut(&id) else { continue };
            if let Some(supervisor) = living.supervisor.take() {
                waitid(WaitId::PidFd(supervisor.as_fd()), WaitIdOptions::EXITED)?;
            }
            if living.forgotten {
                self.living.remove(&id);
            }
        }
        if self.stop_was_asked_for() {
            return Ok(Turn::Stop);
        }
        self.errands.retain(|errand| {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            matches!(waitid(WaitId::PidFd(errand.as_fd()), options), Ok(None))
        });
        self.roles.reap();
        self.roles.restart(&core.channel, &self.config);
        // One without a core ends by itself.
        self.gateways.retain(|id, gateway| match gateway.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) if !status.success() => {
                complain!("the gateway of sandbox {id} ended: {status}");
                false
            }
            _ => false,
        });
        if let Some((interval, last)) = &mut self.watchdog
            && last.elapsed() >= *interval
        {
            *last = Instant::now();
            // A core whose channel is full does not answer, and that is what the watchdog is for.
            let _ = send(&core.channel, &ToCore::Ping, &[], SendFlags::DONTWAIT);
        }
        if ready[0] { self.obey(core) } else { Ok(Turn::Go) }
    }

    /// One message of the core's.
    fn obey(&mut self, core: &Core) -> io::Result<Turn> {
        let received = receive::<ToLauncher>(&core.channel, RecvFlags::DONTWAIT);
        let (message, descriptors) = match received {
            Ok(Some(received)) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Go),
            // Out of descriptors: the core hears the end of what it asked for.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => return Ok(Turn::Go),
            // A core that says what no core says is ended, and another takes its place.
            Ok(None) | Err(_) => return Ok(Turn::CoreEnded),
        };
        match message {
            ToLauncher::Start(start) => {
                // One that cannot be started ends nobody else; the core hears the end of its channel.
                if let Err(error) = self.start(*start, descriptors) {
                    complain!("a sandbox cannot be started: {error}");
                }
            }
            ToLauncher::Assign { sandbox, kind } => {
                if let Some(living) = self.living.get_mut(&sandbox.id) {
                    (living.sandbox, living.kind) = (sandbox, kind);
                    living.channels.extend(descriptors);
                }
            }
            ToLauncher::Serving => {
                // Both at once: what systemd has heard before changes nothing. Without systemd nobody hears it.
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Watchdog]);
            }
            ToLauncher::Signal { id, signal } => {
                if let Some(signal) = Signal::from_named_raw(signal) {
                    self.signal(&id, signal);
                }
            }
            ToLauncher::End { id } => self.signal(&id, END),
            ToLauncher::Errand { id, what } => {
                if let Some(channel) = descriptors.into_iter().next() {
                    let state = self.config.server.state.clone();
                    let begun = sandbox::fork_supervisor(Vec::new(), channel, |_, channel| {
                        changes::run(&state, &id, what, &channel);
                    });
                    // Where it cannot be begun, the core hears the end of its line.
                    self.errands.extend(begun);
                }
            }
            ToLauncher::Gateway { id } => {
                if let Some(line) = descriptors.into_iter().next() {
                    // Its number makes its uid, which no other that lives has.
                    self.gateways_made = (self.gateways_made + 1) % GATEWAYS_MAX;
                    match roles::start_gateway(self.gateways_made, line) {
                        Ok(gateway) => drop(self.gateways.insert(id, gateway)),
                        Err(error) => complain!("a gateway cannot be started: {error}"),
                    }
                }
            }
            ToLauncher::EndGateway { id } => {
                if let Some(mut gateway) = self.gateways.remove(&id) {
                    let _ = gateway.kill();
                    let _ = gateway.wait();
                }
            }
            ToLauncher::Forget { id } => match self.living.get_mut(&id) {
                Some(living) if living.supervisor.is_some() => living.forgotten = true,
                _ => drop(self.living.remove(&id)),
            },
        }
        Ok(Turn::Go)
    }

    fn signal(&self, id: &str, signal: Signal) {
        if let Some(supervisor) = self.living.get(id).and_then(|living| living.supervisor.as_ref()) {
            // It may just have ended.
            let _ = pidfd_send_signal(supervisor, signal);
        }
    }

    fn start(&mut self, start: Start, descriptors: Vec<OwnedFd>) -> io::Result<()> {
        // A name of the core's making, once.
        changes::place(&self.config.server.state, &start.sandbox.id)?;
        if self.living.contains_key(&start.sandbox.id) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        let mut descriptors = descriptors.into_iter();
        let (Some(cores), Some(supervisors)) = (descriptors.next(), descriptors.next()) else {
            return Ok(());
        };
        let cores_handle = if matches!(start.kind, Kind::Live { .. }) { descriptors.next() } else { None };
        let (sandbox, kind) = (start.sandbox.clone(), start.kind.clone());
        let network = self.networks.pop();
        let ready = network.is_some();
        let supervisor = sandbox::fork_supervisor(
            descriptors.chain(network).collect(),
            supervisors,
            |mut given, channel| {
                let network = if ready { given.pop() } else { None };
                let host = Service { config: &self.config, accounts: &self.accounts, door: self.door };
                supervisor::live(start, given, network, &host, &channel);
            },
        )?;
        let channels = std::iter::once(cores).chain(cores_handle).collect();
        let living = Living { sandbox, kind, channels, supervisor: Some(supervisor), forgotten: false };
        self.living.insert(living.sandbox.id.clone(), living);
        Ok(())
    }

    /// Nothing of a sandbox is left when the service has ended.
    fn end_all(&mut self) -> io::Result<()> {
        self.roles.end();
        for gateway in self.gateways.values_mut() {
            let _ = gateway.kill();
            let _ = gateway.wait();
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        for living in self.living.values() {
            if let Some(supervisor) = &living.supervisor {
                let _ = pidfd_send_signal(supervisor, END);
            }
        }
        for living in self.living.values_mut() {
            if let Some(supervisor) = living.supervisor.take() {
                waitid(WaitId::PidFd(supervisor.as_fd()), WaitIdOptions::EXITED)?;
            }
        }
        Ok(())
    }
}
