//! Stories with a known end: no chance in what happens, only in the delays within a millisecond. One file a theme.

mod clocks;
mod disk;
mod expiry;
mod filling;
mod leadership;
mod leases;
mod memory;
mod recovery;
mod requests;
mod sleep;
mod voters;

use super::model::Command;
use super::world::{Block, MS, Options, World};
use crema_core::{NodeId, Published, Reply, ShardId};
use crema_shard::message::{KIND_ANSWERS, KIND_REQUESTS};
use crema_shard::replica::Replica;
use crema_shard::{ClientResult, ConnId, Token};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

const SHARD: ShardId = ShardId(0);
const PATIENCE: Duration = Duration::from_secs(5);

/// A cluster, and what its clients were answered.
struct Story {
    world: World,
    answers: BTreeMap<(ConnId, Token), ClientResult>,
}

impl Story {
    /// Three nodes, one shard, ready.
    fn begin() -> Story {
        Story::with(Options::default(), |_| {})
    }

    /// The same in another shape; `before` happens before the nodes have done anything.
    fn with(options: Options, before: impl FnOnce(&mut World)) -> Story {
        let world = World::new(Options { seed: options.seed.max(1), shards: 1, ..options });
        let mut s = Story { world, answers: BTreeMap::new() };
        before(&mut s.world);
        let ready = |w: &World| {
            w.ids().iter().all(|n| w.host(*n).is_some_and(|h| h.view().not_ready.is_none()))
                && w.leader(SHARD).is_some()
        };
        assert!(s.world.run_until(Duration::from_secs(5), ready), "founded");
        s
    }

    fn leader(&self) -> NodeId {
        self.world.leader(SHARD).expect("a leader")
    }

    fn others(&self, node: NodeId) -> [NodeId; 2] {
        let rest: Vec<NodeId> = self.world.ids().into_iter().filter(|n| *n != node).collect();
        [rest[0], rest[1]]
    }

    fn ask(&mut self, node: NodeId, conn: ConnId, key: &str, command: &Command, patience: Duration) -> (ConnId, Token) {
        let token = self.world.submit(node, conn, key, command.is_write(), command.encode(key), patience);
        (conn, token.expect("the gateway knows the placement"))
    }

    fn gather(&mut self) {
        for f in std::mem::take(&mut self.world.finished) {
            self.answers.insert((f.conn, f.token), f.result);
        }
        assert!(self.world.violations.is_empty(), "{:?}\n{}", self.world.violations, self.world.trace.tail(60));
    }

    fn run(&mut self, ms: u64) {
        self.world.run_for(Duration::from_millis(ms));
        self.gather();
    }

    /// The answer, if it comes within the time.
    fn answer(&mut self, of: (ConnId, Token), ms: u64) -> Option<ClientResult> {
        for _ in 0..ms.div_ceil(10) {
            if self.answers.contains_key(&of) {
                break;
            }
            self.run(10);
        }
        self.answers.get(&of).cloned()
    }

    /// Asks on a connection of its own and waits for the answer.
    #[track_caller]
    fn expect(&mut self, node: NodeId, key: &str, command: Command, reply: Reply) {
        let conn = self.world.connect();
        let asked = self.ask(node, conn, key, &command, PATIENCE);
        let got = self.answer(asked, 6_000);
        assert_eq!(got, Some(ClientResult::Reply(reply)), "{command:?} at {node:?}\n{}", self.world.trace.tail(60));
    }

    fn replica(&self, node: NodeId) -> Option<&Replica> {
        replica(&self.world, node)
    }

    fn asleep(&self, node: NodeId) -> bool {
        self.replica(node).is_some_and(|r| r.asleep())
    }

    /// What readers outside of the driver look at.
    fn published(&self, node: NodeId) -> Arc<Published> {
        self.replica(node).and_then(|r| r.published()).expect("a data shard's replica").clone()
    }

    /// Hands the shard over to `to` and waits until it leads.
    #[track_caller]
    fn hand_over(&mut self, to: NodeId) {
        let from = self.leader();
        self.world.transfer(from, SHARD, to);
        self.wait(1_000, "the transfer", |w| w.leader(SHARD) == Some(to));
    }

    #[track_caller]
    fn wait(&mut self, limit_ms: u64, what: &str, condition: impl FnMut(&World) -> bool) {
        let reached = self.world.run_until(Duration::from_millis(limit_ms), condition);
        self.gather();
        assert!(reached, "{what}\n{}", self.world.trace.tail(60));
    }
}

fn replica(world: &World, node: NodeId) -> Option<&Replica> {
    world.host(node)?.coordinator().replica(SHARD)
}
/// The nodes that would answer a read alone.
fn lease_holders(world: &World) -> Vec<NodeId> {
    let holds = |n: &NodeId| replica(world, *n).is_some_and(|r| r.holds_lease(world.clock(*n)));
    world.alive().into_iter().filter(holds).collect()
}
fn set(v: &str) -> Command {
    Command::Set(v.into())
}
fn bulk(v: &str) -> Reply {
    Reply::Bulk(v.as_bytes().to_vec().into())
}
fn replied(r: &Option<ClientResult>) -> bool {
    matches!(r, Some(ClientResult::Reply(_)))
}
