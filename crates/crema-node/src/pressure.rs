//! Keeping what is resident within what the operator gave, by giving less of it to data.
//!
//! ```text
//!   /proc/self/statm, ten times a second --resident--> Pressure: share of memory for data --beat--> leaders --> budgets, eviction
//! ```
//!
//! What an allocator keeps of pages that are half empty, what connections buffer and what the log takes beside its bytes
//! cannot be accounted for; what is resident can be seen. So accounting divides the memory, and this closes the loop: while
//! more is resident than the limit and [`BASE`] together, less of the memory is for data.

use crema_shard::meta::WHOLE_SHARE;
use std::time::Duration;

/// What a node may take beside its limit: the program, its threads and connections. An empty node takes half of it.
pub const BASE: u64 = 32 << 20;
/// Period of looking at what is resident.
pub const LOOK: Duration = Duration::from_millis(100);
/// Looks before the share is raised by one part: what was removed takes a while to leave, and a share that swings would
/// remove for nothing.
const CALM_LOOKS: u32 = 20;
/// Looks after a cut before the next one, unless more than before is resident.
const PATIENCE: u32 = 3;
/// Least share: should what is resident not follow what is removed, no more is given up for it.
pub const LEAST: u8 = WHOLE_SHARE / 4;

/// The controller, without its clock.
#[derive(Debug)]
pub struct Pressure {
    limit: u64,
    share: u8,
    calm: u32,
    since_cut: u32,
    at_cut: u64,
}

impl Pressure {
    /// For a node that may use `limit` bytes.
    pub fn new(limit: u64) -> Pressure {
        Pressure { limit, share: WHOLE_SHARE, calm: 0, since_cut: PATIENCE, at_cut: 0 }
    }

    /// So much is resident; returns the share for data, in parts of [`WHOLE_SHARE`].
    ///
    /// Above the limit and base less three thirty-seconds, it is cut by what is over, at once; two parts below that it is raised
    /// slowly.
    pub fn look(&mut self, resident: u64) -> u8 {
        let part = (self.limit / u64::from(WHOLE_SHARE)).max(1);
        let goal = self.limit + BASE - self.limit / 32 * 3;
        self.since_cut = self.since_cut.saturating_add(1);
        if resident > goal {
            self.calm = 0;
            if self.since_cut >= PATIENCE || resident > self.at_cut + part {
                let over = (resident - goal).div_ceil(part).clamp(1, u64::from(WHOLE_SHARE / 8)) as u8;
                self.share = self.share.saturating_sub(over).max(LEAST);
                (self.since_cut, self.at_cut) = (0, resident);
            }
        } else if resident + 2 * part < goal {
            self.calm += 1;
            if self.calm >= CALM_LOOKS && self.share < WHOLE_SHARE {
                self.share += 1;
                self.calm = 0;
            }
        }
        self.share
    }
}

/// Bytes of this process that are resident; `None` where the system does not say.
pub fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 256 << 20;

    #[test]
    fn it_cuts_at_once_and_raises_slowly() {
        let mut p = Pressure::new(LIMIT);
        assert_eq!(p.look(LIMIT), WHOLE_SHARE);
        let over = LIMIT + BASE + (16 << 20);
        let first = p.look(over);
        assert!(first < WHOLE_SHARE - 4, "{first}");
        assert_eq!(p.look(over), first, "what was removed needs its time");
        assert!(p.look(over + (8 << 20)) < first, "but not while it grows");
        for _ in 0..100 {
            p.look(over);
        }
        assert_eq!(p.look(over), LEAST, "and it stays a cache");
        for _ in 0..CALM_LOOKS {
            p.look(LIMIT / 2);
        }
        assert_eq!(p.look(LIMIT / 2), LEAST + 1);
        for _ in 0..CALM_LOOKS * 64 {
            p.look(LIMIT / 2);
        }
        assert_eq!(p.look(LIMIT / 2), WHOLE_SHARE);
        // Between goal and two parts below nothing moves.
        let mut steady = Pressure::new(LIMIT);
        steady.look(over);
        let share = steady.share;
        (0..1000).for_each(|_| _ = steady.look(LIMIT + BASE - LIMIT / 32 * 3));
        assert_eq!(steady.share, share);
    }

    #[test]
    fn the_system_says_what_is_resident() {
        let bytes = resident().expect("Linux does");
        assert!((1 << 20..1 << 40).contains(&bytes), "{bytes}");
    }
}
