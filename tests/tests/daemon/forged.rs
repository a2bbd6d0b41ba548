//! A core under foreign control: what it says to the launcher is not believed. The test speaks in its place, on its channel.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
    socketpair,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::json;

use super::*;

/// A copy of one of the core's descriptors, as whoever controls it has them all.
fn stolen(core: i32, number: i32) -> OwnedFd {
    let core = pidfd_open(Pid::from_raw(core).expect("a process"), PidfdFlags::empty()).expect("it lives");
    pidfd_getfd(core, number, PidfdGetfdFlags::empty()).expect("root may")
}

fn sockets(core: i32) -> Vec<i32> {
    let all = fs::read_dir(format!("/proc/{core}/fd")).expect("it lives").flatten();
    let is_socket = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|name| name.to_string_lossy().starts_with("socket:"))
    };
    all.filter(is_socket).filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Asks the launcher for a sandbox over a directory that only root may read, in the name of `uid`; what ran there said, and
/// the supervisor's answer.
fn forge(daemon: &Daemon, core: i32, id: &str, uid: u32, asker: Option<BorrowedFd<'_>>) -> (String, Value) {
    let launcher = stolen(core, 0);
    let secret = tempfile::tempdir().expect("a directory");
    fs::write(secret.path().join("secret"), "the secret").expect("it is ours");
    set_mode(&secret.path().join("secret"), 0o600);
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    let directory = rustix::fs::open(secret.path(), flags, rustix::fs::Mode::empty()).expect("root may");
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (ours, theirs) = pair().expect("a channel");
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    let run = json!({ "policy": "default", "command": ["cat", "/workspace/secret"], "environment": [],
        "path": "/usr/bin:/bin", "streams": { "output": 0 },
        "workspace": { "name": "/w", "descriptor": 1, "mode": "ro" } });
    let sandbox = json!({ "id": id, "policy": "default", "uid": uid, "command": [], "started_ms": 1 });
    let start = json!({ "start": { "sandbox": sandbox, "run": run, "kind": "run",
        "asker": asker.map(|_| 2) } });
    let own = [ours.as_fd(), theirs.as_fd(), write.as_fd(), directory.as_fd()];
    let all: Vec<BorrowedFd<'_>> = own.into_iter().chain(asker).collect();
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&all)));
    let bytes = serde_json::to_vec(&start).expect("it is JSON");
    sendmsg(&launcher, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).expect("it is taken");
    drop((write, theirs));
    let mut output = String::new();
    fs::File::from(read).read_to_string(&mut output).expect("text");
    let mut answer = vec![0; 1 << 16];
    let (length, _) =
        rustix::net::recv(&ours, &mut answer[..], rustix::net::RecvFlags::empty()).expect("an answer");
    let answer = serde_json::from_slice(&answer[..length]).unwrap_or_else(|_| panic!("{}", daemon.log()));
    (output, answer)
}

/// The control is the same message with the socket that root is connected with: that one is believed.
#[test]
fn a_core_cannot_say_who_asks() {
    let daemon = Daemon::start();
    let core = daemon.role("core").expect("there is a core");
    let before = sockets(core);
    let client = UnixStream::connect(daemon.socket()).expect("it listens");
    let new = || sockets(core).into_iter().find(|number| !before.contains(number));
    assert!(within(Duration::from_secs(5), || new().is_some()));
    let accepted = stolen(core, new().expect("it is accepted"));
    let (said, answer) = forge(&daemon, core, "a-1", 0, Some(accepted.as_fd()));
    assert_eq!(said, "the secret", "{answer}");
    assert!(answer["ended"].is_object(), "{answer}");

    let (pair, _other) = UnixStream::pair().expect("a pair");
    let is_listening = |number: &i32| {
        let socket = stolen(core, *number);
        nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::AcceptConn) == Ok(true)
    };
    let listener = stolen(core, before.into_iter().find(is_listening).expect("it listens"));
    let askers = [
        None,
        Some(pair.as_fd()),
        Some(listener.as_fd()),
        Some(client.as_fd()),
        Some(stolen(core, 0).as_fd()),
    ]
    .map(|asker| asker.map(|asker| asker.try_clone_to_owned().expect("a copy")));
    for (at, asker) in askers.iter().enumerate() {
        let id = format!("b-{at}");
        let (said, answer) = forge(&daemon, core, &id, 0, asker.as_ref().map(AsFd::as_fd));
        assert_eq!(
            (said.as_str(), &answer["denied"]["denial"]["code"]),
            ("", &json!("policy-not-granted")),
            "{at}: {answer}"
        );
    }
    // Root asks, in Ada's name: the record and the report would tell of her.
    let (said, answer) = forge(&daemon, core, "c-1", ADA, Some(accepted.as_fd()));
    assert_eq!(
        (said.as_str(), &answer["denied"]["denial"]["code"]),
        ("", &json!("policy-not-granted")),
        "{answer}"
    );
}
