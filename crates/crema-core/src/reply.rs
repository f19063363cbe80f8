//! What an operation answers, and what became of a request.

use crate::error::OpError;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The answer to one operation, independent of any wire protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Done.
    Ok,
    /// Nothing there, or the condition did not hold.
    Nil,
    /// A number.
    Int(i64),
    /// A string of bytes.
    Bulk(Bytes),
    /// The type of a value.
    Type(ValueType),
    /// One step of a scan.
    Scan {
        /// Where to go on; `None` when the shard is finished.
        next: Option<u64>,
        /// Keys found, possibly none.
        keys: Vec<Bytes>,
    },
    /// The operation failed and changed nothing.
    Error(OpError),
    /// The answers of a request with several operations, in order.
    Array(Vec<Reply>),
}

/// Types of stored values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ValueType {
    /// The key is absent.
    None,
    /// A string of bytes.
    String,
}

/// What became of one request of an applied entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Executed now or by an earlier copy of the same write; this is its answer.
    Reply(Reply),
    /// Not executed by this entry: an earlier write of its session has not arrived yet. Send again, in order.
    Gap,
    /// The write lies at or below its session's low watermark, or its answer was not kept: an earlier copy may or may not
    /// have been executed; this one was not.
    Unknown,
    /// The session is gone. Not executed by this entry, and no later entry will execute a write of that session.
    NoSession,
}
