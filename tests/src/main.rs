//! The simulator's command line.

use crema_tests::sim::cli::{Arguments, USAGE, run};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match args.split_first() {
        Some((first, rest)) if first == "sim" => Arguments::parse(rest),
        _ => Err("the only command is sim".into()),
    };
    let outcome = parsed.and_then(|args| run(&args, &mut std::io::stdout().lock()).map_err(|e| e.to_string()));
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            // If standard error is gone too, the exit code has to do.
            let _ = write!(std::io::stderr(), "error: {e}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}
