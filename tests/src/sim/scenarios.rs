//! Stories with a known end: no chance in what happens, only in the delays within a millisecond.

use super::model::Command;
use super::world::{Block, MS, Options, World};
use crema_core::{NodeId, Reply, ShardId};
use crema_shard::message::{KIND_ANSWERS, KIND_REQUESTS};
use crema_shard::{ClientResult, ConnId, Token};
use std::collections::BTreeMap;
use std::time::Duration;

const SHARD: ShardId = ShardId(0);
const PATIENCE: Duration = Duration::from_secs(5);

/// A cluster, and what its clients were answered.
struct Story {
    world: World,
    answers: BTreeMap<(ConnId, Token), ClientResult>,
}

impl Story {
    /// Three nodes, one shard, ready.
    fn begin() -> Story {
        let mut s =
            Story { world: World::new(Options { seed: 1, shards: 1, ..Options::default() }), answers: BTreeMap::new() };
        let ready = |w: &World| {
            w.ids().iter().all(|n| w.host(*n).is_some_and(|h| h.view().not_ready.is_none()))
                && w.leader(SHARD).is_some()
        };
        assert!(s.world.run_until(Duration::from_secs(5), ready), "founded");
        s
    }

    fn leader(&self) -> NodeId {
        self.world.leader(SHARD).expect("a leader")
    }

    fn others(&self, node: NodeId) -> [NodeId; 2] {
        let rest: Vec<NodeId> = self.world.ids().into_iter().filter(|n| *n != node).collect();
        [rest[0], rest[1]]
    }

    fn ask(&mut self, node: NodeId, conn: ConnId, key: &str, command: &Command, patience: Duration) -> (ConnId, Token) {
        let token = self.world.submit(node, conn, key, command.is_write(), command.encode(key), patience);
        (conn, token.expect("the gateway knows the placement"))
    }

    fn gather(&mut self) {
        for f in std::mem::take(&mut self.world.finished) {
            self.answers.insert((f.conn, f.token), f.result);
        }
        assert!(self.world.violations.is_empty(), "{:?}\n{}", self.world.violations, self.world.trace.tail(60));
    }

    fn run(&mut self, ms: u64) {
        self.world.run_for(Duration::from_millis(ms));
        self.gather();
    }

    /// The answer, if it comes within the time.
    fn answer(&mut self, of: (ConnId, Token), ms: u64) -> Option<ClientResult> {
        for _ in 0..ms.div_ceil(10) {
            if self.answers.contains_key(&of) {
                break;
            }
            self.run(10);
        }
        self.answers.get(&of).cloned()
    }

    /// Asks on a connection of its own and waits for the answer.
    #[track_caller]
    fn expect(&mut self, node: NodeId, key: &str, command: Command, reply: Reply) {
        let conn = self.world.connect();
        let asked = self.ask(node, conn, key, &command, PATIENCE);
        let got = self.answer(asked, 6_000);
        assert_eq!(got, Some(ClientResult::Reply(reply)), "{command:?} at {node:?}\n{}", self.world.trace.tail(60));
    }

    fn asleep(&self, node: NodeId) -> bool {
        self.world.host(node).and_then(|h| h.coordinator().replica(SHARD)).is_some_and(|r| r.asleep())
    }

    #[track_caller]
    fn wait(&mut self, limit_ms: u64, what: &str, condition: impl FnMut(&World) -> bool) {
        let reached = self.world.run_until(Duration::from_millis(limit_ms), condition);
        self.gather();
        assert!(reached, "{what}\n{}", self.world.trace.tail(60));
    }
}

fn set(v: &str) -> Command {
    Command::Set(v.into())
}
fn bulk(v: &str) -> Reply {
    Reply::Bulk(v.as_bytes().to_vec().into())
}
fn replied(r: &Option<ClientResult>) -> bool {
    matches!(r, Some(ClientResult::Reply(_)))
}

#[test]
fn a_leader_without_followers_acknowledges_nothing() {
    let mut s = Story::begin();
    let leader = s.leader();
    s.expect(leader, "k", set("before"), Reply::Ok);
    s.world.isolate(leader);
    let conn = s.world.connect();
    let write = s.ask(leader, conn, "k", &set("alone"), PATIENCE);
    s.run(4_900);
    assert!(!s.answers.contains_key(&write), "nothing acknowledges it, and its deadline is not over");
    // A leader that lost its followers long ago took it, so its fate is open. It must not be called refused: a copy of
    // it stands in that leader's log.
    assert_eq!(s.answer(write, 300), Some(ClientResult::Unknown));
    // Meanwhile the others go on, and when the old leader is back its entry has lost.
    let [other, _] = s.others(leader);
    s.expect(other, "k", Command::Get, bulk("before"));
    s.expect(other, "k", set("after"), Reply::Ok);
    s.world.heal_cuts();
    s.run(3_000);
    for node in s.world.ids() {
        s.expect(node, "k", Command::Get, bulk("after"));
    }
}

#[test]
fn a_stale_leader_in_a_minority_never_answers_a_linearizable_read() {
    let mut s = Story::begin();
    let leader = s.leader();
    s.expect(leader, "k", set("old"), Reply::Ok);
    s.world.isolate(leader);
    let [other, _] = s.others(leader);
    let mut reads = Vec::new();
    // Asked again and again: while it does not know yet that it is cut off, and after.
    for _ in 0..30 {
        let conn = s.world.connect();
        reads.push(s.ask(leader, conn, "k", &Command::Get, Duration::from_secs(2)));
        s.run(100);
        for r in &reads {
            assert!(!replied(&s.answers.get(r).cloned()), "a read was answered in a minority");
        }
    }
    s.expect(other, "k", set("new"), Reply::Ok);
    s.run(2_500);
    for r in &reads {
        assert!(matches!(s.answers.get(r), Some(ClientResult::NotApplied(_))), "{:?}", s.answers.get(r));
    }
    s.world.heal_cuts();
    s.expect(leader, "k", Command::Get, bulk("new"));
}

#[test]
fn a_read_that_waits_at_a_stale_leader_sees_what_was_written_since() {
    let mut s = Story::begin();
    let leader = s.leader();
    s.expect(leader, "k", set("old"), Reply::Ok);
    s.world.isolate(leader);
    let conn = s.world.connect();
    let read = s.ask(leader, conn, "k", &Command::Get, PATIENCE);
    s.run(50);
    let [other, _] = s.others(leader);
    s.expect(other, "k", set("new"), Reply::Ok);
    assert!(!s.answers.contains_key(&read));
    s.world.heal_cuts();
    assert_eq!(s.answer(read, 5_000), Some(ClientResult::Reply(bulk("new"))));
}

#[test]
fn a_restarted_node_never_votes() {
    let mut s = Story::begin();
    let leader = s.leader();
    s.expect(leader, "k", set("kept"), Reply::Ok);
    let [lost, cut] = s.others(leader);
    let term = s.world.host(leader).and_then(|h| h.coordinator().replica(SHARD)).map(|r| r.leadership().term);
    s.world.kill(lost);
    s.world.isolate(cut);
    s.run(1_000);
    s.world.start(lost);
    // The restarted node is a gateway, connected to the one voter that is left; nothing makes it a second voter.
    let conn = s.world.connect();
    let write = s.ask(leader, conn, "k", &set("forged"), PATIENCE);
    for _ in 0..100 {
        s.run(100);
        assert!(s.world.host(lost).is_some_and(|h| h.coordinator().replica(SHARD).is_none()), "it holds no replica");
        let led = s.world.leader(SHARD).and_then(|n| s.world.host(n)).and_then(|h| h.coordinator().replica(SHARD));
        assert!(led.is_none_or(|r| Some(r.leadership().term) == term), "nobody is elected");
        assert!(!replied(&s.answers.get(&write).cloned()), "no quorum, no acknowledgement");
    }
    assert!(s.world.leader(SHARD).is_none(), "the old leader has stepped down");
    // The voter that kept its memory comes back: that is a quorum, and the restarted node serves as a gateway.
    s.world.heal_cuts();
    s.run(3_000);
    s.expect(lost, "k", set("again"), Reply::Ok);
    s.expect(cut, "k", Command::Get, bulk("again"));
}

#[test]
fn a_retried_increment_applies_once() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [gateway, other] = s.others(leader);
    s.expect(gateway, "n", Command::Incr, Reply::Int(1));
    // The leader executes it, but its answers do not arrive.
    s.world.blocks.push(Block { from: Some(leader), to: Some(gateway), kind: Some(KIND_ANSWERS) });
    let conn = s.world.connect();
    let asked = s.ask(gateway, conn, "n", &Command::Incr, PATIENCE);
    s.run(300);
    assert!(!s.answers.contains_key(&asked));
    let applied = |s: &Story, n| s.world.host(n).and_then(|h| h.coordinator().replica(SHARD)).map(|r| r.applied());
    let before = applied(&s, leader);
    // The leader falls silent for good; the gateway tries again with the next one.
    s.world.isolate(leader);
    assert_eq!(s.answer(asked, 5_000), Some(ClientResult::Reply(Reply::Int(2))), "{}", s.world.trace.tail(40));
    assert_ne!(s.leader(), leader);
    assert!(applied(&s, other) > before, "another copy went through the log");
    s.expect(gateway, "n", Command::Get, bulk("2"));
    s.world.blocks.clear();
    s.world.heal_cuts();
    s.run(3_000);
    s.expect(leader, "n", Command::Incr, Reply::Int(3));
}

#[test]
fn the_order_of_a_connection_survives_a_change_of_leader() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [gateway, _] = s.others(leader);
    s.expect(gateway, "k", set("0"), Reply::Ok);
    // Requests reach the old leader, whose answers are lost; then it dies in the middle of the pipeline.
    s.world.blocks.push(Block { from: Some(leader), to: Some(gateway), kind: Some(KIND_ANSWERS) });
    let conn = s.world.connect();
    let mut asked = Vec::new();
    for i in 1..=20 {
        let v = i.to_string();
        asked.push((s.ask(gateway, conn, "k", &set(&v), PATIENCE), Reply::Ok));
        asked.push((s.ask(gateway, conn, "k", &Command::Get, PATIENCE), bulk(&v)));
        if i == 10 {
            s.run(20);
            // From here on not even the requests arrive.
            s.world.blocks.push(Block { from: Some(gateway), to: Some(leader), kind: Some(KIND_REQUESTS) });
        }
    }
    s.run(20);
    s.world.kill(leader);
    for (request, reply) in asked {
        assert_eq!(s.answer(request, 5_000), Some(ClientResult::Reply(reply)), "{}", s.world.trace.tail(40));
    }
    assert_ne!(s.leader(), leader);
    s.expect(gateway, "k", Command::Get, bulk("20"));
}

#[test]
fn a_sleeping_group_wakes_for_a_write() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [gateway, _] = s.others(leader);
    s.expect(gateway, "k", set("a"), Reply::Ok);
    s.run(4_000);
    for node in s.world.ids() {
        assert!(s.asleep(node), "{node:?} sleeps after more than 40 quiet ticks");
    }
    let begun = s.world.now();
    s.expect(gateway, "k", set("b"), Reply::Ok);
    assert!(s.world.now() - begun <= 100 * MS, "without an election");
    assert_eq!(s.leader(), leader);
    s.run(4_000);
    assert!(s.world.ids().into_iter().all(|n| s.asleep(n)), "and sleeps again");
    // A read wakes it too.
    s.expect(gateway, "k", Command::Get, bulk("b"));
}

#[test]
fn a_sleeping_group_notices_the_loss_of_its_leader() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [gateway, _] = s.others(leader);
    s.expect(gateway, "k", set("a"), Reply::Ok);
    s.run(4_000);
    assert!(s.world.ids().into_iter().all(|n| s.asleep(n)));
    s.world.kill(leader);
    // No client asks for anything: the loss alone wakes the others.
    s.wait(3_000, "a new leader without any request", |w| w.leader(SHARD).is_some_and(|n| n != leader));
    s.expect(gateway, "k", Command::Get, bulk("a"));
    s.expect(gateway, "k", set("b"), Reply::Ok);
}

#[test]
fn a_sleeping_group_outlives_the_silence_of_a_follower() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [gateway, silent] = s.others(leader);
    s.expect(gateway, "k", set("a"), Reply::Ok);
    s.run(4_000);
    assert!(s.world.ids().into_iter().all(|n| s.asleep(n)));
    s.world.pause(silent);
    s.run(2_000);
    s.expect(gateway, "k", set("b"), Reply::Ok);
    s.world.resume(silent);
    s.run(1_000);
    s.expect(silent, "k", Command::Get, bulk("b"));
    s.run(4_000);
    assert!(s.world.ids().into_iter().all(|n| s.asleep(n)), "all are back, and all sleep");
}
