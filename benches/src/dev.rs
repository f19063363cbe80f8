//! A cluster of `crema dev` in processes of its own.

use crema_tests::process::ports::{self, Block, Use};
use crema_tests::process::{Context, Failure, Process, Result, Scratch, eventually, http};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::time::Duration;

const READY_WITHIN: Duration = Duration::from_secs(120);
const STOP_WITHIN: Duration = Duration::from_secs(30);

/// A running cluster. Dropping it ends it without grace.
pub(crate) struct Dev {
    process: Process,
    block: Block,
    nodes: u64,
    // Where its logs are, until it has ended.
    _scratch: Scratch,
}

impl Dev {
    /// Starts it and waits until it is ready; `more` are further flags.
    pub(crate) fn start(nodes: u64, shards: u32, more: &[&str]) -> Result<Dev> {
        let scratch = Scratch::new()?;
        let block = ports::reserve()?;
        let bases = [
            ("redis-port", Use::Redis),
            ("redis-cluster-port", Use::RedisCluster),
            ("gossip-port", Use::Gossip),
            ("raft-port", Use::Raft),
            ("http-port", Use::Http),
        ];
        let mut flags = vec!["dev".to_string(), format!("--nodes={nodes}"), format!("--shards={shards}")];
        flags.extend(bases.map(|(flag, purpose)| format!("--{flag}={}", block.port(1, purpose))));
        flags.extend(more.iter().map(|flag| flag.to_string()));
        let process = Process::spawn("dev", &scratch, &flags)?;
        let mut dev = Dev { process, block, nodes, _scratch: scratch };
        eventually("the cluster's ready line", READY_WITHIN, || {
            if let Some(status) = dev.process.ended()? {
                return Ok(Err(Failure::new(format!("crema dev ended: {status}\n{}", dev.last_words()))));
            }
            let ready = dev.process.stdout().lines().any(|line| line.starts_with("ready"));
            if ready { Ok(Ok(())) } else { Err(Failure::new(dev.last_words())) }
        })??;
        Ok(dev)
    }

    fn last_words(&self) -> String {
        crema_tests::process::child::tail(&self.process.stderr(), 5)
    }

    /// Where each node listens for `purpose`.
    pub(crate) fn addrs(&self, purpose: Use) -> Vec<SocketAddr> {
        (1..=self.nodes).map(|node| self.block.addr(node, purpose)).collect()
    }

    /// The sum of a counter over all nodes; `name` as it stands in `/metrics`.
    pub(crate) fn counter(&self, name: &str) -> Result<u64> {
        let mut sum = 0;
        for addr in self.addrs(Use::Http) {
            let (_, page) = http::get(addr, "/metrics")?;
            let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            let value = value.ok_or_else(|| Failure::new(format!("{addr} has no metric {name}")))?;
            sum += value.trim().parse::<u64>().context(name)?;
        }
        Ok(sum)
    }

    /// Stops it in good order.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.process.signal(Signal::TERM)?;
        let status = self.process.wait(STOP_WITHIN)?;
        if status.success() {
            Ok(())
        } else {
            Err(Failure::new(format!("crema dev ended with {status}\n{}", self.last_words())))
        }
    }
}
