//! States on their way to replicas that the log alone cannot bring up to date.

use super::{SHARD, Story, bulk, replica, set};
use crate::sim::model::Command;
use crate::sim::world::{Block, MS, Options, World};
use crema_core::{NodeId, Reply};
use crema_shard::Standing;
use crema_shard::message::{KIND_CHUNK, KIND_CHUNK_ACK};

/// Little log and small pieces, so that a laggard needs a state, in many of them.
fn tight() -> Story {
    Story::with(Options { max_log_bytes: 2_000, chunk_bytes: 100, ..Options::default() }, |_| {})
}

/// Writes `keys` keys through `node`.
fn fill(s: &mut Story, node: NodeId, keys: std::ops::Range<u32>) {
    for i in keys {
        s.expect(node, &format!("key{i}"), set(&format!("value {i}")), Reply::Ok);
    }
}

/// Every replica has applied everything, and all are equal.
fn equal(w: &World) -> bool {
    let states: Vec<_> = w.ids().iter().filter_map(|n| replica(w, *n)).map(|r| (r.applied(), r.digest())).collect();
    states.len() == 3 && states.windows(2).all(|p| p[0] == p[1])
}

fn chunks(s: &Story) -> usize {
    s.world.trace.tail(usize::MAX).lines().filter(|l| l.contains(" chunk ") && !l.contains("ack")).count()
}

#[test]
fn a_follower_that_fell_behind_the_kept_log_gets_the_state() {
    let mut s = tight();
    s.world.trace.keep_all();
    let leader = s.leader();
    let [behind, _] = s.others(leader);
    fill(&mut s, leader, 0..5);
    s.world.isolate(behind);
    s.run(100);
    fill(&mut s, leader, 5..60);
    let kept = s.replica(leader).expect("a leader").log_entries();
    assert!(kept < 40, "the log is bounded while a voter lags: {kept} entries");
    assert_eq!(chunks(&s), 0);
    s.world.heal_cuts();
    s.wait(8_000, "equal states", equal);
    assert!(chunks(&s) > 10, "by pieces: {}", chunks(&s));
    s.expect(behind, "key59", Command::Get, bulk("value 59"));
}

#[test]
fn all_three_are_killed_in_turn_and_nothing_is_lost() {
    let mut s = tight();
    let gateway = s.leader();
    fill(&mut s, gateway, 0..40);
    for node in s.world.ids() {
        s.world.kill(node);
        s.run(100);
        s.world.start(node);
        s.wait(10_000, "ready again", |w| w.host(node).is_some_and(|h| h.view().not_ready.is_none()));
    }
    for node in s.world.ids() {
        (0..40).for_each(|i| s.expect(node, &format!("key{i}"), Command::Get, bulk(&format!("value {i}"))));
    }
    s.wait(3_000, "equal states", equal);
}

/// What `/v1/shards` and clients are told follows the members, on the node that is filled and on those that fill it.
#[test]
fn a_replica_that_is_filled_shows_as_learner_until_it_votes() {
    let mut s = tight();
    let leader = s.leader();
    fill(&mut s, leader, 0..60);
    let [lost, other] = s.others(leader);
    let standing = |w: &World, at: NodeId| {
        let route = w.host(at)?.view().shards.get(SHARD.0 as usize)?.clone();
        route.replicas.iter().find(|(node, ..)| *node == lost).map(|(_, _, standing)| *standing)
    };
    assert!([leader, other, lost].iter().all(|at| standing(&s.world, *at) == Some(Standing::Voter)));
    s.world.kill(lost);
    s.world.start(lost);
    s.wait(5_000, "a transfer", |w| replica(w, lost).is_some_and(|r| r.transfer_status().held_bytes > 200));
    for at in [leader, lost] {
        assert_eq!(standing(&s.world, at), Some(Standing::Learner), "as node {at} knows");
    }
    s.wait(10_000, "a voter, everywhere", |w| {
        [leader, other, lost].iter().all(|at| standing(w, *at) == Some(Standing::Voter))
    });
    assert!(s.world.whole(lost));
}

#[test]
fn a_transfer_goes_on_after_its_connections_broke() {
    let mut s = tight();
    let leader = s.leader();
    fill(&mut s, leader, 0..60);
    let [lost, _] = s.others(leader);
    s.world.kill(lost);
    s.world.start(lost);
    s.world.trace.keep_all();
    s.wait(5_000, "a transfer", |w| replica(w, lost).is_some_and(|r| r.transfer_status().held_bytes > 500));
    let before = chunks(&s);
    for (from, to) in [(leader, lost), (lost, leader)] {
        s.world.reset(from, to);
    }
    s.wait(10_000, "whole", |w| w.whole(lost));
    // The state is some sixty pieces long: had it begun anew, there would be many more.
    let pieces: std::collections::BTreeSet<String> = s
        .world
        .trace
        .tail(usize::MAX)
        .lines()
        .filter(|l| l.contains(&format!("[{SHARD:?} chunk ")) && !l.contains("ack"))
        .filter_map(|l| l.split("chunk ").nth(1)?.split('.').next().map(str::to_owned))
        .collect();
    assert!(before > 0);
    assert_eq!(pieces.len(), 1, "one transfer: {pieces:?}");
}

#[test]
fn lost_pieces_and_lost_acknowledgements_are_sent_again() {
    for kind in [KIND_CHUNK, KIND_CHUNK_ACK] {
        let mut s = tight();
        let leader = s.leader();
        fill(&mut s, leader, 0..30);
        let [lost, _] = s.others(leader);
        s.world.kill(lost);
        s.world.start(lost);
        s.wait(5_000, "a transfer", |w| replica(w, lost).is_some_and(|r| r.transfer_status().held_bytes > 200));
        s.world.blocks.push(Block { kind: Some(kind), ..Block::default() });
        s.run(2_500);
        assert!(!s.world.whole(lost));
        s.world.blocks.clear();
        s.wait(10_000, "whole", |w| w.whole(lost));
        s.wait(3_000, "equal states", equal);
    }
}

/// A sender learns of one lost piece by those behind it; if nothing came behind it, it asks after a second.
#[test]
fn a_moment_of_loss_costs_no_more_than_a_second() {
    for kind in [KIND_CHUNK, KIND_CHUNK_ACK] {
        let mut s = tight();
        let leader = s.leader();
        fill(&mut s, leader, 0..60);
        let [lost, _] = s.others(leader);
        s.world.kill(lost);
        s.world.start(lost);
        s.wait(5_000, "a transfer", |w| replica(w, lost).is_some_and(|r| r.transfer_status().held_bytes > 200));
        s.world.blocks.push(Block { kind: Some(kind), ..Block::default() });
        s.run(5);
        s.world.blocks.clear();
        assert!(!s.world.whole(lost));
        s.wait(2_500, "whole", |w| w.whole(lost));
    }
}

/// Whatever moment of being filled the receiver dies in, its next life is filled; whatever moment the leader dies in, its
/// successor goes on.
#[test]
fn who_dies_while_a_replica_is_filled_does_not_matter() {
    for leader_dies in [false, true] {
        for step in 0..24 {
            let mut s = tight();
            let leader = s.leader();
            fill(&mut s, leader, 0..30);
            let [lost, _] = s.others(leader);
            s.world.kill(lost);
            s.run(50);
            s.world.start(lost);
            // Registered after some 700 ms, filled within about 100 ms from then.
            s.run(600 + 15 * step);
            if leader_dies && !s.world.whole(lost) {
                // Its memory is needed: it stands still instead, for longer than an election.
                s.world.pause(leader);
                s.run(3_000);
                s.world.resume(leader);
            } else {
                let victim = if leader_dies { leader } else { lost };
                s.world.kill(victim);
                s.run(700);
                s.world.start(victim);
            }
            s.wait(15_000, "all whole", |w| w.ids().into_iter().all(|n| w.whole(n)));
            s.wait(5_000, "equal states", equal);
            s.expect(lost, "key29", Command::Get, bulk("value 29"));
        }
    }
}

/// tikv 10533: a vote request that was long on its way finds a replica that was made since and knows nothing.
#[test]
fn an_empty_replica_hears_leaders_only() {
    let mut s = tight();
    let leader = s.leader();
    fill(&mut s, leader, 0..10);
    let [lost, other] = s.others(leader);
    // No piece arrives, so it stays empty.
    s.world.blocks.push(Block { kind: Some(KIND_CHUNK), ..Block::default() });
    s.world.kill(lost);
    s.world.start(lost);
    s.wait(5_000, "an empty replica", |w| replica(w, lost).is_some_and(|r| r.is_empty()));
    s.run(500);
    // Two voters are left. Without one of them nobody is elected, however often the other asks the empty one.
    s.world.isolate(leader);
    let term = s.replica(other).expect("a voter").leadership().term;
    for _ in 0..50 {
        s.run(100);
        assert!(s.replica(other).is_some_and(|r| !r.leadership().leads));
        assert!(s.replica(lost).is_some_and(|r| r.is_empty()));
    }
    let after = s.replica(other).expect("a voter").leadership().term;
    assert_eq!(term, after, "not even a pre-vote was granted");
    s.world.heal_cuts();
    s.world.blocks.clear();
    s.wait(15_000, "whole", |w| w.whole(lost));
    s.expect(lost, "key9", Command::Get, bulk("value 9"));
}

/// A write that is acknowledged by the new replica alone beside the leader is not lost with the leader.
#[test]
fn a_filled_replica_counts_for_the_majority() {
    let mut s = tight();
    let leader = s.leader();
    fill(&mut s, leader, 0..10);
    let [lost, other] = s.others(leader);
    s.world.kill(lost);
    s.world.start(lost);
    s.wait(10_000, "whole", |w| w.whole(lost));
    s.world.isolate(other);
    s.run(1_500);
    s.expect(lost, "k", set("kept by two"), Reply::Ok);
    // Now the two that have it lose the third's company and one of them stands still: the filled one alone knows of it.
    s.world.heal_cuts();
    s.world.conditions.delay = (MS, 2 * MS);
    let leading = s.leader();
    s.world.pause(leading);
    s.run(3_000);
    let gateway = [lost, other].into_iter().find(|n| *n != leading).expect("another");
    s.expect(gateway, "k", Command::Get, bulk("kept by two"));
    s.world.resume(leading);
    s.run(2_000);
}
