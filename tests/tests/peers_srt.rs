//! The tests of Anthropic's sandbox-runtime (`test/sandbox/*.test.ts`), restated as claims about `broker exec` and in
//! our own words.
//!
//! Each comment names the test of theirs, and what it proves. The oracles are on the host: bytes and inodes of a
//! workspace, listeners, `/proc`. The same script runs on the host first where that is harmless: there it works.

mod peers;

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

#[cfg(target_arch = "x86_64")]
use broker_tests::inject::{self, Verdict};
use broker_tests::{Running, alive, canary, eventually};
use peers::{
    after, answer, bash, broker, bubblewrap, calls, content, errnos, folder, host, image, inside, names,
    outside, plant, said, sandbox, status,
};
use tempfile::TempDir;

/// Files that the host runs or obeys later.
const DANGEROUS: [&str; 10] = [
    ".bashrc",
    ".envrc",
    ".git/config",
    ".git/hooks/pre-commit",
    ".gitconfig",
    ".gitmodules",
    ".idea/workspace.xml",
    ".mcp.json",
    ".profile",
    ".vscode/settings.json",
];

/// A workspace with all of [`DANGEROUS`].
fn furnished() -> TempDir {
    let workspace = folder();
    for name in DANGEROUS {
        plant(workspace.path(), name, "original\n");
    }
    workspace
}

/// Set for a test that runs in a process of its own.
#[cfg(target_arch = "x86_64")]
const ALONE: &str = "PEERS_ALONE";

/// mandatory-deny-paths: "Dangerous files" and "Dangerous directories", fifteen tests of one verb each. No verb changes
/// a protected file that is there.
#[test]
fn a_protected_file_changes_by_no_verb() {
    let script = format!(
        "for f in {}; do echo bad > $f; echo bad >> $f; echo bad > new; mv -f new $f; ln -f $f link; ln -sf new $f; \
         rm -f $f; chmod 777 $f; touch -d @0 $f; truncate -s 0 $f; cp --remove-destination /etc/passwd $f; \
         install -m 755 /etc/passwd $f; mv $f moved; [ link -ef $f ] && echo linked; rm -f link new moved; done; true",
        DANGEROUS.join(" ")
    );
    let control = furnished();
    let before = image(control.path());
    outside(control.path(), &script);
    assert!(image(control.path()) != before, "the control changes them");
    let workspace = furnished();
    let before = image(workspace.path());
    let output = inside(workspace.path(), &script);
    assert_eq!(answer(&output), "", "{output:?}");
    assert_eq!(image(workspace.path()), before);
}

/// mandatory-deny-paths: "Safe files still writable". git goes on working beside the protected paths.
#[test]
fn the_rest_of_a_repository_stays_writable() {
    let workspace = folder();
    assert!(outside(workspace.path(), "git init -q . && echo one > file").status.success());
    let commit =
        "git add -A && git -c user.name=a -c user.email=a@example.org commit -qm inside && echo two > other";
    let output = inside(workspace.path(), &format!("{commit}; git config a.b c && echo configured; true"));
    assert_eq!(answer(&output), "", "{output:?}");
    assert_eq!(
        answer(&outside(workspace.path(), "git log --format=%s; git config a.b; git ls-files")),
        "inside\nfile"
    );
    assert_eq!(content(workspace.path(), "other"), "two\n");
}

/// linux-ancestor-pin: "absent-path stub"; readonly-deny-dir-stubs. A protected path that is absent cannot be made, and
/// nothing stands in its place afterwards, when bubblewrap leaves a file.
#[test]
fn an_absent_protected_path_cannot_be_made() {
    let script = "mkdir -p .git/hooks; echo bad > .git/hooks/pre-commit; echo bad > .envrc; ln -s /tmp .vscode; \
                  mkfifo .bashrc; git init -q .; mkdir .idea/x; rmdir .envrc && echo bad > .envrc; \
                  mv .profile .p && echo bad > .profile; echo bad > .mcp.json";
    let control = folder();
    outside(control.path(), script);
    assert!(
        control.path().join(".git/hooks/pre-commit").exists() && control.path().join(".vscode").is_symlink()
    );
    let workspace = folder();
    inside(workspace.path(), script);
    assert!(names(workspace.path()).is_empty(), "{:?}", names(workspace.path()));
    // While it runs there is nothing but empty directories in their places, that the host obeys in no way.
    let during = folder();
    let line = format!("({script}) > /dev/null 2>&1; echo up; read -r");
    let running = Running::start(sandbox(during.path()).args(["bash", "-c", &line]));
    assert_eq!(answer(&outside(during.path(), "find . -mindepth 1 ! -type d")), "");
    assert_eq!(answer(&outside(during.path(), "find .git/hooks .envrc -mindepth 1")), "");
    running.finish();
    assert!(names(during.path()).is_empty(), "{:?}", names(during.path()));
}

/// srt cleans up the stubs that a killed run left, by name and size. Ours may cost nobody a file, though the host makes
/// one meanwhile that has the name, and perhaps the inode number, of what was left.
#[test]
fn what_a_killed_run_left_costs_nobody_a_file() {
    let workspace = folder();
    let left =
        [".bashrc", ".envrc", ".gitconfig", ".gitmodules", ".mcp.json", ".profile", ".ripgreprc", ".zshrc"];
    let mut running = Running::start(sandbox(workspace.path()).args(["bash", "-c", "echo up; read -r; :"]));
    let number = |name: &&str| workspace.path().join(name).symlink_metadata().map(|about| about.ino()).ok();
    let numbers: Vec<_> = left.iter().filter_map(number).collect();
    running.child.kill().expect("killed");
    running.child.wait().expect("it ended");
    // One by one, so that each is likely to get the number that has just become free.
    for name in left {
        std::fs::remove_dir(workspace.path().join(name)).expect("it was left");
        plant(workspace.path(), name, "original\n");
    }
    outside(workspace.path(), "find . -mindepth 1 -type d -empty -delete");
    // Whether the filesystem gives the same numbers again is its own affair; ext4 does.
    let reused = left.iter().filter_map(number).filter(|number| numbers.contains(number)).count();
    let before = image(workspace.path());
    assert!(inside(workspace.path(), "true").status.success());
    assert_eq!(image(workspace.path()), before, "{reused} numbers were used again");
}

/// readonly-deny-dir-stubs: "bwrap still boots". Absent protected paths are no reason not to start where nothing can be
/// made: in a read-only workspace, and in one that its owner may not write.
#[test]
fn a_workspace_that_cannot_be_written_still_starts() {
    let workspace = folder();
    let read_only = PathBuf::from(format!("{}:ro", workspace.path().display()));
    assert_eq!(answer(&inside(&read_only, "echo ran")), "ran");
    std::fs::set_permissions(workspace.path(), std::fs::Permissions::from_mode(0o555)).expect("chmod");
    assert_eq!(answer(&inside(&read_only, "echo ran")), "ran");
    assert_eq!(answer(&inside(workspace.path(), "echo ran; echo x > file; true")), "ran");
    assert!(names(workspace.path()).is_empty());
    assert_eq!(workspace.path().metadata().expect("there").mode() & 0o7777, 0o555);
}

/// linux-ancestor-pin: "renaming .git aside". A parent of a protected file is not moved away and made again.
#[test]
fn the_parents_of_a_protected_file_do_not_move() {
    let script = "mv .git aside && mkdir .git && echo planted > .git/config";
    let control = furnished();
    assert!(outside(control.path(), script).status.success());
    assert_eq!(content(control.path(), ".git/config"), "planted\n", "the control plants it");
    // A mount on the file alone does not hold: this is what bubblewrap's users write.
    let leaf = furnished();
    let mut command = bubblewrap(leaf.path());
    command.args(["--ro-bind"]).arg(leaf.path().join(".git/config")).arg("/tmp/workspace/.git/config");
    bash(command, script);
    assert_eq!(content(leaf.path(), ".git/config"), "planted\n", "the control in bubblewrap plants it");
    let workspace = furnished();
    let before = image(workspace.path());
    assert!(!inside(workspace.path(), script).status.success());
    assert_eq!(image(workspace.path()), before);
}

/// linux-ancestor-pin: "rmdir and exchange-rename".
#[test]
fn the_parents_of_a_protected_file_are_not_exchanged() {
    let exchange = |first: &str, second: &str| {
        let number = libc::SYS_renameat2;
        // Perl hands no constant string to a system call.
        let strings = format!("$a = \"{first}\"; $b = \"{second}\"; $! = 0");
        format!("perl -e '{strings}; $r = syscall({number}, -100, $a, -100, $b, 2); print \"$r \", $! + 0'")
    };
    let script = format!("mkdir -p e/hooks; echo bad > e/config; {}; mv -T e .git", exchange(".git", "e"));
    let control = furnished();
    assert!(answer(&outside(control.path(), &script)).starts_with("0 0"), "the control exchanges");
    let workspace = furnished();
    let before = image(workspace.path());
    let output = inside(workspace.path(), &format!("{script}; rm -r e"));
    assert_eq!(errnos(&output), [libc::EBUSY], "{output:?}");
    assert_eq!(image(workspace.path()), before);
    let output = inside(workspace.path(), &format!("echo bad > e; {}; rm e", exchange(".bashrc", "e")));
    assert_eq!(errnos(&output), [libc::EBUSY], "{output:?}");
    assert_eq!(image(workspace.path()), before);
}

/// linux-ancestor-pin: "git and cross-directory renames work". What is held does not get into the way of the rest.
#[test]
fn ordinary_files_and_directories_still_move() {
    let workspace = furnished();
    plant(workspace.path(), "a/file", "x");
    let output = inside(
        workspace.path(),
        "perl -e 'rename(\"a/file\", \"file\") && rename(\"a\", \"b\") && rename(\"file\", \"b/file\") or die \"$!\"' && \
         mv b .git/b && rm -r .git/b && mkdir -p sub/.github && mv sub c",
    );
    assert!(output.status.success(), "{output:?}");
    assert!(workspace.path().join("c/.github").is_dir() && !workspace.path().join("a").exists());
}

/// symlinked-deny-paths: relative, absolute, dangling, cyclic; mandatory-deny-paths: "symlink replacement". A protected
/// name that is a link is refused before anything runs, so neither the link nor what it leads to changes.
#[test]
fn a_protected_name_that_is_a_link_is_refused() {
    let script = "rm -rf .vscode .git .bashrc; mkdir .vscode .git; echo bad > .vscode/settings.json; echo bad > .bashrc";
    let outside_it = folder();
    plant(outside_it.path(), "settings.json", "original");
    let absolute = outside_it.path().display().to_string();
    for (name, target) in [
        (".vscode", "real"),
        (".vscode", absolute.as_str()),
        (".git", absolute.as_str()),
        (".bashrc", "nowhere"),
        (".git", "../outside"),
        (".git", ".git"),
        (".envrc", "/etc/passwd"),
    ] {
        let workspace = folder();
        plant(workspace.path(), "real/settings.json", "original");
        symlink(target, workspace.path().join(name)).expect("a link");
        let before = (image(workspace.path()), image(outside_it.path()));
        let output = inside(workspace.path(), script);
        assert_eq!(status(output.status), 125, "{name} -> {target}: {output:?}");
        assert!(
            said(&output).contains(name) && said(&output).lines().count() == 1,
            "{name} -> {target}: {output:?}"
        );
        assert_eq!((image(workspace.path()), image(outside_it.path())), before, "{name} -> {target}");
        outside(workspace.path(), script);
        assert!(image(workspace.path()) != before.0, "the control replaces {name}");
    }
}

/// integration: "symlink-based escape"; symlink-write-path, symlink-boundary. Links of the workspace, the host's or
/// one's own, lead nowhere outside of it.
#[test]
fn links_lead_nowhere_out_of_the_workspace() {
    let (token, place) = (canary(), folder());
    plant(place.path(), "secret", &token);
    plant(place.path(), "out/file", "original\n");
    std::fs::create_dir(place.path().join("workspace")).expect("a directory");
    let workspace = place.path().join("workspace");
    symlink("..", workspace.join("up")).expect("a link");
    symlink(place.path().join("out"), workspace.join("across")).expect("a link");
    let far = place.path().display().to_string();
    let script = format!(
        "cat up/secret {far}/secret /proc/self/cwd/../secret; echo bad > across/file; echo bad > up/new; ln -s {far}/out own; \
         echo bad > own/file; ln -s ../../../../../../..{far}/secret s; cat s; cat /proc/1/root{far}/secret"
    );
    let before = image(&place.path().join("out"));
    let output = inside(&workspace, &script);
    assert!(!said(&output).contains(&token), "{output:?}");
    assert_eq!(image(&place.path().join("out")), before);
    assert!(!place.path().join("new").exists());
    let control = outside(&workspace, &script);
    assert!(said(&control).contains(&token) && place.path().join("new").exists(), "the control goes through");
}

/// symlink-write-path: the directory to be shared is itself a link that leads nowhere, or no directory.
#[test]
fn a_workspace_that_is_no_directory_is_refused() {
    let place = folder();
    symlink("nowhere", place.path().join("dangling")).expect("a link");
    symlink("cycle", place.path().join("cycle")).expect("a link");
    plant(place.path(), "file", "");
    for name in ["dangling", "cycle", "file", "file/", "absent/.."] {
        let output = inside(&place.path().join(name), "echo ran");
        assert_eq!((status(output.status), answer(&output).as_str()), (125, ""), "{name}: {output:?}");
    }
    assert_eq!(names(place.path()), ["cycle", "dangling", "file"]);
}

/// symlink-write-path: "cannot be resolved"; linux-ancestor-pin-errno; and bubblewrap's fault injection for "pre-exec
/// failure". A call of the set-up that fails stops it. As in srt, that the fault was met is part of the oracle.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_set_up_call_that_fails_stops_everything() {
    // The tracer waits for every child of its process, so it has one to itself: this test alone, once more.
    if std::env::var_os(ALONE).is_none() {
        let mut alone = Command::new(std::env::current_exe().expect("the test knows its own path"));
        alone.args(["--exact", "a_set_up_call_that_fails_stops_everything"]).env(ALONE, "1");
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
