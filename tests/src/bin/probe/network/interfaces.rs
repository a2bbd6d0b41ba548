//! NW-01: what there is to see of the host's network.

use crate::case::Reporter;
use crate::kernel::raw::{self, address, address_mut, call, found};

/// NW-01 `PORT NAME`: a TCP port on which the host listens, and the name of an abstract socket of the host.
pub fn list(reporter: &Reporter, arguments: &[String]) {
    let port: u16 = arguments[0].parse().expect("a port");
    let read = |name: &str| std::fs::read_to_string(format!("/proc/net/{name}")).unwrap_or_default();
    let other = |name: &str| (name != "lo").then(|| name.to_owned());

    let devices = read("dev");
    let mut names = devices.lines().filter_map(|line| Some(line.split_once(':')?.0.trim()));
    found(reporter, "/proc/net/dev", names.find_map(other));
    found(reporter, "/proc/net/route", read("route").lines().nth(1).map(str::to_owned));
    found(reporter, "/proc/net/arp", read("arp").lines().nth(1).map(str::to_owned));
    let routes = read("ipv6_route");
    found(
        reporter,
        "/proc/net/ipv6_route",
        routes.lines().find_map(|line| other(line.split_whitespace().last()?)),
    );
    let addresses = read("if_inet6");
    found(
        reporter,
        "/proc/net/if_inet6",
        addresses.lines().find_map(|line| other(line.split_whitespace().last()?)),
    );
    let listener = format!(":{port:04X} ");
    found(
        reporter,
        "/proc/net/tcp",
        read("tcp").lines().find(|line| line.contains(&listener)).map(str::to_owned),
    );
    found(
        reporter,
        "/proc/net/unix",
        read("unix").lines().find(|line| line.contains(&arguments[1])).map(str::to_owned),
    );
    let class = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    found(
        reporter,
        "/sys/class/net",
        class.map(|entry| entry.file_name()).find_map(|name| other(name.to_str()?)),
    );

    let socket = call(libc::SYS_socket, &[i64::from(libc::AF_INET), i64::from(libc::SOCK_DGRAM), 0]);
    let by_index = (1..64_u32).find_map(|index| {
        // struct ifreq: the name, then the index.
        let mut request = [0_u8; 40];
        request[16..20].copy_from_slice(&index.to_ne_bytes());
        let result = call(libc::SYS_ioctl, &[socket, i64::from(0x8910), address_mut(&mut request)]); // SIOCGIFNAME
        let name = String::from_utf8_lossy(&request[..16]).trim_end_matches('\0').to_owned();
        if result < 0 { None } else { other(&name) }
    });
    found(reporter, "SIOCGIFNAME", by_index);
    raw::close(socket);
    netlink(reporter);
}

/// Asks the kernel for all links: one message each, of which more than one would be more than loopback.
fn netlink(reporter: &Reporter) {
    let socket = call(libc::SYS_socket, &[i64::from(libc::AF_NETLINK), i64::from(libc::SOCK_RAW), 0]);
    if socket < 0 {
        return reporter.syscall("netlink", socket);
    }
    // struct nlmsghdr: 32 bytes, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP; then an empty struct ifinfomsg.
    let request: [u32; 8] = [32, 18 | (0x301 << 16), 1, 0, 0, 0, 0, 0];
    call(libc::SYS_sendto, &[socket, address(&request), 32, 0, 0, 0]);
    let mut answer = vec![0_u8; 32768];
    let length = call(libc::SYS_recvfrom, &[socket, address_mut(answer.as_mut_slice()), 32768, 0, 0, 0]);
    answer.truncate(usize::try_from(length).unwrap_or(0));
    let mut links = 0;
    while let Some(Ok(size)) = answer.get(..4).map(<[u8; 4]>::try_from) {
        // RTM_NEWLINK
        links += usize::from(answer[4] == 16);
        let size = (u32::from_ne_bytes(size) as usize).next_multiple_of(4);
        answer.drain(..size.clamp(16, answer.len()));
    }
    found(reporter, "netlink", (links > 1).then(|| format!("{links} links")));
    raw::close(socket);
}
