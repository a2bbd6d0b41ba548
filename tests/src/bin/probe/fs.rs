//! The file system rows: what a process can open, create, mount or reach that its policy does not name.

mod descriptors;
mod kernel_files;
mod mounts;
mod paths;
mod private;

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use crate::case::{Reporter, Row};

pub const ROWS: &[Row] = &[
    Row { id: "FS-01", attempt: paths::secrets },
    Row { id: "FS-02", attempt: paths::process_links },
    Row { id: "FS-03", attempt: descriptors::runtime_binary },
    Row { id: "FS-04", attempt: kernel_files::core_pattern },
    Row { id: "FS-05", attempt: kernel_files::proc_writable },
    Row { id: "FS-06", attempt: kernel_files::proc_readable },
    Row { id: "FS-07", attempt: kernel_files::sys },
    Row { id: "FS-08", attempt: paths::symlinks },
    Row { id: "FS-09", attempt: paths::writable_directories },
    Row { id: "FS-10", attempt: mounts::remount },
    Row { id: "FS-11", attempt: mounts::unmask },
    Row { id: "FS-12", attempt: mounts::surface },
    Row { id: "FS-13", attempt: mounts::device_nodes },
    Row { id: "FS-14", attempt: kernel_files::devices },
    Row { id: "FS-15", attempt: mounts::raised },
    Row { id: "FS-18", attempt: descriptors::inherited },
    Row { id: "FS-19", attempt: paths::relative },
    Row { id: "FS-22", attempt: paths::hard_links },
    Row { id: "FS-23", attempt: private::places },
    Row { id: "FS-24", attempt: mounts::handles },
    Row { id: "FS-28", attempt: mounts::propagation },
];

/// A raw system call. Pointers among the arguments are null, bad on purpose, or to memory that outlives the
/// call.
pub fn call(number: libc::c_long, arguments: &[usize]) -> i64 {
    let word = |index: usize| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: see above; the kernel answers a bad pointer with EFAULT and never writes through a null one.
    unsafe { libc::syscall(number, word(0), word(1), word(2), word(3), word(4), word(5)) }
}

/// What the last system call of this thread failed with.
pub fn errno() -> i32 {
    code(&std::io::Error::last_os_error())
}

/// The errno in `error`; 0 where there is none.
pub fn code(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

/// Open when a byte of `path` (or a name in it) can be read.
pub fn read_case(report: &Reporter, case: &str, path: &str) {
    match first_bytes(path) {
        Ok(text) if text.is_empty() => report.denied(case, 0, "empty"),
        Ok(text) => report.open(case, &format!("{path}: {text}")),
        Err(error) => report.denied(case, code(&error), path),
    }
}

/// Open when `path` opens for writing; nothing is written.
pub fn write_case(report: &Reporter, case: &str, path: &str) {
    match open_for_writing(path) {
        Ok(()) => report.open(case, path),
        Err(error) => report.denied(case, code(&error), path),
    }
}

/// Whether any of `tried` worked: each is a path with what came of it.
pub fn any_case(report: &Reporter, case: &str, tried: Vec<(String, std::io::Result<()>)>) {
    let worked: Vec<&str> =
        tried.iter().filter(|(_, result)| result.is_ok()).map(|(path, _)| path.as_str()).collect();
    if worked.is_empty() {
        let last = tried.iter().rev().find_map(|(_, result)| result.as_ref().err()).map_or(0, code);
        report.denied(case, last, &format!("{} tried", tried.len()));
    } else {
        let some = worked.iter().take(12).copied().collect::<Vec<_>>().join(" ");
        report.open(case, &format!("{} of {}: {some}", worked.len(), tried.len()));
    }
}

/// Opens `path` for writing and closes it. The null device in the place of a file is a cover and no way to
/// it.
pub fn open_for_writing(path: &str) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    match file.metadata()?.rdev() == libc::makedev(1, 3) {
        true => Err(std::io::Error::from_raw_os_error(libc::EACCES)),
        false => Ok(()),
    }
}

/// The beginning of a file, or the first names in a directory.
fn first_bytes(path: &str) -> std::io::Result<String> {
    if std::fs::metadata(path)?.is_dir() {
        let names = std::fs::read_dir(path)?.flatten().take(5);
        return Ok(names
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" "));
    }
    // Non-blocking: /proc/kmsg waits for the next record.
    let mut file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let mut bytes = [0_u8; 48];
    let count = file.read(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..count]).into_owned())
}
