//! What chitchat may be given: its messages are read here first, and those that would make it panic stay outside.
//!
//! ```text
//!   magic2 | version | kind | digest? | delta? or cluster name        digest 1 and delta: a stream of blocks
//!   stream: ( 1 | length2 | zstd block  or  2 | length2 | bytes )* | 0
//!   digest: ( id | heartbeat8 | gc8 | version8 )*                     version 0: count2 and then these, no stream
//!   delta:  ( 0 | id | gc8 | from8 ) ( 1 | key | value | version8 | status ... or 2 | version8 ) ...
//!   id:     name | generation8 | 4 or 6 | address | port2             texts: length2 and UTF-8; all numbers little-endian
//! ```
//!
//! Chitchat 0.13 takes what it decodes at its word. It panics on a delta whose last version is below one of its keys', on a
//! key that does not begin with ASCII and on an id too long to pass on; a version near 2^64 leaves no room for the next; and a
//! block of a few bytes may unpack to 64 KiB, so that one message takes gigabytes. No node of Crema writes any of these.
//!
//! A member may still be made up where there are no keys; what is kept out here is only what ends gossip.

/// The longest id: that of a node is a number of up to 20 digits.
const MAX_ID_BYTES: usize = 20;
/// Longest key and value. Well above those of [`crate::keys`], and far below what fits a datagram: a pair that does not would
/// hold up all behind it.
const MAX_KEY_BYTES: usize = 256;
const MAX_VALUE_BYTES: usize = 8 * 1024;
/// Generations are nanoseconds since 1970, or a little above such: this is the year 2116. Whoever is beaten by a made-up one takes
/// the next, so there must be one.
const MAX_GENERATION: u64 = 1 << 62;
/// Versions count the changes of one life.
const MAX_VERSION: u64 = 1 << 62;
/// Most that a stream may unpack to, and most entries of it. Thousands of claims are some 100 KiB.
const MAX_STREAM_BYTES: usize = 4 << 20;
const MAX_STREAM_ITEMS: usize = 64 * 1024;
/// Most that chitchat lets a block unpack to.
const MAX_BLOCK_BYTES: usize = u16::MAX as usize;

const KIND_SYN: u8 = 0;
const KIND_SYN_ACK: u8 = 1;
const KIND_ACK: u8 = 2;
const BLOCK_END: u8 = 0;
const BLOCK_PACKED: u8 = 1;
const BLOCK_PLAIN: u8 = 2;
const OP_NODE: u8 = 0;
const OP_PAIR: u8 = 1;
const OP_MAX_VERSION: u8 = 2;
const MAX_STATUS: u8 = 2;

/// Why a message does not reach chitchat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unfit(pub(crate) &'static str);

const SHORT: Unfit = Unfit("ends too early");

/// Whether chitchat can be given this message. One that passes may still fail to decode.
pub(crate) fn inspect(message: &[u8]) -> Result<(), Unfit> {
    let (header, mut rest) = message.split_first_chunk::<4>().ok_or(SHORT)?;
    let [_, _, version, kind] = *header;
    let rest = &mut rest;
    match kind {
        KIND_SYN => digest(version, rest),
        KIND_SYN_ACK => {
            digest(version, rest)?;
            delta(&stream(rest)?)
        }
        KIND_ACK => delta(&stream(rest)?),
        _ => Err(Unfit("of an unknown kind")),
    }
}

fn digest(version: u8, rest: &mut &[u8]) -> Result<(), Unfit> {
    match version {
        0 => (0..u16::from_le_bytes(take(rest)?)).try_for_each(|_| digest_entry(rest)),
        1 => {
            let unpacked = stream(rest)?;
            each(&unpacked, digest_entry)
        }
        _ => Err(Unfit("of an unknown version")),
    }
}

fn digest_entry(rest: &mut &[u8]) -> Result<(), Unfit> {
    id(rest)?;
    // The heartbeat and two versions, which chitchat only compares.
    take::<24>(rest).map(|_| ())
}

fn delta(unpacked: &[u8]) -> Result<(), Unfit> {
    // The highest version so far of the node that the entries are about.
    let mut highest = None;
    each(unpacked, |rest| {
        let [op] = take(rest)?;
        match op {
            OP_NODE => {
                id(rest)?;
                counted_version(rest)?;
                counted_version(rest)?;
                highest = Some(0);
            }
            OP_PAIR => {
                let key = text(rest, MAX_KEY_BYTES)?;
                if !key.is_ascii() {
                    return Err(Unfit("a key is not ASCII"));
                }
                text(rest, MAX_VALUE_BYTES)?;
                let version = counted_version(rest)?;
                let [status] = take(rest)?;
                if highest.is_none_or(|highest| version <= highest) || status > MAX_STATUS {
                    return Err(Unfit("its keys are not in order"));
                }
                highest = Some(version);
            }
            OP_MAX_VERSION => {
                let version = counted_version(rest)?;
                if highest.is_none_or(|highest| version < highest) {
                    return Err(Unfit("its last version is below that of a key"));
                }
                highest = Some(version);
            }
            _ => return Err(Unfit("of an unknown operation")),
        }
        Ok(())
    })
}

fn each(mut unpacked: &[u8], mut item: impl FnMut(&mut &[u8]) -> Result<(), Unfit>) -> Result<(), Unfit> {
    for _ in 0..MAX_STREAM_ITEMS {
        if unpacked.is_empty() {
            return Ok(());
        }
        item(&mut unpacked)?;
    }
    if unpacked.is_empty() { Ok(()) } else { Err(Unfit("has too many entries")) }
}

/// Unpacks a stream.
fn stream(rest: &mut &[u8]) -> Result<Vec<u8>, Unfit> {
    let mut unpacked = Vec::new();
    let mut block = Vec::new();
    loop {
        let [kind] = take(rest)?;
        if kind == BLOCK_END {
            return Ok(unpacked);
        }
        let length = u16::from_le_bytes(take(rest)?).into();
        let (bytes, after) = rest.split_at_checked(length).ok_or(SHORT)?;
        *rest = after;
        match kind {
            BLOCK_PLAIN => unpacked.extend_from_slice(bytes),
            BLOCK_PACKED => {
                block.resize(MAX_BLOCK_BYTES, 0);
                let length = zstd::bulk::decompress_to_buffer(bytes, &mut block[..]);
                unpacked.extend_from_slice(&block[..length.map_err(|_| Unfit("a block does not unpack"))?]);
            }
            _ => return Err(Unfit("of an unknown block")),
        }
        if unpacked.len() > MAX_STREAM_BYTES {
            return Err(Unfit("unpacks to too much"));
        }
    }
}

fn id(rest: &mut &[u8]) -> Result<(), Unfit> {
    text(rest, MAX_ID_BYTES)?;
    if u64::from_le_bytes(take(rest)?) > MAX_GENERATION {
        return Err(Unfit("no life has so high a generation"));
    }
    match take(rest)? {
        [4] => take::<4>(rest).map(|_| ())?,
        [6] => take::<16>(rest).map(|_| ())?,
        _ => return Err(Unfit("an address is of no known family")),
    }
    take::<2>(rest).map(|_| ())
}

fn counted_version(rest: &mut &[u8]) -> Result<u64, Unfit> {
    let version = u64::from_le_bytes(take(rest)?);
    if version <= MAX_VERSION { Ok(version) } else { Err(Unfit("no life has so many versions")) }
}

fn text<'a>(rest: &mut &'a [u8], max_bytes: usize) -> Result<&'a str, Unfit> {
    let length = u16::from_le_bytes(take(rest)?).into();
    if length > max_bytes {
        return Err(Unfit("a text is too long"));
    }
    let (bytes, after) = rest.split_at_checked(length).ok_or(SHORT)?;
    *rest = after;
    str::from_utf8(bytes).map_err(|_| Unfit("a text is not UTF-8"))
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], Unfit> {
    let (bytes, after) = rest.split_first_chunk::<N>().ok_or(SHORT)?;
    *rest = after;
    Ok(*bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::service::Gossip;
    use crate::testing::Rng;
    use std::net::SocketAddr;

    struct Writer(Vec<u8>);

    impl Writer {
        fn new(kind: u8) -> Writer {
            Writer(vec![0x53, 0xB0, 1, kind])
        }
        fn stream(mut self, unpacked: &[u8]) -> Writer {
            for block in unpacked.chunks(16_384) {
                self.0.push(BLOCK_PLAIN);
                self.0.extend((block.len() as u16).to_le_bytes());
                self.0.extend(block);
            }
            self.0.push(BLOCK_END);
            self
        }
        /// `blocks` times the same block, of zeros but for its beginning.
        fn packed(mut self, begin: &[u8], blocks: usize) -> Writer {
            let mut unpacked = begin.to_vec();
            unpacked.resize(MAX_BLOCK_BYTES, 0);
            let packed = zstd::bulk::compress(&unpacked, 0).unwrap();
            for _ in 0..blocks {
                self.0.push(BLOCK_PACKED);
                self.0.extend((packed.len() as u16).to_le_bytes());
                self.0.extend(&packed);
            }
            self.0.push(BLOCK_END);
            self
        }
        fn text(mut self, text: &str) -> Writer {
            self.0.extend(bytes(text));
            self
        }
    }

    fn bytes(text: &str) -> Vec<u8> {
        [&(text.len() as u16).to_le_bytes()[..], text.as_bytes()].concat()
    }
    fn id_of(name: &str, generation: u64, addr: SocketAddr) -> Vec<u8> {
        let std::net::IpAddr::V4(ip) = addr.ip() else { panic!("IPv4") };
        let parts = [&bytes(name)[..], &generation.to_le_bytes(), &[4], &ip.octets(), &addr.port().to_le_bytes()];
        parts.concat()
    }
    fn node(id: &[u8], gc: u64, from: u64) -> Vec<u8> {
        [&[OP_NODE][..], id, &gc.to_le_bytes(), &from.to_le_bytes()].concat()
    }
    fn pair(key: &str, value: &str, version: u64) -> Vec<u8> {
        [&[OP_PAIR][..], &bytes(key), &bytes(value), &version.to_le_bytes(), &[0]].concat()
    }
    fn max_version(version: u64) -> Vec<u8> {
        [&[OP_MAX_VERSION][..], &version.to_le_bytes()].concat()
    }
    fn news(parts: &[&[u8]]) -> Vec<u8> {
        Writer::new(KIND_ACK).stream(&parts.concat()).0
    }
    fn digest_of(id: &[u8]) -> Vec<u8> {
        [id, &[0; 24]].concat()
    }

    /// Messages that make chitchat panic where the node is known.
    pub(crate) fn deadly(node_2: &Gossip) -> Vec<(&'static str, Vec<u8>)> {
        let id = id_of("2", node_2.generation(), node_2.addr());
        let head = node(&id, 0, 0);
        // Two bytes of length, all of it that 16 bits can say; with what follows, an entry is longer than chitchat can write.
        let long = [&u16::MAX.to_le_bytes()[..], &[b'0'; MAX_BLOCK_BYTES - 2]].concat();
        let rest = [&[b'0'; 2][..], &[0; 8], &[4, 127, 0, 0, 1, 1, 0], &[0; 24]].concat();
        let cluster = crate::testing::config(1, &[]).cluster;
        let mut greeting = Writer::new(KIND_SYN);
        for block in [&long, &rest] {
            let packed = zstd::bulk::compress(block, 0).unwrap();
            greeting.0.push(BLOCK_PACKED);
            greeting.0.extend((packed.len() as u16).to_le_bytes());
            greeting.0.extend(packed);
        }
        greeting.0.push(BLOCK_END);
        vec![
            (
                "its last version is below that of a key",
                news(&[&head, &pair("k", "v", 1_000_000), &max_version(500_000)]),
            ),
            (
                "its keys are not in order",
                news(&[&head, &pair("a", "", 1_000_000), &max_version(10), &pair("b", "", 500_000)]),
            ),
            ("a key does not begin with ASCII", news(&[&head, &pair("é", "v", 1_000_000)])),
            ("an id is too long to be told", greeting.text(&cluster).0),
        ]
    }

    /// A message about some of these nodes, and some made up, in which everything is possible that has the right form.
    pub(crate) fn any_message(rng: &mut Rng, nodes: &[&Gossip]) -> Vec<u8> {
        let id = |rng: &mut Rng| match nodes.get(rng.below(nodes.len() as u64 + 2) as usize) {
            Some(node) => id_of(&node.node().to_string(), node.generation(), node.addr()),
            // Few of them: only so many lives fit a digest.
            None => id_of(&format!("{}", 100 + rng.below(8)), rng.below(2), "127.0.0.1:1".parse().unwrap()),
        };
        let version = |rng: &mut Rng| match rng.below(8) {
            0 => u64::MAX - rng.below(2),
            1 => MAX_VERSION - rng.below(2),
            2 => rng.next(),
            3 => 0,
            _ => {
                let bits = rng.below(40);
                rng.below(1 << bits)
            }
        };
        let mut digest = Vec::new();
        for _ in 0..rng.below(4) {
            digest.extend(id(rng));
            digest.extend((0..3).flat_map(|_| version(rng).to_le_bytes()));
        }
        let mut delta = Vec::new();
        for _ in 0..rng.below(8) {
            delta.extend(match rng.below(6) {
                0 | 1 => node(&id(rng), version(rng), if rng.below(2) == 0 { 0 } else { version(rng) }),
                2 => max_version(version(rng)),
                _ => {
                    let key = ["st", "l/1", "n/raft", "m/zone", "é", "", "k", "\u{7f}"][rng.below(8) as usize];
                    let value = ["left", "1:1", "127.0.0.1:1", "", "ü"][rng.below(5) as usize];
                    pair(key, value, version(rng))
                }
            });
        }
        match rng.below(3) {
            0 => Writer::new(KIND_SYN).stream(&digest).text(&crate::testing::config(1, &[]).cluster).0,
            1 => Writer::new(KIND_SYN_ACK).stream(&digest).stream(&delta).0,
            _ => Writer::new(KIND_ACK).stream(&delta).0,
        }
    }

    #[test]
    fn what_chitchat_cannot_bear_is_found() {
        let addr = "127.0.0.1:1".parse().unwrap();
        let id = id_of("18446744073709551615", 7, addr);
        let head = node(&id, 3, 0);
        let fits = [
            news(&[]),
            news(&[&head]),
            news(&[&head, &max_version(0)]),
            news(&[
                &head,
                &pair("st", "up", 1),
                &pair("n/id", &"x".repeat(1_024), 9),
                &max_version(9),
                &head,
                &max_version(5),
            ]),
            Writer::new(KIND_SYN).stream(&digest_of(&id)).text("cluster").0,
            Writer::new(KIND_SYN_ACK).stream(&digest_of(&id)).stream(&[&head[..], &pair("l/1", "1:1", 2)].concat()).0,
            Writer::new(KIND_SYN_ACK).stream(&[]).packed(&head, 0).0,
            [&[0x53, 0xB0, 0, KIND_SYN, 1, 0][..], &digest_of(&id), &bytes("cluster")].concat(),
        ];
        for message in fits {
            assert_eq!(inspect(&message), Ok(()));
            // A message ends where it says; what is cut off is noticed, but for the cluster's name, which chitchat reads.
            let (end, named) = (message.len(), message[3] == KIND_SYN);
            for len in (0..end - if named { 9 } else { 0 }).filter(|len| *len < end) {
                assert!(inspect(&message[..len]).is_err(), "{len} of {end}");
            }
        }
        let long_id = id_of("184467440737095516150", 7, addr);
        let last_life = id_of("7", MAX_GENERATION + 1, addr);
        let unfit = [
            news(&[&node(&last_life, 0, 0)]),
            Writer::new(KIND_SYN).stream(&digest_of(&last_life)).text("cluster").0,
            news(&[&head, &pair("k", "v", 8), &max_version(7)]),
            news(&[&head, &pair("k", "v", 8), &pair("l", "v", 8)]),
            news(&[&head, &max_version(8), &max_version(7)]),
            news(&[&pair("k", "v", 8)]),
            news(&[&max_version(8)]),
            news(&[&head, &pair("é", "v", 8)]),
            news(&[&head, &pair(&"k".repeat(MAX_KEY_BYTES + 1), "v", 8)]),
            news(&[&head, &pair("k", &"v".repeat(MAX_VALUE_BYTES + 1), 8)]),
            news(&[&head, &pair("k", "v", u64::MAX)]),
            news(&[&head, &max_version(u64::MAX)]),
            news(&[&node(&id, u64::MAX, 0), &max_version(1)]),
            news(&[&node(&long_id, 0, 0)]),
            news(&[&[3]]),
            Writer::new(KIND_SYN).stream(&digest_of(&long_id)).text("cluster").0,
            Writer::new(KIND_SYN_ACK).stream(&[]).stream(&[&head[..], &pair("k", "v", 8), &max_version(7)].concat()).0,
            [&[0x53, 0xB0, 0, KIND_SYN, 1, 0][..], &digest_of(&long_id), &bytes("cluster")].concat(),
            vec![0x53, 0xB0, 1, 3],
            vec![0x53, 0xB0, 2, KIND_SYN, 0],
        ];
        for (at, message) in unfit.iter().enumerate() {
            assert!(inspect(message).is_err(), "{at}");
        }
    }

    #[test]
    fn what_unpacks_to_too_much_is_not_unpacked() {
        let bomb = Writer::new(KIND_ACK).packed(&[], 2_000).0;
        assert!(bomb.len() < 65_507, "it fits a message: {}", bomb.len());
        assert_eq!(inspect(&bomb), Err(Unfit("unpacks to too much")));
        let id = id_of("1", 7, "127.0.0.1:1".parse().unwrap());
        let many = [node(&id, 0, 0), max_version(1).repeat(MAX_STREAM_ITEMS)].concat();
        assert_eq!(inspect(&Writer::new(KIND_ACK).stream(&many).0), Err(Unfit("has too many entries")));
        assert_eq!(inspect(&Writer::new(KIND_ACK).stream(&many[..many.len() - 9]).0), Ok(()));
    }

    /// What no check needs chitchat for: random bytes in the form of a message, and damaged messages, end in an answer.
    #[test]
    fn any_bytes_are_judged() {
        let mut rng = Rng::from_clock();
        let id = id_of("1", 7, "127.0.0.1:1".parse().unwrap());
        let whole = news(&[&node(&id, 0, 0), &pair("st", "up", 1), &max_version(4)]);
        for i in 0..crate::testing::fuzz_count() {
            let mut message = whole.clone();
            if i % 2 == 0 {
                message.truncate(4);
                message.extend((0..rng.below(200)).map(|_| rng.next() as u8));
            }
            for _ in 0..rng.below(4) {
                let at = rng.below(message.len() as u64) as usize;
                message[at] = rng.next() as u8;
            }
            let _ = inspect(&message);
        }
    }
}
