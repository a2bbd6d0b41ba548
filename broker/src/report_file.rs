//! Where the report goes. The place is fixed before the run and filled after it: a workload that shares the directory can swap
//! the file for a link or a FIFO meanwhile, and must not choose what root writes to.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2, renameat, statat, unlinkat,
};

/// The destination of `--report`.
pub enum ReportFile {
    /// `-`
    StandardOutput,
    /// A name in a directory that is held open.
    Named {
        /// The directory.
        directory: OwnedFd,
        /// The name in it.
        name: OsString,
    },
}

impl ReportFile {
    /// Fixes the place `path` names now.
    pub fn open(path: &Path) -> io::Result<ReportFile> {
        if path == Path::new("-") {
            return Ok(ReportFile::StandardOutput);
        }
        let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
        let name = path.file_name().ok_or_else(|| invalid("not the name of a file"))?.to_owned();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        // A link on the way could have been left by an earlier run.
        let (flags, resolve) =
            (OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, ResolveFlags::NO_SYMLINKS);
        let directory = openat2(CWD, &parent, flags, Mode::empty(), resolve)?;
        match statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode).is_file() => {}
            Ok(_) => {
                return Err(invalid(
                    "something stands there that is no regular file; `-` is standard output",
                ));
            }
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(ReportFile::Named { directory, name })
    }

    /// Puts `text` there, whole or not at all, in place of whatever has come to stand there since.
    pub fn write(&self, text: &str) -> io::Result<()> {
        let ReportFile::Named { directory, name } = self else {
            return io::stdout().write_all(text.as_bytes());
        };
        let mut part = OsString::from(format!(".{}.", std::process::id()));
        part.push(name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(directory, &part, flags, Mode::from_raw_mode(0o644))?;
        let mut file = File::from(file);
        let written =
            file.write_all(text.as_bytes()).and_then(|()| Ok(renameat(directory, &part, directory, name)?));
        written.inspect_err(|_| {
            let _ = unlinkat(directory, &part, AtFlags::empty());
        })
    }
}
