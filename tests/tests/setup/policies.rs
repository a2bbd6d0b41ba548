//! Policies that say nothing or something wrong, and environments.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use broker_tests::{Sandbox, assert_refused, canary};

use super::{bare, folder, text};

/// SU-04. Method: policies with empty lists. Oracle: the program that runs, and what it is shown.
#[test]
fn su_04_empty_means_nothing() {
    let (place, token) = (folder("su-04-"), canary());
    let path = place.path().join("policy.toml");
    let run = |policy: &str| {
        std::fs::write(&path, policy).expect("the policy is written");
        let mut command = bare(&path);
        command
            .args(["--", "sh", "-c", "echo ran; env; ls /"])
            .env("SU_04", &token)
            .output()
            .expect("broker runs")
    };
    let control = run("extends = \"default\"\n[env]\npass = [\"SU_04\"]\n");
    assert!(
        text(&control.stdout).contains(&token) && control.status.success(),
        "SU-04: the control runs: {control:?}"
    );
    for policy in
        ["", "[files]\nread = []\n", "[files]\n", "[env]\npass = []\n", "description = \"nothing\"\n"]
    {
        let output = run(policy);
        assert!(
            matches!(output.status.code(), Some(125..=127)),
            "SU-04: {policy:?} let a program be seen: {output:?}"
        );
        assert!(output.stdout.is_empty(), "SU-04: {policy:?}: {output:?}");
    }
    for policy in ["[env]\npass = []\n", "[files]\nread = []\n", "[workspace]\nprotect = []\n", "[limits]\n"]
    {
        let output = run(&format!("extends = \"default\"\n{policy}"));
        assert!(output.status.success(), "SU-04: {policy:?}: {output:?}");
        assert!(!text(&output.stdout).contains(&token), "SU-04: {policy:?} passes the environment");
    }
    // Nor does an empty list take protection away.
    let workspace = folder("su-04-");
    let sandbox = Sandbox::with("[workspace]\nprotect = []\nhold = {}\n");
    let sandbox = sandbox.option("--workspace").option(workspace.path().display().to_string());
    sandbox.shell("mkdir -p .git/hooks; echo attack > .git/hooks/pre-commit; echo attack > .envrc");
    assert!(
        !workspace.path().join(".git/hooks/pre-commit").exists(),
        "SU-04: an empty list unprotects hooks"
    );
    assert!(!workspace.path().join(".envrc").exists(), "SU-04: an empty list unprotects .envrc");
}

/// SU-04. Method: policies that are wrong: unknown and duplicate keys, wrong types, null, no TOML. Oracle:
/// status 125, a line about it, and no sign of the program.
#[test]
fn su_04_wrong_policies_are_errors() {
    let place = folder("su-04-");
    let path = place.path().join("policy.toml");
    let run = |policy: &[u8]| {
        std::fs::write(&path, [b"extends = \"default\"\n", policy].concat()).expect("the policy is written");
        bare(&path).args(["--", "echo", "ran"]).output().expect("broker runs")
    };
    assert_eq!(text(&run(b"").stdout), "ran\n", "SU-04: the control runs");
    let wrong: [&[u8]; 47] = [
        b"unknown = 1\n",
        b"[files]\nreads = []\n",
        b"[file]\nread = []\n",
        b"[files]\nread = [\"/usr\"]\nread = [\"/\"]\n",
        b"[files]\n[files]\n",
        b"[files]\nread = [\"/srv\", \"/srv\"]\n",
        b"[files]\nread = \"/usr\"\n",
        b"[files]\nread = [1]\n",
        b"[files]\nread = null\n",
        b"files = []\n",
        b"files = [[\"/srv\"]]\n",
        b"limits = [\"1GiB\", 5]\n",
        b"env = [{}, []]\n",
        b"[[files]]\nread = [\"/srv\"]\n",
        b"[files]\nread = { a = \"/srv\" }\n",
        b"[files]\nread = [\"/srv\", null]\n",
        b"[files]\nread = [[\"/srv\"]]\n",
        b"extends = \"default\"\n",
        b"extends = \"../default\"\n",
        b"[workspace]\nprotect = [\"/etc\"]\n",
        b"[workspace]\nprotect = [\"../x\"]\n",
        b"[workspace]\nprotect = [\"\"]\n",
        b"[env]\nset = { A = \"a\\u0000b\" }\n",
        b"[env]\nset = { A = 1 }\n",
        b"[limits]\noutput = 0.5\n",
        b"[limits]\npids = true\n",
        b"[limits]\npids = 1e3\n",
        b"[limits]\ncpus = 0\n",
        b"[limits]\ncpus = -1.0\n",
        b"[limits]\ntimeout = \"-1s\"\n",
        b"[limits]\ntimeout = 5\n",
        b"[files]\ntmp = -1\n",
        b"[files]\ntmp = \"1XB\"\n",
        b"[files]\ninodes = \"x\"\n",
        b"[limits]\nmemory = \"0\"\n",
        b"[limits]\npids = 0\n",
        b"[limits]\npids = -1\n",
        b"[limits]\ncpus = nan\n",
        b"[limits]\ncpus = inf\n",
        b"[limits]\nmemory = \"99999999999999999999GiB\"\n",
        b"[limits]\ntimeout = \"\"\n",
        b"[landlock]\nfloor = 99\n",
        b"[syscalls]\nunix_sockets = \"yes\"\n",
        b"[env]\npass = [\"A=B\"]\n",
        b"[env]\nset = { \"A=B\" = \"\" }\n",
        b"allow_gaps = [\"everything\"]\n",
        b"\xff\xfe",
    ];
    // All of them before the verdict: one that is accepted says little about the next.
    let accepted: Vec<String> = wrong
        .iter()
        .filter(|policy| {
            let output = run(policy);
            output.status.code() != Some(125) || !output.stdout.is_empty() || output.stderr.is_empty()
        })
        .map(|policy| text(policy))
        .collect();
    assert!(accepted.is_empty(), "SU-04: accepted: {accepted:?}");
    let mut command = bare(Path::new("/nonexistent/policy.toml"));
    let output = command.args(["--", "echo", "ran"]).output().expect("broker runs");
    assert_eq!(output.status.code(), Some(125), "SU-04: a policy that is not there: {output:?}");
}

const HOSTILE: [&str; 24] = [
    "LD_PRELOAD",
    "LD_AUDIT",
    "LD_LIBRARY_PATH",
    "GLIBC_TUNABLES",
    "BASH_ENV",
    "ENV",
    "PYTHONPATH",
    "PERL5OPT",
    "NODE_OPTIONS",
    "GIT_SSH_COMMAND",
    "GIT_CONFIG_GLOBAL",
    "GITHUB_TOKEN",
    "SOME_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "SSH_AUTH_SOCK",
    "DBUS_SESSION_BUS_ADDRESS",
    "XDG_RUNTIME_DIR",
    "KRB5CCNAME",
    "LISTEN_FDS",
    "NOTIFY_SOCKET",
    "TMPDIR",
    "RUST_LOG",
    "IFS",
];

/// SU-07 (CVE-2025-23266). Method: the caller's environment is full of names that programs obey or that hold
/// secrets. Oracle: each name, and every environment that can be read inside, is searched for this run's
/// token; a helper that obeyed `LD_PRELOAD` would complain about the token on standard error, as the
/// control's shell does.
#[test]
fn su_07_the_callers_environment_stays_outside() {
    let (token, sandbox) = (canary(), Sandbox::new());
    // Under a folder that is not there: whatever reads it fails, and says so.
    let value = format!("/nonexistent/{token}.so");
    let mut arguments = vec![token.clone()];
    arguments.extend(HOSTILE.map(String::from));
    let run = |command: &mut Command| {
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", "/root")
            .envs(HOSTILE.map(|name| (name, &value)));
        command
            .arg(sandbox.probe_path())
            .arg("SU-07")
            .args(&arguments)
            .stdin(Stdio::null())
            .output()
            .expect("it runs")
    };
    let control = run(Command::new("env").arg("--"));
    assert!(
        text(&control.stderr).contains(&token),
        "SU-07: the control's helper obeys LD_PRELOAD: {control:?}"
    );
    let inside = run(&mut sandbox.command());
    assert!(
        !text(&inside.stderr).contains(&token),
        "SU-07: something obeyed the environment: {}",
        text(&inside.stderr)
    );
    let cases = |output: &Output| broker_tests::cases_in(&text(&output.stdout));
    assert!(!cases(&inside).is_empty(), "SU-07: {inside:?}");
    assert_refused("SU-07", &cases(&control), &cases(&inside), &[]);

    // What is named is passed, with the value named or the caller's, and nothing beside it.
    let sandbox = Sandbox::new().option("--env").option("GIVEN=value");
    let sandbox = sandbox.option("--env").option("SOME_TOKEN");
    let mut named = sandbox.command();
    named
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", "/root")
        .env("SOME_TOKEN", &token)
        .env("OTHER_TOKEN", &token);
    let output = named.args(["env"]).output().expect("broker runs");
    let lines = text(&output.stdout);
    assert!(
        lines.contains("GIVEN=value\n") && lines.contains(&format!("SOME_TOKEN={token}\n")),
        "SU-07: {output:?}"
    );
    let names: Vec<&str> =
        lines.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    let known =
        ["GIVEN", "SOME_TOKEN", "PATH", "HOME", "USER", "LOGNAME", "LANG", "SHELL", "TMPDIR", "TERM", "PWD"];
    assert!(names.iter().all(|name| known.contains(name)), "SU-07: more than was named: {names:?}");
}

/// SU-07. Method: names that cannot be a variable's. Oracle: status 125 and no sign of the program.
#[test]
fn su_07_names_that_are_no_names_are_refused() {
    for value in ["", "=x", "A B=x"] {
        let output = Sandbox::new().option("--env").option(value).shell("echo ran; env");
        assert_eq!(output.status.code(), Some(125), "SU-07: --env {value:?}: {output:?}");
        assert!(output.stdout.is_empty(), "SU-07: --env {value:?}: {output:?}");
    }
}
