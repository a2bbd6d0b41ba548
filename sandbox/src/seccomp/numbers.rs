//! What becomes of each system call by its number. What is not in `ALLOWED` is refused.

use libc::c_long;

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Goes on.
    Allow,
    /// `EPERM`: we know it, and refuse it.
    Refuse,
    /// `ENOSYS`: we do not know it; a C library then takes another way.
    Unknown,
    /// Its arguments decide, by this rule.
    Arguments(usize),
}

/// The newest number that is known here, mseal(2) of Linux 6.10.
pub(super) const LAST: u32 = 462;

/// Numbers without a call. From 424 on all architectures count alike; before it each has its own.
#[cfg(target_arch = "x86_64")]
const UNUSED: std::ops::Range<u32> = 335..424;
#[cfg(target_arch = "aarch64")]
const UNUSED: std::ops::Range<u32> = 295..424;

/// Calls whose argument is a pointer to what decides. C libraries go back to clone(2) and openat(2).
const HIDDEN: [c_long; 2] = [libc::SYS_clone3, libc::SYS_openat2];

/// The verdict on `number`; `allowed` is sorted.
fn verdict(number: u32, rule: impl Fn(c_long) -> Option<usize>, allowed: &[c_long]) -> Verdict {
    let call = c_long::from(number);
    if number > LAST || UNUSED.contains(&number) || HIDDEN.contains(&call) {
        Verdict::Unknown
    } else if let Some(rule) = rule(call) {
        Verdict::Arguments(rule)
    } else if allowed.binary_search(&call).is_ok() || UNNAMED.contains(&number) {
        Verdict::Allow
    } else {
        Verdict::Refuse
    }
}

/// Which number begins which verdict; the last goes on for ever. `rule` tells which calls have one.
pub(super) fn ranges(rule: impl Fn(c_long) -> Option<usize>) -> Vec<(u32, Verdict)> {
    let mut allowed: Vec<c_long> = ALLOWED.iter().chain(LEGACY).copied().collect();
    allowed.sort_unstable();
    let mut list: Vec<(u32, Verdict)> = Vec::new();
    for number in 0..=LAST + 1 {
        let verdict = verdict(number, &rule, &allowed);
        if list.last().is_none_or(|(_, last)| *last != verdict) {
            list.push((number, verdict));
        }
    }
    list
}

/// futex_wake, futex_wait and futex_requeue of Linux 6.7, which libc has no names for yet.
const UNNAMED: std::ops::RangeInclusive<u32> = 454..=456;

macro_rules! calls {
    ($($name:ident)*) => { &[$(libc::$name),*] };
}

/// Every architecture has these.
#[rustfmt::skip]
const ALLOWED: &[c_long] = calls![
    // Files.
    SYS_read SYS_write SYS_pread64 SYS_pwrite64 SYS_readv SYS_writev SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2
    SYS_close SYS_close_range SYS_lseek SYS_fstat SYS_newfstatat SYS_statx SYS_statfs SYS_fstatfs SYS_readlinkat
    SYS_faccessat SYS_faccessat2 SYS_getdents64 SYS_getcwd SYS_chdir SYS_fchdir SYS_mkdirat SYS_unlinkat SYS_symlinkat
    SYS_linkat SYS_renameat2 SYS_truncate SYS_ftruncate SYS_fallocate SYS_fadvise64 SYS_readahead SYS_utimensat
    SYS_fchown SYS_fchownat SYS_umask SYS_flock SYS_fsync SYS_fdatasync SYS_sync SYS_syncfs SYS_sync_file_range
    SYS_dup SYS_dup3 SYS_pipe2 SYS_splice SYS_tee SYS_vmsplice SYS_sendfile SYS_copy_file_range
    SYS_setxattr SYS_lsetxattr SYS_fsetxattr SYS_getxattr SYS_lgetxattr SYS_fgetxattr SYS_listxattr SYS_llistxattr
    SYS_flistxattr SYS_removexattr SYS_lremovexattr SYS_fremovexattr
    SYS_inotify_init1 SYS_inotify_add_watch SYS_inotify_rm_watch SYS_memfd_create
    // Waiting.
    SYS_ppoll SYS_pselect6 SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_pwait2 SYS_eventfd2 SYS_signalfd4
    SYS_timerfd_create SYS_timerfd_settime SYS_timerfd_gettime
    // Memory.
    SYS_brk SYS_mmap SYS_munmap SYS_mremap SYS_mprotect SYS_madvise SYS_msync SYS_mincore SYS_mlock SYS_mlock2
    SYS_munlock SYS_mlockall SYS_munlockall SYS_membarrier SYS_mseal SYS_get_mempolicy
    SYS_pkey_mprotect SYS_pkey_alloc SYS_pkey_free
    // Processes and threads of the sandbox's own.
    SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_wait4 SYS_waitid SYS_getpid SYS_getppid SYS_gettid
    SYS_set_tid_address SYS_set_robust_list SYS_get_robust_list SYS_rseq SYS_futex SYS_futex_waitv
    SYS_setpgid SYS_getpgid SYS_getsid SYS_setsid SYS_pidfd_open
    SYS_pidfd_send_signal SYS_getrlimit SYS_getrusage SYS_times
    SYS_sched_yield SYS_sched_getaffinity SYS_sched_getparam
    SYS_sched_getscheduler SYS_sched_get_priority_max SYS_sched_get_priority_min
    SYS_sched_rr_get_interval SYS_sched_getattr SYS_getpriority SYS_ioprio_get
    SYS_getcpu
    // Signals.
    SYS_kill SYS_tkill SYS_tgkill SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigpending SYS_rt_sigqueueinfo
    SYS_rt_tgsigqueueinfo SYS_rt_sigreturn SYS_rt_sigsuspend SYS_rt_sigtimedwait SYS_sigaltstack SYS_restart_syscall
    // Time.
    SYS_clock_gettime SYS_clock_getres SYS_clock_nanosleep SYS_nanosleep SYS_gettimeofday SYS_getitimer SYS_setitimer
    SYS_timer_create SYS_timer_settime SYS_timer_gettime SYS_timer_getoverrun SYS_timer_delete
    // Who and where one is.
    SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_getgroups SYS_capget SYS_capset
    SYS_uname SYS_sysinfo SYS_getrandom
    // The sandbox's own loopback.
    SYS_bind SYS_listen SYS_accept SYS_accept4 SYS_connect SYS_getsockname SYS_getpeername SYS_sendto SYS_recvfrom
    SYS_sendmsg SYS_recvmsg SYS_sendmmsg SYS_recvmmsg SYS_shutdown SYS_getsockopt SYS_setsockopt
    // System V and POSIX objects of the sandbox's own ipc namespace.
    SYS_shmget SYS_shmat SYS_shmdt SYS_shmctl SYS_semget SYS_semop SYS_semtimedop SYS_semctl
    SYS_msgget SYS_msgsnd SYS_msgrcv SYS_msgctl
    SYS_mq_open SYS_mq_unlink SYS_mq_timedsend SYS_mq_timedreceive SYS_mq_notify SYS_mq_getsetattr
    // A program may confine itself further.
    SYS_landlock_create_ruleset SYS_landlock_add_rule SYS_landlock_restrict_self
];

/// Older forms that only some architectures have.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const LEGACY: &[c_long] = calls![
    SYS_stat SYS_lstat SYS_access SYS_readlink SYS_getdents SYS_mkdir SYS_rmdir SYS_unlink SYS_symlink SYS_link
    SYS_rename SYS_renameat SYS_chown SYS_lchown SYS_utime SYS_utimes SYS_futimesat SYS_dup2 SYS_pipe
    SYS_inotify_init SYS_poll SYS_select SYS_epoll_create SYS_epoll_wait SYS_epoll_ctl_old SYS_epoll_wait_old
    SYS_eventfd SYS_signalfd SYS_fork SYS_vfork SYS_getpgrp SYS_alarm SYS_pause SYS_time
];
#[cfg(target_arch = "aarch64")]
const LEGACY: &[c_long] = calls![SYS_renameat];
