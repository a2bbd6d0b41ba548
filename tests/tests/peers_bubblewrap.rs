//! bubblewrap's own tests (v0.11.1), restated as claims about `broker exec` and in our own words.
//!
//! Each comment names the test of theirs, and what it proves. The oracles are on the host: a marker, a status, a
//! listener, `/proc` of the payload. Where it is harmless the same script runs on the host or in bubblewrap first, to
//! show that it would work without us. Their tests of options that we do not have are left out.

#[path = "peers_bubblewrap/command_line.rs"]
mod command_line;
#[path = "peers_bubblewrap/files.rs"]
mod files;
mod peers;
#[path = "peers_bubblewrap/processes.rs"]
mod processes;

use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use broker_tests::{Running, alive, canary, eventually, field, program};
use peers::{
    after, answer, bash, broker, bubblewrap, calls, content, errnos, folder, host, image, inside, names,
    outside, plant, said, sandbox, status,
};

/// A host process with a token in its arguments.
fn bystander(token: &str) -> Running {
    Running::start(Command::new("bash").args(["-c", "echo up; read -r; :", token]))
}

/// A payload that waits, found on the host by its token.
fn payload(workspace: &Path, script: &str, token: &str) -> (Running, i32) {
    let running = Running::start(sandbox(workspace).args(["bash", "-c", script, token]));
    let confined = running.confined();
    // Init still bears the words of `broker exec`, and with them the token.
    let starts = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        confined.contains(&pid.cast_unsigned()) && line.starts_with(b"bash\0")
    };
    let pid = alive(token).into_iter().find(starts);
    (running, pid.expect("the payload is among the confined processes"))
}

/// A policy of its own in `folder`.
fn policy(folder: &Path, text: &str) -> PathBuf {
    plant(folder, "policy.toml", text);
    folder.join("policy.toml")
}
