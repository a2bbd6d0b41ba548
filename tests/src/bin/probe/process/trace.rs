//! Reading and steering other processes, init before all: whoever owns init owns what init holds.

use std::io::Read;

use crate::case::Reporter;
use crate::kernel::raw::{self, NOWHERE, address, address_mut, call};

const ATTACH: i64 = libc::PTRACE_ATTACH as i64;
const DETACH: i64 = libc::PTRACE_DETACH as i64;
const SEIZE: i64 = libc::PTRACE_SEIZE as i64;

/// PR-02. Its control runs in a pid namespace of its own: the host's init is not to be attached to.
pub fn init(reporter: &Reporter, _: &[String]) {
    let sibling = raw::sleeper();
    for (name, pid) in [("init", 1), ("sibling", i64::from(sibling))] {
        // In a child, whose end detaches whatever is left attached.
        reporter.in_child(&format!("attach {name}"), |reporter| {
            let result = call(libc::SYS_ptrace, &[ATTACH, pid, 0, 0]);
            reporter.syscall(&format!("attach {name}"), result);
            if result == 0 {
                call(libc::SYS_wait4, &[pid, 0, i64::from(libc::__WALL), 0]);
                call(libc::SYS_ptrace, &[DETACH, pid, 0, 0]);
            }
        });
        reporter.in_child(&format!("seize {name}"), |reporter| {
            reporter.syscall(&format!("seize {name}"), call(libc::SYS_ptrace, &[SEIZE, pid, 0, 0]));
        });
    }
    raw::kill(sibling);
    reporter
        .in_child("traceme", |reporter| reporter.syscall("traceme", call(libc::SYS_ptrace, &[0, 0, 0, 0])));

    let mut local = [0_u8; 8];
    let near = [address_mut(&mut local), 8];
    let far = [NOWHERE, 8];
    for (case, number) in
        [("process_vm_readv", libc::SYS_process_vm_readv), ("process_vm_writev", libc::SYS_process_vm_writev)]
    {
        reporter.syscall(case, call(number, &[1, address(&near), 1, address(&far), 1, 0]));
    }

    let memory = raw::open(c"/proc/1/mem", libc::O_RDWR);
    reporter.syscall("/proc/1/mem", memory);
    raw::close(memory);
    for name in ["environ", "auxv", "maps", "syscall", "stack"] {
        let case = format!("/proc/1/{name}");
        let mut text = Vec::new();
        match std::fs::File::open(&case).and_then(|file| file.take(65536).read_to_end(&mut text)) {
            Ok(0) => reporter.denied(&case, 0, "empty"),
            Ok(length) => reporter.open(&case, &format!("{length} bytes")),
            Err(error) => reporter.denied(&case, error.raw_os_error().unwrap_or(0), ""),
        }
    }
    match std::fs::read_dir("/proc/1/fd") {
        Ok(entries) => reporter.open("/proc/1/fd", &format!("{} descriptors", entries.count())),
        Err(error) => reporter.denied("/proc/1/fd", error.raw_os_error().unwrap_or(0), ""),
    }
}

/// PR-03: init's descriptors and memory through a pidfd. Its control runs in a pid namespace of its own.
pub fn descriptors(reporter: &Reporter, _: &[String]) {
    let init = call(libc::SYS_pidfd_open, &[1, 0]);
    let mut worst = None;
    for number in 0..64 {
        let got = call(libc::SYS_pidfd_getfd, &[init, number, 0]);
        let errno = raw::errno();
        // EBADF: the check on the process passed, and only this number is not open.
        if got >= 0 || errno != libc::EPERM {
            worst = Some(format!("descriptor {number}: returned {got}, errno {errno}"));
            raw::close(got);
        }
    }
    match worst {
        Some(what) => reporter.open("pidfd_getfd of init", &what),
        None => reporter.denied("pidfd_getfd of init", libc::EPERM, "all 64"),
    }
    reporter.syscall("pidfd_getfd bad", call(libc::SYS_pidfd_getfd, &[-1, 0, 0]));
    let own = i64::from(std::process::id());
    for (case, kind) in [("kcmp file", 0), ("kcmp vm", 1), ("kcmp files", 2)] {
        reporter.syscall(case, call(libc::SYS_kcmp, &[1, own, kind, 0, 0]));
    }
    // MADV_COLD over init's memory: needs the right to read it.
    let range = [0x1000_i64, 0x1000];
    let cold = i64::from(libc::MADV_COLD);
    reporter.syscall(
        "process_madvise init",
        call(libc::SYS_process_madvise, &[init, address(&range), 1, cold, 0]),
    );
    reporter
        .syscall("process_madvise bad", call(libc::SYS_process_madvise, &[-1, address(&range), 1, cold, 0]));
}
