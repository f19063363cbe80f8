//! Entries, operations and outcomes as bytes: postcard for structure, payloads borrowed from the input.
//!
//! ```text
//!   entry   = version | Header | Kind | body          batch body = (SessionTag | length | ops)*
//!   ops     = count | Op*                             outcome = postcard of a borrowed mirror
//! ```

use crate::error::{CodecError, OpError};
use crate::ids::{Incarnation, LogIndex};
use crate::limits;
use crate::op::{Op, SetExpire};
use crate::reply::{Outcome, Reply, ValueType};
use crate::session::SessionTag;
use crate::slot::slot_of;
use crate::time::LogTime;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Version of the entry format that this build writes.
pub const ENTRY_VERSION: u8 = 1;

fn put<T: Serialize>(out: &mut Vec<u8>, v: &T) {
    let taken = std::mem::take(out);
    *out = postcard::to_extend(v, taken).expect("derived serializers of plain data do not fail");
}

fn take<'a, T: Deserialize<'a>>(bytes: &mut &'a [u8]) -> Result<T, CodecError> {
    let (v, rest) = postcard::take_from_bytes(bytes).map_err(|_| CodecError::Malformed)?;
    *bytes = rest;
    Ok(v)
}

/// Encodes one request's operations. Fails if there are none or too many, or if one is over a limit or ill-formed.
pub fn encode_ops(ops: &[Op<'_>]) -> Result<Bytes, CodecError> {
    if ops.is_empty() {
        return Err(CodecError::Malformed);
    }
    if ops.len() > limits::MAX_OPS_PER_REQUEST {
        return Err(CodecError::TooLarge);
    }
    let payload: usize = ops.iter().map(payload_len).sum();
    if payload > limits::MAX_REQUEST_BYTES {
        return Err(CodecError::TooLarge);
    }
    let mut out = Vec::with_capacity(8 + ops.len() * 16 + payload);
    put(&mut out, &(ops.len() as u32));
    for op in ops {
        check_op(op)?;
        put(&mut out, op);
    }
    if out.len() > limits::MAX_REQUEST_BYTES { Err(CodecError::TooLarge) } else { Ok(out.into()) }
}

fn payload_len(op: &Op<'_>) -> usize {
    let value = match op {
        Op::Set { value, .. } | Op::Append { value, .. } => value.len(),
        Op::Scan { pattern, .. } => pattern.map_or(0, <[u8]>::len),
        _ => 0,
    };
    op.key().map_or(0, |k| k.bytes.len()) + value
}

fn check_op(op: &Op<'_>) -> Result<(), CodecError> {
    let database = |db: u8| if db < limits::DATABASES { Ok(()) } else { Err(CodecError::Malformed) };
    if let Some(key) = op.key() {
        database(key.db)?;
        if key.bytes.len() > limits::MAX_KEY_BYTES {
            return Err(CodecError::TooLarge);
        }
        if slot_of(key.bytes) != key.slot {
            return Err(CodecError::Malformed);
        }
    }
    match op {
        Op::Set { value, .. } | Op::Append { value, .. } if value.len() > limits::MAX_VALUE_BYTES => {
            return Err(CodecError::TooLarge);
        }
        _ => {}
    }
    match op {
        Op::Set { expire: SetExpire::After(0), .. } | Op::GetEx { expire: SetExpire::After(0), .. } => {
            Err(CodecError::Malformed)
        }
        Op::IncrByFloat { by, .. } if !by.get().is_finite() => Err(CodecError::Malformed),
        Op::DbSize { db } | Op::Flush { db: Some(db) } => database(*db),
        Op::Scan { db, count, pattern, .. } => {
            database(*db)?;
            if !(1..=limits::MAX_SCAN_COUNT).contains(count) || pattern.is_some_and(|p| p.len() > limits::MAX_KEY_BYTES)
            {
                return Err(CodecError::Malformed);
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Operations of one request, checked once so that apply may rely on them.
#[derive(Clone, Copy, Debug)]
pub struct OpsRef<'a> {
    bytes: &'a [u8],
    count: u32,
    writes: bool,
}

impl<'a> OpsRef<'a> {
    /// Checks form and limits of every operation.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CodecError> {
        if bytes.len() > limits::MAX_REQUEST_BYTES {
            return Err(CodecError::TooLarge);
        }
        let mut rest = bytes;
        let count: u32 = take(&mut rest)?;
        if count == 0 || count as usize > limits::MAX_OPS_PER_REQUEST {
            return Err(CodecError::Malformed);
        }
        let body = rest;
        let mut writes = false;
        for _ in 0..count {
            let op: Op<'a> = take(&mut rest)?;
            check_op(&op)?;
            writes |= op.is_write();
        }
        if rest.is_empty() { Ok(OpsRef { bytes: body, count, writes }) } else { Err(CodecError::Malformed) }
    }
    /// The operations, in order. Does not allocate.
    pub fn iter(&self) -> impl Iterator<Item = Op<'a>> + use<'a> {
        let mut rest = self.bytes;
        (0..self.count).map_while(move |_| take(&mut rest).ok())
    }
    /// Number of operations, at least 1.
    pub fn len(&self) -> usize {
        self.count as usize
    }
    /// Never: a request has at least one operation.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
    /// Whether any operation writes.
    pub fn is_write(&self) -> bool {
        self.writes
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    stamp: LogTime,
    wall_offset: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    Batch,
    OpenSession { gateway: Incarnation },
    Advance,
    CheckDigest { index: LogIndex, digest: u64 },
}

fn begin(stamp: LogTime, wall_offset: i64, kind: Kind) -> Vec<u8> {
    let mut out = vec![ENTRY_VERSION];
    put(&mut out, &Header { stamp, wall_offset });
    put(&mut out, &kind);
    out
}

/// Builds the payload of one log entry from many requests.
#[derive(Debug)]
pub struct EntryBuilder {
    bytes: Vec<u8>,
    len: usize,
}

impl EntryBuilder {
    /// An entry stamped with log time and the leader's wall-clock offset (wall minus log time, milliseconds).
    pub fn new(stamp: LogTime, wall_offset: i64) -> Self {
        EntryBuilder { bytes: begin(stamp, wall_offset, Kind::Batch), len: 0 }
    }
    /// Adds one request; `ops` as [`encode_ops`] wrote them.
    pub fn push(&mut self, tag: SessionTag, ops: &[u8]) {
        put(&mut self.bytes, &tag);
        put(&mut self.bytes, &ops);
        self.len += 1;
    }
    /// Number of requests so far.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Bytes so far.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }
    /// The payload.
    pub fn finish(self) -> Bytes {
        self.bytes.into()
    }
}

/// An entry that opens a session for a gateway, replacing its earlier one; the outcome is `Reply::Int(session id)`.
pub fn encode_open_session(stamp: LogTime, gateway: Incarnation) -> Bytes {
    begin(stamp, 0, Kind::OpenSession { gateway }).into()
}

/// An entry that only moves log time on.
pub fn encode_advance(stamp: LogTime) -> Bytes {
    begin(stamp, 0, Kind::Advance).into()
}

/// An entry that compares digests: every replica must have had `digest` when it had applied `index`.
pub fn encode_check_digest(stamp: LogTime, index: LogIndex, digest: u64) -> Bytes {
    begin(stamp, 0, Kind::CheckDigest { index, digest }).into()
}

/// What an entry does.
#[derive(Clone, Copy, Debug)]
pub enum EntryBody<'a> {
    /// Requests of sessions.
    Batch(Requests<'a>),
    /// Opens a session.
    OpenSession {
        /// For this life of a node.
        gateway: Incarnation,
    },
    /// Moves log time on.
    Advance,
    /// Compares digests.
    CheckDigest {
        /// At this applied index.
        index: LogIndex,
        /// The leader's.
        digest: u64,
    },
}

/// A decoded entry. Payloads borrow from its bytes.
#[derive(Clone, Copy, Debug)]
pub struct EntryView<'a> {
    /// Log time of its leader.
    pub stamp: LogTime,
    /// The leader's wall time minus `stamp`, in milliseconds.
    pub wall_offset: i64,
    /// What it does.
    pub body: EntryBody<'a>,
}

/// The requests of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Requests<'a>(&'a [u8]);

impl<'a> Iterator for Requests<'a> {
    type Item = Result<(SessionTag, OpsRef<'a>), CodecError>;
    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let mut one = || {
            let tag = take(&mut self.0)?;
            let ops: &'a [u8] = take(&mut self.0)?;
            Ok((tag, OpsRef::parse(ops)?))
        };
        let item = one();
        if item.is_err() {
            self.0 = &[];
        }
        Some(item)
    }
}

/// Decodes an entry. The requests of a batch are checked as they are iterated.
pub fn decode_entry(bytes: &[u8]) -> Result<EntryView<'_>, CodecError> {
    let (version, mut rest) = bytes.split_first().ok_or(CodecError::Malformed)?;
    if *version != ENTRY_VERSION {
        return Err(CodecError::UnknownVersion(*version));
    }
    let header: Header = take(&mut rest)?;
    let body = match take(&mut rest)? {
        Kind::Batch => {
            return Ok(EntryView {
                stamp: header.stamp,
                wall_offset: header.wall_offset,
                body: EntryBody::Batch(Requests(rest)),
            });
        }
        Kind::OpenSession { gateway } => EntryBody::OpenSession { gateway },
        Kind::Advance => EntryBody::Advance,
        Kind::CheckDigest { index, digest } => EntryBody::CheckDigest { index, digest },
    };
    if !rest.is_empty() {
        return Err(CodecError::Malformed);
    }
    Ok(EntryView { stamp: header.stamp, wall_offset: header.wall_offset, body })
}

/// Flat mirror of [`Reply`], borrowing payloads. An array is its length followed by its elements.
#[derive(Serialize, Deserialize)]
enum WireReply<'a> {
    Ok,
    Nil,
    Int(i64),
    Bulk(&'a [u8]),
    Type(ValueType),
    Scan {
        next: Option<u64>,
        #[serde(borrow)]
        keys: Vec<&'a [u8]>,
    },
    Error(OpError),
    Array(u32),
}

#[derive(Serialize, Deserialize)]
enum WireOutcome {
    Reply,
    Gap,
    Unknown,
    NoSession,
}

fn put_reply(reply: &Reply, out: &mut Vec<u8>) {
    let wire = match reply {
        Reply::Ok => WireReply::Ok,
        Reply::Nil => WireReply::Nil,
        Reply::Int(i) => WireReply::Int(*i),
        Reply::Bulk(b) => WireReply::Bulk(b),
        Reply::Type(t) => WireReply::Type(*t),
        Reply::Scan { next, keys } => WireReply::Scan { next: *next, keys: keys.iter().map(|k| &k[..]).collect() },
        Reply::Error(e) => WireReply::Error(*e),
        Reply::Array(items) => {
            put(out, &WireReply::Array(items.len() as u32));
            return items.iter().for_each(|r| put_reply(r, out));
        }
    };
    put(out, &wire);
}

fn take_reply<'a>(whole: &Bytes, rest: &mut &'a [u8], arrays: bool) -> Result<Reply, CodecError> {
    Ok(match take::<WireReply<'a>>(rest)? {
        WireReply::Ok => Reply::Ok,
        WireReply::Nil => Reply::Nil,
        WireReply::Int(i) => Reply::Int(i),
        WireReply::Bulk(b) => Reply::Bulk(whole.slice_ref(b)),
        WireReply::Type(t) => Reply::Type(t),
        WireReply::Scan { next, keys } => {
            Reply::Scan { next, keys: keys.into_iter().map(|k| whole.slice_ref(k)).collect() }
        }
        WireReply::Error(e) => Reply::Error(e),
        WireReply::Array(n) if arrays && n as usize <= limits::MAX_OPS_PER_REQUEST => {
            let mut items = Vec::new();
            for _ in 0..n {
                items.push(take_reply(whole, rest, false)?);
            }
            Reply::Array(items)
        }
        WireReply::Array(_) => return Err(CodecError::Malformed),
    })
}

/// Appends an outcome.
pub fn encode_outcome(outcome: &Outcome, out: &mut Vec<u8>) {
    match outcome {
        Outcome::Reply(r) => {
            put(out, &WireOutcome::Reply);
            put_reply(r, out);
        }
        Outcome::Gap => put(out, &WireOutcome::Gap),
        Outcome::Unknown => put(out, &WireOutcome::Unknown),
        Outcome::NoSession => put(out, &WireOutcome::NoSession),
    }
}

/// Decodes an outcome at the beginning of `bytes`, and how many bytes it took. Payloads are slices of `bytes`.
pub fn decode_outcome(bytes: &Bytes) -> Result<(Outcome, usize), CodecError> {
    let mut rest: &[u8] = bytes;
    let outcome = match take(&mut rest)? {
        WireOutcome::Reply => Outcome::Reply(take_reply(bytes, &mut rest, true)?),
        WireOutcome::Gap => Outcome::Gap,
        WireOutcome::Unknown => Outcome::Unknown,
        WireOutcome::NoSession => Outcome::NoSession,
    };
    Ok((outcome, bytes.len() - rest.len()))
}
