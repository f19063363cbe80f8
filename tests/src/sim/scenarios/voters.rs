//! Nodes are given replicas and have to give them away: by operators, by themselves, and by liars, who achieve nothing.

use super::super::world::{MS, Options, World};
use super::{PATIENCE, SHARD, Story, set};
use crema_core::{NodeId, Reply, ShardId, Term};
use crema_shard::{AutoVoters, ClientResult, LeaderHint, VoterError};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Moves of small groups, and elections that come in between.
const MOVED_MS: u64 = 30_000;

struct Cluster {
    s: Story,
    conns: Vec<(NodeId, crema_shard::ConnId)>,
    asked: Vec<(crema_shard::ConnId, crema_shard::Token)>,
    sent: u64,
}

impl Cluster {
    fn new(options: Options) -> Cluster {
        let options = Options { seed: options.seed.max(1), ..options };
        let mut s = Story { world: World::new(options), answers: BTreeMap::new() };
        let ready = |w: &World| w.ids().iter().all(|n| w.host(*n).is_some_and(|h| h.view().not_ready.is_none()));
        assert!(s.world.run_until(Duration::from_secs(5), ready), "founded and joined");
        let conns = s.world.ids().into_iter().map(|n| (n, s.world.connect())).collect();
        Cluster { s, conns, asked: Vec::new(), sent: 0 }
    }

    fn shards(&self) -> Vec<ShardId> {
        self.s.world.shards().into_iter().chain([ShardId::META]).collect()
    }

    /// A write through every gateway that lives.
    fn write(&mut self) {
        let alive = self.s.world.alive();
        for (node, conn) in self.conns.clone() {
            let knows = self.s.world.host(node).is_some_and(|h| h.meta_state().is_some());
            if alive.contains(&node) && knows {
                self.sent += 1;
                let key = format!("k{}", self.sent);
                self.asked.push(self.s.ask(node, conn, &key, &set("v"), PATIENCE));
            }
        }
    }

    /// Runs under load until `done`.
    #[track_caller]
    fn until(&mut self, limit_ms: u64, what: &str, done: impl Fn(&World) -> bool) {
        for _ in 0..limit_ms / 20 {
            if done(&self.s.world) {
                return;
            }
            self.write();
            self.s.run(20);
        }
        panic!("{what}\n{:?}\n{}", self.at(), self.s.world.trace.tail(60));
    }

    /// Runs for a while under load.
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms / 20 {
            self.write();
            self.s.run(20);
        }
    }

    /// Every write has been answered, and none refused.
    #[track_caller]
    fn all_answered(&mut self) {
        for asked in std::mem::take(&mut self.asked) {
            let answer = self.s.answer(asked, 6_000);
            assert_eq!(answer, Some(ClientResult::Reply(Reply::Ok)), "{}", self.s.world.trace.tail(60));
        }
    }

    /// The nodes of each group by its leader's log, ascending.
    fn at(&self) -> BTreeMap<ShardId, Vec<u64>> {
        let voters = |s: ShardId| {
            let leader = self.s.world.leader(s)?;
            let members = self.s.world.host(leader)?.coordinator().replica(s)?.members();
            let mut nodes: Vec<u64> = members.all().map(|m| m.node.0).collect();
            nodes.sort_unstable();
            Some((s, nodes))
        };
        self.shards().into_iter().filter_map(voters).collect()
    }

    fn settled(w: &World) -> bool {
        w.alive().into_iter().all(|n| w.host(n).is_some_and(|h| h.moves_open() == 0))
    }

    #[track_caller]
    fn change(&mut self, at: u64, node: u64, approved: bool) -> Result<(), VoterError> {
        let id = self.s.world.change_voters(NodeId(at), NodeId(node), approved);
        let known = |w: &World| w.voters.iter().any(|(_, i, _)| *i == id);
        self.until(12_000, "the change has an end", known);
        self.s.world.voters.iter().find(|(_, i, _)| *i == id).expect("just seen").2.clone()
    }

    fn holders(&self) -> BTreeSet<u64> {
        self.shards().into_iter().flat_map(|s| self.s.world.holders(s)).map(|n| n.0).collect()
    }
}

#[test]
fn a_cluster_grows_and_shrinks_under_load_without_a_failed_write() {
    for durable in [0, 1_000] {
        let mut c = Cluster::new(Options { spares: 2, shards: 6, durable, ..Options::default() });
        assert_eq!(c.holders(), BTreeSet::from([1, 2, 3]));
        // At a gateway that holds nothing itself, one right after the other.
        assert_eq!(c.change(4, 4, true), Ok(()));
        assert_eq!(c.change(1, 5, true), Ok(()));
        c.until(MOVED_MS, "grown", |w| Cluster::settled(w) && w.approved().len() == 5);
        let at = c.at();
        let mut load = BTreeMap::new();
        at.values().flatten().for_each(|n| *load.entry(*n).or_insert(0) += 1);
        assert!(at.iter().all(|(s, n)| n.len() == if s.is_meta() { 5 } else { 3 }), "{at:?}");
        assert!(load.len() == 5 && load.values().all(|n| (3..=6).contains(n)), "{load:?}");
        c.until(10_000, "leaders are spread", |w| {
            let leaders: BTreeSet<_> = w.shards().into_iter().filter_map(|s| w.leader(s)).collect();
            leaders.len() == 5
        });
        assert_eq!(c.change(5, 4, false), Ok(()));
        assert_eq!(c.change(4, 5, false), Ok(()));
        c.until(MOVED_MS, "shrunk", |w| Cluster::settled(w) && w.approved().len() == 3);
        // A removed node learns of it, keeps nothing, and goes on as a gateway.
        c.until(5_000, "gateways", |w| {
            w.holders(SHARD).len() == 3 && w.ids().iter().all(|n| w.host(*n).unwrap().view().not_ready.is_none())
        });
        assert_eq!(c.holders(), BTreeSet::from([1, 2, 3]));
        c.all_answered();
        c.s.world.check_logs();
    }
}

#[test]
fn what_would_break_a_quorum_is_refused_with_the_reason() {
    let mut c = Cluster::new(Options { spares: 1, shards: 2, ..Options::default() });
    let refused = |result: Result<(), VoterError>| match result {
        Err(VoterError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let not_now = |result: Result<(), VoterError>| match result {
        Err(VoterError::NotNow(why)) => why,
        other => panic!("{other:?}"),
    };
    // Whoever is asked, leader or not, says the same.
    for node in 1..=3 {
        for approved in [true, false] {
            assert_eq!(c.change(node, 9, approved), Err(VoterError::NotJoined(NodeId(9))));
            assert!(refused(c.change(node, 0, approved)).contains("begin at 1"));
        }
    }
    assert_eq!(c.change(1, 2, true), Ok(()), "it is one already");
    // One of three away: the other two are needed.
    c.s.world.kill(NodeId(2));
    c.until(5_000, "noticed", |w| w.alive().iter().all(|n| !w.host(*n).unwrap().view().nodes[&NodeId(2)].live));
    for node in [1, 3] {
        assert!(not_now(c.change(node, 3, false)).contains("no majority"), "two left, one of them away");
    }
    assert_eq!(c.s.world.approved(), [NodeId(1), NodeId(2), NodeId(3)]);
    // With another it can be taken out, though it does not answer.
    assert_eq!(c.change(3, 4, true), Ok(()));
    assert_eq!(c.change(3, 2, false), Ok(()));
    for node in [1, 3] {
        assert!(not_now(c.change(node, 2, true)).contains("does not answer"), "it has been one, and is away");
    }
    c.until(MOVED_MS, "replaced", Cluster::settled);
    assert!(c.at().values().all(|n| *n == [1, 3, 4]), "{:?}", c.at());
    // And is a gateway when it comes back.
    c.s.world.start(NodeId(2));
    c.until(10_000, "back", |w| w.host(NodeId(2)).unwrap().view().not_ready.is_none());
    assert!(!c.holders().contains(&2));

    let mut one = Cluster::new(Options { nodes: 1, shards: 1, ..Options::default() });
    assert!(refused(one.change(1, 1, false)).contains("last voter"));
}

#[test]
fn moves_go_on_when_the_leader_that_planned_them_dies() {
    let mut c = Cluster::new(Options { nodes: 4, spares: 1, shards: 6, ..Options::default() });
    c.s.world.conditions.delay = (2 * MS, 10 * MS);
    assert_eq!(c.change(1, 5, true), Ok(()));
    c.until(5_000, "moves have begun", |w| {
        w.ids().iter().any(|n| w.host(*n).unwrap().coordinator().replicas().any(|r| r.members().is_joint()))
    });
    let planner = c.s.world.leader(ShardId::META).unwrap();
    c.s.world.kill(planner);
    c.asked.clear();
    c.until(5_000, "another leads", |w| w.leader(ShardId::META).is_some_and(|n| n != planner));
    c.s.world.start(planner);
    c.until(MOVED_MS, "all in place", |w| w.alive().len() == 5 && Cluster::settled(w) && w.whole(planner));
    let at = c.at();
    assert!(at.iter().all(|(s, n)| n.len() == if s.is_meta() { 5 } else { 3 }), "{at:?}");
}

#[test]
fn a_change_that_is_taken_back_leaves_no_trace() {
    for after in [0, 20, 60, 120, 200, 300, 500, 1_000] {
        let mut c = Cluster::new(Options { spares: 1, shards: 4, seed: after + 1, ..Options::default() });
        let before = c.at();
        assert_eq!(c.change(2, 4, true), Ok(()));
        c.pass(after);
        assert_eq!(c.change(3, 4, false), Ok(()));
        c.until(MOVED_MS, "back", |w| Cluster::settled(w) && w.holders(SHARD).len() == 3);
        c.until(5_000, "nothing is left there", |w| w.host(NodeId(4)).unwrap().coordinator().replicas().count() == 0);
        assert_eq!(c.at(), before, "after {after} ms");
        c.all_answered();
    }
}

#[test]
fn no_two_replicas_of_a_shard_are_in_one_zone_while_zones_suffice() {
    let mut c = Cluster::new(Options { nodes: 3, spares: 3, zones: 3, shards: 8, ..Options::default() });
    for node in 4..=6 {
        assert_eq!(c.change(1, node, true), Ok(()));
    }
    c.until(MOVED_MS, "grown", |w| Cluster::settled(w) && w.approved().len() == 6);
    for (shard, nodes) in c.at().into_iter().filter(|(s, _)| !s.is_meta()) {
        let zones: BTreeSet<u64> = nodes.iter().map(|n| n % 3).collect();
        assert_eq!(zones.len(), 3, "{shard:?} on {nodes:?}");
    }
    // A whole zone goes: the others take over, two of three in one of them.
    assert_eq!(c.change(1, 3, false), Ok(()));
    assert_eq!(c.change(1, 6, false), Ok(()));
    c.until(MOVED_MS, "without a zone", |w| Cluster::settled(w) && w.approved().len() == 4);
    assert!(c.at().values().all(|n| n.len() == 3 && n.iter().all(|n| n % 3 != 0)));
    c.all_answered();
}

#[test]
fn what_is_automatic_waits_replaces_one_and_leaves_alone_what_an_operator_decided() {
    let auto_voters = AutoVoters { add: true, remove: true, after: Duration::from_secs(5) };
    let mut c = Cluster::new(Options { spares: 2, shards: 3, auto_voters, ..Options::default() });
    assert_eq!(c.change(1, 5, false), Ok(()), "no voter, and by an operator's word never one");
    c.pass(3_000);
    assert_eq!(c.s.world.approved().len(), 3, "not yet");
    c.until(MOVED_MS, "node 4 is given replicas", |w| w.approved().len() == 4 && Cluster::settled(w));
    c.all_answered();
    // Shorter than that, nothing happens; longer, its replicas go to others.
    c.s.world.pause(NodeId(2));
    c.pass(3_000);
    c.s.world.resume(NodeId(2));
    c.pass(7_000);
    assert_eq!(c.s.world.approved().len(), 4);
    c.s.world.kill(NodeId(2));
    c.until(MOVED_MS, "taken out", |w| !w.approved().contains(&NodeId(2)) && Cluster::settled(w));
    assert!(c.at().values().all(|n| *n == [1, 3, 4]), "{:?}", c.at());
    // Of three left none can be replaced.
    c.s.world.kill(NodeId(4));
    c.pass(9_000);
    assert_eq!(c.s.world.approved().len(), 3);
    // Both come back: the one as what it was, the other as a new voter.
    c.s.world.start(NodeId(4));
    c.s.world.start(NodeId(2));
    c.until(MOVED_MS, "four again", |w| w.approved().len() == 4 && Cluster::settled(w));
    assert!(!c.s.world.approved().contains(&NodeId(5)));
}

#[test]
fn a_lie_about_a_leader_costs_a_hop_and_no_more() {
    let mut s = Story::with(Options { nodes: 3, spares: 1, ..Options::default() }, |_| {});
    let leader = s.leader();
    let term = s.replica(leader).unwrap().leadership().term;
    for at in s.world.ids() {
        for liar in s.world.ids().into_iter().filter(|n| *n != leader && *n != at) {
            for later in [1, 1_000_000] {
                s.world.gossip_lie(at, LeaderHint { shard: SHARD, leader: liar, term: Term(term.0 + later) });
                s.run(1);
                let conn = s.world.connect();
                let asked = s.ask(at, conn, "k", &set("v"), PATIENCE);
                let answer = s.answer(asked, 60);
                assert_eq!(answer, Some(ClientResult::Reply(Reply::Ok)), "{at:?} was told of {liar:?}");
            }
        }
    }
    assert_eq!(s.leader(), leader, "no election came of it");
    assert_eq!(s.replica(leader).unwrap().leadership().term, term);
    assert_eq!(s.world.approved().len(), 3, "nor a voter");
}

/// The leader has invited its voters to sleep when placement changes: no request would ever wake it.
#[test]
fn a_group_that_is_about_to_fall_asleep_moves_nevertheless() {
    for quiet_ms in (0..4_000).step_by(20) {
        let mut c = Cluster::new(Options { spares: 2, shards: 6, ..Options::default() });
        // Long enough on the way that some group is just being invited.
        c.s.world.conditions.delay = (20 * MS, 40 * MS);
        c.s.run(quiet_ms);
        c.s.world.change_voters(NodeId(1), NodeId(4), true);
        c.s.wait(15_000, "moved though nobody asks for anything", |w| w.approved().len() == 4 && Cluster::settled(w));
    }
}
