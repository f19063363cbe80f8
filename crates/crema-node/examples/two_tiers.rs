//! Discovery makes nobody a member: a discovered node serves clients, but holds no data and has no vote until `add_peer`, and
//! after `remove_peer` no more. With `auto_add_peers = false` it is not even connected to before.
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

    // Manual approval. Any node takes it; the new one as well.
    caches[2].add_peer(4).await?;
    until("node 4 to be a voter everywhere", async || caches.iter().all(|cache| cache.voters() == [1, 2, 3, 4])).await;
    until("node 4 to lead something", async || {
        let coordinator = fourth_cache.multiraft_coordinator().expect("many shards");
        coordinator.shard_leader_tracker().all_leaders().values().any(|leader| *leader == 4)
    })
    .await;
    println!("add_peer(4): it holds data, votes, and leads shards");
    fourth_cache.remove_peer(4).await?;
    until("node 4 to lead nothing", async || {
        let coordinator = caches[0].multiraft_coordinator().expect("many shards");
        let leaders = coordinator.shard_leader_tracker().all_leaders();
        leaders.len() == 16 && leaders.values().all(|leader| *leader != 4)
    })
    .await;
    assert_eq!(fourth_cache.get("key").await?.as_deref(), Some(&b"value"[..]), "it goes on as a gateway");
    let unknown = caches[0].add_peer(9).await;
    println!("remove_peer(4): it leads nothing any more; and add_peer(9): {unknown:?}");
    assert!(matches!(unknown, Err(CacheError::Invalid(_))));
    let needed = [caches[0].remove_peer(1).await, caches[0].remove_peer(2).await, caches[0].remove_peer(3).await];
    println!("and of three voters: {needed:?}");
    assert!(matches!(needed.last(), Some(Err(CacheError::Invalid(_)))), "the last one stays");
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
    // Until somebody adds it.
    caches[1].add_peer(4).await?;
    fourth_cache.wait_until_ready(Duration::from_secs(60)).await?;
    println!("add_peer(4): it is connected to, and a voter");
    caches.push(fourth_cache);
    stop(caches).await
}
