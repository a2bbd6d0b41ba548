//! Arguments, environment, policies and statuses.

use super::*;

/// test-run: "--info-fd/--json-status-fd", exit code 42. The status is the payload's own, all of it.
#[test]
fn the_status_is_the_payload_s_own() {
    let workspace = folder();
    for code in [0, 1, 42, 124, 125, 126, 127, 128, 255] {
        let script = format!("exit {code}");
        assert_eq!(status(outside(workspace.path(), &script).status), code);
        assert_eq!(status(inside(workspace.path(), &script).status), code);
    }
}

/// test-run: "exec failure doesn't include exit-code". What cannot be started has statuses of its own, which
/// bubblewrap does not tell apart.
#[test]
fn a_command_that_cannot_start_is_told_from_one_that_failed() {
    let workspace = folder();
    plant(workspace.path(), "plain", "");
    for (command, expected) in
        [("/", 126), ("/nope", 127), ("nope", 127), ("./plain", 126), ("./plain/x", 126)]
    {
        let theirs = bubblewrap(workspace.path()).arg(command).output().expect("bwrap runs");
        assert_eq!(theirs.status.code(), Some(1), "the control has one status for all");
        let ours = sandbox(workspace.path()).arg(command).output().expect("broker runs");
        let seen = status(ours.status);
        // A path through a file is absent for some and not executable for others.
        assert!(seen == expected || (command == "./plain/x" && seen == 127), "{command}: {ours:?}");
        assert_eq!(String::from_utf8_lossy(&ours.stderr).lines().count(), 1, "{command}: {ours:?}");
    }
}

/// test-run: "-- works"; "--dev-bind after -- is a command". No word of the command is ever an option.
#[test]
fn words_after_the_dashes_are_never_options() {
    let workspace = folder();
    for words in
        [&["--dev-bind", "/", "/", "touch", "x"][..], &["-h"], &["--policy=open", "touch", "x"], &["--"]]
    {
        let output = sandbox(workspace.path()).args(words).output().expect("broker runs");
        assert_eq!(status(output.status), 127, "{words:?}: {output:?}");
        assert!(!said(&output).contains("Usage"), "{words:?}: the help of broker: {output:?}");
    }
    assert!(!workspace.path().join("x").exists());
    plant(workspace.path(), "--policy=open", "#!/bin/sh\nexit 7\n");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(workspace.path().join("--policy=open"), mode).expect("chmod");
    let output = sandbox(workspace.path()).arg("./--policy=open").output().expect("broker runs");
    assert_eq!(status(output.status), 7, "{output:?}");
}

/// test-run: "bogus tmpfs size not allowed", seven spellings. So of every limit on the command line.
#[test]
fn a_bogus_limit_is_refused() {
    let workspace = folder();
    let bogus = [
        "0",
        "123bogus",
        "",
        "-1",
        " -1",
        "18446744073709551616",
        "9223372036854775809e9",
        "1e9",
        "0x10",
        "1KK",
    ];
    for (option, sane) in [("memory", "64MiB"), ("pids", "20"), ("cpus", "0.5"), ("timeout", "30s")] {
        let run = |value: &str| {
            let mut command = broker();
            command.arg(format!("--{option}={value}")).arg("--workspace").arg(workspace.path());
            command.args(["--", "touch", "marker"]).output().expect("broker runs")
        };
        for value in bogus {
            let output = run(value);
            assert_eq!(status(output.status), 125, "--{option}={value}: {output:?}");
            assert!(!workspace.path().join("marker").exists(), "--{option}={value}");
        }
        assert!(run(sane).status.success(), "--{option}={sane}");
        std::fs::remove_file(workspace.path().join("marker")).expect("the sane value ran");
    }
}

/// test-run: "--perms and --size only once". What is said twice or not known is refused, on the command line and in a
/// policy.
#[test]
fn what_is_said_twice_or_unknown_is_refused() {
    let (place, workspace) = (folder(), folder());
    let path = workspace.path().display().to_string();
    for options in [
        &["--policy", "default", "--policy", "default"][..],
        &["--timeout", "30s", "--timeout", "40s"],
        &["--workspace", &path, "--workspace", &path],
        &["--share-net"],
    ] {
        let output = broker().args(options).args(["--", "true"]).output().expect("broker runs");
        assert_eq!(status(output.status), 125, "{options:?}: {output:?}");
    }
    for (text, expected) in [
        ("extends = \"default\"\n", 0),
        ("extends = \"default\"\nextends = \"default\"\n", 125),
        ("extends = \"default\"\n[files]\n[files]\n", 125),
        ("extends = \"default\"\n[files]\ntmpp = \"1MiB\"\n", 125),
        ("extends = \"default\"\n[file]\n", 125),
        ("extends = \"nowhere\"\n", 125),
    ] {
        let mut command = broker();
        command.arg("--policy").arg(policy(place.path(), text)).args(["--", "true"]);
        let output = command.output().expect("broker runs");
        assert_eq!(status(output.status), expected, "{text}: {output:?}");
    }
}

/// test-run: "--setenv", "--unsetenv", "--clearenv". Nothing is inherited that is not named; what is named arrives.
#[test]
fn the_environment_starts_from_nothing() {
    let (token, workspace) = (canary(), folder());
    let hostile =
        ["T_SECRET", "BASH_ENV", "ENV", "GIT_DIR", "PYTHONPATH", "PERL5LIB", "LD_LIBRARY_PATH", "TMPDIR"];
    let look = "env; cat /proc/self/environ /proc/1/environ /proc/$PPID/environ";
    let run = |mut command: Command| {
        command.envs(hostile.iter().map(|name| (name, format!("/nowhere/{token}"))));
        command.env("NAMED", "by name");
        command.output().expect("the command starts")
    };
    let mut control = host(workspace.path());
    control.args(["bash", "-c", look]);
    assert!(said(&run(control)).contains(&token), "the control inherits it");
    let mut ours = sandbox(workspace.path());
    ours.args(["bash", "-c", look]);
    let output = run(ours);
    assert!(said(&output).contains("HOME=/home/agent") && !said(&output).contains(&token), "{output:?}");

    let mut ours = broker();
    ours.args(["--env", "NAMED", "--env", "SET=a=b c", "--", "env"]);
    let mut lines: Vec<String> = answer(&run(ours)).lines().map(str::to_owned).collect();
    lines.retain(|line| !line.starts_with("PATH="));
    lines.sort();
    let expected =
        ["HOME=/home/agent", "LANG=C.UTF-8", "LOGNAME=agent", "NAMED=by name", "SET=a=b c", "USER=agent"];
    assert_eq!(lines, expected);
}

/// test-run: "argv0 manipulation". The words of the command arrive byte for byte.
#[test]
fn arguments_arrive_byte_for_byte() {
    use std::os::unix::ffi::OsStrExt;
    let workspace = folder();
    let run = |mut command: Command| {
        command.args(["/usr/bin/printf", "%s|", "", " ", "a\nb", "*", "$(id)", "--", "-n", "\u{202e}"]);
        command.arg(std::ffi::OsStr::from_bytes(b"\xff\xfe")).output().expect("the command starts").stdout
    };
    let expected = run(host(workspace.path()));
    assert!(expected.ends_with(b"\xff\xfe|"));
    assert_eq!(run(sandbox(workspace.path())), expected);
}

/// test-run: "--bind-fd". Descriptors that the caller happens to hold do not go in; with bubblewrap they do.
#[test]
fn open_descriptors_of_the_caller_do_not_go_in() {
    let workspace = folder();
    let hold = "exec 7< /etc/shadow 9< / 500< /root";
    let script = "for n in 7 9 500; do [ -e /proc/self/fd/$n ] && echo leaked $n; done; head -c 4 <&7; \
                  ls /proc/self/fd | wc -l";
    let run = |mut command: Command| {
        command.args(["bash", "-c", script]);
        after(hold, &command).output().expect("the command starts")
    };
    let control = run(bubblewrap(workspace.path()));
    assert!(answer(&control).contains("leaked 7") && answer(&control).contains("root"), "{control:?}");
    assert_eq!(answer(&run(sandbox(workspace.path()))), "4");
}

/// test-run: "redundant --chdir". The working directory is the workspace, wherever the caller stands.
#[test]
fn the_working_directory_is_the_workspace_wherever_the_caller_stands() {
    let workspace = folder();
    for place in ["cd /", "d=$(mktemp -d); cd $d; rmdir $d", "cd /proc/self/task"] {
        let mut command = sandbox(workspace.path());
        command.args(["bash", "-c", "pwd -P; cd ..; pwd -P; readlink /proc/$$/cwd"]);
        let output = after(place, &command).output().expect("the command starts");
        assert_eq!(answer(&output), "/workspace\n/\n/", "{place}: {output:?}");
    }
}

/// test-seccomp: an empty filter, one of a single byte, a bad descriptor. Whatever is no policy runs nothing.
#[test]
fn a_file_that_is_no_policy_runs_nothing() {
    let (place, workspace) = (folder(), folder());
    std::fs::create_dir(place.path().join("directory.toml")).expect("a directory");
    std::fs::write(place.path().join("bytes.toml"), b"extends = \"default\"\n# \xff\xfe\n").expect("a file");
    plant(place.path(), "cut.toml", "extends = \"defau");
    plant(place.path(), "byte.toml", "e");
    plant(place.path(), "nul.toml", "\0");
    plant(place.path(), "big.toml", &"#".repeat(2 << 20));
    let run = |policy: &str| {
        let mut command = broker();
        command.args(["--policy", policy, "--workspace"]).arg(workspace.path());
        command.args(["--", "touch", "marker"]).output().expect("broker runs")
    };
    for name in ["directory", "bytes", "cut", "byte", "nul", "big", "absent"] {
        let output = run(&place.path().join(name).with_extension("toml").display().to_string());
        assert_eq!(status(output.status), 125, "{name}: {output:?}");
        assert!(!workspace.path().join("marker").exists(), "{name}");
    }
    // An empty policy is one: it shows nothing, so there is nothing to run.
    plant(place.path(), "empty.toml", "");
    assert_eq!(status(run(&place.path().join("empty.toml").display().to_string()).status), 127);
    assert_eq!(status(run("-1").status), 125);
    assert!(!workspace.path().join("marker").exists());
    assert!(run("default").status.success() && workspace.path().join("marker").exists(), "the control runs");
}

/// test-seccomp: the bad descriptor, as files that never end and files that never begin. Neither is waited for.
#[test]
fn a_policy_that_is_no_regular_file_is_refused_at_once() {
    let place = folder();
    assert!(
        Command::new("mkfifo").arg(place.path().join("fifo.toml")).status().expect("mkfifo runs").success()
    );
    symlink("/dev/zero", place.path().join("endless.toml")).expect("a link");
    for name in ["fifo.toml", "endless.toml"] {
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "5"]).arg(program("broker")).args([
            "exec",
            "--embedded",
            "--memory",
            "64MiB",
        ]);
        let output = command.arg("--policy").arg(place.path().join(name)).args(["--", "true"]).output();
        assert_eq!(status(output.expect("timeout runs").status), 125, "{name}: it is read");
    }
}

/// NEWS 0.11.1: a caller that ignores SIGCHLD; a caller whose descriptor 0 or 1 is closed. Neither changes the status,
/// and the payload inherits no disposition.
#[test]
fn odd_callers_change_neither_status_nor_signals() {
    let workspace = folder();
    let ignoring = |command: &Command| {
        let mut wrapped = Command::new("perl");
        wrapped.args(["-e", "$SIG{$_} = 'IGNORE' for qw(CHLD HUP INT QUIT USR1); exec @ARGV"]);
        wrapped.arg(command.get_program()).args(command.get_args());
        wrapped
    };
    let mut command = sandbox(workspace.path());
    command.args(["bash", "-c", "exit 7"]);
    assert_eq!(status(ignoring(&command).status().expect("perl runs")), 7);
    for closed in ["exec 0<&-", "exec 1>&-", "exec 2>&-", "exec 0<&- 1>&- 2>&-"] {
        assert_eq!(status(after(closed, &command).status().expect("bash runs")), 7, "{closed}");
    }
    let mut command = sandbox(workspace.path());
    command.args(["sh", "-c", "echo up; read line"]);
    let mut control = host(workspace.path());
    control.args(["sh", "-c", "echo up; read line"]);
    // Without 32 and 33: they are the C library's own, which lets no program reset them.
    let ignored = |text: &str| u64::from_str_radix(field(text, "SigIgn"), 16).expect("a mask") & !(3 << 31);
    let control = Running::start(&mut ignoring(&control));
    let text = std::fs::read_to_string(format!("/proc/{}/status", control.child.id())).expect("it runs");
    assert!(ignored(&text) != 0, "the control inherits them");
    let running = Running::start(&mut ignoring(&command));
    let payloads: Vec<String> = running.statuses().into_iter().map(|(_, text)| text).collect();
    let payloads: Vec<&String> = payloads.iter().filter(|text| field(text, "Name") == "sh").collect();
    assert!(!payloads.is_empty(), "the payload is seen");
    for text in payloads {
        assert!(ignored(text) == 0 && field(text, "SigBlk") == "0000000000000000", "{text}");
    }
}

/// The status of a payload that a signal ended, as a shell tells it: bubblewrap's and the host's are the same.
#[test]
fn a_signal_s_status_is_a_shell_s() {
    let workspace = folder();
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139), ("INT", 130), ("USR1", 138)] {
        let script = format!("kill -{signal} $$; sleep 60");
        assert_eq!(status(outside(workspace.path(), &script).status), code, "the control, {signal}");
        assert_eq!(status(inside(workspace.path(), &script).status), code, "{signal}");
    }
}
