//! Names, links and descriptors.

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use broker_tests::{Sandbox, assert_refused, canary, cases, cases_in, program, until_ready};

use super::{Planted, Running, assert_errno, copy, folder, held, with_workspace};

/// FS-01. Method: canaries that anybody may read, where secrets use to lie; each is opened by its name, then
/// a search by name and by content goes over everything that can be seen. Oracle: the token of this run.
#[test]
fn fs_01_host_secrets_are_absent() {
    let token = canary();
    let places = [
        "/root",
        "/root/.ssh",
        "/root/.aws",
        "/root/.config/gh",
        "/home",
        "/tmp",
        "/var/tmp",
        "/var/lib",
        "/var/lib/broker",
        "/run",
        "/run/secrets",
        "/dev/shm",
        "/opt",
        "/srv",
        "/mnt",
        "/etc",
    ];
    let planted: Vec<Planted> = places.map(|place| Planted::new(&format!("{place}/{token}"), &token)).into();
    let mut paths: Vec<String> = planted.iter().map(Planted::text).collect();
    paths.extend(["/etc/shadow", "/etc/gshadow", "/etc/ssh", "/root", "/var/log"].map(String::from));

    let sandbox = Sandbox::new();
    let inside = sandbox.probe("FS-01", &paths);
    assert_refused("FS-01", &sandbox.control("FS-01", &paths), &inside, &["/etc/ssh"]);
    assert_errno("FS-01", &inside, &[libc::ENOENT, libc::EACCES]);

    let search = |places: &str| {
        format!(
            "find {places} -path /proc -prune -o -name '*{token}*' -print 2>/dev/null; \
             grep -rlaF --exclude-dir=usr --exclude-dir=proc --exclude-dir=lib {token} {places} 2>/dev/null; echo done"
        )
    };
    let control = Command::new("sh").args(["-c", &search("/srv /opt/CANARY*")]).output().expect("sh runs");
    assert!(String::from_utf8_lossy(&control.stdout).contains(&token), "the search finds what is there");
    let output = sandbox.shell(&search("/"));
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        text.trim(),
        "done",
        "FS-01: the search inside found: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// FS-02. Method: the links of every process that can be seen, first those of PID 1. On the host a process of
/// ours stands for it. Oracle: a canary that only another root can show.
#[test]
fn fs_02_links_of_processes_lead_nowhere() {
    let (token, place) = (canary(), folder("fs-02-"));
    let secret = place.path().join("secret");
    std::fs::write(&secret, &token).expect("the canary is written");
    let sandbox = Sandbox::new();
    let mut sleep = Command::new("sleep");
    let victim = Running::start(&mut held(&sandbox, Path::new("/"), &secret, sleep.arg("60")));
    let secret = secret.display().to_string();
    let pid = victim.0.id().to_string();
    // Until it is `sleep`, with the descriptors in place.
    let sleeps =
        || std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sleep");
    assert!(broker_tests::within(Duration::from_secs(5), sleeps), "the victim of the control starts");

    let inside = sandbox.probe("FS-02", &[&secret, "all"]);
    assert_refused("FS-02", &sandbox.control("FS-02", &[&secret, &pid]), &inside, &[]);
    let (links, sweeps) = inside.split_at(4);
    assert_errno("FS-02", links, &[libc::EACCES]);
    assert_errno("FS-02", sweeps, &[libc::EACCES, libc::ENOENT]);
}

/// FS-03 (CVE-2019-5736). Method: an `O_PATH` descriptor of the runtime's program is opened again for writing
/// for as long as the run lasts, and a script names `/proc/self/exe` as its interpreter. On the host the
/// victim is a copy that ends. Oracle: content and times of the binaries, compared by the host.
#[test]
fn fs_03_the_runtime_cannot_be_overwritten() {
    let (workspace, place) = (folder("fs-03-"), folder("fs-03-host-"));
    let sandbox = with_workspace(workspace.path());
    let victim = place.path().join("victim");
    copy(&sandbox.probe_path(), &victim);
    let mut running = Running::start(Command::new(&victim).args(["FS-03", "wait", "300"]));
    let pid = running.0.id().to_string();
    let reaper = std::thread::spawn(move || running.0.wait());
    let control = sandbox.control("FS-03", &[&pid, "5000"]);
    reaper.join().expect("joined").expect("the victim ends");

    let binaries = [program("broker"), sandbox.probe_path()];
    let look = |path: &PathBuf| {
        let about = std::fs::metadata(path).expect("there");
        (std::fs::read(path).expect("readable"), about.mtime(), about.mtime_nsec(), about.ino())
    };
    let before = binaries.each_ref().map(look);
    let inside = sandbox.probe("FS-03", &["1", "400"]);
    assert_refused("FS-03", &control, &inside, &[]);

    let script = workspace.path().join("script");
    std::fs::write(&script, "#!/proc/self/exe exec\n").expect("the script is written");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let output = sandbox.command().arg("/workspace/script").output().expect("broker runs");
    assert!(!output.status.success(), "FS-03: a script ran the runtime: {output:?}");
    assert!(before == binaries.each_ref().map(look), "FS-03: a binary changed");
}

/// FS-08. Method: links of every kind in the workspace, made inside and planted by the host, read and written
/// through. Oracle: the canary's content on the host.
#[test]
fn fs_08_symlinks_do_not_leave_the_sandbox() {
    let (token, place) = (canary(), folder("fs-08-host-"));
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let secret = place.path().join("secret");
    std::fs::write(&secret, &token).expect("the canary is written");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o666)).expect("chmod");
    let plant = |workspace: &Path| {
        symlink(&secret, workspace.join("planted-absolute")).expect("a link");
        symlink(
            Path::new("../../../..").join(secret.strip_prefix("/").expect("absolute")),
            workspace.join("planted-relative"),
        )
        .expect("a link");
    };
    let (free, workspace) = (folder("fs-08-"), folder("fs-08-"));
    plant(free.path());
    plant(workspace.path());

    let target = secret.display().to_string();
    let sandbox = with_workspace(workspace.path());
    let control = sandbox.control("FS-08", &[&*free.path().to_string_lossy(), &target]);
    std::fs::write(&secret, &token).expect("the canary is written again");
    let inside = sandbox.probe("FS-08", &["/workspace", &target]);
    assert_refused("FS-08", &control, &inside, &[]);
    assert_errno("FS-08", &inside, &[libc::ENOENT, libc::ELOOP, libc::EROFS, libc::EACCES]);
    assert_eq!(std::fs::read_to_string(&secret).expect("readable"), token, "FS-08: the host's file changed");
}

/// FS-09. Method: a file is created in every directory from `/` on; the places that let it are compared with
/// the policy's. Oracle: the times of the host's directories that are shown inside.
#[test]
fn fs_09_only_the_policys_places_can_be_written() {
    let (workspace, free, name) = (folder("fs-09-"), folder("fs-09-"), canary());
    std::fs::create_dir_all(free.path().join("a/b")).expect("directories");
    let sandbox = with_workspace(workspace.path());
    let control = sandbox.control("FS-09", &[&*free.path().to_string_lossy(), &name]);
    assert_eq!(control[0].name, free.path().to_string_lossy(), "FS-09: the control writes where it can");

    let times = || -> Vec<(PathBuf, SystemTime)> {
        let below = |path: &Path| {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.path())
                .filter(|path| path.is_dir() && !path.is_symlink())
                .collect::<Vec<_>>()
        };
        // Not where other tests plant their canaries meanwhile.
        let mut all = vec![PathBuf::from("/"), "/usr".into(), "/etc/ssl".into()];
        all.extend(below(Path::new("/usr")));
        all.extend(below(Path::new("/usr/lib")));
        all.into_iter()
            .map(|path| (path.clone(), path.metadata().and_then(|about| about.modified()).expect("a time")))
            .collect()
    };
    let before = times();
    let inside = sandbox.probe("FS-09", &["/", &name]);
    let found: BTreeSet<&str> = inside.iter().map(|case| case.name.as_str()).collect();
    let expected = BTreeSet::from(["/tmp", "/run", "/dev/shm", "/home/agent", "/workspace"]);
    assert_eq!(found, expected, "FS-09: what can be written is not what the policy says");
    assert_eq!(before, times(), "FS-09: a directory of the host changed");
}

/// FS-18. Method: the caller has directories, files, sockets and event descriptors open at low numbers, 500
/// and 1500, none close-on-exec. Oracle: `F_GETFD` on every number.
#[test]
fn fs_18_descriptors_of_the_caller_are_not_inherited() {
    let sandbox = Sandbox::new();
    let file = sandbox.probe_path();
    let mut plain = Command::new(&file);
    let control = cases(&mut held(&sandbox, Path::new("/root"), &file, plain.args(["FS-18", "list"])));
    let mut command = sandbox.command();
    let inside =
        cases(&mut held(&sandbox, Path::new("/root"), &file, command.arg(&file).args(["FS-18", "list"])));
    assert_refused("FS-18", &control, &inside, &[]);
    for number in [3, 20, 500, 1500] {
        assert!(
            control[0].detail.contains(&format!("{number} ")),
            "FS-18: the control holds {number}: {control:?}"
        );
    }
}

/// FS-18, the three that are passed. Method: the caller's standard streams are a file open for reading and
/// writing, a socket and a directory. Oracle: device and inode of what is at 0, 1 and 2 inside, which must be
/// none of the caller's; the file's content afterwards.
#[test]
fn fs_18_standard_streams_are_not_the_callers_files_or_sockets() {
    let place = folder("fs-18-");
    let path = place.path().join("file");
    std::fs::write(&path, "first\nsecond\n").expect("a file");
    let both = || std::fs::File::options().read(true).write(true).open(&path).expect("it opens");
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let script = "for n in 0 1 2; do readlink /proc/self/fd/$n; done >&2; read line; echo got $line";
    let run = |stdin: Stdio, stdout: Stdio| {
        let sandbox = Sandbox::new();
        let mut command = sandbox.command();
        command.args(["sh", "-c", script]).stdin(stdin).stdout(stdout).stderr(Stdio::piped());
        let output = command.spawn().expect("broker runs").wait_with_output().expect("it ends");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let plain =
        Command::new("sh").args(["-c", script]).stdin(both()).stdout(both()).output().expect("sh runs");
    let control = String::from_utf8_lossy(&plain.stderr).into_owned();
    assert!(
        control.contains(&*path.to_string_lossy()),
        "FS-18: the control has the caller's file: {control}"
    );

    std::fs::write(&path, "first\nsecond\n").expect("a file");
    for (kind, stdin) in
        [("file", Stdio::from(both())), ("socket", Stdio::from(std::os::fd::OwnedFd::from(theirs)))]
    {
        drop((kind == "socket").then(|| ours.shutdown(std::net::Shutdown::Write)));
        let links = run(stdin, Stdio::from(both()));
        let at = |number: usize| links.lines().nth(number).unwrap_or_default().to_owned();
        for number in 0..2 {
            assert!(
                at(number).starts_with("pipe:") || at(number) == "/dev/null",
                "FS-18: {kind}: {number} is {links}"
            );
        }
    }
    assert!(
        std::fs::read_to_string(&path).expect("readable").starts_with("got"),
        "FS-18: the output arrives"
    );
    let directory = std::fs::File::open("/root").expect("a directory");
    let links = run(Stdio::from(directory), Stdio::null());
    assert!(
        !links.lines().next().unwrap_or_default().starts_with('/') || links.starts_with("/dev/null"),
        "FS-18: {links}"
    );
}

/// FS-19 (CVE-2024-21626). Method: commands and workspaces that go through descriptors of the broker or of
/// its caller; then `..` from the working directory. Oracle: a script's canary on standard output, and the
/// exit status.
#[test]
fn fs_19_descriptors_are_no_way_to_a_command_or_a_directory() {
    let (token, place, workspace) = (canary(), folder("fs-19-host-"), folder("fs-19-"));
    let secret = place.path().join("secret");
    std::fs::write(&secret, &token).expect("the canary is written");
    let script = place.path().join("run");
    std::fs::write(&script, format!("#!/bin/sh\necho {token}\n")).expect("the script is written");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).expect("chmod");

    let sandbox = with_workspace(workspace.path());
    let through = Command::new("/proc/self/fd/3/run");
    let control = held(&sandbox, place.path(), &secret, &through).output().expect("it runs");
    assert!(
        String::from_utf8_lossy(&control.stdout).contains(&token),
        "FS-19: the control runs: {control:?}"
    );
    for number in 3..64 {
        let mut command = sandbox.command();
        let command = command.arg(format!("/proc/self/fd/{number}/run"));
        let output = held(&sandbox, place.path(), &secret, command).output().expect("broker runs");
        assert!(matches!(output.status.code(), Some(125..=127)), "FS-19: descriptor {number}: {output:?}");
        assert!(
            !String::from_utf8_lossy(&output.stdout).contains(&token),
            "FS-19: descriptor {number} led out"
        );
    }
    // Without the caller's descriptors these name the broker's own, if any.
    for number in 3..16 {
        let sandbox = Sandbox::new().option("--workspace").option(format!("/proc/self/fd/{number}"));
        let output = sandbox.shell("ls -a; pwd");
        assert_eq!(output.status.code(), Some(125), "FS-19: workspace by descriptor {number}: {output:?}");
    }
    let secret = secret.display().to_string();
    let mut command = Command::new(sandbox.probe_path());
    let control = cases(command.args(["FS-19", &secret]).current_dir(workspace.path()));
    assert_refused("FS-19", &control, &sandbox.probe("FS-19", &[&secret]), &[]);

    // A workspace that the caller does name, by a link and relative, is that directory and no way out of it.
    symlink("/proc/self/cwd", place.path().join("link")).expect("a link");
    let link = place.path().join("link").display().to_string();
    for name in [".", &*link] {
        let sandbox = Sandbox::new().option("--workspace").option(name);
        let mut command = sandbox.command();
        let output =
            command.args(["sh", "-c", "pwd -P; stat -c %n /workspace/.."]).current_dir(workspace.path());
        let output = output.output().expect("broker runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let refused = output.status.code() == Some(125) && name != ".";
        assert!(refused || text.starts_with("/workspace\n"), "FS-19: workspace {name}: {output:?}");
        if !refused {
            let mut command = sandbox.command();
            let inside = cases(
                command.arg(sandbox.probe_path()).args(["FS-19", &secret]).current_dir(workspace.path()),
            );
            assert_refused("FS-19", &control, &inside, &[]);
        }
    }
}

/// FS-22. Method: hard links into the workspace of a file that is shown read-only, on the same file system.
/// Oracle: the file's link count on the host.
#[test]
fn fs_22_shown_files_cannot_be_linked_into_the_workspace() {
    let (workspace, free) = (folder("fs-22-"), folder("fs-22-"));
    let sandbox = with_workspace(workspace.path());
    let file = sandbox.probe_path().with_file_name("shown");
    std::fs::write(&file, "shown\n").expect("the file is written");
    let path = file.display().to_string();
    let links = || std::fs::metadata(&file).expect("there").nlink();
    let control = sandbox.control("FS-22", &[&*path, &free.path().to_string_lossy()]);
    assert_eq!(links(), 4, "FS-22: the control's links count");
    let inside = sandbox.probe("FS-22", &[&*path, "/workspace"]);
    assert_refused("FS-22", &control, &inside, &[]);
    assert_errno("FS-22", &inside[..1], &[libc::EXDEV, libc::EPERM]);
    assert_errno("FS-22", &inside[1..], &[libc::EXDEV, libc::EPERM, libc::ENOENT]);
    assert_eq!(links(), 4, "FS-22: a link was made");
}

/// FS-23. Method: files in the shared places and objects in the shared tables, made on one side while the
/// other looks, in both directions. Oracle: the other side's own look-up.
#[test]
fn fs_23_temporary_places_and_ipc_are_private() {
    let (token, sandbox) = (canary(), Sandbox::new());
    // Any key but IPC_PRIVATE; from the token, so that runs do not meet.
    let key = (u32::from_str_radix(&token[7..14], 16).expect("hexadecimal") | 1).to_string();
    let maker = sandbox.probe_path();
    let cleaner = Cleaner(&maker, &token, &key);
    let (mut child, _, _) = until_ready(Command::new(&maker).args(["FS-23", "make", &token, &key]));
    let control = sandbox.control("FS-23", &["see", &token, &key]);
    let inside = sandbox.probe("FS-23", &["see", &token, &key]);
    drop(child.stdin.take());
    child.wait().expect("the maker ends");
    drop(cleaner);
    assert_refused("FS-23", &control, &inside, &[]);
    assert_errno("FS-23", &inside, &[libc::ENOENT, libc::EPERM]);

    let token = canary();
    let _cleaner = Cleaner(&maker, &token, &key);
    let mut command = sandbox.command();
    command.arg(&maker).args(["FS-23", "make", &token, &key]).stderr(Stdio::inherit());
    let (mut child, _, text) = until_ready(&mut command);
    let made = cases_in(&text);
    for place in ["/tmp", "/dev/shm", "/run"] {
        assert!(
            made.iter().any(|case| case.name == place && case.outcome == "open"),
            "FS-23: {place} was filled: {made:?}"
        );
    }
    let outside = sandbox.control("FS-23", &["see", &token, &key]);
    drop(child.stdin.take());
    child.wait().expect("the maker ends");
    assert_refused("FS-23", &control, &outside, &[]);
}

/// Takes away what FS-23 makes on the host, also when a claim does not hold.
struct Cleaner<'a>(&'a Path, &'a str, &'a str);

impl Drop for Cleaner<'_> {
    fn drop(&mut self) {
        let Cleaner(maker, token, key) = self;
        Command::new(maker).args(["FS-23", "clean", token, key]).status().ok();
    }
}
