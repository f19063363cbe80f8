//! *Election safety*: at most one leader a term and group (Raft, section 5.2 and figure 3).
//!
//! Seen in what replicas say of themselves, and in their messages: a leadership that begins and ends within one step
//! shows only there.

use super::{Invariant, Sighting};
use crema_core::{Incarnation, NodeId, ReplicaId, ShardId};
use crema_shard::Host;
use crema_shard::message::{Body, Envelope};
use raft::eraftpb::MessageType;
use std::collections::BTreeMap;

/// The leader of each (group, term), by its id: a new life of a node is another replica.
#[derive(Default)]
pub(super) struct ElectionSafety(BTreeMap<(ShardId, u64), (ReplicaId, NodeId)>);

impl ElectionSafety {
    fn see(&mut self, shard: ShardId, term: u64, (id, node): (ReplicaId, NodeId), bad: &mut Vec<String>) {
        let (leader, at) = *self.0.entry((shard, term)).or_insert((id, node));
        if leader != id {
            bad.push(format!("{shard:?} has two leaders in term {term}: {leader} on {at:?} and {id} on {node:?}"));
        }
    }
}

impl Invariant for ElectionSafety {
    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        for g in seen.replicas.iter().filter(|g| g.elected()) {
            self.see(g.state.shard, g.state.term, (g.state.id, seen.node), bad);
        }
    }

    fn sent(&mut self, from: NodeId, _: Incarnation, _: NodeId, envelope: &Envelope, _: &Host, bad: &mut Vec<String>) {
        match &envelope.body {
            // Only a leader sends these.
            Body::Raft(m) if matches!(m.msg_type, MessageType::MsgAppend | MessageType::MsgHeartbeat) => {
                self.see(envelope.shard, m.term, (ReplicaId(m.from), from), bad);
            }
            Body::Sleep { from: id, term, ok: false, .. } => self.see(envelope.shard, term.0, (*id, from), bad),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_leader_of_a_term_is_found() {
        let mut leaders = ElectionSafety::default();
        let mut bad = Vec::new();
        let mut see = |shard, term, id: u64, node| {
            leaders.see(ShardId(shard), term, (ReplicaId(id), NodeId(node)), &mut bad);
            bad.len()
        };
        assert_eq!(see(0, 2, 11, 1), 0);
        assert_eq!(see(0, 2, 11, 1), 0, "the same one");
        assert_eq!(see(0, 3, 12, 2), 0, "another term");
        assert_eq!(see(1, 2, 22, 2), 0, "another group");
        assert_eq!(see(0, 2, 12, 2), 1);
        assert_eq!(see(0, 3, 14, 2), 2, "another life of the same node");
    }
}
