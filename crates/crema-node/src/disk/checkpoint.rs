//! Files of a shard's state at one index of its log, written by chunks and read back only whole.
//!
//! ```text
//! <group>-<index>.ckpt, numbers decimal, all integers little endian:
//! header   magic "crmckpt" | version 1 (u8) | group (u64) | index (u64) | xxh3 of these
//! chunk    number (u32, from 0) | raw length (u32) | packed length (u32) | LZ4 block | xxh3
//! trailer  u32::MAX | number of chunks (u32) | zero (u32) | sum of raw lengths (u64) | xxh3; then the end of the file
//! ```
//!
//! The xxh3 of a chunk or trailer covers all of it before the hash, seeded with the header's, so that nothing of another
//! checkpoint passes. A file gets its name only when it is whole and synced. An unknown version is refused; a new version
//! is written only after every node reads it.

use super::{create_dir, sync_dir};
use lz4_flex::block;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Largest chunk in bytes, before compression.
pub const MAX_CHUNK_BYTES: usize = crema_core::limits::MAX_REQUEST_BYTES + 64 * 1024;
const MAGIC: &[u8; 7] = b"crmckpt";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 32;
const TRAILER: u32 = u32::MAX;

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The disk or the file system failed; a half-written checkpoint is never seen.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not what was written: take the state from another replica.
    #[error("{path} is damaged: {what}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The file was written by a newer version of this program: use that one.
    #[error("{path} has version {version}, which this program does not know")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u8,
    },
    /// A chunk is larger than [`MAX_CHUNK_BYTES`]: split it.
    #[error("a chunk of {0} bytes is too large")]
    ChunkTooLarge(usize),
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> CheckpointError + '_ {
    move |source| CheckpointError::Io { path: path.into(), source }
}

/// A checkpoint's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointId {
    /// The replica.
    pub group: u64,
    /// Index of the last entry that is in the state.
    pub index: u64,
}

impl CheckpointId {
    /// The file's path in a directory of checkpoints.
    pub fn path(self, dir: &Path) -> PathBuf {
        dir.join(format!("{}-{}.ckpt", self.group, self.index))
    }

    fn parse(name: &str) -> Option<CheckpointId> {
        let (group, index) = name.strip_suffix(".ckpt")?.split_once('-')?;
        let id = CheckpointId { group: group.parse().ok()?, index: index.parse().ok()? };
        // One file, one name: no signs, no leading zeros.
        (id.path(Path::new("")).to_str() == Some(name)).then_some(id)
    }

    fn header(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..7].copy_from_slice(MAGIC);
        out[7] = VERSION;
        out[8..16].copy_from_slice(&self.group.to_le_bytes());
        out[16..24].copy_from_slice(&self.index.to_le_bytes());
        let sum = xxh3_64(&out[..24]);
        out[24..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    fn seed(self) -> u64 {
        xxh3_64(&self.header())
    }
}

/// Creates the directory if need be, and removes what interrupted writes left and every checkpoint that is not `named`:
/// which ones count is written elsewhere, and need not be the newest.
///
/// # Errors
/// What the file system says.
pub fn open_dir(dir: &Path, named: &[CheckpointId]) -> Result<(), CheckpointError> {
    create_dir(dir).map_err(io_error(dir))?;
    for name in names(dir)? {
        if name.ends_with(".ckpt.tmp") {
            remove(&dir.join(&name))?;
        }
    }
    remove_if(dir, |id| !named.contains(&id))
}

/// Removes the checkpoints of a group that are older than this one.
///
/// # Errors
/// What the file system says.
pub fn keep_from(dir: &Path, newest: CheckpointId) -> Result<(), CheckpointError> {
    remove_if(dir, |id| id.group == newest.group && id.index < newest.index)
}

/// Removes all checkpoints of a group.
///
/// # Errors
/// What the file system says.
pub fn remove_group(dir: &Path, group: u64) -> Result<(), CheckpointError> {
    remove_if(dir, |id| id.group == group)
}

fn remove_if(dir: &Path, which: impl Fn(CheckpointId) -> bool) -> Result<(), CheckpointError> {
    for id in names(dir)?.iter().filter_map(|n| CheckpointId::parse(n)).filter(|&id| which(id)) {
        remove(&id.path(dir))?;
    }
    Ok(())
}

fn names(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let listing = std::fs::read_dir(dir).map_err(io_error(dir))?;
    let names: io::Result<Vec<_>> = listing.map(|e| Ok(e?.file_name().to_str().map(String::from))).collect();
    Ok(names.map_err(io_error(dir))?.into_iter().flatten().collect())
}

fn remove(path: &Path) -> Result<(), CheckpointError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error(path)(e)),
        _ => Ok(()),
    }
}

/// Writes one checkpoint. Dropped before [`CheckpointWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct CheckpointWriter {
    dir: PathBuf,
    id: CheckpointId,
    temp: PathBuf,
    file: File,
    chunks: u32,
    raw: u64,
    written: u64,
    buffer: Vec<u8>,
    finished: bool,
}

impl CheckpointWriter {
    /// Begins a checkpoint of `group` at `index` in a directory that [`open_dir`] has prepared.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(dir: &Path, group: u64, index: u64) -> Result<CheckpointWriter, CheckpointError> {
        let id = CheckpointId { group, index };
        let temp = id.path(dir).with_extension("ckpt.tmp");
        let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temp);
        let file = open.map_err(io_error(&temp))?;
        let mut writer = CheckpointWriter {
            dir: dir.into(),
            id,
            temp,
            file,
            chunks: 0,
            raw: 0,
            written: 0,
            buffer: id.header().to_vec(),
            finished: false,
        };
        writer.flush()?;
        Ok(writer)
    }

    fn flush(&mut self) -> Result<(), CheckpointError> {
        self.file.write_all(&self.buffer).map_err(io_error(&self.temp))?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Appends a chunk of at most [`MAX_CHUNK_BYTES`].
    ///
    /// # Errors
    /// Too large, or what the file system says; after the latter only dropping makes sense.
    pub fn chunk(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        if bytes.len() > MAX_CHUNK_BYTES {
            return Err(CheckpointError::ChunkTooLarge(bytes.len()));
        }
        let packed = block::compress(bytes);
        for n in [self.chunks, bytes.len() as u32, packed.len() as u32] {
            self.buffer.extend_from_slice(&n.to_le_bytes());
        }
        self.buffer.extend_from_slice(&packed);
        self.seal();
        self.chunks += 1;
        self.raw += bytes.len() as u64;
        self.flush()
    }

    fn seal(&mut self) {
        let sum = xxh3_64_with_seed(&self.buffer, self.id.seed());
        self.buffer.extend_from_slice(&sum.to_le_bytes());
    }

    /// Makes the checkpoint durable under its name, and returns the bytes of its file. Older ones of the group stay until
    /// [`keep_from`] removes them.
    ///
    /// # Errors
    /// What the file system says; the checkpoint may then be there or not.
    pub fn finish(mut self) -> Result<u64, CheckpointError> {
        for n in [TRAILER, self.chunks, 0] {
            self.buffer.extend_from_slice(&n.to_le_bytes());
        }
        self.buffer.extend_from_slice(&self.raw.to_le_bytes());
        self.seal();
        self.flush()?;
        self.file.sync_all().map_err(io_error(&self.temp))?;
        let path = self.id.path(&self.dir);
        std::fs::rename(&self.temp, &path).map_err(io_error(&path))?;
        self.finished = true;
        sync_dir(&self.dir).map_err(io_error(&self.dir))?;
        Ok(self.written)
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_file(&self.temp);
        }
    }
}

/// Reads one checkpoint, chunk by chunk. Only when [`CheckpointReader::next_chunk`] has returned `None` is it known to be
/// whole: use nothing of it before.
#[derive(Debug)]
pub struct CheckpointReader {
    path: PathBuf,
    seed: u64,
    file: BufReader<File>,
    chunks: u32,
    raw: u64,
    ended: bool,
}

impl CheckpointReader {
    /// Opens the checkpoint of `group` at `index` and checks that it is one.
    ///
    /// # Errors
    /// Damaged, of another version, or what the file system says.
    pub fn open(dir: &Path, group: u64, index: u64) -> Result<CheckpointReader, CheckpointError> {
        let id = CheckpointId { group, index };
        let path = id.path(dir);
        let file = File::open(&path).map_err(io_error(&path))?;
        let mut reader = CheckpointReader {
            path,
            seed: id.seed(),
            file: BufReader::with_capacity(256 << 10, file),
            chunks: 0,
            raw: 0,
            ended: false,
        };
        let mut header = [0; HEADER_BYTES];
        reader.fill(&mut header)?;
        let sum = xxh3_64(&header[..24]).to_le_bytes();
        if header[..7] != *MAGIC || header[24..] != sum {
            return Err(reader.corrupt("its header is damaged"));
        }
        if header[7] != VERSION {
            return Err(CheckpointError::Version { path: reader.path, version: header[7] });
        }
        if header != id.header() {
            return Err(reader.corrupt("it belongs to another replica or index"));
        }
        Ok(reader)
    }

    fn corrupt(&self, what: &'static str) -> CheckpointError {
        CheckpointError::Corrupt { path: self.path.clone(), what }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), CheckpointError> {
        self.file.read_exact(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => self.corrupt("it ends too early"),
            _ => io_error(&self.path)(e),
        })
    }

    /// The next chunk, at most [`MAX_CHUNK_BYTES`], or `None` at the verified end. Memory is taken only for lengths within
    /// the bounds.
    ///
    /// # Errors
    /// Damaged, or what the file system says; nothing of the checkpoint may be used then.
    pub fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, CheckpointError> {
        if self.ended {
            return Ok(None);
        }
        let mut head = [0; 12];
        self.fill(&mut head)?;
        let word = |i: usize| u32::from_le_bytes([head[4 * i], head[4 * i + 1], head[4 * i + 2], head[4 * i + 3]]);
        let (number, raw, packed) = (word(0), word(1) as usize, word(2) as usize);
        if number == TRAILER {
            let mut rest = [0; 16];
            self.fill(&mut rest)?;
            let content = [&head[..], &rest[..8]].concat();
            let total = self.raw.to_le_bytes();
            if rest[8..] != xxh3_64_with_seed(&content, self.seed).to_le_bytes()
                || word(1) != self.chunks
                || rest[..8] != total
            {
                return Err(self.corrupt("its end does not fit"));
            }
            if self.file.read(&mut [0]).map_err(io_error(&self.path))? != 0 {
                return Err(self.corrupt("something follows its end"));
            }
            self.ended = true;
            return Ok(None);
        }
        if number != self.chunks || raw > MAX_CHUNK_BYTES || packed > block::get_maximum_output_size(MAX_CHUNK_BYTES) {
            return Err(self.corrupt("a chunk's header is damaged"));
        }
        let mut bytes = vec![0; 12 + packed + 8];
        bytes[..12].copy_from_slice(&head);
        self.fill(&mut bytes[12..])?;
        let (content, sum) = bytes.split_at(12 + packed);
        if sum != xxh3_64_with_seed(content, self.seed).to_le_bytes() {
            return Err(self.corrupt("a chunk's checksum does not fit"));
        }
        let chunk = block::decompress(&content[12..], raw).map_err(|_| self.corrupt("a chunk cannot be unpacked"))?;
        if chunk.len() != raw {
            return Err(self.corrupt("a chunk has another length"));
        }
        self.chunks += 1;
        self.raw += raw as u64;
        Ok(Some(chunk))
    }
}

impl Iterator for CheckpointReader {
    type Item = Result<Vec<u8>, CheckpointError>;

    /// [`CheckpointReader::next_chunk`]; ends after an error as well.
    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_chunk();
        self.ended |= next.is_err();
        next.transpose()
    }
}
