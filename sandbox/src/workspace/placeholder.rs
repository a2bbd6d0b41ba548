//! Holds the places of protected paths that are not there.
//!
//! A placeholder is an empty directory, which git does not see and rmdir(2) takes only while it is empty; or a small file,
//! which goes only while it is the one that was made and says what was written. Runs on one workspace at the same time agree
//! through [`Registry`] who takes it away, and the next run takes away what a killed one left.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, ResolveFlags, StatxFlags, Uid, fchown, flock,
    fstat, makedev, mkdirat, openat, openat2, statat, statx, unlinkat,
};
use rustix::io::Errno;

use super::{Owner, WorkspaceError, as_root};
use crate::plan::{Placeholder, Protect};
use crate::slot::make_private;

/// How often, and with which pause, a run asks for its turn: 10 s in all, where a turn takes a millisecond.
const TURN_TRIES: u32 = 10_000;
const TURN_PAUSE: Duration = Duration::from_millis(1);

/// A placeholder that this run relies on.
#[derive(Debug)]
pub(super) struct Held {
    parent: OwnedFd,
    name: PathBuf,
    found: Identity,
    placeholder: Placeholder,
    pub(super) lock: File,
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

/// The placeholders of all runs on this host: a file for each, named by device, inode and birth, in a directory that only root can
/// open. Every run that relies on a placeholder keeps its file locked; a workload can lock nothing here.
pub(super) struct Registry {
    directory: PathBuf,
    /// One run at a time makes or takes away placeholders.
    _turn: File,
}

impl Registry {
    pub(super) fn open(directory: &Path) -> io::Result<Registry> {
        make_private(directory)?;
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
        if as_root(|| path.exists()) { self.register(found).map(Some) } else { Ok(None) }
    }

    fn register(&self, found: &Identity) -> io::Result<File> {
        let lock = as_root(|| lock_file(&self.path(found)))?;
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
        last && as_root(|| std::fs::remove_file(self.path(found))).is_ok()
    }
}

fn lock_file(path: &Path) -> io::Result<File> {
    std::fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// What is covered, and the placeholders among it.
#[derive(Default)]
pub(super) struct Covered {
    pub(super) paths: Vec<PathBuf>,
    pub(super) held: Vec<Held>,
}

pub(super) fn cover_all(
    registry: &Registry,
    directory: &OwnedFd,
    owner: Owner,
    protect: &[Protect],
) -> Result<Covered, WorkspaceError> {
    let mut covered = Covered::default();
    for Protect { path, placeholder } in protect {
        // `.git` is covered as a whole already where it is a placeholder or a file.
        if covered.paths.iter().any(|done| path.starts_with(done)) {
            continue;
        }
        match cover(registry, directory, owner, path, placeholder) {
            Ok(Some((cover, held))) => {
                covered.paths.push(cover);
                covered.held.extend(held);
            }
            Ok(None) => {}
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
/// part of it that is missing. Nothing where who lent the workspace, and so the workload, cannot make anything either.
fn cover(
    registry: &Registry,
    directory: &OwnedFd,
    owner: Owner,
    path: &Path,
    placeholder: &Placeholder,
) -> io::Result<Option<(PathBuf, Option<Held>)>> {
    let mut parent = rustix::io::fcntl_dupfd_cloexec(directory, 3)?;
    let mut walked = PathBuf::new();
    for part in path.components() {
        let name = PathBuf::from(part.as_os_str());
        walked.push(&name);
        // A file holds its place only directly; above it, as anywhere, a directory does.
        let placeholder = if walked == path { placeholder } else { &Placeholder::Directory };
        let found = match Identity::of(&parent, &name) {
            Err(Errno::NOENT) => {
                return held(registry, parent, name, owner, placeholder, walked);
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
            return Ok(Some((walked, Some(Held { parent, name, found, placeholder, lock }))));
        }
        let intent = registry.intent(&parent, &name)?;
        if as_root(|| intent.exists()) {
            // Only an empty directory, or a file with no more than the beginning of our content, goes.
            if found.kind.is_dir() || is_begun(&parent, &name, placeholder) {
                remove(&parent, &name, placeholder_flags(placeholder));
            }
            as_root(|| std::fs::remove_file(&intent))?;
            if Identity::of(&parent, &name) == Err(Errno::NOENT) {
                return held(registry, parent, name, owner, placeholder, walked);
            }
        }
        if !found.kind.is_dir() {
            break;
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        parent = match openat2(&parent, &name, flags, Mode::empty(), resolve) {
            Err(Errno::ACCESS) if is_anothers(&parent, &name, owner) => return Ok(None),
            other => other?,
        };
    }
    Ok(Some((walked, None)))
}

/// A placeholder at `walked`.
fn held(
    registry: &Registry,
    parent: OwnedFd,
    name: PathBuf,
    owner: Owner,
    placeholder: &Placeholder,
    walked: PathBuf,
) -> io::Result<Option<(PathBuf, Option<Held>)>> {
    let anothers = is_anothers(&parent, Path::new("."), owner);
    match make(registry, parent, name, owner, placeholder) {
        Err(error) if anothers && error.raw_os_error() == Some(libc::EACCES) => Ok(None),
        other => other.map(|held| Some((walked, Some(held)))),
    }
}

/// Whether a directory that the lender may not use is out of its reach for good: what is its own it could open by chmod(2).
fn is_anothers(parent: &OwnedFd, name: &Path, owner: Owner) -> bool {
    owner.lent && statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|found| found.st_uid != owner.uid)
}

/// Makes a placeholder; when that fails half-way, it is taken away again.
fn make(
    registry: &Registry,
    parent: OwnedFd,
    name: PathBuf,
    owner: Owner,
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
        fchown(made()?, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))?;
        let found = Identity::of(&parent, &name)?;
        Ok((found, registry.register(&found)?))
    };
    let intent = registry.intent(&parent, &name)?;
    drop(as_root(|| lock_file(&intent))?);
    let adopted = adopt();
    let _ = as_root(|| std::fs::remove_file(&intent));
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

pub(super) fn release(registry: &Registry, held: &[Held]) {
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
