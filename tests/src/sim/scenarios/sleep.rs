//! Quiet groups fall asleep, and wake for whatever matters.

use super::*;

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

/// tikv 16429, cockroach 26257: a quiet group never elects, or its leadership goes to and fro.
#[test]
fn a_group_that_lost_its_leader_in_its_sleep_elects_once_and_stays_with_it() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [gateway, _] = s.others(leader);
    s.expect(gateway, "k", set("a"), Reply::Ok);
    s.run(4_000);
    assert!(s.world.ids().into_iter().all(|n| s.asleep(n)));
    let standing = |s: &Story| s.world.leader(SHARD).and_then(|n| s.replica(n)).map(|r| r.leadership());
    let before = standing(&s).expect("a leader").term;
    s.world.kill(leader);
    s.wait(3_000, "a new leader", |w| w.leader(SHARD).is_some_and(|n| n != leader));
    s.run(1_000);
    let elected = standing(&s);
    assert!(elected.is_some_and(|l| l.term.0 <= before.0 + 2), "{elected:?} after {before:?}: elected at once");
    // Quiet for half a minute, one voter missing.
    for second in 0..30 {
        s.run(1_000);
        assert_eq!(standing(&s), elected, "in second {second}");
    }
    // The node comes back and is filled, though nobody asks for anything; then all sleep.
    s.world.start(leader);
    s.wait(10_000, "a voter again", |w| w.whole(leader));
    s.wait(10_000, "sleep", |w| w.ids().iter().all(|n| replica(w, *n).is_some_and(|r| r.asleep())));
    s.expect(leader, "k", Command::Get, bulk("a"));
}
