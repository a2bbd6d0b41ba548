//! The filter, run by an interpreter of its own.

use libc::c_long;

use seccompiler::sock_filter;

use super::*;
use crate::plan::UnixSockets;

/// struct seccomp_data of linux/seccomp.h.
struct Call {
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
}

/// EPERM.
const REFUSED: u32 = 0x0005_0001;
/// ENOSYS.
const ABSENT: u32 = 0x0005_0026;
const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
/// Above what the kernel reads of an `int`: a caller may leave anything there (CVE-2023-1523 of snapd).
const HIGH: u64 = 0xdead_beef_0000_0000;

/// The classic BPF that seccomp(2) takes, by the kernel's definition of the opcodes (linux/bpf_common.h), not by our
/// names for them. Panics on what the kernel's verifier refuses and this filter may use: a jump out of the
/// program, an unaligned load, an unknown opcode.
fn execute(program: &[sock_filter], call: &Call) -> u32 {
    let (mut at, mut accumulator) = (0, 0_u32);
    loop {
        let (instruction, k) = (&program[at], program[at].k);
        let jump = |taken: bool| usize::from(if taken { instruction.jt } else { instruction.jf });
        at += 1;
        match instruction.code {
            0x20 => accumulator = load(call, k),
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => at += jump(accumulator == k),
            0x25 => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            0x45 => at += jump(accumulator & k != 0),
            0x06 => return k,
            code => panic!("instruction {}: {code:#x} is not one this filter should use", at - 1),
        }
    }
}

fn load(call: &Call, offset: u32) -> u32 {
    assert!(offset.is_multiple_of(4), "offset {offset} is not aligned");
    match offset {
        0 => call.number,
        4 => call.architecture,
        // Both architectures have the lower half first.
        16..64 => (call.arguments[(offset as usize - 16) / 8] >> (offset % 8 * 8)) as u32,
        _ => panic!("nothing here decides by offset {offset}"),
    }
}

fn both() -> [BpfProgram; 2] {
    [UnixSockets::Refused, UnixSockets::Allowed]
        .map(|unix_sockets| compile(SeccompPlan { unix_sockets }).expect("the filter compiles"))
}

fn call(number: c_long, given: &[u64]) -> Call {
    let mut arguments = [0; 6];
    arguments[..given.len()].copy_from_slice(given);
    let number = u32::try_from(number).expect("a call's number");
    Call { number, architecture: ARCHITECTURE, arguments }
}

/// The verdict holds under both variants.
fn assert_exact(number: c_long, given: &[u64], verdict: u32) {
    for program in both() {
        assert_eq!(execute(&program, &call(number, given)), verdict, "{number} {given:x?}");
    }
}

/// And whatever stands above arguments that the kernel takes as `int`.
fn assert_int(number: c_long, given: &[u64], verdict: u32) {
    assert_exact(number, given, verdict);
    assert_exact(number, &given.iter().map(|value| value | HIGH).collect::<Vec<_>>(), verdict);
}

#[test]
fn jumps_stay_inside_and_the_program_is_short_enough() {
    for program in both() {
        assert!(program.len() <= 4096, "BPF_MAXINSNS of linux/bpf_common.h");
        for (at, instruction) in program.iter().enumerate() {
            let furthest = match instruction.code {
                0x05 => instruction.k as usize,
                0x15 | 0x25 | 0x35 | 0x45 => usize::from(instruction.jt.max(instruction.jf)),
                _ => continue,
            };
            assert!(at + 1 + furthest < program.len(), "instruction {at} jumps {furthest}");
        }
        println!("instructions: {}", program.len());
    }
}

/// The tree is checked against the table it was made of: a conditional jump cut to 255 would miss its leaf.
#[test]
fn the_tree_says_of_every_number_what_the_table_says() {
    let ranges = numbers::ranges(|call| {
        arguments::rules(SeccompPlan { unix_sockets: UnixSockets::Refused })
            .iter()
            .position(|(number, _)| *number == call)
    });
    for (number, program) in (0..600).flat_map(|number| both().map(|program| (number, program))) {
        let verdict = ranges.iter().rev().find(|(first, _)| *first <= number).expect("0 begins").1;
        let expected: &[u32] = match verdict {
            Verdict::Allow => &[ALLOW],
            Verdict::Refuse => &[REFUSED],
            Verdict::Unknown => &[ABSENT],
            Verdict::Arguments(_) => &[ALLOW, REFUSED],
        };
        assert!(expected.contains(&execute(&program, &call(number.into(), &[]))), "{number}");
    }
}

#[test]
#[rustfmt::skip]
fn what_no_program_can_do_without_is_allowed() {
    for number in [
        libc::SYS_read, libc::SYS_write, libc::SYS_close, libc::SYS_mmap, libc::SYS_execve, libc::SYS_exit_group,
        libc::SYS_futex, libc::SYS_rt_sigreturn, libc::SYS_getrandom, libc::SYS_wait4,
    ] {
        assert_exact(number, &[], ALLOW);
    }
}

/// The calls that container engines refuse too, and those that only root could use.
#[test]
fn what_reaches_out_of_a_sandbox_is_refused() {
    use libc::*;
    #[rustfmt::skip]
    let refused = [
        SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_kcmp, SYS_pidfd_getfd, SYS_mount,
        SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_move_mount, SYS_open_tree, SYS_fsopen, SYS_fsmount,
        SYS_fsconfig, SYS_fspick, SYS_mount_setattr, SYS_setns, SYS_unshare, SYS_bpf, SYS_perf_event_open,
        SYS_userfaultfd, SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register, SYS_keyctl,
        SYS_add_key, SYS_request_key, SYS_seccomp, SYS_name_to_handle_at, SYS_open_by_handle_at,
        SYS_fanotify_init, SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_kexec_load, SYS_reboot,
        SYS_swapon, SYS_swapoff, SYS_acct, SYS_quotactl, SYS_syslog, SYS_vhangup, SYS_settimeofday,
        SYS_clock_settime, SYS_clock_adjtime, SYS_adjtimex, SYS_sethostname, SYS_setdomainname,
        SYS_move_pages, SYS_migrate_pages,
    ];
    for number in refused {
        // No arguments make it harmless.
        [0, 1, u64::MAX].iter().for_each(|value| assert_exact(number, &[*value; 6], REFUSED));
    }
}

/// On ENOSYS a C library takes the older call, whose arguments can be judged.
#[test]
fn what_cannot_be_judged_or_is_not_known_does_not_exist() {
    let unused = if cfg!(target_arch = "x86_64") { 335..424 } else { 295..424 };
    for number in unused.chain(463..600).chain([libc::SYS_clone3, libc::SYS_openat2]) {
        assert_exact(number, &[], ABSENT);
    }
}

/// x32 has its numbers above this bit on x86_64 (`__X32_SYSCALL_BIT`), and the same architecture value.
#[test]
fn numbers_of_x32_do_not_exist() {
    for program in both() {
        for number in (0..600).chain([0x3fff_ffff, 0xbfff_ffff]) {
            let foreign = Call { number: 0x4000_0000 + number, ..call(0, &[]) };
            assert_eq!(execute(&program, &foreign), ABSENT, "x32 {number}");
        }
    }
}

/// i386 and arm (32 bits), the other of ours, and one that does not exist.
#[test]
fn a_call_of_another_architecture_ends_the_process() {
    let others = [0x4000_0003, 0x4000_0028, 0xc000_003e, 0xc000_00b7, 0, u32::MAX];
    for architecture in others.into_iter().filter(|other| *other != ARCHITECTURE) {
        for (program, number) in both().iter().flat_map(|program| (0..600).map(move |at| (program, at))) {
            let foreign = Call { architecture, ..call(number, &[]) };
            assert_eq!(execute(program, &foreign), KILL_PROCESS, "{architecture:#x} {number}");
        }
    }
}

#[test]
fn ioctl_takes_no_input_faking_and_no_forced_terminal() {
    // TCGETS, TIOCGWINSZ, FIONREAD, FIOCLEX; TIOCSCTTY without force.
    for command in [0x5401, 0x5413, 0x541b, 0x5451, 0x540e] {
        assert_int(libc::SYS_ioctl, &[0, command, 0], ALLOW);
    }
    // TIOCSTI TIOCLINUX TIOCCONS TIOCSETD TIOCVHANGUP KDSKBENT SIOCSIFADDR FS_IOC_SETFLAGS NS_GET_USERNS
    for command in [0x5412, 0x541c, 0x541d, 0x5423, 0x5437, 0x4b47, 0x8916, 0x4008_6602, 0xb701] {
        assert_int(libc::SYS_ioctl, &[0, command, 0], REFUSED);
    }
    assert_exact(libc::SYS_ioctl, &[0, 0x540e, 1], REFUSED);
}

#[test]
fn clone_makes_threads_and_processes_and_no_namespace() {
    let thread = 0x003d_0f00;
    for flags in [17, thread, 0x0100_4011] {
        assert_exact(libc::SYS_clone, &[flags], ALLOW);
    }
    // CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET of linux/sched.h.
    for bit in [17, 25, 26, 27, 28, 29, 30] {
        let rests = [0, 17, thread, HIGH];
        rests.iter().for_each(|rest| assert_exact(libc::SYS_clone, &[1 << bit | rest], REFUSED));
    }
}

#[test]
fn sockets_are_tcp_and_udp_and_unix_only_where_asked_for() {
    // Close-on-exec and non-blocking are flags of the type.
    for (family, kind, protocol) in [(2, 1, 0), (10, 1, 6), (2, 2, 17), (10, 2, 0), (2, 0x8_0801, 0)] {
        assert_int(libc::SYS_socket, &[family, kind, protocol], ALLOW);
    }
    // Raw, ping, MPTCP, SCTP, packet types of TCP and UDP crossed; every other family with every type.
    let odd =
        [(2, 3, 0), (2, 3, 255), (2, 2, 1), (10, 2, 58), (2, 1, 262), (2, 1, 132), (2, 1, 17), (2, 2, 6)];
    let families = (0..64).filter(|family| ![1, 2, 10].contains(family));
    let others = families.flat_map(|family| (0..16).map(move |kind| (family, kind, 0)));
    for (family, kind, protocol) in odd.into_iter().chain(others) {
        assert_int(libc::SYS_socket, &[family, kind, protocol], REFUSED);
    }
    for (program, verdict) in both().iter().zip([REFUSED, ALLOW]) {
        for (family, kind) in [(1, 1), (1, 2), (1, 5), (1 | HIGH, 1), (1 | HIGH, 2)] {
            assert_eq!(execute(program, &call(libc::SYS_socket, &[family, kind, 0])), verdict);
        }
    }
}

#[test]
fn pairs_of_sockets_are_connected_ones() {
    for kind in [1, 5, 0x8_0001, 0x8_0805] {
        assert_int(libc::SYS_socketpair, &[1, kind, 0], ALLOW);
    }
    for (family, kind) in [(1, 2), (1, 0x8_0002), (1, 3), (2, 1), (16, 1), (30, 1)] {
        assert_int(libc::SYS_socketpair, &[family, kind, 0], REFUSED);
    }
}

/// Every call that takes a mode, with the position of that argument.
#[test]
fn no_call_sets_a_set_id_bit() {
    #[rustfmt::skip]
    let mut calls = vec![
        (libc::SYS_fchmod, 1, vec![]), (libc::SYS_fchmodat, 2, vec![]), (libc::SYS_fchmodat2, 2, vec![]),
        (libc::SYS_mknodat, 2, vec![]), (libc::SYS_openat, 3, vec![0, 0, libc::O_CREAT as u64]),
        // O_TMPFILE makes a file without O_CREAT.
        (libc::SYS_openat, 3, vec![0, 0, libc::O_TMPFILE as u64]),
    ];
    #[cfg(target_arch = "x86_64")]
    calls.push((libc::SYS_open, 2, vec![0, libc::O_CREAT as u64]));
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_chmod, libc::SYS_creat, libc::SYS_mknod].map(|number| (number, 1, vec![])));
    for (number, position, mut given) in calls {
        given.resize(position, 0);
        // mkdir(2) ignores set-id bits, and mknod(2) wants a type with the mode for more than a file.
        for mode in [0o4000, 0o2000, 0o6000, 0o4755, 0o2755, 0o6777] {
            assert_int(number, &[given.as_slice(), &[mode]].concat(), REFUSED);
        }
        let harmless = if [libc::SYS_mknodat, 133].contains(&number) { 0o644 } else { 0o1777 };
        assert_int(number, &[given.as_slice(), &[harmless]].concat(), ALLOW);
    }
    // Without creation the mode means nothing, whatever the register holds.
    assert_exact(libc::SYS_openat, &[0, 0, 0, u64::MAX], ALLOW);
}

#[test]
fn devices_are_not_made() {
    for (kind, verdict) in [(0o01, ALLOW), (0o14, ALLOW), (0o10, ALLOW), (0o02, REFUSED), (0o06, REFUSED)] {
        assert_int(libc::SYS_mknodat, &[0, 0, kind << 12 | 0o600, 0x103], verdict);
    }
}

#[test]
fn the_core_limit_can_be_read_and_not_changed() {
    let core = u64::from(libc::RLIMIT_CORE);
    let core_set = [([0, core, 8], REFUSED), ([0, core, HIGH], REFUSED)];
    for (given, verdict) in core_set.into_iter().chain([([0, core, 0], ALLOW), ([0, 7, 8], ALLOW)]) {
        assert_exact(libc::SYS_prlimit64, &given, verdict);
        assert_exact(libc::SYS_prlimit64, &[given[0], given[1] | HIGH, given[2]], verdict);
    }
    assert_int(libc::SYS_setrlimit, &[core, 8], REFUSED);
    assert_int(libc::SYS_setrlimit, &[7, 8], ALLOW);
}

#[test]
fn fcntl_takes_no_lease_and_no_directory_notice() {
    // F_DUPFD, F_SETLK, F_SETOWN_EX, F_OFD_SETLK, F_GETLEASE, F_DUPFD_CLOEXEC, F_ADD_SEALS.
    for command in [0, 6, 15, 37, 1025, 1030, 1033] {
        assert_int(libc::SYS_fcntl, &[0, command, 0], ALLOW);
    }
    // F_SETLEASE, F_NOTIFY.
    for command in [1024, 1026] {
        assert_int(libc::SYS_fcntl, &[0, command, 0], REFUSED);
    }
}

/// Whoever has init's uid may schedule it, unless the filter says no. Threads are named by number: 0 is oneself.
#[test]
fn init_is_not_scheduled_by_anybody() {
    use libc::*;
    for number in [SYS_sched_setaffinity, SYS_sched_setparam, SYS_sched_setscheduler, SYS_sched_setattr] {
        assert_int(number, &[1], REFUSED);
        for other in [0, 2, 12_345] {
            assert_int(number, &[other], ALLOW);
        }
    }
    for (number, process) in [(SYS_setpriority, 0), (SYS_ioprio_set, 1)] {
        for (which, who, verdict) in
            [(0, 0, ALLOW), (0, 7, ALLOW), (0, 1, REFUSED), (1, 0, ALLOW), (1, 1, REFUSED), (2, 0, REFUSED)]
        {
            assert_int(number, &[process + which, who], verdict);
        }
    }
}
