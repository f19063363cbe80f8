//! One shard's state: what applying a log entry does to it, and what reading it answers.
//!
//! ```text
//!   entry --> log time = max(last, stamp) --> each request: session verdict --> execute its operations in order --> outcome
//! ```
//!
//! `apply` is synchronous, total and pure: the same entries make the same state and the same outcomes on every replica.
//! Whatever depends on state (conditions, types, slots) is decided here and nowhere else.

use crate::codec::{EntryBody, OpsRef, decode_entry};
use crate::error::{CorruptEntry, OpError};
use crate::glob::glob_match;
use crate::ids::{Epoch, LogIndex};
use crate::key::KeyRef;
use crate::limits;
use crate::op::{ExpireAt, ExpireCond, Op, SetCond, SetExpire};
use crate::reply::{Outcome, Reply, ValueType};
use crate::session::{Sessions, Verdict};
use crate::slot::SlotRange;
use crate::store::Table;
use crate::time::LogTime;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;

/// A digest is recorded each time the applied index passes a multiple of this.
const DIGEST_EVERY: u64 = 1024;
/// Recorded digests that are kept for comparison.
const DIGESTS_KEPT: usize = 8;
/// Latest expiry: far beyond any clock, and well below overflow.
const MAX_EXPIRY: u64 = i64::MAX as u64 / 2;

/// What a shard begins with.
#[derive(Clone, Copy, Debug)]
pub struct ShardInit {
    /// The slots it owns.
    pub range: SlotRange,
    /// Placement epoch in which it got them.
    pub epoch: Epoch,
    /// The cluster's founding secret: seed of the key hash.
    pub secret: u64,
    /// Where log time begins.
    pub log_time: LogTime,
    /// Index of the founding state.
    pub applied: LogIndex,
}

/// Result of applying one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// One outcome a request, in order.
    pub outcomes: Vec<Outcome>,
    /// Index at which this replica's digest differs from the leader's: stop the line.
    pub digest_mismatch: Option<LogIndex>,
}

/// Result of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadResult {
    /// The answer.
    Reply(Reply),
    /// A key's expiry lies between log time and the leader's estimate: commit an `Advance` first, so that the key is
    /// expired for whoever leads next too.
    NeedsAdvance,
}

/// The state of one shard.
#[derive(Debug)]
pub struct StateMachine {
    init: ShardInit,
    table: Arc<Table>,
    sessions: Sessions,
    log_time: LogTime,
    applied: LogIndex,
    digests: VecDeque<(LogIndex, u64)>,
    checked: LogIndex,
}

/// A value that is alive at a point of log time.
struct Alive {
    value: Bytes,
    expire_at: u64,
}

impl StateMachine {
    /// The founding state: no keys, no sessions.
    pub fn new(init: ShardInit) -> Self {
        StateMachine {
            init,
            table: Arc::new(Table::new(init.range, init.secret)),
            sessions: Sessions::default(),
            log_time: init.log_time,
            applied: init.applied,
            digests: VecDeque::new(),
            checked: LogIndex(0),
        }
    }

    /// Applies the committed entry at `index`, which must be the successor of the last one. An empty payload (Raft's own
    /// no-op) only moves `applied`. An error means that the replica must stop: its state may differ from the others'.
    pub fn apply(&mut self, index: LogIndex, payload: &[u8]) -> Result<Applied, CorruptEntry> {
        let corrupt = |reason: String| CorruptEntry { index: index.0, reason };
        if index.0 != self.applied.0 + 1 {
            return Err(corrupt(format!("it does not follow entry {}", self.applied)));
        }
        let mut result = Applied::default();
        if !payload.is_empty() {
            let entry = decode_entry(payload).map_err(|e| corrupt(e.to_string()))?;
            self.log_time = self.log_time.max(entry.stamp);
            match entry.body {
                EntryBody::Batch(requests) => {
                    for request in requests {
                        let (tag, ops) = request.map_err(|e| corrupt(e.to_string()))?;
                        let outcome = match self.sessions.judge(tag, index) {
                            Verdict::Execute => {
                                let reply = self.execute(ops, entry.wall_offset);
                                let slot = ops.iter().next().and_then(|op| op.key()).map(|k| k.slot);
                                self.sessions.executed(tag, slot, &reply);
                                Outcome::Reply(reply)
                            }
                            Verdict::Again(reply) => Outcome::Reply(reply),
                            Verdict::Gap => Outcome::Gap,
                            Verdict::Unknown => Outcome::Unknown,
                            Verdict::NoSession => Outcome::NoSession,
                        };
                        result.outcomes.push(outcome);
                    }
                }
                EntryBody::OpenSession { gateway } => {
                    let id = self.sessions.open(gateway, index);
                    result.outcomes.push(Outcome::Reply(Reply::Int(id.0 as i64)));
                }
                EntryBody::Advance => {}
                EntryBody::CheckDigest { index: at, digest } => {
                    self.checked = self.checked.max(at);
                    let own = self.digests.iter().find(|(i, _)| *i == at);
                    if own.is_some_and(|(_, d)| *d != digest) {
                        result.digest_mismatch = Some(at);
                    }
                }
            }
        }
        self.applied = index;
        if index.0.is_multiple_of(DIGEST_EVERY) {
            if self.digests.len() >= DIGESTS_KEPT {
                self.digests.pop_front();
            }
            let digest = self.digest();
            self.digests.push_back((index, digest));
        }
        Ok(result)
    }

    /// Answers read-only operations from the applied state. `estimate` is the leader's log time now.
    pub fn read(&self, ops: &[u8], estimate: LogTime) -> ReadResult {
        let Ok(ops) = OpsRef::parse(ops) else {
            debug_assert!(false, "reads are checked before they are taken");
            return ReadResult::Reply(Reply::Error(OpError::InvalidExpire));
        };
        let now = self.log_time.max(estimate);
        for op in ops.iter() {
            if let Some(key) = op.key().filter(|k| self.init.range.contains(k.slot)) {
                let expire_at = self.table.get(key, |e| e.map_or(0, |e| e.expire_at));
                if expire_at > self.log_time.0 && expire_at <= now.0 {
                    return ReadResult::NeedsAdvance;
                }
            }
        }
        ReadResult::Reply(self.each(ops, |op| self.observe(op, now)))
    }

    fn each<'a>(&self, ops: OpsRef<'a>, mut f: impl FnMut(&Op<'a>) -> Reply) -> Reply {
        if ops.iter().any(|op| op.key().is_some_and(|k| !self.init.range.contains(k.slot))) {
            return Reply::Error(OpError::WrongSlot { epoch: self.init.epoch });
        }
        if ops.len() == 1 {
            return ops.iter().next().map_or(Reply::Nil, |op| f(&op));
        }
        Reply::Array(ops.iter().map(|op| f(&op)).collect())
    }

    fn execute(&mut self, ops: OpsRef<'_>, wall_offset: i64) -> Reply {
        // A request that names a foreign slot does nothing at all.
        if ops.iter().any(|op| op.key().is_some_and(|k| !self.init.range.contains(k.slot))) {
            return Reply::Error(OpError::WrongSlot { epoch: self.init.epoch });
        }
        let one = |me: &mut Self, op: &Op<'_>| {
            if op.is_write() { me.change(op, wall_offset) } else { me.observe(op, me.log_time) }
        };
        if ops.len() == 1 {
            return ops.iter().next().map_or(Reply::Nil, |op| one(self, &op));
        }
        let mut replies = Vec::with_capacity(ops.len());
        for op in ops.iter() {
            replies.push(one(self, &op));
        }
        Reply::Array(replies)
    }

    fn alive(&self, key: KeyRef<'_>, now: LogTime) -> Option<Alive> {
        self.table.get(key, |e| {
            e.filter(|e| e.expire_at == 0 || e.expire_at > now.0)
                .map(|e| Alive { value: Bytes::copy_from_slice(e.value), expire_at: e.expire_at })
        })
    }

    fn expiry_of(&self, key: KeyRef<'_>, now: LogTime) -> Option<u64> {
        self.table.get(key, |e| e.filter(|e| e.expire_at == 0 || e.expire_at > now.0).map(|e| e.expire_at))
    }

    /// Read-only operations at `now`.
    fn observe(&self, op: &Op<'_>, now: LogTime) -> Reply {
        match *op {
            Op::Get { key } => self.alive(key, now).map_or(Reply::Nil, |a| Reply::Bulk(a.value)),
            Op::Exists { key } => Reply::Int(i64::from(self.expiry_of(key, now).is_some())),
            Op::Strlen { key } => {
                let len = self
                    .table
                    .get(key, |e| e.filter(|e| e.expire_at == 0 || e.expire_at > now.0).map_or(0, |e| e.value.len()));
                Reply::Int(len as i64)
            }
            Op::Pttl { key } => Reply::Int(match self.expiry_of(key, now) {
                None => -2,
                Some(0) => -1,
                Some(at) => (at - now.0) as i64,
            }),
            Op::Type { key } => {
                let there = self.expiry_of(key, now).is_some();
                Reply::Type(if there { ValueType::String } else { ValueType::None })
            }
            Op::DbSize { db } => Reply::Int(self.table.len(db) as i64),
            Op::Scan { db, cursor, count, pattern } => {
                let wanted = |key: &[u8]| pattern.is_none_or(|p| glob_match(p, key));
                let step = self.table.scan(db, cursor, count, now.0, wanted);
                Reply::Scan { next: step.next, keys: step.keys }
            }
            _ => {
                debug_assert!(false, "a write among reads");
                Reply::Nil
            }
        }
    }

    /// Log time at which a value set now expires. `Err` if that is beyond all time; a past point comes out as is.
    fn expiry(&self, expire: SetExpire, old: u64, wall_offset: i64) -> Result<u64, OpError> {
        let at = match expire {
            SetExpire::Clear => return Ok(0),
            SetExpire::Keep => return Ok(old),
            SetExpire::After(ms) => self.log_time.0.checked_add(ms).ok_or(OpError::InvalidExpire)?,
            // Wall time minus the leader's offset is log time.
            SetExpire::At(wall) => {
                i64::try_from(wall.0).map_err(|_| OpError::InvalidExpire)?.saturating_sub(wall_offset).max(1) as u64
            }
        };
        if at > MAX_EXPIRY { Err(OpError::InvalidExpire) } else { Ok(at.max(1)) }
    }

    /// Writing operations at log time.
    fn change(&mut self, op: &Op<'_>, wall_offset: i64) -> Reply {
        match self.try_change(op, wall_offset) {
            Ok(reply) => reply,
            Err(e) => Reply::Error(e),
        }
    }

    fn try_change(&mut self, op: &Op<'_>, wall_offset: i64) -> Result<Reply, OpError> {
        let now = self.log_time;
        let bulk = |a: &Option<Alive>| a.as_ref().map_or(Reply::Nil, |a| Reply::Bulk(a.value.clone()));
        Ok(match *op {
            Op::Set { key, value, cond, expire, get } => {
                let before = if get { self.alive(key, now) } else { None };
                let expiry = if get { before.as_ref().map(|b| b.expire_at) } else { self.expiry_of(key, now) };
                let allowed = match cond {
                    SetCond::Always => true,
                    SetCond::IfAbsent => expiry.is_none(),
                    SetCond::IfPresent => expiry.is_some(),
                };
                if allowed {
                    let at = self.expiry(expire, expiry.unwrap_or(0), wall_offset)?;
                    self.write(key, [value, &[]], at);
                }
                match (get, allowed) {
                    (true, _) => bulk(&before),
                    (false, true) => Reply::Ok,
                    (false, false) => Reply::Nil,
                }
            }
            Op::GetEx { key, expire } => {
                let before = self.alive(key, now);
                if let Some(b) = &before {
                    let at = self.expiry(expire, b.expire_at, wall_offset)?;
                    self.set_expiry(key, at);
                }
                bulk(&before)
            }
            Op::GetDel { key } => {
                let before = self.alive(key, now);
                self.table.delete(key);
                bulk(&before)
            }
            Op::Del { key } => {
                let there = self.expiry_of(key, now).is_some();
                self.table.delete(key);
                Reply::Int(i64::from(there))
            }
            Op::IncrBy { key, by } => {
                let before = self.alive(key, now);
                let old = before.as_ref().map_or(Ok(0), |b| parse_integer(&b.value).ok_or(OpError::NotInteger))?;
                let new = old.checked_add(by).ok_or(OpError::Overflow)?;
                self.write(key, [new.to_string().as_bytes(), &[]], before.map_or(0, |b| b.expire_at));
                Reply::Int(new)
            }
            Op::IncrByFloat { key, by } => {
                let before = self.alive(key, now);
                let old = before.as_ref().map_or(Ok(0.0), |b| parse_float(&b.value).ok_or(OpError::NotFloat))?;
                let new = old + by.get();
                if !new.is_finite() {
                    return Err(OpError::NotFinite);
                }
                let text = format_float(new);
                self.write(key, [text.as_bytes(), &[]], before.map_or(0, |b| b.expire_at));
                Reply::Bulk(text.into())
            }
            Op::Append { key, value } => {
                let before = self.alive(key, now);
                let (old, at) = before.as_ref().map_or((&[][..], 0), |b| (&b.value[..], b.expire_at));
                let len = old.len() + value.len();
                if len > limits::MAX_VALUE_BYTES {
                    return Err(OpError::TooLong);
                }
                if !value.is_empty() || before.is_none() {
                    self.write(key, [old, value], at);
                }
                Reply::Int(len as i64)
            }
            Op::Expire { key, at, cond } => {
                let Some(old) = self.expiry_of(key, now) else { return Ok(Reply::Int(0)) };
                let at = match at {
                    ExpireAt::After(ms) => i64::try_from(now.0).ok().and_then(|n| n.checked_add(ms)),
                    ExpireAt::At(wall) => wall.checked_sub(wall_offset),
                };
                let at = at.filter(|at| *at <= MAX_EXPIRY as i64).ok_or(OpError::InvalidExpire)?;
                let never = old == 0;
                let allowed = match cond {
                    ExpireCond::Always => true,
                    ExpireCond::IfNone => never,
                    ExpireCond::IfSome => !never,
                    ExpireCond::IfGreater => !never && at > old as i64,
                    ExpireCond::IfLess => never || at < old as i64,
                };
                if allowed {
                    self.set_expiry(key, at.max(1) as u64);
                }
                Reply::Int(i64::from(allowed))
            }
            Op::Persist { key } => {
                let had = self.expiry_of(key, now).is_some_and(|at| at != 0);
                if had {
                    self.table.set_expiry(key, 0);
                }
                Reply::Int(i64::from(had))
            }
            Op::Flush { db: Some(db) } => {
                self.table.clear_db(db);
                Reply::Ok
            }
            Op::Flush { db: None } => {
                // Readers of the old table finish with it; it is dropped by whoever holds it last.
                self.table = Arc::new(Table::new(self.init.range, self.init.secret));
                Reply::Ok
            }
            Op::Get { .. }
            | Op::Exists { .. }
            | Op::Strlen { .. }
            | Op::Pttl { .. }
            | Op::Type { .. }
            | Op::DbSize { .. }
            | Op::Scan { .. } => self.observe(op, now),
        })
    }

    /// Stores a value; one that is expired already only removes what was there.
    fn write(&mut self, key: KeyRef<'_>, parts: [&[u8]; 2], expire_at: u64) {
        if expire_at != 0 && expire_at <= self.log_time.0 {
            self.table.delete(key);
        } else {
            self.table.put(key, parts, expire_at);
        }
    }

    fn set_expiry(&mut self, key: KeyRef<'_>, expire_at: u64) {
        if expire_at != 0 && expire_at <= self.log_time.0 {
            self.table.delete(key);
        } else {
            self.table.set_expiry(key, expire_at);
        }
    }

    /// Applied index.
    pub fn applied(&self) -> LogIndex {
        self.applied
    }
    /// Log time of the last applied stamp.
    pub fn log_time(&self) -> LogTime {
        self.log_time
    }
    /// Digest of the whole state: records, sessions, log time and epoch.
    pub fn digest(&self) -> u64 {
        let parts = [self.table.digest(), self.sessions.digest(), self.log_time.0, self.init.epoch.0];
        let mut bytes = [0u8; 32];
        for (i, p) in parts.into_iter().enumerate() {
            bytes[i * 8..i * 8 + 8].copy_from_slice(&p.to_le_bytes());
        }
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }
    /// Keys of all databases, expired ones that nobody touched included.
    pub fn keys(&self) -> u64 {
        self.table.keys()
    }
    /// Accounted bytes of keys, values and overhead.
    pub fn bytes(&self) -> u64 {
        self.table.bytes()
    }
    /// Sessions open.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }
    /// A digest worth checking: the newest recorded one that no applied check covers.
    pub fn digest_to_check(&self) -> Option<(LogIndex, u64)> {
        self.digests.back().copied().filter(|(i, _)| *i > self.checked)
    }
}

/// A 64-bit integer exactly as Redis takes it: no plus sign, no spaces, no leading zeros.
fn parse_integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let canonical = match digits {
        [b'0'] => text.len() == 1,
        [b'1'..=b'9', rest @ ..] => rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    if canonical { std::str::from_utf8(text).ok()?.parse().ok() } else { None }
}

/// A float as Redis takes it: no spaces, not NaN.
fn parse_float(text: &[u8]) -> Option<f64> {
    let v: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    (!v.is_nan()).then_some(v)
}

/// Without exponent and trailing zeros, as Redis prints it. Redis computes with 80-bit floats and prints 17 digits after
/// the point; this is the shortest text that reads back as the same 64-bit float.
fn format_float(v: f64) -> String {
    if v == 0.0 { "0".into() } else { format!("{v}") }
}
