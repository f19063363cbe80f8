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
use std::sync::Arc;
use std::time::Duration;

/// A state of which no piece has come for this long, and that was not announced, is forgotten: twice as long as its sender
/// tries.
const FORGET: Duration = Duration::from_secs(60);

/// In a refusal: of whatever was announced.
const NO_TRANSFER: u64 = 0;

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

    /// Ends a transfer to somebody who is no member any more.
    pub(super) fn keep_if(&mut self, keep: impl Fn(ReplicaId) -> bool) {
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
        // The others will be wanted again with their next answers.
        let Some(to) = wanted.iter().find_map(member) else { return };
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
        if ack.transfer == NO_TRANSFER && outgoing.complete() {
            // It had everything, and has lost it with its process.
            return self.stop_filling();
        }
        if ack.transfer != outgoing.id {
            return;
        }
        if ack.verdict == Verdict::Refused {
            // Once it has everything, what it refuses is a copy of an old piece.
            if !outgoing.complete() {
                self.stop_filling();
            }
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
                // The beginning is not here: a new process, or a new leader's transfer has taken its place.
                return self.acknowledge(sender, chunk.transfer, 0, Verdict::Refused, out);
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
