//! *Committed entries never change*, and *leader completeness*: who leads has every entry committed in earlier terms
//! (Raft, section 5.4).

use super::{Glance, Invariant, Sighting};
use bytes::Bytes;
use crema_core::{NodeId, ShardId};
use std::collections::BTreeMap;

struct Entry {
    term: u64,
    data: Bytes,
    /// Term of the replica that was first seen to have it committed: at least the term in which it was committed.
    /// Leaders of later terms have it; one of an earlier term, elected by delayed votes, need not.
    in_term: u64,
}

/// Every entry ever seen committed, by group and index.
#[derive(Default)]
pub(super) struct Committed(BTreeMap<ShardId, BTreeMap<u64, Entry>>);

/// Where a log was seen, and what of it is to be compared: indexes above `from`.
#[derive(Clone, Copy)]
struct Place {
    shard: ShardId,
    node: NodeId,
    term: u64,
    from: u64,
    committed: u64,
    elected: bool,
}

impl Committed {
    fn see(&mut self, at: Place, log: &[(u64, u64, Bytes)], bad: &mut Vec<String>) {
        let Place { shard, node, .. } = at;
        let group = self.0.entry(shard).or_default();
        for (index, term, data) in log {
            // A new leader's whole log counts: with another entry in place of a committed one it lacks that one.
            if *index > at.committed && !at.elected {
                break;
            }
            if *index <= at.from {
                continue;
            }
            let Some(c) = group.get(index) else {
                if *index <= at.committed {
                    group.insert(*index, Entry { term: *term, data: data.clone(), in_term: at.term });
                }
                continue;
            };
            let same = (c.term, &c.data) == (*term, data);
            if !same && *index <= at.committed {
                bad.push(format!(
                    "{shard:?}: committed entry {index} was of term {}, on {node:?} it is of term {term}",
                    c.term
                ));
            } else if !same && c.in_term < at.term {
                bad.push(format!(
                    "{shard:?}: {node:?} leads term {} with another entry {index} than the committed one",
                    at.term
                ));
            }
        }
        let last = log.last().map_or(0, |e| e.0);
        if at.elected
            && let Some((missing, _)) = group.range(last + 1..).find(|(_, c)| last > 0 && c.in_term < at.term)
        {
            bad.push(format!("{shard:?}: {node:?} leads term {} without the committed entry {missing}", at.term));
        }
    }
}

impl Invariant for Committed {
    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        for g in seen.replicas {
            let Glance { replica, state, .. } = *g;
            let (before, elected) = (g.committed_before(), g.elected());
            if state.committed > before || elected || seen.whole {
                let from = if elected || seen.whole { 0 } else { before };
                let (shard, term, committed) = (state.shard, state.term, state.committed);
                self.see(Place { shard, node: seen.node, term, from, committed, elected }, &replica.log(), bad);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::entry;
    use super::*;

    fn see(c: &mut Committed, term: u64, committed: u64, elected: bool, log: &[(u64, u64, Bytes)]) -> Vec<String> {
        let mut bad = Vec::new();
        c.see(Place { shard: ShardId(0), node: NodeId(1), term, from: 0, committed, elected }, log, &mut bad);
        bad
    }

    #[test]
    fn a_committed_entry_that_changes_is_found() {
        let mut c = Committed::default();
        assert!(see(&mut c, 3, 2, false, &[entry(2, 2, "a"), entry(3, 2, "b")]).is_empty());
        // Entry 3 is not committed yet and may change.
        assert!(see(&mut c, 3, 3, false, &[entry(2, 2, "a"), entry(3, 3, "c")]).is_empty());
        assert!(see(&mut c, 3, 2, false, &[entry(2, 3, "a")])[0].contains("committed entry 2"));
        assert!(see(&mut c, 3, 2, false, &[entry(2, 2, "x")])[0].contains("committed entry 2"));
        assert!(see(&mut c, 3, 1, false, &[entry(2, 3, "a")]).is_empty(), "not committed there");
    }

    #[test]
    fn a_leader_without_a_committed_entry_is_found() {
        let mut c = Committed::default();
        let log = [entry(2, 2, "a"), entry(3, 2, "b")];
        assert!(see(&mut c, 2, 3, false, &log).is_empty());
        assert!(see(&mut c, 3, 2, true, &log).is_empty(), "it has them, though it does not know them committed");
        assert!(see(&mut c, 3, 2, true, &log[..1])[0].contains("without the committed entry 3"));
        let other = [entry(2, 2, "a"), entry(3, 1, "x")];
        assert!(see(&mut c, 3, 2, true, &other)[0].contains("another entry 3"));
        // A leader of the term in which it was committed, or of one before, need not have it yet.
        assert!(see(&mut c, 2, 2, true, &log[..1]).is_empty());
    }
}
