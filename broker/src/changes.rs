//! `broker diff`, `commit`, `discard`: what a sandbox changed in a workspace of mode `cow`. All of it happens here, with the
//! caller's own rights: the daemon hands the changes over, and never touches the workspace.
//!
//! The changes are the upper layer of an overlay (`Documentation/filesystems/overlayfs.rst`), and everything in them is the
//! workload's: no link is followed, nothing is opened that could block or act, and what is printed is escaped.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fchmod, getxattr, mkdirat, openat2, readlinkat,
    renameat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use serde::Serialize;
use serde_json::Value;

use crate::operate::{call, connect, exit};
use crate::protocol::{AllHeld, Held, Named, Shown};
use crate::say::{self, complain};

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Added,
    Modified,
    Deleted,
    /// It is none that a workspace gets: a FIFO, a socket, a device.
    Special,
    /// The policy protects it.
    Protected,
    /// It was changed in the workspace too, since.
    Conflict,
}

impl Kind {
    fn letter(self) -> char {
        match self {
            Kind::Added => 'A',
            Kind::Modified => 'M',
            Kind::Deleted => 'D',
            Kind::Special => '!',
            Kind::Protected => 'P',
            Kind::Conflict => 'C',
        }
    }
}

/// One change.
#[derive(Debug, Serialize)]
struct Change {
    kind: Kind,
    /// Below the workspace; what is no UTF-8 is replaced.
    path: String,
    #[serde(skip)]
    below: PathBuf,
    /// What stands there in the changes, where it is not deleted.
    #[serde(skip)]
    new: Option<FileType>,
    /// A directory that has nothing in common with the one in the workspace.
    #[serde(skip)]
    opaque: bool,
}

impl Change {
    /// A directory that the workload has closed: nobody knows what is in it.
    fn closed(below: &Path) -> Change {
        let path = below.to_string_lossy().into_owned();
        Change { kind: Kind::Special, path, below: below.to_owned(), new: None, opaque: false }
    }
}

/// What becomes of what was changed in the workspace too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conflicts {
    /// It stays as it is there.
    Keep,
    /// It is overwritten.
    Overwrite,
}

/// The changes, and the workspace as the caller sees it.
struct Both {
    held: Held,
    changes: OwnedFd,
    workspace: OwnedFd,
}

impl Both {
    fn open(socket: &Path, id: &str, workspace: Option<PathBuf>) -> Result<Both, String> {
        let named = Named { sandbox: id.to_owned() };
        let (shown, changes) = connect(socket)?
            .call_for_descriptor::<Shown>("Changes", &named)
            .map_err(|error| error.to_string())?;
        let path = workspace.unwrap_or_else(|| PathBuf::from(&shown.held.workspace));
        let workspace =
            crate::through_daemon::open(&path, OFlags::RDONLY).map_err(|error| error.to_string())?;
        // As for a workspace that is written at once: a protected path that is or leads through a link could be anywhere.
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let is_link = |path: &&String| {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            openat2(&workspace, path.as_str(), flags, Mode::empty(), resolve).err() == Some(Errno::LOOP)
        };
        if let Some(path) = shown.held.protect.iter().find(is_link) {
            let path = show(Path::new(path));
            return Err(format!(
                "the protected path {path} of the workspace is or leads through a symbolic link; remove the link first"
            ));
        }
        Ok(Both { held: shown.held, changes, workspace })
    }

    /// Every change, parents before what is below them.
    fn list(&self) -> Result<Vec<Change>, String> {
        let mut found = Vec::new();
        let mut directories = vec![PathBuf::new()];
        while let Some(directory) = directories.pop() {
            let at = |error: io::Error| format!("{}: {error}", show(&directory));
            let names = match names(&self.changes, &directory) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    found.retain(|change: &Change| change.below != directory);
                    found.push(Change::closed(&directory));
                    continue;
                }
                other => other.map_err(at)?,
            };
            for name in names {
                let below = directory.join(name);
                let change = self.judge(&below).map_err(|error| format!("{}: {error}", show(&below)))?;
                if change.new == Some(FileType::Directory) && change.kind != Kind::Protected {
                    directories.push(below);
                }
                // A directory that only leads to a change is none.
                let leads = change.kind == Kind::Modified
                    && change.new == Some(FileType::Directory)
                    && !change.opaque;
                found.extend((!leads).then_some(change));
            }
        }
        found.sort_by(|one, other| one.below.cmp(&other.below));
        Ok(found)
    }

    fn judge(&self, below: &Path) -> io::Result<Change> {
        let (folder, name) = parent(&self.changes, below)?;
        let new = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let old = parent(&self.workspace, below)
            .and_then(|(folder, name)| Ok(statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?));
        let since = |old: &Stat| {
            let changed = i128::from(old.st_ctime) * 1000 + i128::from(old.st_ctime_nsec) / 1_000_000;
            changed > i128::from(self.held.since_ms)
        };
        let changed_since = old.as_ref().is_ok_and(since);
        let old = old.ok().map(|old| FileType::from_raw_mode(old.st_mode));
        let kind = FileType::from_raw_mode(new.st_mode);
        let deleted = is_whiteout(&new);
        let directory = kind.is_dir();
        let opaque = match if directory { is_opaque(&folder, name) } else { Ok(false) } {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Ok(Change::closed(below));
            }
            other => other?,
        };
        // What leads to a protected path has to be the directory that it was, or a new one: a link would lead to another.
        let was_directory = old.is_none_or(|old| old == FileType::Directory);
        let leads_elsewhere = !directory || !was_directory || old.is_some() && opaque;
        let judged = if self.is_protected(below, leads_elsewhere) {
            Kind::Protected
        } else if changed_since && !(directory && old == Some(FileType::Directory) && !opaque) {
            Kind::Conflict
        } else if deleted {
            Kind::Deleted
        } else if !(directory || kind.is_file() || kind.is_symlink()) {
            Kind::Special
        } else if old.is_some() {
            Kind::Modified
        } else {
            Kind::Added
        };
        let new = (!deleted).then_some(kind);
        Ok(Change {
            kind: judged,
            path: below.to_string_lossy().into_owned(),
            below: below.to_owned(),
            new,
            opaque,
        })
    }

    /// A protected path, what is below one, and what one is below where that would lead elsewhere.
    fn is_protected(&self, below: &Path, leads_elsewhere: bool) -> bool {
        self.held
            .protect
            .iter()
            .map(Path::new)
            .any(|protected| below.starts_with(protected) || leads_elsewhere && protected.starts_with(below))
    }

    /// Makes one change in the workspace.
    fn apply(&self, change: &Change) -> io::Result<()> {
        let (to, name) = parent(&self.workspace, &change.below)?;
        let (from, _) = parent(&self.changes, &change.below)?;
        let old =
            statat(&to, name, AtFlags::SYMLINK_NOFOLLOW).ok().map(|old| FileType::from_raw_mode(old.st_mode));
        let stays =
            old == Some(FileType::Directory) && change.new == Some(FileType::Directory) && !change.opaque;
        if old == Some(FileType::Directory) && !stays || change.new.is_none() && old.is_some() {
            sandbox::remove_tree(&to, name)?;
        } else if old.is_some() && change.new == Some(FileType::Directory) && !stays {
            unlinkat(&to, name, AtFlags::empty())?;
        }
        match change.new {
            // Its own mode comes when everything is in it.
            Some(FileType::Directory) if !stays => Ok(mkdirat(&to, name, Mode::RWXU)?),
            Some(FileType::RegularFile) => copy(&from, &to, name),
            Some(FileType::Symlink) => {
                let target = readlinkat(&from, name, Vec::new())?;
                let aside = aside();
                symlinkat(target, &to, &aside)?;
                settle(&to, &aside, name)
            }
            _ => Ok(()),
        }
    }

    /// Gives a new directory the mode that it has in the changes.
    fn close(&self, change: &Change) -> io::Result<()> {
        let mode = rustix::fs::fstat(directory(&self.changes, &change.below)?)?.st_mode & 0o777;
        Ok(fchmod(directory(&self.workspace, &change.below)?, Mode::from_raw_mode(mode))?)
    }
}

/// Under another name first, so that nobody sees half of it.
fn copy(from: &OwnedFd, to: &OwnedFd, name: &OsStr) -> io::Result<()> {
    // It was a file a moment ago, and nobody can change what was handed over.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let source = rustix::fs::openat(from, name, flags, Mode::empty())?;
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&source)?.st_mode & 0o777);
    let aside = aside();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let made = rustix::fs::openat(to, &aside, flags, Mode::RUSR | Mode::WUSR)?;
    let copied = io::copy(&mut std::fs::File::from(source), &mut std::fs::File::from(made.try_clone()?))
        .and_then(|_| Ok(fchmod(&made, mode)?));
    if let Err(error) = copied {
        let _ = unlinkat(to, &aside, AtFlags::empty());
        return Err(error);
    }
    settle(to, &aside, name)
}

fn settle(folder: &OwnedFd, aside: &str, name: &OsStr) -> io::Result<()> {
    renameat(folder, aside, folder, name).map_err(|error| {
        let _ = unlinkat(folder, aside, AtFlags::empty());
        error.into()
    })
}

fn aside() -> String {
    format!(".broker-commit-{}", std::process::id())
}

/// The directory that holds `below`, reached without any link, and the last name.
fn parent<'a>(top: &OwnedFd, below: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
    let name = below.file_name().ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    Ok((directory(top, below.parent().unwrap_or(Path::new("")))?, name))
}

fn directory(top: &OwnedFd, below: &Path) -> io::Result<OwnedFd> {
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // What is mounted below the workspace was never shown inside.
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Ok(openat2(top, below, flags, Mode::empty(), resolve)?)
}

fn names(top: &OwnedFd, below: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory(top, below)?)? {
        let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// A device of number 0: what stood there is gone.
fn is_whiteout(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == 0
}

fn is_opaque(folder: impl AsFd, name: &OsStr) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(folder, name, flags, Mode::empty())?;
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&opened));
    match getxattr(path, "user.overlay.opaque", &mut [0_u8; 8][..]) {
        Ok(_) => Ok(true),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// For people: a name may hold anything.
fn show(path: &Path) -> String {
    say::tame(&serde_json::to_string(&path.to_string_lossy()).unwrap_or_default())
}

fn lines(changes: &[Change]) -> String {
    changes.iter().map(|change| format!("{} {}\n", change.kind.letter(), show(&change.below))).collect()
}

/// `broker diff`
pub fn diff(socket: &Path, id: Option<&str>, workspace: Option<PathBuf>, json: bool) -> ExitCode {
    let Some(id) = id else { return list(socket, json) };
    exit(Both::open(socket, id, workspace).and_then(|both| {
        let changes = both.list()?;
        if json {
            let text = serde_json::to_string_pretty(&changes).map_err(|error| error.to_string())?;
            return Ok(say::tame(&text) + "\n");
        }
        Ok(lines(&changes))
    }))
}

/// What is held at all.
fn list(socket: &Path, json: bool) -> ExitCode {
    exit(call::<AllHeld>(socket, "ListChanges", &serde_json::json!({})).map(|AllHeld { held }| {
        if json {
            return say::tame(&serde_json::to_string_pretty(&held).unwrap_or_default()) + "\n";
        }
        let line = |held: &Held| format!("{:<18} {}\n", held.sandbox, show(Path::new(&held.workspace)));
        format!("{:<18} WORKSPACE\n", "SANDBOX") + &held.iter().map(line).collect::<String>()
    }))
}

/// `broker commit`
pub fn commit(socket: &Path, id: &str, workspace: Option<PathBuf>, conflicts: Conflicts) -> ExitCode {
    exit(Both::open(socket, id, workspace).and_then(|both| {
        let changes = both.list()?;
        let (refused, wanted): (Vec<_>, Vec<_>) = changes.into_iter().partition(|change| match change.kind {
            Kind::Special | Kind::Protected => true,
            Kind::Conflict => conflicts == Conflicts::Keep,
            Kind::Added | Kind::Modified | Kind::Deleted => false,
        });
        for change in &wanted {
            both.apply(change).map_err(|error| {
                format!("{}: {error}; what is held stays: mend it and commit again", show(&change.below))
            })?;
        }
        let made = wanted.iter().rev().filter(|change| change.new == Some(FileType::Directory));
        for change in made {
            both.close(change).map_err(|error| format!("{}: {error}", show(&change.below)))?;
        }
        if refused.is_empty() {
            discarded(socket, id)?;
        } else {
            complain!(
                "{} changes are not for a workspace (`!`), protected by the policy (`P`) or were changed in the workspace since (`C`; `--force` overwrites that), and stay held; `broker discard {id}` throws them away",
                refused.len()
            );
        }
        Ok(lines(&wanted) + &lines(&refused))
    }))
}

/// `broker discard`
pub fn discard(socket: &Path, id: &str) -> ExitCode {
    exit(discarded(socket, id).map(|()| String::new()))
}

fn discarded(socket: &Path, id: &str) -> Result<(), String> {
    call::<Value>(socket, "Discard", &Named { sandbox: id.to_owned() }).map(drop)
}
