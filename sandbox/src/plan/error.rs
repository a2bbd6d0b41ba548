//! Why there is no plan.

use std::fmt;
use std::path::PathBuf;

use crate::host::Controller;
use crate::policy::Gap;

/// Why this host cannot do what the policy demands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanError {
    /// The kernel's Landlock is older than the policy's floor.
    LandlockFloor {
        /// As demanded.
        floor: u8,
        /// As found; 0 for none.
        found: u8,
    },
    /// A limit has no controller here.
    NoController {
        /// The limit's controller.
        controller: Controller,
    },
    /// Two protections exclude each other on this kernel, and the policy does not name the gap.
    GapNotAllowed {
        /// The gap to name in `allow_gaps`.
        gap: Gap,
    },
    /// The policy names a place that is the sandbox's own.
    Reserved {
        /// Which.
        path: PathBuf,
    },
    /// Only root can be the caller here.
    NotRoot,
}

impl fmt::Display for PlanError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlanError::LandlockFloor { floor, found: 0 } => {
                write!(
                    out,
                    "the policy demands Landlock ABI {floor}, and this kernel has no Landlock (boot with `lsm=landlock,...`)"
                )
            }
            PlanError::LandlockFloor { floor, found } => {
                write!(
                    out,
                    "the policy demands Landlock ABI {floor}, this kernel has {found}; lower `landlock.floor` or use a newer kernel"
                )
            }
            PlanError::NoController { controller } => write!(
                out,
                "no control group on this host can limit {}; mount the controller, or name the gap: allow_gaps = [\"{}\"]",
                controller.name(),
                Gap::NoCgroup
            ),
            PlanError::GapNotAllowed { gap } => {
                write!(
                    out,
                    "what the policy asks for leaves a gap on this kernel; name it to accept it: allow_gaps = [\"{gap}\"]"
                )
            }
            PlanError::Reserved { path } => {
                write!(
                    out,
                    "{} cannot be shown: inside, that place is the sandbox's own; name what is needed below it",
                    path.display()
                )
            }
            PlanError::NotRoot => {
                out.write_str("only root can start a sandbox on this host without the daemon; run as root")
            }
        }
    }
}

impl std::error::Error for PlanError {}
