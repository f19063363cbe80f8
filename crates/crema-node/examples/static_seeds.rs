//! A fixed list of well-known seeds, the same on every node.
//!
//! `cargo run -p crema-node --example static_seeds`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, others, quick, stop, until};
use crema_node::{CacheConfig, MemberlistConfig, MemberlistDiscovery, SeedAddr};
use std::time::Duration;

#[tokio::main]
async fn main() -> Outcome {
    let (_, caches) = cluster(5, |node_id, raft_addr, nodes| {
        // Three of five nodes are seeds. One that answers is enough to find all; that a seed names itself does no harm.
        let seeds: Vec<SeedAddr> =
            nodes[..3].iter().map(|(_, raft)| gossip_addr(*raft).to_string().parse().expect("ip:port")).collect();
        let config = MemberlistConfig::new(gossip_addr(raft_addr)).with_seeds(seeds).with_tuning(quick());
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &config, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_stop_grace(Duration::ZERO)
    })
    .await?;
    for (i, cache) in caches.iter().enumerate() {
        until("everybody to be discovered", async || cache.memberlist_healthy_members().await.len() == 5).await;
        println!("node {} knows all five", i + 1);
    }
    stop(caches).await
}
