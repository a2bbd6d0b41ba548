//! What each preset comes to on one fixed host, as `broker policy explain` prints it. A change of a preset, of
//! planning or of the text shows here as a diff to read; `UPDATE_GOLDEN=1 cargo test` takes it over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sandbox::{
    Caller, Cgroups, Controller, Host, Job, PRESETS, PathKind, Plan, Policy, Presets, Stream, Wishes,
    WorkspaceMode, WorkspaceWish,
};

/// What stands on the host beside the links: Debian with `/usr` merged and version managers in the caller's home.
const DIRECTORIES: [&str; 13] = [
    "/usr",
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ssl/certs",
    "/etc/java-17-openjdk",
    "/etc/python3",
    "/etc/terminfo",
    "/home/dev/.pyenv",
    "/home/dev/.rustup",
    "/home/dev/.cargo/bin",
    "/home/dev/.nvm/versions",
    // No preset names these: they must not show up in any plan.
    "/home/dev/.ssh",
    "/srv",
];

const FILES: [&str; 4] = ["/etc/ld.so.cache", "/etc/ssl/openssl.cnf", "/etc/bash.bashrc", "/home/dev/.netrc"];

/// Links: what they say, and the directory where they end. The last two are common ways to choose a version: one ends
/// inside a tree that is shown anyway, one beside itself.
const LINKS: [(&str, &str, &str); 6] = [
    ("/bin", "usr/bin", "/usr/bin"),
    ("/sbin", "usr/sbin", "/usr/sbin"),
    ("/lib", "usr/lib", "/usr/lib"),
    ("/lib64", "usr/lib64", "/usr/lib64"),
    ("/opt/jdk", "../usr/lib/jvm/java-17-openjdk-amd64", "/usr/lib/jvm/java-17-openjdk-amd64"),
    ("/opt/go", "go-1.24", "/opt/go-1.24"),
];

/// Directories of which each preset shows others, and some that none shows.
const SEARCH_PATH: [&str; 10] = [
    "/home/dev/.pyenv/shims",
    "/home/dev/.cargo/bin",
    "/home/dev/.nvm/versions/node/v22.11.0/bin",
    "/home/dev/.local/bin",
    "/opt/go/bin",
    "/usr/local/bin",
    "/usr/bin",
    "/bin",
    "/usr/games",
    "/snap/bin",
];

fn host() -> Host {
    let mut paths = BTreeMap::new();
    paths.extend(DIRECTORIES.map(|path| (PathBuf::from(path), PathKind::Directory)));
    paths.extend(FILES.map(|path| (PathBuf::from(path), PathKind::File)));
    paths.extend(LINKS.map(|(path, target, end)| {
        (path.into(), PathKind::Symlink { target: target.into(), resolved: Some((end.into(), true)) })
    }));
    Host {
        landlock_abi: 7,
        cgroups: Cgroups::V2 { controllers: Controller::ALL.into() },
        disks: Vec::new(),
        caller: Caller {
            uid: 0,
            gid: 0,
            home: Some("/home/dev".into()),
            path: SEARCH_PATH.map(PathBuf::from).into(),
        },
        paths,
    }
}

fn plan(preset: &str) -> Plan {
    let policy = Policy::named(preset, &Presets).expect("a preset parses");
    let workspace = WorkspaceWish { directory: "/home/dev/project".into(), mode: WorkspaceMode::ReadWrite };
    let wishes = Wishes {
        command: vec!["true".into()],
        workspace: Some(workspace),
        streams: [Stream::Pipe; 3],
        ..Wishes::default()
    };
    let job = Job::narrow(&policy, wishes).expect("nothing is asked for that could be too much");
    Plan::make(&policy, &job, &host()).expect("the host has everything that a preset demands")
}

fn compare(preset: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(preset).with_extension("txt");
    let found = plan(preset).to_string();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &found).expect("the golden file is written");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == golden,
        "the plan of {preset} is not what tests/golden/{preset}.txt says (-); take it over with UPDATE_GOLDEN=1\n{}",
        diff(&golden, &found)
    );
}

#[test]
fn default_comes_to_its_golden_plan() {
    compare("default");
}

#[test]
fn python_comes_to_its_golden_plan() {
    compare("python");
}

#[test]
fn node_comes_to_its_golden_plan() {
    compare("node");
}

#[test]
fn shell_comes_to_its_golden_plan() {
    compare("shell");
}

#[test]
fn build_comes_to_its_golden_plan() {
    compare("build");
}

/// Else a new preset would have no golden plan and nobody would notice.
#[test]
fn every_preset_has_a_golden_file_and_every_golden_file_a_preset() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("the folder of golden files")
        .map(|entry| entry.expect("an entry").path())
        .map(|path| path.file_stem().expect("a name").to_string_lossy().into_owned())
        .collect();
    files.sort();
    let mut presets = PRESETS.map(|(name, _)| name);
    presets.sort_unstable();
    assert_eq!(files, presets);
}

/// The oracle here is the host, not the golden text: what no preset names is in no plan.
#[test]
fn no_preset_names_credentials_or_what_else_lies_in_the_home() {
    for (preset, _) in PRESETS {
        let text = plan(preset).to_string();
        for secret in [".ssh", ".netrc", "/srv", "/home/dev/.local/bin", "/snap", "/home/dev,"] {
            assert!(!text.contains(secret), "the plan of {preset} names {secret}:\n{text}");
        }
    }
}

/// Only lines that differ, with the nearest lines around them; by the longest common subsequence.
fn diff(golden: &str, found: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) = (golden.lines().collect(), found.lines().collect());
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for (i, one) in old.iter().enumerate().rev() {
        for (j, other) in new.iter().enumerate().rev() {
            common[i][j] =
                if one == other { common[i + 1][j + 1] + 1 } else { common[i + 1][j].max(common[i][j + 1]) };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push(format!("  {}", old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && common[i + 1][j] >= common[i][j + 1]) {
            lines.push(format!("- {}", old[i]));
            i += 1;
        } else {
            lines.push(format!("+ {}", new[j]));
            j += 1;
        }
    }
    let near =
        |at: usize| (at.saturating_sub(2)..lines.len().min(at + 3)).any(|i| !lines[i].starts_with("  "));
    (0..lines.len()).filter(|at| near(*at)).map(|at| format!("{}\n", lines[at])).collect()
}

#[test]
fn the_diff_shows_what_differs_and_little_else() {
    let golden: String = (0..20).map(|line| format!("{line}\n")).collect();
    let shown = diff(&golden, &golden.replace("10\n", "ten\n"));
    assert_eq!(shown, "  8\n  9\n- 10\n+ ten\n  11\n  12\n");
}
