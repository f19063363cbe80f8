//! What the examples share: a small cluster on this machine, on ports that are free, and waiting with an end.

// Each example uses a part of it.
#![allow(dead_code, reason = "shared by examples that need different parts")]

use crema_node::node::StartError;
use crema_node::{CacheConfig, CacheError, DistributedCache, EventReceiver, GossipTuning, MemberlistEvent, NodeId};
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

/// What an example's `main` returns.
pub(crate) type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Nodes of one cluster and their Raft addresses.
pub(crate) type Nodes = Vec<(NodeId, SocketAddr)>;

/// Nothing in an example takes longer, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Ports are free when they are chosen; others may take them before the nodes do.
const ATTEMPTS: usize = 20;

/// Gossip that is quicker than a production cluster's, so that an example need not wait for failures: five times the pace.
pub(crate) fn quick() -> GossipTuning {
    GossipTuning { interval: Duration::from_millis(50), dead_ticks: 40, ..GossipTuning::default() }
}

/// Where a node with this Raft address gossips, as `MemberlistConfig` has it by default.
pub(crate) fn gossip_addr(raft: SocketAddr) -> SocketAddr {
    SocketAddr::new(raft.ip(), raft.port() - 1000)
}

/// Addresses for nodes with these ids: on loopback, free for Raft, and, 1000 below, for gossip.
pub(crate) fn free_nodes(ids: impl IntoIterator<Item = NodeId>) -> Nodes {
    // All are held until the last is found, so that no two are alike.
    let mut held = Vec::new();
    let mut nodes = Nodes::new();
    for id in ids {
        let addr = loop {
            let raft = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a free port");
            let addr = raft.local_addr().expect("it is bound");
            let below = addr.port().checked_sub(1000).filter(|port| *port > 1024);
            // A node that gossips everywhere needs the port everywhere, and for streams as for datagrams.
            let gossip = below.map(|port| (Ipv4Addr::UNSPECIFIED, port));
            if let Some((Ok(datagrams), Ok(streams))) = gossip.map(|a| (UdpSocket::bind(a), TcpListener::bind(a))) {
                held.push((raft, datagrams, streams));
                break addr;
            }
        };
        nodes.push((id, addr));
    }
    nodes
}

/// Starts one node, on other ports if these were taken meanwhile; says which it has.
pub(crate) async fn start(
    id: NodeId,
    config: impl Fn(SocketAddr) -> CacheConfig,
) -> Outcome<(SocketAddr, DistributedCache)> {
    for _ in 0..ATTEMPTS {
        let addr = free_nodes([id])[0].1;
        match DistributedCache::new(config(addr)).await {
            Err(CacheError::Start(StartError::Bind { .. })) => {}
            started => return Ok((addr, started?)),
        }
    }
    Err("no free ports".into())
}

/// Starts nodes 1 to `size`, each as `config` says for its id, its Raft address and all nodes, and waits until all are ready.
pub(crate) async fn cluster(
    size: NodeId,
    config: impl Fn(NodeId, SocketAddr, &Nodes) -> CacheConfig,
) -> Outcome<(Nodes, Vec<DistributedCache>)> {
    'again: for _ in 0..ATTEMPTS {
        let nodes = free_nodes(1..=size);
        let mut caches = Vec::new();
        for (id, addr) in &nodes {
            match DistributedCache::new(config(*id, *addr, &nodes)).await {
                Err(CacheError::Start(StartError::Bind { .. })) => continue 'again,
                started => caches.push(started?),
            }
        }
        for cache in &caches {
            cache.wait_until_ready(PATIENCE).await?;
        }
        return Ok((nodes, caches));
    }
    Err("no free ports".into())
}

/// All nodes but the one with this id.
pub(crate) fn others(nodes: &Nodes, id: NodeId) -> Nodes {
    nodes.iter().copied().filter(|(other, _)| *other != id).collect()
}

/// Waits until the condition holds.
pub(crate) async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let holds = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(what, holds).await;
}

/// Waits for the future, which should not take long.
pub(crate) async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(done) => done,
        Err(_) => panic!("waited {PATIENCE:?} for {what}"),
    }
}

/// The next event about a node; what happens to others is passed over.
pub(crate) async fn next_about(events: &mut EventReceiver, node: NodeId) -> MemberlistEvent {
    let find = async {
        loop {
            let event = events.recv().await.expect("the node runs");
            let about = match event {
                MemberlistEvent::NodeJoin { node_id, .. }
                | MemberlistEvent::NodeLeave { node_id }
                | MemberlistEvent::NodeFailed { node_id }
                | MemberlistEvent::NodeUpdate { node_id, .. } => node_id,
            };
            if about == node {
                return event;
            }
        }
    };
    within("an event", find).await
}

/// Stops all nodes at once: nobody is left for whom leaderships would have to be handed over.
pub(crate) async fn stop(caches: Vec<DistributedCache>) -> Outcome {
    let mut stopping = tokio::task::JoinSet::new();
    for cache in caches {
        stopping.spawn(async move { cache.shutdown().await });
    }
    while let Some(stopped) = stopping.join_next().await {
        stopped??;
    }
    Ok(())
}
