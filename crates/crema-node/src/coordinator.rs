//! Who leads which shard, for programs that embed a node.
//!
//! ```text
//!   own replicas, refusals, gossip's hints --> RoutingView (term, leader) ----\
//!   gossip: "I lead it", one claim a shard --> tracker of gossip, where the ---+--> ShardLeaderTracker
//!                                              view knows no leader
//! ```
//!
//! The view comes first: it is what requests are routed by, it knows which nodes answer, and it drops a claim that turns out
//! to be untrue, whatever its term. Gossip can do none of that: one that lies would outrank every true leader. It adds what
//! the view cannot know yet: shards before the cluster's table is known, and leaders that this node has no connection to.

use crate::cache::{NodeId, ShardId};
use crate::client::Client;
use crate::memberlist::ShardLeaderInfo;
use crate::membership::Membership;
use crema_core::Term;
use crema_gossip::LeaderEntry;
use crema_shard::RoutingView;
use std::collections::BTreeMap;
use std::sync::Weak;

/// Into how many shards the data is divided, each a Raft group of its own. The founders' word counts: a cluster that exists
/// has the number that it was founded with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultiRaftCacheConfig {
    /// Default: true. Otherwise there is one shard, and [`crate::DistributedCache::multiraft_coordinator`] is none.
    pub enabled: bool,
    /// Data shards, 1 to 16,384. Default: 16.
    pub num_shards: u32,
    /// Replicas of each shard, 1 to 7, and never more than there are nodes. Default: 3.
    pub replicas: u32,
}

impl Default for MultiRaftCacheConfig {
    fn default() -> Self {
        MultiRaftCacheConfig { enabled: true, num_shards: 16, replicas: 3 }
    }
}

/// The shards as this node sees them.
#[derive(Clone, Debug)]
pub struct Coordinator {
    tracker: ShardLeaderTracker,
}

impl Coordinator {
    pub(crate) fn new(client: Client, membership: Weak<Membership>) -> Self {
        Coordinator { tracker: ShardLeaderTracker { client, membership } }
    }

    /// Who leads which shard.
    pub fn shard_leader_tracker(&self) -> ShardLeaderTracker {
        self.tracker.clone()
    }

    /// Number of data shards; 0 before this node knows the cluster's table.
    pub fn num_shards(&self) -> u32 {
        self.tracker.client.view().shards.len() as u32
    }

    /// The shard that keeps `key`; none before this node knows the cluster's table.
    pub fn shard_of(&self, key: impl AsRef<[u8]>) -> Option<ShardId> {
        self.tracker.client.view().shard_of(crema_core::slot_of(key.as_ref())).map(|shard| shard.0)
    }
}

/// Who leads which shard, as far as this node knows at the moment of the question: a hint, which the next election may overtake.
/// Clones and waits for nobody.
#[derive(Clone, Debug)]
pub struct ShardLeaderTracker {
    client: Client,
    /// A tracker that somebody keeps must not keep a stopped node's gossip alive.
    membership: Weak<Membership>,
}

impl ShardLeaderTracker {
    /// The leader of a data shard; none while nobody is known to lead it, and for shards that do not exist.
    pub fn get_leader(&self, shard_id: ShardId) -> Option<NodeId> {
        self.leader_info(shard_id)?.leader
    }

    /// The known leaders of all data shards.
    pub fn all_leaders(&self) -> BTreeMap<ShardId, NodeId> {
        self.all_leader_infos().into_iter().filter_map(|info| Some((info.shard_id, info.leader?))).collect()
    }

    /// All that is known about a data shard's leader; none if nothing is.
    pub fn leader_info(&self, shard_id: ShardId) -> Option<ShardLeaderInfo> {
        let gossip = self.membership.upgrade();
        let heard = gossip.and_then(|membership| membership.gossip().tracker().entry(crema_core::ShardId(shard_id)));
        best(&self.client.view(), shard_id, heard)
    }

    /// All that is known about the leaders of data shards, ascending by shard.
    pub fn all_leader_infos(&self) -> Vec<ShardLeaderInfo> {
        let heard = self.membership.upgrade().map(|membership| membership.gossip().tracker().entries());
        let heard = heard.unwrap_or_default();
        let view = self.client.view();
        let info = |shard: u32| best(&view, shard, heard.get(&crema_core::ShardId(shard)).copied());
        if view.shards.is_empty() {
            return heard.keys().filter_map(|shard| info(shard.0)).collect();
        }
        (0..view.shards.len() as u32).filter_map(info).collect()
    }
}

/// The better of two sources: the view while it knows a leader, whatever term gossip speaks of; and where it knows
/// none, gossip of a later term.
fn best(view: &RoutingView, shard: ShardId, heard: Option<LeaderEntry>) -> Option<ShardLeaderInfo> {
    let id = crema_core::ShardId(shard);
    if id.is_meta() {
        return None;
    }
    let route = match view.shard(id) {
        Some(route) => Some(route),
        None if view.shards.is_empty() => None,
        None => return None,
    };
    let known = route.filter(|route| route.term > Term(0)).map(|route| (route.leader, route.term));
    let heard = heard.map(|entry| (entry.leader, entry.term));
    let (leader, term) = match (known, heard) {
        (Some((None, term)), Some(heard)) if heard.0.is_some() && heard.1 > term => heard,
        (Some(known), _) => known,
        (None, heard) => heard?,
    };
    Some(ShardLeaderInfo { shard_id: shard, leader: leader.map(|node| node.0), term: term.0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::{Epoch, NodeId as Id, SlotRange};
    use crema_shard::ShardRoute;

    fn view(leader: Option<u64>, term: u64) -> RoutingView {
        let route = ShardRoute {
            range: SlotRange { start: 0, end: 16_384 },
            leader: leader.map(Id),
            term: Term(term),
            published: None,
            own_term: Term(0),
            replicas: Vec::new(),
            down: None,
        };
        RoutingView { shards: vec![route], ..RoutingView::default() }
    }

    fn heard(leader: Option<u64>, term: u64) -> Option<LeaderEntry> {
        Some(LeaderEntry { leader: leader.map(Id), term: Term(term), epoch: Epoch(1) })
    }

    #[test]
    fn gossip_counts_where_the_view_knows_no_leader() {
        let leader = |view: &RoutingView, heard| best(view, 0, heard).map(|info| (info.leader, info.term));
        for (known, told, expected) in [
            (view(Some(1), 5), None, Some((Some(1), 5))),
            (view(Some(1), 5), heard(Some(2), 4), Some((Some(1), 5))),
            // It may be a lie, and the view hears of it too.
            (view(Some(1), 5), heard(Some(2), 1_000_000), Some((Some(1), 5))),
            (view(None, 5), heard(Some(2), 6), Some((Some(2), 6))),
            // Its node has gone, and no later term has begun.
            (view(Some(1), 5), heard(None, 5), Some((Some(1), 5))),
            (view(None, 5), heard(Some(1), 5), Some((None, 5))),
            (view(Some(1), 5), heard(None, 6), Some((Some(1), 5))),
            (view(None, 5), heard(None, 1_000_000), Some((None, 5))),
            // Nothing is known yet.
            (view(None, 0), heard(Some(2), 1), Some((Some(2), 1))),
            (view(None, 0), None, None),
            (RoutingView::default(), heard(Some(2), 1), Some((Some(2), 1))),
            (RoutingView::default(), None, None),
        ] {
            assert_eq!(leader(&known, told), expected, "{known:?} and {told:?}");
        }
    }

    #[test]
    fn only_data_shards_that_exist_have_leaders() {
        let meta = crema_core::ShardId::META.0;
        assert_eq!(best(&view(Some(1), 5), 1, heard(Some(2), 9)), None, "there is one shard");
        assert_eq!(best(&RoutingView::default(), meta, heard(Some(2), 9)), None);
        assert_eq!(best(&view(Some(1), 5), meta, heard(Some(2), 9)), None);
    }
}
