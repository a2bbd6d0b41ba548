//! What `broker exec` promises to the scripts around it (INTERFACES): exit statuses, the report, the environment,
//! time limits, streams and signals.
//!
//! Method: the built program runs as a script would run it. Oracles: the status that the kernel gives to the caller,
//! `stat` of the same stream on both sides, `/proc` of the host, and the bytes themselves.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use broker_tests::{Running, alive, canary, field, program, report, within};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine; only what hangs gets there.
const HANG: Duration = Duration::from_secs(60);

fn exec(options: &[&str]) -> Command {
    let mut command = Command::new(program("broker"));
    command.args(["exec", "--embedded"]).args(options).arg("--").stdin(Stdio::null());
    command
}

/// A shell line with `options`.
fn line(options: &[&str], script: &str) -> Command {
    let mut command = exec(options);
    command.args(["sh", "-c", script]);
    command
}

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("broker-exec-").tempdir().expect("a temporary directory")
}

/// A policy file: `default` and `extra`.
fn policy(folder: &TempDir, extra: &str) -> String {
    let path = folder.path().join("policy.toml");
    fs::write(&path, format!("extends = \"default\"\n{extra}\n")).expect("the policy is written");
    text_of(&path)
}

fn text_of(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Waits for the end of `child`, which must come, and reads what is left in its pipes.
fn ended(mut child: Child) -> Output {
    let over = within(HANG, || child.try_wait().is_ok_and(|status| status.is_some()));
    if !over {
        child.kill().ok();
    }
    assert!(over, "it hangs");
    child.wait_with_output().expect("its output")
}

fn piped(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("broker starts")
}

/// Runs with a report; the status and the report.
fn reported(folder: &TempDir, options: &[&str], command: &[&str]) -> (Option<i32>, Value) {
    let file = folder.path().join("report.json");
    let path = text_of(&file);
    let output = ended(piped(exec(&[options, &["--report", &path]].concat()).args(command)));
    (output.status.code(), report(&file))
}

#[test]
fn the_status_is_the_commands_own() {
    let folder = folder();
    for code in [0, 1, 2, 77, 124, 125, 126, 127, 128, 137, 255] {
        let (status, report) = reported(&folder, &[], &["sh", "-c", &format!("exit {code}")]);
        assert_eq!(status, Some(code));
        assert_eq!(report["outcome"], json!({ "kind": "exited", "code": code }));
    }
}

#[test]
fn the_status_is_128_and_the_signal_that_ended_the_command() {
    let folder = folder();
    for signal in
        [Signal::SIGHUP, Signal::SIGINT, Signal::SIGABRT, Signal::SIGKILL, Signal::SIGSEGV, Signal::SIGTERM]
    {
        let number = signal as i32;
        let (status, report) = reported(&folder, &[], &["sh", "-c", &format!("kill -{number} $$")]);
        assert_eq!(status, Some(128 + number), "{signal}");
        assert_eq!(report["outcome"], json!({ "kind": "signaled", "signal": number }));
    }
}

/// `timeout(1)` gives 124 as well, also for a command that ends with 0 when it is asked to.
#[test]
fn the_status_is_124_at_the_time_limit_whatever_the_command_makes_of_sigterm() {
    let folder = folder();
    let policy = policy(&folder, "[limits]\ngrace = \"300ms\"");
    let workspace = text_of(folder.path());
    for reaction in ["trap 'touch /workspace/asked; exit 0' TERM", "trap '' TERM", "trap - TERM"] {
        let token = canary();
        let script = format!("{reaction}; : {token}; while :; do sleep 0.05; done");
        let (status, report) = reported(
            &folder,
            &["--policy", &policy, "--workspace", &workspace, "--timeout", "1s"],
            &["sh", "-c", &script],
        );
        assert_eq!(status, Some(124), "{reaction}");
        assert_eq!(report["outcome"], json!({ "kind": "timed_out" }), "{reaction}");
        assert!(alive(&token).is_empty(), "{reaction}: something lives on");
    }
    assert!(folder.path().join("asked").exists(), "no SIGTERM came first");
}

#[test]
fn a_time_limit_takes_every_form_of_the_manual_and_no_other() {
    for good in ["9999ms", "30s", "5m", "10m"] {
        let status = exec(&["--timeout", good]).arg("true").status().expect("broker runs");
        assert_eq!(status.code(), Some(0), "{good}");
    }
    for bad in ["0", "0s", "5", "-1s", "1.5s", "abc", "", "5 m", "99999999999999999999s", "1d"] {
        assert_refused(&[&format!("--timeout={bad}")], &["--timeout", "`30s`"]);
    }
}

/// 125, nothing on standard output, the command not run, and one error that has every word of `said`.
fn assert_refused(options: &[&str], said: &[&str]) {
    let workspace = folder();
    let mut command = Command::new(program("broker"));
    command.arg("exec").args(options).args(["--", "sh", "-c", "echo ran; touch /workspace/ran"]);
    let output = command.current_dir(workspace.path()).stdin(Stdio::null()).output().expect("broker runs");
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{options:?}: {error}");
    assert!(output.stdout.is_empty(), "{options:?}: it ran");
    assert!(
        error.starts_with("broker: ") && error.lines().count() == 1,
        "{options:?}: not one line: {error}"
    );
    for word in said {
        assert!(error.contains(word), "{options:?}: no {word:?} in {error}");
    }
}

#[test]
fn the_status_is_125_where_the_broker_cannot_do_what_was_asked_and_the_error_says_what_and_how_to_mend_it() {
    let folder = folder();
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).expect("a policy file");
        text_of(&path)
    };
    let unknown = file("unknown.toml", "extends = \"default\"\nfoo = 1\n");
    let word = file("word.toml", "extends = \"default\"\n[limits]\nmemory = \"4 apples\"\n");
    let base = file("base.toml", "extends = \"nowhere\"\n");
    let absent = text_of(&folder.path().join("absent"));
    let cases: [(&[&str], &[&str]); 16] = [
        (&["--policy", "nope"], &["nope", "known: build, default"]),
        (&["--policy", &unknown], &["unknown.toml", "line 2", "`foo`", "expected one of"]),
        (&["--policy", &word], &["word.toml", "line 3", "4 apples", "`64MiB`"]),
        (&["--policy", &base], &["nowhere", "known: build, default"]),
        (&["--policy", "./absent.toml"], &["./absent.toml", "No such file"]),
        (&["--grant", "nope"], &["--grant"]),
        (&["--memory", "1TiB"], &["memory 1TiB", "2GiB", "another policy"]),
        (&["--pids", "99999"], &["pids 99999", "512", "another policy"]),
        (&["--cpus", "99"], &["cpus 99", "policy's 2", "another policy"]),
        (&["--timeout", "100h"], &["timeout 100h", "10m", "another policy"]),
        (&["--memory", "lots"], &["--memory", "lots", "`64MiB`"]),
        (&["--workspace", &absent], &["workspace", &absent, "No such file"]),
        (&["--workspace", ".:cow"], &["--workspace", "`cow`", "use `ro` or `rw`"]),
        (&["--env", "BROKER_TEST_ABSENT"], &["--env BROKER_TEST_ABSENT", "not set", "=VALUE"]),
        (&["--env", "1=2"], &["--env", "`1`"]),
        (&["--bogus"], &["--bogus", "--help"]),
    ];
    for (options, said) in cases {
        assert_refused(options, said);
    }
    let nothing = Command::new(program("broker")).arg("exec").output().expect("broker runs");
    assert_eq!(nothing.status.code(), Some(125));
    assert!(text(&nothing.stderr).contains("<COMMAND>"), "{}", text(&nothing.stderr));
    let stray = Command::new(program("broker")).args(["exec", "true"]).output().expect("broker runs");
    assert_eq!(stray.status.code(), Some(125));
    assert!(text(&stray.stderr).contains("comes after `--`"), "{}", text(&stray.stderr));
}

#[test]
fn a_set_up_that_fails_is_reported_and_so_is_a_report_that_cannot_be_written() {
    let folder = folder();
    let absent = text_of(&folder.path().join("absent"));
    let (status, report) = reported(&folder, &["--workspace", &absent], &["true"]);
    assert_eq!(status, Some(125));
    let outcome = &report["outcome"];
    assert_eq!(outcome["kind"], "setup_failed");
    assert_eq!((&outcome["object"], &outcome["errno"]), (&json!(absent), &json!(libc::ENOENT)), "{outcome}");
    assert!(outcome["step"].as_str().is_some_and(|step| !step.is_empty()), "{outcome}");
    let output =
        exec(&["--report", &format!("{absent}/report.json")]).arg("true").output().expect("broker runs");
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains(&absent), "{}", text(&output.stderr));
}

#[test]
fn the_status_is_126_for_what_cannot_be_executed_and_127_for_what_is_not_found() {
    let folder = folder();
    fs::write(folder.path().join("plain"), "#!/bin/sh\n").expect("a file without the x bit");
    let workspace = text_of(folder.path());
    for (command, code, kind) in [
        ("/workspace/plain", 126, "not_executable"),
        ("/tmp", 126, "not_executable"),
        ("/workspace/absent", 127, "not_found"),
        ("no-such-command", 127, "not_found"),
        ("/etc/shadow", 127, "not_found"),
    ] {
        let (status, report) = reported(&folder, &["--workspace", &workspace], &[command]);
        assert_eq!((status, &report["outcome"]["kind"]), (Some(code), &json!(kind)), "{command}");
        let output = exec(&["--workspace", &workspace]).arg(command).output().expect("broker runs");
        assert_eq!(text(&output.stderr).lines().count(), 1, "{command}: {}", text(&output.stderr));
    }
}

/// The control: the same command with the memory that it wants ends by itself.
#[test]
fn the_status_is_137_for_want_of_memory_and_the_report_says_oom() {
    let folder = folder();
    let command = ["sh", "-c", "head -c 200000000 /dev/zero | tail | wc -c; kill -9 $$"];
    let (status, report) = reported(&folder, &["--memory", "1GiB"], &command);
    assert_eq!(
        (status, &report["outcome"]["kind"]),
        (Some(137), &json!("signaled")),
        "killed, and not for memory"
    );
    assert_eq!(report["denials"]["oom_kills"], 0);
    let (status, report) = reported(&folder, &["--memory", "64MiB"], &["tail", "/dev/zero"]);
    assert_eq!((status, &report["outcome"]), (Some(137), &json!({ "kind": "oom" })));
    assert!(report["denials"]["oom_kills"].as_u64() > Some(0), "{report}");
    assert_eq!(report["enforcement"]["cgroup"]["memory_bytes_max"], 64 << 20);
}

/// Oracle: `/proc/PID` of the processes inside, as the host sees them while they run.
#[test]
fn the_report_tells_what_the_host_sees() {
    let folder = folder();
    let file = folder.path().join("report.json");
    let script = "echo READY; read end; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exit 9";
    let running = Running::start(&mut line(
        &["--report", &text_of(&file), "--pids", "20", "--memory", "99MiB"],
        script,
    ));
    let statuses = running.statuses();
    let uids: Vec<&str> =
        statuses.iter().map(|(_, status)| field(status, "Uid").split('\t').next().unwrap_or("")).collect();
    assert!(statuses.len() >= 2, "init and the command: {statuses:?}");
    assert!(statuses.iter().all(|(_, status)| field(status, "Seccomp") == "2"), "{statuses:?}");
    assert_eq!(running.finish().code(), Some(9));
    let report = report(&file);
    for (name, kind) in
        [("outcome", "kind"), ("enforcement", "host_uid"), ("usage", "wall_ms"), ("denials", "pids")]
    {
        assert!(!report[name][kind].is_null(), "no {name}.{kind} in {report}");
    }
    assert_eq!(report["outcome"], json!({ "kind": "exited", "code": 9 }));
    let uid = report["enforcement"]["host_uid"].to_string();
    assert!(uids.iter().all(|seen| *seen == uid), "{uids:?}, and the report says {uid}");
    assert_eq!(report["gaps"], json!([]));
    assert!(report["sandbox"].as_str().is_some_and(|id| !id.is_empty()), "{report}");
    assert_eq!(report["enforcement"]["cgroup"]["memory_bytes_max"], 99 << 20);
    assert!(
        report["usage"]["cpu_ms"].as_f64() > Some(0.0) && report["usage"]["pids_peak"].as_u64() >= Some(2)
    );
    assert!(report["usage"]["memory_peak_bytes"].as_u64().is_some_and(|peak| peak < 99 << 20), "{report}");
}

#[test]
fn the_report_names_the_policy_and_the_plan_by_what_they_hold() {
    let folder = folder();
    let hashes = |options: &[&str]| {
        let (_, report) = reported(&folder, options, &["true"]);
        let hash = |value: &Value| value.as_str().expect("a hash").to_owned();
        assert_eq!(hash(&report["policy"]["sha256"]).len(), 64, "{report}");
        assert_eq!(hash(&report["plan"]).len(), 64, "{report}");
        (report["policy"]["name"].clone(), hash(&report["policy"]["sha256"]), hash(&report["plan"]))
    };
    let (first, again, python) = (hashes(&[]), hashes(&[]), hashes(&["--policy", "python"]));
    let narrower = hashes(&["--pids", "7"]);
    assert_eq!((&first.0, &python.0), (&json!("default"), &json!("python")));
    assert_eq!(first.1, again.1);
    assert!(first.1 != python.1 && first.1 == narrower.1 && first.2 != narrower.2, "{first:?} {narrower:?}");
}

#[test]
fn the_report_goes_to_standard_output_after_what_the_command_wrote() {
    let output = line(&["--report", "-"], "echo MARK; exit 4").output().expect("broker runs");
    assert_eq!(output.status.code(), Some(4));
    let out = text(&output.stdout);
    let report: Value =
        serde_json::from_str(out.strip_prefix("MARK\n").expect("the output first")).expect("JSON");
    assert_eq!(report["outcome"]["code"], 4);
}

#[test]
fn the_environment_holds_only_what_is_named() {
    let token = canary();
    let mut command = exec(&["--env", "BROKER_PASSED", "--env", "SET=two words=x", "--env", "EMPTY="]);
    command.args(["env", "-0"]).env("BROKER_PASSED", "from the caller").env("BROKER_SECRET", &token);
    command.env("LD_PRELOAD", "").env("HTTP_PROXY", &token).env("SSH_AUTH_SOCK", &token);
    let output = command.output().expect("broker runs");
    let out = text(&output.stdout);
    let mut names: Vec<&str> = out.split('\0').filter_map(|pair| Some(pair.split_once('=')?.0)).collect();
    names.sort_unstable();
    // What every program may expect to be there, about the inside, and what was named.
    assert_eq!(names, ["BROKER_PASSED", "EMPTY", "HOME", "LANG", "LOGNAME", "PATH", "SET", "USER"], "{out}");
    for pair in ["BROKER_PASSED=from the caller\0", "SET=two words=x\0", "EMPTY=\0"] {
        assert!(out.contains(pair), "no {pair:?} in {out:?}");
    }
    let mut everywhere = line(&[], "cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'");
    let output = everywhere.env("BROKER_SECRET", &token).output().expect("broker runs");
    assert!(!text(&output.stdout).contains(&token), "the caller's environment is in the memory of init");
}

/// The command says what it got, and that it was ready for it; without a handler the signal ends it.
#[test]
fn signals_to_the_broker_reach_the_command() {
    for signal in
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGQUIT]
    {
        let name = &signal.as_str()[3..];
        for (handler, code) in [(format!("trap 'exit 9' {name}"), 9), (":".to_owned(), 128 + signal as i32)] {
            let script = format!("{handler}; echo READY; while :; do sleep 0.05; done");
            let mut running = Running::start(&mut line(&[], &script));
            assert_eq!(running.first_line, "READY\n");
            let pid = nix::unistd::Pid::from_raw(running.child.id().cast_signed());
            nix::sys::signal::kill(pid, signal).expect("broker is alive");
            let over = within(HANG, || running.child.try_wait().is_ok_and(|status| status.is_some()));
            assert!(over, "{signal} did not reach {handler:?}");
            assert_eq!(running.finish().code(), Some(code), "{signal} with {handler:?}");
        }
    }
}

/// A pipe, which passes, or a file, which is relayed.
fn output_to(file: Option<&Path>) -> Stdio {
    file.map_or_else(Stdio::piped, |file| fs::File::create(file).expect("a file").into())
}

#[test]
fn a_process_that_holds_the_output_does_not_delay_the_return_and_does_not_live_on() {
    let folder = folder();
    let file = folder.path().join("output");
    for relay in [None, Some(file.as_path())] {
        let token =
            format!("3600.{}", canary().bytes().map(|byte| (b'0' + byte % 10) as char).collect::<String>());
        let mut command = line(&[], &format!("sleep {token} & setsid sleep {token} & echo done; exit 6"));
        command.stdout(output_to(relay));
        let output = ended(command.spawn().expect("broker starts"));
        assert_eq!(output.status.code(), Some(6));
        let said = relay.map_or(output.stdout, |file| fs::read(file).expect("the file"));
        assert_eq!(text(&said), "done\n");
        assert!(alive(&token).is_empty(), "it lives on");
    }
}

#[test]
fn a_caller_that_ignores_sigchld_waits_no_longer_than_any_other() {
    let folder = folder();
    // dash and POSIX let a shell keep it from the programs that it starts; env(1) does not.
    let ignoring = |command: &Command| {
        let mut env = Command::new("env");
        env.arg("--ignore-signal=CHLD")
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null());
        env
    };
    for relay in [None, Some(folder.path().join("output"))] {
        let mut command = ignoring(&line(&[], "sh -c 'exit 3'; (exit 4) & wait $!; exit $?"));
        command.stdout(output_to(relay.as_deref()));
        assert_eq!(ended(command.spawn().expect("it starts")).status.code(), Some(4), "{relay:?}");
    }
    let mut control = Command::new("grep");
    let ignored =
        text(&ignoring(control.args(["SigIgn", "/proc/self/status"])).output().expect("it runs").stdout);
    let ignored = u64::from_str_radix(field(&ignored, "SigIgn"), 16).expect("a mask");
    assert_ne!(ignored & 1 << (libc::SIGCHLD - 1), 0, "it was not ignored, so this proves nothing");
}

#[test]
fn output_over_the_cap_is_cut_and_flagged_and_below_it_is_whole() {
    let folder = folder();
    let policy = policy(&folder, "[limits]\noutput = \"1KiB\"");
    let file = folder.path().join("report.json");
    let options = ["--policy", &policy, "--report", &text_of(&file)];
    for (bytes, kept) in [(1000, 1000), (1024, 1024), (1025, 1024), (500_000, 1024)] {
        let script = format!("yes | head -c {bytes}; exit 5");
        let output = ended(piped(&mut line(&options, &script)));
        assert_eq!(output.status.code(), Some(5), "the command is not stopped by it");
        assert_eq!(output.stdout, b"y\n".repeat(512)[..kept]);
        let report = report(&file);
        assert_eq!(report["denials"]["output_bytes"], bytes - kept, "{report}");
        assert_eq!(report["usage"]["output_bytes"], kept, "{report}");
        assert_eq!(text(&output.stderr).contains("cut"), bytes > kept, "{}", text(&output.stderr));
    }
}

/// A lock or a time on the host's `/dev/null` would be seen by every other sandbox, and hold up the host's own locks.
#[test]
fn a_null_stream_is_the_sandbox_s_own() {
    use std::os::unix::fs::MetadataExt;
    let host = || fs::metadata("/dev/null").expect("it is there");
    let before = (host().ino(), host().mtime(), host().mtime_nsec());
    let mut command = exec(&[]);
    command
        .args(["python3", "-c", NULL_STREAM])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let output = command.output().expect("broker runs");
    let inside: u64 = text(&output.stdout).trim().parse().expect("an inode's number");
    assert_ne!(inside, before.0);
    assert_eq!((host().ino(), host().mtime(), host().mtime_nsec()), before, "the host's was touched");
}

const NULL_STREAM: &str = "
import fcntl, os
fcntl.flock(0, fcntl.LOCK_EX)
try: os.utime(0)
except OSError: pass
print(os.fstat(0).st_ino)
";
