//! Keys and values of one shard: slots, each a directory of segments, each a hash table of records.
//!
//! ```text
//!   slot --top bits of the key's hash--> segment (about a thousand records) --hash--> record { key | value, expiry }
//! ```
//!
//! Extendible hashing (Fagin et al. 1979): a segment that grows too large splits in two, so that no operation ever
//! rebuilds a whole slot. One writer (apply), many readers; a slot's lock is held for one operation. Digests are sums over
//! records, kept as they change, and do not depend on order.

use crate::key::KeyRef;
use crate::limits::DATABASES;
use crate::slot::{Slot, SlotRange};
use hashbrown::HashTable;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bits of a SCAN cursor below the slot: the upper bits of the key's hash.
pub const SCAN_SLOT_SHIFT: u32 = 48;

/// Accounted bytes of a record beside its key and value: record, its share of the hash table, its allocation.
pub const RECORD_OVERHEAD: u64 = 56;

/// Records after which a segment splits.
const SEGMENT_RECORDS: usize = 1024;
/// Most bits of directory of one slot. Keys with equal upper hash bits share a segment however many they are.
const MAX_DEPTH: u32 = 20;

/// One key and its value in one allocation.
#[derive(Debug)]
struct Record {
    data: Box<[u8]>,
    /// Log time at which it expires, 0 for never.
    expire_at: u64,
    key_len: u16,
    db: u8,
}

impl Record {
    fn key(&self) -> &[u8] {
        &self.data[..usize::from(self.key_len)]
    }
    fn value(&self) -> &[u8] {
        &self.data[usize::from(self.key_len)..]
    }
    fn digest(&self, seed: u64) -> u64 {
        let expiry = self.expire_at.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        xxh3_64_with_seed(&self.data, seed ^ expiry ^ u64::from(self.key_len) << 8 ^ u64::from(self.db))
    }
    fn bytes(&self) -> u64 {
        self.data.len() as u64 + RECORD_OVERHEAD
    }
}

#[derive(Debug, Default)]
struct Segment {
    /// Bits of the hash that all its records share.
    depth: u32,
    records: HashTable<Record>,
}

#[derive(Debug)]
struct SlotTable {
    /// Bits that index the directory.
    depth: u32,
    directory: Vec<u32>,
    segments: Vec<Segment>,
    digest: u64,
}

impl SlotTable {
    fn new() -> Self {
        SlotTable { depth: 0, directory: vec![0], segments: vec![Segment::default()], digest: 0 }
    }

    fn place(&self, hash: u64) -> usize {
        let index = if self.depth == 0 { 0 } else { hash >> (64 - self.depth) };
        self.directory[index as usize] as usize
    }

    /// Splits the segment of `hash` until it has room or its records cannot be told apart.
    fn make_room(&mut self, hash: u64, seed: u64) {
        loop {
            let place = self.place(hash);
            let depth = self.segments[place].depth;
            if self.segments[place].records.len() < SEGMENT_RECORDS || depth >= MAX_DEPTH {
                return;
            }
            if depth == self.depth {
                self.directory = self.directory.iter().flat_map(|s| [*s, *s]).collect();
                self.depth += 1;
            }
            let bit = 1u64 << (63 - depth);
            let old = std::mem::take(&mut self.segments[place].records);
            let (mut low, mut high) = (HashTable::new(), HashTable::new());
            for record in old {
                let h = hash_key(record.db, record.key(), seed);
                let half = if h & bit == 0 { &mut low } else { &mut high };
                half.insert_unique(h, record, |r| hash_key(r.db, r.key(), seed));
            }
            self.segments[place] = Segment { depth: depth + 1, records: low };
            let new = self.segments.len() as u32;
            self.segments.push(Segment { depth: depth + 1, records: high });
            // The directory entries of the upper half point to the new segment.
            let shift = self.depth - depth - 1;
            for (i, s) in self.directory.iter_mut().enumerate() {
                if *s as usize == place && (i >> shift) & 1 == 1 {
                    *s = new;
                }
            }
        }
    }
}

fn hash_key(db: u8, key: &[u8], seed: u64) -> u64 {
    xxh3_64_with_seed(key, seed ^ u64::from(db) << 56)
}

/// A value and its expiry, as a reader sees them.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The value.
    pub value: &'a [u8],
    /// Log time at which it expires, 0 for never.
    pub expire_at: u64,
}

/// One step of a scan.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ScanStep {
    /// Where to go on; `None` at the end.
    pub next: Option<u64>,
    /// Keys found.
    pub keys: Vec<bytes::Bytes>,
}

/// The keys and values of one shard.
#[derive(Debug)]
pub struct Table {
    range: SlotRange,
    seed: u64,
    slots: Vec<RwLock<Option<Box<SlotTable>>>>,
    keys: [AtomicU64; DATABASES as usize],
    bytes: AtomicU64,
    digest: AtomicU64,
}

impl Table {
    /// An empty table for the slots of `range`; `seed` is the cluster's founding secret.
    pub fn new(range: SlotRange, seed: u64) -> Self {
        Table {
            range,
            seed,
            slots: (0..range.len()).map(|_| RwLock::new(None)).collect(),
            keys: Default::default(),
            bytes: AtomicU64::new(0),
            digest: AtomicU64::new(0),
        }
    }

    fn slot(&self, slot: Slot) -> &RwLock<Option<Box<SlotTable>>> {
        &self.slots[usize::from(slot.0 - self.range.start)]
    }

    /// Reads a key that the table's range holds; `f` runs under the slot's lock.
    pub fn get<R>(&self, key: KeyRef<'_>, f: impl FnOnce(Option<Entry<'_>>) -> R) -> R {
        let guard = self.slot(key.slot).read().expect("apply does not panic while it holds a slot");
        let record = guard.as_deref().and_then(|slot| {
            let hash = hash_key(key.db, key.bytes, self.seed);
            slot.segments[slot.place(hash)].records.find(hash, |r| r.db == key.db && r.key() == key.bytes)
        });
        f(record.map(|r| Entry { value: r.value(), expire_at: r.expire_at }))
    }

    /// Writes a key; `value` is the concatenation of the parts.
    pub fn put(&self, key: KeyRef<'_>, parts: [&[u8]; 2], expire_at: u64) {
        let mut data = Vec::with_capacity(key.bytes.len() + parts[0].len() + parts[1].len());
        data.extend_from_slice(key.bytes);
        data.extend_from_slice(parts[0]);
        data.extend_from_slice(parts[1]);
        let record = Record { data: data.into_boxed_slice(), expire_at, key_len: key.bytes.len() as u16, db: key.db };
        let mut guard = self.slot(key.slot).write().expect("apply does not panic while it holds a slot");
        let slot = guard.get_or_insert_with(|| Box::new(SlotTable::new()));
        let hash = hash_key(key.db, key.bytes, self.seed);
        slot.make_room(hash, self.seed);
        let seed = self.seed;
        let (new_digest, new_bytes) = (record.digest(seed), record.bytes());
        let place = slot.place(hash);
        let records = &mut slot.segments[place].records;
        let (mut old_digest, mut old_bytes) = (0, 0);
        match records.find_mut(hash, |r| r.db == key.db && r.key() == key.bytes) {
            Some(old) => {
                (old_digest, old_bytes) = (old.digest(seed), old.bytes());
                *old = record;
            }
            None => {
                self.keys[usize::from(key.db)].fetch_add(1, Ordering::Relaxed);
                records.insert_unique(hash, record, |r| hash_key(r.db, r.key(), seed));
            }
        }
        slot.digest = slot.digest.wrapping_add(new_digest).wrapping_sub(old_digest);
        self.digest.fetch_add(new_digest.wrapping_sub(old_digest), Ordering::Relaxed);
        self.bytes.fetch_add(new_bytes.wrapping_sub(old_bytes), Ordering::Relaxed);
    }

    /// Changes the expiry of a key that is there.
    pub fn set_expiry(&self, key: KeyRef<'_>, expire_at: u64) {
        let mut guard = self.slot(key.slot).write().expect("apply does not panic while it holds a slot");
        let Some(slot) = guard.as_deref_mut() else { return };
        let hash = hash_key(key.db, key.bytes, self.seed);
        let place = slot.place(hash);
        let found = slot.segments[place].records.find_mut(hash, |r| r.db == key.db && r.key() == key.bytes);
        if let Some(r) = found {
            let old = r.digest(self.seed);
            r.expire_at = expire_at;
            let change = r.digest(self.seed).wrapping_sub(old);
            slot.digest = slot.digest.wrapping_add(change);
            self.digest.fetch_add(change, Ordering::Relaxed);
        }
    }

    /// Deletes a key; returns whether it was there.
    pub fn delete(&self, key: KeyRef<'_>) -> bool {
        let mut guard = self.slot(key.slot).write().expect("apply does not panic while it holds a slot");
        let Some(slot) = guard.as_deref_mut() else { return false };
        let hash = hash_key(key.db, key.bytes, self.seed);
        let place = slot.place(hash);
        match slot.segments[place].records.find_entry(hash, |r| r.db == key.db && r.key() == key.bytes) {
            Ok(found) => {
                let (record, _) = found.remove();
                let digest = record.digest(self.seed);
                slot.digest = slot.digest.wrapping_sub(digest);
                self.digest.fetch_sub(digest, Ordering::Relaxed);
                self.bytes.fetch_sub(record.bytes(), Ordering::Relaxed);
                self.keys[usize::from(key.db)].fetch_sub(1, Ordering::Relaxed);
                true
            }
            Err(_) => false,
        }
    }

    /// Deletes every key of one database.
    pub fn clear_db(&self, db: u8) {
        for slot in &self.slots {
            let mut guard = slot.write().expect("apply does not panic while it holds a slot");
            let Some(slot) = guard.as_deref_mut() else { continue };
            for segment in &mut slot.segments {
                let (mut digest, mut bytes, mut keys) = (0u64, 0, 0);
                segment.records.retain(|r| {
                    let goes = r.db == db;
                    if goes {
                        digest = digest.wrapping_add(r.digest(self.seed));
                        bytes += r.bytes();
                        keys += 1;
                    }
                    !goes
                });
                slot.digest = slot.digest.wrapping_sub(digest);
                self.digest.fetch_sub(digest, Ordering::Relaxed);
                self.bytes.fetch_sub(bytes, Ordering::Relaxed);
                self.keys[usize::from(db)].fetch_sub(keys, Ordering::Relaxed);
            }
        }
    }

    /// Number of keys of a database, expired ones that nobody touched included.
    pub fn len(&self, db: u8) -> u64 {
        self.keys[usize::from(db)].load(Ordering::Relaxed)
    }

    /// Number of keys of all databases.
    pub fn keys(&self) -> u64 {
        self.keys.iter().map(|k| k.load(Ordering::Relaxed)).sum()
    }

    /// Accounted bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Digest of all records; the sum of [`Table::slot_digest`] over all slots.
    pub fn digest(&self) -> u64 {
        self.digest.load(Ordering::Relaxed)
    }

    /// Digest of one slot's records.
    pub fn slot_digest(&self, slot: Slot) -> u64 {
        let guard = self.slot(slot).read().expect("apply does not panic while it holds a slot");
        guard.as_deref().map_or(0, |s| s.digest)
    }

    /// The range of slots.
    pub fn range(&self) -> SlotRange {
        self.range
    }

    /// One step in order of (slot, upper bits of the hash). A key that is there from the first step to the last is
    /// returned at least once, whatever is written, split, or led elsewhere meanwhile: the order depends on key and seed
    /// alone. Looks at about `count` records, more only where hashes are equal in their upper bits.
    pub fn scan(&self, db: u8, cursor: u64, count: u32, now: u64, wanted: impl Fn(&[u8]) -> bool) -> ScanStep {
        let mut step = ScanStep::default();
        let mut left = i64::from(count);
        // Empty slots cost little, but not nothing: a step over a wide empty shard must end too.
        let mut slots_left = 4096;
        let mut slot = ((cursor >> SCAN_SLOT_SHIFT) as u16).max(self.range.start);
        let mut from =
            if cursor >> SCAN_SLOT_SHIFT == u64::from(slot) { cursor & ((1 << SCAN_SLOT_SHIFT) - 1) } else { 0 };
        while slot < self.range.end {
            if left <= 0 || slots_left == 0 {
                step.next = Some(u64::from(slot) << SCAN_SLOT_SHIFT | from);
                return step;
            }
            slots_left -= 1;
            let guard = self.slots[usize::from(slot - self.range.start)]
                .read()
                .expect("apply does not panic while it holds a slot");
            if let Some(table) = guard.as_deref() {
                let mut seen = u32::MAX;
                let first = if table.depth == 0 { 0 } else { (from << (64 - SCAN_SLOT_SHIFT)) >> (64 - table.depth) };
                for segment in &table.directory[first as usize..] {
                    if *segment == seen {
                        continue;
                    }
                    seen = *segment;
                    let records = &table.segments[*segment as usize].records;
                    let mut found: Vec<(u64, &Record)> = records
                        .iter()
                        .map(|r| (hash_key(r.db, r.key(), self.seed) >> (64 - SCAN_SLOT_SHIFT), r))
                        .filter(|(h, _)| *h >= from)
                        .collect();
                    found.sort_unstable_by_key(|(h, r)| (*h, r.db, r.key()));
                    let mut last = None;
                    for (hash, r) in found {
                        if left <= 0 && last != Some(hash) {
                            step.next = Some(u64::from(slot) << SCAN_SLOT_SHIFT | hash);
                            return step;
                        }
                        last = Some(hash);
                        left -= 1;
                        let alive = r.expire_at == 0 || r.expire_at > now;
                        if r.db == db && alive && wanted(r.key()) {
                            step.keys.push(bytes::Bytes::copy_from_slice(r.key()));
                        }
                    }
                }
            }
            slot += 1;
            from = 0;
        }
        step
    }
}
