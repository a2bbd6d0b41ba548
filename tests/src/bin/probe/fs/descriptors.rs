//! Descriptors that outlive what they were opened for: the runtime's binary, and what the caller had open.

use std::ffi::CString;
use std::os::fd::IntoRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{call, code};
use crate::case::Reporter;

/// Where `hold` puts what it opens: low numbers, and some that a loop up to 1024 would miss.
const NUMBERS: [i32; 20] = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 500, 1500];

/// FS-03 `PID MILLISECONDS`: keeps the program of `PID` by an `O_PATH` descriptor and opens it again for
/// writing until that works; then does the same to its own program after it has become another.
pub fn runtime_binary(report: &Reporter, arguments: &[String]) {
    if arguments[0] == "wait" {
        // The control's victim: a runtime that ends in a moment.
        return std::thread::sleep(Duration::from_millis(arguments[1].parse().expect("a number")));
    }
    let link = format!("/proc/{}/exe", arguments[0]);
    match path_descriptor(&link) {
        Err(error) => report.denied("runtime", code(&error), &link),
        Ok(fd) => {
            let deadline = Instant::now() + Duration::from_millis(arguments[1].parse().expect("a number"));
            loop {
                // O_TRUNC would be the attack's own; the binary is not ours to destroy when it works.
                match super::open_for_writing(&format!("/proc/self/fd/{fd}")) {
                    Ok(()) => break report.open("runtime", &link),
                    Err(error) if Instant::now() > deadline => {
                        break report.denied("runtime", code(&error), &link);
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }
    }
    let fd = path_descriptor("/proc/self/exe").expect("the own program can be looked at");
    let line = |outcome| {
        format!(r#"{{"id":"FS-03","case":"own program","outcome":"{outcome}","errno":0,"detail":""}}"#)
    };
    let script = format!(
        "if (: >> /proc/self/fd/{fd}) 2>/dev/null; then echo '{}'; else echo '{}'; fi",
        line("open"),
        line("denied")
    );
    let error = Command::new("/bin/sh").arg("-c").arg(script).exec();
    report.open("own program", &format!("no shell: {error}"));
}

// Without close-on-exec: the shell has to have it.
fn path_descriptor(path: &str) -> std::io::Result<i32> {
    let path = CString::new(path).expect("no NUL in arguments");
    let here = libc::AT_FDCWD as usize;
    match call(libc::SYS_openat, &[here, path.as_ptr() as usize, libc::O_PATH as usize, 0]) {
        fd if fd >= 0 => Ok(fd as i32),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// FS-18 `list`: descriptors beyond the three standard ones. `hold DIRECTORY FILE -- COMMAND...`: becomes a
/// command that inherits directories, files, sockets and event descriptors of ours, none of them
/// close-on-exec.
pub fn inherited(report: &Reporter, arguments: &[String]) {
    if arguments[0] == "hold" {
        hold(&arguments[1], &arguments[2]);
        let error = Command::new(&arguments[4]).args(&arguments[5..]).exec();
        eprintln!("probe: {}: {error}", arguments[4]);
        std::process::exit(71);
    }
    let mut extra = Vec::new();
    for number in 3..20_000 {
        // F_GETFD says whether it is there and changes nothing.
        if call(libc::SYS_fcntl, &[number, libc::F_GETFD as usize]) >= 0 {
            let target = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
            extra.push(format!("{number} {}", target.display()));
        }
    }
    match extra.is_empty() {
        true => report.denied("inherited", 0, ""),
        false => report.open("inherited", &extra.join(", ")),
    }
}

fn hold(directory: &str, file: &str) {
    let (socket, event) = (
        call(libc::SYS_socket, &[libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0]) as i32,
        call(libc::SYS_eventfd2, &[0, 0]) as i32,
    );
    let sources = [
        std::fs::File::open(directory).expect("the directory opens").into_raw_fd(),
        std::fs::File::open(file).expect("the file opens").into_raw_fd(),
        socket,
        event,
    ];
    // Out of the way of the numbers to fill, before any of those is filled.
    let moved =
        sources.map(|source| call(libc::SYS_fcntl, &[source as usize, libc::F_DUPFD_CLOEXEC as usize, 2000]));
    for (index, number) in NUMBERS.into_iter().enumerate() {
        let result = call(libc::SYS_dup2, &[moved[index % moved.len()] as usize, number as usize]);
        assert_eq!(result, i64::from(number), "dup2: {}", std::io::Error::last_os_error());
    }
}
