//! Linearizable reads: under leases, by ReadIndex, and what Redis does on the same machine.
//!
//! Two clusters of three processes, one with `--reads lease` and one with `--reads read_index`, and a `redis-server` without
//! persistence, all filled with the same keys. They run side by side, and one at a time is loaded, in turn, over several
//! rounds: a slow minute of the machine falls on all of them. A cluster-aware client asks each key at the node that leads
//! it, as `CLUSTER SLOTS` says; the others ask any node, which passes on what it does not lead.

use crate::dev::Dev;
use crate::load::{self, Measured, Operation, Plan, Target};
use crate::stats::{median, table, thousands};
use crema_core::slot_of;
use crema_tests::process::ports::{self, Block, Use};
use crema_tests::process::resp::{Client, Value};
use crema_tests::process::{Context, Failure, Result, Scratch, eventually};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const NODES: u64 = 3;
/// Reads before each phase that are not counted: quiet groups wake up, leases are taken.
const WARM_UP: Duration = Duration::from_millis(400);
/// How often a phase is begun anew because a leader has moved meanwhile.
const ATTEMPTS: usize = 3;
const REDIS_WITHIN: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Flags of `reads`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Numbers of requests in flight per connection, each measured.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16], value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pipelines: Vec<u32>,
    /// Connections, spread over all nodes.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=5_000))]
    clients: u32,
    /// Number of shards.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_024))]
    shards: u32,
    /// Seconds of each phase.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Bytes of a value.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    value_bytes: u32,
    /// Number of keys, all of them present.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    keys: u32,
    /// How often each of them has its turn.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Run all nodes of a cluster in one process.
    #[arg(long)]
    one_process: bool,
}

/// Who is asked, and how; in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    LeaseAtLeader,
    IndexAtLeader,
    LeaseAnywhere,
    IndexAnywhere,
    Redis,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::LeaseAtLeader => "lease, its leader",
            Way::IndexAtLeader => "read index, its leader",
            Way::LeaseAnywhere => "lease, any node",
            Way::IndexAnywhere => "read index, any node",
            Way::Redis => "Redis",
        }
    }

    /// The same without leases.
    fn without_lease(self) -> Option<Way> {
        match self {
            Way::LeaseAtLeader => Some(Way::IndexAtLeader),
            Way::LeaseAnywhere => Some(Way::IndexAnywhere),
            _ => None,
        }
    }
}

enum Server {
    Crema { dev: Dev, at_leader: Way, anywhere: Way },
    Redis(Redis),
}

/// One line of the result.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Variant {
    pipeline: u32,
    way: Way,
}

struct Sample {
    measured: Measured,
    /// Share of the reads that were answered without the driver; `None` for Redis.
    local: Option<f64>,
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().context("starting the client runtime")?;
    let mut servers = Vec::new();
    for (mode, at_leader, anywhere) in
        [("lease", Way::LeaseAtLeader, Way::LeaseAnywhere), ("read_index", Way::IndexAtLeader, Way::IndexAnywhere)]
    {
        let reads = format!("--reads={mode}");
        let flags = if args.one_process { vec![reads.as_str()] } else { vec![reads.as_str(), "--processes"] };
        servers.push(Server::Crema { dev: Dev::start(NODES, args.shards, &flags)?, at_leader, anywhere });
    }
    match Redis::start()? {
        Some(redis) => servers.push(Server::Redis(redis)),
        None => println!("redis-server is not on the PATH: measured without it"),
    }
    for server in &servers {
        let addrs = match server {
            Server::Crema { dev, .. } => dev.addrs(Use::Redis),
            Server::Redis(redis) => vec![redis.addr],
        };
        let plan = plan(args, addrs.into_iter().map(Target::anything).collect(), 16, Duration::ZERO);
        let fill = runtime.block_on(load::run(&plan, Operation::Fill)).context("filling")?;
        if fill.wrong > 0 {
            return Err(Failure::new(format!("{} keys could not be set", fill.wrong)));
        }
    }
    let mut samples: BTreeMap<Variant, Vec<Sample>> = BTreeMap::new();
    for round in 1..=args.rounds {
        for &pipeline in &args.pipelines {
            for server in &servers {
                for (way, sample) in measure(args, server, pipeline, &runtime)? {
                    let m = sample.measured;
                    let local = sample.local.map_or(String::new(), |l| format!(", {:.1} % local", l * 100.0));
                    eprintln!(
                        "round {round}, pipeline {pipeline}, {}: {}/s p50 {:.2} ms p99 {:.2} ms{local}",
                        way.name(),
                        thousands(m.per_second),
                        m.p50_ms,
                        m.p99_ms
                    );
                    samples.entry(Variant { pipeline, way }).or_default().push(sample);
                }
            }
        }
    }
    println!(
        "GET, {NODES} nodes{}, {} shards, {} clients, {}-byte values, {} keys, {} s a phase, medians of {} rounds; ms. \
         Ratios: medians of the rounds' own",
        if args.one_process { " in one process" } else { ", a process each" },
        args.shards,
        args.clients,
        args.value_bytes,
        args.keys,
        args.seconds,
        args.rounds
    );
    let head = ["pipeline", "asked", "GET/s", "p50", "p99", "local %", "× read index", "× Redis"];
    let rows: Vec<Vec<String>> = samples.iter().map(|(v, own)| row(*v, own, &samples)).collect();
    print!("{}", table(&head, &rows));
    for server in servers {
        if let Server::Crema { dev, .. } = server {
            dev.stop()?;
        }
    }
    Ok(())
}

fn row(variant: Variant, own: &[Sample], all: &BTreeMap<Variant, Vec<Sample>>) -> Vec<String> {
    let of = |pick: fn(&Sample) -> f64| median(own.iter().map(pick));
    let ratio = |way: Option<Way>| {
        let other = way.and_then(|way| all.get(&Variant { way, ..variant }));
        let Some(other) = other else { return "–".to_owned() };
        let ratios = own.iter().zip(other).map(|(a, b)| a.measured.per_second / b.measured.per_second);
        format!("{:.2}", median(ratios))
    };
    vec![
        variant.pipeline.to_string(),
        variant.way.name().to_owned(),
        thousands(of(|s| s.measured.per_second)),
        format!("{:.2}", of(|s| s.measured.p50_ms)),
        format!("{:.2}", of(|s| s.measured.p99_ms)),
        own[0].local.map_or("–".to_owned(), |_| format!("{:.1}", of(|s| s.local.unwrap_or(0.0) * 100.0))),
        ratio(variant.way.without_lease()),
        ratio((variant.way != Way::Redis).then_some(Way::Redis)),
    ]
}

fn plan(args: &Args, targets: Vec<Target>, pipeline: u32, duration: Duration) -> Plan {
    Plan { targets, clients: args.clients, pipeline, keys: args.keys, value_bytes: args.value_bytes, duration }
}

/// One turn of a server: a phase for each way to ask it.
fn measure(
    args: &Args,
    server: &Server,
    pipeline: u32,
    runtime: &tokio::runtime::Runtime,
) -> Result<Vec<(Way, Sample)>> {
    let phase = |targets: Vec<Target>, duration| {
        runtime.block_on(load::run(&plan(args, targets, pipeline, duration), Operation::Get)).context("reading")
    };
    let seconds = Duration::from_secs(args.seconds);
    let (dev, at_leader, anywhere) = match server {
        Server::Redis(redis) => {
            phase(vec![Target::anything(redis.addr)], WARM_UP)?;
            let measured = phase(vec![Target::anything(redis.addr)], seconds)?;
            return Ok(vec![(Way::Redis, Sample { measured, local: None })]);
        }
        Server::Crema { dev, at_leader, anywhere } => (dev, *at_leader, *anywhere),
    };
    let mut samples = Vec::new();
    for way in [at_leader, anywhere] {
        let mut attempt = 1;
        let sample = loop {
            let targets = match way == at_leader {
                true => leaders(dev, args.keys)?,
                false => dev.addrs(Use::Redis).into_iter().map(Target::anything).collect(),
            };
            phase(targets.clone(), WARM_UP)?;
            let before = dev.counter("crema_resp_reads_local_total")?;
            let measured = phase(targets, seconds)?;
            let local = dev.counter("crema_resp_reads_local_total")? - before;
            if measured.wrong == 0 {
                let all = measured.per_second * measured.seconds;
                break Sample { measured, local: Some(local as f64 / all.max(1.0)) };
            }
            if attempt == ATTEMPTS {
                return Err(Failure::new(format!("{}: {} wrong replies", way.name(), measured.wrong)));
            }
            attempt += 1;
        };
        samples.push((way, sample));
    }
    Ok(samples)
}

/// For each node the keys below `keys` that it leads, as its cluster listener says.
fn leaders(dev: &Dev, keys: u32) -> Result<Vec<Target>> {
    let addrs = dev.addrs(Use::RedisCluster);
    let mut client = Client::connect(addrs[0], ANSWER_WITHIN).context("the cluster listener")?;
    let slots = client.call("CLUSTER SLOTS").context("CLUSTER SLOTS")?;
    let arcs = parse_slots(&slots).ok_or_else(|| Failure::new(format!("no answer to CLUSTER SLOTS: {slots:?}")))?;
    let mut by_addr: BTreeMap<SocketAddr, Vec<u32>> = BTreeMap::new();
    for key in 0..keys {
        let slot = slot_of(load::key_name(key).as_bytes()).0;
        let arc = arcs.iter().find(|(start, end, _)| (*start..=*end).contains(&slot));
        let (_, _, addr) = arc.ok_or_else(|| Failure::new(format!("nobody leads slot {slot}")))?;
        by_addr.entry(*addr).or_default().push(key);
    }
    Ok(by_addr.into_iter().map(|(addr, keys)| Target { addr, keys: Some(Arc::from(keys)) }).collect())
}

/// First slot, last slot and leader of each arc.
fn parse_slots(answer: &Value) -> Option<Vec<(u16, u16, SocketAddr)>> {
    let Value::Array(arcs) = answer else { return None };
    let arc = |value: &Value| {
        let Value::Array(parts) = value else { return None };
        let [Value::Int(start), Value::Int(end), Value::Array(leader), ..] = &parts[..] else { return None };
        let [Value::Bulk(host), Value::Int(port), ..] = &leader[..] else { return None };
        let ip = std::str::from_utf8(host).ok()?.parse().ok()?;
        let addr = SocketAddr::new(ip, u16::try_from(*port).ok()?);
        Some((u16::try_from(*start).ok()?, u16::try_from(*end).ok()?, addr))
    };
    arcs.iter().map(arc).collect()
}

/// A `redis-server` without persistence. Dropping it ends it.
struct Redis {
    child: Child,
    addr: SocketAddr,
    _block: Block,
    _scratch: Scratch,
}

impl Redis {
    /// Starts it; `None` where the program is not installed.
    fn start() -> Result<Option<Redis>> {
        let (scratch, block) = (Scratch::new()?, ports::reserve()?);
        let addr = block.addr(1, Use::Redis);
        let mut command = Command::new("redis-server");
        command.args(["--port", &addr.port().to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.current_dir(scratch.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = match command.spawn() {
            Ok(child) => child,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context("starting redis-server"),
        };
        let redis = Redis { child, addr, _block: block, _scratch: scratch };
        eventually("an answer of redis-server", REDIS_WITHIN, || {
            let mut client = Client::connect(addr, ANSWER_WITHIN).context("connecting")?;
            match client.call("PING").context("PING")? {
                Value::Simple(pong) if pong == "PONG" => Ok(()),
                other => Err(Failure::new(format!("{other:?}"))),
            }
        })?;
        Ok(Some(redis))
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        // It holds nothing that outlives it, and may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leader_of_an_arc_stands_first() {
        let node = |port| Value::Array(vec![Value::bulk("127.0.0.1"), Value::Int(port), Value::bulk("id")]);
        let arc = |from, to, port| Value::Array(vec![Value::Int(from), Value::Int(to), node(port), node(9)]);
        let answer = Value::Array(vec![arc(0, 8191, 7001), arc(8192, 16383, 7002)]);
        let addr = |port| SocketAddr::from(([127, 0, 0, 1], port));
        assert_eq!(parse_slots(&answer), Some(vec![(0, 8191, addr(7001)), (8192, 16383, addr(7002))]));
        assert_eq!(parse_slots(&Value::Nil), None);
        assert_eq!(parse_slots(&Value::Array(vec![Value::Int(1)])), None);
    }
}
