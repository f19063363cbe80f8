//! The incoming end of one stream: cuts bytes into frames, hands them to the driver, and shows the dialer that it lives.
//!
//! ```text
//!  length u32 | body         a frame; on the snapshot stream the body is packed, see `packing`
//!  0 u32                     only proves that its sender lives
//! ```

use super::packing::{MAX_PACKED_BYTES, is_compressed, unpack, unpacked_len};
use super::stats::add;
use super::writer::StreamEnd;
use super::{DriverGone, PeerBatch, PeerEvent, Shared};
use bytes::{Buf, Bytes, BytesMut};
use crema_core::{Incarnation, NodeId};
use crema_shard::Channel;
use crema_shard::message::MAX_FRAME_BYTES;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};

/// Size of a read buffer; larger frames get a buffer of their own.
pub(super) const CHUNK_BYTES: usize = 64 * 1024;
/// A read buffer with less room than this is replaced before the next read.
const LEAST_ROOM_BYTES: usize = 4 * 1024;
/// Frames from this size on share a budget over all connections.
pub(super) const LARGE_FRAME_BYTES: usize = 1024 * 1024;
/// That budget: eight of the largest frames.
pub(super) const LARGE_FRAMES_BUDGET_BYTES: usize = 8 * MAX_FRAME_BYTES;
/// Compressed frames that unpack to [`LARGE_FRAME_BYTES`] or more share a budget of their own. Whoever waits for it may
/// hold some of the other; nobody waits the other way round.
pub(super) const UNPACKED_BUDGET_BYTES: usize = 4 * MAX_FRAME_BYTES;
/// Received bytes of one connection that wait for the driver; a larger frame counts as this much.
pub(super) const CREDIT_BYTES: usize = 8 * 1024 * 1024;
/// The same for a snapshot's stream, unpacked: its frames must not keep the driver from what is urgent.
pub(super) const SNAPSHOT_CREDIT_BYTES: usize = 2 * 1024 * 1024;
/// Most events in one batch for the driver.
const BATCH_EVENTS: usize = 4096;

/// Cuts a stream of bytes into frames without copying their bodies.
#[derive(Debug)]
pub(super) struct FrameBuffer {
    pub(super) buf: BytesMut,
    /// Longest frame.
    most_bytes: usize,
}

impl FrameBuffer {
    pub(super) fn new(most_bytes: usize) -> FrameBuffer {
        FrameBuffer { buf: BytesMut::with_capacity(CHUNK_BYTES), most_bytes }
    }

    /// Length of the frame that has begun, once its header is there.
    pub(super) fn declared(&self) -> Option<usize> {
        self.buf.first_chunk().map(|header| u32::from_le_bytes(*header) as usize)
    }

    /// The next complete frame that is not empty.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, StreamEnd> {
        while let Some(len) = self.declared() {
            if len > self.most_bytes {
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
    pub(super) fn room(&mut self) -> &mut BytesMut {
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
pub(super) async fn read_frames(
    shared: &Shared,
    from: &mut OwnedReadHalf,
    peer: NodeId,
    incarnation: Incarnation,
    channel: Channel,
) -> StreamEnd {
    let (credit_bytes, most_bytes) = match channel {
        Channel::Raft | Channel::Requests => (CREDIT_BYTES, MAX_FRAME_BYTES),
        Channel::Snapshot => (SNAPSHOT_CREDIT_BYTES, MAX_PACKED_BYTES),
    };
    let mut reader = Reader {
        shared,
        peer,
        incarnation,
        channel,
        credit: Arc::new(Semaphore::new(credit_bytes)),
        credit_bytes,
        buffer: FrameBuffer::new(most_bytes),
        large: None,
    };
    loop {
        let handed_over = match channel {
            Channel::Raft | Channel::Requests => reader.hand_over().await,
            Channel::Snapshot => reader.hand_over_unpacked().await,
        };
        if let Err(end) = handed_over {
            return end;
        }
        if let Some(len) = reader.buffer.declared()
            && len >= LARGE_FRAME_BYTES
            && reader.large.is_none()
        {
            reader.large = take_credit(&shared.large_frames, len).await;
        }
        match timeout(shared.options.idle_timeout, from.read_buf(reader.buffer.room())).await {
            Err(_) => return StreamEnd::Silent,
            Ok(Ok(0)) => return StreamEnd::Closed,
            Ok(Ok(_)) => {}
            Ok(Err(e)) => return e.into(),
        }
    }
}

/// An incoming stream and what it may hold.
struct Reader<'a> {
    shared: &'a Shared,
    peer: NodeId,
    incarnation: Incarnation,
    channel: Channel,
    credit: Arc<Semaphore>,
    credit_bytes: usize,
    buffer: FrameBuffer,
    /// Held for a large frame that has begun.
    large: Option<OwnedSemaphorePermit>,
}

impl Reader<'_> {
    /// Hands over all complete frames, in large batches.
    async fn hand_over(&mut self) -> Result<(), StreamEnd> {
        loop {
            let mut events = Vec::new();
            let mut bytes = 0;
            let failed = loop {
                match self.buffer.next() {
                    Ok(Some(frame)) => {
                        bytes += frame.len();
                        events.push(self.event(frame));
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
                let own = self.take_own_credit(bytes).await;
                let large = self.large.take();
                self.push(events, bytes, [own, large]).await?;
            }
            if let Some(end) = failed {
                return Err(end);
            }
            if !full {
                return Ok(());
            }
        }
    }

    /// Unpacks and hands over all complete frames, one by one: none is unpacked before there is credit for it.
    async fn hand_over_unpacked(&mut self) -> Result<(), StreamEnd> {
        while let Some(packed) = self.buffer.next()? {
            let mut large = self.large.take();
            let len = unpacked_len(&packed).ok_or(StreamEnd::Unpackable)?;
            let own = self.take_own_credit(len).await;
            let of_unpacked = if is_compressed(&packed) && len >= LARGE_FRAME_BYTES {
                take_credit(&self.shared.unpacked_frames, len).await
            } else {
                None
            };
            let frame = unpack(packed).await.ok_or(StreamEnd::Unpackable)?;
            if of_unpacked.is_some() {
                // The packed form is gone; the other is what waits for the driver now.
                large = of_unpacked;
            }
            self.push(vec![self.event(frame)], len, [own, large]).await?;
        }
        Ok(())
    }

    fn event(&self, frame: Bytes) -> PeerEvent {
        PeerEvent::Frame { peer: self.peer, incarnation: self.incarnation, channel: self.channel, frame }
    }

    async fn take_own_credit(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        take_credit(&self.credit, bytes.min(self.credit_bytes)).await
    }

    async fn push(
        &self,
        events: Vec<PeerEvent>,
        bytes: usize,
        credit: [Option<OwnedSemaphorePermit>; 2],
    ) -> Result<(), StreamEnd> {
        add(&self.shared.stats.frames_in, events.len());
        add(&self.shared.stats.bytes_in, bytes);
        let batch = PeerBatch { events, _credit: credit };
        self.shared.push(batch).await.map_err(|DriverGone| StreamEnd::DriverGone)
    }
}

/// Waits for `bytes` of a budget, which is never smaller and never closed.
async fn take_credit(budget: &Arc<Semaphore>, bytes: usize) -> Option<OwnedSemaphorePermit> {
    budget.clone().acquire_many_owned(bytes as u32).await.ok()
}

/// Tells the dialer that this process lives. A byte that does not fit is left out: unread ones say the same.
pub(super) async fn send_pulses(to: &OwnedWriteHalf, period: Duration) {
    loop {
        sleep(period).await;
        let _ = to.try_write(&[0]);
    }
}
