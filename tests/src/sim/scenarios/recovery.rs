//! Groups that have lost their majority: what is said of them, and how an operator makes them writable again.

use super::{SHARD, Story, bulk, replica, set};
use crate::sim::model::Command;
use crate::sim::rng::Rng;
use crate::sim::world::{MS, Options, US, World};
use crema_core::{NodeId, Reply, ShardId};
use crema_shard::recovery::Recovered;
use crema_shard::{ClientResult, ConnId, RecoverResult, Refusal, Token};
use std::collections::BTreeSet;
use std::time::Duration;

/// Small pieces of states, so that filling takes a while.
fn story(options: Options) -> Story {
    Story::with(Options { chunk_bytes: 100, ..options }, |_| {})
}

fn fill(s: &mut Story, node: NodeId, keys: std::ops::Range<u32>) {
    for i in keys {
        s.expect(node, &format!("key{i}"), set(&format!("value {i}")), Reply::Ok);
    }
}

fn all_ready(w: &World) -> bool {
    w.ids().into_iter().all(|n| w.whole(n) && w.host(n).is_some_and(|h| h.view().not_ready.is_none()))
}

fn says_lost(w: &World, node: NodeId, shard: ShardId) -> bool {
    let Some(view) = w.host(node).map(|h| h.view()) else { return false };
    let down =
        if shard.is_meta() { &view.meta_down } else { &view.shards.get(shard.0 as usize).and_then(|s| s.down.clone()) };
    down.as_ref().is_some_and(|d| d.lost)
}

/// Asks a node to recover, and waits for the answer.
#[track_caller]
fn recover(s: &mut Story, node: NodeId, accept: bool, stopped: &[NodeId]) -> RecoverResult {
    let before = s.world.recoveries.len();
    s.world.recover(node, accept, stopped);
    s.wait(30_000, "an answer", |w| w.recoveries.len() > before);
    s.world.recoveries.last().expect("just seen").1.clone()
}

#[track_caller]
fn recovered(s: &mut Story, node: NodeId, stopped: &[NodeId]) -> Recovered {
    let got = recover(s, node, true, stopped);
    let trace = s.world.trace.tail(80);
    got.unwrap_or_else(|why| panic!("{why}\n{trace}"))
}

fn kill_both(s: &mut Story, nodes: [NodeId; 2]) {
    nodes.into_iter().for_each(|n| drop(s.world.kill(n)));
}

/// Two of three nodes lose their memory: with the shard, the meta group is lost too. What the third has comes back.
#[test]
fn the_survivor_of_three_keeps_what_it_has() {
    for durable in [0, 1_000] {
        for survivor_leads in [true, false] {
            let mut s = story(Options { durable, ..Options::default() });
            let leader = s.leader();
            fill(&mut s, leader, 0..30);
            s.run(500);
            let [a, b] = s.others(leader);
            let (survivor, lost) = if survivor_leads { (leader, [a, b]) } else { (a, [leader, b]) };
            kill_both(&mut s, lost);
            for n in lost {
                if s.world.durable(n) {
                    s.world.wipe(n);
                }
                s.world.start(n);
            }
            s.wait(15_000, "lost, everywhere", |w| {
                w.ids().into_iter().all(|n| says_lost(w, n, SHARD) && says_lost(w, n, ShardId::META))
            });
            for node in s.world.ids() {
                let conn = s.world.connect();
                let asked = s.ask(node, conn, "key1", &set("x"), Duration::from_secs(5));
                assert_eq!(s.answer(asked, 500), Some(ClientResult::NotApplied(Refusal::Lost(SHARD))), "at once");
            }
            let plan = recover(&mut s, survivor, false, &[]).expect("a plan");
            assert_eq!(plan.lost.len(), 2);
            assert!(!plan.done && plan.lost.iter().all(|l| l.keeps_data), "{plan:?}");
            s.run(3_000);
            assert!(says_lost(&s.world, survivor, SHARD), "a plan changes nothing");
            // Whoever is asked.
            let asked = if survivor_leads { survivor } else { lost[0] };
            let done = recovered(&mut s, asked, &[]);
            assert!(done.done && done.unfinished.is_empty() && done.generation == Some(2), "{done:?}");
            s.wait(15_000, "all ready", all_ready);
            for node in s.world.ids() {
                (0..30).for_each(|i| s.expect(node, &format!("key{i}"), Command::Get, bulk(&format!("value {i}"))));
                s.expect(node, &format!("new{node}"), set("y"), Reply::Ok);
            }
            // The loss of one more is a minority's again, whoever began the group.
            s.world.kill(survivor);
            s.run(1_500);
            s.expect(lost[0], "key7", Command::Get, bulk("value 7"));
            s.world.start(survivor);
            s.wait(15_000, "all ready", all_ready);
        }
    }
}

/// A write that was acknowledged by the survivor and one that is lost, and of whose commitment the survivor never heard.
#[test]
fn what_the_survivor_acknowledged_is_kept_though_it_knows_of_no_commitment() {
    let mut s = story(Options::default());
    let leader = s.leader();
    fill(&mut s, leader, 0..3);
    s.run(500);
    let [survivor, other] = s.others(leader);
    s.world.isolate(other);
    s.expect(leader, "last", set("acknowledged"), Reply::Ok);
    let knows = s.replica(survivor).expect("a voter").committed();
    assert!(knows < s.replica(leader).expect("a leader").committed(), "the next heartbeat would tell");
    kill_both(&mut s, [leader, other]);
    s.world.heal_cuts();
    for n in [leader, other] {
        s.world.start(n);
    }
    s.wait(15_000, "lost", |w| says_lost(w, survivor, SHARD));
    recovered(&mut s, other, &[]);
    s.wait(15_000, "all ready", all_ready);
    s.expect(other, "last", Command::Get, bulk("acknowledged"));
}

/// With more nodes, the meta group outlives a shard: its log founds that one anew, and the others never notice.
#[test]
fn a_living_meta_group_founds_shards_anew_by_its_log() {
    let mut s = story(Options { nodes: 5, ..Options::default() });
    let holders = s.world.holders(SHARD);
    let leader = s.leader();
    fill(&mut s, leader, 0..20);
    let lost: Vec<NodeId> = holders.iter().copied().filter(|n| *n != leader).collect();
    kill_both(&mut s, [lost[0], lost[1]]);
    for n in &lost {
        s.world.start(*n);
    }
    s.wait(15_000, "lost", |w| w.ids().into_iter().all(|n| says_lost(w, n, SHARD)));
    assert!(!says_lost(&s.world, leader, ShardId::META));
    let outside = s.world.ids().into_iter().find(|n| !holders.contains(n)).expect("five nodes");
    let done = recovered(&mut s, outside, &[]);
    assert_eq!(done.lost.iter().map(|l| (l.shard, l.founder)).collect::<Vec<_>>(), [(SHARD, Some(leader))]);
    assert_eq!(done.generation, None);
    s.wait(15_000, "all ready", all_ready);
    for node in s.world.ids() {
        s.expect(node, "key19", Command::Get, bulk("value 19"));
        s.expect(node, "key20", set("value 20"), Reply::Ok);
    }
}

/// Nodes that do not answer may have what is missing: they are waited for, unless the operator says that they are gone.
#[test]
fn who_does_not_answer_is_waited_for_or_declared_stopped() {
    let mut s = story(Options::default());
    let survivor = s.leader();
    let gone = s.others(survivor);
    fill(&mut s, survivor, 0..10);
    kill_both(&mut s, gone);
    let waits = |w: &World| w.host(survivor).is_some_and(|h| h.view().shards[0].down.is_some());
    s.wait(10_000, "a reason", waits);
    assert!(!says_lost(&s.world, survivor, SHARD));
    let plan = recover(&mut s, survivor, true, &[]).expect("a plan");
    assert!(!plan.done && plan.lost.is_empty() && plan.missing.iter().eq(gone.iter()), "{plan:?}");
    let lie = recover(&mut s, survivor, true, &[survivor]);
    assert!(lie.is_err_and(|why| why.contains("answers")));
    let done = recovered(&mut s, survivor, &gone);
    assert!(done.done, "{done:?}");
    s.expect(survivor, "key9", Command::Get, bulk("value 9"));
    s.expect(survivor, "key10", set("alone"), Reply::Ok);
    for n in gone {
        s.world.start(n);
    }
    s.wait(15_000, "all ready", all_ready);
    for node in s.world.ids() {
        s.expect(node, "key10", Command::Get, bulk("alone"));
    }
}

/// A quorum that merely stands still is none that is lost.
#[test]
fn what_can_go_on_is_never_founded_anew() {
    let mut s = story(Options { durable: 1_000, ..Options::default() });
    let survivor = s.leader();
    let others = s.others(survivor);
    fill(&mut s, survivor, 0..5);
    // They come back with their disks.
    kill_both(&mut s, others);
    s.run(5_000);
    let plan = recover(&mut s, survivor, true, &[]).expect("a plan");
    assert!(plan.lost.is_empty() && !plan.done);
    for n in others {
        s.world.start(n);
    }
    s.wait(15_000, "all ready", all_ready);
    let plan = recover(&mut s, survivor, true, &[]).expect("a plan");
    assert!(plan.lost.is_empty() && plan.waiting.is_empty() && !plan.done, "{plan:?}");
    s.expect(survivor, "key4", Command::Get, bulk("value 4"));
    assert_eq!(s.world.host(survivor).and_then(|h| h.meta_state()).map(|m| m.generation), Some(1));
}

/// Everything is lost. Who remembers the cluster founds no other one by itself, and goes on under its identity when told to.
#[test]
fn after_a_total_loss_the_cluster_is_founded_anew_under_its_old_identity() {
    let mut s = story(Options { remember: true, ..Options::default() });
    let uuid = |w: &World| w.host(NodeId(1)).and_then(|h| h.view().uuid);
    let old = uuid(&s.world);
    let leader = s.leader();
    fill(&mut s, leader, 0..5);
    s.world.ids().into_iter().for_each(|n| drop(s.world.kill(n)));
    s.world.ids().into_iter().for_each(|n| s.world.start(n));
    s.run(10_000);
    assert!(s.world.ids().into_iter().all(|n| s.world.host(n).is_some_and(|h| h.meta_state().is_none())));
    let plan = recover(&mut s, NodeId(2), false, &[]).expect("a plan");
    assert!(plan.anew && !plan.done && plan.lost.len() == 2, "{plan:?}");
    let done = recovered(&mut s, NodeId(2), &[]);
    assert!(done.anew && done.done && done.generation == Some(2), "{done:?}");
    s.wait(15_000, "all ready", all_ready);
    assert_eq!(uuid(&s.world), old);
    assert!(s.world.host(NodeId(1)).is_some_and(|h| h.view().recovery.is_some_and(|r| r.anew)));
    for node in s.world.ids() {
        s.expect(node, "key1", Command::Get, Reply::Nil);
        s.expect(node, &format!("k{node}"), set("v"), Reply::Ok);
    }
    // And once more.
    s.world.ids().into_iter().for_each(|n| drop(s.world.kill(n)));
    s.world.ids().into_iter().for_each(|n| s.world.start(n));
    s.run(3_000);
    let done = recovered(&mut s, NodeId(1), &[]);
    assert_eq!(done.generation, Some(3));
    s.wait(15_000, "all ready", all_ready);
    s.expect(NodeId(3), "k1", Command::Get, Reply::Nil);
}

/// Two operators at two nodes, at once: one generation has one table.
#[test]
fn two_recoveries_at_once_do_not_make_two_clusters() {
    for apart in [0, 1, 5, 20, 60, 200, 600] {
        let mut s = story(Options { seed: 7 + apart, ..Options::default() });
        let survivor = s.leader();
        let lost = s.others(survivor);
        fill(&mut s, survivor, 0..10);
        kill_both(&mut s, lost);
        for n in lost {
            s.world.start(n);
        }
        s.wait(15_000, "lost", |w| w.ids().into_iter().all(|n| says_lost(w, n, ShardId::META)));
        s.world.recover(survivor, true, &[]);
        s.run(apart);
        s.world.recover(lost[0], true, &[]);
        s.wait(30_000, "both answers", |w| w.recoveries.len() == 2);
        if !s.world.recoveries.iter().any(|(_, r)| r.as_ref().is_ok_and(|r| r.done)) {
            // Each refused the other.
            s.run(11_000);
            recovered(&mut s, lost[1], &[]);
        }
        s.wait(20_000, "all ready", all_ready);
        let marks: Vec<_> = s.world.ids().iter().map(|n| s.world.host(*n).and_then(|h| h.view().recovery)).collect();
        assert!(marks.windows(2).all(|w| w[0].is_some() && w[0] == w[1]), "{marks:?}");
        s.expect(lost[1], "key9", Command::Get, bulk("value 9"));
    }
}

/// Whoever dies meanwhile, and whenever: afterwards the cluster is either as it was, and can be recovered, or whole.
#[test]
fn who_dies_during_a_recovery_does_not_matter() {
    for durable in [0, 1_000] {
        for victim in 0..2 {
            for step in 0..16 {
                let options = Options { durable, seed: 100 + step, ..Options::default() };
                let mut s = story(options);
                let survivor = s.leader();
                let lost = s.others(survivor);
                fill(&mut s, survivor, 0..15);
                kill_both(&mut s, lost);
                for n in lost {
                    if s.world.durable(n) {
                        s.world.wipe(n);
                    }
                    s.world.start(n);
                }
                s.wait(15_000, "lost", |w| w.ids().into_iter().all(|n| says_lost(w, n, ShardId::META)));
                s.world.recover(lost[0], true, &[]);
                s.run(20 * step);
                // The node that was asked, or one that has nothing; the survivor's memory is needed.
                let dies = lost[victim];
                s.world.kill(dies);
                s.run(200);
                s.world.start(dies);
                s.run(15_000);
                for attempt in 0.. {
                    if all_ready(&s.world) {
                        break;
                    }
                    assert!(attempt < 4, "not whole\n{}", s.world.trace.tail(80));
                    let _ = recover(&mut s, survivor, true, &[]);
                    s.run(12_000);
                }
                for node in s.world.ids() {
                    s.expect(node, "key14", Command::Get, bulk("value 14"));
                    s.expect(node, &format!("new{node}"), set("y"), Reply::Ok);
                }
                let states: Vec<_> =
                    s.world.ids().iter().filter_map(|n| replica(&s.world, *n)).map(|r| r.is_empty()).collect();
                assert_eq!(states, [false; 3]);
            }
        }
    }
}

/// The node with the only log that is left is asked itself, and its process ends at any moment: what it has begun on disk goes
/// on, or has not begun.
#[test]
fn who_is_asked_dies_with_its_disk_at_any_moment() {
    for shards in [1, 6] {
        for step in 0..24 {
            let options = Options { durable: 1_000, chunk_bytes: 100, seed: 300 + step, shards, ..Options::default() };
            let mut world = World::new(options);
            assert!(world.run_until(Duration::from_secs(10), all_ready), "founded");
            let mut s = Story { world, answers: Default::default() };
            let asked = s.leader();
            let lost = s.others(asked);
            fill(&mut s, asked, 0..30);
            kill_both(&mut s, lost);
            for n in lost {
                s.world.wipe(n);
                s.world.start(n);
            }
            s.wait(15_000, "lost", |w| w.ids().into_iter().all(|n| says_lost(w, n, ShardId::META)));
            s.world.conditions.persist = Some((MS, 10 * MS));
            s.world.recover(asked, true, &[]);
            s.run(25 * step);
            s.world.kill(asked);
            s.run(300);
            s.world.start(asked);
            s.run(12_000);
            for attempt in 0.. {
                if all_ready(&s.world) {
                    break;
                }
                assert!(attempt < 4, "{shards} shards, {step}: not whole\n{}", s.world.trace.tail(60));
                let _ = recover(&mut s, asked, true, &[]);
                s.run(12_000);
            }
            for i in 0..30 {
                s.expect(lost[0], &format!("key{i}"), Command::Get, bulk(&format!("value {i}")));
            }
            s.expect(lost[1], "new", set("y"), Reply::Ok);
            s.world.check_logs();
            s.gather();
        }
    }
}

/// The meta group is not taken away from the nodes that placement gives it to by whoever happens to be asked.
#[test]
fn who_has_no_replica_of_the_meta_group_does_not_begin_it() {
    let mut s = story(Options { nodes: 8, ..Options::default() });
    let outside = NodeId(8);
    let lost: Vec<NodeId> = (1..=4).map(NodeId).collect();
    lost.iter().for_each(|n| drop(s.world.kill(*n)));
    lost.iter().for_each(|n| s.world.start(*n));
    s.wait(15_000, "lost", |w| w.ids().into_iter().all(|n| says_lost(w, n, ShardId::META)));
    let plan = recover(&mut s, outside, false, &[]).expect("a plan");
    assert!(plan.lost.iter().any(|l| l.shard.is_meta()) && !plan.done, "{plan:?}");
    let refused = recover(&mut s, outside, true, &[]);
    assert!(matches!(&refused, Err(why) if why.contains("ask node")), "{refused:?}");
    let done = recovered(&mut s, NodeId(5), &[]);
    assert!(done.done && done.generation == Some(2), "{done:?}");
    s.wait(15_000, "all ready", all_ready);
    let meta = s.world.host(outside).and_then(|h| h.meta_state()).map(|m| m.meta.iter().map(|r| r.node).collect());
    assert_eq!(meta, Some((1..=7).map(NodeId).collect::<Vec<_>>()));
}

/// Nobody has the table any more, but somebody has data: that is not destroyed by the words "nothing is left".
#[test]
fn data_without_a_table_is_no_total_loss() {
    let mut s = story(Options { nodes: 8, replication: 7, durable: 1_000, ..Options::default() });
    let keeps = NodeId(8);
    if !s.world.holders(SHARD).contains(&keeps) {
        panic!("another number of replicas: node 8 has to hold the shard");
    }
    let leader = s.leader();
    fill(&mut s, leader, 0..5);
    s.run(500);
    s.world.ids().into_iter().for_each(|n| drop(s.world.kill(n)));
    s.world.ids().into_iter().filter(|n| *n != keeps).for_each(|n| s.world.wipe(n));
    s.world.ids().into_iter().for_each(|n| s.world.start(n));
    s.run(5_000);
    for node in [NodeId(1), keeps] {
        let refused = recover(&mut s, node, true, &[]);
        assert!(matches!(&refused, Err(why) if why.contains("node 8 has 1 replicas")), "{refused:?}");
    }
    s.world.kill(keeps);
    s.world.wipe(keeps);
    s.world.start(keeps);
    s.run(3_000);
    let done = recovered(&mut s, NodeId(1), &[]);
    assert!(done.anew && done.done, "{done:?}");
    s.wait(15_000, "all ready", all_ready);
}

/// To ask what would be done harms nobody: those who lead are not doubted for it.
#[test]
fn a_plan_of_a_healthy_cluster_leaves_it_alone() {
    let mut s = story(Options::default());
    let leader = s.leader();
    let plan = recover(&mut s, leader, true, &[]).expect("a plan");
    assert!(plan.lost.is_empty() && plan.waiting.is_empty() && !plan.done, "{plan:?}");
    s.run(10_000);
    let lines = s.world.trace.tail(10_000);
    let censuses = lines.lines().filter(|l| l.contains("TakeCensus")).count();
    assert!(censuses <= 2, "{censuses}\n{lines}");
}

/// What a replica has applied of a key that counts up; 0 for nothing.
fn applied(w: &World, node: NodeId, key: &str) -> u64 {
    let Some(shard) = w.shard_of(key) else { return 0 };
    let Some(replica) = w.host(node).and_then(|h| h.coordinator().replica(shard)) else { return 0 };
    match replica.observe(&Command::Get.encode(key)) {
        Some(Reply::Bulk(v)) => std::str::from_utf8(&v).ok().and_then(|v| v.parse().ok()).unwrap_or(0),
        _ => 0,
    }
}

/// By chance: how many nodes there are and which of them lose what, when and for how long, on which network, and who is
/// asked to recover. Afterwards the cluster is whole; what was lost is not older than any replica that was left; what was
/// not lost has every acknowledged write.
#[test]
fn any_loss_of_a_majority_can_be_recovered_from() {
    let first = std::env::var("CREMA_SEED").ok().and_then(|s| s.parse().ok());
    let seeds = first
        .map_or(0..60, |s: u64| s..s + std::env::var("CREMA_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1));
    for seed in seeds {
        let result = std::panic::catch_unwind(|| lose_and_recover(seed));
        assert!(result.is_ok(), "CREMA_SEED={seed}");
    }
}

fn lose_and_recover(seed: u64) {
    let mut rng = Rng::new(seed ^ 0x5eed);
    let nodes = *rng.pick(&[3, 3, 5]);
    let durable = *rng.pick(&[0, 500, 1_000]);
    let options = Options {
        seed,
        nodes,
        durable,
        chunk_bytes: *rng.pick(&[50, 500]),
        max_log_bytes: *rng.pick(&[2_000, 1 << 30]),
        ..Options::default()
    };
    let mut world = World::new(Options { shards: 3, ..options });
    assert!(world.run_until(Duration::from_secs(10), all_ready), "founded");
    let mut s = Story { world, answers: Default::default() };
    s.world.conditions.lost = *rng.pick(&[0, 0, 20]);
    s.world.conditions.persist = rng.permille(500).then_some((100 * US, 20 * MS));
    let keys: Vec<String> = (0..3).flat_map(|shard| ["a", "b"].map(|k| s.world.key_of(ShardId(shard), k))).collect();
    // Each key has one writer that counts up: what a read finds says how much of it is there.
    let (mut written, mut acknowledged) = (vec![0u64; keys.len()], vec![0u64; keys.len()]);
    let conns: Vec<_> = keys.iter().map(|_| s.world.connect()).collect();
    let gateway = *rng.pick(&s.world.ids());
    let mut open: Vec<Option<(ConnId, Token)>> = vec![None; keys.len()];
    for _ in 0..rng.range(20, 120) {
        for i in 0..keys.len() {
            if let Some(asked) = open[i] {
                let Some(result) = s.answers.get(&asked) else { continue };
                if matches!(result, ClientResult::Reply(Reply::Ok)) {
                    acknowledged[i] = written[i];
                }
            }
            written[i] += 1;
            open[i] = Some(s.ask(gateway, conns[i], &keys[i], &set(&written[i].to_string()), Duration::from_secs(2)));
        }
        s.run(rng.range(1, 12));
    }
    let lost_nodes = rng.range(nodes / 2 + 1, nodes - u64::from(nodes > 3) - 1).max(2);
    let mut victims = s.world.ids();
    victims.sort_by_cached_key(|_| rng.next_u64());
    victims.truncate(lost_nodes as usize);
    for n in victims.clone() {
        s.world.kill(n);
        s.run(rng.below(40));
    }
    for n in victims.clone() {
        if s.world.durable(n) && rng.permille(700) {
            s.world.wipe(n);
        }
        s.run(rng.below(800));
        s.world.start(n);
    }
    s.run(7_000);
    let ids = s.world.ids();
    let left: Vec<u64> = keys.iter().map(|k| ids.iter().map(|n| applied(&s.world, *n, k)).max().unwrap_or(0)).collect();
    let lost: Vec<bool> =
        keys.iter().map(|k| ids.iter().any(|n| says_lost(&s.world, *n, s.world.shard_of(k).expect("known")))).collect();
    for attempt in 0.. {
        if all_ready(&s.world) {
            break;
        }
        assert!(attempt < 6, "not whole\n{}", s.world.trace.tail(60));
        let before = s.world.recoveries.len();
        let asked = rng.range(1, 2);
        for _ in 0..asked {
            s.world.recover(*rng.pick(&ids), true, &[]);
            s.run(rng.below(300));
        }
        if rng.permille(200) {
            // A minority of what is left may fail again.
            let n = *rng.pick(&victims);
            s.world.kill(n);
            s.run(rng.below(500));
            s.world.start(n);
        }
        s.world.run_until(Duration::from_secs(25), |w| w.recoveries.len() > before);
        s.run(11_000);
    }
    s.world.conditions.lost = 0;
    for (i, key) in keys.iter().enumerate() {
        let mut seen = BTreeSet::new();
        for node in &ids {
            let conn = s.world.connect();
            let asked = s.ask(*node, conn, key, &Command::Get, Duration::from_secs(5));
            let value = match s.answer(asked, 6_000) {
                Some(ClientResult::Reply(Reply::Bulk(v))) => String::from_utf8_lossy(&v).parse().expect("a number"),
                Some(ClientResult::Reply(Reply::Nil)) => 0,
                other => panic!("{key} at {node:?}: {other:?}\n{}", s.world.trace.tail(60)),
            };
            seen.insert(value);
        }
        let value = seen.first().copied().expect("nodes were asked");
        assert_eq!(seen.len(), 1, "{key}: all nodes read the same");
        assert!(value <= written[i] && value >= left[i], "{key}: {value}, but {} was left", left[i]);
        assert!(lost[i] || value >= acknowledged[i], "{key}: {value}, but {} was acknowledged", acknowledged[i]);
        let node = *rng.pick(&ids);
        s.expect(node, key, set("x"), Reply::Ok);
    }
    s.run(1_000);
    s.world.check_logs();
    s.gather();
}
