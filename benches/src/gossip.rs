//! What gossip costs, and how soon it knows.
//!
//! ```text
//!   rest       N nodes that claim S shards, nothing happens        bytes and datagrams a second and node, by UDP and by TCP
//!   news       one of them publishes a new leadership              time until all others' trackers know
//!   detection  one of N is dropped, as a crash would               time to suspect and to dead at each of the others
//!   discovery  nodes that know one seed start at once              time until all see all
//!   pauses     crema start × 3, the observer is stopped (SIGSTOP)  times that anybody was suspected, and taken as failed
//! ```
//!
//! The nodes of the first four are instances of `crema_gossip` in this process, with the parameters of production, a cluster
//! key, and real sockets on loopback. All of them share this machine's processors, hence the processor time a node is told
//! as well: where the sum comes near to what there is, times are those of the machine and not of gossip.

use crate::load::Random;
use crate::stats::{median, table, thousands};
use crema_core::{Epoch, Incarnation, NodeId, ShardId, Term};
use crema_gossip::{ClusterKey, Gossip, GossipConfig, GossipStats, KeyRing, MemberState, SeedAddr};
use crema_tests::process::ports::Use;
use crema_tests::process::{Cluster, Context, Failure, Result, eventually, http};
use rustix::process::Signal;
use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Every wait ends with an error after this.
const PATIENCE: Duration = Duration::from_secs(60);
/// Rounds of joining and publishing are over by then.
const SETTLE: Duration = Duration::from_secs(3);
/// Detectors know the rhythm of a node by then.
const KNOWN: Duration = Duration::from_secs(8);
/// How closely times of news are told, and those that take seconds.
const FINE: Duration = Duration::from_millis(1);
const COARSE: Duration = Duration::from_millis(10);
/// Most nodes that are in this process at once while failures are measured.
const MOST_AT_ONCE: u32 = 30;
/// Changes of leaders begin at random times within this, so that no phase of the rounds is preferred.
const SPREAD_MS: u32 = 250;
/// News must be everywhere within this: goals of the design.
const NEWS_GOAL_MS: f64 = 500.0;
const DISCOVERY_GOAL_S: f64 = 5.0;
/// How long an observer is stopped.
const PAUSE: Duration = Duration::from_secs(3);
const PAUSED_SHARDS: u32 = 16;

/// Flags of `gossip`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to measure. Pauses are measured if --pauses says how many.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "rest,news,detection,discovery")]
    parts: Vec<Part>,
    /// Numbers of nodes for rest and news.
    #[arg(long, value_delimiter = ',', default_value = "3,10,30", value_parser = clap::value_parser!(u32).range(2..=100))]
    nodes: Vec<u32>,
    /// Numbers of claims for rest, ascending; the last one stands while there is news.
    #[arg(long, value_delimiter = ',', default_value = "16,256,4096", value_parser = clap::value_parser!(u32).range(1..=4_096))]
    shards: Vec<u32>,
    /// Seconds of each measurement at rest.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Changes of leaders for each number of nodes.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    changes: u32,
    /// Numbers of nodes for detection.
    #[arg(long, value_delimiter = ',', default_value = "3,10", value_parser = clap::value_parser!(u32).range(2..=30))]
    observed: Vec<u32>,
    /// Nodes dropped for each number of nodes, each of a cluster of its own.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    kills: u32,
    /// Nodes that discover each other.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(2..=100))]
    joiners: u32,
    /// How often they do.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// How often an observer is stopped for 3 s.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    pauses: u32,
    /// Which nodes and phases are drawn.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Rest,
    News,
    Detection,
    Discovery,
}

/// Runs the benchmark and prints its tables.
pub(crate) fn run(args: &Args) -> Result<()> {
    let has = |part| args.parts.contains(&part);
    let mut missed = Vec::new();
    eprintln!("load averages at the start: {}", load_averages());
    let runtime = tokio::runtime::Runtime::new().context("the runtime")?;
    if has(Part::Rest) || has(Part::News) {
        missed.extend(runtime.block_on(rest_and_news(args))?);
    }
    if has(Part::Detection) {
        runtime.block_on(detection(args))?;
    }
    if has(Part::Discovery) {
        missed.extend(runtime.block_on(discovery(args))?);
    }
    drop(runtime);
    if args.pauses > 0 {
        pauses(args.pauses)?;
    }
    eprintln!("load averages at the end: {}", load_averages());
    if missed.is_empty() { Ok(()) } else { Err(Failure::new(missed.join("; "))) }
}

fn load_averages() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// Processor time of this process so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Names a cluster that no other of this machine has: ports are used again, and nodes look for those that are gone.
fn cluster_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("bench-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

async fn start(cluster: &str, node: u32, seed: Option<&Gossip>) -> Result<Gossip> {
    let bind = "127.0.0.1:0".parse().context("an address")?;
    let raft_addr = format!("127.0.0.1:{}", 20_000 + node);
    let incarnation = Incarnation(node.into());
    let mut config = GossipConfig::new(NodeId(node.into()), incarnation, raft_addr, cluster, bind);
    // Any key does; what it costs does not depend on it.
    config.keys = Some(KeyRing::new(ClusterKey::new(std::array::from_fn(|at| at as u8))));
    config.seeds = seed.map(|seed| SeedAddr::from(seed.addr())).into_iter().collect();
    Gossip::start(config).await.context(format!("node {node}"))
}

/// Nodes 1 to `count` of which all know the first one's address, started at once.
async fn started(count: u32) -> Result<Vec<Gossip>> {
    let name = cluster_name();
    let first = start(&name, 1, None).await?;
    let mut nodes = Vec::new();
    for node in 2..=count {
        nodes.push(start(&name, node, Some(&first)).await?);
    }
    nodes.insert(0, first);
    Ok(nodes)
}

/// The same, when all see all.
async fn met(count: u32) -> Result<Vec<Gossip>> {
    let nodes = started(count).await?;
    wait("all see all", COARSE, || all_alive(&nodes, count)).await?;
    Ok(nodes)
}

fn all_alive(nodes: &[Gossip], count: u32) -> bool {
    let alive = |g: &Gossip| g.members().iter().filter(|m| m.state == MemberState::Alive).count();
    nodes.iter().all(|g| alive(g) == count as usize)
}

/// Looks each `period`; returns how long it took.
async fn wait(what: &str, period: Duration, mut holds: impl FnMut() -> bool) -> Result<Duration> {
    let began = Instant::now();
    loop {
        let took = began.elapsed();
        if holds() {
            return Ok(took);
        }
        if took > PATIENCE {
            return Err(Failure::new(format!("not within {} s: {what}", PATIENCE.as_secs())));
        }
        sleep(period).await;
    }
}

async fn rest_and_news(args: &Args) -> Result<Vec<String>> {
    let (mut at_rest, mut with_news, mut missed) = (Vec::new(), Vec::new(), Vec::new());
    let mut random = Random::new(args.seed);
    for &count in &args.nodes {
        let nodes = met(count).await?;
        let mut claims = 0;
        for &shards in &args.shards {
            claims = shards.max(claims);
            for (at, node) in nodes.iter().enumerate() {
                let own = (at as u32..claims).step_by(nodes.len());
                node.publish_leaders(&own.map(|shard| (ShardId(shard), Term(1), Epoch(1))).collect::<Vec<_>>());
            }
            let known = |g: &Gossip| g.tracker().all_leaders().len() == claims as usize;
            let told = wait("all claims are known", COARSE, || nodes.iter().all(known)).await?;
            eprintln!("{count} nodes: {claims} claims are known everywhere after {:.2} s", told.as_secs_f64());
            if args.parts.contains(&Part::Rest) {
                at_rest.push(rest(&nodes, claims, Duration::from_secs(args.seconds)).await);
            }
        }
        if args.parts.contains(&Part::News) {
            let took = news(&nodes, claims, args.changes, &mut random).await?;
            if percentile(&took, 100.0) > NEWS_GOAL_MS {
                missed.push(format!("news took more than {NEWS_GOAL_MS} ms among {count} nodes"));
            }
            let ms = |value: f64| format!("{value:.0}");
            let of = |percent| ms(percentile(&took, percent));
            let median = ms(median(took.iter().copied()));
            with_news.push(vec![
                count.to_string(),
                claims.to_string(),
                took.len().to_string(),
                median,
                of(95.0),
                of(100.0),
            ]);
        }
    }
    if !at_rest.is_empty() {
        println!(
            "at rest: sent by a node, bytes a second with what seals and frames them; processor milliseconds a second"
        );
        let head = ["nodes", "claims", "UDP B/s", "TCP B/s", "datagrams/s", "most of one node B/s", "processor ms/s"];
        print!("{}", table(&head, &at_rest));
    }
    if !with_news.is_empty() {
        println!("news of one leader, from publish_leaders until all other trackers know; ms");
        print!("{}", table(&["nodes", "claims", "changes", "median", "p95", "max"], &with_news));
    }
    Ok(missed)
}

/// What the nodes send while nothing happens: a row of the table.
async fn rest(nodes: &[Gossip], claims: u32, time: Duration) -> Vec<String> {
    sleep(SETTLE).await;
    let (began, processor) = (Instant::now(), processor_time());
    let before: Vec<GossipStats> = nodes.iter().map(Gossip::stats).collect();
    // Time under test.
    sleep(time).await;
    let seconds = began.elapsed().as_secs_f64();
    let processor = (processor_time() - processor).as_secs_f64() * 1e3;
    let rates = |field: fn(&GossipStats) -> u64| -> Vec<f64> {
        let pairs = nodes.iter().zip(&before);
        pairs.map(|(g, before)| (field(&g.stats()) - field(before)) as f64 / seconds).collect()
    };
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let all = rates(|s| s.sent_bytes + s.sent_stream_bytes);
    vec![
        nodes.len().to_string(),
        claims.to_string(),
        thousands(mean(&rates(|s| s.sent_bytes))),
        thousands(mean(&rates(|s| s.sent_stream_bytes))),
        format!("{:.1}", mean(&rates(|s| s.sent_datagrams))),
        thousands(all.into_iter().fold(0.0, f64::max)),
        format!("{:.1}", processor / seconds / nodes.len() as f64),
    ]
}

/// Milliseconds that each change took to become known everywhere, ascending.
async fn news(nodes: &[Gossip], claims: u32, changes: u32, random: &mut Random) -> Result<Vec<f64>> {
    let mut took = Vec::new();
    for change in 0..changes {
        // A pace, not a wait for anything.
        sleep(Duration::from_millis(random.below(SPREAD_MS).into())).await;
        let leader = &nodes[random.below(nodes.len() as u32) as usize];
        let shard = ShardId(random.below(claims));
        let term = Term(2 + u64::from(change));
        let knows = |g: &Gossip| g.tracker().entry(shard).is_some_and(|entry| entry.term >= term);
        let began = Instant::now();
        leader.publish_leaders(&[(shard, term, Epoch(1))]);
        wait("all know of a change", FINE, || nodes.iter().all(knows)).await?;
        took.push(began.elapsed().as_secs_f64() * 1e3);
    }
    took.sort_by(f64::total_cmp);
    Ok(took)
}

/// Of values in ascending order: the smallest that is at least as large as so many of a hundred.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let at = (sorted.len() as f64 * percent / 100.0).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Seconds until one observer suspected a node and took it as dead.
type Detected = (f64, f64);

async fn detection(args: &Args) -> Result<()> {
    let mut rows = Vec::new();
    for &count in &args.observed {
        let at_once = (MOST_AT_ONCE / count).max(1);
        let mut detected: Vec<Detected> = Vec::new();
        for first in (0..args.kills).step_by(at_once as usize) {
            let mut kills = JoinSet::new();
            for kill in first..args.kills.min(first + at_once) {
                kills.spawn(kill_one(count, args.seed + u64::from(kill)));
            }
            while let Some(observers) = kills.join_next().await {
                detected.extend(observers.context("a kill")??);
            }
        }
        let sorted = |of: fn(&Detected) -> f64| {
            let mut seconds: Vec<f64> = detected.iter().map(of).collect();
            seconds.sort_by(f64::total_cmp);
            seconds
        };
        let cells = |seconds: Vec<f64>| {
            let of = [percentile(&seconds, 0.0), median(seconds.iter().copied()), percentile(&seconds, 100.0)];
            of.map(|s| format!("{s:.2}"))
        };
        let [min, mid, max] = cells(sorted(|d| d.0));
        let [dead_min, dead_mid, dead_max] = cells(sorted(|d| d.1));
        rows.push(vec![count.to_string(), args.kills.to_string(), min, mid, max, dead_min, dead_mid, dead_max]);
    }
    println!("a node is dropped: seconds until each of the others suspects it, and takes it as dead");
    let head = ["nodes", "kills", "suspect min", "median", "max", "dead min", "median", "max"];
    print!("{}", table(&head, &rows));
    Ok(())
}

/// Drops one of `count` nodes; what each of the others saw.
async fn kill_one(count: u32, seed: u64) -> Result<Vec<Detected>> {
    let mut random = Random::new(seed);
    let mut nodes = met(count).await?;
    sleep(KNOWN + Duration::from_millis(random.below(SPREAD_MS).into())).await;
    let at = random.below(count);
    let victim = NodeId(u64::from(at) + 1);
    drop(nodes.remove(at as usize));
    let began = Instant::now();
    let mut seen: Vec<(Option<f64>, Option<f64>)> = vec![(None, None); nodes.len()];
    wait("a dropped node is dead to all others", COARSE, || {
        for (g, (suspect, dead)) in nodes.iter().zip(&mut seen) {
            let state = g.members().iter().find(|m| m.meta.node_id == victim).map(|m| m.state);
            let now = began.elapsed().as_secs_f64();
            match state {
                Some(MemberState::Suspect) => _ = suspect.get_or_insert(now),
                Some(MemberState::Dead) => _ = dead.get_or_insert(now),
                // Suspected by mistake, perhaps even before it ended.
                _ => (*suspect, *dead) = (None, None),
            }
        }
        seen.iter().all(|(_, dead)| dead.is_some())
    })
    .await?;
    seen.into_iter().map(|(s, d)| s.zip(d).ok_or_else(|| Failure::new("dead before it was suspect"))).collect()
}

async fn discovery(args: &Args) -> Result<Vec<String>> {
    let mut took = Vec::new();
    for _ in 0..args.rounds {
        let began = Instant::now();
        let nodes = started(args.joiners).await?;
        wait("all see all", COARSE, || all_alive(&nodes, args.joiners)).await?;
        took.push(began.elapsed().as_secs_f64());
    }
    took.sort_by(f64::total_cmp);
    let cell = |seconds: f64| format!("{seconds:.2}");
    let slowest = percentile(&took, 100.0);
    println!("discovery from one seed, from the first start until all see all; seconds");
    let row = vec![args.joiners.to_string(), took.len().to_string(), cell(median(took.iter().copied())), cell(slowest)];
    print!("{}", table(&["nodes", "rounds", "median", "max"], &[row]));
    let missed = slowest > DISCOVERY_GOAL_S;
    Ok(missed.then(|| format!("discovery took more than {DISCOVERY_GOAL_S} s")).into_iter().collect())
}

/// Stops one of three processes again and again. Its log, and those of the others, tell whom they suspected and buried.
fn pauses(count: u32) -> Result<()> {
    const STATES: [&str; 2] = ["state=Suspect", "state=Dead"];
    let mut cluster = Cluster::ready_logging(3, PAUSED_SHARDS, "crema_gossip=debug,info")?;
    let observer = *cluster.running().last().ok_or_else(|| Failure::new("no node runs"))?;
    let mut back = Vec::new();
    for number in 1..=count {
        cluster.process(observer).signal(Signal::STOP)?;
        // Time under test.
        std::thread::sleep(PAUSE);
        cluster.process(observer).signal(Signal::CONT)?;
        let woken = Instant::now();
        for node in cluster.running() {
            let addr = cluster.addr(node, Use::Http);
            eventually(&format!("all nodes are alive to node {node} after pause {number}"), PATIENCE, || {
                let members = http::get_json(addr, "/v1/members")?;
                let alive = members.as_array().is_some_and(|m| m.len() == 3 && m.iter().all(|m| m["state"] == "alive"));
                if alive { Ok(()) } else { Err(Failure::new(members.to_string())) }
            })?;
        }
        back.push(woken.elapsed().as_secs_f64());
    }
    let mut seen = |nodes: &[u64]| {
        let logs: Vec<String> = nodes.iter().map(|node| cluster.process(*node).stderr()).collect();
        let lines = logs.iter().flat_map(|log| log.lines()).filter(|line| line.contains("member changed"));
        let lines: Vec<&str> = lines.collect();
        if lines.is_empty() {
            // Then their silence would prove nothing.
            return Err(Failure::new("the logs tell nothing of members"));
        }
        Ok(STATES.map(|state| lines.iter().filter(|line| line.contains(state)).count()))
    };
    let [suspected, buried] = seen(&[observer])?;
    let [observer_suspected, observer_buried] = seen(&[1, 2])?;
    back.sort_by(f64::total_cmp);
    println!(
        "a node is stopped for {} s; times that it suspected or buried others, and that others did so with it",
        PAUSE.as_secs()
    );
    let row = vec![
        count.to_string(),
        suspected.to_string(),
        buried.to_string(),
        observer_suspected.to_string(),
        observer_buried.to_string(),
        format!("{:.2}", median(back.iter().copied())),
        format!("{:.2}", percentile(&back, 100.0)),
    ];
    let head = ["pauses", "suspected", "failed", "was suspected", "was failed", "all alive again s, median", "max"];
    print!("{}", table(&head, &[row]));
    match buried + observer_buried {
        0 => Ok(()),
        failed => {
            Err(Failure::new(format!("{failed} nodes were taken as failed because a node was stopped for a while")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values = [1.0, 2.0, 3.0, 4.0];
        assert_eq!([0.0, 50.0, 75.0, 95.0, 100.0].map(|p| percentile(&values, p)), [1.0, 2.0, 3.0, 4.0, 4.0]);
        assert!(percentile(&[], 50.0).is_nan());
    }
}
