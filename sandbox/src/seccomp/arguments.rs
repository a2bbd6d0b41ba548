//! Calls whose arguments decide. A call of this table is allowed when one of its rules matches, else `EPERM`.
//! Arguments that the kernel takes as `int` are compared in 32 bits: what a caller puts above them is ignored there too.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::plan::{INNER_ID, SeccompPlan, UnixSockets};

type Conditions = Vec<Condition>;
type Result<T> = std::result::Result<T, BackendError>;

/// `CLONE_NEW*` as clone(2) takes them. `CLONE_NEWTIME` shares its bit with the exit signal there and cannot be given.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// set-user-ID and set-group-ID.
const SET_ID: u64 = 0o6000;
/// `S_IFMT`.
const TYPE: u64 = 0o170_000;
/// What socket(2) takes beside the type: `SOCK_CLOEXEC | SOCK_NONBLOCK` are the rest.
const SOCKET_TYPE: u64 = 0xf;
/// `__O_TMPFILE`, which with `O_DIRECTORY` makes `O_TMPFILE`.
const TMPFILE: u64 = 0o20_000_000;

/// ioctl(2) commands that programs need on terminals, pipes, sockets and files, from first to last. Everything else is
/// refused, so that neither TIOCSTI (0x5412) nor a driver's private command is a way. Ranges keep the program short: its
/// length is what installing it costs.
const IOCTLS: [(u64, u64); 18] = [
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
const TIOCSCTTY: u64 = 0x540e;

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

/// The rules as a program of their own, to be run after the number was found to have one.
pub(super) fn rules(plan: SeccompPlan) -> Result<BpfProgram> {
    let arch = if cfg!(target_arch = "aarch64") { TargetArch::aarch64 } else { TargetArch::x86_64 };
    let errno = SeccompAction::Errno(libc::EPERM as u32);
    let compiled = table(plan)?
        .into_iter()
        .map(|(number, alternatives)| {
            let rules = alternatives.into_iter().map(SeccompRule::new).collect::<Result<Vec<_>>>()?;
            Ok((number, rules))
        })
        .collect::<Result<BTreeMap<_, _>>>()?;
    SeccompFilter::new(compiled, errno, SeccompAction::Allow, arch)?.try_into()
}

/// The numbers that have a rule.
pub(super) fn numbers() -> Vec<c_long> {
    // The plan changes a rule, never which calls have one.
    table(SeccompPlan { unix_sockets: UnixSockets::Refused })
        .map(|table| table.into_keys().collect())
        .unwrap_or_default()
}

fn table(plan: SeccompPlan) -> Result<BTreeMap<c_long, Vec<Conditions>>> {
    let mut table = BTreeMap::new();
    let mut add = |number: c_long, alternatives: Vec<Conditions>| {
        table.insert(number, alternatives);
    };
    add(libc::SYS_socket, sockets(plan)?);
    // A pair of datagrams could still send to any address, and so carry descriptors out of a shared workspace.
    let pair = |kind: i32| -> Result<Conditions> {
        Ok(vec![
            equal(0, libc::AF_UNIX as u64)?,
            Condition::new(1, Width::Dword, Op::MaskedEq(SOCKET_TYPE), kind as u64)?,
        ])
    };
    add(libc::SYS_socketpair, vec![pair(libc::SOCK_STREAM)?, pair(libc::SOCK_SEQPACKET)?]);
    // F_SETLEASE and F_NOTIFY on a file of a shared workspace make the host wait.
    let command = |operator, value: i32| Condition::new(1, Width::Dword, operator, value as u64);
    add(
        libc::SYS_fcntl,
        vec![
            vec![command(Op::Lt, libc::F_SETLEASE)?],
            vec![command(Op::Eq, libc::F_GETLEASE)?],
            vec![command(Op::Gt, libc::F_NOTIFY)?],
        ],
    );
    add(libc::SYS_clone, vec![vec![Condition::new(0, Width::Qword, Op::MaskedEq(CLONE_NAMESPACES), 0)?]]);
    add(libc::SYS_ioctl, ioctls()?);
    add(
        libc::SYS_prctl,
        PRCTLS.iter().map(|(first, last)| within(0, *first as u64, *last as u64)).collect::<Result<_>>()?,
    );
    add(libc::SYS_personality, vec![vec![equal(0, 0)?], vec![equal(0, 0xffff_ffff)?]]);
    let (own, kept) = (Some(INNER_ID), None);
    for call in [libc::SYS_setuid, libc::SYS_setgid] {
        add(call, own_id(&[&[own]])?);
    }
    for call in [libc::SYS_setreuid, libc::SYS_setregid] {
        add(call, own_id(&[&[kept, own], &[own, own]])?);
    }
    for call in [libc::SYS_setresuid, libc::SYS_setresgid] {
        add(call, own_id(&[&[kept, own, kept], &[own, own, own]])?);
    }
    add(libc::SYS_fchmod, vec![vec![without(1, SET_ID)?]]);
    add(libc::SYS_fchmodat, vec![vec![without(2, SET_ID)?]]);
    add(libc::SYS_fchmodat2, vec![vec![without(2, SET_ID)?]]);
    add(libc::SYS_openat, opens(2, 3)?);
    add(libc::SYS_mknodat, nodes(2)?);
    add(libc::SYS_prlimit64, limits_of_its_own()?);
    #[cfg(target_arch = "x86_64")]
    {
        add(libc::SYS_chmod, vec![vec![without(1, SET_ID)?]]);
        add(libc::SYS_open, opens(1, 2)?);
        add(libc::SYS_creat, vec![vec![without(1, SET_ID)?]]);
        add(libc::SYS_mknod, nodes(1)?);
        let set_fs_gs = [0x1001, 0x1002, 0x1003, 0x1004];
        add(
            libc::SYS_arch_prctl,
            set_fs_gs.iter().map(|code| Ok(vec![equal(0, *code)?])).collect::<Result<_>>()?,
        );
    }
    let core = Condition::new(0, Width::Dword, Op::Ne, u64::from(libc::RLIMIT_CORE))?;
    add(libc::SYS_setrlimit, vec![vec![core]]);
    Ok(table)
}

/// TCP and UDP over IPv4 and IPv6: the only network is the sandbox's own loopback. Protocols that bypass what is
/// filtered by port or family elsewhere (MPTCP, SCTP, ping, raw) are not there.
fn sockets(plan: SeccompPlan) -> Result<Vec<Conditions>> {
    // 2 and 10 differ in one bit, and nothing else is within the mask.
    let family = || Condition::new(0, Width::Dword, Op::MaskedEq(0xffff_fff7), libc::AF_INET as u64);
    let mut list = Vec::new();
    for (kind, protocol) in [(libc::SOCK_STREAM, libc::IPPROTO_TCP), (libc::SOCK_DGRAM, libc::IPPROTO_UDP)] {
        for protocol in [0, protocol] {
            let kind = Condition::new(1, Width::Dword, Op::MaskedEq(SOCKET_TYPE), kind as u64)?;
            list.push(vec![family()?, kind, equal(2, protocol as u64)?]);
        }
    }
    if plan.unix_sockets == UnixSockets::Allowed {
        list.push(vec![equal(0, libc::AF_UNIX as u64)?]);
    }
    Ok(list)
}

fn ioctls() -> Result<Vec<Conditions>> {
    let mut list = vec![vec![equal(1, TIOCSCTTY)?, equal(2, 0)?]];
    for (first, last) in IOCTLS {
        list.push(within(1, first, last)?);
    }
    Ok(list)
}

/// No set-id bit may be created: either nothing is created, or the mode has none.
fn opens(flags: u8, mode: u8) -> Result<Vec<Conditions>> {
    Ok(vec![vec![without(flags, libc::O_CREAT as u64 | TMPFILE)?], vec![without(mode, SET_ID)?]])
}

/// Files, FIFOs and sockets, without set-id bits; never a device.
fn nodes(mode: u8) -> Result<Vec<Conditions>> {
    [0, u64::from(libc::S_IFREG), u64::from(libc::S_IFIFO), u64::from(libc::S_IFSOCK)]
        .into_iter()
        .map(|kind| Ok(vec![Condition::new(mode, Width::Dword, Op::MaskedEq(TYPE | SET_ID), kind)?]))
        .collect()
}

/// Any limit may be read. One's own may be changed, init's may not; that of core dumps, which keeps core handlers away, never.
fn limits_of_its_own() -> Result<Vec<Conditions>> {
    let other = Condition::new(1, Width::Dword, Op::Ne, u64::from(libc::RLIMIT_CORE))?;
    Ok(vec![vec![equal(0, 0)?, other], vec![Condition::new(2, Width::Qword, Op::Eq, 0)?]])
}

/// Changing to the id that one has, as posix_spawn(3) does it for GNU make. There is no other.
fn own_id(arguments: &[&[Option<u32>]]) -> Result<Vec<Conditions>> {
    let word = |(at, id): (u8, &Option<u32>)| equal(at, u64::from(id.unwrap_or(u32::MAX)));
    arguments.iter().map(|ids| (0..).zip(ids.iter()).map(word).collect()).collect()
}

fn equal(argument: u8, value: u64) -> Result<Condition> {
    Condition::new(argument, Width::Dword, Op::Eq, value)
}

fn within(argument: u8, first: u64, last: u64) -> Result<Conditions> {
    if first == last {
        return Ok(vec![equal(argument, first)?]);
    }
    let bound = |operator, value| Condition::new(argument, Width::Dword, operator, value);
    Ok(vec![bound(Op::Ge, first)?, bound(Op::Le, last)?])
}

fn without(argument: u8, bits: u64) -> Result<Condition> {
    Condition::new(argument, Width::Dword, Op::MaskedEq(bits), 0)
}
