//! `crema-tests kills`: one cluster, killed as often as one likes.

use crate::process::kills::{Drill, Round};
use crate::process::{Keeps, binary, turn};
use std::io::{self, Write};
use std::time::{Instant, SystemTime};

/// What the command line understands.
pub const USAGE: &str = "usage: crema-tests kills [--single N] [--whole N] [--memory] [--seed S]
  --single  rounds in which one node is killed (default 20)
  --whole   rounds in which all nodes are killed at once (default 10; none in memory)
  --memory  nodes without data directories: each kill waits until the node before is ready
  --seed    who is killed, and when (default: a random one, printed)
";

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    single: u64,
    whole: u64,
    keeps: Keeps,
    seed: Option<u64>,
}

impl Arguments {
    /// Parses what follows `kills`. The error is for the user.
    pub fn parse(args: &[String]) -> Result<Arguments, String> {
        let (mut single, mut whole, mut keeps, mut seed) = (20, None, Keeps::Disk, None);
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut number = || {
                let text = args.next().ok_or(format!("{name} needs a value"))?;
                text.parse::<u64>().map_err(|_| format!("{name} takes a number, not {text:?}"))
            };
            match name.as_str() {
                "--single" => single = number()?,
                "--whole" => whole = Some(number()?),
                "--seed" => seed = Some(number()?),
                "--memory" => keeps = Keeps::Memory,
                other => return Err(format!("unknown argument {other:?}")),
            }
        }
        if keeps == Keeps::Memory && whole.is_some_and(|n| n > 0) {
            return Err("--whole needs data on disk: in memory nothing outlives all nodes".into());
        }
        let whole = whole.unwrap_or(if keeps == Keeps::Memory { 0 } else { 10 });
        Ok(Arguments { single, whole, keeps, seed })
    }
}

/// Runs the rounds up to the first that fails, writes a line for each and a last one to `out`, and returns whether all went
/// well.
pub fn run(args: &Arguments, out: &mut impl Write) -> io::Result<bool> {
    let seed = args.seed.unwrap_or_else(|| {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        // Any number will do.
        since.map_or(1, |t| u64::from(t.subsec_nanos()) ^ t.as_secs() << 30)
    });
    writeln!(out, "seed={seed}")?;
    // Building it, if need be, is no part of the run.
    binary::crema().map_err(io::Error::other)?;
    let start = Instant::now();
    let (mut single, mut whole) = (0u64, 0u64);
    // The lock is given back between rounds, for tests that wait for it: an idle cluster disturbs nobody.
    let in_turn = || turn().map_err(io::Error::other);
    let held = in_turn()?;
    let mut drill = Drill::new(args.keeps, seed).map_err(io::Error::other)?;
    drop(held);
    let mut failure = None;
    for number in 1..=args.single + args.whole {
        let _turn = in_turn()?;
        let (name, round) = if number <= args.single {
            (format!("single-{number}"), drill.single(&format!("single-{number}")))
        } else {
            let number = number - args.single;
            (format!("whole-{number}"), drill.whole(&format!("whole-{number}")))
        };
        match round {
            Ok(round) => {
                *if number <= args.single { &mut single } else { &mut whole } += 1;
                tell(out, &name, &round)?;
            }
            Err(e) => {
                failure = Some(e);
                break;
            }
        }
    }
    if failure.is_none() {
        let _turn = in_turn()?;
        failure = drill.settle().err();
    }
    for node in drill.cluster.running() {
        if let Ok((bytes, states)) = drill.cluster.on_disk(node) {
            writeln!(out, "node {node} has {} MiB of log on disk, {states} states", bytes >> 20)?;
        }
    }
    if let Some(failure) = &failure {
        writeln!(out, "FAILED (seed {seed}): {failure}")?;
    }
    let word = if failure.is_none() { "ok" } else { "FAILED" };
    let (Drill { operations, lost, stale, .. }, seconds) = (&drill, start.elapsed().as_secs());
    writeln!(out, "{word} single={single} whole={whole} ops={operations} lost={lost} stale={stale} seconds={seconds}")?;
    Ok(failure.is_none())
}

fn tell(out: &mut impl Write, name: &str, round: &Round) -> io::Result<()> {
    writeln!(out, "{name}: {round}")?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_checked() {
        let parse = |line: &str| Arguments::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        let disk = Arguments { single: 20, whole: 10, keeps: Keeps::Disk, seed: None };
        assert_eq!(parse(""), Ok(disk.clone()));
        assert_eq!(
            parse("--single 200 --whole 0 --seed 7"),
            Ok(Arguments { single: 200, whole: 0, seed: Some(7), ..disk.clone() })
        );
        let memory = Arguments { whole: 0, keeps: Keeps::Memory, ..disk };
        assert_eq!(parse("--memory"), Ok(memory.clone()));
        assert_eq!(parse("--whole 0 --memory"), Ok(memory));
        for bad in ["--single", "--single x", "--seed -1", "--memory --whole 1", "--rounds 1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
