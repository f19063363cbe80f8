//! Which connection of a stream may be read: the one with the highest number, once all lower ones have ended.

use super::Shared;
use super::wire::Reject;
use crate::clock;
use crema_core::{Incarnation, MonoTime, NodeId};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Most (node, incarnation, channel) whose connection numbers are remembered.
pub(super) const MAX_STREAMS: usize = 6144;
/// A stream without a connection is forgotten only after this: by then no older connection can still be on its way in,
/// because the accept loop hands every one on at once and a handshake ends within seconds.
pub(super) const STREAM_MEMORY: Duration = Duration::from_secs(60);

/// A stream of one peer's life.
pub(super) type StreamKey = (NodeId, Incarnation, u8);

/// Which connection of a stream may be read.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Allowed {
    /// The highest connection number that was seen.
    pub(super) highest: u64,
    /// Connections up to this number are closed for bad frames.
    pub(super) revoked: u64,
}

/// What is remembered of a stream.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) allowed: watch::Sender<Allowed>,
    /// Held by the connection that is read: there is never more than one.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
    /// Connections that hold a claim.
    pub(super) claims: usize,
    /// When the last claim ended.
    pub(super) idle_since: MonoTime,
}

/// A connection's place among those of its stream.
pub(super) struct Claim {
    pub(super) shared: Arc<Shared>,
    pub(super) key: StreamKey,
    pub(super) number: u64,
    pub(super) allowed: watch::Receiver<Allowed>,
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
}

impl Claim {
    /// Claims the stream for connection `number`, which ends all lower ones.
    pub(super) fn new(shared: &Arc<Shared>, key: StreamKey, number: u64) -> Result<Claim, Reject> {
        let mut streams = shared.streams();
        if !streams.contains_key(&key) && streams.len() >= MAX_STREAMS {
            let now = clock::mono();
            let oldest = streams
                .iter()
                .filter(|(_, s)| s.claims == 0 && now.since(s.idle_since) >= STREAM_MEMORY)
                .min_by_key(|(_, s)| s.idle_since)
                .map(|(k, _)| *k);
            streams.remove(&oldest.ok_or(Reject::Busy)?);
        }
        let stream = streams.entry(key).or_insert_with(|| Stream {
            allowed: watch::Sender::new(Allowed::default()),
            turn: Arc::default(),
            claims: 0,
            idle_since: MonoTime(0),
        });
        let newest = stream.allowed.send_if_modified(|a| {
            let higher = number > a.highest;
            a.highest = a.highest.max(number);
            higher
        });
        if !newest {
            return Err(Reject::Stale);
        }
        stream.claims += 1;
        let (allowed, turn) = (stream.allowed.subscribe(), stream.turn.clone());
        Ok(Claim { shared: shared.clone(), key, number, allowed, turn })
    }

    /// Waits until this connection may no longer be read.
    pub(super) async fn ended(&mut self) {
        let number = self.number;
        let _ = self.allowed.wait_for(|a| a.highest > number || a.revoked >= number).await;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(stream) = self.shared.streams().get_mut(&self.key) {
            stream.claims -= 1;
            stream.idle_since = clock::mono();
        }
    }
}
