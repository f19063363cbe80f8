//! Quiet groups sleep, by agreement of all members: none of them ticks, and any message wakes whom it reaches.

use super::{Out, Replica, SleepRound};
use crate::message::{Body, Envelope};
use crema_core::{NodeId, ReplicaId, Term};
use raft::StateRole;
use std::collections::BTreeSet;

/// Ticks that an invitation to sleep waits for its answers.
const SLEEP_ROUND_TICKS: usize = 4;

impl Replica {
    /// Wakes the replica: it ticks again, from a fresh election timeout.
    pub fn wake(&mut self) {
        self.quiet_ticks = 0;
        self.sleep_round = None;
        if self.asleep {
            self.asleep = false;
            self.raw.raft.election_elapsed = 0;
        }
    }

    /// The node of a voter is gone. Wakes the replica; one that followed that node has waited its election time already,
    /// since a beat between the nodes stood for the leader's while it slept.
    pub fn node_down(&mut self, node: NodeId) {
        if !self.asleep || !self.members.all().any(|v| v.node == node) {
            return;
        }
        self.wake();
        if self.node_of(self.raw.raft.leader_id) == Some(node) && !self.leads() {
            self.raw.raft.election_elapsed = self.timing.election_ticks;
        }
    }

    /// Messages to `node` may have been lost: what was sent without an answer is sent again.
    pub fn unreachable(&mut self, node: NodeId) {
        if self.asleep || self.failed || !self.leads() {
            return;
        }
        for id in self.members.all().filter(|v| v.node == node && v.id != self.id).map(|v| v.id.0).collect::<Vec<_>>() {
            self.raw.report_unreachable(id);
        }
    }

    fn at_rest(&self) -> bool {
        let log = &self.raw.raft.raft_log;
        let last = log.last_index();
        log.committed == last
            && self.applied().0 == last
            && self.queue.is_empty()
            && self.proposals.is_empty()
            && self.reads.is_empty()
            && self.awaiting_advance.is_empty()
            && self.unpersisted.is_empty()
            && self.raw.raft.lead_transferee.is_none()
    }

    pub(super) fn asked_to_sleep(&mut self, leader: ReplicaId, term: Term, index: u64, out: &mut Out) {
        let agrees = self.term() == term
            && self.raw.raft.state == StateRole::Follower
            && self.raw.raft.leader_id == leader.0
            && self.raw.raft.raft_log.last_index() == index
            && self.at_rest();
        if agrees && let Some(voter) = self.member(leader.0) {
            self.fall_asleep();
            let body = Body::Sleep { from: self.id, to: leader, term, index, ok: true };
            out.envelopes.push((voter, Envelope { shard: self.shard, log_time: 0, floor: 0, body }));
        }
    }

    fn fall_asleep(&mut self) {
        self.asleep = true;
        self.lease.rest();
        self.close_cell();
        self.sleep_round = None;
        self.raw.raft.maybe_free_inflight_buffers();
        self.raw.raft.r.raft_log.unstable.entries.shrink_to(16);
    }

    pub(super) fn sleeper_agreed(&mut self, from: ReplicaId, term: Term, index: u64) {
        let current = self.leads() && self.term() == term && self.raw.raft.raft_log.last_index() == index;
        let Some(round) = self.sleep_round.as_mut().filter(|_| current) else { return };
        round.waiting_for.remove(&from);
        if round.waiting_for.is_empty() {
            // What placement or memory wants may have come after the invitation.
            if self.at_rest() && !self.has_changes_to_make() {
                self.fall_asleep();
            } else {
                self.wake();
            }
        }
    }

    /// Whether a leader has something to do that nobody asks for again.
    fn has_changes_to_make(&self) -> bool {
        !self.members.learners.is_empty() || self.filling.sends() || self.wants_change() || self.limits_differ()
    }

    /// A leader of a quiet group invites all voters to sleep. Until all have agreed it sends nothing, since anything
    /// would wake them; if one does not, it goes on, and its next heartbeat wakes the others.
    pub(super) fn maybe_invite_to_sleep(&mut self, out: &mut Out) {
        let last = self.raw.raft.raft_log.last_index();
        let all_match = self.raw.raft.prs().iter().all(|(id, p)| *id == self.id.0 || p.matched == last);
        let told_commit = self.raw.raft.prs().iter().all(|(id, p)| *id == self.id.0 || p.committed_index >= last);
        if !all_match || !told_commit || self.has_changes_to_make() || !self.at_rest() {
            self.quiet_ticks = 0;
            return;
        }
        self.quiet_ticks += 1;
        // Not in a tick with a heartbeat: it would follow the invitation and wake whom that put to sleep.
        if self.quiet_ticks < self.timing.quiet_ticks || self.raw.has_ready() {
            return;
        }
        self.quiet_ticks = 0;
        let mut waiting_for = BTreeSet::new();
        for v in self.members.voting().filter(|v| v.id != self.id) {
            waiting_for.insert(v.id);
            let body = Body::Sleep { from: self.id, to: v.id, term: self.term(), index: last, ok: false };
            out.envelopes.push((*v, Envelope { shard: self.shard, log_time: 0, floor: 0, body }));
        }
        if waiting_for.is_empty() {
            self.fall_asleep();
        } else {
            self.sleep_round = Some(SleepRound { waiting_for, ticks_left: SLEEP_ROUND_TICKS });
        }
    }
}
