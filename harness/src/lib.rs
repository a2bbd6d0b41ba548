//! Sessions of agents that outlive every process: an append-only log ([`store`]), a pure reducer ([`state`], [`decide`]), and drivers
//! that wake from the log ([`driver`]). Read [`driver::drive`] first.

pub mod agent;
pub mod context;
pub mod decide;
pub mod driver;
pub mod event;
pub mod hands;
pub mod message;
pub mod model;
pub mod sse;
pub mod state;
pub mod store;
pub mod tools;
