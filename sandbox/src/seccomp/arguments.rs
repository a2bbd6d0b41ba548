//! Calls whose arguments decide. A call of this table is allowed when one of its rules matches, else `EPERM`.
//! Arguments that the kernel takes as `int` are compared in 32 bits: what a caller puts above them is ignored there too.

use libc::c_long;

use super::assemble::Assembly;
use super::{RETURN_ALLOW, RETURN_ERRNO};
use crate::plan::{INNER_ID, SeccompPlan, UnixSockets};

/// Any of these, each of which is all of its conditions.
pub(super) type Rule = Vec<Vec<Condition>>;

/// Half an argument, masked, lies in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    /// In `struct seccomp_data`, in bytes.
    offset: u32,
    mask: u32,
    first: u32,
    last: u32,
}

/// `CLONE_NEW*` as clone(2) takes them. `CLONE_NEWTIME` shares its bit with the exit signal there and cannot be given.
const CLONE_NAMESPACES: u32 = 0x7e02_0000;
/// set-user-ID and set-group-ID.
const SET_ID: u32 = 0o6000;
/// `S_IFMT`.
const TYPE: u32 = 0o170_000;
/// What socket(2) takes beside the type: `SOCK_CLOEXEC | SOCK_NONBLOCK` are the rest.
const SOCKET_TYPE: u32 = 0xf;
/// `__O_TMPFILE`, which with `O_DIRECTORY` makes `O_TMPFILE`.
const TMPFILE: u32 = 0o20_000_000;

/// ioctl(2) commands that programs need on terminals, pipes, sockets and files, from first to last. Everything else is
/// refused, so that neither TIOCSTI (0x5412) nor a driver's private command is a way. Ranges keep the program short: its
/// length is what installing it costs.
const IOCTLS: [(u32, u32); 18] = [
    (0x5401, 0x540b),           // TCGETS .. TCFLSH
    (0x540f, 0x5411),           // TIOCGPGRP TIOCSPGRP TIOCOUTQ
    (0x5413, 0x5418), // TIOCGWINSZ TIOCSWINSZ, and the modem lines, which a pty answers with an error
    (0x541b, 0x541b), // FIONREAD
    (0x5420, 0x5422), // TIOCPKT FIONBIO TIOCNOTTY
    (0x5424, 0x5425), // TIOCGETD TCSBRKP
    (0x5429, 0x542d), // TIOCGSID TCGETS2 .. TCSETSF2
    (0x5441, 0x5441), // TIOCGPTPEER
    (0x5450, 0x5452), // FIONCLEX FIOCLEX FIOASYNC
    (0x5460, 0x5460), // FIOQSIZE
    (0x8004_5430, 0x8004_5430), // TIOCGPTN
    (0x4004_5431, 0x4004_5431), // TIOCSPTLCK
    (0x8905, 0x8906), // SIOCATMARK SIOCGSTAMP
    (0x8912, 0x8915), // SIOCGIFCONF SIOCGIFFLAGS SIOCSIFFLAGS (no right to) SIOCGIFADDR
    (0x8933, 0x8933), // SIOCGIFINDEX
    (0x4004_9409, 0x4004_9409), // FICLONE
    (0x4020_940d, 0x4020_940d), // FICLONERANGE
    (0x8008_6601, 0x8008_6601), // FS_IOC_GETFLAGS
];
/// Becoming the session's terminal, never by force.
const TIOCSCTTY: u32 = 0x540e;

/// prctl(2) options, from first to last.
const PRCTLS: [(i32, i32); 11] = [
    (libc::PR_SET_PDEATHSIG, libc::PR_SET_DUMPABLE),
    (libc::PR_GET_KEEPCAPS, libc::PR_GET_KEEPCAPS),
    (libc::PR_SET_NAME, libc::PR_GET_NAME),
    (libc::PR_GET_SECCOMP, libc::PR_GET_SECCOMP),
    (libc::PR_CAPBSET_READ, libc::PR_CAPBSET_READ),
    (libc::PR_GET_TSC, libc::PR_GET_TSC),
    (libc::PR_GET_SECUREBITS, libc::PR_GET_SECUREBITS),
    (libc::PR_SET_TIMERSLACK, libc::PR_GET_TIMERSLACK),
    // Sub-reaper, no_new_privs, tid address, transparent huge pages.
    (libc::PR_SET_CHILD_SUBREAPER, libc::PR_GET_THP_DISABLE),
    (libc::PR_GET_SPECULATION_CTRL, libc::PR_GET_SPECULATION_CTRL),
    (libc::PR_SET_VMA, libc::PR_SET_VMA),
];

/// The calls that have a rule, and their rules.
pub(super) fn rules(plan: SeccompPlan) -> Vec<(c_long, Rule)> {
    let mut table = vec![
        (libc::SYS_socket, sockets(plan)),
        // A pair of datagrams could still send to any address, and so carry descriptors out of a shared workspace.
        (libc::SYS_socketpair, vec![pair(libc::SOCK_STREAM), pair(libc::SOCK_SEQPACKET)]),
        // F_SETLEASE and F_NOTIFY on a file of a shared workspace make the host wait.
        (
            libc::SYS_fcntl,
            vec![
                vec![within(1, 0, word(libc::F_SETLEASE) - 1)],
                vec![equal(1, word(libc::F_GETLEASE))],
                vec![within(1, word(libc::F_NOTIFY) + 1, u32::MAX)],
            ],
        ),
        (libc::SYS_clone, vec![vec![without(0, CLONE_NAMESPACES)]]),
        (libc::SYS_ioctl, ioctls()),
        (
            libc::SYS_prctl,
            PRCTLS.iter().map(|(first, last)| vec![within(0, word(*first), word(*last))]).collect(),
        ),
        (libc::SYS_personality, vec![vec![equal(0, 0)], vec![equal(0, u32::MAX)]]),
        (libc::SYS_fchmod, vec![vec![without(1, SET_ID)]]),
        (libc::SYS_fchmodat, vec![vec![without(2, SET_ID)]]),
        (libc::SYS_fchmodat2, vec![vec![without(2, SET_ID)]]),
        (libc::SYS_openat, opens(2, 3)),
        (libc::SYS_mknodat, nodes(2)),
        (libc::SYS_prlimit64, limits_of_its_own()),
        (libc::SYS_setrlimit, not_core(0).map(|other| vec![other]).to_vec()),
    ];
    // Any process but init, which has the workload's uid: whoever could starve it would hold signals up.
    for call in [
        libc::SYS_sched_setaffinity,
        libc::SYS_sched_setparam,
        libc::SYS_sched_setscheduler,
        libc::SYS_sched_setattr,
    ] {
        table.push((call, not_init(0).map(|other| vec![other]).to_vec()));
    }
    // PRIO_PROCESS and PRIO_PGRP; IOPRIO_WHO_PROCESS and IOPRIO_WHO_PGRP. All of a user's processes would be init too.
    for (call, first) in [(libc::SYS_setpriority, 0), (libc::SYS_ioprio_set, 1)] {
        table.push((call, not_init(1).map(|other| vec![within(0, first, first + 1), other]).to_vec()));
    }
    let (own, kept) = (INNER_ID, u32::MAX);
    for call in [libc::SYS_setuid, libc::SYS_setgid] {
        table.push((call, vec![ids(&[own])]));
    }
    for call in [libc::SYS_setreuid, libc::SYS_setregid] {
        table.push((call, vec![ids(&[kept, own]), ids(&[own, own])]));
    }
    // Changing to the id that one has, as posix_spawn(3) does it for GNU make. There is no other.
    for call in [libc::SYS_setresuid, libc::SYS_setresgid] {
        table.push((call, vec![ids(&[kept, own, kept]), ids(&[own, own, own])]));
    }
    #[cfg(target_arch = "x86_64")]
    table.extend([
        (libc::SYS_chmod, vec![vec![without(1, SET_ID)]]),
        (libc::SYS_open, opens(1, 2)),
        (libc::SYS_creat, vec![vec![without(1, SET_ID)]]),
        (libc::SYS_mknod, nodes(1)),
        // ARCH_SET_GS ARCH_SET_FS ARCH_GET_FS ARCH_GET_GS
        (libc::SYS_arch_prctl, vec![vec![within(0, 0x1001, 0x1004)]]),
    ]);
    table
}

/// TCP and UDP over IPv4 and IPv6: the only network is the sandbox's own loopback. Protocols that bypass what is
/// filtered by port or family elsewhere (MPTCP, SCTP, ping, raw) are not there.
fn sockets(plan: SeccompPlan) -> Rule {
    // 2 and 10 differ in one bit, and nothing else is within the mask.
    let family = masked(0, !(word(libc::AF_INET) ^ word(libc::AF_INET6)), word(libc::AF_INET));
    let mut list = Vec::new();
    for (kind, protocol) in [(libc::SOCK_STREAM, libc::IPPROTO_TCP), (libc::SOCK_DGRAM, libc::IPPROTO_UDP)] {
        for protocol in [0, protocol] {
            list.push(vec![family, masked(1, SOCKET_TYPE, word(kind)), equal(2, word(protocol))]);
        }
    }
    if plan.unix_sockets == UnixSockets::Allowed {
        list.push(vec![equal(0, word(libc::AF_UNIX))]);
    }
    list
}

fn pair(kind: i32) -> Vec<Condition> {
    vec![equal(0, word(libc::AF_UNIX)), masked(1, SOCKET_TYPE, word(kind))]
}

fn ioctls() -> Rule {
    let ranges = IOCTLS.iter().map(|(first, last)| vec![within(1, *first, *last)]);
    ranges.chain([vec![equal(1, TIOCSCTTY), equal(2, 0)]]).collect()
}

/// No set-id bit may be created: either nothing is created, or the mode has none.
fn opens(flags: u32, mode: u32) -> Rule {
    vec![vec![without(flags, word(libc::O_CREAT) | TMPFILE)], vec![without(mode, SET_ID)]]
}

/// Files, FIFOs and sockets, without set-id bits; never a device.
fn nodes(mode: u32) -> Rule {
    let kinds = [0, libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK];
    kinds.map(|kind| vec![masked(mode, TYPE | SET_ID, kind)]).to_vec()
}

/// Any limit may be read. One's own may be changed, init's may not; that of core dumps, which keeps core handlers away, never.
fn limits_of_its_own() -> Rule {
    let mut rule = not_core(1).map(|other| vec![equal(0, 0), other]).to_vec();
    // No new value: a pointer, and so both of its halves.
    let low = equal(2, 0);
    rule.push(vec![low, Condition { offset: low.offset + 4, ..low }]);
    rule
}

fn not_core(argument: u32) -> [Condition; 2] {
    let core = libc::RLIMIT_CORE;
    [within(argument, 0, core - 1), within(argument, core + 1, u32::MAX)]
}

fn not_init(argument: u32) -> [Condition; 2] {
    [equal(argument, 0), within(argument, 2, u32::MAX)]
}

fn ids(list: &[u32]) -> Vec<Condition> {
    (0..).zip(list).map(|(argument, id)| equal(argument, *id)).collect()
}

/// The number as the register holds it.
fn word(number: i32) -> u32 {
    number.cast_unsigned()
}

/// The lower half of an argument: both architectures have it first.
fn within(argument: u32, first: u32, last: u32) -> Condition {
    const OFFSET_ARGUMENTS: u32 = 16;
    Condition { offset: OFFSET_ARGUMENTS + 8 * argument, mask: u32::MAX, first, last }
}

fn equal(argument: u32, value: u32) -> Condition {
    within(argument, value, value)
}

fn masked(argument: u32, mask: u32, value: u32) -> Condition {
    Condition { mask, ..equal(argument, value) }
}

fn without(argument: u32, bits: u32) -> Condition {
    masked(argument, bits, 0)
}

/// The block of `rule`. An argument is loaded again only where it has to be.
pub(super) fn emit(rule: &Rule, program: &mut Assembly) {
    let allow = program.label();
    let mut loaded = None;
    for alternative in rule {
        let next = program.label();
        // What the accumulator holds at `next`, from wherever it is reached.
        let mut left = Vec::new();
        for (at, condition) in alternative.iter().enumerate() {
            let Condition { offset, mask, first, last } = *condition;
            if loaded != Some(offset) {
                program.load(offset);
            }
            loaded = Some(offset);
            if mask != u32::MAX {
                program.mask(mask);
                loaded = None;
            }
            let then = (at + 1 == alternative.len()).then_some(allow);
            program.when_within(first, last, then, next);
            left.push(loaded);
        }
        loaded = left.iter().copied().reduce(|one, other| if one == other { one } else { None }).flatten();
        program.place(next);
    }
    program.finish(RETURN_ERRNO | libc::EPERM as u32);
    program.place(allow);
    program.finish(RETURN_ALLOW);
}
