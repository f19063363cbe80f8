//! Running one node as a process: signals in, exit code out.
//!
//! ```text
//!   crema start --> Config --> Node::start --> serving --+-- SIGTERM, Ctrl-C ----> shutdown with grace --> exit 0
//!                                                        +-- parent's pipe ends -> shutdown at once ----> exit 0
//!                                                        +-- node failed --------> shutdown at once ----> exit 1 or 2
//!   a second Ctrl-C or SIGTERM at any time --------------------------------------> exit 130 at once
//! ```

use crate::cli::{CliError, say};
use crate::config::StartArgs;
use crate::node::{Node, StartError};
use std::io::Read;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// Threads and tasks that do not end by themselves get this long when the program ends.
const RUNTIME_SHUTDOWN: Duration = Duration::from_secs(1);

impl From<StartError> for CliError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Failed(reason) => CliError::Failed(reason),
            other => CliError::Usage(other.to_string()),
        }
    }
}

/// The signals that end a program politely.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Takes the signals over. From here on only [`Signals::next`] sees them.
    pub(crate) fn listen() -> Result<Signals, CliError> {
        let failed = |e: std::io::Error| CliError::Failed(format!("cannot listen for signals: {e}"));
        let interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let terminate = signal(SignalKind::terminate()).map_err(failed)?;
        Ok(Signals { interrupt, terminate })
    }

    /// Waits for one; returns its name.
    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "an interrupt",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

/// Runs `main` to its end on a runtime of its own.
pub fn block_on(main: impl Future<Output = Result<(), CliError>>) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| CliError::Failed(format!("cannot start threads: {e}")))?;
    let result = runtime.block_on(main);
    if matches!(result, Err(CliError::Interrupted)) {
        // "At once" is what a second signal asks for.
        runtime.shutdown_background();
    } else {
        // A name lookup that hangs must not keep the process.
        runtime.shutdown_timeout(RUNTIME_SHUTDOWN);
    }
    result
}

/// `crema start`: runs one node until it is told to stop, or fails.
///
/// Errors: see [`CliError`]; a wrong configuration or an occupied address is a usage error.
pub async fn start(args: &StartArgs) -> Result<(), CliError> {
    let settings = args.load().and_then(|config| config.resolve()).map_err(|e| CliError::Usage(e.to_string()))?;
    if settings.node.memory.max_memory > 0 {
        tune_allocator();
    }
    let _logs = crate::logs::start().map_err(CliError::Usage)?;
    let mut signals = Signals::listen()?;
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let parent = args.stop_with_stdin.then(watch_stdin);
    let parent_gone = || async {
        // An error means that nobody watches: then the parent's end is never seen.
        if let Some(mut gone) = parent.clone()
            && gone.wait_for(|gone| *gone).await.is_ok()
        {
            return;
        }
        std::future::pending().await
    };
    let node = Node::start(settings.node).await?;
    for (key, addr) in node.addresses() {
        tracing::info!(%addr, "{key} is open");
    }
    let announce = async {
        if node.ready().await.is_ok() {
            say(format!("ready: node {} of cluster {}", node.config().node_id, node.config().cluster));
        }
        std::future::pending::<()>().await
    };
    let failure = tokio::select! {
        signal = signals.next() => {
            tracing::info!("{signal} received: this node stops once the others can do without it");
            None
        }
        () = parent_gone() => {
            tracing::info!("the parent process has ended: this node stops");
            node.hurry();
            None
        }
        failure = node.failed() => {
            tracing::error!("{failure}");
            node.hurry();
            Some(failure)
        }
        () = announce => None,
    };
    let hurry = async {
        parent_gone().await;
        node.hurry();
        std::future::pending::<()>().await
    };
    // When the parent ends, it sends SIGTERM as well, and closes the pipe: together they count as one request to stop.
    let impatient = async {
        loop {
            signals.next().await;
            if parent.as_ref().is_none_or(|gone| !*gone.borrow()) {
                return;
            }
        }
    };
    tokio::select! {
        () = node.shutdown() => {}
        () = hurry => {}
        () = impatient => return Err(CliError::Interrupted),
    }
    match failure {
        None => Ok(()),
        Some(failure) if failure.is_configuration => Err(CliError::Usage(failure.to_string())),
        Some(failure) => Err(CliError::Failed(failure.to_string())),
    }
}

/// What the program's allocator shall do where memory is bounded: give back what is free soon (its default is a second),
/// and not take 2 MiB from the system where 4 KiB are used.
const ALLOCATOR: [(&str, &str); 2] = [("MIMALLOC_PURGE_DELAY", "10"), ("MIMALLOC_ALLOW_THP", "0")];

/// Begins the program anew, as the same process, with the allocator's options set; nothing if they are. It reads them
/// from the environment before the program's first line.
fn tune_allocator() {
    use std::os::unix::process::CommandExt;
    let missing = || ALLOCATOR.into_iter().filter(|(name, _)| std::env::var_os(name).is_none());
    let Ok(program) = std::env::current_exe() else { return };
    if missing().next().is_some() {
        // It comes back only if the system refuses; then memory is bounded all the same, with less of it for data.
        let _ = std::process::Command::new(program).args(std::env::args_os().skip(1)).envs(missing()).exec();
    }
}

/// Becomes true when standard input ends. A thread, because reading a pipe cannot be cancelled.
fn watch_stdin() -> watch::Receiver<bool> {
    let (ended, watch) = watch::channel(false);
    let reader = std::thread::Builder::new().name("stdin".to_owned());
    let spawned = reader.spawn(move || {
        let mut discarded = [0; 256];
        loop {
            match std::io::stdin().read(&mut discarded) {
                Ok(0) => break,
                Err(e) if e.kind() != std::io::ErrorKind::Interrupted => break,
                _ => {}
            }
        }
        ended.send_replace(true);
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot watch standard input: this node will not end with its parent");
    }
    watch
}
