//! What stands under the new root, as a list of steps in order.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{INNER_ID, LandlockAccess};
use crate::host::{Host, PathKind};
use crate::job::Network;
use crate::plan::PlanError;
use crate::policy::{ByteSize, Policy};

/// Where a workspace is mounted.
pub const WORKSPACE: &str = "/workspace";
/// The workload's home.
pub const HOME: &str = "/home/agent";
/// The certificate of the only authority that is trusted inside.
pub(super) const AUTHORITY: &str = "/etc/broker/authority.pem";
/// Where distributions keep all authorities in one file.
const BUNDLES: [&str; 2] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"];
/// An empty directory that covers directories.
pub const EMPTY: &str = "/mnt";

/// Files of `/proc` that tell of the host and that any user may read. What only root may read needs no cover: nobody
/// inside is root to the kernel. Where a kernel lacks one, there is nothing to cover.
const PROC_FILES: [&str; 10] = [
    "cmdline",
    "config.gz",
    "interrupts",
    "kallsyms",
    "key-users",
    "keys",
    "latency_stats",
    "modules",
    "sched_debug",
    "timer_list",
];
/// Directories of `/proc` that are about hardware and the whole host, and hold files that can be written.
const PROC_DIRECTORIES: [&str; 8] = ["acpi", "asound", "bus", "driver", "fs", "irq", "pressure", "scsi"];

/// Inodes of a private place where the policy names no number.
const INODES: u32 = 16_384;

/// Who owns a private place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// The host's root, which nobody inside is.
    Root,
    /// The workload.
    Workload,
}

/// Whether programs in a private place can be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exec {
    /// As anywhere.
    Yes,
    /// `MS_NOEXEC`.
    No,
}

/// One step. Paths are those inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
pub enum Step {
    /// mkdir(2), mode 0755, owned by root.
    Directory {
        /// Inside.
        path: PathBuf,
    },
    /// symlink(2).
    Symlink {
        /// Inside.
        path: PathBuf,
        /// What it says.
        target: PathBuf,
    },
    /// A small file of ours, mode 0444.
    File {
        /// Inside.
        path: PathBuf,
        /// Content.
        content: String,
    },
    /// A host tree or file, read-only.
    Tree {
        /// On the host.
        source: PathBuf,
        /// Inside.
        path: PathBuf,
        /// Whether it is a directory.
        directory: bool,
    },
    /// A private tmpfs(5).
    Private {
        /// Inside.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Files and directories.
        inodes: u32,
        /// Permission bits.
        mode: u32,
        /// Who owns its root.
        owner: Owner,
        /// Whether programs in it can be run.
        exec: Exec,
    },
    /// The harmless devices.
    Devices {
        /// Inside.
        path: PathBuf,
    },
    /// A devpts of its own.
    Terminals {
        /// Inside.
        path: PathBuf,
    },
    /// proc(5) of the new process namespace.
    Proc {
        /// Inside.
        path: PathBuf,
    },
    /// An empty file or directory in front of what stands there, if anything does.
    Cover {
        /// Inside.
        path: PathBuf,
        /// Whether it is a directory.
        directory: bool,
    },
    /// A file of ours in front of another, if that is there.
    Replace {
        /// Inside.
        path: PathBuf,
        /// Inside, too.
        with: PathBuf,
    },
    /// The root itself becomes read-only.
    Seal {
        /// `/`
        path: PathBuf,
    },
    /// Read-only from here on down.
    ReadOnly {
        /// Inside.
        path: PathBuf,
    },
}

impl Step {
    /// Where it acts.
    pub fn path(&self) -> &Path {
        match self {
            Step::Directory { path }
            | Step::Symlink { path, .. }
            | Step::File { path, .. }
            | Step::Tree { path, .. }
            | Step::Private { path, .. }
            | Step::Devices { path }
            | Step::Terminals { path }
            | Step::Proc { path }
            | Step::Cover { path, .. }
            | Step::Replace { path, .. }
            | Step::Seal { path }
            | Step::ReadOnly { path } => path,
        }
    }

    /// What Landlock allows beneath it, where that is more than listing.
    pub(super) fn landlock_rule(&self) -> Option<(PathBuf, LandlockAccess)> {
        let access = match self {
            Step::Tree { .. } => LandlockAccess::Read,
            Step::File { path, .. } if path.starts_with("/etc") => return None,
            Step::Directory { path } if path == Path::new("/etc") => LandlockAccess::Read,
            Step::Private { .. } => LandlockAccess::Write,
            Step::Devices { .. } | Step::Proc { .. } => LandlockAccess::Update,
            _ => return None,
        };
        Some((self.path().to_owned(), access))
    }
}

/// What every root begins with.
pub(crate) fn base(network: Option<&Network>) -> Vec<Step> {
    let mut root = Root::default();
    etc(&mut root, network);
    for path in ["/dev", EMPTY, "/proc", "/run", "/tmp", "/var", WORKSPACE, HOME] {
        root.directory(Path::new(path));
    }
    root.symlink("/var/tmp", "../tmp");
    root.symlink("/var/run", "../run");
    root.steps.push(Step::Devices { path: "/dev".into() });
    root.steps
}

/// What comes after the base, in order.
pub(super) fn steps(
    policy: &Policy,
    host: &Host,
    base: &[Step],
    network: Option<&Network>,
) -> Result<Vec<Step>, PlanError> {
    let made = base.iter().map(|step| step.path().to_owned()).collect();
    let mut root = Root { made, ..Root::default() };
    // Before the trees, so that one of those may lie below a private place.
    private_places(&mut root, policy);
    root.show(&shown(policy, host, base)?, host);
    root.steps.push(Step::Terminals { path: "/dev/pts".into() });
    // From here on the root is read-only, so that what covers is read-only too.
    root.steps.push(Step::Seal { path: "/".into() });
    if network.is_some_and(|network| network.authority.is_some()) {
        let replaced = BUNDLES.map(|path| Step::Replace { path: path.into(), with: AUTHORITY.into() });
        root.steps.extend(replaced);
    }
    proc(&mut root);
    Ok(root.steps)
}

/// What the policy names, `~/` replaced. Places that are the sandbox's own cannot be the host's.
fn shown(policy: &Policy, host: &Host, base: &[Step]) -> Result<Vec<PathBuf>, PlanError> {
    let whole = ["/dev", "/proc", WORKSPACE, EMPTY];
    let read = policy.file().files.read.iter().filter_map(|path| host.caller.expand(path));
    let check = |path: PathBuf| {
        let reserved =
            whole.iter().any(|place| path.starts_with(place)) || base.iter().any(|step| step.path() == path);
        if reserved { Err(PlanError::Reserved { path }) } else { Ok(path) }
    };
    read.map(check).collect()
}

/// The steps so far and the directories that they made.
#[derive(Default)]
struct Root {
    steps: Vec<Step>,
    made: BTreeSet<PathBuf>,
    trees: Vec<PathBuf>,
}

impl Root {
    fn directory(&mut self, path: &Path) {
        if path == Path::new("/") || self.covered(path) || self.made.contains(path) {
            return;
        }
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.made.insert(path.to_owned());
        self.steps.push(Step::Directory { path: path.to_owned() });
    }

    fn symlink(&mut self, path: &str, target: &str) {
        self.link(Path::new(path), Path::new(target));
    }

    fn link(&mut self, path: &Path, target: &Path) {
        if self.covered(path) || !self.made.insert(path.to_owned()) {
            return;
        }
        self.steps.push(Step::Symlink { path: path.to_owned(), target: target.to_owned() });
    }

    fn file(&mut self, path: &str, content: &str) {
        self.made.insert(path.into());
        self.steps.push(Step::File { path: path.into(), content: content.to_owned() });
    }

    /// Whether `path` already shows as a part of a tree.
    fn covered(&self, path: &Path) -> bool {
        self.trees.iter().any(|tree| path.starts_with(tree))
    }

    /// Trees of the host at their own places; for a symbolic link, the link and what it leads to. Parents come before what
    /// is below them, in whatever order they were named.
    fn show(&mut self, paths: &[PathBuf], host: &Host) {
        let real = |path: &PathBuf| match host.kind(path) {
            PathKind::Absent | PathKind::Symlink { resolved: None, .. } => None,
            PathKind::Directory => Some((path.clone(), true)),
            PathKind::File => Some((path.clone(), false)),
            PathKind::Symlink { resolved: Some(end), .. } => Some(end.clone()),
        };
        let mut trees: Vec<(PathBuf, bool)> = paths.iter().filter_map(real).collect();
        trees.sort();
        for (path, directory) in trees {
            self.tree(&path, directory);
        }
        for path in paths {
            if let PathKind::Symlink { target, resolved: Some(_) } = host.kind(path) {
                if let Some(parent) = path.parent() {
                    self.directory(parent);
                }
                self.link(path, target);
            }
        }
    }

    fn private(
        &mut self,
        path: &str,
        policy: &Policy,
        size: Option<ByteSize>,
        mode: u32,
        owner: Owner,
        exec: Exec,
    ) {
        let inodes = policy.file().files.inodes.map_or(INODES, std::num::NonZeroU32::get);
        let size = size.unwrap_or(ByteSize::mebibytes(16)).bytes();
        self.steps.push(Step::Private { path: path.into(), size, inodes, mode, owner, exec });
    }

    fn tree(&mut self, path: &Path, directory: bool) {
        if path == Path::new("/") || self.covered(path) || self.made.contains(path) {
            return;
        }
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.trees.push(path.to_owned());
        self.steps.push(Step::Tree { source: path.to_owned(), path: path.to_owned(), directory });
    }
}

/// `/etc` of our own: names of the two users that exist, and where names are looked up.
fn etc(root: &mut Root, network: Option<&Network>) {
    root.directory(Path::new("/etc"));
    let id = INNER_ID;
    let nobody = "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin";
    root.file(
        "/etc/passwd",
        &format!(
            "root:x:0:0:root:/root:/usr/sbin/nologin\nagent:x:{id}:{id}:agent:{HOME}:/bin/sh\n{nobody}\n"
        ),
    );
    root.file("/etc/group", &format!("root:x:0:\nagent:x:{id}:\ntty:x:5:\nnogroup:x:65534:\n"));
    root.file("/etc/hosts", "127.0.0.1 localhost sandbox\n::1 localhost\n");
    root.file("/etc/hostname", "sandbox\n");
    let nobody_listens =
        "# There is no name server: nothing outside can be reached.\noptions attempts:1 timeout:1\n";
    let server = format!("nameserver {}\noptions attempts:2 timeout:2\n", crate::ear::name_server());
    root.file("/etc/resolv.conf", if network.is_some() { &server } else { nobody_listens });
    if let Some(authority) = network.and_then(|network| network.authority.as_ref()) {
        root.directory(Path::new("/etc/broker"));
        root.file(AUTHORITY, authority);
    }
    root.file(
        "/etc/nsswitch.conf",
        "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    );
    root.symlink("/etc/os-release", "../usr/lib/os-release");
    root.symlink("/etc/mtab", "../proc/self/mounts");
}

fn private_places(root: &mut Root, policy: &Policy) {
    let files = &policy.file().files;
    for (path, size, mode, owner, exec) in [
        ("/tmp", files.tmp, 0o1777, Owner::Root, Exec::Yes),
        ("/run", files.run, 0o755, Owner::Workload, Exec::No),
        ("/dev/shm", files.shm, 0o1777, Owner::Root, Exec::No),
        (HOME, files.home, 0o700, Owner::Workload, Exec::Yes),
    ] {
        root.private(path, policy, size, mode, owner, exec);
    }
}

fn proc(root: &mut Root) {
    root.steps.push(Step::Proc { path: "/proc".into() });
    root.steps.push(Step::ReadOnly { path: "/proc/sys".into() });
    for (names, directory) in [(PROC_FILES.as_slice(), false), (PROC_DIRECTORIES.as_slice(), true)] {
        for name in names {
            root.steps.push(Step::Cover { path: Path::new("/proc").join(name), directory });
        }
    }
}
