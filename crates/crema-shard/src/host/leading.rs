//! Who leads what: routes follow leaderships, and leaderships are spread over the nodes that may have them.

use super::{BALANCE, Host, LEADERS_AT_ONCE};
use crate::effect::{LedShard, Note};
use crate::gateway::Target;
use crate::message::{ASKED_AT_ONCE, Control};
use crate::meta::{MetaState, ReplicaPlacement};
use crate::replica::Replica;
use crema_core::{Epoch, Incarnation, NodeId, Now, ReplicaId, ShardId, Term};
use std::collections::BTreeMap;
use std::time::Duration;

/// A node must have been live this long before leaderships move back to it.
const SETTLED: Duration = Duration::from_secs(2);

impl Host {
    pub(super) fn route_changed(&mut self, shard: ShardId, now: Now) {
        self.view_stale = true;
        self.look_at_down(shard);
        if !shard.is_meta() {
            let target = self.target(shard);
            if target.is_none() {
                // Nobody to ask: if the own replica sleeps, nobody would find out who leads.
                self.coordinator.wake(shard);
            }
            self.gateway.set_target(shard, target, now.mono);
        }
    }

    pub(super) fn retarget_all(&mut self, now: Now) {
        for i in 0..self.state.as_ref().map_or(0, |s| s.shards.len() as u32) {
            self.route_changed(ShardId(i), now);
        }
    }

    /// Where to send a shard's requests. Without any claim and without a replica of one's own, a guess: who is asked
    /// and does not lead says who does.
    fn target(&self, shard: ShardId) -> Option<Target> {
        let claim = self.router.claim(shard);
        if let Some(node) = claim.leader {
            return Some(Target { node, term: claim.term });
        }
        if self.coordinator.replica(shard).is_some_and(|r| !r.failed()) {
            return None;
        }
        let replicas = self.state.as_ref()?.replicas(shard);
        let there = |r: &&ReplicaPlacement| r.node != self.config.node && self.is_usable(r.node, r.incarnation);
        let node = replicas.iter().find(there)?.node;
        Some(Target { node, term: claim.term })
    }

    /// Asks the nodes with replicas of groups without a known leader whether they lead them. Requests alone would not tell:
    /// a guess that is right is not refused, and for a group that nobody asks anything of, the node would never be ready.
    /// Gossip tells as well, but a cluster may go without.
    pub(super) fn ask_for_leaders(&mut self) {
        // A node that is ready knows them all.
        let (Some(state), true) = (self.state.clone(), self.view.not_ready.is_some()) else { return };
        let groups: Vec<ShardId> = state.groups().collect();
        let mut unknown: BTreeMap<NodeId, Vec<ShardId>> = BTreeMap::new();
        let mut asked = 0;
        // The next time goes on where this one stops.
        let from = self.next_asked % groups.len();
        for i in (from..groups.len()).chain(0..from) {
            let group = groups[i];
            if self.router.claim(group).leader.is_some() {
                continue;
            }
            if asked == ASKED_AT_ONCE {
                self.next_asked = i;
                break;
            }
            asked += 1;
            for replica in state.replicas(group).iter().chain(state.leaving(group)) {
                if replica.node != self.config.node && self.is_usable(replica.node, replica.incarnation) {
                    unknown.entry(replica.node).or_default().push(group);
                }
            }
        }
        for (node, groups) in unknown {
            self.control(node, &Control::AskLeaders { groups });
        }
    }

    /// What this node leads of `groups`, for a peer that knows no leader of them.
    pub(super) fn tell_leaders(&mut self, to: NodeId, groups: &[ShardId]) {
        let leads = |group: &ShardId| {
            let leadership = self.coordinator.replica(*group)?.leadership();
            leadership.leads.then_some((*group, leadership.term))
        };
        let groups: Vec<(ShardId, Term)> = groups.iter().filter_map(leads).collect();
        if !groups.is_empty() {
            self.control(to, &Control::Leads { groups });
        }
    }

    /// A peer leads these, by its own word.
    pub(super) fn take_leaders(&mut self, from: NodeId, life: Incarnation, groups: Vec<(ShardId, Term)>, now: Now) {
        if !self.is_usable(from, life) {
            return;
        }
        for (group, term) in groups {
            if self.learn(group, Some(from), term) {
                self.route_changed(group, now);
            }
        }
    }

    pub(super) fn leadership_changed(&mut self, shard: ShardId, now: Now) {
        let Some(replica) = self.coordinator.replica(shard) else { return };
        self.view_stale = true;
        let l = replica.leadership();
        let before = self.router.claim(shard);
        let leader = l.leader.filter(|n| self.is_live(*n));
        if l.leads {
            self.router.learn(shard, Some(self.config.node), l.term);
            let epoch =
                self.state.as_ref().map_or(Epoch(0), |s| s.shards.get(shard.0 as usize).map_or(s.epoch, |p| p.epoch));
            self.out.led.push(LedShard { shard, term: l.term, epoch });
        } else {
            self.router.learn(shard, leader, l.term);
            self.router.disown(shard, self.config.node, l.term);
        }
        if self.router.claim(shard) != before {
            self.route_changed(shard, now);
        }
    }

    /// Moves leaderships to where placement wants them: all of them away from a draining node, else a few at a time.
    pub(super) fn balance(&mut self, now: Now) {
        let Some(state) = self.state.clone() else { return };
        let due = now.mono >= self.next_balance;
        // Where a replica of ours is to go, its move waits for another leader.
        let unwanted = |s: &ShardId| state.leaving(*s).iter().any(|r| r.node == self.config.node);
        if !due && !self.draining && !state.groups().any(|s| unwanted(&s)) {
            return;
        }
        if due {
            self.next_balance = now.mono.after(BALANCE);
            self.router.forget_refuted();
        }
        let led: Vec<ShardId> =
            self.coordinator.replicas().filter(|r| r.leadership().leads).map(Replica::shard).collect();
        let mut moves = 0;
        let mut stuck = false;
        for shard in led {
            if !due && !self.draining && !unwanted(&shard) {
                continue;
            }
            let mut better = self.better_leaders(&state, shard, now);
            if !self.draining && !unwanted(&shard) {
                // Nothing hurries: the best one, or it waits until that one has caught up.
                better.truncate(1);
            }
            stuck |= !better.is_empty();
            if self.draining || moves < LEADERS_AT_ONCE {
                moves += usize::from(better.into_iter().any(|to| self.coordinator.transfer(shard, to)));
            }
        }
        let announced =
            state.nodes.get(&self.config.node).is_none_or(|r| r.draining || r.incarnation != self.config.incarnation);
        let alone = self.peers.values().all(|p| p.live_since.is_none());
        if self.draining && !self.drained && !stuck && (announced || alone) {
            self.drained = true;
            self.out.notes.push(Note::Drained);
        }
    }

    /// The replicas that should rather lead than ours, the best first.
    fn better_leaders(&self, state: &MetaState, shard: ShardId, now: Now) -> Vec<ReplicaId> {
        let usable = |node: NodeId, incarnation: Incarnation| {
            let record = state.nodes.get(&node);
            if record.is_none_or(|r| r.incarnation != incarnation || r.draining) {
                return false;
            }
            if node == self.config.node {
                return !self.draining;
            }
            let Some(p) = self.peers.get(&node) else { return false };
            let settled = p.live_since.is_some_and(|t| self.draining || now.mono.since(t) >= SETTLED);
            settled && p.incarnation == incarnation
        };
        // One that is being filled cannot lead yet.
        let Some(replica) = self.coordinator.replica(shard) else { return Vec::new() };
        let voters = state.replicas(shard).iter().filter(|r| replica.members().is_voter(r.id));
        let usable = voters.filter(|r| usable(r.node, r.incarnation));
        usable.take_while(|r| r.node != self.config.node).map(|r| r.id).collect()
    }
}
