//! Blocks of free loopback ports.
//!
//! A port that was free a moment ago may be anybody's when the child binds it. So the blocks lie below the range from
//! which systems take ports for outgoing connections, and the first port of a block stays bound by us as its lock:
//! several test processes never hand out the same block.

use super::{Failure, Result};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};

/// Most nodes a block has ports for.
pub const MAX_NODES: u16 = 5;
const BLOCK: u16 = 1 + 5 * MAX_NODES;
const FIRST: u16 = 16_384;
const BLOCKS: u16 = 600;

/// What a port of a node is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// RESP, proxying.
    Redis,
    /// RESP, redirecting.
    RedisCluster,
    /// Gossip, UDP.
    Gossip,
    /// Raft and forwarded requests.
    Raft,
    /// The admin API.
    Http,
}

/// Ports for up to [`MAX_NODES`] nodes, ours until this is dropped.
#[derive(Debug)]
pub struct Block {
    lock: TcpListener,
    first: u16,
}

impl Block {
    /// The port of node `node`, counted from 1, for `purpose`. The ports of nodes 1, 2, 3 for one purpose are consecutive.
    ///
    /// # Panics
    ///
    /// If `node` is not 1 to [`MAX_NODES`].
    pub fn port(&self, node: u64, purpose: Use) -> u16 {
        assert!(
            (1..=u64::from(MAX_NODES)).contains(&node),
            "node {node}: a block has ports for nodes 1 to {MAX_NODES}"
        );
        self.first + 1 + purpose as u16 * MAX_NODES + (node - 1) as u16
    }

    /// The same as an address.
    pub fn addr(&self, node: u64, purpose: Use) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port(node, purpose)))
    }

    /// Whether the lock is still held; always true, and keeps the field honest.
    pub fn is_locked(&self) -> bool {
        self.lock.local_addr().is_ok_and(|a| a.port() == self.first)
    }
}

/// Reserves a block of ports that are all free now.
///
/// # Errors
///
/// If there is none.
pub fn reserve() -> Result<Block> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes begin at different places, so that they seldom meet.
    let start = (std::process::id() % u32::from(BLOCKS)) as u16;
    for _ in 0..BLOCKS {
        let at = (start + NEXT.fetch_add(1, Ordering::Relaxed) % BLOCKS) % BLOCKS;
        let first = FIRST + at * BLOCK;
        let Ok(lock) = TcpListener::bind((Ipv4Addr::LOCALHOST, first)) else {
            continue;
        };
        let free = |port: u16| {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
                && UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
        };
        if (first + 1..first + BLOCK).all(free) {
            return Ok(Block { lock, first });
        }
    }
    Err(Failure::new(format!("no free block of {BLOCK} ports on loopback above {FIRST}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn blocks_do_not_overlap_and_ports_do_not_repeat() {
        let blocks = [reserve().unwrap(), reserve().unwrap()];
        let mut seen = BTreeSet::new();
        for block in &blocks {
            assert!(block.is_locked());
            for node in 1..=u64::from(MAX_NODES) {
                for purpose in [Use::Redis, Use::RedisCluster, Use::Gossip, Use::Raft, Use::Http] {
                    assert!(seen.insert(block.port(node, purpose)), "{purpose:?} of node {node} repeats");
                }
            }
        }
        assert_eq!(blocks[0].port(2, Use::Raft), blocks[0].port(1, Use::Raft) + 1);
    }
}
