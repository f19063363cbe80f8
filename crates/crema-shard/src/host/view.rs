//! What a node shows of itself: where requests go, whether it is ready and why not, and figures of its replicas.

use super::Host;
use crate::coordinator::Coordinator;
use crate::meta::{MetaState, ReplicaPlacement};
use crate::replica::{Machine, Replica};
use crate::router::{NodeRoute, RoutingView, ShardRoute, Standing};
use crema_core::mutant::{Mutant, planted};
use crema_core::{ClusterUuid, Epoch, LogIndex, NodeId, ReplicaId, ShardId, Term};
use std::sync::Arc;

/// One shard as this node sees it, for the admin API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardStatus {
    /// The shard.
    pub shard: ShardId,
    /// Known leader.
    pub leader: Option<NodeId>,
    /// Its term.
    pub term: Term,
    /// Of this node's own replica: applied index, digest, keys, bytes, whether it sleeps.
    pub own: Option<OwnReplica>,
    /// By placement: node, replica id, how it stands.
    pub replicas: Vec<(NodeId, ReplicaId, Standing)>,
    /// Bytes of its state that this node, which leads it, has sent so far to the member that it fills.
    pub sent_bytes: Option<u64>,
}

/// State of a replica on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnReplica {
    /// Applied index.
    pub applied: LogIndex,
    /// Digest of its state at that index.
    pub digest: u64,
    /// Keys, expired ones that were not collected yet included.
    pub keys: u64,
    /// Accounted bytes of keys, values and overhead.
    pub bytes: u64,
    /// Whether it sleeps.
    pub asleep: bool,
    /// Whether it leads.
    pub leads: bool,
    /// Entries kept in its log.
    pub log_entries: u64,
}

/// The node's own picture, for the admin API.
#[derive(Clone, Debug, Default)]
pub struct HostStatus {
    /// Identity of the cluster, once known.
    pub uuid: Option<ClusterUuid>,
    /// Placement epoch.
    pub epoch: Epoch,
    /// Data shards, ascending.
    pub shards: Vec<ShardStatus>,
    /// Leader of the meta group.
    pub meta_leader: Option<NodeId>,
    /// The meta group's replicas.
    pub meta: Vec<(NodeId, ReplicaId, Standing)>,
    /// Groups, the meta group included, that are not where they should be.
    pub moves_open: usize,
    /// Counters for metrics: name and value, monotonic.
    pub counters: Vec<(&'static str, u64)>,
}

impl Host {
    /// The present routing view.
    pub fn view(&self) -> Arc<RoutingView> {
        self.view.clone()
    }

    /// The coordinator, for the simulator's invariants.
    pub fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// The cluster's table as this node knows it.
    pub fn meta_state(&self) -> Option<&Arc<MetaState>> {
        self.state.as_ref()
    }

    /// Requests taken but not completed.
    pub fn in_flight(&self) -> usize {
        self.gateway.in_flight() + self.followers.in_flight()
    }

    fn placed(&self, state: &MetaState, shard: ShardId) -> Vec<(NodeId, ReplicaId, Standing)> {
        let members = self.coordinator.replica(shard).filter(|r| !r.is_empty()).map(|r| r.members());
        let own =
            |r: &ReplicaPlacement| self.coordinator.replica(shard).is_some_and(|o| o.id() == r.id && o.is_empty());
        let fills = if state.moving(shard).is_some() { Standing::Incoming } else { Standing::Learner };
        let standing = |r: &ReplicaPlacement| match members {
            _ if !state.replica_is_present(r) => Standing::Lost,
            Some(members) if !members.is_voter(r.id) => fills,
            None if own(r) => fills,
            _ => Standing::Voter,
        };
        let goes = |r: &ReplicaPlacement| if state.replica_is_present(r) { Standing::Outgoing } else { Standing::Lost };
        let placed = state.replicas(shard).iter().map(|r| (r.node, r.id, standing(r)));
        placed.chain(state.leaving(shard).iter().map(|r| (r.node, r.id, goes(r)))).collect()
    }

    pub(super) fn build_view(&self) -> RoutingView {
        let mut view = RoutingView {
            this: self.config.node,
            epoch: self.epoch(),
            not_ready: self.not_ready(),
            ..RoutingView::default()
        };
        let Some(state) = &self.state else { return view };
        view.uuid = Some(state.uuid);
        view.meta_leader = self.router.claim(ShardId::META).leader;
        view.meta_down = self.down(ShardId::META).cloned();
        view.generation = state.generation;
        view.recovery = state.recovery;
        view.shards = (0..state.shards.len() as u32)
            .map(ShardId)
            .map(|shard| {
                let placement = &state.shards[shard.0 as usize];
                let claim = self.router.claim(shard);
                ShardRoute {
                    range: placement.range,
                    leader: claim.leader,
                    term: claim.term,
                    published: self.coordinator.replica(shard).and_then(|r| r.published()).cloned(),
                    own_term: self.coordinator.replica(shard).map_or(Term(0), |r| r.leadership().term),
                    replicas: self.placed(state, shard),
                    down: self.down(shard).cloned(),
                }
            })
            .collect();
        view.nodes = state
            .nodes
            .iter()
            .map(|(node, r)| {
                let route = NodeRoute {
                    incarnation: r.incarnation,
                    fenced: r.past.clone(),
                    addrs: r.addrs.clone(),
                    live: self.is_usable(*node, r.incarnation),
                    draining: r.draining,
                    approved: r.approved,
                };
                (*node, route)
            })
            .collect();
        view
    }

    /// Why this node is not ready, in one sentence.
    fn not_ready(&self) -> Option<String> {
        let Some(state) = &self.state else { return Some(self.founding.waiting_for()) };
        let me = self.config.node;
        if self.draining {
            return Some("draining: this node is about to stop".into());
        }
        if let Some(down) = self.down_in_words() {
            return Some(down);
        }
        if state.nodes.get(&me).is_none_or(|r| r.incarnation != self.config.incarnation) {
            return Some("joining: this life of the node is not registered yet".into());
        }
        if !self.is_registered() {
            // Until then its shards keep to no limit of this node's memory, and others may look for it elsewhere.
            return Some("joining: this node's addresses and memory are not registered yet".into());
        }
        if let Some(r) = self.coordinator.replicas().find(|r| r.failed()) {
            return Some(format!("the replica of shard {} failed", r.shard()));
        }
        let unfilled = self.unfilled();
        if unfilled > 0 && !planted(Mutant::ReadyEarly) {
            let all = state.groups().filter(|s| state.replicas(*s).iter().any(|r| r.node == me)).count();
            return Some(format!("{unfilled} of this node's {all} replicas are not voters yet: they are being filled"));
        }
        let leaderless = state.groups().filter(|s| self.router.claim(*s).leader.is_none()).count();
        if leaderless > 0 {
            return Some(format!("{leaderless} of {} groups have no known leader", state.shards.len() + 1));
        }
        None
    }

    /// Whether this node's replica of a group, as placement wants it, is a voter, and no earlier one of this node is a
    /// member beside it.
    fn counts_in(&self, state: &MetaState, shard: ShardId) -> bool {
        let Some(r) = self.coordinator.replica(shard).filter(|r| !r.failed() && !r.is_empty()) else { return false };
        let placed = state.replicas(shard).iter().any(|p| p.id == r.id());
        let alone = r.members().all().all(|m| m.node != self.config.node || m.id == r.id());
        placed && alone && r.members().is_voter(r.id()) && r.knows_members_for_good()
    }

    /// Groups of which placement gives this node a replica that is no voter yet.
    pub fn unfilled(&self) -> usize {
        let Some(state) = &self.state else { return 0 };
        let mine = |s: &ShardId| state.replicas(*s).iter().any(|r| r.node == self.config.node);
        state.groups().filter(mine).filter(|s| !self.counts_in(state, *s)).count()
    }

    /// For the admin API.
    pub fn status(&self) -> HostStatus {
        let mut status = HostStatus {
            uuid: self.state.as_ref().map(|s| s.uuid),
            epoch: self.epoch(),
            meta_leader: self.router.claim(ShardId::META).leader,
            moves_open: self.moves_open(),
            ..HostStatus::default()
        };
        let state = self.state.as_ref();
        status.meta = state.map_or_else(Vec::new, |s| self.placed(s, ShardId::META));
        for (i, state) in state.iter().flat_map(|s| (0..s.shards.len()).map(move |i| (i, s))) {
            let shard = ShardId(i as u32);
            let claim = self.router.claim(shard);
            let own = self.coordinator.replica(shard).map(|r| {
                let (keys, bytes) = match r.machine() {
                    Machine::Data(m) => (m.keys(), m.bytes()),
                    Machine::Meta(_) => (0, 0),
                };
                OwnReplica {
                    applied: r.applied(),
                    digest: r.digest(),
                    keys,
                    bytes,
                    asleep: r.asleep(),
                    leads: r.leadership().leads,
                    log_entries: r.log_entries() as u64,
                }
            });
            let replicas = self.placed(state, shard);
            let fills = self.coordinator.replica(shard).map(Replica::transfer_status).filter(|t| t.to.is_some());
            let sent_bytes = fills.map(|t| t.sent_bytes);
            status.shards.push(ShardStatus {
                shard,
                leader: claim.leader,
                term: claim.term,
                own,
                replicas,
                sent_bytes,
            });
        }
        let reads = self.coordinator.read_counts();
        status.counters = vec![
            ("reads_leased", reads.leased),
            ("reads_indexed", reads.indexed),
            ("read_rounds", reads.rounds),
            ("raft_messages_dropped", self.coordinator.dropped()),
            ("frames_refused", self.frames_refused),
            ("requests_forwarded", self.requests_forwarded),
            ("requests_retried", self.gateway.retries()),
            ("digest_mismatches", self.digest_mismatches),
            ("replicas_failed", self.replicas_failed),
            ("keys_expired", self.coordinator.removed().expired),
            ("keys_evicted", self.coordinator.removed().evicted),
        ];
        status
    }
}
