//! The outgoing end of one stream: takes frames from the queue and writes them; hears whether the other side lives.

use super::PeerOptions;
use super::link::{PeerLink, Queue, Taken};
use super::pace::{Pace, Turn};
use super::packing::pack;
use super::reader::CHUNK_BYTES;
use super::stats::{PeerStats, add};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use crema_shard::Channel;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::{Instant, sleep_until, timeout};

/// A write pass takes frames of about this many bytes from the queue.
const WRITE_BYTES: usize = 1024 * 1024;
/// The same for snapshots: it is what goes out at once when its turn has come.
const SNAPSHOT_WRITE_BYTES: usize = 256 * 1024;
/// Says that its sender lives, nothing else.
const EMPTY_FRAME: [u8; 4] = [0; 4];
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
    #[error("a frame that does not unpack")]
    Unpackable,
    #[error("everything is written")]
    Flushed,
    #[error("the driver has stopped")]
    DriverGone,
}

/// Frames with their headers, in pieces for a vectored write.
struct Gathered {
    scratch: BytesMut,
    chunks: VecDeque<Bytes>,
    bytes: usize,
}

impl Gathered {
    fn frame(&mut self, prefix: &[u8], body: &Bytes) {
        let len = prefix.len() + body.len();
        self.bytes += 4 + len;
        let copied = body.len() < COPY_BELOW_BYTES;
        let needed = 4 + prefix.len() + if copied { body.len() } else { 0 };
        if self.scratch.capacity() - self.scratch.len() < needed {
            // A new piece instead of a larger one: growing would copy what is already there.
            self.end_piece();
            self.scratch.reserve(CHUNK_BYTES);
        }
        self.scratch.put_u32_le(len as u32);
        self.scratch.extend_from_slice(prefix);
        if copied {
            self.scratch.extend_from_slice(body);
        } else {
            self.end_piece();
            self.chunks.push_back(body.clone());
        }
    }

    fn end_piece(&mut self) {
        if !self.scratch.is_empty() {
            self.chunks.push_back(self.scratch.split().freeze());
        }
    }
}

/// Writes what the queue holds until it ends or the connection fails. With a pace, frames are packed and wait for their
/// turns.
pub(super) async fn write_frames<W: AsyncWrite + Unpin>(
    to: &mut W,
    queue: &Queue,
    pace: Option<&Pace>,
    options: &PeerOptions,
    stats: &PeerStats,
) -> StreamEnd {
    let most_bytes = if pace.is_some() { SNAPSHOT_WRITE_BYTES } else { WRITE_BYTES };
    let mut frames = Vec::new();
    let mut out = Gathered { scratch: BytesMut::with_capacity(CHUNK_BYTES), chunks: VecDeque::new(), bytes: 0 };
    loop {
        match queue.take(&mut frames, most_bytes) {
            Taken::Frames => {}
            Taken::End => {
                // The last bytes are in the kernel's hands; closing this direction makes the peer read up to them.
                return match to.shutdown().await {
                    Ok(()) => StreamEnd::Flushed,
                    Err(e) => e.into(),
                };
            }
            Taken::Nothing => {
                if timeout(options.pulse, queue.woken()).await.is_ok() {
                    continue;
                }
                out.chunks.push_back(Bytes::from_static(&EMPTY_FRAME));
            }
        }
        let bytes = frames.iter().map(Bytes::len).sum();
        match pace {
            Some(pace) if !frames.is_empty() => {
                for frame in &frames {
                    let packed = pack(frame.clone()).await;
                    out.frame(packed.prefix, &packed.body);
                }
                let turn = pace.turn(out.bytes);
                match wait_for_turn(to, queue, &turn, options).await {
                    Ok(true) => turn.take(),
                    Ok(false) => {
                        // Closed while it waited. Nothing of these frames is written; the next look finds the end.
                        (frames, out.chunks) = Default::default();
                        out.scratch.clear();
                        out.bytes = 0;
                        continue;
                    }
                    Err(end) => return end,
                }
                add(&stats.snapshot_bytes_out, bytes);
                add(&stats.snapshot_wire_bytes_out, out.bytes);
            }
            _ => frames.iter().for_each(|frame| out.frame(&[], frame)),
        }
        out.end_piece();
        if let Err(end) = write_chunks(to, &mut out.chunks, options.write_timeout).await {
            return end;
        }
        out.bytes = 0;
        queue.written(frames.len(), bytes);
        add(&stats.frames_out, frames.len());
        add(&stats.bytes_out, bytes);
        frames.clear();
    }
}

/// Waits until the turn has come; false if the queue was closed before. Empty frames keep the stream alive meanwhile.
async fn wait_for_turn<W: AsyncWrite + Unpin>(
    to: &mut W,
    queue: &Queue,
    turn: &Turn<'_>,
    options: &PeerOptions,
) -> Result<bool, StreamEnd> {
    let mut beat = Instant::now() + options.pulse;
    loop {
        if queue.is_closed() {
            return Ok(false);
        }
        tokio::select! {
            biased;
            () = sleep_until(turn.at()) => return Ok(true),
            () = sleep_until(beat) => {
                write_chunks(to, &mut [Bytes::from_static(&EMPTY_FRAME)].into(), options.write_timeout).await?;
                beat = Instant::now() + options.pulse;
            }
            // Perhaps only more frames: the next pass finds them.
            () = queue.woken() => {}
        }
    }
}

/// Writes all chunks with as few system calls as possible; fails when no byte leaves for `limit`.
async fn write_chunks<W: AsyncWrite + Unpin>(
    to: &mut W,
    chunks: &mut VecDeque<Bytes>,
    limit: Duration,
) -> Result<(), StreamEnd> {
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
pub(super) async fn run_writer(
    stream: TcpStream,
    link: PeerLink,
    channel: Channel,
    pace: Arc<Pace>,
    options: PeerOptions,
) -> StreamEnd {
    let (mut from, mut to) = stream.into_split();
    let pace = (channel == Channel::Snapshot).then_some(&*pace);
    let end = tokio::select! {
        end = write_frames(&mut to, link.queue(channel), pace, &options, link.stats()) => end,
        end = hear_pulses(&mut from, options.pulse_timeout) => end,
    };
    if matches!(end, StreamEnd::Flushed) {
        // Wait until the peer has read everything and closes its side. A close from here while pulses stand unread
        // would send a reset, which could overtake our last frames. The shutdown limits this wait.
        hear_pulses(&mut from, options.pulse_timeout).await;
    }
    end
}
