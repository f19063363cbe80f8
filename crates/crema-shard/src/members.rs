//! Who belongs to a group: the members that its log has made, and the steps by which a leader changes them.
//!
//! ```text
//!   placement: intent --leader compares--> ConfStep --entry, one at a time--> applied: Members (fact)
//!   a replica that is lost:   Remove(old)      ->  AddLearner(new)  ->  catch-up  ->  Promote(new)
//!   a replica that moves:     AddLearner(new)  ->  catch-up  ->  Swap(new, old), joint  ->  Leave  ->  Remove(old)
//! ```
//!
//! A step changes one voter, so that majorities before and after it overlap (Ongaro 2014, section 4.1), or it enters a
//! joint configuration, in which whatever is decided needs both majorities (section 4.3), until `Leave`. So a move is never
//! one voter short, as removing first would be, nor one long, which costs a majority more. Whoever a swap demotes learns of
//! it as a learner before it is removed. A step carries the
//! node and life of whom it adds: the group's log alone tells its members where the others are, whatever placement or
//! gossip believe. It carries the placement epoch too; an older one than applied last is refused, everywhere alike.

use crate::meta::{MAX_REPLICAS, ReplicaPlacement};
use crema_core::{CodecError, Epoch, Incarnation, NodeId, ReplicaId};
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState};
use serde::{Deserialize, Serialize};

/// First byte of an encoded step or of encoded members.
const VERSION: u8 = 2;
/// Most voters and most learners that are believed of a peer: replicas of one placement, and of the one before it.
pub(crate) const MAX_MEMBERS: usize = 2 * MAX_REPLICAS;

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

/// The members of a group as of an applied index; all lists ascend by id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Members {
    /// Those whose votes and acknowledgements count.
    pub voters: Vec<Member>,
    /// In a joint configuration the voters before it, whose majority counts as well; else nobody.
    pub outgoing: Vec<Member>,
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
    /// A learner becomes a voter in the place of another, by a joint configuration.
    Swap {
        /// The learner.
        promote: ReplicaId,
        /// The voter, which becomes a learner.
        demote: ReplicaId,
    },
    /// The joint configuration ends.
    Leave,
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
    pub fn to_raft(self) -> ConfChangeV2 {
        let single = |kind, id: ReplicaId| {
            let mut one = ConfChangeSingle::default();
            (one.change_type, one.node_id) = (kind, id.0);
            one
        };
        let changes = match self.change {
            ConfChangeKind::AddLearner(member) => vec![single(ConfChangeType::AddLearnerNode, member.id)],
            ConfChangeKind::Promote(id) => vec![single(ConfChangeType::AddNode, id)],
            ConfChangeKind::Remove(id) => vec![single(ConfChangeType::RemoveNode, id)],
            ConfChangeKind::Swap { promote, demote } => {
                vec![single(ConfChangeType::AddNode, promote), single(ConfChangeType::AddLearnerNode, demote)]
            }
            ConfChangeKind::Leave => Vec::new(),
        };
        let mut change = ConfChangeV2::default();
        if changes.len() > 1 {
            // We leave it ourselves: raft-rs would by an entry without a step.
            change.set_transition(ConfChangeTransition::Explicit);
        }
        change.set_changes(changes.into());
        change
    }
}

impl Members {
    /// The members of a newly founded group.
    pub fn founded(replicas: &[ReplicaPlacement], epoch: Epoch) -> Self {
        let mut voters: Vec<Member> = replicas.iter().map(Member::from).collect();
        voters.sort_by_key(|v| v.id);
        Members { voters, outgoing: Vec::new(), learners: Vec::new(), epoch }
    }

    /// A member by its id.
    pub fn get(&self, id: ReplicaId) -> Option<Member> {
        self.all().find(|m| m.id == id).copied()
    }

    /// Those who vote, then learners. Nobody twice.
    pub fn all(&self) -> impl Iterator<Item = &Member> {
        self.voting().chain(&self.learners)
    }

    /// Everybody with a vote: in a joint configuration the voters before and after it. Nobody twice.
    pub fn voting(&self) -> impl Iterator<Item = &Member> {
        self.voters.iter().chain(self.demoted())
    }

    /// Who loses its vote when the joint configuration ends.
    fn demoted(&self) -> impl Iterator<Item = &Member> {
        self.outgoing.iter().filter(|o| !self.voters.iter().any(|v| v.id == o.id))
    }

    /// Whether `id` has a vote.
    pub fn is_voter(&self, id: ReplicaId) -> bool {
        self.voting().any(|v| v.id == id)
    }

    /// Whether two majorities count.
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether those who `counts` says yes to are enough to decide anything: a majority, or in a joint configuration both.
    pub fn has_quorum(&self, counts: impl Fn(&Member) -> bool) -> bool {
        let majority = |of: &[Member]| of.iter().filter(|m| counts(m)).count() > of.len() / 2;
        majority(&self.voters) && (self.outgoing.is_empty() || majority(&self.outgoing))
    }

    /// Why a step is refused, by the members alone and so on every replica alike; `None` if it may be applied.
    pub fn objection(&self, step: &ConfStep) -> Option<&'static str> {
        if step.epoch < self.epoch {
            return Some("an older placement");
        }
        let learner = |id| self.learners.iter().any(|l| l.id == id);
        match step.change {
            ConfChangeKind::Leave if !self.is_joint() => Some("not joint"),
            ConfChangeKind::Leave => None,
            _ if self.is_joint() => Some("joint"),
            ConfChangeKind::Swap { promote, .. } if !learner(promote) => Some("no learner"),
            ConfChangeKind::Swap { demote, .. } if !self.is_voter(demote) => Some("no voter"),
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
            ConfChangeKind::Swap { promote, demote } => {
                self.outgoing.clone_from(&self.voters);
                self.voters.retain(|v| v.id != demote);
                if let Some(at) = self.learners.iter().position(|l| l.id == promote) {
                    let member = self.learners.remove(at);
                    self.voters.push(member);
                }
            }
            ConfChangeKind::Leave => {
                let mut demoted: Vec<Member> = self.demoted().copied().collect();
                self.learners.append(&mut demoted);
                self.outgoing.clear();
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
            voters_outgoing: self.outgoing.iter().map(|v| v.id.0).collect(),
            learners_next: self.demoted().map(|v| v.id.0).collect(),
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
        let Members { voters, outgoing, learners, .. } = &members;
        let lists = [voters, outgoing, learners];
        let sound = lists.iter().all(|list| list.len() <= MAX_MEMBERS && ascend(list));
        let twice = learners.iter().any(|l| members.is_voter(l.id));
        // Who votes before and after is one and the same.
        let torn = outgoing.iter().any(|o| voters.iter().any(|v| v.id == o.id && v != o));
        let zero = members.all().any(|m| m.id.0 == 0);
        if voters.is_empty() || !sound || twice || torn || zero {
            return Err(CodecError::Malformed);
        }
        Ok(members)
    }

    /// The next step from these members, the fact, towards `wanted`, the intent of placement `epoch`; `None` if they agree
    /// or the step has to wait. `own` is the replica that asks, the leader, which never takes its own vote: where it is not
    /// wanted, leadership moves first. `caught_up` says whether a learner has all but the last of the log, `alive` whether a
    /// voter answers: no step leaves a majority that does not.
    ///
    /// Whoever is lost goes first, since it counts for the majority; then whoever is nobody's wish and has no vote; then
    /// what has caught up takes its place; then new ones come; and last go voters that nobody has to replace.
    pub fn next_step(
        &self,
        wanted: &[ReplicaPlacement],
        epoch: Epoch,
        own: ReplicaId,
        caught_up: impl Fn(ReplicaId) -> bool,
        alive: impl Fn(ReplicaId) -> bool,
    ) -> Option<ConfStep> {
        let step = |change| Some(ConfStep { change, epoch: epoch.max(self.epoch) });
        if self.is_joint() {
            return step(ConfChangeKind::Leave);
        }
        if epoch < self.epoch {
            return None;
        }
        let is_wanted = |m: &&Member| wanted.iter().any(|w| w.id == m.id);
        // A newer life of the same node takes its place: the old one's memory is gone.
        let replaced = |m: &&Member| wanted.iter().any(|w| w.node == m.node && w.id > m.id);
        if let Some(gone) = self.all().find(|m| !is_wanted(m) && replaced(m)) {
            return step(ConfChangeKind::Remove(gone.id));
        }
        if let Some(learner) = self.learners.iter().find(|l| !is_wanted(l)) {
            return step(ConfChangeKind::Remove(learner.id));
        }
        // Those that do not answer first: with them a majority more of the others becomes possible.
        let unwanted = self.voters.iter().filter(|v| !is_wanted(v));
        let goes = unwanted.clone().filter(|v| v.id != own).min_by_key(|v| (alive(v.id), v.id)).map(|v| v.id);
        let lives_on = |without: ReplicaId, with: usize| {
            let rest = self.voters.iter().filter(|v| v.id != without);
            let (count, living) = (rest.clone().count() + with, rest.filter(|v| alive(v.id)).count() + with);
            living > count / 2
        };
        if let Some(learner) = self.learners.iter().find(|l| caught_up(l.id)) {
            match goes {
                Some(demote) if lives_on(demote, 1) => {
                    return step(ConfChangeKind::Swap { promote: learner.id, demote });
                }
                Some(_) => {}
                // Another leads soon, and demotes this one; unless there is nobody else yet.
                None if unwanted.clone().next().is_some() && self.voters.len() > 1 => {}
                None => return step(ConfChangeKind::Promote(learner.id)),
            }
        }
        let missing = wanted.iter().filter(|w| self.get(w.id).is_none()).min_by_key(|w| w.id);
        if let Some(new) = missing {
            return step(ConfChangeKind::AddLearner(Member::from(new)));
        }
        let replaceable = self.learners.is_empty() && self.voters.iter().any(|v| is_wanted(&v));
        match goes {
            Some(id) if replaceable && lives_on(id, 0) => step(ConfChangeKind::Remove(id)),
            _ => None,
        }
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
    use proptest::prelude::*;

    fn placed(id: u64, node: u64, life: u128) -> ReplicaPlacement {
        ReplicaPlacement { id: ReplicaId(id), node: NodeId(node), incarnation: Incarnation(life) }
    }

    fn trio() -> Vec<ReplicaPlacement> {
        vec![placed(1, 1, 1), placed(2, 2, 1), placed(3, 3, 1)]
    }

    /// A learner has caught up if `caught_up`; everybody answers; whoever is wanted leads, if anybody is.
    fn step(m: &Members, wanted: &[ReplicaPlacement], epoch: u64, caught_up: bool) -> Option<ConfStep> {
        let leads = m.voters.iter().find(|v| wanted.iter().any(|w| w.id == v.id)).unwrap_or(&m.voters[0]);
        m.next_step(wanted, Epoch(epoch), leads.id, |_| caught_up, |_| true)
    }

    /// Steps until nothing is left to do; every learner catches up at once.
    fn settle(members: &mut Members, wanted: &[ReplicaPlacement], epoch: Epoch) -> Vec<ConfChangeKind> {
        let mut steps = Vec::new();
        while let Some(step) = step(members, wanted, epoch.0, true) {
            assert_eq!(members.objection(&step), None, "{step:?}");
            members.apply(&step);
            assert_eq!(Members::decode(&members.encode()).as_ref(), Ok(&*members));
            steps.push(step.change);
            assert!(steps.len() < 40, "{steps:?}");
        }
        steps
    }

    fn ids(of: &[Member]) -> Vec<u64> {
        of.iter().map(|m| m.id.0).collect()
    }

    #[test]
    fn a_replica_moves_by_a_joint_configuration() {
        let mut m = Members::founded(&trio(), Epoch(1));
        let wanted = [placed(1, 1, 1), placed(2, 2, 1), placed(9, 4, 1)];
        let steps = settle(&mut m, &wanted, Epoch(2));
        let swap = ConfChangeKind::Swap { promote: ReplicaId(9), demote: ReplicaId(3) };
        let add = ConfChangeKind::AddLearner(Member::from(&wanted[2]));
        assert_eq!(steps, [add, swap, ConfChangeKind::Leave, ConfChangeKind::Remove(ReplicaId(3))]);
        assert_eq!((ids(&m.voters), m.outgoing.len(), m.learners.len()), (vec![1, 2, 9], 0, 0));
    }

    #[test]
    fn in_a_joint_configuration_both_majorities_count() {
        let mut m = Members::founded(&trio(), Epoch(1));
        let wanted = [placed(1, 1, 1), placed(2, 2, 1), placed(9, 4, 1)];
        for _ in 0..2 {
            m.apply(&step(&m, &wanted, 2, true).unwrap());
        }
        assert_eq!((ids(&m.voters), ids(&m.outgoing)), (vec![1, 2, 9], vec![1, 2, 3]));
        assert_eq!(m.voting().map(|v| v.id.0).collect::<Vec<_>>(), [1, 2, 9, 3]);
        assert!(m.is_voter(ReplicaId(3)) && m.is_voter(ReplicaId(9)));
        let quorum = |of: &[u64]| m.has_quorum(|v| of.contains(&v.id.0));
        assert!(quorum(&[1, 2]) && quorum(&[1, 3, 9]) && !quorum(&[1, 9]) && !quorum(&[1, 3]) && !quorum(&[3, 9]));
        let raft = m.to_raft();
        assert_eq!((raft.voters, raft.voters_outgoing), (vec![1, 2, 9], vec![1, 2, 3]));
        assert_eq!((raft.learners, raft.learners_next, raft.auto_leave), (vec![], vec![3], false));
        // Whatever placement says by now, the configuration is left first, and nothing else is taken.
        let leave = ConfStep { change: ConfChangeKind::Leave, epoch: Epoch(2) };
        assert_eq!(step(&m, &trio(), 1, true), Some(leave));
        let remove = ConfStep { change: ConfChangeKind::Remove(ReplicaId(3)), epoch: Epoch(2) };
        assert!(m.objection(&remove).is_some());
        assert_eq!(m.objection(&leave), None);
        m.apply(&leave);
        assert_eq!((ids(&m.voters), ids(&m.learners)), (vec![1, 2, 9], vec![3]));
        assert!(m.objection(&leave).is_some());
    }

    #[test]
    fn a_move_that_is_taken_back_leaves_what_it_has_begun() {
        let mut m = Members::founded(&trio(), Epoch(1));
        let moved = [placed(1, 1, 1), placed(2, 2, 1), placed(9, 4, 1)];
        m.apply(&step(&m, &moved, 2, false).unwrap());
        assert_eq!(settle(&mut m, &trio(), Epoch(3)), [ConfChangeKind::Remove(ReplicaId(9))]);
        assert_eq!(ids(&m.voters), [1, 2, 3]);
        // Taken back only after the swap: the old one, a learner by now, comes back the same way.
        for _ in 0..3 {
            m.apply(&step(&m, &[trio()[0], trio()[1], placed(12, 4, 1)], 4, true).unwrap());
        }
        assert_eq!((ids(&m.voters), ids(&m.learners)), (vec![1, 2, 12], vec![3]));
        let steps = settle(&mut m, &trio(), Epoch(5));
        assert_eq!(steps[0], ConfChangeKind::Swap { promote: ReplicaId(3), demote: ReplicaId(12) });
        assert_eq!((ids(&m.voters), m.learners.len()), (vec![1, 2, 3], 0));
    }

    #[test]
    fn whoever_leads_does_not_take_its_own_vote() {
        let m = Members::founded(&trio(), Epoch(1));
        let two = &trio()[..2];
        let by = |own| m.next_step(two, Epoch(2), ReplicaId(own), |_| true, |_| true).map(|s| s.change);
        assert_eq!(by(3), None, "another leads first");
        assert_eq!(by(1), Some(ConfChangeKind::Remove(ReplicaId(3))));
        // Alone it has to make another a voter before that one can lead.
        let mut one = Members::founded(&trio()[..1], Epoch(1));
        let other = [placed(7, 2, 1)];
        let steps = settle(&mut one, &other, Epoch(2));
        let add = ConfChangeKind::AddLearner(Member::from(&other[0]));
        let promote = ConfChangeKind::Promote(ReplicaId(7));
        assert_eq!(steps, [add, promote, ConfChangeKind::Remove(ReplicaId(1))]);
    }

    #[test]
    fn no_step_leaves_a_majority_that_does_not_answer() {
        let m = Members::founded(&trio(), Epoch(1));
        let two = &trio()[..2];
        let by = |m: &Members, wanted: &[ReplicaPlacement], silent: &[u64]| {
            let alive = |id: ReplicaId| !silent.contains(&id.0);
            m.next_step(wanted, Epoch(2), ReplicaId(1), alive, alive).map(|s| s.change)
        };
        assert_eq!(by(&m, two, &[2]), None, "of two voters one would not answer");
        assert_eq!(by(&m, two, &[3]), Some(ConfChangeKind::Remove(ReplicaId(3))));
        let mut m = m;
        let wanted = [placed(1, 1, 1), placed(8, 4, 1), placed(9, 5, 1)];
        m.apply(&ConfStep { change: ConfChangeKind::AddLearner(Member::from(&wanted[1])), epoch: Epoch(2) });
        // Who does not answer goes first.
        let swap = |demote| Some(ConfChangeKind::Swap { promote: ReplicaId(8), demote: ReplicaId(demote) });
        assert_eq!(by(&m, &wanted, &[3]), swap(3));
        assert_eq!(by(&m, &wanted, &[]), swap(2));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        /// Any sequence of intents, whoever catches up: every step may be applied, and in the end fact is intent.
        #[test]
        fn whatever_is_wanted_becomes_fact(choices in prop::collection::vec(any::<u8>(), 200)) {
            let mut choices = choices.into_iter();
            let mut below = |n: u8| choices.next().unwrap_or(0) % n;
            let mut m = Members::founded(&trio(), Epoch(1));
            let (mut next_id, mut epoch) = (10, 1);
            let (mut wanted, mut known) = (trio(), trio());
            for _ in 0..below(14) {
                if below(3) == 0 {
                    epoch += 1;
                    let (mut next, count) = (Vec::new(), 1 + usize::from(below(4)));
                    for node in 1..=6 {
                        if next.len() < count && below(2) == 0 {
                            // A replica that is still a member keeps its id.
                            let kept = known.iter().find(|k| k.node.0 == node && m.get(k.id).is_some()).copied();
                            next_id += 1;
                            let new = kept.unwrap_or_else(|| placed(next_id, node, 1));
                            next.push(new);
                            known.retain(|k| k.node.0 != node);
                            known.push(new);
                        }
                    }
                    if !next.is_empty() {
                        wanted = next;
                    }
                }
                if let Some(s) = step(&m, &wanted, epoch, below(2) == 0) {
                    prop_assert_eq!(m.objection(&s), None, "{:?} {:?}", s, m);
                    m.apply(&s);
                }
            }
            settle(&mut m, &wanted, Epoch(epoch));
            let mut goal: Vec<u64> = wanted.iter().map(|w| w.id.0).collect();
            goal.sort_unstable();
            prop_assert_eq!((ids(&m.voters), m.learners.len(), m.is_joint()), (goal, 0, false));
        }
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
                if let Some(step) = step(&m, &first, 2, caught_up) {
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
        m.apply(&step(&m, &trio(), 1, false).unwrap());
        assert_eq!(m.learners.len(), 1);
        assert_eq!(step(&m, &trio(), 1, false), None);
        assert!(step(&m, &trio(), 1, true).is_some());
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
        assert_eq!(ConfStep::decode(&[1, 0]), Err(CodecError::UnknownVersion(1)));
    }
}
