//! Our replica on the stage.

use super::stage::{Answer, Id, Member, timing};
use bytes::Bytes;
use crema_core::op::{SetCond, SetExpire};
use crema_core::{
    Epoch, Incarnation, KeyRef, LogIndex, LogTime, NodeId, Now, Op, Outcome, ReplicaId, Reply, SLOT_COUNT, Seq,
    SessionId, SessionTag, ShardId, ShardInit, SlotRange, StateMachine, encode_ops,
};
use crema_shard::ReadMode;
use crema_shard::log_store::FOUNDING_INDEX;
use crema_shard::members::{Member as Placed, Members};
use crema_shard::message::{self, Envelope};
use crema_shard::proposals::Ticket;
use crema_shard::reads::Read;
use crema_shard::replica::{Machine, MayBegin, Out, Replica, ReplicaInit};
use std::collections::BTreeMap;

/// Mark of the request that opens the session; no read and no write has it.
const OPENING: u64 = u64::MAX;

/// Most bytes of log that are kept for a member that lags.
pub(super) const MAX_LOG_BYTES: usize = 1024 * 1024;

enum Asked {
    Write(u64),
    Read(u64),
}

/// A replica, and the one gateway that it has.
pub(super) struct Ours {
    id: Id,
    replica: Replica,
    out: Out,
    session: Option<SessionId>,
    /// Numbers that wait for the session.
    waiting: Vec<u64>,
    seq: u64,
    next_ticket: u64,
    asked: BTreeMap<u64, Asked>,
    /// Least length of a number when it is written.
    pub(super) width: usize,
}

fn key() -> KeyRef<'static> {
    KeyRef::new(0, b"k").expect("a short key")
}
fn encode(op: Op<'_>) -> Bytes {
    encode_ops(&[op]).expect("a short operation")
}

impl Ours {
    pub(super) fn replica(&self) -> &Replica {
        &self.replica
    }

    fn ticket(&mut self, asked: Asked) -> Ticket {
        self.next_ticket += 1;
        self.asked.insert(self.next_ticket, asked);
        Ticket { origin: NodeId(self.id), incarnation: Incarnation(self.id.into()), process: 1, id: self.next_ticket }
    }

    fn send_writes(&mut self) {
        let Some(session) = self.session else { return };
        for number in std::mem::take(&mut self.waiting) {
            self.seq += 1;
            let tag = SessionTag { session, seq: Seq(self.seq), low: Seq(self.seq - 1) };
            let value = format!("{number:0width$}", width = self.width);
            let (cond, expire) = (SetCond::Always, SetExpire::Clear);
            let ops = encode(Op::Set { key: key(), value: value.as_bytes(), cond, expire, get: false });
            let ticket = self.ticket(Asked::Write(number));
            self.replica.write(ticket, tag, ops, &mut self.out);
        }
    }

    fn take(&mut self, id: u64, answer: message::Answer, answers: &mut Vec<Answer>) {
        match (self.asked.remove(&id), answer) {
            (None, message::Answer::Outcome(Outcome::Reply(Reply::Int(session)))) if id == OPENING => {
                self.session = Some(SessionId(session as u64));
                self.send_writes();
            }
            (Some(Asked::Write(n)), message::Answer::Outcome(Outcome::Reply(Reply::Ok))) => {
                answers.push(Answer::Written(n));
            }
            (Some(Asked::Read(mark)), message::Answer::Outcome(Outcome::Reply(reply))) => {
                let found = match &reply {
                    Reply::Bulk(b) => std::str::from_utf8(b).expect("a number").parse().expect("a number"),
                    _ => 0,
                };
                answers.push(Answer::Read { mark, found });
            }
            // Refused: it does not lead any more.
            _ => {}
        }
    }
}

impl Member for Ours {
    fn new(id: Id, of: u64, first: bool, now: Now) -> Self {
        let voter = |id: u64| Placed { id: ReplicaId(id), node: NodeId(id), incarnation: Incarnation(id.into()) };
        let log_time = LogTime(now.wall.0);
        let machine = StateMachine::new(ShardInit {
            range: SlotRange { start: 0, end: SLOT_COUNT },
            epoch: Epoch(1),
            secret: 7,
            log_time,
            applied: LogIndex(FOUNDING_INDEX),
        });
        let init = ReplicaInit {
            shard: ShardId(0),
            id: ReplicaId(id),
            members: Members { voters: (1..=of).map(voter).collect(), epoch: Epoch(1), ..Members::default() },
            machine: Machine::Data(Box::new(machine)),
            log_time,
            timing: timing(),
            max_log_bytes: MAX_LOG_BYTES,
            context_prefix: id,
            read_mode: ReadMode::Lease,
            chunk_bytes: 64,
            checkpoint_log_bytes: None,
            eviction: None,
        };
        let replica = Replica::founded(init, first, &crema_shard::raft_log::logger(), now).expect("a valid group");
        Ours {
            id,
            replica,
            out: Out::default(),
            session: None,
            waiting: Vec::new(),
            seq: 0,
            next_ticket: 0,
            asked: BTreeMap::new(),
            width: 1,
        }
    }

    fn tick(&mut self, now: Now) {
        self.replica.tick(now, |_| true, MayBegin::default(), &mut self.out);
    }

    fn receive(&mut self, e: Envelope, now: Now) {
        let message::Body::Raft(m) = &e.body else { return };
        let (node, life) = (NodeId(m.from), Incarnation(m.from.into()));
        self.replica.step(node, life, e, now, &mut self.out);
    }

    fn work(&mut self, now: Now) -> (Vec<Envelope>, Vec<Answer>) {
        let mut answers = Vec::new();
        loop {
            while self.replica.has_work() {
                let mut durable = Vec::new();
                self.replica.flush(now, &mut self.out, |n| durable.push(n));
                for n in durable {
                    self.replica.persisted(n, now, &mut self.out);
                }
            }
            // What waits for the lease has nothing to do but look at the clock.
            self.replica.flush(now, &mut self.out, |_| unreachable!("there was no work"));
            let got = std::mem::take(&mut self.out.answers);
            if got.is_empty() {
                break;
            }
            for (_, ticket, answer) in got {
                self.take(ticket.id, answer, &mut answers);
            }
        }
        assert!(!self.replica.failed(), "{:?}", self.out.notes);
        let messages = self.out.envelopes.drain(..).map(|(_, e)| e).collect();
        (messages, answers)
    }

    fn write(&mut self, number: u64) {
        self.waiting.push(number);
        if self.session.is_none() {
            let ticket =
                Ticket { origin: NodeId(self.id), incarnation: Incarnation(self.id.into()), process: 1, id: OPENING };
            self.replica.open_session(ticket, &mut self.out);
        }
        self.send_writes();
    }

    fn read(&mut self, mark: u64) {
        let ticket = self.ticket(Asked::Read(mark));
        self.replica.read(Read { ticket, ops: encode(Op::Get { key: key() }) }, &mut self.out);
    }

    fn transfer(&mut self, to: Id) {
        assert!(self.replica.transfer(ReplicaId(to)), "the transfer begins");
    }

    fn standing(&self) -> (u64, Id) {
        let l = self.replica.leadership();
        (l.term.0, l.leader.map_or(0, |n| n.0))
    }
    fn answers_alone(&self, now: Now) -> bool {
        self.replica.holds_lease(now)
    }
    fn promised(&self, now: Now) -> bool {
        self.replica.promised(now)
    }
}
