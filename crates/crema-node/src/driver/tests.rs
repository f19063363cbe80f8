use super::*;
use crate::peers::{PeerOptions, Peers, PeersConfig, Reach};
use crema_core::{Epoch, KeyRef, Op, Reply, SetCond, SetExpire, Term, encode_ops};
use crema_shard::{HostConfig, NodeAddrs, NodeRoute, PersistBatch, Timing};
use std::collections::VecDeque;
use std::sync::MutexGuard;
use tokio::time::timeout;

/// Nothing here waits this long unless it is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// A host that notes what it is told and adds what the test has scripted.
#[derive(Default)]
struct Script {
    calls: Vec<String>,
    /// Added by one poll each.
    polls: VecDeque<Effects>,
    /// Added by the polls that follow a call of this name.
    after: Vec<(&'static str, Effects)>,
    tick_every: Option<Duration>,
    next_tick: MonoTime,
    /// Adds something at each poll, for ever.
    restless: bool,
    panic_at: Option<&'static str>,
    /// Calls that were given a clock older than their own input.
    stale_clocks: usize,
    /// Hints still to be put into the channel, each while the one before is processed.
    hints_left: usize,
    inputs: Option<Sender<Input>>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

impl Fake {
    fn lock(&self) -> MutexGuard<'_, Script> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
    fn call(&self, name: &'static str, detail: String) {
        let mut s = self.lock();
        s.calls.push(if detail.is_empty() { name.to_owned() } else { format!("{name} {detail}") });
        if let Some(at) = s.after.iter().position(|(n, _)| *n == name) {
            let (_, effects) = s.after.remove(at);
            s.polls.push_back(effects);
        }
        assert!(s.panic_at != Some(name), "scripted");
    }
    fn calls(&self) -> Vec<String> {
        self.lock().calls.iter().filter(|c| *c != "poll").cloned().collect()
    }
}

impl Engine for Fake {
    fn submit(&mut self, _: Now, r: ClientRequest) {
        let mut effects = Effects::default();
        effects.completions.push(done(r.conn.0, r.token.0));
        self.lock().polls.push_back(effects);
        self.call("submit", format!("{} {}", r.conn.0, r.token.0));
    }
    fn connection_closed(&mut self, conn: ConnId) {
        self.call("closed", conn.0.to_string());
    }
    fn peer_up(&mut self, _: Now, peer: NodeId, life: Incarnation) {
        self.call("up", format!("{peer} {}", life.0));
    }
    fn peer_down(&mut self, _: Now, peer: NodeId) {
        self.call("down", peer.to_string());
    }
    fn frame(&mut self, _: Now, _: NodeId, _: Incarnation, _: Channel, frame: Bytes) -> Result<(), CodecError> {
        self.call("frame", String::from_utf8_lossy(&frame).into_owned());
        if frame == b"bad"[..] { Err(CodecError::Malformed) } else { Ok(()) }
    }
    fn send_dropped(&mut self, _: Now, peer: NodeId, channel: Channel) {
        self.call("dropped", format!("{peer} {channel:?}"));
    }
    fn leader_hint(&mut self, now: Now, hint: LeaderHint) {
        // Such a hint carries the time at which it was put into the channel.
        let mut s = self.lock();
        s.stale_clocks += usize::from(now.mono.0 < hint.term.0);
        if s.hints_left > 0 {
            s.hints_left -= 1;
            s.inputs.as_ref().unwrap().send(stamped_hint()).unwrap();
        }
    }
    fn node_gone(&mut self, _: Now, node: NodeId) {
        self.call("gone", node.to_string());
    }
    fn drain(&mut self, _: Now) {
        self.call("drain", String::new());
    }
    fn set_memory_share(&mut self, _: Now, share: u8) {
        self.call("share", share.to_string());
    }
    fn recover(&mut self, _: Now, request: RecoverRequest) {
        self.call("recover", format!("{request:?}"));
    }
    fn change_voters(&mut self, _: Now, request: VoterRequest) {
        self.call("change_voters", format!("{request:?}"));
    }
    fn needed_by(&self) -> Vec<ShardId> {
        vec![ShardId(7)]
    }
    fn tick(&mut self, now: Now) {
        self.call("tick", String::new());
        let mut s = self.lock();
        s.next_tick = s.tick_every.map_or(MonoTime(u64::MAX), |t| now.mono.after(t));
    }
    fn next_tick(&self) -> MonoTime {
        self.lock().next_tick
    }
    fn persisted(&mut self, _: Now, number: u64) {
        self.call("persisted", number.to_string());
    }
    fn state_written(&mut self, _: ShardId, _: ReplicaId, file: u64, seq: u32) {
        self.call("state", format!("{file} {seq}"));
    }
    fn ask_checkpoint(&mut self, replica: ReplicaId) {
        self.call("checkpoint", replica.to_string());
    }
    fn poll(&mut self, _: Now, effects: &mut Effects) {
        assert!(effects.is_empty(), "what an earlier poll added was not performed");
        self.call("poll", String::new());
        let mut s = self.lock();
        if let Some(next) = s.polls.pop_front() {
            *effects = next;
        }
        if s.restless {
            effects.completions.push(done(0, 0));
        }
    }
    fn status(&self) -> HostStatus {
        HostStatus { epoch: Epoch(5), ..HostStatus::default() }
    }
}

#[derive(Clone, Default)]
struct FakePeers(Arc<Mutex<Vec<String>>>);

impl PeerControl for FakePeers {
    fn set_fenced(&self, node: NodeId, incarnations: &[Incarnation]) {
        self.0.lock().unwrap().push(format!("fence {node} {}", incarnations.len()));
    }
    fn distrust(&self, peer: NodeId, life: Incarnation, channel: Channel) {
        self.0.lock().unwrap().push(format!("distrust {peer} {} {channel:?}", life.0));
    }
}

fn done(conn: u64, token: u64) -> Completion {
    Completion { conn: ConnId(conn), token: Token(token), result: ClientResult::Reply(Reply::Ok) }
}

fn stamped_hint() -> Input {
    let stamp = Term(clock::mono().0);
    Input::LeaderHints(vec![LeaderHint { shard: ShardId(0), leader: NodeId(1), term: stamp }])
}

fn request(conn: u64, token: u64) -> ClientRequest {
    ClientRequest {
        conn: ConnId(conn),
        token: Token(token),
        shard: ShardId(0),
        write: true,
        level: crema_shard::ReadLevel::Linearizable,
        ops: Bytes::new(),
        deadline: MonoTime(u64::MAX),
    }
}

struct Rig {
    fake: Fake,
    peers: FakePeers,
    handle: DriverHandle,
    outputs: DriverOutputs,
}

impl Rig {
    /// Starts the loop on `script` with `inputs` waiting, so that they make one round.
    fn start(script: Script, inputs: Vec<Input>) -> Rig {
        Rig::start_hooked(script, inputs, None)
    }

    fn start_hooked(mut script: Script, inputs: Vec<Input>, hook: Option<ViewHook>) -> Rig {
        if script.tick_every.is_none() {
            script.next_tick = MonoTime(u64::MAX);
        }
        let (fake, peers) = (Fake(Arc::new(Mutex::new(script))), FakePeers::default());
        let channel = input_channel();
        for input in inputs {
            channel.0.send(input).unwrap();
        }
        let started = Driver::start_engine(fake.clone(), Arc::default(), Box::new(peers.clone()), channel, None, hook);
        let (handle, outputs) = started.unwrap();
        Rig { fake, peers, handle, outputs }
    }

    /// Waits until the round that took all earlier inputs has ended.
    async fn settle(&self) {
        let rounds = || self.handle.stats().rounds.load(Ordering::Relaxed);
        let all = async {
            // Answered while inputs are taken, before the round's effects are performed ...
            assert_eq!(self.handle.status().await.unwrap().epoch, Epoch(5));
            let before = rounds();
            // ... so that round has ended when one more is counted; asking again makes sure that there is one.
            while rounds() == before {
                self.handle.status().await.unwrap();
            }
        };
        timeout(PATIENCE, all).await.expect("a round in time");
    }
}

fn batch(number: u64) -> PersistBatch {
    PersistBatch { number, writes: Vec::new() }
}

fn effects(change: impl FnOnce(&mut Effects)) -> Effects {
    let mut effects = Effects::default();
    change(&mut effects);
    effects
}

fn send(to: u64, channel: Channel, body: &'static str) -> crema_shard::Send {
    crema_shard::Send { to: NodeId(to), channel, frame: Bytes::from_static(body.as_bytes()) }
}

fn up(peer: u64, options: &PeerOptions) -> (Input, PeerLink) {
    let link = PeerLink::detached(NodeId(peer), Incarnation(70), options);
    let event = PeerEvent::Up { peer: NodeId(peer), incarnation: Incarnation(70), link: link.clone() };
    (Input::Peers(vec![event].into()), link)
}

#[tokio::test]
async fn a_round_wakes_each_connection_once_and_keeps_its_order() {
    let outboxes = [Arc::new(Outbox::default()), Arc::new(Outbox::default())];
    let open = |i: usize| Input::Client(ClientInput::Open(ConnId(i as u64), outboxes[i].clone()));
    let requests = (0..60).map(|t| request(t % 2, t)).collect();
    // Connection 9 was never opened: its requests never reach the host.
    let stray = Input::Client(ClientInput::Requests(vec![request(9, 1)]));
    let mut rig =
        Rig::start(Script::default(), vec![open(0), open(1), Input::Client(ClientInput::Requests(requests)), stray]);
    for (i, outbox) in outboxes.iter().enumerate() {
        timeout(PATIENCE, outbox.ready()).await.unwrap();
        let mut got = Vec::new();
        assert!(outbox.take(&mut got));
        // All thirty with the first wake-up, though each came from a poll of its own.
        let tokens: Vec<u64> = got.iter().map(|(t, _)| t.0).collect();
        assert_eq!(tokens, (0..30).map(|t| 2 * t + i as u64).collect::<Vec<_>>());
    }
    assert_eq!(rig.handle.stats().orphans.load(Ordering::Relaxed), 1);
    assert!(!rig.fake.calls().iter().any(|c| c.starts_with("submit 9")));
    // A closed connection: the host is told once, and what still comes is dropped.
    rig.fake.lock().after.push(("closed", effects(|e| e.completions.push(done(1, 99)))));
    for _ in 0..2 {
        rig.handle.send(Input::Client(ClientInput::Close(ConnId(1)))).await.unwrap();
    }
    rig.settle().await;
    assert!(!outboxes[1].take(&mut Vec::new()));
    assert_eq!(rig.fake.calls().iter().filter(|c| *c == "closed 1").count(), 1);
    assert_eq!(rig.handle.stats().orphans.load(Ordering::Relaxed), 2);
    assert_eq!(rig.handle.stats().connections.load(Ordering::Relaxed), 1);
    rig.handle.stop().await;
    assert!(!rig.handle.is_running());
    assert_eq!(rig.outputs.events.recv().await, None);
    assert_eq!(rig.outputs.led.recv().await.map(|l| l.len()), None);
}

#[tokio::test]
async fn batches_are_persisted_in_order_and_what_follows_is_polled() {
    let (up, link) = up(2, &PeerOptions::default());
    let mut script = Script::default();
    script.polls.push_back(effects(|e| {
        e.persist.extend([batch(1), batch(2)]);
    }));
    script.after.push(("up", Effects::default()));
    script.after.push(("gone", effects(|e| e.persist.push(batch(3)))));
    let rig = Rig::start(script, vec![up]);
    rig.settle().await;
    assert_eq!(rig.fake.calls(), ["persisted 1", "persisted 2", "up 2 70"]);
    // What depends on batch 3 leaves in the same round, in order, and wakes the writer.
    rig.fake.lock().after.push((
        "persisted",
        effects(|e| {
            e.sends.extend([
                send(2, Channel::Raft, "a"),
                send(2, Channel::Raft, "b"),
                send(2, Channel::Requests, "c"),
                send(2, Channel::Snapshot, "d"),
            ]);
        }),
    ));
    rig.handle.send(Input::NodeGone(NodeId(4))).await.unwrap();
    rig.settle().await;
    assert!(Channel::ALL.into_iter().all(|channel| link.flushed(channel)));
    assert_eq!(link.take_queued(Channel::Raft), [&b"a"[..], b"b"]);
    assert_eq!(link.take_queued(Channel::Requests), [&b"c"[..]]);
    assert_eq!(link.take_queued(Channel::Snapshot), [&b"d"[..]]);
    assert_eq!(rig.fake.calls()[3..], ["gone 4", "persisted 3"]);
}

#[tokio::test]
async fn dropped_frames_are_told_once_and_nothing_follows_them() {
    let tight = PeerOptions { queue_frames: 2, ..PeerOptions::default() };
    let (up, link) = up(2, &tight);
    let rig = Rig::start(Script::default(), vec![up]);
    let burst = effects(|e| {
        e.sends.extend(["a", "b", "c", "d"].map(|b| send(2, Channel::Requests, b)));
        e.sends.push(send(2, Channel::Raft, "beat"));
        // Nobody has told of a link to node 3.
        e.sends.push(send(3, Channel::Raft, "lost"));
    });
    rig.fake.lock().after.push(("gone", burst));
    rig.handle.send(Input::NodeGone(NodeId(4))).await.unwrap();
    rig.settle().await;
    assert_eq!(link.take_queued(Channel::Requests), [&b"a"[..], b"b"]);
    assert_eq!(link.take_queued(Channel::Raft), [&b"beat"[..]]);
    let calls = rig.fake.calls();
    assert_eq!(calls.iter().filter(|c| *c == "dropped 2 Requests").count(), 1, "{calls:?}");
    assert_eq!(calls.iter().filter(|c| *c == "dropped 3 Raft").count(), 1, "{calls:?}");
    assert!(!calls.contains(&"dropped 2 Raft".to_owned()));
    assert_eq!(rig.handle.stats().send_drops.load(Ordering::Relaxed), 3);
    // After Down, the link is not used any more, even if the host sends before it knows.
    rig.handle.send(Input::Peers(vec![PeerEvent::Down { peer: NodeId(2) }].into())).await.unwrap();
    rig.fake.lock().after.push(("drain", effects(|e| e.sends.push(send(2, Channel::Raft, "late")))));
    rig.handle.drain().await.unwrap();
    rig.settle().await;
    assert!(link.take_queued(Channel::Raft).is_empty());
    assert_eq!(rig.fake.calls().last().map(String::as_str), Some("dropped 2 Raft"));
}

#[test]
fn a_drop_holds_back_the_rest_of_its_round() {
    let tight = PeerOptions { queue_frames: 2, ..PeerOptions::default() };
    let (_, link) = up(2, &tight);
    let (events, _receiver) = mpsc::channel(1);
    let mut looper = Loop {
        engine: Fake::default(),
        peers: Box::new(FakePeers::default()),
        inputs: input_channel().1,
        storage: None,
        garbage: Garbage::start().unwrap(),
        view: Arc::default(),
        on_view: None,
        stats: Arc::default(),
        events,
        waiting_events: Vec::new(),
        led: Arc::default(),
        conns: HashMap::new(),
        touched: Vec::new(),
        links: HashMap::from([(NodeId(2), Link { link: link.clone(), unflushed: Default::default() })]),
        dropped: Vec::new(),
        effects: Effects::default(),
        log: LogLimit::default(),
        recoveries: HashMap::new(),
        voter_changes: HashMap::new(),
        last_mark: 0,
        stopping: false,
    };
    for body in ["a", "b", "c"] {
        looper.send(send(2, Channel::Requests, body));
    }
    assert_eq!(link.take_queued(Channel::Requests), [&b"a"[..], b"b"]);
    // There is room again, but the host does not know yet that "c" is missing.
    looper.send(send(2, Channel::Requests, "d"));
    looper.send(send(2, Channel::Raft, "beat"));
    assert!(link.take_queued(Channel::Requests).is_empty());
    looper.flush();
    assert_eq!(looper.engine.calls(), ["dropped 2 Requests"]);
    looper.send(send(2, Channel::Requests, "c again"));
    assert_eq!(link.take_queued(Channel::Requests), [&b"c again"[..]]);
    assert_eq!(link.take_queued(Channel::Raft), [&b"beat"[..]]);
}

#[tokio::test]
async fn the_clock_is_read_after_the_input_was_taken() {
    let rig = Rig::start(Script { hints_left: 10_000, ..Script::default() }, Vec::new());
    rig.fake.lock().inputs = Some(rig.handle.inputs().clone());
    // Each hint brings the next one in while it is processed: in the midst of a round, after the round's beginning.
    rig.handle.send(stamped_hint()).await.unwrap();
    let all = async {
        while rig.fake.lock().hints_left > 0 {
            rig.settle().await;
        }
    };
    timeout(PATIENCE, all).await.expect("all hints in time");
    rig.settle().await;
    assert_eq!(rig.fake.lock().stale_clocks, 0);
    let stats = rig.handle.stats();
    let (rounds, inputs) = (stats.rounds.load(Ordering::Relaxed), stats.inputs.load(Ordering::Relaxed));
    assert!(inputs > 10_000 && rounds < inputs, "{rounds} rounds for {inputs} inputs");
    // The sender in the script would keep the channel open.
    rig.fake.lock().inputs = None;
}

#[tokio::test]
async fn ticks_come_in_time_and_idleness_does_not_spin() {
    let tick = Duration::from_millis(5);
    let rig = Rig::start(Script { tick_every: Some(tick), ..Script::default() }, Vec::new());
    let began = clock::mono();
    let all = async {
        while rig.fake.lock().calls.iter().filter(|c| *c == "tick").count() < 20 {
            tokio::time::sleep(tick).await;
        }
    };
    timeout(PATIENCE, all).await.expect("ticks without any input");
    let ticks = rig.fake.lock().calls.iter().filter(|c| *c == "tick").count() as u64;
    let rounds = rig.handle.stats().rounds.load(Ordering::Relaxed);
    assert!(clock::mono().since(began) >= tick * 19);
    // A wake-up may come a little before the tick is due and then makes an empty round.
    assert!(rounds <= 2 * ticks + 4, "{rounds} rounds for {ticks} ticks");
}

#[tokio::test]
async fn a_restless_host_does_not_lock_the_others_out() {
    let rig = Rig::start(Script { restless: true, ..Script::default() }, Vec::new());
    rig.settle().await;
    assert!(rig.handle.stats().long_polls.load(Ordering::Relaxed) > 0);
    timeout(PATIENCE, rig.handle.stop()).await.expect("it stops");
}

#[tokio::test]
async fn a_panic_is_told_and_closes_the_doors() {
    let mut rig = Rig::start(Script { panic_at: Some("drain"), ..Script::default() }, Vec::new());
    let client = rig.handle.client();
    assert!(client.open().await.is_ok());
    rig.handle.drain().await.unwrap();
    assert_eq!(timeout(PATIENCE, rig.outputs.events.recv()).await.unwrap(), Some(NodeEvent::DriverDied));
    // The message comes after the channel was closed.
    assert_eq!(client.open().await.err(), Some(Stopped));
    assert_eq!(rig.handle.status().await.err(), Some(Stopped));
    assert!(timeout(PATIENCE, rig.outputs.led.recv()).await.unwrap().is_none());
    rig.handle.stop().await;
    assert!(!rig.handle.is_running());
}

#[tokio::test]
async fn stop_ends_the_thread_and_wakes_who_waits() {
    let mut rig = Rig::start(Script::default(), Vec::new());
    let (_, outbox) = rig.handle.client().open().await.unwrap();
    timeout(PATIENCE, rig.handle.stop()).await.expect("it stops");
    timeout(PATIENCE, outbox.ready()).await.expect("woken, with nothing");
    assert!(!outbox.take(&mut Vec::new()));
    assert_eq!(rig.handle.needed_by().await.err(), Some(Stopped));
    assert_eq!(rig.outputs.events.recv().await, None);
    rig.handle.stop().await;
}

#[tokio::test]
async fn a_bad_frame_closes_its_stream_only() {
    let frame = |body: &'static str| PeerEvent::Frame {
        peer: NodeId(2),
        incarnation: Incarnation(70),
        channel: Channel::Requests,
        frame: Bytes::from_static(body.as_bytes()),
    };
    let rig = Rig::start(Script::default(), vec![Input::Peers(vec![frame("good"), frame("bad")].into())]);
    rig.settle().await;
    assert_eq!(*rig.peers.0.lock().unwrap(), ["distrust 2 70 Requests"]);
    assert_eq!(rig.fake.calls(), ["frame good", "frame bad"]);
    assert_eq!(rig.handle.stats().bad_frames.load(Ordering::Relaxed), 1);
    assert_eq!(rig.handle.needed_by().await.unwrap(), [ShardId(7)]);
}

#[tokio::test]
async fn a_new_view_is_seen_before_the_results_of_its_round() {
    let route = NodeRoute {
        incarnation: Incarnation(3),
        fenced: vec![Incarnation(1), Incarnation(2)],
        addrs: NodeAddrs::default(),
        live: true,
        draining: false,
        approved: true,
    };
    let view = RoutingView { epoch: Epoch(9), nodes: [(NodeId(2), route)].into(), ..RoutingView::default() };
    let mut script = Script::default();
    script.after.push(("submit", effects(|e| e.view = Some(Arc::new(view)))));
    let (hooked, hook_saw) = std::sync::mpsc::channel();
    let hook: ViewHook = Box::new(move |v| hooked.send(v.epoch).unwrap());
    let rig = Rig::start_hooked(script, Vec::new(), Some(hook));
    let client = rig.handle.client();
    let (conn, outbox) = client.open().await.unwrap();
    client.submit(vec![request(conn.0, 1)]).await.unwrap();
    timeout(PATIENCE, outbox.ready()).await.unwrap();
    assert_eq!(client.view().epoch, Epoch(9));
    assert_eq!(rig.handle.view().epoch, Epoch(9));
    assert_eq!(hook_saw.try_recv(), Ok(Epoch(9)));
    assert_eq!(*rig.peers.0.lock().unwrap(), ["fence 2 2"]);
}

#[tokio::test]
async fn events_wait_for_a_slow_node_without_being_lost() {
    // More than the channel holds, at once.
    let notes: Vec<u128> = (0..EVENT_QUEUE as u128 + 20).collect();
    let mut script = Script { tick_every: Some(Duration::from_millis(5)), ..Script::default() };
    script.polls.push_back(effects(|e| {
        e.notes.extend(notes.iter().map(|n| Note::IdInUse { by: Incarnation(*n) }));
        // A repetition of one that waits is not kept twice.
        e.notes.push(Note::IdInUse { by: Incarnation(EVENT_QUEUE as u128 + 5) });
        e.notes.push(Note::Fenced { by: Incarnation(1) });
    }));
    let fenced = PeerEvent::Fenced { by: NodeId(3) };
    let mut rig = Rig::start(script, vec![Input::Peers(vec![fenced].into())]);
    // Nobody receives before all of them have been told.
    rig.settle().await;
    for n in notes {
        let event = timeout(PATIENCE, rig.outputs.events.recv()).await.unwrap();
        assert_eq!(event, Some(NodeEvent::IdInUse { by: Incarnation(n) }));
    }
    let expected = [(Some(Incarnation(1)), None), (None, Some(NodeId(3)))];
    for (by, told_by) in expected {
        let event = timeout(PATIENCE, rig.outputs.events.recv()).await.unwrap();
        assert_eq!(event, Some(NodeEvent::Fenced { by, told_by }));
    }
}

#[tokio::test]
async fn leaderships_that_were_not_received_are_replaced_by_later_ones() {
    let led = |shard, term| LedShard { shard: ShardId(shard), term: Term(term), epoch: Epoch(1) };
    let feed = Arc::new(LedFeed::default());
    let mut receiver = LedReceiver { feed: feed.clone() };
    feed.publish(&mut vec![led(4, 1), led(2, 1)]);
    feed.publish(&mut vec![led(4, 3)]);
    feed.publish(&mut Vec::new());
    assert_eq!(receiver.recv().await, Some(vec![led(2, 1), led(4, 3)]));
    let late = tokio::spawn(async move {
        let first = receiver.recv().await;
        (first, receiver.recv().await, receiver.recv().await)
    });
    feed.publish(&mut vec![led(1, 1)]);
    // The end does not swallow what came before it.
    let feed = tokio::task::spawn_blocking(move || {
        while !feed.waiting.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        feed.publish(&mut vec![led(1, 2)]);
        feed.end();
    });
    let (first, second, end) = timeout(PATIENCE, late).await.unwrap().unwrap();
    feed.await.unwrap();
    assert_eq!((first, second, end), (Some(vec![led(1, 1)]), Some(vec![led(1, 2)]), None));
}

/// A node of the real kind: host, peers and driver.
struct Real {
    peers: PeersHandle,
    handle: DriverHandle,
    outputs: DriverOutputs,
}

fn real(node: u64, members: &[u64]) -> Real {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let channel = input_channel();
    let incarnation = Incarnation(u128::from(getrandom::u64().unwrap()));
    let config = PeersConfig {
        cluster: "driver test".to_owned(),
        node: NodeId(node),
        incarnation,
        keys: None,
        boot: 0,
        addr: "127.0.0.1:1".to_owned(),
        options: PeerOptions::default(),
    };
    let raft = listener.local_addr().unwrap().to_string();
    let peers = Peers::start(config, listener, channel.0.clone()).unwrap();
    let host = HostConfig {
        node: NodeId(node),
        incarnation,
        cluster: "driver test".to_owned(),
        initial_members: members.iter().map(|m| NodeId(*m)).collect(),
        shards: 4,
        replication: 3,
        addrs: NodeAddrs { raft, ..NodeAddrs::default() },
        entropy: [1, 2, 3],
        timing: Timing::default(),
        max_log_bytes: 64 << 20,
        read_mode: crema_shard::ReadMode::Lease,
        snapshot_chunk_bytes: 1024,
        process: 1,
        checkpoint_log_bytes: None,
        auto_voters: crema_shard::AutoVoters::default(),
        memory: crema_shard::MemoryOptions::default(),
        uuid: None,
        generation: 0,
    };
    let host = Host::new(host, clock::now());
    let (handle, outputs) = Driver::start(host, peers.clone(), channel, None, None).unwrap();
    Real { peers, handle, outputs }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_found_a_cluster_and_answer() {
    let mut nodes = [1, 2, 3].map(|n| real(n, &[1, 2, 3]));
    for (i, one) in nodes.iter().enumerate() {
        for (j, other) in nodes.iter().enumerate().filter(|(j, _)| *j != i) {
            one.peers.set_reach(NodeId(j as u64 + 1), Reach::at(other.peers.local_addr().to_string()));
        }
    }
    let mut uuids = Vec::new();
    for node in &mut nodes {
        match timeout(PATIENCE, node.outputs.events.recv()).await.expect("founded in time") {
            Some(NodeEvent::Joined { uuid, founded: true, .. }) => uuids.push(uuid),
            other => panic!("{other:?}"),
        }
    }
    assert!(uuids.iter().all(|u| *u == uuids[0]));
    // Through every node: written by one, read by the next.
    for (i, node) in nodes.iter().enumerate() {
        let key = KeyRef::new(0, b"key").unwrap();
        let value = [i as u8];
        let ops = [
            Op::Set { key, value: &value, cond: SetCond::Always, expire: SetExpire::Clear, get: false },
            Op::Get { key },
        ];
        for (at, op, expected) in
            [(i, ops[0], Reply::Ok), ((i + 1) % 3, ops[1], Reply::Bulk(Bytes::copy_from_slice(&value)))]
        {
            let client = nodes[at].handle.client();
            let (conn, outbox) = client.open().await.unwrap();
            let shard = client.view().shard_of(key.slot).expect("placement is known");
            client
                .submit(vec![ClientRequest {
                    conn,
                    token: Token(1),
                    shard,
                    write: at == i,
                    level: crema_shard::ReadLevel::Linearizable,
                    ops: encode_ops(&[op]).unwrap(),
                    deadline: clock::mono().after(PATIENCE),
                }])
                .await
                .unwrap();
            let mut got = Vec::new();
            while !outbox.take(&mut got) {
                timeout(PATIENCE, outbox.ready()).await.expect("a result in time");
            }
            assert_eq!(got, [(Token(1), ClientResult::Reply(expected))], "node {at}");
            client.close(conn).await;
        }
        assert!(node.handle.stats().bad_frames.load(Ordering::Relaxed) == 0);
    }
    for node in &nodes {
        node.handle.stop().await;
        node.peers.shutdown().await;
    }
}
