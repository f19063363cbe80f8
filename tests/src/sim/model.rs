//! The sequential meaning of the commands that the workload uses: one key, one value. Written independently of the state
//! machine under test.
//!
//! A *pair* is two keys of one slot that are only ever written together, to one value, by one request: a register with
//! two names. Its record carries the name of the pair, `{p0}`; the keys are `{p0}a` and `{p0}b`.

use bytes::Bytes;
use crema_core::op::{SetCond, SetExpire};
use crema_core::{KeyRef, Op, OpError, Reply, encode_ops};

/// One of the two keys of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The key that ends with `a`.
    A,
    /// The key that ends with `b`.
    B,
}

/// A command on one key, or on a pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// GET.
    Get,
    /// A read that may be answered from an older state: at most so many milliseconds old, or any that was. Only
    /// [`super::check::relaxed`] judges it.
    GetRelaxed {
        /// The bound; none for a local read.
        max_age_ms: Option<u64>,
    },
    /// SET.
    Set(Vec<u8>),
    /// SET NX.
    SetNx(Vec<u8>),
    /// The value is set if the one before is what was expected.
    CompareAndSet {
        /// That one; `None` for none.
        expected: Value,
        /// The new one.
        value: Vec<u8>,
    },
    /// INCR.
    Incr,
    /// APPEND.
    Append(Vec<u8>),
    /// DEL.
    Del,
    /// SET PX. What it does to a value depends on time: only [`super::check::ttl`] judges keys with such writes.
    SetPx {
        /// The value.
        value: Vec<u8>,
        /// Its lifetime in milliseconds, at least 1.
        px: u64,
    },
    /// One request that sets both keys of a pair to this value.
    PairSet(Vec<u8>),
    /// One request that reads both keys of a pair.
    PairGet,
    /// GET of one key of a pair.
    PairHalf(Half),
}

/// The state of one key.
pub type Value = Option<Vec<u8>>;

impl Command {
    /// Whether it may change something.
    pub fn is_write(&self) -> bool {
        !matches!(self, Command::Get | Command::GetRelaxed { .. } | Command::PairGet | Command::PairHalf(_))
    }

    /// What a SET of a register or of a pair writes, regardless of what was there.
    pub fn sets(&self) -> Option<&[u8]> {
        match self {
            Command::Set(v) | Command::PairSet(v) => Some(v),
            _ => None,
        }
    }

    /// The value that `reply` says a read has found; `None` of other commands, and of answers that no read gives.
    pub fn finds(&self, reply: &Reply) -> Option<Value> {
        let found = |reply: &Reply| match reply {
            Reply::Bulk(v) => Some(Some(v.to_vec())),
            Reply::Nil => Some(None),
            _ => None,
        };
        match (self, reply) {
            (Command::Get | Command::GetRelaxed { .. } | Command::PairHalf(_), reply) => found(reply),
            (Command::PairGet, Reply::Array(both)) => match &both[..] {
                [a, b] if a == b => found(a),
                _ => None,
            },
            _ => None,
        }
    }

    /// What it does to a value, and what it answers.
    pub fn apply(&self, value: &Value) -> (Value, Reply) {
        let read = || value.as_ref().map_or(Reply::Nil, |v| Reply::Bulk(v.clone().into()));
        match self {
            Command::Get | Command::GetRelaxed { .. } | Command::PairHalf(_) => (value.clone(), read()),
            Command::PairGet => (value.clone(), Reply::Array(vec![read(), read()])),
            Command::Set(v) | Command::SetPx { value: v, .. } => (Some(v.clone()), Reply::Ok),
            Command::PairSet(v) => (Some(v.clone()), Reply::Array(vec![Reply::Ok, Reply::Ok])),
            Command::SetNx(_) if value.is_some() => (value.clone(), Reply::Nil),
            Command::SetNx(v) => (Some(v.clone()), Reply::Ok),
            Command::CompareAndSet { expected, value: new } if expected == value => (Some(new.clone()), Reply::Int(1)),
            Command::CompareAndSet { .. } => (value.clone(), Reply::Int(0)),
            Command::Incr => {
                let number = match value {
                    None => Some(0i64),
                    Some(v) => std::str::from_utf8(v).ok().and_then(|s| s.parse().ok()),
                };
                match number.map(|n| n + 1) {
                    Some(n) => (Some(n.to_string().into_bytes()), Reply::Int(n)),
                    None => (value.clone(), Reply::Error(OpError::NotInteger)),
                }
            }
            Command::Append(v) => {
                let mut all = value.clone().unwrap_or_default();
                all.extend_from_slice(v);
                let len = all.len() as i64;
                (Some(all), Reply::Int(len))
            }
            Command::Del => (None, Reply::Int(i64::from(value.is_some()))),
        }
    }

    /// The command as the gateway takes it.
    ///
    /// # Panics
    ///
    /// If key or value is over a limit; the workload's are short.
    pub fn encode(&self, key: &str) -> Bytes {
        let (a, b) = (format!("{key}a"), format!("{key}b"));
        let [key, a, b] = [key, &a, &b].map(|k| KeyRef::new(0, k.as_bytes()).expect("a short key"));
        let set = |key, value, cond, expire| Op::Set { key, value, cond, expire, get: false };
        let ops = match self {
            Command::Get | Command::GetRelaxed { .. } => vec![Op::Get { key }],
            Command::Set(v) => vec![set(key, v, SetCond::Always, SetExpire::Clear)],
            Command::SetNx(v) => vec![set(key, v, SetCond::IfAbsent, SetExpire::Clear)],
            Command::CompareAndSet { expected, value } => {
                vec![Op::CompareAndSet { key, expected: expected.as_deref(), value, expire: SetExpire::Clear }]
            }
            Command::Incr => vec![Op::IncrBy { key, by: 1 }],
            Command::Append(value) => vec![Op::Append { key, value }],
            Command::Del => vec![Op::Del { key }],
            Command::SetPx { value, px } => vec![set(key, value, SetCond::Always, SetExpire::After(*px))],
            Command::PairSet(v) => [a, b].map(|key| set(key, v, SetCond::Always, SetExpire::Clear)).to_vec(),
            Command::PairGet => vec![Op::Get { key: a }, Op::Get { key: b }],
            Command::PairHalf(half) => vec![Op::Get { key: if *half == Half::A { a } else { b } }],
        };
        encode_ops(&ops).expect("a few short operations")
    }
}

/// How a request ended, as far as its caller can tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Executed, with this answer.
    Replied(Reply),
    /// Certainly not executed, neither then nor later.
    NotApplied,
    /// Executed then, later or never.
    Unknown,
}

/// One command of the history.
#[derive(Clone, Debug)]
pub struct Record {
    /// The key, or the name of the pair.
    pub key: String,
    /// Connection it was sent on.
    pub conn: u64,
    /// The command.
    pub command: Command,
    /// When it was sent, as a position among all sends and ends.
    pub call: u64,
    /// When it ended, likewise.
    pub ret: u64,
    /// When it was sent, in nanoseconds of the clock that all clients share (simulated time in the simulator).
    pub call_ns: u64,
    /// When it ended, likewise; says nothing unless it was answered or refused.
    pub ret_ns: u64,
    /// How it ended; `None` while it has not.
    pub ended: Option<Ended>,
}
