//! What begins and ends with a leadership: the lease and its read cell, what waits for a leader, transfers, and failure.

use super::{Leadership, Machine, Out, Queued, ReadMode, Replica};
use crate::effect::Note;
use crate::lease::Lease;
use crate::message::Answer;
use crema_core::mutant::{Mutant, planted};
use crema_core::{LogClock, LogTime, Now, ReplicaId, encode_advance};

impl Replica {
    /// Hands leadership to `to` if that voter is close behind; returns whether a transfer is under way.
    pub fn transfer(&mut self, to: ReplicaId) -> bool {
        // In a joint configuration it may be one that goes.
        if !self.leads() || self.failed || to == self.id || !self.members.voters.iter().any(|v| v.id == to) {
            return false;
        }
        if self.raw.raft.lead_transferee.is_some() {
            return true;
        }
        // It may be one that takes `to`'s vote away.
        if self.raw.raft.has_pending_conf() {
            return false;
        }
        let last = self.raw.raft.raft_log.last_index();
        let close = self.raw.raft.prs().get(to.0).is_some_and(|p| p.recent_active && p.matched + 1024 >= last);
        if close {
            self.wake();
            // Before a TimeoutNow can leave: a forced vote asks no promise.
            if !planted(Mutant::TransferUnderLease) {
                self.lease.suspend(last);
                self.close_cell();
                // One on its way was proposed before this suspension, and does not end it.
                self.reviving = false;
            }
            self.raw.transfer_leader(to.0);
        }
        close
    }

    /// Whether a lease, if it holds, lets this replica answer reads: what earlier leaders acknowledged is applied here.
    pub(super) fn may_lease(&self) -> bool {
        self.read_mode == ReadMode::Lease
            && self.leads()
            && self.leadership.leads
            && self.leadership.term == self.term()
            && self.applied_term == self.term()
            && !self.failed
            && !self.asleep
    }

    /// Tells readers outside of the driver where they stand. Closes the cell at once when the lease is gone.
    pub(super) fn publish(&self, now: Now) {
        let Machine::Data(machine) = &self.machine else { return };
        if self.may_lease() && !self.lease.suspended() {
            let published = machine.published();
            published.set_estimate(self.clock.estimate(now), now);
            published.cell().open(self.raw.raft.term, machine.epoch().0, self.lease.until().0);
        } else {
            self.close_cell();
        }
    }

    pub(super) fn close_cell(&self) {
        if let Some(published) = self.published() {
            published.cell().close();
        }
    }

    /// Renews the lease ahead of its end while it is used, so that reads find it held. Nobody's use lets it lapse.
    pub(super) fn keep_lease(&mut self, now: Now) {
        let used = self.published().is_some_and(|p| p.take_used()) | std::mem::take(&mut self.lease_used);
        if !used || !self.may_lease() {
            return;
        }
        self.quiet_ticks = 0;
        let early = self.timing.lease() * 3 / 4;
        if self.lease.suspended() {
            if self.raw.raft.lead_transferee.is_none() && !self.reviving {
                self.reviving = self.command(encode_advance(self.stamp(now)));
            }
        } else if self.lease.until() < now.mono.after(early) && !self.reads.in_round() {
            self.begin_round(now);
        }
    }

    pub(super) fn note_leadership(&mut self, now: Now, out: &mut Out) {
        let leader = self.node_of(self.raw.raft.leader_id);
        let present = Leadership { term: self.term(), leader, leads: self.leads() };
        let before = std::mem::replace(&mut self.leadership, present);
        if before == present {
            self.turn_away(out);
            return;
        }
        out.roles.push(self.shard);
        if before.leads && (!present.leads || before.term != present.term) {
            self.step_down(out);
        }
        self.turn_away(out);
        if present.leads && !(before.leads && before.term == present.term) {
            if std::mem::take(&mut self.clock_stands) {
                // Nobody who voted knew the time either: the whole group was away. Only now is the wall clock asked.
                self.clock = LogClock::new(LogTime(now.wall.0).max(self.clock.estimate(now)), now);
            }
            self.inherit_flight();
            // The empty entry that begins a leadership is a proposal too, and no message of it has left yet.
            self.lease = Lease::default();
            self.lease.proposed(self.raw.raft.raft_log.last_index(), now.mono);
        }
        self.publish(now);
    }

    /// A replica that was elected and deposed between two rounds may have taken requests that nobody would answer.
    fn turn_away(&mut self, out: &mut Out) {
        let taken = !self.queue.is_empty() || self.reads.unconfirmed();
        if taken && !self.leads() {
            self.step_down(out);
        }
    }

    /// Everything that this leadership took and did not finish goes back to where it came from.
    fn step_down(&mut self, out: &mut Out) {
        for ticket in self.proposals.drain() {
            out.answers.push((self.shard, ticket, Answer::Lost));
        }
        let refusal = self.not_leader();
        self.queue_bytes = 0;
        for item in std::mem::take(&mut self.queue) {
            if let Queued::Write { ticket, .. } | Queued::Open { ticket } = item {
                out.answers.push((self.shard, ticket, refusal.clone()));
            }
        }
        let mut reads = self.reads.drain_unconfirmed();
        reads.append(&mut self.awaiting_advance);
        for read in reads {
            out.answers.push((self.shard, read.ticket, refusal.clone()));
        }
        self.advance_proposed = None;
        self.floor = 0;
        self.lease = Lease::default();
        self.reviving = false;
        self.stop_filling();
        self.forget_accesses();
    }

    /// Stops the replica for good: what it holds cannot be trusted, or a part of it panicked.
    pub fn fail(&mut self, reason: String, out: &mut Out) {
        if !self.failed {
            out.notes.push(Note::ReplicaFailed { shard: self.shard, reason });
            self.end(out);
        }
    }

    /// It does nothing any more; who waits for it is told.
    pub(super) fn end(&mut self, out: &mut Out) {
        self.failed = true;
        self.leadership = Leadership { term: self.leadership.term, leader: None, leads: false };
        out.roles.push(self.shard);
        if let Some(published) = self.published() {
            published.retire();
        }
        self.step_down(out);
        // Nothing is applied any more, so confirmed reads wait in vain.
        let refusal = self.not_leader();
        let mut reads = std::mem::take(&mut self.ready_reads);
        reads.append(&mut self.reads.drain());
        for read in reads {
            out.answers.push((self.shard, read.ticket, refusal.clone()));
        }
        self.unpersisted.clear();
    }
}
