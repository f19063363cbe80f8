//! What happens to members: they join, fail, come back, move, leave.
//!
//! `cargo run -p crema-node --example events`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, next_about, others, quick, start, stop};
use crema_node::{CacheConfig, DistributedCache, MemberlistConfig, MemberlistDiscovery, MemberlistEvent, NodeId};
use std::net::SocketAddr;
use std::time::Duration;

/// A node that joins by the gossip address of one other.
async fn joined(node_id: NodeId, seed: SocketAddr) -> Outcome<(SocketAddr, DistributedCache)> {
    start(node_id, |raft_addr| {
        let memberlist =
            MemberlistConfig::new(gossip_addr(raft_addr)).with_seeds(vec![seed.into()]).with_tuning(quick());
        CacheConfig::new(node_id, raft_addr)
            .with_join(true)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &[]))
            .with_stop_grace(Duration::ZERO)
    })
    .await
}

#[tokio::main]
async fn main() -> Outcome {
    let (nodes, caches) = cluster(3, |node_id, raft_addr, nodes| {
        let memberlist = MemberlistConfig::new(gossip_addr(raft_addr)).with_tuning(quick());
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_stop_grace(Duration::ZERO)
    })
    .await?;

    // Each caller has its own events: one task prints them, this one checks them.
    let mut event_rx = caches[0].memberlist_events().await;
    let printer = tokio::spawn(async move {
        while let Some(event) = event_rx.recv().await {
            match event {
                MemberlistEvent::NodeJoin { node_id, raft_addr } => println!("Node {node_id} joined at {raft_addr}"),
                MemberlistEvent::NodeLeave { node_id } => println!("Node {node_id} left gracefully"),
                MemberlistEvent::NodeFailed { node_id } => println!("Node {node_id} failed"),
                MemberlistEvent::NodeUpdate { node_id, new_addr } => {
                    println!("Node {node_id} updated address to {new_addr}");
                }
            }
        }
    });

    // Whoever is there already is told first.
    for (node_id, raft_addr) in nodes.iter().copied() {
        let mut events = caches[0].memberlist_events().await;
        assert_eq!(next_about(&mut events, node_id).await, MemberlistEvent::NodeJoin { node_id, raft_addr });
    }

    let mut events = caches[0].memberlist_events().await;
    let seed = gossip_addr(nodes[0].1);
    let (raft_addr, fourth) = joined(4, seed).await?;
    assert_eq!(next_about(&mut events, 4).await, MemberlistEvent::NodeJoin { node_id: 4, raft_addr });

    // It moves: another process under its id, elsewhere, before anybody has missed the first one for long.
    drop(fourth);
    let (new_addr, fourth) = joined(4, seed).await?;
    assert_eq!(next_about(&mut events, 4).await, MemberlistEvent::NodeUpdate { node_id: 4, new_addr });

    drop(fourth);
    assert_eq!(next_about(&mut events, 4).await, MemberlistEvent::NodeFailed { node_id: 4 });

    let (raft_addr, fourth) = joined(4, seed).await?;
    assert_eq!(next_about(&mut events, 4).await, MemberlistEvent::NodeJoin { node_id: 4, raft_addr });

    fourth.shutdown().await?;
    assert_eq!(next_about(&mut events, 4).await, MemberlistEvent::NodeLeave { node_id: 4 });

    // The end of the node is the end of its events.
    stop(caches).await?;
    printer.await?;
    Ok(())
}
