//! One connection's commands take effect in order per shard: may the next read of a shard be answered at once?

use crema_core::ShardId;

/// Counters that the shards share. A shard that shares its counter with a busy one is taken for busy: its reads go through
/// the driver, which is slower and never wrong.
const PLACES: usize = 64;

/// A connection's requests that the driver has not answered, by shard. Every operation is one step in a fixed array: a
/// burst of reads neither hashes nor allocates for this, and thousands of shards take no more room than one.
#[derive(Debug)]
pub struct Unanswered {
    places: [u32; PLACES],
}

impl Default for Unanswered {
    fn default() -> Self {
        Unanswered { places: [0; PLACES] }
    }
}

impl Unanswered {
    fn place(shard: ShardId) -> usize {
        shard.0 as usize % PLACES
    }

    /// A request to `shard` was handed to the driver, or is about to be.
    pub fn sent(&mut self, shard: ShardId) {
        self.places[Self::place(shard)] += 1;
    }

    /// Its result has come, whatever it says.
    pub fn answered(&mut self, shard: ShardId) {
        let place = &mut self.places[Self::place(shard)];
        debug_assert!(*place > 0, "shard {shard} has answered more than it was asked");
        *place = place.saturating_sub(1);
    }

    /// None of the results will come any more.
    pub fn give_up(&mut self) {
        *self = Unanswered::default();
    }

    /// Whether a read of `shard` that takes effect now keeps the order: nothing of this connection is on its way there. May
    /// say no although it would, never yes although it would not.
    pub fn allows(&self, shard: ShardId) -> bool {
        self.places[Self::place(shard)] == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_closed_until_its_last_request_is_answered() {
        let mut u = Unanswered::default();
        let (a, b) = (ShardId(3), ShardId(4));
        assert!(u.allows(a));
        u.sent(a);
        u.sent(a);
        assert!(!u.allows(a) && u.allows(b));
        u.answered(a);
        assert!(!u.allows(a));
        u.answered(a);
        assert!(u.allows(a));
    }

    #[test]
    fn a_shared_place_never_opens_a_busy_shard() {
        let mut u = Unanswered::default();
        let (a, other) = (ShardId(1), ShardId(1 + PLACES as u32));
        u.sent(a);
        assert!(!u.allows(other), "no, to be on the safe side");
        u.sent(other);
        u.answered(other);
        assert!(!u.allows(a), "the other shard's answer is not its own");
        u.give_up();
        assert!(u.allows(a) && u.allows(other));
    }

    #[test]
    fn any_order_of_many_shards_comes_back_to_nothing() {
        let mut u = Unanswered::default();
        (0..16_384).for_each(|s| u.sent(ShardId(s)));
        (0..16_384).rev().skip(1).for_each(|s| u.answered(ShardId(s)));
        assert!((0..16_384).all(|s| u.allows(ShardId(s)) == (s % PLACES as u32 != 16_383 % PLACES as u32)));
        u.answered(ShardId(16_383));
        assert!((0..16_384).all(|s| u.allows(ShardId(s))));
    }
}
