//! What sandboxes changed in workspaces that were not to be changed: kept below the state directory, where only root comes, until
//! it is thrown away. Of what a workload wrote only names are read here, to
//! see that there are any and to remove them.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::net::SendFlags;

use super::inner::{Done, Errand, send};
use crate::protocol::Held;

/// Where all of them are.
fn folder(state: &Path) -> PathBuf {
    state.join("changes")
}

/// Where those of one sandbox are. A name is ours; one that is none has come from somebody who is not.
pub fn place(state: &Path, id: &str) -> io::Result<PathBuf> {
    if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(folder(state).join(id))
}

fn note_of(place: &Path) -> PathBuf {
    place.with_extension("json")
}

/// Makes the place for all, for root alone.
pub fn prepare(state: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder(state))
}

/// Notes that changes will be there, before the first is.
pub fn note(state: &Path, held: &Held) -> io::Result<()> {
    let file = note_of(&place(state, &held.sandbox)?);
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    Ok(serde_json::to_writer(file, held)?)
}

/// All that are noted.
pub fn all(state: &Path) -> Vec<Held> {
    let listed = fs::read_dir(folder(state)).into_iter().flatten().flatten().map(|entry| entry.path());
    let notes = listed.filter(|path| path.extension().is_some_and(|ending| ending == "json"));
    notes.filter_map(|path| serde_json::from_slice(&fs::read(path).ok()?).ok()).collect()
}

/// Whether anything was changed; if not, nothing stays.
pub fn settle(state: &Path, id: &str) -> io::Result<bool> {
    let place = place(state, id)?;
    if place.exists() && !sandbox::is_unchanged(&place)? {
        return Ok(true);
    }
    discard(&place)?;
    Ok(false)
}

fn discard(place: &Path) -> io::Result<()> {
    for done in [sandbox::discard_changes(place), fs::remove_file(note_of(place))] {
        match done {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Does it, and says so on `channel`.
pub fn run(state: &Path, id: &str, what: Errand, channel: &OwnedFd) {
    let done = place(state, id).and_then(|place| match what {
        Errand::Show => show(state, &place, id).map(Some),
        Errand::Discard => discard(&place).map(|()| None),
    });
    let said = match &done {
        Ok(_) => Done::Well,
        Err(error) => Done::Failed(error.to_string()),
    };
    let shown = done.ok().flatten();
    let shown: Vec<_> = shown.iter().map(AsFd::as_fd).collect();
    // When nobody is there to hear it, there is nobody to tell.
    let _ = send(channel, &said, &shown, SendFlags::empty());
}

fn show(state: &Path, place: &Path, id: &str) -> io::Result<OwnedFd> {
    let gone = || io::Error::from(io::ErrorKind::NotFound);
    let held = all(state).into_iter().find(|held| held.sandbox == id).ok_or_else(gone)?;
    let workload = fs::symlink_metadata(place.join("files"))?;
    sandbox::show_changes(place, workload.uid(), (held.uid, held.gid))
}
