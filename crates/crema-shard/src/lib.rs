//! Raft groups, placement, routing and gateway of Crema as pure state machines.
//!
//! ```text
//!  client request -> Gateway -> local? Coordinator : frame to the leader's node
//!  peer frame ----> Host ----> Coordinator -> Replica (RawNode + StateMachine) -> Effects { persist, sends, completions }
//!  tick ----------> Host        Founding / Meta -> Placement -> RoutingView
//! ```
//!
//! [`Host`] is one node without its shell. The driver of crema-node and the simulator of crema-tests both feed it inputs
//! and perform the [`Effects`] it returns; there is no second implementation. No tokio, clock, socket, thread or
//! randomness here: `Now` and the entropy in [`HostConfig`] are arguments.

pub mod coordinator;
pub mod durable;
pub mod effect;
pub mod follower;
pub mod founding;
pub mod gateway;
pub mod host;
pub mod lease;
pub mod log_store;
pub mod members;
pub mod message;
pub mod meta;
pub mod placement;
pub mod proposals;
pub mod raft_log;
pub mod reads;
pub mod recovery;
pub mod replica;
pub mod router;
pub mod timing;
pub mod transfer;

pub use effect::{
    Channel, ClientRequest, ClientResult, Completion, ConnId, Effects, LedShard, LogWrite, Note, PersistBatch,
    ReadLevel, Refusal, Send, StateWrite, Token,
};
pub use host::{
    AutoVoters, Host, HostConfig, HostStatus, LeaderHint, ShardStatus, VoterError, VoterRequest, VoterResult,
};
pub use meta::{MetaState, NodeAddrs, NodeRecord, ReplicaPlacement, ShardPlacement};
pub use recovery::{RecoverRequest, RecoverResult};
pub use replica::{MemoryOptions, ReadMode};
pub use router::{Down, NodeRoute, RoutingView, ShardRoute, Standing};
pub use timing::Timing;
