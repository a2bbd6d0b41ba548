//! The daemon's parts: each its own user, with nothing of the system but its channel, and there again when it was killed.

use std::os::fd::OwnedFd;

use super::lives::Peer;
use super::*;

/// What the kernel says of a process.
fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{key}:")));
    line.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn open(pid: i32) -> Vec<String> {
    let listed = fs::read_dir(format!("/proc/{pid}/fd")).expect("root may look");
    let mut names: Vec<String> =
        listed.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn namespace(pid: i32, name: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{name}")).expect("root may look").display().to_string()
}

fn is_confined(pid: i32, uid: u32, own_network: bool) {
    let uids = format!("{uid} {uid} {uid} {uid}");
    assert_eq!(
        (status(pid, "Uid"), status(pid, "Gid"), status(pid, "Groups")),
        (uids.clone(), uids, String::new())
    );
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(
        (status(pid, "NoNewPrivs"), status(pid, "Seccomp"), status(pid, "Threads")),
        ("1".into(), "2".into(), "1".into())
    );
    assert_eq!(
        fs::read_dir(format!("/proc/{pid}/root/")).expect("root may look").count(),
        0,
        "no file at all"
    );
    // Of who could be dumped, this belongs to its own user.
    let environment = fs::metadata(format!("/proc/{pid}/environ")).expect("it lives");
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&environment), 0, "not dumpable");
    let ours = std::process::id().cast_signed();
    for name in ["mnt", "ipc", "uts"] {
        assert_ne!(namespace(pid, name), namespace(ours, name), "{name}");
    }
    assert_eq!(namespace(pid, "net") != namespace(ours, "net"), own_network);
}

pub fn is_up(daemon: &Daemon, role: &str) -> bool {
    let peer = Peer::new(daemon);
    peer.send("Metrics", &serde_json::json!({}), false, &[]);
    let line = format!("broker_role_up{{role=\"{role}\"}} 1\n");
    peer.reply().0["parameters"]["text"].as_str().is_some_and(|text| text.contains(&line))
}

#[test]
fn each_role_is_its_own_user_and_has_nothing_but_its_channel() {
    let daemon = Daemon::start();
    for (role, uid, own_network) in [("vault", 0x7200_0001, true), ("resolver", 0x7200_0002, false)] {
        assert!(within(Duration::from_secs(5), || is_up(&daemon, role)), "{role}: {}", daemon.log());
        let pid = daemon.role(role).expect("it lives");
        is_confined(pid, uid, own_network);
        if role == "vault" {
            // Its standard streams, of which the first is the launcher's line; the line to the core; its store and the host's
            // authorities.
            assert_eq!(open(pid), ["0", "1", "2", "3", "4", "5"]);
        } else {
            // Beside its standard streams lines, and what it waits with: no file.
            let links = open(pid).into_iter().filter_map(|number| {
                let kept = !["0", "1", "2"].contains(&number.as_str());
                kept.then(|| fs::read_link(format!("/proc/{pid}/fd/{number}")).expect("it is open"))
            });
            let is_file = |link: &PathBuf| link.starts_with("/");
            assert_eq!(links.filter(is_file).collect::<Vec<_>>(), Vec::<PathBuf>::new());
        }
    }
    let core = daemon.role("core").expect("it lives");
    assert_eq!(
        (status(core, "Uid"), status(core, "CapBnd")),
        ("1912602624 1912602624 1912602624 1912602624".into(), "0000000000000000".into())
    );
    // It has threads, and none from before its filter.
    for thread in fs::read_dir(format!("/proc/{core}/task")).expect("it lives").flatten() {
        let text = fs::read_to_string(thread.path().join("status")).expect("it lives");
        assert!(text.contains("\nSeccomp:\t2\n") && text.contains("\nNoNewPrivs:\t1\n"), "{text}");
    }
}

/// A gateway is started for a sandbox; until one has a use for it, by hand.
#[test]
fn a_gateway_is_confined_as_the_others_are_and_ends_with_its_launcher() {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let mut gateway = Command::new(program("broker"));
    gateway
        .args(["role", "gateway", "7"])
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut gateway = gateway.spawn().expect("it starts");
    let pid = i32::try_from(gateway.id()).expect("a pid");
    assert!(within(Duration::from_secs(5), || status(pid, "Seccomp") == "2"));
    is_confined(pid, 0x7300_0007, true);
    drop(ours);
    let ended =
        within(Duration::from_secs(5), || matches!(gateway.try_wait(), Ok(Some(status)) if status.success()));
    assert!(ended);
}

/// kill -9 of a role ends nothing else, and it is there again; so are the roles for another core.
#[test]
fn a_role_that_was_killed_comes_back() {
    let daemon = Daemon::start();
    let kill = |pid: i32| {
        let signal = nix::sys::signal::Signal::SIGKILL;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("it lives");
    };
    let peer = Peer::new(&daemon);
    let (_, handle) = peer.provision(None);
    for role in ["vault", "resolver"] {
        assert!(within(Duration::from_secs(5), || is_up(&daemon, role)));
        let before = daemon.role(role).expect("it lives");
        kill(before);
        assert!(
            within(Duration::from_secs(5), || daemon.role(role).is_some_and(|pid| pid != before)),
            "{role}"
        );
        assert!(within(Duration::from_secs(5), || is_up(&daemon, role)), "{role}: {}", daemon.log());
        assert_eq!(peer.execute(&handle, role, "echo here").1, "here\n");
    }
    let vault = daemon.role("vault");
    daemon.kill_core();
    for role in ["vault", "resolver"] {
        assert!(within(Duration::from_secs(5), || is_up(&daemon, role)), "{role}: {}", daemon.log());
    }
    assert_eq!(daemon.role("vault"), vault, "it lives on");
}
