//! One seed from beginning to end, and many of them.
//!
//! ```text
//!   found -> load and faults -> heal: every shard writable through every gateway within 5 s, nothing left in flight
//!         -> replicas catch up, equal digests -> groups fall asleep, wake again -> histories are judged
//! ```

use super::faults::{Fault, Faults};
use super::judge::judge;
use super::model::Ended;
use super::mutants;
use super::rng::Rng;
use super::workload::Workload;
use super::world::{Conditions, DiskError, MS, Options, S, Step, World};
use crema_core::mutant::Mutant;
use crema_core::{NodeId, Reply, ShardId, Term};
use crema_shard::{LeaderHint, ReadMode, ReplicaPlacement};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// Within this time after healing every shard takes a write through every gateway.
const WRITABLE_WITHIN: u64 = 5 * S;
/// Longest deadline of a request, and a little more.
const ANSWERED_WITHIN: Duration = Duration::from_millis(5_500);
/// A node that lost its memory has all of its replicas back after this.
const REFILLED_WITHIN: Duration = Duration::from_secs(20);
/// Replicas that can talk have the same state after this. Longer than the 5 s that may pass between two times that a sender
/// asks whether a piece of a state was lost.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(10);
/// A group of which every voter lives sleeps after this: 40 quiet ticks, and some rounds that may fail.
const ASLEEP_WITHIN: Duration = Duration::from_secs(12);
/// What an operator has asked for is done after this, and its replicas are where they should be.
const MOVED_WITHIN: Duration = Duration::from_secs(60);
/// A sleeping group takes a write within this.
const AWAKE_WITHIN: u64 = 2 * S;

/// Marks of reminders: clients below, then the nemesis, then its undoing.
const NEMESIS: u64 = 1_000;
const UNDO: u64 = 1_001;

/// What to simulate.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed.
    pub seed: u64,
    /// Number of nodes; the seed's choice if none.
    pub nodes: Option<u64>,
    /// Number of shards; the seed's choice if none.
    pub shards: Option<u32>,
    /// Faults the seed may choose from.
    pub faults: Faults,
    /// Whether each seed gets all of them.
    pub always: bool,
    /// How nodes confirm reads; the seed's choice if none.
    pub reads: Option<ReadMode>,
    /// A deliberate fault in the code under test.
    pub mutant: Option<Mutant>,
    /// Whether the report shall hold what clients saw, and everything that happened.
    pub history: bool,
}

impl Plan {
    /// The command that runs this seed alone.
    pub fn replay(&self) -> String {
        let mut line = format!("cargo run -p crema-tests --release -- sim --seeds 1 --seed {}", self.seed);
        if let Some(n) = self.nodes {
            line += &format!(" --nodes {n}");
        }
        if let Some(n) = self.shards {
            line += &format!(" --shards {n}");
        }
        if self.faults != Faults::all() {
            line += &format!(" --faults {}", self.faults);
        }
        if self.always {
            line += " --always";
        }
        match self.reads {
            Some(ReadMode::Lease) => line += " --reads lease",
            Some(ReadMode::ReadIndex) => line += " --reads read_index",
            None => {}
        }
        if let Some(mutant) = self.mutant {
            line += &format!(" --mutant {}", mutants::name(mutant));
        }
        line
    }
}

/// What became of a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The plan.
    pub plan: Plan,
    /// The faults the seed chose.
    pub faults: Faults,
    /// What went wrong; empty if all went well.
    pub failures: Vec<String>,
    /// Simulated nanoseconds.
    pub simulated: u64,
    /// Requests completed.
    pub ops: u64,
    /// Of the history: answered, refused, unknown.
    pub outcomes: [u64; 3],
    /// Of the answered: reads that no driver was asked for.
    pub local_reads: u64,
    /// What clients saw, as JSON lines.
    pub history: Vec<u8>,
    /// All events, one a line.
    pub everything: String,
    /// How often each fault began.
    pub injected: BTreeMap<Fault, u64>,
    /// Hash of everything that happened.
    pub trace: u64,
    /// The last events, for a failure.
    pub tail: String,
}

impl Report {
    /// The report of a failed seed, to be printed.
    pub fn describe(&self) -> String {
        let mut out = format!("--- seed {} failed; faults: {}\n", self.plan.seed, self.faults);
        out += &self.tail;
        for f in self.failures.iter().take(20) {
            out += &format!("failure: {f}\n");
        }
        out += &format!("replay: {}\n", self.plan.replay());
        out
    }
}

/// Runs one seed. A panic of the code under test is a failure like any other.
pub fn run_seed(plan: &Plan) -> Report {
    crema_core::mutant::plant(plan.mutant);
    let caught = catch_unwind(AssertUnwindSafe(|| Run::new(plan).run()));
    crema_core::mutant::plant(None);
    caught.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
        Report {
            plan: plan.clone(),
            faults: plan.faults.clone(),
            failures: vec![format!("panicked: {text}")],
            simulated: 0,
            ops: 0,
            outcomes: [0; 3],
            local_reads: 0,
            history: Vec::new(),
            everything: String::new(),
            injected: BTreeMap::new(),
            trace: 0,
            tail: String::new(),
        }
    })
}

enum Undo {
    Lost,
    Spikes,
    Reordered,
    Duplicated,
    Full,
    SlowDisk,
    Stalled,
    Lags(Vec<(NodeId, NodeId)>),
    /// Not an end but the second half of a fault: the node falls silent.
    Mute(NodeId),
    Cuts(Vec<(NodeId, NodeId)>),
    Resume(NodeId),
    Restart(NodeId),
    RestartAll,
    /// The disk takes writes again; whoever ended for it comes back.
    Repair(NodeId),
    Gossip,
    Load,
}

struct Run<'a> {
    plan: &'a Plan,
    faults: Faults,
    world: World,
    load: Workload,
    rng: Rng,
    undo: Vec<Option<Undo>>,
    /// The node that was told to stop.
    stopping: Option<NodeId>,
    calm: bool,
    injected: BTreeMap<Fault, u64>,
    failures: Vec<String>,
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan) -> Self {
        let mut rng = Rng::new(plan.seed ^ 0x5157_a11e_0000_0000);
        // Drawn whether used or not, so that naming the shape of a run does not change it.
        let nodes = if rng.permille(700) { 3 } else { rng.range(4, 5) };
        let shards = rng.range(1, 6) as u32;
        let swarm = plan.faults.swarm(&mut rng);
        let faults = if plan.always { plan.faults.clone() } else { swarm };
        // A lease bears 15 % between two clocks; most machines keep a thousandth of that.
        let drift_ppm = *rng.pick(&[200, 200, 10_000, 50_000]);
        let read_index = *rng.pick(&[0, 0, 0, 300, 1_000]);
        let five = rng.permille(500);
        let max_log_bytes = *rng.pick(&[1 << 30, 1 << 30, 4_000, 40_000, 400_000]);
        let chunk_bytes = *rng.pick(&[1, 64, 256, 4_096]);
        let durable = *rng.pick(&[0, 0, 500, 1_000, 1_000]);
        let checkpoint_log_bytes = *rng.pick(&[1_000, 10_000, 1 << 30]);
        let spares = rng.range(1, 2);
        let zones = *rng.pick(&[0, 0, 2, 3]);
        let nodes = plan.nodes.unwrap_or(nodes);
        let moves = faults.has(Fault::Voters);
        let options = Options {
            seed: rng.next_u64(),
            nodes,
            spares: if moves { spares } else { 0 },
            zones: if moves { zones } else { 0 },
            auto_voters: crema_shard::AutoVoters::default(),
            shards: plan.shards.unwrap_or(shards),
            replication: if five && nodes >= 5 { 5 } else { 3 },
            drift_ppm: if faults.has(Fault::Clock) { drift_ppm } else { 0 },
            max_log_bytes,
            chunk_bytes,
            durable,
            checkpoint_log_bytes,
            // What is evicted would look like a lost write; stories test that.
            memory: crema_shard::MemoryOptions::default(),
            read_index: match plan.reads {
                Some(ReadMode::Lease) => 0,
                Some(ReadMode::ReadIndex) => 1_000,
                None => read_index,
            },
            local_reads: true,
            remember: false,
        };
        let mut world = World::new(options);
        if plan.history {
            world.trace.keep_all();
        }
        let load_rng = rng.fork();
        let load = Workload::new(&mut world, load_rng, faults.has(Fault::Clock));
        Run {
            plan,
            faults,
            world,
            load,
            rng,
            undo: Vec::new(),
            stopping: None,
            calm: false,
            injected: BTreeMap::new(),
            failures: Vec::new(),
        }
    }

    fn run(mut self) -> Report {
        // Stops at the first failure: what follows one explains nothing.
        let _ = self.all_phases();
        self.failures.append(&mut self.world.violations);
        let mut outcomes = [0; 3];
        for r in self.load.history() {
            match r.ended {
                Some(Ended::Replied(_)) => outcomes[0] += 1,
                Some(Ended::NotApplied) => outcomes[1] += 1,
                Some(Ended::Unknown) | None => outcomes[2] += 1,
            }
        }
        let mut history = Vec::new();
        let everything = if self.plan.history { self.world.trace.tail(usize::MAX) } else { String::new() };
        if self.plan.history
            && let Err(e) = self.load.export(&mut history)
        {
            self.failures.push(format!("the history cannot be written: {e}"));
        }
        Report {
            plan: self.plan.clone(),
            faults: self.faults,
            simulated: self.world.now(),
            ops: self.world.ledger.total(),
            outcomes,
            local_reads: self.world.local_reads,
            history,
            everything,
            injected: self.injected,
            trace: self.world.trace.hash(),
            tail: if self.failures.is_empty() { String::new() } else { self.world.trace.tail(120) },
            failures: self.failures,
        }
    }

    fn all_phases(&mut self) -> Result<(), ()> {
        self.load.active = false;
        let ready =
            |r: &Self| r.world.ids().iter().all(|n| r.world.host(*n).is_some_and(|h| h.view().not_ready.is_none()));
        self.reach(Duration::from_secs(5), "the cluster is founded and ready", ready)?;

        self.load.active = true;
        let length = self.rng.range(8, 18) * S;
        let first = self.rng.range(10, 500) * MS;
        self.world.remind(first, NEMESIS);
        self.go_on(self.world.now() + length, |_| false)?;

        self.heal();
        self.probe_all("writable after healing", WRITABLE_WITHIN)?;
        self.reach(ANSWERED_WITHIN, "everything in flight is completed", |r| r.in_flight() == 0)?;
        self.reach(REFILLED_WITHIN, "every node is ready", |r| {
            r.world.ids().iter().all(|n| r.world.host(*n).is_some_and(|h| h.view().not_ready.is_none()))
        })?;
        self.reach(MOVED_WITHIN, "replicas are where they should be", |r| {
            r.world.ids().iter().all(|n| r.world.host(*n).is_some_and(|h| h.moves_open() == 0))
        })?;
        self.final_reads()?;
        self.reach(CAUGHT_UP_WITHIN, "all replicas have caught up", |r| r.caught_up())?;
        self.world.check_logs();
        self.sleep_and_wake()?;
        self.world.check_logs();
        self.settled()?;
        self.failures.extend(judge(self.load.history(), Workload::without_search).into_failures());
        Ok(())
    }

    fn fail(&mut self, text: String) -> Result<(), ()> {
        self.failures.push(text);
        Err(())
    }

    fn settled(&mut self) -> Result<(), ()> {
        if self.world.violations.is_empty() && self.failures.is_empty() { Ok(()) } else { Err(()) }
    }

    /// Lets the world go on until `until` or until `done`.
    fn go_on(&mut self, until: u64, done: impl Fn(&Self) -> bool) -> Result<(), ()> {
        loop {
            if done(self) {
                return Ok(());
            }
            match self.world.step(until) {
                Step::Reached => return Ok(()),
                Step::Worked => {}
                Step::User(NEMESIS) => self.nemesis(),
                Step::User(mark) if mark >= UNDO => self.undo((mark - UNDO) as usize),
                Step::User(client) => self.load.turn(&mut self.world, client),
            }
            if !self.world.ended.is_empty() {
                let ended = std::mem::take(&mut self.world.ended);
                self.load.abandon(|k| ended.contains(k));
            }
            for error in std::mem::take(&mut self.world.disk_failures) {
                self.injected(match error {
                    DiskError::NoSpace => Fault::Enospc,
                    DiskError::Sync => Fault::Eio,
                });
            }
            if !self.world.finished.is_empty()
                && let Err(e) = self.load.take(&mut self.world)
            {
                self.failures.push(e);
            }
            self.settled()?;
        }
    }

    fn reach(&mut self, within: Duration, what: &str, done: impl Fn(&Self) -> bool) -> Result<(), ()> {
        let until = self.world.now() + within.as_nanos() as u64;
        self.go_on(until, &done)?;
        if done(self) {
            return Ok(());
        }
        let picture = self.picture();
        self.fail(format!("not within {within:?}: {what}\n{picture}"))
    }

    /// Every replica in a line, for a report.
    fn picture(&self) -> String {
        let mut out = String::new();
        for id in self.world.alive() {
            let Some(host) = self.world.host(id) else { continue };
            let view = host.view();
            out += &format!("  {id:?} in flight {}, {:?}\n", host.in_flight(), view.not_ready);
            if let Some(state) = host.meta_state().filter(|_| host.moves_open() > 0) {
                let nodes: Vec<_> = state.nodes.iter().map(|(n, r)| (n.0, r.approved, r.draining)).collect();
                out += &format!("    {} to move at epoch {}: nodes {nodes:?}\n", host.moves_open(), state.epoch);
                for s in state.groups() {
                    let at = |of: &[ReplicaPlacement]| of.iter().map(|r| (r.node.0, r.id.0 as u32)).collect::<Vec<_>>();
                    let leaving = state.moving(s).map(|m| at(&m.leaving));
                    out += &format!("      {s:?} at {:?}, leaving {leaving:?}\n", at(state.replicas(s)));
                }
            }
            for r in host.coordinator().replicas() {
                let l = r.leadership();
                let route = view.shard(r.shard()).map(|s| (s.leader, s.term));
                out += &format!(
                    "    {:?} #{} of {:?}+{:?} term {} leader {:?}{}{} {} applied {} committed {} log to {} route {route:?}\n",
                    r.shard(),
                    r.id().0 as u32,
                    r.members().voting().map(|v| v.id.0 as u32).collect::<Vec<_>>(),
                    r.members().learners.iter().map(|v| v.id.0 as u32).collect::<Vec<_>>(),
                    l.term,
                    l.leader,
                    if r.asleep() { " asleep" } else { "" },
                    if r.failed() { " failed" } else { "" },
                    r.reads_in_words(),
                    r.applied(),
                    r.committed(),
                    r.last_index(),
                );
            }
        }
        out
    }

    fn in_flight(&self) -> usize {
        let hosts = self.world.alive().iter().filter_map(|n| self.world.host(*n)).map(|h| h.in_flight()).sum::<usize>();
        hosts + self.world.unanswered()
    }

    // ---- faults ------------------------------------------------------------------------------------------------

    fn nemesis(&mut self) {
        if self.calm {
            return;
        }
        let pause = self.rng.range(50, 1_500) * MS;
        self.world.remind(pause, NEMESIS);
        let named = Fault::ALL.into_iter().chain([Fault::Estrange]);
        let enabled: Vec<Fault> = named.filter(|f| self.faults.has(*f)).collect();
        if enabled.is_empty() {
            return;
        }
        let alive = self.world.alive();
        if alive.is_empty() {
            return;
        }
        let length = if self.rng.permille(700) { self.rng.range(20, 1_500) } else { self.rng.range(1_000, 5_000) } * MS;
        // Leaders are worth more trouble than others.
        let shard = *self.rng.pick(&self.world.shards());
        let leader = self.world.leader(shard).filter(|_| self.rng.permille(500));
        let node = leader.unwrap_or(*self.rng.pick(&alive));
        let may_lose = self.may_lose(node);
        // What is on disk comes back, unless a flipped bit is noticed then.
        let comes_back = self.world.durable(node) && !self.world.rotten(node);
        let may_die = may_lose || (self.stopping.is_none() && comes_back);
        // As with a disk that is lost: the others must have all of theirs.
        let may_rot = may_lose && self.world.durable(node) && !self.world.disk_is_failing(node);
        let may_black_out = self.may_black_out();
        let c = &mut self.world.conditions;
        let fault = *self.rng.pick(&enabled);
        let undo = match fault {
            Fault::Drop => {
                c.lost = self.rng.range(5, 300);
                Undo::Lost
            }
            Fault::Delay => {
                c.spikes = self.rng.range(10, 300);
                c.spike = self.rng.range(10, 1_500) * MS;
                Undo::Spikes
            }
            Fault::Reorder => {
                c.reordered = self.rng.range(10, 500);
                c.delay = (100 * super::world::US, self.rng.range(2, 100) * MS);
                Undo::Reordered
            }
            Fault::Duplicate => {
                c.duplicated = self.rng.range(10, 300);
                Undo::Duplicated
            }
            Fault::Full => {
                c.full = self.rng.range(5, 200);
                Undo::Full
            }
            Fault::SlowDisk => {
                let longest = self.rng.range(1, 300) * MS;
                c.persist = Some((0, longest));
                c.persist_at = self.rng.permille(500).then_some(node);
                Undo::SlowDisk
            }
            Fault::Stall => {
                c.stalled = self.rng.range(20, 400);
                Undo::Stalled
            }
            Fault::Partition => {
                let ids = self.world.ids();
                let company = if self.rng.permille(500) { 0 } else { 400 };
                let side: Vec<NodeId> =
                    ids.iter().copied().filter(|n| *n == node || self.rng.permille(company)).collect();
                let mut cuts = Vec::new();
                for a in &side {
                    for b in ids.iter().filter(|b| !side.contains(b)) {
                        cuts.extend([(*a, *b), (*b, *a)]);
                    }
                }
                for (a, b) in &cuts {
                    self.world.cut_one_way(*a, *b);
                }
                Undo::Cuts(cuts)
            }
            Fault::OneWay => {
                let cuts = self.one_way(node);
                for (from, to) in &cuts {
                    self.world.cut_one_way(*from, *to);
                }
                Undo::Cuts(cuts)
            }
            Fault::Estrange => {
                let ways: Vec<_> = self.world.ids().into_iter().map(|from| (from, node)).collect();
                let lag = self.rng.range(150, 900) * MS;
                self.world.conditions.lags.extend(ways.iter().map(|w| (*w, lag)));
                self.world.remind(self.rng.range(100, 1_000) * MS, UNDO + self.undo.len() as u64);
                self.undo.push(Some(Undo::Mute(node)));
                Undo::Lags(ways)
            }
            Fault::Lag => {
                let ways = self.one_way(node);
                let lag = self.rng.range(20, 1_200) * MS;
                self.world.conditions.lags.extend(ways.iter().map(|w| (*w, lag)));
                Undo::Lags(ways)
            }
            Fault::Reset => {
                let to = *self.rng.pick(&self.world.ids());
                self.world.reset(node, to);
                if self.rng.permille(500) {
                    self.world.reset(to, node);
                }
                self.injected(fault);
                return;
            }
            Fault::Pause => {
                self.world.pause(node);
                Undo::Resume(node)
            }
            Fault::Kill if may_die => {
                let lost = self.world.kill(node);
                self.load.abandon(|k| lost.contains(k));
                Undo::Restart(node)
            }
            Fault::Outage if may_black_out => {
                // Power is gone, everywhere and at once.
                for node in alive {
                    let lost = self.world.kill(node);
                    self.load.abandon(|k| lost.contains(k));
                }
                self.stopping = None;
                Undo::RestartAll
            }
            Fault::Wipe if may_lose => {
                let lost = self.world.kill(node);
                self.load.abandon(|k| lost.contains(k));
                self.world.wipe(node);
                if self.rng.permille(200) {
                    self.world.change_mode(node);
                }
                Undo::Restart(node)
            }
            Fault::Enospc | Fault::Eio if self.stopping.is_none() && comes_back => {
                let error = if fault == Fault::Enospc { DiskError::NoSpace } else { DiskError::Sync };
                let states_only = self.rng.permille(300);
                self.world.break_disk(node, error, states_only);
                // Counted when it happens.
                self.world.trace.note(self.world.now(), format!("nemesis: {} for {} ms", fault.name(), length / MS));
                self.world.remind(length, UNDO + self.undo.len() as u64);
                self.undo.push(Some(Undo::Repair(node)));
                return;
            }
            Fault::BitFlip if may_rot => {
                self.world.flip_bit(node);
                if self.rng.permille(500) {
                    self.injected(fault);
                    return;
                }
                let lost = self.world.kill(node);
                self.load.abandon(|k| lost.contains(k));
                Undo::Restart(node)
            }
            Fault::Stop if may_lose => {
                self.world.stop(node);
                self.stopping = Some(node);
                Undo::Restart(node)
            }
            Fault::Voters => {
                // Of fewer than wanted, two could be gone at once.
                let approved = self.world.approved();
                let least = (self.world.options().replication as usize).max(3);
                let which = *self.rng.pick(&self.world.ids());
                let approve = !approved.contains(&which) || self.rng.permille(100);
                let at = *self.rng.pick(&alive);
                // Nor may two removals be under way.
                if approve || (approved.len() > least && self.world.changes_ended()) {
                    self.world.change_voters(at, which, approve);
                    self.injected(fault);
                }
                return;
            }
            Fault::Lie => {
                let leader = *self.rng.pick(&self.world.ids());
                let known = self.world.host(node).map_or(0, |h| h.view().shard(shard).map_or(0, |s| s.term.0));
                let term = Term(known + *self.rng.pick(&[0, 1, 3, 1_000_000]));
                self.world.gossip_lie(node, LeaderHint { shard, leader, term });
                self.injected(fault);
                return;
            }
            Fault::Kill | Fault::Stop | Fault::Wipe | Fault::Outage => return,
            Fault::Enospc | Fault::Eio | Fault::BitFlip => return,
            Fault::Transfer => {
                // Several at once, since one alone is over in a moment.
                for shard in self.world.shards() {
                    let to = *self.rng.pick(&self.world.ids());
                    if let Some(from) = self.world.leader(shard).filter(|_| self.rng.permille(500)) {
                        self.world.transfer(from, shard, to);
                    }
                }
                self.injected(fault);
                return;
            }
            Fault::Clock => {
                let far = *self.rng.pick(&[100, 10_000, 86_400_000]);
                let ms = self.rng.range(0, 2 * far) as i64 - far as i64;
                self.world.jump_wall(node, ms);
                self.injected(fault);
                return;
            }
            Fault::Lull => {
                self.load.active = false;
                Undo::Load
            }
            Fault::Gossip => {
                c.gossip = self.rng.permille(500).then_some((100 * MS, 6 * S));
                let to = *self.rng.pick(&alive);
                self.world.gossip_gone(to, node);
                Undo::Gossip
            }
        };
        self.injected(fault);
        self.world.trace.note(self.world.now(), format!("nemesis: {} for {} ms", fault.name(), length / MS));
        // A lull shorter than it takes to fall asleep would test nothing.
        // Nor would being estranged for less than an election.
        let length = if matches!(fault, Fault::Lull | Fault::Estrange) { length + 2 * S } else { length };
        self.world.remind(length, UNDO + self.undo.len() as u64);
        self.undo.push(Some(undo));
    }

    /// One direction: from a node to another, to all others, or from all others to it.
    fn one_way(&mut self, node: NodeId) -> Vec<(NodeId, NodeId)> {
        let ids = self.world.ids();
        match self.rng.below(3) {
            0 => vec![(node, *self.rng.pick(&ids))],
            1 => ids.into_iter().map(|to| (node, to)).collect(),
            _ => ids.into_iter().map(|from| (from, node)).collect(),
        }
    }

    /// Whether the cluster bears the loss of this node's memory: all others have theirs, or, while replicas move, enough of
    /// them.
    fn may_lose(&self, node: NodeId) -> bool {
        let others = || self.world.ids().into_iter().all(|n| n == node || self.world.whole(n));
        self.stopping.is_none()
            && self.world.host(node).is_some()
            && (others() || (self.faults.has(Fault::Voters) && self.world.bears_loss(node)))
    }

    /// Whether the cluster bears the end of all processes at once: all have their logs on disk, and at most one will find
    /// its own damaged.
    fn may_black_out(&self) -> bool {
        let ids = self.world.ids();
        let rotten: Vec<_> = ids.iter().copied().filter(|n| self.world.rotten(*n)).collect();
        ids.iter().all(|n| self.world.durable(*n)) && rotten.len() <= 1 && rotten.iter().all(|n| self.may_lose(*n))
    }

    fn injected(&mut self, fault: Fault) {
        *self.injected.entry(fault).or_default() += 1;
    }

    fn undo(&mut self, i: usize) {
        let calm = Conditions::default();
        let c = &mut self.world.conditions;
        match self.undo.get_mut(i).and_then(Option::take) {
            None => {}
            Some(Undo::Lost) => c.lost = 0,
            Some(Undo::Spikes) => c.spikes = 0,
            Some(Undo::Reordered) => {
                c.reordered = 0;
                c.delay = calm.delay;
            }
            Some(Undo::Duplicated) => c.duplicated = 0,
            Some(Undo::Full) => c.full = 0,
            Some(Undo::SlowDisk) => c.persist = None,
            Some(Undo::Stalled) => c.stalled = 0,
            Some(Undo::Mute(node)) if !self.calm => {
                let cuts: Vec<_> = self.world.ids().into_iter().map(|to| (node, to)).collect();
                cuts.iter().for_each(|(from, to)| self.world.cut_one_way(*from, *to));
                let length = self.rng.range(700, 2_500) * MS;
                self.world.remind(length, UNDO + self.undo.len() as u64);
                self.undo.push(Some(Undo::Cuts(cuts)));
            }
            Some(Undo::Mute(_)) => {}
            Some(Undo::Lags(ways)) => c.lags.retain(|w, _| !ways.contains(w)),
            Some(Undo::Gossip) => c.gossip = calm.gossip,
            Some(Undo::Cuts(cuts)) => cuts.iter().for_each(|(a, b)| self.world.heal_one_way(*a, *b)),
            Some(Undo::Resume(node)) => self.world.resume(node),
            Some(Undo::Restart(node)) => self.restart(node),
            Some(Undo::Repair(node)) => {
                if self.world.repair_disk(node) {
                    let lost = self.world.kill(node);
                    self.load.abandon(|k| lost.contains(k));
                }
                self.world.start(node);
            }
            Some(Undo::RestartAll) => self.world.ids().into_iter().for_each(|n| self.world.start(n)),
            Some(Undo::Load) => self.load.active = true,
        }
    }

    /// Starts a node again; one that is still about to stop has had its time.
    fn restart(&mut self, node: NodeId) {
        if self.stopping.take_if(|n| *n == node).is_some() {
            let lost = self.world.kill(node);
            self.load.abandon(|k| lost.contains(k));
        }
        self.world.start(node);
    }

    fn heal(&mut self) {
        self.world.trace.note(self.world.now(), "everything heals, the load ends".into());
        self.calm = true;
        for i in 0..self.undo.len() {
            self.undo(i);
        }
        self.load.active = false;
        self.world.conditions = Conditions::default();
        self.world.heal_cuts();
        for node in self.world.ids() {
            self.world.resume(node);
            self.world.start(node);
        }
    }

    // ---- after the faults --------------------------------------------------------------------------------------

    fn probe_all(&mut self, what: &str, within: u64) -> Result<(), ()> {
        let until = self.world.now() + within;
        let mut wanted: BTreeMap<(NodeId, ShardId), Option<usize>> = BTreeMap::new();
        for node in self.world.alive() {
            for shard in self.world.shards() {
                wanted.insert((node, shard), None);
            }
        }
        loop {
            for (&(node, shard), place) in &mut wanted {
                // Sent and waiting, or to be sent (again).
                if place.is_some_and(|p: usize| self.load.history()[p].ended.is_none()) {
                    continue;
                }
                let left = Duration::from_nanos(until.saturating_sub(self.world.now()));
                *place = self.load.probe(&mut self.world, node, shard, left);
            }
            let next = (self.world.now() + 50 * MS).min(until);
            self.go_on(next, |_| false)?;
            let history = self.load.history();
            wanted.retain(|_, place| !place.is_some_and(|p| history[p].ended == Some(Ended::Replied(Reply::Ok))));
            if wanted.is_empty() {
                return Ok(());
            }
            if self.world.now() >= until {
                let left: Vec<_> = wanted.keys().collect();
                let picture = self.picture();
                return self.fail(format!("not {what} within {} s: (gateway, shard) {left:?}\n{picture}", within / S));
            }
        }
    }

    fn final_reads(&mut self) -> Result<(), ()> {
        let keys = self.load.shared_keys();
        let alive = self.world.alive();
        let mut places = Vec::new();
        for (key, read) in keys {
            let gateway = *self.rng.pick(&alive);
            let conn = self.world.connect();
            places.push(self.load.send(&mut self.world, gateway, conn, &key, read, Duration::from_secs(2)));
        }
        let until = self.world.now() + 3 * S;
        let answered = |r: &Self| {
            places.iter().all(|p| p.is_some_and(|p| matches!(r.load.history()[p].ended, Some(Ended::Replied(_)))))
        };
        self.go_on(until, answered)?;
        if !answered(self) {
            let picture = self.picture();
            return self.fail(format!("not every key can be read after healing\n{picture}"));
        }
        Ok(())
    }

    fn caught_up(&self) -> bool {
        let groups = self.world.shards().into_iter().chain([ShardId::META]);
        groups.into_iter().all(|shard| {
            let states = self.world.holders(shard).into_iter().filter_map(|n| {
                let r = self.world.host(n)?.coordinator().replica(shard)?;
                Some((r.applied(), r.last_index(), r.committed()))
            });
            let states: Vec<_> = states.collect();
            states.windows(2).all(|w| w[0].0 == w[1].0 && w[0].1 == w[1].1)
                && states.iter().all(|(applied, _, committed)| applied == committed)
        })
    }

    /// Equal states sleep; asleep, they are still equal, and a write wakes them.
    fn sleep_and_wake(&mut self) -> Result<(), ()> {
        let whole = |r: &Self, s: ShardId| r.world.holders(s).len() == r.world.options().replication as usize;
        let asleep = move |r: &Self| {
            r.world.shards().into_iter().all(|s| {
                whole(r, s) && {
                    r.world
                        .holders(s)
                        .into_iter()
                        .all(|n| r.world.host(n).and_then(|h| h.coordinator().replica(s)).is_some_and(|x| x.asleep()))
                }
            })
        };
        self.reach(ASLEEP_WITHIN, "quiet groups sleep", asleep)?;
        for shard in self.world.shards() {
            let replicas: Vec<_> = self
                .world
                .holders(shard)
                .into_iter()
                .filter_map(|n| {
                    let r = self.world.host(n)?.coordinator().replica(shard)?;
                    Some((n, r.applied(), r.digest()))
                })
                .collect();
            if replicas.windows(2).any(|w| (w[0].1, w[0].2) != (w[1].1, w[1].2)) {
                return self.fail(format!("replicas of {shard:?} differ: {replicas:?}"));
            }
        }
        self.probe_all("writable after sleep", AWAKE_WITHIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::pool;

    fn plan(seed: u64) -> Plan {
        Plan {
            seed,
            nodes: None,
            shards: None,
            faults: Faults::all(),
            always: false,
            reads: None,
            mutant: None,
            history: false,
        }
    }

    /// Seeds of the ordinary test run: about half a minute. Long runs are for the command line.
    const SEEDS: std::ops::Range<u64> = 0..500;

    #[test]
    fn a_fixed_budget_of_seeds_holds() {
        let mut answered = 0;
        let mut local = 0;
        let mut failed = None;
        pool::run(SEEDS.map(plan), pool::default_jobs(), |report| {
            answered += report.outcomes[0];
            local += report.local_reads;
            failed = Some(report).filter(|r| !r.failures.is_empty());
            failed.is_none()
        });
        assert!(failed.is_none(), "{}", failed.map_or(String::new(), |r| r.describe()));
        assert!(
            answered > 100_000 && local > 10_000,
            "the workload works: {answered} answers, {local} outside of a driver"
        );
    }

    #[test]
    fn the_same_seed_is_the_same_run() {
        for seed in [1, 2] {
            let (a, b) = (run_seed(&plan(seed)), run_seed(&plan(seed)));
            assert_eq!(a.trace, b.trace, "seed {seed}");
            assert_eq!((a.simulated, a.ops, a.outcomes), (b.simulated, b.ops, b.outcomes));
        }
        assert_ne!(run_seed(&plan(1)).trace, run_seed(&plan(3)).trace);
    }
}
