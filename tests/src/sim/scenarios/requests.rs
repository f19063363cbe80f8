//! Each request once, and in the order of its connection.

use super::*;

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
