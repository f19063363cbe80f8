//! Three clocks that must not be mixed up: monotonic time, wall time and log time.

use crate::mutant::{Mutant, planted};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Nanoseconds of a monotonic clock that also runs in suspend (CLOCK_BOOTTIME). Meaningful on one node only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MonoTime(pub u64);

impl MonoTime {
    /// Later by `d`, saturating.
    pub fn after(self, d: Duration) -> MonoTime {
        MonoTime(self.0.saturating_add(d.as_nanos() as u64))
    }
    /// Time since `earlier`, zero if that lies ahead.
    pub fn since(self, earlier: MonoTime) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// Milliseconds since the Unix epoch by a wall clock that may jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct WallTime(pub u64);

/// Milliseconds of a shard's own time: it starts near wall time, never runs back, and is carried by the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct LogTime(pub u64);

/// The clocks of one node at one instant, handed into the pure crates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Now {
    /// Monotonic time.
    pub mono: MonoTime,
    /// Wall time.
    pub wall: WallTime,
}

/// A replica's estimate of its shard's log time between entries (DESIGN: "log time, not wall time").
///
/// It runs on from the last anchor at the monotonic clock's rate, steered towards wall time by at most 1/1000 of the
/// elapsed time, so a jump of the wall clock neither expires keys early nor revives them. The steering is part of the
/// estimate only: what a leader stamps into an entry becomes the next anchor everywhere.
#[derive(Clone, Copy, Debug)]
pub struct LogClock {
    anchor_log: LogTime,
    anchor_mono: MonoTime,
}

impl LogClock {
    /// A clock that reads `log` at `now`.
    pub fn new(log: LogTime, now: Now) -> Self {
        LogClock { anchor_log: log, anchor_mono: now.mono }
    }

    /// Log time at `now`; never below the anchor.
    pub fn estimate(&self, now: Now) -> LogTime {
        if planted(Mutant::WallStamps) {
            return LogTime(now.wall.0);
        }
        let elapsed = now.mono.since(self.anchor_mono).as_millis() as u64;
        let free = self.anchor_log.0.saturating_add(elapsed);
        let most = elapsed / 1000;
        LogTime(now.wall.0.clamp(free.saturating_sub(most), free.saturating_add(most)))
    }

    /// Takes note of an applied stamp or a leader's estimate. Runs forward only: an older one changes nothing.
    pub fn observe(&mut self, stamp: LogTime, now: Now) {
        let estimate = self.estimate(now);
        // The anchor moves with every observation, so that steering stays bounded by the time since the last one.
        self.anchor_log = estimate.max(stamp);
        self.anchor_mono = now.mono;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mono_ms: u64, wall_ms: u64) -> Now {
        Now { mono: MonoTime(mono_ms * 1_000_000), wall: WallTime(wall_ms) }
    }

    #[test]
    fn runs_at_the_monotonic_rate_and_steers_by_a_thousandth() {
        let c = LogClock::new(LogTime(1_000_000), at(0, 1_000_000));
        assert_eq!(c.estimate(at(10_000, 1_010_000)), LogTime(1_010_000));
        // The wall clock jumped a day ahead, then a day back.
        assert_eq!(c.estimate(at(10_000, 87_400_000)), LogTime(1_010_010));
        assert_eq!(c.estimate(at(10_000, 0)), LogTime(1_009_990));
    }

    #[test]
    fn never_runs_back() {
        let mut c = LogClock::new(LogTime(5_000), at(0, 5_000));
        c.observe(LogTime(9_000), at(10, 5_010));
        assert!(c.estimate(at(10, 0)) >= LogTime(9_000));
        c.observe(LogTime(1), at(20, 0));
        assert!(c.estimate(at(20, 0)) >= LogTime(9_000));
    }
}
