//! Whether something may be asked for at all, before anything is done.

use crate::connection::Foreign;
use crate::protocol::{Code, Denial, Directory, Run};
use crate::rights;
use crate::serve::audit::bounded;
use crate::serve::config::Rights;

/// The longest name of a workspace, in bytes: as long as a path (`PATH_MAX`).
const NAME_BYTES_MAX: usize = 4096;

/// Whether `run` may be asked for by who has `rights`. What the policy itself allows is decided where it is planned.
pub(super) fn decide(run: &Run, rights: &Rights, descriptors: &[Foreign]) -> Result<(), Denial> {
    may_use(&run.policy, rights)?;
    let workspace = run.workspace.iter().map(|workspace| workspace.descriptor);
    let named: Vec<usize> = run.streams.each().into_iter().flatten().chain(workspace).collect();
    all_named(&named, descriptors)?;
    is_lendable(run.workspace.as_ref(), descriptors)?;
    all_pipes(&run.streams.each(), descriptors)
}

/// Opened with `O_PATH` (open(2)): only then does nobody who serves its filesystem hear of its end, and hold up who closes it.
pub(super) fn is_lendable(workspace: Option<&Directory>, descriptors: &[Foreign]) -> Result<(), Denial> {
    let Some(Directory { descriptor, name, .. }) = workspace else { return Ok(()) };
    if name.len() > NAME_BYTES_MAX {
        let message = format!("a workspace's name has no more than {NAME_BYTES_MAX} bytes");
        return Err(Denial::new(Code::NotNarrower, message));
    }
    if rights::is_path(&descriptors[*descriptor]) {
        return Ok(());
    }
    Err(Denial::new(Code::Descriptor, "a workspace is opened with O_PATH"))
}

pub(super) fn may_use(policy: &str, rights: &Rights) -> Result<(), Denial> {
    if policy.parse().is_ok_and(|policy| rights.may_use(&policy)) {
        return Ok(());
    }
    let message = format!("policy {:?} is not yours to use; the administrator grants it", bounded(policy));
    Err(Denial::new(Code::PolicyNotGranted, message))
}

pub(super) fn all_named(named: &[usize], descriptors: &[Foreign]) -> Result<(), Denial> {
    let distinct = named.iter().enumerate().all(|(at, number)| !named[..at].contains(number));
    if distinct && named.len() == descriptors.len() && named.iter().all(|number| *number < descriptors.len())
    {
        return Ok(());
    }
    let message = "each descriptor of the message is named once, and none that is not there";
    Err(Denial::new(Code::Descriptor, message))
}

pub(super) fn all_pipes(streams: &[Option<usize>; 3], descriptors: &[Foreign]) -> Result<(), Denial> {
    match streams.iter().flatten().find(|number| !rights::is_pipe(&descriptors[**number])) {
        None => Ok(()),
        Some(number) => {
            let message = format!("descriptor {number} is no pipe; only pipes go in, or null");
            Err(Denial::new(Code::Descriptor, message))
        }
    }
}
