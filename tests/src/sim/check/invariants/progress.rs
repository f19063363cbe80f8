//! *Progress runs one way*: applied is never ahead of committed, and neither they nor the term run back while a replica
//! lives (Raft, figure 2: the state of all servers "increases monotonically").

use super::{Invariant, Sighting, State};
use crema_core::NodeId;

/// Needs no memory of its own.
pub(super) struct Progress;

fn see(node: NodeId, state: &State, before: Option<&State>, bad: &mut Vec<String>) {
    let State { shard, term, applied, committed, .. } = *state;
    if applied > committed {
        bad.push(format!("{shard:?} on {node:?}: applied {applied} > committed {committed}"));
    }
    if let Some(b) = before
        && (applied < b.applied || committed < b.committed || term < b.term)
    {
        bad.push(format!(
            "{shard:?} on {node:?} ran back: applied {} -> {applied}, committed {} -> {committed}, term {} -> {term}",
            b.applied, b.committed, b.term
        ));
    }
}

impl Invariant for Progress {
    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        seen.replicas.iter().for_each(|g| see(seen.node, &g.state, g.before.as_ref(), bad));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::{ReplicaId, ShardId};

    #[test]
    fn what_runs_ahead_or_back_is_found() {
        let at = |term, applied, committed| State {
            shard: ShardId(0),
            id: ReplicaId(1),
            term,
            leads: false,
            applied,
            committed,
        };
        let wrong = |before: Option<State>, state: State| {
            let mut bad = Vec::new();
            see(NodeId(1), &state, before.as_ref(), &mut bad);
            bad.len()
        };
        assert_eq!(wrong(None, at(1, 4, 4)), 0);
        assert_eq!(wrong(None, at(1, 5, 4)), 1, "applied what is not committed");
        assert_eq!(wrong(Some(at(1, 4, 6)), at(2, 4, 6)), 0);
        assert_eq!(wrong(Some(at(1, 4, 6)), at(1, 3, 6)), 1, "applied");
        assert_eq!(wrong(Some(at(1, 4, 6)), at(1, 4, 5)), 1, "committed");
        assert_eq!(wrong(Some(at(2, 4, 6)), at(1, 4, 6)), 1, "term");
    }
}
