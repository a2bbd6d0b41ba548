//! Capabilities and users, of everyone we can see.

use crate::case::Reporter;
use crate::kernel::raw::{self, address, call, field};

/// `SECBIT_*_LOCKED` of no-root, no-setuid-fixup and keep-caps.
const LOCKED: i64 = 0x2 | 0x8 | 0x20;

/// PR-08.
pub fn capabilities(reporter: &Reporter, _: &[String]) {
    let tasks = statuses();
    let zero = "0000000000000000";
    for (name, wanted) in [
        ("CapInh", zero),
        ("CapPrm", zero),
        ("CapEff", zero),
        ("CapBnd", zero),
        ("CapAmb", zero),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        let other = tasks.iter().find(|(_, status)| field(status, name).as_deref() != Some(wanted));
        let what = other.map(|(task, status)| format!("{task}: {:?}", field(status, name)));
        // Nothing readable proves nothing: our own status at least has to be there.
        let what = if tasks.is_empty() { Some("no status file is readable".to_owned()) } else { what };
        raw::found(reporter, name, what);
    }
    let bits = call(libc::SYS_prctl, &[i64::from(libc::PR_GET_SECUREBITS)]);
    let loose = (bits >= 0 && bits & LOCKED != LOCKED).then(|| format!("{bits:#x}"));
    raw::found(reporter, "securebits", loose);

    let raw_and_admin = (1_u32 << 13) | (1 << 21);
    // Version 3, this process; effective, permitted, inheritable, and the upper halves.
    let header = [0x2008_0522_u32, 0];
    let data = [raw_and_admin, raw_and_admin, raw_and_admin, 0, 0, 0];
    reporter.in_child("capset", |reporter| {
        reporter.syscall("capset", call(libc::SYS_capset, &[address(&header), address(&data)]));
    });
    reporter.in_child("ambient raise", |reporter| {
        call(libc::SYS_capset, &[address(&header), address(&data)]);
        let raise = [i64::from(libc::PR_CAP_AMBIENT), i64::from(libc::PR_CAP_AMBIENT_RAISE), 13, 0, 0];
        reporter.syscall("ambient raise", call(libc::SYS_prctl, &raise));
    });
    reporter.in_child("set securebits", |reporter| {
        let set = [i64::from(libc::PR_SET_SECUREBITS), 0];
        reporter.syscall("set securebits", call(libc::SYS_prctl, &set));
    });
}

/// The status of every task of every process that `/proc` shows.
pub fn statuses() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for process in raw::visible_processes() {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let path = task.path().join("status");
            if let Ok(status) = std::fs::read_to_string(&path) {
                found.push((path.display().to_string(), status));
            }
        }
    }
    found
}

/// PR-09: started with supplementary groups, which must be gone.
pub fn users(reporter: &Reporter, _: &[String]) {
    let count = call(libc::SYS_getgroups, &[0, 0]);
    raw::found(reporter, "groups", (count != 0).then(|| format!("getgroups returned {count}")));
    for (case, number, arguments) in [
        ("setuid", libc::SYS_setuid, &[0][..]),
        ("setgid", libc::SYS_setgid, &[0]),
        ("setreuid", libc::SYS_setreuid, &[0, 0]),
        ("setregid", libc::SYS_setregid, &[0, 0]),
        ("setresuid", libc::SYS_setresuid, &[0, 0, 0]),
        ("setresgid", libc::SYS_setresgid, &[0, 0, 0]),
        // Changes nothing, so that only a policy refuses it.
        ("setresuid unchanged", libc::SYS_setresuid, &[-1, -1, -1]),
        ("setresgid unchanged", libc::SYS_setresgid, &[-1, -1, -1]),
        ("setfsuid", libc::SYS_setfsuid, &[0]),
        ("setfsgid", libc::SYS_setfsgid, &[0]),
        ("setgroups", libc::SYS_setgroups, &[0, 0]),
    ] {
        reporter.in_child(case, |reporter| reporter.syscall(case, call(number, arguments)));
    }
}
