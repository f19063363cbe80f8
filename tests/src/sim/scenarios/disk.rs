//! Nodes that keep their logs on disk: what a restart brings back, and what it must not.

use super::{SHARD, Story, bulk, replica, set};
use crate::sim::model::Command;
use crate::sim::world::{DiskError, MS, Options, World};
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

/// What is not needed any more may rot; what is needed costs the node its life, never a client its data.
#[test]
fn a_flipped_bit_is_of_no_account_or_noticed_by_the_next_restart() {
    let mut s = durable();
    s.world.trace.keep_all();
    fill(&mut s, 0..60);
    let lives_lost = |s: &Story| s.world.trace.tail(usize::MAX).matches("kept on disk is lost").count();
    let (mut noticed, mut harmless) = (0, 0);
    for round in 0..40 {
        let node = s.world.ids()[round % 3];
        s.world.flip_bit(node);
        let (rotten, before) = (s.world.rotten(node), lives_lost(&s));
        s.world.kill(node);
        s.world.start(node);
        s.wait(10_000, "all whole", |w| w.ids().into_iter().all(|n| w.whole(n)) && w.leader(SHARD).is_some());
        match lives_lost(&s) - before {
            0 => harmless += 1,
            _ => noticed += 1,
        }
        assert!(rotten || lives_lost(&s) == before, "nothing was damaged");
        fill(&mut s, 60 + round as u32..61 + round as u32);
    }
    assert!(noticed > 5 && harmless > 0, "{noticed} and {harmless}");
    for i in 0..100 {
        let gateway = s.world.ids()[i as usize % 3];
        s.expect(gateway, &format!("key{i}"), Command::Get, bulk(&format!("value {i}")));
    }
}

#[test]
fn a_node_whose_disk_fails_ends_and_comes_back_with_what_it_acknowledged() {
    for error in [DiskError::NoSpace, DiskError::Sync] {
        for states_only in [false, true] {
            let mut s = durable();
            fill(&mut s, 0..10);
            let failing = s.leader();
            let [gateway, _] = s.others(failing);
            s.world.break_disk(failing, error, states_only);
            let mut written = 10;
            while s.world.host(failing).is_some() {
                s.expect(gateway, &format!("key{written}"), set(&format!("value {written}")), Reply::Ok);
                written += 1;
                assert!(written < 2_000, "the disk never fails");
            }
            assert_eq!(s.world.disk_failures, [error]);
            s.run(1_000);
            s.world.repair_disk(failing);
            s.world.start(failing);
            s.wait(10_000, "all whole", |w| w.ids().into_iter().all(|n| w.whole(n)));
            outage(&mut s);
            for i in 0..written {
                s.expect(gateway, &format!("key{i}"), Command::Get, bulk(&format!("value {i}")));
            }
        }
    }
}
