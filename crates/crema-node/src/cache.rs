//! The embedding API: a node inside a Rust program.
//!
//! ```text
//!   put / get / delete --encode--> CacheClient --round robin--> 8 lanes, each one driver connection
//!                                                                |  few in flight: submitted by the caller itself
//!                                                                |  many: queued, one Vec a wake-up by the lane's task
//!   caller <---- oneshot <---- slab of waiting callers <---- Outbox of the lane <---- driver
//! ```
//!
//! A `get` looks at the table of this node's own replica first: under the leader's lease, or at a lower level, it is
//! answered on the caller's own task, without lane or driver.
//!
//! Several lanes keep callers on different cores from meeting at one lock. Order between concurrent callers is not
//! promised, so it does not matter which lane a request takes; a caller that awaits one operation before it begins
//! the next sees them in that order, because the first has taken effect by then.

use crate::client::{Client, Outbox, Stopped};
use crate::config::{Secret, check_password, is_loopback};
use crate::coordinator::{Coordinator, MultiRaftCacheConfig};
use crate::memberlist::{EventReceiver, LOOKUP_LIMIT, Member, MemberState, MemberlistDiscovery, RaftNodeMetadata};
use crate::node::{BindAddrs, GossipOptions, Node, NodeConfig, StartError};
use bytes::Bytes;
use crema_core::Op;
use crema_core::{
    CodecError, EvictionPolicy, KeyRef, MonoTime, OpError, Reply, SetCond, SetExpire, Slot, encode_ops, limits,
};
use crema_gossip::KeyRing;
use crema_shard::{
    AutoVoters, ClientRequest, ClientResult, ConnId, MemoryOptions, ReadLevel, ReadMode, Refusal, Token, VoterError,
};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

/// A node's id: an integer from 1 on that no other node of the cluster has.
pub type NodeId = u64;
/// A data shard's number, from 0 on.
pub type ShardId = u32;
/// What the operations of this module return.
pub type Result<T, E = CacheError> = std::result::Result<T, E>;

/// Connections to the driver that one client spreads its requests over.
const LANES: usize = 8;
/// Up to this many requests in flight on a lane, a caller hands its own to the driver: one wake-up less.
const DIRECT: usize = 4;
/// Bound on the requests in flight, in units of 1 KiB begun; every request takes one unit more, and a read as many as
/// [`READ_UNITS`] for the value that it may bring.
const BUDGET_UNITS: usize = 64 * 1024;
/// What a read takes of the budget: a bound of 16,384 reads in flight.
const READ_UNITS: usize = 3;
/// How long after its deadline a request without an answer is given up: its driver must have stopped.
const OVERDUE: Duration = Duration::from_secs(2);
/// How long a node that is heard of may take to join or to answer before it can be added, and how often that is looked at.
const ADD_PEER_PATIENCE: Duration = Duration::from_secs(10);
const ADD_PEER_AGAIN: Duration = Duration::from_millis(200);
/// Longest time for operations in flight to finish when the node stops; Redis clients have as long.
const FINISH: Duration = crate::node::RESP_DRAIN;
/// How often a request without a placement, or with an outdated one, looks at the view again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Why an operation did not succeed. Each variant says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// Certainly not executed: retry as you like.
    #[error("not executed: {reason}")]
    NotApplied {
        /// What stood in the way.
        reason: String,
    },
    /// A write may or may not have been executed, now or later: read before you retry. Never the end of a read.
    #[error("outcome unknown: the operation may or may not have been executed, now or later: read before you retry")]
    OutcomeUnknown,
    /// Certainly not executed: the memory for the data of the key's shard is full, and nothing in it may go, or not enough. To
    /// retry alone does not help: delete keys, raise [`CacheConfig::with_max_memory`], or allow eviction.
    #[error("not executed: the memory for data is full: delete keys, raise max_memory, or allow eviction")]
    MemoryFull,
    /// The request or the configuration is not valid, or the key holds what the operation cannot use: give up, or ask
    /// differently. Nothing was changed.
    #[error("invalid: {0}")]
    Invalid(String),
    /// The node could not be started: correct what it names.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The node did not become ready in time: wait longer, or see to the reason.
    #[error("not ready: {reason}")]
    NotReady {
        /// Why it is not ready.
        reason: String,
    },
    /// This node has stopped; nothing was executed. Where nobody has shut it down, [`DistributedCache::failure`] says why. Make a
    /// new [`DistributedCache`].
    #[error("this node has stopped, and nothing was executed: unless it was shut down, failure() says why")]
    Stopped,
}

/// Configuration of an embedded node. Builders check nothing; [`DistributedCache::new`] does.
#[derive(Clone, Debug)]
pub struct CacheConfig {
    node_id: NodeId,
    raft_addr: SocketAddr,
    seed_nodes: Vec<(NodeId, SocketAddr)>,
    cluster: String,
    multiraft: MultiRaftCacheConfig,
    discovery: Option<MemberlistDiscovery>,
    join: bool,
    metadata: BTreeMap<String, String>,
    request_deadline: Duration,
    reads: ReadMode,
    stop_grace: Duration,
    redis_addr: Option<SocketAddr>,
    redis_cluster_addr: Option<SocketAddr>,
    http_addr: Option<SocketAddr>,
    insecure: bool,
    data_dir: Option<PathBuf>,
    max_memory: u64,
    eviction: Option<EvictionPolicy>,
    auto_voters_after: Duration,
    cluster_keys: Option<KeyRing>,
    requirepass: Option<Secret>,
}

impl CacheConfig {
    /// Node `node_id`, which the others reach at `raft_addr`. Alone, it is a one-node cluster of 16 shards.
    pub fn new(node_id: NodeId, raft_addr: SocketAddr) -> Self {
        CacheConfig {
            node_id,
            raft_addr,
            seed_nodes: Vec::new(),
            cluster: "crema".to_owned(),
            multiraft: MultiRaftCacheConfig::default(),
            discovery: None,
            join: false,
            metadata: BTreeMap::new(),
            request_deadline: Duration::from_secs(5),
            reads: ReadMode::default(),
            stop_grace: Duration::from_secs(10),
            redis_addr: None,
            redis_cluster_addr: None,
            http_addr: None,
            insecure: false,
            data_dir: None,
            max_memory: 0,
            eviction: Some(EvictionPolicy::default()),
            auto_voters_after: Duration::from_secs(300),
            cluster_keys: None,
            requirepass: None,
        }
    }
    /// The other initial members and their Raft addresses. They and this node found the cluster together; each must be
    /// given the same set.
    pub fn with_seed_nodes(mut self, nodes: Vec<(NodeId, SocketAddr)>) -> Self {
        self.seed_nodes = nodes;
        self
    }
    /// Find the other nodes by gossip.
    pub fn with_cluster_discovery(mut self, discovery: MemberlistDiscovery) -> Self {
        self.discovery = Some(discovery);
        self
    }
    /// Join a cluster that exists, and never found one. The seed nodes are then those who are asked; without any, whom
    /// discovery finds. A node that joins serves every key at once, and holds data once the cluster approves it.
    pub fn with_join(mut self, join: bool) -> Self {
        self.join = join;
        self
    }
    /// Adds an entry to the free description of this node that discovery tells all others, such as `zone`; a later one of the
    /// same name replaces it. Bounds as for [`crate::MemberlistConfig::metadata`], which may not say otherwise.
    pub fn with_metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(name.into(), value.into());
        self
    }
    /// Divides the data into shards, each a Raft group of its own; 16 of them in three replicas by default. Replaces what
    /// [`CacheConfig::with_shards`] and [`CacheConfig::with_replicas`] have said before.
    pub fn with_multiraft_config(mut self, multiraft: MultiRaftCacheConfig) -> Self {
        self.multiraft = multiraft;
        self
    }
    /// The cluster's name, `crema` by default. Nodes of differently named clusters refuse each other.
    pub fn with_cluster_name(mut self, name: impl Into<String>) -> Self {
        self.cluster = name.into();
        self
    }
    /// Data shards to found the cluster with, 1 to 16,384; 16 by default.
    pub fn with_shards(mut self, shards: u32) -> Self {
        (self.multiraft.enabled, self.multiraft.num_shards) = (true, shards);
        self
    }
    /// Replicas of each shard, 1 to 7; 3 by default, and never more than there are nodes.
    pub fn with_replicas(mut self, replicas: u32) -> Self {
        self.multiraft.replicas = replicas;
        self
    }
    /// Longest time an operation may take, 10 ms to 10 min; 5 s by default.
    pub fn with_request_deadline(mut self, deadline: Duration) -> Self {
        self.request_deadline = deadline;
        self
    }
    /// How a leader makes sure that a read is linearizable; set it alike on all nodes. [`ReadMode::Lease`], the default,
    /// costs most reads no message, and assumes that the clocks of two nodes differ in rate by less than 15 %.
    /// [`ReadMode::ReadIndex`] costs a round to a majority, shared by the reads of a moment, and assumes nothing of clocks.
    pub fn with_reads(mut self, reads: ReadMode) -> Self {
        self.reads = reads;
        self
    }
    /// Bytes of memory that the node may use, 16 MiB to 1 PiB, or 0 for no limit, which is the default. Three quarters are for
    /// keys and values, divided over the shards that it holds.
    pub fn with_max_memory(mut self, bytes: u64) -> Self {
        self.max_memory = bytes;
        self
    }
    /// What goes when a shard's memory is full; with none, writes that take more memory end as [`CacheError::MemoryFull`].
    pub fn with_eviction(mut self, eviction: Option<EvictionPolicy>) -> Self {
        self.eviction = eviction;
        self
    }
    /// Directory in which this node keeps its log and its data, so that they survive a restart, of this node or of all;
    /// writes are then acknowledged when they are on the disks of a majority. Without, all is in memory alone.
    pub fn with_data_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(dir.into());
        self
    }
    /// After how long a node is given or loses replicas by itself, where
    /// [`auto_add_voters`](crate::PeerManagementConfig::auto_add_voters) or
    /// [`auto_remove_voters`](crate::PeerManagementConfig::auto_remove_voters) says so: 5 s to a day; 5 min by default.
    pub fn with_auto_voters_after(mut self, after: Duration) -> Self {
        self.auto_voters_after = after;
        self
    }
    /// How long [`DistributedCache::shutdown`] waits until every shard can do without this node, at most 10 min; 10 s by
    /// default.
    pub fn with_stop_grace(mut self, grace: Duration) -> Self {
        self.stop_grace = grace;
        self
    }
    /// Also serve Redis clients of any kind here.
    pub fn with_redis_addr(mut self, addr: SocketAddr) -> Self {
        self.redis_addr = Some(addr);
        self
    }
    /// Also serve Redis Cluster clients here.
    pub fn with_redis_cluster_addr(mut self, addr: SocketAddr) -> Self {
        self.redis_cluster_addr = Some(addr);
        self
    }
    /// Also serve health, metrics and the admin API here.
    pub fn with_http_addr(mut self, addr: SocketAddr) -> Self {
        self.http_addr = Some(addr);
        self
    }
    /// The cluster's keys, the same on every node. With them gossip is encrypted and authenticated, and a peer has to prove that
    /// it has one before anything else of it is read; both may then be open to the network. They are changed while the cluster
    /// runs with [`DistributedCache::set_cluster_keys`].
    pub fn with_cluster_keys(mut self, keys: KeyRing) -> Self {
        self.cluster_keys = Some(keys);
        self
    }
    /// The password of Redis clients (`AUTH`) and of HTTP (a bearer token; `/livez` and `/readyz` are open to all), as
    /// `--requirepass-file` sets it for the binary: one line of at most 512 bytes, of which HTTP carries printable ASCII without
    /// spaces only. With it the addresses of both may be open to the network.
    pub fn with_requirepass(mut self, password: impl Into<String>) -> Self {
        self.requirepass = Some(Secret::new(password));
        self
    }
    /// Listen on addresses that are not loopback although nothing authenticates who connects.
    pub fn with_insecure(mut self, insecure: bool) -> Self {
        self.insecure = insecure;
        self
    }

    /// Checks everything.
    fn resolve(self) -> Result<NodeConfig> {
        let invalid = |text: String| Err(CacheError::Invalid(text));
        let mut members: Vec<NodeId> = self.seed_nodes.iter().map(|(id, _)| *id).collect();
        members.push(self.node_id);
        members.sort_unstable();
        if members[0] == 0 {
            return invalid("node ids begin at 1".to_owned());
        }
        if members.len() > crate::config::MAX_NAMED_NODES {
            return invalid(format!("more than {} initial members", crate::config::MAX_NAMED_NODES));
        }
        let peers = self.peers()?;
        members.dedup();
        if self.join {
            members.retain(|id| *id != self.node_id);
        }
        let gossip = match &self.discovery {
            Some(discovery) => discovery.resolve(self.node_id, self.raft_addr, &peers).map_err(CacheError::Invalid)?,
            None => None,
        };
        if self.join && peers.is_empty() && gossip.as_ref().is_none_or(|gossip| gossip.seeds.is_empty()) {
            return invalid(
                "to join, a node must know one of the cluster: name seed nodes or seed addresses".to_owned(),
            );
        }
        let raft_host = gossip.as_ref().and_then(|gossip| gossip.raft_host);
        if self.raft_addr.ip().is_unspecified() && raft_host.is_none() {
            return invalid(format!(
                "{} is no address that others could connect to: name this machine's own, or set advertise_addr of the \
                 discovery",
                self.raft_addr
            ));
        }
        let mut metadata = gossip.as_ref().map(|gossip| gossip.metadata.clone()).unwrap_or_default();
        for (name, value) in self.metadata {
            if metadata.insert(name.clone(), value.clone()).is_some_and(|other| other != value) {
                return invalid(format!("metadata {name:?} is {value:?} here and something else in the discovery"));
            }
        }
        if let Some(password) = &self.requirepass {
            check_password(password).map_err(|e| CacheError::Invalid(e.to_string()))?;
        }
        let gossip_bind = gossip.as_ref().map(|gossip| gossip.bind);
        let keys = (self.cluster_keys.is_some(), "with_cluster_keys");
        let password = (self.requirepass.is_some(), "with_requirepass");
        let doors = [
            (Some(self.raft_addr), keys),
            (gossip_bind, keys),
            (self.redis_addr, password),
            (self.redis_cluster_addr, password),
            (self.http_addr, password),
        ];
        for (addr, (locked, remedy)) in doors {
            let Some(addr) = addr.filter(|addr| !is_loopback(*addr) && !locked) else { continue };
            if !self.insecure {
                return invalid(format!(
                    "{addr} is open to the network and has no credentials: use a loopback address, {remedy}, or \
                     with_insecure(true) if everyone who can reach it is trusted"
                ));
            }
            tracing::warn!(%addr, "insecure: this address is open to the network and has no credentials");
        }
        let (add, remove) = gossip.as_ref().map_or((false, false), |gossip| gossip.auto_voters);
        let auto_voters = AutoVoters { add, remove, after: self.auto_voters_after };
        let config = NodeConfig {
            node_id: crema_core::NodeId(self.node_id),
            cluster: self.cluster,
            initial_members: members.into_iter().map(crema_core::NodeId).collect(),
            static_peers: peers.iter().map(|(id, addr)| (crema_core::NodeId(*id), addr.to_string())).collect(),
            seeds: gossip.as_ref().map(|gossip| gossip.seeds.clone()).unwrap_or_default(),
            gossip: gossip.as_ref().map_or_else(GossipOptions::default, |gossip| gossip.options),
            shards: if self.multiraft.enabled { self.multiraft.num_shards } else { 1 },
            replicas: self.multiraft.replicas,
            bind: BindAddrs {
                raft: self.raft_addr,
                gossip: gossip_bind,
                redis: self.redis_addr,
                redis_cluster: self.redis_cluster_addr,
                http: self.http_addr,
            },
            advertise_host: raft_host.map(|ip| ip.to_string()),
            metadata,
            cluster_keys: self.cluster_keys,
            cluster_key_file: None,
            requirepass: self.requirepass,
            request_deadline: self.request_deadline,
            reads: self.reads,
            max_clients: 10_000,
            stop_grace: self.stop_grace,
            max_log_bytes: 256 << 20,
            memory: MemoryOptions { max_memory: self.max_memory, eviction: self.eviction },
            auto_voters,
            bound_resident: false,
            data_dir: self.data_dir,
            state_dir: None,
            checkpoint_log_bytes: 512 << 20,
            snapshot_rate: 128 << 20,
        };
        config.check().map_err(CacheError::Invalid)?;
        Ok(config)
    }

    /// All other nodes that are known from the beginning, each once.
    fn peers(&self) -> Result<Vec<(NodeId, SocketAddr)>> {
        let discovered = self.discovery.as_ref().map_or(&[][..], |discovery| discovery.seed_nodes());
        let mut peers: BTreeMap<NodeId, SocketAddr> = BTreeMap::new();
        // Whom each address is of. A port that the system chooses is nobody's yet.
        let mut at: BTreeMap<SocketAddr, NodeId> = BTreeMap::new();
        if self.raft_addr.port() != 0 {
            at.insert(self.raft_addr, self.node_id);
        }
        for (list, seeds) in [&self.seed_nodes[..], discovered].into_iter().enumerate() {
            let mut named = std::collections::BTreeSet::new();
            for &(id, addr) in seeds {
                // A node may name itself among the seeds, as a list shared by all nodes does, but only with its own
                // address. Where it listens everywhere, only the others know that.
                let own = id == self.node_id;
                let wrong = own && addr != self.raft_addr && !self.raft_addr.ip().is_unspecified();
                let other = *at.entry(addr).or_insert(id);
                let error = if wrong {
                    format!("seed node {id} is this node, but {addr} is not its address {}", self.raft_addr)
                } else if other == self.node_id && !own {
                    format!("{addr} of seed node {id} is this node's own address")
                } else if other != id {
                    format!("{addr} is the address of seed node {other} and of seed node {id}: each has one of its own")
                } else if own {
                    continue;
                } else if id == 0 {
                    "node ids begin at 1".to_owned()
                } else if addr.port() == 0 || addr.ip().is_unspecified() {
                    format!("{addr} of seed node {id} is no address to connect to")
                } else if !named.insert(id) {
                    format!("seed node {id} is named twice")
                } else if peers.insert(id, addr).is_some_and(|other| list > 0 && other != addr) {
                    format!("seed node {id} has another address in the discovery")
                } else {
                    continue;
                };
                return Err(CacheError::Invalid(error));
            }
        }
        Ok(peers.into_iter().collect())
    }
}

/// A cache cluster's node inside this program. Clones share it; it stops with [`DistributedCache::shutdown`], or, less
/// politely, with the last clone.
///
/// Must be made and used within a tokio runtime, with its I/O and its time enabled. It may be used in others than it was made
/// in, but works only as long as that one does: afterwards operations fail with [`CacheError::Stopped`].
#[derive(Clone, Debug)]
pub struct DistributedCache {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: Node,
    client: CacheClient,
    /// None where the data is in one shard by configuration.
    coordinator: Option<Arc<Coordinator>>,
}

impl Inner {
    /// Stops a node that is of no use any more.
    async fn stop_failed(&self) {
        if let Some(failure) = self.node.failure() {
            tracing::error!("{failure}");
        }
        self.node.hurry();
        self.shutdown().await;
    }

    async fn shutdown(&self) {
        let client = self.client.clone();
        self.node.shutdown_with(async move { client.finish(FINISH).await }).await;
        self.client.close();
    }
}

impl DistributedCache {
    /// Starts the node. Returns once its addresses are bound; operations wait for the cluster within their deadline.
    ///
    /// Errors: [`CacheError::Invalid`] for a configuration that cannot work, [`CacheError::Start`] for an address in use, or
    /// without a tokio runtime.
    pub async fn new(config: CacheConfig) -> Result<Self> {
        let multiraft = config.multiraft.enabled;
        let config = config.resolve()?;
        let deadline = config.request_deadline;
        let node = Node::start(config).await?;
        let client = CacheClient::open(node.client(), deadline).await?;
        let mut failure = node.failure_watch();
        let membership = node.membership().map(Arc::downgrade).unwrap_or_default();
        let coordinator = multiraft.then(|| Arc::new(Coordinator::new(node.client(), membership)));
        let inner = Arc::new(Inner { node, client, coordinator });
        let weak = Arc::downgrade(&inner);
        // A node that was replaced, or whose driver died, must not look alive. The task does not keep it so either.
        tokio::spawn(async move {
            let failed = failure.wait_for(Option::is_some).await.map(drop);
            if let (Ok(()), Some(inner)) = (failed, weak.upgrade()) {
                inner.stop_failed().await;
            }
        });
        Ok(DistributedCache { inner })
    }

    /// Stores `value` under `key`, for ever. On success a majority of the shard's replicas holds it.
    pub async fn put(&self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Result<()> {
        self.set(&key.into(), &value.into(), SetExpire::Clear).await
    }

    /// Stores `value` under `key`, for `ttl` from now on: from 1 ms, to which shorter times are rounded up, to hundreds of
    /// millions of years. On success a majority of the shard's replicas holds it. Once it has expired it never comes back,
    /// whoever leads the shard then.
    ///
    /// Errors: [`CacheError::Invalid`] also for a `ttl` of zero, or one without end.
    pub async fn put_with_ttl(&self, key: impl Into<Bytes>, value: impl Into<Bytes>, ttl: Duration) -> Result<()> {
        // Rounded up: no value lives shorter than it was promised to.
        match u64::try_from(ttl.as_nanos().div_ceil(1_000_000)) {
            Ok(0) => Err(CacheError::Invalid("a value cannot be stored for no time: delete the key".to_owned())),
            Ok(ms) => self.set(&key.into(), &value.into(), SetExpire::After(ms)).await,
            Err(_) => Err(CacheError::Invalid("a time to live without end: use put".to_owned())),
        }
    }

    async fn set(&self, key: &[u8], value: &[u8], expire: SetExpire) -> Result<()> {
        check_value(value)?;
        let key = key_ref(key)?;
        let op = Op::Set { key, value, cond: SetCond::Always, expire, get: false };
        match self.inner.client.execute(key.slot, op).await? {
            Reply::Ok => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The value under `key`. Linearizable: it reflects every write acknowledged before the call.
    ///
    /// Where this node leads the key's shard and holds the lease, no message is sent and no other thread is asked.
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Bytes>> {
        self.get_with(key, ReadLevel::Linearizable).await
    }

    /// The value under `key`, from a state as old as `level` allows. Errors are the same at each level: a read that fails
    /// has changed nothing.
    ///
    /// - [`ReadLevel::Linearizable`]: as [`DistributedCache::get`].
    /// - [`ReadLevel::Bounded`]: every write acknowledged longer ago than the bound is seen. Answered by this node if it
    ///   holds a replica that is known to be fresh enough; one round to the leader makes it so for all reads of the
    ///   moment. A bound below a round trip is answered by the leader. Age is measured by this node's clock, which no
    ///   change of the time of day moves.
    /// - [`ReadLevel::Local`]: what this node's replica has, without a bound: it may lack writes of this very program, and
    ///   on a node that is cut off it falls behind for as long as that lasts. Where this node holds no replica, it is
    ///   linearizable. It never fails for want of a leader where there is a replica.
    ///
    /// Below linearizable, reads may run back in time: a later one can be answered by a replica that has heard less than
    /// whoever answered the earlier one. A key is taken for expired only once the replica has heard so.
    pub async fn get_with(&self, key: impl AsRef<[u8]>, level: ReadLevel) -> Result<Option<Bytes>> {
        let key = key_ref(key.as_ref())?;
        match self.inner.client.read(Op::Get { key }, level).await? {
            Reply::Bulk(value) => Ok(Some(value)),
            Reply::Nil => Ok(None),
            other => Err(unexpected(&other)),
        }
    }

    /// Whether there is a value under `key`. Linearizable, and as cheap as [`DistributedCache::get`] without the value.
    pub async fn contains(&self, key: impl AsRef<[u8]>) -> Result<bool> {
        let key = key_ref(key.as_ref())?;
        match self.inner.client.read(Op::Exists { key }, ReadLevel::Linearizable).await? {
            Reply::Int(n) => Ok(n != 0),
            other => Err(unexpected(&other)),
        }
    }

    /// Adds `by`, which may be negative, to the number under `key`, and returns the sum. An absent key counts as 0; its value
    /// is the number in decimal digits, and how long it lives does not change. Concurrent increments all count, each once.
    ///
    /// Errors: [`CacheError::Invalid`] also where the value is not a 64-bit integer, or the sum would not be one.
    pub async fn increment(&self, key: impl AsRef<[u8]>, by: i64) -> Result<i64> {
        let key = key_ref(key.as_ref())?;
        match self.inner.client.execute(key.slot, Op::IncrBy { key, by }).await? {
            Reply::Int(sum) => Ok(sum),
            other => Err(unexpected(&other)),
        }
    }

    /// Stores `new` under `key` if the key holds exactly `expected`, or, with none, if it is absent; returns whether it did.
    /// Nothing comes between the comparison and the change. How long the key lives does not change; a new one lives for ever.
    ///
    /// Errors: [`CacheError::Invalid`] also where key, `expected` and `new` together come close to 16 MiB. After
    /// [`CacheError::OutcomeUnknown`], the key may hold `new` by this call or by another.
    pub async fn compare_and_set(
        &self,
        key: impl AsRef<[u8]>,
        expected: Option<&[u8]>,
        new: impl AsRef<[u8]>,
    ) -> Result<bool> {
        let (key, value) = (key_ref(key.as_ref())?, new.as_ref());
        check_value(value)?;
        check_value(expected.unwrap_or_default())?;
        let op = Op::CompareAndSet { key, expected, value, expire: SetExpire::Keep };
        match self.inner.client.execute(key.slot, op).await? {
            Reply::Int(n) => Ok(n != 0),
            other => Err(unexpected(&other)),
        }
    }

    /// Deletes `key`; returns whether it existed.
    pub async fn delete(&self, key: impl AsRef<[u8]>) -> Result<bool> {
        let key = key_ref(key.as_ref())?;
        match self.inner.client.execute(key.slot, Op::Del { key }).await? {
            Reply::Int(n) => Ok(n != 0),
            other => Err(unexpected(&other)),
        }
    }

    /// Lets a node hold data and vote. Returns once that is committed in the cluster's own log; its share of the replicas moves
    /// there afterwards, a few at a time, while all is served. What is so already succeeds.
    ///
    /// A node that was just discovered may not have joined yet, or, where it was here before, not answer yet. For as long as
    /// gossip hears it – without gossip: if it is known where it is –, that is waited for, 10 s at most.
    ///
    /// Errors: [`CacheError::NotApplied`] with the reason where it cannot be at present – the node does not answer, or has not
    /// joined although gossip hears it –, or if nobody could be asked; [`CacheError::Invalid`] if the cluster knows no such node;
    /// [`CacheError::OutcomeUnknown`] if no answer came: look at [`DistributedCache::voters`] then.
    pub async fn add_peer(&self, node_id: NodeId) -> Result<()> {
        let _begun = self.inner.client.begin()?;
        let until = tokio::time::Instant::now() + ADD_PEER_PATIENCE;
        let node = crema_core::NodeId(node_id);
        loop {
            let result = self.inner.node.change_voters(node, true).await;
            // One that was just discovered, or that nobody was to connect to before, registers and answers within a moment.
            let not_yet = matches!(result, Err(VoterError::NotJoined(_) | VoterError::NotNow(_)));
            let comes = not_yet && self.inner.node.may_come(node);
            if comes && tokio::time::Instant::now() < until && !self.inner.client.is_closed() {
                tokio::time::sleep(ADD_PEER_AGAIN).await;
                continue;
            }
            return result.map_err(|error| match error {
                VoterError::NotJoined(_) if comes => CacheError::NotApplied { reason: error.to_string() },
                error => voter_error(error),
            });
        }
    }

    /// Takes data and vote of a node away, for good or until [`DistributedCache::add_peer`]. Returns once that is committed; its
    /// replicas then move to others, before the node may be stopped, and it goes on as a gateway.
    ///
    /// Errors: as [`DistributedCache::add_peer`], at once. What would leave any shard without a majority of nodes that answer is
    /// [`CacheError::NotApplied`], with the reason; the last voter stays one: [`CacheError::Invalid`].
    pub async fn remove_peer(&self, node_id: NodeId) -> Result<()> {
        let _begun = self.inner.client.begin()?;
        self.inner.node.change_voters(crema_core::NodeId(node_id), false).await.map_err(voter_error)
    }

    /// The nodes that may hold data and vote, ascending, as this node knows; nobody before the cluster is founded or joined.
    pub fn voters(&self) -> Vec<NodeId> {
        self.inner.node.voters().into_iter().map(|node| node.0).collect()
    }

    /// Replaces the cluster's keys: gossip seals with the first of them from now on and opens with all, and new connections
    /// between nodes are proved with them; those that stand stay.
    ///
    /// To rotate, do each of these three steps on every node before the next: the new key is known, is used, is alone.
    ///
    /// ```no_run
    /// # use crema_node::{ClusterKey, DistributedCache, KeyRing};
    /// # fn rotate(cache: DistributedCache, old: ClusterKey, new: ClusterKey) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut keys = KeyRing::new(old.clone());
    /// keys.install(new.clone())?;
    /// cache.set_cluster_keys(keys.clone())?;
    /// // Then ...
    /// keys.use_key(new.id())?;
    /// cache.set_cluster_keys(keys.clone())?;
    /// // ... and in the end:
    /// keys.remove(old.id())?;
    /// cache.set_cluster_keys(keys)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Errors: [`CacheError::Invalid`] on a node that was started without [`CacheConfig::with_cluster_keys`]: its peers have
    /// none either.
    pub fn set_cluster_keys(&self, keys: KeyRing) -> Result<()> {
        self.inner.node.set_cluster_keys(keys).map_err(|e| CacheError::Invalid(e.to_string()))
    }

    /// Waits until this node is ready: it has joined, holds everything placement gives it, and every shard has a leader.
    ///
    /// Errors: [`CacheError::NotReady`] with the reason when `within` is over, [`CacheError::Stopped`].
    pub async fn wait_until_ready(&self, within: Duration) -> Result<()> {
        if self.inner.client.is_closed() {
            return Err(CacheError::Stopped);
        }
        match tokio::time::timeout(within, self.inner.node.ready()).await {
            // Its runtime may have gone meanwhile, while its driver is still there.
            _ if self.inner.client.is_closed() => Err(CacheError::Stopped),
            Ok(Ok(())) => Ok(()),
            Ok(Err(Stopped)) => Err(CacheError::Stopped),
            Err(_) => {
                let reason = self.inner.node.not_ready().unwrap_or_else(|| "it became ready only just now".to_owned());
                Err(CacheError::NotReady { reason })
            }
        }
    }

    /// Why this node has ended by itself: it was replaced by a newer life with the same id, or something within it broke.
    /// `None` while it runs, and after an orderly shutdown.
    pub fn failure(&self) -> Option<String> {
        self.inner.node.failure().map(|f| f.to_string())
    }

    /// Whether this node takes part in gossip: discovery is configured and enabled.
    pub fn memberlist_enabled(&self) -> bool {
        self.inner.node.membership().is_some()
    }

    /// Every node that gossip knows, this one included, ascending by id; also suspected, failed and departed ones, for as long
    /// as gossip remembers them. Without gossip: the nodes of the cluster's table, alive or dead by this node's connection to
    /// them, and this node.
    pub async fn memberlist_members(&self) -> Vec<Member> {
        let gossips = self.memberlist_enabled();
        let until = tokio::time::Instant::now() + LOOKUP_LIMIT;
        let mut members = Vec::new();
        for body in self.inner.node.members() {
            // What only the table knows is no member by gossip.
            if !gossips || body.gossip_addr.is_some() {
                members.push(Member::of(body, until).await);
            }
        }
        members
    }

    /// Those of [`DistributedCache::memberlist_members`] that are alive.
    pub async fn memberlist_healthy_members(&self) -> Vec<Member> {
        let mut members = self.memberlist_members().await;
        members.retain(|member| member.state == MemberState::Alive);
        members
    }

    /// What happens to members from now on, for this caller alone: first a join for each live one, this node included. Without
    /// gossip nothing happens. Ends when this node stops.
    pub async fn memberlist_events(&self) -> EventReceiver {
        EventReceiver::new(self.inner.node.member_events())
    }

    /// What this node tells the others about itself: made from the configuration.
    pub fn memberlist_metadata(&self) -> RaftNodeMetadata {
        let (node_id, raft_addr, metadata) = self.inner.node.told();
        RaftNodeMetadata { node_id: node_id.0, raft_addr, custom_metadata: metadata.clone().into_iter().collect() }
    }

    /// The shards and who leads them; none if [`MultiRaftCacheConfig::enabled`] is false.
    pub fn multiraft_coordinator(&self) -> Option<Arc<Coordinator>> {
        self.inner.coordinator.clone()
    }

    /// Stops the node: hands its leaderships over and waits, up to the grace, until every shard can do without it. Until then
    /// operations are served. From then on new ones of all clones fail with [`CacheError::Stopped`], and those in flight have 3 s
    /// to finish; a write that has not by then ends as [`CacheError::OutcomeUnknown`]. At last the node says goodbye by gossip, so
    /// that the others see it leave and not fail, and closes.
    ///
    /// Nobody can succeed the last node of several, or one without a majority: there the whole grace passes. Alone in its
    /// cluster, a node stops at once.
    ///
    /// Cancel-safe: the stop goes on all the same. A second call, also after a cancelled one, waits for its end.
    pub async fn shutdown(&self) -> Result<()> {
        self.inner.shutdown().await;
        Ok(())
    }
}

fn check_value(value: &[u8]) -> Result<()> {
    if value.len() > limits::MAX_VALUE_BYTES {
        return Err(CacheError::Invalid(format!("a value may have at most {} bytes", limits::MAX_VALUE_BYTES)));
    }
    Ok(())
}

fn voter_error(error: VoterError) -> CacheError {
    match error {
        VoterError::Refused(_) | VoterError::NotJoined(_) => CacheError::Invalid(error.to_string()),
        VoterError::Stopped => CacheError::Stopped,
        VoterError::NotNow(_) | VoterError::NoLeader => CacheError::NotApplied { reason: error.to_string() },
        _ => CacheError::OutcomeUnknown,
    }
}

fn key_ref(key: &[u8]) -> Result<KeyRef<'_>> {
    let too_long = || CacheError::Invalid(format!("a key may have at most {} bytes", limits::MAX_KEY_BYTES));
    KeyRef::new(0, key).ok_or_else(too_long)
}

/// Errors: what keys and values may each be is checked before; what is left is that they are too long together.
fn encode(op: Op<'_>) -> Result<Bytes> {
    encode_ops(&[op]).map_err(|error| match error {
        CodecError::TooLarge => CacheError::Invalid(format!(
            "an operation may have at most {} bytes, its key and values together",
            limits::MAX_REQUEST_BYTES
        )),
        error => CacheError::Invalid(error.to_string()),
    })
}

/// What becomes of a read that somebody may have answered, but not to us: asking again is always right.
const READ_LOST: &str = "the read was not answered in time; it changed nothing";

fn unexpected(reply: &Reply) -> CacheError {
    match reply {
        Reply::Error(OpError::OutOfMemory) => CacheError::MemoryFull,
        Reply::Error(OpError::InvalidExpire) => CacheError::Invalid(
            "the value would outlive what can be told of time, hundreds of millions of years: use put".to_owned(),
        ),
        Reply::Error(error) => CacheError::Invalid(error.to_string()),
        // A reply of another kind is a mistake of ours; the caller cannot tell what has happened.
        _ => CacheError::OutcomeUnknown,
    }
}

fn refusal(refusal: Refusal) -> CacheError {
    let reason = match refusal {
        Refusal::NoLeader(shard) => format!("shard {shard} has no leader that could be reached"),
        Refusal::Lost(shard) => format!(
            "shard {shard} has lost the majority of its replicas for good; `crema recover` says what can be done"
        ),
        Refusal::Busy(shard) => format!("the leader of shard {shard} did not take it in time"),
        Refusal::NotReady => "the cluster is being founded or joined".to_owned(),
        Refusal::WrongShard => "the placement changed meanwhile".to_owned(),
        Refusal::ShuttingDown => return CacheError::Stopped,
    };
    CacheError::NotApplied { reason }
}

/// Maps any number of concurrent callers onto a few driver connections. Clones share them.
#[derive(Clone, Debug)]
pub struct CacheClient {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    client: Client,
    lanes: Vec<Arc<Lane>>,
    next: AtomicUsize,
    budget: Arc<Semaphore>,
    deadline: Duration,
    /// Nothing new is begun any more, nor answered from a table that is still there.
    closed: Arc<AtomicBool>,
    /// Operations that have begun and not ended, reads that were answered here excepted: those wait for nobody.
    in_flight: AtomicUsize,
    /// The last of them has ended after nothing new may begin.
    ended: Notify,
}

/// An operation in flight.
struct Begun<'a>(&'a Shared);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        let was = self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
        if was == 1 && self.0.closed.load(Ordering::SeqCst) {
            self.0.ended.notify_waiters();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.close();
        }
    }
}

impl CacheClient {
    /// Opens the connections; every operation may take `deadline`.
    pub async fn open(client: Client, deadline: Duration) -> Result<CacheClient> {
        let mut lanes = Vec::with_capacity(LANES);
        let closed = Arc::new(AtomicBool::new(false));
        for _ in 0..LANES {
            let (conn, outbox) = client.open().await.map_err(|Stopped| CacheError::Stopped)?;
            let lane = Arc::new(Lane { conn, state: Mutex::default(), wake: Notify::new() });
            let end = LaneEnd { lane: lane.clone(), all: closed.clone() };
            tokio::spawn(lane.clone().run(client.clone(), outbox, end));
            lanes.push(lane);
        }
        let budget = Arc::new(Semaphore::new(BUDGET_UNITS));
        Ok(CacheClient {
            shared: Arc::new(Shared {
                client,
                lanes,
                next: AtomicUsize::new(0),
                budget,
                deadline,
                closed,
                in_flight: AtomicUsize::new(0),
                ended: Notify::new(),
            }),
        })
    }

    /// Counts an operation that begins.
    ///
    /// Errors: nothing begins any more.
    fn begin(&self) -> Result<Begun<'_>> {
        // Counted before looking: either we see that it is closed, or whoever closes sees us.
        self.shared.in_flight.fetch_add(1, Ordering::SeqCst);
        let begun = Begun(&self.shared);
        if self.shared.closed.load(Ordering::SeqCst) { Err(CacheError::Stopped) } else { Ok(begun) }
    }

    /// Lets operations in flight finish, for `within` at most, and begins none; then as [`CacheClient::close`].
    pub async fn finish(&self, within: Duration) {
        self.shared.closed.store(true, Ordering::SeqCst);
        let all = async {
            loop {
                // Made before looking: an end in between is not missed.
                let ended = self.shared.ended.notified();
                if self.shared.in_flight.load(Ordering::SeqCst) == 0 {
                    return;
                }
                ended.await;
            }
        };
        if tokio::time::timeout(within, all).await.is_err() {
            tracing::warn!("operations of this program did not finish within {within:?}");
        }
        self.close();
    }

    /// Ends the connections. Waiting and further operations fail.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        self.shared.lanes.iter().for_each(|lane| lane.close());
    }

    fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Reads one key: from this node's own replica if `level` allows it now, else by way of the driver.
    ///
    /// Errors: as [`CacheError`] says.
    async fn read(&self, op: Op<'_>, level: ReadLevel) -> Result<Reply> {
        let slot = op.key().map_or(Slot(0), |key| key.slot);
        if let Some(reply) = self.read_here(slot, &op, level) {
            // Answered without waiting for anybody: a caller that does nothing else must let others run all the same.
            tokio::task::coop::consume_budget().await;
            return Ok(reply);
        }
        let ops = encode(op)?;
        self.submit(slot, false, level, ops).await
    }

    /// The answer of this node's own replica, if it may give one.
    fn read_here(&self, slot: Slot, op: &Op<'_>, level: ReadLevel) -> Option<Reply> {
        let shared = &*self.shared;
        if self.is_closed() {
            return None;
        }
        let view = shared.client.view();
        let published = view.shard(view.shard_of(slot)?)?.published.as_deref()?;
        match level {
            ReadLevel::Linearizable => published.read(op, crate::clock::mono),
            // A leader's replica needs nobody to tell it that it is fresh.
            ReadLevel::Bounded(most) => published
                .read_relaxed(op, Some(most), crate::clock::mono())
                .or_else(|| published.read(op, crate::clock::mono)),
            ReadLevel::Local => published.read_relaxed(op, None, crate::clock::mono()),
        }
    }

    /// Executes one operation on the shard that owns `slot`.
    pub async fn execute(&self, slot: Slot, op: Op<'_>) -> Result<Reply> {
        let ops = encode(op)?;
        self.execute_encoded(slot, op.is_write(), ops).await
    }

    /// Executes operations that [`encode_ops`] has encoded, all on the shard that owns `slot`.
    ///
    /// Errors: as [`CacheError`] says. A reply may still be [`Reply::Error`].
    pub async fn execute_encoded(&self, slot: Slot, write: bool, ops: Bytes) -> Result<Reply> {
        self.submit(slot, write, ReadLevel::Linearizable, ops).await
    }

    /// Has the driver execute encoded operations; `level` is for reads.
    async fn submit(&self, slot: Slot, write: bool, level: ReadLevel, ops: Bytes) -> Result<Reply> {
        let _begun = self.begin()?;
        let shared = &*self.shared;
        let deadline = crate::clock::now().mono.after(shared.deadline);
        let until = tokio::time::Instant::now() + shared.deadline;
        let units = 1 + ops.len() / 1024 + if write { 0 } else { READ_UNITS };
        if units > BUDGET_UNITS {
            return Err(CacheError::Invalid("the request is too large".to_owned()));
        }
        loop {
            let Some(shard) = shared.client.view().shard_of(slot) else {
                self.look_again(until, Refusal::NotReady).await?;
                continue;
            };
            let permit = self.reserve(units as u32, until, shard).await?;
            let lane = &shared.lanes[shared.next.fetch_add(1, Ordering::Relaxed) % shared.lanes.len()];
            let request =
                ClientRequest { conn: lane.conn, token: Token(0), shard, write, level, ops: ops.clone(), deadline };
            let result = lane.execute(&shared.client, request, permit).await;
            return match result {
                Some(ClientResult::Reply(Reply::Error(OpError::WrongSlot { .. })))
                | Some(ClientResult::NotApplied(Refusal::WrongShard)) => {
                    // The slot has moved; nothing was executed. The view will say where to.
                    self.look_again(until, Refusal::WrongShard).await?;
                    continue;
                }
                Some(ClientResult::Reply(reply)) => Ok(reply),
                Some(ClientResult::NotApplied(why)) => Err(refusal(why)),
                Some(ClientResult::Unknown) if write => Err(CacheError::OutcomeUnknown),
                Some(ClientResult::Unknown) => Err(CacheError::NotApplied { reason: READ_LOST.to_owned() }),
                // The driver ended with the request in it.
                None if write => Err(CacheError::OutcomeUnknown),
                None => Err(CacheError::Stopped),
            };
        }
    }

    async fn look_again(&self, until: tokio::time::Instant, why: Refusal) -> Result<()> {
        let shared = &*self.shared;
        if shared.lanes[0].is_closed() {
            return Err(CacheError::Stopped);
        }
        if tokio::time::Instant::now() + LOOK_AGAIN > until {
            return Err(match (why, &shared.client.view().not_ready) {
                (Refusal::NotReady, Some(reason)) => CacheError::NotApplied { reason: reason.clone() },
                _ => refusal(why),
            });
        }
        tokio::time::sleep(LOOK_AGAIN).await;
        Ok(())
    }

    async fn reserve(
        &self,
        units: u32,
        until: tokio::time::Instant,
        shard: crema_core::ShardId,
    ) -> Result<OwnedSemaphorePermit> {
        let budget = self.shared.budget.clone();
        // Almost always there is room, and a timer need not be set.
        if let Ok(permit) = budget.clone().try_acquire_many_owned(units) {
            return Ok(permit);
        }
        match tokio::time::timeout_at(until, budget.acquire_many_owned(units)).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(CacheError::Stopped),
            Err(_) => Err(refusal(Refusal::Busy(shard))),
        }
    }
}

/// One driver connection and the callers that wait on it.
#[derive(Debug)]
struct Lane {
    conn: ConnId,
    state: Mutex<LaneState>,
    /// Wakes the task: there is something in `queue`, or the lane is closed.
    wake: Notify,
}

#[derive(Debug, Default)]
struct LaneState {
    waiting: Slab,
    queue: Vec<ClientRequest>,
    closed: bool,
}

#[derive(Debug)]
struct Waiting {
    answer: oneshot::Sender<ClientResult>,
    deadline: MonoTime,
    /// Given back when the driver has answered, not when the caller loses patience: the bound counts what is in flight.
    _permit: OwnedSemaphorePermit,
}

/// Takes a request out of the slab again if its caller is dropped before the driver has got it.
struct Unsent<'a> {
    lane: &'a Lane,
    token: Token,
    sent: bool,
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        if !self.sent {
            self.lane.lock().waiting.remove(self.token);
        }
    }
}

/// Ends a lane together with its task, which may be dropped midway: with the runtime that the client was opened in. Nobody
/// would ever hand an answer to those who wait then, be it in another runtime.
struct LaneEnd {
    lane: Arc<Lane>,
    /// Closes the whole client: what ends one lane ends all.
    all: Arc<AtomicBool>,
}

impl Drop for LaneEnd {
    fn drop(&mut self) {
        self.all.store(true, Ordering::SeqCst);
        let (mut waiting, queue) = {
            let mut state = self.lane.lock();
            state.closed = true;
            (std::mem::take(&mut state.waiting), std::mem::take(&mut state.queue))
        };
        // What the driver was never given is certainly not executed; dropping the other senders says that it may be.
        for unsent in queue.iter().filter_map(|request| waiting.remove(request.token)) {
            let _ = unsent.answer.send(ClientResult::NotApplied(Refusal::ShuttingDown));
        }
    }
}

impl Lane {
    fn lock(&self) -> std::sync::MutexGuard<'_, LaneState> {
        self.state.lock().expect("no panic while held")
    }

    fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_one();
    }

    /// Hands one request, whose token is given here, to the driver and waits for its end; `None` if the driver has gone
    /// with it.
    async fn execute(
        &self,
        client: &Client,
        mut request: ClientRequest,
        permit: OwnedSemaphorePermit,
    ) -> Option<ClientResult> {
        let (answer, answered) = oneshot::channel();
        let (request, token) = {
            let mut state = self.lock();
            if state.closed {
                return Some(ClientResult::NotApplied(Refusal::ShuttingDown));
            }
            let token = state.waiting.insert(Waiting { answer, deadline: request.deadline, _permit: permit });
            request.token = token;
            if state.waiting.len > DIRECT {
                state.queue.push(request);
                (None, token)
            } else {
                (Some(request), token)
            }
        };
        match request {
            None => self.wake.notify_one(),
            Some(request) => {
                let mut unsent = Unsent { lane: self, token, sent: false };
                if client.submit(vec![request]).await.is_err() {
                    return Some(ClientResult::NotApplied(Refusal::ShuttingDown));
                }
                unsent.sent = true;
            }
        }
        answered.await.ok()
    }

    /// Submits what is queued and hands answers to their callers, until the lane is closed or the driver has gone. `end` is
    /// dropped with the task, however that ends.
    async fn run(self: Arc<Self>, client: Client, outbox: Arc<Outbox>, end: LaneEnd) {
        let mut sweep = tokio::time::interval(Duration::from_secs(1));
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut done, mut ready) = (Vec::new(), Vec::new());
        loop {
            tokio::select! {
                () = outbox.ready() => {}
                () = self.wake.notified() => {}
                _ = sweep.tick() => self.lock().waiting.drop_overdue(crate::clock::now().mono),
            }
            outbox.take(&mut done);
            {
                let mut state = self.lock();
                let answered =
                    done.drain(..).filter_map(|(token, result)| Some((state.waiting.remove(token)?, result)));
                ready.extend(answered);
            }
            // Outside the lock: each send wakes a caller that may want it at once.
            for (waiting, result) in ready.drain(..) {
                let _ = waiting.answer.send(result);
            }
            let queue = {
                let mut state = self.lock();
                // What is queued stays so: `end` tells its callers that nobody has got it.
                if state.closed {
                    break;
                }
                std::mem::take(&mut state.queue)
            };
            if !queue.is_empty() && client.submit(queue).await.is_err() {
                break;
            }
        }
        drop(end);
        client.close(self.conn).await;
    }
}

/// Waiting callers by token. A token names a place and how often the place was used, so that a very late answer cannot
/// reach the place's next user.
#[derive(Debug, Default)]
struct Slab {
    places: Vec<(u32, Option<Waiting>)>,
    free: Vec<u32>,
    len: usize,
}

impl Slab {
    fn insert(&mut self, waiting: Waiting) -> Token {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            // The budget bounds the number of places far below this.
            u32::try_from(self.places.len() - 1).expect("fewer than 2^32 requests in flight")
        });
        let place = &mut self.places[index as usize];
        place.1 = Some(waiting);
        self.len += 1;
        Token(u64::from(place.0) << 32 | u64::from(index))
    }

    fn remove(&mut self, token: Token) -> Option<Waiting> {
        let (uses, index) = ((token.0 >> 32) as u32, token.0 as u32);
        let place = self.places.get_mut(index as usize).filter(|place| place.0 == uses)?;
        let waiting = place.1.take()?;
        place.0 = place.0.wrapping_add(1);
        self.free.push(index);
        self.len -= 1;
        Some(waiting)
    }

    /// Drops callers whose answer will never come. The driver answers every request by its deadline while it lives.
    fn drop_overdue(&mut self, now: MonoTime) {
        for index in 0..self.places.len() {
            let (uses, waiting) = &self.places[index];
            if waiting.as_ref().is_some_and(|w| now > w.deadline.after(OVERDUE)) {
                let token = Token(u64::from(*uses) << 32 | index as u64);
                self.remove(token);
            }
        }
    }
}

#[cfg(test)]
mod tests;
