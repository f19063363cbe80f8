//! Gossip within a node: kept running, and its news passed on.
//!
//! ```text
//!   gossip --members-----> address book --set_reach----> peers      placement --view hook--> address book
//!   gossip --events------> Story --what is news--> EventHub (listeners)
//!   gossip --leaders-----> LeaderHints, NodeGone ------> driver
//!   driver --led---------> publish ---------------------> gossip
//!   gossip ended, or superseded although this life is registered --> started anew with a higher generation
//! ```
//!
//! Nothing that is heard here decides anything: the driver takes hints as hints, and a registered life that answers
//! keeps its peers whatever gossip says about its node.

use crate::driver::{DriverHandle, Input};
use crate::memberlist::socket_addr;
use crate::peers::{Callers, MAX_STRANGERS, MAX_UNKNOWN_CALLERS, PeersHandle, Reach};
use arc_swap::ArcSwap;
use crema_core::{Incarnation, NodeId, ShardId};
use crema_gossip::events::{EventHub, EventReceiver};
use crema_gossip::view::MAX_MEMBERS;
use crema_gossip::{
    Gossip, GossipConfig, GossipError, GossipUpdate, KeyRing, LeaderEntry, Member, MemberEvent, MemberState,
};
use crema_shard::{LeaderHint, LedShard, RoutingView};
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{oneshot, watch};

/// Period at which known leaders are told again while one is missing, and gossip itself is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Hints gather up to about this many before they are handed to the driver.
const HINT_BATCH: usize = 4096;
/// Pause before gossip is started anew, doubled after each failure up to the longest.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_RESTART_PAUSE: Duration = Duration::from_secs(30);
/// Longest time that a stop waits for a start that is under way; it takes milliseconds.
const START_LIMIT: Duration = Duration::from_secs(2);

/// After gossip was started anew, members of before that are not heard for so long have gone meanwhile. Well above what
/// it takes to hear of everybody.
const RETURN_PATIENCE: Duration = Duration::from_secs(30);

/// A node as placement knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) address: String,
    /// Whether the registered life answers, wherever.
    pub(crate) live: bool,
    /// Whether the cluster lets it hold replicas.
    pub(crate) approved: bool,
}

/// Where every node is reached, by whom it is known. Shared by the gossip task and the driver's hook; both hold it for
/// a moment only.
#[derive(Debug)]
pub(crate) struct AddressBook {
    /// Whether nodes are reached that are neither configured nor approved.
    strangers: bool,
    /// Nodes that are reached all the same, since an operator wants them to be approved.
    admitted: BTreeSet<NodeId>,
    configured: BTreeMap<NodeId, String>,
    placed: BTreeMap<NodeId, Placed>,
    gossiped: BTreeMap<NodeId, Gossiped>,
    /// Who calls.
    callers: Callers,
    /// Those of them that may be called back although nothing else is known of them.
    called_back: BTreeSet<NodeId>,
}

/// A node as gossip knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Gossiped {
    address: String,
    /// Not of one that is taken for failed.
    present: bool,
}

/// Nodes of which the connections have to learn where they are.
type Changes = Vec<(NodeId, Reach)>;

impl AddressBook {
    pub(crate) fn new(strangers: bool) -> Self {
        AddressBook {
            strangers,
            admitted: BTreeSet::new(),
            configured: BTreeMap::new(),
            placed: BTreeMap::new(),
            gossiped: BTreeMap::new(),
            callers: Callers::new(),
            called_back: BTreeSet::new(),
        }
    }

    fn is_known(&self, node: NodeId) -> bool {
        self.configured.contains_key(&node)
            || self.admitted.contains(&node)
            || self.placed.get(&node).is_some_and(|p| p.approved)
    }

    /// Whether anybody but the node itself tells of it.
    fn is_heard_of(&self, node: NodeId) -> bool {
        self.is_known(node) || self.placed.contains_key(&node) || self.gossiped.contains_key(&node)
    }

    /// Gossip speaks of the newest life, placement of the registered one, the configuration of none in particular. Each
    /// may be of before a restart, and a record is corrected by a majority only, for which its nodes must find each
    /// other first: so all of them are tried, what gossip says of the dead last. Before it comes what a node says itself that
    /// has connected: without gossip, nobody else knows one that joins.
    fn reach(&self, node: NodeId) -> Reach {
        if !self.strangers && !self.is_known(node) {
            return Reach::default();
        }
        let placed = self.placed.get(&node);
        let gossiped = |present| self.gossiped.get(&node).filter(|g| g.present == present).map(|g| &*g.address);
        let caller = self.callers.get(&node).filter(|_| self.is_heard_of(node) || self.called_back.contains(&node));
        let caller = caller.map(|address| &**address);
        let configured = self.configured.get(&node).map(String::as_str);
        let sources = [gossiped(true), placed.map(|p| &*p.address), configured, caller, gossiped(false)];
        let mut addresses: Vec<String> = Vec::new();
        for address in sources.into_iter().flatten() {
            if !addresses.iter().any(|known| known == address) {
                addresses.push(address.to_owned());
            }
        }
        // A second process under its id must not be able to divert the peers of a registered life by gossip.
        Reach { addresses, pinned: placed.filter(|p| p.live).map(|p| p.address.clone()) }
    }

    /// Applies `change`, which touches no other nodes than `touched`; returns those which are reached otherwise now.
    fn update(&mut self, touched: impl IntoIterator<Item = NodeId>, change: impl FnOnce(&mut Self)) -> Changes {
        let touched: BTreeSet<NodeId> = touched.into_iter().chain(self.callers.keys().copied()).collect();
        let before: Vec<_> = touched.into_iter().map(|node| (node, self.reach(node))).collect();
        change(self);
        // Whoever has become known makes room for the next.
        let unknown = self.callers.keys().copied().filter(|node| !self.is_heard_of(*node));
        self.called_back = unknown.take(MAX_UNKNOWN_CALLERS).collect();
        let now = before.into_iter().map(|(node, old)| (node, self.reach(node), old));
        now.filter(|(_, new, old)| new != old).map(|(node, new, _)| (node, new)).collect()
    }

    pub(crate) fn set_configured(&mut self, new: BTreeMap<NodeId, String>) -> Changes {
        let touched: Vec<_> = self.configured.keys().chain(new.keys()).copied().collect();
        self.update(touched, |book| book.configured = new)
    }

    /// Of nodes that nobody but gossip knows at most [`MAX_STRANGERS`] count, so that whoever makes nodes up leaves room for
    /// others.
    fn set_gossiped(&mut self, mut new: BTreeMap<NodeId, Gossiped>) -> Changes {
        let mut strangers = 0;
        new.retain(|node, _| {
            let known = self.is_known(*node) || self.placed.contains_key(node);
            strangers += usize::from(!known);
            known || strangers <= MAX_STRANGERS
        });
        let touched: Vec<_> = self.gossiped.keys().chain(new.keys()).copied().collect();
        self.update(touched, |book| book.gossiped = new)
    }

    /// Of nodes that are known by nothing but their call at most [`MAX_UNKNOWN_CALLERS`] are called back at a time.
    pub(crate) fn set_callers(&mut self, new: Callers) -> Changes {
        let touched: Vec<_> = self.callers.keys().chain(new.keys()).copied().collect();
        self.update(touched, |book| book.callers = new)
    }

    /// An operator wants the node to be approved: it is reached from now on, at most [`MAX_MEMBERS`] of them.
    pub(crate) fn admit(&mut self, node: NodeId) -> Changes {
        if self.admitted.len() >= MAX_MEMBERS {
            return Vec::new();
        }
        self.update([node], |book| _ = book.admitted.insert(node))
    }

    pub(crate) fn set_placed(&mut self, new: BTreeMap<NodeId, Placed>) -> Changes {
        let touched: Vec<_> = self.placed.keys().chain(new.keys()).copied().collect();
        self.update(touched, |book| book.placed = new)
    }
}

/// Tells the connections what has newly become known. One lock around both keeps two sources from crossing.
pub(crate) fn update_addresses(
    book: &Mutex<AddressBook>,
    peers: &PeersHandle,
    change: impl FnOnce(&mut AddressBook) -> Changes,
) {
    let mut book = book.lock().expect("no panic while held");
    for (node, reach) in change(&mut book) {
        peers.set_reach(node, reach);
    }
}

/// Members that may be dialed: those that have left are not, until they come back. A dead one may only be cut off, and is
/// tried on unless `drop_failed`.
fn dialable(members: &[Member], drop_failed: bool) -> BTreeMap<NodeId, Gossiped> {
    let here = members.iter().filter(|m| match m.state {
        MemberState::Alive | MemberState::Suspect => true,
        MemberState::Dead => !drop_failed,
        MemberState::Left => false,
    });
    let gossiped = |m: &Member| Gossiped { address: m.meta.raft_addr.clone(), present: m.state != MemberState::Dead };
    here.map(|m| (m.meta.node_id, gossiped(m))).collect()
}

/// What the task needs of its node.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) node: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) driver: DriverHandle,
    pub(crate) peers: PeersHandle,
    pub(crate) book: Arc<Mutex<AddressBook>>,
    /// Whether discovered nodes that have failed are given up.
    pub(crate) drop_failed: bool,
    /// Who listens to what happens to members.
    pub(crate) events: Arc<EventHub>,
    /// Changes when the placement becomes known or a node becomes reachable or unreachable.
    pub(crate) reach: watch::Receiver<()>,
}

/// The node's gossip, which may be started anew during the node's life.
#[derive(Debug)]
pub(crate) struct Membership {
    present: ArcSwap<Gossip>,
    config: GossipConfig,
    /// The cluster's keys as they stand now, whatever a run was started with; none on a node without. Held while a run is given
    /// them, so that no change falls between two runs.
    keys: Mutex<Option<KeyRing>>,
    /// The latest leadership of each shard, for a new start.
    led: Mutex<BTreeMap<ShardId, LedShard>>,
    /// Held while a run is started that is not known here yet.
    starting: Arc<tokio::sync::Mutex<()>>,
}

/// Why following one run of gossip has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It has stopped by itself.
    Stopped,
    /// Another process under this node's id gossips with this higher generation, so that nobody listens to us.
    Superseded(u64),
}

impl Membership {
    /// Starts gossip. Errors: see [`GossipError`].
    pub(crate) async fn start(mut config: GossipConfig) -> Result<Membership, GossipError> {
        let gossip = Gossip::start(config.clone()).await?;
        // A later start must come back to the address that others were told.
        config.advertise = gossip.addr();
        if config.bind.port() == 0 {
            config.bind.set_port(gossip.addr().port());
        }
        let (keys, led) = (Mutex::new(config.keys.clone()), Mutex::default());
        Ok(Membership { present: ArcSwap::from_pointee(gossip), config, keys, led, starting: Arc::default() })
    }

    /// The present run.
    pub(crate) fn gossip(&self) -> Arc<Gossip> {
        self.present.load_full()
    }

    /// Replaces the cluster's keys, for the present run and all later ones.
    ///
    /// Errors: [`GossipError::NoKeys`] on a node that was started without.
    pub(crate) fn set_keys(&self, keys: KeyRing) -> Result<(), GossipError> {
        let mut present = self.keys.lock().expect("no panic while held");
        if present.is_none() {
            return Err(GossipError::NoKeys);
        }
        *present = Some(keys.clone());
        self.gossip().set_keys(keys)
    }

    /// Tells the cluster which shards this node has begun to lead.
    pub(crate) fn publish(&self, led: &[LedShard]) {
        let mut latest = self.led.lock().expect("no panic while held");
        latest.extend(led.iter().map(|l| (l.shard, *l)));
        publish(&self.gossip(), led);
    }

    /// Says goodbye and stops gossip for good, once nobody is left who would start it anew. The port is free then.
    pub(crate) async fn leave(&self) {
        if tokio::time::timeout(START_LIMIT, self.starting.lock()).await.is_err() {
            tracing::warn!("gossip was being started anew while this node stops, and still is");
        }
        self.gossip().leave().await;
    }

    /// Passes gossip's news on and keeps it running, for as long as the node lives.
    pub(crate) async fn run(&self, mut around: Surroundings) {
        let (hub, driver) = (around.events.clone(), around.driver.clone());
        let mut story = Story::default();
        loop {
            let gossip = self.gossip();
            let mut events = gossip.events();
            let has_left = |node| has_left(&gossip, &driver.view(), node);
            let end = tokio::select! {
                end = follow(&gossip, &mut around) => end,
                never = tell(&gossip, &mut events, &hub, &mut story, has_left) => match never {},
            };
            match end {
                End::Stopped => tracing::error!("gossip has stopped; it is started anew"),
                End::Superseded(_) => tracing::warn!(
                    "another process gossips under this node's id, but the cluster has registered this one: gossip is \
                     started anew"
                ),
            }
            gossip.shutdown().await;
            tell_the_rest(&gossip, &mut events, &hub, &mut story);
            story.interrupted(around.node);
            let mut pause = RESTART_PAUSE;
            loop {
                tokio::time::sleep(pause).await;
                self.forget_lost(around.node, &around.driver.view());
                match self.restart(end, gossip.generation()).await {
                    Ok(()) => break,
                    Err(error) => tracing::error!(%error, "gossip does not start"),
                }
                pause = (pause * 2).min(LONGEST_RESTART_PAUSE);
            }
        }
    }

    /// Forgets leaderships that are over: a new run would take them for more true than what others claim.
    fn forget_lost(&self, this: NodeId, view: &RoutingView) {
        let is_over = |led: &LedShard| match view.shard(led.shard) {
            Some(route) => {
                route.term > led.term || (route.term == led.term && route.leader.is_some_and(|leader| leader != this))
            }
            None => led.shard.is_meta() && view.meta_leader.is_some_and(|leader| leader != this),
        };
        self.led.lock().expect("no panic while held").retain(|_, led| !is_over(led));
    }

    async fn restart(&self, end: End, last: u64) -> Result<(), GossipError> {
        let gossip = self.start_anew(end, last).await?;
        self.succeed(gossip)
    }

    /// A new run, which nobody knows of yet.
    async fn start_anew(&self, end: End, last: u64) -> Result<Gossip, GossipError> {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let beaten = if let End::Superseded(by) = end { by } else { 0 };
        let generation = clock.max(last.saturating_add(1)).max(beaten.saturating_add(1));
        let keys = self.keys.lock().expect("no panic while held").clone();
        let config = GossipConfig { generation: Some(generation), keys, ..self.config.clone() };
        let busy = self.starting.clone().lock_owned().await;
        let (hand_over, handed_over) = oneshot::channel();
        // In a task of its own: a start that is cut off midway closes its sockets at some time later, for which nobody could wait.
        tokio::spawn(async move {
            if let Err(Ok(unwanted)) = hand_over.send(Gossip::start(config).await) {
                unwanted.shutdown().await;
            }
            drop(busy);
        });
        handed_over.await.unwrap_or_else(|_| Err(GossipError::Start("its start has panicked".to_owned())))
    }

    /// Puts a new run in the place of the last one, and tells it what has changed while it was started.
    fn succeed(&self, gossip: Gossip) -> Result<(), GossipError> {
        let gossip = Arc::new(gossip);
        // Under their locks: what changes meanwhile reaches the new run either here or by itself.
        let keys = self.keys.lock().expect("no panic while held");
        let latest = self.led.lock().expect("no panic while held");
        if let Some(keys) = &*keys {
            gossip.set_keys(keys.clone())?;
        }
        let led: Vec<_> = latest.values().copied().collect();
        publish(&gossip, &led);
        self.present.store(gossip);
        Ok(())
    }
}

fn publish(gossip: &Gossip, led: &[LedShard]) {
    let claims: Vec<_> = led.iter().map(|l| (l.shard, l.term, l.epoch)).collect();
    gossip.publish_leaders(&claims);
}

/// Passes one run's news on: addresses to the connections, leaders and losses to the driver.
///
/// The driver takes a hint only while the hinted node is connected and the placement is known, and forgets it otherwise.
/// So everything that is known is told again whenever that changes, and now and then while a leader is missing.
async fn follow(gossip: &Gossip, around: &mut Surroundings) -> End {
    let mut updates = gossip.leader_updates();
    let mut health = gossip.health_watch();
    let this = around.node;
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let (mut hints, mut gone, mut members_changed) = (Vec::new(), Vec::new(), false);
        let mut next = tokio::select! {
            update = updates.recv() => match update {
                Some(update) => Some(update),
                None => return End::Stopped,
            },
            Ok(()) = around.reach.changed() => {
                hints = known_leaders(gossip, this);
                None
            }
            _ = health.wait_for(|healthy| !healthy) => return End::Stopped,
            _ = look.tick() => {
                let view = around.driver.view();
                let registered = view.nodes.get(&this).is_some_and(|route| route.incarnation == around.incarnation);
                if let (Some(by), true) = (gossip.superseded_by(), registered) {
                    return End::Superseded(by);
                }
                if view.meta_leader.is_none() || view.shards.iter().any(|s| s.leader.is_none()) {
                    hints = known_leaders(gossip, this);
                }
                None
            }
        };
        // What waits is handed over together: an election storm makes one input, not thousands.
        while let Some(update) = next {
            match update {
                GossipUpdate::Leader { shard, leader, term, .. } => {
                    // A node's death and its successor's claim must reach the driver in their order.
                    tell_gone(&around.driver, &mut gone).await;
                    // Own leaderships come back by gossip as well; the driver knows them better.
                    if leader != this {
                        hints.push(LeaderHint { shard, leader, term });
                    }
                }
                GossipUpdate::Gone(node) => {
                    tell_hints(&around.driver, &mut hints).await;
                    if node != this {
                        gone.push(node);
                    }
                }
                GossipUpdate::Member(_) | GossipUpdate::Forgotten(_) => members_changed = true,
                GossipUpdate::Resync => {
                    members_changed = true;
                    let absent = gossip.members().into_iter().filter(|m| !m.state.is_present());
                    gone = absent.map(|m| m.meta.node_id).filter(|node| *node != this).collect();
                    tell_gone(&around.driver, &mut gone).await;
                    hints = known_leaders(gossip, this);
                }
            }
            next = if hints.len() < HINT_BATCH { updates.try_recv() } else { None };
        }
        // Addresses first: a leader that cannot be reached is of little use.
        if members_changed {
            update_addresses(&around.book, &around.peers, |book| {
                book.set_gossiped(dialable(&gossip.members(), around.drop_failed))
            });
        }
        tell_gone(&around.driver, &mut gone).await;
        tell_hints(&around.driver, &mut hints).await;
    }
}

/// Passes what happens to members on to those who listen, for as long as it is polled. Of those who are missed after a restart,
/// `has_left` tells whether that was planned.
async fn tell(
    gossip: &Gossip,
    events: &mut EventReceiver,
    hub: &EventHub,
    story: &mut Story,
    has_left: impl Fn(NodeId) -> bool,
) -> Infallible {
    let patience = tokio::time::sleep(RETURN_PATIENCE);
    tokio::pin!(patience);
    loop {
        let news = tokio::select! {
            event = events.recv() => match event {
                Some(event) => story.hear(with_numbers(gossip, event)).into_iter().collect(),
                // This run is over, which `follow` notices too.
                None => std::future::pending().await,
            },
            () = &mut patience, if !story.missed.is_empty() => story.give_up(&has_left),
        };
        hub.publish(&news);
    }
}

/// Passes on what a run that has ended still had to tell: the next one knows nothing of it.
fn tell_the_rest(gossip: &Gossip, events: &mut EventReceiver, hub: &EventHub, story: &mut Story) {
    while let Some(event) = events.try_recv() {
        let news: Vec<_> = story.hear(with_numbers(gossip, event)).into_iter().collect();
        hub.publish(&news);
    }
}

/// Whether a node that is not heard any more has gone as planned. A run of gossip lists nobody whom it never heard alive, so that
/// whoever left between two runs is known by the cluster's table alone: before it stops, a node has that say so.
fn has_left(gossip: &Gossip, view: &RoutingView, node: NodeId) -> bool {
    let said_goodbye = |m: &Member| m.meta.node_id == node && m.state == MemberState::Left;
    gossip.members().iter().any(said_goodbye)
        || view.nodes.get(&node).is_some_and(|route| route.draining && !route.live)
}

/// The event with an address in place of a host name, for listeners that want to connect: that of the machine that gossips.
fn with_numbers(gossip: &Gossip, mut event: MemberEvent) -> MemberEvent {
    if let MemberEvent::Join { node, raft_addr } | MemberEvent::Update { node, raft_addr } = &mut event
        && raft_addr.parse::<SocketAddr>().is_err()
    {
        let member = gossip.members().into_iter().find(|m| m.meta.node_id == *node);
        if let Some(addr) = member.and_then(|m| socket_addr(raft_addr, Some(m.meta.gossip_addr))) {
            *raft_addr = addr.to_string();
        }
    }
    event
}

/// What those who listen have been told. A new run of gossip begins with a join of everybody, of which most is no news; and
/// it knows nothing of those who have gone between the runs.
#[derive(Debug, Default)]
struct Story {
    /// Address of those who are up; `None` for those who have failed.
    told: BTreeMap<NodeId, Option<String>>,
    /// Up in the last run, not heard in this one yet.
    missed: BTreeSet<NodeId>,
}

impl Story {
    /// What there is to tell after this event.
    fn hear(&mut self, event: MemberEvent) -> Option<MemberEvent> {
        self.missed.remove(&event.node());
        let news = match event {
            MemberEvent::Join { node, raft_addr } | MemberEvent::Update { node, raft_addr } => {
                match self.told.insert(node, Some(raft_addr.clone())) {
                    Some(Some(known)) if known == raft_addr => None,
                    Some(Some(_)) => Some(MemberEvent::Update { node, raft_addr }),
                    Some(None) | None => Some(MemberEvent::Join { node, raft_addr }),
                }
            }
            MemberEvent::Failed { node } => {
                let was_up = self.told.insert(node, None).is_some_and(|told| told.is_some());
                was_up.then_some(MemberEvent::Failed { node })
            }
            MemberEvent::Leave { node } => self.told.remove(&node).map(|_| MemberEvent::Leave { node }),
        };
        // Failed nodes that never came back would pile up over months of changing ids.
        if self.told.len() > 2 * MAX_MEMBERS {
            self.told.retain(|_, told| told.is_some());
        }
        news
    }

    /// A run of gossip has ended.
    fn interrupted(&mut self, this: NodeId) {
        let up = self.told.iter().filter(|(node, told)| told.is_some() && **node != this);
        self.missed = up.map(|(node, _)| *node).collect();
    }

    /// Those who were not heard again have left or failed.
    fn give_up(&mut self, has_left: impl Fn(NodeId) -> bool) -> Vec<MemberEvent> {
        let missed = std::mem::take(&mut self.missed);
        let end = |node| if has_left(node) { MemberEvent::Leave { node } } else { MemberEvent::Failed { node } };
        missed.into_iter().filter_map(|node| self.hear(end(node))).collect()
    }
}

/// Every leader that gossip knows, but for this node.
fn known_leaders(gossip: &Gossip, this: NodeId) -> Vec<LeaderHint> {
    let hint = |(shard, entry): (ShardId, LeaderEntry)| {
        let leader = entry.leader.filter(|leader| *leader != this)?;
        Some(LeaderHint { shard, leader, term: entry.term })
    };
    gossip.tracker().entries().into_iter().filter_map(hint).collect()
}

async fn tell_hints(driver: &DriverHandle, hints: &mut Vec<LeaderHint>) {
    if !hints.is_empty() {
        // A driver that has stopped needs no hints.
        let _ = driver.send(Input::LeaderHints(std::mem::take(hints))).await;
    }
}

async fn tell_gone(driver: &DriverHandle, gone: &mut Vec<NodeId>) {
    for node in gone.drain(..) {
        let _ = driver.send(Input::NodeGone(node)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::SlotRange;
    use crema_gossip::NodeMeta;
    use crema_shard::ShardRoute;

    #[test]
    fn all_known_addresses_are_tried_the_likeliest_first_and_only_changes_are_told() {
        let map = |pairs: &[(u64, &str)]| {
            pairs.iter().map(|(n, a)| (NodeId(*n), (*a).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let placed = |pairs: &[(u64, &str, bool)]| {
            let placed = |(n, a, live): &(u64, &str, bool)| {
                (NodeId(*n), Placed { address: (*a).to_owned(), live: *live, approved: true })
            };
            pairs.iter().map(placed).collect::<BTreeMap<_, _>>()
        };
        let told = |n: u64, list: &[&str]| told(n, list, None);
        let mut book = AddressBook::new(true);
        assert_eq!(book.set_configured(map(&[(2, "c2"), (3, "c3")])), [told(2, &["c2"]), told(3, &["c3"])]);
        assert_eq!(book.set_placed(placed(&[(2, "c2", false), (3, "p3", false)])), [told(3, &["p3", "c3"])]);
        let heard = gossiped(&[(2, "g2", true), (4, "g4", true)]);
        assert_eq!(book.set_gossiped(heard), [told(2, &["g2", "c2"]), told(4, &["g4"])]);
        // Of one that has failed, or is cut off from gossip alone, others know better.
        let heard = gossiped(&[(2, "g2", false), (4, "g4", false)]);
        assert_eq!(book.set_gossiped(heard.clone()), [told(2, &["c2", "g2"])]);
        // A life that answers keeps its link wherever that leads, until it registers another address.
        let pinned = |n, list: &[&str], at: &str| super::tests::told(n, list, Some(at));
        assert_eq!(
            book.set_placed(placed(&[(2, "p2", true), (3, "p3", true)])),
            [pinned(2, &["p2", "c2", "g2"], "p2"), pinned(3, &["p3", "c3"], "p3")]
        );
        assert_eq!(
            book.set_gossiped(gossiped(&[(2, "thief", true), (4, "g4", false)])),
            [pinned(2, &["thief", "p2", "c2"], "p2")]
        );
        // What gossip forgets falls back; what nobody knows any more is not dialed.
        assert_eq!(book.set_gossiped(gossiped(&[])), [pinned(2, &["p2", "c2"], "p2"), told(4, &[])]);
        assert_eq!(book.set_placed(BTreeMap::new()), [told(2, &["c2"]), told(3, &["c3"])]);
    }

    fn told(n: u64, list: &[&str], pinned: Option<&str>) -> (NodeId, Reach) {
        let addresses = list.iter().map(|a| (*a).to_owned()).collect();
        (NodeId(n), Reach { addresses, pinned: pinned.map(str::to_owned) })
    }

    fn gossiped(all: &[(u64, &str, bool)]) -> BTreeMap<NodeId, Gossiped> {
        let one = |(n, a, present): &(u64, &str, bool)| {
            (NodeId(*n), Gossiped { address: (*a).to_owned(), present: *present })
        };
        all.iter().map(one).collect()
    }

    #[test]
    fn strangers_are_reached_only_where_they_may_be() {
        let placed = |n: u64, approved| {
            BTreeMap::from([(NodeId(n), Placed { address: format!("p{n}"), live: false, approved })])
        };
        let mut book = AddressBook::new(false);
        assert_eq!(book.set_configured(BTreeMap::from([(NodeId(2), "c2".to_owned())])), [told(2, &["c2"], None)]);
        // A seed node may move; a stranger is only heard of.
        assert_eq!(book.set_gossiped(gossiped(&[(2, "g2", true), (4, "g4", true)])), [told(2, &["g2", "c2"], None)]);
        assert!(book.set_placed(placed(4, false)).is_empty(), "registered, not approved");
        assert_eq!(book.set_placed(placed(4, true)), [told(4, &["g4", "p4"], None)]);
        assert_eq!(book.set_placed(BTreeMap::new()), [told(4, &[], None)], "its approval was taken back");
    }

    #[test]
    fn made_up_nodes_leave_room_for_those_that_the_cluster_knows() {
        let mut book = AddressBook::new(true);
        let real = NodeId(1_000_000);
        let at = |a: &str| Placed { address: a.to_owned(), live: false, approved: true };
        book.set_placed(BTreeMap::from([(real, at("p"))]));
        let all: Vec<u64> = (1..=2_000).chain([real.0]).collect();
        let heard = all.iter().map(|n| (NodeId(*n), Gossiped { address: format!("g{n}"), present: true })).collect();
        let told = book.set_gossiped(heard);
        assert_eq!(told.len(), MAX_STRANGERS + 1);
        assert_eq!(told.last().map(|(node, reach)| (*node, reach.addresses.len())), Some((real, 2)));
        // Of those who call likewise.
        let callers = |all: &[u64]| all.iter().map(|n| (NodeId(*n), format!("c{n}").into())).collect();
        let calling: Vec<u64> = (10_001..=12_000).chain([real.0]).collect();
        let told = book.set_callers(callers(&calling));
        assert_eq!(told.len(), MAX_UNKNOWN_CALLERS + 1);
        assert_eq!(told.last().map(|(node, reach)| (*node, reach.addresses.len())), Some((real, 3)));
        // Some of them become known: the next ones are called back instead, and those as ever.
        let placed = (10_001..10_011).map(|n| (NodeId(n), at("p"))).chain([(real, at("p"))]).collect();
        let told = book.set_placed(placed);
        let new: Vec<u64> = told.iter().map(|(node, _)| node.0).filter(|n| *n > 10_010).collect();
        let next = 10_001 + MAX_UNKNOWN_CALLERS as u64;
        assert_eq!(new, (next..next + 10).collect::<Vec<_>>());
        assert_eq!(book.set_callers(callers(&[])).len(), MAX_UNKNOWN_CALLERS + 11, "they have hung up");
    }

    #[test]
    fn a_caller_is_called_back_unless_it_is_a_stranger_that_may_not_be() {
        let calling = |n: u64| Callers::from([(NodeId(n), format!("c{n}").into())]);
        let mut book = AddressBook::new(true);
        assert_eq!(book.set_callers(calling(4)), [told(4, &["c4"], None)]);
        assert_eq!(book.set_gossiped(gossiped(&[(4, "g4", false)])), [told(4, &["c4", "g4"], None)], "it is not dead");
        let mut book = AddressBook::new(false);
        assert!(book.set_callers(calling(4)).is_empty());
        assert_eq!(book.admit(NodeId(4)), [told(4, &["c4"], None)]);
    }

    #[test]
    fn failed_members_are_dialed_unless_they_shall_not_be() {
        let member = |n: u64, state| Member {
            meta: NodeMeta {
                node_id: NodeId(n),
                incarnation: Incarnation(1),
                raft_addr: format!("r{n}:1"),
                redis_addr: None,
                redis_cluster_addr: None,
                http_addr: None,
                gossip_addr: "127.0.0.1:1".parse().unwrap(),
                metadata: BTreeMap::new(),
            },
            state,
        };
        use MemberState::{Alive, Dead, Left, Suspect};
        let members = [member(1, Alive), member(2, Suspect), member(3, Dead), member(4, Left)];
        let dialed = |drop_failed| dialable(&members, drop_failed).keys().map(|n| n.0).collect::<Vec<_>>();
        assert_eq!((dialed(false), dialed(true)), (vec![1, 2, 3], vec![1, 2]));
    }

    #[test]
    fn a_new_run_of_gossip_tells_only_what_has_changed() {
        let join = |n: u64, a: &str| MemberEvent::Join { node: NodeId(n), raft_addr: a.to_owned() };
        let update = |n: u64, a: &str| MemberEvent::Update { node: NodeId(n), raft_addr: a.to_owned() };
        let (failed, leave) = (|n| MemberEvent::Failed { node: NodeId(n) }, |n| MemberEvent::Leave { node: NodeId(n) });
        let mut story = Story::default();
        for event in [join(1, "a"), join(2, "a"), join(3, "a"), join(4, "a"), join(6, "a"), update(2, "b"), failed(3)] {
            assert_eq!(story.hear(event.clone()), Some(event));
        }
        assert_eq!(story.hear(failed(3)), None, "told before");
        story.interrupted(NodeId(1));
        assert_eq!(story.hear(join(1, "a")), None);
        assert_eq!(story.hear(join(2, "c")), Some(update(2, "c")), "it moved meanwhile");
        assert_eq!(story.hear(join(3, "a")), Some(join(3, "a")), "it came back meanwhile");
        assert_eq!(story.hear(join(5, "a")), Some(join(5, "a")));
        let has_left = |node| node == NodeId(6);
        assert_eq!(story.give_up(has_left), [failed(4), leave(6)]);
        assert_eq!(story.give_up(has_left), []);
        assert_eq!(story.hear(leave(4)), Some(leave(4)));
        assert_eq!(story.hear(leave(4)), None);
        assert_eq!(story.hear(leave(9)), None, "nobody was told of it");
    }

    /// Who stops as planned has the cluster's table say so; who is connected has not gone.
    #[tokio::test]
    async fn the_table_knows_who_left_between_two_runs() {
        let bind = "127.0.0.1:0".parse().unwrap();
        let config = GossipConfig::new(NodeId(1), Incarnation(1), "127.0.0.1:9001", "test", bind);
        let gossip = Gossip::start(config).await.unwrap();
        let mut view = crate::admin::tests::fake().view;
        let mut stands = |draining, live| {
            let route = view.nodes.get_mut(&NodeId(2)).unwrap();
            (route.draining, route.live) = (draining, live);
            has_left(&gossip, &view, NodeId(2))
        };
        assert!(stands(true, false));
        assert!(!stands(true, true) && !stands(false, false));
        assert!(!has_left(&gossip, &view, NodeId(9)), "nobody knows it");
    }

    /// Those who listen notice nothing of it when gossip is started anew.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn listeners_hear_one_story_over_two_runs() {
        let bind = "127.0.0.1:0".parse().unwrap();
        let config = |node| {
            let raft = format!("127.0.0.1:900{node}");
            let mut config = GossipConfig::new(NodeId(node), Incarnation(1), raft, "test", bind);
            config.interval = Duration::from_millis(20);
            config.initial_interval = config.interval;
            config
        };
        let ours = Membership::start(config(1)).await.unwrap();
        let mut other = config(2);
        other.seeds = vec![ours.gossip().addr().into()];
        let other = Gossip::start(other).await.unwrap();
        let (hub, mut story) = (EventHub::default(), Story::default());
        let mut events = hub.subscribe();
        let join = |n: u64| MemberEvent::Join { node: NodeId(n), raft_addr: format!("127.0.0.1:900{n}") };
        /// The next event, while this run's are passed on.
        async fn next(
            (gossip, run): (&Gossip, &mut EventReceiver),
            hub: &EventHub,
            story: &mut Story,
            events: &mut EventReceiver,
        ) -> Option<MemberEvent> {
            let next = async {
                tokio::select! {
                    event = events.recv() => event,
                    never = tell(gossip, run, hub, story, |_| false) => match never {},
                }
            };
            tokio::time::timeout(Duration::from_secs(20), next).await.expect("an event")
        }
        let first = ours.gossip();
        let mut run = first.events();
        for n in [1, 2] {
            assert_eq!(next((&first, &mut run), &hub, &mut story, &mut events).await, Some(join(n)));
        }
        // What happens just before the end of a run is told all the same.
        let mut third = config(3);
        third.seeds = vec![first.addr().into()];
        let third = Gossip::start(third).await.unwrap();
        let knows = async |state| {
            let known = || first.members().iter().any(|m| m.meta.node_id == NodeId(3) && m.state == state);
            let heard = async {
                while !known() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), heard).await.expect("heard");
        };
        knows(MemberState::Alive).await;
        assert_eq!(next((&first, &mut run), &hub, &mut story, &mut events).await, Some(join(3)));
        third.leave().await;
        knows(MemberState::Left).await;

        first.shutdown().await;
        tell_the_rest(&first, &mut run, &hub, &mut story);
        assert_eq!(events.try_recv(), Some(MemberEvent::Leave { node: NodeId(3) }));
        story.interrupted(NodeId(1));
        ours.restart(End::Stopped, first.generation()).await.unwrap();
        let second = ours.gossip();
        let mut run = second.events();
        let heard = async {
            while second.members().len() < 2 {
                tokio::task::yield_now().await;
            }
            other.leave().await;
        };
        let (event, ()) = tokio::join!(next((&second, &mut run), &hub, &mut story, &mut events), heard);
        assert_eq!(event, Some(MemberEvent::Leave { node: NodeId(2) }), "no second join");
        assert!(story.missed.is_empty());
    }

    /// One thread, so that the grace may pass at once.
    #[tokio::test]
    async fn what_gossip_has_forgotten_is_not_dialed_any_more() {
        let bind = "127.0.0.1:0".parse().unwrap();
        let config = |node| {
            let raft = format!("127.0.0.1:900{node}");
            let mut config = GossipConfig::new(NodeId(node), Incarnation(1), raft, "test", bind);
            config.interval = Duration::from_millis(20);
            config.initial_interval = config.interval;
            config
        };
        let ours = Gossip::start(config(1)).await.unwrap();
        let mut other = config(2);
        other.seeds = vec![ours.addr().into()];
        let other = Gossip::start(other).await.unwrap();
        let (sender, inputs) = crossbeam::channel::bounded(1_024);
        let options = crate::peers::PeerOptions::default();
        let (cluster, node, incarnation) = ("test".to_owned(), NodeId(1), Incarnation(1));
        let peers = crate::peers::PeersConfig {
            cluster,
            node,
            incarnation,
            boot: 0,
            addr: "127.0.0.1:1".to_owned(),
            keys: None,
            options,
        };
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let book = Arc::new(Mutex::new(AddressBook::new(true)));
        let (_reach, reach) = watch::channel(());
        let mut around = Surroundings {
            node,
            incarnation,
            driver: DriverHandle::played(sender.clone(), RoutingView::default()),
            peers: crate::peers::Peers::start(peers, listener, sender).unwrap(),
            book: book.clone(),
            drop_failed: false,
            events: Arc::default(),
            reach,
        };
        let told = || book.lock().unwrap().gossiped.get(&NodeId(2)).map(|g| g.present);
        let until = async |what: &str, holds: &dyn Fn() -> bool| {
            let heard = async {
                while !holds() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), heard).await.expect(what);
        };
        let story = async {
            until("it is dialed", &|| told() == Some(true)).await;
            drop(other);
            until("it has failed, and is tried all the same", &|| told() == Some(false)).await;
            let gone = |input| matches!(input, Input::NodeGone(NodeId(2)));
            until("the driver is told", &|| inputs.try_iter().any(gone)).await;
            tokio::time::pause();
            tokio::time::advance(config(1).grace).await;
            tokio::time::resume();
            until("it is forgotten", &|| told().is_none()).await;
            assert!(!inputs.try_iter().any(gone), "it has gone once");
        };
        tokio::select! {
            end = follow(&ours, &mut around) => panic!("{end:?}"),
            () = story => {}
        }
    }

    /// Whoever starts gossip anew may be cut off at any moment: what it has begun ends, too, before the goodbye does.
    #[tokio::test]
    async fn a_start_that_is_cut_off_leaves_nothing_behind() {
        let bind = "127.0.0.1:0".parse().unwrap();
        let config = GossipConfig::new(NodeId(1), Incarnation(1), "127.0.0.1:9001", "test", bind);
        let ours = Membership::start(config).await.unwrap();
        let first = ours.gossip();
        first.shutdown().await;
        let mut start = Box::pin(ours.start_anew(End::Stopped, first.generation()));
        // On one thread what it has spawned cannot be done before it waits.
        let begun = std::future::poll_fn(|c| std::task::Poll::Ready(start.as_mut().poll(c).is_pending())).await;
        assert!(begun, "it goes on by itself");
        drop(start);
        ours.leave().await;
        std::net::UdpSocket::bind(first.addr()).expect("nobody gossips there");
        std::net::TcpListener::bind(first.addr()).expect("by streams neither");
    }

    /// A change of keys while gossip is started anew reaches the new run, which has begun with the old ones.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn keys_that_change_between_two_runs_are_not_forgotten() {
        let key = |n: u8| crema_gossip::ClusterKey::new([n; 32]);
        let bind = "127.0.0.1:0".parse().unwrap();
        let mut config = GossipConfig::new(NodeId(1), Incarnation(1), "127.0.0.1:9001", "test", bind);
        config.keys = Some(KeyRing::new(key(1)));
        let ours = Membership::start(config.clone()).await.unwrap();
        let primary = |membership: &Membership| membership.gossip().keyring().map(|ring| ring.primary());
        ours.set_keys(KeyRing::new(key(2))).unwrap();
        assert_eq!(primary(&ours), Some(key(2).id()), "the present run has them");

        let first = ours.gossip();
        first.shutdown().await;
        let second = ours.start_anew(End::Stopped, first.generation()).await.unwrap();
        assert_eq!(
            second.keyring().map(|ring| ring.primary()),
            Some(key(2).id()),
            "and so has the next from its start"
        );
        // Meanwhile the run that has ended is still the one that is known.
        ours.set_keys(KeyRing::new(key(3))).unwrap();
        ours.succeed(second).unwrap();
        assert_eq!(primary(&ours), Some(key(3).id()), "as soon as it is known, it has the newest");
        ours.gossip().shutdown().await;
        ours.restart(End::Stopped, ours.gossip().generation()).await.unwrap();
        assert_eq!(primary(&ours), Some(key(3).id()));

        config.keys = None;
        let open = Membership::start(config).await.unwrap();
        assert!(matches!(open.set_keys(KeyRing::new(key(1))), Err(GossipError::NoKeys)));
    }

    /// They would count more than true claims of others.
    #[tokio::test]
    async fn leaderships_that_are_over_are_not_told_again() {
        let bind = "127.0.0.1:0".parse().unwrap();
        let config = GossipConfig::new(NodeId(1), Incarnation(1), "127.0.0.1:9001", "test", bind);
        let ours = Membership::start(config).await.unwrap();
        let led = |shard, term| LedShard { shard, term: crema_core::Term(term), epoch: crema_core::Epoch(1) };
        ours.publish(&[0, 1, 2, 3].map(|n| led(ShardId(n), 5)));
        ours.publish(&[led(ShardId::META, 5)]);
        let route = |leader: Option<u64>, term| ShardRoute {
            range: SlotRange { start: 0, end: 4_096 },
            leader: leader.map(NodeId),
            term: crema_core::Term(term),
            published: None,
            own_term: crema_core::Term(0),
            replicas: Vec::new(),
            down: None,
        };
        // As ever, not seen yet, lost to another, and lost to nobody yet.
        let shards = vec![route(Some(1), 5), route(Some(2), 4), route(Some(2), 6), route(None, 6)];
        let view = |meta_leader: u64| RoutingView {
            shards: shards.clone(),
            meta_leader: Some(NodeId(meta_leader)),
            ..RoutingView::default()
        };
        let kept = |ours: &Membership| ours.led.lock().unwrap().keys().copied().collect::<Vec<_>>();
        ours.forget_lost(NodeId(1), &view(1));
        assert_eq!(kept(&ours), [ShardId(0), ShardId(1), ShardId::META]);
        ours.forget_lost(NodeId(1), &view(2));
        assert_eq!(kept(&ours), [ShardId(0), ShardId(1)]);
        ours.forget_lost(NodeId(1), &RoutingView::default());
        assert_eq!(kept(&ours), [ShardId(0), ShardId(1)]);
    }

    /// Two runs under one node id: the registered one wins its peers' ears back.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_new_start_counts_more_than_what_superseded_the_old_one() {
        let bind = "127.0.0.1:0".parse().unwrap();
        let config = |incarnation| {
            let mut config = GossipConfig::new(NodeId(1), Incarnation(incarnation), "127.0.0.1:9001", "test", bind);
            config.interval = Duration::from_millis(20);
            config.initial_interval = config.interval;
            config
        };
        let ours = Membership::start(config(1)).await.unwrap();
        let led = LedShard { shard: ShardId(3), term: crema_core::Term(5), epoch: crema_core::Epoch(1) };
        ours.publish(&[led]);
        let first = ours.gossip();
        let addr = first.addr();

        let mut rival = config(2);
        rival.seeds = vec![addr.into()];
        let rival = Gossip::start(rival).await.unwrap();
        let seen = async {
            loop {
                match first.superseded_by() {
                    Some(by) => return by,
                    None => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        };
        let by = tokio::time::timeout(Duration::from_secs(20), seen).await.expect("the rival is noticed");
        assert_eq!(by, rival.generation());

        first.shutdown().await;
        ours.restart(End::Superseded(by), first.generation()).await.unwrap();
        let second = ours.gossip();
        assert_eq!(second.addr(), addr, "it comes back where it was");
        assert!(second.generation() > by);
        assert_eq!(second.tracker().get_leader(ShardId(3)), Some(NodeId(1)), "its leaderships are told again");
    }
}
