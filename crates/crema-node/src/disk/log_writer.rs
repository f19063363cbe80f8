//! The thread that writes the log: whatever waits is written together and synced once (group commit).
//!
//! ```text
//! submit -> bounded queue -> [ drain up to 8 MiB -> LogEngine::write -> done(Ok(last number)) ]   thread crema-log
//!                                          \-- nudge, each file's worth of bytes --> [ purge -> compact(groups) ]
//! ```
//!
//! *Invariant:* completions come in order, each means that its batch and all before it are durable. *Invariant:* a failure
//! of either thread is reported once, nothing is reported after it, and nothing is written after it.

use super::log_engine::{Batch, LogEngine, LogError, Purger};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Batches that wait at most.
pub const MAX_QUEUED_BATCHES: usize = 4096;
/// Bytes of batches that wait at most; one batch is taken whatever its size when nothing waits.
pub const MAX_QUEUED_BYTES: usize = 64 << 20;
/// Bytes that are written together before they are synced, at most (or one batch).
pub const MAX_SYNC_BYTES: usize = 8 << 20;
/// Disk space is looked after at least so often.
const PURGE_EVERY: Duration = Duration::from_secs(10);

/// A batch that was not taken; it comes back.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Too much waits: try again after a completion.
    #[error("the log's queue is full")]
    Full(Batch),
    /// The writer has stopped, after a failure that was reported or because it was closed: give up.
    #[error("the log is closed")]
    Closed(Batch),
}

/// Told of the last durable batch's number, or once why there will be no more.
type Done = Box<dyn Fn(Result<u64, String>) + Send>;

/// Reports until the first failure.
struct Reporter(Mutex<Option<Done>>);

impl Reporter {
    fn durable(&self, number: u64) {
        if let Some(done) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            done(Ok(number));
        }
    }

    fn failed(&self, why: String) {
        if let Some(done) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            done(Err(why));
        }
    }
}

/// What has been written and synced so far.
#[derive(Debug, Default)]
pub struct LogStats {
    /// Writes that ended with a sync.
    pub syncs: AtomicU64,
    /// Batches that they made durable.
    pub batches: AtomicU64,
    /// Entries in these.
    pub entries: AtomicU64,
}

struct Job {
    batch: Batch,
    bytes: usize,
}

/// Writes batches in the order in which they were submitted. Dropping it, or [`LogWriter::close`], writes what waits and
/// ends the threads.
#[derive(Debug)]
pub struct LogWriter {
    queue: Option<Sender<Job>>,
    waiting: Arc<AtomicUsize>,
    stats: Arc<LogStats>,
    threads: Vec<JoinHandle<()>>,
}

impl LogWriter {
    /// Starts the threads. `done` is called on them, with the number of the last batch of each synced write, or once with
    /// a failure, after which the node must stop. `compact` gets the replicas that hold up disk space; they should be
    /// checkpointed and compacted, and are named again as long as they are not. Neither may block for long.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        engine: LogEngine,
        done: impl Fn(Result<u64, String>) + Send + 'static,
        compact: impl Fn(Vec<u64>) + Send + 'static,
    ) -> io::Result<LogWriter> {
        let (queue, jobs) = bounded(MAX_QUEUED_BATCHES);
        // One nudge may wait while a purge runs.
        let (nudge, nudges) = bounded(1);
        let waiting = Arc::new(AtomicUsize::new(0));
        let reporter = Arc::new(Reporter(Mutex::new(Some(Box::new(done)))));
        let purger = engine.purger();
        let stats = Arc::new(LogStats::default());
        let mut writer =
            LogWriter { queue: Some(queue), waiting: waiting.clone(), stats: stats.clone(), threads: Vec::new() };
        let report = reporter.clone();
        writer.threads.push(
            std::thread::Builder::new()
                .name("crema-log-purge".into())
                .spawn(move || guarded(&purger.clone(), &report, || purge_loop(&purger, &nudges, &report, &compact)))?,
        );
        let purger = engine.purger();
        let mut worker = Worker { engine, jobs, nudge, waiting, stats, reporter, unpurged: 0 };
        writer.threads.push(std::thread::Builder::new().name("crema-log".into()).spawn(move || {
            let report = worker.reporter.clone();
            guarded(&purger, &report, || worker.run());
        })?);
        Ok(writer)
    }

    /// Queues a batch. Batches must be submitted by one thread at a time if their order matters.
    ///
    /// # Errors
    /// The batch comes back when the queue is full or the writer has stopped.
    pub fn submit(&self, batch: Batch) -> Result<(), SubmitError> {
        let Some(queue) = &self.queue else { return Err(SubmitError::Closed(batch)) };
        let bytes: usize = 64 + batch.writes.iter().map(|w| w.approximate_bytes()).sum::<usize>();
        let before = self.waiting.fetch_add(bytes, Ordering::Relaxed);
        if before > 0 && before + bytes > MAX_QUEUED_BYTES {
            self.waiting.fetch_sub(bytes, Ordering::Relaxed);
            return Err(SubmitError::Full(batch));
        }
        queue.try_send(Job { batch, bytes }).map_err(|e| {
            self.waiting.fetch_sub(bytes, Ordering::Relaxed);
            match e {
                TrySendError::Full(job) => SubmitError::Full(job.batch),
                TrySendError::Disconnected(job) => SubmitError::Closed(job.batch),
            }
        })
    }

    /// What it counts.
    pub fn stats(&self) -> &Arc<LogStats> {
        &self.stats
    }

    /// Writes and reports what waits, then ends the threads and closes the log.
    pub fn close(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.queue = None;
        // The purge thread ends when the writer thread drops its nudge.
        for thread in self.threads.drain(..).rev() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.end();
    }
}

/// Reports a panic of a thread of the log, a callback's included, as a failure of the log.
fn guarded(purger: &Purger, reporter: &Reporter, f: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(f)).is_err() {
        purger.stop("a thread of the log panicked");
        reporter.failed("a thread of the log panicked".into());
    }
}

struct Worker {
    engine: LogEngine,
    jobs: Receiver<Job>,
    nudge: Sender<()>,
    waiting: Arc<AtomicUsize>,
    stats: Arc<LogStats>,
    reporter: Arc<Reporter>,
    /// Bytes written since the purge thread was last nudged.
    unpurged: u64,
}

impl Worker {
    fn run(&mut self) {
        while let Ok(first) = self.jobs.recv() {
            let mut bytes = first.bytes;
            let mut batches = vec![first.batch];
            // The size of the next is not known before it is taken; so what is written together may exceed the bound by
            // one batch.
            while bytes < MAX_SYNC_BYTES
                && let Ok(job) = self.jobs.try_recv()
            {
                bytes += job.bytes;
                batches.push(job.batch);
            }
            let number = batches.last().map_or(0, |b| b.number);
            let result = self.engine.write(&batches);
            self.waiting.fetch_sub(bytes, Ordering::Relaxed);
            match result {
                Ok(()) => {
                    self.count(&batches);
                    self.reporter.durable(number);
                }
                Err(LogError::Stopped(why)) => return self.reporter.failed(why),
                Err(e) => return self.reporter.failed(e.to_string()),
            }
            self.look_after_space(bytes as u64);
        }
    }

    fn count(&self, batches: &[Batch]) {
        // A batch without writes only passes its number on: nothing is synced for it.
        let written = batches.iter().filter(|batch| !batch.writes.is_empty());
        let entries = written.clone().flat_map(|batch| &batch.writes).map(|w| w.entries.len() as u64).sum();
        let written = written.count() as u64;
        self.stats.syncs.fetch_add(u64::from(written > 0), Ordering::Relaxed);
        self.stats.batches.fetch_add(written, Ordering::Relaxed);
        self.stats.entries.fetch_add(entries, Ordering::Relaxed);
    }

    /// Wakes the purge thread for each file's worth of bytes, and waits for it when it has fallen far behind, which bounds
    /// the disk space.
    fn look_after_space(&mut self, bytes: u64) {
        let options = self.engine.options();
        self.unpurged += bytes;
        let nudged = if self.unpurged >= options.purge_threshold_bytes / 2 {
            self.nudge.send(()).is_ok()
        } else {
            self.unpurged >= options.target_file_bytes && self.nudge.try_send(()).is_ok()
        };
        if nudged {
            self.unpurged = 0;
        }
    }
}

fn purge_loop(purger: &Purger, nudges: &Receiver<()>, reporter: &Reporter, compact: &impl Fn(Vec<u64>)) {
    while !matches!(nudges.recv_timeout(PURGE_EVERY), Err(RecvTimeoutError::Disconnected)) {
        match purger.purge() {
            Ok(groups) if groups.is_empty() => {}
            Ok(groups) => compact(groups),
            Err(LogError::Stopped(why)) => return reporter.failed(why),
            Err(e) => return reporter.failed(e.to_string()),
        }
    }
}
