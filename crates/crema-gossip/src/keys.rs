//! What a node says about itself: the keys and values that gossip carries, written and read.
//!
//! ```text
//!   n/id n/raft n/redis n/rc n/http n/inc   who and where; set once per life, before anything else
//!   m/<name>                                custom metadata
//!   st = up | left                          set last at the start: its presence says that all of the above arrived
//!   l/<shard> = <epoch>:<term>              "I lead this shard"; one key per shard, set and never deleted
//! ```
//!
//! Keys are never deleted, because a collected tombstone resets lagging peers. A node's keys arrive in the order in which
//! they were set, so that a peer that knows `st` knows the rest. Every key and value is printable ASCII and short: chitchat
//! panics on a key that starts with another character, and one oversized value blocks all that follow it.
//!
//! What others say is not trusted. Reading never panics; what does not parse is ignored and counted.

use crema_core::{Epoch, Incarnation, NodeId, SLOT_COUNT, ShardId, Term};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

/// Longest value in bytes.
pub const MAX_VALUE_BYTES: usize = 1024;
/// Longest name of a metadata entry in bytes.
pub const MAX_METADATA_KEY_BYTES: usize = 64;
/// Most metadata entries of one node.
pub const MAX_METADATA_ENTRIES: usize = 32;
/// Longest `host:port` in bytes: a DNS name of 253 characters and a port.
pub const MAX_ADDR_BYTES: usize = 253 + 6;

pub(crate) const STATE_KEY: &str = "st";
pub(crate) const STATE_UP: &str = "up";
pub(crate) const STATE_LEFT: &str = "left";
pub(crate) const NODE_PREFIX: &str = "n/";
pub(crate) const METADATA_PREFIX: &str = "m/";
pub(crate) const LEADER_PREFIX: &str = "l/";

/// What a node says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeMeta {
    /// Its id, from 1 on.
    pub node_id: NodeId,
    /// Its present life.
    pub incarnation: Incarnation,
    /// `host:port` where peers connect.
    pub raft_addr: String,
    /// `host:port` of the RESP listener that proxies; `None` on a node without it.
    pub redis_addr: Option<String>,
    /// `host:port` of the RESP listener that redirects; `None` on a node without it.
    pub redis_cluster_addr: Option<String>,
    /// `host:port` of the HTTP admin API; `None` on a node without it.
    pub http_addr: Option<String>,
    /// Where it gossips.
    pub gossip_addr: SocketAddr,
    /// Custom entries, such as `zone`; at most [`MAX_METADATA_ENTRIES`].
    pub metadata: BTreeMap<String, String>,
}

/// Something that cannot be said by gossip. Correct the named value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Node ids count from 1.
    #[error("node id 0 is not valid: ids count from 1")]
    NodeIdZero,
    /// An address that others could not connect to.
    #[error("{field} {value}: {reason}")]
    Address {
        /// Which address.
        field: &'static str,
        /// The value, shortened.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The name of a metadata entry.
    #[error("metadata key {0}: 1 to {MAX_METADATA_KEY_BYTES} printable ASCII characters without space are allowed")]
    MetadataKey(String),
    /// The value of a metadata entry.
    #[error("metadata value of {0}: at most {MAX_VALUE_BYTES} printable ASCII characters are allowed")]
    MetadataValue(String),
    /// Too many metadata entries.
    #[error("more than {MAX_METADATA_ENTRIES} metadata entries")]
    TooManyMetadata,
}

/// A node's claim to lead a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaderClaim {
    /// The shard.
    pub shard: ShardId,
    /// The term in which the node leads it.
    pub term: Term,
    /// The placement epoch of the shard.
    pub epoch: Epoch,
}

/// What the keys of a foreign node amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParsedNode {
    /// Not all of them have arrived yet.
    Incomplete,
    /// They do not describe a node; says what is wrong.
    Malformed(&'static str),
    /// A node.
    Complete {
        /// What it says about itself. Boxed, because the other variants are small.
        meta: Box<NodeMeta>,
        /// Whether it has left.
        left: bool,
        /// Optional values that were ignored because they do not parse.
        ignored: u32,
    },
}

/// The keys with which a node introduces itself, in the order in which they must be set.
///
/// Errors: a value that peers would refuse to read.
pub fn encode_node(meta: &NodeMeta) -> Result<Vec<(String, String)>, KeyError> {
    if meta.node_id.0 == 0 {
        return Err(KeyError::NodeIdZero);
    }
    let mut pairs =
        vec![("n/id".to_owned(), meta.node_id.to_string()), ("n/inc".to_owned(), meta.incarnation.to_string())];
    let addrs = [
        ("n/raft", "raft address", Some(&meta.raft_addr)),
        ("n/redis", "redis address", meta.redis_addr.as_ref()),
        ("n/rc", "redis cluster address", meta.redis_cluster_addr.as_ref()),
        ("n/http", "http address", meta.http_addr.as_ref()),
    ];
    for (key, field, addr) in addrs {
        let Some(addr) = addr else { continue };
        check_addr(addr).map_err(|reason| KeyError::Address { field, value: shorten(addr), reason })?;
        pairs.push((key.to_owned(), addr.clone()));
    }
    if meta.metadata.len() > MAX_METADATA_ENTRIES {
        return Err(KeyError::TooManyMetadata);
    }
    for (name, value) in &meta.metadata {
        pairs.push(encode_metadata(name, value)?);
    }
    pairs.push((STATE_KEY.to_owned(), STATE_UP.to_owned()));
    Ok(pairs)
}

/// The key and value of one metadata entry.
///
/// Errors: a name or value that is too long or not printable ASCII.
pub fn encode_metadata(name: &str, value: &str) -> Result<(String, String), KeyError> {
    if !is_metadata_key(name) {
        return Err(KeyError::MetadataKey(shorten(name)));
    }
    if !is_value(value) {
        return Err(KeyError::MetadataValue(shorten(name)));
    }
    Ok((format!("{METADATA_PREFIX}{name}"), value.to_owned()))
}

/// The key and value of a claim; `None` if it is not one that peers would read: an unknown shard, or term 0, in which
/// nobody leads.
pub fn encode_claim(claim: LeaderClaim) -> Option<(String, String)> {
    let valid = is_shard(claim.shard) && claim.term.0 > 0;
    valid.then(|| (format!("{LEADER_PREFIX}{}", claim.shard), format!("{}:{}", claim.epoch, claim.term)))
}

/// Reads the keys of a foreign node. `name` is its chitchat name, which must equal its id. Pairs that are not about the
/// node itself are skipped, so that later versions may say more.
pub fn parse_node<'a>(
    name: &str,
    gossip_addr: SocketAddr,
    pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> ParsedNode {
    let (mut id, mut incarnation, mut raft, mut state) = (None, None, None, None);
    let (mut redis, mut redis_cluster, mut http) = (None, None, None);
    let mut metadata = BTreeMap::new();
    let mut ignored = 0;
    for (key, value) in pairs {
        match key {
            "n/id" => id = Some(value),
            "n/inc" => incarnation = Some(value),
            "n/raft" => raft = Some(value),
            "n/redis" => redis = Some(value),
            "n/rc" => redis_cluster = Some(value),
            "n/http" => http = Some(value),
            STATE_KEY => state = Some(value),
            _ => {
                let Some(name) = key.strip_prefix(METADATA_PREFIX) else {
                    continue;
                };
                if is_metadata_key(name) && is_value(value) && metadata.len() < MAX_METADATA_ENTRIES {
                    metadata.insert(name.to_owned(), value.to_owned());
                } else {
                    ignored += 1;
                }
            }
        }
    }
    let Some(state) = state else {
        return ParsedNode::Incomplete;
    };
    let Some(node_id) = id.and_then(parse_number).filter(|id| *id > 0) else {
        return ParsedNode::Malformed("node id");
    };
    if parse_number(name) != Some(node_id) {
        return ParsedNode::Malformed("node id and gossip name differ");
    }
    let Some(incarnation) = incarnation.and_then(parse_incarnation) else {
        return ParsedNode::Malformed("incarnation");
    };
    let Some(raft_addr) = raft.filter(|addr| check_addr(addr).is_ok()) else {
        return ParsedNode::Malformed("raft address");
    };
    let mut optional = |addr: Option<&str>| {
        let addr = addr?;
        if check_addr(addr).is_err() {
            ignored += 1;
            return None;
        }
        Some(addr.to_owned())
    };
    let (redis_addr, redis_cluster_addr, http_addr) = (optional(redis), optional(redis_cluster), optional(http));
    // A state that this build does not know belongs to a node that is there.
    if state != STATE_UP && state != STATE_LEFT {
        ignored += 1;
    }
    ParsedNode::Complete {
        meta: Box::new(NodeMeta {
            node_id: NodeId(node_id),
            incarnation,
            raft_addr: raft_addr.to_owned(),
            redis_addr,
            redis_cluster_addr,
            http_addr,
            gossip_addr,
            metadata,
        }),
        left: state == STATE_LEFT,
        ignored,
    }
}

/// Reads a claim: the key without its `l/`, and the value. `None` if it is not one.
pub fn parse_claim(shard: &str, value: &str) -> Option<LeaderClaim> {
    let shard = ShardId(u32::try_from(parse_number(shard)?).ok()?);
    let (epoch, term) = value.split_once(':')?;
    let (epoch, term) = (Epoch(parse_number(epoch)?), Term(parse_number(term)?));
    (is_shard(shard) && term.0 > 0).then_some(LeaderClaim { shard, term, epoch })
}

/// Whether the shard can exist: the meta group, or a data shard, of which there are at most as many as slots. Bounds what
/// foreign claims can make this node remember.
pub fn is_shard(shard: ShardId) -> bool {
    shard.is_meta() || shard.0 < u32::from(SLOT_COUNT)
}

/// Checks a `host:port` that others are to connect to: a DNS name, an IPv4 address or a bracketed IPv6 address, and a port.
///
/// Errors: what is wrong with it, for people.
pub fn check_addr(addr: &str) -> Result<(), &'static str> {
    if addr.len() > MAX_ADDR_BYTES {
        return Err("too long for host:port");
    }
    if let Ok(socket) = addr.parse::<SocketAddr>() {
        return match socket {
            _ if socket.port() == 0 => Err("port 0 cannot be connected to"),
            _ if socket.ip().is_unspecified() => {
                Err("the unspecified address cannot be connected to; name a reachable one")
            }
            _ => Ok(()),
        };
    }
    let Some((host, port)) = addr.rsplit_once(':') else {
        return Err("expected host:port");
    };
    match parse_number(port) {
        Some(1..=65_535) => {}
        _ => return Err("the port must be a number from 1 to 65535"),
    }
    let named = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    if !named {
        return Err("the host must be a DNS name, an IPv4 address or an IPv6 address in brackets");
    }
    // "1.2.3.400" would go to DNS and fail there, far from the mistake.
    let looks_like_v4 = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if looks_like_v4 && host.parse::<IpAddr>().is_err() {
        return Err("not an IPv4 address");
    }
    Ok(())
}

/// The canonical decimal form only, so that two keys never mean the same shard.
fn parse_number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let canonical = digits && (text == "0" || !text.starts_with('0'));
    canonical.then(|| text.parse().ok()).flatten()
}

fn parse_incarnation(text: &str) -> Option<Incarnation> {
    let hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'));
    hex.then(|| text.parse().ok()).flatten()
}

fn is_metadata_key(name: &str) -> bool {
    (1..=MAX_METADATA_KEY_BYTES).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic())
}

fn is_value(value: &str) -> bool {
    value.len() <= MAX_VALUE_BYTES && value.bytes().all(|b| b == b' ' || b.is_ascii_graphic())
}

/// A foreign text as it may stand in an error: quoted, escaped and short.
pub(crate) fn shorten(text: &str) -> String {
    const SHOWN_CHARS: usize = 64;
    let head: String = text.chars().take(SHOWN_CHARS).collect();
    let more = if head.len() < text.len() { "…" } else { "" };
    format!("{head:?}{more}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    fn gossip_addr() -> SocketAddr {
        "10.0.0.7:8001".parse().unwrap()
    }

    fn full() -> NodeMeta {
        NodeMeta {
            node_id: NodeId(7),
            incarnation: Incarnation(0x0123_4567_89ab_cdef),
            raft_addr: "node-7.crema:9001".into(),
            redis_addr: Some("10.0.0.7:6379".into()),
            redis_cluster_addr: Some("[fe80::1]:7379".into()),
            http_addr: Some("node_7:8080".into()),
            gossip_addr: gossip_addr(),
            metadata: BTreeMap::from([("zone".into(), "eu west 1".into()), ("rack".into(), String::new())]),
        }
    }

    fn parse(pairs: &[(String, String)]) -> ParsedNode {
        parse_node("7", gossip_addr(), pairs.iter().map(|(k, v)| (k.as_str(), v.as_str())))
    }

    #[test]
    fn a_node_round_trips() {
        let bare = NodeMeta {
            redis_addr: None,
            redis_cluster_addr: None,
            http_addr: None,
            metadata: BTreeMap::new(),
            ..full()
        };
        for meta in [full(), bare] {
            let mut pairs = encode_node(&meta).unwrap();
            let expected = |left| ParsedNode::Complete { meta: Box::new(meta.clone()), left, ignored: 0 };
            assert_eq!(parse(&pairs), expected(false));
            pairs.last_mut().unwrap().1 = STATE_LEFT.into();
            assert_eq!(parse(&pairs), expected(true));
        }
    }

    #[test]
    fn every_truncated_introduction_is_incomplete() {
        let pairs = encode_node(&full()).unwrap();
        for len in 0..pairs.len() {
            assert_eq!(parse(&pairs[..len]), ParsedNode::Incomplete, "{len} keys");
        }
    }

    #[test]
    fn own_values_are_validated() {
        let refused = |change: fn(&mut NodeMeta)| {
            let mut meta = full();
            change(&mut meta);
            encode_node(&meta).unwrap_err()
        };
        assert_eq!(refused(|m| m.node_id = NodeId(0)), KeyError::NodeIdZero);
        for bad in [
            "",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "host:+1",
            "0.0.0.0:1",
            "[::]:1",
            "::1:5",
            "ho st:1",
            "hé:1",
            "1.2.3.400:1",
            "h\n:1",
        ] {
            let mut meta = full();
            meta.raft_addr = bad.into();
            let error = encode_node(&meta).unwrap_err();
            assert!(matches!(error, KeyError::Address { field: "raft address", .. }), "{bad:?}: {error}");
        }
        assert!(matches!(refused(|m| m.http_addr = Some("x".into())), KeyError::Address { field: "http address", .. }));
        assert!(matches!(refused(|m| m.raft_addr = format!("{}:1", "a".repeat(300))), KeyError::Address { .. }));
        assert!(matches!(refused(|m| drop(m.metadata.insert("zöne".into(), "a".into()))), KeyError::MetadataKey(_)));
        assert!(matches!(refused(|m| drop(m.metadata.insert("é".into(), "a".into()))), KeyError::MetadataKey(_)));
        assert!(matches!(refused(|m| drop(m.metadata.insert(String::new(), "a".into()))), KeyError::MetadataKey(_)));
        assert!(matches!(refused(|m| drop(m.metadata.insert("a".into(), "é".into()))), KeyError::MetadataValue(_)));
        assert!(matches!(refused(|m| drop(m.metadata.insert("a".into(), "\n".into()))), KeyError::MetadataValue(_)));
        assert!(matches!(
            refused(|m| drop(m.metadata.insert("a".into(), "x".repeat(1025)))),
            KeyError::MetadataValue(_)
        ));
        assert_eq!(
            refused(|m| m.metadata = (0..33).map(|i| (format!("k{i}"), String::new())).collect()),
            KeyError::TooManyMetadata
        );
        assert!(encode_metadata("a", &"x".repeat(1024)).is_ok());
    }

    #[test]
    fn foreign_nonsense_is_ignored_and_counted() {
        let with = |key: &str, value: &str| {
            let mut pairs = encode_node(&full()).unwrap();
            pairs.retain(|(k, _)| k != key);
            pairs.push((key.into(), value.into()));
            parse(&pairs)
        };
        for (key, value) in [
            ("n/id", "0"),
            ("n/id", "07"),
            ("n/id", "+7"),
            ("n/id", "8"),
            ("n/raft", "0.0.0.0:1"),
            ("n/raft", ""),
            ("n/inc", "12"),
            ("n/inc", "+0000000000000000123456789abcdef"),
        ] {
            assert!(matches!(with(key, value), ParsedNode::Malformed(_)), "{key}={value}");
        }
        for (key, value) in [("n/redis", "x"), ("m/é", "x"), ("m/a", "\u{7f}"), ("st", "purple"), ("m/", "x")] {
            let ParsedNode::Complete { ignored, left, .. } = with(key, value) else { panic!("{key}={value}") };
            assert_eq!((ignored, left), (1, false), "{key}={value}");
        }
        // A later version may say more.
        assert!(matches!(with("n/new", "?"), ParsedNode::Complete { ignored: 0, .. }));
        let crowd: Vec<_> = (0..100).map(|i| (format!("m/x{i}"), "y".to_owned())).collect();
        let pairs = [encode_node(&full()).unwrap(), crowd].concat();
        let ParsedNode::Complete { meta, ignored, .. } = parse(&pairs) else { panic!() };
        assert_eq!((meta.metadata.len(), ignored), (MAX_METADATA_ENTRIES, 70));
    }

    #[test]
    fn claims_round_trip_and_only_in_canonical_form() {
        for shard in [0, 1, 16_383, ShardId::META.0] {
            let claim = LeaderClaim { shard: ShardId(shard), term: Term(u64::MAX), epoch: Epoch(0) };
            let (key, value) = encode_claim(claim).unwrap();
            assert_eq!(parse_claim(key.strip_prefix("l/").unwrap(), &value), Some(claim));
        }
        assert_eq!(encode_claim(LeaderClaim { shard: ShardId(16_384), term: Term(1), epoch: Epoch(1) }), None);
        assert_eq!(encode_claim(LeaderClaim { shard: ShardId(1), term: Term(0), epoch: Epoch(1) }), None);
        for (shard, value) in [
            ("16384", "1:1"),
            ("01", "1:1"),
            ("+1", "1:1"),
            ("", "1:1"),
            ("1", ""),
            ("1", ":"),
            ("1", "1:"),
            ("1", ":1"),
            ("1", "1:0"),
            ("1", "1:1:1"),
            ("1", "-1:1"),
            ("1", "1:18446744073709551616"),
            ("é", "é"),
        ] {
            assert_eq!(parse_claim(shard, value), None, "{shard} {value}");
        }
    }

    #[test]
    fn random_texts_never_panic() {
        let mut rng = Rng::from_clock();
        let alphabet: Vec<char> = "0123456789:.[]/abcnidmst é\u{1F600}\0-+".chars().collect();
        for _ in 0..20_000 {
            let mut text =
                || (0..rng.below(12)).map(|_| alphabet[rng.below(alphabet.len() as u64) as usize]).collect::<String>();
            let pairs = [("st", text()), ("n/id", text()), ("n/raft", text()), ("n/inc", text()), ("m/a", text())];
            let _ = parse_node(&text(), gossip_addr(), pairs.iter().map(|(k, v)| (*k, v.as_str())));
            let _ = parse_claim(&text(), &text());
            let _ = shorten(&text());
        }
    }
}
