//! Errors of the pure core. Each tells its caller what to do.

use crate::ids::Epoch;
use serde::{Deserialize, Serialize};

/// An operation that was refused by the state it met; nothing was changed. Give up, or ask differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// The value is not a 64-bit integer.
    #[error("value is not an integer or out of range")]
    NotInteger,
    /// The sum leaves the 64-bit range.
    #[error("increment or decrement would overflow")]
    Overflow,
    /// The value is not a float.
    #[error("value is not a valid float")]
    NotFloat,
    /// The sum is not a finite number.
    #[error("increment would produce NaN or Infinity")]
    NotFinite,
    /// The value would be longer than [`crate::limits::MAX_VALUE_BYTES`].
    #[error("string exceeds maximum allowed size")]
    TooLong,
    /// The expiry leaves the range of time.
    #[error("invalid expire time")]
    InvalidExpire,
    /// The shard does not own the slot (any more): fetch the placement of at least this epoch and ask there.
    #[error("slot is not served by this shard")]
    WrongSlot {
        /// The placement epoch of the shard.
        epoch: Epoch,
    },
    /// The replies of the request together would be larger than one answer may be. Ask for fewer or smaller values at once.
    #[error("the reply would be too large: ask for fewer values at once")]
    ReplyTooLarge,
    /// The shard's memory is full, and this would take more. Delete something, or raise the limit.
    #[error("command not allowed when used memory > 'maxmemory'.")]
    OutOfMemory,
}

/// Bytes that do not decode. From a client: refuse the request. From a peer: drop the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// Not what the format says.
    #[error("malformed bytes")]
    Malformed,
    /// Over one of the [`crate::limits`].
    #[error("over a size limit")]
    TooLarge,
    /// A version that this build does not know.
    #[error("unknown format version {0}")]
    UnknownVersion(u8),
}

/// A committed entry that cannot be applied. The replica must stop: skipping it would let replicas differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("committed entry {index} cannot be applied: {reason}")]
pub struct CorruptEntry {
    /// Log index of the entry.
    pub index: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// A snapshot that cannot be restored: damaged, incomplete, out of order, or of another version. Nothing has changed but
/// the restoration, which is of no use any more; ask for another snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("chunk {chunk} of a snapshot cannot be taken: {reason}")]
pub struct CorruptSnapshot {
    /// Number of the chunk, from 0 on.
    pub chunk: u32,
    /// What is wrong with it.
    pub reason: &'static str,
}
