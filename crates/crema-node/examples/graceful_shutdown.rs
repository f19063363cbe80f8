//! A node that is shut down says goodbye and hands its leaderships over; one that is lost has to be missed first.
//!
//! `cargo run -p crema-node --example graceful_shutdown`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, next_about, others, quick};
use crema_node::{CacheConfig, CacheError, MemberlistConfig, MemberlistDiscovery, MemberlistEvent};
use std::time::Instant;

#[tokio::main]
async fn main() -> Outcome {
    let (_, mut caches) = cluster(5, |node_id, raft_addr, nodes| {
        let memberlist = MemberlistConfig::new(gossip_addr(raft_addr)).with_tuning(quick());
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_replicas(5)
    })
    .await?;
    let mut events = caches[0].memberlist_events().await;
    for node_id in [4, 5] {
        let event = next_about(&mut events, node_id).await;
        assert!(matches!(event, MemberlistEvent::NodeJoin { .. }), "{event:?}");
    }

    let fifth = caches.pop().expect("node 5");
    fifth.shutdown().await?;
    let begin = Instant::now();
    assert_eq!(next_about(&mut events, 5).await, MemberlistEvent::NodeLeave { node_id: 5 });
    println!("node 5 has left; heard {:?} after it had stopped", begin.elapsed());
    assert_eq!(fifth.get("key").await, Err(CacheError::Stopped));

    drop(caches.pop().expect("node 4"));
    let begin = Instant::now();
    assert_eq!(next_about(&mut events, 4).await, MemberlistEvent::NodeFailed { node_id: 4 });
    println!("node 4 was lost; it counts as failed after {:?}", begin.elapsed());

    // Three replicas of five are left, and are enough.
    caches[1].put("key", "value").await?;
    assert_eq!(caches[2].get("key").await?.as_deref(), Some(&b"value"[..]));
    // The last ones have nobody to hand anything over to: they just end.
    Ok(())
}
