//! Unix sockets, passed descriptors and shared memory: other ways out than an address.

use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use broker_tests::{Running, Sandbox, assert_refused_with, canary, cases, cases_in};
use libc::{EACCES, ECONNREFUSED, ENOENT, ENOTSOCK, EPERM};

use crate::{NONE, bounded, sandbox};

/// Abstract sockets of all kinds on the host, by a sandbox that may not make Unix sockets and by one that may.
/// Oracles: errnos, and that nothing waits at the listeners; the control connects to all.
#[test]
fn nw_05_abstract_sockets_of_the_host_are_not_reached() {
    let names = [canary(), canary(), canary()];
    let stream =
        UnixListener::bind_addr(&UnixAddr::from_abstract_name(&names[0]).expect("a name")).expect("a socket");
    let packets = sequenced(&names[1]);
    let datagrams = UnixDatagram::bind_addr(&UnixAddr::from_abstract_name(&names[2]).expect("a name"));
    let datagrams = datagrams.expect("a socket");
    // Bound by the kernel to a name of its choice, five digits: guessable.
    let autobound = UnixDatagram::unbound().expect("a socket");
    rustix::net::bind(&autobound, &autobind()).expect("a name from the kernel");
    let chosen = autobound.local_addr().expect("its name");
    let chosen =
        String::from_utf8(chosen.as_abstract_name().expect("an abstract name").to_vec()).expect("digits");
    let [first, second, third] = names;
    let arguments = [first, second, third, chosen];
    stream.set_nonblocking(true).expect("a listener");
    datagrams.set_nonblocking(true).expect("a socket");
    let waiting = || {
        let packet = rustix::net::accept(&packets).is_ok();
        [stream.accept().is_ok(), packet, datagrams.recv(&mut [0; 8]).is_ok()]
    };

    let control = sandbox().control("NW-05", &arguments);
    assert_eq!(waiting(), [true; 3], "the control did not get through: {control:?}");
    for (policy, refusals) in
        [("", &[EPERM][..]), ("[syscalls]\nunix_sockets = true", &[ECONNREFUSED, EPERM])]
    {
        let inside = bounded(Sandbox::with(policy)).probe("NW-05", &arguments);
        assert_eq!(waiting(), [false; 3], "somebody came: {inside:?}");
        assert_refused_with("NW-05", &control, &inside, NONE, |_| refusals);
    }
}

fn sequenced(name: &str) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a socket");
    bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes()).expect("a name"))
        .expect("the name is free");
    listen(&socket, 5).expect("it listens");
    socket
}

fn autobind() -> rustix::net::SocketAddrUnix {
    rustix::net::SocketAddrUnix::new_unnamed()
}

/// The workload listens under an abstract name of which a client on the host may know. Oracle: the client is refused;
/// in the control it connects.
#[test]
fn nw_05_names_of_host_services_cannot_be_taken() {
    let name = canary();
    let client = || UnixStream::connect_addr(&UnixAddr::from_abstract_name(&name).expect("a name"));
    let open = bounded(Sandbox::with("[syscalls]\nunix_sockets = true"));
    let control = Running::start(Command::new(open.probe_path()).args(["NW-05-hold", &name]));
    assert!(client().is_ok(), "the control does not listen: {}", control.first_line);
    drop(control);
    for (sandbox, outcome) in [(sandbox(), "denied"), (open, "open")] {
        let running = Running::start(sandbox.command().arg(sandbox.probe_path()).args(["NW-05-hold", &name]));
        assert!(running.first_line.contains(outcome), "the attempt did not run: {}", running.first_line);
        let refused = client().expect_err("the host's client talks to a workload");
        assert_eq!(refused.raw_os_error(), Some(ECONNREFUSED));
    }
}

/// What arrives with descriptors at a socket of the host's.
fn received(socket: impl AsFd) -> usize {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut bytes = [0_u8; 4096];
    let mut space = [std::mem::MaybeUninit::uninit(); 256];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let mut count = 0;
    if recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC).is_ok() {
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                count += descriptors.count();
            }
        }
    }
    count
}

/// Sockets in a shared workspace and a socket as the standard input, a descriptor passed over each, also by the end of
/// a pair, which needs no call of `socket`. Oracle: the host's ends, at which the control's descriptors arrive; and no
/// socket appears in the workspace.
#[test]
fn nw_10_no_descriptor_leaves() {
    let workspace = tempfile::tempdir().expect("a workspace");
    let listener = UnixListener::bind(workspace.path().join("socket")).expect("a socket");
    listener.set_nonblocking(true).expect("a listener");
    // Everyone may connect to it: only the sandbox stands in between.
    let datagrams = UnixDatagram::bind(workspace.path().join("datagrams")).expect("a socket");
    for name in ["socket", "datagrams"] {
        let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(workspace.path().join(name), everyone).expect("it is ours");
    }
    let sandbox = sandbox().option("--workspace").option(workspace.path().display().to_string());
    let run = |command: &mut Command, folder: &Path| {
        let (near, far) = UnixStream::pair().expect("a pair");
        let paths = ["socket", "datagrams", "new"].map(|name| folder.join(name));
        let cases = cases(command.arg("NW-10").args(paths).stdin(OwnedFd::from(far)));
        let by_socket = listener.accept().map_or(0, |(socket, _)| received(&socket));
        (cases, [by_socket, received(&near), received(&datagrams), received(&datagrams)])
    };
    let (control, arrived) = run(&mut Command::new(sandbox.probe_path()), workspace.path());
    assert_eq!(arrived, [1; 4], "the control's descriptors did not arrive: {control:?}");
    let made = ["new", "new.dgram", "new.raw"].map(|name| workspace.path().join(name));
    for path in &made {
        std::fs::remove_file(path).expect("the control made it");
    }
    let (inside, arrived) = run(sandbox.command().arg(sandbox.probe_path()), Path::new("/workspace"));
    assert_eq!(arrived, [0; 4], "a descriptor came out: {inside:#?}");
    assert!(!made.iter().any(|path| path.exists()), "a socket in the workspace: {inside:#?}");
    assert_refused_with("NW-10", &control, &inside, NONE, |case| match case {
        "standard input" => &[ENOTSOCK, EPERM],
        _ => &[EPERM],
    });
}

/// One leaves a token in every shared place and under every IPC key, another looks for it: host and sandbox, and two
/// sandboxes. Oracle: the token; on the host one finds it.
#[test]
fn nw_10_two_sandboxes_have_no_place_to_meet() {
    let sandbox = sandbox();
    let token = canary();
    let key = (std::process::id() | 0x5a00_0000).to_string();
    let arguments = [token.as_str(), key.as_str()];
    let hold = |mut command: Command| Running::start(command.arg("NW-10-hold").args(arguments));
    let inner = || {
        let mut command = sandbox.command();
        command.arg(sandbox.probe_path());
        command
    };
    let on_host = hold(Command::new(sandbox.probe_path()));
    let control = sandbox.control("NW-10-look", &arguments);
    let inside = sandbox.probe("NW-10-look", &arguments);
    on_host.finish();
    // Removed with its holder, so that what comes next is another's.
    let gone = sandbox.control("NW-10-look", &arguments);
    let refusals = |_: &str| &[0, ENOENT, EPERM, EACCES][..];
    assert_refused_with("NW-10", &control, &inside, NONE, refusals);
    assert_refused_with("NW-10", &control, &gone, NONE, refusals);

    let in_sandbox = hold(inner());
    let held = cases_in(&in_sandbox.first_line);
    assert!(held[0].detail.starts_with(['3', '4']), "it holds nothing: {held:?}");
    let sibling = sandbox.probe("NW-10-look", &arguments);
    let outside = sandbox.control("NW-10-look", &arguments);
    in_sandbox.finish();
    assert_refused_with("NW-10", &control, &sibling, NONE, refusals);
    assert_refused_with("NW-10", &control, &outside, NONE, refusals);
}
