//! Opens a workspace by the caller's own right.

mod placeholder;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, fstatfs, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::changes;
use crate::job::WorkspaceMode;
use crate::plan::WorkspacePlan;
use crate::sys::{self, MountAttributes, Reach};
use placeholder::{Held, Registry};

/// `OVERLAYFS_SUPER_MAGIC`.
const OVERLAY_MAGIC: u64 = 0x794c_7630;

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
    /// Its changes cannot be kept apart from it.
    Overlay {
        /// As asked for.
        path: PathBuf,
        /// Where they would have gone.
        place: PathBuf,
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
            // An earlier run on a directory above could have left the link.
            WorkspaceError::Open { path, source } if source.raw_os_error() == Some(libc::ELOOP) => write!(
                out,
                "the workspace {} leads through a symbolic link; name the place itself{}",
                path.display(),
                path.canonicalize().map(|end| format!(": {}", end.display())).unwrap_or_default()
            ),
            WorkspaceError::Open { path, source } => {
                write!(
                    out,
                    "cannot open the workspace {}: {source}; name a directory that you can open",
                    path.display()
                )
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
            WorkspaceError::Overlay { path, place, source } => write!(
                out,
                "changes to the workspace {} cannot be kept in {}: {source}; the daemon's state directory has to be on a filesystem that \
                 can be the upper layer of an overlay (ext4, xfs, btrfs, tmpfs)",
                path.display(),
                place.display()
            ),
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

/// A directory that a caller has opened and handed over.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) directory: OwnedFd,
    /// The caller's own ids: what is written belongs to them, and only what they may do is done for them.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The caller itself (pidfd_open(2)), whose mount namespace may be another than ours.
    pub(crate) process: Option<OwnedFd>,
    /// Where changes go that the directory itself is not to get.
    pub(crate) changes: Option<PathBuf>,
}

/// Whose files are the workload's.
#[derive(Debug, Clone, Copy)]
struct Owner {
    uid: u32,
    gid: u32,
    /// The caller is not root, so that in its directory we act by its right alone.
    lent: bool,
}

impl Owner {
    /// `act` with no more right over files than the owner has.
    fn acting<T>(self, act: impl FnOnce() -> T) -> T {
        if self.lent { with_ids(self.uid, self.gid, act) } else { act() }
    }
}

/// `act` with these ids for files (setfsuid(2)): for any but root the kernel takes the capabilities over files away meanwhile.
fn with_ids<T>(uid: u32, gid: u32, act: impl FnOnce() -> T) -> T {
    use nix::sys::prctl::{get_dumpable, get_pdeathsig, set_dumpable, set_pdeathsig};
    use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
    let parent = nix::unistd::getppid();
    let (lifeline, dumpable) = (get_pdeathsig().ok().flatten(), get_dumpable());
    let (gid_before, uid_before) = (setfsgid(Gid::from_raw(gid)), setfsuid(Uid::from_raw(uid)));
    let result = act();
    setfsuid(uid_before);
    setfsgid(gid_before);
    // The kernel takes both away with a change of ids. Whose parent has gone meanwhile follows it.
    if let Some(signal) = lifeline {
        let restored = set_pdeathsig(signal).is_ok() && nix::unistd::getppid() == parent;
        if !restored {
            sys::exit_now(1);
        }
    }
    if let Ok(dumpable) = dumpable {
        let _ = set_dumpable(dumpable);
    }
    result
}

/// `act` as root, for what is ours among the caller's.
fn as_root<T>(act: impl FnOnce() -> T) -> T {
    with_ids(0, 0, act)
}

/// An opened workspace.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// A detached mount of it, idmapped.
    pub(crate) mount: OwnedFd,
    /// What is to be protected, all of it there.
    pub(crate) protect: Vec<PathBuf>,
    held: Vec<Held>,
    registry: PathBuf,
    owner: Owner,
}

impl Workspace {
    /// Opens the workspace of `plan`, or takes what is `lent`, for the workload `uid`; `shared` is where placeholders are
    /// noted.
    ///
    /// # Errors
    /// See [`WorkspaceError`]. Placeholders that were made are taken away again.
    pub(crate) fn open(
        plan: &WorkspacePlan,
        uid: u32,
        shared: &Path,
        lent: Option<&Lent>,
    ) -> Result<Workspace, WorkspaceError> {
        let registry = &shared.join("holds");
        let path = &plan.directory;
        let failed = |source: io::Error| WorkspaceError::Open { path: path.clone(), source };
        let directory = match lent {
            Some(lent) => lent.directory.try_clone().map_err(failed)?,
            None => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
                openat2(CWD, path, flags, Mode::empty(), resolve).map_err(|error| failed(error.into()))?
            }
        };
        let found = fstat(&directory).map_err(|error| failed(error.into()))?;
        if !FileType::from_raw_mode(found.st_mode).is_dir() {
            return Err(failed(io::Error::from_raw_os_error(libc::ENOTDIR)));
        }
        // Root's to lend is what the directory's owner has; anybody else lends what is their own.
        let owner = match lent {
            Some(Lent { uid, gid, .. }) if *uid != 0 => Owner { uid: *uid, gid: *gid, lent: true },
            _ => Owner { uid: found.st_uid, gid: found.st_gid, lent: false },
        };
        let process = lent.and_then(|lent| lent.process.as_ref());
        let mount = clone_tree(&directory, process).and_then(|tree| idmapped(tree, owner, plan.mode, uid));
        let mount = mount.map_err(|source| WorkspaceError::Idmap {
            path: path.clone(),
            overlay: fstatfs(&directory).is_ok_and(|found| u64::try_from(found.f_type) == Ok(OVERLAY_MAGIC)),
            source,
        })?;
        let copied = plan.mode == WorkspaceMode::CopyOnWrite;
        let mount = if copied {
            let place = lent.and_then(|lent| lent.changes.as_ref());
            let place = place.ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ENOTSUP)))?;
            let mode = Mode::from_raw_mode(found.st_mode & 0o777);
            let mount = changes::overlay(mount, place, uid, mode, &shared.join("lower"));
            mount.map_err(|source| WorkspaceError::Overlay {
                path: path.clone(),
                place: place.clone(),
                source,
            })?
        } else {
            mount
        };
        // What nobody but the workload sees changed needs no protection before somebody wants it.
        if plan.protect.is_empty() || copied {
            return Ok(Workspace {
                mount,
                protect: Vec::new(),
                held: Vec::new(),
                registry: registry.to_owned(),
                owner,
            });
        }
        let turn = Registry::open(registry).map_err(failed)?;
        let covered = owner.acting(|| placeholder::cover_all(&turn, &directory, owner, &plan.protect))?;
        let (protect, held) = (covered.paths, covered.held);
        Ok(Workspace { mount, protect, held, registry: registry.to_owned(), owner })
    }

    /// What says that the placeholders are still needed, as long as anybody has it open.
    pub(crate) fn locks(&self) -> impl Iterator<Item = &File> {
        self.held.iter().map(|held| &held.lock)
    }

    /// Takes the placeholders away that no other run still needs.
    pub(crate) fn release(&self) {
        if !self.held.is_empty()
            && let Ok(turn) = Registry::open(&self.registry)
        {
            self.owner.acting(|| placeholder::release(&turn, &self.held));
        }
    }
}

/// A detached mount of `directory`. The kernel clones only what belongs to the mount namespace of who asks, so where that of
/// the lender is another, it is done there: by descriptor, so that no path of theirs is walked.
fn clone_tree(directory: &OwnedFd, lender: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let flags = CLONE | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::AT_EMPTY_PATH;
    let here = open_tree(directory, "", flags);
    let (Err(Errno::INVAL), Some(lender)) = (&here, lender) else {
        return Ok(here?);
    };
    in_mounts_of(lender, || Ok(open_tree(directory, "", flags)?))
}

/// Detached mounts of what is mounted at `paths` where `process` is, without what is mounted below them.
pub(crate) fn clone_there(process: &OwnedFd, paths: &[&Path]) -> io::Result<Vec<OwnedFd>> {
    let clone = |path: &&Path| Ok(open_tree(CWD, *path, CLONE | OpenTreeFlags::AT_SYMLINK_NOFOLLOW)?);
    in_mounts_of(process, || paths.iter().map(clone).collect())
}

const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// `act` in the mount namespace of another process. Who cannot come back ends: its paths would be another's.
fn in_mounts_of<T>(process: &OwnedFd, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    use nix::sched::{CloneFlags, setns};
    let own = openat(CWD, "/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    setns(process, CloneFlags::CLONE_NEWNS)?;
    let there = act();
    if setns(own, CloneFlags::CLONE_NEWNS).is_err() {
        sys::exit_now(1);
    }
    there
}

/// The mount: only `owner`'s files are the workload's, everything else is nobody's.
fn idmapped(mount: OwnedFd, owner: Owner, mode: WorkspaceMode, uid: u32) -> io::Result<OwnedFd> {
    let map = one_owner((owner.uid, owner.gid), (uid, uid))?;
    let read_only = if mode == WorkspaceMode::ReadWrite { 0 } else { libc::MOUNT_ATTR_RDONLY };
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_IDMAP | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | read_only,
        clear: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: sys::raw(&map),
    };
    sys::mount_setattr(&mount, attributes, Reach::All)?;
    Ok(mount)
}

/// For an idmapped mount in which the files of `stored` are `shown`'s, by uid and gid, and all others nobody's.
pub(crate) fn one_owner(stored: (u32, u32), shown: (u32, u32)) -> io::Result<OwnedFd> {
    user_namespace(&format!("{} {} 1", stored.0, shown.0), &format!("{} {} 1", stored.1, shown.1))
}

/// A user namespace that exists only as a pair of maps.
fn user_namespace(uid_map: &str, gid_map: &str) -> io::Result<OwnedFd> {
    sys::namespace_of_child(libc::CLONE_NEWUSER, "user", None, |folder| {
        std::fs::write(folder.join("uid_map"), uid_map)?;
        std::fs::write(folder.join("gid_map"), gid_map)
    })
}
