//! A node's disk: what is durable, and what a crash makes of the rest.
//!
//! ```text
//!   batch --written--> waiting --synced--> logs       crash: a part of what waits, from its beginning, may be there
//!   piece --written--> files   --last one synced--> states        a file that is not whole is gone
//!     \-- a write or sync that fails: nothing is written any more, and the process ends
//!   at rest: a bit flips --restart--> noticed, if what it belongs to is still needed: a new life
//! ```
//!
//! The log is written front to back, each replica's write under a checksum: so a crash keeps whole writes, and of those
//! that were not synced the first ones; it may tear a batch. States are files of their own: a crash may keep one and lose
//! what was written to the log before it, or the reverse. What the real engine makes of damaged bytes is tested there; here
//! the log's checksums are taken for granted.

use crate::sim::rng::Rng;
use bytes::Bytes;
use crema_core::{ReplicaId, ShardId};
use crema_shard::durable::{GroupRecord, Recovered};
use crema_shard::message::{Body, KIND_RAFT, decode_envelopes};
use crema_shard::{LogWrite, PersistBatch, StateWrite};
use raft::eraftpb::{Entry, HardState, MessageType};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

/// How a disk fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// There is no room for what is written: none of it is there.
    NoSpace,
    /// A sync fails: nobody knows what is there of all that was written since the last one.
    Sync,
}

/// A failure to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trap {
    error: DiskError,
    /// Whether it waits for a state, of which there are fewer, or takes what comes first.
    states_only: bool,
}

/// What a write or sync came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// It goes on.
    Fine,
    /// It has failed just now.
    Failed(DiskError),
    /// Nothing more is written.
    Dead,
}

/// A bit at rest that is not what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rot {
    /// In the entry of this index and term.
    Log { replica: ReplicaId, index: u64, term: u64 },
    /// In a piece of the state of this index.
    State { replica: ReplicaId, index: u64, piece: usize, bit: usize },
}

/// Why a disk gives nothing back.
#[derive(Debug)]
pub(super) enum Unread {
    /// A flipped bit was noticed.
    Damaged(String),
    /// The product is to blame.
    Wrong(String),
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unread::Damaged(why) | Unread::Wrong(why) => f.write_str(why),
        }
    }
}

#[derive(Clone, Default)]
struct Log {
    record: Option<Bytes>,
    entries: BTreeMap<u64, Entry>,
    hard: HardState,
}

/// One node's disk.
#[derive(Default)]
pub(super) struct Disk {
    logs: BTreeMap<ReplicaId, Log>,
    /// Whole files, by replica and index.
    states: BTreeMap<(ReplicaId, u64), Vec<Bytes>>,
    /// Files in the making, by replica: number and pieces.
    files: BTreeMap<ReplicaId, (u64, Vec<Bytes>)>,
    waiting: VecDeque<PersistBatch>,
    /// Whether a process has begun a life on it.
    used: bool,
    trap: Option<Trap>,
    /// Whether a write of the log, or of a state, has failed under the process that runs.
    log_failed: bool,
    states_failed: bool,
    rot: Option<Rot>,
}

impl Disk {
    /// Whether a life was begun on it, which the next process goes on with.
    pub(super) fn is_used(&self) -> bool {
        self.used
    }

    /// A process writes down, before anything else, in which life it is.
    pub(super) fn use_it(&mut self) {
        self.used = true;
    }

    /// The next write fails, or the next of a state.
    pub(super) fn set_trap(&mut self, error: DiskError, states_only: bool) {
        self.trap = Some(Trap { error, states_only });
    }

    /// There is room again, and syncs succeed. Returns whether the process has met with a failure.
    pub(super) fn repair(&mut self) -> bool {
        self.trap = None;
        self.has_failed()
    }

    /// Whether it has failed under the process that runs.
    pub(super) fn has_failed(&self) -> bool {
        self.log_failed || self.states_failed
    }

    /// Whether it may fail, or has.
    pub(super) fn is_failing(&self) -> bool {
        self.trap.is_some() || self.has_failed()
    }

    /// A batch is on its way.
    pub(super) fn write(&mut self, batch: PersistBatch) -> Written {
        if self.log_failed {
            return Written::Dead;
        }
        let Some(Trap { error, .. }) = self.trap.take_if(|t| !t.states_only) else {
            self.waiting.push_back(batch);
            return Written::Fine;
        };
        self.log_failed = true;
        if error == DiskError::Sync {
            self.waiting.push_back(batch);
        }
        Written::Failed(error)
    }

    /// All batches up to `number` are durable; returns whether they are.
    pub(super) fn sync(&mut self, number: u64) -> bool {
        if self.log_failed {
            return false;
        }
        while self.waiting.front().is_some_and(|b| b.number <= number) {
            let batch = self.waiting.pop_front().expect("just seen");
            batch.writes.into_iter().for_each(|w| self.apply(w));
        }
        true
    }

    /// A vote is durable before anybody hears of it (Raft, figure 2: "updated on stable storage before responding").
    pub(super) fn check_votes(&self, frame: &Bytes, bad: &mut Vec<String>) {
        if frame.first() != Some(&KIND_RAFT) {
            return;
        }
        // A frame that does not decode is an invariant's business.
        for e in decode_envelopes(&frame.slice(1..)).unwrap_or_default() {
            let Body::Raft(m) = e.body else { continue };
            if m.msg_type != MessageType::MsgRequestVoteResponse || m.reject {
                continue;
            }
            let kept = self.logs.get(&ReplicaId(m.from)).map(|log| (log.hard.term, log.hard.vote)).unwrap_or_default();
            // In a later term it stands by what it said in an earlier one.
            if kept.0 < m.term || kept.0 == m.term && kept.1 != m.to {
                bad.push(format!(
                    "{:?}: replica {} votes for {} in term {}, but its disk keeps term {} and a vote for {}",
                    e.shard, m.from, m.to, m.term, kept.0, kept.1
                ));
            }
        }
    }

    fn apply(&mut self, w: LogWrite) {
        if w.remove {
            self.logs.remove(&w.replica);
            self.states.retain(|(replica, _), _| *replica != w.replica);
            return;
        }
        let log = self.logs.entry(w.replica).or_default();
        if w.clear {
            *log = Log::default();
        }
        log.record = w.record.or(log.record.take());
        if let Some(first) = w.entries.first() {
            log.entries.split_off(&first.index);
        }
        log.entries.extend(w.entries.into_iter().map(|e| (e.index, e)));
        if let Some(hard) = w.hard {
            log.hard = hard;
        }
        if let Some(index) = w.compact_to {
            log.entries = log.entries.split_off(&(index + 1));
        }
        if let Some(index) = w.state {
            self.states.retain(|(replica, i), _| *replica != w.replica || *i >= index);
        }
    }

    /// A piece of a state arrives; with the last one, the file is durable.
    pub(super) fn write_state(&mut self, w: StateWrite) -> Written {
        if self.states_failed {
            return Written::Dead;
        }
        if let Some(Trap { error, .. }) = self.trap.take_if(|t| t.error == DiskError::NoSpace || w.last) {
            self.states_failed = true;
            return Written::Failed(error);
        }
        let file = self.files.entry(w.replica).or_insert((w.file, Vec::new()));
        if file.0 != w.file {
            *file = (w.file, Vec::new());
        }
        assert_eq!(file.1.len(), w.seq as usize, "pieces come in order");
        file.1.push(w.piece);
        if w.last {
            let (_, pieces) = self.files.remove(&w.replica).expect("just there");
            self.states.insert((w.replica, w.index), pieces);
            let new =
                |r: &Rot| matches!(r, Rot::State { replica, index, .. } if (*replica, *index) == (w.replica, w.index));
            self.rot.take_if(|r| new(r));
        }
        Written::Fine
    }

    /// The process or the machine dies.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        let mut writes: Vec<LogWrite> = self.waiting.drain(..).flat_map(|batch| batch.writes).collect();
        writes.truncate(rng.range(0, writes.len() as u64) as usize);
        writes.into_iter().for_each(|w| self.apply(w));
        self.files.clear();
        (self.log_failed, self.states_failed) = (false, false);
    }

    /// Flips a bit of what is at rest; says where.
    pub(super) fn flip(&mut self, rng: &mut Rng) -> String {
        let entries: Vec<Rot> = self
            .logs
            .iter()
            .flat_map(|(id, log)| log.entries.values().map(|e| (*id, e.index, e.term)))
            .map(|(replica, index, term)| Rot::Log { replica, index, term })
            .collect();
        let states: Vec<_> = self.states.iter().filter(|(_, pieces)| pieces.iter().any(|p| !p.is_empty())).collect();
        let rot = if !states.is_empty() && (entries.is_empty() || rng.permille(500)) {
            let ((replica, index), pieces) = *rng.pick(&states);
            let full: Vec<usize> = (0..pieces.len()).filter(|i| !pieces[*i].is_empty()).collect();
            let piece = *rng.pick(&full);
            let bit = rng.below(8 * pieces[piece].len() as u64) as usize;
            Some(Rot::State { replica: *replica, index: *index, piece, bit })
        } else if !entries.is_empty() {
            Some(*rng.pick(&entries))
        } else {
            None
        };
        // Some of what is on a disk is not needed any more.
        let rot = rot.filter(|_| !rng.permille(250));
        self.rot = rot.or(self.rot);
        rot.map_or("garbage".to_owned(), |rot| format!("{rot:?}"))
    }

    /// Whether a bit of what is there is not what it was: a restart may notice. What was replaced is not there any more.
    pub(super) fn is_rotten(&self) -> bool {
        self.rot.is_some_and(|rot| match rot {
            Rot::Log { replica, index, term } => {
                self.logs.get(&replica).and_then(|log| log.entries.get(&index)).is_some_and(|e| e.term == term)
            }
            Rot::State { replica, index, .. } => self.states.contains_key(&(replica, index)),
        })
    }

    /// What comes back.
    pub(super) fn recover(&self) -> Result<Vec<Recovered>, Unread> {
        if let Some(rot @ Rot::Log { .. }) = self.rot.filter(|_| self.is_rotten()) {
            return Err(Unread::Damaged(format!("{rot:?}")));
        }
        let wrong = |e: String| Unread::Wrong(e);
        let mut all = Vec::new();
        for (id, log) in &self.logs {
            let Some(record) = &log.record else { continue };
            let record = GroupRecord::decode(record).map_err(|e| wrong(e.to_string()))?;
            let named = record.point().map(|p| (*id, p.index));
            let mut pieces: Vec<Bytes> = named.and_then(|n| self.states.get(&n)).cloned().unwrap_or_default();
            let shard: ShardId = record.shard;
            let mut rotten = None;
            if let Some(Rot::State { replica, index, piece, bit }) = self.rot.filter(|_| self.is_rotten())
                && named == Some((replica, index))
            {
                let mut bytes = pieces[piece].to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                pieces[piece] = bytes.into();
                rotten = Some(piece);
            }
            let pieces = pieces.into_iter().map(Ok);
            let recovered = Recovered::new(record, log.hard.clone(), log.entries.values().cloned().collect(), pieces);
            match (rotten, recovered) {
                (None, recovered) => all.push(recovered.map_err(|e| wrong(format!("{shard:?}: {e}")))?),
                (Some(_), Err(e)) => return Err(Unread::Damaged(format!("{shard:?}: {e}"))),
                // Only the file's own checksum covers the point and the meta group's table.
                (Some(piece), Ok(_)) if piece == 0 || shard.is_meta() => {
                    return Err(Unread::Damaged(format!("{shard:?}: piece {piece}")));
                }
                (Some(piece), Ok(_)) => {
                    return Err(wrong(format!("{shard:?}: a flipped bit in piece {piece} of a state goes unnoticed")));
                }
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ReplicaId = ReplicaId(1);

    /// A batch of two writes, each of one entry.
    fn batch(number: u64) -> PersistBatch {
        let write = |replica| LogWrite {
            replica,
            entries: vec![Entry { index: number, term: 1, ..Entry::default() }],
            ..LogWrite::default()
        };
        PersistBatch { number, writes: vec![write(ONE), write(ReplicaId(2))] }
    }

    /// How many writes of each replica a crash has left, for many crashes.
    fn left(before: impl Fn(&mut Disk)) -> Vec<(usize, usize)> {
        let mut seen: Vec<(usize, usize)> = (0..200)
            .map(|seed| {
                let mut disk = Disk::default();
                before(&mut disk);
                disk.crash(&mut Rng::new(seed));
                let count = |id| disk.logs.get(&ReplicaId(id)).map_or(0, |log| log.entries.len());
                (count(1), count(2))
            })
            .collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn a_crash_keeps_what_was_synced_and_may_tear_what_was_not() {
        let seen = left(|disk| {
            (1..=3).for_each(|n| assert_eq!(disk.write(batch(n)), Written::Fine));
            assert!(disk.sync(1));
        });
        assert_eq!(seen, [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]);
    }

    #[test]
    fn nothing_is_written_or_reported_behind_a_failure() {
        for (error, most) in [(DiskError::NoSpace, (2, 2)), (DiskError::Sync, (3, 3))] {
            let seen = left(|disk| {
                (1..=2).for_each(|n| assert_eq!(disk.write(batch(n)), Written::Fine));
                assert!(disk.sync(1));
                disk.set_trap(error, false);
                assert_eq!(disk.write(batch(3)), Written::Failed(error));
                assert_eq!(disk.write(batch(4)), Written::Dead);
                assert!(!disk.sync(4));
            });
            assert_eq!((seen.first(), seen.last()), (Some(&(1, 1)), Some(&most)));
        }
    }

    fn piece(seq: u32, last: bool) -> StateWrite {
        StateWrite { shard: ShardId(0), replica: ONE, file: 1, index: 9, seq, piece: Bytes::from_static(b"x"), last }
    }

    #[test]
    fn a_state_that_fails_leaves_nothing_and_does_not_stop_the_log() {
        for error in [DiskError::NoSpace, DiskError::Sync] {
            let mut disk = Disk::default();
            disk.set_trap(error, true);
            let first = disk.write_state(piece(0, false));
            if error == DiskError::Sync {
                assert_eq!(first, Written::Fine, "synced once, at its end");
                assert_eq!(disk.write_state(piece(1, true)), Written::Failed(error));
            } else {
                assert_eq!(first, Written::Failed(error));
            }
            assert_eq!(disk.write_state(piece(2, true)), Written::Dead);
            assert_eq!(disk.write(batch(1)), Written::Fine);
            assert!(disk.sync(1) && disk.has_failed() && disk.states.is_empty());
            disk.crash(&mut Rng::new(1));
            assert!(!disk.is_failing(), "another process begins anew");
        }
    }

    #[test]
    fn a_file_and_the_log_survive_independently_of_each_other() {
        let mut disk = Disk::default();
        disk.write(batch(1));
        disk.write_state(piece(0, true));
        let log_lost = (0..50).any(|seed| {
            let mut disk = Disk { waiting: disk.waiting.clone(), states: disk.states.clone(), ..Disk::default() };
            disk.crash(&mut Rng::new(seed));
            disk.logs.is_empty() && !disk.states.is_empty()
        });
        assert!(log_lost, "the file is newer, and there");
        let mut disk = Disk::default();
        disk.write_state(piece(0, false));
        disk.write(batch(1));
        disk.sync(1);
        disk.crash(&mut Rng::new(1));
        assert!(disk.states.is_empty() && !disk.logs.is_empty(), "the file is older, and gone");
    }
}
