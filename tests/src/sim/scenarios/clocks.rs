//! Clocks that run while processes do not.

use super::leases::{finish, readers};
use super::*;

/// A leader stands still while its clock runs; its readers wake before its driver does.
#[test]
fn readers_of_a_leader_that_stood_still_answer_nothing_old() {
    let mut s = Story::begin();
    let leader = s.leader();
    let [other, _] = s.others(leader);
    s.expect(leader, "k", set("old"), Reply::Ok);
    let p = s.published(leader);
    let held = readers(&p);
    // A crowd of others, somewhere in their steps.
    let mut crowd = Vec::new();
    for _ in 0..100 {
        let conn = s.world.connect();
        crowd.push(s.ask(leader, conn, "k", &Command::Get, PATIENCE));
    }
    s.world.run_for(Duration::from_micros(20));
    s.world.pause(leader);
    s.gather();
    crowd.retain(|r| !s.answers.contains_key(r));
    assert!(crowd.len() > 10, "some are on their way");
    // Not as long as the lease: nobody else leads, so the old value is right.
    s.run(200);
    assert_eq!(s.leader(), leader);
    assert_eq!(finish(&s, leader, &p, &held[1]), Some(bulk("old")));
    s.wait(5_000, "another leader", |w| w.leader(SHARD).is_some_and(|n| n != leader));
    s.expect(other, "k", set("new"), Reply::Ok);
    // The driver has not closed the cell: only the clock says that the lease is over.
    assert!(p.begin().is_some(), "the driver stands still");
    for r in held.iter().chain(&readers(&p)) {
        assert_eq!(finish(&s, leader, &p, r), None);
    }
    s.world.resume(leader);
    for _ in 0..10 {
        let conn = s.world.connect();
        crowd.push(s.ask(leader, conn, "k", &Command::Get, PATIENCE));
    }
    for r in crowd {
        assert_eq!(s.answer(r, 5_000), Some(ClientResult::Reply(bulk("new"))));
    }
}
