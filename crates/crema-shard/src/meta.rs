//! The meta group's state: the cluster's own table, and the commands that change it.
//!
//! ```text
//!   found ----> MetaState ----encode----> founding record, placement for nodes without a replica
//!                  ^                        \--decode--> check --> believed
//!   MetaCommand --encode--> meta group's log --MetaMachine::apply
//! ```
//!
//! `apply` is total and depends on nothing but the state and the entry: what the state does not allow changes nothing.
//! The bounds here keep an encoded table below [`MAX_STATE_BYTES`] for ever, whatever is registered.

use crate::placement::{MAX_SHARDS, arcs, assign, meta_nodes};
use crema_core::{
    ClusterUuid, CodecError, CorruptEntry, Epoch, Incarnation, LogIndex, NodeId, ReplicaId, SLOT_COUNT, ShardId,
    SlotRange, Term, WallTime,
};
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

/// Most bytes of an encoded [`MetaState`].
pub const MAX_STATE_BYTES: usize = 8 * 1024 * 1024;
/// Most nodes that the table knows, gateways included; further ones are not registered.
pub const MAX_NODES: usize = 1024;
/// Most replicas of one group, the meta group included.
pub const MAX_REPLICAS: usize = 7;
/// Longest address in bytes: a host name of the domain name system and a port.
pub const MAX_ADDR_BYTES: usize = 260;
/// Longest cluster name in bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest name of a zone in bytes.
pub const MAX_ZONE_BYTES: usize = 256;
/// How much of a node's memory is for keys and values: so many parts of so many. A sixteenth is the logs'; what
/// remains is for buffers, for states in transit, and for what an allocator cannot give back.
pub const DATA_PARTS: (u64, u64) = (3, 4);
/// All of a node's memory, as [`MetaState::budgets`] is told.
pub const WHOLE_SHARE: u8 = 64;
/// Highest epoch that is believed of a peer: far beyond any reachable one, and far from overflow.
const MAX_EPOCH: Epoch = Epoch(1 << 62);
/// Highest index and term of a group's beginning that is believed of a peer, likewise.
const MAX_BEGINNING: u64 = 1 << 60;
/// First byte of an encoded state.
const STATE_VERSION: u8 = 3;
/// First byte of an encoded command.
const COMMAND_VERSION: u8 = 2;

/// Where a node is: how it is reached, and what it fails together with. Host and port as text: a name may resolve
/// differently for others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddrs {
    /// Peers connect here.
    pub raft: String,
    /// RESP, proxying every command; absent on an embedded node without it.
    pub redis: Option<String>,
    /// RESP, answering MOVED.
    pub redis_cluster: Option<String>,
    /// HTTP admin API.
    pub http: Option<String>,
    /// Its zone: no shard has two replicas in one while there are enough of them. Nodes without one are a zone together.
    pub zone: Option<String>,
}

impl NodeAddrs {
    /// Whether the addresses can be registered; the error says what is wrong. Ask before proposing
    /// [`MetaCommand::Register`]: apply ignores addresses that break a bound.
    pub fn check(&self) -> Result<(), String> {
        let Self { raft, redis, redis_cluster, http, zone } = self;
        let all = [
            ("raft", Some(raft)),
            ("redis", redis.as_ref()),
            ("redis cluster", redis_cluster.as_ref()),
            ("http", http.as_ref()),
        ];
        for (what, addr) in all {
            if addr.is_some_and(|a| a.len() > MAX_ADDR_BYTES) {
                return Err(format!("the {what} address is longer than {MAX_ADDR_BYTES} bytes"));
            }
        }
        if zone.as_ref().is_some_and(|z| z.len() > MAX_ZONE_BYTES) {
            return Err(format!("the zone is longer than {MAX_ZONE_BYTES} bytes"));
        }
        Ok(())
    }
}

/// What the cluster has decided about one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The life that counts.
    pub incarnation: Incarnation,
    /// Earlier lives, newest last, at most [`MAX_PAST_INCARNATIONS`]: fenced.
    #[serde(deserialize_with = "bounded_vec::<_, _, MAX_PAST_INCARNATIONS>")]
    pub past: Vec<Incarnation>,
    /// Its addresses as it registered them.
    pub addrs: NodeAddrs,
    /// Whether it may hold replicas.
    pub approved: bool,
    /// Whether an operator has taken that away: nothing automatic gives it back.
    pub declined: bool,
    /// Whether this life is about to stop: it leads nothing and is given nothing.
    pub draining: bool,
    /// Most bytes of memory that it may use, as it registered them; 0 for no limit, or not known yet.
    pub max_memory: u64,
}

impl NodeRecord {
    /// Of a node that nobody has decided anything about.
    fn new(incarnation: Incarnation) -> Self {
        NodeRecord {
            incarnation,
            past: Vec::new(),
            addrs: NodeAddrs::default(),
            approved: false,
            declined: false,
            draining: false,
            max_memory: 0,
        }
    }

    /// Its life is over, and fenced.
    fn end_life(&mut self) {
        if self.incarnation == NO_LIFE {
            return;
        }
        if self.past.len() >= MAX_PAST_INCARNATIONS {
            self.past.remove(0);
        }
        self.past.push(self.incarnation);
        self.incarnation = NO_LIFE;
    }
}

/// In the place of a life that an operator has declared over, until the node begins another.
pub const NO_LIFE: Incarnation = Incarnation(0);

/// How many earlier incarnations of a node are remembered; older ones are forgotten, and no longer fenced.
pub const MAX_PAST_INCARNATIONS: usize = 64;

/// One replica as placement wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaPlacement {
    /// Its id, also in Raft.
    pub id: ReplicaId,
    /// The node that holds it.
    pub node: NodeId,
    /// The life of the node whose memory it lives in; with another incarnation it is lost.
    pub incarnation: Incarnation,
}

/// Where a group begins that was founded anew, since it had lost its majority; see [`crate::recovery`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refounded {
    /// The one replica that began it, with what it had of the group before. All ids of that one are lower.
    pub founder: ReplicaId,
    /// The index of its beginning: above all of the group before, so that no session of that one is taken for one of this.
    pub index: LogIndex,
    /// The term of its beginning: above all of the group before, so that no claim to lead that one outlives it.
    pub term: Term,
}

impl Refounded {
    /// A beginning above `index` and `term`, the highest known of the group before, and above its own beginning. Leaves
    /// room for what nobody knows any more: 2^44 entries and 2^20 terms.
    pub fn beyond(founder: ReplicaId, index: LogIndex, term: Term, before: Option<Refounded>) -> Refounded {
        let above = |known: u64, begun: u64, bits: u32| (known.max(begun) >> bits).saturating_add(1) << bits;
        let (begun, first) = before.map_or((0, 0), |b| (b.index.0, b.term.0));
        Refounded { founder, index: LogIndex(above(index.0, begun, 44)), term: Term(above(term.0, first, 20)) }
    }
}

/// A group that shall be founded anew, as whoever took the census proposes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refounding {
    /// The group.
    pub shard: ShardId,
    /// Its placement epoch as of the census: void once placement has changed.
    pub epoch: Epoch,
    /// The node whose replica begins it.
    pub founder: NodeId,
    /// Highest index that is known of it.
    pub index: LogIndex,
    /// Highest term that is known of it.
    pub term: Term,
}

/// What the last recovery of the meta group came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// Wall time of the node that was asked for it.
    pub at: WallTime,
    /// Whether nothing was left of the cluster, so that all previous contents are lost.
    pub anew: bool,
    /// Drawn at random: tells two recoveries to one generation apart, which there must never be.
    pub mark: u64,
}

/// A group on its way to other nodes: which of its replicas go. Cleared when its leader has no other members any more than
/// placement wants.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// Replicas that are members until others have taken their places, and are kept until then.
    #[serde(deserialize_with = "bounded_vec::<_, _, MAX_LEAVING>")]
    pub leaving: Vec<ReplicaPlacement>,
    /// Epoch of the decision, which tells it apart from an earlier one of the same content.
    pub epoch: Epoch,
}

/// Most replicas of a group that leave at a time: a move that would make it more has to wait.
pub const MAX_LEAVING: usize = MAX_REPLICAS;
/// Most groups that move at a time.
pub const MAX_MOVING: usize = 1024;

/// One shard as placement wants it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPlacement {
    /// The slots it owns.
    pub range: SlotRange,
    /// Epoch of its last change.
    pub epoch: Epoch,
    /// Its replicas in the order in which they are wanted as leaders.
    #[serde(deserialize_with = "bounded_vec::<_, _, MAX_REPLICAS>")]
    pub replicas: Vec<ReplicaPlacement>,
    /// Where it begins, if it was founded anew.
    pub refounded: Option<Refounded>,
    /// Whether its members are still becoming what `replicas` says.
    pub moving: Option<Moving>,
}

/// The cluster's own table; also the record that founds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaState {
    /// Identity for ever.
    pub uuid: ClusterUuid,
    /// The cluster's name, as configured.
    pub cluster: String,
    /// Seed of the key hash: SCAN cursors survive a change of leader, and outsiders cannot aim collisions.
    pub secret: u64,
    /// Wall time of the founder: where log time begins.
    pub founded_at: WallTime,
    /// Raised when the meta group itself is recovered; upper half of replica ids.
    pub generation: u32,
    /// Counter of the next replica id.
    pub next_replica: u32,
    /// Grows with every change of placement.
    pub epoch: Epoch,
    /// Behaviour version that all members support and the operator has finalised.
    pub cluster_version: u32,
    /// Replicas of each data shard that are wanted, 1 to [`MAX_REPLICAS`]; with fewer approved nodes there is one on each.
    pub replication: u32,
    /// Nodes by id.
    #[serde(deserialize_with = "bounded_map::<_, _, _, MAX_NODES>")]
    pub nodes: BTreeMap<NodeId, NodeRecord>,
    /// Data shards; the index is the shard id.
    #[serde(deserialize_with = "bounded_vec::<_, _, { MAX_SHARDS as usize }>")]
    pub shards: Vec<ShardPlacement>,
    /// The meta group's own replicas.
    #[serde(deserialize_with = "bounded_vec::<_, _, MAX_REPLICAS>")]
    pub meta: Vec<ReplicaPlacement>,
    /// Whether the meta group's members are still becoming that.
    pub meta_moving: Option<Moving>,
    /// Where the meta group begins, if it was founded anew.
    pub meta_refounded: Option<Refounded>,
    /// How this generation came about, if it is not the first.
    pub recovery: Option<Recovery>,
}

impl MetaState {
    /// The record of a new cluster: generation 1, epoch 1, behaviour version 1, replica ids counted from 1, every member
    /// approved. Each shard gets `replication` replicas, or one a member if there are fewer; the meta group as
    /// [`meta_nodes`] says. Ids of a group ascend in the order of preference.
    ///
    /// Texts are taken as they are: [`MetaState::check`] says whether others would accept the record.
    ///
    /// # Panics
    ///
    /// If there is no member, `shards` is not 1 to 16,384 or `replication` is not 1 to [`MAX_REPLICAS`]; the shell
    /// validates its configuration before.
    pub fn found(
        uuid: ClusterUuid,
        cluster: String,
        secret: u64,
        founded_at: WallTime,
        members: &[(NodeId, Incarnation, NodeAddrs)],
        shards: u32,
        replication: u32,
    ) -> MetaState {
        assert!(!members.is_empty(), "a cluster has a member");
        let most = MAX_REPLICAS as u32;
        assert!((1..=most).contains(&replication), "{replication} replicas; 1 to {most} are possible");
        let nodes: BTreeMap<NodeId, NodeRecord> = members
            .iter()
            .map(|(id, incarnation, addrs)| {
                let (incarnation, addrs) = (*incarnation, addrs.clone());
                (*id, NodeRecord { addrs, approved: true, ..NodeRecord::new(incarnation) })
            })
            .collect();
        let generation = 1;
        let mut next_replica = 1;
        let mut place = |node: NodeId| {
            let id = ReplicaId::new(generation, next_replica);
            next_replica += 1;
            ReplicaPlacement { id, node, incarnation: nodes[&node].incarnation }
        };
        let hosts: Vec<(NodeId, Option<&str>)> = nodes.iter().map(|(n, r)| (*n, r.addrs.zone.as_deref())).collect();
        let meta = meta_nodes(&[], &hosts).into_iter().map(&mut place).collect();
        let epoch = Epoch(1);
        let shards = arcs(shards)
            .into_iter()
            .zip(assign(shards, replication, &hosts))
            .map(|(range, on)| ShardPlacement {
                range,
                epoch,
                replicas: on.into_iter().map(&mut place).collect(),
                refounded: None,
                moving: None,
            })
            .collect();
        MetaState {
            uuid,
            cluster,
            secret,
            founded_at,
            generation,
            next_replica,
            epoch,
            cluster_version: 1,
            replication,
            nodes,
            shards,
            meta,
            meta_moving: None,
            meta_refounded: None,
            recovery: None,
        }
    }

    /// Whether a table that came from a peer holds together; the error says what does not. Nothing else may be done
    /// with a table that fails: other code relies on all of this.
    pub fn check(&self) -> Result<(), String> {
        let ensure = |ok: bool, what: &dyn Fn() -> String| if ok { Ok(()) } else { Err(what()) };
        ensure(self.cluster.len() <= MAX_NAME_BYTES, &|| {
            format!("the cluster's name is longer than {MAX_NAME_BYTES} bytes")
        })?;
        ensure(self.generation >= 1, &|| "the generation is 0".into())?;
        ensure(self.cluster_version >= 1, &|| "the cluster version is 0".into())?;
        ensure((Epoch(1)..=MAX_EPOCH).contains(&self.epoch), &|| format!("epoch {} is out of range", self.epoch))?;
        ensure((1..=MAX_NODES).contains(&self.nodes.len()), &|| format!("{} nodes", self.nodes.len()))?;
        for (id, node) in &self.nodes {
            ensure(id.0 != 0, &|| "a node has id 0".into())?;
            node.addrs.check().map_err(|e| format!("node {id}: {e}"))?;
            ensure(node.past.len() <= MAX_PAST_INCARNATIONS, &|| {
                format!("node {id} has {} earlier lives", node.past.len())
            })?;
            let lives: BTreeSet<_> = node.past.iter().chain([&node.incarnation]).collect();
            ensure(lives.len() == node.past.len() + 1, &|| format!("node {id} has one life twice"))?;
        }
        ensure((1..=MAX_SHARDS as usize).contains(&self.shards.len()), &|| format!("{} shards", self.shards.len()))?;
        let mut ids = BTreeSet::new();
        ensure((1..=MAX_REPLICAS as u32).contains(&self.replication), &|| {
            format!("{} replicas are wanted of each shard", self.replication)
        })?;
        self.check_group("the meta group", &self.meta, self.meta_moving.as_ref(), &mut ids)?;
        let mut end = 0;
        for (i, shard) in self.shards.iter().enumerate() {
            ensure(shard.range.start == end && !shard.range.is_empty(), &|| {
                format!(
                    "shard {i} owns slots {}..{} where the one before ends at {end}",
                    shard.range.start, shard.range.end
                )
            })?;
            end = shard.range.end;
            ensure((Epoch(1)..=self.epoch).contains(&shard.epoch), &|| {
                format!("shard {i} has epoch {} in a table of epoch {}", shard.epoch, self.epoch)
            })?;
            self.check_group(&format!("shard {i}"), &shard.replicas, shard.moving.as_ref(), &mut ids)?;
            self.check_beginning(&format!("shard {i}"), shard.refounded)?;
        }
        self.check_beginning("the meta group", self.meta_refounded)?;
        let moving = self.groups().filter(|s| self.moving(*s).is_some()).count();
        ensure(moving <= MAX_MOVING, &|| format!("{moving} groups move"))?;
        ensure(end == SLOT_COUNT, &|| format!("the shards end at slot {end} of {SLOT_COUNT}"))
    }

    fn check_beginning(&self, group: &str, begins: Option<Refounded>) -> Result<(), String> {
        let sound = |b: &Refounded| {
            let bounds = (1..=MAX_BEGINNING).contains(&b.index.0) && (1..=MAX_BEGINNING).contains(&b.term.0);
            bounds && self.was_given(b.founder)
        };
        match begins {
            Some(b) if !sound(&b) => Err(format!("{group} begins where it cannot: {b:?}")),
            _ => Ok(()),
        }
    }

    /// Whether this table or an earlier one has given the id away.
    pub fn was_given(&self, id: ReplicaId) -> bool {
        let (generation, counter) = ((id.0 >> 32) as u32, id.0 as u32);
        let given = generation < self.generation || generation == self.generation && counter < self.next_replica;
        generation != 0 && counter != 0 && given
    }

    /// Checks one group's replicas; `ids` collects those of all groups, none of which may occur twice.
    fn check_group(
        &self,
        group: &str,
        replicas: &[ReplicaPlacement],
        moving: Option<&Moving>,
        ids: &mut BTreeSet<ReplicaId>,
    ) -> Result<(), String> {
        if !(1..=MAX_REPLICAS).contains(&replicas.len()) {
            return Err(format!("{group} has {} replicas", replicas.len()));
        }
        let leaving = moving.map_or(&[][..], |m| &m.leaving);
        if leaving.len() > MAX_LEAVING {
            return Err(format!("{group} has {} replicas that leave", leaving.len()));
        }
        for (i, r) in replicas.iter().chain(leaving).enumerate() {
            if !self.was_given(r.id) {
                return Err(format!("{group} has replica {:#x}, an id that was never given", r.id.0));
            }
            if !ids.insert(r.id) {
                return Err(format!("{group} has replica {:#x}, which occurs twice", r.id.0));
            }
            let Some(node) = self.nodes.get(&r.node) else {
                return Err(format!("{group} has a replica on node {}, which does not exist", r.node));
            };
            // Lives may have been forgotten once the list of them is full.
            let known = node.incarnation == r.incarnation || node.past.contains(&r.incarnation);
            if !known && node.past.len() < MAX_PAST_INCARNATIONS {
                return Err(format!("{group} has a replica in a life of node {} that never was", r.node));
            }
            // One that leaves may be followed by another on the same node.
            if i < replicas.len() && replicas[..i].iter().any(|other| other.node == r.node) {
                return Err(format!("{group} has two replicas on node {}", r.node));
            }
        }
        Ok(())
    }

    /// The table as bytes: a version, then postcard. Equal tables have equal bytes.
    pub fn encode(&self) -> Vec<u8> {
        encode(STATE_VERSION, self)
    }

    /// Reads what [`MetaState::encode`] wrote. The bounds of every list hold in the result; whether the table makes
    /// sense is [`MetaState::check`]'s question. Allocates at most a small multiple of the input.
    pub fn decode(bytes: &[u8]) -> Result<MetaState, CodecError> {
        if bytes.len() > MAX_STATE_BYTES {
            return Err(CodecError::TooLarge);
        }
        decode(STATE_VERSION, bytes)
    }

    /// Gives a group new replicas in the places of the old ones, all of them with new ids: the founder's is the lowest, since
    /// ids of a group ascend in the order of coming. Part of a change: the epoch is raised already. Returns whether there were ids and indexes
    /// enough; else nothing has changed.
    fn refound_group(&mut self, g: &Refounding) -> bool {
        let placed: Vec<NodeId> = self.replicas(g.shard).iter().map(|r| r.node).collect();
        let others = placed.iter().copied().filter(|n| *n != g.founder);
        let on: Vec<NodeId> = std::iter::once(g.founder).chain(others).take(placed.len().max(1)).collect();
        let Some(after) = self.next_replica.checked_add(on.len() as u32) else { return false };
        // What somebody has made up may be beyond all that others would believe.
        if g.index.0.max(g.term.0) >= MAX_BEGINNING / 2 {
            return false;
        }
        let (generation, first) = (self.generation, self.next_replica);
        let place = |(node, counter): (&NodeId, u32)| {
            let incarnation = self.nodes.get(node).map_or(NO_LIFE, |n| n.incarnation);
            ReplicaPlacement { id: ReplicaId::new(generation, counter), node: *node, incarnation }
        };
        let mut replicas: Vec<ReplicaPlacement> = on.iter().zip(first..).map(place).collect();
        let founder = replicas[0].id;
        // Whoever should lead should lead still: or else the founder of many would lead them all.
        replicas.sort_by_key(|r| placed.iter().position(|n| *n == r.node));
        self.next_replica = after;
        let refounded = Refounded::beyond(founder, g.index, g.term, self.refounded(g.shard));
        let epoch = self.epoch;
        match self.shards.get_mut(g.shard.0 as usize) {
            Some(shard) => {
                (shard.replicas, shard.refounded, shard.epoch) = (replicas, Some(refounded), epoch);
                shard.moving = None;
            }
            None => (self.meta, self.meta_refounded, self.meta_moving) = (replicas, Some(refounded), None),
        }
        true
    }

    /// The table of the next generation, which recovers the meta group, or what is left of a cluster without one: this
    /// one, with the lives and addresses of the nodes that take part, without those that are `stopped`, and with `groups`
    /// founded anew, which the meta group must be among. Its epoch is beyond `epoch`, the highest known.
    ///
    /// # Errors
    /// A sentence: the table cannot hold that.
    pub fn recovered(
        &self,
        nodes: &[(NodeId, Incarnation, NodeAddrs, u64)],
        stopped: &[(NodeId, Incarnation)],
        groups: &[Refounding],
        epoch: Epoch,
        recovery: Recovery,
    ) -> Result<MetaState, String> {
        let generation = self.generation.checked_add(1).ok_or("there are no generations left")?;
        // Later generations have higher epochs, even if nobody knows those before any more.
        let least = u64::from(generation) << 32;
        let epoch = Epoch(epoch.max(self.epoch).0.saturating_add(1 << 32).max(least));
        let begin = MetaState { generation, next_replica: 1, epoch, recovery: Some(recovery), ..self.clone() };
        // The same rules as by the log; its indexes are of no account.
        let mut machine = MetaMachine::new(Arc::new(begin), LogIndex(0));
        for (node, incarnation, addrs, max_memory) in nodes {
            machine.register(*node, *incarnation, addrs.clone(), *max_memory);
        }
        machine.refound(&[], stopped);
        let mut state = Arc::unwrap_or_clone(machine.state);
        state.epoch = epoch;
        for shard in &mut state.shards {
            shard.epoch = shard.epoch.min(epoch);
        }
        // Beginnings count up with the generations, too: a table that was active at its proposer alone may be lost with it.
        let before = u64::from(generation - 1);
        for group in groups {
            let index = group.index.max(LogIndex(before << 44));
            let term = group.term.max(Term(before << 20));
            if !state.refound_group(&Refounding { index, term, ..*group }) {
                return Err("there are no replica ids or indexes left".to_owned());
            }
        }
        state.check()?;
        Ok(state)
    }

    /// The placement of a shard, the meta group included.
    pub fn replicas(&self, shard: ShardId) -> &[ReplicaPlacement] {
        if shard.is_meta() { &self.meta } else { self.shards.get(shard.0 as usize).map_or(&[], |s| &s.replicas) }
    }

    /// Whether a group's members are still becoming what placement says, and what goes then.
    pub fn moving(&self, shard: ShardId) -> Option<&Moving> {
        if shard.is_meta() {
            self.meta_moving.as_ref()
        } else {
            self.shards.get(shard.0 as usize).and_then(|s| s.moving.as_ref())
        }
    }

    /// A group's replicas that others are about to take the places of.
    pub fn leaving(&self, shard: ShardId) -> &[ReplicaPlacement] {
        self.moving(shard).map_or(&[], |m| &m.leaving)
    }

    /// The nodes that may hold replicas, with their zones.
    pub fn approved(&self) -> Vec<(NodeId, Option<&str>)> {
        let approved = self.nodes.iter().filter(|(_, r)| r.approved);
        approved.map(|(id, r)| (*id, r.addrs.zone.as_deref())).collect()
    }

    /// All groups, the meta group last.
    pub fn groups(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.shards.len() as u32).map(ShardId).chain([ShardId::META])
    }

    /// Where a group begins, if it was founded anew.
    pub fn refounded(&self, shard: ShardId) -> Option<Refounded> {
        if shard.is_meta() { self.meta_refounded } else { self.shards.get(shard.0 as usize).and_then(|s| s.refounded) }
    }

    /// What orders tables: of two, the later generation counts, whatever their epochs.
    pub fn version(&self) -> (u32, Epoch) {
        (self.generation, self.epoch)
    }

    /// Epoch of the last change of a group's placement; the table's own for the meta group.
    pub fn epoch_of(&self, shard: ShardId) -> Epoch {
        self.shards.get(shard.0 as usize).map_or(self.epoch, |s| s.epoch)
    }

    /// Most bytes that each data shard's keys and values may take, 0 for no limit: the least share of the nodes that hold
    /// it. A node's shares are [`DATA_PARTS`] of its memory together; the rest is for logs, buffers and states in transit.
    /// `share_of` says how much of its memory a node can use for data at present, in parts of [`WHOLE_SHARE`].
    pub fn budgets(&self, share_of: impl Fn(NodeId) -> u8) -> Vec<u64> {
        let mut held: BTreeMap<NodeId, u64> = BTreeMap::new();
        for s in &self.shards {
            for r in s.replicas.iter().chain(s.moving.iter().flat_map(|m| &m.leaving)) {
                *held.entry(r.node).or_default() += 1;
            }
        }
        let share = |node: &NodeId| {
            let limit = self.nodes.get(node).map_or(0, |n| n.max_memory);
            let part = u64::from(share_of(*node).clamp(1, WHOLE_SHARE));
            let data = limit / DATA_PARTS.1 * DATA_PARTS.0 / u64::from(WHOLE_SHARE) * part;
            (limit > 0).then(|| (data / held[node]).max(1))
        };
        let holders = |s: &ShardPlacement| {
            let leaving = s.moving.iter().flat_map(|m| &m.leaving);
            s.replicas.iter().chain(leaving).filter_map(|r| share(&r.node)).min()
        };
        self.shards.iter().map(|s| holders(s).unwrap_or(0)).collect()
    }

    /// Whether the life of the node that the replica lives in is the one that counts. If not, the replica is lost.
    pub fn replica_is_present(&self, replica: &ReplicaPlacement) -> bool {
        self.nodes.get(&replica.node).is_some_and(|n| n.incarnation == replica.incarnation)
    }

    /// For "16 shards at 2 of 3 replicas": how many data shards have lost replicas, how many replicas the worst of all
    /// data shards still has, and how many that one should have. Without losses the first number is 0.
    pub fn underreplicated(&self) -> (usize, usize, usize) {
        let counts = self.shards.iter().map(|s| {
            let present = s.replicas.iter().filter(|r| self.replica_is_present(r)).count();
            (present, s.replicas.len())
        });
        let missing = counts.clone().filter(|(present, wanted)| present < wanted).count();
        let (present, wanted) =
            counts.min_by_key(|(present, wanted)| (*present, std::cmp::Reverse(*wanted))).unwrap_or_default();
        (missing, present, wanted)
    }
}

/// A change of the table: the payload of an entry in the meta group's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaCommand {
    /// This life of the node counts from now on, and is reached here.
    Register {
        /// The node; an unknown one becomes a gateway that is not approved to hold replicas.
        node: NodeId,
        /// The life that begins, or goes on with other addresses. One that was replaced before never comes back.
        incarnation: Incarnation,
        /// Where it is reached; [`NodeAddrs::check`] must accept it.
        addrs: NodeAddrs,
        /// Most bytes of memory that it may use, 0 for no limit.
        max_memory: u64,
    },
    /// The node is about to stop, or has changed its mind.
    SetDraining {
        /// The node.
        node: NodeId,
        /// Only if this life counts at present.
        incarnation: Incarnation,
        /// Which of both.
        draining: bool,
    },
    /// Groups have lost their majorities, and the operator gives up what is lost with them.
    Refound {
        /// Those groups.
        #[serde(deserialize_with = "bounded_vec::<_, _, { MAX_SHARDS as usize }>")]
        groups: Vec<Refounding>,
        /// Lives that are over by the operator's word: their nodes do not answer and shall never speak for them again.
        #[serde(deserialize_with = "bounded_vec::<_, _, MAX_NODES>")]
        stopped: Vec<(NodeId, Incarnation)>,
    },
    /// A node may hold replicas from now on, or no longer. What it holds moves away by [`MetaCommand::Place`].
    Approve {
        /// The node; unknown ones are left alone.
        node: NodeId,
        /// Which of both. The last approved node stays one.
        approved: bool,
        /// Whether an operator says so: what one has taken away nothing automatic gives back.
        operator: bool,
    },
    /// A group's replicas shall be on these nodes.
    Place {
        /// The group.
        shard: ShardId,
        /// Its replicas by placement as of the decision: void once they are others.
        #[serde(deserialize_with = "bounded_vec::<_, _, MAX_REPLICAS>")]
        was: Vec<ReplicaId>,
        /// Approved nodes, in the order in which they are wanted as leaders.
        #[serde(deserialize_with = "bounded_vec::<_, _, MAX_REPLICAS>")]
        nodes: Vec<NodeId>,
    },
    /// A group's members are what placement says, by its leader's word: what leaves has left.
    Settled {
        /// The group.
        shard: ShardId,
        /// [`Moving::epoch`] of what it has settled to: void after any later decision.
        epoch: Epoch,
        /// Its members: void unless placement says the same.
        #[serde(deserialize_with = "bounded_vec::<_, _, MAX_REPLICAS>")]
        members: Vec<ReplicaId>,
    },
}

impl MetaCommand {
    /// The command as an entry's payload, never empty: a version, then postcard.
    pub fn encode(&self) -> Vec<u8> {
        encode(COMMAND_VERSION, self)
    }

    /// Reads what [`MetaCommand::encode`] wrote.
    pub fn decode(payload: &[u8]) -> Result<MetaCommand, CodecError> {
        decode(COMMAND_VERSION, payload)
    }
}

/// The meta group's state machine. Its state is shared with readers and copied only when a command changes it while
/// they still hold it.
#[derive(Clone, Debug)]
pub struct MetaMachine {
    state: Arc<MetaState>,
    applied: LogIndex,
    /// Computed when first asked for: a large table takes a while to encode.
    digest: OnceLock<u64>,
}

impl MetaMachine {
    /// A machine whose state is that after the entry `applied`.
    pub fn new(state: Arc<MetaState>, applied: LogIndex) -> Self {
        MetaMachine { state, applied, digest: OnceLock::new() }
    }

    /// The table as of [`MetaMachine::applied`].
    pub fn state(&self) -> &Arc<MetaState> {
        &self.state
    }

    /// Index of the last applied entry.
    pub fn applied(&self) -> LogIndex {
        self.applied
    }

    /// Hash of the whole table: replicas that have applied the same entries have the same.
    pub fn digest(&self) -> u64 {
        *self.digest.get_or_init(|| xxhash_rust::xxh3::xxh3_64(&self.state.encode()))
    }

    /// Applies the next committed entry and says whether the table changed; every change raises its epoch. An empty
    /// payload, as a new leader writes it, and a command that the state does not allow only move the applied index.
    ///
    /// After an error nothing has changed and the replica must stop: the entry is not the next one, or is in no format
    /// known here.
    pub fn apply(&mut self, index: LogIndex, payload: &[u8]) -> Result<bool, CorruptEntry> {
        let corrupt = |reason: String| CorruptEntry { index: index.0, reason };
        if self.applied.0.checked_add(1) != Some(index.0) {
            return Err(corrupt(format!("entry {} was applied last", self.applied)));
        }
        let command = match payload {
            [] => None,
            _ => Some(MetaCommand::decode(payload).map_err(|e| corrupt(e.to_string()))?),
        };
        let changed = match command {
            Some(MetaCommand::Register { node, incarnation, addrs, max_memory }) => {
                self.register(node, incarnation, addrs, max_memory)
            }
            Some(MetaCommand::SetDraining { node, incarnation, draining }) => {
                self.set_draining(node, incarnation, draining)
            }
            Some(MetaCommand::Refound { groups, stopped }) => self.refound(&groups, &stopped),
            Some(MetaCommand::Approve { node, approved, operator }) => self.approve(node, approved, operator),
            Some(MetaCommand::Place { shard, was, nodes }) => self.place(shard, &was, &nodes),
            Some(MetaCommand::Settled { shard, epoch, members }) => self.settled(shard, epoch, members),
            None => false,
        };
        self.applied = index;
        Ok(changed)
    }

    /// A new life of a node takes the places of the one before it: its replicas get new ids, since what they were in
    /// was its memory.
    fn register(&mut self, node: NodeId, incarnation: Incarnation, addrs: NodeAddrs, max_memory: u64) -> bool {
        if node.0 == 0 || incarnation == NO_LIFE || addrs.check().is_err() {
            return false;
        }
        match self.state.nodes.get(&node) {
            None if self.state.nodes.len() >= MAX_NODES => return false,
            Some(known)
                if known.incarnation == incarnation && known.addrs == addrs && known.max_memory == max_memory =>
            {
                return false;
            }
            Some(known) if known.past.contains(&incarnation) => return false,
            _ => {}
        }
        let record = self.change().nodes.entry(node).or_insert_with(|| NodeRecord::new(incarnation));
        record.addrs = addrs;
        record.max_memory = max_memory;
        if record.incarnation != incarnation {
            record.end_life();
            record.incarnation = incarnation;
            record.draining = false;
            self.replace_replicas(node, incarnation, |_| true);
        }
        true
    }

    /// Gives the replicas of `node` that `which` names new ids in this life. Part of a change: the epoch is raised already.
    fn replace_replicas(&mut self, node: NodeId, incarnation: Incarnation, which: impl Fn(ReplicaId) -> bool) {
        let state = Arc::make_mut(&mut self.state);
        let (epoch, generation) = (state.epoch, state.generation);
        let next = &mut state.next_replica;
        let mut replace = |replicas: &mut Vec<ReplicaPlacement>| {
            let Some(old) = replicas.iter_mut().find(|r| r.node == node && which(r.id)) else { return false };
            // After four thousand million replicas of one generation there are no ids left; the replica stays lost.
            let Some(after) = next.checked_add(1) else { return false };
            *old = ReplicaPlacement { id: ReplicaId::new(generation, *next), node, incarnation };
            *next = after;
            true
        };
        // The meta group's first: it has to outlive the others.
        replace(&mut state.meta);
        for shard in &mut state.shards {
            if replace(&mut shard.replicas) {
                shard.epoch = epoch;
            }
        }
    }

    /// Founds groups anew. What placement has changed since the census is left alone.
    fn refound(&mut self, groups: &[Refounding], stopped: &[(NodeId, Incarnation)]) -> bool {
        let counts = |s: &MetaState, node, life| s.nodes.get(&node).is_some_and(|n| n.incarnation == life);
        let stopped: Vec<_> = stopped.iter().filter(|(node, life)| counts(&self.state, *node, *life)).collect();
        let valid = |g: &&Refounding| {
            let lives = self.state.nodes.get(&g.founder).is_some_and(|n| n.incarnation != NO_LIFE);
            let stops = stopped.iter().any(|(node, _)| *node == g.founder);
            let known = self.state.shards.get(g.shard.0 as usize);
            lives && !stops && known.is_some_and(|s| s.epoch == g.epoch)
        };
        let groups: Vec<Refounding> = groups.iter().filter(valid).copied().collect();
        if groups.is_empty() && stopped.is_empty() {
            return false;
        }
        let state = self.change();
        for (node, _) in stopped {
            if let Some(record) = state.nodes.get_mut(node) {
                record.end_life();
            }
        }
        for group in &groups {
            state.refound_group(group);
        }
        true
    }

    fn approve(&mut self, node: NodeId, approved: bool, operator: bool) -> bool {
        let Some(record) = self.state.nodes.get(&node) else { return false };
        let declined = if approved { false } else { operator || record.declined };
        let last = record.approved && !approved && self.state.approved().len() == 1;
        if last || (record.approved == approved && record.declined == declined) {
            return false;
        }
        if let Some(record) = self.change().nodes.get_mut(&node) {
            (record.approved, record.declined) = (approved, declined);
        }
        true
    }

    /// Changes the intent of one group. Replicas that stay keep their ids, as do those that were about to leave and shall
    /// stay after all; others get new ones. What is not wanted any more leaves.
    fn place(&mut self, shard: ShardId, was: &[ReplicaId], nodes: &[NodeId]) -> bool {
        let state = &*self.state;
        let present = state.replicas(shard);
        let distinct: BTreeSet<_> = nodes.iter().collect();
        let usable = |n: &NodeId| state.nodes.get(n).is_some_and(|r| r.approved && r.incarnation != NO_LIFE);
        let sound = (1..=MAX_REPLICAS).contains(&nodes.len()) && distinct.len() == nodes.len();
        let as_decided = present.iter().map(|r| r.id).eq(was.iter().copied());
        if !sound || !as_decided || present.is_empty() || !nodes.iter().all(usable) {
            return false;
        }
        let known: Vec<ReplicaPlacement> = present.iter().chain(state.leaving(shard)).copied().collect();
        let mut next = state.next_replica;
        let mut replicas = Vec::with_capacity(nodes.len());
        for node in nodes {
            let incarnation = state.nodes[node].incarnation;
            // The first: one that is wanted now comes before one that leaves.
            let kept = known.iter().find(|r| r.node == *node && r.incarnation == incarnation).copied();
            let Some(after) = (if kept.is_some() { Some(next) } else { next.checked_add(1) }) else { return false };
            let id = ReplicaId::new(state.generation, next);
            replicas.push(kept.unwrap_or(ReplicaPlacement { id, node: *node, incarnation }));
            next = after;
        }
        // What is lost with its life needs not to be kept.
        let gone = |r: &&ReplicaPlacement| state.replica_is_present(r) && replicas.iter().all(|kept| kept.id != r.id);
        let leaving: Vec<ReplicaPlacement> = known.iter().filter(gone).copied().collect();
        let many = || state.groups().filter(|s| state.moving(*s).is_some()).count() >= MAX_MOVING;
        if present == replicas || leaving.len() > MAX_LEAVING || (state.moving(shard).is_none() && many()) {
            return false;
        }
        // Only another order, which needs no members to change.
        let only_turned = present.len() == replicas.len() && present.iter().all(|r| replicas.contains(r));
        let moves = !only_turned || state.moving(shard).is_some();
        let state = self.change();
        state.next_replica = next;
        let epoch = state.epoch;
        let moving = moves.then_some(Moving { leaving, epoch });
        match state.shards.get_mut(shard.0 as usize) {
            Some(s) => (s.replicas, s.moving, s.epoch) = (replicas, moving, epoch),
            None => (state.meta, state.meta_moving) = (replicas, moving),
        }
        true
    }

    fn settled(&mut self, shard: ShardId, epoch: Epoch, mut members: Vec<ReplicaId>) -> bool {
        members.sort_unstable();
        let mut wanted: Vec<ReplicaId> = self.state.replicas(shard).iter().map(|r| r.id).collect();
        wanted.sort_unstable();
        if members != wanted || self.state.moving(shard).is_none_or(|m| m.epoch != epoch) {
            return false;
        }
        let state = self.change();
        match state.shards.get_mut(shard.0 as usize) {
            Some(s) => s.moving = None,
            None => state.meta_moving = None,
        }
        true
    }

    fn set_draining(&mut self, node: NodeId, incarnation: Incarnation, draining: bool) -> bool {
        if !self.state.nodes.get(&node).is_some_and(|n| n.incarnation == incarnation && n.draining != draining) {
            return false;
        }
        if let Some(record) = self.change().nodes.get_mut(&node) {
            record.draining = draining;
        }
        true
    }

    /// The state for a change, which has to follow: the epoch is raised and the digest forgotten.
    fn change(&mut self) -> &mut MetaState {
        self.digest = OnceLock::new();
        let state = Arc::make_mut(&mut self.state);
        state.epoch.0 += 1;
        state
    }
}

fn encode<T: Serialize>(version: u8, value: &T) -> Vec<u8> {
    postcard::to_extend(value, vec![version]).expect("derived serializers of plain data do not fail")
}

fn decode<'a, T: Deserialize<'a>>(known: u8, bytes: &'a [u8]) -> Result<T, CodecError> {
    match bytes {
        [] => Err(CodecError::Malformed),
        [version, ..] if *version != known => Err(CodecError::UnknownVersion(*version)),
        [_, rest @ ..] => match postcard::take_from_bytes(rest) {
            Ok((value, [])) => Ok(value),
            _ => Err(CodecError::Malformed),
        },
    }
}

/// Reads a list of at most `MAX` elements. Without the bound, a few bytes an element would become many in memory.
pub(crate) fn bounded_vec<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MAX: usize>(
    from: D,
) -> Result<Vec<T>, D::Error> {
    struct Bounded<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {MAX} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = seq.next_element()? {
                if list.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                list.push(element);
            }
            Ok(list)
        }
    }

    from.deserialize_seq(Bounded::<T, MAX>(PhantomData))
}

/// Reads a map of at most `MAX` entries whose keys ascend, as ours are written: so one table has one encoding.
fn bounded_map<'de, D, K, V, const MAX: usize>(from: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + Ord,
    V: Deserialize<'de>,
{
    struct Bounded<K, V, const MAX: usize>(PhantomData<(K, V)>);

    impl<'de, K: Deserialize<'de> + Ord, V: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<K, V, MAX> {
        type Value = BTreeMap<K, V>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {MAX} entries, ascending")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<BTreeMap<K, V>, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = entries.next_entry()? {
                if map.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                if map.last_key_value().is_some_and(|(last, _)| *last >= key) {
                    return Err(A::Error::custom("keys do not ascend"));
                }
                map.insert(key, value);
            }
            Ok(map)
        }
    }

    from.deserialize_map(Bounded::<K, V, MAX>(PhantomData))
}

#[cfg(test)]
mod tests;
