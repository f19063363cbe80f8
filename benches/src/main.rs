//! Benchmarks of Crema: from the outside, real processes and real sockets; and of the state machine alone.
//!
//! ```text
//!   shards    crema dev --shards N  <--RESP over loopback-- clients   requests a second, percentiles per N
//!   reads     crema dev --reads lease | read_index, redis-server      GET: throughput, latency, ratios, in turn
//!   failover  crema start × 3       <--writers, kill -9--- survivors   longest pause, failed requests, lost writes
//!   memory    a state machine in this process                         resident and accounted bytes per key
//!   churn     a full state machine in this process                    resident memory while values change their sizes
//!   evict     a state machine in this process, moka, exact LRU        hit ratios, nanoseconds an access
//!   snapshot  a state machine in this process                         times of steps, writes meanwhile, restoring
//!   transfer  crema start × 3       <--writers, kill -9--- followers   writes while a large shard fills a node again
//!   durable   crema dev --data-dir  <--RESP over loopback-- clients   SET against memory alone, writes a sync
//!   restart   crema start --data-dir × 3  <--kill -9, start           time to ready, to a write on every shard
//!   gossip    nodes of crema_gossip in this process                bytes at rest, time of news, of detection, of discovery
//!   soak      crema start --max-memory × 3  <--mixed load, kill -9    resident memory, by phase, against the limit
//! ```
//!
//! Run with `--release`; the harness builds `crema` in the profile of this program.
// Its output is its purpose.
#![allow(clippy::print_stdout)]

mod churn;
mod dev;
mod durable;
mod evict;
mod failover;
mod fill;
mod gossip;
mod load;
mod memory;
mod reads;
mod replies;
mod restart;
mod shards;
mod snapshot;
mod soak;
mod stats;
mod transfer;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// As the binary: what a key takes depends on it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Benchmarks of Crema. Build with --release.
#[derive(Parser)]
#[command(name = "crema-benches")]
struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Throughput and latency of SET and GET at several shard counts, interleaved over rounds, medians printed.
    Shards(shards::Args),
    /// Linearizable GET under leases against ReadIndex and against Redis, in turn over rounds, medians and ratios printed.
    Reads(reads::Args),
    /// The pause that the end of a node causes at the other gateways, a fresh cluster each time.
    Failover(failover::Args),
    /// Resident bytes per key of one state machine, against what it accounts.
    Memory(memory::Args),
    /// Resident memory of a full state machine whose values change their sizes.
    Churn(churn::Args),
    /// Hit ratios of the eviction policies against exact LRU and moka, and what an access costs.
    Evict(evict::Args),
    /// What a snapshot of a large shard costs its writer while it is written to, and restoring it.
    Snapshot(snapshot::Args),
    /// Throughput and latency of writes while a large shard fills a node again, and what filling it takes.
    Transfer(transfer::Args),
    /// SET with logs and data on disk against memory alone, in turn over rounds, ratios and writes a sync printed.
    Durable(durable::Args),
    /// Time from kill -9 of nodes full of data on disk to ready, and to a write on every shard.
    Restart(restart::Args),
    /// Bytes of gossip at rest, and how soon it knows: of leaders, of ended nodes, of each other.
    Gossip(gossip::Args),
    /// Resident memory of each node at its limit, under mixed load with restarts, for an hour.
    Soak(soak::Args),
}

fn main() -> ExitCode {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        eprintln!("warning: built without --release; the numbers say little");
    }
    let result = match &args.bench {
        Bench::Shards(args) => shards::run(args),
        Bench::Reads(args) => reads::run(args),
        Bench::Failover(args) => failover::run(args),
        Bench::Memory(args) => memory::run(args),
        Bench::Churn(args) => churn::run(args),
        Bench::Evict(args) => evict::run(args),
        Bench::Snapshot(args) => snapshot::run(args),
        Bench::Transfer(args) => transfer::run(args),
        Bench::Durable(args) => durable::run(args),
        Bench::Restart(args) => restart::run(args),
        Bench::Gossip(args) => gossip::run(args),
        Bench::Soak(args) => soak::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}
