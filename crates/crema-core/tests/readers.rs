//! The tests that need threads, which the sources of a pure crate may not name: readers beside the writer.

use crema_core::KeyRef;
use crema_core::store::{Edit, TableWriter};
use crema_core::{
    EntryBuilder, Epoch, EvictionPolicy, Incarnation, LogIndex, LogTime, Op, Restore, Seq, SessionId, SessionTag,
    SetCond, SetExpire, ShardInit, SnapshotStep, StateMachine, encode_open_session, encode_ops, encode_remove,
};
use crema_core::{SLOT_COUNT, SlotRange};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn put(w: &mut TableWriter, key: &[u8], value: &[u8]) {
    let key = KeyRef::new(0, key).expect("a short key");
    w.edit(key, |_| ((), Edit::Put { value, expire_at: 0 }));
}

#[test]
fn readers_see_whole_values_while_segments_split() {
    // All in one slot, so that its directory is what both contend for.
    let name = |i: usize| format!("{{same slot}}{i}").into_bytes();
    let mut w = TableWriter::new(SlotRange { start: 0, end: SLOT_COUNT }, 7);
    let keys: Vec<_> = (0..3000).map(name).collect();
    keys.iter().for_each(|k| put(&mut w, k, &[0; 64]));
    let table = w.table().clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        let reader = s.spawn(|| {
            // At least one whole round, however late this thread begins.
            loop {
                let last = done.load(Ordering::Acquire);
                for k in &keys {
                    let whole = table.get(KeyRef::new(0, k).expect("a short key"), |e| {
                        e.is_some_and(|e| e.value.len() == 64 && e.value.iter().all(|b| *b == e.value[0]))
                    });
                    assert!(whole, "a key that always exists was absent or torn");
                }
                if last {
                    break;
                }
            }
        });
        for round in 1..4u8 {
            for (i, k) in keys.iter().enumerate() {
                put(&mut w, k, &[round; 64]);
                // New keys make the segments split under the reader.
                put(&mut w, &name(10_000 * usize::from(round) + i), b"");
            }
        }
        done.store(true, Ordering::Release);
        reader.join().expect("the reader has not panicked");
    });
    assert_eq!(w.table().keys(), 12_000);
}

/// Ends the readers, however the writer ends: behind a panic they would read for ever.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Sets keys, each by an entry of its own.
struct Shard(StateMachine);

impl Shard {
    fn new() -> Self {
        let range = SlotRange { start: 0, end: SLOT_COUNT };
        let init = ShardInit { range, epoch: Epoch(1), secret: 7, log_time: LogTime(1), applied: LogIndex(0) };
        let mut shard = Shard(StateMachine::new(init));
        shard.apply(&encode_open_session(LogTime(1), Incarnation(1)));
        shard
    }
    fn apply(&mut self, entry: &[u8]) {
        self.0.apply(LogIndex(self.0.applied().0 + 1), entry).expect("a sound entry");
    }
    fn set(&mut self, name: &[u8], value: &[u8]) {
        let key = KeyRef::new(0, name).expect("a short key");
        let op = Op::Set { key, value, cond: SetCond::Always, expire: SetExpire::Clear, get: false };
        let seq = self.0.applied().0;
        let mut entry = EntryBuilder::new(LogTime(1), 0);
        let tag = SessionTag { session: SessionId(1), seq: Seq(seq), low: Seq(seq - 1) };
        entry.push(tag, &encode_ops(&[op]).expect("a sound operation"));
        self.apply(&entry.finish());
    }
}

#[test]
fn what_readers_use_is_neither_evicted_nor_hidden_by_a_snapshot() {
    let hot: Vec<_> = (0..100).map(|i| format!("hot {i}").into_bytes()).collect();
    let mut shard = Shard::new();
    hot.iter().for_each(|k| shard.set(k, &[0; 64]));
    shard.0.victims(EvictionPolicy::S3Fifo, 0, 0);
    let table = shard.0.table().clone();
    let (done, rounds, missed) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let read_all = || {
        while !done.load(Ordering::Acquire) {
            for k in &hot {
                let whole = table.get(KeyRef::new(0, k).expect("a short key"), |e| {
                    e.map(|e| e.value.len() == 64 && e.value.iter().all(|b| *b == e.value[0]))
                });
                assert_ne!(whole, Some(false), "torn");
                missed.fetch_add(u64::from(whole.is_none()), Ordering::Relaxed);
            }
            rounds.fetch_add(1, Ordering::Release);
        }
    };
    std::thread::scope(|s| {
        let readers = [s.spawn(read_all), s.spawn(read_all)];
        let stop = Stop(&done);
        for round in 0..200u64 {
            // The state as it is now, taken while it is written and evicted from.
            let (digest, head) = (shard.0.digest(), shard.0.begin_snapshot().expect("the last one is done"));
            let mut restore = Restore::begin(&head).expect("a sound head");
            let mut complete = false;
            let mut step = |m: &mut StateMachine| match m.snapshot_step(1000) {
                SnapshotStep::Chunk(chunk) | SnapshotStep::Done(chunk) => {
                    complete = restore.chunk(&chunk).expect("a sound chunk");
                    !complete
                }
                other => other == SnapshotStep::Sweeping,
            };
            for i in 0..50 {
                shard.set(format!("cold {round} {i}").as_bytes(), &[1; 64]);
                shard.set(&hot[i * 2], &[round as u8; 64]);
                step(&mut shard.0);
            }
            let over = shard.0.keys().saturating_sub(1000) as usize;
            let victims = shard.0.victims(EvictionPolicy::S3Fifo, u64::MAX, over);
            shard.apply(&encode_remove(LogTime(1), &victims, false).expect("few victims"));
            while step(&mut shard.0) {}
            assert!(complete, "the last chunk has come");
            assert_eq!(restore.finish().expect("a whole state").digest(), digest);
            let so_far = rounds.load(Ordering::Acquire);
            while rounds.load(Ordering::Acquire) < so_far + 2 && !readers.iter().any(|r| r.is_finished()) {
                std::thread::yield_now();
            }
        }
        drop(stop);
        readers.into_iter().for_each(|r| r.join().expect("no reader has panicked"));
    });
    let left = hot.iter().filter(|k| table.get(KeyRef::new(0, k).expect("a short key"), |e| e.is_some())).count();
    assert_eq!((shard.0.keys(), left), (1000, 100));
    assert_eq!(missed.into_inner(), 0);
}
