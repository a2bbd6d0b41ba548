//! Processes that try to outlive their sandbox, and more of them than init may like.

use std::time::{Duration, Instant};

use crate::case::Reporter;
use crate::kernel::raw::{self, address, call};

/// PR-10: leaves two daemons and `COUNT` stopped grandchildren behind and exits. The second argument is a token, by
/// which the host finds them: they all inherit our command line.
pub fn linger(reporter: &Reporter, arguments: &[String]) {
    let count: usize = arguments[0].parse().expect("how many");
    for keep_output in [true, false] {
        let parent = raw::spawn(|| {
            call(libc::SYS_setsid, &[]);
            raw::spawn(|| daemon(keep_output)).map_or(1, |_| 0)
        });
        raw::wait(parent.expect("a child"));
    }
    let parent = raw::spawn(|| {
        let made = (0..count).filter_map(|_| raw::spawn(stopped)).count();
        i32::from(made != count)
    });
    let end = raw::wait(parent.expect("a child"));
    raw::found(
        reporter,
        "left running",
        (end == raw::End::Exited(0)).then(|| format!("{count} stopped, 2 daemons")),
    );
}

fn daemon(keep_output: bool) -> i32 {
    for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
        // SAFETY: ignoring a signal has no precondition.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    call(libc::SYS_prctl, &[i64::from(libc::PR_SET_NAME), address(c"kworker/0:0")]);
    call(libc::SYS_close, &[0]);
    if !keep_output {
        call(libc::SYS_close, &[1]);
        call(libc::SYS_close, &[2]);
    }
    std::thread::sleep(Duration::from_secs(60));
    0
}

fn stopped() -> i32 {
    call(libc::SYS_kill, &[i64::from(std::process::id()), i64::from(libc::SIGSTOP)]);
    0
}

/// PR-11: `COUNT` children that nobody here waits for; they become init's. The control's init
/// never waits.
pub fn orphans(reporter: &Reporter, arguments: &[String]) {
    let count: usize = arguments[0].parse().expect("how many");
    let batch = 50;
    for _ in 0..count / batch {
        let parent = patient_spawn(|| {
            let made = (0..batch).filter_map(|_| patient_spawn(|| 0)).count();
            i32::from(made != batch)
        });
        let Some(parent) = parent else {
            return reporter.open("orphans", "fork keeps failing");
        };
        if raw::wait(parent) != raw::End::Exited(0) {
            return reporter.open("orphans", "fork keeps failing in the child");
        }
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut left = zombies();
    while left > 0 && Instant::now() < deadline {
        // A control keeps them all: no need to wait the whole time for that.
        if left == count {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        left = zombies();
    }
    raw::found(reporter, "orphans", (left > 0).then(|| format!("{left} zombies stay")));
}

/// Forks; a full process table gets five seconds to empty itself.
fn patient_spawn(attempt: impl Fn() -> i32) -> Option<i32> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match raw::spawn(&attempt) {
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            child => return child,
        }
    }
}

fn zombies() -> usize {
    let state = |process: i32| {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        raw::field(&status, "State").is_some_and(|state| state.starts_with('Z'))
    };
    raw::visible_processes().into_iter().filter(|process| state(*process)).count()
}
