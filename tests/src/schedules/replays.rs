//! Old acknowledgements of read rounds arrive again (etcd 20418).

use super::raft_alone::{C, L, Planted, l_leads};
use super::replica::Ours;
use super::stage::{Fate, Stage, from, to};
use crema_core::mutant::Mutant;
use raft::eraftpb::MessageType;

/// L has had rounds confirmed, of which copies of all acknowledgements are held. Then it is cut off, the others have elected
/// C and written 2, and L, whose lease is over, still takes itself for the leader: a read waits there in a round.
fn a_read_waits_at_the_old_leader() -> Stage<Ours> {
    let mut s = l_leads::<Ours>();
    s.release();
    // Until L checks its quorum: afterwards it may go on for two election times.
    s.ticks(9);
    let acks = to(L).only(MessageType::MsgHeartbeatResponse);
    s.rule(acks, Fate::Copy);
    s.ticks(3);
    s.lift(acks);
    assert!(s.held() >= 4, "{} acknowledgements", s.held());
    s.cut(L);
    s.ticks_until(16, "C is elected", |s| s.leader(C) == C);
    s.write(C, 2);
    assert_eq!((s.acknowledged, s.leader(L), s.answers_alone(L)), (2, L, false));
    s.read(L);
    s
}

#[test]
fn replayed_acknowledgements_confirm_nothing_in_the_same_leadership() {
    let mut s = a_read_waits_at_the_old_leader();
    let answered = s.reads.iter().filter(|(id, _)| *id == L).count();
    while s.held() > 0 {
        s.release();
    }
    assert_eq!(s.leader(L), L, "none of them is of a later term");
    assert_eq!(s.reads.iter().filter(|(id, _)| *id == L).count(), answered);
    assert!(s.stale.is_empty() && s.overlaps.is_empty());
}

#[test]
fn with_one_context_for_all_rounds_they_confirm_a_stale_read() {
    let _planted = Planted::new(Mutant::ReusedReadContext);
    let mut s = a_read_waits_at_the_old_leader();
    while s.held() > 0 {
        s.release();
    }
    assert!(!s.stale.is_empty());
}

#[test]
fn replayed_acknowledgements_confirm_nothing_in_a_later_leadership() {
    let mut s = a_read_waits_at_the_old_leader();
    // L follows, and leads again.
    s.lift(from(L));
    s.lift(to(L));
    s.ticks(4);
    assert_eq!(s.leader(L), C);
    s.transfer(C, L);
    assert_eq!((s.leader(L), s.leader(C)), (L, L));
    s.write(L, 3);
    assert_eq!(s.acknowledged, 3);
    // Its lease ends; nobody hears it; a round waits when the old acknowledgements come.
    s.cut(L);
    s.ticks(9);
    assert!(!s.answers_alone(L) && s.leader(L) == L);
    s.read(L);
    let answered = s.reads.len();
    while s.held() > 0 {
        s.release();
    }
    assert_eq!(s.reads.len(), answered);
    assert!(s.term(L) > 3);
    // Only its own round does.
    s.lift(from(L));
    s.lift(to(L));
    s.ticks(2);
    assert!(s.reads.len() > answered);
    assert!(s.reads[answered..].iter().all(|r| *r == (L, 3)));
    assert!(s.stale.is_empty() && s.overlaps.is_empty());
}
