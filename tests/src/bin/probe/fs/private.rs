//! Places and names that every sandbox has for itself: /tmp and the like, System V and POSIX IPC.

use std::ffi::CString;
use std::io::Read;

use super::{call, code, errno};
use crate::case::Reporter;

const PLACES: [&str; 4] = ["/tmp", "/dev/shm", "/var/tmp", "/run"];

/// FS-23 `make|see|clean TOKEN KEY`. `make` puts a file in every place and an object in every table, says
/// `READY`, and waits for the end of standard input. `see` looks for what another one made.
pub fn places(report: &Reporter, arguments: &[String]) {
    let (token, key) = (&arguments[1], arguments[2].parse::<usize>().expect("a key"));
    match arguments[0].as_str() {
        "make" => {
            for place in PLACES {
                // Not every place has to be there inside; the other side looks for what could be made.
                std::fs::write(format!("{place}/{token}"), token).ok();
            }
            tables(token, key, libc::IPC_CREAT as usize | 0o666, libc::O_CREAT | libc::O_RDWR);
            look(report, token, key);
            println!("READY");
            std::io::stdin().read_to_end(&mut Vec::new()).ok();
        }
        "see" => look(report, token, key),
        _ => clean(token, key),
    }
}

fn look(report: &Reporter, token: &str, key: usize) {
    for place in PLACES {
        match std::fs::read(format!("{place}/{token}")) {
            Ok(_) => report.open(place, ""),
            Err(error) => report.denied(place, code(&error), ""),
        }
    }
    for (name, result, errno) in tables(token, key, 0, libc::O_RDONLY) {
        if result >= 0 { report.open(name, "") } else { report.denied(name, errno, "") }
    }
}

fn tables(token: &str, key: usize, flags: usize, open: i32) -> Vec<(&'static str, i64, i32)> {
    let name = CString::new(token).expect("no NUL in arguments");
    let calls = [
        ("shm", libc::SYS_shmget, vec![key, 4096, flags]),
        ("sem", libc::SYS_semget, vec![key, 1, flags]),
        ("msg", libc::SYS_msgget, vec![key, flags]),
        ("mq", libc::SYS_mq_open, vec![name.as_ptr() as usize, open as usize, 0o666, 0]),
    ];
    // The size has to be left out by those who only look.
    let fitted = calls.map(|(table, number, mut words)| {
        if flags == 0 && table == "shm" {
            words[1] = 0;
        }
        let result = call(number, &words);
        (table, result, if result < 0 { errno() } else { 0 })
    });
    fitted.to_vec()
}

fn clean(token: &str, key: usize) {
    for place in PLACES {
        std::fs::remove_file(format!("{place}/{token}")).ok();
    }
    let remove = libc::IPC_RMID as usize;
    let name = CString::new(token).expect("no NUL in arguments");
    for (table, id, _) in tables(token, key, 0, libc::O_RDONLY) {
        match table {
            "shm" => call(libc::SYS_shmctl, &[id as usize, remove, 0]),
            "sem" => call(libc::SYS_semctl, &[id as usize, 0, remove, 0]),
            "msg" => call(libc::SYS_msgctl, &[id as usize, remove, 0]),
            _ => call(libc::SYS_mq_unlink, &[name.as_ptr() as usize]),
        };
    }
}
