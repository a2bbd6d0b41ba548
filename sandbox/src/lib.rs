//! Policy to plan to confined process.
//!
//! [`Policy`] says what a kind of run may do. [`Job::narrow`] puts one run's wishes under it. [`Plan::make`] decides, purely, what
//! that comes to on a [`Host`]. [`run`] does it, and [`live`] keeps it for more than one command.

mod cgroup;
mod changes;
mod confine;
mod ear;
mod explain;
mod host;
mod init;
mod job;
mod judge;
mod launch;
mod live;
mod open;
mod order;
mod pin;
mod plan;
mod policy;
mod relay;
mod report;
mod role;
mod seccomp;
mod slot;
mod streams;
mod supervise;
mod sys;
mod workspace;

pub use cgroup::GroupError;
pub use changes::{discard_changes, is_unchanged, remove_tree, show_changes};
pub use confine::become_nobody;
pub use ear::{Ear, addresses, make_ear, name_server};
pub use host::{Caller, Cgroups, Controller, Device, Host, PathKind};
pub use job::{Job, NarrowError, Network, Stream, Terminal, Wishes, WorkspaceMode, WorkspaceWish};
pub use launch::{Given, LaunchError, fork_supervisor, network_namespace, run, run_given, shared_directory};
pub use live::{Next, Orders, live};
pub use open::OpenError;
pub use plan::{
    CgroupPlan, CgroupVersion, CommandPlan, Exec, INNER_ID, IoPlan, LANDLOCK_ABI_TESTED, LandlockAccess,
    LandlockPlan, Owner, Placeholder, Plan, PlanError, Protect, Rlimit, SeccompPlan, Step, StreamPlan,
    StreamsPlan, UnixSockets, WorkspacePlan,
};
pub use policy::{
    ByteSize, Count, Cpus, EnvName, Gap, HostPath, InnerPath, Library, Limits, POLICY_BYTES_MAX, PRESETS,
    Policy, PolicyError, PolicyFile, PolicyName, Presets, Span, WordError, schema as policy_schema,
};
pub use report::{Denials, EndedBy, Enforcement, Outcome, Report, Usage};
pub use role::{Reachable, Work, confine_client, confine_role, confine_server};
pub use slot::SlotError;
pub use streams::classify as classify_streams;
pub use supervise::{Heard, PASSED_ON};
pub use sys::{file_of_socket, pass_descriptor, take_passed_descriptor, tcp_bytes, unread_by_peer};
pub use workspace::WorkspaceError;
