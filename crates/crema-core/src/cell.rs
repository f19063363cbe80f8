//! The word between one writer and many readers: whether a replica's state may be read now without asking anybody.
//!
//! ```text
//!   writer (the driver):  open(term, epoch, bound)   extend(bound)   close()   changing() .. changed()
//!   reader:  begin -> Seen    read the value    read the clock    still(Seen, clock) -> the value counts, or ask the driver
//! ```
//!
//! A sequence lock over a lease. A reader that loaded the cell once only would be open to ABA: the leadership may have
//! gone to another node and back between its look at the cell and its look at the value.
//!
//! Nothing but atomics here: the interleavings are explored with loom, which compiles this very file with atomics of its
//! own (`tests/src/cell_model.rs`).

use super::sync::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release, fence};

/// What a reader saw when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    term: u64,
    epoch: u64,
    version: u64,
    /// Until when the lease held by then; it may have been extended since.
    pub bound: u64,
}

/// A lease as its readers see it. Times are nanoseconds of the node's monotonic clock.
///
/// All methods that change it must be called by one thread at a time.
#[derive(Debug, Default)]
pub struct ReadCell {
    /// Term of the leadership, 0 while closed.
    term: AtomicU64,
    /// Placement epoch of the shard.
    epoch: AtomicU64,
    /// Until when the lease holds.
    bound: AtomicU64,
    /// Odd while several keys change together; changes with each closing too.
    version: AtomicU64,
}

impl ReadCell {
    /// Lets readers in under `term`, which is not 0, until `bound`. An open cell of another term or epoch is closed first.
    pub fn open(&self, term: u64, epoch: u64, bound: u64) {
        let same = self.term.load(Relaxed) == term && self.epoch.load(Relaxed) == epoch;
        if !same {
            self.close();
            self.epoch.store(epoch, Relaxed);
        }
        self.bound.store(bound, Release);
        self.term.store(term, Release);
    }

    /// Lets nobody in any more; whoever is in finds out before it answers.
    pub fn close(&self) {
        if self.term.load(Relaxed) == 0 {
            return;
        }
        self.term.store(0, Relaxed);
        self.version.store(self.version.load(Relaxed).wrapping_add(2), Relaxed);
        // What the caller does next must not be seen by somebody who still takes the cell for open.
        fence(Release);
    }

    /// Several keys are about to change together.
    pub fn changing(&self) {
        self.version.store(self.version.load(Relaxed).wrapping_add(1), Relaxed);
        // The change is not seen by anyone who does not see the odd version.
        fence(Release);
    }

    /// They have changed.
    pub fn changed(&self) {
        self.version.store(self.version.load(Relaxed).wrapping_add(1), Release);
    }

    /// Nobody reads here any more, under a lease or without.
    pub fn retire(&self) {
        self.close();
        // Odd for good: the writer that would make it even does not write any more.
        self.version.store(self.version.load(Relaxed) | 1, Relaxed);
        fence(Release);
    }

    /// Whether it is open, for whoever may change it.
    pub fn is_open(&self) -> bool {
        self.term.load(Relaxed) != 0
    }

    /// Begins a read: `None` if it has to go to the driver.
    pub fn begin(&self) -> Option<Seen> {
        let version = self.version.load(Acquire);
        let term = self.term.load(Acquire);
        let (epoch, bound) = (self.epoch.load(Relaxed), self.bound.load(Relaxed));
        (term != 0 && version.is_multiple_of(2)).then_some(Seen { term, epoch, version, bound })
    }

    /// The version, unless several keys are changing together: for reads that need no lease.
    pub fn whole(&self) -> Option<u64> {
        Some(self.version.load(Acquire)).filter(|v| v.is_multiple_of(2))
    }

    /// Whether what was read since [`ReadCell::whole`] is whole.
    pub fn still_whole(&self, version: u64) -> bool {
        fence(Acquire);
        self.version.load(Relaxed) == version
    }

    /// Whether a value that was read after `seen` counts: `clock` was read after the value.
    pub fn still(&self, seen: Seen, clock: u64) -> bool {
        fence(Acquire);
        let bound = self.bound.load(Acquire);
        self.term.load(Acquire) == seen.term
            && self.epoch.load(Relaxed) == seen.epoch
            && self.version.load(Relaxed) == seen.version
            && clock < bound
    }
}
