use super::*;
use crate::codec::tests::{key, tag};
use crate::codec::{
    EntryBuilder, encode_advance, encode_check_digest, encode_open_session, encode_ops, encode_remove,
    encode_set_limits,
};
use crate::ids::Incarnation;
use crate::limits::{EVICTION_BYTES_PER_KEY, LimitPolicy};
use crate::op::f64Bits;
use crate::slot::{SLOT_COUNT, slot_of};
use crate::store::SCAN_SLOT_SHIFT;
use crate::time::WallTime;
use proptest::prelude::*;
use std::collections::BTreeMap;

const ALL: SlotRange = SlotRange { start: 0, end: SLOT_COUNT };
/// Log time at which the tests begin.
pub(crate) const T: u64 = 1_000_000;

fn machine(range: SlotRange) -> StateMachine {
    StateMachine::new(ShardInit { range, epoch: Epoch(4), secret: 99, log_time: LogTime(T), applied: LogIndex(5) })
}

/// A machine with one session that writes in order.
pub(crate) struct Rig {
    pub(crate) m: StateMachine,
    session: u64,
    seq: u64,
    wall_offset: i64,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(ALL)
    }
    fn with(range: SlotRange) -> Self {
        let mut m = machine(range);
        let applied = m.apply(LogIndex(6), &encode_open_session(LogTime(T), Incarnation(1))).unwrap();
        assert_eq!(applied.outcomes, [Outcome::Reply(Reply::Int(6))]);
        Rig { m, session: 6, seq: 0, wall_offset: 0 }
    }
    pub(crate) fn next(&mut self, payload: &[u8]) -> Applied {
        let index = LogIndex(self.m.applied().0 + 1);
        let applied = self.m.apply(index, payload).unwrap();
        assert_eq!(self.m.applied(), index);
        applied
    }
    /// Executes a request at log time `T + ms`, or later if time is there already.
    fn request_at(&mut self, ms: u64, ops: &[Op<'_>]) -> Reply {
        self.seq += 1;
        let mut b = EntryBuilder::new(LogTime(T + ms), self.wall_offset);
        b.push(tag(self.session, self.seq, self.seq - 1), &encode_ops(ops).unwrap());
        match &self.next(&b.finish()).outcomes[..] {
            [Outcome::Reply(reply)] => reply.clone(),
            other => panic!("{other:?}"),
        }
    }
    fn at(&mut self, ms: u64, op: Op<'_>) -> Reply {
        self.request_at(ms, &[op])
    }
    pub(crate) fn op(&mut self, op: Op<'_>) -> Reply {
        self.at(0, op)
    }
    fn set(&mut self, k: &[u8], value: &[u8], expire: SetExpire) {
        assert_eq!(self.op(Op::Set { key: key(k), value, cond: SetCond::Always, expire, get: false }), Reply::Ok);
    }
    fn get(&mut self, k: &[u8]) -> Reply {
        self.op(Op::Get { key: key(k) })
    }
    fn pttl(&mut self, k: &[u8]) -> i64 {
        match self.op(Op::Pttl { key: key(k) }) {
            Reply::Int(n) => n,
            other => panic!("{other:?}"),
        }
    }
    fn read(&self, estimate_ms: u64, ops: &[Op<'_>]) -> ReadResult {
        self.m.read(&encode_ops(ops).unwrap(), LogTime(T + estimate_ms))
    }
}

fn bulk(b: &[u8]) -> Reply {
    Reply::Bulk(Bytes::copy_from_slice(b))
}

const CLEAR: SetExpire = SetExpire::Clear;

#[test]
fn set_conditions_with_and_without_get() {
    // (exists, condition, get) -> (reply, whether the new value stands)
    for (exists, cond, get, reply, stands) in [
        (false, SetCond::Always, false, Reply::Ok, true),
        (true, SetCond::Always, false, Reply::Ok, true),
        (false, SetCond::IfAbsent, false, Reply::Ok, true),
        (true, SetCond::IfAbsent, false, Reply::Nil, false),
        (false, SetCond::IfPresent, false, Reply::Nil, false),
        (true, SetCond::IfPresent, false, Reply::Ok, true),
        (false, SetCond::Always, true, Reply::Nil, true),
        (true, SetCond::Always, true, bulk(b"old"), true),
        (false, SetCond::IfAbsent, true, Reply::Nil, true),
        (true, SetCond::IfAbsent, true, bulk(b"old"), false),
        (false, SetCond::IfPresent, true, Reply::Nil, false),
        (true, SetCond::IfPresent, true, bulk(b"old"), true),
    ] {
        // An expired key is an absent one.
        for expired in [false, true] {
            if exists && expired {
                continue;
            }
            let mut r = Rig::new();
            if exists {
                r.set(b"k", b"old", CLEAR);
            }
            if expired {
                r.set(b"k", b"old", SetExpire::After(5));
            }
            let case = format!("{exists} {cond:?} {get} {expired}");
            let op = Op::Set { key: key(b"k"), value: b"new", cond, expire: CLEAR, get };
            assert_eq!(r.at(10, op), reply, "{case}");
            let now = if stands {
                bulk(b"new")
            } else if exists {
                bulk(b"old")
            } else {
                Reply::Nil
            };
            assert_eq!(r.get(b"k"), now, "{case}");
            assert_eq!(
                r.m.keys(),
                u64::from(now != Reply::Nil),
                "{case}: an expired key is removed by any write to it"
            );
        }
    }
}

#[test]
fn set_expiries() {
    let mut r = Rig::new();
    r.wall_offset = 500;
    let set = |expire| Op::Set { key: key(b"k"), value: b"v", cond: SetCond::Always, expire, get: false };
    assert_eq!((r.op(set(SetExpire::After(100))), r.pttl(b"k")), (Reply::Ok, 100));
    assert_eq!((r.op(set(SetExpire::Keep)), r.pttl(b"k")), (Reply::Ok, 100));
    assert_eq!((r.op(set(CLEAR)), r.pttl(b"k")), (Reply::Ok, -1));
    assert_eq!((r.op(set(SetExpire::Keep)), r.pttl(b"k")), (Reply::Ok, -1));
    assert_eq!((r.op(set(SetExpire::At(WallTime(T + 500 + 70)))), r.pttl(b"k")), (Reply::Ok, 70));
    // A past point: done, and the key is gone; the old value is still told.
    assert_eq!((r.op(set(SetExpire::At(WallTime(T + 500)))), r.pttl(b"k"), r.m.keys()), (Reply::Ok, -2, 0));
    r.set(b"k", b"old", CLEAR);
    let op =
        Op::Set { key: key(b"k"), value: b"v", cond: SetCond::Always, expire: SetExpire::At(WallTime(0)), get: true };
    assert_eq!((r.op(op), r.get(b"k")), (bulk(b"old"), Reply::Nil));
    // Keeping the expiry of an expired key keeps nothing.
    r.set(b"k", b"v", SetExpire::After(10));
    assert_eq!((r.at(10, set(SetExpire::Keep)), r.pttl(b"k")), (Reply::Ok, -1));
    // Beyond all time, whatever the condition says.
    let invalid = Reply::Error(OpError::InvalidExpire);
    for expire in [SetExpire::After(u64::MAX), SetExpire::After(i64::MAX as u64), SetExpire::At(WallTime(u64::MAX))] {
        assert_eq!(r.op(set(expire)), invalid);
        assert_eq!(r.op(Op::Set { key: key(b"k"), value: b"n", cond: SetCond::IfAbsent, expire, get: false }), invalid);
        assert_eq!(r.op(Op::GetEx { key: key(b"k"), expire }), invalid);
        assert_eq!(r.op(Op::GetEx { key: key(b"absent"), expire }), Reply::Nil);
    }
    assert_eq!((r.get(b"k"), r.pttl(b"k")), (bulk(b"v"), -1));
    let most = i64::MAX as u64 - r.m.log_time().0;
    assert_eq!((r.op(set(SetExpire::After(most))), r.pttl(b"k")), (Reply::Ok, most as i64));
}

#[test]
fn offsets_at_their_extremes() {
    let mut r = Rig::new();
    let at = |wall| Op::Set {
        key: key(b"k"),
        value: b"v",
        cond: SetCond::Always,
        expire: SetExpire::At(WallTime(wall)),
        get: false,
    };
    r.wall_offset = i64::MIN;
    assert_eq!(r.op(at(u64::MAX)), Reply::Error(OpError::InvalidExpire));
    assert_eq!(r.op(at(1)), Reply::Error(OpError::InvalidExpire));
    r.wall_offset = i64::MAX;
    assert_eq!((r.op(at(1)), r.m.keys()), (Reply::Ok, 0));
    r.set(b"k", b"v", CLEAR);
    let past = Op::Expire { key: key(b"k"), at: ExpireAt::At(i64::MIN), cond: ExpireCond::Always };
    assert_eq!((r.op(past), r.m.keys()), (Reply::Int(1), 0));
}

#[test]
fn keys_expire_at_their_point_of_log_time() {
    let mut r = Rig::new();
    r.set(b"k", b"v", SetExpire::After(100));
    assert_eq!(r.at(99, Op::Get { key: key(b"k") }), bulk(b"v"));
    assert_eq!(r.pttl(b"k"), 1);
    assert_eq!(r.at(100, Op::Get { key: key(b"k") }), Reply::Nil);
    // Time does not run back, whatever an entry says.
    assert_eq!(r.at(0, Op::Exists { key: key(b"k") }), Reply::Int(0));
    assert_eq!((r.m.log_time(), r.m.keys()), (LogTime(T + 100), 1), "nobody has written to it");
    assert_eq!(r.op(Op::Persist { key: key(b"k") }), Reply::Int(0));
    assert_eq!(r.m.keys(), 0, "a write to it, even a vain one, removes it");
}

#[test]
fn every_write_takes_an_expired_key_as_absent() {
    let k = key(b"k");
    let cas = |expected, value| Op::CompareAndSet { key: k, expected, value, expire: SetExpire::Keep };
    for (op, reply, value) in [
        (Op::GetEx { key: k, expire: CLEAR }, Reply::Nil, Reply::Nil),
        (Op::GetDel { key: k }, Reply::Nil, Reply::Nil),
        (Op::Del { key: k }, Reply::Int(0), Reply::Nil),
        (Op::IncrBy { key: k, by: 3 }, Reply::Int(3), bulk(b"3")),
        (Op::IncrByFloat { key: k, by: f64Bits::from(0.5) }, bulk(b"0.5"), bulk(b"0.5")),
        (Op::Append { key: k, value: b"x" }, Reply::Int(1), bulk(b"x")),
        (Op::Append { key: k, value: b"" }, Reply::Int(0), bulk(b"")),
        (Op::Expire { key: k, at: ExpireAt::After(99), cond: ExpireCond::Always }, Reply::Int(0), Reply::Nil),
        (Op::Persist { key: k }, Reply::Int(0), Reply::Nil),
        (cas(Some(b"7"), b"x"), Reply::Int(0), Reply::Nil),
        (cas(None, b"x"), Reply::Int(1), bulk(b"x")),
    ] {
        let mut r = Rig::new();
        r.set(b"k", b"7", SetExpire::After(10));
        assert_eq!(r.at(10, op), reply, "{op:?}");
        assert_eq!(r.get(b"k"), value, "{op:?}");
        assert_eq!(r.m.keys(), u64::from(value != Reply::Nil), "{op:?}");
        assert!(r.pttl(b"k") < 0, "{op:?}: the new key has no expiry");
    }
}

#[test]
fn getex_getdel_del_persist_type_strlen() {
    let mut r = Rig::new();
    let k = key(b"k");
    r.set(b"k", b"val", SetExpire::After(100));
    assert_eq!((r.op(Op::GetEx { key: k, expire: SetExpire::Keep }), r.pttl(b"k")), (bulk(b"val"), 100));
    assert_eq!((r.op(Op::GetEx { key: k, expire: CLEAR }), r.pttl(b"k")), (bulk(b"val"), -1));
    assert_eq!((r.op(Op::GetEx { key: k, expire: SetExpire::After(7) }), r.pttl(b"k")), (bulk(b"val"), 7));
    assert_eq!((r.op(Op::Persist { key: k }), r.pttl(b"k")), (Reply::Int(1), -1));
    assert_eq!(r.op(Op::Persist { key: k }), Reply::Int(0));
    assert_eq!(r.op(Op::Strlen { key: k }), Reply::Int(3));
    assert_eq!(r.op(Op::Type { key: k }), Reply::Type(ValueType::String));
    assert_eq!(r.op(Op::GetEx { key: k, expire: SetExpire::At(WallTime(T)) }), bulk(b"val"));
    assert_eq!((r.get(b"k"), r.m.keys()), (Reply::Nil, 0), "a past point deletes");
    assert_eq!(r.op(Op::Strlen { key: k }), Reply::Int(0));
    assert_eq!(r.op(Op::Type { key: k }), Reply::Type(ValueType::None));
    assert_eq!(r.op(Op::GetDel { key: k }), Reply::Nil);
    r.set(b"k", b"", CLEAR);
    assert_eq!(r.op(Op::GetDel { key: k }), bulk(b""));
    assert_eq!(r.op(Op::Del { key: k }), Reply::Int(0));
    r.set(b"k", b"v", CLEAR);
    assert_eq!((r.op(Op::Del { key: k }), r.m.bytes()), (Reply::Int(1), 0));
}

#[test]
fn compare_and_set_changes_only_what_is_expected() {
    let mut r = Rig::new();
    let cas = |expected, value, expire| Op::CompareAndSet { key: key(b"k"), expected, value, expire };
    let (keep, done, refused) = (SetExpire::Keep, Reply::Int(1), Reply::Int(0));
    assert_eq!(r.op(cas(Some(b"a"), b"b", keep)), refused, "an absent key holds nothing, not even the empty string");
    assert_eq!(r.op(cas(Some(b""), b"b", keep)), refused);
    assert_eq!((r.m.keys(), r.op(cas(None, b"a", keep)), r.get(b"k"), r.pttl(b"k")), (0, done.clone(), bulk(b"a"), -1));
    for other in [None, Some(&b""[..]), Some(b"aa"), Some(b"A")] {
        assert_eq!((r.op(cas(other, b"b", CLEAR)), r.get(b"k")), (refused.clone(), bulk(b"a")), "{other:?}");
    }
    // Its expiry, as SET knows it.
    assert_eq!((r.op(cas(Some(b"a"), b"b", SetExpire::After(50))), r.pttl(b"k")), (done.clone(), 50));
    assert_eq!((r.op(cas(Some(b"a"), b"c", CLEAR)), r.pttl(b"k")), (refused, 50), "refused: the expiry stays too");
    assert_eq!((r.op(cas(Some(b"b"), b"", keep)), r.pttl(b"k"), r.get(b"k")), (done.clone(), 50, bulk(b"")));
    assert_eq!((r.op(cas(Some(b""), b"c", CLEAR)), r.pttl(b"k")), (done.clone(), -1));
    let invalid = Reply::Error(OpError::InvalidExpire);
    assert_eq!(r.op(cas(Some(b"no"), b"d", SetExpire::After(u64::MAX))), invalid, "before the comparison");
    assert_eq!(r.op(cas(Some(b"c"), b"d", SetExpire::At(WallTime(T)))), done);
    assert_eq!((r.get(b"k"), r.m.keys()), (Reply::Nil, 0), "a past point deletes");
}

#[test]
fn expire_conditions_as_in_redis() {
    use ExpireCond::{Always, IfGreater, IfLess, IfNone, IfSome};
    // (present expiry, condition, new expiry) -> remaining time afterwards, or none if refused
    for (old, cond, new, after) in [
        (None, Always, 50, Some(50)),
        (Some(100), Always, 50, Some(50)),
        (None, IfNone, 50, Some(50)),
        (Some(100), IfNone, 50, None),
        (None, IfSome, 50, None),
        (Some(100), IfSome, 50, Some(50)),
        (None, IfGreater, 50, None),
        (Some(100), IfGreater, 101, Some(101)),
        (Some(100), IfGreater, 100, None),
        (Some(100), IfGreater, 99, None),
        (None, IfLess, 50, Some(50)),
        (Some(100), IfLess, 99, Some(99)),
        (Some(100), IfLess, 100, None),
        (Some(100), IfLess, 101, None),
        // Past points delete, if the condition holds.
        (None, Always, 0, Some(-2)),
        (None, Always, -1, Some(-2)),
        (None, Always, i64::MIN, Some(-2)),
        (None, IfLess, -1, Some(-2)),
        (Some(100), IfLess, -1, Some(-2)),
        (Some(100), IfGreater, -1, None),
        (None, IfGreater, -1, None),
        (None, IfSome, -1, None),
        (Some(100), IfNone, -1, None),
    ] {
        for by_wall in [false, true] {
            let mut r = Rig::new();
            r.wall_offset = -77;
            r.set(b"k", b"v", old.map_or(CLEAR, SetExpire::After));
            let at = if by_wall { ExpireAt::At(new.saturating_add(T as i64 - 77)) } else { ExpireAt::After(new) };
            let case = format!("{old:?} {cond:?} {new} {by_wall}");
            let reply = r.op(Op::Expire { key: key(b"k"), at, cond });
            assert_eq!(reply, Reply::Int(i64::from(after.is_some())), "{case}");
            assert_eq!(r.pttl(b"k"), after.unwrap_or(old.map_or(-1, |o| o as i64)), "{case}");
            assert_eq!(r.m.keys(), u64::from(after != Some(-2)), "{case}");
        }
    }
    let mut r = Rig::new();
    let expire = |k, at| Op::Expire { key: key(k), at, cond: Always };
    assert_eq!(r.op(expire(b"absent", ExpireAt::After(5))), Reply::Int(0));
    assert_eq!(r.op(expire(b"absent", ExpireAt::After(i64::MAX))), Reply::Error(OpError::InvalidExpire));
    r.wall_offset = -1;
    assert_eq!(r.op(expire(b"absent", ExpireAt::At(i64::MAX))), Reply::Error(OpError::InvalidExpire));
}

fn limits(r: &mut Rig, max_bytes: u64, policy: LimitPolicy) {
    let limits = MemoryLimits { max_bytes, policy };
    let digest = r.m.digest();
    assert_eq!(r.next(&encode_set_limits(LogTime(T), limits)), Applied::default());
    assert_eq!(r.m.limits(), limits);
    assert_ne!(r.m.digest(), digest, "replicas that disagree in it are told apart");
}

#[test]
fn a_full_shard_refuses_what_takes_memory_and_nothing_else() {
    let mut r = Rig::new();
    let k = key(b"k");
    let set = |value| Op::Set { key: k, value, cond: SetCond::Always, expire: CLEAR, get: false };
    r.set(b"k", &[b'1'; 15], SetExpire::After(1000));
    r.set(b"f", b"1", CLEAR);
    let bytes = r.m.bytes();
    limits(&mut r, bytes, LimitPolicy::Refuse);
    assert_eq!(r.m.used(), r.m.bytes());
    let full = Reply::Error(OpError::OutOfMemory);
    let table = r.m.table().digest();
    for op in [
        set(&[0; 60]),
        Op::Append { key: k, value: &[0; 60] },
        Op::Append { key: key(b"new"), value: b"" },
        Op::IncrBy { key: key(b"new"), by: 1 },
        Op::CompareAndSet { key: key(b"new"), expected: None, value: b"v", expire: CLEAR },
        Op::IncrByFloat { key: key(b"new"), by: f64Bits::from(1.0) },
        // 52 digits and more.
        Op::IncrByFloat { key: key(b"f"), by: f64Bits::from(1e60) },
    ] {
        assert_eq!(r.op(op), full, "{op:?}");
        assert_eq!(r.m.table().digest(), table, "{op:?}: nothing has changed");
    }
    // In a transaction each for itself.
    let reply =
        r.request_at(0, &[Op::GetDel { key: key(b"f") }, set(&[0; 16]), Op::Append { key: k, value: &[0; 300] }]);
    assert_eq!(reply, Reply::Array(vec![bulk(b"1"), Reply::Ok, full.clone()]));
    limits(&mut r, 1, LimitPolicy::Refuse);
    for op in [
        set(&[b'1'; 15]),
        Op::IncrBy { key: k, by: 1 },
        Op::Append { key: k, value: b"" },
        Op::Expire { key: k, at: ExpireAt::After(50), cond: ExpireCond::Always },
        Op::GetEx { key: k, expire: SetExpire::After(9) },
        Op::Persist { key: k },
        Op::Set { key: key(b"new"), value: b"", cond: SetCond::IfPresent, expire: CLEAR, get: false },
        Op::Del { key: k },
        Op::Flush { db: None },
    ] {
        let reply = r.op(op);
        assert!(!matches!(reply, Reply::Error(_)), "{op:?}: {reply:?}");
    }
    assert_eq!(r.op(set(b"v")), full);
    limits(&mut r, 0, LimitPolicy::Refuse);
    assert_eq!(r.op(set(b"v")), Reply::Ok);
}

#[test]
fn eviction_has_a_little_room_beyond_the_limit() {
    let mut r = Rig::new();
    limits(&mut r, 64_000, LimitPolicy::Evict);
    let each = record_bytes(7, 10, false) + EVICTION_BYTES_PER_KEY;
    let mut stored = 0;
    while r.at(0, Op::Append { key: key(format!("key{stored:04}").as_bytes()), value: &[0; 10] }) == Reply::Int(10) {
        stored += 1;
        assert_eq!(r.m.used(), each * stored);
    }
    assert_eq!(stored, 68_000 / each);
    limits(&mut r, u64::MAX, LimitPolicy::Evict);
    r.set(b"k", b"v", CLEAR);
}

#[test]
fn removing_takes_what_is_named_and_if_asked_only_what_has_expired() {
    let mut r = Rig::with(SlotRange { start: 0, end: 9000 });
    // "foo" lies in slot 12182, which is of another shard.
    for (k, expire) in [(&b"bar"[..], CLEAR), (b"hello", SetExpire::After(10)), (b"{bar}2", SetExpire::After(20))] {
        r.set(k, b"v", expire);
    }
    let victim = |r: &Rig, k: &[u8]| Victim { slot: slot_of(k), hash: r.m.table().hash(0, k) };
    let all =
        [victim(&r, b"bar"), victim(&r, b"hello"), victim(&r, b"{bar}2"), victim(&r, b"foo"), victim(&r, b"absent")];
    let mut twin = Rig::with(SlotRange { start: 0, end: 9000 });
    twin.set(b"bar", b"v", CLEAR);
    twin.set(b"hello", b"v", SetExpire::After(10));
    twin.set(b"{bar}2", b"v", SetExpire::After(20));
    r.next(&encode_remove(LogTime(T + 9), &all, true).unwrap());
    assert_eq!((r.m.keys(), r.m.log_time()), (3, LogTime(T + 9)));
    r.next(&encode_remove(LogTime(T + 10), &all, true).unwrap());
    assert_eq!((r.m.keys(), r.get(b"hello"), r.pttl(b"{bar}2")), (2, Reply::Nil, 10));
    r.next(&encode_remove(LogTime(T), &all[..1], false).unwrap());
    assert_eq!((r.m.keys(), r.get(b"bar")), (1, Reply::Nil));
    assert_eq!(r.m.removed(), Removed { expired: 1, evicted: 1 });
    for k in [b"bar" as &[u8], b"hello"] {
        twin.op(Op::Del { key: key(k) });
    }
    assert_eq!(r.m.table().digest(), twin.m.table().digest());
    // A snapshot sees what was removed since.
    let head = r.m.begin_snapshot().unwrap();
    r.next(&encode_remove(LogTime(T), &all, false).unwrap());
    assert_eq!(r.m.keys(), 0);
    let mut restore = crate::snapshot::Restore::begin(&head).unwrap();
    loop {
        match r.m.snapshot_step(100) {
            SnapshotStep::Chunk(c) => assert!(!restore.chunk(&c).unwrap()),
            SnapshotStep::Done(c) => break assert!(restore.chunk(&c).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(restore.finish().unwrap().table().digest(), twin.m.table().digest());
}

#[test]
fn the_search_for_expired_keys_finds_all_of_them_and_no_other() {
    for seed in 1..9u64 {
        let mut rng = seed * 0x9E37_79B9;
        let mut below = move |n: u64| {
            rng ^= rng << 13;
            rng ^= rng >> 7;
            rng ^= rng << 17;
            rng % n
        };
        let mut r = Rig::new();
        assert_eq!((r.m.next_expiry_hint(), r.m.expired(LogTime(u64::MAX), 10)), (None, vec![]));
        let mut live: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        let mut now = 0;
        for round in 0..30 {
            for _ in 0..below(600) {
                let i = below(4000);
                let name = if i % 3 == 0 { format!("spread{i}") } else { format!("{{one}}{i}") }.into_bytes();
                let ms = if below(3) == 0 { 0 } else { 1 + below(2000) };
                match below(8) {
                    0 => {
                        r.at(now, Op::Del { key: key(&name) });
                        live.remove(&name);
                    }
                    1 => {
                        let at = ExpireAt::After(ms.max(1) as i64);
                        r.at(now, Op::Expire { key: key(&name), at, cond: ExpireCond::Always });
                        live.entry(name).and_modify(|at| *at = now + ms.max(1));
                    }
                    _ => {
                        let expire = if ms == 0 { CLEAR } else { SetExpire::After(ms) };
                        r.at(now, Op::Set { key: key(&name), value: b"v", cond: SetCond::Always, expire, get: false });
                        live.insert(name, if ms == 0 { u64::MAX } else { now + ms });
                    }
                }
            }
            if below(12) == 0 {
                r.op(Op::Flush { db: None });
                live.clear();
            }
            let earliest = live.values().min().filter(|at| **at != u64::MAX);
            let hint = r.m.next_expiry_hint().map(|at| at.0 - T);
            assert!(hint.unwrap_or(u64::MAX) <= earliest.copied().unwrap_or(u64::MAX), "seed {seed}: a lower bound");
            now += below(300);
            // Half of the time the leader's estimate is ahead of log time.
            let estimate = LogTime(T + now);
            let mut calls = 0;
            while r.m.next_expiry_hint().is_some_and(|at| at <= estimate) {
                let most = [3, 50, 4096][below(3) as usize];
                let victims = r.m.expired(estimate, most);
                assert!(victims.len() <= most);
                let (before, count) = (r.m.keys(), victims.len() as u64);
                r.next(&encode_remove(estimate, &victims, true).unwrap());
                assert_eq!(r.m.keys(), before - count, "seed {seed}: everything found has expired, once");
                calls += 1;
                assert!(calls < 2000, "seed {seed}, round {round}: it does not end");
            }
            live.retain(|_, at| *at > now);
            assert_eq!(r.m.keys(), live.len() as u64, "seed {seed}, round {round}");
            assert!(r.m.expired(estimate, 100).is_empty());
        }
    }
}

#[test]
fn one_search_is_bounded_and_none_is_made_in_vain() {
    let mut r = Rig::new();
    for i in 0..30_000 {
        r.set(format!("key{i}").as_bytes(), b"v", SetExpire::After(3));
        r.op(Op::Persist { key: key(format!("key{i}").as_bytes()) });
    }
    // The bounds say that all may have expired, and one round finds out that none ever will.
    assert_eq!(r.m.expired(LogTime(T + 2), 10), []);
    assert_eq!(r.m.next_expiry_hint(), Some(LogTime(T + 3)));
    let mut calls = 0;
    while r.m.next_expiry_hint().is_some() {
        assert_eq!(r.m.expired(LogTime(T + 3), 10), []);
        calls += 1;
    }
    assert!((4..8).contains(&calls), "{calls}");
    // A key that expires makes its segment worth looking at.
    r.set(b"soon", b"v", SetExpire::After(3));
    assert_eq!(r.m.expired(LogTime(T + 9), 10).len(), 1);
    assert_eq!(r.m.next_expiry_hint(), Some(LogTime(T + 3)), "until it is removed");
}

#[test]
fn integers_as_redis_takes_them() {
    for (text, value) in [
        ("0", Some(0)),
        ("-1", Some(-1)),
        ("10", Some(10)),
        ("9223372036854775807", Some(i64::MAX)),
        ("-9223372036854775808", Some(i64::MIN)),
        ("9223372036854775808", None),
        ("-9223372036854775809", None),
        ("99999999999999999999", None),
        ("", None),
        ("-", None),
        ("-0", None),
        ("+1", None),
        ("01", None),
        ("00", None),
        ("-01", None),
        (" 1", None),
        ("1 ", None),
        ("1.0", None),
        ("0x1", None),
        ("1e3", None),
    ] {
        assert_eq!(parse_integer(text.as_bytes()), value, "{text:?}");
    }
    for n in [0, -1, i64::MIN, i64::MAX, 42] {
        assert_eq!(format_integer(n, &mut [0; 20]), n.to_string().as_bytes());
    }
}

#[test]
fn incrby_keeps_the_expiry_and_refuses_what_redis_refuses() {
    let mut r = Rig::new();
    let incr = |by| Op::IncrBy { key: key(b"n"), by };
    assert_eq!(r.op(incr(5)), Reply::Int(5));
    r.set(b"n", b"99", SetExpire::After(100));
    assert_eq!((r.op(incr(-100)), r.pttl(b"n"), r.get(b"n")), (Reply::Int(-1), 100, bulk(b"-1")));
    r.set(b"n", b"9223372036854775807", CLEAR);
    assert_eq!(r.op(incr(1)), Reply::Error(OpError::Overflow));
    r.set(b"n", b"-9223372036854775808", CLEAR);
    assert_eq!(r.op(incr(-1)), Reply::Error(OpError::Overflow));
    assert_eq!(r.op(incr(i64::MAX)), Reply::Int(-1));
    r.set(b"n", b"x", SetExpire::After(9));
    assert_eq!(r.op(incr(1)), Reply::Error(OpError::NotInteger));
    assert_eq!((r.get(b"n"), r.pttl(b"n")), (bulk(b"x"), 9), "nothing has changed");
}

#[test]
fn incrbyfloat_prints_as_redis() {
    let mut r = Rig::new();
    for (old, by, result) in [
        (Some("3.0"), 1.5, Ok("4.5")),
        (Some("5.0e3"), 0.0, Ok("5000")),
        (Some("10.50"), 0.1, Ok("10.6")),
        (Some("1"), -1.0, Ok("0")),
        (Some("-0.5"), 0.5, Ok("0")),
        (None, -0.0, Ok("0")),
        (None, 2.5, Ok("2.5")),
        (Some("3"), 1e20, Ok("100000000000000000000")),
        (Some("0"), 0.00001, Ok("0.00001")),
        (Some("+1.5"), 1.0, Ok("2.5")),
        (Some(".5"), 1.0, Ok("1.5")),
        (Some("abc"), 1.0, Err(OpError::NotFloat)),
        (Some(""), 1.0, Err(OpError::NotFloat)),
        (Some(" 1"), 1.0, Err(OpError::NotFloat)),
        (Some("1 "), 1.0, Err(OpError::NotFloat)),
        (Some("nan"), 1.0, Err(OpError::NotFloat)),
        (Some("1e999"), 1.0, Err(OpError::NotFloat)),
        (Some("inf"), 1.0, Err(OpError::NotFinite)),
        (Some("1.7e308"), 1.7e308, Err(OpError::NotFinite)),
    ] {
        r.op(Op::Del { key: key(b"f") });
        if let Some(old) = old {
            r.set(b"f", old.as_bytes(), SetExpire::After(100));
        }
        let reply = r.op(Op::IncrByFloat { key: key(b"f"), by: f64Bits::from(by) });
        assert_eq!(reply, result.map_or_else(Reply::Error, |text| bulk(text.as_bytes())), "{old:?} + {by}");
        if let (Ok(text), Some(_)) = (result, old) {
            assert_eq!((r.get(b"f"), r.pttl(b"f")), (bulk(text.as_bytes()), 100));
        }
    }
    assert_eq!(parse_float(&vec![b'1'; MAX_FLOAT_TEXT]), None);
}

#[test]
fn append_keeps_the_expiry_and_has_an_end() {
    let mut r = Rig::new();
    let append = |value| Op::Append { key: key(b"k"), value };
    assert_eq!(r.op(append(b"ab")), Reply::Int(2));
    r.op(Op::Expire { key: key(b"k"), at: ExpireAt::After(50), cond: ExpireCond::Always });
    assert_eq!((r.op(append(b"cd")), r.get(b"k"), r.pttl(b"k")), (Reply::Int(4), bulk(b"abcd"), 50));
    assert_eq!(r.op(append(b"")), Reply::Int(4));
    let rest = vec![b'x'; MAX_VALUE_BYTES - 4];
    assert_eq!(r.op(append(&rest)), Reply::Int(MAX_VALUE_BYTES as i64));
    assert_eq!(r.op(append(b"y")), Reply::Error(OpError::TooLong));
    assert_eq!(r.op(Op::Strlen { key: key(b"k") }), Reply::Int(MAX_VALUE_BYTES as i64));
}

#[test]
fn several_operations_are_executed_in_order_and_do_not_undo_each_other() {
    let mut r = Rig::new();
    let k = key(b"k");
    let reply = r.request_at(
        0,
        &[
            Op::Set { key: k, value: b"a", cond: SetCond::Always, expire: CLEAR, get: false },
            Op::IncrBy { key: k, by: 1 },
            Op::Append { key: k, value: b"b" },
            Op::Get { key: k },
            Op::DbSize { db: 0 },
        ],
    );
    let replies = vec![Reply::Ok, Reply::Error(OpError::NotInteger), Reply::Int(2), bulk(b"ab"), Reply::Int(1)];
    assert_eq!(reply, Reply::Array(replies));
}

#[test]
fn foreign_slots_are_refused_as_a_whole_and_finally() {
    let slot = slot_of(b"mine").0;
    let mut r = Rig::with(SlotRange { start: slot, end: slot + 1 });
    assert_ne!(slot_of(b"theirs").0, slot);
    let wrong = Reply::Error(OpError::WrongSlot { epoch: Epoch(4) });
    let set = |k| Op::Set { key: key(k), value: b"v", cond: SetCond::Always, expire: CLEAR, get: false };
    assert_eq!(r.request_at(0, &[set(b"mine"), set(b"theirs")]), wrong);
    assert_eq!((r.m.keys(), r.m.bytes()), (0, 0));
    assert_eq!(r.op(Op::Get { key: key(b"theirs") }), wrong);
    assert_eq!(
        r.read(0, &[Op::Get { key: key(b"mine") }, Op::Get { key: key(b"theirs") }]),
        ReadResult::Reply(wrong.clone())
    );
    // The refusal is the answer of this write for ever.
    let mut b = EntryBuilder::new(LogTime(T), 0);
    b.push(tag(r.session, 1, 0), &encode_ops(&[set(b"mine")]).unwrap());
    b.push(tag(r.session, 2, 1), &encode_ops(&[set(b"theirs")]).unwrap());
    assert_eq!(r.next(&b.finish()).outcomes, [Outcome::Unknown, Outcome::Reply(wrong.clone())]);
    // Cursors name slots too.
    let scan = |slot: u16| Op::Scan { db: 0, cursor: u64::from(slot) << SCAN_SLOT_SHIFT, count: 10, pattern: None };
    assert_eq!(r.read(0, &[scan(slot)]), ReadResult::Reply(Reply::Scan { next: None, keys: vec![] }));
    assert_eq!(r.read(0, &[scan(slot + 1)]), ReadResult::Reply(wrong.clone()));
    assert_eq!(r.op(scan(slot - 1)), wrong);
    let beyond = Op::Scan { db: 0, cursor: u64::MAX, count: 10, pattern: None };
    assert_eq!(r.read(0, &[beyond]), ReadResult::Reply(wrong));
}

#[test]
fn a_retried_increment_is_executed_once() {
    let mut r = Rig::new();
    let incr = encode_ops(&[Op::IncrBy { key: key(b"n"), by: 1 }]).unwrap();
    let entry = |r: &mut Rig, tags: &[(u64, u64)]| {
        let mut b = EntryBuilder::new(LogTime(T), 0);
        tags.iter().for_each(|(seq, low)| b.push(tag(6, *seq, *low), &incr));
        r.next(&b.finish()).outcomes
    };
    let int = |n| Outcome::Reply(Reply::Int(n));
    assert_eq!(entry(&mut r, &[(1, 0), (1, 0), (2, 0)]), [int(1), int(1), int(2)]);
    assert_eq!(entry(&mut r, &[(4, 0), (2, 0), (3, 0), (4, 0)]), [Outcome::Gap, int(2), int(3), int(4)]);
    assert_eq!(entry(&mut r, &[(3, 3), (4, 0), (9, 7), (9, 8)]), [Outcome::Unknown, int(4), Outcome::Gap, int(5)]);
    assert_eq!(
        r.m.read(&encode_ops(&[Op::Get { key: key(b"n") }]).unwrap(), LogTime(0)),
        ReadResult::Reply(bulk(b"5"))
    );
    // A session that was replaced, and one that never was.
    r.next(&encode_open_session(LogTime(T), Incarnation(1)));
    assert_eq!(entry(&mut r, &[(10, 9)]), [Outcome::NoSession]);
    let mut b = EntryBuilder::new(LogTime(T), 0);
    b.push(tag(777, 1, 0), &incr);
    assert_eq!(r.next(&b.finish()).outcomes, [Outcome::NoSession]);
    assert_eq!(
        r.m.read(&encode_ops(&[Op::Get { key: key(b"n") }]).unwrap(), LogTime(0)),
        ReadResult::Reply(bulk(b"5"))
    );
}

#[test]
fn errors_are_remembered_too() {
    let mut r = Rig::new();
    r.set(b"n", b"x", CLEAR);
    assert_eq!(r.op(Op::IncrBy { key: key(b"n"), by: 1 }), Reply::Error(OpError::NotInteger));
    r.set(b"n", b"1", CLEAR);
    let mut b = EntryBuilder::new(LogTime(T), 0);
    b.push(tag(6, 2, 1), &encode_ops(&[Op::IncrBy { key: key(b"n"), by: 1 }]).unwrap());
    // The copy carries an older watermark, but the session's is at 2 already.
    assert_eq!(r.next(&b.finish()).outcomes, [Outcome::Unknown]);
    let mut b = EntryBuilder::new(LogTime(T), 0);
    let bad = encode_ops(&[Op::IncrByFloat { key: key(b"m"), by: f64Bits::from(1.0) }]).unwrap();
    r.set(b"m", b"x", CLEAR);
    b.push(tag(6, 5, 3), &bad);
    b.push(tag(6, 6, 3), &encode_ops(&[Op::Del { key: key(b"m") }]).unwrap());
    b.push(tag(6, 5, 3), &bad);
    let error = Outcome::Reply(Reply::Error(OpError::NotFloat));
    assert_eq!(r.next(&b.finish()).outcomes, [error.clone(), Outcome::Reply(Reply::Int(1)), error]);
}

#[test]
fn reads_wait_for_log_time_only_where_it_matters() {
    let mut r = Rig::new();
    r.set(b"short", b"v", SetExpire::After(100));
    r.set(b"long", b"v", SetExpire::After(1000));
    let get = |k| Op::Get { key: key(k) };
    assert_eq!(r.read(99, &[get(b"short")]), ReadResult::Reply(bulk(b"v")));
    assert_eq!(r.read(99, &[Op::Pttl { key: key(b"short") }]), ReadResult::Reply(Reply::Int(1)));
    for op in [
        get(b"short"),
        Op::Exists { key: key(b"short") },
        Op::Pttl { key: key(b"short") },
        Op::Strlen { key: key(b"short") },
        Op::Type { key: key(b"short") },
    ] {
        assert_eq!(r.read(100, &[op]), ReadResult::NeedsAdvance, "{op:?}");
        assert_eq!(r.read(100, &[get(b"long"), op]), ReadResult::NeedsAdvance, "{op:?}");
    }
    assert_eq!(
        r.read(100, &[get(b"long"), get(b"absent")]),
        ReadResult::Reply(Reply::Array(vec![bulk(b"v"), Reply::Nil]))
    );
    assert_eq!(r.read(400, &[Op::Pttl { key: key(b"long") }]), ReadResult::Reply(Reply::Int(600)));
    // A scan skips what has expired by the estimate, a count does not.
    let scan = Op::Scan { db: 0, cursor: 0, count: 100, pattern: None };
    let mut found = Vec::new();
    let mut cursor = Some(0);
    while let Some(at) = cursor {
        let Op::Scan { db, count, pattern, .. } = scan else { panic!("a scan") };
        let ReadResult::Reply(Reply::Scan { next, keys }) = r.read(100, &[Op::Scan { db, cursor: at, count, pattern }])
        else {
            panic!("a step")
        };
        found.extend(keys);
        cursor = next;
    }
    assert_eq!(found, [&b"long"[..]]);
    assert_eq!(r.read(100, &[Op::DbSize { db: 0 }]), ReadResult::Reply(Reply::Int(2)));
    // After the advance it is settled, for every estimate.
    assert!(r.next(&encode_advance(LogTime(T + 100))).outcomes.is_empty());
    assert_eq!(r.read(0, &[get(b"short")]), ReadResult::Reply(Reply::Nil));
    assert_eq!(r.read(0, &[Op::Pttl { key: key(b"short") }]), ReadResult::Reply(Reply::Int(-2)));
    assert_eq!(r.read(0, &[Op::Pttl { key: key(b"long") }]), ReadResult::Reply(Reply::Int(900)));
}

#[test]
fn replies_of_a_request_have_a_bound() {
    let mut r = Rig::new();
    let large = vec![b'x'; MAX_VALUE_BYTES];
    r.set(b"k", &large, CLEAR);
    let get = Op::Get { key: key(b"k") };
    let error = Reply::Error(OpError::ReplyTooLarge);
    let fits = MAX_REPLY_BYTES / MAX_VALUE_BYTES;
    let ReadResult::Reply(Reply::Array(replies)) = r.read(0, &vec![get; fits + 2]) else { panic!("replies") };
    assert!(replies[..fits].iter().all(|r| matches!(r, Reply::Bulk(_))));
    assert_eq!(replies[fits..], [error.clone(), error.clone()]);
    // What would not fit is not executed either.
    let mut ops = vec![get; fits];
    ops.push(Op::GetDel { key: key(b"k") });
    ops.push(Op::Set { key: key(b"k"), value: b"v", cond: SetCond::Always, expire: CLEAR, get: true });
    ops.push(Op::GetEx { key: key(b"k"), expire: SetExpire::After(1) });
    ops.push(Op::Scan { db: 0, cursor: 0, count: 1, pattern: None });
    ops.push(Op::Strlen { key: key(b"k") });
    let Reply::Array(replies) = r.request_at(0, &ops) else { panic!("replies") };
    assert!(replies[fits..fits + 4].iter().all(|r| *r == error));
    assert_eq!(replies[fits + 4], Reply::Int(MAX_VALUE_BYTES as i64));
    assert_eq!(r.pttl(b"k"), -1);
}

#[test]
fn flush_clears_one_database_or_all() {
    let mut r = Rig::new();
    for db in 0..3u8 {
        let key = KeyRef::new(db, b"k").unwrap();
        r.op(Op::Set { key, value: b"v", cond: SetCond::Always, expire: CLEAR, get: false });
    }
    assert_eq!(r.op(Op::Flush { db: Some(1) }), Reply::Ok);
    let sizes = |r: &mut Rig| [0, 1, 2].map(|db| r.op(Op::DbSize { db }));
    assert_eq!(sizes(&mut r), [Reply::Int(1), Reply::Int(0), Reply::Int(1)]);
    let old = r.m.table().clone();
    assert_eq!(r.op(Op::Flush { db: None }), Reply::Ok);
    assert_eq!(sizes(&mut r), [Reply::Int(0), Reply::Int(0), Reply::Int(0)]);
    assert_eq!((old.keys(), r.m.keys(), r.m.bytes()), (2, 0, 0));
}

#[test]
fn a_corrupt_entry_changes_nothing() {
    let mut r = Rig::new();
    let mut b = EntryBuilder::new(LogTime(T + 50), 0);
    b.push(tag(6, 1, 0), &encode_ops(&[Op::IncrBy { key: key(b"n"), by: 1 }]).unwrap());
    b.push(tag(6, 2, 0), &encode_ops(&[Op::IncrBy { key: key(b"n"), by: 1 }]).unwrap());
    let good = b.finish();
    let before = (r.m.digest(), r.m.log_time(), r.m.applied());
    for end in 1..good.len() {
        let e = r.m.apply(LogIndex(7), &good[..end]).unwrap_err();
        assert_eq!(e.index, 7);
    }
    for index in [0, 5, 6, 8, u64::MAX] {
        assert!(r.m.apply(LogIndex(index), &good).is_err(), "entry {index} is not the next");
    }
    assert_eq!((r.m.digest(), r.m.log_time(), r.m.applied()), before);
    assert_eq!(r.m.apply(LogIndex(7), &good).unwrap().outcomes.len(), 2);
}

#[test]
fn digests_are_recorded_compared_and_proposed() {
    let mut r = Rig::new();
    r.set(b"k", b"v", CLEAR);
    while r.m.applied() < LogIndex(1023) {
        assert_eq!(r.m.digest_to_check(), None);
        r.next(&[]);
    }
    r.set(b"k", b"w", CLEAR);
    let recorded = r.m.digest();
    assert_eq!(r.m.digest_to_check(), Some((LogIndex(1024), recorded)));
    r.set(b"k", b"x", CLEAR);
    let time = LogTime(T);
    assert_eq!(r.next(&encode_check_digest(time, LogIndex(1000), 1)).digest_mismatch, None, "not recorded");
    assert_eq!(r.next(&encode_check_digest(time, LogIndex(u64::MAX), 1)).digest_mismatch, None);
    assert_eq!(r.m.digest_to_check(), Some((LogIndex(1024), recorded)), "the future covers nothing");
    assert_eq!(r.next(&encode_check_digest(time, LogIndex(1024), recorded)).digest_mismatch, None);
    assert_eq!(r.m.digest_to_check(), None);
    let applied = r.next(&encode_check_digest(time, LogIndex(1024), recorded ^ 1));
    assert_eq!((applied.digest_mismatch, applied.outcomes), (Some(LogIndex(1024)), vec![]));
    while r.m.applied() < LogIndex(1024 * 10) {
        r.next(&[]);
    }
    assert_eq!(r.m.digest_to_check().map(|d| d.0), Some(LogIndex(10_240)));
    assert_eq!(r.m.digests.len(), DIGESTS_KEPT);
    assert_eq!(r.next(&encode_check_digest(time, LogIndex(1024), 0)).digest_mismatch, None, "forgotten");
}

#[test]
fn the_digest_covers_time_sessions_and_epoch() {
    let digest = |f: &dyn Fn(&mut Rig)| {
        let mut r = Rig::new();
        f(&mut r);
        r.m.digest()
    };
    let plain = digest(&|_| {});
    assert_eq!(
        plain,
        digest(&|r| {
            r.next(&[]);
        })
    );
    assert_ne!(
        plain,
        digest(&|r| {
            r.next(&encode_advance(LogTime(T + 1)));
        })
    );
    assert_ne!(
        plain,
        digest(&|r| {
            r.next(&encode_open_session(LogTime(T), Incarnation(2)));
        })
    );
    assert_ne!(
        plain,
        digest(&|r| {
            r.get(b"absent");
        }),
        "the session's progress"
    );
    let other = StateMachine::new(ShardInit {
        range: ALL,
        epoch: Epoch(5),
        secret: 99,
        log_time: LogTime(T),
        applied: LogIndex(5),
    });
    assert_ne!(machine(ALL).digest(), other.digest());
}

// What follows compares with a second, simple-minded implementation.

type Stored = BTreeMap<(u8, Vec<u8>), (Vec<u8>, Option<i128>)>;

#[derive(Clone, Debug)]
enum Step {
    Op { op: Owned, wait: u64 },
    Advance(u64),
}

/// An operation that owns its payload, so that it can be generated.
#[derive(Clone, Debug)]
enum Owned {
    Get,
    Set(Vec<u8>, SetCond, SetExpire, bool),
    CompareAndSet(Option<Vec<u8>>, Vec<u8>, SetExpire),
    GetEx(SetExpire),
    GetDel,
    Del,
    Exists,
    IncrBy(i64),
    Append(Vec<u8>),
    Strlen,
    Expire(ExpireAt, ExpireCond),
    Persist,
    Pttl,
    Type,
    DbSize,
    Flush(bool),
}

const OFFSET: i64 = 1234;

fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => any::<i16>().prop_map(|n| n.to_string().into_bytes()),
        1 => Just(i64::MAX.to_string().into_bytes()),
        1 => "[a-z 0+-]{0,4}".prop_map(String::into_bytes),
    ]
}

fn set_expire() -> impl Strategy<Value = SetExpire> {
    prop_oneof![
        Just(SetExpire::Clear),
        Just(SetExpire::Keep),
        (1u64..60).prop_map(SetExpire::After),
        (0u64..200).prop_map(|d| SetExpire::At(WallTime((T as i64 + OFFSET) as u64 + d))),
        Just(SetExpire::After(u64::MAX)),
    ]
}

fn step() -> impl Strategy<Value = (u8, u8, Step)> {
    let cond = prop_oneof![Just(SetCond::Always), Just(SetCond::IfAbsent), Just(SetCond::IfPresent)];
    let when = prop_oneof![
        (-20i64..60).prop_map(ExpireAt::After),
        (-20i64..200).prop_map(|d| ExpireAt::At(T as i64 + OFFSET + d)),
        Just(ExpireAt::After(i64::MAX)),
    ];
    let expire_cond = prop_oneof![
        Just(ExpireCond::Always),
        Just(ExpireCond::IfNone),
        Just(ExpireCond::IfSome),
        Just(ExpireCond::IfGreater),
        Just(ExpireCond::IfLess),
    ];
    let op = prop_oneof![
        4 => Just(Owned::Get),
        8 => (value(), cond, set_expire(), any::<bool>()).prop_map(|(v, c, e, g)| Owned::Set(v, c, e, g)),
        4 => (proptest::option::of(value()), value(), set_expire()).prop_map(|(o, v, e)| Owned::CompareAndSet(o, v, e)),
        2 => set_expire().prop_map(Owned::GetEx),
        1 => Just(Owned::GetDel),
        1 => Just(Owned::Del),
        1 => Just(Owned::Exists),
        3 => any::<i8>().prop_map(|n| Owned::IncrBy(n.into())),
        2 => value().prop_map(Owned::Append),
        1 => Just(Owned::Strlen),
        4 => (when, expire_cond).prop_map(|(w, c)| Owned::Expire(w, c)),
        2 => Just(Owned::Persist),
        2 => Just(Owned::Pttl),
        1 => Just(Owned::Type),
        1 => Just(Owned::DbSize),
        1 => any::<bool>().prop_map(Owned::Flush),
    ];
    let step = prop_oneof![
        9 => (op, 0u64..8).prop_map(|(op, wait)| Step::Op { op, wait }),
        1 => (1u64..30).prop_map(Step::Advance),
    ];
    (0u8..4, 0u8..2, step)
}

fn borrow<'a>(op: &'a Owned, key: KeyRef<'a>) -> Op<'a> {
    match op {
        Owned::Get => Op::Get { key },
        Owned::Set(value, cond, expire, get) => Op::Set { key, value, cond: *cond, expire: *expire, get: *get },
        Owned::CompareAndSet(expected, value, expire) => {
            Op::CompareAndSet { key, expected: expected.as_deref(), value, expire: *expire }
        }
        Owned::GetEx(expire) => Op::GetEx { key, expire: *expire },
        Owned::GetDel => Op::GetDel { key },
        Owned::Del => Op::Del { key },
        Owned::Exists => Op::Exists { key },
        Owned::IncrBy(by) => Op::IncrBy { key, by: *by },
        Owned::Append(value) => Op::Append { key, value },
        Owned::Strlen => Op::Strlen { key },
        Owned::Expire(at, cond) => Op::Expire { key, at: *at, cond: *cond },
        Owned::Persist => Op::Persist { key },
        Owned::Pttl => Op::Pttl { key },
        Owned::Type => Op::Type { key },
        Owned::DbSize => Op::DbSize { db: key.db },
        Owned::Flush(all) => Op::Flush { db: (!all).then_some(key.db) },
    }
}

/// The meaning of an operation, said once more: expired keys really vanish, and nothing is incremental.
fn model(state: &mut Stored, now: u64, db: u8, name: &[u8], op: &Owned) -> Reply {
    let now = i128::from(now);
    state.retain(|_, (_, at)| at.is_none_or(|at| at > now));
    let id = (db, name.to_vec());
    let old = state.get(&id).cloned();
    let old_reply = old.as_ref().map_or(Reply::Nil, |(v, _)| bulk(v));
    // None: invalid. Some(None): for ever. Some(Some(at)): then.
    let target = |expire: SetExpire, keep: Option<i128>| {
        match expire {
            SetExpire::Clear => Some(None),
            SetExpire::Keep => Some(keep),
            SetExpire::After(ms) => Some(Some(now + i128::from(ms))),
            SetExpire::At(wall) => Some(Some(i128::from(wall.0) - i128::from(OFFSET))),
        }
        .filter(|at| at.is_none_or(|at| at <= i128::from(i64::MAX)))
    };
    let invalid = Reply::Error(OpError::InvalidExpire);
    match op {
        Owned::Get => old_reply,
        Owned::Set(value, cond, expire, get) => {
            let Some(at) = target(*expire, old.as_ref().and_then(|o| o.1)) else { return invalid };
            let allowed = *cond == SetCond::Always || (*cond == SetCond::IfPresent) == old.is_some();
            if allowed {
                state.insert(id, (value.clone(), at));
            }
            if *get {
                old_reply
            } else if allowed {
                Reply::Ok
            } else {
                Reply::Nil
            }
        }
        Owned::CompareAndSet(expected, value, expire) => {
            let Some(at) = target(*expire, old.as_ref().and_then(|o| o.1)) else { return invalid };
            let equal = old.map(|(v, _)| v) == *expected;
            if equal {
                state.insert(id, (value.clone(), at));
            }
            Reply::Int(i64::from(equal))
        }
        Owned::GetEx(expire) => {
            let Some((value, keep)) = old else { return Reply::Nil };
            let Some(at) = target(*expire, keep) else { return invalid };
            state.insert(id, (value, at));
            old_reply
        }
        Owned::GetDel => {
            state.remove(&id);
            old_reply
        }
        Owned::Del => Reply::Int(state.remove(&id).is_some().into()),
        Owned::Exists => Reply::Int(old.is_some().into()),
        Owned::IncrBy(by) => {
            let (text, at) = old.unwrap_or((b"0".to_vec(), None));
            let text = String::from_utf8(text).unwrap();
            let number = text.parse::<i64>().ok().filter(|n| n.to_string() == text);
            let Some(number) = number else { return Reply::Error(OpError::NotInteger) };
            let Some(sum) = number.checked_add(*by) else { return Reply::Error(OpError::Overflow) };
            state.insert(id, (sum.to_string().into_bytes(), at));
            Reply::Int(sum)
        }
        Owned::Append(tail) => {
            let (mut value, at) = old.unwrap_or_default();
            value.extend(tail);
            let len = value.len() as i64;
            state.insert(id, (value, at));
            Reply::Int(len)
        }
        Owned::Strlen => Reply::Int(old.map_or(0, |(v, _)| v.len() as i64)),
        Owned::Expire(at, cond) => {
            let at = match at {
                ExpireAt::After(ms) => now + i128::from(*ms),
                ExpireAt::At(wall) => i128::from(*wall) - i128::from(OFFSET),
            };
            if at > i128::from(i64::MAX) {
                return invalid;
            }
            let Some((value, present)) = old else { return Reply::Int(0) };
            let infinite = present.unwrap_or(i128::MAX);
            let allowed = match cond {
                ExpireCond::Always => true,
                ExpireCond::IfNone => present.is_none(),
                ExpireCond::IfSome => present.is_some(),
                ExpireCond::IfGreater => at > infinite,
                ExpireCond::IfLess => at < infinite,
            };
            if allowed {
                state.insert(id, (value, Some(at)));
            }
            Reply::Int(allowed.into())
        }
        Owned::Persist => match old {
            Some((value, Some(_))) => {
                state.insert(id, (value, None));
                Reply::Int(1)
            }
            _ => Reply::Int(0),
        },
        Owned::Pttl => Reply::Int(match old {
            None => -2,
            Some((_, None)) => -1,
            Some((_, Some(at))) => (at - now) as i64,
        }),
        Owned::Type => Reply::Type(if old.is_some() { ValueType::String } else { ValueType::None }),
        // Counts expired keys that are still there: compared with a lower bound below.
        Owned::DbSize => Reply::Int(state.keys().filter(|k| k.0 == db).count() as i64),
        Owned::Flush(all) => {
            state.retain(|k, _| !all && k.0 != db);
            Reply::Ok
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn agrees_with_a_simple_model_and_with_a_second_replica(steps in proptest::collection::vec(step(), 1..120)) {
        let mut r = Rig::new();
        r.wall_offset = OFFSET;
        let mut twin = Rig::new().m;
        let (mut state, mut time) = (Stored::new(), 0);
        let names = [&b"a"[..], b"{a}b", b"", b"other"];
        for (name, db, step) in steps {
            let name = names[usize::from(name)];
            match step {
                Step::Advance(ms) => {
                    time += ms;
                    let entry = encode_advance(LogTime(T + time));
                    twin.apply(LogIndex(r.m.applied().0 + 1), &entry).unwrap();
                    r.next(&entry);
                }
                Step::Op { op, wait } => {
                    time += wait;
                    let key = KeyRef::new(db, name).unwrap();
                    let bytes = encode_ops(&[borrow(&op, key)]).unwrap();
                    // A read of the applied state at a later estimate tells the truth, or asks for an advance.
                    let write = borrow(&op, key).is_write();
                    let early = (!write).then(|| r.m.read(&bytes, LogTime(T + time)));
                    r.seq += 1;
                    let mut b = EntryBuilder::new(LogTime(T + time), OFFSET);
                    b.push(tag(6, r.seq, r.seq - 1), &bytes);
                    let entry = b.finish();
                    let applied = r.next(&entry);
                    prop_assert_eq!(&twin.apply(r.m.applied(), &entry).unwrap(), &applied);
                    let expected = model(&mut state, T + time, db, name, &op);
                    // What was given a past expiry is gone at once.
                    state.retain(|_, (_, at)| at.is_none_or(|at| at > i128::from(T + time)));
                    let [Outcome::Reply(reply)] = &applied.outcomes[..] else { panic!("one reply") };
                    if let Owned::DbSize = op {
                        let (Reply::Int(found), Reply::Int(live)) = (reply, &expected) else { panic!("numbers") };
                        prop_assert!(found >= live);
                    } else {
                        prop_assert_eq!(reply, &expected, "{:?} at {}", op, time);
                        if let Some(ReadResult::Reply(early)) = early {
                            prop_assert_eq!(&early, &expected);
                        }
                    }
                }
            }
            prop_assert_eq!(twin.digest(), r.m.digest());
            prop_assert!(r.m.keys() >= state.len() as u64);
        }
        // In the end exactly the live keys are found, by every way there is.
        state.retain(|_, (_, at)| at.is_none_or(|at| at > i128::from(T + time)));
        for db in 0..2 {
            let (mut found, mut cursor) = (Vec::new(), Some(0));
            while let Some(at) = cursor {
                let step = r.m.table().scan(at, ScanQuery { db, count: 1, now: T + time, pattern: None });
                found.extend(step.keys.iter().map(|k| k.to_vec()));
                cursor = step.next;
            }
            found.sort();
            let live: Vec<_> = state.keys().filter(|k| k.0 == db).map(|k| k.1.clone()).collect();
            prop_assert_eq!(found, live);
        }
    }
}
