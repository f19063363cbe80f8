//! Which keys go when a shard's memory is full: the order in which its leader names victims.
//!
//! ```text
//!   S3-FIFO   new --> small --2 hits--> main <--. hit     SIEVE   new --> ahead --> hit? --> kept
//!                       |  ^ghost        |------'                           ^        no: out   |
//!                      out --> ghost    out                                 '-- when empty ----'
//! ```
//!
//! S3-FIFO (Yang et al. 2023) keeps new keys in a queue of a tenth of all until they have been used again, so that a scan
//! passes through without touching what is in use; it remembers by a fingerprint what left that queue lately, and takes it
//! for used if it comes again. SIEVE (Zhang et al. 2024) is one queue with a hand. LRU is approximated by a second chance:
//! who was used since it was last looked at goes to the end.
//!
//! What was used is two bits a key in the segments of the [`crate::store::Table`], counted up to three by readers that hold
//! a read lock only. The queues hold seven bytes a key, and find out lazily that one has been deleted. They belong to one
//! replica and decide nothing: victims leave by an entry ([`crate::encode_remove`]), on all replicas at the same index.

use crate::slot::Slot;
use std::collections::VecDeque;

/// How a leader chooses what to evict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionPolicy {
    /// S3-FIFO: the best hit ratio under skew and under scans; the default.
    #[default]
    S3Fifo,
    /// SIEVE: simpler, nearly as good under skew, worse under scans.
    Sieve,
    /// Second chance, which approximates LRU.
    Lru,
}

/// Bits of a hash that the queues keep: those by which a directory, and a hash table of up to 32,768 buckets, place it.
const HASH_MASK: u64 = (((1 << HIGH_BITS) - 1) << (64 - HIGH_BITS)) | ((1 << LOW_BITS) - 1);
const HIGH_BITS: u32 = 27;
const LOW_BITS: u32 = 15;

/// Names a record in seven bytes: 14 bits of the slot, 42 of the hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Name([u8; 7]);

impl Name {
    pub(crate) fn new(slot: Slot, hash: u64) -> Self {
        let high = hash >> (64 - HIGH_BITS);
        let low = hash & ((1 << LOW_BITS) - 1);
        let [a, b, c, d, e, f, g, _] = (u64::from(slot.0) | high << 14 | low << (14 + HIGH_BITS)).to_le_bytes();
        Name([a, b, c, d, e, f, g])
    }

    pub(crate) fn slot(self) -> Slot {
        Slot(u16::from_le_bytes([self.0[0], self.0[1]]) & 0x3FFF)
    }

    /// The hash, with zeros for the bits that are not kept.
    pub(crate) fn hash(self) -> u64 {
        let [a, b, c, d, e, f, g] = self.0;
        let all = u64::from_le_bytes([a, b, c, d, e, f, g, 0]) >> 14;
        all.rotate_right(HIGH_BITS)
    }

    pub(crate) fn is(self, hash: u64) -> bool {
        self.hash() == hash & HASH_MASK
    }

    /// Spread over a word, for the ghost.
    fn mixed(self) -> u64 {
        let [a, b, c, d, e, f, g] = self.0;
        let n = u64::from_le_bytes([a, b, c, d, e, f, g, 0]).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        n ^ n >> 29
    }
}

/// Names a block: 7 KiB, which the allocator gives without waste.
const BLOCK: usize = 1024;

/// A queue in blocks: it has room for a block too much at most, where one vector might have twice what it needs.
#[derive(Debug, Default)]
struct Fifo {
    blocks: VecDeque<Vec<Name>>,
    /// Names of the first block that have been taken.
    taken: usize,
    len: usize,
}

impl Fifo {
    fn push(&mut self, name: Name) {
        match self.blocks.back_mut() {
            Some(block) if block.len() < BLOCK => block.push(name),
            _ => {
                let mut block = Vec::with_capacity(BLOCK);
                block.push(name);
                self.blocks.push_back(block);
            }
        }
        self.len += 1;
    }

    fn pop(&mut self) -> Option<Name> {
        let block = self.blocks.front()?;
        let name = block[self.taken];
        self.taken += 1;
        self.len -= 1;
        if self.taken == block.len() {
            self.blocks.pop_front();
            self.taken = 0;
        }
        Some(name)
    }
}

/// Fingerprints of names that left lately, forgotten in the order they came within each of many small sets.
#[derive(Debug, Default)]
struct Ghost {
    sets: Vec<[u16; Ghost::WAYS]>,
}

impl Ghost {
    const WAYS: usize = 8;

    /// Makes room for about as many names; forgets all when that changes much.
    fn fit(&mut self, names: usize) {
        let sets = (names / Self::WAYS).max(1);
        if sets > self.sets.len() + self.sets.len() / 2 || sets < self.sets.len() / 3 {
            // Room to grow by a quarter.
            self.sets = vec![[0; Self::WAYS]; sets + sets / 8];
        }
    }

    fn place(&self, name: Name) -> (usize, u16) {
        let n = name.mixed();
        let set = (u128::from(n) * self.sets.len() as u128) >> 64;
        // Zero is nobody.
        (set as usize, (n as u16).max(1))
    }

    fn remember(&mut self, name: Name) {
        let (set, print) = self.place(name);
        if let Some(set) = self.sets.get_mut(set) {
            set.rotate_right(1);
            set[0] = print;
        }
    }

    /// Whether a name is remembered; it is forgotten by that.
    fn recall(&mut self, name: Name) -> bool {
        let (set, print) = self.place(name);
        let Some(set) = self.sets.get_mut(set) else { return false };
        let Some(at) = set.iter().position(|p| *p == print) else { return false };
        set[at..].rotate_left(1);
        set[Self::WAYS - 1] = 0;
        true
    }
}

/// What a name is found to stand for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    /// How often it was used, 0 to 3, before it was looked at.
    pub(crate) hits: u8,
    /// Whether it has expired: it goes first, however often it was used.
    pub(crate) expired: bool,
}

/// The queues of one table.
#[derive(Debug)]
pub(crate) struct Queues {
    policy: EvictionPolicy,
    /// New names: S3-FIFO's small queue, SIEVE's queue ahead of the hand, LRU's only one.
    new: Fifo,
    /// S3-FIFO's main queue, SIEVE's survivors behind the hand.
    kept: Fifo,
    ghost: Ghost,
}

impl Queues {
    /// Without any names.
    pub(crate) fn new(policy: EvictionPolicy) -> Self {
        Queues { policy, new: Fifo::default(), kept: Fifo::default(), ghost: Ghost::default() }
    }

    pub(crate) fn policy(&self) -> EvictionPolicy {
        self.policy
    }

    /// Number of names, those of deleted keys included.
    pub(crate) fn len(&self) -> usize {
        self.new.len + self.kept.len
    }

    /// A key has been created.
    pub(crate) fn insert(&mut self, name: Name) {
        if self.policy == EvictionPolicy::S3Fifo && self.ghost.recall(name) {
            self.kept.push(name);
        } else {
            self.new.push(name);
        }
    }

    /// A key was there before the queues were.
    pub(crate) fn adopt(&mut self, name: Name) {
        if self.policy == EvictionPolicy::S3Fifo {
            self.kept.push(name);
        } else {
            self.new.push(name);
        }
    }

    /// Takes the next victim out of the queues; `None` when `visits` names have been looked at, or none is left. `look`
    /// shows what a name stands for, if it still does, and changes its count of hits by the function given.
    pub(crate) fn next(
        &mut self,
        visits: &mut usize,
        mut look: impl FnMut(Name, fn(u8) -> u8) -> Option<Used>,
    ) -> Option<Name> {
        while *visits > 0 {
            *visits -= 1;
            match self.policy {
                EvictionPolicy::S3Fifo => {
                    self.ghost.fit(self.len() / 2);
                    let total = self.len();
                    if self.new.len > total / 10 || self.kept.len == 0 {
                        let name = self.new.pop()?;
                        match look(name, |_| 0) {
                            None => {}
                            Some(used) if used.hits >= PROMOTION_HITS && !used.expired => self.kept.push(name),
                            Some(_) => {
                                self.ghost.remember(name);
                                return Some(name);
                            }
                        }
                    } else {
                        let name = self.kept.pop()?;
                        match look(name, |hits| hits.saturating_sub(1)) {
                            None => {}
                            Some(used) if used.hits > 0 && !used.expired => self.kept.push(name),
                            Some(_) => return Some(name),
                        }
                    }
                }
                EvictionPolicy::Sieve | EvictionPolicy::Lru => {
                    if self.new.len == 0 {
                        std::mem::swap(&mut self.new, &mut self.kept);
                    }
                    let name = self.new.pop()?;
                    match look(name, |_| 0) {
                        None => {}
                        Some(used) if used.hits > 0 && !used.expired => match self.policy {
                            EvictionPolicy::Lru => self.new.push(name),
                            _ => self.kept.push(name),
                        },
                        Some(_) => return Some(name),
                    }
                }
            }
        }
        None
    }
}

/// Hits by which a name leaves S3-FIFO's small queue for the main one.
const PROMOTION_HITS: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::tests::key;
    use crate::codec::{encode_advance, encode_remove, encode_set_limits};
    use crate::key::KeyRef;
    use crate::limits::{EVICTION_BYTES_PER_KEY, LimitPolicy, MemoryLimits};
    use crate::op::{Op, SetCond, SetExpire};
    use crate::reply::Reply;
    use crate::slot::{SLOT_COUNT, slot_of};
    use crate::state_machine::StateMachine;
    use crate::state_machine::tests::{Rig, T};
    use crate::time::LogTime;
    use std::collections::{BTreeMap, BTreeSet};

    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }

    fn named(i: u64) -> Name {
        Name::new(Slot((i % 100) as u16), i.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    #[test]
    fn a_name_keeps_the_slot_and_the_bits_that_place_a_hash() {
        let mut rng = Random(5);
        for _ in 0..1000 {
            let (slot, hash) = (Slot(rng.below(u64::from(SLOT_COUNT)) as u16), rng.below(u64::MAX));
            let name = Name::new(slot, hash);
            assert_eq!((name.slot(), name.hash()), (slot, hash & HASH_MASK));
            assert!(name.is(hash) && name.is(hash ^ 1 << 20) && !name.is(hash ^ 1) && !name.is(hash ^ 1 << 63));
        }
        assert_eq!(HASH_MASK.count_ones(), 42);
        assert_eq!(HASH_MASK.leading_ones(), 27);
    }

    #[test]
    fn a_fifo_is_one_and_takes_seven_bytes_a_name() {
        let (mut fifo, mut model, mut rng) = (Fifo::default(), VecDeque::new(), Random(9));
        for i in 0..60_000u64 {
            // Grows to some ten thousand, then shrinks to nothing.
            if rng.below(100) < if i < 30_000 { 70 } else { 20 } {
                fifo.push(named(i));
                model.push_back(named(i));
            } else {
                assert_eq!(fifo.pop(), model.pop_front());
            }
            assert_eq!(fifo.len, model.len());
            assert!(fifo.blocks.len() * BLOCK < fifo.len + 2 * BLOCK);
        }
        assert_eq!((fifo.len, fifo.pop(), size_of::<Name>()), (0, None, 7));
        assert!(fifo.blocks.iter().all(|b| b.capacity() == BLOCK));
    }

    #[test]
    fn a_ghost_remembers_the_latest_and_each_once() {
        let mut ghost = Ghost::default();
        ghost.remember(named(1));
        assert!(!ghost.recall(named(1)), "without room");
        ghost.fit(8000);
        (0..8000).for_each(|i| ghost.remember(named(i)));
        let late = (7000..8000).filter(|i| ghost.recall(named(*i))).count();
        assert!(late > 950, "{late}");
        let again = (7000..8000).filter(|i| ghost.recall(named(*i))).count();
        assert!(again < 10, "{again}: only who shares a fingerprint");
        ghost.fit(8500);
        assert!(
            (6000..7000).filter(|i| ghost.recall(named(*i))).count() > 800,
            "kept while the size is about the same"
        );
        let strangers = (100_000..110_000).filter(|i| ghost.recall(named(*i))).count();
        assert!(strangers < 20, "{strangers}");
        ghost.fit(100_000);
        assert!(!ghost.recall(named(5500)));
    }

    /// Queues over a pretended table: hits by number.
    struct Play {
        queues: Queues,
        hits: BTreeMap<u64, u8>,
        by_name: BTreeMap<[u8; 7], u64>,
    }

    impl Play {
        fn new(policy: EvictionPolicy) -> Self {
            Play { queues: Queues::new(policy), hits: BTreeMap::new(), by_name: BTreeMap::new() }
        }
        /// Whether it was there.
        fn access(&mut self, i: u64) -> bool {
            if let Some(hits) = self.hits.get_mut(&i) {
                *hits = (*hits + 1).min(3);
                return true;
            }
            self.hits.insert(i, 0);
            self.by_name.insert(named(i).0, i);
            self.queues.insert(named(i));
            false
        }
        fn evict(&mut self) -> u64 {
            let mut visits = 1_000_000;
            let name = self.queues.next(&mut visits, |name, change| {
                let hits = self.hits.get_mut(&self.by_name[&name.0])?;
                let before = *hits;
                *hits = change(before);
                Some(Used { hits: before, expired: false })
            });
            let i = self.by_name[&name.expect("a victim").0];
            self.hits.remove(&i);
            i
        }
    }

    #[test]
    fn sieve_is_the_published_one() {
        // The algorithm as its authors give it: one list, newest last here, and a hand from old to new.
        let (mut list, mut hand): (Vec<(u64, bool)>, usize) = (Vec::new(), 0);
        let (mut play, mut rng) = (Play::new(EvictionPolicy::Sieve), Random(3));
        for _ in 0..20_000 {
            let i = rng.below(30) * rng.below(30);
            let hit = play.access(i);
            assert_eq!(hit, list.iter().any(|e| e.0 == i));
            match list.iter_mut().find(|e| e.0 == i) {
                Some(e) => e.1 = true,
                None => list.push((i, false)),
            }
            if list.len() > 100 {
                let victim = loop {
                    if hand == list.len() {
                        hand = 0;
                    }
                    if !list[hand].1 {
                        break list.remove(hand).0;
                    }
                    list[hand].1 = false;
                    hand += 1;
                };
                assert_eq!(play.evict(), victim);
            }
        }
    }

    #[test]
    fn a_second_chance_is_given_in_order_of_age() {
        let mut play = Play::new(EvictionPolicy::Lru);
        for i in 0..5 {
            play.access(i);
        }
        play.access(0);
        play.access(2);
        assert_eq!([play.evict(), play.evict(), play.evict(), play.evict(), play.evict()], [1, 3, 4, 0, 2]);
    }

    #[test]
    fn a_scan_passes_through_the_small_queue() {
        let mut play = Play::new(EvictionPolicy::S3Fifo);
        for i in (0..100).chain(0..100).chain(0..100) {
            play.access(i);
        }
        for i in 1000..3000 {
            play.access(i);
            play.evict();
        }
        let left = (0..100).filter(|i| play.hits.contains_key(i)).count();
        assert!(left >= 90, "{left} of those in use are left");
        // What left the small queue and comes again soon goes to the main one.
        let (main, gone) = (play.queues.kept.len, 2980);
        assert!(!play.access(gone));
        assert_eq!(play.queues.kept.len, main + 1);
    }

    #[test]
    fn names_of_nothing_are_dropped_and_the_work_is_bounded() {
        for policy in [EvictionPolicy::S3Fifo, EvictionPolicy::Sieve, EvictionPolicy::Lru] {
            let mut q = Queues::new(policy);
            let mut visits = 10;
            assert_eq!(q.next(&mut visits, |_, _| None), None);
            (0..100).for_each(|i| q.insert(named(i)));
            let mut visits = 30;
            assert_eq!(q.next(&mut visits, |_, _| None), None);
            assert_eq!((visits, q.len()), (0, 70), "{policy:?}");
            // Everybody is in use: somebody goes all the same, after the hits are spent.
            let mut hits = BTreeMap::new();
            let mut visits = 1000;
            let next = q.next(&mut visits, |name, change| {
                let hits = hits.entry(name.0).or_insert(3);
                let before = *hits;
                *hits = change(before);
                Some(Used { hits: before, expired: false })
            });
            assert!(next.is_some(), "{policy:?}");
            let used = |_, _: fn(u8) -> u8| Some(Used { hits: 3, expired: false });
            assert_eq!(q.next(&mut 1000, used), None, "{policy:?}: hits that are never spent do not hang it");
            let expired = |_, _: fn(u8) -> u8| Some(Used { hits: 3, expired: true });
            assert!(q.next(&mut 1, expired).is_some(), "{policy:?}: what has expired goes at once");
        }
    }

    // ---- with a state machine ----------------------------------------------------------------------------------

    fn set(r: &mut Rig, name: &str, expire: SetExpire) {
        let op = Op::Set { key: key(name.as_bytes()), value: &[7; 50], cond: SetCond::Always, expire, get: false };
        assert_eq!(r.op(op), Reply::Ok, "{name}");
    }

    fn there(m: &StateMachine, name: &str) -> bool {
        m.table().get(KeyRef::new(0, name.as_bytes()).unwrap(), |e| e.is_some())
    }

    /// Removes what is over the limit, as a leader does; how many.
    fn make_room(r: &mut Rig, policy: EvictionPolicy) -> usize {
        let mut removed = 0;
        for calls in 0.. {
            assert!(calls < 100, "no room is made");
            let over = r.m.used().saturating_sub(r.m.limits().max_bytes);
            if over == 0 {
                break;
            }
            let victims = r.m.victims(policy, over, 500);
            let (keys, bytes) = (r.m.keys(), r.m.used());
            r.next(&encode_remove(LogTime(T), &victims, false).unwrap());
            assert_eq!(r.m.keys(), keys - victims.len() as u64, "each victim is there, and once");
            assert!(victims.len() == 500 || bytes - r.m.used() < over + 2000, "no more than was asked for");
            removed += victims.len();
        }
        removed
    }

    #[test]
    fn what_is_used_stays_and_memory_stays_bounded() {
        for policy in [EvictionPolicy::S3Fifo, EvictionPolicy::Sieve, EvictionPolicy::Lru] {
            let mut r = Rig::new();
            // Most of them in one slot, so that segments split under eviction.
            let name = |i: u64| if i.is_multiple_of(4) { format!("spread{i}") } else { format!("{{one}}{i}") };
            (0..2000).for_each(|i| set(&mut r, &name(i), SetExpire::Clear));
            let limits = MemoryLimits { max_bytes: r.m.bytes() * 2, policy: LimitPolicy::Evict };
            r.next(&encode_set_limits(LogTime(T), limits));
            // Those that were there before anybody asked for victims are as good as any.
            assert!(r.m.victims(policy, 0, 10).is_empty());
            let mut removed = 0;
            for i in 2000..12_000 {
                set(&mut r, &name(i), SetExpire::Clear);
                (0..3).for_each(|k| assert!(there(&r.m, &name(k)) || i < 4000, "{policy:?}: {k} is in use, at {i}"));
                for k in 0..200 {
                    if k % 20 == i % 20 {
                        there(&r.m, &name(k));
                    }
                }
                removed += make_room(&mut r, policy);
            }
            let left = (0..200).filter(|k| there(&r.m, &name(*k))).count();
            assert!(left > 180, "{policy:?}: {left}");
            assert_eq!(r.m.keys(), 12_000 - removed as u64);
            assert!(r.m.used() <= limits.max_bytes && r.m.used() > limits.max_bytes - 2000);
            assert_eq!(r.m.removed().evicted, removed as u64);
        }
    }

    #[test]
    fn queues_survive_deletion_flushing_and_victims_that_are_not_removed() {
        let policy = EvictionPolicy::S3Fifo;
        let mut r = Rig::new();
        r.m.victims(policy, 0, 0);
        // One key created and deleted over and over leaves a name each time; they do not pile up for ever.
        for _ in 0..20_000 {
            set(&mut r, "churn", SetExpire::Clear);
            r.op(Op::Del { key: key(b"churn") });
            assert!(r.m.names() <= 8192);
        }
        (0..10_000).for_each(|i| set(&mut r, &format!("k{i}"), SetExpire::Clear));
        // Chosen, but the entry is lost: in time they are found again.
        let first: BTreeSet<_> = r.m.victims(policy, u64::MAX, 9000).into_iter().collect();
        let second: BTreeSet<_> = r.m.victims(policy, u64::MAX, 9000).into_iter().collect();
        let again = second.intersection(&first).count();
        assert!(first.len() == 9000 && second.len() == 9000 && again >= 8000, "{again}");
        for db in [None, Some(0)] {
            (0..500).for_each(|i| set(&mut r, &format!("n{i}"), SetExpire::Clear));
            r.op(Op::Flush { db });
            assert_eq!(r.m.victims(policy, u64::MAX, 10), []);
            set(&mut r, "alone", SetExpire::Clear);
            let victims = r.m.victims(policy, 1, 10);
            assert_eq!(victims.iter().map(|v| v.slot).collect::<Vec<_>>(), [slot_of(b"alone")]);
        }
        r.m.forget_victims();
        assert_eq!(r.m.names(), 0);
        assert_eq!(r.m.victims(policy, u64::MAX, 10).len(), 1);
    }

    #[test]
    fn what_has_expired_goes_first_and_asking_for_victims_changes_no_state() {
        let mut r = Rig::new();
        r.m.victims(EvictionPolicy::Lru, 0, 0);
        for i in 0..100 {
            set(&mut r, &format!("k{i}"), if i < 50 { SetExpire::After(10) } else { SetExpire::Clear });
            there(&r.m, &format!("k{i}"));
        }
        let digest = r.m.digest();
        assert!(r.m.victims(EvictionPolicy::Lru, u64::MAX, 0).is_empty());
        r.m.victims(EvictionPolicy::Sieve, 0, 0);
        assert_eq!(r.m.digest(), digest);
        r.m.victims(EvictionPolicy::Lru, 0, 0);
        r.next(&encode_advance(LogTime(T + 10)));
        let victims = r.m.victims(EvictionPolicy::Lru, u64::MAX, 50);
        r.next(&encode_remove(LogTime(T + 10), &victims, true).unwrap());
        assert!(r.m.keys() <= 75, "{}", r.m.keys());
    }

    #[test]
    fn a_key_takes_no_more_than_is_accounted() {
        let mut r = Rig::new();
        r.m.victims(EvictionPolicy::S3Fifo, 0, 0);
        (0..60_000).for_each(|i| set(&mut r, &format!("k{i}"), SetExpire::Clear));
        r.m.victims(EvictionPolicy::S3Fifo, 1, 1);
        let q = r.m.queues().unwrap();
        let blocks = (q.new.blocks.len() + q.kept.blocks.len()) * BLOCK * size_of::<Name>();
        let ghost = size_of_val(&q.ghost.sets[..]);
        let hits = r.m.table().hits_bytes();
        let each = (blocks + ghost + hits) as f64 / 60_000.0;
        // Hits are counted by whole words: a slot with few keys takes more.
        assert!(each < EVICTION_BYTES_PER_KEY as f64 + 2.0, "{each}: {blocks} {ghost} {hits}");
    }
}
