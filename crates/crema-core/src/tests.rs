//! Tests across the modules: entries in, outcomes and digests out.

use crate::codec::decode_outcome;
use crate::op::{ExpireAt, f64Bits};
use crate::reply::ValueType;
use crate::store::SCAN_SLOT_SHIFT;
use crate::*;
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const ALL: SlotRange = SlotRange { start: 0, end: SLOT_COUNT };
const T0: u64 = 1_000_000;

/// A shard with one session, fed one request an entry.
struct Shard {
    m: StateMachine,
    now: u64,
    wall_offset: i64,
    session: SessionId,
    seq: u64,
}

impl Shard {
    fn new(range: SlotRange) -> Self {
        let init = ShardInit { range, epoch: Epoch(7), secret: 42, log_time: LogTime(T0), applied: LogIndex(1) };
        let mut s = Shard { m: StateMachine::new(init), now: T0, wall_offset: 0, session: SessionId(0), seq: 0 };
        s.session = s.open(1);
        s
    }
    fn apply(&mut self, payload: &[u8]) -> Vec<Outcome> {
        let index = LogIndex(self.m.applied().0 + 1);
        let applied = self.m.apply(index, payload).expect("a sound entry");
        assert_eq!(applied.digest_mismatch, None);
        applied.outcomes
    }
    fn open(&mut self, gateway: u128) -> SessionId {
        match self.apply(&encode_open_session(LogTime(self.now), Incarnation(gateway)))[..] {
            [Outcome::Reply(Reply::Int(id))] => SessionId(id as u64),
            ref other => panic!("{other:?}"),
        }
    }
    fn send(&mut self, session: SessionId, seq: u64, low: u64, ops: &[Op<'_>]) -> Outcome {
        let mut b = EntryBuilder::new(LogTime(self.now), self.wall_offset);
        b.push(SessionTag { session, seq: Seq(seq), low: Seq(low) }, &encode_ops(ops).expect("valid operations"));
        self.apply(&b.finish()).pop().expect("one outcome a request")
    }
    fn all(&mut self, ops: &[Op<'_>]) -> Reply {
        self.seq += 1;
        match self.send(self.session, self.seq, self.seq - 1, ops) {
            Outcome::Reply(r) => r,
            other => panic!("{other:?}"),
        }
    }
    fn one(&mut self, op: Op<'_>) -> Reply {
        self.all(&[op])
    }
    fn read(&self, op: Op<'_>) -> ReadResult {
        self.m.read(&encode_ops(&[op]).expect("valid operations"), LogTime(self.now))
    }
    fn get(&mut self, k: &str) -> Reply {
        self.one(Op::Get { key: key(k) })
    }
}

fn key(k: &str) -> KeyRef<'_> {
    KeyRef::new(0, k.as_bytes()).expect("a short key")
}
fn set(k: &'static str, v: &'static str) -> Op<'static> {
    set_with(k, v, SetCond::Always, SetExpire::Clear, false)
}
fn set_with(k: &'static str, v: &'static str, cond: SetCond, expire: SetExpire, get: bool) -> Op<'static> {
    Op::Set { key: key(k), value: v.as_bytes(), cond, expire, get }
}
fn bulk(v: &str) -> Reply {
    Reply::Bulk(Bytes::copy_from_slice(v.as_bytes()))
}
fn incr(k: &str, by: i64) -> Op<'_> {
    Op::IncrBy { key: key(k), by }
}

#[test]
fn set_conditions_and_the_old_value() {
    let mut s = Shard::new(ALL);
    assert_eq!(s.one(set_with("k", "a", SetCond::IfPresent, SetExpire::Clear, false)), Reply::Nil);
    assert_eq!(s.one(set_with("k", "a", SetCond::IfAbsent, SetExpire::Clear, true)), Reply::Nil);
    assert_eq!(s.get("k"), bulk("a"), "NX with GET answers nil and sets");
    assert_eq!(s.one(set_with("k", "b", SetCond::IfAbsent, SetExpire::Clear, true)), bulk("a"));
    assert_eq!(s.get("k"), bulk("a"), "NX with GET answers the old value and sets nothing");
    assert_eq!(s.one(set_with("k", "c", SetCond::IfPresent, SetExpire::Clear, true)), bulk("a"));
    assert_eq!(s.one(Op::GetDel { key: key("k") }), bulk("c"));
    assert_eq!(s.get("k"), Reply::Nil);
}

#[test]
fn expiry_follows_log_time_only() {
    let mut s = Shard::new(ALL);
    s.one(set_with("k", "v", SetCond::Always, SetExpire::After(100), false));
    assert_eq!(s.read(Op::Pttl { key: key("k") }), ReadResult::Reply(Reply::Int(100)));
    s.now += 99;
    assert_eq!(s.get("k"), bulk("v"));
    s.now += 1;
    assert_eq!(s.read(Op::Get { key: key("k") }), ReadResult::NeedsAdvance, "log time has not got there");
    assert_eq!(s.m.keys(), 1);
    s.apply(&encode_advance(LogTime(s.now)));
    assert_eq!(s.read(Op::Get { key: key("k") }), ReadResult::Reply(Reply::Nil));
    // A leader with a slower clock takes over: its earlier stamp revives nothing.
    s.now -= 60;
    assert_eq!(s.get("k"), Reply::Nil);
    assert_eq!(s.m.log_time(), LogTime(T0 + 100));
    assert_eq!(s.one(set_with("k", "w", SetCond::IfPresent, SetExpire::Clear, false)), Reply::Nil);
    assert_eq!(s.one(set_with("k", "w", SetCond::IfAbsent, SetExpire::Keep, false)), Reply::Ok);
    assert_eq!(s.one(Op::Pttl { key: key("k") }), Reply::Int(-1), "an expired expiry is not kept");
}

#[test]
fn wall_points_become_log_points_by_the_stamped_offset() {
    let mut s = Shard::new(ALL);
    // The wall clock runs 5 s ahead of log time.
    s.wall_offset = 5_000;
    s.one(set_with("k", "v", SetCond::Always, SetExpire::At(WallTime(T0 + 5_000 + 300)), false));
    assert_eq!(s.one(Op::Pttl { key: key("k") }), Reply::Int(300));
    assert_eq!(s.one(set_with("k", "v", SetCond::Always, SetExpire::At(WallTime(T0)), false)), Reply::Ok);
    assert_eq!(s.get("k"), Reply::Nil, "a past point sets nothing that could be seen");
    assert_eq!(s.m.keys(), 0);
}

#[test]
fn expire_and_its_conditions() {
    let mut s = Shard::new(ALL);
    let expire = |ms, cond| Op::Expire { key: key("k"), at: ExpireAt::After(ms), cond };
    assert_eq!(s.one(expire(100, ExpireCond::Always)), Reply::Int(0), "no such key");
    s.one(set("k", "v"));
    for (ms, cond, took, left) in [
        (100, ExpireCond::IfSome, 0, -1),
        (100, ExpireCond::IfGreater, 0, -1),
        (100, ExpireCond::IfLess, 1, 100),
        (200, ExpireCond::IfNone, 0, 100),
        (50, ExpireCond::IfGreater, 0, 100),
        (200, ExpireCond::IfGreater, 1, 200),
        (300, ExpireCond::IfLess, 0, 200),
        (300, ExpireCond::IfSome, 1, 300),
    ] {
        assert_eq!(s.one(expire(ms, cond)), Reply::Int(took), "{ms} {cond:?}");
        assert_eq!(s.one(Op::Pttl { key: key("k") }), Reply::Int(left), "{ms} {cond:?}");
    }
    assert_eq!(s.one(Op::Persist { key: key("k") }), Reply::Int(1));
    assert_eq!(s.one(Op::Persist { key: key("k") }), Reply::Int(0));
    assert_eq!(s.one(expire(i64::MAX, ExpireCond::Always)), Reply::Error(OpError::InvalidExpire));
    assert_eq!(s.one(expire(-1, ExpireCond::Always)), Reply::Int(1));
    assert_eq!(s.one(Op::Exists { key: key("k") }), Reply::Int(0), "a past point deletes");
}

#[test]
fn getex_changes_only_the_expiry() {
    let mut s = Shard::new(ALL);
    let getex = |expire| Op::GetEx { key: key("k"), expire };
    assert_eq!(s.one(getex(SetExpire::After(5))), Reply::Nil);
    s.one(set("k", "v"));
    assert_eq!(s.one(getex(SetExpire::After(500))), bulk("v"));
    assert_eq!(s.one(getex(SetExpire::Keep)), bulk("v"));
    assert_eq!(s.one(Op::Pttl { key: key("k") }), Reply::Int(500));
    assert_eq!(s.one(getex(SetExpire::Clear)), bulk("v"));
    assert_eq!(s.one(Op::Pttl { key: key("k") }), Reply::Int(-1));
}

#[test]
fn counters_are_strict_about_numbers() {
    let mut s = Shard::new(ALL);
    assert_eq!(s.one(incr("n", 5)), Reply::Int(5));
    assert_eq!(s.one(incr("n", -7)), Reply::Int(-2));
    for bad in ["", "+1", " 1", "1 ", "01", "-0", "1.0", "9223372036854775808", "x"] {
        let op = Op::Set {
            key: key("b"),
            value: bad.as_bytes(),
            cond: SetCond::Always,
            expire: SetExpire::Clear,
            get: false,
        };
        s.one(op);
        assert_eq!(s.one(incr("b", 1)), Reply::Error(OpError::NotInteger), "{bad:?}");
        assert_eq!(s.get("b"), bulk(bad), "an error changes nothing");
    }
    s.one(set("n", "9223372036854775807"));
    assert_eq!(s.one(incr("n", 1)), Reply::Error(OpError::Overflow));
    s.one(set_with("n", "1", SetCond::Always, SetExpire::After(100), false));
    s.one(incr("n", 1));
    assert_eq!(s.one(Op::Pttl { key: key("n") }), Reply::Int(100), "counting keeps the expiry");
    let float = |by: f64| Op::IncrByFloat { key: key("f"), by: f64Bits::from(by) };
    assert_eq!(s.one(float(10.5)), bulk("10.5"));
    assert_eq!(s.one(float(0.1)), bulk("10.6"));
    assert_eq!(s.one(float(-10.6)), bulk("0"));
    s.one(set("f", "5.0e3"));
    assert_eq!(s.one(float(200.0)), bulk("5200"));
    s.one(set("f", "1e308"));
    assert_eq!(s.one(float(1.7e308)), Reply::Error(OpError::NotFinite));
    s.one(set("f", "abc"));
    assert_eq!(s.one(float(1.0)), Reply::Error(OpError::NotFloat));
}

#[test]
fn append_and_length() {
    let mut s = Shard::new(ALL);
    let append = |v: &'static str| Op::Append { key: key("k"), value: v.as_bytes() };
    assert_eq!(s.one(append("ab")), Reply::Int(2));
    assert_eq!(s.one(append("cd")), Reply::Int(4));
    assert_eq!(s.get("k"), bulk("abcd"));
    assert_eq!(s.one(Op::Strlen { key: key("k") }), Reply::Int(4));
    let big = vec![b'x'; limits::MAX_VALUE_BYTES];
    let op = Op::Append { key: key("k"), value: &big };
    assert_eq!(s.one(op), Reply::Error(OpError::TooLong));
    assert_eq!(s.one(Op::Type { key: key("k") }), Reply::Type(ValueType::String));
    assert_eq!(s.one(Op::Type { key: key("none") }), Reply::Type(ValueType::None));
}

#[test]
fn databases_are_apart_and_flushed_apart() {
    let mut s = Shard::new(ALL);
    let other = KeyRef::new(3, b"k").expect("a short key");
    s.one(set("k", "zero"));
    s.one(Op::Set { key: other, value: b"three", cond: SetCond::Always, expire: SetExpire::Clear, get: false });
    assert_eq!(s.get("k"), bulk("zero"));
    assert_eq!(s.one(Op::Get { key: other }), bulk("three"));
    s.one(Op::Flush { db: Some(0) });
    assert_eq!(
        (s.get("k"), s.one(Op::DbSize { db: 0 }), s.one(Op::DbSize { db: 3 })),
        (Reply::Nil, Reply::Int(0), Reply::Int(1))
    );
    s.one(Op::Flush { db: None });
    assert_eq!((s.m.keys(), s.m.bytes()), (0, 0));
}

#[test]
fn a_foreign_slot_is_refused_and_the_whole_request_with_it() {
    let slot = slot_of(b"k").0;
    let mut s = Shard::new(SlotRange { start: slot, end: slot + 1 });
    let refusal = Reply::Error(OpError::WrongSlot { epoch: Epoch(7) });
    assert_eq!(s.all(&[set("k", "v"), set("elsewhere", "v")]), refusal);
    assert_eq!(s.get("k"), Reply::Nil, "nothing of it happened");
    assert_eq!(s.read(Op::Get { key: key("elsewhere") }), ReadResult::Reply(refusal));
}

#[test]
fn a_retried_write_is_executed_once_and_in_order() {
    let mut s = Shard::new(ALL);
    let id = s.open(9);
    let int = |i| Outcome::Reply(Reply::Int(i));
    assert_eq!(s.send(id, 1, 0, &[incr("n", 1)]), int(1));
    assert_eq!(s.send(id, 1, 0, &[incr("n", 1)]), int(1), "a copy gets the first answer");
    assert_eq!(s.send(id, 3, 0, &[incr("n", 1)]), Outcome::Gap, "two is missing");
    assert_eq!(s.send(id, 2, 0, &[incr("n", 10)]), int(11));
    assert_eq!(s.send(id, 3, 0, &[incr("n", 1)]), int(12));
    assert_eq!(s.send(id, 5, 4, &[incr("n", 1)]), int(13), "four was given up");
    assert_eq!(s.send(id, 4, 0, &[incr("n", 1)]), Outcome::Unknown, "and never happens any more");
    assert_eq!(s.send(id, 3, 0, &[incr("n", 1)]), Outcome::Unknown, "below the watermark");
    // Errors are answers too.
    s.one(set("x", "x"));
    let error = Outcome::Reply(Reply::Error(OpError::NotInteger));
    assert_eq!(s.send(id, 6, 5, &[incr("x", 1)]), error);
    s.one(set("x", "1"));
    assert_eq!(s.send(id, 6, 5, &[incr("x", 1)]), error);
    // A new session of the same gateway ends the old one.
    let newer = s.open(9);
    assert_eq!(s.send(id, 7, 6, &[incr("n", 1)]), Outcome::NoSession);
    assert_eq!(s.send(newer, 1, 0, &[incr("n", 1)]), int(14));
    assert_eq!(s.get("n"), bulk("14"));
}

#[test]
fn answers_too_large_to_keep_are_unknown_not_repeated() {
    let mut s = Shard::new(ALL);
    let id = s.open(9);
    let big = vec![b'x'; limits::SESSION_REPLY_BYTES];
    let value = Op::Set { key: key("k"), value: &big, cond: SetCond::Always, expire: SetExpire::Clear, get: false };
    assert_eq!(s.send(id, 1, 0, &[value]), Outcome::Reply(Reply::Ok));
    let take = [Op::GetDel { key: key("k") }];
    assert!(matches!(s.send(id, 2, 0, &take), Outcome::Reply(Reply::Bulk(_))));
    assert_eq!(s.send(id, 2, 0, &take), Outcome::Unknown);
    assert_eq!(s.send(id, 1, 0, &[value]), Outcome::Reply(Reply::Ok), "small answers before it are still known");
}

#[test]
fn sessions_are_bounded_and_the_least_recently_used_goes() {
    let mut s = Shard::new(ALL);
    let kept = s.open(1_000_000);
    let idle = s.open(1_000_001);
    for g in 0..limits::MAX_SESSIONS as u128 - 1 {
        s.send(kept, 1, 0, &[incr("n", 1)]);
        s.open(2_000_000 + g);
    }
    assert_eq!(s.m.sessions(), limits::MAX_SESSIONS);
    assert_eq!(s.send(kept, 2, 1, &[incr("n", 1)]), Outcome::Reply(Reply::Int(2)));
    assert_eq!(s.send(idle, 1, 0, &[incr("n", 1)]), Outcome::NoSession);
}

#[test]
fn entries_must_follow_each_other_and_decode() {
    let mut s = Shard::new(ALL);
    let next = s.m.applied().0 + 1;
    assert!(s.m.apply(LogIndex(next + 1), &[]).is_err(), "a hole");
    assert!(s.m.apply(LogIndex(next), &[9, 9, 9]).is_err(), "an unknown version is never skipped");
    assert!(s.m.apply(LogIndex(next), &[]).is_ok(), "Raft's own entry");
    assert_eq!(s.m.applied(), LogIndex(next));
}

#[test]
fn a_differing_digest_is_noticed() {
    let mut a = Shard::new(ALL);
    let mut b = Shard::new(ALL);
    a.one(set("k", "same"));
    b.one(set("k", "diff"));
    while a.m.applied().0 < 1024 {
        a.apply(&[]);
        b.apply(&[]);
    }
    let (index, digest) = a.m.digest_to_check().expect("recorded at 1024");
    assert_eq!(index, LogIndex(1024));
    let check = encode_check_digest(LogTime(T0), index, digest);
    a.apply(&check);
    assert_eq!(a.m.digest_to_check(), None, "checked");
    let mismatch = b.m.apply(LogIndex(1025), &check).expect("a sound entry").digest_mismatch;
    assert_eq!(mismatch, Some(index));
}

#[test]
fn a_scan_returns_everything_that_stays_while_segments_split() {
    let mut s = Shard::new(ALL);
    // One slot, so that it must split; more keys come in between the steps.
    let names: Vec<String> = (0..5000).map(|i| format!("{{tag}}{i}")).collect();
    let put = |s: &mut Shard, names: &[String]| {
        for chunk in names.chunks(500) {
            let ops: Vec<Op<'_>> = chunk
                .iter()
                .map(|n| Op::Set {
                    key: key(n),
                    value: b"v",
                    cond: SetCond::Always,
                    expire: SetExpire::Clear,
                    get: false,
                })
                .collect();
            s.all(&ops);
        }
    };
    put(&mut s, &names[..2500]);
    let mut seen = BTreeSet::new();
    let mut cursor = 0;
    let mut steps = 0;
    loop {
        let op = Op::Scan { db: 0, cursor, count: 100, pattern: None };
        let ReadResult::Reply(Reply::Scan { next, keys }) = s.read(op) else { panic!("a scan") };
        assert!(keys.len() <= 110, "{} keys in a step of 100", keys.len());
        seen.extend(keys);
        steps += 1;
        if steps == 3 {
            put(&mut s, &names[2500..]);
        }
        match next {
            Some(n) => {
                assert!(n > cursor, "always forward");
                cursor = n;
            }
            None => break,
        }
    }
    assert!(names[..2500].iter().all(|n| seen.contains(n.as_bytes())));
    let pattern = Some(&b"*9?"[..]);
    let slot = u64::from(slot_of(b"{tag}").0) << SCAN_SLOT_SHIFT;
    let ReadResult::Reply(Reply::Scan { keys, .. }) = s.read(Op::Scan { db: 0, cursor: slot, count: 10_000, pattern })
    else {
        panic!("a scan")
    };
    assert_eq!(keys.len(), 500, "matching keys only");
}

#[test]
fn every_scan_cursor_is_exact_in_a_double() {
    // Clients in JavaScript hold cursors in doubles; one rounded up would skip a key.
    let largest = u64::from(SLOT_COUNT) << SCAN_SLOT_SHIFT;
    assert!(largest <= 1 << f64::MANTISSA_DIGITS, "{largest:#x}");
}

#[test]
fn globs_match_as_redis_does() {
    for (pattern, text, hit) in [
        ("*", "", true),
        ("", "", true),
        ("", "a", false),
        ("a*c", "abbbc", true),
        ("a*c", "abbbd", false),
        ("h?llo", "hello", true),
        ("h?llo", "hllo", false),
        ("h[ae]llo", "hallo", true),
        ("h[^e]llo", "hello", false),
        ("h[a-c]llo", "hbllo", true),
        ("h[c-a]llo", "hbllo", true),
        ("a\\*b", "a*b", true),
        ("a\\*b", "axb", false),
        ("[\\]]", "]", true),
        ("[abc", "b", true),
        ("**a**", "xxaxx", true),
        ("*a*a*a*a*a*a*a*a*b", &"a".repeat(200), false),
    ] {
        assert_eq!(glob::glob_match(pattern.as_bytes(), text.as_bytes()), hit, "{pattern:?} {text:?}");
    }
}

#[test]
fn ill_formed_operations_are_refused_before_they_are_proposed() {
    let k = key("k");
    let set = |expire| Op::Set { key: k, value: b"v", cond: SetCond::Always, expire, get: false };
    for bad in [
        set(SetExpire::After(0)),
        Op::Get { key: KeyRef { slot: Slot(k.slot.0 ^ 1), ..k } },
        Op::Get { key: KeyRef { db: 16, ..k } },
        Op::Scan { db: 0, cursor: 0, count: 0, pattern: None },
        Op::IncrByFloat { key: k, by: f64::NAN.into() },
        Op::DbSize { db: 99 },
    ] {
        assert_eq!(encode_ops(&[bad]), Err(CodecError::Malformed), "{bad:?}");
    }
    let long = vec![b'k'; limits::MAX_KEY_BYTES + 1];
    assert_eq!(KeyRef::new(0, &long), None);
    let value = vec![0; limits::MAX_VALUE_BYTES + 1];
    let op = Op::Append { key: k, value: &value };
    assert_eq!(encode_ops(&[op]), Err(CodecError::TooLarge));
    assert_eq!(encode_ops(&[]), Err(CodecError::Malformed));
}

#[test]
fn cut_and_flipped_entries_never_panic() {
    let mut b = EntryBuilder::new(LogTime(T0), -3);
    for i in 0..3 {
        let tag = SessionTag { session: SessionId(2), seq: Seq(i + 1), low: Seq(0) };
        b.push(tag, &encode_ops(&[set("k", "value"), incr("n", 1)]).expect("valid"));
    }
    let payload = b.finish();
    for cut in 0..payload.len() {
        let mut s = Shard::new(ALL);
        let next = LogIndex(s.m.applied().0 + 1);
        let _ = s.m.apply(next, &payload[..cut]);
        let _ = decode_outcome(&payload.slice(..cut));
        for bit in 0..8 {
            let mut bad = payload.to_vec();
            bad[cut] ^= 1 << bit;
            let mut s = Shard::new(ALL);
            let _ = s.m.apply(next, &bad);
            let _ = decode_outcome(&bad.into());
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Set(u8, u8, Option<u16>),
    Del(u8),
    Incr(u8, i8),
    Append(u8, u8),
    Expire(u8, u16),
    Get(u8),
    Wait(u16),
    Flush,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6u8, any::<u8>(), proptest::option::of(1..500u16)).prop_map(|(k, v, e)| Step::Set(k, v, e)),
        2 => (0..6u8).prop_map(Step::Del),
        3 => (0..6u8, any::<i8>()).prop_map(|(k, v)| Step::Incr(k, v)),
        2 => (0..6u8, any::<u8>()).prop_map(|(k, v)| Step::Append(k, v)),
        2 => (0..6u8, 0..500u16).prop_map(|(k, e)| Step::Expire(k, e)),
        4 => (0..6u8).prop_map(Step::Get),
        3 => (0..300u16).prop_map(Step::Wait),
        1 => Just(Step::Flush),
    ]
}

proptest! {
    /// Against a map with deadlines; and two replicas fed the same entries are the same after each.
    #[test]
    fn random_sequences_agree_with_a_model_and_between_replicas(steps in proptest::collection::vec(step(), 1..200)) {
        let mut a = Shard::new(ALL);
        let mut b = Shard::new(ALL);
        let mut model: BTreeMap<u8, (Vec<u8>, Option<u64>)> = BTreeMap::new();
        for s in steps {
            let now = a.now;
            model.retain(|_, (_, at)| at.is_none_or(|at| at > now));
            let name = |k: u8| format!("key{k}");
            let mut run = |f: &dyn Fn(&mut Shard) -> Reply| {
                let r = f(&mut a);
                assert_eq!(f(&mut b), r);
                assert_eq!(a.m.digest(), b.m.digest());
                r
            };
            match s {
                Step::Set(k, v, e) => {
                    let (n, v) = (name(k), v.to_string());
                    let expire = e.map_or(SetExpire::Clear, |e| SetExpire::After(e.into()));
                    let r = run(&|s| s.one(Op::Set { key: key(&n), value: v.as_bytes(), cond: SetCond::Always, expire, get: false }));
                    prop_assert_eq!(r, Reply::Ok);
                    model.insert(k, (v.into_bytes(), e.map(|e| now + u64::from(e))));
                }
                Step::Del(k) => {
                    let n = name(k);
                    let r = run(&|s| s.one(Op::Del { key: key(&n) }));
                    prop_assert_eq!(r, Reply::Int(i64::from(model.remove(&k).is_some())));
                }
                Step::Incr(k, by) => {
                    let n = name(k);
                    let r = run(&|s| s.one(incr(&n, by.into())));
                    let entry = model.entry(k).or_insert((b"0".to_vec(), None));
                    let text = String::from_utf8_lossy(&entry.0).into_owned();
                    match text.parse::<i64>().ok().filter(|i| i.to_string() == text) {
                        Some(old) => {
                            prop_assert_eq!(r, Reply::Int(old + i64::from(by)));
                            entry.0 = (old + i64::from(by)).to_string().into_bytes();
                        }
                        None => prop_assert_eq!(r, Reply::Error(OpError::NotInteger)),
                    }
                }
                Step::Append(k, v) => {
                    let (n, v) = (name(k), v.to_string());
                    let r = run(&|s| s.one(Op::Append { key: key(&n), value: v.as_bytes() }));
                    let entry = model.entry(k).or_default();
                    entry.0.extend(v.bytes());
                    prop_assert_eq!(r, Reply::Int(entry.0.len() as i64));
                }
                Step::Expire(k, ms) => {
                    let n = name(k);
                    let r = run(&|s| s.one(Op::Expire { key: key(&n), at: ExpireAt::After(ms.into()), cond: ExpireCond::Always }));
                    prop_assert_eq!(r, Reply::Int(i64::from(model.contains_key(&k))));
                    if let Some(e) = model.get_mut(&k) {
                        e.1 = Some(now + u64::from(ms));
                    }
                }
                Step::Get(k) => {
                    let n = name(k);
                    let r = run(&|s| s.one(Op::Get { key: key(&n) }));
                    prop_assert_eq!(r, model.get(&k).map_or(Reply::Nil, |(v, _)| Reply::Bulk(v.clone().into())));
                }
                Step::Wait(ms) => {
                    a.now += u64::from(ms);
                    b.now = a.now;
                }
                Step::Flush => {
                    run(&|s| s.one(Op::Flush { db: None }));
                    model.clear();
                }
            }
        }
    }
}
