//! Cuts of one protocol, of the other, and of both: there is one cluster with the voters that it had, on every side of each.
//!
//! ```text
//!   gossip cut   both sides suspect each other    all gateways take writes
//!   raft cut     gossip says that all are well    the majority takes writes, the minority refuses them
//!   all cut      both                             the same
//!   all cut, and the minority's node is started anew, without memory: it founds nothing, and joins when the cut is over
//!     during each: uuid, approved nodes and voters of every shard, as every node sees them, are what they were; then healed
//! ```
//!
//! The minority is always the node that leads most. Whether what clients see is linearizable meanwhile is judged elsewhere
//! ([`super::scenarios`]); here it counts that gossip decides nothing, and that losing it costs nothing.

use super::cluster::Cluster;
use super::load::{Load, check_acknowledged, tag_per_shard};
use super::netns::{Network, Traffic};
use super::ports::Use;
use super::resp::{Client, Value, encode};
use super::scenarios::{NODES, PATIENT, SHARDS, SOON, WRITABLE, healthy, keep_failed, wait_writable};
use super::{Context, Failure, Result, binary, eventually, http};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pace of the writers at the majority.
const PERIOD: Duration = Duration::from_millis(20);
/// Batches after which a writer ends by itself.
const MOST_BATCHES: u64 = 3_000;
/// Batches that the writers must get through before a cut and again during it.
const PROGRESS: u64 = 20;
/// For so long a node that was started anew alone is watched.
const ALONE: Duration = Duration::from_secs(3);

/// How one cut went.
#[derive(Clone, Debug)]
pub struct Cut {
    /// Which one; also part of the keys that are written.
    pub name: &'static str,
    /// The node on the minority's side.
    pub victim: u64,
    /// From the cut until both sides suspected each other by gossip, where it was cut.
    pub noticed: Option<Duration>,
    /// From the cut until every shard took a write through every gateway of the majority.
    pub writable: Duration,
    /// What the gateway of the minority said to a write to each shard, sent at the beginning of the cut, and how often; of a node
    /// that was started anew, why it is not ready.
    pub minority: BTreeMap<String, usize>,
    /// Writes at the majority that were acknowledged from before the cut until it was over, all of them readable afterwards.
    pub acknowledged: usize,
    /// Requests there that were answered with an error.
    pub failed: u64,
    /// From the end of the cut until every shard took a write through every gateway.
    pub healed: Duration,
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cut { name, victim, noticed, writable, minority, acknowledged, failed, healed } = self;
        write!(f, "{name}: node {victim} cut off; ")?;
        if let Some(noticed) = noticed {
            write!(f, "suspected after {noticed:.1?}; ")?;
        }
        write!(f, "majority writable after {writable:.1?}, {acknowledged} acknowledged, {failed} failed; ")?;
        write!(f, "minority says {minority:?}; all writable {healed:.1?} after its end")
    }
}

/// What must stay as it is, as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    uuid: String,
    approved: BTreeSet<u64>,
    /// For each shard the nodes of its replicas, and their roles.
    replicas: BTreeMap<u64, BTreeMap<u64, String>>,
}

/// Runs all cuts in one cluster in network namespaces. Ask [`super::netns::available`] first.
///
/// # Errors
///
/// Says what was not as it must be; the logs are kept.
pub fn drill(told: &mut (dyn FnMut(&Cut) + Send)) -> Result<()> {
    // Building the program may need the network that the machine has.
    binary::crema()?;
    let net = Arc::new(Network::new(NODES)?);
    let inside = net.clone();
    net.within(move || {
        let mut cluster = Cluster::ready_in(inside.clone(), NODES, SHARDS)?;
        let result = cuts(&mut cluster, &inside, told);
        keep_failed(&cluster, result)
    })?
}

fn cuts(cluster: &mut Cluster, net: &Network, told: &mut dyn FnMut(&Cut)) -> Result<()> {
    let facts = facts(cluster, 1)?;
    let mut drill = Drill { cluster, net, facts };
    for (name, traffic, restart) in [
        ("gossip-cut", Traffic::Gossip, false),
        ("raft-cut", Traffic::Raft, false),
        ("all-cut", Traffic::All, false),
        ("all-cut-and-restart", Traffic::All, true),
    ] {
        told(&drill.cut(name, traffic, restart).context(name)?);
    }
    drill.cluster.wait_equal_digests(SOON)?;
    healthy(drill.cluster)
}

struct Drill<'a> {
    cluster: &'a mut Cluster,
    net: &'a Network,
    facts: Facts,
}

impl Drill<'_> {
    /// One cut, from its beginning until everything is as before.
    fn cut(&mut self, name: &'static str, traffic: Traffic, restart: bool) -> Result<Cut> {
        let victim = self.cluster.node_with_most_leaders()?;
        let nodes = self.cluster.running();
        let majority: Vec<(u64, SocketAddr)> = self.gateways().into_iter().filter(|(n, _)| *n != victim).collect();
        let load = Load::start(name, &majority, SHARDS, PERIOD, MOST_BATCHES)?;
        load.wait_batches(PROGRESS, SOON).context("before")?;

        let began = Instant::now();
        self.net.isolate(victim, traffic)?;
        if restart {
            self.cluster.kill(victim)?;
            self.cluster.restart(victim)?;
        }
        // Asked at once: its leaders do not know yet that they are deposed.
        let asked = self.cluster.addr(victim, Use::Redis);
        let refuses = traffic != Traffic::Gossip && !restart;
        let refusals = refuses.then(|| std::thread::spawn(move || refusals(asked)));
        let writing = if traffic == Traffic::Gossip { self.gateways() } else { majority };
        let within = Duration::from_secs(5) + WRITABLE;
        writing.iter().try_for_each(|(_, addr)| eventually("writes at the majority", within, || writes(*addr)))?;
        let writable = began.elapsed();
        let noticed = match traffic {
            // A node that was started anew has never heard of the others.
            _ if restart => None,
            Traffic::Gossip | Traffic::All => Some(self.wait_suspected(victim, began)?),
            Traffic::Raft | Traffic::Frames => None,
        };
        let minority = match refusals {
            Some(thread) => thread.join().map_err(|_| Failure::new("the minority's client panicked"))??,
            None if restart => self.stays_alone(victim)?,
            None => BTreeMap::new(),
        };
        if traffic == Traffic::Raft {
            nodes.iter().try_for_each(|node| self.expect_alive(*node))?;
        }
        load.wait_batches(PROGRESS, SOON).context("during")?;
        // Suspicions are there by now, and leaders have changed: what is decided by them is decided.
        for node in nodes.iter().filter(|node| !restart || **node != victim) {
            self.expect_facts(*node)?;
        }

        self.net.heal()?;
        let ended = Instant::now();
        self.cluster.wait_ready(Duration::from_secs(60))?;
        wait_writable(self.cluster, name)?;
        let healed = ended.elapsed();
        for node in &nodes {
            eventually(&format!("all are alive to node {node}"), SOON, || self.expect_alive(*node))?;
            eventually(&format!("node {node} sees the cluster of before"), SOON, || self.expect_facts(*node))?;
        }
        let reports = load.finish()?;
        for (_, addr) in self.gateways() {
            check_acknowledged(addr, &reports)?;
        }
        let acknowledged = reports.iter().map(|r| r.acknowledged.len()).sum();
        let failed = reports.iter().map(|r| r.failed).sum();
        if traffic == Traffic::Gossip && failed > 0 {
            let failures: Vec<&String> = reports.iter().flat_map(|r| &r.failures).collect();
            return Err(Failure::new(format!("without gossip requests failed: {failures:#?}")));
        }
        Ok(Cut { name, victim, noticed, writable, minority, acknowledged, failed, healed })
    }

    fn gateways(&self) -> Vec<(u64, SocketAddr)> {
        let running = self.cluster.running().into_iter();
        running.map(|node| (node, self.cluster.addr(node, Use::Redis))).collect()
    }

    fn expect_facts(&self, node: u64) -> Result<()> {
        let found = facts(self.cluster, node)?;
        let expected = &self.facts;
        if found == *expected {
            return Ok(());
        }
        Err(Failure::new(format!("the cluster was {expected:?}; node {node} sees {found:?}")))
    }

    /// By gossip, as `node` sees it.
    fn expect_alive(&self, node: u64) -> Result<()> {
        let states = states(self.cluster, node)?;
        if states.len() == NODES as usize && states.values().all(|state| state == "alive") {
            return Ok(());
        }
        Err(Failure::new(format!("node {node} sees {states:?}")))
    }

    /// Waits until the sides suspect each other, or go further.
    fn wait_suspected(&self, victim: u64, since: Instant) -> Result<Duration> {
        eventually("both sides suspect each other", SOON, || {
            for node in self.cluster.running() {
                let states = states(self.cluster, node)?;
                let across = states.iter().filter(|(other, _)| (**other == victim) != (node == victim));
                if across.clone().count() == 0 || across.clone().any(|(_, state)| state == "alive") {
                    return Err(Failure::new(format!("node {node} sees {states:?}")));
                }
            }
            Ok(since.elapsed())
        })
    }

    /// A node that was started anew during the cut founds no cluster and serves nobody; what it says instead.
    fn stays_alone(&self, victim: u64) -> Result<BTreeMap<String, usize>> {
        let addr = self.cluster.addr(victim, Use::Http);
        eventually("the new start answers", SOON, || http::get(addr, "/livez"))?;
        let until = Instant::now() + ALONE;
        let mut said = BTreeMap::new();
        while Instant::now() < until {
            let status = http::get_json(addr, "/v1/status")?;
            let ready = http::get(addr, "/readyz")?;
            if !status["uuid"].is_null() || ready.0 == 200 {
                return Err(Failure::new(format!("node {victim} is alone, but: {status}")));
            }
            *said.entry(status["reason"].as_str().unwrap_or_default().to_string()).or_default() += 1;
            // A pace of looking; that there is nothing to see is the point.
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(said)
    }
}

fn facts(cluster: &Cluster, node: u64) -> Result<Facts> {
    let addr = cluster.addr(node, Use::Http);
    let none = |what: &str| Failure::new(format!("node {node}: no {what}"));
    let list = |path: &str| match http::get_json(addr, path)? {
        serde_json::Value::Array(list) => Ok(list),
        other => Err(Failure::new(format!("node {node}: {path}: {other}"))),
    };
    let uuid = http::get_json(addr, "/v1/status")?["uuid"].as_str().ok_or_else(|| none("uuid"))?.to_string();
    let approved = list("/v1/voters")?.iter().filter_map(|voter| voter["node_id"].as_u64()).collect();
    let mut replicas = BTreeMap::new();
    for shard in list("/v1/shards")? {
        let of = shard["replicas"].as_array().ok_or_else(|| none("replicas"))?;
        let role = |r: &serde_json::Value| Some((r["node"].as_u64()?, r["role"].as_str()?.to_string()));
        replicas.insert(shard["shard"].as_u64().ok_or_else(|| none("shard"))?, of.iter().filter_map(role).collect());
    }
    if replicas.len() != SHARDS as usize {
        return Err(none("list of all shards"));
    }
    Ok(Facts { uuid, approved, replicas })
}

/// How the members stand by gossip, as `node` sees it.
fn states(cluster: &Cluster, node: u64) -> Result<BTreeMap<u64, String>> {
    let members = http::get_json(cluster.addr(node, Use::Http), "/v1/members")?;
    let of = |m: &serde_json::Value| Some((m["node_id"].as_u64()?, m["state"].as_str()?.to_string()));
    Ok(members.as_array().into_iter().flatten().filter_map(of).collect())
}

/// One write to each shard.
fn probe(addr: SocketAddr) -> Result<Vec<Value>> {
    let mut client = Client::connect(addr, PATIENT).context("connecting")?;
    let mut bytes = Vec::new();
    for tag in tag_per_shard(SHARDS) {
        encode(&[b"SET", format!("{{{tag}}}:probe").as_bytes(), b"x"], &mut bytes);
    }
    client.send(&bytes).context("sending")?;
    (0..SHARDS).map(|shard| client.read().context(format!("SET in shard {shard}"))).collect()
}

fn writes(addr: SocketAddr) -> Result<()> {
    let replies = probe(addr)?;
    match replies.iter().find(|reply| **reply != Value::ok()) {
        None => Ok(()),
        Some(other) => Err(Failure::new(format!("{addr}: {other:?}"))),
    }
}

/// What a gateway without a majority says: an error for every shard.
fn refusals(addr: SocketAddr) -> Result<BTreeMap<String, usize>> {
    let mut said = BTreeMap::new();
    for (shard, reply) in probe(addr)?.into_iter().enumerate() {
        let Value::Error(error) = reply else {
            return Err(Failure::new(format!("the minority answered a write to shard {shard} with {reply:?}")));
        };
        // Its kind; the rest names the shard.
        *said.entry(error.split(' ').next().unwrap_or_default().to_string()).or_default() += 1;
    }
    Ok(said)
}
