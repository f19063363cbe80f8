//! Discovery makes nobody a member: a discovered node serves clients, but holds no data and has no vote until it is approved. And
//! with `auto_add_peers = false` it is not even connected to.
//!
//! `cargo run -p crema-node --example two_tiers`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Nodes, Outcome, cluster, gossip_addr, others, quick, start, stop, until};
use crema_node::{
    CacheConfig, CacheError, DistributedCache, MemberlistConfig, MemberlistDiscovery, PeerManagementConfig,
};
use std::time::Duration;

async fn founded(auto_add_peers: bool) -> Outcome<(Nodes, Vec<DistributedCache>)> {
    cluster(3, |node_id, raft_addr, nodes| {
        let memberlist = MemberlistConfig::new(gossip_addr(raft_addr))
            .with_peer_management(PeerManagementConfig { auto_add_peers, ..Default::default() })
            .with_tuning(quick());
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_stop_grace(Duration::ZERO)
    })
    .await
}

/// A fourth node that knows the gossip address of one of them, and nothing else.
async fn fourth(nodes: &Nodes) -> Outcome<DistributedCache> {
    let seed = gossip_addr(nodes[0].1);
    let started = start(4, |raft_addr| {
        let memberlist =
            MemberlistConfig::new(gossip_addr(raft_addr)).with_seeds(vec![seed.into()]).with_tuning(quick());
        CacheConfig::new(4, raft_addr)
            .with_join(true)
            .with_cluster_discovery(MemberlistDiscovery::new(4, raft_addr, &memberlist, &[]))
            .with_stop_grace(Duration::ZERO)
    });
    Ok(started.await?.1)
}

async fn sees_fourth(cache: &DistributedCache) {
    until("node 4 to be discovered", async || {
        cache.memberlist_healthy_members().await.iter().any(|member| member.node_id == 4)
    })
    .await;
}

#[tokio::main]
async fn main() -> Outcome {
    let (nodes, mut caches) = founded(true).await?;
    let fourth_cache = fourth(&nodes).await?;
    fourth_cache.wait_until_ready(Duration::from_secs(60)).await?;
    fourth_cache.put("key", "value").await?;
    assert_eq!(caches[1].get("key").await?.as_deref(), Some(&b"value"[..]));
    sees_fourth(&caches[1]).await;
    let voters: Vec<_> =
        caches[1].memberlist_members().await.into_iter().filter(|m| m.voter).map(|m| m.node_id).collect();
    println!("auto_add_peers = true: node 4 was discovered and serves every key; the voters are still {voters:?}");
    assert_eq!(voters, [1, 2, 3]);
    caches.push(fourth_cache);
    stop(caches).await?;

    let (nodes, mut caches) = founded(false).await?;
    let fourth_cache = fourth(&nodes).await?;
    for cache in &caches {
        sees_fourth(cache).await;
    }
    let Err(CacheError::NotReady { reason }) = fourth_cache.wait_until_ready(Duration::from_secs(1)).await else {
        panic!("nobody talks to it");
    };
    println!(
        "auto_add_peers = false: node 4 was discovered, and nobody connects to it, so that it is not ready: {reason}"
    );
    assert!(caches[0].memberlist_members().await.iter().all(|member| member.node_id != 4 || !member.connected));
    // The seed nodes are connected to as ever.
    caches[0].put("key", "value").await?;
    assert_eq!(caches[2].get("key").await?.as_deref(), Some(&b"value"[..]));
    caches.push(fourth_cache);
    stop(caches).await
}
