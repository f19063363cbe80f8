//! A cluster that grows and shrinks under recorded load: nothing is lost, nothing stale, and no command fails.

use crema_tests::process::cluster;
use crema_tests::process::kills::{Drill, Round};
use crema_tests::process::ports::{self, Block, Use};
use crema_tests::process::{Cluster, Failure, Keeps, Process, Result, eventually, http, turn};
use std::collections::BTreeMap;
use std::time::Duration;

/// Longest time for a node to join, and for all replicas to move.
const SOON: Duration = Duration::from_secs(60);

fn joiner(cluster: &Cluster, node: u64, own: &Block) -> Process {
    let mut args = cluster.command_line(node, own);
    args.push("--join".into());
    Process::spawn(&format!("node-{node}"), cluster.scratch(), &args).unwrap()
}

/// `crema voters add|remove 4 5`, asked of a node, and then until nothing moves any more.
fn change(cluster: &Cluster, what: &str, asked: u64) -> Result<()> {
    let addr = cluster.addr(asked, Use::Http);
    let args = ["voters", what, "4", "5", "--http-addr", &addr.to_string()].map(str::to_string);
    let (status, out, err) = cluster::run(&format!("voters-{what}"), cluster.scratch(), &args)?;
    if !status.success() {
        return Err(Failure::new(format!("voters {what}: {status}: {out}{err}")));
    }
    eventually("all replicas in place", SOON, || {
        let moves = http::get_json(addr, "/v1/moves")?;
        let voters = http::get_json(addr, "/v1/voters")?.as_array().map_or(0, Vec::len);
        let done = moves["open"] == 0 && (voters == 5) == (what == "add");
        if done { Ok(()) } else { Err(Failure::new(format!("{voters} voters, {moves}"))) }
    })
}

/// Replicas of data shards by node, as a node tells.
fn replicas(cluster: &Cluster) -> BTreeMap<u64, u64> {
    let voters = http::get_json(cluster.addr(1, Use::Http), "/v1/voters").unwrap();
    let voters = voters.as_array().expect("a list");
    voters.iter().map(|v| (v["node_id"].as_u64().unwrap(), v["replicas"].as_u64().unwrap())).collect()
}

#[track_caller]
fn unharmed(name: &str, round: &Round) {
    eprintln!("{name}: {round}");
    assert_eq!((round.total.refused, round.total.unknown), (0, 0), "{name}: no command fails");
    assert!(round.total.answered > 0);
}

#[test]
fn a_cluster_grows_to_five_nodes_and_shrinks_again_under_recorded_load() {
    let _turn = turn().unwrap();
    let mut drill = Drill::new(Keeps::Memory, 1).unwrap();
    let blocks = [ports::reserve().unwrap(), ports::reserve().unwrap()];
    let mut joined: Vec<Process> = (4..).zip(&blocks).map(|(n, own)| joiner(&drill.cluster, n, own)).collect();
    for (node, own) in (4..).zip(&blocks) {
        eventually("a gateway that is ready", SOON, || match http::get(own.addr(node, Use::Http), "/readyz")? {
            (200, _) => Ok(()),
            (code, why) => Err(Failure::new(format!("{code}: {why}"))),
        })
        .unwrap();
    }
    let shards = u64::from(drill.cluster.shards());
    let grown = drill.round("grown", |cluster, _| {
        change(cluster, "add", 2)?;
        Ok("nodes 4 and 5 added".into())
    });
    unharmed("grown", &grown.unwrap());
    let held = replicas(&drill.cluster);
    let (least, most) = (held.values().min().unwrap(), held.values().max().unwrap());
    assert!(held.len() == 5 && held.values().sum::<u64>() == 3 * shards && most - least <= 4, "{held:?}");
    let shrunk = drill.round("shrunk", |cluster, _| {
        change(cluster, "remove", 3)?;
        Ok("nodes 4 and 5 removed".into())
    });
    unharmed("shrunk", &shrunk.unwrap());
    assert_eq!(replicas(&drill.cluster), (1..=3).map(|n| (n, shards)).collect());
    for process in &mut joined {
        assert!(process.ended().unwrap().is_none(), "a removed node goes on as a gateway");
        process.kill().unwrap();
    }
    drill.settle().unwrap();
}
