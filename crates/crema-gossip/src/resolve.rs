//! SRV records, which the system's own lookup cannot ask for: from a name to the addresses of its targets.
//!
//! ```text
//!   srv:_crema._udp.example --SRV--> crema-0.example port 8001, crema-1.example port 8001 --A, AAAA--> addresses
//! ```
//!
//! The name servers are the system's, read anew for each lookup. Nothing is cached here: names are asked for every 15 seconds,
//! or every second until they are found, and what a name server says now is what counts.

use crate::seed::{SeedAddr, SeedError, check_srv_name};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;
use hickory_resolver::proto::rr::rdata::SRV;
use std::cmp::Reverse;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

/// Most targets of one SRV name, and most addresses that come of it.
pub(crate) const MAX_SRV_ADDRS: usize = 64;
/// Most time for one lookup with all that belongs to it.
pub(crate) const RESOLVE_LIMIT: Duration = Duration::from_secs(5);

/// Why an SRV name leads nowhere.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    /// Not an SRV name: correct it.
    #[error(transparent)]
    Name(#[from] SeedError),
    /// The system's name servers are not known: see `/etc/resolv.conf`.
    #[error("the system's DNS configuration cannot be used: {0}")]
    System(String),
    /// There is no answer: try again later.
    #[error("{name}: {reason}")]
    Lookup {
        /// What was asked for.
        name: String,
        /// What came of it.
        reason: String,
    },
}

/// The addresses behind an SRV name such as `_crema._tcp.cluster.local` (with or without `srv:` before it), best priority
/// first, at most 64, within five seconds. Targets whose address is not found are left out.
///
/// Errors: see [`ResolveError`]; no address at all is one.
pub async fn resolve_srv(name: &str) -> Result<Vec<SeedAddr>, ResolveError> {
    let name = name.strip_prefix("srv:").unwrap_or(name);
    let addrs = lookup_srv(name, None).await?;
    Ok(addrs.into_iter().map(SeedAddr::from).collect())
}

/// One target of an SRV name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Its name and port.
    pub(crate) name: String,
    /// Its addresses with that port, or why there are none.
    pub(crate) addrs: Result<Vec<SocketAddr>, String>,
}

/// As [`resolve_srv`]; asks `server` alone if it is given.
async fn lookup_srv(name: &str, server: Option<SocketAddr>) -> Result<Vec<SocketAddr>, ResolveError> {
    let (mut addrs, mut reason) = (Vec::new(), String::new());
    for target in lookup_targets(name, server).await? {
        match target.addrs {
            Ok(some) => addrs.extend(some),
            Err(why) => reason = why,
        }
    }
    addrs.truncate(MAX_SRV_ADDRS);
    if addrs.is_empty() { Err(ResolveError::Lookup { name: name.to_owned(), reason }) } else { Ok(addrs) }
}

/// The targets of an SRV name, at least one and at most 64, the best first, within five seconds. One whose address is not
/// found by then says so and leaves the others as they are. Asks `server` alone if it is given.
pub(crate) async fn lookup_targets(name: &str, server: Option<SocketAddr>) -> Result<Vec<Target>, ResolveError> {
    check_srv_name(name).map_err(|reason| SeedError { seed: crate::keys::shorten(&format!("srv:{name}")), reason })?;
    let failed = |reason: String| ResolveError::Lookup { name: name.to_owned(), reason };
    let late = || format!("no answer within {} s", RESOLVE_LIMIT.as_secs());
    let deadline = Instant::now() + RESOLVE_LIMIT;
    let resolver = resolver(server)?;
    let found = timeout_at(deadline, resolver.srv_lookup(name)).await.map_err(|_| failed(late()))?;
    let found = found.map_err(|error| failed(error.to_string()))?;
    let records = found.answers().iter().filter_map(|record| match &record.data {
        RData::SRV(srv) => Some(srv.clone()),
        _ => None,
    });
    let chosen = choose(records.collect());
    let mut targets: Vec<Target> =
        chosen.iter().map(|srv| Target { name: format!("{}:{}", srv.target, srv.port), addrs: Err(late()) }).collect();
    let mut lookups = JoinSet::new();
    for (at, srv) in chosen.into_iter().enumerate() {
        let resolver = resolver.clone();
        lookups.spawn(async move {
            let ips = resolver.lookup_ip(srv.target.clone()).await;
            (at, ips.map(|ips| ips.iter().map(|ip| SocketAddr::new(ip, srv.port)).collect::<Vec<_>>()))
        });
    }
    // A lookup that panics, which none should, leaves its target without an answer.
    while let Ok(Some(lookup)) = timeout_at(deadline, lookups.join_next()).await {
        if let Ok((at, addrs)) = lookup {
            targets[at].addrs = addrs.map_err(|error| error.to_string()).map(|mut addrs| {
                addrs.sort_unstable();
                addrs.dedup();
                addrs
            });
        }
    }
    if targets.is_empty() { Err(failed("it has no targets".to_owned())) } else { Ok(targets) }
}

/// Of more targets than are looked up, always the same: the order of a name server's answer changes from one to the next.
fn choose(mut targets: Vec<SRV>) -> Vec<SRV> {
    // The root as target means that there is no such service.
    targets.retain(|srv| !srv.target.is_root() && srv.port != 0);
    targets.sort_by(|a, b| {
        let rank = |srv: &SRV| (srv.priority, Reverse(srv.weight));
        rank(a).cmp(&rank(b)).then_with(|| a.target.cmp(&b.target)).then(a.port.cmp(&b.port))
    });
    targets.truncate(MAX_SRV_ADDRS);
    targets
}

fn resolver(server: Option<SocketAddr>) -> Result<TokioResolver, ResolveError> {
    let system = |error: hickory_resolver::net::NetError| ResolveError::System(error.to_string());
    let mut builder = match server {
        None => TokioResolver::builder_tokio().map_err(system)?,
        Some(addr) => {
            let mut name_server = NameServerConfig::udp(addr.ip());
            name_server.connections.iter_mut().for_each(|connection| connection.port = addr.port());
            let config = ResolverConfig::from_name_servers(vec![name_server]);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        }
    };
    let options = builder.options_mut();
    options.cache_size = 0;
    options.positive_max_ttl = Some(Duration::ZERO);
    options.negative_max_ttl = Some(Duration::ZERO);
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.timeout = options.timeout.min(Duration::from_secs(2));
    builder.build().map_err(system)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeDns;
    use hickory_resolver::proto::rr::Name;

    const NAME: &str = "_crema._udp.example";

    fn addrs(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[tokio::test]
    async fn targets_become_addresses_best_priority_first() {
        let dns = FakeDns::start().await;
        let server = Some(dns.addr);
        dns.srv(
            NAME,
            &[(20, 8002, "two.example."), (10, 8001, "one.example."), (30, 8003, "gone.example."), (5, 1, ".")],
        );
        dns.host("one.example", &["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()]);
        dns.host("two.example", &["10.0.0.2".parse().unwrap()]);
        let expected = addrs(&["10.0.0.1:8001", "[fd00::1]:8001", "10.0.0.2:8002"]);
        assert_eq!(lookup_srv(NAME, server).await.unwrap(), expected);
        // Nothing is remembered, whatever the answer's time to live was.
        dns.srv(NAME, &[(1, 9000, "two.example.")]);
        assert_eq!(lookup_srv(NAME, server).await.unwrap(), addrs(&["10.0.0.2:9000"]));
        dns.host("two.example", &["10.0.0.3".parse().unwrap()]);
        assert_eq!(lookup_srv(NAME, server).await.unwrap(), addrs(&["10.0.0.3:9000"]));
    }

    #[test]
    fn of_many_targets_the_same_are_chosen_in_whatever_order_they_come() {
        let name = |text: &str| Name::from_ascii(text).unwrap();
        let mut all: Vec<SRV> = (0..2 * MAX_SRV_ADDRS as u16)
            .map(|i| SRV::new(10, i % 2, 8001, name(&format!("h{i:03}.example."))))
            .collect();
        all.push(SRV::new(20, 9, 8001, name("late.example.")));
        all.push(SRV::new(5, 0, 8001, name("first.example.")));
        all.extend([SRV::new(1, 0, 8001, Name::root()), SRV::new(1, 0, 0, name("portless.example."))]);
        let chosen = choose(all.clone());
        let mut rng = crate::testing::Rng::from_clock();
        for _ in 0..20 {
            rng.keep_random(&mut all, usize::MAX);
            assert_eq!(choose(all.clone()), chosen);
        }
        let names: Vec<String> = chosen.iter().map(|srv| srv.target.to_string()).collect();
        let heavy = (0..MAX_SRV_ADDRS - 1).map(|i| format!("h{:03}.example.", 2 * i + 1));
        assert_eq!(names, std::iter::once("first.example.".to_owned()).chain(heavy).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn what_leads_nowhere_is_an_error() {
        let dns = FakeDns::start().await;
        let server = Some(dns.addr);
        assert!(matches!(lookup_srv(NAME, server).await, Err(ResolveError::Lookup { .. })));
        dns.srv(NAME, &[(1, 9000, "gone.example.")]);
        assert!(matches!(lookup_srv(NAME, server).await, Err(ResolveError::Lookup { .. })));
        dns.set_broken(true);
        let message = lookup_srv(NAME, server).await.unwrap_err().to_string();
        assert!(message.contains(NAME), "{message}");
        assert!(matches!(resolve_srv("srv:crema").await, Err(ResolveError::Name(_))));
        assert!(matches!(resolve_srv("crema.example").await, Err(ResolveError::Name(_))));
    }
}
