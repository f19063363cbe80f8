//! `crema-tests faults`: the fault scenarios of real clusters, as many rounds as one likes.

use crate::process::scenarios::{self, Options, Report};
use crate::process::{netns, turn};
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

/// What the command line understands.
pub const USAGE: &str = "usage: crema-tests faults [--rounds N] [--history DIR]
  --rounds   rounds of all faults of real processes, about a minute and a half each (default 1)
  --history  directory for the histories as JSON lines (default: only failed ones are kept)
";

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    rounds: u64,
    history: Option<PathBuf>,
}

impl Arguments {
    /// Parses what follows `faults`. The error is for the user.
    pub fn parse(args: &[String]) -> Result<Arguments, String> {
        let mut parsed = Arguments { rounds: 1, history: None };
        let mut args = args.iter();
        while let Some(name) = args.next() {
            let mut value = || args.next().ok_or(format!("{name} needs a value"));
            match name.as_str() {
                "--rounds" => {
                    let text = value()?;
                    let number = text.parse::<u64>().ok().filter(|n| *n > 0);
                    parsed.rounds = number.ok_or(format!("--rounds takes a number from 1, not {text:?}"))?;
                }
                "--history" => parsed.history = Some(value()?.into()),
                other => return Err(format!("unknown argument {other:?}")),
            }
        }
        Ok(parsed)
    }
}

/// Runs the rounds, writes a line for each fault and a last one to `out`, and returns whether all went well. Faults that
/// this machine does not allow are named as skipped.
pub fn run(args: &Arguments, out: &mut (impl Write + Send)) -> io::Result<bool> {
    if let Some(directory) = &args.history {
        std::fs::create_dir_all(directory)?;
    }
    let start = Instant::now();
    let (mut failed, mut faults, mut operations) = (0u64, 0u64, 0u64);
    let partitions = netns::available();
    if let Err(reason) = &partitions {
        writeln!(out, "skipped: partitions: {reason}")?;
    }
    for round in 1..=args.rounds {
        let options = Options { history: args.history.clone(), round, all: true };
        let mut told = |report: &Report| {
            faults += 1;
            operations += report.total.answered + report.total.refused + report.total.unknown;
            // A reader that went away does not end the run: the last line will say so.
            let _ = writeln!(out, "round {round}: {report}").and_then(|()| out.flush());
        };
        // The lock is given back between rounds, for tests that wait for it.
        let turn = turn().map_err(io::Error::other)?;
        let mut results = vec![scenarios::on_loopback(&options, &mut told)];
        if partitions.is_ok() {
            results.push(scenarios::in_namespaces(&options, &mut told));
        }
        drop(turn);
        for failure in results.into_iter().filter_map(Result::err) {
            failed += 1;
            writeln!(out, "round {round} FAILED: {failure}")?;
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    let seconds = start.elapsed().as_secs();
    writeln!(out, "{word} rounds={} failed={failed} faults={faults} ops={operations} seconds={seconds}", args.rounds)?;
    Ok(failed == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_checked() {
        let parse = |line: &str| Arguments::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(parse(""), Ok(Arguments { rounds: 1, history: None }));
        assert_eq!(parse("--rounds 7 --history d"), Ok(Arguments { rounds: 7, history: Some("d".into()) }));
        for bad in ["--rounds", "--rounds 0", "--rounds x", "--history", "--seeds 1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
