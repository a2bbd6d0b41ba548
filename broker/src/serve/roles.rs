//! The parts of the daemon beside the core that wait for work: the vault, the resolver and, for a sandbox that has a use for
//! one, its gateway. Each is a process of its own with a uid of its own, confined before it reads its first message.
//!
//! What they will do comes with grants; here they stand, answer whether they are there, and are started again.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{RecvFlags, SendFlags};
use sandbox::Reachable;
use serde::{Deserialize, Serialize};

use super::CORE_ID;
use super::inner::{ToCore, channel, receive, send};
use crate::say::complain;

/// Until a role that has ended is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(200);

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
enum ToRole {
    /// There is a core. The descriptor is the line to it.
    Core,
}

/// From the core to a role.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Are you there?
    Ping,
}

/// From a role to the core.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is.
    Here,
}

/// The life of a role; `number` tells gateways apart. It ends with its launcher.
pub fn live(role: Role, number: u32) -> ExitCode {
    let network = if role == Role::Resolver { Reachable::Host } else { Reachable::Nothing };
    let done = sandbox::confine_role(role.uid(number), network)
        .map_err(|error| io::Error::new(error.kind(), format!("it cannot be confined: {error}")))
        .and_then(|()| serve());
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("{}: {error}", role.name());
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let launcher = rustix::stdio::stdin();
    let mut core: Option<OwnedFd> = None;
    loop {
        let mut waits = vec![PollFd::new(&launcher, PollFlags::IN)];
        waits.extend(core.iter().map(|core| PollFd::new(core, PollFlags::IN)));
        poll(&mut waits, None)?;
        let ready: Vec<bool> = waits.iter().map(|wait| !wait.revents().is_empty()).collect();
        if ready[0] {
            match receive::<ToRole>(launcher, RecvFlags::empty())? {
                Some((ToRole::Core, descriptors)) => core = descriptors.into_iter().next(),
                None => return Ok(()),
            }
        } else if let Some(asking) = &core {
            match receive::<Ask>(asking, RecvFlags::empty()) {
                Ok(Some((Ask::Ping, _))) => send(asking, &Answer::Here, &[], SendFlags::empty())?,
                // This core is gone; the launcher tells of the next.
                Ok(None) | Err(_) => core = None,
            }
        }
    }
}

/// The launcher's side of those that are always there.
pub struct Roles {
    running: Vec<Running>,
    absent: Vec<(Role, Instant)>,
}

struct Running {
    role: Role,
    process: Child,
    channel: OwnedFd,
}

impl Roles {
    /// None is there yet; [`Roles::restart`] makes them.
    pub fn new() -> Roles {
        Roles { running: Vec::new(), absent: Role::ALWAYS.map(|role| (role, Instant::now())).into() }
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
    pub fn restart(&mut self, core: &OwnedFd) {
        let (due, later) = self.absent.drain(..).partition(|(_, due)| *due <= Instant::now());
        self.absent = later;
        let due: Vec<(Role, Instant)> = due;
        for (role, _) in due {
            match Running::start(role).and_then(|running| running.introduce(core).map(|()| running)) {
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

impl Running {
    fn start(role: Role) -> io::Result<Running> {
        let (ours, theirs) = channel()?;
        let process = Command::new("/proc/self/exe")
            .arg0("broker")
            .args(["role", role.name()])
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Running { role, process, channel: ours })
    }

    fn introduce(&self, core: &OwnedFd) -> io::Result<()> {
        let (cores, roles) = channel()?;
        send(&self.channel, &ToRole::Core, &[roles.as_fd()], SendFlags::DONTWAIT)?;
        send(core, &ToCore::Role(self.role), &[cores.as_fd()], SendFlags::DONTWAIT)
    }
}
