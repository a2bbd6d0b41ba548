//! What a workload changed in a workspace that it got to see, and not to change: the upper layer of an overlay
//! (`Documentation/filesystems/overlayfs.rst`), kept after the sandbox has ended.
//!
//! It belongs to the sandbox's own uid and lies where only root comes; everything in it, names too, is the workload's.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, mkdirat, openat, openat2,
    statat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount,
    open_tree,
};

use crate::sys::{self, MountAttributes, Reach};
use crate::workspace::one_owner;

/// The layer itself, and what the kernel needs beside it.
const FILES: &str = "files";
const WORK: &str = "work";

/// Makes the layer in `place`, a directory of ours that is new and on a filesystem that overlays can write.
fn make(place: &Path, uid: u32, mode: Mode) -> io::Result<()> {
    std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o700)
        .create(place)?;
    let folder = crate::host::open_directory(place)?;
    mkdirat(&folder, WORK, Mode::RWXU)?;
    mkdirat(&folder, FILES, Mode::RWXU)?;
    // Whatever the mask.
    rustix::fs::chmodat(&folder, FILES, mode, AtFlags::empty())?;
    let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)));
    Ok(chownat(&folder, FILES, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// A detached mount that shows `lower`, a detached mount too, and takes what is written to a new layer in `place`. `mode` is
/// that of its root, `stand` a directory of ours where `lower` is attached meanwhile, in a mount namespace of this
/// process's own.
pub(crate) fn overlay(
    lower: OwnedFd,
    place: &Path,
    uid: u32,
    mode: Mode,
    stand: &Path,
) -> io::Result<OwnedFd> {
    make(place, uid, mode)?;
    crate::slot::make_private(stand)?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    move_mount(lower, "", CWD, stand, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in
        [("lowerdir", stand.to_path_buf()), ("upperdir", place.join(FILES)), ("workdir", place.join(WORK))]
    {
        fsconfig_set_string(context.as_fd(), key, value.as_os_str().as_bytes())?;
    }
    // Marks of the overlay's own can then be read by who owns the files; and none leads from one directory to another.
    fsconfig_set_flag(context.as_fd(), "userxattr")?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Whether nothing was changed in the layer in `place`.
///
/// # Errors
/// As getdents(2).
pub fn is_unchanged(place: &Path) -> io::Result<bool> {
    let files =
        openat(CWD, place.join(FILES), OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let own = |entry: rustix::io::Result<rustix::fs::DirEntry>| {
        entry.map_or(true, |entry| ![b".".as_slice(), b".."].contains(&entry.file_name().to_bytes()))
    };
    Ok(!Dir::read_from(files)?.any(own))
}

/// The layer in `place`, read-only, as a directory in which the files of `workload` are `owner`'s and all others nobody's.
///
/// # Errors
/// As the call that failed.
pub fn show_changes(place: &Path, workload: u32, owner: (u32, u32)) -> io::Result<OwnedFd> {
    let files = crate::host::open_directory(&place.join(FILES))?;
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(&files, "", flags)?;
    let map = one_owner((workload, workload), owner)?;
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_IDMAP
            | libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC,
        clear: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: sys::raw(&map),
    };
    sys::mount_setattr(&mount, attributes, Reach::All)?;
    // A descriptor of the mount itself could be given other attributes in a namespace of its holder's; of a directory in
    // it, whose mount belongs to no namespace any more, nothing can be made but what it is.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(&mount, ".", flags, Mode::empty())?)
}

/// Removes the layer in `place` and `place` itself.
///
/// # Errors
/// As unlinkat(2).
pub fn discard_changes(place: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    remove_tree(crate::host::open_directory(parent)?, name)
}

/// Removes `name` in `parent` and, if it is a directory, all that is in it, however deep: it takes one descriptor and a name a
/// level, and follows no link. A directory that is moved away meanwhile ends it.
///
/// # Errors
/// As unlinkat(2); `ESTALE` where a directory was moved.
pub fn remove_tree(parent: impl AsFd, name: &OsStr) -> io::Result<()> {
    let is_directory = |error: &Errno| matches!(*error, Errno::ISDIR | Errno::PERM);
    match unlinkat(&parent, name, AtFlags::empty()) {
        Err(error) if is_directory(&error) => {}
        other => return Ok(other?),
    }
    let mut current = open_below(&parent, name)?;
    let mut above: Vec<(PathBuf, (u64, u64))> = Vec::new();
    loop {
        if let Some(child) = empty(&current)? {
            let inner = open_below(&current, child.as_os_str())?;
            above.push((child, identity(&current)?));
            current = inner;
        } else if let Some((child, came_from)) = above.pop() {
            let outer = open_below(&current, OsStr::new(".."))?;
            if identity(&outer)? != came_from {
                return Err(io::Error::from_raw_os_error(libc::ESTALE));
            }
            unlinkat(&outer, child, AtFlags::REMOVEDIR)?;
            current = outer;
        } else {
            return Ok(unlinkat(&parent, name, AtFlags::REMOVEDIR)?);
        }
    }
}

/// Removes what is no directory; the first that is one.
fn empty(directory: &OwnedFd) -> io::Result<Option<PathBuf>> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                FileType::from_raw_mode(statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
            }
            kind => kind,
        };
        if kind.is_dir() {
            return Ok(Some(name.into()));
        }
        unlinkat(directory, name, AtFlags::empty())?;
    }
    Ok(None)
}

/// Not into what is mounted there: that is another's.
fn open_below(directory: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    Ok(openat2(directory, name, flags, Mode::empty(), resolve)?)
}

fn identity(directory: &OwnedFd) -> io::Result<(u64, u64)> {
    let found = rustix::fs::fstat(directory)?;
    Ok((found.st_dev, found.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_goes_however_deep_and_wide_it_is_and_nothing_beside_it() {
        let folder = std::env::temp_dir().join(format!("broker-remove-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("tree/wide")).expect("a directory");
        std::fs::write(folder.join("kept"), "").expect("a file");
        std::os::unix::fs::symlink("../kept", folder.join("tree/link")).expect("a link");
        for number in 0..2000 {
            std::fs::create_dir(folder.join(format!("tree/wide/{number}"))).expect("a directory");
            std::fs::write(folder.join(format!("tree/wide/{number}\n")), "").expect("a file");
        }
        let mut deep = crate::host::open_directory(&folder.join("tree")).expect("it is there");
        for _ in 0..3000 {
            mkdirat(&deep, "down", Mode::RWXU).expect("a directory");
            deep = open_below(&deep, OsStr::new("down")).expect("it is there");
        }
        drop(deep);
        let parent = crate::host::open_directory(&folder).expect("it is there");
        remove_tree(&parent, OsStr::new("tree")).expect("it goes");
        assert!(!folder.join("tree").exists() && folder.join("kept").exists());
        remove_tree(&parent, OsStr::new("kept")).expect("a file goes too");
        std::fs::remove_dir(&folder).expect("nothing else is left");
    }
}
