//! *Who votes is kept*: a node gives a replica up only when the newest members of its group do without it, or when the group
//! was founded anew. Placement speaks of intent; a vote that vanishes with its log is a vote that was given twice, or a
//! write that nobody has any more.

use super::{Invariant, Sighting};
use crema_core::{Incarnation, NodeId, ReplicaId, ShardId};
use crema_shard::members::Members;
use std::collections::BTreeMap;

/// The newest members of each group, and what each life of a node holds.
#[derive(Default)]
pub(super) struct Gone {
    newest: BTreeMap<ShardId, (u64, Members)>,
    held: BTreeMap<(NodeId, Incarnation), BTreeMap<ShardId, ReplicaId>>,
}

impl Gone {
    fn see(&mut self, shard: ShardId, applied: u64, members: &Members) {
        let known = self.newest.entry(shard).or_insert_with(|| (applied, members.clone()));
        if applied > known.0 {
            *known = (applied, members.clone());
        }
    }

    fn gave_up(&self, node: NodeId, shard: ShardId, id: ReplicaId, bad: &mut Vec<String>) {
        if let Some((at, members)) = self.newest.get(&shard).filter(|(_, m)| m.is_voter(id)) {
            bad.push(format!(
                "{node:?} gave up its replica {id} of {shard:?}, which votes as of index {at}: {members:?}"
            ));
        }
    }
}

impl Invariant for Gone {
    /// What a process held is forgotten: the one after it may have lost its disk, or stand before the table that it had
    /// taken in. [`super::votes`] and [`super::durable`] watch what a life may forget.
    fn restarted(&mut self, node: NodeId, incarnation: Incarnation) {
        self.held.remove(&(node, incarnation));
    }

    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        for g in seen.replicas.iter().filter(|g| g.before.is_none_or(|b| b.applied != g.state.applied)) {
            self.see(g.state.shard, g.state.applied, g.replica.members());
        }
        let mut held = self.held.remove(&(seen.node, seen.incarnation)).unwrap_or_default();
        let refounded = |shard: ShardId, id: ReplicaId| {
            let Some(state) = seen.host.meta_state() else { return false };
            // A table of the next generation puts another meta group in the place of this one, whoever votes there.
            let superseded = shard.is_meta() && u64::from(state.generation) > id.0 >> 32;
            superseded || state.refounded(shard).is_some_and(|b| id < b.founder)
        };
        held.retain(|shard, id| {
            let here = seen.host.coordinator().replica(*shard).is_some_and(|r| r.id() == *id);
            if !here && !refounded(*shard, *id) {
                self.gave_up(seen.node, *shard, *id, bad);
            }
            here
        });
        held.extend(seen.replicas.iter().map(|g| (g.state.shard, g.state.id)));
        self.held.insert((seen.node, seen.incarnation), held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::Epoch;
    use crema_shard::members::Member;

    #[test]
    fn a_voter_that_is_given_up_is_found() {
        let member = |id| Member { id: ReplicaId(id), node: NodeId(id), incarnation: Incarnation(1) };
        let members = |ids: &[u64]| Members {
            voters: ids.iter().map(|n| member(*n)).collect(),
            epoch: Epoch(1),
            ..Members::default()
        };
        let mut gone = Gone::default();
        let mut bad = Vec::new();
        gone.see(ShardId(0), 5, &members(&[1, 2, 3]));
        gone.see(ShardId(0), 9, &members(&[1, 2]));
        gone.see(ShardId(0), 7, &members(&[1, 2, 3]));
        gone.gave_up(NodeId(3), ShardId(0), ReplicaId(3), &mut bad);
        assert!(bad.is_empty());
        gone.gave_up(NodeId(2), ShardId(0), ReplicaId(2), &mut bad);
        assert_eq!(bad.len(), 1);
    }
}
