//! Rows PR-*: other processes, identities, lifetimes.

mod identity;
mod lifetime;
mod namespaces;
mod priority;
mod signals;
mod trace;

pub use identity::statuses;

use crate::case::Row;

pub const ROWS: &[Row] = &[
    Row { id: "PR-01", attempt: signals::foreign },
    Row { id: "PR-02", attempt: trace::init },
    Row { id: "PR-03", attempt: trace::descriptors },
    Row { id: "PR-05", attempt: signals::everyone },
    Row { id: "PR-06", attempt: namespaces::create },
    Row { id: "PR-07", attempt: namespaces::enter },
    Row { id: "PR-08", attempt: identity::capabilities },
    Row { id: "PR-09", attempt: identity::users },
    Row { id: "PR-10", attempt: lifetime::linger },
    Row { id: "PR-11", attempt: lifetime::orphans },
    Row { id: "PR-12", attempt: namespaces::choose_pid },
    Row { id: "PR-14", attempt: signals::by_descriptor },
    Row { id: "PR-14-group", attempt: signals::group },
    Row { id: "PR-14-lease", attempt: signals::lease },
    Row { id: "PR-15", attempt: priority::raise },
];
