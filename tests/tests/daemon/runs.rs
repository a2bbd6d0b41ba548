//! Runs through the daemon, by root and by an ordinary user.

use super::*;

#[test]
fn an_ordinary_user_runs_a_command_confined() {
    let daemon = Daemon::start();
    let output = daemon.exec(ADA, &[], &["sh", "-c", "id -u; cat; echo to stderr >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("1000\n".into(), "to stderr\n".into()));
    // The control: by itself this user cannot.
    let mut embedded = Command::new(program("broker"));
    let embedded =
        embedded.uid(ADA).gid(ADA).args(["exec", "--embedded", "--", "true"]).output().expect("it runs");
    assert_eq!(embedded.status.code(), Some(125));
}

#[test]
fn what_runs_is_nobody_s_on_the_host_and_less_than_its_caller() {
    let daemon = Daemon::start();
    let mut run = daemon.broker(ADA, &["exec"]).args(["--", "sleep", "60"]).spawn().expect("it starts");
    let sleeps = || {
        let all = fs::read_dir("/proc").expect("/proc").flatten();
        let pids = all
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.parse::<u32>().is_ok());
        let mut own = pids.filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == b"sleep\x0060\0")
        });
        own.next()
    };
    assert!(within(Duration::from_secs(5), || sleeps().is_some()), "{}", daemon.log());
    let status =
        fs::read_to_string(format!("/proc/{}/status", sleeps().expect("it runs"))).expect("its status");
    let uid: u32 = broker_tests::field(&status, "Uid")
        .split_whitespace()
        .next()
        .and_then(|uid| uid.parse().ok())
        .expect("a uid");
    assert!((0x7000_0000..0x7100_0000).contains(&uid), "{uid:#x}");
    assert_eq!(broker_tests::field(&status, "CapBnd").trim(), "0000000000000000");
    run.kill().expect("it is killed");
    run.wait().expect("it is reaped");
    assert!(within(Duration::from_secs(2), || sleeps().is_none()), "a caller that goes away ends its run");
}

#[test]
fn a_workspace_is_the_caller_s_own_directory() {
    let daemon = Daemon::start();
    let own = folder_of(ADA);
    let path = own.path().display().to_string();
    let output = daemon.exec(
        ADA,
        &["--workspace", &path],
        &["sh", "-c", "echo made > result; mkdir .git/hooks; ls -A"],
    );
    assert_eq!(text(&output.stdout).lines().filter(|line| *line == "result").count(), 1, "{output:?}");
    let made = fs::metadata(own.path().join("result")).expect("it is there");
    use std::os::unix::fs::MetadataExt;
    assert_eq!((made.uid(), made.gid()), (ADA, ADA));
    assert!(!own.path().join(".git").exists(), "placeholders are gone, and nothing came in their place");
}

/// `BROKER-THREATS.md`, confused deputy: the daemon is root, its caller is not. A directory of root's that the caller can
/// name gets nothing written into it, neither by the workload nor by the daemon's own placeholders.
#[test]
fn a_directory_of_another_s_is_not_lent() {
    let daemon = Daemon::start();
    let roots = folder_of(0);
    set_mode(roots.path(), 0o755);
    fs::write(roots.path().join("secret"), "secret").expect("a file");
    set_mode(&roots.path().join("secret"), 0o600);
    let path = roots.path().display().to_string();
    let before: Vec<_> =
        fs::read_dir(roots.path()).expect("it is there").flatten().map(|entry| entry.file_name()).collect();
    let script = "cat secret; touch new; mkdir .git; ls -A; sleep 0.3";
    let run = daemon
        .broker(ADA, &["exec", "--workspace", &path])
        .args(["--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let run = run.expect("it starts");
    // While it runs, too.
    std::thread::sleep(Duration::from_millis(150));
    let during: Vec<_> =
        fs::read_dir(roots.path()).expect("it is there").flatten().map(|entry| entry.file_name()).collect();
    let output = run.wait_with_output().expect("it ends");
    assert_eq!(during, before, "the daemon wrote into a directory that its caller may not write to");
    assert_eq!(text(&output.stdout), "secret\n", "only the name shows: {output:?}");
    // The control: root lends what is root's.
    let output = daemon.exec(0, &["--workspace", &path], &["sh", "-c", "cat secret"]);
    assert_eq!(text(&output.stdout), "secret", "{output:?}");
}

/// What the lender could open by chmod(2) is held, or nothing starts: an earlier run may have closed it on purpose.
#[test]
fn a_closed_directory_of_the_caller_s_own_is_no_way_round() {
    let daemon = Daemon::start();
    let own = folder_of(ADA);
    let git = own.path().join(".git");
    fs::create_dir(&git).expect("a directory");
    std::os::unix::fs::chown(&git, Some(ADA), Some(ADA)).expect("root gives it away");
    for mode in [0o500, 0o000] {
        set_mode(&git, mode);
        let path = own.path().display().to_string();
        let script = "chmod 700 .git; mkdir .git/hooks; echo evil > .git/hooks/post-checkout";
        let output = daemon.exec(ADA, &["--workspace", &path], &["sh", "-c", script]);
        assert_eq!(output.status.code(), Some(125), "mode {mode:o}: {output:?}");
        set_mode(&git, 0o700);
        assert_eq!(fs::read_dir(&git).expect("it is there").count(), 0, "mode {mode:o}");
    }
}

#[test]
fn statuses_and_reports_are_those_of_an_embedded_run() {
    let daemon = Daemon::start();
    let folder = folder_of(ADA);
    let report = folder.path().join("report.json");
    let option = report.display().to_string();
    for (command, options, status, kind) in [
        (&["true"][..], &[][..], 0, "exited"),
        (&["sh", "-c", "kill -9 $$"], &[], 137, "signaled"),
        (&["sleep", "9"], &["--timeout", "100ms"], 124, "timed_out"),
        (&["/no/such"], &[], 127, "not_found"),
        (&["/etc/passwd"], &[], 126, "not_executable"),
        (&["true"], &["--memory", "1TiB"], 125, "setup_failed"),
    ] {
        let output = daemon.exec(ADA, &[&["--report", option.as_str()], options].concat(), command);
        assert_eq!(output.status.code(), Some(status), "{command:?}: {}", text(&output.stderr));
        let said: Value = serde_json::from_slice(&fs::read(&report).expect("a report")).expect("JSON");
        assert_eq!(said["outcome"]["kind"], kind, "{command:?}: {said}");
        assert_eq!(said["through"], daemon.socket().display().to_string());
        let lines = text(&output.stderr).lines().count();
        assert!(lines <= 1, "{command:?}: {}", text(&output.stderr));
    }
}

#[test]
fn a_terminal_or_a_file_stays_outside() {
    let daemon = Daemon::start();
    let folder = folder_of(ADA);
    let (input, out) = (folder.path().join("in"), folder.path().join("out"));
    fs::write(&input, "from a file\n").expect("a file");
    let mut command = daemon.broker(ADA, &["exec"]);
    command.args(["--", "sh", "-c", "readlink /proc/self/fd/0 /proc/self/fd/1; cat"]);
    command
        .stdin(fs::File::open(&input).expect("it is there"))
        .stdout(fs::File::create(&out).expect("a file"));
    assert!(command.status().expect("it runs").success());
    let said = fs::read_to_string(&out).expect("what it wrote");
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines.len() == 3 && lines[..2].iter().all(|line| line.starts_with("pipe:")), "{said}");
    assert_eq!(lines[2], "from a file");
}

#[test]
fn a_signal_reaches_the_command() {
    let daemon = Daemon::start();
    let log = fs::File::create(daemon.folder.path().join("client.log")).expect("a file");
    // What is copied by a thread of the client's, and what is not.
    for stderr in [Stdio::null(), log.into()] {
        signal_one(&daemon, stderr);
    }
}

fn signal_one(daemon: &Daemon, stderr: Stdio) {
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut command = daemon.broker(ADA, &["exec"]);
    command.args(["--", "sh", "-c", script]).stdout(Stdio::piped()).stderr(stderr);
    let mut run = command.spawn().expect("it starts");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(run.stdout.take().expect("a pipe")));
    assert_eq!(lines.next().expect("a line").expect("text"), "ready");
    let pid = nix::unistd::Pid::from_raw(run.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it lives");
    assert_eq!(lines.next().expect("a line").expect("text"), "caught");
    assert_eq!(run.wait().expect("it ends").code(), Some(5));
}
