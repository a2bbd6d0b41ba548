//! KS-05: every socket family, type and protocol that there is a number for.

use crate::case::Reporter;
use crate::kernel::raw::{self, address_mut, call};

const TYPES: [(&str, i32); 4] = [
    ("stream", libc::SOCK_STREAM),
    ("dgram", libc::SOCK_DGRAM),
    ("raw", libc::SOCK_RAW),
    ("seqpacket", libc::SOCK_SEQPACKET),
];

/// What the policy leaves open: INET and INET6 with streams and datagrams, connected UNIX pairs. Datagram pairs are
/// judged by what they reach (NW-10).
fn promised(family: i64, kind: i32, pair: bool) -> bool {
    let ordinary = kind == libc::SOCK_STREAM || kind == libc::SOCK_DGRAM;
    if pair {
        family == i64::from(libc::AF_UNIX) && kind != libc::SOCK_RAW
    } else {
        [2, 10].contains(&family) && ordinary
    }
}

/// Tries everything that the policy does not promise. AF_VSOCK is only created, never connected.
pub fn sweep(reporter: &Reporter, _: &[String]) {
    for family in 0..=45 {
        for (name, kind) in TYPES {
            if !promised(family, kind, false) {
                socket(reporter, &format!("socket {family} {name}"), family, kind, 0);
            }
            if !promised(family, kind, true) {
                let case = format!("socketpair {family} {name}");
                let mut pair = [-1_i32; 2];
                let made = call(libc::SYS_socketpair, &[family, i64::from(kind), 0, address_mut(&mut pair)]);
                reporter.syscall(&case, made);
                pair.iter().for_each(|end| raw::close(i64::from(*end)));
            }
        }
    }
    for protocol in 0..32 {
        socket(
            reporter,
            &format!("netlink {protocol}"),
            i64::from(libc::AF_NETLINK),
            libc::SOCK_RAW,
            protocol,
        );
    }
    // Protocols that turn a promised family and type into something else: ICMP, SCTP, UDP-Lite, MPTCP, DCCP.
    for family in [2, 10] {
        for (name, kind, protocol) in [
            ("ping", libc::SOCK_DGRAM, if family == 2 { 1 } else { 58 }),
            ("sctp", libc::SOCK_STREAM, 132),
            ("udplite", libc::SOCK_DGRAM, 136),
            ("mptcp", libc::SOCK_STREAM, 262),
            ("dccp", 6, 33),
        ] {
            socket(reporter, &format!("{name} {family}"), family, kind, protocol);
        }
    }
    // The kernel looks at 32 bits of each argument.
    socket(reporter, "family with high bits", 0x1_0000_0010, libc::SOCK_RAW, 0);
    socket(reporter, "family as negative", 0xffff_ffff_0000_0028_u64.cast_signed(), libc::SOCK_STREAM, 0);
    // SOCK_NONBLOCK and SOCK_CLOEXEC are flags in the type: a filter must compare without them.
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    socket(reporter, "raw with flags", 2, libc::SOCK_RAW | flags, 1);
    socket(reporter, "unix with flags", 1, libc::SOCK_STREAM | flags, 0);
}

fn socket(reporter: &Reporter, case: &str, family: i64, kind: i32, protocol: i64) {
    let made = call(libc::SYS_socket, &[family, i64::from(kind), protocol]);
    reporter.syscall(case, made);
    raw::close(made);
}
