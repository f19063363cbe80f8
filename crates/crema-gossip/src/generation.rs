//! The generation of a node's gossip, kept in a file.
//!
//! Peers ignore a life whose generation is below one that they have seen of the node. The clock alone cannot keep that from
//! happening: one that was fast and was set right makes the next life look like an earlier one. So the last generation is on
//! disk before anybody hears of it, and the next one exceeds it.
//!
//! File: version 1 (u8) | generation (u64 LE) | the first 8 bytes of the SHA-256 of all before it.

use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;

const VERSION: u8 = 1;
const SUM_BYTES: usize = 8;
const FILE_BYTES: usize = 1 + 8 + SUM_BYTES;

fn encode(generation: u64) -> Vec<u8> {
    let mut content = vec![VERSION];
    content.extend(generation.to_le_bytes());
    let sum = Sha256::digest(&content);
    content.extend(&sum[..SUM_BYTES]);
    content
}

fn decode(content: &[u8]) -> Option<u64> {
    let generation = u64::from_le_bytes(content.get(1..9)?.try_into().ok()?);
    (content == encode(generation)).then_some(generation)
}

fn read(path: &Path) -> io::Result<Option<u64>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut content = Vec::with_capacity(FILE_BYTES + 1);
    file.take(FILE_BYTES as u64 + 1).read_to_end(&mut content)?;
    let generation = decode(&content);
    if generation.is_none() {
        // Nothing but this file's purpose is lost: should peers remember a later life, gossip itself will tell.
        tracing::warn!(path = %path.display(), "gossip: the file of the last generation is damaged and begun anew");
    }
    Ok(generation)
}

/// The next generation: `wanted`, or more if that does not exceed the one in the file. It is durable when this returns.
/// Blocks; only one process may use the file.
///
/// Errors: what the file system says. A damaged file is none.
pub(crate) fn next(path: &Path, wanted: u64) -> io::Result<u64> {
    let generation = match read(path)? {
        Some(last) => wanted.max(last.saturating_add(1)),
        None => wanted,
    };
    let temp = path.with_extension("tmp");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&temp)?;
    file.write_all(&encode(generation))?;
    file.sync_all()?;
    std::fs::rename(&temp, path)?;
    // The name is durable once its directory is.
    if let Some(dir) = path.parent() {
        File::open(if dir.as_os_str().is_empty() { Path::new(".") } else { dir })?.sync_all()?;
    }
    Ok(generation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::tempdir;

    #[test]
    fn each_generation_exceeds_the_last_whatever_the_clock_says() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("gossip");
        assert_eq!(next(&path, 1_000).unwrap(), 1_000);
        // The clock was set back, and then it is right again.
        assert_eq!(next(&path, 10).unwrap(), 1_001);
        assert_eq!(next(&path, 1_001).unwrap(), 1_002);
        assert_eq!(next(&path, 5_000).unwrap(), 5_000);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left behind");
    }

    #[test]
    fn a_damaged_file_is_begun_anew_and_a_missing_directory_is_an_error() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("gossip");
        next(&path, 1_000).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            std::fs::write(&path, &changed).unwrap();
            assert_eq!(next(&path, 10).unwrap(), 10, "byte {at}");
        }
        for content in [&whole[..5], &[&whole[..], &[0]].concat(), &[]] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(next(&path, 10).unwrap(), 10);
        }
        assert!(next(&dir.path().join("none").join("gossip"), 1).is_err());
    }
}
