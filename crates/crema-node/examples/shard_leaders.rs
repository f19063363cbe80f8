//! Which node leads which shard, as each node knows it.
//!
//! `cargo run -p crema-node --example shard_leaders`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, others, quick, stop, until};
use crema_node::cluster::memberlist_cluster::ShardLeaderInfo;
use crema_node::{CacheConfig, MemberlistConfig, MemberlistDiscovery, MultiRaftCacheConfig};
use std::time::Duration;

const NUM_SHARDS: u32 = 8;

#[tokio::main]
async fn main() -> Outcome {
    let (_, mut caches) = cluster(3, |node_id, raft_addr, nodes| {
        let memberlist = MemberlistConfig::new(gossip_addr(raft_addr)).with_tuning(quick());
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_multiraft_config(MultiRaftCacheConfig { enabled: true, num_shards: NUM_SHARDS, ..Default::default() })
            .with_stop_grace(Duration::ZERO)
    })
    .await?;

    let coordinator = caches[0].multiraft_coordinator().expect("multi-raft is enabled");
    let tracker = coordinator.shard_leader_tracker();
    until("every shard to have a leader", async || tracker.all_leaders().len() == NUM_SHARDS as usize).await;
    for (shard_id, leader_id) in tracker.all_leaders() {
        println!("Shard {shard_id}: Leader {leader_id}");
    }
    let shard_id = coordinator.shard_of("some key").expect("the cluster is known");
    let leader_id = tracker.get_leader(shard_id).expect("it has a leader");
    println!("\"some key\" lies in shard {shard_id}, which node {leader_id} leads");

    // All nodes agree, once they have heard.
    for other in &caches[1..] {
        let theirs = other.multiraft_coordinator().expect("multi-raft is enabled").shard_leader_tracker();
        until("the nodes to agree", async || theirs.all_leaders() == tracker.all_leaders()).await;
    }

    // A leader goes; others take its shards over, in a later term.
    let before: ShardLeaderInfo = tracker.leader_info(0).expect("known");
    let gone = before.leader.expect("it has a leader");
    let stopped = caches.remove(gone as usize - 1);
    stopped.shutdown().await?;
    let watcher = caches[0].multiraft_coordinator().expect("multi-raft is enabled").shard_leader_tracker();
    until("the shards to have other leaders", async || {
        let leaders = watcher.all_leaders();
        leaders.len() == NUM_SHARDS as usize && leaders.values().all(|leader| *leader != gone)
    })
    .await;
    let after = watcher.leader_info(0).expect("known");
    println!("node {gone} has stopped; shard 0: {before:?}, now {after:?}");
    assert!(after.term > before.term);
    caches[0].put("some key", "value").await?;
    stop(caches).await
}
