//! Names: absolute, relative, through links, and hard links.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{any_case, call, code, errno, read_case};
use crate::case::Reporter;

const UP: &str = "../../../../../../../../../../../../../../../..";

/// FS-01 `PATH...`: reads each.
pub fn secrets(report: &Reporter, arguments: &[String]) {
    for path in arguments {
        read_case(report, path, path);
    }
}

/// FS-02 `CANARY PID...|all`: the links of processes that run in other roots. The first process is looked at
/// closely.
pub fn process_links(report: &Reporter, arguments: &[String]) {
    let canary = &arguments[0];
    let pids = if arguments[1] == "all" { visible_processes() } else { arguments[1..].to_vec() };
    let first = &pids[0];
    for link in ["root", "cwd", "exe"] {
        match std::fs::read_link(format!("/proc/{first}/{link}")) {
            Ok(target) => report.open(&format!("readlink {link}"), &target.to_string_lossy()),
            Err(error) => report.denied(&format!("readlink {link}"), code(&error), first),
        }
    }
    read_case(report, "list fd", &format!("/proc/{first}/fd"));
    let through = |places: &dyn Fn(&str) -> Vec<String>| {
        let paths = pids.iter().flat_map(|pid| places(pid));
        paths.map(|path| (path.clone(), std::fs::read(&path).map(drop))).collect::<Vec<_>>()
    };
    any_case(report, "root of every process", through(&|pid| vec![format!("/proc/{pid}/root{canary}")]));
    any_case(report, "cwd of every process", through(&|pid| vec![format!("/proc/{pid}/cwd/{UP}{canary}")]));
    let tasks = |pid: &str| {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        tasks.map(|task| format!("{}/root{canary}", task.path().display())).collect()
    };
    any_case(report, "root of every thread", through(&tasks));
    let descriptors = |pid: &str| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        fds.map(|fd| format!("{}/{UP}{canary}", fd.path().display())).collect()
    };
    any_case(report, "directory descriptors of every process", through(&descriptors));
}

/// The numbers in `/proc`, smallest first.
pub fn visible_processes() -> Vec<String> {
    let names = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = names.filter_map(|name| name.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.iter().map(u32::to_string).collect()
}

/// FS-08 `DIRECTORY TARGET`: links in a writable directory that point at a host file, read and written
/// through. `DIRECTORY/planted-*` were made by the host.
pub fn symlinks(report: &Reporter, arguments: &[String]) {
    let (directory, target) = (Path::new(&arguments[0]), &arguments[1]);
    let texts = [
        ("absolute", target.clone()),
        ("relative", format!("{UP}{target}")),
        ("magic root", format!("/proc/self/root{target}")),
        ("magic thread root", format!("/proc/thread-self/root{target}")),
        ("magic cwd", format!("/proc/self/cwd/{UP}{target}")),
    ];
    let mut links = Vec::new();
    for (name, text) in texts {
        let link = directory.join(format!("link {name}"));
        std::os::unix::fs::symlink(text, &link).expect("links can be made in the directory");
        links.push((name.to_owned(), link));
    }
    links.push(("chain of 39".to_owned(), chain(directory, target)));
    for name in ["planted-absolute", "planted-relative"] {
        links.push((name.to_owned(), directory.join(name)));
    }
    for (name, link) in links {
        read_case(report, &format!("read {name}"), &link.to_string_lossy());
        let mut options = OpenOptions::new();
        let written = options.append(true).open(&link).and_then(|mut file| file.write_all(b"written\n"));
        match written {
            Ok(()) => report.open(&format!("write {name}"), ""),
            Err(error) => report.denied(&format!("write {name}"), code(&error), ""),
        }
    }
}

// The kernel follows 40 links in one look-up; one is left for the path's own.
fn chain(directory: &Path, target: &str) -> PathBuf {
    let mut next = PathBuf::from(target);
    for index in 0..39 {
        let link = directory.join(format!("chain {index}"));
        std::os::unix::fs::symlink(&next, &link).expect("links can be made in the directory");
        next = link;
    }
    next
}

/// FS-09 `ROOT NAME`: creates and removes a file `NAME` in every directory below `ROOT`. Each place that let
/// it, and whose parent did not, is an open case of its own.
pub fn writable_directories(report: &Reporter, arguments: &[String]) {
    let mut waiting = vec![(PathBuf::from(&arguments[0]), false)];
    let (mut seen, mut open) = (0_usize, 0_usize);
    while let Some((directory, below)) = waiting.pop() {
        seen += 1;
        let file = directory.join(&arguments[1]);
        let made = OpenOptions::new().write(true).create_new(true).mode(0o666).open(&file).is_ok();
        if made {
            std::fs::remove_file(&file).expect("what was made can be removed");
            if !below {
                open += 1;
                report.open(&directory.to_string_lossy(), "");
            }
        }
        let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            let name = entry.file_name();
            let process = directory == Path::new("/proc")
                && name.to_string_lossy().starts_with(|c: char| c.is_ascii_digit());
            if !process {
                waiting.push((entry.path(), made || below));
            }
        }
    }
    if open == 0 {
        report.denied("none", 0, &format!("{seen} directories"));
    }
}

/// FS-19 `CANARY`: leaves the working directory by `..`.
pub fn relative(report: &Reporter, arguments: &[String]) {
    read_case(report, "relative", &format!("{UP}{}", arguments[0]));
    read_case(report, "through a descriptor", &format!("/proc/self/cwd/{UP}{}", arguments[0]));
    let root = std::fs::metadata("/").map(|root| (root.dev(), root.ino())).ok();
    let top = std::fs::metadata(UP).map(|top| (top.dev(), top.ino())).ok();
    if root != top {
        report.open("top", &format!("{root:?} {top:?}"));
    }
    match std::env::current_dir() {
        Ok(path) if path.starts_with("/") => (),
        other => report.open("getcwd", &format!("{other:?}")),
    }
}

/// FS-22 `FILE DIRECTORY`: hard links of a file that can only be read, in a directory that can be written.
pub fn hard_links(report: &Reporter, arguments: &[String]) {
    let file = CString::new(arguments[0].as_str()).expect("no NUL in arguments");
    let empty = c"";
    let Ok(opened) = std::fs::File::open(&arguments[0]) else {
        return report.denied("the file cannot even be read", errno(), &arguments[0]);
    };
    use std::os::fd::AsRawFd;
    let fd = opened.as_raw_fd();
    let magic = CString::new(format!("/proc/self/fd/{fd}")).expect("no NUL");
    let here = libc::AT_FDCWD as usize;
    let attempts = [
        ("plain", here, file.as_c_str(), 0),
        ("AT_SYMLINK_FOLLOW", here, magic.as_c_str(), libc::AT_SYMLINK_FOLLOW),
        ("AT_EMPTY_PATH", fd as usize, empty, libc::AT_EMPTY_PATH),
    ];
    for (index, (case, base, old, flags)) in attempts.into_iter().enumerate() {
        let new = CString::new(format!("{}/hard link {index}", arguments[1])).expect("no NUL in arguments");
        let result = call(
            libc::SYS_linkat,
            &[base, old.as_ptr() as usize, here, new.as_ptr() as usize, flags as usize],
        );
        match result {
            0 => report.open(case, ""),
            _ => report.denied(case, errno(), ""),
        }
    }
}
