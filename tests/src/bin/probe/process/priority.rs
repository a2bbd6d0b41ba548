//! A larger share of the machine than one was given.

use crate::case::Reporter;
use crate::kernel::raw::{self, address, call, judge};

/// PR-15: `PID` is a process on the host. Affinity of our own needs no case: no policy sets one.
pub fn raise(reporter: &Reporter, arguments: &[String]) {
    let host: i64 = arguments[0].parse().expect("a process id");
    let priority = [1_i32];
    for (case, policy) in [("SCHED_FIFO", libc::SCHED_FIFO), ("SCHED_RR", libc::SCHED_RR)] {
        reporter.in_child(case, |reporter| {
            let set = call(libc::SYS_sched_setscheduler, &[0, i64::from(policy), address(&priority)]);
            reporter.syscall(case, set);
        });
    }
    // struct sched_attr: size 48, SCHED_DEADLINE, then runtime, deadline and period of 1, 100 and 100 ms.
    let attributes = [48_u64 | (6 << 32), 0, 0, 1_000_000, 100_000_000, 100_000_000];
    reporter.in_child("SCHED_DEADLINE", |reporter| {
        reporter.syscall("SCHED_DEADLINE", call(libc::SYS_sched_setattr, &[0, address(&attributes), 0]));
    });
    reporter.in_child("nice", |reporter| reporter.syscall("nice", call(libc::SYS_setpriority, &[0, 0, -20])));
    // IOPRIO_WHO_PROCESS, and IOPRIO_CLASS_RT at level 0.
    reporter.in_child("ioprio", |reporter| {
        reporter.syscall("ioprio", call(libc::SYS_ioprio_set, &[1, 0, 1 << 13]))
    });

    let mask = [3_u64];
    judge(
        reporter,
        "host affinity",
        call(libc::SYS_sched_setaffinity, &[host, 8, address(&mask)]),
        &[libc::ESRCH],
    );
    judge(reporter, "host nice", call(libc::SYS_setpriority, &[0, host, 0]), &[libc::ESRCH]);

    reporter.in_child("oom_score_adj", |reporter| {
        let file = raw::open(c"/proc/self/oom_score_adj", libc::O_WRONLY);
        let written = if file < 0 { file } else { call(libc::SYS_write, &[file, address(b"-1000"), 5]) };
        reporter.syscall("oom_score_adj", written);
    });
    reporter.in_child("mlock 64 MiB", |reporter| {
        let length = 64 << 20;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let memory = call(libc::SYS_mmap, &[0, length, i64::from(access), i64::from(kind), -1, 0]);
        let limit = [libc::ENOMEM, libc::EAGAIN];
        judge(reporter, "mlock 64 MiB", call(libc::SYS_mlock, &[memory, length]), &limit);
    });
}
