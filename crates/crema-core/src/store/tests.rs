use super::*;
use crate::slot::{SLOT_COUNT, slot_of};
use std::collections::{BTreeMap, BTreeSet};

const ALL: SlotRange = SlotRange { start: 0, end: SLOT_COUNT };

fn writer() -> TableWriter {
    TableWriter::new(ALL, 0x5EED)
}

fn put(w: &mut TableWriter, key: KeyRef<'_>, value: &[u8], expire_at: u64) {
    w.edit(key, |_| ((), Edit::Put { value, expire_at }));
}

fn delete(w: &mut TableWriter, key: KeyRef<'_>) {
    w.edit(key, |_| ((), Edit::Delete));
}

fn get(t: &Table, key: KeyRef<'_>) -> Option<(Vec<u8>, u64)> {
    t.get(key, |e| e.map(|e| (e.value.to_vec(), e.expire_at)))
}

/// Keys of one slot, as many as wanted.
fn name(i: u32) -> Vec<u8> {
    format!("{{same slot}}{i}").into_bytes()
}

/// Everything that is kept as it changes, counted anew.
fn recount(t: &Table) {
    let (mut bytes, mut digest, mut keys) = (0u64, 0u64, [0u64; DATABASES as usize]);
    for slot in &t.slots {
        let guard = read(slot);
        let Some(d) = guard.as_deref() else { continue };
        let (mut in_slot, mut slot_digest) = (0, 0u64);
        for (i, s) in d.segments.iter().enumerate() {
            for r in read(&s.records).iter() {
                assert_eq!(d.place(t.hash_of(r)), i, "a record in a segment where nobody looks for it");
                assert!(read(&s.records).find(t.hash_of(r), |o| o.key() == r.key() && o.db() == r.db()).is_some());
                bytes += record_bytes(r.key().len(), r.value().len(), r.expire_at() != 0);
                slot_digest = slot_digest.wrapping_add(r.digest(t.hash_of(r)));
                keys[usize::from(r.db())] += 1;
                in_slot += 1;
            }
        }
        assert!(in_slot > 0, "an empty slot keeps no directory");
        assert_eq!((d.keys.load(Relaxed), d.digest.load(Relaxed)), (in_slot, slot_digest));
        digest = digest.wrapping_add(slot_digest);
    }
    assert_eq!((t.bytes(), t.digest()), (bytes, digest));
    assert!((0..DATABASES).all(|db| t.len(db) == keys[usize::from(db)]));
    assert_eq!(t.keys(), keys.iter().sum::<u64>());
}

#[test]
fn records_hold_what_they_are_given() {
    for expire_at in [0, 1, u64::MAX] {
        for key in [&b""[..], b"k", &[7; 65_535]] {
            let mut r = Record::new(Record::PARITY, 15, key, [b"va", b"lue"], expire_at);
            assert_eq!((r.db(), r.key(), r.value(), r.expire_at()), (15, key, &b"value"[..], expire_at));
            assert_eq!(r.bytes(), record_bytes(key.len(), 5, expire_at != 0));
            for (value, at) in
                [(&b"other"[..], expire_at), (b"", 9), (b"longer than before", 0), (b"longer than befora", 0)]
            {
                r.replace(value, at);
                assert_eq!(r.parity(), Record::PARITY);
                assert_eq!((r.db(), r.key(), r.value(), r.expire_at()), (15, key, value, at));
            }
            for at in [0, 5, 6, 0] {
                r.set_expiry(at);
                assert_eq!(r.parity(), Record::PARITY);
                assert_eq!((r.db(), r.key(), r.value(), r.expire_at()), (15, key, &b"longer than befora"[..], at));
            }
        }
    }
}

#[test]
fn a_record_costs_one_pointer_in_the_table() {
    assert_eq!(size_of::<Record>(), 16);
    assert_eq!(Record::new(0, 0, &[0; 16], [&[0; 128], &[]], 0).0.len(), 16 + 128 + 3);
}

#[test]
fn accounted_bytes_are_near_what_was_measured() {
    // Resident bytes a key for keys of 16 bytes under mimalloc, a million of them, or as many as fit 300 MB.
    for (value, expires, resident) in [
        (16, false, 86),
        (100, false, 166),
        (128, false, 197),
        (128, true, 197),
        (300, false, 357),
        (300, true, 422),
        (600, false, 685),
        (1000, false, 1_057),
        (1000, true, 1_323),
        (2000, false, 2_097),
        (4000, true, 4_139),
        (10_000, false, 10_994),
        (100_000, false, 126_894),
        (600_000, false, 754_399),
    ] {
        let accounted = record_bytes(16, value, expires) as f64;
        assert!((accounted / f64::from(resident) - 1.0).abs() < 0.05, "{value}: {accounted} of {resident}");
    }
    // Larger records never count less, nor much more than their bytes.
    for len in 0..200_000 {
        let (a, b) = (record_bytes(0, len, false), record_bytes(0, len + 1, false));
        assert!(a <= b && a > len as u64 && a < len as u64 * 3 / 2 + 64, "{len}: {a}, {b}");
    }
}

#[test]
fn edits_do_what_they_say() {
    let mut w = writer();
    let k = KeyRef::new(0, b"k").unwrap();
    for edit in [Edit::Keep, Edit::Delete, Edit::Expiry(5)] {
        w.edit(k, |e| (assert_eq!(e, None), edit));
        assert_eq!((get(w.table(), k), w.table().keys()), (None, 0));
    }
    w.edit(k, |_| ((), Edit::Append(b"ab")));
    assert_eq!(get(w.table(), k), Some((b"ab".to_vec(), 0)));
    w.edit(k, |_| ((), Edit::Expiry(9)));
    w.edit(k, |_| ((), Edit::Append(b"cd")));
    assert_eq!(w.edit(k, |e| (e.map(|e| (e.value.to_vec(), e.expire_at)), Edit::Keep)), Some((b"abcd".to_vec(), 9)));
    recount(w.table());
    put(&mut w, k, b"x", 0);
    assert_eq!(get(w.table(), k), Some((b"x".to_vec(), 0)));
    recount(w.table());
    delete(&mut w, k);
    assert_eq!((get(w.table(), k), w.table().keys(), w.table().bytes(), w.table().digest()), (None, 0, 0, 0));
    recount(w.table());
}

#[test]
fn databases_are_apart_and_cleared_alone() {
    let mut w = writer();
    let keys: Vec<_> = (0..3000).map(name).collect();
    for (i, k) in keys.iter().enumerate() {
        put(&mut w, KeyRef::new((i % 3) as u8, k).unwrap(), b"v", 0);
    }
    assert_eq!(get(w.table(), KeyRef::new(1, &keys[0]).unwrap()), None);
    w.clear_db(1);
    w.clear_db(7);
    recount(w.table());
    assert_eq!([0, 1, 2].map(|db| w.table().len(db)), [1000, 0, 1000]);
    let before = w.table().clone();
    w.clear_db(0);
    w.clear_db(2);
    recount(w.table());
    assert_eq!((w.table().keys(), w.table().bytes(), w.table().digest()), (0, 0, 0));
    assert!(!Arc::ptr_eq(&before, w.table()), "the last database is cleared by a new table");
}

#[test]
fn clearing_leaves_the_old_table_to_its_readers() {
    let mut w = writer();
    let k = KeyRef::new(0, b"k").unwrap();
    put(&mut w, k, b"v", 0);
    let old = w.table().clone();
    w.clear();
    assert_eq!((get(&old, k), get(w.table(), k)), (Some((b"v".to_vec(), 0)), None));
}

#[test]
fn a_foreign_slot_is_absent() {
    let slot = slot_of(b"k").0;
    let t = TableWriter::new(SlotRange { start: slot + 1, end: slot + 3 }, 1);
    let k = KeyRef::new(0, b"k").unwrap();
    assert_eq!(get(t.table(), k), None);
    assert_eq!(t.table().slot_digest(k.slot), 0);
    let step = t.table().scan(u64::from(slot) << SCAN_SLOT_SHIFT, query(1));
    assert_eq!(step, ScanStep::default());
}

#[test]
fn the_digest_depends_on_content_alone() {
    let (mut a, mut b) = (writer(), writer());
    for i in 0..5000 {
        put(&mut a, KeyRef::new(0, &name(i)).unwrap(), &i.to_le_bytes(), u64::from(i % 2));
    }
    for i in (0..9000).rev() {
        put(&mut b, KeyRef::new(0, &name(i)).unwrap(), b"first", 77);
    }
    assert_ne!(a.table().digest(), b.table().digest());
    for i in (0..9000).step_by(7).chain(0..9000) {
        let key = name(i);
        let key = KeyRef::new(0, &key).unwrap();
        if i < 5000 { put(&mut b, key, &i.to_le_bytes(), u64::from(i % 2)) } else { delete(&mut b, key) }
    }
    assert_eq!(a.table().digest(), b.table().digest());
    let (slot, key) = (slot_of(&name(0)), name(1));
    assert_eq!(a.table().slot_digest(slot), a.table().digest());
    let key = KeyRef::new(0, &key).unwrap();
    let digest = a.table().digest();
    for edit in [Edit::Expiry(99), Edit::Put { value: b"other", expire_at: 1 }, Edit::Delete] {
        let mut c = writer();
        for i in 0..5000 {
            put(&mut c, KeyRef::new(0, &name(i)).unwrap(), &i.to_le_bytes(), u64::from(i % 2));
        }
        assert_eq!(c.table().digest(), digest);
        c.edit(key, |_| ((), edit));
        assert_ne!(c.table().digest(), digest, "{edit:?}");
    }
}

#[test]
fn segments_split_and_memory_comes_back() {
    let mut w = writer();
    for i in 0..20_000 {
        put(&mut w, KeyRef::new(0, &name(i)).unwrap(), b"v", 0);
    }
    recount(w.table());
    let slot = slot_of(&name(0));
    let capacity = |w: &TableWriter| {
        let guard = read(w.table().slot(slot).unwrap());
        let d = guard.as_deref().unwrap();
        assert!(d.segments.iter().all(|s| read(&s.records).len() <= SEGMENT_RECORDS));
        d.segments.iter().map(|s| read(&s.records).capacity()).sum::<usize>()
    };
    let full = capacity(&w);
    assert!(full < 2 * 20_000, "{full}");
    for i in 0..19_500 {
        delete(&mut w, KeyRef::new(0, &name(i)).unwrap());
    }
    recount(w.table());
    assert!(capacity(&w) < full / 4);
    for i in 19_500..20_000 {
        assert!(get(w.table(), KeyRef::new(0, &name(i)).unwrap()).is_some());
        delete(&mut w, KeyRef::new(0, &name(i)).unwrap());
    }
    assert!(read(w.table().slot(slot).unwrap()).is_none());
}

#[test]
fn equal_hashes_do_not_split_for_ever() {
    let mut d = Directory::new();
    // All records claim the same hash: each split moves them to one side, down to the deepest.
    let hash = 0xDEAD_BEEF_0000_0001;
    for i in 0..50u32 {
        write(&d.segments[0].records).insert(hash, Record::new(0, 0, &name(i), [b"", b""], 0));
    }
    for _ in 0..MAX_DEPTH + 5 {
        d.split(hash, |_| hash);
        assert_eq!(read(&d.segment(hash).records).len(), 50);
    }
    assert_eq!((d.depth, d.index.len()), (MAX_DEPTH, 1 << MAX_DEPTH));
    assert_eq!(d.segments.len(), 1 + MAX_DEPTH as usize);
    for i in 0..d.index.len() {
        let s = &d.segments[d.index[i] as usize];
        let shift = MAX_DEPTH - s.depth;
        let first = d.index.iter().position(|e| *e == d.index[i]).unwrap();
        assert_eq!(i >> shift, first >> shift, "a segment's entries share its prefix");
        if i > 4096 {
            break;
        }
    }
}

fn query(count: u32) -> ScanQuery<'static> {
    ScanQuery { db: 0, count, now: 0, pattern: None }
}

/// Scans to the end, calling `between` after each step; returns how often each key came.
fn scan_all(
    w: &mut TableWriter,
    q: ScanQuery<'_>,
    mut between: impl FnMut(&mut TableWriter, usize),
) -> BTreeMap<Vec<u8>, u32> {
    let mut seen = BTreeMap::new();
    let mut cursor = u64::from(w.table().range().start) << SCAN_SLOT_SHIFT;
    for steps in 0.. {
        assert!(steps < 100_000, "the scan does not end");
        let step = w.table().scan(cursor, q);
        assert!(step.keys.len() <= q.count as usize + 1, "{} keys", step.keys.len());
        for k in step.keys {
            *seen.entry(k.to_vec()).or_insert(0) += 1;
        }
        match step.next {
            Some(next) => {
                assert!(next > cursor, "no progress");
                cursor = next;
            }
            None => return seen,
        }
        between(w, steps);
    }
    seen
}

#[test]
fn a_scan_finds_every_key_while_segments_split_and_others_go() {
    for seed in 0..4u32 {
        let mut w = TableWriter::new(ALL, u64::from(seed));
        // A large slot, and keys in many others.
        let stable: BTreeSet<Vec<u8>> =
            (0..3000).map(name).chain((0..2000).map(|i| format!("spread {i}").into_bytes())).collect();
        let fleeting: Vec<Vec<u8>> = (0..2000).map(|i| format!("{{same slot}}fleeting {i}").into_bytes()).collect();
        for k in stable.iter().chain(&fleeting) {
            put(&mut w, KeyRef::new(0, k).unwrap(), b"v", 0);
        }
        let count = [1, 7, 100, 10_000][seed as usize];
        let seen = scan_all(&mut w, query(count), |w, step| {
            for i in 0..20 {
                let n = (step * 20 + i) as u32;
                if n < 6000 {
                    put(w, KeyRef::new(0, format!("{{same slot}}new {n}").as_bytes()).unwrap(), b"v", 0);
                }
                if let Some(k) = fleeting.get(n as usize) {
                    delete(w, KeyRef::new(0, k).unwrap());
                }
            }
        });
        assert!(stable.iter().all(|k| seen.contains_key(k)), "seed {seed}");
        assert!(seen.values().all(|n| *n == 1), "seed {seed}: the order is total, so nothing comes twice");
        recount(w.table());
    }
}

#[test]
fn a_scan_leaves_out_other_databases_expired_keys_and_what_does_not_match() {
    let mut w = writer();
    for i in 0..100u32 {
        put(&mut w, KeyRef::new(0, &name(i)).unwrap(), b"v", u64::from(i));
        put(&mut w, KeyRef::new(1, &name(i + 1000)).unwrap(), b"v", 0);
    }
    let q = ScanQuery { now: 50, pattern: Some(b"*[05]"), ..query(10) };
    let seen = scan_all(&mut w, q, |_, _| {});
    let expected: BTreeSet<_> = (0..100).filter(|i| (*i == 0 || *i > 50) && i % 5 == 0).map(name).collect();
    assert_eq!(seen.into_keys().collect::<BTreeSet<_>>(), expected);
}

#[test]
fn a_step_is_bounded_in_bytes_comparisons_and_empty_slots() {
    let mut w = writer();
    let step = w.table().scan(0, query(10));
    assert_eq!((step.keys.len(), step.next), (0, Some((SCAN_VISITS as u64) << SCAN_SLOT_SHIFT)));
    for i in 0..100 {
        let long = [name(i), vec![b'a'; 60_000]].concat();
        put(&mut w, KeyRef::new(0, &long).unwrap(), b"", 0);
    }
    let start = u64::from(slot_of(&name(0)).0) << SCAN_SLOT_SHIFT;
    let step = w.table().scan(start, query(10_000));
    assert!((15..=19).contains(&step.keys.len()) && step.next.is_some(), "{}", step.keys.len());
    let pattern = [vec![b'*'], vec![b'b'; 99]].concat();
    let step = w.table().scan(start, ScanQuery { pattern: Some(&pattern), ..query(10_000) });
    assert!(step.keys.is_empty() && step.next.is_some(), "two keys spend the comparisons");
    assert_eq!(scan_all(&mut w, query(10_000), |_, _| {}).len(), 100);
}
