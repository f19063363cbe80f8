//! Where a node looks for the cluster: an address, a host, or a service record of DNS.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// Longest name in DNS, in bytes.
const MAX_NAME_BYTES: usize = 253;
const SRV_PREFIX: &str = "srv:";

/// A gossip address of another node, as the configuration names it.
///
/// As text: `10.0.0.1:8000`, `[fd00::1]:8000`, `crema-headless:8000` or `srv:_crema._udp.example` (`_tcp` likewise).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SeedAddr {
    /// One address.
    Ip(SocketAddr),
    /// A name whose addresses, all of them, are seeds. It is looked up again every 15 s.
    Host {
        /// The name.
        host: String,
        /// The UDP port of gossip, from 1 on.
        port: u16,
    },
    /// A name whose SRV records name hosts and ports, without the `srv:` before it.
    Srv(String),
}

/// A text that names no seed. Correct it; the message says what is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("seed {seed:?}: {reason}")]
pub struct SeedError {
    /// The text, shortened.
    pub seed: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl From<SocketAddr> for SeedAddr {
    fn from(addr: SocketAddr) -> Self {
        SeedAddr::Ip(addr)
    }
}

impl FromStr for SeedAddr {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What is not understood may be long; the message need not be.
        let refuse = |reason| Err(SeedError { seed: text.chars().take(64).collect(), reason });
        if let Some(name) = text.strip_prefix(SRV_PREFIX) {
            return match is_service(name) {
                true => Ok(SeedAddr::Srv(name.to_owned())),
                false => refuse("expected srv:_service._udp.name or srv:_service._tcp.name"),
            };
        }
        if let Err(reason) = crema_gossip::keys::check_addr(text) {
            return refuse(reason);
        }
        if let Ok(addr) = text.parse() {
            return Ok(SeedAddr::Ip(addr));
        }
        match text.rsplit_once(':').map(|(name, port)| (name, port.parse())) {
            Some((name, Ok(port))) => Ok(SeedAddr::Host { host: name.to_owned(), port }),
            _ => refuse("expected host:port"),
        }
    }
}

fn is_service(name: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let labels: Vec<&str> = name.strip_suffix('.').unwrap_or(name).split('.').collect();
    let [service, protocol, domain @ ..] = &labels[..] else { return false };
    let is_udp_or_tcp = matches!(*protocol, "_udp" | "_tcp");
    let service = service.strip_prefix('_').is_some_and(label);
    name.len() <= MAX_NAME_BYTES && service && is_udp_or_tcp && !domain.is_empty() && domain.iter().all(|l| label(l))
}

impl fmt::Display for SeedAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SeedAddr::Ip(addr) => addr.fmt(f),
            SeedAddr::Host { host, port } => write!(f, "{host}:{port}"),
            SeedAddr::Srv(name) => write!(f, "{SRV_PREFIX}{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_written_alike() {
        let host = |name: &str, port| SeedAddr::Host { host: name.to_owned(), port };
        for (text, seed) in [
            ("10.0.0.1:8000", SeedAddr::Ip("10.0.0.1:8000".parse().unwrap())),
            ("[fd00::1]:8000", SeedAddr::Ip("[fd00::1]:8000".parse().unwrap())),
            ("crema-headless:8000", host("crema-headless", 8000)),
            ("crema-0.crema.default.svc:1", host("crema-0.crema.default.svc", 1)),
            ("srv:_crema._udp.example", SeedAddr::Srv("_crema._udp.example".to_owned())),
            ("srv:_crema._tcp.cluster.local.", SeedAddr::Srv("_crema._tcp.cluster.local.".to_owned())),
        ] {
            assert_eq!(text.parse(), Ok(seed.clone()), "{text}");
            assert_eq!(seed.to_string(), text);
        }
        let addr: SocketAddr = "127.0.0.1:1".parse().unwrap();
        assert_eq!(SeedAddr::from(addr), "127.0.0.1:1".parse().unwrap());
    }

    #[test]
    fn what_names_no_seed_is_refused_with_a_reason() {
        for text in [
            "",
            "host",
            ":8000",
            "host:0",
            "0.0.0.0:8000",
            "host name:1",
            "srv:",
            "srv:crema._udp.example",
            "srv:_crema._sctp.example",
            "srv:_crema._udp",
            "srv:_crema._udp.",
            "srv:_._udp.example",
            "srv:_crema._udp.ex ample",
        ] {
            let error = text.parse::<SeedAddr>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("seed {text:?}: ")), "{error}");
        }
        let long = format!("srv:_crema._udp.{}", "a.".repeat(200));
        assert!(long.parse::<SeedAddr>().unwrap_err().to_string().len() < 200);
    }
}
