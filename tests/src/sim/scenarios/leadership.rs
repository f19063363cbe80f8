//! Who leads, who may vote, and what a leader without its quorum does.

use super::*;

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

/// Every node confirms reads by rounds.
fn without_leases() -> Story {
    Story::with(Options { read_index: 1_000, ..Options::default() }, |_| {})
}

#[test]
fn a_stale_leader_in_a_minority_never_answers_a_linearizable_read() {
    let mut s = without_leases();
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
fn a_leader_with_a_lease_answers_in_a_minority_until_the_lease_ends_and_never_after() {
    let mut s = Story::begin();
    let leader = s.leader();
    s.expect(leader, "k", set("old"), Reply::Ok);
    let lease = s.published(leader).begin().expect("the write has renewed it").bound;
    s.world.isolate(leader);
    let [other, _] = s.others(leader);
    let mut reads = Vec::new();
    let mut last_leased = None;
    for i in 0..30 {
        let leased = s.world.clock(leader).mono.0 < lease;
        let conn = s.world.connect();
        reads.push(s.ask(leader, conn, "k", &Command::Get, Duration::from_secs(2)));
        // Longer than a reader takes for its steps.
        s.run(20);
        // One that came just before the end may be late for it.
        let near = s.world.clock(leader).mono.0 >= lease;
        match s.answers.get(&reads[i]) {
            Some(ClientResult::Reply(r)) if leased => assert_eq!(*r, bulk("old")),
            Some(other) => panic!("{other:?} without a lease"),
            None => assert!(!leased || near, "the lease was not used"),
        }
        if leased && !near {
            last_leased = Some(i);
        }
        s.run(80);
    }
    let last_leased = last_leased.expect("it had a lease");
    s.expect(other, "k", set("new"), Reply::Ok);
    s.run(2_500);
    for r in &reads[last_leased + 2..] {
        assert!(matches!(s.answers.get(r), Some(ClientResult::NotApplied(_))), "{:?}", s.answers.get(r));
    }
    s.world.heal_cuts();
    s.expect(leader, "k", Command::Get, bulk("new"));
}

#[test]
fn a_read_that_waits_at_a_stale_leader_sees_what_was_written_since() {
    for mut s in [Story::begin(), without_leases()] {
        let leader = s.leader();
        s.expect(leader, "k", set("old"), Reply::Ok);
        s.world.isolate(leader);
        // Until a lease has ended: a read under it would not wait.
        s.run(430);
        let conn = s.world.connect();
        let read = s.ask(leader, conn, "k", &Command::Get, PATIENCE);
        s.run(50);
        let [other, _] = s.others(leader);
        s.expect(other, "k", set("new"), Reply::Ok);
        assert!(!s.answers.contains_key(&read));
        s.world.heal_cuts();
        assert_eq!(s.answer(read, 5_000), Some(ClientResult::Reply(bulk("new"))));
    }
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

/// tikv 15035: one follower is isolated, the other restarts.
#[test]
fn a_restarted_follower_gives_nobody_a_second_lease() {
    let mut s = Story::begin();
    let leader = s.leader();
    s.expect(leader, "k", set("old"), Reply::Ok);
    let [restarted, cut] = s.others(leader);
    s.world.isolate(cut);
    s.run(100);
    s.world.kill(restarted);
    s.world.start(restarted);
    // Longer than promise and election: the one that was cut off asks for votes all the time, and the restarted one would
    // be its quorum. First it hears nobody, then the restarted one only.
    let mut most = 0;
    for i in 0..300 {
        s.run(10);
        let holders = lease_holders(&s.world);
        most = most.max(holders.len());
        assert!(holders.iter().all(|n| *n == leader), "{holders:?}");
        if i == 100 {
            s.world.heal_one_way(cut, restarted);
            s.world.heal_one_way(restarted, cut);
        }
    }
    assert_eq!(most, 1, "the old leader had one");
    assert_eq!(lease_holders(&s.world), [], "and it ended");
    assert!(s.replica(restarted).is_none());
    assert_eq!(s.world.leader(SHARD), None);
    let conn = s.world.connect();
    let read = s.ask(leader, conn, "k", &Command::Get, Duration::from_millis(500));
    assert!(matches!(s.answer(read, 1_000), Some(ClientResult::NotApplied(_))));
    s.world.heal_cuts();
    s.run(2_000);
    s.expect(restarted, "k", set("new"), Reply::Ok);
    s.expect(cut, "k", Command::Get, bulk("new"));
}

/// dragonboat 256, curvine 1551 and their like: a follower that lost its memory comes back, twice.
#[test]
fn a_node_that_lost_its_memory_twice_is_another_voter_each_time() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [wiped, other] = s.others(leader);
    s.expect(leader, "k", set("0"), Reply::Ok);
    let mut seen = std::collections::BTreeSet::from([s.replica(wiped).expect("a replica").id()]);
    for life in 1..=2 {
        s.world.kill(wiped);
        s.run(200);
        s.world.start(wiped);
        s.wait(5_000, "whole again", |w| w.whole(wiped));
        assert!(seen.insert(s.replica(wiped).expect("a replica").id()), "an id is used once");
        let value = life.to_string();
        s.expect(wiped, "k", set(&value), Reply::Ok);
    }
    // It counts: with it and without one of the others there is a quorum that has everything.
    s.world.isolate(other);
    s.run(3_000);
    s.expect(wiped, "k", Command::Get, bulk("2"));
}

/// etcd 14370: the only voter is its own quorum, and still not before its entry is durable.
#[test]
fn a_single_voter_acknowledges_nothing_before_it_is_durable() {
    let mut s = Story::with(Options { nodes: 1, replication: 1, ..Options::default() }, |_| {});
    let only = s.leader();
    s.expect(only, "k", set("a"), Reply::Ok);
    s.world.conditions.persist = Some((300 * MS, 301 * MS));
    let conn = s.world.connect();
    let write = s.ask(only, conn, "k", &set("b"), PATIENCE);
    s.run(290);
    assert!(!s.answers.contains_key(&write));
    s.expect(only, "k", Command::Get, bulk("a"));
    assert_eq!(s.answer(write, 100), Some(ClientResult::Reply(Reply::Ok)));
    s.expect(only, "k", Command::Get, bulk("b"));
}
