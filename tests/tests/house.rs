//! House rules that run: where `unsafe` may stand, which files decide and never act, which rows have a test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use broker_tests::program;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("the sources can be read").flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !path.ends_with("target") {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("a path of ours").display().to_string()
}

/// The code without comments, line by line.
fn code(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).expect("a source");
    text.lines().map(|line| line.split("//").next().unwrap_or_default().to_owned()).collect()
}

fn has_unsafe(path: &Path) -> bool {
    code(path).iter().any(|line| {
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "allow(unsafe_code"]
            .iter()
            .any(|form| line.contains(form))
    })
}

#[test]
fn unsafe_stands_in_two_files_of_the_product() {
    let product = ["sandbox/src", "broker/src", "broker/client/src", "harness/src", "harness/core/src"]
        .map(|folder| sources(&root().join(folder)))
        .concat();
    let found: Vec<String> =
        product.iter().filter(|path| has_unsafe(path)).map(|path| relative(path)).collect();
    assert_eq!(found, ["sandbox/src/sys/spawn.rs", "sandbox/src/sys.rs"]);
}

#[test]
fn every_unsafe_block_says_why() {
    for path in sources(&root()).iter().filter(|path| !relative(path).starts_with("target")) {
        let text = fs::read_to_string(path).expect("a source");
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if !line.trim_start().starts_with("//") && line.contains("unsafe {") && !line.contains('"') {
                let before = &lines[number.saturating_sub(8)..=number];
                assert!(
                    before.iter().any(|line| line.contains("SAFETY:")),
                    "{}:{}",
                    relative(path),
                    number + 1
                );
            }
        }
    }
}

/// What decides has no way to act: no file, no call, no clock, no randomness.
#[test]
fn what_decides_does_not_act() {
    let pure = [
        "sandbox/src/policy/mod.rs",
        "sandbox/src/policy/file.rs",
        "sandbox/src/policy/words.rs",
        "sandbox/src/job.rs",
        "sandbox/src/plan.rs",
        "sandbox/src/plan/files.rs",
        "sandbox/src/plan/command.rs",
        "sandbox/src/explain.rs",
        "sandbox/src/report.rs",
        "sandbox/src/seccomp/numbers.rs",
        "sandbox/src/seccomp/arguments.rs",
        "broker/client/src/grant/derived.rs",
        "broker/client/src/grant/rules.rs",
        "broker/src/serve/gateway/judge.rs",
        "harness/core/src/agent.rs",
        "harness/core/src/context.rs",
        "harness/core/src/decide.rs",
        "harness/core/src/event.rs",
        "harness/core/src/message.rs",
        "harness/core/src/sse.rs",
        "harness/core/src/state.rs",
        "harness/core/src/tools.rs",
    ];
    let acts = [
        "std::fs",
        "std::process",
        "std::net",
        "std::env::",
        "rustix::",
        " nix::",
        "(nix::",
        "libc::syscall",
        "Instant",
        "SystemTime",
        "sys::",
    ];
    for file in pure {
        for (number, line) in code(&root().join(file)).iter().enumerate() {
            let found = acts.iter().find(|way| line.contains(**way));
            assert!(found.is_none(), "{file}:{}: {}", number + 1, found.unwrap_or(&""));
        }
    }
}

#[test]
fn the_sandbox_knows_no_broker() {
    let manifest = fs::read_to_string(root().join("sandbox/Cargo.toml")).expect("the manifest");
    let (_, dependencies) = manifest.split_once("[dependencies]").expect("dependencies");
    assert!(!dependencies.contains("broker"));
    for path in sources(&root().join("sandbox/src")) {
        let named = code(&path).iter().any(|line| line.contains("broker::"));
        assert!(!named, "{}", relative(&path));
    }
}

/// The harness knows the broker by what is spoken with it, and nothing else of ours; what decides knows nothing at all.
#[test]
fn the_harness_knows_the_broker_s_client_alone() {
    for (package, allowed) in
        [("harness", ["broker-client", "harness-core"].as_slice()), ("harness/core", &[])]
    {
        let manifest = fs::read_to_string(root().join(package).join("Cargo.toml")).expect("the manifest");
        let (_, dependencies) = manifest.split_once("[dependencies]").expect("dependencies");
        for own in ["sandbox", "broker", "broker-client", "harness", "harness-core"] {
            let named = dependencies.contains(&format!("\n{own}.workspace"));
            assert_eq!(named, allowed.contains(&own), "{package} and {own}");
        }
    }
}

/// The rows that issue 2 of the project demands, as the catalogue numbers them.
const ROWS: [(&str, &[u32]); 7] = [
    ("fs", &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 18, 19, 22, 23, 24, 28]),
    ("su", &[1, 3, 4, 7]),
    ("pr", &[1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15]),
    ("ks", &[1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 15, 16, 18]),
    ("nw", &[1, 2, 3, 4, 5, 7, 10, 12]),
    ("rs", &[1, 2, 3, 4, 5, 6, 7, 8, 11, 12]),
    ("cb", &[1, 2, 4, 5, 6, 7, 11, 12, 14, 15, 21, 22]),
];

#[test]
fn every_row_of_the_catalogue_has_a_test() {
    let tests: String = sources(&root().join("tests/tests"))
        .iter()
        .map(|path| fs::read_to_string(path).expect("a test"))
        .collect();
    for (group, numbers) in ROWS {
        for number in numbers {
            let name = format!("fn {group}_{number:02}");
            assert!(tests.contains(&name), "{name}... is missing");
        }
    }
}

#[test]
fn every_option_is_in_the_man_page() {
    let pages = tempfile::tempdir().expect("a directory");
    let broker = program("broker");
    assert!(Command::new(&broker).arg("man").arg(pages.path()).status().expect("it runs").success());
    let page = fs::read_to_string(pages.path().join("broker-exec.1")).expect("the page");
    let help = Command::new(&broker).args(["exec", "--help"]).output().expect("it runs");
    let help = String::from_utf8(help.stdout).expect("text");
    let words =
        help.split(|letter: char| letter.is_whitespace() || letter == '[' || letter == '<' || letter == ',');
    let options: Vec<&str> = words.filter(|word| word.starts_with("--") && word.len() > 2).collect();
    assert!(options.len() > 8, "{options:?}");
    for option in options {
        let option = option.trim_end_matches(|letter: char| !letter.is_ascii_alphanumeric());
        let escaped = option.replace('-', "\\-");
        assert!(page.contains(&escaped) || page.contains(option), "{option} is not in the man page");
    }
}

#[test]
fn no_policy_of_ours_is_wrong() {
    let status = Command::new(program("broker"))
        .args(["policy", "check", "default", "python", "node", "shell", "build"])
        .status()
        .expect("it runs");
    assert!(status.success());
}
