//! Opens the host's trees, before anything is forked, so that an error can still be told in full.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen, open_tree,
};

use crate::confine::Trees;
use crate::plan::{Plan, Step};
use crate::sys::{MountAttributes, Reach, mount_setattr};
use crate::workspace::Workspace;

/// A tree that could not be opened.
#[derive(Debug)]
pub struct OpenError {
    /// Which.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// Everything that the child attaches.
pub(crate) fn trees(plan: &Plan, workspace: Option<&Workspace>, uid: u32) -> Result<Trees, OpenError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError { path, source }
    };
    let sources = plan.files.iter().filter_map(|step| match step {
        Step::Tree { source, .. } => Some(source.as_path()),
        _ => None,
    });
    let mount = workspace.map(|workspace| workspace.mount.try_clone()).transpose();
    Ok(Trees {
        system: sources.map(|path| tree(path).map_err(failed(path))).collect::<Result<_, _>>()?,
        private: Vec::new(),
        workspace: mount.map_err(failed(Path::new("workspace")))?,
        protect: workspace.map(|workspace| workspace.protect.clone()).unwrap_or_default(),
        terminals: terminals(uid).map_err(failed(Path::new("/dev/pts")))?,
    })
}

/// Read-only, without set-id bits and devices, and cut off from the host's mount events.
fn tree(path: &Path) -> io::Result<OwnedFd> {
    // The plan holds resolved paths; whoever swaps a link in since then gets an error.
    let found = openat2(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(&found, "", flags)?;
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
        propagation: libc::MS_PRIVATE,
        ..MountAttributes::default()
    };
    mount_setattr(&mount, attributes, Reach::All)?;
    Ok(mount)
}

/// A devpts(5) of its own, not yet mounted anywhere; its terminals belong to the workload.
fn terminals(uid: u32) -> io::Result<OwnedFd> {
    let context = fsopen("devpts", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let uid = uid.to_string();
    for (key, value) in
        [("ptmxmode", "0666"), ("mode", "0620"), ("uid", uid.as_str()), ("gid", uid.as_str()), ("max", "64")]
    {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// A terminal of `terminals`: the side that stays outside, and the one that goes in.
pub(crate) fn terminal(terminals: &OwnedFd) -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let outside = openat(terminals, "ptmx", flags, Mode::empty())?;
    unlockpt(&outside)?;
    let inside = ioctl_tiocgptpeer(&outside, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    Ok((outside, inside))
}
