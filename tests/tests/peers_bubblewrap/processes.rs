//! Namespaces, privilege, signals and sockets.

use super::*;

/// test-run: "can mount /proc". The new /proc is that of the new pid namespace, so no host process shows in it.
#[test]
fn proc_shows_none_of_the_host_s_processes() {
    let (token, workspace) = (canary(), folder());
    let _bystander = bystander(&token);
    let script = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
    assert!(said(&outside(workspace.path(), script)).contains(&token), "the control sees the bystander");
    let output = inside(workspace.path(), script);
    assert!(said(&output).contains("bash -c"), "it saw itself: {output:?}");
    assert!(!said(&output).contains(&token), "a host process shows: {output:?}");
}

/// test-run: "can unshare network, create new /dev". There is a loopback only and no route. Oracle: listeners of the
/// host on loopback and on the machine's own address count who comes.
#[test]
fn no_listener_of_the_host_is_reached() {
    let workspace = folder();
    let listener = TcpListener::bind("0.0.0.0:0").expect("a listener");
    listener.set_nonblocking(true).expect("non-blocking");
    let port = listener.local_addr().expect("its address").port();
    let probe = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let own = probe.connect("192.0.2.1:9").and_then(|()| probe.local_addr());
    let mut addresses = vec!["127.0.0.1".to_owned()];
    addresses.extend(own.map(|address| address.ip().to_string()));
    for address in addresses {
        let script = format!("exec 3<>/dev/tcp/{address}/{port} && echo reached");
        assert_eq!(
            answer(&outside(workspace.path(), &script)),
            "reached",
            "the control connects to {address}"
        );
        assert!(listener.accept().is_ok(), "the control is counted at {address}");
        assert_eq!(answer(&inside(workspace.path(), &script)), "", "{address} is reached");
        assert!(listener.accept().is_err(), "somebody came to {address}");
    }
    let view = inside(
        workspace.path(),
        "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '; wc -l < /proc/net/route",
    );
    let lines = answer(&view);
    assert_eq!(lines.lines().next(), Some("lo"));
    assert!(lines.lines().count() == 2, "another interface: {lines}");
}

/// test-run: "can run as pid 1". There is a pid namespace, and an init that is not the payload. Oracle: NSpid of the
/// payload, read on the host.
#[test]
fn the_payload_has_a_pid_of_its_own_namespace() {
    let (token, workspace) = (canary(), folder());
    let (running, pid) = payload(workspace.path(), "echo $$; read -r; :", &token);
    let state = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the payload runs");
    let numbers: Vec<&str> = field(&state, "NSpid").split_whitespace().collect();
    assert!(numbers.len() > 1, "no namespace of its own: {numbers:?}");
    assert_eq!(numbers.last(), Some(&running.first_line.trim()));
    assert!(numbers.last() != Some(&"1"), "the payload is init and would get its duties");
    let bystander = bystander(&canary());
    let own = std::fs::read_to_string(format!("/proc/{}/status", bystander.child.id())).expect("it runs");
    assert!(numbers.len() > field(&own, "NSpid").split_whitespace().count(), "the control has as many");
}

/// test-run: the namespace ids of `--info-fd`. Every kind is new, and two sandboxes share none. Oracle: the links in
/// the payload's /proc on the host.
#[test]
fn every_namespace_is_new_and_shared_with_no_other_sandbox() {
    let (first, second, workspace) = (canary(), canary(), folder());
    let (one, pid) = payload(workspace.path(), "echo up; read -r; :", &first);
    let (two, other) = payload(folder().path(), "echo up; read -r; :", &second);
    let link =
        |pid: &str, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace");
    for kind in ["mnt", "pid", "net", "ipc", "uts", "user", "cgroup"] {
        let all = [link("self", kind), link(&pid.to_string(), kind), link(&other.to_string(), kind)];
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2], "{kind}: {all:?}");
    }
    drop((one, two));
}

/// test-run: "can mount /proc recursively", sandboxes in sandboxes. Here another one is refused, cleanly.
#[test]
fn a_sandbox_cannot_be_made_inside() {
    let workspace = folder();
    let copied = Command::new("cp").arg(program("broker")).arg(workspace.path()).status().expect("cp runs");
    assert!(copied.success());
    let nested = "bwrap --ro-bind / / echo ran";
    assert_eq!(answer(&outside(workspace.path(), nested)), "ran", "the control makes one");
    let output = inside(workspace.path(), nested);
    assert!(!output.status.success() && answer(&output).is_empty(), "{output:?}");
    let output = inside(workspace.path(), "./broker exec --embedded -- echo ran");
    assert_eq!(status(output.status), 125, "{output:?}");
    assert_eq!(answer(&output), "");
}

/// test-run: "can disable nested userns", the weakest call and the attempt to raise the limit again. It is always off.
#[test]
fn no_user_namespace_and_no_way_to_allow_one() {
    let workspace = folder();
    let limit = "/proc/sys/user/max_user_namespaces";
    let before = std::fs::read_to_string(limit).expect("the limit");
    assert!(bash(bubblewrap(workspace.path()), "unshare -U true").status.success(), "the control makes one");
    let output = inside(
        workspace.path(),
        &format!(
            "unshare -U true && echo made; echo 100 2> /dev/null > {limit} && echo raised; unshare -U true && echo made; \
             unshare -m true && echo mounts; unshare -n true && echo network; true"
        ),
    );
    assert_eq!(answer(&output), "", "{output:?}");
    assert_eq!(std::fs::read_to_string(limit).expect("the limit"), before);
}

/// test-run: "we have no caps as uid != 0", four ways. All five sets are empty in every process, init included, and so
/// are the other marks of a process that gains nothing. Oracle: /proc on the host.
#[test]
fn no_process_inside_has_a_capability() {
    let (token, workspace) = (canary(), folder());
    let (running, _) = payload(workspace.path(), "sleep 60 & echo up; read -r; kill $!", &token);
    let statuses = running.statuses();
    assert!(statuses.len() >= 3, "init, bash and sleep: {statuses:?}");
    for (path, text) in statuses {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(&text, set), "0000000000000000", "{set} of {}", path.display());
        }
        assert_eq!((field(&text, "NoNewPrivs"), field(&text, "Seccomp")), ("1", "2"), "{}", path.display());
    }
    assert!(
        outside(workspace.path(), "grep -q 'CapEff:.*[1-9a-f]' /proc/self/status").status.success(),
        "the control"
    );
}

/// test-run: "we have the expected caps as uid 0". A root caller's payload is no root for the kernel, what it writes
/// belongs to the caller, and the kernel's settings stay shut.
#[test]
fn a_root_caller_s_payload_is_nobody_on_the_host() {
    let (token, workspace) = (canary(), folder());
    let core = ": 3>> /proc/sys/kernel/core_pattern && echo opened";
    assert_eq!(answer(&bash(host(workspace.path()), core)), "opened", "the control, as root");
    let (running, pid) = payload(workspace.path(), "echo mine > file; echo up; read -r; :", &token);
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the payload runs");
    for name in ["Uid", "Gid"] {
        assert!(field(&text, name).split_whitespace().all(|id| id != "0"), "{name}: {}", field(&text, name));
    }
    assert_eq!(field(&text, "Groups"), "");
    assert!(running.finish().success());
    let owner = workspace.path().join("file").metadata().expect("it was written");
    assert_eq!(owner.uid(), workspace.path().metadata().expect("there").uid());
    assert_eq!(answer(&inside(workspace.path(), core)), "");
}

/// test-run: "--die-with-parent", with a lock as the oracle. Killing what the caller started kills all of it.
#[test]
fn a_killed_broker_takes_the_payload_with_it() {
    let (token, other, workspace) = (canary(), canary(), folder());
    plant(workspace.path(), "lock", "");
    let script = "exec 9> lock; flock 9; echo up; trap '' TERM HUP; sleep 300; :";
    let free = || outside(workspace.path(), "flock -n lock true").status.success();

    let mut control = Running::start(bubblewrap(workspace.path()).args(["bash", "-c", script, &token]));
    control.child.kill().expect("killed");
    control.child.wait().expect("it ended");
    assert!(!free(), "the control survives bubblewrap");
    for pid in alive(&token) {
        Command::new("kill").args(["-9", &pid.to_string()]).status().expect("kill runs");
    }
    assert!(eventually(10_000, free), "the control is over");

    let mut ours = Running::start(sandbox(workspace.path()).args(["bash", "-c", script, &other]));
    assert!(!free(), "the payload holds the lock");
    ours.child.kill().expect("killed");
    assert!(eventually(10_000, free), "the payload outlived its supervisor");
    assert!(eventually(10_000, || alive(&other).is_empty()));
}

/// test-seccomp: "no seccomp", "allowlist", with their trick: a call with impossible arguments shows by its errno
/// whether it was reached. On the host and in bubblewrap each of these is.
#[test]
fn the_filter_lets_through_what_is_listed_and_nothing_else() {
    let workspace = folder();
    let none = [-1, 0, 0, 0, 0];
    let call = |number: i64| -> Vec<i64> { [&[number][..], &none].concat() };
    let chmod = [libc::SYS_fchmodat, -100, -1, 0];
    let listed: [&[i64]; 2] = [&chmod, &[libc::SYS_listen, -1, 1]];
    let unlisted: Vec<Vec<i64>> = [
        libc::SYS_chroot,
        libc::SYS_setns,
        libc::SYS_pidfd_getfd,
        libc::SYS_open_by_handle_at,
        libc::SYS_mount_setattr,
    ]
    .map(call)
    .to_vec();
    let script = calls(&listed) + "; " + &calls(&unlisted.iter().map(Vec::as_slice).collect::<Vec<_>>());
    for control in [outside(workspace.path(), &script), bash(bubblewrap(workspace.path()), &script)] {
        assert_eq!(errnos(&control)[..2], [libc::EFAULT, libc::EBADF], "{control:?}");
    }
    let host = errnos(&outside(workspace.path(), &script));
    assert!(
        host[2..].iter().all(|errno| *errno != libc::EPERM && *errno != libc::ENOSYS),
        "reached: {host:?}"
    );
    let ours = errnos(&inside(workspace.path(), &script));
    assert_eq!(ours[..2], [libc::EFAULT, libc::EBADF]);
    assert_eq!(ours[2..], [libc::EPERM; 5]);
    // A clone3(2) that does not exist makes the C library fall back to clone(2), whose flags a filter can read.
    let clone3 = calls(&[&[libc::SYS_clone3, -1, 64]]);
    assert_eq!(errnos(&outside(workspace.path(), &clone3)), [libc::EFAULT]);
    assert_eq!(errnos(&inside(workspace.path(), &clone3)), [libc::ENOSYS]);
}

/// test-seccomp: TIOCSTI, with CVE-2019-10063: the kernel looks at 32 bits of the request, so must the filter.
#[test]
fn typing_into_a_terminal_is_refused_whatever_the_high_bits() {
    let workspace = folder();
    let request = i64::try_from(libc::TIOCSTI).expect("it fits");
    let script = calls(&[
        &[libc::SYS_ioctl, -1, request, 0],
        &[libc::SYS_ioctl, -1, request | 0x123 << 32, 0],
        &[libc::SYS_ioctl, -1, request | i64::MIN, 0],
    ]);
    assert_eq!(
        errnos(&bash(bubblewrap(workspace.path()), &script)),
        [libc::EBADF; 3],
        "the control reaches it"
    );
    assert_eq!(errnos(&inside(workspace.path(), &script)), [libc::EPERM; 3]);
}

/// test-seccomp: "stacked filters". No process inside has fewer of them than another, the children of children included.
#[test]
fn every_process_inside_has_the_same_filters() {
    let workspace = folder();
    let script = "(bash -c 'sleep 60; :' & sleep 60; :) & setsid sleep 60 & echo up; read -r; kill 0";
    let running = Running::start(sandbox(workspace.path()).args(["bash", "-c", script]));
    let all = |text: &str| (field(text, "Seccomp").to_owned(), field(text, "Seccomp_filters").to_owned());
    assert!(eventually(10_000, || running.statuses().len() >= 6), "{:?}", running.statuses());
    let statuses = running.statuses();
    for (path, text) in &statuses {
        assert_eq!(all(text), ("2".to_owned(), "1".to_owned()), "{}", path.display());
    }
}

/// test-specifying-userns, test-specifying-pidns, turned round: nobody inside enters a namespace by its name.
#[test]
fn nobody_inside_joins_a_namespace() {
    let workspace = folder();
    assert!(outside(workspace.path(), "nsenter -t $$ -m true").status.success(), "the control joins");
    let script = "for n in mnt pid net ipc uts user cgroup; do for p in 1 self $PPID; do \
                  nsenter --$([ $n = mnt ] && echo mount || echo $n)=/proc/$p/ns/$n true && echo joined $n; done; done; \
                  perl -e 'open($f, \"<\", \"/proc/self/ns/net\") or die; print syscall(308, fileno($f), 0), \" \", $! + 0'";
    let script = script.replace("308", &libc::SYS_setns.to_string());
    let output = inside(workspace.path(), &script);
    assert_eq!(answer(&output), format!("-1 {}", libc::EPERM), "{output:?}");
}

/// bubblewrap's init reaps, though no test says so. Oracle: zombies among the confined processes, seen on the host.
#[test]
fn orphans_are_reaped() {
    let workspace = folder();
    let script = "for i in {1..200}; do (true &); done; echo up; read -r";
    let running = Running::start(sandbox(workspace.path()).args(["bash", "-c", script]));
    let zombie = |text: &String| field(text, "State").starts_with('Z');
    let zombies = || running.statuses().into_iter().map(|(_, text)| text).filter(zombie).count();
    assert!(eventually(10_000, || zombies() == 0), "{} zombies", zombies());
    assert!(running.confined().len() <= 3, "init and the payload: {:?}", running.confined());
    running.finish();
}

/// `--new-session`, which bubblewrap leaves to the caller. The caller's terminal is no terminal of the payload's.
#[test]
fn the_caller_s_terminal_cannot_be_opened() {
    let (token, workspace) = (canary(), folder());
    let script = format!("echo {token} > /dev/tty; :");
    let under = |command: &Command| {
        let words = command.get_args().map(|word| format!("'{}'", word.to_string_lossy()));
        let line = format!("'{}' {}", command.get_program().display(), words.collect::<Vec<_>>().join(" "));
        let mut terminal = Command::new("script");
        terminal.args(["-qec", &line, "/dev/null"]).stdin(std::process::Stdio::null());
        said(&terminal.output().expect("script runs"))
    };
    let with = |mut command: Command| {
        command.args(["bash", "-c", &script]);
        under(&command)
    };
    // `script` and the shell echo no command line, so the token comes from the write alone; an error does not name it.
    assert!(with(bubblewrap(workspace.path())).contains(&token), "the control writes to the terminal");
    let log = with(sandbox(workspace.path()));
    assert!(!log.contains(&token) && log.contains("/dev/tty"), "{log}");
}
