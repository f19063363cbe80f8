//! The lease and the promise in time, however ticks fall (tikv 9728).

use super::raft_alone::{Alone, C, F, L, Planted, l_leads};
use super::replica::Ours;
use super::stage::{Member, Stage};
use crema_core::mutant::Mutant;
use crema_shard::Timing;

#[test]
fn the_lease_ends_a_tick_before_the_promise_and_the_promise_before_any_campaign() {
    let t = Timing::default();
    assert!(t.lease() + t.tick <= t.promise(), "as TiKV demands: a lease of at most one tick less");
    // Clocks that differ in rate by 15 %: the voter's runs faster.
    assert!(t.lease() * 115 / 100 < t.promise());
    assert!(t.promise() < t.tick * t.campaign_ticks as u32, "nobody campaigns while bound, without any stall");
    // The promise is not shorter than what raft-rs counts, which drops votes for so long, and no longer either: a
    // leader without a quorum steps down after it.
    assert_eq!(t.promise(), t.tick * t.election_ticks as u32);
    // A lease in use is renewed at three quarters and survives the loss of a heartbeat.
    assert!(t.tick * 2 * (t.heartbeat_ticks as u32) < t.lease());
}

/// C and F stood still and get all their ticks at once, just after L has been confirmed; then L is cut off.
fn ticks_burst<M: Member>() -> Stage<M> {
    let mut s = l_leads::<M>();
    s.ticks(2);
    assert!(s.answers_alone(L));
    assert_eq!(s.reads.last(), Some(&(L, 1)));
    s.cut(L);
    s.burst(F, 11);
    s.burst(C, 11);
    s.burst(C, 1);
    s
}

#[test]
fn raft_alone_counts_ticks_and_is_stale_after_a_burst() {
    let mut s = ticks_burst::<Alone>();
    assert_eq!((s.leader(C), s.leader(L)), (C, L), "no time has passed");
    s.write(C, 2);
    s.read(L);
    assert_eq!((s.acknowledged, s.stale.len()), (2, 1));
}

#[test]
fn ours_keeps_the_promise_in_time() {
    let mut s = ticks_burst::<Ours>();
    assert_eq!((s.leader(C), s.leader(F), s.leader(L)), (L, L, L));
    s.burst(C, 100);
    while s.answers_alone(L) {
        assert!(s.promised(C) && s.promised(F), "the lease ends before the promises that it stands on");
        assert_eq!((s.leader(C), s.leader(F)), (L, L));
        s.tick();
        s.burst(C, 3);
        s.burst(F, 3);
    }
    s.ticks_until(6, "a new leader, once the promises are over", |s| s.leader(C) == C || s.leader(F) == F);
    let leader = s.leader(C);
    s.write(leader, 2);
    s.ticks(20);
    assert_eq!(s.acknowledged, 2);
    assert!(s.stale.is_empty() && s.overlaps.is_empty(), "{:?} {:?}", s.stale, s.overlaps);
}

#[test]
fn without_its_promise_ours_is_stale_after_a_burst() {
    let _planted = Planted::new(Mutant::NoPromise);
    let mut s = ticks_burst::<Ours>();
    assert_eq!((s.leader(C), s.leader(L)), (C, L));
    s.write(C, 2);
    s.read(L);
    assert_eq!((s.acknowledged, s.stale.len()), (2, 1));
}
