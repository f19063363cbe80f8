//! The outgoing end of one stream: takes frames from the queue and writes them; hears whether the other side lives.

use super::PeerOptions;
use super::link::{PeerLink, Queue, Taken};
use super::reader::CHUNK_BYTES;
use super::stats::{PeerStats, add};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use crema_shard::Channel;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// Shorter bodies are copied beside their headers; longer ones are written from where they are.
pub(super) const COPY_BELOW_BYTES: usize = 8 * 1024;
/// Slices of one vectored write.
const WRITE_SLICES: usize = 64;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamEnd {
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
pub(super) async fn run_writer(stream: TcpStream, link: PeerLink, channel: Channel, options: PeerOptions) -> StreamEnd {
    let (mut from, mut to) = stream.into_split();
    let end = tokio::select! {
        end = write_frames(&mut to, link.queue(channel), &options, link.stats()) => end,
        end = hear_pulses(&mut from, options.pulse_timeout) => end,
    };
    if matches!(end, StreamEnd::Flushed) {
        // Wait until the peer has read everything and closes its side. A close from here while pulses stand unread
        // would send a reset, which could overtake our last frames. The shutdown limits this wait.
        hear_pulses(&mut from, options.pulse_timeout).await;
    }
    end
}
