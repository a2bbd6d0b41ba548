//! Puts the new root together, from trees that the parent opened. Once the child stands on it, the host's files are gone,
//! and every path here is one inside.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, mkdir, mknodat, openat, symlink};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_change, move_mount, open_tree, unmount,
};

use super::{Failure, Result, Stage};
use crate::plan::files::{EMPTY, WORKSPACE};
use crate::plan::{Exec, Owner, Step};
use crate::sys::{MountAttributes, Reach, mount_setattr};

/// What the parent opened.
pub(crate) struct Trees {
    /// One detached mount for each [`Step::Tree`], in order.
    pub system: Vec<OwnedFd>,
    /// What stands in the private places already, one for each [`Step::Private`]; nothing where they are new.
    pub private: Vec<OwnedFd>,
    /// The idmapped workspace.
    pub workspace: Option<OwnedFd>,
    /// What is protected in it: paths that are there, parents before what is below them.
    pub protect: Vec<PathBuf>,
    /// The devpts.
    pub terminals: OwnedFd,
}

/// The files of a root: a few dozen directories and links.
const ROOT_BYTES: u64 = 4 << 20;
const ROOT_INODES: u32 = 4096;
/// Where the new root is attached for the moment before it becomes the root. Every Linux has it.
const STAND_IN: &str = "/proc";

/// The harmless devices: name, major, minor (`Documentation/admin-guide/devices.txt`).
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes an empty root and lets go of the host's.
pub(super) fn enter_root() -> io::Result<()> {
    // First, so that nothing that follows is seen by the host, nor anything of the host's seen here.
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    // It holds the devices; nobody inside can make another, nor write here once it is sealed.
    tmpfs(Path::new(STAND_IN), ROOT_BYTES, ROOT_INODES, 0o755, 0, MountFlags::empty())?;
    rustix::process::chdir(STAND_IN)?;
    // The old root is stacked onto the new one and then taken off: pivot_root(2), "pivot_root(".", ".")".
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

/// Every step, in order.
pub(super) fn build(steps: &[Step], stage: Stage, trees: &Trees, uid: u32) -> Result<()> {
    let (mut system, mut private) = (trees.system.iter(), trees.private.iter());
    for (object, step) in steps.iter().enumerate() {
        let tree = match step {
            Step::Tree { .. } => system.next(),
            Step::Private { .. } => private.next(),
            Step::Terminals { .. } => Some(&trees.terminals),
            _ => None,
        };
        perform(step, tree, uid).map_err(Failure::at(stage, object))?;
    }
    Ok(())
}

fn perform(step: &Step, tree: Option<&OwnedFd>, uid: u32) -> io::Result<()> {
    let opened = || tree.ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF));
    match step {
        Step::Directory { path } => Ok(mkdir(path, Mode::from_raw_mode(0o755))?),
        Step::Symlink { path, target } => Ok(symlink(target, path)?),
        Step::File { path, content } => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let file = openat(CWD, path, flags, Mode::from_raw_mode(0o444))?;
            Ok(rustix::io::write(file, content.as_bytes()).map(drop)?)
        }
        Step::Tree { path, directory, .. } => {
            make_target(path, *directory)?;
            attach(opened()?, path)
        }
        Step::Private { path, .. } if tree.is_some() => attach(opened()?, path),
        Step::Private { path, size, inodes, mode, owner, exec } => {
            let owner = if *owner == Owner::Workload { uid } else { 0 };
            let exec = if *exec == Exec::No { MountFlags::NOEXEC } else { MountFlags::empty() };
            tmpfs(path, *size, *inodes, *mode, owner, MountFlags::NODEV | exec)
        }
        Step::Devices { path } => devices(path),
        Step::Terminals { path } => attach(opened()?, path),
        Step::Proc { path } => proc(path),
        Step::Cover { path, directory } => cover(path, *directory),
        Step::Replace { path, with } => match mount_bind(with, path) {
            Err(Errno::NOENT) => Ok(()),
            other => Ok(other?),
        },
        Step::Seal { path } => {
            read_only_here(openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
        }
        Step::ReadOnly { path } => bind_onto_itself(path, ReadOnly::Yes),
    }
}

/// The mount and its protected paths.
///
/// A mount on a path makes the path itself immovable (EBUSY), but not the directories above it: each of those is made a
/// mount of its own, still writable, so that `.git` cannot be moved away with `.git/hooks` in it.
pub(super) fn workspace(trees: &Trees) -> Result<()> {
    let Some(tree) = &trees.workspace else {
        return Ok(());
    };
    let top = Path::new(WORKSPACE);
    attach(tree, top).map_err(Failure::at(Stage::Workspace, 0))?;
    let mut pinned: Vec<&Path> = Vec::new();
    for (object, path) in trees.protect.iter().enumerate() {
        let mut above: Vec<&Path> =
            path.ancestors().skip(1).filter(|above| !above.as_os_str().is_empty()).collect();
        above.reverse();
        for directory in above {
            if !pinned.contains(&directory) {
                bind_onto_itself(&top.join(directory), ReadOnly::No)
                    .map_err(Failure::at(Stage::Workspace, object + 1))?;
                pinned.push(directory);
            }
        }
        bind_onto_itself(&top.join(path), ReadOnly::Yes)
            .map_err(Failure::at(Stage::Workspace, object + 1))?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ReadOnly {
    Yes,
    No,
}

fn bind_onto_itself(path: &Path, read_only: ReadOnly) -> io::Result<()> {
    let tree = clone_tree(path)?;
    if read_only == ReadOnly::Yes {
        let attributes = MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..MountAttributes::default() };
        mount_setattr(&tree, attributes, Reach::All)?;
    }
    attach(&tree, path)
}

/// Puts something empty in front of `path`, if anything is there. A classic bind mount is one call instead of three, and
/// keeps the source's flags; its paths are ours, on a root that is read-only by now.
fn cover(path: &Path, directory: bool) -> io::Result<()> {
    match mount_bind(if directory { EMPTY } else { "/dev/null" }, path) {
        Err(Errno::NOENT) => Ok(()),
        other => Ok(other?),
    }
}

/// Neither here nor anywhere else is a symbolic link followed: each path is one that was made a moment ago.
fn clone_tree(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    Ok(open_tree(CWD, path, flags)?)
}

fn attach(mount: impl AsFd, path: &Path) -> io::Result<()> {
    // Without MOVE_MOUNT_T_SYMLINKS the last component is not followed.
    Ok(move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn make_target(path: &Path, directory: bool) -> io::Result<()> {
    if directory {
        return Ok(mkdir(path, Mode::from_raw_mode(0o755))?);
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    Ok(openat(CWD, path, flags, Mode::from_raw_mode(0o444)).map(drop)?)
}

/// The classic call: all of its options are numbers of ours, and it is one call instead of eight.
fn tmpfs(path: &Path, size: u64, inodes: u32, mode: u32, owner: u32, flags: MountFlags) -> io::Result<()> {
    let options = format!("size={size},nr_inodes={inodes},mode={mode:o},uid={owner},gid={owner}");
    let options = CString::new(options)?;
    Ok(mount("tmpfs", path, "tmpfs", flags | MountFlags::NOSUID, options.as_c_str())?)
}

/// The nodes are made, not bound: nothing of the host's `/dev` comes in. Nobody inside can make another.
fn devices(path: &Path) -> io::Result<()> {
    let folder = openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for (name, major, minor) in DEVICES {
        let mode = Mode::from_raw_mode(0o666);
        mknodat(&folder, name, FileType::CharacterDevice, mode, rustix::fs::makedev(major, minor))?;
    }
    for (name, target) in DEVICE_LINKS {
        rustix::fs::symlinkat(target, &folder, name)?;
    }
    for name in ["pts", "shm"] {
        rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755))?;
    }
    Ok(())
}

fn proc(path: &Path) -> io::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("proc", path, "proc", flags, None)?)
}

/// This mount, not those on top of it.
pub(super) fn read_only_here(mount: impl AsFd) -> io::Result<()> {
    let attributes = MountAttributes { set: libc::MOUNT_ATTR_RDONLY, ..MountAttributes::default() };
    mount_setattr(mount, attributes, Reach::One)
}
