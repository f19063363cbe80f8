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
mod tests;
