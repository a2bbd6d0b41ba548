//! The tests of codex' `codex-rs/linux-sandbox` (`tests/suite/*.rs`, `scripts/test_linux_sandbox.sh`), restated as claims
//! about `broker exec` and in our own words.
//!
//! Each comment names the test of theirs, and what it proves. The oracles are on the host; the same script runs there
//! first where that is harmless. What is not installed is never counted as refused.

mod peers;

use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use broker_tests::{Running, alive, canary, field};
use peers::{
    after, answer, bash, broker, bubblewrap, calls, content, errnos, folder, image, inside, names, outside,
    plant, said, sandbox, status,
};

/// sandbox.rs: `test_root_read`, `test_root_write`; the script's "outside roots fail". Read and write in one run, so that
/// a run that did nothing cannot pass.
#[test]
fn the_system_is_read_and_only_the_workspace_written() {
    let (place, workspace) = (folder(), folder());
    let target = place.path().join("file");
    let script = format!("ls -l /bin/ > listing && echo in > file; echo out > {}", target.display());
    assert!(outside(folder().path(), &script).status.success() && target.exists(), "the control writes");
    std::fs::remove_file(&target).expect("removed");
    assert!(!inside(workspace.path(), &script).status.success());
    assert!(!target.exists(), "written outside");
    assert_eq!(content(workspace.path(), "file"), "in\n");
    assert!(content(workspace.path(), "listing").contains("bash"));
}

/// sandbox.rs: `test_dev_null_write`, "populates minimal dev nodes".
#[test]
fn the_standard_devices_do_what_they_are_for() {
    let workspace = folder();
    let script = "echo x > /dev/null && dd if=/dev/zero of=/dev/null count=1 2> /dev/null && \
                  perl -e 'open($f, \">\", \"/dev/full\"); syswrite($f, \"x\"); print $! + 0'";
    let expected = libc::ENOSPC.to_string();
    assert_eq!(answer(&outside(workspace.path(), script)), expected);
    assert_eq!(answer(&inside(workspace.path(), script)), expected);
}

/// `test_no_new_privs`, "has no effective or permitted capabilities", "inner stage rejects retained capabilities". A
/// caller with ambient ones cannot pass them on. Oracle: /proc on the host.
#[test]
fn a_caller_s_ambient_capabilities_do_not_go_in() {
    let workspace = folder();
    let below = |command: &Command| {
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--inh-caps", "+net_raw", "--ambient-caps", "+net_raw"]);
        wrapped.arg(command.get_program()).args(command.get_args());
        wrapped
    };
    let words = ["bash", "-c", "echo up; read -r; :"];
    let mut control = Command::new("env");
    let control = Running::start(&mut below(control.args(words)));
    let text = std::fs::read_to_string(format!("/proc/{}/status", control.child.id())).expect("it runs");
    assert!(field(&text, "CapAmb") != "0000000000000000", "the control keeps it");
    let running = Running::start(&mut below(sandbox(workspace.path()).args(words)));
    let statuses = running.statuses();
    assert!(!statuses.is_empty());
    for (path, text) in statuses {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(&text, set), "0000000000000000", "{set} of {}", path.display());
        }
        assert_eq!(field(&text, "NoNewPrivs"), "1", "{}", path.display());
    }
    running.finish();
}

/// `test_timeout`. The status tells a deadline from any end of the command's own.
#[test]
fn a_deadline_has_its_own_status() {
    let (token, workspace) = (canary(), folder());
    let mut command = broker();
    command.args(["--timeout", "1s", "--workspace"]).arg(workspace.path());
    let output =
        command.args(["--", "bash", "-c", "echo up; sleep 60; :", &token]).output().expect("broker runs");
    assert_eq!((status(output.status), answer(&output).as_str()), (124, "up"), "{output:?}");
    assert!(alive(&token).is_empty(), "a process is left");
}

/// `sandbox_blocks_curl`, `_wget`, `_ping`, `_nc`, `_ssh`, `_getent`, `_dev_tcp`. Theirs pass without a network as well;
/// here a listener of the host counts who comes, and the control must be counted.
#[test]
fn no_client_program_reaches_the_host() {
    let workspace = folder();
    let tcp = TcpListener::bind("0.0.0.0:0").expect("a listener");
    let udp = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    tcp.set_nonblocking(true).expect("non-blocking");
    udp.set_nonblocking(true).expect("non-blocking");
    let (port, datagrams) =
        (tcp.local_addr().expect("bound").port(), udp.local_addr().expect("bound").port());
    let accepted = || std::iter::from_fn(|| tcp.accept().ok()).count();
    let received = || std::iter::from_fn(|| udp.recv(&mut [0; 64]).ok()).count();
    let clients = [
        ("bash", format!("bash -c 'echo x > /dev/tcp/127.0.0.1/{port}'")),
        ("curl", format!("curl -s -m 1 http://127.0.0.1:{port}/")),
        ("wget", format!("wget -q -t 1 -T 1 -O - http://127.0.0.1:{port}/")),
        ("nc", format!("nc -w 1 127.0.0.1 {port} < /dev/null")),
        ("ssh", format!("ssh -o BatchMode=yes -o ConnectTimeout=1 -p {port} 127.0.0.1")),
        ("perl", format!("perl -MIO::Socket::INET -e 'IO::Socket::INET->new(\"127.0.0.1:{port}\")'")),
    ];
    let mut tried = 0;
    for (program, line) in clients {
        let script = format!("command -v {program} > /dev/null || exit 127; timeout 2 {line}");
        outside(workspace.path(), &script);
        if accepted() == 0 {
            continue;
        }
        tried += 1;
        inside(workspace.path(), &script);
        assert_eq!(accepted(), 0, "{program} reached the host");
    }
    assert!(tried >= 2, "no control was counted");
    let send = format!("echo x > /dev/udp/127.0.0.1/{datagrams}");
    outside(workspace.path(), &send);
    assert_eq!(received(), 1, "the control's datagram is counted");
    inside(workspace.path(), &send);
    assert_eq!(received(), 0);
}

/// `blocks_metadata_writes`; the script's ".git and .codex are read-only". Allowed and refused in the same run, for each
/// of the places.
#[test]
fn metadata_is_refused_while_its_neighbour_is_written() {
    let workspace = folder();
    for name in [
        ".git/config",
        ".git/hooks/pre-commit",
        ".claude/settings.json",
        ".cargo/config.toml",
        ".cursor/mcp.json",
    ] {
        plant(workspace.path(), name, "original\n");
        let script =
            format!("echo in > allowed; echo bad > {name}; echo bad > {name}.new; mv -f {name}.new {name}");
        assert!(!inside(workspace.path(), &script).status.success(), "{name}");
        assert_eq!(
            (content(workspace.path(), "allowed"), content(workspace.path(), name)),
            ("in\n".into(), "original\n".into())
        );
        outside(workspace.path(), &script);
        assert_eq!(content(workspace.path(), name), "bad\n", "the control changes {name}");
    }
}

/// `codex_symlink_replacement_attack`, "build failure without panicking". A rule that cannot be enforced is a refusal
/// that names the path, in one line and without a panic.
#[test]
fn a_rule_that_cannot_be_held_is_refused_by_name() {
    let workspace = folder();
    plant(workspace.path(), "decoy/config", "original\n");
    symlink("decoy", workspace.path().join(".git")).expect("a link");
    let before = image(workspace.path());
    let output = inside(workspace.path(), "touch ran");
    assert_eq!(status(output.status), 125);
    let text = said(&output);
    assert!(text.lines().count() == 1 && text.contains(".git") && !text.contains("panicked"), "{text}");
    assert_eq!(image(workspace.path()), before);
    std::fs::remove_file(workspace.path().join(".git")).expect("removed");
    assert!(inside(workspace.path(), "touch ran").status.success(), "without the link it runs");
}

/// `nested_metadata_tests`, "gitdir pointer"; "keeps parent repo discovery". A `.git` that is a file cannot be pointed
/// elsewhere, and a directory below a repository gets no repository of its own, nor a trace of one.
#[test]
fn a_git_pointer_stays_and_no_repository_is_made() {
    let script =
        "echo gitdir: /workspace/evil > .git; rm -f .git; mv .git aside; git init -q --bare evil; mkdir .git";
    let place = folder();
    let git = "git init -q main && cd main && git -c user.name=a -c user.email=a@example.org commit -q --allow-empty -m x && \
               git worktree add -q ../tree && mkdir sub";
    let made = outside(place.path(), git);
    assert!(made.status.success(), "{made:?}");
    let (tree, sub) = (place.path().join("tree"), place.path().join("main/sub"));
    let pointer = content(&tree, ".git");
    inside(&tree, script);
    assert_eq!(content(&tree, ".git"), pointer);
    let control = folder();
    plant(control.path(), ".git", &pointer);
    outside(control.path(), script);
    assert!(control.path().join(".git").is_dir(), "the control replaces it");

    let clean = "git status --short --ignored; git rev-parse --show-toplevel";
    let before = answer(&outside(&sub, clean));
    inside(&sub, "git init -q .; git init -q --separate-git-dir=x .; echo gitdir: x > .git");
    std::fs::remove_dir_all(sub.join("x")).ok();
    assert!(names(&sub).is_empty(), "{:?}", names(&sub));
    assert_eq!(answer(&outside(&sub, clean)), before);
    // The parent is found while a sandbox runs below it as well: the place that is held is no repository.
    let running = Running::start(sandbox(&sub).args(["bash", "-c", "echo up; read -r"]));
    assert_eq!(answer(&outside(&sub, clean)), before);
    running.finish();
}

/// `symlinked_synthetic_mount_registry`, "denied tmp without exposing the registry". Where the broker keeps its own
/// books is neither chosen by the environment nor visible inside.
#[test]
fn the_broker_s_own_books_are_neither_misled_nor_seen() {
    let (place, workspace) = (folder(), folder());
    let outside_it = place.path().join("outside");
    std::fs::create_dir(&outside_it).expect("a directory");
    symlink(&outside_it, workspace.path().join("books")).expect("a link");
    let books = workspace.path().join("books");
    let mut command = sandbox(workspace.path());
    for name in ["TMPDIR", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME"] {
        command.env(name, &books);
    }
    let script = "find / -xdev -iname '*broker*' -not -path '/usr/*' 2> /dev/null; grep -o '[^ ]*broker[^ ]*' /proc/self/mountinfo; \
                  touch books/forged; true";
    let output = bash(command, script);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(answer(&output), "");
    assert!(names(&outside_it).is_empty(), "{:?}", names(&outside_it));
    assert_eq!(names(workspace.path()), ["books"]);
}

/// managed_proxy: AF_UNIX denied, socketpair kept; VSOCK and NETLINK. Every family but the loopback's is refused by the
/// filter, which the errno shows. bubblewrap opens them.
#[test]
fn no_socket_family_but_the_loopback_s_is_there() {
    let workspace = folder();
    let families =
        [libc::AF_UNIX, libc::AF_NETLINK, libc::AF_VSOCK, libc::AF_PACKET, libc::AF_ALG, libc::AF_KEY];
    let probe = |family: i32, kind: i32| calls(&[&[libc::SYS_socket, family.into(), kind.into(), 0]]);
    for family in families {
        let script = probe(family, libc::SOCK_RAW);
        assert_eq!(errnos(&inside(workspace.path(), &script)), [libc::EPERM], "family {family}");
    }
    let netlink = probe(libc::AF_NETLINK, libc::SOCK_RAW);
    assert_eq!(errnos(&outside(workspace.path(), &netlink)), [0], "the control opens it");
    assert_eq!(errnos(&bash(bubblewrap(workspace.path()), &netlink)), [0], "bubblewrap opens it");
    for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
        assert_eq!(errnos(&inside(workspace.path(), &probe(libc::AF_INET, kind))), [0], "kind {kind}");
    }
    assert_eq!(errnos(&inside(workspace.path(), &probe(libc::AF_INET, libc::SOCK_RAW))), [libc::EPERM]);
}

/// "preserves writable /dev/shm", "ignores missing writable roots". Ours differ on purpose: shared memory is private,
/// and a root that is missing is an error.
#[test]
fn shared_memory_is_private_and_a_missing_root_is_an_error() {
    let (token, place) = (canary(), folder());
    let script = format!("echo x > /dev/shm/{token} && cat /dev/shm/{token}");
    let shared = Path::new("/dev/shm").join(&token);
    assert!(outside(place.path(), &script).status.success() && shared.exists(), "the control leaves it");
    std::fs::remove_file(&shared).expect("removed");
    assert_eq!(answer(&inside(place.path(), &script)), "x");
    assert!(!shared.exists());
    assert_eq!(status(inside(&place.path().join("missing"), "echo ran").status), 125);
}

/// managed_proxy: "fails closed without the proxy's environment". A right that nobody has configured is an error, not a
/// run without it.
#[test]
fn an_unknown_option_or_policy_runs_nothing() {
    let workspace = folder();
    for options in
        [&["--policy", "nope"][..], &["--policy", "./nope.toml"], &["--connect-all"], &["--grant=nope"]]
    {
        let mut command = broker();
        command.args(options).arg("--workspace").arg(workspace.path()).args(["--", "touch", "marker"]);
        let output = after("export HTTP_PROXY=http://127.0.0.1:1", &command).output().expect("broker runs");
        assert_eq!(status(output.status), 125, "{options:?}: {output:?}");
        assert!(names(workspace.path()).is_empty(), "{options:?}");
    }
}
