//! The Raft log of one replica in memory, lean: entries in a ring, no lock, no protobuf.
//!
//! ```text
//!   founded: state at (1, 1)          empty: nothing at all          both --restore(index, term)--> state at (index, term)
//!   state | entries: append cuts a conflicting tail; compact moves the state's end forward
//! ```
//!
//! A founding state lies outside of the log, so that nobody can replay from index 1 into a group whose first configuration
//! was never logged: whoever joins later begins empty and needs a snapshot.

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Index of the state that every replica of a founded group begins with.
pub const FOUNDING_INDEX: u64 = 1;
/// Term of that state.
pub const FOUNDING_TERM: u64 = 1;

/// Fixed cost of an entry beside its payload, for accounting.
const ENTRY_OVERHEAD: usize = std::mem::size_of::<Entry>();

/// An in-memory Raft log.
#[derive(Debug)]
pub struct MemLog {
    entries: VecDeque<Entry>,
    /// Index of the last entry that was dropped, or the founding index.
    truncated: u64,
    truncated_term: u64,
    hard: HardState,
    /// As of the creation of the replica; afterwards raft-rs knows.
    conf: ConfState,
    bytes: usize,
    /// Members that hold a state already, which raft-rs may announce to them.
    announce: BTreeMap<u64, Snapshot>,
    /// Members that raft-rs wants a state for.
    wanted: RefCell<BTreeSet<u64>>,
}

impl MemLog {
    /// The log of a replica of a newly founded group with these voters.
    pub fn founded(voters: Vec<u64>) -> Self {
        MemLog {
            truncated: FOUNDING_INDEX,
            truncated_term: FOUNDING_TERM,
            hard: HardState { term: FOUNDING_TERM, commit: FOUNDING_INDEX, ..HardState::default() },
            conf: ConfState { voters, ..ConfState::default() },
            ..MemLog::empty()
        }
    }

    /// The log of the one voter that begins a group anew, with a state at (`index`, `term`).
    pub fn refounded(index: u64, term: u64, voter: u64) -> Self {
        let hard = HardState { term, commit: index, ..HardState::default() };
        let conf = ConfState { voters: vec![voter], ..ConfState::default() };
        MemLog::recovered(index, term, conf, hard, Vec::new())
    }

    /// The log of a replica that comes back from disk: a state at (`index`, `term`), and what followed it.
    pub fn recovered(index: u64, term: u64, conf: ConfState, hard: HardState, entries: Vec<Entry>) -> Self {
        let mut log = MemLog { truncated: index, truncated_term: term, conf, hard, ..MemLog::empty() };
        log.append(entries);
        log
    }

    /// The log of a replica that knows nothing yet.
    pub fn empty() -> Self {
        MemLog {
            entries: VecDeque::new(),
            truncated: 0,
            truncated_term: 0,
            hard: HardState::default(),
            conf: ConfState::default(),
            bytes: 0,
            announce: BTreeMap::new(),
            wanted: RefCell::default(),
        }
    }

    /// Takes a state at (index, term) in the place of everything there was.
    pub fn restore(&mut self, index: u64, term: u64) {
        self.entries = VecDeque::new();
        self.bytes = 0;
        self.truncated = index;
        self.truncated_term = term;
    }

    /// Lets raft-rs announce this state to a member that holds it; with none, it has to wait for one.
    pub fn set_announced(&mut self, to: u64, snapshot: Option<Snapshot>) {
        match snapshot {
            Some(s) => _ = self.announce.insert(to, s),
            None => _ = self.announce.remove(&to),
        }
    }

    /// Nothing is announced or wanted any more.
    pub fn forget_snapshots(&mut self) {
        self.announce.clear();
        self.wanted.get_mut().clear();
    }

    /// The members that need a state, since their last call.
    pub fn take_wanted(&mut self) -> BTreeSet<u64> {
        std::mem::take(self.wanted.get_mut())
    }

    fn first(&self) -> u64 {
        self.truncated + 1
    }

    /// Index of the last entry, or of what was dropped last.
    pub fn last(&self) -> u64 {
        self.truncated + self.entries.len() as u64
    }

    /// Number of entries kept.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no entry is kept.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of the entries kept, overhead included.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of the entries behind `index`, overhead included.
    pub fn bytes_behind(&self, index: u64) -> usize {
        let skip = index.saturating_sub(self.truncated) as usize;
        self.entries.iter().skip(skip).map(|e| ENTRY_OVERHEAD + e.data.len()).sum()
    }

    /// Appends entries, first cutting off a tail that conflicts with them (raft-rs issue 428). Entries and hard state
    /// of one Ready are written by one call each within one step, so nothing ever sees one without the other.
    pub fn append(&mut self, entries: Vec<Entry>) {
        let Some(begin) = entries.first().map(|e| e.index) else { return };
        assert!(
            self.first() <= begin && begin <= self.last() + 1,
            "entries from {begin} do not join a log of {}..={}",
            self.first(),
            self.last()
        );
        let keep = (begin - self.first()) as usize;
        for dropped in self.entries.drain(keep..) {
            self.bytes -= ENTRY_OVERHEAD + dropped.data.len();
        }
        for e in entries {
            self.bytes += ENTRY_OVERHEAD + e.data.len();
            self.entries.push_back(e);
        }
    }

    /// Replaces term, vote and commit index.
    pub fn set_hard_state(&mut self, hard: HardState) {
        self.hard = hard;
    }

    /// Drops entries up to and including `index`; a smaller one than before changes nothing.
    pub fn compact(&mut self, index: u64) {
        let index = index.min(self.last());
        if index <= self.truncated {
            return;
        }
        let count = (index - self.truncated) as usize;
        self.truncated_term = self.entries[count - 1].term;
        for dropped in self.entries.drain(..count) {
            self.bytes -= ENTRY_OVERHEAD + dropped.data.len();
        }
        self.truncated = index;
        if self.entries.capacity() > 1024 && self.entries.len() < self.entries.capacity() / 4 {
            self.entries.shrink_to(self.entries.len() * 2);
        }
    }

    /// Index of the last dropped entry.
    pub fn truncated(&self) -> u64 {
        self.truncated
    }
}

impl Storage for MemLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard.clone(), conf_state: self.conf.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.first() {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let max = max_size.into().unwrap_or(u64::MAX);
        let from = (low - self.first()) as usize;
        let to = (high - self.first()) as usize;
        let mut size = 0;
        let mut out = Vec::with_capacity((to - from).min(64));
        for e in self.entries.range(from..to) {
            size += (ENTRY_OVERHEAD + e.data.len()) as u64;
            if size > max && !out.is_empty() {
                break;
            }
            out.push(e.clone());
        }
        Ok(out)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.truncated {
            return Ok(self.truncated_term);
        }
        if index < self.truncated {
            return Err(Error::Store(StorageError::Compacted));
        }
        match self.entries.get((index - self.first()) as usize) {
            Some(e) => Ok(e.term),
            None => Err(Error::Store(StorageError::Unavailable)),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    /// A state that `to` holds already, see [`crate::transfer`]; until then the wish is noted.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        match self.announce.get(&to) {
            Some(s) if s.get_metadata().index >= request_index => Ok(s.clone()),
            _ => {
                self.wanted.borrow_mut().insert(to);
                Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![0; 10].into(), ..Entry::default() }
    }

    fn read(log: &MemLog, low: u64, high: u64, max: Option<u64>) -> raft::Result<Vec<u64>> {
        let es = log.entries(low, high, max, GetEntriesContext::empty(false))?;
        Ok(es.iter().map(|e| e.index).collect())
    }

    #[test]
    fn a_conflicting_tail_is_cut_before_appending() {
        let mut log = MemLog::founded(vec![1, 2, 3]);
        log.append((2..=6).map(|i| entry(i, 2)).collect());
        log.append(vec![entry(4, 3)]);
        assert_eq!(log.last(), 4);
        assert_eq!(log.term(4).unwrap(), 3);
        assert_eq!(log.bytes(), 3 * (ENTRY_OVERHEAD + 10));
    }

    #[test]
    fn compaction_keeps_the_term_before_the_first_entry() {
        let mut log = MemLog::founded(vec![1]);
        assert_eq!(log.term(FOUNDING_INDEX).unwrap(), FOUNDING_TERM);
        log.append((2..=9).map(|i| entry(i, i)).collect());
        log.compact(5);
        log.compact(3);
        assert_eq!((log.first_index().unwrap(), log.last(), log.len()), (6, 9, 4));
        assert_eq!(log.term(5).unwrap(), 5);
        assert_eq!(log.term(4), Err(Error::Store(StorageError::Compacted)));
        assert_eq!(read(&log, 5, 7, None), Err(Error::Store(StorageError::Compacted)));
        assert_eq!(read(&log, 6, 10, None).unwrap(), [6, 7, 8, 9]);
        log.compact(100);
        assert_eq!((log.last(), log.bytes()), (9, 0));
        assert_eq!(log.term(9).unwrap(), 9);
    }

    #[test]
    fn size_limits_return_at_least_one_entry() {
        let mut log = MemLog::founded(vec![1]);
        log.append((2..=9).map(|i| entry(i, 1)).collect());
        assert_eq!(read(&log, 2, 10, Some(0)).unwrap(), [2]);
        let three = 3 * (ENTRY_OVERHEAD as u64 + 10);
        assert_eq!(read(&log, 2, 10, Some(three)).unwrap(), [2, 3, 4]);
    }

    #[test]
    fn an_empty_log_and_a_restored_one() {
        let mut log = MemLog::empty();
        assert_eq!((log.first_index().unwrap(), log.last(), log.term(0).unwrap()), (1, 0, 0));
        log.restore(70, 6);
        assert_eq!((log.first_index().unwrap(), log.last(), log.term(70).unwrap()), (71, 70, 6));
        log.append(vec![entry(71, 6)]);
        log.restore(90, 7);
        assert_eq!((log.last(), log.len(), log.bytes()), (90, 0, 0));
    }

    #[test]
    fn only_what_a_member_holds_is_announced_to_it() {
        let mut log = MemLog::founded(vec![1]);
        assert!(log.snapshot(0, 4).is_err());
        assert_eq!(log.take_wanted(), BTreeSet::from([4]));
        let mut s = Snapshot::default();
        s.mut_metadata().index = 9;
        log.set_announced(4, Some(s));
        assert_eq!(log.snapshot(0, 4).unwrap().get_metadata().index, 9);
        assert!(log.snapshot(10, 4).is_err(), "an older state than was asked for");
        assert!(log.snapshot(0, 5).is_err());
        log.set_announced(4, None);
        assert!(log.snapshot(0, 4).is_err());
        assert_eq!(log.take_wanted(), BTreeSet::from([4, 5]));
    }

    #[test]
    #[should_panic(expected = "do not join")]
    fn a_hole_is_our_own_mistake() {
        MemLog::founded(vec![1]).append(vec![entry(5, 1)]);
    }
}
