//! A host name as the seed, as a Kubernetes headless service gives one: whatever addresses it has are contacted.
//!
//! `cargo run -p crema-node --example headless_service`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, others, quick, stop, until};
use crema_node::{CacheConfig, MemberlistConfig, MemberlistDiscovery, SeedAddr};
use std::time::Duration;

#[tokio::main]
async fn main() -> Outcome {
    // In a cluster this reads "crema-headless:8000"; here the service is the host "localhost", with one node behind it.
    let (_, caches) = cluster(3, |node_id, raft_addr, nodes| {
        let service = format!("localhost:{}", gossip_addr(nodes[0].1).port());
        let seed: SeedAddr = service.parse().expect("host:port");
        assert!(matches!(&seed, SeedAddr::Host { host, .. } if host == "localhost"));
        let config = MemberlistConfig::new(gossip_addr(raft_addr)).with_seeds(vec![seed]).with_tuning(quick());
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &config, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_stop_grace(Duration::ZERO)
    })
    .await?;
    for (i, cache) in caches.iter().enumerate() {
        until("everybody to be discovered", async || cache.memberlist_healthy_members().await.len() == 3).await;
        println!("node {} has found the others behind the service's name", i + 1);
    }
    stop(caches).await
}
