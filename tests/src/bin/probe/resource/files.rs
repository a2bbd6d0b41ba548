//! Space and names in file systems.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{spawn, wait_for};
use crate::case::Reporter;
use crate::fs::{call, code, errno};

/// RS-03 `MIB INODES LABEL=DIRECTORY...`: fills each directory with files, then with bytes, up to these.
pub fn fill(report: &Reporter, arguments: &[String]) {
    let mebibytes: usize = arguments[0].parse().expect("a number");
    let inodes: usize = arguments[1].parse().expect("a number");
    for (label, directory) in arguments[2..].iter().filter_map(|argument| argument.split_once('=')) {
        let mut made = 0;
        let result = (0..inodes).try_for_each(|index| {
            File::create(format!("{directory}/fill-{index}"))?;
            made += 1;
            Ok(())
        });
        outcome(report, &format!("inodes {label}"), made, result);
        for index in 0..made {
            std::fs::remove_file(format!("{directory}/fill-{index}")).ok();
        }
        let block = vec![1_u8; 64 << 10];
        let mut written = 0;
        let path = format!("{directory}/fill");
        let result = File::create(&path).and_then(|mut file| {
            while written < mebibytes << 20 {
                written += file.write(&block)?;
            }
            Ok(())
        });
        outcome(report, &format!("bytes {label}"), written, result);
        std::fs::remove_file(path).ok();
    }
}

fn outcome(report: &Reporter, case: &str, reached: usize, result: std::io::Result<()>) {
    match result {
        Ok(()) => report.open(case, &format!("at {reached}")),
        Err(error) => report.denied(case, code(&error), &format!("at {reached}")),
    }
}

/// RS-04 `size DIRECTORY MIB`: files larger than `MIB`, by every way to make one. `names DIRECTORY COUNT
/// DEPTH`: many names, long names, a deep tree, and directories that their owner cannot enter.
pub fn flood(report: &Reporter, arguments: &[String]) {
    let directory = Path::new(&arguments[1]);
    let count: usize = arguments[2].parse().expect("a number");
    if arguments[0] == "size" {
        return sizes(report, directory, (count << 20) as i64);
    }
    let made =
        names(directory, count).and_then(|()| deep(directory, arguments[3].parse().expect("a number")));
    match made {
        Ok(()) => report.open("names", ""),
        Err(error) => report.denied("names", code(&error), ""),
    }
}

/// What came of trying it on a file.
type Attempt<'a> = &'a dyn Fn(&File) -> i64;

fn sizes(report: &Reporter, directory: &Path, bytes: i64) {
    let path = directory.join("large");
    let attempts: [(&str, Attempt); 3] = [
        ("fallocate", &|file| {
            call(libc::SYS_fallocate, &[file.as_raw_fd() as usize, 0, 0, bytes as usize + 1])
        }),
        ("ftruncate", &|file| call(libc::SYS_ftruncate, &[file.as_raw_fd() as usize, bytes as usize + 1])),
        ("sparse write", &|file| {
            call(libc::SYS_pwrite64, &[file.as_raw_fd() as usize, c"x".as_ptr() as usize, 1, bytes as usize])
        }),
    ];
    for (case, attempt) in attempts {
        // Once as the default has it, where the signal ends the process, and once with the signal ignored.
        for (way, action) in [("", libc::SIG_DFL), (" ignoring", libc::SIG_IGN)] {
            let file =
                OpenOptions::new().create(true).truncate(true).write(true).open(&path).expect("a file");
            let mut pipe = std::io::pipe().expect("a pipe");
            let child = spawn(|| {
                // SAFETY: sets a disposition, no handler runs.
                unsafe { libc::signal(libc::SIGXFSZ, action) };
                let result = attempt(&file);
                let errno = if result < 0 { errno() } else { 0 };
                pipe.1.write_all(&errno.to_ne_bytes()).ok();
            });
            drop(pipe.1);
            let status = wait_for(child);
            let mut errno = [0_u8; 4];
            let case = format!("{case}{way}");
            match std::io::Read::read_exact(&mut pipe.0, &mut errno).map(|()| i32::from_ne_bytes(errno)) {
                Err(_) => report.killed(&case, libc::WTERMSIG(status)),
                Ok(0) => report.open(&case, ""),
                Ok(errno) => report.denied(&case, errno, ""),
            }
        }
    }
    std::fs::remove_file(path).ok();
}

fn names(directory: &Path, count: usize) -> std::io::Result<()> {
    for index in 0..count {
        File::create(directory.join(format!("{index}")))?;
    }
    for index in 0..20 {
        File::create(directory.join(format!("{index:0>255}")))?;
        File::create(directory.join(format!("\u{1b}[2J\n{index}")))?;
        let closed = directory.join(format!("closed {index}"));
        std::fs::create_dir_all(closed.join("below"))?;
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o0))?;
    }
    Ok(())
}

fn deep(directory: &Path, depth: usize) -> std::io::Result<()> {
    let long = "d".repeat(200);
    let start = std::env::current_dir()?;
    std::env::set_current_dir(directory)?;
    for _ in 0..depth {
        // Relative: the whole path is longer than any call takes.
        std::fs::create_dir(&long)?;
        std::env::set_current_dir(&long)?;
    }
    std::env::set_current_dir(start)
}
