//! The `crema` program: parses the command line, runs the command, and turns its end into an exit code.

use clap::Parser;
use crema_node::cli::{Ask, Cli, CliError, Command, ask};
use crema_node::recover::recover;
use crema_node::voters::{show_moves, voters};
use crema_node::{dev, run};
use std::process::ExitCode;

// Many small values of different sizes, allocated by one thread and freed by another: the system's allocator would
// spend its time on locks and keep the holes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // clap prints help and mistakes itself, and exits with 0 or 2.
    let result = match Cli::parse().command {
        Command::Dev(args) => run::block_on(dev::dev(&args)),
        Command::Start(args) => run::block_on(run::start(&args)),
        Command::Status(args) => ask(Ask::Status, &args),
        Command::Members(args) => ask(Ask::Members, &args),
        Command::Shards(args) if args.moves || args.watch => show_moves(&args.ask, args.watch),
        Command::Shards(args) => ask(Ask::Shards, &args.ask),
        Command::Voters(command) => voters(&command),
        Command::Recover(args) => recover(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if !matches!(error, CliError::Interrupted) {
                eprintln!("crema: {error}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}
