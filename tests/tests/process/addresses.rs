//! Nodes come back with other addresses than those on record, all at once: as pods do, or machines of a cloud.

use crate::{client, expect};
use crema_tests::process::kills::READY;
use crema_tests::process::ports::Use;
use crema_tests::process::resp::Value;
use crema_tests::process::{Cluster, Failure, Keeps, eventually, http, turn};

const KEYS: u32 = 40;

/// Whatever the logs say of addresses is of before, and only a majority can correct it.
#[test]
fn a_cluster_comes_back_though_all_its_addresses_are_others() {
    let _turn = turn().unwrap();
    let mut cluster = Cluster::ready_keeping(Keeps::Disk, 3, 4, &[]).unwrap();
    for round in 0..3 {
        let mut first = client(&cluster, 1);
        (0..KEYS).for_each(|i| expect(&mut first, &format!("SET key{i} {round}"), Value::ok()));
        cluster.kill_all().unwrap();
        cluster.move_elsewhere().unwrap();
        cluster.restart_all().unwrap();
        cluster.wait_ready(READY).unwrap();
        for node in 1..=3 {
            let mut here = client(&cluster, node);
            (0..KEYS).for_each(|i| expect(&mut here, &format!("GET key{i}"), Value::bulk(round.to_string())));
        }
        eventually("all nodes are on record where they are", READY, || {
            let raft = |node: u64| cluster.addr(node, Use::Raft).to_string();
            let nodes = http::get_json(cluster.addr(1, Use::Http), "/v1/voters")?;
            let listed = nodes.as_array().map_or(0, |all| {
                let there = |n: &&serde_json::Value| n["node_id"].as_u64().is_some_and(|id| n["raft_addr"] == raft(id));
                all.iter().filter(there).count()
            });
            if listed == 3 { Ok(()) } else { Err(Failure::new(format!("{nodes}"))) }
        })
        .unwrap();
    }
}
