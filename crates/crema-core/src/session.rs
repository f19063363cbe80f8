//! Replicated sessions: exactly-once, in-order execution of retried writes (Ongaro 2014, section 6.3).
//!
//! ```text
//!   tag --no such session--> NoSession      seq <= low, or executed and its answer gone --> Unknown
//!       --answer kept--> that answer        seq follows the last executed one, or all between are <= low --> execute
//!       --otherwise--> Gap: an earlier write has not arrived yet
//! ```
//!
//! The table is part of the replicated state: it is changed by apply only and is the same on every replica.

use crate::ids::{Incarnation, LogIndex, Seq, SessionId};
use crate::limits::{MAX_SESSIONS, SESSION_REPLY_BYTES, SESSION_WINDOW};
use crate::reply::Reply;
use crate::slot::Slot;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// What a write carries so that its copies are executed once and a session's writes in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionTag {
    /// The session, as the entry that opened it was answered.
    pub session: SessionId,
    /// Position of this write in the session, from 1 on.
    pub seq: Seq,
    /// Every write at or below is finished for the gateway: it will never be sent again, its answer may be forgotten.
    pub low: Seq,
}

/// What to do with a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Execute it now; report its answer by [`Sessions::executed`].
    Execute,
    /// It was executed before; this was its answer.
    Again(Reply),
    /// Not now: an earlier write is missing.
    Gap,
    /// Finished, or executed and its answer not kept.
    Unknown,
    /// The session is absent.
    NoSession,
}

#[derive(Debug)]
struct Kept {
    seq: u64,
    /// First slot that the write touched: a move of slots takes the answer along.
    slot: Option<Slot>,
    /// `None`: executed, but the answer was too large to keep.
    reply: Option<Reply>,
    bytes: usize,
}

#[derive(Debug)]
struct Session {
    gateway: Incarnation,
    low: u64,
    last: u64,
    kept: VecDeque<Kept>,
    bytes: usize,
    used: LogIndex,
}

/// The sessions of one shard.
#[derive(Debug, Default)]
pub struct Sessions {
    by_id: BTreeMap<SessionId, Session>,
    by_gateway: BTreeMap<Incarnation, SessionId>,
    by_use: BTreeMap<(LogIndex, SessionId), ()>,
}

impl Sessions {
    /// Opens a session at the entry `index`, dropping the gateway's earlier one: its writes are never executed any more.
    /// Evicts the least recently used session beyond [`MAX_SESSIONS`].
    pub fn open(&mut self, gateway: Incarnation, index: LogIndex) -> SessionId {
        if let Some(old) = self.by_gateway.remove(&gateway) {
            self.drop_session(old);
        }
        while self.by_id.len() >= MAX_SESSIONS {
            let Some(((_, oldest), ())) = self.by_use.pop_first() else { break };
            self.drop_session(oldest);
        }
        let id = SessionId(index.0);
        let session = Session { gateway, low: 0, last: 0, kept: VecDeque::new(), bytes: 0, used: index };
        self.by_id.insert(id, session);
        self.by_gateway.insert(gateway, id);
        self.by_use.insert((index, id), ());
        id
    }

    fn drop_session(&mut self, id: SessionId) {
        if let Some(s) = self.by_id.remove(&id) {
            self.by_use.remove(&(s.used, id));
            if self.by_gateway.get(&s.gateway) == Some(&id) {
                self.by_gateway.remove(&s.gateway);
            }
        }
    }

    /// Judges a write that stands in the entry `index`.
    pub fn judge(&mut self, tag: SessionTag, index: LogIndex) -> Verdict {
        let Some(s) = self.by_id.get_mut(&tag.session) else { return Verdict::NoSession };
        if s.used != index {
            self.by_use.remove(&(s.used, tag.session));
            s.used = index;
            self.by_use.insert((index, tag.session), ());
        }
        s.low = s.low.max(tag.low.0);
        while s.kept.front().is_some_and(|k| k.seq <= s.low) {
            s.bytes -= s.kept.pop_front().map_or(0, |k| k.bytes);
        }
        let seq = tag.seq.0;
        if seq <= s.low {
            return Verdict::Unknown;
        }
        if seq <= s.last {
            return match s.kept.binary_search_by_key(&seq, |k| k.seq) {
                Ok(i) => s.kept[i].reply.clone().map_or(Verdict::Unknown, Verdict::Again),
                Err(_) => Verdict::Unknown,
            };
        }
        if seq == s.last.max(s.low) + 1 { Verdict::Execute } else { Verdict::Gap }
    }

    /// The write that was judged [`Verdict::Execute`] has been executed.
    pub fn executed(&mut self, tag: SessionTag, slot: Option<Slot>, reply: &Reply) {
        let Some(s) = self.by_id.get_mut(&tag.session) else { return };
        s.last = tag.seq.0;
        let size = reply_bytes(reply);
        let fits = s.bytes + size <= SESSION_REPLY_BYTES && s.kept.len() < SESSION_WINDOW;
        let bytes = if fits { size } else { 0 };
        s.bytes += bytes;
        s.kept.push_back(Kept { seq: tag.seq.0, slot, reply: fits.then(|| reply.clone()), bytes });
        // More than a window means a gateway that ignores it; the oldest answers go.
        while s.kept.len() > SESSION_WINDOW {
            s.bytes -= s.kept.pop_front().map_or(0, |k| k.bytes);
        }
    }

    /// Number of sessions.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// A digest of the table: every session's id, watermark and progress, and the slots of kept answers.
    pub fn digest(&self) -> u64 {
        self.by_id.iter().fold(0u64, |d, (id, s)| {
            let slots = s
                .kept
                .iter()
                .fold(0u64, |a, k| a.wrapping_mul(31).wrapping_add(k.slot.map_or(0, |s| u64::from(s.0) + 1)));
            let mut bytes = [0u8; 40];
            for (i, v) in [id.0, s.low, s.last, s.kept.len() as u64, slots].into_iter().enumerate() {
                bytes[i * 8..i * 8 + 8].copy_from_slice(&v.to_le_bytes());
            }
            d.wrapping_add(xxhash_rust::xxh3::xxh3_64(&bytes))
        })
    }
}

fn reply_bytes(reply: &Reply) -> usize {
    16 + match reply {
        Reply::Bulk(b) => b.len(),
        Reply::Scan { keys, .. } => keys.iter().map(|k| k.len() + 16).sum(),
        Reply::Array(items) => items.iter().map(reply_bytes).sum(),
        _ => 0,
    }
}
