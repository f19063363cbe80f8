//! What holds at every step (Ongaro and Ousterhout 2014, figure 3), watched from outside all nodes.
//!
//! - *Election safety*: one leader a (group, term).
//! - *Log matching*: entries of equal (index, term) are equal, and so is everything before them.
//! - *Leader completeness* and *state machine safety*: a committed entry never changes, and whoever leads has it.
//! - Applied does not run ahead of committed; neither runs back.
//! - Equal applied index, equal digest.
//! - A replica id is held by one replica, ever.

use bytes::Bytes;
use crema_core::{Incarnation, NodeId, ShardId};
use crema_shard::Host;
use crema_shard::replica::Replica;
use std::collections::BTreeMap;

struct Committed {
    term: u64,
    data: Bytes,
    /// Term of the replica that was first seen to have it committed: at least the term in which it was committed.
    /// Leaders of later terms have it; one of an earlier term, elected by delayed votes, need not.
    in_term: u64,
}

#[derive(Default)]
struct Group {
    leaders: BTreeMap<u64, NodeId>,
    /// By (index, term): payload, and term of the entry before if it was ever seen beside it.
    entries: BTreeMap<(u64, u64), (Bytes, Option<u64>)>,
    /// By index.
    committed: BTreeMap<u64, Committed>,
    /// By applied index.
    digests: BTreeMap<u64, (u64, NodeId)>,
}

#[derive(Clone, Copy, Default)]
struct Progress {
    applied: u64,
    committed: u64,
    led_term: u64,
}

/// Everything ever seen, to compare with.
#[derive(Default)]
pub struct Invariants {
    groups: BTreeMap<ShardId, Group>,
    progress: BTreeMap<(NodeId, Incarnation, ShardId), Progress>,
    ids: BTreeMap<u64, (NodeId, Incarnation, ShardId)>,
    scratch: Vec<String>,
}

impl Invariants {
    /// Looks at a node after a step: the cheap checks, and the logs of replicas whose commit index or leadership moved.
    pub fn after_step(&mut self, node: NodeId, incarnation: Incarnation, host: &Host) -> Vec<String> {
        for r in host.coordinator().replicas() {
            self.replica(node, incarnation, r, false);
        }
        std::mem::take(&mut self.scratch)
    }

    /// Compares the whole logs of a node.
    pub fn full(&mut self, node: NodeId, incarnation: Incarnation, host: &Host) -> Vec<String> {
        for r in host.coordinator().replicas() {
            self.replica(node, incarnation, r, true);
        }
        std::mem::take(&mut self.scratch)
    }

    fn replica(&mut self, node: NodeId, incarnation: Incarnation, r: &Replica, whole: bool) {
        let shard = r.shard();
        let bad = &mut self.scratch;
        let holder = *self.ids.entry(r.id().0).or_insert((node, incarnation, shard));
        if holder != (node, incarnation, shard) {
            bad.push(format!("replica id {} of {shard:?} on {node:?} was held by {holder:?}", r.id()));
        }
        if r.failed() {
            return;
        }
        let group = self.groups.entry(shard).or_default();
        let progress = self.progress.entry((node, incarnation, shard)).or_default();
        let (applied, committed) = (r.applied().0, r.committed().0);
        if applied > committed {
            bad.push(format!("{shard:?} on {node:?}: applied {applied} > committed {committed}"));
        }
        if applied < progress.applied || committed < progress.committed {
            bad.push(format!(
                "{shard:?} on {node:?} ran back: applied {} -> {applied}, committed {} -> {committed}",
                progress.applied, progress.committed
            ));
        }
        let l = r.leadership();
        let elected = l.leads && l.term.0 != progress.led_term;
        if l.leads {
            let leader = *group.leaders.entry(l.term.0).or_insert(node);
            if leader != node {
                bad.push(format!("{shard:?} has two leaders in term {}: {leader:?} and {node:?}", l.term));
            }
            progress.led_term = l.term.0;
        }
        if applied != progress.applied || whole {
            let digest = r.digest();
            let (seen, by) = *group.digests.entry(applied).or_insert((digest, node));
            if seen != digest {
                bad.push(format!("{shard:?} at index {applied}: digest {seen:x} on {by:?}, {digest:x} on {node:?}"));
            }
        }
        let moved = committed > progress.committed;
        if moved || elected || whole {
            let log = r.log();
            let from = if elected || whole { 0 } else { progress.committed };
            let seen = Seen { node, shard, term: l.term.0, committed, from, whole };
            check_log(group, seen, &log, bad);
            let last = log.last().map_or(0, |e| e.0);
            if elected
                && let Some((missing, _)) =
                    group.committed.range(last + 1..).find(|(_, c)| last > 0 && c.in_term < l.term.0)
            {
                bad.push(format!("{shard:?}: {node:?} leads term {} without the committed entry {missing}", l.term));
            }
        }
        progress.applied = applied;
        progress.committed = committed;
    }
}

/// Where a log was seen, and what of it is to be compared.
struct Seen {
    node: NodeId,
    shard: ShardId,
    term: u64,
    committed: u64,
    from: u64,
    whole: bool,
}

fn check_log(group: &mut Group, seen: Seen, log: &[(u64, u64, Bytes)], bad: &mut Vec<String>) {
    let Seen { node, shard, .. } = seen;
    let mut before: Option<u64> = None;
    for (index, term, data) in log {
        let (index, term) = (*index, *term);
        if index > seen.from && index <= seen.committed {
            let fresh = || Committed { term, data: data.clone(), in_term: seen.term };
            let c = group.committed.entry(index).or_insert_with(fresh);
            if (c.term, &c.data) != (term, data) {
                bad.push(format!(
                    "{shard:?}: committed entry {index} was of term {}, on {node:?} it is of term {term}",
                    c.term
                ));
            }
        }
        if seen.whole {
            let (d, b) = group.entries.entry((index, term)).or_insert_with(|| (data.clone(), before));
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
        }
        before = Some(term);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64, data: &'static str) -> (u64, u64, Bytes) {
        (index, term, Bytes::from_static(data.as_bytes()))
    }
    fn see(group: &mut Group, node: u64, committed: u64, log: &[(u64, u64, Bytes)]) -> Vec<String> {
        let mut bad = Vec::new();
        let seen = Seen { node: NodeId(node), shard: ShardId(0), term: 3, committed, from: 0, whole: true };
        check_log(group, seen, log, &mut bad);
        bad
    }

    #[test]
    fn logs_that_differ_are_found() {
        let mut g = Group::default();
        let log = [entry(2, 2, "a"), entry(3, 2, "b")];
        assert!(see(&mut g, 1, 2, &log).is_empty());
        assert!(see(&mut g, 2, 3, &log).is_empty());
        // An uncommitted tail of another term is no violation.
        assert!(see(&mut g, 3, 3, &[entry(2, 2, "a"), entry(3, 2, "b"), entry(4, 1, "x")]).is_empty());
        assert!(see(&mut g, 3, 2, &[entry(2, 3, "a")])[0].contains("committed entry 2"));
        assert!(see(&mut g, 3, 0, &[entry(3, 2, "c")])[0].contains("differs"));
        assert!(see(&mut g, 3, 0, &[entry(2, 1, "z"), entry(3, 2, "b")])[0].contains("before entry 3"));
    }
}
