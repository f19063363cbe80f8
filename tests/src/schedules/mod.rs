//! Schedules of single messages: one group, every message delivered, held or lost by name.
//!
//! The simulator shakes whole nodes and finds what nobody thought of; a schedule shows one thing that somebody did think
//! of, and shows it for raft-rs alone beside our replica. One file a theme.

mod clocks;
mod memory;
mod raft_alone;
mod replays;
mod replica;
mod revival;
mod stage;
