//! Who owns a slot, who leads a shard, and where nodes are reached: the view that every request reads.

use crate::meta::{NodeAddrs, Recovery};
use crema_core::{ClusterUuid, Epoch, Incarnation, NodeId, Published, ReplicaId, ShardId, Slot, SlotRange, Term};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Where each group's leader is believed to be. Terms order the claims: who has the higher one wins.
///
/// What an own replica or a node that was asked says is *vouched* for. Gossip is *hearsay*: it counts while its term is
/// higher, but leaves no trace once it turns out to be untrue. A made-up term would otherwise outrank every true claim.
#[derive(Debug, Default)]
pub struct Router {
    data: Vec<Route>,
    meta: Route,
}

#[derive(Clone, Copy, Debug, Default)]
struct Route {
    vouched: Claim,
    /// A later claim than that, by gossip.
    hearsay: Option<(NodeId, Term)>,
    /// The last such claim that was untrue, or too early: it is not believed again before [`Router::forget_refuted`].
    refuted: Option<(NodeId, Term)>,
}

/// The best claim to a group's leadership.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// The leader; none if nobody is known to lead in this term.
    pub leader: Option<NodeId>,
    /// The highest term heard of.
    pub term: Term,
}

impl Claim {
    fn yields_to(&self, leader: Option<NodeId>, term: Term) -> bool {
        term > self.term || (term == self.term && self.leader.is_none() && leader.is_some())
    }
}

impl Route {
    fn claim(&self) -> Claim {
        self.hearsay.map_or(self.vouched, |(node, term)| Claim { leader: Some(node), term })
    }

    /// Changes it by `change` and says whether the claim has changed.
    fn update(&mut self, change: impl FnOnce(&mut Self)) -> bool {
        let before = self.claim();
        change(self);
        let vouched = self.vouched;
        self.hearsay = self.hearsay.filter(|(node, term)| vouched.yields_to(Some(*node), *term));
        self.claim() != before
    }
}

impl Router {
    /// Routes to `shards` data shards and the meta group.
    pub fn set_shards(&mut self, shards: usize) {
        self.data.resize_with(shards, Route::default);
    }

    /// The claim for a group.
    pub fn claim(&self, shard: ShardId) -> Claim {
        let route = if shard.is_meta() { Some(&self.meta) } else { self.data.get(shard.0 as usize) };
        route.map_or_else(Claim::default, Route::claim)
    }

    fn route_mut(&mut self, shard: ShardId) -> Option<&mut Route> {
        if shard.is_meta() { Some(&mut self.meta) } else { self.data.get_mut(shard.0 as usize) }
    }

    /// Somebody who knows says that `leader` leads, or that a term has begun without a known leader. Returns whether the
    /// claim changed. A claim of the present term fills a gap but displaces nobody: a term has one leader.
    pub fn learn(&mut self, shard: ShardId, leader: Option<NodeId>, term: Term) -> bool {
        let Some(route) = self.route_mut(shard) else { return false };
        route.update(|r| {
            if r.vouched.yields_to(leader, term) {
                r.vouched = Claim { leader, term };
            }
        })
    }

    /// Gossip says that `node` leads. Returns whether the claim changed.
    pub fn hear(&mut self, shard: ShardId, node: NodeId, term: Term) -> bool {
        let Some(route) = self.route_mut(shard) else { return false };
        let new = Some((node, term));
        if route.refuted == new || !route.claim().yields_to(Some(node), term) {
            return false;
        }
        route.update(|r| r.hearsay = new)
    }

    /// `node` says itself, in `term`, that it does not lead: clears the route to it. Hearsay goes even if it speaks of a
    /// later term: should it have overtaken this answer, then whoever is asked next knows better.
    pub fn disown(&mut self, shard: ShardId, node: NodeId, term: Term) -> bool {
        let Some(route) = self.route_mut(shard) else { return false };
        route.update(|r| {
            if let Some(untrue) = r.hearsay.take_if(|(n, _)| *n == node) {
                r.refuted = Some(untrue);
            }
            if r.vouched.leader == Some(node) && term >= r.vouched.term {
                r.vouched = Claim { leader: None, term };
            }
        })
    }

    /// What turned out to be untrue may be true by now. For every second or so: a lie that is repeated costs a hop each time.
    pub fn forget_refuted(&mut self) {
        self.data.iter_mut().chain([&mut self.meta]).for_each(|route| route.refuted = None);
    }

    /// A node is gone: clears routes to it, keeps the terms that somebody vouches for. Returns the groups concerned.
    pub fn node_gone(&mut self, node: NodeId) -> Vec<ShardId> {
        let mut gone = Vec::new();
        let meta = std::iter::once((ShardId::META, &mut self.meta));
        for (shard, route) in self.data.iter_mut().enumerate().map(|(i, c)| (ShardId(i as u32), c)).chain(meta) {
            let changed = route.update(|r| {
                r.hearsay.take_if(|(n, _)| *n == node);
                if r.vouched.leader == Some(node) {
                    r.vouched.leader = None;
                }
            });
            if changed {
                gone.push(shard);
            }
        }
        gone
    }
}

/// A shard as this node sees it. The leader is a hint; Raft decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardRoute {
    /// The slots it owns.
    pub range: SlotRange,
    /// The leader with the highest known term, unless its node is down.
    pub leader: Option<NodeId>,
    /// That term; kept when the leader's node goes down.
    pub term: Term,
    /// What this node's own replica lets be read without the driver; none without a replica.
    pub published: Option<Arc<Published>>,
    /// The term of this node's own replica, 0 without one.
    pub own_term: Term,
    /// The nodes that hold replicas by placement, with the replica's id and how it stands.
    pub replicas: Vec<(NodeId, ReplicaId, Standing)>,
    /// Why it has no leader, once that has lasted longer than an election takes.
    pub down: Option<Down>,
}

/// Why a group has no leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Down {
    /// Whether its majority is gone for good: only an operator makes it writable again.
    pub lost: bool,
    /// In words.
    pub reason: Arc<str>,
}

/// How a replica of placement stands, as far as a node knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It counts.
    Voter,
    /// It is being filled. Only nodes with a replica of the group know.
    Learner,
    /// So is this one, in the place of another that goes, or beside the others.
    Incoming,
    /// It counts until others have taken its place.
    Outgoing,
    /// The life of the node that held it is over.
    Lost,
}

/// A node as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRoute {
    /// Registered incarnation.
    pub incarnation: Incarnation,
    /// Earlier incarnations: connections from them are refused.
    pub fenced: Vec<Incarnation>,
    /// Where it is reached.
    pub addrs: NodeAddrs,
    /// Whether it is connected and beats arrive; true for this node itself.
    pub live: bool,
    /// Whether it is about to stop.
    pub draining: bool,
    /// Whether it may hold replicas.
    pub approved: bool,
}

/// An immutable picture of placement and leadership, replaced as a whole whenever something changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoutingView {
    /// This node.
    pub this: NodeId,
    /// Identity of the cluster; `None` before it is founded or joined.
    pub uuid: Option<ClusterUuid>,
    /// Placement epoch.
    pub epoch: Epoch,
    /// Data shards; the index is the shard id. Arcs are contiguous and ascending and cover all slots.
    pub shards: Vec<ShardRoute>,
    /// Nodes.
    pub nodes: BTreeMap<NodeId, NodeRoute>,
    /// Leader of the meta group.
    pub meta_leader: Option<NodeId>,
    /// Why that has none, likewise.
    pub meta_down: Option<Down>,
    /// Generation of the table, 0 for none.
    pub generation: u32,
    /// How that came about, if it is not the first.
    pub recovery: Option<Recovery>,
    /// Why this node is not ready; `None` if it is.
    pub not_ready: Option<String>,
}

impl RoutingView {
    /// The shard that owns `slot`; `None` before the placement is known.
    pub fn shard_of(&self, slot: Slot) -> Option<ShardId> {
        let after = self.shards.partition_point(|s| s.range.start <= slot.0);
        let index = after.checked_sub(1)?;
        self.shards[index].range.contains(slot).then_some(ShardId(index as u32))
    }

    /// The shard's route.
    pub fn shard(&self, shard: ShardId) -> Option<&ShardRoute> {
        self.shards.get(shard.0 as usize)
    }

    /// The leader to name in a MOVED answer: another live node that leads in a term at least that of our own replica.
    pub fn redirect(&self, shard: ShardId) -> Option<NodeId> {
        let route = self.shard(shard)?;
        let leader = route.leader?;
        let live = self.nodes.get(&leader).is_some_and(|n| n.live);
        (leader != self.this && live && route.term >= route.own_term).then_some(leader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Option<NodeId> = Some(NodeId(1));
    const B: Option<NodeId> = Some(NodeId(2));

    #[test]
    fn the_highest_term_wins_and_a_term_has_one_leader() {
        let mut r = Router::default();
        r.set_shards(1);
        let s = ShardId(0);
        assert!(r.learn(s, A, Term(5)));
        assert!(!r.learn(s, B, Term(4)), "stale");
        assert!(!r.learn(s, B, Term(5)), "a second leader of a term is a lie");
        assert!(r.learn(s, None, Term(6)), "an election has begun");
        assert!(!r.learn(s, A, Term(5)));
        assert!(r.learn(s, B, Term(6)));
        assert_eq!(r.node_gone(NodeId(2)), [s]);
        assert_eq!(r.claim(s), Claim { leader: None, term: Term(6) }, "the term is kept");
        assert!(r.learn(s, B, Term(6)), "it was only away");
        assert!(!r.disown(s, NodeId(1), Term(9)));
        assert!(!r.disown(s, NodeId(2), Term(5)), "an old refusal");
        assert!(r.disown(s, NodeId(2), Term(6)));
        assert!(!r.learn(ShardId(7), A, Term(9)), "no such shard");
    }

    fn view(leader: Option<NodeId>, live: bool, own_term: u64) -> RoutingView {
        let route = |start, end| ShardRoute {
            range: SlotRange { start, end },
            leader,
            term: Term(5),
            published: None,
            own_term: Term(own_term),
            replicas: Vec::new(),
            down: None,
        };
        let node = NodeRoute {
            incarnation: Incarnation(1),
            fenced: Vec::new(),
            addrs: NodeAddrs::default(),
            live,
            draining: false,
            approved: true,
        };
        RoutingView {
            this: NodeId(1),
            shards: vec![route(0, 8192), route(8192, 16384)],
            nodes: BTreeMap::from([(NodeId(2), node)]),
            ..RoutingView::default()
        }
    }

    #[test]
    fn hearsay_counts_until_it_turns_out_to_be_untrue() {
        let mut r = Router::default();
        r.set_shards(1);
        let s = ShardId(0);
        let claim = |leader, term| Claim { leader, term: Term(term) };
        assert!(r.learn(s, A, Term(5)));
        assert!(!r.hear(s, NodeId(2), Term(5)), "not later");
        assert!(r.hear(s, NodeId(2), Term(1_000)));
        assert_eq!(r.claim(s), claim(B, 1_000));
        assert!(!r.learn(s, A, Term(6)), "not later");
        // It was asked: what is true counts again, and the same is not believed twice.
        assert!(r.disown(s, NodeId(2), Term(5)));
        assert_eq!(r.claim(s), claim(A, 6));
        assert!(!r.hear(s, NodeId(2), Term(1_000)));
        r.forget_refuted();
        assert!(r.hear(s, NodeId(2), Term(1_000)));
        assert!(r.disown(s, NodeId(2), Term(5)));
        assert!(r.hear(s, NodeId(2), Term(7)), "it may lead later");
        assert!(!r.learn(s, B, Term(7)), "confirmed");
        assert!(!r.disown(s, NodeId(2), Term(6)), "an old refusal");
        assert!(r.hear(s, NodeId(3), Term(8)));
        assert_eq!(r.node_gone(NodeId(3)), [s]);
        assert_eq!(r.claim(s), claim(B, 7));
        assert!(r.hear(s, NodeId(1), Term(9)));
        assert!(r.learn(s, B, Term(10)), "later than hearsay");
        assert_eq!(r.claim(s), claim(B, 10));
    }

    #[test]
    fn slots_find_their_shard() {
        let v = view(A, true, 5);
        for (slot, shard) in [(0, 0), (8191, 0), (8192, 1), (16383, 1)] {
            assert_eq!(v.shard_of(Slot(slot)), Some(ShardId(shard)));
        }
        assert_eq!(RoutingView::default().shard_of(Slot(1)), None);
    }

    #[test]
    fn only_a_live_other_leader_of_a_current_term_is_named() {
        assert_eq!(view(B, true, 5).redirect(ShardId(0)), B);
        assert_eq!(view(B, false, 5).redirect(ShardId(0)), None);
        assert_eq!(view(B, true, 6).redirect(ShardId(0)), None, "our own replica knows a later term");
        assert_eq!(view(A, true, 5).redirect(ShardId(0)), None, "that is this node");
    }
}
