//! The child's way from clone3(2) to the system-call filter. Each stage is a type that only the stage before can make, so
//! that leaving one out, or changing their order, does not compile. Everything was decided in the plan and opened by the
//! parent; what is left here is calls.

mod files;

use std::io;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, openat};
use seccompiler::BpfProgram;

use crate::cgroup::Entry;
use crate::plan::{INNER_ID, LandlockAccess, LandlockPlan, Plan, Rlimit};
use crate::sys;

pub(crate) use files::Trees;

/// `SECBIT_*` with their locks (capabilities(7)): uid 0 means nothing, and capabilities are not kept or raised.
const SECUREBITS: libc::c_ulong = 0b1111_1111;

/// What the parent prepared for the child.
pub(crate) struct Prepared<'a> {
    pub plan: &'a Plan,
    pub filter: &'a BpfProgram,
    pub trees: Trees,
    pub entry: Option<Entry>,
    /// A network namespace that is ready; nothing where this one is new already.
    pub network: Option<OwnedFd>,
    /// The host uid and gid of the workload.
    pub uid: u32,
    /// What becomes standard input, output and error; the sandbox's own `/dev/null` where there is nothing.
    pub streams: [Option<OwnedFd>; 3],
    /// What init keeps beside them: its channel, the locks of its slot and of its workspace's placeholders.
    pub kept: Vec<BorrowedFd<'a>>,
}

/// A stage of the set-up that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Stage {
    Cgroup,
    Namespaces,
    Root,
    Base,
    Files,
    Workspace,
    Rlimits,
    Descriptors,
    Identity,
    Landlock,
    Seccomp,
}

impl Stage {
    pub(crate) const ALL: [Stage; 11] = [
        Stage::Cgroup,
        Stage::Namespaces,
        Stage::Root,
        Stage::Base,
        Stage::Files,
        Stage::Workspace,
        Stage::Rlimits,
        Stage::Descriptors,
        Stage::Identity,
        Stage::Landlock,
        Stage::Seccomp,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Stage::Cgroup => "cgroup",
            Stage::Namespaces => "namespaces",
            Stage::Root => "root",
            Stage::Base => "base",
            Stage::Files => "files",
            Stage::Workspace => "workspace",
            Stage::Rlimits => "rlimits",
            Stage::Descriptors => "descriptors",
            Stage::Identity => "identity",
            Stage::Landlock => "landlock",
            Stage::Seccomp => "seccomp",
        }
    }
}

/// What failed: the stage, which of its objects, and why.
#[derive(Debug)]
pub(crate) struct Failure {
    pub stage: Stage,
    pub object: usize,
    pub errno: i32,
}

impl Failure {
    fn at(stage: Stage, object: usize) -> impl FnOnce(io::Error) -> Failure {
        move |error| Failure { stage, object, errno: error.raw_os_error().unwrap_or(libc::EINVAL) }
    }
}

type Result<T> = std::result::Result<T, Failure>;

/// In new namespaces, still with every right of the launcher.
pub(crate) struct Born(());
/// In its control group and with every namespace but the user namespace.
struct Separate(());
/// On its own root; the host's is gone.
struct Rooted(());
/// With its resource limits.
struct Limited(());
/// With its three standard streams; nothing else survives execve(2).
struct Described(());
/// Its own uid, no group, no capability, in a user namespace that owns nothing.
struct Unprivileged(());
/// Cannot gain privileges by execve(2), and is fenced by Landlock.
struct Fenced(());
/// Confined. Only this may start a workload.
pub(crate) struct Confined(());

/// Goes the whole way.
pub(crate) fn confine(prepared: Prepared<'_>) -> Result<Confined> {
    let Prepared { plan, filter, trees, entry, network, uid, streams, kept } = prepared;
    Born(())
        .separate(entry, network)?
        .root(plan, trees, uid)?
        .limit(&plan.rlimits)?
        .describe(streams, kept)?
        .drop_privileges(uid)?
        .fence(&plan.landlock)?
        .filter(filter)
}

impl Born {
    fn separate(self, entry: Option<Entry>, network: Option<OwnedFd>) -> Result<Separate> {
        if let Some(Entry::Write(files)) = entry {
            for (object, file) in files.iter().enumerate() {
                rustix::io::write(file, b"0")
                    .map_err(io::Error::from)
                    .map_err(Failure::at(Stage::Cgroup, object))?;
            }
        }
        // Modes are exactly as the plan says; the workload gets a umask of its own.
        rustix::process::umask(Mode::empty());
        // Paths and options of the host's command line are no business of the workload's.
        sys::forget_arguments();
        let calls: [&dyn Fn() -> io::Result<()>; 4] = [
            // After the move, so that the new root of control groups is the sandbox's own.
            &|| Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP)?),
            &|| Ok(rustix::system::sethostname(crate::plan::HOSTNAME.as_bytes())?),
            &|| match &network {
                Some(ready) => Ok(nix::sched::setns(ready, nix::sched::CloneFlags::CLONE_NEWNET)?),
                None => sys::loopback_up(),
            },
            &|| Ok(rustix::process::setsid().map(drop)?),
        ];
        for (object, call) in calls.iter().enumerate() {
            call().map_err(Failure::at(Stage::Namespaces, object))?;
        }
        Ok(Separate(()))
    }
}

impl Separate {
    fn root(self, plan: &Plan, trees: Trees, uid: u32) -> Result<Rooted> {
        files::enter_root().map_err(Failure::at(Stage::Root, 0))?;
        files::build(&plan.base, Stage::Base, &trees, uid)?;
        files::build(&plan.files, Stage::Files, &trees, uid)?;
        files::workspace(&trees)?;
        rustix::process::chdir(plan.command.directory.as_path())
            .map_err(io::Error::from)
            .map_err(Failure::at(Stage::Root, 1))?;
        Ok(Rooted(()))
    }
}

impl Rooted {
    fn limit(self, limits: &[(Rlimit, u64)]) -> Result<Limited> {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        for (object, (limit, value)) in limits.iter().enumerate() {
            let resource = match limit {
                Rlimit::Core => Resource::RLIMIT_CORE,
                Rlimit::OpenFiles => Resource::RLIMIT_NOFILE,
                Rlimit::FileSize => Resource::RLIMIT_FSIZE,
                Rlimit::LockedMemory => Resource::RLIMIT_MEMLOCK,
                Rlimit::RealTimePriority => Resource::RLIMIT_RTPRIO,
                Rlimit::Nice => Resource::RLIMIT_NICE,
            };
            // A lower hard limit of the caller stays: only CAP_SYS_RESOURCE could raise it.
            getrlimit(resource)
                .and_then(|(_, hard)| setrlimit(resource, hard.min(*value), hard.min(*value)))
                .map_err(io::Error::from)
                .map_err(Failure::at(Stage::Rlimits, object))?;
        }
        Ok(Limited(()))
    }
}

impl Limited {
    /// The descriptor table of init: 0, 1, 2 for the workload; its channel and locks, which close at execve(2). Nothing
    /// else.
    fn describe(self, streams: [Option<OwnedFd>; 3], kept: Vec<BorrowedFd<'_>>) -> Result<Described> {
        let null = openat(rustix::fs::CWD, "/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(io::Error::from)
            .map_err(Failure::at(Stage::Descriptors, 0))?;
        let [input, output, errors] = streams.each_ref().map(|stream| stream.as_ref().unwrap_or(&null));
        rustix::stdio::dup2_stdin(input)
            .and_then(|()| rustix::stdio::dup2_stdout(output))
            .and_then(|()| rustix::stdio::dup2_stderr(errors))
            .map_err(io::Error::from)
            .map_err(Failure::at(Stage::Descriptors, 1))?;
        // Before their numbers are closed under them.
        drop((streams, null));
        let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
        let all: Vec<BorrowedFd<'_>> = standard.into_iter().chain(kept).collect();
        sys::close_all_but(&all).map_err(Failure::at(Stage::Descriptors, 2))?;
        rustix::process::umask(Mode::WGRP | Mode::WOTH);
        Ok(Described(()))
    }
}

impl Described {
    /// The user namespace comes last of all namespaces, so that it owns none of the others: whatever capability somebody
    /// might gain in it is none over the mounts, the network or the processes.
    fn drop_privileges(self, uid: u32) -> Result<Unprivileged> {
        use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
        let (kuid, kgid) = (Uid::from_raw(uid), Gid::from_raw(uid));
        let map = format!("{INNER_ID} {uid} 1");
        let steps: [&dyn Fn() -> io::Result<()>; 10] = [
            &|| Ok(setgroups(&[])?),
            &|| Ok(setresgid(kgid, kgid, kgid)?),
            &|| Ok(setresuid(kuid, kuid, kuid)?),
            &|| Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)?),
            // A process that has changed its uid is not dumpable, and its files in /proc are root's.
            &|| Ok(nix::sys::prctl::set_dumpable(true)?),
            &|| write_map("/proc/self/setgroups", "deny"),
            &|| write_map("/proc/self/gid_map", &map),
            &|| write_map("/proc/self/uid_map", &map),
            &sys::join_new_session_keyring,
            &drop_capabilities,
        ];
        for (object, step) in steps.iter().enumerate() {
            step().map_err(Failure::at(Stage::Identity, object))?;
        }
        nix::sys::prctl::set_dumpable(false)
            .map_err(io::Error::from)
            .map_err(Failure::at(Stage::Identity, steps.len()))?;
        Ok(Unprivileged(()))
    }
}

/// An empty root that nobody can write, in a mount namespace that is new: nothing of the host's files is left.
pub(crate) fn stand_on_nothing() -> io::Result<()> {
    files::enter_root()?;
    files::read_only_here(openat(rustix::fs::CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes this process another user and group's, in no other group, with no capability left and no way to one. The caller is
/// root and has one thread.
///
/// # Errors
/// As the call that failed.
pub fn become_nobody(uid: u32) -> io::Result<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let (kuid, kgid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[])?;
    setresgid(kgid, kgid, kgid)?;
    sys::join_new_session_keyring()?;
    sys::drop_bounding_set()?;
    // With these locked the kernel no longer takes capabilities away with the uid, so they are cleared after it.
    sys::set_securebits(SECUREBITS)?;
    setresuid(kuid, kuid, kuid)?;
    clear_capabilities()
}

fn write_map(path: &str, text: &str) -> io::Result<()> {
    let file = openat(rustix::fs::CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(rustix::io::write(file, text.as_bytes()).map(drop)?)
}

/// All five sets empty, and securebits locked so that they stay so.
fn drop_capabilities() -> io::Result<()> {
    sys::drop_bounding_set()?;
    sys::set_securebits(SECUREBITS)?;
    clear_capabilities()
}

fn clear_capabilities() -> io::Result<()> {
    use caps::CapSet;
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(|_| io::Error::from_raw_os_error(libc::EPERM))?;
    }
    Ok(())
}

impl Unprivileged {
    fn fence(self, plan: &LandlockPlan) -> Result<Fenced> {
        nix::sys::prctl::set_no_new_privs()
            .map_err(io::Error::from)
            .map_err(Failure::at(Stage::Landlock, 0))?;
        landlock_restrict(plan).map_err(Failure::at(Stage::Landlock, 1))?;
        Ok(Fenced(()))
    }
}

pub(crate) fn landlock_restrict(plan: &LandlockPlan) -> io::Result<()> {
    use landlock::{
        ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
        RulesetCreatedAttr, RulesetStatus, Scope,
    };
    let abi = ABI::from(i32::from(plan.abi));
    let refused = |error: landlock::RulesetError| {
        let errno = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<io::Error>());
        io::Error::from_raw_os_error(errno.and_then(io::Error::raw_os_error).unwrap_or(libc::EINVAL))
    };
    // The plan names the ABI that this kernel has: all of it, or nothing starts.
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))
        .map_err(refused)?;
    if !Scope::from_all(abi).is_empty() {
        ruleset = ruleset.scope(Scope::from_all(abi)).map_err(refused)?;
    }
    let mut ruleset = ruleset.create().map_err(refused)?;
    for (path, access) in &plan.rules {
        let all = AccessFs::from_all(abi);
        let allowed: BitFlags<AccessFs> = match access {
            LandlockAccess::List => AccessFs::ReadDir.into(),
            LandlockAccess::Read => AccessFs::from_read(abi),
            LandlockAccess::Update => {
                (AccessFs::from_read(abi) | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev)
                    & all
            }
            LandlockAccess::Write => all,
        };
        let place = openat(rustix::fs::CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let is_directory = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&place)?.st_mode).is_dir();
        let allowed = if is_directory { allowed } else { allowed & AccessFs::from_file(abi) };
        ruleset = ruleset.add_rule(PathBeneath::new(place.as_fd(), allowed)).map_err(refused)?;
    }
    let status = ruleset.no_new_privs(false).restrict_self().map_err(refused)?;
    if status.ruleset == RulesetStatus::FullyEnforced {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}

impl Fenced {
    /// Last, because Landlock's own calls and everything before would not pass it.
    fn filter(self, program: &BpfProgram) -> Result<Confined> {
        let error = |error: seccompiler::Error| match error {
            seccompiler::Error::Seccomp(error) | seccompiler::Error::Prctl(error) => error,
            _ => io::Error::from_raw_os_error(libc::EINVAL),
        };
        seccompiler::apply_filter(program).map_err(error).map_err(Failure::at(Stage::Seccomp, 0))?;
        Ok(Confined(()))
    }
}
