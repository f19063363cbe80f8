//! The membership state machine: from what chitchat shows at one moment to members and their events.
//!
//! ```text
//!                    alive                    chitchat-dead             `dead_ticks` on time
//!   (unknown) ------- Join ------> Alive ----------------------> Suspect ---- Failed ----> Dead
//!                                    ^  <------------------------   |                        |
//!                                    |            alive             |                        |
//!                                    +--- Join (alive again) -------|------------------------+
//!                                    |                              v                        v
//!                                    +--- Join (a new life) ------ Left <---- Leave ---------+
//! ```
//!
//! Input is the full snapshot each time, never a delta, so that a lost or repeated notification changes nothing. One node id
//! may stand in a snapshot several times, once per life (*generation*); the highest generation that was ever alive or has
//! left counts, and the view never goes back to a lower one. A life that was never seen alive is not listed: chitchat also
//! shows joiners and old remains as dead.
//!
//! A stalled observer must not blame others for its own silence: after a tick that comes too late, nobody is declared dead
//! for three on-time ticks, and ticks that do not count do not bring anybody nearer to death either. An observer whose
//! every tick is late suspects, but never buries.
//!
//! No clock here: time is an argument.

use crate::keys::NodeMeta;
use crema_core::{Incarnation, MonoTime, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A tick is late if more than this many intervals have passed since the one before.
pub const LATE_INTERVALS: u32 = 3;
/// On-time ticks that must follow a late one before anybody is declared dead.
pub const CLEAN_TICKS: u32 = 3;
/// Most nodes that the view holds; further ones are ignored and counted. Chitchat's digest must fit one
/// datagram, which ends at about as many.
pub const MAX_MEMBERS: usize = 2_048;
/// Ticks in which two lives of a node must both advance to be called a conflict. Heartbeats of an ended life still arrive
/// over slow peers for a few rounds after its successor has come up.
pub const CONFLICT_TICKS: u32 = 8;

/// How a member stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemberState {
    /// It is heard.
    Alive,
    /// It has been silent for long; it may be dead or cut off.
    Suspect,
    /// It stayed silent: taken as failed.
    Dead,
    /// It said goodbye. Final for this life of the node.
    Left,
}

impl MemberState {
    /// Whether the node is taken as part of the cluster: alive or merely suspected.
    pub fn is_present(self) -> bool {
        matches!(self, MemberState::Alive | MemberState::Suspect)
    }
}

/// A node that was alive at some time, as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// What it says about itself.
    pub meta: NodeMeta,
    /// How it stands.
    pub state: MemberState,
}

/// A transition of one node. For every node they form the sequence Join, any number of Updates, then Leave, Failed, or Failed
/// and Leave; then Join again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberEvent {
    /// The node is alive: for the first time, or again after it was dead or had left.
    Join {
        /// The node.
        node: NodeId,
        /// `host:port` of its raft listener.
        raft_addr: String,
    },
    /// The node said goodbye, perhaps after it had been taken as failed.
    Leave {
        /// The node.
        node: NodeId,
    },
    /// The node was silent for too long.
    Failed {
        /// The node.
        node: NodeId,
    },
    /// The node is reached elsewhere from now on.
    Update {
        /// The node.
        node: NodeId,
        /// The new `host:port` of its raft listener.
        raft_addr: String,
    },
}

impl MemberEvent {
    /// The node that it is about.
    pub fn node(&self) -> NodeId {
        match self {
            MemberEvent::Join { node, .. }
            | MemberEvent::Leave { node }
            | MemberEvent::Failed { node }
            | MemberEvent::Update { node, .. } => *node,
        }
    }
}

/// Two processes run under one node id. One of them must be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The id.
    pub node: NodeId,
    /// The life that is ignored.
    pub lower: u64,
    /// The life that counts.
    pub higher: u64,
}

/// One life of a node as chitchat shows it.
#[derive(Clone, Debug)]
pub struct Observed {
    /// What it says about itself.
    pub meta: NodeMeta,
    /// Which life: unix nanoseconds of its start.
    pub generation: u64,
    /// Whether chitchat's failure detector takes it as alive.
    pub chitchat_alive: bool,
    /// Whether it has said goodbye.
    pub left: bool,
    /// How often its heartbeat was seen to advance; only growth matters.
    pub beats: u64,
}

/// What a snapshot has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ViewStep {
    /// Transitions; at most one for a node.
    pub events: Vec<MemberEvent>,
    /// Members of which anything changed, state or meta.
    pub changed: Vec<Member>,
    /// Nodes whose life ended: dead, left, or begun anew. What the ended life claimed is void.
    pub gone: Vec<NodeId>,
    /// Nodes that are members no more, not even dead ones. What happened to them was told before.
    pub forgotten: Vec<NodeId>,
    /// Duplicate node ids, once for each pair of lives.
    pub conflicts: Vec<Conflict>,
}

/// What the view must know about its own node.
#[derive(Clone, Copy, Debug)]
pub struct ViewConfig {
    /// This node; always alive to itself.
    pub this: NodeId,
    /// The generation of this process.
    pub generation: u64,
    /// Period of ticks.
    pub interval: Duration,
    /// On-time ticks after which a suspect is taken as dead, from 1 on.
    pub dead_ticks: u32,
}

#[derive(Debug)]
struct Entry {
    member: Member,
    generation: u64,
    /// On-time ticks since it became suspect.
    silent_ticks: u32,
}

/// A second life of a node that is heard besides the one that counts.
#[derive(Debug)]
struct Rival {
    generation: u64,
    beats: u64,
    main_beats: u64,
    ticks: u32,
    reported: bool,
}

/// The members as this node sees them.
#[derive(Debug)]
pub struct View {
    config: ViewConfig,
    entries: BTreeMap<NodeId, Entry>,
    rivals: BTreeMap<NodeId, Rival>,
    last_tick: Option<MonoTime>,
    /// On-time ticks still to come before ticks count again.
    clean_ticks_due: u32,
    refused: u64,
    superseded_by: Option<u64>,
    overtaken_by: Option<Incarnation>,
    /// The highest life under the own id that was reported as a conflict.
    conflicting: Option<u64>,
}

impl View {
    /// A view that knows nobody.
    pub fn new(config: ViewConfig) -> Self {
        View {
            config,
            entries: BTreeMap::new(),
            rivals: BTreeMap::new(),
            last_tick: None,
            clean_ticks_due: 0,
            refused: 0,
            superseded_by: None,
            overtaken_by: None,
            conflicting: None,
        }
    }

    /// Takes a snapshot at one of the regular ticks, which alone bring suspects nearer to death.
    pub fn tick(&mut self, now: MonoTime, snapshot: &[Observed]) -> ViewStep {
        let late = self.last_tick.is_some_and(|last| now.since(last) > self.config.interval * LATE_INTERVALS);
        self.last_tick = Some(now);
        let counts = if late {
            self.clean_ticks_due = CLEAN_TICKS;
            false
        } else if self.clean_ticks_due > 0 {
            self.clean_ticks_due -= 1;
            false
        } else {
            true
        };
        let mut step = self.take(snapshot, counts);
        step.conflicts = self.find_conflicts(snapshot);
        step
    }

    /// Takes a snapshot between ticks, because something has arrived.
    pub fn observe(&mut self, snapshot: &[Observed]) -> ViewStep {
        self.take(snapshot, false)
    }

    /// All members by ascending id, this node included.
    pub fn members(&self) -> Vec<Member> {
        self.entries.values().map(|e| e.member.clone()).collect()
    }

    /// The life that counts and how it stands; `None` for a node that was never alive here.
    pub fn standing(&self, node: NodeId) -> Option<(u64, MemberState)> {
        self.entries.get(&node).map(|e| (e.generation, e.member.state))
    }

    /// Nodes that were ignored because [`MAX_MEMBERS`] are known, counted once a snapshot.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// The highest generation above the own one that was seen under this node's own id. One that is only remembered counts as
    /// well: whoever has seen it alive ignores this life.
    pub fn superseded_by(&self) -> Option<u64> {
        self.superseded_by
    }

    /// The life that is heard at present under this node's own id with a higher generation: another process runs, and counts.
    pub fn overtaken_by(&self) -> Option<Incarnation> {
        self.overtaken_by
    }

    fn take(&mut self, snapshot: &[Observed], counts: bool) -> ViewStep {
        let mut rows: BTreeMap<NodeId, Vec<&Observed>> = BTreeMap::new();
        for row in snapshot {
            rows.entry(row.meta.node_id).or_default().push(row);
        }
        let nodes: BTreeSet<NodeId> = rows.keys().chain(self.entries.keys()).copied().collect();
        let mut step = ViewStep::default();
        for node in nodes {
            let row = rows.get(&node).and_then(|lives| self.life_that_counts(node, lives));
            self.take_one(node, row, counts, &mut step);
        }
        step
    }

    fn life_that_counts<'a>(&self, node: NodeId, lives: &[&'a Observed]) -> Option<&'a Observed> {
        let known = self.entries.get(&node).map(|e| e.generation);
        let lives = lives.iter().copied().filter(|life| {
            if node == self.config.this {
                return life.generation == self.config.generation;
            }
            // A newer life counts once it has shown a sign of its own; before, it may be the trace of a failed start.
            let shown = life.chitchat_alive || life.left;
            known.map_or(shown, |known| life.generation == known || (life.generation > known && shown))
        });
        // The same life under two addresses is one whose address was corrected too late; any fixed choice will do.
        lives.max_by_key(|life| (life.generation, life.left, life.chitchat_alive, life.meta.gossip_addr))
    }

    fn take_one(&mut self, node: NodeId, row: Option<&Observed>, counts: bool, step: &mut ViewStep) {
        let myself = node == self.config.this;
        let Some(entry) = self.entries.get_mut(&node) else {
            let Some(row) = row else { return };
            // No Failed or Leave before a first Join. (A life that has left may still be heard for a while.)
            if !myself && (row.left || !row.chitchat_alive) {
                return;
            }
            if self.entries.len() >= MAX_MEMBERS {
                self.refused += 1;
                return;
            }
            let member = Member { meta: row.meta.clone(), state: MemberState::Alive };
            step.events.push(MemberEvent::Join { node, raft_addr: member.meta.raft_addr.clone() });
            step.changed.push(member.clone());
            self.entries.insert(node, Entry { member, generation: row.generation, silent_ticks: 0 });
            return;
        };
        if myself {
            if let Some(row) = row.filter(|row| row.meta != entry.member.meta) {
                entry.member.meta = row.meta.clone();
                step.changed.push(entry.member.clone());
            }
            return;
        }

        use MemberState::{Alive, Dead, Left, Suspect};
        let was = entry.member.state;
        let newer = row.is_some_and(|row| row.generation > entry.generation);
        let heard = row.is_some_and(|row| row.chitchat_alive);
        let next = match was {
            _ if row.is_some_and(|row| row.left) => Left,
            Left if !newer => Left,
            _ if heard => Alive,
            Alive => Suspect,
            Suspect => {
                entry.silent_ticks += u32::from(counts);
                if counts && entry.silent_ticks >= self.config.dead_ticks { Dead } else { Suspect }
            }
            Dead | Left => was,
        };
        // Chitchat has forgotten the node, and all there was to say about it has been said.
        if row.is_none() && matches!(next, Dead | Left) && was == next {
            self.entries.remove(&node);
            step.forgotten.push(node);
            return;
        }
        if next != Suspect || was != Suspect {
            entry.silent_ticks = 0;
        }

        let before = entry.member.clone();
        entry.member.state = next;
        if let Some(row) = row {
            entry.generation = row.generation;
            if entry.member.meta != row.meta {
                entry.member.meta = row.meta.clone();
            }
        }
        let raft_addr = &entry.member.meta.raft_addr;
        let event = match (was, next) {
            (Alive | Suspect | Dead, Left) => Some(MemberEvent::Leave { node }),
            (Suspect, Dead) => Some(MemberEvent::Failed { node }),
            (Dead | Left, Alive) => Some(MemberEvent::Join { node, raft_addr: raft_addr.clone() }),
            (Alive | Suspect, Alive | Suspect) if *raft_addr != before.meta.raft_addr => {
                Some(MemberEvent::Update { node, raft_addr: raft_addr.clone() })
            }
            _ => None,
        };
        step.events.extend(event);
        if was.is_present() && (newer || !next.is_present()) {
            step.gone.push(node);
        }
        if entry.member != before {
            step.changed.push(entry.member.clone());
        }
    }

    /// Compares, for every node, the life that counts with the highest other one that is heard too.
    fn find_conflicts(&mut self, snapshot: &[Observed]) -> Vec<Conflict> {
        let mut found = Vec::new();
        let above = snapshot
            .iter()
            .filter(|row| row.meta.node_id == self.config.this && row.generation > self.config.generation);
        self.superseded_by = self.superseded_by.max(above.clone().map(|row| row.generation).max());
        let heard = above.filter(|row| row.chitchat_alive).max_by_key(|row| row.generation);
        self.overtaken_by = heard.map(|row| row.meta.incarnation);
        let mut heard: BTreeMap<NodeId, (u64, u64)> = BTreeMap::new();
        let mut main_beats: BTreeMap<NodeId, u64> = BTreeMap::new();
        for row in snapshot.iter().filter(|row| row.chitchat_alive) {
            let node = row.meta.node_id;
            let Some(entry) = self.entries.get(&node) else {
                continue;
            };
            if row.generation == entry.generation {
                main_beats.insert(node, row.beats);
            } else {
                let best = heard.entry(node).or_insert((row.generation, row.beats));
                *best = (*best).max((row.generation, row.beats));
            }
        }
        self.rivals.retain(|node, _| heard.contains_key(node));
        for (node, (generation, beats)) in heard {
            let Some(&main) = main_beats.get(&node) else {
                continue;
            };
            let own = self.config.generation;
            if node == self.config.this && generation > own {
                // A later process took over this id: no need to watch for long, it is alive and it is not this one.
                if self.conflicting < Some(generation) {
                    self.conflicting = Some(generation);
                    found.push(Conflict { node, lower: own, higher: generation });
                }
                continue;
            }
            let fresh = Rival { generation, beats, main_beats: main, ticks: 0, reported: false };
            let rival = self.rivals.entry(node).or_insert(fresh);
            if rival.generation != generation {
                *rival = Rival { generation, beats, main_beats: main, ticks: 0, reported: false };
            }
            if beats > rival.beats && main > rival.main_beats {
                rival.ticks += 1;
                (rival.beats, rival.main_beats) = (beats, main);
            }
            if rival.ticks >= CONFLICT_TICKS && !rival.reported {
                rival.reported = true;
                let counted = self.entries[&node].generation;
                found.push(Conflict { node, lower: generation.min(counted), higher: generation.max(counted) });
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    const INTERVAL: Duration = Duration::from_millis(250);
    const DEAD_TICKS: u32 = 20;

    struct Bench {
        view: View,
        now: MonoTime,
    }

    impl Bench {
        fn new() -> Self {
            let config = ViewConfig { this: NodeId(1), generation: 100, interval: INTERVAL, dead_ticks: DEAD_TICKS };
            Bench { view: View::new(config), now: MonoTime(0) }
        }
        fn tick(&mut self, rows: &[Observed]) -> ViewStep {
            self.tick_after(INTERVAL, rows)
        }
        fn tick_after(&mut self, pause: Duration, rows: &[Observed]) -> ViewStep {
            self.now = self.now.after(pause);
            self.view.tick(self.now, rows)
        }
        fn state(&self, node: u64) -> Option<MemberState> {
            self.view.standing(NodeId(node)).map(|(_, state)| state)
        }
        fn fail(&mut self, row: &Observed) {
            let silent = Observed { chitchat_alive: false, ..row.clone() };
            let mut events = Vec::new();
            for _ in 0..=DEAD_TICKS {
                events.extend(self.tick(std::slice::from_ref(&silent)).events);
            }
            assert_eq!(events, [MemberEvent::Failed { node: row.meta.node_id }]);
        }
    }

    fn row(node: u64, generation: u64) -> Observed {
        Observed {
            meta: NodeMeta {
                node_id: NodeId(node),
                incarnation: Incarnation(generation.into()),
                raft_addr: format!("host-{node}:9001"),
                redis_addr: None,
                redis_cluster_addr: None,
                http_addr: None,
                gossip_addr: ([10, 0, 0, node as u8], 8001).into(),
                metadata: BTreeMap::new(),
            },
            generation,
            chitchat_alive: true,
            left: false,
            beats: 0,
        }
    }
    fn silent(mut row: Observed) -> Observed {
        row.chitchat_alive = false;
        row
    }
    fn left(mut row: Observed) -> Observed {
        row.left = true;
        row
    }
    fn moved(mut row: Observed) -> Observed {
        row.meta.raft_addr = "elsewhere:1".into();
        row
    }
    fn join(node: u64) -> MemberEvent {
        MemberEvent::Join { node: NodeId(node), raft_addr: format!("host-{node}:9001") }
    }
    fn leave(node: u64) -> MemberEvent {
        MemberEvent::Leave { node: NodeId(node) }
    }

    #[test]
    fn joins_suspects_recovers_and_dies_after_its_on_time_ticks() {
        let mut b = Bench::new();
        assert_eq!(b.tick(&[row(2, 5)]).events, [join(2)]);
        assert_eq!(b.tick(&[row(2, 5)]), ViewStep::default());
        let step = b.tick(&[silent(row(2, 5))]);
        assert_eq!((step.events.len(), step.gone.len(), step.changed.len()), (0, 0, 1));
        assert_eq!(b.state(2), Some(MemberState::Suspect));
        assert_eq!(b.tick(&[row(2, 5)]).events, []);
        assert_eq!(b.state(2), Some(MemberState::Alive));
        b.tick(&[silent(row(2, 5))]);
        for tick in 1..DEAD_TICKS {
            assert_eq!(b.tick(&[silent(row(2, 5))]), ViewStep::default(), "tick {tick}");
            assert_eq!(b.view.observe(&[silent(row(2, 5))]), ViewStep::default());
        }
        let step = b.tick(&[silent(row(2, 5))]);
        assert_eq!(step.events, [MemberEvent::Failed { node: NodeId(2) }]);
        assert_eq!(step.gone, [NodeId(2)]);
        assert_eq!(b.state(2), Some(MemberState::Dead));
        assert_eq!(b.tick(&[row(2, 5)]).events, [join(2)]);
    }

    #[test]
    fn who_was_never_alive_is_not_listed_and_never_fails() {
        let mut b = Bench::new();
        for _ in 0..50 {
            assert_eq!(b.tick(&[silent(row(2, 5)), left(row(3, 5)), silent(left(row(4, 5)))]), ViewStep::default());
        }
        assert!(b.view.members().is_empty());
        assert_eq!(b.tick(&[row(2, 5)]).events, [join(2)]);
    }

    #[test]
    fn left_is_sticky_for_the_generation_and_overrides_dead() {
        let mut b = Bench::new();
        b.tick(&[row(2, 5)]);
        let step = b.tick(&[left(row(2, 5))]);
        assert_eq!((step.events, step.gone), (vec![leave(2)], vec![NodeId(2)]));
        // Chitchat still hears it, forgets its goodbye after a reset, or calls it dead: nothing changes.
        for again in [row(2, 5), left(row(2, 5)), silent(row(2, 5))] {
            assert_eq!(b.tick(&[again]).events, []);
            assert_eq!(b.state(2), Some(MemberState::Left));
        }
        assert_eq!(b.tick(&[row(2, 6)]).events, [join(2)]);
        b.fail(&row(2, 6));
        let step = b.tick(&[silent(left(row(2, 6)))]);
        assert_eq!((step.events, step.gone), (vec![leave(2)], vec![]));
        assert_eq!(b.state(2), Some(MemberState::Left));
    }

    #[test]
    fn a_restart_is_an_update_if_the_address_changed_and_otherwise_nothing() {
        let mut b = Bench::new();
        b.tick(&[row(2, 5)]);
        // The newer life shows up before it is alive: the old one still counts.
        assert_eq!(b.tick(&[row(2, 5), silent(row(2, 6))]), ViewStep::default());
        let step = b.tick(&[row(2, 5), row(2, 6)]);
        assert_eq!((step.events.len(), step.gone), (0, vec![NodeId(2)]));
        assert_eq!(b.view.standing(NodeId(2)), Some((6, MemberState::Alive)));
        // The old life is never heard again, whatever it says.
        assert_eq!(b.tick(&[left(moved(row(2, 5))), row(2, 6)]), ViewStep::default());
        b.tick(&[silent(row(2, 6))]);
        let step = b.tick(&[moved(row(2, 7))]);
        assert_eq!(step.events, [MemberEvent::Update { node: NodeId(2), raft_addr: "elsewhere:1".into() }]);
        // After a death, the new life joins at its new place.
        b.fail(&moved(row(2, 7)));
        assert_eq!(b.tick(&[row(2, 8)]).events, [join(2)]);
        // It leaves and a new life has left too before it was seen: nothing more to say.
        assert_eq!(b.tick(&[left(row(2, 8))]).events, [leave(2)]);
        assert_eq!(b.tick(&[left(row(2, 9))]).events, []);
    }

    #[test]
    fn other_changes_of_the_meta_are_no_event() {
        let mut b = Bench::new();
        b.tick(&[row(2, 5)]);
        let mut zoned = row(2, 5);
        zoned.meta.metadata.insert("zone".into(), "a".into());
        let step = b.tick(&[zoned]);
        assert_eq!((step.events.len(), step.gone.len(), step.changed.len()), (0, 0, 1));
        assert_eq!(b.view.members()[0].meta.metadata["zone"], "a");
    }

    #[test]
    fn a_late_tick_suspends_death_for_three_clean_ticks() {
        let mut b = Bench::new();
        b.tick(&[row(2, 5)]);
        for _ in 0..DEAD_TICKS {
            assert_eq!(b.tick(&[silent(row(2, 5))]).events, []);
        }
        // One more tick would be death. The observer stalls instead.
        for _ in 0..5 {
            assert_eq!(b.tick_after(INTERVAL * 3 + Duration::from_nanos(1), &[silent(row(2, 5))]).events, []);
        }
        for _ in 0..CLEAN_TICKS {
            assert_eq!(b.tick(&[silent(row(2, 5))]).events, []);
        }
        assert_eq!(b.tick(&[silent(row(2, 5))]).events, [MemberEvent::Failed { node: NodeId(2) }]);
    }

    #[test]
    fn three_intervals_are_on_time() {
        let mut b = Bench::new();
        b.tick(&[row(2, 5)]);
        b.tick(&[silent(row(2, 5))]);
        let mut events = Vec::new();
        for _ in 0..DEAD_TICKS {
            events.extend(b.tick_after(INTERVAL * 3, &[silent(row(2, 5))]).events);
        }
        assert_eq!(events.len(), 1);
    }

    #[test]
    fn whom_chitchat_has_forgotten_dies_if_unburied_and_is_dropped() {
        let mut b = Bench::new();
        b.tick(&[row(2, 5), row(3, 5)]);
        b.tick(&[row(2, 5), left(row(3, 5))]);
        let (mut events, mut gone, mut forgotten) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..=DEAD_TICKS {
            let step = b.tick(&[]);
            events.extend(step.events);
            gone.extend(step.gone);
            forgotten.extend(step.forgotten);
        }
        assert_eq!(events, [MemberEvent::Failed { node: NodeId(2) }]);
        assert_eq!((gone, forgotten), (vec![NodeId(2)], vec![NodeId(3)]));
        assert_eq!(b.state(3), None);
        // That it is dropped is no event: its failure was.
        assert_eq!(b.tick(&[]), ViewStep { forgotten: vec![NodeId(2)], ..ViewStep::default() });
        assert_eq!(b.state(2), None);
        assert_eq!(b.tick(&[]), ViewStep::default());
    }

    #[test]
    fn this_node_is_always_alive_to_itself() {
        let mut b = Bench::new();
        assert_eq!(b.tick(&[silent(row(1, 100))]).events, [join(1)]);
        for other in [vec![], vec![left(row(1, 100))], vec![left(row(1, 200))], vec![row(1, 50)]] {
            assert_eq!(b.tick(&other).events, []);
            assert_eq!(b.view.standing(NodeId(1)), Some((100, MemberState::Alive)));
        }
    }

    #[test]
    fn two_lives_that_both_advance_are_a_conflict_once() {
        let mut b = Bench::new();
        let beating = |generation, beats| Observed { beats, ..row(2, generation) };
        let mut conflicts = Vec::new();
        // An ordinary restart: the old heartbeat arrives for some rounds.
        for i in 0..30 {
            conflicts.extend(b.tick(&[beating(5, i.min(4)), beating(6, i)]).conflicts);
        }
        assert_eq!(conflicts, []);
        for i in 0..30 {
            conflicts.extend(b.tick(&[beating(5, 10 + i), beating(6, 40 + i)]).conflicts);
        }
        assert_eq!(conflicts, [Conflict { node: NodeId(2), lower: 5, higher: 6 }]);
    }

    #[test]
    fn a_later_process_with_this_nodes_id_is_seen() {
        let mut b = Bench::new();
        b.tick(&[row(1, 100), row(1, 50), silent(row(2, 300))]);
        assert_eq!(b.view.superseded_by(), None);
        // Silent it is no other process, but peers may have seen it alive and ignore this one for it.
        assert_eq!(b.tick(&[row(1, 100), silent(row(1, 200))]).conflicts, []);
        assert_eq!((b.view.superseded_by(), b.view.overtaken_by()), (Some(200), None));
        let conflict = Conflict { node: NodeId(1), lower: 100, higher: 200 };
        assert_eq!(b.tick(&[row(1, 100), row(1, 200)]).conflicts, [conflict]);
        assert_eq!(b.view.overtaken_by(), Some(row(1, 200).meta.incarnation));
        assert_eq!(b.tick(&[row(1, 100), row(1, 200)]).conflicts, []);
        assert_eq!(b.tick(&[row(1, 100)]).conflicts, []);
        assert_eq!(b.view.superseded_by(), Some(200), "it is not forgotten here before it is elsewhere");
        assert_eq!(b.view.overtaken_by(), None, "it is not heard any more");
    }

    #[test]
    fn the_number_of_members_is_bounded() {
        let mut b = Bench::new();
        let crowd: Vec<_> = (1..=MAX_MEMBERS as u64 + 10).map(|n| row(n, 100)).collect();
        assert_eq!(b.tick(&crowd).events.len(), MAX_MEMBERS);
        assert_eq!(b.view.refused(), 10);
    }

    /// What an outsider knows of a node from events alone.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Told {
        Nothing,
        Up,
        Failed,
        Left,
    }

    /// Random snapshots, with several lives a node, forgotten ones, late ticks and looks between ticks: each event fits what
    /// was told before, and what was told is always what the member list shows. So no transition is lost, doubled or
    /// invented. Death comes neither before so many counted ticks nor later, by a count of its own.
    #[test]
    fn random_snapshots_give_exactly_one_event_per_transition() {
        let mut rng = Rng::from_clock();
        let (mut seen, mut forgotten) = ([0_u32; 4], 0_u32);
        for _ in 0..60 {
            let mut b = Bench::new();
            // The very first tick has nothing to be late after.
            b.tick(&[]);
            let mut told: BTreeMap<NodeId, Told> = BTreeMap::new();
            let mut addrs: BTreeMap<NodeId, String> = BTreeMap::new();
            let mut suspect_for: BTreeMap<NodeId, u32> = BTreeMap::new();
            let mut clean_due = 0;
            // Lives persist over rounds, so that states last long enough for death.
            let mut lives: Vec<Observed> = Vec::new();
            for _ in 0..400 {
                match rng.below(12) {
                    0 if lives.len() < 12 => {
                        let mut life = silent(row(2 + rng.below(4), rng.below(6)));
                        if rng.below(3) == 0 {
                            life = moved(life);
                        }
                        lives.push(life);
                    }
                    1 if !lives.is_empty() => {
                        let i = rng.below(lives.len() as u64) as usize;
                        lives[i].chitchat_alive = true;
                    }
                    2 if !lives.is_empty() => {
                        let i = rng.below(lives.len() as u64) as usize;
                        lives[i].chitchat_alive = false;
                    }
                    3 if !lives.is_empty() && rng.below(4) == 0 => {
                        let i = rng.below(lives.len() as u64) as usize;
                        lives[i].left = true;
                    }
                    4 if !lives.is_empty() && rng.below(8) == 0 => {
                        let i = rng.below(lives.len() as u64) as usize;
                        lives.remove(i);
                    }
                    _ => {}
                }
                let before: BTreeMap<_, _> =
                    b.view.entries.iter().map(|(n, e)| (*n, (e.generation, e.member.state))).collect();
                let (counts, step) = match rng.below(20) {
                    0 => (false, b.view.observe(&lives)),
                    1 => {
                        clean_due = CLEAN_TICKS;
                        (false, b.tick_after(INTERVAL * 4, &lives))
                    }
                    _ => {
                        let counts = clean_due == 0;
                        clean_due = clean_due.saturating_sub(1);
                        (counts, b.tick(&lives))
                    }
                };
                let mut in_step = BTreeSet::new();
                for event in &step.events {
                    assert!(in_step.insert(event.node()), "two events of one node in a step: {:?}", step.events);
                    let status = told.entry(event.node()).or_insert(Told::Nothing);
                    *status = match (event, *status) {
                        (MemberEvent::Join { node, raft_addr }, Told::Nothing | Told::Failed | Told::Left) => {
                            seen[0] += 1;
                            addrs.insert(*node, raft_addr.clone());
                            Told::Up
                        }
                        (MemberEvent::Leave { .. }, Told::Up | Told::Failed) => {
                            seen[1] += 1;
                            Told::Left
                        }
                        (MemberEvent::Failed { node }, Told::Up) => {
                            seen[2] += 1;
                            assert_eq!(suspect_for[node], DEAD_TICKS - 1, "died too early or late");
                            assert!(counts);
                            Told::Failed
                        }
                        (MemberEvent::Update { node, raft_addr }, Told::Up) => {
                            seen[3] += 1;
                            assert_ne!(addrs.insert(*node, raft_addr.clone()).as_ref(), Some(raft_addr));
                            Told::Up
                        }
                        (event, status) => panic!("{event:?} does not follow {status:?}"),
                    };
                }
                for (node, entry) in &b.view.entries {
                    let shown = match entry.member.state {
                        MemberState::Alive | MemberState::Suspect => Told::Up,
                        MemberState::Dead => Told::Failed,
                        MemberState::Left => Told::Left,
                    };
                    assert_eq!(told[node], shown);
                    if shown == Told::Up {
                        assert_eq!(addrs[node], entry.member.meta.raft_addr);
                    }
                    if let Some((generation, state)) = before.get(node) {
                        assert!(entry.generation >= *generation, "went back to an earlier life");
                        let sticky = *state != MemberState::Left || entry.generation > *generation;
                        assert!(sticky || entry.member.state == MemberState::Left);
                    }
                    let was_suspect = before.get(node).is_some_and(|(_, s)| *s == MemberState::Suspect);
                    if entry.member.state == MemberState::Suspect && was_suspect {
                        *suspect_for.entry(*node).or_default() += u32::from(counts);
                    } else {
                        suspect_for.insert(*node, 0);
                    }
                }
                // Nobody who is up vanishes without an event.
                for (node, status) in &told {
                    assert!(*status != Told::Up || b.view.entries.contains_key(node));
                }
                for node in &step.gone {
                    assert!(before[node].1.is_present());
                }
                // Whoever keeps a copy of the list by what is told of it has the same one.
                let dropped: Vec<NodeId> =
                    before.keys().filter(|node| !b.view.entries.contains_key(node)).copied().collect();
                assert_eq!(step.forgotten, dropped);
                for node in &step.forgotten {
                    forgotten += 1;
                    assert!(!before[node].1.is_present() && !in_step.contains(node));
                }
            }
        }
        assert!(seen.iter().all(|n| *n > 10), "the test must reach every kind of event: {seen:?}");
        assert!(forgotten > 10, "and members that are dropped: {forgotten}");
    }
}
