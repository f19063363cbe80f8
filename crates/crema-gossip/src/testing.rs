//! Randomness of the tests: every run prints its seed, and `CREMA_SEED` repeats one.

use crate::rng::SplitMix;
use std::ops::{Deref, DerefMut};
use std::time::{SystemTime, UNIX_EPOCH};

/// A generator whose seed the test's output names.
pub(crate) struct Rng(SplitMix);

impl Rng {
    pub(crate) fn from_clock() -> Rng {
        let given = std::env::var("CREMA_SEED").ok().and_then(|s| s.parse().ok());
        let seed =
            given.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64));
        // Captured by the harness and shown on failure.
        eprintln!("repeat with CREMA_SEED={seed}");
        Rng(SplitMix::new(seed))
    }
}

impl Deref for Rng {
    type Target = SplitMix;
    fn deref(&self) -> &SplitMix {
        &self.0
    }
}

impl DerefMut for Rng {
    fn deref_mut(&mut self) -> &mut SplitMix {
        &mut self.0
    }
}
