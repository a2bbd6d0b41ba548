//! Staying beyond the deadline, and never ending output.

use std::ffi::CString;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::spawn;
use crate::case::Reporter;
use crate::fs::call;

// Whatever a run was meant to show, it is over by then; nothing of ours outlives the tests.
const END: Duration = Duration::from_secs(30);

fn deaf() {
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGUSR1, libc::SIGPIPE] {
        // SAFETY: sets a disposition, no handler runs.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// RS-08 `KIND TOKEN [slowly]`: says `READY` and stays. The token is there to be found in the command line.
pub fn stay(_: &Reporter, arguments: &[String]) {
    let start = Instant::now();
    deaf();
    // Every kind leaves one behind that no terminal and no group signal reaches.
    spawn(|| {
        call(libc::SYS_setsid, &[]);
        std::thread::sleep(END);
    });
    println!("READY");
    std::io::stdout().flush().ok();
    match arguments[0].as_str() {
        "ignore" => (),
        "stopped" => {
            for _ in 0..5 {
                spawn(stop);
            }
            stop();
        }
        "vfork" => {
            // The parent cannot run before the child is gone.
            let flags = (libc::CLONE_VFORK | libc::SIGCHLD) as usize;
            match call(libc::SYS_clone, &[flags, 0, 0, 0, 0]) {
                0 => {
                    std::thread::sleep(END);
                    std::process::exit(0);
                }
                child => assert!(child > 0, "clone"),
            }
        }
        "fork-loop" => {
            // On the host the dead wait for a PID 1 that may take its time, and numbers are few.
            let pause = if arguments.len() > 2 { Duration::from_millis(20) } else { Duration::ZERO };
            for _ in 0..4 {
                spawn(|| run_away(start, pause));
            }
        }
        "fifo" => {
            let path = format!("/tmp/{}", arguments[1]);
            let name = CString::new(path.as_str()).expect("no NUL in arguments");
            call(libc::SYS_mknodat, &[libc::AT_FDCWD as usize, name.as_ptr() as usize, 0o10600, 0]);
            spawn(|| {
                std::thread::sleep(END);
            });
            // Nobody ever opens the other end.
            std::fs::File::open(path).ok();
        }
        "flock" => {
            let path = format!("/tmp/{}", arguments[1]);
            let lock = || {
                let file = std::fs::File::create(&path).expect("a file");
                call(libc::SYS_flock, &[file.as_raw_fd() as usize, libc::LOCK_EX as usize]);
                std::thread::sleep(END);
            };
            spawn(lock);
            spawn(lock);
            lock();
        }
        other => panic!("no kind {other}"),
    }
    std::thread::sleep(END.saturating_sub(start.elapsed()));
}

fn stop() {
    // SAFETY: stops this process; nothing is shared.
    unsafe { libc::raise(libc::SIGSTOP) };
    std::thread::sleep(END);
}

// Never the same process for longer than a fork takes.
fn run_away(start: Instant, pause: Duration) {
    while start.elapsed() < END {
        std::thread::sleep(pause);
        match spawn(|| ()) {
            -1 => std::thread::sleep(Duration::from_millis(1)),
            child => {
                super::wait_for(child);
                // SAFETY: the probe has one thread; the parent leaves, the child goes on as the runner.
                if unsafe { libc::fork() } > 0 {
                    // SAFETY: ends this process at once.
                    unsafe { libc::_exit(0) }
                }
            }
        }
    }
}

/// RS-07 `both MIB`: that much on standard output and standard error in turns, without a newline. `after`:
/// leaves a child that goes on writing.
pub fn output(_: &Reporter, arguments: &[String]) {
    let block = vec![b'x'; 64 << 10];
    match arguments[0].as_str() {
        "both" => {
            let mebibytes: usize = arguments[1].parse().expect("a number");
            for _ in 0..mebibytes * 16 {
                let out = std::io::stdout().write_all(&block).and_then(|()| std::io::stdout().flush());
                let err = std::io::stderr().write_all(&block);
                if out.is_err() && err.is_err() {
                    return;
                }
            }
        }
        "after" => {
            deaf();
            spawn(|| {
                call(libc::SYS_setsid, &[]);
                let start = Instant::now();
                while start.elapsed() < END {
                    std::io::stdout().write_all(b"late\n").and_then(|()| std::io::stdout().flush()).ok();
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            println!("main");
        }
        other => panic!("no kind {other}"),
    }
}
