//! Whether something may be asked for at all, before anything is done.

use std::os::fd::OwnedFd;

use crate::protocol::{Code, Denial, Run};
use crate::serve::audit::bounded;
use crate::serve::config::Rights;

/// Whether `run` may be asked for by who has `rights`. What the policy itself allows is decided where it is planned.
pub(super) fn decide(run: &Run, rights: &Rights, descriptors: &[OwnedFd]) -> Result<(), Denial> {
    may_use(&run.policy, rights)?;
    let workspace = run.workspace.iter().map(|workspace| workspace.descriptor);
    let named: Vec<usize> = run.streams.iter().flatten().copied().chain(workspace).collect();
    all_named(&named, descriptors)?;
    all_pipes(&run.streams, descriptors)
}

pub(super) fn may_use(policy: &str, rights: &Rights) -> Result<(), Denial> {
    if policy.parse().is_ok_and(|policy| rights.may_use(&policy)) {
        return Ok(());
    }
    let message = format!("policy {:?} is not yours to use; the administrator grants it", bounded(policy));
    Err(Denial::new(Code::PolicyNotGranted, message))
}

pub(super) fn all_named(named: &[usize], descriptors: &[OwnedFd]) -> Result<(), Denial> {
    let distinct = named.iter().enumerate().all(|(at, number)| !named[..at].contains(number));
    if distinct && named.len() == descriptors.len() && named.iter().all(|number| *number < descriptors.len())
    {
        return Ok(());
    }
    let message = "each descriptor of the message is named once, and none that is not there";
    Err(Denial::new(Code::Descriptor, message))
}

pub(super) fn all_pipes(streams: &[Option<usize>; 3], descriptors: &[OwnedFd]) -> Result<(), Denial> {
    match streams.iter().flatten().find(|number| !name_of(&descriptors[**number]).starts_with("pipe:[")) {
        None => Ok(()),
        Some(number) => {
            let message = format!("descriptor {number} is no pipe; only pipes go in, or null");
            Err(Denial::new(Code::Descriptor, message))
        }
    }
}

/// What the kernel calls an open file, `pipe:[N]` or `socket:[N]` for what has no path. Asking the file itself could wait for
/// whoever serves its filesystem.
pub(super) fn name_of(descriptor: &OwnedFd) -> String {
    use std::os::fd::AsRawFd;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
