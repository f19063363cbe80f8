//! Connections between nodes.
//!
//! ```text
//!  driver -- PeerLink::send --> bounded queue -- writer task --> TCP --> reader task -- Input::Peers --> driver of the peer
//!     ^                                             |  ^                   |
//!     +------- Up / Down <------- peer task --------+  +---- pulses -------+
//! ```
//!
//! Node i dials node j for what i sends to j: two simplex streams, one per [`Channel`], so that a large forwarded value
//! never stands before a heartbeat. A *peer task* per node dials both streams, hands the driver a [`PeerLink`] once both
//! stand, and takes the whole link down as soon as either breaks. A link belongs to one pair of connections for ever:
//! what was queued for one life of a peer is dropped with it and cannot reach the next.
//!
//! Within a stream frames arrive in order or not at all, across reconnections too: every connection carries a number
//! that grows within the dialer's life, and an acceptor ends the reader of a lower one *for good* before it welcomes a
//! higher. The rest of the protocol (a suspended lease that must not be overtaken, a session's writes) stands on this.
//!
//! On the wire, all integers little-endian:
//!
//! ```text
//!  dialer:    magic "CRMP" | version u16 | length u16 | Hello (postcard)    then frames: length u32 | body
//!  acceptor:  magic "CRMP" | version u16 | length u16 | Answer (postcard)   then one byte a pulse period
//! ```
//!
//! A frame of length 0 only proves that its sender lives. The acceptor's pulses let the dialer notice a silent partition
//! within seconds, where TCP's own retransmission timer would keep a healed connection dead for up to two minutes.
//! Nothing that a stranger sends makes us allocate more than twice what has arrived, or wait without a limit.

use crate::clock;
use crate::driver::Input;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use crema_core::{Incarnation, MonoTime, NodeId};
use crema_shard::Channel;
use crema_shard::message::MAX_FRAME_BYTES;
use crossbeam::channel::{Sender, TrySendError};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

/// First bytes of every connection; anything else is not a peer.
const MAGIC: [u8; 4] = *b"CRMP";
/// Version of the handshake and of the framing.
const VERSION: u16 = 1;
/// Magic, version and length: the part of the handshake that all versions share.
const PREAMBLE_BYTES: usize = 8;
/// Longest body of a handshake message.
const MAX_HANDSHAKE_BYTES: usize = 640;
/// Longest cluster name in bytes.
pub const MAX_CLUSTER_NAME_BYTES: usize = 255;
/// Longest text of a rejection in bytes.
const MAX_REASON_BYTES: usize = 200;
/// Longest "host:port": a DNS name, a colon and a port.
const MAX_ADDRESS_BYTES: usize = 262;
/// Most nodes that are ever dialed; further ones are ignored with a warning.
const MAX_PEERS: usize = 1024;
/// Most addresses of one name that are tried in one attempt.
const MAX_RESOLVED: usize = 4;
/// Most (node, incarnation, channel) whose connection numbers are remembered.
const MAX_STREAMS: usize = 4096;
/// A stream without a connection is forgotten only after this: by then no older connection can still be on its way in,
/// because the accept loop hands every one on at once and a handshake ends within seconds.
const STREAM_MEMORY: Duration = Duration::from_secs(60);

/// Size of a read buffer; larger frames get a buffer of their own.
const CHUNK_BYTES: usize = 64 * 1024;
/// A read buffer with less room than this is replaced before the next read.
const LEAST_ROOM_BYTES: usize = 4 * 1024;
/// Frames from this size on share a budget over all connections.
const LARGE_FRAME_BYTES: usize = 1024 * 1024;
/// That budget: eight of the largest frames.
const LARGE_FRAMES_BUDGET_BYTES: usize = 8 * MAX_FRAME_BYTES;
/// Received bytes of one connection that wait for the driver; a larger frame counts as this much.
const CREDIT_BYTES: usize = 8 * 1024 * 1024;
/// Most events in one batch for the driver.
const BATCH_EVENTS: usize = 4096;

/// A write pass takes frames of about this many bytes from the queue ...
const WRITE_BYTES: usize = 1024 * 1024;
/// ... and at most this many frames.
const WRITE_FRAMES: usize = 1024;
/// Shorter bodies are copied beside their headers; longer ones are written from where they are.
const COPY_BELOW_BYTES: usize = 8 * 1024;
/// Slices of one vectored write.
const WRITE_SLICES: usize = 64;
/// A queue wakes its writer by itself whenever this much has gathered since the last flush.
const WAKE_BYTES: usize = 256 * 1024;

/// Limits and periods of the connections between nodes. The defaults are meant for production; tests shorten them.
#[derive(Clone, Copy, Debug)]
pub struct PeerOptions {
    /// Most bytes queued for one peer on [`Channel::Raft`]. A single frame always fits an empty queue.
    pub raft_queue_bytes: usize,
    /// Most bytes queued for one peer on [`Channel::Requests`]. A single frame always fits an empty queue.
    pub requests_queue_bytes: usize,
    /// Most frames queued for one peer and channel.
    pub queue_frames: usize,
    /// Most incoming connections; further ones are closed at once.
    pub max_incoming: usize,
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
            queue_frames: 64 * 1024,
            max_incoming: 1024,
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

/// Why a frame was not queued. It was not sent and will not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The queue is full: the peer takes less than we send. Slow down.
    #[error("the queue to the peer is full")]
    Full,
    /// The link is down: wait for the next [`PeerEvent::Up`].
    #[error("the link to the peer is down")]
    Down,
    /// Empty, or over [`MAX_FRAME_BYTES`]: a mistake of the caller.
    #[error("a frame of {0} bytes cannot be sent")]
    Size(usize),
}

/// What the driver learns from its peers' connections.
#[derive(Debug)]
pub enum PeerEvent {
    /// Both outgoing streams to `peer` stand and reach the same process.
    Up {
        /// The peer.
        peer: NodeId,
        /// Its life.
        incarnation: Incarnation,
        /// Frames for this life of the peer go here.
        link: PeerLink,
    },
    /// The link to `peer` is gone, with everything that was queued. An `Up` always came before.
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

/// Counters of all connections, monotonic unless said otherwise.
#[derive(Debug, Default)]
pub struct PeerStats {
    /// Incoming connections that were answered with a rejection.
    pub handshakes_rejected: AtomicU64,
    /// Incoming connections that did not complete their handshake in time.
    pub handshakes_timed_out: AtomicU64,
    /// Incoming connections that did not speak this protocol.
    pub garbage: AtomicU64,
    /// Incoming connections over the limit.
    pub over_limit: AtomicU64,
    /// Incoming connections at present (a gauge).
    pub incoming: AtomicU64,
    /// Streams closed for a frame over [`MAX_FRAME_BYTES`].
    pub oversize: AtomicU64,
    /// Streams closed because the driver could not trust their sender.
    pub distrusted: AtomicU64,
    /// Frames received.
    pub frames_in: AtomicU64,
    /// Bytes of these frames.
    pub bytes_in: AtomicU64,
    /// Frames written.
    pub frames_out: AtomicU64,
    /// Bytes of these frames.
    pub bytes_out: AtomicU64,
    /// Frames that were not queued, because a queue was full or a link down, or were dropped with their link.
    pub drops: AtomicU64,
    /// Attempts to connect that failed.
    pub dials_failed: AtomicU64,
    /// Links that came to stand.
    pub links_up: AtomicU64,
    /// Links that came to stand again, to the same or another life of a peer.
    pub reconnects: AtomicU64,
    /// Times that a reader found the driver's queue full.
    pub driver_full: AtomicU64,
}

/// Counts `n` more.
pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

/// At most one message a second, however often something happens.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    next: AtomicU64,
    suppressed: AtomicU64,
}

impl LogLimit {
    /// Whether to log now; if so, how many messages were left out since the last one.
    pub(crate) fn allow(&self) -> Option<u64> {
        let now = clock::mono();
        let next = self.next.load(Ordering::Relaxed);
        let after = now.after(Duration::from_secs(1)).0;
        if now.0 >= next && self.next.compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            Some(self.suppressed.swap(0, Ordering::Relaxed))
        } else {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Handshake

/// What a dialer says first.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Hello<'a> {
    cluster: &'a str,
    from: NodeId,
    incarnation: Incarnation,
    to: NodeId,
    channel: u8,
    number: u64,
}

/// What the acceptor answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Answer<'a> {
    Welcome { node: NodeId, incarnation: Incarnation },
    Reject { code: u8, text: &'a str },
}

/// Why an acceptor rejects. The codes are part of the protocol: appended only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Reject {
    Version = 1,
    Cluster = 2,
    Target = 3,
    OwnId = 4,
    Fenced = 5,
    Stale = 6,
    Busy = 7,
}

impl Reject {
    fn from_code(code: u8) -> Option<Reject> {
        use Reject::*;
        [Version, Cluster, Target, OwnId, Fenced, Stale, Busy].into_iter().find(|r| *r as u8 == code)
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("timed out")]
    TimedOut,
    #[error("not a peer: {0}")]
    Garbage(&'static str),
    #[error("speaks version {0} of the peer protocol, this node speaks {VERSION}")]
    Version(u16),
    #[error("rejected ({code:?}): {text:?}")]
    Rejected { code: Option<Reject>, text: String },
    #[error("the address belongs to node {0}")]
    WrongNode(NodeId),
    #[error("both streams reached different processes")]
    Torn,
    #[error("that life of the node is fenced")]
    FencedPeer,
    #[error("the connection ended at our own end")]
    OwnSocket,
    #[error("the name has no address")]
    NoAddress,
}

/// A handshake message with its preamble. Bounded by construction: names and texts are capped before they come here.
fn handshake_bytes<T: Serialize>(body: &T) -> Vec<u8> {
    let body = postcard::to_stdvec(body).expect("derived serializers of plain data do not fail");
    debug_assert!(body.len() <= MAX_HANDSHAKE_BYTES);
    let mut out = Vec::with_capacity(PREAMBLE_BYTES + body.len());
    out.extend_from_slice(&MAGIC);
    out.put_u16_le(VERSION);
    out.put_u16_le(body.len() as u16);
    out.extend_from_slice(&body);
    out
}

/// Reads a handshake message of at most [`MAX_HANDSHAKE_BYTES`]; its time is limited by the caller.
async fn read_handshake(stream: &mut TcpStream) -> Result<Vec<u8>, HandshakeError> {
    let mut magic = [0; 4];
    stream.read_exact(&mut magic).await?;
    // Four bytes tell a stranger: there is no need to wait for more of them.
    if magic != MAGIC {
        return Err(HandshakeError::Garbage("unknown magic"));
    }
    let version = stream.read_u16_le().await?;
    let len = usize::from(stream.read_u16_le().await?);
    if version != VERSION {
        return Err(HandshakeError::Version(version));
    }
    if len > MAX_HANDSHAKE_BYTES {
        return Err(HandshakeError::Garbage("overlong handshake"));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

fn decode_handshake<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, HandshakeError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(HandshakeError::Garbage("malformed handshake")),
    }
}

fn channel_from_code(code: u8) -> Option<Channel> {
    [Channel::Raft, Channel::Requests].into_iter().find(|c| *c as u8 == code)
}

/// `text` cut to at most `max` bytes at a character's edge.
fn cut(text: &str, max: usize) -> &str {
    let mut at = max.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    &text[..at]
}

/// Runs `f` for at most `limit`.
async fn within<T>(limit: Duration, f: impl Future<Output = Result<T, HandshakeError>>) -> Result<T, HandshakeError> {
    timeout(limit, f).await.unwrap_or(Err(HandshakeError::TimedOut))
}

// ---------------------------------------------------------------------------------------------------------------------
// Outgoing: queues and links

/// Whether a queue takes and gives frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueueState {
    Open,
    /// Takes nothing more, gives what it has: a shutdown.
    Draining,
    Closed,
}

#[derive(Debug)]
struct QueueInner {
    frames: VecDeque<Bytes>,
    /// Bytes queued or being written.
    bytes: usize,
    /// Frames queued or being written.
    count: usize,
    /// Bytes since the writer was last woken.
    unflushed: usize,
    state: QueueState,
}

/// What [`Queue::take`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    Frames,
    Nothing,
    End,
}

/// Frames waiting for one writer, bounded by bytes and count.
#[derive(Debug)]
struct Queue {
    inner: Mutex<QueueInner>,
    wake: Notify,
    max_bytes: usize,
    max_frames: usize,
}

impl Queue {
    fn new(max_bytes: usize, max_frames: usize) -> Queue {
        let inner = QueueInner { frames: VecDeque::new(), bytes: 0, count: 0, unflushed: 0, state: QueueState::Open };
        Queue { inner: Mutex::new(inner), wake: Notify::new(), max_bytes, max_frames }
    }

    fn lock(&self) -> MutexGuard<'_, QueueInner> {
        self.inner.lock().expect("no panic while held")
    }

    fn push(&self, frame: Bytes) -> Result<(), SendError> {
        if frame.is_empty() || frame.len() > MAX_FRAME_BYTES {
            return Err(SendError::Size(frame.len()));
        }
        let mut q = self.lock();
        if q.state != QueueState::Open {
            return Err(SendError::Down);
        }
        // A frame of the largest size must fit whatever the limit is, or it would be refused for ever.
        if q.count > 0 && (q.bytes.saturating_add(frame.len()) > self.max_bytes || q.count >= self.max_frames) {
            return Err(SendError::Full);
        }
        q.bytes += frame.len();
        q.count += 1;
        q.unflushed += frame.len();
        q.frames.push_back(frame);
        if q.unflushed >= WAKE_BYTES {
            q.unflushed = 0;
            drop(q);
            self.wake.notify_one();
        }
        Ok(())
    }

    fn flush(&self) {
        let mut q = self.lock();
        if q.unflushed > 0 {
            q.unflushed = 0;
            drop(q);
            self.wake.notify_one();
        }
    }

    /// Moves frames for one write pass into `into`; they count as queued until [`Queue::written`].
    fn take(&self, into: &mut Vec<Bytes>) -> Taken {
        let mut q = self.lock();
        let mut bytes = 0;
        while bytes < WRITE_BYTES && into.len() < WRITE_FRAMES {
            let Some(frame) = q.frames.pop_front() else {
                break;
            };
            bytes += frame.len();
            into.push(frame);
        }
        match q.state {
            QueueState::Closed => Taken::End,
            _ if !into.is_empty() => Taken::Frames,
            QueueState::Draining => Taken::End,
            QueueState::Open => Taken::Nothing,
        }
    }

    fn written(&self, frames: usize, bytes: usize) {
        let mut q = self.lock();
        // A close in between has already counted everything as dropped.
        q.bytes = q.bytes.saturating_sub(bytes);
        q.count = q.count.saturating_sub(frames);
    }

    /// Refuses further frames; the writer ends once it has written those that are queued.
    fn drain(&self) {
        let mut q = self.lock();
        if q.state == QueueState::Open {
            q.state = QueueState::Draining;
        }
        drop(q);
        self.wake.notify_one();
    }

    /// Refuses further frames and drops those that are queued; returns how many were not written.
    fn close(&self) -> usize {
        let mut q = self.lock();
        q.state = QueueState::Closed;
        let lost = std::mem::take(&mut q.count);
        q.bytes = 0;
        let frames = std::mem::take(&mut q.frames);
        drop(q);
        // Freed outside the lock: the driver may be waiting for it.
        drop(frames);
        self.wake.notify_one();
        lost
    }
}

#[derive(Debug)]
struct LinkInner {
    peer: NodeId,
    incarnation: Incarnation,
    queues: [Queue; 2],
    stats: Arc<PeerStats>,
}

/// The outgoing streams to one life of one peer. Cheap to clone; useless once the link is down.
#[derive(Clone, Debug)]
pub struct PeerLink {
    inner: Arc<LinkInner>,
}

impl PeerLink {
    fn new(peer: NodeId, incarnation: Incarnation, options: &PeerOptions, stats: Arc<PeerStats>) -> PeerLink {
        let queues = [
            Queue::new(options.raft_queue_bytes, options.queue_frames),
            Queue::new(options.requests_queue_bytes, options.queue_frames),
        ];
        PeerLink { inner: Arc::new(LinkInner { peer, incarnation, queues, stats }) }
    }

    /// A link without a connection behind it, for the driver's tests.
    #[cfg(test)]
    pub(crate) fn detached(peer: NodeId, incarnation: Incarnation, options: &PeerOptions) -> PeerLink {
        PeerLink::new(peer, incarnation, options, Arc::default())
    }

    /// Takes what is queued, as a writer would.
    #[cfg(test)]
    pub(crate) fn take_queued(&self, channel: Channel) -> Vec<Bytes> {
        let mut out = Vec::new();
        self.queue(channel).take(&mut out);
        self.queue(channel).written(out.len(), out.iter().map(Bytes::len).sum());
        out
    }

    /// Whether a writer that went to sleep would wake up now.
    #[cfg(test)]
    pub(crate) fn flushed(&self, channel: Channel) -> bool {
        self.queue(channel).lock().unflushed == 0
    }

    fn queue(&self, channel: Channel) -> &Queue {
        &self.inner.queues[channel as usize]
    }

    /// The peer.
    pub fn peer(&self) -> NodeId {
        self.inner.peer
    }

    /// The life of the peer that this link reaches.
    pub fn incarnation(&self) -> Incarnation {
        self.inner.incarnation
    }

    /// Queues a frame of 1 to [`MAX_FRAME_BYTES`] bytes; never blocks. It leaves with the next [`PeerLink::flush`] at
    /// the latest. An error means that it was not queued and is counted as dropped.
    pub fn send(&self, channel: Channel, frame: Bytes) -> Result<(), SendError> {
        self.queue(channel).push(frame).inspect_err(|_| add(&self.inner.stats.drops, 1))
    }

    /// Wakes the writer if frames were queued since it was last woken. Once a round, not once a frame: waking a task of
    /// another thread costs more than queuing a hundred frames.
    pub fn flush(&self, channel: Channel) {
        self.queue(channel).flush();
    }

    fn drain(&self) {
        self.inner.queues.iter().for_each(Queue::drain);
    }

    fn close(&self) {
        let lost: usize = self.inner.queues.iter().map(Queue::close).sum();
        add(&self.inner.stats.drops, lost);
    }
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("closed by the other side")]
    Closed,
    #[error("no sign of life from the other side")]
    Silent,
    #[error("the other side takes nothing")]
    Stuck,
    #[error("a frame of {0} bytes is too large")]
    Oversize(usize),
    #[error("everything is written")]
    Flushed,
    #[error("the driver has stopped")]
    DriverGone,
}

/// Writes what the queue holds until it ends or the connection fails.
async fn write_frames(to: &mut OwnedWriteHalf, queue: &Queue, options: &PeerOptions, stats: &PeerStats) -> StreamEnd {
    let mut frames = Vec::new();
    let mut scratch = BytesMut::with_capacity(CHUNK_BYTES);
    let mut chunks = VecDeque::new();
    loop {
        match queue.take(&mut frames) {
            Taken::Frames => {}
            Taken::End => {
                // The last bytes are in the kernel's hands; closing this direction makes the peer read up to them.
                return match to.shutdown().await {
                    Ok(()) => StreamEnd::Flushed,
                    Err(e) => e.into(),
                };
            }
            Taken::Nothing => {
                if timeout(options.pulse, queue.wake.notified()).await.is_ok() {
                    continue;
                }
                chunks.push_back(Bytes::from_static(&[0; 4]));
            }
        }
        let mut bytes = 0;
        for frame in &frames {
            bytes += frame.len();
            let copied = frame.len() < COPY_BELOW_BYTES;
            let needed = 4 + if copied { frame.len() } else { 0 };
            if scratch.capacity() - scratch.len() < needed {
                // A new piece instead of a larger one: growing would copy what is already there.
                if !scratch.is_empty() {
                    chunks.push_back(scratch.split().freeze());
                }
                scratch.reserve(CHUNK_BYTES);
            }
            scratch.put_u32_le(frame.len() as u32);
            if copied {
                scratch.extend_from_slice(frame);
            } else {
                chunks.push_back(scratch.split().freeze());
                chunks.push_back(frame.clone());
            }
        }
        if !scratch.is_empty() {
            chunks.push_back(scratch.split().freeze());
        }
        if let Err(end) = write_chunks(to, &mut chunks, options.write_timeout).await {
            return end;
        }
        queue.written(frames.len(), bytes);
        add(&stats.frames_out, frames.len());
        add(&stats.bytes_out, bytes);
        frames.clear();
    }
}

/// Writes all chunks with as few system calls as possible; fails when no byte leaves for `limit`.
async fn write_chunks(to: &mut OwnedWriteHalf, chunks: &mut VecDeque<Bytes>, limit: Duration) -> Result<(), StreamEnd> {
    while !chunks.is_empty() {
        let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
        let mut used = 0;
        for (slice, chunk) in slices.iter_mut().zip(chunks.iter()) {
            *slice = IoSlice::new(chunk);
            used += 1;
        }
        let mut written = match timeout(limit, to.write_vectored(&slices[..used])).await {
            Err(_) => return Err(StreamEnd::Stuck),
            Ok(Ok(0)) => return Err(StreamEnd::Closed),
            Ok(result) => result?,
        };
        while let Some(first) = chunks.front_mut() {
            if written < first.len() {
                first.advance(written);
                break;
            }
            written -= first.len();
            chunks.pop_front();
        }
    }
    Ok(())
}

/// Reads the acceptor's pulses until they cease.
async fn hear_pulses(from: &mut OwnedReadHalf, limit: Duration) -> StreamEnd {
    let mut pulses = [0; 64];
    loop {
        match timeout(limit, from.read(&mut pulses)).await {
            Err(_) => return StreamEnd::Silent,
            Ok(Ok(0)) => return StreamEnd::Closed,
            Ok(Ok(_)) => {}
            Ok(Err(e)) => return e.into(),
        }
    }
}

/// One outgoing stream from the handshake to its end.
async fn run_writer(stream: TcpStream, link: PeerLink, channel: Channel, options: PeerOptions) -> StreamEnd {
    let (mut from, mut to) = stream.into_split();
    let end = tokio::select! {
        end = write_frames(&mut to, link.queue(channel), &options, &link.inner.stats) => end,
        end = hear_pulses(&mut from, options.pulse_timeout) => end,
    };
    if matches!(end, StreamEnd::Flushed) {
        // Wait until the peer has read everything and closes its side. A close from here while pulses stand unread
        // would send a reset, which could overtake our last frames. The shutdown limits this wait.
        hear_pulses(&mut from, options.pulse_timeout).await;
    }
    end
}

/// Resolves, connects and shakes hands: both streams, or nothing.
async fn dial_pair(
    shared: &Shared,
    peer: NodeId,
    address: &str,
) -> Result<([TcpStream; 2], Incarnation), HandshakeError> {
    let limit = shared.options.handshake_timeout;
    let resolved = within(limit, async { Ok(tokio::net::lookup_host(address).await?) }).await?;
    let mut raft = Err(HandshakeError::NoAddress);
    for addr in resolved.take(MAX_RESOLVED) {
        raft = dial(shared, peer, addr, Channel::Raft).await.map(|(stream, life)| (stream, life, addr));
        if raft.is_ok() {
            break;
        }
    }
    let (raft, life, addr) = raft?;
    // To the same address: a name may lead to several machines.
    let (requests, other) = dial(shared, peer, addr, Channel::Requests).await?;
    if life != other {
        return Err(HandshakeError::Torn);
    }
    if is_fenced(&shared.fences.borrow(), peer, life) {
        return Err(HandshakeError::FencedPeer);
    }
    Ok(([raft, requests], life))
}

async fn dial(
    shared: &Shared,
    peer: NodeId,
    addr: SocketAddr,
    channel: Channel,
) -> Result<(TcpStream, Incarnation), HandshakeError> {
    let limit = shared.options.handshake_timeout;
    let mut stream = within(limit, async { Ok(TcpStream::connect(addr).await?) }).await?;
    // TCP lets a socket connect to itself when the system happens to choose the dialed port for our end. On one machine
    // this would even keep the port from the node that wants to listen on it.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(HandshakeError::OwnSocket);
    }
    stream.set_nodelay(true)?;
    let hello = Hello {
        cluster: &shared.cluster,
        from: shared.node,
        incarnation: shared.incarnation,
        to: peer,
        channel: channel as u8,
        number: shared.next_number.fetch_add(1, Ordering::Relaxed),
    };
    within(limit, async {
        stream.write_all(&handshake_bytes(&hello)).await?;
        let body = read_handshake(&mut stream).await?;
        match decode_handshake(&body)? {
            Answer::Welcome { node, .. } if node != peer => Err(HandshakeError::WrongNode(node)),
            Answer::Welcome { incarnation, .. } => Ok(incarnation),
            Answer::Reject { code, text } => Err(HandshakeError::Rejected {
                code: Reject::from_code(code),
                text: cut(text, MAX_REASON_BYTES).to_owned(),
            }),
        }
    })
    .await
    .map(|life| (stream, life))
}

/// `base`, a quarter more or less, so that nodes that lost each other together do not come back in step.
fn jittered(base: Duration) -> Duration {
    let random = f64::from(getrandom::u32().unwrap_or(u32::MAX / 2)) / f64::from(u32::MAX);
    base.mul_f64(0.75 + random / 2.0)
}

/// Keeps a link to `peer` wherever its address leads, until the shutdown.
async fn run_peer(shared: Arc<Shared>, peer: NodeId, mut address: watch::Receiver<Option<String>>) {
    let mut shutdown = shared.shutdown.clone();
    let options = shared.options;
    let mut backoff = options.backoff_min;
    let mut had_link = false;
    loop {
        let target = address.borrow_and_update().clone();
        let Some(target) = target else {
            tokio::select! {
                () = stopping(&mut shutdown) => return,
                changed = address.changed() => if changed.is_err() { return },
            }
            continue;
        };
        let dialed = tokio::select! {
            biased;
            () = stopping(&mut shutdown) => return,
            changed = address.changed() => {
                if changed.is_err() {
                    return;
                }
                backoff = options.backoff_min;
                continue;
            }
            dialed = dial_pair(&shared, peer, &target) => dialed,
        };
        match dialed {
            Ok((streams, incarnation)) => {
                add(&shared.stats.links_up, 1);
                if had_link {
                    add(&shared.stats.reconnects, 1);
                }
                had_link = true;
                let since = clock::mono();
                let again = run_link(&shared, peer, incarnation, streams, &mut address).await;
                if !again {
                    return;
                }
                if clock::mono().since(since) >= options.backoff_max {
                    backoff = options.backoff_min;
                }
            }
            Err(error) => {
                add(&shared.stats.dials_failed, 1);
                let fenced = matches!(error, HandshakeError::Rejected { code: Some(Reject::Fenced), .. });
                if let HandshakeError::Rejected { .. } | HandshakeError::WrongNode(_) | HandshakeError::Version(_) =
                    error
                {
                    if let Some(left_out) = shared.dial_log.allow() {
                        tracing::warn!(%peer, address = ?target, %error, left_out, "peer refused");
                    }
                } else {
                    tracing::debug!(%peer, address = ?target, %error, "peer not reached");
                }
                if fenced && shared.push(vec![PeerEvent::Fenced { by: peer }].into()).await.is_err() {
                    return;
                }
            }
        }
        let pause = jittered(backoff);
        backoff = (backoff * 2).min(options.backoff_max);
        tokio::select! {
            biased;
            () = stopping(&mut shutdown) => return,
            changed = address.changed() => {
                if changed.is_err() {
                    return;
                }
                backoff = options.backoff_min;
            }
            () = sleep(pause) => {}
        }
    }
}

/// One link from Up to Down. Returns whether to dial again.
async fn run_link(
    shared: &Arc<Shared>,
    peer: NodeId,
    incarnation: Incarnation,
    streams: [TcpStream; 2],
    address: &mut watch::Receiver<Option<String>>,
) -> bool {
    let mut shutdown = shared.shutdown.clone();
    let mut fences = shared.fences.clone();
    let link = PeerLink::new(peer, incarnation, &shared.options, shared.stats.clone());
    // Whoever holds a clone of the link learns of its end, even if this task is aborted.
    let _closer = CloseOnDrop(link.clone());
    let mut writers = JoinSet::new();
    let [raft, requests] = streams;
    writers.spawn(run_writer(raft, link.clone(), Channel::Raft, shared.options));
    writers.spawn(run_writer(requests, link.clone(), Channel::Requests, shared.options));
    if shared.push(vec![PeerEvent::Up { peer, incarnation, link: link.clone() }].into()).await.is_err() {
        return false;
    }
    tracing::info!(%peer, %incarnation, "link up");
    let why = tokio::select! {
        biased;
        () = stopping(&mut shutdown) => {
            link.drain();
            let all = async { while writers.join_next().await.is_some() {} };
            let _ = timeout(shared.options.flush_timeout, all).await;
            return false;
        }
        _ = address.changed() => "its address changed".to_owned(),
        () = fenced(&mut fences, peer, incarnation) => "it is fenced".to_owned(),
        end = writers.join_next() => match end {
            Some(Ok(end)) => end.to_string(),
            Some(Err(panic)) => panic.to_string(),
            None => "no writer".to_owned(),
        },
    };
    link.close();
    // Both connections are closed before the next are dialed.
    writers.shutdown().await;
    tracing::info!(%peer, %incarnation, why, "link down");
    shared.push(vec![PeerEvent::Down { peer }].into()).await.is_ok()
}

struct CloseOnDrop(PeerLink);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Incoming

/// A stream of one peer's life.
type StreamKey = (NodeId, Incarnation, u8);

/// Which connection of a stream may be read.
#[derive(Clone, Copy, Debug, Default)]
struct Allowed {
    /// The highest connection number that was seen.
    highest: u64,
    /// Connections up to this number are closed for bad frames.
    revoked: u64,
}

/// What is remembered of a stream.
#[derive(Debug)]
struct Stream {
    allowed: watch::Sender<Allowed>,
    /// Held by the connection that is read: there is never more than one.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Connections that hold a claim.
    claims: usize,
    /// When the last claim ended.
    idle_since: MonoTime,
}

/// A connection's place among those of its stream.
struct Claim {
    shared: Arc<Shared>,
    key: StreamKey,
    number: u64,
    allowed: watch::Receiver<Allowed>,
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Claim {
    /// Claims the stream for connection `number`, which ends all lower ones.
    fn new(shared: &Arc<Shared>, key: StreamKey, number: u64) -> Result<Claim, Reject> {
        let mut streams = shared.streams();
        if !streams.contains_key(&key) && streams.len() >= MAX_STREAMS {
            let now = clock::mono();
            let oldest = streams
                .iter()
                .filter(|(_, s)| s.claims == 0 && now.since(s.idle_since) >= STREAM_MEMORY)
                .min_by_key(|(_, s)| s.idle_since)
                .map(|(k, _)| *k);
            streams.remove(&oldest.ok_or(Reject::Busy)?);
        }
        let stream = streams.entry(key).or_insert_with(|| Stream {
            allowed: watch::Sender::new(Allowed::default()),
            turn: Arc::default(),
            claims: 0,
            idle_since: MonoTime(0),
        });
        let newest = stream.allowed.send_if_modified(|a| {
            let higher = number > a.highest;
            a.highest = a.highest.max(number);
            higher
        });
        if !newest {
            return Err(Reject::Stale);
        }
        stream.claims += 1;
        let (allowed, turn) = (stream.allowed.subscribe(), stream.turn.clone());
        Ok(Claim { shared: shared.clone(), key, number, allowed, turn })
    }

    /// Waits until this connection may no longer be read.
    async fn ended(&mut self) {
        let number = self.number;
        let _ = self.allowed.wait_for(|a| a.highest > number || a.revoked >= number).await;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(stream) = self.shared.streams().get_mut(&self.key) {
            stream.claims -= 1;
            stream.idle_since = clock::mono();
        }
    }
}

/// Cuts a stream of bytes into frames without copying their bodies.
#[derive(Debug)]
struct FrameBuffer {
    buf: BytesMut,
}

impl FrameBuffer {
    fn new() -> FrameBuffer {
        FrameBuffer { buf: BytesMut::with_capacity(CHUNK_BYTES) }
    }

    /// Length of the frame that has begun, once its header is there.
    fn declared(&self) -> Option<usize> {
        self.buf.first_chunk().map(|header| u32::from_le_bytes(*header) as usize)
    }

    /// The next complete frame that is not empty.
    fn next(&mut self) -> Result<Option<Bytes>, StreamEnd> {
        while let Some(len) = self.declared() {
            if len > MAX_FRAME_BYTES {
                return Err(StreamEnd::Oversize(len));
            }
            if self.buf.len() < 4 + len {
                break;
            }
            self.buf.advance(4);
            if len > 0 {
                return Ok(Some(self.buf.split_to(len).freeze()));
            }
        }
        Ok(None)
    }

    /// Room for the next read. Grows as bytes arrive: never beyond the declared frame, nor beyond twice what is there,
    /// so that a header alone costs its sender's victim nothing.
    fn room(&mut self) -> &mut BytesMut {
        let (len, spare) = (self.buf.len(), self.buf.capacity() - self.buf.len());
        let whole = 4 + self.declared().unwrap_or(0);
        if whole > CHUNK_BYTES {
            if spare == 0 {
                let mut larger = BytesMut::with_capacity(whole.min(2 * len).max(CHUNK_BYTES));
                larger.extend_from_slice(&self.buf);
                self.buf = larger;
            }
        } else if spare < LEAST_ROOM_BYTES || len + spare < whole {
            // Takes the old chunk again if all its frames are gone, else begins a new one.
            self.buf.reserve(CHUNK_BYTES - len);
        }
        &mut self.buf
    }
}

/// Reads frames and hands them to the driver, in order, until the stream ends.
async fn read_frames(shared: &Shared, from: &mut OwnedReadHalf, key: StreamKey, channel: Channel) -> StreamEnd {
    let (peer, incarnation, _) = key;
    let credit = Arc::new(Semaphore::new(CREDIT_BYTES));
    let mut buffer = FrameBuffer::new();
    let mut large = None;
    loop {
        loop {
            let mut events = Vec::new();
            let mut bytes = 0;
            let failed = loop {
                match buffer.next() {
                    Ok(Some(frame)) => {
                        bytes += frame.len();
                        events.push(PeerEvent::Frame { peer, incarnation, channel, frame });
                        if events.len() >= BATCH_EVENTS {
                            break None;
                        }
                    }
                    Ok(None) => break None,
                    Err(end) => break Some(end),
                }
            };
            let full = events.len() >= BATCH_EVENTS;
            if !events.is_empty() {
                add(&shared.stats.frames_in, events.len());
                add(&shared.stats.bytes_in, bytes);
                let own = take_credit(&credit, bytes.min(CREDIT_BYTES)).await;
                let batch = PeerBatch { events, _credit: [own, large.take()] };
                if shared.push(batch).await.is_err() {
                    return StreamEnd::DriverGone;
                }
            }
            if let Some(end) = failed {
                return end;
            }
            if !full {
                break;
            }
        }
        if let Some(len) = buffer.declared()
            && len >= LARGE_FRAME_BYTES
            && large.is_none()
        {
            large = take_credit(&shared.large_frames, len).await;
        }
        match timeout(shared.options.idle_timeout, from.read_buf(buffer.room())).await {
            Err(_) => return StreamEnd::Silent,
            Ok(Ok(0)) => return StreamEnd::Closed,
            Ok(Ok(_)) => {}
            Ok(Err(e)) => return e.into(),
        }
    }
}

/// Waits for `bytes` of a budget, which is never smaller and never closed.
async fn take_credit(budget: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    budget.clone().acquire_many_owned(bytes as u32).await.ok()
}

/// Tells the dialer that this process lives. A byte that does not fit is left out: unread ones say the same.
async fn send_pulses(to: &OwnedWriteHalf, period: Duration) {
    loop {
        sleep(period).await;
        let _ = to.try_write(&[0]);
    }
}

/// Accepts connections until the shutdown, then ends them all.
async fn run_acceptor(shared: Arc<Shared>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(shared.options.max_incoming));
    let mut shutdown = shared.shutdown.clone();
    let mut readers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stopping(&mut shutdown) => break,
            Some(_) = readers.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (stream, addr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or the peer went away meanwhile. The pause keeps the first from spinning.
                tracing::debug!(%error, "accept failed");
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            add(&shared.stats.over_limit, 1);
            if let Some(left_out) = shared.accept_log.allow() {
                tracing::warn!(%addr, left_out, "too many incoming peer connections");
            }
            continue;
        };
        let shared = shared.clone();
        readers.spawn(async move {
            let _place = place;
            let _counted = Counted::new(shared.clone());
            serve_incoming(shared, stream, addr).await;
        });
    }
    // Close the port first, so that nobody waits in its backlog for a process that is going away.
    drop(listener);
    readers.shutdown().await;
}

/// Counts a connection while it lives.
struct Counted(Arc<Shared>);

impl Counted {
    fn new(shared: Arc<Shared>) -> Counted {
        shared.stats.incoming.fetch_add(1, Ordering::Relaxed);
        Counted(shared)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.stats.incoming.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An incoming connection from its handshake to its end.
async fn serve_incoming(shared: Arc<Shared>, mut stream: TcpStream, addr: SocketAddr) {
    let limit = shared.options.handshake_timeout;
    let mut claim = match within(limit, accept_hello(&shared, &mut stream)).await {
        Ok(Ok(claim)) => claim,
        Ok(Err((reject, text))) => {
            add(&shared.stats.handshakes_rejected, 1);
            if let Some(left_out) = shared.accept_log.allow() {
                tracing::warn!(%addr, ?reject, text, left_out, "peer connection rejected");
            }
            let answer = Answer::Reject { code: reject as u8, text: cut(&text, MAX_REASON_BYTES) };
            let _ = timeout(limit, stream.write_all(&handshake_bytes(&answer))).await;
            return;
        }
        Err(error) => {
            let counter = match error {
                HandshakeError::TimedOut => &shared.stats.handshakes_timed_out,
                _ => &shared.stats.garbage,
            };
            add(counter, 1);
            if let Some(left_out) = shared.accept_log.allow() {
                tracing::warn!(%addr, %error, left_out, "not a peer connection");
            }
            return;
        }
    };
    let turn = claim.turn.clone();
    // The reader of a lower number has been told to end. Only when it is gone, with all that it would still hand to the
    // driver, does the dialer hear Welcome and this connection get read.
    let _turn = tokio::select! {
        biased;
        () = claim.ended() => return,
        turn = turn.lock_owned() => turn,
    };
    let (key, number) = (claim.key, claim.number);
    let Some(channel) = channel_from_code(key.2) else {
        return;
    };
    let welcome = Answer::Welcome { node: shared.node, incarnation: shared.incarnation };
    let mut fences = shared.fences.clone();
    let mut shutdown = shared.shutdown.clone();
    if !matches!(timeout(limit, stream.write_all(&handshake_bytes(&welcome))).await, Ok(Ok(()))) {
        return;
    }
    let (mut from, to) = stream.into_split();
    let end = tokio::select! {
        biased;
        () = claim.ended() => None,
        () = fenced(&mut fences, key.0, key.1) => None,
        () = stopping(&mut shutdown) => None,
        () = send_pulses(&to, shared.options.pulse) => None,
        end = read_frames(&shared, &mut from, key, channel) => Some(end),
    };
    if let Some(StreamEnd::Oversize(_)) = end {
        add(&shared.stats.oversize, 1);
    }
    let why = end.map_or_else(|| "ended here".to_owned(), |e| e.to_string());
    tracing::debug!(peer = %key.0, incarnation = %key.1, ?channel, number, why, "incoming stream ended");
}

/// Reads and judges a Hello. The inner error is told to the dialer.
#[allow(clippy::type_complexity)] // one use
async fn accept_hello(
    shared: &Arc<Shared>,
    stream: &mut TcpStream,
) -> Result<Result<Claim, (Reject, String)>, HandshakeError> {
    stream.set_nodelay(true)?;
    let body = match read_handshake(stream).await {
        Err(HandshakeError::Version(theirs)) => {
            let text = format!("this node speaks version {VERSION} of the peer protocol, not {theirs}");
            return Ok(Err((Reject::Version, text)));
        }
        body => body?,
    };
    let hello: Hello<'_> = decode_handshake(&body)?;
    let channel = channel_from_code(hello.channel).ok_or(HandshakeError::Garbage("unknown channel"))?;
    let is_fenced = is_fenced(&shared.fences.borrow(), hello.from, hello.incarnation);
    let refusal = if hello.cluster != shared.cluster {
        Some((Reject::Cluster, format!("this is cluster {:?}, not {:?}", shared.cluster, hello.cluster)))
    } else if hello.to != shared.node {
        Some((Reject::Target, format!("this is node {}, not {}", shared.node, hello.to)))
    } else if hello.from == shared.node {
        Some((Reject::OwnId, format!("this process itself has node id {}", shared.node)))
    } else if is_fenced {
        Some((Reject::Fenced, format!("a newer life of node {} is registered", hello.from)))
    } else {
        None
    };
    if let Some(refusal) = refusal {
        return Ok(Err(refusal));
    }
    Ok(Claim::new(shared, (hello.from, hello.incarnation, channel as u8), hello.number).map_err(|reject| {
        let text = match reject {
            Reject::Stale => format!("connection {} of this stream is not the newest", hello.number),
            _ => "too many streams".to_owned(),
        };
        (reject, text)
    }))
}

// ---------------------------------------------------------------------------------------------------------------------
// The whole

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

/// What all tasks know. Holds receivers only, so that dropping the last handle ends the tasks.
#[derive(Debug)]
struct Shared {
    cluster: String,
    node: NodeId,
    incarnation: Incarnation,
    options: PeerOptions,
    driver: Sender<Input>,
    stats: Arc<PeerStats>,
    /// Number of the next connection; one counter for all targets and channels grows within each of them.
    next_number: AtomicU64,
    streams: Mutex<HashMap<StreamKey, Stream>>,
    large_frames: Arc<Semaphore>,
    fences: watch::Receiver<Fences>,
    shutdown: watch::Receiver<bool>,
    accept_log: LogLimit,
    dial_log: LogLimit,
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, HashMap<StreamKey, Stream>> {
        self.streams.lock().expect("no panic while held")
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
    /// then runs the tasks. Nothing is dialed before [`PeersHandle::set_address`].
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
            options: config.options,
            driver,
            stats: Arc::default(),
            next_number: AtomicU64::new(1),
            streams: Mutex::default(),
            large_frames: Arc::new(Semaphore::new(LARGE_FRAMES_BUDGET_BYTES)),
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
            peers: Mutex::default(),
            acceptor: Mutex::new(Some(acceptor)),
            warned_of_limit: AtomicBool::new(false),
        };
        Ok(PeersHandle { inner: Arc::new(inner) })
    }
}

#[derive(Debug)]
struct PeerTask {
    address: watch::Sender<Option<String>>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct HandleInner {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    local_addr: SocketAddr,
    fences: watch::Sender<Fences>,
    shutdown: watch::Sender<bool>,
    peers: Mutex<HashMap<NodeId, PeerTask>>,
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

    /// Counters.
    pub fn stats(&self) -> &Arc<PeerStats> {
        &self.inner.shared.stats
    }

    /// Tells where a node is reached ("host:port", resolved anew at each attempt), or that it is not to be reached.
    /// A new address replaces a standing link; the same address changes nothing. The own id is ignored, as are, with a
    /// warning, overlong addresses and more than 1,024 nodes.
    pub fn set_address(&self, node: NodeId, address: Option<String>) {
        let shared = &self.inner.shared;
        if node == shared.node || *shared.shutdown.borrow() {
            return;
        }
        if let Some(long) = address.as_ref().filter(|a| a.len() > MAX_ADDRESS_BYTES) {
            tracing::warn!(%node, bytes = long.len(), "overlong peer address ignored");
            return;
        }
        let mut peers = self.inner.peers.lock().expect("no panic while held");
        if let Some(peer) = peers.get(&node) {
            peer.address.send_if_modified(|old| {
                let changed = *old != address;
                *old = address;
                changed
            });
        } else if address.is_some() {
            if peers.len() >= MAX_PEERS {
                if !self.inner.warned_of_limit.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%node, "more than {MAX_PEERS} peers: the further ones are ignored");
                }
                return;
            }
            let (address, seen) = watch::channel(address);
            let task = self.inner.runtime.spawn(run_peer(shared.clone(), node, seen));
            peers.insert(node, PeerTask { address, task });
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
        if let Some(stream) = self.inner.shared.streams().get(&(peer, incarnation, channel as u8)) {
            stream.allowed.send_modify(|a| a.revoked = a.highest);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam::channel::Receiver;
    use tokio::sync::mpsc;

    /// Nothing here waits this long unless it is broken.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn options() -> PeerOptions {
        PeerOptions {
            handshake_timeout: Duration::from_millis(1000),
            backoff_min: Duration::from_millis(5),
            backoff_max: Duration::from_millis(20),
            flush_timeout: Duration::from_secs(5),
            ..PeerOptions::default()
        }
    }

    fn config(node: u64, life: u128, options: PeerOptions) -> PeersConfig {
        PeersConfig { cluster: "test".to_owned(), node: NodeId(node), incarnation: Incarnation(life), options }
    }

    fn listener() -> std::net::TcpListener {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap()
    }

    /// A node whose driver does nothing but pass its events on.
    struct Node {
        peers: PeersHandle,
        events: mpsc::UnboundedReceiver<PeerEvent>,
    }

    impl Node {
        fn start(config: PeersConfig) -> Node {
            let (sender, inputs) = crossbeam::channel::bounded(64);
            let peers = Peers::start(config, listener(), sender).unwrap();
            Node { peers, events: drain(inputs) }
        }

        fn new(node: u64, life: u128) -> Node {
            Node::start(config(node, life, options()))
        }

        fn addr(&self) -> String {
            self.peers.local_addr().to_string()
        }

        fn dial(&self, node: u64, to: &Node) {
            self.peers.set_address(NodeId(node), Some(to.addr()));
        }

        async fn next(&mut self) -> PeerEvent {
            timeout(PATIENCE, self.events.recv()).await.expect("an event in time").expect("the node runs")
        }

        async fn up(&mut self) -> (NodeId, Incarnation, PeerLink) {
            match self.next().await {
                PeerEvent::Up { peer, incarnation, link } => (peer, incarnation, link),
                other => panic!("up expected, not {other:?}"),
            }
        }

        async fn down(&mut self) -> NodeId {
            match self.next().await {
                PeerEvent::Down { peer } => peer,
                other => panic!("down expected, not {other:?}"),
            }
        }

        async fn frame(&mut self) -> (NodeId, Incarnation, Channel, Bytes) {
            match self.next().await {
                PeerEvent::Frame { peer, incarnation, channel, frame } => (peer, incarnation, channel, frame),
                other => panic!("a frame expected, not {other:?}"),
            }
        }
    }

    fn drain(inputs: Receiver<Input>) -> mpsc::UnboundedReceiver<PeerEvent> {
        let (sender, events) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            while let Ok(Input::Peers(batch)) = inputs.recv() {
                for event in batch.events {
                    if sender.send(event).is_err() {
                        return;
                    }
                }
            }
        });
        events
    }

    /// Asks again and again until it holds; the events behind the counters have no other voice.
    async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
        let all = async {
            while !holds() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, all).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    fn count(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    fn hello(number: u64) -> Hello<'static> {
        Hello { cluster: "test", from: NodeId(9), incarnation: Incarnation(90), to: NodeId(1), channel: 0, number }
    }

    /// A dialer by hand: says `hello`, returns the connection and the answer.
    async fn greet(node: &Node, hello: &Hello<'_>) -> (TcpStream, Result<Incarnation, u8>) {
        let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        stream.write_all(&handshake_bytes(hello)).await.unwrap();
        let body = timeout(PATIENCE, read_handshake(&mut stream)).await.unwrap().unwrap();
        let answer = match decode_handshake(&body).unwrap() {
            Answer::Welcome { incarnation, .. } => Ok(incarnation),
            Answer::Reject { code, .. } => Err(code),
        };
        (stream, answer)
    }

    /// Reads until the other side closes; a reset is a close, too.
    async fn until_closed(stream: &mut TcpStream) {
        let mut rest = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("closed in time");
    }

    fn framed(body: &[u8]) -> Vec<u8> {
        let mut out = (body.len() as u32).to_le_bytes().to_vec();
        out.extend_from_slice(body);
        out
    }

    /// xorshift64*: enough to vary sizes, and a printed seed replays it.
    struct Random(u64);

    impl Random {
        fn seeded(name: &str) -> Random {
            let seed = getrandom::u64().unwrap() | 1;
            println_seed(name, seed);
            Random(seed)
        }
        fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
        }
    }

    #[allow(clippy::print_stdout)] // the seed of a failing run must be seen
    fn println_seed(name: &str, seed: u64) {
        println!("{name}: seed {seed}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn frames_arrive_in_order_on_both_channels() {
        let mut random = Random::seeded("frames_arrive_in_order_on_both_channels");
        let (mut one, mut two) = (Node::new(1, 11), Node::new(2, 22));
        one.dial(2, &two);
        let (peer, life, link) = one.up().await;
        assert_eq!((peer, life), (NodeId(2), Incarnation(22)));
        assert_eq!((link.peer(), link.incarnation()), (peer, life));
        let mut expected: [VecDeque<Bytes>; 2] = Default::default();
        let mut left = 0;
        for i in 0..2000_u32 {
            // Mostly small, some beyond the copied size, a few beyond a read buffer, one beyond the shared budget's bar.
            let size = match i % 100 {
                99 if i == 999 => LARGE_FRAME_BYTES + 5,
                98 => CHUNK_BYTES + random.below(300_000),
                90..98 => COPY_BELOW_BYTES - 2 + random.below(4),
                _ => 4 + random.below(300),
            };
            let mut body = i.to_le_bytes().to_vec();
            body.resize(size, i as u8);
            let frame = Bytes::from(body);
            let channel = [Channel::Raft, Channel::Requests][random.below(2)];
            link.send(channel, frame.clone()).unwrap();
            expected[channel as usize].push_back(frame);
            left += 1;
            if random.below(10) == 0 {
                link.flush(channel);
            }
        }
        link.flush(Channel::Raft);
        link.flush(Channel::Requests);
        while left > 0 {
            let (peer, life, channel, frame) = two.frame().await;
            assert_eq!((peer, life), (NodeId(1), Incarnation(11)));
            assert_eq!(Some(frame), expected[channel as usize].pop_front());
            left -= 1;
        }
        assert_eq!(count(&two.peers.stats().frames_in), 2000);
        eventually("all written", || count(&one.peers.stats().frames_out) == 2000).await;
        assert_eq!(count(&one.peers.stats().bytes_out), count(&two.peers.stats().bytes_in));
        assert_eq!(count(&one.peers.stats().drops), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_higher_number_ends_the_lower_for_good() {
        let mut node = Node::new(1, 11);
        for round in 0..50_u64 {
            let (mut old, answer) = greet(&node, &hello(2 * round + 1)).await;
            assert_eq!(answer, Ok(Incarnation(11)));
            old.write_all(&framed(b"old")).await.unwrap();
            assert_eq!(node.frame().await.3, b"old"[..]);
            // These race with the new connection: they may arrive before its first frame, never after.
            let _ = old.write_all(&framed(b"late")).await;
            let (mut new, answer) = greet(&node, &hello(2 * round + 2)).await;
            assert_eq!(answer, Ok(Incarnation(11)));
            let _ = old.write_all(&framed(b"overtaken")).await;
            new.write_all(&framed(b"new")).await.unwrap();
            let mut frame = node.frame().await.3;
            if frame == b"late"[..] {
                frame = node.frame().await.3;
            }
            assert_eq!(frame, b"new"[..]);
            until_closed(&mut old).await;
            new.write_all(&framed(b"more")).await.unwrap();
            assert_eq!(node.frame().await.3, b"more"[..]);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_connection_is_welcomed_only_after_the_older_reader_has_ended() {
        let mut node = Node::new(1, 11);
        let (mut old, _) = greet(&node, &hello(1)).await;
        until_read(&mut old, &mut node).await;
        let turn = node.peers.inner.shared.streams().values().next().unwrap().turn.clone();
        // In the place of a reader that takes its time to end: who waits longest gets the turn next.
        let lingering = tokio::spawn(turn.lock_owned());
        let mut new = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        drop(old);
        let lingering = timeout(PATIENCE, lingering).await.unwrap().unwrap();
        new.write_all(&handshake_bytes(&hello(2))).await.unwrap();
        new.write_all(&framed(b"new")).await.unwrap();
        assert!(timeout(Duration::from_millis(200), new.readable()).await.is_err(), "welcomed too early");
        assert!(node.events.try_recv().is_err(), "read too early");
        drop(lingering);
        let body = timeout(PATIENCE, read_handshake(&mut new)).await.unwrap().unwrap();
        assert!(matches!(decode_handshake(&body), Ok(Answer::Welcome { .. })));
        assert_eq!(node.frame().await.3, b"new"[..]);
    }

    /// Sees that `stream` is being read.
    async fn until_read(stream: &mut TcpStream, node: &mut Node) {
        stream.write_all(&framed(b"here")).await.unwrap();
        assert_eq!(node.frame().await.3, b"here"[..]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_number_that_is_not_higher_is_rejected() {
        let node = Node::new(1, 11);
        let (_held, answer) = greet(&node, &hello(7)).await;
        assert_eq!(answer, Ok(Incarnation(11)));
        for number in [7, 6, 0] {
            assert_eq!(greet(&node, &hello(number)).await.1, Err(Reject::Stale as u8), "number {number}");
        }
        // Numbers count per stream: other channel, other life, other node.
        assert!(greet(&node, &Hello { channel: 1, ..hello(1) }).await.1.is_ok());
        assert!(greet(&node, &Hello { incarnation: Incarnation(91), ..hello(1) }).await.1.is_ok());
        assert!(greet(&node, &Hello { from: NodeId(8), ..hello(1) }).await.1.is_ok());
        assert_eq!(count(&node.peers.stats().handshakes_rejected), 3);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn garbage_is_dropped_and_counted() {
        let mut node = Node::start(config(1, 11, options()));
        let mut overlong = handshake_bytes(&hello(1))[..6].to_vec();
        overlong.extend_from_slice(&u16::MAX.to_le_bytes());
        let mut trailing = handshake_bytes(&hello(1));
        trailing[6] += 1;
        trailing.push(0);
        let truncated = {
            let mut t = handshake_bytes(&hello(1));
            t.pop();
            t[6] -= 1;
            t
        };
        let cases = [
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            vec![0; 64],
            overlong,
            trailing,
            truncated,
            handshake_bytes(&Hello { channel: 2, ..hello(1) }),
        ];
        for (i, bytes) in cases.iter().enumerate() {
            let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            until_closed(&mut stream).await;
            assert_eq!(count(&node.peers.stats().garbage), i as u64 + 1, "case {i}");
        }
        // The port still serves peers.
        let (mut good, answer) = greet(&node, &hello(1)).await;
        assert_eq!(answer, Ok(Incarnation(11)));
        good.write_all(&framed(b"x")).await.unwrap();
        assert_eq!(node.frame().await.3, b"x"[..]);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn random_bytes_harm_nothing() {
        let mut random = Random::seeded("random_bytes_harm_nothing");
        let node = Node::start(config(1, 11, PeerOptions { handshake_timeout: PATIENCE, ..options() }));
        for i in 0..100 {
            let mut bytes = handshake_bytes(&hello(i + 1));
            bytes.extend_from_slice(&framed(b"body"));
            for _ in 0..=random.below(4) {
                let at = random.below(bytes.len());
                bytes[at] = random.below(256) as u8;
            }
            let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
            // Either may fail when the node has hung up already.
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            until_closed(&mut stream).await;
        }
        assert!(greet(&node, &hello(u64::MAX)).await.1.is_ok());
        assert_eq!(count(&node.peers.stats().handshakes_timed_out), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_incomplete_handshake_times_out() {
        let short = PeerOptions { handshake_timeout: Duration::from_millis(50), ..options() };
        let node = Node::start(config(1, 11, short));
        let whole = handshake_bytes(&hello(1));
        for sent in [0, 3, 7, whole.len() - 1] {
            let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
            stream.write_all(&whole[..sent]).await.unwrap();
            until_closed(&mut stream).await;
        }
        assert_eq!(count(&node.peers.stats().handshakes_timed_out), 4);
        eventually("no connection left", || count(&node.peers.stats().incoming) == 0).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn strangers_are_rejected_with_the_reason() {
        let node = Node::new(1, 11);
        let cases = [
            (Hello { cluster: "other", ..hello(1) }, Reject::Cluster),
            (Hello { to: NodeId(2), ..hello(1) }, Reject::Target),
            (Hello { from: NodeId(1), ..hello(1) }, Reject::OwnId),
        ];
        for (hello, reject) in &cases {
            let (mut stream, answer) = greet(&node, hello).await;
            assert_eq!(answer, Err(*reject as u8), "{reject:?}");
            until_closed(&mut stream).await;
        }
        // A version that we do not know: its body is not ours to read.
        let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&(VERSION + 1).to_le_bytes());
        bytes.extend_from_slice(&0_u16.to_le_bytes());
        stream.write_all(&bytes).await.unwrap();
        let body = timeout(PATIENCE, read_handshake(&mut stream)).await.unwrap().unwrap();
        let Answer::Reject { code, text } = decode_handshake(&body).unwrap() else { panic!("rejected") };
        assert_eq!(Reject::from_code(code), Some(Reject::Version));
        assert!(text.contains("version 1"), "{text}");
        assert_eq!(count(&node.peers.stats().handshakes_rejected), 4);
        assert_eq!(count(&node.peers.stats().garbage), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_node_of_another_cluster_comes_not_up() {
        let mut one = Node::new(1, 11);
        let two = Node::start(PeersConfig { cluster: "other".to_owned(), ..config(2, 22, options()) });
        one.dial(2, &two);
        eventually("rejected twice", || count(&two.peers.stats().handshakes_rejected) >= 2).await;
        assert!(count(&one.peers.stats().dials_failed) >= 1);
        // Its own address: answered by itself, rejected as well.
        one.peers.set_address(NodeId(2), Some(one.addr()));
        eventually("rejected by itself", || count(&one.peers.stats().handshakes_rejected) >= 1).await;
        assert!(one.events.try_recv().is_err());
    }

    /// An acceptor by hand: answers each Hello by `answer` and returns the connections.
    fn fake_acceptor(
        answer: impl Fn(u64) -> (u64, u128) + std::marker::Send + 'static,
    ) -> (String, mpsc::Receiver<TcpStream>) {
        let listener = listener();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let (sender, accepted) = mpsc::channel(16);
        tokio::spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            let mut n = 0;
            while let Ok((mut stream, _)) = listener.accept().await {
                if read_handshake(&mut stream).await.is_err() {
                    continue;
                }
                let (node, life) = answer(n);
                n += 1;
                let welcome = Answer::Welcome { node: NodeId(node), incarnation: Incarnation(life) };
                let _ = stream.write_all(&handshake_bytes(&welcome)).await;
                if sender.send(stream).await.is_err() {
                    return;
                }
            }
        });
        (addr, accepted)
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn both_streams_must_reach_the_named_node_in_one_life() {
        // The first connection is answered by life 0, the next by life 1, and so on: never twice the same.
        let mut one = Node::new(1, 11);
        let (torn, mut kept) = fake_acceptor(|n| (2, u128::from(n)));
        tokio::spawn(async move { while kept.recv().await.is_some() {} });
        one.peers.set_address(NodeId(2), Some(torn));
        eventually("torn", || count(&one.peers.stats().dials_failed) >= 3).await;
        let (wrong, mut kept) = fake_acceptor(|_| (3, 33));
        tokio::spawn(async move { while kept.recv().await.is_some() {} });
        one.peers.set_address(NodeId(2), Some(wrong));
        let before = count(&one.peers.stats().dials_failed);
        eventually("wrong node", || count(&one.peers.stats().dials_failed) >= before + 3).await;
        assert!(one.events.try_recv().is_err());
        assert_eq!(count(&one.peers.stats().links_up), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_peer_that_falls_silent_goes_down() {
        let quick = PeerOptions { pulse_timeout: Duration::from_millis(100), ..options() };
        let mut one = Node::start(config(1, 11, quick));
        // It welcomes and keeps the connections open, but never sends a pulse.
        let (addr, mut kept) = fake_acceptor(|_| (2, 22));
        one.peers.set_address(NodeId(2), Some(addr));
        one.up().await;
        let _held = (kept.recv().await, kept.recv().await);
        assert_eq!(one.down().await, NodeId(2));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_peer_that_takes_nothing_goes_down() {
        let quick = PeerOptions { write_timeout: Duration::from_millis(100), ..options() };
        let mut one = Node::start(config(1, 11, quick));
        let (addr, mut kept) = fake_acceptor(|_| (2, 22));
        one.peers.set_address(NodeId(2), Some(addr));
        let (_, _, link) = one.up().await;
        let streams = [kept.recv().await.unwrap(), kept.recv().await.unwrap()];
        // Pulses go on: only the missing progress can give it away.
        tokio::spawn(async move {
            while streams.iter().all(|s| s.try_write(&[0]).is_ok()) {
                sleep(Duration::from_millis(20)).await;
            }
        });
        let frame = Bytes::from(vec![7; 4 * 1024 * 1024]);
        for _ in 0..4 {
            link.send(Channel::Requests, frame.clone()).unwrap();
        }
        link.flush(Channel::Requests);
        assert_eq!(one.down().await, NodeId(2));
        assert_eq!(link.send(Channel::Raft, Bytes::from_static(b"x")), Err(SendError::Down));
        // Nothing of the four was written as a whole, nor what came later.
        assert_eq!(count(&one.peers.stats().drops), 5);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_incoming_stream_without_a_byte_is_closed() {
        let quick = PeerOptions { idle_timeout: Duration::from_millis(100), ..options() };
        let node = Node::start(config(1, 11, quick));
        let (mut stream, answer) = greet(&node, &hello(1)).await;
        assert!(answer.is_ok());
        until_closed(&mut stream).await;
        // A standing link with nothing to say lives on its empty frames: see that they are sent.
        let quick =
            PeerOptions { idle_timeout: Duration::from_millis(400), pulse: Duration::from_millis(20), ..options() };
        let (mut one, two) = (Node::start(config(1, 11, quick)), Node::start(config(2, 22, quick)));
        one.dial(2, &two);
        one.up().await;
        assert!(timeout(Duration::from_millis(1500), one.events.recv()).await.is_err(), "an idle link stays up");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_fenced_life_is_refused_and_told() {
        let (mut old, mut two) = (Node::new(1, 11), Node::new(2, 22));
        old.dial(2, &two);
        two.dial(1, &old);
        let (_, _, link) = old.up().await;
        let (_, life, _) = two.up().await;
        assert_eq!(life, Incarnation(11));
        link.send(Channel::Raft, Bytes::from_static(b"before")).unwrap();
        link.flush(Channel::Raft);
        assert_eq!(two.frame().await.3, b"before"[..]);

        two.peers.set_fenced(NodeId(1), &[Incarnation(10), Incarnation(11)]);
        // Both directions are closed; the old life is told, again and again.
        assert_eq!(two.down().await, NodeId(1));
        assert_eq!(old.down().await, NodeId(2));
        for _ in 0..2 {
            let event = old.next().await;
            assert!(matches!(event, PeerEvent::Fenced { by: NodeId(2) }), "{event:?}");
        }
        assert_eq!(link.send(Channel::Raft, Bytes::from_static(b"after")), Err(SendError::Down));
        // Its address is still known, but that life does not come up again.
        let failed = count(&two.peers.stats().dials_failed);
        eventually("dialed in vain", || count(&two.peers.stats().dials_failed) >= failed + 2).await;
        assert!(two.events.try_recv().is_err());

        let mut new = Node::new(1, 12);
        new.dial(2, &two);
        new.up().await;
        two.dial(1, &new);
        assert_eq!(two.up().await.1, Incarnation(12));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn another_life_of_a_peer_is_down_then_up() {
        let mut one = Node::new(1, 11);
        let two = Node::new(2, 22);
        let addr = two.peers.local_addr();
        one.dial(2, &two);
        let (_, life, link) = one.up().await;
        assert_eq!(life, Incarnation(22));
        // Queued for the first life, never flushed: it must not reach the second.
        link.send(Channel::Requests, Bytes::from_static(b"for 22")).unwrap();
        two.peers.shutdown().await;
        assert_eq!(one.down().await, NodeId(2));
        // The old process may leave its connections in TIME_WAIT; a listener of the standard library allows for that.
        let (sender, inputs) = crossbeam::channel::bounded(64);
        let again = std::net::TcpListener::bind(addr).unwrap();
        let peers = Peers::start(config(2, 23, options()), again, sender).unwrap();
        let mut two = Node { peers, events: drain(inputs) };
        let (_, life, fresh) = one.up().await;
        assert_eq!(life, Incarnation(23));
        assert_eq!(link.send(Channel::Requests, Bytes::from_static(b"for 22")), Err(SendError::Down));
        fresh.send(Channel::Requests, Bytes::from_static(b"for 23")).unwrap();
        fresh.flush(Channel::Requests);
        assert_eq!(two.frame().await.3, b"for 23"[..]);
        assert_eq!(count(&one.peers.stats().reconnects), 1);
        assert_eq!(count(&one.peers.stats().links_up), 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_full_queue_says_so_and_loses_nothing_it_took() {
        let small = PeerOptions { requests_queue_bytes: 300_000, queue_frames: 1000, ..options() };
        let mut one = Node::start(config(1, 11, small));
        // A driver that takes nothing for now, behind the shortest queue.
        let (sender, inputs) = crossbeam::channel::bounded(1);
        let two = Peers::start(config(2, 22, options()), listener(), sender).unwrap();
        one.peers.set_address(NodeId(2), Some(two.local_addr().to_string()));
        let (_, _, link) = one.up().await;
        let mut taken = 0_u32;
        let mut refused = 0;
        // Until everything between the two drivers is full: ours, the kernel's, and what the reader may hold.
        let all = async {
            while refused < 50 {
                let mut body = taken.to_le_bytes().to_vec();
                body.resize(100_000, 1);
                match link.send(Channel::Requests, body.into()) {
                    Ok(()) => {
                        taken += 1;
                        refused = 0;
                    }
                    Err(error) => {
                        assert_eq!(error, SendError::Full);
                        refused += 1;
                        sleep(Duration::from_millis(2)).await;
                    }
                }
                link.flush(Channel::Requests);
            }
        };
        timeout(PATIENCE, all).await.expect("the queue fills");
        // Raft has a queue of its own.
        link.send(Channel::Raft, Bytes::from_static(b"beat")).unwrap();
        link.flush(Channel::Raft);
        assert!(count(&two.stats().driver_full) > 0);
        assert!(count(&two.stats().bytes_in) <= (CREDIT_BYTES + CHUNK_BYTES + 200_000) as u64);
        assert!(count(&one.peers.stats().drops) >= 50);

        let mut events = drain(inputs);
        let (mut next, mut beats) = (0_u32, 0);
        while next < taken || beats == 0 {
            match timeout(PATIENCE, events.recv()).await.unwrap().unwrap() {
                PeerEvent::Frame { channel: Channel::Raft, frame, .. } => {
                    assert_eq!(frame, b"beat"[..]);
                    beats += 1;
                }
                PeerEvent::Frame { frame, .. } => {
                    assert_eq!(frame[..4], next.to_le_bytes());
                    assert_eq!(frame.len(), 100_000);
                    next += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((next, beats), (taken, 1));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_driver_that_keeps_its_batches_stops_the_reader() {
        let (sender, inputs) = crossbeam::channel::bounded(1024);
        let node = Peers::start(config(1, 11, options()), listener(), sender).unwrap();
        let mut one = Node::new(2, 22);
        one.peers.set_address(NodeId(1), Some(node.local_addr().to_string()));
        let (_, _, link) = one.up().await;
        let frames = 4 * CREDIT_BYTES / 500_000;
        for _ in 0..frames {
            link.send(Channel::Requests, Bytes::from(vec![3; 500_000])).unwrap();
        }
        link.flush(Channel::Requests);
        let mut kept = Vec::new();
        let mut got = 0;
        while got < CREDIT_BYTES - 500_000 {
            let Input::Peers(batch) = inputs.recv_timeout(PATIENCE).unwrap() else { panic!("a batch") };
            got += batch.events.len() * 500_000;
            kept.push(batch);
        }
        // The credit is used up: the queue has room for hundreds of batches more, and none comes.
        assert!(inputs.recv_timeout(Duration::from_millis(300)).is_err());
        assert!(got <= CREDIT_BYTES);
        drop(kept);
        let mut events = drain(inputs);
        for _ in 0..frames - got / 500_000 {
            timeout(PATIENCE, events.recv()).await.unwrap().unwrap();
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_oversize_frame_closes_the_stream() {
        let mut node = Node::new(1, 11);
        let (mut stream, _) = greet(&node, &hello(1)).await;
        let mut bytes = framed(b"fine");
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&framed(b"fine too"));
        bytes.extend_from_slice(&(MAX_FRAME_BYTES as u32 + 1).to_le_bytes());
        bytes.extend_from_slice(b"whatever follows");
        stream.write_all(&bytes).await.unwrap();
        assert_eq!(node.frame().await.3, b"fine"[..]);
        assert_eq!(node.frame().await.3, b"fine too"[..]);
        until_closed(&mut stream).await;
        assert_eq!(count(&node.peers.stats().oversize), 1);
        assert!(node.events.try_recv().is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_largest_frame_passes_a_queue_that_is_smaller() {
        let small = PeerOptions { raft_queue_bytes: 1000, ..options() };
        let (mut one, mut two) = (Node::start(config(1, 11, small)), Node::new(2, 22));
        one.dial(2, &two);
        let (_, _, link) = one.up().await;
        let largest = Bytes::from(vec![5; MAX_FRAME_BYTES]);
        link.send(Channel::Raft, largest.clone()).unwrap();
        link.flush(Channel::Raft);
        assert!(two.frame().await.3 == largest);
        for wrong in [Bytes::new(), Bytes::from(vec![0; MAX_FRAME_BYTES + 1])] {
            assert_eq!(link.send(Channel::Raft, wrong.clone()), Err(SendError::Size(wrong.len())));
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_distrusted_stream_is_closed_and_may_come_again() {
        let (mut one, mut two) = (Node::new(1, 11), Node::new(2, 22));
        one.dial(2, &two);
        one.up().await;
        two.peers.distrust(NodeId(1), Incarnation(11), Channel::Requests);
        assert_eq!(one.down().await, NodeId(2));
        let (_, _, link) = one.up().await;
        link.send(Channel::Requests, Bytes::from_static(b"again")).unwrap();
        link.flush(Channel::Requests);
        assert_eq!(two.frame().await.3, b"again"[..]);
        assert_eq!(count(&two.peers.stats().distrusted), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn addresses_may_change_and_go() {
        let mut one = Node::new(1, 11);
        let (first, second) = (Node::new(2, 21), Node::new(2, 22));
        one.dial(2, &first);
        assert_eq!(one.up().await.1, Incarnation(21));
        // The same again changes nothing.
        one.dial(2, &first);
        one.dial(2, &second);
        assert_eq!(one.down().await, NodeId(2));
        assert_eq!(one.up().await.1, Incarnation(22));
        one.peers.set_address(NodeId(2), None);
        assert_eq!(one.down().await, NodeId(2));
        eventually("both closed", || count(&second.peers.stats().incoming) == 0).await;
        // Names are resolved; nonsense is an attempt that failed, or ignored if overlong; the own id is ignored.
        one.peers.set_address(NodeId(1), Some(first.addr()));
        one.peers.set_address(NodeId(2), Some("no port".to_owned()));
        let failed = count(&one.peers.stats().dials_failed);
        eventually("nonsense fails", || count(&one.peers.stats().dials_failed) > failed).await;
        one.peers.set_address(NodeId(2), Some("x".repeat(300)));
        one.peers.set_address(NodeId(2), Some(format!("localhost:{}", second.peers.local_addr().port())));
        assert_eq!(one.up().await.1, Incarnation(22));
        assert!(one.events.try_recv().is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_shutdown_writes_what_is_queued() {
        let (mut one, mut two) = (Node::new(1, 11), Node::new(2, 22));
        one.dial(2, &two);
        let (_, _, link) = one.up().await;
        for i in 0..5000_u32 {
            link.send(Channel::Requests, Bytes::copy_from_slice(&i.to_le_bytes())).unwrap();
        }
        // Not flushed by us.
        one.peers.shutdown().await;
        assert_eq!(link.send(Channel::Requests, Bytes::from_static(b"late")), Err(SendError::Down));
        for i in 0..5000_u32 {
            assert_eq!(two.frame().await.3, i.to_le_bytes()[..]);
        }
        one.dial(2, &two);
        assert!(TcpStream::connect(one.peers.local_addr()).await.is_err(), "the port is closed");
        one.peers.shutdown().await;
        assert_eq!(count(&two.peers.stats().links_up), 0);
        eventually("closed", || count(&two.peers.stats().incoming) == 0).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_last_handle_ends_the_connections() {
        let (mut one, two) = (Node::new(1, 11), Node::new(2, 22));
        one.dial(2, &two);
        one.up().await;
        drop(two);
        assert_eq!(one.down().await, NodeId(2));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn incoming_connections_are_limited() {
        let few = PeerOptions { max_incoming: 2, ..options() };
        let node = Node::start(config(1, 11, few));
        let first = greet(&node, &hello(1)).await;
        let _second = greet(&node, &Hello { channel: 1, ..hello(1) }).await;
        let mut third = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        until_closed(&mut third).await;
        assert_eq!(count(&node.peers.stats().over_limit), 1);
        drop(first);
        eventually("a place is free", || count(&node.peers.stats().incoming) == 1).await;
        assert!(greet(&node, &hello(2)).await.1.is_ok());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn remembered_streams_are_limited() {
        let node = Node::new(1, 11);
        let shared = &node.peers.inner.shared;
        for life in 0..MAX_STREAMS as u128 {
            drop(Claim::new(shared, (NodeId(9), Incarnation(life), 0), 1).ok().unwrap());
        }
        let fresh = (NodeId(9), Incarnation(u128::MAX), 0);
        // All of them ended a moment ago: forgetting one could let an older connection of it in.
        assert!(matches!(Claim::new(shared, fresh, 1), Err(Reject::Busy)));
        let known = (NodeId(9), Incarnation(5), 0);
        assert!(matches!(Claim::new(shared, known, 1), Err(Reject::Stale)));
        let held = Claim::new(shared, known, 2).ok().unwrap();
        for stream in shared.streams().values_mut() {
            stream.idle_since = MonoTime(0);
        }
        // The clock counts from the boot; a machine that has just booted remembers a little longer.
        if clock::mono().0 > STREAM_MEMORY.as_nanos() as u64 {
            assert!(Claim::new(shared, fresh, 1).is_ok());
            assert_eq!(shared.streams().len(), MAX_STREAMS);
        }
        assert!(shared.streams().contains_key(&held.key), "a stream in use is never forgotten");
    }

    #[test]
    fn frames_survive_any_cutting() {
        let mut random = Random::seeded("frames_survive_any_cutting");
        for _ in 0..200 {
            let mut wire = Vec::new();
            let mut sent = Vec::new();
            for _ in 0..=random.below(20) {
                let most = [4, 300, 200_000][random.below(3)];
                let body = vec![random.below(256) as u8; random.below(most)];
                wire.extend_from_slice(&framed(&body));
                // Empty frames carry nothing and are swallowed.
                sent.extend((!body.is_empty()).then_some(body));
            }
            let mut buffer = FrameBuffer::new();
            let mut got = Vec::new();
            let mut rest = &wire[..];
            while !rest.is_empty() {
                let room = buffer.room();
                let spare = room.capacity() - room.len();
                assert!(spare > 0);
                let n = (1 + random.below(100_000)).min(spare).min(rest.len());
                room.extend_from_slice(&rest[..n]);
                rest = &rest[n..];
                while let Some(frame) = buffer.next().unwrap() {
                    got.push(frame);
                }
            }
            assert!(got == sent);
            assert!(buffer.buf.is_empty());
        }
    }

    #[test]
    fn a_declared_length_alone_allocates_nothing() {
        let mut buffer = FrameBuffer::new();
        let whole = MAX_FRAME_BYTES + 4;
        buffer.room().extend_from_slice(&(MAX_FRAME_BYTES as u32).to_le_bytes());
        let mut arrived = 4;
        loop {
            assert!(buffer.next().unwrap().is_none());
            let room = buffer.room();
            assert!(room.capacity() <= (2 * arrived).clamp(CHUNK_BYTES, whole), "{} at {arrived}", room.capacity());
            let n = (room.capacity() - room.len()).min(whole - arrived);
            room.resize(room.len() + n, 1);
            arrived += n;
            if arrived == whole {
                break;
            }
        }
        assert_eq!(buffer.next().unwrap().map(|f| f.len()), Some(MAX_FRAME_BYTES));
    }

    #[test]
    fn a_queue_wakes_its_writer_once() {
        let queue = Queue::new(1000, 10);
        let wakes = || queue.lock().unflushed == 0;
        assert!(wakes());
        queue.push(Bytes::from_static(b"a")).unwrap();
        queue.push(Bytes::from_static(b"b")).unwrap();
        assert!(!wakes());
        queue.flush();
        assert!(wakes());
        let mut out = Vec::new();
        assert_eq!(queue.take(&mut out), Taken::Frames);
        // What is being written still counts.
        let held = |q: &QueueInner| (q.count, q.bytes);
        assert_eq!(held(&queue.lock()), (2, 2));
        for _ in 0..8 {
            queue.push(Bytes::from_static(b"c")).unwrap();
        }
        assert_eq!(queue.push(Bytes::from_static(b"d")), Err(SendError::Full));
        queue.written(2, 2);
        queue.push(Bytes::from(vec![0; 900])).unwrap();
        assert_eq!(queue.push(Bytes::from(vec![0; 100])), Err(SendError::Full));
        assert_eq!(queue.close(), 9);
        assert_eq!(queue.push(Bytes::from_static(b"e")), Err(SendError::Down));
        out.clear();
        assert_eq!(queue.take(&mut out), Taken::End);
    }

    #[test]
    fn pauses_vary_by_a_quarter() {
        let base = Duration::from_millis(100);
        for _ in 0..1000 {
            let pause = jittered(base);
            assert!(pause >= base * 3 / 4 && pause <= base * 5 / 4 + Duration::from_nanos(1), "{pause:?}");
        }
    }

    #[tokio::test]
    async fn a_name_that_does_not_fit_the_handshake_is_refused() {
        let (sender, _inputs) = crossbeam::channel::bounded(1);
        for len in [0, MAX_CLUSTER_NAME_BYTES + 1] {
            let config = PeersConfig { cluster: "c".repeat(len), ..config(1, 1, options()) };
            assert!(
                matches!(Peers::start(config, listener(), sender.clone()), Err(PeersError::ClusterName(l)) if l == len)
            );
        }
        let longest = "c".repeat(MAX_CLUSTER_NAME_BYTES);
        let hello = Hello { cluster: &longest, number: u64::MAX, from: NodeId(u64::MAX), ..hello(1) };
        assert!(handshake_bytes(&hello).len() <= PREAMBLE_BYTES + MAX_HANDSHAKE_BYTES);
        let worst = format!("this is cluster {longest:?}, not {longest:?}");
        let answer = Answer::Reject { code: 2, text: cut(&worst, MAX_REASON_BYTES) };
        assert!(handshake_bytes(&answer).len() <= PREAMBLE_BYTES + MAX_HANDSHAKE_BYTES);
        assert_eq!(cut("aä", 2), "a");
    }
}
