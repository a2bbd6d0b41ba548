//! The tests of Anthropic's sandbox-runtime (`test/sandbox/*.test.ts`), restated as claims about `broker exec` and in
//! our own words.
//!
//! Each comment names the test of theirs, and what it proves. The oracles are on the host: bytes and inodes of a
//! workspace, listeners, `/proc`. The same script runs on the host first where that is harmless: there it works.

mod peers;
#[path = "peers_srt/processes.rs"]
mod processes;
#[path = "peers_srt/workspace.rs"]
mod workspace;

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

#[cfg(target_arch = "x86_64")]
use broker_tests::inject::{self, Verdict};
use broker_tests::{Running, alive, canary, eventually};
use peers::{
    after, answer, bash, broker, bubblewrap, calls, content, errnos, folder, host, image, inside, names,
    outside, plant, said, sandbox, status,
};
use tempfile::TempDir;

/// Files that the host runs or obeys later.
const DANGEROUS: [&str; 10] = [
    ".bashrc",
    ".envrc",
    ".git/config",
    ".git/hooks/pre-commit",
    ".gitconfig",
    ".gitmodules",
    ".idea/workspace.xml",
    ".mcp.json",
    ".profile",
    ".vscode/settings.json",
];

/// A workspace with all of [`DANGEROUS`].
fn furnished() -> TempDir {
    let workspace = folder();
    for name in DANGEROUS {
        plant(workspace.path(), name, "original\n");
    }
    workspace
}

/// Set for a test that runs in a process of its own.
#[cfg(target_arch = "x86_64")]
const ALONE: &str = "PEERS_ALONE";
