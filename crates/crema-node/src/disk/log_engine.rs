//! The Raft log of all replicas of a node, on raft-engine, with proof of what recovery returns.
//!
//! raft-engine keeps one append queue of files for all groups and an index in memory, rewrites what is still alive out of
//! old files, and recovers by reading everything. What it cannot do is tell what is missing: its tolerant recovery cuts the
//! last file at the first damaged byte, drops files before a gap in their numbers, checks the checksum of a block of
//! entries only when it is read, and takes all that for a clean start. Its strict recovery refuses the torn tail that
//! every kill leaves (files are allocated ahead). So the tolerant mode is used, and each result is checked:
//!
//! - A *write* (one raft-engine batch, at most `CHUNK_BYTES` of small writes, a `LogWrite` never split) ends with a
//!   *record* in a region of its own: the write's sequence number, the sequence known to be synced when it was written,
//!   and a fingerprint of the state of all groups after it.
//! - The state of a group is kept in one small value, rewritten with each of its writes: hard state, what was compacted,
//!   the last index, and a hash of the terms of the live entries. The fingerprint covers these values, so that after
//!   recovery every group has exactly the (index, term) pairs that the last record speaks of; the content of each entry
//!   is covered by raft-engine's checksum of its block.
//! - After each sync the sequence goes into the marker file (`marker.rs`), and only then is the write reported. Recovering
//!   less than the marker says, or less than any record found in the raw bytes of the last file says to be synced, is a
//!   lost tail.
//! - A damaged block in the middle of what was never known to be synced is what a loss of power leaves: the file is cut
//!   after the last write that was synced, and opened again.
//! - raft-engine may bring back entries that were compacted, and a tail that was replaced and then compacted, when the file
//!   that said so has been purged. The state of the group says where its log begins and ends; the rest is left out.
//! - It copies the whole index of a group at each compaction, at run time and when it replays one. So it is told of one only
//!   when a fifth of the group is gone; the state has the true one.
//! - LZ4 is off: the byte that says "compressed" is the one byte of a batch that no checksum covers. It is checked here to
//!   be zero, as is the header of each file.
//! - Reads and rewrites run on threads of their own: raft-engine caches the last block per thread, under a key that names
//!   the file number and offset but not the engine, so two engines on one thread would read each other's entries.
//!
//! Disk use: see [`LogOptions::disk_bound`].

use super::log_fs::{Fuse, FusedFs};
use super::marker::{Found, Marker};
use super::{create_dir, sync_dir};
use raft::eraftpb::{Entry, HardState};
use raft_engine::{Command, Config, Engine, LogBatch, MessageExt, ReadableSize, RecoveryMode};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Small writes share a raft-engine batch up to about this size. Recovery reads, checks and copies a block of entries once
/// for each group in it, so a larger one makes restarts slow; a smaller one costs more system calls.
const CHUNK_BYTES: usize = 16 * 1024;
/// Largest `meta` of a replica in bytes.
pub const MAX_META_BYTES: usize = 9 * 1024 * 1024;
/// The region of the records; no replica id, those count up from zero.
const RECORD_REGION: u64 = u64::MAX;
const KEY_RECORD: &[u8] = b"r";
const KEY_STATE: &[u8] = b"s";
const KEY_META: &[u8] = b"m";
const RECORD_MAGIC: &[u8; 8] = b"crmrec01";
const RECORD_BYTES: usize = 48;
/// What raft-engine puts behind the last value of a batch: the checksum of its index.
const BATCH_TRAILER_BYTES: u64 = 4;
/// Header of a batch: length and compression (u56 and u8, big endian), offset of its index (u64).
const BATCH_HEADER_BYTES: u64 = 16;
const FILE_MAGIC: &[u8; 53] = b"RAFT-LOG-FILE-HEADER-9986AB3E47F320B394C8E84916EB0ED5";
/// What follows the magic in a log file: version 2 (u64, big endian) and alignment 0 (u64).
const VERSION_2: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0];
/// Or version 1, in a file whose torn header raft-engine has replaced.
const VERSION_1: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 1];

/// What one replica wants made durable, as a whole or not at all.
#[derive(Clone, Debug, Default)]
pub struct LogWrite {
    /// The replica; an id that is never used again after `remove`, and not `u64::MAX`.
    pub group: u64,
    /// Consecutive entries. They begin at most one behind the last index and after what was compacted; whatever was kept
    /// from their first index on is replaced. A new replica's log is empty and begins behind `compact_to`, or at 1.
    pub entries: Vec<Entry>,
    /// Term, vote and commit index, if they changed. `commit` must not be beyond the last index after this write.
    pub hard: Option<HardState>,
    /// What the replica is, for whoever opens the log; opaque here, at most [`MAX_META_BYTES`].
    pub meta: Option<Vec<u8>>,
    /// Entries up to and including this one are no longer needed. Beyond the last index: the log is emptied and goes on
    /// behind it, as after a snapshot. Less than before: nothing happens.
    pub compact_to: Option<u64>,
    /// Forget the replica. Everything else of the write must be empty.
    pub remove: bool,
}

impl LogWrite {
    /// Roughly the bytes it takes on disk and in a queue.
    pub fn approximate_bytes(&self) -> usize {
        let entries: usize = self.entries.iter().map(|e| e.data.len() + e.context.len() + 32).sum();
        entries + self.meta.as_ref().map_or(0, Vec::len) + 128
    }
}

/// One step of the caller's, reported durable by its number.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Chosen by the caller, counting upward.
    pub number: u64,
    /// Written together.
    pub writes: Vec<LogWrite>,
}

/// What was found of one replica.
#[derive(Clone, Debug, PartialEq)]
pub struct RecoveredGroup {
    /// The replica.
    pub group: u64,
    /// What was last written as `meta`; empty if nothing was.
    pub meta: Vec<u8>,
    /// Term, vote and commit index as last written; all zero if nothing was.
    pub hard: HardState,
    /// Index of the last compacted entry, or zero. The first of `entries` follows it.
    pub compacted_to: u64,
    /// Term of that entry; unknown after a compaction beyond the last index, which a snapshot explains.
    pub compacted_term: Option<u64>,
    /// All that is kept, without gaps.
    pub entries: Vec<Entry>,
}

impl RecoveredGroup {
    /// Index of the last entry, or of the last compacted one.
    pub fn last_index(&self) -> u64 {
        self.compacted_to + self.entries.len() as u64
    }
}

/// Sizes of the log. All in bytes.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// A file that has reached this size is closed and another one begun. Default 32 MiB; at least 4 KiB.
    pub target_file_bytes: u64,
    /// When the files of the append queue together are larger, what is still alive in the oldest is rewritten and they are
    /// deleted. Default 256 MiB; at least `target_file_bytes`.
    pub purge_threshold_bytes: u64,
}

impl Default for LogOptions {
    fn default() -> Self {
        LogOptions { target_file_bytes: 32 << 20, purge_threshold_bytes: 256 << 20 }
    }
}

impl LogOptions {
    /// The largest size of the log directory, for `live` bytes of entries that are not compacted, as long as
    /// [`super::LogWriter`] is used (or [`Purger::purge`] called each `target_file_bytes` of writes) and no write is larger
    /// than `target_file_bytes`: the threshold, half of it that may be written while a purge runs, ten files for groups
    /// that do not heed ten requests to compact, and what is alive, rewritten, with its share of garbage, twice while that
    /// is rewritten itself.
    ///
    /// What is alive is the caller's: it compacts the groups that a purge names. Entries of very different size in
    /// different groups can make the last share larger, since raft-engine counts garbage in entries. Up to a fifth of a
    /// group's entries may be compacted but not yet forgotten; they count as alive.
    pub fn disk_bound(&self, live: u64) -> u64 {
        let append = self.purge_threshold_bytes + self.purge_threshold_bytes / 2 + 10 * self.target_file_bytes;
        let rewrite = 2 * (self.rewrite_threshold().max(live.saturating_mul(5) / 2) + self.target_file_bytes);
        append + rewrite
    }

    fn rewrite_threshold(&self) -> u64 {
        (self.purge_threshold_bytes / 10).max(self.target_file_bytes)
    }

    fn config(&self, dir: &Path) -> Result<Config, LogError> {
        let text = dir.to_str().ok_or_else(|| LogError::Options("the directory's name is not UTF-8".into()))?;
        if self.target_file_bytes < 4096 || self.purge_threshold_bytes < self.target_file_bytes {
            return Err(LogError::Options(format!(
                "target_file_bytes is {} and purge_threshold_bytes {}, but they must be at least 4096 and ascending",
                self.target_file_bytes, self.purge_threshold_bytes
            )));
        }
        Ok(Config {
            dir: text.into(),
            recovery_mode: RecoveryMode::TolerateTailCorruption,
            // One thread reads the files in order; more would merge partial states, with assertions of their own.
            recovery_threads: 1,
            batch_compression_threshold: ReadableSize(0),
            target_file_size: ReadableSize(self.target_file_bytes),
            purge_threshold: ReadableSize(self.purge_threshold_bytes),
            purge_rewrite_threshold: Some(ReadableSize(self.rewrite_threshold())),
            // Recycled files would hold half as much again as the threshold, and old bytes behind the end.
            enable_log_recycle: false,
            ..Config::default()
        })
    }
}

/// Why the log cannot be opened or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// Settings that cannot work.
    #[error("the log's settings cannot work: {0}")]
    Options(String),
    /// There is no log where one was kept: begin a new life.
    #[error("there is no log in {dir}, though one was kept there: it was lost")]
    Missing {
        /// The log's directory.
        dir: PathBuf,
    },
    /// Writes that were reported durable are gone: begin a new life.
    #[error("the log has lost its tail: {synced} writes were synced, but only {recovered} are there")]
    LostTail {
        /// Sequence of the last write that was synced, at least.
        synced: u64,
        /// Sequence of the last write that was found.
        recovered: u64,
    },
    /// Something in the log cannot be read or does not fit together: begin a new life, after looking at the disk.
    #[error("the log is damaged: {0}")]
    Corrupt(String),
    /// The disk or the file system failed: look at it, then start again.
    #[error("the log cannot be accessed: {0}")]
    Io(String),
    /// The caller asked for something that cannot be kept, such as a hole; a mistake in this program.
    #[error("a write does not fit the log: {0}")]
    BadWrite(String),
    /// A write or sync failed; nothing of it may be relied upon and nothing more is written. Stop the node.
    #[error("the log has stopped: {0}")]
    Stopped(String),
}

impl LogError {
    /// Whether the log of this life is lost, so that only a new life helps ([`super::DataDir::new_life`]); otherwise the
    /// log may well be whole.
    pub fn is_lost(&self) -> bool {
        matches!(self, LogError::Missing { .. } | LogError::LostTail { .. } | LogError::Corrupt(_))
    }

    fn io(what: impl std::fmt::Display, e: &io::Error) -> Self {
        LogError::Io(format!("{what}: {e}"))
    }
}

/// Entries as raft-engine wants to see them.
struct Entries;

impl MessageExt for Entries {
    type Entry = Entry;
    fn index(e: &Entry) -> u64 {
        e.index
    }
}

/// What is written of a group with each of its writes.
#[derive(Serialize, Deserialize)]
struct StateValue {
    term: u64,
    vote: u64,
    commit: u64,
    compacted: u64,
    compacted_term: Option<u64>,
    last: u64,
    runs: u64,
}

/// A group in memory: enough to refuse holes and to prove what recovery returns.
#[derive(Debug, Default)]
struct Group {
    hard: HardState,
    compacted: u64,
    compacted_term: Option<u64>,
    /// What raft-engine was told to compact, at most `compacted`.
    told: u64,
    last: u64,
    /// The terms of the live entries: each run's first index and its term.
    runs: Vec<(u64, u64)>,
    meta_hash: u64,
    /// This group's part of the fingerprint; zero while it was never written.
    print: u64,
}

impl Group {
    fn term(&self, index: u64) -> Option<u64> {
        let i = self.runs.partition_point(|&(first, _)| first <= index);
        (index <= self.last).then(|| i.checked_sub(1).map(|i| self.runs[i].1)).flatten()
    }

    fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let keep = self.runs.partition_point(|&(start, _)| start < first.index);
        self.runs.truncate(keep);
        for e in entries {
            if self.runs.last().is_none_or(|&(_, term)| term != e.term) {
                self.runs.push((e.index, e.term));
            }
            self.last = e.index;
        }
    }

    fn compact(&mut self, to: u64) {
        if to <= self.compacted {
            return;
        }
        self.compacted_term = self.term(to);
        self.compacted = to;
        if to >= self.last {
            self.last = to;
            self.runs.clear();
            return;
        }
        let gone = self.runs.partition_point(|&(start, _)| start <= to + 1);
        self.runs.drain(..gone.saturating_sub(1));
        if let Some(first) = self.runs.first_mut() {
            first.0 = to + 1;
        }
    }

    /// Tells raft-engine of a compaction when it is worth it: it copies the whole index of the group at each. At once when
    /// nothing is left, since what follows may leave a gap behind what raft-engine has.
    fn tell(&mut self, id: u64, chunk: &mut LogBatch) {
        let (untold, live) = (self.compacted - self.told, self.last - self.compacted);
        if untold > live / 4 {
            chunk.add_command(id, Command::Compact { index: self.compacted + 1 });
            self.told = self.compacted;
        }
    }

    fn runs_hash(&self) -> u64 {
        let bytes: Vec<u8> =
            self.runs.iter().flat_map(|&(i, t)| [i.to_le_bytes(), t.to_le_bytes()]).flatten().collect();
        xxh3_64(&bytes)
    }

    fn value(&self) -> Vec<u8> {
        let value = StateValue {
            term: self.hard.term,
            vote: self.hard.vote,
            commit: self.hard.commit,
            compacted: self.compacted,
            compacted_term: self.compacted_term,
            last: self.last,
            runs: self.runs_hash(),
        };
        postcard::to_stdvec(&value).expect("a struct of numbers always encodes")
    }
}

/// Never zero, so that a group without a value is told from one with it.
fn print_of(group: u64, state: &[u8], meta_hash: u64) -> u64 {
    xxh3_64_with_seed(state, xxh3_64_with_seed(&meta_hash.to_le_bytes(), group)) | 1
}

/// The end of each batch.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Record {
    sequence: u64,
    /// Everything up to here was synced before this was written.
    synced: u64,
    groups: u64,
    fingerprint: u64,
}

impl Record {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut out = [0; RECORD_BYTES];
        out[..8].copy_from_slice(RECORD_MAGIC);
        for (i, n) in [self.sequence, self.synced, self.groups, self.fingerprint].into_iter().enumerate() {
            out[8 + 8 * i..16 + 8 * i].copy_from_slice(&n.to_le_bytes());
        }
        let sum = xxh3_64(&out[..RECORD_BYTES - 8]);
        out[RECORD_BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    fn parse(bytes: &[u8]) -> Option<Record> {
        let n = |i: usize| Some(u64::from_le_bytes(bytes.get(8 + 8 * i..16 + 8 * i)?.try_into().ok()?));
        let record = Record { sequence: n(0)?, synced: n(1)?, groups: n(2)?, fingerprint: n(3)? };
        (bytes == record.encode()).then_some(record)
    }
}

type Raw = Engine<FusedFs>;

/// The open log. One owner writes; [`Purger`] may run beside it.
pub struct LogEngine {
    raw: Arc<Raw>,
    fuse: Arc<Fuse>,
    marker: Marker,
    groups: HashMap<u64, Group>,
    fingerprint: u64,
    sequence: u64,
    synced: u64,
    options: LogOptions,
}

impl std::fmt::Debug for LogEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogEngine").field("sequence", &self.sequence).field("groups", &self.groups.len()).finish()
    }
}

impl LogEngine {
    /// Prepares an empty log in a directory that holds none, durably; [`super::DataDir`] does so at the beginning of each
    /// life. [`LogEngine::open`] never creates one, since a log that is not there was lost.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(dir: &Path) -> io::Result<()> {
        create_dir(&dir.join("raft"))?;
        Marker::create(dir)
    }

    /// Opens the log in `dir` and returns all that is in it, which is all that was ever reported durable, proved as
    /// described at the head of this module. What it returns is durable as well: a tail that an earlier process wrote but
    /// did not sync is synced first.
    ///
    /// # Errors
    /// [`LogError::is_lost`] tells whether a new life is needed. A damaged log stays refused however often it is opened.
    pub fn open(dir: &Path, options: LogOptions) -> Result<(LogEngine, Vec<RecoveredGroup>), LogError> {
        let raft = dir.join("raft");
        let config = options.config(&raft)?;
        let (mut marker, marked) = match Marker::open(dir).map_err(|e| LogError::io("the file `synced`", &e))? {
            Found::At(marker, sequence) => (marker, sequence),
            Found::Missing => return Err(LogError::Missing { dir: dir.into() }),
            Found::Damaged => return Err(LogError::Corrupt("the file `synced` cannot be read".into())),
        };
        let survey = Survey::of(&raft)?;
        let synced = marked.max(survey.records.iter().map(|r| r.1.synced).max().unwrap_or(0));
        if synced > marked {
            // So that a second opening knows it too, after recovery has cut off the bytes that say so.
            marker.record(synced).and_then(|()| marker.sync()).map_err(|e| LogError::io("the file `synced`", &e))?;
        }
        let mut recovered = Recovered::read(&config);
        if let (Err(LogError::Corrupt(_)), Some(last)) = (&recovered, &survey.last) {
            // Damage among writes that nobody was told of: cut them off. What is cut must not have been synced.
            let end = survey.records.iter().filter(|r| r.1.sequence <= synced).map(|r| r.0).max().unwrap_or(0);
            if survey.records.iter().any(|r| r.1.sequence > synced) {
                cut(last, end).map_err(|e| LogError::io(last.display(), &e))?;
                recovered = Recovered::read(&config);
            }
        }
        let Recovered { raw, fuse, groups, states, record } = recovered?;
        if record.sequence < synced {
            fuse.blow("lost tail");
            return Err(LogError::LostTail { synced, recovered: record.sequence });
        }
        let mut engine = LogEngine {
            raw: Arc::new(raw),
            fuse,
            marker,
            fingerprint: record.fingerprint,
            groups: states,
            sequence: record.sequence,
            synced,
            options,
        };
        // A compaction that raft-engine has forgotten is told again: it would see a hole behind what it brought back.
        let mut first = LogBatch::default();
        for (&id, group) in &mut engine.groups {
            if engine.raw.first_index(id).is_some_and(|first| first <= group.compacted) {
                first.add_command(id, Command::Compact { index: group.compacted + 1 });
            }
            group.told = group.compacted;
        }
        // What an earlier process wrote but did not sync is handed out as durable, so it is made so; and the names of the
        // first files, which raft-engine does not sync.
        catch_unwind(AssertUnwindSafe(|| engine.write_chunk(&mut first, true)))
            .unwrap_or_else(|panic| Err(LogError::Stopped(panic_text(&*panic))))
            .map_err(|e| LogError::Io(e.to_string()))?;
        sync_dir(&raft).map_err(|e| LogError::io(raft.display(), &e))?;
        engine.note_synced().map_err(|e| LogError::Io(e.to_string()))?;
        Ok((engine, groups))
    }

    /// Writes everything of these batches and syncs once. When it returns `Ok`, all of it is durable.
    ///
    /// # Errors
    /// [`LogError::BadWrite`] and [`LogError::Stopped`]: nothing of the batches may be relied upon (a part may be found
    /// after a restart), and every later call is refused with [`LogError::Stopped`].
    pub fn write(&mut self, batches: &[Batch]) -> Result<(), LogError> {
        if let Some(why) = self.fuse.blown() {
            return Err(LogError::Stopped(why.into()));
        }
        let result = catch_unwind(AssertUnwindSafe(|| self.try_write(batches)))
            .unwrap_or_else(|panic| Err(LogError::Stopped(panic_text(&*panic))));
        if let Err(e) = &result {
            self.fuse.blow(e.to_string());
        }
        result
    }

    fn try_write(&mut self, batches: &[Batch]) -> Result<(), LogError> {
        let mut chunk = LogBatch::default();
        let mut bytes = 0;
        let mut writes = batches.iter().flat_map(|b| &b.writes).peekable();
        if writes.peek().is_none() {
            return Ok(());
        }
        while let Some(write) = writes.next() {
            self.add(&mut chunk, write)?;
            bytes += write.approximate_bytes();
            let next = writes.peek().map(|w| w.approximate_bytes());
            if next.is_none_or(|next| bytes + next > CHUNK_BYTES) {
                self.write_chunk(&mut chunk, next.is_none())?;
                bytes = 0;
            }
        }
        self.note_synced()
    }

    /// Adds one replica's write to a chunk and to the state in memory.
    fn add(&mut self, chunk: &mut LogBatch, write: &LogWrite) -> Result<(), LogError> {
        let id = write.group;
        let bad = |what: String| Err(LogError::BadWrite(format!("replica {id}: {what}")));
        if id == RECORD_REGION {
            return bad("this id is reserved".into());
        }
        if write.remove {
            if !write.entries.is_empty() || write.hard.is_some() || write.meta.is_some() || write.compact_to.is_some() {
                return bad("removed and written at once".into());
            }
            if let Some(gone) = self.groups.remove(&id) {
                self.fingerprint ^= gone.print;
                chunk.add_command(id, Command::Clean);
            }
            return Ok(());
        }
        let group = self.groups.entry(id).or_default();
        if let (Some(first), Some(to)) = (write.entries.first(), write.compact_to)
            && to > group.last
            && first.index == to + 1
        {
            group.compact(to);
            group.tell(id, chunk);
        }
        if let Some(first) = write.entries.first() {
            if first.index <= group.compacted || first.index > group.last + 1 {
                let (after, last) = (group.compacted, group.last);
                return bad(format!("entries from {} do not join a log of {after}+1..={last}", first.index));
            }
            if let Some(w) = write.entries.windows(2).find(|w| w[0].index + 1 != w[1].index) {
                return bad(format!("entry {} follows entry {}", w[1].index, w[0].index));
            }
            group.append(&write.entries);
            chunk.add_entries::<Entries>(id, &write.entries).map_err(|e| LogError::BadWrite(e.to_string()))?;
        }
        if let Some(to) = write.compact_to.filter(|&to| to > group.compacted) {
            group.compact(to);
            group.tell(id, chunk);
        }
        if let Some(hard) = &write.hard {
            group.hard = hard.clone();
        }
        if group.hard.commit > group.last {
            let (commit, last) = (group.hard.commit, group.last);
            return bad(format!("commit index {commit} is beyond the last index {last}"));
        }
        let put = |chunk: &mut LogBatch, key: &[u8], value| {
            chunk.put(id, key.to_vec(), value).map_err(|e| LogError::BadWrite(e.to_string()))
        };
        if let Some(meta) = &write.meta {
            if meta.len() > MAX_META_BYTES {
                return bad(format!("its meta has {} bytes, more than {MAX_META_BYTES}", meta.len()));
            }
            group.meta_hash = xxh3_64(meta);
            put(chunk, KEY_META, meta.clone())?;
        }
        let value = group.value();
        let print = print_of(id, &value, group.meta_hash);
        self.fingerprint ^= group.print ^ print;
        group.print = print;
        put(chunk, KEY_STATE, value)
    }

    /// Closes a chunk with its record and hands it to raft-engine.
    fn write_chunk(&mut self, chunk: &mut LogBatch, sync: bool) -> Result<(), LogError> {
        let record = Record {
            sequence: self.sequence + 1,
            synced: self.synced,
            groups: self.groups.len() as u64,
            fingerprint: self.fingerprint,
        };
        // Last, so that the end of the batch is found from the end of the record.
        chunk
            .put(RECORD_REGION, KEY_RECORD.to_vec(), record.encode().to_vec())
            .map_err(|e| LogError::BadWrite(e.to_string()))?;
        let result = self.raw.write(chunk, sync);
        if let Some(why) = self.fuse.blown() {
            return Err(LogError::Stopped(why.into()));
        }
        result.map_err(|e| LogError::Stopped(e.to_string()))?;
        self.sequence = record.sequence;
        Ok(())
    }

    /// Notes that everything written is synced, before anybody hears of it.
    fn note_synced(&mut self) -> Result<(), LogError> {
        if let Err(e) = self.marker.record(self.sequence) {
            let why = format!("writing the file `synced` failed: {e}");
            self.fuse.blow(why.clone());
            return Err(LogError::Stopped(why));
        }
        self.synced = self.sequence;
        Ok(())
    }

    /// Sequence of the last write; all up to it are synced unless the log has stopped.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The options it was opened with.
    pub fn options(&self) -> LogOptions {
        self.options
    }

    /// Frees disk space; may be used on any thread while this engine is written.
    pub fn purger(&self) -> Purger {
        Purger { raw: self.raw.clone(), fuse: self.fuse.clone() }
    }

    #[cfg(test)]
    pub(super) fn fuse(&self) -> Arc<Fuse> {
        self.fuse.clone()
    }
}

/// Frees disk space of a log.
#[derive(Clone)]
pub struct Purger {
    raw: Arc<Raw>,
    fuse: Arc<Fuse>,
}

impl std::fmt::Debug for Purger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Purger").finish_non_exhaustive()
    }
}

impl Purger {
    /// Deletes files that nothing alive is in, after rewriting the little that is, and returns the replicas that hold up
    /// more because much of theirs is alive: checkpoint and compact them. Cheap when there is nothing to do.
    ///
    /// # Errors
    /// [`LogError::Stopped`]; the log is not written any more, by nobody.
    pub fn purge(&self) -> Result<Vec<u64>, LogError> {
        if let Some(why) = self.fuse.blown() {
            return Err(LogError::Stopped(why.into()));
        }
        let purged = on_fresh_thread(|| self.raw.purge_expired_files().map_err(of_recovery));
        if let Some(why) = self.fuse.blown() {
            return Err(LogError::Stopped(why.into()));
        }
        let mut groups = purged.and_then(|r| r).map_err(|e| {
            let why = format!("purging failed: {e}");
            self.fuse.blow(why.clone());
            LogError::Stopped(why)
        })?;
        groups.retain(|&g| g != RECORD_REGION);
        groups.sort_unstable();
        Ok(groups)
    }

    /// The failure that stopped the log, if one did.
    pub fn stopped(&self) -> Option<String> {
        self.fuse.blown().map(String::from)
    }

    /// Stops the log: nothing is written any more.
    pub(super) fn stop(&self, why: &str) {
        self.fuse.blow(why);
    }
}

/// Runs something of raft-engine's that reads on a thread that has seen no other engine. It panics on what it does not
/// expect to find.
fn on_fresh_thread<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, LogError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("crema-log-read".into()).spawn_scoped(scope, f);
        match thread {
            Ok(thread) => thread.join().map_err(|panic| LogError::Corrupt(panic_text(&*panic))),
            Err(e) => Err(LogError::io("no thread can be started", &e)),
        }
    })
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic in the log: {}", text.unwrap_or("without a message"))
}

/// Cuts a log file, durably.
fn cut(path: &Path, end: u64) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    file.set_len(end)?;
    file.sync_all()
}

/// A look at the files before raft-engine touches them.
struct Survey {
    /// The last file of the append queue: the only one that may have a torn end.
    last: Option<PathBuf>,
    /// All records in its raw bytes, whatever lies between them, each with the offset of the end of its batch.
    records: Vec<(u64, Record)>,
}

impl Survey {
    fn of(raft: &Path) -> Result<Survey, LogError> {
        let mut survey = Survey { last: None, records: Vec::new() };
        for suffix in [".raftlog", ".rewrite"] {
            let files = numbered(raft, suffix)?;
            if let Some(w) = files.windows(2).find(|w| w[0].0 + 1 != w[1].0) {
                return Err(LogError::Corrupt(format!("files between {} and {} are gone", w[0].0, w[1].0)));
            }
            let count = files.len();
            for (i, (_, path)) in files.into_iter().enumerate() {
                let last = i + 1 == count;
                let io = |e: &io::Error| LogError::io(path.display(), e);
                let file = File::open(&path).map_err(|e| io(&e))?;
                // After a failed write-back the cache may hold pages that the disk does not.
                #[cfg(any(target_os = "linux", target_os = "android"))]
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                let damage = check_headers(&file, last).map_err(|e| io(&e))?;
                if let Some(what) = damage {
                    return Err(LogError::Corrupt(format!("{}: {what}", path.display())));
                }
                if last && suffix == ".raftlog" {
                    survey.records = records(&file).map_err(|e| io(&e))?;
                    survey.last = Some(path);
                }
            }
        }
        Ok(survey)
    }
}

fn numbered(dir: &Path, suffix: &str) -> Result<Vec<(u64, PathBuf)>, LogError> {
    let io = |e: io::Error| LogError::io(dir.display(), &e);
    let mut files = Vec::new();
    let listing = match std::fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(files),
        Err(e) => return Err(io(e)),
    };
    for entry in listing {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_suffix(suffix)).and_then(|n| n.parse().ok());
        if let Some(number) = number {
            files.push((number, entry.path()));
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// Checks the bytes that no checksum of raft-engine covers: the header of the file, and of each batch the byte that says
/// whether it is compressed. Stops at the first batch that cannot be one; that is recovery's to judge.
fn check_headers(file: &File, last: bool) -> io::Result<Option<String>> {
    let size = file.metadata()?.len();
    let mut bytes = vec![0; (FILE_MAGIC.len() + VERSION_2.len()).min(size as usize)];
    file.read_exact_at(&mut bytes, 0)?;
    let version = bytes.strip_prefix(FILE_MAGIC);
    let mut at = match version {
        Some(VERSION_2) => bytes.len() as u64,
        Some(v) if v.starts_with(VERSION_1) => (FILE_MAGIC.len() + VERSION_1.len()) as u64,
        _ => {
            // The header is synced before anything follows, so a torn one is followed by nothing.
            let expected = FILE_MAGIC.iter().chain(VERSION_2);
            let whole = bytes.iter().zip(expected).take_while(|(a, b)| a == b).count();
            let torn = last && bytes[whole..].iter().all(|&b| b == 0) && all_zero(file, bytes.len() as u64, size)?;
            return Ok((!torn).then(|| "its header is damaged".into()));
        }
    };
    while at + BATCH_HEADER_BYTES <= size {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, at)?;
        let word = u64::from_be_bytes(word);
        let (len, compression) = (word >> 8, word & 0xff);
        if len < BATCH_HEADER_BYTES || len > size - at {
            break;
        }
        if compression != 0 {
            return Ok(Some(format!("the header of the batch at {at} is damaged")));
        }
        at += len;
    }
    Ok(None)
}

fn all_zero(file: &File, mut from: u64, to: u64) -> io::Result<bool> {
    let mut buffer = vec![0; 64 << 10];
    while from < to {
        let bytes = &mut buffer[..(to - from).min(64 << 10) as usize];
        file.read_exact_at(bytes, from)?;
        if bytes.iter().any(|&b| b != 0) {
            return Ok(false);
        }
        from += bytes.len() as u64;
    }
    Ok(true)
}

/// All whole records in a file, by their looks.
fn records(file: &File) -> io::Result<Vec<(u64, Record)>> {
    const STEP: usize = 1 << 20;
    let mut found = Vec::new();
    let size = file.metadata()?.len();
    let mut buffer = vec![0; STEP + RECORD_BYTES - 1];
    let mut at = 0;
    while at < size {
        let len = ((size - at) as usize).min(buffer.len());
        let bytes = &mut buffer[..len];
        file.read_exact_at(bytes, at)?;
        let mut from = 0;
        // A record that begins in this step lies wholly in the buffer.
        while let Some(i) = find(&bytes[from..], RECORD_MAGIC).map(|i| i + from).filter(|&i| i < STEP) {
            if let Some(record) = bytes.get(i..i + RECORD_BYTES).and_then(Record::parse) {
                found.push((at + (i + RECORD_BYTES) as u64 + BATCH_TRAILER_BYTES, record));
            }
            from = i + 1;
        }
        at += STEP as u64;
    }
    Ok(found)
}

fn find(hay: &[u8], needle: &[u8; 8]) -> Option<usize> {
    let mut from = 0;
    while let Some(i) = hay[from..].iter().position(|&b| b == needle[0]) {
        if hay[from + i..].starts_with(needle) {
            return Some(from + i);
        }
        from += i + 1;
    }
    None
}

/// What raft-engine recovered, proved against the last record.
struct Recovered {
    raw: Raw,
    fuse: Arc<Fuse>,
    groups: Vec<RecoveredGroup>,
    states: HashMap<u64, Group>,
    record: Record,
}

impl Recovered {
    fn read(config: &Config) -> Result<Recovered, LogError> {
        let fuse = Arc::new(Fuse::default());
        let result = on_fresh_thread(|| {
            let fs = Arc::new(FusedFs { fuse: fuse.clone() });
            let raw = Engine::open_with_file_system(config.clone(), fs).map_err(of_recovery)?;
            let read = Self::prove(&raw);
            if read.is_err() {
                // Closing must not change what is there.
                fuse.blow("the log was refused");
            }
            read.map(|(groups, states, record)| (raw, groups, states, record))
        });
        let (raw, groups, states, record) = result.and_then(|r| r)?;
        if let Some(why) = fuse.blown() {
            return Err(LogError::Io(why.into()));
        }
        Ok(Recovered { raw, fuse, groups, states, record })
    }

    #[expect(clippy::type_complexity, reason = "taken apart by the only caller")]
    fn prove(raw: &Raw) -> Result<(Vec<RecoveredGroup>, HashMap<u64, Group>, Record), LogError> {
        let mut groups = Vec::new();
        let mut states = HashMap::new();
        let mut fingerprint = 0;
        let mut ids = raw.raft_groups();
        ids.sort_unstable();
        ids.retain(|&id| id != RECORD_REGION);
        for id in ids {
            // raft-engine keeps the shell of a group in which there is nothing.
            let Some(value) = raw.get(id, KEY_STATE) else {
                if raw.first_index(id).is_some() || raw.get(id, KEY_META).is_some() {
                    return Err(LogError::Corrupt(format!("replica {id} has entries but no state")));
                }
                continue;
            };
            let (group, state) = read_group(raw, id, &value)?;
            fingerprint ^= state.print;
            groups.push(group);
            states.insert(id, state);
        }
        let record = match raw.get(RECORD_REGION, KEY_RECORD) {
            None => Record { sequence: 0, synced: 0, groups: 0, fingerprint: 0 },
            Some(bytes) => {
                Record::parse(&bytes).ok_or_else(|| LogError::Corrupt("the last record is damaged".into()))?
            }
        };
        if record.fingerprint != fingerprint || record.groups != groups.len() as u64 {
            return Err(LogError::Corrupt(format!(
                "write {} left {} replicas in another state than the {} that are there",
                record.sequence,
                record.groups,
                groups.len()
            )));
        }
        Ok((groups, states, record))
    }
}

fn of_recovery(e: raft_engine::Error) -> LogError {
    match e {
        raft_engine::Error::Io(e) if e.kind() != io::ErrorKind::InvalidData => LogError::Io(e.to_string()),
        // Its lock, which another process holds, and what it cannot do.
        raft_engine::Error::Other(e) => LogError::Io(e.to_string()),
        e => LogError::Corrupt(e.to_string()),
    }
}

fn read_group(raw: &Raw, id: u64, value: &[u8]) -> Result<(RecoveredGroup, Group), LogError> {
    let corrupt = |what: String| LogError::Corrupt(format!("replica {id}: {what}"));
    let state: StateValue = postcard::from_bytes(value).map_err(|e| corrupt(format!("its state is damaged: {e}")))?;
    let meta = raw.get(id, KEY_META).unwrap_or_default();
    let mut entries = Vec::new();
    if let (Some(first), Some(last)) = (raw.first_index(id), raw.last_index(id)) {
        // raft-engine may bring back what is no longer there: entries whose compaction was in a file that is purged by
        // now, and a tail that was replaced and then compacted away, if it had been rewritten before. The state knows
        // both ends.
        let (first, last) = (first.max(state.compacted + 1), last.min(state.last));
        if first <= last {
            raw.fetch_entries_to::<Entries>(id, first, last + 1, None, &mut entries).map_err(of_recovery)?;
        }
    }
    let hard = HardState { term: state.term, vote: state.vote, commit: state.commit, ..HardState::default() };
    let mut group = Group {
        hard: hard.clone(),
        compacted: state.compacted,
        compacted_term: state.compacted_term,
        last: state.compacted,
        meta_hash: raw.get(id, KEY_META).map_or(0, |m| xxh3_64(&m)),
        ..Group::default()
    };
    let follow = entries.iter().zip(state.compacted + 1..).all(|(e, i)| e.index == i);
    group.append(&entries);
    if !follow || group.last != state.last || group.runs_hash() != state.runs {
        return Err(corrupt(format!(
            "its entries are not those of {}+1..={} that were written",
            state.compacted, state.last
        )));
    }
    if hard.commit > group.last {
        return Err(corrupt(format!("commit index {} is beyond the last index {}", hard.commit, group.last)));
    }
    group.print = print_of(id, value, group.meta_hash);
    let recovered = RecoveredGroup {
        group: id,
        meta,
        hard,
        compacted_to: state.compacted,
        compacted_term: state.compacted_term,
        entries,
    };
    Ok((recovered, group))
}
