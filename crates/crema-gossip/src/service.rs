//! The tokio shell around chitchat: its tasks and clocks. Sockets are in `transport`, name servers in `resolve`.
//!
//! ```text
//!   every interval: snapshot --> View::tick    --> events, members, updates     \
//!   a claim or goodbye arrives: --> View::observe, then claims --> tracker       > one watch task
//!   publish_leaders: wait 10 ms for more --> set keys --> gossip to 16 peers    /
//!   host:port and srv: seeds: look up, keep the last good answer, gossip to one -> one seed task
//!   datagrams and connections, opened and sealed                                -> tasks of `transport`
//! ```
//!
//! Chitchat calls back while it holds its lock, so the callback only leaves a permit; the watch task then reads a snapshot. It
//! reads only what has changed, and everything again every few seconds, so that nothing depends on a notification.
//!
//! Chitchat stops for good when it panics or its socket breaks, while the process lives on. [`Gossip::health`] tells; start a
//! new `Gossip` then, which has a higher generation. Its name is all that a peer needs to recognise the node.

use crate::config::{ConfigError, GossipConfig, Seeds};
use crate::events::{EventHub, EventReceiver, GossipUpdate, UpdateHub, UpdateReceiver};
use crate::generation;
use crate::keys::{
    KeyError, LEADER_PREFIX, LeaderClaim, METADATA_PREFIX, NODE_PREFIX, NodeMeta, ParsedNode, STATE_KEY, STATE_LEFT,
    encode_claim, encode_node, parse_claim, parse_node,
};
use crate::rng::SplitMix;
use crate::seal::{Foreign, KeyRing};
use crate::tracker::{ClaimOutcome, ShardLeaderTracker};
use crate::transport::{Bound, Hooks, Started, Wire};
use crate::view::{Member, MemberState, Observed, View, ViewConfig};
use chitchat::{
    Chitchat, ChitchatConfig, ChitchatHandle, ChitchatId, FailureDetectorConfig, Heartbeat, ListenerHandle, NodeState,
    ProtocolVersion, spawn_chitchat,
};
use crema_core::{Epoch, Incarnation, MonoTime, NodeId, ShardId, Term};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout, timeout_at};

mod seeding;

use seeding::seed_loop;

/// How long published claims wait for further ones, so that an election of many shards makes one round.
const PUBLISH_DEBOUNCE: Duration = Duration::from_millis(10);
/// Most peers that are told of new claims at once; the rest learn by ordinary rounds.
const PUBLISH_PEERS: usize = 16;
/// Least time between two snapshots taken because something arrived. Bounds what a flood of news can cost.
const SCAN_GAP: Duration = Duration::from_millis(5);
/// Every so many ticks all claims are read again, whatever was read before. Claims that were outranked by one of a node that
/// is gone count then.
const FULL_SCAN_TICKS: u64 = 20;
/// Most lives of nodes that one snapshot considers.
const MAX_LIVES: usize = 8_192;
/// Most goodbyes remembered that were said directly.
const MAX_GOODBYES: usize = 1_024;
/// A leaving node greets this many peers at a time, so that many that leave together do not drown each other's news, and one
/// that has not confirmed within the pause again after the others.
const LEAVE_WINDOW: usize = 8;
const LEAVE_PAUSE: Duration = Duration::from_millis(60);
/// Most time that saying goodbye may take.
const LEAVE_LIMIT: Duration = Duration::from_millis(500);
/// Most time for chitchat's task to end by itself.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// Why gossip does not start, or refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GossipError {
    /// The configuration cannot work: correct it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The sockets cannot be opened: free the port in both protocols or choose another address.
    #[error("gossip cannot listen on {addr} (UDP and TCP): {source}")]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The generation cannot be kept: mend what the file system says.
    #[error("gossip cannot keep its generation in {path}: {reason}")]
    Generation {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// Chitchat did not start.
    #[error("gossip cannot start: {0}")]
    Start(String),
    /// The value cannot be carried: correct it.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// This node was started without cluster keys; restart it with a key file.
    #[error("gossip was started without cluster keys")]
    NoKeys,
}

/// Counters since the start, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GossipStats {
    /// Values of other nodes that were ignored because they do not parse.
    pub malformed_values: u64,
    /// Duplicate node ids that were noticed.
    pub conflicts: u64,
    /// Sightings of nodes beyond the most that are held.
    pub refused_members: u64,
    /// Datagrams of this cluster.
    pub received_datagrams: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Datagrams sent.
    pub sent_datagrams: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Messages received by TCP.
    pub received_stream_messages: u64,
    /// Their bytes.
    pub received_stream_bytes: u64,
    /// Messages sent by TCP.
    pub sent_stream_messages: u64,
    /// Their bytes.
    pub sent_stream_bytes: u64,
    /// Messages dropped because more came than could be decoded.
    pub dropped_messages: u64,
    /// Messages of this cluster that do not decode, or that no node writes and that would end gossip.
    pub undecodable_messages: u64,
    /// Errors of sockets; none of them ends gossip.
    pub socket_errors: u64,
    /// Datagrams and frames from senders that had not proven that they speak now: joiners, or repetitions.
    pub unproven: u64,
    /// Greetings sent in answer to them.
    pub greetings: u64,
    /// Peers of which it is known that they have this node's goodbye, and living ones of which it is not.
    pub goodbyes_confirmed: u64,
    /// See [`GossipStats::goodbyes_confirmed`].
    pub goodbyes_unconfirmed: u64,
    /// What was received and is not for this node.
    pub foreign: ForeignStats,
}

/// Datagrams and frames that were ignored, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForeignStats([u64; Foreign::ALL.len()]);

impl ForeignStats {
    /// How many of this kind.
    pub fn of(&self, kind: Foreign) -> u64 {
        self.0[kind as usize]
    }

    /// How many in all.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Each kind with its count.
    pub fn iter(&self) -> impl Iterator<Item = (Foreign, u64)> {
        Foreign::ALL.into_iter().zip(self.0)
    }
}

struct Shared {
    handle: ChitchatHandle,
    this: NodeId,
    generation: u64,
    tracker: Arc<ShardLeaderTracker>,
    events: EventHub,
    updates: UpdateHub,
    members: Mutex<Vec<Member>>,
    /// Claims that peers are still to be told.
    pending: Mutex<BTreeMap<ShardId, (Term, Epoch)>>,
    /// Something is pending.
    publish: Notify,
    /// Something arrived.
    heard: Arc<Notify>,
    healthy: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    superseded_by: AtomicU64,
    overtaken_by: Mutex<Option<Incarnation>>,
    malformed_values: AtomicU64,
    conflicts: AtomicU64,
    refused_members: AtomicU64,
    goodbyes_confirmed: AtomicU64,
    goodbyes_unconfirmed: AtomicU64,
    wire: Arc<Wire>,
}

/// Running gossip of one node. Dropping it stops at once and without a goodbye, as a crash would; peers then see this node
/// fail. Call [`Gossip::leave`] for a planned end.
pub struct Gossip {
    shared: Arc<Shared>,
    advertise: SocketAddr,
    // Dropping these would end the callbacks.
    _listeners: [ListenerHandle; 2],
}

impl std::fmt::Debug for Gossip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gossip").field("node", &self.shared.this).field("addr", &self.advertise).finish_non_exhaustive()
    }
}

impl Gossip {
    /// Binds the sockets and begins to gossip. Returns without waiting for peers or for DNS. If it fails, or is dropped before it
    /// is done, the sockets are closed soon after.
    ///
    /// Errors: a configuration that cannot work, or an address that cannot be bound. Needs a tokio runtime with time and I/O.
    pub async fn start(config: GossipConfig) -> Result<Gossip, GossipError> {
        Gossip::start_with(config, Hooks::default()).await
    }

    pub(crate) async fn start_with(config: GossipConfig, hooks: Hooks) -> Result<Gossip, GossipError> {
        config.validate()?;
        let seeds = config.split_seeds()?;
        let sockets =
            Bound::bind(config.bind).await.map_err(|source| GossipError::Bind { addr: config.bind, source })?;
        let bound = sockets.addr;
        let mut advertise = config.advertise;
        if advertise.port() == 0 {
            advertise.set_port(bound.port());
        }
        let generation = generation(&config).await?;
        let pairs = encode_node(&config.meta(advertise))?;
        let Started { wire, transport, greeted, heard_goodbyes } =
            Wire::start(sockets, advertise, &config.cluster, config.keys.clone(), hooks.clone())
                .await
                .map_err(|error| GossipError::Start(format!("{error:#}")))?;
        // From here on there are tasks that nobody else would end, should this go no further.
        let unfinished = CloseGuard(Some(wire.clone()));
        let handle = spawn_chitchat(chitchat_config(&config, &seeds, generation, bound, advertise), pairs, &transport)
            .await
            .map_err(|error| GossipError::Start(format!("{error:#}")))?;

        let heard = Arc::new(Notify::new());
        let chitchat = handle.chitchat();
        let listeners = {
            let chitchat = chitchat.lock().await;
            [LEADER_PREFIX, STATE_KEY].map(|prefix| {
                let heard = heard.clone();
                chitchat.subscribe_event(prefix, move |_| heard.notify_one())
            })
        };
        let shared = Arc::new(Shared {
            handle,
            this: config.node_id,
            generation,
            tracker: Arc::new(ShardLeaderTracker::new()),
            events: EventHub::default(),
            updates: UpdateHub::new(),
            members: Mutex::new(Vec::new()),
            pending: Mutex::default(),
            publish: Notify::new(),
            heard,
            healthy: watch::channel(true).0,
            stop: watch::channel(false).0,
            superseded_by: AtomicU64::new(0),
            overtaken_by: Mutex::new(None),
            malformed_values: AtomicU64::new(0),
            conflicts: AtomicU64::new(0),
            refused_members: AtomicU64::new(0),
            goodbyes_confirmed: AtomicU64::new(0),
            goodbyes_unconfirmed: AtomicU64::new(0),
            wire,
        });
        let mut watcher = Watcher::new(shared.clone(), &config, greeted, heard_goodbyes);
        // This node is a member before anybody can ask.
        watcher.scan(true).await;
        if let Some(held) = &hooks.held {
            held.notify_one();
            std::future::pending::<()>().await;
        }
        unfinished.disarm();
        tokio::spawn(watcher.run(config.interval));
        tokio::spawn(seed_loop(shared.clone(), seeds, config.interval, hooks));
        let key = config.keys.as_ref().map(KeyRing::primary);
        tracing::info!(
            node = %config.node_id, %bound, %advertise, generation, cluster = %config.cluster, ?key, "gossip started"
        );
        Ok(Gossip { shared, advertise, _listeners: listeners })
    }

    /// Where others reach this node's gossip; the real port if port 0 was asked for.
    pub fn addr(&self) -> SocketAddr {
        self.advertise
    }

    /// The generation of this life of the node, for the next one to exceed.
    pub fn generation(&self) -> u64 {
        self.shared.generation
    }

    /// Membership events from now on, for this caller alone: first a Join for each present member, this node included.
    pub fn events(&self) -> EventReceiver {
        self.shared.events.subscribe()
    }

    /// News for the node's driver, for this caller alone: first [`GossipUpdate::Resync`].
    pub fn leader_updates(&self) -> UpdateReceiver {
        self.shared.updates.subscribe()
    }

    /// All members by ascending id: this node, and all that were ever alive and are not forgotten yet.
    pub fn members(&self) -> Vec<Member> {
        self.shared.members.lock().expect("no panic while held").clone()
    }

    /// Who leads which shard, as far as is known here.
    pub fn tracker(&self) -> Arc<ShardLeaderTracker> {
        self.shared.tracker.clone()
    }

    /// Tells the cluster that this node leads these shards, whatever others claim. Returns at once; peers are told after 10 ms
    /// together with what else is published until then. An older term than was published before for a shard changes nothing,
    /// and neither does a claim that cannot be true (an unknown shard, term 0).
    pub fn publish_leaders(&self, led: &[(ShardId, Term, Epoch)]) {
        let mut claims = Vec::with_capacity(led.len());
        for &(shard, term, epoch) in led {
            match self.shared.tracker.lead(shard, self.shared.this, term, epoch) {
                ClaimOutcome::Changed | ClaimOutcome::Known => claims.push((shard, (term, epoch))),
                // It has led a later term already.
                ClaimOutcome::Stale => {}
                outcome => {
                    tracing::error!(%shard, %term, ?outcome, "own claim to lead a shard was refused");
                }
            }
        }
        if claims.is_empty() {
            return;
        }
        let mut pending = self.shared.pending.lock().expect("no panic while held");
        for (shard, claim) in claims {
            let newest = pending.entry(shard).or_insert(claim);
            *newest = (*newest).max(claim);
        }
        drop(pending);
        self.shared.publish.notify_one();
    }

    /// The cluster's keys as they stand now; `None` on a node without. A later start of gossip must be given these and not those
    /// of the first start, or it would forget a rotation.
    pub fn keyring(&self) -> Option<KeyRing> {
        self.shared.wire.ring()
    }

    /// Replaces all keys at once, as whoever keeps them in a file does: a rotation is then three versions of that file.
    ///
    /// Errors: [`GossipError::NoKeys`] on a node that was started without.
    pub fn set_keys(&self, keys: KeyRing) -> Result<(), GossipError> {
        if self.shared.wire.set_ring(keys) { Ok(()) } else { Err(GossipError::NoKeys) }
    }

    /// Whether gossip runs. Once false it stays false: start anew.
    pub fn health(&self) -> bool {
        *self.shared.healthy.borrow()
    }

    /// Follows [`Gossip::health`]; changes once, to false.
    pub fn health_watch(&self) -> watch::Receiver<bool> {
        self.shared.healthy.subscribe()
    }

    /// The highest generation above this one's that was seen under this node's id, whether its life is heard or only
    /// remembered: peers ignore this one then. Either another process runs, or this life began with the clock behind that of an
    /// earlier one; a start above this generation is heard.
    pub fn superseded_by(&self) -> Option<u64> {
        match self.shared.superseded_by.load(Ordering::Relaxed) {
            0 => None,
            generation => Some(generation),
        }
    }

    /// The life of another process that is heard at present under this node's id, in this one's place.
    pub fn overtaken_by(&self) -> Option<Incarnation> {
        *self.shared.overtaken_by.lock().expect("no panic while held")
    }

    /// Counters.
    pub fn stats(&self) -> GossipStats {
        let (shared, traffic) = (&self.shared, &self.shared.wire.traffic);
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        GossipStats {
            malformed_values: get(&shared.malformed_values),
            conflicts: get(&shared.conflicts),
            refused_members: get(&shared.refused_members),
            received_datagrams: get(&traffic.received_datagrams),
            received_bytes: get(&traffic.received_bytes),
            sent_datagrams: get(&traffic.sent_datagrams),
            sent_bytes: get(&traffic.sent_bytes),
            received_stream_messages: get(&traffic.received_stream_messages),
            received_stream_bytes: get(&traffic.received_stream_bytes),
            sent_stream_messages: get(&traffic.sent_stream_messages),
            sent_stream_bytes: get(&traffic.sent_stream_bytes),
            dropped_messages: get(&traffic.dropped_messages),
            undecodable_messages: get(&traffic.undecodable_messages),
            socket_errors: get(&traffic.socket_errors),
            unproven: get(&traffic.unproven),
            greetings: get(&traffic.hellos),
            goodbyes_confirmed: get(&shared.goodbyes_confirmed),
            goodbyes_unconfirmed: get(&shared.goodbyes_unconfirmed),
            foreign: ForeignStats(std::array::from_fn(|kind| get(&traffic.foreign[kind]))),
        }
    }

    /// Says goodbye to every peer, so that they see this node as left and not as failed, and stops. Ends as soon as every peer is
    /// known to have heard it; takes at most half a second, for instance because one is dead, and the time to stop. A peer that
    /// hears nothing learns of it from others.
    pub async fn leave(&self) {
        // The inner limit is that of waiting; the outer one holds should chitchat or the system not answer.
        if self.health() && timeout(2 * LEAVE_LIMIT, self.shared.say_goodbye()).await.is_err() {
            tracing::warn!(node = %self.shared.this, "gossip: the goodbye was not finished");
        }
        self.shutdown().await;
    }

    /// Stops without a goodbye: peers will see this node fail. The sockets are closed when this returns.
    pub async fn shutdown(&self) {
        self.stop_tasks();
        if timeout(STOP_LIMIT, self.shared.handle.termination_watcher()).await.is_err() {
            self.shared.handle.abort();
        }
        self.shared.end();
        if timeout(STOP_LIMIT, self.shared.wire.closed()).await.is_err() {
            tracing::warn!(node = %self.shared.this, "gossip: a socket is still open");
        }
    }

    #[cfg(test)]
    pub(crate) fn node(&self) -> NodeId {
        self.shared.this
    }

    /// How many lives of nodes chitchat has heard of, this one included.
    #[cfg(test)]
    pub(crate) async fn known_lives(&self) -> usize {
        self.shared.handle.chitchat().lock().await.node_states().len()
    }

    fn stop_tasks(&self) {
        self.shared.stop.send_replace(true);
        // An error means that it has stopped already.
        let _ = self.shared.handle.initiate_shutdown();
        self.shared.wire.close();
    }
}

impl Drop for Gossip {
    fn drop(&mut self) {
        self.stop_tasks();
    }
}

/// The generation of the life that begins, kept if there is a file for it.
async fn generation(config: &GossipConfig) -> Result<u64, GossipError> {
    let wall_ns = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
    let wanted = config.generation.unwrap_or(wall_ns).max(1);
    let Some(path) = config.generation_file.clone() else { return Ok(wanted) };
    let file = path.clone();
    let kept = tokio::task::spawn_blocking(move || generation::next(&file, wanted)).await;
    let fail = |reason: String| GossipError::Generation { path, reason };
    match kept {
        Ok(kept) => kept.map_err(|error| fail(error.to_string())),
        Err(error) => Err(fail(error.to_string())),
    }
}

fn chitchat_config(
    config: &GossipConfig,
    seeds: &Seeds,
    generation: u64,
    bound: SocketAddr,
    advertise: SocketAddr,
) -> ChitchatConfig {
    ChitchatConfig {
        chitchat_id: ChitchatId::new(config.node_id.to_string(), generation, advertise),
        cluster_id: config.cluster.clone(),
        gossip_interval: config.interval,
        listen_addr: bound,
        // Names are resolved here and not by chitchat, which forgets a name's addresses when one lookup fails.
        seed_nodes: seeds.addrs.iter().map(SocketAddr::to_string).collect(),
        failure_detector_config: FailureDetectorConfig::new(
            config.phi,
            config.window,
            config.max_interval,
            config.initial_interval,
            config.grace,
        ),
        marked_for_deletion_grace_period: config.grace,
        catchup_callback: None,
        extra_liveness_predicate: None,
        protocol_version: ProtocolVersion::V1,
    }
}

impl Shared {
    /// Tells everybody who can listen, by datagrams and by TCP, and again until all living peers are known to have heard it.
    async fn say_goodbye(&self) {
        let (required, away) = {
            let members = self.members.lock().expect("no panic while held");
            let addrs = |wanted: fn(MemberState) -> bool| {
                let some = members.iter().filter(move |m| m.meta.node_id != self.this && wanted(m.state));
                some.map(|m| m.meta.gossip_addr).collect::<HashSet<_>>()
            };
            // A living node may have taken over the address of a dead one.
            (addrs(|s| s == MemberState::Alive), &addrs(|s| !s.is_present()) - &addrs(MemberState::is_present))
        };
        let chitchat = self.handle.chitchat();
        let peers: HashSet<SocketAddr> = {
            let mut chitchat = chitchat.lock().await;
            self.wire.arm_evidence(self.this, self.generation);
            chitchat.self_node_state().set(STATE_KEY, STATE_LEFT);
            let own = chitchat.self_chitchat_id();
            // Who has left does not listen; a newcomer knows of it from chitchat only.
            let here = |state: &NodeState| state.get(STATE_KEY) != Some(STATE_LEFT);
            let states = chitchat.node_states().iter().take(MAX_LIVES);
            let others = states.filter(|(id, state)| *id != own && here(state)).map(|(id, _)| id.gossip_advertise_addr);
            others.filter(|addr| !away.contains(addr)).collect()
        };
        let required = &required & &peers;
        let mut order: Vec<SocketAddr> = peers.iter().copied().collect();
        let mut rng = SplitMix::new(self.generation ^ self.this.0);
        rng.keep_random(&mut order, usize::MAX);
        // Those that are alive can hear it.
        order.sort_by_key(|peer| !required.contains(peer));
        let deadline = Instant::now() + LEAVE_LIMIT;
        let mut waiting: VecDeque<(SocketAddr, bool)> = order.into_iter().map(|peer| (peer, true)).collect();
        let mut greeted: HashMap<SocketAddr, Farewell> = HashMap::new();
        loop {
            let open = self.wire.unconfirmed(&peers);
            greeted.retain(|peer, _| open.contains(peer));
            let now = Instant::now();
            let silent: Vec<_> =
                greeted.iter().filter(|(_, f)| f.until <= now).map(|(p, f)| (*p, !f.by_stream)).collect();
            for (peer, by_stream) in silent {
                greeted.remove(&peer);
                waiting.push_back((peer, by_stream));
            }
            while greeted.len() < LEAVE_WINDOW {
                let Some((peer, by_stream)) = waiting.pop_front() else { break };
                self.wire.prefer_stream(peer, by_stream);
                if self.handle.gossip(peer).is_err() {
                    return;
                }
                // The life's end in one datagram, and, so that it also spreads as gossip, an exchange.
                self.wire.tell_goodbye(peer, self.this, self.generation).await;
                greeted.insert(peer, Farewell { until: now + LEAVE_PAUSE, by_stream, told: false });
            }
            // The news itself goes out with the answer to the peer's answer, 1.5 round trips from the greeting. Another greeting
            // tells that it has arrived.
            for peer in self.wire.take_told() {
                if let Some(farewell) = greeted.get_mut(&peer).filter(|f| !f.told) {
                    farewell.told = true;
                    let _ = self.handle.gossip(peer);
                }
            }
            let Some(next) = greeted.values().map(|f| f.until).min().filter(|_| now < deadline) else { break };
            let _ = timeout_at(next.min(deadline), self.wire.answer()).await;
        }
        let missing = self.wire.unconfirmed(&required).len();
        self.goodbyes_confirmed.store((required.len() - missing) as u64, Ordering::Relaxed);
        self.goodbyes_unconfirmed.store(missing as u64, Ordering::Relaxed);
        if missing > 0 {
            tracing::warn!(node = %self.this, missing, "gossip: not all peers are known to have heard the goodbye");
        }
    }

    /// Sets what is pending and tells some peers at once. Nothing is told if nothing is new.
    async fn flush(&self, rng: &mut SplitMix) {
        let claims = std::mem::take(&mut *self.pending.lock().expect("no panic while held"));
        let chitchat = self.handle.chitchat();
        let mut chitchat = chitchat.lock().await;
        let own = chitchat.self_node_state();
        let before = own.max_version();
        for (shard, (term, epoch)) in claims {
            let Some((key, value)) = encode_claim(LeaderClaim { shard, term, epoch }) else {
                continue;
            };
            let told = own.get(&key).and_then(|value| parse_claim(&key[LEADER_PREFIX.len()..], value));
            if told.is_none_or(|told| (told.term, told.epoch) < (term, epoch)) {
                own.set(key, value);
            }
        }
        if own.max_version() == before {
            return;
        }
        let own = chitchat.self_chitchat_id();
        let mut peers: Vec<SocketAddr> =
            chitchat.live_nodes().filter(|id| *id != own).map(|id| id.gossip_advertise_addr).collect();
        drop(chitchat);
        rng.keep_random(&mut peers, PUBLISH_PEERS);
        for peer in peers {
            // An error means that chitchat has stopped, which the watch task sees by itself.
            let _ = self.handle.gossip(peer);
        }
        self.heard.notify_one();
    }

    fn end(&self) {
        self.healthy.send_if_modified(|healthy| std::mem::replace(healthy, false));
        self.events.close();
        self.updates.close();
        self.wire.close();
    }
}

/// Closes the network of a start that fails or is cut off. Chitchat ends by itself when its handle goes.
struct CloseGuard(Option<Arc<Wire>>);

impl CloseGuard {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseGuard {
    fn drop(&mut self) {
        if let Some(wire) = &self.0 {
            wire.close();
        }
    }
}

/// A peer that was greeted by a leaving node and has not confirmed yet.
struct Farewell {
    /// When the next one gets its turn.
    until: Instant,
    /// By TCP and by datagrams in turn: there is no time to find out which of them works.
    by_stream: bool,
    /// Whether it was sent what it lacked.
    told: bool,
}

/// Whatever ends the watch task, be it a panic, ends gossip visibly.
struct EndGuard(Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.end();
        let _ = self.0.handle.initiate_shutdown();
    }
}

/// What was read of one life of a node.
#[derive(Default)]
struct Life {
    heartbeat: Option<Heartbeat>,
    beats: u64,
    /// Chitchat's version of its keys when they were read last.
    version: u64,
    /// Claims up to this version were read and taken.
    claims_upto: u64,
    /// Claims up to this version were read, taken or not: bad ones among them are counted.
    claims_counted: u64,
    node: Option<(NodeMeta, bool)>,
}

/// Claims of one life, read but not yet taken.
struct HeardClaims {
    id: ChitchatId,
    node: NodeId,
    claims: Vec<LeaderClaim>,
    upto: u64,
}

/// The watch task: turns chitchat's state into members, events and routes.
struct Watcher {
    shared: Arc<Shared>,
    view: View,
    lives: HashMap<ChitchatId, Life>,
    started: Instant,
    ticks: u64,
    rng: SplitMix,
    /// Peers that asked to be told again.
    greeted: mpsc::Receiver<SocketAddr>,
    heard_goodbyes: mpsc::Receiver<(NodeId, u64)>,
    /// Lives that said goodbye to this node directly; gossip of it may come later or never.
    goodbyes: HashSet<(NodeId, u64)>,
}

impl Watcher {
    fn new(
        shared: Arc<Shared>,
        config: &GossipConfig,
        greeted: mpsc::Receiver<SocketAddr>,
        heard_goodbyes: mpsc::Receiver<(NodeId, u64)>,
    ) -> Self {
        let view = View::new(ViewConfig {
            this: config.node_id,
            generation: shared.generation,
            interval: config.interval,
            dead_ticks: config.dead_ticks,
        });
        let rng = SplitMix::new(shared.generation ^ config.node_id.0);
        Watcher {
            shared,
            view,
            lives: HashMap::new(),
            started: Instant::now(),
            ticks: 0,
            rng,
            greeted,
            heard_goodbyes,
            goodbyes: HashSet::new(),
        }
    }

    async fn run(mut self, period: Duration) {
        let shared = self.shared.clone();
        let _end = EndGuard(shared.clone());
        let termination = shared.handle.termination_watcher();
        tokio::pin!(termination);
        let mut stop = shared.stop.subscribe();
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_scan = Instant::now();
        let (mut flush_at, mut scan_at): (Option<Instant>, Option<Instant>) = (None, None);
        loop {
            let next = [flush_at, scan_at].into_iter().flatten().min();
            tokio::select! {
                // In this order: a wanted stop is not reported as a failure, and a flood of news cannot delay what is due.
                biased;
                () = until(&mut stop, true) => return,
                ended = &mut termination => {
                    let reason = ended.err().map_or_else(|| "stopped".to_owned(), |error| error.to_string());
                    tracing::error!(node = %shared.this, reason, "gossip ended unexpectedly");
                    return;
                }
                _ = ticks.tick() => {
                    self.scan(true).await;
                    last_scan = Instant::now();
                }
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                    let now = Instant::now();
                    if flush_at.is_some_and(|at| at <= now) {
                        flush_at = None;
                        shared.flush(&mut self.rng).await;
                    }
                    if scan_at.is_some_and(|at| at <= now) {
                        scan_at = None;
                        self.scan(false).await;
                        last_scan = Instant::now();
                    }
                }
                Some(peer) = self.greeted.recv() => {
                    // Its answer will be taken now. An error means that chitchat has stopped, which is seen above.
                    let _ = shared.handle.gossip(peer);
                }
                Some(goodbye) = self.heard_goodbyes.recv() => {
                    // Those that were said long ago stand in gossip by now.
                    if self.goodbyes.len() >= MAX_GOODBYES {
                        self.goodbyes.clear();
                    }
                    if self.goodbyes.insert(goodbye) {
                        shared.heard.notify_one();
                    }
                }
                () = shared.publish.notified() => {
                    flush_at.get_or_insert_with(|| Instant::now() + PUBLISH_DEBOUNCE);
                }
                () = shared.heard.notified() => {
                    scan_at.get_or_insert_with(|| Instant::now().max(last_scan + SCAN_GAP));
                }
            }
        }
    }

    /// Reads a snapshot and passes on what it changes.
    async fn scan(&mut self, tick: bool) {
        if tick {
            self.ticks += 1;
            if self.ticks.is_multiple_of(FULL_SCAN_TICKS) {
                self.lives.values_mut().for_each(|life| life.claims_upto = 0);
            }
        }
        let (snapshot, heard) = {
            let chitchat = self.shared.handle.chitchat();
            let chitchat = chitchat.lock().await;
            self.read(&chitchat)
        };
        // Taken after the lock: a scan that had to wait is late, and the view must know.
        let now = MonoTime(self.started.elapsed().as_nanos() as u64);
        let step = if tick { self.view.tick(now, &snapshot) } else { self.view.observe(&snapshot) };

        let shared = self.shared.clone();
        for conflict in &step.conflicts {
            shared.conflicts.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                node = %conflict.node, ignored = conflict.lower, counted = conflict.higher,
                "two processes run under one node id; stop one of them"
            );
        }
        shared.superseded_by.store(self.view.superseded_by().unwrap_or(0), Ordering::Relaxed);
        *shared.overtaken_by.lock().expect("no panic while held") = self.view.overtaken_by();
        shared.refused_members.store(self.view.refused(), Ordering::Relaxed);
        // State first, then the news about it: whoever hears the news finds it true. And whoever sees the new state waits for the
        // lock until the news is out, so that a stop that comes of it does not cut the news off.
        let mut members = shared.members.lock().expect("no panic while held");
        if !step.changed.is_empty() || !step.gone.is_empty() || !step.forgotten.is_empty() || tick {
            *members = self.view.members();
        }
        for node in &step.gone {
            shared.tracker.node_gone(*node);
            // Should the same life come back, its claims count again.
            let lives = self.lives.values_mut();
            lives.filter(|life| life.is_of(*node)).for_each(|life| life.claims_upto = 0);
            shared.updates.publish(&GossipUpdate::Gone(*node));
        }
        for member in step.changed {
            tracing::debug!(node = %member.meta.node_id, state = ?member.state, "member changed");
            shared.updates.publish(&GossipUpdate::Member(member));
        }
        for node in step.forgotten {
            tracing::debug!(%node, "member forgotten");
            shared.updates.publish(&GossipUpdate::Forgotten(node));
        }
        shared.events.publish(&step.events);
        drop(members);
        for claims in heard {
            self.take_claims(claims);
        }
    }

    fn read(&mut self, chitchat: &Chitchat) -> (Vec<Observed>, Vec<HeardClaims>) {
        let states = chitchat.node_states();
        self.lives.retain(|id, _| states.contains_key(id));
        let own = chitchat.self_chitchat_id();
        let alive: HashSet<&ChitchatId> = chitchat.live_nodes().collect();
        let (mut snapshot, mut heard) = (Vec::with_capacity(states.len()), Vec::new());
        let mut malformed = 0;
        for (id, state) in states.iter().take(MAX_LIVES) {
            let life = match self.lives.get_mut(id) {
                Some(life) => life,
                None => self.lives.entry(id.clone()).or_default(),
            };
            malformed += life.refresh(id, state);
            let Some((meta, left)) = &life.node else {
                continue;
            };
            let chitchat_alive = alive.contains(id);
            // Claims of the dead are not news; what they led is for others to claim.
            if chitchat_alive && id != own && life.claims_upto < state.max_version() {
                let (claims, bad) = read_claims(state, life.claims_upto, life.claims_counted);
                malformed += bad;
                life.claims_counted = life.claims_counted.max(state.max_version());
                heard.push(HeardClaims { id: id.clone(), node: meta.node_id, claims, upto: state.max_version() });
            }
            snapshot.push(Observed {
                meta: meta.clone(),
                generation: id.generation_id,
                chitchat_alive,
                left: *left || self.goodbyes.contains(&(meta.node_id, id.generation_id)),
                beats: life.beats,
            });
        }
        self.shared.malformed_values.fetch_add(malformed, Ordering::Relaxed);
        (snapshot, heard)
    }

    fn take_claims(&mut self, heard: HeardClaims) {
        let counts = self
            .view
            .standing(heard.node)
            .is_some_and(|(generation, state)| generation == heard.id.generation_id && state == MemberState::Alive);
        if !counts {
            return;
        }
        for LeaderClaim { shard, term, epoch } in heard.claims {
            match self.shared.tracker.claim(shard, heard.node, term, epoch) {
                ClaimOutcome::Changed => {
                    self.shared.updates.publish(&GossipUpdate::Leader { shard, leader: heard.node, term, epoch });
                }
                ClaimOutcome::Conflict => {
                    tracing::warn!(%shard, %term, claimant = %heard.node, "a second leader claims this term");
                }
                ClaimOutcome::Known | ClaimOutcome::Stale | ClaimOutcome::Invalid => {}
            }
        }
        if let Some(life) = self.lives.get_mut(&heard.id) {
            life.claims_upto = heard.upto;
        }
    }
}

impl Life {
    fn is_of(&self, node: NodeId) -> bool {
        self.node.as_ref().is_some_and(|(meta, _)| meta.node_id == node)
    }

    /// Reads what has changed; returns how many values were ignored.
    fn refresh(&mut self, id: &ChitchatId, state: &NodeState) -> u64 {
        let heartbeat = state.heartbeat();
        if self.heartbeat.is_none_or(|last| last < heartbeat) {
            self.heartbeat = Some(heartbeat);
            self.beats += 1;
        }
        let version = state.max_version();
        if version == self.version {
            return 0;
        }
        if version < self.version {
            // Chitchat has reset its copy and fills it again.
            self.claims_upto = 0;
        }
        self.version = version;
        let about = [NODE_PREFIX, METADATA_PREFIX].into_iter().flat_map(|prefix| state.iter_prefix(prefix));
        let about = about.map(|(key, value)| (key, value.value.as_str()));
        let pairs = about.chain(state.get(STATE_KEY).map(|value| (STATE_KEY, value)));
        match parse_node(&id.node_id, id.gossip_advertise_addr, pairs) {
            // What a life once said stays true while chitchat's copy is incomplete: nodes take nothing back.
            ParsedNode::Incomplete => 0,
            ParsedNode::Malformed(what) => {
                tracing::debug!(node = ?id, what, "gossip about a node does not parse");
                1
            }
            ParsedNode::Complete { meta, left, ignored } => {
                self.node = Some((*meta, left));
                ignored.into()
            }
        }
    }
}

/// The claims of a node with versions above `upto`, and how many above `counted_upto` do not parse.
fn read_claims(state: &NodeState, upto: u64, counted_upto: u64) -> (Vec<LeaderClaim>, u64) {
    let mut malformed = 0;
    let mut claims = Vec::new();
    for (key, value) in state.iter_prefix(LEADER_PREFIX).filter(|(_, value)| value.version > upto) {
        match parse_claim(&key[LEADER_PREFIX.len()..], &value.value) {
            Some(claim) => claims.push(claim),
            None => malformed += u64::from(value.version > counted_upto),
        }
    }
    (claims, malformed)
}

/// Waits for the value; also ends when nobody can set it any more.
async fn until(watched: &mut watch::Receiver<bool>, value: bool) {
    let _ = watched.wait_for(|now| *now == value).await;
}

#[cfg(test)]
mod tests;
