//! Who leads which shard, as far as this node has heard: a hint for routing, never an authority.
//!
//! ```text
//!   gossip claims ----\
//!   own replicas ------+--> claim: highest term wins --> get_leader / all_leaders
//!   NotLeader replies -/    node_gone: route cleared, term kept
//! ```
//!
//! Claims arrive late, twice and out of order over three ways; Raft's rule that a term has at most one leader is what
//! orders them. Hence a claim in an older term is stale, and a second leader in the same term is a bug somewhere: it is
//! refused and counted.

use crate::keys::is_shard;
use crema_core::{Epoch, NodeId, ShardId, Term};
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is known about one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaderEntry {
    /// The leader; `None` once its node has gone and nobody has claimed a later term.
    pub leader: Option<NodeId>,
    /// The highest term heard of.
    pub term: Term,
    /// The placement epoch of the shard as the leader of that term knows it.
    pub epoch: Epoch,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimOutcome {
    /// The route or its term is new: pass it on.
    Changed,
    /// Nothing new.
    Known,
    /// A later term is known.
    Stale,
    /// The same term has another leader: refused and counted.
    Conflict,
    /// Not a claim that can be true: an unknown shard, term 0 or node 0.
    Invalid,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    entry: LeaderEntry,
    /// The leader of the entry's term, kept when the route is cleared: only that node may fill it again in this term.
    of_term: NodeId,
}

/// Shard to leader; shared by all that route. Holds at most one entry per slot of the ring and one for the meta group.
#[derive(Debug, Default)]
pub struct ShardLeaderTracker {
    shards: DashMap<ShardId, Slot>,
    conflicts: AtomicU64,
}

impl ShardLeaderTracker {
    /// A tracker that knows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes note that `leader` leads `shard` in `term`, at placement `epoch`.
    pub fn claim(&self, shard: ShardId, leader: NodeId, term: Term, epoch: Epoch) -> ClaimOutcome {
        if !is_shard(shard) || term.0 == 0 || leader.0 == 0 {
            return ClaimOutcome::Invalid;
        }
        let claimed = Slot { entry: LeaderEntry { leader: Some(leader), term, epoch }, of_term: leader };
        let mut known = match self.shards.entry(shard) {
            Entry::Vacant(vacant) => {
                vacant.insert(claimed);
                return ClaimOutcome::Changed;
            }
            Entry::Occupied(known) => known,
        };
        let slot = known.get_mut();
        if term < slot.entry.term {
            return ClaimOutcome::Stale;
        }
        if term > slot.entry.term {
            *slot = claimed;
            return ClaimOutcome::Changed;
        }
        if leader != slot.of_term {
            self.conflicts.fetch_add(1, Ordering::Relaxed);
            return ClaimOutcome::Conflict;
        }
        let next = LeaderEntry { leader: Some(leader), term, epoch: epoch.max(slot.entry.epoch) };
        let changed = next != slot.entry;
        slot.entry = next;
        if changed { ClaimOutcome::Changed } else { ClaimOutcome::Known }
    }

    /// The node is dead, has left or begins a new life: routes to it are cleared, their terms kept. Returns the shards that
    /// lost their leader.
    pub fn node_gone(&self, node: NodeId) -> Vec<ShardId> {
        let mut cleared = Vec::new();
        for mut shard in self.shards.iter_mut() {
            if shard.entry.leader == Some(node) {
                shard.entry.leader = None;
                cleared.push(*shard.key());
            }
        }
        cleared
    }

    /// The leader of the shard, if one is known.
    pub fn get_leader(&self, shard: ShardId) -> Option<NodeId> {
        self.entry(shard)?.leader
    }

    /// The known leaders of data shards.
    pub fn all_leaders(&self) -> BTreeMap<ShardId, NodeId> {
        let data = self.shards.iter().filter(|s| !s.key().is_meta());
        data.filter_map(|s| Some((*s.key(), s.entry.leader?))).collect()
    }

    /// What is known about the shard.
    pub fn entry(&self, shard: ShardId) -> Option<LeaderEntry> {
        self.shards.get(&shard).map(|slot| slot.entry)
    }

    /// All that is known, the meta group included; each shard by itself is consistent, the whole is not a snapshot.
    pub fn entries(&self) -> BTreeMap<ShardId, LeaderEntry> {
        self.shards.iter().map(|s| (*s.key(), s.entry)).collect()
    }

    /// Claims that named a second leader for a term, each time they were heard. Should stay 0.
    pub fn conflicts(&self) -> u64 {
        self.conflicts.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    const S: ShardId = ShardId(3);

    fn claim(tracker: &ShardLeaderTracker, leader: u64, term: u64, epoch: u64) -> ClaimOutcome {
        tracker.claim(S, NodeId(leader), Term(term), Epoch(epoch))
    }

    #[test]
    fn the_highest_term_wins_in_any_order() {
        let t = ShardLeaderTracker::new();
        assert_eq!(claim(&t, 1, 5, 9), ClaimOutcome::Changed);
        assert_eq!(claim(&t, 1, 5, 9), ClaimOutcome::Known);
        assert_eq!(claim(&t, 2, 4, 99), ClaimOutcome::Stale);
        assert_eq!(t.get_leader(S), Some(NodeId(1)));
        assert_eq!(claim(&t, 2, 6, 1), ClaimOutcome::Changed);
        assert_eq!(t.entry(S), Some(LeaderEntry { leader: Some(NodeId(2)), term: Term(6), epoch: Epoch(1) }));
        // The same leader learns of a newer placement; an older one changes nothing.
        assert_eq!(claim(&t, 2, 6, 3), ClaimOutcome::Changed);
        assert_eq!(claim(&t, 2, 6, 2), ClaimOutcome::Known);
        assert_eq!(t.entry(S).unwrap().epoch, Epoch(3));
    }

    #[test]
    fn a_second_leader_of_a_term_is_refused_and_counted() {
        let t = ShardLeaderTracker::new();
        claim(&t, 1, 5, 1);
        assert_eq!(claim(&t, 2, 5, 2), ClaimOutcome::Conflict);
        assert_eq!((t.get_leader(S), t.conflicts()), (Some(NodeId(1)), 1));
        // Clearing the route does not make room for another leader of that term.
        t.node_gone(NodeId(1));
        assert_eq!(claim(&t, 2, 5, 2), ClaimOutcome::Conflict);
        assert_eq!((t.get_leader(S), t.conflicts()), (None, 2));
    }

    #[test]
    fn a_gone_node_loses_its_routes_and_keeps_their_terms() {
        let t = ShardLeaderTracker::new();
        claim(&t, 1, 5, 1);
        t.claim(ShardId(4), NodeId(2), Term(1), Epoch(1));
        assert_eq!(t.node_gone(NodeId(1)), [S]);
        assert_eq!(t.node_gone(NodeId(1)), []);
        assert_eq!(t.entry(S), Some(LeaderEntry { leader: None, term: Term(5), epoch: Epoch(1) }));
        assert_eq!(claim(&t, 3, 4, 1), ClaimOutcome::Stale);
        assert_eq!(t.all_leaders(), BTreeMap::from([(ShardId(4), NodeId(2))]));
        // It was not dead after all, and says so in the same term.
        assert_eq!(claim(&t, 1, 5, 1), ClaimOutcome::Changed);
        assert_eq!(t.get_leader(S), Some(NodeId(1)));
    }

    #[test]
    fn the_meta_group_is_tracked_but_not_listed_and_nonsense_is_refused() {
        let t = ShardLeaderTracker::new();
        assert_eq!(t.claim(ShardId::META, NodeId(1), Term(1), Epoch(0)), ClaimOutcome::Changed);
        assert_eq!(t.get_leader(ShardId::META), Some(NodeId(1)));
        assert!(t.all_leaders().is_empty());
        assert_eq!(t.entries().len(), 1);
        assert_eq!(t.claim(ShardId(16_384), NodeId(1), Term(1), Epoch(0)), ClaimOutcome::Invalid);
        assert_eq!(t.claim(S, NodeId(1), Term(0), Epoch(0)), ClaimOutcome::Invalid);
        assert_eq!(t.claim(S, NodeId(0), Term(1), Epoch(0)), ClaimOutcome::Invalid);
    }

    /// True claims, one leader per term, delivered in random order with repetitions and gone nodes in between: terms never
    /// regress, nothing conflicts, and the last term's leader is known at the end.
    #[test]
    fn random_delivery_never_regresses() {
        let mut rng = Rng::from_clock();
        for _ in 0..200 {
            let leaders: Vec<u64> = (0..20).map(|_| 1 + rng.below(5)).collect();
            let t = ShardLeaderTracker::new();
            let mut highest = 0;
            for _ in 0..100 {
                let term = 1 + rng.below(20);
                let before = t.entry(S).map_or(0, |e| e.term.0);
                claim(&t, leaders[term as usize - 1], term, rng.below(9));
                highest = highest.max(term);
                let entry = t.entry(S).unwrap();
                assert!(entry.term.0 >= before);
                assert_eq!(entry.term.0, highest);
                if term == highest {
                    assert_eq!(entry.leader, Some(NodeId(leaders[highest as usize - 1])));
                }
                if rng.below(10) == 0 {
                    let gone = NodeId(1 + rng.below(5));
                    t.node_gone(gone);
                    assert_ne!(t.get_leader(S), Some(gone));
                }
            }
            assert_eq!(t.conflicts(), 0);
        }
    }
}
