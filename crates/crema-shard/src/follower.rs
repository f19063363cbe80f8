//! Reads that a replica answers from its own state although it does not lead: the *bounded* level.
//!
//! ```text
//!   submit --fresh enough--> answer      else: one round a shard: ReadIndex to the leader, issued at t
//!                                          --index i--> wait until applied >= i --> fresh as of t --> answer all
//!                                          --refused, lost, late--> the linearizable way (a bound is kept by it too)
//! ```
//!
//! The age of an answer is the present less the *issue* time of the newest round whose index is applied here: everything
//! acknowledged before that issue is in the state.

use crate::effect::{ClientRequest, ConnId};
use crema_core::{LogIndex, MonoTime};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Most reads of one shard that wait for a round; further ones take the linearizable way.
const MAX_WAITING: usize = 4096;

/// A round: its mark, and when it was issued.
#[derive(Clone, Copy, Debug)]
struct Round {
    mark: u64,
    issued: MonoTime,
}

#[derive(Debug, Default)]
struct Shard {
    /// Issue of the newest round whose index is applied.
    fresh: Option<MonoTime>,
    round: Option<Round>,
    /// (index, issue) of a round that was answered, until that is applied.
    confirmed: Option<(LogIndex, MonoTime)>,
    /// With the number of rounds that each has waited for.
    waiting: VecDeque<(ClientRequest, Duration, u32)>,
}

/// What became of waiting reads.
#[derive(Debug, Default)]
pub struct Due {
    /// To be answered from the own state.
    pub answer: Vec<ClientRequest>,
    /// To be answered by the leader.
    pub linearizable: Vec<ClientRequest>,
}

/// Bounded reads of one node, by shard.
#[derive(Debug, Default)]
pub struct FollowerReads {
    shards: BTreeMap<crema_core::ShardId, Shard>,
}

impl FollowerReads {
    /// Number of reads that wait.
    pub fn in_flight(&self) -> usize {
        self.shards.values().map(|s| s.waiting.len()).sum()
    }

    /// Takes a read that may be `max_age` old.
    pub fn submit(&mut self, request: ClientRequest, max_age: Duration, now: MonoTime, due: &mut Due) {
        let s = self.shards.entry(request.shard).or_default();
        if s.fresh.is_some_and(|f| now.since(f) <= max_age) {
            due.answer.push(request);
        } else if s.waiting.len() >= MAX_WAITING {
            due.linearizable.push(request);
        } else {
            s.waiting.push_back((request, max_age, 0));
        }
    }

    /// Shards that want a round. The caller sends a ReadIndex with a mark of its own and says so by
    /// [`FollowerReads::began`].
    pub fn wanting(&self) -> Vec<crema_core::ShardId> {
        let wants = |s: &Shard| !s.waiting.is_empty() && s.round.is_none() && s.confirmed.is_none();
        self.shards.iter().filter(|(_, s)| wants(s)).map(|(id, _)| *id).collect()
    }

    /// A round was sent.
    pub fn began(&mut self, shard: crema_core::ShardId, mark: u64, now: MonoTime) {
        self.shards.entry(shard).or_default().round = Some(Round { mark, issued: now });
    }

    /// The leader has answered the round `mark` with `index`, or not.
    pub fn answered(&mut self, shard: crema_core::ShardId, mark: u64, index: Option<LogIndex>, due: &mut Due) {
        let Some(s) = self.shards.get_mut(&shard) else { return };
        let Some(round) = s.round.take_if(|r| r.mark == mark) else { return };
        match index {
            Some(index) => s.confirmed = Some((index, round.issued)),
            None => due.linearizable.extend(s.waiting.drain(..).map(|(r, ..)| r)),
        }
    }

    /// The own replica of `shard` has applied up to `applied`. Returns the issue as of which its state is complete, if that
    /// is news.
    pub fn applied(
        &mut self,
        shard: crema_core::ShardId,
        applied: LogIndex,
        now: MonoTime,
        due: &mut Due,
    ) -> Option<MonoTime> {
        let s = self.shards.get_mut(&shard)?;
        let (_, issued) = s.confirmed.take_if(|(index, _)| *index <= applied)?;
        s.fresh = s.fresh.max(Some(issued));
        for (request, max_age, rounds) in std::mem::take(&mut s.waiting) {
            if now.since(issued) <= max_age {
                due.answer.push(request);
            } else if rounds > 0 {
                // A bound shorter than a round trip: the leader keeps it.
                due.linearizable.push(request);
            } else {
                s.waiting.push_back((request, max_age, rounds + 1));
            }
        }
        Some(issued)
    }

    /// Shards that wait for an index to be applied.
    pub fn confirmed(&self) -> Vec<crema_core::ShardId> {
        self.shards.iter().filter(|(_, s)| s.confirmed.is_some()).map(|(id, _)| *id).collect()
    }

    /// Gives up what has been on its way for `limit`: the leader is asked instead.
    pub fn expire(&mut self, now: MonoTime, limit: Duration, due: &mut Due) {
        for s in self.shards.values_mut() {
            let issued = s.round.map(|r| r.issued).or(s.confirmed.map(|(_, at)| at));
            if issued.is_some_and(|at| now.since(at) >= limit) {
                (s.round, s.confirmed) = (None, None);
                due.linearizable.extend(s.waiting.drain(..).map(|(r, ..)| r));
            }
        }
    }

    /// The connection is gone: nobody waits for its answers.
    pub fn connection_closed(&mut self, conn: ConnId) {
        self.shards.values_mut().for_each(|s| s.waiting.retain(|(r, ..)| r.conn != conn));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effect::{ReadLevel, Token};
    use bytes::Bytes;
    use crema_core::ShardId;

    const S: ShardId = ShardId(0);
    const AGE: Duration = Duration::from_millis(100);

    fn at(ms: u64) -> MonoTime {
        MonoTime(ms * 1_000_000)
    }
    fn read(token: u64) -> ClientRequest {
        ClientRequest {
            conn: ConnId(token % 2),
            token: Token(token),
            shard: S,
            write: false,
            level: ReadLevel::Bounded(AGE),
            ops: Bytes::new(),
            deadline: at(5_000),
        }
    }
    fn tokens(list: &[ClientRequest]) -> Vec<u64> {
        list.iter().map(|r| r.token.0).collect()
    }

    #[test]
    fn one_round_serves_all_and_its_age_counts_from_its_issue() {
        let (mut f, mut due) = (FollowerReads::default(), Due::default());
        f.submit(read(1), AGE, at(0), &mut due);
        assert_eq!(f.wanting(), [S]);
        f.began(S, 7, at(10));
        f.submit(read(2), AGE, at(20), &mut due);
        assert!(f.wanting().is_empty());
        f.answered(S, 6, Some(LogIndex(50)), &mut due);
        f.answered(S, 7, Some(LogIndex(50)), &mut due);
        assert_eq!(f.applied(S, LogIndex(49), at(30), &mut due), None);
        assert_eq!(f.applied(S, LogIndex(50), at(40), &mut due), Some(at(10)));
        assert_eq!(tokens(&due.answer), [1, 2]);
        f.submit(read(3), AGE, at(110), &mut due);
        assert_eq!(tokens(&due.answer), [1, 2, 3], "just fresh enough");
        f.submit(read(4), AGE, at(111), &mut due);
        assert_eq!((due.answer.len(), f.in_flight()), (3, 1));
    }

    #[test]
    fn what_cannot_be_kept_here_goes_to_the_leader() {
        let (mut f, mut due) = (FollowerReads::default(), Due::default());
        f.submit(read(1), AGE, at(0), &mut due);
        f.began(S, 1, at(0));
        f.answered(S, 1, None, &mut due);
        assert_eq!(tokens(&due.linearizable), [1], "refused");
        f.submit(read(2), AGE, at(0), &mut due);
        f.began(S, 2, at(0));
        f.expire(at(999), Duration::from_secs(1), &mut due);
        assert_eq!(f.in_flight(), 1);
        f.expire(at(1_000), Duration::from_secs(1), &mut due);
        assert_eq!(tokens(&due.linearizable), [1, 2], "lost");
        f.answered(S, 2, Some(LogIndex(1)), &mut due);
        assert!(f.confirmed().is_empty(), "a late answer means nothing");
        // Two rounds, both slower than the bound.
        f.submit(read(3), AGE, at(2_000), &mut due);
        for mark in [3, 4] {
            f.began(S, mark, at(2_000));
            f.answered(S, mark, Some(LogIndex(1)), &mut due);
            f.applied(S, LogIndex(9), at(2_200), &mut due);
        }
        assert_eq!(tokens(&due.linearizable), [1, 2, 3]);
        assert!(due.answer.is_empty());
        f.submit(read(5), Duration::ZERO, at(3_000), &mut due);
        f.connection_closed(ConnId(1));
        assert_eq!(f.in_flight(), 0);
    }
}
