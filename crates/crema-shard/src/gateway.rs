//! The gateway of a node: takes client requests, brings each to its shard's leader, holds and retries through elections,
//! and answers each exactly once.
//!
//! ```text
//!   submit --lane (conn, shard)--> flow (shard): window of writes, queue of reads --send--> Requests for a leader
//!   answer(attempt, seq) --> completion        refusal, lost peer, stall --> rewind: next attempt, from the first unfinished
//! ```
//!
//! **Exactly once.** All writes of this node to one shard form one session. A write keeps its sequence number through all
//! attempts; apply executes a number once and in order, and refuses what skips one (`Gap`). So a rewind may send
//! everything unfinished again, whatever became of the earlier copies.
//!
//! **Order per connection and shard.** Writes follow each other in the flow. A read with unfinished writes of its
//! connection before it goes through the log behind them; a write waits for its connection's earlier reads. What follows
//! a held request is held behind it.
//!
//! A write that reaches its deadline is answered `NotApplied` if no copy was ever sent, else `Unknown`.

use crate::effect::{ClientRequest, ClientResult, Completion, ConnId, Refusal, Token};
use crate::message::{Answer, Request, RequestBody};
use bytes::Bytes;
use crema_core::limits::SESSION_WINDOW;
use crema_core::mutant::{Mutant, planted};
use crema_core::{MonoTime, NodeId, OpError, Outcome, Reply, Seq, SessionId, SessionTag, ShardId, Term};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

/// First back-off after a refusal; doubles up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(2);
/// Longest back-off.
const MAX_BACKOFF: Duration = Duration::from_millis(100);
/// A flow that sent something and heard nothing for this long sends again: safe, since copies are executed once.
const STALL: Duration = Duration::from_millis(1500);
/// Most reads of one shard on their way at once.
const READ_WINDOW: usize = 4096;

/// Marks: two bits of kind, then attempt and sequence number, or a plain counter.
const KIND_SHIFT: u32 = 62;
const KIND_WRITE: u64 = 0;
const KIND_READ: u64 = 1;
const KIND_OPEN: u64 = 2;
/// Attempts are compared by their lower bits only; a flow would have to rewind four million times within one flight of
/// a message to confuse two of them.
const ATTEMPT_BITS: u32 = 22;
const SEQ_BITS: u32 = 40;

/// Where a shard's leader is believed to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its node, this one included.
    pub node: NodeId,
    /// In which term.
    pub term: Term,
}

#[derive(Debug)]
enum Session {
    None,
    /// Asked for with this mark.
    Opening(u64),
    Open(SessionId),
}

#[derive(Debug)]
struct Write {
    conn: ConnId,
    token: Token,
    ops: Bytes,
    deadline: MonoTime,
    state: WriteState,
}

/// A write stays in the window until all before it are finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriteState {
    Waiting,
    /// Answered by apply, hence executed in every leader's log.
    Answered,
    /// Its deadline passed after it was sent: nothing is sent of it any more, and what follows it must wait until
    /// everything before it is finished, since only then does the low watermark tell apply to skip it.
    Abandoned,
}

#[derive(Debug)]
struct PendingRead {
    conn: ConnId,
    token: Token,
    ops: Bytes,
    deadline: MonoTime,
}

/// All requests of this node to one shard.
struct Flow {
    session: Session,
    /// Every sequence number at or below is answered.
    low: u64,
    /// Writes `low + 1 ..`, answered ones included until all before them are.
    window: VecDeque<Write>,
    /// How many of the window were sent in this attempt.
    sent: usize,
    /// How many of the window have ever been sent in this session: their fate may be open.
    ever: usize,
    attempt: u64,
    target: Option<Target>,
    reads: VecDeque<PendingRead>,
    /// Reads on their way: mark to read and receiver.
    reading: BTreeMap<u64, PendingRead>,
    hold_until: MonoTime,
    backoff: Duration,
    /// Since when no write on its way was finished. Progress counts, not noise: answers to reads say nothing of a write.
    quiet_since: MonoTime,
    /// The same for reads.
    reads_quiet_since: MonoTime,
}

impl Flow {
    fn new() -> Self {
        Flow {
            session: Session::None,
            low: 0,
            window: VecDeque::new(),
            sent: 0,
            ever: 0,
            attempt: 0,
            target: None,
            reads: VecDeque::new(),
            reading: BTreeMap::new(),
            hold_until: MonoTime(0),
            backoff: MIN_BACKOFF,
            quiet_since: MonoTime(0),
            reads_quiet_since: MonoTime(0),
        }
    }

    fn idle(&self) -> bool {
        self.window.is_empty() && self.reads.is_empty() && self.reading.is_empty()
    }

    fn in_flight(&self) -> bool {
        self.sent > 0 || !self.reading.is_empty() || matches!(self.session, Session::Opening(_))
    }

    /// Everything on its way counts as lost: the next attempt begins with the first unfinished write.
    fn rewind(&mut self, now: MonoTime, wait: bool) {
        self.attempt += 1;
        self.sent = 0;
        if matches!(self.session, Session::Opening(_)) {
            self.session = Session::None;
        }
        self.rewind_reads();
        if planted(Mutant::ReorderedRetry) {
            // What was never sent has no number yet.
            self.window.make_contiguous()[self.ever..].reverse();
        }
        if wait {
            self.wait(now);
        }
    }

    /// Reads on their way go back to the front in their old order; late answers to the old marks are dropped. All of
    /// them, so that no read of a connection is answered from an older state than an earlier one.
    fn rewind_reads(&mut self) {
        for (_, read) in std::mem::take(&mut self.reading).into_iter().rev() {
            self.reads.push_front(read);
        }
    }

    /// Holds the flow for a while; a burst of refusals counts once.
    fn wait(&mut self, now: MonoTime) {
        if now >= self.hold_until {
            self.hold_until = now.after(self.backoff);
            self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
        }
    }

    /// Drops what is answered from the front of the window.
    fn settle(&mut self) {
        while self.window.front().is_some_and(|w| w.state != WriteState::Waiting) {
            self.window.pop_front();
            self.low += 1;
            self.sent = self.sent.saturating_sub(1);
            self.ever = self.ever.saturating_sub(1);
        }
    }
}

/// Order of one connection's requests to one shard.
#[derive(Default)]
struct Lane {
    writes: usize,
    reads: usize,
    held: VecDeque<ClientRequest>,
}

/// All client requests of one node that are not answered.
#[derive(Default)]
pub struct Gateway {
    flows: Vec<Flow>,
    /// Shards whose flow may have something to send.
    pending: BTreeSet<ShardId>,
    /// Shards whose flow is not idle.
    active: BTreeSet<ShardId>,
    lanes: HashMap<(ConnId, ShardId), Lane>,
    next_mark: u64,
    in_flight: usize,
    retries: u64,
}

impl Gateway {
    /// A gateway to `shards` shards.
    pub fn set_shards(&mut self, shards: usize) {
        self.flows.resize_with(shards, Flow::new);
    }

    /// Requests taken and not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Rewinds so far.
    pub fn retries(&self) -> u64 {
        self.retries
    }

    /// Takes a request. A shard that does not exist is refused.
    pub fn submit(&mut self, request: ClientRequest, done: &mut Vec<Completion>) {
        let (conn, shard) = (request.conn, request.shard);
        if shard.0 as usize >= self.flows.len() {
            let result = ClientResult::NotApplied(Refusal::WrongShard);
            done.push(Completion { conn, token: request.token, result });
            return;
        }
        self.in_flight += 1;
        let lane = self.lanes.entry((conn, shard)).or_default();
        if !lane.held.is_empty() || (request.write && lane.reads > 0) {
            lane.held.push_back(request);
            self.active.insert(shard);
            return;
        }
        self.admit(request);
    }

    /// Puts a request into its flow. A read behind writes of its connection becomes one of them.
    fn admit(&mut self, r: ClientRequest) {
        let lane = self.lanes.entry((r.conn, r.shard)).or_default();
        let flow = &mut self.flows[r.shard.0 as usize];
        if r.write || lane.writes > 0 {
            lane.writes += 1;
            let w =
                Write { conn: r.conn, token: r.token, ops: r.ops, deadline: r.deadline, state: WriteState::Waiting };
            flow.window.push_back(w);
        } else {
            lane.reads += 1;
            flow.reads.push_back(PendingRead { conn: r.conn, token: r.token, ops: r.ops, deadline: r.deadline });
        }
        self.pending.insert(r.shard);
        self.active.insert(r.shard);
    }

    /// Answers one request and lets those go on that waited for it.
    fn complete(
        &mut self,
        conn: ConnId,
        shard: ShardId,
        token: Token,
        write: bool,
        result: ClientResult,
        done: &mut Vec<Completion>,
    ) {
        self.in_flight -= 1;
        // A closed connection has no lane any more; nobody waits for the answer.
        let Some(lane) = self.lanes.get_mut(&(conn, shard)) else { return };
        if write {
            lane.writes -= 1
        } else {
            lane.reads -= 1
        }
        done.push(Completion { conn, token, result });
        let mut go_on = Vec::new();
        let (mut writes, mut reads) = (lane.writes, lane.reads);
        while let Some(next) = lane.held.front() {
            if next.write && reads > 0 {
                break;
            }
            if next.write || writes > 0 {
                writes += 1
            } else {
                reads += 1
            }
            go_on.push(lane.held.pop_front().expect("just seen"));
        }
        if writes == 0 && reads == 0 && lane.held.is_empty() {
            self.lanes.remove(&(conn, shard));
        }
        for r in go_on {
            self.admit(r);
        }
    }

    /// The connection is gone: held requests are forgotten; what is in a flow goes its way without an answer.
    pub fn connection_closed(&mut self, conn: ConnId) {
        let mut dropped = 0;
        self.lanes.retain(|(c, _), lane| {
            if *c == conn {
                dropped += lane.held.len();
            }
            *c != conn
        });
        self.in_flight -= dropped;
    }

    /// The leader of `shard` is believed at `target`. What was sent elsewhere is sent again there.
    pub fn set_target(&mut self, shard: ShardId, target: Option<Target>, now: MonoTime) {
        let Some(flow) = self.flows.get_mut(shard.0 as usize) else { return };
        if flow.target == target {
            return;
        }
        let elsewhere = flow.target.map(|t| t.node) != target.map(|t| t.node);
        let later_term = flow.target.is_some_and(|t| target.is_some_and(|n| n.term > t.term));
        flow.target = target;
        if (elsewhere || later_term) && flow.in_flight() {
            self.retries += 1;
            flow.rewind(now, false);
        }
        // News of a leader ends the waiting for one.
        flow.hold_until = MonoTime(0);
        flow.backoff = MIN_BACKOFF;
        if !flow.idle() {
            self.pending.insert(shard);
        }
    }

    /// The streams to `node` broke: what was sent there may be lost.
    pub fn peer_lost(&mut self, node: NodeId, now: MonoTime) {
        for shard in self.active.clone() {
            let flow = &mut self.flows[shard.0 as usize];
            if flow.target.is_some_and(|t| t.node == node) && flow.in_flight() {
                self.retries += 1;
                flow.rewind(now, true);
                self.pending.insert(shard);
            }
        }
    }

    /// Requests to send now, with their receivers.
    pub fn poll(&mut self, now: MonoTime, send: &mut Vec<(NodeId, Request)>) {
        for shard in std::mem::take(&mut self.pending) {
            let flow = &mut self.flows[shard.0 as usize];
            let Some(target) = flow.target.filter(|_| now >= flow.hold_until) else {
                // Looked at again when a leader is known, or at the next tick.
                continue;
            };
            if flow.sent == 0 && !matches!(flow.session, Session::Opening(_)) {
                flow.quiet_since = now;
            }
            if flow.reading.is_empty() {
                flow.reads_quiet_since = now;
            }
            while flow.reading.len() < READ_WINDOW
                && let Some(read) = flow.reads.pop_front()
            {
                self.next_mark += 1;
                let id = KIND_READ << KIND_SHIFT | self.next_mark;
                send.push((target.node, Request { shard, id, body: RequestBody::Read { ops: read.ops.clone() } }));
                flow.reading.insert(id, read);
            }
            if flow.window.is_empty() {
                continue;
            }
            let session = match flow.session {
                Session::Open(id) => id,
                Session::Opening(_) => continue,
                Session::None => {
                    self.next_mark += 1;
                    let id = KIND_OPEN << KIND_SHIFT | self.next_mark;
                    flow.session = Session::Opening(id);
                    send.push((target.node, Request { shard, id, body: RequestBody::OpenSession }));
                    continue;
                }
            };
            let attempt = flow.attempt & ((1 << ATTEMPT_BITS) - 1);
            while flow.sent < flow.window.len().min(SESSION_WINDOW) {
                let w = &flow.window[flow.sent];
                if w.state == WriteState::Abandoned {
                    break;
                }
                let seq = flow.low + 1 + flow.sent as u64;
                if w.state == WriteState::Waiting {
                    let tag = SessionTag { session, seq: Seq(seq), low: Seq(flow.low) };
                    let id = KIND_WRITE << KIND_SHIFT | attempt << SEQ_BITS | seq;
                    send.push((
                        target.node,
                        Request { shard, id, body: RequestBody::Write { tag, ops: w.ops.clone() } },
                    ));
                }
                flow.sent += 1;
                flow.ever = flow.ever.max(flow.sent);
            }
        }
    }

    /// Takes an answer to a request sent earlier. Late, repeated and foreign ones are harmless. Returns what a
    /// refusal says about the shard's leader.
    pub fn answer(
        &mut self,
        shard: ShardId,
        id: u64,
        answer: Answer,
        now: MonoTime,
        done: &mut Vec<Completion>,
    ) -> Option<(Option<NodeId>, Term)> {
        let flow = self.flows.get_mut(shard.0 as usize)?;
        let hint = match &answer {
            Answer::NotLeader { leader, term } => Some((*leader, *term)),
            _ => None,
        };
        let opening = matches!(flow.session, Session::Opening(_));
        let before = (flow.attempt, flow.low, opening, flow.reading.keys().next().copied());
        match id >> KIND_SHIFT {
            KIND_READ => {
                if !flow.reading.contains_key(&id) {
                    return hint;
                }
                match answer {
                    Answer::Outcome(Outcome::Reply(reply)) => {
                        flow.backoff = MIN_BACKOFF;
                        if let Some(read) = flow.reading.remove(&id) {
                            self.complete(read.conn, shard, read.token, false, result_of(reply), done);
                        }
                    }
                    // Its answer is too large to travel: asking again would not help.
                    Answer::Outcome(Outcome::Unknown) => {
                        if let Some(read) = flow.reading.remove(&id) {
                            let result = ClientResult::Reply(Reply::Error(OpError::ReplyTooLarge));
                            self.complete(read.conn, shard, read.token, false, result, done);
                        }
                    }
                    // A read changes nothing: whatever happened to it, it may be asked again.
                    _ => {
                        self.retries += 1;
                        flow.rewind_reads();
                        flow.wait(now);
                    }
                }
            }
            KIND_OPEN => {
                if !matches!(flow.session, Session::Opening(mark) if mark == id) {
                    return hint;
                }
                match answer {
                    Answer::Outcome(Outcome::Reply(Reply::Int(session))) => {
                        flow.session = Session::Open(SessionId(session as u64));
                        flow.sent = 0;
                        flow.ever = 0;
                        flow.backoff = MIN_BACKOFF;
                    }
                    _ => {
                        self.retries += 1;
                        flow.rewind(now, true);
                    }
                }
            }
            _ => self.write_answer(shard, id, answer, now, done),
        }
        let flow = &mut self.flows[shard.0 as usize];
        if before.0 != flow.attempt || before.1 != flow.low || before.2 != matches!(flow.session, Session::Opening(_)) {
            flow.quiet_since = now;
        }
        if before.3 != flow.reading.keys().next().copied() {
            flow.reads_quiet_since = now;
        }
        if !flow.idle() {
            self.pending.insert(shard);
        }
        hint
    }

    fn write_answer(&mut self, shard: ShardId, id: u64, answer: Answer, now: MonoTime, done: &mut Vec<Completion>) {
        let flow = &mut self.flows[shard.0 as usize];
        let seq = id & ((1 << SEQ_BITS) - 1);
        let attempt = id >> SEQ_BITS & ((1 << ATTEMPT_BITS) - 1);
        let current = attempt == flow.attempt & ((1 << ATTEMPT_BITS) - 1);
        let place = seq.checked_sub(flow.low + 1).map(|i| i as usize).filter(|i| *i < flow.ever);
        match answer {
            Answer::Outcome(Outcome::Reply(reply)) => {
                flow.backoff = MIN_BACKOFF;
                self.finish_write(shard, place, result_of(reply), done);
            }
            // Executed or not by an earlier copy; its answer is gone.
            Answer::Outcome(Outcome::Unknown) => self.finish_write(shard, place, ClientResult::Unknown, done),
            Answer::Outcome(Outcome::NoSession) => {
                if current && place.is_some() {
                    self.session_lost(shard, done);
                }
            }
            Answer::Outcome(Outcome::Gap) | Answer::NotLeader { .. } | Answer::Lost | Answer::Busy => {
                if current && place.is_some() {
                    self.retries += 1;
                    flow.rewind(now, true);
                }
            }
        }
    }

    fn finish_write(&mut self, shard: ShardId, place: Option<usize>, result: ClientResult, done: &mut Vec<Completion>) {
        let flow = &mut self.flows[shard.0 as usize];
        let Some(w) = place.and_then(|i| flow.window.get_mut(i)) else { return };
        let waiting = w.state == WriteState::Waiting;
        w.state = WriteState::Answered;
        w.ops = Bytes::new();
        if !waiting {
            // Its caller was told long ago; but now it is known to be executed.
            flow.settle();
            return;
        }
        let (conn, token) = (w.conn, w.token);
        flow.settle();
        self.complete(conn, shard, token, true, result, done);
    }

    /// The shard does not know the session any more. Writes that were ever sent may have happened; the others go on in a
    /// new session.
    fn session_lost(&mut self, shard: ShardId, done: &mut Vec<Completion>) {
        let flow = &mut self.flows[shard.0 as usize];
        let lost: Vec<Write> = flow.window.drain(..flow.ever).filter(|w| w.state == WriteState::Waiting).collect();
        flow.session = Session::None;
        flow.attempt += 1;
        // Numbers are never used again, not in another session either: a late answer to an old write must not be taken for
        // that of a new one. A new session may begin at any number above its watermark.
        flow.low += flow.ever as u64;
        flow.sent = 0;
        flow.ever = 0;
        for w in lost {
            self.complete(w.conn, shard, w.token, true, ClientResult::Unknown, done);
        }
    }

    /// The shard was founded anew and knows no session of before: what was ever sent may have happened, or be lost with what
    /// the shard has lost.
    pub fn refounded(&mut self, shard: ShardId, done: &mut Vec<Completion>) {
        let Some(flow) = self.flows.get_mut(shard.0 as usize) else { return };
        if matches!(flow.session, Session::None) {
            return;
        }
        flow.rewind_reads();
        self.session_lost(shard, done);
        self.pending.insert(shard);
    }

    /// Lets time pass: answers what has reached its deadline and sends again what has stalled.
    pub fn tick(&mut self, now: MonoTime, done: &mut Vec<Completion>) {
        for shard in self.active.clone() {
            self.expire(shard, now, done);
            let flow = &mut self.flows[shard.0 as usize];
            let writes = flow.sent > 0 || matches!(flow.session, Session::Opening(_));
            let late = |since| now.since(since) >= STALL;
            if (writes && late(flow.quiet_since)) || (!flow.reading.is_empty() && late(flow.reads_quiet_since)) {
                self.retries += 1;
                flow.quiet_since = now;
                flow.reads_quiet_since = now;
                flow.rewind(now, false);
            }
            // Held requests stand behind an unfinished one, so an idle flow has none.
            if flow.idle() {
                self.active.remove(&shard);
            } else {
                self.pending.insert(shard);
            }
        }
    }

    fn expire(&mut self, shard: ShardId, now: MonoTime, done: &mut Vec<Completion>) {
        let flow = &mut self.flows[shard.0 as usize];
        let refusal = match flow.target {
            Some(_) => Refusal::Busy(shard),
            None => Refusal::NoLeader(shard),
        };
        let mut over: Vec<(ConnId, Token, bool, ClientResult)> = Vec::new();
        let ever = flow.ever;
        for w in flow.window.iter_mut().take(ever).filter(|w| w.state == WriteState::Waiting && w.deadline <= now) {
            w.state = WriteState::Abandoned;
            w.ops = Bytes::new();
            over.push((w.conn, w.token, true, ClientResult::Unknown));
        }
        let mut i = ever;
        while i < flow.window.len() {
            if flow.window[i].deadline <= now {
                let w = flow.window.remove(i).expect("within the window");
                over.push((w.conn, w.token, true, ClientResult::NotApplied(refusal)));
            } else {
                i += 1;
            }
        }
        flow.settle();
        let late: Vec<u64> = flow.reading.iter().filter(|(_, r)| r.deadline <= now).map(|(id, _)| *id).collect();
        for id in late {
            let r = flow.reading.remove(&id).expect("just seen");
            over.push((r.conn, r.token, false, ClientResult::NotApplied(refusal)));
        }
        flow.reads.retain(|r| {
            let late = r.deadline <= now;
            if late {
                over.push((r.conn, r.token, false, ClientResult::NotApplied(refusal)));
            }
            !late
        });
        for (conn, token, write, result) in over {
            self.complete(conn, shard, token, write, result, done);
        }
        // What was held behind them may have reached its own deadline; it is answered in its turn, by the next tick.
    }

    /// When something held for a back-off is due, if anything is.
    pub fn next_due(&self) -> Option<MonoTime> {
        self.active
            .iter()
            .map(|s| &self.flows[s.0 as usize])
            .filter(|f| f.target.is_some() && f.hold_until > MonoTime(0))
            .map(|f| f.hold_until)
            .min()
    }

    /// Looks again at flows whose back-off is over.
    pub fn retry_due(&mut self, now: MonoTime) {
        for shard in &self.active {
            let flow = &mut self.flows[shard.0 as usize];
            if flow.hold_until > MonoTime(0) && flow.hold_until <= now {
                flow.hold_until = MonoTime(0);
                self.pending.insert(*shard);
            }
        }
    }
}

pub(crate) fn result_of(reply: Reply) -> ClientResult {
    match reply {
        // Decided in apply: nothing was written there. The caller looks the placement up again.
        Reply::Error(OpError::WrongSlot { .. }) => ClientResult::NotApplied(Refusal::WrongShard),
        reply => ClientResult::Reply(reply),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: ShardId = ShardId(0);
    const L1: Target = Target { node: NodeId(1), term: Term(1) };
    const L2: Target = Target { node: NodeId(2), term: Term(2) };

    struct Rig {
        g: Gateway,
        now: MonoTime,
        done: Vec<Completion>,
    }

    impl Rig {
        fn new() -> Self {
            let mut g = Gateway::default();
            g.set_shards(1);
            g.set_target(S, Some(L1), MonoTime(1));
            Rig { g, now: MonoTime(1), done: Vec::new() }
        }
        fn submit(&mut self, conn: u64, token: u64, write: bool) {
            let deadline = self.now.after(Duration::from_secs(5));
            let ops = Bytes::from(token.to_string());
            self.g.submit(
                ClientRequest {
                    conn: ConnId(conn),
                    token: Token(token),
                    shard: S,
                    write,
                    level: crate::ReadLevel::Linearizable,
                    ops,
                    deadline,
                },
                &mut self.done,
            );
        }
        fn sent(&mut self) -> Vec<(NodeId, Request)> {
            let mut out = Vec::new();
            self.g.poll(self.now, &mut out);
            out
        }
        fn later(&mut self, ms: u64) {
            self.now = self.now.after(Duration::from_millis(ms));
            self.g.retry_due(self.now);
            self.g.tick(self.now, &mut self.done);
        }
        fn answer(&mut self, id: u64, answer: Answer) {
            self.g.answer(S, id, answer, self.now, &mut self.done);
        }
        fn open(&mut self) {
            let sent = self.sent();
            let open = sent.iter().find(|(_, r)| r.body == RequestBody::OpenSession).expect("a session is asked for");
            self.answer(open.1.id, int(77));
        }
        fn finished(&mut self) -> Vec<(u64, ClientResult)> {
            self.done.drain(..).map(|c| (c.token.0, c.result)).collect()
        }
    }

    fn int(i: i64) -> Answer {
        Answer::Outcome(Outcome::Reply(Reply::Int(i)))
    }
    fn ok(token: u64, i: i64) -> (u64, ClientResult) {
        (token, ClientResult::Reply(Reply::Int(i)))
    }
    fn tags(sent: &[(NodeId, Request)]) -> Vec<(u64, u64, u64)> {
        sent.iter()
            .filter_map(|(n, r)| match &r.body {
                RequestBody::Write { tag, .. } => Some((n.0, tag.seq.0, tag.low.0)),
                _ => None,
            })
            .collect()
    }
    fn is_read(r: &Request) -> bool {
        matches!(r.body, RequestBody::Read { .. })
    }

    #[test]
    fn a_retried_write_keeps_its_number_and_order() {
        let mut r = Rig::new();
        (1..=3).for_each(|t| r.submit(9, t, true));
        r.open();
        let sent = r.sent();
        assert_eq!(tags(&sent), [(1, 1, 0), (1, 2, 0), (1, 3, 0)]);
        r.answer(sent[0].1.id, int(10));
        // The leader changes before the others are answered: they go there with the same numbers.
        r.g.set_target(S, Some(L2), r.now);
        let again = r.sent();
        assert_eq!(tags(&again), [(2, 2, 1), (2, 3, 1)]);
        // A late answer of the first attempt counts, a second one for the same write does not.
        r.answer(sent[1].1.id, int(20));
        r.answer(again[0].1.id, int(20));
        r.answer(again[1].1.id, int(30));
        assert_eq!(r.finished(), [ok(1, 10), ok(2, 20), ok(3, 30)]);
        assert_eq!(r.g.in_flight(), 0);
    }

    #[test]
    fn one_refusal_sends_everything_after_it_again_in_order() {
        let mut r = Rig::new();
        (1..=3).for_each(|t| r.submit(9, t, true));
        r.open();
        let sent = r.sent();
        let refusal = Answer::NotLeader { leader: None, term: Term(1) };
        r.answer(sent[0].1.id, refusal.clone());
        // The rest of the same attempt tells nothing new and rewinds nothing.
        r.answer(sent[1].1.id, Answer::Outcome(Outcome::Gap));
        r.answer(sent[2].1.id, refusal);
        assert!(r.sent().is_empty(), "held for a back-off");
        r.later(10);
        assert_eq!(tags(&r.sent()), [(1, 1, 0), (1, 2, 0), (1, 3, 0)]);
        assert_eq!(r.g.retries(), 1);
    }

    #[test]
    fn a_read_behind_writes_goes_through_the_log_and_a_write_waits_for_reads() {
        let mut r = Rig::new();
        r.submit(9, 1, true);
        r.submit(9, 2, false);
        r.submit(8, 3, false);
        r.open();
        let sent = r.sent();
        assert_eq!(tags(&sent), [(1, 1, 0), (1, 2, 0)], "connection 9's read is logged behind its write");
        // Another connection's read takes the read path at once, before the session was even open.
        let mut r = Rig::new();
        r.submit(8, 1, false);
        r.submit(8, 2, true);
        r.submit(8, 3, false);
        let sent = r.sent();
        assert_eq!(sent.len(), 1);
        assert!(is_read(&sent[0].1));
        r.answer(sent[0].1.id, int(1));
        r.open();
        let sent = r.sent();
        assert_eq!(tags(&sent), [(1, 1, 0), (1, 2, 0)]);
        sent.iter().for_each(|(_, q)| r.answer(q.id, int(2)));
        assert_eq!(r.finished(), [ok(1, 1), ok(2, 2), ok(3, 2)]);
    }

    #[test]
    fn refused_reads_go_back_together_and_old_answers_are_dropped() {
        let mut r = Rig::new();
        r.submit(9, 1, false);
        r.submit(9, 2, false);
        let sent = r.sent();
        r.answer(sent[0].1.id, Answer::NotLeader { leader: None, term: Term(1) });
        r.answer(sent[1].1.id, int(5));
        assert!(r.finished().is_empty(), "the second read may not be older than the first");
        r.later(10);
        let again = r.sent();
        assert_eq!(again.len(), 2);
        assert!(again.iter().zip(&sent).all(|(a, b)| a.1.body == b.1.body && a.1.id != b.1.id));
    }

    #[test]
    fn deadlines_tell_what_was_never_sent_from_what_may_have_happened() {
        let mut r = Rig::new();
        r.submit(9, 1, true);
        r.open();
        assert_eq!(r.sent().len(), 1);
        r.g.set_target(S, None, r.now);
        r.submit(9, 2, true);
        r.submit(7, 3, false);
        r.later(5001);
        let refused = ClientResult::NotApplied(Refusal::NoLeader(S));
        let finished = r.finished();
        assert_eq!(finished, [(1, ClientResult::Unknown), (2, refused.clone()), (3, refused)]);
        // Nothing is sent after the deadline, and the number is skipped by the low watermark.
        r.g.set_target(S, Some(L2), r.now);
        r.submit(9, 4, true);
        assert_eq!(tags(&r.sent()), [(2, 2, 1)]);
    }

    #[test]
    fn a_lost_session_makes_unknown_what_was_sent_and_goes_on_with_the_rest() {
        let mut r = Rig::new();
        r.submit(9, 1, true);
        r.open();
        let sent = r.sent();
        r.submit(9, 2, true);
        r.answer(sent[0].1.id, Answer::Outcome(Outcome::NoSession));
        assert_eq!(r.finished(), [(1, ClientResult::Unknown)]);
        r.open();
        assert_eq!(tags(&r.sent()), [(1, 2, 1)], "the second write in the new session");
    }

    #[test]
    fn silence_sends_again_and_the_window_is_bounded() {
        let mut r = Rig::new();
        (0..SESSION_WINDOW as u64 + 5).for_each(|t| r.submit(t, t, true));
        r.open();
        let sent = r.sent();
        assert_eq!(sent.len(), SESSION_WINDOW);
        r.answer(sent[0].1.id, int(0));
        assert_eq!(tags(&r.sent()), [(1, SESSION_WINDOW as u64 + 1, 1)]);
        r.later(STALL.as_millis() as u64 + 1);
        assert_eq!(r.sent().len(), SESSION_WINDOW);
    }

    #[test]
    fn a_closed_connection_is_answered_nothing_and_leaves_nothing_behind() {
        let mut r = Rig::new();
        r.submit(9, 1, false);
        r.submit(9, 2, true);
        let sent = r.sent();
        r.g.connection_closed(ConnId(9));
        r.answer(sent[0].1.id, int(1));
        assert!(r.finished().is_empty());
        assert_eq!(r.g.in_flight(), 0);
        assert!(r.g.lanes.is_empty());
    }

    #[test]
    fn a_late_answer_of_a_lost_session_answers_nothing() {
        let mut r = Rig::new();
        r.submit(9, 1, true);
        r.open();
        let old = r.sent();
        // the answer to `old` is on its way; a rewind, and the next leader has no session
        r.g.set_target(S, Some(L2), r.now);
        let again = r.sent();
        r.answer(again[0].1.id, Answer::Outcome(Outcome::NoSession));
        assert_eq!(r.finished(), [(1, ClientResult::Unknown)]);
        r.submit(9, 2, true);
        r.open();
        let new = r.sent();
        assert_eq!(tags(&new).len(), 1);
        r.answer(old[0].1.id, int(10));
        assert_eq!(r.finished(), [], "write 2 was answered with the answer of write 1");
    }

    #[test]
    fn a_lost_answer_is_asked_for_again_however_busy_the_shard() {
        let mut r = Rig::new();
        r.submit(9, 1, true);
        r.open();
        let _lost = r.sent();
        for t in 0..40u64 {
            r.submit(8, 100 + t, false);
            let s = r.sent();
            for (_, q) in s.iter().filter(|(_, q)| is_read(q)) {
                r.answer(q.id, int(0));
            }
            r.later(100);
        }
        assert!(r.g.retries() > 0, "4 s of silence about write 1, never asked again");
    }
}
