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
use crate::driver::{Driver, DriverHandle, Input, NodeEvent, Recover};
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
use crema_shard::meta::{NO_LIFE, WHOLE_SHARE};
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
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::task::JoinHandle;

/// How long an id may be in use by another process before this one gives up.
const ID_IN_USE_PATIENCE: Duration = Duration::from_secs(10);
/// Refusals that lie further apart than this do not belong together.
const ID_IN_USE_GAP: Duration = Duration::from_secs(3);
/// Period at which an unregistered node looks whether it is registered by now, or who is in its place.
const REGISTRATION_LOOK: Duration = Duration::from_secs(2);
/// Most bytes of another node's list of members.
const MAX_MEMBERS_BYTES: usize = 4 << 20;
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

/// Lets nodes be reached that have connected to this one.
async fn follow_callers(book: Arc<Mutex<AddressBook>>, peers: PeersHandle) {
    let mut callers = peers.callers();
    loop {
        let present = callers.borrow_and_update().clone();
        update_addresses(&book, &peers, |book| book.set_callers(present));
        if callers.changed().await.is_err() {
            return;
        }
    }
}

/// Replaces the cluster's keys wherever they are used.
///
/// Errors: gossip does not take them, see [`Membership::set_keys`].
fn set_keys(membership: Option<&Membership>, peers: &PeersHandle, ring: KeyRing) -> Result<(), GossipError> {
    peers.set_keys(ring.clone());
    membership.map_or(Ok(()), |membership| membership.set_keys(ring))
}

/// Takes the cluster's keys from their file again whenever that changes; looks each `period`.
async fn follow_keys(path: PathBuf, membership: Option<Arc<Membership>>, peers: PeersHandle, period: Duration) {
    let mut known = None;
    let mut look = tokio::time::interval(period);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let path = path.clone();
        let read = tokio::task::spawn_blocking(move || crate::config::read_keys(&path)).await;
        let Ok(read) = read else { continue };
        let found = read.map(|ring| (ring.primary(), ring.ids().collect::<Vec<_>>(), ring));
        match found {
            // Told once; what was read last stays in force.
            Err(error) if known != Some(Err(error.clone())) => {
                tracing::error!(%error, "the cluster's keys were not read again");
                known = Some(Err(error));
            }
            Err(_) => {}
            Ok((primary, ids, ring)) if known != Some(Ok((primary, ids.clone()))) => {
                if let Err(error) = set_keys(membership.as_deref(), &peers, ring) {
                    tracing::error!(%error, "gossip does not take the cluster's keys");
                }
                if known.is_some() {
                    let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
                    tracing::info!(%primary, keys = ids.join(" "), "the cluster's keys have changed");
                }
                known = Some(Ok((primary, ids)));
            }
            Ok(_) => {}
        }
    }
}

/// Acts on what the driver reports.
async fn follow_events(
    watch: Arc<Watch>,
    mut events: mpsc::Receiver<NodeEvent>,
    data_dir: Option<Arc<Mutex<DataDir>>>,
    (book, peers): (Arc<Mutex<AddressBook>>, PeersHandle),
) {
    let (mut in_use, mut rival): (Option<IdInUse>, Option<IdInUse>) = (None, None);
    let node = watch.facts.node;
    while let Some(event) = events.recv().await {
        match event {
            NodeEvent::Joined { uuid, generation, founded } => {
                let how = if founded { "founded" } else { "joined" };
                tracing::debug!("node {node} has {how} cluster {} {uuid}", watch.facts.cluster);
                if let Some(dir) = data_dir.clone() {
                    let kept = tokio::task::spawn_blocking(move || {
                        dir.lock().unwrap_or_else(std::sync::PoisonError::into_inner).set_cluster(uuid.0, generation)
                    });
                    match kept.await {
                        Ok(Ok(())) => {}
                        Ok(Err(e)) => watch.fail(e.to_string(), true),
                        Err(e) => watch.fail(format!("the cluster's identity cannot be kept: {e}"), false),
                    }
                }
            }
            NodeEvent::Admit(node) => update_addresses(&book, &peers, |book| book.admit(node)),
            NodeEvent::Fenced { by, told_by } => {
                let told_by = told_by.map_or(String::new(), |peer| format!(" (says node {peer})"));
                let reason = match by {
                    // By the word of an operator: a directory that is opened again would go on with the same life.
                    Some(NO_LIFE) => format!(
                        "a recovery has declared this life of node {node} over{told_by}: this process ends. Move its data \
                         directory away, if it has one, and start it again"
                    ),
                    by => {
                        let by = by.map_or(String::new(), |by| format!(", life {by}"));
                        format!("a newer process with node id {node}{by}, has taken over{told_by}: this one ends")
                    }
                };
                watch.fail(reason, false);
            }
            NodeEvent::Misfit(reason) => {
                watch.fail(format!("this node's configuration does not fit the cluster: {reason}"), true);
            }
            NodeEvent::IdInUse { by } if by == watch.incarnation => {
                // The refusal was meant for another process that asked under our id, but reached us.
                let refused = IdInUse::again(rival, Instant::now());
                if refused.first == refused.last {
                    tracing::warn!("another process has asked to take node id {node} over and was refused");
                }
                rival = Some(refused);
            }
            NodeEvent::IdInUse { by } => {
                let refused = IdInUse::again(in_use, Instant::now());
                if refused.first == refused.last {
                    tracing::warn!("node id {node} is in use by a living process, life {by}; trying again for a while");
                }
                if refused.last - refused.first >= ID_IN_USE_PATIENCE {
                    watch.fail(watch.id_in_use(&by.to_string()), true);
                }
                in_use = Some(refused);
            }
            NodeEvent::Drained => drop(watch.drained.send_replace(true)),
            NodeEvent::DiskFailed(why) => watch.fail(format!("the disk failed, so this node ends: {why}"), false),
            NodeEvent::DriverDied => watch.fail("an internal error has ended this node's driver".to_owned(), false),
        }
    }
}

/// A series of refusals because the id is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct IdInUse {
    first: Instant,
    last: Instant,
}

impl IdInUse {
    /// The series with one more refusal at `now`; a long gap begins a new one.
    fn again(series: Option<IdInUse>, now: Instant) -> IdInUse {
        match series {
            Some(series) if now - series.last <= ID_IN_USE_GAP => IdInUse { last: now, ..series },
            _ => IdInUse { first: now, last: now },
        }
    }
}

/// Notices that this life is kept from registering by another process under its id. The refusal itself, like all that
/// is sent to this id, goes to the life that is registered, so this node has to ask the others whom they are connected to.
///
/// Where they have no HTTP there is gossip, which counts one process of each id. A life that is registered knows it by its table,
/// and starts its gossip anew above any other, see [`crate::membership`]: so a life that stays overtaken is not the one that is
/// registered, unless it belongs to a cluster from before and has not learned yet how that stands. Such a one (`returns`) says
/// what it hears, and waits. `overtaken_patience` is long enough for gossip to notice that a process of before has ended.
async fn watch_registration(watch: Arc<Watch>, returns: bool, overtaken_patience: Duration) {
    let mut look = tokio::time::interval(REGISTRATION_LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut place = TakenPlace::default();
    // The first tick is immediate, when nothing can have happened yet.
    look.tick().await;
    loop {
        look.tick().await;
        let view = watch.driver.view();
        let registered = view.nodes.get(&watch.facts.node);
        let (rival, patience) = if registered.is_some_and(|route| route.incarnation == watch.incarnation) {
            (None, None)
        } else if let Some(life) = find_rival(&watch).await {
            (Some(life), Some(ID_IN_USE_PATIENCE))
        } else {
            (overtaken_by(&watch), (!returns).then_some(overtaken_patience))
        };
        watch.set_rival(rival.as_deref());
        let Some(rival) = rival else {
            place = TakenPlace::default();
            continue;
        };
        let now = Instant::now();
        if place.is_new_by(&rival, now) {
            let node = watch.facts.node;
            tracing::warn!(
                "node id {node} is in use by another living process, life {rival}; trying again for a while"
            );
        }
        if place.is_lost(patience, now) {
            watch.fail(watch.id_in_use(&rival), true);
            return;
        }
    }
}

/// By which life, and since when, this one's place is taken.
#[derive(Debug, Default)]
struct TakenPlace(Option<(String, Instant)>);

impl TakenPlace {
    /// Takes note that it is by `life`; returns whether that is news.
    fn is_new_by(&mut self, life: &str, now: Instant) -> bool {
        let known = self.0.as_ref().is_some_and(|(known, _)| known == life);
        if !known {
            self.0 = Some((life.to_owned(), now));
        }
        !known
    }

    /// Whether it has lasted as long as `patience`; without an end to that, never.
    fn is_lost(&self, patience: Option<Duration>, now: Instant) -> bool {
        self.0.as_ref().zip(patience).is_some_and(|((_, since), patience)| now - *since >= patience)
    }
}

/// The other life under this id that gossip hears in this one's place.
fn overtaken_by(watch: &Watch) -> Option<String> {
    let life = watch.membership.as_ref()?.gossip().overtaken_by()?;
    // A life outlasts its process if its log is on disk: this would be its own trace.
    (life != watch.incarnation).then(|| life.to_string())
}

/// How long gossip of this pace may take a process for living that has ended, twice over.
fn overtaken_patience(tuning: &GossipTuning) -> Duration {
    (tuning.interval.mul_f64(tuning.phi) * 2).max(ID_IN_USE_PATIENCE)
}

/// The other life under this id to which a member of the cluster is connected, if one says so.
async fn find_rival(watch: &Watch) -> Option<String> {
    let this = watch.facts.node;
    let members = watch.membership.as_ref()?.gossip().members();
    let others = members.into_iter().filter(|m| m.meta.node_id != this && m.state.is_present());
    for addr in others.filter_map(|m| m.meta.http_addr).take(3) {
        // Without keys anybody may have made that address up.
        let password = watch.password.clone().filter(|_| watch.keyed);
        let door = crate::cli::Door { addr, password };
        let asked = tokio::task::spawn_blocking(move || crate::cli::http_get(&door, "/v1/members", MAX_MEMBERS_BYTES));
        let Ok(Ok((200, body))) = asked.await else {
            continue;
        };
        let Ok(members) = serde_json::from_str::<Vec<MemberBody>>(&body) else {
            continue;
        };
        let entry = members.into_iter().find(|m| m.node_id == this.0 && m.connected);
        let rival = entry.and_then(|m| m.registered).filter(|life| *life != watch.facts.incarnation);
        if rival.is_some() {
            return rival;
        }
    }
    None
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
mod tests {
    use super::*;
    use crate::peers::{PeerEvent, Reach};

    #[test]
    fn addresses_are_told_as_others_can_use_them() {
        let addr = |s: &str| s.parse::<SocketAddr>().unwrap();
        assert_eq!(advertised(addr("10.0.0.1:9001"), None), "10.0.0.1:9001");
        assert_eq!(advertised(addr("0.0.0.0:9001"), Some("crema-1.local")), "crema-1.local:9001");
        assert_eq!(advertised(addr("[::]:9001"), Some("fd00::1")), "[fd00::1]:9001");
        assert_eq!(advertised(addr("127.0.0.1:9001"), Some("crema-1.local")), "127.0.0.1:9001");
    }

    #[test]
    fn refusals_of_an_id_form_a_series_only_if_they_come_close_together() {
        let begin = Instant::now();
        let at = |s: u64| begin + Duration::from_secs(s);
        let mut series = None;
        for second in 0..=10 {
            series = Some(IdInUse::again(series, at(second)));
        }
        assert_eq!(series.unwrap().first, begin);
        assert_eq!(IdInUse::again(series, at(14)).first, at(14));
    }

    #[test]
    fn a_place_is_lost_to_one_other_life_that_stays_and_never_without_an_end_to_patience() {
        let begin = Instant::now();
        let at = |s: u64| begin + Duration::from_secs(s);
        let patience = Some(Duration::from_secs(10));
        let mut place = TakenPlace::default();
        assert!(!place.is_lost(patience, at(100)));
        assert!(place.is_new_by("a", at(0)));
        assert!(!place.is_new_by("a", at(9)) && !place.is_lost(patience, at(9)));
        // Of another life nobody knows yet whether it stays.
        assert!(place.is_new_by("b", at(10)) && !place.is_lost(patience, at(19)));
        assert!(place.is_lost(patience, at(20)));
        assert!(!place.is_lost(None, at(1_000_000)), "it may be the one that is registered");
    }

    #[test]
    fn a_slow_gossip_is_given_the_time_to_notice_an_end() {
        let tuned = |ms| GossipTuning { interval: Duration::from_millis(ms), phi: 16.0, ..GossipTuning::default() };
        assert_eq!(overtaken_patience(&tuned(250)), ID_IN_USE_PATIENCE);
        assert_eq!(overtaken_patience(&tuned(1_000)), Duration::from_secs(32));
    }

    #[tokio::test]
    async fn an_occupied_port_is_named_with_its_key() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = taken.local_addr().unwrap();
        let Err(error) = bind("http_addr", addr) else { panic!("bound twice") };
        assert_eq!(
            error.to_string(),
            format!("http_addr {addr} cannot be bound: the port is in use by another process")
        );
    }

    fn local() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    /// A node that waits for a cluster which does not exist.
    fn joining() -> NodeConfig {
        NodeConfig {
            node_id: NodeId(7),
            cluster: "test".to_owned(),
            initial_members: vec![],
            static_peers: BTreeMap::new(),
            seeds: vec![],
            gossip: GossipOptions::default(),
            shards: 4,
            replicas: 3,
            bind: BindAddrs {
                raft: local(),
                gossip: Some(local()),
                redis: Some(local()),
                redis_cluster: None,
                http: Some(local()),
            },
            advertise_host: None,
            metadata: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
            requirepass: None,
            request_deadline: Duration::from_secs(5),
            reads: ReadMode::Lease,
            max_clients: 10,
            stop_grace: Duration::from_secs(10),
            max_log_bytes: 1 << 20,
            cluster_keys: None,
            cluster_key_file: None,
            auto_voters: AutoVoters::default(),
            memory: MemoryOptions::default(),
            bound_resident: false,
            data_dir: None,
            state_dir: None,
            checkpoint_log_bytes: 512 << 20,
            snapshot_rate: 128 << 20,
        }
    }

    async fn get(node: &Node, path: &'static str) -> (u16, String) {
        let http = node.addresses().iter().find(|(key, _)| *key == "http_addr").unwrap().1;
        let asked = tokio::task::spawn_blocking(move || {
            crate::cli::http_get(&crate::cli::Door::open(http.to_string()), path, 1 << 20)
        });
        asked.await.unwrap().unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_node_without_its_cluster_is_alive_but_not_ready_and_stops_at_once() {
        let node = Node::start(joining()).await.unwrap();
        assert_eq!(get(&node, "/livez").await.0, 200);
        let (code, body) = get(&node, "/readyz").await;
        assert_eq!(code, 503);
        let reason = node.not_ready().expect("not ready");
        assert!(body.contains("reason") && !reason.is_empty(), "{body}");

        let members: Vec<admin::MemberBody> = serde_json::from_str(&get(&node, "/v1/members").await.1).unwrap();
        assert_eq!(members.len(), 1);
        assert_eq!((members[0].node_id, members[0].state.as_str()), (7, "alive"));
        assert_eq!(members[0].metadata["zone"], "a");
        let raft = node.addresses()[0];
        assert_eq!((raft.0, members[0].raft_addr.clone()), ("raft_addr", raft.1.to_string()));
        assert_eq!(get(&node, "/v1/shards").await, (200, "[]".to_owned()));
        let page = get(&node, "/metrics").await.1;
        for name in [
            "crema_driver_rounds_total",
            "crema_peer_dials_failed_total",
            "crema_gossip_sent_bytes_total",
            "crema_shards ",
        ] {
            assert!(page.contains(name), "{name} is missing in\n{page}");
        }

        let begin = Instant::now();
        let second = node.clone();
        tokio::join!(node.shutdown(), second.shutdown());
        assert!(begin.elapsed() < Duration::from_secs(5), "nobody needs a node that has not joined");
        assert_eq!(node.ready().await, Err(Stopped));
        assert_eq!(
            node.change_voters(NodeId(1), true).await,
            Err(crema_shard::VoterError::Stopped),
            "nobody was asked"
        );
        assert_eq!(node.failure(), None);
        for (key, addr) in node.addresses() {
            if *key == "gossip_addr" {
                std::net::UdpSocket::bind(addr).unwrap_or_else(|e| panic!("{key} {addr}: {e}"));
            } else {
                std::net::TcpListener::bind(addr).unwrap_or_else(|e| panic!("{key} {addr}: {e}"));
            }
        }
    }

    /// Whatever ends it, a panic too: see the tests of `crema-gossip`.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn while_gossip_has_ended_a_node_is_not_ready_and_it_is_started_anew() {
        let node =
            Node::start(NodeConfig { initial_members: vec![NodeId(7)], replicas: 1, ..joining() }).await.unwrap();
        let soon = Duration::from_secs(20);
        tokio::time::timeout(soon, node.ready()).await.expect("a cluster of one").unwrap();
        let membership = node.inner.watch.membership.clone().unwrap();
        let ended = membership.gossip();
        ended.shutdown().await;
        assert_eq!(node.not_ready().as_deref(), Some("gossip has stopped"));
        let again = async {
            while node.not_ready().is_some() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(soon, again).await.expect("it is ready again");
        let gossip = membership.gossip();
        assert!(gossip.generation() > ended.generation() && gossip.health());
        assert_eq!(gossip.addr(), ended.addr());
        node.shutdown().await;
    }

    /// Peers of one node and what its driver would hear of them.
    fn peers(node: u64, keys: &KeyRing) -> (PeersHandle, crossbeam::channel::Receiver<Input>) {
        let (driver, heard) = crossbeam::channel::bounded(64);
        let config = PeersConfig {
            cluster: "test".to_owned(),
            node: NodeId(node),
            incarnation: Incarnation(node.into()),
            boot: 0,
            addr: "127.0.0.1:1".to_owned(),
            keys: Some(keys.clone()),
            options: PeerOptions::default(),
        };
        let listener = std::net::TcpListener::bind(local()).unwrap();
        (Peers::start(config, listener, driver).unwrap(), heard)
    }

    /// Gossip and connections have the keys of the file, whatever has stood in it before, and also when gossip was started anew.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn keys_follow_their_file() {
        let bytes = |n: u8| std::array::from_fn(|i| n + i as u8);
        let key = |n: u8| crema_gossip::ClusterKey::new(bytes(n));
        let line = |n: u8| bytes(n).map(|byte| format!("{byte:02x}")).concat();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        // Whole or not at all, as whoever changes it should.
        let write = |text: &str| {
            let whole = dir.path().join("new");
            std::fs::write(&whole, text).unwrap();
            std::fs::rename(whole, &path).unwrap();
        };
        write(&line(1));
        let first = crate::config::read_keys(&path).unwrap();
        let mut gossip = GossipConfig::new(NodeId(1), Incarnation(1), "127.0.0.1:9001", "test", local());
        gossip.keys = Some(first.clone());
        let membership = Arc::new(Membership::start(gossip).await.unwrap());
        let (ours, _heard) = peers(1, &first);
        let follow = follow_keys(path.clone(), Some(membership.clone()), ours.clone(), Duration::from_millis(1));
        let following = tokio::spawn(follow);
        let gossip_has = async |n: u8| {
            let wanted = Some(key(n).id());
            let has = async {
                while membership.gossip().keyring().map(|ring| ring.primary()) != wanted {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(30), has).await.expect("gossip has the key");
        };
        write(&line(2));
        gossip_has(2).await;
        // What cannot be read changes nothing, and the next that can does.
        write("no key");
        write(&format!("{}\n{}\n", line(3), line(2)));
        gossip_has(3).await;
        // Peers that have the newest alone come in.
        let (theirs, heard) = peers(2, &KeyRing::new(key(3)));
        theirs.set_reach(NodeId(1), Reach::at(ours.local_addr().to_string()));
        let up = tokio::task::spawn_blocking(move || heard.recv_timeout(Duration::from_secs(30)));
        assert!(
            matches!(up.await.unwrap(), Ok(Input::Peers(batch)) if matches!(batch.events[0], PeerEvent::Up { .. }))
        );
        following.abort();
    }

    /// Its clock was an hour fast at the last start and is right again; peers would ignore a life below that one.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn gossip_of_a_node_with_a_directory_exceeds_its_last_generation() {
        let generation = |node: &Node| node.inner.watch.membership.as_ref().unwrap().gossip().generation();
        let node = Node::start(joining()).await.unwrap();
        let fast = generation(&node) + 3_600_000_000_000;
        node.shutdown().await;
        for durable in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let path = Some(dir.path().to_owned());
            let (data_dir, state_dir) = if durable { (path, None) } else { (None, path) };
            let config = NodeConfig { data_dir, state_dir, ..joining() };
            let bind = local();
            let addrs = NodeAddrs { raft: "127.0.0.1:1".to_owned(), ..NodeAddrs::default() };
            let mut before = gossip_config(&config, Incarnation(1), &addrs, bind, bind);
            before.generation = Some(fast);
            crema_gossip::Gossip::start(before).await.unwrap().shutdown().await;
            for life in 1..3 {
                let node = Node::start(config.clone()).await.unwrap();
                assert_eq!(generation(&node), fast + life);
                node.shutdown().await;
            }
        }
    }

    #[tokio::test]
    async fn nothing_stays_behind_when_an_address_is_occupied() {
        let first = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = first.local_addr().unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut config = joining();
        (config.bind.gossip, config.bind.raft) = (Some(taken), free);
        let error = Node::start(config).await.unwrap_err();
        let text = format!("gossip_addr {taken} cannot be bound: the port is in use by another process");
        assert_eq!(error.to_string(), text, "as of any other address");
        assert!(matches!(&error, StartError::Bind { key: "gossip_addr", addr, .. } if *addr == taken), "{error}");
        std::net::TcpListener::bind(free).expect("the listeners are closed again");
    }

    #[tokio::test]
    async fn a_directory_that_cannot_be_used_is_named_with_its_key() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let within = file.path().join("below");
        for (path, why) in [(file.path(), "it is not a directory"), (within.as_path(), "it is not a directory")] {
            let path = Some(path.to_owned());
            let text = |key| format!("{key} {} cannot be used: {why}", path.as_deref().unwrap().display());
            let config = NodeConfig { data_dir: path.clone(), ..joining() };
            assert_eq!(Node::start(config).await.unwrap_err(), StartError::Invalid(text("data_dir")));
            let config = NodeConfig { state_dir: path.clone(), ..joining() };
            assert_eq!(Node::start(config).await.unwrap_err(), StartError::Invalid(text("state_dir")));
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_stop_waits_for_what_its_tasks_are_doing() {
        let (begin, begun) = tokio::sync::oneshot::channel();
        let (go_on, may_go_on) = std::sync::mpsc::channel();
        let done = Arc::new(AtomicBool::new(false));
        let seen = done.clone();
        // Between two points at which it can be ended.
        let task = tokio::spawn(async move {
            let _ = begin.send(());
            let _ = may_go_on.recv();
            seen.store(true, Ordering::Relaxed);
        });
        begun.await.unwrap();
        let mut ending = Box::pin(end_all(vec![task, tokio::spawn(std::future::pending())]));
        let waits = std::future::poll_fn(|c| std::task::Poll::Ready(ending.as_mut().poll(c).is_pending())).await;
        assert!(waits);
        go_on.send(()).unwrap();
        ending.await;
        assert!(done.load(Ordering::Relaxed));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_dropped_node_ends_its_driver() {
        let node = Node::start(joining()).await.unwrap();
        let driver = node.inner.watch.driver.clone();
        drop(node);
        let ended = async {
            while driver.is_running() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), ended).await.expect("the thread ends");
    }
}
