//! Who a peer is, by the kernel's word: asked by the core, which decides, and again by who acts and has the rights.

use std::io;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{AcceptConn, PeerCredentials, PeerPidfd};
use rustix::fd::{AsFd, OwnedFd};

use super::config::Peer;

/// The socket that listens for peers, by the device and inode of its file: what was accepted there has the same, and nothing
/// else can have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Door(u64, u64);

impl Door {
    /// Where `listener` listens.
    ///
    /// # Errors
    /// `ENOENT` where it has no file (an abstract socket, unix(7)).
    pub fn of(listener: impl AsFd) -> io::Result<Door> {
        let file = rustix::fs::fstat(sandbox::file_of_socket(listener)?)?;
        Ok(Door(file.st_dev, file.st_ino))
    }

    /// Who connected to this door, by the socket that was accepted for it, and its process where it is still there
    /// (`SO_PEERCRED`, `SO_PEERPIDFD`).
    ///
    /// # Errors
    /// `EPERM` for any other socket. The one that listens, one that was connected to a service of root's, or a pair of the
    /// core's own would tell of another: of whoever called listen(2) or socketpair(2).
    pub fn peer_of(self, socket: impl AsFd) -> io::Result<(Peer, Option<OwnedFd>)> {
        let socket = socket.as_fd();
        if Door::of(socket).ok() != Some(self) || getsockopt(&socket, AcceptConn)? {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let found = getsockopt(&socket, PeerCredentials)?;
        Ok((Peer { uid: found.uid(), gid: found.gid() }, getsockopt(&socket, PeerPidfd).ok()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn only_a_socket_that_was_accepted_at_the_door_tells_who_asks() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "this needs root");
            return;
        }
        let place = std::env::temp_dir().join(format!("broker-door-{}", std::process::id()));
        std::fs::create_dir(&place).expect("a directory");
        let listen = |name: &str| UnixListener::bind(place.join(name)).expect("it listens");
        let (ours, other) = (listen("ours"), listen("other"));
        let connect = |name: &str| UnixStream::connect(place.join(name)).expect("it answers");
        let (client, stranger) = (connect("ours"), connect("other"));
        let (accepted, elsewhere) = (ours.accept().expect("a peer").0, other.accept().expect("a peer").0);
        let (pair, _) = UnixStream::pair().expect("a pair");
        let door = Door::of(&ours).expect("it has a file");
        let (peer, process) = door.peer_of(&accepted).expect("it was accepted there");
        assert!(peer == Peer { uid: 0, gid: nix::unistd::getegid().as_raw() } && process.is_some());
        for socket in
            [client.as_fd(), stranger.as_fd(), elsewhere.as_fd(), pair.as_fd(), ours.as_fd(), other.as_fd()]
        {
            let said = door.peer_of(socket).expect_err("it is no peer's").raw_os_error();
            assert_eq!(said, Some(libc::EPERM));
        }
        std::fs::remove_dir_all(place).expect("it goes");
    }
}
