//! Bugs that were planted (`tests/bugs/*.patch`) in what decides: the simulation finds each of them. A simulation that finds none of them
//! would be worth nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// The sources, without what git does not know.
fn copy(to: &Path) {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git runs");
    assert!(listed.status.success(), "{listed:?}");
    let names = String::from_utf8(listed.stdout).expect("names of ours");
    for name in names.split('\0').filter(|name| !name.is_empty()) {
        let (from, into) = (root().join(name), to.join(name));
        fs::create_dir_all(into.parent().expect("a folder")).expect("it is ours");
        // One that was just removed is no source any more.
        let _ = fs::copy(from, into);
    }
}

fn patch(sources: &Path, patch: &Path, how: &[&str]) {
    let applied = Command::new("git")
        .arg("apply")
        .args(how)
        .arg(patch)
        .current_dir(sources)
        .output()
        .expect("git runs");
    assert!(applied.status.success(), "{}: {}", patch.display(), String::from_utf8_lossy(&applied.stderr));
}

/// What the simulation says of these sources.
fn simulate(sources: &Path, schedules: &str) -> (bool, String) {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bugs");
    let ran = Command::new(env!("CARGO"))
        .args([
            "test",
            "--locked",
            "--offline",
            "-p",
            "harness-core",
            "--test",
            "simulation",
            "--",
            "--nocapture",
        ])
        .current_dir(sources)
        .env("CARGO_TARGET_DIR", target)
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("SIMULATION_SCHEDULES", schedules)
        .env("RUST_BACKTRACE", "0")
        .output()
        .expect("cargo runs");
    let said = [ran.stdout, ran.stderr].concat();
    (ran.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn each_planted_bug_is_found() {
    let folder = tempfile::tempdir().expect("a directory");
    copy(folder.path());
    let (whole, said) = simulate(folder.path(), "2000");
    assert!(whole, "without a bug nothing is found: {said}");
    let mut patches: Vec<PathBuf> = fs::read_dir(root().join("tests/bugs"))
        .expect("patches")
        .flatten()
        .map(|entry| entry.path())
        .collect();
    patches.sort();
    assert!(patches.len() >= 10, "{patches:?}");
    for bug in patches {
        patch(folder.path(), &bug, &[]);
        let (whole, said) = simulate(folder.path(), "100000");
        assert!(!whole && said.contains("went wrong"), "{} is not found: {said}", bug.display());
        patch(folder.path(), &bug, &["--reverse"]);
    }
}
