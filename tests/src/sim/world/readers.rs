//! Reads outside of the driver: what a connection task of crema-node does between two wake-ups of the driver, in three
//! steps that anything may come between.
//!
//! ```text
//!   submit(GET) --nothing of this connection is open at the shard--> begin --> value --> finish --> answered
//!                                                                      \--------\----------\--> to the driver
//! ```
//!
//! A task may be without a processor for long: between two steps the node, its leadership and the cluster may change. As
//! in crema-node, a connection does nothing else meanwhile; what it sends waits behind the read.

use super::*;
use crema_core::{Found, KeyRef, Op, OpsRef, Published, Reply, Seen};

enum Stage {
    Begin,
    /// A read that needs no lease, all at once.
    Relaxed(Option<Duration>),
    Value(Seen),
    Finish(Seen, Found<Reply>),
}

/// A read on its way.
pub(super) struct Reader {
    node: NodeId,
    published: Arc<Published>,
    request: ClientRequest,
    stage: Stage,
}

/// Two keys of one slot that are always written together.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The one.
    pub a: String,
    /// The other.
    pub b: String,
}

impl Pair {
    /// The keys of the pair `name`, which holds a hash tag.
    pub fn named(name: &str) -> Pair {
        Pair { a: format!("{name}a"), b: format!("{name}b") }
    }
}

impl World {
    /// How long a task takes from one step to the next: mostly at once, while tasks are stalled at times long.
    fn step_pause(&mut self) -> u64 {
        if self.conditions.stalled > 0 && self.rng.permille(self.conditions.stalled) {
            return self.rng.below(1_500 * MS);
        }
        let most = if self.rng.permille(850) { 30 * US } else { 3 * MS };
        self.rng.below(most)
    }

    /// Takes a request of a connection as crema-node would: a read that may be answered here is tried here first.
    pub(super) fn take_request(&mut self, node: NodeId, request: ClientRequest) {
        let conn = request.conn;
        if let Some(behind) = self.behind.get_mut(&conn) {
            behind.push_back(request);
            return;
        }
        let published = self.readable(node, &request);
        match published {
            Some(published) => {
                self.next_reader += 1;
                let id = self.next_reader;
                let stage = match request.level {
                    ReadLevel::Linearizable => Stage::Begin,
                    ReadLevel::Bounded(age) => Stage::Relaxed(Some(age)),
                    ReadLevel::Local => Stage::Relaxed(None),
                };
                self.readers.insert(id, Reader { node, published, request, stage });
                self.behind.insert(conn, VecDeque::new());
                let at = self.now + self.step_pause();
                self.at(at, Event::Reader(id));
            }
            None => {
                self.asked.insert((conn, request.token), request.shard);
                self.input(node, Input::Submit(request));
            }
        }
    }

    /// The cell for a request, if it is a read that a connection task may answer.
    fn readable(&self, node: NodeId, request: &ClientRequest) -> Option<Arc<Published>> {
        if request.write || !self.options.local_reads {
            return None;
        }
        // One connection's commands take effect in order per shard.
        let mine = (request.conn, Token(0))..=(request.conn, Token(u64::MAX));
        if self.asked.range(mine).any(|(_, shard)| *shard == request.shard) {
            return None;
        }
        let single =
            OpsRef::parse(&request.ops).is_ok_and(|ops| ops.len() == 1 && ops.iter().all(|op| Published::answers(&op)));
        let view = self.host(node)?.view();
        view.shard(request.shard)?.published.clone().filter(|_| single)
    }

    /// The next step of a read.
    pub(super) fn reader_step(&mut self, id: u64) {
        let Some(mut reader) = self.readers.remove(&id) else { return };
        if self.paused(reader.node) {
            // Its task stands still with the rest of the process.
            let at = self.now + 3 * MS + self.rng.below(MS);
            self.readers.insert(id, reader);
            self.at(at, Event::Reader(id));
            return;
        }
        let next = match std::mem::replace(&mut reader.stage, Stage::Begin) {
            Stage::Begin => reader.published.begin().map(Stage::Value),
            Stage::Value(seen) => {
                let op = OpsRef::parse(&reader.request.ops).ok().and_then(|ops| ops.iter().next());
                op.and_then(|op| reader.published.observe(&op)).map(|found| Stage::Finish(seen, found))
            }
            Stage::Relaxed(age) => {
                let clock = self.nodes[&reader.node].clock.now(self.now).mono;
                let op = OpsRef::parse(&reader.request.ops).ok().and_then(|ops| ops.iter().next());
                if let Some(reply) = op.and_then(|op| reader.published.read_relaxed(&op, age, clock)) {
                    return self.read_done(&reader, reply);
                }
                None
            }
            Stage::Finish(seen, found) => {
                let clock = self.nodes[&reader.node].clock.now(self.now).mono;
                if reader.published.finish(seen, found.expire_at, clock) {
                    return self.read_done(&reader, found.answer);
                }
                None
            }
        };
        match next {
            Some(stage) => {
                reader.stage = stage;
                self.readers.insert(id, reader);
                let at = self.now + self.step_pause();
                self.at(at, Event::Reader(id));
            }
            None => {
                let (node, conn) = (reader.node, reader.request.conn);
                self.asked.insert((conn, reader.request.token), reader.request.shard);
                self.input(node, Input::Submit(reader.request));
                self.release(node, conn);
            }
        }
    }

    fn read_done(&mut self, reader: &Reader, reply: Reply) {
        let (conn, token) = (reader.request.conn, reader.request.token);
        self.local_reads += 1;
        self.trace.note(self.now, format!("{:?} reads for {conn:?} {token:?}: {reply:?}", reader.node));
        if let Err(e) = self.ledger.completed(reader.node, conn, token) {
            self.violations.push(e);
        }
        self.finished.push(Finished { conn, token, result: ClientResult::Reply(reply) });
        self.release(reader.node, conn);
    }

    /// The read is over: what came behind it goes on.
    fn release(&mut self, node: NodeId, conn: ConnId) {
        for request in self.behind.remove(&conn).unwrap_or_default() {
            self.take_request(node, request);
        }
    }

    /// A connection ends, or its node does.
    pub(super) fn forget_reads(&mut self, gone: impl Fn(NodeId, ConnId) -> bool) {
        let (readers, behind, asked) = (&mut self.readers, &mut self.behind, &mut self.asked);
        readers.retain(|_, r| {
            let hit = gone(r.node, r.request.conn);
            if hit {
                behind.remove(&r.request.conn);
                asked.retain(|(c, _), _| *c != r.request.conn);
            }
            !hit
        });
    }

    /// Has readers look between the keys of every request that `host` applies, at all pairs.
    pub(super) fn watch_pairs(&self, host: &Host, now: Now) -> Option<Glimpses> {
        if self.pairs.is_empty() {
            return None;
        }
        let view = host.view();
        let mut watched = Vec::new();
        for pair in &self.pairs {
            let route = view.shard_of(slot_of(pair.a.as_bytes())).and_then(|shard| view.shard(shard));
            let Some(published) = route.and_then(|r| r.published.clone()) else { continue };
            watched.push((pair.clone(), published));
        }
        let torn = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        let found = torn.clone();
        crema_core::mutant::on_between_keys(Some(Box::new(move || {
            for (pair, published) in &watched {
                let read = |key: &str| {
                    let key = KeyRef::new(0, key.as_bytes())?;
                    published.read(&Op::Get { key }, || now.mono)
                };
                if let (Some(a), Some(b)) = (read(&pair.a), read(&pair.b))
                    && a != b
                {
                    found.borrow_mut().push(format!("half of a request is visible: {pair:?} is {a:?} and {b:?}"));
                }
            }
        })));
        Some(Glimpses(torn))
    }
}

/// What readers saw between keys; ends the watch when dropped.
pub(super) struct Glimpses(std::rc::Rc<std::cell::RefCell<Vec<String>>>);

impl Glimpses {
    pub(super) fn take(&self) -> Vec<String> {
        self.0.take()
    }
}

impl Drop for Glimpses {
    fn drop(&mut self) {
        crema_core::mutant::on_between_keys(None);
    }
}
