//! The command line: `sim` runs the simulator, `faults` and `kills` hit real clusters, `check` judges histories.

use crema_tests::check_cli::{self, Checked};
use crema_tests::sim::cli::{self, Arguments};
use crema_tests::{faults_cli, kills_cli};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // Not locked: a thread of the faults writes too.
    let mut out = std::io::stdout();
    let outcome = match args.split_first() {
        Some((first, rest)) if first == "sim" => Arguments::parse(rest)
            .and_then(|args| cli::run(&args, &mut out).map_err(|e| e.to_string()))
            .map(|well| if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Some((first, rest)) if first == "faults" => faults_cli::Arguments::parse(rest)
            .and_then(|args| faults_cli::run(&args, &mut out).map_err(|e| e.to_string()))
            .map(|well| if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Some((first, rest)) if first == "kills" => kills_cli::Arguments::parse(rest)
            .and_then(|args| kills_cli::run(&args, &mut out).map_err(|e| e.to_string()))
            .map(|well| if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Some((first, files)) if first == "check" => check_cli::run(files, &mut out).map(|checked| match checked {
            Checked::Right => ExitCode::SUCCESS,
            Checked::Wrong => ExitCode::FAILURE,
            Checked::Unjudged => ExitCode::from(2),
        }),
        _ => Err("the commands are sim, faults, kills and check".into()),
    };
    outcome.unwrap_or_else(|e| {
        // If standard error is gone too, the exit code has to do.
        let usage = [cli::USAGE, faults_cli::USAGE, kills_cli::USAGE, check_cli::USAGE].concat();
        let _ = write!(std::io::stderr(), "error: {e}\n{usage}");
        ExitCode::from(2)
    })
}
