//! Who is there, and how each one stands: alive, suspect, dead, left.
//!
//! `cargo run -p crema-node --example members`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, others, quick, stop, until};
use crema_node::{CacheConfig, DistributedCache, MemberState, MemberlistConfig, MemberlistDiscovery, NodeId};
use std::time::Duration;

async fn show(cache: &DistributedCache) {
    for member in cache.memberlist_members().await {
        println!("Node {}: {} (state: {:?})", member.node_id, member.raft_addr, member.state);
    }
}

async fn wait_for(cache: &DistributedCache, node: NodeId, state: MemberState) {
    until(&format!("node {node} to be {state:?}"), async || {
        cache.memberlist_members().await.iter().any(|member| (member.node_id, member.state) == (node, state))
    })
    .await;
    println!("node {node} is {state:?}");
}

#[tokio::main]
async fn main() -> Outcome {
    let (_, mut caches) = cluster(5, |node_id, raft_addr, nodes| {
        let memberlist = MemberlistConfig::new(gossip_addr(raft_addr)).with_tuning(quick());
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_stop_grace(Duration::ZERO)
    })
    .await?;

    let cache = caches[0].clone();
    until("everybody to be discovered", async || cache.memberlist_healthy_members().await.len() == 5).await;
    show(&cache).await;

    // One says goodbye; one falls silent, is suspected, and then counts as failed.
    caches.pop().expect("node 5").shutdown().await?;
    wait_for(&cache, 5, MemberState::Left).await;
    drop(caches.pop().expect("node 4"));
    wait_for(&cache, 4, MemberState::Suspect).await;
    wait_for(&cache, 4, MemberState::Dead).await;
    show(&cache).await;
    let healthy = cache.memberlist_healthy_members().await;
    println!("Healthy nodes: {}", healthy.len());
    assert_eq!(healthy.iter().map(|member| member.node_id).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(cache.memberlist_members().await.len(), 5);

    // None of that has changed who votes.
    assert!(cache.memberlist_members().await.iter().all(|member| member.voter));
    stop(caches).await
}
