//! Processes, memory, space, descriptors, processor time.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use broker_tests::{Sandbox, alive, assert_refused, canary, cases, until_ready, within};

use super::{folder, outcome, reached, reporting, run, text};

/// RS-01. Method: 200 processes, then 200 threads, at a limit of 60. Oracle: how many there were, the errno,
/// processes of this run that the host still sees, and that the host can fork meanwhile and the end comes at
/// once.
#[test]
fn rs_01_processes_and_threads_are_limited() {
    let token = canary();
    let sandbox = Sandbox::new().option("--pids").option("60");
    let control = sandbox.control("RS-01", &["200"]);
    let inside = sandbox.probe("RS-01", &["200", &token]);
    assert_refused("RS-01", &control, &inside, &[]);
    for case in &inside {
        assert!(case.errno == libc::EAGAIN && (20..60).contains(&reached(case)), "RS-01: {case:?}");
    }
    // The bomb proper: what cannot start is tried again for ever, until the deadline.
    let sandbox = Sandbox::with("[limits]\ngrace = \"200ms\"\n");
    let sandbox = sandbox.option("--pids").option("60").option("--timeout").option("3s");
    let start = Instant::now();
    let mut command = sandbox.command();
    let (mut child, _out, _) =
        until_ready(command.arg(sandbox.probe_path()).args(["RS-01", "for-ever", &token]));
    let owners = alive(&token).into_iter().filter_map(|pid| owner(&pid.to_string()));
    let workload = owners.max().expect("it is there");
    assert!(workload >= 0x7000_0000, "RS-01: it runs as uid {workload}");
    let processes = || {
        let all = std::fs::read_dir("/proc").expect("/proc").flatten();
        let names = all.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| owner(name) == Some(workload)).count()
    };
    assert!(within(Duration::from_secs(2), || processes() > 30), "RS-01: the bomb goes off");
    let fork = Instant::now();
    assert!(Command::new("true").status().expect("the host forks").success());
    assert!(fork.elapsed() < Duration::from_secs(2), "RS-01: a fork on the host took {:?}", fork.elapsed());
    let most = (0..20).map(|_| processes()).max().unwrap_or(0);
    // Init may come on top, and a look at /proc is no snapshot: who dies meanwhile is counted with who comes.
    assert!(most <= 60 + 5, "RS-01: {most} processes at once");
    child.wait().expect("broker ends");
    assert!(
        start.elapsed() < Duration::from_millis(3200 + 4000),
        "RS-01: the end took {:?}",
        start.elapsed()
    );
    assert!(
        within(Duration::from_secs(2), || alive(&token).is_empty()),
        "RS-01: survivors {:?}",
        alive(&token)
    );
}

/// The uid of a process; nothing for other names in /proc. Unlike its command line it can be had without its
/// locks.
fn owner(process: &str) -> Option<u32> {
    process.parse::<u32>().ok()?;
    std::fs::metadata(format!("/proc/{process}")).ok().map(|about| about.uid())
}

const MEMORY_MIB: u64 = 48;

// Takes 128 MiB of `kind` on the host and then inside of a limit of 48: stopped by an errno, or by the
// kernel's OOM killer, in which case the status and the report have to say so.
fn memory(kind: &str, inside_directory: &str) {
    let (place, free) = (folder("rs-02-"), tempfile::tempdir_in("/dev/shm").expect("a temporary directory"));
    let path = place.path().join("report");
    let sandbox = reporting(Sandbox::new(), &path).option("--memory").option(format!("{MEMORY_MIB}MiB"));
    let control = sandbox.control("RS-02", &[kind, "128", &*free.path().to_string_lossy()]);
    assert_eq!(control[0].outcome, "open", "RS-02: the control takes it: {control:?}");

    let mut command = sandbox.command();
    let output = run(command.arg(sandbox.probe_path()).args(["RS-02", kind, "128", inside_directory]));
    let lines = text(&output.stdout);
    let last = furthest(&lines);
    // What a directory costs is estimated, and a little low.
    let slack = if kind == "directories" { 16 } else { 4 };
    assert!(!lines.contains("\"open\""), "RS-02: {kind}: all of it was given: {lines}");
    assert!(last <= MEMORY_MIB + slack, "RS-02: {kind}: {last} MiB at a limit of {MEMORY_MIB}: {output:?}");
    let refused = lines.contains("\"denied\"");
    let killed = output.status.code() == Some(137);
    assert!(killed != refused, "RS-02: {kind}: neither refused nor killed: {output:?}");
    if killed {
        assert!(last >= MEMORY_MIB / 4, "RS-02: {kind}: killed at {last} MiB already: {output:?}");
        assert!(outcome(&path).contains("oom"), "RS-02: {kind}: the report says {}", outcome(&path));
    }
}

fn furthest(lines: &str) -> u64 {
    let counts = lines.lines().filter_map(|line| line.strip_prefix("progress ")?.parse().ok());
    counts.max().unwrap_or(0)
}

/// RS-02. Oracle: how far the last line got, the status, and the report's reason.
#[test]
fn rs_02_anonymous_memory_is_charged() {
    memory("anonymous", "/tmp");
}

/// RS-02. Oracle: as above.
#[test]
fn rs_02_shared_mappings_are_charged() {
    memory("shared", "/tmp");
}

/// RS-02. Oracle: as above.
#[test]
fn rs_02_memory_files_are_charged() {
    memory("memfd", "/tmp");
}

/// RS-02. Oracle: as above; the private places are larger than the limit, so it is memory that ends it.
#[test]
fn rs_02_private_files_are_charged() {
    for place in ["/tmp", "/dev/shm", "/home/agent"] {
        memory("file", place);
    }
}

/// RS-02. Oracle: as above.
#[test]
fn rs_02_system_v_segments_are_charged() {
    memory("system-v", "/tmp");
}

/// RS-02. Oracle: as above; nothing but page tables grows.
#[test]
fn rs_02_page_tables_are_charged() {
    memory("page-tables", "/tmp");
}

/// RS-02. Oracle: as above; inodes and names of empty directories.
#[test]
fn rs_02_names_are_charged() {
    memory("directories", "/tmp");
}

/// RS-02. Oracle: as above.
#[test]
fn rs_02_pipe_buffers_are_charged() {
    memory("pipes", "/tmp");
}

// Takes `goal` MiB in buffers of sockets; `most` is where it has to have ended, unless the report owns up to
// a gap.
fn buffers(kind: &str, goal: &str, most: u64) {
    let place = folder("rs-02-");
    let path = place.path().join("report");
    let sandbox = reporting(Sandbox::new(), &path).option("--memory").option(format!("{MEMORY_MIB}MiB"));
    let control = sandbox.control("RS-02", &[kind, goal, "/tmp"]);
    assert_eq!(control[0].outcome, "open", "RS-02: the control takes it: {control:?}");
    let mut command = sandbox.command();
    let output = run(command.arg(sandbox.probe_path()).args(["RS-02", kind, goal, "/tmp"]));
    let lines = text(&output.stdout);
    assert!(lines.contains("progress "), "RS-02: {kind}: it did try: {output:?}");
    let last = furthest(&lines);
    let gaps = broker_tests::report(&path)["gaps"].to_string();
    assert!(
        last <= most || gaps.contains("socket"),
        "RS-02: {kind}: {last} MiB at a limit of {MEMORY_MIB}, and the gaps are {gaps}"
    );
}

/// RS-02. Method: buffers of socket pairs, beyond what one process can have. Oracle: how much they hold.
#[test]
fn rs_02_unix_socket_buffers_are_charged() {
    buffers("unix-sockets", "128", MEMORY_MIB + 4);
}

/// RS-02. Method: buffers of TCP connections over the loopback, by as many processes as it takes. cgroup v1
/// counts them by a limit of their own, beyond which every connection still gets a little; what the
/// connections themselves cost ends it. Oracle: how much they hold, which is a small multiple of the limit
/// and not what the host has.
#[test]
fn rs_02_tcp_buffers_are_bounded() {
    buffers("tcp", "400", 4 * MEMORY_MIB);
}

/// RS-03. Method: every private place is filled with files and with bytes, up to four times what it may hold.
/// Oracle: ENOSPC, at a count that fits the policy's size.
#[test]
fn rs_03_private_places_have_their_sizes() {
    let sizes = [("tmp", "/tmp", 8), ("shm", "/dev/shm", 4), ("run", "/run", 2), ("home", "/home/agent", 6)];
    let policy = "tmp = \"8MiB\"\nshm = \"4MiB\"\nrun = \"2MiB\"\nhome = \"6MiB\"\ninodes = 500\n";
    let sandbox = Sandbox::with(policy);
    let free = folder("rs-03-");
    let place = |label: &str, path: &str| format!("{label}={path}");
    let common = ["32".to_owned(), "2000".to_owned()];
    let host: Vec<String> =
        sizes.iter().map(|(label, ..)| place(label, &free.path().to_string_lossy())).collect();
    let inner: Vec<String> = sizes.iter().map(|(label, path, _)| place(label, path)).collect();
    let control = sandbox.control("RS-03", &[&common[..], &host].concat());
    let inside = sandbox.probe("RS-03", &[&common[..], &inner].concat());
    assert_refused("RS-03", &control, &inside, &[]);
    for (label, _, mebibytes) in sizes {
        let find =
            |case: &str| inside.iter().find(|found| found.name == format!("{case} {label}")).expect("tried");
        let (inodes, bytes) = (find("inodes"), find("bytes"));
        assert_eq!(
            (inodes.errno, bytes.errno),
            (libc::ENOSPC, libc::ENOSPC),
            "RS-03: {label}: {inodes:?} {bytes:?}"
        );
        assert!((400..=500).contains(&reached(inodes)), "RS-03: {label}: {inodes:?}");
        let most = mebibytes << 20;
        assert!((most / 2..=most).contains(&reached(bytes)), "RS-03: {label}: {bytes:?}");
    }
    let elsewhere = sandbox.probe("RS-03", &["1", "1", "root=/", "dev=/dev", "home=/home", "etc=/etc"]);
    for case in elsewhere {
        assert!([libc::EROFS, libc::EACCES].contains(&case.errno), "RS-03: elsewhere: {case:?}");
    }
}

/// RS-04. Method: files larger than the policy's limit, by fallocate, ftruncate and a write far out. Oracle:
/// EFBIG or SIGXFSZ, and the sizes that the host finds.
#[test]
fn rs_04_large_files_are_refused() {
    let (workspace, free) = (folder("rs-04-"), folder("rs-04-"));
    let sandbox = Sandbox::with("[limits]\nfile_size = \"8MiB\"\n");
    let sandbox = sandbox.option("--workspace").option(workspace.path().display().to_string());
    let control = sandbox.control("RS-04", &["size", &*free.path().to_string_lossy(), "8"]);
    let inside = sandbox.probe("RS-04", &["size", "/workspace", "8"]);
    assert_refused("RS-04", &control, &inside, &[]);
    for case in &inside {
        let signal = case.outcome == "killed" && case.detail == format!("signal {}", libc::SIGXFSZ);
        assert!(case.errno == libc::EFBIG || signal, "RS-04: {case:?}");
    }
    sandbox.shell("head -c 20M /dev/zero > kept");
    let size = std::fs::metadata(workspace.path().join("kept")).expect("there").len();
    assert!(size <= 8 << 20, "RS-04: {size} bytes");
}

/// RS-04. Method: 20 000 names, long and ugly ones, closed directories and a tree 3 000 deep, in the
/// workspace and in the private places. Oracle: broker ends on its own, with the program's status, and the
/// workspace keeps all.
#[test]
fn rs_04_floods_of_names_do_not_stop_the_clean_up() {
    let (workspace, free) = (folder("rs-04-"), folder("rs-04-"));
    let sandbox = Sandbox::new().option("--workspace").option(workspace.path().display().to_string());
    let host = free.path().to_string_lossy();
    let control = sandbox.control("RS-04", &["names", &*host, "2000", "3000"]);
    assert_eq!(control[0].outcome, "open", "RS-04: the control floods: {control:?}");
    for (place, name) in [("/workspace", ".git"), ("/tmp", "x"), ("/home/agent", "x")] {
        let start = Instant::now();
        let mut command = sandbox.command();
        let made = format!(
            "mkdir -p {place}/{name} && exec {} RS-04 names {place}/{name} 20000 3000",
            sandbox.probe_path().display()
        );
        let output = run(command.args(["sh", "-c", &made]));
        // What is not covered in the workspace may well be flooded; only the end of the run is at stake.
        assert_eq!(output.status.code(), Some(0), "RS-04: {place}: {output:?}");
        assert!(start.elapsed() < Duration::from_secs(30), "RS-04: {place}: it took {:?}", start.elapsed());
    }
    let again = sandbox.shell("echo again");
    assert_eq!(text(&again.stdout), "again\n", "RS-04: the flooded workspace can be used: {again:?}");
    for place in [workspace, free] {
        // Deeper than the standard library's own removal can go with the descriptors it has.
        let status = Command::new("rm").arg("-rf").arg(place.path()).status().expect("rm runs");
        assert!(status.success(), "RS-04: the host removes it");
    }
}

/// RS-05. Method: descriptors of every kind, beyond the limit; the limit is raised. Oracle: EMFILE at the
/// limit.
#[test]
fn rs_05_descriptors_are_limited() {
    let sandbox = Sandbox::with("[limits]\nopen_files = 256\n");
    let control = sandbox.control("RS-05", &["600"]);
    let inside = sandbox.probe("RS-05", &["600"]);
    assert_refused("RS-05", &control, &inside, &[]);
    for case in inside.iter().filter(|case| case.detail.starts_with("at ")) {
        assert!(
            case.errno == libc::EMFILE && reached(case) <= 256 && reached(case) >= 200,
            "RS-05: {case:?}"
        );
    }
    let find = |name: &str| inside.iter().find(|case| case.name == name).expect("tried").errno;
    assert_eq!((find("dup2"), find("raise the limit")), (libc::EBADF, libc::EPERM), "RS-05: {inside:?}");
}

/// RS-05. Method: one sandbox takes all inotify instances it can get, which the kernel counts by user and by
/// the user that made the user namespace; then another one and the host's root want one. The control exhausts
/// the pool of `nobody`. Oracle: the errno of the others.
#[test]
fn rs_05_one_sandbox_does_not_take_the_inotify_pool_of_others() {
    pool("inotify", "4000", 65534);
}

/// RS-05. Method: as above with pseudo-terminals, of which the machine has one number for all; the control
/// takes the machine's for a moment. Oracle: the errno of the others.
#[test]
fn rs_05_one_sandbox_does_not_take_the_terminals_of_others() {
    pool("pty", "4090", 0);
}

fn pool(name: &str, count: &str, control_uid: u32) {
    let (sandbox, one) = (Sandbox::new(), format!("one-{name}"));
    let shared = folder("rs-05-");
    let path = shared.path().join("probe");
    let copied = Command::new("cp").arg(sandbox.probe_path()).arg(&path).status();
    assert!(copied.expect("cp runs").success(), "RS-05: the probe is copied");
    std::fs::set_permissions(shared.path(), std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let host = |arguments: &[&str]| {
        let mut command = Command::new(&path);
        command.arg("RS-05").args(arguments).uid(control_uid).gid(control_uid);
        command
    };
    // All that there are: the control's pool may be larger than what one sandbox could hold.
    let (mut taker, _out, _) = until_ready(&mut host(&[name, "19000"]));
    let control = cases(&mut host(&[&one]));
    drop(taker.stdin.take());
    taker.wait().expect("it ends");
    assert_eq!(control[0].outcome, "open", "RS-05: the control's pool is empty: {control:?}");

    let mut command = sandbox.command();
    let (mut taker, _out, ready) =
        until_ready(command.arg(sandbox.probe_path()).args(["RS-05", name, count]));
    let others = Sandbox::new();
    let (host, other) = (others.control("RS-05", &[&one]), others.probe("RS-05", &[&one]));
    drop(taker.stdin.take());
    taker.wait().expect("it ends");
    assert_refused("RS-05: the host", &control, &host, &[]);
    assert_refused("RS-05: another sandbox", &control, &other, &[]);
    assert!(!ready.contains("READY 0"), "RS-05: it took some: {ready}");
}

/// RS-06. Method: four processes spin at the best priority to be had, under a quarter of a processor. Oracle:
/// the processor time that the kernel counts for them, at most a third above the quota; the control takes
/// more than that.
#[test]
fn rs_06_processor_time_is_limited() {
    let sandbox = Sandbox::new().option("--cpus").option("0.25");
    let control = sandbox.control("RS-06", &["1000", "34"]);
    let inside = sandbox.probe("RS-06", &["3000", "34"]);
    assert_refused("RS-06", &control, &inside, &[]);
    let ended = Sandbox::new().option("--timeout").option("1s").option("--cpus").option("0.5");
    let start = Instant::now();
    let output = ended.shell("while :; do :; done & while :; do :; done");
    assert_eq!(output.status.code(), Some(124), "RS-06: {output:?}");
    assert!(start.elapsed() < Duration::from_secs(6), "RS-06: the deadline held after {:?}", start.elapsed());
}

/// The policy's `io`. Method: 3 MiB past the page cache at 1 MiB a second. Oracle: the host's clock, which can only
/// make it longer; the control is the same writing without the limit.
#[test]
fn traffic_of_disks_is_limited() {
    let directory = folder("broker-io-");
    let writing = "dd if=/dev/zero of=written bs=64k count=48 oflag=direct status=none";
    let taken = |extra: &str| {
        let sandbox =
            Sandbox::with(extra).option("--workspace").option(directory.path().display().to_string());
        let start = Instant::now();
        let output = sandbox.shell(writing);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(directory.path().join("written").metadata().expect("it was written").len(), 3 << 20);
        start.elapsed()
    };
    let control = taken("");
    assert!(control < Duration::from_secs(2), "control: {control:?}");
    let inside = taken("[limits]\nio = \"1MiB\"\n");
    assert!(inside > Duration::from_secs(2), "3 MiB at 1 MiB a second took {inside:?}");
}

/// The kernel ends nobody who waits for a throttled disk: the limit is lifted before the kill. Control: the read takes as
/// long as the limit says where there is no deadline.
#[test]
fn a_throttled_process_does_not_outlast_its_deadline() {
    let directory = folder("broker-io-");
    std::fs::write(directory.path().join("big"), vec![7; 6 << 20]).expect("a file");
    run(Command::new("sync").arg("-f").arg(directory.path()));
    let taken = |deadline: &str| {
        let limits = format!("[limits]\nio = \"1MiB\"\n{deadline}");
        let sandbox =
            Sandbox::with(&limits).option("--workspace").option(directory.path().display().to_string());
        let start = Instant::now();
        let output = sandbox.shell("trap '' TERM; dd if=big of=/dev/null bs=6M iflag=direct status=none");
        (start.elapsed(), output.status.code())
    };
    let (control, code) = taken("");
    assert!(code == Some(0) && control > Duration::from_secs(4), "control: {control:?}, {code:?}");
    let (inside, code) = taken("timeout = \"500ms\"\ngrace = \"200ms\"\n");
    assert!(code == Some(124) && inside < Duration::from_secs(3), "{inside:?}, {code:?}");
}
