//! Membership and shard-leader news of Crema over chitchat.
//!
//! ```text
//!   peers <--UDP, TCP--> transport (seal, fragment) <--> chitchat
//!   chitchat --full snapshots--> View --MemberEvent--> EventReceiver (one per caller)
//!     ^   \                       \--state--> members()
//!     |    \--l/<shard> keys--> ShardLeaderTracker --GossipUpdate--> UpdateReceiver (the node's driver)
//!   publish_leaders
//! ```
//!
//! Gossip discovers, describes and suspects; it decides nothing. Voters change through consensus only, and a leader heard
//! of here is a hint that Raft may contradict. `keys`, `tracker`, `view`, `seal`, `fragment`, `inspect`, `seed` and `config` are pure:
//! clocks, sockets, files and tasks live in `service`, `events`, `transport`, `resolve` and `generation`.

pub mod config;
pub mod events;
pub mod fragment;
mod generation;
mod inspect;
pub mod keys;
#[cfg(test)]
mod network_tests;
mod resolve;
mod rng;
pub mod seal;
pub mod seed;
pub mod service;
#[cfg(test)]
mod testing;
pub mod tracker;
mod transport;
pub mod view;

pub use config::{ConfigError, GossipConfig};
pub use events::{EventReceiver, GossipUpdate, UpdateReceiver};
pub use keys::{KeyError, NodeMeta};
pub use resolve::{ResolveError, resolve_srv};
pub use seal::{ClusterKey, Foreign, KeyFileError, KeyId, KeyRing, KeyRingError};
pub use seed::{SeedAddr, SeedError};
pub use service::{ForeignStats, Gossip, GossipError, GossipStats};
pub use tracker::{ClaimOutcome, LeaderEntry, ShardLeaderTracker};
pub use view::{Member, MemberEvent, MemberState};
