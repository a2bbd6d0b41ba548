//! Set-up, processes, sockets and the filter.

use super::*;

/// symlink-write-path: "cannot be resolved"; linux-ancestor-pin-errno; and bubblewrap's fault injection for "pre-exec
/// failure". A call of the set-up that fails stops it. As in srt, that the fault was met is part of the oracle.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_set_up_call_that_fails_stops_everything() {
    // The tracer waits for every child of its process, so it has one to itself: this test alone, once more.
    if std::env::var_os(ALONE).is_none() {
        let mut alone = Command::new(std::env::current_exe().expect("the test knows its own path"));
        alone.args(["--exact", "processes::a_set_up_call_that_fails_stops_everything"]).env(ALONE, "1");
        let output = alone.output().expect("the test starts again");
        assert!(output.status.success() && said(&output).contains("1 passed"), "{}", said(&output));
        return;
    }
    for number in [
        libc::SYS_openat2,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_mount_setattr,
        libc::SYS_pivot_root,
        libc::SYS_capset,
        libc::SYS_seccomp,
        libc::SYS_landlock_restrict_self,
    ] {
        let workspace = furnished();
        let before = image(workspace.path());
        let mut met = 0;
        let mut command = sandbox(workspace.path());
        command.args(["touch", "marker"]);
        let ended = inject::run(&mut command, |call| {
            if call.number != number || met > 0 {
                return Verdict::Pass;
            }
            met += 1;
            Verdict::Return(-i64::from(libc::EACCES))
        });
        assert_eq!(met, 1, "call {number} was not met");
        assert_eq!(status(ended), 125, "call {number}");
        assert_eq!(image(workspace.path()), before, "call {number}");
    }
}

/// integration: "background processes"; "exits when the main command exits". Nothing outlives the command, and the
/// broker does not wait for what holds its streams.
#[test]
fn nothing_outlives_the_command() {
    let script = |repeat: &str, token: &str, keep: &str| {
        format!(
            "(setsid bash -c 'trap \"\" TERM HUP; {repeat}; do echo x >> log; sleep 0.05; done' {token} {keep} &); \
             until [ -s log ]; do sleep 0.01; done; exit 5"
        )
    };
    let quiet = "> /dev/null 2>&1";
    let (token, control) = (canary(), folder());
    let ended = outside(control.path(), &script("for i in {1..40}", &token, quiet));
    assert_eq!(status(ended.status), 5);
    assert!(!alive(&token).is_empty(), "the control's child goes on");
    assert!(eventually(10_000, || alive(&token).is_empty()));
    for keep in [quiet, ""] {
        let (token, workspace) = (canary(), folder());
        let output = inside(workspace.path(), &script("while :", &token, keep));
        assert_eq!(status(output.status), 5, "{output:?}");
        assert!(alive(&token).is_empty(), "a process is left");
        let size = || workspace.path().join("log").metadata().expect("the log").len();
        let before = size();
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert_eq!(size(), before, "somebody still writes");
    }
}

/// pid-namespace-isolation: SIGTERM goes through to the payload, whose status comes back.
#[test]
fn a_signal_to_the_broker_reaches_the_payload() {
    for (trap, expected) in [("trap 'echo got > file; exit 9' TERM;", 9), ("", 143)] {
        let workspace = folder();
        let script = format!("{trap} echo up; while :; do sleep 0.05; done");
        let mut running = Running::start(sandbox(workspace.path()).args(["bash", "-c", &script]));
        let pid = running.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
        assert_eq!(status(running.child.wait().expect("it ends")), expected);
        assert_eq!(workspace.path().join("file").exists(), expected == 9);
    }
}

/// pid-namespace-isolation: "ptrace", "mem", "process_vm_writev", "umount" of the helper. Init is no target.
#[test]
#[cfg(target_arch = "x86_64")]
fn init_is_no_target() {
    let workspace = folder();
    let script = format!(
        "{}; for f in mem environ fd/0 root/etc/passwd maps; do head -c 1 /proc/1/$f 2> /dev/null | grep -q . && echo read $f; \
         : 3<> /proc/1/$f && echo wrote $f; done 2> /dev/null; umount /proc 2> /dev/null && echo umount; kill -9 1; \
         kill -STOP 1; echo alive",
        calls(&[
            &[libc::SYS_ptrace, 16, 1, 0, 0],
            &[libc::SYS_ptrace, 0x4206, 1, 0, 0],
            &[libc::SYS_process_vm_writev, 1, 0, 0, 0, 0, 0],
            &[libc::SYS_process_vm_readv, 1, 0, 0, 0, 0, 0],
            &[libc::SYS_pidfd_open, 1, 0],
        ])
    );
    let output = inside(workspace.path(), &script);
    assert!(output.status.success(), "{output:?}");
    let lines = answer(&output);
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines[..4], ["-1 1"; 4], "{output:?}");
    assert_eq!(lines[5..], ["alive"], "{output:?}");
}

/// integration: "privilege escalation". A set-id bit is neither made nor obeyed.
#[test]
fn set_id_bits_are_neither_made_nor_obeyed() {
    let script = "cp /usr/bin/id s; chmod 6755 s; install -m 4755 /usr/bin/id t; ./p -u";
    let furnish = || {
        let workspace = folder();
        outside(workspace.path(), "cp /usr/bin/id p; chmod 4755 p");
        workspace
    };
    let control = furnish();
    outside(control.path(), script);
    let find = "find . -perm /6000 -printf '%f\\n' | sort";
    assert_eq!(answer(&outside(control.path(), find)), "p\ns\nt", "the control makes them");
    let workspace = furnish();
    let output = inside(workspace.path(), script);
    assert_eq!(answer(&output), "1000", "{output:?}");
    assert_eq!(answer(&outside(workspace.path(), find)), "p");
}

/// integration: "special file types". Pipes, but no device, no hard link out of a read-only tree, and no use of a device
/// that is already there.
#[test]
fn no_device_and_no_hard_link_is_made() {
    let workspace = folder();
    outside(workspace.path(), "mknod planted c 1 5; chmod 666 planted");
    assert_eq!(
        answer(&outside(workspace.path(), "head -c 4 planted | wc -c")),
        "4",
        "the control reads the device"
    );
    let links = Path::new("/usr/bin/id").metadata().expect("id").nlink();
    let output = inside(
        workspace.path(),
        "mkfifo f; ln /usr/bin/id link; mknod c c 1 3; mknod b b 254 0; head -c 4 planted | wc -c",
    );
    assert_eq!(answer(&output), "0", "{output:?}");
    assert_eq!(names(workspace.path()), ["f", "planted"]);
    assert!(workspace.path().join("f").metadata().expect("f").file_type().is_fifo());
    assert_eq!(Path::new("/usr/bin/id").metadata().expect("id").nlink(), links);
}

/// seccomp-filter, unix-socket-allowlist, some fifteen tests: no Unix socket of the host is reached, through a file of
/// the workspace, a link or an abstract name. A pair of sockets works.
#[test]
fn no_unix_socket_of_the_host_is_reached() {
    use std::os::linux::net::SocketAddrExt;
    let (token, place, workspace) = (canary(), folder(), folder());
    let listeners = [
        UnixListener::bind(workspace.path().join("s")).expect("a listener"),
        UnixListener::bind(place.path().join("far")).expect("a listener"),
        UnixListener::bind_addr(&std::os::unix::net::SocketAddr::from_abstract_name(&token).expect("a name"))
            .expect("a listener"),
    ];
    for listener in &listeners {
        listener.set_nonblocking(true).expect("non-blocking");
    }
    symlink(place.path().join("far"), workspace.path().join("link")).expect("a link");
    for path in [workspace.path().join("s"), place.path().join("far")] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("chmod");
    }
    let script = format!(
        "perl -MSocket -e 'for $n (\"s\", \"link\", \"\\0{token}\") {{ for $t (SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM) {{ \
         socket(S, AF_UNIX, $t, 0) && connect(S, pack(\"Sa*\", 1, $n)) and print \"reached\\n\" }} }} \
         socketpair(A, B, AF_UNIX, SOCK_STREAM, 0) and syswrite(A, \"pair\") and sysread(B, $b, 4) and print $b'"
    );
    let accepted = || listeners.iter().filter(|listener| listener.accept().is_ok()).count();
    assert_eq!(
        answer(&outside(workspace.path(), &script)),
        "reached\nreached\nreached\npair",
        "the control connects"
    );
    assert_eq!(accepted(), 3, "the control is counted");
    assert_eq!(
        answer(&bash(bubblewrap(workspace.path()), &script)),
        "reached\npair",
        "bubblewrap's mount lets one in"
    );
    assert_eq!(accepted(), 1);
    assert_eq!(answer(&inside(workspace.path(), &script)), "pair");
    assert_eq!(accepted(), 0);
}

/// unix-socket-allowlist: a second listener for system calls; pid-namespace-isolation: io_uring. Neither way round the
/// filter is there.
#[test]
fn the_filter_has_no_way_round() {
    let workspace = folder();
    let script = calls(&[
        &[libc::SYS_seccomp, 1, 8, -1],
        &[libc::SYS_seccomp, 1, 0, -1],
        &[libc::SYS_io_uring_setup, 1, 0],
        &[libc::SYS_io_uring_enter, 99, 0, 0, 0, 0, 0],
        &[libc::SYS_io_uring_register, 99, 0, 0, 0],
    ]);
    let control = errnos(&bash(host(workspace.path()), &script));
    assert!(!control.contains(&libc::ENOSYS), "the control's kernel has them: {control:?}");
    let ours = errnos(&inside(workspace.path(), &script));
    for (call, errno) in ours.iter().enumerate() {
        // A filter of one's own may only narrow, so it may be let through to its bad pointer.
        assert!(*errno == libc::EPERM || (call == 1 && *errno == libc::EFAULT), "{ours:?}");
    }
}

/// linux-bwrap-argv, quote-args. A path or an argument full of quotes and options is a path or an argument.
#[test]
fn hostile_words_are_only_words() {
    let place = folder();
    let marker = place.path().join("marker");
    let word =
        format!("a b'\"$(touch {0})`touch {0}`\n--bind %s ;touch *", marker.display()).replace('/', "_");
    let workspace = place.path().join(&word);
    std::fs::create_dir(&workspace).expect("a directory");
    let mut command = sandbox(&workspace);
    let output =
        command.args(["bash", "-c", "echo \"$1\" > \"$1\"", "bash", &word]).output().expect("broker runs");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(names(&workspace), [word.as_str()]);
    assert_eq!(content(&workspace, &word), format!("{word}\n"));
    assert_eq!(names(place.path()), [word.as_str()], "more was made");
}

/// integration: "no orphan after timeout". A deadline ends all of it, though it ignores SIGTERM.
#[test]
fn a_deadline_ends_the_whole_tree() {
    let (token, workspace) = (canary(), folder());
    let mut command = broker();
    command.args(["--timeout", "1s", "--workspace"]).arg(workspace.path()).arg("--");
    let script =
        format!("trap '' TERM; setsid bash -c 'trap \"\" TERM; sleep 60; :' {token} & sleep 60; sleep 60");
    let output = after(":", command.args(["bash", "-c", &script])).output().expect("broker runs");
    assert_eq!(status(output.status), 124, "{output:?}");
    assert!(alive(&token).is_empty(), "a process is left");
    assert!(eventually(1000, || names(workspace.path()).is_empty()), "{:?}", names(workspace.path()));
}
