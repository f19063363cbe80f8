//! Faults of real clusters under recorded load: a node killed, paused, or cut off. The tests and the command line run them.
//!
//! ```text
//!   leaders settled -> clients at every gateway (Recorder) -> fault, for seconds -> healed
//!     -> every shard takes writes through every gateway -> every client is answered again
//!     -> clients end, every key is read through every gateway -> the history is judged
//! ```
//!
//! The fault always hits the node that leads most, and the clients work on shards that it leads and on one that it does
//! not. Readers ask its gateway all the while: what a deposed leader answers, or one that slept through its deposition, is
//! where a stale read would show.

use super::cluster::Cluster;
use super::load::tag_per_shard;
use super::netns::{Network, Traffic};
use super::ports::Use;
use super::recorder::{Outcomes, Recorder, Spec};
use super::resp::{Client, Value};
use super::{Context, Failure, Result, binary, eventually};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Nodes of each cluster.
pub const NODES: u64 = 3;
/// Shards of each cluster.
pub const SHARDS: u32 = 16;
/// Within this after the end of a fault every shard must take writes through every gateway. An unoptimised build on a
/// busy machine is given twice the time.
pub(super) const WRITABLE: Duration = Duration::from_secs(if cfg!(debug_assertions) { 20 } else { 10 });
/// Limit of waits for what takes a moment.
pub(super) const SOON: Duration = Duration::from_secs(30);
/// Longer than a request's deadline of 5 s: such a client sees what the gateway says at the end of it.
pub(super) const PATIENT: Duration = Duration::from_secs(15);
/// Of writers that go on with other commands during a fault.
pub(super) const IMPATIENT: Duration = Duration::from_millis(1_000);
/// Of readers: an answer that comes at the end of a fault is to a question asked at most this long before.
pub(super) const CURIOUS: Duration = Duration::from_millis(200);
/// Readers at the victim.
const CROWD: usize = 24;
/// Answers that every client must get before a fault and after it.
pub(super) const PROGRESS: u64 = 20;

/// How to run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Directory for the histories, which are then kept however the run ends. It must exist.
    pub history: Option<PathBuf>,
    /// Number of the round, part of the files' names.
    pub round: u64,
    /// Also the faults that the tests have no time for.
    pub all: bool,
}

/// How one fault went.
#[derive(Clone, Debug)]
pub struct Report {
    /// The fault.
    pub fault: &'static str,
    /// The node that it hit.
    pub victim: u64,
    /// What became of all commands.
    pub total: Outcomes,
    /// What became of those sent to the victim.
    pub at_victim: Outcomes,
    /// From the end of the fault until every shard took a write through every gateway.
    pub writable_after: Duration,
    /// Time that judging the history took.
    pub judged_in: Duration,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { fault, victim, total, at_victim, writable_after, judged_in } = self;
        write!(f, "{fault}: {total} (at node {victim}, which it hit: {at_victim}); ")?;
        write!(f, "writable {writable_after:.1?} after its end; judged in {judged_in:.1?}")
    }
}

/// What a fault may do to requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Requests {
    MayFail,
    MustNotFail,
}

/// Pauses of 1 s and of 10 s, then `kill -9`, in one cluster on loopback.
///
/// # Errors
///
/// Says which promise was broken, and names the history; the logs are kept.
pub fn on_loopback(options: &Options, told: &mut dyn FnMut(&Report)) -> Result<()> {
    let mut cluster = Cluster::ready(NODES, SHARDS)?;
    let mut run = Run { cluster: &mut cluster, options, told };
    let result = run
        .fault("pause-1s", Requests::MayFail, |cluster, victim| pause(cluster, victim, Duration::from_secs(1)))
        .and_then(|()| {
            run.fault("pause-10s", Requests::MayFail, |cluster, victim| pause(cluster, victim, Duration::from_secs(10)))
        })
        .and_then(|()| run.fault("kill", Requests::MayFail, Cluster::kill));
    keep_failed(&cluster, result)
}

/// Partitions, in one cluster in network namespaces. Ask [`super::netns::available`] first.
///
/// # Errors
///
/// As [`on_loopback`].
pub fn in_namespaces(options: &Options, told: &mut (dyn FnMut(&Report) + Send)) -> Result<()> {
    // Building the program may need the network that the machine has.
    binary::crema()?;
    let net = Arc::new(Network::new(NODES)?);
    let inside = net.clone();
    net.within(move || {
        let mut cluster = Cluster::ready_in(inside.clone(), NODES, SHARDS)?;
        let mut run = Run { cluster: &mut cluster, options, told };
        let result = partitions(&mut run, &inside);
        keep_failed(&cluster, result)
    })?
}

fn partitions(run: &mut Run<'_>, net: &Network) -> Result<()> {
    use Requests::{MayFail, MustNotFail};
    let seconds = Duration::from_secs;
    // Longer than a request's deadline: what hangs is answered while the fault lasts.
    run.cut(net, "partition", MayFail, seconds(6), |n, victim| n.isolate(victim, Traffic::All))?;
    // Its frames are lost, but it hears the others: it must not go on as if it led.
    run.cut(net, "mute", MayFail, seconds(4), |n, victim| n.mute(victim, Traffic::Frames))?;
    run.cut(net, "deaf", MayFail, seconds(4), |n, victim| n.deafen(victim, Traffic::Frames))?;
    // It sleeps while it is deposed and wakes to silence: nobody tells it, what its peers said before is still to be read,
    // and clients are waiting. Only the clock says that it must not answer.
    run.fault("asleep-and-cut", MayFail, |cluster, victim| {
        cluster.process(victim).signal(Signal::STOP)?;
        net.isolate(victim, Traffic::All)?;
        std::thread::sleep(seconds(3));
        cluster.process(victim).signal(Signal::CONT)?;
        std::thread::sleep(seconds(2));
        net.heal()
    })?;
    // Gossip says all the while that every node is well.
    run.cut(net, "raft-cut", MayFail, seconds(4), |n, victim| n.isolate(victim, Traffic::Raft))?;
    // Gossip decides nothing: whatever it believes by now, no request may suffer.
    run.cut(net, "gossip-cut", MustNotFail, seconds(6), |n, victim| n.isolate(victim, Traffic::Gossip))?;
    if run.options.all {
        // Without answers, TCP itself stalls in the direction that still works.
        run.cut(net, "mute-packets", MayFail, seconds(8), |n, victim| n.mute(victim, Traffic::All))?;
        run.cut(net, "deaf-packets", MayFail, seconds(8), |n, victim| n.deafen(victim, Traffic::All))?;
        run.cut(net, "gossip-cut-long", MustNotFail, seconds(20), |n, victim| n.isolate(victim, Traffic::Gossip))?;
    }
    Ok(())
}

/// Stops a node for `time` without its noticing.
fn pause(cluster: &mut Cluster, victim: u64, time: Duration) -> Result<()> {
    cluster.process(victim).signal(Signal::STOP)?;
    // Time under test.
    std::thread::sleep(time);
    cluster.process(victim).signal(Signal::CONT)
}

pub(super) fn keep_failed(cluster: &Cluster, result: Result<()>) -> Result<()> {
    if result.is_err() {
        cluster.scratch().keep();
    }
    result
}

struct Run<'a> {
    cluster: &'a mut Cluster,
    options: &'a Options,
    told: &'a mut dyn FnMut(&Report),
}

impl Run<'_> {
    /// As [`Run::fault`], with cuts in `net` for `time`.
    fn cut(
        &mut self,
        net: &Network,
        name: &'static str,
        requests: Requests,
        time: Duration,
        cut: impl FnOnce(&Network, u64) -> Result<()>,
    ) -> Result<()> {
        self.fault(name, requests, |_, victim| {
            cut(net, victim)?;
            // Time under test.
            std::thread::sleep(time);
            net.heal()
        })
    }

    /// One fault, from its start to its end, with all that must hold.
    fn fault(
        &mut self,
        name: &'static str,
        requests: Requests,
        fault: impl FnOnce(&mut Cluster, u64) -> Result<()>,
    ) -> Result<()> {
        self.judged_fault(name, requests, fault).context(name)
    }

    fn judged_fault(
        &mut self,
        name: &'static str,
        requests: Requests,
        fault: impl FnOnce(&mut Cluster, u64) -> Result<()>,
    ) -> Result<()> {
        let cluster = &mut *self.cluster;
        let victim = cluster.node_with_most_leaders()?;
        let tags = tags_of(&cluster.leaders(victim)?, victim);
        let nodes = cluster.running();
        let recorder = Recorder::start(name, clients(cluster, &nodes, victim, requests), tags)?;
        recorder.wait_answers(&nodes, PROGRESS, SOON).context("before the fault")?;
        fault(cluster, victim)?;
        let healed = Instant::now();

        let gateways: Vec<_> = cluster.running().into_iter().map(|n| (n, cluster.addr(n, Use::Redis))).collect();
        let writable = wait_writable(cluster, name).map(|_| healed.elapsed());
        let progress = recorder.wait_answers(&cluster.running(), PROGRESS, SOON).context("after the fault");
        // The history tells more than that something took too long: it is written and judged in any case.
        let recorded = recorder.finish(&gateways, SOON)?;
        let file = match &self.options.history {
            Some(directory) => directory.join(format!("{}-{name}.jsonl", self.options.round)),
            None => cluster.scratch().path().join(format!("history-{name}.jsonl")),
        };
        recorded.write(&file)?;
        let total = recorded.total();
        let start = Instant::now();
        let judged = recorded.judge().context(format!("history {}", file.display()));
        let judged_in = start.elapsed();
        let suffered = match requests {
            Requests::MustNotFail if total.refused + total.unknown + recorded.unreachable > 0 => Err(Failure::new(
                format!("requests failed ({total}, {} unreachable): {:#?}", recorded.unreachable, recorded.refusals),
            )),
            _ => Ok(()),
        };
        judged.and(progress).and(suffered).and_then(|()| healthy(cluster))?;
        let at_victim = recorded.outcomes.get(&victim).copied().unwrap_or_default();
        (self.told)(&Report { fault: name, victim, total, at_victim, writable_after: writable?, judged_in });
        Ok(())
    }
}

/// A hash tag for two shards that `victim` leads, and one for a shard that another node leads.
fn tags_of(leaders: &BTreeMap<u64, Vec<u32>>, victim: u64) -> Vec<String> {
    let tags = tag_per_shard(SHARDS);
    let led = leaders.get(&victim).into_iter().flatten().take(2);
    let others = leaders.iter().filter(|(node, _)| **node != victim).flat_map(|(_, shards)| shards).take(1);
    led.chain(others).map(|shard| tags[*shard as usize].clone()).collect()
}

/// Two writers and two readers at each gateway, and a crowd of readers at the victim's: just one of the questions that it
/// finds when it wakes must overtake the news that it was deposed, for a stale answer to show.
fn clients(cluster: &Cluster, nodes: &[u64], victim: u64, requests: Requests) -> Vec<Spec> {
    let mut specs = Vec::new();
    for node in nodes {
        let mut add = |writes, timeout| {
            // Where nothing may fail, lost patience would look like a failure.
            let timeout = if requests == Requests::MustNotFail { PATIENT } else { timeout };
            specs.push(Spec { gateway: *node, addr: cluster.addr(*node, Use::Redis), writes, timeout });
        };
        add(true, PATIENT);
        add(true, IMPATIENT);
        for _ in 0..if *node == victim { CROWD } else { 2 } {
            add(false, CURIOUS);
        }
    }
    specs
}

/// Waits until every shard took a write through every running gateway. The writes come one after the other; says which one took
/// longest.
pub(super) fn wait_writable(cluster: &Cluster, name: &str) -> Result<String> {
    let deadline = Instant::now() + WRITABLE;
    let mut slowest = (Duration::ZERO, 0, 0);
    for node in cluster.running() {
        for (shard, tag) in tag_per_shard(SHARDS).iter().enumerate() {
            let start = Instant::now();
            let left = deadline.saturating_duration_since(Instant::now());
            eventually(&format!("a write to shard {shard} through node {node} after the fault"), left, || {
                let mut client = Client::connect(cluster.addr(node, Use::Redis), PATIENT).context("connecting")?;
                match client.call(&format!("SET {{{tag}}}:{name}:probe {node}")).context("SET")? {
                    reply if reply == Value::ok() => Ok(()),
                    other => Err(Failure::new(format!("{other:?}"))),
                }
            })?;
            slowest = slowest.max((start.elapsed(), node, shard));
        }
    }
    let (took, node, shard) = slowest;
    Ok(format!("{took:.1?} for shard {shard} through node {node}"))
}

/// No running node has ended or panicked.
pub(super) fn healthy(cluster: &mut Cluster) -> Result<()> {
    for node in cluster.running() {
        let process = cluster.process(node);
        if let Some(status) = process.ended()? {
            return Err(Failure::new(format!("node {node} ended: {status}")));
        }
        if process.stderr().contains("panicked") || process.stdout().contains("panicked") {
            return Err(Failure::new(format!("node {node} panicked")));
        }
    }
    Ok(())
}
