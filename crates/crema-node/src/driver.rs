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
    RecoverRequest, RecoverResult, RoutingView, Token,
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
        /// Whether all previous contents are lost.
        anew: bool,
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
            next_recovery: 0,
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
    next_recovery: u64,
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
                self.next_recovery += 1;
                let id = self.next_recovery;
                // Each ends within the time that the host gives it, whoever still waits.
                self.recoveries.insert(id, tell);
                self.engine.recover(now, RecoverRequest { id, accept_data_loss, stopped });
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
                self.tell(NodeEvent::Joined { uuid, generation, founded, anew });
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
mod tests {
    use super::*;
    use crate::peers::{PeerOptions, Peers, PeersConfig};
    use crema_core::{Epoch, KeyRef, Op, Reply, SetCond, SetExpire, Term, encode_ops};
    use crema_shard::{HostConfig, NodeAddrs, NodeRoute, PersistBatch, Timing};
    use std::collections::VecDeque;
    use std::sync::MutexGuard;
    use tokio::time::timeout;

    /// Nothing here waits this long unless it is broken.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// A host that notes what it is told and adds what the test has scripted.
    #[derive(Default)]
    struct Script {
        calls: Vec<String>,
        /// Added by one poll each.
        polls: VecDeque<Effects>,
        /// Added by the polls that follow a call of this name.
        after: Vec<(&'static str, Effects)>,
        tick_every: Option<Duration>,
        next_tick: MonoTime,
        /// Adds something at each poll, for ever.
        restless: bool,
        panic_at: Option<&'static str>,
        /// Calls that were given a clock older than their own input.
        stale_clocks: usize,
        /// Hints still to be put into the channel, each while the one before is processed.
        hints_left: usize,
        inputs: Option<Sender<Input>>,
    }

    #[derive(Clone, Default)]
    struct Fake(Arc<Mutex<Script>>);

    impl Fake {
        fn lock(&self) -> MutexGuard<'_, Script> {
            self.0.lock().unwrap_or_else(|e| e.into_inner())
        }
        fn call(&self, name: &'static str, detail: String) {
            let mut s = self.lock();
            s.calls.push(if detail.is_empty() { name.to_owned() } else { format!("{name} {detail}") });
            if let Some(at) = s.after.iter().position(|(n, _)| *n == name) {
                let (_, effects) = s.after.remove(at);
                s.polls.push_back(effects);
            }
            assert!(s.panic_at != Some(name), "scripted");
        }
        fn calls(&self) -> Vec<String> {
            self.lock().calls.iter().filter(|c| *c != "poll").cloned().collect()
        }
    }

    impl Engine for Fake {
        fn submit(&mut self, _: Now, r: ClientRequest) {
            let mut effects = Effects::default();
            effects.completions.push(done(r.conn.0, r.token.0));
            self.lock().polls.push_back(effects);
            self.call("submit", format!("{} {}", r.conn.0, r.token.0));
        }
        fn connection_closed(&mut self, conn: ConnId) {
            self.call("closed", conn.0.to_string());
        }
        fn peer_up(&mut self, _: Now, peer: NodeId, life: Incarnation) {
            self.call("up", format!("{peer} {}", life.0));
        }
        fn peer_down(&mut self, _: Now, peer: NodeId) {
            self.call("down", peer.to_string());
        }
        fn frame(&mut self, _: Now, _: NodeId, _: Incarnation, _: Channel, frame: Bytes) -> Result<(), CodecError> {
            self.call("frame", String::from_utf8_lossy(&frame).into_owned());
            if frame == b"bad"[..] { Err(CodecError::Malformed) } else { Ok(()) }
        }
        fn send_dropped(&mut self, _: Now, peer: NodeId, channel: Channel) {
            self.call("dropped", format!("{peer} {channel:?}"));
        }
        fn leader_hint(&mut self, now: Now, hint: LeaderHint) {
            // Such a hint carries the time at which it was put into the channel.
            let mut s = self.lock();
            s.stale_clocks += usize::from(now.mono.0 < hint.term.0);
            if s.hints_left > 0 {
                s.hints_left -= 1;
                s.inputs.as_ref().unwrap().send(stamped_hint()).unwrap();
            }
        }
        fn node_gone(&mut self, _: Now, node: NodeId) {
            self.call("gone", node.to_string());
        }
        fn drain(&mut self, _: Now) {
            self.call("drain", String::new());
        }
        fn set_memory_share(&mut self, _: Now, share: u8) {
            self.call("share", share.to_string());
        }
        fn recover(&mut self, _: Now, request: RecoverRequest) {
            self.call("recover", format!("{request:?}"));
        }
        fn needed_by(&self) -> Vec<ShardId> {
            vec![ShardId(7)]
        }
        fn tick(&mut self, now: Now) {
            self.call("tick", String::new());
            let mut s = self.lock();
            s.next_tick = s.tick_every.map_or(MonoTime(u64::MAX), |t| now.mono.after(t));
        }
        fn next_tick(&self) -> MonoTime {
            self.lock().next_tick
        }
        fn persisted(&mut self, _: Now, number: u64) {
            self.call("persisted", number.to_string());
        }
        fn state_written(&mut self, _: ShardId, _: ReplicaId, file: u64, seq: u32) {
            self.call("state", format!("{file} {seq}"));
        }
        fn ask_checkpoint(&mut self, replica: ReplicaId) {
            self.call("checkpoint", replica.to_string());
        }
        fn poll(&mut self, _: Now, effects: &mut Effects) {
            assert!(effects.is_empty(), "what an earlier poll added was not performed");
            self.call("poll", String::new());
            let mut s = self.lock();
            if let Some(next) = s.polls.pop_front() {
                *effects = next;
            }
            if s.restless {
                effects.completions.push(done(0, 0));
            }
        }
        fn status(&self) -> HostStatus {
            HostStatus { epoch: Epoch(5), ..HostStatus::default() }
        }
    }

    #[derive(Clone, Default)]
    struct FakePeers(Arc<Mutex<Vec<String>>>);

    impl PeerControl for FakePeers {
        fn set_fenced(&self, node: NodeId, incarnations: &[Incarnation]) {
            self.0.lock().unwrap().push(format!("fence {node} {}", incarnations.len()));
        }
        fn distrust(&self, peer: NodeId, life: Incarnation, channel: Channel) {
            self.0.lock().unwrap().push(format!("distrust {peer} {} {channel:?}", life.0));
        }
    }

    fn done(conn: u64, token: u64) -> Completion {
        Completion { conn: ConnId(conn), token: Token(token), result: ClientResult::Reply(Reply::Ok) }
    }

    fn stamped_hint() -> Input {
        let stamp = Term(clock::mono().0);
        Input::LeaderHints(vec![LeaderHint { shard: ShardId(0), leader: NodeId(1), term: stamp }])
    }

    fn request(conn: u64, token: u64) -> ClientRequest {
        ClientRequest {
            conn: ConnId(conn),
            token: Token(token),
            shard: ShardId(0),
            write: true,
            level: crema_shard::ReadLevel::Linearizable,
            ops: Bytes::new(),
            deadline: MonoTime(u64::MAX),
        }
    }

    struct Rig {
        fake: Fake,
        peers: FakePeers,
        handle: DriverHandle,
        outputs: DriverOutputs,
    }

    impl Rig {
        /// Starts the loop on `script` with `inputs` waiting, so that they make one round.
        fn start(script: Script, inputs: Vec<Input>) -> Rig {
            Rig::start_hooked(script, inputs, None)
        }

        fn start_hooked(mut script: Script, inputs: Vec<Input>, hook: Option<ViewHook>) -> Rig {
            if script.tick_every.is_none() {
                script.next_tick = MonoTime(u64::MAX);
            }
            let (fake, peers) = (Fake(Arc::new(Mutex::new(script))), FakePeers::default());
            let channel = input_channel();
            for input in inputs {
                channel.0.send(input).unwrap();
            }
            let started =
                Driver::start_engine(fake.clone(), Arc::default(), Box::new(peers.clone()), channel, None, hook);
            let (handle, outputs) = started.unwrap();
            Rig { fake, peers, handle, outputs }
        }

        /// Waits until the round that took all earlier inputs has ended.
        async fn settle(&self) {
            let rounds = || self.handle.stats().rounds.load(Ordering::Relaxed);
            let all = async {
                // Answered while inputs are taken, before the round's effects are performed ...
                assert_eq!(self.handle.status().await.unwrap().epoch, Epoch(5));
                let before = rounds();
                // ... so that round has ended when one more is counted; asking again makes sure that there is one.
                while rounds() == before {
                    self.handle.status().await.unwrap();
                }
            };
            timeout(PATIENCE, all).await.expect("a round in time");
        }
    }

    fn batch(number: u64) -> PersistBatch {
        PersistBatch { number, writes: Vec::new() }
    }

    fn effects(change: impl FnOnce(&mut Effects)) -> Effects {
        let mut effects = Effects::default();
        change(&mut effects);
        effects
    }

    fn send(to: u64, channel: Channel, body: &'static str) -> crema_shard::Send {
        crema_shard::Send { to: NodeId(to), channel, frame: Bytes::from_static(body.as_bytes()) }
    }

    fn up(peer: u64, options: &PeerOptions) -> (Input, PeerLink) {
        let link = PeerLink::detached(NodeId(peer), Incarnation(70), options);
        let event = PeerEvent::Up { peer: NodeId(peer), incarnation: Incarnation(70), link: link.clone() };
        (Input::Peers(vec![event].into()), link)
    }

    #[tokio::test]
    async fn a_round_wakes_each_connection_once_and_keeps_its_order() {
        let outboxes = [Arc::new(Outbox::default()), Arc::new(Outbox::default())];
        let open = |i: usize| Input::Client(ClientInput::Open(ConnId(i as u64), outboxes[i].clone()));
        let requests = (0..60).map(|t| request(t % 2, t)).collect();
        // Connection 9 was never opened: its requests never reach the host.
        let stray = Input::Client(ClientInput::Requests(vec![request(9, 1)]));
        let mut rig = Rig::start(
            Script::default(),
            vec![open(0), open(1), Input::Client(ClientInput::Requests(requests)), stray],
        );
        for (i, outbox) in outboxes.iter().enumerate() {
            timeout(PATIENCE, outbox.ready()).await.unwrap();
            let mut got = Vec::new();
            assert!(outbox.take(&mut got));
            // All thirty with the first wake-up, though each came from a poll of its own.
            let tokens: Vec<u64> = got.iter().map(|(t, _)| t.0).collect();
            assert_eq!(tokens, (0..30).map(|t| 2 * t + i as u64).collect::<Vec<_>>());
        }
        assert_eq!(rig.handle.stats().orphans.load(Ordering::Relaxed), 1);
        assert!(!rig.fake.calls().iter().any(|c| c.starts_with("submit 9")));
        // A closed connection: the host is told once, and what still comes is dropped.
        rig.fake.lock().after.push(("closed", effects(|e| e.completions.push(done(1, 99)))));
        for _ in 0..2 {
            rig.handle.send(Input::Client(ClientInput::Close(ConnId(1)))).await.unwrap();
        }
        rig.settle().await;
        assert!(!outboxes[1].take(&mut Vec::new()));
        assert_eq!(rig.fake.calls().iter().filter(|c| *c == "closed 1").count(), 1);
        assert_eq!(rig.handle.stats().orphans.load(Ordering::Relaxed), 2);
        assert_eq!(rig.handle.stats().connections.load(Ordering::Relaxed), 1);
        rig.handle.stop().await;
        assert!(!rig.handle.is_running());
        assert_eq!(rig.outputs.events.recv().await, None);
        assert_eq!(rig.outputs.led.recv().await.map(|l| l.len()), None);
    }

    #[tokio::test]
    async fn batches_are_persisted_in_order_and_what_follows_is_polled() {
        let (up, link) = up(2, &PeerOptions::default());
        let mut script = Script::default();
        script.polls.push_back(effects(|e| {
            e.persist.extend([batch(1), batch(2)]);
        }));
        script.after.push(("up", Effects::default()));
        script.after.push(("gone", effects(|e| e.persist.push(batch(3)))));
        let rig = Rig::start(script, vec![up]);
        rig.settle().await;
        assert_eq!(rig.fake.calls(), ["persisted 1", "persisted 2", "up 2 70"]);
        // What depends on batch 3 leaves in the same round, in order, and wakes the writer.
        rig.fake.lock().after.push((
            "persisted",
            effects(|e| {
                e.sends.extend([
                    send(2, Channel::Raft, "a"),
                    send(2, Channel::Raft, "b"),
                    send(2, Channel::Requests, "c"),
                    send(2, Channel::Snapshot, "d"),
                ]);
            }),
        ));
        rig.handle.send(Input::NodeGone(NodeId(4))).await.unwrap();
        rig.settle().await;
        assert!(Channel::ALL.into_iter().all(|channel| link.flushed(channel)));
        assert_eq!(link.take_queued(Channel::Raft), [&b"a"[..], b"b"]);
        assert_eq!(link.take_queued(Channel::Requests), [&b"c"[..]]);
        assert_eq!(link.take_queued(Channel::Snapshot), [&b"d"[..]]);
        assert_eq!(rig.fake.calls()[3..], ["gone 4", "persisted 3"]);
    }

    #[tokio::test]
    async fn dropped_frames_are_told_once_and_nothing_follows_them() {
        let tight = PeerOptions { queue_frames: 2, ..PeerOptions::default() };
        let (up, link) = up(2, &tight);
        let rig = Rig::start(Script::default(), vec![up]);
        let burst = effects(|e| {
            e.sends.extend(["a", "b", "c", "d"].map(|b| send(2, Channel::Requests, b)));
            e.sends.push(send(2, Channel::Raft, "beat"));
            // Nobody has told of a link to node 3.
            e.sends.push(send(3, Channel::Raft, "lost"));
        });
        rig.fake.lock().after.push(("gone", burst));
        rig.handle.send(Input::NodeGone(NodeId(4))).await.unwrap();
        rig.settle().await;
        assert_eq!(link.take_queued(Channel::Requests), [&b"a"[..], b"b"]);
        assert_eq!(link.take_queued(Channel::Raft), [&b"beat"[..]]);
        let calls = rig.fake.calls();
        assert_eq!(calls.iter().filter(|c| *c == "dropped 2 Requests").count(), 1, "{calls:?}");
        assert_eq!(calls.iter().filter(|c| *c == "dropped 3 Raft").count(), 1, "{calls:?}");
        assert!(!calls.contains(&"dropped 2 Raft".to_owned()));
        assert_eq!(rig.handle.stats().send_drops.load(Ordering::Relaxed), 3);
        // After Down, the link is not used any more, even if the host sends before it knows.
        rig.handle.send(Input::Peers(vec![PeerEvent::Down { peer: NodeId(2) }].into())).await.unwrap();
        rig.fake.lock().after.push(("drain", effects(|e| e.sends.push(send(2, Channel::Raft, "late")))));
        rig.handle.drain().await.unwrap();
        rig.settle().await;
        assert!(link.take_queued(Channel::Raft).is_empty());
        assert_eq!(rig.fake.calls().last().map(String::as_str), Some("dropped 2 Raft"));
    }

    #[test]
    fn a_drop_holds_back_the_rest_of_its_round() {
        let tight = PeerOptions { queue_frames: 2, ..PeerOptions::default() };
        let (_, link) = up(2, &tight);
        let (events, _receiver) = mpsc::channel(1);
        let mut looper = Loop {
            engine: Fake::default(),
            peers: Box::new(FakePeers::default()),
            inputs: input_channel().1,
            storage: None,
            garbage: Garbage::start().unwrap(),
            view: Arc::default(),
            on_view: None,
            stats: Arc::default(),
            events,
            waiting_events: Vec::new(),
            led: Arc::default(),
            conns: HashMap::new(),
            touched: Vec::new(),
            links: HashMap::from([(NodeId(2), Link { link: link.clone(), unflushed: Default::default() })]),
            dropped: Vec::new(),
            effects: Effects::default(),
            log: LogLimit::default(),
            recoveries: HashMap::new(),
            next_recovery: 0,
            stopping: false,
        };
        for body in ["a", "b", "c"] {
            looper.send(send(2, Channel::Requests, body));
        }
        assert_eq!(link.take_queued(Channel::Requests), [&b"a"[..], b"b"]);
        // There is room again, but the host does not know yet that "c" is missing.
        looper.send(send(2, Channel::Requests, "d"));
        looper.send(send(2, Channel::Raft, "beat"));
        assert!(link.take_queued(Channel::Requests).is_empty());
        looper.flush();
        assert_eq!(looper.engine.calls(), ["dropped 2 Requests"]);
        looper.send(send(2, Channel::Requests, "c again"));
        assert_eq!(link.take_queued(Channel::Requests), [&b"c again"[..]]);
        assert_eq!(link.take_queued(Channel::Raft), [&b"beat"[..]]);
    }

    #[tokio::test]
    async fn the_clock_is_read_after_the_input_was_taken() {
        let rig = Rig::start(Script { hints_left: 10_000, ..Script::default() }, Vec::new());
        rig.fake.lock().inputs = Some(rig.handle.inputs().clone());
        // Each hint brings the next one in while it is processed: in the midst of a round, after the round's beginning.
        rig.handle.send(stamped_hint()).await.unwrap();
        let all = async {
            while rig.fake.lock().hints_left > 0 {
                rig.settle().await;
            }
        };
        timeout(PATIENCE, all).await.expect("all hints in time");
        rig.settle().await;
        assert_eq!(rig.fake.lock().stale_clocks, 0);
        let stats = rig.handle.stats();
        let (rounds, inputs) = (stats.rounds.load(Ordering::Relaxed), stats.inputs.load(Ordering::Relaxed));
        assert!(inputs > 10_000 && rounds < inputs, "{rounds} rounds for {inputs} inputs");
        // The sender in the script would keep the channel open.
        rig.fake.lock().inputs = None;
    }

    #[tokio::test]
    async fn ticks_come_in_time_and_idleness_does_not_spin() {
        let tick = Duration::from_millis(5);
        let rig = Rig::start(Script { tick_every: Some(tick), ..Script::default() }, Vec::new());
        let began = clock::mono();
        let all = async {
            while rig.fake.lock().calls.iter().filter(|c| *c == "tick").count() < 20 {
                tokio::time::sleep(tick).await;
            }
        };
        timeout(PATIENCE, all).await.expect("ticks without any input");
        let ticks = rig.fake.lock().calls.iter().filter(|c| *c == "tick").count() as u64;
        let rounds = rig.handle.stats().rounds.load(Ordering::Relaxed);
        assert!(clock::mono().since(began) >= tick * 19);
        // A wake-up may come a little before the tick is due and then makes an empty round.
        assert!(rounds <= 2 * ticks + 4, "{rounds} rounds for {ticks} ticks");
    }

    #[tokio::test]
    async fn a_restless_host_does_not_lock_the_others_out() {
        let rig = Rig::start(Script { restless: true, ..Script::default() }, Vec::new());
        rig.settle().await;
        assert!(rig.handle.stats().long_polls.load(Ordering::Relaxed) > 0);
        timeout(PATIENCE, rig.handle.stop()).await.expect("it stops");
    }

    #[tokio::test]
    async fn a_panic_is_told_and_closes_the_doors() {
        let mut rig = Rig::start(Script { panic_at: Some("drain"), ..Script::default() }, Vec::new());
        let client = rig.handle.client();
        assert!(client.open().await.is_ok());
        rig.handle.drain().await.unwrap();
        assert_eq!(timeout(PATIENCE, rig.outputs.events.recv()).await.unwrap(), Some(NodeEvent::DriverDied));
        // The message comes after the channel was closed.
        assert_eq!(client.open().await.err(), Some(Stopped));
        assert_eq!(rig.handle.status().await.err(), Some(Stopped));
        assert!(timeout(PATIENCE, rig.outputs.led.recv()).await.unwrap().is_none());
        rig.handle.stop().await;
        assert!(!rig.handle.is_running());
    }

    #[tokio::test]
    async fn stop_ends_the_thread_and_wakes_who_waits() {
        let mut rig = Rig::start(Script::default(), Vec::new());
        let (_, outbox) = rig.handle.client().open().await.unwrap();
        timeout(PATIENCE, rig.handle.stop()).await.expect("it stops");
        timeout(PATIENCE, outbox.ready()).await.expect("woken, with nothing");
        assert!(!outbox.take(&mut Vec::new()));
        assert_eq!(rig.handle.needed_by().await.err(), Some(Stopped));
        assert_eq!(rig.outputs.events.recv().await, None);
        rig.handle.stop().await;
    }

    #[tokio::test]
    async fn a_bad_frame_closes_its_stream_only() {
        let frame = |body: &'static str| PeerEvent::Frame {
            peer: NodeId(2),
            incarnation: Incarnation(70),
            channel: Channel::Requests,
            frame: Bytes::from_static(body.as_bytes()),
        };
        let rig = Rig::start(Script::default(), vec![Input::Peers(vec![frame("good"), frame("bad")].into())]);
        rig.settle().await;
        assert_eq!(*rig.peers.0.lock().unwrap(), ["distrust 2 70 Requests"]);
        assert_eq!(rig.fake.calls(), ["frame good", "frame bad"]);
        assert_eq!(rig.handle.stats().bad_frames.load(Ordering::Relaxed), 1);
        assert_eq!(rig.handle.needed_by().await.unwrap(), [ShardId(7)]);
    }

    #[tokio::test]
    async fn a_new_view_is_seen_before_the_results_of_its_round() {
        let route = NodeRoute {
            incarnation: Incarnation(3),
            fenced: vec![Incarnation(1), Incarnation(2)],
            addrs: NodeAddrs::default(),
            live: true,
            draining: false,
            approved: true,
        };
        let view = RoutingView { epoch: Epoch(9), nodes: [(NodeId(2), route)].into(), ..RoutingView::default() };
        let mut script = Script::default();
        script.after.push(("submit", effects(|e| e.view = Some(Arc::new(view)))));
        let (hooked, hook_saw) = std::sync::mpsc::channel();
        let hook: ViewHook = Box::new(move |v| hooked.send(v.epoch).unwrap());
        let rig = Rig::start_hooked(script, Vec::new(), Some(hook));
        let client = rig.handle.client();
        let (conn, outbox) = client.open().await.unwrap();
        client.submit(vec![request(conn.0, 1)]).await.unwrap();
        timeout(PATIENCE, outbox.ready()).await.unwrap();
        assert_eq!(client.view().epoch, Epoch(9));
        assert_eq!(rig.handle.view().epoch, Epoch(9));
        assert_eq!(hook_saw.try_recv(), Ok(Epoch(9)));
        assert_eq!(*rig.peers.0.lock().unwrap(), ["fence 2 2"]);
    }

    #[tokio::test]
    async fn events_wait_for_a_slow_node_without_being_lost() {
        // More than the channel holds, at once.
        let notes: Vec<u128> = (0..EVENT_QUEUE as u128 + 20).collect();
        let mut script = Script { tick_every: Some(Duration::from_millis(5)), ..Script::default() };
        script.polls.push_back(effects(|e| {
            e.notes.extend(notes.iter().map(|n| Note::IdInUse { by: Incarnation(*n) }));
            // A repetition of one that waits is not kept twice.
            e.notes.push(Note::IdInUse { by: Incarnation(EVENT_QUEUE as u128 + 5) });
            e.notes.push(Note::Fenced { by: Incarnation(1) });
        }));
        let fenced = PeerEvent::Fenced { by: NodeId(3) };
        let mut rig = Rig::start(script, vec![Input::Peers(vec![fenced].into())]);
        // Nobody receives before all of them have been told.
        rig.settle().await;
        for n in notes {
            let event = timeout(PATIENCE, rig.outputs.events.recv()).await.unwrap();
            assert_eq!(event, Some(NodeEvent::IdInUse { by: Incarnation(n) }));
        }
        let expected = [(Some(Incarnation(1)), None), (None, Some(NodeId(3)))];
        for (by, told_by) in expected {
            let event = timeout(PATIENCE, rig.outputs.events.recv()).await.unwrap();
            assert_eq!(event, Some(NodeEvent::Fenced { by, told_by }));
        }
    }

    #[tokio::test]
    async fn leaderships_that_were_not_received_are_replaced_by_later_ones() {
        let led = |shard, term| LedShard { shard: ShardId(shard), term: Term(term), epoch: Epoch(1) };
        let feed = Arc::new(LedFeed::default());
        let mut receiver = LedReceiver { feed: feed.clone() };
        feed.publish(&mut vec![led(4, 1), led(2, 1)]);
        feed.publish(&mut vec![led(4, 3)]);
        feed.publish(&mut Vec::new());
        assert_eq!(receiver.recv().await, Some(vec![led(2, 1), led(4, 3)]));
        let late = tokio::spawn(async move {
            let first = receiver.recv().await;
            (first, receiver.recv().await, receiver.recv().await)
        });
        feed.publish(&mut vec![led(1, 1)]);
        // The end does not swallow what came before it.
        let feed = tokio::task::spawn_blocking(move || {
            while !feed.waiting.lock().unwrap().is_empty() {
                std::thread::yield_now();
            }
            feed.publish(&mut vec![led(1, 2)]);
            feed.end();
        });
        let (first, second, end) = timeout(PATIENCE, late).await.unwrap().unwrap();
        feed.await.unwrap();
        assert_eq!((first, second, end), (Some(vec![led(1, 1)]), Some(vec![led(1, 2)]), None));
    }

    /// A node of the real kind: host, peers and driver.
    struct Real {
        peers: PeersHandle,
        handle: DriverHandle,
        outputs: DriverOutputs,
    }

    fn real(node: u64, members: &[u64]) -> Real {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let channel = input_channel();
        let incarnation = Incarnation(u128::from(getrandom::u64().unwrap()));
        let config = PeersConfig {
            cluster: "driver test".to_owned(),
            node: NodeId(node),
            incarnation,
            boot: 0,
            options: PeerOptions::default(),
        };
        let raft = listener.local_addr().unwrap().to_string();
        let peers = Peers::start(config, listener, channel.0.clone()).unwrap();
        let host = HostConfig {
            node: NodeId(node),
            incarnation,
            cluster: "driver test".to_owned(),
            initial_members: members.iter().map(|m| NodeId(*m)).collect(),
            shards: 4,
            replication: 3,
            addrs: NodeAddrs { raft, ..NodeAddrs::default() },
            entropy: [1, 2, 3],
            timing: Timing::default(),
            max_log_bytes: 64 << 20,
            read_mode: crema_shard::ReadMode::Lease,
            snapshot_chunk_bytes: 1024,
            process: 1,
            checkpoint_log_bytes: None,
            memory: crema_shard::MemoryOptions::default(),
            uuid: None,
            generation: 0,
        };
        let host = Host::new(host, clock::now());
        let (handle, outputs) = Driver::start(host, peers.clone(), channel, None, None).unwrap();
        Real { peers, handle, outputs }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn three_nodes_found_a_cluster_and_answer() {
        let mut nodes = [1, 2, 3].map(|n| real(n, &[1, 2, 3]));
        for (i, one) in nodes.iter().enumerate() {
            for (j, other) in nodes.iter().enumerate().filter(|(j, _)| *j != i) {
                one.peers.set_address(NodeId(j as u64 + 1), Some(other.peers.local_addr().to_string()));
            }
        }
        let mut uuids = Vec::new();
        for node in &mut nodes {
            match timeout(PATIENCE, node.outputs.events.recv()).await.expect("founded in time") {
                Some(NodeEvent::Joined { uuid, founded: true, .. }) => uuids.push(uuid),
                other => panic!("{other:?}"),
            }
        }
        assert!(uuids.iter().all(|u| *u == uuids[0]));
        // Through every node: written by one, read by the next.
        for (i, node) in nodes.iter().enumerate() {
            let key = KeyRef::new(0, b"key").unwrap();
            let value = [i as u8];
            let ops = [
                Op::Set { key, value: &value, cond: SetCond::Always, expire: SetExpire::Clear, get: false },
                Op::Get { key },
            ];
            for (at, op, expected) in
                [(i, ops[0], Reply::Ok), ((i + 1) % 3, ops[1], Reply::Bulk(Bytes::copy_from_slice(&value)))]
            {
                let client = nodes[at].handle.client();
                let (conn, outbox) = client.open().await.unwrap();
                let shard = client.view().shard_of(key.slot).expect("placement is known");
                client
                    .submit(vec![ClientRequest {
                        conn,
                        token: Token(1),
                        shard,
                        write: at == i,
                        level: crema_shard::ReadLevel::Linearizable,
                        ops: encode_ops(&[op]).unwrap(),
                        deadline: clock::mono().after(PATIENCE),
                    }])
                    .await
                    .unwrap();
                let mut got = Vec::new();
                while !outbox.take(&mut got) {
                    timeout(PATIENCE, outbox.ready()).await.expect("a result in time");
                }
                assert_eq!(got, [(Token(1), ClientResult::Reply(expected))], "node {at}");
                client.close(conn).await;
            }
            assert!(node.handle.stats().bad_frames.load(Ordering::Relaxed) == 0);
        }
        for node in &nodes {
            node.handle.stop().await;
            node.peers.shutdown().await;
        }
    }
}
