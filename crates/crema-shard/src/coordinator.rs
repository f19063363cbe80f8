//! All replicas of one node: steps those that are awake and have something to do, and merges what they want done, so
//! that one write and one frame a peer serve many groups.
//!
//! ```text
//!   inputs -> mark dirty -> poll: flush each dirty replica -> Round { frames, answers, roles, persist }
//! ```
//!
//! A replica that panics or cannot be trusted is set aside; the others go on. Replicas are made by a founding record or by
//! applied placement, for the life that it names, and an id is used once: a replica that placement has replaced by
//! another id of this same life goes.

use crate::durable::Recovered;
use crate::effect::{LogWrite, Note, PersistBatch, StateWrite};
use crate::members::{Member, Members};
use crate::message::{
    Answer, Body, Envelope, KIND_RAFT, TARGET_FRAME_BYTES, encode_chunk, encode_chunk_ack, encode_envelope,
};
use crate::meta::{MetaMachine, MetaState, Refounded, WHOLE_SHARE};
use crate::proposals::Ticket;
use crate::reads::Read;
use crate::replica::{Machine, MayBegin, MemoryOptions, Out, ReadCounts, ReadMode, Replica, ReplicaInit};
use crate::timing::Timing;
use crate::transfer::{Chunk, ChunkAck};
use bytes::Bytes;
use crema_core::mutant::{Mutant, planted};
use crema_core::state_machine::Removed;
use crema_core::store::Table;
use crema_core::{
    Incarnation, LogIndex, LogTime, MonoTime, NodeId, Now, ReplicaId, SessionTag, ShardId, ShardInit, StateMachine,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// Sleeping groups are asked this often whether something in them has expired.
const EXPIRY_LOOK: Duration = Duration::from_secs(1);
/// Least bytes of log that one group keeps, unless the node's limit is smaller.
const MIN_LOG_BYTES: usize = 1024 * 1024;
/// Least bytes of log on disk behind which one group writes its state, unless the node's limit is smaller.
const MIN_CHECKPOINT_BYTES: u64 = 4 * 1024 * 1024;
/// Most replicas of one node that send their states to others at a time.
const FILLING_AT_ONCE: usize = 2;
/// Most replicas of one node that write their states to files at a time: this bounds what waits for the disk, and what is
/// kept aside of records that are overwritten meanwhile.
const CHECKPOINTS_AT_ONCE: usize = 2;
/// The same of replicas that begin their groups anew and serve nobody before: more, since there may be thousands.
const BEGINNINGS_AT_ONCE: usize = 16;

/// What all replicas of a node have in common.
#[derive(Clone, Copy, Debug)]
pub struct GroupOptions {
    /// This node.
    pub node: NodeId,
    /// This life of it.
    pub incarnation: Incarnation,
    /// Periods.
    pub timing: Timing,
    /// Most bytes of log kept for members that lag, over all groups.
    pub max_log_bytes: usize,
    /// How reads are confirmed.
    pub read_mode: ReadMode,
    /// About how many bytes of records one piece of a state holds on its way to another replica or to a file.
    pub chunk_bytes: usize,
    /// Number of this process: different for every start.
    pub process: u64,
    /// Bytes of log on disk, over all groups, behind which states are written to files; none where logs are in memory.
    pub checkpoint_log_bytes: Option<u64>,
    /// Limits of memory.
    pub memory: MemoryOptions,
}

/// A batch on its way to be durable.
struct Persisting {
    number: u64,
    /// Which Ready of which group.
    readies: Vec<(ShardId, u64)>,
    /// Members as of which index of which group.
    members: Vec<(ShardId, u64)>,
}

/// What one poll of the coordinator wants done.
#[derive(Debug, Default)]
pub struct Round {
    /// Raft frames by receiver, in order.
    pub frames: Vec<(NodeId, Bytes)>,
    /// Frames of the snapshot stream by receiver, in order.
    pub snapshot_frames: Vec<(NodeId, Bytes)>,
    /// Answers for gateways, in order.
    pub answers: Vec<(ShardId, Ticket, Answer)>,
    /// Groups whose leadership or members changed.
    pub roles: Vec<ShardId>,
    /// Whether the meta state changed.
    pub meta_changed: bool,
    /// Keys and values that nobody needs any more.
    pub garbage: Vec<Arc<Table>>,
    /// For the log.
    pub notes: Vec<Note>,
    /// A batch to be made durable.
    pub persist: Option<PersistBatch>,
    /// Pieces of states for files.
    pub states: Vec<StateWrite>,
}

/// Hosts all local replicas.
pub struct Coordinator {
    options: GroupOptions,
    data: Vec<Option<Box<Replica>>>,
    meta: Option<Box<Replica>>,
    dirty: BTreeSet<ShardId>,
    out: Out,
    frames: BTreeMap<NodeId, Vec<u8>>,
    full_frames: Vec<(NodeId, Bytes)>,
    persist_number: u64,
    /// Batches on their way to be durable.
    persisting: VecDeque<Persisting>,
    present: BTreeMap<NodeId, Incarnation>,
    connected: BTreeMap<NodeId, Incarnation>,
    /// What nodes can use of their memories for data, where that is not all of it.
    shares: BTreeMap<NodeId, u8>,
    logger: slog::Logger,
    dropped: u64,
    next_expiry_look: MonoTime,
    /// Where the meta group's log ended that came back from disk: a table from before that is an old one.
    meta_log_end: u64,
    /// Whether a group was to begin here by a table that may be an old one: it has to wait.
    postponed: bool,
    /// Replicas of groups before whose logs go once the table that says so is durable here.
    void: Vec<ReplicaId>,
}

impl Coordinator {
    /// A coordinator without replicas.
    pub fn new(options: GroupOptions) -> Self {
        Coordinator {
            options,
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
            shares: BTreeMap::new(),
            logger: crate::raft_log::logger(),
            dropped: 0,
            next_expiry_look: MonoTime(0),
            meta_log_end: 0,
            postponed: false,
            void: Vec::new(),
        }
    }

    /// Creates this node's replicas of a newly founded cluster: once, and only for the incarnation that the record
    /// names, so that a restarted node never takes part with a log that it has lost.
    pub fn found(&mut self, state: &Arc<MetaState>, now: Now) -> Result<(), String> {
        assert!(self.meta.is_none() && self.data.is_empty(), "a cluster is founded once");
        self.data.resize_with(state.shards.len(), || None);
        for shard in state.groups() {
            let placed = state.replicas(shard);
            let any_life = planted(Mutant::VoteAfterWipe);
            let mine =
                |m: &&Member| m.node == self.options.node && (m.incarnation == self.options.incarnation || any_life);
            let members = Members::founded(placed, state.epoch_of(shard));
            let Some(own) = members.voters.iter().find(mine).copied() else { continue };
            let first = placed.first().is_some_and(|r| r.id == own.id);
            let applied = LogIndex(crate::log_store::FOUNDING_INDEX);
            let init = ReplicaInit { members, ..self.blank(state, shard, own.id, applied) };
            let logger = self.logger.new(slog::o!("shard" => shard.0));
            let replica = Replica::founded(init, first, &logger, now).map_err(|e| e.to_string())?;
            if replica.is_durable() {
                self.out.writes.push(replica.founding_write());
            }
            self.put(shard, replica)?;
        }
        Ok(())
    }

    /// Takes up replicas that come back from disk, in the life that they were kept in. Returns those that cannot be
    /// trusted, and why: they stay away.
    pub fn recover(&mut self, recovered: Vec<Recovered>, now: Now) -> Vec<(ShardId, String)> {
        let groups = recovered.iter().filter(|r| !r.record.shard.is_meta()).map(|r| r.record.shard.0 + 1).max();
        let groups = groups.unwrap_or(0) as usize;
        self.data.resize_with(groups, || None);
        let mut lost = Vec::new();
        let mut recovered = recovered;
        recovered.sort_by_key(|r| r.record.id);
        for r in recovered {
            let (shard, id) = (r.record.shard, r.record.id);
            // Of a group that was founded anew there may still be the replica of the group before.
            let before = self.take(shard).map(|old| old.on_disk());
            self.forget(before.unwrap_or_default());
            let log_time = match &r.machine {
                Machine::Data(m) => m.log_time(),
                Machine::Meta(_) => LogTime(0),
            };
            if shard.is_meta() {
                let last = r.entries.last().map_or(0, |e| e.index);
                self.meta_log_end = last.max(r.record.begins_at().index);
            }
            let members = r.record.begins_at().members;
            let init = ReplicaInit { members, log_time, ..self.init(shard, id, r.machine, groups) };
            let logger = self.logger.new(slog::o!("shard" => shard.0));
            let replica = Replica::recovered(init, &r.record, r.hard, r.entries, &logger, now);
            if let Err(why) = replica.and_then(|r| self.put(shard, r)) {
                lost.push((shard, why));
            }
        }
        lost
    }

    /// What a new replica begins with.
    fn blank(&self, state: &Arc<MetaState>, shard: ShardId, id: ReplicaId, applied: LogIndex) -> ReplicaInit {
        let log_time = LogTime(state.founded_at.0);
        let machine = match state.shards.get(shard.0 as usize) {
            Some(s) => {
                let init = ShardInit { range: s.range, epoch: s.epoch, secret: state.secret, log_time, applied };
                Machine::Data(Box::new(StateMachine::new(init)))
            }
            None => Machine::Meta(Box::new(MetaMachine::new(state.clone(), applied))),
        };
        ReplicaInit { log_time, ..self.init(shard, id, machine, state.shards.len()) }
    }

    fn init(&self, shard: ShardId, id: ReplicaId, machine: Machine, shards: usize) -> ReplicaInit {
        let o = &self.options;
        let groups = 1 + shards as u64;
        // With a limit of memory, a sixteenth of it: an entry keeps up to as much again with it, of the frame that it came in.
        let most = if o.memory.max_memory == 0 { u64::MAX } else { o.memory.max_memory / 16 };
        let max_log_bytes = o.max_log_bytes.min(usize::try_from(most).unwrap_or(usize::MAX));
        ReplicaInit {
            shard,
            id,
            members: Members::default(),
            machine,
            log_time: LogTime(0),
            timing: o.timing,
            max_log_bytes: (max_log_bytes / groups as usize).max(MIN_LOG_BYTES.min(max_log_bytes)),
            context_prefix: o.process,
            read_mode: o.read_mode,
            chunk_bytes: o.chunk_bytes,
            eviction: o.memory.eviction,
            checkpoint_log_bytes: o.checkpoint_log_bytes.map(|b| (b / groups).max(MIN_CHECKPOINT_BYTES.min(b))),
        }
    }

    fn put(&mut self, shard: ShardId, replica: Replica) -> Result<(), String> {
        let slot = if shard.is_meta() { Some(&mut self.meta) } else { self.data.get_mut(shard.0 as usize) };
        *slot.ok_or("the table names a shard that it does not have")? = Some(Box::new(replica));
        // What a replica before it has on its way says nothing of this one, whose Readies count from 1 again.
        for p in &mut self.persisting {
            p.readies.retain(|(s, _)| *s != shard);
            p.members.retain(|(s, _)| *s != shard);
        }
        self.dirty.insert(shard);
        Ok(())
    }

    /// Follows placement: makes the replicas that it gives to this life of the node, empty or as the beginning of a group
    /// that is founded anew, ends those of groups that are none any more, and tells all what their groups' members should
    /// be. Returns whether replicas came or went.
    ///
    /// `fresh` says that the table comes from the meta group's leader, or out of its log. Another one may be of before a restart,
    /// and name a replica as the beginning of a group that has long since moved away: begun once more, it would be a group of
    /// its own. What such a table wants begun, and has nothing left to begin with, waits: [`Coordinator::waits_for_table`].
    pub fn adopt(&mut self, state: &Arc<MetaState>, fresh: bool, now: Now) -> Result<bool, String> {
        self.postponed = false;
        self.present = state.nodes.iter().map(|(n, r)| (*n, r.incarnation)).collect();
        self.data.resize_with(state.shards.len(), || None);
        let mut changed = false;
        let budgets = state.budgets(|node| self.share_of(node));
        // The meta group first: where it begins anew itself, the others wait for it.
        for shard in std::iter::once(ShardId::META).chain(state.groups().filter(|s| !s.is_meta())) {
            let placed = state.replicas(shard);
            let begins = state.refounded(shard);
            let mine = placed.iter().find(|r| r.node == self.options.node && r.incarnation == self.options.incarnation);
            let wanted = mine.filter(|own| self.replica(shard).is_none_or(|r| r.id() < own.id));
            // It is a member no more: of a group before, or since others have taken its place. A table that was made before the
            // replica says nothing of it.
            let kept = |id| placed.iter().chain(state.leaving(shard)).any(|r| r.id == id);
            // Nor does one of a later generation know what the last ones of the generation before had decided.
            let known = |id: ReplicaId| state.was_given(id) && id.0 >> 32 == u64::from(state.generation);
            let void = self
                .replica(shard)
                .is_some_and(|r| begins.is_some_and(|b| r.id() < b.founder) || (known(r.id()) && !kept(r.id())));
            let founds = wanted.is_some_and(|own| begins.is_some_and(|b| b.founder == own.id));
            if founds && !(fresh && self.knows_table()) && self.replica(shard).is_none() {
                self.postponed = true;
                continue;
            }
            if wanted.is_some() || void {
                let old = self.take(shard);
                let forget = old.as_ref().map(|r| r.on_disk()).unwrap_or_default();
                match (wanted, begins) {
                    (Some(own), Some(begins)) if begins.founder == own.id => {
                        self.begin_anew(state, shard, Member::from(own), begins, old, now)?;
                    }
                    (Some(own), _) => {
                        self.dissolve(old);
                        let init = self.blank(state, shard, own.id, LogIndex(0));
                        let logger = self.logger.new(slog::o!("shard" => shard.0));
                        let replica = Replica::empty(init, &logger, now).map_err(|e| e.to_string())?;
                        self.put(shard, replica)?;
                        self.forget(forget);
                    }
                    (None, _) => {
                        self.dissolve(old);
                        self.forget(forget);
                    }
                }
                changed = true;
            }
            let epoch = state.epoch_of(shard);
            let budget = budgets.get(shard.0 as usize).copied().unwrap_or(0);
            let told = self.with(shard, |r, _| {
                r.set_intent(placed, epoch);
                r.set_budget(budget);
            });
            if told.is_some() {
                self.dirty.insert(shard);
            }
        }
        Ok(changed)
    }

    /// Whether a group waits to begin here until the table is known to be a present one.
    pub fn waits_for_table(&self) -> bool {
        self.postponed
    }

    /// Whether the meta group's replica here, if there is one, has committed all that it had before the last restart.
    pub fn knows_table(&self) -> bool {
        self.meta.as_deref().is_none_or(|r| r.is_empty() || r.committed().0 >= self.meta_log_end)
    }

    fn share_of(&self, node: NodeId) -> u8 {
        self.shares.get(&node).copied().unwrap_or(WHOLE_SHARE)
    }

    /// A node, this one or another, can use so much of its memory for data at present; see [`MetaState::budgets`].
    pub fn set_share(&mut self, node: NodeId, share: u8, state: &MetaState) {
        if self.share_of(node) == share {
            return;
        }
        match share {
            WHOLE_SHARE => _ = self.shares.remove(&node),
            share => _ = self.shares.insert(node, share),
        }
        for (i, budget) in state.budgets(|node| self.share_of(node)).into_iter().enumerate() {
            let shard = ShardId(i as u32);
            if state.replicas(shard).iter().any(|r| r.node == node) {
                self.with(shard, |r, _| r.set_budget(budget));
                self.dirty.insert(shard);
            }
        }
    }

    fn take(&mut self, shard: ShardId) -> Option<Box<Replica>> {
        if shard.is_meta() { self.meta.take() } else { self.data.get_mut(shard.0 as usize)?.take() }
    }

    fn dissolve(&mut self, replica: Option<Box<Replica>>) {
        if let Some(mut replica) = replica {
            replica.dissolve(&mut self.out);
        }
    }

    /// What is on disk of these replicas may go, with the table that says so.
    fn forget(&mut self, replicas: Vec<ReplicaId>) {
        self.void.extend(replicas);
        self.forget_void();
    }

    fn forget_void(&mut self) {
        if !self.table_waits() {
            let gone = self.void.drain(..);
            self.out.writes.extend(gone.map(|replica| LogWrite { replica, remove: true, ..LogWrite::default() }));
        }
    }

    /// Whether this node begins the meta group anew and that is not durable yet. After a crash nobody would know that table,
    /// so nothing that depends on it may become durable before.
    fn table_waits(&self) -> bool {
        self.meta.as_deref().is_some_and(Replica::begins)
    }

    /// Makes the one replica that begins a group anew, out of what `old` has of it.
    fn begin_anew(
        &mut self,
        state: &Arc<MetaState>,
        shard: ShardId,
        own: Member,
        begins: Refounded,
        old: Option<Box<Replica>>,
        now: Now,
    ) -> Result<(), String> {
        let epoch = state.epoch_of(shard);
        let logger = self.logger.new(slog::o!("shard" => shard.0));
        let was = old.as_ref().map(|r| r.on_disk()).unwrap_or_default();
        let out = &mut self.out;
        // Its rest of the log may be what made it panic before.
        let legacy = catch_unwind(AssertUnwindSafe(|| old.and_then(|old| old.into_legacy(begins, epoch, out))));
        let init = self.blank(state, shard, own.id, begins.index);
        let Ok(legacy) = legacy else {
            // Somebody else has to begin it; not this node, out of nothing.
            let mut replica = Replica::empty(init, &logger, now).map_err(|e| e.to_string())?;
            replica.fail("panicked over the log of the group before".to_owned(), &mut self.out);
            return self.put(shard, replica);
        };
        let kept = legacy.is_some();
        let (machine, clock) = match legacy {
            Some((machine, clock)) => (Machine::Data(Box::new(machine)), clock),
            None => (init.machine, None),
        };
        let (keys, log_time) = match &machine {
            Machine::Data(m) => (m.keys(), m.log_time()),
            Machine::Meta(_) => (0, init.log_time),
        };
        tracing::warn!(%shard, replica = %own.id, index = %begins.index, kept, keys, "the group is founded anew here");
        let members = Members { epoch, ..Members::default() };
        let init = ReplicaInit { members, machine, log_time, ..init };
        let mut replica = Replica::refounded(init, own, begins, &logger, now).map_err(|e| e.to_string())?;
        if let Some(clock) = clock {
            replica.keep_time(clock, now);
        }
        if self.options.checkpoint_log_bytes.is_some() {
            // Only when what took its place is there: until then a restart begins it once more, from the old one.
            replica.supersedes(was);
        }
        self.put(shard, replica)
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

    /// Whether this node keeps the meta state by its own log.
    pub fn keeps_meta(&self) -> bool {
        self.meta.as_deref().is_some_and(|r| !r.is_empty())
    }

    /// The meta state, if this node keeps it.
    pub fn meta_state(&self) -> Option<Arc<MetaState>> {
        match self.meta.as_deref().filter(|r| !r.is_empty())?.machine() {
            Machine::Meta(m) => Some(m.state().clone()),
            Machine::Data(_) => None,
        }
    }

    /// Keys removed since the replicas came here, where this node leads or follows alike.
    pub fn removed(&self) -> Removed {
        self.replicas().fold(Removed::default(), |all, r| match r.machine() {
            Machine::Data(m) => {
                let one = m.removed();
                Removed { expired: all.expired + one.expired, evicted: all.evicted + one.evicted }
            }
            Machine::Meta(_) => all,
        })
    }

    /// Reads answered by all local replicas.
    pub fn read_counts(&self) -> ReadCounts {
        self.replicas().map(Replica::read_counts).fold(ReadCounts::default(), |a, b| ReadCounts {
            leased: a.leased + b.leased,
            indexed: a.indexed + b.indexed,
            rounds: a.rounds + b.rounds,
        })
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

    /// Takes a piece of a state from the life `incarnation` of node `from`.
    pub fn take_chunk(&mut self, from: NodeId, incarnation: Incarnation, chunk: &Chunk, now: Now) {
        if self.replica(chunk.shard).is_none_or(|r| r.id() != chunk.to) {
            self.dropped += 1;
            return;
        }
        let sender = Member { id: chunk.from, node: from, incarnation };
        self.with(chunk.shard, |r, out| r.take_chunk(sender, chunk, now.mono, out));
        self.dirty.insert(chunk.shard);
    }

    /// A piece of a state was written to its file; see [`crate::StateWrite`].
    pub fn state_written(&mut self, shard: ShardId, replica: ReplicaId, file: u64, seq: u32) {
        if self.replica(shard).is_some_and(|r| r.id() == replica) {
            self.with(shard, |r, out| r.state_written(file, seq, out));
            self.dirty.insert(shard);
        }
    }

    /// The log of a replica holds old files back: its state shall be written soon.
    pub fn ask_checkpoint(&mut self, replica: ReplicaId) {
        let shard = self.replicas().find(|r| r.id() == replica).map(Replica::shard);
        if let Some(shard) = shard {
            self.with(shard, |r, _| r.ask_checkpoint());
        }
    }

    /// Takes the acknowledgement of such a piece.
    pub fn chunk_acked(&mut self, from: NodeId, ack: ChunkAck, now: Now) {
        if self.replica(ack.shard).is_some_and(|r| r.id() == ack.to) {
            self.with(ack.shard, |r, _| r.chunk_acked(from, ack, now));
            self.dirty.insert(ack.shard);
        }
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
            Some(i) => {
                self.connected.insert(node, i);
                self.filling_interrupted(node);
            }
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

    /// Pieces of states on their way to `node` were dropped.
    pub fn filling_interrupted(&mut self, node: NodeId) {
        for shard in self.shards() {
            self.with(shard, |r, _| r.filling_interrupted(node));
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

    /// Wakes sleeping groups that this node leads and in which something has expired. Not for every tick.
    fn wake_for_expiry(&mut self, now: Now) {
        if now.mono < self.next_expiry_look {
            return;
        }
        self.next_expiry_look = now.mono.after(EXPIRY_LOOK);
        let due: Vec<ShardId> =
            self.replicas().filter(|r| r.asleep() && r.has_expired(now)).map(Replica::shard).collect();
        due.into_iter().for_each(|shard| self.wake(shard));
    }

    /// One tick of every replica that is awake.
    pub fn tick(&mut self, now: Now) {
        self.wake_for_expiry(now);
        let present = std::mem::take(&mut self.present);
        let awake: Vec<ShardId> = self.replicas().filter(|r| !r.asleep()).map(Replica::shard).collect();
        let mut filling = self.replicas().filter(|r| r.transfer_status().to.is_some()).count();
        let mut checkpoints = self.replicas().filter(|r| r.checkpoints()).count();
        let table_waits = self.table_waits();
        for shard in awake {
            let work = self.with(shard, |r, out| {
                let before = (r.transfer_status().to.is_some(), r.checkpoints());
                let waits = table_waits && r.begins();
                let most = if r.begins() { BEGINNINGS_AT_ONCE } else { CHECKPOINTS_AT_ONCE };
                let checkpoint = shard.is_meta() || (checkpoints < most && !waits);
                let may = MayBegin { fill: filling < FILLING_AT_ONCE, checkpoint };
                r.tick(now, |v| present.get(&v.node) == Some(&v.incarnation), may, out);
                filling += usize::from(!before.0 && r.transfer_status().to.is_some());
                checkpoints += usize::from(!before.1 && r.checkpoints());
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
        while self.persisting.front().is_some_and(|p| p.number <= number) {
            let done = self.persisting.pop_front().expect("just seen");
            for (shard, ready) in done.readies {
                self.with(shard, |r, out| r.persisted(ready, now, out));
                self.dirty.insert(shard);
            }
            for (shard, index) in done.members {
                self.with(shard, |r, out| {
                    r.members_durable(index);
                    out.roles.push(shard);
                });
            }
            self.forget_void();
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
        for (member, chunk) in self.out.chunks.drain(..) {
            if self.connected.get(&member.node) == Some(&member.incarnation) {
                round.snapshot_frames.push((member.node, encode_chunk(&chunk)));
            }
        }
        for (member, ack) in self.out.chunk_acks.drain(..) {
            if self.connected.get(&member.node) == Some(&member.incarnation) {
                round.snapshot_frames.push((member.node, encode_chunk_ack(&ack)));
            }
        }
        round.frames.append(&mut self.full_frames);
        for (node, frame) in &mut self.frames {
            if !frame.is_empty() {
                round.frames.push((*node, std::mem::take(frame).into()));
            }
        }
        round.answers.append(&mut self.out.answers);
        round.roles.append(&mut self.out.roles);
        round.notes.append(&mut self.out.notes);
        round.garbage.append(&mut self.out.garbage);
        round.meta_changed |= std::mem::take(&mut self.out.meta_changed);
        round.states.append(&mut self.out.states);
        let writes = std::mem::take(&mut self.out.writes);
        if !readies.is_empty() || !writes.is_empty() {
            self.persist_number += 1;
            let members = std::mem::take(&mut self.out.members_written);
            self.persisting.push_back(Persisting { number: self.persist_number, readies, members });
            round.persist = Some(PersistBatch { number: self.persist_number, writes });
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
    pub fn needed_by(&self, live: impl Fn(&Member) -> bool) -> Vec<ShardId> {
        self.replicas()
            .filter(|r| r.members().is_voter(r.id()))
            .filter(|r| {
                let others = r.members().voting().any(|v| v.id != r.id());
                others && !r.members().has_quorum(|v| v.id != r.id() && live(v))
            })
            .map(Replica::shard)
            .collect()
    }
}
