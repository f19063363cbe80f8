//! Resident memory over time at the limit.
//!
//! ```text
//!   writers ---RESP--> crema start --max-memory × 3       fill | overwrite | expire | read | restart, in turn
//!                           ^
//!   /proc/PID/status -------+ each second: VmRSS, VmHWM -> per node: base, median, p99, maximum; maximum by phase
//! ```
//!
//! Sizes change from cycle to cycle, so that what one cycle frees does not fit what the next one needs: that is what an
//! allocator is worst at. The run fails if a node ever takes more than 105 % of its limit and the base that is promised
//! besides ([`BASE`]), or if the replicas differ in the end. What an empty node takes is shown too.

use crate::load::Random;
use crate::stats::{table, thousands};
use crema_tests::process::ports::Use;
use crema_tests::process::resp::{Client, Value, encode};
use crema_tests::process::{Cluster, Context, Failure, Keeps, Result, http};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const NODES: u64 = 3;
/// A node may take this much of its limit, beside the base.
const ALLOWED_PERCENT: f64 = 105.0;
/// What a node may take beside its limit, as it promises: `crema_node::pressure::BASE`.
const BASE: u64 = 32 << 20;
/// Settling time of an empty node before its base is taken.
const SETTLE: Duration = Duration::from_secs(3);
const READY_WITHIN: Duration = Duration::from_secs(120);
const EQUAL_WITHIN: Duration = Duration::from_secs(60);
/// Longer than any request's deadline: a reply that takes longer counts as a broken connection.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// Between two attempts of a writer to connect.
const RECONNECT_AFTER: Duration = Duration::from_millis(200);
/// Keys written in an expiry storm expire at the next multiple of this, all together.
const STORM_EACH: Duration = Duration::from_secs(5);
/// Overwritten and read are the newest keys, about as many as fit by default.
const RECENT_KEYS: u32 = 100_000;
/// Smallest and largest value of a cycle's filling, in turn; overwriting takes those of the next cycle.
pub(crate) const SIZES: [(u32, u32); 3] = [(16, LARGEST), (16, 256), (4_096, LARGEST)];
const LARGEST: u32 = 16_384;
/// Seconds of the restart phase after which the node is killed, and started again.
const KILL_AT: u64 = 2;
const RESTART_AT: u64 = 4;
/// Different errors that are kept for the report.
const MOST_ERRORS: usize = 20;

/// Flags of `soak`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Minutes of load.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=10_080))]
    minutes: u64,
    /// Limit of each node, as `crema start` takes it: a number and kb, mb or gb.
    #[arg(long, default_value = "256mb")]
    max_memory: String,
    /// What goes when a shard is full.
    #[arg(long, default_value = "s3-fifo")]
    eviction: String,
    /// Number of shards.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_024))]
    shards: u32,
    /// Connections, spread over all nodes.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    clients: u32,
    /// Requests in flight per connection.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pipeline: u32,
    /// Most pipelines a second of each connection; 0: as many as it can.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pace: u32,
    /// What the clients do, in turn.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = PHASES)]
    phases: Vec<Phase>,
    /// Seconds of a phase.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(10..=3_600))]
    phase_seconds: u64,
    /// Keep logs and data on disk.
    #[arg(long)]
    disk: bool,
    /// Append each second's samples to this file: seconds, phase, and resident bytes of each node.
    #[arg(long)]
    samples: Option<PathBuf>,
    /// A further flag of every node; repeatable.
    #[arg(long = "node-flag", value_name = "FLAG", allow_hyphen_values = true)]
    node_flags: Vec<String>,
}

/// What the clients do; in the order of a cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Phase {
    /// SET of new keys.
    Fill,
    /// SET of recent keys to values of other sizes.
    Overwrite,
    /// SET of new keys that all expire at one moment.
    Expire,
    /// GET of recent keys.
    Read,
    /// All of the above, while a node is killed and filled again by the others.
    Restart,
}

const PHASES: [Phase; 5] = [Phase::Fill, Phase::Overwrite, Phase::Expire, Phase::Read, Phase::Restart];

/// What the clients share.
struct Shared {
    started: Instant,
    // Index into PHASES.
    phase: AtomicUsize,
    cycle: AtomicU32,
    end: AtomicBool,
    // The number of the next new key.
    next_key: AtomicU64,
    answered: AtomicU64,
    broken: AtomicU64,
    errors: Mutex<BTreeMap<String, u64>>,
}

/// What has been seen of one node.
#[derive(Default)]
struct Node {
    base: u64,
    resident: Vec<u64>,
    maximum_by_phase: [u64; PHASES.len()],
    last: Status,
}

/// Of `/proc/PID/status`, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Status {
    resident: u64,
    /// Most resident memory since the process began.
    peak: u64,
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let limit = parse_size(&args.max_memory).ok_or_else(|| Failure::new("--max-memory is no size like 256mb"))?;
    let (memory, eviction) = (format!("--max-memory={}", args.max_memory), format!("--eviction={}", args.eviction));
    let mut flags = vec![memory.as_str(), eviction.as_str()];
    flags.extend(args.node_flags.iter().map(String::as_str));
    let keeps = if args.disk { Keeps::Disk } else { Keeps::Memory };
    let mut cluster = Cluster::ready_keeping(keeps, NODES, args.shards, &flags)?;
    let mut soak = Soak::new(args)?;
    std::thread::sleep(SETTLE);
    for node in 1..=NODES {
        let status = status(cluster.process(node).pid()).context(format!("node {node} at the start"))?;
        soak.nodes[node as usize - 1].base = status.resident;
    }
    let addrs: Vec<SocketAddr> = (1..=NODES).map(|node| cluster.addr(node, Use::Redis)).collect();
    let clients = (0..args.clients).map(|number| {
        let (shared, addrs, pipeline, pace) = (soak.shared.clone(), addrs.clone(), args.pipeline, args.pace);
        std::thread::spawn(move || client(&shared, &addrs, number, pipeline, pace))
    });
    let clients: Vec<JoinHandle<()>> = clients.collect();
    let went = soak.go(args, limit, &mut cluster);
    soak.shared.end.store(true, Relaxed);
    clients.into_iter().for_each(|client| {
        // A panic of a client has been printed, and what it has not done shows in the counts.
        let _ = client.join();
    });
    soak.print(args, limit);
    went.inspect_err(|_| cluster.scratch().keep())?;
    cluster.wait_equal_digests(EQUAL_WITHIN).inspect_err(|_| cluster.scratch().keep())?;
    soak.judge(limit)
}

/// The run, as its driver sees it.
struct Soak {
    shared: Arc<Shared>,
    nodes: Vec<Node>,
    samples: Option<std::fs::File>,
    restarts: Vec<Duration>,
    /// Seconds sampled, minutes printed.
    ticks: u64,
    minutes: u64,
}

impl Soak {
    fn new(args: &Args) -> Result<Soak> {
        let open =
            |path: &PathBuf| std::fs::File::options().create(true).append(true).open(path).context(path.display());
        let samples = args.samples.as_ref().map(open).transpose()?;
        let shared = Arc::new(Shared {
            started: Instant::now(),
            phase: AtomicUsize::new(0),
            cycle: AtomicU32::new(0),
            end: AtomicBool::new(false),
            next_key: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            errors: Mutex::default(),
        });
        let nodes = (0..NODES).map(|_| Node::default()).collect();
        Ok(Soak { shared, nodes, samples, restarts: Vec::new(), ticks: 0, minutes: 0 })
    }

    /// All cycles. A phase that has begun when the time is over is cut short.
    fn go(&mut self, args: &Args, limit: u64, cluster: &mut Cluster) -> Result<()> {
        let total = Duration::from_secs(args.minutes * 60);
        let started = Instant::now();
        for cycle in 0.. {
            self.shared.cycle.store(cycle, Relaxed);
            for phase in &args.phases {
                self.shared.phase.store(*phase as usize, Relaxed);
                let victim = u64::from(cycle) % NODES + 1;
                let mut restarted = None;
                for second in 0..args.phase_seconds {
                    // A node that was killed comes back before the end in any case.
                    if started.elapsed() >= total && (*phase != Phase::Restart || second < KILL_AT) {
                        return Ok(());
                    }
                    if *phase == Phase::Restart && second == KILL_AT {
                        cluster.kill(victim)?;
                    }
                    if *phase == Phase::Restart && second == RESTART_AT {
                        cluster.restart(victim)?;
                        restarted = Some(Instant::now());
                    }
                    self.tick(limit, cluster)?;
                    self.note_ready(&mut restarted, cluster.addr(victim, Use::Http))?;
                }
                while restarted.is_some() {
                    self.tick(limit, cluster)?;
                    self.note_ready(&mut restarted, cluster.addr(victim, Use::Http))?;
                }
            }
        }
        Ok(())
    }

    /// Looks whether the node that was restarted is ready.
    fn note_ready(&mut self, restarted: &mut Option<Instant>, addr: SocketAddr) -> Result<()> {
        let Some(since) = *restarted else { return Ok(()) };
        if http::get(addr, "/readyz").is_ok_and(|(status, _)| status == 200) {
            self.restarts.push(since.elapsed());
            *restarted = None;
        } else if since.elapsed() > READY_WITHIN {
            return Err(Failure::new(format!("a node is not ready {} s after its restart", READY_WITHIN.as_secs())));
        }
        Ok(())
    }

    /// Waits for the next second and takes a sample of every node that runs.
    fn tick(&mut self, limit: u64, cluster: &mut Cluster) -> Result<()> {
        self.ticks += 1;
        let at = self.shared.started + SETTLE + Duration::from_secs(self.ticks);
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        let phase = self.shared.phase.load(Relaxed);
        let mut line = format!("{:.1} {:?}", self.shared.started.elapsed().as_secs_f64(), PHASES[phase]);
        for node in cluster.running() {
            if let Some(status) = cluster.process(node).ended()? {
                return Err(Failure::new(format!("node {node} ended: {status}")));
            }
            let now = status(cluster.process(node).pid()).context(format!("node {node}"))?;
            let seen = &mut self.nodes[node as usize - 1];
            // A peak that is no higher than before belongs to an earlier phase; a lower one to another process.
            let high = if now.peak > seen.last.peak || now.peak < seen.last.resident { now.peak } else { now.resident };
            seen.maximum_by_phase[phase] = seen.maximum_by_phase[phase].max(high);
            seen.resident.push(now.resident);
            seen.last = now;
            let _ = write!(line, " {node}:{}:{}", now.resident, now.peak);
        }
        if let Some(file) = &mut self.samples {
            writeln!(file, "{line}").context("the file of samples")?;
        }
        let minutes = self.shared.started.elapsed().as_secs() / 60;
        if minutes > self.minutes {
            self.minutes = minutes;
            self.print_minute(limit, cluster);
        }
        Ok(())
    }

    fn print_minute(&self, limit: u64, cluster: &Cluster) {
        let mut line = format!(
            "minute {}, {:?}: {} answers, {} connections broken;",
            self.minutes,
            PHASES[self.shared.phase.load(Relaxed)],
            thousands(self.shared.answered.load(Relaxed) as f64),
            self.shared.broken.load(Relaxed)
        );
        for (node, seen) in (1..).zip(&self.nodes) {
            // Absent while the node is down: the line is for whoever watches.
            let data = http::get(cluster.addr(node, Use::Http), "/metrics").ok();
            let data = data.as_ref().and_then(|(_, page)| gauge(page, "crema_data_bytes"));
            let _ = write!(
                line,
                " node {node} {} MB now, {} MB at most ({:.1} %), {} MB of data;",
                mb(seen.last.resident),
                mb(seen.maximum()),
                of_limit(seen.maximum(), limit),
                data.map_or("–".into(), |bytes| mb(bytes as u64))
            );
        }
        eprintln!("{}", line.trim_end_matches(';'));
    }

    fn print(&self, args: &Args, limit: u64) {
        println!(
            "{} nodes, limit {} each, {}, {} shards, {} clients, pipeline {}, {} minutes, phases of {} s, {} restarts \
             (ready after {:.0} s at most); {} answers; MB of 2^20 bytes, % of the limit beside a base of {} MB",
            NODES,
            args.max_memory,
            args.eviction,
            args.shards,
            args.clients,
            args.pipeline,
            self.minutes,
            args.phase_seconds,
            self.restarts.len(),
            self.restarts.iter().max().map_or(0.0, Duration::as_secs_f64),
            thousands(self.shared.answered.load(Relaxed) as f64),
            BASE >> 20,
        );
        let of = |bytes: u64| format!("{} ({:.1} %)", mb(bytes), of_limit(bytes, limit));
        let mut rows = Vec::new();
        for (number, node) in (1..).zip(&self.nodes) {
            let mut sorted = node.resident.clone();
            sorted.sort_unstable();
            let at = |share: f64| sorted.get(((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)).copied();
            let quantile = |share| if sorted.is_empty() { 0 } else { at(share).unwrap_or(0) };
            let mut row = vec![number.to_string(), mb(node.base)];
            row.extend([quantile(0.5), quantile(0.99), node.maximum()].map(of));
            row.extend(node.maximum_by_phase.map(mb));
            rows.push(row);
        }
        let head = ["node", "empty", "median", "p99", "maximum", "in fill", "overwrite", "expire", "read", "restart"];
        print!("{}", table(&head, &rows));
        println!("connections broken: {}", self.shared.broken.load(Relaxed));
        for (text, count) in self.shared.errors.lock().expect("no panic while held").iter() {
            println!("error replies: {count} × {text}");
        }
    }

    fn judge(&self, limit: u64) -> Result<()> {
        for (number, node) in (1..).zip(&self.nodes) {
            let took = of_limit(node.maximum(), limit);
            if took > ALLOWED_PERCENT {
                let what =
                    format!("node {number} took {took:.1} % of its limit beside the base, over {ALLOWED_PERCENT} %");
                return Err(Failure::new(what));
            }
        }
        Ok(())
    }
}

impl Node {
    fn maximum(&self) -> u64 {
        self.maximum_by_phase.iter().copied().max().unwrap_or(0)
    }
}

/// One connection after another, until the end.
fn client(shared: &Shared, addrs: &[SocketAddr], number: u32, pipeline: u32, pace: u32) {
    let mut random = Random::new(u64::from(number) + 1);
    let noise: Vec<u8> = (0..2 * LARGEST).map(|_| random.below(256) as u8).collect();
    for attempt in 0.. {
        if shared.end.load(Relaxed) {
            return;
        }
        // A node may be down: its clients go to the others, and those of another come back to it.
        let addr = addrs[(number as usize + attempt) % addrs.len()];
        let worked = Client::connect(addr, REPLY_TIMEOUT).and_then(|mut client| {
            while !shared.end.load(Relaxed) {
                let began = Instant::now();
                batch(shared, &mut client, &mut random, &noise, pipeline)?;
                if let Some(period) = Duration::from_secs(1).checked_div(pace) {
                    std::thread::sleep(period.saturating_sub(began.elapsed()));
                }
            }
            Ok(())
        });
        if worked.is_err() {
            shared.broken.fetch_add(1, Relaxed);
            std::thread::sleep(RECONNECT_AFTER);
        }
    }
}

fn batch(
    shared: &Shared,
    client: &mut Client,
    random: &mut Random,
    noise: &[u8],
    pipeline: u32,
) -> std::io::Result<()> {
    let cycle = shared.cycle.load(Relaxed) as usize;
    let phase = match PHASES[shared.phase.load(Relaxed)] {
        Phase::Restart => [Phase::Fill, Phase::Overwrite, Phase::Expire, Phase::Read][random.below(4) as usize],
        phase => phase,
    };
    let mut bytes = Vec::new();
    for _ in 0..pipeline {
        let key = match phase {
            Phase::Fill | Phase::Expire => shared.next_key.fetch_add(1, Relaxed),
            _ => shared.next_key.load(Relaxed).saturating_sub(u64::from(random.below(RECENT_KEYS))),
        };
        let key = format!("key:{key:012}");
        if phase == Phase::Read {
            encode(&[b"GET", key.as_bytes()], &mut bytes);
            continue;
        }
        let (least, most) = match phase {
            Phase::Fill => SIZES[cycle % SIZES.len()],
            Phase::Overwrite => SIZES[(cycle + 1) % SIZES.len()],
            _ => SIZES[0],
        };
        let from = random.below(LARGEST) as usize;
        let value = &noise[from..from + size(random, least, most)];
        if phase == Phase::Expire {
            let each = STORM_EACH.as_millis();
            // At least a millisecond: none at all is refused.
            let left = (each - shared.started.elapsed().as_millis() % each).to_string();
            encode(&[b"SET", key.as_bytes(), value, b"PX", left.as_bytes()], &mut bytes);
        } else {
            encode(&[b"SET", key.as_bytes(), value], &mut bytes);
        }
    }
    client.send(&bytes)?;
    for _ in 0..pipeline {
        match client.read()? {
            Value::Error(text) => {
                let mut errors = shared.errors.lock().expect("no panic while held");
                if errors.len() < MOST_ERRORS || errors.contains_key(&text) {
                    *errors.entry(text).or_default() += 1;
                }
            }
            _ => {
                shared.answered.fetch_add(1, Relaxed);
            }
        }
    }
    Ok(())
}

/// A size of which each power of two is as likely as any other.
pub(crate) fn size(random: &mut Random, least: u32, most: u32) -> usize {
    let share = f64::from(random.below(1 << 20)) / f64::from(1 << 20);
    (f64::from(least) * (f64::from(most) / f64::from(least)).powf(share)) as usize
}

fn status(pid: u32) -> Result<Status> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).context(&path)?;
    parse_status(&text).ok_or_else(|| Failure::new(format!("{path} tells no resident memory")))
}

fn parse_status(text: &str) -> Option<Status> {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    Some(Status { resident: field("VmRSS:")?, peak: field("VmHWM:")? })
}

/// The value of a metric without labels.
pub(crate) fn gauge(page: &str, name: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).and_then(|value| value.trim().parse().ok())
}

/// Bytes of a size like `256mb`.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let units = [("kb", 1 << 10), ("mb", 1 << 20), ("gb", 1 << 30)];
    units.iter().find_map(|(unit, bytes)| text.strip_suffix(unit)?.trim().parse::<u64>().ok()?.checked_mul(*bytes))
}

/// Megabytes of 2^20 bytes.
pub(crate) fn mb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

/// What is resident beside the base, in percent of the limit.
fn of_limit(resident: u64, limit: u64) -> f64 {
    percent(resident.saturating_sub(BASE), limit)
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("256mb"), Some(256 << 20));
        assert_eq!(parse_size("1gb"), Some(1 << 30));
        assert_eq!((parse_size("256"), parse_size("mb"), parse_size("-1mb")), (None, None, None));
    }

    #[test]
    fn resident_memory_is_read() {
        let text = "Name:\tcrema\nVmHWM:\t   30720 kB\nVmRSS:\t   20480 kB\nThreads:\t9\n";
        assert_eq!(parse_status(text), Some(Status { resident: 20 << 20, peak: 30 << 20 }));
        assert_eq!(parse_status("Name:\tcrema\n"), None);
    }

    #[test]
    fn values_stay_within_their_sizes() {
        let mut random = Random::new(1);
        let sizes: Vec<usize> = (0..10_000).map(|_| size(&mut random, 16, LARGEST)).collect();
        assert!(sizes.iter().all(|size| (16..=LARGEST as usize).contains(size)));
        // Half of them below the geometric mean.
        let small = sizes.iter().filter(|size| **size < 512).count();
        assert!((4_500..5_500).contains(&small), "{small}");
    }
}
