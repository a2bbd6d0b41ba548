//! What is seen and written.

use super::*;

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
