//! The data directory: whose it is, and that only one process uses it.
//!
//! *Life.* The log of a node lives as long as its incarnation. A restart that finds the log goes on with the same
//! incarnation; a node that lost the log, or keeps it in memory, begins a new one, since it no longer knows what it
//! promised. A new life is begun in three steps (`identity` with `begun` false, everything of the old life moved aside,
//! `identity` with `begun` true), so that a crash between them is finished at the next opening.
//!
//! `identity`: version 2 (u8) | postcard of `Stored` | xxh3 (u64 LE) of all before it.

use super::{LogEngine, create_dir, replace_file, sync_dir};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::xxh3_64;

const VERSION: u8 = 2;
/// Far more than an identity can take.
const MAX_IDENTITY_BYTES: u64 = 64 * 1024;
/// Longest name of a cluster in bytes.
pub const MAX_CLUSTER_NAME_BYTES: usize = 1024;
const LOG: &str = "log";
const CHECKPOINTS: &str = "checkpoints";
const LOST_PREFIX: &str = "lost-";

/// What is kept in a data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Only who the node is; its log is in memory, so each opening is a new life.
    IdentityOnly,
    /// The log and the checkpoints as well; a life lasts over restarts.
    Durable,
}

/// Who the node is, as of this opening.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The node.
    pub node_id: u64,
    /// Name of its cluster.
    pub cluster: String,
    /// The cluster's own id, once it was founded or joined.
    pub uuid: Option<u128>,
    /// The latest generation of that cluster's table that this node has known, 0 for none.
    pub generation: u32,
    /// The life of the log.
    pub incarnation: u128,
    /// How often the directory was opened, this time included.
    pub boot: u64,
    /// What is kept.
    pub mode: Mode,
}

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirError {
    /// Another process has it: stop that one, or use another directory.
    #[error("the data directory {path} is in use by another process: stop that one first, or choose another directory")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// It belongs to another node.
    #[error(
        "the data directory {path} belongs to node {stored}, but this is node {given}: choose another directory or node id"
    )]
    WrongNode {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        stored: u64,
        /// Who asked.
        given: u64,
    },
    /// It belongs to another cluster.
    #[error(
        "the data directory {path} belongs to cluster {stored:?}, but this node is of cluster {given:?}: choose another \
         directory or cluster name"
    )]
    WrongCluster {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        stored: String,
        /// Who asked.
        given: String,
    },
    /// The cluster that this node was a member of is not the one that it is told it joined.
    #[error(
        "the data directory {path} belongs to the cluster with id {stored:032x}, not to {given:032x}: choose another \
             directory"
    )]
    WrongUuid {
        /// The directory.
        path: PathBuf,
        /// The cluster it belongs to.
        stored: u128,
        /// The other one.
        given: u128,
    },
    /// The identity cannot be read: nobody can tell whose log this is. Restore the file, or move the directory away.
    #[error(
        "{path} is damaged: restore it from a copy, or move the data directory away and let the node join as a new one"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// There is data but no identity.
    #[error("{path} has no file `identity`, but there is {what} in it: choose an empty directory, or move that away")]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// Written by a newer version: use that one.
    #[error("{path} has version {version}, which this program does not know: start the version that wrote it")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u8,
    },
    /// The name cannot be kept.
    #[error("the cluster's name has {0} bytes, more than {MAX_CLUSTER_NAME_BYTES}")]
    LongName(usize),
    /// The disk or the file system failed.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> DirError + '_ {
    move |source| DirError::Io { path: path.into(), source }
}

/// What is in the file `identity`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stored {
    node_id: u64,
    cluster: String,
    uuid: Option<u128>,
    generation: u32,
    incarnation: u128,
    boot: u64,
    mode: Mode,
    /// Whether the life has begun: the old one's files are aside and, in durable mode, the log exists.
    begun: bool,
}

/// A data directory that this process has for itself until it is dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// Locked as long as it is open.
    _lock: File,
    stored: Stored,
}

impl DataDir {
    /// Opens the directory, creating it (mode 0700) if it is not there, takes it for this process, counts the opening, and
    /// says who the node is. A directory that kept no log until now, or keeps none any more, begins a new life with an
    /// incarnation drawn at random.
    ///
    /// # Errors
    /// In use, of another node or cluster, damaged, or what the file system says; each text tells what to do. Nothing is
    /// changed then.
    pub fn open(path: &Path, node_id: u64, cluster_name: &str, mode: Mode) -> Result<(DataDir, Identity), DirError> {
        if cluster_name.len() > MAX_CLUSTER_NAME_BYTES {
            return Err(DirError::LongName(cluster_name.len()));
        }
        create_dir(path).map_err(io_error(path))?;
        let lock = lock(path)?;
        let known = read_identity(&path.join("identity"))?;
        let fresh = match known {
            Some(stored) => {
                if stored.node_id != node_id {
                    return Err(DirError::WrongNode { path: path.into(), stored: stored.node_id, given: node_id });
                }
                if stored.cluster != cluster_name {
                    let given = cluster_name.into();
                    return Err(DirError::WrongCluster { path: path.into(), stored: stored.cluster, given });
                }
                stored
            }
            None => {
                refuse_foreign(path)?;
                Stored {
                    node_id,
                    cluster: cluster_name.into(),
                    uuid: None,
                    generation: 0,
                    incarnation: draw(path)?,
                    boot: 0,
                    mode,
                    begun: false,
                }
            }
        };
        let mut dir = DataDir { path: path.into(), _lock: lock, stored: fresh };
        let kept = dir.stored.begun && dir.stored.mode == Mode::Durable && mode == Mode::Durable;
        if !kept && (dir.stored.begun || dir.stored.mode != mode) {
            dir.stored.incarnation = draw(path)?;
            dir.stored.begun = false;
        }
        dir.stored.mode = mode;
        dir.stored.boot += 1;
        dir.save()?;
        if !dir.stored.begun {
            dir.begin()?;
        }
        // The directory's own name, if it is new.
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            sync_dir(parent).map_err(io_error(parent))?;
        }
        let identity = dir.identity();
        Ok((dir, identity))
    }

    /// Who the node is.
    pub fn identity(&self) -> Identity {
        let Stored { node_id, cluster, uuid, generation, incarnation, boot, mode, begun: _ } = self.stored.clone();
        Identity { node_id, cluster, uuid, generation, incarnation, boot, mode }
    }

    /// Keeps the cluster's id, durably and for ever, and the highest generation of its table.
    ///
    /// # Errors
    /// Another id is set, or what the file system says.
    pub fn set_cluster(&mut self, uuid: u128, generation: u32) -> Result<(), DirError> {
        let before = (self.stored.uuid, self.stored.generation);
        if let Some(stored) = before.0.filter(|stored| *stored != uuid) {
            return Err(DirError::WrongUuid { path: self.path.clone(), stored, given: uuid });
        }
        let now = (Some(uuid), generation.max(before.1));
        if now == before {
            return Ok(());
        }
        (self.stored.uuid, self.stored.generation) = now;
        self.save().inspect_err(|_| (self.stored.uuid, self.stored.generation) = before)
    }

    /// Ends the life of the log and begins another one, empty, with this incarnation. What was there is moved to
    /// `lost-<n>`; one older such directory is kept, and the rest deleted. Close the log first.
    ///
    /// # Errors
    /// What the file system says; the next opening finishes what was begun.
    pub fn new_life(&mut self, incarnation: u128) -> Result<Identity, DirError> {
        self.stored.incarnation = incarnation;
        self.stored.begun = false;
        self.save()?;
        self.begin()?;
        Ok(self.identity())
    }

    /// Directory of the log, for [`LogEngine::open`]; none in [`Mode::IdentityOnly`].
    pub fn log_dir(&self) -> Option<PathBuf> {
        (self.stored.mode == Mode::Durable).then(|| self.path.join(LOG))
    }

    /// Directory of the checkpoints, for [`super::checkpoint::open_dir`]; none in [`Mode::IdentityOnly`].
    pub fn checkpoint_dir(&self) -> Option<PathBuf> {
        (self.stored.mode == Mode::Durable).then(|| self.path.join(CHECKPOINTS))
    }

    fn begin(&mut self) -> Result<(), DirError> {
        self.move_aside()?;
        if self.stored.mode == Mode::Durable {
            for name in [LOG, CHECKPOINTS] {
                create_dir(&self.path.join(name)).map_err(io_error(&self.path))?;
            }
            let log = self.path.join(LOG);
            LogEngine::create(&log).map_err(io_error(&log))?;
            sync_dir(&self.path).map_err(io_error(&self.path))?;
        }
        self.stored.begun = true;
        self.save()
    }

    fn move_aside(&self) -> Result<(), DirError> {
        let there: Vec<_> = [LOG, CHECKPOINTS].into_iter().filter(|n| self.path.join(n).exists()).collect();
        if there.is_empty() {
            return Ok(());
        }
        let mut lost = self.lost()?;
        let number = lost.last().map_or(1, |n| n + 1);
        let aside = self.path.join(format!("{LOST_PREFIX}{number}"));
        create_dir(&aside).map_err(io_error(&aside))?;
        for name in there {
            std::fs::rename(self.path.join(name), aside.join(name)).map_err(io_error(&aside))?;
        }
        sync_dir(&aside).and_then(|()| sync_dir(&self.path)).map_err(io_error(&self.path))?;
        lost.pop();
        for old in lost {
            let old = self.path.join(format!("{LOST_PREFIX}{old}"));
            std::fs::remove_dir_all(&old).map_err(io_error(&old))?;
        }
        Ok(())
    }

    fn lost(&self) -> Result<Vec<u64>, DirError> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(io_error(&self.path))? {
            let name = entry.map_err(io_error(&self.path))?.file_name();
            numbers.extend(name.to_str().and_then(|n| n.strip_prefix(LOST_PREFIX)).and_then(|n| n.parse::<u64>().ok()));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn save(&self) -> Result<(), DirError> {
        let path = self.path.join("identity");
        let mut bytes = vec![VERSION];
        bytes.extend(postcard::to_stdvec(&self.stored).expect("a struct of numbers and a text always encodes"));
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        replace_file(&path, &bytes).map_err(io_error(&path))
    }
}

fn lock(path: &Path) -> Result<File, DirError> {
    let file_path = path.join("lock");
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&file_path);
    let file = open.map_err(io_error(&file_path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DirError::InUse { path: path.into() }),
        Err(e) => Err(io_error(&file_path)(e.into())),
    }
}

fn draw(path: &Path) -> Result<u128, DirError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| io_error(path)(io::Error::other(e.to_string())))?;
    Ok(u128::from_le_bytes(bytes))
}

fn read_identity(path: &Path) -> Result<Option<Stored>, DirError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error(path)(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_IDENTITY_BYTES).read_to_end(&mut bytes).map_err(io_error(path))?;
    let damaged = || DirError::Damaged { path: path.into() };
    let (content, sum) = bytes.split_last_chunk::<8>().ok_or_else(damaged)?;
    if xxh3_64(content).to_le_bytes() != *sum {
        return Err(damaged());
    }
    match content.split_first() {
        Some((&VERSION, body)) => {
            let (stored, rest) = postcard::take_from_bytes(body).map_err(|_| damaged())?;
            if rest.is_empty() { Ok(Some(stored)) } else { Err(damaged()) }
        }
        Some((&version, _)) => Err(DirError::Newer { path: path.into(), version }),
        None => Err(damaged()),
    }
}

/// A log without an identity is somebody's, and nobody can tell whose.
fn refuse_foreign(path: &Path) -> Result<(), DirError> {
    for entry in std::fs::read_dir(path).map_err(io_error(path))? {
        let name = entry.map_err(io_error(path))?.file_name();
        let name = name.to_string_lossy();
        if name == LOG || name == CHECKPOINTS || name.starts_with(LOST_PREFIX) {
            return Err(DirError::Foreign { path: path.into(), what: format!("`{name}`") });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::scratch;
    use super::super::{Batch, LogOptions, LogWrite};
    use super::*;

    #[test]
    fn a_crash_while_a_life_begins_is_finished_at_the_next_opening() {
        let path = scratch();
        let (mut dir, _) = DataDir::open(path.path(), 1, "c", Mode::Durable).unwrap();
        let log = dir.log_dir().unwrap();
        let write = LogWrite { group: 1, ..LogWrite::default() };
        let (mut engine, _) = LogEngine::open(&log, LogOptions::default()).unwrap();
        engine.write(&[Batch { number: 1, writes: vec![write] }]).unwrap();
        drop(engine);
        // Only the first of the three steps was done.
        dir.stored.incarnation = 9;
        dir.stored.begun = false;
        dir.save().unwrap();
        drop(dir);
        let (dir, identity) = DataDir::open(path.path(), 1, "c", Mode::Durable).unwrap();
        assert_eq!((identity.incarnation, identity.boot), (9, 2));
        assert!(LogEngine::open(&log, LogOptions::default()).unwrap().1.is_empty());
        assert!(path.path().join("lost-1").join("log").join("synced").exists());
        // And the second: what is moved stays moved, and the same life goes on.
        drop(dir);
        let (dir, identity) = DataDir::open(path.path(), 1, "c", Mode::Durable).unwrap();
        assert_eq!(identity.incarnation, 9);
        assert_eq!(dir.lost().unwrap(), [1]);
    }
}
