//! How a replica begins a group anew that has lost its majority: see [`crate::recovery`].

use super::checkpoint::Disk;
use super::{Machine, Out, Replica, ReplicaInit};
use crate::log_store::MemLog;
use crate::members::{Member, Members};
use crate::meta::Refounded;
use crate::recovery::ReplicaReport;
use crema_core::{Epoch, LogClock, LogIndex, Now, StateMachine, Term};
use raft::GetEntriesContext;
use raft::eraftpb::EntryType;

impl Replica {
    /// The one voter of a group that begins anew, with `init.machine` as its state; see [`Replica::into_legacy`].
    /// Where logs are kept on disk it waits until that state is there before it leads.
    pub fn refounded(
        init: ReplicaInit,
        own: Member,
        begins: Refounded,
        logger: &slog::Logger,
        now: Now,
    ) -> Result<Self, raft::Error> {
        let (index, term) = (begins.index.0, begins.term.0);
        let members = Members { voters: vec![own], ..init.members };
        let checkpoint_log_bytes = init.checkpoint_log_bytes;
        let init = ReplicaInit { members, ..init };
        let mut replica = Replica::new(init, MemLog::refounded(index, term, own.id.0), index, logger, now)?;
        replica.applied_term = Term(term);
        // Whether anybody knew the time is seen when it leads.
        replica.clock_stands = true;
        replica.disk = checkpoint_log_bytes.map(|limit| Disk::beginning(limit, index));
        // There is nobody to wait for.
        replica.raw.raft.election_elapsed = replica.raw.raft.randomized_election_timeout().saturating_sub(1);
        Ok(replica)
    }

    /// Ends it, and gives what it leaves to the group that takes the place of its own: its state behind the whole of its
    /// log, and the clock, unless that stands. What is not known to be committed counts as well: a majority that is gone
    /// may have acknowledged it. Nothing, where it has no state, or none that can be trusted.
    pub fn into_legacy(
        mut self,
        begins: Refounded,
        epoch: Epoch,
        out: &mut Out,
    ) -> Option<(StateMachine, Option<LogClock>)> {
        let usable = !self.failed && !self.empty;
        self.dissolve(out);
        if !usable {
            return None;
        }
        let from = self.applied().0 + 1;
        let rest = self.raw.raft.raft_log.entries(from, None, GetEntriesContext::empty(false)).unwrap_or_default();
        let Machine::Data(mut machine) = self.machine else { return None };
        for e in rest {
            let data = if e.entry_type == EntryType::EntryNormal { &e.data[..] } else { &[] };
            if let Err(corrupt) = machine.apply(LogIndex(e.index), data) {
                tracing::error!(shard = %self.shard, %corrupt, "the rest of this log is lost");
                break;
            }
        }
        let clock = (!self.clock_stands).then_some(self.clock);
        Some((machine.refounded(epoch, begins.index), clock))
    }

    /// Ends it: another replica takes its place, or none. Who waits for it is told that it does not lead.
    pub fn dissolve(&mut self, out: &mut Out) {
        if !self.failed {
            self.end(out);
        }
    }

    /// What it says of itself in a census; nothing, if it cannot be trusted.
    pub fn report(&self) -> Option<ReplicaReport> {
        if self.failed {
            return None;
        }
        let log = &self.raw.raft.raft_log;
        let members = if self.empty { Members::default() } else { self.members.clone() };
        let Members { voters, outgoing, .. } = members;
        let last = LogIndex(log.last_index());
        Some(ReplicaReport { id: self.id, voters, outgoing, last_term: Term(log.last_term()), last })
    }

    /// Goes on with the clock of the replica before it.
    pub fn keep_time(&mut self, clock: LogClock, now: Now) {
        self.clock = clock;
        self.clock_stands = false;
        self.clock_observe(self.applied_time(), now);
    }
}
