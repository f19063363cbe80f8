//! The interleavings of the read cell, all of them: loom runs the cell's own source with atomics that it schedules.
//!
//! Values are atomics without order, the weakest that the table's locks could be; a value that readers may see while the
//! cell is open in a term is written before that opening.

/// What [`cell`] is made of here.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
}

#[path = "../../crates/crema-core/src/cell.rs"]
#[allow(dead_code, unreachable_pub, reason = "the source of another crate, of which only a part is modelled")]
mod cell;

use cell::{ReadCell, Seen};
use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use loom::thread;

#[derive(Default)]
struct Shared {
    cell: ReadCell,
    values: [AtomicU64; 2],
    told: AtomicU64,
}

impl Shared {
    fn open() -> Arc<Shared> {
        let shared = Shared::default();
        shared.cell.open(1, 1, 100);
        Arc::new(shared)
    }
    /// A whole read, as readers do it.
    fn read(&self, key: usize) -> Option<(Seen, u64)> {
        let seen = self.cell.begin()?;
        let value = self.values[key].load(Relaxed);
        self.cell.still(seen, 10).then_some((seen, value))
    }
}

#[test]
fn after_news_of_what_followed_the_closing_nobody_reads() {
    loom::model(|| {
        let s = Shared::open();
        let writer = s.clone();
        let writer = thread::spawn(move || {
            writer.cell.close();
            // A message leaves; another node leads, and tells a client so.
            writer.told.store(1, Release);
        });
        let told = s.told.load(Acquire);
        let read = s.read(0);
        assert!(told == 0 || read.is_none(), "a stale read");
        writer.join().unwrap();
    });
}

/// The leadership goes and comes back with another value: what is read belongs to the term it was read in.
fn goes_and_comes_back(read: impl Fn(&Shared) -> Option<(Seen, u64)> + Sync + Send + Copy + 'static) {
    loom::model(move || {
        let s = Shared::open();
        let writer = s.clone();
        let writer = thread::spawn(move || {
            writer.cell.close();
            writer.values[0].store(1, Relaxed);
            writer.cell.open(2, 1, 200);
        });
        if let Some((seen, value)) = read(&s) {
            assert_eq!(value, u64::from(seen.bound == 200), "a value of another term");
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_value_belongs_to_the_term_that_was_seen() {
    goes_and_comes_back(|s| s.read(0));
}

#[test]
#[should_panic(expected = "a value of another term")]
fn looking_once_is_not_enough() {
    goes_and_comes_back(|s| {
        let seen = s.cell.begin()?;
        Some((seen, s.values[0].load(Relaxed))).filter(|_| 10 < seen.bound)
    });
}

/// Two keys change together; somebody reads one after the other.
fn change_together(marked: bool) {
    loom::model(move || {
        let s = Shared::open();
        let writer = s.clone();
        let writer = thread::spawn(move || {
            if marked {
                writer.cell.changing();
            }
            writer.values[0].store(1, Relaxed);
            writer.values[1].store(1, Relaxed);
            if marked {
                writer.cell.changed();
            }
        });
        if let (Some((_, a)), Some((_, b))) = (s.read(0), s.read(1)) {
            assert!(a <= b, "half of a change");
        }
        writer.join().unwrap();
    });
}

#[test]
fn nobody_sees_half_of_a_change() {
    change_together(true);
}

#[test]
#[should_panic(expected = "half of a change")]
fn without_the_odd_version_somebody_does() {
    change_together(false);
}

#[test]
fn a_lease_that_is_extended_stays_open_and_ends_at_its_bound() {
    loom::model(|| {
        let s = Shared::open();
        let writer = s.clone();
        let writer = thread::spawn(move || writer.cell.open(1, 1, 150));
        if let Some(seen) = s.cell.begin() {
            assert!(s.cell.still(seen, 99), "an extension breaks no read");
            assert!(!s.cell.still(seen, 150));
        }
        writer.join().unwrap();
    });
}
