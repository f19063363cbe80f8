//! What goes into a [`crate::Host`] from clients and what comes out of it, as data.

use crate::host::VoterResult;
use crate::recovery::RecoverResult;
use crate::router::RoutingView;
use bytes::Bytes;
use crema_core::store::Table;
use crema_core::{ClusterUuid, Epoch, Incarnation, MonoTime, NodeId, ReplicaId, Reply, ShardId, Term};
use raft::eraftpb::{Entry, HardState};
use std::sync::Arc;

/// One client connection (or embedded caller) of this node; never reused within an incarnation. Commands of one
/// connection take effect in order per shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub u64);

/// The caller's own mark of a request, returned with its completion; unique within its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// How old the state may be that a read is answered from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadLevel {
    /// Not at all: everything acknowledged before the read began is seen.
    #[default]
    Linearizable,
    /// At most so old: everything acknowledged longer ago is seen. Answered by this node if it holds a replica; where its
    /// state is too old, after a round to the leader and, if there were writes, the next heartbeat (100 ms).
    Bounded(std::time::Duration),
    /// Whatever this node's replica has; linearizable if it holds none. Two such reads may even run back in time when the
    /// second is asked elsewhere.
    Local,
}

/// A request to one shard.
#[derive(Clone, Debug)]
pub struct ClientRequest {
    /// Where it came from.
    pub conn: ConnId,
    /// The caller's mark.
    pub token: Token,
    /// The shard that owns every slot the operations touch.
    pub shard: ShardId,
    /// Whether any operation is a write.
    pub write: bool,
    /// For reads; a write is what it is.
    pub level: ReadLevel,
    /// One or more operations as [`crema_core::encode_ops`] wrote them; several are atomic.
    pub ops: Bytes,
    /// No attempt is made after this, give or take a tick; the request is then answered `NotApplied` or `Unknown`.
    pub deadline: MonoTime,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientResult {
    /// Executed; this is the answer.
    Reply(Reply),
    /// Certainly not executed: retry as you like.
    NotApplied(Refusal),
    /// It may or may not have been executed, now or later: read before you retry.
    Unknown,
}

/// Why a request was not executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No leader of the shard could be reached before the deadline.
    NoLeader(ShardId),
    /// The leader was known but did not take the request before the deadline.
    Busy(ShardId),
    /// This node knows no placement yet: the cluster is being founded, or joined.
    NotReady,
    /// The shard has lost its majority for good: an operator has to make it writable again.
    Lost(ShardId),
    /// The slot's shard has changed: look the placement up again and resend.
    WrongShard,
    /// The node is shutting down.
    ShuttingDown,
}

/// A finished request.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The connection it came from.
    pub conn: ConnId,
    /// The caller's mark.
    pub token: Token,
    /// The result.
    pub result: ClientResult,
}

/// The streams between a pair of nodes. They do not wait for each other, and nothing orders them among each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Channel {
    /// Raft messages, beats, founding and placement: small and urgent.
    Raft = 0,
    /// Forwarded requests and their answers.
    Requests = 1,
    /// Chunks of shards' snapshots: large, and in no hurry. The shell compresses them and limits their rate.
    Snapshot = 2,
}

impl Channel {
    /// All of them, in the order of their codes.
    pub const ALL: [Channel; 3] = [Channel::Raft, Channel::Requests, Channel::Snapshot];
}

/// A frame for a peer. Frames of one (peer, channel) must arrive in order or not at all.
#[derive(Clone, Debug)]
pub struct Send {
    /// Receiver.
    pub to: NodeId,
    /// Stream.
    pub channel: Channel,
    /// The frame's body, at most [`crate::message::MAX_FRAME_BYTES`].
    pub frame: Bytes,
}

/// Something to make durable, as a whole. Answer with [`crate::Host::persisted`] in the order given.
#[derive(Clone, Debug, Default)]
pub struct PersistBatch {
    /// Number of this batch, counting from 1 without gaps.
    pub number: u64,
    /// What is to be written; nothing where logs are in memory.
    pub writes: Vec<LogWrite>,
}

/// One replica's part of a batch.
#[derive(Clone, Debug, Default)]
pub struct LogWrite {
    /// The replica; its id is the name of its log.
    pub replica: ReplicaId,
    /// What was written of this replica before is void: the record and the state take its place. Entries of it that lie
    /// behind the state may stay where they are: nothing of them was committed ([`crate::durable::Recovered`]).
    pub clear: bool,
    /// What the log stands on from now on: an encoded [`crate::durable::GroupRecord`].
    pub record: Option<Bytes>,
    /// Appended; what the log had from the first one's index on is replaced.
    pub entries: Vec<Entry>,
    /// Term, vote and commit index.
    pub hard: Option<HardState>,
    /// Entries up to and including this index are not needed any more.
    pub compact_to: Option<u64>,
    /// Nothing of this replica is needed any more, its states neither; then nothing else is set.
    pub remove: bool,
    /// The state file of this index is the one that the record names: those of the replica before it may go once the
    /// batch is durable.
    pub state: Option<u64>,
}

/// A piece of a state on its way to a file. Pieces of one (replica, file) come in order; answer each with
/// [`crate::Host::state_written`], the last one only when the whole file is durable. A higher file number of the same
/// replica ends a file that is not whole.
#[derive(Clone, Debug)]
pub struct StateWrite {
    /// The group.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Tells the replica's files apart.
    pub file: u64,
    /// Index that the state stands for.
    pub index: u64,
    /// Position, from 0 on without gaps.
    pub seq: u32,
    /// The piece.
    pub piece: Bytes,
    /// Whether it is the last one.
    pub last: bool,
}

/// This node's own leadership of a shard, for gossip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LedShard {
    /// The shard.
    pub shard: ShardId,
    /// Term in which this node leads it.
    pub term: Term,
    /// Placement epoch of the shard.
    pub epoch: Epoch,
}

/// Something an operator should read in the log or see counted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// The cluster was founded, joined or recovered, with this identity.
    Joined {
        /// The cluster's name for ever.
        uuid: ClusterUuid,
        /// Generation of its table.
        generation: u32,
        /// Whether this node took part in the founding.
        founded: bool,
        /// Whether all previous contents are lost.
        anew: bool,
    },
    /// This node has been replaced by a newer incarnation with the same id: stop.
    Fenced {
        /// The incarnation that took over.
        by: Incarnation,
    },
    /// A node id is in use by a living process: registration is refused for now.
    IdInUse {
        /// The incarnation that answers.
        by: Incarnation,
    },
    /// A configuration that cannot work together with the cluster's (other shard count, other members).
    Misfit(String),
    /// A replica stopped: its state cannot be trusted. The others go on.
    ReplicaFailed {
        /// The shard.
        shard: ShardId,
        /// What happened.
        reason: String,
    },
    /// Replicas of a shard differ: stop the line.
    DigestMismatch {
        /// The shard.
        shard: ShardId,
        /// Log index at which they differ.
        index: u64,
    },
    /// An operator wants to make this node a voter, which has never registered: it should be connected to.
    Admit {
        /// The node.
        node: NodeId,
    },
    /// Everything this node leads has been handed over after [`crate::Host::drain`].
    Drained,
}

/// Everything a [`crate::Host`] wants done, in no particular order except that `persist` batches count upward.
/// Whatever depends on a batch is withheld until it is reported persisted, so a shell cannot misorder them.
#[derive(Default, Debug)]
pub struct Effects {
    /// To be made durable.
    pub persist: Vec<PersistBatch>,
    /// Pieces of states, to be written to files.
    pub states: Vec<StateWrite>,
    /// To be sent.
    pub sends: Vec<Send>,
    /// Finished requests.
    pub completions: Vec<Completion>,
    /// The routing view, if it changed.
    pub view: Option<Arc<RoutingView>>,
    /// Shards that this node has begun to lead.
    pub led: Vec<LedShard>,
    /// For the log.
    pub notes: Vec<Note>,
    /// Keys and values that nobody needs any more: to be dropped where it may take its time, which is not this thread.
    pub garbage: Vec<Arc<Table>>,
    /// Recoveries that have ended, by the mark of their request.
    pub recoveries: Vec<(u64, RecoverResult)>,
    /// Changes of voters that have ended, by the mark of their request.
    pub voters: Vec<(u64, VoterResult)>,
}

impl Effects {
    /// Empties the lists but keeps their memory.
    pub fn clear(&mut self) {
        self.persist.clear();
        self.states.clear();
        self.sends.clear();
        self.completions.clear();
        self.view = None;
        self.led.clear();
        self.notes.clear();
        self.garbage.clear();
        self.recoveries.clear();
        self.voters.clear();
    }
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.persist.is_empty()
            && self.states.is_empty()
            && self.sends.is_empty()
            && self.completions.is_empty()
            && self.view.is_none()
            && self.led.is_empty()
            && self.notes.is_empty()
            && self.garbage.is_empty()
            && self.recoveries.is_empty()
            && self.voters.is_empty()
    }
}
