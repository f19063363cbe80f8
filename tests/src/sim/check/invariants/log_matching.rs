//! *Log matching*: entries of equal (index, term) are equal, and so is everything before them (Raft, section 5.3).
//!
//! Compared now and then, as whole logs; whatever is wrong stays in a log long enough to be seen.

use super::{Invariant, Sighting};
use bytes::Bytes;
use crema_core::{NodeId, ShardId};
use std::collections::BTreeMap;

/// By group, index and term: payload, and term of the entry before if it was ever seen beside it.
#[derive(Default)]
pub(super) struct LogMatching(BTreeMap<(ShardId, u64, u64), (Bytes, Option<u64>)>);

impl LogMatching {
    fn see(&mut self, shard: ShardId, node: NodeId, log: &[(u64, u64, Bytes)], bad: &mut Vec<String>) {
        let mut before: Option<u64> = None;
        for (index, term, data) in log {
            let (index, term) = (*index, *term);
            let (d, b) = self.0.entry((shard, index, term)).or_insert_with(|| (data.clone(), before));
            if d != data {
                bad.push(format!("{shard:?}: entry {index} of term {term} differs on {node:?}"));
            }
            match (*b, before) {
                (Some(x), Some(y)) if x != y => {
                    bad.push(format!(
                        "{shard:?}: before entry {index} of term {term} stands term {x}, on {node:?} term {y}"
                    ));
                }
                (None, Some(_)) => *b = before,
                _ => {}
            }
            before = Some(term);
        }
    }
}

impl Invariant for LogMatching {
    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        if seen.whole {
            seen.replicas.iter().for_each(|g| self.see(g.state.shard, seen.node, &g.replica.log(), bad));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::entry;
    use super::*;

    #[test]
    fn logs_that_differ_are_found() {
        let mut m = LogMatching::default();
        let mut see = |shard, node, log: &[(u64, u64, Bytes)]| {
            let mut bad = Vec::new();
            m.see(ShardId(shard), NodeId(node), log, &mut bad);
            bad
        };
        let log = [entry(2, 2, "a"), entry(3, 2, "b")];
        assert!(see(0, 1, &log).is_empty());
        assert!(see(0, 2, &log).is_empty());
        assert!(see(1, 1, &[entry(2, 2, "x")]).is_empty(), "another group");
        // An uncommitted tail of another term is no violation.
        assert!(see(0, 3, &[entry(2, 2, "a"), entry(3, 2, "b"), entry(4, 1, "x")]).is_empty());
        assert!(see(0, 3, &[entry(3, 2, "c")])[0].contains("differs"));
        assert!(see(0, 3, &[entry(2, 1, "z"), entry(3, 2, "b")])[0].contains("before entry 3"));
    }
}
