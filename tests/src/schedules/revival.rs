//! A lease that was suspended for a transfer comes back, whatever happens on the way.

use super::raft_alone::{C, F, L};
use super::replica::Ours;
use super::stage::{Fate, Member, Stage, from, way};
use crema_core::ShardId;
use crema_shard::message::{Body, Envelope};
use raft::eraftpb::{Message, MessageType};

/// Ticks after which a transfer is given up, and some in which reads ask for the lease again.
const ABORTED: usize = 12;

fn l_leads() -> Stage<Ours> {
    let mut s = Stage::<Ours>::new(3, L);
    s.write(L, 1);
    s.ticks(3);
    assert!(s.answers_alone(L));
    // The news never arrives, so that each transfer comes to nothing.
    s.rule(way(L, C).only(MessageType::MsgTimeoutNow), Fate::Lose);
    s
}

#[test]
fn an_aborted_transfer_costs_the_lease_for_a_moment() {
    let mut s = l_leads();
    s.transfer(L, C);
    assert!(!s.answers_alone(L));
    s.ticks(ABORTED + 3);
    assert!(s.answers_alone(L), "reads alone bring it back");
    assert_eq!((&s.stale[..], &s.overlaps[..]), (&[][..], &[][..]));
}

#[test]
fn a_second_transfer_before_the_reviving_entry_has_committed_does_not_end_it_for_good() {
    let mut s = l_leads();
    s.transfer(L, C);
    // The entry that is to revive the lease finds nobody before the next transfer begins.
    s.rule(from(L).only(MessageType::MsgAppend), Fate::Hold);
    s.ticks_until(3 * ABORTED, "an entry is on its way", |s| s.held() > 0);
    s.transfer(L, C);
    s.lift(from(L).only(MessageType::MsgAppend));
    while s.held() > 0 {
        s.release();
    }
    s.ticks(2 * ABORTED);
    assert!(s.answers_alone(L), "the entry came before the second transfer: another is needed, and proposed");
    assert_eq!((&s.stale[..], &s.overlaps[..]), (&[][..], &[][..]));
}

/// Elected and deposed between two rounds of its driver: what came in between is turned away, not kept for ever.
#[test]
fn a_leader_of_a_moment_keeps_nothing_that_it_took() {
    let mut s = Stage::<Ours>::new(3, F);
    s.rule(way(C, L).only(MessageType::MsgRequestVoteResponse), Fate::Hold);
    s.cut(F);
    s.ticks_until(40, "a vote is on its way to L", |s| s.held() > 0);
    let (vote, now) = (s.take_held(), s.now());
    let l = s.member_mut(L);
    l.receive(vote, now);
    l.read(1);
    l.write(1);
    assert!(l.replica().reads_in_words().starts_with("reads 1 + 0,"), "it leads, and takes them");
    let (msg_type, term) = (MessageType::MsgHeartbeat, l.standing().0 + 2);
    let m = Message { msg_type, from: C, to: L, term, ..Message::default() };
    l.receive(Envelope { shard: ShardId(0), log_time: 0, floor: 0, body: Body::Raft(m) }, now);
    l.work(now);
    assert!(l.replica().reads_in_words().starts_with("reads 0 + 0,"), "{}", l.replica().reads_in_words());
    assert!(!l.replica().has_work());
}
