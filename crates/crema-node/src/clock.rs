//! The node's clocks: the only place of this crate that reads them for the protocol.
//!
//! Leases and promises are measured with CLOCK_BOOTTIME, which runs on in suspend: a laptop that slept must not wake up
//! believing that its lease still stands. The wall clock is read beside it, but only steers log time.

use crema_core::{MonoTime, Now, WallTime};
use rustix::time::{ClockId, Timespec, clock_gettime};
use std::time::{SystemTime, UNIX_EPOCH};

/// A monotonic clock that also runs while the machine is suspended, where the system offers one.
#[cfg(any(target_os = "linux", target_os = "android"))]
const MONOTONIC: ClockId = ClockId::Boottime;
/// A monotonic clock; whether it runs in suspend is up to the system.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const MONOTONIC: ClockId = ClockId::Monotonic;

/// Both clocks, read one after the other. A wall clock before 1970 reads as 1970.
pub fn now() -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    Now { mono: mono(), wall: WallTime(wall) }
}

/// The monotonic clock alone.
pub fn mono() -> MonoTime {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(MONOTONIC);
    // Both are counted from the boot, hence never negative, and 64 bits of nanoseconds last for 584 years.
    MonoTime((tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(tv_nsec as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_forward_at_the_rate_of_the_system_clock() {
        let (mono_before, system_before) = (now(), std::time::Instant::now());
        assert!(mono_before.mono.0 > 0);
        let mut last = mono_before.mono;
        // A busy wait of a few milliseconds: long enough to tell nanoseconds from any other unit.
        while system_before.elapsed().as_millis() < 5 {
            let next = mono();
            assert!(next >= last);
            last = next;
        }
        let passed = mono().since(mono_before.mono);
        let outer = system_before.elapsed() + std::time::Duration::from_millis(1);
        assert!(passed.as_millis() >= 4 && passed <= outer, "{passed:?} of at most {outer:?}");
    }

    #[test]
    fn wall_time_is_in_milliseconds_since_1970() {
        let system = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        assert!(now().wall.0.abs_diff(system) < 60_000);
    }
}
