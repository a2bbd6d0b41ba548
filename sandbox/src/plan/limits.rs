//! Limits: of the whole sandbox by control groups, of each process by setrlimit(2).

use serde::Serialize;

use super::PlanError;
use crate::host::{Cgroups, Controller, Device, Host};
use crate::job::Job;
use crate::policy::{Gap, Policy};

/// Limits of the whole sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CgroupPlan {
    /// v1 or v2.
    pub version: CgroupVersion,
    /// Bytes.
    pub memory_bytes_max: Option<u64>,
    /// Processes and threads, init included.
    pub pids_max: Option<u32>,
    /// Thousandths of a processor.
    pub cpu_thousandths: Option<u32>,
    /// Traffic of each disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<IoPlan>,
}

/// The limit of each disk's traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IoPlan {
    /// Bytes read, and as many written, in a second.
    pub bytes_per_second: u64,
    /// The disks.
    pub disks: Vec<Device>,
}

/// Which kind of hierarchy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CgroupVersion {
    /// One a controller.
    V1,
    /// One for all.
    V2,
}

/// The limits of setrlimit(2) that are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rlimit {
    /// 1, which the kernel treats as "run no core handler either" (core(5)); 0 would still run a `|handler`.
    Core,
    /// Open descriptors.
    OpenFiles,
    /// Size of a file.
    FileSize,
    /// Locked memory.
    LockedMemory,
    /// Real-time priority.
    RealTimePriority,
    /// Niceness.
    Nice,
}

pub(super) fn cgroup(
    policy: &Policy,
    job: &Job,
    host: &Host,
    gaps: &mut Vec<Gap>,
) -> Result<Option<CgroupPlan>, PlanError> {
    let limits = &job.limits;
    let mut wanted = Vec::new();
    wanted.extend(limits.memory.map(|_| Controller::Memory));
    wanted.extend(limits.pids.map(|_| Controller::Pids));
    wanted.extend(limits.cpus.map(|_| Controller::Cpu));
    wanted.extend(limits.io.map(|_| Controller::Io));
    if wanted.is_empty() {
        return Ok(None);
    }
    let (version, offered) = match &host.cgroups {
        Cgroups::V2 { controllers } => (CgroupVersion::V2, controllers.as_slice()),
        Cgroups::V1 { controllers } => (CgroupVersion::V1, controllers.as_slice()),
        Cgroups::None => (CgroupVersion::V2, [].as_slice()),
    };
    if let Some(missing) = wanted.iter().find(|controller| !offered.contains(controller)) {
        if !policy.file().allow_gaps.contains(&Gap::NoCgroup) {
            return Err(PlanError::NoController { controller: *missing });
        }
        gaps.push(Gap::NoCgroup);
    }
    let has = |controller| offered.contains(&controller);
    let plan = CgroupPlan {
        version,
        memory_bytes_max: limits.memory.map(|size| size.bytes()).filter(|_| has(Controller::Memory)),
        // Init counts too, and is not the workload's.
        pids_max: limits.pids.map(|count| count.get().saturating_add(1)).filter(|_| has(Controller::Pids)),
        cpu_thousandths: limits.cpus.map(|cpus| cpus.thousandths()).filter(|_| has(Controller::Cpu)),
        io: limits
            .io
            .filter(|_| has(Controller::Io))
            .map(|size| IoPlan { bytes_per_second: size.bytes(), disks: host.disks.clone() }),
    };
    Ok(if wanted.iter().any(|controller| has(*controller)) { Some(plan) } else { None })
}

pub(super) fn rlimits(job: &Job) -> Vec<(Rlimit, u64)> {
    let mut list = vec![(Rlimit::Core, 1), (Rlimit::RealTimePriority, 0), (Rlimit::Nice, 0)];
    list.push((Rlimit::LockedMemory, 8 << 20));
    list.extend(job.limits.open_files.map(|count| (Rlimit::OpenFiles, u64::from(count.get()))));
    list.extend(job.limits.file_size.map(|size| (Rlimit::FileSize, size.bytes())));
    list
}
