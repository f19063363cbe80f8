//! The program's log: lines on standard error that never make the node wait.
//!
//! ```text
//!   tracing event -> line -> bounded queue -> writer thread -> stderr
//!                              | full: the line is dropped and counted
//! ```
//!
//! A terminal that was stopped, or a pipe that nobody reads, would otherwise block the driver in the middle of a round
//! and cost this node its leaderships.

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Environment variable with the filter, such as `info` or `crema_node=debug,warn`.
pub const LOG_VARIABLE: &str = "CREMA_LOG";
/// Lines that may wait for the writer.
const QUEUE_LINES: usize = 4096;
/// Longest time the end of the program waits for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(300);

/// The running log. Keep it until the program ends; dropping it writes what is still queued, for a bounded time.
#[derive(Debug)]
pub struct Logs {
    queue: Queue,
}

/// Starts the log of this process with the filter in [`LOG_VARIABLE`], `info` if unset.
///
/// Errors: a filter that cannot be parsed, as a sentence for the operator.
pub fn start() -> Result<Logs, String> {
    let text = std::env::var(LOG_VARIABLE).unwrap_or_default();
    let text = if text.is_empty() { "info" } else { &text };
    let filter = EnvFilter::try_new(text).map_err(|e| format!("{LOG_VARIABLE}: {e}"))?;
    let queue = Queue::start(io::stderr());
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(queue.clone())
        // Its complaint about a failed write would go to the same broken stream, and panic there.
        .log_internal_errors(false)
        .finish();
    // A second start in one process, as in tests, keeps the first log.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(Logs { queue })
}

impl Drop for Logs {
    fn drop(&mut self) {
        let until = Instant::now() + FLUSH_TIMEOUT;
        let (written, all_written) = bounded(1);
        if self.queue.lines.send_deadline(Line::Flush(written), until).is_ok() {
            let _ = all_written.recv_deadline(until);
        }
    }
}

enum Line {
    Text(Vec<u8>),
    Flush(Sender<()>),
}

#[derive(Clone, Debug)]
struct Queue {
    lines: Sender<Line>,
    dropped: Arc<AtomicU64>,
}

impl Queue {
    fn start(sink: impl Write + Send + 'static) -> Queue {
        let (lines, waiting) = bounded(QUEUE_LINES);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = dropped.clone();
        let writer = std::thread::Builder::new().name("log".to_owned());
        // Without a thread there is no log, but there is a node.
        let _ = writer.spawn(move || write_lines(waiting, &counter, sink));
        Queue { lines, dropped }
    }
}

fn write_lines(waiting: Receiver<Line>, dropped: &AtomicU64, mut sink: impl Write) {
    for line in waiting {
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(sink, "({lost} log lines were dropped, because they were not read fast enough)");
        }
        match line {
            Line::Text(text) => drop(sink.write_all(&text)),
            Line::Flush(written) => {
                let _ = sink.flush();
                let _ = written.try_send(());
            }
        }
    }
}

/// One line being formatted; queued when dropped.
#[derive(Debug)]
struct Writer<'a> {
    queue: &'a Queue,
    text: Vec<u8>,
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = Writer<'a>;
    fn make_writer(&'a self) -> Writer<'a> {
        Writer { queue: self, text: Vec::new() }
    }
}

impl Write for Writer<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.text.extend_from_slice(text);
        Ok(text.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        let line = Line::Text(std::mem::take(&mut self.text));
        if let Err(TrySendError::Full(_)) = self.queue.lines.try_send(line) {
            self.queue.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sink that takes its first byte only after `open` has something, and tells what it took.
    struct Gate {
        open: Receiver<()>,
        taken: Sender<Vec<u8>>,
        is_open: bool,
    }

    impl Write for Gate {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            if !self.is_open {
                let _ = self.open.recv();
                self.is_open = true;
            }
            let _ = self.taken.send(text.to_vec());
            Ok(text.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_blocked_sink_blocks_nobody_and_losses_are_told() {
        let (open, gate) = bounded(1);
        let (taken, lines) = crossbeam::channel::unbounded();
        let queue = Queue::start(Gate { open: gate, taken, is_open: false });
        let begin = Instant::now();
        for i in 0..QUEUE_LINES + 1000 {
            queue.make_writer().write_all(format!("{i}\n").as_bytes()).unwrap();
        }
        assert!(begin.elapsed() < Duration::from_secs(5));
        open.send(()).unwrap();
        drop(Logs { queue: queue.clone() });
        drop(queue);
        let text: String = lines.iter().map(|line| String::from_utf8(line).unwrap()).collect();
        // The news of a loss stands wherever the writer noticed it, on a slow machine between the first lines.
        let (told, kept): (Vec<&str>, Vec<&str>) =
            text.lines().partition(|line| line.contains("log lines were dropped"));
        assert!(kept.starts_with(&["0", "1", "2"]), "what was queued is written, in order");
        assert!(!told.is_empty(), "the reader learns of the loss");
    }
}
