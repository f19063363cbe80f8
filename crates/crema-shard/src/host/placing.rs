//! Who may hold replicas, and how the groups follow: the consensus tier of membership. Gossip has no say in it.
//!
//! ```text
//!   operator, any node --Approve--> meta leader --objection? --MetaCommand::Approve--> table of approved nodes
//!   meta leader: Plan of the table, against the table --a few at a time--> MetaCommand::Place: intent of a group
//!   group's leader: fact follows intent, see `members` --Settled--> meta leader --MetaCommand::Settled--> next ones
//! ```
//!
//! All of it stands in the meta group's log, so that any leader goes on where the one before it stopped. Every command says
//! what it was decided upon and is void otherwise. A move is taken back by the opposite wish: groups that have not arrived
//! turn round, others move back.

use super::Host;
use crate::effect::Note;
use crate::message::Control;
use crate::meta::{MetaCommand, MetaState, NO_LIFE};
use crate::placement::Plan;
use crema_core::{Epoch, MonoTime, NodeId, Now, ReplicaId, ShardId};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

/// Most groups that move at a time: what moves is in memory twice, and its leaders are busy with it.
const MOVES_AT_ONCE: usize = 8;
/// Period of looking what to do next.
const LOOK: Duration = Duration::from_millis(100);
/// What the meta group's leader has proposed is taken for lost after so long.
const PROPOSED: Duration = Duration::from_secs(2);
/// A question to the meta group's leader is repeated so often.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// After so long a question without an end is given up.
const GIVE_UP: Duration = Duration::from_secs(10);
/// Most questions that one node has open.
const MAX_OPEN: usize = 64;

/// When voters change without an operator. Never by gossip alone: what counts is whether the leader of the meta group reaches
/// a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutoVoters {
    /// Approves nodes that have been there for `after`, unless an operator has removed them.
    pub add: bool,
    /// Takes nodes that have been away for `after` out, one at a time, and only while enough others answer to take all
    /// of their replicas over.
    pub remove: bool,
    /// That time.
    pub after: Duration,
}

impl Default for AutoVoters {
    /// Nothing happens by itself.
    fn default() -> Self {
        AutoVoters { add: false, remove: false, after: Duration::from_secs(60) }
    }
}

/// What an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VoterRequest {
    /// The caller's mark, returned with the result.
    pub id: u64,
    /// The node.
    pub node: NodeId,
    /// Whether it shall hold replicas.
    pub approved: bool,
}

/// Why a node has not become a voter, or still is one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VoterError {
    /// It cannot be: the sentence says why. Nothing has changed; give up, or ask for something else.
    #[error("{0}")]
    Refused(String),
    /// It would do harm, or cannot be, as things stand at present: the sentence says what has to change. Nothing has changed;
    /// try again once it has.
    #[error("{0}")]
    NotNow(String),
    /// The table has no record of the node. Nothing has changed; try again once it has joined.
    #[error("node {0} is not known to this cluster: only a node that has joined can be added or removed")]
    NotJoined(NodeId),
    /// The meta group has had no leader in time: nothing has changed, try again.
    #[error("the meta group has no leader that could be asked: nothing was changed")]
    NoLeader,
    /// This node has stopped and asked nobody: nothing has changed.
    #[error("this node has stopped: nothing was changed")]
    Stopped,
    /// The leader was asked, but no answer has come: look whether it was done before trying again.
    #[error("outcome unknown: the change may still be made; look at the list of voters")]
    Unknown,
}

/// How a [`VoterRequest`] ended. On success the approval is committed; its replicas move afterwards.
pub type VoterResult = Result<(), VoterError>;

struct Question {
    request: VoterRequest,
    since: MonoTime,
    /// When the leader was asked last.
    asked: Option<MonoTime>,
}

/// What a node does about placement.
#[derive(Default)]
pub(super) struct Placing {
    next_look: MonoTime,
    questions: Vec<Question>,
    plan: Option<Plan>,
    /// Groups whose placement was proposed to change, and when.
    proposed: BTreeMap<ShardId, MonoTime>,
    /// The approval that was proposed last.
    approving: Option<(NodeId, bool, MonoTime)>,
    /// Since when nodes are reached, or not, as the leader of the meta group sees it.
    seen: BTreeMap<NodeId, (bool, MonoTime)>,
}

/// Whether what an operator asks for is so: of a node that shall hold none also that nothing automatic gives it any.
fn is_so(state: &MetaState, node: NodeId, approved: bool) -> bool {
    state.nodes.get(&node).is_some_and(|r| r.approved == approved && (approved || r.declined))
}

impl Host {
    /// Lets a node hold replicas, or no longer. The result comes with [`crate::Effects::voters`].
    pub fn change_voters(&mut self, now: Now, request: VoterRequest) {
        if self.placing.questions.len() >= MAX_OPEN {
            let why = format!("{MAX_OPEN} changes of voters are open at this node: try again");
            return self.out.voters.push((request.id, Err(VoterError::NotNow(why))));
        }
        self.placing.questions.push(Question { request, since: now.mono, asked: None });
        self.placing.next_look = now.mono;
    }

    /// How many groups are not where they should be; 0 before the table is known.
    pub fn moves_open(&self) -> usize {
        match (&self.state, &self.placing.plan) {
            (None, _) => 0,
            (Some(state), Some(plan)) if plan.is_of(state) => plan.open(state),
            // The plan is made anew in a moment.
            (Some(_), _) => 1,
        }
    }

    pub(super) fn keep_placement(&mut self, now: Now) {
        if now.mono < self.placing.next_look {
            return;
        }
        self.placing.next_look = now.mono.after(LOOK);
        if let Some(state) = &self.state
            && self.placing.plan.as_ref().is_none_or(|plan| !plan.is_of(state))
        {
            self.placing.plan = Some(Plan::new(state, None));
        }
        self.answer_questions(now);
        self.report_settled();
        if self.decides() {
            self.plan_moves(now);
            self.auto_voters(now);
        } else {
            self.placing.seen.clear();
        }
    }

    /// Whether this node leads the meta group and knows all that earlier leaders have decided.
    fn decides(&self) -> bool {
        self.coordinator.replica(ShardId::META).is_some_and(|r| r.leads_with_all_applied())
    }

    // ---- approval ----------------------------------------------------------------------------------------------

    fn answer_questions(&mut self, now: Now) {
        let Some(state) = self.state.clone() else {
            self.give_questions_up(now);
            return;
        };
        let mut questions = std::mem::take(&mut self.placing.questions);
        let decides = self.decides();
        questions.retain_mut(|q| {
            let VoterRequest { id, node, approved } = q.request;
            if decides && is_so(&state, node, approved) {
                self.out.voters.push((id, Ok(())));
                return false;
            }
            if q.asked.is_some_and(|at| now.mono.since(at) < ASK_AGAIN) {
                return true;
            }
            if !decides {
                // To all, since whom this node takes for the leader may be hearsay; the one that leads answers.
                q.asked = Some(now.mono);
                let round = self.round_of(id);
                self.control_to_all(&Control::Approve { round, node, approved });
                return true;
            }
            if self.approval_under_way(now) {
                return true;
            }
            self.admit(&state, node, approved);
            if let Some(why) = self.objection(&state, node, approved) {
                self.out.voters.push((id, Err(why)));
                return false;
            }
            q.asked = Some(now.mono);
            self.propose_approval(node, approved, true, now);
            true
        });
        questions.append(&mut self.placing.questions);
        self.placing.questions = questions;
        self.give_questions_up(now);
    }

    fn give_questions_up(&mut self, now: Now) {
        let out = &mut self.out.voters;
        self.placing.questions.retain(|q| {
            let waits = now.mono.since(q.since) < GIVE_UP;
            if !waits {
                let error = if q.asked.is_some() { VoterError::Unknown } else { VoterError::NoLeader };
                out.push((q.request.id, Err(error)));
            }
            waits
        });
    }

    /// Marks of different processes differ.
    fn round_of(&self, id: u64) -> u64 {
        self.config.process.wrapping_add(id)
    }

    /// One at a time: whether the next one does harm depends on the one before.
    fn approval_under_way(&self, now: Now) -> bool {
        let is = |n: NodeId| self.state.as_ref().and_then(|s| s.nodes.get(&n)).is_some_and(|r| r.approved);
        self.placing.approving.is_some_and(|(n, a, at)| is(n) != a && now.mono.since(at) < PROPOSED)
    }

    fn propose_approval(&mut self, node: NodeId, approved: bool, operator: bool, now: Now) {
        self.placing.approving = Some((node, approved, now.mono));
        self.coordinator.meta_command(MetaCommand::Approve { node, approved, operator }.encode().into());
    }

    /// Another node's operator asks.
    pub(super) fn take_approve(&mut self, from: NodeId, round: u64, node: NodeId, approved: bool, now: Now) {
        let Some(state) = self.state.clone().filter(|_| self.decides()) else { return };
        if is_so(&state, node, approved) {
            return self.control(from, &Control::Approved { round });
        }
        if self.approval_under_way(now) {
            // It asks again.
            return;
        }
        self.admit(&state, node, approved);
        match self.objection(&state, node, approved) {
            Some(VoterError::NotNow(reason)) => self.control(from, &Control::ApproveNotNow { round, reason }),
            Some(VoterError::NotJoined(node)) => self.control(from, &Control::ApproveNotJoined { round, node }),
            Some(why) => self.control(from, &Control::ApproveRefused { round, reason: why.to_string() }),
            None => self.propose_approval(node, approved, true, now),
        }
    }

    /// Whoever nobody connects to cannot register.
    fn admit(&mut self, state: &MetaState, node: NodeId, approved: bool) {
        if approved && !state.nodes.contains_key(&node) {
            self.out.notes.push(Note::Admit { node });
        }
    }

    /// The leader that was asked says how it ended.
    pub(super) fn take_approve_answer(&mut self, round: u64, result: VoterResult) {
        let of = |q: &Question| self.round_of(q.request.id) == round && q.asked.is_some();
        if let Some(at) = self.placing.questions.iter().position(of) {
            let id = self.placing.questions.remove(at).request.id;
            self.out.voters.push((id, result));
        }
    }

    /// Why a node must not become a voter, or must stay one.
    fn objection(&self, state: &MetaState, node: NodeId, approved: bool) -> Option<VoterError> {
        if node == NodeId(0) {
            return Some(VoterError::Refused("there is no node 0: node ids begin at 1".to_owned()));
        }
        let Some(record) = state.nodes.get(&node) else {
            return Some(VoterError::NotJoined(node));
        };
        let answers = |n: NodeId| state.nodes.get(&n).is_some_and(|r| self.is_usable(n, r.incarnation));
        if approved {
            let silent = record.incarnation == NO_LIFE || !answers(node);
            let why = || format!("node {node} does not answer: it can hold replicas once it is back");
            return silent.then(|| VoterError::NotNow(why()));
        }
        if !record.approved {
            return None;
        }
        if state.approved().len() <= 1 {
            return Some(VoterError::Refused(format!("node {node} is the last voter")));
        }
        let plan = Plan::new(state, Some(node));
        let short = |nodes: &[NodeId]| {
            let living = nodes.iter().filter(|n| answers(**n)).count();
            (living <= nodes.len() / 2).then_some((living, nodes.len()))
        };
        let name = |s: ShardId| if s.is_meta() { "the meta group".to_owned() } else { format!("shard {s}") };
        for shard in state.groups().filter(|s| !self.is_untouched(state, &plan, *s, node)) {
            let present: Vec<NodeId> = state.replicas(shard).iter().map(|r| r.node).collect();
            if let Some((living, all)) = short(&present) {
                return Some(VoterError::NotNow(format!(
                    "{} has {living} of {all} replicas on nodes that answer, no majority to move by: bring the others \
                     back first",
                    name(shard)
                )));
            }
            if let Some((living, all)) = short(plan.nodes(shard)) {
                return Some(VoterError::NotNow(format!(
                    "without node {node}, {} would have {living} of {all} replicas on nodes that answer, which is no \
                     majority: bring the others back first",
                    name(shard)
                )));
            }
        }
        None
    }

    /// Whether a group has nothing on the node, and nothing to move because it goes.
    fn is_untouched(&self, state: &MetaState, plan: &Plan, shard: ShardId, node: NodeId) -> bool {
        let present = state.replicas(shard);
        let wanted = plan.nodes(shard);
        present.iter().all(|r| r.node != node && wanted.contains(&r.node)) && present.len() == wanted.len()
    }

    // ---- moves -------------------------------------------------------------------------------------------------

    fn plan_moves(&mut self, now: Now) {
        let (Some(state), Some(plan)) = (&self.state, &self.placing.plan) else { return };
        let usable = |n: NodeId| state.nodes.get(&n).is_some_and(|r| !r.draining && self.is_usable(n, r.incarnation));
        let moves = plan.next(state, usable, MOVES_AT_ONCE);
        self.placing.proposed.retain(|_, at| now.mono.since(*at) < PROPOSED);
        for m in moves {
            // What was proposed is in the table, or void, before it is proposed again.
            if let Entry::Vacant(entry) = self.placing.proposed.entry(m.shard) {
                entry.insert(now.mono);
                let command = MetaCommand::Place { shard: m.shard, was: m.was, nodes: m.nodes };
                self.coordinator.meta_command(command.encode().into());
            }
        }
    }

    /// Tells the meta group's leader of groups that this node leads and that have arrived.
    fn report_settled(&mut self) {
        let Some(state) = self.state.clone() else { return };
        let mut arrived: Vec<(ShardId, Epoch, Vec<ReplicaId>)> = Vec::new();
        for shard in state.groups() {
            let Some(moving) = state.moving(shard) else { continue };
            let Some(replica) = self.coordinator.replica(shard) else { continue };
            if replica.leads_with_all_applied() && replica.is_settled() {
                let members = replica.members().voters.iter().map(|v| v.id).collect();
                arrived.push((shard, moving.epoch, members));
            }
        }
        for (shard, epoch, members) in arrived {
            if self.decides() {
                self.settle(shard, epoch, members);
            } else {
                self.control_to_all(&Control::Settled { shard, epoch, members });
            }
        }
    }

    /// A group's leader says that it has arrived.
    pub(super) fn settle(&mut self, shard: ShardId, epoch: Epoch, members: Vec<ReplicaId>) {
        let moving = self.state.as_ref().and_then(|s| s.moving(shard));
        if moving.is_none_or(|m| m.epoch != epoch) || !self.decides() {
            return;
        }
        self.coordinator.meta_command(MetaCommand::Settled { shard, epoch, members }.encode().into());
        // The next change of it need not wait.
        self.placing.proposed.remove(&shard);
    }

    // ---- without an operator -----------------------------------------------------------------------------------

    fn auto_voters(&mut self, now: Now) {
        let auto = self.config.auto_voters;
        let Some(state) = self.state.clone().filter(|_| auto.add || auto.remove) else { return };
        self.placing.seen.retain(|node, _| state.nodes.contains_key(node));
        for (node, record) in &state.nodes {
            let here = self.is_usable(*node, record.incarnation);
            let seen = self.placing.seen.entry(*node).or_insert((here, now.mono));
            if seen.0 != here {
                *seen = (here, now.mono);
            }
        }
        // One at a time, and only when everything is where it should be.
        if self.moves_open() > 0 || self.approval_under_way(now) {
            return;
        }
        let lasts = |node: &NodeId, here: bool| {
            self.placing.seen.get(node).is_some_and(|(is, at)| *is == here && now.mono.since(*at) >= auto.after)
        };
        let absent = state.nodes.iter().find(|(n, r)| auto.remove && r.approved && lasts(n, false)).map(|(n, _)| *n);
        let usable = state.nodes.iter().filter(|(n, r)| r.approved && self.is_usable(**n, r.incarnation)).count();
        // Without enough others each shard would have fewer replicas than before.
        if let Some(node) = absent.filter(|_| usable >= state.replication as usize)
            && self.objection(&state, node, false).is_none()
        {
            self.propose_approval(node, false, false, now);
            return;
        }
        let new = state.nodes.iter().find(|(n, r)| {
            auto.add && !r.approved && !r.declined && !r.draining && r.incarnation != NO_LIFE && lasts(n, true)
        });
        if let Some((node, _)) = new {
            self.propose_approval(*node, true, false, now);
        }
    }
}
