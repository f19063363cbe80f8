//! The log and the files beside it against damage: cuts, flipped bits, failing disks; and what is read back against a
//! model of what was written.
#![expect(clippy::print_stdout, reason = "figures for whoever runs them with --nocapture")]

use super::checkpoint::{self, CheckpointId, CheckpointReader, CheckpointWriter};
use super::log_engine::{Batch, LogEngine, LogError, LogOptions, LogWrite, RecoveredGroup};
use super::testing::{Model, Rng, copy_dir, scratch, small_log};
use super::{DataDir, DirError, LogWriter, Mode, SubmitError};
use crossbeam::channel::unbounded;
use raft::eraftpb::{Entry, HardState};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

const OPTIONS: LogOptions = LogOptions { target_file_bytes: 16 << 10, purge_threshold_bytes: 64 << 10 };

fn entry(index: u64, term: u64, size: usize) -> Entry {
    let data: Vec<u8> = (0..size).map(|i| (index as usize * 31 + term as usize * 7 + i) as u8).collect();
    Entry { index, term, data: data.into(), ..Entry::default() }
}

fn hard(term: u64, commit: u64) -> Option<HardState> {
    Some(HardState { term, vote: 1, commit, ..HardState::default() })
}

fn batch(number: u64, writes: Vec<LogWrite>) -> Batch {
    Batch { number, writes }
}

fn open(dir: &Path) -> Result<(LogEngine, Vec<RecoveredGroup>), LogError> {
    LogEngine::open(dir, OPTIONS)
}

fn new_log() -> (tempfile::TempDir, LogEngine) {
    let dir = scratch();
    LogEngine::create(dir.path()).unwrap();
    let (engine, groups) = open(dir.path()).unwrap();
    assert!(groups.is_empty());
    (dir, engine)
}

/// The last file of the append queue.
fn last_file(dir: &Path) -> PathBuf {
    let mut files: Vec<_> = fs::read_dir(dir.join("raft")).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "raftlog"));
    files.sort();
    files.pop().unwrap()
}

#[test]
fn what_was_written_is_read_back_over_restarts_with_purges_between() {
    let seed = 7;
    let mut rng = Rng::new(seed);
    let dir = scratch();
    LogEngine::create(dir.path()).unwrap();
    let mut model = Model::default();
    let (mut purged_files, mut rewritten) = (false, false);
    for life in 0..12 {
        let (mut engine, groups) = open(dir.path()).unwrap();
        assert_eq!(groups, model.recovered(), "seed {seed} life {life}");
        for step in 0..60 {
            let writes = (0..rng.below(6)).map(|_| model.random_write(&mut rng)).collect();
            engine.write(&[batch(step, writes)]).unwrap();
            if rng.below(4) == 0 {
                engine.purger().purge().unwrap();
            }
        }
        drop(engine);
        let files: Vec<_> = fs::read_dir(dir.path().join("raft")).unwrap().map(Result::unwrap).collect();
        purged_files |= !files.iter().any(|f| f.file_name() == "0000000000000001.raftlog");
        let rewrite = files.iter().filter(|f| f.path().extension().is_some_and(|e| e == "rewrite"));
        // More than its header.
        rewritten |= rewrite.map(|f| f.metadata().unwrap().len()).any(|len| len > 200);
    }
    assert!(purged_files && rewritten, "the test must exercise deletion and both queues: {purged_files} {rewritten}");
}

#[test]
fn a_conflicting_tail_is_replaced() {
    let (dir, mut engine) = new_log();
    let entries = (1..=9).map(|i| entry(i, 1, 20)).collect();
    engine.write(&[batch(1, vec![LogWrite { group: 5, entries, hard: hard(1, 3), ..Default::default() }])]).unwrap();
    let entries = vec![entry(5, 2, 30)];
    engine.write(&[batch(2, vec![LogWrite { group: 5, entries, hard: hard(2, 5), ..Default::default() }])]).unwrap();
    drop(engine);
    let (_engine, groups) = open(dir.path()).unwrap();
    let expected: Vec<_> = (1..=4).map(|i| entry(i, 1, 20)).chain([entry(5, 2, 30)]).collect();
    assert_eq!(groups[0].entries, expected);
    assert_eq!((groups[0].last_index(), groups[0].hard.term, groups[0].hard.commit), (5, 2, 5));
}

#[test]
fn compaction_snapshots_and_removal_survive_a_restart() {
    let (dir, mut engine) = new_log();
    let many = |group| LogWrite { group, entries: (1..=9).map(|i| entry(i, i, 20)).collect(), ..Default::default() };
    engine.write(&[batch(1, vec![many(1), many(2), many(3)])]).unwrap();
    let compact = LogWrite { group: 1, compact_to: Some(4), ..Default::default() };
    let snapshot = LogWrite {
        group: 2,
        compact_to: Some(100),
        entries: vec![entry(101, 12, 5)],
        meta: Some(b"new".to_vec()),
        hard: hard(12, 100),
        ..Default::default()
    };
    let gone = LogWrite { group: 3, remove: true, ..Default::default() };
    engine.write(&[batch(2, vec![compact, snapshot, gone])]).unwrap();
    drop(engine);
    for _ in 0..2 {
        let (_engine, groups) = open(dir.path()).unwrap();
        let got: Vec<_> =
            groups.iter().map(|g| (g.group, g.compacted_to, g.compacted_term, g.entries.len(), &g.meta[..])).collect();
        assert_eq!(got, [(1, 4, Some(4), 5, &b""[..]), (2, 100, None, 1, &b"new"[..])]);
    }
}

#[test]
fn what_cannot_be_kept_is_refused_and_stops_the_log() {
    let reject = |write: LogWrite, word: &str| {
        let (dir, mut engine) = new_log();
        let first = LogWrite { group: 1, entries: vec![entry(1, 1, 1), entry(2, 1, 1)], ..Default::default() };
        let compact = LogWrite { group: 1, compact_to: Some(1), ..Default::default() };
        engine.write(&[batch(1, vec![first, compact])]).unwrap();
        let error = engine.write(&[batch(2, vec![write])]).unwrap_err();
        assert!(matches!(&error, LogError::BadWrite(what) if what.contains(word)), "{error}");
        assert!(matches!(engine.write(&[batch(3, vec![LogWrite::default()])]), Err(LogError::Stopped(_))));
        drop(engine);
        assert_eq!(open(dir.path()).unwrap().1[0].entries, [entry(2, 1, 1)]);
    };
    let with = |entries| LogWrite { group: 1, entries, ..Default::default() };
    reject(with(vec![entry(4, 1, 1)]), "do not join");
    reject(with(vec![entry(1, 1, 1)]), "do not join");
    reject(with(vec![entry(3, 1, 1), entry(5, 1, 1)]), "follows");
    reject(LogWrite { group: 1, hard: hard(1, 3), ..Default::default() }, "commit");
    reject(LogWrite { group: u64::MAX, ..Default::default() }, "reserved");
    reject(LogWrite { group: 1, remove: true, meta: Some(vec![]), ..Default::default() }, "removed");
}

#[test]
fn two_engines_on_one_thread_read_their_own_entries() {
    // raft-engine caches the last block a thread has read, by file and offset only.
    let logs: Vec<_> = (1..=2)
        .map(|term| {
            let (dir, mut engine) = new_log();
            let entries = vec![entry(1, term, 64)];
            engine.write(&[batch(1, vec![LogWrite { group: 1, entries, ..Default::default() }])]).unwrap();
            dir
        })
        .collect();
    for (term, dir) in (1..=2).zip(&logs) {
        assert_eq!(open(dir.path()).unwrap().1[0].entries, [entry(1, term, 64)]);
    }
}

#[test]
fn a_log_has_one_owner() {
    let (dir, _engine) = new_log();
    let error = open(dir.path()).unwrap_err();
    assert!(matches!(error, LogError::Io(_)) && !error.is_lost(), "{error}");
}

#[test]
fn a_log_that_is_not_there_was_lost() {
    let dir = scratch();
    assert!(matches!(open(dir.path()), Err(LogError::Missing { .. })));
    let (dir, engine) = new_log();
    drop(engine);
    fs::remove_dir_all(dir.path().join("raft")).unwrap();
    for _ in 0..2 {
        assert!(matches!(open(dir.path()), Err(LogError::LostTail { recovered: 0, .. })), "stays refused");
    }
}

/// Opens a damaged copy; when it opens, it must hold what one of the states of `history` from `synced` on held.
fn judge(dir: &Path, history: &BTreeMap<u64, Vec<RecoveredGroup>>, synced: u64, what: &str) -> bool {
    match open(dir) {
        Ok((engine, groups)) => {
            // The opening itself is one write.
            let sequence = engine.sequence() - 1;
            assert!(sequence >= synced, "{what}: {sequence} of {synced} synced writes, unnoticed");
            assert!(history.get(&sequence) == Some(&groups), "{what}: other content at {sequence}");
            true
        }
        Err(e) => {
            assert!(e.is_lost(), "{what}: {e}");
            // Of the cuts a sample: openings are slow.
            if !what.starts_with("cut") || what.ends_with('7') {
                assert!(open(dir).is_err(), "{what}: refused once, then taken");
            }
            false
        }
    }
}

#[test]
fn a_cut_at_any_byte_of_the_tail_loses_nothing_that_was_synced() {
    let dir = scratch();
    let history = small_log(dir.path(), OPTIONS, 40);
    let end = *history.keys().last().unwrap();
    let file = last_file(dir.path());
    let whole = fs::read(&file).unwrap();
    let exact = fs::read(dir.path().join("synced")).unwrap();
    let copy = scratch();
    let from = whole.len().saturating_sub(4096);
    let (mut opened, mut refused) = (0, 0);
    for len in from..=whole.len() {
        let at = copy.path().join(len.to_string());
        copy_dir(dir.path(), &at);
        let target = at.join("raft").join(file.file_name().unwrap());
        fs::write(&target, &whole[..len]).unwrap();
        // The marker of a process that was killed is exact.
        fs::write(at.join("synced"), &exact).unwrap();
        let whole_again = judge(&at, &history, end, &format!("cut at {len}"));
        assert_eq!(whole_again, len == whole.len(), "cut at {len} of {}", whole.len());
        fs::remove_dir_all(&at).unwrap();
        // The marker of a machine that lost power is older; then what is missing was perhaps never synced.
        copy_dir(dir.path(), &at);
        fs::write(&target, &whole[..len]).unwrap();
        fs::remove_file(at.join("synced")).unwrap();
        super::marker::Marker::create(&at).unwrap();
        if judge(&at, &history, 0, &format!("cut at {len}, old marker")) {
            opened += 1;
        } else {
            refused += 1;
        }
        fs::remove_dir_all(&at).unwrap();
    }
    println!("cuts {} from {from}: with an old marker {opened} opened, {refused} refused", whole.len() - from + 1);
    assert_eq!(refused, 0, "a cut is always a prefix");
}

#[test]
fn single_flipped_bits_of_the_log_are_noticed_or_harmless() {
    let seed = 20_241;
    let mut rng = Rng::new(seed);
    let dir = scratch();
    let history = small_log(dir.path(), OPTIONS, 150);
    let end = *history.keys().last().unwrap();
    let files: Vec<PathBuf> = fs::read_dir(dir.path().join("raft"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some() && fs::metadata(p).unwrap().len() > 0)
        .chain([dir.path().join("synced")])
        .collect();
    assert!(files.iter().any(|f| f.extension().is_some_and(|e| e == "rewrite") && fs::read(f).unwrap().len() > 100));
    let copy = scratch();
    let (mut harmless, mut noticed) = (0, 0);
    for trial in 0..700 {
        let file = &files[rng.below(files.len() as u64) as usize];
        let mut bytes = fs::read(file).unwrap();
        // The headers of files and batches get more than their share: no checksum covers them. So do the marker's slots.
        let at = match rng.below(4) {
            0 if file.ends_with("synced") => rng.below(24) as usize + 4096 * rng.below(2) as usize,
            0 => rng.below(100) as usize,
            1 => batch_starts(&bytes).get(rng.below(60) as usize).map_or(0, |at| at + rng.below(16) as usize),
            _ => rng.below(bytes.len() as u64) as usize,
        };
        let bit = rng.below(8);
        bytes[at] ^= 1 << bit;
        let to = copy.path().join("log");
        copy_dir(dir.path(), &to);
        fs::write(to.join(file.strip_prefix(dir.path()).unwrap()), &bytes).unwrap();
        let what = format!("seed {seed} trial {trial}: bit {bit} of byte {at} of {}", file.display());
        if judge(&to, &history, end, &what) {
            harmless += 1;
        } else {
            noticed += 1;
        }
        fs::remove_dir_all(&to).unwrap();
    }
    println!("seed {seed}: {noticed} flips noticed, {harmless} harmless");
    assert!(noticed > 300, "seed {seed}: only {noticed} were noticed");
}

/// Where the batches of a log file begin.
fn batch_starts(bytes: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = 69;
    while let Some(head) = bytes.get(at..at + 8) {
        starts.push(at);
        at += (u64::from_be_bytes(head.try_into().unwrap()) >> 8).max(16) as usize;
        if at >= bytes.len() {
            break;
        }
    }
    starts
}

#[test]
fn the_end_of_a_batch_is_where_its_record_says() {
    // `log_engine` cuts by this when only unsynced writes are damaged.
    let dir = scratch();
    small_log(dir.path(), OPTIONS, 5);
    let bytes = fs::read(last_file(dir.path())).unwrap();
    let records: Vec<_> = (0..bytes.len()).filter(|&i| bytes[i..].starts_with(b"crmrec01")).collect();
    let ends: Vec<_> = records.iter().map(|i| i + 48 + 4).collect();
    let starts = batch_starts(&bytes);
    assert_eq!(starts[0], 69);
    assert_eq!(starts[1..], ends[..ends.len() - 1]);
    assert_eq!(*ends.last().unwrap(), bytes.len());
}

#[test]
fn a_loss_of_power_that_tears_the_middle_of_what_was_not_synced_cuts_it_off() {
    // One synced write of many batches; then power is lost while another one of many is being synced: its last batch
    // reached the disk, a page of an earlier one did not.
    let options = LogOptions { target_file_bytes: 1 << 20, purge_threshold_bytes: 4 << 20 };
    let dir = scratch();
    LogEngine::create(dir.path()).unwrap();
    let (mut engine, _) = LogEngine::open(dir.path(), options).unwrap();
    let write = |group, from: u64| LogWrite {
        group,
        entries: (from..from + 3).map(|i| entry(i, 1, 3000)).collect(),
        ..Default::default()
    };
    engine.write(&[batch(1, (1..=8).map(|g| write(g, 1)).collect())]).unwrap();
    let (marker, synced) = (fs::read(dir.path().join("synced")).unwrap(), engine.sequence());
    engine.write(&[batch(2, (1..=8).map(|g| write(g, 4)).collect())]).unwrap();
    let sequence = engine.sequence();
    drop(engine);
    let file = last_file(dir.path());
    let whole = fs::read(&file).unwrap();
    let starts = batch_starts(&whole);
    assert!(sequence >= synced + 3 && starts.len() as u64 == sequence, "{synced} {sequence} {starts:?}");
    for (torn, exact) in [(starts[synced as usize] + 500, false), (starts[synced as usize] + 500, true)] {
        let copy = scratch();
        copy_dir(dir.path(), copy.path());
        let mut bytes = whole.clone();
        bytes[torn..torn + 1000].fill(0);
        fs::write(copy.path().join("raft").join(file.file_name().unwrap()), &bytes).unwrap();
        if exact {
            // The same damage, but the second write is known to have been synced.
            assert!(matches!(LogEngine::open(copy.path(), options), Err(LogError::Corrupt(_))));
            continue;
        }
        fs::write(copy.path().join("synced"), &marker).unwrap();
        let (engine, groups) = LogEngine::open(copy.path(), options).unwrap();
        assert_eq!(engine.sequence() - 1, synced);
        drop(engine);
        for g in &groups {
            let expected: Vec<_> = (1..=3).map(|i| entry(i, 1, 3000)).collect();
            assert_eq!(g.entries, expected);
        }
        assert_eq!(groups.len(), 8);
        assert_eq!(LogEngine::open(copy.path(), options).unwrap().1, groups, "and stays so");
    }
}

#[test]
fn a_crash_at_any_write_or_sync_leaves_what_was_reported_and_at_most_the_write_in_hand() {
    // A blown fuse is a crash: nothing reaches the disk after it, and the failing write is torn in half.
    let seed = 31;
    let mut rng = Rng::new(seed);
    let dir = scratch();
    LogEngine::create(dir.path()).unwrap();
    let mut possible = vec![Model::default()];
    let (mut in_purge, mut in_write) = (0, 0);
    for life in 0..300 {
        let (mut engine, groups) = open(dir.path()).unwrap();
        let found = possible.into_iter().find(|m| m.recovered() == groups);
        let mut model = found.unwrap_or_else(|| panic!("seed {seed} life {life}: neither before nor after"));
        let fuse = engine.fuse();
        let limit = if rng.below(2) == 0 { &fuse.faults.syncs_left } else { &fuse.faults.writes_left };
        limit.store(rng.below(40), Ordering::Relaxed);
        possible = loop {
            let before = model.clone();
            let writes = (0..1 + rng.below(4)).map(|_| model.random_write(&mut rng)).collect();
            if let Err(e) = engine.write(&[batch(1, writes)]) {
                assert!(e.to_string().contains("injected"), "seed {seed} life {life}: {e}");
                in_write += 1;
                break vec![before, model];
            }
            if let Err(e) = engine.purger().purge() {
                assert!(e.to_string().contains("injected"), "seed {seed} life {life}: {e}");
                in_purge += 1;
                break vec![model];
            }
        };
    }
    println!("seed {seed}: {in_write} crashes in a write, {in_purge} in a purge");
    assert!(in_write > 10 && in_purge > 10, "seed {seed}: {in_write} in a write, {in_purge} in a purge");
}

#[test]
fn a_killed_process_leaves_a_log_that_opens() {
    // A copy made while the log is open has the zeros that files are allocated ahead with.
    let seed = 5;
    let mut rng = Rng::new(seed);
    let (mut dir, mut engine) = new_log();
    let mut model = Model::default();
    for life in 0..40 {
        for number in 0..rng.below(12) {
            engine.write(&[batch(number, vec![model.random_write(&mut rng)])]).unwrap();
        }
        let copy = scratch();
        copy_dir(dir.path(), copy.path());
        drop(engine);
        let (reopened, groups) = open(copy.path()).unwrap();
        assert_eq!(groups, model.recovered(), "seed {seed} life {life}");
        (dir, engine) = (copy, reopened);
    }
    assert!(engine.sequence() > 100);
}

#[test]
fn a_failed_sync_or_write_is_reported_once_and_nothing_is_written_after_it() {
    for fail_sync in [true, false] {
        let (dir, engine) = new_log();
        let fuse = engine.fuse();
        let (told, reports) = unbounded();
        let faults = &fuse.faults;
        if fail_sync { &faults.syncs_left } else { &faults.writes_left }.store(2, Ordering::Relaxed);
        let writer = LogWriter::start(engine, move |r| told.send(r).unwrap(), |_| ()).unwrap();
        let write = |i| LogWrite { group: 1, entries: vec![entry(i, 1, 100)], ..Default::default() };
        for number in 1..=2 {
            writer.submit(batch(number, vec![write(number)])).unwrap();
            assert_eq!(reports.recv().unwrap(), Ok(number));
        }
        writer.submit(batch(3, vec![write(3)])).unwrap();
        let why = reports.recv().unwrap().unwrap_err();
        assert!(why.contains("injected failure"), "{why}");
        // The writer thread has ended, or is about to: either the batch is refused or it is never reported.
        let _ = writer.submit(batch(4, vec![write(4)]));
        let written = faults.written.load(Ordering::Relaxed);
        let size = fs::metadata(last_file(dir.path())).unwrap().len();
        writer.close();
        assert!(reports.recv().is_err(), "reported once");
        assert_eq!(faults.written.load(Ordering::Relaxed), written);
        assert_eq!(fs::metadata(last_file(dir.path())).unwrap().len(), size, "not even truncated");
        let (_engine, groups) = open(dir.path()).unwrap();
        assert!((2..=3).contains(&groups[0].last_index()), "what was reported durable is there");
    }
}

#[test]
fn the_writer_reports_in_order_and_finishes_what_waits() {
    let (dir, engine) = new_log();
    let (told, reports) = unbounded();
    let writer = LogWriter::start(engine, move |r| told.send(r).unwrap(), |_| ()).unwrap();
    for number in 1..=500 {
        let entries = vec![entry((number - 1) / 7 + 1, 1, 10)];
        let write = LogWrite { group: number % 7, entries, ..Default::default() };
        writer.submit(batch(number, vec![write])).unwrap();
    }
    writer.submit(batch(501, vec![])).unwrap();
    let stats = writer.stats().clone();
    writer.close();
    let numbers: Vec<u64> = reports.iter().map(Result::unwrap).collect();
    assert!(numbers.windows(2).all(|w| w[0] < w[1]), "{numbers:?}");
    assert_eq!(numbers.last(), Some(&501));
    let [syncs, batches, entries] = [&stats.syncs, &stats.batches, &stats.entries].map(|n| n.load(Ordering::Relaxed));
    assert_eq!((batches, entries), (500, 500), "a batch without writes is none for the disk");
    let reported = numbers.len() as u64;
    assert!(syncs == reported || syncs == reported - 1 && numbers.contains(&500), "{syncs} of {reported}");
    assert_eq!(open(dir.path()).unwrap().1.iter().map(|g| g.entries.len()).sum::<usize>(), 500);
}

#[test]
fn a_full_or_closed_queue_gives_the_batch_back() {
    let (_dir, engine) = new_log();
    let (told, reports) = unbounded();
    let (go, gate) = unbounded::<()>();
    // The writer waits in its report of the first batch until the test lets it go.
    let done = move |r| {
        told.send(r).unwrap();
        let _ = gate.recv();
    };
    let writer = LogWriter::start(engine, done, |_| ()).unwrap();
    let write = LogWrite { group: 1, meta: Some(vec![0; 1000]), ..Default::default() };
    writer.submit(batch(1, vec![write.clone()])).unwrap();
    assert_eq!(reports.recv().unwrap(), Ok(1));
    let mut number = 2;
    let full = loop {
        match writer.submit(batch(number, vec![write.clone()])) {
            Ok(()) => number += 1,
            Err(e) => break e,
        }
    };
    assert!(matches!(full, SubmitError::Full(b) if b.number == number));
    assert_eq!(number as usize, 2 + super::log_writer::MAX_QUEUED_BATCHES);
    drop(go);
    writer.close();
    assert_eq!(reports.iter().last(), Some(Ok(number - 1)));
}

#[test]
fn disk_use_stays_within_its_bound() {
    let (dir, engine) = new_log();
    let options = engine.options();
    let (told, reports) = unbounded();
    let (ask, asked) = unbounded();
    let writer = LogWriter::start(engine, move |r| told.send(r).unwrap(), move |g| ask.send(g).unwrap()).unwrap();
    const GROUPS: u64 = 16;
    let mut last = [0u64; GROUPS as usize];
    let mut compacted = [0u64; GROUPS as usize];
    let (mut largest, mut total, mut requests) = (0, 0u64, 0);
    for number in 1..=1500u64 {
        let mut writes = Vec::new();
        for g in 0..GROUPS {
            // One group is quiet after a while: its entries are rewritten. The others compact what is old.
            if g == 3 && number > 40 {
                continue;
            }
            let next = last[g as usize] + 1;
            last[g as usize] = next;
            let compact_to = (g != 3 && next > 40 && next % 16 == 0).then(|| next - 20);
            compacted[g as usize] = compact_to.unwrap_or(compacted[g as usize]);
            total += 150;
            writes.push(LogWrite { group: g, entries: vec![entry(next, 1, 100)], compact_to, ..Default::default() });
        }
        for groups in asked.try_iter() {
            requests += 1;
            for g in groups {
                let to = last[g as usize] - 1;
                compacted[g as usize] = to.max(compacted[g as usize]);
                writes.push(LogWrite { group: g, compact_to: Some(to), ..Default::default() });
            }
        }
        writer.submit(batch(number, writes)).unwrap();
        assert_eq!(reports.recv().unwrap(), Ok(number));
        let used: u64 = fs::read_dir(dir.path().join("raft"))
            .unwrap()
            .filter_map(|e| e.unwrap().metadata().ok())
            .map(|m| m.len())
            .sum();
        largest = used.max(largest);
    }
    let live: u64 = last.iter().zip(compacted).map(|(l, c)| (l - c) * 150).sum();
    let bound = options.disk_bound(GROUPS * 64 * 150);
    println!("{total} bytes written, at most {largest} of {bound} used, {live} live, {requests} requests to compact");
    assert!(total > 3 * bound, "the loop must write far more than the bound");
    assert!(largest <= bound, "{largest} > {bound}");
    writer.close();
    let (_engine, groups) = open(dir.path()).unwrap();
    for g in groups {
        assert_eq!((g.last_index(), g.compacted_to), (last[g.group as usize], compacted[g.group as usize]));
    }
}

#[test]
fn a_directory_has_one_process_one_node_and_one_cluster() {
    let dir = scratch();
    let path = dir.path().join("data");
    let (mut data, first) = DataDir::open(&path, 4, "blue", Mode::Durable).unwrap();
    assert_eq!((first.node_id, first.boot, first.uuid), (4, 1, None));
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    }
    let error = DataDir::open(&path, 4, "blue", Mode::Durable).unwrap_err();
    assert!(error.to_string().contains("another process"), "{error}");
    data.set_cluster(77, 1).unwrap();
    data.set_cluster(77, 3).unwrap();
    data.set_cluster(77, 2).unwrap();
    assert_eq!(data.identity().generation, 3, "the highest");
    assert!(matches!(data.set_cluster(78, 4), Err(DirError::WrongUuid { stored: 77, given: 78, .. })));
    drop(data);
    let error = DataDir::open(&path, 5, "blue", Mode::Durable).unwrap_err().to_string();
    assert!(error.contains("node 4") && error.contains("node 5"), "{error}");
    let error = DataDir::open(&path, 4, "red", Mode::Durable).unwrap_err().to_string();
    assert!(error.contains("\"blue\"") && error.contains("\"red\""), "{error}");
    let (_data, second) = DataDir::open(&path, 4, "blue", Mode::Durable).unwrap();
    assert_eq!(second, super::Identity { uuid: Some(77), generation: 3, boot: 2, ..first });
}

#[test]
fn lives_of_the_log() {
    let dir = scratch();
    let memory = |n| DataDir::open(dir.path(), n, "c", Mode::IdentityOnly);
    let durable = |n| DataDir::open(dir.path(), n, "c", Mode::Durable);
    let (data, a) = memory(1).unwrap();
    assert_eq!((data.log_dir(), data.checkpoint_dir()), (None, None));
    drop(data);
    let b = memory(1).unwrap().1;
    assert_ne!(a.incarnation, b.incarnation, "a log in memory ends with its process");
    let (data, c) = durable(1).unwrap();
    assert_ne!(b.incarnation, c.incarnation, "a log that begins now is a new one");
    let log = data.log_dir().unwrap();
    open(&log).unwrap();
    drop(data);
    let (mut data, d) = durable(1).unwrap();
    assert_eq!(c.incarnation, d.incarnation);
    for life in 1..=3 {
        let (mut engine, groups) = open(&log).unwrap();
        assert!(groups.is_empty(), "life {life} begins empty");
        engine.write(&[batch(1, vec![LogWrite { group: 1, ..Default::default() }])]).unwrap();
        drop(engine);
        assert_eq!(data.new_life(life).unwrap().incarnation, life);
    }
    let mut lost: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    lost.retain(|n| n.to_str().unwrap().starts_with("lost-"));
    lost.sort();
    assert_eq!(lost, ["lost-2", "lost-3"]);
    let (_engine, groups) = open(&dir.path().join("lost-3").join("log")).unwrap();
    assert_eq!(groups.len(), 1, "what is aside is whole");
    drop(data);
    let (_data, e) = memory(1).unwrap();
    assert_ne!(e.incarnation, 3);
    assert!(!log.exists(), "a stale log must not come back");
}

#[test]
fn a_log_without_identity_and_a_log_that_vanished_are_refused() {
    let dir = scratch();
    let (data, _) = DataDir::open(dir.path(), 1, "c", Mode::Durable).unwrap();
    let log = data.log_dir().unwrap();
    drop(data);
    fs::remove_dir_all(&log).unwrap();
    let (data, _) = DataDir::open(dir.path(), 1, "c", Mode::Durable).unwrap();
    assert!(matches!(open(&log), Err(LogError::Missing { .. })));
    drop(data);
    fs::remove_file(dir.path().join("identity")).unwrap();
    let error = DataDir::open(dir.path(), 1, "c", Mode::Durable).unwrap_err();
    assert!(matches!(error, DirError::Foreign { .. }), "{error}");
}

#[test]
fn every_flipped_bit_and_every_cut_of_an_identity_is_refused() {
    let dir = scratch();
    let (data, _) = DataDir::open(dir.path(), 1, "c", Mode::Durable).unwrap();
    drop(data);
    let file = dir.path().join("identity");
    let whole = fs::read(&file).unwrap();
    let damaged = (0..whole.len() * 8)
        .map(|bit| {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        })
        .chain((0..whole.len()).map(|len| whole[..len].to_vec()));
    for bytes in damaged {
        fs::write(&file, &bytes).unwrap();
        let error = DataDir::open(dir.path(), 1, "c", Mode::Durable).unwrap_err();
        assert!(matches!(error, DirError::Damaged { .. }), "{error}");
        assert_eq!(fs::read(&file).unwrap(), bytes, "left as it is");
    }
    // A version that is not ours, but whole.
    let mut newer = whole[..whole.len() - 8].to_vec();
    newer[0] = 3;
    newer.extend(xxhash_rust::xxh3::xxh3_64(&newer).to_le_bytes());
    fs::write(&file, newer).unwrap();
    let error = DataDir::open(dir.path(), 1, "c", Mode::Durable).unwrap_err();
    assert!(matches!(error, DirError::Newer { version: 3, .. }), "{error}");
}

fn read_all(dir: &Path, group: u64, index: u64) -> Result<Vec<Vec<u8>>, checkpoint::CheckpointError> {
    CheckpointReader::open(dir, group, index)?.collect()
}

fn write_all(dir: &Path, group: u64, index: u64, chunks: &[Vec<u8>]) -> u64 {
    let mut writer = CheckpointWriter::create(dir, group, index).unwrap();
    for chunk in chunks {
        writer.chunk(chunk).unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn checkpoints_are_read_back_and_those_that_are_named_are_kept() {
    let dir = scratch();
    let path = dir.path().join("checkpoints");
    checkpoint::open_dir(&path, &[]).unwrap();
    let big: Vec<u8> = (0..4 << 20).map(|i| (i / 100) as u8).collect();
    let chunks = vec![b"first".to_vec(), vec![], big];
    let bytes = write_all(&path, 7, 10, &chunks);
    assert!(bytes < 1 << 20, "compressed");
    assert_eq!(bytes, fs::metadata(path.join("7-10.ckpt")).unwrap().len());
    write_all(&path, 7, 9, &[]);
    // Whole, but its record was not durable when the machine stopped.
    write_all(&path, 7, 13, &[]);
    write_all(&path, 8, 1, &[]);
    assert_eq!(read_all(&path, 7, 10).unwrap(), chunks);
    assert_eq!(read_all(&path, 8, 1).unwrap(), Vec::<Vec<u8>>::new());
    let mut unfinished = CheckpointWriter::create(&path, 7, 11).unwrap();
    unfinished.chunk(b"half").unwrap();
    let too_large = vec![0; checkpoint::MAX_CHUNK_BYTES + 1];
    assert!(matches!(unfinished.chunk(&too_large), Err(checkpoint::CheckpointError::ChunkTooLarge(_))));
    // As after a kill: the file stays, the writer does not clean up.
    std::mem::forget(unfinished);
    fs::write(path.join("7-012.ckpt"), b"no name of ours").unwrap();
    checkpoint::open_dir(&path, &[(7, 10), (8, 1)].map(|(group, index)| CheckpointId { group, index })).unwrap();
    let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["7-012.ckpt", "7-10.ckpt", "8-1.ckpt"]);
    drop(CheckpointWriter::create(&path, 7, 12).unwrap());
    assert!(!path.join("7-12.ckpt.tmp").exists());
    checkpoint::remove_group(&path, 7).unwrap();
    assert!(path.join("8-1.ckpt").exists() && !path.join("7-10.ckpt").exists());
}

#[test]
fn flipped_bits_cuts_and_additions_of_a_checkpoint_are_noticed() {
    let seed = 99;
    let mut rng = Rng::new(seed);
    let dir = scratch();
    let chunks: Vec<Vec<u8>> = (0..4).map(|n| (0..700).map(|_| rng.below(4) as u8 + n).collect()).collect();
    write_all(dir.path(), 3, 5, &chunks);
    let file = dir.path().join("3-5.ckpt");
    let whole = fs::read(&file).unwrap();
    for trial in 0..300 {
        let mut bytes = whole.clone();
        let bit = rng.below(whole.len() as u64 * 8) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&file, &bytes).unwrap();
        assert!(read_all(dir.path(), 3, 5).is_err(), "seed {seed} trial {trial}: bit {bit}");
    }
    for len in 0..whole.len() {
        fs::write(&file, &whole[..len]).unwrap();
        assert!(read_all(dir.path(), 3, 5).is_err(), "cut at {len}");
    }
    fs::write(&file, [&whole[..], &[0]].concat()).unwrap();
    assert!(read_all(dir.path(), 3, 5).is_err(), "something added");
    fs::write(dir.path().join("3-6.ckpt"), &whole).unwrap();
    assert!(read_all(dir.path(), 3, 6).is_err(), "another one's name");
    fs::write(&file, &whole).unwrap();
    assert_eq!(read_all(dir.path(), 3, 5).unwrap(), chunks);
}
