//! The user's guide to memberlist, snippet by snippet, as it stands there: a program that is written from it compiles and does what
//! it says.
//!
//! Each function is one snippet. What names fixed addresses is only compiled, or run up to the configuration; what takes a running
//! cache runs on a cluster of its own. Struct literals of `MemberlistConfig` end with `..Default::default()`, because there is more
//! to configure than the guide lists.
//!
//! `cargo run -p crema-node --example memberlist_document`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]
#![allow(clippy::uninlined_format_args, reason = "as it stands in the guide")]

mod common;

use common::{Outcome, others, quick, stop, until};
// The guide's programs depend on `crema = { package = "crema-node", … }`.
use crema_node as crema;

use crema::{CacheConfig, DistributedCache, MemberlistConfig, MemberlistDiscovery, PeerManagementConfig};
use crema::{MemberState, MemberlistEvent, MultiRaftCacheConfig, NodeId, ShardId};
use std::net::SocketAddr;

/// "Basic Setup". Not run: its ports may be somebody else's.
async fn basic_setup() -> Outcome<DistributedCache> {
    let node_id = 1;
    let raft_addr = "127.0.0.1:9001".parse()?;

    // Configure memberlist
    let memberlist_config = MemberlistConfig {
        enabled: true,
        bind_addr: Some("127.0.0.1:8001".parse()?),
        advertise_addr: None,
        seed_addrs: vec!["127.0.0.1:8002".parse()?, "127.0.0.1:8003".parse()?],
        node_name: Some(format!("node-{}", node_id)),
        peer_management: PeerManagementConfig {
            auto_add_peers: true, // Auto-register in Raft transport
            auto_remove_peers: false,
            auto_add_voters: false,    // IMPORTANT: Don't auto-add to Raft
            auto_remove_voters: false, // IMPORTANT: Don't auto-remove from Raft
        },
        ..Default::default()
    };

    // Define Raft peer addresses
    let seed_nodes = vec![(2, "127.0.0.1:9002".parse()?), (3, "127.0.0.1:9003".parse()?)];

    // Create MemberlistDiscovery
    let discovery = MemberlistDiscovery::new(node_id, raft_addr, &memberlist_config, &seed_nodes);

    // Build config with discovery
    let config = CacheConfig::new(node_id, raft_addr).with_seed_nodes(seed_nodes).with_cluster_discovery(discovery);

    let cache = DistributedCache::new(config).await?;
    Ok(cache)
}

/// "Configuration Options" and "Safety Defaults".
fn defaults() {
    let config = MemberlistConfig::default();
    assert!(!config.enabled);
    let (bind, advertise): (Option<SocketAddr>, Option<SocketAddr>) = (config.bind_addr, config.advertise_addr);
    assert_eq!((bind, advertise), (None, None));
    assert!(config.seed_addrs.is_empty());
    assert_eq!(config.node_name, None::<String>);

    let peer_management = PeerManagementConfig {
        auto_add_peers: true, // Safe: Only affects transport
        auto_remove_peers: false,
        auto_add_voters: false,    // IMPORTANT: Don't auto-add to Raft
        auto_remove_voters: false, // IMPORTANT: Don't auto-remove from Raft
    };
    assert_eq!(peer_management, PeerManagementConfig::default(), "the defaults are the safe ones");
}

/// "Node Metadata" and "Custom Metadata".
fn metadata(cache: &DistributedCache, bind_addr: SocketAddr) {
    use crema::cluster::memberlist_cluster::RaftNodeMetadata;

    // Metadata is set automatically from CacheConfig
    let RaftNodeMetadata { node_id, raft_addr, custom_metadata } = cache.memberlist_metadata();
    let _: (NodeId, SocketAddr, std::collections::HashMap<String, String>) = (node_id, raft_addr, custom_metadata);

    let memberlist_config =
        MemberlistConfig::new(bind_addr).with_metadata("region", "us-east-1").with_metadata("rack", "rack-1");
    assert_eq!(memberlist_config.metadata.len(), 2);
}

/// "Check Memberlist Status" and "Get Discovered Members".
async fn members(cache: &DistributedCache) {
    // Check if memberlist is enabled
    if cache.memberlist_enabled() {
        println!("Memberlist is active");
    }

    // All discovered members (alive, suspect, and dead)
    let members = cache.memberlist_members().await;
    for member in &members {
        println!("Node {}: {} (state: {:?})", member.node_id, member.raft_addr, member.state);
    }

    // Only healthy members
    let healthy = cache.memberlist_healthy_members().await;
    println!("Healthy nodes: {}", healthy.len());
    assert_eq!((members.len(), healthy.len()), (3, 3));
}

/// "Member States": these four, and no other.
fn member_states(state: MemberState) -> &'static str {
    match state {
        MemberState::Alive => "Node is healthy",
        MemberState::Suspect => "Node might be failing",
        MemberState::Dead => "Node is confirmed dead",
        MemberState::Left => "Node gracefully left",
    }
}

/// "Listen for Membership Events".
async fn membership_events(cache: &DistributedCache) -> tokio::task::JoinHandle<()> {
    let mut event_rx = cache.memberlist_events().await;

    tokio::spawn(async move {
        while let Some(event) = event_rx.recv().await {
            match event {
                MemberlistEvent::NodeJoin { node_id, raft_addr } => {
                    println!("Node {} joined at {}", node_id, raft_addr);
                }
                MemberlistEvent::NodeLeave { node_id } => {
                    println!("Node {} left gracefully", node_id);
                }
                MemberlistEvent::NodeFailed { node_id } => {
                    println!("Node {} failed", node_id);
                }
                MemberlistEvent::NodeUpdate { node_id, new_addr } => {
                    println!("Node {} updated address to {}", node_id, new_addr);
                }
            }
        }
    })
}

/// The same, with what its comments suggest; and "Split-Brain After Partition Heal".
async fn approval(cache: DistributedCache, rejoining_nodes: Vec<NodeId>) -> Outcome {
    let mut event_rx = cache.memberlist_events().await;
    while let Some(event) = event_rx.recv().await {
        match event {
            MemberlistEvent::NodeJoin { node_id, raft_addr } => {
                println!("Node {} joined at {}", node_id, raft_addr);
                // Optionally: Add to Raft voting
                cache.add_peer(node_id).await?;
                break;
            }
            MemberlistEvent::NodeFailed { node_id } => {
                println!("Node {} failed", node_id);
                // Optionally: Remove from Raft voting
                cache.remove_peer(node_id).await?;
            }
            _ => {}
        }
    }

    // On the surviving partition (one with quorum)
    // Add back nodes from the other partition
    for node_id in rejoining_nodes {
        cache.add_peer(node_id).await?;
    }
    Ok(())
}

/// "Multi-Raft Integration".
fn leader_information(cache: &DistributedCache) -> Vec<crema::cluster::memberlist_cluster::ShardLeaderInfo> {
    use crema::cluster::memberlist_cluster::ShardLeaderInfo;

    // Each node broadcasts which shards it leads
    // This enables gossip-based leader discovery for routing
    let tracker = cache.multiraft_coordinator().map(|coordinator| coordinator.shard_leader_tracker());
    let infos: Vec<ShardLeaderInfo> = tracker.map(|tracker| tracker.all_leader_infos()).unwrap_or_default();
    infos
}

/// "Shard Leader Tracker".
fn shard_leader_tracker(cache: &DistributedCache, shard_id: ShardId) -> usize {
    let mut known = 0;
    if let Some(coordinator) = cache.multiraft_coordinator() {
        let tracker = coordinator.shard_leader_tracker();

        // Get leader for a specific shard
        if let Some(leader_id) = tracker.get_leader(shard_id) {
            println!("Shard {} leader is node {}", shard_id, leader_id);
        }

        // Get all shard leaders
        let leaders = tracker.all_leaders();
        for (shard_id, leader_id) in leaders {
            println!("Shard {}: Leader {}", shard_id, leader_id);
            known += 1;
        }
    }
    known
}

/// "Static Seed Nodes".
fn static_seed_nodes(bind_addr: SocketAddr) -> Outcome<MemberlistConfig> {
    let seeds = vec!["10.0.0.1:8000".parse()?, "10.0.0.2:8000".parse()?, "10.0.0.3:8000".parse()?];

    let config = MemberlistConfig::new(bind_addr).with_seeds(seeds);
    Ok(config)
}

/// "DNS-Based Seeds". Not run: the name has no records here. The example `dns_seeds` looks names up.
async fn dns_based_seeds(bind_addr: SocketAddr) -> Outcome<MemberlistConfig> {
    use crema::resolve_srv;

    // Resolve seeds from DNS (application code)
    let seeds = resolve_srv("_crema._tcp.cluster.local").await?;

    let config = MemberlistConfig::new(bind_addr).with_seeds(seeds);
    Ok(config)
}

/// "Kubernetes Headless Service".
fn headless_service(bind_addr: SocketAddr) -> Outcome<MemberlistConfig> {
    // Use headless service DNS for seeds
    let seeds = vec!["crema-headless:8000".parse()?];
    Ok(MemberlistConfig::new(bind_addr).with_seeds(seeds))
}

/// "NAT/Cloud Environments".
fn nat() -> Outcome<MemberlistConfig> {
    let config = MemberlistConfig::new(
        "0.0.0.0:8000".parse()?, // Bind to all interfaces
    )
    .with_advertise_addr(
        "203.0.113.10:8000".parse()?, // Public/external address
    );
    Ok(config)
}

/// "Graceful Shutdown".
async fn graceful_shutdown(cache: DistributedCache) -> Outcome {
    // This sends a Leave message via memberlist
    cache.shutdown().await?;

    // Other nodes will receive NodeLeave event instead of NodeFailed
    Ok(())
}

#[tokio::main]
async fn main() -> Outcome {
    // Never polled, so that nothing is bound.
    drop(basic_setup());
    defaults();
    let bind_addr = "127.0.0.1:8001".parse()?;
    drop(dns_based_seeds(bind_addr));
    assert_eq!(static_seed_nodes(bind_addr)?.seed_addrs.len(), 3);
    assert_eq!(headless_service(bind_addr)?.seed_addrs.len(), 1);
    assert_eq!(nat()?.advertise_addr, Some("203.0.113.10:8000".parse()?));

    // The same on free ports. The gossip addresses follow from the Raft addresses.
    let (_, mut caches) = common::cluster(3, |node_id, raft_addr, nodes| {
        let memberlist_config = MemberlistConfig { enabled: true, tuning: quick(), ..Default::default() };
        let seed_nodes = others(nodes, node_id);
        let discovery = MemberlistDiscovery::new(node_id, raft_addr, &memberlist_config, &seed_nodes);
        CacheConfig::new(node_id, raft_addr)
            .with_seed_nodes(seed_nodes)
            .with_cluster_discovery(discovery)
            .with_multiraft_config(MultiRaftCacheConfig { enabled: true, num_shards: 16, ..Default::default() })
            .with_stop_grace(std::time::Duration::ZERO)
    })
    .await?;
    let cache = caches[0].clone();
    until("everybody to be discovered", async || cache.memberlist_healthy_members().await.len() == 3).await;
    let listener = membership_events(&cache).await;
    metadata(&cache, bind_addr);
    members(&cache).await;
    until("the cluster to be founded", async || cache.voters().len() == 3).await;
    approval(cache.clone(), vec![2, 3]).await?;
    until("every shard to have a leader", async || shard_leader_tracker(&cache, 0) == 16).await;
    assert_eq!(leader_information(&cache).len(), 16);

    graceful_shutdown(caches.pop().expect("node 3")).await?;
    until("node 3 to have left", async || {
        let members = cache.memberlist_members().await;
        let third = members.iter().find(|member| member.node_id == 3).expect("remembered");
        println!("node 3: {}", member_states(third.state));
        third.state == MemberState::Left
    })
    .await;
    stop(caches).await?;
    listener.await?;
    Ok(())
}
