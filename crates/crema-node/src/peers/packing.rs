//! The form of a snapshot's chunks on the wire: compressed where that makes them shorter.
//!
//! ```text
//!  0 | the frame as it is
//!  1 | length of the frame u32 | the frame as one LZ4 block
//! ```
//!
//! The length is the sender's word. It is believed only up to [`MAX_FRAME_BYTES`] and up to what so many bytes of LZ4 can
//! stand for at all, before anything is allocated.

use bytes::Bytes;
use crema_shard::message::MAX_FRAME_BYTES;
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

/// Longest wire form: that of the largest frame, not compressed.
pub(super) const MAX_PACKED_BYTES: usize = 1 + MAX_FRAME_BYTES;
/// Longer frames are compressed and decompressed on a thread for blocking work. Up to here it takes a millisecond or two.
const INLINE_BYTES: usize = 1024 * 1024 + 64 * 1024;
/// Shorter frames have nothing to gain.
const LEAST_BYTES: usize = 64;
/// Flag and length.
const LZ4_HEADER_BYTES: usize = 5;
/// No byte of an LZ4 block stands for more than this many.
const LZ4_MOST_PER_BYTE: usize = 255;
const PLAIN: u8 = 0;
const LZ4: u8 = 1;

/// A frame in its wire form.
#[derive(Debug)]
pub(super) struct Packed {
    /// What comes first: the flag of a plain frame, whose body is not copied for the sake of one byte.
    pub(super) prefix: &'static [u8],
    /// What follows.
    pub(super) body: Bytes,
}

/// The wire form of a frame.
pub(super) async fn pack(frame: Bytes) -> Packed {
    off_the_task(frame.len(), frame, pack_here).await
}

fn pack_here(frame: Bytes) -> Packed {
    let plain = |body| Packed { prefix: &[PLAIN], body };
    if frame.len() < LEAST_BYTES {
        return plain(frame);
    }
    let mut out = vec![0; LZ4_HEADER_BYTES + get_maximum_output_size(frame.len())];
    out[0] = LZ4;
    out[1..LZ4_HEADER_BYTES].copy_from_slice(&(frame.len() as u32).to_le_bytes());
    match compress_into(&frame, &mut out[LZ4_HEADER_BYTES..]) {
        Ok(n) if LZ4_HEADER_BYTES + n < 1 + frame.len() => {
            out.truncate(LZ4_HEADER_BYTES + n);
            Packed { prefix: &[], body: out.into() }
        }
        _ => plain(frame),
    }
}

/// Length of the frame that a wire form claims to hold; `None` if it cannot be true. Allocates nothing.
pub(super) fn unpacked_len(packed: &[u8]) -> Option<usize> {
    let len = match *packed.first()? {
        PLAIN => packed.len() - 1,
        LZ4 => {
            let (header, block) = packed.split_at_checked(LZ4_HEADER_BYTES)?;
            let len = u32::from_le_bytes(*header.last_chunk()?) as usize;
            if len > block.len().saturating_mul(LZ4_MOST_PER_BYTE) {
                return None;
            }
            len
        }
        _ => return None,
    };
    (1..=MAX_FRAME_BYTES).contains(&len).then_some(len)
}

/// Whether unpacking takes memory of its own.
pub(super) fn is_compressed(packed: &[u8]) -> bool {
    packed.first() == Some(&LZ4)
}

/// The frame of a wire form; `None` if it is malformed.
pub(super) async fn unpack(packed: Bytes) -> Option<Bytes> {
    let len = unpacked_len(&packed)?;
    if !is_compressed(&packed) {
        return Some(packed.slice(1..));
    }
    off_the_task(len, packed, move |packed| {
        let mut out = vec![0; len];
        let written = decompress_into(&packed[LZ4_HEADER_BYTES..], &mut out).ok()?;
        (written == len).then(|| out.into())
    })
    .await
}

/// Runs `f`, which works on `len` bytes, where it holds up nobody for long.
async fn off_the_task<T: Send + 'static>(len: usize, input: Bytes, f: impl FnOnce(Bytes) -> T + Send + 'static) -> T {
    if len <= INLINE_BYTES {
        return f(input);
    }
    match tokio::task::spawn_blocking(move || f(input)).await {
        Ok(output) => output,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going away, and this task with it at this very point.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn wire(frame: &Bytes) -> Bytes {
        let packed = pack(frame.clone()).await;
        [packed.prefix, &packed.body].concat().into()
    }

    fn noise(len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        getrandom::fill(&mut bytes).unwrap();
        bytes.into()
    }

    #[tokio::test]
    async fn frames_come_back_as_they_were() {
        let text = |len: usize| Bytes::from(b"key:0001 value ".repeat(len / 15 + 1)[..len].to_vec());
        for len in [1, 2, LEAST_BYTES - 1, LEAST_BYTES, 1000, 65_536, INLINE_BYTES, INLINE_BYTES + 1, MAX_FRAME_BYTES] {
            for (frame, shrinks) in [(text(len), len >= 1000), (noise(len), false)] {
                let wire = wire(&frame).await;
                assert_eq!(unpacked_len(&wire), Some(len));
                assert_eq!(is_compressed(&wire), wire[0] == LZ4);
                if shrinks {
                    assert!(wire.len() < len / 5, "{len}: {}", wire.len());
                }
                // Never longer than the flag, and noise is sent as it is.
                assert!(wire.len() <= len + 1);
                if frame.len() >= LEAST_BYTES && !shrinks && len >= 1000 {
                    assert_eq!(wire[0], PLAIN);
                }
                assert!(unpack(wire).await.unwrap() == frame, "{len}");
            }
        }
    }

    #[tokio::test]
    async fn a_length_that_cannot_be_true_is_refused() {
        let good = wire(&Bytes::from(vec![7; 10_000])).await;
        assert!(good.len() < 200 && is_compressed(&good));
        let claim = |len: u32| {
            let mut lying = good.to_vec();
            lying[1..LZ4_HEADER_BYTES].copy_from_slice(&len.to_le_bytes());
            lying
        };
        let most = (good.len() - LZ4_HEADER_BYTES) * LZ4_MOST_PER_BYTE;
        // Refused before anything is allocated: the length alone says so.
        for len in [0, most as u32 + 1, MAX_FRAME_BYTES as u32 + 1, u32::MAX] {
            assert_eq!(unpacked_len(&claim(len)), None, "{len}");
        }
        let long_enough = [&claim(MAX_FRAME_BYTES as u32 + 1)[..], &vec![0; MAX_FRAME_BYTES]].concat();
        assert_eq!(unpacked_len(&long_enough), None);
        // Possible, but not true.
        for len in [1, 9_999, 10_001, most as u32] {
            assert_eq!(unpacked_len(&claim(len)), Some(len as usize));
            assert_eq!(unpack(claim(len).into()).await, None, "{len}");
        }
        assert_eq!(unpack(good).await, Some(vec![7; 10_000].into()));
    }

    #[tokio::test]
    async fn what_is_malformed_is_refused() {
        let good = wire(&Bytes::from(vec![7; 10_000])).await;
        for wrong in [&[][..], &[PLAIN], &[LZ4], &good[..4], &good[..5], &good[..good.len() - 1], &[2, 1, 2, 3]] {
            assert_eq!(unpack(Bytes::copy_from_slice(wrong)).await, None, "{wrong:?}");
        }
        // Whatever stands in the block: an answer or none, no panic, no frame of another length.
        for _ in 0..2000 {
            let mut wild = noise(64).to_vec();
            wild[0] = LZ4;
            wild[2] %= 32;
            wild[3..LZ4_HEADER_BYTES].fill(0);
            let claimed = unpacked_len(&wild);
            let got = unpack(wild.into()).await;
            assert!(got.is_none() || got.map(|f| f.len()) == claimed);
        }
    }
}
