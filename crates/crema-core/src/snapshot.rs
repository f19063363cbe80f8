//! A consistent point of a shard as a stream of chunks, and back.
//!
//! ```text
//!   begin_snapshot -> head     snapshot_step -> sessions .. records .. records     -> Done(trailer)
//!                      |                            |                                  |
//!                Restore::begin              Restore::chunk                     Restore::chunk -> true, finish -> install
//! ```
//!
//! A chunk: version, kind, number (`u32`), checksum (`u64`), body; numbers are little-endian. The checksum (XXH3) covers all
//! the rest and the checksum of the chunk before, so that chunks of two snapshots never pass for one. It finds accidents,
//! not forgeries: snapshots come from members of the cluster only.
//!
//! | kind | body |
//! |---|---|
//! | 0 head | `Head`, postcard |
//! | 1 sessions | sessions, each `u32` length and bytes (`Sessions::encode`) |
//! | 2 records | records, each `u32` length and bytes (`RecordBytes`), in no order |
//! | 3 trailer | chunks (`u32`, this one included), records (`u64`), digest of the state (`u64`) |
//!
//! Nothing is compressed here; that is the transport's business.

use crate::codec::{put, take};
use crate::error::CorruptSnapshot;
use crate::ids::{Epoch, LogIndex};
use crate::limits::MemoryLimits;
use crate::session::Sessions;
use crate::slot::{SLOT_COUNT, SlotRange};
use crate::state_machine::{DIGESTS_KEPT, StateMachine};
use crate::store::{Edit, RecordBytes, TableWriter};
use crate::time::LogTime;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Version of snapshots that this build writes; the only one it reads.
pub const SNAPSHOT_VERSION: u8 = 1;
/// Bytes of a chunk before its body.
pub const CHUNK_HEAD_BYTES: usize = 14;

const KIND_HEAD: u8 = 0;
const KIND_SESSIONS: u8 = 1;
const KIND_RECORDS: u8 = 2;
const KIND_TRAILER: u8 = 3;

/// One step of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotStep {
    /// The next chunk.
    Chunk(Bytes),
    /// Work was done, but there is nothing to send: records written since the snapshot began were passed over, or those
    /// of an abandoned snapshot. Call again.
    Sweeping,
    /// The last chunk.
    Done(Bytes),
    /// No snapshot is being taken.
    Idle,
}

/// Everything of a state but its records and sessions, and what these come to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Head {
    pub(crate) range: SlotRange,
    pub(crate) epoch: Epoch,
    pub(crate) secret: u64,
    pub(crate) log_time: LogTime,
    pub(crate) applied: LogIndex,
    pub(crate) digests: Vec<(LogIndex, u64)>,
    pub(crate) checked: LogIndex,
    pub(crate) limits: MemoryLimits,
    pub(crate) sessions: u64,
    pub(crate) keys: u64,
    pub(crate) bytes: u64,
    pub(crate) table_digest: u64,
    pub(crate) sessions_digest: u64,
    pub(crate) digest: u64,
}

/// Where a stream of chunks has got to, for its writer and its reader alike.
#[derive(Debug, Default)]
struct Chain {
    next: u32,
    checksum: u64,
}

impl Chain {
    fn sum(&self, head: [u8; 6], body: &[u8]) -> u64 {
        let mut link = [0; 14];
        link[..6].copy_from_slice(&head);
        link[6..].copy_from_slice(&self.checksum.to_le_bytes());
        xxh3_64_with_seed(body, xxh3_64(&link))
    }

    /// Room for a chunk's head, to be followed by its body.
    fn open(capacity: usize) -> Vec<u8> {
        let mut chunk = Vec::with_capacity(CHUNK_HEAD_BYTES + capacity);
        chunk.resize(CHUNK_HEAD_BYTES, 0);
        chunk
    }

    /// Fills the head in.
    fn close(&mut self, kind: u8, mut chunk: Vec<u8>) -> Bytes {
        let [a, b, c, d] = self.next.to_le_bytes();
        let head = [SNAPSHOT_VERSION, kind, a, b, c, d];
        self.checksum = self.sum(head, &chunk[CHUNK_HEAD_BYTES..]);
        self.next = self.next.wrapping_add(1);
        chunk[..6].copy_from_slice(&head);
        chunk[6..CHUNK_HEAD_BYTES].copy_from_slice(&self.checksum.to_le_bytes());
        Bytes::from(chunk)
    }

    /// Checks that a chunk is whole and the next one; its kind and body.
    fn check<'a>(&mut self, chunk: &'a [u8]) -> Result<(u8, &'a [u8]), CorruptSnapshot> {
        let number = self.next;
        let corrupt = |reason| CorruptSnapshot { chunk: number, reason };
        let (head, rest) = chunk.split_first_chunk::<6>().ok_or(corrupt("it is cut off"))?;
        let (sum, body) = rest.split_first_chunk::<8>().ok_or(corrupt("it is cut off"))?;
        let [version, kind, a, b, c, d] = *head;
        if version != SNAPSHOT_VERSION {
            return Err(corrupt("its version is unknown"));
        }
        if u32::from_le_bytes([a, b, c, d]) != number {
            return Err(corrupt("another chunk was expected"));
        }
        let sum = u64::from_le_bytes(*sum);
        if sum != self.sum(*head, body) {
            return Err(corrupt("its checksum is wrong, or it belongs to another snapshot"));
        }
        self.checksum = sum;
        self.next = number.checked_add(1).ok_or(corrupt("there are too many"))?;
        Ok((kind, body))
    }
}

fn put_item(out: &mut Vec<u8>, len: usize) {
    out.extend_from_slice(&(len as u32).to_le_bytes());
}

fn take_item<'a>(body: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, rest) = body.split_first_chunk()?;
    let (item, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    *body = rest;
    Some(item)
}

/// The snapshot that a state machine is taking: what is left of it beside the records, which the table walks.
#[derive(Debug)]
pub(crate) struct Snapshot {
    chain: Chain,
    sessions: VecDeque<Vec<u8>>,
    records: u64,
    digest: u64,
}

impl Snapshot {
    pub(crate) fn begin(head: &Head, sessions: &Sessions) -> (Self, Bytes) {
        let mut chain = Chain::default();
        let mut chunk = Chain::open(256);
        put(&mut chunk, head);
        let chunk = chain.close(KIND_HEAD, chunk);
        (Snapshot { chain, sessions: sessions.encode().collect(), records: 0, digest: head.digest }, chunk)
    }

    pub(crate) fn pending_bytes(&self) -> u64 {
        self.sessions.iter().map(|s| s.len() as u64).sum()
    }

    pub(crate) fn step(&mut self, table: &mut TableWriter, max_bytes: usize) -> SnapshotStep {
        let full = |chunk: &Vec<u8>, more: usize| {
            chunk.len() > CHUNK_HEAD_BYTES && chunk.len() - CHUNK_HEAD_BYTES + 4 + more > max_bytes
        };
        // No more than there is, or may be.
        let mut chunk = Chain::open(max_bytes.min(64 * 1024));
        while let Some(session) = self.sessions.front()
            && !full(&chunk, session.len())
        {
            put_item(&mut chunk, session.len());
            chunk.extend_from_slice(session);
            self.sessions.pop_front();
        }
        if chunk.len() > CHUNK_HEAD_BYTES {
            return SnapshotStep::Chunk(self.chain.close(KIND_SESSIONS, chunk));
        }
        let more = table.walk(|record| {
            if full(&chunk, record.len()) {
                return false;
            }
            put_item(&mut chunk, record.len());
            record.append_to(&mut chunk);
            self.records += 1;
            true
        });
        if chunk.len() > CHUNK_HEAD_BYTES {
            return SnapshotStep::Chunk(self.chain.close(KIND_RECORDS, chunk));
        }
        if more {
            return SnapshotStep::Sweeping;
        }
        put_item(&mut chunk, self.chain.next.wrapping_add(1) as usize);
        chunk.extend_from_slice(&self.records.to_le_bytes());
        chunk.extend_from_slice(&self.digest.to_le_bytes());
        SnapshotStep::Done(self.chain.close(KIND_TRAILER, chunk))
    }
}

/// A state that is being put together from the chunks of a snapshot. Nothing else changes until [`StateMachine::install`].
#[derive(Debug)]
pub struct Restore {
    head: Head,
    chain: Chain,
    table: TableWriter,
    sessions: Sessions,
    records: u64,
    complete: bool,
}

impl Restore {
    /// Begins with the first chunk of a snapshot. Whatever it says, this allocates no more than an empty shard takes.
    ///
    /// # Errors
    /// It is damaged, or not the first chunk of a snapshot that this build can read.
    pub fn begin(head: &[u8]) -> Result<Restore, CorruptSnapshot> {
        let mut chain = Chain::default();
        let (kind, mut body) = chain.check(head)?;
        let corrupt = |reason| CorruptSnapshot { chunk: 0, reason };
        if kind != KIND_HEAD {
            return Err(corrupt("it is no head"));
        }
        let head: Head = take(&mut body).map_err(|_| corrupt("it is malformed"))?;
        let indexes_rise = head.digests.windows(2).all(|w| w[0].0 < w[1].0);
        if !body.is_empty()
            || head.range.end > SLOT_COUNT
            || head.range.start > head.range.end
            || head.digests.len() > DIGESTS_KEPT
            || !indexes_rise
            || head.digests.last().is_some_and(|(at, _)| *at > head.applied)
        {
            return Err(corrupt("it is malformed"));
        }
        let table = TableWriter::new(head.range, head.secret);
        Ok(Restore { head, chain, table, sessions: Sessions::default(), records: 0, complete: false })
    }

    /// The index at which the snapshot was taken.
    pub fn applied(&self) -> LogIndex {
        self.head.applied
    }

    /// Accounted bytes of the keys and values that have been restored.
    pub fn bytes(&self) -> u64 {
        self.table.table().bytes()
    }

    /// Accounted bytes of all keys and values of the snapshot, as its head says.
    pub fn total_bytes(&self) -> u64 {
        self.head.bytes
    }

    /// Number of the chunk that must come next.
    pub fn next_chunk(&self) -> u32 {
        self.chain.next
    }

    /// Takes the next chunk; whether it was the last.
    ///
    /// # Errors
    /// It is damaged, not the next of this snapshot, or holds what cannot be. After an error the restoration is of no use,
    /// unless the chunk was refused as a whole for its version, number or checksum: then the right one may still come.
    pub fn chunk(&mut self, chunk: &[u8]) -> Result<bool, CorruptSnapshot> {
        let number = self.chain.next;
        let corrupt = |reason| CorruptSnapshot { chunk: number, reason };
        if self.complete {
            return Err(corrupt("the snapshot was complete"));
        }
        let (kind, mut body) = self.chain.check(chunk)?;
        match kind {
            KIND_SESSIONS => {
                while !body.is_empty() {
                    let session = take_item(&mut body).ok_or(corrupt("a session is cut off"))?;
                    self.sessions.restore(session).ok_or(corrupt("a session is malformed"))?;
                }
            }
            KIND_RECORDS => {
                while !body.is_empty() {
                    let record = take_item(&mut body).ok_or(corrupt("a record is cut off"))?;
                    self.record(record).map_err(corrupt)?;
                }
            }
            KIND_TRAILER => {
                let trailer =
                    [&self.chain.next.to_le_bytes()[..], &self.records.to_le_bytes(), &self.head.digest.to_le_bytes()];
                if body != trailer.concat() {
                    return Err(corrupt("it does not sum up what came before"));
                }
                self.complete = true;
            }
            _ => return Err(corrupt("its kind is unknown")),
        }
        Ok(self.complete)
    }

    fn record(&mut self, bytes: &[u8]) -> Result<(), &'static str> {
        let record = RecordBytes::parse(bytes).ok_or("a record is malformed")?;
        if !self.head.range.contains(record.key.slot) {
            return Err("a key is of another shard");
        }
        if self.records >= self.head.keys {
            return Err("there are more keys than the head says");
        }
        let absent = self.table.edit(record.key, |old| match old {
            Some(_) => (false, Edit::Keep),
            None => (true, Edit::Put { value: record.value, expire_at: record.expire_at }),
        });
        self.records += 1;
        if absent { Ok(()) } else { Err("a key comes twice") }
    }

    /// The restored state, for [`StateMachine::install`].
    ///
    /// # Errors
    /// The last chunk has not come, or the state is not the one that the head describes.
    pub fn finish(self) -> Result<StateMachine, CorruptSnapshot> {
        let corrupt = |reason| CorruptSnapshot { chunk: self.chain.next, reason };
        if !self.complete {
            return Err(corrupt("the last one has not come"));
        }
        let (table, head) = (self.table.table(), &self.head);
        if (table.keys(), table.bytes(), table.digest()) != (head.keys, head.bytes, head.table_digest) {
            return Err(corrupt("the keys are not those that the head describes"));
        }
        if (self.sessions.len() as u64, self.sessions.digest()) != (head.sessions, head.sessions_digest) {
            return Err(corrupt("the sessions are not those that the head describes"));
        }
        let digest = self.head.digest;
        let machine = StateMachine::restored(self.head, self.table, self.sessions);
        if machine.digest() != digest {
            return Err(CorruptSnapshot { chunk: self.chain.next, reason: "the state has another digest" });
        }
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::tests::tag;
    use crate::codec::{EntryBuilder, encode_advance, encode_check_digest, encode_open_session, encode_ops};
    use crate::ids::Incarnation;
    use crate::key::KeyRef;
    use crate::limits::LimitPolicy;
    use crate::op::{ExpireAt, ExpireCond, Op, SetCond, SetExpire};
    use crate::reply::{Outcome, Reply};
    use crate::slot::Slot;
    use crate::state_machine::{Applied, ShardInit};
    use crate::store::{SCAN_SLOT_SHIFT, ScanQuery, record_bytes};
    use std::collections::BTreeMap;
    use std::sync::Arc;

    const ALL: SlotRange = SlotRange { start: 0, end: SLOT_COUNT };
    const T: u64 = 1_000_000;

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }

    /// A machine with two sessions, and the entries it has applied since `log` was last emptied.
    struct Rig {
        m: StateMachine,
        now: u64,
        seq: [u64; 2],
        log: Vec<(Bytes, Applied)>,
    }

    impl Rig {
        fn new() -> Self {
            let init =
                ShardInit { range: ALL, epoch: Epoch(4), secret: 99, log_time: LogTime(T), applied: LogIndex(5) };
            let mut r = Rig { m: StateMachine::new(init), now: T, seq: [0; 2], log: Vec::new() };
            r.apply(encode_open_session(LogTime(T), Incarnation(1)));
            r.apply(encode_open_session(LogTime(T), Incarnation(2)));
            r
        }
        fn apply(&mut self, entry: Bytes) {
            let applied = self.m.apply(LogIndex(self.m.applied().0 + 1), &entry).unwrap();
            assert_eq!(applied.digest_mismatch, None);
            self.log.push((entry, applied));
        }
        fn request(&mut self, ops: &[Op<'_>]) {
            let of = self.m.applied().0 as usize % 2;
            self.seq[of] += 1;
            let mut b = EntryBuilder::new(LogTime(self.now), 0);
            // The last few answers are kept.
            b.push(tag(6 + of as u64, self.seq[of], self.seq[of].saturating_sub(9)), &encode_ops(ops).unwrap());
            self.apply(b.finish());
        }
        fn set(&mut self, db: u8, name: &[u8], value: &[u8], expire: SetExpire) {
            let key = KeyRef::new(db, name).unwrap();
            self.request(&[Op::Set { key, value, cond: SetCond::Always, expire, get: true }]);
        }
        /// Any write to any of `keys` keys, most of which are in one slot.
        fn any(&mut self, rng: &mut Random, keys: u64) {
            let name = name(rng.below(keys));
            let key = KeyRef::new(rng.below(3) as u8, &name).unwrap();
            let value = vec![b'0' + rng.below(10) as u8; rng.below(40) as usize];
            match rng.below(24) {
                0..8 => self.set(key.db, &name, &value, SetExpire::Clear),
                8..11 => self.set(key.db, &name, &value, SetExpire::After(1 + rng.below(300))),
                11..14 => self.request(&[Op::Del { key }]),
                14..16 => self.request(&[Op::Append { key, value: &value }]),
                16 | 17 => {
                    let at = ExpireAt::After(1 + rng.below(300) as i64);
                    self.request(&[Op::Expire { key, at, cond: ExpireCond::Always }])
                }
                18 => self.request(&[Op::Persist { key }, Op::GetDel { key }]),
                19 => self.request(&[Op::IncrBy { key, by: 7 }]),
                20 => {
                    self.now += rng.below(20);
                    self.apply(encode_advance(LogTime(self.now)));
                }
                21 if rng.below(40) == 0 => self.request(&[Op::Flush { db: Some(key.db) }]),
                22 if rng.below(120) == 0 => self.request(&[Op::Flush { db: None }]),
                23 => {
                    if let Some((index, digest)) = self.m.digest_to_check() {
                        self.apply(encode_check_digest(LogTime(self.now), index, digest));
                    }
                }
                _ => self.request(&[Op::Get { key }, Op::DbSize { db: 0 }]),
            }
        }
    }

    fn name(i: u64) -> Vec<u8> {
        if i.is_multiple_of(5) { format!("spread {i}") } else { format!("{{same slot}}{i}") }.into_bytes()
    }

    /// All records, and everything else that two equal machines agree in.
    fn state(m: &StateMachine) -> impl PartialEq + std::fmt::Debug + use<> {
        let mut records = BTreeMap::new();
        for db in 0..3 {
            let mut cursor = Some(u64::from(m.table().range().start) << SCAN_SLOT_SHIFT);
            while let Some(at) = cursor {
                let step = m.table().scan(at, ScanQuery { db, count: 10_000, now: 0, pattern: None });
                for k in step.keys {
                    let key = KeyRef::new(db, &k).unwrap();
                    let entry = m.table().get(key, |e| e.map(|e| (e.value.to_vec(), e.expire_at))).unwrap();
                    assert!(records.insert((db, k.to_vec()), entry).is_none());
                }
                cursor = step.next;
            }
        }
        assert_eq!(records.len() as u64, m.keys());
        let of_state = (m.digest(), m.keys(), m.bytes(), m.log_time(), m.applied(), m.epoch());
        (records, of_state, m.sessions(), m.digest_to_check(), m.table().range(), m.table().seed())
    }

    fn restore(chunks: &[Bytes]) -> Result<StateMachine, CorruptSnapshot> {
        let mut restore = Restore::begin(&chunks[0])?;
        let mut complete = false;
        for chunk in &chunks[1..] {
            complete = restore.chunk(chunk)?;
        }
        assert!(complete || restore.next_chunk() as usize == chunks.len());
        restore.finish()
    }

    /// All chunks; `between` steps, whatever.
    fn take_all(r: &mut Rig, max_bytes: usize, mut between: impl FnMut(&mut Rig)) -> Vec<Bytes> {
        let mut chunks = vec![r.m.begin_snapshot().expect("no other snapshot")];
        for steps in 0.. {
            assert!(steps < 1_000_000, "it does not end");
            between(r);
            match r.m.snapshot_step(max_bytes) {
                SnapshotStep::Chunk(chunk) => chunks.push(chunk),
                SnapshotStep::Sweeping => {}
                SnapshotStep::Done(chunk) => {
                    chunks.push(chunk);
                    break;
                }
                SnapshotStep::Idle => panic!("it has ended without a trailer"),
            }
        }
        assert_eq!(r.m.snapshot_step(max_bytes), SnapshotStep::Idle);
        assert_eq!(r.m.snapshot_pending_bytes(), 0);
        chunks
    }

    #[test]
    fn a_snapshot_is_the_state_at_its_beginning_whatever_is_written_meanwhile() {
        for seed in 1..=24 {
            let mut rng = Random(seed * 0x9E37_79B9);
            let mut r = Rig::new();
            let keys = [30, 900, 4000, 12_000][seed as usize % 4];
            for i in 0..keys / 2 {
                r.set((i % 3) as u8, &name(i), &i.to_le_bytes(), SetExpire::Clear);
            }
            for round in 0..3 {
                (0..rng.below(400)).for_each(|_| r.any(&mut rng, keys));
                let before = state(&r.m);
                r.log.clear();
                let max_bytes = [1, 300, 5000, 1 << 20][rng.below(4) as usize];
                let writes = [0, 3, 40, 300][rng.below(4) as usize];
                let chunks = take_all(&mut r, max_bytes, |r| {
                    assert!(r.m.begin_snapshot().is_none(), "one at a time");
                    for _ in 0..rng.below(writes + 1) {
                        // Few enough entries in all that the test ends.
                        if r.log.len() < 6000 {
                            r.any(&mut rng, keys);
                        }
                    }
                });
                let case = format!("seed {seed}, round {round}, {max_bytes} bytes a step, {writes} writes");
                assert!(chunks.iter().skip(1).all(|c| c.len() < CHUNK_HEAD_BYTES + max_bytes.max(20_000)), "{case}");
                let mut twin = restore(&chunks).unwrap_or_else(|e| panic!("{case}: {e}"));
                assert_eq!(state(&twin), before, "{case}");
                // The entries since mean the same to both, kept answers and recorded digests included.
                for (entry, applied) in &r.log {
                    assert_eq!(&twin.apply(LogIndex(twin.applied().0 + 1), entry).unwrap(), applied, "{case}");
                }
                assert_eq!(state(&twin), state(&r.m), "{case}");
                // It goes on from the restored one, as a replica that caught up would.
                if round == 1 {
                    drop(r.m.install(twin));
                }
            }
        }
    }

    #[test]
    fn kept_answers_and_the_order_of_use_travel() {
        let mut r = Rig::new();
        for _ in 0..12 {
            r.set(0, b"k", b"a value", SetExpire::Clear);
        }
        r.request(&[
            Op::Scan { db: 0, cursor: 0, count: 9, pattern: None },
            Op::Persist { key: KeyRef::new(0, b"k").unwrap() },
        ]);
        let chunks = take_all(&mut r, 1 << 20, |_| {});
        let mut twin = restore(&chunks).unwrap();
        // Copies of what was executed, of what lies ahead, and of a session that is not there.
        for (session, seq) in (0..12).flat_map(|seq| [(6, seq), (7, seq), (8, seq)]) {
            let mut b = EntryBuilder::new(LogTime(T), 0);
            b.push(tag(session, seq, 0), &encode_ops(&[Op::GetDel { key: KeyRef::new(0, b"k").unwrap() }]).unwrap());
            r.apply(b.finish());
            let (entry, applied) = r.log.last().unwrap();
            assert_eq!(&twin.apply(r.m.applied(), entry).unwrap(), applied);
            let replied = matches!(applied.outcomes[..], [Outcome::Reply(_)]);
            assert_eq!(replied, seq > 0 && session != 8, "{session} {seq}");
        }
        // Many more sessions evict the same ones on both.
        for i in 0..1100 {
            r.apply(encode_open_session(LogTime(T), Incarnation(100 + i)));
            twin.apply(r.m.applied(), &r.log.last().unwrap().0).unwrap();
            assert_eq!(twin.digest(), r.m.digest());
        }
    }

    #[test]
    fn an_abandoned_snapshot_leaves_the_next_one_whole() {
        for seed in 1..=12 {
            let mut rng = Random(seed * 0x9E37_79B9);
            let mut r = Rig::new();
            for i in 0..12_000 {
                r.set((i % 3) as u8, &name(i), b"v", SetExpire::Clear);
            }
            r.m.begin_snapshot().unwrap();
            for _ in 0..rng.below(30) {
                r.any(&mut rng, 20_000);
                r.m.snapshot_step(3000);
            }
            r.request(&[Op::Flush { db: Some(1) }]);
            assert!(r.m.snapshot_pending_bytes() > 0);
            r.m.abandon_snapshot();
            assert_eq!(r.m.snapshot_pending_bytes(), 0);
            if seed % 3 == 0 {
                r.request(&[Op::Flush { db: None }]);
            }
            // Either way of sweeping, with writes between.
            let mut calls = 0;
            if seed % 2 == 0 {
                while r.m.snapshot_step(1) == SnapshotStep::Sweeping {
                    (0..50).for_each(|_| r.any(&mut rng, 20_000));
                    calls += 1;
                }
                assert_eq!(r.m.snapshot_step(1), SnapshotStep::Idle);
            } else {
                while r.m.begin_snapshot().is_none() {
                    (0..50).for_each(|_| r.any(&mut rng, 20_000));
                    calls += 1;
                }
                r.m.abandon_snapshot();
                while r.m.snapshot_step(1) == SnapshotStep::Sweeping {}
            }
            assert!(calls < 10, "bounded, yet not without end");
            let before = state(&r.m);
            let chunks = take_all(&mut r, 2000, |r| r.any(&mut rng, 20_000));
            assert_eq!(state(&restore(&chunks).unwrap()), before, "seed {seed}");
        }
        // Nothing to abandon.
        let mut r = Rig::new();
        r.m.abandon_snapshot();
        assert_eq!(r.m.snapshot_step(1), SnapshotStep::Idle);
    }

    #[test]
    fn what_is_overwritten_is_kept_until_it_is_emitted_and_no_longer() {
        let mut r = Rig::new();
        for i in 0..20_000 {
            r.set(0, &name(i), b"before", SetExpire::Clear);
        }
        let bytes = r.m.bytes();
        r.m.begin_snapshot().unwrap();
        let sessions = r.m.snapshot_pending_bytes();
        for i in 0..5000 {
            r.set(0, &name(i), b"after.", SetExpire::Clear);
            r.set(0, &name(i), b"again.", SetExpire::Clear);
        }
        let old: u64 = (0..5000).map(|i| record_bytes(name(i).len(), 6, false)).sum();
        assert_eq!(r.m.snapshot_pending_bytes() - sessions, old, "once each, however often it is written");
        // A whole table may be overwritten: what is left to walk is passed over, in bounded steps.
        let mut steps = 0;
        while r.m.snapshot_pending_bytes() > 0 {
            assert!(
                matches!(r.m.snapshot_step(10_000), SnapshotStep::Chunk(c) if c.len() <= 10_000 + CHUNK_HEAD_BYTES)
            );
            steps += 1;
        }
        assert!(steps < 50, "{steps}");
        // Flushing detaches the table; both then count.
        r.request(&[Op::Flush { db: None }]);
        assert!(r.m.snapshot_pending_bytes() > bytes / 2);
        let former = Arc::downgrade(r.m.table());
        while let SnapshotStep::Chunk(_) = r.m.snapshot_step(1 << 20) {}
        assert_eq!((r.m.snapshot_pending_bytes(), r.m.snapshot_step(1)), (0, SnapshotStep::Idle));
        assert_eq!(former.strong_count(), 2, "the machine and its readers");
    }

    #[test]
    fn steps_over_rewritten_records_are_bounded() {
        let mut r = Rig::new();
        for i in 0..40_000 {
            r.set(0, &name(i), b"v", SetExpire::Clear);
        }
        r.m.begin_snapshot().unwrap();
        // All but the last in order of walking: the slots at the end of the ring.
        let last =
            (0..).map(|i| format!("last {i}")).find(|n| KeyRef::new(0, n.as_bytes()).unwrap().slot > Slot(16_300));
        for i in 0..40_000 {
            let name = name(i);
            if KeyRef::new(0, &name).unwrap().slot < Slot(16_300) {
                r.set(0, &name, b"w", SetExpire::Clear);
            }
        }
        r.set(0, last.unwrap().as_bytes(), b"new", SetExpire::Clear);
        let (mut swept, mut chunks) = (0, 0);
        loop {
            match r.m.snapshot_step(1 << 22) {
                SnapshotStep::Sweeping => swept += 1,
                SnapshotStep::Chunk(_) => chunks += 1,
                SnapshotStep::Done(_) => break,
                SnapshotStep::Idle => panic!("no trailer"),
            }
        }
        assert!(swept >= 2 && chunks >= 3, "{swept} {chunks}");
    }

    #[test]
    fn installing_replaces_everything_but_what_readers_hold() {
        let mut source = Rig::new();
        for i in 0..100 {
            source.set(0, &name(i), b"new", SetExpire::After(1_000_000 + i));
        }
        source.now += 500;
        source.apply(encode_advance(LogTime(source.now)));
        let chunks = take_all(&mut source, 100, |_| {});

        let mut r = Rig::new();
        r.set(0, &name(1), b"old", SetExpire::Clear);
        r.m.begin_snapshot().unwrap();
        let published = r.m.published().clone();
        published.cell().open(1, 1, u64::MAX);
        let seen = published.begin().unwrap();
        let former = r.m.install(restore(&chunks).unwrap());
        assert_eq!(former.keys(), 1);
        assert!(Arc::ptr_eq(&published, r.m.published()));
        assert!(
            !published.finish(seen, 0, crate::time::MonoTime::default()),
            "what was read before does not count after"
        );
        assert_eq!(state(&r.m), state(&source.m));
        let key = name(1);
        let op = Op::Get { key: KeyRef::new(0, &key).unwrap() };
        let found = published.read(&op, crate::time::MonoTime::default);
        assert_eq!(found, Some(Reply::Bulk("new".into())));
        assert_eq!(r.m.snapshot_step(1), SnapshotStep::Idle, "its snapshot is gone");
        assert_eq!(state(&restore(&take_all(&mut r, 50, |_| {})).unwrap()), state(&source.m));
    }

    /// Some chunks of every kind.
    fn small() -> Vec<Bytes> {
        let mut r = Rig::new();
        for i in 0..12 {
            r.set((i % 3) as u8, &name(i), b"value", if i % 2 == 0 { SetExpire::Clear } else { SetExpire::After(i) });
        }
        let chunks = take_all(&mut r, 150, |_| {});
        assert!(chunks.len() > 5);
        chunks
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let chunks = small();
        for (i, chunk) in chunks.iter().enumerate() {
            for bit in 0..chunk.len() * 8 {
                let mut bad = chunk.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                let mut chunks = chunks.clone();
                chunks[i] = Bytes::from(bad);
                assert!(restore(&chunks).is_err(), "chunk {i}, bit {bit}");
            }
            for len in 0..chunk.len() {
                let mut chunks = chunks.clone();
                chunks[i].truncate(len);
                assert!(restore(&chunks).is_err(), "chunk {i} cut to {len}");
            }
        }
    }

    #[test]
    fn missing_swapped_repeated_and_foreign_chunks_are_found() {
        let chunks = small();
        let other = {
            let mut r = Rig::new();
            for i in 0..12 {
                r.set(0, &name(i + 50), b"value", SetExpire::Clear);
            }
            take_all(&mut r, 150, |_| {})
        };
        for i in 0..chunks.len() {
            let mut missing = chunks.clone();
            missing.remove(i);
            assert!(restore(&missing).is_err(), "without {i}");
            let mut twice = chunks.clone();
            twice.insert(i, chunks[i].clone());
            assert!(restore(&twice).is_err(), "{i} twice");
            for j in 0..i {
                let mut swapped = chunks.clone();
                swapped.swap(i, j);
                assert!(restore(&swapped).is_err(), "{i} and {j} swapped");
            }
            if i < other.len() {
                let mut mixed = chunks.clone();
                mixed[i] = other[i].clone();
                assert!(restore(&mixed).is_err(), "{i} of another snapshot");
            }
        }
        // A refused chunk does no harm: the right one may come after it.
        let mut r = Restore::begin(&chunks[0]).unwrap();
        for pair in chunks.windows(2) {
            assert!(r.chunk(&pair[0]).is_err() && r.chunk(b"").is_err());
            assert_eq!(r.chunk(&pair[1]).unwrap(), pair[1] == chunks[chunks.len() - 1]);
        }
        assert!(r.chunk(chunks.last().unwrap()).is_err(), "nothing comes after the last");
        r.finish().unwrap();
    }

    /// A snapshot in which `change` lies: right in form, checksums and trailer.
    fn forged(change: impl FnOnce(&mut Head), kind: u8, items: &[&[u8]]) -> Result<StateMachine, CorruptSnapshot> {
        let empty = StateMachine::new(ShardInit {
            range: SlotRange { start: 0, end: 9000 },
            epoch: Epoch(1),
            secret: 5,
            log_time: LogTime(T),
            applied: LogIndex(50),
        });
        let mut head = Head {
            range: empty.table().range(),
            epoch: empty.epoch(),
            secret: 5,
            log_time: empty.log_time(),
            applied: empty.applied(),
            digests: Vec::new(),
            checked: LogIndex(0),
            limits: MemoryLimits::default(),
            sessions: 0,
            keys: u64::MAX,
            bytes: 0,
            table_digest: 0,
            sessions_digest: 0,
            digest: empty.digest(),
        };
        change(&mut head);
        let mut chain = Chain::default();
        let mut chunk = Chain::open(0);
        put(&mut chunk, &head);
        let mut chunks = vec![chain.close(KIND_HEAD, chunk)];
        if !items.is_empty() {
            let mut chunk = Chain::open(0);
            for item in items {
                put_item(&mut chunk, item.len());
                chunk.extend_from_slice(item);
            }
            chunks.push(chain.close(kind, chunk));
        }
        let mut chunk = Chain::open(0);
        put_item(&mut chunk, chunks.len() + 1);
        chunk.extend_from_slice(&(if kind == KIND_RECORDS { items.len() } else { 0 }).to_le_bytes());
        chunk.extend_from_slice(&head.digest.to_le_bytes());
        chunks.push(chain.close(KIND_TRAILER, chunk));
        restore(&chunks)
    }

    #[test]
    fn what_a_head_says_is_checked_and_allocates_nothing() {
        assert_eq!(forged(|h| h.keys = 0, KIND_RECORDS, &[]).unwrap().keys(), 0);
        let refused = |change: fn(&mut Head)| {
            let result = forged(
                |h| {
                    h.keys = 0;
                    change(h);
                },
                KIND_RECORDS,
                &[],
            );
            result.expect_err("a lie")
        };
        for (change, chunk) in [
            ((|h| h.keys = u64::MAX) as fn(&mut Head), 2),
            (|h| h.bytes = u64::MAX, 2),
            (|h| h.table_digest = 1, 2),
            (|h| h.sessions = u64::MAX, 2),
            (|h| h.sessions_digest = 1, 2),
            (|h| h.digest ^= 1, 2),
            (|h| h.log_time = LogTime(1), 2),
            (|h| h.epoch = Epoch(2), 2),
            (|h| h.limits.max_bytes = 2, 2),
            (|h| h.limits.policy = LimitPolicy::Refuse, 2),
            (|h| h.range = SlotRange { start: 5, end: 4 }, 0),
            (|h| h.range = SlotRange { start: 0, end: SLOT_COUNT + 1 }, 0),
            (|h| h.digests = (0..9).map(|i| (LogIndex(i), 0)).collect(), 0),
            (|h| h.digests = vec![(LogIndex(3), 0), (LogIndex(3), 0)], 0),
            (|h| h.digests = vec![(LogIndex(51), 0)], 0),
        ] {
            assert_eq!(refused(change).chunk, chunk);
        }
        // A list whose length is a lie.
        let mut chunk = Chain::open(0);
        put(&mut chunk, &(0u16, 9000u16, 1u64, 5u64, T, 50u64, u64::MAX));
        let chunk = Chain::default().close(KIND_HEAD, chunk);
        assert_eq!(Restore::begin(&chunk).unwrap_err().chunk, 0);
    }

    #[test]
    fn records_that_cannot_be_are_refused() {
        // "bar" lies in slot 5061, "foo" in slot 12182.
        let reason = |records: &[&[u8]]| forged(|_| {}, KIND_RECORDS, records).expect_err("a lie").reason;
        let whole = "the keys are not those that the head describes";
        assert_eq!(reason(&[b"\x00\x03\x00barv"]), whole);
        assert_eq!(reason(&[b"\x8F\x03\x00\x01\0\0\0\0\0\0\0bar"]), whole);
        assert_eq!(reason(&[b"\x00\x03\x00barv", b"\x01\x03\x00barv"]), whole, "another database");
        assert_eq!(reason(&[b"\x00\x03\x00barv", b"\x00\x03\x00barw"]), "a key comes twice");
        assert_eq!(reason(&[b"\x00\x03\x00foov"]), "a key is of another shard");
        let large = [&b"\x00\x03\x00bar"[..], &vec![0; crate::limits::MAX_VALUE_BYTES + 1]].concat();
        assert_eq!(reason(&[&large[..large.len() - 1]]), whole);
        for bad in [
            &b""[..],
            b"\x00\x03",
            b"\x40\x03\x00barv",
            b"\x10\x03\x00barv",
            b"\x80\0\0\0\0\0\0\0\0\0\0bar",
            b"\x80\x03\x00barv",
            b"\x00\x04\x00bar",
            &large,
        ] {
            assert_eq!(reason(&[bad]), "a record is malformed");
        }
        let more = forged(|h| h.keys = 1, KIND_RECORDS, &[b"\x00\x03\x00barv", b"\x01\x03\x00barv"]);
        assert_eq!(more.expect_err("a lie").reason, "there are more keys than the head says");
        assert_eq!(forged(|_| {}, 9, &[b"x"]).expect_err("a lie").reason, "its kind is unknown");
    }

    #[test]
    fn sessions_that_cannot_be_are_refused() {
        let mut sessions = Sessions::default();
        sessions.open(Incarnation(1), LogIndex(10));
        sessions.open(Incarnation(2), LogIndex(11));
        for (seq, reply) in [(1, Reply::Int(5)), (2, Reply::Nil)] {
            let tag = tag(11, seq, 0);
            sessions.judge(tag, LogIndex(12));
            sessions.executed(tag, Some(Slot(3)), &reply);
        }
        let encoded: Vec<Vec<u8>> = sessions.encode().collect();
        let mut back = Sessions::default();
        encoded.iter().for_each(|s| back.restore(s).unwrap());
        assert_eq!(back.digest(), sessions.digest());
        assert_eq!(back.encode().collect::<Vec<_>>(), encoded);
        assert!(back.restore(&encoded[0]).is_none(), "twice");
        for len in 0..encoded[1].len() {
            assert!(Sessions::default().restore(&encoded[1][..len]).is_none(), "cut to {len}");
        }
        assert!(Sessions::default().restore(&[&encoded[1][..], &[0]].concat()).is_none());
        let session = |id: u64, low: u64, last: u64, used: u64, kept: &[u64], size: usize| {
            let mut out = Vec::new();
            put(&mut out, &(id, 9u128, low, last, used, kept.len() as u64));
            for seq in kept {
                let mut reply = Vec::new();
                crate::codec::encode_outcome(&Outcome::Reply(Reply::Bulk(vec![0; size].into())), &mut reply);
                put(&mut out, &(seq, None::<u16>));
                crate::codec::put_bytes(&mut out, &reply);
            }
            let mut s = Sessions::default();
            let taken = s.restore(&out).is_some();
            assert_eq!(taken, !s.is_empty(), "all or nothing");
            taken
        };
        assert!(session(5, 2, 9, 5, &[3, 5, 9], 100));
        assert!(!session(5, 2, 9, 4, &[3, 5, 9], 100), "used before it was opened");
        assert!(!session(5, 3, 9, 5, &[3, 5, 9], 100), "kept though finished");
        assert!(!session(5, 2, 8, 5, &[3, 5, 9], 100), "kept though not executed");
        assert!(!session(5, 2, 9, 5, &[3, 3, 9], 100));
        assert!(!session(5, 2, 9, 5, &[3, 5, 9], 30_000), "more than is kept");
        assert!(!session(5, 0, 2000, 5, &(1..1026).collect::<Vec<_>>(), 1));
        // Lengths that lie: kept replies, and the items of one.
        let mut out = Vec::new();
        put(&mut out, &(5u64, 9u128, 0u64, 9u64, 5u64, u64::MAX));
        assert!(Sessions::default().restore(&out).is_none());
        let mut out = Vec::new();
        put(&mut out, &(5u64, 9u128, 0u64, 9u64, 5u64, 1u64));
        put(&mut out, &(1u64, None::<u16>));
        put(&mut out, &[4u8, 0, 7, 0xFF][..].to_vec());
        assert!(Sessions::default().restore(&out).is_none());
    }
}
