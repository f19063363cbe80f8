//! Nodes that listen on all interfaces and tell the others another address, as behind NAT and in clouds. What is open to a
//! network needs a lock: the cluster's keys, which are changed in the end while all nodes run.
//!
//! `cargo run -p crema-node --example nat`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, others, quick, stop, until};
use crema_node::{CacheConfig, CacheError, DistributedCache, KeyRing, MemberlistConfig, MemberlistDiscovery};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Two keys, as `openssl rand -hex 32` makes them. Real ones come from a file that is readable by this program alone.
const OLD: &str = "8d1f0b0c5a7e4d2f9b3c6e8a1d4f7b2c5e8a1d4f7b0c3e6a9d2f5b8c1e4a7d0f";
const NEW: &str = "2b5e8a1d4f7c0b3e6a9d2f5c8b1e4a7d0f3c6b9e2a5d8f1c4b7e0a3d6f9c2b5e";

fn config(node_id: u64, public: SocketAddr, nodes: &common::Nodes) -> CacheConfig {
    // "public" stands for the external address of this node's Raft port; it is forwarded to the same port here.
    let everywhere = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let memberlist = MemberlistConfig::new(everywhere(gossip_addr(public).port()))
        .with_advertise_addr(gossip_addr(public))
        .with_tuning(quick());
    let raft_addr = everywhere(public.port());
    let seed_nodes = others(nodes, node_id);
    CacheConfig::new(node_id, raft_addr)
        .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &seed_nodes))
        .with_seed_nodes(seed_nodes)
        .with_stop_grace(Duration::ZERO)
}

#[tokio::main]
async fn main() -> Outcome {
    // What is open to the network and has no credentials would have to be allowed in so many words.
    let refused = DistributedCache::new(config(1, "127.0.0.1:9001".parse()?, &Vec::new())).await;
    let Err(CacheError::Invalid(reason)) = refused else { panic!("it is open to the network") };
    println!("refused: {reason}");

    let old = KeyRing::parse(OLD)?;
    let (nodes, caches) =
        cluster(3, |id, public, nodes| config(id, public, nodes).with_cluster_keys(old.clone())).await?;
    let cache = &caches[0];
    until("everybody to be discovered", async || cache.memberlist_healthy_members().await.len() == 3).await;
    for (member, (node_id, public)) in cache.memberlist_members().await.into_iter().zip(nodes) {
        println!("node {node_id} is reached at {}, its gossip at {:?}", member.raft_addr, member.gossip_addr);
        assert_eq!((member.node_id, member.raft_addr), (node_id, public));
        assert_eq!(member.gossip_addr, Some(gossip_addr(public)));
    }
    caches[1].put("key", "value").await?;
    assert_eq!(caches[2].get("key").await?.as_deref(), Some(&b"value"[..]));

    // A rotation: every node knows the new key, then every node uses it, then it is the only one.
    for lines in [format!("{OLD}\n{NEW}"), format!("{NEW}\n{OLD}"), NEW.to_owned()] {
        for cache in &caches {
            cache.set_cluster_keys(KeyRing::parse(&lines)?)?;
        }
    }
    println!("the cluster has another key");
    stop(caches).await
}
