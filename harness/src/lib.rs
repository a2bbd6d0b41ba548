//! Sessions of agents that outlive every process: an append-only log ([`store`]) and drivers that wake from it ([`driver`]). What is
//! decided, and what a log means, is in `harness-core`. Read [`driver::drive`] first.

pub use harness_core::{agent, context, decide, event, message, sse, state, tools};

pub mod driver;
pub mod hands;
pub mod model;
pub mod store;
