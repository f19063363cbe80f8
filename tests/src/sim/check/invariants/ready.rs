//! Ready means a voter of everything: a node that says so holds every replica that placement gives it, in this life, as a
//! voter, and none of them has failed. Otherwise a rolling restart goes on too early and loses a majority.

use super::{Invariant, Sighting};
use crema_core::ShardId;

/// See the module.
#[derive(Default)]
pub(super) struct Ready;

impl Invariant for Ready {
    fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
        let view = seen.host.view();
        let Some(state) = seen.host.meta_state().filter(|_| view.not_ready.is_none()) else { return };
        for shard in (0..state.shards.len() as u32).map(ShardId).chain([ShardId::META]) {
            for placed in state.replicas(shard).iter().filter(|r| r.node == seen.node) {
                let held = seen.host.coordinator().replica(shard).is_some_and(|r| {
                    r.id() == placed.id && !r.failed() && !r.is_empty() && r.members().is_voter(placed.id)
                });
                // A replica may fail in the step that this looks at; the view of the next says so.
                if placed.incarnation != seen.incarnation
                    || (!held && !seen.host.coordinator().replicas().any(|r| r.failed()))
                {
                    bad.push(format!(
                        "{:?} says it is ready without its replica {} of {shard:?}",
                        seen.node, placed.id
                    ));
                }
            }
        }
    }
}
