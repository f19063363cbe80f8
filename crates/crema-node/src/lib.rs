//! A Crema node: driver, peers, RESP front, admin API, command line and the embedding API.

pub mod admin;
pub mod cache;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod dev;
pub mod disk;
pub mod driver;
pub mod logs;
mod membership;
pub mod metrics;
pub mod node;
pub mod peers;
pub mod pressure;
pub mod recover;
pub mod resp;
pub mod run;
pub mod storage;
pub mod voters;

pub use cache::{CacheConfig, CacheError, DistributedCache, NodeId};
pub use crema_shard::{ReadLevel, ReadMode};
