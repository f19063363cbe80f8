//! A Crema node: driver, peers, RESP front, admin API, command line and the embedding API.
//!
//! # Embedding
//!
//! A program that holds a [`DistributedCache`] is a node of the cluster: it keeps replicas, leads shards, and reads where it
//! leads without a message. Operations wait for the cluster within their deadline; errors say what to do ([`CacheError`]).
//!
//! ```
//! use crema_node::{CacheConfig, DistributedCache};
//! use std::time::Duration;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Without other nodes, a cluster of its own. Port 0 is any that is free.
//! let cache = DistributedCache::new(CacheConfig::new(1, "127.0.0.1:0".parse()?)).await?;
//! cache.put("greeting", "hello").await?;
//! assert_eq!(cache.get("greeting").await?.as_deref(), Some(&b"hello"[..]));
//! cache.put_with_ttl("session", "42", Duration::from_secs(60)).await?;
//! assert_eq!(cache.increment("visits", 1).await?, 1);
//! assert!(cache.compare_and_set("greeting", Some(b"hello"), "goodbye").await?);
//! cache.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`CacheConfig::with_seed_nodes`] names the other founders of a cluster, and [`memberlist`] says how nodes find each other
//! by gossip and how a program follows who is there. The directory `examples` has a program for each of these themes.

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
mod newcomers;
pub mod node;
pub mod peers;
pub mod pressure;
pub mod recover;
pub mod resp;
pub mod run;
pub mod storage;
pub mod voters;

pub use cache::{CacheConfig, CacheError, DistributedCache, NodeId, ShardId};
pub use coordinator::{Coordinator, MultiRaftCacheConfig, ShardLeaderTracker};
pub use crema_core::EvictionPolicy;
pub use crema_gossip::{
    ClusterKey, KeyFileError, KeyRing, KeyRingError, ResolveError, SeedAddr, SeedError, resolve_srv,
};
pub use crema_shard::{ReadLevel, ReadMode};
pub use memberlist::{
    EventReceiver, GossipTuning, Member, MemberState, MemberlistConfig, MemberlistDiscovery, MemberlistEvent,
    PeerManagementConfig,
};
pub use node::StartError;

/// What nodes tell each other, by the names that embedding programs use.
pub mod cluster {
    /// What gossip carries.
    pub mod memberlist_cluster {
        pub use crate::memberlist::{RaftNodeMetadata, ShardLeaderInfo};
    }
}
