//! What the tests of this module share.

use super::log_engine::{Batch, LogEngine, LogOptions, LogWrite, RecoveredGroup};
use raft::eraftpb::{Entry, HardState};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io};

/// Faults of the disk, counted down to.
#[derive(Debug)]
pub(super) struct Faults {
    /// Number of syncs that still succeed.
    pub(super) syncs_left: AtomicU64,
    /// Number of writes that still succeed.
    pub(super) writes_left: AtomicU64,
    /// Bytes that reached the inner file system.
    pub(super) written: AtomicU64,
}

impl Default for Faults {
    fn default() -> Self {
        Faults {
            syncs_left: AtomicU64::new(u64::MAX),
            writes_left: AtomicU64::new(u64::MAX),
            written: AtomicU64::new(0),
        }
    }
}

fn take(left: &AtomicU64, what: &str) -> io::Result<()> {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
        .map(|_| ())
        .map_err(|_| io::Error::other(format!("injected failure of a {what}")))
}

impl Faults {
    pub(super) fn sync(&self) -> io::Result<()> {
        take(&self.syncs_left, "sync")
    }

    pub(super) fn write(&self, buf: &[u8]) -> io::Result<()> {
        take(&self.writes_left, "write")?;
        self.written.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// A small generator of numbers that is the same for ever (splitmix64).
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Rng(seed)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// What a log should hold.
#[derive(Clone, Default)]
pub(super) struct Model {
    groups: BTreeMap<u64, RecoveredGroup>,
    next_group: u64,
}

impl Model {
    pub(super) fn recovered(&self) -> Vec<RecoveredGroup> {
        self.groups.values().cloned().collect()
    }

    /// A write that a replica could ask for; the model takes it as done.
    pub(super) fn random_write(&mut self, rng: &mut Rng) -> LogWrite {
        let create = self.groups.len() < 12;
        let groups: Vec<u64> = self.groups.keys().copied().collect();
        if create && (groups.is_empty() || rng.below(3) == 0) {
            self.next_group += 1;
            let meta = vec![self.next_group as u8; rng.below(50) as usize];
            let group = self.next_group;
            let compacted_to = rng.below(3);
            let fresh = RecoveredGroup {
                group,
                meta: meta.clone(),
                hard: HardState::default(),
                compacted_to,
                compacted_term: None,
                entries: vec![],
            };
            self.groups.insert(group, fresh);
            return LogWrite { group, meta: Some(meta), compact_to: Some(compacted_to), ..Default::default() };
        }
        let group = groups[rng.below(groups.len() as u64) as usize];
        if rng.below(60) == 0 {
            self.groups.remove(&group);
            return LogWrite { group, remove: true, ..Default::default() };
        }
        let g = self.groups.get_mut(&group).expect("chosen among them");
        let mut write = LogWrite { group, ..Default::default() };
        let term_at = |g: &RecoveredGroup, index: u64| {
            index.checked_sub(g.compacted_to + 1).and_then(|i| g.entries.get(i as usize)).map(|e| e.term)
        };
        if rng.below(5) != 0 {
            // Sometimes in place of a tail that conflicts.
            let back = if rng.below(6) == 0 { rng.below(g.entries.len() as u64 + 1) } else { 0 };
            let from = g.last_index() + 1 - back;
            if back > 0 || rng.below(10) == 0 {
                g.hard.term += 1;
            }
            g.entries.truncate((from - g.compacted_to - 1) as usize);
            for index in from..from + 1 + rng.below(8) {
                let data: Vec<u8> = (0..rng.below(300)).map(|_| rng.below(256) as u8).collect();
                let e = Entry { index, term: g.hard.term, data: data.into(), ..Entry::default() };
                g.entries.push(e.clone());
                write.entries.push(e);
            }
            g.hard.commit = g.compacted_to + rng.below(g.entries.len() as u64 + 1);
            write.hard = Some(g.hard.clone());
        }
        if rng.below(5) == 0 {
            let to = g.compacted_to + rng.below(g.entries.len() as u64 + 1);
            if to > g.compacted_to {
                g.compacted_term = term_at(g, to);
                g.entries.drain(..(to - g.compacted_to) as usize);
                g.compacted_to = to;
            }
            write.compact_to = Some(to);
        } else if rng.below(40) == 0 && write.entries.is_empty() {
            // A snapshot beyond the end.
            let to = g.last_index() + 1 + rng.below(20);
            g.entries.clear();
            (g.compacted_to, g.compacted_term) = (to, None);
            write.compact_to = Some(to);
        }
        if rng.below(15) == 0 {
            g.meta = vec![rng.below(256) as u8; rng.below(80) as usize];
            write.meta = Some(g.meta.clone());
        }
        write
    }
}

/// Writes a log of several files, of which the older ones were purged, and returns its state after each write.
pub(super) fn small_log(dir: &Path, options: LogOptions, writes: u64) -> BTreeMap<u64, Vec<RecoveredGroup>> {
    let mut rng = Rng::new(writes);
    let mut model = Model::default();
    let mut history = BTreeMap::new();
    LogEngine::create(dir).unwrap();
    let (mut engine, _) = LogEngine::open(dir, options).unwrap();
    history.insert(0, vec![]);
    history.insert(engine.sequence(), vec![]);
    for number in 0..writes {
        let writes = (0..1 + rng.below(4)).map(|_| model.random_write(&mut rng)).collect();
        engine.write(&[Batch { number, writes }]).unwrap();
        history.insert(engine.sequence(), model.recovered());
        engine.purger().purge().unwrap();
    }
    history
}

/// A directory for a test, in memory where the system offers that: the tests sync thousands of times, and what a sync is
/// good for they do not test.
pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

pub(super) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
