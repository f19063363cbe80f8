//! Which connections of a peer's life may be read, and when.
//!
//! ```text
//!  Hello (boot, counter) -- claim a stream --> ended: all lower numbers of the stream, all of earlier boots
//!  Welcome (boot) --------- claim a link ----> ended: all of earlier boots
//!                                |
//!                                v  waits until those have ended, with all that they hand to the driver
//!                       the stream is read; the link is Up
//! ```
//!
//! A life (an incarnation) outlasts its process if its log is on disk. What an earlier process of it has sent may still be
//! on its way when the next one speaks, on this stream or on another; once the next was heard, in either direction,
//! nothing of the earlier one is read any more.

use super::wire::Reject;
use super::{MAX_PEERS, Shared};
use crate::clock;
use crema_core::{Incarnation, MonoTime, NodeId};
use crema_shard::Channel;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Most lives whose connection numbers are remembered on account of those who connect; those that are dialed have room
/// for [`MAX_PEERS`] more.
pub(super) const MAX_LIVES: usize = 2048;
/// A life without a connection is forgotten only after this: by then no older connection can still be on its way in,
/// because the accept loop hands every one on at once and a handshake ends within seconds.
pub(super) const LIFE_MEMORY: Duration = Duration::from_secs(60);

/// One life of a node.
pub(super) type LifeKey = (NodeId, Incarnation);

/// Number of a connection; never used twice within a life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct ConnNumber {
    /// Which start of the life: [`super::PeersConfig::boot`].
    pub(super) boot: u64,
    /// Counts from 1 within a process.
    pub(super) counter: u64,
}

/// What is remembered of a life.
#[derive(Debug)]
pub(super) struct Life {
    state: watch::Sender<LifeState>,
    /// When the last claim ended.
    pub(super) idle_since: MonoTime,
}

#[derive(Debug, Default)]
struct LifeState {
    /// The latest boot that was heard of.
    boot: u64,
    /// By channel: the highest connection number that was seen.
    highest: [ConnNumber; Channel::ALL.len()],
    /// By channel: connections up to this number are closed for bad frames.
    revoked: [ConnNumber; Channel::ALL.len()],
    /// Claims that have not been dropped, whether they may still be used or not.
    held: Vec<Held>,
}

impl LifeState {
    fn has_ended(&self, Held { stream, number }: Held) -> bool {
        let overtaken = |c: usize| self.highest[c] > number || self.revoked[c] >= number;
        self.boot > number.boot || stream.is_some_and(|c| overtaken(c as usize))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    /// An incoming stream; `None`: the link to the life.
    stream: Option<Channel>,
    number: ConnNumber,
}

impl Held {
    /// Whether the other has to be gone before this one begins.
    fn ends(&self, other: &Held) -> bool {
        let of_the_same_stream = self.stream.is_some() && self.stream == other.stream;
        other.number.boot < self.number.boot || (of_the_same_stream && other.number < self.number)
    }
}

/// A connection's place among those of its life. To be dropped when nothing more of it will reach the driver.
#[derive(Debug)]
pub(super) struct Claim {
    shared: Arc<Shared>,
    life: LifeKey,
    held: Held,
    state: watch::Receiver<LifeState>,
}

impl Claim {
    /// Claims a stream for an incoming connection.
    pub(super) fn stream(
        shared: &Arc<Shared>,
        life: LifeKey,
        channel: Channel,
        number: ConnNumber,
    ) -> Result<Claim, Reject> {
        Claim::new(shared, life, Held { stream: Some(channel), number })
    }

    /// Claims the link to a process that has answered.
    pub(super) fn link(shared: &Arc<Shared>, life: LifeKey, boot: u64) -> Result<Claim, Reject> {
        Claim::new(shared, life, Held { stream: None, number: ConnNumber { boot, counter: 0 } })
    }

    fn new(shared: &Arc<Shared>, life: LifeKey, held: Held) -> Result<Claim, Reject> {
        let mut lives = shared.lives();
        let most = MAX_LIVES + if held.stream.is_none() { MAX_PEERS } else { 0 };
        if !lives.contains_key(&life) && lives.len() >= most {
            let now = clock::mono();
            let oldest = lives
                .iter()
                .filter(|(_, l)| l.state.borrow().held.is_empty() && now.since(l.idle_since) >= LIFE_MEMORY)
                .min_by_key(|(_, l)| l.idle_since)
                .map(|(k, _)| *k);
            lives.remove(&oldest.ok_or(Reject::Busy)?);
        }
        let entry =
            lives.entry(life).or_insert_with(|| Life { state: watch::Sender::default(), idle_since: MonoTime(0) });
        let Held { stream, number } = held;
        let newest = entry.state.send_if_modified(|s| {
            let newest = number.boot >= s.boot && stream.is_none_or(|c| number > s.highest[c as usize]);
            if newest {
                s.boot = number.boot;
                if let Some(channel) = stream {
                    s.highest[channel as usize] = number;
                }
                s.held.push(held);
            }
            newest
        });
        if !newest {
            return Err(Reject::Stale);
        }
        Ok(Claim { shared: shared.clone(), life, held, state: entry.state.subscribe() })
    }

    /// The life.
    pub(super) fn life(&self) -> LifeKey {
        self.life
    }

    /// The connection's number; a link's has no counter.
    pub(super) fn number(&self) -> ConnNumber {
        self.held.number
    }

    /// Waits until this connection may no longer be read, or this link no longer be used.
    pub(super) async fn ended(&mut self) {
        let held = self.held;
        let _ = self.state.wait_for(|s| s.has_ended(held)).await;
    }

    /// Waits until all that this claim has ended is gone; false if it was itself ended meanwhile.
    pub(super) async fn wait_alone(&mut self) -> bool {
        let held = self.held;
        let _ = self.state.wait_for(|s| s.has_ended(held) || !s.held.iter().any(|h| held.ends(h))).await;
        !self.state.borrow().has_ended(held)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(life) = self.shared.lives().get_mut(&self.life) {
            life.idle_since = clock::mono();
            life.state.send_modify(|s| {
                if let Some(at) = s.held.iter().position(|h| *h == self.held) {
                    s.held.swap_remove(at);
                }
            });
        }
    }
}

/// Ends the connection that may be read; the next higher one may.
pub(super) fn revoke(lives: &HashMap<LifeKey, Life>, life: LifeKey, channel: Channel) {
    if let Some(life) = lives.get(&life) {
        life.state.send_modify(|s| s.revoked[channel as usize] = s.highest[channel as usize]);
    }
}
