//! Rounds of `kill -9` under recorded load, of one node or of all: nothing acknowledged may be lost, nothing read stale.
//!
//! ```text
//!   a round: clients at every gateway (Recorder), on keys of this round
//!     -> kill, some time down, restart -> every shard takes writes through every gateway -> every client is answered again
//!     -> clients end, every key is read through every gateway -> the history is judged
//!     -> Ledger: every key of every earlier round still holds what it held; Ballast: so do large values
//! ```

use super::ballast::Ballast;
use super::cluster::{Cluster, Keeps};
use super::ledger::{self, Ledger};
use super::load::tag_per_shard;
use super::ports::Use;
use super::recorder::{Outcomes, Recorder, Spec};
use super::scenarios::{self, CURIOUS, IMPATIENT, NODES, PATIENT, PROGRESS, SHARDS, SOON};
use super::{Context, Failure, Result};
use crate::sim::rng::Rng;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A restarted node must be ready within this.
pub const READY: Duration = Duration::from_secs(60);
/// Hash tags, each of another shard, that the clients of a round work on.
const TAGS: u64 = 3;
/// Logs small enough for large values to fill them within a round: on disk, then data is written as a whole and the log
/// is cut; in memory, then those that lag are sent snapshots.
const SMALL_LOGS: &[&str] = &["--max-log-bytes=2mb"];
const SMALL_LOGS_ON_DISK: &[&str] = &["--max-log-bytes=2mb", "--checkpoint-log-bytes=16mb"];
/// Large values of a round that has them: more than a log on disk may grow.
const BALLAST_BYTES: u64 = if cfg!(debug_assertions) { 8 << 20 } else { 20 << 20 };

/// How one round went.
#[derive(Clone, Debug)]
pub struct Round {
    /// What was done.
    pub what: String,
    /// What became of all commands.
    pub total: Outcomes,
    /// From the restart, or what else the round ended with, until every shard took a write through every gateway.
    pub writable_after: Duration,
    /// The longest of these writes.
    pub slowest: String,
    /// Time that judging the history took.
    pub judged_in: Duration,
    /// Keys of this and earlier rounds that were found as they must be.
    pub keys: usize,
    /// Bytes of large values that were written.
    pub ballast: u64,
    /// The whole round.
    pub took: Duration,
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Round { what, total, writable_after, slowest, judged_in, keys, ballast, took } = self;
        write!(f, "{what}: {total}; writable {writable_after:.1?} later ({slowest}); judged in {judged_in:.1?}, ")?;
        write!(f, "{keys} keys as before, {} MiB of ballast; {took:.1?}", ballast >> 20)
    }
}

/// A cluster that is killed again and again.
pub struct Drill {
    /// The cluster. Between rounds it may be treated as one likes, as long as all nodes run again.
    pub cluster: Cluster,
    keeps: Keeps,
    ledger: Ledger,
    ballast: Ballast,
    rng: Rng,
    /// Commands so far.
    pub operations: u64,
    /// Keys that lost something acknowledged.
    pub lost: u64,
    /// Keys that were read stale, or otherwise wrong.
    pub stale: u64,
}

impl Drill {
    /// A new cluster, ready. `seed` decides who is hit and when, not what the system makes of it.
    ///
    /// # Errors
    ///
    /// As [`Cluster::ready`].
    pub fn new(keeps: Keeps, seed: u64) -> Result<Drill> {
        let flags = if keeps == Keeps::Disk { SMALL_LOGS_ON_DISK } else { SMALL_LOGS };
        let cluster = Cluster::ready_keeping(keeps, NODES, SHARDS, flags)?;
        let (ledger, rng) = (Ledger::default(), Rng::new(seed));
        let ballast = Ballast::new(&tag_per_shard(SHARDS));
        Ok(Drill { cluster, keeps, ledger, ballast, rng, operations: 0, lost: 0, stale: 0 })
    }

    /// One round in which one node is killed: every other time the one that leads most.
    ///
    /// # Errors
    ///
    /// Says which promise was broken; logs, data directories and the history are kept.
    pub fn single(&mut self, name: &str) -> Result<Round> {
        let most = self.rng.permille(500);
        let any = self.rng.range(1, NODES);
        let victim = if most { self.cluster.node_with_most_leaders()? } else { any };
        let (before, down) = (self.moment(500), self.down());
        // What is on disk stands by itself: then the next kill may come while this node is still catching up.
        let wait = self.keeps == Keeps::Memory || self.rng.permille(500);
        self.round(name, |cluster, _| {
            std::thread::sleep(before);
            cluster.kill(victim)?;
            std::thread::sleep(down);
            cluster.restart(victim)?;
            if wait {
                cluster.wait_ready(READY)?;
            }
            Ok(format!("node {victim} killed, back after {down:?}"))
        })
    }

    /// One round in which all nodes are killed at once. In half of the rounds one comes back only when the other two serve:
    /// any two must have all that was acknowledged.
    ///
    /// # Errors
    ///
    /// As [`Drill::single`].
    pub fn whole(&mut self, name: &str) -> Result<Round> {
        let (before, down) = (self.moment(500), self.down());
        let late = self.rng.range(1, NODES);
        let late = self.rng.permille(500).then_some(late);
        self.round(name, |cluster, _| {
            std::thread::sleep(before);
            cluster.kill_all()?;
            std::thread::sleep(down);
            if let Some(late) = late {
                (1..=NODES).filter(|node| *node != late).try_for_each(|node| cluster.restart(node))?;
                scenarios::wait_writable(cluster, &format!("{name}:two"))?;
            }
            cluster.restart_all()?;
            cluster.wait_ready(READY)?;
            let late = late.map_or(String::new(), |node| format!(", node {node} last"));
            Ok(format!("all killed, back after {down:?}{late}"))
        })
    }

    fn moment(&mut self, below_ms: u64) -> Duration {
        Duration::from_millis(self.rng.below(below_ms))
    }

    /// At once, or after a time in which the others do or do not elect new leaders.
    fn down(&mut self) -> Duration {
        if self.rng.permille(300) { Duration::ZERO } else { self.moment(1_200) }
    }

    /// One round of load in which `hit` is done; it says in words what it did. No two rounds may have the same `name`.
    ///
    /// # Errors
    ///
    /// As [`Drill::single`].
    pub fn round(&mut self, name: &str, hit: impl FnOnce(&mut Cluster, &Recorder) -> Result<String>) -> Result<Round> {
        let result = self.judged_round(name, hit).context(name);
        if result.is_err() {
            self.cluster.scratch().keep();
        }
        result
    }

    fn judged_round(
        &mut self,
        name: &str,
        hit: impl FnOnce(&mut Cluster, &Recorder) -> Result<String>,
    ) -> Result<Round> {
        let start = Instant::now();
        let tags = self.tags();
        let nodes = self.cluster.running();
        let gateways = self.gateways();
        // Without them for a while, logs are short and a node that was down catches up by them.
        let bytes = if self.rng.permille(500) { BALLAST_BYTES } else { 0 };
        let addrs = gateways.iter().map(|(_, addr)| *addr).collect();
        let before = self.ballast.bytes();
        let loading = self.ballast.clone().load(addrs, bytes)?;
        let recorder = Recorder::start(name, clients(&self.cluster), tags)?;
        recorder.wait_answers(&nodes, PROGRESS, SOON).context("before it")?;
        let what = hit(&mut self.cluster, &recorder)?;
        let restarted = Instant::now();
        let writable = scenarios::wait_writable(&self.cluster, name).map(|slowest| (restarted.elapsed(), slowest));
        let progress = recorder.wait_answers(&self.cluster.running(), PROGRESS, SOON).context("after it");

        // The history tells more than that something took too long: it is judged in any case.
        self.ballast = loading.finish()?;
        let recorded = recorder.finish(&gateways, SOON)?;
        let total = recorded.total();
        self.operations += total.answered + total.refused + total.unknown;
        let judging = Instant::now();
        let wrong = recorded.wrong()?;
        let judged_in = judging.elapsed();
        if !wrong.is_empty() {
            let lost = ledger::lost_keys(&recorded.operations);
            self.lost += lost;
            self.stale += (wrong.len() as u64).saturating_sub(lost).max(u64::from(lost == 0));
            let file = self.cluster.scratch().path().join(format!("history-{name}.jsonl"));
            recorded.write(&file)?;
            return Err(Failure::new(format!("{what}: history {}: {}", file.display(), wrong.join("\n"))));
        }
        // Before this round's keys are added: they have just been read.
        self.check_ledger()?;
        self.ledger.add(&recorded.operations)?;
        progress?;
        scenarios::healthy(&mut self.cluster)?;
        let (keys, took) = (self.ledger.keys(), start.elapsed());
        let ballast = self.ballast.bytes() - before;
        let (writable_after, slowest) = writable?;
        Ok(Round { what, total, writable_after, slowest, judged_in, keys, ballast, took })
    }

    /// After the last round: all nodes are ready, hold the same, and every key of every round is as it was.
    ///
    /// # Errors
    ///
    /// As [`Drill::single`].
    pub fn settle(&mut self) -> Result<()> {
        let result = self.cluster.wait_ready(READY).and_then(|()| self.cluster.wait_equal_digests(SOON));
        let result = result.and_then(|()| self.check_ledger()).and_then(|()| scenarios::healthy(&mut self.cluster));
        scenarios::keep_failed(&self.cluster, result)
    }

    fn check_ledger(&mut self) -> Result<()> {
        let gateways = self.gateways();
        let losses = self.ledger.check(&gateways, SOON)?;
        self.lost += losses.lost;
        self.stale += losses.stale;
        if !losses.told.is_empty() {
            let (lost, stale, told) = (losses.lost, losses.stale, losses.told.join("\n"));
            return Err(Failure::new(format!("of earlier rounds, {lost} keys are lost, {stale} stale: {told}")));
        }
        let wrong = self.ballast.check(&gateways, SOON)?;
        self.lost += wrong.len() as u64;
        if wrong.is_empty() { Ok(()) } else { Err(Failure::new(format!("large values: {}", wrong.join("\n")))) }
    }

    fn gateways(&self) -> Vec<(u64, SocketAddr)> {
        let cluster = &self.cluster;
        cluster.running().into_iter().map(|node| (node, cluster.addr(node, Use::Redis))).collect()
    }

    /// Hash tags of neighbouring shards from a random one on: over the rounds, all shards have their turn.
    fn tags(&mut self) -> Vec<String> {
        let first = self.rng.below(u64::from(SHARDS));
        let all = tag_per_shard(SHARDS);
        (first..first + TAGS).map(|shard| all[shard as usize % all.len()].clone()).collect()
    }
}

/// Two writers and two readers at every gateway.
fn clients(cluster: &Cluster) -> Vec<Spec> {
    let kinds = [(true, PATIENT), (true, IMPATIENT), (false, CURIOUS), (false, CURIOUS)];
    let at = |node| {
        let addr = cluster.addr(node, Use::Redis);
        kinds.into_iter().map(move |(writes, timeout)| Spec { gateway: node, addr, writes, timeout })
    };
    cluster.running().into_iter().flat_map(at).collect()
}
