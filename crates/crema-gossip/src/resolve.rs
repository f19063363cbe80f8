//! SRV records, which the system's own lookup cannot ask for: from a name to the addresses of its targets.
//!
//! ```text
//!   srv:_crema._udp.example --SRV--> crema-0.example port 8001, crema-1.example port 8001 --A, AAAA--> addresses
//! ```
//!
//! The name servers are the system's, read anew for each lookup. Nothing is cached here: names are asked for every 15 seconds
//! at most, and what a name server says now is what counts.

use crate::seed::{SeedAddr, SeedError, check_srv_name};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::timeout;

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

/// As [`resolve_srv`]; asks `server` alone if it is given.
pub(crate) async fn lookup_srv(name: &str, server: Option<SocketAddr>) -> Result<Vec<SocketAddr>, ResolveError> {
    check_srv_name(name).map_err(|reason| SeedError { seed: crate::keys::shorten(&format!("srv:{name}")), reason })?;
    let failed = |reason: String| ResolveError::Lookup { name: name.to_owned(), reason };
    match timeout(RESOLVE_LIMIT, lookup(name, server)).await {
        Ok(found) => found,
        Err(_) => Err(failed(format!("no answer within {} s", RESOLVE_LIMIT.as_secs()))),
    }
}

async fn lookup(name: &str, server: Option<SocketAddr>) -> Result<Vec<SocketAddr>, ResolveError> {
    let failed = |reason: String| ResolveError::Lookup { name: name.to_owned(), reason };
    let resolver = resolver(server)?;
    let found = resolver.srv_lookup(name).await.map_err(|error| failed(error.to_string()))?;
    let mut targets: Vec<_> = found
        .answers()
        .iter()
        .filter_map(|record| match &record.data {
            // The root as target means that there is no such service.
            RData::SRV(srv) if !srv.target.is_root() && srv.port != 0 => Some(srv.clone()),
            _ => None,
        })
        .take(MAX_SRV_ADDRS)
        .collect();
    targets.sort_by_key(|srv| (srv.priority, std::cmp::Reverse(srv.weight)));
    let mut lookups = JoinSet::new();
    for (at, srv) in targets.into_iter().enumerate() {
        let resolver = resolver.clone();
        lookups.spawn(async move {
            let ips = resolver.lookup_ip(srv.target.clone()).await;
            (at, ips.map(|ips| ips.iter().map(|ip| SocketAddr::new(ip, srv.port)).collect::<Vec<_>>()))
        });
    }
    let (mut addrs, mut reason) = (Vec::new(), "it has no targets".to_owned());
    while let Some(lookup) = lookups.join_next().await {
        match lookup {
            Ok((at, Ok(some))) => addrs.extend(some.into_iter().map(|addr| (at, addr))),
            Ok((_, Err(error))) => reason = error.to_string(),
            Err(error) => reason = error.to_string(),
        }
    }
    // In the order of the targets, whichever answer came first.
    addrs.sort_unstable();
    let mut addrs: Vec<_> = addrs.into_iter().map(|(_, addr)| addr).collect();
    addrs.dedup();
    addrs.truncate(MAX_SRV_ADDRS);
    if addrs.is_empty() { Err(failed(reason)) } else { Ok(addrs) }
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
