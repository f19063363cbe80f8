//! The command line: simulated clusters, and faults of real ones.

use crema_tests::faults_cli;
use crema_tests::sim::cli::{Arguments, USAGE, run};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let out = &mut std::io::stdout();
    let outcome = match args.split_first() {
        Some((first, rest)) if first == "sim" => {
            Arguments::parse(rest).and_then(|args| run(&args, out).map_err(|e| e.to_string()))
        }
        Some((first, rest)) if first == "faults" => {
            faults_cli::Arguments::parse(rest).and_then(|args| faults_cli::run(&args, out).map_err(|e| e.to_string()))
        }
        _ => Err("the commands are sim and faults".into()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            // If standard error is gone too, the exit code has to do.
            let _ = write!(std::io::stderr(), "error: {e}\n{USAGE}{}", faults_cli::USAGE);
            ExitCode::from(2)
        }
    }
}
