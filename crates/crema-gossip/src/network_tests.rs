//! Whole nodes over real sockets: keys, strangers, hostile datagrams, loss, repetitions, and large state.

use crate::config::GossipConfig;
use crate::events::GossipUpdate;
use crate::fragment::{Body, MAX_DATAGRAM_BYTES, split};
use crate::inspect::tests::{any_message, deadly};
use crate::seal::{BootId, ClusterKey, FRAME_OVERHEAD_BYTES, Foreign, KeyRing, Sealer, TAG_BYTES};
use crate::service::{Gossip, GossipError};
use crate::testing::{FakeDns, PATIENCE, Rng, all_see, config, eventually, fuzz_count, resident_bytes, start, state};
use crate::transport::{Filter, Hooks};
use crate::view::{MemberEvent, MemberState};
use chitchat::transport::UdpTransport;
use chitchat::{ChitchatConfig, ChitchatId, FailureDetectorConfig, ProtocolVersion, spawn_chitchat};
use crema_core::{Epoch, NodeId, ShardId, Term};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

fn key(byte: u8) -> ClusterKey {
    let mut bytes = [byte; 32];
    bytes[0] = !byte;
    ClusterKey::new(bytes)
}

fn keyed(node: u64, seeds: &[SocketAddr]) -> GossipConfig {
    GossipConfig { keys: Some(KeyRing::new(key(1))), ..config(node, seeds) }
}

fn filter(filter: impl Fn(SocketAddr, &[u8]) -> bool + Send + Sync + 'static) -> Hooks {
    let udp: Filter = Arc::new(filter);
    Hooks { udp: Some(udp), ..Hooks::default() }
}

/// Loses this share of the datagrams.
fn lossy(percent: u64) -> Hooks {
    let rng = Mutex::new(Rng::from_clock());
    filter(move |_, _| rng.lock().unwrap().below(100) >= percent)
}

async fn start_with(config: GossipConfig, hooks: Hooks) -> Gossip {
    timeout(PATIENCE, Gossip::start_with(config, hooks)).await.expect("it starts").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_with_keys_meet_and_nothing_travels_in_the_clear() {
    let check = || {
        filter(|_, frame| {
            assert!(frame.len() <= MAX_DATAGRAM_BYTES);
            assert!(!frame.windows(4).any(|w| w == b"zone"));
            true
        })
    };
    let mut zoned = keyed(1, &[]);
    zoned.metadata.insert("zone".into(), "a".into());
    let a = start_with(zoned, check()).await;
    let b = start_with(keyed(2, &[a.addr()]), check()).await;
    let c = start_with(keyed(3, &[a.addr()]), check()).await;
    all_see(&[&a, &b, &c], &[1, 2, 3]).await;
    for g in [&b, &c] {
        eventually("metadata arrives", || g.members()[0].meta.metadata.contains_key("zone")).await;
    }
    b.publish_leaders(&[(ShardId(1), Term(1), Epoch(1))]);
    eventually("claims arrive", || c.tracker().get_leader(ShardId(1)) == Some(NodeId(2))).await;
    assert!(a.stats().greetings > 0 && a.stats().received_datagrams > 0);
    c.leave().await;
    assert_eq!((c.stats().goodbyes_confirmed, c.stats().goodbyes_unconfirmed), (2, 0));
    eventually("it has left", || state(&a, 3) == Some(MemberState::Left)).await;
    assert_eq!(a.members().len(), 3);
}

/// A chitchat node without any of our framing.
async fn plain_chitchat(seed: SocketAddr) -> chitchat::ChitchatHandle {
    let probe = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let addr = probe.local_addr().unwrap();
    drop(probe);
    let grace = Duration::from_secs(60);
    let config = ChitchatConfig {
        chitchat_id: ChitchatId::new("9", 1, addr),
        cluster_id: "test".into(),
        gossip_interval: Duration::from_millis(50),
        listen_addr: addr,
        seed_nodes: vec![seed.to_string()],
        failure_detector_config: FailureDetectorConfig::new(
            8.0,
            100,
            Duration::from_secs(5),
            Duration::from_millis(50),
            grace,
        ),
        marked_for_deletion_grace_period: grace,
        catchup_callback: None,
        extra_liveness_predicate: None,
        protocol_version: ProtocolVersion::V1,
    };
    spawn_chitchat(config, vec![], &UdpTransport).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_counted_by_kind_and_no_member_comes_of_them() {
    let a = Gossip::start(keyed(1, &[])).await.unwrap();
    let plain = plain_chitchat(a.addr()).await;
    let wrong_key =
        Gossip::start(GossipConfig { keys: Some(KeyRing::new(key(2))), ..config(2, &[a.addr()]) }).await.unwrap();
    let other_name = Gossip::start(GossipConfig { cluster: "other".into(), ..keyed(3, &[a.addr()]) }).await.unwrap();
    let no_key = start(4, &[a.addr()]).await;
    let kinds = [Foreign::Plaintext, Foreign::WrongKey, Foreign::OtherCluster, Foreign::Unsealed];
    for kind in kinds {
        eventually(kind.reason(), || a.stats().foreign.of(kind) >= 5).await;
    }
    for g in [&a, &wrong_key, &other_name, &no_key] {
        assert_eq!(g.members().len(), 1);
    }
    assert_eq!(a.stats().malformed_values, 0);

    // The same without keys.
    let open = start(5, &[]).await;
    let plain_too = plain_chitchat(open.addr()).await;
    let sealed = Gossip::start(keyed(6, &[open.addr()])).await.unwrap();
    let other = Gossip::start(GossipConfig { cluster: "other".into(), ..config(7, &[open.addr()]) }).await.unwrap();
    for kind in [Foreign::Plaintext, Foreign::Sealed, Foreign::OtherCluster] {
        eventually(kind.reason(), || open.stats().foreign.of(kind) >= 5).await;
    }
    for g in [&open, &sealed, &other] {
        assert_eq!(g.members().len(), 1);
    }
    for handle in [plain, plain_too] {
        handle.shutdown().await.unwrap();
    }
}

/// From this many hostile datagrams on, the test is run alone and also judges memory: it may grow by a few bytes for
/// each that is refused, which is less than anything that could be kept of it.
const LONG_FUZZ: u32 = 500_000;
const FUZZ_GROWTH_BYTES: u64 = 4 << 20;

/// Random and mutated datagrams never end gossip and make nobody a member. `CREMA_FUZZ` sets their number.
async fn hostile_datagrams(keys: Option<KeyRing>) {
    let captured = Arc::new(Mutex::new(Vec::new()));
    let into = captured.clone();
    let capture = filter(move |_, frame| {
        let mut captured = into.lock().unwrap();
        if captured.len() < 1_000 {
            captured.push(frame.to_vec());
        }
        true
    });
    let with_keys = |config: GossipConfig| GossipConfig { keys: keys.clone(), ..config };
    let a = Gossip::start(with_keys(config(1, &[]))).await.unwrap();
    let b = start_with(with_keys(config(2, &[a.addr()])), capture).await;
    all_see(&[&a, &b], &[1, 2]).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut rng = Rng::from_clock();
    let arrived = || a.stats().foreign.total() + a.stats().unproven + a.stats().received_datagrams;
    let mut seen = arrived();
    let began = Instant::now();
    // By then every buffer is as large as it gets.
    let warm = fuzz_count() / 10;
    let mut resident = (None, None);
    for i in 1..=fuzz_count() {
        let mut datagram = {
            let captured = captured.lock().unwrap();
            captured[rng.below(captured.len() as u64) as usize].clone()
        };
        let len = datagram.len() as u64;
        match i % 5 {
            0 => datagram = (0..rng.below(1_300)).map(|_| rng.next() as u8).collect(),
            1 => datagram.truncate(rng.below(len) as usize),
            // The readable header.
            2 => datagram[rng.below(33.min(len)) as usize] = rng.next() as u8,
            // A valid header with a random body, in which anything may stand. A body that decodes without keys could be
            // a message about other nodes, which is what keys are for; random ones have never been one.
            3 => datagram[33..].iter_mut().for_each(|byte| *byte = rng.next() as u8),
            // Chitchat's own format with any kind of message.
            _ => {
                datagram = vec![0x53, 0xB0, rng.below(3) as u8, rng.below(6) as u8];
                datagram.extend((0..rng.below(300)).map(|_| rng.next() as u8));
            }
        }
        socket.send_to(&datagram, a.addr()).await.unwrap();
        if i % 64 == 0 {
            // Not faster than it reads; what the system drops all the same is not waited for long.
            let until = Instant::now() + Duration::from_millis(50);
            while arrived() < seen + 64 && Instant::now() < until {
                tokio::task::yield_now().await;
            }
            seen = arrived();
        }
        if i == warm {
            resident.0 = resident_bytes();
        }
    }
    resident.1 = resident_bytes();
    let (took, stats) = (began.elapsed(), a.stats());
    eprintln!("{} datagrams in {took:?}; resident bytes after a tenth and at the end: {resident:?}", fuzz_count());
    eprintln!("{stats:?}");
    // Fewer say nothing about growth, and in an ordinary run other tests of this process take memory too.
    if let (Some(after_tenth), Some(at_end), true) = (resident.0, resident.1, fuzz_count() >= LONG_FUZZ) {
        assert!(at_end < after_tenth + FUZZ_GROWTH_BYTES, "memory grows with what is refused: {resident:?}");
    }
    assert!(a.stats().foreign.total() > u64::from(fuzz_count()) / 2, "{:?}", a.stats());
    let claim = (ShardId(1), Term(1), Epoch(1));
    b.publish_leaders(&[claim]);
    eventually("news still arrives", || a.tracker().get_leader(ShardId(1)) == Some(NodeId(2))).await;
    assert!(a.health() && b.health());
    assert_eq!((a.members().len(), b.members().len()), (2, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_datagrams_are_survived_with_keys() {
    hostile_datagrams(Some(KeyRing::new(key(1)))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_datagrams_are_survived_without_keys() {
    hostile_datagrams(None).await;
}

/// A stranger on the network of a cluster without keys.
struct Stranger {
    socket: UdpSocket,
    sealer: Sealer,
    messages: u32,
}

impl Stranger {
    async fn new() -> Stranger {
        let mut boot = BootId([0; 16]);
        getrandom::fill(&mut boot.0).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        Stranger { socket, sealer: Sealer::new(&config(1, &[]).cluster, boot), messages: 0 }
    }

    async fn send(&mut self, to: SocketAddr, message: &[u8]) {
        self.messages += 1;
        for part in split(self.messages, message) {
            let frame = self.sealer.seal(None, 0, None, &Body::Part(part).encode());
            self.socket.send_to(&frame, to).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_end_gossip_is_kept_from_it_and_counted() {
    let a = start(1, &[]).await;
    let b = start(2, &[a.addr()]).await;
    all_see(&[&a, &b], &[1, 2]).await;
    let mut stranger = Stranger::new().await;
    for (what, message) in deadly(&b) {
        let before = (a.stats().undecodable_messages, a.stats().foreign.of(Foreign::Malformed));
        stranger.send(a.addr(), &message).await;
        eventually(what, || a.stats().undecodable_messages > before.0).await;
        eventually(what, || a.stats().foreign.of(Foreign::Malformed) > before.1).await;
    }
    b.publish_leaders(&[(ShardId(1), Term(1), Epoch(1))]);
    eventually("news still arrives", || a.tracker().get_leader(ShardId(1)) == Some(NodeId(2))).await;
    assert!(a.health());
    assert_eq!(a.known_lives().await, 2);
}

/// That is so of each of them: where chitchat is given all that comes, it panics. Gossip ends visibly then, and may be started
/// anew at the same address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_of_chitchat_is_seen_and_a_new_start_goes_on() {
    let b = start(2, &[]).await;
    let mut again = config(1, &[b.addr()]);
    let mut stranger = Stranger::new().await;
    for (what, message) in deadly(&b) {
        let a = start_with(again.clone(), Hooks { credulous: true, ..Hooks::default() }).await;
        (again.bind, again.advertise) = (a.addr(), a.addr());
        all_see(&[&a, &b], &[1, 2]).await;
        let (mut health, mut events) = (a.health_watch(), a.events());
        stranger.send(a.addr(), &message).await;
        timeout(PATIENCE, health.wait_for(|healthy| !healthy)).await.expect(what).unwrap();
        let end = async { while events.recv().await.is_some() {} };
        timeout(PATIENCE, end).await.expect("whoever listens hears that it is over");
        timeout(PATIENCE, a.shutdown()).await.expect("nothing hangs");
    }
    let a = start_with(again, Hooks::default()).await;
    all_see(&[&a, &b], &[1, 2]).await;
}

/// Messages that other nodes have made, damaged on the way, and made-up ones: without keys they may tell untruths, but they end
/// nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_and_made_up_messages_without_keys_are_survived() {
    // Each may make up a life, of which only so many fit a digest.
    const DAMAGED: u32 = 3_000;
    let captured = Arc::new(Mutex::new(Vec::new()));
    let into = captured.clone();
    let capture = filter(move |_, frame| {
        let mut captured = into.lock().unwrap();
        if captured.len() < 1_000 {
            captured.push(frame.to_vec());
        }
        true
    });
    let a = start(1, &[]).await;
    let b = start_with(config(2, &[a.addr()]), capture).await;
    all_see(&[&a, &b], &[1, 2]).await;
    // So that there is news to damage.
    for term in 1..=50 {
        let shard = ShardId(term as u32 % 7);
        b.publish_leaders(&[(shard, Term(term), Epoch(1))]);
        eventually("claims arrive", || a.tracker().entry(shard).is_some_and(|e| e.term == Term(term))).await;
    }
    let body = FRAME_OVERHEAD_BYTES - TAG_BYTES;
    let message = |frame: &Vec<u8>| match Body::parse(&frame[body..]) {
        // Parts of several would wait for the others.
        Some(Body::Part(part)) if part.count == 1 => Some(part.bytes.to_vec()),
        _ => None,
    };
    let messages: Vec<Vec<u8>> = captured.lock().unwrap().iter().filter_map(message).collect();
    let kinds: BTreeSet<u8> = messages.iter().map(|message| message[3]).collect();
    assert_eq!(kinds, BTreeSet::from([0, 1, 2]), "greetings, answers and news");
    let (mut stranger, mut rng) = (Stranger::new().await, Rng::from_clock());
    for i in 1..=DAMAGED {
        let mut message = messages[rng.below(messages.len() as u64) as usize].clone();
        if i % 2 == 0 {
            message = any_message(&mut rng, &[&a, &b]);
        }
        if i % 8 < 6 {
            for _ in 0..=rng.below(3) {
                let at = rng.below(message.len() as u64) as usize;
                message[at] ^= 1 << rng.below(8);
            }
        }
        let heard = a.stats().received_datagrams;
        stranger.send(a.addr(), &message).await;
        if i % 16 == 0 {
            eventually("it is read", || a.stats().received_datagrams > heard).await;
        }
    }
    eprintln!("{:?}, {} lives", a.stats(), a.known_lives().await);
    assert!(a.health(), "it has ended");
    // What is told of the others may be untrue now. Newcomers are heard, and what this node says itself ends it neither.
    let c = start(3, &[a.addr()]).await;
    all_see(&[&a], &[3]).await;
    a.publish_leaders(&[(ShardId(1), Term(99), Epoch(1))]);
    let heard = a.stats().received_datagrams;
    eventually("it goes on", || a.stats().received_datagrams > heard + 20).await;
    assert!(a.health() && c.health());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_goodbye_arrives_although_every_datagram_is_lost() {
    let deaf = Arc::new(AtomicBool::new(false));
    let lost = deaf.clone();
    let cut = move || {
        let lost = lost.clone();
        filter(move |_, _| !lost.load(Ordering::Relaxed))
    };
    let a = start_with(keyed(1, &[]), cut()).await;
    let b = start_with(keyed(2, &[a.addr()]), cut()).await;
    all_see(&[&a, &b], &[1, 2]).await;
    deaf.store(true, Ordering::Relaxed);
    b.leave().await;
    assert_eq!((b.stats().goodbyes_confirmed, b.stats().goodbyes_unconfirmed), (1, 0));
    eventually("it has left", || state(&a, 2) == Some(MemberState::Left)).await;
}

/// Batches of nodes join and leave; two observers must see each of them leave and none of them fail.
async fn leaves(batches: u64, batch: u64, hooks: impl Fn() -> Hooks, with_keys: bool) -> (u64, u64) {
    let make = |node, seeds: &[SocketAddr]| if with_keys { keyed(node, seeds) } else { config(node, seeds) };
    let a = start_with(make(1, &[]), hooks()).await;
    let b = start_with(make(2, &[a.addr()]), hooks()).await;
    all_see(&[&a, &b], &[1, 2]).await;
    let observers = [&a, &b];
    let mut events = observers.map(Gossip::events);
    let (mut confirmed, mut unconfirmed) = (0, 0);
    for round in 0..batches {
        let ids: Vec<u64> = (10 + round * batch..10 + (round + 1) * batch).collect();
        let mut joiners = Vec::new();
        for id in &ids {
            joiners.push(start_with(make(*id, &[a.addr(), b.addr()]), hooks()).await);
        }
        all_see(&observers, &ids).await;
        for joiner in &joiners {
            all_see(&[joiner], &[1, 2]).await;
        }
        let mut leaving = JoinSet::new();
        let mut story = Vec::new();
        for (joiner, id) in joiners.into_iter().zip(ids.clone()) {
            leaving.spawn(async move {
                assert!(joiner.health(), "{id} has ended by itself");
                let began = Instant::now();
                timeout(PATIENCE, joiner.leave()).await.expect("leaving ends");
                (joiner.stats(), format!("{id} left within {:?}: {:?}", began.elapsed(), joiner.stats()))
            });
        }
        while let Some(stats) = leaving.join_next().await {
            let (stats, line) = stats.unwrap();
            story.push(line);
            confirmed += stats.goodbyes_confirmed;
            unconfirmed += stats.goodbyes_unconfirmed;
        }
        for events in &mut events {
            let mut missing: BTreeSet<NodeId> = ids.iter().map(|id| NodeId(*id)).collect();
            while !missing.is_empty() {
                match timeout(PATIENCE, events.recv()).await.expect("all are seen to leave").unwrap() {
                    MemberEvent::Leave { node } => drop(missing.remove(&node)),
                    MemberEvent::Failed { node } => {
                        let views = observers.map(|g| (state(g, node.0), g.stats()));
                        panic!("{node} is taken as failed: {story:#?} {views:#?}");
                    }
                    MemberEvent::Join { .. } | MemberEvent::Update { .. } => {}
                }
            }
        }
    }
    for g in observers {
        let left = g.members().iter().filter(|m| m.state == MemberState::Left).count() as u64;
        assert_eq!(left, batches * batch);
    }
    (confirmed, unconfirmed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_leaves_with_a_fifth_of_the_datagrams_lost_are_no_failure() {
    let (confirmed, unconfirmed) = leaves(25, 4, || lossy(20), true).await;
    eprintln!("goodbyes confirmed {confirmed}, not {unconfirmed}");
    // Peers that leave at the same time may stop listening before they have confirmed.
    assert!(confirmed >= 200, "{confirmed} confirmed, {unconfirmed} not");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaves_need_no_connections() {
    let (confirmed, unconfirmed) = leaves(5, 4, || Hooks { no_streams: true, ..lossy(20) }, false).await;
    eprintln!("goodbyes confirmed {confirmed}, not {unconfirmed}");
}

/// All of the observer stops, as a process does that is stopped: its clock goes on, and what is sent to it waits or is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_observer_that_stalls_again_and_again_takes_nobody_as_failed() {
    const STALLS: u32 = 6;
    // Longer than the silence, about 0.9 s, after which a node that ran on would take another as failed.
    const STALL: Duration = Duration::from_millis(1_200);
    let quick = |node, seeds: &[SocketAddr]| GossipConfig { dead_ticks: 10, ..keyed(node, seeds) };
    let a = start_with(quick(1, &[]), Hooks::default()).await;
    let b = start_with(quick(2, &[a.addr()]), Hooks::default()).await;
    let mut others = [a.events(), b.events()];
    let config = quick(3, &[a.addr()]);
    // A thread with a runtime of its own: where it sleeps, every task of this node stands still.
    let observer = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let observer = start_with(config, Hooks::default()).await;
            let mut events = observer.events();
            for _ in 0..STALLS {
                all_see(&[&observer], &[1, 2]).await;
                // The stall under test.
                std::thread::sleep(STALL);
                // It counts only once it has done all that it does late.
                let heard = observer.stats().received_datagrams;
                eventually("it hears again", || observer.stats().received_datagrams > heard + 20).await;
            }
            all_see(&[&observer], &[1, 2]).await;
            std::iter::from_fn(|| events.try_recv()).collect::<Vec<_>>()
        })
    });
    let seen = tokio::task::spawn_blocking(|| observer.join()).await.unwrap().unwrap();
    assert!(seen.iter().all(|event| matches!(event, MemberEvent::Join { .. })), "{seen:?}");
    assert_eq!(seen.len(), 3, "{seen:?}");
    // To those who ran on it was silent for long enough: so it was for itself, and only that it stalled has saved them.
    let failed = MemberEvent::Failed { node: NodeId(3) };
    let seen: Vec<_> = others.iter_mut().flat_map(|events| std::iter::from_fn(|| events.try_recv())).collect();
    assert!(seen.contains(&failed), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_played_to_a_restarted_observer_shows_no_ghost() {
    let captured = Arc::new(Mutex::new(Vec::new()));
    let into = captured.clone();
    let capture = filter(move |_, frame| {
        into.lock().unwrap().push(frame.to_vec());
        true
    });
    let a = Gossip::start(keyed(1, &[])).await.unwrap();
    let b = start_with(keyed(2, &[a.addr()]), capture).await;
    all_see(&[&a, &b], &[1, 2]).await;
    eventually("there is enough to repeat", || captured.lock().unwrap().len() >= 60).await;
    b.shutdown().await;
    let addr = a.addr();
    let before = a.stats().foreign.of(Foreign::Replay);
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let frames = captured.lock().unwrap().clone();
    for frame in &frames[..20] {
        socket.send_to(frame, addr).await.unwrap();
    }
    eventually("repetitions are counted", || a.stats().foreign.of(Foreign::Replay) >= before + 10).await;

    a.shutdown().await;
    let mut again = keyed(1, &[]);
    (again.bind, again.advertise) = (addr, addr);
    let a = Gossip::start(again).await.unwrap();
    for frame in &frames {
        let unproven = a.stats().unproven;
        socket.send_to(frame, addr).await.unwrap();
        eventually("it is refused", || a.stats().unproven > unproven).await;
    }
    assert_eq!(a.stats().received_datagrams, 0);
    assert_eq!(a.members().len(), 1);
    assert_eq!(a.known_lives().await, 1, "not even chitchat has heard of it");
}

/// Whoever captured one frame may send it again and again, in the name of a host that has not asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_first_frames_from_one_host_is_answered_sparingly_and_keeps_nobody_out() {
    let a = Gossip::start(keyed(1, &[])).await.unwrap();
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let ring = KeyRing::new(key(1));
    let body = Body::Heard { generation: 1 }.encode();
    let first = Sealer::new(&config(1, &[]).cluster, BootId([5; 16])).seal(Some(&ring), now_s, None, &body);
    let socket = UdpSocket::bind("127.0.0.2:0").await.unwrap();
    let began = Instant::now();
    for _ in 0..2_000 {
        let unproven = a.stats().unproven;
        socket.send_to(&first, a.addr()).await.unwrap();
        eventually("it is read", || a.stats().unproven > unproven).await;
    }
    let seconds = began.elapsed().as_secs() + 2;
    assert!(a.stats().greetings <= 64 * seconds, "{:?} within {seconds} s", a.stats());
    let b = Gossip::start(keyed(2, &[a.addr()])).await.unwrap();
    let both = async { all_see(&[&a, &b], &[1, 2]).await };
    let flood = async {
        loop {
            socket.send_to(&first, a.addr()).await.unwrap();
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = both => {}
        () = flood => {}
    }
}

/// What one node said to a second one, played to a third that knows both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_said_to_another_is_not_taken() {
    let captured = Arc::new(Mutex::new(Vec::new()));
    let into = captured.clone();
    let capture = filter(move |to, frame| {
        into.lock().unwrap().push((to, frame.to_vec()));
        true
    });
    let a = Gossip::start(keyed(1, &[])).await.unwrap();
    let b = start_with(keyed(2, &[a.addr()]), capture).await;
    let c = Gossip::start(keyed(3, &[a.addr()])).await.unwrap();
    all_see(&[&a, &b, &c], &[1, 2, 3]).await;
    let to_c = || captured.lock().unwrap().iter().rev().find(|(to, _)| *to == c.addr()).map(|(_, frame)| frame.clone());
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (before, heard) = (a.stats().unproven, captured.lock().unwrap().len());
    eventually("it speaks to the other", || captured.lock().unwrap()[heard..].iter().any(|(to, _)| *to == c.addr()))
        .await;
    socket.send_to(&to_c().unwrap(), a.addr()).await.unwrap();
    eventually("it is not taken", || a.stats().unproven > before).await;
    assert!(a.health() && b.health() && c.health());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_under_traffic_and_nobody_becomes_suspect() {
    let a = Gossip::start(keyed(1, &[])).await.unwrap();
    let b = Gossip::start(keyed(2, &[a.addr()])).await.unwrap();
    let c = Gossip::start(keyed(3, &[a.addr()])).await.unwrap();
    let all = [&a, &b, &c];
    all_see(&all, &[1, 2, 3]).await;
    let mut updates = all.map(Gossip::leader_updates);
    let (old, new) = (key(1).id(), key(2).id());
    assert!(matches!(start(9, &[]).await.set_keys(KeyRing::new(key(2))), Err(GossipError::NoKeys)));
    let (mut term, mut ring) = (0, KeyRing::new(key(1)));
    for step in 0..4 {
        match step {
            0 => ring.install(key(2)).unwrap(),
            1 => ring.use_key(new).unwrap(),
            2 => ring.remove(old).unwrap(),
            _ => {}
        }
        for g in all {
            g.set_keys(ring.clone()).unwrap();
            // News passes between any two nodes at every moment of the rotation.
            for from in all {
                term += 1;
                let shard = ShardId(term as u32);
                from.publish_leaders(&[(shard, Term(term), Epoch(1))]);
                for to in all {
                    eventually("news passes", || to.tracker().get_leader(shard).is_some()).await;
                }
            }
        }
    }
    for g in all {
        assert_eq!(g.keyring().unwrap().ids().collect::<Vec<_>>(), [new]);
        assert_eq!(g.stats().foreign.of(Foreign::WrongKey), 0);
    }
    for updates in &mut updates {
        while let Ok(Some(update)) = timeout(Duration::ZERO, updates.recv()).await {
            if let GossipUpdate::Member(member) = update {
                assert_eq!(member.state, MemberState::Alive);
            }
        }
    }
    // Who missed the rotation is out.
    let late = Gossip::start(keyed(4, &[a.addr()])).await.unwrap();
    eventually("the old key is refused", || a.stats().foreign.of(Foreign::WrongKey) >= 3).await;
    assert_eq!((late.members().len(), a.members().len()), (1, 3));
}

/// Returns how long the joiner took, and how many messages by TCP all of them needed.
async fn large_state(hooks: impl Fn() -> Hooks) -> (Duration, u64) {
    const SHARDS: u32 = 4_096;
    let a = start_with(keyed(1, &[]), hooks()).await;
    let b = start_with(keyed(2, &[a.addr()]), hooks()).await;
    all_see(&[&a, &b], &[1, 2]).await;
    let claims: Vec<_> = (0..SHARDS).map(|shard| (ShardId(shard), Term(1_000), Epoch(77))).collect();
    b.publish_leaders(&claims);
    eventually("all claims arrive", || a.tracker().entries().len() == SHARDS as usize).await;
    let started = Instant::now();
    let c = start_with(keyed(3, &[a.addr()]), hooks()).await;
    eventually("the joiner has them too", || c.tracker().entries().len() == SHARDS as usize).await;
    let took = started.elapsed();
    let streamed = [&a, &b, &c].map(|g| g.stats().sent_stream_messages);
    (took, streamed.iter().sum())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_learns_four_thousand_claims_by_tcp() {
    let small = || {
        filter(|_, frame| {
            assert!(frame.len() <= MAX_DATAGRAM_BYTES);
            true
        })
    };
    let (took, streamed) = large_state(small).await;
    eprintln!("{took:?}, {streamed} messages by TCP");
    assert!(streamed > 0, "what is large goes by TCP");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_learns_four_thousand_claims_by_datagrams_alone() {
    let (took, streamed) = large_state(|| Hooks { no_streams: true, ..Hooks::default() }).await;
    eprintln!("{took:?}");
    assert_eq!(streamed, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_strangers_do_no_harm_and_are_bounded() {
    let a = Gossip::start(keyed(1, &[])).await.unwrap();
    // Only to see whether somebody listens.
    for _ in 0..10 {
        drop(TcpStream::connect(a.addr()).await.unwrap());
    }
    // Nonsense: too long, and of the right length.
    for (length, kind) in [(u32::MAX, Foreign::Garbage), (100, Foreign::Garbage)] {
        let before = a.stats().foreign.of(kind);
        let mut stream = TcpStream::connect(a.addr()).await.unwrap();
        stream.write_all(&length.to_be_bytes()).await.unwrap();
        // It may be closed before all is written.
        let _ = stream.write_all(&[7; 100]).await;
        let end = timeout(PATIENCE, stream.read(&mut [0; 1])).await.expect("it is closed");
        assert!(matches!(end, Ok(0) | Err(_)));
        eventually("it is counted", || a.stats().foreign.of(kind) > before).await;
    }
    // Who connects and says nothing takes a place, but only so many.
    let mut idle = Vec::new();
    let mut closed = 0;
    for _ in 0..80 {
        let mut stream = TcpStream::connect(a.addr()).await.unwrap();
        if idle.len() >= 64 {
            let end = timeout(PATIENCE, stream.read(&mut [0; 1])).await.expect("beyond the limit it is closed at once");
            assert!(matches!(end, Ok(0) | Err(_)));
            closed += 1;
        } else {
            idle.push(stream);
        }
    }
    assert_eq!(closed, 16);
    // Nodes do without connections then.
    let b = Gossip::start(keyed(2, &[a.addr()])).await.unwrap();
    all_see(&[&a, &b], &[1, 2]).await;
    b.leave().await;
    eventually("it has left", || state(&a, 2) == Some(MemberState::Left)).await;
    assert!(a.health());
}

#[tokio::test]
async fn a_port_that_is_taken_for_tcp_is_named() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = taken.local_addr().unwrap();
    let mut config = config(1, &[]);
    (config.bind, config.advertise) = (addr, addr);
    let message = Gossip::start(config).await.unwrap_err().to_string();
    assert!(message.contains(&addr.to_string()) && message.contains("TCP"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_finds_the_cluster_by_srv_records() {
    const NAME: &str = "_crema._tcp.example";
    let dns = FakeDns::start().await;
    let hooks = || Hooks { dns: Some(dns.addr), resolve_period: Some(Duration::from_millis(100)), ..Hooks::default() };
    let seeded = |node| GossipConfig { seeds: vec![format!("srv:{NAME}").parse().unwrap()], ..config(node, &[]) };
    // The family of the socket filters what is found.
    dns.host("one.example", &["::1".parse().unwrap(), "127.0.0.1".parse().unwrap()]);
    dns.set_broken(true);
    let joiner = start_with(seeded(2), hooks()).await;
    eventually("it asks", || dns.asked() > 0).await;
    let a = start(1, &[]).await;
    dns.srv(NAME, &[(1, a.addr().port(), "one.example.")]);
    dns.set_broken(false);
    all_see(&[&a, &joiner], &[1, 2]).await;

    // The records change to another node.
    let c = start(3, &[]).await;
    dns.srv(NAME, &[(1, c.addr().port(), "one.example.")]);
    dns.set_broken(false);
    let late = start_with(seeded(4), hooks()).await;
    all_see(&[&c, &late], &[3, 4]).await;
}
