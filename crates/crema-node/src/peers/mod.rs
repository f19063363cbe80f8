//! Connections between nodes.
//!
//! ```text
//!           link           writer                    reader
//!  driver -- send --> queue -- task --> TCP stream --> task -- Input::Peers --> driver of the peer
//!     ^                          ^                      |
//!     |                          +------- pulses -------+      acceptor: handshake (wire), claim (claims), then reads
//!     +------- Up / Down ------- peer task (dialer): one a peer, with all of its outgoing streams
//! ```
//!
//! Node i dials node j for what i sends to j: simplex streams, one per [`Channel`], so that a large forwarded value never
//! stands before a heartbeat, nor a snapshot before either. A *peer task* per node dials all streams, hands the driver a
//! [`PeerLink`] once all stand, and takes the whole link down as soon as one breaks. A link belongs to one set of
//! connections for ever: what was queued for one life of a peer is dropped with it and cannot reach the next.
//!
//! Within a stream frames arrive in order or not at all, across reconnections too: every connection carries a number
//! that grows within the dialer's life, and an acceptor ends the reader of a lower one *for good* before it welcomes a
//! higher. The rest of the protocol (a suspended lease that must not be overtaken, a session's writes) stands on this.
//! A life may outlast its process; the number then says which start of it the process is (`boot`), both sides tell
//! theirs, and a later start ends whatever stands to or from an earlier one: its peers see `Down`, then `Up` (`claims`).
//!
//! Snapshots are what may wait: their frames are compressed by the writer (`packing`), leave at a rate that all peers share
//! (`pace`), have a short queue, and only few of them wait for the driver of the receiver.
//!
//! The bytes on the wire are described in `wire` (handshake) and `reader` (frames). The acceptor's pulses let the dialer
//! notice a silent partition within seconds, where TCP's own retransmission timer would keep a healed connection dead
//! for up to two minutes. Nothing that a stranger sends makes us allocate more than twice what has arrived (compressed
//! frames apart, which have a budget), or wait without a limit.

mod acceptor;
mod auth;
mod claims;
mod dialer;
mod link;
mod pace;
mod packing;
mod reader;
mod stats;
#[cfg(test)]
mod tests;
mod wire;
mod writer;

pub use link::{PeerLink, SendError};
pub use stats::PeerStats;
pub(crate) use stats::{LogLimit, add};
pub use wire::MAX_CLUSTER_NAME_BYTES;

use crate::driver::Input;
use acceptor::run_acceptor;
use arc_swap::ArcSwapOption;
use bytes::Bytes;
use claims::{Life, LifeKey, revoke};
use crema_core::{Incarnation, NodeId};
use crema_gossip::KeyRing;
use crema_shard::Channel;
use crossbeam::channel::{Sender, TrySendError};
use dialer::run_peer;
use pace::Pace;
use reader::{LARGE_FRAMES_BUDGET_BYTES, UNPACKED_BUDGET_BYTES};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Longest "host:port": a DNS name, a colon and a port.
const MAX_ADDRESS_BYTES: usize = 262;
/// Most nodes that are ever dialed; further ones are ignored with a warning.
const MAX_PEERS: usize = 1024;
/// Most nodes to dial that nobody but gossip knows.
pub(crate) const MAX_STRANGERS: usize = MAX_PEERS / 2;
/// Most nodes to dial that are known by nothing but their call.
pub(crate) const MAX_UNKNOWN_CALLERS: usize = MAX_PEERS / 8;
/// Most addresses of a node.
const MAX_ADDRESSES: usize = 4;

/// Limits and periods of the connections between nodes. The defaults are meant for production; tests shorten them.
#[derive(Clone, Copy, Debug)]
pub struct PeerOptions {
    /// Most bytes queued for one peer on [`Channel::Raft`]. A single frame always fits an empty queue.
    pub raft_queue_bytes: usize,
    /// Most bytes queued for one peer on [`Channel::Requests`]. A single frame always fits an empty queue.
    pub requests_queue_bytes: usize,
    /// Most bytes queued for one peer on [`Channel::Snapshot`]. A single frame always fits an empty queue.
    pub snapshot_queue_bytes: usize,
    /// Most bytes a second that this node writes on [`Channel::Snapshot`] to all peers together, compressed as they are;
    /// 0 for no limit. A burst of 10 ms, and the one frame that goes over it, are not held back.
    pub snapshot_bytes_per_second: u64,
    /// Most frames queued for one peer and channel.
    pub queue_frames: usize,
    /// Most incoming connections of those who have shown who they are, by the cluster's key where there is one; further ones
    /// are rejected.
    pub max_incoming: usize,
    /// Most incoming connections of which that is not known yet; for a further one the oldest is closed.
    pub max_unproven: usize,
    /// The same for those of one host.
    pub max_unproven_of_one: usize,
    /// Limit of each of: resolving a name, connecting, the handshake.
    pub handshake_timeout: Duration,
    /// A connection whose peer takes no byte for this long is closed.
    pub write_timeout: Duration,
    /// A connection from which no byte arrives for this long is closed by the acceptor.
    pub idle_timeout: Duration,
    /// Period at which an acceptor sends a pulse, and a dialer with nothing to send an empty frame.
    pub pulse: Duration,
    /// A connection without a pulse for this long is closed by the dialer.
    pub pulse_timeout: Duration,
    /// Pause after the first failed attempt; doubled after each further one, a quarter more or less at random.
    pub backoff_min: Duration,
    /// Longest pause between attempts. A link that stood for this long begins again at the shortest.
    pub backoff_max: Duration,
    /// How long a shutdown waits until queued frames are written.
    pub flush_timeout: Duration,
}

impl Default for PeerOptions {
    fn default() -> Self {
        PeerOptions {
            raft_queue_bytes: 32 * 1024 * 1024,
            requests_queue_bytes: 64 * 1024 * 1024,
            snapshot_queue_bytes: 4 * 1024 * 1024,
            snapshot_bytes_per_second: 128 * 1024 * 1024,
            queue_frames: 64 * 1024,
            max_incoming: 1536,
            max_unproven: 512,
            max_unproven_of_one: 64,
            handshake_timeout: Duration::from_secs(2),
            write_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(10),
            pulse: Duration::from_millis(500),
            pulse_timeout: Duration::from_secs(3),
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(1),
            flush_timeout: Duration::from_millis(200),
        }
    }
}

/// Who this node is to its peers.
#[derive(Clone, Debug)]
pub struct PeersConfig {
    /// The cluster's name, 1 to [`MAX_CLUSTER_NAME_BYTES`] bytes. Nodes of other clusters are rejected.
    pub cluster: String,
    /// This node.
    pub node: NodeId,
    /// This life.
    pub incarnation: Incarnation,
    /// Which start of this life: higher than that of every earlier process with the same incarnation, and durable before
    /// it is used here. Peers read nothing of a lower one once they have heard a higher. 0 where every start is a new life.
    pub boot: u64,
    /// Where other nodes reach this one, "host:port", at most 262 bytes: told with each handshake.
    pub addr: String,
    /// The cluster's keys: with them nobody is heard who does not prove to have one of them.
    pub keys: Option<KeyRing>,
    /// Limits and periods.
    pub options: PeerOptions,
}

/// Why [`Peers::start`] failed. Give up: correct the configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeersError {
    /// The cluster's name is empty or too long for the handshake.
    #[error("the cluster name must have 1 to {MAX_CLUSTER_NAME_BYTES} bytes, this one has {0}")]
    ClusterName(usize),
    /// Called outside a tokio runtime.
    #[error("no tokio runtime: {0}")]
    NoRuntime(#[from] tokio::runtime::TryCurrentError),
    /// The listener cannot be used.
    #[error("the raft listener cannot be used: {0}")]
    Listener(#[from] io::Error),
}

/// What the driver learns from its peers' connections.
#[derive(Debug)]
pub enum PeerEvent {
    /// All outgoing streams to `peer` stand and reach the same process.
    Up {
        /// The peer.
        peer: NodeId,
        /// Its life.
        incarnation: Incarnation,
        /// Frames for this life of the peer go here.
        link: PeerLink,
    },
    /// The link to `peer` is gone, with everything that was queued. An `Up` always came before. Whatever comes of a later
    /// process of the same life comes after this, its frames too.
    Down {
        /// The peer.
        peer: NodeId,
    },
    /// A frame of a peer. Frames of one (peer, incarnation, channel) are in order; they may come before `Up`.
    Frame {
        /// Sender.
        peer: NodeId,
        /// Its life.
        incarnation: Incarnation,
        /// The stream.
        channel: Channel,
        /// The frame's body; not empty.
        frame: Bytes,
    },
    /// A peer refuses this process because a newer life of this node is registered. Repeated with every attempt.
    Fenced {
        /// Who says so.
        by: NodeId,
    },
}

/// Events for the driver. While the batch lives, its bytes count against the connection that they came from: the
/// driver drops it after processing, which lets the reader go on.
#[derive(Debug)]
pub struct PeerBatch {
    /// The events, in order.
    pub events: Vec<PeerEvent>,
    /// Returned to the connection and to the common budget on drop.
    _credit: [Option<OwnedSemaphorePermit>; 2],
}

impl From<Vec<PeerEvent>> for PeerBatch {
    fn from(events: Vec<PeerEvent>) -> Self {
        PeerBatch { events, _credit: [None, None] }
    }
}

/// Where nodes are reached that call this one, by their own word; at most 1,024 of them.
pub(crate) type Callers = BTreeMap<NodeId, Arc<str>>;

/// Incarnations whose connections are refused.
type Fences = HashMap<NodeId, Vec<Incarnation>>;

fn is_fenced(fences: &Fences, node: NodeId, incarnation: Incarnation) -> bool {
    fences.get(&node).is_some_and(|f| f.contains(&incarnation))
}

/// Waits until the life is fenced, or the last handle is gone.
async fn fenced(fences: &mut watch::Receiver<Fences>, node: NodeId, incarnation: Incarnation) {
    let _ = fences.wait_for(|f| is_fenced(f, node, incarnation)).await;
}

/// Waits for the shutdown, or until the last handle is gone.
async fn stopping(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// The driver has stopped.
#[derive(Debug)]
struct DriverGone;

/// What all tasks know. Holds receivers only of what they wait for, so that dropping the last handle ends the tasks.
#[derive(Debug)]
struct Shared {
    cluster: String,
    node: NodeId,
    incarnation: Incarnation,
    boot: u64,
    addr: String,
    keys: ArcSwapOption<KeyRing>,
    options: PeerOptions,
    driver: Sender<Input>,
    stats: Arc<PeerStats>,
    callers: watch::Sender<Callers>,
    /// Number of the next connection; one counter for all targets and channels grows within each of them.
    next_number: AtomicU64,
    lives: Mutex<HashMap<LifeKey, Life>>,
    large_frames: Arc<Semaphore>,
    unpacked_frames: Arc<Semaphore>,
    /// Of the snapshots that this node sends.
    pace: Arc<Pace>,
    fences: watch::Receiver<Fences>,
    shutdown: watch::Receiver<bool>,
    accept_log: LogLimit,
    dial_log: LogLimit,
}

impl Shared {
    fn lives(&self) -> MutexGuard<'_, HashMap<LifeKey, Life>> {
        self.lives.lock().expect("no panic while held")
    }

    /// Hands a batch to the driver; waits while its queue is full. That stops the reader, and by TCP the sender.
    async fn push(&self, batch: PeerBatch) -> Result<(), DriverGone> {
        let mut input = Input::Peers(batch);
        loop {
            match self.driver.try_send(input) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(DriverGone),
                // A crossbeam channel cannot be awaited; a full one means thousands of inputs, many milliseconds.
                Err(TrySendError::Full(back)) => {
                    input = back;
                    add(&self.stats.driver_full, 1);
                    if *self.shutdown.borrow() {
                        return Err(DriverGone);
                    }
                    sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }
}

/// The connections to and from other nodes.
#[derive(Debug)]
pub struct Peers;

impl Peers {
    /// Starts accepting on `listener` and hands what arrives to `driver`. Must be called within a tokio runtime, which
    /// then runs the tasks. Nothing is dialed before [`PeersHandle::set_reach`].
    pub fn start(
        config: PeersConfig,
        listener: std::net::TcpListener,
        driver: Sender<Input>,
    ) -> Result<PeersHandle, PeersError> {
        if !(1..=MAX_CLUSTER_NAME_BYTES).contains(&config.cluster.len()) {
            return Err(PeersError::ClusterName(config.cluster.len()));
        }
        let runtime = tokio::runtime::Handle::try_current()?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let local_addr = listener.local_addr()?;
        let (fences, fences_seen) = watch::channel(Fences::new());
        let (shutdown, shutdown_seen) = watch::channel(false);
        let shared = Arc::new(Shared {
            cluster: config.cluster,
            node: config.node,
            incarnation: config.incarnation,
            boot: config.boot,
            addr: config.addr,
            keys: ArcSwapOption::from_pointee(config.keys),
            options: config.options,
            driver,
            stats: Arc::default(),
            callers: watch::channel(Callers::new()).0,
            next_number: AtomicU64::new(1),
            lives: Mutex::default(),
            large_frames: Arc::new(Semaphore::new(LARGE_FRAMES_BUDGET_BYTES)),
            unpacked_frames: Arc::new(Semaphore::new(UNPACKED_BUDGET_BYTES)),
            pace: Arc::new(Pace::new(config.options.snapshot_bytes_per_second)),
            fences: fences_seen,
            shutdown: shutdown_seen,
            accept_log: LogLimit::default(),
            dial_log: LogLimit::default(),
        });
        let acceptor = runtime.spawn(run_acceptor(shared.clone(), listener));
        let inner = HandleInner {
            shared,
            runtime,
            local_addr,
            fences,
            shutdown,
            peers: Arc::default(),
            acceptor: Mutex::new(Some(acceptor)),
            warned_of_limit: AtomicBool::new(false),
        };
        Ok(PeersHandle { inner: Arc::new(inner) })
    }
}

/// Where a node is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// "host:port", resolved anew at each attempt: tried in this order, at most four. None: it is not to be reached. A link
    /// to an address that is named no more is given up ...
    pub addresses: Vec<String>,
    /// ... unless the node answers, and has registered this address with the cluster: then it is given up only once another
    /// is registered.
    pub pinned: Option<String>,
}

#[cfg(test)]
impl Reach {
    /// At one address, whatever anybody registers.
    pub(crate) fn at(address: impl Into<String>) -> Reach {
        Reach { addresses: vec![address.into()], pinned: None }
    }
}

#[derive(Debug)]
struct PeerTask {
    reach: watch::Sender<Reach>,
    task: JoinHandle<()>,
}

/// The peer tasks. One that has nowhere to go takes itself out.
type PeerTasks = Mutex<HashMap<NodeId, PeerTask>>;

#[derive(Debug)]
struct HandleInner {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    local_addr: SocketAddr,
    fences: watch::Sender<Fences>,
    shutdown: watch::Sender<bool>,
    peers: Arc<PeerTasks>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
    warned_of_limit: AtomicBool,
}

/// The door to the connections. Cheap to clone; usable from any thread. The connections end with the last clone.
#[derive(Clone, Debug)]
pub struct PeersHandle {
    inner: Arc<HandleInner>,
}

impl PeersHandle {
    /// Where peers connect to this node.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.local_addr
    }

    /// Replaces the cluster's keys: for connections from now on, those that stand stay. Nothing on a node without keys, which
    /// would shut out peers that have none.
    pub fn set_keys(&self, keys: KeyRing) {
        let shared = &self.inner.shared;
        if shared.keys.load().is_some() {
            shared.keys.store(Some(Arc::new(keys)));
        }
    }

    /// Counters.
    pub fn stats(&self) -> &Arc<PeerStats> {
        &self.inner.shared.stats
    }

    /// Who calls at present, and where they are reached.
    pub(crate) fn callers(&self) -> watch::Receiver<Callers> {
        self.inner.shared.callers.subscribe()
    }

    /// Tells where a node is reached, or that it is not to be reached. A standing link is kept as [`Reach`] says. The own id
    /// is ignored, as are, with a warning, overlong addresses and more than 1,024 nodes.
    pub fn set_reach(&self, node: NodeId, mut reach: Reach) {
        let shared = &self.inner.shared;
        if node == shared.node || *shared.shutdown.borrow() {
            return;
        }
        reach.addresses.retain(|address| {
            let fits = address.len() <= MAX_ADDRESS_BYTES;
            if !fits {
                tracing::warn!(%node, bytes = address.len(), "overlong peer address ignored");
            }
            fits
        });
        reach.addresses.truncate(MAX_ADDRESSES);
        let mut peers = self.inner.peers.lock().expect("no panic while held");
        if let Some(peer) = peers.get(&node) {
            peer.reach.send_if_modified(|old| {
                let changed = *old != reach;
                *old = reach;
                changed
            });
        } else if !reach.addresses.is_empty() {
            if peers.len() >= MAX_PEERS {
                if !self.inner.warned_of_limit.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%node, "more than {MAX_PEERS} peers: the further ones are ignored");
                }
                return;
            }
            let (reach, seen) = watch::channel(reach);
            let task =
                self.inner.runtime.spawn(run_peer(shared.clone(), Arc::downgrade(&self.inner.peers), node, seen));
            peers.insert(node, PeerTask { reach, task });
        }
    }

    /// Sets the lives of `node` whose connections are refused, in both directions; standing ones are closed. A life that
    /// is refused learns it as [`PeerEvent::Fenced`]. The same list again changes nothing.
    pub fn set_fenced(&self, node: NodeId, incarnations: &[Incarnation]) {
        self.inner.fences.send_if_modified(|fences| {
            let old = fences.get(&node).map_or(&[][..], Vec::as_slice);
            if old == incarnations || (old.is_empty() && fences.len() >= MAX_PEERS) {
                return false;
            }
            if incarnations.is_empty() {
                fences.remove(&node);
            } else {
                fences.insert(node, incarnations.to_vec());
            }
            true
        });
    }

    /// Closes the incoming stream of a peer that sent what does not decode. The peer may connect again.
    pub fn distrust(&self, peer: NodeId, incarnation: Incarnation, channel: Channel) {
        add(&self.inner.shared.stats.distrusted, 1);
        revoke(&self.inner.shared.lives(), (peer, incarnation), channel);
    }

    /// Ends all connections, after queued frames were written or [`PeerOptions::flush_timeout`] has passed. Returns when
    /// all tasks have ended. Later calls return at once.
    pub async fn shutdown(&self) {
        self.inner.shutdown.send_replace(true);
        let peers: Vec<_> = self.inner.peers.lock().expect("no panic while held").drain().collect();
        let acceptor = self.inner.acceptor.lock().expect("no panic while held").take();
        // The tasks limit themselves; this is for one that is stuck in spite of it.
        let limit = self.inner.shared.options.flush_timeout + Duration::from_secs(1);
        let tasks = peers.into_iter().map(|(_, p)| p.task).chain(acceptor);
        let mut tasks: Vec<_> = tasks.collect();
        let all = async {
            for task in &mut tasks {
                let _ = task.await;
            }
        };
        if timeout(limit, all).await.is_err() {
            tasks.iter().for_each(JoinHandle::abort);
        }
    }
}
