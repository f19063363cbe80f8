//! How soon a silent node counts as failed is a matter of tuning: sooner, or with more patience.
//!
//! `cargo run -p crema-node --example tuning`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, next_about, others, stop};
use crema_node::{
    CacheConfig, CacheError, DistributedCache, GossipTuning, MemberlistConfig, MemberlistDiscovery, MemberlistEvent,
};
use std::time::{Duration, Instant};

/// How long node 1 takes to count a lost node 3 as failed.
async fn time_to_failure(tuning: GossipTuning) -> Outcome<Duration> {
    let (_, mut caches) = cluster(3, |node_id, raft_addr, nodes| {
        let memberlist = MemberlistConfig::new(gossip_addr(raft_addr)).with_tuning(tuning);
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_stop_grace(Duration::ZERO)
    })
    .await?;
    let mut events = caches[0].memberlist_events().await;
    let event = next_about(&mut events, 3).await;
    assert!(matches!(event, MemberlistEvent::NodeJoin { .. }), "{event:?}");
    drop(caches.pop());
    let begin = Instant::now();
    assert_eq!(next_about(&mut events, 3).await, MemberlistEvent::NodeFailed { node_id: 3 });
    let took = begin.elapsed();
    stop(caches).await?;
    Ok(took)
}

#[tokio::main]
async fn main() -> Outcome {
    let quick = GossipTuning { interval: Duration::from_millis(50), dead_ticks: 20, ..GossipTuning::default() };
    let patient = GossipTuning { dead_ticks: 80, ..quick };
    let (quick, patient) = (time_to_failure(quick).await?, time_to_failure(patient).await?);
    println!("a lost node counts as failed after {quick:?}; with four times the patience after {patient:?}");
    // At least the ticks for which it must have been suspect.
    assert!(quick >= Duration::from_secs(1) && patient >= Duration::from_secs(4), "{quick:?} {patient:?}");

    let raft_addr = "127.0.0.1:9001".parse()?;
    let hectic = GossipTuning { interval: Duration::from_millis(1), ..GossipTuning::default() };
    let memberlist = MemberlistConfig { enabled: true, tuning: hectic, ..Default::default() };
    let config =
        CacheConfig::new(1, raft_addr).with_cluster_discovery(MemberlistDiscovery::new(1, raft_addr, &memberlist, &[]));
    let Err(CacheError::Invalid(reason)) = DistributedCache::new(config).await else { panic!("too hectic") };
    println!("refused: {reason}");
    Ok(())
}
