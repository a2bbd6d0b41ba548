//! NW-07: sockets and socket options that step around the ordinary path of a packet.

use crate::case::Reporter;
use crate::kernel::raw::{self, address, call};

const INET: i64 = libc::AF_INET as i64;
const INET6: i64 = libc::AF_INET6 as i64;

/// NW-07 `INTERFACE`: one of the host's.
pub fn privileged(reporter: &Reporter, arguments: &[String]) {
    for (case, family, kind, protocol) in [
        ("raw icmp", INET, libc::SOCK_RAW, 1),
        ("raw tcp", INET, libc::SOCK_RAW, 6),
        ("raw any", INET, libc::SOCK_RAW, 255),
        ("raw icmp6", INET6, libc::SOCK_RAW, 58),
        ("packet raw", i64::from(libc::AF_PACKET), libc::SOCK_RAW, 0x0300),
        ("packet dgram", i64::from(libc::AF_PACKET), libc::SOCK_DGRAM, 0x0300),
        ("ping", INET, libc::SOCK_DGRAM, 1),
        ("ping6", INET6, libc::SOCK_DGRAM, 58),
    ] {
        let socket = call(libc::SYS_socket, &[family, i64::from(kind), protocol]);
        reporter.syscall(case, socket);
        raw::close(socket);
    }
    let one = 1_i32;
    let mut name = arguments[0].as_bytes().to_vec();
    name.push(0);
    option(reporter, "IP_HDRINCL", libc::SOCK_RAW, (0, 3), &one.to_ne_bytes());
    option(reporter, "IP_TRANSPARENT", libc::SOCK_DGRAM, (0, 19), &one.to_ne_bytes());
    option(reporter, "SO_MARK", libc::SOCK_DGRAM, (1, 36), &one.to_ne_bytes());
    option(reporter, "SO_BINDTODEVICE", libc::SOCK_DGRAM, (1, 25), &name);
    option(reporter, "SO_RCVBUFFORCE", libc::SOCK_DGRAM, (1, 33), &one.to_ne_bytes());
    option(reporter, "SO_DEBUG", libc::SOCK_STREAM, (1, 1), &one.to_ne_bytes());
    // TCP_REPAIR makes up a connection's state.
    option(reporter, "TCP_REPAIR", libc::SOCK_STREAM, (6, 19), &one.to_ne_bytes());
}

fn option(reporter: &Reporter, case: &str, kind: i32, (level, name): (i64, i64), value: &[u8]) {
    let protocol = if kind == libc::SOCK_RAW { 1 } else { 0 };
    let socket = call(libc::SYS_socket, &[INET, i64::from(kind), protocol]);
    let length = value.len() as i64;
    let set = if socket < 0 {
        socket
    } else {
        call(libc::SYS_setsockopt, &[socket, level, name, address(value), length])
    };
    // ENODEV: the interface named is not there.
    raw::judge(reporter, case, set, &[libc::ENODEV]);
    raw::close(socket);
}
