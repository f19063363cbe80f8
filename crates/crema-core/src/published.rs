//! What a replica publishes to readers outside of its driver: the cell, the table, and what they need to know of time.
//!
//! ```text
//!   begin() -> Seen      value(key, f) -> Found { answer, expire_at }      clock      finish(Seen, expire_at, clock)
//! ```
//!
//! Three calls, so that the simulator can let anything happen between them. Single keys only: several keys are read
//! together by the driver, which is the one that changes them.

use crate::cell::{ReadCell, Seen};
use crate::key::KeyRef;
use crate::mutant::{Mutant, planted};
use crate::op::Op;
use crate::reply::{Reply, ValueType};
use crate::store::{Entry, Table};
use crate::time::{LogTime, MonoTime, Now};
use arc_swap::ArcSwap;
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Milliseconds by which a published estimate of log time may lag behind the leader's own, which is steered towards wall
/// time by a thousandth of the time since it was published: at most one lease.
const ESTIMATE_LAG_MS: u64 = 2;

/// A value that was read, and what must still be checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<R> {
    /// What the reader made of the entry.
    pub answer: R,
    /// Log time at which the key expires, 0 for never or absent.
    pub expire_at: u64,
}

/// The readable side of one replica. Shared by its state machine, its replica and all readers.
#[derive(Debug)]
pub struct Published {
    cell: ReadCell,
    table: ArcSwap<Table>,
    log_time: AtomicU64,
    /// Log time less monotonic time, in milliseconds.
    offset: AtomicI64,
    /// Whether somebody has read since the leader last looked.
    used: AtomicBool,
    /// Monotonic nanoseconds as of which the state is complete; 0 for never.
    fresh: AtomicU64,
}

/// The same one, not an equal one.
impl PartialEq for Published {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}
impl Eq for Published {}

impl Published {
    /// For a replica whose state is `table` at `log_time`; closed.
    pub fn new(table: Arc<Table>, log_time: LogTime) -> Self {
        Published {
            cell: ReadCell::default(),
            table: ArcSwap::new(table),
            log_time: AtomicU64::new(log_time.0),
            offset: AtomicI64::new(0),
            used: AtomicBool::new(false),
            fresh: AtomicU64::new(0),
        }
    }

    // ---- the writer's side -------------------------------------------------------------------------------------

    /// The cell, for its one writer.
    pub fn cell(&self) -> &ReadCell {
        &self.cell
    }

    /// Another table takes the place of the present one.
    pub(crate) fn set_table(&self, table: &Arc<Table>) {
        if !Arc::ptr_eq(&self.table.load(), table) {
            self.table.store(table.clone());
        }
    }

    /// Log time has moved on.
    pub(crate) fn set_log_time(&self, time: LogTime) {
        self.log_time.store(time.0, Ordering::Release);
    }

    /// Publishes the leader's estimate of log time at `now`.
    pub fn set_estimate(&self, estimate: LogTime, now: Now) {
        self.offset.store(estimate.0 as i64 - (now.mono.0 / 1_000_000) as i64, Ordering::Release);
    }

    /// Everything acknowledged before `issued`, by this node's clock, is in the state.
    pub fn set_fresh(&self, issued: MonoTime) {
        self.fresh.store(issued.0, Ordering::Release);
    }

    /// Nothing may be read here any more, at no level.
    pub fn retire(&self) {
        self.cell.retire();
    }

    /// Whether somebody has read since the last call.
    pub fn take_used(&self) -> bool {
        self.used.load(Ordering::Relaxed) && self.used.swap(false, Ordering::Relaxed)
    }

    // ---- the readers' side -------------------------------------------------------------------------------------

    /// Begins a read. `None`: ask the driver.
    pub fn begin(&self) -> Option<Seen> {
        self.cell.begin()
    }

    /// Shows the entry of a key, absent if it has expired by log time. `None`: the slot is not of this shard, ask the
    /// driver.
    pub fn value<R>(&self, key: KeyRef<'_>, f: impl FnOnce(Option<Entry<'_>>) -> R) -> Option<Found<R>> {
        let table = self.table.load();
        if !table.range().contains(key.slot) {
            return None;
        }
        // Before the entry: were it later, an entry written meanwhile could be taken for one that expired before.
        let log_time = self.log_time.load(Ordering::Acquire);
        Some(table.get(key, |entry| {
            let live = entry.filter(|e| e.expire_at == 0 || e.expire_at > log_time);
            Found { expire_at: live.map_or(0, |e| e.expire_at), answer: f(live) }
        }))
    }

    /// Whether what was found counts; `clock` was read after it. If not, ask the driver: the lease does not cover it, or
    /// the key expires between log time and the present estimate, which only the log can decide.
    pub fn finish(&self, seen: Seen, expire_at: u64, clock: MonoTime) -> bool {
        if expire_at != 0 {
            let estimate = (clock.0 / 1_000_000).saturating_add_signed(self.offset.load(Ordering::Acquire));
            if expire_at <= estimate.saturating_add(ESTIMATE_LAG_MS) {
                return false;
            }
        }
        let counts = match planted(Mutant::CellLoadedOnce) {
            false => self.cell.still(seen, clock.0),
            true => clock.0 < seen.bound,
        };
        if counts && !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        counts
    }

    /// Whether [`Published::read`] can answer the operation at all.
    pub fn answers(op: &Op<'_>) -> bool {
        matches!(op, Op::Get { .. } | Op::Exists { .. } | Op::Strlen { .. } | Op::Type { .. })
    }

    /// The value step of an operation: its answer, if it is one that [`Published::answers`].
    pub fn observe(&self, op: &Op<'_>) -> Option<Found<Reply>> {
        let key = op.key().filter(|_| Self::answers(op))?;
        self.value(key, |entry| match op {
            Op::Get { .. } => entry.map_or(Reply::Nil, |e| Reply::Bulk(Bytes::copy_from_slice(e.value))),
            Op::Strlen { .. } => Reply::Int(entry.map_or(0, |e| e.value.len() as i64)),
            Op::Type { .. } => Reply::Type(if entry.is_some() { ValueType::String } else { ValueType::None }),
            _ => Reply::Int(i64::from(entry.is_some())),
        })
    }

    /// Answers from the state as it is, whoever leads; with `max_age`, only if it was complete at most so long before
    /// `now`. `None`: ask the driver.
    pub fn read_relaxed(&self, op: &Op<'_>, max_age: Option<Duration>, now: MonoTime) -> Option<Reply> {
        // Before the state: it only grows more complete.
        let fresh = self.fresh.load(Ordering::Acquire);
        if max_age.is_some_and(|most| fresh == 0 || now.since(MonoTime(fresh)) > most) {
            return None;
        }
        let version = self.cell.whole()?;
        let found = self.observe(op)?;
        self.cell.still_whole(version).then_some(found.answer)
    }

    /// All three steps. `None`: ask the driver.
    pub fn read(&self, op: &Op<'_>, clock: impl FnOnce() -> MonoTime) -> Option<Reply> {
        let seen = self.begin()?;
        let found = self.observe(op)?;
        self.finish(seen, found.expire_at, clock()).then_some(found.answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Edit, TableWriter};
    use crate::{SLOT_COUNT, SlotRange};

    const MS: u64 = 1_000_000;

    fn at(ms: u64) -> MonoTime {
        MonoTime(ms * MS)
    }

    struct Rig {
        w: TableWriter,
        p: Published,
    }

    impl Rig {
        fn new() -> Self {
            let w = TableWriter::new(SlotRange { start: 0, end: SLOT_COUNT }, 7);
            let p = Published::new(w.table().clone(), LogTime(1_000));
            Rig { w, p }
        }
        fn put(&mut self, key: &str, value: &str, expire_at: u64) {
            let key = KeyRef::new(0, key.as_bytes()).unwrap();
            self.w.edit(key, |_| ((), Edit::Put { value: value.as_bytes(), expire_at }));
        }
        fn get(&self, key: &str, now: MonoTime) -> Option<Reply> {
            let key = KeyRef::new(0, key.as_bytes()).unwrap();
            self.p.read(&Op::Get { key }, || now)
        }
    }

    #[test]
    fn a_closed_or_expired_cell_answers_nothing() {
        let mut r = Rig::new();
        r.put("k", "v", 0);
        assert_eq!(r.get("k", at(5)), None);
        r.p.cell().open(3, 1, at(10).0);
        assert_eq!(r.get("k", at(9)), Some(Reply::Bulk("v".into())));
        assert_eq!(r.get("none", at(9)), Some(Reply::Nil));
        assert!(r.p.take_used() && !r.p.take_used());
        assert_eq!(r.get("k", at(10)), None, "the bound is the first moment without lease");
        r.p.cell().open(3, 1, at(20).0);
        assert!(r.get("k", at(10)).is_some());
        r.p.cell().close();
        assert_eq!(r.get("k", at(10)), None);
    }

    #[test]
    fn a_read_does_not_survive_a_closing_an_odd_version_or_another_leadership() {
        let mut r = Rig::new();
        r.put("k", "v", 0);
        let c = r.p.cell();
        c.open(3, 1, at(10).0);
        let seen = r.p.begin().unwrap();
        assert!(r.p.finish(seen, 0, at(1)));
        c.close();
        c.open(3, 1, at(10).0);
        assert!(!r.p.finish(seen, 0, at(1)), "closed and open again, even in the same term");
        let seen = r.p.begin().unwrap();
        c.open(4, 1, at(10).0);
        assert!(!r.p.finish(seen, 0, at(1)), "another term");
        let seen = r.p.begin().unwrap();
        c.open(4, 2, at(10).0);
        assert!(!r.p.finish(seen, 0, at(1)), "another epoch");
        let seen = r.p.begin().unwrap();
        c.changing();
        assert_eq!(r.p.begin(), None, "half of a change");
        assert!(!r.p.finish(seen, 0, at(1)));
        c.changed();
        assert!(!r.p.finish(seen, 0, at(1)));
        assert!(r.p.begin().is_some());
    }

    #[test]
    fn what_time_has_not_decided_goes_to_the_driver() {
        let mut r = Rig::new();
        r.p.cell().open(3, 1, u64::MAX);
        // Log time 1,000 at monotonic 0.
        r.p.set_estimate(LogTime(1_000), Now::default());
        r.put("past", "v", 1_000);
        r.put("soon", "v", 1_100);
        assert_eq!(r.get("past", at(1)), Some(Reply::Nil), "expired by log time");
        assert_eq!(r.get("soon", at(90)), Some(Reply::Bulk("v".into())));
        assert_eq!(r.get("soon", at(98)), None, "too close to tell");
        assert_eq!(r.get("soon", at(200)), None, "expired by the estimate, but not in the log");
        r.p.set_log_time(LogTime(1_100));
        assert_eq!(r.get("soon", at(200)), Some(Reply::Nil));
    }

    #[test]
    fn a_relaxed_read_needs_no_lease_but_wholeness_and_its_bound() {
        let mut r = Rig::new();
        r.put("k", "v", 0);
        let key = KeyRef::new(0, b"k").unwrap();
        let op = Op::Get { key };
        let v = Some(Reply::Bulk("v".into()));
        assert_eq!(r.p.read_relaxed(&op, None, at(50)), v);
        let age = Some(Duration::from_millis(10));
        assert_eq!(r.p.read_relaxed(&op, age, at(5)), None, "never known to be complete");
        r.p.set_fresh(at(40));
        assert_eq!(r.p.read_relaxed(&op, age, at(50)), v);
        assert_eq!(r.p.read_relaxed(&op, age, at(51)), None);
        r.p.cell().changing();
        assert_eq!(r.p.read_relaxed(&op, None, at(50)), None, "half of a change");
        r.p.cell().changed();
        r.p.retire();
        assert_eq!(r.p.read_relaxed(&op, None, at(50)), None);
        r.p.cell().open(1, 1, u64::MAX);
        assert_eq!(r.p.begin(), None, "retired for good");
    }

    #[test]
    fn another_table_is_read_once_it_is_published() {
        let mut r = Rig::new();
        r.p.cell().open(3, 1, u64::MAX);
        r.put("k", "v", 0);
        r.w.clear();
        assert_eq!(r.get("k", at(1)), Some(Reply::Bulk("v".into())));
        r.p.set_table(r.w.table());
        assert_eq!(r.get("k", at(1)), Some(Reply::Nil));
    }
}
