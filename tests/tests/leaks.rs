//! Many runs, and runs that are killed, leave nothing on the host.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use broker_tests::{leftovers, network_namespaces, program, settle};

/// 2,000 in `scripts/test`; `scripts/soak` asks for 100,000.
fn runs() -> usize {
    std::env::var("BROKER_LEAK_RUNS").ok().and_then(|count| count.parse().ok()).unwrap_or(2_000)
}

fn broker() -> Command {
    let mut command = Command::new(program("broker"));
    command.args(["exec", "--embedded"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Method: runs by two workers, half of them with a workspace, a tenth with a time-out. Oracle: mounts, control groups,
/// processes, the shared directory and the kernel's count of network namespaces before and after.
///
/// The three claims are one test, since each looks at the whole host.
#[test]
fn runs_leave_nothing_whether_they_end_or_are_killed() {
    let before = leftovers();
    assert!(broker().args(["--", "true"]).status().expect("it runs").success(), "the control itself works");
    // What exists only since the first run ever on this host, and stays: the lock files.
    settle(|| leftovers() == before, || format!("one run left {}", leftovers().beyond(&before)));
    let namespaces = network_namespaces();
    // Runs that other tests have killed may have left some.
    let noted_before = noted();
    many_runs(runs());
    settle(|| leftovers() == before, || format!("{} runs left {}", runs(), leftovers().beyond(&before)));
    assert_eq!(noted(), noted_before, "runs that end leave no note of a placeholder");
    killed_runs();
    settle(|| leftovers() == before, || format!("killed runs left {}", leftovers().beyond(&before)));
    // They are taken down by a worker of the kernel, in its own time.
    let slack = 40;
    settle(
        || network_namespaces() <= namespaces + slack,
        || format!("{namespaces} network namespaces before, {} after", network_namespaces()),
    );
}

/// Placeholders that the shared directory knows.
fn noted() -> usize {
    let notes = fs::read_dir("/run/broker/holds").into_iter().flatten().flatten();
    notes.filter(|note| note.file_name() != "turn").count()
}

fn many_runs(count: usize) {
    thread::scope(|scope| {
        for worker in 0..2 {
            scope.spawn(move || {
                let workspace = tempfile::tempdir().expect("a workspace");
                for run in 0..count / 2 {
                    let mut command = broker();
                    if run % 2 == 0 {
                        command.arg("--workspace").arg(workspace.path());
                    }
                    let expected = if run % 10 == 9 {
                        command.args(["--timeout", "1ms", "--", "sleep", "5"]);
                        124
                    } else {
                        command.args(["--", "sh", "-c", "sleep 9 & exit 3"]);
                        3
                    };
                    let status = command.status().expect("it runs");
                    assert_eq!(status.code(), Some(expected), "worker {worker}, run {run}");
                }
                let left = fs::read_dir(workspace.path()).expect("the workspace is there").flatten().count();
                assert_eq!(left, 0, "the workspace is as empty as before");
            });
        }
    });
}

/// Killed after 0 to 30 ms: before, during and after the set-up. The next run on the slot takes away what the killed one
/// could not: control group and placeholders.
fn killed_runs() {
    let workspace = tempfile::tempdir().expect("a workspace");
    for delay_tenths_ms in 0..300 {
        let mut command = broker();
        command.arg("--workspace").arg(workspace.path()).args(["--", "sleep", "60"]);
        let mut child = command.spawn().expect("it starts");
        thread::sleep(Duration::from_micros(delay_tenths_ms * 100));
        child.kill().expect("it is killed");
        child.wait().expect("it is reaped");
    }
    // The trees die with their launchers, and only then are the slots free.
    settle(|| leftovers().has_no_process(), || format!("still there: {:?}", leftovers()));
    let mut command = broker();
    command.arg("--workspace").arg(workspace.path()).args(["--", "true"]);
    assert!(command.status().expect("it runs").success(), "the slot of a killed run works");
    let left = fs::read_dir(workspace.path()).expect("the workspace is there").flatten().count();
    assert_eq!(left, 0, "placeholders of killed runs stay");
}
