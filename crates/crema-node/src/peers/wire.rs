//! The handshake, byte for byte.
//!
//! ```text
//!  dialer:    magic "CRMP" | version u16 | length u16 | Hello (postcard)    then frames (see `reader`)
//!  acceptor:  magic "CRMP" | version u16 | length u16 | Answer (postcard)   then one byte a pulse period
//! ```
//!
//! All integers are little-endian. The preamble is the same in every version, so that a node of another version can be
//! told why it is refused. Where the cluster has keys, `auth` comes first, and each of these messages follows its proof.

use super::auth::KEYED_MAGIC;
use super::claims::ConnNumber;
use bytes::BufMut;
use crema_core::{Incarnation, NodeId};
use crema_shard::Channel;
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// First bytes of every connection; anything else is not a peer.
pub(super) const MAGIC: [u8; 4] = *b"CRMP";
/// Version of the handshake and of the framing.
pub(super) const VERSION: u16 = 3;
/// Magic, version and length: the part of the handshake that all versions share.
pub(super) const PREAMBLE_BYTES: usize = 8;
/// Longest body of a handshake message.
pub(super) const MAX_HANDSHAKE_BYTES: usize = 640;
/// Longest cluster name in bytes.
pub const MAX_CLUSTER_NAME_BYTES: usize = 255;
/// Longest text of a rejection in bytes.
pub(super) const MAX_REASON_BYTES: usize = 200;

/// What a dialer says first.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello<'a> {
    pub(super) cluster: &'a str,
    pub(super) from: NodeId,
    pub(super) incarnation: Incarnation,
    pub(super) to: NodeId,
    pub(super) channel: u8,
    pub(super) number: ConnNumber,
    /// Where the dialer is reached itself, "host:port": whoever has not heard of it otherwise can answer it all the same.
    pub(super) addr: &'a str,
}

/// What the acceptor answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer<'a> {
    Welcome { node: NodeId, incarnation: Incarnation, boot: u64 },
    Reject { code: u8, text: &'a str },
}

/// Why an acceptor rejects. The codes are part of the protocol: appended only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Reject {
    Version = 1,
    Cluster = 2,
    Target = 3,
    OwnId = 4,
    Fenced = 5,
    Stale = 6,
    Busy = 7,
}

impl Reject {
    pub(super) fn from_code(code: u8) -> Option<Reject> {
        use Reject::*;
        [Version, Cluster, Target, OwnId, Fenced, Stale, Busy].into_iter().find(|r| *r as u8 == code)
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("timed out")]
    TimedOut,
    #[error("not a peer: {0}")]
    Garbage(&'static str),
    #[error("not of this cluster: {0}")]
    Keys(&'static str),
    #[error("speaks version {0} of the peer protocol, this node speaks {VERSION}")]
    Version(u16),
    #[error("rejected ({code:?}): {text:?}")]
    Rejected { code: Option<Reject>, text: String },
    #[error("the address belongs to node {0}")]
    WrongNode(NodeId),
    #[error("the streams reached different processes")]
    Torn,
    #[error("a later start of that life is connected")]
    EarlierBoot,
    #[error("too many lives are remembered")]
    Crowded,
    #[error("that life of the node is fenced")]
    FencedPeer,
    #[error("the connection ended at our own end")]
    OwnSocket,
    #[error("the name has no address")]
    NoAddress,
}

/// A handshake message with its preamble. Bounded by construction: names and texts are capped before they come here.
pub(super) fn handshake_bytes<T: Serialize>(body: &T) -> Vec<u8> {
    let body = postcard::to_stdvec(body).expect("derived serializers of plain data do not fail");
    debug_assert!(body.len() <= MAX_HANDSHAKE_BYTES);
    let mut out = Vec::with_capacity(PREAMBLE_BYTES + body.len());
    out.extend_from_slice(&MAGIC);
    out.put_u16_le(VERSION);
    out.put_u16_le(body.len() as u16);
    out.extend_from_slice(&body);
    out
}

/// Reads a handshake message of at most [`MAX_HANDSHAKE_BYTES`]; its time is limited by the caller.
pub(super) async fn read_handshake(stream: &mut TcpStream) -> Result<Vec<u8>, HandshakeError> {
    let mut magic = [0; 4];
    stream.read_exact(&mut magic).await?;
    // Four bytes tell a stranger: there is no need to wait for more of them.
    if magic == KEYED_MAGIC {
        return Err(HandshakeError::Keys("it has a cluster key, and this node has none"));
    }
    if magic != MAGIC {
        return Err(HandshakeError::Garbage("unknown magic"));
    }
    let version = stream.read_u16_le().await?;
    let len = usize::from(stream.read_u16_le().await?);
    if version != VERSION {
        return Err(HandshakeError::Version(version));
    }
    if len > MAX_HANDSHAKE_BYTES {
        return Err(HandshakeError::Garbage("overlong handshake"));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

pub(super) fn decode_handshake<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, HandshakeError> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        _ => Err(HandshakeError::Garbage("malformed handshake")),
    }
}

pub(super) fn channel_from_code(code: u8) -> Option<Channel> {
    Channel::ALL.into_iter().find(|c| *c as u8 == code)
}

/// `text` cut to at most `max` bytes at a character's edge.
pub(super) fn cut(text: &str, max: usize) -> &str {
    let mut at = max.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    &text[..at]
}

/// Runs `f` for at most `limit`.
pub(super) async fn within<T>(
    limit: Duration,
    f: impl Future<Output = Result<T, HandshakeError>>,
) -> Result<T, HandshakeError> {
    timeout(limit, f).await.unwrap_or(Err(HandshakeError::TimedOut))
}
