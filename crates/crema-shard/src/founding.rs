//! Founding a cluster, or finding out that there is one to join.
//!
//! ```text
//!   asking --every reachable node says "none", I am the lowest initial member, all members are here--> proposing
//!   proposing --every initial member accepted--> active: tell all
//!   asking --Propose from the lowest member--> accepted --Found--> active
//!   asking, accepted, proposing --somebody knows a cluster--> joining (or active, if its record names this life)
//! ```
//!
//! Why two clusters cannot come of it. A record is active only after *every* initial member accepted it, and a member
//! accepts a second record only while the first is not active for it, and only from the first one's proposer (which has
//! then dropped the first) or when that proposer is gone; having done so it refuses to activate the first. So if one record is active at a member, every later proposal misses that
//! member's acceptance. Before proposing, every node that can be reached is asked, member or not: one that knows a
//! record turns founding into joining.

use crate::message::Control;
use crate::meta::{MetaState, NodeAddrs};
use crema_core::mutant::{Mutant, planted};
use crema_core::{ClusterUuid, Incarnation, NodeId, WallTime};
use std::collections::{BTreeMap, BTreeSet};

/// What founding needs to know about this node.
#[derive(Clone, Debug)]
pub struct FoundingConfig {
    /// This node.
    pub node: NodeId,
    /// This life.
    pub incarnation: Incarnation,
    /// Own addresses.
    pub addrs: NodeAddrs,
    /// The cluster's name.
    pub cluster: String,
    /// The nodes that found the cluster together, ascending; nobody, where this node only joins.
    pub members: Vec<NodeId>,
    /// The only cluster that this node may join.
    pub uuid: Option<ClusterUuid>,
    /// Shards to found it with.
    pub shards: u32,
    /// Replicas of each.
    pub replication: u32,
    /// Random bits for uuid and secret.
    pub entropy: [u64; 3],
}

/// What founding has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The record is active and names this life: create its replicas.
    Activate(Box<MetaState>),
    /// There is a cluster that does not count on this life: join it as a gateway and register.
    Join(Box<MetaState>),
}

/// Identifies a record in acceptances.
pub fn record_hash(record: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(record)
}

struct Peer {
    incarnation: Incarnation,
    addrs: Option<NodeAddrs>,
    /// Said that it knows no cluster, in this connection.
    knows_none: bool,
}

struct Proposal {
    record: Vec<u8>,
    hash: u64,
    state: MetaState,
    accepted: BTreeSet<NodeId>,
}

struct Accepted {
    hash: u64,
    proposer: NodeId,
    proposer_incarnation: Incarnation,
    state: MetaState,
}

/// The founding protocol of one node, until it has decided.
pub struct Founding {
    config: FoundingConfig,
    peers: BTreeMap<NodeId, Peer>,
    proposal: Option<Proposal>,
    accepted: Option<Accepted>,
    /// Why the last proposal was refused, and whether only an operator can change that.
    refusal: Option<(String, bool)>,
    decided: bool,
}

/// Messages to send, in order.
pub type Sends = Vec<(NodeId, Control)>;

impl Founding {
    /// A node that knows nothing yet.
    pub fn new(config: FoundingConfig) -> Self {
        Founding { config, peers: BTreeMap::new(), proposal: None, accepted: None, refusal: None, decided: false }
    }

    /// Why the cluster is not founded yet, for the operator.
    pub fn waiting_for(&self) -> String {
        if let Some((reason, _)) = &self.refusal {
            return format!("founding refused: {reason}");
        }
        if let Some(uuid) = self.config.uuid {
            return format!("joining: waiting for a node that knows cluster {uuid}");
        }
        if !self.is_member(self.config.node) {
            return "joining: waiting for a node that knows the cluster".into();
        }
        let missing: Vec<String> = self
            .config
            .members
            .iter()
            .filter(|m| **m != self.config.node && !self.peers.contains_key(m))
            .map(|m| m.to_string())
            .collect();
        if missing.is_empty() {
            "founding the cluster".into()
        } else {
            format!("founding: waiting for node {}", missing.join(", "))
        }
    }

    /// A refusal that only an operator can resolve, once.
    pub fn take_lasting_refusal(&mut self) -> Option<String> {
        self.refusal.take_if(|(_, lasting)| *lasting).map(|(reason, _)| reason)
    }

    /// A peer is connected: ask it.
    pub fn peer_up(&mut self, peer: NodeId, incarnation: Incarnation) -> Sends {
        self.peers.insert(peer, Peer { incarnation, addrs: None, knows_none: false });
        vec![(peer, Control::Ask)]
    }

    /// A peer is gone. What it accepted no longer counts: another life of it knows nothing of it.
    pub fn peer_down(&mut self, peer: NodeId) {
        self.peers.remove(&peer);
        if let Some(p) = &mut self.proposal {
            if p.state.nodes.contains_key(&peer) {
                self.proposal = None;
            } else {
                p.accepted.remove(&peer);
            }
        }
    }

    /// Takes a message. `None` in the second place: nothing is decided yet.
    pub fn receive(&mut self, from: NodeId, message: Control, now: WallTime) -> (Sends, Option<Decision>) {
        let Some(peer) = self.peers.get_mut(&from).filter(|_| !self.decided) else {
            // Not connected both ways yet: it will be asked, and will ask, when it is.
            return match message {
                Control::Ask => (vec![(from, self.nothing_known())], None),
                _ => (Vec::new(), None),
            };
        };
        let incarnation = peer.incarnation;
        match message {
            Control::Ask => (vec![(from, self.nothing_known())], None),
            Control::Answer { state: None, addrs } => {
                peer.addrs = Some(addrs);
                peer.knows_none = true;
                self.go_on(now)
            }
            Control::Answer { state: Some(bytes), .. } | Control::Placement { state: bytes } => {
                match MetaState::decode(&bytes) {
                    Ok(state) => (Vec::new(), self.known(state)),
                    Err(_) => (Vec::new(), None),
                }
            }
            Control::Propose { record } => (vec![(from, self.consider(from, incarnation, &record))], None),
            Control::Accept { hash } => {
                if let Some(p) = self.proposal.as_mut().filter(|p| p.hash == hash) {
                    p.accepted.insert(from);
                }
                self.go_on(now)
            }
            Control::Refuse { hash, reason, lasting } => {
                if self.proposal.as_ref().is_some_and(|p| p.hash == hash) {
                    self.proposal = None;
                    self.refusal = Some((format!("node {from}: {reason}"), lasting));
                }
                (Vec::new(), None)
            }
            Control::Found { hash } => match self.accepted.take_if(|a| a.hash == hash && a.proposer == from) {
                Some(a) => (Vec::new(), Some(self.decide(Decision::Activate(Box::new(a.state))))),
                None => (Vec::new(), None),
            },
            // For members of a cluster.
            _ => (Vec::new(), None),
        }
    }

    fn nothing_known(&self) -> Control {
        Control::Answer { state: None, addrs: self.config.addrs.clone() }
    }

    /// Repeats what may have been lost, and founds alone what has one member.
    pub fn tick(&mut self, now: WallTime) -> (Sends, Option<Decision>) {
        if self.decided {
            return (Vec::new(), None);
        }
        let (mut sends, decision) = self.go_on(now);
        if decision.is_none() {
            for (node, peer) in &self.peers {
                // Whoever has accepted may have missed that the record became active; somebody will know.
                if !peer.knows_none || self.accepted.is_some() {
                    sends.push((*node, Control::Ask));
                }
                if let Some(p) = self.proposal.as_ref().filter(|p| self.is_member(*node) && !p.accepted.contains(node))
                {
                    sends.push((*node, Control::Propose { record: p.record.clone() }));
                }
            }
        }
        (sends, decision)
    }

    fn is_member(&self, node: NodeId) -> bool {
        self.config.members.contains(&node)
    }

    fn decide(&mut self, decision: Decision) -> Decision {
        self.decided = true;
        decision
    }

    /// Somebody belongs to a cluster.
    fn known(&mut self, state: MetaState) -> Option<Decision> {
        if state.cluster != self.config.cluster || state.check().is_err() {
            return None;
        }
        if let Some(mine) = self.config.uuid.filter(|mine| *mine != state.uuid) {
            let why = format!("this node belongs to cluster {mine}, and found cluster {} of the same name", state.uuid);
            self.refusal = Some((why, true));
            return None;
        }
        // A record that names this life and is active somewhere was accepted by everyone, us included.
        let accepted = self.accepted.take();
        if let Some(a) = accepted.filter(|a| a.state.uuid == state.uuid) {
            return Some(self.decide(Decision::Activate(Box::new(a.state))));
        }
        Some(self.decide(Decision::Join(Box::new(state))))
    }

    /// Whether to accept a record.
    fn consider(&mut self, from: NodeId, incarnation: Incarnation, record: &[u8]) -> Control {
        let hash = record_hash(record);
        match self.objection(from, incarnation, record) {
            Ok(state) => {
                self.accepted = Some(Accepted { hash, proposer: from, proposer_incarnation: incarnation, state });
                Control::Accept { hash }
            }
            Err((reason, lasting)) => Control::Refuse { hash, reason, lasting },
        }
    }

    /// Why not, and whether only an operator can change that.
    fn objection(&self, from: NodeId, incarnation: Incarnation, record: &[u8]) -> Result<MetaState, (String, bool)> {
        let lasting = |reason: String| (reason, true);
        let passing = |reason: &str| (reason.to_string(), false);
        let state = MetaState::decode(record).map_err(|e| lasting(format!("the record does not decode: {e}")))?;
        state.check().map_err(lasting)?;
        let mine = &self.config;
        if state.cluster != mine.cluster {
            return Err(lasting(format!("my cluster is named {:?}, not {:?}", mine.cluster, state.cluster)));
        }
        let members: Vec<NodeId> = state.nodes.keys().copied().collect();
        if members != mine.members {
            return Err(lasting(format!("my initial members are {:?}, not {members:?}", mine.members)));
        }
        if mine.members.first() != Some(&from) {
            return Err(lasting(format!("node {from} is not the lowest initial member")));
        }
        if state.shards.len() != mine.shards as usize {
            return Err(lasting(format!("I am configured for {} shards, not {}", mine.shards, state.shards.len())));
        }
        if state.nodes.get(&mine.node).map(|n| n.incarnation) != Some(mine.incarnation) {
            return Err(passing("the record names another life of me"));
        }
        if state.nodes.get(&from).map(|n| n.incarnation) != Some(incarnation) {
            return Err(passing("the record names another life of its proposer"));
        }
        if let Some(a) = &self.accepted {
            let alive = self.peers.get(&a.proposer).is_some_and(|p| p.incarnation == a.proposer_incarnation);
            if alive && a.hash != record_hash(record) && a.proposer_incarnation != incarnation {
                return Err(passing("I accepted the record of a proposer that is still alive"));
            }
        }
        Ok(state)
    }

    /// Proposes when all is known, concludes when all have accepted.
    fn go_on(&mut self, now: WallTime) -> (Sends, Option<Decision>) {
        let c = &self.config;
        if c.members.first() != Some(&c.node) {
            return (Vec::new(), None);
        }
        if let Some(p) = &self.proposal {
            let all = c.members.iter().all(|m| *m == c.node || p.accepted.contains(m));
            if !all {
                return (Vec::new(), None);
            }
            let p = self.proposal.take().expect("just seen");
            let sends = self.peers.keys().map(|n| (*n, Control::Found { hash: p.hash })).collect();
            return (sends, Some(self.decide(Decision::Activate(Box::new(p.state)))));
        }
        let here = |m: &NodeId| *m == c.node || self.peers.get(m).is_some_and(|p| p.addrs.is_some());
        let alone = planted(Mutant::FoundAlone) && c.members.iter().all(|m| *m == c.node || self.peers.contains_key(m));
        if !alone && (!c.members.iter().all(here) || self.peers.values().any(|p| !p.knows_none)) {
            return (Vec::new(), None);
        }
        let members: Vec<(NodeId, Incarnation, NodeAddrs)> = c
            .members
            .iter()
            .map(|m| match self.peers.get(m) {
                Some(p) if *m != c.node => (*m, p.incarnation, p.addrs.clone().unwrap_or_default()),
                _ => (*m, c.incarnation, c.addrs.clone()),
            })
            .collect();
        let uuid = ClusterUuid(u128::from(c.entropy[0]) << 64 | u128::from(c.entropy[1]));
        let state = MetaState::found(uuid, c.cluster.clone(), c.entropy[2], now, &members, c.shards, c.replication);
        let record = state.encode();
        let hash = record_hash(&record);
        let others: Vec<NodeId> = c.members.iter().copied().filter(|m| *m != c.node).collect();
        if others.is_empty() {
            return (Vec::new(), Some(self.decide(Decision::Activate(Box::new(state)))));
        }
        let sends: Sends = others.iter().map(|m| (*m, Control::Propose { record: record.clone() })).collect();
        if alone {
            let found = others.iter().map(|m| (*m, Control::Found { hash }));
            let sends = sends.into_iter().chain(found).collect();
            return (sends, Some(self.decide(Decision::Activate(Box::new(state)))));
        }
        self.proposal = Some(Proposal { record, hash, state, accepted: BTreeSet::new() });
        (sends, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    fn config(node: u64, members: &[u64]) -> FoundingConfig {
        FoundingConfig {
            node: NodeId(node),
            incarnation: Incarnation(u128::from(node) * 100),
            addrs: NodeAddrs { raft: format!("127.0.0.1:{}", 9000 + node), ..NodeAddrs::default() },
            cluster: "t".into(),
            uuid: None,
            members: members.iter().map(|n| NodeId(*n)).collect(),
            shards: 4,
            replication: 3,
            entropy: [node, 2, 3],
        }
    }

    /// Nodes with perfect connections; `active` answers like a host that has decided.
    struct Net {
        nodes: BTreeMap<NodeId, Founding>,
        decided: BTreeMap<NodeId, Decision>,
        queue: VecDeque<(NodeId, NodeId, Control)>,
        drop_found_for: Option<NodeId>,
    }

    impl Net {
        fn new(nodes: Vec<Founding>) -> Self {
            let nodes: BTreeMap<_, _> = nodes.into_iter().map(|f| (f.config.node, f)).collect();
            let mut net = Net { nodes, decided: BTreeMap::new(), queue: VecDeque::new(), drop_found_for: None };
            let ids: Vec<NodeId> = net.nodes.keys().copied().collect();
            for a in &ids {
                for b in ids.iter().filter(|b| *b != a) {
                    net.connect(*a, *b);
                }
            }
            net
        }
        fn connect(&mut self, a: NodeId, b: NodeId) {
            let incarnation = self.nodes[&b].config.incarnation;
            let sends = self.nodes.get_mut(&a).unwrap().peer_up(b, incarnation);
            self.queue.extend(sends.into_iter().map(|(to, m)| (a, to, m)));
        }
        fn run(&mut self) {
            while let Some((from, to, m)) = self.queue.pop_front() {
                if matches!(m, Control::Found { .. }) && self.drop_found_for == Some(to) {
                    continue;
                }
                let Some(node) = self.nodes.get_mut(&to) else { continue };
                let (sends, decision) = match self.decided.get(&to) {
                    Some(Decision::Activate(s) | Decision::Join(s)) if m == Control::Ask => {
                        (vec![(from, Control::Answer { state: Some(s.encode()), addrs: NodeAddrs::default() })], None)
                    }
                    Some(_) => (Vec::new(), None),
                    None => node.receive(from, m, WallTime(1)),
                };
                self.queue.extend(sends.into_iter().map(|(t, m)| (to, t, m)));
                if let Some(d) = decision {
                    self.decided.insert(to, d);
                }
            }
        }
        fn tick(&mut self) {
            for (id, node) in &mut self.nodes {
                if self.decided.contains_key(id) {
                    continue;
                }
                let (sends, decision) = node.tick(WallTime(1));
                self.queue.extend(sends.into_iter().map(|(t, m)| (*id, t, m)));
                if let Some(d) = decision {
                    self.decided.insert(*id, d);
                }
            }
            self.run();
        }
    }

    #[test]
    fn three_members_found_one_cluster() {
        let mut net = Net::new((1..=3).map(|n| Founding::new(config(n, &[1, 2, 3]))).collect());
        net.run();
        assert_eq!(net.decided.len(), 3);
        let first = net.decided[&NodeId(1)].clone();
        assert!(matches!(first, Decision::Activate(_)));
        assert!(net.decided.values().all(|d| *d == first), "all activate the same record");
    }

    #[test]
    fn a_member_alone_founds_nothing_and_a_single_one_founds_at_once() {
        let mut alone = Founding::new(config(1, &[1, 2]));
        assert_eq!(alone.tick(WallTime(1)).1, None);
        assert_eq!(alone.waiting_for(), "founding: waiting for node 2");
        let mut single = Founding::new(config(1, &[1]));
        assert!(matches!(single.tick(WallTime(1)).1, Some(Decision::Activate(_))));
    }

    #[test]
    fn a_restarted_founder_joins_what_it_founded() {
        let mut net = Net::new((1..=3).map(|n| Founding::new(config(n, &[1, 2, 3]))).collect());
        net.run();
        let mut again = config(1, &[1, 2, 3]);
        again.incarnation = Incarnation(7);
        again.entropy = [9, 9, 9];
        net.decided.remove(&NodeId(1));
        net.nodes.insert(NodeId(1), Founding::new(again));
        net.connect(NodeId(1), NodeId(2));
        net.connect(NodeId(1), NodeId(3));
        net.run();
        net.tick();
        assert!(matches!(&net.decided[&NodeId(1)], Decision::Join(s) if s.uuid == ClusterUuid(1 << 64 | 2)));
    }

    #[test]
    fn a_member_that_missed_the_end_of_founding_asks_until_it_knows() {
        let mut net = Net::new((1..=3).map(|n| Founding::new(config(n, &[1, 2, 3]))).collect());
        net.drop_found_for = Some(NodeId(3));
        net.run();
        assert_eq!(net.decided.len(), 2, "node 3 has accepted and heard nothing more");
        // The founder is gone for good; node 2 had told node 3 before that it knew of nothing.
        net.nodes.remove(&NodeId(1));
        net.decided.remove(&NodeId(1));
        net.nodes.get_mut(&NodeId(3)).unwrap().peer_down(NodeId(1));
        net.tick();
        assert_eq!(net.decided[&NodeId(3)], net.decided[&NodeId(2)]);
    }

    #[test]
    fn a_node_outside_the_members_is_asked_too() {
        let mut net = Net::new((1..=2).map(|n| Founding::new(config(n, &[1, 2]))).collect());
        net.run();
        // Both members restart with nothing; only the gateway that joined remembers.
        let Decision::Activate(state) = net.decided[&NodeId(1)].clone() else { panic!("active") };
        let mut f = Vec::new();
        for n in 1..=2 {
            let mut c = config(n, &[1, 2]);
            c.incarnation = Incarnation(50 + u128::from(n));
            f.push(Founding::new(c));
        }
        f.push(Founding::new(config(9, &[1, 2])));
        let mut net = Net::new(f);
        net.decided.insert(NodeId(9), Decision::Join(state.clone()));
        net.run();
        net.tick();
        for n in [1, 2] {
            assert!(matches!(&net.decided[&NodeId(n)], Decision::Join(s) if s.uuid == state.uuid), "node {n}");
        }
    }

    #[test]
    fn a_member_does_not_accept_two_living_proposers() {
        let mut member = Founding::new(config(2, &[1, 2]));
        let record = |inc: u128, entropy: u64| {
            let mut c = config(1, &[1, 2]);
            c.incarnation = Incarnation(inc);
            let members =
                [(NodeId(1), c.incarnation, c.addrs.clone()), (NodeId(2), Incarnation(200), NodeAddrs::default())];
            MetaState::found(ClusterUuid(entropy.into()), "t".into(), 1, WallTime(1), &members, 4, 3).encode()
        };
        member.peer_up(NodeId(1), Incarnation(100));
        let first = record(100, 1);
        let (sends, _) = member.receive(NodeId(1), Control::Propose { record: first.clone() }, WallTime(1));
        assert!(matches!(sends[0].1, Control::Accept { .. }));
        // The proposer is replaced by another life: the old record may be given up, and is then never activated.
        member.peer_down(NodeId(1));
        member.peer_up(NodeId(1), Incarnation(101));
        let (sends, _) = member.receive(NodeId(1), Control::Propose { record: record(101, 2) }, WallTime(1));
        assert!(matches!(sends[0].1, Control::Accept { .. }));
        let (_, decision) = member.receive(NodeId(1), Control::Found { hash: record_hash(&first) }, WallTime(1));
        assert_eq!(decision, None, "the first record is dead for this member");
    }

    #[test]
    fn misfits_are_refused_with_a_reason() {
        let mut net = Net::new(vec![
            Founding::new(config(1, &[1, 2])),
            Founding::new(FoundingConfig { shards: 8, ..config(2, &[1, 2]) }),
        ]);
        net.run();
        assert!(net.decided.is_empty());
        assert!(net.nodes[&NodeId(1)].waiting_for().contains("8 shards"));
    }
}
