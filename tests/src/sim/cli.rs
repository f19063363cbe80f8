//! `crema-tests sim`: many seeds from the command line.

use super::faults::Faults;
use super::run::{Plan, run_seed};
use std::fmt::Write as _;
use std::io::{self, Write};

/// What the command line understands.
pub const USAGE: &str = "usage: crema-tests sim --seeds N [--seed S] [--nodes n] [--shards s] [--faults a,b|all|none]
  --seeds   number of seeds to run, from S on
  --seed    first seed (default 1)
  --nodes   nodes, 3 to 9 (default: each seed chooses 3 to 5)
  --shards  data shards, 1 to 64 (default: each seed chooses 1 to 6)
  --faults  faults that each seed may choose from (default all)
";

/// Failed seeds whose report is printed in full; of further ones the line to replay them.
const MOST_REPORTS: u64 = 5;

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    seeds: u64,
    seed: u64,
    nodes: Option<u64>,
    shards: Option<u32>,
    faults: Faults,
}

impl Arguments {
    /// Parses what follows `sim`. The error is for the user.
    pub fn parse(args: &[String]) -> Result<Arguments, String> {
        let mut parsed = Arguments { seeds: 1, seed: 1, nodes: None, shards: None, faults: Faults::all() };
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().ok_or(format!("{name} needs a value"));
            let number = |text: &String, from: u64, to: u64| match text.parse::<u64>() {
                Ok(n) if (from..=to).contains(&n) => Ok(n),
                _ => Err(format!("{name} takes a number from {from} to {to}, not {text:?}")),
            };
            match name.as_str() {
                "--seeds" => parsed.seeds = number(value()?, 1, u64::MAX)?,
                "--seed" => parsed.seed = number(value()?, 0, u64::MAX)?,
                "--nodes" => parsed.nodes = Some(number(value()?, 3, 9)?),
                "--shards" => parsed.shards = Some(number(value()?, 1, 64)? as u32),
                "--faults" => parsed.faults = value()?.parse()?,
                other => return Err(format!("unknown argument {other:?}")),
            }
        }
        Ok(parsed)
    }
}

/// Runs the seeds, writes reports of failed ones and a last line to `out`, and returns whether all went well.
pub fn run(args: &Arguments, out: &mut impl Write) -> io::Result<bool> {
    let (mut failed, mut simulated, mut ops, mut trace) = (0u64, 0u64, 0u64, 0u64);
    for i in 0..args.seeds {
        let plan = Plan {
            seed: args.seed.wrapping_add(i),
            nodes: args.nodes,
            shards: args.shards,
            faults: args.faults.clone(),
        };
        let report = run_seed(&plan);
        simulated += report.simulated;
        ops += report.ops;
        trace = trace.rotate_left(5) ^ report.trace;
        if !report.failures.is_empty() {
            failed += 1;
            if failed <= MOST_REPORTS {
                out.write_all(report.describe().as_bytes())?;
            } else {
                let first = report.failures[0].lines().next().unwrap_or_default();
                writeln!(out, "seed {} failed: {first}\nreplay: {}", plan.seed, plan.replay())?;
            }
        } else if args.seeds == 1 {
            let [answered, refused, unknown] = report.outcomes;
            writeln!(out, "faults: {}; {answered} answered, {refused} refused, {unknown} unknown", report.faults)?;
        }
        out.flush()?;
    }
    let mut line = String::from(if failed == 0 { "ok" } else { "FAILED" });
    let seconds = simulated / super::world::S;
    let _ = write!(line, " seeds={} failed={failed} sim_seconds={seconds} ops={ops} trace={trace:016x}", args.seeds);
    writeln!(out, "{line}")?;
    Ok(failed == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn arguments_are_checked() {
        let a = parse("--seeds 7 --seed 9 --nodes 5 --shards 2 --faults drop,kill").unwrap();
        assert_eq!((a.seeds, a.seed, a.nodes, a.shards), (7, 9, Some(5), Some(2)));
        for bad in ["--seeds", "--seeds x", "--seeds 0", "--nodes 2", "--shards 65", "--faults flood", "--frobnicate 1"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_replay_line_is_understood() {
        let plan = Plan { seed: 5, nodes: Some(3), shards: None, faults: "drop".parse().unwrap() };
        let line = plan.replay();
        let (_, tail) = line.split_once(" sim ").unwrap();
        let a = parse(tail).unwrap();
        assert_eq!((a.seeds, a.seed, a.nodes, a.shards, a.faults), (1, 5, Some(3), None, plan.faults));
    }

    #[test]
    fn the_last_line_sums_up() {
        let mut out = Vec::new();
        assert!(run(&parse("--seeds 1 --seed 1 --nodes 3 --shards 1 --faults none").unwrap(), &mut out).unwrap());
        let text = String::from_utf8(out).unwrap();
        assert!(text.lines().last().unwrap().starts_with("ok seeds=1 failed=0 sim_seconds="), "{text}");
    }
}
