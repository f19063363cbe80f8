//! One cluster at a time.
//!
//! Several clusters at once on a small machine starve each other of processor time, and elections that only the tests'
//! own load caused would be judged as the program's. So each process test waits for its turn, also between the
//! processes of a runner that gives every test its own.

use super::{Context, Failure, Result, eventually};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::time::Duration;

/// The turn; it ends when this is dropped, and with the process in any case.
#[derive(Debug)]
pub struct Turn {
    // The lock belongs to the open file: closing it passes the turn on.
    _file: File,
}

/// Waits for the turn, at most ten minutes.
///
/// # Errors
///
/// If the lock file cannot be opened, or the turn does not come.
pub fn turn() -> Result<Turn> {
    let path = std::env::current_exe().context("the path of this program")?.with_file_name("crema-process.lock");
    let file = File::options().create(true).append(true).open(&path).context(format!("opening {}", path.display()))?;
    eventually("the turn of this test", Duration::from_secs(600), || {
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| Failure::new(format!("{}: {e}", path.display())))
    })?;
    Ok(Turn { _file: file })
}
