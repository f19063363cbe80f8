//! Seeds by DNS: what the SRV records of a service name, and hosts by their names, which a node looks up again and again.
//!
//! `cargo run -p crema-node --example dns_seeds`, or with a name of your own: `… --example dns_seeds _crema._udp.example.org`

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod common;

use common::{Outcome, cluster, gossip_addr, others, quick, stop, until};
use crema_node::{CacheConfig, MemberlistConfig, MemberlistDiscovery, ResolveError, SeedAddr, resolve_srv};
use std::time::Duration;

/// Most likely nobody answers to this name here.
const SERVICE: &str = "_crema._tcp.cluster.local";

/// Asks once; an answer takes five seconds at most.
async fn ask(service: &str) -> Outcome {
    match resolve_srv(service).await {
        // In a cluster these are the seeds: `MemberlistConfig::new(bind_addr).with_seeds(seeds)`. Here they are shown and
        // left alone: somebody else's nodes have nothing to do with this example's.
        Ok(seeds) => seeds.iter().for_each(|seed| println!("{service} leads to {seed}")),
        // Trying again does not help.
        Err(error @ ResolveError::Name(_)) => return Err(error.into()),
        // The name server is away, or has no such records yet: a program would try again.
        Err(error) => println!("no seeds by SRV: {error}"),
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Outcome {
    let service = std::env::args().nth(1).unwrap_or_else(|| SERVICE.to_owned());
    ask(&service).await?;

    // A seed may also be the name itself. The node then looks it up, every second until it is found and every 15 seconds
    // from then on, so that it may begin before the records are there, and follows them when they change.
    let by_service: SeedAddr = format!("srv:{SERVICE}").parse()?;
    assert!(matches!(by_service, SeedAddr::Srv(_)));

    // Hosts are followed likewise, and every machine has this one.
    let (_, caches) = cluster(3, |node_id, raft_addr, nodes| {
        let name = |raft| format!("localhost:{}", gossip_addr(raft).port());
        let seeds: Vec<SeedAddr> = nodes.iter().map(|(_, raft)| name(*raft).parse().expect("host:port")).collect();
        assert!(seeds.iter().all(|seed| matches!(seed, SeedAddr::Host { .. })));
        let config = MemberlistConfig::new(gossip_addr(raft_addr)).with_seeds(seeds).with_tuning(quick());
        let seed_nodes = others(nodes, node_id);
        CacheConfig::new(node_id, raft_addr)
            .with_cluster_discovery(MemberlistDiscovery::new(node_id, raft_addr, &config, &seed_nodes))
            .with_seed_nodes(seed_nodes)
            .with_stop_grace(Duration::ZERO)
    })
    .await?;
    for (i, cache) in caches.iter().enumerate() {
        until("everybody to be discovered", async || cache.memberlist_healthy_members().await.len() == 3).await;
        println!("node {} has found the others by their names", i + 1);
    }
    stop(caches).await
}
