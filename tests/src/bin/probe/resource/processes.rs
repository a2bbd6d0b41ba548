//! Processes, threads and processor time.

use std::time::{Duration, Instant};

use super::{kill, spawn};
use crate::case::Reporter;
use crate::fs::{call, code, errno};

/// RS-01 `COUNT`: that many processes at once, then that many threads. `for-ever`: says `READY` and goes off.
pub fn bomb(report: &Reporter, arguments: &[String]) {
    if arguments[0] == "for-ever" {
        println!("READY");
        // A moment to be looked at: afterwards every look at it waits for its locks.
        std::thread::sleep(Duration::from_millis(200));
        loop {
            // Parent and child alike go on; a refused fork is tried again at once.
            spawn_and_go_on();
        }
    }
    let count: usize = arguments[0].parse().expect("a number");
    let mut children = Vec::new();
    let mut refused = 0;
    while children.len() < count && refused == 0 {
        match spawn(sleep_long) {
            -1 => refused = errno(),
            child => children.push(child),
        }
    }
    outcome(report, "processes", children.len(), count, refused);
    children.into_iter().for_each(kill);

    // They end with this process, which ends next.
    let (mut threads, mut refused) = (0, 0);
    while threads < count && refused == 0 {
        match std::thread::Builder::new().stack_size(16 << 10).spawn(sleep_long) {
            Ok(_) => threads += 1,
            Err(error) => refused = code(&error),
        }
    }
    outcome(report, "threads", threads, count, refused);
}

fn spawn_and_go_on() {
    // SAFETY: the probe has one thread; both sides go on with the same loop.
    unsafe { libc::fork() };
}

fn sleep_long() {
    std::thread::sleep(Duration::from_secs(60));
}

fn outcome(report: &Reporter, case: &str, reached: usize, count: usize, errno: i32) {
    match reached == count {
        true => report.open(case, &format!("at {reached}")),
        false => report.denied(case, errno, &format!("at {reached}")),
    }
}

/// RS-06 `MILLISECONDS PERCENT`: spins on four processes with the best priority that is to be had. Open when
/// they got more than `PERCENT` of one processor by the kernel's count.
pub fn spin(report: &Reporter, arguments: &[String]) {
    let span = Duration::from_millis(arguments[0].parse().expect("a number"));
    let percent: u128 = arguments[1].parse().expect("a number");
    let start = Instant::now();
    let spinner = || {
        call(libc::SYS_setpriority, &[libc::PRIO_PROCESS as usize, 0, -20_isize as usize]);
        while start.elapsed() < span {
            std::hint::black_box(0);
        }
    };
    let children: Vec<i32> = (0..4).map(|_| spawn(spinner)).collect();
    for child in children {
        super::wait_for(child);
    }
    let wall = start.elapsed();
    let used = children_time();
    let detail = format!("{} ms of processor time in {} ms", used.as_millis(), wall.as_millis());
    match used.as_millis() * 100 > wall.as_millis() * percent {
        true => report.open("spin", &detail),
        false => report.denied("spin", 0, &detail),
    }
    let priority = 1_i32;
    // SCHED_FIFO with priority 1: real-time classes are not bound by the quota.
    let result =
        call(libc::SYS_sched_setscheduler, &[0, libc::SCHED_FIFO as usize, (&raw const priority) as usize]);
    report.syscall("SCHED_FIFO", result);
    report.syscall(
        "nice -20",
        call(libc::SYS_setpriority, &[libc::PRIO_PROCESS as usize, 0, -20_isize as usize]),
    );
}

fn children_time() -> Duration {
    // SAFETY: all-zero is a valid `rusage`, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    let micros =
        |time: libc::timeval| Duration::from_micros(time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64);
    micros(usage.ru_utime) + micros(usage.ru_stime)
}
