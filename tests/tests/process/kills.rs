//! Nodes and whole clusters that are killed under recorded load, and the data directories that they leave behind.

use crate::{bad_start, client, expect, expect_exit};
use crema_tests::process::kills::{Drill, READY};
use crema_tests::process::ports::Use;
use crema_tests::process::resp::Value;
use crema_tests::process::scenarios::SHARDS;
use crema_tests::process::{Cluster, Keeps, Process, Result, http, ports, turn};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Of any seed: what the system makes of it differs each time anyway.
const SEED: u64 = 1;
/// A clean end of a start that is refused.
const REFUSAL: Duration = Duration::from_secs(40);

/// One round, told on standard error.
#[track_caller]
fn round(drill: &mut Drill, name: &str, hit: impl FnOnce(&mut Cluster) -> Result<String>) {
    let round = drill.round(name, |cluster, _| hit(cluster)).unwrap();
    eprintln!("{name}: {round}");
}

#[test]
fn in_memory_all_nodes_are_killed_in_turn_and_nothing_is_lost() {
    let _turn = turn().unwrap();
    let mut drill = Drill::new(Keeps::Memory, SEED).unwrap();
    round(&mut drill, "rolling", |cluster| {
        for node in 1..=3 {
            cluster.kill(node)?;
            cluster.restart(node)?;
            // As long as one is not back, the next kill may take the majority of what was acknowledged.
            cluster.wait_ready(READY)?;
        }
        Ok("nodes 1, 2 and 3 killed in turn".into())
    });
    drill.settle().unwrap();
}

#[test]
fn on_disk_all_nodes_are_killed_at_once_and_nothing_is_lost() {
    let _turn = turn().unwrap();
    let mut drill = Drill::new(Keeps::Disk, SEED).unwrap();
    for name in ["first", "second"] {
        let round = drill.whole(name).unwrap();
        eprintln!("{name}: {round}");
    }
    drill.settle().unwrap();
}

#[test]
fn a_lost_data_directory_is_filled_again() {
    let _turn = turn().unwrap();
    let mut drill = Drill::new(Keeps::Disk, SEED).unwrap();
    let victim = drill.cluster.node_with_most_leaders().unwrap();
    let dir = drill.cluster.data_dir(victim);
    let before = incarnation(&drill.cluster, victim);
    round(&mut drill, "wiped", |cluster| {
        cluster.kill(victim)?;
        std::fs::remove_dir_all(&dir).expect("the directory of a node that does not run");
        cluster.restart(victim)?;
        cluster.wait_ready(READY)?;
        Ok(format!("node {victim} killed, its directory removed"))
    });
    drill.settle().unwrap();
    assert_ne!(incarnation(&drill.cluster, victim), before, "another life");
}

#[test]
fn a_flipped_bit_in_a_log_is_never_served() {
    let _turn = turn().unwrap();
    let mut drill = Drill::new(Keeps::Disk, SEED).unwrap();
    let victim = drill.cluster.node_with_most_leaders().unwrap();
    let dir = drill.cluster.data_dir(victim);
    let flip = |cluster: &mut Cluster, part: fn(usize) -> usize| {
        cluster.kill(victim)?;
        let told = flip_bit(&newest_log(&dir), part);
        cluster.restart(victim)?;
        cluster.wait_ready(READY)?;
        Ok(format!("node {victim} killed, {told}"))
    };
    // In what was synced long ago, and in what was written last.
    round(&mut drill, "middle", |cluster| flip(cluster, |len| len / 2));
    let log = drill.cluster.process(victim).stderr();
    assert!(log.contains("it begins a new life"), "the bit in the middle was noticed: {log}");
    round(&mut drill, "end", |cluster| flip(cluster, |len| len - len.min(24)));
    drill.settle().unwrap();
}

#[test]
fn a_data_directory_of_somebody_else_is_refused_and_left_alone() {
    let _turn = turn().unwrap();
    let mut cluster = Cluster::ready_keeping(Keeps::Disk, 3, SHARDS, &[]).unwrap();
    expect(&mut client(&cluster, 1), "SET mine 1", Value::ok());
    let own = ports::reserve().unwrap();
    let dir = cluster.data_dir(1);
    let life = incarnation(&cluster, 1);

    // In use. What its owner writes meanwhile is the owner's affair; who it belongs to stays.
    let before = identity(&dir);
    let mut second = cluster.impostor(1, &own).unwrap();
    expect_refused(&mut second, "in use");
    assert_eq!(identity(&dir), before);
    cluster.wait_ready(Duration::from_secs(20)).unwrap();

    // Of another node, of another cluster.
    cluster.kill(1).unwrap();
    let before = contents(&dir);
    let with = |args: Vec<String>, flag: &str, value: String| {
        let mut args = args;
        match args.iter().position(|a| a == flag) {
            Some(at) => args[at + 1] = value,
            None => args.extend([flag.into(), value]),
        }
        args
    };
    let other_node = with(cluster.command_line(2, &own), "--data-dir", dir.display().to_string());
    bad_start("other-node", cluster.scratch(), &other_node, "belongs to node 1");
    let other_cluster = with(cluster.command_line(1, &own), "--cluster", "another".into());
    bad_start("other-cluster", cluster.scratch(), &other_cluster, "belongs to cluster");
    let after = contents(&dir);
    assert!(before == after, "changed: {:?} became {:?}", before.keys(), after.keys());

    // Its owner goes on with it.
    cluster.restart(1).unwrap();
    cluster.wait_ready(READY).unwrap();
    assert_eq!(incarnation(&cluster, 1), life, "the same life");
    expect(&mut client(&cluster, 1), "GET mine", Value::bulk("1"));
}

#[track_caller]
fn expect_refused(process: &mut Process, word: &str) {
    let status = process.wait(REFUSAL).unwrap();
    let stderr = process.stderr();
    expect_exit(status, 2, &stderr);
    assert!(stderr.contains(word), "{stderr}");
    assert!(process.stdout().is_empty(), "nothing on standard output: {}", process.stdout());
    assert_eq!(stderr.trim().lines().count(), 1, "one sentence: {stderr}");
}

/// The life of `node`, as it says itself.
fn incarnation(cluster: &Cluster, node: u64) -> String {
    let members = http::get_json(cluster.addr(node, Use::Http), "/v1/members").unwrap();
    let own = members.as_array().expect("an array").iter().find(|m| m["node_id"] == node).expect("itself");
    own["incarnation"].as_str().expect("an incarnation").into()
}

fn identity(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("identity")).expect("a node in use has its identity there")
}

/// Every file below `dir`, by its path from there.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(root: &Path, dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(root, &path, found);
            } else {
                found.insert(path.strip_prefix(root).unwrap().into(), std::fs::read(&path).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, dir, &mut found);
    found
}

/// The log file that was written last.
fn newest_log(dir: &Path) -> PathBuf {
    let files = std::fs::read_dir(dir.join("log").join("raft")).unwrap().map(|entry| entry.unwrap().path());
    // Their names are numbers of equal length.
    files.filter(|path| path.extension().is_some_and(|e| e == "raftlog")).max().expect("a node that wrote has a log")
}

/// Flips one bit of `file`, at `part` of the length that was written; says which.
fn flip_bit(file: &Path, part: fn(usize) -> usize) -> String {
    let mut bytes = std::fs::read(file).unwrap();
    // Files may be larger than what was written to them.
    let written = bytes.iter().rposition(|b| *b != 0).expect("not empty") + 1;
    let at = part(written);
    bytes[at] ^= 0x10;
    std::fs::write(file, bytes).unwrap();
    format!("bit 4 of byte {at} of {written} flipped in {}", file.display())
}
