//! What a frame's body carries, and how a large message becomes several datagrams and one again.
//!
//! ```text
//!   message --split--> part 0 | part 1 | … --frame each, <= 1,200 bytes--> datagrams --> Reassembler --> message
//!   0 | message4 | index1 | count1 | bytes         a part of a message, by UDP
//!   1 | counter8                                   a greeting: "I do not know you; this is my boot", by UDP
//!   2 | 4 or 6 | ip | port2 | bytes                a whole message and where to answer it, by TCP
//!   3 | node8 | generation8                        a goodbye: "this life of mine is over", by UDP
//!   4 | generation8                                the receipt of a goodbye, by UDP
//! ```
//!
//! No datagram is larger than 1,200 bytes, which passes every network that carries IPv6 without fragmentation by IP. One lost
//! part loses the message; gossip tells it again. What waits for its other parts is bounded in bytes, messages and time, for
//! each source and in total.

use crate::seal::FRAME_OVERHEAD_BYTES;
use crema_core::MonoTime;
use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// Largest datagram that is sent, in bytes.
pub const MAX_DATAGRAM_BYTES: usize = 1_200;
/// Largest message in bytes: what chitchat takes for the largest datagram.
pub const MAX_MESSAGE_BYTES: usize = 65_507;
/// Bytes of a message in one part.
pub const PART_BYTES: usize = MAX_DATAGRAM_BYTES - FRAME_OVERHEAD_BYTES - PART_HEADER_BYTES;
/// Most parts of a message.
pub const MAX_PARTS: usize = MAX_MESSAGE_BYTES.div_ceil(PART_BYTES);
/// Largest frame that travels by TCP, in bytes.
pub const MAX_STREAM_FRAME_BYTES: usize = MAX_MESSAGE_BYTES + FRAME_OVERHEAD_BYTES + MAX_WHOLE_HEADER_BYTES;
/// How long parts wait for the others.
pub const MAX_AGE: Duration = Duration::from_secs(2);
/// Most incomplete messages, and most bytes in them.
pub const MAX_PENDING_MESSAGES: usize = 512;
/// See [`MAX_PENDING_MESSAGES`].
pub const MAX_PENDING_BYTES: usize = 8 << 20;
/// Most incomplete messages of one source.
pub const MAX_PENDING_PER_SOURCE: usize = 8;

const PART_HEADER_BYTES: usize = 1 + 4 + 1 + 1;
const MAX_WHOLE_HEADER_BYTES: usize = 1 + 1 + 16 + 2;
const KIND_PART: u8 = 0;
const KIND_HELLO: u8 = 1;
const KIND_WHOLE: u8 = 2;
const KIND_GOODBYE: u8 = 3;
const KIND_HEARD: u8 = 4;

/// The body of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body<'a> {
    /// A part of a message.
    Part(Part<'a>),
    /// An answer to a frame of an unknown boot; asks it to try again, now that it can echo.
    Hello {
        /// The counter of the frame that is answered.
        counter: u64,
    },
    /// A message in one piece.
    Whole {
        /// Where the sender wants its answer.
        from: SocketAddr,
        /// The message.
        message: &'a [u8],
    },
    /// The sender leaves.
    Goodbye {
        /// Its node id.
        node: u64,
        /// The life that ends.
        generation: u64,
    },
    /// The goodbye of this generation was received.
    Heard {
        /// The generation.
        generation: u64,
    },
}

/// A part of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// Which message of the sender; another value for each within seconds.
    pub message: u32,
    /// Which part, below `count`.
    pub index: u8,
    /// How many parts there are, from 1 to [`MAX_PARTS`].
    pub count: u8,
    /// Its bytes.
    pub bytes: &'a [u8],
}

impl<'a> Body<'a> {
    /// Reads a body; `None` if it is not one.
    pub fn parse(body: &'a [u8]) -> Option<Body<'a>> {
        let (kind, rest) = body.split_first()?;
        match *kind {
            KIND_PART => {
                let (header, bytes) = rest.split_first_chunk::<6>()?;
                let [a, b, c, d, index, count] = *header;
                let valid = index < count && usize::from(count) <= MAX_PARTS && bytes.len() <= PART_BYTES;
                let part = Part { message: u32::from_be_bytes([a, b, c, d]), index, count, bytes };
                valid.then_some(Body::Part(part))
            }
            KIND_HELLO => Some(Body::Hello { counter: u64::from_be_bytes(rest.try_into().ok()?) }),
            KIND_GOODBYE => {
                let (node, generation) = rest.split_first_chunk::<8>()?;
                let generation = u64::from_be_bytes(generation.try_into().ok()?);
                Some(Body::Goodbye { node: u64::from_be_bytes(*node), generation })
            }
            KIND_HEARD => Some(Body::Heard { generation: u64::from_be_bytes(rest.try_into().ok()?) }),
            KIND_WHOLE => {
                let (family, rest) = rest.split_first()?;
                let (ip, rest): (IpAddr, _) = match family {
                    4 => rest.split_first_chunk::<4>().map(|(ip, rest)| (Ipv4Addr::from(*ip).into(), rest))?,
                    6 => rest.split_first_chunk::<16>().map(|(ip, rest)| (Ipv6Addr::from(*ip).into(), rest))?,
                    _ => return None,
                };
                let (port, message) = rest.split_first_chunk::<2>()?;
                let valid = message.len() <= MAX_MESSAGE_BYTES;
                let from = SocketAddr::new(ip, u16::from_be_bytes(*port));
                valid.then_some(Body::Whole { from, message })
            }
            _ => None,
        }
    }

    /// The body as bytes.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Body::Part(part) => {
                let mut body = Vec::with_capacity(PART_HEADER_BYTES + part.bytes.len());
                body.push(KIND_PART);
                body.extend_from_slice(&part.message.to_be_bytes());
                body.extend_from_slice(&[part.index, part.count]);
                body.extend_from_slice(part.bytes);
                body
            }
            Body::Hello { counter } => {
                let mut body = vec![KIND_HELLO];
                body.extend_from_slice(&counter.to_be_bytes());
                body
            }
            Body::Goodbye { node, generation } => {
                let mut body = vec![KIND_GOODBYE];
                body.extend_from_slice(&node.to_be_bytes());
                body.extend_from_slice(&generation.to_be_bytes());
                body
            }
            Body::Heard { generation } => {
                let mut body = vec![KIND_HEARD];
                body.extend_from_slice(&generation.to_be_bytes());
                body
            }
            Body::Whole { from, message } => {
                let mut body = Vec::with_capacity(MAX_WHOLE_HEADER_BYTES + message.len());
                body.push(KIND_WHOLE);
                match from.ip() {
                    IpAddr::V4(ip) => {
                        body.push(4);
                        body.extend_from_slice(&ip.octets());
                    }
                    IpAddr::V6(ip) => {
                        body.push(6);
                        body.extend_from_slice(&ip.octets());
                    }
                }
                body.extend_from_slice(&from.port().to_be_bytes());
                body.extend_from_slice(message);
                body
            }
        }
    }
}

/// How many datagrams a message of this many bytes takes.
pub fn part_count(message_bytes: usize) -> usize {
    message_bytes.div_ceil(PART_BYTES).max(1)
}

/// The parts of a message; none if it is longer than [`MAX_MESSAGE_BYTES`].
pub fn split(message: u32, bytes: &[u8]) -> impl Iterator<Item = Part<'_>> {
    let count = part_count(bytes.len());
    let fits = count <= MAX_PARTS && bytes.len() <= MAX_MESSAGE_BYTES;
    (0..if fits { count } else { 0 }).map(move |index| {
        let start = index * PART_BYTES;
        let end = (start + PART_BYTES).min(bytes.len());
        Part { message, index: index as u8, count: count as u8, bytes: &bytes[start..end] }
    })
}

#[derive(Debug)]
struct Pending {
    since: MonoTime,
    missing: usize,
    bytes: usize,
    parts: Vec<Option<Vec<u8>>>,
}

/// Puts messages together again. `S` names a source.
#[derive(Debug)]
pub struct Reassembler<S> {
    pending: HashMap<(S, u32), Pending>,
    bytes: usize,
    dropped: u64,
}

impl<S: Copy + Eq + Hash> Default for Reassembler<S> {
    fn default() -> Self {
        Reassembler { pending: HashMap::new(), bytes: 0, dropped: 0 }
    }
}

impl<S: Copy + Eq + Hash> Reassembler<S> {
    /// Takes a part. Returns the message if this completes it.
    pub fn take(&mut self, now: MonoTime, source: S, part: Part<'_>) -> Option<Vec<u8>> {
        if part.count == 1 {
            return Some(part.bytes.to_vec());
        }
        let key = (source, part.message);
        let known = self.pending.get(&key);
        // The number was used before, for a message that never became complete.
        if known.is_some_and(|p| p.parts.len() != usize::from(part.count) || now.since(p.since) > MAX_AGE) {
            self.forget(key);
        }
        if !self.pending.contains_key(&key) {
            self.make_room(now, source);
            let parts = vec![None; usize::from(part.count)];
            self.pending.insert(key, Pending { since: now, missing: parts.len(), bytes: 0, parts });
        }
        let pending = self.pending.get_mut(&key)?;
        let slot = pending.parts.get_mut(usize::from(part.index))?;
        if slot.is_some() {
            return None;
        }
        *slot = Some(part.bytes.to_vec());
        pending.missing -= 1;
        pending.bytes += part.bytes.len();
        self.bytes += part.bytes.len();
        if pending.missing > 0 {
            while self.bytes > MAX_PENDING_BYTES {
                self.forget_oldest(|_| true);
            }
            return None;
        }
        let complete = self.pending.remove(&key)?;
        self.bytes -= complete.bytes;
        let whole = complete.parts.into_iter().flatten().collect::<Vec<_>>().concat();
        (whole.len() <= MAX_MESSAGE_BYTES).then_some(whole)
    }

    /// Bytes that wait.
    pub fn pending_bytes(&self) -> usize {
        self.bytes
    }

    /// Messages that wait.
    pub fn pending_messages(&self) -> usize {
        self.pending.len()
    }

    /// Messages given up because parts were missing for too long, or for want of room.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    fn make_room(&mut self, now: MonoTime, source: S) {
        let stale: Vec<_> =
            self.pending.iter().filter(|(_, p)| now.since(p.since) > MAX_AGE).map(|(key, _)| *key).collect();
        stale.into_iter().for_each(|key| self.forget(key));
        while self.pending.keys().filter(|(of, _)| *of == source).count() >= MAX_PENDING_PER_SOURCE {
            self.forget_oldest(|of| of == source);
        }
        while self.pending.len() >= MAX_PENDING_MESSAGES {
            self.forget_oldest(|_| true);
        }
    }

    fn forget_oldest(&mut self, eligible: impl Fn(S) -> bool) {
        let oldest = self.pending.iter().filter(|((of, _), _)| eligible(*of)).min_by_key(|(_, p)| p.since);
        if let Some(key) = oldest.map(|(key, _)| *key) {
            self.forget(key);
        }
    }

    fn forget(&mut self, key: (S, u32)) {
        if let Some(pending) = self.pending.remove(&key) {
            self.bytes -= pending.bytes;
            self.dropped += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    const NOW: MonoTime = MonoTime(1_000_000_000);

    fn bytes(rng: &mut Rng, len: usize) -> Vec<u8> {
        (0..len).map(|_| rng.next() as u8).collect()
    }

    #[test]
    fn bodies_round_trip_and_their_limits_hold() {
        const { assert!(FRAME_OVERHEAD_BYTES + PART_HEADER_BYTES + PART_BYTES == MAX_DATAGRAM_BYTES && MAX_PARTS <= 64) };
        let part = Part { message: 7, index: 2, count: 3, bytes: b"abc" };
        for body in [
            Body::Part(part),
            Body::Hello { counter: u64::MAX },
            Body::Goodbye { node: 7, generation: 1 << 60 },
            Body::Heard { generation: 1 << 60 },
            Body::Whole { from: "10.1.2.3:8001".parse().unwrap(), message: b"x" },
            Body::Whole { from: "[fe80::1]:8001".parse().unwrap(), message: b"" },
        ] {
            let encoded = body.encode();
            assert_eq!(Body::parse(&encoded), Some(body));
            // Shorter ones are other bodies or none; none panics.
            for len in 0..encoded.len() {
                let _ = Body::parse(&encoded[..len]);
            }
        }
        for bad in [
            Part { index: 3, ..part },
            Part { index: 0, count: 0, ..part },
            Part { index: 0, count: MAX_PARTS as u8 + 1, ..part },
            Part { bytes: &[0; PART_BYTES + 1], ..part },
        ] {
            assert_eq!(Body::parse(&Body::Part(bad).encode()), None, "{bad:?}");
        }
        let long = vec![0; MAX_MESSAGE_BYTES + 1];
        assert_eq!(Body::parse(&Body::Whole { from: "1.1.1.1:1".parse().unwrap(), message: &long }.encode()), None);
        assert_eq!(Body::parse(&[9, 1, 2]), None);
    }

    #[test]
    fn messages_of_all_sizes_arrive_in_any_order_of_their_parts() {
        let mut rng = Rng::from_clock();
        let mut reassembler = Reassembler::default();
        let edges = [0, 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, MAX_MESSAGE_BYTES];
        let random: Vec<usize> = (0..50).map(|_| rng.below(MAX_MESSAGE_BYTES as u64) as usize).collect();
        for (id, len) in (0..).zip(edges.into_iter().chain(random)) {
            let message = bytes(&mut rng, len);
            let mut parts: Vec<_> = split(id, &message).collect();
            assert_eq!(parts.len(), part_count(len));
            let all = parts.len();
            rng.keep_random(&mut parts, all);
            let last = parts.pop().unwrap();
            for part in &parts {
                assert_eq!(reassembler.take(NOW, 'a', *part), None);
                assert_eq!(reassembler.take(NOW, 'a', *part), None, "a repeated part adds nothing");
            }
            assert_eq!(reassembler.take(NOW, 'a', last), Some(message));
            assert_eq!((reassembler.pending_bytes(), reassembler.pending_messages()), (0, 0));
        }
        assert_eq!(split(0, &vec![0; MAX_MESSAGE_BYTES + 1]).count(), 0);
    }

    #[test]
    fn what_waits_is_bounded_and_sources_do_not_mix() {
        let mut reassembler = Reassembler::default();
        let message = vec![1; 2 * PART_BYTES];
        let parts: Vec<_> = split(1, &message).collect();
        assert_eq!(reassembler.take(NOW, 1, parts[0]), None);
        assert_eq!(reassembler.take(NOW, 2, parts[1]), None, "another source's part");
        assert_eq!(reassembler.take(NOW, 1, parts[1]), Some(message.clone()));

        // One source cannot crowd out another.
        assert_eq!(reassembler.take(NOW, 2, parts[1]), None);
        for id in 10..1_000 {
            let part = Part { message: id, ..parts[0] };
            assert_eq!(reassembler.take(NOW, 3, part), None);
        }
        assert_eq!(reassembler.pending_messages(), 1 + MAX_PENDING_PER_SOURCE);
        assert_eq!(reassembler.take(NOW, 2, parts[0]).as_ref(), Some(&message));

        // Many sources cannot take more than all may have.
        let long = vec![0; MAX_MESSAGE_BYTES];
        for source in 100..2_000 {
            for part in split(source, &long).skip(1) {
                assert_eq!(reassembler.take(NOW, source, part), None);
                assert!(reassembler.pending_bytes() <= MAX_PENDING_BYTES);
                assert!(reassembler.pending_messages() <= MAX_PENDING_MESSAGES);
            }
        }
        // Old ones make room by themselves.
        let later = NOW.after(MAX_AGE + Duration::from_millis(1));
        let part = Part { message: 7, ..parts[0] };
        assert_eq!(reassembler.take(later, 1, part), None);
        assert_eq!(reassembler.pending_messages(), 1);
        assert_eq!(reassembler.pending_bytes(), PART_BYTES);
    }

    #[test]
    fn random_parts_never_panic() {
        let mut rng = Rng::from_clock();
        let mut reassembler = Reassembler::default();
        for _ in 0..20_000 {
            let len = rng.below(40) as usize;
            let mut body = bytes(&mut rng, len);
            if let Some(kind) = body.first_mut() {
                *kind %= 6;
            }
            if let Some(Body::Part(part)) = Body::parse(&body) {
                let now = MonoTime(rng.below(10_000_000_000));
                let part = Part {
                    message: part.message % 8,
                    count: part.count.clamp(part.index + 1, 5.max(part.index + 1)),
                    ..part
                };
                reassembler.take(now, rng.below(4), part);
            }
        }
        assert!(reassembler.pending_messages() <= 4 * MAX_PENDING_PER_SOURCE);
    }
}
