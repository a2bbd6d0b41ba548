//! The set-up rows, SU-01 to SU-07: workspaces, policies, arguments and environments that somebody hostile made.
//!
//! The oracles are on the host: a directory that must not change, a marker that must not appear.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use broker_tests::{Sandbox, assert_refused, canary, program};
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

/// All of a directory that a change would show in: names, kinds, contents and times.
fn picture(place: &Path) -> Vec<(PathBuf, u32, i64, i64, Vec<u8>)> {
    let mut waiting = vec![place.to_owned()];
    let mut seen = Vec::new();
    while let Some(path) = waiting.pop() {
        let about = path.symlink_metadata().expect("there");
        if about.is_dir() {
            waiting.extend(std::fs::read_dir(&path).expect("readable").flatten().map(|entry| entry.path()));
        }
        let content = if about.is_file() { std::fs::read(&path).expect("readable") } else { Vec::new() };
        seen.push((path, about.mode(), about.mtime(), about.mtime_nsec(), content));
    }
    seen.sort();
    seen
}

/// A host directory with what a misled set-up would change: `hooks` is empty, so that it could even be removed.
fn host_canary() -> TempDir {
    let place = folder("su-01-host-");
    std::fs::create_dir(place.path().join("hooks")).expect("a directory");
    std::fs::write(place.path().join("config"), "host\n").expect("a file");
    for path in [place.path().to_owned(), place.path().join("hooks"), place.path().join("config")] {
        let mode = if path.is_dir() { 0o777 } else { 0o666 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    }
    place
}

/// SU-01 (CVE-2025-31133 and its kin). Method: protected names of the workspace, and directories on their way, are links to
/// a host directory: absolute, relative, by /proc and by names that a half-built root may have. Oracle: a picture of
/// that directory, with times, while the run lasts and after it. That the picture shows a change at all is the control.
#[test]
fn su_01_links_in_the_workspace_do_not_lead_the_set_up_out() {
    let host = host_canary();
    let before = picture(host.path());
    std::fs::write(host.path().join("control"), "").expect("a file");
    assert!(before != picture(host.path()), "SU-01: the picture shows a new file");
    std::fs::remove_file(host.path().join("control")).expect("removed");

    let target = host.path().display().to_string();
    let texts = [
        target.clone(),
        format!("../../../../../..{target}"),
        format!("/proc/self/root{target}"),
        format!("/proc/1/root{target}"),
        format!("/oldroot{target}"),
        format!("/old_root{target}"),
        format!("/.old{target}"),
        format!("./../{}", host.path().file_name().expect("a name").to_string_lossy()),
    ];
    // What is linked, below it what the policy protects: the middle, the end, and a name that is absent.
    for link in [".git", ".git/hooks", ".git/config", ".vscode", ".envrc", ".cargo"] {
        for target in &texts {
            let workspace = folder("su-01-");
            let path = workspace.path().join(link);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("directories");
            let file = if link.ends_with("config") || link.ends_with(".envrc") { "/config" } else { "" };
            symlink(format!("{target}{file}"), &path).expect("a link");
            let before = picture(host.path());
            let sandbox = Sandbox::new().option("--workspace").option(workspace.path().display().to_string());
            let attack = format!(
                "echo attack > {link}/attack; echo attack > {link}/config; echo attack >> {link}; \
                 rmdir {link}/hooks; mkdir {link}/made; exit 0"
            );
            let output = sandbox.shell(&attack);
            let status = output.status.code();
            assert!(matches!(status, Some(0 | 125)), "SU-01: {link} -> {target}: {output:?}");
            assert!(before == picture(host.path()), "SU-01: {link} -> {target}: the host's directory changed");
            assert!(path.is_symlink(), "SU-01: {link} -> {target}: the host's own link is gone");
        }
    }
}

/// SU-01, the clean-up. Method: places that the set-up made are swapped for links to a host directory with the same
/// names in it, before the run ends. Oracle: the picture of that directory.
#[test]
fn su_01_the_clean_up_follows_no_swapped_directory() {
    for swap in [
        "mv .git .gone; ln -s TARGET .git",
        "mv .git .gone; mkdir .git; ln -s TARGET/hooks .git/hooks",
        "rm -rf .vscode .envrc; ln -s TARGET/hooks .vscode; ln -s TARGET/config .envrc",
        "mkdir x; mv x .git; rmdir .git; ln -s TARGET .git",
    ] {
        for prepared in [true, false] {
            let (host, workspace) = (host_canary(), folder("su-01-"));
            if prepared {
                std::fs::create_dir(workspace.path().join(".git")).expect("a directory");
            }
            let before = picture(host.path());
            let sandbox = Sandbox::new().option("--workspace").option(workspace.path().display().to_string());
            let script = swap.replace("TARGET", &host.path().display().to_string());
            let output = sandbox.shell(&format!("{script}; exit 0"));
            assert_eq!(output.status.code(), Some(0), "SU-01: {swap}: {output:?}");
            assert!(before == picture(host.path()), "SU-01: {swap}: the clean-up changed the host's directory");
        }
    }
}

/// SU-01, the other side: links that are right go on working. bubblewrap's strict repair broke `/var/run`.
#[test]
fn su_01_legal_links_work() {
    let (place, token) = (folder("su-01-"), canary());
    std::fs::create_dir(place.path().join("real")).expect("a directory");
    std::fs::write(place.path().join("real/marker"), &token).expect("a file");
    symlink("real", place.path().join("link")).expect("a link");
    symlink("marker", place.path().join("real/inner")).expect("a link");
    let link = place.path().join("link").display().to_string();
    let sandbox = Sandbox::new().option("--workspace").option(link);
    let output = sandbox.shell("cat inner; /bin/sh -c 'test -d /lib' && test -e /lib64/ld-linux-x86-64.so.2 && echo; pwd");
    assert_eq!(text(&output.stdout), format!("{token}\n/workspace\n"), "SU-01: {output:?}");
}

/// SU-03. Method: workspaces whose names are made of what separates, escapes and expands elsewhere. Oracle: a marker
/// that lies only in the directory of exactly that name; a decoy lies where a careless reading leads.
#[test]
fn su_03_workspace_names_mean_exactly_themselves() {
    let (place, policies) = (folder("su-03-"), folder("su-03-"));
    let policy = policies.path().join("policy.toml");
    std::fs::write(&policy, "extends = \"default\"\n").expect("the policy is written");
    let names: [&[u8]; 16] = [
        b"plain", b"trailing/", b"a b", b"a,b", b"a\\b", b"a\"b", b"a'b", b"a\nb", b"a=b", b"~", b"$HOME", b"-x", b"--policy=y",
        b"a\xff\xfeb", b"upperdir=x,lowerdir=y", b"%2e%2e",
    ];
    for name in names {
        let token = canary();
        let path = place.path().join(OsStr::from_bytes(name));
        std::fs::create_dir(&path).expect("a directory");
        std::fs::write(path.join("marker"), &token).expect("a file");
        for absolute in [true, false] {
            let value = if absolute { path.as_os_str().to_owned() } else { OsStr::from_bytes(name).to_owned() };
            let mut command = bare(&policy);
            command.arg("--workspace").arg(&value);
            let output = command.args(["--", "cat", "/workspace/marker"]).current_dir(place.path()).stdin(Stdio::null());
            let output = output.output().expect("broker runs");
            let exact = output.status.success() && text(&output.stdout) == token;
            // What cannot be taken has to be said; a relative name that looks like an option may well be refused.
            let refused = matches!(output.status.code(), Some(125 | 2)) && !output.stderr.is_empty();
            let odd = value.as_bytes().starts_with(b"-") || std::str::from_utf8(name).is_err();
            assert!(exact || (refused && odd), "SU-03: workspace {value:?}: {output:?}");
        }
    }
    // The mode is split off at the end, once.
    for (name, value, writable) in [("m", "m:ro", false), ("m:ro", "m:ro:ro", false), ("m:rw", "m:rw:ro", false), ("n", "n:rw", true)] {
        let path = place.path().join(name);
        std::fs::create_dir(&path).expect("a directory");
        std::fs::write(path.join("marker"), name).expect("a file");
        let value = place.path().join(value).display().to_string();
        let output = Sandbox::new().option("--workspace").option(value).shell("cat marker; echo x > written");
        assert!(text(&output.stdout) == name, "SU-03: {name}: {output:?}");
        assert_eq!(path.join("written").exists(), writable, "SU-03: {name}: {output:?}");
    }
}

/// SU-03. Method: workspaces that name nothing, no directory, or what is too long. Oracle: exit status 125 and one
/// line that says so.
#[test]
fn su_03_workspaces_that_name_nothing_are_refused() {
    let place = folder("su-03-");
    std::fs::write(place.path().join("file"), "").expect("a file");
    let long = format!("/{}", "a/".repeat(2048));
    let file = place.path().join("file").display().to_string();
    let missing = place.path().join("missing").display().to_string();
    for value in ["", ":ro", ":rw", &*long, &*file, &*missing, "~", "~/x", "~root"] {
        let output = Sandbox::new().option("--workspace").option(value).shell("echo ran");
        assert_eq!(output.status.code(), Some(125), "SU-03: workspace {value:.20}: {output:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "SU-03: workspace {value:.20}: {output:?}");
    }
}

/// SU-03 (CVE-2024-32462). Method: programs and arguments that look like our options. Oracle: they reach the program
/// as they are, or are looked for as a program; none of them widens the policy.
#[test]
fn su_03_commands_are_never_read_as_options() {
    let sandbox = Sandbox::new();
    for name in ["--policy=/dev/null", "--workspace=/", "--help", "-h", "--version", "-c", "--", "", ".", "..", "//", "/", "~"] {
        let output = sandbox.command().arg(name).output().expect("broker runs");
        assert!(matches!(output.status.code(), Some(126 | 127)), "SU-03: command {name:?}: {output:?}");
        assert!(output.stdout.is_empty(), "SU-03: command {name:?} was understood: {output:?}");
    }
    let odd: Vec<&OsStr> = [&b"--workspace=/"[..], b"", b"a\nb", b"\xff\xfe", b"--", b"$(id)", b"-"].map(OsStr::from_bytes).into();
    let output = sandbox.command().args(["printf", "%s|"]).args(&odd).output().expect("broker runs");
    let mut expected = odd.join(OsStr::new("|")).into_encoded_bytes();
    expected.push(b'|');
    assert_eq!(output.stdout, expected, "SU-03: arguments change on their way: {output:?}");
    // One argument longer than the kernel takes is an error, and nothing else.
    let output = sandbox.command().arg("a".repeat(4097)).output().expect("broker runs");
    assert!(matches!(output.status.code(), Some(125..=127)), "SU-03: a long name: {:?}", output.status);
}

/// SU-03. Method: paths in a policy that climb, repeat or hide. Oracle: a canary that only a wider reading shows.
#[test]
fn su_03_policy_paths_do_not_widen() {
    let (place, token) = (folder("su-03-"), canary());
    std::fs::create_dir_all(place.path().join("shown/below")).expect("directories");
    std::fs::write(place.path().join("secret"), &token).expect("a file");
    let shown = place.path().join("shown").display().to_string();
    let secret = place.path().join("secret").display().to_string();
    let attempts = [
        String::new(), ".".into(), "..".into(), "~root".into(), "shown".into(), "../../..".into(), "//".into(), "a\\u0000b".into(),
        format!("{shown}/../secret"), format!("{shown}/below/../../secret"), format!("{shown}\\u0000/x"),
        format!("/{}", "a/".repeat(2048)), "*".into(), format!("{shown}/../*"),
    ];
    let control = run_policy(place.path(), &format!("[files]\nread = [\"{secret}\"]\n"), &secret);
    assert_eq!(text(&control.stdout), token, "SU-03: a policy that names the file shows it: {control:?}");
    for path in attempts {
        let output = run_policy(place.path(), &format!("[files]\nread = [\"{path}\"]\n"), &secret);
        assert!(!text(&output.stdout).contains(&token), "SU-03: {path:.60} shows the secret");
    }
    // A newline in a name is that name.
    let odd = place.path().join("odd\nname");
    std::fs::write(&odd, &token).expect("a file");
    let path = odd.display().to_string();
    let output = run_policy(place.path(), &format!("[files]\nread = [\"{}\"]\n", path.replace('\n', "\\n")), &path);
    assert!(text(&output.stdout) == token || output.status.code() == Some(125), "SU-03: {output:?}");
}

fn run_policy(place: &Path, policy: &str, file: &str) -> Output {
    let path = place.join("policy.toml");
    std::fs::write(&path, format!("extends = \"default\"\n{policy}")).expect("the policy is written");
    bare(&path).args(["--", "cat", file]).current_dir(place).output().expect("broker runs")
}

/// SU-04. Method: policies with empty lists. Oracle: the program that runs, and what it is shown.
#[test]
fn su_04_empty_means_nothing() {
    let (place, token) = (folder("su-04-"), canary());
    let path = place.path().join("policy.toml");
    let run = |policy: &str| {
        std::fs::write(&path, policy).expect("the policy is written");
        let mut command = bare(&path);
        command.args(["--", "sh", "-c", "echo ran; env; ls /"]).env("SU_04", &token).output().expect("broker runs")
    };
    let control = run("extends = \"default\"\n[env]\npass = [\"SU_04\"]\n");
    assert!(text(&control.stdout).contains(&token) && control.status.success(), "SU-04: the control runs: {control:?}");
    for policy in ["", "[files]\nread = []\n", "[files]\n", "[env]\npass = []\n", "description = \"nothing\"\n"] {
        let output = run(policy);
        assert!(matches!(output.status.code(), Some(125..=127)), "SU-04: {policy:?} let a program be seen: {output:?}");
        assert!(output.stdout.is_empty(), "SU-04: {policy:?}: {output:?}");
    }
    for policy in ["[env]\npass = []\n", "[files]\nread = []\n", "[workspace]\nprotect = []\n", "[limits]\n"] {
        let output = run(&format!("extends = \"default\"\n{policy}"));
        assert!(output.status.success(), "SU-04: {policy:?}: {output:?}");
        assert!(!text(&output.stdout).contains(&token), "SU-04: {policy:?} passes the environment");
    }
    // Nor does an empty list take protection away.
    let workspace = folder("su-04-");
    let sandbox = Sandbox::with("[workspace]\nprotect = []\nhold = {}\n");
    let sandbox = sandbox.option("--workspace").option(workspace.path().display().to_string());
    sandbox.shell("mkdir -p .git/hooks; echo attack > .git/hooks/pre-commit; echo attack > .envrc");
    assert!(!workspace.path().join(".git/hooks/pre-commit").exists(), "SU-04: an empty list unprotects hooks");
    assert!(!workspace.path().join(".envrc").exists(), "SU-04: an empty list unprotects .envrc");
}

/// SU-04. Method: policies that are wrong: unknown and duplicate keys, wrong types, null, no TOML. Oracle: status 125, a line
/// about it, and no sign of the program.
#[test]
fn su_04_wrong_policies_are_errors() {
    let place = folder("su-04-");
    let path = place.path().join("policy.toml");
    let run = |policy: &[u8]| {
        std::fs::write(&path, [b"extends = \"default\"\n", policy].concat()).expect("the policy is written");
        bare(&path).args(["--", "echo", "ran"]).output().expect("broker runs")
    };
    assert_eq!(text(&run(b"").stdout), "ran\n", "SU-04: the control runs");
    let wrong: [&[u8]; 26] = [
        b"unknown = 1\n", b"[files]\nreads = []\n", b"[file]\nread = []\n", b"[files]\nread = [\"/usr\"]\nread = [\"/\"]\n",
        b"[files]\n[files]\n", b"[files]\nread = [\"/srv\", \"/srv\"]\n", b"[files]\nread = \"/usr\"\n", b"[files]\nread = [1]\n",
        b"[files]\nread = null\n", b"files = []\n", b"[files]\ntmp = -1\n", b"[files]\ntmp = \"1XB\"\n", b"[files]\ninodes = \"x\"\n",
        b"[limits]\nmemory = \"0\"\n", b"[limits]\npids = 0\n", b"[limits]\npids = -1\n", b"[limits]\ncpus = nan\n",
        b"[limits]\ncpus = inf\n", b"[limits]\nmemory = \"99999999999999999999GiB\"\n", b"[limits]\ntimeout = \"\"\n",
        b"[landlock]\nfloor = 99\n", b"[syscalls]\nunix_sockets = \"yes\"\n", b"[env]\npass = [\"A=B\"]\n", b"[env]\nset = { \"A=B\" = \"\" }\n",
        b"allow_gaps = [\"everything\"]\n", b"\xff\xfe",
    ];
    for policy in wrong {
        let output = run(policy);
        assert_eq!(output.status.code(), Some(125), "SU-04: {:?}: {output:?}", text(policy));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "SU-04: {:?}: {output:?}", text(policy));
    }
    let mut command = bare(Path::new("/nonexistent/policy.toml"));
    let output = command.args(["--", "echo", "ran"]).output().expect("broker runs");
    assert_eq!(output.status.code(), Some(125), "SU-04: a policy that is not there: {output:?}");
}

const HOSTILE: [&str; 24] = [
    "LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH", "GLIBC_TUNABLES", "BASH_ENV", "ENV", "PYTHONPATH", "PERL5OPT", "NODE_OPTIONS",
    "GIT_SSH_COMMAND", "GIT_CONFIG_GLOBAL", "GITHUB_TOKEN", "SOME_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR", "KRB5CCNAME", "LISTEN_FDS", "NOTIFY_SOCKET", "TMPDIR",
    "RUST_LOG", "IFS",
];

/// SU-07 (CVE-2025-23266). Method: the caller's environment is full of names that programs obey or that hold secrets.
/// Oracle: each name, and every environment that can be read inside, is searched for this run's token; a helper
/// that obeyed `LD_PRELOAD` would complain about the token on standard error, as the control's shell does.
#[test]
fn su_07_the_callers_environment_stays_outside() {
    let (token, sandbox) = (canary(), Sandbox::new());
    // Under a folder that is not there: whatever reads it fails, and says so.
    let value = format!("/nonexistent/{token}.so");
    let mut arguments = vec![token.clone()];
    arguments.extend(HOSTILE.map(String::from));
    let run = |command: &mut Command| {
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", "/root").envs(HOSTILE.map(|name| (name, &value)));
        command.arg(sandbox.probe_path()).arg("SU-07").args(&arguments).stdin(Stdio::null()).output().expect("it runs")
    };
    let control = run(Command::new("env").arg("--"));
    assert!(text(&control.stderr).contains(&token), "SU-07: the control's helper obeys LD_PRELOAD: {control:?}");
    let inside = run(&mut sandbox.command());
    assert!(!text(&inside.stderr).contains(&token), "SU-07: something obeyed the environment: {}", text(&inside.stderr));
    let cases = |output: &Output| broker_tests::cases_in(&text(&output.stdout));
    assert!(!cases(&inside).is_empty(), "SU-07: {inside:?}");
    assert_refused("SU-07", &cases(&control), &cases(&inside), &[]);

    // What is named is passed, with the value named or the caller's, and nothing beside it.
    let mut named = Sandbox::new().option("--env").option("GIVEN=value").option("--env").option("SOME_TOKEN").command();
    named.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", "/root").env("SOME_TOKEN", &token).env("OTHER_TOKEN", &token);
    let output = named.args(["env"]).output().expect("broker runs");
    let lines = text(&output.stdout);
    assert!(lines.contains("GIVEN=value\n") && lines.contains(&format!("SOME_TOKEN={token}\n")), "SU-07: {output:?}");
    let names: Vec<&str> = lines.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    let known = ["GIVEN", "SOME_TOKEN", "PATH", "HOME", "USER", "LOGNAME", "LANG", "SHELL", "TMPDIR", "TERM", "PWD"];
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
