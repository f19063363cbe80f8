//! Linearizable reads by ReadIndex (Ongaro 2014, section 6.4), batched: one round serves every read that came before it.
//!
//! ```text
//!   queued --begin(context)--> round --confirmed(context, index)--> waiting --applied >= index--> ready
//!                                \-- too old, or leadership lost: back to queued, or refused
//! ```
//!
//! A context is used once, for ever: raft-rs 0.7 knows acknowledgements by context alone (etcd-io/raft 397).

use crate::proposals::Ticket;
use bytes::Bytes;
use crema_core::MonoTime;
use std::collections::VecDeque;
use std::time::Duration;

/// A read that was taken.
#[derive(Clone, Debug)]
pub struct Read {
    /// Who asked.
    pub ticket: Ticket,
    /// Operations, none of them a write.
    pub ops: Bytes,
}

#[derive(Debug)]
struct Round {
    context: u64,
    issued: MonoTime,
    reads: Vec<Read>,
}

/// The reads of one replica.
#[derive(Debug, Default)]
pub struct Reads {
    queued: Vec<Read>,
    round: Option<Round>,
    waiting: VecDeque<(u64, Vec<Read>)>,
    count: usize,
}

impl Reads {
    /// Takes a read.
    pub fn push(&mut self, read: Read) {
        self.count += 1;
        self.queued.push(read);
    }

    /// Whether a round should begin: reads are queued and none is on its way. One at a time, so that what arrives
    /// meanwhile shares the next.
    pub fn wants_round(&self) -> bool {
        !self.queued.is_empty() && self.round.is_none()
    }

    /// Whether there are reads that no round has confirmed.
    pub fn unconfirmed(&self) -> bool {
        !self.queued.is_empty() || self.round.as_ref().is_some_and(|r| !r.reads.is_empty())
    }

    /// Whether a round is on its way.
    pub fn in_round(&self) -> bool {
        self.round.is_some()
    }

    /// Begins a round for everything queued.
    pub fn begin(&mut self, context: u64, now: MonoTime) {
        debug_assert!(self.round.is_none());
        self.round = Some(Round { context, issued: now, reads: std::mem::take(&mut self.queued) });
    }

    /// A quorum confirmed the round with this context: its reads are answered once `index` is applied. Returns when the
    /// round was issued, `None` if it is not the present one.
    pub fn confirmed(&mut self, context: u64, index: u64) -> Option<MonoTime> {
        let round = self.round.take_if(|r| r.context == context)?;
        if !round.reads.is_empty() {
            self.waiting.push_back((index, round.reads));
        }
        Some(round.issued)
    }

    /// Everything, in the order taken: a lease covers it. Not only what is queued, since a later read of a connection must
    /// not be answered from an older state than an earlier one. A round on its way goes on, for the lease.
    pub fn take_all(&mut self, into: &mut Vec<Read>) {
        self.waiting.drain(..).for_each(|(_, reads)| into.extend(reads));
        if let Some(round) = &mut self.round {
            into.append(&mut round.reads);
        }
        into.append(&mut self.queued);
        self.count = 0;
    }

    /// Gives up a round that was begun longer than `limit` ago; its reads are queued again, for another context.
    pub fn expire(&mut self, now: MonoTime, limit: Duration) {
        if let Some(round) = self.round.take_if(|r| now.since(r.issued) >= limit) {
            let later = std::mem::replace(&mut self.queued, round.reads);
            self.queued.extend(later);
        }
    }

    /// Reads that may be answered with `applied` applied.
    pub fn take_ready(&mut self, applied: u64, into: &mut Vec<Read>) {
        while self.waiting.front().is_some_and(|(index, _)| *index <= applied) {
            let (_, reads) = self.waiting.pop_front().expect("just seen");
            self.count -= reads.len();
            into.extend(reads);
        }
    }

    /// Leadership is lost: reads that no round has confirmed.
    pub fn drain_unconfirmed(&mut self) -> Vec<Read> {
        let mut all = self.round.take().map(|r| r.reads).unwrap_or_default();
        all.append(&mut self.queued);
        self.count -= all.len();
        all
    }

    /// All reads, confirmed or not: nothing will be applied any more.
    pub fn drain(&mut self) -> Vec<Read> {
        let mut all: Vec<Read> = self.waiting.drain(..).flat_map(|(_, reads)| reads).collect();
        all.append(&mut self.drain_unconfirmed());
        self.count = 0;
        all
    }

    /// Reads taken but not answered.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::{Incarnation, NodeId};

    fn read(id: u64) -> Read {
        let ticket = Ticket { origin: NodeId(1), incarnation: Incarnation(1), process: 1, id };
        Read { ticket, ops: Bytes::new() }
    }
    fn ids(reads: &[Read]) -> Vec<u64> {
        reads.iter().map(|r| r.ticket.id).collect()
    }

    #[test]
    fn a_round_serves_only_what_came_before_it() {
        let mut r = Reads::default();
        r.push(read(1));
        r.begin(100, MonoTime(0));
        r.push(read(2));
        assert!(!r.wants_round(), "one round at a time");
        r.confirmed(99, 5);
        r.confirmed(100, 5);
        let mut out = Vec::new();
        r.take_ready(4, &mut out);
        assert!(out.is_empty(), "not before the index is applied");
        r.take_ready(5, &mut out);
        assert_eq!(ids(&out), [1]);
        assert!(r.wants_round());
        assert_eq!(r.len(), 1);
    }

    #[test]
    fn a_lease_serves_all_in_order_and_leaves_the_round_alone() {
        let mut r = Reads::default();
        for id in 1..=3 {
            r.push(read(id));
            if id < 3 {
                r.begin(id, MonoTime(id));
            }
            if id == 1 {
                assert_eq!(r.confirmed(1, 5), Some(MonoTime(1)));
            }
        }
        let mut out = Vec::new();
        r.take_all(&mut out);
        assert_eq!(ids(&out), [1, 2, 3]);
        assert!(r.is_empty() && r.in_round());
        assert_eq!(r.confirmed(2, 9), Some(MonoTime(2)));
        r.take_ready(9, &mut out);
        assert_eq!(out.len(), 3);
    }

    #[test]
    fn an_expired_round_cannot_be_confirmed_any_more() {
        let mut r = Reads::default();
        r.push(read(1));
        r.begin(7, MonoTime(0));
        r.push(read(2));
        r.expire(MonoTime(10), Duration::from_nanos(10));
        r.begin(8, MonoTime(10));
        r.confirmed(7, 3);
        let mut out = Vec::new();
        r.take_ready(100, &mut out);
        assert!(out.is_empty(), "an acknowledgement of the old context means nothing");
        assert_eq!(ids(&r.drain_unconfirmed()), [1, 2]);
        assert!(r.is_empty());
    }
}
