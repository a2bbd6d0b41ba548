//! What is spoken with the broker's daemon: [`Client`] asks for sandboxes over the control interface, [`Door`] for connections on a
//! grant. The daemon itself uses the same types.

mod client;
mod door;
pub mod grant;
pub mod protocol;
pub mod rights;
pub mod wire;

pub use client::{Client, ClientError};
pub use door::Door;
pub use sandbox::confine_client;
