//! What a session's log means ([`state`]), what is done next ([`decide`]), what goes to the model ([`context`]) and what comes back
//! ([`sse`], [`message`]). Nothing here acts: time, answers and everything random are inputs.

pub mod agent;
pub mod context;
pub mod decide;
pub mod event;
pub mod message;
pub mod sse;
pub mod state;
pub mod tools;
