use super::seeding::{Names, SILENCE, Silence};
use super::*;
use crate::keys::encode_node;
use crate::seed::SeedAddr;
use crate::testing::{FakeDns, Logs, PATIENCE, all_see, config, eventually, start, state};
use crate::view::MemberEvent;
use tokio::net::UdpSocket;

async fn next(events: &mut EventReceiver) -> MemberEvent {
    timeout(PATIENCE, events.recv()).await.expect("an event").expect("gossip runs")
}

fn join(node: u64) -> MemberEvent {
    MemberEvent::Join { node: NodeId(node), raft_addr: format!("127.0.0.1:{}", 9000 + node) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_meet_tell_leaders_leave_and_die() {
    let a = start(1, &[]).await;
    let mut events = a.events();
    let mut updates = a.leader_updates();
    assert_eq!(next(&mut events).await, join(1));
    assert_eq!(timeout(PATIENCE, updates.recv()).await.unwrap(), Some(GossipUpdate::Resync));
    let b = start(2, &[a.addr()]).await;
    let c = start(3, &[a.addr()]).await;
    all_see(&[&a, &b, &c], &[1, 2, 3]).await;
    let mut joined = [next(&mut events).await, next(&mut events).await];
    joined.sort_by_key(MemberEvent::node);
    assert_eq!(joined, [join(2), join(3)]);

    // Claims reach everybody, in any order the highest term wins, and an older publication changes nothing.
    let (s, t) = (ShardId(0), ShardId(5));
    b.publish_leaders(&[(s, Term(3), Epoch(1)), (ShardId::META, Term(1), Epoch(1))]);
    c.publish_leaders(&[(t, Term(2), Epoch(1)), (s, Term(2), Epoch(9))]);
    b.publish_leaders(&[(s, Term(1), Epoch(7))]);
    for g in [&a, &b, &c] {
        eventually("claims arrive", || g.tracker().entries().len() == 3).await;
        let expected = BTreeMap::from([(s, NodeId(2)), (t, NodeId(3))]);
        eventually("the right ones win", || g.tracker().all_leaders() == expected).await;
        assert_eq!(g.tracker().get_leader(ShardId::META), Some(NodeId(2)));
        assert_eq!(g.tracker().entry(s).unwrap().term, Term(3));
        assert_eq!(g.tracker().conflicts(), 0);
    }
    let claim = GossipUpdate::Leader { shard: t, leader: NodeId(3), term: Term(2), epoch: Epoch(1) };
    while timeout(PATIENCE, updates.recv()).await.expect("the claim is passed on").unwrap() != claim {}

    // A goodbye is a Leave, and only that.
    c.leave().await;
    assert!(!c.health());
    for g in [&a, &b] {
        eventually("it has left", || state(g, 3) == Some(MemberState::Left)).await;
        eventually("its route is gone", || g.tracker().get_leader(t).is_none()).await;
    }
    assert_eq!(next(&mut events).await, MemberEvent::Leave { node: NodeId(3) });
    while timeout(PATIENCE, updates.recv()).await.expect("the node is gone").unwrap() != GossipUpdate::Gone(NodeId(3)) {
    }

    // A crash is a failure. Its route goes.
    drop(b);
    assert_eq!(next(&mut events).await, MemberEvent::Failed { node: NodeId(2) });
    eventually("the list says so too", || state(&a, 2) == Some(MemberState::Dead)).await;
    eventually("routes are gone", || a.tracker().all_leaders().is_empty()).await;
    assert_eq!(state(&a, 3), Some(MemberState::Left));

    // The failed node comes back as a new life and leads again.
    let b = start(2, &[a.addr()]).await;
    b.publish_leaders(&[(s, Term(4), Epoch(1))]);
    assert_eq!(next(&mut events).await, join(2));
    eventually("it leads again", || a.tracker().get_leader(s) == Some(NodeId(2))).await;

    a.shutdown().await;
    assert_eq!(events.recv().await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_at_another_address_is_one_update_and_voids_old_claims() {
    let a = start(1, &[]).await;
    let b = start(2, &[a.addr()]).await;
    all_see(&[&a, &b], &[1, 2]).await;
    let s = ShardId(7);
    b.publish_leaders(&[(s, Term(3), Epoch(1))]);
    eventually("the claim arrives", || a.tracker().get_leader(s) == Some(NodeId(2))).await;
    let mut events = a.events();
    assert_eq!([next(&mut events).await, next(&mut events).await], [join(1), join(2)]);
    drop(b);
    let mut moved = config(2, &[a.addr()]);
    moved.raft_addr = "127.0.0.1:7777".into();
    moved.incarnation = Incarnation(99);
    let _b = Gossip::start(moved).await.unwrap();
    let update = MemberEvent::Update { node: NodeId(2), raft_addr: "127.0.0.1:7777".into() };
    assert_eq!(next(&mut events).await, update);
    eventually("the old claim is void", || a.tracker().get_leader(s).is_none()).await;
    let member = a.members().into_iter().find(|m| m.meta.node_id == NodeId(2)).unwrap();
    assert_eq!(member.meta.incarnation, Incarnation(99));
    assert_eq!(events.try_recv(), None);
}

/// One thread, so that the grace may pass at once.
#[tokio::test]
async fn a_dead_member_is_forgotten_after_its_grace_and_its_readers_are_told() {
    let a = start(1, &[]).await;
    let b = start(2, &[a.addr()]).await;
    all_see(&[&a, &b], &[1, 2]).await;
    let (mut updates, mut events) = (a.leader_updates(), a.events());
    drop(b);
    let mut next = async || timeout(PATIENCE, updates.recv()).await.expect("an update").expect("gossip runs");
    while next().await != GossipUpdate::Gone(NodeId(2)) {}
    assert_eq!(state(&a, 2), Some(MemberState::Dead), "it is still listed, and may be tried");
    tokio::time::pause();
    tokio::time::advance(config(1, &[]).grace).await;
    tokio::time::resume();
    while next().await != GossipUpdate::Forgotten(NodeId(2)) {}
    assert_eq!(state(&a, 2), None, "who is told of it finds it true");
    let told: Vec<_> = std::iter::from_fn(|| events.try_recv()).collect();
    assert_eq!(told, [join(1), join(2), MemberEvent::Failed { node: NodeId(2) }], "no second event");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_made_up_term_silences_nobody_and_does_not_outlive_the_liar() {
    let a = start(1, &[]).await;
    let b = start(2, &[a.addr()]).await;
    let liar = start(3, &[a.addr()]).await;
    let all = [&a, &b, &liar];
    all_see(&all, &[1, 2, 3]).await;
    let s = ShardId(4);
    liar.publish_leaders(&[(s, Term(u64::MAX), Epoch(1))]);
    for g in all {
        eventually("the lie arrives", || g.tracker().get_leader(s) == Some(NodeId(3))).await;
    }
    let mut updates = a.leader_updates();
    assert_eq!(timeout(PATIENCE, updates.recv()).await.unwrap(), Some(GossipUpdate::Resync));
    let (led, claim) = (Epoch(2), |term| (s, Term(term), Epoch(2)));
    b.publish_leaders(&[claim(7)]);
    assert_eq!(b.tracker().get_leader(s), Some(NodeId(2)), "its own Raft knows better");
    drop(liar);
    eventually("the truth is known", || a.tracker().get_leader(s) == Some(NodeId(2))).await;
    assert_eq!(a.tracker().entry(s).unwrap().term, Term(7));
    let news = GossipUpdate::Leader { shard: s, leader: NodeId(2), term: Term(7), epoch: led };
    while timeout(PATIENCE, updates.recv()).await.expect("it is passed on").unwrap() != news {}
    b.publish_leaders(&[claim(8)]);
    eventually("later terms arrive as ever", || a.tracker().entry(s).unwrap().term == Term(8)).await;
    assert_eq!((a.tracker().conflicts(), b.tracker().conflicts()), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_under_one_id_are_noticed() {
    let a = start(1, &[]).await;
    let lower = start(2, &[a.addr()]).await;
    let rival = Incarnation(99);
    let higher = Gossip::start(GossipConfig { incarnation: rival, ..config(2, &[a.addr()]) }).await.unwrap();
    assert!(lower.generation() < higher.generation());
    eventually("the observer counts it", || a.stats().conflicts == 1).await;
    eventually("the lower one knows", || lower.superseded_by() == Some(higher.generation())).await;
    eventually("and that it is heard", || lower.overtaken_by() == Some(rival)).await;
    assert_eq!((higher.superseded_by(), higher.overtaken_by()), (None, None));
    assert_eq!(a.members().len(), 2);
    drop(higher);
    eventually("and is not any more", || lower.overtaken_by().is_none()).await;
}

/// Its clock was an hour fast at the last start and is right again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_life_behind_a_remembered_one_is_told_so_and_the_next_is_heard() {
    let a = start(1, &[]).await;
    let hour_ns = 3_600_000_000_000;
    let fast = a.generation() + hour_ns;
    let life = |generation, incarnation: u128| GossipConfig {
        generation,
        incarnation: Incarnation(incarnation),
        ..config(2, &[a.addr()])
    };
    let b = Gossip::start(life(Some(fast), 1)).await.unwrap();
    all_see(&[&a, &b], &[1, 2]).await;
    drop(b);
    eventually("it fails", || state(&a, 2) == Some(MemberState::Dead)).await;
    let b = Gossip::start(life(None, 2)).await.unwrap();
    eventually("it knows", || b.superseded_by() == Some(fast)).await;
    assert_eq!(b.stats().conflicts, 0, "nobody else runs");
    assert_eq!(state(&a, 2), Some(MemberState::Dead));
    b.shutdown().await;
    let b = Gossip::start(life(Some(fast + 1), 3)).await.unwrap();
    all_see(&[&a, &b], &[1, 2]).await;
    assert_eq!(a.members()[1].meta.incarnation, Incarnation(3));
    assert_eq!(b.superseded_by(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_generation_is_exceeded_although_the_clock_was_set_back() {
    let dir = tempfile::tempdir().unwrap();
    let kept =
        |generation| GossipConfig { generation, generation_file: Some(dir.path().join("gossip")), ..config(1, &[]) };
    let fast = start(9, &[]).await.generation() + 3_600_000_000_000;
    assert_eq!(Gossip::start(kept(Some(fast))).await.unwrap().generation(), fast);
    assert_eq!(Gossip::start(kept(None)).await.unwrap().generation(), fast + 1);
    // A start within the process names its own, which may be too low as well.
    assert_eq!(Gossip::start(kept(Some(7))).await.unwrap().generation(), fast + 2);
    assert_eq!(Gossip::start(kept(Some(fast + 10))).await.unwrap().generation(), fast + 10);
    std::fs::remove_dir_all(dir.path()).unwrap();
    let error = Gossip::start(kept(None)).await.unwrap_err();
    assert!(matches!(&error, GossipError::Generation { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_travels_and_a_name_is_a_seed() {
    let mut zoned = config(1, &[]);
    let expected = BTreeMap::from([("zone".to_owned(), "b".to_owned()), ("rack".to_owned(), "r 1".to_owned())]);
    zoned.metadata = expected.clone();
    let a = Gossip::start(zoned).await.unwrap();
    let mut by_name = config(2, &[]);
    by_name.seeds = vec![format!("localhost:{}", a.addr().port()).parse().unwrap()];
    let b = Gossip::start(by_name).await.unwrap();
    let c = start(3, &[a.addr()]).await;
    all_see(&[&a, &b, &c], &[1, 2, 3]).await;
    for g in [&a, &b, &c] {
        eventually("metadata arrives", || g.members()[0].meta.metadata == expected).await;
    }
}

#[tokio::test]
async fn an_occupied_port_is_named_and_a_stopped_one_is_free() {
    let first = start(1, &[]).await;
    let mut second = config(2, &[]);
    (second.bind, second.advertise) = (first.addr(), first.addr());
    let message = Gossip::start(second.clone()).await.unwrap_err().to_string();
    assert!(message.contains(&first.addr().to_string()), "{message}");
    assert!(message.contains("in use"), "{message}");
    first.shutdown().await;
    first.shutdown().await;
    first.leave().await;
    Gossip::start(second).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_is_cut_off_frees_its_port() {
    let probe = start(1, &[]).await;
    let mut config = config(1, &[]);
    (config.bind, config.advertise) = (probe.addr(), probe.addr());
    probe.shutdown().await;
    let held = Arc::new(Notify::new());
    let hooks = Hooks { held: Some(held.clone()), ..Hooks::default() };
    let mut start = Box::pin(Gossip::start_with(config, hooks));
    let addr = probe.addr();
    let free = || std::net::UdpSocket::bind(addr).is_ok() && std::net::TcpListener::bind(addr).is_ok();
    tokio::select! {
        _ = &mut start => panic!("it is held"),
        () = held.notified() => {}
    }
    assert!(!free());
    drop(start);
    eventually("its port is free", free).await;
}

#[tokio::test]
async fn a_bad_configuration_is_refused() {
    let mut bad = config(1, &[]);
    bad.phi = 1.0;
    assert!(matches!(Gossip::start(bad).await, Err(GossipError::Config(ConfigError::Range { field: "phi", .. }))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_chitchat_is_visible() {
    let a = start(1, &[]).await;
    let mut health = a.health_watch();
    let (mut events, mut updates) = (a.events(), a.leader_updates());
    assert!(a.health());
    a.shared.handle.abort();
    timeout(PATIENCE, health.wait_for(|healthy| !healthy)).await.unwrap().unwrap();
    assert!(!a.health());
    assert_eq!(events.recv().await, Some(join(1)));
    assert_eq!(events.recv().await, None);
    assert_eq!(updates.recv().await, Some(GossipUpdate::Resync));
    assert_eq!(updates.recv().await, None);
    timeout(PATIENCE, a.leave()).await.expect("leaving ends although nothing runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_cluster_is_not_heard() {
    let a = start(1, &[]).await;
    let b = start(2, &[a.addr()]).await;
    let mut other = config(3, &[a.addr(), b.addr()]);
    other.cluster = "other".into();
    let other = Gossip::start(other).await.unwrap();
    all_see(&[&a, &b], &[1, 2]).await;
    // It has tried by now, more often than these two needed to meet.
    let tried = other.stats().sent_datagrams + 20;
    eventually("it tries", || other.stats().sent_datagrams > tried).await;
    assert_eq!((other.members().len(), a.members().len(), b.members().len()), (1, 2, 2));
}

/// A chitchat node that is not one of ours: what it says is ignored and counted, and nobody is the worse for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_talks_nonsense_is_ignored_and_counted() {
    let a = start(1, &[]).await;
    let seeds = Seeds { addrs: vec![a.addr()], names: vec![] };
    let sockets = Bound::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = sockets.addr;
    let Started { wire, transport, greeted: _greeted, heard_goodbyes: _goodbyes } =
        Wire::start(sockets, addr, &config(9, &[]).cluster, None, Hooks::default()).await.unwrap();
    let mut stranger = chitchat_config(&config(9, &[]), &seeds, 1, addr, addr);
    stranger.chitchat_id.node_id = "nobody".into();
    let mut pairs = encode_node(&config(9, &[]).meta(addr)).unwrap();
    pairs.push(("l/1".into(), "1:1".into()));
    let stranger = spawn_chitchat(stranger, pairs, &transport).await.unwrap();
    eventually("the stranger is counted", || a.stats().malformed_values >= 1).await;
    let b = start(2, &[a.addr()]).await;
    {
        let chitchat = b.shared.handle.chitchat();
        let mut chitchat = chitchat.lock().await;
        for (key, value) in [
            ("l/x", "1:1"),
            ("l/99999", "1:1"),
            ("l/2", "one"),
            ("l/3", "1:0"),
            ("l/4", "1:7"),
            ("zz", "?"),
            ("m/\u{7f}", ""),
        ] {
            chitchat.self_node_state().set(key, value);
        }
    }
    eventually("the good claim is taken", || a.tracker().get_leader(ShardId(4)) == Some(NodeId(2))).await;
    eventually("the bad ones are counted", || a.stats().malformed_values >= 6).await;
    assert_eq!(a.tracker().all_leaders().len(), 1);
    assert_eq!(a.members().len(), 2);
    stranger.shutdown().await.unwrap();
    wire.close();
    timeout(PATIENCE, wire.closed()).await.expect("the sockets are closed");
}

#[tokio::test]
async fn names_are_followed_and_their_last_good_answer_is_kept() {
    let dns = FakeDns::start().await;
    let seed: SeedAddr = "srv:_crema._udp.example".parse().unwrap();
    let names = [seed.clone()];
    let addrs = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<SocketAddr>>();
    let mut known = Names::default();
    let all = |known: &Names| known.addrs().collect::<Vec<_>>();
    known.resolve(&names, true, Some(dns.addr)).await;
    assert!(known.addrs().next().is_none());
    dns.srv("_crema._udp.example", &[(1, 8001, "one.example.")]);
    dns.host("one.example", &["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]);
    known.resolve(&names, true, Some(dns.addr)).await;
    assert_eq!(all(&known), addrs(&["10.0.0.1:8001"]));
    // It fails, and then it has no address of the socket's family.
    dns.set_broken(true);
    known.resolve(&names, true, Some(dns.addr)).await;
    dns.set_broken(false);
    dns.host("one.example", &["fd00::1".parse().unwrap()]);
    known.resolve(&names, true, Some(dns.addr)).await;
    assert_eq!(all(&known), addrs(&["10.0.0.1:8001"]));
    known.resolve(&names, false, Some(dns.addr)).await;
    assert_eq!(all(&known), addrs(&["[fd00::1]:8001"]));
    // Port and host change.
    dns.srv("_crema._udp.example", &[(1, 9001, "two.example.")]);
    dns.host("two.example", &["10.0.0.2".parse().unwrap()]);
    known.resolve(&names, true, Some(dns.addr)).await;
    assert_eq!(all(&known), addrs(&["10.0.0.2:9001"]));
}
/// Of three targets one is away now and then: the others follow what the name server says, and that one stays as it was
/// until it is no target any more.
#[tokio::test]
async fn targets_that_are_not_found_keep_what_they_had() {
    let dns = FakeDns::start().await;
    let seed: SeedAddr = "srv:_crema._udp.example".parse().unwrap();
    let mut names = Names::default();
    let mut now = async || {
        names.resolve(std::slice::from_ref(&seed), true, Some(dns.addr)).await;
        names.addrs().map(|addr| addr.to_string()).collect::<Vec<_>>()
    };
    let host = |name: &str, ip: &str| dns.host(name, &[ip.parse().unwrap()]);
    let gone = |name: &str| dns.host(name, &[]);
    dns.srv("_crema._udp.example", &[(1, 1, "one.example."), (2, 2, "two.example."), (3, 3, "three.example.")]);
    host("one.example", "10.0.0.1");
    host("two.example", "10.0.0.2");
    assert_eq!(now().await, ["10.0.0.1:1", "10.0.0.2:2"], "the third was never found");
    host("one.example", "10.0.0.11");
    gone("two.example");
    host("three.example", "10.0.0.3");
    assert_eq!(now().await, ["10.0.0.11:1", "10.0.0.2:2", "10.0.0.3:3"]);
    host("two.example", "fd00::2");
    assert_eq!(now().await, ["10.0.0.11:1", "10.0.0.2:2", "10.0.0.3:3"], "of the other family only is as good as none");
    dns.srv("_crema._udp.example", &[(2, 2, "two.example."), (3, 4, "three.example.")]);
    assert_eq!(now().await, ["10.0.0.2:2", "10.0.0.3:4"], "no target any more, and another port");
    dns.srv("_crema._udp.example", &[(3, 4, "three.example.")]);
    assert_eq!(now().await, ["10.0.0.3:4"]);
    dns.srv("_crema._udp.example", &[(1, 1, "nowhere.example.")]);
    assert_eq!(now().await, ["10.0.0.3:4"], "none of the new ones is found");
}

#[tokio::test]
async fn a_seed_that_is_not_found_is_told_once_and_so_is_its_return() {
    let (logs, _guard) = Logs::start();
    let dns = FakeDns::start().await;
    let names: [SeedAddr; 1] = ["srv:_crema._udp.example".parse().unwrap()];
    let mut known = Names::default();
    let mut look = async |times| {
        for _ in 0..times {
            known.resolve(&names, true, Some(dns.addr)).await;
        }
        logs.take(tracing::Level::INFO)
    };
    let told = look(3).await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("WARN") && told[0].contains("seed=srv:_crema._udp.example"), "{told:?}");
    assert!(told[0].contains("reason=") && told[0].contains("no records found"), "what the resolver says: {told:?}");
    dns.srv("_crema._udp.example", &[(1, 8001, "one.example.")]);
    dns.host("one.example", &["10.0.0.1".parse().unwrap()]);
    let told = look(3).await;
    assert!(told.len() == 1 && told[0].starts_with("INFO") && told[0].contains("seed=srv:_crema"), "{told:?}");
    // Of the other family alone.
    dns.host("one.example", &["fd00::1".parse().unwrap()]);
    let told = look(3).await;
    assert!(told.len() == 1 && told[0].starts_with("WARN") && told[0].contains("no IPv4 address"), "{told:?}");
}

/// The clock runs ahead whenever nothing else does.
#[tokio::test(start_paused = true)]
async fn seeds_that_do_not_answer_are_named_once() {
    let (logs, _guard) = Logs::start();
    let nobody = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let seed = nobody.local_addr().unwrap();
    let alone = start(1, &[seed]).await;
    sleep_until(Instant::now() + SILENCE * 4).await;
    let mut told = logs.take(tracing::Level::WARN);
    told.retain(|line| line.contains("no gossip seed has answered"));
    assert!(told.len() == 1 && told[0].contains(&seed.to_string()), "{told:?}");
    assert_eq!(alone.members().len(), 1);
    // Nor does a node that has nobody to ask.
    let first = start(2, &[]).await;
    sleep_until(Instant::now() + SILENCE * 4).await;
    first.shutdown().await;
    let told = logs.take(tracing::Level::WARN);
    assert!(!told.iter().any(|line| line.contains("no gossip seed has answered")), "{told:?}");
}

#[test]
fn a_silence_is_told_once_and_so_is_its_end() {
    let begin = Instant::now();
    let mut silence = Silence::default();
    let mut look = |silent, s| silence.look(silent, begin + Duration::from_secs(s));
    let lasts = SILENCE.as_secs();
    assert_eq!([look(true, 0), look(true, lasts - 1), look(false, lasts)], [None; 3], "others come a little later");
    assert_eq!([look(true, 100), look(true, 99 + lasts)], [None; 2], "from its own beginning");
    assert_eq!([look(true, 100 + lasts), look(true, 101 + lasts), look(true, 10_000)], [Some(true), None, None]);
    assert_eq!([look(false, 10_001), look(false, 10_002)], [Some(false), None]);
    assert_eq!([look(true, 20_000), look(true, 20_000 + lasts)], [None, Some(true)]);
}
