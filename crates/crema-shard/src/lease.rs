//! Time instead of a round of messages: the leader's lease, and the voter's promise that it stands on.
//!
//! ```text
//!   leader:  round issued at t --a majority took it after t--> lease until t + 0.85 E
//!   voter:   took an append or heartbeat at p > t        --> promise until p + E: no campaign, no help to another
//! ```
//!
//! (Ongaro 2014, section 6.4.1, with the promise made explicit.) A majority that elects another leader shares a voter with
//! the majority that confirmed the round, and that voter keeps its promise beyond the lease as long as no two clocks
//! differ in rate by more than 15 %. raft-rs's own check-quorum is no such promise: a rejection at a higher term ends it
//! (raft-rs 0.7, raft.rs:1362), and its LeaseBased reads count from nothing in particular.
//!
//! A forced vote (leadership transfer) asks no promise. So the lease is *suspended* before a TimeoutNow can leave, and only
//! a proposal that came after it and has committed revives it: see [`Lease::suspend`].

use crate::timing::Timing;
use crema_core::MonoTime;
use std::collections::VecDeque;
use std::time::Duration;

/// Proposals whose issue is remembered; of further ones the lease gains nothing until some have committed.
const PROPOSALS: usize = 64;

/// A leader's lease. Belongs to one leadership; a new one begins with a new lease.
#[derive(Debug, Default)]
pub struct Lease {
    until: MonoTime,
    /// Last index at the suspension, while suspended.
    suspended: Option<u64>,
    /// (index, issue) of proposals of this term, ascending.
    proposals: VecDeque<(u64, MonoTime)>,
}

impl Lease {
    /// Whether it holds at `now`.
    pub fn holds(&self, now: MonoTime) -> bool {
        self.suspended.is_none() && now < self.until
    }

    /// Until when it holds unless it is suspended.
    pub fn until(&self) -> MonoTime {
        self.until
    }

    /// Whether a proposal is needed to revive it.
    pub fn suspended(&self) -> bool {
        self.suspended.is_some()
    }

    /// Last index of the log at the suspension, while suspended.
    pub fn suspended_at(&self) -> Option<u64> {
        self.suspended
    }

    /// Entries up to `index` were proposed at `now`, before any message that carries them left.
    pub fn proposed(&mut self, index: u64, now: MonoTime) {
        let room = self.proposals.len() < PROPOSALS;
        match self.proposals.back_mut() {
            // Of one moment the last says most: when it has committed, so have the others.
            Some((last, at)) if *at == now => *last = index,
            _ if room => self.proposals.push_back((index, now)),
            _ => {}
        }
    }

    /// Everything up to `index` has committed: a majority took it after it was issued.
    pub fn committed(&mut self, index: u64, timing: &Timing) {
        let mut newest = None;
        while self.proposals.front().is_some_and(|(i, _)| *i <= index) {
            newest = self.proposals.pop_front();
        }
        let Some((proposed, issued)) = newest else { return };
        if self.suspended.is_some_and(|last| proposed > last) {
            self.suspended = None;
        }
        self.extend(issued, timing.lease());
    }

    /// A majority took a round of heartbeats that was issued at `issued`. Revives nothing that is suspended.
    pub fn confirmed(&mut self, issued: MonoTime, timing: &Timing) {
        self.extend(issued, timing.lease());
    }

    fn extend(&mut self, issued: MonoTime, lease: Duration) {
        if self.suspended.is_none() {
            self.until = self.until.max(issued.after(lease));
        }
    }

    /// The group falls asleep: nothing holds any more. A suspension lasts, since the TimeoutNow may still be on its way.
    pub fn rest(&mut self) {
        self.until = MonoTime(0);
        self.proposals.clear();
    }

    /// A TimeoutNow may leave from now on; `last` is the last index of the log, and stays so while a transfer is under
    /// way. Whoever acts on the message has no entry beyond `last`, however late it arrives (the message names `last`, and
    /// a voter that has more ignores it). So a majority that has committed a later proposal does not elect it, not even by
    /// forced votes: such a commit revives the lease.
    pub fn suspend(&mut self, last: u64) {
        self.suspended = Some(last);
        self.until = MonoTime(0);
        // Of entries up to `last` nobody learns anything any more.
        self.proposals.clear();
    }
}

/// A voter's promise to its leader.
#[derive(Clone, Copy, Debug, Default)]
pub struct Promise {
    until: MonoTime,
}

impl Promise {
    /// The leader's message was taken at `now`, and will be acknowledged.
    pub fn renew(&mut self, now: MonoTime, timing: &Timing) {
        self.until = self.until.max(now.after(timing.promise()));
    }

    /// Whether it binds at `now`.
    pub fn binds(&self, now: MonoTime) -> bool {
        now < self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> MonoTime {
        MonoTime(ms * 1_000_000)
    }
    fn t() -> Timing {
        Timing::default()
    }

    #[test]
    fn it_counts_from_the_issue_of_a_round_and_ends_before_the_promise() {
        let mut l = Lease::default();
        assert!(!l.holds(at(1)));
        l.confirmed(at(1_000), &t());
        assert_eq!(l.until(), at(1_425), "however long the round took");
        assert!(l.holds(at(1_424)) && !l.holds(at(1_425)));
        l.confirmed(at(900), &t());
        assert_eq!(l.until(), at(1_425), "an older round takes nothing away");
        let mut p = Promise::default();
        p.renew(at(1_000), &t());
        assert!(p.binds(at(1_499)) && !p.binds(at(1_500)));
    }

    #[test]
    fn a_committed_proposal_extends_it_from_its_own_issue() {
        let mut l = Lease::default();
        l.proposed(10, at(100));
        l.proposed(12, at(100));
        l.proposed(13, at(200));
        l.committed(11, &t());
        assert!(!l.holds(at(110)), "12 is of the same moment and may not have been sent when 11 was acknowledged");
        l.committed(12, &t());
        assert_eq!(l.until(), at(525));
        l.committed(20, &t());
        assert_eq!(l.until(), at(625));
    }

    #[test]
    fn only_a_later_proposal_ends_a_suspension() {
        let mut l = Lease::default();
        l.confirmed(at(100), &t());
        l.proposed(10, at(100));
        l.suspend(10);
        assert!(!l.holds(at(101)));
        l.confirmed(at(150), &t());
        l.committed(10, &t());
        assert!(l.suspended() && !l.holds(at(151)));
        l.proposed(11, at(200));
        l.committed(11, &t());
        assert!(!l.suspended());
        assert_eq!(l.until(), at(625));
    }

    #[test]
    fn sleep_ends_a_lease_but_no_suspension() {
        let mut l = Lease::default();
        l.confirmed(at(100), &t());
        l.rest();
        assert!(!l.holds(at(101)) && !l.suspended());
        l.suspend(10);
        l.rest();
        l.confirmed(at(5_000), &t());
        assert!(l.suspended() && !l.holds(at(5_001)), "a round after the sleep revives nothing");
    }

    #[test]
    fn proposals_are_bounded() {
        let mut l = Lease::default();
        (1..1_000).for_each(|i| l.proposed(i, at(i)));
        assert_eq!(l.proposals.len(), PROPOSALS);
        l.committed(2_000, &t());
        assert_eq!(l.until(), at(PROPOSALS as u64 + 425));
    }
}
