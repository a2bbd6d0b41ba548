//! Opens a workspace by the caller's own right, and holds the places of protected paths that are not there.
//!
//! A placeholder is an empty directory, which git does not see and rmdir(2) takes only while it is empty; or a small file,
//! which goes only while it is the one that was made and says what was written. Runs on one workspace at the same time agree
//! through [`Registry`] who takes it away, and the next run takes away what a killed one left.

use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Gid, Mode, OFlags, ResolveFlags, Stat, StatxFlags, Uid, fchown,
    flock, fstat, fstatfs, makedev, mkdirat, openat, openat2, statx, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::job::WorkspaceMode;
use crate::plan::{Placeholder, Protect, WorkspacePlan};
use crate::sys::{self, MountAttributes, Reach, Side};

/// `OVERLAYFS_SUPER_MAGIC`.
const OVERLAY_MAGIC: u64 = 0x794c_7630;

/// How often, and with which pause, a run asks for its turn: 10 s in all, where a turn takes a millisecond.
const TURN_TRIES: u32 = 10_000;
const TURN_PAUSE: Duration = Duration::from_millis(1);

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
    registry: PathBuf,
}

/// A placeholder that this run relies on.
#[derive(Debug)]
struct Held {
    parent: OwnedFd,
    name: PathBuf,
    found: Identity,
    placeholder: Placeholder,
    lock: File,
}

/// Which file something is. The kernel gives an inode's number again as soon as it is free, so its birth counts too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    born_ns: i128,
    kind: FileType,
}

impl Identity {
    fn of(parent: &OwnedFd, name: &Path) -> rustix::io::Result<Identity> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let found = statx(parent, name, AtFlags::SYMLINK_NOFOLLOW, wanted)?;
        Ok(Identity {
            device: makedev(found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            born_ns: i128::from(found.stx_btime.tv_sec) * 1_000_000_000 + i128::from(found.stx_btime.tv_nsec),
            kind: FileType::from_raw_mode(found.stx_mode.into()),
        })
    }
}

impl Workspace {
    /// Opens the workspace of `plan` for the workload `uid`; `registry` is where placeholders are noted.
    ///
    /// # Errors
    /// See [`WorkspaceError`]. Placeholders that were made are taken away again.
    pub(crate) fn open(plan: &WorkspacePlan, uid: u32, registry: &Path) -> Result<Workspace, WorkspaceError> {
        let path = &plan.directory;
        let failed = |source: io::Error| WorkspaceError::Open { path: path.clone(), source };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS);
        let directory = directory.map_err(|error| failed(error.into()))?;
        let owner = fstat(&directory).map_err(|error| failed(error.into()))?;
        let mount = idmapped(&directory, &owner, plan.mode, uid).map_err(|source| WorkspaceError::Idmap {
            path: path.clone(),
            overlay: fstatfs(&directory).is_ok_and(|found| u64::try_from(found.f_type) == Ok(OVERLAY_MAGIC)),
            source,
        })?;
        if plan.protect.is_empty() {
            return Ok(Workspace {
                mount,
                protect: Vec::new(),
                held: Vec::new(),
                registry: registry.to_owned(),
            });
        }
        let turn = Registry::open(registry).map_err(failed)?;
        let covered = cover_all(&turn, &directory, &owner, &plan.protect)?;
        Ok(Workspace { mount, protect: covered.paths, held: covered.held, registry: registry.to_owned() })
    }

    /// Takes the placeholders away that no other run still needs.
    pub(crate) fn release(&self) {
        if !self.held.is_empty()
            && let Ok(turn) = Registry::open(&self.registry)
        {
            release(&turn, &self.held);
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

/// The placeholders of all runs on this host: a file for each, named by device, inode and birth, in a directory that only root can
/// open. Every run that relies on a placeholder keeps its file locked; a workload can lock nothing here.
struct Registry {
    directory: PathBuf,
    /// One run at a time makes or takes away placeholders.
    _turn: File,
}

impl Registry {
    fn open(directory: &Path) -> io::Result<Registry> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let turn = lock_file(&directory.join("turn"))?;
        for _ in 0..TURN_TRIES {
            match flock(&turn, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => std::thread::sleep(TURN_PAUSE),
                other => {
                    return Ok(other.map(|()| Registry { directory: directory.to_owned(), _turn: turn })?);
                }
            }
        }
        Err(Errno::BUSY.into())
    }

    fn path(&self, found: &Identity) -> PathBuf {
        self.directory.join(format!("{}-{}-{}", found.device, found.inode, found.born_ns))
    }

    /// The lock of `found`, if it is a placeholder: of another run, or of one that was killed.
    fn known(&self, found: &Identity) -> io::Result<Option<File>> {
        let path = self.path(found);
        if path.exists() { self.register(found).map(Some) } else { Ok(None) }
    }

    fn register(&self, found: &Identity) -> io::Result<File> {
        let lock = lock_file(&self.path(found))?;
        flock(&lock, FlockOperation::NonBlockingLockShared)?;
        Ok(lock)
    }

    /// Where it is noted that a placeholder is being made, from before it is there until it is registered. Found in one's own
    /// turn, it is of a run that was killed in between.
    fn intent(&self, parent: &OwnedFd, name: &Path) -> io::Result<PathBuf> {
        let parent = fstat(parent)?;
        Ok(self.directory.join(format!("making-{}-{}-{}", parent.st_dev, parent.st_ino, name.display())))
    }

    /// Whether nobody else relies on it; then it is forgotten.
    fn forget(&self, found: &Identity, lock: &File) -> bool {
        let last = flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok();
        last && std::fs::remove_file(self.path(found)).is_ok()
    }
}

fn lock_file(path: &Path) -> io::Result<File> {
    std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// What is covered, and the placeholders among it.
#[derive(Default)]
struct Covered {
    paths: Vec<PathBuf>,
    held: Vec<Held>,
}

fn cover_all(
    registry: &Registry,
    directory: &OwnedFd,
    owner: &Stat,
    protect: &[Protect],
) -> Result<Covered, WorkspaceError> {
    let mut covered = Covered::default();
    for Protect { path, placeholder } in protect {
        // `.git` is covered as a whole already where it is a placeholder or a file.
        if covered.paths.iter().any(|done| path.starts_with(done)) {
            continue;
        }
        match cover(registry, directory, owner, path, placeholder) {
            Ok((cover, held)) => {
                covered.paths.push(cover);
                covered.held.extend(held);
            }
            Err(error) => {
                release(registry, &covered.held);
                let link = error.raw_os_error() == Some(libc::ELOOP);
                let path = path.clone();
                return Err(if link {
                    WorkspaceError::Link { path }
                } else {
                    WorkspaceError::Hold { path, source: error }
                });
            }
        }
    }
    Ok(covered)
}

/// What to cover so that nothing can come to stand at `path`: it, a file on the way to it, or a placeholder for the first
/// part of it that is missing.
fn cover(
    registry: &Registry,
    directory: &OwnedFd,
    owner: &Stat,
    path: &Path,
    placeholder: &Placeholder,
) -> io::Result<(PathBuf, Option<Held>)> {
    let mut parent = rustix::io::fcntl_dupfd_cloexec(directory, 3)?;
    let mut walked = PathBuf::new();
    for part in path.components() {
        let name = PathBuf::from(part.as_os_str());
        walked.push(&name);
        // A file holds its place only directly; above it, as anywhere, a directory does.
        let placeholder = if walked == path { placeholder } else { &Placeholder::Directory };
        let found = match Identity::of(&parent, &name) {
            Err(Errno::NOENT) => {
                return make(registry, parent, name, owner, placeholder).map(|held| (walked, Some(held)));
            }
            other => other?,
        };
        if found.kind.is_symlink() {
            return Err(Errno::LOOP.into());
        }
        if is_untouched(&parent, &name, found, placeholder)
            && let Some(lock) = registry.known(&found)?
        {
            let placeholder = placeholder.clone();
            return Ok((walked, Some(Held { parent, name, found, placeholder, lock })));
        }
        let intent = registry.intent(&parent, &name)?;
        if intent.exists() {
            // Only an empty directory, or a file with no more than the beginning of our content, goes.
            if found.kind.is_dir() || is_begun(&parent, &name, placeholder) {
                remove(&parent, &name, placeholder_flags(placeholder));
            }
            std::fs::remove_file(&intent)?;
            if Identity::of(&parent, &name) == Err(Errno::NOENT) {
                return make(registry, parent, name, owner, placeholder).map(|held| (walked, Some(held)));
            }
        }
        if !found.kind.is_dir() {
            break;
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        parent = openat2(&parent, &name, flags, Mode::empty(), resolve)?;
    }
    Ok((walked, None))
}

/// Makes a placeholder; when that fails half-way, it is taken away again.
fn make(
    registry: &Registry,
    parent: OwnedFd,
    name: PathBuf,
    owner: &Stat,
    placeholder: &Placeholder,
) -> io::Result<Held> {
    let made = || -> io::Result<OwnedFd> {
        match placeholder {
            Placeholder::Directory => {
                mkdirat(&parent, &name, Mode::from_raw_mode(0o755))?;
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                Ok(openat2(&parent, &name, flags, Mode::empty(), resolve)?)
            }
            Placeholder::File(content) => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                let file = openat(&parent, &name, flags, Mode::from_raw_mode(0o644))?;
                rustix::io::write(&file, content.as_bytes())?;
                Ok(file)
            }
        }
    };
    let adopt = || -> io::Result<(Identity, File)> {
        // By descriptor: another run on this workspace may be swapping something else in.
        fchown(made()?, Some(Uid::from_raw(owner.st_uid)), Some(Gid::from_raw(owner.st_gid)))?;
        let found = Identity::of(&parent, &name)?;
        Ok((found, registry.register(&found)?))
    };
    let intent = registry.intent(&parent, &name)?;
    drop(lock_file(&intent)?);
    let adopted = adopt();
    let _ = std::fs::remove_file(&intent);
    match adopted {
        Ok((found, lock)) => Ok(Held { parent, name, found, placeholder: placeholder.clone(), lock }),
        Err(error) => {
            remove(&parent, &name, placeholder_flags(placeholder));
            Err(error)
        }
    }
}

fn placeholder_flags(placeholder: &Placeholder) -> AtFlags {
    match placeholder {
        Placeholder::Directory => AtFlags::REMOVEDIR,
        Placeholder::File(_) => AtFlags::empty(),
    }
}

fn release(registry: &Registry, held: &[Held]) {
    // Children before their parents.
    for Held { parent, name, found, placeholder, lock } in held.iter().rev() {
        let last = registry.forget(found, lock);
        if last && Identity::of(parent, name) == Ok(*found) && is_untouched(parent, name, *found, placeholder)
        {
            remove(parent, name, placeholder_flags(placeholder));
        }
    }
}

/// Whether what stands there can be the placeholder: a directory, or a file that still says what was written into it.
fn is_untouched(parent: &OwnedFd, name: &Path, found: Identity, placeholder: &Placeholder) -> bool {
    match placeholder {
        Placeholder::Directory => found.kind.is_dir(),
        Placeholder::File(content) => found.kind.is_file() && says(parent, name, content).unwrap_or(false),
    }
}

/// Whether a file holds no more than a beginning of what is written into the placeholder.
fn is_begun(parent: &OwnedFd, name: &Path, placeholder: &Placeholder) -> bool {
    match placeholder {
        Placeholder::Directory => false,
        Placeholder::File(content) => (0..=content.len())
            .filter_map(|length| content.get(..length))
            .any(|beginning| says(parent, name, beginning).unwrap_or(false)),
    }
}

fn says(parent: &OwnedFd, name: &Path, content: &str) -> io::Result<bool> {
    // Somebody may be swapping a FIFO in at this moment: that must neither wait nor be read.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = openat(parent, name, flags, Mode::empty())?;
    if !FileType::from_raw_mode(fstat(&file)?.st_mode).is_file() {
        return Ok(false);
    }
    let mut text = Vec::new();
    File::from(file).take(content.len() as u64 + 1).read_to_end(&mut text)?;
    Ok(text == content.as_bytes())
}

/// A directory goes only while it is empty; a file only when it was just seen to be ours.
fn remove(parent: &OwnedFd, name: &Path, flags: AtFlags) {
    let _ = unlinkat(parent, name, flags);
}
