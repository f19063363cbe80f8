//! Replicated sessions: exactly-once, in-order execution of retried writes (Ongaro 2014, section 6.3).
//!
//! ```text
//!   tag --no such session--> NoSession      seq <= low, or executed and its answer gone --> Unknown
//!       --answer kept--> that answer        seq follows the last executed one, or all between are <= low --> execute
//!       --otherwise--> Gap: an earlier write has not arrived yet
//! ```
//!
//! The table is part of the replicated state: it is changed by apply only and is the same on every replica.

use crate::codec::{decode_outcome, encode_outcome, put, put_bytes, take};
use crate::ids::{Incarnation, LogIndex, Seq, SessionId};
use crate::limits::{MAX_SESSIONS, SESSION_REPLY_BYTES, SESSION_WINDOW};
use crate::mutant::{Mutant, planted};
use crate::reply::{Outcome, Reply};
use crate::slot::Slot;
use bytes::Bytes;
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
    reply: Reply,
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
        if seq <= s.last && planted(Mutant::NoDedup) {
            return Verdict::Execute;
        }
        if seq <= s.last {
            return match s.kept.binary_search_by_key(&seq, |k| k.seq) {
                Ok(i) => Verdict::Again(s.kept[i].reply.clone()),
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
        // What does not fit is not kept: `last` alone remembers that it was executed. Answers kept earlier stay, since
        // only a gateway that ignores its window can have more of them than there is room for.
        if s.bytes + size <= SESSION_REPLY_BYTES && s.kept.len() < SESSION_WINDOW {
            s.bytes += size;
            s.kept.push_back(Kept { seq: tag.seq.0, slot, reply: reply.clone(), bytes: size });
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

impl Sessions {
    /// Every session whole, kept replies included, each as bytes of its own; at most some 80 KiB each.
    pub(crate) fn encode(&self) -> impl Iterator<Item = Vec<u8>> {
        self.by_id.iter().map(|(id, s)| {
            let mut out = Vec::with_capacity(64 + s.bytes + s.kept.len() * 8);
            put(&mut out, &(id, s.gateway, s.low, s.last, s.used, s.kept.len() as u64));
            let mut reply = Vec::new();
            for k in &s.kept {
                put(&mut out, &(k.seq, k.slot));
                reply.clear();
                encode_outcome(&Outcome::Reply(k.reply.clone()), &mut reply);
                put_bytes(&mut out, &reply);
            }
            out
        })
    }

    /// Adds a session that [`Sessions::encode`] wrote. `None`, and nothing is added, for bytes that are none, or one that
    /// cannot stand beside those that are there.
    pub(crate) fn restore(&mut self, mut bytes: &[u8]) -> Option<()> {
        type Head = (SessionId, Incarnation, u64, u64, LogIndex, u64);
        let (id, gateway, low, last, used, count): Head = take(&mut bytes).ok()?;
        if self.by_id.len() >= MAX_SESSIONS
            || self.by_id.contains_key(&id)
            || self.by_gateway.contains_key(&gateway)
            || count > SESSION_WINDOW as u64
            || used.0 < id.0
        {
            return None;
        }
        let mut s = Session { gateway, low, last, kept: VecDeque::new(), bytes: 0, used };
        for _ in 0..count {
            let (seq, slot): (u64, Option<Slot>) = take(&mut bytes).ok()?;
            // A copy of its own: the reply's slices must not keep the whole snapshot in memory.
            let encoded = Bytes::copy_from_slice(take(&mut bytes).ok()?);
            let (Outcome::Reply(reply), taken) = decode_outcome(&encoded).ok()? else { return None };
            let size = reply_bytes(&reply);
            let after = s.kept.back().map_or(low, |k| k.seq);
            if taken != encoded.len() || seq <= after || seq > last || s.bytes + size > SESSION_REPLY_BYTES {
                return None;
            }
            s.bytes += size;
            s.kept.push_back(Kept { seq, slot, reply, bytes: size });
        }
        if !bytes.is_empty() {
            return None;
        }
        self.by_id.insert(id, s);
        self.by_gateway.insert(gateway, id);
        self.by_use.insert((used, id), ());
        Some(())
    }
}

/// Accounted bytes of a kept reply. Constants, not sizes of types: what is kept must not depend on the build.
fn reply_bytes(reply: &Reply) -> usize {
    16 + match reply {
        Reply::Bulk(b) => b.len(),
        Reply::Scan { keys, .. } => keys.iter().map(|k| k.len() + 16).sum(),
        Reply::Array(items) => items.iter().map(reply_bytes).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Incarnation = Incarnation(7);

    fn tag(session: SessionId, seq: u64, low: u64) -> SessionTag {
        SessionTag { session, seq: Seq(seq), low: Seq(low) }
    }

    struct Rig {
        s: Sessions,
        id: SessionId,
        index: u64,
    }

    impl Rig {
        fn new() -> Self {
            let mut s = Sessions::default();
            let id = s.open(G, LogIndex(10));
            Rig { s, id, index: 10 }
        }
        fn judge(&mut self, seq: u64, low: u64) -> Verdict {
            self.index += 1;
            self.s.judge(tag(self.id, seq, low), LogIndex(self.index))
        }
        /// Executes the write with its number as the answer.
        fn execute(&mut self, seq: u64, low: u64) {
            assert_eq!(self.judge(seq, low), Verdict::Execute, "write {seq}");
            self.s.executed(tag(self.id, seq, low), Some(Slot(3)), &Reply::Int(seq as i64));
        }
    }

    #[test]
    fn writes_execute_once_and_in_order() {
        let mut r = Rig::new();
        assert_eq!(r.id, SessionId(10));
        assert_eq!(r.judge(0, 0), Verdict::Unknown, "numbers begin at 1");
        assert_eq!(r.judge(2, 0), Verdict::Gap, "the first is missing");
        r.execute(1, 0);
        r.execute(2, 0);
        assert_eq!(r.judge(1, 0), Verdict::Again(Reply::Int(1)));
        assert_eq!(r.judge(2, 0), Verdict::Again(Reply::Int(2)));
        assert_eq!(r.judge(4, 0), Verdict::Gap);
        r.execute(3, 0);
        r.execute(4, 0);
    }

    #[test]
    fn the_low_watermark_forgets_skips_and_never_sinks() {
        let mut r = Rig::new();
        (1..=3).for_each(|seq| r.execute(seq, 0));
        assert_eq!(r.judge(3, 2), Verdict::Again(Reply::Int(3)));
        assert_eq!(r.judge(2, 0), Verdict::Unknown, "finished, though this copy does not know it");
        // 4 and 5 were given up by the gateway: 6 follows 3.
        assert_eq!(r.judge(6, 4), Verdict::Gap, "5 may still come");
        r.execute(6, 5);
        assert_eq!(r.judge(5, 0), Verdict::Unknown);
        assert_eq!(r.judge(3, 0), Verdict::Unknown, "at or below the watermark");
        r.execute(7, 0);
    }

    #[test]
    fn a_low_watermark_counts_even_with_a_gap() {
        let mut r = Rig::new();
        r.execute(1, 0);
        assert_eq!(r.judge(9, 1), Verdict::Gap);
        assert_eq!(r.judge(1, 0), Verdict::Unknown);
    }

    #[test]
    fn numbers_at_their_end_do_not_overflow() {
        let mut r = Rig::new();
        r.execute(u64::MAX, u64::MAX - 1);
        assert_eq!(r.judge(u64::MAX, 0), Verdict::Again(Reply::Int(-1)));
        assert_eq!(r.judge(u64::MAX, u64::MAX), Verdict::Unknown);
    }

    #[test]
    fn what_does_not_fit_was_executed_but_is_not_remembered() {
        let mut r = Rig::new();
        assert_eq!(r.judge(1, 0), Verdict::Execute);
        let large = Reply::Bulk(Bytes::from(vec![0; SESSION_REPLY_BYTES]));
        r.s.executed(tag(r.id, 1, 0), None, &large);
        assert_eq!(r.judge(1, 0), Verdict::Unknown, "never executed again");
        r.execute(2, 0);
        assert_eq!(r.judge(2, 0), Verdict::Again(Reply::Int(2)), "a small one still fits");
        // A full budget is free again once the gateway has finished.
        let half = Reply::Bulk(Bytes::from(vec![0; SESSION_REPLY_BYTES / 2]));
        for seq in 3..=4 {
            assert_eq!(r.judge(seq, 0), Verdict::Execute);
            r.s.executed(tag(r.id, seq, 0), None, &half);
        }
        assert_eq!(r.judge(3, 0), Verdict::Again(half.clone()));
        assert_eq!(r.judge(4, 0), Verdict::Unknown, "both together are too much");
        assert_eq!(r.judge(5, 3), Verdict::Execute);
        r.s.executed(tag(r.id, 5, 3), None, &half);
        assert_eq!(r.judge(5, 3), Verdict::Again(half));
    }

    #[test]
    fn a_whole_window_is_kept_and_no_more() {
        let mut r = Rig::new();
        let window = SESSION_WINDOW as u64;
        (1..=window + 1).for_each(|seq| r.execute(seq, 0));
        assert_eq!(r.judge(1, 0), Verdict::Again(Reply::Int(1)));
        assert_eq!(r.judge(window, 0), Verdict::Again(Reply::Int(window as i64)));
        assert_eq!(r.judge(window + 1, 0), Verdict::Unknown, "beyond the window");
    }

    #[test]
    fn opening_again_replaces_the_gateways_session_only() {
        let mut r = Rig::new();
        r.execute(1, 0);
        let other = r.s.open(Incarnation(8), LogIndex(50));
        let new = r.s.open(G, LogIndex(51));
        assert_eq!((new, r.s.len()), (SessionId(51), 2));
        assert_eq!(r.judge(1, 0), Verdict::NoSession);
        assert_eq!(r.judge(2, 0), Verdict::NoSession);
        assert_eq!(r.s.judge(tag(new, 1, 0), LogIndex(60)), Verdict::Execute);
        assert_eq!(r.s.judge(tag(other, 1, 0), LogIndex(60)), Verdict::Execute);
    }

    #[test]
    fn the_least_recently_used_session_goes() {
        let mut s = Sessions::default();
        let count = MAX_SESSIONS as u64;
        for i in 1..=count {
            s.open(Incarnation(u128::from(i)), LogIndex(i));
        }
        // The first is used, by a write that is not even executed; the second is now the oldest.
        assert_eq!(s.judge(tag(SessionId(1), 5, 0), LogIndex(count + 1)), Verdict::Gap);
        s.open(Incarnation(0), LogIndex(count + 2));
        assert_eq!(s.len(), MAX_SESSIONS);
        assert_eq!(s.judge(tag(SessionId(2), 1, 0), LogIndex(count + 3)), Verdict::NoSession);
        assert_eq!(s.judge(tag(SessionId(1), 1, 0), LogIndex(count + 3)), Verdict::Execute);
        // Of sessions used by the same entry, the oldest.
        for i in (3..=count).rev() {
            s.judge(tag(SessionId(i), 1, 0), LogIndex(count + 4));
        }
        s.judge(tag(SessionId(1), 1, 0), LogIndex(count + 5));
        s.judge(tag(SessionId(count + 2), 1, 0), LogIndex(count + 5));
        s.open(Incarnation(u128::MAX), LogIndex(count + 6));
        assert_eq!(s.judge(tag(SessionId(3), 1, 0), LogIndex(count + 7)), Verdict::NoSession);
        assert_eq!(s.judge(tag(SessionId(4), 1, 0), LogIndex(count + 7)), Verdict::Execute);
    }

    #[test]
    fn the_digest_tells_progress_apart() {
        let mut r = Rig::new();
        let mut seen = vec![Sessions::default().digest(), r.s.digest()];
        r.execute(1, 0);
        seen.push(r.s.digest());
        r.execute(2, 1);
        seen.push(r.s.digest());
        assert!((1..seen.len()).all(|i| !seen[..i].contains(&seen[i])), "{seen:?}");
    }
}
