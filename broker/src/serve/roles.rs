//! The parts of the daemon beside the core that wait for work: the vault, the resolver and, for a sandbox that has a use for
//! one, its gateway. Each is a process of its own with a uid of its own, confined before it reads its first message.
//!
//! The vault's work is in [`super::vault`], the resolver's in [`super::resolver`], a gateway's in [`super::gateway`].

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{RecvFlags, SendFlags};
use sandbox::{Reachable, Work};
use serde::{Deserialize, Serialize};

use super::config::Config;
use super::inner::{ToCore, channel, receive, send};
use super::resolver::{self, Names};
use super::vault::{self, Vault};
use super::{CORE_ID, gateway};
use crate::grant::{Host, Name, Source};
use crate::say::complain;
use zeroize::Zeroizing;

/// Until a role that has ended is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(200);

/// Where distributions keep the host's authorities.
const BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// A part of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Holds secrets, and nothing else.
    Vault,
    /// Turns names into addresses.
    Resolver,
    /// Speaks with a workload.
    Gateway,
}

impl Role {
    /// Those that the daemon always has.
    const ALWAYS: [Role; 2] = [Role::Vault, Role::Resolver];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Role::Vault => "vault",
            Role::Resolver => "resolver",
            Role::Gateway => "gateway",
        }
    }

    /// Its own: after the core's, and for gateways one for each sandbox.
    fn uid(self, number: u32) -> u32 {
        match self {
            Role::Vault => CORE_ID + 1,
            Role::Resolver => CORE_ID + 2,
            Role::Gateway => CORE_ID + 0x0100_0000 + number,
        }
    }
}

/// From the launcher to a role.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToRole {
    /// There is a core. The descriptor is the line to it.
    Core,
    /// For the vault, first of all: its own copy of the configuration. The descriptor is the host's bundle of authorities.
    Setup(Box<Config>),
    /// For the vault: the file of a credential.
    File(Name),
    /// For the vault: its store, and the key to it.
    Store,
    /// For the resolver: what the host's /etc/resolv.conf and /etc/hosts say now.
    Names {
        /// The first.
        servers: String,
        /// The other.
        hosts: String,
    },
}

/// From the core to a role.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Are you there?
    Ping,
    /// Say to a gateway what goes into a grant. The descriptor is the line to it.
    Provide(Name),
    /// Keep a credential in the store. The descriptor is a pipe with it.
    Keep(Name),
    /// Forget it.
    Forget(Name),
    /// Which are kept.
    List,
    /// What the name of a host stands for.
    Resolve(Host),
}

/// From a role to the core.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is.
    Here,
    /// It is done.
    Done,
    /// It is not.
    Failed(String),
    /// What is kept, by name.
    Kept(Vec<Name>),
    /// What a name stands for.
    Addresses(Vec<IpAddr>),
}

/// The life of a role; `number` tells gateways apart. It ends with its launcher.
pub fn live(role: Role, number: u32) -> ExitCode {
    let (network, work) = match role {
        Role::Vault => (Reachable::Nothing, Work::Keep),
        Role::Resolver => (Reachable::Host, Work::Resolve),
        Role::Gateway => (Reachable::Nothing, Work::Serve),
    };
    let done = sandbox::confine_role(role.uid(number), network, work)
        .map_err(|error| io::Error::new(error.kind(), format!("it cannot be confined: {error}")))
        .and_then(|()| match role {
            Role::Gateway => gateway::live(rustix::stdio::stdin().try_clone_to_owned()?),
            Role::Resolver => resolver::live(rustix::stdio::stdin().try_clone_to_owned()?),
            Role::Vault => serve_vault(),
        });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("{}: {error}", role.name());
            ExitCode::FAILURE
        }
    }
}

fn serve_vault() -> io::Result<()> {
    let launcher = rustix::stdio::stdin();
    let mut core: Option<OwnedFd> = None;
    let mut vault = Vault::default();
    loop {
        let mut waits = vec![PollFd::new(&launcher, PollFlags::IN)];
        waits.extend(core.iter().map(|core| PollFd::new(core, PollFlags::IN)));
        poll(&mut waits, None)?;
        let ready: Vec<bool> = waits.iter().map(|wait| !wait.revents().is_empty()).collect();
        if ready[0] {
            match receive::<ToRole>(launcher, RecvFlags::empty())? {
                Some((ToRole::Core, descriptors)) => core = descriptors.into_iter().next(),
                Some((said, descriptors)) => equip(&mut vault, said, descriptors),
                None => return Ok(()),
            }
        } else if let Some(asking) = &core {
            match receive::<(u64, Ask)>(asking, RecvFlags::empty()) {
                Ok(Some(((number, ask), descriptors))) => {
                    let answer = answer(&mut vault, ask, descriptors);
                    send(asking, &(number, answer), &[], SendFlags::empty())?;
                }
                // This core is gone; the launcher tells of the next.
                Ok(None) | Err(_) => core = None,
            }
        }
    }
}

fn equip(vault: &mut Vault, said: ToRole, descriptors: Vec<OwnedFd>) {
    let mut descriptors = descriptors.into_iter();
    match (said, descriptors.next(), descriptors.next()) {
        (ToRole::Setup(config), bundle, _) => (vault.config, vault.bundle) = (*config, bundle),
        (ToRole::File(name), Some(file), _) => match vault::read_secret(file) {
            Ok(secret) => drop(vault.read.insert(name, secret)),
            Err(why) => complain!("credential {name}: {why}"),
        },
        (ToRole::Store, Some(file), Some(key)) => match vault::Store::open(file, key) {
            Ok(store) => vault.store = Some(store),
            Err(error) => complain!("the vault's store: {error}"),
        },
        _ => {}
    }
}

fn answer(vault: &mut Vault, ask: Ask, descriptors: Vec<OwnedFd>) -> Answer {
    let given = descriptors.into_iter().next();
    let done = match (ask, given) {
        (Ask::Ping, _) => return Answer::Here,
        (Ask::Provide(grant), Some(line)) => vault.provide(&grant, &line).map_err(|error| error.to_string()),
        (Ask::Keep(name), Some(pipe)) => {
            vault::read_secret(pipe).and_then(|secret| vault.keep(&name, Some(secret)))
        }
        (Ask::Forget(name), _) => vault.keep(&name, None),
        (Ask::List, _) => {
            return Answer::Kept(vault.store.iter().flat_map(vault::Store::names).cloned().collect());
        }
        (Ask::Provide(_) | Ask::Keep(_), None) => Err("there came no descriptor".to_owned()),
        (Ask::Resolve(_), _) => Err("the vault knows no names".to_owned()),
    };
    done.map_or_else(Answer::Failed, |()| Answer::Done)
}

/// The launcher's side of those that are always there.
pub struct Roles {
    running: Vec<Running>,
    absent: Vec<(Role, Instant)>,
    names: Names,
}

struct Running {
    role: Role,
    process: Child,
    channel: OwnedFd,
}

impl Roles {
    /// None is there yet; [`Roles::restart`] makes them.
    pub fn new() -> Roles {
        let absent = Role::ALWAYS.map(|role| (role, Instant::now())).into();
        Roles { running: Vec::new(), absent, names: Names::default() }
    }

    /// When the next one is to be started.
    pub fn due(&self) -> Option<Instant> {
        self.absent.iter().map(|(_, due)| *due).min()
    }

    /// Readable when one has ended.
    pub fn channels(&self) -> impl Iterator<Item = &OwnedFd> {
        self.running.iter().map(|running| &running.channel)
    }

    /// Starts those that are due, and makes them known to the core.
    pub fn restart(&mut self, core: &OwnedFd, config: &Config) {
        if let Some(names) = self.names.changed() {
            self.names = names;
            for running in self.running.iter().filter(|running| running.role == Role::Resolver) {
                let _ = running.tell_names(&self.names);
            }
        }
        let (due, later) = self.absent.drain(..).partition(|(_, due)| *due <= Instant::now());
        self.absent = later;
        let due: Vec<(Role, Instant)> = due;
        for (role, _) in due {
            let started = Running::start(role).and_then(|running| {
                match role {
                    Role::Vault => running.equip(config)?,
                    Role::Resolver => running.tell_names(&self.names)?,
                    Role::Gateway => {}
                }
                running.introduce(core).map(|()| running)
            });
            match started {
                Ok(running) => self.running.push(running),
                Err(error) => {
                    complain!("the {} cannot be started: {error}", role.name());
                    self.absent.push((role, Instant::now() + RESTART_PAUSE));
                }
            }
        }
    }

    /// Makes all of them known to a core that has just been started.
    pub fn introduce(&self, core: &OwnedFd) -> io::Result<()> {
        self.running.iter().try_for_each(|running| running.introduce(core))
    }

    /// Takes note of those that have ended.
    pub fn reap(&mut self) {
        self.running.retain_mut(|running| {
            let ended = matches!(running.process.try_wait(), Ok(Some(_)) | Err(_));
            if ended {
                complain!("the {} ended; it is started again", running.role.name());
                self.absent.push((running.role, Instant::now() + RESTART_PAUSE));
            }
            !ended
        });
    }

    /// Ends them all.
    pub fn end(&mut self) {
        for mut running in self.running.drain(..) {
            let _ = running.process.kill();
            let _ = running.process.wait();
        }
    }
}

/// A gateway, whose standard input is its line to the core. It has no other.
pub fn start_gateway(number: u32, line: OwnedFd) -> io::Result<Child> {
    start(Role::Gateway, number, line)
}

fn start(role: Role, number: u32, line: OwnedFd) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg0("broker")
        .args(["role", role.name(), &number.to_string()])
        .env_clear()
        .stdin(Stdio::from(line))
        .stdout(Stdio::null())
        .spawn()
}

impl Running {
    fn start(role: Role) -> io::Result<Running> {
        let (ours, theirs) = channel()?;
        Ok(Running { role, process: start(role, 0, theirs)?, channel: ours })
    }

    /// Gives the vault what it needs. What cannot be opened is said, and the grants that need it are refused.
    fn equip(&self, config: &Config) -> io::Result<()> {
        let said = |path: &Path, error: io::Error| complain!("vault: {}: {error}", path.display());
        let open = |path: &Path| {
            // A FIFO would have the launcher wait for whoever writes.
            let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
            opened.map(OwnedFd::from).map_err(|error| said(path, error)).ok()
        };
        let say = |message: ToRole, given: &[OwnedFd]| {
            let given: Vec<_> = given.iter().map(AsFd::as_fd).collect();
            send(&self.channel, &message, &given, SendFlags::empty())
        };
        let bundle = BUNDLES.iter().find_map(|path| File::open(path).ok()).map(OwnedFd::from);
        say(ToRole::Setup(Box::new(config.clone())), bundle.as_slice())?;
        for (name, credential) in &config.credential {
            let file = match &credential.source {
                Source::File(path) => open(path),
                Source::Systemd(file) => match std::env::var_os("CREDENTIALS_DIRECTORY") {
                    Some(folder) => open(&Path::new(&folder).join(file.as_str())),
                    None => {
                        complain!("vault: credential {name}: systemd has given none to this service");
                        None
                    }
                },
                Source::Store(_) => None,
            };
            if let Some(file) = file {
                say(ToRole::File(name.clone()), &[file])?;
            }
        }
        match store(&config.server.state) {
            Ok(store) => say(ToRole::Store, &store),
            Err(error) => {
                said(&config.server.state.join("vault"), error);
                Ok(())
            }
        }
    }

    fn tell_names(&self, names: &Names) -> io::Result<()> {
        send(&self.channel, &names.told(), &[], SendFlags::DONTWAIT)
    }

    fn introduce(&self, core: &OwnedFd) -> io::Result<()> {
        let (cores, roles) = channel()?;
        send(&self.channel, &ToRole::Core, &[roles.as_fd()], SendFlags::DONTWAIT)?;
        send(core, &ToCore::Role(self.role), &[cores.as_fd()], SendFlags::DONTWAIT)
    }
}

/// The vault's store and the key to it, made where there is none. A key that systemd keeps (`broker-store-key`) comes before one
/// that stands beside the store.
fn store(state: &Path) -> io::Result<[OwnedFd; 2]> {
    let folder = state.join("vault");
    DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    let mut options = OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(false).mode(0o600).open(folder.join("store"))?;
    let given =
        std::env::var_os("CREDENTIALS_DIRECTORY").map(|folder| Path::new(&folder).join("broker-store-key"));
    if let Some(key) = given.and_then(|path| File::open(path).ok()) {
        return Ok([file.into(), key.into()]);
    }
    let path = folder.join("key");
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
        Ok(mut new) => {
            let mut bytes = Zeroizing::new([0; vault::KEY_BYTES]);
            File::open("/dev/urandom")?.read_exact(&mut *bytes)?;
            new.write_all(&*bytes)?;
            new.sync_all()?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    Ok([file.into(), File::open(path)?.into()])
}
