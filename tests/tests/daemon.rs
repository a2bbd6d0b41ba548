//! `broker serve` with real processes: what runs through it, who may ask for what, what is recorded, what dies with whom.

#[path = "daemon/changes.rs"]
mod changes;
#[path = "daemon/changes_attacked.rs"]
mod changes_attacked;
#[path = "daemon/exhaustion.rs"]
mod exhaustion;
#[path = "daemon/forged.rs"]
mod forged;
#[path = "daemon/grants.rs"]
mod grants;
#[path = "daemon/holders.rs"]
mod holders;
#[path = "daemon/hostile.rs"]
mod hostile;
#[path = "daemon/interface.rs"]
mod interface;
#[path = "daemon/kept.rs"]
mod kept;
#[path = "daemon/lifetime.rs"]
mod lifetime;
#[path = "daemon/lives.rs"]
mod lives;
#[path = "daemon/pool.rs"]
mod pool;
#[path = "daemon/record.rs"]
mod record;
#[path = "daemon/roles.rs"]
mod roles;
#[path = "daemon/rows.rs"]
mod rows;
#[path = "daemon/runs.rs"]
mod runs;
#[path = "daemon/soak.rs"]
mod soak;
#[path = "daemon/stages.rs"]
mod stages;

use std::fs;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use broker_tests::{program, within};
use serde_json::Value;
use tempfile::TempDir;

/// A user without any right of root's, and one whom the configuration does not name.
const ADA: u32 = 54_321;
const EVE: u32 = 54_322;

/// A daemon with a socket and a record of its own.
struct Daemon {
    process: Child,
    folder: TempDir,
}

impl Daemon {
    fn start() -> Daemon {
        Daemon::start_after("true")
    }

    /// In a mount namespace of its own, where `script` has run first; `$STATE` is the directory of the record.
    fn start_after(script: &str) -> Daemon {
        Daemon::start_with(script, "")
    }

    /// The same, with `more` in its configuration, which begins in `[server]`.
    fn start_with(script: &str, more: &str) -> Daemon {
        let folder = tempfile::Builder::new().prefix("broker-daemon-").tempdir().expect("a directory");
        // Others have to reach the socket in it.
        set_mode(folder.path(), 0o755);
        let state = folder.path().join("state");
        fs::create_dir(&state).expect("a directory");
        let socket = folder.path().join("broker.sock");
        let access = format!("[[access]]\nuser = \"{ADA}\"\npolicies = [\"default\"]\n");
        let server = format!("[server]\nsocket = {socket:?}\nstate = {state:?}\n{more}");
        fs::write(folder.path().join("config.toml"), server + &access).expect("a configuration");
        let process = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg(format!("{script} && exec \"$@\""))
            .arg("sh")
            .arg(program("broker"))
            .args(["serve", "--config"])
            .arg(folder.path().join("config.toml"))
            .env("STATE", &state)
            .stderr(fs::File::create(folder.path().join("log")).expect("a log"))
            .spawn()
            .expect("it starts");
        let daemon = Daemon { process, folder };
        let answers = || daemon.broker(0, &["ps"]).output().is_ok_and(|output| output.status.success());
        assert!(within(Duration::from_secs(10), answers), "{}", daemon.log());
        // Whoever counts the core's descriptors counts those of the roles too.
        let complete = || ["vault", "resolver"].iter().all(|role| roles::is_up(&daemon, role));
        assert!(within(Duration::from_secs(10), complete), "{}", daemon.log());
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("broker.sock")
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// `broker WORD... --connect SOCKET` as `uid`.
    fn broker(&self, uid: u32, words: &[&str]) -> Command {
        let mut command = Command::new(program("broker"));
        command.args(words).arg("--connect").arg(self.socket());
        if uid != 0 {
            command.uid(uid).gid(uid);
        }
        command.current_dir("/").stdin(Stdio::null());
        command
    }

    fn exec(&self, uid: u32, options: &[&str], command: &[&str]) -> Output {
        let mut words = self.broker(uid, &[&["exec"], options].concat());
        words.arg("--").args(command).output().expect("it runs")
    }

    fn list(&self, uid: u32) -> Vec<Value> {
        let output = self.broker(uid, &["ps", "--json"]).output().expect("it runs");
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("a list")
    }

    fn records(&self) -> Vec<Value> {
        let output = self.audit("show");
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    }

    fn audit(&self, word: &str) -> Output {
        let mut command = Command::new(program("broker"));
        command.args(["audit", word, "--state"]).arg(self.state()).output().expect("it runs")
    }

    /// The daemon's processes by role.
    fn role(&self, name: &str) -> Option<i32> {
        if name == "launcher" {
            return i32::try_from(self.process.id()).ok();
        }
        children(self.process.id()).into_iter().find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == name.as_bytes())
        })
    }

    /// `kill -9`, and until the next core serves.
    fn kill_core(&self) {
        let core = self.role("core").expect("there is a core");
        let signal = nix::sys::signal::Signal::SIGKILL;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(core), signal).expect("it lives");
        let next = || self.role("core").is_some_and(|pid| pid != core);
        assert!(within(Duration::from_secs(5), next), "{}", self.log());
        let answers = || self.broker(0, &["ps"]).output().is_ok_and(|output| output.status.success());
        assert!(within(Duration::from_secs(5), answers), "{}", self.log());
    }

    /// SIGTERM, and until nothing of it is there.
    fn stop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.process.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let ended = within(Duration::from_secs(10), || matches!(self.process.try_wait(), Ok(Some(_))));
        assert!(ended, "the daemon ends: {}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn children(pid: u32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("its mode is ours to set");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A directory that belongs to `uid`.
fn folder_of(uid: u32) -> TempDir {
    let folder = tempfile::Builder::new().prefix("broker-daemon-").tempdir().expect("a directory");
    std::os::unix::fs::chown(folder.path(), Some(uid), Some(uid)).expect("root gives it away");
    folder
}
