//! The deterministic simulator: production nodes over a simulated network, disk and clock, from one seed.
//!
//! ```text
//!   seed -> World { nodes (crema_shard::Host), connections, clocks } <- nemesis: the faults this seed enables
//!             ^ requests            | completions
//!          Workload: clients ------ history -> judge: linearizability, order, exactly once, sets, lifetimes
//!             invariants of Raft: watched at every step
//! ```
//!
//! [`world`] is the shell that crema-node is in production; there is no second implementation of anything it drives.
//! [`run`] runs a seed through all phases. A seed that fails prints the command that replays it.

pub mod check;
pub mod cli;
pub mod faults;
pub mod judge;
pub mod model;
pub mod mutants;
pub mod pool;
pub mod rng;
pub mod run;
#[cfg(test)]
mod scenarios;
pub mod trace;
pub mod workload;
pub mod world;

pub use faults::{Fault, Faults};
pub use run::{Plan, Report, run_seed};
