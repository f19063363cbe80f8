//! The sequential meaning of the commands that the workload uses: one key, one value. Written independently of the state
//! machine under test.

use bytes::Bytes;
use crema_core::op::{SetCond, SetExpire};
use crema_core::{KeyRef, Op, OpError, Reply, encode_ops};

/// A command on one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// GET.
    Get,
    /// SET.
    Set(Vec<u8>),
    /// SET NX.
    SetNx(Vec<u8>),
    /// INCR.
    Incr,
    /// APPEND.
    Append(Vec<u8>),
    /// DEL.
    Del,
}

/// The state of one key.
pub type Value = Option<Vec<u8>>;

impl Command {
    /// Whether it may change something.
    pub fn is_write(&self) -> bool {
        *self != Command::Get
    }

    /// What it does to a value, and what it answers.
    pub fn apply(&self, value: &Value) -> (Value, Reply) {
        match self {
            Command::Get => (value.clone(), value.as_ref().map_or(Reply::Nil, |v| Reply::Bulk(v.clone().into()))),
            Command::Set(v) => (Some(v.clone()), Reply::Ok),
            Command::SetNx(_) if value.is_some() => (value.clone(), Reply::Nil),
            Command::SetNx(v) => (Some(v.clone()), Reply::Ok),
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
        let key = KeyRef::new(0, key.as_bytes()).expect("a short key");
        let set = |value, cond| Op::Set { key, value, cond, expire: SetExpire::Clear, get: false };
        let op = match self {
            Command::Get => Op::Get { key },
            Command::Set(v) => set(v, SetCond::Always),
            Command::SetNx(v) => set(v, SetCond::IfAbsent),
            Command::Incr => Op::IncrBy { key, by: 1 },
            Command::Append(value) => Op::Append { key, value },
            Command::Del => Op::Del { key },
        };
        encode_ops(&[op]).expect("one short operation")
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
    /// The key.
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
