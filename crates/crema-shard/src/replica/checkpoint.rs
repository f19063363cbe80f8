//! What a replica writes to disk: its log with every Ready, and now and then its state, so that the log may be cut there.
//!
//! ```text
//!   log beyond the limit --begin--> pieces, a few on their way --file durable--> record names it, log behind it is cut
//!   state from a leader ----------> pieces, acknowledged once written ---------> durable: it may be installed
//! ```

use super::{Machine, Out, Replica};
use crate::durable::{GroupRecord, Start};
use crate::effect::{LogWrite, StateWrite};
use crate::log_store::FOUNDING_INDEX;
use crate::transfer::Point;
use bytes::Bytes;
use crema_core::mutant::{Mutant, planted};
use crema_core::snapshot::SnapshotStep;
use crema_core::{ReplicaId, ShardInit};
use raft::eraftpb::{Entry, HardState};

/// Pieces that are on their way to a file.
const WINDOW: u32 = 4;

/// A file that is being written from this replica's own machine.
#[derive(Debug)]
struct Checkpoint {
    file: u64,
    point: Point,
    /// Pieces made, and pieces written.
    made: u32,
    written: u32,
    /// Whether the last one was made.
    whole: bool,
    bytes: u64,
    /// What is left of the meta state.
    meta_rest: Bytes,
    /// Whether the head of a shard's state has still to be written, which comes after the point.
    head: Option<Bytes>,
}

/// What a replica keeps on disk.
#[derive(Debug)]
pub(super) struct Disk {
    /// Bytes of log that are kept before a new state is written, at least.
    limit: u64,
    /// Bytes of log since the last one, and bytes of that one.
    log_bytes: u64,
    state_bytes: u64,
    /// Number of the last file.
    files: u64,
    checkpoint: Option<Checkpoint>,
    /// Whether the engine wants old parts of the log to go.
    asked: bool,
    /// Index of the last change of members whose commitment is not durable yet.
    members_at: Option<u64>,
    /// Whether this replica begins its group, and what it begins with is not durable yet.
    begins: bool,
    /// Replicas of the groups before, which go when that is durable.
    supersedes: Vec<ReplicaId>,
}

impl Disk {
    pub(super) fn new(limit: u64) -> Self {
        Disk {
            limit,
            log_bytes: 0,
            state_bytes: 0,
            files: 0,
            checkpoint: None,
            asked: false,
            members_at: None,
            begins: false,
            supersedes: Vec::new(),
        }
    }

    /// That of a replica that begins its group at `index`: it has nothing there yet, and does nothing before it has.
    pub(super) fn beginning(limit: u64, index: u64) -> Self {
        Disk { asked: true, log_bytes: 1, members_at: Some(index), begins: true, ..Disk::new(limit) }
    }

    pub(super) fn begins(&self) -> bool {
        self.begins
    }

    pub(super) fn next_file(&mut self) -> u64 {
        self.files += 1;
        self.files
    }

    pub(super) fn has_work(&self) -> bool {
        self.checkpoint.as_ref().is_some_and(|c| !c.whole && c.made - c.written < WINDOW)
    }
}

impl Replica {
    /// With its own beginning, what is on disk of those replicas becomes void.
    pub fn supersedes(&mut self, before: Vec<ReplicaId>) {
        if let Some(disk) = &mut self.disk {
            disk.supersedes = before;
        }
    }

    /// The replicas whose logs are on disk because of this one: its own, and those that it has not superseded yet.
    pub fn on_disk(&self) -> Vec<ReplicaId> {
        self.disk.iter().flat_map(|d| d.supersedes.iter().copied().chain([self.id])).collect()
    }

    /// Whether it begins its group, and what it begins with is not durable yet.
    pub fn begins(&self) -> bool {
        self.disk.as_ref().is_some_and(Disk::begins)
    }

    /// Whether it keeps its log on disk.
    pub fn is_durable(&self) -> bool {
        self.disk.is_some()
    }

    /// Takes note of what was on disk when it came back.
    pub(super) fn recover_disk(&mut self, log_bytes: u64) {
        if let Some(disk) = &mut self.disk {
            disk.log_bytes = log_bytes;
            disk.state_bytes = match &self.machine {
                Machine::Data(m) => m.bytes(),
                Machine::Meta(_) => 0,
            };
        }
    }

    /// The record of a newly founded replica, as a write of its own.
    pub fn founding_write(&self) -> LogWrite {
        let members = self.members.clone();
        let start = match &self.machine {
            Machine::Data(m) => {
                let ShardInit { range, epoch, secret, log_time, .. } = m.init();
                Start::FoundedShard { members, range, epoch, secret, log_time }
            }
            Machine::Meta(m) => Start::FoundedMeta { members, state: m.state().encode() },
        };
        let record = GroupRecord { shard: self.shard, id: self.id, start };
        LogWrite {
            replica: self.id,
            clear: true,
            record: Some(record.encode()),
            hard: Some(self.raw.raft.hard_state()),
            compact_to: Some(FOUNDING_INDEX),
            ..LogWrite::default()
        }
    }

    /// Writes what one Ready has to make durable. `installed`: the index of a state that it installs, whose file is
    /// durable already.
    pub(super) fn write_log(&mut self, installed: Option<u64>, entries: &[Entry], out: &mut Out) {
        let (term, members) = (self.applied_term.0, &self.members);
        let Some(disk) = &mut self.disk else { return };
        let record = installed.map(|index| {
            let start = Start::At(Point { index, term, members: members.clone() });
            disk.log_bytes = 0;
            disk.checkpoint = None;
            GroupRecord { shard: self.shard, id: self.id, start }.encode()
        });
        disk.log_bytes += entries.iter().map(|e| (e.data.len() + 64) as u64).sum::<u64>();
        out.writes.push(LogWrite {
            replica: self.id,
            clear: installed.is_some(),
            record,
            entries: entries.to_vec(),
            // The whole of it, commit index included: that tells what was committed before a restart.
            hard: Some(match planted(Mutant::ForgottenVote) {
                false => self.raw.raft.hard_state(),
                true => HardState { vote: 0, ..self.raw.raft.hard_state() },
            }),
            compact_to: None,
            remove: false,
            state: installed,
        });
    }

    /// A change of members was applied at `index`. That it was committed has to be durable before anybody relies on it: a
    /// group that came back knowing only the members before might wait for ever for the votes of some that are gone.
    pub(super) fn write_members(&mut self, index: u64, out: &mut Out) {
        let Some(disk) = &mut self.disk else { return };
        disk.members_at = Some(index);
        let hard = Some(self.raw.raft.hard_state());
        out.writes.push(LogWrite { replica: self.id, hard, ..LogWrite::default() });
        out.members_written.push((self.shard, index));
    }

    /// What [`Replica::members`] says of an index is durable.
    pub fn members_durable(&mut self, index: u64) {
        if let Some(disk) = &mut self.disk {
            disk.members_at.take_if(|at| *at <= index);
            disk.begins &= disk.members_at.is_some();
        }
    }

    /// Whether the members as it knows them would be the same after a restart.
    pub fn knows_members_for_good(&self) -> bool {
        self.disk.as_ref().is_none_or(|d| d.members_at.is_none())
    }

    /// The engine has old files that this replica's log holds back.
    pub fn ask_checkpoint(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.asked = true;
            // One that sleeps would never get to it.
            self.wake();
        }
    }

    /// Whether it is writing its state to a file.
    pub fn checkpoints(&self) -> bool {
        self.disk.as_ref().is_some_and(|d| d.checkpoint.is_some())
    }

    /// Once a tick: begins a file when the log behind the last one has grown as large as it, or as the limit.
    pub(super) fn keep_checkpoint(&mut self, may_begin: bool, out: &mut Out) {
        let (applied, shard) = (self.applied(), self.shard);
        let Some(disk) = self.disk.as_mut().filter(|d| d.checkpoint.is_none()) else { return };
        let due = disk.log_bytes > disk.limit.max(disk.state_bytes) || (disk.asked && disk.log_bytes > 0);
        let busy = self.filling.sends() || self.filling.installing() || self.filling.incoming();
        if !due || self.empty || busy || !may_begin {
            return;
        }
        let Ok(term) = self.raw.raft.raft_log.term(applied.0) else { return };
        let (head, meta_rest) = match &mut self.machine {
            Machine::Data(m) => match m.begin_snapshot() {
                Some(head) => (Some(head), Bytes::new()),
                // An earlier walk is not over; the next tick tries again.
                None => return,
            },
            Machine::Meta(m) => (None, m.state().encode().into()),
        };
        tracing::debug!(%shard, index = applied.0, "a state is written to disk");
        let file = disk.next_file();
        let point = Point { index: applied.0, term, members: self.members.clone() };
        disk.asked = false;
        if planted(Mutant::CutBeforeState) {
            let record = GroupRecord { shard, id: self.id, start: Start::At(point.clone()) }.encode();
            let (index, record) = (Some(point.index), Some(record));
            out.writes.push(LogWrite {
                replica: self.id,
                record,
                compact_to: index,
                state: index,
                ..LogWrite::default()
            });
        }
        disk.checkpoint =
            Some(Checkpoint { file, point, made: 0, written: 0, whole: false, bytes: 0, meta_rest, head });
    }

    /// Ends the file that is being written, if there is one.
    pub(super) fn stop_checkpoint(&mut self) {
        let stopped = self.disk.as_mut().and_then(|d| d.checkpoint.take());
        if stopped.is_some_and(|c| !c.whole)
            && let Machine::Data(m) = &mut self.machine
        {
            m.abandon_snapshot();
        }
    }

    /// Makes a piece of the state for the file. One a round: a round stays short.
    pub(super) fn checkpoint(&mut self, out: &mut Out) {
        let Some(disk) = self.disk.as_mut().filter(|d| d.has_work()) else { return };
        let Some(c) = &mut disk.checkpoint else { return };
        let chunk_bytes = self.filling.chunk_bytes();
        let made = if c.made == 0 {
            Some((postcard::to_stdvec(&c.point).expect("derived serializers of plain data do not fail").into(), false))
        } else if let Some(head) = c.head.take() {
            Some((head, false))
        } else {
            match &mut self.machine {
                Machine::Data(m) => match m.snapshot_step(chunk_bytes) {
                    SnapshotStep::Chunk(piece) => Some((piece, false)),
                    SnapshotStep::Done(piece) => Some((piece, true)),
                    SnapshotStep::Sweeping => None,
                    SnapshotStep::Idle => {
                        // The walk was taken away, by a state from a leader.
                        disk.checkpoint = None;
                        return;
                    }
                },
                Machine::Meta(_) => {
                    let piece = c.meta_rest.split_to(c.meta_rest.len().min(chunk_bytes));
                    Some((piece, c.meta_rest.is_empty()))
                }
            }
        };
        let Some((piece, last)) = made else { return };
        c.bytes += piece.len() as u64;
        let (file, index, seq) = (c.file, c.point.index, c.made);
        c.made += 1;
        c.whole = last;
        out.states.push(StateWrite { shard: self.shard, replica: self.id, file, index, seq, piece, last });
    }

    /// A piece was written, and with the last one the whole file is durable.
    pub fn state_written(&mut self, file: u64, seq: u32, out: &mut Out) {
        if self.failed {
            return;
        }
        self.filled_piece_written(file, seq, out);
        let Some(disk) = &mut self.disk else { return };
        let Some(c) = disk.checkpoint.as_mut().filter(|c| c.file == file) else { return };
        c.written = c.written.max(seq + 1);
        if !c.whole || c.written < c.made {
            return;
        }
        let Some(c) = disk.checkpoint.take() else { return };
        disk.state_bytes = c.bytes;
        // What was written to the log meanwhile stays; a little of it was counted before the walk began.
        disk.log_bytes = 0;
        let index = c.point.index;
        let record = GroupRecord { shard: self.shard, id: self.id, start: Start::At(c.point) };
        if disk.begins {
            out.members_written.push((self.shard, index));
        }
        let superseded = std::mem::take(&mut disk.supersedes);
        out.writes.push(LogWrite {
            replica: self.id,
            record: Some(record.encode()),
            compact_to: Some(index),
            state: Some(index),
            ..LogWrite::default()
        });
        // In one batch with what takes its place.
        out.writes.extend(superseded.into_iter().map(|replica| LogWrite {
            replica,
            remove: true,
            ..LogWrite::default()
        }));
    }
}
