//! *Members come from the log*: at equal applied index every replica of a group names the same members, a leader is a voter
//! of them, and no node has two voters (Raft, section 6; Ongaro 2014, section 4).

use super::{Invariant, Sighting};
use crema_core::{NodeId, ShardId};
use crema_shard::members::Members;
use std::collections::BTreeMap;

/// By group and applied index: the members, and who named them first.
#[derive(Default)]
pub(super) struct Membership(BTreeMap<(ShardId, u64), (Members, NodeId)>);

impl Membership {
    fn see(&mut self, shard: ShardId, node: NodeId, applied: u64, members: &Members, bad: &mut Vec<String>) {
        let (first, by) = self.0.entry((shard, applied)).or_insert_with(|| (members.clone(), node));
        if first != members {
            bad.push(format!("{shard:?} at index {applied}: members {first:?} on {by:?}, {members:?} on {node:?}"));
        }
        let mut nodes: Vec<NodeId> = members.voters.iter().map(|v| v.node).collect();
        nodes.sort_unstable();
        if nodes.windows(2).any(|w| w[0] == w[1]) {
            bad.push(format!("{shard:?} at index {applied}: two voters on one node: {members:?}"));
        }
    }
}

impl Invariant for Membership {
    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        for g in seen.replicas {
            if g.before.is_none_or(|b| b.applied != g.state.applied) {
                self.see(g.state.shard, seen.node, g.state.applied, g.replica.members(), bad);
            }
            if g.state.leads && !g.replica.members().is_voter(g.state.id) {
                bad.push(format!("{:?}: {:?} leads without a vote", g.state.shard, seen.node));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::{Epoch, Incarnation, ReplicaId};
    use crema_shard::members::Member;

    #[test]
    fn members_that_differ_and_two_voters_of_a_node_are_found() {
        let member = |id, node| Member { id: ReplicaId(id), node: NodeId(node), incarnation: Incarnation(1) };
        let two = Members { voters: vec![member(1, 1), member(2, 2)], epoch: Epoch(1), ..Members::default() };
        let mut m = Membership::default();
        let mut bad = Vec::new();
        m.see(ShardId(0), NodeId(1), 5, &two, &mut bad);
        m.see(ShardId(0), NodeId(2), 5, &two, &mut bad);
        assert!(bad.is_empty());
        let one = Members { voters: vec![member(1, 1)], ..two.clone() };
        m.see(ShardId(0), NodeId(2), 5, &one, &mut bad);
        assert_eq!(bad.len(), 1);
        let twice = Members { voters: vec![member(1, 1), member(2, 1)], ..two };
        m.see(ShardId(0), NodeId(2), 6, &twice, &mut bad);
        assert_eq!(bad.len(), 2);
    }
}
