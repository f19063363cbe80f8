//! How membership and leader news leave the service: bounded, and without ever making it wait.
//!
//! ```text
//!   View --MemberEvent--> EventHub --queue a caller--> EventReceiver   lagging: coalesced to one event a node
//!   View, tracker ------> UpdateHub --bounded mpsc---> UpdateReceiver  lagging: Resync, the reader looks for itself
//! ```
//!
//! Events are for people and programs that watch the cluster: each reader gets its own full story, beginning with a Join for
//! each present member. Updates are for the node's driver, which wants the present state quickly rather than its history.

use crate::view::{MAX_MEMBERS, Member, MemberEvent};
use crema_core::{Epoch, NodeId, ShardId, Term};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use tokio::sync::{Notify, mpsc};

/// Most events that wait for one reader before they are coalesced.
pub const MAX_QUEUED_EVENTS: usize = 2 * MAX_MEMBERS;
/// Most updates that wait for one reader before it has to look for itself.
pub const MAX_QUEUED_UPDATES: usize = 4_096;

/// How a node stands by the events of one reader; a node that has left or was never heard of is absent.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Up(String),
    Failed,
}

type ToldMap = BTreeMap<NodeId, Told>;

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<MemberEvent>,
    /// What the reader knows, and what it will know at the end of the queue.
    read: ToldMap,
    tail: ToldMap,
    closed: bool,
}

impl Queue {
    fn push(&mut self, event: MemberEvent) {
        if self.events.len() >= MAX_QUEUED_EVENTS {
            self.coalesce();
        }
        // Coalescing, perhaps the one just now, may have swallowed a Join together with the Failed after it. Then a Leave has
        // nothing to end.
        if !self.tail.contains_key(&event.node()) && !matches!(event, MemberEvent::Join { .. }) {
            return;
        }
        note(&mut self.tail, &event);
        self.events.push_back(event);
    }

    /// Replaces the queue by the shortest that leads to the same end: at most one event a node.
    fn coalesce(&mut self) {
        self.events.clear();
        let nodes: BTreeSet<NodeId> = self.read.keys().chain(self.tail.keys()).copied().collect();
        for node in nodes {
            let event = match (self.read.get(&node), self.tail.get(&node)) {
                (None | Some(Told::Failed), Some(Told::Up(addr))) => {
                    MemberEvent::Join { node, raft_addr: addr.clone() }
                }
                (Some(Told::Up(old)), Some(Told::Up(new))) if old != new => {
                    MemberEvent::Update { node, raft_addr: new.clone() }
                }
                (Some(Told::Up(_)), Some(Told::Failed)) => MemberEvent::Failed { node },
                (Some(_), None) => MemberEvent::Leave { node },
                (None, Some(Told::Failed)) => {
                    self.tail.remove(&node);
                    continue;
                }
                _ => continue,
            };
            self.events.push_back(event);
        }
    }

    fn pop(&mut self) -> Option<MemberEvent> {
        let event = self.events.pop_front()?;
        note(&mut self.read, &event);
        Some(event)
    }
}

fn note(map: &mut ToldMap, event: &MemberEvent) {
    match event {
        MemberEvent::Join { node, raft_addr } | MemberEvent::Update { node, raft_addr } => {
            map.insert(*node, Told::Up(raft_addr.clone()));
        }
        MemberEvent::Failed { node } => {
            map.insert(*node, Told::Failed);
        }
        MemberEvent::Leave { node } => {
            map.remove(node);
        }
    }
    // Failed nodes that never came back would pile up over months of changing ids. Forgetting one costs a later Leave.
    if map.len() > 2 * MAX_MEMBERS {
        map.retain(|_, told| matches!(told, Told::Up(_)));
    }
}

#[derive(Debug, Default)]
struct Channel {
    queue: Mutex<Queue>,
    notify: Notify,
}

impl Channel {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no panic while held")
    }
}

/// Membership events for one caller, independent of others. It never slows the service down: a reader that falls thousands of
/// events behind gets at most one event a node that leads to the same end.
#[derive(Debug)]
pub struct EventReceiver {
    channel: Arc<Channel>,
}

impl EventReceiver {
    /// The next event; `None` once gossip has stopped and all events were read. Cancel-safe.
    pub async fn recv(&mut self) -> Option<MemberEvent> {
        loop {
            {
                let mut queue = self.channel.lock();
                if let Some(event) = queue.pop() {
                    return Some(event);
                }
                if queue.closed {
                    return None;
                }
            }
            // A push in between leaves its permit behind, so nothing is missed.
            self.channel.notify.notified().await;
        }
    }

    /// The next event if one waits.
    pub fn try_recv(&mut self) -> Option<MemberEvent> {
        self.channel.lock().pop()
    }
}

#[derive(Debug, Default)]
struct EventHubState {
    /// Raft addresses of the present members: what a new reader is told first.
    present: BTreeMap<NodeId, String>,
    readers: Vec<Weak<Channel>>,
    closed: bool,
}

/// Hands events to all receivers. [`crate::Gossip`] has one of its own; a node whose gossip may be started anew keeps another
/// one for all runs.
#[derive(Debug, Default)]
pub struct EventHub {
    state: Mutex<EventHubState>,
}

impl EventHub {
    /// Events from now on, for this caller alone: first a Join for each present member, also after the end.
    pub fn subscribe(&self) -> EventReceiver {
        let mut state = self.state.lock().expect("no panic while held");
        let channel = Arc::new(Channel::default());
        {
            let mut queue = channel.lock();
            for (node, raft_addr) in &state.present {
                queue.push(MemberEvent::Join { node: *node, raft_addr: raft_addr.clone() });
            }
            queue.closed = state.closed;
        }
        state.readers.retain(|reader| reader.strong_count() > 0);
        state.readers.push(Arc::downgrade(&channel));
        EventReceiver { channel }
    }

    /// Hands events to everybody who listens. For every node they must form the sequence that [`MemberEvent`] describes.
    pub fn publish(&self, events: &[MemberEvent]) {
        if events.is_empty() {
            return;
        }
        let mut state = self.state.lock().expect("no panic while held");
        for event in events {
            match event {
                MemberEvent::Join { node, raft_addr } | MemberEvent::Update { node, raft_addr } => {
                    state.present.insert(*node, raft_addr.clone());
                }
                MemberEvent::Leave { node } | MemberEvent::Failed { node } => {
                    state.present.remove(node);
                }
            }
        }
        state.readers.retain(|reader| {
            let Some(channel) = reader.upgrade() else {
                return false;
            };
            let mut queue = channel.lock();
            events.iter().cloned().for_each(|event| queue.push(event));
            drop(queue);
            channel.notify.notify_one();
            true
        });
    }

    /// Ends all receivers once they have read what waits for them.
    pub fn close(&self) {
        let mut state = self.state.lock().expect("no panic while held");
        state.closed = true;
        for channel in state.readers.drain(..).filter_map(|reader| reader.upgrade()) {
            channel.lock().closed = true;
            channel.notify.notify_one();
        }
    }
}

/// News for the node's driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GossipUpdate {
    /// Another member claims to lead a shard in a term that was not known. Already in the tracker. (This node's own claims
    /// and those of NotLeader replies are known to whoever fed them.)
    Leader {
        /// The shard.
        shard: ShardId,
        /// Who leads it.
        leader: NodeId,
        /// In which term.
        term: Term,
        /// Placement epoch of the shard as the leader knows it.
        epoch: Epoch,
    },
    /// The node is dead, has left, or has begun a new life: what it led, it leads no more. The tracker has cleared its routes.
    Gone(NodeId),
    /// A member is new or something about it has changed.
    Member(Member),
    /// The node was dead or had left, and is no member any more: what a reader keeps of it is out of date.
    Forgotten(NodeId),
    /// The first update of every reader, and what one gets that fell behind: read all of [`crate::Gossip::members`] (those
    /// that are dead or left are gone) and [`crate::ShardLeaderTracker::entries`] instead of what was missed.
    Resync,
}

/// Updates for one reader; bounded.
#[derive(Debug)]
pub struct UpdateReceiver {
    updates: mpsc::Receiver<GossipUpdate>,
    resync: Arc<AtomicBool>,
}

impl UpdateReceiver {
    /// The next update; `None` once gossip has stopped and all were read. Cancel-safe.
    pub async fn recv(&mut self) -> Option<GossipUpdate> {
        if let Some(resync) = self.take_resync() {
            return Some(resync);
        }
        let update = self.updates.recv().await?;
        Some(self.take_resync().unwrap_or(update))
    }

    /// The next update if one waits.
    pub fn try_recv(&mut self) -> Option<GossipUpdate> {
        if let Some(resync) = self.take_resync() {
            return Some(resync);
        }
        let update = self.updates.try_recv().ok()?;
        Some(self.take_resync().unwrap_or(update))
    }

    /// State is written before the update about it is sent, so what waits now is covered by the reading that follows.
    fn take_resync(&mut self) -> Option<GossipUpdate> {
        if !self.resync.swap(false, Ordering::AcqRel) {
            return None;
        }
        for _ in 0..MAX_QUEUED_UPDATES {
            if self.updates.try_recv().is_err() {
                break;
            }
        }
        Some(GossipUpdate::Resync)
    }
}

/// The sending side of one reader: its queue, and whether it must look for itself.
type UpdateSender = (mpsc::Sender<GossipUpdate>, Arc<AtomicBool>);

/// Hands updates to all receivers.
#[derive(Debug, Default)]
pub(crate) struct UpdateHub {
    /// `None` once closed.
    readers: Mutex<Option<Vec<UpdateSender>>>,
}

impl UpdateHub {
    pub(crate) fn new() -> Self {
        UpdateHub { readers: Mutex::new(Some(Vec::new())) }
    }

    pub(crate) fn subscribe(&self) -> UpdateReceiver {
        let (sender, updates) = mpsc::channel(MAX_QUEUED_UPDATES);
        let resync = Arc::new(AtomicBool::new(true));
        // After closing, the sender is dropped here and the receiver ends after its first Resync.
        if let Some(readers) = self.readers.lock().expect("no panic while held").as_mut() {
            readers.retain(|(reader, _)| !reader.is_closed());
            readers.push((sender, resync.clone()));
        }
        UpdateReceiver { updates, resync }
    }

    pub(crate) fn publish(&self, update: &GossipUpdate) {
        let mut readers = self.readers.lock().expect("no panic while held");
        let Some(readers) = readers.as_mut() else {
            return;
        };
        readers.retain(|(sender, resync)| {
            if let Err(mpsc::error::TrySendError::Full(_)) = sender.try_send(update.clone()) {
                resync.store(true, Ordering::Release);
                // The reader may have emptied the queue just now and wait: then there is room for this, and it wakes.
                let _ = sender.try_send(GossipUpdate::Resync);
            }
            !sender.is_closed()
        });
    }

    pub(crate) fn close(&self) {
        *self.readers.lock().expect("no panic while held") = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    fn join(node: u64, addr: &str) -> MemberEvent {
        MemberEvent::Join { node: NodeId(node), raft_addr: addr.into() }
    }
    fn update(node: u64, addr: &str) -> MemberEvent {
        MemberEvent::Update { node: NodeId(node), raft_addr: addr.into() }
    }
    fn leave(node: u64) -> MemberEvent {
        MemberEvent::Leave { node: NodeId(node) }
    }
    fn failed(node: u64) -> MemberEvent {
        MemberEvent::Failed { node: NodeId(node) }
    }
    fn drain(receiver: &mut EventReceiver) -> Vec<MemberEvent> {
        std::iter::from_fn(|| receiver.try_recv()).collect()
    }

    #[test]
    fn a_new_reader_first_hears_of_present_members() {
        let hub = EventHub::default();
        let mut early = hub.subscribe();
        let story = [join(1, "a"), join(2, "b"), update(1, "c"), join(3, "d"), failed(2), leave(3)];
        hub.publish(&story);
        let mut late = hub.subscribe();
        hub.publish(&[join(2, "b")]);
        assert_eq!(drain(&mut early), [&story[..], &[join(2, "b")]].concat());
        assert_eq!(drain(&mut late), [join(1, "c"), join(2, "b")]);
    }

    #[test]
    fn a_lagging_reader_gets_the_shortest_way_to_the_same_end() {
        let hub = EventHub::default();
        let mut reader = hub.subscribe();
        hub.publish(&[join(1, "a"), join(2, "a"), join(3, "a"), join(4, "a"), failed(4), join(9, "a")]);
        drain(&mut reader);
        // Overflows the queue with changes that cancel each other out.
        hub.publish(&[
            update(1, "b"),
            failed(2),
            leave(3),
            join(4, "b"),
            join(5, "a"),
            join(6, "a"),
            failed(6),
            join(7, "a"),
            leave(7),
        ]);
        for _ in 0..MAX_QUEUED_EVENTS {
            hub.publish(&[failed(9), join(9, "a")]);
        }
        let mut ends = BTreeMap::<NodeId, Vec<MemberEvent>>::new();
        let rest = drain(&mut reader);
        assert!(rest.len() <= MAX_QUEUED_EVENTS);
        for event in rest {
            ends.entry(event.node()).or_default().push(event);
        }
        ends.remove(&NodeId(9));
        let expected = [update(1, "b"), failed(2), leave(3), join(4, "b"), join(5, "a")];
        assert_eq!(ends.into_values().collect::<Vec<_>>(), expected.map(|e| vec![e]));
        // Node 6 came and failed unseen; its Leave would end nothing.
        hub.publish(&[leave(6)]);
        assert_eq!(drain(&mut reader), []);
    }

    /// However a reader lags, it hears a well-formed story that ends where all others end.
    #[test]
    fn random_stories_stay_well_formed() {
        let mut rng = Rng::from_clock();
        let hub = EventHub::default();
        let mut reader = hub.subscribe();
        let (mut truth, mut heard): (ToldMap, ToldMap) = Default::default();
        for _ in 0..30_000 {
            let node = 1 + rng.below(50);
            let event = match (truth.get(&NodeId(node)), rng.below(3)) {
                (None | Some(Told::Failed), 0 | 1) => join(node, if rng.below(2) == 0 { "a" } else { "b" }),
                (Some(Told::Up(addr)), 0) => update(node, if addr == "a" { "b" } else { "a" }),
                (Some(Told::Up(_)), 1) => failed(node),
                (Some(_), 2) => leave(node),
                _ => continue,
            };
            note(&mut truth, &event);
            hub.publish(&[event]);
            if rng.below(8_000) == 0 {
                for event in drain(&mut reader) {
                    match (&event, heard.get(&event.node())) {
                        (MemberEvent::Join { .. }, None | Some(Told::Failed)) => {}
                        (MemberEvent::Update { raft_addr, .. }, Some(Told::Up(old))) => {
                            assert_ne!(raft_addr, old)
                        }
                        (MemberEvent::Failed { .. }, Some(Told::Up(_))) | (MemberEvent::Leave { .. }, Some(_)) => {}
                        (event, told) => panic!("{event:?} after {told:?}"),
                    }
                    note(&mut heard, &event);
                }
                let up = |map: &ToldMap| {
                    map.iter().filter(|(_, t)| **t != Told::Failed).map(|(n, t)| (*n, t.clone())).collect::<ToldMap>()
                };
                assert_eq!(up(&heard), up(&truth));
            }
        }
    }

    #[tokio::test]
    async fn receivers_wait_and_end() {
        let hub = Arc::new(EventHub::default());
        let mut reader = hub.subscribe();
        let publisher = hub.clone();
        let task = tokio::spawn(async move {
            publisher.publish(&[join(1, "a")]);
            publisher.close();
        });
        assert_eq!(reader.recv().await, Some(join(1, "a")));
        assert_eq!(reader.recv().await, None);
        task.await.unwrap();
        let mut afterwards = hub.subscribe();
        assert_eq!(afterwards.recv().await, Some(join(1, "a")));
        assert_eq!(afterwards.recv().await, None);
    }

    #[tokio::test]
    async fn an_update_reader_that_lags_is_told_to_resync() {
        let hub = UpdateHub::new();
        let mut reader = hub.subscribe();
        assert_eq!(reader.recv().await, Some(GossipUpdate::Resync));
        hub.publish(&GossipUpdate::Gone(NodeId(1)));
        assert_eq!(reader.recv().await, Some(GossipUpdate::Gone(NodeId(1))));
        for _ in 0..=MAX_QUEUED_UPDATES {
            hub.publish(&GossipUpdate::Gone(NodeId(2)));
        }
        assert_eq!(reader.recv().await, Some(GossipUpdate::Resync));
        assert_eq!(reader.try_recv(), None);
        hub.publish(&GossipUpdate::Gone(NodeId(3)));
        assert_eq!(reader.try_recv(), Some(GossipUpdate::Gone(NodeId(3))));
        hub.close();
        assert_eq!(reader.recv().await, None);
        assert_eq!(hub.subscribe().recv().await, Some(GossipUpdate::Resync));
    }
}
