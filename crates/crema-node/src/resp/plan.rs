//! What to do with a command: answer it here, send it to its shards, send its client elsewhere, or hold it.
//!
//! ```text
//!   Args + ClientState + Context (view, clock) --plan()--> Local    the reply is written
//!                                                          Send     requests, and how their results combine
//!                                                          Hold     nothing is decided: ask again in a moment
//!                                                          Close, Drop
//! ```
//!
//! Pure: no socket, no waiting, and the clock is an argument. A command that is held has changed nothing, so it can be
//! planned again.
//!
//! **A read of one key** that this node may answer under its lease is answered here, without the driver, unless something
//! of the same connection is on its way to the shard: then it takes its turn behind that.
//!
//! **The two listeners.** On the proxying one every command goes where its keys are; one over keys of several shards is
//! scattered and gathered. On the cluster one, keys must share a slot, and a slot that another node leads is answered
//! with `MOVED`. Without a leader that can be named the command is held, and after that proxied.
//!
//! **MULTI** queues; EXEC makes one request of the queue, hence one log entry: all keys must be on one shard (on the
//! cluster listener: in one slot).

use crate::resp::command::{self, Cmd, NO_AUTH, NO_MULTI, Rejected, Spec, UNQUEUED, WRITE};
use crate::resp::decode::{Args, OwnedArgs, parse_i64};
use crate::resp::encode::{self, Proto};
use crate::resp::inflight::{CROSSSLOT, Finish, InFlight, LOADING, Many, Part, Positions, Shape, TxItem, by_shard};
use crate::resp::local;
use crate::resp::ops::{self, Built, Combine, Fmt};
use crate::resp::order::Unanswered;
use crate::resp::server::{ClientInfo, FrontConfig, ListenerKind};
use crate::resp::topology;
use bytes::BytesMut;
use crema_core::limits::{MAX_KEY_BYTES, MAX_OPS_PER_REQUEST, MAX_REQUEST_BYTES, MAX_SCAN_COUNT};
use crema_core::store::SCAN_SLOT_SHIFT;
use crema_core::{CodecError, MonoTime, Now, Op, Published, ShardId, Slot, encode_ops, slot_of};
use crema_shard::{RoutingView, ShardRoute};
use std::net::SocketAddr;
use std::sync::Arc;

/// Most bytes that MULTI queues.
pub const MAX_QUEUED_BYTES: usize = 8 * 1024 * 1024;
/// Most commands that MULTI queues.
pub const MAX_QUEUED: usize = MAX_OPS_PER_REQUEST;
/// About how many keys SCAN looks at unless told otherwise, as in Redis.
const SCAN_COUNT: u32 = 10;

/// What a connection is, for its commands.
#[derive(Debug)]
pub struct ClientState {
    /// Its entry in the list of clients.
    pub info: Arc<ClientInfo>,
    /// The selected database.
    pub db: u8,
    /// The chosen protocol.
    pub proto: Proto,
    /// Whether it may send commands at all.
    pub authenticated: bool,
    /// The queue, between MULTI and EXEC.
    pub multi: Option<Multi>,
    /// Reads that were answered under a lease; whoever counts them takes the number away.
    pub reads_local: u64,
}

impl ClientState {
    /// A new connection.
    pub fn new(info: Arc<ClientInfo>, front: &FrontConfig) -> ClientState {
        let authenticated = front.requirepass.is_none();
        ClientState { info, db: 0, proto: Proto::Resp2, authenticated, multi: None, reads_local: 0 }
    }
}

/// Commands queued by MULTI.
#[derive(Debug, Default)]
pub struct Multi {
    queued: Vec<(&'static Spec, OwnedArgs)>,
    bytes: usize,
    /// Something was refused: EXEC will refuse everything.
    dirty: bool,
}

/// What a plan depends on besides the connection.
#[derive(Clone, Copy, Debug)]
pub struct Context<'c> {
    /// Placement and leaders.
    pub view: &'c RoutingView,
    /// Which listener the connection came by.
    pub kind: ListenerKind,
    /// Configuration and counters.
    pub front: &'c FrontConfig,
    /// The clocks.
    pub now: Now,
    /// The deadline of what is planned.
    pub deadline: MonoTime,
    /// The node's address as this client reached it.
    pub local: SocketAddr,
    /// Whether the command can still be held.
    pub patient: bool,
    /// The connection's requests that are on their way.
    pub unanswered: &'c Unanswered,
    /// Reads the monotonic clock: a lease is compared with a clock that was read after the value.
    pub clock: fn() -> MonoTime,
}

/// What becomes of a command.
#[derive(Debug)]
pub enum Plan {
    /// Its reply was written.
    Local,
    /// Its requests are to be sent.
    Send(InFlight),
    /// Nothing was decided; plan it again soon, before anything that follows it.
    Hold,
    /// Its reply was written; close when everything is answered.
    Close,
    /// Close at once and say nothing: the client speaks another protocol.
    Drop,
}

/// Where a key's command goes.
enum Route {
    Shard(ShardId),
    Moved(topology::Endpoint),
    Hold,
    Loading,
}

fn route(ctx: &Context<'_>, slot: Slot) -> Route {
    let Some(shard) = ctx.view.shard_of(slot) else {
        return if ctx.patient { Route::Hold } else { Route::Loading };
    };
    if ctx.kind == ListenerKind::Proxy || ctx.view.shard(shard).is_some_and(|r| r.leader == Some(ctx.view.this)) {
        return Route::Shard(shard);
    }
    match ctx.view.redirect(shard) {
        // A leader without a cluster listener cannot be named, so its commands are proxied.
        Some(node) => topology::endpoint(ctx.view, node, ctx.local).map_or(Route::Shard(shard), Route::Moved),
        None if ctx.patient => Route::Hold,
        None => Route::Shard(shard),
    }
}

fn moved(out: &mut BytesMut, slot: Slot, to: &topology::Endpoint) {
    encode::error(out, format!("MOVED {} {}:{}", slot.0, to.host, to.port).as_bytes());
}

/// Plans the command `args` of a connection. Replies that stand already are appended to `out`.
pub fn plan(ctx: &Context<'_>, state: &mut ClientState, args: Args<'_>, out: &mut BytesMut) -> Plan {
    let spec = match command::resolve(args) {
        Ok(spec) => spec,
        Err(Rejected(text)) => return reject(state, args, &text, out),
    };
    if !state.authenticated && !spec.has(NO_AUTH) {
        encode::error(out, b"NOAUTH Authentication required.");
        return Plan::Local;
    }
    if state.multi.is_some() && !spec.has(UNQUEUED) {
        return queue(ctx, state, spec, args, out);
    }
    match spec.cmd {
        Cmd::Multi => {
            match state.multi {
                Some(_) => encode::err(out, b"MULTI calls can not be nested"),
                None => {
                    state.multi = Some(Multi::default());
                    encode::simple(out, "OK");
                }
            }
            Plan::Local
        }
        Cmd::Discard => {
            match state.multi.take() {
                Some(_) => encode::simple(out, "OK"),
                None => encode::err(out, b"DISCARD without MULTI"),
            }
            Plan::Local
        }
        Cmd::Exec => exec(ctx, state, out),
        Cmd::Quit => {
            encode::simple(out, "OK");
            Plan::Close
        }
        Cmd::Scan => scan(ctx, state, args, out),
        Cmd::Dbsize => everywhere(ctx, state, spec, Op::DbSize { db: state.db }, Combine::Sum, out),
        Cmd::Flushdb | Cmd::Flushall => {
            let mode = args.get(1);
            let known = mode.eq_ignore_ascii_case(b"async") || mode.eq_ignore_ascii_case(b"sync");
            if args.len() > 2 || args.len() == 2 && !known {
                encode::err(out, b"syntax error");
                return Plan::Local;
            }
            let db = (spec.cmd == Cmd::Flushdb).then_some(state.db);
            everywhere(ctx, state, spec, Op::Flush { db }, Combine::AllOk, out)
        }
        _ => match ops::build(spec, args, state.db, ctx.now.wall) {
            Ok(Some(Built::One(op, fmt))) => one(ctx, state, spec, op, fmt, out),
            Ok(Some(Built::Many(ops, combine))) => many(ctx, state, spec, &ops, combine, out),
            Ok(None) => {
                local::run(ctx, state, spec, args, out);
                Plan::Local
            }
            Err(text) => {
                encode::err(out, text.as_bytes());
                Plan::Local
            }
        },
    }
}

/// A command that is not one, or not so.
fn reject(state: &mut ClientState, args: Args<'_>, text: &[u8], out: &mut BytesMut) -> Plan {
    // A browser that was lured here, so that a web page could send commands (the header line stands in for any method).
    if args.get(0).eq_ignore_ascii_case(b"post") || args.get(0).eq_ignore_ascii_case(b"host:") {
        return Plan::Drop;
    }
    let exec = command::lookup(args.get(0)).is_some_and(|s| s.cmd == Cmd::Exec);
    if exec && state.multi.take().is_some() {
        encode::error(out, &[b"EXECABORT Transaction discarded because of: ", text].concat());
        return Plan::Local;
    }
    dirty(state);
    encode::err(out, text);
    Plan::Local
}

fn dirty(state: &mut ClientState) {
    if let Some(multi) = &mut state.multi {
        multi.dirty = true;
    }
}

fn queue(ctx: &Context<'_>, state: &mut ClientState, spec: &'static Spec, args: Args<'_>, out: &mut BytesMut) -> Plan {
    let refusal: Option<&[u8]> = if spec.has(NO_MULTI) {
        Some(b"ERR Command not allowed inside a transaction")
    } else if ctx.kind == ListenerKind::Cluster {
        let mut slots = spec.keys(args).map(slot_of);
        match slots.next() {
            Some(first) if !slots.all(|s| s == first) => Some(CROSSSLOT.as_bytes()),
            Some(first) => match route(ctx, first) {
                Route::Moved(to) => {
                    dirty(state);
                    moved(out, first, &to);
                    return Plan::Local;
                }
                Route::Hold => return Plan::Hold,
                Route::Loading => Some(LOADING.as_bytes()),
                Route::Shard(_) => None,
            },
            None => None,
        }
    } else {
        None
    };
    let Some(multi) = &mut state.multi else { return Plan::Local };
    let refusal = refusal.or_else(|| {
        let bytes: usize = args.from(0).map(|a| a.len() + size_of::<(u32, u32)>()).sum();
        let full = multi.queued.len() >= MAX_QUEUED || multi.bytes + bytes > MAX_QUEUED_BYTES;
        full.then_some(b"ERR the transaction is too large".as_slice())
    });
    match refusal {
        Some(text) => {
            multi.dirty = true;
            encode::error(out, text);
        }
        // Nothing of a transaction that is lost already will be executed.
        None if multi.dirty => encode::simple(out, "QUEUED"),
        None => {
            let owned = OwnedArgs::new(args.from(0));
            multi.bytes += owned.size();
            multi.queued.push((spec, owned));
            encode::simple(out, "QUEUED");
        }
    }
    Plan::Local
}

/// Where a transaction goes.
enum Destination {
    /// It has no keys.
    Nowhere,
    Shard(ShardId),
    Hold,
    Moved(Slot, topology::Endpoint),
    Refused(&'static str),
}

fn destination(ctx: &Context<'_>, multi: &Multi) -> Destination {
    let mut slots = multi.queued.iter().flat_map(|(spec, args)| spec.keys(args.args())).map(slot_of);
    let Some(first) = slots.next() else { return Destination::Nowhere };
    let fits = match ctx.kind {
        ListenerKind::Cluster => slots.all(|s| s == first),
        ListenerKind::Proxy => {
            let home = ctx.view.shard_of(first);
            slots.all(|s| ctx.view.shard_of(s) == home)
        }
    };
    if !fits {
        return Destination::Refused(CROSSSLOT);
    }
    match route(ctx, first) {
        Route::Shard(shard) => Destination::Shard(shard),
        Route::Hold => Destination::Hold,
        Route::Moved(to) => Destination::Moved(first, to),
        Route::Loading => Destination::Refused(LOADING),
    }
}

fn exec(ctx: &Context<'_>, state: &mut ClientState, out: &mut BytesMut) -> Plan {
    let Some(multi) = &state.multi else {
        encode::err(out, b"EXEC without MULTI");
        return Plan::Local;
    };
    if multi.dirty {
        state.multi = None;
        encode::error(out, b"EXECABORT Transaction discarded because of previous errors.");
        return Plan::Local;
    }
    // Where it goes is decided before anything is done, so that it can be held as a whole.
    let shard = match destination(ctx, multi) {
        Destination::Nowhere => None,
        Destination::Shard(shard) => Some(shard),
        Destination::Hold => return Plan::Hold,
        Destination::Refused(text) => {
            state.multi = None;
            encode::error(out, text.as_bytes());
            return Plan::Local;
        }
        Destination::Moved(slot, to) => {
            state.multi = None;
            moved(out, slot, &to);
            return Plan::Local;
        }
    };
    let Some(Multi { queued, .. }) = state.multi.take() else { return Plan::Local };
    let mut ops: Vec<Op<'_>> = Vec::new();
    let mut items = Vec::with_capacity(queued.len());
    let mut reply = BytesMut::new();
    for (spec, args) in &queued {
        let (name, proto) = (spec.name, state.proto);
        let mut item = |count: usize, shape| items.push(TxItem::Ops { count: count as u32, shape, name, proto });
        match ops::build(spec, args.args(), state.db, ctx.now.wall) {
            Ok(Some(Built::One(op, fmt))) => {
                ops.push(op);
                item(1, Shape::One(fmt));
                continue;
            }
            Ok(Some(Built::Many(list, combine))) => {
                item(list.len(), Shape::Many(combine));
                ops.extend(list);
                continue;
            }
            Ok(None) => local::run(ctx, state, spec, args.args(), &mut reply),
            Err(text) => encode::err(&mut reply, text.as_bytes()),
        }
        items.push(TxItem::Ready(reply.split().freeze()));
    }
    let Some(shard) = shard.filter(|_| !ops.is_empty()) else {
        encode::array(out, items.len());
        for item in &items {
            if let TxItem::Ready(reply) = item {
                out.extend_from_slice(reply);
            }
        }
        return Plan::Local;
    };
    let write = ops.iter().any(Op::is_write);
    match encode_ops(&ops) {
        Ok(bytes) => {
            let parts = vec![(Part::new(shard, write, bytes), Positions::All)];
            let many = Many::new(parts, ops.len(), Finish::Transaction(items));
            Plan::Send(InFlight::many("exec", state.proto, ctx.deadline, many))
        }
        Err(e) => {
            encode::error(out, &[b"EXECABORT Transaction discarded because of: ", too_large(e).as_bytes()].concat());
            Plan::Local
        }
    }
}

fn too_large(e: CodecError) -> String {
    match e {
        CodecError::TooLarge => {
            format!("more than {MAX_OPS_PER_REQUEST} keys or {MAX_REQUEST_BYTES} bytes for one shard in one command")
        }
        e => format!("the command cannot be encoded: {e}"),
    }
}

/// Answers a read of one key from the table that this node's replica publishes. `false`: nothing was written, the driver
/// must be asked.
fn read_here(ctx: &Context<'_>, state: &mut ClientState, shard: ShardId, op: &Op<'_>, out: &mut BytesMut) -> bool {
    let published = ctx.view.shard(shard).and_then(|r| r.published.as_deref());
    let Some(published) = published.filter(|_| Published::answers(op) && ctx.unanswered.allows(shard)) else {
        return false;
    };
    let (Some(key), Some(seen)) = (op.key(), published.begin()) else { return false };
    let (from, proto) = (out.len(), state.proto);
    // The value is copied once, to where it leaves from; what turns out not to count is taken back.
    let found = published.value(key, |entry| match (op, entry) {
        (Op::Get { .. }, Some(e)) => encode::bulk(out, e.value),
        (Op::Get { .. }, None) => encode::nil(out, proto),
        (Op::Strlen { .. }, e) => encode::int(out, e.map_or(0, |e| e.value.len() as i64)),
        (Op::Type { .. }, e) => encode::simple(out, if e.is_some() { "string" } else { "none" }),
        (_, e) => encode::int(out, i64::from(e.is_some())),
    });
    let counts = found.is_some_and(|found| published.finish(seen, found.expire_at, (ctx.clock)()));
    if counts {
        state.reads_local += 1;
    } else {
        out.truncate(from);
    }
    counts
}

/// A command of one operation on one key.
fn one(
    ctx: &Context<'_>,
    state: &mut ClientState,
    spec: &'static Spec,
    op: Op<'_>,
    fmt: Fmt,
    out: &mut BytesMut,
) -> Plan {
    let slot = op.key().map_or(Slot(0), |k| k.slot);
    match route(ctx, slot) {
        Route::Shard(shard) if read_here(ctx, state, shard, &op, out) => Plan::Local,
        Route::Shard(shard) => match encode_ops(&[op]) {
            Ok(ops) => {
                let part = Part::new(shard, op.is_write(), ops);
                Plan::Send(InFlight::one(spec.name, state.proto, ctx.deadline, part, fmt))
            }
            Err(e) => {
                encode::err(out, too_large(e).as_bytes());
                Plan::Local
            }
        },
        other => elsewhere(other, slot, out),
    }
}

/// The reply of a command that stays here, or its hold.
fn elsewhere(route: Route, slot: Slot, out: &mut BytesMut) -> Plan {
    match route {
        Route::Hold => return Plan::Hold,
        Route::Moved(to) => moved(out, slot, &to),
        // A shard is dealt with by the caller.
        Route::Loading | Route::Shard(_) => encode::error(out, LOADING.as_bytes()),
    }
    Plan::Local
}

/// A command of several keys: scattered, or on the cluster listener confined to one slot.
fn many(
    ctx: &Context<'_>,
    state: &mut ClientState,
    spec: &'static Spec,
    ops: &[Op<'_>],
    combine: Combine,
    out: &mut BytesMut,
) -> Plan {
    let mut slots = ops.iter().filter_map(Op::key).map(|k| k.slot);
    let first = slots.next().unwrap_or_default();
    if ctx.kind == ListenerKind::Cluster && !slots.all(|s| s == first) {
        encode::error(out, CROSSSLOT.as_bytes());
        return Plan::Local;
    }
    let shard = match route(ctx, first) {
        Route::Shard(shard) => shard,
        other => return elsewhere(other, first, out),
    };
    // MGET of one key. Of several, the driver reads all at one moment.
    if let ([op], Combine::List) = (ops, combine) {
        let from = out.len();
        encode::array(out, 1);
        if read_here(ctx, state, shard, op, out) {
            return Plan::Local;
        }
        out.truncate(from);
    }
    let Some(groups) = by_shard(ops, ctx.view) else { return elsewhere(Route::Loading, first, out) };
    let mut parts = Vec::with_capacity(groups.len());
    for (shard, positions) in groups {
        let encoded = match &positions {
            Positions::All => encode_ops(ops),
            Positions::Some(list) => {
                let own: Vec<Op<'_>> = list.iter().filter_map(|i| ops.get(*i as usize).copied()).collect();
                encode_ops(&own)
            }
        };
        match encoded {
            Ok(bytes) => parts.push((Part::new(shard, spec.has(WRITE), bytes), positions)),
            Err(e) => {
                encode::err(out, too_large(e).as_bytes());
                return Plan::Local;
            }
        }
    }
    let many = Many::new(parts, ops.len(), Finish::Combine(combine));
    Plan::Send(InFlight::many(spec.name, state.proto, ctx.deadline, many))
}

/// Shards that commands without keys cover: all, or on the cluster listener those that this node is named as the owner
/// of. Cluster clients send such a command to each owner, so together they reach every shard once, one without a leader
/// included.
fn covers(ctx: &Context<'_>, route: &ShardRoute) -> bool {
    ctx.kind == ListenerKind::Proxy || topology::owner(ctx.view, route) == Some(ctx.view.this)
}

/// A command to all shards at once.
fn everywhere(
    ctx: &Context<'_>,
    state: &ClientState,
    spec: &'static Spec,
    op: Op<'_>,
    combine: Combine,
    out: &mut BytesMut,
) -> Plan {
    if ctx.view.shards.is_empty() {
        return elsewhere(if ctx.patient { Route::Hold } else { Route::Loading }, Slot(0), out);
    }
    let ops = match encode_ops(&[op]) {
        Ok(ops) => ops,
        Err(e) => {
            encode::err(out, too_large(e).as_bytes());
            return Plan::Local;
        }
    };
    let covered = ctx.view.shards.iter().enumerate().filter(|(_, r)| covers(ctx, r));
    let shards: Vec<ShardId> = covered.map(|(i, _)| ShardId(i as u32)).collect();
    let parts = shards
        .iter()
        .enumerate()
        .map(|(i, shard)| (Part::new(*shard, op.is_write(), ops.clone()), Positions::Some(vec![i as u32])));
    let many = Many::new(parts.collect(), shards.len(), Finish::Combine(combine));
    Plan::Send(InFlight::many(spec.name, state.proto, ctx.deadline, many))
}

/// A cursor of SCAN: decimal digits. Redis takes a minus and wraps around; nobody can mean that.
fn parse_cursor(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// One step of SCAN, on one shard. The cursor is (slot, hash), so the shards follow each other in the order of slots.
fn scan(ctx: &Context<'_>, state: &ClientState, args: Args<'_>, out: &mut BytesMut) -> Plan {
    let refuse = |out: &mut BytesMut, text: &str| {
        encode::err(out, text.as_bytes());
        Plan::Local
    };
    let Some(cursor) = parse_cursor(args.get(1)) else { return refuse(out, "invalid cursor") };
    let (mut count, mut pattern, mut anything) = (SCAN_COUNT, None, true);
    let mut i = 2;
    while i < args.len() {
        let (option, value) = (args.get(i), args.get(i + 1));
        if i + 1 == args.len() {
            return refuse(out, "syntax error");
        } else if option.eq_ignore_ascii_case(b"count") {
            let Some(n) = parse_i64(value) else {
                return refuse(out, "value is not an integer or out of range");
            };
            if n < 1 {
                return refuse(out, "syntax error");
            }
            count = n.min(i64::from(MAX_SCAN_COUNT)) as u32;
        } else if option.eq_ignore_ascii_case(b"match") {
            if value.len() > MAX_KEY_BYTES {
                return refuse(out, "the pattern is longer than a key may be");
            }
            pattern = (value != b"*").then_some(value);
        } else if option.eq_ignore_ascii_case(b"type") {
            // Strings are all there is.
            anything = value.eq_ignore_ascii_case(b"string");
        } else {
            return refuse(out, "syntax error");
        }
        i += 2;
    }
    if ctx.view.shards.is_empty() {
        return elsewhere(if ctx.patient { Route::Hold } else { Route::Loading }, Slot(0), out);
    }
    // The shard at hand, and the first one to come after a given one. A scan that has begun on a shard ends there even
    // if its leader has gone elsewhere meanwhile: what it would not see, nobody else may show.
    let shards = &ctx.view.shards;
    let next = |from: usize| (from..shards.len()).find(|i| covers(ctx, &shards[*i]));
    let begin = |i: usize| u64::from(shards[i].range.start) << SCAN_SLOT_SHIFT;
    let at = match cursor {
        0 => next(0).map(|i| (i, begin(i))),
        cursor => {
            let slot = u16::try_from(cursor >> SCAN_SLOT_SHIFT).ok();
            slot.and_then(|s| ctx.view.shard_of(Slot(s))).map(|s| (s.0 as usize, cursor))
        }
    };
    let Some((index, cursor)) = at.filter(|_| anything) else {
        encode::array(out, 2);
        encode::bulk(out, b"0");
        encode::array(out, 0);
        return Plan::Local;
    };
    // Only the first shard begins at cursor 0, and it never comes after another: 0 can mean the end.
    let then = next(index + 1).map_or(0, begin);
    match encode_ops(&[Op::Scan { db: state.db, cursor, count, pattern }]) {
        Ok(ops) => {
            let part = Part::new(ShardId(index as u32), false, ops);
            Plan::Send(InFlight::one("scan", state.proto, ctx.deadline, part, Fmt::Scan { then }))
        }
        Err(e) => refuse(out, &too_large(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::testing::{Planner, three_shards};
    use bytes::Bytes;
    use crema_core::store::{Edit, TableWriter};
    use crema_core::{KeyRef, LogTime, NodeId, OpsRef, Reply, Term};
    use crema_shard::{ClientResult, Refusal};

    /// Slots: a 15495, foo 12182, somekey 11058: shard 2. c 7365: shard 1. b 3300, bar 5061, hello 866: shard 0.
    /// Node 1, which is this one, leads shard 0, node 2 shard 1, node 3 shard 2.
    fn proxy() -> Planner {
        Planner::new(ListenerKind::Proxy, three_shards())
    }
    fn cluster() -> Planner {
        Planner::new(ListenerKind::Cluster, three_shards())
    }

    #[test]
    fn a_key_goes_to_its_shard() {
        let mut p = proxy();
        assert_eq!(p.sent("get a"), [(2, false, 1)]);
        assert_eq!(p.sent("SET b v"), [(0, true, 1)]);
        assert_eq!(p.sent("mget a b c foo"), [(0, false, 1), (1, false, 1), (2, false, 2)]);
        assert_eq!(p.sent("mset a 1 foo 2"), [(2, true, 2)]);
        assert_eq!(p.sent("del a b"), [(0, true, 1), (2, true, 1)]);
        assert_eq!(p.sent("dbsize"), [(0, false, 1), (1, false, 1), (2, false, 1)]);
        assert_eq!(p.sent("flushall async"), [(0, true, 1), (1, true, 1), (2, true, 1)]);
        assert_eq!(p.local("flushdb foo"), "-ERR syntax error\r\n");
        assert_eq!(p.local("flushall sync sync"), "-ERR syntax error\r\n");
    }

    /// A view whose shard 2 (keys a, foo, somekey) is leased here until the clock reads 100, and its table: a = 1, and foo
    /// as it expires at log time 1,000.
    fn leased() -> (RoutingView, TableWriter, Arc<Published>) {
        let mut view = three_shards();
        let mut table = TableWriter::new(view.shards[2].range, 1);
        let published = Arc::new(Published::new(table.table().clone(), LogTime(500)));
        published.set_estimate(LogTime(500), Now::default());
        published.cell().open(5, 7, 100);
        for (key, expire_at) in [("a", 0), ("foo", 1_000)] {
            table.edit(KeyRef::new(0, key.as_bytes()).unwrap(), |_| ((), Edit::Put { value: b"1", expire_at }));
        }
        view.shards[2].published = Some(published.clone());
        (view, table, published)
    }

    #[test]
    fn reads_of_one_key_are_answered_under_a_lease() {
        for kind in [ListenerKind::Proxy, ListenerKind::Cluster] {
            let (mut view, _table, _) = leased();
            view.shards[2].leader = Some(view.this);
            let mut p = Planner::new(kind, view);
            for (line, reply) in [
                ("get a", "$1\r\n1\r\n"),
                ("get foo", "$1\r\n1\r\n"),
                ("get somekey", "$-1\r\n"),
                ("strlen a", ":1\r\n"),
                ("strlen somekey", ":0\r\n"),
                ("exists a", ":1\r\n"),
                ("exists somekey", ":0\r\n"),
                ("type a", "+string\r\n"),
                ("type somekey", "+none\r\n"),
                ("mget a", "*1\r\n$1\r\n1\r\n"),
                ("getex a", "$1\r\n1\r\n"),
            ] {
                assert_eq!(p.local(line), reply, "{line}");
            }
            assert_eq!(p.state.reads_local, 11);
            // What is no read of one key, or not this shard's, takes the usual way.
            assert_eq!(p.sent("get b"), [(0, false, 1)]);
            assert_eq!(p.sent("mget a a"), [(2, false, 2)]);
            assert_eq!(p.sent("exists a a"), [(2, false, 2)]);
            assert_eq!(p.sent("ttl a"), [(2, false, 1)]);
            assert_eq!(p.sent("getdel a"), [(2, true, 1)]);
            // A transaction is one request, and queues.
            assert_eq!((p.local("multi"), p.local("get a")), ("+OK\r\n".into(), "+QUEUED\r\n".into()));
            assert_eq!(p.sent("exec"), [(2, false, 1)]);
            p.local("hello 3");
            assert_eq!(p.local("get somekey"), "_\r\n");
            p.local("select 1");
            assert_eq!(p.local("get a"), "_\r\n", "another database");
            assert_eq!(p.state.reads_local, 13);
        }
    }

    #[test]
    fn a_read_that_may_not_be_answered_here_leaves_no_trace() {
        let (view, mut table, published) = leased();
        let mut p = Planner::new(ListenerKind::Proxy, view);
        let asks = |p: &mut Planner, why: &str| {
            for line in ["get a", "mget a"] {
                // `sent` refuses a plan that has written something.
                assert_eq!(p.sent(line), [(2, false, 1)], "{line}: {why}");
            }
            assert_eq!(p.state.reads_local, 0);
        };
        p.clock = || MonoTime(100);
        asks(&mut p, "the lease is over once the value is read");
        p.clock = || MonoTime(0);
        p.unanswered.sent(ShardId(2));
        asks(&mut p, "it would overtake");
        p.unanswered.answered(ShardId(2));
        p.unanswered.sent(ShardId(1));
        assert_eq!(p.local("get a"), "$1\r\n1\r\n", "another shard is not in the way");
        p.state.reads_local = 0;
        published.cell().changing();
        asks(&mut p, "half of a change");
        published.cell().changed();
        let soon = KeyRef::new(0, b"a").unwrap();
        table.edit(soon, |_| ((), Edit::Put { value: b"1", expire_at: 501 }));
        asks(&mut p, "only the log can say whether it has expired");
        table.edit(soon, |_| ((), Edit::Put { value: b"1", expire_at: 0 }));
        published.cell().close();
        asks(&mut p, "no lease");
        published.cell().open(6, 7, 100);
        assert_eq!(p.local("get a"), "$1\r\n1\r\n");
    }

    #[test]
    fn the_selected_database_goes_into_the_operations() {
        let mut p = proxy();
        assert_eq!(p.local("select 3"), "+OK\r\n");
        let Plan::Send(c) = p.plan("get a").0 else { panic!() };
        let op = OpsRef::parse(&c.part(0).unwrap().ops).unwrap().iter().next().unwrap();
        assert_eq!(op.key().unwrap().db, 3);
    }

    #[test]
    fn the_cluster_listener_sends_clients_to_the_leader() {
        let mut p = cluster();
        assert_eq!(p.sent("get b"), [(0, false, 1)]);
        assert_eq!(p.local("get a"), "-MOVED 15495 10.0.0.3:7381\r\n");
        assert_eq!(p.local("mget a b"), "-CROSSSLOT Keys in request don't hash to the same slot\r\n");
        assert_eq!(p.local("mget a a"), "-MOVED 15495 10.0.0.3:7381\r\n");
        assert_eq!(p.sent("mset {b}1 1 {b}2 2"), [(0, true, 2)]);
        // Reads stay linearizable: READONLY changes nothing.
        assert_eq!(p.local("readonly"), "+OK\r\n");
        assert_eq!(p.local("get a"), "-MOVED 15495 10.0.0.3:7381\r\n");
        assert_eq!((p.local("asking"), p.local("readwrite")), ("+OK\r\n".into(), "+OK\r\n".into()));
        assert_eq!(p.sent("dbsize"), [(0, false, 1)], "only what is led here");
        p.view.shards[2].leader = None;
        assert_eq!(p.sent("flushall"), [(0, true, 1), (2, true, 1)], "and what nobody leads, lest nobody covers it");
    }

    #[test]
    fn nobody_is_sent_to_a_leader_that_is_not_sure() {
        let mut p = cluster();
        let cases: [fn(&mut RoutingView); 3] = [
            |v| v.shards[2].leader = None,
            |v| v.nodes.get_mut(&NodeId(3)).unwrap().live = false,
            |v| v.shards[2].own_term = Term(9),
        ];
        for change in cases {
            p.view = three_shards();
            change(&mut p.view);
            p.patient = true;
            assert!(matches!(p.plan("get a").0, Plan::Hold));
            p.patient = false;
            assert_eq!(p.sent("get a"), [(2, false, 1)], "proxied in the end");
        }
        p.view = three_shards();
        p.view.nodes.get_mut(&NodeId(3)).unwrap().addrs.redis_cluster = None;
        p.patient = true;
        assert_eq!(p.sent("get a"), [(2, false, 1)], "a node without a listener is never named");
    }

    #[test]
    fn before_the_placement_is_known_commands_are_held() {
        for kind in [ListenerKind::Proxy, ListenerKind::Cluster] {
            let mut p = Planner::new(kind, RoutingView::default());
            for line in ["get a", "mget a a", "dbsize", "scan 0", "flushall"] {
                p.patient = true;
                assert!(matches!(p.plan(line).0, Plan::Hold), "{line}");
                p.patient = false;
                let loading = "-LOADING Crema is founding or joining its cluster; the command was not executed\r\n";
                assert_eq!(p.local(line), loading, "{line}");
            }
            p.patient = true;
            assert_eq!(p.local("ping"), "+PONG\r\n");
        }
    }

    #[test]
    fn a_transaction_is_one_request() {
        let mut p = proxy();
        assert_eq!(p.local("multi"), "+OK\r\n");
        for line in ["set a 1", "ping", "mget a foo", "set a 1 ex", "select 1", "mset a 2", "del a foo", "ttl a"] {
            let wanted = if line == "mset a 2" { "mset a 2 foo 3" } else { line };
            assert_eq!(p.local(wanted), "+QUEUED\r\n");
        }
        let (Plan::Send(mut c), _) = p.plan("exec") else { panic!() };
        assert_eq!(c.part_count(), 1);
        let part = c.part(0).unwrap().clone();
        assert_eq!((part.shard, part.write), (ShardId(2), true));
        let ops: Vec<_> = OpsRef::parse(&part.ops).unwrap().iter().map(|op| op.key().unwrap().db).collect();
        assert_eq!(ops, [0, 0, 0, 1, 1, 1, 1, 1], "SELECT works within the queue");
        assert_eq!(p.state.db, 1, "and beyond it");
        let bulk = |s: &'static str| Reply::Bulk(Bytes::from_static(s.as_bytes()));
        let answers = vec![
            Reply::Ok,
            bulk("1"),
            Reply::Nil,
            Reply::Ok,
            Reply::Ok,
            Reply::Int(1),
            Reply::Int(1),
            Reply::Int(1500),
        ];
        c.complete(0, ClientResult::Reply(Reply::Array(answers)), &p.view, &mut Vec::new());
        let mut out = BytesMut::new();
        c.write(&mut out);
        let wanted = "*8\r\n+OK\r\n+PONG\r\n*2\r\n$1\r\n1\r\n$-1\r\n-ERR syntax error\r\n+OK\r\n+OK\r\n:2\r\n:2\r\n";
        assert_eq!(out, wanted);
    }

    #[test]
    fn a_transaction_of_one_operation_is_an_array_too() {
        let mut p = proxy();
        p.local("multi");
        p.local("get a");
        let (Plan::Send(mut c), _) = p.plan("exec") else { panic!() };
        c.complete(0, ClientResult::Reply(Reply::Nil), &p.view, &mut Vec::new());
        let mut out = BytesMut::new();
        c.write(&mut out);
        assert_eq!(out, "*1\r\n$-1\r\n");
        p.local("multi");
        p.local("get a");
        let (Plan::Send(mut c), _) = p.plan("exec") else { panic!() };
        c.complete(0, ClientResult::NotApplied(Refusal::NoLeader(ShardId(2))), &p.view, &mut Vec::new());
        out.clear();
        c.write(&mut out);
        assert_eq!(out, "-CLUSTERDOWN shard 2 has no leader; the command was not executed\r\n");
    }

    #[test]
    fn transactions_end_as_in_redis() {
        // Each as Redis 7.0.15 answers.
        let mut p = proxy();
        let mut all = |lines: &[&str]| lines.iter().map(|l| p.local(l)).collect::<String>();
        assert_eq!(all(&["exec"]), "-ERR EXEC without MULTI\r\n");
        assert_eq!(all(&["discard"]), "-ERR DISCARD without MULTI\r\n");
        assert_eq!(all(&["multi", "multi", "exec"]), "+OK\r\n-ERR MULTI calls can not be nested\r\n*0\r\n");
        assert_eq!(
            all(&["multi", "set a 1", "discard", "exec"]),
            "+OK\r\n+QUEUED\r\n+OK\r\n-ERR EXEC without MULTI\r\n"
        );
        assert_eq!(
            all(&["multi", "FOO", "set a 1", "exec", "exec"]),
            "+OK\r\n-ERR unknown command 'FOO', with args beginning with: \r\n+QUEUED\r\n\
             -EXECABORT Transaction discarded because of previous errors.\r\n-ERR EXEC without MULTI\r\n"
        );
        assert_eq!(
            all(&["multi", "client FOO", "exec"]),
            "+OK\r\n-ERR unknown subcommand 'FOO'. Try CLIENT HELP.\r\n\
             -EXECABORT Transaction discarded because of previous errors.\r\n"
        );
        assert_eq!(
            all(&["multi", "exec a", "exec"]),
            "+OK\r\n-EXECABORT Transaction discarded because of: wrong number of arguments for 'exec' command\r\n\
             -ERR EXEC without MULTI\r\n"
        );
        assert_eq!(all(&["multi", "reset", "exec"]), "+OK\r\n+RESET\r\n-ERR EXEC without MULTI\r\n");
        assert_eq!(
            all(&["multi", "hello 3", "client getname", "exec", "client getname"])
                .split("*2\r\n")
                .map(|half| half.contains("%7\r\n") && half.ends_with("_\r\n_\r\n"))
                .collect::<Vec<_>>(),
            [false, true]
        );
        // Ours: what concerns all shards is no part of one entry.
        assert_eq!(
            all(&["hello 2", "multi", "dbsize", "exec"]).split_once("+OK").unwrap().1,
            "\r\n-ERR Command not allowed inside a transaction\r\n\
             -EXECABORT Transaction discarded because of previous errors.\r\n"
        );
    }

    #[test]
    fn a_transaction_stays_on_one_shard() {
        let mut p = proxy();
        let crossslot = "-CROSSSLOT Keys in request don't hash to the same slot\r\n";
        for line in ["multi", "set a 1", "set b 1"] {
            p.local(line);
        }
        assert_eq!(p.local("exec"), crossslot);
        assert_eq!(p.local("exec"), "-ERR EXEC without MULTI\r\n");
        // Two slots of one shard are one shard; on the cluster listener they are two slots.
        for line in ["multi", "set a 1", "set foo 1"] {
            p.local(line);
        }
        assert_eq!(p.sent("exec"), [(2, true, 2)]);
        let mut p = cluster();
        for line in ["multi", "set b 1", "set bar 1"] {
            p.local(line);
        }
        assert_eq!(p.local("exec"), crossslot);
        assert_eq!(p.local("multi"), "+OK\r\n");
        assert_eq!(p.local("mget b bar"), crossslot);
        assert_eq!(p.local("exec"), "-EXECABORT Transaction discarded because of previous errors.\r\n");
        p.local("multi");
        assert_eq!(p.local("get a"), "-MOVED 15495 10.0.0.3:7381\r\n");
        assert_eq!(p.local("exec"), "-EXECABORT Transaction discarded because of previous errors.\r\n");
    }

    #[test]
    fn a_held_transaction_loses_nothing() {
        let mut p = cluster();
        p.local("multi");
        p.local("set b 1");
        p.view.shards[0].leader = None;
        p.patient = true;
        assert!(matches!(p.plan("exec").0, Plan::Hold));
        assert!(matches!(p.plan("set b 2").0, Plan::Hold));
        p.view.shards[0].leader = Some(NodeId(1));
        assert_eq!(p.local("set b 2"), "+QUEUED\r\n");
        assert_eq!(p.sent("exec"), [(0, true, 2)]);
    }

    #[test]
    fn queues_are_bounded() {
        let mut p = proxy();
        p.local("multi");
        let large = format!("set a {}", "x".repeat(1 << 20));
        let queued = (0..20).filter(|_| p.local(&large) == "+QUEUED\r\n").count();
        assert_eq!(queued, 7);
        assert!(p.local("exec").starts_with("-EXECABORT "));
        p.local("multi");
        for _ in 0..MAX_QUEUED {
            assert_eq!(p.local("get a"), "+QUEUED\r\n");
        }
        assert_eq!(p.local("get a"), "-ERR the transaction is too large\r\n");
    }

    #[test]
    fn scan_goes_from_shard_to_shard() {
        let step = |p: &mut Planner, line: &str| {
            let (plan, _) = p.plan(line);
            let Plan::Send(c) = plan else { panic!("{line}: {plan:?}") };
            let part = c.part(0).unwrap();
            let op = OpsRef::parse(&part.ops).unwrap().iter().next();
            let Some(Op::Scan { cursor, count, pattern, .. }) = op else { panic!() };
            let crate::resp::inflight::Body::One { fmt: Fmt::Scan { then }, .. } = c.body else { panic!() };
            (part.shard.0, cursor, then, count, pattern.map(|p| String::from_utf8(p.to_vec()).unwrap()))
        };
        let slot = |s: u64| s << SCAN_SLOT_SHIFT;
        let mut p = proxy();
        assert_eq!(step(&mut p, "scan 0"), (0, 0, slot(5462), 10, None));
        let line = format!("scan {} match k* count 99999999 TYPE string", slot(5462));
        assert_eq!(step(&mut p, &line), (1, slot(5462), slot(10923), MAX_SCAN_COUNT, Some("k*".into())));
        let inside = slot(16383) + 77;
        assert_eq!(step(&mut p, &format!("scan {inside} match *")), (2, inside, 0, 10, None));
        let end = "*2\r\n$1\r\n0\r\n*0\r\n";
        assert_eq!(p.local(&format!("scan {}", u64::MAX)), end);
        assert_eq!(p.local("scan 0 type list"), end);
        for (line, error) in [
            ("scan x", "invalid cursor"),
            ("scan -1", "invalid cursor"),
            ("scan 18446744073709551616", "invalid cursor"),
            ("scan 0 count 0", "syntax error"),
            ("scan 0 count x", "value is not an integer or out of range"),
            ("scan 0 foo", "syntax error"),
            ("scan 0 foo bar", "syntax error"),
            ("scan 0 match", "syntax error"),
        ] {
            assert_eq!(p.local(line), format!("-ERR {error}\r\n"), "{line}");
        }
        // The shards led here; one that was begun is finished even if its leader has moved.
        let mut p = cluster();
        p.view.shards[0].leader = Some(NodeId(2));
        p.view.shards[1].leader = Some(NodeId(1));
        assert_eq!(step(&mut p, "scan 0"), (1, slot(5462), 0, 10, None));
        assert_eq!(step(&mut p, "scan 5"), (0, 5, slot(5462), 10, None));
        p.view.shards[1].leader = Some(NodeId(3));
        assert_eq!(p.local("scan 0"), end);
    }

    #[test]
    fn passwords_guard_everything_but_the_greeting() {
        let mut p = proxy().with_password("secret");
        let noauth = "-NOAUTH Authentication required.\r\n";
        for line in ["get a", "ping", "multi", "command", "info"] {
            assert_eq!(p.local(line), noauth, "{line}");
        }
        // As in Redis, the table of commands comes first.
        assert!(p.local("FOO").starts_with("-ERR unknown command"));
        assert_eq!(p.local("get"), "-ERR wrong number of arguments for 'get' command\r\n");
        assert_eq!(p.local("auth x"), "-WRONGPASS invalid username-password pair or user is disabled.\r\n");
        assert_eq!(p.local("auth default x"), "-WRONGPASS invalid username-password pair or user is disabled.\r\n");
        assert_eq!(p.local("auth other secret"), "-WRONGPASS invalid username-password pair or user is disabled.\r\n");
        assert_eq!(p.local("auth default secret x"), "-ERR syntax error\r\n");
        assert!(p.local("hello 3").starts_with("-NOAUTH HELLO must be called with the client already authenticated"));
        assert_eq!(p.local("hello 4"), "-NOPROTO unsupported protocol version\r\n");
        assert_eq!(p.local("ping"), noauth);
        assert_eq!(p.local("auth secret"), "+OK\r\n");
        assert_eq!(p.local("ping"), "+PONG\r\n");
        assert_eq!(p.local("reset"), "+RESET\r\n");
        assert_eq!(p.local("ping"), noauth);
        assert!(p.local("hello 3 auth default secret setname me").starts_with("%7\r\n"));
        assert_eq!(p.local("client getname"), "$2\r\nme\r\n");
    }

    #[test]
    fn browsers_are_dropped_and_quit_closes() {
        let mut p = proxy();
        assert!(matches!(p.plan("POST / HTTP/1.1").0, Plan::Drop));
        assert!(matches!(p.plan("host: a").0, Plan::Drop));
        p.local("multi");
        let (plan, reply) = p.plan("quit");
        assert!(matches!(plan, Plan::Close));
        assert_eq!(reply, "+OK\r\n");
    }

    #[test]
    fn what_fits_no_request_is_refused() {
        let mut p = proxy();
        let line = format!("mget{}", " a".repeat(MAX_OPS_PER_REQUEST + 1));
        let reply = p.local(&line);
        assert!(reply.starts_with("-ERR more than 16384 keys"), "{reply}");
    }
}
