//! The loss of a majority, as an operator meets it: what clients and `crema status` say, and `crema recover`.

use crate::{client, expect, expect_exit};
use crema_tests::process::cluster::Cluster;
use crema_tests::process::kills::READY;
use crema_tests::process::ports::Use;
use crema_tests::process::resp::Value;
use crema_tests::process::{Failure, Keeps, eventually, http, turn};
use std::time::Duration;

const SHARDS: u32 = 4;
const KEYS: u32 = 40;

fn status(cluster: &Cluster, node: u64) -> serde_json::Value {
    http::get_json(cluster.addr(node, Use::Http), "/v1/status").expect("a node that runs says how it stands")
}

#[track_caller]
fn recover(cluster: &Cluster, node: u64, flags: &[&str]) -> serde_json::Value {
    let flags: Vec<&str> = ["--json"].iter().chain(flags).copied().collect();
    let (exit, out, err) = cluster.client_command("recover", node, &flags).unwrap();
    expect_exit(exit, 0, &format!("{out}{err}"));
    serde_json::from_str(&out).expect("JSON")
}

#[test]
fn a_lost_majority_is_said_and_recovered_and_so_is_the_loss_of_everything() {
    let _turn = turn().unwrap();
    let mut cluster = Cluster::ready_keeping(Keeps::Identity, 3, SHARDS, &[]).unwrap();
    let mut first = client(&cluster, 1);
    (0..KEYS).for_each(|i| expect(&mut first, &format!("SET key{i} {i}"), Value::ok()));
    let uuid = status(&cluster, 1)["uuid"].clone();

    for node in [2, 3] {
        cluster.kill(node).unwrap();
    }
    for node in [2, 3] {
        cluster.restart(node).unwrap();
    }
    eventually("every shard and the meta group are known to be lost", READY, || {
        for node in 1..=3 {
            let down = status(&cluster, node)["down"].clone();
            let lost = down.as_array().map_or(0, |d| d.iter().filter(|d| d["lost"] == true).count());
            if lost != SHARDS as usize + 1 {
                return Err(Failure::new(format!("node {node}: {down}")));
            }
        }
        Ok(())
    })
    .unwrap();
    for node in 1..=3 {
        match client(&cluster, node).call("SET key1 x").unwrap() {
            Value::Error(text) => {
                assert!(text.starts_with("CLUSTERDOWN shard ") && text.contains("majority"), "{text}")
            }
            other => panic!("{other:?}"),
        }
    }
    let plan = recover(&cluster, 2, &[]);
    assert_eq!((&plan["done"], plan["lost"].as_array().map(Vec::len)), (&false.into(), Some(SHARDS as usize + 1)));
    let done = recover(&cluster, 2, &["--accept-data-loss"]);
    assert_eq!((&done["done"], &done["generation"], &done["anew"]), (&true.into(), &2.into(), &false.into()), "{done}");
    expect(&mut client(&cluster, 3), "SET after 1", Value::ok());
    cluster.wait_ready(READY).unwrap();
    for node in 1..=3 {
        let mut client = client(&cluster, node);
        // Node 1 was left, and had acknowledged each of them.
        (0..KEYS).for_each(|i| expect(&mut client, &format!("GET key{i}"), Value::bulk(i.to_string())));
    }
    cluster.wait_equal_digests(Duration::from_secs(20)).unwrap();

    cluster.kill_all().unwrap();
    cluster.restart_all().unwrap();
    eventually("nobody founds by itself", READY, || {
        // It may not listen yet.
        let reason = http::get_json(cluster.addr(1, Use::Http), "/v1/status")?["reason"].to_string();
        if reason.contains("joining") { Ok(()) } else { Err(Failure::new(reason)) }
    })
    .unwrap();
    // Asked once more, should a node not be connected yet: nothing was changed then.
    let done = eventually("a recovery", READY, || {
        let (exit, out, err) = cluster.client_command("recover", 1, &["--json", "--accept-data-loss"])?;
        if exit.success() { Ok(out) } else { Err(Failure::new(err)) }
    });
    // Every run of the same command adds to what the ones before have said.
    let done: serde_json::Value = serde_json::from_str(done.unwrap().lines().last().unwrap_or_default()).expect("JSON");
    assert_eq!((&done["anew"], &done["generation"]), (&true.into(), &3.into()), "{done}");
    cluster.wait_ready(READY).unwrap();
    for node in 1..=3 {
        let status = status(&cluster, node);
        assert_eq!(status["uuid"], uuid);
        assert!(status["notice"].to_string().contains("founded anew: previous contents lost"), "{status}");
        expect(&mut client(&cluster, node), "GET key1", Value::Nil);
    }
    let log = cluster.process(1).stderr();
    assert!(log.contains("founded anew: previous contents lost"), "{log}");
}
