//! What nodes tell each other about themselves.
//!
//! `cargo run -p crema-node --example metadata`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, others, stop, until};
use crema_node::cluster::memberlist_cluster::RaftNodeMetadata;
use crema_node::{CacheConfig, MemberlistConfig, MemberlistDiscovery};
use std::time::Duration;

#[tokio::main]
async fn main() -> Outcome {
    let (nodes, caches) = cluster(3, |node_id, raft_addr, nodes| {
        let memberlist_config = MemberlistConfig::new(gossip_addr(raft_addr))
            .with_metadata("region", "us-east-1")
            .with_metadata("rack", format!("rack-{node_id}"));
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist_config, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            // The node's own configuration may describe it too.
            .with_metadata("zone", "a")
            .with_stop_grace(Duration::ZERO)
    })
    .await?;

    let own: RaftNodeMetadata = caches[0].memberlist_metadata();
    println!("node 1 tells: {own:?}");
    assert_eq!((own.node_id, own.raft_addr), nodes[0]);
    assert_eq!(own.custom_metadata.len(), 3);

    let cache = &caches[0];
    until("everybody to be discovered", async || cache.memberlist_healthy_members().await.len() == 3).await;
    for member in cache.memberlist_members().await {
        let heard = RaftNodeMetadata::from(&member);
        println!("node 1 hears: {heard:?}");
        assert_eq!(heard, caches[member.node_id as usize - 1].memberlist_metadata());
        assert_eq!(heard.custom_metadata["rack"], format!("rack-{}", member.node_id));
        assert_eq!((&heard.custom_metadata["region"][..], &heard.custom_metadata["zone"][..]), ("us-east-1", "a"));
    }
    stop(caches).await
}
