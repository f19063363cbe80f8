//! Leases, and reads that are on their way when one ends.

use super::*;
use crema_core::{Found, KeyRef, Op, Reply, Seen, Term};
use crema_shard::message::KIND_RAFT;
use crema_shard::{LeaderHint, ReadLevel};

/// A reader outside of the driver that stands between two of its steps.
pub(super) enum Reader {
    Begun(Seen),
    Found(Seen, Found<Reply>),
}

fn get() -> Op<'static> {
    Op::Get { key: KeyRef::new(0, b"k").expect("a short key") }
}

/// One reader before and one after its look at the value.
pub(super) fn readers(p: &Published) -> [Reader; 2] {
    let begin = || p.begin().expect("the cell is open");
    [Reader::Begun(begin()), Reader::Found(begin(), p.observe(&get()).expect("a key of the shard"))]
}

/// What the reader would answer if it took its remaining steps now.
pub(super) fn finish(s: &Story, node: NodeId, p: &Published, reader: &Reader) -> Option<Reply> {
    let (seen, found) = match reader {
        Reader::Begun(seen) => (*seen, p.observe(&get())?),
        Reader::Found(seen, found) => (*seen, found.clone()),
    };
    p.finish(seen, found.expire_at, s.world.clock(node).mono).then_some(found.answer)
}

/// tikv 8034: whoever reads outside of the driver must know before anybody else can act on the transfer.
#[test]
fn readers_between_their_steps_do_not_survive_a_transfer_nor_its_return() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [to, _] = s.others(leader);
    s.expect(leader, "k", set("old"), Reply::Ok);
    let p = s.published(leader);
    let held = readers(&p);
    for r in &held {
        assert_eq!(finish(&s, leader, &p, r), Some(bulk("old")), "as long as nothing has happened");
    }
    // Both have all entries, so that the TimeoutNow leaves at once.
    s.run(20);
    // Nothing arrives at the old leader, so what closes the cell is its own step and nothing that it learns.
    s.world.blocks.push(Block { from: None, to: Some(leader), kind: Some(KIND_RAFT) });
    s.world.transfer(leader, SHARD, to);
    s.wait(100, "the transfer", |w| w.leader(SHARD) == Some(to));
    for r in &held {
        assert_eq!(finish(&s, leader, &p, r), None);
    }
    assert!(p.begin().is_none());
    assert!(s.replica(leader).is_some_and(|r| r.leadership().leads), "it does not know yet that another leads");
    s.world.blocks.clear();
    s.expect(to, "k", set("new"), Reply::Ok);
    // Leadership and lease come back: the same cell is open again, but not for those who came before.
    s.run(150);
    s.hand_over(leader);
    s.expect(leader, "k", set("newer"), Reply::Ok);
    assert!(p.begin().is_some());
    for r in &held {
        assert_eq!(finish(&s, leader, &p, r), None);
    }
}

/// tikv 9208: a new leader does not know yet what its predecessor committed.
#[test]
fn an_index_asked_for_right_after_a_transfer_covers_what_the_old_leader_acknowledged() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [next, third] = s.others(leader);
    s.expect(leader, "k", set("old"), Reply::Ok);
    s.run(300);
    // The third does not get the next entry; the next leader does, but is not told that it is committed.
    s.world.blocks.push(Block { from: Some(leader), to: Some(third), kind: Some(KIND_RAFT) });
    s.expect(leader, "k", set("new"), Reply::Ok);
    assert_eq!(s.replica(next).map(|r| r.committed()), s.replica(third).map(|r| r.committed()));
    s.world.transfer(leader, SHARD, next);
    s.wait(100, "the transfer", |w| w.leader(SHARD) == Some(next));
    // Elected, but its first entry is acknowledged by nobody: its index is one of the term before.
    s.world.blocks = vec![
        Block { from: None, to: Some(next), kind: Some(KIND_RAFT) },
        Block { from: None, to: Some(third), kind: Some(KIND_RAFT) },
    ];
    let term = s.replica(next).map_or(Term(0), |r| r.leadership().term);
    s.world.gossip_hint(third, LeaderHint { shard: SHARD, leader: next, term });
    s.run(10);
    s.world.trace.keep_all();
    let before = s.world.trace.events();
    let conn = s.world.connect();
    let ops = Command::Get.encode("k");
    let asked = s.world.submit_read(third, conn, "k", ops, ReadLevel::Bounded(Duration::from_secs(60)), PATIENCE);
    let asked = (conn, asked.expect("founded"));
    s.run(200);
    let trace = s.world.trace.tail((s.world.trace.events() - before) as usize);
    assert!(trace.contains(&format!("{third:?} > {next:?} [{SHARD:?} #")) && trace.contains("ReadIndex]"), "{trace}");
    assert_eq!(s.answers.get(&asked), None, "nobody knows one");
    s.world.blocks.clear();
    assert_eq!(s.answer(asked, 3_000), Some(ClientResult::Reply(bulk("new"))));
}

/// tikv 12046: two nodes that take each other for the leader do not send a request to and fro.
#[test]
fn a_request_for_an_index_goes_one_hop() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [a, b] = s.others(leader);
    s.expect(a, "k", set("v"), Reply::Ok);
    s.world.conditions.gossip = None;
    s.world.kill(leader);
    // Nobody is elected meanwhile.
    s.world.blocks.push(Block { from: None, to: None, kind: Some(KIND_RAFT) });
    s.run(100);
    let lie = |leader| LeaderHint { shard: SHARD, leader, term: Term(50) };
    s.world.gossip_hint(a, lie(b));
    s.world.gossip_hint(b, lie(a));
    s.run(5);
    s.world.trace.keep_all();
    let before = s.world.trace.events();
    let conn = s.world.connect();
    let ops = Command::Get.encode("k");
    let level = ReadLevel::Bounded(Duration::from_secs(60));
    let asked = (conn, s.world.submit_read(a, conn, "k", ops, level, Duration::from_secs(1)).expect("founded"));
    assert!(matches!(s.answer(asked, 1_500), Some(ClientResult::NotApplied(_))), "{:?}", s.answers.get(&asked));
    let trace = s.world.trace.tail((s.world.trace.events() - before) as usize);
    assert_eq!(trace.matches("ReadIndex]").count(), 1, "asked once, not passed on\n{trace}");
    let reads = trace.matches(" Read]").count();
    assert!(reads <= 15, "{reads} attempts at the gateway's own pace\n{trace}");
}
