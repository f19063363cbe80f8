//! Every bound of the data path in one place. Each is checked where the bytes enter, before anything is allocated.

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
