//! Kernel file systems that somebody inside may try to mount or to write. The control runs in a mount namespace of its
//! own, and only opens files for writing: nothing is written.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};

use crate::case::Reporter;
use crate::kernel::raw::{self, call};

const NESTED: i64 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC) as i64;

/// KS-16.
pub fn cgroups(reporter: &Reporter, _: &[String]) {
    for (kind, options) in [(c"cgroup", c"memory"), (c"cgroup2", c"")] {
        let name = kind.to_string_lossy();
        mount(reporter, &format!("mount {name}"), kind, options);
        nested(reporter, &format!("nested mount {name}"), kind, options);
    }
    for name in ["release_agent", "notify_on_release", "devices.allow", "cgroup.procs", "tasks"] {
        let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
        let entries = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
        folders.extend(entries.map(|entry| entry.path()));
        let mut result = -1;
        for folder in folders {
            result = open_for_writing(&folder.join(name));
            if result >= 0 {
                break;
            }
        }
        reporter.syscall(name, result);
        raw::close(result);
    }
}

/// KS-18.
pub fn pseudo(reporter: &Reporter, _: &[String]) {
    for kind in [c"binfmt_misc", c"tracefs", c"debugfs", c"bpf", c"securityfs", c"sysfs", c"proc", c"tmpfs"] {
        mount(reporter, &format!("mount {}", kind.to_string_lossy()), kind, c"");
    }
    nested(reporter, "nested mount binfmt_misc", c"binfmt_misc", c"");
    nested(reporter, "nested mount tmpfs", c"tmpfs", c"");
    let target = Target::new();
    let mounted = target.mount(c"binfmt_misc", c"");
    let opened = if mounted < 0 { mounted } else { open_for_writing(&target.path.join("register")) };
    reporter.syscall("binfmt_misc register", opened);
    raw::close(opened);
    for name in [
        "user/max_user_namespaces",
        "kernel/unprivileged_bpf_disabled",
        "kernel/perf_event_paranoid",
        "kernel/core_pattern",
        "vm/unprivileged_userfaultfd",
        "fs/protected_symlinks",
        "net/ipv4/ip_forward",
    ] {
        let opened = open_for_writing(&Path::new("/proc/sys").join(name));
        reporter.syscall(name, opened);
        raw::close(opened);
    }
}

fn open_for_writing(path: &Path) -> i64 {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path without NUL");
    raw::open(&path, libc::O_WRONLY)
}

fn nested(reporter: &Reporter, case: &str, kind: &CStr, options: &CStr) {
    // Made before, for in a user namespace without a map nobody can make one.
    let target = Target::new();
    reporter.in_child(case, |reporter| {
        let parted = call(libc::SYS_unshare, &[NESTED]);
        reporter.syscall(case, if parted < 0 { parted } else { target.mount(kind, options) });
    });
}

fn mount(reporter: &Reporter, case: &str, kind: &CStr, options: &CStr) {
    let target = Target::new();
    let mounted = target.mount(kind, options);
    reporter.syscall(case, mounted);
}

/// A directory to mount on, gone afterwards.
struct Target {
    path: PathBuf,
    name: CString,
}

impl Target {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("broker-test-mount-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory to mount on");
        let name = CString::new(path.as_os_str().as_encoded_bytes()).expect("a path without NUL");
        Target { path, name }
    }

    fn mount(&self, kind: &CStr, options: &CStr) -> i64 {
        let source = c"none".as_ptr() as i64;
        let (target, kind, options) =
            (self.name.as_ptr() as i64, kind.as_ptr() as i64, options.as_ptr() as i64);
        call(libc::SYS_mount, &[source, target, kind, 0, options])
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        call(libc::SYS_umount2, &[self.name.as_ptr() as i64, i64::from(libc::MNT_DETACH)]);
        std::fs::remove_dir(&self.path).ok();
    }
}
