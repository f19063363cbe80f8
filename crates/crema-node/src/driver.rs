//! The driver: the one thread that owns the [`Host`] and performs its [`Effects`].
//!
//! ```text
//!   clients, peers, gossip, admin --Input--> bounded channel
//!                                                 |  a round: up to 4,096 inputs or a millisecond of them
//!                                                 v
//!      submit / frame / peer_up / ... -> tick if due -> poll <-> persisted, until nothing is added
//!                                                 |
//!        links (one flush a peer) <---------------+---------------> outboxes (one delivery a connection)
//!        routing view, fences, leaderships, notes
//! ```
//!
//! **The clock is read after an input was taken from the channel, never before.** A follower's promise counts from the
//! moment at which it processes its leader's message; were it counted from a clock read before the message was taken
//! (with a pause of the process in between), the promise could end before the lease that rests on it. Likewise a read
//! under a lease is linearizable because the clock that vouches for the lease was read after the request had come.
//!
//! The thread sleeps on the channel until the next tick; it never spins, and while inputs are waiting it is not woken
//! for each of them. Waking the writers and the connections happens once a round.

use crate::client::{Client, ClientInput, Outbox, Stopped};
use crate::clock;
use crate::peers::{LogLimit, PeerBatch, PeerEvent, PeerLink, PeersHandle, SendError, add};
use crate::storage::Storage;
use arc_swap::ArcSwap;
use bytes::Bytes;
use crema_core::store::Table;
use crema_core::{ClusterUuid, CodecError, Incarnation, MonoTime, NodeId, Now, ReplicaId, ShardId};
use crema_shard::{
    Channel, ClientRequest, ClientResult, Completion, ConnId, Effects, Host, HostStatus, LeaderHint, LedShard, Note,
    RecoverRequest, RecoverResult, RoutingView, Token, VoterError, VoterRequest, VoterResult,
};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};

/// Inputs that may wait for the driver; senders then wait, which is the back-pressure of the whole node.
pub const INPUT_QUEUE: usize = 16 * 1024;
/// Most inputs of one round.
const ROUND_INPUTS: usize = 4096;
/// A round takes no further inputs after this time.
const ROUND_TIME: Duration = Duration::from_millis(1);
/// Most polls of one round. A host that has still more to do gets the next round at once.
const ROUND_POLLS: usize = 64;
/// Longest sleep, whatever the host says of its next tick.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Most client connections: far above what the listeners admit, a bound for embedded callers.
const MAX_CONNECTIONS: usize = 1 << 20;
/// Events that wait for the node's own tasks.
const EVENT_QUEUE: usize = 64;
/// A connection's list of results keeps at most this much room between rounds.
const KEPT_RESULTS: usize = 256;

/// What the driver thread is told.
#[derive(Debug)]
pub enum Input {
    /// By a client connection.
    Client(ClientInput),
    /// By the connections to other nodes.
    Peers(PeerBatch),
    /// By the disk: there is news, see [`crate::storage`].
    Durable,
    /// By the disk: a piece of a state was written, the last one durably.
    StateWritten {
        /// The group.
        shard: ShardId,
        /// The replica.
        replica: ReplicaId,
        /// The file.
        file: u64,
        /// The piece.
        seq: u32,
    },
    /// By gossip: claims of leadership.
    LeaderHints(Vec<LeaderHint>),
    /// By gossip: the node is dead or has left.
    NodeGone(NodeId),
    /// So much of the node's memory can be for data at present: see [`Host::set_memory_share`].
    MemoryShare(u8),
    /// Begin a planned stop; [`NodeEvent::Drained`] tells its end.
    Drain,
    /// By the admin API: the node's own picture.
    Status(oneshot::Sender<HostStatus>),
    /// By an operator: see [`DriverHandle::recover`].
    Recover(Recover, oneshot::Sender<RecoverResult>),
    /// By an operator: see [`DriverHandle::change_voters`].
    Voters(NodeId, bool, oneshot::Sender<VoterResult>),
    /// Groups that would lose their quorum without this node.
    NeededBy(oneshot::Sender<Vec<ShardId>>),
    /// End the thread after this round.
    Stop,
}

/// What an operator wants recovered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recover {
    /// Whether to do it; else the answer only says what would be done.
    pub accept_data_loss: bool,
    /// Nodes that do not answer and never will in their present lives.
    pub stopped: Vec<NodeId>,
}

/// The channel to the driver: its sender is what [`crate::peers::Peers::start`] and clients need, its receiver goes to
/// [`Driver::start`]. Holds [`INPUT_QUEUE`] inputs.
pub fn input_channel() -> (Sender<Input>, Receiver<Input>) {
    crossbeam::channel::bounded(INPUT_QUEUE)
}

/// What the node around the driver must act on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NodeEvent {
    /// The cluster was founded, or joined.
    Joined {
        /// The cluster's identity.
        uuid: ClusterUuid,
        /// Generation of its table.
        generation: u32,
        /// Whether this node took part in the founding.
        founded: bool,
    },
    /// A newer life of this node is registered: stop the process.
    Fenced {
        /// The life that took over, where known.
        by: Option<Incarnation>,
        /// The peer that said so, if it was not this node's own placement.
        told_by: Option<NodeId>,
    },
    /// Another living process has this node's id.
    IdInUse {
        /// That process.
        by: Incarnation,
    },
    /// The configuration cannot work together with the cluster's: stop and say why.
    Misfit(String),
    /// An operator wants this node, which has never registered, to become a voter: connect to it.
    Admit(NodeId),
    /// Everything this node led has been handed over.
    Drained,
    /// The disk failed: what it holds is not known any more, end the process.
    DiskFailed(String),
    /// The driver thread panicked: nothing works any more, end the process.
    DriverDied,
}

/// Counters of the driver, monotonic unless said otherwise.
#[derive(Debug, Default)]
pub struct DriverStats {
    /// Rounds.
    pub rounds: AtomicU64,
    /// Inputs taken.
    pub inputs: AtomicU64,
    /// Client requests among them.
    pub requests: AtomicU64,
    /// Peer frames among them.
    pub frames: AtomicU64,
    /// Frames that did not decode; their streams were closed.
    pub bad_frames: AtomicU64,
    /// Results delivered.
    pub completions: AtomicU64,
    /// Results and requests of connections that are not (or no longer) open.
    pub orphans: AtomicU64,
    /// Frames handed to peers.
    pub sends: AtomicU64,
    /// Frames dropped because a queue was full or a link down.
    pub send_drops: AtomicU64,
    /// Nanoseconds spent in rounds, sleep excluded.
    pub busy_nanos: AtomicU64,
    /// Longest round in nanoseconds (a gauge).
    pub longest_round_nanos: AtomicU64,
    /// Rounds that ended at the limit of polls with work left.
    pub long_polls: AtomicU64,
    /// Client connections at present (a gauge).
    pub connections: AtomicU64,
}

/// Shards that this node has begun to lead, for gossip. Bounded by the number of shards: a later leadership of a shard
/// replaces one that was not yet received.
#[derive(Debug)]
pub struct LedReceiver {
    feed: Arc<LedFeed>,
}

#[derive(Debug, Default)]
struct LedFeed {
    waiting: Mutex<BTreeMap<ShardId, LedShard>>,
    ended: AtomicBool,
    wake: Notify,
}

impl LedFeed {
    fn publish(&self, led: &mut Vec<LedShard>) {
        if led.is_empty() {
            return;
        }
        self.waiting.lock().expect("no panic while held").extend(led.drain(..).map(|l| (l.shard, l)));
        self.wake.notify_one();
    }
    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.wake.notify_one();
    }
}

impl LedReceiver {
    /// Waits for leaderships; ascending by shard, each shard's latest. `None` once the driver has stopped. Cancel-safe.
    pub async fn recv(&mut self) -> Option<Vec<LedShard>> {
        loop {
            let ended = self.feed.ended.load(Ordering::Acquire);
            let waiting = std::mem::take(&mut *self.feed.waiting.lock().expect("no panic while held"));
            if !waiting.is_empty() {
                return Some(waiting.into_values().collect());
            }
            if ended {
                return None;
            }
            self.feed.wake.notified().await;
        }
    }
}

/// Called on the driver's thread whenever the routing view has changed; must not block.
pub type ViewHook = Box<dyn FnMut(&RoutingView) + Send>;

/// The driver thread.
#[derive(Debug)]
pub struct Driver;

/// What the node's own tasks receive from the driver.
#[derive(Debug)]
pub struct DriverOutputs {
    /// What the node must act on. An event that waits is not repeated.
    pub events: mpsc::Receiver<NodeEvent>,
    /// Leaderships, for gossip.
    pub led: LedReceiver,
}

impl Driver {
    /// Starts the thread on `host`, fed by `inputs` (see [`input_channel`]). Fences are passed on to `peers` from each
    /// new view; `on_view` is for everything else that follows the view, such as addresses. An error means that the
    /// system refused a thread.
    pub fn start(
        host: Host,
        peers: PeersHandle,
        (sender, inputs): (Sender<Input>, Receiver<Input>),
        storage: Option<Storage>,
        on_view: Option<ViewHook>,
    ) -> io::Result<(DriverHandle, DriverOutputs)> {
        let view = host.view();
        Self::start_engine(host, view, Box::new(peers), (sender, inputs), storage, on_view)
    }

    fn start_engine<E: Engine + std::marker::Send + 'static>(
        engine: E,
        view: Arc<RoutingView>,
        peers: Box<dyn PeerControl>,
        (sender, inputs): (Sender<Input>, Receiver<Input>),
        storage: Option<Storage>,
        on_view: Option<ViewHook>,
    ) -> io::Result<(DriverHandle, DriverOutputs)> {
        let (events, event_receiver) = mpsc::channel(EVENT_QUEUE);
        let feed = Arc::new(LedFeed::default());
        let view = Arc::new(ArcSwap::new(view));
        let stats = Arc::new(DriverStats::default());
        let looper = Loop {
            engine,
            peers,
            inputs,
            storage,
            garbage: Garbage::start()?,
            view: view.clone(),
            on_view,
            stats: stats.clone(),
            events: events.clone(),
            waiting_events: Vec::new(),
            led: feed.clone(),
            conns: HashMap::new(),
            touched: Vec::new(),
            links: HashMap::new(),
            dropped: Vec::new(),
            effects: Effects::default(),
            log: LogLimit::default(),
            recoveries: HashMap::new(),
            voter_changes: HashMap::new(),
            last_mark: 0,
            stopping: false,
        };
        let guard = DeathGuard { events, feed: feed.clone(), done: false };
        let thread = std::thread::Builder::new().name("crema-driver".to_owned()).spawn(move || {
            // Locals end in reverse order: when a panic unwinds, the loop closes the input channel first, so that nobody
            // hands it anything more while its death is told.
            let mut guard = guard;
            let mut looper = looper;
            looper.run();
            drop(looper);
            guard.done = true;
        })?;
        let client = Client::new(sender.clone(), view);
        let handle = DriverHandle { inputs: sender, client, stats, thread: Arc::new(Mutex::new(Some(thread))) };
        Ok((handle, DriverOutputs { events: event_receiver, led: LedReceiver { feed } }))
    }
}

/// A thread that frees what takes long to free: a million keys are a tenth of a second.
struct Garbage {
    to: Option<Sender<Arc<Table>>>,
    thread: Option<JoinHandle<()>>,
}

impl Garbage {
    fn start() -> io::Result<Garbage> {
        let (to, from) = crossbeam::channel::unbounded::<Arc<Table>>();
        let thread =
            std::thread::Builder::new().name("crema-garbage".to_owned()).spawn(move || from.iter().for_each(drop))?;
        Ok(Garbage { to: Some(to), thread: Some(thread) })
    }

    fn take(&self, tables: &mut Vec<Arc<Table>>) {
        for table in tables.drain(..) {
            if let Some(to) = &self.to {
                // Should the thread be gone, it is freed here.
                let _ = to.send(table);
            }
        }
    }
}

impl Drop for Garbage {
    fn drop(&mut self) {
        self.to = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Tells the node how the thread ended.
struct DeathGuard {
    events: mpsc::Sender<NodeEvent>,
    feed: Arc<LedFeed>,
    done: bool,
}

impl Drop for DeathGuard {
    fn drop(&mut self) {
        if !self.done {
            tracing::error!("the driver thread panicked");
            // Waits if 64 events are queued: this message must not be lost, and the thread has nothing else to do.
            let _ = self.events.blocking_send(NodeEvent::DriverDied);
        }
        self.feed.end();
    }
}

/// The door to the driver. Cheap to clone.
#[derive(Clone, Debug)]
pub struct DriverHandle {
    inputs: Sender<Input>,
    client: Client,
    stats: Arc<DriverStats>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

#[cfg(test)]
impl DriverHandle {
    /// The door to a driver that the test plays itself.
    pub(crate) fn played(inputs: Sender<Input>, view: RoutingView) -> DriverHandle {
        let client = Client::new(inputs.clone(), Arc::new(ArcSwap::from_pointee(view)));
        DriverHandle { inputs, client, stats: Arc::default(), thread: Arc::default() }
    }
}

impl DriverHandle {
    /// The door for clients. Clones share the numbering of connections.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The present routing view; lock-free.
    pub fn view(&self) -> Arc<RoutingView> {
        self.client.view().clone()
    }

    /// Counters.
    pub fn stats(&self) -> &Arc<DriverStats> {
        &self.stats
    }

    /// The channel to the driver, for what has no method here.
    pub fn inputs(&self) -> &Sender<Input> {
        &self.inputs
    }

    /// Whether the thread runs.
    pub fn is_running(&self) -> bool {
        self.thread.lock().expect("no panic while held").as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Sends an input; waits while the queue is full.
    pub async fn send(&self, mut input: Input) -> Result<(), Stopped> {
        loop {
            match self.inputs.try_send(input) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(Stopped),
                Err(TrySendError::Full(back)) => {
                    input = back;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }

    /// The node's own picture.
    pub async fn status(&self) -> Result<HostStatus, Stopped> {
        let (tell, told) = oneshot::channel();
        self.send(Input::Status(tell)).await?;
        told.await.map_err(|_| Stopped)
    }

    /// Groups that would lose their quorum if this node stopped now.
    pub async fn needed_by(&self) -> Result<Vec<ShardId>, Stopped> {
        let (tell, told) = oneshot::channel();
        self.send(Input::NeededBy(tell)).await?;
        told.await.map_err(|_| Stopped)
    }

    /// Founds anew what has lost its majority, or says what that would be. Ends within half a minute; one at a time.
    pub async fn recover(&self, what: Recover) -> Result<RecoverResult, Stopped> {
        let (tell, told) = oneshot::channel();
        self.send(Input::Recover(what, tell)).await?;
        told.await.map_err(|_| Stopped)
    }

    /// Lets a node hold replicas, or no longer: ends once that is committed, refused, or has taken too long. What it holds
    /// moves afterwards.
    pub async fn change_voters(&self, node: NodeId, approved: bool) -> VoterResult {
        let (tell, told) = oneshot::channel();
        self.send(Input::Voters(node, approved, tell)).await.map_err(|Stopped| VoterError::Stopped)?;
        // The driver has ended with the question in it.
        told.await.unwrap_or(Err(VoterError::Unknown))
    }

    /// Begins a planned stop: leaderships are handed over, then [`NodeEvent::Drained`] comes.
    pub async fn drain(&self) -> Result<(), Stopped> {
        self.send(Input::Drain).await
    }

    /// Ends the thread after its present round and waits for it. What is still in flight stays unanswered: drain the
    /// listeners first. Later calls return at once.
    pub async fn stop(&self) {
        // An error means that it has ended already; then joining is all that is left.
        let _ = self.send(Input::Stop).await;
        let thread = self.thread.lock().expect("no panic while held").take();
        if let Some(thread) = thread {
            // The result of a panicked thread was told by `DriverDied`.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

/// What the loop asks of the host. Production has one implementation, [`Host`]; tests of the loop script another, since
/// what they check is the loop: order, grouping and bounds, not consensus.
trait Engine {
    fn submit(&mut self, now: Now, request: ClientRequest);
    fn connection_closed(&mut self, conn: ConnId);
    fn peer_up(&mut self, now: Now, peer: NodeId, incarnation: Incarnation);
    fn peer_down(&mut self, now: Now, peer: NodeId);
    fn frame(
        &mut self,
        now: Now,
        peer: NodeId,
        incarnation: Incarnation,
        channel: Channel,
        frame: Bytes,
    ) -> Result<(), CodecError>;
    fn send_dropped(&mut self, now: Now, peer: NodeId, channel: Channel);
    fn leader_hint(&mut self, now: Now, hint: LeaderHint);
    fn node_gone(&mut self, now: Now, node: NodeId);
    fn drain(&mut self, now: Now);
    fn set_memory_share(&mut self, now: Now, share: u8);
    fn recover(&mut self, now: Now, request: RecoverRequest);
    fn change_voters(&mut self, now: Now, request: VoterRequest);
    fn needed_by(&self) -> Vec<ShardId>;
    fn tick(&mut self, now: Now);
    fn next_tick(&self) -> MonoTime;
    fn persisted(&mut self, now: Now, number: u64);
    fn state_written(&mut self, shard: ShardId, replica: ReplicaId, file: u64, seq: u32);
    fn ask_checkpoint(&mut self, replica: ReplicaId);
    fn poll(&mut self, now: Now, effects: &mut Effects);
    fn status(&self) -> HostStatus;
}

impl Engine for Host {
    fn submit(&mut self, now: Now, request: ClientRequest) {
        Host::submit(self, now, request);
    }
    fn connection_closed(&mut self, conn: ConnId) {
        Host::connection_closed(self, conn);
    }
    fn peer_up(&mut self, now: Now, peer: NodeId, incarnation: Incarnation) {
        Host::peer_up(self, now, peer, incarnation);
    }
    fn peer_down(&mut self, now: Now, peer: NodeId) {
        Host::peer_down(self, now, peer);
    }
    fn frame(
        &mut self,
        now: Now,
        peer: NodeId,
        incarnation: Incarnation,
        channel: Channel,
        frame: Bytes,
    ) -> Result<(), CodecError> {
        Host::frame(self, now, peer, incarnation, channel, frame)
    }
    fn send_dropped(&mut self, now: Now, peer: NodeId, channel: Channel) {
        Host::send_dropped(self, now, peer, channel);
    }
    fn leader_hint(&mut self, now: Now, hint: LeaderHint) {
        Host::leader_hint(self, now, hint);
    }
    fn node_gone(&mut self, now: Now, node: NodeId) {
        Host::node_gone(self, now, node);
    }
    fn drain(&mut self, now: Now) {
        Host::drain(self, now);
    }
    fn set_memory_share(&mut self, now: Now, share: u8) {
        Host::set_memory_share(self, now, share);
    }
    fn recover(&mut self, now: Now, request: RecoverRequest) {
        Host::recover(self, now, request);
    }
    fn change_voters(&mut self, now: Now, request: VoterRequest) {
        Host::change_voters(self, now, request);
    }
    fn needed_by(&self) -> Vec<ShardId> {
        Host::needed_by(self)
    }
    fn tick(&mut self, now: Now) {
        Host::tick(self, now);
    }
    fn next_tick(&self) -> MonoTime {
        Host::next_tick(self)
    }
    fn state_written(&mut self, shard: ShardId, replica: ReplicaId, file: u64, seq: u32) {
        Host::state_written(self, shard, replica, file, seq);
    }
    fn ask_checkpoint(&mut self, replica: ReplicaId) {
        Host::ask_checkpoint(self, replica);
    }
    fn persisted(&mut self, now: Now, number: u64) {
        Host::persisted(self, now, number);
    }
    fn poll(&mut self, now: Now, effects: &mut Effects) {
        Host::poll(self, now, effects);
    }
    fn status(&self) -> HostStatus {
        Host::status(self)
    }
}

/// What the loop asks of the connections, apart from the links themselves.
trait PeerControl: std::marker::Send {
    fn set_fenced(&self, node: NodeId, incarnations: &[Incarnation]);
    fn distrust(&self, peer: NodeId, incarnation: Incarnation, channel: Channel);
}

impl PeerControl for PeersHandle {
    fn set_fenced(&self, node: NodeId, incarnations: &[Incarnation]) {
        PeersHandle::set_fenced(self, node, incarnations);
    }
    fn distrust(&self, peer: NodeId, incarnation: Incarnation, channel: Channel) {
        PeersHandle::distrust(self, peer, incarnation, channel);
    }
}

/// An open client connection.
struct Conn {
    outbox: Arc<Outbox>,
    /// Results of this round.
    results: Vec<(Token, ClientResult)>,
}

/// A standing link and whether each channel got frames in this round.
struct Link {
    link: PeerLink,
    unflushed: [bool; Channel::ALL.len()],
}

struct Loop<E> {
    engine: E,
    peers: Box<dyn PeerControl>,
    inputs: Receiver<Input>,
    /// The disk, where logs are kept there. Dropped after the channel: its threads may wait for room in it.
    storage: Option<Storage>,
    garbage: Garbage,
    view: Arc<ArcSwap<RoutingView>>,
    on_view: Option<ViewHook>,
    stats: Arc<DriverStats>,
    events: mpsc::Sender<NodeEvent>,
    /// Events that found their channel full. Distinct, hence few.
    waiting_events: Vec<NodeEvent>,
    led: Arc<LedFeed>,
    conns: HashMap<ConnId, Conn>,
    /// Connections with results of this round.
    touched: Vec<ConnId>,
    links: HashMap<NodeId, Link>,
    /// (peer, channel) that dropped a frame in this round.
    dropped: Vec<(NodeId, Channel)>,
    effects: Effects,
    log: LogLimit,
    /// Who waits for the end of a recovery.
    recoveries: HashMap<u64, oneshot::Sender<RecoverResult>>,
    /// Who waits for the end of a change of voters.
    voter_changes: HashMap<u64, oneshot::Sender<VoterResult>>,
    /// Mark of the last operator's request.
    last_mark: u64,
    stopping: bool,
}

impl<E: Engine> Loop<E> {
    fn run(&mut self) {
        // The first round has no input: the host may want to begin by itself.
        let mut more = self.finish_round();
        while !self.stopping {
            let wait =
                if more { Duration::ZERO } else { self.engine.next_tick().since(clock::mono()).min(LONGEST_WAIT) };
            let first = match self.inputs.recv_timeout(wait) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                // Our own handle holds a sender; without any nobody is left to stop us or to ask for anything.
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let began = clock::mono();
            self.take_inputs(first, began);
            more = self.finish_round();
            let nanos = clock::mono().since(began).as_nanos() as u64;
            self.stats.busy_nanos.fetch_add(nanos, Ordering::Relaxed);
            self.stats.longest_round_nanos.fetch_max(nanos, Ordering::Relaxed);
        }
        // Whoever still waits for a result finds out by asking again.
        for conn in self.conns.values() {
            conn.outbox.deliver([]);
        }
    }

    /// Takes what is waiting, up to the limits of a round.
    fn take_inputs(&mut self, first: Option<Input>, began: MonoTime) {
        let mut next = first;
        let mut taken = 0;
        while let Some(input) = next {
            taken += 1;
            // Read anew for each input, after it was taken: see the module's documentation.
            let now = clock::now();
            self.input(now, input);
            if self.stopping || taken >= ROUND_INPUTS || now.mono.since(began) >= ROUND_TIME {
                break;
            }
            // A channel that was closed meanwhile is noticed by the next round's wait.
            next = self.inputs.try_recv().ok();
        }
        add(&self.stats.inputs, taken);
    }

    fn input(&mut self, now: Now, input: Input) {
        match input {
            Input::Client(ClientInput::Open(conn, outbox)) => {
                if self.conns.len() >= MAX_CONNECTIONS {
                    if let Some(left_out) = self.log.allow() {
                        tracing::error!(left_out, "more than {MAX_CONNECTIONS} client connections");
                    }
                    return;
                }
                self.conns.insert(conn, Conn { outbox, results: Vec::new() });
                self.stats.connections.store(self.conns.len() as u64, Ordering::Relaxed);
            }
            Input::Client(ClientInput::Requests(requests)) => {
                add(&self.stats.requests, requests.len());
                for request in requests {
                    // Its result would have nowhere to go; the host would keep it until its deadline for nothing.
                    if self.conns.contains_key(&request.conn) {
                        self.engine.submit(now, request);
                    } else {
                        add(&self.stats.orphans, 1);
                    }
                }
            }
            Input::Client(ClientInput::Close(conn)) => {
                if self.conns.remove(&conn).is_some() {
                    self.stats.connections.store(self.conns.len() as u64, Ordering::Relaxed);
                    self.engine.connection_closed(conn);
                }
            }
            Input::Peers(mut batch) => {
                for event in batch.events.drain(..) {
                    self.peer_event(now, event);
                }
                // The batch ends here, and with it the reader's wait for its credit.
            }
            Input::LeaderHints(hints) => {
                for hint in hints {
                    self.engine.leader_hint(now, hint);
                }
            }
            // Looked at in every round.
            Input::Durable => {}
            Input::StateWritten { shard, replica, file, seq } => self.engine.state_written(shard, replica, file, seq),
            Input::NodeGone(node) => self.engine.node_gone(now, node),
            Input::MemoryShare(share) => self.engine.set_memory_share(now, share),
            Input::Drain => self.engine.drain(now),
            Input::Status(tell) => {
                // Whoever asked may be gone by now.
                let _ = tell.send(self.engine.status());
            }
            Input::Recover(Recover { accept_data_loss, stopped }, tell) => {
                self.last_mark += 1;
                let id = self.last_mark;
                // Each ends within the time that the host gives it, whoever still waits.
                self.recoveries.insert(id, tell);
                self.engine.recover(now, RecoverRequest { id, accept_data_loss, stopped });
            }
            Input::Voters(node, approved, tell) => {
                self.last_mark += 1;
                let id = self.last_mark;
                self.voter_changes.insert(id, tell);
                self.engine.change_voters(now, VoterRequest { id, node, approved });
            }
            Input::NeededBy(tell) => {
                let _ = tell.send(self.engine.needed_by());
            }
            Input::Stop => self.stopping = true,
        }
    }

    fn peer_event(&mut self, now: Now, event: PeerEvent) {
        match event {
            PeerEvent::Up { peer, incarnation, link } => {
                self.links.insert(peer, Link { link, unflushed: Default::default() });
                self.engine.peer_up(now, peer, incarnation);
            }
            PeerEvent::Down { peer } => {
                self.links.remove(&peer);
                self.engine.peer_down(now, peer);
            }
            PeerEvent::Frame { peer, incarnation, channel, frame } => {
                add(&self.stats.frames, 1);
                let bytes = frame.len();
                if let Err(error) = self.engine.frame(now, peer, incarnation, channel, frame) {
                    add(&self.stats.bad_frames, 1);
                    self.peers.distrust(peer, incarnation, channel);
                    if let Some(left_out) = self.log.allow() {
                        tracing::error!(%peer, %incarnation, ?channel, bytes, %error, left_out, "bad frame of a peer");
                    }
                }
            }
            PeerEvent::Fenced { by } => self.tell(NodeEvent::Fenced { by: None, told_by: Some(by) }),
        }
    }

    /// Ticks if due, polls until nothing is added, and sends off what the round has gathered. Returns whether the host
    /// still has work that cannot wait.
    fn finish_round(&mut self) -> bool {
        let now = clock::now();
        if now.mono >= self.engine.next_tick() {
            self.engine.tick(now);
        }
        self.take_disk_news();
        let mut more = true;
        for _ in 0..ROUND_POLLS {
            let now = clock::now();
            self.engine.poll(now, &mut self.effects);
            if self.effects.is_empty() {
                more = false;
                break;
            }
            self.perform();
        }
        if more {
            add(&self.stats.long_polls, 1);
        }
        self.flush();
        add(&self.stats.rounds, 1);
        more
    }

    /// What is durable by now releases what depends on it.
    fn take_disk_news(&mut self) {
        let Some(storage) = &mut self.storage else { return };
        let news = storage.news();
        if let Some(number) = news.durable {
            self.engine.persisted(clock::now(), number);
        }
        for replica in news.compact {
            self.engine.ask_checkpoint(replica);
        }
        if let Some(why) = news.failure {
            tracing::error!(%why, "the disk failed");
            self.tell(NodeEvent::DiskFailed(why));
        }
    }

    fn perform(&mut self) {
        let mut effects = std::mem::take(&mut self.effects);
        // The view first: a client that is redirected by a result of this round then finds it.
        if let Some(view) = effects.view.take() {
            for (node, route) in &view.nodes {
                self.peers.set_fenced(*node, &route.fenced);
            }
            if let Some(hook) = &mut self.on_view {
                hook(&view);
            }
            self.view.store(view);
        }
        for batch in effects.persist.drain(..) {
            match &mut self.storage {
                Some(storage) => storage.persist(batch),
                // The log is in memory: what the host has handed out is as durable as it will ever be.
                None => self.engine.persisted(clock::now(), batch.number),
            }
        }
        for write in effects.states.drain(..) {
            if let Some(storage) = &mut self.storage {
                storage.write_state(write);
            }
        }
        self.garbage.take(&mut effects.garbage);
        for send in effects.sends.drain(..) {
            self.send(send);
        }
        for completion in effects.completions.drain(..) {
            self.complete(completion);
        }
        for (id, result) in effects.recoveries.drain(..) {
            if let Some(tell) = self.recoveries.remove(&id) {
                let _ = tell.send(result);
            }
        }
        for (id, result) in effects.voters.drain(..) {
            if let Some(tell) = self.voter_changes.remove(&id) {
                let _ = tell.send(result);
            }
        }
        self.led.publish(&mut effects.led);
        for note in effects.notes.drain(..) {
            self.note(note);
        }
        // Their memory is used again.
        self.effects = effects;
    }

    fn send(&mut self, send: crema_shard::Send) {
        let crema_shard::Send { to, channel, frame } = send;
        // Once a frame was dropped, the rest of the round goes the same way: the host, not yet told, still believes that
        // what follows continues what went before.
        let sent = if self.dropped.contains(&(to, channel)) {
            Err(SendError::Full)
        } else if let Some(link) = self.links.get_mut(&to) {
            link.unflushed[channel as usize] = true;
            link.link.send(channel, frame)
        } else {
            Err(SendError::Down)
        };
        match sent {
            Ok(()) => add(&self.stats.sends, 1),
            Err(error) => {
                add(&self.stats.send_drops, 1);
                if !self.dropped.contains(&(to, channel)) {
                    self.dropped.push((to, channel));
                }
                if let SendError::Size(_) = error {
                    tracing::error!(%to, ?channel, %error, "a frame of our own was refused");
                }
            }
        }
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { conn, token, result } = completion;
        let Some(open) = self.conns.get_mut(&conn) else {
            add(&self.stats.orphans, 1);
            return;
        };
        if open.results.is_empty() {
            self.touched.push(conn);
        }
        open.results.push((token, result));
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Joined { uuid, generation, founded, anew } => {
                tracing::info!(%uuid, generation, founded, "member of a cluster");
                if anew {
                    tracing::warn!(%uuid, generation, "founded anew: previous contents lost");
                }
                self.tell(NodeEvent::Joined { uuid, generation, founded });
            }
            Note::Fenced { by } => {
                tracing::error!(%by, "this life of the node is over for the cluster");
                self.tell(NodeEvent::Fenced { by: Some(by), told_by: None });
            }
            Note::IdInUse { by } => {
                tracing::warn!(%by, "this node's id is in use by a living process");
                self.tell(NodeEvent::IdInUse { by });
            }
            Note::Misfit(why) => {
                tracing::error!(?why, "the configuration does not fit the cluster");
                self.tell(NodeEvent::Misfit(why));
            }
            Note::ReplicaFailed { shard, reason } => {
                tracing::error!(%shard, ?reason, "a replica stopped")
            }
            Note::DigestMismatch { shard, index } => {
                tracing::error!(%shard, index, "replicas of a shard differ")
            }
            Note::Admit { node } => self.tell(NodeEvent::Admit(node)),
            Note::Drained => {
                tracing::info!("everything led here is handed over");
                self.tell(NodeEvent::Drained);
            }
            other => tracing::warn!(?other, "note"),
        }
    }

    /// Passes an event on; one that finds the channel full is kept for later rounds, once.
    fn tell(&mut self, event: NodeEvent) {
        if self.waiting_events.is_empty() {
            match self.events.try_send(event) {
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
                Err(mpsc::error::TrySendError::Full(event)) => self.waiting_events.push(event),
            }
        } else if self.waiting_events.len() < EVENT_QUEUE && !self.waiting_events.contains(&event) {
            self.waiting_events.push(event);
        }
    }

    /// One wake-up a writer and one a connection; then the host learns what was dropped.
    fn flush(&mut self) {
        for link in self.links.values_mut() {
            for channel in Channel::ALL {
                if std::mem::take(&mut link.unflushed[channel as usize]) {
                    link.link.flush(channel);
                }
            }
        }
        for conn in self.touched.drain(..) {
            // Absent if it was closed later in the same round.
            if let Some(open) = self.conns.get_mut(&conn) {
                add(&self.stats.completions, open.results.len());
                open.outbox.deliver(open.results.drain(..));
                open.results.shrink_to(KEPT_RESULTS);
            }
        }
        if !self.dropped.is_empty() {
            let now = clock::now();
            for (peer, channel) in std::mem::take(&mut self.dropped) {
                // What follows from it comes with the next round, by a tick at the latest: a host that would send the
                // same again at once must not keep this thread busy with a queue that is full.
                self.engine.send_dropped(now, peer, channel);
            }
        }
        for event in std::mem::take(&mut self.waiting_events) {
            self.tell(event);
        }
    }
}

#[cfg(test)]
mod tests;
