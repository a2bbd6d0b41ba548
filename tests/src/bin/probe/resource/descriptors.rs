//! Descriptors and the pools behind them.

use std::io::Read;

use crate::case::Reporter;
use crate::fs::{call, errno};

/// RS-05 `COUNT`: that many of each kind at once. `inotify COUNT`, `pty COUNT`: takes that many, says
/// `READY`, and keeps them until standard input ends. `one-inotify`, `one-pty`: takes a single one.
pub fn take(report: &Reporter, arguments: &[String]) {
    match arguments[0].as_str() {
        pool @ ("inotify" | "pty") => {
            let count: usize = arguments[1].parse().expect("a number");
            let taken = (0..count).take_while(|_| one(pool) >= 0).count();
            println!("READY {taken}");
            std::io::stdin().read_to_end(&mut Vec::new()).ok();
        }
        // The other way round: open means that somebody else's use has taken this away from us.
        pool @ ("one-inotify" | "one-pty") => match one(pool) {
            fd if fd >= 0 => report.denied(pool, 0, "there was one left"),
            _ => report.open(pool, &format!("errno {}", errno())),
        },
        count => each(report, count.parse().expect("a number")),
    }
}

fn one(pool: &str) -> i64 {
    match pool.ends_with("pty") {
        true => {
            let flags = (libc::O_RDWR | libc::O_NOCTTY) as usize;
            call(libc::SYS_openat, &[libc::AT_FDCWD as usize, c"/dev/ptmx".as_ptr() as usize, flags])
        }
        false => call(libc::SYS_inotify_init1, &[0]),
    }
}

fn each(report: &Reporter, count: usize) {
    let null = c"/dev/null".as_ptr() as usize;
    let mask = 0_u64;
    let signals = [usize::MAX, (&raw const mask) as usize, 8, 0];
    let kinds: [(&str, libc::c_long, &[usize]); 5] = [
        ("open", libc::SYS_openat, &[libc::AT_FDCWD as usize, null, 0]),
        ("epoll", libc::SYS_epoll_create1, &[0]),
        ("eventfd", libc::SYS_eventfd2, &[0, 0]),
        ("timerfd", libc::SYS_timerfd_create, &[libc::CLOCK_MONOTONIC as usize, 0]),
        ("signalfd", libc::SYS_signalfd4, &signals),
    ];
    for (case, number, words) in kinds {
        let (mut fds, mut refused) = (Vec::new(), 0);
        while fds.len() < count && refused == 0 {
            match call(number, words) {
                fd if fd >= 0 => fds.push(fd as usize),
                _ => refused = errno(),
            }
        }
        match refused {
            0 => report.open(case, &format!("at {}", fds.len())),
            errno => report.denied(case, errno, &format!("at {}", fds.len())),
        }
        fds.into_iter().for_each(|fd| {
            call(libc::SYS_close, &[fd]);
        });
    }
    match call(libc::SYS_dup2, &[0, count]) {
        fd if fd >= 0 => report.open("dup2", &format!("{fd}")),
        _ => report.denied("dup2", errno(), ""),
    }
    let limits = [count as u64 + 100, count as u64 + 100];
    let pointer = (&raw const limits) as usize;
    report.syscall(
        "raise the limit",
        call(libc::SYS_prlimit64, &[0, libc::RLIMIT_NOFILE as usize, pointer, 0]),
    );
}
