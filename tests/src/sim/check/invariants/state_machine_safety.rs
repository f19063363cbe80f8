//! *State machine safety*: replicas that applied up to the same index have the same state (Raft, section 5.4.3), by the
//! digest of the state.

use super::{Invariant, Sighting};
use crema_core::{NodeId, ShardId};
use std::collections::BTreeMap;

/// By group and applied index: the digest, and who had it first.
#[derive(Default)]
pub(super) struct StateMachineSafety(BTreeMap<(ShardId, u64), (u64, NodeId)>);

impl StateMachineSafety {
    fn see(&mut self, shard: ShardId, node: NodeId, applied: u64, digest: u64, bad: &mut Vec<String>) {
        let (first, by) = *self.0.entry((shard, applied)).or_insert((digest, node));
        if first != digest {
            bad.push(format!("{shard:?} at index {applied}: digest {first:x} on {by:?}, {digest:x} on {node:?}"));
        }
    }
}

impl Invariant for StateMachineSafety {
    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        for g in seen.replicas {
            // With `whole` unmoved ones too: nothing but an entry may change a state.
            if seen.whole || g.before.is_none_or(|b| b.applied != g.state.applied) {
                self.see(g.state.shard, seen.node, g.state.applied, g.replica.digest(), bad);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_digest_at_the_same_index_is_found() {
        let mut s = StateMachineSafety::default();
        let mut bad = Vec::new();
        let mut see = |shard, node, applied, digest| {
            s.see(ShardId(shard), NodeId(node), applied, digest, &mut bad);
            bad.len()
        };
        assert_eq!(see(0, 1, 5, 0xa), 0);
        assert_eq!(see(0, 2, 5, 0xa), 0);
        assert_eq!(see(0, 2, 6, 0xb), 0, "another index");
        assert_eq!(see(1, 2, 5, 0xc), 0, "another group");
        assert_eq!(see(0, 3, 5, 0xb), 1);
        assert_eq!(see(0, 2, 6, 0xa), 2, "it changed without an entry");
    }
}
