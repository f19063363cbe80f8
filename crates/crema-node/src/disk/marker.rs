//! How far the log was synced, kept beside the log.
//!
//! A log's own recovery cannot tell a tail that was torn before it was synced from one that was synced and then lost; this
//! file can. Two slots of one page each are written in turn, after each sync of the log and before anybody is told, with a
//! plain write: after the death of the process the file is exact, after a loss of power it may be older than the log,
//! never newer.
//!
//! Slot: magic (8 bytes) | sequence (u64 LE) | xxh3 of both (u64 LE).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

const NAME: &str = "synced";
const MAGIC: &[u8; 8] = b"crmsync1";
const SLOT_BYTES: usize = 24;
/// Slots lie in pages of their own, so that one torn write never hurts both.
const SLOT_STRIDE: usize = 4096;

fn slot(sequence: u64) -> [u8; SLOT_BYTES] {
    let mut out = [0; SLOT_BYTES];
    out[..8].copy_from_slice(MAGIC);
    out[8..16].copy_from_slice(&sequence.to_le_bytes());
    let sum = xxh3_64(&out[..16]);
    out[16..].copy_from_slice(&sum.to_le_bytes());
    out
}

fn parse(bytes: &[u8]) -> Option<u64> {
    let sequence = u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?);
    (bytes[..SLOT_BYTES] == slot(sequence)).then_some(sequence)
}

/// What the file of a log directory says.
#[derive(Debug)]
pub(super) enum Found {
    /// There is none.
    Missing,
    /// Neither slot can be read.
    Damaged,
    /// Synced up to here.
    At(Marker, u64),
}

/// The open file.
#[derive(Debug)]
pub(super) struct Marker {
    file: File,
    /// Slot to be written next: the one that is older or damaged.
    next: usize,
}

impl Marker {
    /// Writes the file of an empty log, durably.
    pub(super) fn create(dir: &Path) -> io::Result<()> {
        let mut content = vec![0; SLOT_STRIDE + SLOT_BYTES];
        content[..SLOT_BYTES].copy_from_slice(&slot(0));
        content[SLOT_STRIDE..].copy_from_slice(&slot(0));
        super::replace_file(&dir.join(NAME), &content)
    }

    /// Opens the file of a log directory.
    pub(super) fn open(dir: &Path) -> io::Result<Found> {
        let file = match OpenOptions::new().read(true).write(true).open(dir.join(NAME)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            Err(e) => return Err(e),
        };
        let mut slots = [None; 2];
        for (i, slot) in slots.iter_mut().enumerate() {
            let mut bytes = [0; SLOT_BYTES];
            match file.read_exact_at(&mut bytes, (i * SLOT_STRIDE) as u64) {
                Ok(()) => *slot = parse(&bytes),
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
                Err(e) => return Err(e),
            }
        }
        let [a, b] = slots;
        match a.max(b) {
            None => Ok(Found::Damaged),
            Some(newest) => Ok(Found::At(Marker { file, next: usize::from(a >= b) }, newest)),
        }
    }

    /// Records that the log is synced up to `sequence`.
    pub(super) fn record(&mut self, sequence: u64) -> io::Result<()> {
        self.file.write_all_at(&slot(sequence), (self.next * SLOT_STRIDE) as u64)?;
        self.next ^= 1;
        Ok(())
    }

    /// Makes the last record itself durable; not needed for its meaning.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
