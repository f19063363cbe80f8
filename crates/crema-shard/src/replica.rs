//! One member of one Raft group: RawNode, log, state machine and those who wait for it.
//!
//! ```text
//!   write, open, read, command --> queues --flush--> RawNode --ready--> log, machine --> Out { envelopes, answers }
//!   envelope from a peer ---------------------------^        \-- persisted(number) releases what depends on the log
//! ```
//!
//! Roles are raft-rs's. On top of them a replica is *empty* (it has no state yet, listens to leaders only, and neither votes
//! nor answers), *awake*, *asleep* (it does not tick; any message wakes it) or *failed* (its state cannot be trusted; it does
//! nothing any more). How members change is in `membership`, how states travel in `filling`.
//!
//! Invariants: a request is answered after apply, matched by (term, index); a read is answered only after its own round
//! was confirmed by a quorum and its index applied, or while the lease holds; messages that depend on a Ready leave only
//! after it is persisted; the cell is closed before any effect of what ended the lease leaves; nothing reads a clock or
//! draws a number.

use crate::durable::GroupRecord;
use crate::effect::{LogWrite, Note, StateWrite};
use crate::lease::{Lease, Promise};
use crate::log_store::{FOUNDING_INDEX, MemLog};
use crate::members::{Member, Members};
use crate::message::{Answer, Body, Envelope, payload};
use crate::meta::{MAX_REPLICAS, MetaMachine, ReplicaPlacement};
use crate::proposals::{Proposals, Ticket};
use crate::reads::{Read, Reads};
use crate::timing::Timing;
use crate::transfer::{Chunk, ChunkAck};
use bytes::Bytes;
use crema_core::limits::MAX_REQUEST_BYTES;
use crema_core::mutant::{Mutant, planted};
use crema_core::store::Table;
use crema_core::{
    Epoch, EvictionPolicy, Incarnation, LogClock, LogIndex, LogTime, NodeId, Now, Published, ReadResult, ReplicaId,
    Reply, SessionTag, ShardId, StateMachine, Term, encode_check_digest,
};
use raft::eraftpb::{Entry, Message, MessageType};
use raft::{RawNode, ReadOnlyOption, StateRole};
use std::collections::BTreeSet;
use std::sync::Arc;

mod checkpoint;
mod filling;
mod leading;
mod membership;
mod memory;
mod refounding;
mod rounds;
mod sleep;

use checkpoint::Disk;
use filling::Filling;
use memory::Memory;
pub use memory::MemoryOptions;

/// Most requests a leader queues for its next round; beyond, it answers `Busy`.
const MAX_QUEUED: usize = 16 * 1024;
/// Most bytes of requests a leader queues.
const MAX_QUEUED_BYTES: usize = 4 * MAX_REQUEST_BYTES;
/// Most bytes of entries that a leader has appended but not committed.
const MAX_UNCOMMITTED_BYTES: u64 = 64 * 1024 * 1024;
/// Most bytes of entries in one message to a voter, and most messages without an answer: together 2 MiB, which is a
/// gigabit a second at a round trip of 16 ms. raft-rs sends all that the window allows in one step, so this bounds a round of
/// a leader whose member catches up: with 8 MiB it took 40 ms, for which all writers of the node waited.
const MAX_MESSAGE_BYTES: u64 = 128 * 1024;
const MAX_INFLIGHT_MESSAGES: usize = 16;
/// Most bytes of committed entries handed out at once.
const MAX_COMMITTED_BYTES_PER_READY: u64 = 16 * 1024 * 1024;
/// Entries behind the floor that are kept even if every voter has them, so that probes still match.
const LOG_MARGIN: u64 = 64;
/// The log is cut only when this many entries go at once.
const LOG_CUT: u64 = 256;
/// Most entries that go at once: what was kept for a member that was being filled would take a tenth of a second to free.
const MAX_LOG_CUT: u64 = 4096;
/// Times the usual bytes of log that are kept while a state is on its way to a member.
const FILLING_LOG: usize = 4;
/// Context of the vote requests of a forced transfer, as raft-rs writes it (raft.rs, CAMPAIGN_TRANSFER).
const FORCED: &[u8] = b"CampaignTransfer";

/// How linearizable reads are confirmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadMode {
    /// By the leader's lease; by a round of messages where it does not hold.
    #[default]
    Lease,
    /// By a round of messages each (ReadIndex), which many reads share. Needs no assumption about clocks.
    ReadIndex,
}

/// What a replica may begin: a node does only so much of it at a time.
#[derive(Clone, Copy, Debug, Default)]
pub struct MayBegin {
    /// To send its state to a member.
    pub fill: bool,
    /// To write its state to a file.
    pub checkpoint: bool,
}

/// What the log drives.
#[derive(Debug)]
pub enum Machine {
    /// Keys and values.
    Data(Box<StateMachine>),
    /// The cluster's own table.
    Meta(Box<MetaMachine>),
}

/// A message and its receiver.
pub type Addressed = (Member, Envelope);

/// What a replica wants done, added to by all replicas of a round.
#[derive(Debug, Default)]
pub struct Out {
    /// To be sent.
    pub envelopes: Vec<Addressed>,
    /// Pieces of states, to be sent on the stream of their own.
    pub chunks: Vec<(Member, Chunk)>,
    /// Acknowledgements of such pieces.
    pub chunk_acks: Vec<(Member, ChunkAck)>,
    /// Answers for gateways, in order.
    pub answers: Vec<(ShardId, Ticket, Answer)>,
    /// What is to be written to disk, where logs are kept there.
    pub writes: Vec<LogWrite>,
    /// Groups whose members, as of an index, become durable with these writes.
    pub members_written: Vec<(ShardId, u64)>,
    /// Pieces of states for files.
    pub states: Vec<StateWrite>,
    /// Groups whose leader, term, own role or members changed.
    pub roles: Vec<ShardId>,
    /// Whether the meta state changed.
    pub meta_changed: bool,
    /// Keys and values that nobody needs any more.
    pub garbage: Vec<Arc<Table>>,
    /// For the log.
    pub notes: Vec<Note>,
}

enum Queued {
    Write { ticket: Ticket, tag: SessionTag, ops: Bytes },
    Open { ticket: Ticket },
    Command(Bytes),
}

struct Unpersisted {
    number: u64,
    /// Whether it has something to write itself, or only waits behind one that has.
    writes: bool,
    /// Term and vote, if they are part of it.
    vote: Option<(u64, u64)>,
    messages: Vec<Message>,
}

struct SleepRound {
    waiting_for: BTreeSet<ReplicaId>,
    ticks_left: usize,
}

/// What the replica last told the world about leadership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leadership {
    /// Current term.
    pub term: Term,
    /// Whom this replica takes for the leader.
    pub leader: Option<NodeId>,
    /// Whether that is this replica.
    pub leads: bool,
}

/// One member of one group.
pub struct Replica {
    shard: ShardId,
    id: ReplicaId,
    members: Members,
    /// Replicas that have spoken as leaders or candidates before this one knew them as members.
    strangers: Vec<Member>,
    /// What placement wants the members to be, and its epoch.
    intent: (Vec<ReplicaPlacement>, Epoch),
    /// Whether it has no state yet.
    empty: bool,
    filling: Filling,
    rank: usize,
    timing: Timing,
    raw: RawNode<MemLog>,
    machine: Machine,
    clock: LogClock,
    /// Whether log time stood still while this replica was away, and nobody has told it the time since.
    clock_stands: bool,
    queue: Vec<Queued>,
    queue_bytes: usize,
    proposals: Proposals,
    reads: Reads,
    /// Reads of keys that expire between log time and the leader's estimate.
    awaiting_advance: Vec<Read>,
    /// Stamp of the `Advance` entry that was proposed for them, until it is applied.
    advance_proposed: Option<LogTime>,
    read_mode: ReadMode,
    lease: Lease,
    promise: Promise,
    /// Term of the last applied entry.
    applied_term: Term,
    /// Whether a read has asked for the lease since the last tick.
    lease_used: bool,
    /// Whether an entry was proposed to end the lease's suspension.
    reviving: bool,
    counts: ReadCounts,
    digest_proposed: LogIndex,
    next_context: u64,
    context_prefix: u64,
    unpersisted: Vec<Unpersisted>,
    /// The last index that was durable when it was looked at last.
    durable: u64,
    /// Term and vote that were handed out to be made durable last.
    handed_vote: (u64, u64),
    leadership: Leadership,
    asleep: bool,
    quiet_ticks: usize,
    sleep_round: Option<SleepRound>,
    floor: u64,
    max_log_bytes: usize,
    failed: bool,
    ready_reads: Vec<Read>,
    /// What it keeps on disk, if it does.
    disk: Option<Disk>,
    memory: Memory,
}

/// A new replica's circumstances.
pub struct ReplicaInit {
    /// The group.
    pub shard: ShardId,
    /// The replica's id.
    pub id: ReplicaId,
    /// The members of a founded group, this one included; nobody, of an empty replica.
    pub members: Members,
    /// Its founding state, or what stands for none.
    pub machine: Machine,
    /// Log time of that state.
    pub log_time: LogTime,
    /// Periods.
    pub timing: Timing,
    /// Most bytes of log for voters that lag.
    pub max_log_bytes: usize,
    /// Upper bits of read contexts: different for every life of a node.
    pub context_prefix: u64,
    /// How reads are confirmed.
    pub read_mode: ReadMode,
    /// About how many bytes of records one piece of a state holds on its way to another replica.
    pub chunk_bytes: usize,
    /// Bytes of log on disk behind which a new state is written to a file, or as many as that state has; none where the
    /// log is in memory alone.
    pub checkpoint_log_bytes: Option<u64>,
    /// How it chooses what goes when the shard is full, where it leads.
    pub eviction: Option<EvictionPolicy>,
}

/// Reads that a replica has answered on its driver, and the rounds it took; monotonic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadCounts {
    /// Answered under the lease.
    pub leased: u64,
    /// Answered after a round.
    pub indexed: u64,
    /// Rounds begun, for reads or for the lease.
    pub rounds: u64,
}

impl Replica {
    /// A replica of a newly founded group. `first` is the voter that campaigns at once.
    pub fn founded(init: ReplicaInit, first: bool, logger: &slog::Logger, now: Now) -> Result<Self, raft::Error> {
        let log = MemLog::founded(init.members.voters.iter().map(|v| v.id.0).collect());
        let mut replica = Replica::new(init, log, FOUNDING_INDEX, logger, now)?;
        if first {
            // Two ticks, so that the other voters exist when it asks them.
            replica.raw.raft.election_elapsed = replica.raw.raft.randomized_election_timeout().saturating_sub(2);
        }
        Ok(replica)
    }

    /// A replica that comes back from disk. `init` has its members and machine from there. It gives no vote for as long as
    /// it may have promised before it went.
    pub fn recovered(
        init: ReplicaInit,
        record: &GroupRecord,
        hard: raft::eraftpb::HardState,
        entries: Vec<Entry>,
        logger: &slog::Logger,
        now: Now,
    ) -> Result<Self, String> {
        let start = record.begins_at();
        let last = entries.last().map_or(start.index, |e| e.index);
        if hard.commit > last {
            return Err(format!("committed up to {} but the log ends at {last}: state was lost", hard.commit));
        }
        let term = hard.term.max(start.term).max(entries.last().map_or(0, |e| e.term));
        // A commit index is written with what comes next; the state has all up to its own.
        let hard = raft::eraftpb::HardState {
            term,
            vote: if term == hard.term { hard.vote } else { 0 },
            commit: hard.commit.max(start.index),
            ..hard
        };
        let bytes = entries.iter().map(|e| e.data.len() as u64).sum();
        let log = MemLog::recovered(start.index, start.term, start.members.to_raft(), hard, entries);
        let timing = init.timing;
        let mut replica = Replica::new(init, log, start.index, logger, now).map_err(|e| e.to_string())?;
        replica.applied_term = Term(start.term);
        replica.promise.renew(now.mono, &timing);
        replica.clock_stands = true;
        replica.recover_disk(bytes);
        Ok(replica)
    }

    /// A replica that placement has made, to be filled by its group's leader. It has no vote and no state.
    pub fn empty(init: ReplicaInit, logger: &slog::Logger, now: Now) -> Result<Self, raft::Error> {
        debug_assert!(init.members == Members::default());
        let mut replica = Replica::new(init, MemLog::empty(), 0, logger, now)?;
        replica.empty = true;
        Ok(replica)
    }

    fn new(init: ReplicaInit, log: MemLog, applied: u64, logger: &slog::Logger, now: Now) -> Result<Self, raft::Error> {
        let t = init.timing;
        let config = raft::Config {
            id: init.id.0,
            election_tick: t.election_ticks,
            heartbeat_tick: t.heartbeat_ticks,
            applied,
            max_size_per_msg: MAX_MESSAGE_BYTES,
            max_inflight_msgs: MAX_INFLIGHT_MESSAGES,
            check_quorum: true,
            pre_vote: true,
            min_election_tick: t.campaign_ticks,
            max_election_tick: t.campaign_ticks + t.campaign_step_ticks * 2 * MAX_REPLICAS + 1,
            read_only_option: ReadOnlyOption::Safe,
            skip_bcast_commit: true,
            batch_append: true,
            max_uncommitted_size: MAX_UNCOMMITTED_BYTES,
            max_committed_size_per_ready: MAX_COMMITTED_BYTES_PER_READY,
            ..raft::Config::default()
        };
        let raw = RawNode::new(&config, log, logger)?;
        let mut replica = Replica {
            shard: init.shard,
            id: init.id,
            members: init.members,
            strangers: Vec::new(),
            intent: (Vec::new(), Epoch(0)),
            empty: false,
            filling: Filling::new(init.chunk_bytes, init.context_prefix),
            rank: 0,
            timing: t,
            raw,
            machine: init.machine,
            clock: LogClock::new(init.log_time, now),
            clock_stands: false,
            queue: Vec::new(),
            queue_bytes: 0,
            proposals: Proposals::default(),
            reads: Reads::default(),
            awaiting_advance: Vec::new(),
            advance_proposed: None,
            read_mode: init.read_mode,
            lease: Lease::default(),
            promise: Promise::default(),
            applied_term: Term(0),
            lease_used: false,
            reviving: false,
            counts: ReadCounts::default(),
            digest_proposed: LogIndex(0),
            next_context: 0,
            context_prefix: init.context_prefix,
            unpersisted: Vec::new(),
            durable: 0,
            handed_vote: (0, 0),
            leadership: Leadership { term: Term(0), leader: None, leads: false },
            asleep: false,
            quiet_ticks: 0,
            sleep_round: None,
            floor: 0,
            max_log_bytes: init.max_log_bytes,
            failed: false,
            ready_reads: Vec::new(),
            disk: init.checkpoint_log_bytes.map(Disk::new),
            memory: Memory::new(init.eviction),
        };
        replica.members_changed();
        Ok(replica)
    }

    /// The group.
    pub fn shard(&self) -> ShardId {
        self.shard
    }
    /// The replica's id.
    pub fn id(&self) -> ReplicaId {
        self.id
    }
    /// The members of the group, as far as this replica has applied its log.
    pub fn members(&self) -> &Members {
        &self.members
    }
    /// Whether it waits for its first state: it neither votes nor answers.
    pub fn is_empty(&self) -> bool {
        self.empty
    }
    /// The state it keeps.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }
    /// Who leads, as far as this replica knows.
    pub fn leadership(&self) -> Leadership {
        self.leadership
    }
    /// Whether it does not tick.
    pub fn asleep(&self) -> bool {
        self.asleep
    }
    /// Whether it has stopped for good.
    pub fn failed(&self) -> bool {
        self.failed
    }
    /// Entries kept.
    pub fn log_entries(&self) -> usize {
        self.raw.store().len()
    }
    /// What it publishes to readers outside of the driver; the meta group publishes nothing.
    pub fn published(&self) -> Option<&Arc<Published>> {
        match &self.machine {
            Machine::Data(m) if !self.empty => Some(m.published()),
            _ => None,
        }
    }
    /// Whether it would answer a linearizable read at `now` without asking anybody.
    pub fn holds_lease(&self, now: Now) -> bool {
        self.may_lease() && self.lease.holds(now.mono)
    }
    /// Whether it may not help another candidate at `now`.
    pub fn promised(&self, now: Now) -> bool {
        self.promise.binds(now.mono) && !planted(Mutant::NoPromise)
    }
    /// Where its reads stand, for a report.
    pub fn reads_in_words(&self) -> String {
        let lease = if self.lease.suspended() { "suspended" } else { "not suspended" };
        let round = if self.reads.in_round() { ", a round on its way" } else { "" };
        format!("reads {} + {}{round}, lease {lease}", self.reads.len(), self.awaiting_advance.len())
    }
    /// Reads answered so far.
    pub fn read_counts(&self) -> ReadCounts {
        self.counts
    }
    /// Index up to which its log is durable. While a state is being installed, what was durable before it: that stays on
    /// disk until the state takes its place, and the state covers what had been acknowledged of it.
    pub fn persisted_index(&self) -> LogIndex {
        let installs = self.raw.snap().is_some_and(|s| !s.is_empty()) || self.filling.installing();
        LogIndex(self.raw.raft.raft_log.persisted.max(if installs { self.durable } else { 0 }))
    }
    /// Applied index.
    pub fn applied(&self) -> LogIndex {
        match &self.machine {
            Machine::Data(m) => m.applied(),
            Machine::Meta(m) => m.applied(),
        }
    }
    /// Committed index, as far as this replica knows.
    pub fn committed(&self) -> LogIndex {
        LogIndex(self.raw.raft.raft_log.committed)
    }
    /// Index of the last entry, be it kept or not.
    pub fn last_index(&self) -> LogIndex {
        LogIndex(self.raw.raft.raft_log.last_index())
    }
    /// Digest of the state at the applied index.
    pub fn digest(&self) -> u64 {
        match &self.machine {
            Machine::Data(m) => m.digest(),
            Machine::Meta(m) => m.digest(),
        }
    }
    /// (index, term, payload) of every entry kept, for the simulator's log matching.
    pub fn log(&self) -> Vec<(u64, u64, Bytes)> {
        let store = self.raw.store();
        let context = raft::GetEntriesContext::empty(false);
        let from = store.truncated() + 1;
        raft::Storage::entries(store, from, store.last() + 1, None, context)
            .map(|es| es.into_iter().map(|e| (e.index, e.term, payload(&e).clone())).collect())
            .unwrap_or_default()
    }

    fn leads(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    fn term(&self) -> Term {
        Term(self.raw.raft.term)
    }

    fn member(&self, id: u64) -> Option<Member> {
        let id = ReplicaId(id);
        self.members.get(id).or_else(|| self.strangers.iter().find(|s| s.id == id).copied())
    }

    fn node_of(&self, id: u64) -> Option<NodeId> {
        self.member(id).map(|v| v.node)
    }

    /// raft-rs draws its election timeout from an unseeded generator at every change of role, and an equal redraw is
    /// invisible: ours replaces it after every call that may have drawn (no randomness: DESIGN, timings).
    fn fix_election_timeout(&mut self) {
        let n = self.members.voting().count().max(1);
        let turn = (self.rank as u64 + self.raw.raft.term) % n as u64;
        let ticks = self.timing.campaign_ticks + self.timing.campaign_step_ticks * turn as usize;
        self.raw.raft.set_randomized_election_timeout(ticks);
    }

    // ---- inputs ------------------------------------------------------------------------------------------------

    fn not_leader(&self) -> Answer {
        let id = if self.failed { 0 } else { self.raw.raft.leader_id };
        Answer::NotLeader { leader: if id == self.id.0 { None } else { self.node_of(id) }, term: self.term() }
    }

    /// Takes a write of a session. Refused at once when this replica does not lead; the refusal is definite.
    pub fn write(&mut self, ticket: Ticket, tag: SessionTag, ops: Bytes, out: &mut Out) {
        self.enqueue(ops.len(), ticket, out, |ticket| Queued::Write { ticket, tag, ops });
    }

    /// Takes the wish for a session of `ticket.incarnation`.
    pub fn open_session(&mut self, ticket: Ticket, out: &mut Out) {
        self.enqueue(0, ticket, out, |ticket| Queued::Open { ticket });
    }

    fn enqueue(&mut self, bytes: usize, ticket: Ticket, out: &mut Out, item: impl FnOnce(Ticket) -> Queued) {
        if self.failed || !self.leads() {
            self.misdirected();
            out.answers.push((self.shard, ticket, self.not_leader()));
        } else if self.queue.len() + self.proposals.len() >= MAX_QUEUED || self.queue_bytes + bytes > MAX_QUEUED_BYTES {
            out.answers.push((self.shard, ticket, Answer::Busy));
        } else {
            self.wake();
            self.queue_bytes += bytes;
            self.queue.push(item(ticket));
        }
    }

    /// A request that should have gone to the leader woke nobody there: perhaps the leader's replica is gone while its
    /// node lives. Awake, this one finds out.
    fn misdirected(&mut self) {
        if self.asleep {
            self.wake();
        }
    }

    /// Takes a linearizable read. One without operations asks for the applied index.
    pub fn read(&mut self, read: Read, out: &mut Out) {
        if self.failed || !self.leads() {
            self.misdirected();
            out.answers.push((self.shard, read.ticket, self.not_leader()));
        } else if self.reads.len() + self.awaiting_advance.len() >= MAX_QUEUED {
            out.answers.push((self.shard, read.ticket, Answer::Busy));
        } else {
            self.wake();
            self.reads.push(read);
        }
    }

    /// Answers reading operations from the state as it is here, however old; `None` if it cannot be trusted.
    pub fn observe(&self, ops: &[u8]) -> Option<Reply> {
        let Machine::Data(machine) = &self.machine else { return None };
        match machine.read(ops, LogTime(0)) {
            ReadResult::Reply(reply) if !self.failed && !self.empty => Some(reply),
            _ => None,
        }
    }

    /// Proposes an entry that nobody waits for; dropped when this replica does not lead.
    /// Returns whether it was taken.
    pub fn command(&mut self, payload: Bytes) -> bool {
        let takes = self.leads() && !self.failed && self.queue.len() < MAX_QUEUED;
        if takes {
            self.wake();
            self.queue.push(Queued::Command(payload));
        }
        takes
    }

    /// Takes a message of the replica `from` holds. Messages from a life of the sender that does not hold the voter are
    /// dropped: a restarted node must not speak for the log it lost.
    pub fn step(&mut self, from: NodeId, incarnation: Incarnation, envelope: Envelope, now: Now, out: &mut Out) {
        if self.failed {
            return;
        }
        let sender = match &envelope.body {
            Body::Raft(m) => ReplicaId(m.from),
            Body::Sleep { from, .. } => *from,
        };
        let leads_us = |m: &Message| {
            matches!(m.msg_type, MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot)
        };
        if self.empty && !matches!(&envelope.body, Body::Raft(m) if leads_us(m)) {
            // It has no state, so it has no vote: raft-rs would grant one to anybody.
            return;
        }
        if !self.hears(Member { id: sender, node: from, incarnation }) {
            return;
        }
        match envelope.body {
            Body::Sleep { from, term, index, ok: false, .. } => self.asked_to_sleep(from, term, index, out),
            Body::Sleep { from, term, index, ok: true, .. } => self.sleeper_agreed(from, term, index),
            Body::Raft(m) => {
                let last = self.raw.raft.raft_log.last_index();
                if m.msg_type == MessageType::MsgHeartbeat && m.term >= self.raw.raft.term && m.commit > last {
                    // The leader knows that we acknowledged more than we have. raft-rs would panic; we must not vote.
                    self.fail(format!("committed up to {} but the log ends at {last}: state was lost", m.commit), out);
                    return;
                }
                let late = last > m.index && !planted(Mutant::LateTimeoutNow);
                if m.msg_type == MessageType::MsgTimeoutNow && (self.raw.raft.leader_id != m.from || late) {
                    // A delayed one: its sender does not lead us any more, or has gone on since (`Lease::suspend`).
                    return;
                }
                // A forced vote that failed may have lifted this voter's term, so an ordinary one may come of an equal term.
                let asks = matches!(m.msg_type, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
                if (asks || m.term > self.raw.raft.term) && self.promised(now) && !passes_promise(&m) {
                    return;
                }
                if planted(Mutant::NoPromise) && !self.leads() {
                    // Nor raft-rs's own, which counts ticks.
                    self.raw.raft.election_elapsed = self.raw.raft.election_elapsed.max(self.timing.election_ticks);
                }
                let from_leader = leads_us(&m);
                let m = match m.msg_type {
                    MessageType::MsgSnapshot => match self.take_announcement(m, out) {
                        Some(m) => m,
                        None => return,
                    },
                    _ => m,
                };
                let (sender, term) = (m.from, m.term);
                if self.asleep {
                    self.wake();
                }
                self.clock_stands &= envelope.log_time == 0;
                self.clock_observe(LogTime(envelope.log_time), now);
                if envelope.floor > 0 {
                    self.cut_log(envelope.floor);
                }
                // Errors concern messages of unknown peers or of types that do not travel: dropped.
                let _ = self.raw.step(m);
                self.fix_election_timeout();
                self.drop_unused_state();
                if from_leader && self.raw.raft.leader_id == sender && self.raw.raft.term == term {
                    self.promise.renew(now.mono, &self.timing);
                }
            }
        }
    }

    fn clock_observe(&mut self, time: LogTime, now: Now) {
        if time.0 > 0 {
            self.clock.observe(time, now);
        }
    }

    // ---- time --------------------------------------------------------------------------------------------------

    /// One tick. `present` says whether the member's life still counts: a lost one does not hold the log back.
    pub fn tick(&mut self, now: Now, present: impl Fn(&Member) -> bool, may: MayBegin, out: &mut Out) {
        if self.asleep || self.failed {
            return;
        }
        if let Some(round) = &mut self.sleep_round {
            round.ticks_left -= 1;
            if round.ticks_left > 0 {
                return;
            }
            self.sleep_round = None;
        }
        let raft = &self.raw.raft;
        let campaigns = !self.leads() && raft.election_elapsed + 1 >= raft.randomized_election_timeout();
        let unborn = self.begins();
        // What was promised in time is kept in time, however ticks fell. And whoever installs a state does not campaign before
        // it is durable: raft-rs would look for entries that the state has taken the place of.
        let installs = self.filling.installing() || self.raw.snap().is_some_and(|s| !s.is_empty());
        let bound = self.promised(now) || installs || unborn;
        if !campaigns || !bound {
            self.raw.tick();
            self.fix_election_timeout();
        }
        self.reads.expire(now.mono, self.timing.promise());
        self.expire_incoming(now.mono);
        self.keep_checkpoint(may.checkpoint, out);
        if self.leads() {
            self.keep_lease(now);
            self.update_floor(present);
            self.change_members(now);
            self.keep_memory(now);
            self.keep_filling(may.fill, now);
            self.propose_digest_check(now);
            self.maybe_invite_to_sleep(out);
        }
    }

    fn update_floor(&mut self, present: impl Fn(&Member) -> bool) {
        let applied = self.applied().0;
        let slowest = self
            .members
            .all()
            .filter(|v| present(v))
            .filter_map(|v| {
                let p = self.raw.raft.prs().get(v.id.0)?;
                // Who waits for a state needs nothing before it.
                (v.id == self.id || self.members.is_voter(v.id) || p.matched > 0).then_some(if v.id == self.id {
                    applied
                } else {
                    p.matched
                })
            })
            .min()
            .unwrap_or(0);
        let bytes = self.raw.store().bytes();
        let mut floor = if bytes > self.max_log_bytes { applied } else { slowest.min(applied) };
        // What follows a state on its way is kept for longer, lest it be of no use when it arrives.
        if let Some(point) = self.filling.point()
            && bytes <= FILLING_LOG * self.max_log_bytes
        {
            floor = floor.min(point);
        }
        self.floor = self.floor.max(floor);
        self.cut_log(self.floor);
    }

    /// Cuts the log behind what all have. Within its bounds with a margin, and not for a few entries; beyond them at once.
    fn cut_log(&mut self, floor: u64) {
        let floor = floor.min(self.applied().0);
        let store = self.raw.store();
        let over = store.bytes() > self.max_log_bytes;
        let (to, least) = if over { (floor, 1) } else { (floor.saturating_sub(LOG_MARGIN), LOG_CUT) };
        if to >= store.truncated() + least {
            let to = to.min(store.truncated() + MAX_LOG_CUT);
            self.raw.mut_store().compact(to);
        }
    }

    fn propose_digest_check(&mut self, now: Now) {
        let Machine::Data(machine) = &self.machine else { return };
        if let Some((index, digest)) = machine.digest_to_check()
            && index > self.digest_proposed
        {
            let entry = encode_check_digest(self.stamp(now), index, digest);
            if self.command(entry) {
                self.digest_proposed = index;
            }
        }
    }

    fn stamp(&self, now: Now) -> LogTime {
        let last = match &self.machine {
            Machine::Data(m) => m.log_time(),
            Machine::Meta(_) => LogTime(0),
        };
        self.clock.estimate(now).max(last)
    }
}

/// Whether a message of a higher term concerns a voter that has promised its leader to help nobody else: its sender leads
/// already, by a majority that had promised nothing or nothing any more; or the leader itself has asked for the election.
fn passes_promise(m: &Message) -> bool {
    match m.msg_type {
        MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot => true,
        MessageType::MsgRequestVote => m.context[..] == *FORCED,
        _ => false,
    }
}
