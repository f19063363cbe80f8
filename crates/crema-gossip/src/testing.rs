//! What the tests share. Randomness: every run prints its seed, and `CREMA_SEED` repeats one.

use crate::config::GossipConfig;
use crate::rng::SplitMix;
use crate::seed::SeedAddr;
use crate::service::Gossip;
use crate::view::MemberState;
use crema_core::{Incarnation, NodeId};
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::{Instant, sleep};

/// A generator whose seed the test's output names.
pub(crate) struct Rng(SplitMix);

impl Rng {
    pub(crate) fn from_clock() -> Rng {
        let given = std::env::var("CREMA_SEED").ok().and_then(|s| s.parse().ok());
        let seed =
            given.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64));
        // Captured by the harness and shown on failure.
        eprintln!("repeat with CREMA_SEED={seed}");
        Rng(SplitMix::new(seed))
    }
}

impl Deref for Rng {
    type Target = SplitMix;
    fn deref(&self) -> &SplitMix {
        &self.0
    }
}

impl DerefMut for Rng {
    fn deref_mut(&mut self) -> &mut SplitMix {
        &mut self.0
    }
}

/// How many hostile datagrams a test sends: `CREMA_FUZZ`, or 20,000.
pub(crate) fn fuzz_count() -> u32 {
    std::env::var("CREMA_FUZZ").ok().and_then(|s| s.parse().ok()).unwrap_or(20_000)
}

/// Generous, because the machine may be busy; every wait ends as soon as its condition holds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

pub(crate) fn config(node: u64, seeds: &[SocketAddr]) -> GossipConfig {
    let bind = "127.0.0.1:0".parse().unwrap();
    let raft_addr = format!("127.0.0.1:{}", 9000 + node);
    let mut config = GossipConfig::new(NodeId(node), Incarnation(node.into()), raft_addr, "test", bind);
    config.seeds = seeds.iter().copied().map(SeedAddr::from).collect();
    config.interval = Duration::from_millis(50);
    config.initial_interval = Duration::from_millis(50);
    config
}

pub(crate) async fn start(node: u64, seeds: &[SocketAddr]) -> Gossip {
    Gossip::start(config(node, seeds)).await.unwrap()
}

pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "still not so: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn state(gossip: &Gossip, node: u64) -> Option<MemberState> {
    gossip.members().iter().find(|m| m.meta.node_id == NodeId(node)).map(|m| m.state)
}

pub(crate) async fn all_see(all: &[&Gossip], nodes: &[u64]) {
    eventually("all see each other alive", || {
        all.iter().all(|g| nodes.iter().all(|n| state(g, *n) == Some(MemberState::Alive)))
    })
    .await;
}
