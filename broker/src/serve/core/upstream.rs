//! Where a grant's connections go: to what the operator has pinned, or to what its host's name stands for, once that was looked at.
//! The name is looked up for each connection, and what was looked at is what is connected to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use super::Core;
use crate::grant::Grant;

impl Core {
    /// Addresses to be tried in order.
    pub(super) async fn addresses_of(&self, grant: &Grant) -> Result<Vec<SocketAddr>, String> {
        if let Some(pinned) = grant.upstream {
            return Ok(vec![pinned]);
        }
        let found = self.resolve(&grant.host).await?;
        let port = grant.upstream_port();
        // One is enough to say what the name is used for.
        if let Some((address, why)) = found.iter().find_map(|address| Some((address, refusal(*address)?))) {
            return Err(format!("{} is {address}, {why}; the operator can pin it (`upstream`)", grant.host));
        }
        if found.is_empty() {
            return Err(format!("{} has no address", grant.host));
        }
        Ok(found.into_iter().map(|address| SocketAddr::new(address, port)).collect())
    }
}

/// Why a name that stands for this address is not connected to.
fn refusal(address: IpAddr) -> Option<&'static str> {
    let not_public = match address {
        IpAddr::V4(address) => not_public_v4(address),
        IpAddr::V6(address) => not_public_v6(address),
    };
    not_public.or_else(|| is_own(address).then_some("this host itself"))
}

/// As IANA's registry of special-purpose addresses has it (RFC 6890).
fn not_public_v4(address: Ipv4Addr) -> Option<&'static str> {
    match address.octets() {
        [0, ..] => Some("this network"),
        [127, ..] => Some("this host itself"),
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Some("a private network's"),
        [100, 64..=127, ..] => Some("a provider's own"),
        [169, 254, ..] => Some("link-local, where clouds keep their metadata"),
        [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] | [192, 88, 99, _] => Some("no host's"),
        [198, 18..=19, ..] => Some("of a benchmark's network"),
        [224..=255, ..] => Some("no host's"),
        _ => None,
    }
}

/// Only global unicast addresses, and of those none that stand for an address of IPv4, or for documents (RFC 6890, RFC 9637).
fn not_public_v6(address: Ipv6Addr) -> Option<&'static str> {
    if address.is_loopback() {
        return Some("this host itself");
    }
    match address.segments() {
        [0xfe80..=0xfebf, ..] => Some("link-local"),
        [0xfc00..=0xfdff, ..] => Some("a private network's"),
        [0x2001, 0..=0x1ff | 0xdb8, ..] | [0x2002, ..] | [0x3fff, 0..=0xfff, ..] => Some("no host's"),
        [0x2000..=0x3fff, ..] => None,
        _ => Some("not of the public Internet, or an address of IPv4 in disguise"),
    }
}

/// What the kernel would answer itself: it then is the address that a packet to it would come from. None is sent.
fn is_own(address: IpAddr) -> bool {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let from = || {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((address, 9))?;
        socket.local_addr()
    };
    from().is_ok_and(|from| from.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_taken() {
        for refused in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.53",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
            "fc00::1",
            "fd62:726f:6b65:7200::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(refusal(refused.parse().expect("an address")).is_some(), "{refused}");
        }
        for public in [
            "1.1.1.1",
            "100.63.255.255",
            "172.32.0.1",
            "198.20.0.1",
            "2606:4700::1111",
            "2001:4860:4860::8888",
        ] {
            let address: IpAddr = public.parse().expect("an address");
            let special = match address {
                IpAddr::V4(address) => not_public_v4(address),
                IpAddr::V6(address) => not_public_v6(address),
            };
            assert_eq!(special, None, "{public}");
        }
    }
}
