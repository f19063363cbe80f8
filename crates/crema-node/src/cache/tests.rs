use super::*;
use crate::client::ClientInput;
use crate::driver::Input;
use crate::memberlist::{GossipTuning, MemberlistConfig, MemberlistEvent, PeerManagementConfig};
use arc_swap::ArcSwap;
use crema_core::store::{Edit, TableWriter};
use crema_core::{LogTime, Published, SlotRange, Term};
use crema_shard::{RoutingView, ShardRoute};
use std::collections::HashMap;

type Handle = std::thread::JoinHandle<usize>;

fn view(shards: u16) -> RoutingView {
    let size = crema_core::SLOT_COUNT / shards.max(1);
    let route = |i: u16| ShardRoute {
        range: SlotRange { start: i * size, end: (i + 1) * size },
        leader: None,
        term: Term(1),
        published: None,
        own_term: Term(1),
        replicas: vec![],
        down: None,
    };
    RoutingView { shards: (0..shards).map(route).collect(), ..RoutingView::default() }
}

/// A driver that answers each request with what `answer` says (nothing for `None`), in reverse order within a batch.
/// Returns how many batches it took.
fn fake_driver(
    view: Arc<ArcSwap<RoutingView>>,
    mut answer: impl FnMut(&ClientRequest) -> Option<ClientResult> + Send + 'static,
) -> (Client, Handle) {
    let (inputs, outputs) = crossbeam::channel::bounded(64);
    let handle = std::thread::spawn(move || {
        let mut conns: HashMap<ConnId, Arc<Outbox>> = HashMap::new();
        let mut batches = 0;
        while let Ok(input) = outputs.recv() {
            match input {
                Input::Client(ClientInput::Open(conn, outbox)) => drop(conns.insert(conn, outbox)),
                Input::Client(ClientInput::Close(conn)) => drop(conns.remove(&conn)),
                Input::Client(ClientInput::Requests(requests)) => {
                    batches += 1;
                    let conn = requests[0].conn;
                    let results: Vec<_> = requests.iter().rev().filter_map(|r| Some((r.token, answer(r)?))).collect();
                    conns[&conn].deliver(results);
                }
                #[allow(unreachable_patterns, reason = "the fake is only told what clients tell")]
                _ => {}
            }
        }
        batches
    });
    (Client::new(inputs, view), handle)
}

fn echo(request: &ClientRequest) -> Option<ClientResult> {
    Some(ClientResult::Reply(Reply::Bulk(request.ops.clone())))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_callers_get_their_own_answers() {
    let (client, driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view(16))), echo);
    let cache = CacheClient::open(client, Duration::from_secs(30)).await.unwrap();
    let mut callers = tokio::task::JoinSet::new();
    for i in 0..4_000u32 {
        let cache = cache.clone();
        callers.spawn(async move {
            for round in 0..5u32 {
                let body = Bytes::from(format!("{i}-{round}"));
                let reply = cache.execute_encoded(Slot((i % 16_384) as u16), true, body.clone()).await;
                assert_eq!(reply, Ok(Reply::Bulk(body)));
            }
        });
    }
    while let Some(end) = callers.join_next().await {
        end.unwrap();
    }
    assert!(cache.shared.lanes.iter().all(|l| l.lock().waiting.len == 0), "nobody is left waiting");
    assert_eq!(cache.shared.budget.available_permits(), BUDGET_UNITS);
    drop(cache);
    // The lanes close their connections, then the last client goes, then the driver ends.
    let batches = tokio::task::spawn_blocking(move || driver.join().unwrap()).await.unwrap();
    assert!(batches <= 20_000);
}

#[tokio::test]
async fn results_become_errors_that_say_what_to_do() {
    let (client, _driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view(1))), |r| {
        Some(match &r.ops[..] {
            b"unknown" => ClientResult::Unknown,
            b"leader" => ClientResult::NotApplied(Refusal::NoLeader(r.shard)),
            b"stop" => ClientResult::NotApplied(Refusal::ShuttingDown),
            _ => ClientResult::Reply(Reply::Error(OpError::NotInteger)),
        })
    });
    let cache = CacheClient::open(client, Duration::from_secs(5)).await.unwrap();
    let run = |ops: &'static [u8]| cache.execute_encoded(Slot(0), true, Bytes::from_static(ops));
    assert_eq!(run(b"unknown").await, Err(CacheError::OutcomeUnknown));
    let read = cache.execute_encoded(Slot(0), false, Bytes::from_static(b"unknown")).await;
    assert_eq!(read, Err(CacheError::NotApplied { reason: READ_LOST.to_owned() }), "a read leaves no doubt behind");
    assert!(matches!(run(b"leader").await, Err(CacheError::NotApplied { reason }) if reason.contains("shard 0")));
    assert_eq!(run(b"stop").await, Err(CacheError::Stopped));
    assert_eq!(run(b"").await, Ok(Reply::Error(OpError::NotInteger)));
}

/// A view of one shard whose replica is here: published, and its table, which holds k = v.
fn with_replica() -> (RoutingView, Arc<Published>, TableWriter) {
    let mut view = view(1);
    let mut table = TableWriter::new(view.shards[0].range, 1);
    let published = Arc::new(Published::new(table.table().clone(), LogTime(1)));
    let k = KeyRef::new(0, b"k").unwrap();
    table.edit(k, |_| ((), Edit::Put { value: b"v", expire_at: 0 }));
    view.shards[0].published = Some(published.clone());
    (view, published, table)
}

#[tokio::test]
async fn reads_are_answered_here_as_far_as_their_level_allows() {
    let (view, published, _table) = with_replica();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    let (client, _driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view)), move |r| {
        seen.lock().unwrap().push((r.write, r.level));
        Some(ClientResult::Reply(Reply::Bulk("driver".into())))
    });
    let cache = CacheClient::open(client, Duration::from_secs(30)).await.unwrap();
    let key = KeyRef::new(0, b"k").unwrap();
    let (here, driver) = (Ok(Reply::Bulk("v".into())), Ok(Reply::Bulk("driver".into())));
    let age = ReadLevel::Bounded(Duration::from_secs(600));
    let get = |level| cache.read(Op::Get { key }, level);
    // Neither leader nor known to be fresh.
    assert_eq!(get(ReadLevel::Linearizable).await, driver);
    assert_eq!(get(age).await, driver);
    assert_eq!(get(ReadLevel::Local).await, here);
    published.set_fresh(crate::clock::mono());
    assert_eq!(get(ReadLevel::Linearizable).await, driver);
    assert_eq!(get(age).await, here);
    published.set_fresh(MonoTime(1));
    published.cell().open(1, 1, u64::MAX);
    assert_eq!(get(ReadLevel::Linearizable).await, here);
    assert_eq!(get(ReadLevel::Bounded(Duration::ZERO)).await, here, "under the lease");
    assert_eq!(cache.read(Op::Exists { key }, ReadLevel::Linearizable).await, Ok(Reply::Int(1)));
    // What no cell answers.
    assert_eq!(cache.read(Op::Pttl { key }, ReadLevel::Linearizable).await, driver);
    published.retire();
    assert_eq!(get(ReadLevel::Local).await, driver);
    let levels = [ReadLevel::Linearizable, age, ReadLevel::Linearizable, ReadLevel::Linearizable, ReadLevel::Local];
    assert_eq!(*asked.lock().unwrap(), levels.map(|level| (false, level)));
    // A table that is still there is no cache that has stopped.
    cache.close();
    published.cell().open(2, 1, u64::MAX);
    assert_eq!(get(ReadLevel::Local).await, Err(CacheError::Stopped));
    assert_eq!(get(ReadLevel::Linearizable).await, Err(CacheError::Stopped));
}

#[tokio::test]
async fn a_caller_that_only_reads_here_lets_others_run() {
    let (view, published, _table) = with_replica();
    published.cell().open(1, 1, u64::MAX);
    let (client, _driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view)), |_| None);
    let cache = CacheClient::open(client, Duration::from_secs(30)).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let other = tokio::spawn({
        let done = done.clone();
        async move { done.store(true, Ordering::Release) }
    });
    let key = KeyRef::new(0, b"k").unwrap();
    // One thread: without a pause in between this loop would never end.
    while !done.load(Ordering::Acquire) {
        cache.read(Op::Get { key }, ReadLevel::Linearizable).await.unwrap();
    }
    other.await.unwrap();
}

#[tokio::test]
async fn a_moved_slot_is_asked_for_again_with_the_new_view() {
    let shared_view = Arc::new(ArcSwap::from_pointee(view(1)));
    let in_driver = shared_view.clone();
    let (client, _driver) = fake_driver(shared_view, move |r| {
        if in_driver.load().shards.len() == 1 {
            in_driver.store(Arc::new(view(2)));
            return Some(ClientResult::NotApplied(Refusal::WrongShard));
        }
        Some(ClientResult::Reply(Reply::Int(i64::from(r.shard.0))))
    });
    let cache = CacheClient::open(client, Duration::from_secs(30)).await.unwrap();
    assert_eq!(cache.execute_encoded(Slot(16_000), true, Bytes::new()).await, Ok(Reply::Int(1)));
}

#[tokio::test]
async fn without_a_placement_requests_wait_until_their_deadline() {
    let empty = RoutingView { not_ready: Some("founding".into()), ..RoutingView::default() };
    let shared_view = Arc::new(ArcSwap::from_pointee(empty));
    let (client, _driver) = fake_driver(shared_view.clone(), echo);
    let impatient = CacheClient::open(client.clone(), Duration::from_millis(50)).await.unwrap();
    let error = impatient.execute_encoded(Slot(0), false, Bytes::new()).await.unwrap_err();
    assert_eq!(error, CacheError::NotApplied { reason: "founding".into() });
    let patient = CacheClient::open(client, Duration::from_secs(30)).await.unwrap();
    let asked = patient.execute_encoded(Slot(0), false, Bytes::new());
    // `join` polls in this order, so the request finds no placement at first.
    let placed = async { shared_view.store(Arc::new(view(1))) };
    assert_eq!(tokio::join!(asked, placed).0, Ok(Reply::Bulk(Bytes::new())));
}

#[tokio::test]
async fn when_the_node_stops_writes_in_flight_are_unknown_and_reads_are_not_done() {
    let (client, _driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view(1))), |_| None);
    let cache = CacheClient::open(client, Duration::from_secs(60)).await.unwrap();
    let write = cache.execute_encoded(Slot(0), true, Bytes::new());
    let read = cache.execute_encoded(Slot(0), false, Bytes::new());
    let stop = async {
        while cache.shared.lanes.iter().map(|l| l.lock().waiting.len).sum::<usize>() < 2 {
            tokio::task::yield_now().await;
        }
        cache.close();
    };
    let (write, read, ()) = tokio::join!(write, read, stop);
    assert_eq!((write, read), (Err(CacheError::OutcomeUnknown), Err(CacheError::Stopped)));
    assert_eq!(cache.execute_encoded(Slot(0), true, Bytes::new()).await, Err(CacheError::Stopped));
}

/// Nothing hands answers to their callers any more then, whichever runtime these wait in.
#[test]
fn nobody_waits_for_a_runtime_that_has_gone() {
    let (client, _driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view(1))), |_| None);
    // It runs only while it opens the client: what is queued stays there.
    let made_in = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let cache = made_in.block_on(CacheClient::open(client, Duration::from_secs(600))).unwrap();
    let used_in = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    used_in.block_on(async {
        let execute = |write| {
            let cache = cache.clone();
            async move { cache.execute_encoded(Slot(0), write, Bytes::new()).await }
        };
        let mut ends = tokio::task::JoinSet::new();
        // Every lane has two reads and two writes with the driver, and one write more in its queue.
        for i in 0..LANES * (DIRECT + 1) {
            ends.spawn(execute(i >= LANES * DIRECT / 2));
        }
        let in_flight = || cache.shared.lanes.iter().map(|l| l.lock().waiting.len).sum::<usize>();
        while in_flight() < LANES * (DIRECT + 1) {
            tokio::task::yield_now().await;
        }
        tokio::task::spawn_blocking(move || drop(made_in)).await.unwrap();
        let all = tokio::time::timeout(Duration::from_secs(30), ends.join_all()).await.expect("they end");
        let of = |error: CacheError| all.iter().filter(|end| **end == Err(error.clone())).count();
        assert_eq!(of(CacheError::Stopped), LANES * (DIRECT / 2 + 1), "reads, and what the driver never got");
        assert_eq!(of(CacheError::OutcomeUnknown), LANES * DIRECT / 2);
        for write in [true, false] {
            assert_eq!(execute(write).await, Err(CacheError::Stopped));
        }
    });
}

#[test]
fn a_cache_is_of_no_use_after_its_runtime_and_can_be_shut_down_in_another() {
    let made_in = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let gossip = MemberlistConfig { enabled: true, ..MemberlistConfig::default() };
    let config = CacheConfig::new(1, addr("127.0.0.1:0"));
    let config = config.with_cluster_discovery(discovery(1, addr("127.0.0.1:0"), gossip));
    let (cache, mut events) = made_in.block_on(async {
        let cache = DistributedCache::new(config).await.unwrap();
        cache.wait_until_ready(Duration::from_secs(30)).await.unwrap();
        cache.put("k", "v").await.unwrap();
        let events = cache.memberlist_events().await;
        (cache, events)
    });
    drop(made_in);
    let used_in = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let used = async {
        assert_eq!(cache.put("k", "w").await, Err(CacheError::Stopped));
        assert_eq!(cache.get("k").await, Err(CacheError::Stopped));
        assert_eq!(cache.wait_until_ready(Duration::from_secs(30)).await, Err(CacheError::Stopped));
        while events.recv().await.is_some() {}
        cache.shutdown().await.unwrap();
    };
    used_in.block_on(async { tokio::time::timeout(Duration::from_secs(30), used).await.expect("nothing hangs") });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_begun_finishes_before_the_client_ends() {
    let (go_on, may_go_on) = std::sync::mpsc::channel();
    let (client, _driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view(1))), move |r| {
        may_go_on.recv().ok()?;
        echo(r)
    });
    let cache = CacheClient::open(client, Duration::from_secs(600)).await.unwrap();
    let execute = |write| cache.execute_encoded(Slot(0), write, Bytes::new());
    let mut write = Box::pin(execute(true));
    let mut finish = Box::pin(cache.finish(Duration::from_secs(600)));
    std::future::poll_fn(|context| {
        assert!(write.as_mut().poll(context).is_pending());
        assert!(finish.as_mut().poll(context).is_pending(), "there is a write in flight");
        std::task::Poll::Ready(())
    })
    .await;
    for write in [true, false] {
        assert_eq!(execute(write).await, Err(CacheError::Stopped));
    }
    go_on.send(()).unwrap();
    let (written, ()) = tokio::time::timeout(Duration::from_secs(30), async { tokio::join!(write, finish) })
        .await
        .expect("one end brings the other");
    assert_eq!(written, Ok(Reply::Bulk(Bytes::new())));
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_unknown() {
    let (client, _driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view(1))), |_| None);
    let cache = CacheClient::open(client, Duration::from_secs(600)).await.unwrap();
    let write = cache.execute_encoded(Slot(0), true, Bytes::new());
    let both = async { tokio::join!(write, cache.finish(Duration::from_millis(1))) };
    let (written, ()) = tokio::time::timeout(Duration::from_secs(30), both).await.expect("the wait is bounded");
    assert_eq!(written, Err(CacheError::OutcomeUnknown));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_fails_no_write_that_has_begun() {
    let nodes = three_nodes().await;
    for node in &nodes {
        node.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    }
    let written = Arc::new(AtomicUsize::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..200 {
        let (node, written) = (nodes[0].clone(), written.clone());
        writers.spawn(async move {
            loop {
                match node.put(format!("key {writer}"), "v").await {
                    Ok(()) => _ = written.fetch_add(1, Ordering::Relaxed),
                    Err(error) => return error,
                }
            }
        });
    }
    while written.load(Ordering::Relaxed) < 1000 {
        tokio::task::yield_now().await;
    }
    nodes[0].shutdown().await.unwrap();
    let ends = tokio::time::timeout(Duration::from_secs(30), writers.join_all()).await.expect("they end");
    assert!(ends.iter().all(|end| *end == CacheError::Stopped), "{ends:?}");
    assert_eq!(nodes[0].add_peer(2).await, Err(CacheError::Stopped));
    assert_eq!(nodes[0].remove_peer(2).await, Err(CacheError::Stopped));
}

#[tokio::test]
async fn a_cancelled_shutdown_stops_the_node_all_the_same() {
    let cache = DistributedCache::new(CacheConfig::new(1, addr("127.0.0.1:0"))).await.unwrap();
    let mut events = cache.memberlist_events().await;
    let mut shutdown = Box::pin(cache.shutdown());
    std::future::poll_fn(|context| {
        assert!(shutdown.as_mut().poll(context).is_pending());
        std::task::Poll::Ready(())
    })
    .await;
    drop(shutdown);
    let ended = tokio::time::timeout(Duration::from_secs(30), events.recv()).await;
    assert_eq!(ended.expect("it stops"), None);
    cache.shutdown().await.unwrap();
    assert_eq!(cache.put("k", "v").await, Err(CacheError::Stopped));
}

#[tokio::test]
async fn what_is_in_flight_is_bounded_even_when_callers_lose_patience() {
    let (client, _driver) = fake_driver(Arc::new(ArcSwap::from_pointee(view(1))), |_| None);
    let cache = CacheClient::open(client, Duration::from_millis(200)).await.unwrap();
    // Four requests of a quarter of the budget; their callers go away.
    let quarter = Bytes::from(vec![0; (BUDGET_UNITS / 4 - 1) * 1024]);
    for _ in 0..4 {
        let call = cache.execute_encoded(Slot(0), true, quarter.clone());
        assert!(tokio::time::timeout(Duration::from_millis(1), call).await.is_err());
    }
    assert_eq!(cache.shared.budget.available_permits(), 0);
    let error = cache.execute_encoded(Slot(0), false, Bytes::new()).await.unwrap_err();
    assert!(matches!(error, CacheError::NotApplied { .. }), "a full budget is a definite no: {error}");
}

#[test]
fn a_late_answer_never_reaches_the_next_user_of_a_place() {
    let budget = Arc::new(Semaphore::new(8));
    let mut slab = Slab::default();
    let insert = |slab: &mut Slab, deadline| {
        let (answer, answered) = oneshot::channel();
        let permit = budget.clone().try_acquire_owned().unwrap();
        (slab.insert(Waiting { answer, deadline: MonoTime(deadline), _permit: permit }), answered)
    };
    let (first, mut first_answer) = insert(&mut slab, 0);
    let (kept, _kept_answer) = insert(&mut slab, u64::MAX);
    slab.drop_overdue(MonoTime(OVERDUE.as_nanos() as u64));
    assert!(slab.remove(kept).is_some(), "not overdue");
    slab.drop_overdue(MonoTime(OVERDUE.as_nanos() as u64 + 1));
    assert_eq!(first_answer.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    let (second, _second_answer) = insert(&mut slab, 0);
    let (third, _third_answer) = insert(&mut slab, 0);
    assert!(first != second && first != third);
    assert!(slab.remove(first).is_none());
    assert!(slab.remove(second).is_some() && slab.remove(second).is_none());
    assert_eq!(slab.len, 1);
}

/// Free ports. Others may take them before we do, which is why the test below tries again.
fn free_addrs<const N: usize>() -> [SocketAddr; N] {
    let held = [(); N].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    held.each_ref().map(|listener| listener.local_addr().unwrap())
}

async fn three_nodes() -> Vec<DistributedCache> {
    three_nodes_with(|_, config| config).await
}

/// Three nodes that know each other by their configuration alone, which `change` may change further.
async fn three_nodes_with(change: impl Fn(u64, CacheConfig) -> CacheConfig) -> Vec<DistributedCache> {
    nodes_with::<3>(change).await.0
}

/// As many nodes that know each other likewise, and their addresses.
async fn nodes_with<const N: usize>(
    change: impl Fn(u64, CacheConfig) -> CacheConfig,
) -> (Vec<DistributedCache>, Vec<(u64, SocketAddr)>) {
    'again: loop {
        let addrs = free_addrs::<N>();
        let all: Vec<_> = (1..).zip(addrs).collect();
        let mut nodes = Vec::new();
        for (id, addr) in &all {
            let config = CacheConfig::new(*id, *addr).with_seed_nodes(all.clone()).with_stop_grace(Duration::ZERO);
            match DistributedCache::new(change(*id, config)).await {
                Ok(node) => nodes.push(node),
                Err(CacheError::Start(StartError::Bind { .. })) => continue 'again,
                Err(error) => panic!("{error}"),
            }
        }
        return (nodes, all);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_embedded_nodes_are_one_cache() {
    let nodes = three_nodes().await;
    for node in &nodes {
        node.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    }
    let [a, b, c] = &nodes[..] else { panic!("three") };
    for i in 0..64 {
        let key = format!("key {i}");
        assert_eq!(a.get(&key).await, Ok(None));
        a.put(key.clone(), format!("value {i}")).await.unwrap();
        assert_eq!(b.get(&key).await, Ok(Some(format!("value {i}").into())));
        // Three replicas: each node has one of each shard, and a round to the leader makes it fresh.
        let level = if i % 2 == 0 { ReadLevel::Bounded(Duration::ZERO) } else { ReadLevel::Linearizable };
        assert_eq!(c.get_with(&key, level).await, Ok(Some(format!("value {i}").into())), "{level:?}");
        assert_eq!((a.contains(&key).await, a.contains("no such key").await), (Ok(true), Ok(false)));
        assert_eq!(c.delete(&key).await, Ok(true));
        assert_eq!((b.delete(&key).await, a.get(&key).await), (Ok(false), Ok(None)));
    }
    // Every node hears of everything in the end, and none asks another for it.
    a.put("local", "v").await.unwrap();
    for node in &nodes {
        let heard = async {
            while node.get_with("local", ReadLevel::Local).await != Ok(Some("v".into())) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), heard).await.expect("replicas follow");
    }
    let long = vec![0; limits::MAX_KEY_BYTES + 1];
    assert!(matches!(a.get(&long).await, Err(CacheError::Invalid(_))));
    assert!(matches!(a.put("k", vec![0; limits::MAX_VALUE_BYTES + 1]).await, Err(CacheError::Invalid(_))));
    a.shutdown().await.unwrap();
    for level in [ReadLevel::Linearizable, ReadLevel::Bounded(Duration::from_secs(600)), ReadLevel::Local] {
        assert_eq!(a.get_with("local", level).await, Err(CacheError::Stopped));
    }
    // The others go on: a majority is left.
    b.put("k", "v").await.unwrap();
    assert_eq!(c.get("k").await, Ok(Some("v".into())));
}

/// There are more nodes than replicas, and nothing is asked of the cluster: who leads is known all the same. A node that
/// joins is known to nobody before it calls.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_gossip_all_leaders_are_known_and_a_further_node_joins() {
    let (mut nodes, addrs) = nodes_with::<4>(|_, config| config).await;
    let is_complete = async |node: &DistributedCache| {
        node.wait_until_ready(Duration::from_secs(30)).await.unwrap();
        let coordinator = node.multiraft_coordinator().unwrap();
        assert_eq!(coordinator.shard_leader_tracker().all_leaders().len(), 16);
    };
    for node in &nodes {
        is_complete(node).await;
    }
    let joined = loop {
        let config = CacheConfig::new(5, free_addrs::<1>()[0]).with_seed_nodes(addrs.clone()).with_join(true);
        match DistributedCache::new(config.with_stop_grace(Duration::ZERO)).await {
            Ok(node) => break node,
            Err(CacheError::Start(StartError::Bind { .. })) => {}
            Err(error) => panic!("{error}"),
        }
    };
    // It has just begun to call, which is waited for.
    let calls = async {
        while !nodes[0].inner.node.may_come(crema_core::NodeId(5)) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), calls).await.expect("it calls");
    nodes[0].add_peer(5).await.unwrap();
    is_complete(&joined).await;
    joined.put("k", "v").await.unwrap();
    assert_eq!(nodes[0].get("k").await, Ok(Some("v".into())));
    let counts = async {
        while joined.voters() != [1, 2, 3, 4, 5] {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), counts).await.expect("it hears of its approval");
    nodes.push(joined);
    for node in &nodes {
        is_complete(node).await;
    }
    for node in &nodes {
        node.shutdown().await.unwrap();
    }
}

/// The table on their disks says where they were, and without gossip nobody but the configuration knows better.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_know_each_other_by_configuration_may_all_move() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    for round in 0..2 {
        let on_disk = |id: u64, config: CacheConfig| config.with_data_dir(dirs[id as usize - 1].path());
        let nodes = three_nodes_with(on_disk).await;
        for node in &nodes {
            node.wait_until_ready(Duration::from_secs(30)).await.unwrap();
        }
        assert_eq!(nodes[round].get("k").await, Ok((round > 0).then(|| "v".into())));
        nodes[round].put("k", "v").await.unwrap();
        for node in &nodes {
            node.shutdown().await.unwrap();
        }
    }
}

#[test]
fn configurations_that_cannot_work_are_refused() {
    let addr = |s: &str| s.parse::<SocketAddr>().unwrap();
    let base = || CacheConfig::new(1, addr("127.0.0.1:9001"));
    let ok = base().with_seed_nodes(vec![(2, addr("127.0.0.1:9002")), (1, addr("127.0.0.1:9001"))]).resolve().unwrap();
    assert_eq!(ok.initial_members, [crema_core::NodeId(1), crema_core::NodeId(2)]);
    assert_eq!(ok.static_peers.len(), 1);
    assert_eq!(ok.reads, ReadMode::Lease);
    assert_eq!(base().with_reads(ReadMode::ReadIndex).resolve().unwrap().reads, ReadMode::ReadIndex);
    assert_eq!(
        ok.bind,
        BindAddrs { raft: addr("127.0.0.1:9001"), gossip: None, redis: None, redis_cluster: None, http: None }
    );
    for bytes in [0, 16 << 20, 1 << 50] {
        assert_eq!(base().with_max_memory(bytes).resolve().unwrap().memory.max_memory, bytes);
    }
    // Ports that the system chooses are not the same.
    let any = addr("127.0.0.1:0");
    CacheConfig::new(1, any).with_redis_addr(any).with_http_addr(any).resolve().unwrap();
    for (config, word) in [
        (CacheConfig::new(0, addr("127.0.0.1:1")), "begin at 1"),
        (base().with_seed_nodes(vec![(1, addr("127.0.0.1:9002"))]), "not its address"),
        (base().with_seed_nodes(vec![(2, addr("127.0.0.1:1")), (2, addr("127.0.0.1:2"))]), "twice"),
        (base().with_seed_nodes(vec![(2, addr("127.0.0.1:0"))]), "no address"),
        (base().with_seed_nodes(vec![(2, addr("127.0.0.1:9001"))]), "this node's own"),
        (base().with_seed_nodes(vec![(2, addr("127.0.0.1:1")), (3, addr("127.0.0.1:1"))]), "of seed node 2 and of"),
        (base().with_max_memory(1), "max_memory"),
        (base().with_max_memory((16 << 20) - 1), "max_memory"),
        (base().with_max_memory(u64::MAX), "max_memory"),
        (base().with_redis_addr(addr("127.0.0.1:9001")), "raft_addr and redis_addr are both"),
        (base().with_http_addr(addr("0.0.0.0:9001")).with_requirepass("p"), "share a port"),
        (base().with_shards(0), "shards"),
        (base().with_replicas(8), "replicas"),
        (base().with_request_deadline(Duration::ZERO), "deadline"),
        (base().with_cluster_name("a b"), "cluster"),
        (CacheConfig::new(1, addr("10.0.0.1:9001")), "with_insecure"),
        (CacheConfig::new(1, addr("10.0.0.1:9001")).with_requirepass("p"), "with_cluster_keys"),
        (base().with_cluster_keys(keys(&[1])).with_redis_addr(addr("10.0.0.1:6379")), "with_requirepass"),
        (base().with_redis_cluster_addr(addr("10.0.0.1:7379")), "with_requirepass"),
        (base().with_http_addr(addr("0.0.0.0:8080")), "with_requirepass"),
        (base().with_requirepass(""), "password"),
        (base().with_requirepass("two\nlines"), "password"),
        (base().with_requirepass("x".repeat(513)), "password"),
        (CacheConfig::new(1, addr("0.0.0.0:9001")).with_insecure(true), "connect to"),
    ] {
        let error = config.resolve().unwrap_err();
        assert!(matches!(&error, CacheError::Invalid(text) if text.contains(word)), "{word}: {error}");
    }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A ring of keys by their numbers; the first is in use.
fn keys(numbers: &[u8]) -> KeyRing {
    let key = |n: u8| crate::ClusterKey::new([n; 32]);
    let mut ring = KeyRing::new(key(numbers[0]));
    numbers[1..].iter().for_each(|n| ring.install(key(*n)).unwrap());
    ring
}

#[test]
fn a_lock_for_each_door_opens_the_node_to_the_network() {
    let config = CacheConfig::new(1, addr("10.0.0.1:9001"))
        .with_cluster_keys(keys(&[1]))
        .with_requirepass("s3cret")
        .with_redis_addr(addr("10.0.0.1:6379"))
        .with_redis_cluster_addr(addr("10.0.0.1:7379"))
        .with_http_addr(addr("10.0.0.1:8080"));
    assert!(!format!("{config:?}").contains("s3cret"), "nobody reads it in a log");
    let node = config.resolve().unwrap();
    assert!(node.requirepass.unwrap().is(b"s3cret") && node.cluster_keys.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_password_locks_redis_and_http() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let any = addr("127.0.0.1:0");
    let config = CacheConfig::new(1, any).with_redis_addr(any).with_http_addr(any).with_requirepass("s3cret");
    let cache = DistributedCache::new(config).await.unwrap();
    let at = |name: &str| cache.inner.node.addresses().iter().find(|(key, _)| *key == name).unwrap().1;
    let say = async |to: SocketAddr, text: &str| {
        let mut stream = tokio::net::TcpStream::connect(to).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(30), read).await.expect("an end").unwrap();
        answer
    };
    let (redis, http) = (at("redis_addr"), at("http_addr"));
    assert!(say(redis, "PING\r\nQUIT\r\n").await.starts_with("-NOAUTH"));
    assert!(say(redis, "AUTH wrong\r\nQUIT\r\n").await.starts_with("-WRONGPASS"));
    assert!(say(redis, "AUTH s3cret\r\nPING\r\nQUIT\r\n").await.starts_with("+OK\r\n+PONG\r\n"));
    let get = |bearer: &str| format!("GET /v1/status HTTP/1.1\r\nHost: x\r\n{bearer}\r\n");
    assert!(say(http, &get("")).await.starts_with("HTTP/1.1 401"));
    assert!(say(http, &get("Authorization: Bearer s3cret\r\n")).await.starts_with("HTTP/1.1 200"));
    cache.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_changed_while_a_node_runs() {
    let gossips = || MemberlistConfig { enabled: true, bind_addr: Some(addr("127.0.0.1:0")), ..Default::default() };
    let config = CacheConfig::new(1, addr("127.0.0.1:0")).with_cluster_keys(keys(&[1]));
    let config = config.with_cluster_discovery(discovery(1, addr("127.0.0.1:0"), gossips()));
    let first = DistributedCache::new(config).await.unwrap();
    first.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    for ring in [&[1, 2][..], &[2, 1], &[2]] {
        first.set_cluster_keys(keys(ring)).unwrap();
    }
    // One that never had the first key finds it by gossip, and is let in by its connections.
    let seed = first.memberlist_members().await[0].gossip_addr.unwrap();
    let config = CacheConfig::new(2, addr("127.0.0.1:0")).with_cluster_keys(keys(&[2])).with_join(true);
    let found = discovery(2, addr("127.0.0.1:0"), gossips().with_seeds(vec![seed.into()]));
    let second = DistributedCache::new(config.with_cluster_discovery(found)).await.unwrap();
    second.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    second.put("k", "v").await.unwrap();
    assert_eq!(first.get("k").await, Ok(Some("v".into())));

    let open = DistributedCache::new(CacheConfig::new(1, addr("127.0.0.1:0"))).await.unwrap();
    assert!(matches!(open.set_cluster_keys(keys(&[1])), Err(CacheError::Invalid(_))));
}

#[test]
fn outside_a_runtime_the_error_says_what_to_do() {
    let start = std::pin::pin!(DistributedCache::new(CacheConfig::new(1, addr("127.0.0.1:0"))));
    let polled = start.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
    let std::task::Poll::Ready(Err(error)) = polled else { panic!("it does not start") };
    assert_eq!(error, CacheError::Start(StartError::NoRuntime));
    assert!(error.to_string().contains("#[tokio::main]"), "{error}");
}

/// Embedded nodes have no HTTP where the second process could ask whom the others are connected to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_under_an_id_says_so_and_ends_and_the_registered_one_goes_on() {
    let gossiping = |node_id, config: CacheConfig| {
        let tuning = GossipTuning { interval: Duration::from_millis(50), ..GossipTuning::default() };
        let memberlist = MemberlistConfig { enabled: true, tuning, ..MemberlistConfig::default() };
        let discovery = MemberlistDiscovery::new(node_id, config.raft_addr, &memberlist, &[]);
        config.with_cluster_discovery(discovery)
    };
    let nodes = three_nodes_with(gossiping).await;
    for node in &nodes {
        node.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    }
    let registered = nodes[1].inner.node.members().into_iter().find(|m| m.node_id == 2).expect("itself").incarnation;
    let others: Vec<_> = [0, 2].map(|i: usize| nodes[i].memberlist_metadata()).map(|m| (m.node_id, m.raft_addr)).into();
    let rival = loop {
        let [addr] = free_addrs();
        let config = CacheConfig::new(2, addr).with_seed_nodes(others.clone()).with_stop_grace(Duration::ZERO);
        match DistributedCache::new(gossiping(2, config)).await {
            Ok(node) => break node,
            Err(CacheError::Start(StartError::Bind { .. })) => {}
            Err(error) => panic!("{error}"),
        }
    };
    let sentence = format!("node id 2 is in use by another living process (life {registered})");
    let told = async {
        loop {
            match rival.wait_until_ready(Duration::from_millis(20)).await {
                Err(CacheError::NotReady { reason }) if reason.contains(&sentence) => return,
                Err(CacheError::NotReady { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), told).await.expect("it says why it is not ready");
    assert_eq!(rival.failure(), None, "it is patient");
    let failure = tokio::time::timeout(Duration::from_secs(60), rival.inner.node.failed()).await.expect("it ends");
    assert!(failure.reason.contains(&sentence) && failure.is_configuration, "{failure}");
    for node in &nodes {
        assert_eq!((node.failure(), node.inner.node.not_ready()), (None, None));
    }
    nodes[1].put("k", "v").await.unwrap();
    assert_eq!(nodes[0].get("k").await, Ok(Some("v".into())));
}

fn discovery(node_id: NodeId, raft_addr: SocketAddr, config: MemberlistConfig) -> MemberlistDiscovery {
    MemberlistDiscovery::new(node_id, raft_addr, &config, &[])
}

#[test]
fn discovery_becomes_the_nodes_gossip() {
    let raft = addr("127.0.0.1:9001");
    let config = MemberlistConfig { enabled: true, ..MemberlistConfig::default() }
        .with_metadata("rack", "r1")
        .with_node_name("first")
        .with_tuning(GossipTuning { dead_ticks: 5, ..GossipTuning::default() });
    let seeds = vec![(2, addr("127.0.0.1:9002"))];
    let known = [(2, addr("127.0.0.1:9002")), (4, addr("127.0.0.1:9004"))];
    let node = CacheConfig::new(1, raft)
        .with_seed_nodes(seeds.clone())
        .with_metadata("zone", "a")
        .with_cluster_discovery(MemberlistDiscovery::new(1, raft, &config, &known))
        .resolve()
        .unwrap();
    assert_eq!(node.bind.gossip, Some(addr("127.0.0.1:8001")));
    assert_eq!(node.seeds, crema_gossip::SeedAddr::parse_all(["127.0.0.1:8002", "127.0.0.1:8004"]).unwrap());
    assert_eq!(node.initial_members, [crema_core::NodeId(1), crema_core::NodeId(2)], "4 is known, and no founder");
    assert_eq!(node.static_peers.len(), 2);
    assert_eq!(node.gossip.tuning.dead_ticks, 5);
    let metadata: Vec<_> = node.metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(metadata, [("name", "first"), ("rack", "r1"), ("zone", "a")]);

    let off = MemberlistConfig::default();
    let node = CacheConfig::new(1, raft).with_seed_nodes(seeds.clone()).with_cluster_discovery(discovery(1, raft, off));
    let node = node.resolve().unwrap();
    assert_eq!((node.bind.gossip, node.seeds.len(), node.static_peers.len()), (None, 0, 1), "as without discovery");

    let joining = CacheConfig::new(4, raft).with_seed_nodes(seeds).with_join(true).resolve().unwrap();
    assert_eq!(joining.initial_members, [crema_core::NodeId(2)]);

    // Behind NAT: all interfaces here, one address there.
    let everywhere = addr("0.0.0.0:9000");
    let nat = MemberlistConfig::new(addr("0.0.0.0:8000")).with_advertise_addr(addr("203.0.113.10:8000"));
    let node = CacheConfig::new(1, everywhere)
        .with_insecure(true)
        .with_seed_nodes(vec![(1, addr("203.0.113.10:9000")), (2, addr("203.0.113.11:9000"))])
        .with_cluster_discovery(discovery(1, everywhere, nat))
        .resolve()
        .unwrap();
    assert_eq!(
        (node.gossip.advertise, node.advertise_host.as_deref()),
        (Some(addr("203.0.113.10:8000")), Some("203.0.113.10"))
    );
    assert_eq!(node.seeds, crema_gossip::SeedAddr::parse_all(["203.0.113.11:8000"]).unwrap());
}

#[test]
fn discoveries_that_cannot_work_are_refused() {
    let raft = addr("127.0.0.1:9001");
    let enabled = || MemberlistConfig { enabled: true, ..MemberlistConfig::default() };
    let with = |config| CacheConfig::new(1, raft).with_cluster_discovery(discovery(1, raft, config));
    let slow = GossipTuning { interval: Duration::from_secs(60), ..GossipTuning::default() };
    let two = [(2, addr("127.0.0.1:9002")), (3, addr("127.0.0.1:9002"))];
    let shared = MemberlistDiscovery::new(1, raft, &enabled(), &two);
    let never =
        PeerManagementConfig { auto_add_peers: false, auto_add_voters: true, ..PeerManagementConfig::default() };
    let elsewhere = MemberlistDiscovery::new(1, raft, &enabled(), &[(2, addr("127.0.0.1:9003"))]);
    for (config, word) in [
        (CacheConfig::new(1, raft).with_cluster_discovery(discovery(2, raft, enabled())), "node 2"),
        (with(MemberlistConfig::new(addr("10.0.0.1:8001"))), "with_insecure"),
        (with(enabled().with_tuning(slow)), "interval"),
        (with(enabled().with_metadata("zone", "\n")), "zone"),
        (CacheConfig::new(1, raft).with_metadata("zöne", "a"), "zöne"),
        (with(enabled().with_metadata("zone", "a")).with_metadata("zone", "b"), "zone"),
        (with(enabled().with_seeds(vec![addr("[::1]:8001").into()])), "family"),
        (
            with(enabled()).with_seed_nodes(vec![(2, addr("127.0.0.1:9002"))]).with_cluster_discovery(elsewhere),
            "another address",
        ),
        (with(enabled()).with_cluster_discovery(shared), "of seed node 2 and of"),
        (
            CacheConfig::new(1, addr("0.0.0.0:9001"))
                .with_seed_nodes(vec![(2, addr("203.0.113.10:9001")), (1, addr("203.0.113.10:9001"))]),
            "of seed node 2 and of seed node 1",
        ),
        (with(enabled().with_peer_management(never)), "auto_add_voters needs auto_add_peers"),
        (with(MemberlistConfig::new(raft)), "gossip_addr and raft_addr are both"),
        (CacheConfig::new(1, raft).with_join(true), "to join"),
        (with(enabled()).with_join(true), "to join"),
    ] {
        let error = config.resolve().unwrap_err();
        assert!(matches!(&error, CacheError::Invalid(text) if text.contains(word)), "{word}: {error}");
    }
}

#[test]
fn shards_are_what_was_said_last() {
    let base = || CacheConfig::new(1, addr("127.0.0.1:9001"));
    let multiraft = |enabled, num_shards| MultiRaftCacheConfig { enabled, num_shards, ..Default::default() };
    for (config, shards) in [
        (base(), 16),
        (base().with_multiraft_config(multiraft(true, 4)), 4),
        (base().with_multiraft_config(multiraft(false, 4)), 1),
        (base().with_multiraft_config(multiraft(true, 4)).with_shards(8), 8),
    ] {
        let node = config.resolve().unwrap();
        assert_eq!((node.shards, node.replicas), (shards, 3));
    }
    assert!(base().with_multiraft_config(multiraft(true, 0)).resolve().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_expire_are_counted_and_compared() {
    let config = CacheConfig::new(1, addr("127.0.0.1:0"))
        .with_multiraft_config(MultiRaftCacheConfig { enabled: false, ..Default::default() });
    let cache = DistributedCache::new(config).await.unwrap();
    cache.wait_until_ready(Duration::from_secs(30)).await.unwrap();

    cache.put_with_ttl("short", "v", Duration::from_nanos(1)).await.unwrap();
    let gone = async {
        while cache.get("short").await.unwrap().is_some() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("it expires");
    cache.put_with_ttl("long", "v", Duration::from_secs(3600)).await.unwrap();
    assert_eq!(cache.get("long").await, Ok(Some("v".into())));
    for ttl in [Duration::ZERO, Duration::MAX, Duration::from_millis(u64::MAX)] {
        assert!(matches!(cache.put_with_ttl("k", "v", ttl).await, Err(CacheError::Invalid(_))), "{ttl:?}");
    }

    assert_eq!(cache.increment("n", 5).await, Ok(5));
    assert_eq!(cache.increment("n", -7).await, Ok(-2));
    assert_eq!(cache.get("n").await, Ok(Some("-2".into())));
    assert!(matches!(cache.increment("n", i64::MIN).await, Err(CacheError::Invalid(_))));
    assert!(matches!(cache.increment("long", 1).await, Err(CacheError::Invalid(_))));

    assert_eq!(cache.compare_and_set("c", Some(b"a"), "b").await, Ok(false));
    assert_eq!(cache.compare_and_set("c", None, "a").await, Ok(true));
    assert_eq!(cache.compare_and_set("c", None, "b").await, Ok(false));
    assert_eq!(cache.compare_and_set("c", Some(b"a"), "b").await, Ok(true));
    let held = cache.get("c").await.unwrap();
    assert_eq!(cache.compare_and_set("c", held.as_deref(), "c").await, Ok(true), "what was read is what is compared");
    let long = vec![0; limits::MAX_VALUE_BYTES + 1];
    assert!(matches!(cache.compare_and_set("c", None, &long).await, Err(CacheError::Invalid(_))));
    assert!(matches!(cache.compare_and_set("c", Some(&long), "v").await, Err(CacheError::Invalid(_))));
    let longest = &long[1..];
    for (key, expected, word) in
        [("c".to_owned(), &long[..], "value may have"), ("c".repeat(1000), longest, "operation")]
    {
        let error = cache.compare_and_set(key, Some(expected), longest).await.unwrap_err();
        assert!(
            matches!(&error, CacheError::Invalid(text) if text.contains(word) && text.contains("bytes")),
            "{error}"
        );
    }
    let error = cache.put_with_ttl("k", "v", Duration::from_millis(u64::MAX)).await.unwrap_err();
    assert!(error.to_string().contains("use put"), "{error}");

    // Of many who compare and set, one wins each round.
    let mut racers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let cache = cache.clone();
        racers.spawn(async move {
            for _ in 0..20 {
                loop {
                    let held = cache.get("race").await.unwrap();
                    let next =
                        held.as_deref().map_or(0, |v| std::str::from_utf8(v).unwrap().parse::<u32>().unwrap()) + 1;
                    if cache.compare_and_set("race", held.as_deref(), next.to_string()).await.unwrap() {
                        break;
                    }
                }
            }
        });
    }
    while let Some(end) = racers.join_next().await {
        end.unwrap();
    }
    assert_eq!(cache.get("race").await, Ok(Some("160".into())));

    // Without gossip, and with one shard.
    assert!(!cache.memberlist_enabled() && cache.multiraft_coordinator().is_none());
    let mut events = cache.memberlist_events().await;
    assert_eq!(events.try_recv(), None);
    cache.shutdown().await.unwrap();
    assert_eq!(events.recv().await, None, "the end of the node is the end of its events");
    assert_eq!(cache.memberlist_events().await.recv().await, None);
    assert_eq!(cache.increment("n", 1).await, Err(CacheError::Stopped));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_gossip_members_are_those_of_the_table() {
    let nodes = three_nodes().await;
    let members = nodes[0].memberlist_members().await;
    assert_eq!(members[0].node_id, 1, "a node knows itself before it knows anybody");
    for node in &nodes {
        node.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    }
    let everybody = async {
        while nodes[0].memberlist_healthy_members().await.len() < 3 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), everybody).await.expect("all are connected");
    let members = nodes[0].memberlist_members().await;
    assert!(members.iter().all(|m| m.voter && m.connected && m.gossip_addr.is_none()), "{members:?}");

    let coordinator = nodes[0].multiraft_coordinator().expect("many shards");
    let tracker = coordinator.shard_leader_tracker();
    assert_eq!((coordinator.num_shards(), tracker.all_leaders().len()), (16, 16));
    for (shard, leader) in tracker.all_leaders() {
        assert_eq!(tracker.get_leader(shard), Some(leader));
    }
    assert_eq!((tracker.get_leader(16), tracker.get_leader(ShardId::MAX)), (None, None));
    let shard = coordinator.shard_of("k").expect("the table is known");
    assert!(shard < 16);
}

/// Programs hand these to tasks of their own.
#[test]
fn what_programs_await_may_be_sent_to_other_threads() {
    fn sent<T: Send>(_: &T) {}
    fn all(cache: &DistributedCache, events: &mut EventReceiver) {
        sent(&cache.put("k", "v"));
        sent(&cache.put_with_ttl("k", "v", Duration::from_secs(1)));
        sent(&cache.increment("k", 1));
        sent(&cache.compare_and_set("k", None, "v"));
        sent(&cache.memberlist_members());
        sent(&cache.memberlist_healthy_members());
        sent(&cache.memberlist_events());
        sent(&events.recv());
        sent(&cache.multiraft_coordinator().map(|coordinator| coordinator.shard_leader_tracker()));
        sent(&cache.shutdown());
    }
    let _: fn(&DistributedCache, &mut EventReceiver) = all;
}

/// The driver and gossip end with the last clone, whatever of the API somebody keeps.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_kept_of_a_dropped_node_does_not_keep_it() {
    let raft = addr("127.0.0.1:0");
    let config = MemberlistConfig { enabled: true, ..MemberlistConfig::default() };
    let config = CacheConfig::new(1, raft).with_cluster_discovery(discovery(1, raft, config));
    let cache = DistributedCache::new(config).await.unwrap();
    assert!(cache.memberlist_enabled());
    let member = cache.memberlist_members().await.remove(0);
    let told = cache.memberlist_metadata();
    assert_eq!((told.node_id, told.raft_addr), (1, member.raft_addr));
    let gossip = member.gossip_addr.unwrap();
    let (mut events, coordinator) = (cache.memberlist_events().await, cache.multiraft_coordinator());
    let join = MemberlistEvent::NodeJoin { node_id: 1, raft_addr: member.raft_addr };
    assert_eq!(events.recv().await, Some(join));
    drop(cache);
    let ended = async {
        assert_eq!(events.recv().await, None);
        while std::net::UdpSocket::bind(gossip).is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), ended).await.expect("gossip ends");
    drop(coordinator);
}

/// Starts a node at an address that another has just left: that one closes it when its tasks have ended.
async fn start_again(config: CacheConfig) -> DistributedCache {
    let started = async {
        loop {
            match DistributedCache::new(config.clone()).await {
                Ok(node) => return node,
                Err(CacheError::Start(StartError::Bind { .. })) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), started).await.expect("the address becomes free")
}

/// Takes a node that was just dropped out. Until the cluster's own group has noticed, others are no majority that answers.
async fn remove_dropped(by: &DistributedCache, node: NodeId) {
    let removed = async {
        while let Err(error) = by.remove_peer(node).await {
            assert!(matches!(error, CacheError::NotApplied { .. }), "{error}");
        }
    };
    tokio::time::timeout(Duration::from_secs(30), removed).await.expect("it is removed");
}

/// The record of a node that was removed and comes back is there before it answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_comes_back_is_added_as_soon_as_it_answers() {
    let mut nodes = three_nodes().await;
    for node in &nodes {
        node.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    }
    let raft = nodes.pop().unwrap().memberlist_metadata().raft_addr;
    remove_dropped(&nodes[0], 3).await;
    let seeds: Vec<_> = (1..).zip(&nodes).map(|(id, node)| (id, node.memberlist_metadata().raft_addr)).collect();
    let refused = Arc::new(Notify::new());
    let adding = tokio::spawn({
        let (first, refused) = (nodes[0].clone(), refused.clone());
        async move {
            let mut add = Box::pin(first.add_peer(3));
            // Woken by the answer, and then by the timer until it asks again.
            let mut polled = 0;
            std::future::poll_fn(|context| {
                polled += 1;
                let poll = add.as_mut().poll(context);
                if polled == 3 || poll.is_ready() {
                    refused.notify_one();
                }
                poll
            })
            .await
        }
    });
    refused.notified().await;
    let config = CacheConfig::new(3, raft).with_seed_nodes(seeds).with_stop_grace(Duration::ZERO);
    let third = start_again(config).await;
    assert_eq!(adding.await.unwrap(), Ok(()));
    third.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    assert_eq!(nodes[0].voters(), [1, 2, 3]);
}

/// What a program does that takes every failed node out, and every one that it hears of in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn voters_may_follow_the_events_of_gossip() {
    let gossips = |id, config: CacheConfig| {
        let tuning = GossipTuning { interval: Duration::from_millis(50), ..GossipTuning::default() };
        let gossip = MemberlistConfig { enabled: true, tuning, ..MemberlistConfig::default() };
        let discovery = discovery(id, config.raft_addr, gossip);
        config.with_cluster_discovery(discovery)
    };
    let mut nodes = three_nodes_with(gossips).await;
    for node in &nodes {
        node.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    }
    let mut events = nodes[0].memberlist_events().await;
    let mut until = async |is: fn(&MemberlistEvent) -> bool| {
        let heard = async { while !is(&events.recv().await.expect("the node runs")) {} };
        tokio::time::timeout(Duration::from_secs(60), heard).await.expect("gossip notices");
    };
    let all: Vec<_> = (1..).zip(&nodes).map(|(id, node)| (id, node.memberlist_metadata().raft_addr)).collect();
    drop(nodes.pop());
    until(|event| matches!(event, MemberlistEvent::NodeFailed { node_id: 3 })).await;
    remove_dropped(&nodes[0], 3).await;
    // Nobody hears it: that may be different in a while, and is not waited for.
    let error = nodes[0].add_peer(3).await.unwrap_err();
    assert!(matches!(&error, CacheError::NotApplied { reason } if reason.contains("does not answer")), "{error}");
    let config = CacheConfig::new(3, all[2].1).with_seed_nodes(all).with_stop_grace(Duration::ZERO);
    let third = start_again(gossips(3, config)).await;
    until(|event| matches!(event, MemberlistEvent::NodeJoin { node_id: 3, .. })).await;
    assert_eq!(nodes[0].add_peer(3).await, Ok(()));
    third.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    // Whom nobody has heard of is not waited for either.
    for (node, word) in [(0, "begin at 1"), (9, "not known")] {
        for result in [nodes[0].add_peer(node).await, nodes[0].remove_peer(node).await] {
            assert!(matches!(&result, Err(CacheError::Invalid(text)) if text.contains(word)), "{result:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_memory_is_no_mistake_of_the_caller() {
    let config = CacheConfig::new(1, addr("127.0.0.1:0")).with_max_memory(16 << 20).with_eviction(None).with_shards(1);
    let cache = DistributedCache::new(config).await.unwrap();
    cache.wait_until_ready(Duration::from_secs(30)).await.unwrap();
    let filled = async {
        for i in 0..512 {
            if let Err(error) = cache.put(format!("{i}"), vec![1; 1 << 20]).await {
                return (i, error);
            }
        }
        panic!("there is no limit")
    };
    let (at, error) = tokio::time::timeout(Duration::from_secs(30), filled).await.expect("writes end");
    assert_eq!(error, CacheError::MemoryFull);
    // What it advises helps.
    assert!(error.to_string().contains("delete keys"));
    for i in 0..at {
        assert_eq!(cache.delete(format!("{i}")).await, Ok(true));
    }
    cache.put("k", vec![1; 1 << 20]).await.unwrap();
}

#[test]
fn errors_say_what_to_do_when_they_are_only_printed() {
    assert!(CacheError::OutcomeUnknown.to_string().contains("read before you retry"));
    assert!(CacheError::Stopped.to_string().contains("failure()"));
}
