//! The one test that needs threads, which the sources of a pure crate may not name: readers beside the writer.

use crema_core::KeyRef;
use crema_core::store::{Edit, TableWriter};
use crema_core::{SLOT_COUNT, SlotRange};
use std::sync::atomic::{AtomicBool, Ordering};

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
