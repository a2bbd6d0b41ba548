//! bubblewrap's own tests (v0.11.1), restated as claims about `broker exec` and in our own words.
//!
//! Each comment names the test of theirs, and what it proves. The oracles are on the host: a marker, a status, a
//! listener, `/proc` of the payload. Where it is harmless the same script runs on the host or in bubblewrap first, to
//! show that it would work without us. Their tests of options that we do not have are left out.

mod peers;

use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use broker_tests::{Running, alive, canary, eventually, field, program};
use peers::{
    after, answer, bash, broker, bubblewrap, calls, content, errnos, folder, host, image, inside, names,
    outside, plant, said, sandbox, status,
};

/// A host process with a token in its arguments.
fn bystander(token: &str) -> Running {
    Running::start(Command::new("bash").args(["-c", "echo up; read -r; :", token]))
}

/// A payload that waits, found on the host by its token.
fn payload(workspace: &Path, script: &str, token: &str) -> (Running, i32) {
    let running = Running::start(sandbox(workspace).args(["bash", "-c", script, token]));
    let confined = running.confined();
    // Init still bears the words of `broker exec`, and with them the token.
    let starts = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        confined.contains(&pid.cast_unsigned()) && line.starts_with(b"bash\0")
    };
    let pid = alive(token).into_iter().find(starts);
    (running, pid.expect("the payload is among the confined processes"))
}

/// A policy of its own in `folder`.
fn policy(folder: &Path, text: &str) -> PathBuf {
    plant(folder, "policy.toml", text);
    folder.join("policy.toml")
}

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

/// test-run: "cannot access /etc/shadow", also where all of / is bound. Here it is not even there.
#[test]
fn the_password_hashes_are_absent() {
    let workspace = folder();
    let shadow = std::fs::read_to_string("/etc/shadow").expect("the tests run as root");
    let line = shadow.lines().next().expect("a line");
    assert!(said(&outside(workspace.path(), "cat /etc/shadow")).contains(line), "the control reads it");
    let output = inside(workspace.path(), "ls -A /etc; cat /etc/shadow /etc/shadow- /etc/gshadow");
    assert!(said(&output).contains("passwd"), "it listed /etc: {output:?}");
    assert!(!said(&output).contains(line) && !answer(&output).contains("shadow"), "{output:?}");
}

/// test-run: "cannot read $UNREADABLE", a file of root's home.
#[test]
fn the_caller_s_home_is_not_mapped() {
    let (token, workspace) = (canary(), folder());
    let home = PathBuf::from(std::env::var_os("HOME").expect("a home"));
    let file = tempfile::Builder::new().prefix(".peer-").tempfile_in(&home).expect("a file at home");
    file.as_file().write_all(token.as_bytes()).expect("written");
    let script =
        format!("cat {0} ~/{1}", file.path().display(), file.path().file_name().unwrap().to_string_lossy());
    assert!(said(&outside(workspace.path(), &script)).contains(&token), "the control reads it");
    assert!(
        !said(&inside(workspace.path(), &script)).contains(&token),
        "a file of the caller's home is read"
    );
}

/// test-run: "can bind a destination over a symlink". Stricter here: an earlier run could have planted the link, so the caller
/// has to name the place itself.
#[test]
fn a_workspace_named_by_a_link_is_refused_and_the_place_named() {
    let place = folder();
    std::fs::create_dir(place.path().join("real")).expect("a directory");
    symlink("real", place.path().join("link")).expect("a link");
    let output = inside(&place.path().join("link"), "echo here > file");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("/real"), "{output:?}");
    assert!(!place.path().join("real/file").exists(), "it ran all the same");
    let output = inside(&place.path().join("real"), "echo here > file");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(content(place.path(), "real/file"), "here\n");
}

/// test-run: "--symlink ... does not overwrite". Making the root never touches what lies in the workspace, though it
/// is named like a part of the root.
#[test]
fn names_of_the_root_in_the_workspace_are_left_alone() {
    let workspace = folder();
    for name in ["dev", "proc", "etc", "usr"] {
        plant(workspace.path(), name, name);
    }
    symlink("/", workspace.path().join("workspace")).expect("a link");
    std::fs::create_dir(workspace.path().join("tmp")).expect("a directory");
    let before = image(workspace.path());
    assert!(inside(workspace.path(), "true").status.success());
    assert_eq!(image(workspace.path()), before);
    outside(workspace.path(), "touch dev");
    assert!(image(workspace.path()) != before, "the image shows a change");
}

/// test-run: "all expected devices were created". And no other, and they work.
#[test]
fn dev_holds_the_usual_nodes_and_no_other() {
    let workspace = folder();
    let output = inside(
        workspace.path(),
        "ls -A /dev | tr '\\n' ' '; for n in null zero full random urandom tty; do [ -c /dev/$n ] || echo no $n; done; \
         echo x > /dev/null || echo null; head -c 3 /dev/zero | cmp -n 3 - <(printf '\\0\\0\\0') || echo zero; \
         (echo x > /dev/full) 2> /dev/null && echo full; [ $(head -c 9 /dev/urandom | wc -c) = 9 ] || echo urandom",
    );
    assert_eq!(
        answer(&output),
        "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero",
        "{output:?}"
    );
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

/// test-run: "error prefixing". A source that is not there is named in one line.
#[test]
fn a_missing_workspace_is_named_in_one_line() {
    let place = folder();
    let missing = place.path().join("missing");
    let output = inside(&missing, "touch made");
    assert_eq!(status(output.status), 125);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.lines().count() == 1 && text.contains(&missing.display().to_string()), "{text}");
    assert!(text.starts_with("broker: "), "{text}");
    assert!(!missing.exists(), "it was created");
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

/// test-run: "bind of / exposes real /tmp", turned round. Each side's temporary files are its own.
#[test]
fn temporary_directories_are_private_both_ways() {
    let (token, left, workspace) = (canary(), canary(), folder());
    let shared = tempfile::Builder::new().prefix(&token).tempfile_in("/tmp").expect("a file");
    let look = "ls -A /tmp /var/tmp /dev/shm /run";
    assert!(said(&outside(workspace.path(), look)).contains(&token), "the control sees it");
    let leave =
        format!("{look}; for d in /tmp /var/tmp /dev/shm /run; do echo > $d/{left} && echo wrote; done");
    let output = inside(workspace.path(), &leave);
    assert!(!said(&output).contains(&token), "{output:?}");
    assert_eq!(answer(&output).matches("wrote").count(), 4, "{output:?}");
    for place in ["/tmp", "/var/tmp", "/dev/shm", "/run"] {
        assert!(!Path::new(place).join(&left).exists(), "left in {place}");
    }
    drop(shared);
}

/// test-run: "/tmp/oldroot, /tmp/newroot are not visible". Nothing of the set-up can be reached afterwards.
#[test]
fn no_remains_of_the_set_up_are_reachable() {
    let workspace = folder();
    let script = "shopt -s nullglob dotglob; printf %s /oldroot* /newroot* /.old* /.pivot* /put_old* /tmp/* /mnt/* /run/*; \
                  grep -cE 'oldroot|newroot' /proc/self/mountinfo; [ /proc/1/root/. -ef / ] || ls /proc/1/root/";
    let output = inside(workspace.path(), script);
    assert_eq!(answer(&output), "0", "{output:?}");
}

/// test-run: "can mount another directory inside /tmp". A workspace that lies in the host's /tmp works under a /tmp of
/// one's own, at the same time.
#[test]
fn a_workspace_in_tmp_works_beside_a_private_tmp() {
    let workspace = tempfile::Builder::new().prefix("peer-").tempdir_in("/tmp").expect("a directory");
    plant(workspace.path(), "in", "host\n");
    let output = inside(workspace.path(), "cp in /tmp/x; cat /tmp/x > out; echo more >> out; ls /tmp");
    assert_eq!(answer(&output), "x", "{output:?}");
    assert_eq!(content(workspace.path(), "out"), "host\nmore\n");
}

/// test-run: "created mount points have the expected permissions". Ours leave nothing at all, in no mode of the
/// workspace; bubblewrap leaves its mount point. A broker that is killed outright leaves empty directories, which the
/// next run takes away.
#[test]
fn no_mount_point_is_left_in_the_workspace() {
    let theirs = folder();
    let mut control = bubblewrap(theirs.path());
    control.args(["--ro-bind", "/dev/null", "/tmp/workspace/.envrc"]);
    assert!(bash(control, "true").status.success());
    assert_eq!(names(theirs.path()), [".envrc"], "the control leaves it");

    let workspace = folder();
    let mode = workspace.path().metadata().expect("there").mode();
    for access in ["ro", "rw"] {
        let named = PathBuf::from(format!("{}:{access}", workspace.path().display()));
        assert!(inside(&named, "true").status.success(), "{access}");
        assert!(names(workspace.path()).is_empty(), "{access}: {:?}", names(workspace.path()));
    }
    let mut running =
        Running::start(sandbox(workspace.path()).args(["bash", "-c", "echo up; read -r; sleep 300; :"]));
    running.child.kill().expect("killed");
    running.child.wait().expect("it ended");
    let left = outside(workspace.path(), "find . -mindepth 1 ! -type d");
    assert_eq!(answer(&left), "", "more than directories is left");
    // The next run waits for nobody: what is left of the last one may still be ending.
    let clean = || inside(workspace.path(), "true").status.success() && names(workspace.path()).is_empty();
    assert!(eventually(10_000, clean), "after SIGKILL and a run: {:?}", names(workspace.path()));
    assert_eq!(workspace.path().metadata().expect("there").mode(), mode);
}

/// test-run: "existing directories keep their permissions".
#[test]
fn the_caller_s_modes_are_untouched() {
    let workspace = folder();
    plant(workspace.path(), "sub/file", "x");
    plant(workspace.path(), ".git/config", "");
    for (name, mode) in
        [("sub/file", 0o000), ("sub", 0o754), (".git/config", 0o640), (".git", 0o750), ("", 0o710)]
    {
        let path = workspace.path().join(name);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
    }
    let before = image(workspace.path());
    assert!(inside(workspace.path(), "true").status.success());
    assert_eq!(image(workspace.path()), before);
}

/// test-run: "tmpfs has the expected permissions", also its parents.
#[test]
fn the_directories_of_the_root_have_the_usual_modes() {
    let workspace = folder();
    let output =
        inside(workspace.path(), "stat -c '%a %n' / /tmp /var/tmp/ /dev/shm /run ~; touch /x || echo kept");
    assert_eq!(
        answer(&output),
        "755 /\n1777 /tmp\n1777 /var/tmp/\n1777 /dev/shm\n755 /run\n700 /home/agent\nkept"
    );
}

/// test-run: "tmpfs has the expected size". In bytes and in inodes, which bubblewrap does not limit.
#[test]
fn a_private_directory_has_the_size_that_the_policy_says() {
    let workspace = folder();
    let script = "head -c 16M /dev/zero > /tmp/f; stat -c %s /tmp/f; rm /tmp/f; \
                  for i in {1..300}; do : > /tmp/$i || break; done; ls /tmp | wc -l";
    let numbers = |output: &Output| -> Vec<u64> {
        answer(output).lines().map(|line| line.parse().expect("a number")).collect()
    };
    let control = numbers(&bash(bubblewrap(workspace.path()), script));
    assert_eq!(control[0], 16 << 20, "the control writes all");
    let place = folder();
    let file = policy(place.path(), "extends = \"default\"\n[files]\ntmp = \"8MiB\"\ninodes = 200\n");
    let mut command = broker();
    command.arg("--policy").arg(file).arg("--");
    let ours = numbers(&bash(command, script));
    assert!(ours[0] > 0 && ours[0] <= 8 << 20, "bytes: {}", ours[0]);
    assert!(ours[1] > 0 && ours[1] <= 200, "inodes: {}", ours[1]);
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

/// test-utils: `has_path_prefix`, by components. What begins like a shown path is not shown.
#[test]
fn a_name_that_begins_like_a_shown_path_is_not_shown() {
    let (token, place) = (canary(), folder());
    plant(place.path(), "shown/file", "shown");
    plant(place.path(), "shown-not/file", &token);
    let (shown, hidden) = (place.path().join("shown"), place.path().join("shown-not"));
    let script = format!("cat file ../shown-not/file /workspace-not/file {}/file", hidden.display());
    assert!(said(&outside(&shown, &script)).contains(&token), "the control reads the sibling");
    for spelling in
        [shown.display().to_string(), format!("{}//", shown.display()), format!("{}/.", shown.display())]
    {
        let output = inside(Path::new(&spelling), &script);
        assert!(answer(&output) == "shown", "{spelling}: {output:?}");
    }
    let file =
        policy(place.path(), &format!("extends = \"default\"\n[files]\nread = [\"{}\"]\n", shown.display()));
    let mut command = broker();
    command.arg("--policy").arg(file).arg("--");
    let output = bash(command, &format!("cat {}/file {}/file", shown.display(), hidden.display()));
    assert_eq!(answer(&output), "shown", "{output:?}");
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

/// Read-only system trees, bubblewrap's `--ro-bind`: no part of the root takes a file, nor can it be made writable.
#[test]
fn the_system_s_trees_take_no_file() {
    let (token, workspace) = (canary(), folder());
    let places = [
        "/",
        "/usr",
        "/usr/bin",
        "/etc",
        "/lib",
        "/bin",
        "/proc",
        "/proc/sys",
        "/dev",
        "/etc/ssl/certs",
        "/var",
    ];
    let script = format!(
        "for d in {}; do touch $d/{token} && echo made $d; done 2> /dev/null; chmod 777 /usr /etc && echo chmod; \
         mount -o remount,rw /usr && echo remount; mount -t tmpfs x /mnt && echo mount; umount /proc/sys && echo umount; \
         echo x >> /etc/passwd && echo passwd; true",
        places.join(" ")
    );
    let output = inside(workspace.path(), &script);
    assert_eq!(answer(&output), "", "{output:?}");
    for place in places {
        assert!(!Path::new(place).join(&token).exists(), "in the host's {place}");
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

/// `--bind` and `--ro-bind`: what the workspace's mode says, as bytes and as errno.
#[test]
fn the_workspace_s_mode_decides_who_may_write() {
    let workspace = folder();
    for (access, expected) in [("ro", "30"), ("rw", "0")] {
        let named = PathBuf::from(format!("{}:{access}", workspace.path().display()));
        let open = format!("perl -e 'print open($f, \">\", \"{access}\") ? 0 : $! + 0'");
        assert_eq!(answer(&inside(&named, &open)), expected, "{access}");
    }
    assert_eq!(names(workspace.path()), ["rw"]);
    let named = PathBuf::from(format!("{}:rx", workspace.path().display()));
    assert_eq!(status(inside(&named, "true").status), 125, "there is no such mode");
}
