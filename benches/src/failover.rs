//! The pause that the end of a node causes.
//!
//! A fresh cluster of three processes each time. Writers at the two gateways that will survive write to every shard each
//! 10 ms; then the node with most leaders is killed, or stopped with `--graceful`. Measured is the longest time between
//! two acknowledged writes to one shard, over all shards and both gateways; counted are requests that failed; and every
//! acknowledged write is read back through both gateways.

use crate::stats::{median, table};
use crema_tests::process::load::check_acknowledged;
use crema_tests::process::ports::Use;
use crema_tests::process::{Cluster, Failure, Load, Result, WriterReport};
use std::net::SocketAddr;
use std::time::Duration;

const PERIOD: Duration = Duration::from_millis(10);
/// Batches of both writers together before the kill and after it: about half a second, and a second and a half.
const BEFORE: u64 = 100;
const AFTER: u64 = 300;
/// Batches after which a writer ends by itself.
const MOST_BATCHES: u64 = 6_000;
const PROGRESS_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// Flags of `failover`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How many nodes to end, each of a fresh cluster.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    kills: u32,
    /// Number of shards.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_024))]
    shards: u32,
    /// SIGTERM instead of kill -9: the node hands over its leaders first.
    #[arg(long)]
    graceful: bool,
}

struct Pause {
    longest: Duration,
    failed: u64,
    written: usize,
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut pauses = Vec::new();
    for number in 1..=args.kills {
        let pause = measure(args).map_err(|e| Failure::new(format!("kill {number}: {e}")))?;
        eprintln!(
            "kill {number}: longest pause {} ms, {} failed, {} acknowledged writes all readable",
            pause.longest.as_millis(),
            pause.failed,
            pause.written
        );
        pauses.push(pause);
    }
    let ms = |p: &Pause| p.longest.as_secs_f64() * 1e3;
    let fold = |f: fn(f64, f64) -> f64, from: f64| pauses.iter().map(ms).fold(from, f);
    let failed: u64 = pauses.iter().map(|p| p.failed).sum();
    let how = if args.graceful { "SIGTERM" } else { "kill -9" };
    println!(
        "{how} of the node with most leaders, {} shards, 3 processes, writes each 10 ms; pauses in ms",
        args.shards
    );
    let row = vec![
        pauses.len().to_string(),
        format!("{:.0}", fold(f64::min, f64::INFINITY)),
        format!("{:.0}", median(pauses.iter().map(ms))),
        format!("{:.0}", fold(f64::max, 0.0)),
        failed.to_string(),
        "0".into(), // A lost write ends the benchmark above.
    ];
    print!("{}", table(&["kills", "min", "median", "max", "failed requests", "lost writes"], &[row]));
    if failed > 0 { Err(Failure::new(format!("{failed} requests failed at surviving gateways"))) } else { Ok(()) }
}

fn measure(args: &Args) -> Result<Pause> {
    let mut cluster = Cluster::ready(3, args.shards)?;
    let victim = cluster.node_with_most_leaders()?;
    let survivors = cluster.running().into_iter().filter(|node| *node != victim);
    let gateways: Vec<(u64, SocketAddr)> = survivors.map(|node| (node, cluster.addr(node, Use::Redis))).collect();
    let load = Load::start("load", &gateways, args.shards, PERIOD, MOST_BATCHES)?;
    load.wait_batches(BEFORE, PROGRESS_WITHIN)?;
    if args.graceful {
        let status = cluster.terminate(victim, STOP_WITHIN)?;
        if !status.success() {
            return Err(Failure::new(format!("node {victim} ended with {status}")));
        }
    } else {
        cluster.kill(victim)?;
    }
    load.wait_batches(AFTER, PROGRESS_WITHIN)?;
    let reports = load.finish()?;
    for &(_, addr) in &gateways {
        check_acknowledged(addr, &reports)?;
    }
    for failure in reports.iter().flat_map(|r| &r.failures) {
        eprintln!("failed: {failure}");
    }
    Ok(Pause {
        longest: reports.iter().map(|r| r.longest_gap).max().unwrap_or_default(),
        failed: reports.iter().map(|r: &WriterReport| r.failed).sum(),
        written: reports.iter().map(|r| r.acknowledged.len()).sum(),
    })
}
