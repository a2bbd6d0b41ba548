//! /proc, /sys and /dev: files that are the kernel's or the host's.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{any_case, code, open_for_writing, read_case, write_case};
use crate::case::Reporter;

/// FS-04: writes into core_pattern what stands there already.
pub fn core_pattern(report: &Reporter, _: &[String]) {
    let path = "/proc/sys/kernel/core_pattern";
    let old = std::fs::read(path).unwrap_or_else(|_| b"core\n".to_vec());
    match OpenOptions::new().write(true).open(path).and_then(|mut file| file.write_all(&old)) {
        Ok(()) => report.open("core_pattern", ""),
        Err(error) => report.denied("core_pattern", code(&error), ""),
    }
}

/// FS-05: opens every file of /proc that belongs to no process for writing.
pub fn proc_writable(report: &Reporter, _: &[String]) {
    let named = [
        "sys/kernel/core_pattern",
        "sys/kernel/ns_last_pid",
        "sys/kernel/hostname",
        "sys/vm/drop_caches",
        "sys/vm/overcommit_memory",
        "sys/net/ipv4/ip_forward",
        "irq/default_smp_affinity",
        "mtrr",
        "sysrq-trigger",
        "sys/fs/binfmt_misc/register",
        "acpi/wakeup",
        "scsi/scsi",
    ];
    for name in named {
        write_case(report, name, &format!("/proc/{name}"));
    }
    let of_process = |path: &Path| {
        let first = path.components().nth(2).map(|part| part.as_os_str().to_string_lossy().into_owned());
        first.is_some_and(|name| name.ends_with("self") || name.starts_with(|c: char| c.is_ascii_digit()))
    };
    let files = files_below(Path::new("/proc"), usize::MAX, &of_process);
    let tried = files.into_iter().map(|path| (path.clone(), open_for_writing(&path)));
    any_case(report, "every other file", tried.collect());
}

/// FS-06: reads what tells about the host and its kernel.
pub fn proc_readable(report: &Reporter, _: &[String]) {
    let named = [
        "keys",
        "key-users",
        "timer_list",
        "kallsyms",
        "kmsg",
        "config.gz",
        "slabinfo",
        "vmallocinfo",
        "pagetypeinfo",
        "interrupts",
        "cmdline",
        "kcore",
        "sched_debug",
        "latency_stats",
        "scsi",
        "asound",
        "modules",
    ];
    for name in named {
        read_case(report, name, &format!("/proc/{name}"));
    }
}

/// FS-07 `DEPTH`: reads and opens for writing below /sys, no deeper than `DEPTH`.
pub fn sys(report: &Reporter, arguments: &[String]) {
    for name in
        ["kernel/vmcoreinfo", "firmware/acpi/tables", "class/dmi/id", "kernel/debug", "kernel/tracing"]
    {
        read_case(report, name, &format!("/sys/{name}"));
    }
    for name in
        ["kernel/security", "kernel/uevent_seqnum", "fs/cgroup", "fs/cgroup/memory/memory.limit_in_bytes"]
    {
        read_case(report, name, &format!("/sys/{name}"));
    }
    for name in [
        "power/state",
        "kernel/profiling",
        "fs/cgroup/memory/release_agent",
        "fs/cgroup/devices/cgroup.procs",
    ] {
        write_case(report, &format!("write {name}"), &format!("/sys/{name}"));
    }
    let depth = arguments[0].parse().expect("a number");
    let files = files_below(Path::new("/sys"), depth, &|_| false);
    let tried = files.into_iter().map(|path| (path.clone(), open_for_writing(&path)));
    any_case(report, "write every file", tried.collect());
}

/// FS-14: the names in /dev that a program needs are few; anything else is the host's.
pub fn devices(report: &Reporter, _: &[String]) {
    let expected = [
        "null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "fd", "stdin", "stdout",
        "stderr",
    ];
    let names = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let extra: Vec<String> = names.filter(|name| !expected.contains(&name.as_str())).collect();
    match extra.is_empty() {
        true => report.denied("list", 0, ""),
        false => report.open("list", &extra.join(" ")),
    }
    let named = [
        "kvm",
        "fuse",
        "loop0",
        "loop-control",
        "vhost-net",
        "net/tun",
        "kmsg",
        "mem",
        "cpu/0/msr",
        "autofs",
        "hwrng",
        "btrfs-control",
        "vsock",
        "userfaultfd",
        "vda",
        "console",
    ];
    for name in named {
        match std::fs::metadata(format!("/dev/{name}")) {
            Ok(_) => report.open(name, ""),
            Err(error) => report.denied(name, code(&error), ""),
        }
    }
}

fn files_below(root: &Path, depth: usize, skip: &dyn Fn(&Path) -> bool) -> Vec<String> {
    let mut waiting: Vec<(PathBuf, usize)> = vec![(root.to_owned(), depth)];
    let mut files = Vec::new();
    while let Some((directory, left)) = waiting.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                _ if skip(&path) => (),
                Ok(kind) if kind.is_dir() && left > 1 => waiting.push((path, left - 1)),
                Ok(kind) if kind.is_file() => files.push(path.to_string_lossy().into_owned()),
                _ => (),
            }
        }
    }
    files
}
