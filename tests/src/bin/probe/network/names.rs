//! NW-04: names, by every way a C library has to resolve one.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use crate::case::Reporter;
use crate::kernel::raw;
use crate::network::{addresses, rendezvous};

/// The question for the A record of `name`.
fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).expect("a short label"));
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// NW-04 `NAME RESOLVER...`: a canary resolver answers at each address and at the sockets of the usual daemons.
pub fn resolve(reporter: &Reporter, arguments: &[String]) {
    let (name, resolvers) = arguments.split_first().expect("a name");
    let question = question(name);
    for resolver in resolvers {
        let target: SocketAddr = format!("{resolver}:53").parse().expect("an address");
        addresses::told(reporter, &format!("udp {resolver}"), addresses::udp(target, &question));
        addresses::told(reporter, &format!("tcp {resolver}"), tcp(target, &question));
    }
    let resolved =
        (name.as_str(), 80).to_socket_addrs().map(|found| found.map(|address| address.to_string()).collect());
    addresses::told(reporter, "getaddrinfo", resolved);
    // Multicast has no answer to wait for on our side: whether it came, the host knows. A send that works is open.
    let mdns = UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(&question, "224.0.0.251:5353"));
    addresses::told(reporter, "mdns", mdns.map(|length| format!("{length} bytes sent")));
    for (case, path) in [
        ("nscd", "/run/nscd/socket"),
        ("resolved", "/run/systemd/resolve/io.systemd.Resolve"),
        ("dbus", "/run/dbus/system_bus_socket"),
    ] {
        let socket = rendezvous::connect(libc::SOCK_STREAM, path.as_bytes());
        raw::judge(reporter, case, socket, &[libc::ENOENT, libc::ECONNREFUSED]);
        raw::close(socket);
    }
}

fn tcp(target: SocketAddr, question: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_millis(400))?;
    stream.set_read_timeout(Some(Duration::from_millis(400)))?;
    stream.write_all(&u16::try_from(question.len()).expect("a short question").to_be_bytes())?;
    stream.write_all(question)?;
    let mut answer = [0_u8; 512];
    let length = stream.read(&mut answer)?;
    Ok(format!("{length} bytes came back"))
}
