//! From the arguments of a data command to operations: options, numbers and expiries as Redis 7 reads them.
//!
//! Pure, and without a copy: the operations borrow keys and values from the arguments. What depends on stored state is
//! decided by the shard; everything that can be refused by looking at the command is refused here.

use crate::resp::command::{Cmd, Spec};
use crate::resp::decode::{Args, parse_i64};
use crema_core::limits::{MAX_KEY_BYTES, MAX_VALUE_BYTES};
use crema_core::op::ExpireAt;
use crema_core::{ExpireCond, KeyRef, Op, SetCond, SetExpire, WallTime};
use std::borrow::Cow;

/// How a command words the answer to its one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fmt {
    /// As it is.
    Plain,
    /// 1 for done, 0 for a condition that did not hold.
    OneIfDone,
    /// Milliseconds as seconds.
    Seconds,
    /// A cursor and keys.
    Scan {
        /// The cursor to answer once the shard is finished: where the next shard begins, 0 after the last one.
        then: u64,
    },
}

/// How a command combines the answers to its operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Combine {
    /// The sum of numbers.
    Sum,
    /// All, in the order of the command.
    List,
    /// OK if all are done.
    AllOk,
}

/// The operations of one command.
#[derive(Clone, Debug, PartialEq)]
pub enum Built<'a> {
    /// One.
    One(Op<'a>, Fmt),
    /// One a key, in the order of the command; at least one.
    Many(Vec<Op<'a>>, Combine),
}

/// Why a command is refused: the error's text without its leading `ERR`.
pub type Refused = Cow<'static, str>;

const SYNTAX: Refused = Cow::Borrowed("syntax error");
const NOT_INTEGER: Refused = Cow::Borrowed("value is not an integer or out of range");

fn invalid_expire(spec: &Spec) -> Refused {
    format!("invalid expire time in '{}' command", spec.name).into()
}

fn key(db: u8, bytes: &[u8]) -> Result<KeyRef<'_>, Refused> {
    KeyRef::new(db, bytes).ok_or_else(|| format!("key is longer than {MAX_KEY_BYTES} bytes").into())
}

fn value(bytes: &[u8]) -> Result<&[u8], Refused> {
    if bytes.len() <= MAX_VALUE_BYTES { Ok(bytes) } else { Err("string exceeds maximum allowed size".into()) }
}

/// A 64-bit integer, or the error that Redis answers.
pub fn integer(bytes: &[u8]) -> Result<i64, Refused> {
    parse_i64(bytes).ok_or(NOT_INTEGER)
}

/// A finite number. Hexadecimal notation, which Redis takes, is not a valid float here.
fn float(bytes: &[u8]) -> Result<f64, Refused> {
    let text = std::str::from_utf8(bytes).ok();
    let number = text.and_then(|t| t.parse::<f64>().ok()).filter(|n| !n.is_nan());
    match number {
        None => Err("value is not a valid float".into()),
        // Nothing that is added to it would be a number.
        Some(n) if n.is_infinite() => Err("increment would produce NaN or Infinity".into()),
        Some(n) => Ok(n),
    }
}

fn is(arg: &[u8], word: &str) -> bool {
    arg.eq_ignore_ascii_case(word.as_bytes())
}

/// Unit and kind of an expiry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timing {
    Seconds,
    Millis,
    SecondsAt,
    MillisAt,
}

impl Timing {
    fn of_option(arg: &[u8]) -> Option<Timing> {
        let options =
            [("ex", Timing::Seconds), ("px", Timing::Millis), ("exat", Timing::SecondsAt), ("pxat", Timing::MillisAt)];
        options.into_iter().find(|(word, _)| is(arg, word)).map(|(_, timing)| timing)
    }

    fn in_seconds(self) -> bool {
        matches!(self, Timing::Seconds | Timing::SecondsAt)
    }

    fn is_relative(self) -> bool {
        matches!(self, Timing::Seconds | Timing::Millis)
    }

    /// The expiry of a value that is set: must lie above zero, and within the range of time.
    fn of_value(self, arg: &[u8], now: WallTime, spec: &Spec) -> Result<SetExpire, Refused> {
        let given = integer(arg)?;
        let ms = if self.in_seconds() { given.checked_mul(1000) } else { Some(given) };
        let ms = ms.filter(|ms| *ms > 0).ok_or_else(|| invalid_expire(spec))?;
        if !self.is_relative() {
            return Ok(SetExpire::At(WallTime(ms as u64)));
        }
        let fits = i64::try_from(now.0).is_ok_and(|now| ms.checked_add(now).is_some());
        if fits { Ok(SetExpire::After(ms as u64)) } else { Err(invalid_expire(spec)) }
    }

    /// The expiry that EXPIRE and its relatives give a key: may lie in the past.
    fn of_key(self, arg: &[u8], now: WallTime, spec: &Spec) -> Result<ExpireAt, Refused> {
        let given = integer(arg)?;
        let ms = if self.in_seconds() { given.checked_mul(1000) } else { Some(given) };
        let ms = ms.ok_or_else(|| invalid_expire(spec))?;
        if !self.is_relative() {
            return Ok(ExpireAt::At(ms));
        }
        let fits = i64::try_from(now.0).is_ok_and(|now| ms.checked_add(now).is_some());
        if fits { Ok(ExpireAt::After(ms)) } else { Err(invalid_expire(spec)) }
    }
}

/// The operations of a data command in database `db`; `None` for commands of any other kind. The number of arguments
/// fits. `now` is only compared with, to refuse expiries beyond the range of time.
pub fn build<'a>(spec: &Spec, args: Args<'a>, db: u8, now: WallTime) -> Result<Option<Built<'a>>, Refused> {
    // In the order of the arguments: keys and values come before what is said about them.
    let k = || key(db, args.get(1));
    let one = |op| Ok(Some(Built::One(op, Fmt::Plain)));
    match spec.cmd {
        Cmd::Get => one(Op::Get { key: k()? }),
        Cmd::Set => set(spec, args, k()?, now).map(Some),
        Cmd::Setnx => {
            let op = plain_set(k()?, value(args.get(2))?, SetCond::IfAbsent, SetExpire::Clear, false);
            Ok(Some(Built::One(op, Fmt::OneIfDone)))
        }
        Cmd::Setex | Cmd::Psetex => {
            let timing = if spec.cmd == Cmd::Setex { Timing::Seconds } else { Timing::Millis };
            let expire = timing.of_value(args.get(2), now, spec)?;
            one(plain_set(k()?, value(args.get(3))?, SetCond::Always, expire, false))
        }
        Cmd::Getset => one(plain_set(k()?, value(args.get(2))?, SetCond::Always, SetExpire::Clear, true)),
        Cmd::Getdel => one(Op::GetDel { key: k()? }),
        Cmd::Getex => getex(spec, args, k()?, now).map(Some),
        Cmd::Incr => one(Op::IncrBy { key: k()?, by: 1 }),
        Cmd::Decr => one(Op::IncrBy { key: k()?, by: -1 }),
        Cmd::Incrby => one(Op::IncrBy { key: k()?, by: integer(args.get(2))? }),
        Cmd::Decrby => {
            let by = integer(args.get(2))?.checked_neg().ok_or("decrement would overflow")?;
            one(Op::IncrBy { key: k()?, by })
        }
        Cmd::Incrbyfloat => one(Op::IncrByFloat { key: k()?, by: float(args.get(2))?.into() }),
        Cmd::Append => one(Op::Append { key: k()?, value: value(args.get(2))? }),
        Cmd::Strlen => one(Op::Strlen { key: k()? }),
        Cmd::Expire => expire(spec, args, k()?, Timing::Seconds, now).map(Some),
        Cmd::Pexpire => expire(spec, args, k()?, Timing::Millis, now).map(Some),
        Cmd::Expireat => expire(spec, args, k()?, Timing::SecondsAt, now).map(Some),
        Cmd::Pexpireat => expire(spec, args, k()?, Timing::MillisAt, now).map(Some),
        Cmd::Persist => one(Op::Persist { key: k()? }),
        Cmd::Pttl => one(Op::Pttl { key: k()? }),
        Cmd::Ttl => Ok(Some(Built::One(Op::Pttl { key: k()? }, Fmt::Seconds))),
        Cmd::Type => one(Op::Type { key: k()? }),
        Cmd::Mget => many(args, db, Combine::List, |key| Op::Get { key }),
        Cmd::Del | Cmd::Unlink => many(args, db, Combine::Sum, |key| Op::Del { key }),
        // TOUCH would tell the eviction of the access; as an answer it is EXISTS.
        Cmd::Exists | Cmd::Touch => many(args, db, Combine::Sum, |key| Op::Exists { key }),
        Cmd::Mset => {
            if args.len().is_multiple_of(2) {
                return Err("wrong number of arguments for 'mset' command".into());
            }
            let pairs = (1..args.len()).step_by(2);
            let op = |i| {
                let (key, value) = (key(db, args.get(i))?, value(args.get(i + 1))?);
                Ok(plain_set(key, value, SetCond::Always, SetExpire::Clear, false))
            };
            Ok(Some(Built::Many(pairs.map(op).collect::<Result<_, Refused>>()?, Combine::AllOk)))
        }
        _ => Ok(None),
    }
}

fn plain_set<'a>(key: KeyRef<'a>, value: &'a [u8], cond: SetCond, expire: SetExpire, get: bool) -> Op<'a> {
    Op::Set { key, value, cond, expire, get }
}

fn many<'a>(
    args: Args<'a>,
    db: u8,
    combine: Combine,
    op: impl Fn(KeyRef<'a>) -> Op<'a>,
) -> Result<Option<Built<'a>>, Refused> {
    // A key alone needs no combining beyond what its own answer is, except that MGET's is an array.
    if args.len() == 2 && combine == Combine::Sum {
        return Ok(Some(Built::One(op(key(db, args.get(1))?), Fmt::Plain)));
    }
    let ops = args.from(1).map(|bytes| key(db, bytes).map(&op)).collect::<Result<_, Refused>>()?;
    Ok(Some(Built::Many(ops, combine)))
}

fn set<'a>(spec: &Spec, args: Args<'a>, key: KeyRef<'a>, now: WallTime) -> Result<Built<'a>, Refused> {
    let value = value(args.get(2))?;
    let (mut cond, mut expire, mut get) = (SetCond::Always, None, false);
    let mut timed: Option<(Timing, &[u8])> = None;
    let mut i = 3;
    while i < args.len() {
        let arg = args.get(i);
        if is(arg, "nx") && cond != SetCond::IfPresent {
            cond = SetCond::IfAbsent;
        } else if is(arg, "xx") && cond != SetCond::IfAbsent {
            cond = SetCond::IfPresent;
        } else if is(arg, "get") {
            get = true;
        } else if is(arg, "keepttl") && timed.is_none() {
            expire = Some(SetExpire::Keep);
        } else if let Some(timing) = Timing::of_option(arg)
            // The same option again replaces the first one, as in Redis; two different ones contradict each other.
            && timed.is_none_or(|(earlier, _)| earlier == timing)
            && expire.is_none()
            && i + 1 < args.len()
        {
            timed = Some((timing, args.get(i + 1)));
            i += 1;
        } else {
            return Err(SYNTAX);
        }
        i += 1;
    }
    let expire = match timed {
        Some((timing, arg)) => timing.of_value(arg, now, spec)?,
        None => expire.unwrap_or(SetExpire::Clear),
    };
    Ok(Built::One(plain_set(key, value, cond, expire, get), Fmt::Plain))
}

fn getex<'a>(spec: &Spec, args: Args<'a>, key: KeyRef<'a>, now: WallTime) -> Result<Built<'a>, Refused> {
    let expire = match args.len() {
        // Without an option nothing changes: a plain read, which needs no log entry.
        2 => return Ok(Built::One(Op::Get { key }, Fmt::Plain)),
        3 if is(args.get(2), "persist") => SetExpire::Clear,
        4 => Timing::of_option(args.get(2)).ok_or(SYNTAX)?.of_value(args.get(3), now, spec)?,
        _ => return Err(SYNTAX),
    };
    Ok(Built::One(Op::GetEx { key, expire }, Fmt::Plain))
}

fn expire<'a>(
    spec: &Spec,
    args: Args<'a>,
    key: KeyRef<'a>,
    timing: Timing,
    now: WallTime,
) -> Result<Built<'a>, Refused> {
    let (mut nx, mut xx, mut gt, mut lt) = (false, false, false, false);
    for option in args.from(3) {
        let flag = [("nx", &mut nx), ("xx", &mut xx), ("gt", &mut gt), ("lt", &mut lt)];
        match flag.into_iter().find(|(word, _)| is(option, word)) {
            Some((_, flag)) => *flag = true,
            None => {
                let shown = String::from_utf8_lossy(&option[..option.len().min(128)]).into_owned();
                return Err(format!("Unsupported option {shown}").into());
            }
        }
    }
    if nx && (xx || gt || lt) {
        return Err("NX and XX, GT or LT options at the same time are not compatible".into());
    }
    if gt && lt {
        return Err("GT and LT options at the same time are not compatible".into());
    }
    if xx && lt {
        // LT alone also takes keys without an expiry, so the two together are a condition of their own.
        return Err("XX and LT options at the same time are not supported".into());
    }
    let at = timing.of_key(args.get(2), now, spec)?;
    let cond = match (nx, xx, gt, lt) {
        (true, ..) => ExpireCond::IfNone,
        // GT never takes a key without an expiry, which lives longer than any: XX adds nothing to it.
        (_, _, true, _) => ExpireCond::IfGreater,
        (.., true) => ExpireCond::IfLess,
        (_, true, ..) => ExpireCond::IfSome,
        _ => ExpireCond::Always,
    };
    Ok(Built::One(Op::Expire { key, at, cond }, Fmt::Plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::command::{COMMANDS, WRITE, resolve};
    use crate::resp::decode::OwnedArgs;

    const NOW: WallTime = WallTime(1_700_000_000_000);

    /// What the line becomes, in Debug form, or its error.
    fn built(line: &str) -> Result<String, String> {
        let owned = OwnedArgs::new(line.split(' ').map(str::as_bytes));
        let spec = resolve(owned.args()).expect(line);
        match build(spec, owned.args(), 3, NOW) {
            Ok(b) => Ok(format!("{:?}", b.unwrap_or_else(|| panic!("{line} is a data command")))),
            Err(e) => Err(e.into_owned()),
        }
    }

    fn set_parts(line: &str) -> (SetCond, SetExpire, bool) {
        let owned = OwnedArgs::new(line.split(' ').map(str::as_bytes));
        let spec = resolve(owned.args()).expect(line);
        match build(spec, owned.args(), 0, NOW) {
            Ok(Some(Built::One(Op::Set { cond, expire, get, key, value }, _))) => {
                assert_eq!((key.bytes, value), (&b"k"[..], &b"v"[..]));
                (cond, expire, get)
            }
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn every_option_of_set() {
        use SetCond::*;
        assert_eq!(set_parts("set k v"), (Always, SetExpire::Clear, false));
        assert_eq!(set_parts("set k v NX get"), (IfAbsent, SetExpire::Clear, true));
        assert_eq!(set_parts("set k v xx KeepTtl"), (IfPresent, SetExpire::Keep, false));
        assert_eq!(set_parts("set k v ex 10 xx"), (IfPresent, SetExpire::After(10_000), false));
        assert_eq!(set_parts("set k v ex 1 ex 2 nx nx"), (IfAbsent, SetExpire::After(2000), false));
        assert_eq!(set_parts("set k v px 10"), (Always, SetExpire::After(10), false));
        assert_eq!(set_parts("set k v exat 10"), (Always, SetExpire::At(WallTime(10_000)), false));
        assert_eq!(set_parts("set k v get pxat 10"), (Always, SetExpire::At(WallTime(10)), true));
        assert_eq!(set_parts("setex k 2 v"), (Always, SetExpire::After(2000), false));
        assert_eq!(set_parts("psetex k 2 v"), (Always, SetExpire::After(2), false));
        assert_eq!(set_parts("getset k v"), (Always, SetExpire::Clear, true));
        assert_eq!(set_parts("setnx k v"), (IfAbsent, SetExpire::Clear, false));
    }

    #[test]
    fn refusals_are_worded_as_redis_words_them() {
        // Each as Redis 7.0.15 answers, except the last two, which it takes.
        let max = i64::MAX;
        let cases = [
            ("set k v ex", "syntax error"),
            ("set k v nx xx", "syntax error"),
            ("set k v xx nx", "syntax error"),
            ("set k v keepttl ex 1", "syntax error"),
            ("set k v ex 1 keepttl", "syntax error"),
            ("set k v ex 1 px 1", "syntax error"),
            ("set k v persist", "syntax error"),
            ("set k v ex 0", "invalid expire time in 'set' command"),
            ("set k v ex -1", "invalid expire time in 'set' command"),
            ("set k v exat 0", "invalid expire time in 'set' command"),
            ("set k v px x", "value is not an integer or out of range"),
            (&format!("set k v ex {max}"), "invalid expire time in 'set' command"),
            (&format!("set k v px {max}"), "invalid expire time in 'set' command"),
            ("setex k 0 v", "invalid expire time in 'setex' command"),
            ("setex k x v", "value is not an integer or out of range"),
            ("psetex k 0 v", "invalid expire time in 'psetex' command"),
            ("getex k persist ex 1", "syntax error"),
            ("getex k foo", "syntax error"),
            ("getex k keepttl", "syntax error"),
            ("getex k ex 0", "invalid expire time in 'getex' command"),
            ("incrby k x", "value is not an integer or out of range"),
            ("incrby k +1", "value is not an integer or out of range"),
            ("decrby k -9223372036854775808", "decrement would overflow"),
            ("incrbyfloat k inf", "increment would produce NaN or Infinity"),
            ("incrbyfloat k nan", "value is not a valid float"),
            ("incrbyfloat k foo", "value is not a valid float"),
            ("expire k x", "value is not an integer or out of range"),
            ("expire k 1 nx xx", "NX and XX, GT or LT options at the same time are not compatible"),
            ("expire k 1 gt lt", "GT and LT options at the same time are not compatible"),
            ("expire k 1 foo", "Unsupported option foo"),
            (&format!("expire k {max}"), "invalid expire time in 'expire' command"),
            (&format!("expire k {}", i64::MIN), "invalid expire time in 'expire' command"),
            (&format!("pexpire k {max}"), "invalid expire time in 'pexpire' command"),
            (&format!("expireat k {max}"), "invalid expire time in 'expireat' command"),
            ("mset a 1 b", "wrong number of arguments for 'mset' command"),
            ("expire k 1 xx lt", "XX and LT options at the same time are not supported"),
            ("incrbyfloat k 0x10", "value is not a valid float"),
        ];
        for (line, error) in cases {
            assert_eq!(built(line), Err(error.to_owned()), "{line}");
        }
    }

    #[test]
    fn expiries_of_keys() {
        let at = |line: &str| {
            let owned = OwnedArgs::new(line.split(' ').map(str::as_bytes));
            match build(resolve(owned.args()).unwrap(), owned.args(), 0, NOW) {
                Ok(Some(Built::One(Op::Expire { at, cond, .. }, Fmt::Plain))) => (at, cond),
                other => panic!("{line}: {other:?}"),
            }
        };
        assert_eq!(at("expire k 7"), (ExpireAt::After(7000), ExpireCond::Always));
        assert_eq!(at("expire k -7 NX"), (ExpireAt::After(-7000), ExpireCond::IfNone));
        assert_eq!(at("pexpire k 7 XX"), (ExpireAt::After(7), ExpireCond::IfSome));
        assert_eq!(at("expireat k 7 gt"), (ExpireAt::At(7000), ExpireCond::IfGreater));
        assert_eq!(at("expireat k 7 xx gt"), (ExpireAt::At(7000), ExpireCond::IfGreater));
        assert_eq!(at(&format!("pexpireat k {} lt", i64::MAX)), (ExpireAt::At(i64::MAX), ExpireCond::IfLess));
    }

    #[test]
    fn one_operation_where_one_suffices() {
        let starts = |line: &str, start: &str| {
            let b = built(line).unwrap();
            assert!(b.starts_with(start), "{line}: {b}");
        };
        starts("get k", "One(Get");
        starts("getex k", "One(Get ");
        starts("getex k persist", "One(GetEx");
        starts("del k", "One(Del");
        starts("del k l", "Many([Del");
        starts("mget k", "Many([Get");
        starts("ttl k", "One(Pttl");
        assert!(built("ttl k").unwrap().ends_with("Seconds)"));
        assert!(built("mset a 1 b 2").unwrap().ends_with("AllOk)"));
        assert!(built("exists a b").unwrap().ends_with("Sum)"));
    }

    #[test]
    fn the_table_tells_the_truth_about_keys_and_writes() {
        for spec in COMMANDS.iter().filter(|s| s.first > 0) {
            let words = match spec.cmd {
                Cmd::Setex | Cmd::Psetex => vec![spec.name, "k", "1", "1"],
                _ => {
                    let mut words = vec![spec.name, "k", "1"];
                    words.truncate(usize::from(spec.arity.unsigned_abs()).max(2));
                    words
                }
            };
            let owned = OwnedArgs::new(words.iter().map(|w| w.as_bytes()));
            let ops = match build(spec, owned.args(), 0, NOW) {
                Ok(Some(Built::One(op, _))) => vec![op],
                Ok(Some(Built::Many(ops, _))) => ops,
                other => panic!("{words:?}: {other:?}"),
            };
            let keys: Vec<&[u8]> = ops.iter().filter_map(|op| op.key()).map(|k| k.bytes).collect();
            assert_eq!(keys, spec.keys(owned.args()).collect::<Vec<_>>(), "{words:?}");
            // GETEX without options reads only.
            if spec.cmd != Cmd::Getex {
                assert_eq!(ops.iter().any(Op::is_write), spec.has(WRITE), "{words:?}");
            }
        }
    }

    #[test]
    fn long_keys_are_refused() {
        let long = vec![b'k'; MAX_KEY_BYTES + 1];
        for words in [&[b"get".as_slice(), &long][..], &[b"mget", b"a", &long], &[b"mset", &long, b"v"]] {
            let owned = OwnedArgs::new(words.iter().copied());
            let spec = resolve(owned.args()).unwrap();
            let error = build(spec, owned.args(), 0, NOW).unwrap_err();
            assert!(error.contains("65535 bytes"), "{error}");
        }
    }
}
