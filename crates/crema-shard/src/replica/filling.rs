//! How a replica's state gets to a member that the log alone cannot bring up to date: see [`crate::transfer`].

use super::checkpoint::Disk;
use super::{Machine, Out, Replica};
use crate::effect::StateWrite;
use crate::members::{Member, Members};
use crate::message::snapshot_of;
use crate::meta::{MAX_STATE_BYTES, MetaMachine, MetaState};
use crate::transfer::{Chunk, ChunkAck, Due, Incoming, Outgoing, Point, Verdict};
use bytes::Bytes;
use crema_core::snapshot::{Restore, SnapshotStep};
use crema_core::{LogIndex, MonoTime, NodeId, Now, ReplicaId, StateMachine};
use raft::eraftpb::Message;
use raft::{ProgressState, SnapshotStatus};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// A state of which no piece has come for this long, and that was not announced, is forgotten: twice as long as its sender
/// tries.
const FORGET: Duration = Duration::from_secs(60);

/// In a refusal: of whatever was announced.
const NO_TRANSFER: u64 = 0;

/// A member that refused a state gets another one after this; doubled while it refuses those, too.
const REFUSED_FOR: Duration = Duration::from_secs(1);
/// The longest such time. Whatever made it refuse may have ended.
const MOST_REFUSED_FOR: Duration = Duration::from_secs(60);

/// Members that refused what they were sent. To walk a machine again at once, for ever, would help nobody: what one cannot use
/// may be what all of them will be.
#[derive(Debug, Default)]
struct Refusals(BTreeMap<ReplicaId, (Duration, MonoTime)>);

impl Refusals {
    fn refused(&mut self, by: ReplicaId, now: MonoTime) {
        let last = self.0.get(&by).map(|(wait, _)| *wait);
        let wait = last.map_or(REFUSED_FOR, |wait| (wait * 2).min(MOST_REFUSED_FOR));
        self.0.insert(by, (wait, now.after(wait)));
    }

    fn forget(&mut self, member: ReplicaId) {
        self.0.remove(&member);
    }

    fn may_be_sent(&self, to: ReplicaId, now: MonoTime) -> bool {
        self.0.get(&to).is_none_or(|(_, until)| now >= *until)
    }
}

/// A state that came whole.
struct Prepared {
    point: Point,
    machine: PreparedMachine,
}

enum PreparedMachine {
    Data(Box<StateMachine>),
    Meta(Box<MetaMachine>),
}

/// A state in the making.
enum Restoring {
    /// Of a shard: nothing but its point has come.
    DataHead,
    Data(Box<Restore>),
    Meta(Vec<u8>),
}

/// A replica's part in transfers: at most one to another member, at most one from a leader.
pub(super) struct Filling {
    chunk_bytes: usize,
    /// Number of the last transfer.
    transfers: u64,
    outgoing: Option<Outgoing>,
    refusals: Refusals,
    /// What is left of the meta state that is on its way.
    meta_rest: Bytes,
    /// Whether the machine is being walked for it.
    walks: bool,
    incoming: Option<Incoming>,
    restoring: Option<(Point, Restoring)>,
    prepared: Option<Prepared>,
    /// An announcement that waits until what was written before it is durable.
    held: Option<Message>,
    /// Number of the Ready that installed a state and is not durable yet.
    installing: Option<u64>,
}

impl Filling {
    /// `process` tells the transfers of a leader apart from those of the process before.
    pub(super) fn new(chunk_bytes: usize, process: u64) -> Self {
        Filling {
            chunk_bytes: chunk_bytes.max(1),
            transfers: process | 1,
            outgoing: None,
            refusals: Refusals::default(),
            meta_rest: Bytes::new(),
            walks: false,
            incoming: None,
            restoring: None,
            prepared: None,
            held: None,
            installing: None,
        }
    }

    pub(super) fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// Whether a state is coming from a leader.
    pub(super) fn incoming(&self) -> bool {
        self.incoming.is_some()
    }

    /// Whether a state is on its way to a member.
    pub(super) fn sends(&self) -> bool {
        self.outgoing.is_some()
    }

    /// The index that it stands for.
    pub(super) fn point(&self) -> Option<u64> {
        self.outgoing.as_ref().map(|o| o.point.index)
    }

    /// Whether a state was installed that is not durable yet.
    pub(super) fn installing(&self) -> bool {
        self.installing.is_some()
    }

    pub(super) fn has_work(&self) -> bool {
        self.outgoing.as_ref().is_some_and(|o| o.has_room() || o.has_unsent())
    }

    /// raft-rs sends MsgSnapshot to a member: the members of its point, `None` if there is no such transfer any more.
    pub(super) fn announced(&mut self, to: u64, now: Now) -> Option<&Members> {
        let outgoing = self.outgoing.as_mut().filter(|o| o.to.id.0 == to && o.complete())?;
        outgoing.announced(now.mono);
        Some(&outgoing.point.members)
    }

    /// The members have changed: ends a transfer to somebody who is none any more.
    pub(super) fn keep_if(&mut self, keep: impl Fn(ReplicaId) -> bool) {
        // Under other members a state is another one.
        self.refusals = Refusals::default();
        // What the machine walks ends with the next tick, which finds no transfer.
        self.outgoing.take_if(|o| !keep(o.to.id));
    }
}

/// What one replica sends and receives, for status and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferStatus {
    /// The member that is being filled.
    pub to: Option<ReplicaId>,
    /// Bytes of state made for it so far.
    pub sent_bytes: u64,
    /// Whether this replica receives a state.
    pub receives: bool,
    /// Bytes that the transfers hold in memory beside the state itself.
    pub held_bytes: u64,
}

impl Replica {
    /// Transfers at present.
    pub fn transfer_status(&self) -> TransferStatus {
        let outgoing = self.filling.outgoing.as_ref();
        let walked = match &self.machine {
            Machine::Data(m) => m.snapshot_pending_bytes(),
            Machine::Meta(_) => 0,
        };
        let restoring = match &self.filling.restoring {
            Some((_, Restoring::Data(r))) => r.bytes(),
            Some((_, Restoring::Meta(bytes))) => bytes.len() as u64,
            _ => 0,
        };
        TransferStatus {
            to: outgoing.map(|o| o.to.id),
            sent_bytes: outgoing.map_or(0, Outgoing::bytes),
            receives: self.filling.restoring.is_some(),
            held_bytes: outgoing.map_or(0, Outgoing::window_bytes) + walked + restoring,
        }
    }

    // ---- the leader's side -------------------------------------------------------------------------------------

    /// Once a tick, where it leads: begins what raft-rs has asked for, ends what does not move.
    pub(super) fn keep_filling(&mut self, may_begin: bool, now: Now) {
        let Some(outgoing) = self.filling.outgoing.as_mut() else {
            self.abandon_walk();
            if may_begin {
                self.begin_filling(now.mono);
            }
            return;
        };
        let (to, index) = (outgoing.to.id.0, outgoing.point.index);
        let progress = self.raw.raft.prs().get(to);
        // It has the point, by this state or by the log. The log behind that is kept until it has caught up, or else it
        // would need another state at once.
        let arrived = progress.is_none_or(|p| p.matched >= index && p.state != ProgressState::Snapshot);
        let due = outgoing.tick(now.mono);
        let gone = progress.is_none() || self.raw.store().truncated() > index;
        if arrived {
            self.filling.refusals.forget(ReplicaId(to));
        }
        match due {
            // Its log was cut, so it is of no use, or of no more.
            _ if gone => self.stop_filling(),
            _ if arrived && (self.caught_up(ReplicaId(to)) || due == Due::GiveUp) => self.stop_filling(),
            _ if arrived => {}
            Due::Nothing => {}
            Due::AnnounceAgain => self.raw.report_snapshot(to, SnapshotStatus::Failure),
            Due::GiveUp => self.stop_filling(),
        }
    }

    fn begin_filling(&mut self, now: MonoTime) {
        let wanted = self.raw.mut_store().take_wanted();
        let member = |id: &u64| self.members.get(ReplicaId(*id));
        let refusals = &self.filling.refusals;
        // The others will be wanted again with their next answers.
        let Some(to) = wanted.iter().filter_map(member).find(|m| refusals.may_be_sent(m.id, now)) else { return };
        let index = self.applied().0;
        let Ok(term) = self.raw.raft.raft_log.term(index) else { return };
        let begun = match &mut self.machine {
            Machine::Data(m) => m.begin_snapshot().map(|head| (head, Bytes::new())),
            Machine::Meta(m) => Some((Bytes::new(), m.state().encode().into())),
        };
        let Some((head, rest)) = begun else { return };
        self.filling.walks = matches!(self.machine, Machine::Data(_));
        self.filling.transfers = self.filling.transfers.wrapping_add(2);
        let point = Point { index, term, members: self.members.clone() };
        let mut outgoing = Outgoing::new(self.shard, self.id, to, self.filling.transfers, point, now);
        if !head.is_empty() {
            outgoing.push(self.shard, self.id, head, false);
        }
        self.filling.meta_rest = rest;
        self.filling.outgoing = Some(outgoing);
        self.quiet_ticks = 0;
    }

    /// Ends the transfer under way, if there is one.
    pub(super) fn stop_filling(&mut self) {
        if let Some(outgoing) = self.filling.outgoing.take() {
            // Else raft-rs would wait for ever for the answer to a MsgSnapshot that may have been lost.
            self.raw.report_snapshot(outgoing.to.id.0, SnapshotStatus::Failure);
        }
        self.filling.meta_rest = Bytes::new();
        self.raw.mut_store().forget_snapshots();
        self.abandon_walk();
    }

    /// Ends the walk of the machine, unless it is another's.
    fn abandon_walk(&mut self) {
        if std::mem::take(&mut self.filling.walks)
            && let Machine::Data(m) = &mut self.machine
        {
            m.abandon_snapshot();
        }
    }

    /// Makes a piece of the state and sends what has not been sent. One piece a round: a round stays short.
    pub(super) fn fill(&mut self, now: Now, out: &mut Out) {
        let Some(outgoing) = self.filling.outgoing.as_mut() else { return };
        if outgoing.has_room() {
            let made = match &mut self.machine {
                Machine::Data(m) => match m.snapshot_step(self.filling.chunk_bytes) {
                    SnapshotStep::Chunk(data) => Some(Some((data, false))),
                    SnapshotStep::Done(data) => Some(Some((data, true))),
                    SnapshotStep::Sweeping => None,
                    SnapshotStep::Idle => Some(None),
                },
                Machine::Meta(_) => {
                    let rest = &mut self.filling.meta_rest;
                    let piece = rest.split_to(rest.len().min(self.filling.chunk_bytes));
                    Some(Some((piece, rest.is_empty())))
                }
            };
            match made {
                Some(Some((data, last))) => outgoing.push(self.shard, self.id, data, last),
                Some(None) => return self.stop_filling(),
                // Nothing yet: it has looked through empty parts.
                None => {}
            }
        }
        let to = outgoing.to;
        out.chunks.extend(outgoing.take_unsent(now.mono).into_iter().map(|chunk| (to, chunk)));
    }

    /// A receiver says what it has.
    pub fn chunk_acked(&mut self, from: NodeId, ack: ChunkAck, now: Now) {
        let Some(outgoing) = self.filling.outgoing.as_mut() else { return };
        if ack.from != outgoing.to.id || from != outgoing.to.node || self.failed {
            return;
        }
        let refused = match ack.verdict {
            // It had everything, and has lost it with its process.
            _ if ack.transfer == NO_TRANSFER => outgoing.complete(),
            _ if ack.transfer != outgoing.id => return,
            // Once it has everything, what it refuses or lacks is a copy of an old piece.
            Verdict::Refused => !outgoing.complete(),
            Verdict::Gap => {
                // Nor is it a refusal if it has lost what it had: it may well take another state, and at once.
                if !outgoing.complete() && outgoing.gap(ack.next) {
                    self.stop_filling();
                }
                return;
            }
            Verdict::Going | Verdict::Complete => false,
        };
        if refused {
            self.filling.refusals.refused(ack.from, now.mono);
            return self.stop_filling();
        }
        if ack.verdict == Verdict::Refused {
            return;
        }
        if outgoing.acknowledged(ack.next, ack.verdict == Verdict::Complete, now.mono) {
            let (to, point) = (outgoing.to.id.0, outgoing.point.clone());
            let snapshot = snapshot_of(point.index, point.term, &point.members);
            self.raw.mut_store().set_announced(to, Some(snapshot));
            self.abandon_walk();
        }
    }

    /// Chunks that were sent to this node's streams may be lost.
    pub fn filling_interrupted(&mut self, node: NodeId) {
        if let Some(outgoing) = self.filling.outgoing.as_mut().filter(|o| o.to.node == node) {
            outgoing.interrupted();
        }
    }

    // ---- the receiver's side -----------------------------------------------------------------------------------

    /// Takes a piece of a state from a replica that may lead.
    pub fn take_chunk(&mut self, sender: Member, chunk: &Chunk, now: MonoTime, out: &mut Out) {
        if self.failed || !self.hears(sender) {
            return;
        }
        let f = &mut self.filling;
        if let Some(incoming) = &mut f.incoming {
            incoming.last_piece = now;
        }
        let known = f.incoming.as_ref().is_some_and(|i| i.from == chunk.from && i.transfer == chunk.transfer);
        if !known {
            if self.raw.snap().is_some_and(|s| !s.is_empty()) {
                // raft-rs has taken the state that is here: nothing may take its place before it is installed.
                return;
            }
            if chunk.seq != 0 {
                // The beginning is not here: lost on its way, with an earlier process, or to a new leader's transfer that has
                // taken its place. The sender knows whether it was ever here.
                return self.acknowledge(sender, chunk.transfer, 0, Verdict::Gap, out);
            }
            f.prepared = None;
            f.restoring = None;
            f.held = None;
            let file = self.disk.as_mut().map(Disk::next_file);
            f.incoming = Some(Incoming {
                sender,
                from: chunk.from,
                transfer: chunk.transfer,
                next: 0,
                complete: false,
                file,
                index: 0,
                written: 0,
                last_piece: now,
            });
            // One file at a time; this state is newer than any that could be written here.
            self.stop_checkpoint();
        }
        let Some(incoming) = self.filling.incoming.as_mut() else { return };
        let mut verdict = Verdict::Going;
        if chunk.seq == incoming.next && !incoming.complete {
            match self.restore_piece(chunk) {
                Ok(complete) => {
                    let index = self.filling.restoring.as_ref().map(|(p, _)| p.index);
                    let index = index.or(self.filling.prepared.as_ref().map(|p| p.point.index)).unwrap_or(0);
                    if let Some(incoming) = &mut self.filling.incoming {
                        incoming.next += 1;
                        incoming.complete = complete;
                        incoming.index = index;
                        if let Some(file) = incoming.file {
                            // Acknowledged when it is written.
                            let (shard, replica, seq, last) = (self.shard, self.id, chunk.seq, chunk.last);
                            let piece = chunk.data.clone();
                            out.states.push(StateWrite { shard, replica, file, index, seq, piece, last });
                            return;
                        }
                    }
                }
                Err(reason) => {
                    tracing::warn!(shard = %self.shard, from = %chunk.from, %reason, "a state that cannot be used");
                    self.filling.restoring = None;
                    self.filling.incoming = None;
                    verdict = Verdict::Refused;
                }
            }
        }
        if let Some(incoming) = self.filling.incoming.filter(|i| chunk.seq > i.next) {
            return self.acknowledge(sender, chunk.transfer, incoming.next, Verdict::Gap, out);
        }
        let (next, complete) = self.filling.incoming.map_or((0, false), |i| i.acknowledged());
        if complete {
            verdict = Verdict::Complete;
        }
        self.acknowledge(sender, chunk.transfer, next, verdict, out);
    }

    fn acknowledge(&self, to: Member, transfer: u64, next: u32, verdict: Verdict, out: &mut Out) {
        let ack = ChunkAck { shard: self.shard, from: self.id, to: to.id, transfer, next, verdict };
        out.chunk_acks.push((to, ack));
    }

    /// Forgets a state of which no piece has come for a while: its sender is gone, or has given it up.
    pub(super) fn expire_incoming(&mut self, now: MonoTime) {
        let f = &mut self.filling;
        let taken = self.raw.snap().is_some_and(|s| !s.is_empty());
        if !taken && f.incoming.is_some_and(|i| now.since(i.last_piece) >= FORGET) {
            f.incoming = None;
            f.restoring = None;
            f.prepared = None;
            f.held = None;
        }
    }

    /// A piece of a state that comes from a leader was written to its file.
    pub(super) fn filled_piece_written(&mut self, file: u64, seq: u32, out: &mut Out) {
        let Some(incoming) = self.filling.incoming.as_mut().filter(|i| i.file == Some(file)) else { return };
        incoming.written = incoming.written.max(seq + 1);
        let (sender, transfer) = (incoming.sender, incoming.transfer);
        let (next, complete) = incoming.acknowledged();
        let verdict = if complete { Verdict::Complete } else { Verdict::Going };
        self.acknowledge(sender, transfer, next, verdict, out);
    }

    /// Adds a piece to the state in the making; whether that was the last one.
    fn restore_piece(&mut self, chunk: &Chunk) -> Result<bool, String> {
        if chunk.seq == 0 {
            let point: Point = postcard::from_bytes(&chunk.data).map_err(|e| e.to_string())?;
            // Through the decoder, which checks it.
            let members = Members::decode(&point.members.encode()).map_err(|e| e.to_string())?;
            if members.get(self.id).is_none() || point.index <= self.applied().0 || chunk.last {
                return Err("it is not for this replica, or older than what it has".to_owned());
            }
            let restoring = match self.machine {
                Machine::Data(_) => Restoring::DataHead,
                Machine::Meta(_) => Restoring::Meta(Vec::new()),
            };
            self.filling.restoring = Some((point, restoring));
            return Ok(false);
        }
        let Some((point, restoring)) = self.filling.restoring.take() else { return Err("no beginning".to_owned()) };
        let machine = match restoring {
            Restoring::DataHead => {
                let restore = Restore::begin(&chunk.data).map_err(|e| e.to_string())?;
                if restore.applied() != LogIndex(point.index) {
                    return Err(format!("a state of index {} for one of {}", restore.applied(), point.index));
                }
                self.filling.restoring = Some((point, Restoring::Data(Box::new(restore))));
                return Ok(false);
            }
            Restoring::Data(mut restore) => {
                let complete = restore.chunk(&chunk.data).map_err(|e| e.to_string())?;
                if complete != chunk.last {
                    return Err("its end is not where it was said to be".to_owned());
                }
                if !complete {
                    self.filling.restoring = Some((point, Restoring::Data(restore)));
                    return Ok(false);
                }
                PreparedMachine::Data(Box::new(restore.finish().map_err(|e| e.to_string())?))
            }
            Restoring::Meta(mut bytes) => {
                if bytes.len() + chunk.data.len() > MAX_STATE_BYTES {
                    return Err("a table beyond its bound".to_owned());
                }
                bytes.extend_from_slice(&chunk.data);
                if !chunk.last {
                    self.filling.restoring = Some((point, Restoring::Meta(bytes)));
                    return Ok(false);
                }
                let state = MetaState::decode(&bytes).map_err(|e| e.to_string())?;
                state.check()?;
                PreparedMachine::Meta(Box::new(MetaMachine::new(Arc::new(state), LogIndex(point.index))))
            }
        };
        self.filling.prepared = Some(Prepared { point, machine });
        Ok(true)
    }

    /// Looks at a MsgSnapshot before raft-rs does: without the state that it announces it must not be taken. It waits
    /// until what was written before is durable, since raft-rs forgets that at once.
    pub(super) fn take_announcement(&mut self, m: Message, out: &mut Out) -> Option<Message> {
        let fits = |p: &Prepared| {
            p.point.index == m.index && p.point.term == m.log_term && p.point.members.encode() == m.context[..]
        };
        // raft-rs answers an old one with what is committed here.
        let old = m.index <= self.raw.raft.raft_log.committed;
        let stored = self.filling.incoming.is_some_and(|i| i.acknowledged().1);
        let ready = stored && self.filling.prepared.as_ref().is_some_and(fits);
        if !old && !ready {
            if let Some(sender) = self.member(m.from) {
                self.acknowledge(sender, NO_TRANSFER, 0, Verdict::Refused, out);
            }
            return None;
        }
        if !old && !self.unpersisted.is_empty() {
            self.filling.held = Some(m);
            return None;
        }
        Some(m)
    }

    /// Steps an announcement that had to wait.
    pub(super) fn step_held_announcement(&mut self, out: &mut Out) {
        if self.unpersisted.is_empty()
            && let Some(m) = self.filling.held.take().and_then(|m| self.take_announcement(m, out))
        {
            let _ = self.raw.step(m);
            self.fix_election_timeout();
            self.drop_unused_state();
        }
    }

    /// Forgets a state that came whole when the log has passed its point.
    pub(super) fn drop_unused_state(&mut self) {
        let f = &mut self.filling;
        let committed = self.raw.raft.raft_log.committed;
        if self.raw.snap().is_none() && f.prepared.as_ref().is_some_and(|p| p.point.index <= committed) {
            f.prepared = None;
            f.incoming = None;
        }
    }

    /// raft-rs has taken a snapshot: what was prepared takes the place of everything there was.
    pub(super) fn install(&mut self, index: u64, term: u64, ready: u64, out: &mut Out) {
        let prepared = self.filling.prepared.take().filter(|p| (p.point.index, p.point.term) == (index, term));
        let Some(Prepared { point, machine }) = prepared else {
            return self.fail(format!("raft-rs took a state at {index} that is not here"), out);
        };
        self.filling.incoming = None;
        self.filling.walks = false;
        self.filling.installing = Some(ready);
        self.raw.mut_store().restore(index, term);
        match (&mut self.machine, machine) {
            // Freeing a million keys takes longer than a round may.
            (Machine::Data(own), PreparedMachine::Data(new)) => out.garbage.push(own.install(*new)),
            (Machine::Meta(own), PreparedMachine::Meta(new)) => {
                *own = new;
                out.meta_changed = true;
            }
            _ => return self.fail("a state of the wrong kind".to_owned(), out),
        }
        self.empty = false;
        self.applied_term = crema_core::Term(term);
        self.members = point.members;
        self.members_changed();
        out.roles.push(self.shard);
    }

    /// Readies up to `number` are durable.
    pub(super) fn installed(&mut self, number: u64) {
        if self.filling.installing.is_some_and(|n| n <= number) {
            self.filling.installing = None;
            self.raw.advance_apply_to(self.applied().0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::{ReadMode, ReplicaInit};
    use crate::timing::Timing;
    use crema_core::{Epoch, Incarnation, LogTime, ShardId, ShardInit, SlotRange, WallTime};
    use raft::Storage;

    const SHARD: ShardId = ShardId(1);

    fn at(ms: u64) -> Now {
        Now { mono: MonoTime(ms * 1_000_000), wall: WallTime(ms) }
    }

    fn member(n: u64) -> Member {
        Member { id: ReplicaId(n), node: NodeId(n), incarnation: Incarnation(1) }
    }

    fn members() -> Members {
        Members { voters: vec![member(1), member(2)], epoch: Epoch(1), ..Members::default() }
    }

    fn machine(applied: u64) -> StateMachine {
        let range = SlotRange { start: 0, end: 9 };
        let applied = LogIndex(applied);
        StateMachine::new(ShardInit { range, epoch: Epoch(1), secret: 5, log_time: LogTime(7), applied })
    }

    fn init(id: u64, applied: u64, durable: bool) -> ReplicaInit {
        ReplicaInit {
            shard: SHARD,
            id: ReplicaId(id),
            members: Members::default(),
            machine: Machine::Data(Box::new(machine(applied))),
            log_time: LogTime(7),
            timing: Timing::default(),
            max_log_bytes: 1 << 20,
            context_prefix: 1,
            read_mode: ReadMode::Lease,
            chunk_bytes: 64,
            checkpoint_log_bytes: durable.then_some(1 << 20),
            eviction: None,
        }
    }

    fn logger() -> slog::Logger {
        slog::Logger::root(slog::Discard, slog::o!())
    }

    fn piece(seq: u32, data: Bytes, last: bool) -> Chunk {
        Chunk { shard: SHARD, from: ReplicaId(1), to: ReplicaId(2), transfer: 9, seq, last, data }
    }

    /// The pieces of a small state, and a receiver without one.
    fn state() -> Vec<Chunk> {
        let point = Point { index: 5, term: 1, members: members() };
        let mut m = machine(5);
        let mut data = vec![(postcard::to_stdvec(&point).unwrap().into(), false)];
        data.push((m.begin_snapshot().unwrap(), false));
        loop {
            match m.snapshot_step(64) {
                SnapshotStep::Chunk(d) => data.push((d, false)),
                SnapshotStep::Done(d) => {
                    data.push((d, true));
                    break;
                }
                SnapshotStep::Sweeping => {}
                SnapshotStep::Idle => unreachable!("it was begun"),
            }
        }
        data.into_iter().zip(0..).map(|((d, last), seq)| piece(seq, d, last)).collect()
    }

    fn take(r: &mut Replica, chunk: &Chunk) -> Vec<(u32, Verdict)> {
        let mut out = Out::default();
        r.take_chunk(member(1), chunk, at(1).mono, &mut out);
        out.chunk_acks.iter().map(|(_, a)| (a.next, a.verdict)).collect()
    }

    #[test]
    fn a_receiver_tells_of_a_gap_and_repeats_itself_otherwise() {
        let chunks = state();
        let last = chunks.len() as u32;
        assert!(last >= 3, "the point, a head, and something behind it");
        let mut r = Replica::empty(init(2, 0, false), &logger(), at(0)).unwrap();
        assert_eq!(take(&mut r, &chunks[1]), [(0, Verdict::Gap)], "the beginning is lost");
        assert_eq!(take(&mut r, &chunks[0]), [(1, Verdict::Going)]);
        assert_eq!(take(&mut r, &chunks[2]), [(1, Verdict::Gap)]);
        assert_eq!(take(&mut r, &chunks[0]), [(1, Verdict::Going)], "a copy");
        for c in &chunks[1..] {
            let verdict = if c.last { Verdict::Complete } else { Verdict::Going };
            assert_eq!(take(&mut r, c), [(c.seq + 1, verdict)]);
        }
        assert_eq!(take(&mut r, &chunks[1]), [(last, Verdict::Complete)]);
    }

    #[test]
    fn on_disk_a_gap_counts_from_what_was_received() {
        let chunks = state();
        let mut r = Replica::empty(init(2, 0, true), &logger(), at(0)).unwrap();
        assert_eq!(take(&mut r, &chunks[0]), [], "acknowledged when it is written");
        assert_eq!(take(&mut r, &chunks[2]), [(1, Verdict::Gap)], "not 0, which is only not written yet");
        assert_eq!(take(&mut r, &chunks[0]), [(0, Verdict::Going)], "a copy is no gap");
        assert_eq!(take(&mut r, &chunks[1]), []);
    }

    #[test]
    fn a_member_that_refuses_is_asked_again_less_and_less_often() {
        let machine = Machine::Data(Box::new(machine(crate::log_store::FOUNDING_INDEX)));
        let founded = ReplicaInit { members: members(), machine, ..init(1, 0, false) };
        let mut r = Replica::founded(founded, true, &logger(), at(0)).unwrap();
        let mut now = 0;
        // When the next transfer begins, after the last one was refused.
        let begins = |r: &mut Replica, now: &mut u64| {
            let refused_at = *now;
            loop {
                // raft-rs asks with each answer to a heartbeat.
                let _ = r.raw.store().snapshot(0, 2);
                r.keep_filling(true, at(*now));
                if r.filling.outgoing.is_some() {
                    return *now - refused_at;
                }
                *now += 100;
                assert!(*now - refused_at < 120_000);
            }
        };
        let refuse = |r: &mut Replica, now: u64| {
            let transfer = r.filling.transfers;
            let verdict = Verdict::Refused;
            let ack = ChunkAck { shard: SHARD, from: ReplicaId(2), to: ReplicaId(1), transfer, next: 0, verdict };
            r.chunk_acked(NodeId(2), ack, at(now));
            assert!(r.filling.outgoing.is_none());
        };
        let mut waits = Vec::new();
        for _ in 0..9 {
            waits.push(begins(&mut r, &mut now));
            refuse(&mut r, now);
        }
        assert_eq!(waits, [0, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]);
        // Success.
        begins(&mut r, &mut now);
        let index = r.filling.point().unwrap();
        let progress = r.raw.raft.mut_prs().get_mut(2).unwrap();
        progress.matched = index;
        r.keep_filling(false, at(now));
        r.stop_filling();
        assert_eq!(begins(&mut r, &mut now), 0);
        refuse(&mut r, now);
        assert_eq!(begins(&mut r, &mut now), 1_000, "as at first");
        // Other members.
        refuse(&mut r, now);
        r.members_changed();
        assert_eq!(begins(&mut r, &mut now), 0);
    }
}
