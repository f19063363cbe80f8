//! One registry a node, and how the node's counters reach it.
//!
//! ```text
//!   driver: HostStatus ---set_host()---> Scrape -------+
//!   peers, RESP, gossip, driver, log atomics --Source--+--> registry --> OpenMetrics text of GET /metrics
//!   /proc of this process -----------------------------+
//! ```
//!
//! A registry of the process would mix the nodes of a dev cluster and of embedders. Nothing is counted here: each part
//! keeps its own atomics, and a scrape reads them.

use crate::disk::LogStats;
use crate::driver::DriverStats;
use crate::peers::PeerStats;
use crate::resp::FrontStats;
use crema_core::NodeId;
use crema_gossip::{Foreign, GossipStats};
use crema_shard::{HostStatus, RoutingView};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// One value of one metric, read during a scrape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Name without the prefix `crema_` and, for counters, without the suffix `_total`. Snake case, unit last.
    pub name: &'static str,
    /// What it counts.
    pub help: &'static str,
    /// The value.
    pub value: Value,
}

/// A sample's value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// Only grows during the node's life.
    Counter(u64),
    /// A counter of seconds or another fraction.
    CounterF64(f64),
    /// Goes up and down.
    Gauge(f64),
}

/// Adds the present values of one part of the node.
pub type Source = Box<dyn Fn(&mut Vec<Sample>) + Send + Sync>;

/// Shorthand for a counter.
pub fn counter(name: &'static str, help: &'static str, value: u64) -> Sample {
    Sample { name, help, value: Value::Counter(value) }
}

/// Shorthand for a gauge.
pub fn gauge(name: &'static str, help: &'static str, value: f64) -> Sample {
    Sample { name, help, value: Value::Gauge(value) }
}

/// The node's metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    host: Arc<Mutex<Option<HostStatus>>>,
}

impl Metrics {
    /// The metrics of `node`, which read `sources` at each scrape.
    pub fn new(node: NodeId, sources: Vec<Source>) -> Metrics {
        let mut registry = Registry::with_prefix("crema");
        let build = vec![("version", env!("CARGO_PKG_VERSION").to_owned()), ("node", node.0.to_string())];
        registry.register("build", "Version of this node's program", Info::new(build));
        let host = Arc::new(Mutex::new(None));
        registry.register_collector(Box::new(Scrape { host: host.clone(), sources, process: ProcessStats::new() }));
        Metrics { registry, host }
    }

    /// OpenMetrics text with the driver's picture as of now; `None` leaves its metrics out, which is what a stopped
    /// driver looks like.
    pub fn render(&self, host: Option<HostStatus>) -> String {
        *self.host.lock().expect("no panic while held") = host;
        let mut text = String::new();
        // Writing into a String cannot fail; should an encoder fail all the same, half a page would be a lie.
        match prometheus_client::encoding::text::encode(&mut text, &self.registry) {
            Ok(()) => text,
            Err(_) => "# EOF\n".to_owned(),
        }
    }
}

/// What the routing view says in numbers.
pub fn view_samples(view: &RoutingView, into: &mut Vec<Sample>) {
    let led = view.shards.iter().filter(|s| s.leader == Some(view.this)).count();
    let leaderless = view.shards.iter().filter(|s| s.leader.is_none()).count();
    let live = view.nodes.iter().filter(|(id, route)| **id != view.this && route.live).count();
    into.push(gauge("shards", "Data shards of the cluster", view.shards.len() as f64));
    into.push(gauge("shards_led", "Data shards that this node leads", led as f64));
    into.push(gauge("shards_leaderless", "Data shards without a known leader", leaderless as f64));
    let away = view.nodes.iter().filter(|(id, route)| route.approved && **id != view.this && !route.live).count();
    into.push(gauge("voters_away", "Nodes that may hold replicas and are not heard", away as f64));
    into.push(gauge("peers_live", "Other registered nodes that this node hears", live as f64));
    into.push(gauge("placement_epoch", "Version of the placement table", view.epoch.0 as f64));
    into.push(gauge("ready", "1 if this node is ready, else 0", if view.not_ready.is_none() { 1.0 } else { 0.0 }));
}

/// What the driver has counted.
pub fn driver_samples(stats: &DriverStats, into: &mut Vec<Sample>) {
    let mut count = |name, help, value: &AtomicU64| into.push(counter(name, help, value.load(Relaxed)));
    count("driver_rounds", "Rounds of the driver", &stats.rounds);
    count("driver_inputs", "Inputs the driver has taken", &stats.inputs);
    count("driver_requests", "Client requests the driver has taken", &stats.requests);
    count("driver_frames", "Peer frames the driver has taken", &stats.frames);
    count("driver_bad_frames", "Peer frames that did not decode", &stats.bad_frames);
    count("driver_completions", "Results delivered to client connections", &stats.completions);
    count("driver_orphans", "Requests and results of connections that are not open", &stats.orphans);
    count("driver_sends", "Frames handed to peer connections", &stats.sends);
    count("driver_send_drops", "Frames dropped because a queue was full or a link down", &stats.send_drops);
    count("driver_long_polls", "Rounds that ended with work left over", &stats.long_polls);
    let busy = stats.busy_nanos.load(Relaxed) as f64 / 1e9;
    let help = "Time the driver has spent in rounds, sleep excluded";
    into.push(Sample { name: "driver_busy_seconds", help, value: Value::CounterF64(busy) });
    let longest = stats.longest_round_nanos.load(Relaxed) as f64 / 1e9;
    into.push(gauge("driver_longest_round_seconds", "Longest round of the driver", longest));
    let connections = stats.connections.load(Relaxed) as f64;
    into.push(gauge("driver_connections", "Client connections known to the driver", connections));
}

/// What the peer connections have counted.
pub fn peer_samples(stats: &PeerStats, into: &mut Vec<Sample>) {
    let mut count = |name, help, value: &AtomicU64| into.push(counter(name, help, value.load(Relaxed)));
    count(
        "peer_handshakes_rejected",
        "Incoming peer connections answered with a rejection",
        &stats.handshakes_rejected,
    );
    count(
        "peer_handshakes_timed_out",
        "Incoming peer connections whose handshake took too long",
        &stats.handshakes_timed_out,
    );
    count("peer_garbage", "Incoming connections that did not speak the peer protocol", &stats.garbage);
    let help = "Incoming connections without the cluster's key, or with one where this node has none";
    count("peer_unauthenticated", help, &stats.unauthenticated);
    count("peer_over_limit", "Incoming peer connections over a limit", &stats.over_limit);
    count("peer_oversize", "Peer streams closed for an overlong frame", &stats.oversize);
    count("peer_distrusted", "Peer streams closed for frames that did not decode", &stats.distrusted);
    count("peer_frames_in", "Frames received from peers", &stats.frames_in);
    count("peer_bytes_in", "Bytes of frames received from peers", &stats.bytes_in);
    count("peer_frames_out", "Frames written to peers", &stats.frames_out);
    count("peer_bytes_out", "Bytes of frames written to peers", &stats.bytes_out);
    count("peer_snapshot_bytes_out", "Bytes of states sent to peers, before compression", &stats.snapshot_bytes_out);
    count(
        "peer_snapshot_wire_bytes_out",
        "Bytes of states sent to peers, as on the wire",
        &stats.snapshot_wire_bytes_out,
    );
    count("peer_unpackable", "Packed frames of peers that did not unpack", &stats.unpackable);
    count("peer_drops", "Frames for peers that were dropped", &stats.drops);
    count("peer_dials_failed", "Failed attempts to connect to a peer", &stats.dials_failed);
    count("peer_links_up", "Links to peers that came to stand", &stats.links_up);
    count("peer_reconnects", "Links to peers that came to stand again", &stats.reconnects);
    count("peer_driver_full", "Times a peer connection found the driver's queue full", &stats.driver_full);
    into.push(gauge("peer_incoming", "Incoming peer connections at present", stats.incoming.load(Relaxed) as f64));
}

/// What the log on disk has counted; absent where nothing is kept on disk.
pub fn log_samples(stats: &LogStats, into: &mut Vec<Sample>) {
    let mut count = |name, help, value: &AtomicU64| into.push(counter(name, help, value.load(Relaxed)));
    count("log_syncs", "Writes to the log on disk, each synced once", &stats.syncs);
    count("log_batches", "Batches of driver rounds that these syncs made durable", &stats.batches);
    count("log_entries_written", "Entries of all replicas that these syncs made durable", &stats.entries);
}

/// What the RESP front has counted.
pub fn front_samples(stats: &FrontStats, into: &mut Vec<Sample>) {
    let mut count = |name, help, value: &AtomicU64| into.push(counter(name, help, value.load(Relaxed)));
    count("resp_accepted", "RESP connections accepted, refused ones included", &stats.accepted);
    count("resp_rejected", "RESP connections refused because there were too many", &stats.rejected);
    count("resp_accept_errors", "Failures to accept a RESP connection", &stats.accept_errors);
    count("resp_commands", "RESP commands taken", &stats.commands);
    count("resp_bytes_in", "Bytes read from RESP clients", &stats.bytes_in);
    count("resp_bytes_out", "Bytes written to RESP clients", &stats.bytes_out);
    count("resp_protocol_errors", "RESP connections closed for what they sent", &stats.protocol_errors);
    count("resp_auth_failures", "Wrong passwords of RESP clients", &stats.auth_failures);
    count("resp_holds", "RESP commands that waited for a placement or a leader", &stats.holds);
    count("resp_reads_local", "RESP reads answered under a lease without the driver", &stats.reads_local);
    let connected = stats.connected.load(Relaxed) as f64;
    into.push(gauge("resp_connections", "RESP connections at present", connected));
}

/// What gossip has counted.
pub fn gossip_samples(stats: &GossipStats, leader_conflicts: u64, into: &mut Vec<Sample>) {
    into.extend([
        counter("gossip_malformed_values", "Values of other nodes that do not parse", stats.malformed_values),
        counter("gossip_conflicts", "Duplicate node ids noticed by gossip", stats.conflicts),
        counter("gossip_refused_members", "Sightings of nodes beyond the most that are held", stats.refused_members),
        counter("gossip_received_datagrams", "Gossip datagrams of this cluster received", stats.received_datagrams),
        counter("gossip_received_bytes", "Bytes of these datagrams", stats.received_bytes),
        counter("gossip_sent_datagrams", "Gossip datagrams sent", stats.sent_datagrams),
        counter("gossip_sent_bytes", "Bytes of gossip datagrams sent", stats.sent_bytes),
        counter("gossip_received_stream_bytes", "Bytes of gossip received by TCP", stats.received_stream_bytes),
        counter("gossip_sent_stream_bytes", "Bytes of gossip sent by TCP", stats.sent_stream_bytes),
        counter("gossip_dropped_messages", "Gossip messages beyond what could be decoded", stats.dropped_messages),
        counter(
            "gossip_undecodable_messages",
            "Gossip messages that do not decode, or that no node writes",
            stats.undecodable_messages,
        ),
        counter("gossip_socket_errors", "Errors of gossip's sockets", stats.socket_errors),
        counter("gossip_unproven", "Gossip of senders that had not proven to speak now", stats.unproven),
        counter("leader_conflicts", "Claims of two leaders for one shard and term", leader_conflicts),
    ]);
    into.extend(stats.foreign.iter().map(|(kind, count)| counter(foreign_name(kind), kind.reason(), count)));
}

fn foreign_name(kind: Foreign) -> &'static str {
    match kind {
        Foreign::Garbage => "gossip_foreign_garbage",
        Foreign::Plaintext => "gossip_foreign_plaintext",
        Foreign::Unsealed => "gossip_foreign_unsealed",
        Foreign::Sealed => "gossip_foreign_sealed",
        Foreign::OtherCluster => "gossip_foreign_other_cluster",
        Foreign::WrongKey => "gossip_foreign_wrong_key",
        Foreign::Replay => "gossip_foreign_replay",
        Foreign::Clock => "gossip_foreign_clock",
        Foreign::Malformed => "gossip_foreign_malformed",
    }
}

/// What the driver's picture says in numbers.
fn host_samples(status: &HostStatus, into: &mut Vec<Sample>) {
    let own = || status.shards.iter().filter_map(|s| s.own);
    let sum = |pick: fn(&crema_shard::host::OwnReplica) -> u64| own().map(|o| pick(&o)).sum::<u64>() as f64;
    into.push(gauge("replicas", "Replicas of data shards on this node", own().count() as f64));
    into.push(gauge("moves_open", "Groups whose replicas are not where they should be", status.moves_open as f64));
    into.push(gauge("replicas_asleep", "Replicas that sleep", own().filter(|o| o.asleep).count() as f64));
    into.push(gauge("keys", "Keys in this node's replicas", sum(|o| o.keys)));
    into.push(gauge(
        "data_bytes",
        "Accounted bytes of keys, values and overhead in this node's replicas",
        sum(|o| o.bytes),
    ));
    into.push(gauge("log_entries", "Entries kept in the logs of this node's replicas", sum(|o| o.log_entries)));
    for &(name, value) in &status.counters {
        into.push(counter(name, "Counted by the node's consensus and gateway", value));
    }
}

struct Scrape {
    host: Arc<Mutex<Option<HostStatus>>>,
    sources: Vec<Source>,
    process: ProcessStats,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scrape({} sources)", self.sources.len())
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut samples = Vec::with_capacity(64);
        if let Some(status) = &*self.host.lock().expect("no panic while held") {
            host_samples(status, &mut samples);
        }
        for source in &self.sources {
            source(&mut samples);
        }
        self.process.sample(&mut samples);
        // OpenMetrics forbids a name twice; a stable sort keeps what came first.
        samples.sort_by_key(|s| s.name);
        samples.dedup_by_key(|s| s.name);
        for Sample { name, help, value } in samples {
            match value {
                Value::Counter(v) => write(&mut encoder, name, help, &ConstCounter::new(v))?,
                Value::CounterF64(v) => write(&mut encoder, name, help, &ConstCounter::new(v))?,
                Value::Gauge(v) => write(&mut encoder, name, help, &ConstGauge::new(v))?,
            }
        }
        Ok(())
    }
}

fn write<M: EncodeMetric>(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, metric: &M) -> fmt::Result {
    // The text format adds `_total` itself.
    let name = name.strip_suffix("_total").unwrap_or(name);
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}

/// Figures of the whole process, as far as this system tells them.
struct ProcessStats {
    started: Instant,
}

impl ProcessStats {
    fn new() -> Self {
        ProcessStats { started: Instant::now() }
    }

    fn sample(&self, into: &mut Vec<Sample>) {
        into.push(gauge("uptime_seconds", "Seconds since this node started", self.started.elapsed().as_secs_f64()));
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        if let Some(bytes) = resident_bytes(&status) {
            into.push(gauge("process_resident_memory_bytes", "Resident memory of the process", bytes as f64));
        }
        if let Some(n) = status_field(&status, "Threads:").and_then(|v| v.parse::<u64>().ok()) {
            into.push(gauge("process_threads", "Threads of the process", n as f64));
        }
        if let Ok(entries) = std::fs::read_dir("/proc/self/fd") {
            into.push(gauge("process_open_fds", "Open file descriptors of the process", entries.count() as f64));
        }
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let seconds = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
        let help = "Processor time of the process, user and system";
        into.push(Sample { name: "process_cpu_seconds", help, value: Value::CounterF64(seconds) });
    }
}

fn status_field<'a>(status: &'a str, field: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(field)).map(str::trim)
}

/// `VmRSS` of Linux's `/proc/self/status`, which counts in kB of 1024 bytes.
fn resident_bytes(status: &str) -> Option<u64> {
    status_field(status, "VmRSS:")?.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::tests::fake;
    use std::collections::BTreeSet;

    #[test]
    fn a_page_has_every_part_once() {
        let fake = fake();
        let view = fake.view.clone();
        let sources: Vec<Source> = vec![
            Box::new(move |into| view_samples(&view, into)),
            Box::new(|into| {
                into.push(counter("frames_total", "Frames", 5));
                into.push(counter("frames_total", "Frames", 6));
            }),
        ];
        let metrics = Metrics::new(NodeId(1), sources);
        let page = metrics.render(Some(fake.status));
        for line in [
            "crema_proposals_total 12",
            "crema_frames_total 5",
            "crema_shards 2.0",
            "crema_shards_led 1.0",
            "crema_shards_leaderless 1.0",
            "crema_peers_live 1.0",
            "crema_replicas 1.0",
            "crema_keys 5.0",
            "crema_ready 1.0",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is missing in\n{page}");
        }
        assert!(
            page.contains(&format!("crema_build_info{{version=\"{}\",node=\"1\"}} 1", env!("CARGO_PKG_VERSION"))),
            "{page}"
        );
        assert!(page.ends_with("# EOF\n"));
        let types: Vec<_> = page.lines().filter(|l| l.starts_with("# TYPE")).collect();
        assert_eq!(types.len(), types.iter().collect::<BTreeSet<_>>().len(), "a name stands twice in\n{page}");
        // Without a driver its figures are absent, not zero.
        assert!(!metrics.render(None).contains("crema_keys"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_is_measured() {
        let mut samples = Vec::new();
        ProcessStats::new().sample(&mut samples);
        let value = |name| samples.iter().find(|s| s.name == name).unwrap_or_else(|| panic!("{name}")).value;
        assert!(matches!(value("process_resident_memory_bytes"), Value::Gauge(b) if b > 100_000.0));
        assert!(matches!(value("process_open_fds"), Value::Gauge(n) if n >= 1.0));
        assert!(matches!(value("process_cpu_seconds"), Value::CounterF64(s) if s > 0.0));
    }
}
