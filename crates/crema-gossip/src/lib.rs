//! Membership and shard-leader news of Crema over chitchat.
//!
//! ```text
//!   peers <--UDP--> chitchat --full snapshots--> View --MemberEvent--> EventReceiver (one per caller)
//!                      ^   \                       \--state--> members()
//!   publish_leaders ---+    \--l/<shard> keys--> ShardLeaderTracker --GossipUpdate--> UpdateReceiver (the node's driver)
//! ```
//!
//! Gossip discovers, describes and suspects; it decides nothing. Voters change through consensus only, and a leader heard
//! of here is a hint that Raft may contradict. `keys`, `tracker`, `view` and `config` are pure: clocks, sockets and tasks
//! live in `service`, `events` and `transport`.

pub mod config;
pub mod events;
pub mod keys;
mod rng;
pub mod service;
#[cfg(test)]
mod testing;
pub mod tracker;
mod transport;
pub mod view;

pub use config::{ConfigError, GossipConfig};
pub use events::{EventReceiver, GossipUpdate, UpdateReceiver};
pub use keys::{KeyError, NodeMeta};
pub use service::{Gossip, GossipError, GossipStats};
pub use tracker::{ClaimOutcome, LeaderEntry, ShardLeaderTracker};
pub use view::{Member, MemberEvent, MemberState};
