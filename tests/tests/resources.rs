//! The resource rows, RS-01 to RS-12: no more than was given, and no longer than was allowed.
//!
//! Each attempt takes far more than the limit, on the host and inside; how far it came is its own count,
//! checked against the limit and against what the host sees.

#[path = "resources/ending.rs"]
mod ending;
#[path = "resources/pools.rs"]
mod pools;

use std::path::Path;
use std::process::{Command, Output};

use broker_tests::{Case, Sandbox};
use tempfile::TempDir;

fn folder(prefix: &str) -> TempDir {
    tempfile::Builder::new().prefix(prefix).tempdir().expect("a temporary directory")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The number after `at ` in the detail: how far the attempt came.
fn reached(case: &Case) -> u64 {
    let number = case.detail.strip_prefix("at ").and_then(|rest| rest.parse().ok());
    number.unwrap_or_else(|| panic!("how far it came: {case:?}"))
}

fn run(command: &mut Command) -> Output {
    command.output().expect("it runs")
}

/// A sandbox that writes its report to `path`.
fn reporting(sandbox: Sandbox, path: &Path) -> Sandbox {
    sandbox.option("--report").option(path.display().to_string())
}

/// The outcome as the report tells it, as text: its exact form is the report's own tests' concern.
fn outcome(path: &Path) -> String {
    broker_tests::report(path)["outcome"].to_string()
}
