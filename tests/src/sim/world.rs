//! Nodes, their clocks, disks and connections, and the one queue of events that moves them.
//!
//! ```text
//!   events (time, number) -> frame arrives, connection stands or breaks, batch is durable -> inbox of a node
//!                         -> node wakes: inbox -> Host::tick if due -> Host::poll until quiet -> Effects -> events
//! ```
//!
//! A node is a production [`Host`] and what a shell does for it. Whatever is random comes from the seed, whatever is
//! ordered is ordered by (time, number): the same seed is the same run.
//!
//! Connections are the ones of crema-node: simplex, numbered, a receiver ends the lower number for good before it reads a
//! higher. A cut loses frames silently at first; after three seconds the connection breaks. A killed process leaves what
//! it had sent on the way.

use super::check::completion::Ledger;
use super::check::invariants::{Invariants, Sighting, Standing};
use super::rng::Rng;
use super::trace::Trace;
use bytes::Bytes;
use crema_core::{ClusterUuid, Incarnation, MonoTime, NodeId, Now, ReplicaId, ShardId, Term, WallTime, slot_of};
use crema_shard::members::Member;
use crema_shard::{
    AutoVoters, Channel, ClientRequest, ClientResult, ConnId, Effects, Host, HostConfig, LeaderHint, MemoryOptions,
    NodeAddrs, Note, ReadLevel, ReadMode, RecoverRequest, RecoverResult, StateWrite, Timing, Token, VoterError,
    VoterRequest, VoterResult,
};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

mod disk;
mod readers;

pub use disk::DiskError;
use disk::{Disk, Unread, Written};
pub use readers::Pair;

/// Nanoseconds of a microsecond.
pub const US: u64 = 1_000;
/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;
/// Nanoseconds of a second.
pub const S: u64 = 1_000_000_000;

/// Wall time at the beginning, in milliseconds.
const WALL_BEGIN: u64 = 1_700_000_000_000;
/// A connection whose other end gives no sign for this long breaks (the pulse timeout of crema-node).
const BREAK_AFTER: u64 = 3 * S;
/// Polls of one round after which a host that still adds effects counts as running in circles.
const MOST_POLLS: u32 = 1_000;
/// Rounds without any input within [`SPIN_TIME`] after which a node counts as spinning.
const MOST_SPINS: u32 = 500;
const SPIN_TIME: u64 = 10 * MS;
/// Claims of leadership are repeated this often.
const GOSSIP_PERIOD: u64 = S;
/// Steps between comparisons of all logs.
const FULL_CHECK_EVERY: u64 = 2_000;
/// Inputs a paused node queues; further frames are lost, as a full socket would hold them back.
const MOST_INBOX: usize = 20_000;

/// The shape of a simulated cluster.
#[derive(Clone, Debug)]
pub struct Options {
    /// Seed of everything random.
    pub seed: u64,
    /// Founding nodes, numbered from 1.
    pub nodes: u64,
    /// Further nodes, which join and hold nothing until they are approved.
    pub spares: u64,
    /// Zones that the nodes are spread over in turn; 0 for none.
    pub zones: u64,
    /// When voters change without an operator.
    pub auto_voters: AutoVoters,
    /// Data shards.
    pub shards: u32,
    /// Replicas of each.
    pub replication: u32,
    /// Parts in a million by which clocks may run fast or slow.
    pub drift_ppm: u64,
    /// Part of the nodes, in 1,000, that confirm reads without leases.
    pub read_index: u64,
    /// Whether connections read outside of the driver.
    pub local_reads: bool,
    /// Most bytes of log that a node keeps for members that lag; with little, they need states.
    pub max_log_bytes: usize,
    /// Bytes of records in one piece of a state.
    pub chunk_bytes: usize,
    /// Part of the nodes, in 1,000, that keep their logs on disk.
    pub durable: u64,
    /// Bytes of log on such a node's disk behind which states are written.
    pub checkpoint_log_bytes: u64,
    /// Limits of each node's memory.
    pub memory: MemoryOptions,
    /// Whether every node remembers of which cluster it is, as with a state directory; those with disks always do.
    pub remember: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 0,
            nodes: 3,
            spares: 0,
            zones: 0,
            auto_voters: AutoVoters::default(),
            shards: 4,
            replication: 3,
            drift_ppm: 0,
            read_index: 0,
            local_reads: true,
            max_log_bytes: 1 << 30,
            chunk_bytes: 256,
            durable: 0,
            checkpoint_log_bytes: 4_000,
            memory: MemoryOptions::default(),
            remember: false,
        }
    }
}

/// What the network and the disks do at present; all durations in nanoseconds, parts in 1,000.
#[derive(Clone, Debug)]
pub struct Conditions {
    /// Delay of a frame, from and to.
    pub delay: (u64, u64),
    /// Part of frames with a further delay of up to `spike`.
    pub spikes: u64,
    /// Longest further delay.
    pub spike: u64,
    /// Part of frames lost silently.
    pub lost: u64,
    /// Part of frames that may overtake others of their channel.
    pub reordered: u64,
    /// Part of frames that arrive twice.
    pub duplicated: u64,
    /// Part of frames that find a full queue.
    pub full: u64,
    /// How long a batch takes to become durable; at once if none.
    pub persist: Option<(u64, u64)>,
    /// The only node with a slow disk; all if none.
    pub persist_at: Option<NodeId>,
    /// Further delay of every frame from one node to another: a long way, in order.
    pub lags: BTreeMap<(NodeId, NodeId), u64>,
    /// Part of the steps of a connection's task before which it gets no processor for up to 1.5 s.
    pub stalled: u64,
    /// How long a claim of leadership travels by gossip; it does not if none.
    pub gossip: Option<(u64, u64)>,
}

impl Default for Conditions {
    fn default() -> Self {
        Conditions {
            delay: (100 * US, MS),
            spikes: 0,
            spike: 0,
            lost: 0,
            reordered: 0,
            duplicated: 0,
            full: 0,
            persist: None,
            persist_at: None,
            lags: BTreeMap::new(),
            stalled: 0,
            gossip: Some((20 * MS, 400 * MS)),
        }
    }
}

/// Frames that do not pass: sender, receiver, first byte; `None` stands for any.
#[derive(Clone, Copy, Debug, Default)]
pub struct Block {
    /// Sender.
    pub from: Option<NodeId>,
    /// Receiver.
    pub to: Option<NodeId>,
    /// First byte of the frame.
    pub kind: Option<u8>,
}

/// A finished request.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its connection.
    pub conn: ConnId,
    /// Its mark.
    pub token: Token,
    /// How it ended.
    pub result: ClientResult,
}

enum Input {
    Up { peer: NodeId, incarnation: Incarnation, number: u64 },
    Down { peer: NodeId },
    Frame { peer: NodeId, incarnation: Incarnation, channel: Channel, frame: Bytes },
    Persisted(u64),
    StateWritten { shard: ShardId, replica: ReplicaId, file: u64, seq: u32 },
    Submit(ClientRequest),
    Close(ConnId),
    Hint(LeaderHint),
    Gone(NodeId),
    Transfer { shard: ShardId, to: NodeId },
    Drain,
    Recover(RecoverRequest),
    Voters(VoterRequest),
    MemoryShare(u8),
}

/// What a happening is about; the life guards against those of an earlier one.
enum Event {
    Wake {
        node: NodeId,
        life: u64,
    },
    Arrive {
        from: NodeId,
        incarnation: Incarnation,
        to: NodeId,
        life: u64,
        number: u64,
        channel: Channel,
        frame: Bytes,
    },
    Persisted {
        node: NodeId,
        life: u64,
        number: u64,
    },
    StateWritten {
        node: NodeId,
        life: u64,
        write: StateWrite,
    },
    Dial {
        from: NodeId,
        to: NodeId,
        life: u64,
    },
    Break {
        from: NodeId,
        to: NodeId,
        number: u64,
    },
    Watch {
        from: NodeId,
        to: NodeId,
        number: u64,
    },
    Hint {
        to: NodeId,
        /// The life of the leader that made the claim.
        life: u64,
        hint: LeaderHint,
    },
    Gossip,
    /// The next step of a read outside of the driver.
    Reader(u64),
    /// The process of a node that was drained, or whose disk failed, ends.
    Ends {
        node: NodeId,
        life: u64,
    },
    User(u64),
}

struct Queued(u64, u64, Event);
impl PartialEq for Queued {
    fn eq(&self, o: &Self) -> bool {
        (self.0, self.1) == (o.0, o.1)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Queued {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(o.0, o.1))
    }
}

struct Clock {
    offset: u64,
    ppm: i64,
    wall_jump_ms: i64,
}

impl Clock {
    fn now(&self, at: u64) -> Now {
        let run = (i128::from(at) * (1_000_000 + i128::from(self.ppm)) / 1_000_000) as u64;
        let wall = (WALL_BEGIN + at / MS).saturating_add_signed(self.wall_jump_ms);
        Now { mono: MonoTime(self.offset + run), wall: WallTime(wall) }
    }
    /// The first simulated time at which this clock reads `due`.
    fn when(&self, due: MonoTime) -> u64 {
        let run = due.0.saturating_sub(self.offset);
        let at = (i128::from(run) * 1_000_000 / (1_000_000 + i128::from(self.ppm))) as u64;
        // Integer division may be short of it by a few.
        (at..).find(|t| self.now(*t).mono >= due).unwrap_or(at)
    }
}

struct SimNode {
    host: Option<Box<Host>>,
    incarnation: Incarnation,
    life: u64,
    clock: Clock,
    paused_since: Option<u64>,
    inbox: VecDeque<Input>,
    wake_at: Option<u64>,
    /// Number of the standing outgoing connection to each peer, as the shell knows it.
    out: BTreeMap<NodeId, u64>,
    /// When the last batch becomes durable: they do so in order.
    last_persist: u64,
    /// When the last piece of a state is written: in order, too.
    last_state: u64,
    /// The disk, of a node that keeps its log there.
    disk: Option<Disk>,
    /// The cluster that it remembers, and the generation of its table.
    cluster: Option<(ClusterUuid, u32)>,
    spins: (u64, u32),
}

#[derive(Default)]
struct Link {
    up: bool,
    number: u64,
    last_at: [u64; 3],
}

/// The outcome of one step of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something happened.
    Worked,
    /// An event of the caller's own is due.
    User(u64),
    /// Nothing happens until the given time, which is reached.
    Reached,
}

/// A simulated cluster.
pub struct World {
    options: Options,
    now: u64,
    next_number: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    rng: Rng,
    nodes: BTreeMap<NodeId, SimNode>,
    links: BTreeMap<(NodeId, NodeId), Link>,
    /// The connection that is read, by sender, its life, and receiver.
    accepted: BTreeMap<(NodeId, Incarnation, NodeId), u64>,
    /// Connections whose frames were lost with them.
    lost: BTreeSet<u64>,
    cut: BTreeMap<(NodeId, NodeId), u64>,
    /// The newest claim of leadership a shard, as gossip has it.
    claims: BTreeMap<ShardId, (Term, NodeId)>,
    /// Present conditions.
    pub conditions: Conditions,
    /// Frames that do not pass.
    pub blocks: Vec<Block>,
    /// The trace.
    pub trace: Trace,
    /// Requests and completions.
    pub ledger: Ledger,
    /// Completions that nobody has taken yet.
    pub finished: Vec<Finished>,
    /// What went wrong; empty in a correct run.
    pub violations: Vec<String>,
    invariants: Invariants,
    effects: Effects,
    steps: u64,
    next_conn: u64,
    next_token: u64,
    last_incarnation: u128,
    readers: BTreeMap<u64, readers::Reader>,
    next_reader: u64,
    /// What waits behind a connection's read outside of the driver; present while there is one.
    behind: BTreeMap<ConnId, VecDeque<ClientRequest>>,
    /// Requests that a node's driver has and has not answered.
    asked: BTreeMap<(ConnId, Token), ShardId>,
    /// Reads answered outside of a driver.
    pub local_reads: u64,
    /// Keys that are always written together.
    pub pairs: Vec<Pair>,
    /// Requests lost with the process of a node that stopped as planned, or whose disk failed.
    pub ended: Vec<(ConnId, Token)>,
    /// Recoveries that have ended, in order: where, and how.
    pub recoveries: Vec<(NodeId, RecoverResult)>,
    /// Changes of voters that have ended, in order: where, which request, and how.
    pub voters: Vec<(NodeId, u64, VoterResult)>,
    next_voter_request: u64,
    /// Failures of disks that nobody has counted yet.
    pub disk_failures: Vec<DiskError>,
}

impl World {
    /// A cluster whose nodes have just been started.
    pub fn new(options: Options) -> World {
        let mut rng = Rng::new(options.seed);
        let ids: Vec<NodeId> = (1..=options.nodes + options.spares).map(NodeId).collect();
        let clocks: Vec<Clock> = ids
            .iter()
            .map(|_| Clock {
                offset: rng.range(S, 1_000_000 * S),
                ppm: rng.range(0, 2 * options.drift_ppm) as i64 - options.drift_ppm as i64,
                wall_jump_ms: 0,
            })
            .collect();
        let mut world = World {
            options,
            now: 0,
            next_number: 0,
            queue: BinaryHeap::new(),
            rng,
            nodes: BTreeMap::new(),
            links: BTreeMap::new(),
            accepted: BTreeMap::new(),
            lost: BTreeSet::new(),
            cut: BTreeMap::new(),
            claims: BTreeMap::new(),
            conditions: Conditions::default(),
            blocks: Vec::new(),
            trace: Trace::default(),
            ledger: Ledger::default(),
            finished: Vec::new(),
            violations: Vec::new(),
            invariants: Invariants::default(),
            effects: Effects::default(),
            steps: 0,
            next_conn: 0,
            next_token: 0,
            last_incarnation: 0,
            readers: BTreeMap::new(),
            next_reader: 0,
            behind: BTreeMap::new(),
            asked: BTreeMap::new(),
            local_reads: 0,
            pairs: Vec::new(),
            ended: Vec::new(),
            recoveries: Vec::new(),
            voters: Vec::new(),
            next_voter_request: 0,
            disk_failures: Vec::new(),
        };
        for (id, clock) in ids.into_iter().zip(clocks) {
            let node = SimNode {
                host: None,
                incarnation: Incarnation(0),
                life: 0,
                clock,
                paused_since: None,
                inbox: VecDeque::new(),
                wake_at: None,
                out: BTreeMap::new(),
                last_persist: 0,
                last_state: 0,
                disk: None,
                cluster: None,
                spins: (0, 0),
            };
            world.nodes.insert(id, node);
        }
        for id in world.ids() {
            let durable = world.rng.permille(world.options.durable);
            world.nodes.get_mut(&id).expect("just made").disk = durable.then(Disk::default);
            world.start(id);
        }
        world.at(GOSSIP_PERIOD, Event::Gossip);
        world
    }

    // ---- looking -----------------------------------------------------------------------------------------------

    /// Simulated nanoseconds since the beginning.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// The shape of the cluster.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// All nodes, dead ones included.
    pub fn ids(&self) -> Vec<NodeId> {
        self.nodes.keys().copied().collect()
    }

    /// Nodes whose process runs, paused ones included.
    pub fn alive(&self) -> Vec<NodeId> {
        self.nodes.iter().filter(|(_, n)| n.host.is_some()).map(|(id, _)| *id).collect()
    }

    /// Whether the node stands still.
    pub fn paused(&self, node: NodeId) -> bool {
        self.nodes[&node].paused_since.is_some()
    }

    /// Which life the node is in, from 1.
    pub fn life(&self, node: NodeId) -> u64 {
        self.nodes[&node].life
    }

    /// The node's host.
    pub fn host(&self, node: NodeId) -> Option<&Host> {
        self.nodes.get(&node)?.host.as_deref()
    }

    /// What the node's clocks read.
    pub fn clock(&self, node: NodeId) -> Now {
        self.nodes[&node].clock.now(self.now)
    }

    /// The zone that the node is in.
    pub fn zone(&self, node: NodeId) -> Option<String> {
        (self.options.zones > 0).then(|| format!("zone{}", node.0 % self.options.zones))
    }

    /// The data shards.
    pub fn shards(&self) -> Vec<ShardId> {
        (0..self.options.shards).map(ShardId).collect()
    }

    /// The node that leads `shard` in the highest term.
    pub fn leader(&self, shard: ShardId) -> Option<NodeId> {
        let led = |id: &NodeId| {
            let l = self.host(*id)?.coordinator().replica(shard)?.leadership();
            l.leads.then_some((l.term, *id))
        };
        self.alive().iter().filter_map(led).max().map(|(_, id)| id)
    }

    /// The nodes with a replica of `shard` whose memory is still theirs.
    pub fn holders(&self, shard: ShardId) -> Vec<NodeId> {
        let holds = |id: &NodeId| self.host(*id).is_some_and(|h| h.coordinator().replica(shard).is_some());
        self.alive().into_iter().filter(holds).collect()
    }

    /// Whether the node runs, and every replica that placement gives it is a voter, as far as it knows.
    pub fn whole(&self, node: NodeId) -> bool {
        self.host(node).is_some_and(|h| h.meta_state().is_some() && h.unfilled() == 0)
    }

    /// The shard of a key, as the first node that knows the placement sees it.
    pub fn shard_of(&self, key: &str) -> Option<ShardId> {
        let view = |id: &NodeId| self.host(*id)?.view().shard_of(slot_of(key.as_bytes()));
        self.alive().iter().find_map(view)
    }

    /// A key of `shard` that begins with `prefix`.
    ///
    /// # Panics
    ///
    /// If no node knows the placement yet.
    pub fn key_of(&self, shard: ShardId, prefix: &str) -> String {
        (0..)
            .map(|i| format!("{prefix}{i}"))
            .find(|k| self.shard_of(k).expect("the cluster is founded") == shard)
            .expect("the search has no end")
    }

    /// Everything not answered yet, of nodes that are alive.
    pub fn unanswered(&self) -> usize {
        self.alive().iter().map(|n| self.ledger.open_at(*n).len()).sum()
    }

    // ---- moving ------------------------------------------------------------------------------------------------

    fn at(&mut self, at: u64, event: Event) {
        self.next_number += 1;
        self.queue.push(Reverse(Queued(at.max(self.now), self.next_number, event)));
    }

    /// Has [`World::step`] return `Step::User(mark)` after `delay` nanoseconds.
    pub fn remind(&mut self, delay: u64, mark: u64) {
        self.at(self.now + delay, Event::User(mark));
    }

    /// Lets the next event before or at `until` happen.
    pub fn step(&mut self, until: u64) -> Step {
        let due = self.queue.peek().is_some_and(|Reverse(q)| q.0 <= until);
        if !due {
            self.now = self.now.max(until);
            return Step::Reached;
        }
        let Some(Reverse(Queued(at, _, event))) = self.queue.pop() else { return Step::Reached };
        self.now = at;
        self.steps += 1;
        match event {
            Event::User(mark) => return Step::User(mark),
            Event::Wake { node, life } => self.wake(node, life),
            Event::Arrive { from, incarnation, to, life, number, channel, frame } => {
                let read = self.accepted.get(&(from, incarnation, to)).is_some_and(|n| number >= *n);
                if read && self.nodes[&to].life == life && !self.lost.contains(&number) && !self.is_cut(from, to) {
                    self.trace.frame(self.now, from, to, channel, &frame);
                    self.input(to, Input::Frame { peer: from, incarnation, channel, frame });
                }
            }
            Event::Persisted { node, life, number } => {
                let n = self.nodes.get_mut(&node).expect("nodes stay");
                if n.life == life && n.host.is_some() && n.disk.as_mut().is_none_or(|disk| disk.sync(number)) {
                    self.input(node, Input::Persisted(number));
                }
            }
            Event::StateWritten { node, life, write } => {
                let n = self.nodes.get_mut(&node).expect("nodes stay");
                if n.life == life && n.host.is_some() {
                    let StateWrite { shard, replica, file, seq, .. } = write;
                    match n.disk.as_mut().map_or(Written::Fine, |disk| disk.write_state(write)) {
                        Written::Fine => self.input(node, Input::StateWritten { shard, replica, file, seq }),
                        Written::Failed(error) => self.disk_failed(node, error, "a state"),
                        Written::Dead => {}
                    }
                }
            }
            Event::Dial { from, to, life } => self.dial(from, to, life),
            Event::Break { from, to, number } => self.break_link(from, to, number),
            Event::Watch { from, to, number } => {
                let old = |since: Option<&u64>| since.is_some_and(|s| self.now >= s + BREAK_AFTER);
                let silent = old(self.cut.get(&(from, to)))
                    || old(self.cut.get(&(to, from)))
                    || old(self.nodes[&to].paused_since.as_ref());
                if silent {
                    self.break_link(from, to, number);
                }
            }
            Event::Hint { to, life, hint } => {
                // Who hears of a new life hears before that the old one's claims are void.
                if self.nodes[&hint.leader].life == life {
                    self.input(to, Input::Hint(hint));
                }
            }
            Event::Reader(id) => self.reader_step(id),
            Event::Ends { node, life } => {
                if self.nodes[&node].life == life {
                    let lost = self.kill(node);
                    self.ended.extend(lost);
                }
            }
            Event::Gossip => {
                // What gossip knows it says again: a node may have been away.
                for (shard, (term, leader)) in self.claims.clone() {
                    self.gossip_claim(LeaderHint { shard, leader, term });
                }
                self.at(self.now + GOSSIP_PERIOD, Event::Gossip);
            }
        }
        if self.steps.is_multiple_of(FULL_CHECK_EVERY) {
            self.check_logs();
        }
        Step::Worked
    }

    /// Runs for `duration`. Reminders that fall due are dropped.
    pub fn run_for(&mut self, duration: Duration) {
        let until = self.now + duration.as_nanos() as u64;
        while self.step(until) != Step::Reached && self.violations.is_empty() {}
    }

    /// Runs until `condition` holds, at most `limit`; returns whether it does.
    pub fn run_until(&mut self, limit: Duration, mut condition: impl FnMut(&World) -> bool) -> bool {
        let until = self.now + limit.as_nanos() as u64;
        loop {
            if condition(self) {
                return true;
            }
            if self.step(until) == Step::Reached || !self.violations.is_empty() {
                return condition(self);
            }
        }
    }

    fn input(&mut self, node: NodeId, input: Input) {
        // Several inputs of one moment make one round, as a busy driver's do.
        let pause = self.rng.range(1, 100) * US;
        let at = self.now + pause;
        let Some(n) = self.nodes.get_mut(&node).filter(|n| n.host.is_some()) else { return };
        if n.inbox.len() >= MOST_INBOX && matches!(input, Input::Frame { .. }) {
            return;
        }
        n.inbox.push_back(input);
        if n.paused_since.is_none() && n.wake_at.is_none_or(|w| w > at) {
            n.wake_at = Some(at);
            let life = n.life;
            self.at(at, Event::Wake { node, life });
        }
    }

    fn wake(&mut self, node: NodeId, life: u64) {
        let at = self.now;
        let Some(n) = self.nodes.get_mut(&node) else { return };
        if n.life == life && n.wake_at == Some(at) && n.paused_since.is_none() {
            n.wake_at = None;
            self.round(node);
        }
    }

    /// One round of a shell: inputs, tick, polls.
    fn round(&mut self, id: NodeId) {
        let Some(n) = self.nodes.get_mut(&id) else { return };
        let Some(mut host) = n.host.take() else { return };
        let now = n.clock.now(self.now);
        let inbox = std::mem::take(&mut n.inbox);
        if inbox.is_empty() {
            if self.now - n.spins.0 > SPIN_TIME {
                n.spins = (self.now, 0);
            }
            n.spins.1 += 1;
            if n.spins.1 > MOST_SPINS {
                self.violations.push(format!("{id:?} spins: its next tick does not move on"));
            }
        }
        let glimpses = self.watch_pairs(&host, now);
        let mut closed = Vec::new();
        for input in inbox {
            if let Input::Close(conn) = input {
                closed.push(conn);
            }
            self.give(id, &mut host, now, input);
        }
        if now.mono >= host.next_tick() {
            host.tick(now);
        }
        let mut dropped: BTreeSet<(NodeId, Channel)> = BTreeSet::new();
        let mut polls = 0;
        loop {
            let mut effects = std::mem::take(&mut self.effects);
            host.poll(now, &mut effects);
            let quiet = effects.is_empty();
            if !quiet {
                self.perform(id, &mut host, now, &mut effects, &mut dropped);
            }
            effects.clear();
            self.effects = effects;
            if quiet {
                break;
            }
            polls += 1;
            if polls > MOST_POLLS {
                self.violations.push(format!("{id:?}: poll adds effects for ever"));
                break;
            }
        }
        if let Some(glimpses) = glimpses {
            self.violations.extend(glimpses.take());
        }
        // What was completed in the round of the closing is on its way already; a shell drops it.
        closed.into_iter().for_each(|conn| self.ledger.closed(conn));
        for (peer, channel) in dropped {
            host.send_dropped(now, peer, channel);
        }
        let n = self.nodes.get_mut(&id).expect("nodes stay");
        let seen = Sighting::new(id, n.incarnation, self.now, now, &host);
        self.invariants.after_step(seen, &mut self.violations);
        // Like a driver's, the next round is never before a moment has passed.
        let next = n.clock.when(host.next_tick()).max(self.now + 10 * US);
        n.host = Some(host);
        let life = n.life;
        if n.wake_at.is_none_or(|w| w > next) {
            n.wake_at = Some(next);
            self.at(next, Event::Wake { node: id, life });
        }
        let now = self.now;
        let cluster: Vec<Standing<'_>> = self
            .nodes
            .iter()
            .filter_map(|(node, n)| Some(Standing { node: *node, now: n.clock.now(now), host: n.host.as_deref()? }))
            .collect();
        self.invariants.across(id, &cluster, &mut self.violations);
    }

    fn give(&mut self, id: NodeId, host: &mut Host, now: Now, input: Input) {
        match input {
            Input::Up { peer, incarnation, number } => {
                self.nodes.get_mut(&id).expect("nodes stay").out.insert(peer, number);
                host.peer_up(now, peer, incarnation);
            }
            Input::Down { peer } => {
                self.nodes.get_mut(&id).expect("nodes stay").out.remove(&peer);
                host.peer_down(now, peer);
            }
            Input::Frame { peer, incarnation, channel, frame } => {
                let refused = frame.clone();
                if let Err(e) = host.frame(now, peer, incarnation, channel, frame) {
                    let start: String = refused.iter().take(64).map(|b| format!("{b:02x}")).collect();
                    self.violations.push(format!(
                        "{id:?} refuses a frame of {peer:?} on {channel:?}: {e}; {} bytes: {start}",
                        refused.len()
                    ));
                }
            }
            Input::Persisted(number) => host.persisted(now, number),
            Input::StateWritten { shard, replica, file, seq } => host.state_written(shard, replica, file, seq),
            Input::Submit(request) => host.submit(now, request),
            Input::Close(conn) => host.connection_closed(conn),
            Input::Hint(hint) => host.leader_hint(now, hint),
            Input::Gone(node) => host.node_gone(now, node),
            Input::Transfer { shard, to } => _ = host.transfer_leader(shard, to),
            Input::Drain => host.drain(now),
            Input::Recover(request) => host.recover(now, request),
            Input::Voters(request) => host.change_voters(now, request),
            Input::MemoryShare(share) => host.set_memory_share(now, share),
        }
    }

    fn perform(
        &mut self,
        id: NodeId,
        host: &mut Host,
        now: Now,
        effects: &mut Effects,
        dropped: &mut BTreeSet<(NodeId, Channel)>,
    ) {
        for batch in effects.persist.drain(..) {
            let n = self.nodes.get_mut(&id).expect("nodes stay");
            let here = self.conditions.persist_at.is_none_or(|n| n == id);
            let slow = self.conditions.persist.filter(|_| here).map(|(from, to)| self.now + self.rng.range(from, to));
            // A batch waits for those before it.
            let durable = slow.unwrap_or(self.now).max(n.last_persist);
            let number = batch.number;
            match n.disk.as_mut().map_or(Written::Fine, |disk| disk.write(batch)) {
                Written::Fine => {}
                Written::Failed(error) => {
                    self.disk_failed(id, error, "the log");
                    continue;
                }
                Written::Dead => continue,
            }
            if durable == self.now {
                if let Some(disk) = &mut n.disk {
                    disk.sync(number);
                }
                host.persisted(now, number);
            } else {
                n.last_persist = durable;
                let life = n.life;
                self.at(durable, Event::Persisted { node: id, life, number });
            }
        }
        for write in effects.states.drain(..) {
            let pause = self.rng.range(10 * US, 5 * MS);
            let n = self.nodes.get_mut(&id).expect("nodes stay");
            n.last_state = n.last_state.max(self.now + pause);
            let (at, life) = (n.last_state, n.life);
            self.at(at, Event::StateWritten { node: id, life, write });
        }
        let incarnation = self.nodes[&id].incarnation;
        for send in effects.sends.drain(..) {
            self.invariants.sent((id, incarnation), send.to, &send.frame, host, &mut self.violations);
            if let Some(disk) = &self.nodes[&id].disk {
                disk.check_votes(&send.frame, &mut self.violations);
            }
            let full = self.conditions.full > 0 && self.rng.permille(self.conditions.full);
            // After one dropped frame the rest of the round goes the same way, as in the driver.
            let stands = self.nodes[&id].out.get(&send.to).copied();
            match stands {
                Some(number) if !full && !dropped.contains(&(send.to, send.channel)) => {
                    self.send(id, send.to, number, send.channel, send.frame);
                }
                _ => _ = dropped.insert((send.to, send.channel)),
            }
        }
        for c in effects.completions.drain(..) {
            self.trace.note(self.now, format!("{id:?} completes {:?} {:?}: {:?}", c.conn, c.token, c.result));
            self.asked.remove(&(c.conn, c.token));
            if let Err(e) = self.ledger.completed(id, c.conn, c.token) {
                self.violations.push(e);
            }
            self.finished.push(Finished { conn: c.conn, token: c.token, result: c.result });
        }
        for led in effects.led.drain(..) {
            self.trace.note(self.now, format!("{id:?} leads {:?} in term {}", led.shard, led.term));
            let claim = self.claims.entry(led.shard).or_insert((led.term, id));
            *claim = (led.term, id).max(*claim);
            self.gossip_claim(LeaderHint { shard: led.shard, leader: id, term: led.term });
        }
        self.recoveries.extend(effects.recoveries.drain(..).map(|(_, result)| (id, result)));
        for (request, result) in effects.voters.drain(..) {
            self.trace.note(self.now, format!("change {request} of voters, at {id:?}: {result:?}"));
            self.voters.push((id, request, result));
        }
        for note in effects.notes.drain(..) {
            let text = format!("{id:?} notes {note:?}");
            self.trace.note(self.now, text.clone());
            match note {
                Note::Joined { uuid, generation, .. } => {
                    let remembers = self.options.remember || self.durable(id);
                    let n = self.nodes.get_mut(&id).expect("nodes stay");
                    n.cluster = remembers.then_some((uuid, generation));
                }
                Note::IdInUse { .. } | Note::Admit { .. } => {}
                // Requests that are still in flight get a moment, as a server's do.
                Note::Drained => {
                    let at = self.now + self.rng.range(1, 500) * MS;
                    let life = self.nodes[&id].life;
                    self.at(at, Event::Ends { node: id, life });
                }
                // Only a node that was replaced may be fenced, and it is dead here; nothing else may happen at all.
                _ => self.violations.push(text),
            }
        }
    }

    /// An operator asks a node to recover what has lost its majority; the answer comes with [`World::recoveries`].
    pub fn recover(&mut self, node: NodeId, accept_data_loss: bool, stopped: &[NodeId]) {
        self.trace.note(self.now, format!("{node:?} shall recover, {accept_data_loss}, without {stopped:?}"));
        self.input(node, Input::Recover(RecoverRequest { id: 0, accept_data_loss, stopped: stopped.to_vec() }));
    }

    /// An operator asks `at` to let `node` hold replicas, or no longer; the answer comes with [`World::voters`].
    pub fn change_voters(&mut self, at: NodeId, node: NodeId, approved: bool) -> u64 {
        self.next_voter_request += 1;
        let id = self.next_voter_request;
        self.trace.note(self.now, format!("{at:?} shall make {node:?} a voter: {approved}, change {id}"));
        self.input(at, Input::Voters(VoterRequest { id, node, approved }));
        id
    }

    /// Whether the end of every change of voters that was asked for is known. Of some it never will be: their gateways died.
    pub fn changes_ended(&self) -> bool {
        let known = self.voters.iter().filter(|(.., result)| *result != Err(VoterError::Unknown));
        known.count() as u64 == self.next_voter_request
    }

    /// Gossip tells `to` of a leader that there never was.
    pub fn gossip_lie(&mut self, to: NodeId, lie: LeaderHint) {
        self.trace
            .note(self.now, format!("{to:?} is told that {:?} leads {:?} in {}", lie.leader, lie.shard, lie.term));
        self.input(to, Input::Hint(lie));
    }

    /// The nodes that may hold replicas, by the newest table that anybody has.
    pub fn approved(&self) -> Vec<NodeId> {
        let tables = self.alive().into_iter().filter_map(|n| self.host(n)?.meta_state().cloned());
        let newest = tables.max_by_key(|s| s.version());
        newest.map_or(Vec::new(), |s| s.approved().into_iter().map(|(n, _)| n).collect())
    }

    /// Whether every group, under any members that one of its replicas knows, has a majority of replicas with their states
    /// without `node`.
    pub fn bears_loss(&self, node: NodeId) -> bool {
        let groups = self.shards().into_iter().chain([ShardId::META]);
        groups.into_iter().all(|shard| {
            let replica =
                |n: NodeId| self.host(n)?.coordinator().replica(shard).filter(|r| !r.is_empty() && !r.failed());
            let whole = |m: &Member| m.node != node && replica(m.node).is_some_and(|r| r.id() == m.id);
            self.alive().into_iter().filter_map(replica).all(|r| r.members().has_quorum(whole))
        })
    }

    /// The node sees that it can use only so much of its memory for data.
    pub fn memory_share(&mut self, node: NodeId, share: u8) {
        self.trace.note(self.now, format!("{node:?} has {share} parts of its memory for data"));
        self.input(node, Input::MemoryShare(share));
    }

    fn gossip_claim(&mut self, hint: LeaderHint) {
        let Some((from, to)) = self.conditions.gossip else { return };
        for node in self.ids().into_iter().filter(|n| *n != hint.leader) {
            let at = self.now + self.rng.range(from, to);
            let life = self.nodes[&hint.leader].life;
            self.at(at, Event::Hint { to: node, life, hint });
        }
    }

    /// Compares the logs of all nodes.
    pub fn check_logs(&mut self) {
        for (id, n) in &self.nodes {
            if let Some(host) = &n.host {
                let seen = Sighting::new(*id, n.incarnation, self.now, n.clock.now(self.now), host);
                self.invariants.after_step(Sighting { whole: true, ..seen }, &mut self.violations);
            }
        }
    }

    // ---- network -----------------------------------------------------------------------------------------------

    fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cut.contains_key(&(from, to))
    }

    fn send(&mut self, from: NodeId, to: NodeId, number: u64, channel: Channel, frame: Bytes) {
        let fits = |b: &Block| {
            b.from.is_none_or(|n| n == from)
                && b.to.is_none_or(|n| n == to)
                && b.kind.is_none_or(|k| frame.first() == Some(&k))
        };
        let c = &self.conditions;
        let vanishes =
            self.is_cut(from, to) || self.blocks.iter().any(fits) || (c.lost > 0 && self.rng.permille(c.lost));
        let link = self.links.entry((from, to)).or_default();
        if vanishes || !link.up || link.number != number {
            return;
        }
        let lag = c.lags.get(&(from, to)).copied().unwrap_or(0);
        let mut delay = lag + self.rng.range(c.delay.0, c.delay.1);
        if c.spikes > 0 && self.rng.permille(c.spikes) {
            delay += self.rng.below(c.spike);
        }
        let overtakes = c.reordered > 0 && self.rng.permille(c.reordered);
        let last = &mut link.last_at[channel as usize];
        let at = if overtakes { self.now + delay } else { (self.now + delay).max(*last) };
        if !overtakes {
            *last = at;
        }
        let twice = (c.duplicated > 0 && self.rng.permille(c.duplicated)).then(|| at + self.rng.below(50 * MS));
        let incarnation = self.nodes[&from].incarnation;
        let life = self.nodes[&to].life;
        for at in [Some(at), twice].into_iter().flatten() {
            let frame = frame.clone();
            self.at(at, Event::Arrive { from, incarnation, to, life, number, channel, frame });
        }
    }

    fn dial(&mut self, from: NodeId, to: NodeId, life: u64) {
        if self.nodes[&from].life != life
            || self.nodes[&from].host.is_none()
            || self.links.get(&(from, to)).is_some_and(|l| l.up)
        {
            return;
        }
        let answers = self.nodes[&to].host.is_some() && !self.paused(to) && !self.paused(from);
        if !answers || self.is_cut(from, to) || self.is_cut(to, from) {
            let again = self.now + self.rng.range(50, 250) * MS;
            self.at(again, Event::Dial { from, to, life });
            return;
        }
        self.next_number += 1;
        let number = self.next_number;
        self.links.insert((from, to), Link { up: true, number, last_at: [self.now; 3] });
        self.accepted.insert((from, self.nodes[&from].incarnation, to), number);
        let incarnation = self.nodes[&to].incarnation;
        self.trace.note(self.now, format!("{from:?} -> {to:?} connected"));
        self.input(from, Input::Up { peer: to, incarnation, number });
    }

    fn break_link(&mut self, from: NodeId, to: NodeId, number: u64) {
        let Some(link) = self.links.get_mut(&(from, to)).filter(|l| l.up && l.number == number) else { return };
        link.up = false;
        self.trace.note(self.now, format!("{from:?} -> {to:?} breaks"));
        // What is on the way is lost, or still arrives until the next connection is accepted.
        if self.rng.permille(500) {
            self.lost.insert(number);
        }
        self.input(from, Input::Down { peer: to });
        let life = self.nodes[&from].life;
        let again = self.now + self.rng.range(1, 100) * MS;
        self.at(again, Event::Dial { from, to, life });
    }

    /// Breaks the connection from `from` to `to`, if it stands; it is built anew soon.
    pub fn reset(&mut self, from: NodeId, to: NodeId) {
        if let Some(number) = self.links.get(&(from, to)).filter(|l| l.up).map(|l| l.number) {
            self.break_link(from, to, number);
        }
    }

    fn watch(&mut self, from: NodeId, to: NodeId) {
        let at = self.now + BREAK_AFTER + self.rng.range(1, 200) * MS;
        for (a, b) in [(from, to), (to, from)] {
            if let Some(number) = self.links.get(&(a, b)).filter(|l| l.up).map(|l| l.number) {
                self.at(at, Event::Watch { from: a, to: b, number });
            }
        }
    }

    /// From now on `to` does not hear `from`.
    pub fn cut_one_way(&mut self, from: NodeId, to: NodeId) {
        if from != to && !self.is_cut(from, to) {
            self.trace.note(self.now, format!("cut {from:?} -> {to:?}"));
            self.cut.insert((from, to), self.now);
            self.watch(from, to);
        }
    }

    /// From now on the two do not hear each other.
    pub fn cut(&mut self, a: NodeId, b: NodeId) {
        self.cut_one_way(a, b);
        self.cut_one_way(b, a);
    }

    /// Cuts a node off from all others.
    pub fn isolate(&mut self, node: NodeId) {
        for other in self.ids() {
            self.cut(node, other);
        }
    }

    /// Ends all cuts.
    pub fn heal_cuts(&mut self) {
        if !self.cut.is_empty() {
            self.trace.note(self.now, "all cuts heal".into());
        }
        self.cut.clear();
    }

    /// Ends the cut of one direction.
    pub fn heal_one_way(&mut self, from: NodeId, to: NodeId) {
        if self.cut.remove(&(from, to)).is_some() {
            self.trace.note(self.now, format!("heal {from:?} -> {to:?}"));
        }
    }

    // ---- processes ---------------------------------------------------------------------------------------------

    /// Whether the node keeps its log on disk.
    pub fn durable(&self, node: NodeId) -> bool {
        self.nodes[&node].disk.is_some()
    }

    /// Empties the disk of a node that does not run: it was damaged, and its owner has given it up, or it was replaced.
    pub fn wipe(&mut self, id: NodeId) {
        self.trace.note(self.now, format!("the disk of {id:?} is wiped"));
        let n = self.nodes.get_mut(&id).expect("a known node");
        assert!(n.host.is_none(), "wiped under a running process");
        n.disk = n.disk.is_some().then(Disk::default);
    }

    /// The next write to the node's disk fails, or the next of a state.
    pub fn break_disk(&mut self, id: NodeId, error: DiskError, states_only: bool) {
        if let Some(disk) = &mut self.nodes.get_mut(&id).expect("a known node").disk {
            disk.set_trap(error, states_only);
        }
    }

    /// Nothing more fails. Returns whether the process, if it still runs, has met with a failure.
    pub fn repair_disk(&mut self, id: NodeId) -> bool {
        self.nodes.get_mut(&id).expect("a known node").disk.as_mut().is_some_and(Disk::repair)
    }

    /// Whether the node's disk may fail, or has failed under the process that runs.
    pub fn disk_is_failing(&self, id: NodeId) -> bool {
        self.nodes[&id].disk.as_ref().is_some_and(Disk::is_failing)
    }

    /// A shell ends its process when a write or sync fails; until then it goes on, but nothing becomes durable any more.
    fn disk_failed(&mut self, id: NodeId, error: DiskError, what: &str) {
        self.trace.note(self.now, format!("the disk of {id:?} fails with {what}: {error:?}"));
        self.disk_failures.push(error);
        let at = self.now + self.rng.range(1, 1_000) * MS;
        let life = self.nodes[&id].life;
        self.at(at, Event::Ends { node: id, life });
    }

    /// A bit flips on the node's disk.
    pub fn flip_bit(&mut self, id: NodeId) {
        let Some(disk) = &mut self.nodes.get_mut(&id).expect("a known node").disk else { return };
        let at = disk.flip(&mut self.rng);
        self.trace.note(self.now, format!("a bit flips on the disk of {id:?}: {at}"));
    }

    /// Whether a restart of the node may notice a flipped bit.
    pub fn rotten(&self, id: NodeId) -> bool {
        self.nodes[&id].disk.as_ref().is_some_and(Disk::is_rotten)
    }

    /// A node that does not run, and has nothing on disk, will keep its log on disk if it did so in memory, and the reverse.
    pub fn change_mode(&mut self, id: NodeId) {
        let n = self.nodes.get_mut(&id).expect("a known node");
        assert!(n.host.is_none() && !n.disk.as_ref().is_some_and(Disk::is_used), "a disk in use");
        n.disk = n.disk.is_none().then(Disk::default);
        let mode = if n.disk.is_some() { "on disk" } else { "in memory" };
        self.trace.note(self.now, format!("from now on {id:?} keeps its log {mode}"));
    }

    /// Starts a node that does not run: in the life that its disk has kept, else in a new one.
    pub fn start(&mut self, id: NodeId) {
        if self.nodes[&id].host.is_some() {
            return;
        }
        self.last_incarnation += 1;
        let bits = (self.rng.next_u64(), self.rng.next_u64());
        let new = Incarnation(u128::from(bits.0) << 64 | u128::from(bits.1 & !0xffff) | self.last_incarnation);
        let recovered = self.nodes[&id].disk.as_ref().map(Disk::recover).transpose();
        let recovered = match recovered {
            Ok(recovered) => recovered.unwrap_or_default(),
            // What a shell then does: the whole directory begins a new life.
            Err(Unread::Damaged(why)) => {
                self.trace.note(self.now, format!("what {id:?} kept on disk is lost: {why}"));
                self.nodes.get_mut(&id).expect("a known node").disk = Some(Disk::default());
                Vec::new()
            }
            Err(why @ Unread::Wrong(_)) => {
                self.violations.push(format!("{id:?} cannot be recovered: {why}"));
                return;
            }
        };
        let cluster = self.nodes[&id].cluster;
        let same_life = self.nodes[&id].disk.as_ref().is_some_and(Disk::is_used);
        let incarnation = if same_life { self.nodes[&id].incarnation } else { new };
        let config = HostConfig {
            node: id,
            incarnation,
            cluster: "sim".into(),
            initial_members: (1..=self.options.nodes).map(NodeId).collect(),
            shards: self.options.shards,
            replication: self.options.replication,
            addrs: NodeAddrs { raft: format!("node{id}:1"), zone: self.zone(id), ..NodeAddrs::default() },
            auto_voters: self.options.auto_voters,
            entropy: std::array::from_fn(|_| self.rng.next_u64()),
            timing: Timing::default(),
            max_log_bytes: self.options.max_log_bytes,
            snapshot_chunk_bytes: self.options.chunk_bytes,
            process: new.0 as u64,
            memory: self.options.memory,
            uuid: cluster.map(|(uuid, _)| uuid),
            generation: cluster.map_or(0, |(_, generation)| generation),
            checkpoint_log_bytes: self.durable(id).then_some(self.options.checkpoint_log_bytes),
            read_mode: if self.rng.permille(self.options.read_index) { ReadMode::ReadIndex } else { ReadMode::Lease },
        };
        let at = self.now;
        let n = self.nodes.get_mut(&id).expect("a known node");
        n.incarnation = incarnation;
        n.life += 1;
        if let Some(disk) = &mut n.disk {
            disk.use_it();
        }
        n.inbox.clear();
        n.out.clear();
        n.last_persist = 0;
        n.last_state = 0;
        n.paused_since = None;
        let back = recovered.len();
        let (host, lost) = Host::recovered(config, recovered, n.clock.now(at));
        self.violations.extend(lost.into_iter().map(|(s, why)| format!("{id:?} cannot recover {s:?}: {why}")));
        n.host = Some(Box::new(host));
        n.wake_at = Some(at);
        self.invariants.restarted(id, incarnation);
        let life = n.life;
        self.trace.note(at, format!("{id:?} starts, life {life}, with {back} replicas"));
        self.at(at, Event::Wake { node: id, life });
        for to in self.ids().into_iter().filter(|to| *to != id) {
            self.links.remove(&(id, to));
            let at = self.now + self.rng.range(1, 50) * MS;
            self.at(at, Event::Dial { from: id, to, life });
        }
    }

    /// Kills a node: its memory is gone. Its peers notice within milliseconds if the process died, within seconds if
    /// the machine did. Returns the requests that nobody will answer.
    pub fn kill(&mut self, id: NodeId) -> Vec<(ConnId, Token)> {
        let n = self.nodes.get_mut(&id).expect("a known node");
        if n.host.take().is_none() {
            return Vec::new();
        }
        n.inbox.clear();
        n.wake_at = None;
        n.paused_since = None;
        if let Some(disk) = &mut n.disk {
            disk.crash(&mut self.rng);
        }
        self.trace.note(self.now, format!("{id:?} is killed"));
        self.claims.retain(|_, (_, leader)| *leader != id);
        let machine = self.rng.permille(300);
        for other in self.ids().into_iter().filter(|o| *o != id) {
            if let Some(link) = self.links.get_mut(&(id, other)) {
                link.up = false;
            }
            if let Some(number) = self.links.get(&(other, id)).filter(|l| l.up).map(|l| l.number) {
                let after = if machine { self.rng.range(500, 3_000) } else { self.rng.range(1, 20) };
                self.at(self.now + after * MS, Event::Break { from: other, to: id, number });
            }
        }
        let lost = self.ledger.node_died(id);
        self.forget_reads(|node, _| node == id);
        lost.iter().for_each(|k| _ = self.asked.remove(k));
        lost
    }

    /// Begins a planned stop: the node hands over what it leads, and ends when that is done.
    pub fn stop(&mut self, id: NodeId) {
        self.trace.note(self.now, format!("{id:?} is told to stop"));
        self.input(id, Input::Drain);
    }

    /// The node is asked to hand the leadership of `shard` over to `to`; nothing happens if it does not lead.
    pub fn transfer(&mut self, from: NodeId, shard: ShardId, to: NodeId) {
        self.trace.note(self.now, format!("{from:?} shall hand {shard:?} over to {to:?}"));
        self.input(from, Input::Transfer { shard, to });
    }

    /// The node stands still: its frames queue, its clocks run.
    pub fn pause(&mut self, id: NodeId) {
        let at = self.now;
        let n = self.nodes.get_mut(&id).expect("a known node");
        if n.host.is_none() || n.paused_since.is_some() {
            return;
        }
        n.paused_since = Some(at);
        n.wake_at = None;
        self.trace.note(at, format!("{id:?} pauses"));
        for other in self.ids().into_iter().filter(|o| *o != id) {
            self.watch(other, id);
        }
    }

    /// The node goes on.
    pub fn resume(&mut self, id: NodeId) {
        let at = self.now;
        let n = self.nodes.get_mut(&id).expect("a known node");
        if n.paused_since.take().is_some() {
            n.wake_at = Some(at);
            let life = n.life;
            self.trace.note(at, format!("{id:?} goes on"));
            self.at(at, Event::Wake { node: id, life });
        }
    }

    /// The node's wall clock jumps by `ms` milliseconds.
    pub fn jump_wall(&mut self, id: NodeId, ms: i64) {
        self.trace.note(self.now, format!("the wall clock of {id:?} jumps by {ms} ms"));
        self.nodes.get_mut(&id).expect("a known node").clock.wall_jump_ms += ms;
    }

    /// Gossip tells `to` who leads, be it true or not.
    pub fn gossip_hint(&mut self, to: NodeId, hint: LeaderHint) {
        self.input(to, Input::Hint(hint));
    }

    /// Gossip tells `to` that `node` is gone.
    pub fn gossip_gone(&mut self, to: NodeId, node: NodeId) {
        self.input(to, Input::Gone(node));
    }

    // ---- clients -----------------------------------------------------------------------------------------------

    /// A new client connection. It is used with one node only.
    pub fn connect(&mut self) -> ConnId {
        self.next_conn += 1;
        ConnId(self.next_conn)
    }

    /// Sends a request for `key` to a gateway that is alive. Returns its mark, or `None` if that node does not know the
    /// placement yet.
    pub fn submit(
        &mut self,
        node: NodeId,
        conn: ConnId,
        key: &str,
        write: bool,
        ops: Bytes,
        patience: Duration,
    ) -> Option<Token> {
        let (shard, deadline) = self.addressed(node, key, patience)?;
        let level = ReadLevel::Linearizable;
        let request = ClientRequest { conn, token: Token(0), shard, write, level, ops, deadline };
        Some(self.enter(node, key, request))
    }

    /// Sends a read for `key` that may be answered from a state of the given age.
    pub fn submit_read(
        &mut self,
        node: NodeId,
        conn: ConnId,
        key: &str,
        ops: Bytes,
        level: ReadLevel,
        patience: Duration,
    ) -> Option<Token> {
        let (shard, deadline) = self.addressed(node, key, patience)?;
        let request = ClientRequest { conn, token: Token(0), shard, write: false, level, ops, deadline };
        Some(self.enter(node, key, request))
    }

    fn addressed(&self, node: NodeId, key: &str, patience: Duration) -> Option<(ShardId, MonoTime)> {
        let shard = self.host(node)?.view().shard_of(slot_of(key.as_bytes()))?;
        Some((shard, self.clock(node).mono.after(patience)))
    }

    fn enter(&mut self, node: NodeId, key: &str, mut request: ClientRequest) -> Token {
        self.next_token += 1;
        request.token = Token(self.next_token);
        let ClientRequest { conn, token, shard, write, .. } = request;
        self.ledger.submitted(node, conn, token);
        self.trace.note(
            self.now,
            format!("{conn:?} asks {node:?}: {token:?} {shard:?} {key} {}", if write { "write" } else { "read" }),
        );
        self.take_request(node, request);
        token
    }

    /// The client goes away without waiting.
    pub fn close(&mut self, node: NodeId, conn: ConnId) {
        self.forget_reads(|_, c| c == conn);
        self.asked.retain(|(c, _), _| *c != conn);
        self.input(node, Input::Close(conn));
    }
}
