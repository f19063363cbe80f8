use super::following::*;
use super::*;
use crate::peers::{PeerEvent, Reach};
use std::time::Instant;

#[test]
fn addresses_are_told_as_others_can_use_them() {
    let addr = |s: &str| s.parse::<SocketAddr>().unwrap();
    assert_eq!(advertised(addr("10.0.0.1:9001"), None), "10.0.0.1:9001");
    assert_eq!(advertised(addr("0.0.0.0:9001"), Some("crema-1.local")), "crema-1.local:9001");
    assert_eq!(advertised(addr("[::]:9001"), Some("fd00::1")), "[fd00::1]:9001");
    assert_eq!(advertised(addr("127.0.0.1:9001"), Some("crema-1.local")), "127.0.0.1:9001");
}

#[test]
fn refusals_of_an_id_form_a_series_only_if_they_come_close_together() {
    let begin = Instant::now();
    let at = |s: u64| begin + Duration::from_secs(s);
    let mut series = None;
    for second in 0..=10 {
        series = Some(IdInUse::again(series, at(second)));
    }
    assert_eq!(series.unwrap().first, begin);
    assert_eq!(IdInUse::again(series, at(14)).first, at(14));
}

#[test]
fn a_place_is_lost_to_one_other_life_that_stays_and_never_without_an_end_to_patience() {
    let begin = Instant::now();
    let at = |s: u64| begin + Duration::from_secs(s);
    let patience = Some(Duration::from_secs(10));
    let mut place = TakenPlace::default();
    assert!(!place.is_lost(patience, at(100)));
    assert!(place.is_new_by("a", at(0)));
    assert!(!place.is_new_by("a", at(9)) && !place.is_lost(patience, at(9)));
    // Of another life nobody knows yet whether it stays.
    assert!(place.is_new_by("b", at(10)) && !place.is_lost(patience, at(19)));
    assert!(place.is_lost(patience, at(20)));
    assert!(!place.is_lost(None, at(1_000_000)), "it may be the one that is registered");
}

#[test]
fn a_slow_gossip_is_given_the_time_to_notice_an_end() {
    let tuned = |ms| GossipTuning { interval: Duration::from_millis(ms), phi: 16.0, ..GossipTuning::default() };
    assert_eq!(overtaken_patience(&tuned(250)), ID_IN_USE_PATIENCE);
    assert_eq!(overtaken_patience(&tuned(1_000)), Duration::from_secs(32));
}

#[tokio::test]
async fn an_occupied_port_is_named_with_its_key() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let Err(error) = bind("http_addr", addr) else { panic!("bound twice") };
    assert_eq!(error.to_string(), format!("http_addr {addr} cannot be bound: the port is in use by another process"));
}

fn local() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// A node that waits for a cluster which does not exist.
fn joining() -> NodeConfig {
    NodeConfig {
        node_id: NodeId(7),
        cluster: "test".to_owned(),
        initial_members: vec![],
        static_peers: BTreeMap::new(),
        seeds: vec![],
        gossip: GossipOptions::default(),
        shards: 4,
        replicas: 3,
        bind: BindAddrs {
            raft: local(),
            gossip: Some(local()),
            redis: Some(local()),
            redis_cluster: None,
            http: Some(local()),
        },
        advertise_host: None,
        metadata: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
        requirepass: None,
        request_deadline: Duration::from_secs(5),
        reads: ReadMode::Lease,
        max_clients: 10,
        stop_grace: Duration::from_secs(10),
        max_log_bytes: 1 << 20,
        cluster_keys: None,
        cluster_key_file: None,
        auto_voters: AutoVoters::default(),
        memory: MemoryOptions::default(),
        bound_resident: false,
        data_dir: None,
        state_dir: None,
        checkpoint_log_bytes: 512 << 20,
        snapshot_rate: 128 << 20,
    }
}

async fn get(node: &Node, path: &'static str) -> (u16, String) {
    let http = node.addresses().iter().find(|(key, _)| *key == "http_addr").unwrap().1;
    let asked = tokio::task::spawn_blocking(move || {
        crate::cli::http_get(&crate::cli::Door::open(http.to_string()), path, 1 << 20)
    });
    asked.await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_its_cluster_is_alive_but_not_ready_and_stops_at_once() {
    let node = Node::start(joining()).await.unwrap();
    assert_eq!(get(&node, "/livez").await.0, 200);
    let (code, body) = get(&node, "/readyz").await;
    assert_eq!(code, 503);
    let reason = node.not_ready().expect("not ready");
    assert!(body.contains("reason") && !reason.is_empty(), "{body}");

    let members: Vec<admin::MemberBody> = serde_json::from_str(&get(&node, "/v1/members").await.1).unwrap();
    assert_eq!(members.len(), 1);
    assert_eq!((members[0].node_id, members[0].state.as_str()), (7, "alive"));
    assert_eq!(members[0].metadata["zone"], "a");
    let raft = node.addresses()[0];
    assert_eq!((raft.0, members[0].raft_addr.clone()), ("raft_addr", raft.1.to_string()));
    assert_eq!(get(&node, "/v1/shards").await, (200, "[]".to_owned()));
    let page = get(&node, "/metrics").await.1;
    for name in
        ["crema_driver_rounds_total", "crema_peer_dials_failed_total", "crema_gossip_sent_bytes_total", "crema_shards "]
    {
        assert!(page.contains(name), "{name} is missing in\n{page}");
    }

    let begin = Instant::now();
    let second = node.clone();
    tokio::join!(node.shutdown(), second.shutdown());
    assert!(begin.elapsed() < Duration::from_secs(5), "nobody needs a node that has not joined");
    assert_eq!(node.ready().await, Err(Stopped));
    assert_eq!(node.change_voters(NodeId(1), true).await, Err(crema_shard::VoterError::Stopped), "nobody was asked");
    assert_eq!(node.failure(), None);
    for (key, addr) in node.addresses() {
        if *key == "gossip_addr" {
            std::net::UdpSocket::bind(addr).unwrap_or_else(|e| panic!("{key} {addr}: {e}"));
        } else {
            std::net::TcpListener::bind(addr).unwrap_or_else(|e| panic!("{key} {addr}: {e}"));
        }
    }
}

/// Whatever ends it, a panic too: see the tests of `crema-gossip`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_gossip_has_ended_a_node_is_not_ready_and_it_is_started_anew() {
    let node = Node::start(NodeConfig { initial_members: vec![NodeId(7)], replicas: 1, ..joining() }).await.unwrap();
    let soon = Duration::from_secs(20);
    tokio::time::timeout(soon, node.ready()).await.expect("a cluster of one").unwrap();
    let membership = node.inner.watch.membership.clone().unwrap();
    let ended = membership.gossip();
    ended.shutdown().await;
    assert_eq!(node.not_ready().as_deref(), Some("gossip has stopped"));
    let again = async {
        while node.not_ready().is_some() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(soon, again).await.expect("it is ready again");
    let gossip = membership.gossip();
    assert!(gossip.generation() > ended.generation() && gossip.health());
    assert_eq!(gossip.addr(), ended.addr());
    node.shutdown().await;
}

/// Peers of one node and what its driver would hear of them.
fn peers(node: u64, keys: &KeyRing) -> (PeersHandle, crossbeam::channel::Receiver<Input>) {
    let (driver, heard) = crossbeam::channel::bounded(64);
    let config = PeersConfig {
        cluster: "test".to_owned(),
        node: NodeId(node),
        incarnation: Incarnation(node.into()),
        boot: 0,
        addr: "127.0.0.1:1".to_owned(),
        keys: Some(keys.clone()),
        options: PeerOptions::default(),
    };
    let listener = std::net::TcpListener::bind(local()).unwrap();
    (Peers::start(config, listener, driver).unwrap(), heard)
}

/// Gossip and connections have the keys of the file, whatever has stood in it before, and also when gossip was started anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_follow_their_file() {
    let bytes = |n: u8| std::array::from_fn(|i| n + i as u8);
    let key = |n: u8| crema_gossip::ClusterKey::new(bytes(n));
    let line = |n: u8| bytes(n).map(|byte| format!("{byte:02x}")).concat();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    // Whole or not at all, as whoever changes it should.
    let write = |text: &str| {
        let whole = dir.path().join("new");
        std::fs::write(&whole, text).unwrap();
        std::fs::rename(whole, &path).unwrap();
    };
    write(&line(1));
    let first = crate::config::read_keys(&path).unwrap();
    let mut gossip = GossipConfig::new(NodeId(1), Incarnation(1), "127.0.0.1:9001", "test", local());
    gossip.keys = Some(first.clone());
    let membership = Arc::new(Membership::start(gossip).await.unwrap());
    let (ours, _heard) = peers(1, &first);
    let follow = follow_keys(path.clone(), Some(membership.clone()), ours.clone(), Duration::from_millis(1));
    let following = tokio::spawn(follow);
    let gossip_has = async |n: u8| {
        let wanted = Some(key(n).id());
        let has = async {
            while membership.gossip().keyring().map(|ring| ring.primary()) != wanted {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), has).await.expect("gossip has the key");
    };
    write(&line(2));
    gossip_has(2).await;
    // What cannot be read changes nothing, and the next that can does.
    write("no key");
    write(&format!("{}\n{}\n", line(3), line(2)));
    gossip_has(3).await;
    // Peers that have the newest alone come in.
    let (theirs, heard) = peers(2, &KeyRing::new(key(3)));
    theirs.set_reach(NodeId(1), Reach::at(ours.local_addr().to_string()));
    let up = tokio::task::spawn_blocking(move || heard.recv_timeout(Duration::from_secs(30)));
    assert!(matches!(up.await.unwrap(), Ok(Input::Peers(batch)) if matches!(batch.events[0], PeerEvent::Up { .. })));
    following.abort();
}

/// Its clock was an hour fast at the last start and is right again; peers would ignore a life below that one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gossip_of_a_node_with_a_directory_exceeds_its_last_generation() {
    let generation = |node: &Node| node.inner.watch.membership.as_ref().unwrap().gossip().generation();
    let node = Node::start(joining()).await.unwrap();
    let fast = generation(&node) + 3_600_000_000_000;
    node.shutdown().await;
    for durable in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let path = Some(dir.path().to_owned());
        let (data_dir, state_dir) = if durable { (path, None) } else { (None, path) };
        let config = NodeConfig { data_dir, state_dir, ..joining() };
        let bind = local();
        let addrs = NodeAddrs { raft: "127.0.0.1:1".to_owned(), ..NodeAddrs::default() };
        let mut before = gossip_config(&config, Incarnation(1), &addrs, bind, bind);
        before.generation = Some(fast);
        crema_gossip::Gossip::start(before).await.unwrap().shutdown().await;
        for life in 1..3 {
            let node = Node::start(config.clone()).await.unwrap();
            assert_eq!(generation(&node), fast + life);
            node.shutdown().await;
        }
    }
}

#[tokio::test]
async fn nothing_stays_behind_when_an_address_is_occupied() {
    let first = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let taken = first.local_addr().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut config = joining();
    (config.bind.gossip, config.bind.raft) = (Some(taken), free);
    let error = Node::start(config).await.unwrap_err();
    let text = format!("gossip_addr {taken} cannot be bound: the port is in use by another process");
    assert_eq!(error.to_string(), text, "as of any other address");
    assert!(matches!(&error, StartError::Bind { key: "gossip_addr", addr, .. } if *addr == taken), "{error}");
    std::net::TcpListener::bind(free).expect("the listeners are closed again");
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_is_named_with_its_key() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let within = file.path().join("below");
    for (path, why) in [(file.path(), "it is not a directory"), (within.as_path(), "it is not a directory")] {
        let path = Some(path.to_owned());
        let text = |key| format!("{key} {} cannot be used: {why}", path.as_deref().unwrap().display());
        let config = NodeConfig { data_dir: path.clone(), ..joining() };
        assert_eq!(Node::start(config).await.unwrap_err(), StartError::Invalid(text("data_dir")));
        let config = NodeConfig { state_dir: path.clone(), ..joining() };
        assert_eq!(Node::start(config).await.unwrap_err(), StartError::Invalid(text("state_dir")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_waits_for_what_its_tasks_are_doing() {
    let (begin, begun) = tokio::sync::oneshot::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel();
    let done = Arc::new(AtomicBool::new(false));
    let seen = done.clone();
    // Between two points at which it can be ended.
    let task = tokio::spawn(async move {
        let _ = begin.send(());
        let _ = may_go_on.recv();
        seen.store(true, Ordering::Relaxed);
    });
    begun.await.unwrap();
    let mut ending = Box::pin(end_all(vec![task, tokio::spawn(std::future::pending())]));
    let waits = std::future::poll_fn(|c| std::task::Poll::Ready(ending.as_mut().poll(c).is_pending())).await;
    assert!(waits);
    go_on.send(()).unwrap();
    ending.await;
    assert!(done.load(Ordering::Relaxed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_node_ends_its_driver() {
    let node = Node::start(joining()).await.unwrap();
    let driver = node.inner.watch.driver.clone();
    drop(node);
    let ended = async {
        while driver.is_running() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), ended).await.expect("the thread ends");
}
