//! What the tests of the front share: views, a planner, and a driver made of state machines.

use crate::client::{Client, ClientInput, Outbox};
use crate::clock;
use crate::config::Secret;
use crate::driver::{Input, input_channel};
use crate::resp::decode::OwnedArgs;
use crate::resp::inflight::InFlight;
use crate::resp::order::Unanswered;
use crate::resp::plan::{ClientState, Context, Plan, plan};
use crate::resp::server::{ClientInfo, FrontConfig, ListenerKind};
use arc_swap::ArcSwap;
use bytes::BytesMut;
use crema_core::{
    ClusterUuid, Epoch, Incarnation, LogIndex, LogTime, MonoTime, NodeId, Now, Op, OpsRef, Outcome, ReadResult,
    ReplicaId, Reply, Seq, SessionId, SessionTag, ShardId, ShardInit, SlotRange, StateMachine, Term, WallTime,
};
use crema_core::{EntryBuilder, encode_advance, encode_open_session};
use crema_shard::{ClientRequest, ClientResult, ConnId, NodeAddrs, NodeRoute, RoutingView, ShardRoute};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// A view of three nodes with a shard for each arc `(start, end)`; node `i` leads shard `i - 1`, modulo three. Node 1 is
/// this one.
pub(crate) fn view_of(arcs: &[(u16, u16)]) -> RoutingView {
    let nodes = (1..=3u64).map(|n| {
        let addrs = NodeAddrs {
            raft: format!("10.0.0.{n}:{}", 9000 + n),
            redis: Some(format!("10.0.0.{n}:{}", 6378 + n)),
            redis_cluster: Some(format!("10.0.0.{n}:{}", 7378 + n)),
            http: None,
            zone: None,
        };
        let route = NodeRoute {
            incarnation: Incarnation(n.into()),
            fenced: Vec::new(),
            addrs,
            live: true,
            draining: false,
            approved: true,
        };
        (NodeId(n), route)
    });
    let shards = arcs.iter().enumerate().map(|(i, (start, end))| {
        let leader = NodeId(i as u64 % 3 + 1);
        ShardRoute {
            range: SlotRange { start: *start, end: *end },
            leader: Some(leader),
            term: Term(5),
            published: None,
            own_term: Term(5),
            replicas: (1..=3).map(|n| (NodeId(n), ReplicaId::new(1, n as u32), crema_shard::Standing::Voter)).collect(),
            down: None,
        }
    });
    RoutingView {
        this: NodeId(1),
        uuid: Some(ClusterUuid(0x1234 << 112)),
        epoch: Epoch(7),
        shards: shards.collect(),
        nodes: BTreeMap::from_iter(nodes),
        meta_leader: Some(NodeId(1)),
        ..RoutingView::default()
    }
}

/// Three shards.
pub(crate) fn three_shards() -> RoutingView {
    view_of(&[(0, 5462), (5462, 10923), (10923, 16384)])
}

/// What `f` appends.
pub(crate) fn written(f: impl FnOnce(&mut BytesMut)) -> String {
    let mut out = BytesMut::new();
    f(&mut out);
    String::from_utf8(out.to_vec()).expect("text")
}

/// A connection without a socket.
pub(crate) struct Planner {
    pub(crate) kind: ListenerKind,
    pub(crate) view: RoutingView,
    pub(crate) front: FrontConfig,
    pub(crate) state: ClientState,
    pub(crate) patient: bool,
    pub(crate) unanswered: Unanswered,
    pub(crate) clock: fn() -> MonoTime,
}

impl Planner {
    pub(crate) fn new(kind: ListenerKind, view: RoutingView) -> Planner {
        let front = FrontConfig::new(NodeId(1), "test");
        let (peer, local) = ("192.0.2.1:5000".parse().unwrap(), "192.0.2.9:6379".parse().unwrap());
        let info = Arc::new(ClientInfo::new(1, peer, local, MonoTime(0)));
        let state = ClientState::new(info, &front);
        Planner { kind, view, front, state, patient: true, unanswered: Unanswered::default(), clock: || MonoTime(0) }
    }

    pub(crate) fn with_password(mut self, password: &str) -> Planner {
        self.front.requirepass = Some(Secret::new(password));
        self.state = ClientState::new(self.state.info.clone(), &self.front);
        self
    }

    fn run(&mut self, args: &OwnedArgs) -> (Plan, String) {
        let now = Now { mono: MonoTime(1_000_000_000), wall: WallTime(1_700_000_000_000) };
        let context = Context {
            view: &self.view,
            kind: self.kind,
            front: &self.front,
            now,
            deadline: now.mono.after(Duration::from_secs(5)),
            local: self.state.info.local,
            patient: self.patient,
            unanswered: &self.unanswered,
            clock: self.clock,
        };
        let mut out = BytesMut::new();
        let plan = plan(&context, &mut self.state, args.args(), &mut out);
        (plan, String::from_utf8(out.to_vec()).expect("text"))
    }

    /// Plans a command whose words are separated by blanks.
    pub(crate) fn plan(&mut self, line: &str) -> (Plan, String) {
        self.run(&OwnedArgs::new(line.split(' ').map(str::as_bytes)))
    }

    /// The reply of a command that is answered at once.
    pub(crate) fn local(&mut self, line: &str) -> String {
        match self.plan(line) {
            (Plan::Local, reply) => reply,
            (plan, _) => panic!("{}: {plan:?}", &line[..line.len().min(60)]),
        }
    }

    /// The same, of words that may contain anything.
    pub(crate) fn words(&mut self, words: &[&[u8]]) -> String {
        match self.run(&OwnedArgs::new(words.iter().copied())) {
            (Plan::Local, reply) => reply,
            (plan, _) => panic!("{plan:?}"),
        }
    }

    /// The requests of a command: shard, whether it writes, and number of operations.
    pub(crate) fn sent(&mut self, line: &str) -> Vec<(u32, bool, usize)> {
        let command: InFlight = match self.plan(line) {
            (Plan::Send(command), reply) if reply.is_empty() => command,
            (plan, reply) => panic!("{line}: {plan:?} {reply}"),
        };
        let part = |i| command.part(i).expect("counted");
        let describe = |i| {
            let ops = OpsRef::parse(&part(i).ops).expect("encoded by us");
            assert_eq!(ops.is_write(), part(i).write);
            (part(i).shard.0, part(i).write, ops.len())
        };
        (0..command.part_count()).map(describe).collect()
    }
}

/// How the fake driver treats a request.
pub(crate) type Script = Box<dyn FnMut(&ClientRequest) -> Verdict + Send>;

/// What becomes of a request.
pub(crate) enum Verdict {
    /// It is executed.
    Execute,
    /// This is its result.
    Answer(ClientResult),
    /// Its result comes when [`FakeDriver::release`] is called.
    Keep,
}

struct FakeShard {
    machine: StateMachine,
    index: u64,
    session: SessionId,
    seq: u64,
}

impl FakeShard {
    fn new(range: SlotRange) -> FakeShard {
        let log_time = LogTime(clock::now().wall.0);
        let init = ShardInit { range, epoch: Epoch(7), secret: 1, log_time, applied: LogIndex(0) };
        let mut shard = FakeShard { machine: StateMachine::new(init), index: 0, session: SessionId(0), seq: 0 };
        let open = encode_open_session(log_time, Incarnation(1));
        shard.session = match shard.apply(&open).pop() {
            Some(Outcome::Reply(Reply::Int(session))) => SessionId(session as u64),
            other => panic!("{other:?}"),
        };
        shard
    }

    fn apply(&mut self, entry: &[u8]) -> Vec<Outcome> {
        self.index += 1;
        self.machine.apply(LogIndex(self.index), entry).expect("well-formed").outcomes
    }

    fn execute(&mut self, request: &ClientRequest) -> ClientResult {
        let stamp = LogTime(clock::now().wall.0);
        if !request.write {
            loop {
                match self.machine.read(&request.ops, stamp) {
                    ReadResult::Reply(reply) => return ClientResult::Reply(reply),
                    ReadResult::NeedsAdvance => drop(self.apply(&encode_advance(stamp))),
                }
            }
        }
        self.seq += 1;
        let mut entry = EntryBuilder::new(stamp, 0);
        entry.push(SessionTag { session: self.session, seq: Seq(self.seq), low: Seq(self.seq - 1) }, &request.ops);
        match self.apply(&entry.finish()).pop() {
            Some(Outcome::Reply(reply)) => ClientResult::Reply(reply),
            other => panic!("{other:?}"),
        }
    }
}

#[derive(Default)]
struct Kept {
    /// Requests without a result so far, in order.
    requests: Vec<ClientRequest>,
    /// Everything that was seen: connection, shard and whether the operations write.
    seen: Vec<(u64, ShardId, bool)>,
    batches: usize,
    outboxes: HashMap<ConnId, Arc<Outbox>>,
}

/// A driver whose shards are all here and always led.
pub(crate) struct FakeDriver {
    pub(crate) client: Client,
    pub(crate) view: Arc<ArcSwap<RoutingView>>,
    inputs: crossbeam::channel::Sender<Input>,
    kept: Arc<Mutex<Kept>>,
    thread: Option<JoinHandle<()>>,
}

impl FakeDriver {
    pub(crate) fn new(view: RoutingView, script: Script) -> FakeDriver {
        Self::start(view, script, false)
    }

    /// Publishes what its shards hold, under a lease without end.
    pub(crate) fn leased(view: RoutingView, script: Script) -> FakeDriver {
        Self::start(view, script, true)
    }

    fn start(mut view: RoutingView, mut script: Script, leased: bool) -> FakeDriver {
        let (sender, receiver) = input_channel();
        let arcs: Vec<SlotRange> = match view.shards.is_empty() {
            true => three_shards().shards.iter().map(|s| s.range).collect(),
            false => view.shards.iter().map(|s| s.range).collect(),
        };
        let mut shards: Vec<FakeShard> = arcs.into_iter().map(FakeShard::new).collect();
        if leased {
            let now = clock::now();
            for (route, shard) in view.shards.iter_mut().zip(&shards) {
                let published = shard.machine.published().clone();
                published.set_estimate(LogTime(now.wall.0), now);
                published.cell().open(1, 1, u64::MAX);
                route.published = Some(published);
            }
        }
        let view = Arc::new(ArcSwap::from_pointee(view));
        let kept = Arc::new(Mutex::new(Kept::default()));
        let shared = kept.clone();
        let thread = std::thread::spawn(move || {
            while let Ok(input) = receiver.recv() {
                match input {
                    Input::Client(ClientInput::Open(conn, outbox)) => {
                        shared.lock().unwrap().outboxes.insert(conn, outbox);
                    }
                    Input::Client(ClientInput::Close(conn)) => {
                        shared.lock().unwrap().outboxes.remove(&conn);
                    }
                    Input::Client(ClientInput::Requests(requests)) => {
                        let mut results: Vec<(ConnId, _)> = Vec::new();
                        for request in requests {
                            let mut kept = shared.lock().unwrap();
                            kept.seen.push((request.conn.0, request.shard, request.write));
                            let result = match script(&request) {
                                Verdict::Execute => shards[request.shard.0 as usize].execute(&request),
                                Verdict::Answer(result) => result,
                                Verdict::Keep => {
                                    kept.requests.push(request);
                                    continue;
                                }
                            };
                            results.push((request.conn, (request.token, result)));
                        }
                        let mut kept = shared.lock().unwrap();
                        kept.batches += 1;
                        if let Some(conn) = results.first().map(|(c, _)| *c)
                            && let Some(outbox) = kept.outboxes.get(&conn)
                        {
                            outbox.deliver(results.into_iter().map(|(_, r)| r));
                        }
                    }
                    Input::Stop => return,
                    other => panic!("{other:?}"),
                }
            }
        });
        let client = Client::new(sender.clone(), view.clone());
        FakeDriver { client, view, inputs: sender, kept, thread: Some(thread) }
    }

    /// Executes everything.
    pub(crate) fn obedient(view: RoutingView) -> FakeDriver {
        FakeDriver::new(view, Box::new(|_| Verdict::Execute))
    }

    /// How many requests are kept without a result.
    pub(crate) fn kept(&self) -> usize {
        self.kept.lock().unwrap().requests.len()
    }

    /// Requests seen so far: connection, shard and whether they write.
    pub(crate) fn seen(&self) -> Vec<(u64, ShardId, bool)> {
        self.kept.lock().unwrap().seen.clone()
    }

    /// Connections that are open.
    pub(crate) fn open_connections(&self) -> usize {
        self.kept.lock().unwrap().outboxes.len()
    }

    /// Ends kept requests, the last one first, so that an order by accident is none.
    pub(crate) fn release(&self, result: impl Fn(&ClientRequest) -> ClientResult) {
        let mut kept = self.kept.lock().unwrap();
        for request in std::mem::take(&mut kept.requests).into_iter().rev() {
            let outbox = kept.outboxes.get(&request.conn).expect("open");
            outbox.deliver([(request.token, result(&request))]);
        }
    }

    /// Ends the thread, and with it the channel.
    pub(crate) fn stop(&mut self) {
        let _ = self.inputs.send(Input::Stop);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the fake driver does not panic");
        }
    }
}

impl Drop for FakeDriver {
    fn drop(&mut self) {
        let _ = self.inputs.send(Input::Stop);
    }
}

/// The key of a request's first operation, as text.
pub(crate) fn key_of(request: &ClientRequest) -> String {
    let op: Option<Op<'_>> = OpsRef::parse(&request.ops).expect("encoded by us").iter().next();
    op.and_then(|op| op.key()).map(|k| String::from_utf8_lossy(k.bytes).into_owned()).unwrap_or_default()
}
