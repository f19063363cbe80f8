//! `crema-tests sim`: many seeds from the command line.

use super::faults::{Fault, Faults};
use super::mutants::{self, HUNTS};
use super::pool;
use super::run::{Plan, run_seed};
use crema_core::mutant::Mutant;
use crema_shard::ReadMode;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What the command line understands.
pub const USAGE: &str = "usage: crema-tests sim --seeds N [--seed S] [--nodes n] [--shards s] [--faults a,b|all|none]
                       [--reads lease|read_index] [--jobs j] [--history FILE] [--mutant NAME]
       crema-tests sim --mutants [--jobs j]
  --seeds    number of seeds to run, from S on (default 1)
  --seed     first seed (default: a random one, printed)
  --nodes    nodes, 3 to 9 (default: each seed chooses 3 to 5)
  --shards   data shards, 1 to 64 (default: each seed chooses 1 to 6)
  --faults   faults that each seed may choose from (default all)
  --reads    how reads are confirmed (default: each seed chooses)
  --jobs     threads (default: one a processor); the outcome does not depend on it
  --history  write what the clients of the last seed saw to FILE, see tests/HISTORIES.md
  --mutant   plant a deliberate fault in the code under test
  --mutants  plant each of them in turn: all must be caught within their number of seeds
";

/// Failed seeds whose report is printed in full; of further ones the line to replay them.
const MOST_REPORTS: u64 = 5;
/// Period of the line that tells how far a long run is.
const PROGRESS: Duration = Duration::from_secs(2);

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    seeds: u64,
    seed: Option<u64>,
    nodes: Option<u64>,
    shards: Option<u32>,
    faults: Faults,
    reads: Option<ReadMode>,
    jobs: usize,
    history: Option<PathBuf>,
    mutant: Option<Mutant>,
    mutants: bool,
}

impl Arguments {
    /// Parses what follows `sim`. The error is for the user.
    pub fn parse(args: &[String]) -> Result<Arguments, String> {
        let mut parsed = Arguments {
            seeds: 1,
            seed: None,
            nodes: None,
            shards: None,
            faults: Faults::all(),
            reads: None,
            jobs: pool::default_jobs(),
            history: None,
            mutant: None,
            mutants: false,
        };
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().ok_or(format!("{name} needs a value"));
            let number = |text: &String, from: u64, to: u64| match text.parse::<u64>() {
                Ok(n) if (from..=to).contains(&n) => Ok(n),
                _ => Err(format!("{name} takes a number from {from} to {to}, not {text:?}")),
            };
            match name.as_str() {
                "--seeds" => parsed.seeds = number(value()?, 1, u64::MAX)?,
                "--seed" => parsed.seed = Some(number(value()?, 0, u64::MAX)?),
                "--nodes" => parsed.nodes = Some(number(value()?, 3, 9)?),
                "--shards" => parsed.shards = Some(number(value()?, 1, 64)? as u32),
                "--faults" => parsed.faults = value()?.parse()?,
                "--reads" => {
                    parsed.reads = Some(match value()?.as_str() {
                        "lease" => ReadMode::Lease,
                        "read_index" => ReadMode::ReadIndex,
                        other => return Err(format!("--reads is lease or read_index, not {other:?}")),
                    });
                }
                "--jobs" => parsed.jobs = number(value()?, 1, 1024)? as usize,
                "--history" => parsed.history = Some(value()?.into()),
                "--mutant" => parsed.mutant = Some(mutants::parse(value()?)?),
                "--mutants" => parsed.mutants = true,
                other => return Err(format!("unknown argument {other:?}")),
            }
        }
        Ok(parsed)
    }

    fn plan(&self, seed: u64) -> Plan {
        Plan {
            seed,
            nodes: self.nodes,
            shards: self.shards,
            faults: self.faults.clone(),
            reads: self.reads,
            mutant: self.mutant,
            history: false,
        }
    }
}

/// What many seeds came to.
#[derive(Default)]
struct Sum {
    seeds: u64,
    failed: u64,
    simulated: u64,
    ops: u64,
    outcomes: [u64; 3],
    local_reads: u64,
    injected: BTreeMap<Fault, u64>,
    trace: u64,
}

/// Runs what the arguments say; returns whether all went well.
pub fn run(args: &Arguments, out: &mut impl Write) -> io::Result<bool> {
    if args.mutants { run_mutants(args, out) } else { run_seeds(args, out) }
}

/// Runs the seeds, writes reports of failed ones, a summary and a last line to `out`.
fn run_seeds(args: &Arguments, out: &mut impl Write) -> io::Result<bool> {
    // Not for secrets: any number will do, and this one differs from run to run.
    let first = args.seed.unwrap_or_else(|| RandomState::new().hash_one(0) >> 16);
    if args.seed.is_none() {
        writeln!(out, "seeds from {first} on")?;
    }
    let began = Instant::now();
    let mut shown = began;
    let terminal = io::stderr().is_terminal();
    let mut sum = Sum::default();
    let mut broken = None;
    let plans = (0..args.seeds).map(|i| args.plan(first.wrapping_add(i)));
    pool::run(plans, args.jobs, |report| {
        sum.seeds += 1;
        sum.simulated += report.simulated;
        sum.ops += report.ops;
        sum.local_reads += report.local_reads;
        sum.trace = sum.trace.rotate_left(5) ^ report.trace;
        report.injected.iter().for_each(|(f, n)| *sum.injected.entry(*f).or_default() += n);
        (0..3).for_each(|i| sum.outcomes[i] += report.outcomes[i]);
        let told = if report.failures.is_empty() {
            Ok(())
        } else {
            sum.failed += 1;
            if sum.failed <= MOST_REPORTS {
                out.write_all(report.describe().as_bytes())
            } else {
                let line = report.failures[0].lines().next().unwrap_or_default();
                writeln!(out, "seed {} failed: {line}\nreplay: {}", report.plan.seed, report.plan.replay())
            }
        };
        if shown.elapsed() >= PROGRESS {
            shown = Instant::now();
            let line = format!(
                "{} of {} seeds, {} failed, {} simulated hours a minute",
                sum.seeds,
                args.seeds,
                sum.failed,
                sum.simulated / 60 / super::world::S / began.elapsed().as_secs().max(1)
            );
            // For whoever watches: on one line of a terminal, else on lines of their own, and if nobody can read it, no matter.
            let _ = if terminal { write!(io::stderr(), "\r{line}\x1b[K") } else { writeln!(io::stderr(), "{line}") };
        }
        broken = told.and_then(|()| out.flush()).err();
        broken.is_none()
    });
    if let Some(e) = broken {
        return Err(e);
    }
    if terminal {
        let _ = write!(io::stderr(), "\r\x1b[K");
    }
    if let Some(path) = &args.history {
        let last = Plan { history: true, ..args.plan(first.wrapping_add(args.seeds - 1)) };
        let last = run_seed(&last);
        std::fs::write(path, last.history)?;
    }
    summarize(&sum, began.elapsed(), out)?;
    Ok(sum.failed == 0)
}

fn summarize(sum: &Sum, took: Duration, out: &mut impl Write) -> io::Result<()> {
    let [answered, refused, unknown] = sum.outcomes;
    let seconds = sum.simulated / super::world::S;
    writeln!(
        out,
        "{} seeds in {:.1} s: {:.2} simulated hours, {:.1} simulated seconds a second",
        sum.seeds,
        took.as_secs_f64(),
        seconds as f64 / 3_600.0,
        seconds as f64 / took.as_secs_f64()
    )?;
    writeln!(
        out,
        "{} operations: {answered} answered ({} of them outside of the driver), {refused} refused, {unknown} unknown",
        sum.ops, sum.local_reads
    )?;
    let mut line = String::from("faults injected:");
    for (fault, n) in &sum.injected {
        let _ = write!(line, " {} {n}", fault.name());
    }
    writeln!(out, "{line}")?;
    let verdict = if sum.failed == 0 { "ok" } else { "FAILED" };
    writeln!(
        out,
        "{verdict} seeds={} failed={} sim_seconds={seconds} ops={} trace={:016x}",
        sum.seeds, sum.failed, sum.ops, sum.trace
    )
}

/// Plants every mutant in turn and writes a table to `out`.
fn run_mutants(args: &Arguments, out: &mut impl Write) -> io::Result<bool> {
    let mut survivors = 0;
    writeln!(out, "{:<24} {:>9} {:>7}  caught by", "mutant", "at seed", "within")?;
    for hunt in HUNTS.iter().filter(|h| args.mutant.is_none_or(|m| m == h.mutant)) {
        match hunt.run(args.jobs) {
            Some(report) => {
                let what: String = report.failures[0].lines().next().unwrap_or_default().chars().take(120).collect();
                writeln!(out, "{:<24} {:>9} {:>7}  {what}", hunt.name, report.plan.seed, hunt.within)?;
            }
            None => {
                survivors += 1;
                writeln!(out, "{:<24} {:>9} {:>7}", hunt.name, "SURVIVES", hunt.within)?;
            }
        }
        out.flush()?;
    }
    let verdict = if survivors == 0 { "ok" } else { "FAILED" };
    writeln!(out, "{verdict} mutants={} survivors={survivors}", HUNTS.len())?;
    Ok(survivors == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn arguments_are_checked() {
        let a = parse("--seeds 7 --seed 9 --nodes 5 --shards 2 --faults drop,kill --reads lease --jobs 3").unwrap();
        assert_eq!((a.seeds, a.seed, a.nodes, a.shards, a.jobs), (7, Some(9), Some(5), Some(2), 3));
        assert_eq!(a.reads, Some(ReadMode::Lease));
        let bad =
            "--seeds|--seeds x|--seeds 0|--nodes 2|--shards 65|--faults flood|--frobnicate 1|--reads maybe|--jobs 0";
        for bad in bad.split('|') {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_replay_line_is_understood() {
        let plan = Plan {
            seed: 5,
            nodes: Some(3),
            shards: None,
            faults: "drop".parse().unwrap(),
            reads: Some(ReadMode::ReadIndex),
            mutant: Some(Mutant::NoDedup),
            history: false,
        };
        let line = plan.replay();
        let (_, tail) = line.split_once(" sim ").unwrap();
        let a = parse(tail).unwrap();
        assert_eq!((a.seeds, a.seed, a.nodes, a.shards, a.faults), (1, Some(5), Some(3), None, plan.faults));
        assert_eq!((a.reads, a.mutant), (plan.reads, plan.mutant));
    }

    #[test]
    fn the_last_line_sums_up_and_does_not_depend_on_threads() {
        let last = |jobs: &str| {
            let mut out = Vec::new();
            let line = format!("--seeds 3 --seed 1 --nodes 3 --shards 1 --faults transfer --jobs {jobs}");
            assert!(run(&parse(&line).unwrap(), &mut out).unwrap());
            String::from_utf8(out).unwrap().lines().last().unwrap().to_owned()
        };
        let one = last("1");
        assert!(one.starts_with("ok seeds=3 failed=0 sim_seconds="), "{one}");
        assert_eq!(one, last("3"));
    }
}
