//! How a node finds out why groups have no leader, and founds anew what an operator gives up: see [`crate::recovery`].
//!
//! ```text
//!   every LOOK: groups without a leader for LEADERLESS --TakeCensus--> live peers --Census--> Down of each, for the view
//!
//!   recover:  census --> commanding (meta group leads) --table changed------------------------> settling --> result
//!                   \--> proposing (meta group lost)  --all accepted, all live, in time: adopt--/
//! ```
//!
//! Why one generation has one table. A record becomes active only at its proposer, only within [`PROPOSAL`] of its proposal
//! and with the acceptance of every node that the census has reached, all of which still answer; and whoever has accepted one
//! accepts none of anybody else for [`LOCK`], which is longer, and none of that generation while its process lives. Who was
//! not reached is a node that was stopped by the operator's word, or holds nothing of the groups.

use super::Host;
use crate::effect::{Note, Refusal};
use crate::founding::record_hash;
use crate::message::Control;
use crate::meta::{MetaCommand, MetaState, NO_LIFE, Recovery, Refounding};
use crate::recovery::{Census, GroupReport, Hope, LostGroup, RecoverRequest, Recovered, Report};
use crate::router::Down;
use crema_core::{Epoch, Incarnation, MonoTime, NodeId, Now, ShardId, Term};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Most groups without a leader that one look writes into the log.
const MOST_TOLD: usize = 4;
/// Period of looking for groups without a leader.
const LOOK: Duration = Duration::from_secs(1);
/// A group without a leader for this long does not merely elect one.
const LEADERLESS: Duration = Duration::from_secs(2);
/// A census waits so long for answers.
const ANSWERS: Duration = Duration::from_secs(2);
/// A record is active within so long of its proposal, or never.
const PROPOSAL: Duration = Duration::from_secs(3);
/// Who has accepted a record accepts no other for so long.
const LOCK: Duration = Duration::from_secs(10);
/// The meta group's leader has so long to do what it is asked for.
const COMMAND: Duration = Duration::from_secs(10);
/// What was founded anew has so long to find its leaders, before the result says that it has not.
const SETTLE: Duration = Duration::from_secs(10);

/// What a node knows about groups without a leader, and is doing about them.
#[derive(Default)]
pub(super) struct Recovering {
    next_look: MonoTime,
    /// Groups whose leader by hearsay was said not to lead, and in which term that was: the same hearsay does not count.
    doubts: BTreeMap<ShardId, Term>,
    /// Groups without a leader, and since when.
    since: BTreeMap<ShardId, MonoTime>,
    round: u64,
    asked: Vec<ShardId>,
    /// The last answer of each node: its life, the round, and what it says.
    reports: BTreeMap<NodeId, (Incarnation, u64, Report)>,
    /// The newest table in those answers, where it is newer than this node's.
    newer: Option<Arc<MetaState>>,
    down: BTreeMap<ShardId, Down>,
    task: Option<Task>,
    lock: Option<Lock>,
}

/// The record that was accepted last.
struct Lock {
    hash: u64,
    proposer: (NodeId, Incarnation),
    generation: u32,
    until: MonoTime,
}

/// A recovery on its way.
struct Task {
    request: RecoverRequest,
    since: MonoTime,
    phase: Phase,
    result: Recovered,
}

enum Phase {
    Census(u64),
    /// The leader of the meta group is asked, until these groups have other epochs.
    Commanding {
        command: MetaCommand,
        targets: Vec<(ShardId, Epoch)>,
    },
    /// These nodes are asked to accept a record.
    Proposing {
        record: Vec<u8>,
        state: Box<MetaState>,
        peers: BTreeMap<NodeId, Incarnation>,
        accepted: BTreeSet<NodeId>,
    },
    /// These groups elect.
    Settling(Vec<ShardId>),
}

impl Host {
    /// Begins to recover what has lost its majority, or to say what that would be; the result comes with
    /// [`crate::Effects::recoveries`]. One at a time.
    pub fn recover(&mut self, now: Now, request: RecoverRequest) {
        if self.recovering.task.is_some() {
            return self.out.recoveries.push((request.id, Err("a recovery is under way at this node".to_owned())));
        }
        if self.state.is_none() && self.config.uuid.is_none() {
            let why = format!("there is nothing to recover: {}", self.founding.waiting_for());
            return self.out.recoveries.push((request.id, Err(why)));
        }
        // Whatever hearsay says of them. To ask about a group is to say that one does not lead it.
        let groups = self.state.iter().flat_map(|s| s.groups()).filter(|s| !self.leads(*s)).collect();
        let round = self.take_census(groups);
        let (since, phase) = (now.mono, Phase::Census(round));
        self.recovering.task = Some(Task { request, since, phase, result: Recovered::default() });
    }

    /// Why a request for the shard cannot be executed before an operator has decided something.
    pub(super) fn refusal_of_lost(&self, shard: ShardId) -> Option<Refusal> {
        self.recovering.down.get(&shard).filter(|d| d.lost).map(|_| Refusal::Lost(shard))
    }

    /// What is known of a group's leader has changed.
    pub(super) fn look_at_down(&mut self, shard: ShardId) {
        if !self.is_leaderless(shard) {
            self.recovering.down.remove(&shard);
        }
    }

    /// Somebody who ought to know says that the leader by hearsay does not lead.
    pub(super) fn doubt(&mut self, shard: ShardId) {
        let term = self.router.claim(shard).term;
        self.recovering.doubts.insert(shard, term);
    }

    /// Why a group has no leader, if that has lasted.
    pub(super) fn down(&self, shard: ShardId) -> Option<&Down> {
        self.recovering.down.get(&shard)
    }

    /// A sentence on the groups without a leader, for whoever asks why the node is not ready.
    pub(super) fn down_in_words(&self) -> Option<String> {
        let down = &self.recovering.down;
        let worst = down.values().find(|d| d.lost).or_else(|| down.values().next())?;
        let more = down.len() - 1;
        let more = if more == 0 { String::new() } else { format!(" ({more} more like it)") };
        let hint = if worst.lost { "; `crema recover` says what can be done" } else { "" };
        Some(format!("{}{more}{hint}", worst.reason))
    }

    fn leads(&self, shard: ShardId) -> bool {
        self.coordinator.replica(shard).is_some_and(|r| r.leadership().leads)
    }

    fn is_leaderless(&self, shard: ShardId) -> bool {
        let claim = self.router.claim(shard);
        claim.leader.is_none() || self.recovering.doubts.get(&shard).is_some_and(|at| *at >= claim.term)
    }

    fn leaderless(&self) -> Vec<ShardId> {
        // Whoever leads the meta group would have registered this life.
        let unregistered =
            |s: &MetaState| s.nodes.get(&self.config.node).is_none_or(|r| r.incarnation != self.config.incarnation);
        let meta = self.state.as_ref().is_some_and(|s| unregistered(s));
        let groups = self.state.iter().flat_map(|s| s.groups());
        groups.filter(|s| self.is_leaderless(*s) || s.is_meta() && meta).collect()
    }

    /// Once a tick.
    pub(super) fn keep_recovering(&mut self, now: Now) {
        if now.mono >= self.recovering.next_look {
            self.recovering.next_look = now.mono.after(LOOK);
            self.look_for_leaderless(now);
        }
        if let Some(task) = self.recovering.task.take() {
            self.go_on(task, now);
        }
    }

    fn look_for_leaderless(&mut self, now: Now) {
        let leaderless = self.leaderless();
        let before = std::mem::take(&mut self.recovering.since);
        self.recovering.since = leaderless.iter().map(|s| (*s, before.get(s).copied().unwrap_or(now.mono))).collect();
        let old: Vec<ShardId> = self
            .recovering
            .since
            .iter()
            .filter(|(_, at)| now.mono.since(**at) >= LEADERLESS)
            .map(|(s, _)| *s)
            .collect();
        let mut down = BTreeMap::new();
        if !old.is_empty() {
            // What the round before has brought together, then the next round.
            let fresh = self.recovering.round;
            let known: Vec<ShardId> =
                old.iter().filter(|s| self.recovering.asked.binary_search(s).is_ok()).copied().collect();
            if fresh > 0 && !known.is_empty() {
                let own = self.report(&self.recovering.asked, (0, Epoch(0)));
                let mut led = Vec::new();
                self.with_census(own, fresh.saturating_sub(1), &BTreeSet::new(), |census| {
                    for shard in known {
                        let hope = census.hope(shard);
                        if census.leads(shard).is_some() {
                            led.push(shard);
                        }
                        if let Some(reason) = hope.in_words(&name(shard)) {
                            let lost = matches!(hope, Hope::Lost { .. });
                            down.insert(shard, Down { lost, reason: reason.into() });
                        }
                    }
                });
                for shard in led {
                    self.recovering.doubts.remove(&shard);
                }
            }
            // A recovery's own census asks for all groups, and its answers must not be replaced by those for a few.
            if !matches!(&self.recovering.task, Some(t) if matches!(t.phase, Phase::Census(_))) {
                self.take_census(leaderless);
            }
        } else if self.recovering.task.is_none() {
            self.recovering.reports.clear();
            self.recovering.newer = None;
        }
        if down != self.recovering.down {
            let news = || down.iter().filter(|(shard, d)| self.recovering.down.get(shard) != Some(*d));
            for (_, d) in news().take(MOST_TOLD) {
                tracing::warn!(lost = d.lost, "{}", d.reason);
            }
            if let Some(more) = news().count().checked_sub(MOST_TOLD).filter(|more| *more > 0) {
                tracing::warn!("and {more} groups more have no leader");
            }
            self.recovering.down = down;
            self.view_stale = true;
        }
    }

    /// Asks every live peer what it knows of these groups.
    fn take_census(&mut self, groups: Vec<ShardId>) -> u64 {
        self.recovering.round += 1;
        let round = self.recovering.round;
        self.recovering.asked.clone_from(&groups);
        let version = self.state.as_ref().map_or((0, Epoch(0)), |s| s.version());
        self.control_to_all(&Control::TakeCensus { round, version, groups });
        round
    }

    /// What this node knows; its table only where it is newer than `version`.
    fn report(&self, groups: &[ShardId], version: (u32, Epoch)) -> Report {
        let state = self.state.as_ref();
        let group = |shard: &ShardId| {
            let claim = self.router.claim(*shard);
            let replica = self.coordinator.replica(*shard);
            GroupReport {
                shard: *shard,
                // What it has heard of others they can say themselves.
                led: replica.is_some_and(|r| r.leadership().leads),
                term: claim.term.max(replica.map_or(Term(0), |r| r.leadership().term)),
                failed: replica.is_some_and(|r| r.failed()),
                replica: replica.and_then(|r| r.report()),
            }
        };
        Report {
            uuid: state.map(|s| s.uuid).or(self.config.uuid),
            // One that was accepted may be active somewhere, and its ids in use.
            generation: self.known_generation().max(self.recovering.lock.as_ref().map_or(0, |l| l.generation)),
            epoch: self.epoch(),
            state: state.filter(|s| s.version() > version).map(|s| s.encode()),
            addrs: self.config.addrs.clone(),
            max_memory: self.config.memory.max_memory,
            holds: match state {
                Some(_) => 0,
                None => self.coordinator.replicas().filter(|r| !r.is_empty() && !r.failed()).count() as u32,
            },
            groups: groups.iter().map(group).collect(),
        }
    }

    fn known_generation(&self) -> u32 {
        self.state.as_ref().map_or(0, |s| s.generation).max(self.config.generation)
    }

    /// Shows a census: own report, and those of the peers that are live and have answered the round `since` or a later one.
    fn with_census<R>(
        &self,
        own: Report,
        since: u64,
        stopped: &BTreeSet<NodeId>,
        f: impl FnOnce(&Census<'_>) -> R,
    ) -> Option<R> {
        let state = self.recovering.newer.as_ref().or(self.state.as_ref())?;
        let fresh = self.recovering.reports.iter().filter(|(node, (life, at, _))| {
            let same = self.state.as_ref().is_none_or(|s| s.uuid == state.uuid);
            same && *at >= since && self.is_usable(**node, *life)
        });
        let mut reports: BTreeMap<NodeId, (Incarnation, &Report)> =
            fresh.map(|(node, (life, _, report))| (*node, (*life, report))).collect();
        reports.insert(self.config.node, (self.config.incarnation, &own));
        Some(f(&Census { state, reports, stopped: stopped.clone() }))
    }

    // ---- what peers say ----------------------------------------------------------------------------------------

    /// Takes what has to do with census and recovery; gives the rest back.
    pub(super) fn take_recovery(
        &mut self,
        now: Now,
        from: NodeId,
        incarnation: Incarnation,
        c: Control,
    ) -> Option<Control> {
        match c {
            Control::TakeCensus { round, version, groups } => {
                for shard in &groups {
                    // It has led, and does not any more.
                    if self.router.claim(*shard).leader == Some(from) {
                        self.doubt(*shard);
                    }
                }
                let report = Box::new(self.report(&groups, version));
                self.control(from, &Control::Census { round, report });
            }
            Control::Census { round, report } => self.take_report(from, incarnation, round, *report),
            Control::Refound { command } => {
                if let Ok(MetaCommand::Refound { groups, stopped }) = MetaCommand::decode(&command)
                    && let Err(reason) = self.refound(groups, stopped)
                {
                    self.control(from, &Control::RefoundRefused { reason });
                }
            }
            Control::RefoundRefused { reason } => {
                if matches!(&self.recovering.task, Some(t) if matches!(t.phase, Phase::Commanding { .. })) {
                    self.end_recovery(Err(format!("node {from}, which leads the meta group: {reason}")));
                }
            }
            Control::ProposeRecovery { record } => {
                let hash = record_hash(&record);
                let answer = match self.consider_recovery((from, incarnation), &record, now) {
                    Ok(()) => Control::AcceptRecovery { hash },
                    Err(reason) => Control::RefuseRecovery { hash, reason },
                };
                self.control(from, &answer);
            }
            Control::AcceptRecovery { hash } => {
                if let Some(Task { phase: Phase::Proposing { record, peers, accepted, .. }, .. }) =
                    &mut self.recovering.task
                    && record_hash(record) == hash
                    && peers.get(&from) == Some(&incarnation)
                {
                    accepted.insert(from);
                }
            }
            Control::RefuseRecovery { hash, reason } => {
                let mine = matches!(
                    &self.recovering.task,
                    Some(Task { phase: Phase::Proposing { record, .. }, .. }) if record_hash(record) == hash
                );
                if mine {
                    self.end_recovery(Err(format!("node {from} does not agree: {reason}")));
                }
            }
            other => return Some(other),
        }
        None
    }

    fn take_report(&mut self, from: NodeId, incarnation: Incarnation, round: u64, mut report: Report) {
        let sorted = report.groups.windows(2).all(|w| w[0].shard < w[1].shard);
        if !sorted || round > self.recovering.round || round == 0 {
            return;
        }
        let mine = self.recovering.newer.as_ref().or(self.state.as_ref());
        let version = mine.map_or((0, Epoch(0)), |s| s.version());
        let decoded = report.state.take().and_then(|bytes| MetaState::decode(&bytes).ok());
        let fits = |s: &MetaState| {
            let uuid = self.state.as_ref().map(|s| s.uuid).or(self.config.uuid);
            let shards = self.state.as_ref().is_none_or(|m| m.shards.len() == s.shards.len());
            s.version() > version && uuid == Some(s.uuid) && shards && s.check().is_ok()
        };
        if let Some(state) = decoded.filter(fits) {
            self.recovering.newer = Some(Arc::new(state));
        }
        self.recovering.reports.insert(from, (incarnation, round, report));
    }

    /// Asked, where this node leads the meta group, to found groups anew.
    fn refound(&mut self, groups: Vec<Refounding>, stopped: Vec<(NodeId, Incarnation)>) -> Result<(), String> {
        if !self.leads_meta() {
            // Whoever leads is asked again.
            return Ok(());
        }
        if let Some((node, _)) = stopped.iter().find(|(node, _)| self.is_live(*node)) {
            return Err(format!("node {node} was said to be stopped, but it answers"));
        }
        if let Some(group) = groups.iter().find(|g| self.leads(g.shard)) {
            return Err(format!("{} has a leader here", name(group.shard)));
        }
        self.coordinator.meta_command(MetaCommand::Refound { groups, stopped }.encode().into());
        Ok(())
    }

    /// Whether to accept a table of the next generation.
    fn consider_recovery(&mut self, proposer: (NodeId, Incarnation), record: &[u8], now: Now) -> Result<(), String> {
        let state = MetaState::decode(record).map_err(|e| format!("the record does not decode: {e}"))?;
        state.check()?;
        self.recovery_objection(proposer, &state, record_hash(record), now)?;
        let (hash, generation) = (record_hash(record), state.generation);
        self.recovering.lock = Some(Lock { hash, proposer, generation, until: now.mono.after(LOCK) });
        Ok(())
    }

    fn recovery_objection(
        &self,
        proposer: (NodeId, Incarnation),
        state: &MetaState,
        hash: u64,
        now: Now,
    ) -> Result<(), String> {
        let uuid = self.state.as_ref().map(|s| s.uuid).or(self.config.uuid);
        if uuid.is_some_and(|mine| mine != state.uuid) || state.cluster != self.config.cluster {
            return Err("I belong to another cluster".to_owned());
        }
        // A founding that its proposer takes part in cannot end any more: that one knows its cluster, and accepts none.
        let members = &self.config.initial_members;
        if self.state.is_none()
            && uuid.is_none()
            && members.contains(&self.config.node)
            && !members.contains(&proposer.0)
        {
            return Err("I am founding another cluster".to_owned());
        }
        let known = self.known_generation();
        let accepted = self.recovering.lock.as_ref().filter(|l| l.hash != hash).map_or(0, |l| l.generation);
        let known = known.max(accepted);
        if state.generation <= known {
            return Err(format!("I know generation {known}, and am asked to accept {}", state.generation));
        }
        if self.state.as_ref().is_some_and(|mine| mine.shards.len() != state.shards.len()) {
            return Err("the number of shards differs".to_owned());
        }
        if state.nodes.get(&self.config.node).map(|n| n.incarnation) != Some(self.config.incarnation) {
            return Err("the record names another life of me".to_owned());
        }
        let settles = matches!(&self.recovering.task, Some(t) if matches!(t.phase, Phase::Settling(_)));
        if settles && proposer.0 != self.config.node {
            return Err("I am recovering it: try again in a moment".to_owned());
        }
        let lock = self.recovering.lock.as_ref().filter(|l| l.until > now.mono);
        if let Some(lock) = lock.filter(|l| l.hash != hash && l.proposer != proposer) {
            let left = lock.until.since(now.mono).as_secs() + 1;
            return Err(format!("I have accepted another record, of node {}: try again in {left} s", lock.proposer.0));
        }
        let anew = |s: &ShardId| {
            let begins = state.refounded(*s);
            begins.is_some() && begins != self.state.as_ref().and_then(|mine| mine.refounded(*s))
        };
        if let Some(led) = state.groups().filter(anew).find(|s| self.leads(*s)) {
            return Err(format!("{} has a leader here", name(led)));
        }
        Ok(())
    }

    // ---- the recovery of this node -----------------------------------------------------------------------------

    fn end_recovery(&mut self, result: Result<Recovered, String>) {
        if let Some(task) = self.recovering.task.take() {
            self.out.recoveries.push((task.request.id, result));
        }
    }

    fn go_on(&mut self, task: Task, now: Now) {
        let waited = now.mono.since(task.since);
        let id = task.request.id;
        let ended = match task.phase {
            Phase::Census(round) => {
                let answered = |(node, p): (&NodeId, &super::Peer)| {
                    self.recovering
                        .reports
                        .get(node)
                        .is_some_and(|(life, at, _)| *life == p.incarnation && *at >= round)
                };
                let all = self.peers.iter().filter(|(_, p)| p.live_since.is_some()).all(answered);
                match all || waited >= ANSWERS {
                    true => {
                        // What the plan has to send goes at once.
                        self.next_ask = now.mono;
                        self.plan(task.request, round, now)
                    }
                    false => Ok(Some(task)),
                }
            }
            Phase::Commanding { command, targets } => {
                let changed = |(shard, epoch): &(ShardId, Epoch)| {
                    self.state.as_ref().is_some_and(|s| s.epoch_of(*shard) != *epoch)
                };
                if targets.iter().all(changed) {
                    let groups = targets.iter().map(|(shard, _)| *shard).collect();
                    Ok(Some(Task { phase: Phase::Settling(groups), since: now.mono, ..task }))
                } else if waited >= COMMAND {
                    Err("the meta group has not answered: its outcome is unknown, look again".to_owned())
                } else {
                    Ok(Some(Task { phase: Phase::Commanding { command, targets }, ..task }))
                }
            }
            Phase::Proposing { record, state, peers, accepted } => {
                let gone = peers.iter().find(|(node, life)| !self.is_usable(**node, **life));
                if state.generation <= self.known_generation() {
                    Err("somebody else has recovered it meanwhile: look again".to_owned())
                } else if let Some((node, _)) = gone {
                    Err(format!("node {node} went away meanwhile: nothing was changed, try again"))
                } else if waited >= PROPOSAL {
                    let silent: Vec<String> =
                        peers.keys().filter(|n| !accepted.contains(n)).map(NodeId::to_string).collect();
                    let silent = silent.join(", ");
                    Err(format!("node {silent} did not answer in time: nothing was changed, try again"))
                } else if accepted.len() == peers.len() {
                    let groups: Vec<ShardId> = task.result.lost.iter().map(|l| l.shard).collect();
                    self.adopt_recovered(Arc::new(*state), now);
                    Ok(Some(Task { phase: Phase::Settling(groups), since: now.mono, ..task }))
                } else {
                    Ok(Some(Task { phase: Phase::Proposing { record, state, peers, accepted }, ..task }))
                }
            }
            Phase::Settling(groups) => {
                let unfinished: Vec<ShardId> = groups.iter().filter(|s| self.is_leaderless(**s)).copied().collect();
                if unfinished.is_empty() || waited >= SETTLE {
                    self.out.recoveries.push((id, Ok(Recovered { done: true, unfinished, ..task.result })));
                    Ok(None)
                } else {
                    Ok(Some(Task { phase: Phase::Settling(groups), ..task }))
                }
            }
        };
        match ended {
            Ok(task) => self.recovering.task = task,
            Err(why) => self.out.recoveries.push((id, Err(why))),
        }
    }

    /// Sends again what may have been lost; called as often as anything is asked for.
    pub(super) fn repeat_recovery(&mut self) {
        let Some(task) = &self.recovering.task else { return };
        match &task.phase {
            Phase::Commanding { command, .. } => {
                let command = command.encode();
                if !self.leads_meta() {
                    // To all, since whom this node takes for the leader may be hearsay; the one that leads does it.
                    self.control_to_all(&Control::Refound { command });
                } else if let Ok(MetaCommand::Refound { groups, stopped }) = MetaCommand::decode(&command)
                    && let Err(reason) = self.refound(groups, stopped)
                {
                    self.end_recovery(Err(reason));
                }
            }
            Phase::Proposing { record, peers, accepted, .. } => {
                let c = Control::ProposeRecovery { record: record.clone() };
                let to: Vec<NodeId> = peers.keys().filter(|n| !accepted.contains(n)).copied().collect();
                to.into_iter().for_each(|node| self.control(node, &c));
            }
            Phase::Census(_) | Phase::Settling(_) => {}
        }
    }

    /// The census is there: what is to be done.
    fn plan(&mut self, request: RecoverRequest, round: u64, now: Now) -> Result<Option<Task>, String> {
        let own = self.report(&self.recovering.asked, (0, Epoch(0)));
        let uuid = own.uuid;
        let others = self
            .recovering
            .reports
            .iter()
            .filter(|(node, (life, at, _))| *at >= round && self.is_usable(**node, *life));
        if let Some((node, _)) = others.clone().find(|(_, (.., r))| r.uuid.is_some() && r.uuid != uuid) {
            return Err(format!("node {node} belongs to another cluster"));
        }
        let generation = others.clone().map(|(_, (.., r))| r.generation).max().unwrap_or(0).max(own.generation);
        let epoch = others.clone().map(|(_, (.., r))| r.epoch).max().unwrap_or_default().max(own.epoch);
        let me = (self.config.node, own.holds);
        let holds = others.clone().map(|(node, (.., r))| (*node, r.holds)).chain([me]).find(|(_, holds)| *holds > 0);
        let mut nodes: Vec<_> =
            others.map(|(node, (life, _, r))| (*node, *life, r.addrs.clone(), r.max_memory)).collect();
        nodes.push((self.config.node, self.config.incarnation, own.addrs.clone(), own.max_memory));
        let stopped: BTreeSet<NodeId> = request.stopped.iter().copied().collect();
        if let Some(node) = stopped.iter().find(|n| self.is_live(**n)) {
            return Err(format!("node {node} was said to be stopped, but it answers"));
        }
        if self.state.is_none() {
            if self.recovering.newer.is_some() {
                return Err("this node is joining: try again in a moment".to_owned());
            }
            // To found the cluster once more would destroy them.
            if let Some((node, holds)) = holds {
                return Err(format!(
                    "nobody here has the cluster's table, but node {node} has {holds} replicas: start a node that has the \
                     table; or, to give them up, move the data directory of node {node} away and start it again"
                ));
            }
            return self.plan_anew(request, &nodes, generation, epoch, now);
        }
        let groups = self.recovering.asked.clone();
        let found = self.with_census(own, round, &stopped, |census| {
            let mut result = Recovered::default();
            let mut refound = Vec::new();
            let mut meta_lost = false;
            for shard in groups {
                match census.hope(shard) {
                    Hope::Election => {}
                    ref hope @ Hope::Waiting { ref missing } => {
                        result.missing.extend(missing.iter().map(|(node, _)| *node));
                        result.waiting.extend(hope.in_words(&name(shard)).map(|why| (shard, why)));
                    }
                    ref hope @ Hope::Lost { best, .. } => {
                        // The table is whose that proposes it; what nobody can begin is left as it is.
                        let refounding = census.refounding(shard, best);
                        let founder =
                            if shard.is_meta() { Some(self.config.node) } else { refounding.map(|r| r.founder) };
                        let reason = hope.in_words(&name(shard)).unwrap_or_default();
                        let keeps_data = shard.is_meta() || best.is_some();
                        result.lost.push(LostGroup { shard, reason, founder, keeps_data });
                        meta_lost |= shard.is_meta();
                        refound.extend(refounding.map(|r| Refounding { founder: founder.unwrap_or(r.founder), ..r }));
                    }
                }
            }
            let lives: Vec<(NodeId, Incarnation)> = stopped
                .iter()
                .filter_map(|n| Some((*n, census.state.nodes.get(n)?.incarnation)))
                .filter(|(_, life)| *life != NO_LIFE)
                .collect();
            (result, refound, meta_lost, lives, census.state.clone())
        });
        let Some((mut result, refound, meta_lost, lives, base)) = found else {
            return Err("this node knows no table".to_owned());
        };
        if meta_lost {
            result.generation = Some(base.generation.max(generation).saturating_add(1));
        }
        if !request.accept_data_loss || refound.is_empty() {
            self.out.recoveries.push((request.id, Ok(result)));
            return Ok(None);
        }
        if !meta_lost {
            if self.router.claim(ShardId::META).leader.is_none() {
                let why = result.waiting.iter().find(|(s, _)| s.is_meta()).map(|(_, why)| why.clone());
                let why = why.unwrap_or_else(|| "the meta group is electing a leader: try again".to_owned());
                return Err(format!("shards can be founded anew only with the meta group: {why}"));
            }
            let targets = refound.iter().map(|r| (r.shard, r.epoch)).collect();
            let command = MetaCommand::Refound { groups: refound, stopped: lives };
            let phase = Phase::Commanding { command, targets };
            return Ok(Some(Task { request, since: now.mono, phase, result }));
        }
        // Its proposer begins the meta group. One that placement does not give it to would take it away from others; and while
        // that one is away, nobody could tell whether its table is active.
        let placed: Vec<NodeId> = base.meta.iter().map(|r| r.node).collect();
        let here: Vec<NodeId> = placed.iter().copied().filter(|p| nodes.iter().any(|(n, ..)| n == p)).collect();
        if let Some(node) = here.first().filter(|_| !placed.contains(&self.config.node)) {
            return Err(format!("this node has no replica of the meta group: ask node {node} to recover it"));
        }
        let base = MetaState { generation: base.generation.max(generation), ..base };
        self.propose(request, base, &nodes, &lives, &refound, epoch, result, now)
    }

    /// Nobody knows a table, so nothing is left of the cluster: it is founded once more, under its old identity.
    fn plan_anew(
        &mut self,
        request: RecoverRequest,
        nodes: &[(NodeId, Incarnation, crate::meta::NodeAddrs, u64)],
        generation: u32,
        epoch: Epoch,
        now: Now,
    ) -> Result<Option<Task>, String> {
        let Some(uuid) = self.config.uuid else { return Err("this node knows no cluster".to_owned()) };
        let (members, stopped) = (&self.config.initial_members, &request.stopped);
        let here: Vec<_> = nodes
            .iter()
            .filter(|(node, ..)| members.contains(node))
            .map(|(node, life, addrs, _)| (*node, *life, addrs.clone()))
            .collect();
        let missing: BTreeSet<NodeId> = members
            .iter()
            .filter(|m| !here.iter().any(|(node, ..)| node == *m) && !stopped.contains(m))
            .copied()
            .collect();
        let mut result = Recovered { anew: true, missing, ..Recovered::default() };
        if !result.missing.is_empty() || !here.iter().any(|(node, ..)| *node == self.config.node) {
            if !request.accept_data_loss {
                self.out.recoveries.push((request.id, Ok(result)));
                return Ok(None);
            }
            if result.missing.is_empty() {
                return Err("ask an initial member of the cluster".to_owned());
            }
            let missing: Vec<String> = result.missing.iter().map(NodeId::to_string).collect();
            return Err(format!(
                "nothing is left of the cluster here, but node {} may have something: start it, or name it as stopped",
                missing.join(", ")
            ));
        }
        let c = &self.config;
        let (secret, shards, replicas) = (c.entropy[2], c.shards, c.replication);
        let base = MetaState::found(uuid, c.cluster.clone(), secret, now.wall, &here, shards, replicas);
        let begin = |shard: ShardId| {
            let founder = if shard.is_meta() { Some(c.node) } else { base.replicas(shard).first().map(|r| r.node) };
            Refounding {
                shard,
                epoch: Epoch(0),
                founder: founder.unwrap_or(c.node),
                index: Default::default(),
                term: self.router.claim(shard).term,
            }
        };
        let refound: Vec<Refounding> = base.groups().map(begin).collect();
        let reason = "nothing is left of it".to_owned();
        result.lost = refound
            .iter()
            .map(|r| LostGroup { shard: r.shard, reason: reason.clone(), founder: Some(r.founder), keeps_data: false })
            .collect();
        let base = MetaState { generation: generation.max(1), ..base };
        result.generation = Some(base.generation.saturating_add(1));
        if !request.accept_data_loss {
            self.out.recoveries.push((request.id, Ok(result)));
            return Ok(None);
        }
        self.propose(request, base, nodes, &[], &refound, epoch, result, now)
    }

    #[allow(clippy::too_many_arguments)]
    fn propose(
        &mut self,
        request: RecoverRequest,
        base: MetaState,
        nodes: &[(NodeId, Incarnation, crate::meta::NodeAddrs, u64)],
        stopped: &[(NodeId, Incarnation)],
        groups: &[Refounding],
        epoch: Epoch,
        result: Recovered,
        now: Now,
    ) -> Result<Option<Task>, String> {
        let recovery =
            Recovery { at: now.wall, anew: result.anew, mark: self.config.entropy[0] ^ self.recovering.round };
        let state = base.recovered(nodes, stopped, groups, epoch, recovery)?;
        let me = (self.config.node, self.config.incarnation);
        let record = state.encode();
        self.consider_recovery(me, &record, now)?;
        let peers = nodes.iter().filter(|(node, ..)| *node != me.0).map(|(node, life, ..)| (*node, *life)).collect();
        let (state, accepted) = (Box::new(state), BTreeSet::new());
        let phase = Phase::Proposing { record, state, peers, accepted };
        Ok(Some(Task { request, since: now.mono, phase, result }))
    }

    fn adopt_recovered(&mut self, state: Arc<MetaState>, now: Now) {
        tracing::warn!(generation = state.generation, epoch = %state.epoch, "the meta group is founded anew here");
        if self.state.is_none() {
            return self.join(state, false, true, now);
        }
        self.adopt(state, true, now);
        self.retarget_all(now);
    }

    /// A table of a later generation than before: for the log, and for what the shell keeps.
    pub(super) fn note_generation(&mut self, before: &MetaState, state: &MetaState) {
        if before.generation < state.generation {
            let (uuid, generation) = (state.uuid, state.generation);
            let anew = state.recovery.is_some_and(|r| r.anew);
            self.out.notes.push(Note::Joined { uuid, generation, founded: false, anew });
        }
    }
}

fn name(shard: ShardId) -> String {
    if shard.is_meta() { "the meta group".to_owned() } else { format!("shard {shard}") }
}
