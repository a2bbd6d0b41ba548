//! Receives descriptors (`SCM_RIGHTS`, unix(7)): each is owned, and closes at execve(2), from the first instant.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;

use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::wire::DESCRIPTORS_MAX;

/// What one recvmsg(2) gave.
pub struct Received {
    /// How many bytes.
    pub bytes: usize,
    /// In the order they were sent.
    pub descriptors: Vec<OwnedFd>,
}

/// One recvmsg(2).
///
/// # Errors
/// As recvmsg(2); `EMSGSIZE` where bytes or descriptors were cut off: those that came are closed.
pub fn receive(from: impl AsFd, bytes: &mut [u8], flags: RecvFlags) -> io::Result<Received> {
    let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(&from, &mut [IoSliceMut::new(bytes)], &mut control, flags | RecvFlags::CMSG_CLOEXEC)
    })?;
    let descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    let descriptors = descriptors.collect();
    if received.flags.intersects(ReturnFlags::CTRUNC | ReturnFlags::TRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok(Received { bytes: received.bytes, descriptors })
}

/// What the kernel calls an open file, `pipe:[N]` or `socket:[N]` for what has no path. Asking the file itself could wait for
/// whoever serves its filesystem.
pub fn name_of(descriptor: impl AsFd) -> String {
    use std::os::fd::AsRawFd;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_fd().as_raw_fd()));
    name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether it is a pipe of pipe(2).
pub fn is_pipe(descriptor: impl AsFd) -> bool {
    name_of(descriptor).starts_with("pipe:[")
}

/// Whether it was opened with `O_PATH` (open(2)).
pub fn is_path(descriptor: impl AsFd) -> bool {
    rustix::fs::fcntl_getfl(descriptor).is_ok_and(|flags| flags.contains(rustix::fs::OFlags::PATH))
}
