//! The rate at which a node sends snapshots, to all of its peers together.
//!
//! A bucket of tokens, kept as the time at which the last debt is paid: whoever comes gets the time from which on it may
//! send, in the order of coming, and leaves its own debt behind. So nobody waits under a lock, and a frame of any size
//! gets its turn.

use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// What an idle sender may send at once, beyond the rate: a time's worth of it.
const BURST: Duration = Duration::from_millis(10);

/// A limit shared by all writers of snapshots.
#[derive(Debug)]
pub(super) struct Pace {
    /// 0: without limit.
    bytes_per_second: u64,
    paid_at: Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: u64) -> Pace {
        Pace { bytes_per_second, paid_at: Mutex::new(Instant::now()) }
    }

    /// Asks for a turn to send `bytes`.
    pub(super) fn turn(&self, bytes: usize) -> Turn<'_> {
        let now = Instant::now();
        let nanos = match self.bytes_per_second {
            0 => 0,
            rate => u128::from(bytes as u64) * 1_000_000_000 / u128::from(rate),
        };
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let mut paid_at = self.paid_at.lock().expect("no panic while held");
        let at = (*paid_at).max(now.checked_sub(BURST).unwrap_or(now));
        // A rate of some bytes a second lets a large frame cost centuries: as good as never, but no overflow.
        *paid_at = at.checked_add(cost).unwrap_or(at);
        Turn { pace: self, at, cost, taken: false }
    }
}

/// A place in the line. Dropped before it was taken, it costs nothing.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    pace: &'a Pace,
    at: Instant,
    cost: Duration,
    taken: bool,
}

impl Turn<'_> {
    /// From when on the bytes may be sent.
    pub(super) fn at(&self) -> Instant {
        self.at
    }

    /// The bytes are sent.
    pub(super) fn take(mut self) {
        self.taken = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if !self.taken {
            let mut paid_at = self.pace.paid_at.lock().expect("no panic while held");
            // Those behind keep their times; who comes later gets what is left over.
            *paid_at = paid_at.checked_sub(self.cost).unwrap_or(*paid_at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn turns_come_at_the_rate() {
        let pace = Pace::new(1_000_000);
        let start = Instant::now();
        let at = |turn: &Turn<'_>| turn.at().saturating_duration_since(start).as_millis();
        // One in hand, then each after the debts of those before it.
        let turns: Vec<_> = [500_000, 1, 250_000, 100_000].map(|n| pace.turn(n)).into();
        assert_eq!(turns.iter().map(at).collect::<Vec<_>>(), [0, 500, 500, 750]);
        turns.into_iter().for_each(Turn::take);
        // An idle minute is worth a burst, no more.
        tokio::time::advance(Duration::from_secs(60)).await;
        let (first, second) = (pace.turn(10_000), pace.turn(20_000));
        let third = pace.turn(1);
        assert_eq!([at(&first), at(&second), at(&third)], [59_990, 60_000, 60_020]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_was_not_taken_costs_nothing() {
        let pace = Pace::new(1000);
        let start = Instant::now();
        pace.turn(1000).take();
        let gone = pace.turn(60_000);
        let waiting = pace.turn(1000);
        assert_eq!(waiting.at() - start, Duration::from_secs(61));
        drop(gone);
        let next = pace.turn(1);
        assert_eq!(next.at() - start, Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn no_limit_and_a_tiny_one() {
        let (free, tiny) = (Pace::new(0), Pace::new(1));
        for _ in 0..10 {
            let turn = free.turn(usize::MAX);
            assert!(turn.at() <= Instant::now());
            turn.take();
            tiny.turn(usize::MAX).take();
        }
    }
}
