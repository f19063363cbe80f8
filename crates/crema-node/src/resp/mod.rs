//! The RESP front: what any Redis client can talk to.
//!
//! ```text
//!   socket -> decode -> Args -> plan (command, ops, local, topology) -> requests -> driver
//!     ^                              \-> reply at once, reads under a lease too      |
//!     \--- encode <- in the order of the commands <- inflight <- results <-----------/
//! ```
//!
//! `server` accepts, `connection` is one client's task; everything between them is pure. Two listeners share it all:
//! [`ListenerKind::Proxy`] takes every command to where its keys are, [`ListenerKind::Cluster`] sends cluster clients to
//! the leader with `MOVED`.

pub mod command;
pub mod connection;
pub mod decode;
pub mod encode;
pub mod inflight;
pub mod local;
pub mod ops;
pub mod order;
pub mod plan;
pub mod server;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod topology;

pub use server::{FrontConfig, FrontStats, ListenerKind, Server, ServerHandle};
