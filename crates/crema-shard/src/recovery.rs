//! What has become of groups without a leader, and how those that lost their majority are founded anew.
//!
//! ```text
//!   group without a leader for a while --census: every connected node reports--> Standing of the group
//!      electing    a majority of its voters is here: it will elect
//!      waiting     it may go on when nodes come back that do not answer
//!      lost        no majority can ever come together: only an operator makes it writable again
//!
//!   recover --census--> plan --meta group leads------> MetaCommand::Refound, by its log
//!                            \-meta group lost too---> a record of the next generation, accepted by every connected node
//! ```
//!
//! Placement alone cannot tell: it names successors at once. What counts is who had a vote by the log of those that are
//! left. A group is lost when everybody is *accounted for* whom placement or a log names – connected and asked, or in a life
//! that is over, or stopped by the operator's word – and no log is left whose majority still holds it.
//!
//! Whoever begins a lost group is the survivor whose log is the most up to date (last term, then last index: Ongaro 2014,
//! section 3.6.1), and it keeps that log to its end: what the lost majority acknowledged may stand there though nobody
//! knows any more that it was committed.

use crate::members::Member;
use crate::meta::{
    MAX_PAST_INCARNATIONS, MAX_REPLICAS, MetaState, NO_LIFE, NodeAddrs, NodeRecord, Refounding, bounded_vec,
};
use crate::placement::MAX_SHARDS;
use crema_core::{ClusterUuid, Epoch, Incarnation, LogIndex, NodeId, ReplicaId, ShardId, Term};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What one node knows of one group without a leader.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupReport {
    /// The group.
    pub shard: ShardId,
    /// Whether the node leads it.
    pub led: bool,
    /// The highest term heard of.
    pub term: Term,
    /// Whether it has a replica that has failed: nobody knows what that has until the node begins again.
    pub failed: bool,
    /// Its own replica of the group, if it has one that can be trusted.
    pub replica: Option<ReplicaReport>,
}

/// What a replica says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Its id.
    pub id: ReplicaId,
    /// The voters by its log; nobody, if it has no state yet.
    #[serde(deserialize_with = "bounded_vec::<_, _, { 2 * MAX_REPLICAS }>")]
    pub voters: Vec<Member>,
    /// In a joint configuration the voters before it, whose majority counts as well.
    #[serde(deserialize_with = "bounded_vec::<_, _, { 2 * MAX_REPLICAS }>")]
    pub outgoing: Vec<Member>,
    /// Term of its last entry.
    pub last_term: Term,
    /// Index of its last entry.
    pub last: LogIndex,
}

/// A node's answer to a census.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The cluster that it belongs to, or has belonged to.
    pub uuid: Option<ClusterUuid>,
    /// Generation of that cluster's table, as far as it knows.
    pub generation: u32,
    /// Epoch of its table, 0 without one.
    pub epoch: Epoch,
    /// Its table, encoded, if that is newer than the one of whoever asks.
    pub state: Option<Vec<u8>>,
    /// Its addresses.
    pub addrs: NodeAddrs,
    /// Its limit of memory.
    pub max_memory: u64,
    /// How many replicas with a state it has, where it knows no table that says what they are.
    pub holds: u32,
    /// The groups that were asked for, ascending.
    #[serde(deserialize_with = "bounded_vec::<_, _, { MAX_SHARDS as usize + 1 }>")]
    pub groups: Vec<GroupReport>,
}

/// What a group without a leader can hope for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hope {
    /// A majority is here, or somebody knows a leader: an election will do.
    Election,
    /// It waits for nodes that do not answer.
    Waiting {
        /// Those nodes, in lives that count.
        missing: BTreeSet<(NodeId, Incarnation)>,
    },
    /// It has lost its majority for good.
    Lost {
        /// Nodes whose voters are lost.
        lost: BTreeSet<NodeId>,
        /// How many voters it had; 0 if no log tells.
        voters: usize,
        /// Who holds the most up to date log that is left; nobody, if nothing is left.
        best: Option<NodeId>,
    },
}

/// Everything that a census has brought together.
#[derive(Debug)]
pub struct Census<'a> {
    /// The newest table of those that answered.
    pub state: &'a MetaState,
    /// The nodes that answered, whoever asked included: life and report.
    pub reports: BTreeMap<NodeId, (Incarnation, &'a Report)>,
    /// Nodes that the operator has stopped for good.
    pub stopped: BTreeSet<NodeId>,
}

impl Census<'_> {
    fn reports_of(&self, shard: ShardId) -> impl Iterator<Item = (NodeId, Incarnation, &GroupReport)> {
        self.reports.iter().filter_map(move |(node, (life, report))| {
            let at = report.groups.binary_search_by_key(&shard, |g| g.shard).ok()?;
            Some((*node, *life, &report.groups[at]))
        })
    }

    /// Who says that it leads the group.
    pub fn leads(&self, shard: ShardId) -> Option<NodeId> {
        self.reports_of(shard).find(|(.., g)| g.led).map(|(node, ..)| node)
    }

    /// Whether this life of the node has nothing more to say. One that the table does not know may be newer than the table.
    fn is_over(&self, node: NodeId, life: Incarnation) -> bool {
        let forgets = |n: &NodeRecord| n.past.len() >= MAX_PAST_INCARNATIONS && n.incarnation != life;
        let fenced = self.state.nodes.get(&node).is_some_and(|n| n.past.contains(&life) || forgets(n));
        // A node that answers in another life has begun it.
        let replaced = self.reports.get(&node).is_some_and(|(present, _)| *present != life);
        let stopped = self.stopped.contains(&node) && !self.reports.contains_key(&node);
        fenced || replaced || stopped || life == NO_LIFE
    }

    fn answers(&self, shard: ShardId, node: NodeId, life: Incarnation) -> bool {
        self.reports_of(shard).any(|(n, present, g)| n == node && present == life && !g.failed)
    }

    /// What a group without a leader can hope for.
    pub fn hope(&self, shard: ShardId) -> Hope {
        let reports: Vec<_> = self.reports_of(shard).collect();
        if self.leads(shard).is_some() {
            return Hope::Election;
        }
        let replicas = || reports.iter().filter_map(|(node, life, g)| Some((*node, *life, g.replica.as_ref()?)));
        let log_of = |m: &Member| {
            let mut here = replicas().filter(|(node, life, r)| (*node, *life, r.id) == (m.node, m.incarnation, m.id));
            here.find(|(.., r)| !r.voters.is_empty()).map(|(.., r)| (r.last_term, r.last))
        };
        let has_log = |m: &Member| log_of(m).is_some();
        let logs = || replicas().filter(|(.., r)| !r.voters.is_empty());
        // Nobody votes for a log that is older than its own (Ongaro 2014, section 3.6.1).
        let votes = |v: &Member, r: &ReplicaReport| log_of(v).is_some_and(|log| log <= (r.last_term, r.last));
        let majority = |of: &[Member], r: &ReplicaReport| of.iter().filter(|v| votes(v, r)).count() > of.len() / 2;
        let quorum = |r: &ReplicaReport| majority(&r.voters, r) && (r.outgoing.is_empty() || majority(&r.outgoing, r));
        if logs().any(|(.., r)| quorum(r)) {
            return Hope::Election;
        }
        // Those that are about to leave may be all that has the data yet.
        let placed = self.state.replicas(shard).iter().chain(self.state.leaving(shard));
        let placed = placed.map(|r| (r.node, r.incarnation));
        let named = logs().flat_map(|(.., r)| r.voters.iter().chain(&r.outgoing).map(|v| (v.node, v.incarnation)));
        let all: BTreeSet<(NodeId, Incarnation)> = placed.chain(named).collect();
        let missing: BTreeSet<_> = all
            .into_iter()
            .filter(|(node, life)| !self.answers(shard, *node, *life) && !self.is_over(*node, *life))
            .collect();
        if !missing.is_empty() {
            return Hope::Waiting { missing };
        }
        let best = logs().max_by_key(|(.., r)| (r.last_term, r.last));
        let mut voters: Vec<&Member> = best.iter().flat_map(|(.., r)| r.voters.iter().chain(&r.outgoing)).collect();
        voters.sort_by_key(|v| v.id);
        voters.dedup();
        Hope::Lost {
            lost: voters.iter().filter(|v| !has_log(v)).map(|v| v.node).collect(),
            voters: voters.len(),
            best: best.map(|(node, ..)| node),
        }
    }

    /// How a lost group begins anew. Its founder has the best log, or is the first node of placement that answers; with
    /// nobody there it cannot begin.
    pub fn refounding(&self, shard: ShardId, best: Option<NodeId>) -> Option<Refounding> {
        let answers = |node: &NodeId| self.reports_of(shard).any(|(n, ..)| n == *node);
        let founder = best.or_else(|| self.state.replicas(shard).iter().map(|r| r.node).find(answers))?;
        let term = self.reports_of(shard).map(|(.., g)| g.term).max().unwrap_or_default();
        let logs = || self.reports_of(shard).filter_map(|(.., g)| g.replica.as_ref());
        let index = logs().map(|r| r.last).max().unwrap_or_default();
        let term = logs().map(|r| r.last_term).max().unwrap_or_default().max(term);
        Some(Refounding { shard, epoch: self.state.epoch_of(shard), founder, index, term })
    }
}

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoverRequest {
    /// The caller's mark, returned with the result.
    pub id: u64,
    /// Whether to do it; else the result only says what would be done.
    pub accept_data_loss: bool,
    /// Nodes that do not answer and never will in their present lives.
    pub stopped: Vec<NodeId>,
}

/// A group that is lost, or was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostGroup {
    /// The group.
    pub shard: ShardId,
    /// Why it is lost.
    pub reason: String,
    /// The node that begins it anew; nobody, if none of its nodes answers.
    pub founder: Option<NodeId>,
    /// Whether that node has data of it.
    pub keeps_data: bool,
}

/// What a recovery does, or has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The groups that are founded anew.
    pub lost: Vec<LostGroup>,
    /// Groups that are left alone, since nodes that do not answer may bring them back, and why.
    pub waiting: Vec<(ShardId, String)>,
    /// Those nodes.
    pub missing: BTreeSet<NodeId>,
    /// The generation of the table that begins, if the meta group itself is among the lost.
    pub generation: Option<u32>,
    /// Whether nothing is left of the cluster but its identity.
    pub anew: bool,
    /// Whether it was done.
    pub done: bool,
    /// Groups of them that have no leader yet.
    pub unfinished: Vec<ShardId>,
}

/// How a recovery ended: what was done or, without `accept_data_loss`, would be; or a sentence that says why not.
pub type RecoverResult = Result<Recovered, String>;

impl Hope {
    /// In words, for whoever asks why `what` has no leader; nothing, while an election is going on.
    pub fn in_words(&self, what: &str) -> Option<String> {
        let list = |nodes: &BTreeSet<NodeId>| {
            let names: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
            format!("node{} {}", if names.len() == 1 { "" } else { "s" }, names.join(", "))
        };
        match self {
            Hope::Election => None,
            Hope::Waiting { missing } => {
                let nodes = missing.iter().map(|(node, _)| *node).collect();
                Some(format!("{what} has no majority without {}: not answering, or failed", list(&nodes)))
            }
            Hope::Lost { voters: 0, .. } => Some(format!("{what} lost every replica that had its data")),
            Hope::Lost { lost, voters, .. } => {
                let left = voters - lost.len();
                Some(format!(
                    "{what} lost its majority: what {} held of it is gone, {left} of {voters} left",
                    list(lost)
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::{MetaState, ReplicaPlacement};
    use crema_core::WallTime;

    const S: ShardId = ShardId(0);

    fn life(node: u64) -> Incarnation {
        Incarnation(u128::from(node) << 8)
    }

    /// Three nodes, one shard; its replicas are 4 to 6.
    fn table() -> MetaState {
        let members: Vec<_> = (1..=3).map(|n| (NodeId(n), life(n), NodeAddrs::default())).collect();
        MetaState::found(ClusterUuid(1), "t".into(), 1, WallTime(1), &members, 1, 3)
    }

    fn voters(state: &MetaState) -> Vec<Member> {
        state.replicas(S).iter().map(Member::from).collect()
    }

    fn report(placed: &ReplicaPlacement, voters: Vec<Member>, last: (u64, u64)) -> Report {
        let (last_term, last) = (Term(last.0), LogIndex(last.1));
        let replica = ReplicaReport { id: placed.id, voters, outgoing: Vec::new(), last_term, last };
        let group = GroupReport { shard: S, term: last_term, replica: Some(replica), ..GroupReport::default() };
        Report { groups: vec![group], ..Report::default() }
    }

    fn nothing() -> Report {
        let group = GroupReport { shard: S, ..GroupReport::default() };
        Report { groups: vec![group], ..Report::default() }
    }

    fn hope(state: &MetaState, reports: &[(u64, Incarnation, Report)], stopped: &[u64]) -> Hope {
        let reports = reports.iter().map(|(n, life, r)| (NodeId(*n), (*life, r))).collect();
        Census { state, reports, stopped: stopped.iter().map(|n| NodeId(*n)).collect() }.hope(S)
    }

    #[test]
    fn a_group_is_lost_only_when_nobody_can_bring_it_back() {
        let state = table();
        let placed = state.replicas(S);
        let at = |i: usize, last| (placed[i].node.0, placed[i].incarnation, report(&placed[i], voters(&state), last));
        let new = |i: usize| (placed[i].node.0, Incarnation(7 + i as u128), nothing());
        let (a, b) = (at(0, (2, 9)), at(1, (3, 5)));
        assert_eq!(hope(&state, &[a.clone(), b.clone()], &[]), Hope::Election, "two of three");
        let missing = |h: Hope| match h {
            Hope::Waiting { missing } => missing.into_iter().map(|(n, _)| n).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        let others = BTreeSet::from([placed[1].node, placed[2].node]).into_iter().collect::<Vec<_>>();
        assert_eq!(missing(hope(&state, std::slice::from_ref(&a), &[])), others);
        assert_eq!(missing(hope(&state, &[a.clone(), new(1)], &[])), [placed[2].node], "one may still come back");
        let lost = Hope::Lost { lost: others.into_iter().collect(), voters: 3, best: Some(placed[0].node) };
        assert_eq!(hope(&state, &[a.clone(), new(1), new(2)], &[]), lost);
        assert_eq!(hope(&state, &[a.clone(), new(1)], &[placed[2].node.0]), lost, "by the operator's word");
        // Who answers is not stopped, whatever the operator says.
        assert_eq!(hope(&state, &[a.clone(), b], &[placed[1].node.0]), Hope::Election);
        let none = hope(&state, &[new(0), new(1), new(2)], &[]);
        assert!(matches!(none, Hope::Lost { voters: 0, best: None, .. }), "{none:?}");
        let mut failed = new(1);
        (failed.1, failed.2.groups[0].failed) = (placed[1].incarnation, true);
        assert_eq!(
            missing(hope(&state, &[a.clone(), failed, new(2)], &[])),
            [placed[1].node],
            "begun again it may be there"
        );
        let mut leads = a;
        leads.2.groups[0].led = true;
        assert_eq!(hope(&state, &[leads, new(1), new(2)], &[]), Hope::Election, "it will find out by itself");
    }

    #[test]
    fn a_log_that_is_out_of_date_does_not_speak_for_placed_replicas_that_are_away() {
        let mut state = table();
        let old = voters(&state);
        let survivor = state.replicas(S)[2];
        // The others have been replaced since; the one that is left never heard of it.
        for (i, r) in state.shards[0].replicas.iter_mut().take(2).enumerate() {
            r.id = ReplicaId(100 + i as u64);
            r.incarnation = Incarnation(1000 + i as u128);
            let node = state.nodes.get_mut(&r.node).unwrap();
            node.past.push(node.incarnation);
            node.incarnation = r.incarnation;
        }
        let stale = (survivor.node.0, survivor.incarnation, report(&survivor, old, (2, 9)));
        assert!(
            matches!(hope(&state, std::slice::from_ref(&stale), &[]), Hope::Waiting { missing } if missing.len() == 2)
        );
        // They answer, and have a majority of what came later.
        let now = voters(&state);
        let at = |i: usize| {
            let r = state.replicas(S)[i];
            (r.node.0, r.incarnation, report(&r, now.clone(), (3, 4)))
        };
        assert_eq!(hope(&state, &[stale, at(0), at(1)], &[]), Hope::Election);
    }

    #[test]
    fn a_life_that_only_the_log_knows_is_not_over() {
        // The table is older than the log: the third node's new life is a voter already, and does not answer.
        let state = table();
        let placed = state.replicas(S);
        let mut now = voters(&state);
        now[2] = Member { id: ReplicaId(100), node: placed[2].node, incarnation: Incarnation(1000) };
        let survivor = (placed[0].node.0, placed[0].incarnation, report(&placed[0], now, (2, 9)));
        let lost = (placed[1].node.0, Incarnation(7), nothing());
        let h = hope(&state, &[survivor.clone(), lost.clone()], &[]);
        assert!(
            matches!(&h, Hope::Waiting { missing } if missing.contains(&(placed[2].node, Incarnation(1000)))),
            "{h:?}"
        );
        let h = hope(&state, &[survivor, lost], &[placed[2].node.0]);
        assert!(matches!(h, Hope::Lost { .. }), "by the operator's word: {h:?}");
    }

    #[test]
    fn what_an_operator_has_given_up_is_not_waited_for_again() {
        let mut state = table();
        for i in [1, 2] {
            let r = &mut state.shards[0].replicas[i];
            let node = state.nodes.get_mut(&r.node).unwrap();
            node.past.push(node.incarnation);
            (node.incarnation, r.incarnation, r.id) = (NO_LIFE, NO_LIFE, ReplicaId(100 + i as u64));
        }
        let h = hope(&state, &[(state.replicas(S)[0].node.0, Incarnation(7), nothing())], &[]);
        assert!(matches!(h, Hope::Lost { best: None, .. }), "{h:?}");
    }

    #[test]
    fn the_most_up_to_date_log_begins_the_group() {
        let state = table();
        let placed = state.replicas(S);
        let five = |i: usize| Member { id: ReplicaId(50 + i as u64), ..Member::from(&placed[0]) };
        let five: Vec<Member> = voters(&state).into_iter().take(2).chain((0..3).map(five)).collect();
        let at = |i: usize, last| (placed[i].node, (placed[i].incarnation, report(&placed[i], five.clone(), last)));
        let owned = BTreeMap::from([at(0, (2, 90)), at(1, (3, 5))]);
        let reports = owned.iter().map(|(n, (life, r))| (*n, (*life, r))).collect();
        let census = Census { state: &state, reports, stopped: BTreeSet::from([placed[2].node]) };
        let Hope::Lost { best, .. } = census.hope(S) else { panic!("{:?}", census.hope(S)) };
        assert_eq!(best, Some(placed[1].node), "the later term counts, not the longer log");
        let r = census.refounding(S, best).unwrap();
        assert_eq!((r.index, r.term, r.epoch), (LogIndex(90), Term(3), Epoch(1)), "beyond all that is known");
    }

    /// A group on its way elsewhere: those that are about to leave have all of it, and whoever is to take their places nothing.
    #[test]
    fn whoever_is_about_to_leave_is_waited_for() {
        let mut state = table();
        let placed = state.shards[0].replicas.clone();
        let moved = |(i, r): (usize, &ReplicaPlacement)| ReplicaPlacement {
            id: ReplicaId(r.id.0 + 100),
            node: NodeId(4 + i as u64),
            incarnation: life(4 + i as u64),
        };
        state.shards[0].replicas = placed.iter().enumerate().map(moved).collect();
        let here: Vec<_> = state.shards[0].replicas.iter().map(|r| (r.node.0, r.incarnation, nothing())).collect();
        state.shards[0].moving = Some(crate::meta::Moving { leaving: placed.clone(), epoch: Epoch(1) });
        match hope(&state, &here, &[]) {
            Hope::Waiting { missing } => assert_eq!(missing.len(), 3, "{missing:?}"),
            other => panic!("{other:?}"),
        }
    }

    /// A voter that has gone on without whoever was cut off does not vote for that one's older log.
    #[test]
    fn an_older_log_has_no_majority_of_newer_ones() {
        let state = table();
        let old = voters(&state);
        // The others have gone on to members of which only replica 1 of this one is left here.
        let gone = Member { id: ReplicaId(old[1].id.0 + 50), node: NodeId(2), incarnation: life(9) };
        let later = vec![old[0], Member { id: ReplicaId(old[2].id.0 + 50), ..old[2] }, gone];
        let placed = &state.shards[0].replicas;
        let at = |node: u64| *placed.iter().find(|r| r.node == NodeId(node)).unwrap();
        let first = old[0].node.0;
        let third = old[2].node.0;
        let here = [
            (first, life(first), report(&at(first), later, (3, 90))),
            (third, life(third), report(&at(third), old.clone(), (2, 50))),
        ];
        assert_ne!(hope(&state, &here, &[]), Hope::Election, "nobody would be elected");
        // With the newer log on the other side it is one.
        let here = [
            (first, life(first), report(&at(first), old.clone(), (2, 50))),
            (third, life(third), report(&at(third), old, (3, 90))),
        ];
        assert_eq!(hope(&state, &here, &[]), Hope::Election);
    }
}
