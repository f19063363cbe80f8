//! Counters of the connections, and a limit for what is logged about them.

use crate::clock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Counters of all connections, monotonic unless said otherwise.
#[derive(Debug, Default)]
pub struct PeerStats {
    /// Incoming connections that were answered with a rejection.
    pub handshakes_rejected: AtomicU64,
    /// Incoming connections that did not complete their handshake in time.
    pub handshakes_timed_out: AtomicU64,
    /// Incoming connections that did not speak this protocol.
    pub garbage: AtomicU64,
    /// Incoming connections that did not have the cluster's key, or had one where this node has none.
    pub unauthenticated: AtomicU64,
    /// Incoming connections over a limit: rejected, or closed for newer ones before they had shown who they are.
    pub over_limit: AtomicU64,
    /// Incoming connections at present (a gauge).
    pub incoming: AtomicU64,
    /// Streams closed for a frame over [`MAX_FRAME_BYTES`](crema_shard::message::MAX_FRAME_BYTES).
    pub oversize: AtomicU64,
    /// Streams closed for a snapshot's frame that does not unpack.
    pub unpackable: AtomicU64,
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
    /// Bytes of frames written to snapshot streams, before compression ...
    pub snapshot_bytes_out: AtomicU64,
    /// ... and after it.
    pub snapshot_wire_bytes_out: AtomicU64,
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
