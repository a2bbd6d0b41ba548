//! `read`, `write`, `edit`.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use serde_json::Value;

use super::{ANSWER_BYTES_MAX, Answer, path, says, text};

/// The longest file that is edited or read, in bytes.
const FILE_BYTES_MAX: u64 = 16 << 20;
const LINES: u64 = 2000;
/// The longest line that is shown, in bytes.
const LINE_BYTES_MAX: usize = 2000;

/// Opens a file that is one: nothing that could make us wait.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"))
}

fn whole(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    let file = open_regular(path).map_err(|error| says(path, &error))?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| says(path, &error))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!(
            "{} is longer than {FILE_BYTES_MAX} bytes; use bash to take a part of it",
            path.display()
        ));
    }
    String::from_utf8(bytes)
        .map_err(|_| format!("{} is no UTF-8 text; use bash to look at it", path.display()))
}

/// Puts `bytes` there at once: whoever looks sees the old file or the new one.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let name = format!(".harness-{}", std::process::id());
    let beside = folder.join(name);
    let _ = fs::remove_file(&beside);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.set_permissions(Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

/// In the place of what is there, if that is a file; with its mode.
fn put(path: &Path, content: &str) -> Result<(), String> {
    // A link is followed once, to what it leads to: that is what is replaced.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mode = match fs::symlink_metadata(&target) {
        Ok(there) if there.is_file() => there.permissions().mode() & 0o777,
        Ok(_) => return Err(format!("{}: it is no regular file", path.display())),
        Err(_) => 0o644,
    };
    replace(&target, content.as_bytes(), mode).map_err(|error| says(path, &error))
}

pub fn read(input: &Value) -> Answer {
    let path = path(input, "path")?;
    let content = whole(&path)?;
    let (offset, limit) =
        (input["offset"].as_u64().unwrap_or(1).max(1), input["limit"].as_u64().unwrap_or(LINES));
    let mut shown = String::new();
    let total = content.lines().count() as u64;
    for (number, line) in (1_u64..).zip(content.lines()).skip((offset - 1) as usize).take(limit as usize) {
        let mut end = line.len().min(LINE_BYTES_MAX);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        shown += &format!("{number:>6}\t{}\n", &line[..end]);
        if shown.len() > ANSWER_BYTES_MAX - 2 * LINE_BYTES_MAX {
            shown += &format!("[it goes on, to line {total}: read on with offset {}]\n", number + 1);
            return Ok(shown);
        }
    }
    if shown.is_empty() {
        return Ok(format!("[{} has {total} lines]", path.display()));
    }
    Ok(shown)
}

pub fn write(input: &Value) -> Answer {
    let (path, content) = (path(input, "path")?, text(input, "content")?);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| says(folder, &error))?;
    }
    put(&path, content)?;
    Ok(format!("{} bytes written to {}", content.len(), path.display()))
}

pub fn edit(input: &Value) -> Answer {
    let path = path(input, "path")?;
    let (old, new) = (text(input, "old_string")?, text(input, "new_string")?);
    if old.is_empty() || old == new {
        return Err("`old_string` is not empty, and not the same as `new_string`".to_owned());
    }
    let content = whole(&path)?;
    let (count, all) = (content.matches(old).count(), input["replace_all"].as_bool().unwrap_or_default());
    match count {
        0 => Err(format!("`old_string` is not in {}", path.display())),
        2.. if !all => Err(format!(
            "`old_string` is {count} times in {}; say more of what is around it, or `replace_all`",
            path.display()
        )),
        _ => {
            put(&path, &content.replace(old, new))?;
            Ok(format!("{count} replaced in {}", path.display()))
        }
    }
}
