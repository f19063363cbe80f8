//! The incoming end of one stream: cuts bytes into frames, hands them to the driver, and shows the dialer that it lives.
//!
//! A frame is `length u32 | body`; one of length 0 only proves that its sender lives.

use super::claims::StreamKey;
use super::stats::add;
use super::writer::StreamEnd;
use super::{PeerBatch, PeerEvent, Shared};
use bytes::{Buf, Bytes, BytesMut};
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
/// Received bytes of one connection that wait for the driver; a larger frame counts as this much.
pub(super) const CREDIT_BYTES: usize = 8 * 1024 * 1024;
/// Most events in one batch for the driver.
const BATCH_EVENTS: usize = 4096;

/// Cuts a stream of bytes into frames without copying their bodies.
#[derive(Debug)]
pub(super) struct FrameBuffer {
    pub(super) buf: BytesMut,
}

impl FrameBuffer {
    pub(super) fn new() -> FrameBuffer {
        FrameBuffer { buf: BytesMut::with_capacity(CHUNK_BYTES) }
    }

    /// Length of the frame that has begun, once its header is there.
    pub(super) fn declared(&self) -> Option<usize> {
        self.buf.first_chunk().map(|header| u32::from_le_bytes(*header) as usize)
    }

    /// The next complete frame that is not empty.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, StreamEnd> {
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
    key: StreamKey,
    channel: Channel,
) -> StreamEnd {
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
pub(super) async fn send_pulses(to: &OwnedWriteHalf, period: Duration) {
    loop {
        sleep(period).await;
        let _ = to.try_write(&[0]);
    }
}
