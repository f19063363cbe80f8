//! What the tests share. Randomness: every run prints its seed, and `CREMA_SEED` repeats one.

use crate::config::GossipConfig;
use crate::rng::SplitMix;
use crate::seed::SeedAddr;
use crate::service::Gossip;
use crate::view::MemberState;
use crema_core::{Incarnation, NodeId};
use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// A generator whose seed the test's output names.
pub(crate) struct Rng(SplitMix);

impl Rng {
    pub(crate) fn from_clock() -> Rng {
        let given = std::env::var("CREMA_SEED").ok().and_then(|s| s.parse().ok());
        let seed =
            given.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64));
        // Captured by the harness and shown on failure.
        eprintln!("repeat with CREMA_SEED={seed}");
        Rng(SplitMix::new(seed))
    }
}

impl Deref for Rng {
    type Target = SplitMix;
    fn deref(&self) -> &SplitMix {
        &self.0
    }
}

impl DerefMut for Rng {
    fn deref_mut(&mut self) -> &mut SplitMix {
        &mut self.0
    }
}

/// How many hostile datagrams a test sends: `CREMA_FUZZ`, or 20,000.
pub(crate) fn fuzz_count() -> u32 {
    std::env::var("CREMA_FUZZ").ok().and_then(|s| s.parse().ok()).unwrap_or(20_000)
}

/// Resident memory of this process in bytes, where the system tells it as Linux does.
pub(crate) fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4_096)
}

/// Generous, because the machine may be busy; every wait ends as soon as its condition holds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

/// A cluster of this test's own. Ports are used again and again, by other tests and other runs, and nodes look for those that
/// have left: with one name for all, tests would meet.
fn cluster() -> String {
    let mut hasher = DefaultHasher::new();
    std::thread::current().name().hash(&mut hasher);
    format!("test-{}-{:x}", std::process::id(), hasher.finish())
}

pub(crate) fn config(node: u64, seeds: &[SocketAddr]) -> GossipConfig {
    let bind = "127.0.0.1:0".parse().unwrap();
    let raft_addr = format!("127.0.0.1:{}", 9000 + node);
    let mut config = GossipConfig::new(NodeId(node), Incarnation(node.into()), raft_addr, cluster(), bind);
    config.seeds = seeds.iter().copied().map(SeedAddr::from).collect();
    config.interval = Duration::from_millis(50);
    config.initial_interval = Duration::from_millis(50);
    config
}

pub(crate) async fn start(node: u64, seeds: &[SocketAddr]) -> Gossip {
    Gossip::start(config(node, seeds)).await.unwrap()
}

pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "still not so: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn state(gossip: &Gossip, node: u64) -> Option<MemberState> {
    gossip.members().iter().find(|m| m.meta.node_id == NodeId(node)).map(|m| m.state)
}

pub(crate) async fn all_see(all: &[&Gossip], nodes: &[u64]) {
    eventually("all see each other alive", || {
        all.iter().all(|g| nodes.iter().all(|n| state(g, *n) == Some(MemberState::Alive)))
    })
    .await;
}

/// What this thread logs while the guard lives: a level, the message and its fields a line.
#[derive(Clone, Default)]
pub(crate) struct Logs {
    lines: Arc<Mutex<Vec<(tracing::Level, String)>>>,
}

impl Logs {
    pub(crate) fn start() -> (Logs, tracing::subscriber::DefaultGuard) {
        let logs = Logs::default();
        let guard = tracing::subscriber::set_default(logs.clone());
        (logs, guard)
    }

    /// Takes all lines out; returns those of this crate that are at least as grave as `level`.
    pub(crate) fn take(&self, level: tracing::Level) -> Vec<String> {
        let lines = std::mem::take(&mut *self.lines.lock().expect("no panic while held"));
        lines.into_iter().filter(|(l, _)| *l <= level).map(|(_, line)| line).collect()
    }
}

impl tracing::Subscriber for Logs {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("crema_gossip")
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let level = *event.metadata().level();
        let mut line = level.to_string();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            line.push_str(&format!(" {field}={value:?}"));
        });
        self.lines.lock().expect("no panic while held").push((level, line));
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// A name server on the loopback device that says what it is told to say.
pub(crate) struct FakeDns {
    pub(crate) addr: SocketAddr,
    answers: Arc<Mutex<Answers>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Answers {
    records: HashMap<(String, RecordType), Vec<RData>>,
    broken: bool,
    asked: u64,
}

impl FakeDns {
    pub(crate) async fn start() -> FakeDns {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let addr = socket.local_addr().unwrap();
        let answers = Arc::new(Mutex::new(Answers::default()));
        let from = answers.clone();
        let task = tokio::spawn(async move {
            let mut buffer = [0; 1_500];
            loop {
                let (len, peer) = socket.recv_from(&mut buffer).await.unwrap();
                let Ok(query) = Message::from_vec(&buffer[..len]) else { continue };
                let mut reply = query.clone().into_response();
                {
                    let mut answers = from.lock().unwrap();
                    answers.asked += 1;
                    if answers.broken {
                        reply.metadata.response_code = ResponseCode::ServFail;
                    } else if let Some(query) = query.queries.first() {
                        let name = query.name().to_string().trim_end_matches('.').to_lowercase();
                        for data in answers.records.get(&(name, query.query_type())).into_iter().flatten() {
                            reply.add_answer(Record::from_rdata(query.name().clone(), 300, data.clone()));
                        }
                    }
                }
                socket.send_to(&reply.to_vec().unwrap(), peer).await.unwrap();
            }
        });
        FakeDns { addr, answers, task }
    }

    /// The targets of an SRV name: priority, port and host.
    pub(crate) fn srv(&self, name: &str, targets: &[(u16, u16, &str)]) {
        let targets = targets
            .iter()
            .map(|(priority, port, host)| RData::SRV(SRV::new(*priority, 0, *port, Name::from_ascii(host).unwrap())));
        self.answers.lock().unwrap().records.insert((name.to_owned(), RecordType::SRV), targets.collect());
    }

    /// The addresses of a host.
    pub(crate) fn host(&self, name: &str, ips: &[IpAddr]) {
        let mut answers = self.answers.lock().unwrap();
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for ip in ips {
            match ip {
                IpAddr::V4(ip) => v4.push(RData::A((*ip).into())),
                IpAddr::V6(ip) => v6.push(RData::AAAA((*ip).into())),
            }
        }
        answers.records.insert((name.to_owned(), RecordType::A), v4);
        answers.records.insert((name.to_owned(), RecordType::AAAA), v6);
    }

    /// Whether it fails to answer anything.
    pub(crate) fn set_broken(&self, broken: bool) {
        self.answers.lock().unwrap().broken = broken;
    }

    /// How often it was asked.
    pub(crate) fn asked(&self) -> u64 {
        self.answers.lock().unwrap().asked
    }
}

impl Drop for FakeDns {
    fn drop(&mut self) {
        self.task.abort();
    }
}
