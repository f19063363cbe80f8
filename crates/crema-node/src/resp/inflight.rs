//! Commands that wait for their shards: which requests they consist of, and how the results become one reply.
//!
//! ```text
//!   plan --> InFlight { parts } --requests--> driver
//!                 ^---- complete(part, result) ----/      WrongShard: the part is planned again, once
//!                 \--> finished? write() the reply, in the order of the commands
//! ```
//!
//! A command that was scattered over shards can end differently on each. Its reply then says the worst that is true:
//! that something is not known, or that it was executed in part; never that it failed when part of it happened.

use crate::resp::encode::{self, Proto};
use crate::resp::ops::{Combine, Fmt};
use bytes::{Bytes, BytesMut};
use crema_core::{MonoTime, Op, OpError, OpsRef, Reply, ShardId, encode_ops};
use crema_shard::{ClientResult, Refusal, RoutingView};

/// Part of a command that goes to one shard as one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The shard.
    pub shard: ShardId,
    /// Whether any operation writes.
    pub write: bool,
    /// The operations, encoded.
    pub ops: Bytes,
    /// Whether it has been sent to another shard than at first already.
    retried: bool,
}

impl Part {
    /// A part that has not been sent.
    pub fn new(shard: ShardId, write: bool, ops: Bytes) -> Part {
        Part { shard, write, ops, retried: false }
    }
}

/// Which of a command's operations a part holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Positions {
    /// All of them, in order.
    All,
    /// These, in the part's order.
    Some(Vec<u32>),
}

impl Positions {
    fn get(&self, i: usize) -> usize {
        match self {
            Positions::All => i,
            Positions::Some(list) => list.get(i).map_or(usize::MAX, |p| *p as usize),
        }
    }
}

/// One element of what EXEC answers.
#[derive(Clone, Debug)]
pub enum TxItem {
    /// A reply that stands already.
    Ready(Bytes),
    /// The next `count` operations of the request.
    Ops {
        /// How many.
        count: u32,
        /// What they become.
        shape: Shape,
        /// Name of the command, for its errors.
        name: &'static str,
        /// Protocol in force at this command.
        proto: Proto,
    },
}

/// What operations become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The answer of one.
    One(Fmt),
    /// One answer made of several.
    Many(Combine),
}

/// What the answers to all operations become.
#[derive(Clone, Debug)]
pub enum Finish {
    /// One reply.
    Combine(Combine),
    /// The array of a transaction.
    Transaction(Vec<TxItem>),
}

/// A command of several operations.
#[derive(Debug)]
pub struct Many {
    parts: Vec<(Part, Positions, bool)>,
    replies: Vec<Option<Reply>>,
    open: usize,
    failure: Option<Failure>,
    /// Whether a part that writes was executed.
    wrote: bool,
    finish: Finish,
}

/// Why a command has no proper reply, the worse the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    Refused(Refusal),
    /// A transaction whose keys have come to lie on several shards.
    CrossSlot,
    /// A read that may have been answered, but not to us.
    ReadLost,
    /// An answer that does not fit its question: a fault of ours.
    Garbled,
    Unknown,
}

impl Failure {
    fn rank(self) -> u8 {
        match self {
            Failure::Refused(_) => 0,
            Failure::CrossSlot => 1,
            Failure::ReadLost => 2,
            Failure::Garbled => 3,
            Failure::Unknown => 4,
        }
    }
}

/// What a command waits for.
#[derive(Debug)]
pub enum Body {
    /// Nothing: its reply stands.
    Ready(Bytes),
    /// One operation.
    One {
        /// Its request.
        part: Part,
        /// How its answer is worded.
        fmt: Fmt,
        /// Its result, once there.
        result: Option<ClientResult>,
    },
    /// Several operations.
    Many(Box<Many>),
}

/// A command whose reply has not been written.
#[derive(Debug)]
pub struct InFlight {
    /// Its name, for errors.
    pub name: &'static str,
    /// Protocol in force when it came.
    pub proto: Proto,
    /// No attempt is made after this.
    pub deadline: MonoTime,
    /// Bytes that it holds, requests and results together; kept by its owner, who adds what arrives.
    pub held: usize,
    /// What it waits for.
    pub body: Body,
}

/// Shards of `ops` with the positions of their operations, ascending by shard; `None` if an operation has no key or no
/// shard owns its slot.
pub fn by_shard(ops: &[Op<'_>], view: &RoutingView) -> Option<Vec<(ShardId, Positions)>> {
    let shard_of = |op: &Op<'_>| op.key().and_then(|k| view.shard_of(k.slot));
    let first = shard_of(ops.first()?)?;
    let mut placed = Vec::with_capacity(ops.len());
    let mut same = true;
    for (i, op) in ops.iter().enumerate() {
        let shard = shard_of(op)?;
        same &= shard == first;
        placed.push((shard, i as u32));
    }
    if same {
        return Some(vec![(first, Positions::All)]);
    }
    placed.sort_unstable();
    let runs = placed.chunk_by(|a, b| a.0 == b.0);
    Some(runs.map(|run| (run[0].0, Positions::Some(run.iter().map(|(_, i)| *i).collect()))).collect())
}

impl Many {
    /// A command made of `parts`, which hold `count` operations in all.
    pub fn new(parts: Vec<(Part, Positions)>, count: usize, finish: Finish) -> Many {
        Many {
            open: parts.len(),
            parts: parts.into_iter().map(|(part, positions)| (part, positions, false)).collect(),
            replies: vec![None; count],
            failure: None,
            wrote: false,
            finish,
        }
    }

    fn fail(&mut self, failure: Failure) {
        if self.failure.is_none_or(|f| f.rank() < failure.rank()) {
            self.failure = Some(failure);
        }
    }

    fn complete(&mut self, index: usize, result: ClientResult, view: &RoutingView, resend: &mut Vec<u32>) -> bool {
        let Some((part, positions, done)) = self.parts.get_mut(index).filter(|(.., done)| !done) else { return false };
        if result == ClientResult::NotApplied(Refusal::WrongShard) && !part.retried {
            let (part, positions) = (part.clone(), positions.clone());
            self.place_again(index, &part, &positions, view, resend);
            return true;
        }
        *done = true;
        self.open -= 1;
        let write = part.write;
        part.ops = Bytes::new();
        let failure = match result {
            ClientResult::Reply(Reply::Array(list)) if positions_fit(positions, list.len(), self.replies.len()) => {
                for (i, reply) in list.into_iter().enumerate() {
                    let at = positions.get(i);
                    self.replies[at] = Some(reply);
                }
                None
            }
            // A request of one operation is answered without an array.
            ClientResult::Reply(reply) if positions_fit(positions, 1, self.replies.len()) => {
                let at = positions.get(0);
                self.replies[at] = Some(reply);
                None
            }
            ClientResult::Reply(_) => Some(Failure::Garbled),
            ClientResult::NotApplied(refusal) => Some(Failure::Refused(refusal)),
            ClientResult::Unknown => Some(if write { Failure::Unknown } else { Failure::ReadLost }),
        };
        match failure {
            Some(failure) => self.fail(failure),
            None => self.wrote |= write,
        }
        true
    }

    /// The shard said that the slots are not its own: sends the operations where they belong by the present view.
    fn place_again(
        &mut self,
        index: usize,
        part: &Part,
        positions: &Positions,
        view: &RoutingView,
        resend: &mut Vec<u32>,
    ) {
        let ops: Vec<Op<'_>> = OpsRef::parse(&part.ops).map(|ops| ops.iter().collect()).unwrap_or_default();
        let placed = by_shard(&ops, view);
        let failure = match &placed {
            None => Some(Failure::Refused(Refusal::WrongShard)),
            Some(groups) if groups.len() > 1 && matches!(self.finish, Finish::Transaction(_)) => {
                Some(Failure::CrossSlot)
            }
            Some(_) => None,
        };
        self.parts[index].2 = true;
        self.open -= 1;
        if let Some(failure) = failure {
            return self.fail(failure);
        }
        for (shard, within) in placed.unwrap_or_default() {
            let (ops, positions) = match within {
                Positions::All => (Ok(part.ops.clone()), positions.clone()),
                Positions::Some(list) => {
                    let chosen: Vec<Op<'_>> = list.iter().map(|i| ops[*i as usize]).collect();
                    let positions = list.iter().map(|i| positions.get(*i as usize) as u32).collect();
                    (encode_ops(&chosen), Positions::Some(positions))
                }
            };
            // A part of what was encoded before is within the limits; were it not, it would have been refused.
            let Ok(ops) = ops else {
                self.fail(Failure::Refused(Refusal::WrongShard));
                continue;
            };
            resend.push(self.parts.len() as u32);
            self.parts.push((Part { shard, write: part.write, ops, retried: true }, positions, false));
            self.open += 1;
        }
    }

    fn write(&self, out: &mut BytesMut, proto: Proto, name: &str) {
        match self.failure {
            Some(Failure::Refused(_) | Failure::CrossSlot) if self.wrote => encode::error(out, PARTIAL.as_bytes()),
            Some(failure) => write_failure(out, failure),
            None => match &self.finish {
                Finish::Combine(combine) => write_combined(out, proto, *combine, &self.replies, name),
                Finish::Transaction(items) => self.write_transaction(out, items),
            },
        }
    }

    fn write_transaction(&self, out: &mut BytesMut, items: &[TxItem]) {
        encode::array(out, items.len());
        let mut rest = self.replies.as_slice();
        for item in items {
            match item {
                TxItem::Ready(reply) => out.extend_from_slice(reply),
                TxItem::Ops { count, shape, name, proto } => {
                    let (own, tail) = rest.split_at((*count as usize).min(rest.len()));
                    rest = tail;
                    match (shape, own) {
                        (Shape::One(fmt), [Some(reply)]) => encode::reply(out, *proto, reply, *fmt, name),
                        (Shape::One(_), _) => write_failure(out, Failure::Garbled),
                        (Shape::Many(combine), own) => write_combined(out, *proto, *combine, own, name),
                    }
                }
            }
        }
    }
}

/// Whether a part with these positions can have `answers` answers in a command of `count` operations.
fn positions_fit(positions: &Positions, answers: usize, count: usize) -> bool {
    match positions {
        Positions::All => answers == count,
        Positions::Some(list) => answers == list.len() && list.iter().all(|p| (*p as usize) < count),
    }
}

fn write_combined(out: &mut BytesMut, proto: Proto, combine: Combine, replies: &[Option<Reply>], name: &str) {
    if replies.iter().any(Option::is_none) {
        return write_failure(out, Failure::Garbled);
    }
    let replies = || replies.iter().flatten();
    // An operation's error is the command's: none of those that are combined answers elementwise errors.
    if let Some(Reply::Error(e)) = replies().find(|r| matches!(r, Reply::Error(_))) {
        return encode::op_error(out, e, name);
    }
    match combine {
        Combine::List => {
            encode::array(out, replies().count());
            replies().for_each(|r| encode::reply(out, proto, r, Fmt::Plain, name));
        }
        Combine::Sum => {
            let sum = replies().map(|r| if let Reply::Int(n) = r { *n } else { 0 }).fold(0, i64::saturating_add);
            encode::int(out, sum);
        }
        Combine::AllOk => encode::simple(out, "OK"),
    }
}

const PARTIAL: &str = "UNKNOWN outcome partial: the command was executed on some shards and not on others";

fn write_failure(out: &mut BytesMut, failure: Failure) {
    let text = match failure {
        Failure::Refused(refusal) => return write_refusal(out, refusal),
        Failure::CrossSlot => CROSSSLOT,
        Failure::ReadLost => "TRYAGAIN the read was not answered in time; it changed nothing",
        Failure::Garbled => "UNKNOWN internal error: the answer does not fit the command, which may have been executed",
        Failure::Unknown => UNKNOWN,
    };
    encode::error(out, text.as_bytes());
}

/// What a command gets whose keys do not belong together.
pub const CROSSSLOT: &str = "CROSSSLOT Keys in request don't hash to the same slot";
/// What a command gets that came before this node knew the cluster.
pub const LOADING: &str = "LOADING Crema is founding or joining its cluster; the command was not executed";
const UNKNOWN: &str = "UNKNOWN outcome unknown: the command may or may not have been executed";

fn write_refusal(out: &mut BytesMut, refusal: Refusal) {
    match refusal {
        Refusal::NoLeader(shard) => {
            encode::error(
                out,
                format!("CLUSTERDOWN shard {shard} has no leader; the command was not executed").as_bytes(),
            );
        }
        Refusal::Lost(shard) => {
            let text = format!(
                "CLUSTERDOWN shard {shard} has lost the majority of its replicas for good, see `crema recover`; the command \
                 was not executed"
            );
            encode::error(out, text.as_bytes());
        }
        Refusal::Busy(shard) => {
            let text = format!("TRYAGAIN shard {shard} did not take the command in time; it was not executed");
            encode::error(out, text.as_bytes());
        }
        Refusal::NotReady => encode::error(out, LOADING.as_bytes()),
        Refusal::WrongShard => encode::error(out, encode::MOVING.as_bytes()),
        Refusal::ShuttingDown => {
            encode::error(out, b"CLUSTERDOWN this node is shutting down; the command was not executed");
        }
    }
}

/// A refusal by the state, in whatever form it travels, is the one refusal that leads to another shard.
fn normalise(result: ClientResult) -> ClientResult {
    let wrong_slot = |r: &Reply| matches!(r, Reply::Error(OpError::WrongSlot { .. }));
    match &result {
        // Ownership is decided for a request as a whole: one operation in the wrong place means that none was executed.
        ClientResult::Reply(Reply::Array(list)) if list.iter().any(wrong_slot) => {
            ClientResult::NotApplied(Refusal::WrongShard)
        }
        ClientResult::Reply(reply) if wrong_slot(reply) => ClientResult::NotApplied(Refusal::WrongShard),
        _ => result,
    }
}

impl InFlight {
    /// A command of one operation.
    pub fn one(name: &'static str, proto: Proto, deadline: MonoTime, part: Part, fmt: Fmt) -> InFlight {
        InFlight { name, proto, deadline, held: part.ops.len(), body: Body::One { part, fmt, result: None } }
    }

    /// A command of several operations.
    pub fn many(name: &'static str, proto: Proto, deadline: MonoTime, many: Many) -> InFlight {
        let held = many.parts.iter().map(|(part, ..)| part.ops.len()).sum();
        InFlight { name, proto, deadline, held, body: Body::Many(Box::new(many)) }
    }

    /// A command whose reply stands.
    pub fn ready(reply: Bytes) -> InFlight {
        InFlight { name: "", proto: Proto::Resp2, deadline: MonoTime(0), held: reply.len(), body: Body::Ready(reply) }
    }

    /// The part numbered `index`, if there is one.
    pub fn part(&self, index: u32) -> Option<&Part> {
        match &self.body {
            Body::Ready(_) => None,
            Body::One { part, .. } => (index == 0).then_some(part),
            Body::Many(many) => many.parts.get(index as usize).map(|(part, ..)| part),
        }
    }

    /// Number of parts; grows when a part is planned again.
    pub fn part_count(&self) -> u32 {
        match &self.body {
            Body::Ready(_) => 0,
            Body::One { .. } => 1,
            Body::Many(many) => many.parts.len() as u32,
        }
    }

    /// Whether the reply can be written.
    pub fn is_finished(&self) -> bool {
        match &self.body {
            Body::Ready(_) => true,
            Body::One { result, .. } => result.is_some(),
            Body::Many(many) => many.open == 0,
        }
    }

    /// Takes the result of a part; a second one for the same part is ignored. Returns whether it was taken. Parts to send
    /// (again) are added to `resend`: the slots had moved, and `view` says where they are now.
    pub fn complete(&mut self, index: u32, result: ClientResult, view: &RoutingView, resend: &mut Vec<u32>) -> bool {
        let new = normalise(result);
        match &mut self.body {
            Body::Ready(_) => false,
            Body::One { part, result, .. } => {
                if index != 0 || result.is_some() {
                    return false;
                }
                if new == ClientResult::NotApplied(Refusal::WrongShard) && !part.retried {
                    part.retried = true;
                    let slot = OpsRef::parse(&part.ops).ok().and_then(|ops| ops.iter().next()?.key()).map(|k| k.slot);
                    if let Some(shard) = slot.and_then(|s| view.shard_of(s)) {
                        part.shard = shard;
                        resend.push(0);
                        return true;
                    }
                }
                *result = Some(new);
                true
            }
            Body::Many(many) => many.complete(index as usize, new, view, resend),
        }
    }

    /// Gives up on every part that has no result: `result` is theirs.
    pub fn abandon(&mut self, result: &ClientResult, view: &RoutingView) {
        let mut index = 0;
        while index < self.part_count() {
            // Twice, since the first refusal of a part may ask for another try; that becomes a part of its own, or none.
            for _ in 0..2 {
                self.complete(index, result.clone(), view, &mut Vec::new());
            }
            index += 1;
        }
    }

    /// Writes the reply of a finished command.
    pub fn write(&self, out: &mut BytesMut) {
        match &self.body {
            Body::Ready(reply) => out.extend_from_slice(reply),
            Body::One { part, fmt, result } => match result {
                Some(ClientResult::Reply(reply)) => encode::reply(out, self.proto, reply, *fmt, self.name),
                Some(ClientResult::NotApplied(refusal)) => write_refusal(out, *refusal),
                Some(ClientResult::Unknown) if part.write => write_failure(out, Failure::Unknown),
                Some(ClientResult::Unknown) => write_failure(out, Failure::ReadLost),
                None => write_failure(out, Failure::Garbled),
            },
            Body::Many(many) => many.write(out, self.proto, self.name),
        }
    }
}

/// About how many bytes a result takes in memory and on the wire.
pub fn result_size(result: &ClientResult) -> usize {
    fn size(reply: &Reply) -> usize {
        match reply {
            Reply::Bulk(bytes) => 16 + bytes.len(),
            Reply::Scan { keys, .. } => 32 + keys.iter().map(|k| 16 + k.len()).sum::<usize>(),
            Reply::Array(list) => {
                let leaf = |r: &Reply| if matches!(r, Reply::Array(_)) { 16 } else { size(r) };
                16 + list.iter().map(leaf).sum::<usize>()
            }
            _ => 16,
        }
    }
    if let ClientResult::Reply(reply) = result { size(reply) } else { 16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::testing::{three_shards, view_of};
    use crema_core::{Epoch, KeyRef, SetCond, SetExpire};

    fn get(key: &str) -> Op<'_> {
        Op::Get { key: KeyRef::new(0, key.as_bytes()).unwrap() }
    }
    fn put(key: &str) -> Op<'_> {
        let key = KeyRef::new(0, key.as_bytes()).unwrap();
        Op::Set { key, value: b"v", cond: SetCond::Always, expire: SetExpire::Clear, get: false }
    }
    fn text(command: &InFlight) -> String {
        assert!(command.is_finished());
        let mut out = BytesMut::new();
        command.write(&mut out);
        String::from_utf8(out.to_vec()).unwrap()
    }
    fn scattered(ops: &[Op<'_>], view: &RoutingView, finish: Finish) -> InFlight {
        let parts = by_shard(ops, view).unwrap();
        let parts = parts.into_iter().map(|(shard, positions)| {
            let own: Vec<Op<'_>> = match &positions {
                Positions::All => ops.to_vec(),
                Positions::Some(list) => list.iter().map(|i| ops[*i as usize]).collect(),
            };
            (Part::new(shard, own.iter().any(Op::is_write), encode_ops(&own).unwrap()), positions)
        });
        let many = Many::new(parts.collect(), ops.len(), finish);
        InFlight::many("mget", Proto::Resp2, MonoTime(9), many)
    }
    fn bulk(s: &'static str) -> Reply {
        Reply::Bulk(Bytes::from_static(s.as_bytes()))
    }

    // Slots: foo 12182 (shard 2), bar 5061 (shard 0), hello 866 (shard 0), somekey 11058 (shard 2), a 15495 (shard 2),
    // b 3300 (shard 0), c 7365 (shard 1).
    #[test]
    fn a_scattered_read_is_gathered_in_the_order_of_the_keys() {
        let view = three_shards();
        let mut c = scattered(&[get("a"), get("b"), get("c"), get("bar")], &view, Finish::Combine(Combine::List));
        let shards: Vec<_> = (0..c.part_count()).map(|i| c.part(i).unwrap().shard.0).collect();
        assert_eq!(shards, [0, 1, 2]);
        let mut resend = Vec::new();
        c.complete(2, ClientResult::Reply(bulk("A")), &view, &mut resend);
        c.complete(0, ClientResult::Reply(Reply::Array(vec![bulk("B"), Reply::Nil])), &view, &mut resend);
        assert!(!c.is_finished());
        c.complete(1, ClientResult::Reply(bulk("C")), &view, &mut resend);
        c.complete(1, ClientResult::Unknown, &view, &mut resend);
        assert_eq!(text(&c), "*4\r\n$1\r\nA\r\n$1\r\nB\r\n$1\r\nC\r\n$-1\r\n");
        assert!(resend.is_empty());
    }

    #[test]
    fn what_happened_in_part_is_not_called_failed() {
        let view = three_shards();
        let refused = || ClientResult::NotApplied(Refusal::NoLeader(ShardId(2)));
        let ok = || ClientResult::Reply(Reply::Ok);
        let end = |ops: &[Op<'_>], first: ClientResult, second: ClientResult| {
            let mut c = scattered(ops, &view, Finish::Combine(Combine::AllOk));
            c.complete(0, first, &view, &mut Vec::new());
            c.complete(1, second, &view, &mut Vec::new());
            text(&c)
        };
        let writes = [put("b"), put("a")];
        let reads = [get("b"), get("a")];
        let no_leader = "-CLUSTERDOWN shard 2 has no leader; the command was not executed\r\n";
        assert_eq!(end(&writes, ok(), ok()), "+OK\r\n");
        assert_eq!(end(&writes, refused(), refused()), no_leader);
        assert!(end(&writes, ok(), refused()).starts_with("-UNKNOWN outcome partial"));
        assert!(end(&writes, refused(), ok()).starts_with("-UNKNOWN outcome partial"));
        assert!(end(&writes, ClientResult::Unknown, refused()).starts_with("-UNKNOWN outcome unknown"));
        assert!(end(&writes, refused(), ClientResult::Unknown).starts_with("-UNKNOWN outcome unknown"));
        assert_eq!(end(&reads, ok(), refused()), no_leader, "a read changes nothing");
        assert!(end(&reads, ok(), ClientResult::Unknown).starts_with("-TRYAGAIN the read"));
    }

    #[test]
    fn refusals_of_single_commands() {
        let view = three_shards();
        let with = |write: bool, result| {
            let op = if write { put("a") } else { get("a") };
            let part = Part::new(ShardId(2), write, encode_ops(&[op]).unwrap());
            let mut c = InFlight::one("get", Proto::Resp2, MonoTime(1), part, Fmt::Plain);
            c.complete(0, result, &view, &mut Vec::new());
            text(&c)
        };
        assert!(with(true, ClientResult::Unknown).starts_with("-UNKNOWN outcome unknown: the command may or may not"));
        assert!(with(false, ClientResult::Unknown).starts_with("-TRYAGAIN "));
        let refused = |r| with(true, ClientResult::NotApplied(r));
        assert!(refused(Refusal::Busy(ShardId(7))).starts_with("-TRYAGAIN shard 7 "));
        assert!(refused(Refusal::NotReady).starts_with("-LOADING Crema "));
        assert!(refused(Refusal::ShuttingDown).starts_with("-CLUSTERDOWN "));
    }

    #[test]
    fn a_moved_slot_is_asked_for_once_more() {
        let (old, new) = (view_of(&[(0, 16384)]), three_shards());
        let wrong = || ClientResult::NotApplied(Refusal::WrongShard);
        let part = Part::new(ShardId(0), false, encode_ops(&[get("a")]).unwrap());
        let mut c = InFlight::one("get", Proto::Resp2, MonoTime(1), part, Fmt::Plain);
        let mut resend = Vec::new();
        assert!(c.complete(0, wrong(), &new, &mut resend));
        assert_eq!((resend.as_slice(), c.part(0).unwrap().shard), ([0].as_slice(), ShardId(2)));
        assert!(!c.is_finished());
        assert!(c.complete(0, wrong(), &new, &mut resend));
        assert!(!c.complete(0, wrong(), &new, &mut resend), "it has its result");
        assert!(text(&c).starts_with("-TRYAGAIN the slot is moving"));

        // All keys lay on one shard; now they lie on three, and each part knows its place in the reply.
        let mut c = scattered(&[get("a"), get("b"), get("c"), get("bar")], &old, Finish::Combine(Combine::List));
        assert_eq!(c.part_count(), 1);
        let mut resend = Vec::new();
        let errors = vec![Reply::Error(OpError::WrongSlot { epoch: Epoch(2) }); 4];
        c.complete(0, ClientResult::Reply(Reply::Array(errors)), &new, &mut resend);
        assert_eq!(resend, [1, 2, 3]);
        assert!(!c.complete(0, ClientResult::Unknown, &new, &mut resend), "that part is planned again");
        c.complete(3, ClientResult::Reply(bulk("A")), &new, &mut resend);
        c.complete(2, ClientResult::Reply(bulk("C")), &new, &mut resend);
        c.complete(1, ClientResult::Reply(Reply::Array(vec![bulk("B"), bulk("D")])), &new, &mut resend);
        assert_eq!(text(&c), "*4\r\n$1\r\nA\r\n$1\r\nB\r\n$1\r\nC\r\n$1\r\nD\r\n");

        let mut c = scattered(&[put("a"), put("b")], &old, Finish::Transaction(Vec::new()));
        c.complete(0, wrong(), &new, &mut Vec::new());
        assert_eq!(text(&c), format!("-{CROSSSLOT}\r\n"), "a transaction is not torn apart");
    }

    #[test]
    fn giving_up_finishes_everything() {
        let view = three_shards();
        for result in [ClientResult::Unknown, ClientResult::NotApplied(Refusal::WrongShard)] {
            let mut c = scattered(&[put("a"), put("b")], &view, Finish::Combine(Combine::AllOk));
            c.complete(0, ClientResult::Reply(Reply::Ok), &view, &mut Vec::new());
            c.abandon(&result, &view);
            assert!(text(&c).starts_with("-UNKNOWN "));
        }
    }

    #[test]
    fn answers_that_do_not_fit_are_no_reply() {
        let view = three_shards();
        let mut c = scattered(&[get("b"), get("bar")], &view, Finish::Combine(Combine::List));
        c.complete(0, ClientResult::Reply(Reply::Array(vec![Reply::Nil])), &view, &mut Vec::new());
        assert!(text(&c).starts_with("-UNKNOWN internal error"));
    }
}
