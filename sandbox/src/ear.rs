//! A sandbox's network is its broker's ear: sockets that listen in the sandbox's network namespace and belong to who holds them
//! outside. There is no other way out of that namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use nix::sched::{CloneFlags, setns};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, listen, recv, sendto, socket_with,
    sockopt,
};

use crate::sys;

/// Every address of these ranges is this host, inside (RFC 2544's benchmark range; a unique local prefix, RFC 4193).
const RANGE_V4: (Ipv4Addr, u8) = (Ipv4Addr::new(198, 18, 0, 0), 15);
const RANGE_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd62, 0x726f, 0x6b65, 0x7200, 0, 0, 0, 0), 64);
/// Where names are asked for.
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 53);
/// Connections that nobody has accepted yet, of one listener.
const BACKLOG: i32 = 128;

/// The address of the name server inside.
pub fn name_server() -> Ipv4Addr {
    NAME_SERVER
}

/// The addresses of the name with this number, of which a sandbox has no second.
pub fn addresses(number: u16) -> [IpAddr; 2] {
    let [high, low] = number.to_be_bytes();
    let [a, b, c, d, ..] = RANGE_V6.0.segments();
    [IpAddr::V4(Ipv4Addr::new(198, 19, high, low)), IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 1, number))]
}

/// What listens in a sandbox's network namespace.
#[derive(Debug)]
pub struct Ear {
    /// For questions about names (RFC 1035, UDP).
    pub names: OwnedFd,
    /// One for each address that was asked for, in order.
    pub listeners: Vec<OwnedFd>,
}

/// Makes what listens in `network`, before anybody is in it. The caller has one thread, and is in its own namespace again when
/// this returns; a process that cannot go back ends.
///
/// # Errors
/// As the call that failed.
pub fn make_ear(network: impl AsFd, listen_at: &[SocketAddr]) -> io::Result<Ear> {
    let own = openat(CWD, "/proc/self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    setns(network, CloneFlags::CLONE_NEWNET)?;
    let made = make(listen_at);
    if setns(own, CloneFlags::CLONE_NEWNET).is_err() {
        sys::exit_now(1);
    }
    made
}

fn make(listen_at: &[SocketAddr]) -> io::Result<Ear> {
    let (v4, v6) = (RANGE_V4.0.octets(), RANGE_V6.0.octets());
    add_local_route(AddressFamily::INET, &v4, RANGE_V4.1)?;
    add_local_route(AddressFamily::INET6, &v6, RANGE_V6.1)?;
    let names = socket(AddressFamily::INET, SocketType::DGRAM)?;
    bind(&names, &SocketAddrV4::new(NAME_SERVER, 53))?;
    let listeners = listen_at.iter().map(listener).collect::<io::Result<_>>()?;
    Ok(Ear { names, listeners })
}

fn socket(family: AddressFamily, kind: SocketType) -> io::Result<OwnedFd> {
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?)
}

/// Never a wildcard, which would take the workload's own servers too, and never shared (`SO_REUSEPORT`).
fn listener(address: &SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket(family, SocketType::STREAM)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
        // That its route is local does not make it an address of an interface, as it does in IPv4.
        sockopt::set_ipv6_freebind(&socket, true)?;
    }
    bind(&socket, address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// `ip route add local RANGE dev lo` (rtnetlink(7)).
fn add_local_route(family: AddressFamily, range: &[u8], bits: u8) -> io::Result<()> {
    const LOOPBACK: u32 = 1;
    let attribute = |kind: u16, value: &[u8]| {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat()
    };
    let family_byte = family.as_raw().to_le_bytes()[0];
    // struct rtmsg: family, destination bits, source bits, type of service, table, protocol, scope, type, flags.
    let route = [
        family_byte,
        bits,
        0,
        0,
        libc::RT_TABLE_LOCAL,
        libc::RTPROT_STATIC,
        libc::RT_SCOPE_HOST,
        libc::RTN_LOCAL,
    ];
    let body = [
        &route[..],
        &0_u32.to_ne_bytes(),
        &attribute(libc::RTA_DST, range),
        &attribute(libc::RTA_OIF, &LOOPBACK.to_ne_bytes()),
    ]
    .concat();
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    // struct nlmsghdr: length, type, flags, sequence, port.
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let message =
        [&length.to_ne_bytes()[..], &libc::RTM_NEWROUTE.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8], &body]
            .concat();
    let kernel = SocketAddrNetlink::new(0, 0);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    sendto(&socket, &message, SendFlags::empty(), &kernel)?;
    let mut answer = [0; 256];
    recv(&socket, &mut answer[..], RecvFlags::empty())?;
    // struct nlmsgerr after the header: a negative errno, or 0.
    let errno = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-errno)) }
}
