//! One shard's state: what applying a log entry does to it, and what reading it answers.
//!
//! ```text
//!   entry --> log time = max(last, stamp) --> each request: session verdict --> execute its operations in order --> outcome
//! ```
//!
//! `apply` is synchronous, total and pure: the same entries make the same state and the same outcomes on every replica.
//! Whatever depends on state (conditions, expiry, slots) is decided here and nowhere else.
//!
//! A key whose expiry is at or before log time is absent, whether its record is still there or not; the next write to the
//! key removes it. So nobody has to watch the clock, and a key that is expired for one reader is so for all later ones.

use crate::codec::{EntryBody, OpsRef, Victim, decode_entry};
use crate::error::{CorruptEntry, OpError};
use crate::eviction::EvictionPolicy;
use crate::ids::{Epoch, LogIndex};
use crate::key::KeyRef;
use crate::limits::{MAX_REQUEST_BYTES, MAX_VALUE_BYTES, MemoryLimits};
use crate::mutant::{self, Mutant, planted};
use crate::op::{ExpireAt, ExpireCond, Op, SetCond, SetExpire};
use crate::published::Published;
use crate::reply::{Outcome, Reply, ValueType};
use crate::session::{Sessions, Verdict};
use crate::slot::{Slot, SlotRange};
use crate::snapshot::{Head, Snapshot, SnapshotStep};
use crate::store::{Edit, Entry, SCAN_BYTES, ScanQuery, Table, TableWriter, record_bytes};
use crate::time::LogTime;
use bytes::Bytes;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;

/// Most bytes of values and keys in the replies of one request. A request may name one large value thousands of times; an
/// operation that would answer beyond this is refused with [`OpError::ReplyTooLarge`], and changes nothing.
pub const MAX_REPLY_BYTES: usize = MAX_REQUEST_BYTES;
/// A digest is recorded each time the applied index passes a multiple of this.
const DIGEST_EVERY: u64 = 1024;
/// Recorded digests that are kept for comparison.
pub(crate) const DIGESTS_KEPT: usize = 8;
/// Latest expiry in milliseconds of log time: what remains of it fits a reply.
const MAX_EXPIRY: u64 = i64::MAX as u64;
/// Longest text that is taken for a float; Redis has the same limit.
const MAX_FLOAT_TEXT: usize = 5 * 1024;

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
    /// One outcome a request, in order; one for an entry that opens a session; else none.
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

/// Records that removing entries have removed on this replica since it was created or installed; not replicated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// By entries that remove what has expired.
    pub expired: u64,
    /// By entries that make room.
    pub evicted: u64,
}

/// The state of one shard.
#[derive(Debug)]
pub struct StateMachine {
    range: SlotRange,
    epoch: Epoch,
    table: TableWriter,
    /// Tables that nobody needs any more but those who read in them.
    garbage: Vec<Arc<Table>>,
    published: Arc<Published>,
    sessions: Sessions,
    log_time: LogTime,
    applied: LogIndex,
    digests: VecDeque<(LogIndex, u64)>,
    /// The newest index that an applied entry compared.
    checked: LogIndex,
    limits: MemoryLimits,
    removed: Removed,
    /// The snapshot that is being taken.
    snapshot: Option<Snapshot>,
}

/// Bytes that the replies of a request may still take.
struct ReplyBudget(usize);

impl ReplyBudget {
    fn take(&mut self, bytes: usize) -> Result<(), OpError> {
        self.0 = self.0.checked_sub(bytes).ok_or(OpError::ReplyTooLarge)?;
        Ok(())
    }

    /// The value of a live key, or nil.
    fn bulk(&mut self, entry: Option<Entry<'_>>) -> Result<Reply, OpError> {
        let Some(entry) = entry else { return Ok(Reply::Nil) };
        self.take(entry.value.len())?;
        Ok(Reply::Bulk(Bytes::copy_from_slice(entry.value)))
    }
}

/// What a read finds of a key.
enum Seen<'a> {
    /// Absent, or expired by log time.
    Absent,
    Live(Entry<'a>),
    /// Expired by the estimate but not by log time.
    Undecided,
}

/// What an expiry asked for comes to.
#[derive(Clone, Copy)]
enum Expiry {
    Never,
    Keep,
    /// In future, in log time.
    At(u64),
    /// At or before log time.
    Past,
}

impl StateMachine {
    /// The founding state: no keys, no sessions.
    pub fn new(init: ShardInit) -> Self {
        let table = TableWriter::new(init.range, init.secret);
        let published = Arc::new(Published::new(table.table().clone(), init.log_time));
        StateMachine {
            range: init.range,
            epoch: init.epoch,
            table,
            published,
            sessions: Sessions::default(),
            log_time: init.log_time,
            applied: init.applied,
            digests: VecDeque::with_capacity(DIGESTS_KEPT),
            checked: LogIndex(0),
            limits: MemoryLimits::default(),
            removed: Removed::default(),
            garbage: Vec::new(),
            snapshot: None,
        }
    }

    /// Applies the committed entry at `index`, which must be the successor of the last one. An empty payload (Raft's own
    /// no-op) only moves `applied`.
    ///
    /// # Errors
    /// The entry does not decode, or is not the next. Nothing has changed, and the replica must stop: skipping an entry
    /// would let replicas differ.
    pub fn apply(&mut self, index: LogIndex, payload: &[u8]) -> Result<Applied, CorruptEntry> {
        let corrupt = |reason: String| CorruptEntry { index: index.0, reason };
        if self.applied.0.checked_add(1) != Some(index.0) {
            return Err(corrupt(format!("it does not follow entry {}", self.applied)));
        }
        let mut result = Applied::default();
        if !payload.is_empty() {
            let entry = decode_entry(payload).map_err(|e| corrupt(e.to_string()))?;
            self.log_time = self.log_time.max(entry.stamp);
            self.published.set_log_time(self.log_time);
            match entry.body {
                EntryBody::Batch(requests) => {
                    result.outcomes.reserve_exact(requests.len());
                    for (tag, ops) in requests.iter() {
                        result.outcomes.push(match self.sessions.judge(tag, index) {
                            Verdict::Execute => {
                                let reply = self.execute(ops, entry.wall_offset);
                                self.sessions.executed(tag, first_slot(ops), &reply);
                                Outcome::Reply(reply)
                            }
                            Verdict::Again(reply) => Outcome::Reply(reply),
                            Verdict::Gap => Outcome::Gap,
                            Verdict::Unknown => Outcome::Unknown,
                            Verdict::NoSession => Outcome::NoSession,
                        });
                    }
                }
                EntryBody::OpenSession { gateway } => {
                    let id = self.sessions.open(gateway, index);
                    result.outcomes.push(Outcome::Reply(Reply::Int(id.0 as i64)));
                }
                EntryBody::Advance => {}
                EntryBody::CheckDigest { index: at, digest } => {
                    // One that names the future compares nothing, and must not keep later ones from being proposed.
                    if at < index {
                        self.checked = self.checked.max(at);
                    }
                    let own = self.digests.iter().find(|(i, _)| *i == at);
                    if own.is_some_and(|(_, d)| *d != digest) {
                        result.digest_mismatch = Some(at);
                    }
                }
                EntryBody::SetLimits(limits) => self.limits = limits,
                EntryBody::Remove { victims, expired_only } => {
                    let now = self.log_time.0;
                    let expired = |e: Entry<'_>| e.expire_at != 0 && e.expire_at <= now;
                    let count: u64 =
                        victims.iter().map(|v| self.table.remove(v, |e| !expired_only || expired(e))).sum();
                    let total = if expired_only { &mut self.removed.expired } else { &mut self.removed.evicted };
                    *total += count;
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

    /// Answers read-only operations from the applied state: the reply of one operation, [`Reply::Array`] of several.
    /// `estimate` is the leader's log time now; an earlier one than the applied counts as that.
    ///
    /// `ops` must be an ops block without writes. Should it be anything else, nothing is executed, and the answer is
    /// [`OpError::WrongSlot`], the refusal that tells its caller just that.
    pub fn read(&self, ops: &[u8], estimate: LogTime) -> ReadResult {
        let ops = OpsRef::parse(ops).ok().filter(|ops| !ops.is_write());
        debug_assert!(ops.is_some(), "reads are checked before they are taken");
        let Some(ops) = ops.filter(|ops| self.owns_all(*ops)) else {
            return ReadResult::Reply(self.wrong_slot());
        };
        let now = self.log_time.max(estimate);
        let mut budget = ReplyBudget(MAX_REPLY_BYTES);
        let mut replies = Vec::new();
        for op in ops.iter() {
            match self.observe(&op, now, &mut budget) {
                Some(Ok(reply)) if ops.len() == 1 => return ReadResult::Reply(reply),
                Some(Err(e)) if ops.len() == 1 => return ReadResult::Reply(Reply::Error(e)),
                Some(answer) => replies.push(answer.unwrap_or_else(Reply::Error)),
                None => return ReadResult::NeedsAdvance,
            }
        }
        ReadResult::Reply(Reply::Array(replies))
    }

    /// Executes the operations of a request, in order. One that fails does not undo the others, as in a Redis transaction;
    /// but if any names a slot that this shard does not own, none is executed, and the answer is a bare error.
    fn execute(&mut self, ops: OpsRef<'_>, wall_offset: i64) -> Reply {
        if !self.owns_all(ops) {
            return self.wrong_slot();
        }
        let mut budget = ReplyBudget(MAX_REPLY_BYTES);
        let mut ops_left = ops.iter();
        if ops.len() == 1
            && let Some(op) = ops_left.next()
        {
            // A flush touches all keys.
            let wide = matches!(op, Op::Flush { .. });
            return self.together(wide, |m| m.change(&op, wall_offset, &mut budget).unwrap_or_else(Reply::Error));
        }
        self.together(ops.is_write(), |m| {
            let one = |op: Op<'_>| {
                let reply = m.change(&op, wall_offset, &mut budget).unwrap_or_else(Reply::Error);
                mutant::between_keys();
                reply
            };
            Reply::Array(ops_left.map(one).collect())
        })
    }

    /// Does what changes several keys so that no reader sees half of it.
    fn together<R>(&mut self, several: bool, change: impl FnOnce(&mut Self) -> R) -> R {
        if !several || planted(Mutant::HalfVisible) {
            return change(self);
        }
        self.published.cell().changing();
        let result = change(self);
        self.published.set_table(self.table.table());
        self.published.cell().changed();
        result
    }

    fn owns_all(&self, ops: OpsRef<'_>) -> bool {
        ops.iter().all(|op| match op {
            Op::Scan { cursor, .. } => self.table.table().holds_cursor(cursor),
            op => op.key().is_none_or(|k| self.range.contains(k.slot)),
        })
    }

    fn wrong_slot(&self) -> Reply {
        Reply::Error(OpError::WrongSlot { epoch: self.epoch })
    }

    /// Answers a read-only operation at `now`, which is log time or the leader's estimate of it. `None` if the answer
    /// depends on which of the two it is.
    fn observe(&self, op: &Op<'_>, now: LogTime, budget: &mut ReplyBudget) -> Option<Result<Reply, OpError>> {
        let table = self.table.table();
        let Some(key) = op.key() else {
            return Some(self.observe_all(op, now, budget));
        };
        table.get(key, |entry| {
            let seen = match entry {
                Some(e) if e.expire_at == 0 || e.expire_at > now.0 => Seen::Live(e),
                Some(e) if e.expire_at > self.log_time.0 => Seen::Undecided,
                _ => Seen::Absent,
            };
            let entry = match seen {
                Seen::Live(e) => Some(e),
                Seen::Absent => None,
                Seen::Undecided => return None,
            };
            Some(match op {
                Op::Get { .. } => budget.bulk(entry),
                Op::Exists { .. } => Ok(Reply::Int(i64::from(entry.is_some()))),
                Op::Strlen { .. } => Ok(Reply::Int(entry.map_or(0, |e| e.value.len() as i64))),
                Op::Pttl { .. } => Ok(Reply::Int(match entry.map(|e| e.expire_at) {
                    None => -2,
                    Some(0) => -1,
                    Some(at) => (at - now.0) as i64,
                })),
                Op::Type { .. } => Ok(Reply::Type(if entry.is_some() { ValueType::String } else { ValueType::None })),
                // Writes are told apart before; named, so that a new operation is not forgotten here.
                Op::Set { .. }
                | Op::GetEx { .. }
                | Op::GetDel { .. }
                | Op::Del { .. }
                | Op::IncrBy { .. }
                | Op::IncrByFloat { .. }
                | Op::Append { .. }
                | Op::Expire { .. }
                | Op::Persist { .. }
                | Op::DbSize { .. }
                | Op::Scan { .. }
                | Op::Flush { .. }
                | Op::CompareAndSet { .. } => {
                    debug_assert!(false, "not a read of a key");
                    Err(OpError::WrongSlot { epoch: self.epoch })
                }
            })
        })
    }

    /// Answers a read-only operation on no particular key.
    fn observe_all(&self, op: &Op<'_>, now: LogTime, budget: &mut ReplyBudget) -> Result<Reply, OpError> {
        match *op {
            Op::DbSize { db } => Ok(Reply::Int(self.table.table().len(db) as i64)),
            Op::Scan { db, cursor, count, pattern } => {
                // A step finds less than this, but for one key: room is asked for before the work is done.
                if budget.0 < SCAN_BYTES {
                    return Err(OpError::ReplyTooLarge);
                }
                let step = self.table.table().scan(cursor, ScanQuery { db, count, now: now.0, pattern });
                budget.0 = budget.0.saturating_sub(step.keys.iter().map(Bytes::len).sum());
                Ok(Reply::Scan { next: step.next, keys: step.keys })
            }
            _ => {
                debug_assert!(false, "not a read of a shard");
                Err(OpError::WrongSlot { epoch: self.epoch })
            }
        }
    }

    /// Edits a key as it is at log time: an expired one is shown as absent, and removed if it would stay.
    fn edit<'v, R>(&mut self, key: KeyRef<'_>, decide: impl FnOnce(Option<Entry<'_>>) -> (R, Edit<'v>)) -> R {
        let now = self.log_time.0;
        self.table.edit(key, |entry| {
            let live = entry.filter(|e| e.expire_at == 0 || e.expire_at > now);
            let (answer, edit) = decide(live);
            let stale = live.is_none() && entry.is_some();
            (answer, if stale && edit == Edit::Keep { Edit::Delete } else { edit })
        })
    }

    /// As [`StateMachine::edit`], for operations that may fail; one that does leaves the key as it is. One that would take
    /// more memory than there is fails; one that takes none never does for that reason.
    fn try_edit<'v>(
        &mut self,
        key: KeyRef<'_>,
        decide: impl FnOnce(Option<Entry<'_>>) -> Result<(Reply, Edit<'v>), OpError>,
    ) -> Result<Reply, OpError> {
        let (most, each) = (self.limits.most(), self.limits.bytes_per_key());
        let room = if most == u64::MAX { most } else { most.saturating_sub(self.used()) };
        self.edit(key, |entry| match decide(entry) {
            Ok((_, edit)) if room < u64::MAX && growth(key, entry, edit, each) > room => {
                (Err(OpError::OutOfMemory), Edit::Keep)
            }
            Ok((reply, edit)) => (Ok(reply), edit),
            Err(e) => (Err(e), Edit::Keep),
        })
    }

    /// A point `ms` after log time, which may be negative, as log time.
    fn after(&self, ms: i128) -> Result<Expiry, OpError> {
        let at = i128::from(self.log_time.0) + ms;
        match u64::try_from(at.max(0)) {
            Ok(at) if at <= self.log_time.0 => Ok(Expiry::Past),
            Ok(at) if at <= MAX_EXPIRY => Ok(Expiry::At(at)),
            _ => Err(OpError::InvalidExpire),
        }
    }

    /// A point of wall time as log time: wall time less the leader's offset.
    fn at_wall(&self, wall_ms: i128, wall_offset: i64) -> Result<Expiry, OpError> {
        self.after(wall_ms - i128::from(wall_offset) - i128::from(self.log_time.0))
    }

    fn expiry(&self, expire: SetExpire, wall_offset: i64) -> Result<Expiry, OpError> {
        match expire {
            SetExpire::Clear => Ok(Expiry::Never),
            SetExpire::Keep => Ok(Expiry::Keep),
            SetExpire::After(ms) => self.after(i128::from(ms)),
            SetExpire::At(wall) => self.at_wall(i128::from(wall.0), wall_offset),
        }
    }

    /// Executes any operation at log time.
    fn change(&mut self, op: &Op<'_>, wall_offset: i64, budget: &mut ReplyBudget) -> Result<Reply, OpError> {
        match *op {
            Op::Set { key, value, cond, expire, get } => {
                // As in Redis an impossible expiry is refused before the condition is looked at.
                let expiry = self.expiry(expire, wall_offset)?;
                self.try_edit(key, |old| {
                    let before = if get { Some(budget.bulk(old)?) } else { None };
                    let allowed = match cond {
                        SetCond::Always => true,
                        SetCond::IfAbsent => old.is_none(),
                        SetCond::IfPresent => old.is_some(),
                    };
                    if !allowed {
                        return Ok((before.unwrap_or(Reply::Nil), Edit::Keep));
                    }
                    let edit = match expiry {
                        Expiry::Never => Edit::Put { value, expire_at: 0 },
                        Expiry::Keep => Edit::Put { value, expire_at: old.map_or(0, |e| e.expire_at) },
                        Expiry::At(expire_at) => Edit::Put { value, expire_at },
                        Expiry::Past => Edit::Delete,
                    };
                    Ok((before.unwrap_or(Reply::Ok), edit))
                })
            }
            Op::CompareAndSet { key, expected, value, expire } => {
                // As with SET: before the condition is looked at.
                let expiry = self.expiry(expire, wall_offset)?;
                self.try_edit(key, |old| {
                    if old.map(|e| e.value) != expected {
                        return Ok((Reply::Int(0), Edit::Keep));
                    }
                    let edit = match expiry {
                        Expiry::Never => Edit::Put { value, expire_at: 0 },
                        Expiry::Keep => Edit::Put { value, expire_at: old.map_or(0, |e| e.expire_at) },
                        Expiry::At(expire_at) => Edit::Put { value, expire_at },
                        Expiry::Past => Edit::Delete,
                    };
                    Ok((Reply::Int(1), edit))
                })
            }
            Op::GetEx { key, expire } => {
                // As in Redis an absent key is told before an impossible expiry.
                let expiry = self.expiry(expire, wall_offset);
                self.try_edit(key, |old| {
                    if old.is_none() {
                        return Ok((Reply::Nil, Edit::Keep));
                    }
                    let edit = match expiry? {
                        Expiry::Never => Edit::Expiry(0),
                        Expiry::Keep => Edit::Keep,
                        Expiry::At(at) => Edit::Expiry(at),
                        Expiry::Past => Edit::Delete,
                    };
                    Ok((budget.bulk(old)?, edit))
                })
            }
            Op::GetDel { key } => self.try_edit(key, |old| Ok((budget.bulk(old)?, Edit::Delete))),
            Op::Del { key } => Ok(self.edit(key, |old| (Reply::Int(i64::from(old.is_some())), Edit::Delete))),
            Op::IncrBy { key, by } => {
                let mut text = [0u8; 20];
                let text = &mut text;
                self.try_edit(key, move |old| {
                    let (value, expire_at) = match old {
                        Some(e) => (parse_integer(e.value).ok_or(OpError::NotInteger)?, e.expire_at),
                        None => (0, 0),
                    };
                    let sum = value.checked_add(by).ok_or(OpError::Overflow)?;
                    Ok((Reply::Int(sum), Edit::Put { value: format_integer(sum, text), expire_at }))
                })
            }
            Op::IncrByFloat { key, by } => {
                let mut text = String::new();
                let text = &mut text;
                self.try_edit(key, move |old| {
                    let (value, expire_at) = match old {
                        Some(e) => (parse_float(e.value).ok_or(OpError::NotFloat)?, e.expire_at),
                        None => (0.0, 0),
                    };
                    let sum = value + by.get();
                    if !sum.is_finite() {
                        return Err(OpError::NotFinite);
                    }
                    *text = format_float(sum);
                    let value = text.as_bytes();
                    budget.take(value.len())?;
                    Ok((Reply::Bulk(Bytes::copy_from_slice(value)), Edit::Put { value, expire_at }))
                })
            }
            Op::Append { key, value } => self.try_edit(key, |old| {
                let len = old.map_or(0, |e| e.value.len()) + value.len();
                if len > MAX_VALUE_BYTES {
                    return Err(OpError::TooLong);
                }
                let edit = match old {
                    // Not an append: the record of an expired key would be continued.
                    None => Edit::Put { value, expire_at: 0 },
                    Some(_) if value.is_empty() => Edit::Keep,
                    Some(_) => Edit::Append(value),
                };
                Ok((Reply::Int(len as i64), edit))
            }),
            Op::Expire { key, at, cond } => {
                // As in Redis an impossible expiry is refused before the key is looked at.
                let new = match at {
                    ExpireAt::After(ms) => self.after(i128::from(ms)),
                    ExpireAt::At(wall) => self.at_wall(i128::from(wall), wall_offset),
                }?;
                // A past point is earlier than any expiry that a live key can have.
                let point = if let Expiry::At(at) = new { at } else { 0 };
                Ok(self.edit(key, |old| {
                    let Some(old) = old.map(|e| e.expire_at) else { return (Reply::Int(0), Edit::Keep) };
                    let allowed = match cond {
                        ExpireCond::Always => true,
                        ExpireCond::IfNone => old == 0,
                        ExpireCond::IfSome => old != 0,
                        ExpireCond::IfGreater => old != 0 && point > old,
                        ExpireCond::IfLess => old == 0 || point < old,
                    };
                    match new {
                        _ if !allowed => (Reply::Int(0), Edit::Keep),
                        Expiry::At(at) => (Reply::Int(1), Edit::Expiry(at)),
                        _ => (Reply::Int(1), Edit::Delete),
                    }
                }))
            }
            Op::Persist { key } => Ok(self.edit(key, |old| match old {
                Some(e) if e.expire_at != 0 => (Reply::Int(1), Edit::Expiry(0)),
                _ => (Reply::Int(0), Edit::Keep),
            })),
            Op::Flush { db } => {
                let before = self.table.table().clone();
                match db {
                    Some(db) => self.table.clear_db(db),
                    None => self.table.clear(),
                }
                if !Arc::ptr_eq(&before, self.table.table()) {
                    self.garbage.push(before);
                }
                Ok(Reply::Ok)
            }
            Op::Get { .. }
            | Op::Exists { .. }
            | Op::Strlen { .. }
            | Op::Pttl { .. }
            | Op::Type { .. }
            | Op::DbSize { .. }
            | Op::Scan { .. } => {
                // At log time nothing is undecided.
                self.observe(op, self.log_time, budget).unwrap_or(Ok(Reply::Nil))
            }
        }
    }

    /// Begins a snapshot of the state as it is now, at the applied index, and returns its first chunk. `None` while an
    /// earlier one is unfinished; an abandoned one is too until what it had begun is swept, of which each call does a part.
    ///
    /// Takes time and memory with the sessions, not with the keys. The rest comes by [`StateMachine::snapshot_step`];
    /// entries may be applied between the steps, and the snapshot does not change by them. What they overwrite or delete
    /// stays in memory until it is emitted: at worst the shard's data exist twice, if all is overwritten before the
    /// consumer takes a step. [`StateMachine::snapshot_pending_bytes`] says how much that is.
    pub fn begin_snapshot(&mut self) -> Option<Bytes> {
        if self.snapshot.is_some() {
            return None;
        }
        if self.table.walking() {
            self.table.walk(|_| true);
        }
        let table = self.table().clone();
        if !self.table.begin_walk() {
            return None;
        }
        let head = Head {
            range: self.range,
            epoch: self.epoch,
            secret: table.seed(),
            log_time: self.log_time,
            applied: self.applied,
            digests: self.digests.iter().copied().collect(),
            checked: self.checked,
            limits: self.limits,
            sessions: self.sessions.len() as u64,
            keys: table.keys(),
            bytes: table.bytes(),
            table_digest: table.digest(),
            sessions_digest: self.sessions.digest(),
            digest: self.digest(),
        };
        let (snapshot, chunk) = Snapshot::begin(&head, &self.sessions);
        self.snapshot = Some(snapshot);
        Some(chunk)
    }

    /// The next chunk of the snapshot: about `max_bytes`, more only by its frame or if one record alone is larger. A step
    /// looks at some ten thousand records and as many empty slots at most, and locks one segment at a time.
    pub fn snapshot_step(&mut self, max_bytes: usize) -> SnapshotStep {
        let Some(snapshot) = &mut self.snapshot else {
            return if self.table.walk(|_| true) { SnapshotStep::Sweeping } else { SnapshotStep::Idle };
        };
        let step = snapshot.step(&mut self.table, max_bytes);
        if let SnapshotStep::Done(_) = step {
            self.snapshot = None;
        }
        step
    }

    /// Gives the snapshot up, and what it kept in memory. Nothing if there is none.
    pub fn abandon_snapshot(&mut self) {
        self.snapshot = None;
        self.table.abandon_walk();
    }

    /// Accounted bytes that only the snapshot keeps in memory, 0 without one.
    pub fn snapshot_pending_bytes(&self) -> u64 {
        self.snapshot.as_ref().map_or(0, |s| s.pending_bytes() + self.table.walk_bytes())
    }

    /// Replaces the whole state by a restored one; its index is usually later. Readers keep what they share with this
    /// machine, [`StateMachine::published`], and see either state, no mixture. A snapshot that was being taken is dropped.
    ///
    /// Returns the former keys and values, for the caller to drop where it delays nobody.
    pub fn install(&mut self, restored: StateMachine) -> Arc<Table> {
        let published = self.published.clone();
        published.cell().changing();
        let former = std::mem::replace(self, restored);
        self.published = published;
        self.published.set_table(self.table.table());
        self.published.set_log_time(self.log_time);
        self.published.cell().changed();
        former.table.table().clone()
    }

    /// This state as the beginning of another group of the same shard, at the index `applied`: keys, values, log time and
    /// limits stay. Sessions go: one that misses writes would wait for them for ever, and gateways open new ones. Readers of
    /// what was before have to be told by [`Published::retire`].
    pub fn refounded(mut self, epoch: Epoch, applied: LogIndex) -> Self {
        self.abandon_snapshot();
        let published = Arc::new(Published::new(self.table.table().clone(), self.log_time));
        StateMachine {
            epoch,
            applied,
            published,
            sessions: Sessions::default(),
            digests: VecDeque::with_capacity(DIGESTS_KEPT),
            checked: LogIndex(0),
            ..self
        }
    }

    /// The state that a snapshot's parts make.
    pub(crate) fn restored(head: Head, table: TableWriter, sessions: Sessions) -> Self {
        let published = Arc::new(Published::new(table.table().clone(), head.log_time));
        StateMachine {
            range: head.range,
            epoch: head.epoch,
            table,
            published,
            sessions,
            log_time: head.log_time,
            applied: head.applied,
            digests: head.digests.into(),
            checked: head.checked,
            limits: head.limits,
            removed: Removed::default(),
            garbage: Vec::new(),
            snapshot: None,
        }
    }

    /// Tables that FLUSHALL has replaced, for the caller to drop where it delays nobody: a million keys take a while.
    pub fn take_garbage(&mut self) -> Vec<Arc<Table>> {
        std::mem::take(&mut self.garbage)
    }

    /// The keys and values, for readers. FLUSHALL replaces the table by another one, so ask again for each read.
    pub fn table(&self) -> &Arc<Table> {
        self.table.table()
    }

    /// For the mutant that removes what has expired without asking the log.
    #[cfg(feature = "mutants")]
    pub fn expire_alone(&mut self, now: LogTime) {
        for victim in self.expired(now, 64) {
            self.table.remove(victim, |e| e.expire_at != 0 && e.expire_at <= now.0);
        }
    }

    /// For the mutant that judges expiry by a clock of its own.
    #[cfg(feature = "mutants")]
    pub fn set_log_time(&mut self, time: LogTime) {
        self.log_time = self.log_time.max(time);
    }

    /// What readers outside of the driver share with this state.
    pub fn published(&self) -> &Arc<Published> {
        &self.published
    }

    /// What a shard with this one's slots, epoch, secret, log time and applied index would begin with.
    pub fn init(&self) -> ShardInit {
        let secret = self.table.table().seed();
        ShardInit { range: self.range, epoch: self.epoch, secret, log_time: self.log_time, applied: self.applied }
    }

    /// Placement epoch of the shard's slots.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Index of the last applied entry.
    pub fn applied(&self) -> LogIndex {
        self.applied
    }

    /// Log time: the latest applied stamp.
    pub fn log_time(&self) -> LogTime {
        self.log_time
    }

    /// Digest of the whole state: records, sessions, log time, epoch and limits. Equal on all replicas that have applied the same
    /// entries. Takes time with the number of sessions, not of keys.
    pub fn digest(&self) -> u64 {
        let MemoryLimits { max_bytes, policy } = self.limits;
        let parts =
            [self.table().digest(), self.sessions.digest(), self.log_time.0, self.epoch.0, max_bytes, policy as u64];
        let mut bytes = [0u8; 48];
        for (i, part) in parts.into_iter().enumerate() {
            bytes[i * 8..i * 8 + 8].copy_from_slice(&part.to_le_bytes());
        }
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }

    /// Keys of all databases, expired ones that nobody wrote to included.
    pub fn keys(&self) -> u64 {
        self.table().keys()
    }

    /// Accounted bytes of keys, values and overhead.
    pub fn bytes(&self) -> u64 {
        self.table().bytes()
    }

    /// Bytes that count against [`MemoryLimits::max_bytes`]: [`StateMachine::bytes`], and what choosing victims takes where
    /// that is done. Neither sessions nor a snapshot that is being taken. Equal on all replicas.
    pub fn used(&self) -> u64 {
        self.bytes() + self.keys() * self.limits.bytes_per_key()
    }

    /// How much memory may be used.
    pub fn limits(&self) -> MemoryLimits {
        self.limits
    }

    /// What has been removed by entries that remove.
    pub fn removed(&self) -> Removed {
        self.removed
    }

    /// Looks for records that have expired by `estimate`, the leader's log time now, and returns at most `max_records` of
    /// them, for an entry that removes them ([`crate::encode_remove`]). Nothing changes; until that entry is applied the
    /// same ones may be found again.
    ///
    /// Goes round the shard, on from where the last call stopped, past segments in which nothing can have expired. One call
    /// looks at some ten thousand records at most; there may be more to find as long as
    /// [`StateMachine::next_expiry_hint`] is not after `estimate`.
    pub fn expired(&mut self, estimate: LogTime, max_records: usize) -> Vec<Victim> {
        self.table.expired(estimate.0, max_records)
    }

    /// No record expires before; `None` if none expires at all. A lower bound: it rises with a round of
    /// [`StateMachine::expired`].
    pub fn next_expiry_hint(&self) -> Option<LogTime> {
        Some(self.table().earliest_expiry()).filter(|at| *at != u64::MAX).map(LogTime)
    }

    /// Chooses records to evict, unused ones first, until they come to `bytes` ([`StateMachine::used`] less the limit, say)
    /// or are `max`, for an entry that removes them ([`crate::encode_remove`]). Nothing of the replicated state changes.
    ///
    /// The first call, and the first with another policy, begins to note what is used: it takes
    /// [`crate::limits::EVICTION_BYTES_PER_KEY`], and its choice is an arbitrary one. Each call looks at a bounded number of
    /// records, some 65,000, and may find fewer victims than asked for, or none: ask again. What was chosen is not chosen
    /// again soon, so do not ask for more than will be proposed.
    pub fn victims(&mut self, policy: EvictionPolicy, bytes: u64, max: usize) -> Vec<Victim> {
        self.table.victims(policy, bytes, max, self.log_time.0)
    }

    #[cfg(test)]
    pub(crate) fn queues(&self) -> Option<&crate::eviction::Queues> {
        self.table.queues()
    }

    #[cfg(test)]
    pub(crate) fn names(&self) -> usize {
        self.queues().map_or(0, |q| q.len())
    }

    /// Forgets what [`StateMachine::victims`] goes by, and frees its memory: for a replica that does not lead any more.
    pub fn forget_victims(&mut self) {
        self.table.forget_victims();
    }

    /// Number of open sessions.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// A digest worth checking: the index and digest last recorded by `apply`, if newer than the last checked one.
    pub fn digest_to_check(&self) -> Option<(LogIndex, u64)> {
        self.digests.back().copied().filter(|(i, _)| *i > self.checked)
    }
}

/// Accounted bytes by which an edit that writes a value grows a key. The others do not count: they free memory, or take
/// only what an expiry does.
fn growth(key: KeyRef<'_>, old: Option<Entry<'_>>, edit: Edit<'_>, each: u64) -> u64 {
    let bytes = |len, expire_at| record_bytes(key.bytes.len(), len, expire_at != 0) + each;
    let before = old.map_or(0, |e| bytes(e.value.len(), e.expire_at));
    let after = match edit {
        Edit::Put { value, expire_at } => bytes(value.len(), expire_at),
        Edit::Append(tail) => old.map_or(bytes(tail.len(), 0), |e| bytes(e.value.len() + tail.len(), e.expire_at)),
        Edit::Keep | Edit::Delete | Edit::Expiry(_) => 0,
    };
    after.saturating_sub(before)
}

/// The slot of the first operation that has one; the kept outcome moves with it.
fn first_slot(ops: OpsRef<'_>) -> Option<Slot> {
    ops.iter().find_map(|op| op.key()).map(|k| k.slot)
}

/// A 64-bit integer exactly as Redis takes it: no plus sign, no spaces, no leading zeros, no `-0`.
fn parse_integer(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let canonical = match digits {
        [b'0'] => text.len() == 1,
        [b'1'..=b'9', rest @ ..] => rest.len() < 19 && rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    if canonical { std::str::from_utf8(text).ok()?.parse().ok() } else { None }
}

/// The decimal text of any 64-bit integer fits twenty bytes.
fn format_integer(n: i64, text: &mut [u8; 20]) -> &[u8] {
    let mut rest = &mut text[..];
    let written = write!(rest, "{n}").is_ok();
    debug_assert!(written, "twenty bytes are enough");
    let left = rest.len();
    &text[..20 - left]
}

/// A float as Redis takes it: no spaces, not NaN, and no number that is too large to be one. Hexadecimal is not taken.
fn parse_float(text: &[u8]) -> Option<f64> {
    if text.len() >= MAX_FLOAT_TEXT {
        return None;
    }
    let value: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    // "inf" is a number, as in Redis, though no sum of it is; digits that come out infinite were out of range.
    let out_of_range = value.is_infinite() && text.iter().any(u8::is_ascii_digit);
    (!value.is_nan() && !out_of_range).then_some(value)
}

/// Without exponent and trailing zeros. Redis computes with 80-bit floats and prints 17 digits after the point, then drops
/// trailing zeros; this computes with 64 bits, the same on every machine, and prints the shortest text that reads back as
/// the same number. So 0.1 + 0.2 is 0.30000000000000004 here and 0.3 there.
fn format_float(value: f64) -> String {
    if value == 0.0 { "0".into() } else { format!("{value}") }
}

#[cfg(test)]
pub(crate) mod tests;
