//! Rows KS-*: system calls, socket families, ioctls and files that only widen what can go wrong in the kernel.

mod calls;
mod families;
mod filter;
mod keyrings;
mod machine;
mod mounts;
mod pages;
pub mod raw;
mod terminal;

use crate::case::Row;

pub const ROWS: &[Row] = &[
    Row { id: "KS-01", attempt: calls::io_uring },
    Row { id: "KS-02", attempt: calls::tracing },
    Row { id: "KS-03", attempt: keyrings::read },
    Row { id: "KS-03-plant", attempt: keyrings::plant },
    Row { id: "KS-04", attempt: calls::administration },
    Row { id: "KS-05", attempt: families::sweep },
    Row { id: "KS-07", attempt: machine::foreign_architecture },
    Row { id: "KS-08", attempt: machine::x32 },
    Row { id: "KS-08-filter", attempt: filter::dump },
    Row { id: "KS-09", attempt: terminal::inject },
    Row { id: "KS-10", attempt: calls::modes },
    Row { id: "KS-11", attempt: pages::rewrite },
    Row { id: "KS-12", attempt: calls::rarely_used },
    Row { id: "KS-15", attempt: machine::coverage },
    Row { id: "KS-16", attempt: mounts::cgroups },
    Row { id: "KS-18", attempt: mounts::pseudo },
];
