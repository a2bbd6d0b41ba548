//! `broker serve`: the daemon. The process that is started becomes the launcher; the core and the supervisors come from it.

mod attendant;
mod audit;
mod changes;
mod config;
mod core;
mod gateway;
mod inner;
mod launcher;
mod metrics;
mod peer;
mod resolver;
mod roles;
mod supervisor;
mod vault;

use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;

use nix::unistd::{Gid, Uid, chown};

use crate::library::Policies;
use crate::say::complain;

pub use config::{Config, PATH, SOCKET, STATE};
pub use roles::{Role, live as role};

/// The core's uid and gid: above the slots and their relays, so nobody else's either.
const CORE_ID: u32 = 0x7200_0000;

/// What a core exits with that another one could do no better (`EX_CONFIG`, sysexits(3)).
const CANNOT_SERVE: u8 = 78;

/// Runs the daemon until SIGTERM or SIGINT.
pub fn serve(config: Option<&Path>) -> ExitCode {
    let done = Config::load(config.unwrap_or(Path::new(PATH)), config.is_some())
        .and_then(|config| launch(config).map_err(|error| error.to_string()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn launch(config: Config) -> io::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "the daemon is started by root, or by systemd",
        ));
    }
    // The state directory is root's, so that the core, which comes through, can put nothing else in the place of a part.
    let (state, record) = (&config.server.state, config.server.record());
    for doubt in config.doubts(&config::Accounts::read(), |policy| Policies::of_host().load(policy).is_ok()) {
        complain!("{doubt}");
    }
    named(state, DirBuilder::new().recursive(true).create(state))?;
    // Whatever the mask: the core comes through.
    named(state, std::fs::set_permissions(state, std::fs::Permissions::from_mode(0o711)))?;
    named(state, chown(state, Some(Uid::from_raw(0)), Some(Gid::from_raw(0))).map_err(Into::into))?;
    named(state, changes::prepare(state))?;
    // Held for as long as this process lives.
    let _lock = named(state, lock(state))?;
    named(&record, DirBuilder::new().recursive(true).mode(0o700).create(&record))?;
    let core = (Some(Uid::from_raw(CORE_ID)), Some(Gid::from_raw(CORE_ID)));
    named(&record, chown(&record, core.0, core.1).map_err(Into::into))?;
    let socket = config.server.socket.clone();
    // systemd's own (sd_listen_fds(3)), which it keeps while the service is down.
    let activated = activated().map(UnixListener::from);
    let own = activated.is_none();
    let listener = activated.map_or_else(|| named(&socket, listen(&socket)), Ok)?;
    let metrics = config.server.metrics.clone();
    let scraped = metrics.iter().map(|path| named(path, listen(path)));
    let listeners = std::iter::once(Ok(listener)).chain(scraped).collect::<io::Result<_>>()?;
    let mut launcher = launcher::Launcher::new(config, listeners)?;
    complain!("listening on {}", socket.display());
    let ended = launcher.run();
    for path in own.then_some(socket).into_iter().chain(metrics) {
        let _ = std::fs::remove_file(path);
    }
    ended
}

/// The first descriptor that systemd passed to this process, if it did.
fn activated() -> Option<OwnedFd> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    let ours = number("LISTEN_PID")? == std::process::id() && number("LISTEN_FDS")? >= 1;
    if ours { sandbox::take_passed_descriptor() } else { None }
}

/// Two daemons would break each other's record.
fn lock(state: &Path) -> io::Result<std::fs::File> {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(state.join("lock"))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another daemon uses this state directory; give each its own (`state`)",
        )),
        Err(error) => Err(error.into()),
    }
}

fn named<T>(path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// Anybody may connect; what they may ask for is the configuration's.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent().filter(|parent| !parent.exists()) {
        DirBuilder::new().recursive(true).create(parent)?;
        // Whatever the mask: peers come through.
        std::fs::set_permissions(parent, std::fs::Permissions::from_mode(0o755))?;
    }
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "a daemon answers there already"));
    }
    // Only what is a socket, and of a daemon that has gone, is taken away.
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    // By the mask, not afterwards: a mode that is set by path could become another file's.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o111));
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    listener
}

/// The core's first lines give up what it was born with, and the rest of the host's files once it knows where its record is; then
/// it serves.
pub fn role_core() -> ExitCode {
    let served = || {
        give_up_everything().map_err(|error| format!("the core cannot drop its rights: {error}"))?;
        let launcher = io::stdin().as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
        let setup = core::Setup::receive(&launcher)?;
        let record = setup.config.server.record();
        sandbox::confine_server(Path::new("/etc"), &record).map_err(|error| {
            let more = if error.kind() == io::ErrorKind::PermissionDenied {
                "; others have to be let through all directories above it (`chmod o+x`)"
            } else {
                ""
            };
            core::Why::Unfit(format!("the core cannot be confined to {}: {error}{more}", record.display()))
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
        runtime.map_err(|error| error.to_string())?.block_on(core::serve(launcher, setup))
    };
    match served() {
        Ok(()) => ExitCode::SUCCESS,
        Err(core::Why::Unfit(error)) => {
            complain!("{error}");
            ExitCode::from(CANNOT_SERVE)
        }
        Err(core::Why::Lost(error)) => {
            complain!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn give_up_everything() -> io::Result<()> {
    sandbox::become_nobody(CORE_ID)?;
    nix::sys::prctl::set_no_new_privs()?;
    nix::sys::prctl::set_dumpable(false)?;
    // A core without its launcher is nobody's.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}

/// `broker audit verify`
pub fn audit_verify(state: &Path) -> ExitCode {
    match audit::verify(&config::record(state)) {
        Ok(verified) if verified.records == 0 => {
            complain!(
                "there is no record in {}; `--state` names the daemon's state directory",
                config::record(state).display()
            );
            ExitCode::FAILURE
        }
        Ok(verified) => {
            println!("{} records, whole; the last is {}", verified.records, verified.last);
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain!("the audit record is broken: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `broker audit show`
pub fn audit_show(state: &Path) -> ExitCode {
    use std::io::Write;
    let mut out = io::stdout().lock();
    let shown = audit::show(&config::record(state), |line| {
        let _ = writeln!(out, "{}", crate::say::tame(line));
    });
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain!("{error}");
            ExitCode::FAILURE
        }
    }
}
