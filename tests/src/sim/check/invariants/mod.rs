//! What holds at every step (Ongaro and Ousterhout 2014, figure 3), watched from outside all nodes. One file an invariant.
//!
//! ```text
//!   World: after a round of a node -> Sighting ---> after_step of each Invariant ---> violations
//!          a Raft frame goes out   -> Envelopes --> sent of each Invariant ---------^
//! ```
//!
//! A further invariant is a file with a type that implements [`Invariant`], and a line in [`Invariants::default`].

mod committed;
mod durable;
mod election_safety;
mod gone;
mod lease;
mod log_matching;
mod membership;
mod progress;
mod ready;
mod replica_ids;
mod state_machine_safety;
mod votes;

use bytes::Bytes;
use crema_core::{Incarnation, NodeId, Now, ReplicaId, ShardId};
use crema_shard::Host;
use crema_shard::message::{Envelope, KIND_RAFT, decode_envelopes};
use crema_shard::replica::Replica;
use std::collections::BTreeMap;

/// What a replica says of itself; cheap to ask for at every step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Its group.
    pub shard: ShardId,
    /// Its id.
    pub id: ReplicaId,
    /// Its term.
    pub term: u64,
    /// Whether it leads.
    pub leads: bool,
    /// Applied index.
    pub applied: u64,
    /// Committed index, as far as it knows.
    pub committed: u64,
}

impl State {
    fn of(r: &Replica) -> Self {
        let l = r.leadership();
        let (applied, committed) = (r.applied().0, r.committed().0);
        State { shard: r.shard(), id: r.id(), term: l.term.0, leads: l.leads, applied, committed }
    }
}

/// A replica as it stands after a step, and as it stood after the step of its node before.
#[derive(Clone, Copy)]
pub struct Glance<'a> {
    /// The replica.
    pub replica: &'a Replica,
    /// Now.
    pub state: State,
    /// Before; none at the first sight of this replica.
    pub before: Option<State>,
}

impl Glance<'_> {
    /// Whether its leadership began since the last sight.
    pub fn elected(&self) -> bool {
        self.state.leads && self.before.is_none_or(|b| !b.leads || b.term != self.state.term)
    }

    /// Committed index after the step before, 0 at the first sight.
    pub fn committed_before(&self) -> u64 {
        self.before.map_or(0, |b| b.committed)
    }
}

/// A node after a step.
#[derive(Clone, Copy)]
pub struct Sighting<'a> {
    /// Which.
    pub node: NodeId,
    /// Its life.
    pub incarnation: Incarnation,
    /// Simulated time in nanoseconds.
    pub at: u64,
    /// The node's own clock at that time.
    pub now: Now,
    /// The node.
    pub host: &'a Host,
    /// Its replicas, except failed ones, whose state is given up, and empty ones, which have none.
    pub replicas: &'a [Glance<'a>],
    /// Whether whole logs are to be compared; so at times only, as it is dear.
    pub whole: bool,
}

impl<'a> Sighting<'a> {
    /// A node at simulated time `at`, for [`Invariants::after_step`], which fills in its replicas.
    pub fn new(node: NodeId, incarnation: Incarnation, at: u64, now: Now, host: &'a Host) -> Self {
        Sighting { node, incarnation, at, now, host, replicas: &[], whole: false }
    }
}

/// A living node at one moment, among the others.
#[derive(Clone, Copy)]
pub struct Standing<'a> {
    /// Which.
    pub node: NodeId,
    /// Its own clock.
    pub now: Now,
    /// The node.
    pub host: &'a Host,
}

/// Something that must hold. All hooks push a line for each violation; they run at every step and must be cheap.
pub trait Invariant {
    /// A node's process begins, perhaps in the life that it had before.
    fn restarted(&mut self, _node: NodeId, _incarnation: Incarnation) {}

    /// Looks at a node after a step.
    fn after_step(&mut self, _seen: &Sighting<'_>, _bad: &mut Vec<String>) {}

    /// Looks at all living nodes at once, after a step of `stepped`.
    fn across(&mut self, _stepped: NodeId, _cluster: &[Standing<'_>], _bad: &mut Vec<String>) {}

    /// Looks at a Raft message that a node hands out, even if it finds a full queue or gets lost. `host` stands as it did
    /// when it had made the message, or a little later in the same round.
    fn sent(
        &mut self,
        _from: NodeId,
        _incarnation: Incarnation,
        _to: NodeId,
        _envelope: &Envelope,
        _host: &Host,
        _bad: &mut Vec<String>,
    ) {
    }
}

/// All invariants, and the last sight of every node.
pub struct Invariants {
    all: Vec<Box<dyn Invariant>>,
    last: BTreeMap<(NodeId, Incarnation), Vec<State>>,
}

impl Default for Invariants {
    fn default() -> Self {
        Invariants {
            all: vec![
                Box::new(replica_ids::ReplicaIds::default()),
                Box::new(election_safety::ElectionSafety::default()),
                Box::new(log_matching::LogMatching::default()),
                Box::new(committed::Committed::default()),
                Box::new(state_machine_safety::StateMachineSafety::default()),
                Box::new(progress::Progress),
                Box::new(votes::Votes::default()),
                Box::new(durable::Durable),
                Box::new(lease::OneLease),
                Box::new(ready::Ready),
                Box::new(membership::Membership::default()),
                Box::new(gone::Gone::default()),
            ],
            last: BTreeMap::new(),
        }
    }
}

impl Invariants {
    /// A node's process begins: what it has not made durable is gone, so that it may stand behind where it stood.
    pub fn restarted(&mut self, node: NodeId, incarnation: Incarnation) {
        self.last.remove(&(node, incarnation));
        self.all.iter_mut().for_each(|i| i.restarted(node, incarnation));
    }

    /// Looks at a node after a step, with `whole` at the whole logs too.
    pub fn after_step(&mut self, seen: Sighting<'_>, bad: &mut Vec<String>) {
        let last = self.last.entry((seen.node, seen.incarnation)).or_default();
        let glances: Vec<Glance<'_>> = seen
            .host
            .coordinator()
            .replicas()
            .filter(|r| !r.failed() && !r.is_empty())
            .map(|replica| {
                let state = State::of(replica);
                let before = last.iter().find(|b| (b.shard, b.id) == (state.shard, state.id)).copied();
                Glance { replica, state, before }
            })
            .collect();
        // Replicas come in the same order each time, so that the search above ends early.
        last.clear();
        last.extend(glances.iter().map(|g| g.state));
        let seen = Sighting { replicas: &glances, ..seen };
        for invariant in &mut self.all {
            invariant.after_step(&seen, bad);
        }
    }

    /// Looks at all living nodes, after a step of `stepped`.
    pub fn across(&mut self, stepped: NodeId, cluster: &[Standing<'_>], bad: &mut Vec<String>) {
        self.all.iter_mut().for_each(|i| i.across(stepped, cluster, bad));
    }

    /// Looks at the messages of a frame that leaves a node for `to`; frames of other kinds are none of its business.
    pub fn sent(
        &mut self,
        (from, incarnation): (NodeId, Incarnation),
        to: NodeId,
        frame: &Bytes,
        host: &Host,
        bad: &mut Vec<String>,
    ) {
        if frame.first() != Some(&KIND_RAFT) {
            return;
        }
        match decode_envelopes(&frame.slice(1..)) {
            Ok(envelopes) => {
                for e in &envelopes {
                    self.all.iter_mut().for_each(|i| i.sent(from, incarnation, to, e, host, bad));
                }
            }
            Err(e) => bad.push(format!("{from:?} sends {to:?} a Raft frame that does not decode: {e}")),
        }
    }
}

/// What unit tests of invariants share.
#[cfg(test)]
mod testing {
    use bytes::Bytes;

    /// An entry of a log: index, term, payload.
    pub(super) fn entry(index: u64, term: u64, data: &'static str) -> (u64, u64, Bytes) {
        (index, term, Bytes::from_static(data.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::world::{Options, S, World};
    use crema_core::Term;
    use crema_shard::message::{Body, encode_envelope};

    /// Complains of everything it is shown.
    struct Probe;
    impl Invariant for Probe {
        fn after_step(&mut self, seen: &Sighting<'_>, bad: &mut Vec<String>) {
            let fresh = seen.replicas.iter().filter(|g| g.before.is_none()).count();
            let applied: u64 = seen.replicas.iter().map(|g| g.state.applied).sum();
            bad.push(format!("{} {} {fresh} {}", seen.node, seen.replicas.len(), applied > 0));
        }
        fn sent(&mut self, from: NodeId, _: Incarnation, to: NodeId, e: &Envelope, _: &Host, bad: &mut Vec<String>) {
            bad.push(format!("{from} {to} {:?}", e.shard));
        }
    }

    #[test]
    fn every_invariant_is_shown_replicas_and_messages() {
        let mut world = World::new(Options { shards: 2, ..Options::default() });
        assert!(world.run_until(std::time::Duration::from_secs(5), |w| w.leader(ShardId(1)).is_some()));
        let host = world.host(NodeId(1)).expect("it lives");
        let mut all = Invariants { all: vec![Box::new(Probe), Box::new(Probe)], ..Invariants::default() };
        let seen = Sighting::new(
            NodeId(1),
            Incarnation(1),
            S,
            Now { mono: Default::default(), wall: Default::default() },
            host,
        );
        let mut bad = Vec::new();
        all.after_step(seen, &mut bad);
        all.after_step(seen, &mut bad);
        let (first, second) = ("1 3 3 true", "1 3 0 true");
        assert_eq!(bad, [first, first, second, second]);

        let mut frame = vec![KIND_RAFT];
        let body = Body::Sleep { from: ReplicaId(1), to: ReplicaId(2), term: Term(1), index: 1, ok: false };
        for shard in [ShardId(0), ShardId(1)] {
            assert!(encode_envelope(&mut frame, &Envelope { shard, log_time: 0, floor: 0, body: body.clone() }));
        }
        bad.clear();
        all.sent((NodeId(1), Incarnation(1)), NodeId(2), &frame.into(), host, &mut bad);
        assert_eq!(bad.len(), 4, "two messages, two invariants: {bad:?}");
        assert_eq!(bad[0], "1 2 s0");
    }
}
