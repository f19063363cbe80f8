//! Looks up the names of seeds and contacts seeds, and says when none is found or answers.

use super::{Shared, until};
use crate::config::Seeds;
use crate::resolve::{MAX_SRV_ADDRS, RESOLVE_LIMIT, Target, lookup_targets};
use crate::seed::SeedAddr;
use crate::transport::Hooks;
use crate::view::MemberState;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

/// Seed names are looked up again this often, and sooner while one of them has never been found.
const RESOLVE_PERIOD: Duration = Duration::from_secs(15);
const RESOLVE_RETRY: Duration = Duration::from_secs(1);
/// A node that knows live peers still contacts a seed this often, so that parts of a cluster that forgot each other merge.
const SEED_PERIOD: Duration = Duration::from_secs(15);
/// After so long without hearing of anybody alive a node says that its seeds do not answer.
pub(super) const SILENCE: Duration = Duration::from_secs(30);
/// Most addresses that it names then.
const SHOWN_SEEDS: usize = 8;
/// Most addresses of one seed name.
const MAX_SEED_ADDRS: usize = MAX_SRV_ADDRS;

/// Looks up seed names and contacts seeds that chitchat does not know: each period while this node is alone, seldom later.
pub(super) async fn seed_loop(shared: Arc<Shared>, seeds: Seeds, period: Duration, hooks: Hooks) {
    let mut stop = shared.stop.subscribe();
    let mut health = shared.healthy.subscribe();
    let mut ticks = interval(period.max(Duration::from_millis(100)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut names = Names::default();
    let (mut resolve_at, mut contact_at) = (Instant::now(), Instant::now());
    let ipv4 = shared.handle.chitchat_id().gossip_advertise_addr.is_ipv4();
    let own = shared.handle.chitchat_id().gossip_advertise_addr;
    let (mut turn, mut silence) = (0_usize, Silence::default());
    loop {
        tokio::select! {
            () = until(&mut stop, true) => return,
            () = until(&mut health, false) => return,
            _ = ticks.tick() => {}
        }
        if !seeds.names.is_empty() && resolve_at <= Instant::now() {
            tokio::select! {
                () = until(&mut stop, true) => return,
                () = names.resolve(&seeds.names, ipv4, hooks.dns) => {}
            }
            let retry = names.known.len() < seeds.names.len();
            let wait = hooks.resolve_period.unwrap_or(if retry { RESOLVE_RETRY } else { RESOLVE_PERIOD });
            resolve_at = Instant::now() + wait;
        }
        let alone = {
            let members = shared.members.lock().expect("no panic while held");
            !members.iter().any(|m| m.meta.node_id != shared.this && m.state == MemberState::Alive)
        };
        let asked = || seeds.addrs.iter().copied().chain(names.addrs()).filter(|addr| *addr != own);
        match silence.look(alone && asked().next().is_some(), Instant::now()) {
            Some(true) => {
                let seeds: BTreeSet<_> = asked().take(SHOWN_SEEDS).map(|addr| addr.to_string()).collect();
                let seeds = seeds.into_iter().collect::<Vec<_>>().join(" ");
                tracing::warn!(
                    seeds,
                    "no gossip seed has answered for {} s: they do not run, or a firewall stops UDP or TCP on the way",
                    SILENCE.as_secs()
                );
            }
            Some(false) => tracing::info!("gossip hears of others now"),
            None => {}
        }
        if !alone && Instant::now() < contact_at {
            continue;
        }
        let mut targets: Vec<SocketAddr> = names.addrs().filter(|a| *a != own).collect();
        targets.sort_unstable();
        targets.dedup();
        if targets.is_empty() {
            continue;
        }
        let _ = shared.handle.gossip(targets[turn % targets.len()]);
        turn = turn.wrapping_add(1);
        contact_at = Instant::now() + SEED_PERIOD;
    }
}

/// Since when nobody is heard, so that it is told once.
#[derive(Debug, Default)]
pub(super) struct Silence {
    since: Option<Instant>,
    told: bool,
}

impl Silence {
    /// Returns whether there is silence if that is to be told now: once when it has lasted, and then when it has ended.
    pub(super) fn look(&mut self, silent: bool, now: Instant) -> Option<bool> {
        if !silent {
            return std::mem::take(self).told.then_some(false);
        }
        let lasts = now - *self.since.get_or_insert(now) >= SILENCE;
        (lasts && !std::mem::replace(&mut self.told, lasts)).then_some(true)
    }
}

/// What the seed names have led to.
#[derive(Default)]
pub(super) struct Names {
    /// Of each name its targets, the best first, with their addresses as they were found last. A host is its own only target.
    known: HashMap<SeedAddr, Vec<(String, Vec<SocketAddr>)>>,
    /// The names that are not found now: neither that nor their return is told at every retry.
    missing: HashSet<SeedAddr>,
}

impl Names {
    /// Looks all names up at once.
    pub(super) async fn resolve(&mut self, names: &[SeedAddr], ipv4: bool, dns: Option<SocketAddr>) {
        let mut lookups = JoinSet::new();
        for seed in names.iter().cloned() {
            lookups.spawn(async move {
                let found = lookup(&seed, dns).await;
                (seed, found)
            });
        }
        while let Some(lookup) = lookups.join_next().await {
            match lookup {
                Ok((seed, found)) => {
                    let found = found.and_then(|targets| self.take(&seed, targets, ipv4));
                    self.tell(seed, found);
                }
                Err(error) => tracing::error!(%error, "a lookup of a gossip seed panicked"),
            }
        }
    }

    pub(super) fn tell(&mut self, seed: SeedAddr, found: Result<(), String>) {
        match found {
            Ok(()) => {
                if self.missing.remove(&seed) {
                    tracing::info!(%seed, "this gossip seed is found now");
                }
            }
            Err(reason) if self.missing.insert(seed.clone()) => {
                tracing::warn!(%seed, reason, "this gossip seed is not found; it is looked up again until it is");
            }
            Err(reason) => tracing::debug!(%seed, reason, "gossip seed still not found"),
        }
    }

    /// A target that is not found now keeps the addresses that it had, and so does a name all of whose targets are new and not
    /// found. Errors: none was found, of the socket's family at least.
    pub(super) fn take(&mut self, seed: &SeedAddr, targets: Vec<Target>, ipv4: bool) -> Result<(), String> {
        let before = self.known.get(seed).map_or(&[][..], Vec::as_slice);
        let (mut now, mut room) = (Vec::with_capacity(targets.len()), MAX_SEED_ADDRS);
        let family = if ipv4 { "IPv4" } else { "IPv6" };
        let mut outcome = Err("it has no targets".to_owned());
        for Target { name, addrs } in targets {
            let mut addrs = addrs.unwrap_or_else(|reason| {
                tracing::debug!(%seed, target = name, reason, "gossip seed: a target is not found; kept as it was");
                outcome = outcome.clone().or(Err(reason));
                Vec::new()
            });
            if !addrs.is_empty() {
                addrs.retain(|addr| addr.is_ipv4() == ipv4);
                let none = || Err(format!("it has no {family} address"));
                outcome = outcome.or_else(|_| if addrs.is_empty() { none() } else { Ok(()) });
            }
            if addrs.is_empty() {
                let kept = before.iter().find(|(known, _)| *known == name);
                addrs = kept.map_or_else(Vec::new, |(_, addrs)| addrs.clone());
            }
            addrs.truncate(room);
            if !addrs.is_empty() {
                room -= addrs.len();
                now.push((name, addrs));
            }
        }
        if !now.is_empty() {
            self.known.insert(seed.clone(), now);
        }
        outcome
    }

    /// All addresses that were found.
    pub(super) fn addrs(&self) -> impl Iterator<Item = SocketAddr> {
        self.known.values().flatten().flat_map(|(_, addrs)| addrs).copied()
    }
}

pub(super) async fn lookup(seed: &SeedAddr, dns: Option<SocketAddr>) -> Result<Vec<Target>, String> {
    let addrs = match seed {
        SeedAddr::Ip(addr) => Ok(vec![*addr]),
        // The system's own lookup, which knows more than DNS.
        SeedAddr::Host { host, port } => {
            match timeout(RESOLVE_LIMIT, tokio::net::lookup_host((host.as_str(), *port))).await {
                Ok(found) => found.map(Iterator::collect).map_err(|error| error.to_string()),
                Err(_) => Err("the lookup takes too long".to_owned()),
            }
        }
        SeedAddr::Srv(name) => return lookup_targets(name, dns).await.map_err(|error| error.to_string()),
    };
    Ok(vec![Target { name: seed.to_string(), addrs }])
}
