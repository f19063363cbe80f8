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
use crate::members::{ConfStep, Member, Members};
use crate::message::{Answer, Body, Envelope, announce, payload};
use crate::meta::{MAX_REPLICAS, MetaMachine, ReplicaPlacement};
use crate::proposals::{Proposals, Settled, Ticket};
use crate::reads::{Read, Reads};
use crate::timing::Timing;
use crate::transfer::{Chunk, ChunkAck};
use bytes::Bytes;
use crema_core::limits::{MAX_REQUEST_BYTES, TARGET_ENTRY_BYTES};
use crema_core::mutant::{Mutant, planted};
use crema_core::store::Table;
use crema_core::{
    EntryBuilder, Epoch, EvictionPolicy, Incarnation, LogClock, LogIndex, LogTime, NodeId, Now, OpsRef, Outcome,
    Published, ReadResult, ReplicaId, Reply, SessionTag, ShardId, StateMachine, Term, encode_advance,
    encode_check_digest, encode_open_session,
};
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{RawNode, ReadOnlyOption, StateRole};
use std::collections::BTreeSet;
use std::sync::Arc;

mod checkpoint;
mod filling;
mod membership;
mod memory;
mod refounding;

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
/// Ticks that an invitation to sleep waits for its answers.
const SLEEP_ROUND_TICKS: usize = 4;

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

    // ---- sleep -------------------------------------------------------------------------------------------------

    /// Wakes the replica: it ticks again, from a fresh election timeout.
    pub fn wake(&mut self) {
        self.quiet_ticks = 0;
        self.sleep_round = None;
        if self.asleep {
            self.asleep = false;
            self.raw.raft.election_elapsed = 0;
        }
    }

    /// The node of a voter is gone. Wakes the replica; one that followed that node has waited its election time already,
    /// since a beat between the nodes stood for the leader's while it slept.
    pub fn node_down(&mut self, node: NodeId) {
        if !self.asleep || !self.members.all().any(|v| v.node == node) {
            return;
        }
        self.wake();
        if self.node_of(self.raw.raft.leader_id) == Some(node) && !self.leads() {
            self.raw.raft.election_elapsed = self.timing.election_ticks;
        }
    }

    /// Messages to `node` may have been lost: what was sent without an answer is sent again.
    pub fn unreachable(&mut self, node: NodeId) {
        if self.asleep || self.failed || !self.leads() {
            return;
        }
        for id in self.members.all().filter(|v| v.node == node && v.id != self.id).map(|v| v.id.0).collect::<Vec<_>>() {
            self.raw.report_unreachable(id);
        }
    }

    fn at_rest(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        let last = log.last_index();
        log.committed == last
            && self.applied().0 == last
            && self.queue.is_empty()
            && self.proposals.is_empty()
            && self.reads.is_empty()
            && self.awaiting_advance.is_empty()
            && self.unpersisted.is_empty()
            && self.raw.raft.lead_transferee.is_none()
    }

    fn asked_to_sleep(&mut self, leader: ReplicaId, term: Term, index: u64, out: &mut Out) {
        let agrees = self.term() == term
            && self.raw.raft.state == StateRole::Follower
            && self.raw.raft.leader_id == leader.0
            && self.raw.raft.raft_log.last_index() == index
            && self.at_rest();
        if agrees && let Some(voter) = self.member(leader.0) {
            self.fall_asleep();
            let body = Body::Sleep { from: self.id, to: leader, term, index, ok: true };
            out.envelopes.push((voter, Envelope { shard: self.shard, log_time: 0, floor: 0, body }));
        }
    }

    fn fall_asleep(&mut self) {
        self.asleep = true;
        self.lease.rest();
        self.close_cell();
        self.sleep_round = None;
        self.raw.raft.maybe_free_inflight_buffers();
        self.raw.raft.r.raft_log.unstable.entries.shrink_to(16);
    }

    fn sleeper_agreed(&mut self, from: ReplicaId, term: Term, index: u64) {
        let current = self.leads() && self.term() == term && self.raw.raft.raft_log.last_index() == index;
        let Some(round) = self.sleep_round.as_mut().filter(|_| current) else { return };
        round.waiting_for.remove(&from);
        if round.waiting_for.is_empty() {
            // What placement or memory wants may have come after the invitation.
            if self.at_rest() && !self.has_changes_to_make() {
                self.fall_asleep();
            } else {
                self.wake();
            }
        }
    }

    /// Whether a leader has something to do that nobody asks for again.
    fn has_changes_to_make(&self) -> bool {
        !self.members.learners.is_empty() || self.filling.sends() || self.wants_change() || self.limits_differ()
    }

    /// A leader of a quiet group invites all voters to sleep. Until all have agreed it sends nothing, since anything
    /// would wake them; if one does not, it goes on, and its next heartbeat wakes the others.
    fn maybe_invite_to_sleep(&mut self, out: &mut Out) {
        let last = self.raw.raft.raft_log.last_index();
        let all_match = self.raw.raft.prs().iter().all(|(id, p)| *id == self.id.0 || p.matched == last);
        let told_commit = self.raw.raft.prs().iter().all(|(id, p)| *id == self.id.0 || p.committed_index >= last);
        if !all_match || !told_commit || self.has_changes_to_make() || !self.at_rest() {
            self.quiet_ticks = 0;
            return;
        }
        self.quiet_ticks += 1;
        // Not in a tick with a heartbeat: it would follow the invitation and wake whom that put to sleep.
        if self.quiet_ticks < self.timing.quiet_ticks || self.raw.has_ready() {
            return;
        }
        self.quiet_ticks = 0;
        let mut waiting_for = BTreeSet::new();
        for v in self.members.voting().filter(|v| v.id != self.id) {
            waiting_for.insert(v.id);
            let body = Body::Sleep { from: self.id, to: v.id, term: self.term(), index: last, ok: false };
            out.envelopes.push((*v, Envelope { shard: self.shard, log_time: 0, floor: 0, body }));
        }
        if waiting_for.is_empty() {
            self.fall_asleep();
        } else {
            self.sleep_round = Some(SleepRound { waiting_for, ticks_left: SLEEP_ROUND_TICKS });
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

    // ---- leadership --------------------------------------------------------------------------------------------

    /// Hands leadership to `to` if that voter is close behind; returns whether a transfer is under way.
    pub fn transfer(&mut self, to: ReplicaId) -> bool {
        // In a joint configuration it may be one that goes.
        if !self.leads() || self.failed || to == self.id || !self.members.voters.iter().any(|v| v.id == to) {
            return false;
        }
        if self.raw.raft.lead_transferee.is_some() {
            return true;
        }
        // It may be one that takes `to`'s vote away.
        if self.raw.raft.has_pending_conf() {
            return false;
        }
        let last = self.raw.raft.raft_log.last_index();
        let close = self.raw.raft.prs().get(to.0).is_some_and(|p| p.recent_active && p.matched + 1024 >= last);
        if close {
            self.wake();
            // Before a TimeoutNow can leave: a forced vote asks no promise.
            if !planted(Mutant::TransferUnderLease) {
                self.lease.suspend(last);
                self.close_cell();
                // One on its way was proposed before this suspension, and does not end it.
                self.reviving = false;
            }
            self.raw.transfer_leader(to.0);
        }
        close
    }

    // ---- the lease ---------------------------------------------------------------------------------------------

    /// Whether a lease, if it holds, lets this replica answer reads: what earlier leaders acknowledged is applied here.
    fn may_lease(&self) -> bool {
        self.read_mode == ReadMode::Lease
            && self.leads()
            && self.leadership.leads
            && self.leadership.term == self.term()
            && self.applied_term == self.term()
            && !self.failed
            && !self.asleep
    }

    /// Tells readers outside of the driver where they stand. Closes the cell at once when the lease is gone.
    fn publish(&self, now: Now) {
        let Machine::Data(machine) = &self.machine else { return };
        if self.may_lease() && !self.lease.suspended() {
            let published = machine.published();
            published.set_estimate(self.clock.estimate(now), now);
            published.cell().open(self.raw.raft.term, machine.epoch().0, self.lease.until().0);
        } else {
            self.close_cell();
        }
    }

    fn close_cell(&self) {
        if let Some(published) = self.published() {
            published.cell().close();
        }
    }

    /// Renews the lease ahead of its end while it is used, so that reads find it held. Nobody's use lets it lapse.
    fn keep_lease(&mut self, now: Now) {
        let used = self.published().is_some_and(|p| p.take_used()) | std::mem::take(&mut self.lease_used);
        if !used || !self.may_lease() {
            return;
        }
        self.quiet_ticks = 0;
        let early = self.timing.lease() * 3 / 4;
        if self.lease.suspended() {
            if self.raw.raft.lead_transferee.is_none() && !self.reviving {
                self.reviving = self.command(encode_advance(self.stamp(now)));
            }
        } else if self.lease.until() < now.mono.after(early) && !self.reads.in_round() {
            self.begin_round(now);
        }
    }

    fn note_leadership(&mut self, now: Now, out: &mut Out) {
        let leader = self.node_of(self.raw.raft.leader_id);
        let present = Leadership { term: self.term(), leader, leads: self.leads() };
        let before = std::mem::replace(&mut self.leadership, present);
        if before == present {
            self.turn_away(out);
            return;
        }
        out.roles.push(self.shard);
        if before.leads && (!present.leads || before.term != present.term) {
            self.step_down(out);
        }
        self.turn_away(out);
        if present.leads && !(before.leads && before.term == present.term) {
            if std::mem::take(&mut self.clock_stands) {
                // Nobody who voted knew the time either: the whole group was away. Only now is the wall clock asked.
                self.clock = LogClock::new(LogTime(now.wall.0).max(self.clock.estimate(now)), now);
            }
            self.inherit_flight();
            // The empty entry that begins a leadership is a proposal too, and no message of it has left yet.
            self.lease = Lease::default();
            self.lease.proposed(self.raw.raft.raft_log.last_index(), now.mono);
        }
        self.publish(now);
    }

    /// A replica that was elected and deposed between two rounds may have taken requests that nobody would answer.
    fn turn_away(&mut self, out: &mut Out) {
        let taken = !self.queue.is_empty() || self.reads.unconfirmed();
        if taken && !self.leads() {
            self.step_down(out);
        }
    }

    /// Everything that this leadership took and did not finish goes back to where it came from.
    fn step_down(&mut self, out: &mut Out) {
        for ticket in self.proposals.drain() {
            out.answers.push((self.shard, ticket, Answer::Lost));
        }
        let refusal = self.not_leader();
        self.queue_bytes = 0;
        for item in std::mem::take(&mut self.queue) {
            if let Queued::Write { ticket, .. } | Queued::Open { ticket } = item {
                out.answers.push((self.shard, ticket, refusal.clone()));
            }
        }
        let mut reads = self.reads.drain_unconfirmed();
        reads.append(&mut self.awaiting_advance);
        for read in reads {
            out.answers.push((self.shard, read.ticket, refusal.clone()));
        }
        self.advance_proposed = None;
        self.floor = 0;
        self.lease = Lease::default();
        self.reviving = false;
        self.stop_filling();
        self.forget_accesses();
    }

    /// Stops the replica for good: what it holds cannot be trusted, or a part of it panicked.
    pub fn fail(&mut self, reason: String, out: &mut Out) {
        if !self.failed {
            out.notes.push(Note::ReplicaFailed { shard: self.shard, reason });
            self.end(out);
        }
    }

    /// It does nothing any more; who waits for it is told.
    fn end(&mut self, out: &mut Out) {
        self.failed = true;
        self.leadership = Leadership { term: self.leadership.term, leader: None, leads: false };
        out.roles.push(self.shard);
        if let Some(published) = self.published() {
            published.retire();
        }
        self.step_down(out);
        // Nothing is applied any more, so confirmed reads wait in vain.
        let refusal = self.not_leader();
        let mut reads = std::mem::take(&mut self.ready_reads);
        reads.append(&mut self.reads.drain());
        for read in reads {
            out.answers.push((self.shard, read.ticket, refusal.clone()));
        }
        self.unpersisted.clear();
    }

    // ---- rounds ------------------------------------------------------------------------------------------------

    /// Works off everything that inputs have caused. `persist` is called with the number of each Ready that must be made
    /// durable before [`Replica::persisted`].
    pub fn flush(&mut self, now: Now, out: &mut Out, mut persist: impl FnMut(u64)) {
        if self.failed {
            return;
        }
        self.note_leadership(now, out);
        self.answer_reads(now, out);
        self.begin_reads(now);
        self.propose(now, out);
        while self.raw.has_ready() && !self.failed {
            self.one_ready(now, out, &mut persist);
            self.answer_reads(now, out);
            self.begin_reads(now);
        }
        self.answer_reads(now, out);
        self.propose(now, out);
        // An Advance or a check may have been queued by the last reads; it makes the group ready once more.
        while self.raw.has_ready() && !self.failed {
            self.one_ready(now, out, &mut persist);
            self.answer_reads(now, out);
        }
        self.fill(now, out);
        self.checkpoint(out);
        self.publish(now);
    }

    fn begin_reads(&mut self, now: Now) {
        // raft-rs drops a ReadIndex silently before the first commit of the term.
        if self.leads() && self.reads.wants_round() && self.raw.raft.commit_to_current_term() {
            self.lease_used = true;
            self.begin_round(now);
        }
    }

    fn begin_round(&mut self, now: Now) {
        self.counts.rounds += 1;
        if !planted(Mutant::ReusedReadContext) {
            self.next_context += 1;
        }
        self.reads.begin(self.next_context, now.mono);
        let mut context = Vec::with_capacity(16);
        context.extend_from_slice(&self.context_prefix.to_le_bytes());
        context.extend_from_slice(&self.next_context.to_le_bytes());
        self.raw.read_index(context);
    }

    /// Packs what is queued into entries, and all entries into one MsgPropose.
    fn propose(&mut self, now: Now, out: &mut Out) {
        // While leadership is being handed over raft-rs takes no proposals; they wait here for the outcome.
        if self.queue.is_empty() || !self.leads() || self.raw.raft.lead_transferee.is_some() {
            return;
        }
        self.make_room(self.queue_bytes as u64, now);
        let queue = self.take_proposable();
        if queue.is_empty() {
            return;
        }
        let stamp = self.stamp(now);
        let wall_offset = now.wall.0 as i64 - stamp.0 as i64;
        let mut entries: Vec<Entry> = Vec::new();
        let mut tickets: Vec<Vec<Ticket>> = Vec::new();
        let mut batch = EntryBuilder::new(stamp, wall_offset);
        let mut batch_tickets = Vec::new();
        let entry = |data: Bytes| Entry { data, ..Entry::default() };
        if planted(Mutant::AckBeforeApply) {
            Self::acknowledge_early(self.shard, &queue, out);
        }
        for item in queue {
            let alone = !matches!(item, Queued::Write { .. });
            if !batch.is_empty() && (alone || batch.size() >= TARGET_ENTRY_BYTES) {
                let full = std::mem::replace(&mut batch, EntryBuilder::new(stamp, wall_offset));
                entries.push(entry(full.finish()));
                tickets.push(std::mem::take(&mut batch_tickets));
            }
            match item {
                Queued::Write { ticket, tag, ops } => {
                    batch.push(tag, &ops);
                    batch_tickets.push(ticket);
                }
                Queued::Open { ticket } => {
                    entries.push(entry(encode_open_session(stamp, ticket.incarnation)));
                    tickets.push(vec![ticket]);
                }
                Queued::Command(payload) => {
                    entries.push(entry(payload));
                    tickets.push(Vec::new());
                }
            }
        }
        if !batch.is_empty() {
            entries.push(entry(batch.finish()));
            tickets.push(batch_tickets);
        }
        let term = self.raw.raft.term;
        let first = self.raw.raft.raft_log.last_index() + 1;
        let mut m = Message { msg_type: MessageType::MsgPropose, from: self.id.0, ..Message::default() };
        m.set_entries(entries.into());
        if self.raw.raft.step(m).is_err() {
            // Too much is uncommitted: nothing of it was appended.
            for ticket in tickets.into_iter().flatten() {
                out.answers.push((self.shard, ticket, Answer::Busy));
            }
            self.advance_proposed = None;
            self.reviving = false;
            self.makes_no_room();
            return;
        }
        self.took_off(self.raw.raft.raft_log.last_index());
        self.lease.proposed(self.raw.raft.raft_log.last_index(), now.mono);
        for (i, tickets) in tickets.into_iter().enumerate() {
            if !tickets.is_empty() {
                self.proposals.push(term, first + i as u64, tickets);
            }
        }
    }

    fn send(&mut self, mut m: Message, now: Now, out: &mut Out) {
        let Some(voter) = self.member(m.to) else { return };
        if m.msg_type == MessageType::MsgSnapshot {
            let Some(members) = self.filling.announced(m.to, now) else { return };
            announce(&mut m, members);
        }
        // raft-rs 0.7 with `batch_append` puts entries into an empty MsgAppend that still waits to be sent, even if that
        // one stood at another index (`is_continuous_ents` calls anything a continuation of nothing). The voter would
        // acknowledge `index + entries`, more than it has: a lost write. Such a message gets the index of its entries.
        if let Some(first) = m.entries.first()
            && m.msg_type == MessageType::MsgAppend
            && first.index != m.index + 1
        {
            m.index = first.index - 1;
            let Ok(term) = self.raw.raft.raft_log.term(m.index) else { return };
            m.log_term = term;
        }
        if m.msg_type == MessageType::MsgTimeoutNow {
            // What its receiver checks before it acts on it, see `Lease::suspend`.
            m.index = self.lease.suspended_at().unwrap_or(self.raw.raft.raft_log.last_index());
        }
        let from_leader =
            matches!(m.msg_type, MessageType::MsgHeartbeat | MessageType::MsgAppend | MessageType::MsgSnapshot);
        // Voters tell the time too: whoever is elected after a restart has to go on with it.
        let votes = matches!(m.msg_type, MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse);
        let log_time = if (from_leader || votes) && !self.clock_stands { self.clock.estimate(now).0 } else { 0 };
        let floor = if from_leader { self.floor } else { 0 };
        let envelope = |m| Envelope { shard: self.shard, log_time, floor, body: Body::Raft(m) };
        // `batch_append` merges without a limit (raft-rs 0.7, raft.rs:744), up to a voter's whole backlog: cut to size.
        let size = |e: &Entry| e.data.len() as u64 + 32;
        if m.msg_type != MessageType::MsgAppend || m.entries.iter().map(size).sum::<u64>() <= MAX_MESSAGE_BYTES {
            out.envelopes.push((voter, envelope(m)));
            return;
        }
        let (mut part, mut bytes, mut last_term) = (Vec::new(), 0, m.log_term);
        for e in std::mem::take(&mut m.entries) {
            if !part.is_empty() && bytes + size(&e) > MAX_MESSAGE_BYTES {
                let mut head = m.clone();
                head.set_entries(std::mem::take(&mut part).into());
                out.envelopes.push((voter, envelope(head)));
                (m.index, m.log_term) = (e.index - 1, last_term);
                bytes = 0;
            }
            bytes += size(&e);
            last_term = e.term;
            part.push(e);
        }
        m.set_entries(part.into());
        out.envelopes.push((voter, envelope(m)));
    }

    fn one_ready(&mut self, now: Now, out: &mut Out, persist: &mut impl FnMut(u64)) {
        let mut ready = self.raw.ready();
        let number = ready.number();
        let immediate = ready.take_messages();
        let mut dependent = ready.take_persisted_messages();
        let must_sync = ready.must_sync();
        let entries = ready.take_entries();
        let committed = ready.take_committed_entries();
        let read_states = ready.take_read_states();
        let hard = ready.hs().cloned();
        let changed = hard.as_ref().map(|h| (h.term, h.vote)).filter(|v| *v != self.handed_vote);
        let hard_vote = changed.inspect(|v| self.handed_vote = *v);
        let mut installed = None;
        if !ready.snapshot().is_empty() {
            let metadata = ready.snapshot().get_metadata();
            installed = Some(metadata.index);
            self.install(metadata.index, metadata.term, number, out);
        }
        if must_sync && !self.failed {
            self.write_log(installed, &entries, out);
        }
        let log = self.raw.mut_store();
        log.append(entries);
        if let Some(hard) = hard {
            log.set_hard_state(hard);
        }
        self.raw.advance_append_async(ready);
        for m in immediate {
            self.send(m, now, out);
        }
        if planted(Mutant::PersistAfterSend) {
            for m in std::mem::take(&mut dependent) {
                self.send(m, now, out);
            }
        }
        if must_sync || !self.unpersisted.is_empty() {
            // The answer to a heartbeat vouches for term and vote alone: behind a slow disk it would cost a healthy leader
            // its quorum.
            if hard_vote.is_none() && self.unpersisted.iter().all(|u| u.vote.is_none()) {
                let (at_once, later) =
                    dependent.into_iter().partition(|m| m.msg_type == MessageType::MsgHeartbeatResponse);
                dependent = later;
                let at_once: Vec<Message> = at_once;
                for m in at_once {
                    self.send(m, now, out);
                }
            }
            self.unpersisted.push(Unpersisted { number, writes: must_sync, vote: hard_vote, messages: dependent });
            if must_sync {
                persist(number);
            }
        } else {
            // Nothing to make durable, nothing before it: what depends on it may go.
            self.raw.on_persist_ready(number);
            for m in dependent {
                self.send(m, now, out);
            }
        }
        for state in read_states {
            if let Some(context) = state.request_ctx.get(8..16) {
                let context = u64::from_le_bytes(context.try_into().expect("eight bytes"));
                if let Some(issued) = self.reads.confirmed(context, state.index) {
                    let from = if planted(Mutant::LeaseFromReply) { now.mono } else { issued };
                    self.lease.confirmed(from, &self.timing);
                }
            }
        }
        // Before anything is applied: an entry of another leader must not answer our tickets.
        self.note_leadership(now, out);
        if self.leads() {
            self.lease.committed(self.raw.raft.raft_log.committed, &self.timing);
            self.reviving &= self.lease.suspended();
        }
        for e in committed {
            if self.failed {
                return;
            }
            self.apply(e, now, out);
        }
        // What raft-rs counts as applied may not run ahead of what is durable.
        if !self.failed && !self.filling.installing() {
            self.raw.advance_apply_to(self.applied().0);
        }
        if !self.failed {
            self.clock_observe(self.applied_time(), now);
        }
    }

    fn applied_time(&self) -> LogTime {
        match &self.machine {
            Machine::Data(m) => m.log_time(),
            Machine::Meta(_) => LogTime(0),
        }
    }

    fn apply(&mut self, e: Entry, now: Now, out: &mut Out) {
        self.apply_by_own_clock(now);
        let index = LogIndex(e.index);
        self.applied_term = Term(e.term);
        // To the machine, a change of members is an entry without content.
        let data = if e.entry_type == EntryType::EntryNormal { &e.data[..] } else { &[] };
        if e.entry_type != EntryType::EntryNormal {
            match ConfStep::decode(&e.context) {
                Ok(step) => self.apply_step(&step, e.index, out),
                Err(error) => return self.fail(format!("entry {} changes members: {error}", e.index), out),
            }
        }
        let outcomes: Vec<Outcome> = match &mut self.machine {
            Machine::Data(m) => match m.apply(index, data) {
                Ok(applied) => {
                    if let Some(at) = applied.digest_mismatch {
                        out.notes.push(Note::DigestMismatch { shard: self.shard, index: at.0 });
                    }
                    out.garbage.append(&mut m.take_garbage());
                    applied.outcomes
                }
                Err(corrupt) => return self.fail(corrupt.to_string(), out),
            },
            Machine::Meta(m) => match m.apply(index, data) {
                Ok(changed) => {
                    out.meta_changed |= changed;
                    Vec::new()
                }
                Err(corrupt) => return self.fail(corrupt.to_string(), out),
            },
        };
        match self.proposals.settle(e.term, e.index) {
            Settled::Nobody => {}
            Settled::Ours(tickets) => {
                debug_assert_eq!(tickets.len(), outcomes.len());
                for (ticket, outcome) in tickets.into_iter().zip(outcomes) {
                    out.answers.push((self.shard, ticket, Answer::Outcome(outcome)));
                }
            }
            Settled::Lost(tickets) => {
                for ticket in tickets {
                    out.answers.push((self.shard, ticket, Answer::Lost));
                }
            }
        }
    }

    fn answer_reads(&mut self, now: Now, out: &mut Out) {
        let applied = self.applied().0;
        let mut ready = std::mem::take(&mut self.ready_reads);
        let confirmed = ready.len();
        self.reads.take_ready(applied, &mut ready);
        self.counts.indexed += (ready.len() - confirmed) as u64;
        if !self.reads.is_empty() && self.holds_lease(now) {
            let before = ready.len();
            self.reads.take_all(&mut ready);
            self.counts.leased += (ready.len() - before) as u64;
            self.lease_used = true;
        }
        if ready.is_empty() && self.awaiting_advance.is_empty() {
            self.ready_reads = ready;
            return;
        }
        let estimate = self.stamp(now);
        let fresh = std::mem::replace(&mut ready, std::mem::take(&mut self.awaiting_advance));
        ready.extend(fresh);
        for read in ready.drain(..) {
            let Machine::Data(machine) = &self.machine else { continue };
            if read.ops.is_empty() {
                let index = Outcome::Reply(Reply::Int(applied as i64));
                out.answers.push((self.shard, read.ticket, Answer::Outcome(index)));
                continue;
            }
            debug_assert!(OpsRef::parse(&read.ops).is_ok_and(|ops| !ops.is_write()));
            // A read behind one that waits for log time waits too: reads of a connection keep their order.
            if !self.awaiting_advance.is_empty() {
                self.awaiting_advance.push(read);
                continue;
            }
            match machine.read(&read.ops, estimate) {
                ReadResult::Reply(reply) => {
                    out.answers.push((self.shard, read.ticket, Answer::Outcome(Outcome::Reply(reply))));
                }
                ReadResult::NeedsAdvance => self.awaiting_advance.push(read),
            }
        }
        self.ready_reads = ready;
        if self.awaiting_advance.is_empty() {
            self.advance_proposed = None;
            return;
        }
        if !self.leads() {
            // Confirmed while it led, but only a leader can move log time on.
            let refusal = self.not_leader();
            for read in std::mem::take(&mut self.awaiting_advance) {
                out.answers.push((self.shard, read.ticket, refusal.clone()));
            }
            return;
        }
        // Reads that came after the entry was proposed may need a later one.
        self.advance_proposed = self.advance_proposed.filter(|stamp| *stamp > self.applied_time());
        if self.advance_proposed.is_none() && self.command(encode_advance(estimate)) {
            self.advance_proposed = Some(estimate);
        }
    }

    /// What [`Mutant::LocalClockInApply`] does.
    #[cfg(feature = "mutants")]
    fn apply_by_own_clock(&mut self, now: Now) {
        let time = self.clock.estimate(now);
        if let (true, Machine::Data(m)) = (planted(Mutant::LocalClockInApply), &mut self.machine) {
            m.set_log_time(time);
        }
    }

    #[cfg(not(feature = "mutants"))]
    fn apply_by_own_clock(&mut self, _: Now) {}

    /// What [`Mutant::AckBeforeApply`] does: plain SETs are answered when they are proposed.
    fn acknowledge_early(shard: ShardId, queue: &[Queued], out: &mut Out) {
        for item in queue {
            let Queued::Write { ticket, ops, .. } = item else { continue };
            let plain = |op: crema_core::Op<'_>| {
                matches!(op, crema_core::Op::Set { cond: crema_core::SetCond::Always, get: false, .. })
            };
            if OpsRef::parse(ops).is_ok_and(|ops| ops.len() == 1 && ops.iter().all(plain)) {
                out.answers.push((shard, *ticket, Answer::Outcome(Outcome::Reply(Reply::Ok))));
            }
        }
    }

    /// Everything up to this Ready is durable: releases the messages that depend on it.
    pub fn persisted(&mut self, number: u64, now: Now, out: &mut Out) {
        if self.failed {
            return;
        }
        // A Ready without anything to write waits only for those before it.
        let upto = self.unpersisted.iter().take_while(|u| u.number <= number || !u.writes).count();
        let released = self.unpersisted[..upto].last().map_or(number, |u| u.number);
        let done: Vec<Unpersisted> = self.unpersisted.drain(..upto).collect();
        self.raw.on_persist_ready(released);
        self.durable = self.raw.raft.raft_log.persisted;
        for u in done {
            for m in u.messages {
                self.send(m, now, out);
            }
        }
        self.installed(released);
        self.step_held_announcement(out);
    }

    /// Whether [`Replica::flush`] has something to do.
    pub fn has_work(&self) -> bool {
        let unadvanced = !self.awaiting_advance.is_empty() && self.advance_proposed.is_none();
        !self.failed
            && (!self.queue.is_empty()
                || self.reads.wants_round()
                || unadvanced
                || self.filling.has_work()
                || self.disk.as_ref().is_some_and(Disk::has_work)
                || self.raw.has_ready())
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
