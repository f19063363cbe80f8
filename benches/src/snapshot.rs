//! What a snapshot of a large shard costs its writer, and restoring it its reader.
//!
//! Between any two steps the shard goes on writing to keys at random, so that records are put aside. Restoring is timed
//! apart: it happens on another node.

use crate::fill::{Machine, keys};
use crate::stats::{table, thousands};
use crema_core::{Restore, SetExpire, SnapshotStep};
use crema_tests::process::{Failure, Result};
use std::time::{Duration, Instant};

/// Flags of `snapshot`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Number of keys.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    keys: u32,
    /// Bytes of a value.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=8_388_608))]
    value_bytes: u32,
    /// Bytes of a step.
    #[arg(long, default_value_t = 262_144, value_parser = clap::value_parser!(u32).range(1..=67_108_864))]
    step_bytes: u32,
    /// Writes between two steps.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    writes: u32,
}

/// Times of one kind of step.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn time<R>(&mut self, f: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = f();
        self.0.push(start.elapsed());
        result
    }

    fn row(mut self, what: &str) -> Vec<String> {
        self.0.sort_unstable();
        let micros = |d: Duration| thousands(d.as_nanos() as f64 / 1e3);
        let at = |share: usize| self.0.get(self.0.len().saturating_sub(1) * share / 100).copied().unwrap_or_default();
        let total: Duration = self.0.iter().sum();
        let count = thousands(self.0.len() as f64);
        vec![what.into(), count, micros(total), micros(at(50)), micros(at(99)), micros(at(100))]
    }
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut machine = Machine::new(16_384);
    let names: Vec<Vec<u8>> = keys(16_384, 16).take(args.keys as usize).collect();
    let value = vec![b'v'; args.value_bytes as usize];
    let (mut filling, mut before, mut meanwhile) = (Times::default(), Times::default(), Times::default());
    filling.time(|| {
        names.iter().for_each(|name| machine.set(name, &value, SetExpire::Clear));
        machine.flush();
    });
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut write = |machine: &mut Machine, times: &mut Times| {
        times.time(|| {
            for _ in 0..args.writes {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                machine.set(&names[(random % names.len() as u64) as usize], &value, SetExpire::Clear);
            }
            machine.flush();
        });
    };
    (0..1000).for_each(|_| write(&mut machine, &mut before));

    let (mut begin, mut steps, mut chunks, mut pending) = (Times::default(), Times::default(), Vec::new(), 0);
    chunks.push(begin.time(|| machine.m.begin_snapshot()).ok_or_else(|| Failure::new("a snapshot is being taken"))?);
    let digest = machine.m.digest();
    loop {
        write(&mut machine, &mut meanwhile);
        pending = pending.max(machine.m.snapshot_pending_bytes());
        match steps.time(|| machine.m.snapshot_step(args.step_bytes as usize)) {
            SnapshotStep::Chunk(chunk) => chunks.push(chunk),
            SnapshotStep::Sweeping => {}
            SnapshotStep::Done(chunk) => {
                chunks.push(chunk);
                break;
            }
            SnapshotStep::Idle => return Err(Failure::new("the snapshot has no end")),
        }
    }
    let bytes: usize = chunks.iter().map(|c| c.len()).sum();
    let corrupt = |e| Failure::new(format!("restoring: {e}"));
    let mut restoring = Times::default();
    let mut restore = Restore::begin(&chunks[0]).map_err(corrupt)?;
    for chunk in &chunks[1..] {
        restoring.time(|| restore.chunk(chunk)).map_err(corrupt)?;
    }
    let mut finishing = Times::default();
    let restored = finishing.time(|| restore.finish()).map_err(corrupt)?;
    if restored.digest() != digest {
        return Err(Failure::new("the restored state is another one"));
    }
    let (mut installing, mut dropping) = (Times::default(), Times::default());
    let former = installing.time(|| machine.m.install(restored));
    dropping.time(|| drop(former));

    let writes = format!("{} writes", args.writes);
    let rows = [
        filling.row("filling"),
        before.row(&format!("{writes} before")),
        begin.row("beginning"),
        meanwhile.row(&format!("{writes} meanwhile")),
        steps.row("a step"),
        restoring.row("restoring a chunk"),
        finishing.row("checking the whole"),
        installing.row("installing"),
        dropping.row("dropping the former table"),
    ];
    println!("{} keys, {} chunks, {} bytes.", thousands(f64::from(args.keys)), chunks.len(), thousands(bytes as f64));
    println!("At most {} accounted bytes were put aside. Times in microseconds.", thousands(pending as f64));
    print!("{}", table(&["", "count", "total", "median", "99 %", "longest"], &rows));
    Ok(())
}
