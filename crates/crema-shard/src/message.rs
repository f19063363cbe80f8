//! Frames between peers: our own encoding, postcard for structure, payloads as slices of the received frame.
//!
//! ```text
//!   Raft channel:      kind byte | RAFT: WireMessage*      | CONTROL: one Control
//!   Requests channel:  kind byte | process | REQUESTS: WireRequest* or ANSWERS: WireAnswer*
//!   Snapshot channel:  kind byte | CHUNK: one WireChunk    | CHUNK_ACK: one ChunkAck
//! ```
//!
//! protobuf never parses bytes from the network (RUSTSEC-2024-0437). A frame that does not decode means that its sender
//! cannot be trusted; the shell closes the connection.

use crate::members::Members;
use crate::meta::{MAX_REPLICAS, NodeAddrs, bounded_vec};
use crate::placement::MAX_SHARDS;
use crate::recovery::Report;
use crate::transfer::{Chunk, ChunkAck};
use bytes::Bytes;
use crema_core::codec::{decode_outcome, encode_outcome};
use crema_core::limits::MAX_REQUEST_BYTES;
use crema_core::{CodecError, Epoch, Incarnation, NodeId, Outcome, ReplicaId, SessionTag, ShardId, Term};
use raft::eraftpb::{Entry, EntryType, Message, MessageType, Snapshot};
use serde::{Deserialize, Serialize};

/// Longest frame body in bytes: a few of the largest entries and their envelopes.
pub const MAX_FRAME_BYTES: usize = 2 * MAX_REQUEST_BYTES;
/// A frame under construction is closed once it has this many bytes.
pub const TARGET_FRAME_BYTES: usize = 1024 * 1024;

/// First byte of a frame on the Raft channel: Raft messages.
pub const KIND_RAFT: u8 = 1;
/// First byte of a frame on the Raft channel: one [`Control`] message.
pub const KIND_CONTROL: u8 = 2;
/// First byte of a frame on the requests channel: forwarded requests.
pub const KIND_REQUESTS: u8 = 3;
/// First byte of a frame on the requests channel: answers to forwarded requests.
pub const KIND_ANSWERS: u8 = 4;
/// First byte of a frame on the snapshot channel: one [`Chunk`].
pub const KIND_CHUNK: u8 = 5;
/// First byte of a frame on the snapshot channel: one [`ChunkAck`].
pub const KIND_CHUNK_ACK: u8 = 6;

/// Asks a voter to sleep with the group at (term, index); not a Raft message, but ordered with them.
pub const MSG_SLEEP: u8 = 200;
/// The voter sleeps at (term, index).
pub const MSG_SLEEP_OK: u8 = 201;

/// One entry of a [`WireMessage`]. Of a change of members `data` is the entry's context: what raft-rs keeps in its data is
/// protobuf, and made anew by whoever applies it.
#[derive(Serialize, Deserialize)]
struct WireEntry<'a> {
    kind: u8,
    term: u64,
    index: u64,
    data: &'a [u8],
}

/// A Raft message with what a Multi-Raft host adds to it.
#[derive(Serialize, Deserialize)]
struct WireMessage<'a> {
    shard: ShardId,
    to: ReplicaId,
    from: ReplicaId,
    kind: u8,
    term: u64,
    log_term: u64,
    index: u64,
    commit: u64,
    commit_term: u64,
    reject: bool,
    reject_hint: u64,
    context: &'a [u8],
    log_time: u64,
    floor: u64,
    #[serde(borrow)]
    entries: Vec<WireEntry<'a>>,
}

/// A Raft message and its envelope.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    /// The group.
    pub shard: ShardId,
    /// The estimate of log time of a leader or a voter, 0 on other messages and where the sender does not know it.
    pub log_time: u64,
    /// Index up to which every voter that counts has the leader's log, so that it need not be kept; 0 on other messages.
    pub floor: u64,
    /// What it says.
    pub body: Body,
}

/// A Raft message or one of ours that must keep its place among them.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// For raft-rs.
    Raft(Message),
    /// [`MSG_SLEEP`] or, with `ok`, [`MSG_SLEEP_OK`].
    Sleep {
        /// Sender.
        from: ReplicaId,
        /// Receiver.
        to: ReplicaId,
        /// Term of the leader.
        term: Term,
        /// Last index, committed and applied.
        index: u64,
        /// Whether this is the answer.
        ok: bool,
    },
}

impl Envelope {
    /// The receiving replica.
    pub fn to(&self) -> ReplicaId {
        match &self.body {
            Body::Raft(m) => ReplicaId(m.to),
            Body::Sleep { to, .. } => *to,
        }
    }
}

/// Message types by their wire code, the position. Appended only.
const TYPES: [MessageType; 10] = [
    MessageType::MsgAppend,
    MessageType::MsgAppendResponse,
    MessageType::MsgRequestVote,
    MessageType::MsgRequestVoteResponse,
    MessageType::MsgHeartbeat,
    MessageType::MsgHeartbeatResponse,
    MessageType::MsgTimeoutNow,
    MessageType::MsgRequestPreVote,
    MessageType::MsgRequestPreVoteResponse,
    MessageType::MsgSnapshot,
];

/// Appends a message to a Raft frame. Returns `false` for a type that never travels (proposals and reads are not
/// forwarded inside Raft).
pub fn encode_envelope(out: &mut Vec<u8>, e: &Envelope) -> bool {
    let empty = WireMessage {
        shard: e.shard,
        to: ReplicaId(0),
        from: ReplicaId(0),
        kind: 0,
        term: 0,
        log_term: 0,
        index: 0,
        commit: 0,
        commit_term: 0,
        reject: false,
        reject_hint: 0,
        context: &[],
        log_time: e.log_time,
        floor: e.floor,
        entries: Vec::new(),
    };
    let wire = match &e.body {
        Body::Raft(m) => {
            let Some(kind) = TYPES.iter().position(|t| *t == m.msg_type) else { return false };
            WireMessage {
                to: ReplicaId(m.to),
                from: ReplicaId(m.from),
                kind: kind as u8,
                term: m.term,
                log_term: m.log_term,
                index: m.index,
                commit: m.commit,
                commit_term: m.commit_term,
                reject: m.reject,
                reject_hint: m.reject_hint,
                context: &m.context,
                entries: m
                    .entries
                    .iter()
                    .map(|e| WireEntry { kind: e.entry_type as u8, term: e.term, index: e.index, data: payload(e) })
                    .collect(),
                ..empty
            }
        }
        Body::Sleep { from, to, term, index, ok } => WireMessage {
            to: *to,
            from: *from,
            kind: if *ok { MSG_SLEEP_OK } else { MSG_SLEEP },
            term: term.0,
            index: *index,
            ..empty
        },
    };
    write(out, &wire);
    true
}

/// What an entry says: its payload, or of a change of members the [`crate::members::ConfStep`].
pub fn payload(e: &Entry) -> &Bytes {
    if e.entry_type == EntryType::EntryNormal { &e.data } else { &e.context }
}

/// What makes a MsgSnapshot fit for the wire: its point as (index, log term), the members as its context.
pub fn announce(m: &mut Message, members: &Members) {
    let metadata = m.take_snapshot().take_metadata();
    m.index = metadata.index;
    m.log_term = metadata.term;
    m.context = members.encode().into();
}

/// The snapshot that raft-rs shall see in such a message. Its data travelled before it.
pub fn snapshot_of(index: u64, term: u64, members: &Members) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    metadata.index = index;
    metadata.term = term;
    metadata.set_conf_state(members.to_raft());
    snapshot
}

/// Serializes into a growing buffer. Cannot fail: our types have no unserializable parts.
fn write<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    let taken = std::mem::take(out);
    *out = postcard::to_extend(value, taken).expect("derived serializers of plain data do not fail");
}

fn read<'a, T: Deserialize<'a>>(bytes: &mut &'a [u8]) -> Result<T, CodecError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|_| CodecError::Malformed)?;
    *bytes = rest;
    Ok(value)
}

/// Decodes the messages of a Raft frame, kind byte excluded. Payloads are slices of `frame`.
pub fn decode_envelopes(frame: &Bytes) -> Result<Vec<Envelope>, CodecError> {
    let mut rest: &[u8] = frame;
    let mut out = Vec::new();
    while !rest.is_empty() {
        let w: WireMessage<'_> = read(&mut rest)?;
        let body = match w.kind {
            MSG_SLEEP | MSG_SLEEP_OK => {
                Body::Sleep { from: w.from, to: w.to, term: Term(w.term), index: w.index, ok: w.kind == MSG_SLEEP_OK }
            }
            kind => {
                let Some(msg_type) = TYPES.get(usize::from(kind)) else { return Err(CodecError::Malformed) };
                let mut m = Message {
                    msg_type: *msg_type,
                    to: w.to.0,
                    from: w.from.0,
                    term: w.term,
                    log_term: w.log_term,
                    index: w.index,
                    commit: w.commit,
                    commit_term: w.commit_term,
                    reject: w.reject,
                    reject_hint: w.reject_hint,
                    context: frame.slice_ref(w.context),
                    ..Message::default()
                };
                let mut next = w.index;
                let mut entries = Vec::with_capacity(w.entries.len());
                for e in w.entries {
                    // raft-rs trusts the numbering of entries; a hole would panic deep inside it.
                    next = next.checked_add(1).ok_or(CodecError::Malformed)?;
                    if e.index != next || e.term > w.term {
                        return Err(CodecError::Malformed);
                    }
                    let entry_type = match e.kind {
                        0 => EntryType::EntryNormal,
                        1 => EntryType::EntryConfChange,
                        2 => EntryType::EntryConfChangeV2,
                        _ => return Err(CodecError::Malformed),
                    };
                    let payload = frame.slice_ref(e.data);
                    let normal = entry_type == EntryType::EntryNormal;
                    let (data, context) = if normal { (payload, Bytes::new()) } else { (Bytes::new(), payload) };
                    entries.push(Entry { entry_type, term: e.term, index: e.index, data, context, ..Entry::default() });
                }
                m.set_entries(entries.into());
                if m.msg_type == MessageType::MsgSnapshot {
                    let members = Members::decode(&m.context)?;
                    if w.index == 0 || w.log_term == 0 || w.log_term > w.term {
                        return Err(CodecError::Malformed);
                    }
                    m.set_snapshot(snapshot_of(w.index, w.log_term, &members));
                }
                // A message without a term counts as local for raft-rs.
                if m.term == 0 {
                    return Err(CodecError::Malformed);
                }
                Body::Raft(m)
            }
        };
        out.push(Envelope { shard: w.shard, log_time: w.log_time, floor: w.floor, body });
    }
    Ok(out)
}

#[derive(Serialize, Deserialize)]
struct WireChunk<'a> {
    shard: ShardId,
    from: ReplicaId,
    to: ReplicaId,
    transfer: u64,
    seq: u32,
    last: bool,
    data: &'a [u8],
}

/// A piece of a state as a frame.
pub fn encode_chunk(c: &Chunk) -> Bytes {
    let mut out = Vec::with_capacity(c.data.len() + 64);
    out.push(KIND_CHUNK);
    let Chunk { shard, from, to, transfer, seq, last, ref data } = *c;
    write(&mut out, &WireChunk { shard, from, to, transfer, seq, last, data });
    out.into()
}

/// Decodes a chunk frame, kind byte excluded.
pub fn decode_chunk(frame: &Bytes) -> Result<Chunk, CodecError> {
    let mut rest: &[u8] = frame;
    let w: WireChunk<'_> = read(&mut rest)?;
    if !rest.is_empty() {
        return Err(CodecError::Malformed);
    }
    let WireChunk { shard, from, to, transfer, seq, last, data } = w;
    Ok(Chunk { shard, from, to, transfer, seq, last, data: frame.slice_ref(data) })
}

/// An acknowledgement as a frame.
pub fn encode_chunk_ack(ack: &ChunkAck) -> Bytes {
    let mut out = vec![KIND_CHUNK_ACK];
    write(&mut out, ack);
    out.into()
}

/// Decodes an acknowledgement frame, kind byte excluded.
pub fn decode_chunk_ack(frame: &[u8]) -> Result<ChunkAck, CodecError> {
    let mut rest = frame;
    let ack = read(&mut rest)?;
    if rest.is_empty() { Ok(ack) } else { Err(CodecError::Malformed) }
}

/// Most groups that one [`Control::AskLeaders`] names.
pub const ASKED_AT_ONCE: usize = 1024;

/// What nodes tell each other outside the groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// I live. Sent every beat period on the Raft stream; proves the node's life, never a group's acknowledgement.
    Beat {
        /// Epoch of the placement I know, 0 for none.
        epoch: Epoch,
        /// How much of the memory that I registered may be for data now, in parts of [`crate::meta::WHOLE_SHARE`]: less
        /// while more is resident than accounted.
        share: u8,
    },
    /// Founding: do you know a cluster?
    Ask,
    /// Founding: this is the cluster I belong to, as an encoded [`crate::MetaState`], or none.
    Answer {
        /// The state.
        state: Option<Vec<u8>>,
        /// My addresses.
        addrs: NodeAddrs,
    },
    /// Founding: the lowest initial member proposes this record.
    Propose {
        /// An encoded [`crate::MetaState`].
        record: Vec<u8>,
    },
    /// Founding: I accept the record with this hash, and no other while its proposer lives.
    Accept {
        /// [`crate::founding::record_hash`] of the record.
        hash: u64,
    },
    /// Founding: I cannot accept that record.
    Refuse {
        /// [`crate::founding::record_hash`] of the record.
        hash: u64,
        /// Why, for the proposer's operator.
        reason: String,
        /// Whether only an operator can change that; else it is worth proposing again.
        lasting: bool,
    },
    /// Founding: everybody accepted the record with this hash: the cluster exists.
    Found {
        /// [`crate::founding::record_hash`] of the record.
        hash: u64,
    },
    /// For the leader of the meta group: count this life of me.
    Register {
        /// My addresses.
        addrs: NodeAddrs,
        /// Most bytes of memory that I may use, 0 for no limit.
        max_memory: u64,
    },
    /// The id is in use by a life that still answers. Streams go by node id, so the message may reach that life instead of
    /// the refused one.
    RegisterRefused {
        /// The life that may not register.
        refused: Incarnation,
        /// That life.
        by: Incarnation,
    },
    /// For the leader of the meta group: I am about to stop, or have changed my mind.
    SetDraining {
        /// Which of both.
        draining: bool,
    },
    /// The table, from the leader of the meta group to a node that has no replica of it.
    Placement {
        /// An encoded [`crate::MetaState`].
        state: Vec<u8>,
    },
    /// What do you know of these groups? I know of no leader of them.
    TakeCensus {
        /// Tells the rounds of whoever asks apart.
        round: u64,
        /// The table that I know: generation and epoch, 0 for none.
        version: (u32, Epoch),
        /// The groups, ascending.
        #[serde(deserialize_with = "bounded_vec::<_, _, { MAX_SHARDS as usize + 1 }>")]
        groups: Vec<ShardId>,
    },
    /// The answer to that.
    Census {
        /// The round.
        round: u64,
        /// What I know.
        report: Box<Report>,
    },
    /// For the leader of the meta group, by an operator's word: found groups anew.
    Refound {
        /// A [`crate::meta::MetaCommand::Refound`], encoded.
        command: Vec<u8>,
    },
    /// The leader of the meta group does not do that.
    RefoundRefused {
        /// Why, for the operator.
        reason: String,
    },
    /// By an operator's word, the table of the next generation, since the meta group has lost its majority.
    ProposeRecovery {
        /// An encoded [`crate::MetaState`].
        record: Vec<u8>,
    },
    /// I accept the table with this hash, and no other of its generation for a while.
    AcceptRecovery {
        /// [`crate::founding::record_hash`] of the record.
        hash: u64,
    },
    /// I do not accept that table.
    RefuseRecovery {
        /// [`crate::founding::record_hash`] of the record.
        hash: u64,
        /// Why, for the operator.
        reason: String,
    },
    /// For the leader of the meta group, by an operator's word: a node may hold replicas, or no longer.
    Approve {
        /// Tells the questions of whoever asks apart.
        round: u64,
        /// The node.
        node: NodeId,
        /// Which of both.
        approved: bool,
    },
    /// It is so, and committed, says the leader of the meta group.
    Approved {
        /// Of the question.
        round: u64,
    },
    /// The leader of the meta group does not do that.
    ApproveRefused {
        /// Of the question.
        round: u64,
        /// Why, for the operator.
        reason: String,
    },
    /// For the leader of the meta group: I lead this group, and its members are these and no others.
    Settled {
        /// The group.
        shard: ShardId,
        /// Epoch of the decision that it has settled to.
        epoch: Epoch,
        /// Its voters.
        #[serde(deserialize_with = "bounded_vec::<_, _, MAX_REPLICAS>")]
        members: Vec<ReplicaId>,
    },
    /// Which of these groups do you lead? I know of no leader of them.
    AskLeaders {
        /// The groups.
        #[serde(deserialize_with = "bounded_vec::<_, _, ASKED_AT_ONCE>")]
        groups: Vec<ShardId>,
    },
    /// Of those that you asked for I lead these, each in its term.
    Leads {
        /// The groups.
        #[serde(deserialize_with = "bounded_vec::<_, _, ASKED_AT_ONCE>")]
        groups: Vec<(ShardId, Term)>,
    },
    /// The leader of the meta group does not do that at present: asked again later it may.
    ApproveNotNow {
        /// Of the question.
        round: u64,
        /// What has to change first, for the operator.
        reason: String,
    },
    /// The leader of the meta group does not know the node.
    ApproveNotJoined {
        /// Of the question.
        round: u64,
        /// The node.
        node: NodeId,
    },
}

/// Encodes a control frame.
pub fn encode_control(c: &Control) -> Bytes {
    let mut out = vec![KIND_CONTROL];
    write(&mut out, c);
    out.into()
}

/// Decodes a control frame, kind byte excluded.
pub fn decode_control(frame: &[u8]) -> Result<Control, CodecError> {
    let mut rest = frame;
    let c = read(&mut rest)?;
    if rest.is_empty() { Ok(c) } else { Err(CodecError::Malformed) }
}

/// What a gateway asks of a shard's leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RequestBody {
    /// A write of a session; executed once and in order of `seq`.
    Write {
        /// Its place in the session.
        tag: SessionTag,
        /// Operations.
        ops: Bytes,
    },
    /// A linearizable read.
    Read {
        /// Operations.
        ops: Bytes,
    },
    /// Opens a session for the sender's incarnation.
    OpenSession,
    /// Asks for an index at or above that of everything acknowledged so far, for a read elsewhere.
    ReadIndex,
}

/// Splits the number of the gateway's process off a frame of the requests channel, kind byte excluded. The process stamps
/// its requests with it, their answers bear it too: so an answer to an earlier process of the same life is told apart.
pub fn split_process(frame: &Bytes) -> Result<(u64, Bytes), CodecError> {
    let process = frame.first_chunk::<8>().ok_or(CodecError::Malformed)?;
    Ok((u64::from_le_bytes(*process), frame.slice(8..)))
}

/// A request on its way to a shard's leader. One hop: who is not the leader refuses and says who is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The shard.
    pub shard: ShardId,
    /// The gateway's mark, returned with the answer.
    pub id: u64,
    /// What is asked.
    pub body: RequestBody,
}

#[derive(Serialize, Deserialize)]
enum WireBody<'a> {
    Write { tag: SessionTag, ops: &'a [u8] },
    Read { ops: &'a [u8] },
    OpenSession,
    ReadIndex,
}

#[derive(Serialize, Deserialize)]
struct WireRequest<'a> {
    shard: ShardId,
    id: u64,
    #[serde(borrow)]
    body: WireBody<'a>,
}

/// Appends a request to a requests frame.
pub fn encode_request(out: &mut Vec<u8>, r: &Request) {
    let body = match &r.body {
        RequestBody::Write { tag, ops } => WireBody::Write { tag: *tag, ops },
        RequestBody::Read { ops } => WireBody::Read { ops },
        RequestBody::OpenSession => WireBody::OpenSession,
        RequestBody::ReadIndex => WireBody::ReadIndex,
    };
    write(out, &WireRequest { shard: r.shard, id: r.id, body });
}

/// Decodes a requests frame, kind byte excluded. Payloads are slices of `frame`, checked as operations.
pub fn decode_requests(frame: &Bytes) -> Result<Vec<Request>, CodecError> {
    let mut rest: &[u8] = frame;
    let mut out = Vec::new();
    while !rest.is_empty() {
        let w: WireRequest<'_> = read(&mut rest)?;
        let body = match w.body {
            WireBody::Write { tag, ops } => {
                crema_core::OpsRef::parse(ops)?;
                RequestBody::Write { tag, ops: frame.slice_ref(ops) }
            }
            WireBody::Read { ops } => {
                if crema_core::OpsRef::parse(ops)?.is_write() {
                    return Err(CodecError::Malformed);
                }
                RequestBody::Read { ops: frame.slice_ref(ops) }
            }
            WireBody::OpenSession => RequestBody::OpenSession,
            WireBody::ReadIndex => RequestBody::ReadIndex,
        };
        out.push(Request { shard: w.shard, id: w.id, body });
    }
    Ok(out)
}

/// What a shard's replica says to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// From apply, or the answer of a read.
    Outcome(Outcome),
    /// Not led here, and so not proposed.
    NotLeader {
        /// Who leads, if known.
        leader: Option<NodeId>,
        /// In which term.
        term: Term,
    },
    /// Taken, but leadership was lost before it committed: it may still happen. Safe to send again with the same tag.
    Lost,
    /// The leader's queue is full. Not taken.
    Busy,
}

#[derive(Serialize, Deserialize)]
enum WireAnswer {
    Outcome,
    NotLeader { leader: Option<NodeId>, term: Term },
    Lost,
    Busy,
}

/// Appends an answer to an answers frame.
pub fn encode_answer(out: &mut Vec<u8>, shard: ShardId, id: u64, answer: &Answer) {
    let wire = match answer {
        Answer::Outcome(_) => WireAnswer::Outcome,
        Answer::NotLeader { leader, term } => WireAnswer::NotLeader { leader: *leader, term: *term },
        Answer::Lost => WireAnswer::Lost,
        Answer::Busy => WireAnswer::Busy,
    };
    write(out, &(shard, id, wire));
    if let Answer::Outcome(o) = answer {
        encode_outcome(o, out);
    }
}

/// Decodes an answers frame, kind byte excluded.
pub fn decode_answers(frame: &Bytes) -> Result<Vec<(ShardId, u64, Answer)>, CodecError> {
    let mut at = 0;
    let mut out = Vec::new();
    while at < frame.len() {
        let mut rest = &frame[at..];
        let before = rest.len();
        let (shard, id, wire): (ShardId, u64, WireAnswer) = read(&mut rest)?;
        at += before - rest.len();
        let answer = match wire {
            WireAnswer::Outcome => {
                let (outcome, used) = decode_outcome(&frame.slice(at..))?;
                at += used;
                Answer::Outcome(outcome)
            }
            WireAnswer::NotLeader { leader, term } => Answer::NotLeader { leader, term },
            WireAnswer::Lost => Answer::Lost,
            WireAnswer::Busy => Answer::Busy,
        };
        out.push((shard, id, answer));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::{KeyRef, Op, Reply, Seq, SessionId, encode_ops};

    fn append() -> Envelope {
        let mut m = Message {
            msg_type: MessageType::MsgAppend,
            to: 7,
            from: 9,
            term: 4,
            log_term: 3,
            index: 10,
            commit: 8,
            ..Message::default()
        };
        let data = Bytes::from_static(b"payload");
        m.set_entries(
            vec![
                Entry { term: 4, index: 11, data, ..Entry::default() },
                Entry { term: 4, index: 12, ..Entry::default() },
            ]
            .into(),
        );
        Envelope { shard: ShardId(3), log_time: 55, floor: 2, body: Body::Raft(m) }
    }

    #[test]
    fn envelopes_round_trip_without_copying_payloads() {
        let sleep = Envelope {
            shard: ShardId::META,
            log_time: 0,
            floor: 0,
            body: Body::Sleep { from: ReplicaId(1), to: ReplicaId(2), term: Term(3), index: 4, ok: true },
        };
        let mut out = Vec::new();
        assert!(encode_envelope(&mut out, &append()));
        assert!(encode_envelope(&mut out, &sleep));
        let frame = Bytes::from(out);
        let got = decode_envelopes(&frame).unwrap();
        assert_eq!(got, vec![append(), sleep]);
        let Body::Raft(m) = &got[0].body else { panic!("a raft message") };
        let range = frame.as_ptr_range();
        assert!(range.contains(&m.entries[0].data.as_ptr()), "the payload is a slice of the frame");
    }

    #[test]
    fn cut_and_flipped_frames_never_panic_and_cuts_are_refused() {
        let mut out = Vec::new();
        encode_envelope(&mut out, &append());
        for cut in 1..out.len() {
            assert!(decode_envelopes(&Bytes::copy_from_slice(&out[..cut])).is_err(), "cut at {cut}");
        }
        for i in 0..out.len() {
            for bit in 0..8 {
                let mut bad = out.clone();
                bad[i] ^= 1 << bit;
                let bad = Bytes::from(bad);
                let _ = decode_envelopes(&bad);
                let _ = decode_requests(&bad);
                let _ = decode_answers(&bad);
                let _ = decode_control(&bad);
            }
        }
    }

    #[test]
    fn proposals_and_local_messages_never_travel() {
        let m = Message { msg_type: MessageType::MsgPropose, ..Message::default() };
        let e = Envelope { shard: ShardId(0), log_time: 0, floor: 0, body: Body::Raft(m) };
        assert!(!encode_envelope(&mut Vec::new(), &e));
    }

    #[test]
    fn a_hole_between_entries_is_refused() {
        let mut e = append();
        let Body::Raft(m) = &mut e.body else { panic!("a raft message") };
        m.mut_entries()[1].index = 13;
        let mut out = Vec::new();
        encode_envelope(&mut out, &e);
        assert_eq!(decode_envelopes(&out.into()), Err(CodecError::Malformed));
    }

    #[test]
    fn requests_and_answers_round_trip() {
        let key = KeyRef::new(0, b"k").unwrap();
        let get = encode_ops(&[Op::Get { key }]).unwrap();
        let del = encode_ops(&[Op::Del { key }]).unwrap();
        let tag = SessionTag { session: SessionId(5), seq: Seq(6), low: Seq(1) };
        let requests = vec![
            Request { shard: ShardId(1), id: 1, body: RequestBody::Write { tag, ops: del.clone() } },
            Request { shard: ShardId(1), id: 2, body: RequestBody::Read { ops: get } },
            Request { shard: ShardId(2), id: 3, body: RequestBody::OpenSession },
        ];
        let mut out = Vec::new();
        requests.iter().for_each(|r| encode_request(&mut out, r));
        assert_eq!(decode_requests(&out.into()).unwrap(), requests);
        // A write dressed up as a read would escape the log.
        let mut out = Vec::new();
        encode_request(&mut out, &Request { shard: ShardId(1), id: 4, body: RequestBody::Read { ops: del } });
        assert_eq!(decode_requests(&out.into()), Err(CodecError::Malformed));

        let answers = vec![
            (ShardId(1), 1, Answer::Outcome(Outcome::Reply(Reply::Bulk(Bytes::from_static(b"v"))))),
            (ShardId(1), 2, Answer::NotLeader { leader: Some(NodeId(3)), term: Term(9) }),
            (ShardId(2), 3, Answer::Lost),
            (ShardId(2), 4, Answer::Busy),
            (ShardId(2), 5, Answer::Outcome(Outcome::Gap)),
        ];
        let mut out = Vec::new();
        answers.iter().for_each(|(s, i, a)| encode_answer(&mut out, *s, *i, a));
        assert_eq!(decode_answers(&out.into()).unwrap(), answers);
    }
}
