//! What stands between the driver and the disk: opening what was kept, and the threads that write.
//!
//! ```text
//!   start:   data dir -> identity -> log -> states, read side by side -> Recovered, for the host
//!              \-- the log, or a state that it stands on, is lost -> a new life, empty: peers will fill it
//!
//!   driver --batch--> LogWriter (a thread: one write and one sync for all that waits) --durable up to n--> driver
//!          --piece--> states' thread (a file a replica) ------------------------------StateWritten-------> driver
//! ```
//!
//! The driver never waits for a sync. It waits only when more is queued than may be lost to a slow disk, and nothing here
//! ever waits for the driver but the states' thread, which it does not wait for.
//!
//! A failed write, of log or state, is the end of the node: what the file system holds after it is unknown
//! (fsync errors are not repeatable), and another life can be filled by the others.

use crate::clock;
use crate::disk::checkpoint::{self, CheckpointError, CheckpointReader, CheckpointWriter};
use crate::disk::{
    Batch, CheckpointId, DataDir, DirError, Identity, LogEngine, LogOptions, LogStats, LogWriter, Mode, SubmitError,
};
use crate::driver::Input;
use bytes::Bytes;
use crema_core::{CodecError, NodeId, ReplicaId};
use crema_shard::durable::{GroupRecord, Recovered};
use crema_shard::{PersistBatch, StateWrite};
use crossbeam::channel::{Receiver, Sender, unbounded};
use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Least bytes of log files before old ones are looked at.
const LEAST_LOG_FILES: u64 = 64 << 20;
/// Between two tries to queue a batch behind a slow disk.
const QUEUE_WAIT: Duration = Duration::from_micros(200);
/// A disk that takes nothing for so long has failed: meanwhile the driver serves nobody, not even those whose deadlines pass.
const PATIENCE: Duration = Duration::from_secs(10);

/// A data directory that was opened, and what it held.
#[derive(Debug)]
pub struct Opened {
    dir: DataDir,
    options: LogOptions,
    engine: LogEngine,
    /// The replicas that come back.
    pub recovered: Vec<Recovered>,
}

/// Why a data directory cannot be used; a sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// It belongs to another node or cluster, is in use, or cannot be read: the operator decides.
    #[error("{0}")]
    Directory(#[from] DirError),
    /// The disk failed.
    #[error("the data directory {path} cannot be used: {reason}")]
    Disk {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
}

impl Opened {
    /// Opens `path` for this node, creating it if need be, and reads all that is in it. Takes as long as that takes: call
    /// it where blocking is allowed. `log_bytes` is how far the log grows before states are written
    /// (`checkpoint_log_bytes` of the configuration); old log files are looked at after half as much.
    ///
    /// What is lost or damaged is not an error: the node then begins a new life there, with an incarnation of `draw`, and
    /// the log says why.
    pub fn open(
        path: &Path,
        node: NodeId,
        cluster: &str,
        log_bytes: u64,
        draw: impl Fn() -> Result<u128, String>,
    ) -> Result<Opened, StorageError> {
        let options =
            LogOptions { purge_threshold_bytes: (log_bytes / 2).max(LEAST_LOG_FILES), ..LogOptions::default() };
        let began = clock::mono();
        let disk = |reason: String| StorageError::Disk { path: path.to_owned(), reason };
        let (mut dir, _) = DataDir::open(path, node.0, cluster, Mode::Durable)?;
        loop {
            match read(&dir, options) {
                Ok((engine, recovered)) => {
                    if !recovered.is_empty() {
                        let entries: usize = recovered.iter().map(|r| r.entries.len()).sum();
                        let took = clock::mono().since(began);
                        tracing::info!(path = %path.display(), replicas = recovered.len(), entries, ?took, "read from disk");
                    }
                    return Ok(Opened { dir, options, engine, recovered });
                }
                Err(Unread::Lost(why)) => {
                    tracing::error!(
                        path = %path.display(), %why,
                        "what this node kept on disk is lost: it begins a new life and is filled by the others"
                    );
                    dir.new_life(draw().map_err(disk)?)?;
                }
                Err(Unread::Failed(why)) => return Err(disk(why)),
            }
        }
    }

    /// Gives up what was read: the host cannot take it up. The node begins a new life.
    pub fn lost(self, why: &str, draw: impl Fn() -> Result<u128, String>) -> Result<Opened, StorageError> {
        let Opened { mut dir, options, engine, recovered } = self;
        drop((engine, recovered));
        tracing::error!(%why, "what this node kept on disk is lost: it begins a new life and is filled by the others");
        let failed = |reason: String| StorageError::Disk { path: PathBuf::new(), reason };
        dir.new_life(draw().map_err(failed)?)?;
        match read(&dir, options) {
            Ok((engine, recovered)) => Ok(Opened { dir, options, engine, recovered }),
            Err(Unread::Lost(reason) | Unread::Failed(reason)) => Err(failed(reason)),
        }
    }

    /// Who this node is.
    pub fn identity(&self) -> Identity {
        self.dir.identity()
    }

    /// Starts the threads that write. `inputs` is the way back to the driver.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(self, inputs: Sender<Input>) -> Result<(Storage, Arc<Mutex<DataDir>>), String> {
        let states_dir = self.dir.checkpoint_dir().ok_or("a directory without states")?;
        let shared = Arc::new(Shared::default());
        let (tell, wake) = (shared.clone(), inputs.clone());
        let done = move |result: Result<u64, String>| {
            match result {
                Ok(number) => tell.durable.store(number, Ordering::Release),
                Err(why) => tell.fail(format!("the log cannot be written: {why}")),
            }
            // Full: the driver is awake anyway, and looks after each round.
            let _ = wake.try_send(Input::Durable);
        };
        let (tell, wake) = (shared.clone(), inputs.clone());
        let compact = move |groups: Vec<u64>| {
            let mut wanted = tell.compact.lock().unwrap_or_else(PoisonError::into_inner);
            *wanted = groups.into_iter().map(ReplicaId).collect();
            drop(wanted);
            let _ = wake.try_send(Input::Durable);
        };
        let log = LogWriter::start(self.engine, done, compact).map_err(|e| e.to_string())?;
        let (states, jobs) = unbounded();
        let worker = States { dir: states_dir, files: HashMap::new(), shared: shared.clone(), inputs };
        let thread = std::thread::Builder::new()
            .name("crema-states".to_owned())
            .spawn(move || worker.run(&jobs))
            .map_err(|e| e.to_string())?;
        let storage = Storage {
            log: Some(log),
            states: Some(states),
            thread: Some(thread),
            shared,
            seen: 0,
            superseding: VecDeque::new(),
            removing: VecDeque::new(),
        };
        Ok((storage, Arc::new(Mutex::new(self.dir))))
    }
}

enum Unread {
    /// It was lost or damaged: a new life may begin.
    Lost(String),
    /// The disk or the system fails now; what is there may be well.
    Failed(String),
}

/// Reads everything that a data directory holds.
fn read(dir: &DataDir, options: LogOptions) -> Result<(LogEngine, Vec<Recovered>), Unread> {
    let (Some(log), Some(states)) = (dir.log_dir(), dir.checkpoint_dir()) else {
        return Err(Unread::Failed("it keeps no log".to_owned()));
    };
    let opened = LogEngine::open(&log, options);
    let (engine, groups) =
        opened.map_err(|e| if e.is_lost() { Unread::Lost(e.to_string()) } else { Unread::Failed(e.to_string()) })?;
    // Exactly the files that records name: a newer one may have been finished when its record was not durable yet, or may
    // have come from a leader and never been installed.
    let mut named = Vec::new();
    for group in groups.iter().filter(|g| !g.meta.is_empty()) {
        let record = GroupRecord::decode(&group.meta).map_err(|e| unread(group.group, &e))?;
        named.extend(record.point().map(|p| CheckpointId { group: group.group, index: p.index }));
    }
    checkpoint::open_dir(&states, &named).map_err(|e| Unread::Failed(e.to_string()))?;
    // Those without a record have never had a state, and answered for nothing.
    let work: Mutex<Vec<_>> = Mutex::new(groups.into_iter().filter(|g| !g.meta.is_empty()).collect());
    let total = work.lock().unwrap_or_else(PoisonError::into_inner).len();
    let done = AtomicUsize::new(0);
    let results: Mutex<Vec<Result<Recovered, Unread>>> = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get()).min(8);
    let last_told = AtomicU64::new(clock::mono().0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(group) = { work.lock().unwrap_or_else(PoisonError::into_inner).pop() } {
                    let result = recover(&states, group);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                    let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                    let (now, told) = (clock::mono().0, last_told.load(Ordering::Relaxed));
                    if now.saturating_sub(told) >= 1_000_000_000 {
                        last_told.store(now, Ordering::Relaxed);
                        tracing::info!("reading from disk: {done} of {total} replicas");
                    }
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let recovered: Result<Vec<_>, Unread> = results.into_iter().collect();
    Ok((engine, recovered?))
}

/// A record that does not decode: damaged, unless it is of a version that another program knows.
fn unread(replica: u64, error: &CodecError) -> Unread {
    let why = format!("replica {replica}: {error}");
    match error {
        CodecError::UnknownVersion(_) => Unread::Failed(why),
        _ => Unread::Lost(why),
    }
}

fn recover(states: &Path, group: crate::disk::RecoveredGroup) -> Result<Recovered, Unread> {
    let id = group.group;
    let record = GroupRecord::decode(&group.meta).map_err(|e| unread(id, &e))?;
    // What the system refuses now, and what another version of the program would read, is not lost.
    let passing = Cell::new(false);
    let note = |e: CheckpointError| {
        let gone = matches!(&e, CheckpointError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound);
        let damaged = matches!(e, CheckpointError::Corrupt { .. });
        passing.set(!gone && !damaged);
        e.to_string()
    };
    let recovered = record.point().map(|point| CheckpointReader::open(states, id, point.index)).transpose();
    let recovered = recovered.map_err(note).and_then(|reader| {
        let pieces = reader.into_iter().flatten().map(|piece| piece.map(Bytes::from).map_err(note));
        Recovered::new(record, group.hard, group.entries, pieces)
    });
    recovered.map_err(|why| {
        let why = format!("replica {id}: {why}");
        if passing.get() { Unread::Failed(why) } else { Unread::Lost(why) }
    })
}

#[derive(Debug, Default)]
struct Shared {
    /// Number of the last durable batch.
    durable: AtomicU64,
    failure: Mutex<Option<String>>,
    /// Replicas whose logs hold old files back.
    compact: Mutex<Vec<ReplicaId>>,
}

impl Shared {
    /// The first failure counts.
    fn fail(&self, why: String) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }
}

/// What the driver looks at between rounds.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// Batches are durable up to this one, if that is news.
    pub durable: Option<u64>,
    /// Replicas that should write their states.
    pub compact: Vec<ReplicaId>,
    /// The disk failed: the node must end.
    pub failure: Option<String>,
}

/// The driver's way to the disk.
#[derive(Debug)]
pub struct Storage {
    log: Option<LogWriter>,
    states: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    seen: u64,
    /// States that take the place of older ones once a batch is durable.
    superseding: VecDeque<(u64, CheckpointId)>,
    /// Replicas whose states are needed by nobody once a batch is durable.
    removing: VecDeque<(u64, u64)>,
}

enum Job {
    Write(StateWrite),
    Keep(CheckpointId),
    Remove(u64),
}

impl Storage {
    /// What the log counts; `None` once it was given up.
    pub(crate) fn log_stats(&self) -> Option<Arc<LogStats>> {
        self.log.as_ref().map(|log| log.stats().clone())
    }

    /// Queues a batch; waits while the disk is too far behind, up to [`PATIENCE`].
    pub(crate) fn persist(&mut self, batch: PersistBatch) {
        let mut writes = Vec::with_capacity(batch.writes.len());
        for w in batch.writes {
            let group = w.replica.0;
            if let Some(index) = w.state {
                self.superseding.push_back((batch.number, CheckpointId { group, index }));
            }
            writes.push(crate::disk::LogWrite {
                group,
                entries: w.entries,
                hard: w.hard,
                meta: w.record.map(|r| r.to_vec()),
                // A state that comes from a leader takes the place of the log; what of it lay behind the state's index was
                // never committed ([`Recovered::new`] says what becomes of it).
                compact_to: w.compact_to.max(w.state.filter(|_| w.clear)),
                remove: w.remove,
            });
            if w.remove {
                self.removing.push_back((batch.number, group));
            }
        }
        self.queue(Batch { number: batch.number, writes }, PATIENCE);
    }

    fn queue(&mut self, mut batch: Batch, patience: Duration) {
        let began = clock::mono();
        while let Some(log) = &self.log {
            match log.submit(batch) {
                Ok(()) => return,
                Err(SubmitError::Full(back)) => batch = back,
                // Its failure was reported, or will be in a moment.
                Err(SubmitError::Closed(_)) => return,
            }
            if clock::mono().since(began) >= patience {
                self.shared.fail(format!("the disk has taken nothing for {patience:?}"));
                // Nothing may become durable behind what was left out. The threads are stuck: whoever joined them would be,
                // too.
                if let Some(log) = self.log.take() {
                    std::mem::forget(log);
                }
                self.thread = None;
                return;
            }
            std::thread::sleep(QUEUE_WAIT);
        }
    }

    /// Queues a piece of a state. At most a few a replica are on their way: the replica waits for their acknowledgement.
    pub(crate) fn write_state(&mut self, write: StateWrite) {
        if let Some(states) = &self.states {
            // Its thread ends after a failure, which was reported.
            let _ = states.send(Job::Write(write));
        }
    }

    /// What has happened since the last look.
    pub(crate) fn news(&mut self) -> News {
        let mut news = News::default();
        let durable = self.shared.durable.load(Ordering::Acquire);
        if durable > self.seen {
            self.seen = durable;
            news.durable = Some(durable);
            while let Some((_, group)) = self.removing.front().copied().filter(|(n, _)| *n <= durable) {
                self.removing.pop_front();
                if let Some(states) = &self.states {
                    let _ = states.send(Job::Remove(group));
                }
            }
            while let Some((_, id)) = self.superseding.front().copied().filter(|(n, _)| *n <= durable) {
                self.superseding.pop_front();
                if let Some(states) = &self.states {
                    let _ = states.send(Job::Keep(id));
                }
            }
        }
        if let Ok(mut failure) = self.shared.failure.try_lock() {
            news.failure = failure.take();
        }
        if let Ok(mut compact) = self.shared.compact.try_lock() {
            news.compact = std::mem::take(&mut *compact);
        }
        news
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        // Writes and syncs what waits.
        if let Some(log) = self.log.take() {
            log.close();
        }
        self.states = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread that writes states to files.
struct States {
    dir: PathBuf,
    files: HashMap<ReplicaId, (u64, CheckpointWriter)>,
    shared: Arc<Shared>,
    inputs: Sender<Input>,
}

impl States {
    fn run(mut self, jobs: &Receiver<Job>) {
        for job in jobs {
            let done = match job {
                Job::Write(w) => {
                    let (shard, replica, file, seq) = (w.shard, w.replica, w.file, w.seq);
                    self.write(w).map(|()| Some((shard, replica, file, seq)))
                }
                Job::Keep(id) => checkpoint::keep_from(&self.dir, id).map(|()| None),
                Job::Remove(group) => {
                    self.files.remove(&ReplicaId(group));
                    checkpoint::remove_group(&self.dir, group).map(|()| None)
                }
            };
            match done {
                Ok(None) => {}
                Ok(Some((shard, replica, file, seq))) => {
                    let written = Input::StateWritten { shard, replica, file, seq };
                    if self.inputs.send(written).is_err() {
                        return;
                    }
                }
                Err(e) => {
                    self.shared.fail(format!("a state cannot be written: {e}"));
                    let _ = self.inputs.try_send(Input::Durable);
                    return;
                }
            }
        }
    }

    fn write(&mut self, w: StateWrite) -> Result<(), CheckpointError> {
        if w.seq == 0 {
            // One that was not whole leaves nothing.
            self.files.remove(&w.replica);
            let writer = CheckpointWriter::create(&self.dir, w.replica.0, w.index)?;
            self.files.insert(w.replica, (w.file, writer));
        }
        let Some((_, writer)) = self.files.get_mut(&w.replica).filter(|(file, _)| *file == w.file) else {
            // A piece of a file that a later one has ended.
            return Ok(());
        };
        writer.chunk(&w.piece)?;
        if w.last
            && let Some((_, writer)) = self.files.remove(&w.replica)
        {
            writer.finish()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam::channel::bounded;

    #[test]
    fn a_disk_that_takes_nothing_fails_the_node_and_nothing_later_becomes_durable() {
        let dir = tempfile::tempdir().unwrap();
        LogEngine::create(dir.path()).unwrap();
        let (engine, _) = LogEngine::open(dir.path(), LogOptions::default()).unwrap();
        let shared = Arc::new(Shared::default());
        let (go, gate) = bounded::<()>(0);
        let (told, reports) = unbounded();
        let tell = shared.clone();
        // The writer is stuck with its first batch until the test lets it go.
        let done = move |result: Result<u64, String>| {
            let number = result.unwrap();
            told.send(number).unwrap();
            let _ = gate.recv();
            tell.durable.store(number, Ordering::Release);
        };
        let log = LogWriter::start(engine, done, |_| ()).unwrap();
        let log = Some(log);
        let mut storage = Storage {
            log,
            states: None,
            thread: None,
            shared: shared.clone(),
            seen: 0,
            superseding: VecDeque::new(),
            removing: VecDeque::new(),
        };
        let batch = |number| Batch { number, writes: Vec::new() };
        let mut left_out = None;
        for number in 1.. {
            storage.queue(batch(number), Duration::ZERO);
            if storage.log.is_none() {
                left_out = Some(number);
                break;
            }
        }
        let left_out = left_out.expect("the queue has an end");
        let why = storage.news().failure.expect("a failure");
        assert!(why.contains("taken nothing"), "{why}");
        storage.queue(batch(left_out + 1), Duration::ZERO);
        // It returns although the writer is stuck.
        drop(storage);
        drop(go);
        let last = reports.iter().inspect(|number| assert!(*number < left_out)).find(|number| *number == left_out - 1);
        assert!(last.is_some(), "what was taken before is written");
    }
}
