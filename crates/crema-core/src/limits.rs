//! Every bound of the data path in one place. Each is checked where the bytes enter, before anything is allocated.

use serde::{Deserialize, Serialize};

/// Longest key in bytes.
pub const MAX_KEY_BYTES: usize = 64 * 1024 - 1;
/// Longest value in bytes.
pub const MAX_VALUE_BYTES: usize = 8 * 1024 * 1024;
/// Number of databases: namespaces of keys within a slot, as `SELECT` chooses them.
pub const DATABASES: u8 = 16;
/// Most operations in one request (one MULTI block, or one shard's part of an MSET).
pub const MAX_OPS_PER_REQUEST: usize = 16 * 1024;
/// Most bytes of one encoded request: a value of the largest size and what surrounds it.
pub const MAX_REQUEST_BYTES: usize = 16 * 1024 * 1024;
/// An entry is closed once its requests reach this many bytes; one larger request makes an entry of its own.
pub const TARGET_ENTRY_BYTES: usize = 256 * 1024;
/// Most writes of one session without a known outcome; the gateway waits with further ones.
pub const SESSION_WINDOW: usize = 1024;
/// Most bytes of replies that one session keeps for retries. A larger reply is forgotten: its retry gets *unknown*.
pub const SESSION_REPLY_BYTES: usize = 64 * 1024;
/// Most sessions a shard keeps; opening one more evicts the least recently used.
pub const MAX_SESSIONS: usize = 1024;
/// Most keys that one SCAN step returns, whatever COUNT says.
pub const MAX_SCAN_COUNT: u32 = 10_000;
/// Most records that one removing entry names.
pub const MAX_VICTIMS: usize = 4096;

/// How much memory a shard may use, and what happens then. Set through its log, so that every replica decides alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLimits {
    /// Most bytes, as [`crate::StateMachine::used`] counts them; 0 for no limit.
    pub max_bytes: u64,
    /// What happens at the limit.
    pub policy: LimitPolicy,
}

/// What happens when a shard's memory is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LimitPolicy {
    /// The leader removes keys that were not used lately. Writes go on up to a sixteenth beyond the limit, so that they
    /// need not wait for it; what lies beyond is refused.
    #[default]
    Evict,
    /// Writes that take more memory are refused.
    Refuse,
}

impl MemoryLimits {
    /// Bytes that each key counts beside its record: what choosing victims takes.
    pub(crate) fn bytes_per_key(&self) -> u64 {
        if self.max_bytes != 0 && self.policy == LimitPolicy::Evict { EVICTION_BYTES_PER_KEY } else { 0 }
    }

    /// Bytes beyond which writes are refused.
    pub(crate) fn most(&self) -> u64 {
        match (self.max_bytes, self.policy) {
            (0, _) => u64::MAX,
            (max, LimitPolicy::Refuse) => max,
            (max, LimitPolicy::Evict) => max.saturating_add(max / 16),
        }
    }
}

/// Accounted bytes of a key in the queues that choose victims. Counted on every replica, wherever the queues are kept:
/// what is decided by the bytes used must not depend on who leads.
pub const EVICTION_BYTES_PER_KEY: u64 = 9;
