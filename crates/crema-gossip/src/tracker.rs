//! Who leads which shard, as far as this node has heard: a hint for routing, never an authority.
//!
//! ```text
//!   gossip claims --claim: highest term wins--> heard --\
//!                                                        +--> the higher term --> get_leader / all_leaders
//!   own replicas --lead--> own -------------------------/
//!   node_gone: what it claimed counts no more
//! ```
//!
//! Claims arrive late, twice and out of order; Raft's rule that a term has at most one leader is what orders them. Hence a
//! claim in an older term is stale, and a second leader in the same term is a bug somewhere: it is refused and counted.
//!
//! What is heard may be untrue. A made-up term outranks every true one, but only for as long as who made it up is a member:
//! the service reads all claims again every few seconds. And what this node's own Raft says is true: an own leadership displaces
//! what was heard before, whatever its term, and that is not believed again.

use crate::keys::is_shard;
use crema_core::{Epoch, NodeId, ShardId, Term};
use dashmap::DashMap;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is known about one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaderEntry {
    /// The leader; `None` once its node has gone and no other member claims the shard. Where this node has led it, its last
    /// leadership shows then, which may be over.
    pub leader: Option<NodeId>,
    /// The term of the claim.
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
    /// A later term is known, or an own leadership has shown that the claim is untrue.
    Stale,
    /// The same term has another leader: refused and counted.
    Conflict,
    /// Not a claim that can be true: an unknown shard, term 0 or node 0.
    Invalid,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The latest leadership of this node.
    own: Option<LeaderEntry>,
    /// A later claim of another node.
    heard: Option<LeaderEntry>,
    /// The claim that an own leadership has displaced although its term is higher.
    refuted: Option<(NodeId, Term)>,
}

impl Slot {
    fn entry(&self) -> Option<LeaderEntry> {
        self.heard.or(self.own)
    }
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

    /// Takes note that `leader` leads `shard` in `term`, at placement `epoch`, as it says.
    pub fn claim(&self, shard: ShardId, leader: NodeId, term: Term, epoch: Epoch) -> ClaimOutcome {
        if !is_shard(shard) || term.0 == 0 || leader.0 == 0 {
            return ClaimOutcome::Invalid;
        }
        let mut slot = self.shards.entry(shard).or_default();
        if slot.refuted == Some((leader, term)) {
            return ClaimOutcome::Stale;
        }
        let claimed = LeaderEntry { leader: Some(leader), term, epoch };
        let Some(known) = slot.entry() else {
            slot.heard = Some(claimed);
            return ClaimOutcome::Changed;
        };
        let Some(of_term) = known.leader else {
            // Who vouched for that term has gone.
            slot.heard = Some(claimed);
            return ClaimOutcome::Changed;
        };
        if term < known.term {
            return ClaimOutcome::Stale;
        }
        if term > known.term {
            slot.heard = Some(claimed);
            return ClaimOutcome::Changed;
        }
        if leader != of_term {
            self.conflicts.fetch_add(1, Ordering::Relaxed);
            return ClaimOutcome::Conflict;
        }
        let next = LeaderEntry { epoch: epoch.max(known.epoch), ..known };
        if next == known {
            return ClaimOutcome::Known;
        }
        let Slot { own, heard, .. } = &mut *slot;
        *heard.as_mut().or(own.as_mut()).expect("an entry is one of them") = next;
        ClaimOutcome::Changed
    }

    /// Takes note that this node leads `shard` in `term`, by the word of its own Raft. Displaces what was heard, whatever its
    /// term.
    pub fn lead(&self, shard: ShardId, this: NodeId, term: Term, epoch: Epoch) -> ClaimOutcome {
        if !is_shard(shard) || term.0 == 0 || this.0 == 0 {
            return ClaimOutcome::Invalid;
        }
        let mut slot = self.shards.entry(shard).or_default();
        if slot.own.is_some_and(|own| (own.term, own.epoch) > (term, epoch)) {
            return ClaimOutcome::Stale;
        }
        let before = slot.entry();
        let untrue = slot.heard.filter(|heard| heard.term > term).and_then(|heard| Some((heard.leader?, heard.term)));
        slot.refuted = untrue.or(slot.refuted);
        slot.heard = None;
        slot.own = Some(LeaderEntry { leader: Some(this), term, epoch });
        if slot.entry() == before { ClaimOutcome::Known } else { ClaimOutcome::Changed }
    }

    /// The node is dead, has left or begins a new life: what it claimed counts no more. Returns the shards that lost their
    /// leader; claims of other members for these, of whatever term, count again when they are heard again.
    pub fn node_gone(&self, node: NodeId) -> Vec<ShardId> {
        let mut cleared = Vec::new();
        for mut shard in self.shards.iter_mut() {
            let slot = shard.value_mut();
            slot.refuted.take_if(|(claimant, _)| *claimant == node);
            if let Some(heard) = slot.heard.as_mut().filter(|heard| heard.leader == Some(node)) {
                heard.leader = None;
                if slot.own.is_some() {
                    slot.heard = None;
                }
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
        data.filter_map(|s| Some((*s.key(), s.entry()?.leader?))).collect()
    }

    /// What is known about the shard.
    pub fn entry(&self, shard: ShardId) -> Option<LeaderEntry> {
        self.shards.get(&shard)?.entry()
    }

    /// All that is known, the meta group included; each shard by itself is consistent, the whole is not a snapshot.
    pub fn entries(&self) -> BTreeMap<ShardId, LeaderEntry> {
        self.shards.iter().filter_map(|s| Some((*s.key(), s.entry()?))).collect()
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
        // One of them is wrong, and who is left is not known to be.
        t.node_gone(NodeId(1));
        assert_eq!(claim(&t, 2, 5, 2), ClaimOutcome::Changed);
        assert_eq!((t.get_leader(S), t.conflicts()), (Some(NodeId(2)), 1));
    }

    #[test]
    fn an_own_leadership_displaces_what_was_heard_and_that_is_not_believed_again() {
        let t = ShardLeaderTracker::new();
        let lead = |term, epoch| t.lead(S, NodeId(1), Term(term), Epoch(epoch));
        assert_eq!(claim(&t, 9, 1_000_000, 1), ClaimOutcome::Changed);
        assert_eq!(lead(5, 1), ClaimOutcome::Changed);
        assert_eq!(t.entry(S), Some(LeaderEntry { leader: Some(NodeId(1)), term: Term(5), epoch: Epoch(1) }));
        assert_eq!(claim(&t, 9, 1_000_000, 1), ClaimOutcome::Stale, "the same lie");
        assert_eq!(lead(5, 1), ClaimOutcome::Known);
        assert_eq!((lead(4, 9), lead(5, 0)), (ClaimOutcome::Stale, ClaimOutcome::Stale));
        assert_eq!(lead(5, 2), ClaimOutcome::Changed);
        // The truth is heard as ever: this node is followed, and leads again.
        assert_eq!(claim(&t, 2, 5, 1), ClaimOutcome::Conflict);
        assert_eq!(claim(&t, 2, 6, 1), ClaimOutcome::Changed);
        assert_eq!(t.get_leader(S), Some(NodeId(2)));
        assert_eq!(lead(7, 1), ClaimOutcome::Changed);
        assert_eq!(claim(&t, 2, 6, 1), ClaimOutcome::Stale);
        // It may be true of a later life of that node.
        assert_eq!(t.node_gone(NodeId(9)), []);
        assert_eq!(claim(&t, 9, 1_000_000, 1), ClaimOutcome::Changed);
        // What it claimed goes with it, the own leadership stays.
        assert_eq!(t.node_gone(NodeId(9)), [S]);
        assert_eq!((t.get_leader(S), t.entry(S).unwrap().term), (Some(NodeId(1)), Term(7)));
        assert_eq!(t.lead(ShardId(16_384), NodeId(1), Term(1), Epoch(0)), ClaimOutcome::Invalid);
        assert_eq!((lead(0, 1), t.conflicts()), (ClaimOutcome::Invalid, 1));
    }

    #[test]
    fn what_a_node_claimed_does_not_outlive_it() {
        let t = ShardLeaderTracker::new();
        claim(&t, 1, 5, 1);
        t.claim(ShardId(4), NodeId(2), Term(1), Epoch(1));
        assert_eq!(t.node_gone(NodeId(1)), [S]);
        assert_eq!(t.node_gone(NodeId(1)), []);
        assert_eq!(t.entry(S), Some(LeaderEntry { leader: None, term: Term(5), epoch: Epoch(1) }));
        assert_eq!(t.all_leaders(), BTreeMap::from([(ShardId(4), NodeId(2))]));
        // It was not dead after all, and says so in the same term.
        assert_eq!(claim(&t, 1, 5, 1), ClaimOutcome::Changed);
        assert_eq!(t.get_leader(S), Some(NodeId(1)));
        // Whoever claims the shard still is believed, however high the term that is gone.
        t.node_gone(NodeId(1));
        assert_eq!(claim(&t, 3, 4, 1), ClaimOutcome::Changed);
        assert_eq!(t.entry(S), Some(LeaderEntry { leader: Some(NodeId(3)), term: Term(4), epoch: Epoch(1) }));
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
    /// regress while their leader is there, nothing conflicts, and the leader of the highest term is known.
    #[test]
    fn random_delivery_never_regresses() {
        let mut rng = Rng::from_clock();
        for _ in 0..200 {
            let leaders: Vec<u64> = (0..20).map(|_| 1 + rng.below(5)).collect();
            let t = ShardLeaderTracker::new();
            let mut highest = 0;
            for _ in 0..100 {
                let term = 1 + rng.below(20);
                claim(&t, leaders[term as usize - 1], term, rng.below(9));
                highest = highest.max(term);
                let entry = t.entry(S).unwrap();
                assert_eq!(entry.term.0, highest);
                assert_eq!(entry.leader, Some(NodeId(leaders[highest as usize - 1])));
                if rng.below(10) == 0 {
                    let gone = NodeId(1 + rng.below(5));
                    t.node_gone(gone);
                    assert_ne!(t.get_leader(S), Some(gone));
                    if t.get_leader(S).is_none() {
                        highest = 0;
                    }
                }
            }
            assert_eq!(t.conflicts(), 0);
        }
    }
}
