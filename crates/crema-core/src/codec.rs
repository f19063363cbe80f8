//! The bytes of requests, log entries and outcomes.
//!
//! ```text
//!   [Op] --encode_ops--> ops block: count, ops ----EntryBuilder----> entry: version, stamp, wall offset, kind, body
//!         OpsRef::parse <--'   (checked once, borrowed ever after)        decode_entry <--'   EntryView borrows
//!   Outcome --encode_outcome--> peer frame --decode_outcome--> Outcome, its strings slices of the frame
//! ```
//!
//! Structure is postcard (little-endian varints, length-prefixed bytes); the position of an enum's variant is its code.
//! Decoding copies no payload, and allocates nothing but the lists of a reply, whose length is checked before. It never
//! panics, whatever the bytes: what it accepts is fully checked, so that apply may rely on every [`Op`] it gets.
//!
//! | kind | body |
//! |---|---|
//! | 0 batch | `u32` number of requests (four bytes, little-endian), then each: tag, length, ops block |
//! | 1 open session | gateway's incarnation |
//! | 2 advance | – |
//! | 3 check digest | index, digest |
//! | 4 set limits | limits |
//! | 5 remove | expired only (a byte, 0 or 1), then ten bytes a victim: slot, hash (little-endian) |

use crate::error::{CodecError, OpError};
use crate::glob::MAX_PATTERN_BYTES;
use crate::ids::{Incarnation, LogIndex};
use crate::key::KeyRef;
use crate::limits::{
    DATABASES, MAX_KEY_BYTES, MAX_OPS_PER_REQUEST, MAX_REQUEST_BYTES, MAX_SCAN_COUNT, MAX_VALUE_BYTES, MAX_VICTIMS,
    MemoryLimits,
};
use crate::op::{Op, SetExpire};
use crate::reply::{Outcome, Reply, ValueType};
use crate::session::SessionTag;
use crate::slot::{SLOT_COUNT, Slot, slot_of};
use crate::time::LogTime;
use bytes::Bytes;
use postcard::ser_flavors::Flavor;
use serde::{Deserialize, Serialize};

/// Version of entries that this build writes; the only one it reads.
pub const ENTRY_VERSION: u8 = 1;
/// Most operations of one request that concern all keys of a shard (SCAN, FLUSHDB). Each may cost as much as thousands
/// of others, and a request is not interrupted.
pub const MAX_SHARD_WIDE_OPS: usize = 16;

const KIND_BATCH: u8 = 0;
const KIND_OPEN_SESSION: u8 = 1;
const KIND_ADVANCE: u8 = 2;
const KIND_CHECK_DIGEST: u8 = 3;
const KIND_SET_LIMITS: u8 = 4;
const KIND_REMOVE: u8 = 5;
/// Bytes of a victim in an entry.
const VICTIM_BYTES: usize = 10;

/// Bytes of an operation besides its key, value and pattern: codes, lengths and numbers, each at its longest.
const OP_OVERHEAD: usize = 48;
/// Lists of a reply get room for this many items at once; beyond, they grow as items are really found in the input.
const PREALLOCATED_ITEMS: usize = 1024;

/// Lets postcard append to a vector that somebody else owns.
struct Append<'v>(&'v mut Vec<u8>);

impl Flavor for Append<'_> {
    type Output = ();
    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }
    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

pub(crate) fn put<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    postcard::serialize_with_flavor(value, Append(out)).expect("plain data of known length always serializes");
}

pub(crate) fn take<'a, T: Deserialize<'a>>(bytes: &mut &'a [u8]) -> Result<T, CodecError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|_| CodecError::Malformed)?;
    *bytes = rest;
    Ok(value)
}

fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_key(out: &mut Vec<u8>, key: &KeyRef<'_>) {
    put_varint(out, u64::from(key.slot.0));
    out.push(key.db);
    put_bytes(out, key.bytes);
}

/// Writes what postcard would write. By hand only where a payload is copied: serde knows a slice of bytes as a sequence
/// of numbers, and would write it byte by byte.
fn put_op(out: &mut Vec<u8>, op: &Op<'_>) {
    match op {
        Op::Get { key } => {
            out.push(0);
            put_key(out, key);
        }
        Op::Set { key, value, cond, expire, get } => {
            out.push(1);
            put_key(out, key);
            put_bytes(out, value);
            put(out, &(cond, expire, get));
        }
        Op::Append { key, value } => {
            out.push(8);
            put_key(out, key);
            put_bytes(out, value);
        }
        Op::CompareAndSet { key, expected, value, expire } => {
            out.push(17);
            put_key(out, key);
            match expected {
                None => out.push(0),
                Some(expected) => {
                    out.push(1);
                    put_bytes(out, expected);
                }
            }
            put_bytes(out, value);
            put(out, expire);
        }
        other => put(out, other),
    }
}

fn check_key(key: &KeyRef<'_>) -> Result<(), CodecError> {
    if key.bytes.len() > MAX_KEY_BYTES {
        return Err(CodecError::TooLarge);
    }
    if key.db >= DATABASES || key.slot != slot_of(key.bytes) {
        return Err(CodecError::Malformed);
    }
    Ok(())
}

fn check_expire(expire: SetExpire) -> Result<(), CodecError> {
    if expire == SetExpire::After(0) { Err(CodecError::Malformed) } else { Ok(()) }
}

/// Everything about one operation that does not depend on state.
fn check_op(op: &Op<'_>) -> Result<(), CodecError> {
    if let Some(key) = op.key() {
        check_key(&key)?;
    }
    match *op {
        Op::Set { value, expire, .. } => {
            check_expire(expire)?;
            if value.len() > MAX_VALUE_BYTES { Err(CodecError::TooLarge) } else { Ok(()) }
        }
        Op::Append { value, .. } if value.len() > MAX_VALUE_BYTES => Err(CodecError::TooLarge),
        Op::GetEx { expire, .. } => check_expire(expire),
        Op::CompareAndSet { expected, value, expire, .. } => {
            check_expire(expire)?;
            let longest = value.len().max(expected.map_or(0, <[u8]>::len));
            if longest > MAX_VALUE_BYTES { Err(CodecError::TooLarge) } else { Ok(()) }
        }
        Op::IncrByFloat { by, .. } if !by.get().is_finite() => Err(CodecError::Malformed),
        Op::DbSize { db } | Op::Flush { db: Some(db) } if db >= DATABASES => Err(CodecError::Malformed),
        Op::Scan { db, count, pattern, .. } => {
            if db >= DATABASES || count == 0 {
                return Err(CodecError::Malformed);
            }
            let long = pattern.is_some_and(|p| p.len() > MAX_PATTERN_BYTES);
            if long || count > MAX_SCAN_COUNT { Err(CodecError::TooLarge) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}

fn check_count(count: usize) -> Result<(), CodecError> {
    match count {
        0 => Err(CodecError::Malformed),
        1..=MAX_OPS_PER_REQUEST => Ok(()),
        _ => Err(CodecError::TooLarge),
    }
}

/// Counts what concerns all keys of a shard and refuses too much of it in one request.
fn check_wide(op: &Op<'_>, wide: &mut usize) -> Result<(), CodecError> {
    *wide += usize::from(matches!(op, Op::Scan { .. } | Op::Flush { .. }));
    if *wide > MAX_SHARD_WIDE_OPS { Err(CodecError::TooLarge) } else { Ok(()) }
}

/// Encodes the operations of one request into an ops block.
///
/// # Errors
/// [`CodecError::Malformed`] without any operation, or for one that cannot be (a slot that is not its key's, an unknown
/// database, an expiry after 0 ms, an infinite increment, a SCAN of nothing); [`CodecError::TooLarge`] over one of the
/// [`crate::limits`], [`MAX_PATTERN_BYTES`] or [`MAX_SHARD_WIDE_OPS`].
pub fn encode_ops(ops: &[Op<'_>]) -> Result<Bytes, CodecError> {
    check_count(ops.len())?;
    let mut wide = 0;
    let mut size = 4usize;
    for op in ops {
        check_op(op)?;
        check_wide(op, &mut wide)?;
        let payload = match *op {
            Op::Set { value, .. } | Op::Append { value, .. } => value.len(),
            Op::Scan { pattern: Some(pattern), .. } => pattern.len(),
            Op::CompareAndSet { expected, value, .. } => value.len() + expected.map_or(0, <[u8]>::len),
            _ => 0,
        };
        // What is certainly too long is refused before room for it is made.
        let bare = payload + op.key().map_or(0, |k| k.bytes.len());
        size += bare + OP_OVERHEAD;
        if size - 4 > MAX_REQUEST_BYTES + ops.len() * OP_OVERHEAD {
            return Err(CodecError::TooLarge);
        }
    }
    let mut out = Vec::with_capacity(size);
    put_varint(&mut out, ops.len() as u64);
    for op in ops {
        put_op(&mut out, op);
    }
    debug_assert!(out.len() <= size, "an operation is longer than its bound");
    if out.len() > MAX_REQUEST_BYTES {
        return Err(CodecError::TooLarge);
    }
    Ok(Bytes::from(out))
}

/// The operations of one request: an ops block that has been checked. Copies freely, borrows the block.
#[derive(Clone, Copy, Debug)]
pub struct OpsRef<'a> {
    /// The operations, without their count.
    body: &'a [u8],
    count: u32,
}

impl<'a> OpsRef<'a> {
    /// Checks form and limits of every operation, that there is at least one, and that nothing follows the last.
    ///
    /// # Errors
    /// As [`encode_ops`]; [`CodecError::Malformed`] also for bytes that are no ops block.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CodecError> {
        if bytes.len() > MAX_REQUEST_BYTES {
            return Err(CodecError::TooLarge);
        }
        let ops = Self::trusted(bytes)?;
        check_count(ops.len())?;
        let (mut rest, mut wide) = (ops.body, 0);
        for _ in 0..ops.count {
            let op: Op<'a> = take(&mut rest)?;
            check_op(&op)?;
            check_wide(&op, &mut wide)?;
        }
        if rest.is_empty() { Ok(ops) } else { Err(CodecError::Malformed) }
    }

    /// A block that is known to have been checked: only its count is read.
    fn trusted(mut bytes: &'a [u8]) -> Result<Self, CodecError> {
        let count = take(&mut bytes)?;
        Ok(OpsRef { body: bytes, count })
    }

    /// The operations, in order. Allocates nothing.
    pub fn iter(&self) -> impl Iterator<Item = Op<'a>> + use<'a> {
        let mut rest = self.body;
        // Checked when parsed: no operation can fail to decode, so the iterator never ends early.
        (0..self.count).map_while(move |_| take(&mut rest).ok())
    }

    /// Number of operations, 1 to [`MAX_OPS_PER_REQUEST`].
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is none; never true of a parsed block.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether any operation writes, so that the request must go through the log.
    pub fn is_write(&self) -> bool {
        self.iter().any(|op| op.is_write())
    }
}

fn entry_head(stamp: LogTime, wall_offset: i64, kind: u8) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    out.push(ENTRY_VERSION);
    put(&mut out, &(stamp, wall_offset, kind));
    out
}

/// Builds the payload of one log entry from many requests.
#[derive(Debug)]
pub struct EntryBuilder {
    bytes: Vec<u8>,
    /// Where the number of requests stands; filled in at the end.
    count_at: usize,
    count: u32,
}

impl EntryBuilder {
    /// An entry stamped with log time and the leader's wall-clock offset (wall minus log time, milliseconds).
    pub fn new(stamp: LogTime, wall_offset: i64) -> Self {
        let mut bytes = entry_head(stamp, wall_offset, KIND_BATCH);
        let count_at = bytes.len();
        bytes.extend_from_slice(&0u32.to_le_bytes());
        EntryBuilder { bytes, count_at, count: 0 }
    }

    /// Adds one request. `ops` must be an ops block that [`OpsRef::parse`] accepts: every replica stops at an entry that
    /// holds anything else. When to close an entry is the caller's decision, by [`EntryBuilder::size`].
    pub fn push(&mut self, tag: SessionTag, ops: &[u8]) {
        debug_assert!(OpsRef::parse(ops).is_ok(), "requests are checked before they are proposed");
        put(&mut self.bytes, &tag);
        put_bytes(&mut self.bytes, ops);
        self.count += 1;
    }

    /// Number of requests so far.
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Bytes so far, header included.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// The payload.
    pub fn finish(mut self) -> Bytes {
        self.bytes[self.count_at..self.count_at + 4].copy_from_slice(&self.count.to_le_bytes());
        // It stays in the log for a while, and its room with it: up to as much again, since a vector doubles.
        if self.bytes.capacity() > self.bytes.len() / 8 * 9 {
            self.bytes.shrink_to_fit();
        }
        Bytes::from(self.bytes)
    }
}

/// An entry that opens a session for a gateway, replacing its earlier one; the outcome is `Reply::Int(session id)`.
pub fn encode_open_session(stamp: LogTime, gateway: Incarnation) -> Bytes {
    let mut out = entry_head(stamp, 0, KIND_OPEN_SESSION);
    put(&mut out, &gateway);
    Bytes::from(out)
}

/// An entry that only moves log time on.
pub fn encode_advance(stamp: LogTime) -> Bytes {
    Bytes::from(entry_head(stamp, 0, KIND_ADVANCE))
}

/// An entry that compares digests: every replica must have had `digest` when it had applied `index`.
pub fn encode_check_digest(stamp: LogTime, index: LogIndex, digest: u64) -> Bytes {
    let mut out = entry_head(stamp, 0, KIND_CHECK_DIGEST);
    put(&mut out, &(index, digest));
    Bytes::from(out)
}

/// An entry that sets how much memory the shard may use.
pub fn encode_set_limits(stamp: LogTime, limits: MemoryLimits) -> Bytes {
    let mut out = entry_head(stamp, 0, KIND_SET_LIMITS);
    put(&mut out, &limits);
    Bytes::from(out)
}

/// An entry that removes records; with `expired_only`, those that have expired by its log time.
///
/// # Errors
/// [`CodecError::TooLarge`] for more than [`MAX_VICTIMS`]; [`CodecError::Malformed`] for a slot that does not exist.
pub fn encode_remove(stamp: LogTime, victims: &[Victim], expired_only: bool) -> Result<Bytes, CodecError> {
    let mut out = entry_head(stamp, 0, KIND_REMOVE);
    out.reserve_exact(1 + victims.len() * VICTIM_BYTES);
    let head = out.len();
    out.push(u8::from(expired_only));
    for v in victims {
        out.extend_from_slice(&v.slot.0.to_le_bytes());
        out.extend_from_slice(&v.hash.to_le_bytes());
    }
    take_victims(&out[head..])?;
    Ok(Bytes::from(out))
}

fn take_victims(body: &[u8]) -> Result<(Victims<'_>, bool), CodecError> {
    let ([flag @ (0 | 1)], rest) = body.split_first_chunk::<1>().ok_or(CodecError::Malformed)? else {
        return Err(CodecError::Malformed);
    };
    if rest.len() > MAX_VICTIMS * VICTIM_BYTES {
        return Err(CodecError::TooLarge);
    }
    let (victims, []) = rest.as_chunks() else { return Err(CodecError::Malformed) };
    let victims = Victims(victims);
    if victims.iter().any(|v| v.slot.0 >= SLOT_COUNT) {
        return Err(CodecError::Malformed);
    }
    Ok((victims, *flag == 1))
}

/// A decoded entry; borrows its payload. Everything in it has been checked.
#[derive(Clone, Copy, Debug)]
pub struct EntryView<'a> {
    /// Log time when the leader proposed the entry.
    pub stamp: LogTime,
    /// The leader's wall time minus its log time at the proposal, in milliseconds.
    pub wall_offset: i64,
    /// What the entry does.
    pub body: EntryBody<'a>,
}

/// What an entry does.
#[derive(Clone, Copy, Debug)]
pub enum EntryBody<'a> {
    /// Executes requests.
    Batch(Requests<'a>),
    /// Opens a session for a gateway.
    OpenSession {
        /// One life of a gateway node.
        gateway: Incarnation,
    },
    /// Moves log time on, as every entry does, and nothing else.
    Advance,
    /// Compares digests.
    CheckDigest {
        /// The log index.
        index: LogIndex,
        /// The digest of a right state that has applied exactly up to there.
        digest: u64,
    },
    /// Sets how much memory the shard may use.
    SetLimits(MemoryLimits),
    /// Removes records.
    Remove {
        /// Which.
        victims: Victims<'a>,
        /// Only those that have expired by log time.
        expired_only: bool,
    },
}

/// Names a record that shall be removed: all records of this slot and hash, which is one but for a freak of hashing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Victim {
    /// The slot.
    pub slot: Slot,
    /// Hash of database and key, seeded with the founding secret.
    pub hash: u64,
}

/// The victims of an entry, at most [`MAX_VICTIMS`].
#[derive(Clone, Copy, Debug)]
pub struct Victims<'a>(&'a [[u8; VICTIM_BYTES]]);

impl<'a> Victims<'a> {
    /// The victims, in order. Allocates nothing.
    pub fn iter(&self) -> impl Iterator<Item = Victim> + use<'a> {
        self.0.iter().map(|[a, b, hash @ ..]| Victim {
            slot: Slot(u16::from_le_bytes([*a, *b])),
            hash: u64::from_le_bytes(*hash),
        })
    }

    /// Number of victims.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The requests of a batch entry.
#[derive(Clone, Copy, Debug)]
pub struct Requests<'a> {
    body: &'a [u8],
    count: u32,
}

impl<'a> Requests<'a> {
    /// The requests, in order. Allocates nothing.
    pub fn iter(&self) -> impl Iterator<Item = (SessionTag, OpsRef<'a>)> + use<'a> {
        let mut rest = self.body;
        // Checked when decoded: nothing can fail here.
        (0..self.count).map_while(move |_| {
            let (tag, ops) = take::<(SessionTag, &'a [u8])>(&mut rest).ok()?;
            Some((tag, OpsRef::trusted(ops).ok()?))
        })
    }

    /// Number of requests.
    pub fn len(&self) -> usize {
        self.count as usize
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// Decodes and checks an entry, the operations of its requests included.
///
/// # Errors
/// [`CodecError::UnknownVersion`] if a later version wrote it; else as [`OpsRef::parse`].
pub fn decode_entry(bytes: &[u8]) -> Result<EntryView<'_>, CodecError> {
    let mut rest = bytes;
    let version: u8 = take(&mut rest)?;
    if version != ENTRY_VERSION {
        return Err(CodecError::UnknownVersion(version));
    }
    let (stamp, wall_offset, kind): (LogTime, i64, u8) = take(&mut rest)?;
    let body = match kind {
        KIND_BATCH => {
            let (count, requests) = rest.split_first_chunk::<4>().ok_or(CodecError::Malformed)?;
            let count = u32::from_le_bytes(*count);
            rest = requests;
            // Every request has bytes of its own, so a count that lies runs out of them.
            for _ in 0..count {
                let (_, ops) = take::<(SessionTag, &[u8])>(&mut rest)?;
                OpsRef::parse(ops)?;
            }
            EntryBody::Batch(Requests { body: requests, count })
        }
        KIND_OPEN_SESSION => EntryBody::OpenSession { gateway: take(&mut rest)? },
        KIND_ADVANCE => EntryBody::Advance,
        KIND_CHECK_DIGEST => {
            let (index, digest) = take(&mut rest)?;
            EntryBody::CheckDigest { index, digest }
        }
        KIND_SET_LIMITS => EntryBody::SetLimits(take(&mut rest)?),
        KIND_REMOVE => {
            let (victims, expired_only) = take_victims(rest)?;
            rest = &[];
            EntryBody::Remove { victims, expired_only }
        }
        _ => return Err(CodecError::Malformed),
    };
    if rest.is_empty() { Ok(EntryView { stamp, wall_offset, body }) } else { Err(CodecError::Malformed) }
}

const OUTCOME_REPLY: u8 = 0;
const OUTCOME_GAP: u8 = 1;
const OUTCOME_UNKNOWN: u8 = 2;
const OUTCOME_NO_SESSION: u8 = 3;

const REPLY_OK: u8 = 0;
const REPLY_NIL: u8 = 1;
const REPLY_INT: u8 = 2;
const REPLY_BULK: u8 = 3;
const REPLY_TYPE: u8 = 4;
const REPLY_SCAN: u8 = 5;
const REPLY_ERROR: u8 = 6;
const REPLY_ARRAY: u8 = 7;

/// Appends an outcome to a frame. Arrays hold no arrays: the replies of a request are those of single operations.
pub fn encode_outcome(outcome: &Outcome, out: &mut Vec<u8>) {
    match outcome {
        Outcome::Reply(reply) => {
            out.push(OUTCOME_REPLY);
            put_reply(out, reply);
        }
        Outcome::Gap => out.push(OUTCOME_GAP),
        Outcome::Unknown => out.push(OUTCOME_UNKNOWN),
        Outcome::NoSession => out.push(OUTCOME_NO_SESSION),
    }
}

fn put_reply(out: &mut Vec<u8>, reply: &Reply) {
    match reply {
        Reply::Ok => out.push(REPLY_OK),
        Reply::Nil => out.push(REPLY_NIL),
        Reply::Int(n) => put(out, &(REPLY_INT, n)),
        Reply::Bulk(bytes) => {
            out.push(REPLY_BULK);
            put_bytes(out, bytes);
        }
        Reply::Type(t) => put(out, &(REPLY_TYPE, t)),
        Reply::Scan { next, keys } => {
            put(out, &(REPLY_SCAN, next));
            put_varint(out, keys.len() as u64);
            keys.iter().for_each(|key| put_bytes(out, key));
        }
        Reply::Error(e) => put(out, &(REPLY_ERROR, e)),
        Reply::Array(replies) => {
            out.push(REPLY_ARRAY);
            put_varint(out, replies.len() as u64);
            for reply in replies {
                debug_assert!(!matches!(reply, Reply::Array(_)), "an operation answers no array");
                put_reply(out, reply);
            }
        }
    }
}

/// Decodes the outcome at the beginning of `input`. Returns it and the number of bytes it took; strings in it are
/// slices of `input`, and so keep all of it alive.
///
/// # Errors
/// [`CodecError::Malformed`] for bytes that are no outcome; [`CodecError::TooLarge`] for a string longer than
/// [`MAX_VALUE_BYTES`] or a list longer than any state machine answers.
pub fn decode_outcome(input: &Bytes) -> Result<(Outcome, usize), CodecError> {
    let mut rest: &[u8] = input;
    let outcome = match take::<u8>(&mut rest)? {
        OUTCOME_REPLY => Outcome::Reply(match take::<u8>(&mut rest)? {
            REPLY_ARRAY => {
                let count = take_count(&mut rest, MAX_OPS_PER_REQUEST)?;
                let mut replies = Vec::with_capacity(count.min(PREALLOCATED_ITEMS));
                for _ in 0..count {
                    let code = take(&mut rest)?;
                    replies.push(take_reply(input, code, &mut rest)?);
                }
                Reply::Array(replies)
            }
            code => take_reply(input, code, &mut rest)?,
        }),
        OUTCOME_GAP => Outcome::Gap,
        OUTCOME_UNKNOWN => Outcome::Unknown,
        OUTCOME_NO_SESSION => Outcome::NoSession,
        _ => return Err(CodecError::Malformed),
    };
    Ok((outcome, input.len() - rest.len()))
}

/// The reply of a single operation; an array is refused, so nothing here recurses.
fn take_reply(input: &Bytes, code: u8, rest: &mut &[u8]) -> Result<Reply, CodecError> {
    Ok(match code {
        REPLY_OK => Reply::Ok,
        REPLY_NIL => Reply::Nil,
        REPLY_INT => Reply::Int(take(rest)?),
        REPLY_BULK => Reply::Bulk(take_slice(input, rest, MAX_VALUE_BYTES)?),
        REPLY_TYPE => Reply::Type(take::<ValueType>(rest)?),
        REPLY_SCAN => {
            let next = take(rest)?;
            let count = take_count(rest, MAX_SCAN_COUNT as usize)?;
            let mut keys = Vec::with_capacity(count.min(PREALLOCATED_ITEMS));
            for _ in 0..count {
                keys.push(take_slice(input, rest, MAX_KEY_BYTES)?);
            }
            Reply::Scan { next, keys }
        }
        REPLY_ERROR => Reply::Error(take::<OpError>(rest)?),
        _ => return Err(CodecError::Malformed),
    })
}

fn take_count(rest: &mut &[u8], most: usize) -> Result<usize, CodecError> {
    let count: u64 = take(rest)?;
    if count > most as u64 { Err(CodecError::TooLarge) } else { Ok(count as usize) }
}

fn take_slice(input: &Bytes, rest: &mut &[u8], most: usize) -> Result<Bytes, CodecError> {
    let slice: &[u8] = take(rest)?;
    if slice.len() > most { Err(CodecError::TooLarge) } else { Ok(input.slice_ref(slice)) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::error::OpError;
    use crate::ids::{Epoch, Seq, SessionId};
    use crate::limits::LimitPolicy;
    use crate::op::{ExpireAt, ExpireCond, SetCond, f64Bits};
    use crate::time::WallTime;
    use proptest::prelude::*;

    pub(crate) fn key(bytes: &[u8]) -> KeyRef<'_> {
        KeyRef::new(0, bytes).expect("a short key")
    }

    pub(crate) fn tag(session: u64, seq: u64, low: u64) -> SessionTag {
        SessionTag { session: SessionId(session), seq: Seq(seq), low: Seq(low) }
    }

    /// Every operation once, with values that need more than one byte.
    fn all_ops() -> Vec<Op<'static>> {
        let key = KeyRef::new(15, b"{tag}key").expect("a short key");
        vec![
            Op::Get { key },
            Op::Set { key, value: &[7; 300], cond: SetCond::IfPresent, expire: SetExpire::After(1 << 40), get: true },
            Op::Set { key, value: b"", cond: SetCond::IfAbsent, expire: SetExpire::At(WallTime(u64::MAX)), get: false },
            Op::GetEx { key, expire: SetExpire::Keep },
            Op::GetDel { key },
            Op::Del { key },
            Op::Exists { key },
            Op::IncrBy { key, by: i64::MIN },
            Op::IncrByFloat { key, by: f64Bits::from(-1.5) },
            Op::Append { key, value: &[9; 200] },
            Op::Strlen { key },
            Op::Expire { key, at: ExpireAt::At(-1), cond: ExpireCond::IfLess },
            Op::Expire { key, at: ExpireAt::After(i64::MAX), cond: ExpireCond::IfGreater },
            Op::Persist { key },
            Op::Pttl { key },
            Op::Type { key },
            Op::DbSize { db: 3 },
            Op::Scan { db: 1, cursor: u64::MAX, count: 10, pattern: Some(b"*") },
            Op::Scan { db: 1, cursor: 0, count: MAX_SCAN_COUNT, pattern: None },
            Op::Flush { db: None },
            Op::Flush { db: Some(15) },
            Op::CompareAndSet { key, expected: Some(&[3; 200]), value: &[4; 300], expire: SetExpire::After(1 << 40) },
            Op::CompareAndSet { key, expected: Some(b""), value: b"", expire: SetExpire::Keep },
            Op::CompareAndSet { key, expected: None, value: b"v", expire: SetExpire::At(WallTime(u64::MAX)) },
        ]
    }

    const LIMITS: MemoryLimits = MemoryLimits { max_bytes: 1 << 40, policy: LimitPolicy::Refuse };

    fn victims(count: u64) -> Vec<Victim> {
        (0..count).map(|i| Victim { slot: Slot((SLOT_COUNT - 1) - i as u16), hash: u64::MAX - i }).collect()
    }

    fn batch() -> Bytes {
        let mut b = EntryBuilder::new(LogTime(1_700_000_000_000), -12_345);
        assert!(b.is_empty());
        b.push(tag(5, 1, 0), &encode_ops(&all_ops()).unwrap());
        b.push(tag(u64::MAX, 300, 299), &encode_ops(&[Op::Del { key: key(b"k") }]).unwrap());
        assert_eq!(b.len(), 2);
        let size = b.size();
        let bytes = b.finish();
        assert_eq!(bytes.len(), size);
        bytes
    }

    fn entries() -> Vec<Bytes> {
        vec![
            batch(),
            encode_open_session(LogTime(300), Incarnation(u128::MAX / 3)),
            encode_advance(LogTime(300)),
            encode_check_digest(LogTime(300), LogIndex(1024), u64::MAX),
            EntryBuilder::new(LogTime(0), i64::MIN).finish(),
            encode_set_limits(LogTime(300), LIMITS),
        ]
    }

    #[test]
    fn hand_written_operations_are_those_of_postcard() {
        for op in all_ops() {
            let mut ours = Vec::new();
            put_op(&mut ours, &op);
            assert_eq!(ours, postcard::to_allocvec(&op).unwrap(), "{op:?}");
        }
    }

    #[test]
    fn operations_come_back() {
        let ops = all_ops();
        let bytes = encode_ops(&ops).unwrap();
        let parsed = OpsRef::parse(&bytes).unwrap();
        assert_eq!(parsed.iter().collect::<Vec<_>>(), ops);
        assert_eq!((parsed.len(), parsed.is_empty(), parsed.is_write()), (ops.len(), false, true));
        let reads = encode_ops(&[Op::Get { key: key(b"a") }, Op::DbSize { db: 0 }]).unwrap();
        assert!(!OpsRef::parse(&reads).unwrap().is_write());
    }

    #[test]
    fn payloads_are_borrowed() {
        let bytes = encode_ops(&[Op::Append { key: key(b"k"), value: b"value" }]).unwrap();
        let Some(Op::Append { value, .. }) = OpsRef::parse(&bytes).unwrap().iter().next() else { panic!("an append") };
        assert!(bytes.as_ptr_range().contains(&value.as_ptr()));
    }

    #[test]
    fn entries_come_back() {
        let entries = entries();
        let view = decode_entry(&entries[0]).unwrap();
        assert_eq!((view.stamp, view.wall_offset), (LogTime(1_700_000_000_000), -12_345));
        let EntryBody::Batch(requests) = view.body else { panic!("a batch") };
        let found: Vec<_> = requests.iter().map(|(tag, ops)| (tag, ops.iter().collect::<Vec<_>>())).collect();
        assert_eq!(requests.len(), 2);
        assert_eq!(found, [(tag(5, 1, 0), all_ops()), (tag(u64::MAX, 300, 299), vec![Op::Del { key: key(b"k") }])]);
        let EntryBody::OpenSession { gateway } = decode_entry(&entries[1]).unwrap().body else { panic!("a session") };
        assert_eq!(gateway, Incarnation(u128::MAX / 3));
        assert!(matches!(
            decode_entry(&entries[2]),
            Ok(EntryView { stamp: LogTime(300), wall_offset: 0, body: EntryBody::Advance })
        ));
        let EntryBody::CheckDigest { index, digest } = decode_entry(&entries[3]).unwrap().body else {
            panic!("a check")
        };
        assert_eq!((index, digest), (LogIndex(1024), u64::MAX));
        assert!(matches!(decode_entry(&entries[4]).unwrap().body, EntryBody::Batch(r) if r.is_empty()));
        assert!(matches!(decode_entry(&entries[5]).unwrap().body, EntryBody::SetLimits(LIMITS)));
        for (count, flag) in [(0, true), (1, false), (MAX_VICTIMS as u64, true)] {
            let entry = encode_remove(LogTime(300), &victims(count), flag).unwrap();
            let EntryBody::Remove { victims: found, expired_only } = decode_entry(&entry).unwrap().body else {
                panic!("victims")
            };
            assert_eq!((found.len() as u64, found.is_empty(), expired_only), (count, count == 0, flag));
            assert_eq!(found.iter().collect::<Vec<_>>(), victims(count));
        }
        let most = MAX_VICTIMS as u64 + 1;
        assert_eq!(encode_remove(LogTime(300), &victims(most), true).unwrap_err(), CodecError::TooLarge);
        let foreign = [Victim { slot: Slot(SLOT_COUNT), hash: 0 }];
        assert_eq!(encode_remove(LogTime(300), &foreign, true).unwrap_err(), CodecError::Malformed);
    }

    #[test]
    fn an_entry_that_is_cut_or_continued_is_refused() {
        for entry in entries() {
            for end in 0..entry.len() {
                assert!(decode_entry(&entry[..end]).is_err(), "cut to {end} of {}", entry.len());
            }
            assert!(decode_entry(&[&entry[..], &[0]].concat()).is_err());
        }
        let entry = encode_remove(LogTime(300), &victims(3), true).unwrap();
        let head = entry.len() - 3 * VICTIM_BYTES;
        for end in 0..entry.len() {
            // Fewer victims are an entry too.
            let whole = end >= head && (end - head).is_multiple_of(VICTIM_BYTES);
            assert_eq!(decode_entry(&entry[..end]).is_ok(), whole, "cut to {end} of {}", entry.len());
        }
    }

    #[test]
    fn other_versions_and_kinds_are_refused() {
        let mut entry = encode_advance(LogTime(1)).to_vec();
        entry[0] = 2;
        assert_eq!(decode_entry(&entry).unwrap_err(), CodecError::UnknownVersion(2));
        entry[0] = ENTRY_VERSION;
        *entry.last_mut().unwrap() = 9;
        assert_eq!(decode_entry(&entry).unwrap_err(), CodecError::Malformed);
    }

    /// Writes operations without any check, as a faulty peer might.
    fn unchecked(ops: &[Op<'_>]) -> Vec<u8> {
        let mut out = Vec::new();
        put_varint(&mut out, ops.len() as u64);
        ops.iter().for_each(|op| put_op(&mut out, op));
        out
    }

    #[test]
    fn what_cannot_be_is_refused_by_both_sides() {
        let k = key(b"k");
        let set = |value, expire| Op::Set { key: k, value, cond: SetCond::Always, expire, get: false };
        let scan = |db, count, pattern| Op::Scan { db, cursor: 0, count, pattern };
        let cas = |expected, value, expire| Op::CompareAndSet { key: k, expected, value, expire };
        let long_key = vec![b'k'; MAX_KEY_BYTES + 1];
        let long_value = vec![0; MAX_VALUE_BYTES + 1];
        let long_pattern = vec![b'*'; MAX_PATTERN_BYTES + 1];
        use CodecError::{Malformed, TooLarge};
        for (op, why) in [
            (Op::Get { key: KeyRef { slot: Slot(k.slot.0 ^ 1), ..k } }, Malformed),
            (Op::Get { key: KeyRef { db: DATABASES, ..k } }, Malformed),
            (Op::Get { key: KeyRef { slot: slot_of(&long_key), db: 0, bytes: &long_key } }, TooLarge),
            (set(&long_value, SetExpire::Clear), TooLarge),
            (Op::Append { key: k, value: &long_value }, TooLarge),
            (set(b"", SetExpire::After(0)), Malformed),
            (Op::GetEx { key: k, expire: SetExpire::After(0) }, Malformed),
            (cas(None, b"", SetExpire::After(0)), Malformed),
            (cas(None, &long_value, SetExpire::Keep), TooLarge),
            (cas(Some(&long_value[..]), b"", SetExpire::Keep), TooLarge),
            (Op::IncrByFloat { key: k, by: f64::NAN.into() }, Malformed),
            (Op::IncrByFloat { key: k, by: f64::INFINITY.into() }, Malformed),
            (Op::DbSize { db: DATABASES }, Malformed),
            (Op::Flush { db: Some(DATABASES) }, Malformed),
            (scan(DATABASES, 1, None), Malformed),
            (scan(0, 0, None), Malformed),
            (scan(0, MAX_SCAN_COUNT + 1, None), TooLarge),
            (scan(0, 1, Some(&long_pattern[..])), TooLarge),
        ] {
            assert_eq!(encode_ops(&[op]).unwrap_err(), why, "{op:?}");
            assert_eq!(OpsRef::parse(&unchecked(&[op])).unwrap_err(), why, "{op:?}");
            let mut b = entry_head(LogTime(1), 0, KIND_BATCH);
            b.extend_from_slice(&1u32.to_le_bytes());
            put(&mut b, &tag(1, 1, 0));
            put_bytes(&mut b, &unchecked(&[op]));
            assert_eq!(decode_entry(&b).unwrap_err(), why, "{op:?}");
        }
        let many = vec![Op::Exists { key: k }; MAX_OPS_PER_REQUEST + 1];
        let wide = vec![Op::Flush { db: None }; MAX_SHARD_WIDE_OPS + 1];
        for (ops, why) in [(&[][..], Malformed), (&many, TooLarge), (&wide, TooLarge)] {
            assert_eq!(encode_ops(ops).unwrap_err(), why);
            assert_eq!(OpsRef::parse(&unchecked(ops)).unwrap_err(), why);
        }
        assert!(encode_ops(&many[1..]).is_ok());
        assert!(encode_ops(&wide[1..]).is_ok());
    }

    #[test]
    fn limits_are_inclusive_and_requests_have_one_of_their_own() {
        let long_key = vec![b'k'; MAX_KEY_BYTES];
        let value = vec![1; MAX_VALUE_BYTES];
        let set = Op::Append { key: KeyRef::new(0, &long_key).unwrap(), value: &value };
        let one = encode_ops(&[set]).unwrap();
        assert!(OpsRef::parse(&one).is_ok());
        assert_eq!(encode_ops(&[set, set]).unwrap_err(), CodecError::TooLarge);
        assert_eq!(OpsRef::parse(&vec![0; MAX_REQUEST_BYTES + 1]).unwrap_err(), CodecError::TooLarge);
        // A count that lies does not make room for what it promises.
        assert!(OpsRef::parse(&[0xff, 0xff, 0xff, 0xff, 0x0f]).is_err());
        let mut lying = entry_head(LogTime(1), 0, KIND_BATCH);
        lying.extend_from_slice(&u32::MAX.to_le_bytes());
        assert!(decode_entry(&lying).is_err());
    }

    fn outcomes() -> Vec<Outcome> {
        let leaves = vec![
            Reply::Ok,
            Reply::Nil,
            Reply::Int(i64::MIN),
            Reply::Bulk(Bytes::from_static(b"value")),
            Reply::Bulk(Bytes::new()),
            Reply::Type(ValueType::String),
            Reply::Scan { next: Some(u64::MAX), keys: vec![Bytes::from_static(b"a"), Bytes::new()] },
            Reply::Scan { next: None, keys: vec![] },
            Reply::Error(OpError::WrongSlot { epoch: Epoch(300) }),
            Reply::Error(OpError::TooLong),
        ];
        let mut all: Vec<_> = leaves.iter().cloned().map(Outcome::Reply).collect();
        all.push(Outcome::Reply(Reply::Array(leaves)));
        all.push(Outcome::Reply(Reply::Array(vec![])));
        all.extend([Outcome::Gap, Outcome::Unknown, Outcome::NoSession]);
        all
    }

    #[test]
    fn outcomes_come_back_as_slices_and_tell_their_length() {
        for outcome in outcomes() {
            let mut bytes = Vec::new();
            encode_outcome(&outcome, &mut bytes);
            let length = bytes.len();
            bytes.extend_from_slice(b"what follows");
            let bytes = Bytes::from(bytes);
            let (decoded, used) = decode_outcome(&bytes).unwrap();
            assert_eq!((&decoded, used), (&outcome, length));
            if let Outcome::Reply(Reply::Bulk(b)) = &decoded
                && !b.is_empty()
            {
                assert!(bytes.as_ptr_range().contains(&b.as_ptr()), "copied");
            }
            for end in 0..length {
                assert!(decode_outcome(&bytes.slice(..end)).is_err(), "{outcome:?} cut to {end}");
            }
        }
    }

    #[test]
    fn lists_of_a_reply_are_bounded_and_flat() {
        let array = |n: u64| {
            let mut b = vec![OUTCOME_REPLY, REPLY_ARRAY];
            put_varint(&mut b, n);
            Bytes::from(b)
        };
        assert_eq!(decode_outcome(&array(MAX_OPS_PER_REQUEST as u64 + 1)).unwrap_err(), CodecError::TooLarge);
        assert_eq!(decode_outcome(&array(u64::MAX)).unwrap_err(), CodecError::TooLarge);
        assert_eq!(decode_outcome(&array(MAX_OPS_PER_REQUEST as u64)).unwrap_err(), CodecError::Malformed);
        let mut scan = vec![OUTCOME_REPLY, REPLY_SCAN, 0];
        put_varint(&mut scan, u64::from(MAX_SCAN_COUNT) + 1);
        assert_eq!(decode_outcome(&scan.into()).unwrap_err(), CodecError::TooLarge);
        let nested = [vec![OUTCOME_REPLY], [REPLY_ARRAY, 1].repeat(100_000), vec![REPLY_OK]].concat();
        assert_eq!(decode_outcome(&nested.into()).unwrap_err(), CodecError::Malformed);
    }

    /// Uses everything a decoder returns: what was accepted must be usable to the end.
    fn decode_all(bytes: &[u8]) {
        if let Ok(view) = decode_entry(bytes)
            && let EntryBody::Batch(requests) = view.body
        {
            assert_eq!(requests.iter().count(), requests.len());
            for (_, ops) in requests.iter() {
                assert_eq!(ops.iter().count(), ops.len());
            }
        }
        if let Ok(ops) = OpsRef::parse(bytes) {
            let all: Vec<_> = ops.iter().collect();
            assert_eq!(all.len(), ops.len());
            assert!(encode_ops(&all).is_ok(), "accepted what may not be written: {all:?}");
        }
        if let Ok((outcome, used)) = decode_outcome(&Bytes::copy_from_slice(bytes)) {
            assert!(used <= bytes.len());
            encode_outcome(&outcome, &mut Vec::new());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), first in 0u8..9) {
            decode_all(&bytes);
            if let Some(b) = bytes.first_mut() {
                *b = first;
            }
            decode_all(&bytes);
        }

        #[test]
        fn no_mutation_of_good_bytes_makes_a_decoder_panic(
            which in 0usize..23,
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 1..6),
        ) {
            let mut good = entries();
            good.push(encode_ops(&all_ops()).unwrap());
            good.push(encode_remove(LogTime(300), &victims(3), true).unwrap());
            good.extend(outcomes().iter().map(|o| {
                let mut b = Vec::new();
                encode_outcome(o, &mut b);
                Bytes::from(b)
            }));
            let mut bytes = good[which % good.len()].to_vec();
            for (at, value, how) in changes {
                if bytes.is_empty() {
                    break;
                }
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] = value,
                    1 => bytes.insert(at, value),
                    _ => { bytes.remove(at); }
                }
            }
            decode_all(&bytes);
        }
    }
}
