//! Rows NW-*: a sandbox without grants has its own loopback and nothing else. Whatever arrives at a listener of the
//! host is a leak, whoever says otherwise.

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use broker_tests::{Case, Running, Sandbox, assert_refused_with, below, canary, cases};
use libc::{EACCES, ECONNREFUSED, ENETUNREACH, ENODEV, ENOENT, ENOTSOCK, EPERM};

const NONE: &[&str] = &[];
/// What a connection to nowhere is told.
const UNREACHABLE: &[i32] = &[ECONNREFUSED, ENETUNREACH, EPERM, EACCES];

/// A sandbox that cannot hold up the suite.
fn sandbox() -> Sandbox {
    bounded(Sandbox::new())
}

fn bounded(sandbox: Sandbox) -> Sandbox {
    sandbox.option("--timeout").option("60s")
}

/// How often somebody came to a listener of ours.
#[derive(Clone, Default)]
struct Visits(Arc<AtomicUsize>);

impl Visits {
    fn note(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// The visits since the last time, once those on their way have come.
    fn take(&self) -> usize {
        std::thread::sleep(Duration::from_millis(50));
        self.0.swap(0, Ordering::SeqCst)
    }

    fn at_stream(&self, listener: TcpListener) {
        let visits = self.clone();
        std::thread::spawn(move || listener.incoming().flatten().for_each(|_| visits.note()));
    }

    fn at_datagrams(&self, socket: UdpSocket) {
        let visits = self.clone();
        std::thread::spawn(move || {
            while let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
                visits.note();
                socket.send_to(b"!", from).ok();
            }
        });
    }
}

/// An address of this host that is not loopback, and the interface it is on.
fn outer_address() -> (IpAddr, String) {
    let output = Command::new("ip").args(["-json", "address", "show", "up", "scope", "global"]).output();
    let text = String::from_utf8(output.expect("ip runs").stdout).expect("text");
    let list: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let links = list.as_array().expect("a list").iter();
    let found = links.filter(|link| link["ifname"] != "lo").find_map(|link| {
        let address = link["addr_info"].as_array()?.iter().find_map(|entry| entry["local"].as_str()?.parse().ok())?;
        Some((address, link["ifname"].as_str()?.to_owned()))
    });
    found.expect("the test needs a network interface besides loopback")
}

/// The kernel's tables, ioctl and netlink. Oracle: the control sees the host's interface, a listener and an abstract
/// socket of the test.
#[test]
fn nw_01_there_is_no_interface_but_loopback() {
    let sandbox = sandbox();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let token = canary();
    let _socket = UnixListener::bind_addr(&UnixAddr::from_abstract_name(&token).expect("a name")).expect("a socket");
    let arguments = [listener.local_addr().expect("its address").port().to_string(), token];
    let control = sandbox.control("NW-01", &arguments);
    let inside = sandbox.probe("NW-01", &arguments);
    // A host without a recent neighbour, or without IPv6.
    let vacuous = ["/proc/net/arp", "/proc/net/ipv6_route", "/proc/net/if_inet6"];
    assert_refused_with("NW-01", &control, &inside, &vacuous, |case| {
        if case == "netlink" { &[EPERM] } else { &[0, -1] }
    });
}

/// Every spelling of "this host", by connect, by TCP Fast Open and by datagram. Oracle: the listeners' own counts.
#[test]
fn nw_02_no_listener_of_the_host_is_reached() {
    let sandbox = sandbox();
    let visits = Visits::default();
    let any = |port: u16| SocketAddr::from(([0_u16; 8], port));
    // Bound to everything, both families: whatever address gets through is noticed.
    let stream = TcpListener::bind(any(0)).expect("a listener");
    let port = stream.local_addr().expect("its address").port();
    let datagrams = UdpSocket::bind(any(0)).expect("a socket");
    let datagram_port = datagrams.local_addr().expect("its address").port();
    visits.at_stream(stream);
    visits.at_datagrams(datagrams);
    let outer = outer_address().0.to_string();
    let mut arguments = Vec::new();
    for address in ["127.0.0.1", "[::1]", "127.0.0.2", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", &outer] {
        arguments.push(format!("tcp/{address}:{port}"));
        arguments.push(format!("udp/{address}:{datagram_port}"));
    }
    let control = sandbox.control("NW-02", &arguments);
    assert!(visits.take() >= arguments.len(), "the control did not get through");
    let inside = sandbox.probe("NW-02", &arguments);
    assert_eq!(visits.take(), 0, "somebody got out: {inside:?}");
    assert_refused_with("NW-02", &control, &inside, NONE, |_| UNREACHABLE);
}

/// Runs a row in a network namespace of the test's own, with `addresses` on its loopback and `listeners` around it.
/// Returns the cases and what the listeners saw.
fn in_own_network(addresses: &[&str], listeners: &[&str], setup: &str, command: &Command) -> (Vec<Case>, String) {
    let log = tempfile::NamedTempFile::new().expect("a log");
    let added: String = addresses.iter().map(|address| format!("ip address add {address} dev lo nodad\n")).collect();
    let script = format!("set -e\nip link set lo up\n{added}{setup}\nexec \"$@\"");
    let probe = broker_tests::program("probe");
    let mut words = vec!["unshare", "--net", "--mount", "sh", "-c", &script, "sh"];
    words.extend([probe.to_str().expect("a plain path"), "NW-serve", log.path().to_str().expect("a plain path")]);
    words.extend(listeners);
    words.push("--");
    let cases = cases(&mut below(&words, command));
    assert!(cases.iter().all(|case| case.name != "serve"), "the command failed: {cases:?}");
    (cases, std::fs::read_to_string(log.path()).expect("the log").trim().to_owned())
}

/// The metadata services of three clouds, on addresses that only the test's namespace has. Oracle: the servers' log.
#[test]
fn nw_03_metadata_services_are_not_reached() {
    let sandbox = sandbox();
    let targets = ["169.254.169.254:80", "[fd00:ec2::254]:80", "100.100.100.200:80"];
    let addresses = ["169.254.169.254/32", "fd00:ec2::254/128", "100.100.100.200/32"];
    let listeners = targets.map(|target| format!("http/{target}"));
    let listeners = listeners.each_ref().map(String::as_str);
    let run = |command: &mut Command| in_own_network(&addresses, &listeners, "", command.arg("NW-03").args(targets));
    let (control, seen) = run(&mut Command::new(sandbox.probe_path()));
    assert_eq!(seen.lines().count(), 3, "the control reached: {seen}");
    assert!(control.iter().all(|case| case.detail.starts_with("HTTP/1.1 200")), "{control:?}");
    let (inside, seen) = run(sandbox.command().arg(sandbox.probe_path()));
    assert_eq!(seen, "", "somebody came");
    assert_refused_with("NW-03", &control, &inside, NONE, |_| UNREACHABLE);
}

/// A canary resolver on the addresses that hosts use, as the host's own resolver, on multicast, and at the sockets of
/// the usual daemons. Oracle: its log, which is empty although every case of the control is in it.
#[test]
fn nw_04_no_question_about_a_name_leaves() {
    let sandbox = sandbox();
    let resolvers = ["127.0.0.53", "10.9.8.53", "127.0.0.1"];
    let name = format!("{}.example", canary().to_lowercase());
    let sockets = ["/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve", "/run/dbus/system_bus_socket"];
    let mut listeners: Vec<String> = resolvers.iter().map(|resolver| format!("dns/{resolver}:53")).collect();
    listeners.extend(sockets.map(|path| format!("unix/{path}")));
    listeners.push("mdns".to_owned());
    let listeners: Vec<&str> = listeners.iter().map(String::as_str).collect();
    let file = tempfile::NamedTempFile::new().expect("a file");
    (&file).write_all(b"nameserver 10.9.8.53\noptions timeout:1 attempts:1\n").expect("it is written");
    // A /run of its own: the real daemons, if any, are none of our business.
    let setup = format!(
        "mount --bind {} /etc/resolv.conf\nmount -t tmpfs none /run\nip link set lo multicast on\n\
         ip route add 224.0.0.0/4 dev lo",
        file.path().display()
    );
    let run = |command: &mut Command| {
        let command = command.arg("NW-04").arg(&name).args(resolvers);
        in_own_network(&["10.9.8.53/32"], &listeners, &setup, command)
    };
    let (control, seen) = run(&mut Command::new(sandbox.probe_path()));
    for listener in &listeners {
        assert!(seen.contains(listener), "{listener} was not reached by the control: {seen}\n{control:?}");
    }
    let (inside, seen) = run(sandbox.command().arg(sandbox.probe_path()));
    assert_eq!(seen, "", "a question left");
    assert_refused_with("NW-04", &control, &inside, NONE, |case| match case {
        "nscd" | "resolved" | "dbus" => &[EPERM],
        // The library's own error, which has no errno.
        "getaddrinfo" => &[0, ECONNREFUSED, ENETUNREACH],
        _ => UNREACHABLE,
    });
    let shell = in_own_network(
        &["10.9.8.53/32"],
        &listeners,
        &setup,
        sandbox.command().args(["sh", "-c", &format!("getent hosts {name}; echo '{DONE}'")]),
    );
    assert_eq!(shell.1, "", "a question of the system's own library left");
}

/// A line in the probe's form, for commands that are not the probe.
const DONE: &str = r#"{"id":"-","case":"done","outcome":"open","errno":0,"detail":""}"#;

/// Abstract sockets of all kinds on the host, by a sandbox that may not make Unix sockets and by one that may.
/// Oracles: errnos, and that nothing waits at the listeners; the control connects to all.
#[test]
fn nw_05_abstract_sockets_of_the_host_are_not_reached() {
    let names = [canary(), canary(), canary()];
    let stream = UnixListener::bind_addr(&UnixAddr::from_abstract_name(&names[0]).expect("a name")).expect("a socket");
    let packets = sequenced(&names[1]);
    let datagrams = UnixDatagram::bind_addr(&UnixAddr::from_abstract_name(&names[2]).expect("a name"));
    let datagrams = datagrams.expect("a socket");
    // Bound by the kernel to a name of its choice, five digits: guessable.
    let autobound = UnixDatagram::unbound().expect("a socket");
    rustix::net::bind(&autobound, &autobind()).expect("a name from the kernel");
    let chosen = autobound.local_addr().expect("its name");
    let chosen = String::from_utf8(chosen.as_abstract_name().expect("an abstract name").to_vec()).expect("digits");
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
    for (policy, refusals) in [("", &[EPERM][..]), ("[syscalls]\nunix_sockets = true", &[ECONNREFUSED, EPERM])] {
        let inside = bounded(Sandbox::with(policy)).probe("NW-05", &arguments);
        assert_eq!(waiting(), [false; 3], "somebody came: {inside:?}");
        assert_refused_with("NW-05", &control, &inside, NONE, |_| refusals);
    }
}

fn sequenced(name: &str) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a socket");
    bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes()).expect("a name")).expect("the name is free");
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
    for sandbox in [sandbox(), open] {
        let running = Running::start(sandbox.command().arg(sandbox.probe_path()).args(["NW-05-hold", &name]));
        assert!(running.first_line.contains("bind"), "the attempt did not run: {}", running.first_line);
        let refused = client().expect_err("the host's client talks to a workload");
        assert_eq!(refused.raw_os_error(), Some(ECONNREFUSED));
    }
}

/// Raw and packet sockets, ping sockets, and options that step around the ordinary path. Oracle: EPERM, and ENODEV for
/// binding to an interface that exists only outside.
#[test]
fn nw_07_no_packet_can_be_forged() {
    let sandbox = sandbox();
    let arguments = [outer_address().1];
    let control = sandbox.control("NW-07", &arguments);
    let inside = sandbox.probe("NW-07", &arguments);
    // The kernel has ping sockets, but for nobody by default, and says EACCES.
    assert_refused_with("NW-07", &control, &inside, &["ping", "ping6"], |case| match case {
        "SO_BINDTODEVICE" => &[ENODEV, EPERM],
        // The kernel's own answer to those who lack CAP_NET_ADMIN.
        "SO_DEBUG" => &[EACCES, EPERM],
        _ => &[EPERM],
    });
}

/// What arrives with descriptors at a socket of the host's.
fn received(socket: &UnixStream) -> usize {
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

/// A socket in a shared workspace and a socket as the standard input, a descriptor passed over each. Oracle: the
/// host's ends, at which the control's descriptors arrive; and no socket appears in the workspace.
#[test]
fn nw_10_no_descriptor_leaves() {
    let workspace = tempfile::tempdir().expect("a workspace");
    let listener = UnixListener::bind(workspace.path().join("socket")).expect("a socket");
    listener.set_nonblocking(true).expect("a listener");
    // Everyone may connect to it: only the sandbox stands in between.
    let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(workspace.path().join("socket"), everyone).expect("it is ours");
    let sandbox = sandbox().option("--workspace").option(workspace.path().display().to_string());
    let run = |command: &mut Command, folder: &Path| {
        let (near, far) = UnixStream::pair().expect("a pair");
        let command = command.arg("NW-10").arg(folder.join("socket")).arg(folder.join("new"));
        let cases = cases(command.stdin(OwnedFd::from(far)));
        let by_socket = listener.accept().map_or(0, |(socket, _)| received(&socket));
        (cases, by_socket, received(&near))
    };
    let (control, by_socket, by_input) = run(&mut Command::new(sandbox.probe_path()), workspace.path());
    assert_eq!((by_socket, by_input), (1, 1), "the control's descriptors did not arrive: {control:?}");
    for name in ["new", "new.node"] {
        std::fs::remove_file(workspace.path().join(name)).expect("the control made it");
    }
    let (inside, by_socket, by_input) = run(sandbox.command().arg(sandbox.probe_path()), Path::new("/workspace"));
    assert_eq!((by_socket, by_input), (0, 0), "a descriptor came out: {inside:?}");
    assert!(!workspace.path().join("new").exists() && !workspace.path().join("new.node").exists(), "{inside:?}");
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
    let sibling = sandbox.probe("NW-10-look", &arguments);
    let outside = sandbox.control("NW-10-look", &arguments);
    in_sandbox.finish();
    assert_refused_with("NW-10", &control, &sibling, NONE, refusals);
    assert_refused_with("NW-10", &control, &outside, NONE, refusals);
}
