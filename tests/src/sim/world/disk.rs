//! A node's disk: what is durable, and what a crash makes of the rest.
//!
//! ```text
//!   batch --written--> waiting --synced--> logs       crash: a part of what waits, from its beginning, may be there
//!   piece --written--> files   --last one synced--> states        a file that is not whole is gone
//! ```
//!
//! The log is written front to back, each batch under a checksum: so a crash keeps whole batches, and of those that were
//! not synced the first ones. What the real engine makes of damaged bytes is tested there; here a damaged disk is one that
//! its owner has given up, and begins a new life on.

use crate::sim::rng::Rng;
use bytes::Bytes;
use crema_core::{ReplicaId, ShardId};
use crema_shard::durable::{GroupRecord, Recovered};
use crema_shard::message::{Body, KIND_RAFT, decode_envelopes};
use crema_shard::{LogWrite, PersistBatch, StateWrite};
use raft::eraftpb::{Entry, HardState, MessageType};
use std::collections::{BTreeMap, VecDeque};

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

    /// A batch is on its way.
    pub(super) fn write(&mut self, batch: PersistBatch) {
        self.waiting.push_back(batch);
    }

    /// All batches up to `number` are durable.
    pub(super) fn sync(&mut self, number: u64) {
        while self.waiting.front().is_some_and(|b| b.number <= number) {
            let batch = self.waiting.pop_front().expect("just seen");
            batch.writes.into_iter().for_each(|w| self.apply(w));
        }
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
    pub(super) fn write_state(&mut self, w: StateWrite) {
        let file = self.files.entry(w.replica).or_insert((w.file, Vec::new()));
        if file.0 != w.file {
            *file = (w.file, Vec::new());
        }
        assert_eq!(file.1.len(), w.seq as usize, "pieces come in order");
        file.1.push(w.piece);
        if w.last {
            let (_, pieces) = self.files.remove(&w.replica).expect("just there");
            self.states.insert((w.replica, w.index), pieces);
        }
    }

    /// The process or the machine dies.
    pub(super) fn crash(&mut self, rng: &mut Rng) {
        let kept = rng.range(0, self.waiting.len() as u64) as usize;
        for batch in self.waiting.drain(..).take(kept).collect::<Vec<_>>() {
            batch.writes.into_iter().for_each(|w| self.apply(w));
        }
        self.files.clear();
    }

    /// What comes back.
    pub(super) fn recover(&self) -> Result<Vec<Recovered>, String> {
        let mut all = Vec::new();
        for (id, log) in &self.logs {
            let Some(record) = &log.record else { continue };
            let record = GroupRecord::decode(record).map_err(|e| e.to_string())?;
            let pieces = record.point().and_then(|p| self.states.get(&(*id, p.index)));
            let pieces = pieces.into_iter().flatten().cloned().map(Ok);
            let shard: ShardId = record.shard;
            let recovered = Recovered::new(record, log.hard.clone(), log.entries.values().cloned().collect(), pieces);
            all.push(recovered.map_err(|e| format!("{shard:?}: {e}"))?);
        }
        Ok(all)
    }
}
