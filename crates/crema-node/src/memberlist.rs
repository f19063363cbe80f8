//! Discovery by gossip, as an embedding program configures it and looks at it.
//!
//! ```text
//!   MemberlistConfig --MemberlistDiscovery--> CacheConfig --resolve--> BindAddrs::gossip, seeds, GossipOptions --> node
//!   node: gossip (or placement) --MemberBody--> Member      gossip --MemberEvent--> EventReceiver --> MemberlistEvent
//! ```
//!
//! Gossip finds nodes, describes and suspects them. It decides nothing: who holds data and who votes is for the cluster's
//! own table, which only Raft changes. During a partition gossip may take nodes on both sides for alive, or for dead; the data
//! does not mind, because a majority counts for it and not what is heard.
//!
//! ```no_run
//! use crema_node::{CacheConfig, DistributedCache, MemberlistConfig, MemberlistDiscovery, MemberlistEvent};
//!
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! let (node_id, raft_addr) = (1, "127.0.0.1:9001".parse()?);
//! let seed_nodes = vec![(2, "127.0.0.1:9002".parse()?), (3, "127.0.0.1:9003".parse()?)];
//!
//! // Gossip listens on UDP and on TCP. Seeds are its addresses: ip:port, host:port, or srv:name.
//! let memberlist = MemberlistConfig::new("127.0.0.1:8001".parse()?)
//!     .with_seeds(vec!["127.0.0.1:8002".parse()?, "127.0.0.1:8003".parse()?])
//!     .with_metadata("zone", "a");
//! let discovery = MemberlistDiscovery::new(node_id, raft_addr, &memberlist, &seed_nodes);
//! let config = CacheConfig::new(node_id, raft_addr).with_seed_nodes(seed_nodes).with_cluster_discovery(discovery);
//! let cache = DistributedCache::new(config).await?;
//!
//! let mut events = cache.memberlist_events().await;
//! while let Some(event) = events.recv().await {
//!     match event {
//!         MemberlistEvent::NodeJoin { node_id, raft_addr } => println!("node {node_id} is at {raft_addr}"),
//!         MemberlistEvent::NodeLeave { node_id } => println!("node {node_id} has left"),
//!         MemberlistEvent::NodeFailed { node_id } => println!("node {node_id} is not heard any more"),
//!         MemberlistEvent::NodeUpdate { node_id, new_addr } => println!("node {node_id} is now at {new_addr}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A node that lists only itself reaches no seed, or is not listened to. Warnings in the log tell of a seed's name that is not
//! found, of seeds of which none answers for half a minute, and of nodes with other keys or of a cluster of another name. A
//! firewall drops in silence, and gossip needs both UDP and TCP. Members that fail and come back again and again are a network,
//! or a machine, that is too slow for the pace: see [`GossipTuning`].

use crate::admin::MemberBody;
use crate::cache::{NodeId, ShardId};
use crate::node::GossipOptions;
use crema_gossip::MemberEvent;
use crema_gossip::SeedAddr;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::time::Instant;

/// The gossip port of a node is its Raft port less this, where nothing else is said.
pub const GOSSIP_PORT_BELOW_RAFT: u16 = 1000;
/// Name of the metadata entry that carries [`MemberlistConfig::node_name`].
pub const NAME_KEY: &str = "name";
/// Longest time to look names up for the addresses of a list of members.
pub(crate) const LOOKUP_LIMIT: Duration = Duration::from_secs(2);

/// How a node finds the others by gossip. Every field may be set; the rest is filled by `..Default::default()`.
///
/// Nothing is checked before [`crate::DistributedCache::new`].
#[derive(Clone, Debug, PartialEq, Default)]
pub struct MemberlistConfig {
    /// Whether to gossip at all. Default: false. Without, only seed nodes and nodes of the cluster's table are known, and nothing
    /// else of this structure counts.
    pub enabled: bool,
    /// Where gossip listens (UDP and TCP). Default: the Raft address with its port less 1000.
    pub bind_addr: Option<SocketAddr>,
    /// Where others reach this node's gossip, if not at `bind_addr`: behind NAT, or when bound to all interfaces. If the Raft
    /// address is unspecified (`0.0.0.0`), this one's IP with the Raft port is where others reach that. Default: `bind_addr`,
    /// or, if that is unspecified, the Raft address' IP with its port.
    pub advertise_addr: Option<SocketAddr>,
    /// Gossip addresses of some other nodes, at most 64; one that answers is enough to find all. Default, empty: those of the
    /// seed nodes, at their Raft ports less 1000.
    pub seed_addrs: Vec<SeedAddr>,
    /// What people call this node. The others see it as [`Member::name`], and as the metadata entry `name`.
    pub node_name: Option<String>,
    /// What a discovered node leads to.
    pub peer_management: PeerManagementConfig,
    /// Free description of this node, told to all others: at most 32 entries of printable ASCII, names of at most 64 bytes,
    /// values of at most 1024.
    pub metadata: BTreeMap<String, String>,
    /// Pace and patience of gossip.
    pub tuning: GossipTuning,
}

impl MemberlistConfig {
    /// Gossip that is enabled and listens at `bind_addr`.
    pub fn new(bind_addr: SocketAddr) -> Self {
        MemberlistConfig { enabled: true, bind_addr: Some(bind_addr), ..MemberlistConfig::default() }
    }

    /// Replaces the seeds.
    pub fn with_seeds(mut self, seeds: Vec<SeedAddr>) -> Self {
        self.seed_addrs = seeds;
        self
    }

    /// Adds an entry of metadata; a later one of the same name replaces it.
    pub fn with_metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(name.into(), value.into());
        self
    }

    /// Says where others reach this node's gossip, see [`MemberlistConfig::advertise_addr`].
    pub fn with_advertise_addr(mut self, addr: SocketAddr) -> Self {
        self.advertise_addr = Some(addr);
        self
    }

    /// Names the node.
    pub fn with_node_name(mut self, name: impl Into<String>) -> Self {
        self.node_name = Some(name.into());
        self
    }

    /// Replaces what a discovered node leads to.
    pub fn with_peer_management(mut self, peer_management: PeerManagementConfig) -> Self {
        self.peer_management = peer_management;
        self
    }

    /// Replaces pace and patience of gossip.
    pub fn with_tuning(mut self, tuning: GossipTuning) -> Self {
        self.tuning = tuning;
        self
    }
}

/// What a discovered node leads to. Discovery alone never changes who votes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerManagementConfig {
    /// Connect to every discovered node. Default: true. Otherwise only to the seed nodes and to nodes that the cluster has
    /// approved.
    pub auto_add_peers: bool,
    /// Give up connecting to a discovered node that has failed, until it is heard again. Seed nodes and nodes of the cluster's
    /// table are tried for ever. Default: false.
    pub auto_remove_peers: bool,
    /// Approve a discovered node as a voter once it has been there for [`crate::CacheConfig::with_auto_voters_after`], unless
    /// it was removed by [`crate::DistributedCache::remove_peer`]. Needs `auto_add_peers`. Default: false. **Do not set this in production** unless you
    /// understand what a cluster does that reshapes itself while the network is in trouble. The leader of the cluster's own
    /// group decides by whom it reaches, never gossip; set it alike on all nodes.
    pub auto_add_voters: bool,
    /// Take the approval of a node back that has been away for so long: one at a time, only while enough others answer to
    /// take all of its replicas over, and never where that would break a quorum. Default: false, with the same warning.
    pub auto_remove_voters: bool,
}

impl Default for PeerManagementConfig {
    fn default() -> Self {
        PeerManagementConfig {
            auto_add_peers: true,
            auto_remove_peers: false,
            auto_add_voters: false,
            auto_remove_voters: false,
        }
    }
}

/// Pace and patience of gossip. All nodes of a cluster should agree on them.
///
/// With the defaults a node that falls silent is suspect after about 2 to 4 s, later where nodes are many, and counts as failed
/// 4 s after that: 5 to 8 s after it was killed. Shorter periods find failures sooner, and take a busy node for a failed one
/// sooner.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GossipTuning {
    /// Period of gossip rounds, 10 ms to 10 s. Default: 250 ms.
    pub interval: Duration,
    /// How many mean intervals between a node's heartbeats may pass in silence before it is suspect, 4 to 100. Default: 16.
    pub phi: f64,
    /// Over how many heartbeats the mean is taken, 10 to 10,000. Default: 1,000.
    pub window: usize,
    /// An interval between heartbeats longer than this is an outage and not a sample, above `interval` and at most
    /// 60 s. Default: 5 s.
    pub max_interval: Duration,
    /// After so many rounds as a suspect a node counts as failed, 1 to 1,000. Default: 16.
    pub dead_ticks: u32,
    /// How long a failed node is remembered and still tried, 1 min to 7 days. Default: 15 min.
    pub grace: Duration,
}

impl Default for GossipTuning {
    fn default() -> Self {
        GossipTuning {
            interval: Duration::from_millis(250),
            phi: 16.0,
            window: 1_000,
            max_interval: Duration::from_secs(5),
            dead_ticks: 16,
            grace: Duration::from_secs(15 * 60),
        }
    }
}

impl GossipTuning {
    pub(crate) fn apply(&self, gossip: &mut crema_gossip::GossipConfig) {
        gossip.interval = self.interval;
        gossip.phi = self.phi;
        gossip.window = self.window;
        // The best guess before anything was measured.
        gossip.initial_interval = self.interval;
        gossip.max_interval = self.max_interval;
        gossip.dead_ticks = self.dead_ticks;
        gossip.grace = self.grace;
    }
}

/// Discovery for one node: its configuration, and whom it knows from the beginning. Hand it to
/// [`crate::CacheConfig::with_cluster_discovery`].
#[derive(Clone, Debug)]
pub struct MemberlistDiscovery {
    node_id: NodeId,
    raft_addr: SocketAddr,
    config: MemberlistConfig,
    seed_nodes: Vec<(NodeId, SocketAddr)>,
}

impl MemberlistDiscovery {
    /// Discovery for node `node_id` with Raft address `raft_addr`, the same as in its [`crate::CacheConfig`]. `seed_nodes` are
    /// nodes and their Raft addresses that are connected to from the start; they become members of the cluster only by
    /// [`crate::CacheConfig::with_seed_nodes`].
    pub fn new(
        node_id: NodeId,
        raft_addr: SocketAddr,
        config: &MemberlistConfig,
        seed_nodes: &[(NodeId, SocketAddr)],
    ) -> Self {
        MemberlistDiscovery { node_id, raft_addr, config: config.clone(), seed_nodes: seed_nodes.to_vec() }
    }

    /// What it was made with.
    pub fn config(&self) -> &MemberlistConfig {
        &self.config
    }

    pub(crate) fn seed_nodes(&self) -> &[(NodeId, SocketAddr)] {
        &self.seed_nodes
    }

    /// What the node does with it; `None` if it is not enabled. `peers` are all other nodes known from the beginning.
    ///
    /// Errors: what cannot work, as a sentence.
    pub(crate) fn resolve(
        &self,
        node_id: NodeId,
        raft_addr: SocketAddr,
        peers: &[(NodeId, SocketAddr)],
    ) -> Result<Option<GossipSetup>, String> {
        if (self.node_id, self.raft_addr) != (node_id, raft_addr) {
            return Err(format!(
                "the discovery is that of node {} at {}, but the node is {node_id} at {raft_addr}: give both the same",
                self.node_id, self.raft_addr
            ));
        }
        let config = &self.config;
        let PeerManagementConfig { auto_add_peers, auto_remove_peers, auto_add_voters, auto_remove_voters } =
            config.peer_management;
        if !config.enabled {
            return Ok(None);
        }
        if auto_add_voters && !auto_add_peers {
            return Err(
                "auto_add_voters needs auto_add_peers: a discovered node that nobody connects to cannot join, and so \
                        cannot become a voter by itself; set both, or name who shall become one with add_peer"
                    .to_owned(),
            );
        }
        let bind = match config.bind_addr {
            Some(addr) => addr,
            None => gossip_addr(raft_addr).map_err(|e| format!("{e}: set bind_addr"))?,
        };
        let advertise = match config.advertise_addr {
            Some(addr) => addr,
            // The Raft address is where others reach this machine, by definition.
            None if bind.ip().is_unspecified() => SocketAddr::new(raft_addr.ip(), bind.port()),
            None => bind,
        };
        if advertise.ip().is_unspecified() {
            return Err(format!(
                "others cannot connect to {advertise}: set advertise_addr to where they reach this node"
            ));
        }
        let seeds = if config.seed_addrs.is_empty() {
            let derived = peers.iter().map(|(_, addr)| gossip_addr(*addr).map(SeedAddr::from));
            derived.collect::<Result<_, _>>().map_err(|e| format!("{e}: set seed_addrs"))?
        } else {
            config.seed_addrs.clone()
        };
        let mut metadata = config.metadata.clone();
        if let Some(name) = &config.node_name
            && metadata.insert(NAME_KEY.to_owned(), name.clone()).is_some_and(|other| other != *name)
        {
            return Err(format!(
                "node_name is told as the metadata entry {NAME_KEY:?}, which is set to something else"
            ));
        }
        let raft_host = config.advertise_addr.map(|addr| addr.ip()).filter(|_| raft_addr.ip().is_unspecified());
        let options =
            GossipOptions { advertise: Some(advertise), auto_add_peers, auto_remove_peers, tuning: config.tuning };
        let auto_voters = (auto_add_voters, auto_remove_voters);
        Ok(Some(GossipSetup { bind, seeds, metadata, raft_host, options, auto_voters }))
    }
}

/// What a node does with a [`MemberlistDiscovery`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct GossipSetup {
    pub(crate) bind: SocketAddr,
    pub(crate) seeds: Vec<SeedAddr>,
    pub(crate) metadata: BTreeMap<String, String>,
    /// Where others reach a Raft address that is bound to all interfaces.
    pub(crate) raft_host: Option<IpAddr>,
    pub(crate) options: GossipOptions,
    /// Whether voters are added and removed by themselves.
    pub(crate) auto_voters: (bool, bool),
}

/// Where a node gossips whose Raft address is all that is known. A port that the system chooses stays one.
fn gossip_addr(raft: SocketAddr) -> Result<SocketAddr, String> {
    match raft.port() {
        0 => Ok(raft),
        port if port > GOSSIP_PORT_BELOW_RAFT => Ok(SocketAddr::new(raft.ip(), port - GOSSIP_PORT_BELOW_RAFT)),
        _ => Err(format!("no gossip port lies {GOSSIP_PORT_BELOW_RAFT} below that of {raft}")),
    }
}

/// How a member stands, as this node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemberState {
    /// It is heard.
    Alive,
    /// It has been silent for a while: it may be failing, or cut off.
    Suspect,
    /// It stayed silent: it counts as failed.
    Dead,
    /// It said goodbye.
    Left,
}

/// A node that this one knows.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Member {
    /// Its id.
    pub node_id: NodeId,
    /// Where peers connect to it. A node that tells a host name stands here with the address that gossip reaches it at, or
    /// that the name has just now; with `0.0.0.0` if it has none.
    pub raft_addr: SocketAddr,
    /// How it stands.
    pub state: MemberState,
    /// What people call it.
    pub name: Option<String>,
    /// Where gossip reaches it; none if this node does not gossip.
    pub gossip_addr: Option<SocketAddr>,
    /// Its free description, `name` included; empty but for this node's own if this node does not gossip.
    pub metadata: BTreeMap<String, String>,
    /// Its present life, in hexadecimal: another one after each restart that lost its memory.
    pub incarnation: String,
    /// Whether the cluster lets it hold data and vote.
    pub voter: bool,
    /// Whether this node has a working connection to it; true for itself.
    pub connected: bool,
}

impl Member {
    /// What the admin API knows, in this API's types. A name is looked up until `until` at the longest.
    pub(crate) async fn of(body: MemberBody, until: Instant) -> Member {
        let gossip_addr: Option<SocketAddr> = body.gossip_addr.and_then(|addr| addr.parse().ok());
        let raft_addr = match socket_addr(&body.raft_addr, gossip_addr) {
            Some(addr) => addr,
            None => look_up(&body.raft_addr, until).await,
        };
        Member {
            node_id: body.node_id,
            raft_addr,
            state: match body.state.as_str() {
                "alive" => MemberState::Alive,
                "suspect" => MemberState::Suspect,
                "left" => MemberState::Left,
                _ => MemberState::Dead,
            },
            name: body.metadata.get(NAME_KEY).cloned(),
            gossip_addr,
            metadata: body.metadata,
            incarnation: body.incarnation,
            voter: body.voter,
            connected: body.connected,
        }
    }
}

/// The port of `host:port`; 0 if there is none.
fn port_of(addr: &str) -> u16 {
    addr.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0)
}

/// An address that was told as `host:port`. A name stands for the machine that gossips.
pub(crate) fn socket_addr(told: &str, gossip: Option<SocketAddr>) -> Option<SocketAddr> {
    told.parse().ok().or_else(|| gossip.map(|gossip| SocketAddr::new(gossip.ip(), port_of(told))))
}

async fn look_up(told: &str, until: Instant) -> SocketAddr {
    let found = tokio::time::timeout_at(until, tokio::net::lookup_host(told)).await;
    let first = found.ok().and_then(Result::ok).and_then(|mut addrs| addrs.next());
    first.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port_of(told))))
}

/// Something that happened to a member, as this node sees it. For every node they form the sequence join, any number of updates,
/// then leave, failed, or failed and leave; then join again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberlistEvent {
    /// The node is alive: for the first time, or again.
    NodeJoin {
        /// The node.
        node_id: NodeId,
        /// Where peers connect to it.
        raft_addr: SocketAddr,
    },
    /// The node said goodbye.
    NodeLeave {
        /// The node.
        node_id: NodeId,
    },
    /// The node stayed silent for too long.
    NodeFailed {
        /// The node.
        node_id: NodeId,
    },
    /// The node is reached elsewhere from now on.
    NodeUpdate {
        /// The node.
        node_id: NodeId,
        /// Where peers connect to it now.
        new_addr: SocketAddr,
    },
}

impl From<MemberEvent> for MemberlistEvent {
    /// The node has put numbers in the place of names; what is no address all the same has none.
    fn from(event: MemberEvent) -> Self {
        let addr = |told: String| {
            socket_addr(&told, None).unwrap_or_else(|| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port_of(&told))))
        };
        match event {
            MemberEvent::Join { node, raft_addr } => {
                MemberlistEvent::NodeJoin { node_id: node.0, raft_addr: addr(raft_addr) }
            }
            MemberEvent::Leave { node } => MemberlistEvent::NodeLeave { node_id: node.0 },
            MemberEvent::Failed { node } => MemberlistEvent::NodeFailed { node_id: node.0 },
            MemberEvent::Update { node, raft_addr } => {
                MemberlistEvent::NodeUpdate { node_id: node.0, new_addr: addr(raft_addr) }
            }
        }
    }
}

/// Membership events for one caller, independent of all others: first a join for each live member, this node included.
///
/// It holds nobody up. A caller that falls some four thousand events behind gets at most one event a node in their place, which
/// leads to the same end.
#[derive(Debug)]
pub struct EventReceiver {
    events: crema_gossip::EventReceiver,
}

impl EventReceiver {
    pub(crate) fn new(events: crema_gossip::EventReceiver) -> Self {
        EventReceiver { events }
    }

    /// The next event; `None` once the node has stopped and all were read. Cancel-safe.
    pub async fn recv(&mut self) -> Option<MemberlistEvent> {
        self.events.recv().await.map(MemberlistEvent::from)
    }

    /// The next event if one waits.
    pub fn try_recv(&mut self) -> Option<MemberlistEvent> {
        self.events.try_recv().map(MemberlistEvent::from)
    }
}

/// What a node tells the others about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftNodeMetadata {
    /// The node.
    pub node_id: NodeId,
    /// Where peers connect to it.
    pub raft_addr: SocketAddr,
    /// Its free description.
    pub custom_metadata: HashMap<String, String>,
}

impl From<&Member> for RaftNodeMetadata {
    fn from(member: &Member) -> Self {
        RaftNodeMetadata {
            node_id: member.node_id,
            raft_addr: member.raft_addr,
            custom_metadata: member.metadata.clone().into_iter().collect(),
        }
    }
}

/// What is known about a shard's leader: what its node tells the others by gossip, and what routing has learned besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardLeaderInfo {
    /// The shard.
    pub shard_id: ShardId,
    /// The node that leads it; none if nobody is known to.
    pub leader: Option<NodeId>,
    /// The Raft term in which it does. Of two claims the one with the higher term is right.
    pub term: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::NodeId as Id;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn resolve(raft: &str, config: MemberlistConfig, peers: &[(NodeId, SocketAddr)]) -> Result<GossipSetup, String> {
        let discovery = MemberlistDiscovery::new(1, addr(raft), &config, peers);
        discovery.resolve(1, addr(raft), peers).map(|setup| setup.expect("enabled"))
    }

    fn enabled() -> MemberlistConfig {
        MemberlistConfig { enabled: true, ..MemberlistConfig::default() }
    }

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let config = MemberlistConfig::default();
        assert!(!config.enabled && config.seed_addrs.is_empty() && config.metadata.is_empty());
        assert_eq!((config.bind_addr, config.advertise_addr, &config.node_name), (None, None, &None));
        let peers = PeerManagementConfig::default();
        assert!(peers.auto_add_peers);
        assert!(!peers.auto_remove_peers && !peers.auto_add_voters && !peers.auto_remove_voters);
        let discovery = MemberlistDiscovery::new(1, addr("127.0.0.1:9001"), &config, &[]);
        assert_eq!(discovery.resolve(1, addr("127.0.0.1:9001"), &[]), Ok(None), "off unless enabled");
        let built = MemberlistConfig::new(addr("127.0.0.1:8001"))
            .with_metadata("rack", "1")
            .with_metadata("rack", "2")
            .with_advertise_addr(addr("127.0.0.2:8001"));
        assert!(built.enabled);
        assert_eq!(
            (built.bind_addr, built.advertise_addr),
            (Some(addr("127.0.0.1:8001")), Some(addr("127.0.0.2:8001")))
        );
        assert_eq!(built.metadata["rack"], "2");
    }

    #[test]
    fn tuning_has_the_defaults_of_gossip() {
        let bind = addr("127.0.0.1:8001");
        let defaults = crema_gossip::GossipConfig::new(Id(1), crema_core::Incarnation(1), "127.0.0.1:9001", "c", bind);
        let mut tuned = defaults.clone();
        GossipTuning::default().apply(&mut tuned);
        assert_eq!(tuned, defaults);
    }

    #[test]
    fn addresses_follow_from_the_raft_addresses() {
        let peers = [(2, addr("127.0.0.1:9002")), (3, addr("10.0.0.3:9003"))];
        let setup = resolve("127.0.0.1:9001", enabled(), &peers).unwrap();
        assert_eq!(setup.bind, addr("127.0.0.1:8001"));
        assert_eq!(setup.options.advertise, Some(setup.bind));
        assert_eq!(setup.seeds, [addr("127.0.0.1:8002").into(), addr("10.0.0.3:8003").into()]);
        assert_eq!(setup.raft_host, None);
        // A port that the system chooses.
        assert_eq!(resolve("127.0.0.1:0", enabled(), &[]).unwrap().bind, addr("127.0.0.1:0"));
        // What is named counts.
        let named = MemberlistConfig {
            bind_addr: Some(addr("127.0.0.1:7")),
            seed_addrs: vec!["crema-headless:8000".parse().unwrap()],
            ..enabled()
        };
        let setup = resolve("127.0.0.1:9001", named, &[(2, addr("127.0.0.1:1"))]).unwrap();
        assert_eq!((setup.bind, setup.seeds), (addr("127.0.0.1:7"), vec!["crema-headless:8000".parse().unwrap()]));
    }

    #[test]
    fn an_address_of_all_interfaces_is_told_as_one_that_can_be_reached() {
        let everywhere = MemberlistConfig { bind_addr: Some(addr("0.0.0.0:8000")), ..enabled() };
        let setup = resolve("10.0.0.5:9000", everywhere.clone(), &[]).unwrap();
        assert_eq!((setup.bind, setup.options.advertise), (addr("0.0.0.0:8000"), Some(addr("10.0.0.5:8000"))));
        let public = everywhere.clone().with_advertise_addr(addr("203.0.113.10:8000"));
        let setup = resolve("10.0.0.5:9000", public.clone(), &[]).unwrap();
        assert_eq!((setup.options.advertise, setup.raft_host), (Some(addr("203.0.113.10:8000")), None));
        let setup = resolve("0.0.0.0:9000", public, &[]).unwrap();
        assert_eq!(setup.raft_host, Some("203.0.113.10".parse().unwrap()));
        let error = resolve("0.0.0.0:9000", everywhere, &[]).unwrap_err();
        assert!(error.contains("set advertise_addr"), "{error}");
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_do() {
        let named = enabled().with_node_name("a").with_metadata("name", "b");
        for (raft, config, peers, part) in [
            ("127.0.0.1:1000", enabled(), vec![], "set bind_addr"),
            ("127.0.0.1:9001", enabled(), vec![(2, addr("127.0.0.1:999"))], "set seed_addrs"),
            ("127.0.0.1:9001", named, vec![], "node_name"),
        ] {
            let error = resolve(raft, config, &peers).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let same = enabled().with_node_name("a").with_metadata("name", "a");
        assert_eq!(resolve("127.0.0.1:9001", same, &[]).unwrap().metadata["name"], "a");
        let discovery = MemberlistDiscovery::new(2, addr("127.0.0.1:9002"), &enabled(), &[]);
        let error = discovery.resolve(1, addr("127.0.0.1:9001"), &[]).unwrap_err();
        assert!(error.contains("node 2 at 127.0.0.1:9002") && error.contains("1 at 127.0.0.1:9001"), "{error}");
    }

    fn body() -> MemberBody {
        MemberBody {
            node_id: 2,
            state: "suspect".to_owned(),
            raft_addr: "10.0.0.2:9002".to_owned(),
            voter: true,
            incarnation: "ab".to_owned(),
            registered: None,
            metadata: BTreeMap::from([("name".to_owned(), "b".to_owned()), ("zone".to_owned(), "z".to_owned())]),
            connected: false,
            draining: false,
            gossip_addr: Some("10.0.0.9:8002".to_owned()),
            redis_addr: None,
            redis_cluster_addr: None,
            http_addr: None,
        }
    }

    #[tokio::test]
    async fn members_have_addresses_whatever_they_tell() {
        let soon = Instant::now() + LOOKUP_LIMIT;
        let member = Member::of(body(), soon).await;
        assert_eq!((member.node_id, member.raft_addr, member.state), (2, addr("10.0.0.2:9002"), MemberState::Suspect));
        assert_eq!((member.name.as_deref(), member.gossip_addr), (Some("b"), Some(addr("10.0.0.9:8002"))));
        let told = RaftNodeMetadata::from(&member);
        assert_eq!((told.node_id, told.raft_addr, &told.custom_metadata["zone"][..]), (2, member.raft_addr, "z"));
        let named = MemberBody { raft_addr: "crema-2.crema:9002".to_owned(), ..body() };
        assert_eq!(Member::of(named, soon).await.raft_addr, addr("10.0.0.9:9002"), "where it gossips");
        let loopback = MemberBody { raft_addr: "localhost:9002".to_owned(), gossip_addr: None, ..body() };
        let found = Member::of(loopback, soon).await.raft_addr;
        assert!(found.ip().is_loopback() && found.port() == 9002, "{found}");
        for (state, expected) in
            [("alive", MemberState::Alive), ("dead", MemberState::Dead), ("left", MemberState::Left)]
        {
            assert_eq!(Member::of(MemberBody { state: state.to_owned(), ..body() }, soon).await.state, expected);
        }
    }

    #[test]
    fn a_caller_that_lags_hears_the_shortest_story() {
        use crema_gossip::events::{EventHub, MAX_QUEUED_EVENTS};
        let hub = EventHub::default();
        let at = |port: u16| format!("127.0.0.1:{port}");
        let join = |n, port| MemberEvent::Join { node: Id(n), raft_addr: at(port) };
        let (mut prompt, mut late) = (EventReceiver::new(hub.subscribe()), EventReceiver::new(hub.subscribe()));
        hub.publish(&[join(1, 1), join(2, 2), join(3, 3)]);
        let mut heard = 0;
        for port in 10..=10 + MAX_QUEUED_EVENTS as u16 {
            hub.publish(&[MemberEvent::Update { node: Id(2), raft_addr: at(port) }]);
            heard += std::iter::from_fn(|| prompt.try_recv()).count();
        }
        hub.publish(&[MemberEvent::Failed { node: Id(3) }]);
        assert_eq!(heard, 3 + 1 + MAX_QUEUED_EVENTS, "the one does not pay for the other");
        let story: Vec<_> = std::iter::from_fn(|| late.try_recv()).collect();
        assert!(story.len() < 10, "{story:?}");
        let moved = story.iter().rev().find_map(|event| match event {
            MemberlistEvent::NodeJoin { node_id: 2, raft_addr: addr }
            | MemberlistEvent::NodeUpdate { node_id: 2, new_addr: addr } => Some(addr.port()),
            _ => None,
        });
        assert_eq!(moved, Some(10 + MAX_QUEUED_EVENTS as u16));
        assert!(story.contains(&MemberlistEvent::NodeJoin { node_id: 1, raft_addr: addr("127.0.0.1:1") }));
    }

    #[test]
    fn events_are_those_of_the_documentation() {
        let (node, raft_addr) = (Id(2), "127.0.0.1:9002".to_owned());
        let at = addr("127.0.0.1:9002");
        let event = |event: MemberEvent| MemberlistEvent::from(event);
        assert_eq!(
            event(MemberEvent::Join { node, raft_addr: raft_addr.clone() }),
            MemberlistEvent::NodeJoin { node_id: 2, raft_addr: at }
        );
        assert_eq!(
            event(MemberEvent::Update { node, raft_addr }),
            MemberlistEvent::NodeUpdate { node_id: 2, new_addr: at }
        );
        assert_eq!(event(MemberEvent::Leave { node }), MemberlistEvent::NodeLeave { node_id: 2 });
        assert_eq!(event(MemberEvent::Failed { node }), MemberlistEvent::NodeFailed { node_id: 2 });
    }
}
