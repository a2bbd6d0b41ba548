//! A plan as text for people: what golden tests compare and `broker policy explain` prints.

use std::fmt::{self, Display, Formatter};

use crate::job::WorkspaceMode;
use crate::plan::{
    Exec, LandlockAccess, Owner, Placeholder, Plan, Step, StreamPlan, StreamsPlan, UnixSockets,
};

impl Display for Plan {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "policy {}", self.policy)?;
        writeln!(out, "\nnamespaces")?;
        writeln!(
            out,
            "  network (loopback only), ipc, uts, mount, pid, cgroup: owned by the host's user namespace"
        )?;
        writeln!(out, "  user: last, owns none of the others; one uid, never the host's 0")?;
        writeln!(out, "\nfiles")?;
        for step in self.base.iter().chain(&self.files) {
            writeln!(out, "  {step}")?;
        }
        self.workspace(out)?;
        self.limits(out)?;
        writeln!(out, "\nprivilege")?;
        writeln!(
            out,
            "  no groups, no capability in any set, securebits locked, no_new_privs, a new session keyring"
        )?;
        writeln!(out, "\nLandlock, ABI {}", self.landlock.abi)?;
        for (path, access) in &self.landlock.rules {
            writeln!(out, "  {:<6} {}", access.word(), path.display())?;
        }
        writeln!(out, "\nsystem calls")?;
        writeln!(
            out,
            "  an allow-list; EPERM for what is known and refused, ENOSYS for unknown numbers, clone3 and openat2"
        )?;
        let sockets = match self.seccomp.unix_sockets {
            UnixSockets::Refused => "TCP and UDP over the sandbox's own loopback, no AF_UNIX but socketpair",
            UnixSockets::Allowed => "TCP and UDP over the sandbox's own loopback, AF_UNIX",
        };
        writeln!(out, "  sockets: {sockets}")?;
        self.command(out)?;
        for gap in &self.gaps {
            writeln!(out, "\ngap {gap}")?;
        }
        Ok(())
    }
}

impl Plan {
    fn workspace(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let Some(workspace) = &self.workspace else { return Ok(()) };
        let mode = match workspace.mode {
            WorkspaceMode::ReadOnly => "read-only",
            WorkspaceMode::ReadWrite => "writable",
            WorkspaceMode::CopyOnWrite => "writable, changes kept apart",
        };
        writeln!(out, "\nworkspace")?;
        writeln!(
            out,
            "  {} at /workspace, {mode}, nosuid, nodev, idmapped with one uid",
            workspace.directory.display()
        )?;
        for protect in &workspace.protect {
            let absent = match &protect.placeholder {
                Placeholder::Directory => "an empty directory".to_owned(),
                Placeholder::File(text) => format!("a file that says {text:?}"),
            };
            writeln!(out, "  protected {} (where absent: {absent})", protect.path.display())?;
        }
        Ok(())
    }

    fn limits(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "\nlimits")?;
        if let Some(group) = &self.cgroup {
            for (what, value) in [
                ("memory bytes", group.memory_bytes_max),
                ("processes and threads, init among them", group.pids_max.map(u64::from)),
                ("thousandths of a processor", group.cpu_thousandths.map(u64::from)),
                ("bytes a second of each disk", group.io.as_ref().map(|io| io.bytes_per_second)),
            ] {
                if let Some(value) = value {
                    writeln!(out, "  {what}: {value} (cgroup {:?})", group.version)?;
                }
            }
        }
        for (limit, value) in &self.rlimits {
            writeln!(out, "  {limit:?}: {value} (rlimit)")?;
        }
        if let Some(timeout) = self.timeout_ms {
            writeln!(out, "  {timeout} ms, then SIGTERM, {} ms, then SIGKILL", self.grace_ms)?;
        }
        if let Some(bytes) = self.output_bytes_max {
            writeln!(out, "  {bytes} bytes of output")?;
        }
        Ok(())
    }

    fn command(&self, out: &mut Formatter<'_>) -> fmt::Result {
        writeln!(out, "\ncommand, in {}", self.command.directory.display())?;
        for (name, value) in &self.command.environment {
            writeln!(out, "  {name}={}", value.to_string_lossy())?;
        }
        let word = |plan: StreamPlan| match plan {
            StreamPlan::Pass => "passed",
            StreamPlan::Relay => "relayed",
            StreamPlan::Null => "/dev/null",
        };
        match self.streams {
            StreamsPlan::Each(plans) => writeln!(out, "  standard streams: {}", plans.map(word).join(", ")),
            StreamsPlan::Terminal => writeln!(out, "  standard streams: a fresh terminal"),
        }
    }
}

impl LandlockAccess {
    fn word(self) -> &'static str {
        match self {
            LandlockAccess::List => "list",
            LandlockAccess::Read => "read",
            LandlockAccess::Update => "update",
            LandlockAccess::Write => "write",
        }
    }
}

impl Display for Step {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let path = self.path().display();
        match self {
            Step::Directory { .. } => write!(out, "directory {path}"),
            Step::Symlink { target, .. } => write!(out, "symlink   {path} -> {}", target.display()),
            Step::File { content, .. } => write!(out, "file      {path}, {} bytes of our own", content.len()),
            Step::Tree { .. } => write!(out, "tree      {path}, read-only, nosuid, nodev"),
            Step::Private { size, inodes, mode, owner, exec, .. } => {
                let owner = if *owner == Owner::Workload { "the workload's" } else { "root's" };
                let exec = if *exec == Exec::No { ", noexec" } else { "" };
                write!(out, "private   {path}, {size} bytes, {inodes} inodes, mode {mode:04o}, {owner}{exec}")
            }
            Step::Devices { .. } => write!(out, "devices   {path}: null zero full random urandom tty"),
            Step::Terminals { .. } => write!(out, "terminals {path}, of its own"),
            Step::Seal { .. } => write!(out, "read-only {path}, itself"),
            Step::Proc { .. } => write!(out, "proc      {path}, of the new process namespace"),
            Step::Replace { with, .. } => write!(out, "replace   {path} with {}", with.display()),
            Step::Cover { .. } => write!(out, "cover     {path}"),
            Step::ReadOnly { .. } => write!(out, "read-only {path}"),
        }
    }
}
