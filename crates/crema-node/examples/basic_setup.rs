//! Three nodes that find each other by gossip and are one cache.
//!
//! `cargo run -p crema-node --example basic_setup`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, others, stop, until};
use crema_node::{CacheConfig, MemberlistConfig, MemberlistDiscovery, PeerManagementConfig};
use std::time::Duration;

#[tokio::main]
async fn main() -> Outcome {
    let (nodes, caches) = cluster(3, |node_id, raft_addr, nodes| {
        let seed_nodes = others(nodes, node_id);
        let memberlist_config = MemberlistConfig {
            enabled: true,
            bind_addr: Some(gossip_addr(raft_addr)),
            advertise_addr: None,
            seed_addrs: seed_nodes.iter().map(|(_, raft)| gossip_addr(*raft).into()).collect(),
            node_name: Some(format!("node-{node_id}")),
            peer_management: PeerManagementConfig {
                auto_add_peers: true,
                auto_remove_peers: false,
                auto_add_voters: false,
                auto_remove_voters: false,
            },
            ..Default::default()
        };
        let discovery = MemberlistDiscovery::new(node_id, raft_addr, &memberlist_config, &seed_nodes);
        CacheConfig::new(node_id, raft_addr)
            .with_seed_nodes(seed_nodes)
            .with_cluster_discovery(discovery)
            .with_stop_grace(Duration::ZERO)
    })
    .await?;

    // What one node has acknowledged, all others read.
    caches[0].put("greeting", "hello").await?;
    for (cache, (node_id, _)) in caches.iter().zip(&nodes) {
        let value = cache.get("greeting").await?.expect("acknowledged");
        println!("node {node_id} reads {}", String::from_utf8_lossy(&value));
        assert_eq!(value, "hello");
    }

    for cache in &caches {
        assert!(cache.memberlist_enabled());
        until("everybody to be discovered", async || cache.memberlist_healthy_members().await.len() == 3).await;
    }
    for member in caches[0].memberlist_members().await {
        let name = member.name.expect("every node has one");
        println!("node 1 sees {name} at {}, gossip {:?}", member.raft_addr, member.gossip_addr);
        assert_eq!(name, format!("node-{}", member.node_id));
    }
    stop(caches).await
}
