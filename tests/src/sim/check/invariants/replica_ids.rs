//! *A replica id is held by one replica, ever* (raft.md, rule 16): peers know a replica by it, and one that came back with
//! an empty log under the same id would vote twice and deny what it had acknowledged.

use super::{Invariant, Sighting};
use crema_core::{Incarnation, NodeId, ReplicaId, ShardId};
use std::collections::BTreeMap;

type Holder = (NodeId, Incarnation, ShardId);

/// Who holds which id.
#[derive(Default)]
pub(super) struct ReplicaIds(BTreeMap<ReplicaId, Holder>);

impl ReplicaIds {
    fn see(&mut self, id: ReplicaId, holder: Holder, bad: &mut Vec<String>) {
        let first = *self.0.entry(id).or_insert(holder);
        if first != holder {
            bad.push(format!("replica id {id} of {:?} on {:?} was held by {first:?}", holder.2, holder.0));
        }
    }
}

impl Invariant for ReplicaIds {
    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        for g in seen.replicas.iter().filter(|g| g.before.is_none()) {
            self.see(g.state.id, (seen.node, seen.incarnation, g.state.shard), bad);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_in_a_second_life_or_group_is_found() {
        let mut ids = ReplicaIds::default();
        let mut bad = Vec::new();
        let first = (NodeId(1), Incarnation(1), ShardId(0));
        ids.see(ReplicaId(7), first, &mut bad);
        ids.see(ReplicaId(7), first, &mut bad);
        ids.see(ReplicaId(8), (NodeId(1), Incarnation(1), ShardId(1)), &mut bad);
        assert!(bad.is_empty());
        ids.see(ReplicaId(7), (NodeId(1), Incarnation(2), ShardId(0)), &mut bad);
        ids.see(ReplicaId(7), (NodeId(1), Incarnation(1), ShardId(1)), &mut bad);
        assert_eq!(bad.len(), 2);
    }
}
