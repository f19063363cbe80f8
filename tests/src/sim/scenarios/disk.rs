//! Nodes that keep their logs on disk: what a restart brings back, and what it must not.

use super::{SHARD, Story, bulk, replica, set};
use crate::sim::model::Command;
use crate::sim::world::{MS, Options, World};
use crema_core::Reply;
use crema_shard::ClientResult;

/// Three nodes with disks, and states that are written soon and in small pieces.
fn durable() -> Story {
    let options = Options { durable: 1_000, checkpoint_log_bytes: 3_000, chunk_bytes: 100, ..Options::default() };
    Story::with(options, |_| {})
}

fn fill(s: &mut Story, keys: std::ops::Range<u32>) {
    for i in keys {
        let gateway = s.world.ids()[i as usize % 3];
        s.expect(gateway, &format!("key{i}"), set(&format!("value {i}")), Reply::Ok);
    }
}

fn outage(s: &mut Story) {
    for node in s.world.ids() {
        s.world.kill(node);
    }
    s.run(500);
    for node in s.world.ids() {
        s.world.start(node);
    }
    s.wait(10_000, "all whole", |w| w.ids().into_iter().all(|n| w.whole(n)) && w.leader(SHARD).is_some());
}

fn equal(w: &World) -> bool {
    let states: Vec<_> = w.ids().iter().filter_map(|n| replica(w, *n)).map(|r| (r.applied(), r.digest())).collect();
    states.len() == 3 && states.windows(2).all(|p| p[0] == p[1])
}

#[test]
fn an_outage_of_all_nodes_loses_nothing_that_was_acknowledged() {
    let mut s = durable();
    for round in 0..4 {
        fill(&mut s, round * 50..round * 50 + 50);
        outage(&mut s);
        for i in 0..(round + 1) * 50 {
            let gateway = s.world.ids()[i as usize % 3];
            s.expect(gateway, &format!("key{i}"), Command::Get, bulk(&format!("value {i}")));
        }
        s.wait(3_000, "equal states", equal);
    }
}

#[test]
fn what_was_not_durable_was_not_acknowledged() {
    let mut s = durable();
    fill(&mut s, 0..10);
    s.world.conditions.persist = Some((400 * MS, 401 * MS));
    let node = s.leader();
    let conn = s.world.connect();
    let write = s.ask(node, conn, "late", &set("v"), super::PATIENCE);
    s.run(350);
    assert!(!s.answers.contains_key(&write), "on no disk yet");
    s.world.conditions.persist = None;
    assert_eq!(s.answer(write, 2_000), Some(ClientResult::Reply(Reply::Ok)));
    outage(&mut s);
    let gateway = s.world.ids()[0];
    s.expect(gateway, "late", Command::Get, bulk("v"));
}

/// tikv 15035 with disks: a voter that comes back has promised its leader something that it does not remember.
#[test]
fn a_restarted_voter_elects_nobody_for_as_long_as_it_may_have_promised() {
    let mut s = durable();
    let leader = s.leader();
    fill(&mut s, 0..5);
    let [restarted, cut] = s.others(leader);
    s.world.isolate(cut);
    // Until the one that is cut off asks for votes, and the leader's lease rests on the other alone.
    s.run(1_500);
    let term = s.replica(leader).expect("a leader").leadership().term;
    s.world.kill(restarted);
    s.world.start(restarted);
    s.world.heal_one_way(cut, restarted);
    s.world.heal_one_way(restarted, cut);
    s.world.cut(leader, restarted);
    for _ in 0..40 {
        s.run(10);
        assert!(s.replica(cut).is_some_and(|r| r.leadership().term <= term || !r.leadership().leads));
    }
    s.wait(5_000, "in the end there is another leader", |w| replica(w, cut).is_some_and(|r| r.leadership().leads));
    s.world.heal_cuts();
    s.run(2_000);
    s.expect(leader, "key4", Command::Get, bulk("value 4"));
}

#[test]
fn a_node_whose_disk_was_wiped_is_filled_by_the_others() {
    let mut s = durable();
    fill(&mut s, 0..60);
    for node in s.world.ids() {
        s.world.kill(node);
        s.world.wipe(node);
        s.world.start(node);
        s.wait(10_000, "whole", |w| w.whole(node));
    }
    // Each has another disk by now, and nothing is lost; nor is it by an outage after that.
    outage(&mut s);
    for i in 0..60 {
        let gateway = s.world.ids()[i as usize % 3];
        s.expect(gateway, &format!("key{i}"), Command::Get, bulk(&format!("value {i}")));
    }
    s.wait(3_000, "equal states", equal);
}

/// Nodes with disks and nodes without in one cluster.
#[test]
fn nodes_of_both_kinds_restart_in_any_order() {
    let options =
        Options { seed: 3, durable: 500, checkpoint_log_bytes: 3_000, chunk_bytes: 100, ..Options::default() };
    let mut s = Story::with(options, |_| {});
    let kinds: Vec<bool> = s.world.ids().into_iter().map(|n| s.world.durable(n)).collect();
    assert!(kinds.contains(&true) && kinds.contains(&false), "{kinds:?}");
    fill(&mut s, 0..60);
    for _ in 0..2 {
        for node in s.world.ids() {
            s.world.kill(node);
            s.run(200);
            s.world.start(node);
            s.wait(10_000, "whole", |w| w.ids().into_iter().all(|n| w.whole(n)));
        }
    }
    for i in 0..60 {
        let gateway = s.world.ids()[i as usize % 3];
        s.expect(gateway, &format!("key{i}"), Command::Get, bulk(&format!("value {i}")));
    }
}
