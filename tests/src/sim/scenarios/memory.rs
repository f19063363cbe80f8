//! Memory: what has expired goes by itself, what is used least makes room, and what does not fit is refused; on all
//! replicas alike.

use super::{SHARD, Story, replica, set};
use crate::sim::model::Command;
use crate::sim::world::{MS, Options, World};
use crema_core::{EvictionPolicy, NodeId, OpError, Reply};
use crema_shard::meta::WHOLE_SHARE;
use crema_shard::replica::Machine;
use crema_shard::{ClientResult, MemoryOptions};
use std::time::Duration;

fn of<R>(world: &World, node: NodeId, f: impl Fn(&crema_core::StateMachine) -> R) -> Option<R> {
    match replica(world, node)?.machine() {
        Machine::Data(m) => Some(f(m)),
        Machine::Meta(_) => None,
    }
}

/// All replicas have applied the same, and are equal.
fn equal(w: &World) -> bool {
    let states: Vec<_> = w.ids().iter().filter_map(|n| replica(w, *n)).map(|r| (r.applied(), r.digest())).collect();
    states.len() == 3 && states.windows(2).all(|p| p[0] == p[1])
}

fn keys(w: &World) -> Vec<u64> {
    w.ids().into_iter().filter_map(|n| of(w, n, |m| m.keys())).collect()
}

#[test]
fn expired_keys_go_though_nobody_asks_for_them() {
    let mut s = Story::begin();
    let leader = s.leader();
    for i in 0..300u64 {
        let px = 500 + i;
        s.expect(leader, &format!("fleeting{i}"), Command::SetPx { value: b"v".to_vec(), px }, Reply::Ok);
    }
    s.expect(leader, "lasting", set("v"), Reply::Ok);
    s.wait(10_000, "only the lasting one is left, everywhere", |w| keys(w) == [1, 1, 1]);
    assert!(equal(&s.world));
    // In a group that has fallen asleep they go as well.
    s.expect(leader, "later", Command::SetPx { value: b"v".to_vec(), px: 8_000 }, Reply::Ok);
    s.wait(7_500, "sleep", |w| w.ids().iter().all(|n| replica(w, *n).is_some_and(|r| r.asleep())));
    assert_eq!(keys(&s.world), [2, 2, 2]);
    s.wait(12_000, "the last one goes too", |w| keys(w) == [1, 1, 1]);
    s.wait(10_000, "sleep again", |w| w.ids().iter().all(|n| replica(w, *n).is_some_and(|r| r.asleep())));
    assert!(equal(&s.world));
}

fn limited(eviction: Option<EvictionPolicy>) -> Story {
    // Three quarters for the keys of one shard: some two hundred of them.
    let memory = MemoryOptions { max_memory: 64 * 1024, eviction };
    let mut s = Story::with(Options { memory, ..Options::default() }, |_| {});
    let limited = |w: &World| w.ids().into_iter().all(|n| of(w, n, |m| m.limits().max_bytes > 0) == Some(true));
    s.wait(5_000, "the limits are in force", limited);
    s
}

#[test]
fn a_full_shard_makes_room_and_its_replicas_stay_alike() {
    for policy in [EvictionPolicy::S3Fifo, EvictionPolicy::Sieve, EvictionPolicy::Lru] {
        let mut s = limited(Some(policy));
        let value = "x".repeat(150);
        let most = 48 * 1024 + 48 * 1024 / 64;
        for i in 0..600 {
            let gateway = s.world.ids()[i % 3];
            s.expect(gateway, &format!("key{i}"), set(&value), Reply::Ok);
            for n in s.world.ids() {
                let used = of(&s.world, n, |m| m.used()).expect("a replica");
                assert!(used <= most, "{policy:?}: {used} bytes on {n:?} after {i} keys");
            }
            if i == 200 {
                // Another leader goes on with what it knows, which is nothing yet.
                let to = s.others(s.leader())[0];
                s.hand_over(to);
            }
            if i == 400 {
                // And another replica with the state that it is given.
                let lost = s.others(s.leader())[0];
                s.world.kill(lost);
                s.world.start(lost);
                s.wait(10_000, "whole", |w| w.whole(lost));
            }
        }
        s.wait(3_000, "equal states", equal);
        assert!(keys(&s.world)[0] > 100, "it is used: {:?}", keys(&s.world));
        assert!(s.world.leader(SHARD).and_then(|n| of(&s.world, n, |m| m.removed().evicted)) > Some(100));
    }
}

#[test]
fn without_eviction_what_does_not_fit_is_refused_and_changes_nothing() {
    let mut s = limited(None);
    let value = "x".repeat(150);
    let full = Reply::Error(OpError::OutOfMemory);
    let node = s.leader();
    let mut stored = 0;
    loop {
        let conn = s.world.connect();
        let asked = s.ask(node, conn, &format!("key{stored}"), &set(&value), super::PATIENCE);
        match s.answer(asked, 6_000) {
            Some(crema_shard::ClientResult::Reply(Reply::Ok)) => stored += 1,
            Some(crema_shard::ClientResult::Reply(reply)) if reply == full => break,
            other => panic!("{other:?}"),
        }
        assert!(stored < 1_000);
    }
    assert!(stored > 150, "{stored} keys of some 200 bytes");
    let before: Vec<_> = s.world.ids().into_iter().map(|n| of(&s.world, n, |m| m.table().digest())).collect();
    s.expect(node, "one more", set(&value), full.clone());
    s.expect(node, "key0", Command::Append(value.clone().into_bytes()), full);
    s.wait(3_000, "equal states", equal);
    let after: Vec<_> = s.world.ids().into_iter().map(|n| of(&s.world, n, |m| m.table().digest())).collect();
    assert_eq!(before, after);
    // What frees memory is always allowed, and makes room.
    s.expect(node, "key1", Command::Del, Reply::Int(1));
    s.expect(node, "key2", Command::Del, Reply::Int(1));
    s.expect(node, "one more", set(&value), Reply::Ok);
}

/// What a node has resident beside its data makes its shards smaller, whoever leads them, and later larger again; no write is
/// refused for it.
#[test]
fn a_node_that_is_short_of_memory_has_smaller_shards() {
    let mut s = limited(Some(EvictionPolicy::S3Fifo));
    let value = "x".repeat(150);
    let mut next = 0;
    let mut fill = |s: &mut Story, count: usize| {
        for _ in 0..count {
            let gateway = s.world.ids()[next % 3];
            s.expect(gateway, &format!("key{next}"), set(&value), Reply::Ok);
            next += 1;
        }
    };
    fill(&mut s, 300);
    let whole = of(&s.world, s.leader(), |m| m.limits().max_bytes).expect("a replica");
    let short = s.others(s.leader())[0];
    s.world.memory_share(short, WHOLE_SHARE / 2);
    s.run(20);
    fill(&mut s, 50);
    let fits = |w: &World, max: u64| {
        w.ids().into_iter().all(|n| of(w, n, |m| m.used() <= max && m.limits().max_bytes == max) == Some(true))
    };
    s.wait(3_000, "half of it", |w| fits(w, whole / 2));
    fill(&mut s, 100);
    assert!(fits(&s.world, whole / 2));
    // The next leader knows it too.
    let to = s.others(s.leader())[0];
    s.hand_over(to);
    fill(&mut s, 50);
    assert!(fits(&s.world, whole / 2));
    s.world.memory_share(short, WHOLE_SHARE);
    s.run(1_000);
    fill(&mut s, 300);
    s.wait(3_000, "all of it", |w| {
        w.ids().into_iter().all(|n| of(w, n, |m| m.limits().max_bytes == whole && m.used() > whole / 2) == Some(true))
    });
    s.wait(3_000, "equal states", equal);
}

/// A burst of writes into a full shard waits until the room is there, rather than being refused.
#[test]
fn a_burst_into_a_full_shard_is_not_refused() {
    let mut s = limited(Some(EvictionPolicy::Lru));
    let value = "x".repeat(150);
    for i in 0..300 {
        let gateway = s.world.ids()[i % 3];
        s.expect(gateway, &format!("key{i}"), set(&value), Reply::Ok);
    }
    let mut asked = Vec::new();
    for i in 0..1_500 {
        let gateway = s.world.ids()[i % 3];
        let conn = s.world.connect();
        asked.push(s.ask(gateway, conn, &format!("burst{i}"), &set(&value), Duration::from_secs(5)));
    }
    s.run(5_500);
    for of in asked {
        assert_eq!(s.answers.get(&of), Some(&ClientResult::Reply(Reply::Ok)), "{of:?}");
    }
    s.wait(3_000, "equal states", equal);
}

/// Nor is it where the leader dies in the middle: what it has left in the log of its successor takes room before that one
/// has applied it.
#[test]
fn a_burst_is_not_refused_by_a_leader_that_has_just_been_elected() {
    for round in 1..=12 {
        let mut s = limited(Some(EvictionPolicy::S3Fifo));
        let value = "x".repeat(150);
        for i in 0..300 {
            let gateway = s.world.ids()[i % 3];
            s.expect(gateway, &format!("key{i}"), set(&value), Reply::Ok);
        }
        let dies = s.leader();
        let lives = s.others(dies);
        let mut asked = Vec::new();
        let mut burst = |s: &mut Story, count: usize| {
            for i in 0..count {
                let conn = s.world.connect();
                let key = format!("burst{i}");
                asked.push(s.ask(lives[i % 2], conn, &key, &set(&value), Duration::from_secs(5)));
            }
        };
        // The followers hear entries, and late that these are committed.
        s.world.conditions.delay = (round * MS, round * 3 * MS);
        burst(&mut s, 400);
        s.run(5 + round * 7);
        s.world.kill(dies);
        burst(&mut s, 400);
        s.run(6_000);
        for of in asked {
            let answer = s.answers.get(&of);
            let refused = matches!(answer, Some(ClientResult::Reply(Reply::Error(OpError::OutOfMemory))));
            assert!(!refused && answer.is_some(), "round {round}: {answer:?}");
        }
    }
}
