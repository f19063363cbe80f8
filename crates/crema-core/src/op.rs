//! Operations on one shard: the only vocabulary that Raft entries and reads speak.
//!
//! An operation borrows its payload from the buffer it was parsed or decoded from; nothing is copied until it is stored.

use crate::key::KeyRef;
use crate::time::WallTime;
use serde::{Deserialize, Serialize};

/// When a SET may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetCond {
    /// Always.
    Always,
    /// Only if the key is absent (NX).
    IfAbsent,
    /// Only if the key exists (XX).
    IfPresent,
}

/// What happens to the expiry of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetExpire {
    /// The key lives for ever (plain SET, PERSIST form of GETEX).
    Clear,
    /// The expiry stays as it is (KEEPTTL, GETEX without options).
    Keep,
    /// Milliseconds from the entry's log time (EX, PX); at least 1, checked when parsed.
    After(u64),
    /// A point of wall time (EXAT, PXAT), turned into log time by the offset that the leader stamps into the entry.
    At(WallTime),
}

/// Condition of EXPIRE and its relatives. A key without expiry counts as one that expires never.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExpireCond {
    /// Always.
    Always,
    /// Only if the key has no expiry (NX).
    IfNone,
    /// Only if the key has an expiry (XX).
    IfSome,
    /// Only if the new expiry is later (GT).
    IfGreater,
    /// Only if the new expiry is earlier (LT).
    IfLess,
}

/// When a key shall expire, for EXPIRE and its relatives; a past point deletes the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExpireAt {
    /// Milliseconds from the entry's log time; may be negative.
    After(i64),
    /// A point of wall time in milliseconds; may be negative.
    At(i64),
}

/// One operation. Replies are named as [`crate::Reply`] variants.
///
/// New variants are appended only: the position is the wire code, and an entry's version says which exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Op<'a> {
    /// `Bulk` or `Nil`.
    Get {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
    },
    /// Without `get`: `Ok`, or `Nil` if the condition failed. With `get`: the old value (`Bulk` or `Nil`) either way.
    Set {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
        /// The new value.
        value: &'a [u8],
        /// Condition.
        cond: SetCond,
        /// Expiry of the new value.
        expire: SetExpire,
        /// Whether the reply is the old value.
        get: bool,
    },
    /// The value, `Bulk` or `Nil`; changes its expiry.
    GetEx {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
        /// The new expiry.
        expire: SetExpire,
    },
    /// The value, `Bulk` or `Nil`; deletes the key.
    GetDel {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
    },
    /// `Int` 1 if the key existed, else 0.
    Del {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
    },
    /// `Int` 1 or 0.
    Exists {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
    },
    /// The new value as `Int`; keeps the expiry. Errors: not an integer, overflow.
    IncrBy {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
        /// What is added.
        by: i64,
    },
    /// The new value as `Bulk`, formatted as Redis does; keeps the expiry. Errors: not a float, not finite.
    IncrByFloat {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
        /// What is added; finite, checked when parsed.
        by: f64Bits,
    },
    /// The new length as `Int`; keeps the expiry. Error: value too long.
    Append {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
        /// What is appended.
        value: &'a [u8],
    },
    /// The length as `Int`, 0 if absent.
    Strlen {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
    },
    /// `Int` 1 if the expiry was set (or the key deleted, for a past point), else 0.
    Expire {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
        /// The new expiry.
        at: ExpireAt,
        /// Condition.
        cond: ExpireCond,
    },
    /// `Int` 1 if an expiry was removed, else 0.
    Persist {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
    },
    /// Remaining milliseconds as `Int`; -1 without expiry, -2 if absent.
    Pttl {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
    },
    /// `Type`.
    Type {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
    },
    /// Number of keys of a database in this shard as `Int`.
    DbSize {
        /// The database.
        db: u8,
    },
    /// One step through this shard's keys, `Scan`.
    Scan {
        /// The database.
        db: u8,
        /// Where to go on, as the last step said; the shard's first slot shifted by
        /// [`crate::store::SCAN_SLOT_SHIFT`] to begin.
        cursor: u64,
        /// About how many keys to look at, 1 to [`crate::limits::MAX_SCAN_COUNT`].
        count: u32,
        /// Glob pattern that returned keys match; all if none.
        #[serde(borrow)]
        pattern: Option<&'a [u8]>,
    },
    /// Deletes all keys of one database, or of all of them, in this shard; `Ok`.
    Flush {
        /// The database, or all.
        db: Option<u8>,
    },
    /// Stores the value if the key holds exactly what is expected: `Int` 1 if it did, else 0 and nothing is changed.
    CompareAndSet {
        /// The key.
        #[serde(borrow)]
        key: KeyRef<'a>,
        /// What the key must hold, byte by byte; none: the key must be absent.
        #[serde(borrow)]
        expected: Option<&'a [u8]>,
        /// The new value.
        value: &'a [u8],
        /// Expiry of the new value.
        expire: SetExpire,
    },
}

/// The bits of an `f64`, so that operations can be compared and hashed.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(non_camel_case_types, reason = "stands where f64 would stand")]
pub struct f64Bits(pub u64);

impl From<f64> for f64Bits {
    fn from(v: f64) -> Self {
        f64Bits(v.to_bits())
    }
}
impl f64Bits {
    /// The number.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}
impl std::fmt::Debug for f64Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.get())
    }
}

impl<'a> Op<'a> {
    /// Whether the operation may change state, and so must go through the log.
    pub fn is_write(&self) -> bool {
        match self {
            Op::Get { .. }
            | Op::Exists { .. }
            | Op::Strlen { .. }
            | Op::Pttl { .. }
            | Op::Type { .. }
            | Op::DbSize { .. }
            | Op::Scan { .. } => false,
            Op::Set { .. }
            | Op::GetEx { .. }
            | Op::GetDel { .. }
            | Op::Del { .. }
            | Op::IncrBy { .. }
            | Op::IncrByFloat { .. }
            | Op::Append { .. }
            | Op::Expire { .. }
            | Op::Persist { .. }
            | Op::Flush { .. }
            | Op::CompareAndSet { .. } => true,
        }
    }

    /// The key, for operations on one.
    pub fn key(&self) -> Option<KeyRef<'a>> {
        match *self {
            Op::Get { key }
            | Op::Set { key, .. }
            | Op::GetEx { key, .. }
            | Op::GetDel { key }
            | Op::Del { key }
            | Op::Exists { key }
            | Op::IncrBy { key, .. }
            | Op::IncrByFloat { key, .. }
            | Op::Append { key, .. }
            | Op::Strlen { key }
            | Op::Expire { key, .. }
            | Op::Persist { key }
            | Op::Pttl { key }
            | Op::Type { key }
            | Op::CompareAndSet { key, .. } => Some(key),
            Op::DbSize { .. } | Op::Scan { .. } | Op::Flush { .. } => None,
        }
    }
}
