//! Rows NW-*: everything that is not the sandbox's own loopback.

mod addresses;
mod interfaces;
mod names;
mod options;
mod rendezvous;
mod serve;

use crate::case::Row;

pub const ROWS: &[Row] = &[
    Row { id: "NW-01", attempt: interfaces::list },
    Row { id: "NW-02", attempt: addresses::reach },
    Row { id: "NW-03", attempt: addresses::metadata },
    Row { id: "NW-04", attempt: names::resolve },
    Row { id: "NW-05", attempt: rendezvous::abstract_sockets },
    Row { id: "NW-05-hold", attempt: rendezvous::hold_name },
    Row { id: "NW-07", attempt: options::privileged },
    Row { id: "NW-10", attempt: rendezvous::pass },
    Row { id: "NW-10-hold", attempt: rendezvous::hold },
    Row { id: "NW-10-look", attempt: rendezvous::look },
    Row { id: "NW-serve", attempt: serve::serve },
];
