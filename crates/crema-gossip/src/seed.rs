//! Where to find a cluster: an address, a name, or an SRV record.
//!
//! ```text
//!   10.0.0.7:8001           Ip     contacted as it is
//!   crema-headless:8001     Host   looked up every 15 s
//!   srv:_crema._udp.example Srv    its targets and their ports are looked up every 15 s
//! ```

use crate::keys::{check_addr, shorten};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

const SRV_PREFIX: &str = "srv:";
const MAX_NAME_BYTES: usize = 253;

/// A seed. Make one by parsing text (`ip:port`, `host:port` or `srv:name`) or from a socket address; printing it gives the text
/// again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SeedAddr {
    /// An address and port.
    Ip(SocketAddr),
    /// A name with addresses, and a port.
    Host {
        /// The name.
        host: String,
        /// The port, not 0.
        port: u16,
    },
    /// The name of SRV records, without `srv:`.
    Srv(String),
}

/// A text that is not a seed. Correct it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("seed {seed}: {reason}")]
pub struct SeedError {
    /// The text, shortened.
    pub seed: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl SeedAddr {
    /// Parses several.
    ///
    /// Errors: the first that is not a seed.
    pub fn parse_all<S: AsRef<str>>(texts: impl IntoIterator<Item = S>) -> Result<Vec<SeedAddr>, SeedError> {
        texts.into_iter().map(|text| text.as_ref().parse()).collect()
    }

    /// Whether it could have been parsed; variants can also be made by hand.
    pub(crate) fn check(&self) -> Result<(), SeedError> {
        let text = self.to_string();
        match text.parse::<SeedAddr>()? {
            same if same == *self => Ok(()),
            _ => Err(SeedError { seed: shorten(&text), reason: "not what its kind says" }),
        }
    }
}

impl FromStr for SeedAddr {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<SeedAddr, SeedError> {
        let refuse = |reason| SeedError { seed: shorten(text), reason };
        if let Some(name) = text.strip_prefix(SRV_PREFIX) {
            check_srv_name(name).map_err(refuse)?;
            return Ok(SeedAddr::Srv(name.to_owned()));
        }
        check_addr(text).map_err(refuse)?;
        if let Ok(addr) = text.parse() {
            return Ok(SeedAddr::Ip(addr));
        }
        let parts = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let (host, port) = parts.ok_or_else(|| refuse("expected host:port"))?;
        Ok(SeedAddr::Host { host: host.to_owned(), port })
    }
}

/// `_service._proto.domain`.
pub(crate) fn check_srv_name(name: &str) -> Result<(), &'static str> {
    let labels: Vec<&str> = name.strip_suffix('.').unwrap_or(name).split('.').collect();
    let valid = |label: &&str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    if name.len() > MAX_NAME_BYTES || !labels.iter().all(valid) {
        return Err("srv: must be followed by a DNS name");
    }
    if labels.len() < 3 || !labels[..2].iter().all(|label| label.starts_with('_')) {
        return Err("an SRV name has the form _service._udp.domain or _service._tcp.domain");
    }
    Ok(())
}

impl From<SocketAddr> for SeedAddr {
    fn from(addr: SocketAddr) -> SeedAddr {
        SeedAddr::Ip(addr)
    }
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
    fn every_kind_parses_and_prints() {
        let ip: SocketAddr = "10.0.0.7:8001".parse().unwrap();
        assert_eq!("10.0.0.7:8001".parse(), Ok(SeedAddr::from(ip)));
        assert_eq!("crema-0:8001".parse(), Ok(SeedAddr::Host { host: "crema-0".into(), port: 8001 }));
        assert_eq!("srv:_crema._tcp.example".parse(), Ok(SeedAddr::Srv("_crema._tcp.example".into())));
        for text in ["10.0.0.7:8001", "[fe80::1]:1", "a.b-c_d:65535", "srv:_crema._udp.example.", "srv:_a._b.c"] {
            let seed: SeedAddr = text.parse().unwrap();
            assert_eq!(seed.to_string(), text);
            seed.check().unwrap();
        }
        assert_eq!(SeedAddr::parse_all(["a:1", "b:2"]).unwrap().len(), 2);
    }

    #[test]
    fn mistakes_are_named() {
        let long = format!("srv:_a._udp.{}", "a.".repeat(200));
        for text in [
            "",
            "host",
            "host:0",
            "0.0.0.0:1",
            "1.2.3.400:1",
            "srv:",
            "srv:crema",
            "srv:_a._udp.",
            "srv:_a._udp..x",
            "srv:_crema._udp.exa mple",
            "srv:host:80",
            &long,
        ] {
            let error = text.parse::<SeedAddr>().unwrap_err();
            assert!(error.to_string().starts_with("seed \""), "{error}");
        }
        assert!(SeedAddr::Host { host: "1.2.3.4".into(), port: 1 }.check().is_err());
        assert!(SeedAddr::Srv("x".into()).check().is_err());
        assert!(SeedAddr::parse_all(["a:1", "b"]).unwrap_err().to_string().contains("\"b\""));
    }
}
