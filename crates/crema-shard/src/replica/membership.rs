//! How a replica follows its group's members, and changes them where it leads.

use super::{Out, Replica};
use crate::members::{ConfStep, Member};
use crate::meta::ReplicaPlacement;
use crema_core::mutant::{Mutant, planted};
use crema_core::{Epoch, Now, ReplicaId};
use raft::ProgressState;

/// Most replicas that are heard though the log has not named them yet.
const MAX_STRANGERS: usize = 8;
/// A learner that lacks at most so many entries becomes a voter: what a busy leader has on its way at any time.
const CAUGHT_UP: u64 = 256;

impl Replica {
    /// What placement wants the group's members to be. An older epoch than known changes nothing.
    pub fn set_intent(&mut self, wanted: &[ReplicaPlacement], epoch: Epoch) {
        if epoch < self.intent.1 || (epoch == self.intent.1 && self.intent.0 == wanted) {
            return;
        }
        self.intent = (wanted.to_vec(), epoch);
        // A sleeping leader would never get to it.
        if self.asleep && self.wants_change() {
            self.wake();
        }
    }

    /// Whether fact and intent differ in something that this leader can do now.
    pub(super) fn wants_change(&self) -> bool {
        self.leads() && self.next_step().is_some()
    }

    fn next_step(&self) -> Option<ConfStep> {
        let (wanted, epoch) = &self.intent;
        self.members.next_step(wanted, *epoch, self.id, |id| self.caught_up(id), |id| self.answers(id))
    }

    pub(super) fn caught_up(&self, id: ReplicaId) -> bool {
        let last = self.raw.raft.raft_log.last_index();
        self.raw.raft.prs().get(id.0).is_some_and(|p| {
            p.state != ProgressState::Snapshot && p.recent_active && p.matched > 0 && p.matched + CAUGHT_UP >= last
        })
    }

    /// Whether a member has answered lately. raft-rs forgets it once an election time, so for a moment nobody has.
    fn answers(&self, id: ReplicaId) -> bool {
        id == self.id || self.raw.raft.prs().get(id.0).is_some_and(|p| p.recent_active)
    }

    /// Whether it leads and has applied whatever leaders before it committed.
    pub fn leads_with_all_applied(&self) -> bool {
        self.leads() && self.leadership.leads && self.applied_term == self.term() && !self.failed
    }

    /// Whether the group's members are those that placement wants, and nobody else.
    pub fn is_settled(&self) -> bool {
        let m = &self.members;
        let wanted = |id: &ReplicaId| self.intent.0.iter().any(|w| w.id == *id);
        !self.empty
            && !m.is_joint()
            && m.learners.is_empty()
            && m.voters.len() == self.intent.0.len()
            && m.voters.iter().all(|v| wanted(&v.id))
    }

    /// Proposes the next step towards the intent. One at a time, and none before this leader has applied what earlier
    /// ones committed: raft-rs would replace it by an empty entry, silently.
    pub(super) fn change_members(&mut self, now: Now) {
        let raft = &self.raw.raft;
        if raft.has_pending_conf() || raft.lead_transferee.is_some() || !raft.commit_to_current_term() {
            return;
        }
        let Some(step) = self.next_step().filter(|s| self.members.objection(s).is_none()) else { return };
        self.quiet_ticks = 0;
        // Refused when too much is uncommitted: the next tick tries again.
        if self.raw.propose_conf_change(step.encode(), step.to_raft()).is_ok() {
            self.lease.proposed(self.raw.raft.raft_log.last_index(), now.mono);
        }
    }

    /// Takes a committed step, or refuses it as every other replica does.
    pub(super) fn apply_step(&mut self, step: &ConfStep, index: u64, out: &mut Out) {
        let ignored = planted(Mutant::IgnoredConfChange) && !self.leads();
        if ignored || self.members.objection(step).is_some() || self.raw.apply_conf_change(&step.to_raft()).is_err() {
            return;
        }
        self.members.apply(step);
        self.members_changed();
        if self.leads() && !self.members.is_voter(self.id) {
            // It was elected with the step on its way, which took its vote (Ongaro 2014, section 4.2.2).
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, 0);
            self.fix_election_timeout();
        }
        self.write_members(index, out);
        out.roles.push(self.shard);
    }

    /// Ranks, timeouts and acquaintances follow the members.
    pub(super) fn members_changed(&mut self) {
        self.rank = self.members.voting().filter(|v| v.id < self.id).count();
        let Replica { strangers, members, filling, .. } = self;
        strangers.retain(|s| members.get(s.id).is_none());
        filling.keep_if(|to| members.get(to).is_some());
        self.fix_election_timeout();
    }

    /// Whether to listen to a replica. A member speaks in the life that the log has named. Others are heard as well, since
    /// whoever leads or asks for a vote may be a member by entries that have not come here yet; but an id below one that
    /// the log has named belongs to somebody who was removed: ids ascend in the order of their coming.
    pub(super) fn hears(&mut self, sender: Member) -> bool {
        if let Some(known) = self.member(sender.id.0) {
            return known.node == sender.node
                && (known.incarnation == sender.incarnation || planted(Mutant::VoteAfterWipe));
        }
        // Unless placement wants it: one that was about to leave, and stays, keeps its id.
        let wanted = self.intent.0.iter().any(|w| Member::from(w) == sender);
        if !wanted && self.members.all().any(|m| m.id > sender.id) {
            return false;
        }
        if self.strangers.len() >= MAX_STRANGERS {
            self.strangers.remove(0);
        }
        self.strangers.push(sender);
        true
    }
}
