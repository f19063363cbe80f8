//! SET with logs and data on disk against memory alone.
//!
//! ```text
//!   for each round: crema dev            -> fill -> SET at each pipeline    } in turn, the first one of a round
//!                   crema dev --data-dir -> fill -> SET at each pipeline    } being the second one of the next
//!                     /metrics: syncs, entries, before and after each phase
//! ```
//!
//! Ratios are medians of the rounds' own ratios. What a sync costs is the disk's: `--dir` chooses it.

use crate::dev::Dev;
use crate::load::{self, Measured, Operation, Plan, Target};
use crate::stats::{median, table, thousands};
use crema_tests::process::ports::{MAX_NODES, Use};
use crema_tests::process::{Context, Failure, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Flags of `durable`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where directories for the data are created, and removed again; the system's temporary files by default.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Nodes of the cluster, all of them in one process.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=u64::from(MAX_NODES)))]
    nodes: u64,
    /// Number of shards.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_024))]
    shards: u32,
    /// Connections, spread over all gateways.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=5_000))]
    clients: u32,
    /// Requests in flight per connection, one phase each.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16], value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pipelines: Vec<u32>,
    /// Seconds of each phase.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    value_bytes: u32,
    /// Number of keys, all of them present.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    keys: u32,
    /// Runs of each.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    Memory,
    Disk,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Memory => "memory",
            Mode::Disk => "disk",
        }
    }
}

/// A phase of SET.
#[derive(Clone, Copy)]
struct Phase {
    set: Measured,
    /// Of all nodes, meanwhile; zeros without a disk.
    log: Log,
}

/// Counters of the log, the sums over all nodes.
#[derive(Clone, Copy, Default)]
struct Log {
    syncs: u64,
    entries: u64,
}

/// Removed when the cluster in it has ended.
struct Directory(PathBuf);

impl Directory {
    fn new(base: &Path, round: u32) -> Result<Directory> {
        let path = base.join(format!("crema-durable-{}-{round}", std::process::id()));
        // One that is there already is somebody else's.
        std::fs::create_dir(&path).context(path.display())?;
        Ok(Directory(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What cannot be removed lies among temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("starting the client runtime")?;
    let mut results: BTreeMap<(u32, Mode), Vec<Phase>> = BTreeMap::new();
    for round in 1..=args.rounds {
        let turns = if round % 2 == 1 { [Mode::Memory, Mode::Disk] } else { [Mode::Disk, Mode::Memory] };
        for mode in turns {
            let phases = measure(args, mode, round, &runtime).context(format!("{}, round {round}", mode.name()))?;
            for (pipeline, phase) in args.pipelines.iter().zip(phases) {
                let (set, log) = (phase.set, phase.log);
                eprintln!(
                    "round {round}, {}, pipeline {pipeline}: {}/s p50 {:.2} ms p99 {:.2} ms max {:.1} ms, {} syncs, \
                     {} entries, wrong {}",
                    mode.name(),
                    thousands(set.per_second),
                    set.p50_ms,
                    set.p99_ms,
                    set.max_ms,
                    log.syncs,
                    log.entries,
                    set.wrong
                );
                results.entry((*pipeline, mode)).or_default().push(phase);
            }
        }
    }
    println!(
        "{} nodes in one process, {} shards, {} clients, {}-byte values, {} keys, {} s a phase, medians of {} rounds, \
         data in {}; times in ms, syncs per node",
        args.nodes,
        args.shards,
        args.clients,
        args.value_bytes,
        args.keys,
        args.seconds,
        args.rounds,
        base(args).display()
    );
    let head =
        ["pipeline", "kept in", "SET/s", "of memory", "p50", "of memory", "p99", "max", "syncs/s", "entries a sync"];
    let head: Vec<&str> = head.into_iter().chain(["SETs a sync"]).collect();
    let rows: Vec<Vec<String>> = results
        .iter()
        .map(|((pipeline, mode), phases)| row(args, *pipeline, *mode, phases, &results[&(*pipeline, Mode::Memory)]))
        .collect();
    print!("{}", table(&head, &rows));
    let wrong: u64 = results.values().flatten().map(|phase| phase.set.wrong).sum();
    if wrong > 0 { Err(Failure::new(format!("{wrong} wrong replies"))) } else { Ok(()) }
}

fn row(args: &Args, pipeline: u32, mode: Mode, phases: &[Phase], memory: &[Phase]) -> Vec<String> {
    let of = |pick: fn(&Phase) -> f64| median(phases.iter().map(pick));
    let ratio = |pick: fn(&Phase) -> f64| {
        let own = phases.iter().zip(memory).map(|(own, memory)| pick(own) / pick(memory));
        if mode == Mode::Disk { format!("{:.2} ×", median(own)) } else { String::new() }
    };
    let mut cells = vec![
        pipeline.to_string(),
        mode.name().into(),
        thousands(of(|p| p.set.per_second)),
        ratio(|p| p.set.per_second),
        format!("{:.2}", of(|p| p.set.p50_ms)),
        ratio(|p| p.set.p50_ms),
        format!("{:.2}", of(|p| p.set.p99_ms)),
        format!("{:.1}", of(|p| p.set.max_ms)),
    ];
    if mode == Mode::Disk {
        let nodes = args.nodes as f64;
        cells.push(thousands(median(phases.iter().map(|p| p.log.syncs as f64 / nodes / p.set.seconds))));
        cells.push(format!("{:.1}", of(|p| p.log.entries as f64 / p.log.syncs as f64)));
        // Each write is on the disk of every node.
        let sets = phases.iter().map(|p| p.set.per_second * p.set.seconds * nodes / p.log.syncs as f64);
        cells.push(format!("{:.1}", median(sets)));
    } else {
        cells.resize(11, String::new());
    }
    cells
}

fn base(args: &Args) -> PathBuf {
    args.dir.clone().unwrap_or_else(std::env::temp_dir)
}

/// One run: a fresh cluster, filled, then SET at each pipeline.
fn measure(args: &Args, mode: Mode, round: u32, runtime: &tokio::runtime::Runtime) -> Result<Vec<Phase>> {
    // Declared first, so that it goes last.
    let directory = (mode == Mode::Disk).then(|| Directory::new(&base(args), round)).transpose()?;
    let flag = directory.as_ref().map(|d| format!("--data-dir={}", d.0.display()));
    let dev = Dev::start(args.nodes, args.shards, &flag.as_deref().into_iter().collect::<Vec<_>>())?;
    let mut plan = Plan {
        targets: dev.addrs(Use::Redis).into_iter().map(Target::anything).collect(),
        clients: args.clients,
        pipeline: 16,
        keys: args.keys,
        value_bytes: args.value_bytes,
        duration: Duration::from_secs(args.seconds),
    };
    let fill = runtime.block_on(load::run(&plan, Operation::Fill)).context("filling")?;
    if fill.wrong > 0 {
        return Err(Failure::new(format!("{} keys could not be set", fill.wrong)));
    }
    let log = || match mode {
        Mode::Memory => Ok(Log::default()),
        Mode::Disk => {
            let (syncs, entries) = ("crema_log_syncs_total", "crema_log_entries_written_total");
            Ok(Log { syncs: dev.counter(syncs)?, entries: dev.counter(entries)? })
        }
    };
    let mut phases = Vec::new();
    for pipeline in &args.pipelines {
        plan.pipeline = *pipeline;
        let before = log()?;
        let set = runtime.block_on(load::run(&plan, Operation::Set)).context("SET")?;
        let after = log()?;
        let log = Log { syncs: after.syncs - before.syncs, entries: after.entries - before.entries };
        phases.push(Phase { set, log });
    }
    dev.stop()?;
    Ok(phases)
}
