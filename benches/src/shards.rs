//! Throughput against the number of shards.
//!
//! For each round and each count: a fresh `crema dev` in a process of its own, all keys filled once, then a phase of SET
//! and a phase of GET. Counts are interleaved over the rounds, so that a slow minute of the machine falls on all of
//! them, and medians are printed.

use crate::dev::Dev;
use crate::load::{self, Measured, Operation, Plan, Target};
use crate::stats::{median, table, thousands};
use crema_tests::process::ports::{MAX_NODES, Use};
use crema_tests::process::{Context, Failure, Result};
use std::collections::BTreeMap;
use std::time::Duration;

/// Most runs of one call: each takes 3 s or more.
const MAX_RUNS: usize = 1_000;

/// Flags of `shards`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Shard counts to measure.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16, 64, 256], value_parser = clap::value_parser!(u32).range(1..=16_384))]
    counts: Vec<u32>,
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=u64::from(MAX_NODES)))]
    nodes: u64,
    /// Connections, spread over all gateways.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=5_000))]
    clients: u32,
    /// Requests in flight per connection.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pipeline: u32,
    /// Seconds of each phase.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    value_bytes: u32,
    /// Number of keys, all of them present.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    keys: u32,
    /// Runs of each count.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.counts.len() * args.rounds as usize > MAX_RUNS {
        return Err(Failure::new(format!("counts times rounds is over {MAX_RUNS} runs")));
    }
    let runtime = tokio::runtime::Runtime::new().context("starting the client runtime")?;
    let mut results: BTreeMap<u32, Vec<(Measured, Measured)>> = BTreeMap::new();
    for round in 1..=args.rounds {
        for &count in &args.counts {
            let (set, get) = measure(args, count, &runtime).context(format!("{count} shards, round {round}"))?;
            let one =
                |m: Measured| format!("{}/s p50 {:.2} ms p99 {:.2} ms", thousands(m.per_second), m.p50_ms, m.p99_ms);
            eprintln!(
                "round {round}, {count} shards: SET {}, GET {}, wrong {}",
                one(set),
                one(get),
                set.wrong + get.wrong
            );
            results.entry(count).or_default().push((set, get));
        }
    }
    println!(
        "{} nodes, {} clients, pipeline {}, {}-byte values, {} keys, {} s a phase, medians of {} rounds; ms",
        args.nodes, args.clients, args.pipeline, args.value_bytes, args.keys, args.seconds, args.rounds
    );
    let head = ["shards", "SET/s", "p50", "p99", "GET/s", "p50", "p99", "wrong"];
    let rows: Vec<Vec<String>> = results.iter().map(|(count, runs)| row(*count, runs)).collect();
    print!("{}", table(&head, &rows));
    let wrong: u64 = results.values().flatten().map(|(set, get)| set.wrong + get.wrong).sum();
    if wrong > 0 { Err(Failure::new(format!("{wrong} wrong replies"))) } else { Ok(()) }
}

fn row(count: u32, runs: &[(Measured, Measured)]) -> Vec<String> {
    let mut cells = vec![count.to_string()];
    let sets: Vec<Measured> = runs.iter().map(|r| r.0).collect();
    let gets: Vec<Measured> = runs.iter().map(|r| r.1).collect();
    for phase in [&sets, &gets] {
        cells.push(thousands(median(phase.iter().map(|m| m.per_second))));
        cells.push(format!("{:.2}", median(phase.iter().map(|m| m.p50_ms))));
        cells.push(format!("{:.2}", median(phase.iter().map(|m| m.p99_ms))));
    }
    cells.push(runs.iter().map(|(set, get)| set.wrong + get.wrong).sum::<u64>().to_string());
    cells
}

/// One run: a fresh cluster, filled, then SET, then GET.
fn measure(args: &Args, shards: u32, runtime: &tokio::runtime::Runtime) -> Result<(Measured, Measured)> {
    let dev = Dev::start(args.nodes, shards, &[])?;
    let plan = Plan {
        targets: dev.addrs(Use::Redis).into_iter().map(Target::anything).collect(),
        clients: args.clients,
        pipeline: args.pipeline,
        keys: args.keys,
        value_bytes: args.value_bytes,
        duration: Duration::from_secs(args.seconds),
    };
    let phase = |operation| runtime.block_on(load::run(&plan, operation)).context(format!("{operation:?}"));
    let fill = phase(Operation::Fill)?;
    if fill.wrong > 0 {
        return Err(Failure::new(format!("{} keys could not be set", fill.wrong)));
    }
    let (set, get) = (phase(Operation::Set)?, phase(Operation::Get)?);
    dev.stop()?;
    Ok((set, get))
}
