//! Crashes, and what they and refusals leave in the kernel's log.

use std::ffi::CString;
use std::io::Write;

use super::{spawn, wait_for};
use crate::case::Reporter;
use crate::fs::{call, code};

fn rename(name: &str) {
    let name = CString::new(name).expect("no NUL in arguments");
    call(libc::SYS_prctl, &[libc::PR_SET_NAME as usize, name.as_ptr() as usize]);
}

/// RS-11 `NAME plain|lowered|raised`: aborts under that name, with the core limit as found, at 0 (which lets
/// a pipe handler run) or as high as it goes.
pub fn crash(_: &Reporter, arguments: &[String]) {
    rename(&arguments[0]);
    call(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as usize, 1]);
    let wanted: Option<u64> = match arguments[1].as_str() {
        "lowered" => Some(0),
        "raised" => Some(u64::MAX),
        _ => None,
    };
    if let Some(limit) = wanted {
        let limits = [limit, limit.max(1)];
        call(libc::SYS_prlimit64, &[0, libc::RLIMIT_CORE as usize, (&raw const limits) as usize, 0]);
        let limits = [limit, limit];
        call(libc::SYS_setrlimit, &[libc::RLIMIT_CORE as usize, (&raw const limits) as usize]);
    }
    // SAFETY: ends this process by SIGABRT.
    unsafe { libc::abort() }
}

/// RS-12 `NAME CALLS DEATHS`: that many refused calls, that many children killed by a foreign call, and as
/// many by a segmentation fault; then lines into the kernel's log under that name.
pub fn flood(report: &Reporter, arguments: &[String]) {
    rename(&arguments[0]);
    let count = |index: usize| arguments[index].parse::<usize>().expect("a number");
    for _ in 0..count(1) {
        call(libc::SYS_mount, &[0, 0, 0, 0, 0]);
    }
    let (mut foreign, mut faults) = (0, 0);
    for _ in 0..count(2) {
        foreign += usize::from(libc::WIFSIGNALED(wait_for(spawn(foreign_call))));
        faults += usize::from(libc::WIFSIGNALED(wait_for(spawn(fault))));
    }
    let detail = format!("{foreign} killed by a foreign call, {faults} by a fault");
    match std::fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        Err(error) => report.denied("kernel log", code(&error), &detail),
        Ok(mut log) => match log.write_all(format!("{} was here\n", arguments[0]).as_bytes()) {
            Ok(()) => report.open("kernel log", &detail),
            Err(error) => report.denied("kernel log", code(&error), &detail),
        },
    }
}

fn foreign_call() {
    // SAFETY: getpid (20) by the 32-bit entry; it only changes eax.
    unsafe { std::arch::asm!("int 0x80", inout("eax") 20 => _, options(nostack)) };
}

fn fault() {
    // SAFETY: none: the read of address 8 is there to end this process.
    unsafe { std::ptr::without_provenance::<u8>(8).read_volatile() };
}
