//! Rows NW-*: a sandbox without grants has its own loopback and nothing else. Whatever arrives at a listener of the
//! host is a leak, whoever says otherwise.

#[path = "network/rendezvous.rs"]
mod rendezvous;

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use broker_tests::{Case, Sandbox, assert_refused_with, below, canary, cases_in};
use libc::{EACCES, ECONNREFUSED, ENETUNREACH, ENODEV, EPERM};

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
        let address =
            link["addr_info"].as_array()?.iter().find_map(|entry| entry["local"].as_str()?.parse().ok())?;
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
    let _socket =
        UnixListener::bind_addr(&UnixAddr::from_abstract_name(&token).expect("a name")).expect("a socket");
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
    // One that listens everywhere answers this address from another, which the asker would not take.
    let second = UdpSocket::bind("127.0.0.2:0").expect("a socket");
    let second_port = second.local_addr().expect("its address").port();
    visits.at_datagrams(second);
    let outer = outer_address().0.to_string();
    let mut arguments = Vec::new();
    for address in ["127.0.0.1", "[::1]", "127.0.0.2", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", &outer] {
        arguments.push(format!("tcp/{address}:{port}"));
        let port = if address == "127.0.0.2" { second_port } else { datagram_port };
        arguments.push(format!("udp/{address}:{port}"));
    }
    let control = sandbox.control("NW-02", &arguments);
    assert!(visits.take() >= arguments.len(), "the control did not get through");
    let inside = sandbox.probe("NW-02", &arguments);
    assert_eq!(visits.take(), 0, "somebody got out: {inside:?}");
    assert_refused_with("NW-02", &control, &inside, NONE, |_| UNREACHABLE);
}

/// Runs a row in a network namespace of the test's own, with `addresses` on its loopback and `listeners` around it.
/// Returns the cases and what the listeners saw.
fn in_own_network(
    addresses: &[&str],
    listeners: &[&str],
    setup: &str,
    command: &Command,
) -> (Vec<Case>, String) {
    let log = tempfile::NamedTempFile::new().expect("a log");
    let added: String =
        addresses.iter().map(|address| format!("ip address add {address} dev lo\n")).collect();
    let script = format!("set -e\nip link set lo up\n{added}{setup}\nexec \"$@\"");
    let probe = broker_tests::program("probe");
    let mut words = vec!["unshare", "--net", "--mount", "sh", "-c", &script, "sh"];
    words.extend([
        probe.to_str().expect("a plain path"),
        "NW-serve",
        log.path().to_str().expect("a plain path"),
    ]);
    words.extend(listeners);
    words.push("--");
    let output = below(&words, command).output().expect("unshare runs");
    let cases = cases_in(&String::from_utf8_lossy(&output.stdout));
    let failed = cases.is_empty() || cases.iter().any(|case| case.name == "serve");
    assert!(!failed, "the command failed: {cases:?}\n{}", String::from_utf8_lossy(&output.stderr));
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
    let run = |command: &mut Command| {
        in_own_network(&addresses, &listeners, "", command.arg("NW-03").args(targets))
    };
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
    let sockets =
        ["/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve", "/run/dbus/system_bus_socket"];
    let mut listeners: Vec<String> = resolvers.iter().map(|resolver| format!("dns/{resolver}:53")).collect();
    listeners.extend(sockets.map(|path| format!("unix/{path}")));
    listeners.push("mdns".to_owned());
    let listeners: Vec<&str> = listeners.iter().map(String::as_str).collect();
    let file = tempfile::NamedTempFile::new().expect("a file");
    (&file).write_all(b"nameserver 10.9.8.53\noptions timeout:1 attempts:1\n").expect("it is written");
    // A /run of its own: the real daemons, if any, are none of our business. Only the broker's own part of it stays:
    // it is where concurrent runs keep their host users apart.
    let aside = tempfile::tempdir().expect("a directory");
    let setup = format!(
        "mount --bind {resolver} /etc/resolv.conf\nmkdir -p /run/broker\nmount --bind /run/broker {aside}\n\
         mount -t tmpfs none /run\nmkdir /run/broker\nmount --bind {aside} /run/broker\n\
         ip link set lo multicast on\nip route add 224.0.0.0/4 dev lo",
        resolver = file.path().display(),
        aside = aside.path().display(),
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
