//! A cluster of `crema start` processes on this machine.

use super::child::{Process, Scratch};
use super::netns::Network;
use super::ports::{self, Block, MAX_NODES, Use};
use super::{Context, Failure, Result, eventually, http};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

/// Where the nodes listen.
#[derive(Debug)]
enum Place {
    Loopback(Block),
    Network(Arc<Network>),
}

impl Place {
    fn addr(&self, node: u64, purpose: Use) -> SocketAddr {
        match self {
            Place::Loopback(ports) => ports.addr(node, purpose),
            Place::Network(net) => net.addr(node, purpose),
        }
    }
}

/// Where the nodes keep their logs and data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// Nowhere but in memory.
    Memory,
    /// Each in a directory of its own, within the cluster's [`Scratch`].
    Disk,
    /// In memory; but each remembers there of which cluster it is.
    Identity,
}

/// Nodes 1 to n, each a process of its own, ended when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    // Fields drop in this order: the processes end before their logs are shown or removed.
    nodes: BTreeMap<u64, Process>,
    scratch: Scratch,
    place: Place,
    count: u64,
    shards: u32,
    keeps: Keeps,
    /// Further flags of every node.
    flags: Vec<String>,
    /// The filter of every node's log; `None` for the program's default.
    log: Option<String>,
}

impl Cluster {
    /// Starts nodes 1 to `count` and returns at once; see [`Cluster::wait_ready`].
    ///
    /// # Errors
    ///
    /// If the program does not build or does not start, or no ports are free.
    ///
    /// # Panics
    ///
    /// If `count` is not 1 to [`MAX_NODES`].
    pub fn start(count: u64, shards: u32) -> Result<Cluster> {
        assert!((1..=u64::from(MAX_NODES)).contains(&count), "1 to {MAX_NODES} nodes");
        Cluster::start_at(Place::Loopback(ports::reserve()?), count, shards, Keeps::Memory, &[], None)
    }

    fn start_at(
        place: Place,
        count: u64,
        shards: u32,
        keeps: Keeps,
        flags: &[&str],
        log: Option<&str>,
    ) -> Result<Cluster> {
        let flags = flags.iter().map(|flag| flag.to_string()).collect();
        let log = log.map(str::to_string);
        let (nodes, scratch) = (BTreeMap::new(), Scratch::new()?);
        let mut cluster = Cluster { nodes, scratch, place, count, shards, keeps, flags, log };
        for node in 1..=count {
            cluster.spawn(node)?;
        }
        Ok(cluster)
    }

    /// Starts nodes 1 to `count` and waits up to a minute until all say they are ready.
    ///
    /// # Errors
    ///
    /// As [`Cluster::start`], and if they are not ready in time.
    pub fn ready(count: u64, shards: u32) -> Result<Cluster> {
        let mut cluster = Cluster::start(count, shards)?;
        cluster.wait_ready(Duration::from_secs(60))?;
        Ok(cluster)
    }

    /// As [`Cluster::ready`], with nodes that keep their data as `keeps` says, and are started with these `flags` besides.
    ///
    /// # Errors
    ///
    /// As [`Cluster::ready`].
    ///
    /// # Panics
    ///
    /// As [`Cluster::start`].
    pub fn ready_keeping(keeps: Keeps, count: u64, shards: u32, flags: &[&str]) -> Result<Cluster> {
        assert!((1..=u64::from(MAX_NODES)).contains(&count), "1 to {MAX_NODES} nodes");
        let mut cluster = Cluster::start_at(Place::Loopback(ports::reserve()?), count, shards, keeps, flags, None)?;
        cluster.wait_ready(Duration::from_secs(60))?;
        Ok(cluster)
    }

    /// As [`Cluster::ready`], with nodes that log what `filter` lets through.
    ///
    /// # Errors
    ///
    /// As [`Cluster::ready`].
    ///
    /// # Panics
    ///
    /// As [`Cluster::start`].
    pub fn ready_logging(count: u64, shards: u32, filter: &str) -> Result<Cluster> {
        assert!((1..=u64::from(MAX_NODES)).contains(&count), "1 to {MAX_NODES} nodes");
        let place = Place::Loopback(ports::reserve()?);
        let mut cluster = Cluster::start_at(place, count, shards, Keeps::Memory, &[], Some(filter))?;
        cluster.wait_ready(Duration::from_secs(60))?;
        Ok(cluster)
    }

    /// As [`Cluster::ready`], with each node in its namespace of `net`. To be called, and used, within the hub of `net`.
    ///
    /// # Errors
    ///
    /// As [`Cluster::ready`].
    pub fn ready_in(net: Arc<Network>, count: u64, shards: u32) -> Result<Cluster> {
        let mut cluster = Cluster::start_at(Place::Network(net), count, shards, Keeps::Memory, &[], None)?;
        cluster.wait_ready(Duration::from_secs(60))?;
        Ok(cluster)
    }

    fn spawn(&mut self, node: u64) -> Result<()> {
        let args = self.args(node, &|purpose| self.addr(node, purpose));
        let name = format!("node-{node}");
        let spawn = || Process::spawn_logging(&name, &self.scratch, &args, self.log.as_deref());
        let process = match &self.place {
            Place::Loopback(_) => spawn()?,
            Place::Network(net) => net.within_node(node, spawn)??,
        };
        self.nodes.insert(node, process);
        Ok(())
    }

    /// The command line of node `node` with its listeners at `own`.
    fn args(&self, node: u64, own: &dyn Fn(Use) -> SocketAddr) -> Vec<String> {
        let list = |f: &dyn Fn(u64) -> String| (1..=self.count).map(f).collect::<Vec<_>>().join(",");
        // Should the tests themselves be killed, nobody is left to end their nodes: these then stop by themselves.
        let mut args = vec!["start".to_string(), "--stop-with-stdin".into()];
        if matches!(self.place, Place::Network(_)) {
            // Its addresses are not of loopback, but nobody else reaches them.
            args.push("--insecure".into());
        }
        let mut flag = |name: &str, value: String| args.extend([format!("--{name}"), value]);
        flag("node-id", node.to_string());
        flag("initial-members", list(&|n| n.to_string()));
        flag("seeds", list(&|n| self.addr(n, Use::Gossip).to_string()));
        flag("shards", self.shards.to_string());
        flag("gossip-addr", own(Use::Gossip).to_string());
        flag("raft-addr", own(Use::Raft).to_string());
        flag("redis-addr", own(Use::Redis).to_string());
        flag("redis-cluster-addr", own(Use::RedisCluster).to_string());
        flag("http-addr", own(Use::Http).to_string());
        match self.keeps {
            Keeps::Memory => {}
            Keeps::Disk => flag("data-dir", self.data_dir(node).display().to_string()),
            Keeps::Identity => flag("state-dir", self.data_dir(node).display().to_string()),
        }
        args.extend(self.flags.iter().cloned());
        args
    }

    /// The command line of node `node` with listeners of its own in `own`, for starts that are to be refused: all else is
    /// as the node itself was started.
    pub fn command_line(&self, node: u64, own: &Block) -> Vec<String> {
        self.args(node, &|purpose| own.addr(node, purpose))
    }

    /// How large the log of `node` on disk is, in bytes, and how many replicas' states lie beside it.
    ///
    /// # Errors
    ///
    /// If it keeps none.
    pub fn on_disk(&self, node: u64) -> Result<(u64, usize)> {
        let list = |path: PathBuf| std::fs::read_dir(&path).context(format!("reading {}", path.display()));
        let dir = self.data_dir(node);
        let logs = list(dir.join("log").join("raft"))?;
        // A file may be removed while we look: then it has no length.
        let bytes = logs.flatten().filter_map(|entry| entry.metadata().ok()).map(|m| m.len()).sum();
        let states = list(dir.join("checkpoints"))?.flatten();
        Ok((bytes, states.filter(|entry| entry.path().extension().is_some_and(|e| e == "ckpt")).count()))
    }

    /// How often `node` gave up what it had on disk and began a new life, by what it kept of the old ones.
    pub fn lives_lost(&self, node: u64) -> u64 {
        let entries = std::fs::read_dir(self.data_dir(node)).into_iter().flatten().flatten();
        let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("lost-")?.parse().ok());
        numbers.max().unwrap_or(0)
    }

    /// The directory in which `node` keeps its data, if the cluster keeps any.
    pub fn data_dir(&self, node: u64) -> PathBuf {
        self.scratch.path().join(format!("data-{node}"))
    }

    /// A further process that claims to be node `node`, with listeners of its own in `own`.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn impostor(&self, node: u64, own: &Block) -> Result<Process> {
        Process::spawn(&format!("impostor-{node}"), &self.scratch, &self.command_line(node, own))
    }

    /// The directory of its logs, for further files of the test: kept when it fails.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Number of data shards.
    pub fn shards(&self) -> u32 {
        self.shards
    }

    /// The address of `node` for `purpose`.
    pub fn addr(&self, node: u64, purpose: Use) -> SocketAddr {
        self.place.addr(node, purpose)
    }

    /// The nodes whose processes we did not end, ascending.
    pub fn running(&self) -> Vec<u64> {
        self.nodes.keys().copied().collect()
    }

    /// The process of a running node.
    ///
    /// # Panics
    ///
    /// If it was ended.
    pub fn process(&mut self, node: u64) -> &mut Process {
        self.nodes.get_mut(&node).expect("the node was not ended")
    }

    /// Waits until every running node answers `/readyz` with 200.
    ///
    /// # Errors
    ///
    /// If one ended, or is not ready after `within`; says why.
    pub fn wait_ready(&mut self, within: Duration) -> Result<()> {
        for node in self.running() {
            eventually(&format!("readiness of node {node}"), within, || {
                if let Some(status) = self.process(node).ended()? {
                    return Ok(Err(Failure::new(format!("node {node} ended: {status}"))));
                }
                match http::get(self.addr(node, Use::Http), "/readyz")? {
                    (200, _) => Ok(Ok(())),
                    (status, body) => Err(Failure::new(format!("{status} {body}"))),
                }
            })??;
        }
        Ok(())
    }

    /// Shards led by each node, as node `asked` sees them, waiting up to 10 s until every shard has a leader. Nodes without a shard
    /// are absent.
    ///
    /// # Errors
    ///
    /// If a shard stays without a leader.
    pub fn leaders(&self, asked: u64) -> Result<BTreeMap<u64, Vec<u32>>> {
        eventually("a leader for every shard", Duration::from_secs(10), || {
            let list = http::get_json(self.addr(asked, Use::Http), "/v1/shards")?;
            let list = list.as_array().context_none("/v1/shards is no array")?;
            if list.len() != self.shards as usize {
                return Err(Failure::new(format!("{} of {} shards are listed", list.len(), self.shards)));
            }
            let mut led = BTreeMap::<u64, Vec<u32>>::new();
            for shard in list {
                let leader = shard["leader"].as_u64().context_none(&format!("no leader: {shard}"))?;
                let id = shard["shard"].as_u64().context_none(&format!("no shard: {shard}"))?;
                led.entry(leader).or_default().push(u32::try_from(id).context("shard id")?);
            }
            Ok(led)
        })
    }

    /// The node that leads most shards.
    ///
    /// # Errors
    ///
    /// As [`Cluster::leaders`].
    pub fn node_with_most_leaders(&self) -> Result<u64> {
        let asked = *self.nodes.keys().next().context_none("no node runs")?;
        let led = self.leaders(asked)?;
        led.into_iter().max_by_key(|(_, shards)| shards.len()).map(|(node, _)| node).context_none("no shards")
    }

    /// `kill -9` of a node.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn kill(&mut self, node: u64) -> Result<()> {
        self.nodes.remove(&node).context_none("the node does not run")?.kill()
    }

    /// `kill -9` of every running node, as nearly at one moment as signals can be sent.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn kill_all(&mut self) -> Result<()> {
        let mut ended = std::mem::take(&mut self.nodes);
        // First all signals, then the waiting: else the last ones would live on while the first ones end.
        ended.values_mut().try_for_each(|process| process.signal(Signal::KILL))?;
        ended.values_mut().try_for_each(Process::kill)
    }

    /// SIGTERM to a node; returns how it ended.
    ///
    /// # Errors
    ///
    /// If it does not run, or still runs after `within`.
    pub fn terminate(&mut self, node: u64, within: Duration) -> Result<ExitStatus> {
        let mut process = self.nodes.remove(&node).context_none("the node does not run")?;
        process.signal(Signal::TERM)?;
        process.wait(within)
    }

    /// Starts a node that was ended, with the same command line.
    ///
    /// # Errors
    ///
    /// If it runs, or does not start.
    pub fn restart(&mut self, node: u64) -> Result<()> {
        if self.nodes.contains_key(&node) {
            return Err(Failure::new(format!("node {node} still runs")));
        }
        self.spawn(node)
    }

    /// Gives the nodes other addresses, which count from their next start.
    ///
    /// # Errors
    ///
    /// If no ports are free.
    ///
    /// # Panics
    ///
    /// If a node runs, or the nodes are not on the loopback.
    pub fn move_elsewhere(&mut self) -> Result<()> {
        assert!(self.nodes.is_empty() && matches!(self.place, Place::Loopback(_)));
        self.place = Place::Loopback(ports::reserve()?);
        Ok(())
    }

    /// Starts all nodes that do not run, with the same command lines.
    ///
    /// # Errors
    ///
    /// If one does not start.
    pub fn restart_all(&mut self) -> Result<()> {
        (1..=self.count)
            .filter(|node| !self.nodes.contains_key(node))
            .collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|node| self.spawn(node))
    }

    /// Waits until all nodes run replicas of every shard that hold the same: equal digests at equal applied indexes. To be
    /// called while nobody writes.
    ///
    /// # Errors
    ///
    /// If they still differ after `within`; says where.
    pub fn wait_equal_digests(&self, within: Duration) -> Result<()> {
        eventually("equal digests on all nodes", within, || {
            let mut seen = BTreeMap::<u64, (u64, serde_json::Value)>::new();
            for node in 1..=self.count {
                let list = http::get_json(self.addr(node, Use::Http), "/v1/shards")?;
                let list = list.as_array().context_none("/v1/shards is no array")?;
                if list.len() != self.shards as usize {
                    return Err(Failure::new(format!("node {node} lists {} of {} shards", list.len(), self.shards)));
                }
                for shard in list {
                    let id = shard["shard"].as_u64().context_none(&format!("no shard: {shard}"))?;
                    let holds = serde_json::json!([shard["applied"], shard["digest"], shard["keys"]]);
                    if !shard["digest"].is_string() {
                        return Err(Failure::new(format!("node {node} has no replica of shard {id}: {shard}")));
                    }
                    let (first, expected) = seen.entry(id).or_insert_with(|| (node, holds.clone()));
                    if *expected != holds {
                        let what = "[applied, digest, keys]";
                        return Err(Failure::new(format!(
                            "shard {id}, {what}: {expected} on node {first}, {holds} on node {node}"
                        )));
                    }
                }
            }
            Ok(())
        })
    }

    /// Runs a client command of `crema` against `node`'s admin API: exit status, standard output and error.
    ///
    /// # Errors
    ///
    /// If it does not end within 20 s.
    pub fn client_command(&self, name: &str, node: u64, args: &[&str]) -> Result<(ExitStatus, String, String)> {
        let mut all = vec![name.to_string(), "--http-addr".into(), self.addr(node, Use::Http).to_string()];
        all.extend(args.iter().map(|a| a.to_string()));
        run(&format!("{name}-{}", args.join("")), &self.scratch, &all)
    }
}

/// Runs `crema ARGS` to its end: exit status, standard output and error.
///
/// # Errors
///
/// If it does not start, or does not end within 20 s.
pub fn run(name: &str, scratch: &Scratch, args: &[String]) -> Result<(ExitStatus, String, String)> {
    let mut process = Process::spawn(name, scratch, args)?;
    let status = process.wait(Duration::from_secs(20))?;
    Ok((status, process.stdout(), process.stderr()))
}

trait ContextNone<T> {
    fn context_none(self, what: &str) -> Result<T>;
}

impl<T> ContextNone<T> for Option<T> {
    fn context_none(self, what: &str) -> Result<T> {
        self.ok_or_else(|| Failure::new(what))
    }
}
