//! All replicas of one node: steps those that are awake and have something to do, and merges what they want done, so
//! that one write and one frame a peer serve many groups.
//!
//! ```text
//!   inputs -> mark dirty -> poll: flush each dirty replica -> Round { frames, answers, roles, persist }
//! ```
//!
//! A replica that panics or cannot be trusted is set aside; the others go on.

use crate::effect::Note;
use crate::message::{Answer, Body, Envelope, KIND_RAFT, TARGET_FRAME_BYTES, encode_envelope};
use crate::meta::{MetaMachine, MetaState};
use crate::proposals::Ticket;
use crate::reads::Read;
use crate::replica::{Machine, Out, ReadCounts, ReadMode, Replica, ReplicaInit, Voter};
use crate::timing::Timing;
use bytes::Bytes;
use crema_core::mutant::{Mutant, planted};
use crema_core::{Incarnation, LogIndex, LogTime, NodeId, Now, SessionTag, ShardId, ShardInit, StateMachine};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What one poll of the coordinator wants done.
#[derive(Debug, Default)]
pub struct Round {
    /// Raft frames by receiver, in order.
    pub frames: Vec<(NodeId, Bytes)>,
    /// Answers for gateways, in order.
    pub answers: Vec<(ShardId, Ticket, Answer)>,
    /// Groups whose leadership changed.
    pub roles: Vec<ShardId>,
    /// Whether the meta state changed.
    pub meta_changed: bool,
    /// For the log.
    pub notes: Vec<Note>,
    /// A batch to be made durable.
    pub persist: Option<u64>,
}

/// Hosts all local replicas.
pub struct Coordinator {
    node: NodeId,
    timing: Timing,
    data: Vec<Option<Box<Replica>>>,
    meta: Option<Box<Replica>>,
    dirty: BTreeSet<ShardId>,
    out: Out,
    frames: BTreeMap<NodeId, Vec<u8>>,
    full_frames: Vec<(NodeId, Bytes)>,
    persist_number: u64,
    /// Batches on their way to be durable: (number, which Ready of which group).
    persisting: VecDeque<(u64, Vec<(ShardId, u64)>)>,
    present: BTreeMap<NodeId, Incarnation>,
    connected: BTreeMap<NodeId, Incarnation>,
    logger: slog::Logger,
    dropped: u64,
}

impl Coordinator {
    /// A coordinator without replicas.
    pub fn new(node: NodeId, timing: Timing) -> Self {
        Coordinator {
            node,
            timing,
            data: Vec::new(),
            meta: None,
            dirty: BTreeSet::new(),
            out: Out::default(),
            frames: BTreeMap::new(),
            full_frames: Vec::new(),
            persist_number: 0,
            persisting: VecDeque::new(),
            present: BTreeMap::new(),
            connected: BTreeMap::new(),
            logger: crate::raft_log::logger(),
            dropped: 0,
        }
    }

    /// Creates this node's replicas of a newly founded cluster: once, and only for the incarnation that the record
    /// names, so that a restarted node never takes part with a log that it has lost.
    pub fn found(
        &mut self,
        state: &Arc<MetaState>,
        incarnation: Incarnation,
        max_log_bytes: usize,
        read_mode: ReadMode,
        now: Now,
    ) -> Result<(), String> {
        assert!(self.meta.is_none() && self.data.is_empty(), "a cluster is founded once");
        let groups = 1 + state.shards.len();
        let max_log_bytes = (max_log_bytes / groups).max(1024 * 1024);
        let log_time = LogTime(state.founded_at.0);
        self.data.resize_with(state.shards.len(), || None);
        let shards = (0..state.shards.len() as u32).map(ShardId).chain([ShardId::META]);
        for shard in shards {
            let placed = state.replicas(shard);
            let mut voters: Vec<Voter> =
                placed.iter().map(|r| Voter { id: r.id, node: r.node, incarnation: r.incarnation }).collect();
            voters.sort_by_key(|v| v.id);
            let any_life = planted(Mutant::VoteAfterWipe);
            let mine = |v: &&Voter| v.node == self.node && (v.incarnation == incarnation || any_life);
            let Some(own) = voters.iter().find(mine).copied() else {
                continue;
            };
            let first = placed.first().is_some_and(|r| r.id == own.id);
            let applied = LogIndex(crate::log_store::FOUNDING_INDEX);
            let machine = if shard.is_meta() {
                Machine::Meta(Box::new(MetaMachine::new(state.clone(), applied)))
            } else {
                let s = &state.shards[shard.0 as usize];
                let init = ShardInit { range: s.range, epoch: s.epoch, secret: state.secret, log_time, applied };
                Machine::Data(Box::new(StateMachine::new(init)))
            };
            let init = ReplicaInit {
                shard,
                id: own.id,
                voters,
                machine,
                log_time,
                timing: self.timing,
                max_log_bytes,
                context_prefix: incarnation.0 as u64,
                read_mode,
            };
            let replica = Replica::founded(init, first, &self.logger.new(slog::o!("shard" => shard.0)), now)
                .map_err(|e| e.to_string())?;
            *self.slot_mut(shard).ok_or("the record names a shard it does not have")? = Some(Box::new(replica));
            self.dirty.insert(shard);
        }
        Ok(())
    }

    fn slot_mut(&mut self, shard: ShardId) -> Option<&mut Option<Box<Replica>>> {
        if shard.is_meta() { Some(&mut self.meta) } else { self.data.get_mut(shard.0 as usize) }
    }

    /// The local replica of a group.
    pub fn replica(&self, shard: ShardId) -> Option<&Replica> {
        let slot = if shard.is_meta() { &self.meta } else { self.data.get(shard.0 as usize)? };
        slot.as_deref()
    }

    /// All local replicas, the meta group's last.
    pub fn replicas(&self) -> impl Iterator<Item = &Replica> {
        self.data.iter().chain([&self.meta]).filter_map(|r| r.as_deref())
    }

    /// The meta state, if this node keeps it.
    pub fn meta_state(&self) -> Option<Arc<MetaState>> {
        match self.meta.as_deref()?.machine() {
            Machine::Meta(m) => Some(m.state().clone()),
            Machine::Data(_) => None,
        }
    }

    /// Reads answered by all local replicas.
    pub fn read_counts(&self) -> ReadCounts {
        self.replicas().map(Replica::read_counts).fold(ReadCounts::default(), |a, b| ReadCounts {
            leased: a.leased + b.leased,
            indexed: a.indexed + b.indexed,
            rounds: a.rounds + b.rounds,
        })
    }

    /// Which life of each node counts: voters of other lives are lost and hold no log back.
    pub fn set_present(&mut self, present: BTreeMap<NodeId, Incarnation>) {
        self.present = present;
    }

    /// Messages dropped because they were addressed to no replica of this life, or came from none.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Runs `f` on a replica, isolating the others from its panics.
    fn with<R>(&mut self, shard: ShardId, f: impl FnOnce(&mut Replica, &mut Out) -> R) -> Option<R> {
        let slot = if shard.is_meta() { &mut self.meta } else { self.data.get_mut(shard.0 as usize)? };
        let replica = slot.as_deref_mut()?;
        let out = &mut self.out;
        match catch_unwind(AssertUnwindSafe(|| f(replica, out))) {
            Ok(r) => Some(r),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
                replica.fail(format!("panicked: {text}"), out);
                None
            }
        }
    }

    /// Takes a frame's messages from the life `incarnation` of node `from`.
    pub fn step(&mut self, from: NodeId, incarnation: Incarnation, envelopes: Vec<Envelope>, now: Now) {
        for e in envelopes {
            let shard = e.shard;
            let to = e.to();
            // An id that is not ours is one of an earlier life; nobody here may answer for it.
            if self.replica(shard).is_none_or(|r| r.id() != to) {
                self.dropped += 1;
                continue;
            }
            // Only a leader whose loss would be noticed may put a replica to sleep: its invitation may arrive after the
            // news that its streams broke, and nothing would wake the replica again.
            if matches!(e.body, Body::Sleep { .. }) && self.connected.get(&from) != Some(&incarnation) {
                continue;
            }
            self.with(shard, |r, out| r.step(from, incarnation, e, now, out));
            self.dirty.insert(shard);
        }
    }

    fn nobody(&mut self, shard: ShardId, ticket: Ticket) {
        let answer = Answer::NotLeader { leader: None, term: crema_core::Term(0) };
        self.out.answers.push((shard, ticket, answer));
    }

    /// Takes a write.
    pub fn write(&mut self, shard: ShardId, ticket: Ticket, tag: SessionTag, ops: Bytes) {
        match self.with(shard, |r, out| r.write(ticket, tag, ops, out)) {
            Some(()) => _ = self.dirty.insert(shard),
            None => self.nobody(shard, ticket),
        }
    }

    /// Takes a read.
    pub fn read(&mut self, shard: ShardId, ticket: Ticket, ops: Bytes) {
        match self.with(shard, |r, out| r.read(Read { ticket, ops }, out)) {
            Some(()) => _ = self.dirty.insert(shard),
            None => self.nobody(shard, ticket),
        }
    }

    /// Takes the wish for a session.
    pub fn open_session(&mut self, shard: ShardId, ticket: Ticket) {
        match self.with(shard, |r, out| r.open_session(ticket, out)) {
            Some(()) => _ = self.dirty.insert(shard),
            None => self.nobody(shard, ticket),
        }
    }

    /// Proposes a command to the meta group if this node leads it.
    pub fn meta_command(&mut self, payload: Bytes) {
        self.with(ShardId::META, |r, _| r.command(payload));
        self.dirty.insert(ShardId::META);
    }

    /// Hands a group's leadership to `to`; returns whether that is under way.
    pub fn transfer(&mut self, shard: ShardId, to: crema_core::ReplicaId) -> bool {
        self.dirty.insert(shard);
        self.with(shard, |r, _| r.transfer(to)).unwrap_or(false)
    }

    /// Streams to `node` stand, to this life of it; or they broke, and what was sent may be lost.
    pub fn set_connected(&mut self, node: NodeId, incarnation: Option<Incarnation>) {
        match incarnation {
            Some(i) => _ = self.connected.insert(node, i),
            None => {
                self.connected.remove(&node);
                self.unreachable(node);
            }
        }
    }

    /// Messages to `node` were dropped.
    pub fn unreachable(&mut self, node: NodeId) {
        for shard in self.shards() {
            self.with(shard, |r, _| r.unreachable(node));
        }
    }

    /// Wakes the local replica of a group, if there is one.
    pub fn wake(&mut self, shard: ShardId) {
        if self.replica(shard).is_some_and(Replica::asleep) {
            self.with(shard, |r, _| r.wake());
        }
    }

    /// A node is gone: groups that have a voter there wake up.
    pub fn node_down(&mut self, node: NodeId) {
        for shard in self.shards() {
            self.with(shard, |r, _| r.node_down(node));
        }
    }

    fn shards(&self) -> Vec<ShardId> {
        self.replicas().map(Replica::shard).collect()
    }

    /// One tick of every replica that is awake.
    pub fn tick(&mut self, now: Now) {
        let present = std::mem::take(&mut self.present);
        let awake: Vec<ShardId> = self.replicas().filter(|r| !r.asleep()).map(Replica::shard).collect();
        for shard in awake {
            let work = self.with(shard, |r, out| {
                r.tick(now, |v| present.get(&v.node) == Some(&v.incarnation), out);
                r.has_work()
            });
            if work == Some(true) {
                self.dirty.insert(shard);
            }
        }
        self.present = present;
    }

    /// The batch is durable; batches are reported in order.
    pub fn persisted(&mut self, number: u64, now: Now) {
        while self.persisting.front().is_some_and(|(n, _)| *n <= number) {
            let (_, readies) = self.persisting.pop_front().expect("just seen");
            for (shard, ready) in readies {
                self.with(shard, |r, out| r.persisted(ready, now, out));
                self.dirty.insert(shard);
            }
        }
    }

    /// Works off every dirty replica once and collects what all of them want done.
    pub fn poll(&mut self, now: Now, round: &mut Round) {
        let mut readies = Vec::new();
        for shard in std::mem::take(&mut self.dirty) {
            let again = self.with(shard, |r, out| {
                r.flush(now, out, |number| readies.push((shard, number)));
                r.has_work()
            });
            if again == Some(true) {
                self.dirty.insert(shard);
            }
        }
        let mut envelopes = std::mem::take(&mut self.out.envelopes);
        for (voter, envelope) in envelopes.drain(..) {
            // Another life of the node would drop it: the voter it is meant for is gone.
            let any_life = planted(Mutant::VoteAfterWipe);
            if self.connected.get(&voter.node).is_some_and(|i| *i == voter.incarnation || any_life) {
                self.frame(voter.node, &envelope);
            }
        }
        self.out.envelopes = envelopes;
        round.frames.append(&mut self.full_frames);
        for (node, frame) in &mut self.frames {
            if !frame.is_empty() {
                round.frames.push((*node, std::mem::take(frame).into()));
            }
        }
        round.answers.append(&mut self.out.answers);
        round.roles.append(&mut self.out.roles);
        round.notes.append(&mut self.out.notes);
        round.meta_changed |= std::mem::take(&mut self.out.meta_changed);
        if !readies.is_empty() {
            self.persist_number += 1;
            self.persisting.push_back((self.persist_number, readies));
            round.persist = Some(self.persist_number);
        }
    }

    fn frame(&mut self, node: NodeId, envelope: &Envelope) {
        let frame = self.frames.entry(node).or_default();
        // A large message goes into a frame of its own. The replica keeps its messages small, but one entry may be as large
        // as a request; so no frame exceeds what the receiver takes.
        let size = match &envelope.body {
            Body::Raft(m) => m.entries.iter().map(|e| e.data.len() + 32).sum(),
            Body::Sleep { .. } => 0,
        };
        if frame.len() + size > TARGET_FRAME_BYTES && frame.len() > 1 {
            self.full_frames.push((node, std::mem::take(frame).into()));
        }
        if frame.is_empty() {
            frame.push(KIND_RAFT);
        }
        encode_envelope(frame, envelope);
    }

    /// Groups that would have no quorum if this node stopped, though they have other voters.
    pub fn needed_by(&self, live: impl Fn(&Voter) -> bool) -> Vec<ShardId> {
        self.replicas()
            .filter(|r| {
                let others = r.voters().iter().filter(|v| v.node != self.node);
                let living = others.clone().filter(|v| live(v)).count();
                others.count() > 0 && living < r.voters().len() / 2 + 1
            })
            .map(Replica::shard)
            .collect()
    }
}
