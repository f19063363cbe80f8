//! A lease holder is the only one: while a replica would answer a read by its lease, no other replica of the group leads
//! a later term or holds a lease (Ongaro 2014, section 6.4.1).
//!
//! Stronger than what clients can see, and sooner: the stale read need not happen.

use super::{Invariant, Standing};
use crema_core::{NodeId, Now};
use crema_shard::replica::Replica;

/// See the module.
#[derive(Default)]
pub(super) struct OneLease;

impl Invariant for OneLease {
    fn across(&mut self, stepped: NodeId, cluster: &[Standing<'_>], bad: &mut Vec<String>) {
        let Some(own) = cluster.iter().find(|s| s.node == stepped) else { return };
        for r in own.host.coordinator().replicas().filter(|r| r.leadership().leads) {
            for other in cluster.iter().filter(|s| s.node != stepped) {
                let Some(o) = other.host.coordinator().replica(r.shard()).filter(|o| o.leadership().leads) else {
                    continue;
                };
                let (mine, theirs) = (r.leadership().term, o.leadership().term);
                // What it would answer itself, and what it lets readers answer.
                let answers = |r: &Replica, now: Now| {
                    let open = r.published().and_then(|p| p.cell().begin()).is_some_and(|seen| now.mono.0 < seen.bound);
                    r.holds_lease(now) || open
                };
                let (late, late_node, holds) = if mine < theirs {
                    (mine, stepped, answers(r, own.now))
                } else {
                    (theirs, other.node, answers(o, other.now))
                };
                if holds {
                    bad.push(format!(
                        "{:?}: {late_node:?} holds the lease of term {late} while another leads term {}",
                        r.shard(),
                        mine.max(theirs)
                    ));
                }
            }
        }
    }
}
