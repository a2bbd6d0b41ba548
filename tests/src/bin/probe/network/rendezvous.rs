//! Meeting another process: through abstract sockets, sockets in a shared workspace, and shared memory.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix};

use crate::case::Reporter;
use crate::kernel::raw::{self, address, call, judge};

/// A `struct sockaddr_un` and its length; an abstract name begins with NUL.
fn sockaddr(name: &[u8]) -> ([u8; 110], i64) {
    let mut bytes = [0_u8; 110];
    bytes[..2].copy_from_slice(&1_u16.to_ne_bytes());
    bytes[2..2 + name.len()].copy_from_slice(name);
    (bytes, (2 + name.len()) as i64)
}

fn abstract_name(name: &str) -> Vec<u8> {
    [&[0], name.as_bytes()].concat()
}

fn unix(kind: i32) -> i64 {
    call(libc::SYS_socket, &[i64::from(libc::AF_UNIX), i64::from(kind), 0])
}

/// A Unix socket connected to `name`, or -1.
pub fn connect(kind: i32, name: &[u8]) -> i64 {
    let socket = unix(kind);
    let (target, length) = sockaddr(name);
    if socket >= 0 && call(libc::SYS_connect, &[socket, address(&target), length]) < 0 {
        return -1;
    }
    socket
}

/// NW-05 `STREAM SEQPACKET DGRAM AUTOBOUND`: names of abstract sockets of the host.
pub fn abstract_sockets(reporter: &Reporter, arguments: &[String]) {
    let kinds = [libc::SOCK_STREAM, libc::SOCK_SEQPACKET, libc::SOCK_DGRAM, libc::SOCK_DGRAM];
    for ((case, kind), name) in
        ["stream", "seqpacket", "dgram", "autobound"].into_iter().zip(kinds).zip(arguments)
    {
        let socket = connect(kind, &abstract_name(name));
        judge(reporter, &format!("connect {case}"), socket, &[libc::ECONNREFUSED]);
        raw::close(socket);
    }
    let socket = unix(libc::SOCK_DGRAM);
    let (target, length) = sockaddr(&abstract_name(&arguments[2]));
    let sent = if socket < 0 {
        socket
    } else {
        call(libc::SYS_sendto, &[socket, address(b"x"), 1, 0, address(&target), length])
    };
    judge(reporter, "sendto dgram", sent, &[libc::ECONNREFUSED]);
    raw::close(socket);
}

/// NW-05-hold `NAME`: listens there until the standard input ends.
pub fn hold_name(reporter: &Reporter, arguments: &[String]) {
    let socket = unix(libc::SOCK_STREAM);
    let (name, length) = sockaddr(&abstract_name(&arguments[0]));
    let bound = if socket < 0 { socket } else { call(libc::SYS_bind, &[socket, address(&name), length]) };
    let listening = if bound < 0 { bound } else { call(libc::SYS_listen, &[socket, 5]) };
    reporter.syscall("bind", listening);
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
}

/// NW-10 `STREAM DGRAM NEW`: passes a descriptor over the sockets at these paths and over the standard input, and
/// takes a new path, all in a workspace that others share.
pub fn pass(reporter: &Reporter, arguments: &[String]) {
    let socket = connect(libc::SOCK_STREAM, arguments[0].as_bytes());
    if let Ok(number) = i32::try_from(socket)
        && number >= 0
    {
        // SAFETY: the descriptor was just made and is closed below, after its last use.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        send(reporter, "workspace socket", borrowed);
    } else {
        reporter.syscall("workspace socket", -1);
    }
    raw::close(socket);
    send(reporter, "standard input", std::io::stdin().as_fd());

    let socket = unix(libc::SOCK_STREAM);
    let (name, length) = sockaddr(arguments[2].as_bytes());
    let bound = if socket < 0 { socket } else { call(libc::SYS_bind, &[socket, address(&name), length]) };
    reporter.syscall("bind in workspace", bound);
    raw::close(socket);
    for (kind_name, kind) in [("dgram", libc::SOCK_DGRAM), ("raw", libc::SOCK_RAW)] {
        by_pair(reporter, kind_name, kind, &arguments[1], &arguments[2]);
    }
}

/// An end of a datagram pair is a Unix socket like any other, without a call of `socket`: it can be given a name, and
/// it sends to and connects to any other. In the kernel a raw Unix socket is one for datagrams.
fn by_pair(reporter: &Reporter, name: &str, kind: i32, target: &str, new: &str) {
    let mut pair = [-1_i32; 2];
    let made = call(
        libc::SYS_socketpair,
        &[i64::from(libc::AF_UNIX), i64::from(kind), 0, raw::address_mut(&mut pair)],
    );
    if made < 0 {
        // Read once: telling about one may change it for the next.
        let errno = raw::errno();
        for act in ["send", "connect", "bind"] {
            reporter.denied(&format!("pair {name} {act}"), errno, "no pair");
        }
        return;
    }
    let [sender, other] = pair.map(i64::from);
    let root = std::fs::File::open("/").expect("the root directory");
    let descriptors = [root.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); 64];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    // SAFETY: the descriptor was just made and is closed below, after its last use.
    let borrowed = unsafe { BorrowedFd::borrow_raw(pair[0]) };
    let place = SocketAddrUnix::new(target).expect("a short path");
    let sent = rustix::net::sendmsg_addr(
        borrowed,
        &place,
        &[IoSlice::new(b"x")],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    );
    match sent {
        Ok(_) => reporter.open(&format!("pair {name} send"), "sent a descriptor"),
        Err(error) => reporter.denied(&format!("pair {name} send"), error.raw_os_error(), ""),
    }
    let (there, length) = sockaddr(target.as_bytes());
    let connected = call(libc::SYS_connect, &[sender, address(&there), length]);
    reporter.syscall(&format!("pair {name} connect"), connected);
    let (there, length) = sockaddr(format!("{new}.{name}").as_bytes());
    reporter.syscall(&format!("pair {name} bind"), call(libc::SYS_bind, &[other, address(&there), length]));
    raw::close(sender);
    raw::close(other);
}

fn send(reporter: &Reporter, case: &str, socket: BorrowedFd) {
    let root = std::fs::File::open("/").expect("the root directory");
    let descriptors = [root.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); 64];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    match rustix::net::sendmsg(socket, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::NOSIGNAL) {
        Ok(_) => reporter.open(case, "sent a descriptor"),
        Err(error) => reporter.denied(case, error.raw_os_error(), ""),
    }
}

const PLACES: [&str; 4] = ["/dev/shm", "/tmp", "/run", "/var/tmp"];

/// NW-10-hold `TOKEN KEY`: leaves the token wherever another may look, until the standard input ends.
pub fn hold(reporter: &Reporter, arguments: &[String]) {
    let (token, key) = (&arguments[0], arguments[1].parse().expect("a key"));
    let places =
        PLACES.iter().filter(|place| std::fs::write(format!("{place}/{token}"), token).is_ok()).count();
    let memory = call(libc::SYS_shmget, &[key, 4096, 0o1666]);
    let queue = call(libc::SYS_msgget, &[key, 0o1666]);
    let name = std::ffi::CString::new(token.as_str()).expect("no NUL");
    let message_queue = call(libc::SYS_mq_open, &[name.as_ptr() as i64, 0o102, 0o666, 0]);
    reporter.open("holding", &format!("{places} places, shm {memory}, msg {queue}, mq {message_queue}"));
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).ok();
    for place in PLACES {
        std::fs::remove_file(format!("{place}/{token}")).ok();
    }
    call(libc::SYS_shmctl, &[memory, 0, 0]);
    call(libc::SYS_msgctl, &[queue, 0, 0]);
    call(libc::SYS_mq_unlink, &[name.as_ptr() as i64]);
}

/// NW-10-look `TOKEN KEY`: looks for what another holds.
pub fn look(reporter: &Reporter, arguments: &[String]) {
    let (token, key) = (&arguments[0], arguments[1].parse().expect("a key"));
    for place in PLACES {
        let seen = std::fs::read_to_string(format!("{place}/{token}")).ok();
        raw::found(reporter, place, seen);
    }
    judge(reporter, "shmget", call(libc::SYS_shmget, &[key, 0, 0]), &[libc::ENOENT]);
    judge(reporter, "msgget", call(libc::SYS_msgget, &[key, 0]), &[libc::ENOENT]);
    let name = std::ffi::CString::new(token.as_str()).expect("no NUL");
    let queue = call(libc::SYS_mq_open, &[name.as_ptr() as i64, 0, 0, 0]);
    judge(reporter, "mq_open", queue, &[libc::ENOENT]);
}
