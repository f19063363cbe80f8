//! What an operator may set for one node, and the checks that turn it into a [`NodeConfig`].
//!
//! ```text
//!   flags --over--> CREMA_* variables --over--> TOML file --over--> defaults      (confique merges the layers)
//!                                   |
//!                                Config --resolve()--> Settings { NodeConfig, warnings }
//! ```
//!
//! [`Config`] is the manual: its comments are the help of `crema start` and the text of `crema.sample.toml`. Every
//! mistake becomes one sentence that names the key; nothing is opened or started here except the files it names.

use crate::node::{BindAddrs, GossipOptions, NodeConfig};
use clap::ArgAction;
use confique::{Config as _, Layer as _};
use crema_core::EvictionPolicy;
use crema_core::NodeId;
use crema_gossip::seal::MAX_KEY_FILE_BYTES;
use crema_gossip::{KeyRing, SeedAddr};
use crema_shard::meta::MAX_ZONE_BYTES;
use crema_shard::{AutoVoters, MemoryOptions, ReadMode};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Most bytes of a configuration file.
pub const MAX_CONFIG_FILE_BYTES: u64 = 1024 * 1024;
/// Longest password in bytes.
pub const MAX_PASSWORD_BYTES: u64 = 512;
/// Most entries of custom metadata.
pub const MAX_METADATA_ENTRIES: usize = 32;
/// Most initial members, and most seeds.
pub const MAX_NAMED_NODES: usize = 64;

/// Configuration of one Crema node.
///
/// Every key may be set in a file (`crema start --config FILE`), by the
/// environment variable named with it, or by a flag (`node_id` is `--node-id`).
/// A flag wins over the environment, which wins over the file.
#[derive(Clone, Debug, confique::Config)]
#[config(layer_attr(derive(clap::Args, Clone, Debug)))]
#[config(layer_attr(serde(deny_unknown_fields)))]
pub struct Config {
    /// Id of this node: a number from 1 on that no other node of the cluster has. May be absent with node_id_from_hostname.
    #[config(env = "CREMA_NODE_ID", layer_attr(arg(long, value_name = "ID")))]
    pub node_id: u64,

    /// Take this node's id from its host name instead: the number after the last dash, plus 1, so that crema-0 is node 1.
    /// For pods of a Kubernetes StatefulSet, which are named so, and keep their names.
    #[config(env = "CREMA_NODE_ID_FROM_HOSTNAME", default = false)]
    #[config(layer_attr(arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")))]
    pub node_id_from_hostname: bool,

    /// Name of the cluster. Nodes of differently named clusters refuse each other.
    #[config(env = "CREMA_CLUSTER", default = "crema", layer_attr(arg(long, value_name = "NAME")))]
    pub cluster: String,

    /// Ids of the nodes that found the cluster together, the same list on each of them.
    /// Empty: this node founds a cluster of its own, unless it joins one.
    #[config(env = "CREMA_INITIAL_MEMBERS", parse_env = list, default = [])]
    #[config(layer_attr(arg(long, value_name = "ID,…", value_delimiter = ',')))]
    pub initial_members: Vec<u64>,

    /// Gossip addresses of some other nodes, from which this node finds all others: as ip:port, host:port (looked up again
    /// every 15 s), or srv:_crema._udp.example (SRV records, likewise).
    #[config(env = "CREMA_SEEDS", parse_env = list, default = [])]
    #[config(layer_attr(arg(long, value_name = "HOST:PORT,…", value_delimiter = ',')))]
    pub seeds: Vec<String>,

    /// Number of shards with which the cluster is founded, 1 to 16384. Later the cluster's own number counts.
    #[config(env = "CREMA_SHARDS", default = 16, layer_attr(arg(long, value_name = "N")))]
    pub shards: u32,

    /// Replicas of each shard, 1 to 7. With fewer nodes, each node holds one.
    #[config(env = "CREMA_REPLICAS", default = 3, layer_attr(arg(long, value_name = "N")))]
    pub replicas: u32,

    /// Join an existing cluster; never found one.
    #[config(env = "CREMA_JOIN", default = false)]
    #[config(layer_attr(arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")))]
    pub join: bool,

    /// Address for gossip, UDP and TCP.
    #[config(env = "CREMA_GOSSIP_ADDR", default = "127.0.0.1:8001", layer_attr(arg(long, value_name = "IP:PORT")))]
    pub gossip_addr: SocketAddr,

    /// TCP address for the other nodes' connections.
    #[config(env = "CREMA_RAFT_ADDR", default = "127.0.0.1:9001", layer_attr(arg(long, value_name = "IP:PORT")))]
    pub raft_addr: SocketAddr,

    /// TCP address for Redis clients of any kind: this node passes their commands on to where the data is.
    #[config(env = "CREMA_REDIS_ADDR", default = "127.0.0.1:6379", layer_attr(arg(long, value_name = "IP:PORT")))]
    pub redis_addr: SocketAddr,

    /// TCP address for Redis Cluster clients: they are redirected to the node that leads.
    #[config(env = "CREMA_REDIS_CLUSTER_ADDR", default = "127.0.0.1:7379")]
    #[config(layer_attr(arg(long, value_name = "IP:PORT")))]
    pub redis_cluster_addr: SocketAddr,

    /// TCP address for HTTP: health, metrics and the admin API.
    #[config(env = "CREMA_HTTP_ADDR", default = "127.0.0.1:8080", layer_attr(arg(long, value_name = "IP:PORT")))]
    pub http_addr: SocketAddr,

    /// Host name or IP address, without a port, under which other nodes and clients reach this node.
    /// Needed when an address above is unspecified (0.0.0.0 or ::).
    #[config(env = "CREMA_ADVERTISE_HOST", layer_attr(arg(long, value_name = "HOST")))]
    pub advertise_host: Option<String>,

    /// Free description of this node, told to all others; for example { zone = "a" }. Of a shard's replicas no two are in
    /// one zone while there are enough zones.
    /// In the environment: zone=a,rack=7. As a flag, repeated: --metadata zone=a --metadata rack=7.
    #[config(env = "CREMA_METADATA", parse_env = key_values, default = {})]
    #[config(layer_attr(arg(skip)))]
    pub metadata: BTreeMap<String, String>,

    /// File with the cluster's keys, the same on every node: lines of 64 hexadecimal digits, or of 32 bytes in base64, as
    /// `openssl rand -hex 32` makes them. The first line is the key in use, further ones are accepted, too.
    /// With it gossip is encrypted, and a peer is heard only once it has proved that it has one of the keys. The file is
    /// read again when it changes: to change keys, first add the new one as the second line on every node, then make it the
    /// first line everywhere, then remove the old one.
    #[config(env = "CREMA_CLUSTER_KEY_FILE", layer_attr(arg(long, value_name = "FILE")))]
    pub cluster_key_file: Option<PathBuf>,

    /// File with the password that Redis clients must give (AUTH), and users of HTTP but for health (as a bearer token).
    /// Its first line counts.
    #[config(env = "CREMA_REQUIREPASS_FILE", layer_attr(arg(long, value_name = "FILE")))]
    pub requirepass_file: Option<PathBuf>,

    /// Listen on addresses that are not loopback although nothing authenticates who connects. A warning is logged at
    /// each start.
    #[config(env = "CREMA_INSECURE", default = false)]
    #[config(layer_attr(arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")))]
    pub insecure: bool,

    /// Milliseconds after which a command that could not be completed is answered with an error, 10 to 600000.
    #[config(env = "CREMA_REQUEST_DEADLINE_MS", default = 5000, layer_attr(arg(long, value_name = "MS")))]
    pub request_deadline_ms: u64,

    /// How a leader makes sure that a read is linearizable: "lease" or "read_index". Set it alike on all nodes.
    /// lease: by a promise that a majority keeps in time, so that most reads cost no message. Assumes that the
    /// clocks of two nodes differ in rate by less than 15 %; their times of day may differ as they like.
    /// read_index: by a round to a majority, which the reads of a moment share. Assumes nothing of clocks.
    #[config(env = "CREMA_READS", default = "lease", layer_attr(arg(long, value_name = "HOW", value_enum)))]
    pub reads: Reads,

    /// Most Redis clients connected at once, both Redis addresses together, 1 to 1000000.
    #[config(env = "CREMA_MAX_CLIENTS", default = 10000, layer_attr(arg(long, value_name = "N")))]
    pub max_clients: usize,

    /// Milliseconds that a stopping node waits until every shard can do without it, 0 to 600000. 0: it does not wait.
    #[config(env = "CREMA_STOP_GRACE_MS", default = 10000, layer_attr(arg(long, value_name = "MS")))]
    pub stop_grace_ms: u64,

    /// Most memory for log entries that are kept for replicas that lag, over all shards, 1mb to 1tb.
    /// Units: b, kb, mb, gb, tb, in steps of 1024.
    #[config(env = "CREMA_MAX_LOG_BYTES", default = "256mb", layer_attr(arg(long, value_name = "SIZE")))]
    pub max_log_bytes: ByteSize,

    /// Memory that this node may use, at least 16mb; no limit if absent. Three quarters of it are for keys and values,
    /// divided evenly over the shards that the node holds; the rest is for logs and buffers. A shard has what the least of
    /// its nodes can give, so set it alike on all nodes.
    #[config(env = "CREMA_MAX_MEMORY", layer_attr(arg(long, value_name = "SIZE")))]
    pub max_memory: Option<ByteSize>,

    /// What goes when a shard's memory is full: "s3-fifo", "sieve", "lru" or "none". Set it alike on all nodes.
    /// s3-fifo: keys used once only go first, however recently. sieve: simpler, a little worse under scans.
    /// lru: those not used for longest, about. none: nothing; writes that take more memory are refused.
    #[config(env = "CREMA_EVICTION", default = "s3-fifo", layer_attr(arg(long, value_name = "HOW", value_enum)))]
    pub eviction: Eviction,

    /// Whether a node that has joined gets replicas by itself, after auto_voters_after_s, unless an operator has removed it.
    /// The leader of the cluster's own group decides; set it alike on all nodes.
    /// Off: `crema voters add` does it. Do not turn this on in production without understanding what a cluster does that
    /// reshapes itself while the network is in trouble.
    #[config(env = "CREMA_AUTO_ADD_VOTERS", default = false)]
    #[config(layer_attr(arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")))]
    pub auto_add_voters: bool,

    /// Whether a node that is away for auto_voters_after_s loses its replicas to others: one at a time, only while enough
    /// others answer to take all of them over, and never a majority of anything. Off: it is only reported, and
    /// `crema voters remove` does it. The same warning.
    #[config(env = "CREMA_AUTO_REMOVE_VOTERS", default = false)]
    #[config(layer_attr(arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")))]
    pub auto_remove_voters: bool,

    /// Seconds after which those two act, 5 to 86400.
    #[config(env = "CREMA_AUTO_VOTERS_AFTER_S", default = 300, layer_attr(arg(long, value_name = "S")))]
    pub auto_voters_after_s: u64,

    /// Directory in which this node keeps its log and its data, so that they survive a restart, of this node or of all.
    /// A command is then acknowledged when it is on the disks of a majority. Without, all is in memory alone.
    #[config(env = "CREMA_DATA_DIR", layer_attr(arg(long, value_name = "DIR")))]
    pub data_dir: Option<PathBuf>,

    /// Without data_dir: directory in which this node remembers of which cluster it is and how often it began, and no data.
    /// Should every node lose its memory at once, they then found no second cluster by themselves, and clients are not told
    /// that keys do not exist: `crema recover` goes on with the old identity.
    #[config(env = "CREMA_STATE_DIR", layer_attr(arg(long, value_name = "DIR")))]
    pub state_dir: Option<PathBuf>,

    /// With data_dir: when the log on disk, over all shards, has grown by this much, data is written to disk as a whole
    /// and the log behind it is cut; later by as much as the data has. 16mb to 1tb.
    #[config(env = "CREMA_CHECKPOINT_LOG_BYTES", default = "512mb", layer_attr(arg(long, value_name = "SIZE")))]
    pub checkpoint_log_bytes: ByteSize,

    /// Most bytes a second that this node sends to fill replicas of other nodes, compressed as they are, all of them
    /// together, 4mb to 1tb. Requests and heartbeats do not wait for them, but share the network.
    #[config(env = "CREMA_SNAPSHOT_RATE", default = "128mb", layer_attr(arg(long, value_name = "SIZE")))]
    pub snapshot_rate: ByteSize,
}

/// The configuration as one source gives it: every key optional. Also the flags of `crema start`.
pub type ConfigLayer = <Config as confique::Config>::Layer;

/// A configuration that cannot be used. The text is one sentence for the operator; the process exits with code 2.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the node is started with.
    pub node: NodeConfig,
    /// What the operator must be reminded of at each start.
    pub warnings: Vec<String>,
}

fn bad<T>(sentence: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(sentence.into()))
}

impl Config {
    /// Merges flags, the environment, the file and the defaults, in falling precedence.
    ///
    /// Errors: an unreadable, overlong or malformed file, an unknown key in it, a value that is not of its key's type,
    /// a missing `node_id`, one that is given twice, and a host name without one.
    pub fn load(flags: ConfigLayer, file: Option<&Path>) -> Result<Config, ConfigError> {
        let mut layer = flags.with_fallback(ConfigLayer::from_env().map_err(explain)?);
        if let Some(path) = file {
            layer = layer.with_fallback(read_file(path)?);
        }
        let mut merged = layer.with_fallback(ConfigLayer::default_values());
        name_node(&mut merged, &rustix::system::uname().nodename().to_string_lossy())?;
        Config::from_layer(merged).map_err(explain)
    }

    /// Checks every key and their relations, and reads the password.
    ///
    /// Errors: the first mistake found, as one sentence that names the key.
    pub fn resolve(&self) -> Result<Settings, ConfigError> {
        if self.node_id == 0 {
            return bad("node_id must be 1 or more");
        }
        check_cluster_name(&self.cluster)?;
        let initial_members = self.founders()?;
        let seeds = SeedAddr::parse_all(&self.seeds).map_err(|e| ConfigError(format!("seeds: {e}")))?;
        range("shards", u64::from(self.shards), 1, 16_384)?;
        range("replicas", u64::from(self.replicas), 1, 7)?;
        range("request_deadline_ms", self.request_deadline_ms, 10, 600_000)?;
        range("max_clients", self.max_clients as u64, 1, 1_000_000)?;
        range("stop_grace_ms", self.stop_grace_ms, 0, 600_000)?;
        range("auto_voters_after_s", self.auto_voters_after_s, 5, 86_400)?;
        if !(1 << 20..=1 << 40).contains(&self.max_log_bytes.0) {
            return bad(format!("max_log_bytes must be between 1mb and 1tb, not {}", self.max_log_bytes));
        }
        if !(16 << 20..=1 << 40).contains(&self.checkpoint_log_bytes.0) {
            return bad(format!(
                "checkpoint_log_bytes must be between 16mb and 1tb, not {}",
                self.checkpoint_log_bytes
            ));
        }
        if !(4 << 20..=1 << 40).contains(&self.snapshot_rate.0) {
            return bad(format!("snapshot_rate must be between 4mb and 1tb, not {}", self.snapshot_rate));
        }
        if self.max_memory == Some(ByteSize(0)) {
            return bad("max_memory must be at least 16mb: leave it out for no limit");
        }
        check_metadata(&self.metadata)?;
        self.check_advertise_host()?;
        let requirepass = self.requirepass_file.as_deref().map(read_password).transpose()?;
        let cluster_keys = self.cluster_key_file.as_deref().map(read_keys).transpose()?;
        let warnings = self.check_exposure(cluster_keys.is_some(), requirepass.is_some())?;
        let settings = Settings {
            node: NodeConfig {
                node_id: NodeId(self.node_id),
                cluster: self.cluster.clone(),
                initial_members,
                static_peers: BTreeMap::new(),
                seeds,
                gossip: GossipOptions::default(),
                shards: self.shards,
                replicas: self.replicas,
                bind: BindAddrs {
                    raft: self.raft_addr,
                    gossip: Some(self.gossip_addr),
                    redis: Some(self.redis_addr),
                    redis_cluster: Some(self.redis_cluster_addr),
                    http: Some(self.http_addr),
                },
                advertise_host: self.advertise_host.clone(),
                metadata: self.metadata.clone(),
                cluster_keys,
                cluster_key_file: self.cluster_key_file.clone(),
                requirepass,
                request_deadline: Duration::from_millis(self.request_deadline_ms),
                reads: self.reads.into(),
                max_clients: self.max_clients,
                stop_grace: Duration::from_millis(self.stop_grace_ms),
                max_log_bytes: self.max_log_bytes.as_usize(),
                memory: MemoryOptions {
                    max_memory: self.max_memory.map_or(0, |size| size.0),
                    eviction: self.eviction.into(),
                },
                auto_voters: AutoVoters {
                    add: self.auto_add_voters,
                    remove: self.auto_remove_voters,
                    after: Duration::from_secs(self.auto_voters_after_s),
                },
                bound_resident: true,
                data_dir: self.data_dir.clone(),
                state_dir: self.state_dir.clone(),
                checkpoint_log_bytes: self.checkpoint_log_bytes.0,
                snapshot_rate: self.snapshot_rate.0,
            },
            warnings,
        };
        settings.node.check().map_err(ConfigError)?;
        Ok(settings)
    }

    /// The founding members: checked, and without this node if it must not found.
    fn founders(&self) -> Result<Vec<NodeId>, ConfigError> {
        if self.initial_members.len() > MAX_NAMED_NODES || self.seeds.len() > MAX_NAMED_NODES {
            return bad(format!("initial_members and seeds may name at most {MAX_NAMED_NODES} nodes each"));
        }
        let mut members: Vec<u64> = self.initial_members.clone();
        members.sort_unstable();
        if members.first() == Some(&0) {
            return bad("initial_members names node 0, but node ids begin at 1");
        }
        if let Some(twice) = members.windows(2).find(|pair| pair[0] == pair[1]) {
            return bad(format!("initial_members names node {} twice", twice[0]));
        }
        if self.join {
            if self.seeds.is_empty() {
                return bad("join needs seeds: name the gossip address of a node of the cluster to join");
            }
            members.retain(|&id| id != self.node_id);
        } else if members.is_empty() {
            if !self.seeds.is_empty() {
                return bad(
                    "seeds are given but no initial_members: name the founding members, or join an existing cluster \
                     with --join",
                );
            }
            members.push(self.node_id);
        }
        if self.seeds.is_empty() && members.iter().any(|&id| id != self.node_id) {
            return bad("initial_members names other nodes, but without seeds this node cannot find them");
        }
        Ok(members.into_iter().map(NodeId).collect())
    }

    fn addrs(&self) -> [(&'static str, SocketAddr); 5] {
        [
            ("gossip_addr", self.gossip_addr),
            ("raft_addr", self.raft_addr),
            ("redis_addr", self.redis_addr),
            ("redis_cluster_addr", self.redis_cluster_addr),
            ("http_addr", self.http_addr),
        ]
    }

    fn check_advertise_host(&self) -> Result<(), ConfigError> {
        if let Some(host) = &self.advertise_host {
            let ip = host.parse::<std::net::IpAddr>();
            let name_chars = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            let is_name = !host.is_empty() && host.len() <= 253 && host.chars().all(name_chars);
            if ip.is_err() && !is_name {
                return bad(format!(
                    "advertise_host {host:?} is neither an IP address nor a host name (it has no port)"
                ));
            }
            if ip.is_ok_and(|ip| ip.is_unspecified()) {
                return bad(format!("advertise_host {host} is no address that others could connect to"));
            }
            return Ok(());
        }
        match self.addrs().iter().find(|(_, addr)| addr.ip().is_unspecified()) {
            Some((key, addr)) => bad(format!(
                "{key} is {addr}, which others cannot connect to: set advertise_host to this machine's name or address"
            )),
            None => Ok(()),
        }
    }

    /// Refuses doors that are open to the network without a lock; with `insecure`, names them as warnings.
    fn check_exposure(&self, has_keys: bool, has_password: bool) -> Result<Vec<String>, ConfigError> {
        let mut warnings = Vec::new();
        let key = (has_keys, "there are no cluster keys", "set cluster_key_file");
        let password = (has_password, "no password is set", "set requirepass_file");
        let doors = [
            ("gossip_addr", self.gossip_addr, key),
            ("raft_addr", self.raft_addr, key),
            ("http_addr", self.http_addr, password),
            ("redis_addr", self.redis_addr, password),
            ("redis_cluster_addr", self.redis_cluster_addr, password),
        ];
        for (name, addr, (locked, missing, remedy)) in doors {
            if is_loopback(addr) || locked {
                continue;
            }
            if !self.insecure {
                return bad(format!(
                    "{name} {addr} is open to the network and {missing}: {remedy}, bind it to a loopback address, or pass \
                     --insecure if everyone who can reach it is trusted"
                ));
            }
            warnings.push(format!("insecure: {name} {addr} is open to the network and {missing}"));
        }
        Ok(warnings)
    }
}

/// Settles which node this is, by its number or by its host name.
fn name_node(layer: &mut ConfigLayer, hostname: &str) -> Result<(), ConfigError> {
    match (layer.node_id, layer.node_id_from_hostname == Some(true)) {
        (Some(id), true) => bad(format!(
            "node_id is {id}, and node_id_from_hostname asks for the host name's number: set only one of the two"
        )),
        (Some(_), false) => Ok(()),
        (None, true) => {
            layer.node_id = Some(id_of_hostname(hostname)?);
            Ok(())
        }
        (None, false) => {
            bad("node_id is required: set it with --node-id, CREMA_NODE_ID or in the configuration file, or set \
             node_id_from_hostname")
        }
    }
}

/// `crema-0`, `crema-0.crema-headless.default.svc`: 1.
fn id_of_hostname(hostname: &str) -> Result<u64, ConfigError> {
    let name = hostname.split('.').next().unwrap_or_default();
    // The dash keeps names that end with digits by chance, as those of containers do, from becoming ids.
    let ordinal = name.rsplit_once('-').map(|(_, ordinal)| ordinal).unwrap_or_default();
    // `parse` would take a leading plus sign.
    let number = ordinal.bytes().all(|b| b.is_ascii_digit()).then(|| ordinal.parse::<u64>().ok()).flatten();
    match number.and_then(|n| n.checked_add(1)) {
        Some(id) => Ok(id),
        None => bad(format!(
            "node_id_from_hostname: the host name {hostname:?} does not end with a dash and a number, as crema-0 does"
        )),
    }
}

/// The commented sample file: every key with its meaning, default and environment variable.
pub fn sample() -> String {
    confique::toml::template::<Config>(confique::toml::FormatOptions::default())
}

/// Whether only this machine can reach the address.
pub fn is_loopback(addr: SocketAddr) -> bool {
    match addr.ip() {
        std::net::IpAddr::V6(v6) => v6.to_canonical().is_loopback(),
        v4 => v4.is_loopback(),
    }
}

fn range(key: &str, value: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    bad(format!("{key} must be between {least} and {most}, not {value}"))
}

pub(crate) fn check_cluster_name(name: &str) -> Result<(), ConfigError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) {
        return bad("cluster must be a name of 1 to 64 letters, digits, dots, dashes or underscores");
    }
    Ok(())
}

pub(crate) fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), ConfigError> {
    if metadata.len() > MAX_METADATA_ENTRIES {
        return bad(format!("metadata may have at most {MAX_METADATA_ENTRIES} entries"));
    }
    for (key, value) in metadata {
        let key_ok = !key.is_empty() && key.len() <= 64 && key.chars().all(|c| c.is_ascii_graphic());
        if !key_ok {
            return bad(format!("metadata: the key {key:?} must be 1 to 64 printable ASCII characters"));
        }
        if value.len() > 1024 || !value.chars().all(|c| c.is_ascii_graphic() || c == ' ') {
            return bad(format!("metadata: the value of {key:?} must be at most 1024 printable ASCII characters"));
        }
        if key == "zone" && value.len() > MAX_ZONE_BYTES {
            return bad(format!("metadata: a zone may have at most {MAX_ZONE_BYTES} bytes"));
        }
    }
    Ok(())
}

fn read_capped(key: &str, path: &Path, most: u64) -> Result<String, ConfigError> {
    let fail = |why: String| ConfigError(format!("{key}: {} {why}", path.display()));
    let file = std::fs::File::open(path).map_err(|e| fail(format!("cannot be opened: {e}")))?;
    let mut text = String::new();
    // A device or a huge file must not be read whole before its size is known.
    file.take(most + 1).read_to_string(&mut text).map_err(|e| fail(format!("cannot be read: {e}")))?;
    if text.len() as u64 > most {
        return Err(fail(format!("is longer than {most} bytes")));
    }
    Ok(text)
}

fn read_file(path: &Path) -> Result<ConfigLayer, ConfigError> {
    let text = read_capped("configuration file", path, MAX_CONFIG_FILE_BYTES)?;
    toml::from_str(&text)
        .map_err(|e| ConfigError(format!("configuration file {}: {}", path.display(), e.to_string().trim_end())))
}

/// Reads the cluster's keys.
///
/// Errors: a file that cannot be read or holds something else; the text never tells what.
pub(crate) fn read_keys(path: &Path) -> Result<KeyRing, ConfigError> {
    let text = read_capped("cluster_key_file", path, MAX_KEY_FILE_BYTES as u64)?;
    KeyRing::parse(&text).map_err(|e| ConfigError(format!("cluster_key_file: {}: {e}", path.display())))
}

/// Reads a password.
///
/// Errors: a file that cannot be read, or whose first line is empty.
pub(crate) fn read_password(path: &Path) -> Result<Secret, ConfigError> {
    // The line's end does not belong to the password; what follows it is not read as one.
    let text = read_capped("requirepass_file", path, MAX_PASSWORD_BYTES)?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(Secret(line.to_owned())),
        _ => bad(format!("requirepass_file: the first line of {} is empty", path.display())),
    }
}

/// Checks a password that does not come from a file, by the same rules.
pub(crate) fn check_password(password: &Secret) -> Result<(), ConfigError> {
    let text = password.expose();
    if text.is_empty() || text.len() as u64 > MAX_PASSWORD_BYTES || text.contains(['\r', '\n']) {
        return bad(format!("the password must be one line of 1 to {MAX_PASSWORD_BYTES} bytes"));
    }
    Ok(())
}

/// A confique error with its cause, on one line.
fn explain(error: confique::Error) -> ConfigError {
    ConfigError(format!("{error:#}").replace('\n', " ").trim_end().to_owned())
}

/// A list as the environment writes it: separated by commas; the empty text is the empty list.
fn list<T: FromStr>(text: &str) -> Result<Vec<T>, T::Err> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::parse).collect()
}

/// Metadata as the environment writes it: `key=value` separated by commas.
fn key_values(text: &str) -> Result<BTreeMap<String, String>, ConfigError> {
    list::<KeyValue>(text).map(|pairs| pairs.into_iter().map(|p| (p.key, p.value)).collect())
}

/// One `key=value` of metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// What stands before the first `=`.
    pub key: String,
    /// What follows it.
    pub value: String,
}

impl FromStr for KeyValue {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(KeyValue { key: key.to_owned(), value: value.to_owned() }),
            _ => bad(format!("{text:?} is not of the form key=value")),
        }
    }
}

/// Flags of `crema start`: the keys of [`Config`], a file, and metadata, which is the only repeated one.
#[derive(Clone, Debug, clap::Args)]
pub struct StartArgs {
    /// TOML file with any of the settings below.
    #[arg(long, value_name = "FILE", env = "CREMA_CONFIG")]
    pub config: Option<PathBuf>,
    /// One key=value of free description of this node, told to all others. Repeat for more.
    #[arg(long = "metadata", value_name = "KEY=VALUE", action = ArgAction::Append)]
    pub metadata: Vec<KeyValue>,
    /// The settings.
    #[command(flatten)]
    pub settings: ConfigLayer,
    /// End this node, without waiting for others to take over, as soon as its standard input ends. For a parent process
    /// that must not leave children behind, however it dies.
    #[arg(long, hide = true)]
    pub stop_with_stdin: bool,
}

impl StartArgs {
    /// The whole configuration these flags lead to. Errors as [`Config::load`].
    pub fn load(&self) -> Result<Config, ConfigError> {
        let mut flags = self.settings.clone();
        if !self.metadata.is_empty() {
            flags.metadata = Some(self.metadata.iter().map(|p| (p.key.clone(), p.value.clone())).collect());
        }
        Config::load(flags, self.config.as_deref())
    }
}

/// [`ReadMode`] as the configuration writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Reads {
    /// By the leader's lease: clocks must run at about the same rate.
    #[default]
    Lease,
    /// By a round of messages: nothing is assumed of clocks.
    ReadIndex,
}

impl From<Reads> for ReadMode {
    fn from(reads: Reads) -> ReadMode {
        match reads {
            Reads::Lease => ReadMode::Lease,
            Reads::ReadIndex => ReadMode::ReadIndex,
        }
    }
}

/// What goes when a shard's memory is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum Eviction {
    /// Keys that were used once only, then those not used lately.
    #[default]
    #[serde(rename = "s3-fifo")]
    #[value(name = "s3-fifo")]
    S3Fifo,
    /// Keys not used since a hand passed them last.
    Sieve,
    /// Keys not used for longest, about.
    Lru,
    /// Nothing: writes are refused.
    None,
}

impl From<Eviction> for Option<EvictionPolicy> {
    fn from(eviction: Eviction) -> Self {
        match eviction {
            Eviction::S3Fifo => Some(EvictionPolicy::S3Fifo),
            Eviction::Sieve => Some(EvictionPolicy::Sieve),
            Eviction::Lru => Some(EvictionPolicy::Lru),
            Eviction::None => None,
        }
    }
}

impl fmt::Display for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reads::Lease => "lease",
            Reads::ReadIndex => "read_index",
        })
    }
}

/// A password. Shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a password.
    pub fn new(password: impl Into<String>) -> Self {
        Secret(password.into())
    }
    /// Compares without telling by its duration where a wrong one differs. Its length may become known.
    pub fn is(&self, given: &[u8]) -> bool {
        let wanted = self.0.as_bytes();
        let mut difference = u8::from(wanted.len() != given.len());
        for (i, byte) in given.iter().enumerate() {
            difference |= byte ^ wanted.get(i).copied().unwrap_or(0);
            // Keeps the compiler from leaving the loop early.
            difference = std::hint::black_box(difference);
        }
        difference == 0
    }
    /// The password itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(redacted)")
    }
}

/// A number of bytes, written as a number with an optional unit: `4096`, `64kb`, `256mb`, `2gb`, in steps of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    const UNITS: [(&'static str, u32); 5] = [("tb", 40), ("gb", 30), ("mb", 20), ("kb", 10), ("b", 0)];

    /// As a size of this machine's memory, saturating.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl FromStr for ByteSize {
    type Err = ConfigError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lower = text.trim().to_ascii_lowercase();
        let (digits, shift) = Self::UNITS
            .iter()
            .find_map(|&(unit, shift)| lower.strip_suffix(unit).map(|digits| (digits, shift)))
            .unwrap_or((&lower, 0));
        let number = digits.trim_end();
        // `parse` would take a leading plus sign.
        let value = number.bytes().all(|b| b.is_ascii_digit()).then(|| number.parse::<u64>().ok()).flatten();
        match value.and_then(|n| n.checked_mul(1 << shift)) {
            Some(bytes) => Ok(ByteSize(bytes)),
            None => bad(format!("{text:?} is not a size such as 4096, 64kb, 256mb or 2gb")),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) = Self::UNITS
            .iter()
            .find(|&&(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= shift)
            .unwrap_or(&("b", 0));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 4096 or \"256mb\"")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }
            fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes).map(ByteSize).map_err(|_| E::custom("a size is not negative"))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        start: StartArgs,
    }

    /// The configuration of these flags without the environment, which other tests of the process share.
    fn config(flags: &[&str]) -> Config {
        let cli = Cli::try_parse_from(std::iter::once(&"crema").chain(flags)).expect("flags parse");
        Config::from_layer(cli.start.settings.with_fallback(ConfigLayer::default_values())).expect("complete")
    }

    fn refusal(flags: &[&str]) -> String {
        config(flags).resolve().expect_err("must be refused").0
    }

    const THREE: [&str; 6] = ["--node-id", "1", "--initial-members", "1,2,3", "--seeds", "127.0.0.1:8001,b:8001"];

    #[test]
    fn the_committed_sample_is_the_generated_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crema.sample.toml");
        let committed = std::fs::read_to_string(&path).expect("the sample is committed");
        if std::env::var_os("CREMA_UPDATE_SAMPLE").is_some() {
            std::fs::write(&path, sample()).expect("writable");
            return;
        }
        assert!(committed == sample(), "run this test with CREMA_UPDATE_SAMPLE=1 to write the sample anew");
    }

    #[test]
    fn the_sample_with_every_key_uncommented_loads_and_equals_the_defaults() {
        let mut text = String::new();
        for line in sample().lines() {
            let key_line = line.strip_prefix('#').filter(|rest| rest.contains('=') && !rest.starts_with(' '));
            match key_line {
                Some(key) if key.trim_end().ends_with('=') && key.starts_with("node_id") => {
                    text.push_str("node_id = 1\n")
                }
                Some(key) if key.trim_end().ends_with('=') => assert!(
                    ["advertise_host", "cluster_key_file", "requirepass_file", "max_memory", "data_dir", "state_dir"]
                        .iter()
                        .any(|k| key.starts_with(k)),
                    "only these are optional: {key}"
                ),
                Some(key) => {
                    text.push_str(key);
                    text.push('\n');
                }
                None => {}
            }
        }
        let layer: ConfigLayer = toml::from_str(&text).expect("the sample's keys and values are valid");
        let from_sample = Config::from_layer(layer).expect("complete without defaults");
        let defaults = config(&["--node-id", "1"]);
        assert_eq!(format!("{from_sample:?}"), format!("{defaults:?}"));
        defaults.resolve().expect("the defaults are usable");
    }

    #[test]
    fn flags_win_over_the_file_and_unknown_keys_are_refused() {
        let dir = tempdir("layers");
        let file = dir.join("c.toml");
        std::fs::write(&file, "node_id = 7\nshards = 4\nmax_log_bytes = \"1gb\"\nmetadata = { zone = \"a\" }\n")
            .unwrap();
        let layer = read_file(&file).unwrap();
        let cli = Cli::try_parse_from(["crema", "--shards", "8"]).unwrap();
        let merged = cli.start.settings.with_fallback(layer).with_fallback(ConfigLayer::default_values());
        let config = Config::from_layer(merged).unwrap();
        assert_eq!((config.node_id, config.shards, config.max_log_bytes), (7, 8, ByteSize(1 << 30)));
        assert_eq!(config.metadata["zone"], "a");

        std::fs::write(&file, "node_id = 7\nmin_memory = \"1gb\"\n").unwrap();
        let error = read_file(&file).unwrap_err().0;
        assert!(error.contains("min_memory") && error.contains("c.toml"), "{error}");
        std::fs::write(&file, vec![b'#'; MAX_CONFIG_FILE_BYTES as usize + 1]).unwrap();
        assert!(read_file(&file).unwrap_err().0.contains("longer than"));
        assert!(read_file(&dir.join("absent.toml")).unwrap_err().0.contains("cannot be opened"));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_node_is_named_by_its_number_or_by_its_host() {
        let named = |flags: &[&str], hostname: &str| {
            let cli = Cli::try_parse_from(std::iter::once(&"crema").chain(flags)).expect("flags parse");
            let mut layer = cli.start.settings.with_fallback(ConfigLayer::default_values());
            name_node(&mut layer, hostname).map(|()| layer.node_id.expect("named"))
        };
        let host = ["--node-id-from-hostname"];
        assert_eq!(named(&host, "crema-0"), Ok(1));
        assert_eq!(named(&host, "my-cache-11"), Ok(12));
        assert_eq!(named(&host, "crema-3.crema-headless.default.svc.cluster.local"), Ok(4));
        for name in ["", "crema", "-", "crema-", "3", "crema3", "5f2a9c1b7d04", "crema-+1", "crema-1a", "crema.svc-1"] {
            let error = named(&host, name).unwrap_err().0;
            assert!(error.contains("node_id_from_hostname") && error.contains(&format!("{name:?}")), "{error}");
        }
        assert!(named(&host, "crema-18446744073709551615").is_err(), "ids end there");
        // Neither wins silently: they may differ.
        let both = ["--node-id", "1", "--node-id-from-hostname"];
        assert!(named(&both, "crema-0").unwrap_err().0.contains("only one"));
        assert_eq!(named(&["--node-id", "7", "--node-id-from-hostname=false"], "crema-0"), Ok(7));
        assert!(named(&[], "crema-0").unwrap_err().0.contains("node_id is required"), "never unasked");
    }

    #[test]
    fn a_three_node_member_resolves() {
        let settings = config(&THREE).resolve().unwrap();
        assert_eq!(settings.node.initial_members, [NodeId(1), NodeId(2), NodeId(3)]);
        assert!(settings.warnings.is_empty());
        assert_eq!(settings.node.bind.redis, Some("127.0.0.1:6379".parse().unwrap()));
    }

    #[test]
    fn a_lone_node_founds_its_own_cluster_and_a_joining_one_none() {
        let lone = config(&["--node-id", "4"]).resolve().unwrap();
        assert_eq!(lone.node.initial_members, [NodeId(4)]);
        let flags = ["--node-id", "4", "--join", "--seeds", "127.0.0.1:8001", "--initial-members", "4"];
        assert!(config(&flags).resolve().unwrap().node.initial_members.is_empty());
    }

    #[test]
    fn every_mistake_is_one_sentence_that_names_its_key() {
        let cases: &[(&[&str], &str)] = &[
            (&["--node-id", "0"], "node_id"),
            (&["--node-id", "1", "--cluster", ""], "cluster"),
            (&["--node-id", "1", "--cluster", "a b"], "cluster"),
            (&["--node-id", "1", "--shards", "0"], "shards"),
            (&["--node-id", "1", "--shards", "16385"], "shards"),
            (&["--node-id", "1", "--replicas", "8"], "replicas"),
            (&["--node-id", "1", "--initial-members", "1,1", "--seeds", "a:1"], "node 1 twice"),
            (&["--node-id", "1", "--initial-members", "0,1", "--seeds", "a:1"], "node 0"),
            (&["--node-id", "1", "--initial-members", "1,2"], "without seeds"),
            (&["--node-id", "1", "--seeds", "a:1"], "no initial_members"),
            (&["--node-id", "1", "--join"], "join needs seeds"),
            (&["--node-id", "1", "--initial-members", "1,2", "--seeds", "host"], "host:port"),
            (&["--node-id", "1", "--initial-members", "1,2", "--seeds", ":8001"], "the host must be"),
            (&["--node-id", "1", "--redis-addr", "127.0.0.1:9001"], "raft_addr and redis_addr"),
            (&["--node-id", "1", "--insecure", "--raft-addr", "0.0.0.0:9001"], "advertise_host"),
            (&["--node-id", "1", "--advertise-host", "host:80"], "advertise_host"),
            (&["--node-id", "1", "--advertise-host", "0.0.0.0"], "advertise_host"),
            (&["--node-id", "1", "--request-deadline-ms", "1"], "request_deadline_ms"),
            (&["--node-id", "1", "--max-clients", "0"], "max_clients"),
            (&["--node-id", "1", "--stop-grace-ms", "600001"], "stop_grace_ms"),
            (&["--node-id", "1", "--max-log-bytes", "1kb"], "max_log_bytes"),
            (&["--node-id", "1", "--checkpoint-log-bytes", "1mb"], "checkpoint_log_bytes"),
            (&["--node-id", "1", "--snapshot-rate", "1mb"], "snapshot_rate"),
            (&["--node-id", "1", "--max-memory", "1mb"], "max_memory"),
            (&["--node-id", "1", "--requirepass-file", "/nonexistent/p"], "requirepass_file"),
        ];
        for (flags, expected) in cases {
            let text = refusal(flags);
            assert!(text.contains(expected), "{flags:?}: {text}");
            assert!(!text.contains('\n') && !text.ends_with('.'), "{text:?}");
        }
    }

    #[test]
    fn open_doors_need_a_lock_or_the_word_insecure() {
        let host = ["--node-id", "1", "--advertise-host", "10.0.0.1"];
        let with =
            |more: &[&'static str]| -> Vec<&'static str> { host.iter().copied().chain(more.iter().copied()).collect() };
        for key in ["--gossip-addr", "--raft-addr", "--http-addr", "--redis-addr", "--redis-cluster-addr"] {
            let flags = with(&[key, "0.0.0.0:5000"]);
            let text = refusal(&flags);
            assert!(text.contains("--insecure") && text.contains(&key[2..].replace('-', "_")), "{text}");
            let lifted = with(&[key, "0.0.0.0:5000", "--insecure"]);
            assert_eq!(config(&lifted).resolve().unwrap().warnings.len(), 1);
        }
        // A password is a lock for Redis clients and HTTP, a key for gossip and peers.
        let dir = tempdir("pass");
        let file = dir.join("p");
        std::fs::write(&file, "s3cret\n").unwrap();
        let mut c = config(&with(&["--redis-addr", "0.0.0.0:5000"]));
        c.requirepass_file = Some(file.clone());
        let settings = c.resolve().unwrap();
        assert_eq!(settings.node.requirepass.as_ref().unwrap().expose(), "s3cret");
        assert!(!format!("{settings:?}").contains("s3cret"), "secrets are never shown");
        c.http_addr = "0.0.0.0:8080".parse().unwrap();
        c.resolve().unwrap();
        (c.raft_addr, c.gossip_addr) = ("0.0.0.0:9001".parse().unwrap(), "0.0.0.0:8001".parse().unwrap());
        assert!(c.resolve().unwrap_err().0.contains("cluster_key_file"));
        let keys = dir.join("k");
        c.cluster_key_file = Some(keys.clone());
        assert!(c.resolve().unwrap_err().0.contains("cannot be opened"));
        std::fs::write(&keys, "zz\n").unwrap();
        assert!(c.resolve().unwrap_err().0.starts_with("cluster_key_file: "));
        let secret = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
        std::fs::write(&keys, format!("{secret}\n")).unwrap();
        let settings = c.resolve().unwrap();
        assert!(settings.warnings.is_empty() && settings.node.cluster_keys.is_some());
        assert!(!format!("{settings:?}").contains(&secret[..16]), "nor are keys");
        std::fs::write(&file, "\nx").unwrap();
        assert!(c.resolve().unwrap_err().0.contains("empty"));
        std::fs::remove_dir_all(dir).unwrap();
        assert!(is_loopback("[::ffff:127.0.0.1]:1".parse().unwrap()));
        assert!(!is_loopback("[::]:1".parse().unwrap()));
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1b", 1),
            ("64kb", 65536),
            ("256MB", 256 << 20),
            ("2 gb", 2 << 30),
            ("1tb", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
            assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
        for text in ["", "mb", "-1", "+1", "1.5gb", "1pb", "99999999999999999999", "18446744073709551615kb"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn reads_are_confirmed_as_the_configuration_says() {
        let mode = |flags: &[&str]| config(flags).resolve().unwrap().node.reads;
        assert_eq!(mode(&["--node-id", "1"]), ReadMode::Lease);
        assert_eq!(mode(&["--node-id", "1", "--reads", "read_index"]), ReadMode::ReadIndex);
        assert!(Cli::try_parse_from(["crema", "--reads", "stale"]).is_err());
        let file: ConfigLayer = toml::from_str("reads = \"read_index\"").unwrap();
        assert_eq!(file.reads, Some(Reads::ReadIndex));
        // What `crema dev` passes on to its processes.
        for reads in [Reads::Lease, Reads::ReadIndex] {
            assert_eq!(mode(&["--node-id", "1", "--reads", &reads.to_string()]), reads.into());
        }
    }

    #[test]
    fn lists_and_pairs_of_the_environment() {
        assert_eq!(list::<u64>("1, 2,3").unwrap(), [1, 2, 3]);
        assert!(list::<u64>("").unwrap().is_empty());
        assert!(list::<u64>("1,x").is_err());
        assert_eq!(key_values("zone=a,rack=b=c").unwrap()["rack"], "b=c");
        assert!(key_values("zone").is_err());
    }

    fn tempdir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("crema-config-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("writable temporary directory");
        dir
    }
}
