//! Reads by a lease: raft-rs alone serves stale ones, our replica in the same schedule serves none.
//!
//! ```text
//!   F leads term 2, L leads term 3; then
//!   a rejection of a higher term:  C --AppendResponse(4)--> F    raft-rs: F leaves L and elects C while L's round is fresh
//!   a late TimeoutNow:             L --(held)--> C               raft-rs: C is elected by force long after L went on
//!   a leader that hears nothing:   L --TimeoutNow--> C leads     raft-rs: L answers until its next check of the quorum
//! ```
//!
//! Each schedule also runs against our replica with the part of it taken away that is meant to help, and must be stale
//! again: so the schedule reaches what it is about.

use super::replica::Ours;
use super::stage::{Answer, Fate, Id, Member, Stage, campaigns_after, from, timing, to, way};
use crema_core::Now;
use crema_core::ShardId;
use crema_core::mutant::{Mutant, plant};
use crema_shard::message::{Body, Envelope};
use raft::eraftpb::{Message, MessageType};
use raft::storage::MemStorage;
use raft::{RawNode, ReadOnlyOption, StateRole};
use std::collections::{BTreeMap, BTreeSet};

/// The one that campaigns next: its rank has the first turn in term 3.
pub(super) const C: Id = 1;
/// The leader of term 3.
pub(super) const L: Id = 2;
/// The founding leader, later the follower that both need.
pub(super) const F: Id = 3;

/// raft-rs 0.7 as its documentation has it: check_quorum, pre_vote, LeaseBased. No wishes of ours beside the election
/// timeouts, which are the same as our replica's, so that both run the same schedule.
pub(super) struct Alone {
    id: Id,
    of: u64,
    raw: RawNode<MemStorage>,
    store: MemStorage,
    number: u64,
    applied: u64,
    proposed: BTreeSet<u64>,
    /// Reads whose index is known.
    ready: BTreeMap<u64, u64>,
}

impl Alone {
    fn fix_timeout(&mut self) {
        let ticks = campaigns_after(self.id, self.of, self.raw.raft.term);
        self.raw.raft.set_randomized_election_timeout(ticks);
    }

    fn apply(&mut self, entries: Vec<raft::eraftpb::Entry>, answers: &mut Vec<Answer>) {
        for e in entries {
            self.applied = e.index;
            if let Ok(number) = e.data[..].try_into().map(u64::from_le_bytes) {
                self.number = number;
                if self.proposed.remove(&number) {
                    answers.push(Answer::Written(number));
                }
            }
        }
    }
}

impl Member for Alone {
    fn new(id: Id, of: u64, first: bool, _: Now) -> Self {
        let store = MemStorage::new_with_conf_state(((1..=of).collect::<Vec<_>>(), vec![]));
        // The founding term of our replica, so that terms are the same numbers.
        store.wl().mut_hard_state().term = 1;
        let t = timing();
        let config = raft::Config {
            id,
            election_tick: t.election_ticks,
            heartbeat_tick: t.heartbeat_ticks,
            check_quorum: true,
            pre_vote: true,
            min_election_tick: t.campaign_ticks,
            max_election_tick: t.campaign_ticks + t.campaign_step_ticks * of as usize + 1,
            read_only_option: ReadOnlyOption::LeaseBased,
            ..raft::Config::default()
        };
        let raw =
            RawNode::new(&config, store.clone(), &crema_shard::raft_log::logger()).expect("a valid configuration");
        let (proposed, ready) = (BTreeSet::new(), BTreeMap::new());
        let mut alone = Alone { id, of, raw, store, number: 0, applied: 0, proposed, ready };
        alone.fix_timeout();
        if first {
            alone.raw.raft.election_elapsed = campaigns_after(id, of, 1) - 2;
        }
        alone
    }

    fn tick(&mut self, _: Now) {
        self.raw.tick();
        self.fix_timeout();
    }

    fn receive(&mut self, e: Envelope, _: Now) {
        let Body::Raft(m) = e.body else { return };
        self.raw.step(m).expect("a message of a member");
        self.fix_timeout();
    }

    fn work(&mut self, _: Now) -> (Vec<Envelope>, Vec<Answer>) {
        let mut messages: Vec<Message> = Vec::new();
        let mut answers = Vec::new();
        while self.raw.has_ready() {
            let mut ready = self.raw.ready();
            self.store.wl().append(ready.entries()).expect("a log without holes");
            if let Some(hard) = ready.hs() {
                self.store.wl().set_hardstate(hard.clone());
            }
            messages.extend(ready.take_messages());
            messages.extend(ready.take_persisted_messages());
            for state in ready.take_read_states() {
                let mark = u64::from_le_bytes(state.request_ctx[..].try_into().expect("eight bytes"));
                self.ready.insert(mark, state.index);
            }
            self.apply(ready.take_committed_entries(), &mut answers);
            let mut light = self.raw.advance(ready);
            messages.extend(light.take_messages());
            self.apply(light.take_committed_entries(), &mut answers);
            self.raw.advance_apply();
        }
        let (applied, found) = (self.applied, self.number);
        self.ready.retain(|mark, index| {
            let waits = applied < *index;
            if !waits {
                answers.push(Answer::Read { mark: *mark, found });
            }
            waits
        });
        let wrap = |m| Envelope { shard: ShardId(0), log_time: 0, floor: 0, body: Body::Raft(m) };
        (messages.into_iter().map(wrap).collect(), answers)
    }

    fn write(&mut self, number: u64) {
        self.raw.propose(vec![], number.to_le_bytes().to_vec()).expect("it leads");
        self.proposed.insert(number);
    }

    fn read(&mut self, mark: u64) {
        self.raw.read_index(mark.to_le_bytes().to_vec());
    }

    fn transfer(&mut self, to: Id) {
        self.raw.transfer_leader(to);
    }

    fn standing(&self) -> (u64, Id) {
        (self.raw.raft.term, self.raw.raft.leader_id)
    }
    fn answers_alone(&self, _: Now) -> bool {
        self.raw.raft.state == StateRole::Leader && self.raw.raft.commit_to_current_term()
    }
    fn promised(&self, _: Now) -> bool {
        let raft = &self.raw.raft;
        raft.leader_id != 0 && raft.election_elapsed < raft.election_timeout()
    }
}

/// Plants a fault for one test.
pub(super) struct Planted;

impl Planted {
    pub(super) fn new(mutant: Mutant) -> Planted {
        plant(Some(mutant));
        Planted
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        plant(None);
    }
}

/// L leads term 3 and has written 1 everywhere; the next check of its quorum is ten ticks away. One heartbeat of F to C,
/// from the term before, is still on its way.
pub(super) fn l_leads<M: Member>() -> Stage<M> {
    let mut s = Stage::<M>::new(3, F);
    assert_eq!(s.term(F), 2);
    let late = way(F, C).only(MessageType::MsgHeartbeat);
    s.rule(late, Fate::Hold);
    s.ticks_until(2, "a heartbeat is held", |s| s.held() > 0);
    s.lift(late);
    assert_eq!(s.held(), 1);
    s.transfer(F, L);
    assert_eq!([s.leader(L), s.leader(F), s.leader(C)], [L; 3]);
    assert_eq!(s.term(L), 3);
    s.write(L, 1);
    s.ticks(10);
    assert_eq!(s.acknowledged, 1);
    assert_eq!(s.reads.last(), Some(&(L, 1)));
    s
}

/// The rejection of a higher term, up to the moment when it has reached F. L's last round was confirmed just now.
fn a_rejection_reaches_f<M: Member>() -> Stage<M> {
    let mut s = l_leads::<M>();
    // C hears nothing of L any more; F hears nothing for E, just until C has its pre-vote.
    s.rule(way(L, C), Fate::Lose);
    s.rule(way(C, L), Fate::Lose);
    assert_eq!((campaigns_after(C, 3, 3), timing().election_ticks), (12, 10));
    s.ticks(2);
    s.rule(way(L, F), Fate::Lose);
    s.rule(way(F, L), Fate::Lose);
    s.ticks(9);
    assert_eq!((s.term(C), s.leader(C)), (3, L));
    s.lift(way(L, F));
    s.lift(way(F, L));
    // In this tick C comes before L. Its votes are lost.
    s.rule(from(C).only(MessageType::MsgRequestVote), Fate::Lose);
    s.tick();
    assert_eq!(s.term(C), 4, "F's promise is over: it granted the pre-vote, and C is a candidate");
    assert_eq!((s.term(F), s.leader(F), s.leader(L)), (3, L, L), "F follows L again and has not heard of term 4");
    let again = campaigns_after(C, 3, 4);
    s.ticks(again - 1);
    assert_eq!((s.term(C), s.term(F), s.leader(F)), (4, 3, L));
    assert!(s.answers_alone(L), "renewed through F");
    assert_eq!(s.reads.last(), Some(&(L, 1)));
    s.cut(L);
    s.lift(from(C).only(MessageType::MsgRequestVote));
    s.release();
    s
}

#[test]
fn raft_alone_is_stale_after_a_rejection_of_a_higher_term() {
    let mut s = a_rejection_reaches_f::<Alone>();
    assert_eq!((s.term(F), s.leader(F)), (4, 0), "check_quorum does not keep F with its leader");
    // The next tick: C asks for pre-votes again. L heard F one tick ago, far less than E.
    s.tick();
    assert_eq!((s.leader(C), s.leader(F)), (C, C));
    s.write(C, 2);
    assert_eq!(s.acknowledged, 2);
    s.read(L);
    assert_eq!(s.reads.last(), Some(&(L, 1)));
    assert_eq!(s.stale.len(), 1, "one tick after a quorum confirmed it, L answers from the past");
}

#[test]
fn ours_is_not_stale_after_a_rejection_of_a_higher_term() {
    let mut s = a_rejection_reaches_f::<Ours>();
    assert_eq!((s.term(F), s.leader(F)), (3, L), "F keeps its promise");
    let before = s.reads.len();
    let mut alone = 0;
    while s.leader(C) != C && s.leader(F) != F {
        s.tick();
        alone += u64::from(s.answers_alone(L));
        assert!(!s.answers_alone(L) || s.promised(F), "the lease ends before the promise that it stands on");
        assert!(s.reads.len() < before + 60, "nobody is elected");
    }
    assert!(alone > 4, "L used its lease to the end, {alone} ticks");
    let leader = if s.leader(C) == C { C } else { F };
    s.write(leader, 2);
    s.ticks(20);
    assert_eq!(s.acknowledged, 2);
    assert_eq!(s.reads.last(), Some(&(leader, 2)));
    assert!(s.stale.is_empty() && s.overlaps.is_empty(), "{:?} {:?}", s.stale, s.overlaps);
}

#[test]
fn without_its_promise_ours_is_as_stale_as_raft_alone() {
    let _planted = Planted::new(Mutant::NoPromise);
    let mut s = a_rejection_reaches_f::<Ours>();
    s.tick();
    assert_eq!(s.leader(C), C);
    s.write(C, 2);
    s.read(L);
    assert_eq!((s.acknowledged, s.stale.len()), (2, 1));
    assert!(!s.overlaps.is_empty());
}

/// L hands over to C, but its TimeoutNow is held; after the attempt has lapsed L goes on and writes 2. Then L is cut off.
fn l_goes_on_after_a_transfer<M: Member>(to_c: bool) -> Stage<M> {
    let mut s = l_leads::<M>();
    // The heartbeat of the first term has no part in this.
    s.release();
    let now = way(L, C).only(MessageType::MsgTimeoutNow);
    s.rule(now, Fate::Hold);
    if !to_c {
        s.rule(way(L, C).only(MessageType::MsgAppend), Fate::Lose);
    }
    s.transfer(L, C);
    assert_eq!(s.held(), 1);
    s.ticks(timing().election_ticks + 1);
    s.write(L, 2);
    s.tick();
    assert_eq!(s.acknowledged, 2);
    assert!(s.answers_alone(L), "a later entry has committed");
    assert_eq!(s.reads.last(), Some(&(L, 2)));
    s.cut(L);
    s.release();
    s
}

#[test]
fn raft_alone_is_stale_after_a_late_timeout_now() {
    let mut s = l_goes_on_after_a_transfer::<Alone>(true);
    assert_eq!((s.leader(C), s.leader(F), s.leader(L)), (C, C, L), "forced votes ask for no lease");
    s.write(C, 3);
    assert_eq!(s.acknowledged, 3);
    s.read(L);
    assert_eq!(s.reads.last(), Some(&(L, 2)));
    assert_eq!(s.stale.len(), 1);
}

/// Runs until somebody else leads and has written `number`, and some more.
fn others_go_on(s: &mut Stage<Ours>, number: u64) {
    s.ticks_until(60, "another leader", |s| s.leader(C) == C || s.leader(F) == F);
    let leader = if s.leader(C) == C { C } else { F };
    s.write(leader, number);
    s.ticks(20);
    assert_eq!(s.acknowledged, number);
    assert_eq!(s.reads.last(), Some(&(leader, number)));
    assert!(s.stale.is_empty() && s.overlaps.is_empty(), "{:?} {:?}", s.stale, s.overlaps);
}

#[test]
fn ours_ignores_a_timeout_now_whose_sender_has_gone_on() {
    let mut s = l_goes_on_after_a_transfer::<Ours>(true);
    assert_eq!((s.term(C), s.leader(C)), (3, L));
    others_go_on(&mut s, 3);
}

#[test]
fn without_the_guard_by_index_a_late_timeout_now_makes_ours_stale() {
    let _planted = Planted::new(Mutant::LateTimeoutNow);
    let mut s = l_goes_on_after_a_transfer::<Ours>(true);
    assert_eq!((s.leader(C), s.leader(L)), (C, L));
    s.write(C, 3);
    s.read(L);
    assert_eq!((s.acknowledged, s.stale.len()), (3, 1));
}

#[test]
fn who_acts_on_a_late_timeout_now_lacks_what_revived_the_lease_and_is_not_elected() {
    let mut s = l_goes_on_after_a_transfer::<Ours>(false);
    assert_eq!(s.term(C), 4, "it has no entry beyond the transfer, so it acts on the message");
    assert_eq!((s.term(F), s.leader(F)), (4, 0), "F is lifted by the forced vote, and refuses: its log is longer");
    assert!(s.promised(F) && s.answers_alone(L), "its promise to L stands all the same");
    others_go_on(&mut s, 3);
}

/// L hands over to C, which is elected; L hears nothing of it.
fn c_leads_and_l_does_not_know<M: Member>() -> Stage<M> {
    let mut s = l_leads::<M>();
    s.rule(to(L), Fate::Lose);
    s.transfer(L, C);
    assert_eq!((s.leader(C), s.leader(F), s.leader(L)), (C, C, L));
    s.write(C, 2);
    assert_eq!(s.acknowledged, 2);
    s
}

#[test]
fn raft_alone_is_stale_while_it_hands_over() {
    let mut s = c_leads_and_l_does_not_know::<Alone>();
    s.read(L);
    assert_eq!(s.reads.last(), Some(&(L, 1)));
    assert_eq!(s.stale.len(), 1);
}

#[test]
fn ours_suspends_its_lease_before_it_hands_over() {
    let mut s = c_leads_and_l_does_not_know::<Ours>();
    assert!(!s.answers_alone(L));
    s.ticks(20);
    s.lift(to(L));
    others_go_on(&mut s, 3);
    assert_eq!(s.leader(L), C);
}

#[test]
fn a_lease_that_is_not_suspended_makes_ours_stale() {
    let _planted = Planted::new(Mutant::TransferUnderLease);
    let mut s = c_leads_and_l_does_not_know::<Ours>();
    s.read(L);
    assert_eq!(s.stale.len(), 1);
}

/// L hands over to C, and its TimeoutNow is on its way for a while, in which rounds are confirmed.
#[test]
fn a_round_does_not_revive_a_lease_that_was_suspended() {
    let mut s = l_leads::<Ours>();
    s.release();
    s.rule(way(L, C).only(MessageType::MsgTimeoutNow), Fate::Hold);
    s.transfer(L, C);
    // A read for each, answered by a round.
    let before = s.reads.len();
    s.ticks(4);
    assert_eq!(s.reads[before..], [(L, 1); 4]);
    assert!(!s.answers_alone(L));
    s.cut(L);
    s.release();
    assert_eq!((s.leader(C), s.leader(L)), (C, L), "nobody has gone on since");
    s.write(C, 2);
    others_go_on(&mut s, 3);
}

/// Five members. A forced vote that fails lifts two promised voters to the term for which a third, whose promise is over,
/// asks for ordinary votes: an equal term to them, not a higher one.
#[test]
fn a_failed_forced_vote_does_not_open_the_way_to_an_ordinary_one() {
    // D has the first turn in term 3.
    const D: Id = 3;
    const E: Id = 4;
    const FOUNDER: Id = 5;
    assert_eq!(campaigns_after(D, 5, 3), 12);
    let mut s = Stage::<Ours>::new(5, FOUNDER);
    s.transfer(FOUNDER, L);
    s.write(L, 1);
    s.ticks(10);
    assert_eq!((s.acknowledged, s.term(L)), (1, 3));
    // A transfer to C whose message is held, and entries after it that C alone does not get.
    s.rule(way(L, C).only(MessageType::MsgTimeoutNow), Fate::Hold);
    s.rule(way(L, C).only(MessageType::MsgAppend), Fate::Lose);
    s.transfer(L, C);
    s.ticks(timing().election_ticks + 1);
    s.write(L, 2);
    s.tick();
    assert!(s.answers_alone(L));
    assert_eq!((s.acknowledged, s.held()), (2, 1));
    // D has the entry and is cut off from L until its promise is over. L goes on with E and the founder.
    s.rule(way(L, D), Fate::Lose);
    s.rule(way(D, L), Fate::Lose);
    s.ticks_until(20, "D asks for pre-votes", |s| s.leader(D) == 0);
    s.ticks(campaigns_after(D, 5, 3) - 1);
    assert!(!s.promised(D) && s.promised(E) && s.promised(FOUNDER) && s.answers_alone(L));
    assert_eq!((s.term(D), s.term(E), s.term(FOUNDER)), (3, 3, 3));
    s.cut(L);
    s.rule(way(C, D), Fate::Lose);
    s.release();
    assert_eq!((s.term(C), s.term(E), s.term(FOUNDER)), (4, 4, 4), "C's forced vote has failed and lifted them");
    assert!(s.answers_alone(L));
    for _ in 0..8 {
        s.tick();
        assert!(s.overlaps.is_empty(), "{:?}", s.overlaps);
    }
    s.ticks_until(60, "another leader", |s| s.leader(D) == D || s.leader(E) == E || s.leader(FOUNDER) == FOUNDER);
    let leader = [D, E, FOUNDER].into_iter().find(|id| s.leader(*id) == *id).expect("a leader");
    s.write(leader, 3);
    s.ticks(20);
    assert_eq!(s.acknowledged, 3);
    assert!(s.stale.is_empty() && s.overlaps.is_empty(), "{:?} {:?}", s.stale, s.overlaps);
}
