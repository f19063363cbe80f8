//! What a node follows while it runs: who calls, the file of keys, what its driver reports, and whether it is registered.

use super::Watch;
use crate::admin::MemberBody;
use crate::disk::DataDir;
use crate::driver::NodeEvent;
use crate::memberlist::GossipTuning;
use crate::membership::{AddressBook, Membership, update_addresses};
use crate::peers::PeersHandle;
use crema_gossip::{GossipError, KeyRing};
use crema_shard::meta::NO_LIFE;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long an id may be in use by another process before this one gives up.
pub(super) const ID_IN_USE_PATIENCE: Duration = Duration::from_secs(10);
/// Refusals that lie further apart than this do not belong together.
pub(super) const ID_IN_USE_GAP: Duration = Duration::from_secs(3);
/// Period at which an unregistered node looks whether it is registered by now, or who is in its place.
pub(super) const REGISTRATION_LOOK: Duration = Duration::from_secs(2);
/// Most bytes of another node's list of members.
const MAX_MEMBERS_BYTES: usize = 4 << 20;

/// Lets nodes be reached that have connected to this one.
pub(super) async fn follow_callers(book: Arc<Mutex<AddressBook>>, peers: PeersHandle) {
    let mut callers = peers.callers();
    loop {
        let present = callers.borrow_and_update().clone();
        update_addresses(&book, &peers, |book| book.set_callers(present));
        if callers.changed().await.is_err() {
            return;
        }
    }
}

/// Replaces the cluster's keys wherever they are used.
///
/// Errors: gossip does not take them, see [`Membership::set_keys`].
pub(super) fn set_keys(membership: Option<&Membership>, peers: &PeersHandle, ring: KeyRing) -> Result<(), GossipError> {
    peers.set_keys(ring.clone());
    membership.map_or(Ok(()), |membership| membership.set_keys(ring))
}

/// Takes the cluster's keys from their file again whenever that changes; looks each `period`.
pub(super) async fn follow_keys(
    path: PathBuf,
    membership: Option<Arc<Membership>>,
    peers: PeersHandle,
    period: Duration,
) {
    let mut known = None;
    let mut look = tokio::time::interval(period);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let path = path.clone();
        let read = tokio::task::spawn_blocking(move || crate::config::read_keys(&path)).await;
        let Ok(read) = read else { continue };
        let found = read.map(|ring| (ring.primary(), ring.ids().collect::<Vec<_>>(), ring));
        match found {
            // Told once; what was read last stays in force.
            Err(error) if known != Some(Err(error.clone())) => {
                tracing::error!(%error, "the cluster's keys were not read again");
                known = Some(Err(error));
            }
            Err(_) => {}
            Ok((primary, ids, ring)) if known != Some(Ok((primary, ids.clone()))) => {
                if let Err(error) = set_keys(membership.as_deref(), &peers, ring) {
                    tracing::error!(%error, "gossip does not take the cluster's keys");
                }
                if known.is_some() {
                    let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
                    tracing::info!(%primary, keys = ids.join(" "), "the cluster's keys have changed");
                }
                known = Some(Ok((primary, ids)));
            }
            Ok(_) => {}
        }
    }
}

/// Acts on what the driver reports.
pub(super) async fn follow_events(
    watch: Arc<Watch>,
    mut events: mpsc::Receiver<NodeEvent>,
    data_dir: Option<Arc<Mutex<DataDir>>>,
    (book, peers): (Arc<Mutex<AddressBook>>, PeersHandle),
) {
    let (mut in_use, mut rival): (Option<IdInUse>, Option<IdInUse>) = (None, None);
    let node = watch.facts.node;
    while let Some(event) = events.recv().await {
        match event {
            NodeEvent::Joined { uuid, generation, founded } => {
                let how = if founded { "founded" } else { "joined" };
                tracing::debug!("node {node} has {how} cluster {} {uuid}", watch.facts.cluster);
                if let Some(dir) = data_dir.clone() {
                    let kept = tokio::task::spawn_blocking(move || {
                        dir.lock().unwrap_or_else(std::sync::PoisonError::into_inner).set_cluster(uuid.0, generation)
                    });
                    match kept.await {
                        Ok(Ok(())) => {}
                        Ok(Err(e)) => watch.fail(e.to_string(), true),
                        Err(e) => watch.fail(format!("the cluster's identity cannot be kept: {e}"), false),
                    }
                }
            }
            NodeEvent::Admit(node) => update_addresses(&book, &peers, |book| book.admit(node)),
            NodeEvent::Fenced { by, told_by } => {
                let told_by = told_by.map_or(String::new(), |peer| format!(" (says node {peer})"));
                let reason = match by {
                    // By the word of an operator: a directory that is opened again would go on with the same life.
                    Some(NO_LIFE) => format!(
                        "a recovery has declared this life of node {node} over{told_by}: this process ends. Move its data \
                         directory away, if it has one, and start it again"
                    ),
                    by => {
                        let by = by.map_or(String::new(), |by| format!(", life {by}"));
                        format!("a newer process with node id {node}{by}, has taken over{told_by}: this one ends")
                    }
                };
                watch.fail(reason, false);
            }
            NodeEvent::Misfit(reason) => {
                watch.fail(format!("this node's configuration does not fit the cluster: {reason}"), true);
            }
            NodeEvent::IdInUse { by } if by == watch.incarnation => {
                // The refusal was meant for another process that asked under our id, but reached us.
                let refused = IdInUse::again(rival, Instant::now());
                if refused.first == refused.last {
                    tracing::warn!("another process has asked to take node id {node} over and was refused");
                }
                rival = Some(refused);
            }
            NodeEvent::IdInUse { by } => {
                let refused = IdInUse::again(in_use, Instant::now());
                if refused.first == refused.last {
                    tracing::warn!("node id {node} is in use by a living process, life {by}; trying again for a while");
                }
                if refused.last - refused.first >= ID_IN_USE_PATIENCE {
                    watch.fail(watch.id_in_use(&by.to_string()), true);
                }
                in_use = Some(refused);
            }
            NodeEvent::Drained => drop(watch.drained.send_replace(true)),
            NodeEvent::DiskFailed(why) => watch.fail(format!("the disk failed, so this node ends: {why}"), false),
            NodeEvent::DriverDied => watch.fail("an internal error has ended this node's driver".to_owned(), false),
        }
    }
}

/// A series of refusals because the id is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IdInUse {
    pub(super) first: Instant,
    pub(super) last: Instant,
}

impl IdInUse {
    /// The series with one more refusal at `now`; a long gap begins a new one.
    pub(super) fn again(series: Option<IdInUse>, now: Instant) -> IdInUse {
        match series {
            Some(series) if now - series.last <= ID_IN_USE_GAP => IdInUse { last: now, ..series },
            _ => IdInUse { first: now, last: now },
        }
    }
}

/// Notices that this life is kept from registering by another process under its id. The refusal itself, like all that
/// is sent to this id, goes to the life that is registered, so this node has to ask the others whom they are connected to.
///
/// Where they have no HTTP there is gossip, which counts one process of each id. A life that is registered knows it by its table,
/// and starts its gossip anew above any other, see [`crate::membership`]: so a life that stays overtaken is not the one that is
/// registered, unless it belongs to a cluster from before and has not learned yet how that stands. Such a one (`returns`) says
/// what it hears, and waits. `overtaken_patience` is long enough for gossip to notice that a process of before has ended.
pub(super) async fn watch_registration(watch: Arc<Watch>, returns: bool, overtaken_patience: Duration) {
    let mut look = tokio::time::interval(REGISTRATION_LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut place = TakenPlace::default();
    // The first tick is immediate, when nothing can have happened yet.
    look.tick().await;
    loop {
        look.tick().await;
        let view = watch.driver.view();
        let registered = view.nodes.get(&watch.facts.node);
        let (rival, patience) = if registered.is_some_and(|route| route.incarnation == watch.incarnation) {
            (None, None)
        } else if let Some(life) = find_rival(&watch).await {
            (Some(life), Some(ID_IN_USE_PATIENCE))
        } else {
            (overtaken_by(&watch), (!returns).then_some(overtaken_patience))
        };
        watch.set_rival(rival.as_deref());
        let Some(rival) = rival else {
            place = TakenPlace::default();
            continue;
        };
        let now = Instant::now();
        if place.is_new_by(&rival, now) {
            let node = watch.facts.node;
            tracing::warn!(
                "node id {node} is in use by another living process, life {rival}; trying again for a while"
            );
        }
        if place.is_lost(patience, now) {
            watch.fail(watch.id_in_use(&rival), true);
            return;
        }
    }
}

/// By which life, and since when, this one's place is taken.
#[derive(Debug, Default)]
pub(super) struct TakenPlace(Option<(String, Instant)>);

impl TakenPlace {
    /// Takes note that it is by `life`; returns whether that is news.
    pub(super) fn is_new_by(&mut self, life: &str, now: Instant) -> bool {
        let known = self.0.as_ref().is_some_and(|(known, _)| known == life);
        if !known {
            self.0 = Some((life.to_owned(), now));
        }
        !known
    }

    /// Whether it has lasted as long as `patience`; without an end to that, never.
    pub(super) fn is_lost(&self, patience: Option<Duration>, now: Instant) -> bool {
        self.0.as_ref().zip(patience).is_some_and(|((_, since), patience)| now - *since >= patience)
    }
}

/// The other life under this id that gossip hears in this one's place.
pub(super) fn overtaken_by(watch: &Watch) -> Option<String> {
    let life = watch.membership.as_ref()?.gossip().overtaken_by()?;
    // A life outlasts its process if its log is on disk: this would be its own trace.
    (life != watch.incarnation).then(|| life.to_string())
}

/// How long gossip of this pace may take a process for living that has ended, twice over.
pub(super) fn overtaken_patience(tuning: &GossipTuning) -> Duration {
    (tuning.interval.mul_f64(tuning.phi) * 2).max(ID_IN_USE_PATIENCE)
}

/// The other life under this id to which a member of the cluster is connected, if one says so.
pub(super) async fn find_rival(watch: &Watch) -> Option<String> {
    let this = watch.facts.node;
    let members = watch.membership.as_ref()?.gossip().members();
    let others = members.into_iter().filter(|m| m.meta.node_id != this && m.state.is_present());
    for addr in others.filter_map(|m| m.meta.http_addr).take(3) {
        // Without keys anybody may have made that address up.
        let password = watch.password.clone().filter(|_| watch.keyed);
        let door = crate::cli::Door { addr, password };
        let asked = tokio::task::spawn_blocking(move || crate::cli::http_get(&door, "/v1/members", MAX_MEMBERS_BYTES));
        let Ok(Ok((200, body))) = asked.await else {
            continue;
        };
        let Ok(members) = serde_json::from_str::<Vec<MemberBody>>(&body) else {
            continue;
        };
        let entry = members.into_iter().find(|m| m.node_id == this.0 && m.connected);
        let rival = entry.and_then(|m| m.registered).filter(|life| *life != watch.facts.incarnation);
        if rival.is_some() {
            return rival;
        }
    }
    None
}
