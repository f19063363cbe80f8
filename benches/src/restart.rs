//! How long nodes full of data on disk take to serve again.
//!
//! ```text
//!   fill -> quiet -> [ kill -9 -> start -> /readyz of each node          ] × rounds
//!                    [               \---> a SET on every shard, answered ]
//!                    [ a sample of keys, DBSIZE -> quiet                  ]
//! ```
//!
//! Times run from the start of each node's process. The data lies among the system's temporary files: `TMPDIR` chooses the
//! disk. After `kill -9` the files are still in the page cache; `--cold` has the system drop them, as a restart of the
//! machine would.

use crate::load::{self, Operation, Plan, Random, Target, fill_value, key_name};
use crate::soak::{mb, parse_size};
use crate::stats::{median, table, thousands};
use crema_tests::process::load::tag_per_shard;
use crema_tests::process::ports::Use;
use crema_tests::process::resp::{Client, Value, encode};
use crema_tests::process::{Cluster, Context, Failure, Keeps, Result, http};
use std::net::SocketAddr;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const NODES: u64 = 3;
const FILL_CLIENTS: u32 = 24;
const FILL_PIPELINE: u32 = 16;
const RESTART_WITHIN: Duration = Duration::from_secs(120);
const EQUAL_WITHIN: Duration = Duration::from_secs(60);
/// Nothing changes on the disks for so long: quiet.
const QUIET_FOR: Duration = Duration::from_secs(3);
const QUIET_WITHIN: Duration = Duration::from_secs(120);
/// Between two looks at a node or a disk.
const LOOK_EACH: Duration = Duration::from_millis(10);
/// Longer than any request's deadline.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// GETs in one pipelined batch of the check.
const CHECK_BATCH: usize = 100;

/// Flags of `restart`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Bytes of values, on each node: a number and kb, mb or gb.
    #[arg(long, default_value = "1gb")]
    bytes: String,
    /// Bytes of a value.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    value_bytes: u32,
    /// Number of shards.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_024))]
    shards: u32,
    /// Kill and start node 1 alone; it is then asked for the writes, too.
    #[arg(long)]
    one: bool,
    /// Drop the files from the page cache before the start.
    #[arg(long)]
    cold: bool,
    /// Keys that are read back from each node that was started.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    sample: u32,
    /// How often the nodes are killed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// A further flag of every node; repeatable.
    #[arg(long = "node-flag", value_name = "FLAG", allow_hyphen_values = true)]
    node_flags: Vec<String>,
}

/// What one restart took, in seconds.
struct Restart {
    /// Of each node that was started.
    ready: Vec<f64>,
    /// Of each shard.
    written: Vec<f64>,
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let bytes = parse_size(&args.bytes).ok_or_else(|| Failure::new("--bytes is no size like 256mb"))?;
    let keys = u32::try_from(bytes / u64::from(args.value_bytes)).context("number of keys")?;
    let flags: Vec<&str> = args.node_flags.iter().map(String::as_str).collect();
    let mut cluster = Cluster::ready_keeping(Keeps::Disk, NODES, args.shards, &flags)?;
    let restarts = measure(args, keys, &mut cluster).inspect_err(|_| cluster.scratch().keep())?;
    println!(
        "{} keys, {} MB of values on each of {NODES} nodes, {} shards, kill -9 of {}, files {}; seconds from the start \
         of a process",
        thousands(f64::from(keys)),
        mb(bytes),
        args.shards,
        if args.one { "one" } else { "all" },
        if args.cold { "not in the page cache" } else { "in the page cache" }
    );
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let rows: Vec<Vec<String>> = (1..)
        .zip(&restarts)
        .map(|(round, r): (u32, &Restart)| {
            let ready: Vec<String> = r.ready.iter().map(|s| format!("{s:.2}")).collect();
            let written = [median(r.written.iter().copied()), most(&r.written)].map(|s| format!("{s:.2}"));
            [vec![round.to_string(), ready.join(" / "), format!("{:.2}", most(&r.ready))], written.into()].concat()
        })
        .collect();
    print!("{}", table(&["round", "ready", "last", "a write on half the shards", "on all"], &rows));
    println!(
        "medians: all ready after {:.2} s, all shards writable after {:.2} s",
        median(restarts.iter().map(|r| most(&r.ready))),
        median(restarts.iter().map(|r| most(&r.written)))
    );
    Ok(())
}

fn measure(args: &Args, keys: u32, cluster: &mut Cluster) -> Result<Vec<Restart>> {
    fill(args, keys, cluster)?;
    let mut restarts = Vec::new();
    for round in 1..=args.rounds {
        wait_quiet(cluster)?;
        for node in 1..=NODES {
            let (log, states) = cluster.on_disk(node)?;
            let all = disk_bytes(&cluster.data_dir(node))?;
            eprintln!("node {node}: {} MB on disk, {} MB of it log, {states} states", mb(all), mb(log));
        }
        let restart = restart(args, round, cluster)?;
        eprintln!("round {round}: ready after {:.2?} s, writes after {:.2?} s", restart.ready, restart.written);
        restarts.push(restart);
        for node in restarted(args) {
            tell_reading(cluster, node);
            check(args, keys, u64::from(round * args.shards), cluster.addr(node, Use::Redis))?;
        }
    }
    cluster.wait_equal_digests(EQUAL_WITHIN)?;
    Ok(restarts)
}

fn restarted(args: &Args) -> Vec<u64> {
    if args.one { vec![1] } else { (1..=NODES).collect() }
}

fn fill(args: &Args, keys: u32, cluster: &Cluster) -> Result<()> {
    let plan = Plan {
        targets: (1..=NODES).map(|node| Target::anything(cluster.addr(node, Use::Redis))).collect(),
        clients: FILL_CLIENTS,
        pipeline: FILL_PIPELINE,
        keys,
        value_bytes: args.value_bytes,
        duration: Duration::ZERO,
    };
    let runtime = tokio::runtime::Runtime::new().context("starting the client runtime")?;
    let filled = runtime.block_on(load::run(&plan, Operation::Fill)).context("filling")?;
    eprintln!("filled in {:.1} s, {} SET/s", filled.seconds, thousands(filled.per_second));
    if filled.wrong > 0 { Err(Failure::new(format!("{} keys could not be set", filled.wrong))) } else { Ok(()) }
}

/// Waits until the replicas are equal and nothing changes on the disks any more.
fn wait_quiet(cluster: &Cluster) -> Result<()> {
    cluster.wait_equal_digests(EQUAL_WITHIN)?;
    let began = Instant::now();
    let (mut seen, mut since) = (Vec::new(), Instant::now());
    while since.elapsed() < QUIET_FOR {
        let now = (1..=NODES).map(|node| disk_bytes(&cluster.data_dir(node))).collect::<Result<Vec<u64>>>()?;
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        if began.elapsed() > QUIET_WITHIN {
            return Err(Failure::new(format!("the disks are still written after {} s", QUIET_WITHIN.as_secs())));
        }
        std::thread::sleep(LOOK_EACH);
    }
    Ok(())
}

/// Bytes of all files in a directory and those within it. What vanishes meanwhile has none.
fn disk_bytes(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    files(dir, &mut |path| {
        sum += path.metadata().map_or(0, |m| m.len());
        Ok(())
    })?;
    Ok(sum)
}

fn files(dir: &Path, each: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    for entry in std::fs::read_dir(dir).context(dir.display())?.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&path, each)?;
        } else {
            each(&path)?;
        }
    }
    Ok(())
}

/// Has the system forget a file; only what is on the disk can be forgotten.
fn drop_cached(path: &Path) -> Result<()> {
    let file = std::fs::File::open(path).context(path.display())?;
    file.sync_all().context(path.display())?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).context(path.display())
}

fn restart(args: &Args, round: u32, cluster: &mut Cluster) -> Result<Restart> {
    if args.one {
        cluster.kill(1)?;
    } else {
        cluster.kill_all()?;
    }
    let nodes = restarted(args);
    if args.cold {
        for node in &nodes {
            files(&cluster.data_dir(*node), &mut drop_cached)?;
        }
    }
    let mut waits: Vec<JoinHandle<Result<f64>>> = Vec::new();
    let mut started = Vec::new();
    for node in &nodes {
        let (began, addr) = (Instant::now(), cluster.addr(*node, Use::Http));
        cluster.restart(*node)?;
        started.push((began, cluster.addr(*node, Use::Redis)));
        waits.push(std::thread::spawn(move || {
            let ready = || http::get(addr, "/readyz").is_ok_and(|(status, _)| status == 200);
            wait(began, &format!("readiness at {addr}"), ready)
        }));
    }
    let tags = tag_per_shard(args.shards);
    let writes: Vec<JoinHandle<Result<f64>>> = tags
        .into_iter()
        .enumerate()
        .map(|(shard, tag)| {
            let (began, addr) = started[shard % started.len()];
            std::thread::spawn(move || {
                let command = format!("SET {{{tag}}}:probe:{round} {round}");
                // The node holds it while there is no leader; where it gives up, the next try follows at once.
                let written = || {
                    let reply = Client::connect(addr, REPLY_TIMEOUT).and_then(|mut client| client.call(&command));
                    reply.is_ok_and(|reply| reply == Value::ok())
                };
                wait(began, &format!("a write on shard {shard} at {addr}"), written)
            })
        })
        .collect();
    Ok(Restart { ready: join(waits)?, written: join(writes)? })
}

/// Seconds since `began` until `done`.
fn wait(began: Instant, what: &str, done: impl Fn() -> bool) -> Result<f64> {
    while !done() {
        if began.elapsed() > RESTART_WITHIN {
            return Err(Failure::new(format!("{what}: not within {} s", RESTART_WITHIN.as_secs())));
        }
        std::thread::sleep(LOOK_EACH);
    }
    Ok(began.elapsed().as_secs_f64())
}

fn join(threads: Vec<JoinHandle<Result<f64>>>) -> Result<Vec<f64>> {
    threads.into_iter().map(|t| t.join().map_err(|_| Failure::new("a thread of ours panicked"))?).collect()
}

/// What the node's log says about its reading.
fn tell_reading(cluster: &mut Cluster, node: u64) {
    let log = cluster.process(node).stderr();
    let line = log.lines().rfind(|line| line.contains("read from disk")).unwrap_or("nothing about reading from disk");
    eprintln!("node {node}: {line}");
    if cluster.lives_lost(node) > 0 {
        eprintln!("warning: node {node} gave up what it had on disk");
    }
}

/// Reads a sample of the keys back, and counts them all; besides the filled ones there are `more`.
fn check(args: &Args, keys: u32, more: u64, addr: SocketAddr) -> Result<()> {
    let what = format!("reading back at {addr}");
    let mut client = Client::connect(addr, REPLY_TIMEOUT).context(&what)?;
    let mut random = Random::new(1);
    let sample: Vec<u32> = (0..args.sample).map(|_| random.below(keys)).collect();
    let mut expected = vec![0; args.value_bytes as usize];
    for batch in sample.chunks(CHECK_BATCH) {
        let mut bytes = Vec::new();
        batch.iter().for_each(|key| encode(&[b"GET", key_name(*key).as_bytes()], &mut bytes));
        client.send(&bytes).context(&what)?;
        for key in batch {
            fill_value(*key, &mut expected);
            match client.read().context(&what)? {
                Value::Bulk(value) if value == expected => {}
                Value::Bulk(value) => {
                    return Err(Failure::new(format!(
                        "{what}: {} has another value, of {} bytes",
                        key_name(*key),
                        value.len()
                    )));
                }
                other => return Err(Failure::new(format!("{what}: {}: {other:?}", key_name(*key)))),
            }
        }
    }
    let count = client.call("DBSIZE").context(&what)?;
    let expected = Value::Int(i64::from(keys) + more as i64);
    if count == expected { Ok(()) } else { Err(Failure::new(format!("{what}: DBSIZE {count:?}, not {expected:?}"))) }
}
