//! The end of a sandbox: nobody outside is hit, the status is exact, and nothing stays.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use broker_tests::{
    OWN_PIDS, Running, Sandbox, assert_refused_with, below, canary, carriers, cases, eventually,
};

use crate::{NONE, Victim, sandbox};

/// SIGKILL to everyone. Oracles: a process of the host and a second sandbox, both alive afterwards; the control kills
/// a bystander in its own pid namespace.
#[test]
fn pr_05_killing_everyone_ends_nobody_outside() {
    let sandbox = sandbox();
    // SIGTERM comes first.
    let script = "sleep 20 & victim=$!; \"$0\" PR-05 >&2; wait $victim; echo $?";
    let mut control = Command::new("sh");
    control.args(["-c", script]).arg(sandbox.probe_path());
    let control = below(&OWN_PIDS[..5], &control).output().expect("unshare runs");
    assert_eq!(
        String::from_utf8_lossy(&control.stdout),
        "143\n",
        "the control's bystander lives: {control:?}"
    );

    let mut victim = Victim::new("bystander");
    let neighbour =
        Running::start(sandbox.command().args(["sh", "-c", "echo ready; cat >/dev/null; exit 5"]));
    let inside = sandbox.probe("PR-05", NONE);
    assert!(inside.iter().all(|case| case.outcome == "open"), "nothing was sent: {inside:?}");
    assert_eq!(victim.killer(), None, "the host's process was killed");
    assert_eq!(neighbour.finish().code(), Some(5), "the neighbour was hit");
}

/// The same lines run in a plain shell and in a sandbox; both have to come to the same end, as a shell tells it, and
/// the report has to agree.
/// Signals to init are among them: they must change nothing.
#[test]
fn pr_05_the_status_of_the_command_comes_back_exactly() {
    let folder = tempfile::tempdir().expect("a folder for the report");
    let report = folder.path().join("report");
    let sandbox = sandbox().option("--report").option(report.display().to_string());
    for script in [
        "exit 0",
        "exit 1",
        "exit 124",
        "exit 255",
        "kill -TERM $$",
        "kill -SEGV $$",
        "kill -KILL $$",
        "kill -USR1 $$",
        "sh -c 'kill -KILL $$'; exit 3",
        "(sleep 0.05; exit 9) & exit 4",
        "sh -c 'exit 200' & wait; exit 6",
    ] {
        let host = Command::new("sh").args(["-c", script]).status().expect("sh runs");
        let wanted = host.code().or(host.signal().map(|signal| 128 + signal));
        assert_eq!(sandbox.shell(script).status.code(), wanted, "{script}");
        let text = std::fs::read_to_string(&report).expect("a report");
        let outcome = serde_json::from_str::<serde_json::Value>(&text).expect("JSON")["outcome"].take();
        let told = match (host.code(), host.signal()) {
            (Some(code), _) => serde_json::json!({"kind": "exited", "code": code}),
            (_, signal) => serde_json::json!({"kind": "signaled", "signal": signal}),
        };
        assert_eq!(outcome, told, "{script}: the report says something else");
    }
    for (script, wanted) in [
        ("kill -TERM 1; kill -KILL 1; kill -INT 1; exit 9", 9),
        // A grandchild kills the command, and everybody but itself and init.
        ("(kill -KILL -1; sleep 30) & sleep 20; exit 2", 137),
    ] {
        let started = Instant::now();
        let ended = sandbox.shell(script);
        assert_eq!(ended.status.code(), Some(wanted), "{script}: {ended:?}");
        assert!(started.elapsed() < Duration::from_secs(10), "{script}: the end was not noticed");
    }
}

/// Daemons that ignore every polite signal, one of which holds the standard output, and 50 stopped grandchildren, all
/// with a token in their command lines. Oracle: the host's `/proc`; the control leaves them all running.
#[test]
fn pr_10_nothing_outlives_the_command() {
    let sandbox = sandbox();
    let token = canary();
    let log = tempfile::tempfile().expect("a file");
    // Into a file: they hold it open, and a pipe would not end before they do.
    let mut control = Command::new(sandbox.probe_path());
    control.args(["PR-10", "50", &token]).stdout(log).stdin(Stdio::null());
    assert!(control.status().expect("the probe runs").success());
    let left = carriers(&token);
    for pid in &left {
        Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill runs");
    }
    assert_eq!(left.len(), 52, "the control left none to look for");
    assert!(eventually(5000, || carriers(&token).is_empty()), "the control's processes stay");

    let token = canary();
    let started = Instant::now();
    let inside = sandbox.probe("PR-10", &["50", &token]);
    assert!(inside[0].outcome == "open", "they were not started: {inside:?}");
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "held up for {:?} by those left behind",
        started.elapsed()
    );
    let gone = eventually(1000, || carriers(&token).is_empty());
    assert!(gone, "still there one second later: {:?}", carriers(&token));
}

/// The broker itself is killed, which leaves nobody to clean up. Oracle: the host's `/proc`, one second later.
#[test]
fn pr_10_nothing_outlives_the_broker() {
    let sandbox = sandbox();
    let script = "trap '' TERM HUP INT; setsid sleep 50 & echo ready; sleep 51";
    let mut running = Running::start(sandbox.command().args(["sh", "-c", script]));
    assert!(eventually(5000, || running.confined().len() >= 4), "init, sh or a sleep is missing");
    let inside = running.confined();
    running.child.kill().expect("it is our child");
    // A zombie has no command line: only PID 1 can do something about it.
    let alive = |pid: &u32| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
    assert!(eventually(1000, || !inside.iter().any(alive)), "still there one second later: {inside:?}");
}

/// 10,000 processes become init's under a limit of 128, so that one init that does not wait for them stops all
/// forking. The control has such an init: the probe itself.
#[test]
fn pr_11_init_reaps_what_it_inherits() {
    let sandbox = Sandbox::new().option("--timeout").option("60s").option("--pids").option("128");
    let no_shell = &OWN_PIDS[..5];
    let control = cases(&mut below(no_shell, Command::new(sandbox.probe_path()).args(["PR-11", "200"])));
    let inside = sandbox.probe("PR-11", &["10000"]);
    assert_refused_with("PR-11", &control, &inside, NONE, |_| &[0]);
}
