//! Who belongs to a group: the members that its log has made, and the steps by which a leader changes them.
//!
//! ```text
//!   placement: intent --leader compares--> ConfStep --entry, one at a time--> applied: Members (fact)
//!   a replica that is lost:   Remove(old)  ->  AddLearner(new)  ->  catch-up  ->  Promote(new)
//! ```
//!
//! A step changes one member, so that majorities before and after it overlap (Ongaro 2014, section 4.1). It carries the
//! node and life of whom it adds: the group's log alone tells its members where the others are, whatever placement or
//! gossip believe. It carries the placement epoch too; an older one than applied last is refused, everywhere alike.

use crate::meta::{MAX_REPLICAS, ReplicaPlacement};
use crema_core::{CodecError, Epoch, Incarnation, NodeId, ReplicaId};
use raft::eraftpb::{ConfChange, ConfChangeType, ConfState};
use serde::{Deserialize, Serialize};

/// First byte of an encoded step or of encoded members.
const VERSION: u8 = 1;
/// Most voters and most learners that are believed of a peer: replicas of one placement, and of the one before it.
const MAX_MEMBERS: usize = 2 * MAX_REPLICAS;

/// A replica of the group and where it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its replica id.
    pub id: ReplicaId,
    /// Its node.
    pub node: NodeId,
    /// The life of the node that holds it.
    pub incarnation: Incarnation,
}

impl From<&ReplicaPlacement> for Member {
    fn from(r: &ReplicaPlacement) -> Self {
        Member { id: r.id, node: r.node, incarnation: r.incarnation }
    }
}

/// The members of a group as of an applied index; both lists ascend by id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// Those whose votes and acknowledgements count.
    pub voters: Vec<Member>,
    /// Those that are being filled.
    pub learners: Vec<Member>,
    /// Placement epoch of the last step.
    pub epoch: Epoch,
}

/// One change of the members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConfChangeKind {
    /// A new replica gets the log but has no vote.
    AddLearner(Member),
    /// A learner becomes a voter.
    Promote(ReplicaId),
    /// A member goes.
    Remove(ReplicaId),
}

/// What an entry of the log says about members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfStep {
    /// The change.
    pub change: ConfChangeKind,
    /// The placement that wants it.
    pub epoch: Epoch,
}

impl ConfStep {
    /// The step as an entry's context. raft-rs wants protobuf in an entry's data, which never comes from the network.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![VERSION]).expect("derived serializers of plain data do not fail")
    }

    /// Reads what [`ConfStep::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<ConfStep, CodecError> {
        decode(bytes)
    }

    /// The step as raft-rs takes it.
    pub fn to_raft(self) -> ConfChange {
        let (kind, id) = match self.change {
            ConfChangeKind::AddLearner(member) => (ConfChangeType::AddLearnerNode, member.id),
            ConfChangeKind::Promote(id) => (ConfChangeType::AddNode, id),
            ConfChangeKind::Remove(id) => (ConfChangeType::RemoveNode, id),
        };
        ConfChange { change_type: kind, node_id: id.0, ..ConfChange::default() }
    }
}

impl Members {
    /// The members of a newly founded group.
    pub fn founded(replicas: &[ReplicaPlacement], epoch: Epoch) -> Self {
        let mut voters: Vec<Member> = replicas.iter().map(Member::from).collect();
        voters.sort_by_key(|v| v.id);
        Members { voters, learners: Vec::new(), epoch }
    }

    /// A member by its id.
    pub fn get(&self, id: ReplicaId) -> Option<Member> {
        self.all().find(|m| m.id == id).copied()
    }

    /// Voters, then learners.
    pub fn all(&self) -> impl Iterator<Item = &Member> {
        self.voters.iter().chain(&self.learners)
    }

    /// Whether `id` has a vote.
    pub fn is_voter(&self, id: ReplicaId) -> bool {
        self.voters.iter().any(|v| v.id == id)
    }

    /// Why a step is refused, by the members alone and so on every replica alike; `None` if it may be applied.
    pub fn objection(&self, step: &ConfStep) -> Option<&'static str> {
        if step.epoch < self.epoch {
            return Some("an older placement");
        }
        let learner = |id| self.learners.iter().any(|l| l.id == id);
        match step.change {
            ConfChangeKind::AddLearner(m) if self.get(m.id).is_some() => Some("a member already"),
            // An id below one of ours was given before it: it has been a member, or was passed over. Never again.
            ConfChangeKind::AddLearner(m) if self.all().any(|o| o.id >= m.id && o.node == m.node) => Some("an old id"),
            ConfChangeKind::AddLearner(_) if self.all().count() >= MAX_MEMBERS => Some("too many members"),
            ConfChangeKind::Promote(id) if !learner(id) => Some("no learner"),
            ConfChangeKind::Remove(id) if self.get(id).is_none() => Some("no member"),
            ConfChangeKind::Remove(id) if self.voters.len() == 1 && self.is_voter(id) => Some("the last voter"),
            _ => None,
        }
    }

    /// Takes a step that has no [`Members::objection`].
    pub fn apply(&mut self, step: &ConfStep) {
        self.epoch = step.epoch;
        match step.change {
            ConfChangeKind::AddLearner(member) => self.learners.push(member),
            ConfChangeKind::Promote(id) => {
                if let Some(at) = self.learners.iter().position(|l| l.id == id) {
                    let member = self.learners.remove(at);
                    self.voters.push(member);
                }
            }
            ConfChangeKind::Remove(id) => {
                self.voters.retain(|v| v.id != id);
                self.learners.retain(|l| l.id != id);
            }
        }
        self.voters.sort_by_key(|v| v.id);
        self.learners.sort_by_key(|l| l.id);
    }

    /// As raft-rs keeps it.
    pub fn to_raft(&self) -> ConfState {
        ConfState {
            voters: self.voters.iter().map(|v| v.id.0).collect(),
            learners: self.learners.iter().map(|l| l.id.0).collect(),
            ..ConfState::default()
        }
    }

    /// As bytes: a version, then postcard.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![VERSION]).expect("derived serializers of plain data do not fail")
    }

    /// Reads what [`Members::encode`] wrote. The lists ascend, no id occurs twice, and there is a voter.
    pub fn decode(bytes: &[u8]) -> Result<Members, CodecError> {
        let members: Members = decode(bytes)?;
        let ascend = |list: &[Member]| list.windows(2).all(|w| w[0].id < w[1].id);
        let twice = members.learners.iter().any(|l| members.is_voter(l.id));
        let many = members.voters.len() > MAX_MEMBERS || members.learners.len() > MAX_MEMBERS;
        let zero = members.all().any(|m| m.id.0 == 0);
        if members.voters.is_empty() || many || twice || zero || !ascend(&members.voters) || !ascend(&members.learners)
        {
            return Err(CodecError::Malformed);
        }
        Ok(members)
    }

    /// The next step from these members, the fact, towards `wanted`, the intent of placement `epoch`; `None` if they agree
    /// or the step has to wait. Whoever is lost goes first, since it counts for the majority; then new ones come, one
    /// at a time; `caught_up` says whether a learner has all but the last of the log.
    pub fn next_step(
        &self,
        wanted: &[ReplicaPlacement],
        epoch: Epoch,
        caught_up: impl Fn(ReplicaId) -> bool,
    ) -> Option<ConfStep> {
        let is_wanted = |m: &&Member| wanted.iter().any(|w| w.id == m.id);
        let step = |change| Some(ConfStep { change, epoch });
        // A newer life of the same node takes its place: the old one's memory is gone.
        let replaced = |m: &&Member| wanted.iter().any(|w| w.node == m.node && w.id != m.id);
        if let Some(gone) = self.all().find(|m| !is_wanted(m) && replaced(m)) {
            return step(ConfChangeKind::Remove(gone.id));
        }
        if let Some(learner) = self.learners.iter().find(|l| is_wanted(l) && caught_up(l.id)) {
            return step(ConfChangeKind::Promote(learner.id));
        }
        let new = wanted.iter().filter(|w| self.get(w.id).is_none()).min_by_key(|w| w.id);
        if let Some(new) = new {
            return step(ConfChangeKind::AddLearner(Member::from(new)));
        }
        None
    }
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, CodecError> {
    match bytes {
        [] => Err(CodecError::Malformed),
        [VERSION, rest @ ..] => match postcard::take_from_bytes(rest) {
            Ok((value, [])) => Ok(value),
            _ => Err(CodecError::Malformed),
        },
        [version, ..] => Err(CodecError::UnknownVersion(*version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(id: u64, node: u64, life: u128) -> ReplicaPlacement {
        ReplicaPlacement { id: ReplicaId(id), node: NodeId(node), incarnation: Incarnation(life) }
    }

    fn trio() -> Vec<ReplicaPlacement> {
        vec![placed(1, 1, 1), placed(2, 2, 1), placed(3, 3, 1)]
    }

    /// Steps until nothing is left to do; every learner catches up at once.
    fn settle(members: &mut Members, wanted: &[ReplicaPlacement], epoch: Epoch) -> Vec<ConfChangeKind> {
        let mut steps = Vec::new();
        while let Some(step) = members.next_step(wanted, epoch, |_| true) {
            assert_eq!(members.objection(&step), None, "{step:?}");
            members.apply(&step);
            steps.push(step.change);
            assert!(steps.len() < 20, "{steps:?}");
        }
        steps
    }

    #[test]
    fn a_lost_replica_is_removed_before_its_successor_comes() {
        let mut m = Members::founded(&trio(), Epoch(1));
        let wanted = [placed(1, 1, 1), placed(9, 2, 2), placed(3, 3, 1)];
        let steps = settle(&mut m, &wanted, Epoch(2));
        let new = Member::from(&wanted[1]);
        assert_eq!(
            steps,
            [
                ConfChangeKind::Remove(ReplicaId(2)),
                ConfChangeKind::AddLearner(new),
                ConfChangeKind::Promote(ReplicaId(9))
            ]
        );
        assert_eq!((m.voters.len(), m.learners.len(), m.epoch), (3, 0, Epoch(2)));
        assert_eq!(Members::decode(&m.encode()), Ok(m));
    }

    #[test]
    fn a_successor_that_is_lost_too_begins_again() {
        for caught_up in [false, true] {
            let mut m = Members::founded(&trio(), Epoch(1));
            let first = [placed(1, 1, 1), placed(9, 2, 2), placed(3, 3, 1)];
            for _ in 0..3 {
                if let Some(step) = m.next_step(&first, Epoch(2), |_| caught_up) {
                    m.apply(&step);
                }
            }
            assert_eq!(m.is_voter(ReplicaId(9)), caught_up);
            let second = [placed(1, 1, 1), placed(12, 2, 3), placed(3, 3, 1)];
            let steps = settle(&mut m, &second, Epoch(3));
            assert_eq!(steps[0], ConfChangeKind::Remove(ReplicaId(9)));
            assert_eq!(m.voters.iter().map(|v| v.id.0).collect::<Vec<_>>(), [1, 3, 12]);
        }
    }

    #[test]
    fn a_learner_waits_until_it_has_caught_up() {
        let mut m = Members::founded(&trio()[..2], Epoch(1));
        let step = m.next_step(&trio(), Epoch(1), |_| false).unwrap();
        m.apply(&step);
        assert_eq!(m.learners.len(), 1);
        assert_eq!(m.next_step(&trio(), Epoch(1), |_| false), None);
        assert!(m.next_step(&trio(), Epoch(1), |_| true).is_some());
    }

    #[test]
    fn what_does_not_fit_is_refused_everywhere_alike() {
        let m = Members { epoch: Epoch(5), ..Members::founded(&trio(), Epoch(5)) };
        let no = |change, epoch| m.objection(&ConfStep { change, epoch: Epoch(epoch) }).is_some();
        let member = |id, node| Member { id: ReplicaId(id), node: NodeId(node), incarnation: Incarnation(9) };
        assert!(no(ConfChangeKind::Remove(ReplicaId(1)), 4), "an older placement");
        assert!(!no(ConfChangeKind::Remove(ReplicaId(1)), 5));
        assert!(no(ConfChangeKind::Remove(ReplicaId(7)), 5));
        assert!(no(ConfChangeKind::Promote(ReplicaId(1)), 5), "a voter already");
        assert!(no(ConfChangeKind::AddLearner(member(2, 2)), 5));
        assert!(no(ConfChangeKind::AddLearner(member(1, 3)), 5));
        assert!(!no(ConfChangeKind::AddLearner(member(8, 3)), 6));
        let one = Members::founded(&trio()[..1], Epoch(1));
        let last = ConfStep { change: ConfChangeKind::Remove(ReplicaId(1)), epoch: Epoch(1) };
        assert!(one.objection(&last).is_some());
    }

    #[test]
    fn nonsense_is_not_decoded() {
        let m = Members::founded(&trio(), Epoch(1));
        let twice = Members { learners: m.voters.clone(), ..m.clone() };
        let mixed = Members { voters: m.voters.iter().rev().copied().collect(), ..m.clone() };
        for bad in [twice, mixed, Members::default()] {
            assert_eq!(Members::decode(&bad.encode()), Err(CodecError::Malformed));
        }
        let bytes = m.encode();
        for cut in 0..bytes.len() {
            assert!(Members::decode(&bytes[..cut]).is_err());
        }
        let step = ConfStep { change: ConfChangeKind::Promote(ReplicaId(4)), epoch: Epoch(2) };
        assert_eq!(ConfStep::decode(&step.encode()), Ok(step));
        assert_eq!(ConfStep::decode(&[2, 0]), Err(CodecError::UnknownVersion(2)));
    }
}
