//! Calls that no workload needs, each with arguments that have no effect where it is reached.

use crate::case::Reporter;
use crate::kernel::raw::{self, NOWHERE, address, address_mut, call};

/// A call by name, number and arguments.
type Attempt<'a> = (&'a str, i64, &'a [i64]);

fn each(reporter: &Reporter, attempts: &[Attempt]) {
    for (case, number, arguments) in attempts {
        reporter.in_child(case, |reporter| reporter.syscall(case, call(*number, arguments)));
    }
}

/// KS-01.
pub fn io_uring(reporter: &Reporter, _: &[String]) {
    let mut parameters = [0_u8; 120];
    let parameters = address_mut(&mut parameters);
    each(
        reporter,
        &[
            ("io_uring_setup bad", libc::SYS_io_uring_setup, &[1, NOWHERE]),
            ("io_uring_setup", libc::SYS_io_uring_setup, &[1, parameters]),
            ("io_uring_enter", libc::SYS_io_uring_enter, &[-1, 0, 0, 0, 0, 0]),
            ("io_uring_register", libc::SYS_io_uring_register, &[-1, 0, 0, 0]),
        ],
    );
}

/// KS-02.
pub fn tracing(reporter: &Reporter, _: &[String]) {
    for command in 0..40 {
        let case = format!("bpf {command}");
        // A size of 8 and no address: the kernel gets to copy it, and fails there.
        reporter
            .in_child(&case, |reporter| reporter.syscall(&case, call(libc::SYS_bpf, &[command, NOWHERE, 8])));
    }
    each(
        reporter,
        &[
            ("perf_event_open", libc::SYS_perf_event_open, &[NOWHERE, 0, -1, -1, 0]),
            ("userfaultfd", libc::SYS_userfaultfd, &[0]),
            // UFFD_USER_MODE_ONLY, which needs no privilege.
            ("userfaultfd user mode", libc::SYS_userfaultfd, &[1]),
        ],
    );
    let device = raw::open(c"/dev/userfaultfd", libc::O_RDWR);
    reporter.syscall("/dev/userfaultfd", device);
    raw::close(device);
}

/// KS-04.
pub fn administration(reporter: &Reporter, _: &[String]) {
    // ADJ_TICK with a tick that no kernel takes: a change is asked for, so the privilege is checked first.
    let mut time = [0_i64; 26];
    time[0] = 0x4000;
    time[11] = 1;
    let time = address_mut(&mut time);
    each(
        reporter,
        &[
            ("init_module", libc::SYS_init_module, &[NOWHERE, 0, NOWHERE]),
            ("finit_module", libc::SYS_finit_module, &[-1, NOWHERE, 0]),
            ("delete_module", libc::SYS_delete_module, &[NOWHERE, 0]),
            // Flags that no kernel knows: with valid ones and no segments it would unload an image.
            ("kexec_load", libc::SYS_kexec_load, &[0, 0, 0, 0xfff0]),
            ("kexec_file_load", libc::SYS_kexec_file_load, &[-1, -1, 0, 0, 0xfff0]),
            ("swapon", libc::SYS_swapon, &[NOWHERE, 0]),
            ("swapoff", libc::SYS_swapoff, &[NOWHERE]),
            ("reboot", libc::SYS_reboot, &[0, 0, 0, 0]),
            ("acct", libc::SYS_acct, &[NOWHERE]),
            ("syslog", libc::SYS_syslog, &[100, 0, 0]),
            ("settimeofday", libc::SYS_settimeofday, &[NOWHERE, 0]),
            ("clock_settime", libc::SYS_clock_settime, &[0, NOWHERE]),
            ("adjtimex", libc::SYS_adjtimex, &[time]),
            ("clock_adjtime", libc::SYS_clock_adjtime, &[0, time]),
            ("sethostname", libc::SYS_sethostname, &[NOWHERE, 5]),
            ("setdomainname", libc::SYS_setdomainname, &[NOWHERE, 5]),
            ("iopl", libc::SYS_iopl, &[4]),
            ("ioperm", libc::SYS_ioperm, &[0x1_0000, 1, 1]),
            ("quotactl", libc::SYS_quotactl, &[0x7fff_ffff, NOWHERE, 0, NOWHERE]),
            ("quotactl_fd", libc::SYS_quotactl_fd, &[-1, 0x7fff_ffff, 0, NOWHERE]),
            ("nfsservctl", libc::SYS_nfsservctl, &[0, 0, 0]),
            ("uselib", libc::SYS_uselib, &[NOWHERE]),
            ("_sysctl", libc::SYS__sysctl, &[NOWHERE]),
            // Option 3: how many file systems the kernel knows.
            ("sysfs", libc::SYS_sysfs, &[3, 0, 0]),
            ("ustat", libc::SYS_ustat, &[0, NOWHERE]),
            ("lookup_dcookie", libc::SYS_lookup_dcookie, &[0, NOWHERE, 0]),
        ],
    );
}

/// KS-10: changes of how this process itself is run, each of which has been of use to an exploit.
pub fn modes(reporter: &Reporter, _: &[String]) {
    let mut size = 0_u32;
    let size = address_mut(&mut size);
    let empty = [0_u64; 2];
    let program = address(&empty);
    each(
        reporter,
        &[
            ("personality ADDR_NO_RANDOMIZE", libc::SYS_personality, &[0x004_0000]),
            ("personality READ_IMPLIES_EXEC", libc::SYS_personality, &[0x040_0000]),
            ("personality PER_LINUX32", libc::SYS_personality, &[8]),
            ("personality UNAME26", libc::SYS_personality, &[0x002_0000]),
            // The kernel looks at 32 bits: this is ADDR_NO_RANDOMIZE, and no filter may take it for another number.
            ("personality high bits", libc::SYS_personality, &[0x1_0004_0000]),
            ("modify_ldt write", libc::SYS_modify_ldt, &[1, NOWHERE, 16]),
            ("modify_ldt write new", libc::SYS_modify_ldt, &[0x11, NOWHERE, 16]),
            ("arch_prctl ARCH_SET_CPUID", libc::SYS_arch_prctl, &[0x1012, 1]),
            ("prctl PR_SET_TSC", libc::SYS_prctl, &[26, 1]),
            // PR_SET_MM_MAP and PR_SET_MM_MAP_SIZE: the two that ask for no capability.
            ("prctl PR_SET_MM_MAP", libc::SYS_prctl, &[35, 14, NOWHERE, 0, 0]),
            ("prctl PR_SET_MM_MAP_SIZE", libc::SYS_prctl, &[35, 15, size, 0, 0]),
            ("prctl PR_SET_SECCOMP filter", libc::SYS_prctl, &[22, 2, program]),
            ("prctl PR_SET_SECCOMP bad", libc::SYS_prctl, &[22, 2, NOWHERE]),
            ("seccomp filter", libc::SYS_seccomp, &[1, 0, NOWHERE]),
            ("seccomp listener", libc::SYS_seccomp, &[1, 8, NOWHERE]),
            ("prctl PR_SET_PTRACER", libc::SYS_prctl, &[0x5961_6d61, 1]),
        ],
    );
}

/// KS-12.
pub fn rarely_used(reporter: &Reporter, _: &[String]) {
    let own = i64::from(std::process::id());
    each(
        reporter,
        &[
            ("fanotify_init", libc::SYS_fanotify_init, &[0xffff_ffff, 0]),
            ("fanotify_mark", libc::SYS_fanotify_mark, &[-1, 0, 0, -1, 0]),
            ("memfd_secret", libc::SYS_memfd_secret, &[0xffff]),
            ("mbind", libc::SYS_mbind, &[0, 0, 99, 0, 0, 0xffff]),
            ("migrate_pages", libc::SYS_migrate_pages, &[0, 64, NOWHERE, NOWHERE]),
            ("move_pages", libc::SYS_move_pages, &[0, 1, NOWHERE, NOWHERE, NOWHERE, 2]),
            ("set_mempolicy", libc::SYS_set_mempolicy, &[99, 0, 0]),
            ("set_mempolicy_home_node", 450, &[0, 0, 0, 1]),
            ("kcmp", libc::SYS_kcmp, &[own, own, 99, 0, 0]),
            ("process_mrelease", libc::SYS_process_mrelease, &[-1, 0]),
            ("lsm_set_self_attr", 460, &[0, NOWHERE, 0, 0]),
            ("cachestat", 451, &[-1, NOWHERE, NOWHERE, 0]),
        ],
    );
}
