//! Control groups: limits for the whole sandbox. v2 is the real backend; v1 serves hosts that still bind the controllers
//! there. Groups are named by slot, so that what a killed launcher left is found and removed by the slot's
//! next owner, or by the next run that ends ([`Group::sweep`]).

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::host::{Controller, cgroup1_root, cgroup2_root, open_directory};
use crate::plan::{CgroupPlan, CgroupVersion, IoPlan};

/// Our own top-level group.
const TOP: &str = "broker";
/// The period of the processor quota, in microseconds.
const CPU_PERIOD_US: u64 = 100_000;
/// The files of v1 that limit a disk's traffic.
const THROTTLES: [&str; 2] = ["blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"];
/// How often, and with which pause, a group that is still busy is tried again.
const REMOVE_TRIES: u32 = 200;
const REMOVE_PAUSE: Duration = Duration::from_millis(1);

/// The group, or groups, of one sandbox.
#[derive(Debug)]
pub struct Group {
    version: CgroupVersion,
    directories: Vec<(Option<Controller>, PathBuf)>,
    io: Option<IoPlan>,
}

/// What went wrong with which file.
#[derive(Debug)]
pub struct GroupError {
    /// The file or directory.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl std::fmt::Display for GroupError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "cannot set up the control group: {}: {}", self.path.display(), self.source)
    }
}

impl std::error::Error for GroupError {}

/// How the child comes into its group.
#[derive(Debug)]
pub enum Entry {
    /// By clone3(2).
    Clone(OwnedFd),
    /// By writing `0` into these `tasks` files itself. A thread that moves itself takes no lock of the whole system; writing
    /// a number into `cgroup.procs` does, and waits 7 ms for it after 100 ms of idleness (measured on Linux 6.18).
    Write(Vec<OwnedFd>),
}

/// What the group has counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// The most memory that was in use, bytes.
    pub memory_peak_bytes: Option<u64>,
    /// The most processes and threads that there were.
    pub pids_peak: Option<u64>,
    /// How many were killed for want of memory.
    pub oom_kills: u64,
    /// How often a process or thread was refused.
    pub pids_refused: u64,
}

impl Group {
    /// Makes the group of `slot` with the limits of `plan`.
    ///
    /// # Errors
    /// When it cannot be made, or a limit cannot be written. What was made is removed.
    pub fn make(plan: &CgroupPlan, slot: u32) -> Result<Group, GroupError> {
        let mut group = Group { version: plan.version, directories: Vec::new(), io: plan.io.clone() };
        group.fill(plan, slot).inspect_err(|_| group.remove())?;
        Ok(group)
    }

    fn fill(&mut self, plan: &CgroupPlan, slot: u32) -> Result<(), GroupError> {
        let name = slot.to_string();
        match plan.version {
            CgroupVersion::V2 => {
                let top = cgroup2_root().join(TOP);
                let directory = top.join(name);
                // Noted before it is made, so that a half-made group is removed too.
                self.directories.push((None, directory.clone()));
                make_directory(&top, true)?;
                for parent in [cgroup2_root(), top.as_path()] {
                    let wanted: Vec<_> =
                        controllers(plan).map(|controller| format!("+{}", controller.name())).collect();
                    write(&parent.join("cgroup.subtree_control"), &wanted.join(" "))?;
                }
                make_directory(&directory, false)?;
                self.limit_v2(plan)
            }
            CgroupVersion::V1 => {
                for controller in controllers(plan) {
                    let directory = cgroup1_root(controller).join(TOP).join(&name);
                    self.directories.push((Some(controller), directory.clone()));
                    make_directory(&directory, false)?;
                }
                self.limit_v1(plan)
            }
        }
    }

    fn limit_v2(&self, plan: &CgroupPlan) -> Result<(), GroupError> {
        let directory = &self.directories[0].1;
        if let Some(bytes) = plan.memory_bytes_max {
            write(&directory.join("memory.max"), &bytes.to_string())?;
            write_if_there(&directory.join("memory.swap.max"), "0")?;
            write(&directory.join("memory.oom.group"), "1")?;
        }
        if let Some(count) = plan.pids_max {
            write(&directory.join("pids.max"), &count.to_string())?;
        }
        if let Some(share) = plan.cpu_thousandths {
            write(&directory.join("cpu.max"), &format!("{} {CPU_PERIOD_US}", quota_us(share)))?;
        }
        for (major, minor, bytes) in plan.io.iter().flat_map(by_disk) {
            write(&directory.join("io.max"), &format!("{major}:{minor} rbps={bytes} wbps={bytes}"))?;
        }
        Ok(())
    }

    fn limit_v1(&self, plan: &CgroupPlan) -> Result<(), GroupError> {
        for (controller, directory) in &self.directories {
            match controller {
                Some(Controller::Memory) => {
                    let bytes = plan.memory_bytes_max.unwrap_or_default().to_string();
                    write(&directory.join("memory.limit_in_bytes"), &bytes)?;
                    write_if_there(&directory.join("memory.memsw.limit_in_bytes"), &bytes)?;
                    write_if_there(&directory.join("memory.kmem.tcp.limit_in_bytes"), &bytes)?;
                }
                Some(Controller::Pids) => {
                    write(&directory.join("pids.max"), &plan.pids_max.unwrap_or_default().to_string())?;
                }
                Some(Controller::Cpu) => {
                    let quota = quota_us(plan.cpu_thousandths.unwrap_or_default());
                    write(&directory.join("cpu.cfs_quota_us"), &quota.to_string())?;
                }
                Some(Controller::Io) => {
                    for (major, minor, bytes) in plan.io.iter().flat_map(by_disk) {
                        for file in THROTTLES {
                            write(&directory.join(file), &format!("{major}:{minor} {bytes}"))?;
                        }
                    }
                }
                None => {}
            }
        }
        Ok(())
    }

    /// What the child needs to come in.
    ///
    /// # Errors
    /// When a file cannot be opened.
    pub fn entry(&self) -> Result<Entry, GroupError> {
        let error =
            |path: PathBuf| move |source: rustix::io::Errno| GroupError { path, source: source.into() };
        match self.version {
            CgroupVersion::V2 => {
                let path = self.directories[0].1.clone();
                open_directory(&path).map(Entry::Clone).map_err(error(path))
            }
            CgroupVersion::V1 => {
                let open = |(_, directory): &(_, PathBuf)| {
                    let path = directory.join("tasks");
                    openat(CWD, &path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(error(path))
                };
                self.directories.iter().map(open).collect::<Result<_, _>>().map(Entry::Write)
            }
        }
    }

    /// Lifts what slows processes down, so that those which are being killed can get to their end: the kernel ends nobody
    /// who waits for a throttled disk.
    pub fn lift_quotas(&self) {
        for (controller, directory) in &self.directories {
            // Not being able to only means that the end takes longer.
            match controller {
                None => {
                    drop(write_existing(&directory.join("cpu.max"), "max"));
                    for (major, minor, _) in self.io.iter().flat_map(by_disk) {
                        let text = format!("{major}:{minor} rbps=max wbps=max");
                        drop(write_existing(&directory.join("io.max"), &text));
                    }
                }
                Some(Controller::Cpu) => drop(write_existing(&directory.join("cpu.cfs_quota_us"), "-1")),
                Some(Controller::Io) => {
                    for (major, minor, _) in self.io.iter().flat_map(by_disk) {
                        for file in THROTTLES {
                            drop(write_existing(&directory.join(file), &format!("{major}:{minor} 0")));
                        }
                    }
                }
                Some(_) => {}
            }
        }
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (controller, directory) in &self.directories {
            let number = |file: &str| fs::read_to_string(directory.join(file)).ok()?.trim().parse().ok();
            let field = |file: &str, key: &str| field(&directory.join(file), key);
            match controller {
                None => {
                    counts.memory_peak_bytes = number("memory.peak");
                    counts.pids_peak = number("pids.peak");
                    counts.oom_kills = field("memory.events", "oom_kill");
                    counts.pids_refused = field("pids.events", "max");
                }
                Some(Controller::Memory) => {
                    counts.memory_peak_bytes = number("memory.max_usage_in_bytes");
                    counts.oom_kills = field("memory.oom_control", "oom_kill");
                }
                Some(Controller::Pids) => {
                    counts.pids_peak = number("pids.peak");
                    counts.pids_refused = field("pids.events", "max");
                }
                Some(Controller::Cpu | Controller::Io) => {}
            }
        }
        counts
    }

    /// Removes the groups of runs that were killed: those whose slot `is_free` gives away while it is looked at.
    pub fn sweep<T>(&self, is_free: impl Fn(u32) -> Option<T>) {
        for (controller, _) in &self.directories {
            let top = controller.map_or_else(|| cgroup2_root().to_owned(), cgroup1_root).join(TOP);
            let entries = fs::read_dir(&top).into_iter().flatten().flatten();
            for number in entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
                if let Some(_slot) = is_free(number) {
                    remove_directory(&top.join(number.to_string()));
                }
            }
            drop(fs::remove_dir(top));
        }
    }

    /// Removes the group, and our top-level group if this was the last.
    pub fn remove(&self) {
        for (controller, directory) in &self.directories {
            remove_directory(directory);
            let top = controller.map_or_else(|| cgroup2_root().to_owned(), cgroup1_root).join(TOP);
            // Others may still be in it.
            drop(fs::remove_dir(top));
        }
    }
}

fn controllers(plan: &CgroupPlan) -> impl Iterator<Item = Controller> {
    let wanted = [
        plan.memory_bytes_max.map(|_| Controller::Memory),
        plan.pids_max.map(|_| Controller::Pids),
        plan.cpu_thousandths.map(|_| Controller::Cpu),
        plan.io.as_ref().map(|_| Controller::Io),
    ];
    wanted.into_iter().flatten()
}

/// A limit for each disk; a file takes one at a time.
fn by_disk(plan: &IoPlan) -> impl Iterator<Item = (u32, u32, u64)> {
    plan.disks.iter().map(|(major, minor)| (*major, *minor, plan.bytes_per_second))
}

fn quota_us(thousandths: u32) -> u64 {
    u64::from(thousandths) * CPU_PERIOD_US / 1000
}

/// Makes `path`; with `shared` it may be there already, else what is there was left by a run that was killed.
fn make_directory(path: &Path, shared: bool) -> Result<(), GroupError> {
    for _ in 0..REMOVE_TRIES {
        match fs::create_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && shared => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => remove_directory(path),
            // Another run's end has just removed our top-level group.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(top) = path.parent().filter(|top| top.ends_with(TOP)) {
                    drop(fs::create_dir(top));
                }
            }
            Err(source) => {
                return Err(GroupError { path: path.to_owned(), source });
            }
        }
    }
    Err(GroupError { path: path.to_owned(), source: io::Error::from(io::ErrorKind::ResourceBusy) })
}

fn remove_directory(path: &Path) {
    for _ in 0..REMOVE_TRIES {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => sleep(REMOVE_PAUSE),
            _ => return,
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), GroupError> {
    write_existing(path, text).map_err(|source| GroupError { path: path.to_owned(), source })
}

fn write_if_there(path: &Path, text: &str) -> Result<(), GroupError> {
    match write_existing(path, text) {
        // Without swap accounting the kernel has no such file, or knows the file and not the thing.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::Unsupported) => Ok(()),
        other => other.map_err(|source| GroupError { path: path.to_owned(), source }),
    }
}

fn write_existing(path: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
}

fn field(path: &Path, key: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}
