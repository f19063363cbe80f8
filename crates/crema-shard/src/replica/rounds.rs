//! A round of a replica: what was asked is proposed, what Raft has ready goes to the log, to peers and into the state.

use super::{MAX_MESSAGE_BYTES, Machine, Out, Queued, Replica, Unpersisted, checkpoint::Disk};
use crate::effect::Note;
use crate::members::ConfStep;
use crate::message::{Answer, Body, Envelope, announce};
use crate::proposals::{Settled, Ticket};
use bytes::Bytes;
use crema_core::limits::TARGET_ENTRY_BYTES;
use crema_core::mutant::{Mutant, planted};
use crema_core::{
    EntryBuilder, LogIndex, LogTime, Now, OpsRef, Outcome, ReadResult, Reply, ShardId, Term, encode_advance,
    encode_open_session,
};
use raft::eraftpb::{Entry, EntryType, Message, MessageType};

impl Replica {
    /// Works off everything that inputs have caused. `persist` is called with the number of each Ready that must be made
    /// durable before [`Replica::persisted`].
    pub fn flush(&mut self, now: Now, out: &mut Out, mut persist: impl FnMut(u64)) {
        if self.failed {
            return;
        }
        self.note_leadership(now, out);
        self.answer_reads(now, out);
        self.begin_reads(now);
        self.propose(now, out);
        while self.raw.has_ready() && !self.failed {
            self.one_ready(now, out, &mut persist);
            self.answer_reads(now, out);
            self.begin_reads(now);
        }
        self.answer_reads(now, out);
        self.propose(now, out);
        // An Advance or a check may have been queued by the last reads; it makes the group ready once more.
        while self.raw.has_ready() && !self.failed {
            self.one_ready(now, out, &mut persist);
            self.answer_reads(now, out);
        }
        self.fill(now, out);
        self.checkpoint(out);
        self.publish(now);
    }

    fn begin_reads(&mut self, now: Now) {
        // raft-rs drops a ReadIndex silently before the first commit of the term.
        if self.leads() && self.reads.wants_round() && self.raw.raft.commit_to_current_term() {
            self.lease_used = true;
            self.begin_round(now);
        }
    }

    pub(super) fn begin_round(&mut self, now: Now) {
        self.counts.rounds += 1;
        if !planted(Mutant::ReusedReadContext) {
            self.next_context += 1;
        }
        self.reads.begin(self.next_context, now.mono);
        let mut context = Vec::with_capacity(16);
        context.extend_from_slice(&self.context_prefix.to_le_bytes());
        context.extend_from_slice(&self.next_context.to_le_bytes());
        self.raw.read_index(context);
    }

    /// Packs what is queued into entries, and all entries into one MsgPropose.
    pub(super) fn propose(&mut self, now: Now, out: &mut Out) {
        // While leadership is being handed over raft-rs takes no proposals; they wait here for the outcome.
        if self.queue.is_empty() || !self.leads() || self.raw.raft.lead_transferee.is_some() {
            return;
        }
        self.make_room(self.queue_bytes as u64, now);
        let queue = self.take_proposable();
        if queue.is_empty() {
            return;
        }
        let stamp = self.stamp(now);
        let wall_offset = now.wall.0 as i64 - stamp.0 as i64;
        let mut entries: Vec<Entry> = Vec::new();
        let mut tickets: Vec<Vec<Ticket>> = Vec::new();
        let mut batch = EntryBuilder::new(stamp, wall_offset);
        let mut batch_tickets = Vec::new();
        let entry = |data: Bytes| Entry { data, ..Entry::default() };
        if planted(Mutant::AckBeforeApply) {
            Self::acknowledge_early(self.shard, &queue, out);
        }
        for item in queue {
            let alone = !matches!(item, Queued::Write { .. });
            if !batch.is_empty() && (alone || batch.size() >= TARGET_ENTRY_BYTES) {
                let full = std::mem::replace(&mut batch, EntryBuilder::new(stamp, wall_offset));
                entries.push(entry(full.finish()));
                tickets.push(std::mem::take(&mut batch_tickets));
            }
            match item {
                Queued::Write { ticket, tag, ops } => {
                    batch.push(tag, &ops);
                    batch_tickets.push(ticket);
                }
                Queued::Open { ticket } => {
                    entries.push(entry(encode_open_session(stamp, ticket.incarnation)));
                    tickets.push(vec![ticket]);
                }
                Queued::Command(payload) => {
                    entries.push(entry(payload));
                    tickets.push(Vec::new());
                }
            }
        }
        if !batch.is_empty() {
            entries.push(entry(batch.finish()));
            tickets.push(batch_tickets);
        }
        let term = self.raw.raft.term;
        let first = self.raw.raft.raft_log.last_index() + 1;
        let mut m = Message { msg_type: MessageType::MsgPropose, from: self.id.0, ..Message::default() };
        m.set_entries(entries.into());
        if self.raw.raft.step(m).is_err() {
            // Too much is uncommitted: nothing of it was appended.
            for ticket in tickets.into_iter().flatten() {
                out.answers.push((self.shard, ticket, Answer::Busy));
            }
            self.advance_proposed = None;
            self.reviving = false;
            self.makes_no_room();
            return;
        }
        self.took_off(self.raw.raft.raft_log.last_index());
        self.lease.proposed(self.raw.raft.raft_log.last_index(), now.mono);
        for (i, tickets) in tickets.into_iter().enumerate() {
            if !tickets.is_empty() {
                self.proposals.push(term, first + i as u64, tickets);
            }
        }
    }

    fn send(&mut self, mut m: Message, now: Now, out: &mut Out) {
        let Some(voter) = self.member(m.to) else { return };
        if m.msg_type == MessageType::MsgSnapshot {
            let Some(members) = self.filling.announced(m.to, now) else { return };
            announce(&mut m, members);
        }
        // raft-rs 0.7 with `batch_append` puts entries into an empty MsgAppend that still waits to be sent, even if that
        // one stood at another index (`is_continuous_ents` calls anything a continuation of nothing). The voter would
        // acknowledge `index + entries`, more than it has: a lost write. Such a message gets the index of its entries.
        if let Some(first) = m.entries.first()
            && m.msg_type == MessageType::MsgAppend
            && first.index != m.index + 1
        {
            m.index = first.index - 1;
            let Ok(term) = self.raw.raft.raft_log.term(m.index) else { return };
            m.log_term = term;
        }
        if m.msg_type == MessageType::MsgTimeoutNow {
            // What its receiver checks before it acts on it, see `Lease::suspend`.
            m.index = self.lease.suspended_at().unwrap_or(self.raw.raft.raft_log.last_index());
        }
        let from_leader =
            matches!(m.msg_type, MessageType::MsgHeartbeat | MessageType::MsgAppend | MessageType::MsgSnapshot);
        // Voters tell the time too: whoever is elected after a restart has to go on with it.
        let votes = matches!(m.msg_type, MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse);
        let log_time = if (from_leader || votes) && !self.clock_stands { self.clock.estimate(now).0 } else { 0 };
        let floor = if from_leader { self.floor } else { 0 };
        let envelope = |m| Envelope { shard: self.shard, log_time, floor, body: Body::Raft(m) };
        // `batch_append` merges without a limit (raft-rs 0.7, raft.rs:744), up to a voter's whole backlog: cut to size.
        let size = |e: &Entry| e.data.len() as u64 + 32;
        if m.msg_type != MessageType::MsgAppend || m.entries.iter().map(size).sum::<u64>() <= MAX_MESSAGE_BYTES {
            out.envelopes.push((voter, envelope(m)));
            return;
        }
        let (mut part, mut bytes, mut last_term) = (Vec::new(), 0, m.log_term);
        for e in std::mem::take(&mut m.entries) {
            if !part.is_empty() && bytes + size(&e) > MAX_MESSAGE_BYTES {
                let mut head = m.clone();
                head.set_entries(std::mem::take(&mut part).into());
                out.envelopes.push((voter, envelope(head)));
                (m.index, m.log_term) = (e.index - 1, last_term);
                bytes = 0;
            }
            bytes += size(&e);
            last_term = e.term;
            part.push(e);
        }
        m.set_entries(part.into());
        out.envelopes.push((voter, envelope(m)));
    }

    fn one_ready(&mut self, now: Now, out: &mut Out, persist: &mut impl FnMut(u64)) {
        let mut ready = self.raw.ready();
        let number = ready.number();
        let immediate = ready.take_messages();
        let mut dependent = ready.take_persisted_messages();
        let must_sync = ready.must_sync();
        let entries = ready.take_entries();
        let committed = ready.take_committed_entries();
        let read_states = ready.take_read_states();
        let hard = ready.hs().cloned();
        let changed = hard.as_ref().map(|h| (h.term, h.vote)).filter(|v| *v != self.handed_vote);
        let hard_vote = changed.inspect(|v| self.handed_vote = *v);
        let mut installed = None;
        if !ready.snapshot().is_empty() {
            let metadata = ready.snapshot().get_metadata();
            installed = Some(metadata.index);
            self.install(metadata.index, metadata.term, number, out);
        }
        if must_sync && !self.failed {
            self.write_log(installed, &entries, out);
        }
        let log = self.raw.mut_store();
        log.append(entries);
        if let Some(hard) = hard {
            log.set_hard_state(hard);
        }
        self.raw.advance_append_async(ready);
        for m in immediate {
            self.send(m, now, out);
        }
        if planted(Mutant::PersistAfterSend) {
            for m in std::mem::take(&mut dependent) {
                self.send(m, now, out);
            }
        }
        if must_sync || !self.unpersisted.is_empty() {
            // The answer to a heartbeat vouches for term and vote alone: behind a slow disk it would cost a healthy leader
            // its quorum.
            if hard_vote.is_none() && self.unpersisted.iter().all(|u| u.vote.is_none()) {
                let (at_once, later) =
                    dependent.into_iter().partition(|m| m.msg_type == MessageType::MsgHeartbeatResponse);
                dependent = later;
                let at_once: Vec<Message> = at_once;
                for m in at_once {
                    self.send(m, now, out);
                }
            }
            self.unpersisted.push(Unpersisted { number, writes: must_sync, vote: hard_vote, messages: dependent });
            if must_sync {
                persist(number);
            }
        } else {
            // Nothing to make durable, nothing before it: what depends on it may go.
            self.raw.on_persist_ready(number);
            for m in dependent {
                self.send(m, now, out);
            }
        }
        for state in read_states {
            if let Some(context) = state.request_ctx.get(8..16) {
                let context = u64::from_le_bytes(context.try_into().expect("eight bytes"));
                if let Some(issued) = self.reads.confirmed(context, state.index) {
                    let from = if planted(Mutant::LeaseFromReply) { now.mono } else { issued };
                    self.lease.confirmed(from, &self.timing);
                }
            }
        }
        // Before anything is applied: an entry of another leader must not answer our tickets.
        self.note_leadership(now, out);
        if self.leads() {
            self.lease.committed(self.raw.raft.raft_log.committed, &self.timing);
            self.reviving &= self.lease.suspended();
        }
        for e in committed {
            if self.failed {
                return;
            }
            self.apply(e, now, out);
        }
        // What raft-rs counts as applied may not run ahead of what is durable.
        if !self.failed && !self.filling.installing() {
            self.raw.advance_apply_to(self.applied().0);
        }
        if !self.failed {
            self.clock_observe(self.applied_time(), now);
        }
    }

    pub(super) fn applied_time(&self) -> LogTime {
        match &self.machine {
            Machine::Data(m) => m.log_time(),
            Machine::Meta(_) => LogTime(0),
        }
    }

    pub(super) fn apply(&mut self, e: Entry, now: Now, out: &mut Out) {
        self.apply_by_own_clock(now);
        let index = LogIndex(e.index);
        self.applied_term = Term(e.term);
        // To the machine, a change of members is an entry without content.
        let data = if e.entry_type == EntryType::EntryNormal { &e.data[..] } else { &[] };
        if e.entry_type != EntryType::EntryNormal {
            match ConfStep::decode(&e.context) {
                Ok(step) => self.apply_step(&step, e.index, out),
                Err(error) => return self.fail(format!("entry {} changes members: {error}", e.index), out),
            }
        }
        let outcomes: Vec<Outcome> = match &mut self.machine {
            Machine::Data(m) => match m.apply(index, data) {
                Ok(applied) => {
                    if let Some(at) = applied.digest_mismatch {
                        out.notes.push(Note::DigestMismatch { shard: self.shard, index: at.0 });
                    }
                    out.garbage.append(&mut m.take_garbage());
                    applied.outcomes
                }
                Err(corrupt) => return self.fail(corrupt.to_string(), out),
            },
            Machine::Meta(m) => match m.apply(index, data) {
                Ok(changed) => {
                    out.meta_changed |= changed;
                    Vec::new()
                }
                Err(corrupt) => return self.fail(corrupt.to_string(), out),
            },
        };
        match self.proposals.settle(e.term, e.index) {
            Settled::Nobody => {}
            Settled::Ours(tickets) => {
                debug_assert_eq!(tickets.len(), outcomes.len());
                for (ticket, outcome) in tickets.into_iter().zip(outcomes) {
                    out.answers.push((self.shard, ticket, Answer::Outcome(outcome)));
                }
            }
            Settled::Lost(tickets) => {
                for ticket in tickets {
                    out.answers.push((self.shard, ticket, Answer::Lost));
                }
            }
        }
    }

    fn answer_reads(&mut self, now: Now, out: &mut Out) {
        let applied = self.applied().0;
        let mut ready = std::mem::take(&mut self.ready_reads);
        let confirmed = ready.len();
        self.reads.take_ready(applied, &mut ready);
        self.counts.indexed += (ready.len() - confirmed) as u64;
        if !self.reads.is_empty() && self.holds_lease(now) {
            let before = ready.len();
            self.reads.take_all(&mut ready);
            self.counts.leased += (ready.len() - before) as u64;
            self.lease_used = true;
        }
        if ready.is_empty() && self.awaiting_advance.is_empty() {
            self.ready_reads = ready;
            return;
        }
        let estimate = self.stamp(now);
        let fresh = std::mem::replace(&mut ready, std::mem::take(&mut self.awaiting_advance));
        ready.extend(fresh);
        for read in ready.drain(..) {
            let Machine::Data(machine) = &self.machine else { continue };
            if read.ops.is_empty() {
                let index = Outcome::Reply(Reply::Int(applied as i64));
                out.answers.push((self.shard, read.ticket, Answer::Outcome(index)));
                continue;
            }
            debug_assert!(OpsRef::parse(&read.ops).is_ok_and(|ops| !ops.is_write()));
            // A read behind one that waits for log time waits too: reads of a connection keep their order.
            if !self.awaiting_advance.is_empty() {
                self.awaiting_advance.push(read);
                continue;
            }
            match machine.read(&read.ops, estimate) {
                ReadResult::Reply(reply) => {
                    out.answers.push((self.shard, read.ticket, Answer::Outcome(Outcome::Reply(reply))));
                }
                ReadResult::NeedsAdvance => self.awaiting_advance.push(read),
            }
        }
        self.ready_reads = ready;
        if self.awaiting_advance.is_empty() {
            self.advance_proposed = None;
            return;
        }
        if !self.leads() {
            // Confirmed while it led, but only a leader can move log time on.
            let refusal = self.not_leader();
            for read in std::mem::take(&mut self.awaiting_advance) {
                out.answers.push((self.shard, read.ticket, refusal.clone()));
            }
            return;
        }
        // Reads that came after the entry was proposed may need a later one.
        self.advance_proposed = self.advance_proposed.filter(|stamp| *stamp > self.applied_time());
        if self.advance_proposed.is_none() && self.command(encode_advance(estimate)) {
            self.advance_proposed = Some(estimate);
        }
    }

    /// What [`Mutant::LocalClockInApply`] does.
    #[cfg(feature = "mutants")]
    fn apply_by_own_clock(&mut self, now: Now) {
        let time = self.clock.estimate(now);
        if let (true, Machine::Data(m)) = (planted(Mutant::LocalClockInApply), &mut self.machine) {
            m.set_log_time(time);
        }
    }

    #[cfg(not(feature = "mutants"))]
    fn apply_by_own_clock(&mut self, _: Now) {}

    /// What [`Mutant::AckBeforeApply`] does: plain SETs are answered when they are proposed.
    fn acknowledge_early(shard: ShardId, queue: &[Queued], out: &mut Out) {
        for item in queue {
            let Queued::Write { ticket, ops, .. } = item else { continue };
            let plain = |op: crema_core::Op<'_>| {
                matches!(op, crema_core::Op::Set { cond: crema_core::SetCond::Always, get: false, .. })
            };
            if OpsRef::parse(ops).is_ok_and(|ops| ops.len() == 1 && ops.iter().all(plain)) {
                out.answers.push((shard, *ticket, Answer::Outcome(Outcome::Reply(Reply::Ok))));
            }
        }
    }

    /// Everything up to this Ready is durable: releases the messages that depend on it.
    pub fn persisted(&mut self, number: u64, now: Now, out: &mut Out) {
        if self.failed {
            return;
        }
        // A Ready without anything to write waits only for those before it.
        let upto = self.unpersisted.iter().take_while(|u| u.number <= number || !u.writes).count();
        let released = self.unpersisted[..upto].last().map_or(number, |u| u.number);
        let done: Vec<Unpersisted> = self.unpersisted.drain(..upto).collect();
        self.raw.on_persist_ready(released);
        self.durable = self.raw.raft.raft_log.persisted;
        for u in done {
            for m in u.messages {
                self.send(m, now, out);
            }
        }
        self.installed(released);
        self.step_held_announcement(out);
    }

    /// Whether [`Replica::flush`] has something to do.
    pub fn has_work(&self) -> bool {
        let unadvanced = !self.awaiting_advance.is_empty() && self.advance_proposed.is_none();
        !self.failed
            && (!self.queue.is_empty()
                || self.reads.wants_round()
                || unadvanced
                || self.filling.has_work()
                || self.disk.as_ref().is_some_and(Disk::has_work)
                || self.raw.has_ready())
    }
}
