//! What this host offers, as a value: probed once, then only read. Planning never asks the kernel.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat, statfs};
use serde::Serialize;

use crate::policy::{HostPath, Policy};
use crate::sys;

/// Where the limits' controllers are mounted by convention (file-hierarchy of systemd and of container engines).
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// `CGROUP2_SUPER_MAGIC` and `CGROUP_SUPER_MAGIC` of statfs(2).
const CGROUP2_MAGIC: u64 = 0x6367_7270;
const CGROUP1_MAGIC: u64 = 0x0027_e0eb;

/// One host, as far as plans depend on it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Host {
    /// The Landlock ABI of landlock_create_ruleset(2); 0 where there is none.
    pub landlock_abi: u8,
    /// Which control groups can hold limits.
    pub cgroups: Cgroups,
    /// Who asks.
    pub caller: Caller,
    /// The disks, if the policy limits their traffic.
    pub disks: Vec<Device>,
    /// What stands at the places that the policy names, `~/` replaced.
    pub paths: BTreeMap<PathBuf, PathKind>,
}

/// Which control groups there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "version")]
pub enum Cgroups {
    /// One hierarchy (cgroups(7)), with these controllers.
    V2 {
        /// From `cgroup.controllers` of the root.
        controllers: Vec<Controller>,
    },
    /// A hierarchy a controller.
    V1 {
        /// Those that are mounted.
        controllers: Vec<Controller>,
    },
    /// None that can hold a limit.
    None,
}

/// A controller that holds one of our limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Controller {
    /// Memory.
    Memory,
    /// Processes and threads.
    Pids,
    /// Processor time.
    Cpu,
    /// Traffic of disks.
    Io,
}

/// A device's number: major, minor.
pub type Device = (u32, u32);

impl Controller {
    /// All of them.
    pub const ALL: [Controller; 4] = [Controller::Memory, Controller::Pids, Controller::Cpu, Controller::Io];

    /// As cgroups(7) v2 calls it.
    pub fn name(self) -> &'static str {
        match self {
            Controller::Memory => "memory",
            Controller::Pids => "pids",
            Controller::Cpu => "cpu",
            Controller::Io => "io",
        }
    }
}

/// Who asks for a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Caller {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// `$HOME`, if it is an absolute path.
    pub home: Option<PathBuf>,
    /// The absolute directories of `$PATH`.
    pub path: Vec<PathBuf>,
}

/// What stands at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathKind {
    /// Nothing, or nothing that the caller may see.
    Absent,
    /// A directory.
    Directory,
    /// Anything that is neither a directory nor a symbolic link.
    File,
    /// A symbolic link.
    Symlink {
        /// As it is written.
        target: PathBuf,
        /// Where it ends, and whether that is a directory.
        resolved: Option<(PathBuf, bool)>,
    },
}

impl Host {
    /// Looks at this host, for what `policy` names.
    pub fn probe(policy: &Policy, caller: Caller) -> Host {
        let read = policy.file().files.read.iter();
        let homes = policy.file().env.set.values().filter_map(|value| value.parse::<HostPath>().ok());
        let wanted = read.cloned().chain(homes.filter(|path| path.as_str().starts_with("~/")));
        let paths =
            wanted.filter_map(|path| caller.expand(&path)).map(|path| (path.clone(), look(&path))).collect();
        let disks = policy.file().limits.io.map(|_| disks()).unwrap_or_default();
        Host { landlock_abi: sys::landlock_abi(), cgroups: cgroups(), caller, disks, paths }
    }

    /// What stands at `path`; [`PathKind::Absent`] for what the policy did not name.
    pub fn kind(&self, path: &Path) -> &PathKind {
        self.paths.get(path).unwrap_or(&PathKind::Absent)
    }
}

impl Caller {
    /// This process's user, with the home and search path of `environment`.
    pub fn current(home: Option<OsString>, path: Option<OsString>) -> Caller {
        let absolute = |path: &PathBuf| path.is_absolute();
        Caller {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            home: home.map(PathBuf::from).filter(absolute),
            path: path
                .map(|path| std::env::split_paths(&path).filter(absolute).collect())
                .unwrap_or_default(),
        }
    }

    /// `path` with `~/` replaced; nothing where there is no home.
    pub fn expand(&self, path: &HostPath) -> Option<PathBuf> {
        match path.as_str().strip_prefix("~/") {
            Some(below) => self.home.as_ref().map(|home| home.join(below)),
            None => Some(PathBuf::from(path.as_str())),
        }
    }
}

fn look(path: &Path) -> PathKind {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => PathKind::Directory,
        Ok(found) if found.is_symlink() => {
            let target = std::fs::read_link(path).unwrap_or_default();
            let resolved = std::fs::canonicalize(path).ok().map(|end| {
                let is_directory = end.is_dir();
                (end, is_directory)
            });
            PathKind::Symlink { target, resolved }
        }
        Ok(_) => PathKind::File,
        Err(_) => PathKind::Absent,
    }
}

fn cgroups() -> Cgroups {
    if filesystem(Path::new(CGROUP_ROOT)) == Some(CGROUP2_MAGIC) {
        let listed =
            std::fs::read_to_string(Path::new(CGROUP_ROOT).join("cgroup.controllers")).unwrap_or_default();
        let has = |controller: &Controller| listed.split_whitespace().any(|name| name == controller.name());
        return Cgroups::V2 { controllers: Controller::ALL.into_iter().filter(has).collect() };
    }
    let mounted = |controller: &Controller| filesystem(&cgroup1_root(*controller)) == Some(CGROUP1_MAGIC);
    let controllers: Vec<_> = Controller::ALL.into_iter().filter(mounted).collect();
    if controllers.is_empty() { Cgroups::None } else { Cgroups::V1 { controllers } }
}

/// Whole disks that hold something (`Documentation/ABI/stable/sysfs-block`): limits are set by disk.
fn disks() -> Vec<Device> {
    let disk = |directory: PathBuf| {
        let read = |name: &str| std::fs::read_to_string(directory.join(name)).ok();
        let sectors: u64 = read("size")?.trim().parse().ok()?;
        let number = read("dev")?;
        let (major, minor) = number.trim().split_once(':')?;
        (sectors > 0).then_some((major.parse().ok()?, minor.parse().ok()?))
    };
    let listed = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let mut disks: Vec<Device> = listed.filter_map(|entry| disk(entry.path())).collect();
    disks.sort_unstable();
    disks
}

/// The root of a v1 controller's hierarchy.
pub(crate) fn cgroup1_root(controller: Controller) -> PathBuf {
    Path::new(CGROUP_ROOT).join(if controller == Controller::Io { "blkio" } else { controller.name() })
}

/// The root of the v2 hierarchy.
pub(crate) fn cgroup2_root() -> &'static Path {
    Path::new(CGROUP_ROOT)
}

fn filesystem(path: &Path) -> Option<u64> {
    // A type of `statfs` differs between architectures; the magic numbers fit all of them.
    statfs(path).ok().and_then(|found| u64::try_from(found.f_type).ok())
}

/// A directory opened only to be named in further calls.
pub(crate) fn open_directory(path: &Path) -> rustix::io::Result<rustix::fd::OwnedFd> {
    openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}
