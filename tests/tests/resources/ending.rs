//! Output, deadlines, crashes and logs.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use broker_tests::{Sandbox, alive, assert_refused, canary, until_ready, within};

use super::{folder, outcome, reporting, run, text};

fn limited_output(size: &str) -> Sandbox {
    Sandbox::with(&format!("[limits]\noutput = \"{size}\"\n"))
}

/// RS-07. Method: 32 MiB on each of standard output and standard error, in turns and without a newline, at a
/// limit of 1 MiB. Oracle: how much comes out, that it ends, and that the report says so.
#[test]
fn rs_07_output_is_cut_at_the_limit_and_flagged() {
    let place = folder("rs-07-");
    let path = place.path().join("report");
    let sandbox = reporting(limited_output("1MiB"), &path);
    let control = run(Command::new(sandbox.probe_path()).args(["RS-07", "both", "32"]));
    assert_eq!(
        (control.stdout.len(), control.stderr.len()),
        (32 << 20, 32 << 20),
        "RS-07: the control writes all"
    );

    let output = run(sandbox.command().arg(sandbox.probe_path()).args(["RS-07", "both", "32"]));
    let total = output.stdout.len() + output.stderr.len();
    // A line of the broker's own about it is allowed.
    assert!((512 << 10..(1 << 20) + 4096).contains(&total), "RS-07: {total} bytes");
    let report = broker_tests::report(&path);
    let lost = report["denials"]["output_bytes"].as_u64().unwrap_or(0);
    assert!(lost > 62 << 20, "RS-07: the report owns up to {lost} bytes: {report}");
}

/// RS-07. Method: a harness that reads nothing for a while, then slowly; the broker's memory is looked at
/// meanwhile. Oracle: VmHWM of the broker's processes, by the kernel.
#[test]
fn rs_07_a_slow_reader_costs_no_memory() {
    let sandbox = limited_output("64MiB");
    let mut command = sandbox.command();
    command
        .arg(sandbox.probe_path())
        .args(["RS-07", "both", "16"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut child = command.spawn().expect("broker runs");
    std::thread::sleep(Duration::from_millis(700));
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it still runs");
    let peak: u64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok())
        .expect("VmHWM");
    assert!(peak < 16 << 10, "RS-07: the broker holds {peak} KiB for a reader that does not read");
    let mut bytes = Vec::new();
    child.stdout.take().expect("a pipe").read_to_end(&mut bytes).expect("it can be read");
    assert!(child.wait().expect("it ends").success());
    assert_eq!(bytes.len(), 16 << 20, "RS-07: what was below the limit came through");
}

/// RS-07. Method: the harness closes both streams at once. Oracle: broker ends long before its deadline.
#[test]
fn rs_07_closed_streams_do_not_hang_the_broker() {
    for sandbox in [Sandbox::new(), limited_output("1MiB")] {
        let start = Instant::now();
        let mut command = sandbox.command();
        command
            .arg(sandbox.probe_path())
            .args(["RS-07", "both", "64"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("broker runs");
        drop((child.stdout.take(), child.stderr.take()));
        let mut ended = None;
        within(Duration::from_secs(20), || {
            ended = child.try_wait().expect("waited");
            ended.is_some()
        });
        child.kill().ok();
        child.wait().ok();
        let status = ended.unwrap_or_else(|| panic!("RS-07: still there after {:?}", start.elapsed()));
        assert_ne!(status.code(), Some(125), "RS-07: it did run");
    }
}

/// RS-07. Method: a child that no signal of a terminal reaches goes on writing when the program has ended.
/// Oracle: the harness reads to the end at once, and nothing late comes.
#[test]
fn rs_07_output_ends_with_the_program() {
    for sandbox in [Sandbox::new(), limited_output("1MiB")] {
        let start = Instant::now();
        let output = run(sandbox.command().arg(sandbox.probe_path()).args(["RS-07", "after"]));
        assert!(start.elapsed() < Duration::from_secs(5), "RS-07: the end took {:?}", start.elapsed());
        assert!(output.status.success() && text(&output.stdout).contains("main\n"), "RS-07: {output:?}");
        assert!(output.stdout.len() < 2000, "RS-07: {} bytes of late output", output.stdout.len());
    }
}

/// RS-08. Method: six ways to be still there: every signal ignored, all stopped, a parent that waits in
/// vfork, processes that are never the same, a FIFO and a lock that nobody gives up; each leaves a daemon
/// behind. On the host SIGTERM to the program leaves survivors. Oracle: processes whose command line has this
/// run's token; status 124; the report.
#[test]
fn rs_08_nothing_outlives_the_deadline() {
    for kind in ["ignore", "stopped", "vfork", "fork-loop", "fifo", "flock"] {
        let (token, place) = (canary(), folder("rs-08-"));
        let path = place.path().join("report");
        let sandbox =
            reporting(Sandbox::with("[limits]\ngrace = \"300ms\"\n"), &path).option("--timeout").option("1s");
        let (mut child, _out, _) =
            until_ready(Command::new(sandbox.probe_path()).args(["RS-08", kind, &token, "slowly"]));
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
        std::thread::sleep(Duration::from_millis(100));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("kill");
        std::thread::sleep(Duration::from_millis(200));
        let survivors = alive(&token);
        let gone = within(Duration::from_secs(10), || {
            for survivor in alive(&token) {
                // Each has the token, so it is ours; it may be gone by now.
                nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(survivor),
                    nix::sys::signal::Signal::SIGKILL,
                )
                .ok();
            }
            alive(&token).is_empty()
        });
        child.wait().expect("it ends");
        std::fs::remove_file(format!("/tmp/{token}")).ok();
        assert!(!survivors.is_empty() && gone, "RS-08: {kind}: the control survives SIGTERM: {survivors:?}");

        let start = Instant::now();
        let output = run(sandbox.command().arg(sandbox.probe_path()).args(["RS-08", kind, &token]));
        let took = start.elapsed();
        assert_eq!(output.status.code(), Some(124), "RS-08: {kind}: {output:?}");
        assert!(took > Duration::from_millis(900), "RS-08: {kind}: it ended before its time, after {took:?}");
        assert!(took < Duration::from_millis(1300 + 3000), "RS-08: {kind}: it took {took:?}");
        assert!(
            within(Duration::from_secs(1), || alive(&token).is_empty()),
            "RS-08: {kind}: {:?} live",
            alive(&token)
        );
        assert!(outcome(&path).contains("timed_out"), "RS-08: {kind}: the report says {}", outcome(&path));
    }
}

/// RS-08. Method: the program ends in time and leaves the same daemons. Oracle: the token; its own status
/// comes back at once.
#[test]
fn rs_08_nothing_outlives_the_program() {
    for kind in ["ignore", "fork-loop", "flock"] {
        let (token, sandbox) = (canary(), Sandbox::new());
        let start = Instant::now();
        let script = format!(
            "{} RS-08 {kind} {token} > /dev/null 2>&1 & sleep 0.3; exit 7",
            sandbox.probe_path().display()
        );
        let output = sandbox.shell(&script);
        assert_eq!(output.status.code(), Some(7), "RS-08: {kind}: {output:?}");
        assert!(start.elapsed() < Duration::from_secs(5), "RS-08: {kind}: it took {:?}", start.elapsed());
        assert!(
            within(Duration::from_secs(1), || alive(&token).is_empty()),
            "RS-08: {kind}: {:?} live",
            alive(&token)
        );
    }
}

/// RS-08. Method: the broker itself is killed; or it gets a signal that a harness or a terminal sends, which
/// it passes on to a program that does not ignore it. A daemon that ignores everything runs meanwhile.
/// Oracle: the token.
#[test]
fn rs_08_nothing_outlives_the_broker() {
    use nix::sys::signal::{Signal, kill};
    for signal in [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        let (token, sandbox) = (canary(), Sandbox::new());
        let mut command = sandbox.command();
        let probe = sandbox.probe_path().display().to_string();
        let script = format!("{probe} RS-08 ignore {token} & exec sleep 60");
        let (mut child, _out, _) = until_ready(command.args(["sh", "-c", &script]).stderr(Stdio::null()));
        let before = alive(&token).len();
        kill(nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid")), signal).expect("kill");
        let gone = within(Duration::from_secs(5), || {
            // It is reaped by us, and has the token in its own command line until then.
            child.try_wait().expect("waited");
            alive(&token).is_empty()
        });
        let left = alive(&token);
        child.kill().ok();
        child.wait().ok();
        assert!(before >= 3, "RS-08: {signal}: broker, program and daemon were there: {before}");
        assert!(gone, "RS-08: {signal}: {left:?} live");
    }
}

/// RS-08. Method: a run is ended by its deadline. Oracle: the control groups that its processes were in, by
/// inode: another run may have one of the same name by then.
#[test]
fn rs_08_no_control_group_is_left() {
    let (token, sandbox) = (canary(), Sandbox::new().option("--timeout").option("700ms"));
    let mut command = sandbox.command();
    let (mut child, _out, _) = until_ready(command.args(["sh", "-c", "echo READY; sleep 30; :", &token]));
    let mut groups = std::collections::BTreeMap::new();
    for pid in alive(&token) {
        let table = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        for line in table.lines() {
            let [_, controller, path] = line.splitn(3, ':').collect::<Vec<_>>()[..] else {
                continue;
            };
            if path.starts_with("/broker/") {
                let path = format!("/sys/fs/cgroup/{controller}{path}");
                let inode = std::fs::metadata(&path).map(|about| about.ino()).expect("the group is there");
                groups.insert(path, inode);
            }
        }
    }
    assert!(groups.len() >= 2, "RS-08: it is in groups of ours: {groups:?}");
    assert_eq!(child.wait().expect("it ends").code(), Some(124), "RS-08: the deadline");
    for (path, inode) in groups {
        let same = std::fs::metadata(&path).is_ok_and(|about| about.ino() == inode);
        assert!(!same, "RS-08: {path} is left behind");
    }
}

// Two tests look at what the whole machine does with crashes.
static MACHINE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    MACHINE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The machine's core handler, put back with the test.
struct CorePattern(Vec<u8>);

impl CorePattern {
    const PATH: &str = "/proc/sys/kernel/core_pattern";

    fn set(pattern: &str) -> Self {
        let old = std::fs::read(Self::PATH).expect("readable");
        let guard = CorePattern(old);
        std::fs::write(Self::PATH, pattern).expect("root may set it");
        guard
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        std::fs::write(Self::PATH, &self.0).ok();
    }
}

/// RS-11. Method: the machine's core handler is a recorder while a program aborts, with the core limit as
/// found, set to 0 (which does not keep a handler from running) and raised. Oracle: the recorder's log, which
/// the control's crash is in; and files of the workspace when cores are files.
#[test]
fn rs_11_crashes_do_not_run_the_hosts_core_handler() {
    let _alone = alone();
    let (place, workspace) = (folder("c-"), folder("rs-11-"));
    let (log, recorder) = (place.path().join("log"), place.path().join("r"));
    let script = format!("#!/bin/sh\ncat > /dev/null\necho \"$@\" >> {}\n", log.display());
    std::fs::write(&recorder, script).expect("the recorder is written");
    std::fs::set_permissions(&recorder, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let sandbox = Sandbox::new().option("--workspace").option(workspace.path().display().to_string());
    // The kernel keeps 15 bytes of a name.
    let name = |prefix: &str| format!("{prefix}-{}", &canary()[7..18]);
    let logged = |name: &str| std::fs::read_to_string(&log).is_ok_and(|lines| lines.contains(name));
    let modes = ["plain", "lowered", "raised"];
    {
        let _pattern = CorePattern::set(&format!("|{} %e", recorder.display()));
        let control = name("c");
        let status = run(Command::new(sandbox.probe_path())
            .args(["RS-11", &control, "plain"])
            .current_dir(place.path()))
        .status;
        assert!(status.code().is_none(), "RS-11: the control crashes: {status:?}");
        assert!(
            within(Duration::from_secs(10), || logged(&control)),
            "RS-11: the control's crash is recorded"
        );
        let names = modes.map(|_| name("s"));
        for (mode, name) in modes.iter().zip(&names) {
            let output = run(sandbox.command().arg(sandbox.probe_path()).args(["RS-11", name, mode]));
            assert_eq!(
                output.status.code(),
                Some(128 + libc::SIGABRT),
                "RS-11: {mode}: it crashes inside: {output:?}"
            );
        }
        // A second control ends after them: by then theirs would have been recorded too.
        let last = name("l");
        run(Command::new(sandbox.probe_path()).args(["RS-11", &last, "plain"]).current_dir(place.path()));
        assert!(
            within(Duration::from_secs(10), || logged(&last)),
            "RS-11: the second control's crash is recorded"
        );
        std::thread::sleep(Duration::from_millis(300));
        for (mode, name) in modes.iter().zip(&names) {
            assert!(!logged(name), "RS-11: {mode}: the host's handler ran for a crash inside");
        }
    }
    let _pattern = CorePattern::set("core");
    for mode in modes {
        run(sandbox.command().arg(sandbox.probe_path()).args(["RS-11", "core", mode]));
    }
    let left: Vec<_> = std::fs::read_dir(workspace.path()).expect("readable").flatten().collect();
    for file in left {
        let size = file.metadata().expect("there").len();
        assert!(size <= 1, "RS-11: {:?} of {size} bytes in the workspace", file.file_name());
    }
}

/// RS-12. Method: 100 000 refused calls, and 300 children each ended by a foreign call and by a fault; a line
/// is put into the kernel's log, which works on the host. Oracle: lines of the kernel's log under this run's
/// name, and the size of the broker's own standard error.
#[test]
fn rs_12_logs_do_not_grow_with_refusals() {
    let _alone = alone();
    let sandbox = Sandbox::new();
    let control_name = format!("k-{}", &canary()[7..18]);
    let lines = KernelLog::open();
    let control = sandbox.control("RS-12", &[&*control_name, "10", "0"]);
    assert!(lines.count(&control_name) > 0, "RS-12: the log shows what the control wrote");

    let name = format!("k-{}", &canary()[7..18]);
    let lines = KernelLog::open();
    let output = run(sandbox.command().arg(sandbox.probe_path()).args(["RS-12", &name, "100000", "300"]));
    let inside = broker_tests::cases_in(&text(&output.stdout));
    assert_refused("RS-12", &control, &inside, &[]);
    assert_eq!(inside[0].detail, "300 killed by a foreign call, 300 by a fault", "RS-12: they did happen");
    let count = lines.count(&name);
    assert!(count <= 64, "RS-12: {count} lines in the kernel's log");
    assert!(
        output.stderr.len() < 4096,
        "RS-12: {} bytes from the broker: {:.400}",
        output.stderr.len(),
        text(&output.stderr)
    );
}

/// The kernel's log from now on.
struct KernelLog(std::fs::File);

impl KernelLog {
    fn open() -> Self {
        let non_blocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let mut options = std::fs::OpenOptions::new();
        let mut log =
            options.read(true).custom_flags(non_blocking).open("/dev/kmsg").expect("root reads the log");
        log.seek(SeekFrom::End(0)).expect("it can be skipped");
        KernelLog(log)
    }

    fn count(mut self, name: &str) -> usize {
        // One record a read; the end is EAGAIN. EPIPE says that records were lost, which is growth as well.
        let mut record = [0_u8; 8192];
        let mut count = 0;
        loop {
            match self.0.read(&mut record) {
                Ok(size) => count += usize::from(text(&record[..size]).contains(name)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return count,
                Err(error) => panic!("the log ran over: {error}"),
            }
        }
    }
}
