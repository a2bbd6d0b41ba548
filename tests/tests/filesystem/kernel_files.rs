//! /proc, /sys and /dev.

use broker_tests::{Sandbox, assert_refused};

use super::assert_errno;

/// FS-04. Method: the value that stands in core_pattern is written there again. Oracle: the kernel's errno.
#[test]
fn fs_04_core_pattern_cannot_be_written() {
    let sandbox = Sandbox::new();
    let nothing: [&str; 0] = [];
    let inside = sandbox.probe("FS-04", &nothing);
    assert_refused("FS-04", &sandbox.control("FS-04", &nothing), &inside, &[]);
    assert_errno("FS-04", &inside, &[libc::EROFS, libc::EACCES, libc::ENOENT]);
}

/// FS-05. Method: every file of /proc that belongs to no process is opened for writing. Oracle: the kernel's
/// errno. Vacuous here: this kernel has neither sysrq, binfmt_misc, ACPI wake-up nor SCSI files.
#[test]
fn fs_05_nothing_in_proc_can_be_written() {
    let sandbox = Sandbox::new();
    let nothing: [&str; 0] = [];
    let inside = sandbox.probe("FS-05", &nothing);
    let vacuous = ["sysrq-trigger", "sys/fs/binfmt_misc/register", "acpi/wakeup", "scsi/scsi"];
    assert_refused("FS-05", &sandbox.control("FS-05", &nothing), &inside, &vacuous);
    assert_errno("FS-05", &inside, &[libc::EROFS, libc::EACCES, libc::ENOENT, libc::EPERM]);
}

/// FS-06. Method: the first bytes of what tells about the host are read. Oracle: the bytes.
/// Vacuous here: files that this kernel does not have; kmsg is empty once it was read.
#[test]
fn fs_06_host_information_in_proc_is_masked() {
    let sandbox = Sandbox::new();
    let nothing: [&str; 0] = [];
    let inside = sandbox.probe("FS-06", &nothing);
    let vacuous = ["kcore", "sched_debug", "latency_stats", "scsi", "asound", "modules", "kmsg"];
    assert_refused("FS-06", &sandbox.control("FS-06", &nothing), &inside, &vacuous);
}

/// FS-07. Method: known files of /sys are read and opened for writing, then everything below it; on the host
/// no deeper than two levels. Oracle: the kernel's errno. Vacuous here: what this machine's firmware does not
/// offer, and file systems that are not mounted.
#[test]
fn fs_07_sys_is_absent() {
    let sandbox = Sandbox::new();
    let inside = sandbox.probe("FS-07", &["64"]);
    let vacuous = ["class/dmi/id", "kernel/debug", "kernel/tracing", "kernel/security"];
    assert_refused("FS-07", &sandbox.control("FS-07", &["2"]), &inside, &vacuous);
    assert_errno("FS-07", &inside, &[0, libc::ENOENT, libc::EACCES]);
}

/// FS-14. Method: /dev is listed, and devices that give away the host are looked up. Oracle: the list of the
/// row. Vacuous here: devices that this machine does not have.
#[test]
fn fs_14_dev_has_only_what_programs_need() {
    let sandbox = Sandbox::new();
    let nothing: [&str; 0] = [];
    let inside = sandbox.probe("FS-14", &nothing);
    let vacuous = ["vhost-net", "mem", "cpu/0/msr"];
    assert_refused("FS-14", &sandbox.control("FS-14", &nothing), &inside, &vacuous);
    let usable = "for f in null zero full random urandom; do test -c /dev/$f || echo $f; done; \
                  echo x > /dev/null; head -c 4 /dev/urandom | wc -c; head -c 1 /dev/fd/0; test -d /dev/shm && echo end";
    let output = sandbox.shell(usable);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "4\nend\n",
        "FS-14: the devices are real: {output:?}"
    );
}
