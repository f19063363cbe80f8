//! One vote a term and replica, and none by a replica that has lost state (Raft, section 5.2; rule 6 and 17 of hosting:
//! a wiped node is another voter).

use super::Invariant;
use crema_core::{Incarnation, NodeId, ShardId};
use crema_shard::Host;
use crema_shard::message::{Body, Envelope};
use raft::eraftpb::MessageType;
use std::collections::BTreeMap;

/// See the module.
#[derive(Default)]
pub(super) struct Votes {
    /// By (group, replica, term): whom it voted for.
    votes: BTreeMap<(ShardId, u64, u64), u64>,
    /// By replica: the life that speaks for it.
    voices: BTreeMap<u64, Incarnation>,
}

impl Invariant for Votes {
    fn sent(
        &mut self,
        from: NodeId,
        incarnation: Incarnation,
        _to: NodeId,
        envelope: &Envelope,
        _host: &Host,
        bad: &mut Vec<String>,
    ) {
        let Body::Raft(m) = &envelope.body else { return };
        let vote = m.msg_type == MessageType::MsgRequestVoteResponse;
        if m.reject || !(vote || m.msg_type == MessageType::MsgAppendResponse) {
            return;
        }
        let voice = *self.voices.entry(m.from).or_insert(incarnation);
        if voice != incarnation {
            bad.push(format!(
                "{:?}: {from:?} speaks for replica {} in a life that lost its state",
                envelope.shard, m.from
            ));
        }
        if vote {
            let first = *self.votes.entry((envelope.shard, m.from, m.term)).or_insert(m.to);
            if first != m.to {
                bad.push(format!(
                    "{:?}: replica {} on {from:?} votes for {first} and {} in term {}",
                    envelope.shard, m.from, m.to, m.term
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::world::{Options, World};
    use raft::eraftpb::Message;

    fn vote(votes: &mut Votes, host: &Host, life: u128, to: u64, term: u64) -> usize {
        let m = Message { msg_type: MessageType::MsgRequestVoteResponse, from: 9, to, term, ..Message::default() };
        let e = Envelope { shard: ShardId(0), log_time: 0, floor: 0, body: Body::Raft(m) };
        let mut bad = Vec::new();
        votes.sent(NodeId(1), Incarnation(life), NodeId(2), &e, host, &mut bad);
        bad.len()
    }

    #[test]
    fn a_second_vote_and_a_vote_of_another_life_are_found() {
        let world = World::new(Options::default());
        let host = world.host(NodeId(1)).unwrap();
        let mut v = Votes::default();
        assert_eq!(vote(&mut v, host, 1, 5, 2), 0);
        assert_eq!(vote(&mut v, host, 1, 5, 2), 0, "the same vote again");
        assert_eq!(vote(&mut v, host, 1, 6, 3), 0);
        assert_eq!(vote(&mut v, host, 1, 6, 2), 1, "two candidates of one term");
        assert_eq!(vote(&mut v, host, 2, 6, 4), 1, "another life");
    }
}
