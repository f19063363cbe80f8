//! What it costs a cluster to fill a node again with a large shard, while clients write.
//!
//! ```text
//!   fill -> load:   warm -> base -> kill -9 of a follower -> down -> start -> transfer -> ready -> after -> stop
//!   writers ---RESP--> the leader and the other follower          |
//!   GET /readyz of the started node; GET /metrics of the leader --+        in the end: are the digests equal?
//! ```
//!
//! A fresh cluster of three processes each time, which keep all in memory: the node that was started again has nothing. The
//! rates to which states are limited take turns over the rounds. A run fails if a write fails or the replicas differ. The
//! longest round is that of the leader's driver in its life: meanwhile it answers nobody.

use crate::load::{self, Operation, Plan, Random, Target, key_name};
use crate::soak::{gauge, mb};
use crate::stats::{median, table, thousands};
use crema_tests::process::ports::Use;
use crema_tests::process::resp::{Client, Value, encode};
use crema_tests::process::{Cluster, Context, Failure, Keeps, Result, http};
use hdrhistogram::Histogram;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const NODES: u64 = 3;
/// Connections and requests in flight while the keys are set for the first time.
const FILL_CLIENTS: u32 = 24;
const FILL_PIPELINE: u32 = 64;
/// Load before the base is measured, and after the node is ready.
const WARM: Duration = Duration::from_secs(2);
const AFTER: Duration = Duration::from_secs(3);
/// Time without the node, long enough for the others to notice.
const DOWN: Duration = Duration::from_secs(2);
const READY_WITHIN: Duration = Duration::from_secs(180);
const EQUAL_WITHIN: Duration = Duration::from_secs(60);
/// Longer than any request's deadline: a reply that takes longer ends the run.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two looks at the started node and at the leader's counters.
const LOOK_EACH: Duration = Duration::from_millis(25);
const PLAIN: &str = "crema_peer_snapshot_bytes_out_total";
const LONGEST_ROUND: &str = "crema_driver_longest_round_seconds";
const WIRE: &str = "crema_peer_snapshot_wire_bytes_out_total";

/// Flags of `transfer`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Number of keys, all in one shard.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    keys: u32,
    /// Bytes of a value.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    value_bytes: u32,
    /// Connections of the load, spread over the two nodes that stay.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    clients: u32,
    /// Requests in flight per connection.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pipeline: u32,
    /// Batches a second of each connection, whose latencies then run from when they were due; 0: as many as it can.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pace: u32,
    /// Seconds of the base.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    base_seconds: u64,
    /// Values of `--snapshot-rate`, in turn. The first never binds on one machine, the second is the default.
    #[arg(long, value_delimiter = ',', default_values_t = ["1tb".to_string(), "128mb".into(), "16mb".into()])]
    rates: Vec<String>,
    /// Runs of each rate.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// A further flag of every node; repeatable.
    #[arg(long = "node-flag", value_name = "FLAG", allow_hyphen_values = true)]
    node_flags: Vec<String>,
}

/// What the load meets; in the order of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Warm,
    /// All nodes hold the shard.
    Base,
    /// One does not run.
    Down,
    /// It runs, and is filled.
    Transfer,
    /// All hold it again.
    After,
}

const PHASES: [Phase; 5] = [Phase::Warm, Phase::Base, Phase::Down, Phase::Transfer, Phase::After];

/// What the writers share.
struct Shared {
    started: Instant,
    // Index into PHASES.
    phase: AtomicUsize,
    end: AtomicBool,
    // Of the last reply, by any writer.
    last_reply_nanos: AtomicU64,
    // Longest time without a reply to any writer, and when it ended: in nanoseconds.
    longest_pause: [Mutex<(u64, u64)>; PHASES.len()],
}

/// What one writer saw. Replies count where they arrive.
struct Tally {
    latency_us: Vec<Histogram<u32>>,
    wrong: u64,
    first_wrong: Option<String>,
}

/// What the load got in one phase.
#[derive(Clone, Copy, Debug, Default)]
struct Got {
    seconds: f64,
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    longest_pause_ms: f64,
}

/// One run.
#[derive(Default)]
struct Run {
    got: [Got; PHASES.len()],
    leader: u64,
    /// When the node's process was started, counted from the start of the load.
    restarted_seconds: f64,
    /// From there to `/readyz`.
    ready_seconds: f64,
    /// From there to the first byte of the state.
    sending_began_seconds: f64,
    /// From the first byte to the last, as far as their counter tells.
    sending_seconds: f64,
    /// From the start of the process to the end of the longest pause meanwhile.
    longest_pause_ended_seconds: f64,
    /// Longest round of each node's driver in its life.
    longest_rounds: Vec<f64>,
    plain_bytes: u64,
    wire_bytes: u64,
}

/// Runs the benchmark and prints its tables.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut runs: BTreeMap<usize, Vec<Run>> = BTreeMap::new();
    for round in 1..=args.rounds {
        for (number, rate) in args.rates.iter().enumerate() {
            let run = measure(args, rate).context(format!("rate {rate}, round {round}"))?;
            eprintln!("round {round}, rate {rate}: {}", run.in_words());
            runs.entry(number).or_default().push(run);
        }
    }
    let load = if args.pace == 0 { "as fast as it can".to_string() } else { format!("{} batches/s each", args.pace) };
    println!(
        "{} keys of {} bytes in one shard, {NODES} processes; load: {} connections, pipeline {}, {load}; medians of {} \
         rounds; times in ms",
        thousands(f64::from(args.keys)),
        args.value_bytes,
        args.clients,
        args.pipeline,
        args.rounds
    );
    let head = ["rate", "phase", "s", "SET/s", "of base", "p50", "p99", "max", "longest pause"];
    let rows: Vec<Vec<String>> =
        runs.iter().flat_map(|(number, runs)| phase_rows(&args.rates[*number], runs)).collect();
    print!("{}", table(&head, &rows));
    let head =
        ["rate", "ready after s", "most", "sending s", "MB", "on the wire", "MB/s", "on the wire", "longest round"];
    let rows: Vec<Vec<String>> = runs.iter().map(|(number, runs)| state_row(&args.rates[*number], runs)).collect();
    print!("{}", table(&head, &rows));
    Ok(())
}

impl Run {
    fn in_words(&self) -> String {
        let of = |phase: Phase| {
            let got = self.got[phase as usize];
            format!(
                "{phase:?} {}/s p50 {:.2} p99 {:.2} max {:.1} pause {:.1} ms",
                thousands(got.per_second),
                got.p50_ms,
                got.p99_ms,
                got.max_ms,
                got.longest_pause_ms
            )
        };
        let phases: Vec<String> = PHASES[1..].iter().map(|phase| of(*phase)).collect();
        format!(
            "{}; ready after {:.2} s, {} MB ({} MB on the wire) sent in {:.2} s from {:.2} s on; the longest pause ended \
             at {:.2} s; longest rounds of the drivers {:.3?} s, node {} leads",
            phases.join("; "),
            self.ready_seconds,
            mb(self.plain_bytes),
            mb(self.wire_bytes),
            self.sending_seconds,
            self.sending_began_seconds,
            self.longest_pause_ended_seconds,
            self.longest_rounds,
            self.leader
        )
    }

    fn ratio(&self, phase: Phase) -> f64 {
        self.got[phase as usize].per_second / self.got[Phase::Base as usize].per_second
    }
}

fn phase_rows(rate: &str, runs: &[Run]) -> Vec<Vec<String>> {
    let row = |phase: Phase| {
        let of = |pick: fn(&Got) -> f64| median(runs.iter().map(|run| pick(&run.got[phase as usize])));
        vec![
            rate.to_string(),
            format!("{phase:?}").to_lowercase(),
            format!("{:.1}", of(|got| got.seconds)),
            thousands(of(|got| got.per_second)),
            format!("{:.2} ×", median(runs.iter().map(|run| run.ratio(phase)))),
            format!("{:.2}", of(|got| got.p50_ms)),
            format!("{:.2}", of(|got| got.p99_ms)),
            format!("{:.1}", of(|got| got.max_ms)),
            format!("{:.1}", of(|got| got.longest_pause_ms)),
        ]
    };
    PHASES[1..].iter().map(|phase| row(*phase)).collect()
}

fn state_row(rate: &str, runs: &[Run]) -> Vec<String> {
    let of = |pick: fn(&Run) -> f64| median(runs.iter().map(pick));
    vec![
        rate.to_string(),
        format!("{:.2}", of(|run| run.ready_seconds)),
        format!("{:.2}", runs.iter().map(|run| run.ready_seconds).fold(0.0, f64::max)),
        format!("{:.2}", of(|run| run.sending_seconds)),
        mb(of(|run| run.plain_bytes as f64) as u64),
        mb(of(|run| run.wire_bytes as f64) as u64),
        mb(of(|run| run.plain_bytes as f64 / run.sending_seconds) as u64),
        mb(of(|run| run.wire_bytes as f64 / run.sending_seconds) as u64),
        format!("{:.1}", of(|run| run.longest_rounds[run.leader as usize - 1] * 1e3)),
    ]
}

fn measure(args: &Args, rate: &str) -> Result<Run> {
    let rate = format!("--snapshot-rate={rate}");
    let flags: Vec<&str> = [rate.as_str()].into_iter().chain(args.node_flags.iter().map(String::as_str)).collect();
    let mut cluster = Cluster::ready_keeping(Keeps::Memory, NODES, 1, &flags)?;
    let measured = measure_in(args, &mut cluster);
    measured.inspect_err(|_| cluster.scratch().keep())
}

fn measure_in(args: &Args, cluster: &mut Cluster) -> Result<Run> {
    fill(args, cluster)?;
    let leader = cluster.node_with_most_leaders()?;
    let victim = leader % NODES + 1;
    let gateways: Vec<SocketAddr> =
        (1..=NODES).filter(|node| *node != victim).map(|node| cluster.addr(node, Use::Redis)).collect();
    let shared = Arc::new(Shared {
        started: Instant::now(),
        phase: AtomicUsize::new(Phase::Warm as usize),
        end: AtomicBool::new(false),
        last_reply_nanos: AtomicU64::new(0),
        longest_pause: Default::default(),
    });
    let writers = (0..args.clients).map(|number| {
        let (shared, addr) = (shared.clone(), gateways[number as usize % gateways.len()]);
        let (keys, value_bytes, pipeline, pace) = (args.keys, args.value_bytes, args.pipeline, args.pace);
        std::thread::spawn(move || write(&shared, addr, number, keys, value_bytes, pipeline, pace))
    });
    let writers: Vec<JoinHandle<Result<Tally>>> = writers.collect();
    let drove = drive(args, cluster, &shared, leader, victim);
    shared.end.store(true, Relaxed);
    let mut total = Tally::new();
    for writer in writers {
        let tally = writer.join().map_err(|_| Failure::new("a writer panicked"))??;
        for (sum, own) in total.latency_us.iter_mut().zip(&tally.latency_us) {
            sum.add(own).context("adding latencies")?;
        }
        total.wrong += tally.wrong;
        total.first_wrong = total.first_wrong.or(tally.first_wrong);
    }
    let mut run = drove?;
    for (phase, got) in run.got.iter_mut().enumerate() {
        let latency = &total.latency_us[phase];
        let ms = |quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
        got.per_second = latency.len() as f64 / got.seconds;
        (got.p50_ms, got.p99_ms, got.max_ms) = (ms(0.5), ms(0.99), ms(1.0));
        let (pause, ended) = *shared.longest_pause[phase].lock().expect("no panic while held");
        got.longest_pause_ms = pause as f64 / 1e6;
        if phase == Phase::Transfer as usize {
            run.longest_pause_ended_seconds = ended as f64 / 1e9 - run.restarted_seconds;
        }
    }
    if let Some(first) = total.first_wrong {
        return Err(Failure::new(format!("{} writes failed; the first: {first}", total.wrong)));
    }
    cluster.wait_equal_digests(EQUAL_WITHIN)?;
    let now = cluster.node_with_most_leaders()?;
    if now != leader {
        eprintln!("warning: node {leader} led the shard before and node {now} leads it now");
    }
    Ok(run)
}

fn fill(args: &Args, cluster: &Cluster) -> Result<()> {
    let plan = Plan {
        targets: (1..=NODES).map(|node| Target::anything(cluster.addr(node, Use::Redis))).collect(),
        clients: FILL_CLIENTS,
        pipeline: FILL_PIPELINE,
        keys: args.keys,
        value_bytes: args.value_bytes,
        duration: Duration::ZERO,
    };
    let runtime = tokio::runtime::Runtime::new().context("starting the client runtime")?;
    let filled = runtime.block_on(load::run(&plan, Operation::Fill)).context("filling")?;
    if filled.wrong > 0 { Err(Failure::new(format!("{} keys could not be set", filled.wrong))) } else { Ok(()) }
}

/// Leads the load through its phases; what it gets is filled in later, but for the seconds.
fn drive(args: &Args, cluster: &mut Cluster, shared: &Shared, leader: u64, victim: u64) -> Result<Run> {
    let mut run = Run { leader, ..Run::default() };
    let mut began = Instant::now();
    // Ends the present phase.
    let mut next = |phase: Phase, got: &mut [Got; PHASES.len()]| {
        let ended = shared.phase.swap(phase as usize, Relaxed);
        got[ended].seconds = began.elapsed().as_secs_f64();
        began = Instant::now();
    };
    std::thread::sleep(WARM);
    next(Phase::Base, &mut run.got);
    std::thread::sleep(Duration::from_secs(args.base_seconds));
    next(Phase::Down, &mut run.got);
    cluster.kill(victim)?;
    std::thread::sleep(DOWN);

    let leader_http = cluster.addr(leader, Use::Http);
    let sent = || {
        let (_, page) = http::get(leader_http, "/metrics")?;
        let value = |name| gauge(&page, name).ok_or_else(|| Failure::new(format!("no metric {name}")));
        Ok((value(PLAIN)? as u64, value(WIRE)? as u64))
    };
    let before = sent()?;
    next(Phase::Transfer, &mut run.got);
    let restarted = Instant::now();
    run.restarted_seconds = shared.started.elapsed().as_secs_f64();
    cluster.restart(victim)?;
    // When the counter was last seen where it began, and when it was first seen where it ended.
    let (mut first, mut last, mut seen) = (Duration::ZERO, Duration::ZERO, before);
    loop {
        let now = sent()?;
        if now == before {
            first = restarted.elapsed();
        } else if now != seen {
            last = restarted.elapsed();
        }
        seen = now;
        if http::get(cluster.addr(victim, Use::Http), "/readyz").is_ok_and(|(status, _)| status == 200) {
            run.ready_seconds = restarted.elapsed().as_secs_f64();
            break;
        }
        if let Some(status) = cluster.process(victim).ended()? {
            return Err(Failure::new(format!("node {victim} ended: {status}")));
        }
        if restarted.elapsed() > READY_WITHIN {
            return Err(Failure::new(format!(
                "node {victim} is not ready {} s after its start",
                READY_WITHIN.as_secs()
            )));
        }
        std::thread::sleep(LOOK_EACH);
    }
    next(Phase::After, &mut run.got);
    run.sending_began_seconds = first.as_secs_f64();
    run.sending_seconds = last.saturating_sub(first).as_secs_f64();
    std::thread::sleep(AFTER);
    next(Phase::Warm, &mut run.got);
    for node in 1..=NODES {
        let (_, page) = http::get(cluster.addr(node, Use::Http), "/metrics")?;
        run.longest_rounds.push(gauge(&page, LONGEST_ROUND).unwrap_or(f64::NAN));
    }
    let now = sent()?;
    (run.plain_bytes, run.wire_bytes) = (now.0 - before.0, now.1 - before.1);
    if run.plain_bytes < u64::from(args.keys) * u64::from(args.value_bytes) {
        return Err(Failure::new(format!("only {} bytes of states were sent", run.plain_bytes)));
    }
    Ok(run)
}

impl Tally {
    fn new() -> Self {
        // Up to a minute in microseconds, three digits: the bounds are valid for any such histogram.
        let histogram = || Histogram::new_with_bounds(1, 60_000_000, 3).expect("valid bounds");
        Tally { latency_us: PHASES.map(|_| histogram()).into(), wrong: 0, first_wrong: None }
    }
}

/// One connection, until the end.
fn write(
    shared: &Shared,
    addr: SocketAddr,
    number: u32,
    keys: u32,
    value_bytes: u32,
    pipeline: u32,
    pace: u32,
) -> Result<Tally> {
    let what = format!("writer at {addr}");
    let mut client = Client::connect(addr, REPLY_TIMEOUT).context(&what)?;
    let mut tally = Tally::new();
    let mut random = Random::new(u64::from(number) + 1);
    let (mut bytes, mut value) = (Vec::new(), vec![0; value_bytes as usize]);
    let period = Duration::from_secs(1).checked_div(pace);
    let mut due = Instant::now();
    while !shared.end.load(Relaxed) {
        bytes.clear();
        for _ in 0..pipeline {
            random.fill(&mut value);
            encode(&[b"SET", key_name(random.below(keys)).as_bytes(), &value], &mut bytes);
        }
        let began = match period {
            // A batch behind a stalled one is late for the same reason: its latency includes the wait.
            Some(period) => {
                due += period;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                due
            }
            None => Instant::now(),
        };
        client.send(&bytes).context(&what)?;
        for _ in 0..pipeline {
            let reply = client.read().context(&what)?;
            let phase = shared.phase.load(Relaxed);
            if reply == Value::ok() {
                let latency_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                tally.latency_us[phase].saturating_record(latency_us);
            } else {
                tally.wrong += 1;
                tally.first_wrong.get_or_insert_with(|| format!("SET at {addr}: {reply:?}"));
            }
        }
        let now = shared.started.elapsed().as_nanos() as u64;
        let pause = now.saturating_sub(shared.last_reply_nanos.fetch_max(now, Relaxed));
        let mut longest = shared.longest_pause[shared.phase.load(Relaxed)].lock().expect("no panic while held");
        *longest = (*longest).max((pause, now));
    }
    Ok(tally)
}
