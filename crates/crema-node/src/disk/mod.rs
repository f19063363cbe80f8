//! What a node keeps on disk: who it is, the Raft log of all its replicas, and checkpoints of their state.
//!
//! ```text
//! <data dir>/            mode 0700
//!   lock                 held by the running process
//!   identity             who this is; replaced atomically                    directory.rs
//!   log/synced           how far the log was synced, two slots               marker.rs
//!   log/raft/            raft-engine's files, one log for all groups         log_engine.rs, log_fs.rs
//!   gossip               the last generation of gossip, written by `crema-gossip`
//!   checkpoints/         <group>-<index>.ckpt                                checkpoint.rs
//!   lost-<n>/            logs and checkpoints of lives that ended, for inspection
//!
//! Batch -> LogWriter (queue, thread) -> LogEngine::write -> raft-engine -> fdatasync -> marker -> done(number)
//!              \-> purge thread -> LogEngine's Purger -> groups that should be compacted
//! ```
//!
//! *Invariant:* whatever is read back equals what was written, or opening fails and says why. *Invariant:* nothing that
//! was reported durable is missing after a successful opening. *Invariant:* after a failed write or sync nothing more is
//! written. The shell that uses this module decides what a lost log means; see [`DataDir::new_life`].

pub mod checkpoint;
pub mod directory;
pub mod log_engine;
mod log_fs;
pub mod log_writer;
mod marker;

pub use checkpoint::{CheckpointError, CheckpointId, CheckpointReader, CheckpointWriter};
pub use directory::{DataDir, DirError, Identity, Mode};
pub use log_engine::{Batch, LogEngine, LogError, LogOptions, LogWrite, Purger, RecoveredGroup};
pub use log_writer::{LogStats, LogWriter, SubmitError};

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// The file in a data or state directory where gossip keeps its generation.
pub const GOSSIP: &str = "gossip";

/// Makes what happened to the names in a directory durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Creates a directory that only its owner may enter; one that exists is left as it is.
fn create_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(dir)
}

/// Replaces a small file so that after a crash at any moment either the old or the new content is there.
fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let temp = path.with_extension("tmp");
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temp)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temp, path)?;
    match path.parent() {
        Some(dir) => sync_dir(dir),
        None => Ok(()),
    }
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
