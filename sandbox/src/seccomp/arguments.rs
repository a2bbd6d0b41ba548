//! Calls whose arguments decide. A call of this table is allowed when one of its rules matches, else `EPERM`.
//! Arguments that the kernel takes as `int` are compared in 32 bits: what a caller puts above them is ignored there too.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Op,
    SeccompCondition as Condition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::plan::{SeccompPlan, UnixSockets};

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

/// ioctl(2) commands that programs need on terminals, pipes, sockets and files. Everything else is refused, so that
/// neither TIOCSTI nor a driver's private command is a way.
const IOCTLS: [u64; 46] = [
    0x5401,
    0x5402,
    0x5403,
    0x5404,
    0x5405,
    0x5406,
    0x5407,
    0x5408, // TCGETS .. TCSETAF
    0x5409,
    0x540a,
    0x540b, // TCSBRK TCXONC TCFLSH
    0x540f,
    0x5410,
    0x5411, // TIOCGPGRP TIOCSPGRP TIOCOUTQ
    0x5413,
    0x5414, // TIOCGWINSZ TIOCSWINSZ
    0x5415,
    0x5416,
    0x5417,
    0x5418, // modem lines, answered by a pty with an error
    0x541b,
    0x5420,
    0x5421,
    0x5422,
    0x5424,
    0x5425, // FIONREAD TIOCPKT FIONBIO TIOCNOTTY TIOCGETD TCSBRKP
    0x5429,
    0x542a,
    0x542b,
    0x542c,
    0x542d, // TIOCGSID TCGETS2 TCSETS2 TCSETSW2 TCSETSF2
    0x5430,
    0x5431,
    0x5441, // TIOCGPTN(old) TIOCSPTLCK(old) TIOCGPTPEER
    0x5450,
    0x5451,
    0x5452,
    0x5460, // FIONCLEX FIOCLEX FIOASYNC FIOQSIZE
    0x8004_5430,
    0x4004_5431, // TIOCGPTN TIOCSPTLCK
    0x8905,
    0x8906, // SIOCATMARK SIOCGSTAMP
    0x8912,
    0x8913,
    0x8915,
    0x8933, // SIOCGIFCONF SIOCGIFFLAGS SIOCGIFADDR SIOCGIFINDEX
];
/// `FICLONE`, `FICLONERANGE`, `FS_IOC_GETFLAGS` and `FS_IOC_FIEMAP`.
const FILE_IOCTLS: [u64; 4] = [0x4004_9409, 0x4020_940d, 0x8008_6601, 0xc020_660b];
/// Becoming the session's terminal, never by force.
const TIOCSCTTY: u64 = 0x540e;

/// prctl(2) options.
const PRCTLS: [i32; 23] = [
    libc::PR_SET_PDEATHSIG,
    libc::PR_GET_PDEATHSIG,
    libc::PR_GET_DUMPABLE,
    libc::PR_SET_DUMPABLE,
    libc::PR_GET_KEEPCAPS,
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_GET_SECCOMP,
    libc::PR_CAPBSET_READ,
    libc::PR_GET_TSC,
    libc::PR_GET_SECUREBITS,
    libc::PR_SET_TIMERSLACK,
    libc::PR_GET_TIMERSLACK,
    libc::PR_SET_CHILD_SUBREAPER,
    libc::PR_GET_CHILD_SUBREAPER,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_GET_NO_NEW_PRIVS,
    libc::PR_GET_TID_ADDRESS,
    libc::PR_SET_THP_DISABLE,
    libc::PR_GET_THP_DISABLE,
    libc::PR_MCE_KILL_GET,
    libc::PR_GET_SPECULATION_CTRL,
    libc::PR_SET_VMA,
];

/// The rules as a program of their own, to be run after the number was found to have one.
pub(super) fn rules(plan: SeccompPlan) -> Result<BpfProgram> {
    let arch = if cfg!(target_arch = "aarch64") {
        TargetArch::aarch64
    } else {
        TargetArch::x86_64
    };
    let errno = SeccompAction::Errno(libc::EPERM as u32);
    let compiled = table(plan)?
        .into_iter()
        .map(|(number, alternatives)| {
            let rules = alternatives
                .into_iter()
                .map(SeccompRule::new)
                .collect::<Result<Vec<_>>>()?;
            Ok((number, rules))
        })
        .collect::<Result<BTreeMap<_, _>>>()?;
    SeccompFilter::new(compiled, errno, SeccompAction::Allow, arch)?.try_into()
}

/// The numbers that have a rule.
pub(super) fn numbers() -> Vec<c_long> {
    // The plan changes a rule, never which calls have one.
    table(SeccompPlan {
        unix_sockets: UnixSockets::Refused,
    })
    .map(|table| table.into_keys().collect())
    .unwrap_or_default()
}

fn table(plan: SeccompPlan) -> Result<BTreeMap<c_long, Vec<Conditions>>> {
    let mut table = BTreeMap::new();
    let mut add = |number: c_long, alternatives: Vec<Conditions>| {
        table.insert(number, alternatives);
    };
    add(libc::SYS_socket, sockets(plan)?);
    add(libc::SYS_socketpair, vec![vec![equal(0, libc::AF_UNIX as u64)?]]);
    add(
        libc::SYS_clone,
        vec![vec![Condition::new(
            0,
            Width::Qword,
            Op::MaskedEq(CLONE_NAMESPACES),
            0,
        )?]],
    );
    add(libc::SYS_ioctl, ioctls()?);
    add(
        libc::SYS_prctl,
        PRCTLS
            .iter()
            .map(|option| Ok(vec![equal(0, *option as u64)?]))
            .collect::<Result<_>>()?,
    );
    add(
        libc::SYS_personality,
        vec![vec![equal(0, 0)?], vec![equal(0, 0xffff_ffff)?]],
    );
    add(libc::SYS_fchmod, vec![vec![without(1, SET_ID)?]]);
    add(libc::SYS_fchmodat, vec![vec![without(2, SET_ID)?]]);
    add(libc::SYS_fchmodat2, vec![vec![without(2, SET_ID)?]]);
    add(libc::SYS_openat, opens(2, 3)?);
    add(libc::SYS_mknodat, nodes(2)?);
    add(libc::SYS_prlimit64, core_limit_kept()?);
    #[cfg(target_arch = "x86_64")]
    {
        add(libc::SYS_chmod, vec![vec![without(1, SET_ID)?]]);
        add(libc::SYS_open, opens(1, 2)?);
        add(libc::SYS_creat, vec![vec![without(1, SET_ID)?]]);
        add(libc::SYS_mknod, nodes(1)?);
        let set_fs_gs = [0x1001, 0x1002, 0x1003, 0x1004];
        add(
            libc::SYS_arch_prctl,
            set_fs_gs
                .iter()
                .map(|code| Ok(vec![equal(0, *code)?]))
                .collect::<Result<_>>()?,
        );
    }
    let core = Condition::new(0, Width::Dword, Op::Ne, u64::from(libc::RLIMIT_CORE))?;
    add(libc::SYS_setrlimit, vec![vec![core]]);
    Ok(table)
}

/// TCP and UDP over IPv4 and IPv6: the only network is the sandbox's own loopback. Protocols that bypass what is
/// filtered by port or family elsewhere (MPTCP, SCTP, ping, raw) are not there.
fn sockets(plan: SeccompPlan) -> Result<Vec<Conditions>> {
    let mut list = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        for (kind, protocols) in [
            (libc::SOCK_STREAM, [0, libc::IPPROTO_TCP]),
            (libc::SOCK_DGRAM, [0, libc::IPPROTO_UDP]),
        ] {
            for protocol in protocols {
                list.push(vec![
                    equal(0, family as u64)?,
                    Condition::new(1, Width::Dword, Op::MaskedEq(SOCKET_TYPE), kind as u64)?,
                    equal(2, protocol as u64)?,
                ]);
            }
        }
    }
    if plan.unix_sockets == UnixSockets::Allowed {
        list.push(vec![equal(0, libc::AF_UNIX as u64)?]);
    }
    Ok(list)
}

fn ioctls() -> Result<Vec<Conditions>> {
    let mut list = vec![vec![equal(1, TIOCSCTTY)?, equal(2, 0)?]];
    for command in IOCTLS.iter().chain(&FILE_IOCTLS) {
        list.push(vec![equal(1, *command)?]);
    }
    Ok(list)
}

/// No set-id bit may be created: either nothing is created, or the mode has none.
fn opens(flags: u8, mode: u8) -> Result<Vec<Conditions>> {
    Ok(vec![
        vec![without(flags, libc::O_CREAT as u64 | TMPFILE)?],
        vec![without(mode, SET_ID)?],
    ])
}

/// Files, FIFOs and sockets, without set-id bits; never a device.
fn nodes(mode: u8) -> Result<Vec<Conditions>> {
    [
        0,
        u64::from(libc::S_IFREG),
        u64::from(libc::S_IFIFO),
        u64::from(libc::S_IFSOCK),
    ]
    .into_iter()
    .map(|kind| {
        Ok(vec![Condition::new(
            mode,
            Width::Dword,
            Op::MaskedEq(TYPE | SET_ID),
            kind,
        )?])
    })
    .collect()
}

/// Any limit may be read; that of core dumps, which keeps core handlers away, may not be changed.
fn core_limit_kept() -> Result<Vec<Conditions>> {
    let other = Condition::new(1, Width::Dword, Op::Ne, u64::from(libc::RLIMIT_CORE))?;
    Ok(vec![
        vec![other],
        vec![Condition::new(2, Width::Qword, Op::Eq, 0)?],
    ])
}

fn equal(argument: u8, value: u64) -> Result<Condition> {
    Condition::new(argument, Width::Dword, Op::Eq, value)
}

fn without(argument: u8, bits: u64) -> Result<Condition> {
    Condition::new(argument, Width::Dword, Op::MaskedEq(bits), 0)
}
