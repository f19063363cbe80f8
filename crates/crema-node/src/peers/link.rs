//! What the driver holds of a peer: a link, with one bounded queue a stream.
//!
//! ```text
//!  driver -- send --> queue --(wake once a round)--> take -- writer task -- written
//!                       `-- close: dropped and counted; drain: nothing more in, the rest out
//! ```

use super::PeerOptions;
use super::stats::{PeerStats, add};
use bytes::Bytes;
use crema_core::{Incarnation, NodeId};
use crema_shard::Channel;
use crema_shard::message::MAX_FRAME_BYTES;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// Most frames of one write pass.
const WRITE_FRAMES: usize = 1024;

/// A queue wakes its writer by itself whenever this much has gathered since the last flush.
const WAKE_BYTES: usize = 256 * 1024;

/// Why a frame was not queued. It was not sent and will not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The queue is full: the peer takes less than we send. Slow down.
    #[error("the queue to the peer is full")]
    Full,
    /// The link is down: wait for the next [`PeerEvent::Up`](super::PeerEvent::Up).
    #[error("the link to the peer is down")]
    Down,
    /// Empty, or over [`MAX_FRAME_BYTES`]: a mistake of the caller.
    #[error("a frame of {0} bytes cannot be sent")]
    Size(usize),
}

/// Whether a queue takes and gives frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueState {
    Open,
    /// Takes nothing more, gives what it has: a shutdown.
    Draining,
    Closed,
}

#[derive(Debug)]
pub(super) struct QueueInner {
    pub(super) frames: VecDeque<Bytes>,
    /// Bytes queued or being written.
    pub(super) bytes: usize,
    /// Frames queued or being written.
    pub(super) count: usize,
    /// Bytes since the writer was last woken.
    pub(super) unflushed: usize,
    state: QueueState,
}

/// What [`Queue::take`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Frames,
    Nothing,
    End,
}

/// Frames waiting for one writer, bounded by bytes and count.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) inner: Mutex<QueueInner>,
    pub(super) wake: Notify,
    pub(super) max_bytes: usize,
    pub(super) max_frames: usize,
}

impl Queue {
    pub(super) fn new(max_bytes: usize, max_frames: usize) -> Queue {
        let inner = QueueInner { frames: VecDeque::new(), bytes: 0, count: 0, unflushed: 0, state: QueueState::Open };
        Queue { inner: Mutex::new(inner), wake: Notify::new(), max_bytes, max_frames }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, QueueInner> {
        self.inner.lock().expect("no panic while held")
    }

    pub(super) fn push(&self, frame: Bytes) -> Result<(), SendError> {
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

    pub(super) fn flush(&self) {
        let mut q = self.lock();
        if q.unflushed > 0 {
            q.unflushed = 0;
            drop(q);
            self.wake.notify_one();
        }
    }

    /// Moves frames for one write pass into `into`, about `most_bytes` of them, one at least; they count as queued until
    /// [`Queue::written`].
    pub(super) fn take(&self, into: &mut Vec<Bytes>, most_bytes: usize) -> Taken {
        let mut q = self.lock();
        let mut bytes = 0;
        while bytes < most_bytes && into.len() < WRITE_FRAMES {
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

    pub(super) fn written(&self, frames: usize, bytes: usize) {
        let mut q = self.lock();
        // A close in between has already counted everything as dropped.
        q.bytes = q.bytes.saturating_sub(bytes);
        q.count = q.count.saturating_sub(frames);
    }

    /// Whether nothing more of it will be written.
    pub(super) fn is_closed(&self) -> bool {
        self.lock().state == QueueState::Closed
    }

    /// Waits until the writer is to look again: there is more to write, or the queue has closed.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Refuses further frames; the writer ends once it has written those that are queued.
    pub(super) fn drain(&self) {
        let mut q = self.lock();
        if q.state == QueueState::Open {
            q.state = QueueState::Draining;
        }
        drop(q);
        self.wake.notify_one();
    }

    /// Refuses further frames and drops those that are queued; returns how many were not written.
    pub(super) fn close(&self) -> usize {
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
    pub(super) peer: NodeId,
    pub(super) incarnation: Incarnation,
    pub(super) queues: [Queue; Channel::ALL.len()],
    pub(super) stats: Arc<PeerStats>,
}

/// The outgoing streams to one life of one peer. Cheap to clone; useless once the link is down.
#[derive(Clone, Debug)]
pub struct PeerLink {
    inner: Arc<LinkInner>,
}

impl PeerLink {
    pub(super) fn new(
        peer: NodeId,
        incarnation: Incarnation,
        options: &PeerOptions,
        stats: Arc<PeerStats>,
    ) -> PeerLink {
        let queues = Channel::ALL.map(|channel| {
            let most_bytes = match channel {
                Channel::Raft => options.raft_queue_bytes,
                Channel::Requests => options.requests_queue_bytes,
                Channel::Snapshot => options.snapshot_queue_bytes,
            };
            Queue::new(most_bytes, options.queue_frames)
        });
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
        self.queue(channel).take(&mut out, usize::MAX);
        self.queue(channel).written(out.len(), out.iter().map(Bytes::len).sum());
        out
    }

    /// Whether a writer that went to sleep would wake up now.
    #[cfg(test)]
    pub(crate) fn flushed(&self, channel: Channel) -> bool {
        self.queue(channel).lock().unflushed == 0
    }

    pub(super) fn stats(&self) -> &PeerStats {
        &self.inner.stats
    }

    pub(super) fn queue(&self, channel: Channel) -> &Queue {
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

    /// Refuses further frames, and has those that are queued written. Those of a snapshot are dropped: their rate is
    /// limited, a stop should not wait for them, and its receiver has to turn to another node anyway.
    pub(super) fn drain(&self) {
        self.queue(Channel::Raft).drain();
        self.queue(Channel::Requests).drain();
        add(&self.inner.stats.drops, self.queue(Channel::Snapshot).close());
    }

    pub(super) fn close(&self) {
        let lost: usize = self.inner.queues.iter().map(Queue::close).sum();
        add(&self.inner.stats.drops, lost);
    }
}
