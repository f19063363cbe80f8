//! Keys and values of one shard: slots, each a directory of segments, each a hash table of records.
//!
//! ```text
//!   slot --top bits of the key's hash--> segment (about a thousand records) --hash--> record { head | key | value }
//!    RwLock: the directory                RwLock: its records                          one allocation
//! ```
//!
//! Extendible hashing (Fagin et al. 1979): a segment that grows too large splits in two, so that no operation rebuilds a
//! whole slot. One writer, many readers: [`Table`] only reads, and the one [`TableWriter`] of a table changes it. Reading
//! holds the lock of a slot's directory and that of one segment; writing holds the directory's exclusively only to create,
//! split or remove something.
//!
//! Digests are sums over records, kept as records change: they depend neither on order nor on how segments were split.
//!
//! A *walk* shows all records as they were when it began, in small steps between which the table is written. One bit of
//! each record, its parity, tells which it has passed: beginning a walk turns the table's own parity over, what is written
//! from then on carries the new one, and the walk turns over what it shows. A write that would destroy a record of the old
//! parity puts it aside for the walk instead. So beginning costs nothing, and a write at most an allocation.

use crate::codec::Victim;
use crate::eviction::{EvictionPolicy, Name, Queues, Used};
use crate::key::KeyRef;
use crate::limits::{DATABASES, EVICTION_BYTES_PER_KEY, MAX_SCAN_COUNT, MAX_VALUE_BYTES};
use crate::packed::Packed;
use crate::slot::{Slot, SlotRange};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bits of a SCAN cursor below the slot: the upper bits of the key's hash. With the slot they make 53, so that clients which
/// hold a cursor as a double do not round it.
pub const SCAN_SLOT_SHIFT: u32 = 39;

/// Accounted bytes of a record beside its own allocation: its share of the hash table, of the directory, and of what the
/// allocator needs for itself. Measured (`crema-benches memory`): 34 to 43 from thirty keys a slot on, 37 for a million
/// keys in all slots. Some 300 bytes of each slot in use are not counted: with six keys a slot it is some 70.
pub const RECORD_OVERHEAD: u64 = 38;

/// Accounted bytes of a key: about what it keeps resident, within some 6 % from fifteen keys a slot on.
///
/// Part of the replicated state, so it is a function of the record alone, whatever the allocator of a build does. It is
/// modelled on mimalloc: allocations are rounded to 16 bytes, beyond 64 to four classes a power of two; larger ones
/// also leave the end of their page unused, a sixteenth from 8 KiB on and an eighth from 64 KiB on, as measured.
pub fn record_bytes(key_len: usize, value_len: usize, expires: bool) -> u64 {
    let len = (Record::head_len(expires) + key_len + value_len) as u64;
    let granule = if len <= 64 { 16 } else { (len - 1).next_power_of_two() / 8 };
    let class = len.next_multiple_of(granule);
    let waste = match class {
        0..=8_192 => 0,
        8_193..=65_536 => class / 16,
        _ => class / 8,
    };
    class + waste + RECORD_OVERHEAD
}

/// A segment splits when it exceeds this many records.
const SEGMENT_RECORDS: usize = 1024;
/// Most bits of a slot's directory. Keys that agree in so many bits share a segment however many they are; without an
/// end, keys of equal hash would split it for ever.
const MAX_DEPTH: u32 = 20;
/// What was put aside for a walk keeps at most this much room.
const KEEP_ASIDE: usize = 64;
/// A segment with room for fewer records keeps it.
const LEAST_SHRUNK: usize = 8;
/// Most segments and empty slots that one SCAN step visits: a wide shard without keys must not hold up the others.
const SCAN_VISITS: usize = 4096;
/// A SCAN step ends once it has found this many bytes of keys.
pub const SCAN_BYTES: usize = 1024 * 1024;
/// A SCAN step ends once it has compared this many bytes of keys with bytes of the pattern.
const SCAN_COMPARISONS: usize = 8 * 1024 * 1024;
/// Most records that one step of a walk looks at, shown or not: those written since it began are only passed over.
const WALK_VISITS: usize = 8192;
/// Most names and records that one search for victims looks at.
const VICTIM_VISITS: usize = 65_536;
/// With so many names too few, or twice as many too many, and a part of all keys, the queues of victims are filled anew.
const STRAY_NAMES: usize = 4096;
/// Odd and irregular (2^64 divided by the golden ratio), to spread small numbers over a word.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;
const CURSOR_HASH: u64 = (1 << SCAN_SLOT_SHIFT) - 1;
const _: () = assert!(DATABASES - 1 <= Record::DATABASE);

/// A lock is poisoned when its holder panicked. The replica of a panicked apply has stopped; a reader sees what there is.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// One key and its value in one allocation: database and flags, length of the key, expiry if there is one, key, value.
///
/// Sixteen bytes in the table, and three in the allocation that it would round up anyway: with the fields beside the
/// pointer, a hash table at usual load would take some 25 bytes a key more.
#[derive(Default)]
struct Record(Box<[u8]>);

impl Record {
    const EXPIRES: u8 = 0x80;
    /// Equal to the table's own, but for records that a walk has not passed.
    const PARITY: u8 = 0x40;
    const DATABASE: u8 = 0x0F;

    /// `parity` is 0 or [`Record::PARITY`]; `value` is the concatenation of two parts. The length of the key fits 16 bits
    /// since keys are limited when parsed.
    fn new(parity: u8, db: u8, key: &[u8], value: [&[u8]; 2], expire_at: u64) -> Self {
        let flags = parity | db;
        let head = Self::head_len(expire_at != 0);
        let mut data = Vec::with_capacity(head + key.len() + value[0].len() + value[1].len());
        data.push(if expire_at == 0 { flags } else { flags | Self::EXPIRES });
        data.extend_from_slice(&(key.len() as u16).to_le_bytes());
        if expire_at != 0 {
            data.extend_from_slice(&expire_at.to_le_bytes());
        }
        data.extend_from_slice(key);
        data.extend_from_slice(value[0]);
        data.extend_from_slice(value[1]);
        Record(data.into_boxed_slice())
    }

    fn db(&self) -> u8 {
        self.0[0] & Self::DATABASE
    }
    fn parity(&self) -> u8 {
        self.0[0] & Self::PARITY
    }
    const fn head_len(expires: bool) -> usize {
        if expires { 11 } else { 3 }
    }
    fn expires(&self) -> bool {
        self.0[0] & Self::EXPIRES != 0
    }
    fn head(&self) -> usize {
        Self::head_len(self.expires())
    }
    fn value_at(&self) -> usize {
        self.head() + usize::from(u16::from_le_bytes([self.0[1], self.0[2]]))
    }
    fn key(&self) -> &[u8] {
        &self.0[self.head()..self.value_at()]
    }
    fn value(&self) -> &[u8] {
        &self.0[self.value_at()..]
    }
    fn expire_at(&self) -> u64 {
        match self.0[3..].first_chunk::<8>() {
            Some(at) if self.expires() => u64::from_le_bytes(*at),
            _ => 0,
        }
    }
    fn entry(&self) -> Entry<'_> {
        Entry { value: self.value(), expire_at: self.expire_at() }
    }
    fn is(&self, key: &KeyRef<'_>) -> bool {
        self.db() == key.db && self.key() == key.bytes
    }

    /// Replaces value and expiry, in place if the allocation has just the right size.
    fn replace(&mut self, value: &[u8], expire_at: u64) {
        let at = self.value_at();
        if self.expires() == (expire_at != 0) && self.0.len() - at == value.len() {
            self.0[at..].copy_from_slice(value);
            self.write_expiry(expire_at);
        } else {
            *self = Record::new(self.parity(), self.db(), self.key(), [value, &[]], expire_at);
        }
    }

    fn set_expiry(&mut self, expire_at: u64) {
        if self.expires() == (expire_at != 0) {
            self.write_expiry(expire_at);
        } else {
            *self = Record::new(self.parity(), self.db(), self.key(), [self.value(), &[]], expire_at);
        }
    }

    /// Writes the expiry of a record that has room for it.
    fn write_expiry(&mut self, expire_at: u64) {
        if expire_at != 0 {
            self.0[3..11].copy_from_slice(&expire_at.to_le_bytes());
        }
    }

    fn bytes(&self) -> u64 {
        record_bytes(0, self.0.len() - self.head(), self.expires())
    }

    /// Contribution to the digest: database and key by their hash, value, expiry.
    fn digest(&self, hash: u64) -> u64 {
        xxh3_64_with_seed(self.value(), hash ^ self.expire_at().wrapping_mul(SPREAD))
    }
}

/// A record as its bytes, for snapshots: a byte of database and flag (0x80: it expires), the length of the key (two bytes,
/// little-endian), the expiry if there is one (eight), the key, and the value to the end.
#[derive(Clone, Copy)]
pub(crate) struct RecordBytes<'a>(&'a [u8]);

/// A record that has been checked, as far as it can be alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordView<'a> {
    pub(crate) key: KeyRef<'a>,
    pub(crate) value: &'a [u8],
    pub(crate) expire_at: u64,
}

impl<'a> RecordBytes<'a> {
    pub(crate) fn len(self) -> usize {
        self.0.len()
    }

    /// Appends the bytes, without what only this table knows: the parity.
    pub(crate) fn append_to(self, out: &mut Vec<u8>) {
        let at = out.len();
        out.extend_from_slice(self.0);
        out[at] &= !Record::PARITY;
    }

    /// Takes apart what [`RecordBytes::append_to`] wrote; `None` for anything else.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<RecordView<'a>> {
        let ([flags, low, high], mut rest) = bytes.split_first_chunk()?;
        if flags & !(Record::EXPIRES | Record::DATABASE) != 0 {
            return None;
        }
        let mut expire_at = 0;
        if flags & Record::EXPIRES != 0 {
            let (at, after) = rest.split_first_chunk()?;
            (expire_at, rest) = (u64::from_le_bytes(*at), after);
            if expire_at == 0 {
                return None;
            }
        }
        let (key, value) = rest.split_at_checked(usize::from(u16::from_le_bytes([*low, *high])))?;
        let key = KeyRef::new(flags & Record::DATABASE, key)?;
        (value.len() <= MAX_VALUE_BYTES).then_some(RecordView { key, value, expire_at })
    }
}

struct Segment {
    /// Upper bits of the hash in which all its records agree.
    depth: u32,
    /// None of its records expires before; `u64::MAX` if none expires. Changed by the writer only.
    earliest: AtomicU64,
    records: RwLock<Records>,
}

/// The records of a segment, and how often each was used.
#[derive(Default)]
struct Records {
    table: Packed<Record>,
    /// Two bits a place of the table, counted up by readers. Empty until the table is asked for victims.
    hits: Box<[AtomicU64]>,
}

impl std::ops::Deref for Records {
    type Target = Packed<Record>;
    fn deref(&self) -> &Packed<Record> {
        &self.table
    }
}

impl Records {
    /// Places whose hits share a word.
    const SHARE: usize = 32;

    fn hit_words(places: usize) -> Box<[AtomicU64]> {
        (0..places.div_ceil(Self::SHARE)).map(|_| AtomicU64::new(0)).collect()
    }

    /// Makes room to count the hits of every record.
    fn fit_hits(&mut self) {
        if self.hits.is_empty() {
            self.hits = Self::hit_words(self.table.places());
        }
    }

    /// Adds a record that is not there.
    fn insert(&mut self, hash: u64, record: Record) {
        if self.table.is_full() {
            self.refit(self.table.len() + 1);
        }
        let place = self.table.insert(hash, record);
        self.set_hits(place, |_| 0);
    }

    /// Moves the records into a table for so many, and their hits along.
    fn refit(&mut self, records: usize) {
        let mut moves = Vec::new();
        let counting = !self.hits.is_empty();
        let note = |from, to| {
            if counting {
                moves.push((from, to));
            }
        };
        self.table = std::mem::take(&mut self.table).rebuilt(records, note);
        if counting {
            let hits = std::mem::replace(&mut self.hits, Self::hit_words(self.table.places()));
            let old = Records { table: Packed::default(), hits };
            for (from, to) in moves {
                self.set_hits(to, |_| old.set_hits(from, |_| 0));
            }
        }
    }

    /// Gives room back once three eighths of it are unused, but for what the next few records need.
    fn shrink(&mut self) {
        let (len, capacity) = (self.table.len(), self.table.capacity());
        if capacity >= LEAST_SHRUNK && len < capacity / 8 * 5 {
            self.refit(len + len / 4);
        }
    }

    /// The record of a place was used. Most uses find its count full, and write nothing.
    fn hit(&self, place: usize) {
        let Some(word) = self.hits.get(place / Self::SHARE) else { return };
        let (now, shift) = (word.load(Relaxed), place % Self::SHARE * 2);
        if now >> shift & 3 != 3 {
            // Should somebody else count in this word at the same moment, one of the two uses is not counted.
            let _ = word.compare_exchange(now, now + (1 << shift), Relaxed, Relaxed);
        }
    }

    /// Sets the hits of a place; returns what they were.
    fn set_hits(&self, place: usize, change: impl FnOnce(u8) -> u8) -> u8 {
        let Some(word) = self.hits.get(place / Self::SHARE) else { return 0 };
        let shift = place % Self::SHARE * 2;
        let before = (word.fetch_and(!(3 << shift), Relaxed) >> shift & 3) as u8;
        word.fetch_or(u64::from(change(before) & 3) << shift, Relaxed);
        before
    }
}

impl Segment {
    fn new(depth: u32, earliest: u64, records: Packed<Record>) -> Self {
        let records = Records { table: records, hits: Box::default() };
        Segment { depth, earliest: AtomicU64::new(earliest), records: RwLock::new(records) }
    }

    /// The first hash behind the segment in which `hash` lies; `None` if it is the last of its directory.
    fn end(&self, hash: u64) -> Option<u64> {
        if self.depth == 0 {
            return None;
        }
        let width = 64 - self.depth;
        Some((hash >> width) + 1).filter(|next| next >> self.depth == 0).map(|next| next << width)
    }
}

/// The segments of one slot. Never empty of segments; exists while the slot has keys.
struct Directory {
    /// Upper bits of the hash that index `index`.
    depth: u32,
    /// Positions in `segments`; empty while there is only one, as in most slots.
    index: Vec<u32>,
    segments: Vec<Segment>,
    keys: AtomicU64,
    digest: AtomicU64,
}

impl Directory {
    fn new() -> Self {
        Directory {
            depth: 0,
            index: Vec::new(),
            segments: vec![Segment::new(0, u64::MAX, Packed::default())],
            keys: AtomicU64::new(0),
            digest: AtomicU64::new(0),
        }
    }

    fn place(&self, hash: u64) -> usize {
        if self.depth == 0 { 0 } else { self.index[(hash >> (64 - self.depth)) as usize] as usize }
    }

    fn segment(&self, hash: u64) -> &Segment {
        &self.segments[self.place(hash)]
    }

    /// Splits the segment of `hash` in two. Once only, even if all records fall to one side: the next key tries again.
    fn split(&mut self, hash: u64, hash_of: impl Fn(&Record) -> u64) {
        let place = self.place(hash);
        let (depth, earliest) = (self.segments[place].depth, self.segments[place].earliest.load(Relaxed));
        if depth >= MAX_DEPTH {
            return;
        }
        if depth == self.depth {
            self.index = if depth == 0 { vec![0, 0] } else { self.index.iter().flat_map(|s| [*s, *s]).collect() };
            self.depth += 1;
        }
        let depth = depth + 1;
        let bit = 64 - depth;
        let old = self.segments[place].records.get_mut().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::take(&mut old.table);
        let (mut halves, bit_of) = ([Vec::new(), Vec::new()], |r: &Record| (hash_of(r) >> bit & 1) as usize);
        halves.iter_mut().for_each(|half| half.reserve_exact(old.len() / 2 + old.len() / 8));
        old.into_items().for_each(|record| halves[bit_of(&record)].push(record));
        let halves = halves.map(|half| {
            let mut table = Packed::with_capacity(half.len());
            for record in half {
                table.insert(hash_of(&record), record);
            }
            table
        });
        let [low, high] = halves;
        self.segments[place] = Segment::new(depth, earliest, low);
        let new = self.segments.len() as u32;
        self.segments.push(Segment::new(depth, earliest, high));
        // The entries of the upper half are contiguous: those that begin with the segment's bits and then a one.
        let shift = self.depth - depth;
        let first = ((hash >> bit | 1) << shift) as usize;
        self.index[first..first + (1 << shift)].fill(new);
    }
}

/// A value and its expiry, as a reader sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The value.
    pub value: &'a [u8],
    /// Log time in milliseconds at which it expires, 0 for never.
    pub expire_at: u64,
}

/// What becomes of a key that [`TableWriter::edit`] shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit<'v> {
    /// It stays as it is.
    Keep,
    /// It is deleted, if it is there.
    Delete,
    /// It gets this value and expiry, whether it is there or not.
    Put {
        /// The value.
        value: &'v [u8],
        /// Log time at which it expires, 0 for never.
        expire_at: u64,
    },
    /// Its value grows, and the expiry stays; if it is absent, this is its value.
    Append(&'v [u8]),
    /// It gets this expiry (0 for never), if it is there.
    Expiry(u64),
}

/// One step of a scan.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ScanStep {
    /// Where to go on; `None` at the end.
    pub next: Option<u64>,
    /// Keys found, at most [`MAX_SCAN_COUNT`].
    pub keys: Vec<Bytes>,
}

/// What a scan looks for.
#[derive(Clone, Copy, Debug)]
pub struct ScanQuery<'a> {
    /// The database.
    pub db: u8,
    /// About how many records to look at; at least one group of equal hash bits is.
    pub count: u32,
    /// Log time in milliseconds; what has expired by then is left out.
    pub now: u64,
    /// Glob that returned keys match.
    pub pattern: Option<&'a [u8]>,
}

/// The keys and values of one shard, for reading. All totals are exact between two writes.
pub struct Table {
    range: SlotRange,
    seed: u64,
    slots: Box<[RwLock<Option<Box<Directory>>>]>,
    keys: [AtomicU64; DATABASES as usize],
    bytes: AtomicU64,
    digest: AtomicU64,
    /// No record expires before; `u64::MAX` if none expires.
    earliest: AtomicU64,
    /// The same of what the present round of [`TableWriter::expired`] has passed, and of what was written since it began.
    earliest_passed: AtomicU64,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("range", &self.range).field("keys", &self.keys()).finish_non_exhaustive()
    }
}

/// Lowers a bound that only one thread changes.
fn lower(bound: &AtomicU64, at: u64) {
    if at < bound.load(Relaxed) {
        bound.store(at, Relaxed);
    }
}

/// Adds to a counter that only one thread changes; cheaper than an atomic addition, and wraps.
fn add(counter: &AtomicU64, change: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(change), Relaxed);
}

impl Table {
    fn new(range: SlotRange, seed: u64) -> Self {
        Table {
            range,
            seed,
            slots: (0..range.len()).map(|_| RwLock::default()).collect(),
            keys: std::array::from_fn(|_| AtomicU64::new(0)),
            bytes: AtomicU64::new(0),
            digest: AtomicU64::new(0),
            earliest: AtomicU64::new(u64::MAX),
            earliest_passed: AtomicU64::new(u64::MAX),
        }
    }

    pub(crate) fn hash(&self, db: u8, key: &[u8]) -> u64 {
        xxh3_64_with_seed(key, self.seed ^ (u64::from(db) + 1).wrapping_mul(SPREAD))
    }

    fn hash_of(&self, r: &Record) -> u64 {
        self.hash(r.db(), r.key())
    }

    fn slot(&self, slot: Slot) -> Option<&RwLock<Option<Box<Directory>>>> {
        self.range.contains(slot).then(|| &self.slots[usize::from(slot.0 - self.range.start)])
    }

    /// Shows a key's value and expiry, expired or not; `None` if it is absent or its slot is not of this table. The value
    /// stays locked for the writer while `f` runs.
    pub fn get<R>(&self, key: KeyRef<'_>, f: impl FnOnce(Option<Entry<'_>>) -> R) -> R {
        let Some(slot) = self.slot(key.slot) else { return f(None) };
        let directory = read(slot);
        let Some(directory) = directory.as_deref() else { return f(None) };
        let hash = self.hash(key.db, key.bytes);
        let records = read(&directory.segment(hash).records);
        if records.hits.is_empty() {
            return f(records.find(hash, |r| r.is(&key)).map(|place| records.item(place).entry()));
        }
        let place = records.find(hash, |r| r.is(&key));
        place.inspect(|place| records.hit(*place));
        f(place.map(|place| records.item(place).entry()))
    }

    /// Number of keys of a database, expired ones that nobody wrote to included; 0 for one that does not exist.
    pub fn len(&self, db: u8) -> u64 {
        self.keys.get(usize::from(db)).map_or(0, |k| k.load(Relaxed))
    }

    /// Number of keys of all databases, expired ones that nobody wrote to included.
    pub fn keys(&self) -> u64 {
        self.keys.iter().map(|k| k.load(Relaxed)).sum()
    }

    /// Accounted bytes of all keys, [`record_bytes`] each.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Digest of all records; the wrapping sum of [`Table::slot_digest`] over all slots.
    pub fn digest(&self) -> u64 {
        self.digest.load(Relaxed)
    }

    /// Digest of one slot's records; 0 for one without any, or of another shard.
    pub fn slot_digest(&self, slot: Slot) -> u64 {
        self.slot(slot).map_or(0, |s| read(s).as_deref().map_or(0, |d| d.digest.load(Relaxed)))
    }

    /// No record expires before this log time; `u64::MAX` if none expires.
    pub(crate) fn earliest_expiry(&self) -> u64 {
        self.earliest.load(Relaxed)
    }

    #[cfg(test)]
    pub(crate) fn hits_bytes(&self) -> usize {
        let of = |d: &Directory| d.segments.iter().map(|s| size_of_val(&read(&s.records).hits[..])).sum::<usize>();
        self.slots.iter().map(|s| read(s).as_deref().map_or(0, of)).sum()
    }

    /// Seed of the hash of keys: the cluster's founding secret.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// The range of slots.
    pub fn range(&self) -> SlotRange {
        self.range
    }

    /// Whether a scan's cursor lies in a slot of this table.
    pub fn holds_cursor(&self, cursor: u64) -> bool {
        u16::try_from(cursor >> SCAN_SLOT_SHIFT).is_ok_and(|slot| self.range.contains(Slot(slot)))
    }

    /// One step in order of (slot, upper bits of the hash); nothing, and the end, for a cursor outside of the table. A key
    /// that is there from the first step to the last is returned at least once, whatever is written, split, or led
    /// elsewhere meanwhile: the order depends on key and seed alone. Keys whose upper bits are equal are returned
    /// together, since a cursor cannot stand between them; only if more than [`MAX_SCAN_COUNT`] agreed in slot and all 39
    /// bits would the rest be left out.
    pub fn scan(&self, cursor: u64, query: ScanQuery<'_>) -> ScanStep {
        let mut step = ScanStep::default();
        if !self.holds_cursor(cursor) {
            return step;
        }
        let mut budget = Budget {
            records: query.count.max(1) as usize,
            visits: SCAN_VISITS,
            bytes: SCAN_BYTES,
            comparisons: SCAN_COMPARISONS,
        };
        let (mut slot, mut from) = ((cursor >> SCAN_SLOT_SHIFT) as u16, cursor & CURSOR_HASH);
        while slot < self.range.end {
            if budget.spent() {
                step.next = Some(u64::from(slot) << SCAN_SLOT_SHIFT | from);
                return step;
            }
            budget.visits -= 1;
            let directory = read(&self.slots[usize::from(slot - self.range.start)]);
            // Where the next segment begins, in the same bits; none after the last.
            let mut end = None;
            if let Some(directory) = directory.as_deref() {
                let segment = directory.segment(from << (64 - SCAN_SLOT_SHIFT));
                if let Some(stopped_at) = self.scan_segment(segment, from, &query, &mut budget, &mut step.keys) {
                    step.next = Some(u64::from(slot) << SCAN_SLOT_SHIFT | stopped_at);
                    return step;
                }
                let width = SCAN_SLOT_SHIFT - segment.depth;
                end = Some(((from >> width) + 1) << width).filter(|end| *end <= CURSOR_HASH);
            }
            match end {
                Some(end) => from = end,
                None => (slot, from) = (slot + 1, 0),
            }
        }
        step
    }

    /// Looks through a segment from `from` on. Returns where it had to stop, `None` if it reached the end.
    fn scan_segment(
        &self,
        segment: &Segment,
        from: u64,
        query: &ScanQuery<'_>,
        budget: &mut Budget,
        keys: &mut Vec<Bytes>,
    ) -> Option<u64> {
        let records = read(&segment.records);
        let mut found: Vec<(u64, &Record)> = records
            .iter()
            .map(|r| (self.hash_of(r) >> (64 - SCAN_SLOT_SHIFT), r))
            .filter(|(hash, _)| *hash >= from)
            .collect();
        // By key too: a scan in the log must answer the same on every replica, however its table is laid out.
        found.sort_unstable_by_key(|(hash, r)| (*hash, r.key(), r.db()));
        for group in found.chunk_by(|a, b| a.0 == b.0) {
            // Having stopped before a group is progress only if something was looked at since the cursor.
            let progress = budget.records < query.count as usize || budget.visits + 1 < SCAN_VISITS;
            if progress && (budget.spent() || keys.len() + group.len() > MAX_SCAN_COUNT as usize) {
                return Some(group[0].0);
            }
            budget.records = budget.records.saturating_sub(group.len());
            for (_, r) in group {
                let alive = r.expire_at() == 0 || r.expire_at() > query.now;
                if r.db() != query.db || !alive || keys.len() >= MAX_SCAN_COUNT as usize {
                    continue;
                }
                if let Some(pattern) = query.pattern {
                    budget.comparisons = budget.comparisons.saturating_sub(r.key().len() * pattern.len());
                    if !crate::glob::glob_match(pattern, r.key()) {
                        continue;
                    }
                }
                budget.bytes = budget.bytes.saturating_sub(r.key().len());
                keys.push(Bytes::copy_from_slice(r.key()));
            }
        }
        None
    }
}

/// What is left to a scan step. It ends when any of it is spent, so that one step is short whatever is asked.
struct Budget {
    records: usize,
    visits: usize,
    bytes: usize,
    comparisons: usize,
}

impl Budget {
    fn spent(&self) -> bool {
        self.records == 0 || self.visits == 0 || self.bytes == 0 || self.comparisons == 0
    }
}

/// The one writer of a table.
#[derive(Debug)]
pub struct TableWriter {
    table: Arc<Table>,
    /// Parity of what is written: 0 or [`Record::PARITY`].
    parity: u8,
    walk: Option<Walk>,
    /// Slot and hash at which the next step of [`TableWriter::expired`] begins.
    expiry_cursor: (u16, u64),
    /// The order of victims, once somebody has asked for any.
    queues: Option<Box<Queues>>,
    /// Slot and hash up to which the queues have been filled with what was there before them; `None` when they are full.
    adopting: Option<(u16, u64)>,
}

/// A pass over the records that a table had at one moment.
struct Walk {
    table: Arc<Table>,
    /// Whether the writer has begun another table since: then nothing of this one changes any more.
    detached: bool,
    /// Whether nobody wants the records any more. They are turned over all the same, for the next walk.
    abandoned: bool,
    /// Parity of the records that have not been passed.
    parity: u8,
    /// Records of the old parity lie at or behind this slot and hash.
    slot: u16,
    from: u64,
    /// Records of the old parity that are still in the table, and their accounted bytes.
    left: u64,
    left_bytes: u64,
    /// Records that have been overwritten or deleted before they were passed, and their accounted bytes.
    aside: VecDeque<Record>,
    aside_bytes: u64,
}

impl std::fmt::Debug for Walk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Walk").field("left", &self.left).field("aside", &self.aside.len()).finish_non_exhaustive()
    }
}

impl Walk {
    /// A record of the old parity is no longer in the table.
    fn displaced(&mut self, record: Record) {
        let bytes = record.bytes();
        self.passed(bytes);
        if !self.abandoned {
            self.aside_bytes += bytes;
            self.aside.push_back(record);
        }
    }

    fn passed(&mut self, bytes: u64) {
        debug_assert!(self.left > 0 && self.left_bytes >= bytes, "more records than there were");
        self.left -= 1;
        self.left_bytes -= bytes;
    }

    /// Shows records put aside, then those of the table, turning them over. `take` answers whether there is room for the
    /// record; one it refuses comes again in the next step. Looks at [`WALK_VISITS`] records, and one segment, at most.
    fn step(&mut self, mut take: impl FnMut(&Record) -> bool) {
        while let Some(record) = self.aside.front() {
            if !take(record) {
                return;
            }
            self.aside_bytes -= record.bytes();
            self.aside.pop_front();
        }
        if self.aside.capacity() > KEEP_ASIDE {
            self.aside = VecDeque::new();
        }
        let mut visits = WALK_VISITS;
        while self.left > 0 && visits > 0 && self.slot < self.table.range.end {
            let place = usize::from(self.slot - self.table.range.start);
            let mut end = None;
            let table = self.table.clone();
            if let Some(directory) = read(&table.slots[place]).as_deref() {
                let segment = directory.segment(self.from);
                for record in write(&segment.records).table.iter_mut() {
                    visits = visits.saturating_sub(1);
                    if record.parity() != self.parity {
                        continue;
                    }
                    if !self.abandoned && !take(record) {
                        return;
                    }
                    record.0[0] ^= Record::PARITY;
                    self.passed(record.bytes());
                }
                end = segment.end(self.from);
            }
            drop(table);
            match end {
                Some(end) => self.from = end,
                None => {
                    // Once no reader holds the old table, what was walked can go: not all of it at once in the end.
                    if self.detached
                        && let Some(table) = Arc::get_mut(&mut self.table)
                    {
                        table.slots[place] = RwLock::default();
                    }
                    (self.slot, self.from) = (self.slot + 1, 0);
                }
            }
        }
        debug_assert!(self.left == 0 || self.slot < self.table.range.end, "records behind the walk");
    }

    fn done(&self) -> bool {
        self.left == 0 && self.aside.is_empty()
    }
}

impl TableWriter {
    /// The writer of a new, empty table for the slots of `range`; `seed` is the cluster's founding secret.
    pub fn new(range: SlotRange, seed: u64) -> Self {
        TableWriter {
            table: Arc::new(Table::new(range, seed)),
            parity: 0,
            walk: None,
            expiry_cursor: (range.start, 0),
            queues: None,
            adopting: None,
        }
    }

    /// Begins a walk over the records as they are now; `false` while an earlier one is unfinished.
    pub(crate) fn begin_walk(&mut self) -> bool {
        if self.walk.is_some() {
            return false;
        }
        let t = &self.table;
        self.walk = Some(Walk {
            table: t.clone(),
            detached: false,
            abandoned: false,
            parity: self.parity,
            slot: t.range.start,
            from: 0,
            left: t.keys(),
            left_bytes: t.bytes(),
            aside: VecDeque::new(),
            aside_bytes: 0,
        });
        self.parity ^= Record::PARITY;
        true
    }

    /// Walks on: shows records until `take` refuses one or a bounded number has been looked at. `false` once the walk is
    /// over, or when there is none.
    pub(crate) fn walk(&mut self, mut take: impl FnMut(RecordBytes<'_>) -> bool) -> bool {
        let Some(walk) = &mut self.walk else { return false };
        walk.step(|r| take(RecordBytes(&r.0)));
        if walk.done() {
            self.walk = None;
        }
        self.walk.is_some()
    }

    /// Nobody wants the rest of the walk. It goes on until every record is turned over, but shows nothing.
    pub(crate) fn abandon_walk(&mut self) {
        let Some(walk) = &mut self.walk else { return };
        walk.abandoned = true;
        (walk.aside, walk.aside_bytes) = (VecDeque::new(), 0);
        // Nothing was written into another table with the old parity.
        if walk.detached || walk.left == 0 {
            self.walk = None;
        }
    }

    /// Whether a walk is unfinished.
    pub(crate) fn walking(&self) -> bool {
        self.walk.is_some()
    }

    /// Accounted bytes of what only the walk holds.
    pub(crate) fn walk_bytes(&self) -> u64 {
        self.walk.as_ref().map_or(0, |w| w.aside_bytes + if w.detached { w.left_bytes } else { 0 })
    }

    /// The table, for readers.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Shows a key as [`Table::get`] does, and does what `decide` says, under one lock. A key whose slot is not of this
    /// table is shown as absent and never written.
    pub fn edit<'v, R>(&mut self, key: KeyRef<'_>, decide: impl FnOnce(Option<Entry<'_>>) -> (R, Edit<'v>)) -> R {
        let (t, parity) = (&*self.table, self.parity);
        let Some(slot) = t.slot(key.slot) else {
            debug_assert!(false, "slots are checked before keys are written");
            return decide(None).0;
        };
        let hash = t.hash(key.db, key.bytes);
        let guard = read(slot);
        let Some(directory) = guard.as_deref() else {
            drop(guard);
            let (answer, edit) = decide(None);
            if let Some(record) = new_record(parity, &key, edit) {
                let directory = Directory::new();
                t.account(&directory, &directory.segments[0], key.db, Some((&record, hash)), None);
                let mut records = write(&directory.segments[0].records);
                records.insert(hash, record);
                if self.queues.is_some() {
                    records.fit_hits();
                }
                drop(records);
                *write(slot) = Some(Box::new(directory));
                self.created(key.slot, hash);
            }
            return answer;
        };
        let segment = directory.segment(hash);
        let mut records = write(&segment.records);
        let (mut overfull, mut created) = (false, false);
        let answer = match records.find(hash, |r| r.is(&key)) {
            Some(place) => {
                let found = records.item(place);
                let (answer, edit) = decide(Some(found.entry()));
                let before = (found.bytes(), found.digest_unless(edit == Edit::Keep, hash));
                // Records of the old parity are there only while they are walked.
                let walk = self.walk.as_mut().filter(|_| found.parity() != parity);
                match edit {
                    Edit::Keep => {}
                    Edit::Delete => {
                        let record = records.table.remove(place);
                        if let Some(walk) = walk {
                            walk.displaced(record);
                        }
                        records.shrink();
                        t.account(directory, segment, key.db, None, Some(before));
                    }
                    Edit::Put { .. } | Edit::Append(_) | Edit::Expiry(_) => {
                        let record = records.table.item_mut(place);
                        let new = |value, expire_at| Record::new(parity, key.db, key.bytes, value, expire_at);
                        let other = match edit {
                            Edit::Put { value, expire_at } if walk.is_some() => Some(new([value, &[]], expire_at)),
                            Edit::Expiry(at) if walk.is_some() => Some(new([record.value(), &[]], at)),
                            Edit::Append(tail) => Some(new([record.value(), tail], record.expire_at())),
                            Edit::Put { value, expire_at } => {
                                record.replace(value, expire_at);
                                None
                            }
                            Edit::Expiry(at) => {
                                record.set_expiry(at);
                                None
                            }
                            Edit::Keep | Edit::Delete => None,
                        };
                        if let Some(other) = other {
                            let old = std::mem::replace(record, other);
                            if let Some(walk) = walk {
                                walk.displaced(old);
                            }
                        }
                        t.account(directory, segment, key.db, Some((record, hash)), Some(before));
                    }
                }
                if edit != Edit::Delete {
                    records.hit(place);
                }
                answer
            }
            None => {
                let (answer, edit) = decide(None);
                if let Some(record) = new_record(parity, &key, edit) {
                    t.account(directory, segment, key.db, Some((&record, hash)), None);
                    records.insert(hash, record);
                    overfull = records.len() > SEGMENT_RECORDS && segment.depth < MAX_DEPTH;
                    created = true;
                    if self.queues.is_some() {
                        records.fit_hits();
                    }
                }
                answer
            }
        };
        drop(records);
        let empty = directory.keys.load(Relaxed) == 0;
        drop(guard);
        // Only this writer changes directories, so nothing has moved since the guard was released.
        if overfull && let Some(directory) = write(slot).as_deref_mut() {
            directory.split(hash, |r| t.hash_of(r));
        }
        if empty {
            *write(slot) = None;
        }
        if created {
            self.created(key.slot, hash);
        }
        answer
    }

    /// A key was created: it gets its place in the order of victims.
    fn created(&mut self, slot: Slot, hash: u64) {
        let Some(queues) = &mut self.queues else { return };
        if self.adopting.is_some_and(|at| (slot.0, hash) >= at) {
            // It will be found with the others.
            return;
        }
        queues.insert(Name::new(slot, hash));
        // Names of deleted keys pile up when nothing is evicted.
        if queues.len() > 2 * STRAY_NAMES && queues.len() as u64 > 2 * self.table.keys() {
            **queues = Queues::new(queues.policy());
            self.adopting = Some((self.table.range.start, 0));
        }
    }

    /// Deletes the records of a slot and hash for which `which` holds; how many.
    pub(crate) fn remove(&mut self, victim: Victim, which: impl Fn(Entry<'_>) -> bool) -> u64 {
        let t = &*self.table;
        let mut keys: Vec<(u8, Vec<u8>)> = Vec::new();
        if let Some(slot) = t.slot(victim.slot)
            && let Some(directory) = read(slot).as_deref()
        {
            let records = read(&directory.segment(victim.hash).records);
            // Should several have the same hash, all of them go: their order differs between replicas.
            let found = records.with_hash(victim.hash).filter(|r| t.hash_of(r) == victim.hash);
            keys.extend(found.filter(|r| which(r.entry())).map(|r| (r.db(), r.key().to_vec())));
        }
        for (db, key) in &keys {
            self.edit(KeyRef { slot: victim.slot, db: *db, bytes: key }, |_| ((), Edit::Delete));
        }
        keys.len() as u64
    }

    /// One step round the table in search of what has expired by `now`.
    pub(crate) fn expired(&mut self, now: u64, max_records: usize) -> Vec<Victim> {
        let t = &*self.table;
        let mut found = Vec::new();
        let (mut visits, (mut slot, mut from)) = (WALK_VISITS, self.expiry_cursor);
        while t.earliest.load(Relaxed) <= now && visits > 0 && found.len() < max_records {
            if slot >= t.range.end {
                t.earliest.store(t.earliest_passed.load(Relaxed), Relaxed);
                t.earliest_passed.store(u64::MAX, Relaxed);
                (slot, from) = (t.range.start, 0);
                break;
            }
            let mut end = None;
            if let Some(directory) = read(&t.slots[usize::from(slot - t.range.start)]).as_deref() {
                let segment = directory.segment(from);
                if segment.earliest.load(Relaxed) <= now {
                    let (mut earliest, mut rest) = (u64::MAX, false);
                    for r in read(&segment.records).iter() {
                        visits = visits.saturating_sub(1);
                        if !r.expires() {
                            continue;
                        }
                        earliest = earliest.min(r.expire_at());
                        if r.expire_at() <= now {
                            rest |= found.len() >= max_records;
                            if !rest {
                                found.push(Victim { slot: Slot(slot), hash: t.hash_of(r) });
                            }
                        }
                    }
                    segment.earliest.store(earliest, Relaxed);
                    if rest {
                        break;
                    }
                }
                lower(&t.earliest_passed, segment.earliest.load(Relaxed));
                end = segment.end(from);
            }
            match end {
                Some(end) => from = end,
                None => (slot, from) = (slot + 1, 0),
            }
        }
        self.expiry_cursor = (slot, from);
        found
    }

    /// Chooses records to evict, in the order of `policy`, until they come to `bytes` or are `max`; `now` is log time.
    /// Looks at a bounded number.
    pub(crate) fn victims(&mut self, policy: EvictionPolicy, bytes: u64, max: usize, now: u64) -> Vec<Victim> {
        let keys = self.table.keys() as usize;
        let fresh = self.queues.as_ref().is_none_or(|q| {
            // Names are missing when victims were chosen and not removed.
            q.policy() != policy || self.adopting.is_none() && q.len() + keys / 8 + STRAY_NAMES < keys
        });
        let mut queues = self.queues.take().unwrap_or_else(|| Box::new(Queues::new(policy)));
        if fresh {
            *queues = Queues::new(policy);
            self.adopting = Some((self.table.range.start, 0));
        }
        self.adopt(&mut queues);
        let t = &*self.table;
        let (mut victims, mut freed, mut visits) = (Vec::new(), 0, VICTIM_VISITS);
        while freed < bytes && victims.len() < max {
            let mut found = (0, 0);
            let next = queues.next(&mut visits, |name, change| {
                let (used, hash, bytes) = t.used(name, change, now)?;
                found = (hash, bytes);
                Some(used)
            });
            let Some(name) = next else { break };
            freed += found.1 + EVICTION_BYTES_PER_KEY;
            victims.push(Victim { slot: name.slot(), hash: found.0 });
        }
        self.queues = Some(queues);
        victims
    }

    /// Fills the queues with what was there before them: a bounded number of records.
    fn adopt(&mut self, queues: &mut Queues) {
        let t = &*self.table;
        let mut visits = VICTIM_VISITS;
        while let Some((slot, from)) = self.adopting
            && visits > 0
        {
            if slot >= t.range.end {
                self.adopting = None;
                break;
            }
            let mut end = None;
            if let Some(directory) = read(&t.slots[usize::from(slot - t.range.start)]).as_deref() {
                let segment = directory.segment(from);
                let mut records = write(&segment.records);
                records.fit_hits();
                visits = visits.saturating_sub(records.len());
                records.iter().for_each(|r| queues.adopt(Name::new(Slot(slot), t.hash_of(r))));
                end = segment.end(from);
            }
            self.adopting = Some(end.map_or((slot + 1, 0), |end| (slot, end)));
        }
    }

    #[cfg(test)]
    pub(crate) fn queues(&self) -> Option<&Queues> {
        self.queues.as_deref()
    }

    /// Forgets the order of victims, which takes memory.
    pub(crate) fn forget_victims(&mut self) {
        (self.queues, self.adopting) = (None, None);
    }

    /// Deletes every key of one database. Looks at every record of the shard unless all are of that database, or none.
    pub fn clear_db(&mut self, db: u8) {
        let of_db = self.table.len(db);
        if of_db == self.table.keys() {
            return self.clear();
        }
        if of_db == 0 {
            return;
        }
        let t = &*self.table;
        for slot in &t.slots {
            let mut guard = write(slot);
            let Some(directory) = guard.as_deref_mut() else { continue };
            for segment in &directory.segments {
                let mut records = write(&segment.records);
                let with = |record: Record| {
                    t.account(directory, segment, db, None, Some((record.bytes(), record.digest(t.hash_of(&record)))));
                    if record.parity() != self.parity
                        && let Some(walk) = &mut self.walk
                    {
                        walk.displaced(record);
                    }
                };
                records.table.extract(|r| r.db() == db, with);
                let left = records.len();
                records.refit(left);
            }
            if directory.keys.load(Relaxed) == 0 {
                *guard = None;
            }
        }
    }

    /// Deletes everything, by beginning a new table: readers of the old one finish with it, and who holds it last frees it.
    pub fn clear(&mut self) {
        if self.table.keys() != 0 {
            self.table = Arc::new(Table::new(self.table.range, self.table.seed));
            self.expiry_cursor = (self.table.range.start, 0);
            if let Some(queues) = &mut self.queues {
                **queues = Queues::new(queues.policy());
                self.adopting = None;
            }
            match &mut self.walk {
                Some(walk) if walk.abandoned => self.walk = None,
                Some(walk) => walk.detached = true,
                None => {}
            }
        }
    }
}

impl Record {
    /// The digest, which costs a pass over the value, unless it is not needed.
    fn digest_unless(&self, skip: bool, hash: u64) -> u64 {
        if skip { 0 } else { self.digest(hash) }
    }
}

/// The record of a key that was absent, if the edit makes one.
fn new_record(parity: u8, key: &KeyRef<'_>, edit: Edit<'_>) -> Option<Record> {
    match edit {
        Edit::Put { value, expire_at } => Some(Record::new(parity, key.db, key.bytes, [value, &[]], expire_at)),
        Edit::Append(value) => Some(Record::new(parity, key.db, key.bytes, [value, &[]], 0)),
        Edit::Keep | Edit::Delete | Edit::Expiry(_) => None,
    }
}

impl Table {
    /// What a name stands for, its whole hash and accounted bytes; `None` if it is gone. Changes its hits.
    fn used(&self, name: Name, change: fn(u8) -> u8, now: u64) -> Option<(Used, u64, u64)> {
        let directory = read(self.slot(name.slot())?);
        let records = read(&directory.as_deref()?.segment(name.hash()).records);
        let place = records.find(name.hash(), |r| name.is(self.hash_of(r)))?;
        let record = records.item(place);
        let expired = record.expires() && record.expire_at() <= now;
        let used = Used { hits: records.set_hits(place, change), expired };
        Some((used, self.hash_of(record), record.bytes()))
    }

    /// Counts a record that comes, with its key's hash, and one that goes, with its bytes and digest.
    fn account(
        &self,
        directory: &Directory,
        segment: &Segment,
        db: u8,
        comes: Option<(&Record, u64)>,
        goes: Option<(u64, u64)>,
    ) {
        if let Some((record, _)) = comes
            && record.expires()
        {
            let at = record.expire_at();
            [&segment.earliest, &self.earliest, &self.earliest_passed].into_iter().for_each(|b| lower(b, at));
        }
        let keys = u64::from(comes.is_some()).wrapping_sub(u64::from(goes.is_some()));
        let (new_bytes, new_digest) = comes.map_or((0, 0), |(r, hash)| (r.bytes(), r.digest(hash)));
        let (old_bytes, old_digest) = goes.unwrap_or_default();
        let digest = new_digest.wrapping_sub(old_digest);
        add(&self.keys[usize::from(db)], keys);
        add(&self.bytes, new_bytes.wrapping_sub(old_bytes));
        add(&self.digest, digest);
        add(&directory.keys, keys);
        add(&directory.digest, digest);
    }
}

#[cfg(test)]
mod tests;
