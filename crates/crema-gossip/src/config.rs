//! What a node's gossip is told at its start, with defaults and the relations that must hold between the values.

use crate::keys::{KeyError, NodeMeta, encode_node};
use crate::seal::KeyRing;
use crate::seed::{SeedAddr, SeedError};
use crema_core::{Incarnation, NodeId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Most seeds in the configuration.
pub const MAX_SEEDS: usize = 64;
/// Longest cluster name in bytes.
pub const MAX_CLUSTER_BYTES: usize = 128;

/// Configuration of gossip. [`GossipConfig::new`] gives the defaults; all nodes of a cluster should agree on the periods.
#[derive(Clone, Debug, PartialEq)]
pub struct GossipConfig {
    /// This node's id, from 1 on. At any time only one process may run under it.
    pub node_id: NodeId,
    /// The node's present life.
    pub incarnation: Incarnation,
    /// `host:port` where peers connect.
    pub raft_addr: String,
    /// `host:port` of the proxying RESP listener, if there is one.
    pub redis_addr: Option<String>,
    /// `host:port` of the redirecting RESP listener, if there is one.
    pub redis_cluster_addr: Option<String>,
    /// `host:port` of the HTTP admin API, if there is one.
    pub http_addr: Option<String>,
    /// Custom metadata, such as `zone`.
    pub metadata: BTreeMap<String, String>,
    /// Name of the cluster: 1 to 128 printable ASCII characters. Nodes of another name are not heard.
    pub cluster: String,
    /// Where to listen, UDP and TCP. Port 0 picks a free one.
    pub bind: SocketAddr,
    /// Where others reach this node. Must name one address; port 0 stands for the port that was bound. Default: as `bind`.
    pub advertise: SocketAddr,
    /// Where to find the cluster, at most 64; names are looked up again every 15 s. [`SeedAddr::parse_all`] reads them from text.
    pub seeds: Vec<SeedAddr>,
    /// The cluster's keys. With them every datagram is authenticated and encrypted, and none that is not is taken; all nodes
    /// must have them. Default: none.
    pub keys: Option<KeyRing>,
    /// Period of gossip rounds and of the membership's ticks. Default 250 ms; 10 ms to 10 s.
    pub interval: Duration,
    /// How many mean heartbeat intervals of silence make a node suspect. Default 16; 4 to 100. Chitchat's own 8 is only about
    /// three rounds of silence and flaps under load.
    pub phi: f64,
    /// How many heartbeat intervals the mean is taken over. Default 1,000; 10 to 10,000.
    pub window: usize,
    /// What a heartbeat interval is taken to be before any was measured. Default 250 ms; at most ten times `interval`.
    pub initial_interval: Duration,
    /// Longer intervals between heartbeats are outages, not samples. Default 5 s; above `interval`.
    pub max_interval: Duration,
    /// On-time ticks for which a node must be suspect before it is taken as failed. Default 16, 4 s; 1 to 1,000.
    pub dead_ticks: u32,
    /// For how long a dead node is remembered and still tried, half of it also told to others. Default 15 min; at least 1 min
    /// and long enough to notice a death. Longer fills the digest with earlier lives of restarted nodes.
    pub grace: Duration,
    /// Orders the lives of this node: peers ignore a life below one that they have seen. Default (`None`): the wall clock at
    /// the start in nanoseconds.
    pub generation: Option<u64>,
    /// Where the generation is kept, for this life to exceed the one before even if the clock was set back: the larger of
    /// `generation` and the kept one + 1 is written there, durably, and then used. Only one process may use the file; its
    /// directory must exist. Default: nowhere.
    pub generation_file: Option<PathBuf>,
    /// Allows to listen beyond loopback without keys, so that datagrams are neither authenticated nor encrypted. Default false.
    pub insecure: bool,
}

/// A configuration that cannot work; says what to change.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Something about the node that others could not read.
    #[error("gossip: {0}")]
    Node(#[from] KeyError),
    /// The cluster's name.
    #[error("gossip: the cluster name must be 1 to {MAX_CLUSTER_BYTES} printable ASCII characters")]
    Cluster,
    /// An advertised address that others cannot reach.
    #[error("gossip: advertise address {addr}: {reason}")]
    Advertise {
        /// The address.
        addr: SocketAddr,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Listening beyond loopback without keys.
    #[error(
        "gossip: {0} is not a loopback address and there are no cluster keys: anybody who reaches it could feign members; \
         give all nodes a key file, bind to loopback, or allow it explicitly (insecure)"
    )]
    Insecure(SocketAddr),
    /// A seed that cannot be used.
    #[error("gossip: {0}")]
    Seed(#[from] SeedError),
    /// Too many seeds.
    #[error("gossip: more than {MAX_SEEDS} seeds")]
    TooManySeeds,
    /// A period or number out of its range.
    #[error("gossip: {field} must be {range}")]
    Range {
        /// Which value.
        field: &'static str,
        /// What it may be.
        range: &'static str,
    },
}

/// Seeds by kind: chitchat contacts addresses itself, names are ours to resolve.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seeds {
    pub(crate) addrs: Vec<SocketAddr>,
    pub(crate) names: Vec<SeedAddr>,
}

impl GossipConfig {
    /// The defaults for a node that listens at `bind` and is reached there.
    pub fn new(
        node_id: NodeId,
        incarnation: Incarnation,
        raft_addr: impl Into<String>,
        cluster: impl Into<String>,
        bind: SocketAddr,
    ) -> Self {
        GossipConfig {
            node_id,
            incarnation,
            raft_addr: raft_addr.into(),
            redis_addr: None,
            redis_cluster_addr: None,
            http_addr: None,
            metadata: BTreeMap::new(),
            cluster: cluster.into(),
            bind,
            advertise: bind,
            seeds: Vec::new(),
            keys: None,
            interval: Duration::from_millis(250),
            phi: 16.0,
            window: 1_000,
            initial_interval: Duration::from_millis(250),
            max_interval: Duration::from_secs(5),
            dead_ticks: 16,
            grace: Duration::from_secs(15 * 60),
            generation: None,
            generation_file: None,
            insecure: false,
        }
    }

    /// Checks each value and the relations between them.
    ///
    /// Errors: the first value that cannot work, with what to do about it.
    pub fn validate(&self) -> Result<(), ConfigError> {
        encode_node(&self.meta(self.advertise))?;
        let name = self.cluster.as_bytes();
        let printable = name.iter().all(|b| *b == b' ' || b.is_ascii_graphic());
        if !(1..=MAX_CLUSTER_BYTES).contains(&name.len()) || !printable {
            return Err(ConfigError::Cluster);
        }
        if !self.bind.ip().is_loopback() && self.keys.is_none() && !self.insecure {
            return Err(ConfigError::Insecure(self.bind));
        }
        let advertise = |reason| Err(ConfigError::Advertise { addr: self.advertise, reason });
        if self.advertise.ip().is_unspecified() {
            return advertise("names no single host; set the address at which others reach this node");
        }
        if self.advertise.is_ipv4() != self.bind.is_ipv4() {
            return advertise("is not of the same address family as the bind address");
        }
        if self.advertise.port() == 0 && self.bind.port() != 0 {
            return advertise("port 0 cannot be reached");
        }
        self.split_seeds()?;
        self.validate_periods()
    }

    fn validate_periods(&self) -> Result<(), ConfigError> {
        let ms = Duration::from_millis;
        // A death is noticed after the detector's patience and the ticks; a node must not be forgotten before, not even by
        // those who hear of it second-hand during the first half of the grace.
        let silence = self.max_interval.saturating_mul(2).saturating_add(self.interval.saturating_mul(self.dead_ticks));
        let rules = [
            ((ms(10)..=ms(10_000)).contains(&self.interval), "interval", "from 10 ms to 10 s"),
            // The comparison also refuses NaN.
            (self.phi >= 4.0 && self.phi <= 100.0, "phi", "from 4 to 100"),
            ((10..=10_000).contains(&self.window), "window", "from 10 to 10,000"),
            (
                self.initial_interval >= ms(1) && self.initial_interval <= self.interval.saturating_mul(10),
                "initial_interval",
                "at least 1 ms and at most ten times interval",
            ),
            (
                self.max_interval > self.interval && self.max_interval <= ms(60_000),
                "max_interval",
                "above interval and at most 60 s",
            ),
            ((1..=1_000).contains(&self.dead_ticks), "dead_ticks", "from 1 to 1,000"),
            (
                self.grace >= ms(60_000) && self.grace >= silence.saturating_mul(2) && self.grace <= ms(7 * 86_400_000),
                "grace",
                "from 1 min to 7 days, and at least twice (2 * max_interval + dead_ticks * interval)",
            ),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            None => Ok(()),
            Some((_, field, range)) => Err(ConfigError::Range { field, range }),
        }
    }

    /// What this node says about itself when it is reached at `gossip_addr`.
    pub(crate) fn meta(&self, gossip_addr: SocketAddr) -> NodeMeta {
        NodeMeta {
            node_id: self.node_id,
            incarnation: self.incarnation,
            raft_addr: self.raft_addr.clone(),
            redis_addr: self.redis_addr.clone(),
            redis_cluster_addr: self.redis_cluster_addr.clone(),
            http_addr: self.http_addr.clone(),
            gossip_addr,
            metadata: self.metadata.clone(),
        }
    }

    pub(crate) fn split_seeds(&self) -> Result<Seeds, ConfigError> {
        if self.seeds.len() > MAX_SEEDS {
            return Err(ConfigError::TooManySeeds);
        }
        let mut split = Seeds::default();
        for seed in &self.seeds {
            seed.check()?;
            match seed {
                SeedAddr::Ip(addr) if addr.is_ipv4() != self.bind.is_ipv4() => {
                    let reason = "is not of the same address family as the bind address";
                    return Err(SeedError { seed: seed.to_string(), reason }.into());
                }
                SeedAddr::Ip(addr) => split.addrs.push(*addr),
                SeedAddr::Host { .. } | SeedAddr::Srv(_) => split.names.push(seed.clone()),
            }
        }
        Ok(split)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> GossipConfig {
        GossipConfig::new(NodeId(1), Incarnation(1), "127.0.0.1:9001", "crema", "127.0.0.1:8001".parse().unwrap())
    }

    fn refused(change: impl FnOnce(&mut GossipConfig)) -> String {
        let mut config = config();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_valid() {
        config().validate().unwrap();
    }

    #[test]
    fn each_bad_value_is_named() {
        let addr = |s: &str| s.parse::<SocketAddr>().unwrap();
        for (message, part) in [
            (refused(|c| c.node_id = NodeId(0)), "node id"),
            (refused(|c| c.raft_addr = "0.0.0.0:9001".into()), "raft address"),
            (refused(|c| c.cluster = String::new()), "cluster name"),
            (refused(|c| c.cluster = "köln".into()), "cluster name"),
            (refused(|c| c.bind = addr("10.0.0.1:8001")), "10.0.0.1:8001 is not a loopback"),
            (refused(|c| c.advertise = addr("0.0.0.0:8001")), "advertise address 0.0.0.0:8001"),
            (refused(|c| c.advertise = addr("[::1]:8001")), "family"),
            (refused(|c| c.advertise = addr("127.0.0.1:0")), "port 0"),
            (refused(|c| c.seeds = vec![SeedAddr::Srv("nowhere".into())]), "seed \"srv:nowhere\""),
            (refused(|c| c.seeds = vec!["[::1]:8001".parse().unwrap()]), "family"),
            (refused(|c| c.seeds = vec!["a:1".parse().unwrap(); 65]), "64 seeds"),
            (refused(|c| c.interval = Duration::ZERO), "interval"),
            (refused(|c| c.interval = Duration::MAX), "interval"),
            (refused(|c| c.interval = Duration::from_secs(5)), "max_interval"),
            (refused(|c| c.phi = f64::NAN), "phi"),
            (refused(|c| c.phi = f64::INFINITY), "phi"),
            (refused(|c| c.window = 0), "window"),
            (refused(|c| c.initial_interval = Duration::from_secs(3)), "initial_interval"),
            (refused(|c| c.initial_interval = Duration::ZERO), "initial_interval"),
            (refused(|c| c.max_interval = Duration::from_millis(250)), "max_interval"),
            (refused(|c| c.max_interval = Duration::MAX), "max_interval"),
            (refused(|c| c.dead_ticks = 0), "dead_ticks"),
            (refused(|c| c.dead_ticks = u32::MAX), "dead_ticks"),
            (refused(|c| c.grace = Duration::from_secs(1)), "grace"),
            (refused(|c| c.grace = Duration::MAX), "grace"),
            (refused(|c| (c.dead_ticks, c.grace) = (1_000, Duration::from_secs(300))), "grace"),
        ] {
            assert!(message.contains(part), "{message:?} should name {part:?}");
        }
    }

    #[test]
    fn seeds_are_addresses_or_names() {
        let mut config = config();
        config.seeds = SeedAddr::parse_all(["127.0.0.1:1", "crema-headless:8000", "srv:_crema._udp.x"]).unwrap();
        let seeds = config.split_seeds().unwrap();
        assert_eq!(seeds.addrs, ["127.0.0.1:1".parse().unwrap()]);
        assert_eq!(seeds.names, config.seeds[1..]);
    }

    #[test]
    fn insecure_allows_other_addresses() {
        let mut config = config();
        config.insecure = true;
        config.bind = "0.0.0.0:8001".parse().unwrap();
        config.advertise = "10.0.0.1:8001".parse().unwrap();
        config.validate().unwrap();
    }
}
