//! The set-up rows, SU-01 to SU-07: workspaces, policies, arguments and environments that somebody hostile
//! made.
//!
//! The oracles are on the host: a directory that must not change, a marker that must not appear.

#[path = "setup/links.rs"]
mod links;
#[path = "setup/policies.rs"]
mod policies;
#[path = "setup/words.rs"]
mod words;

use std::path::Path;
use std::process::{Command, Stdio};

use broker_tests::program;
use tempfile::TempDir;

fn folder(prefix: &str) -> TempDir {
    tempfile::Builder::new().prefix(prefix).tempdir().expect("a temporary directory")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `broker exec` with a policy of which nothing is given beforehand.
fn bare(policy: &Path) -> Command {
    let mut command = Command::new(program("broker"));
    command.args(["exec", "--embedded", "--policy"]).arg(policy).stdin(Stdio::null());
    command
}
