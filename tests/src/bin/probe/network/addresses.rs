//! Connections and datagrams to the host and to what only the host can reach.

use std::io::{Error, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use crate::case::Reporter;
use crate::kernel::raw::{self, call};

const PATIENCE: Duration = Duration::from_millis(400);

/// NW-02 `tcp/ADDRESS:PORT udp/ADDRESS:PORT...`: a listener at each answers with a byte.
pub fn reach(reporter: &Reporter, arguments: &[String]) {
    for argument in arguments {
        let (kind, target) = argument.split_once('/').expect("kind/address");
        let target: SocketAddr = target.parse().expect("an address and a port");
        let case = format!("{kind} {}", target.ip());
        if kind == "tcp" {
            told(reporter, &case, tcp(target));
            told(reporter, &format!("{case} fast open"), fast_open(target));
        } else {
            told(reporter, &case, udp(target, b"x"));
        }
    }
}

/// NW-03 `ADDRESS...`: asks each for the metadata of the machine.
pub fn metadata(reporter: &Reporter, arguments: &[String]) {
    for argument in arguments {
        let target: SocketAddr = argument.parse().expect("an address and a port");
        let answer = TcpStream::connect_timeout(&target, PATIENCE).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"GET /latest/meta-data/ HTTP/1.1\r\nHost: metadata\r\n\r\n")?;
            let mut answer = [0_u8; 64];
            let length = stream.read(&mut answer)?;
            Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
        });
        told(reporter, &target.ip().to_string(), answer);
    }
}

/// `open` with what came, or `denied` with the errno.
pub fn told(reporter: &Reporter, case: &str, answer: std::io::Result<String>) {
    match answer {
        Ok(answer) => reporter.open(case, &answer),
        Err(error) if error.kind() == ErrorKind::TimedOut => {
            reporter.denied(case, libc::ETIMEDOUT, "no answer")
        }
        Err(error) => reporter.denied(case, error.raw_os_error().unwrap_or(0), &error.to_string()),
    }
}

fn tcp(target: SocketAddr) -> std::io::Result<String> {
    TcpStream::connect_timeout(&target, PATIENCE).map(|_| "connected".to_owned())
}

/// Connects by sending, which is another way into TCP than `connect`.
fn fast_open(target: SocketAddr) -> std::io::Result<String> {
    let (family, name, length) = sockaddr(target);
    let socket = call(libc::SYS_socket, &[family, i64::from(libc::SOCK_STREAM), 0]);
    if socket < 0 {
        return Err(Error::last_os_error());
    }
    let flags = i64::from(libc::MSG_FASTOPEN | libc::MSG_NOSIGNAL);
    let (byte, name) = (raw::address(b"x"), raw::address(&name));
    let sent = call(libc::SYS_sendto, &[socket, byte, 1, flags, name, length]);
    let result = if sent < 0 { Err(Error::last_os_error()) } else { Ok("sent".to_owned()) };
    raw::close(socket);
    result
}

/// The family, the bytes and the length of a `struct sockaddr_in` or `sockaddr_in6`.
fn sockaddr(target: SocketAddr) -> (i64, [u8; 28], i64) {
    let mut bytes = [0_u8; 28];
    bytes[2..4].copy_from_slice(&target.port().to_be_bytes());
    let (family, length) = match target {
        SocketAddr::V4(four) => {
            bytes[4..8].copy_from_slice(&four.ip().octets());
            (libc::AF_INET, 16)
        }
        SocketAddr::V6(six) => {
            bytes[8..24].copy_from_slice(&six.ip().octets());
            (libc::AF_INET6, 28)
        }
    };
    bytes[0] = u8::try_from(family).expect("a small number");
    (i64::from(family), bytes, length)
}

/// Sends `text` and waits for any answer.
pub fn udp(target: SocketAddr, text: &[u8]) -> std::io::Result<String> {
    let socket = UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // Connected, so that a refusal comes back as an error and not as silence.
    socket.connect(target)?;
    socket.send(text)?;
    let mut answer = [0_u8; 512];
    let length = socket.recv(&mut answer)?;
    Ok(format!("{length} bytes came back"))
}
