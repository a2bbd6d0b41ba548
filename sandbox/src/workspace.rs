//! Opens a workspace by the caller's own right, and holds the places of protected paths that are not there.
//!
//! A placeholder is an empty directory: git does not see it, and rmdir(2) cannot destroy anything. It carries a mark
//! (xattr(7)) and a lock, so that runs on one workspace at the same time agree who takes it away, and the next run
//! takes away what a killed one left.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, XattrFlags, fchown,
    fgetxattr, flock, fsetxattr, fstat, fstatfs, mkdirat, openat, openat2, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::job::WorkspaceMode;
use crate::plan::{Placeholder, Protect, WorkspacePlan};
use crate::sys::{self, MountAttributes, Reach, Side};

/// The mark of a placeholder.
const MARK: &str = "user.broker.placeholder";
/// `OVERLAYFS_SUPER_MAGIC`.
const OVERLAY_MAGIC: u64 = 0x794c_7630;
/// How often a placeholder that another run is just taking away is made again.
const TRIES: u32 = 100;

/// Why a workspace cannot be used.
#[derive(Debug)]
pub enum WorkspaceError {
    /// The directory cannot be opened.
    Open {
        /// As asked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The filesystem cannot show its files under another uid.
    Idmap {
        /// As asked for.
        path: PathBuf,
        /// Whether it is an overlay.
        overlay: bool,
        /// Why.
        source: io::Error,
    },
    /// A protected path is, or leads through, a symbolic link, so what it protects could be anywhere.
    Link {
        /// Below the workspace.
        path: PathBuf,
    },
    /// The place of a protected path cannot be held.
    Hold {
        /// Below the workspace.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl std::fmt::Display for WorkspaceError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WorkspaceError::Open { path, source } => {
                write!(out, "cannot open the workspace {}: {source}", path.display())
            }
            WorkspaceError::Idmap { path, overlay: true, .. } => write!(
                out,
                "the workspace {} lies on an overlay filesystem, which cannot be idmapped; put it on ext4, xfs, btrfs or tmpfs \
                 (in a container: on a volume)",
                path.display()
            ),
            WorkspaceError::Idmap { path, source, .. } => {
                write!(
                    out,
                    "the filesystem of the workspace {} cannot be idmapped: {source}; put it on ext4, xfs, btrfs or tmpfs",
                    path.display()
                )
            }
            WorkspaceError::Link { path } => write!(
                out,
                "the protected path {} of the workspace is or leads through a symbolic link; remove the link, or use a policy that does \
                 not protect it",
                path.display()
            ),
            WorkspaceError::Hold { path, source } => {
                write!(out, "cannot protect {} in the workspace: {source}", path.display())
            }
        }
    }
}

impl std::error::Error for WorkspaceError {}

/// An opened workspace.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// A detached mount of it, idmapped.
    pub(crate) mount: OwnedFd,
    /// What is to be protected, all of it there.
    pub(crate) protect: Vec<PathBuf>,
    held: Vec<Held>,
}

/// A placeholder that this run made, or found marked, and keeps locked.
#[derive(Debug)]
struct Held {
    parent: OwnedFd,
    name: PathBuf,
    lock: OwnedFd,
    flags: AtFlags,
}

impl Workspace {
    /// Opens the workspace of `plan` for the workload `uid`.
    ///
    /// # Errors
    /// See [`WorkspaceError`]. Placeholders that were made are taken away again.
    pub(crate) fn open(plan: &WorkspacePlan, uid: u32) -> Result<Workspace, WorkspaceError> {
        let path = &plan.directory;
        let failed = |source: Errno| WorkspaceError::Open { path: path.clone(), source: source.into() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).map_err(failed)?;
        let owner = fstat(&directory).map_err(failed)?;
        let (protect, held) = hold_all(&directory, &owner, &plan.protect)?;
        let mount = idmapped(&directory, &owner, plan.mode, uid).map_err(|source| WorkspaceError::Idmap {
            path: path.clone(),
            overlay: fstatfs(&directory).is_ok_and(|found| u64::try_from(found.f_type) == Ok(OVERLAY_MAGIC)),
            source,
        });
        let workspace = mount.map(|mount| (mount, protect));
        match workspace {
            Ok((mount, protect)) => Ok(Workspace { mount, protect, held }),
            Err(error) => {
                release(&held);
                Err(error)
            }
        }
    }

    /// Takes the placeholders away that no other run still needs.
    pub(crate) fn release(&self) {
        release(&self.held);
    }
}

fn release(held: &[Held]) {
    // Children before their parents.
    for Held { parent, name, lock, flags } in held.iter().rev() {
        // Another run that holds it takes it away when it ends.
        if flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok() && is_still(parent, name, lock) {
            let _ = unlinkat(parent, name, *flags);
        }
    }
}

/// The mount: only `owner`'s files are the workload's, everything else is nobody's.
fn idmapped(directory: &OwnedFd, owner: &Stat, mode: WorkspaceMode, uid: u32) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(directory, "", flags)?;
    let map = user_namespace(&format!("{} {uid} 1", owner.st_uid), &format!("{} {uid} 1", owner.st_gid))?;
    let read_only = if mode == WorkspaceMode::ReadOnly { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | read_only,
        clear: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: sys::raw(&map),
    };
    sys::mount_setattr(&mount, attributes, Reach::All)?;
    Ok(mount)
}

/// A user namespace that exists only as a pair of maps.
fn user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    let (wait, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match sys::clone3(libc::CLONE_NEWUSER, None)? {
        Side::Child => {
            drop(go);
            let _ = rustix::io::read(&wait, &mut [0_u8; 1]);
            sys::exit_now(0)
        }
        Side::Parent { pid, pidfd } => {
            let folder = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
            let made = std::fs::write(folder.join("uid_map"), uid_map)
                .and_then(|()| std::fs::write(folder.join("gid_map"), gid_map))
                .and_then(|()| {
                    Ok(openat(CWD, folder.join("ns/user"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
                });
            drop(go);
            let ended = rustix::process::waitid(
                rustix::process::WaitId::PidFd(pidfd.as_fd()),
                rustix::process::WaitIdOptions::EXITED,
            );
            ended?;
            made
        }
    }
}

fn hold_all(
    directory: &OwnedFd,
    owner: &Stat,
    protect: &[Protect],
) -> Result<(Vec<PathBuf>, Vec<Held>), WorkspaceError> {
    let (mut covers, mut held) = (Vec::new(), Vec::new());
    for Protect { path, placeholder } in protect {
        // `.git` is covered as a whole already where it is a placeholder or a file.
        if covers.iter().any(|done: &PathBuf| path.starts_with(done)) {
            continue;
        }
        match hold(directory, owner, path, placeholder) {
            Ok((cover, Some(made))) => {
                covers.push(cover);
                held.push(made);
            }
            Ok((cover, None)) => covers.push(cover),
            Err(Errno::LOOP) => {
                release(&held);
                return Err(WorkspaceError::Link { path: path.clone() });
            }
            Err(error) => {
                release(&held);
                return Err(WorkspaceError::Hold { path: path.clone(), source: error.into() });
            }
        }
    }
    Ok((covers, held))
}

/// What to cover so that nothing can come to stand at `path`: it, a file on the way to it, or a placeholder for the first
/// part of it that is missing.
fn hold(
    directory: &OwnedFd,
    owner: &Stat,
    path: &Path,
    placeholder: &Placeholder,
) -> rustix::io::Result<(PathBuf, Option<Held>)> {
    let mut parent = rustix::io::fcntl_dupfd_cloexec(directory, 3)?;
    let mut walked = PathBuf::new();
    for part in path.components() {
        let name = PathBuf::from(part.as_os_str());
        walked.push(&name);
        let last = walked == path;
        let found = match look(&parent, &name) {
            Err(Errno::NOENT) => {
                // A file holds its place only directly; above it, as anywhere, a directory does.
                let placeholder = if last { placeholder } else { &Placeholder::Directory };
                let held = make(parent, name, owner, placeholder)?;
                return Ok((walked, Some(held)));
            }
            other => other?,
        };
        if found.is_symlink() {
            return Err(Errno::LOOP);
        }
        if last || !found.is_dir() {
            let held = marked(&parent, &name, found)?;
            return Ok((walked, held));
        }
        if let Some(held) = marked(&parent, &name, found)? {
            return Ok((walked, Some(held)));
        }
        parent = open_below(&parent, &name, OFlags::RDONLY | OFlags::DIRECTORY)?;
    }
    Ok((walked, None))
}

fn look(parent: &OwnedFd, name: &Path) -> rustix::io::Result<FileType> {
    Ok(FileType::from_raw_mode(statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode))
}

fn open_below(parent: &OwnedFd, name: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // Opening a FIFO or a device here must neither wait nor act.
    openat2(parent, name, flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty(), resolve)
}

/// A placeholder of another run, or of one that was killed.
fn marked(parent: &OwnedFd, name: &Path, found: FileType) -> rustix::io::Result<Option<Held>> {
    if !(found.is_dir() || found.is_file()) {
        return Ok(None);
    }
    let lock = open_below(parent, name, OFlags::RDONLY)?;
    if fgetxattr(&lock, MARK, &mut [0_u8; 1]).is_err() {
        return Ok(None);
    }
    flock(&lock, FlockOperation::LockShared)?;
    let flags = if found.is_dir() { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    let parent = rustix::io::fcntl_dupfd_cloexec(parent, 3)?;
    Ok(Some(Held { parent, name: name.to_owned(), lock, flags }))
}

fn make(parent: OwnedFd, name: PathBuf, owner: &Stat, placeholder: &Placeholder) -> rustix::io::Result<Held> {
    for _ in 0..TRIES {
        let (opened, flags) = match placeholder {
            Placeholder::Directory => {
                match mkdirat(&parent, &name, Mode::from_raw_mode(0o755)) {
                    Err(Errno::EXIST) => {}
                    other => other?,
                }
                (open_below(&parent, &name, OFlags::RDONLY | OFlags::DIRECTORY), AtFlags::REMOVEDIR)
            }
            Placeholder::File(content) => (make_file(&parent, &name, content), AtFlags::empty()),
        };
        let lock = match opened {
            Err(Errno::NOENT | Errno::EXIST) => continue,
            other => other?,
        };
        flock(&lock, FlockOperation::LockShared)?;
        // Another run may have taken it away between the two calls.
        if is_still(&parent, &name, &lock) {
            fchown(&lock, Some(Uid::from_raw(owner.st_uid)), Some(Gid::from_raw(owner.st_gid)))?;
            // Where the filesystem has no extended attributes, only the run that made it knows it.
            let _ = fsetxattr(&lock, MARK, b"1", XattrFlags::empty());
            return Ok(Held { parent, name, lock, flags });
        }
    }
    Err(Errno::BUSY)
}

fn make_file(parent: &OwnedFd, name: &Path, content: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = openat(parent, name, flags, Mode::from_raw_mode(0o644))?;
    rustix::io::write(&file, content.as_bytes())?;
    Ok(file)
}

/// Whether `name` still is what `lock` has open.
fn is_still(parent: &OwnedFd, name: &Path, lock: &OwnedFd) -> bool {
    let (Ok(here), Ok(opened)) = (statat(parent, name, AtFlags::SYMLINK_NOFOLLOW), fstat(lock)) else {
        return false;
    };
    (here.st_dev, here.st_ino) == (opened.st_dev, opened.st_ino)
}
