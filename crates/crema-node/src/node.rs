//! One node: everything that runs, put together, and how it begins and ends.
//!
//! ```text
//!   start:  bind every address -> gossip -> peers -> driver(Host) -> RESP listeners -> HTTP -> glue tasks
//!
//!   gossip <--------------> driver and peers: see `membership`
//!   driver --view-------> addresses ----> peers                      (in the driver's own thread: it must not wait)
//!   driver --NodeEvent--> Failure: fenced, misfit, id in use, driver died
//!
//!   stop:   drain until nobody needs this node (or the grace is over) -> RESP and embedding finish -> gossip `left`
//!           -> driver and peers stop -> HTTP stops
//! ```
//!
//! Nothing is announced before every address is bound: a node that cannot listen must not be dialed. While it stops, a
//! node serves as a gateway to the last.

use crate::admin::{self, AdminServer, AdminSource, BoxFuture, Facts, GossipMember, MemberBody};
use crate::client::{Client, Stopped};
use crate::config::Secret;
use crate::disk::{self, DataDir, DirError, LogStats, Mode};
use crate::driver::{Driver, DriverHandle, Input, Recover};
use crate::memberlist::GossipTuning;
use crate::membership::{AddressBook, Membership, Placed, Surroundings, update_addresses};
use crate::metrics::{self, Metrics};
use crate::peers::{PeerOptions, Peers, PeersConfig, PeersHandle};
use crate::pressure::{self, Pressure};
use crate::recover::RECOVER_TIMEOUT;
use crate::resp::{FrontConfig, ListenerKind, Server, ServerHandle};
use crate::storage::{Opened, Storage, StorageError};
use crema_core::{ClusterUuid, Incarnation, NodeId};
use crema_gossip::events::EventHub;
use crema_gossip::{EventReceiver, GossipConfig, GossipError, KeyRing, Member, SeedAddr};
use crema_shard::meta::WHOLE_SHARE;
use crema_shard::{
    AutoVoters, Host, HostConfig, HostStatus, MemoryOptions, NodeAddrs, ReadMode, RecoverResult, RoutingView, Timing,
    VoterResult,
};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{OnceCell, watch};
use tokio::task::JoinHandle;

mod following;

use following::{follow_callers, follow_events, follow_keys, overtaken_patience, set_keys, watch_registration};

/// Longest wait for an answer of the driver; it normally takes microseconds.
const DRIVER_ANSWER: Duration = Duration::from_secs(2);
/// Period at which a stopping node asks who still needs it.
const DRAIN_LOOK: Duration = Duration::from_millis(20);
/// Period of looking whether the file with the cluster's keys has changed.
const KEYS_LOOK: Duration = Duration::from_secs(2);
/// Period at which INFO's figure of used memory is brought up to date.
const MEMORY_LOOK: Duration = Duration::from_secs(5);
/// Longest time for RESP connections to finish what is in flight.
pub(crate) const RESP_DRAIN: Duration = Duration::from_secs(3);
/// Longest time for this node's tasks to end; they wait nowhere but where they may be ended.
const TASKS_END: Duration = Duration::from_secs(2);
/// Longest time to resolve the advertised host.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);
/// About so many bytes of records one piece of a state holds on its way to another node: a fraction of a millisecond of the
/// driver's time.
const SNAPSHOT_CHUNK_BYTES: usize = 256 * 1024;
/// Connections that the system accepts on our behalf before we do.
const BACKLOG: u32 = 1024;

/// Bytes of memory that a limit may be. With less, nothing would be left for data.
const MAX_MEMORY: std::ops::RangeInclusive<u64> = 16 << 20..=1 << 50;

/// Where a node listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindAddrs {
    /// The other nodes' connections (TCP).
    pub raft: SocketAddr,
    /// Gossip (UDP and TCP); without it, peers are found in [`NodeConfig::static_peers`] and in the placement only.
    pub gossip: Option<SocketAddr>,
    /// RESP, proxying every command.
    pub redis: Option<SocketAddr>,
    /// RESP, answering MOVED.
    pub redis_cluster: Option<SocketAddr>,
    /// HTTP.
    pub http: Option<SocketAddr>,
}

impl BindAddrs {
    /// All of them, by key of the configuration.
    fn named(&self) -> impl Iterator<Item = (&'static str, SocketAddr)> {
        let all = [
            ("gossip_addr", self.gossip),
            ("raft_addr", Some(self.raft)),
            ("redis_addr", self.redis),
            ("redis_cluster_addr", self.redis_cluster),
            ("http_addr", self.http),
        ];
        all.into_iter().filter_map(|(key, addr)| Some((key, addr?)))
    }

    /// Checks that no two of them are one: the system would call the port taken, and not say by whom.
    fn check(&self) -> Result<(), String> {
        let all: Vec<_> = self.named().collect();
        for (i, (key, addr)) in all.iter().enumerate() {
            if let Some((other, its)) = all[..i].iter().find(|(_, its)| overlap(*its, *addr)) {
                return Err(match its == addr {
                    true => format!("{other} and {key} are both {addr}: give each a port of its own"),
                    false => format!("{other} {its} and {key} {addr} share a port: give each one of its own"),
                });
            }
        }
        Ok(())
    }
}

/// Whether a machine cannot listen on both. An unspecified address is all addresses; of IPv6, those of IPv4 with them.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let all = |a: SocketAddr, b: SocketAddr| a.ip().is_unspecified() && (a.is_ipv6() || b.is_ipv4());
    a.port() != 0 && a.port() == b.port() && (a.ip() == b.ip() || all(a, b) || all(b, a))
}

/// What a node is started with. [`crate::config`] makes it from flags and files, [`crate::cache`] from its builder.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This node's id, from 1 on.
    pub node_id: NodeId,
    /// The cluster's name.
    pub cluster: String,
    /// The nodes that found the cluster together, ascending; without this node's id it only joins.
    pub initial_members: Vec<NodeId>,
    /// Where nodes are reached, `host:port`, as long as neither gossip nor placement knows better.
    pub static_peers: BTreeMap<NodeId, String>,
    /// Gossip addresses of other nodes.
    pub seeds: Vec<SeedAddr>,
    /// What else gossip is told.
    pub gossip: GossipOptions,
    /// Data shards to found the cluster with, 1 to 16,384.
    pub shards: u32,
    /// Replicas of each shard, 1 to 7.
    pub replicas: u32,
    /// Where to listen.
    pub bind: BindAddrs,
    /// Under which host others reach the addresses that are not loopback; their own IP if absent.
    pub advertise_host: Option<String>,
    /// Custom metadata.
    pub metadata: BTreeMap<String, String>,
    /// The cluster's keys: with them gossip is encrypted, and nobody is heard who does not have one of them.
    pub cluster_keys: Option<KeyRing>,
    /// The file that they came from: it is read again when it changes.
    pub cluster_key_file: Option<PathBuf>,
    /// The password of Redis clients.
    pub requirepass: Option<Secret>,
    /// After this, a command is answered with an error; 10 ms to 10 min.
    pub request_deadline: Duration,
    /// How linearizable reads are confirmed where this node leads.
    pub reads: ReadMode,
    /// Most clients, both RESP listeners together.
    pub max_clients: usize,
    /// How long a stop waits until nobody needs this node, at most 10 min.
    pub stop_grace: Duration,
    /// Most bytes of log kept for replicas that lag, over all shards.
    pub max_log_bytes: usize,
    /// Limits of memory.
    pub memory: MemoryOptions,
    /// When voters change without an operator.
    pub auto_voters: AutoVoters,
    /// Whether the limit is one of what the process has resident: not where it has other things to do than to be this node.
    pub bound_resident: bool,
    /// Where the log is kept on disk; in memory alone without.
    pub data_dir: Option<PathBuf>,
    /// Where a node without a data directory remembers of which cluster it is: it then founds no second one. In either
    /// directory gossip keeps its generation.
    pub state_dir: Option<PathBuf>,
    /// Bytes of log on disk, over all shards, behind which states are written to files.
    pub checkpoint_log_bytes: u64,
    /// Most bytes of states a second sent to peers, all together.
    pub snapshot_rate: u64,
}

/// What gossip is told besides addresses and seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GossipOptions {
    /// Where others reach this node's gossip; if absent, as [`NodeConfig::advertise_host`] says.
    pub advertise: Option<SocketAddr>,
    /// Connect to nodes that are known by gossip alone.
    pub auto_add_peers: bool,
    /// Give such a node up once it counts as failed, until it is heard again.
    pub auto_remove_peers: bool,
    /// Pace and patience.
    pub tuning: GossipTuning,
}

impl Default for GossipOptions {
    fn default() -> Self {
        GossipOptions {
            advertise: None,
            auto_add_peers: true,
            auto_remove_peers: false,
            tuning: GossipTuning::default(),
        }
    }
}

impl NodeConfig {
    /// Checks what both ways to make a configuration have in common; the error is a sentence.
    pub fn check(&self) -> Result<(), String> {
        if self.node_id.0 == 0 {
            return Err("node_id must be 1 or more".to_owned());
        }
        crate::config::check_cluster_name(&self.cluster).map_err(|e| e.to_string())?;
        if !(1..=16_384).contains(&self.shards) {
            return Err(format!("shards must be between 1 and 16384, not {}", self.shards));
        }
        if self.data_dir.is_some() && self.state_dir.is_some() {
            return Err("state_dir is for nodes without data_dir, which keeps more than that".to_owned());
        }
        if !(1..=7).contains(&self.replicas) {
            return Err(format!("replicas must be between 1 and 7, not {}", self.replicas));
        }
        let deadline = self.request_deadline;
        if !(Duration::from_millis(10)..=Duration::from_secs(600)).contains(&deadline) {
            return Err(format!("the request deadline must be between 10 ms and 10 min, not {deadline:?}"));
        }
        if !(Duration::from_secs(5)..=Duration::from_secs(86_400)).contains(&self.auto_voters.after) {
            return Err(format!("auto_voters_after must be between 5 s and a day, not {:?}", self.auto_voters.after));
        }
        if self.stop_grace > Duration::from_secs(600) {
            return Err(format!("the stop grace must be at most 10 min, not {:?}", self.stop_grace));
        }
        let max_memory = self.memory.max_memory;
        if max_memory != 0 && !MAX_MEMORY.contains(&max_memory) {
            let [least, most] = [*MAX_MEMORY.start(), *MAX_MEMORY.end()].map(crate::config::ByteSize);
            return Err(format!(
                "max_memory must be between {least} and {most}, not {}; without a limit if it is left out",
                crate::config::ByteSize(max_memory)
            ));
        }
        self.bind.check()?;
        crate::config::check_metadata(&self.metadata).map_err(|e| e.to_string())?;
        match self.bind.gossip {
            Some(bind) => self.check_gossip(bind),
            None => Ok(()),
        }
    }

    /// Checks what gossip will be started with, before anything is bound.
    fn check_gossip(&self, bind: SocketAddr) -> Result<(), String> {
        // The real addresses are known once they are bound and the advertised host is resolved; these stand for them.
        let reachable = NodeAddrs { raft: "127.0.0.1:1".to_owned(), ..NodeAddrs::default() };
        let somewhere: IpAddr = if bind.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        let advertise = self.gossip.advertise.unwrap_or(SocketAddr::new(somewhere, bind.port()));
        let config = gossip_config(self, Incarnation(0), &reachable, bind, advertise);
        config.validate().map_err(|e| e.to_string())
    }
}

/// Why a node did not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration cannot work: correct it.
    #[error("{0}")]
    Invalid(String),
    /// An address cannot be bound: free it or name another.
    #[error("{key} {addr} cannot be bound: {reason}")]
    Bind {
        /// The key of the configuration.
        key: &'static str,
        /// The address.
        addr: SocketAddr,
        /// What the system says.
        reason: String,
    },
    /// There is no tokio runtime around the call: start the node within one.
    #[error("a node needs a tokio runtime: start it from a task of one, as in #[tokio::main], or in Runtime::block_on")]
    NoRuntime,
    /// Something else failed.
    #[error("{0}")]
    Failed(String),
}

/// Why a node ended by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// One sentence for the operator.
    pub reason: String,
    /// Whether the configuration is at fault, so that starting again would end in the same way.
    pub is_configuration: bool,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// A running node. Clones share it; it stops with [`Node::shutdown`] or, without any politeness, with the last clone.
#[derive(Clone, Debug)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    config: NodeConfig,
    addresses: Vec<(&'static str, SocketAddr)>,
    watch: Arc<Watch>,
    peers: PeersHandle,
    book: Arc<Mutex<AddressBook>>,
    /// What happens to members, over all runs of gossip; nothing without it.
    events: Arc<EventHub>,
    servers: Mutex<Vec<ServerHandle>>,
    admin: Mutex<Option<AdminServer>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    hurry: watch::Sender<bool>,
    stopped: OnceCell<()>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({})", self.config.node_id)
    }
}

/// What the admin API and the tasks look at. Does not keep the node alive.
struct Watch {
    facts: Facts,
    /// Opens the other nodes' HTTP as well as our own.
    password: Option<Secret>,
    /// Whether gossip is authenticated.
    keyed: bool,
    incarnation: Incarnation,
    driver: DriverHandle,
    membership: Option<Arc<Membership>>,
    metrics: Metrics,
    draining: AtomicBool,
    drained: watch::Sender<bool>,
    failure: watch::Sender<Option<Failure>>,
    /// That another process is in this one's place, as long as it is.
    rivalry: Mutex<Option<String>>,
    view_changed: watch::Receiver<()>,
}

impl Watch {
    /// The driver's picture; an error says why there is none.
    async fn status(&self) -> Result<HostStatus, String> {
        match tokio::time::timeout(DRIVER_ANSWER, self.driver.status()).await {
            Ok(status) => status.map_err(|_| "the driver has stopped".to_owned()),
            Err(_) => Err(format!("the driver did not answer within {DRIVER_ANSWER:?}")),
        }
    }

    fn id_in_use(&self, by: &str) -> String {
        let node = self.facts.node;
        format!("node id {node} is in use by another living process (life {by}): stop that one or choose another id")
    }

    fn set_rival(&self, life: Option<&str>) {
        let rivalry = life.map(|life| self.id_in_use(life));
        *self.rivalry.lock().expect("no panic while held") = rivalry;
    }

    fn fail(&self, reason: String, is_configuration: bool) {
        self.failure.send_if_modified(|failure| {
            let first = failure.is_none();
            failure.get_or_insert(Failure { reason, is_configuration });
            first
        });
    }
}

impl AdminSource for Watch {
    fn alive(&self) -> Result<(), String> {
        if let Some(failure) = &*self.failure.borrow() {
            return Err(failure.reason.clone());
        }
        if !self.driver.is_running() && !self.draining() {
            return Err("the driver has stopped".to_owned());
        }
        match &self.membership {
            // While it stops, gossip ends before the last answer is given.
            Some(membership) if !membership.gossip().health() && !self.draining() => {
                Err("gossip has stopped".to_owned())
            }
            _ => Ok(()),
        }
    }
    fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
    fn rivalry(&self) -> Option<String> {
        self.rivalry.lock().expect("no panic while held").clone()
    }
    fn view(&self) -> Arc<RoutingView> {
        self.driver.view()
    }
    fn host_status(&self) -> BoxFuture<'_, Result<HostStatus, String>> {
        Box::pin(self.status())
    }
    fn members(&self) -> Option<Vec<GossipMember>> {
        let members = self.membership.as_ref()?.gossip().members();
        Some(members.into_iter().map(gossip_member).collect())
    }
    fn metrics(&self) -> BoxFuture<'_, String> {
        Box::pin(async { self.metrics.render(self.status().await.ok()) })
    }
    fn facts(&self) -> &Facts {
        &self.facts
    }
    fn change_voters(&self, node: NodeId, approved: bool) -> BoxFuture<'_, VoterResult> {
        Box::pin(self.driver.change_voters(node, approved))
    }
    fn recover(&self, what: Recover) -> BoxFuture<'_, Result<RecoverResult, String>> {
        Box::pin(async {
            match tokio::time::timeout(RECOVER_TIMEOUT, self.driver.recover(what)).await {
                Ok(result) => result.map_err(|_| "the driver has stopped".to_owned()),
                Err(_) => Err("the driver did not answer: look whether it was done".to_owned()),
            }
        })
    }
}

fn gossip_member(member: Member) -> GossipMember {
    use crema_gossip::MemberState;
    let state = match member.state {
        MemberState::Alive => "alive",
        MemberState::Suspect => "suspect",
        MemberState::Dead => "dead",
        MemberState::Left => "left",
    };
    let meta = member.meta;
    GossipMember {
        node: meta.node_id,
        state,
        incarnation: meta.incarnation.to_string(),
        raft_addr: meta.raft_addr,
        gossip_addr: meta.gossip_addr.to_string(),
        redis_addr: meta.redis_addr,
        redis_cluster_addr: meta.redis_cluster_addr,
        http_addr: meta.http_addr,
        metadata: meta.metadata,
    }
}

/// A bound TCP listener and the address it really has.
struct Bound {
    key: &'static str,
    listener: TcpListener,
    addr: SocketAddr,
}

fn bind(key: &'static str, addr: SocketAddr) -> Result<Bound, StartError> {
    let try_bind = || {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A restarted node must not wait for its predecessor's connections to fade away.
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let listener = socket.listen(BACKLOG)?;
        let addr = listener.local_addr()?;
        Ok(Bound { key, listener, addr })
    };
    try_bind().map_err(|e: std::io::Error| StartError::Bind { key, addr, reason: reason(&e) })
}

fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => "the port is in use by another process".to_owned(),
        std::io::ErrorKind::AddrNotAvailable => "this machine does not have that address".to_owned(),
        _ => error.to_string(),
    }
}

/// How others reach what is bound at `addr`.
fn advertised(addr: SocketAddr, host: Option<&str>) -> String {
    match host {
        // Nobody else reaches a loopback address, under whatever name.
        Some(host) if !crate::config::is_loopback(addr) => match host.parse::<std::net::IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, addr.port()).to_string(),
            Err(_) => format!("{host}:{}", addr.port()),
        },
        _ => addr.to_string(),
    }
}

/// The address that gossip, which carries no names, tells others.
async fn advertised_ip(addr: SocketAddr, host: Option<&str>) -> Result<SocketAddr, StartError> {
    let told = advertised(addr, host);
    if let Ok(addr) = told.parse() {
        return Ok(addr);
    }
    let fail = |why: String| StartError::Invalid(format!("advertise_host: {told} cannot be resolved: {why}"));
    let found = tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host(&told)).await;
    let found = found.map_err(|_| fail("timed out".to_owned()))?.map_err(|e| fail(e.to_string()))?;
    let same_family = found.into_iter().find(|a| a.is_ipv4() == addr.is_ipv4());
    same_family.ok_or_else(|| fail(format!("it has no address of the family of {addr}")))
}

fn draw_incarnation() -> Result<u128, String> {
    random().map(u128::from_le_bytes).map_err(|e| e.to_string())
}

/// What is wrong with a directory, by its key of the configuration where the system's words alone would not tell.
fn directory_error(key: &str, named: Option<&Path>, error: DirError) -> StartError {
    let DirError::Io { path, source } = error else { return StartError::Invalid(error.to_string()) };
    let named = named.unwrap_or(&path);
    let why = match source.kind() {
        _ if path != named => format!("{}: {source}", path.display()),
        // The file that is there in its place.
        std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::NotADirectory => "it is not a directory".to_owned(),
        _ => source.to_string(),
    };
    StartError::Invalid(format!("{key} {} cannot be used: {why}", named.display()))
}

/// Opens the data directory, if there is one, and reads what it holds.
async fn open_storage(config: &NodeConfig) -> Result<Option<Opened>, StartError> {
    let Some(path) = config.data_dir.clone() else { return Ok(None) };
    let (node, cluster) = (config.node_id, config.cluster.clone());
    let log_bytes = config.checkpoint_log_bytes;
    let open = move || Opened::open(&path, node, &cluster, log_bytes, draw_incarnation);
    match tokio::task::spawn_blocking(open).await {
        Ok(Ok(opened)) => Ok(Some(opened)),
        Ok(Err(StorageError::Directory(e))) => Err(directory_error("data_dir", config.data_dir.as_deref(), e)),
        Ok(Err(e)) => Err(StartError::Failed(e.to_string())),
        Err(e) => Err(StartError::Failed(format!("the data directory was not read: {e}"))),
    }
}

/// Opens the state directory, if there is one.
async fn open_state(config: &NodeConfig) -> Result<Option<DataDir>, StartError> {
    let Some(path) = config.state_dir.clone() else { return Ok(None) };
    let (node, cluster) = (config.node_id.0, config.cluster.clone());
    let open = move || DataDir::open(&path, node, &cluster, Mode::IdentityOnly);
    match tokio::task::spawn_blocking(open).await {
        Ok(Ok((dir, _))) => Ok(Some(dir)),
        Ok(Err(e)) => Err(directory_error("state_dir", config.state_dir.as_deref(), e)),
        Err(e) => Err(StartError::Failed(format!("the state directory was not read: {e}"))),
    }
}

fn random<const N: usize>() -> Result<[u8; N], StartError> {
    let mut bytes = [0; N];
    match getrandom::fill(&mut bytes) {
        Ok(()) => Ok(bytes),
        // Without randomness two lives could not be told apart; nothing is safe then.
        Err(e) => Err(StartError::Failed(format!("the system gives no random numbers: {e}"))),
    }
}

impl Node {
    /// Starts a node. Returns once its addresses are bound and its tasks run; the cluster may still be forming.
    ///
    /// Errors: see [`StartError`]. Must be called within a tokio runtime, with its I/O and its time enabled.
    pub async fn start(config: NodeConfig) -> Result<Node, StartError> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(StartError::NoRuntime);
        }
        config.check().map_err(StartError::Invalid)?;
        // Everything is bound before anything runs, so that a mistake has no other effect than its message.
        let raft = bind("raft_addr", config.bind.raft)?;
        let optional = |key, addr: Option<SocketAddr>| addr.map(|addr| bind(key, addr)).transpose();
        let redis = optional("redis_addr", config.bind.redis)?;
        let redis_cluster = optional("redis_cluster_addr", config.bind.redis_cluster)?;
        let http = optional("http_addr", config.bind.http)?;

        let host = config.advertise_host.as_deref();
        let told = |bound: &Option<Bound>| bound.as_ref().map(|b| advertised(b.addr, host));
        let addrs = NodeAddrs {
            raft: advertised(raft.addr, host),
            redis: told(&redis),
            redis_cluster: told(&redis_cluster),
            http: told(&http),
            zone: config.metadata.get("zone").cloned(),
        };
        let mut storage = open_storage(&config).await?;
        let state_dir = open_state(&config).await?;
        let entropy = || random().map(u64::from_le_bytes);
        let mut host_config = HostConfig {
            node: config.node_id,
            incarnation: Incarnation(0),
            cluster: config.cluster.clone(),
            initial_members: config.initial_members.clone(),
            uuid: None,
            generation: 0,
            shards: config.shards,
            replication: config.replicas,
            addrs: addrs.clone(),
            entropy: [entropy()?, entropy()?, entropy()?],
            timing: Timing::default(),
            max_log_bytes: config.max_log_bytes,
            read_mode: config.reads,
            snapshot_chunk_bytes: SNAPSHOT_CHUNK_BYTES,
            process: entropy()?,
            memory: config.memory,
            auto_voters: config.auto_voters,
            checkpoint_log_bytes: storage.as_ref().map(|_| config.checkpoint_log_bytes),
        };
        let host = loop {
            let recovered = storage.as_mut().map(|s| std::mem::take(&mut s.recovered)).unwrap_or_default();
            let identity = storage.as_ref().map(Opened::identity).or(state_dir.as_ref().map(DataDir::identity));
            host_config.incarnation = match &identity {
                Some(identity) => Incarnation(identity.incarnation),
                None => Incarnation(u128::from_le_bytes(random()?)),
            };
            host_config.uuid = identity.as_ref().and_then(|i| i.uuid).map(ClusterUuid);
            host_config.generation = identity.as_ref().map_or(0, |i| i.generation);
            let (host, lost) = Host::recovered(host_config.clone(), recovered, crate::clock::now());
            match (lost.first(), storage.take()) {
                // One replica that cannot be trusted is enough: what else is on this disk?
                (Some((shard, why)), Some(opened)) => {
                    let fresh = opened.lost(&format!("shard {shard}: {why}"), draw_incarnation);
                    storage = Some(fresh.map_err(|e| StartError::Failed(e.to_string()))?);
                }
                (_, opened) => {
                    storage = opened;
                    break host;
                }
            }
        };
        let incarnation = host_config.incarnation;
        let boot = storage.as_ref().map_or(0, |s| s.identity().boot);
        let membership = start_gossip(&config, incarnation, &addrs).await?.map(Arc::new);

        let mut addresses: Vec<_> = [Some(&raft), redis.as_ref(), redis_cluster.as_ref(), http.as_ref()]
            .into_iter()
            .flatten()
            .map(|bound| (bound.key, bound.addr))
            .collect();
        let gossip_addr = membership.as_ref().map(|membership| membership.gossip().addr());
        addresses.extend(gossip_addr.map(|addr| ("gossip_addr", addr)));

        let failed = |what: &str, e: &dyn fmt::Display| StartError::Failed(format!("{what}: {e}"));
        let inputs = crate::driver::input_channel();
        let peers_config = PeersConfig {
            cluster: config.cluster.clone(),
            node: config.node_id,
            incarnation,
            boot,
            addr: addrs.raft.clone(),
            keys: config.cluster_keys.clone(),
            options: PeerOptions { snapshot_bytes_per_second: config.snapshot_rate, ..PeerOptions::default() },
        };
        let listener = raft.listener.into_std().map_err(|e| failed("raft_addr", &e))?;
        let peers =
            Peers::start(peers_config, listener, inputs.0.clone()).map_err(|e| failed("peer connections", &e))?;

        let book = Arc::new(Mutex::new(AddressBook::new(config.gossip.auto_add_peers)));
        let own_book = book.clone();
        let (view_changes, view_changed) = watch::channel(());
        let (reach, reach_changed) = watch::channel(());
        let on_view = view_hook(config.node_id, book.clone(), peers.clone(), view_changes, reach);
        let (storage, data_dir) = match storage {
            Some(opened) => {
                let (storage, dir) = opened.start(inputs.0.clone()).map_err(|e| failed("the disk's threads", &e))?;
                (Some(storage), Some(dir))
            }
            None => (None, state_dir.map(|dir| Arc::new(Mutex::new(dir)))),
        };
        let log_stats = storage.as_ref().and_then(Storage::log_stats);
        let driver = Driver::start(host, peers.clone(), inputs, storage, Some(on_view));
        let (driver, outputs) = driver.map_err(|e| failed("the driver's thread", &e))?;
        update_addresses(&book, &peers, |book| book.set_configured(config.static_peers.clone()));

        let front = Arc::new(front_config(&config));
        let mut servers = Vec::new();
        for (bound, kind) in [(redis, ListenerKind::Proxy), (redis_cluster, ListenerKind::Cluster)] {
            if let Some(bound) = bound {
                servers.push(Server::start(bound.listener, kind, driver.client(), front.clone()));
            }
        }

        let watch = Arc::new(Watch {
            incarnation,
            password: config.requirepass.clone(),
            keyed: config.cluster_keys.is_some(),
            facts: Facts {
                cluster: config.cluster.clone(),
                node: config.node_id,
                incarnation: incarnation.to_string(),
                replicas: config.replicas,
                raft_addr: addrs.raft.clone(),
                gossip_addr: gossip_addr.map(|addr| addr.to_string()),
                metadata: config.metadata.clone(),
            },
            metrics: Metrics::new(
                config.node_id,
                metric_sources(&driver, &peers, membership.as_ref(), &front, log_stats),
            ),
            driver,
            membership,
            draining: AtomicBool::new(false),
            drained: watch::channel(false).0,
            failure: watch::channel(None).0,
            rivalry: Mutex::new(None),
            view_changed,
        });
        let admin = http
            .map(|bound| AdminServer::start(bound.listener, admin::router(watch.clone(), config.requirepass.clone())));
        let mut tasks = vec![
            tokio::spawn(watch_registration(
                watch.clone(),
                host_config.uuid.is_some(),
                overtaken_patience(&config.gossip.tuning),
            )),
            tokio::spawn(follow_events(watch.clone(), outputs.events, data_dir, (book.clone(), peers.clone()))),
        ];
        tasks.push(tokio::spawn(follow_callers(book.clone(), peers.clone())));
        if config.bind.redis.is_some() || config.bind.redis_cluster.is_some() {
            tasks.push(tokio::spawn(follow_memory(watch.driver.clone(), front.clone())));
        }
        if let Some(path) = config.cluster_key_file.clone().filter(|_| config.cluster_keys.is_some()) {
            tasks.push(tokio::spawn(follow_keys(path, watch.membership.clone(), peers.clone(), KEYS_LOOK)));
        }
        if config.bound_resident && config.memory.max_memory > 0 {
            tasks.push(tokio::spawn(bound_resident(watch.driver.clone(), config.memory.max_memory)));
        }
        let events = Arc::new(EventHub::default());
        let mut led = outputs.led;
        if let Some(membership) = watch.membership.clone() {
            let around = Surroundings {
                node: config.node_id,
                incarnation,
                driver: watch.driver.clone(),
                peers: peers.clone(),
                book,
                drop_failed: config.gossip.auto_remove_peers,
                reach: reach_changed,
                events: events.clone(),
            };
            let publisher = membership.clone();
            let closing = CloseEvents(events.clone());
            tasks.push(tokio::spawn(async move {
                let _closing = closing;
                membership.run(around).await
            }));
            tasks.push(tokio::spawn(async move {
                while let Some(led) = led.recv().await {
                    publisher.publish(&led);
                }
            }));
        }
        Ok(Node {
            inner: Arc::new(Inner {
                config,
                addresses,
                watch,
                peers,
                book: own_book,
                events,
                servers: Mutex::new(servers),
                admin: Mutex::new(admin),
                tasks: Mutex::new(tasks),
                hurry: watch::channel(false).0,
                stopped: OnceCell::new(),
            }),
        })
    }

    /// What it was started with.
    pub fn config(&self) -> &NodeConfig {
        &self.inner.config
    }

    /// The addresses it listens on, by key of the configuration.
    pub fn addresses(&self) -> &[(&'static str, SocketAddr)] {
        &self.inner.addresses
    }

    /// A client of this node's driver.
    pub fn client(&self) -> Client {
        self.inner.watch.driver.client()
    }

    /// Everyone whom gossip or the cluster's table knows, this node included, ascending; as `/v1/members` tells.
    pub fn members(&self) -> Vec<MemberBody> {
        admin::members_body(&*self.inner.watch)
    }

    /// Its id, the Raft address that others are told, and its metadata.
    pub(crate) fn told(&self) -> (NodeId, SocketAddr, &BTreeMap<String, String>) {
        let facts = &self.inner.watch.facts;
        // A host name stands for the machine itself.
        let bound = self.inner.addresses.iter().find(|(key, _)| *key == "raft_addr").expect("always bound").1;
        (facts.node, facts.raft_addr.parse().unwrap_or(bound), &facts.metadata)
    }

    /// What happens to members from now on, for this caller alone: first a join for each present one. Nothing happens on a
    /// node without gossip. Ends when the node stops.
    pub fn member_events(&self) -> EventReceiver {
        self.inner.events.subscribe()
    }

    /// The node's gossip, if it has one.
    pub(crate) fn membership(&self) -> Option<&Arc<Membership>> {
        self.inner.watch.membership.as_ref()
    }

    /// Why it is not ready; `None` if it is.
    pub fn not_ready(&self) -> Option<String> {
        admin::not_ready(&*self.inner.watch)
    }

    /// Waits until it is ready; an error if it stops before. Cancel-safe.
    pub async fn ready(&self) -> Result<(), Stopped> {
        let mut changes = self.inner.watch.view_changed.clone();
        loop {
            changes.borrow_and_update();
            if self.not_ready().is_none() {
                return Ok(());
            }
            if self.inner.stopped.initialized() || !self.inner.watch.driver.is_running() {
                return Err(Stopped);
            }
            // Not every reason stands in the view, hence also now and then.
            let _ = tokio::time::timeout(Duration::from_millis(200), changes.changed()).await;
        }
    }

    /// Why it has ended by itself, if it has.
    pub fn failure(&self) -> Option<Failure> {
        self.inner.watch.failure.borrow().clone()
    }

    /// Follows [`Node::failure`] without keeping the node alive; ends with it.
    pub fn failure_watch(&self) -> watch::Receiver<Option<Failure>> {
        self.inner.watch.failure.subscribe()
    }

    /// Waits until it ends by itself. It must then be stopped with [`Node::shutdown`]. Cancel-safe.
    pub async fn failed(&self) -> Failure {
        let mut failure = self.inner.watch.failure.subscribe();
        loop {
            // Copied out before waiting: what `borrow` returns must not be held across an await.
            let present = failure.borrow_and_update().clone();
            if let Some(failure) = present {
                return failure;
            }
            if failure.changed().await.is_err() {
                // The sender lives as long as the node, which we hold.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Lets a node hold replicas, or no longer. Returns once that is committed; what it holds moves afterwards. Doing again
    /// what is done already succeeds.
    ///
    /// Errors: [`crema_shard::VoterError`] says whether anything may have changed.
    pub async fn change_voters(&self, node: NodeId, approved: bool) -> VoterResult {
        if approved {
            update_addresses(&self.inner.book, &self.inner.peers, |book| book.admit(node));
        }
        self.inner.watch.driver.change_voters(node, approved).await
    }

    /// Whether a node that does not answer, or has not joined, is about to: gossip hears it. Without gossip: it is known where
    /// to reach it, or it has connected, so that it may be.
    pub(crate) fn may_come(&self, node: NodeId) -> bool {
        match self.membership() {
            Some(membership) => {
                let is_alive = |m: &Member| m.meta.node_id == node && m.state == crema_gossip::MemberState::Alive;
                membership.gossip().members().iter().any(is_alive)
            }
            None => {
                self.inner.watch.driver.view().nodes.contains_key(&node)
                    || self.inner.config.static_peers.contains_key(&node)
                    || self.inner.peers.callers().borrow().contains_key(&node)
            }
        }
    }

    /// The nodes that may hold replicas, ascending, as this node knows; nobody before the cluster is known.
    pub fn voters(&self) -> Vec<NodeId> {
        let view = self.inner.watch.driver.view();
        view.nodes.iter().filter(|(_, route)| route.approved).map(|(node, _)| *node).collect()
    }

    /// Replaces the cluster's keys: for gossip, and for connections from now on. Where the node follows a file, that counts again
    /// as soon as it changes.
    ///
    /// Errors: [`GossipError::NoKeys`] on a node that was started without.
    pub fn set_cluster_keys(&self, keys: KeyRing) -> Result<(), GossipError> {
        if self.inner.config.cluster_keys.is_none() {
            return Err(GossipError::NoKeys);
        }
        set_keys(self.membership().map(|membership| &**membership), &self.inner.peers, keys)
    }

    /// From now on a shutdown, also one under way, waits for nobody: the whole cluster stops, or this node is of no use.
    pub fn hurry(&self) {
        self.inner.hurry.send_replace(true);
    }

    /// Stops: hands leaderships over and waits, up to the grace, until every group keeps a quorum without this node;
    /// finishes what clients have in flight; says goodbye; closes. A second call waits for the first. Cancel-safe: it goes on.
    pub async fn shutdown(&self) {
        self.shutdown_with(std::future::ready(())).await;
    }

    /// As [`Node::shutdown`]; `finish`, of the call that is the first, ends what the program itself has in flight.
    pub(crate) async fn shutdown_with(&self, finish: impl Future<Output = ()> + Send + 'static) {
        let inner = self.inner.clone();
        // A task of its own: a caller that is cancelled must not leave a node behind that is about to stop for ever.
        let stop = tokio::spawn(async move {
            inner.stopped.get_or_init(|| inner.stop(finish)).await;
        });
        match stop.await {
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Or the runtime ends, and with it whatever there is to stop.
            _ => {}
        }
    }
}

impl Inner {
    async fn stop(&self, finish: impl Future<Output = ()>) {
        let watch = &self.watch;
        watch.draining.store(true, Ordering::Relaxed);
        let mut hurry = self.hurry.subscribe();
        tokio::select! {
            () = self.drain() => {}
            _ = hurry.wait_for(|hurry| *hurry) => {}
        }
        let servers = std::mem::take(&mut *self.servers.lock().expect("no panic while held"));
        let mut closing = tokio::task::JoinSet::new();
        for server in servers {
            closing.spawn(async move { server.shutdown(RESP_DRAIN).await });
        }
        let closed = async { while closing.join_next().await.is_some() {} };
        tokio::join!(closed, finish);
        // From here on the parts end one after the other, which is no news to act on.
        let tasks = std::mem::take(&mut *self.tasks.lock().expect("no panic while held"));
        end_all(tasks).await;
        if let Some(membership) = &watch.membership {
            membership.leave().await;
        }
        self.events.close();
        // The driver first: what it still sends is flushed when the connections close.
        watch.driver.stop().await;
        self.peers.shutdown().await;
        let admin = self.admin.lock().expect("no panic while held").take();
        if let Some(admin) = admin {
            admin.stop().await;
        }
        tracing::info!("node {} has stopped", self.config.node_id);
    }

    /// Waits until nobody needs this node, or the grace is over.
    async fn drain(&self) {
        let grace = self.config.stop_grace;
        let driver = &self.watch.driver;
        if grace.is_zero() || *self.hurry.borrow() {
            return;
        }
        let view = driver.view();
        // Before joining there is nothing to hand over, and to a node that is the whole cluster nobody can succeed.
        if view.uuid.is_none() || view.nodes.keys().all(|node| *node == self.config.node_id) {
            return;
        }
        let waiting = async {
            if driver.drain().await.is_err() {
                return;
            }
            let mut drained = self.watch.drained.subscribe();
            // Leaderships first: as long as this node leads, it is needed in another way.
            let _ = drained.wait_for(|drained| *drained).await;
            while driver.needed_by().await.is_ok_and(|shards| !shards.is_empty()) {
                tokio::time::sleep(DRAIN_LOOK).await;
            }
        };
        if tokio::time::timeout(grace, waiting).await.is_ok() {
            return;
        }
        let needed_by = tokio::time::timeout(DRIVER_ANSWER, driver.needed_by()).await;
        match needed_by {
            Ok(Ok(shards)) if !shards.is_empty() => tracing::warn!(
                "after {grace:?} this node is still needed; without it these shards lose their quorum: {}",
                admin::name_shards(&shards)
            ),
            _ => tracing::warn!("after {grace:?} not all leaderships were handed over; elections will follow"),
        }
    }
}

/// Ends the events of members with the task that they come from, also where that goes with its runtime: nobody shall wait
/// for more of them.
struct CloseEvents(Arc<EventHub>);

impl Drop for CloseEvents {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Ends tasks, and waits until they have ended: until then one may be about to do what must not come after.
async fn end_all(tasks: Vec<JoinHandle<()>>) {
    tasks.iter().for_each(JoinHandle::abort);
    let all = async {
        for task in tasks {
            // The error is the end that was just asked for.
            let _ = task.await;
        }
    };
    if tokio::time::timeout(TASKS_END, all).await.is_err() {
        tracing::warn!("a task of this node did not end within {TASKS_END:?}");
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.lock().expect("no panic while held").drain(..).for_each(|task| task.abort());
        self.events.close();
        // Without a shutdown the thread would live on. A full queue is drained within a round; give up on one that is not.
        if self.watch.driver.is_running() {
            let _ = self.watch.driver.inputs().send_timeout(Input::Stop, Duration::from_millis(100));
        }
    }
}

fn gossip_config(
    config: &NodeConfig,
    incarnation: Incarnation,
    addrs: &NodeAddrs,
    bind: SocketAddr,
    advertise: SocketAddr,
) -> GossipConfig {
    let raft = addrs.raft.clone();
    let mut gossip = GossipConfig::new(config.node_id, incarnation, raft, config.cluster.clone(), bind);
    gossip.redis_addr = addrs.redis.clone();
    gossip.redis_cluster_addr = addrs.redis_cluster.clone();
    gossip.http_addr = addrs.http.clone();
    gossip.metadata = config.metadata.clone();
    gossip.seeds = config.seeds.clone();
    gossip.keys = config.cluster_keys.clone();
    gossip.advertise = advertise;
    // This process has the directory for itself by the time gossip starts.
    gossip.generation_file = config.data_dir.as_ref().or(config.state_dir.as_ref()).map(|dir| dir.join(disk::GOSSIP));
    config.gossip.tuning.apply(&mut gossip);
    // Whoever made this configuration has checked what may be open, and has warned.
    gossip.insecure = true;
    gossip
}

async fn start_gossip(
    config: &NodeConfig,
    incarnation: Incarnation,
    addrs: &NodeAddrs,
) -> Result<Option<Membership>, StartError> {
    let Some(bind) = config.bind.gossip else {
        return Ok(None);
    };
    let advertise = match config.gossip.advertise {
        Some(addr) => addr,
        None => advertised_ip(bind, config.advertise_host.as_deref()).await?,
    };
    match Membership::start(gossip_config(config, incarnation, addrs, bind, advertise)).await {
        Ok(membership) => Ok(Some(membership)),
        Err(GossipError::Bind { addr, source }) => {
            Err(StartError::Bind { key: "gossip_addr", addr, reason: reason(&source) })
        }
        Err(e @ (GossipError::Config(_) | GossipError::Key(_))) => Err(StartError::Invalid(e.to_string())),
        Err(e) => Err(StartError::Failed(e.to_string())),
    }
}

/// What follows each new view, on the driver's own thread.
fn view_hook(
    this: NodeId,
    book: Arc<Mutex<AddressBook>>,
    peers: PeersHandle,
    changes: watch::Sender<()>,
    reach: watch::Sender<()>,
) -> crate::driver::ViewHook {
    let mut known = BTreeMap::new();
    Box::new(move |view| {
        let others = view.nodes.iter().filter(|(node, _)| **node != this);
        let placed: BTreeMap<_, _> = others
            .map(|(node, route)| {
                let placed = Placed { address: route.addrs.raft.clone(), live: route.live, approved: route.approved };
                (*node, placed)
            })
            .collect();
        // Leaderships change the view often, addresses and liveness seldom.
        if placed != known {
            known.clone_from(&placed);
            update_addresses(&book, &peers, |book| book.set_placed(placed));
            reach.send_replace(());
        }
        changes.send_replace(());
    })
}

fn front_config(config: &NodeConfig) -> FrontConfig {
    let mut front = FrontConfig::new(config.node_id, config.cluster.clone());
    front.requirepass = config.requirepass.clone();
    front.deadline = config.request_deadline;
    front.max_clients = config.max_clients;
    front.memory = config.memory;
    front.durable = config.data_dir.is_some();
    front
}

/// Tells INFO how much memory the data takes, which only the driver knows.
async fn follow_memory(driver: DriverHandle, front: Arc<FrontConfig>) {
    let mut look = tokio::time::interval(MEMORY_LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let Ok(status) = driver.status().await else {
            return;
        };
        let bytes = status.shards.iter().filter_map(|shard| shard.own).map(|own| own.bytes).sum();
        front.used_memory.store(bytes, Ordering::Relaxed);
    }
}

/// Keeps what is resident within the limit, see [`pressure`].
async fn bound_resident(driver: DriverHandle, limit: u64) {
    let mut look = tokio::time::interval(pressure::LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut pressure, mut told) = (Pressure::new(limit), WHOLE_SHARE);
    loop {
        look.tick().await;
        // A file of the kernel's own: reading it waits for no disk.
        let Some(resident) = pressure::resident() else { return };
        let share = pressure.look(resident);
        if share == pressure::LEAST && told != share {
            tracing::warn!(resident, limit, "more is resident than the limit however little of it is data");
        }
        if share != told {
            tracing::debug!(share, resident, "memory for data, in parts of {WHOLE_SHARE}");
            if driver.send(Input::MemoryShare(share)).await.is_err() {
                return;
            }
            told = share;
        }
    }
}

/// Everything that is counted, as metrics.
fn metric_sources(
    driver: &DriverHandle,
    peers: &PeersHandle,
    membership: Option<&Arc<Membership>>,
    front: &Arc<FrontConfig>,
    log: Option<Arc<LogStats>>,
) -> Vec<metrics::Source> {
    let view = driver.client();
    let (driver_stats, peer_stats) = (driver.stats().clone(), peers.stats().clone());
    let mut sources: Vec<metrics::Source> = vec![
        Box::new(move |into| metrics::view_samples(&view.view(), into)),
        Box::new(move |into| metrics::driver_samples(&driver_stats, into)),
        Box::new(move |into| metrics::peer_samples(&peer_stats, into)),
    ];
    let front = front.clone();
    sources.push(Box::new(move |into| metrics::front_samples(&front.stats, into)));
    if let Some(membership) = membership.cloned() {
        sources.push(Box::new(move |into| {
            let gossip = membership.gossip();
            metrics::gossip_samples(&gossip.stats(), gossip.tracker().conflicts(), into)
        }));
    }
    if let Some(log) = log {
        sources.push(Box::new(move |into| metrics::log_samples(&log, into)));
    }
    sources
}

#[cfg(test)]
mod tests;
