//! A Crema node: driver, peers, RESP front, admin API, command line and the embedding API.

pub mod admin;
pub mod cache;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod coordinator;
pub mod dev;
pub mod disk;
pub mod driver;
pub mod logs;
pub mod memberlist;
mod membership;
pub mod metrics;
pub mod node;
pub mod peers;
pub mod pressure;
pub mod recover;
pub mod resp;
pub mod run;
pub mod seed;
pub mod storage;
pub mod voters;

pub use cache::{CacheConfig, CacheError, DistributedCache, NodeId, ShardId};
pub use coordinator::{Coordinator, MultiRaftCacheConfig, ShardLeaderTracker};
pub use crema_core::EvictionPolicy;
pub use crema_shard::{ReadLevel, ReadMode};
pub use memberlist::{
    EventReceiver, GossipTuning, Member, MemberState, MemberlistConfig, MemberlistDiscovery, MemberlistEvent,
    PeerManagementConfig,
};
pub use seed::{SeedAddr, SeedAddrError};

/// What nodes tell each other, by the names that embedding programs use.
pub mod cluster {
    /// What gossip carries.
    pub mod memberlist_cluster {
        pub use crate::memberlist::{RaftNodeMetadata, ShardLeaderInfo};
    }
}
