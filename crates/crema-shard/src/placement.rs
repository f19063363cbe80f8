//! Where data lives: slots to shards, shards to nodes, and who leads. Pure functions of their arguments.
//!
//! ```text
//!   arcs:    0..16384 cut into contiguous ranges of floor or ceil slots
//!   assign:  rendezvous hashing, spread over zones -> relieve overloaded nodes
//!            -> first choices, even -> second choices, even if the first is gone -> the rest by hash
//! ```
//!
//! `Plan` compares that with what is, and says which groups should change next: a few at a time, see [`Plan::next`].
//!
//! Rendezvous hashing (Thaler and Ravishankar 1998) gives a shard to the nodes with the highest hash of (shard, node), so
//! that a further node takes replicas over and none move between the others. Chance alone would load some nodes well
//! above the mean; what lies above a bound is moved to where it costs the least hash. Leaders are then chosen by
//! shifting along alternating paths until no shift makes them more even (optimal semi-matching, Harvey et al. 2003).

use crate::meta::{MAX_REPLICAS, MetaState, NO_LIFE};
use crema_core::{NodeId, ReplicaId, SLOT_COUNT, ShardId, SlotRange};
use std::cmp::Reverse;
use std::collections::VecDeque;

/// Most data shards of a cluster: one a slot.
pub const MAX_SHARDS: u32 = SLOT_COUNT as u32;

/// Cuts the ring into `shards` contiguous arcs that cover it, ascending, each of floor or ceil of 16,384 / `shards` slots.
///
/// # Panics
///
/// If `shards` is not 1 to [`MAX_SHARDS`]; configurations and records are checked before.
pub fn arcs(shards: u32) -> Vec<SlotRange> {
    assert!((1..=MAX_SHARDS).contains(&shards), "{shards} shards; 1 to {MAX_SHARDS} are possible");
    // At most 16,384 * 16,384, and the quotient is at most 16,384.
    let cut = |i: u32| (i * MAX_SHARDS / shards) as u16;
    (0..shards).map(|i| SlotRange { start: cut(i), end: cut(i + 1) }).collect()
}

/// Gives each shard `replication` nodes, or all if there are fewer, in the order in which they are wanted as leaders.
///
/// - No shard has two replicas on one node; its replicas are spread over the zones as evenly as these allow. Nodes
///   without a zone count as one zone together.
/// - No node holds more than ceil(mean) replicas, unless the spread over zones needs it.
/// - First choices differ by at most 1 between nodes, unless zones prevent it.
/// - When one node is gone and its shards fall to their second choices, those of the others differ by 2. Where the bound
///   on replicas stands in the way it is a little more: seldom and 3 or 4 at three replicas, often at two, which leave
///   no choice of a successor.
/// - A node more or less moves about its own share of replicas and little else.
///
/// The result depends on the set of nodes only, not on their order; of a node named twice the first zone counts. Without
/// nodes no shard has replicas. Time is about `shards` × nodes × `replication`.
pub fn assign(shards: u32, replication: u32, nodes: &[(NodeId, Option<&str>)]) -> Vec<Vec<NodeId>> {
    let field = Field::new(nodes);
    let replication = field.ids.len().min(replication as usize);
    if replication == 0 {
        return vec![Vec::new(); shards as usize];
    }
    let total = shards as usize * replication;
    let mut table = Table {
        bound: total.div_ceil(field.ids.len()),
        load: vec![0; field.ids.len()],
        sets: (0..shards).map(|s| field.best(s, replication)).collect(),
        field,
    };
    for set in &table.sets {
        for node in set {
            table.load[*node] += 1;
        }
    }
    table.relieve();
    table.order()
}

/// Gives the meta group its nodes, ascending: all up to two, else the largest odd number up to [`MAX_REPLICAS`], since an
/// even one costs a vote more and survives no failure more. Spread over the zones as evenly as these allow; then those
/// that are `present`, then the lowest ids.
pub fn meta_nodes(present: &[NodeId], nodes: &[(NodeId, Option<&str>)]) -> Vec<NodeId> {
    let count = match nodes.len().min(MAX_REPLICAS) {
        n @ 0..=2 => n,
        n => n - (n + 1) % 2,
    };
    let mut chosen: Vec<(NodeId, Option<&str>)> = Vec::new();
    while chosen.len() < count {
        let free = nodes.iter().filter(|(id, _)| chosen.iter().all(|(c, _)| c != id));
        let in_zone = |zone| chosen.iter().filter(|(_, z)| *z == zone).count();
        let Some(next) = free.min_by_key(|(id, zone)| (in_zone(*zone), !present.contains(id), *id)) else { break };
        chosen.push(*next);
    }
    let mut ids: Vec<NodeId> = chosen.into_iter().map(|(id, _)| id).collect();
    ids.sort_unstable();
    ids
}

/// What the placement of a group should become.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// The group.
    pub shard: ShardId,
    /// Its replicas by placement as of the decision.
    pub was: Vec<ReplicaId>,
    /// Its nodes, in the order in which they are wanted as leaders.
    pub nodes: Vec<NodeId>,
}

/// Where all replicas should be by the approved nodes and their zones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What it was made of: the approved nodes and their zones.
    approved: Vec<(NodeId, Option<String>)>,
    /// Replicas of each shard.
    replication: u32,
    /// Where the meta group was.
    meta_before: Vec<NodeId>,
    data: Vec<Vec<NodeId>>,
    meta: Vec<NodeId>,
}

impl Plan {
    /// The plan for a table, with `without` as if it were not approved. Takes time with the number of shards: keep it while
    /// [`Plan::is_of`] says so.
    pub fn new(state: &MetaState, without: Option<NodeId>) -> Plan {
        let mut nodes = state.approved();
        nodes.retain(|(id, _)| Some(*id) != without);
        let present: Vec<NodeId> = state.meta.iter().map(|r| r.node).collect();
        Plan {
            data: assign(state.shards.len() as u32, state.replication, &nodes),
            meta: meta_nodes(&present, &nodes),
            approved: nodes.iter().map(|(id, zone)| (*id, zone.map(str::to_owned))).collect(),
            replication: state.replication,
            meta_before: present,
        }
    }

    /// Whether a table has the same plan.
    pub fn is_of(&self, state: &MetaState) -> bool {
        let approved = self.approved.iter().map(|(id, zone)| (*id, zone.as_deref()));
        state.approved().into_iter().eq(approved)
            && self.replication == state.replication
            && self.data.len() == state.shards.len()
            && state.meta.iter().map(|r| r.node).eq(self.meta_before.iter().copied())
    }

    /// The nodes that a group should be on, in the order in which they are wanted as leaders.
    pub fn nodes(&self, shard: ShardId) -> &[NodeId] {
        if shard.is_meta() { &self.meta } else { self.data.get(shard.0 as usize).map_or(&[], Vec::as_slice) }
    }

    /// How many groups are not where they should be, or on their way.
    pub fn open(&self, state: &MetaState) -> usize {
        state.groups().filter(|s| state.moving(*s).is_some() || self.differs(state, *s)).count()
    }

    fn differs(&self, state: &MetaState, shard: ShardId) -> bool {
        let wanted = self.nodes(shard);
        let present = state.replicas(shard);
        present.len() != wanted.len() || present.iter().any(|r| !wanted.contains(&r.node))
    }

    /// The groups whose placement should change next. A group moves only to nodes that `live`, and only `most` of them at a
    /// time; one under way is left to arrive, unless it is on its way to a node that is not approved any more. A mere
    /// change of order moves nothing and is not counted, but there are at most `most` of those at a time, too.
    pub fn next(&self, state: &MetaState, live: impl Fn(NodeId) -> bool, most: usize) -> Vec<Move> {
        let mut under_way = state.groups().filter(|s| state.moving(*s).is_some()).count();
        let (mut moves, mut reordered) = (Vec::new(), 0);
        // The meta group first: it has to outlive the others.
        for shard in std::iter::once(ShardId::META).chain(state.groups().filter(|s| !s.is_meta())) {
            let (wanted, present) = (self.nodes(shard), state.replicas(shard));
            if wanted.is_empty() || present.iter().map(|r| r.node).eq(wanted.iter().copied()) {
                continue;
            }
            // Nothing can be placed on a node without a life: the group waits, and holds no place of others.
            if wanted.iter().any(|n| state.nodes.get(n).is_none_or(|r| r.incarnation == NO_LIFE)) {
                continue;
            }
            let arrives = wanted.iter().all(|n| present.iter().any(|r| r.node == *n) || live(*n));
            let approved = |n: NodeId| state.nodes.get(&n).is_some_and(|r| r.approved);
            let due = if !self.differs(state, shard) {
                reordered += 1;
                reordered <= most && state.moving(shard).is_none()
            } else if state.moving(shard).is_some() {
                arrives && present.iter().any(|r| !approved(r.node))
            } else if arrives && under_way < most {
                under_way += 1;
                true
            } else {
                false
            };
            if due {
                let was = present.iter().map(|r| r.id).collect();
                moves.push(Move { shard, was, nodes: wanted.to_vec() });
            }
        }
        moves
    }
}

/// The nodes to choose from, ascending by id; below, a node is its position here.
struct Field {
    ids: Vec<NodeId>,
    zone: Vec<usize>,
    zones: usize,
}

impl Field {
    fn new(nodes: &[(NodeId, Option<&str>)]) -> Self {
        let mut nodes = nodes.to_vec();
        nodes.sort_by_key(|(id, _)| *id);
        nodes.dedup_by_key(|(id, _)| *id);
        let mut names: Vec<Option<&str>> = nodes.iter().map(|(_, zone)| *zone).collect();
        names.sort_unstable();
        names.dedup();
        Field {
            ids: nodes.iter().map(|(id, _)| *id).collect(),
            zone: nodes.iter().map(|(_, zone)| names.partition_point(|n| n < zone)).collect(),
            zones: names.len(),
        }
    }

    /// The rendezvous hash of a pair. Fixed for ever: another hash would move every replica.
    fn score(&self, shard: u32, node: usize) -> u64 {
        let mut pair = [0; 12];
        pair[..4].copy_from_slice(&shard.to_le_bytes());
        pair[4..].copy_from_slice(&self.ids[node].0.to_le_bytes());
        xxhash_rust::xxh3::xxh3_64(&pair)
    }

    /// How much worse `to` is than `from` by hash.
    fn loss(&self, shard: u32, from: usize, to: usize) -> u64 {
        self.score(shard, from).saturating_sub(self.score(shard, to))
    }

    /// The nodes of a shard by hash and zone alone: always the best node of those zones that have the fewest yet.
    fn best(&self, shard: u32, count: usize) -> Vec<usize> {
        let scores: Vec<u64> = (0..self.ids.len()).map(|n| self.score(shard, n)).collect();
        let mut in_zone = vec![0; self.zones];
        let mut set = Vec::with_capacity(count);
        while set.len() < count {
            let free = (0..self.ids.len()).filter(|n| !set.contains(n));
            let Some(next) = free.min_by_key(|n| (in_zone[self.zone[*n]], Reverse(scores[*n]))) else {
                break;
            };
            in_zone[self.zone[next]] += 1;
            set.push(next);
        }
        set
    }

    /// Whether `to` may take `from`'s place without the shard being spread over zones less evenly.
    fn may_replace(&self, set: &[usize], from: usize, to: usize) -> bool {
        let count = |zone: usize| set.iter().filter(|n| self.zone[**n] == zone).count();
        !set.contains(&to) && (self.zone[from] == self.zone[to] || count(self.zone[to]) < count(self.zone[from]))
    }
}

/// An assignment in the making.
struct Table {
    field: Field,
    /// The nodes of each shard.
    sets: Vec<Vec<usize>>,
    /// Replicas by node.
    load: Vec<usize>,
    /// Most replicas that a node should hold.
    bound: usize,
}

impl Table {
    fn holds(&self, shard: usize, node: usize) -> bool {
        self.sets[shard].contains(&node)
    }

    fn replace(&mut self, shard: usize, from: usize, to: usize) {
        let place = self.sets[shard].iter_mut().find(|n| **n == from).expect("a node is replaced where it is");
        *place = to;
        self.load[from] -= 1;
        self.load[to] += 1;
    }

    /// Moves replicas from nodes above the bound to nodes below it.
    ///
    /// Without zones one step always suffices: a node above the bound holds some shard that a node below it does not.
    fn relieve(&mut self) {
        for from in 0..self.load.len() {
            if self.load[from] <= self.bound {
                continue;
            }
            let mut moves = Vec::new();
            for shard in (0..self.sets.len()).filter(|s| self.holds(*s, from)) {
                for to in (0..self.load.len()).filter(|to| self.load[*to] < self.bound) {
                    if self.field.may_replace(&self.sets[shard], from, to) {
                        moves.push((self.field.loss(shard as u32, from, to), shard, to));
                    }
                }
            }
            moves.sort_unstable();
            for (_, shard, to) in moves {
                if self.load[from] <= self.bound {
                    break;
                }
                if self.load[to] < self.bound && self.holds(shard, from) {
                    self.replace(shard, from, to);
                }
            }
            while self.load[from] > self.bound && self.relieve_by_chain(from) {}
        }
    }

    /// Takes one replica off `from` where zones forbid every single step: it goes to a node that hands another one on,
    /// and so on, to a node below the bound. Returns whether that was possible.
    fn relieve_by_chain(&mut self, from: usize) -> bool {
        let mut came_by: Vec<Option<(usize, usize)>> = vec![None; self.load.len()];
        let mut queue = VecDeque::from([from]);
        while let Some(node) = queue.pop_front() {
            for shard in (0..self.sets.len()).filter(|s| self.holds(*s, node)) {
                for to in 0..self.load.len() {
                    if to == from || came_by[to].is_some() || !self.field.may_replace(&self.sets[shard], node, to) {
                        continue;
                    }
                    came_by[to] = Some((node, shard));
                    if self.load[to] < self.bound {
                        return self.follow(&came_by, to);
                    }
                    queue.push_back(to);
                }
            }
        }
        false
    }

    /// Performs the chain that ends at `to`, or none of it if its steps stand in each other's way.
    fn follow(&mut self, came_by: &[Option<(usize, usize)>], mut to: usize) -> bool {
        let mut done = Vec::new();
        while let Some((node, shard)) = came_by[to] {
            // A shard that occurs twice in the chain may have been changed by the later step.
            if !self.holds(shard, node) || !self.field.may_replace(&self.sets[shard], node, to) {
                for (shard, node, to) in done.into_iter().rev() {
                    self.replace(shard, to, node);
                }
                return false;
            }
            self.replace(shard, node, to);
            done.push((shard, node, to));
            to = node;
        }
        true
    }

    /// Chooses one node of each of `shards`, not `gone`, such that the nodes' loads, which begin at `base`, come out even.
    /// Where some still differ by more than `tolerance` because the nodes with too little hold too few of these shards,
    /// replicas are moved to them, within the bound.
    fn choose(&mut self, shards: &[usize], gone: Option<usize>, base: Vec<usize>, tolerance: usize) -> Vec<usize> {
        let others = |shard: &usize| self.sets[*shard].iter().copied().filter(|n| Some(*n) != gone).collect();
        let mut options: Vec<Vec<usize>> = shards.iter().map(others).collect();
        let mut choice = Choice::new(&options, base);
        choice.even_out(&options);
        // Every round makes the sum of squares smaller, so this ends.
        while let Some((item, from, to)) = self.widening(shards, &options, gone, &choice, tolerance) {
            self.replace(shards[item], from, to);
            options[item].retain(|n| *n != from);
            options[item].push(to);
            choice.shift(item, choice.of[item], to);
            choice.even_out(&options);
        }
        choice.of
    }

    /// The cheapest replica to move so that a node with too little can take a shard over from one that has more than
    /// `tolerance` more: (position in `shards`, node that gives the replica up, node that gets it and is chosen).
    fn widening(
        &self,
        shards: &[usize],
        options: &[Vec<usize>],
        gone: Option<usize>,
        choice: &Choice,
        tolerance: usize,
    ) -> Option<(usize, usize, usize)> {
        let nodes = || (0..self.load.len()).filter(|n| Some(*n) != gone);
        let least = nodes().map(|n| choice.load[n]).min()?;
        let mut rich: Vec<usize> = nodes().filter(|n| choice.load[*n] > least + tolerance).collect();
        rich.sort_by_key(|n| (Reverse(choice.load[*n]), *n));
        for leader in rich {
            let mut best = None;
            let poor = |n: &usize| choice.load[*n] + tolerance < choice.load[leader] && self.load[*n] < self.bound;
            for to in nodes().filter(poor) {
                for &item in &choice.held[leader] {
                    for &from in &options[item] {
                        // Who was chosen keeps its replica if there is another one to move.
                        let keeps = from != leader || options[item].len() == 1;
                        if keeps && self.field.may_replace(&self.sets[shards[item]], from, to) {
                            let loss = self.field.loss(shards[item] as u32, from, to);
                            let cost = (choice.load[to], loss, item, from, to);
                            best = best.min(Some(cost)).or(Some(cost));
                        }
                    }
                }
            }
            if let Some((_, _, item, from, to)) = best {
                return Some((item, from, to));
            }
        }
        None
    }

    /// Orders each shard's nodes: its first choice; the one that takes over if that is gone, such that what it led falls
    /// evenly to the others; the rest by hash.
    fn order(mut self) -> Vec<Vec<NodeId>> {
        let all: Vec<usize> = (0..self.sets.len()).collect();
        let mut order: Vec<Vec<usize>> = vec![Vec::new(); all.len()];
        let mut leads = vec![0; self.load.len()];
        let mut led_by = vec![Vec::new(); self.load.len()];
        for (shard, leader) in self.choose(&all, None, leads.clone(), 1).into_iter().enumerate() {
            leads[leader] += 1;
            led_by[leader].push(shard);
            order[shard].push(leader);
        }
        for (gone, shards) in led_by.into_iter().enumerate() {
            // With one replica nobody takes over.
            if shards.iter().all(|s| self.sets[*s].len() > 1) {
                let second = self.choose(&shards, Some(gone), leads.clone(), 2);
                shards.into_iter().zip(second).for_each(|(shard, node)| order[shard].push(node));
            }
        }
        for (shard, set) in self.sets.iter_mut().enumerate() {
            set.sort_by_key(|n| (Reverse(self.field.score(shard as u32, *n)), *n));
            set.retain(|n| !order[shard].contains(n));
            order[shard].append(set);
        }
        order.into_iter().map(|nodes| nodes.into_iter().map(|n| self.field.ids[n]).collect()).collect()
    }
}

/// One node chosen for each item out of the item's own options.
struct Choice {
    /// By item.
    of: Vec<usize>,
    /// Items by node.
    held: Vec<Vec<usize>>,
    /// By node: what it had before, and the items it holds.
    load: Vec<usize>,
}

impl Choice {
    /// Gives each item to the least loaded of its options, which must not be empty; among equals to the first.
    fn new(options: &[Vec<usize>], mut load: Vec<usize>) -> Self {
        let mut held = vec![Vec::new(); load.len()];
        let of = options
            .iter()
            .enumerate()
            .map(|(item, options)| {
                let node = *options.iter().min_by_key(|n| load[**n]).expect("an item has an option");
                load[node] += 1;
                held[node].push(item);
                node
            })
            .collect();
        Choice { of, held, load }
    }

    fn shift(&mut self, item: usize, from: usize, to: usize) {
        let at = self.held[from].iter().position(|i| *i == item).expect("a node gives away what it holds");
        self.held[from].swap_remove(at);
        self.held[to].push(item);
        self.of[item] = to;
        self.load[from] -= 1;
        self.load[to] += 1;
    }

    /// Shifts items until no chain of shifts makes the loads more even. Each makes the sum of squares smaller.
    fn even_out(&mut self, options: &[Vec<usize>]) {
        let mut again = true;
        while again {
            again = false;
            for node in 0..self.load.len() {
                while self.shift_away(options, node) {
                    again = true;
                }
            }
        }
    }

    /// Passes one item's worth of load from `from` along a chain to the least loaded node within reach, if that has at
    /// least two less.
    fn shift_away(&mut self, options: &[Vec<usize>], from: usize) -> bool {
        if self.held[from].is_empty() {
            return false;
        }
        let mut came_by: Vec<Option<(usize, usize)>> = vec![None; self.load.len()];
        let mut queue = VecDeque::from([from]);
        let mut end = from;
        while let Some(node) = queue.pop_front() {
            for &item in &self.held[node] {
                for &to in &options[item] {
                    if to != from && came_by[to].is_none() {
                        came_by[to] = Some((node, item));
                        queue.push_back(to);
                        if self.load[to] < self.load[end] {
                            end = to;
                        }
                    }
                }
            }
        }
        if self.load[end] + 2 > self.load[from] {
            return false;
        }
        // Nodes of the chain are distinct and so are the items they hold; the order of the shifts does not matter.
        while let Some((node, item)) = came_by[end] {
            self.shift(item, node, end);
            end = node;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::{MetaCommand, MetaMachine, NodeAddrs};
    use crema_core::Incarnation;
    use crema_core::{ClusterUuid, LogIndex, WallTime};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;

    type Assignment = Vec<Vec<NodeId>>;

    fn nodes(n: u64) -> Vec<(NodeId, Option<&'static str>)> {
        (1..=n).map(|i| (NodeId(i), None)).collect()
    }

    fn loads(nodes: &[(NodeId, Option<&str>)], a: &Assignment) -> BTreeMap<NodeId, usize> {
        let mut load: BTreeMap<NodeId, usize> = nodes.iter().map(|(n, _)| (*n, 0)).collect();
        a.iter().flatten().for_each(|n| *load.get_mut(n).expect("a given node") += 1);
        load
    }

    /// Difference between most and fewest effective first choices over the nodes except `gone`.
    fn spread(nodes: &[(NodeId, Option<&str>)], a: &Assignment, gone: Option<NodeId>) -> usize {
        let mut led: BTreeMap<NodeId, usize> = nodes.iter().map(|(n, _)| (*n, 0)).collect();
        gone.map(|n| led.remove(&n));
        for set in a {
            if let Some(n) = set.iter().find(|n| Some(**n) != gone) {
                *led.get_mut(n).unwrap() += 1;
            }
        }
        led.values().max().unwrap_or(&0) - led.values().min().unwrap_or(&0)
    }

    fn check_bounds(nodes: &[(NodeId, Option<&str>)], shards: u32, replication: u32, a: &Assignment) {
        let what = format!("{} nodes, {shards} shards, {replication} replicas", nodes.len());
        assert_eq!(a.len(), shards as usize, "{what}");
        let wanted = nodes.len().min(replication as usize);
        for set in a {
            assert_eq!(set.iter().collect::<BTreeSet<_>>().len(), wanted, "{what}: distinct nodes");
            assert_eq!(set.len(), wanted, "{what}: replicas");
        }
        let bound = (shards as usize * wanted).div_ceil(nodes.len());
        for (node, load) in loads(nodes, a) {
            assert!(load <= bound, "{what}: node {node} holds {load}, more than {bound}");
        }
        assert!(spread(nodes, a, None) <= 1, "{what}: first choices differ by {}", spread(nodes, a, None));
    }

    fn failover_spread(nodes: &[(NodeId, Option<&str>)], a: &Assignment) -> usize {
        nodes.iter().map(|(n, _)| spread(nodes, a, Some(*n))).max().unwrap_or(0)
    }

    #[test]
    fn arcs_cover_the_ring_with_floor_or_ceil() {
        for shards in (1..=300).chain([1000, 1024, 4095, 8191, 8192, 8193, 16383, 16384]) {
            let arcs = arcs(shards);
            assert_eq!(arcs.len(), shards as usize);
            assert_eq!((arcs[0].start, arcs[arcs.len() - 1].end), (0, SLOT_COUNT));
            assert!(arcs.windows(2).all(|w| w[0].end == w[1].start));
            let (floor, ceil) = (MAX_SHARDS / shards, MAX_SHARDS.div_ceil(shards));
            assert!(arcs.iter().all(|a| (floor..=ceil).contains(&(a.len() as u32))), "{shards} shards");
        }
    }

    #[test]
    fn bounds_hold_over_the_whole_grid() {
        for n in 1..=12 {
            let nodes = nodes(n);
            for replication in 1..=5 {
                for shards in (1..=40).chain([47, 64, 100, 128, 255, 256, 511, 1024]) {
                    let a = assign(shards, replication, &nodes);
                    check_bounds(&nodes, shards, replication, &a);
                    if replication >= 3 {
                        let got = failover_spread(&nodes, &a);
                        assert!(got <= 3, "{n} nodes, {shards} shards, {replication} replicas: {got} after a failure");
                    }
                }
            }
        }
    }

    #[test]
    fn usual_clusters_stay_even_when_a_node_is_gone() {
        for (n, shards) in [(3, 16), (3, 64), (3, 1024), (4, 64), (5, 16), (5, 64), (5, 128), (5, 1024), (7, 256)] {
            let nodes = nodes(n);
            let a = assign(shards, 3, &nodes);
            let got = failover_spread(&nodes, &a);
            assert!(got <= 2, "{n} nodes, {shards} shards: first choices differ by {got} after a failure");
        }
    }

    #[test]
    fn a_further_node_moves_its_share_and_little_else() {
        for n in 3..=11 {
            for replication in [1, 3, 5] {
                let (few, more) = (nodes(n), nodes(n + 1));
                if u64::from(replication) >= n {
                    continue;
                }
                let shards = 1024;
                let (before, after) = (assign(shards, replication, &few), assign(shards, replication, &more));
                let mut moved = 0;
                for (b, a) in before.iter().zip(&after) {
                    moved += a.iter().filter(|n| !b.contains(n)).count();
                }
                let total = (shards * replication) as usize;
                let share = total / (n as usize + 1);
                // What the bound, and for single replicas the even lead, shifts on both sides.
                let slack = total / 12;
                assert!(moved <= share + slack, "{n} nodes, {replication} replicas: {moved} moved, share {share}");
                let pulled = loads(&more, &after)[&NodeId(n + 1)];
                assert!(pulled + slack >= share, "the new node got {pulled} of {share}");
            }
        }
    }

    #[test]
    fn the_order_of_nodes_does_not_matter_and_none_means_no_replicas() {
        let mut mixed = nodes(6);
        mixed.reverse();
        mixed.push((NodeId(3), None));
        assert_eq!(assign(64, 3, &mixed), assign(64, 3, &nodes(6)));
        assert_eq!(assign(2, 3, &[]), vec![vec![], vec![]]);
        assert_eq!(assign(2, 0, &nodes(3)), vec![vec![], vec![]]);
    }

    #[test]
    fn the_placement_is_fixed_for_ever() {
        // Another hash, or another order of its input, would move every replica of a running cluster.
        let a: Vec<Vec<u64>> = assign(6, 3, &nodes(5)).iter().map(|set| set.iter().map(|n| n.0).collect()).collect();
        assert_eq!(a, [[4, 5, 3], [3, 2, 5], [1, 2, 4], [3, 1, 2], [5, 1, 3], [2, 5, 1]]);
    }

    #[test]
    fn a_chain_relieves_a_node_that_no_single_step_can() {
        // Zones a, b, b, c, d. Only node 2 has room, but every shard of node 0 is in its zone already.
        let zones = ["a", "b", "b", "c", "d"];
        let nodes: Vec<(NodeId, Option<&str>)> = (1..).map(NodeId).zip(zones.map(Some)).collect();
        let mut sets = vec![vec![0, 1]; 4];
        sets.extend(vec![vec![3, 4]; 3]);
        let mut table = Table { field: Field::new(&nodes), sets, load: vec![4, 4, 0, 3, 3], bound: 3 };
        table.relieve();
        let mut load = vec![0; 5];
        for set in &table.sets {
            assert_eq!(set.iter().map(|n| zones[*n]).collect::<BTreeSet<_>>().len(), 2, "{set:?}");
            set.iter().for_each(|n| load[*n] += 1);
        }
        assert_eq!(load, table.load);
        assert!(load.iter().all(|l| *l <= 3), "{load:?}");
    }

    #[test]
    fn zones_are_spread_even_where_the_bound_suffers() {
        // One node alone in its zone must hold a replica of every shard.
        let uneven = [
            (NodeId(1), Some("a")),
            (NodeId(2), Some("b")),
            (NodeId(3), Some("b")),
            (NodeId(4), Some("c")),
            (NodeId(5), Some("c")),
        ];
        let zone: BTreeMap<NodeId, &str> = uneven.iter().map(|(n, z)| (*n, z.unwrap())).collect();
        let a = assign(128, 3, &uneven);
        for set in &a {
            assert_eq!(set.iter().map(|n| zone[n]).collect::<BTreeSet<_>>().len(), 3, "{set:?}");
        }
        let load = loads(&uneven, &a);
        assert_eq!(load[&NodeId(1)], 128);
        assert!(load.iter().all(|(n, l)| *n == NodeId(1) || *l <= 128 * 3 / 5 + 2), "{load:?}");
        assert!(spread(&uneven, &a, None) <= 1, "who leads is free of zones");
    }

    #[test]
    fn two_zones_split_five_replicas_three_to_two() {
        let nodes: Vec<(NodeId, Option<&str>)> =
            (1..=8).map(|i| (NodeId(i), Some(if i % 2 == 0 { "even" } else { "odd" }))).collect();
        for set in assign(200, 5, &nodes) {
            let odd = set.iter().filter(|n| n.0 % 2 == 1).count();
            assert!(odd == 2 || odd == 3, "{set:?}");
        }
    }

    fn state(members: u64, shards: u32) -> MetaState {
        let life = |n| Incarnation(u128::from(n));
        let members: Vec<_> = (1..=members).map(|n| (NodeId(n), life(n), NodeAddrs::default())).collect();
        MetaState::found(ClusterUuid(1), "t".into(), 1, WallTime(1), &members, shards, 3)
    }

    fn apply(m: &mut MetaMachine, command: MetaCommand) -> bool {
        m.apply(LogIndex(m.applied().0 + 1), &command.encode()).unwrap()
    }

    /// Works a plan off, all moves arriving at once; returns how many groups moved.
    fn work_off(m: &mut MetaMachine, most: usize) -> usize {
        let (mut moved, mut rounds) = (0, 0);
        loop {
            let plan = Plan::new(m.state(), None);
            let moves = plan.next(m.state(), |_| true, most);
            if moves.is_empty() {
                assert_eq!(plan.open(m.state()), 0);
                return moved;
            }
            for Move { shard, was, nodes } in moves {
                assert!(apply(m, MetaCommand::Place { shard, was, nodes }));
            }
            let moving: Vec<ShardId> = m.state().groups().filter(|s| m.state().moving(*s).is_some()).collect();
            assert!(moving.len() <= most, "{} at a time", moving.len());
            moved += moving.len();
            for shard in moving {
                let members = m.state().replicas(shard).iter().map(|r| r.id).collect();
                let epoch = m.state().moving(shard).unwrap().epoch;
                assert!(apply(m, MetaCommand::Settled { shard, epoch, members }));
            }
            rounds += 1;
            assert!(rounds < 10_000);
        }
    }

    #[test]
    fn a_plan_grows_and_shrinks_a_cluster_a_few_groups_at_a_time() {
        let mut m = MetaMachine::new(Arc::new(state(3, 64)), LogIndex(1));
        assert_eq!(work_off(&mut m, 4), 0, "nothing to do at first");
        for n in 4..=5 {
            let addrs = NodeAddrs::default();
            apply(
                &mut m,
                MetaCommand::Register { node: NodeId(n), incarnation: Incarnation(n.into()), addrs, max_memory: 0 },
            );
            apply(&mut m, MetaCommand::Approve { node: NodeId(n), approved: true, operator: true });
        }
        let grown = work_off(&mut m, 4);
        assert!((50..=66).contains(&grown), "{grown} groups moved");
        let on = |m: &MetaMachine, s| m.state().replicas(s).iter().map(|r| r.node.0).collect::<Vec<_>>();
        assert_eq!(on(&m, ShardId::META), [1, 2, 3, 4, 5]);
        let mut load = [0; 6];
        (0..64).for_each(|s| on(&m, ShardId(s)).into_iter().for_each(|n| load[n as usize] += 1));
        assert!(load[1..].iter().all(|l| (35..=40).contains(l)), "{load:?}");
        for n in 4..=5 {
            apply(&mut m, MetaCommand::Approve { node: NodeId(n), approved: false, operator: true });
        }
        work_off(&mut m, 4);
        assert!(m.state().groups().all(|s| on(&m, s).iter().all(|n| *n <= 3)));
        assert_eq!(on(&m, ShardId::META), [1, 2, 3]);
        assert_eq!(m.state().check(), Ok(()));
    }

    #[test]
    fn a_group_does_not_leave_for_a_node_that_is_away_and_turns_round_when_it_is_taken_back() {
        let mut m = MetaMachine::new(Arc::new(state(3, 8)), LogIndex(1));
        let addrs = NodeAddrs::default();
        apply(&mut m, MetaCommand::Register { node: NodeId(4), incarnation: Incarnation(4), addrs, max_memory: 0 });
        apply(&mut m, MetaCommand::Approve { node: NodeId(4), approved: true, operator: true });
        let plan = Plan::new(m.state(), None);
        let moves_to_4 = |moves: &[Move]| moves.iter().any(|m| m.nodes.contains(&NodeId(4)));
        assert!(!moves_to_4(&plan.next(m.state(), |n| n != NodeId(4), 8)));
        let moves = plan.next(m.state(), |_| true, 2);
        assert!(moves_to_4(&moves) && moves.len() <= 4);
        for Move { shard, was, nodes } in moves {
            apply(&mut m, MetaCommand::Place { shard, was, nodes });
        }
        let under_way: Vec<ShardId> = m.state().groups().filter(|s| m.state().moving(*s).is_some()).collect();
        assert_eq!(under_way.len(), 2);
        // Left to arrive, and no others begin.
        assert!(plan.next(m.state(), |_| true, 2).iter().all(|m| !m.nodes.contains(&NodeId(4))));
        apply(&mut m, MetaCommand::Approve { node: NodeId(4), approved: false, operator: true });
        assert!(!plan.is_of(m.state()));
        let plan = Plan::new(m.state(), None);
        let back: Vec<ShardId> = plan.next(m.state(), |n| n != NodeId(4), 2).iter().map(|m| m.shard).collect();
        assert!(under_way.iter().all(|s| back.contains(s)), "{back:?} {under_way:?}");
    }

    #[test]
    fn the_meta_group_is_odd_spread_and_stays_where_it_is() {
        let on = |present: &[u64], nodes: &[(u64, Option<&'static str>)]| {
            let present: Vec<NodeId> = present.iter().map(|n| NodeId(*n)).collect();
            let nodes: Vec<_> = nodes.iter().map(|(n, z)| (NodeId(*n), *z)).collect();
            meta_nodes(&present, &nodes).iter().map(|n| n.0).collect::<Vec<_>>()
        };
        let plain = |n: u64| (1..=n).map(|n| (n, None)).collect::<Vec<_>>();
        for (nodes, count) in [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (6, 5), (7, 7), (8, 7), (20, 7)] {
            assert_eq!(on(&[], &plain(nodes)).len(), count, "{nodes} nodes");
        }
        assert_eq!(on(&[2, 3, 4], &plain(4)), [2, 3, 4]);
        assert_eq!(on(&[1, 2, 3], &[(1, Some("a")), (2, Some("a")), (3, Some("b")), (4, Some("c"))]), [1, 3, 4]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn bounds_hold_for_any_ids(
            ids in prop::collection::btree_set(1u64.., 1..=12),
            shards in 1u32..=1024,
            replication in 1u32..=5,
        ) {
            let nodes: Vec<(NodeId, Option<&str>)> = ids.into_iter().map(|n| (NodeId(n), None)).collect();
            let a = assign(shards, replication, &nodes);
            check_bounds(&nodes, shards, replication, &a);
            prop_assert_eq!(a, assign(shards, replication, &nodes));
        }

        #[test]
        fn zones_are_as_even_as_their_sizes_allow(
            zones in prop::collection::vec(0usize..4, 1..=12),
            shards in 1u32..=128,
            replication in 1u32..=5,
        ) {
            const NAMES: [Option<&str>; 4] = [None, Some("a"), Some("b"), Some("c")];
            let nodes: Vec<(NodeId, Option<&str>)> =
                zones.iter().enumerate().map(|(i, z)| (NodeId(i as u64 + 1), NAMES[*z])).collect();
            let size = |z: usize| zones.iter().filter(|y| **y == z).count();
            for set in assign(shards, replication, &nodes) {
                prop_assert_eq!(set.len(), nodes.len().min(replication as usize));
                let mut used = [0usize; 4];
                set.iter().for_each(|n| used[zones[n.0 as usize - 1]] += 1);
                for z in 0..4 {
                    for y in 0..4 {
                        // A zone with two fewer would have taken one, had it a node left.
                        prop_assert!(used[z] <= used[y] + 1 || used[y] == size(y), "{:?} of {:?}", used, zones);
                    }
                }
            }
        }
    }
}
