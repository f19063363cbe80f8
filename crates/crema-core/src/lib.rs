//! The pure heart of Crema: what the cluster's words mean, how they are encoded, and what applying them does.
//!
//! ```text
//!   RESP / Rust API -> Op ----encode----> entry bytes (through Raft) ----decode----> StateMachine::apply -> Outcome
//!                       \----------------------- StateMachine::read ------------------------------> ReadResult
//! ```
//!
//! Nothing here reads a clock, opens a socket, draws a random number or waits. Time and randomness are arguments,
//! so that two replicas that apply the same entries are byte-identical and a simulated cluster replays from a seed.

pub mod cell;
pub mod codec;
pub mod error;
pub mod eviction;
pub mod glob;
pub mod ids;
pub mod key;
pub mod limits;
pub mod mutant;
pub mod op;
mod packed;
pub mod published;
pub mod reply;
pub mod session;
pub mod slot;
pub mod snapshot;
pub mod state_machine;
pub mod store;
mod sync;
pub mod time;

#[cfg(test)]
mod tests;

pub use cell::{ReadCell, Seen};
pub use codec::{
    EntryBuilder, EntryView, OpsRef, Victim, Victims, decode_entry, encode_advance, encode_check_digest,
    encode_open_session, encode_ops, encode_remove, encode_set_limits,
};
pub use error::{CodecError, CorruptEntry, CorruptSnapshot, OpError};
pub use eviction::EvictionPolicy;
pub use ids::{ClusterUuid, Epoch, Incarnation, LogIndex, NodeId, ReplicaId, Seq, SessionId, ShardId, Term};
pub use key::KeyRef;
pub use limits::{LimitPolicy, MemoryLimits};
pub use op::{ExpireCond, Op, SetCond, SetExpire};
pub use published::{Found, Published};
pub use reply::{Outcome, Reply};
pub use session::SessionTag;
pub use slot::{SLOT_COUNT, Slot, SlotRange, slot_of};
pub use snapshot::{Restore, SnapshotStep};
pub use state_machine::{Applied, ReadResult, ShardInit, StateMachine};
pub use time::{LogClock, LogTime, MonoTime, Now, WallTime};
