//! CLUSTER: the cluster as cluster clients want to see it.
//!
//! Every address named here is one of the listeners that answer `MOVED`: cluster clients end up there, whichever
//! listener they came by. Every slot is given to somebody who serves it: its leader, or in an election a replica that
//! will hold the command until there is one.
//!
//! **A node is a primary or a replica, never both.** That is how Redis Cluster works, and clients rely on it: redis-py
//! gives each address the role it was first seen in, and sends DBSIZE, SCAN and FLUSHALL to primaries only. Here most
//! nodes lead some shards and follow others. So whoever leads anything is named as a primary only, and the replicas named
//! are the nodes that lead nothing. Nothing is lost by that: reads are answered by leaders.

use crate::resp::encode::{self, Proto};
use bytes::BytesMut;
use crema_core::{NodeId, SLOT_COUNT};
use crema_shard::{RoutingView, ShardRoute, Standing};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

/// Where clients reach a node's cluster listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Host name or address, an IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// `host:port` in two; `None` if it is no address.
fn split(addr: &str) -> Option<(&str, u16)> {
    let (host, port) = addr.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    Some((host, port.parse().ok()?)).filter(|(host, _)| !host.is_empty())
}

fn is_unspecified(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified())
}

/// Where clients reach the cluster listener of `node`. `None` if it has none. A node that only said "all interfaces" is
/// named by its raft address, which others do reach, or else by `local`: the address that this client came to.
pub fn endpoint(view: &RoutingView, node: NodeId, local: SocketAddr) -> Option<Endpoint> {
    let route = view.nodes.get(&node)?;
    let (host, port) = split(route.addrs.redis_cluster.as_deref()?)?;
    if !is_unspecified(host) {
        return Some(Endpoint { host: host.to_owned(), port });
    }
    let raft = split(&route.addrs.raft).map(|(host, _)| host).filter(|host| !is_unspecified(host) && node != view.this);
    let host = raft.map_or_else(|| local.ip().to_string(), str::to_owned);
    Some(Endpoint { host, port })
}

/// A node's id as cluster clients know it: 40 hexadecimal digits, the same on every node and for ever.
pub fn node_id(view: &RoutingView, node: NodeId) -> String {
    let uuid = view.uuid.map_or(0, |u| u.0);
    format!("{:024x}{:016x}", uuid >> 32, node.0)
}

/// Who is named as the owner of a shard's slots, and so covers it in commands without keys: its leader, or without one
/// the first live replica. Only nodes with a cluster listener own anything.
pub fn owner(view: &RoutingView, route: &ShardRoute) -> Option<NodeId> {
    let listens = |n: &NodeId| view.nodes.get(n).is_some_and(|r| r.addrs.redis_cluster.is_some());
    let live = |n: &NodeId| view.nodes.get(n).is_some_and(|r| r.live);
    let replicas = || route.replicas.iter().map(|(node, ..)| *node);
    route
        .leader
        .filter(listens)
        .or_else(|| replicas().find(|n| listens(n) && live(n)))
        .or_else(|| Some(view.this).filter(listens))
        .or_else(|| replicas().find(listens))
}

/// The owners of all shards, each with what it owns.
fn owners(view: &RoutingView) -> BTreeMap<NodeId, Vec<&ShardRoute>> {
    let mut owned: BTreeMap<NodeId, Vec<&ShardRoute>> = BTreeMap::new();
    for shard in &view.shards {
        if let Some(owner) = owner(view, shard) {
            owned.entry(owner).or_default().push(shard);
        }
    }
    owned
}

/// Shards with the endpoints of their owner and then of their replicas; a shard that nobody listens for is left out.
fn named(view: &RoutingView, local: SocketAddr) -> Vec<(&ShardRoute, Vec<(NodeId, Endpoint)>)> {
    let owners = owners(view);
    let live = |n: &NodeId| view.nodes.get(n).is_some_and(|r| r.live);
    let shards = view.shards.iter().filter_map(|route| {
        let owner = owner(view, route)?;
        let first = (owner, endpoint(view, owner, local)?);
        let held =
            route.replicas.iter().filter(|(_, _, standing)| *standing == Standing::Voter).map(|(node, ..)| *node);
        let replicas = held.filter(|n| live(n) && !owners.contains_key(n));
        let replicas = replicas.filter_map(|n| Some((n, endpoint(view, n, local)?)));
        Some((route, [first].into_iter().chain(replicas).collect()))
    });
    shards.collect()
}

/// CLUSTER SLOTS.
pub fn slots(out: &mut BytesMut, proto: Proto, view: &RoutingView, local: SocketAddr) {
    let arcs = named(view, local);
    encode::array(out, arcs.len());
    for (route, nodes) in arcs {
        encode::array(out, 2 + nodes.len());
        encode::int(out, i64::from(route.range.start));
        encode::int(out, i64::from(route.range.end) - 1);
        for (node, endpoint) in nodes {
            encode::array(out, 4);
            encode::bulk(out, endpoint.host.as_bytes());
            encode::int(out, i64::from(endpoint.port));
            encode::bulk(out, node_id(view, node).as_bytes());
            encode::map(out, proto, 0);
        }
    }
}

/// CLUSTER SHARDS.
pub fn shards(out: &mut BytesMut, proto: Proto, view: &RoutingView, local: SocketAddr) {
    let arcs = named(view, local);
    encode::array(out, arcs.len());
    for (route, nodes) in arcs {
        encode::map(out, proto, 2);
        encode::bulk(out, b"slots");
        encode::array(out, 2);
        encode::int(out, i64::from(route.range.start));
        encode::int(out, i64::from(route.range.end) - 1);
        encode::bulk(out, b"nodes");
        encode::array(out, nodes.len());
        for (i, (node, endpoint)) in nodes.iter().enumerate() {
            encode::map(out, proto, 7);
            let mut pair = |name: &str, value: &str| {
                encode::bulk(out, name.as_bytes());
                encode::bulk(out, value.as_bytes());
            };
            pair("id", &node_id(view, *node));
            pair("ip", &endpoint.host);
            pair("endpoint", &endpoint.host);
            pair("role", if i == 0 { "master" } else { "replica" });
            pair("health", if view.nodes.get(node).is_some_and(|n| n.live) { "online" } else { "failed" });
            encode::bulk(out, b"port");
            encode::int(out, i64::from(endpoint.port));
            encode::bulk(out, b"replication-offset");
            encode::int(out, 0);
        }
    }
}

/// CLUSTER NODES. A node that leads nothing is the replica of an owner whose shard it holds; one that holds nothing is a
/// primary without slots.
pub fn nodes(view: &RoutingView, local: SocketAddr) -> String {
    let mut text = String::new();
    let owned = owners(view);
    let mut follows: BTreeMap<NodeId, NodeId> = BTreeMap::new();
    for shard in &view.shards {
        let Some(owner) = owner(view, shard) else { continue };
        for (node, ..) in shard.replicas.iter().filter(|(n, _, s)| *s == Standing::Voter && !owned.contains_key(n)) {
            follows.entry(*node).or_insert(owner);
        }
    }
    for (node, route) in &view.nodes {
        let Some(Endpoint { host, port }) = endpoint(view, *node, local) else { continue };
        let bus = split(&route.addrs.raft).map_or(0, |(_, port)| port);
        let leader = follows.get(node).map(|n| node_id(view, *n));
        let role = if leader.is_some() { "slave" } else { "master" };
        let (before, after) = match (*node == view.this, route.live) {
            (true, _) => ("myself,", ""),
            (false, true) => ("", ""),
            (false, false) => ("", ",fail"),
        };
        let link = if route.live { "connected" } else { "disconnected" };
        let (id, leader, epoch) = (node_id(view, *node), leader.as_deref().unwrap_or("-"), view.epoch);
        // Writing to a string cannot fail.
        let _ = write!(text, "{id} {host}:{port}@{bus} {before}{role}{after} {leader} 0 0 {epoch} {link}");
        for shard in owned.get(node).into_iter().flatten() {
            match (shard.range.start, shard.range.end - 1) {
                (first, last) if first == last => write!(text, " {first}"),
                (first, last) => write!(text, " {first}-{last}"),
            }
            .unwrap_or_default();
        }
        text.push('\n');
    }
    text
}

/// CLUSTER INFO.
pub fn info(view: &RoutingView) -> String {
    let led = |r: &&ShardRoute| r.leader.is_some();
    let assigned: usize = view.shards.iter().map(|r| r.range.len()).sum();
    let ok: usize = view.shards.iter().filter(led).map(|r| r.range.len()).sum();
    let size = view.shards.iter().filter_map(|r| r.leader).collect::<BTreeSet<_>>().len();
    let state = if ok == usize::from(SLOT_COUNT) { "ok" } else { "fail" };
    let known = view.nodes.len();
    format!(
        "cluster_state:{state}\r\ncluster_slots_assigned:{assigned}\r\ncluster_slots_ok:{ok}\r\n\
         cluster_slots_pfail:{}\r\ncluster_slots_fail:0\r\ncluster_known_nodes:{known}\r\ncluster_size:{size}\r\n\
         cluster_current_epoch:{epoch}\r\ncluster_my_epoch:{epoch}\r\ncluster_stats_messages_sent:0\r\n\
         cluster_stats_messages_received:0\r\n",
        assigned - ok,
        epoch = view.epoch,
    )
}

/// How many replicas besides the one that answers have surely got every acknowledged write: a quorum's others, on the
/// shard where they are fewest.
pub fn quorum_others(view: &RoutingView) -> usize {
    view.shards.iter().map(|r| r.replicas.len() / 2).min().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::testing::{three_shards, view_of, written};
    use crema_core::Epoch;

    fn local() -> SocketAddr {
        "192.0.2.9:7379".parse().unwrap()
    }

    #[test]
    fn addresses() {
        assert_eq!(split("a.example:80"), Some(("a.example", 80)));
        assert_eq!(split("[::1]:80"), Some(("::1", 80)));
        for bad in ["", "a", ":80", "a:", "a:99999"] {
            assert_eq!(split(bad), None, "{bad}");
        }
        let mut view = three_shards();
        let mut at = |node: u64, cluster: Option<&str>, raft: &str| {
            let addrs = &mut view.nodes.get_mut(&NodeId(node)).unwrap().addrs;
            addrs.redis_cluster = cluster.map(str::to_owned);
            addrs.raft = raft.to_owned();
            endpoint(&view, NodeId(node), local()).map(|e| format!("{} {}", e.host, e.port))
        };
        assert_eq!(at(2, Some("10.0.0.2:7379"), "x:1").as_deref(), Some("10.0.0.2 7379"));
        assert_eq!(at(2, Some("0.0.0.0:7379"), "10.1.1.1:9001").as_deref(), Some("10.1.1.1 7379"));
        assert_eq!(at(2, Some("[::]:7379"), "0.0.0.0:9001").as_deref(), Some("192.0.2.9 7379"));
        assert_eq!(at(1, Some("0.0.0.0:7379"), "10.1.1.1:9001").as_deref(), Some("192.0.2.9 7379"), "this node");
        assert_eq!(at(2, None, "x:1"), None);
        assert_eq!(endpoint(&view, NodeId(9), local()), None);
    }

    #[test]
    fn every_slot_is_named_with_its_leader_first() {
        let view = three_shards();
        let text = written(|out| slots(out, Proto::Resp2, &view, local()));
        let id = |n| node_id(&view, NodeId(n));
        let node = |n: u64| format!("*4\r\n$8\r\n10.0.0.{n}\r\n:{}\r\n$40\r\n{}\r\n*0\r\n", 7378 + n, id(n));
        let wanted = format!(
            "*3\r\n*3\r\n:0\r\n:5461\r\n{}*3\r\n:5462\r\n:10922\r\n{}*3\r\n:10923\r\n:16383\r\n{}",
            node(1),
            node(2),
            node(3)
        );
        assert_eq!(text, wanted);
        assert_eq!(id(1).len(), 40);
        // Two nodes lead nothing: they are the replicas.
        let one = view_of(&[(0, 16384)]);
        let text = written(|out| slots(out, Proto::Resp2, &one, local()));
        assert_eq!(text, format!("*1\r\n*5\r\n:0\r\n:16383\r\n{}{}{}", node(1), node(2), node(3)));
        let text = written(|out| shards(out, Proto::Resp3, &one, local()));
        let start = "*1\r\n%2\r\n$5\r\nslots\r\n*2\r\n:0\r\n:16383\r\n$5\r\nnodes\r\n*3\r\n%7\r\n$2\r\nid\r\n$40\r\n";
        assert!(text.starts_with(start), "{text}");
        assert_eq!((text.matches("$6\r\nmaster").count(), text.matches("$7\r\nreplica").count()), (1, 2));
        let lines = nodes(&one, local());
        let lines: Vec<&str> = lines.lines().collect();
        assert!(lines[0].ends_with("myself,master - 0 0 7 connected 0-16383"));
        assert!(lines[1].ends_with(&format!(" slave {} 0 0 7 connected", id(1))), "{}", lines[1]);
    }

    #[test]
    fn nobody_is_a_primary_and_a_replica() {
        for view in [three_shards(), view_of(&[(0, 8192), (8192, 16384)]), view_of(&[(0, 16384)])] {
            let arcs = named(&view, local());
            let primaries: BTreeSet<NodeId> = arcs.iter().map(|(_, nodes)| nodes[0].0).collect();
            let replicas: BTreeSet<NodeId> = arcs.iter().flat_map(|(_, nodes)| &nodes[1..]).map(|(n, _)| *n).collect();
            assert!(primaries.is_disjoint(&replicas));
            assert_eq!(primaries.len() + replicas.len(), 3, "and everybody is named");
        }
    }

    #[test]
    fn a_shard_without_a_leader_is_still_named() {
        let mut view = three_shards();
        view.shards[1].leader = None;
        view.nodes.get_mut(&NodeId(2)).unwrap().live = false;
        let text = nodes(&view, local());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(
            lines[0].ends_with("10.0.0.1:7379@9001 myself,master - 0 0 7 connected 0-5461 5462-10922"),
            "{}",
            lines[0]
        );
        let down = format!("10.0.0.2:7380@9002 slave,fail {} 0 0 7 disconnected", node_id(&view, NodeId(1)));
        assert!(lines[1].ends_with(&down), "{}", lines[1]);
        assert!(lines[2].ends_with("10.0.0.3:7381@9003 master - 0 0 7 connected 10923-16383"), "{}", lines[2]);
        assert!(
            info(&view).starts_with("cluster_state:fail\r\ncluster_slots_assigned:16384\r\ncluster_slots_ok:10923\r\n")
        );
        let slots = written(|out| slots(out, Proto::Resp2, &view, local()));
        assert!(slots.contains("*3\r\n:5462\r\n:10922\r\n*4\r\n$8\r\n10.0.0.1"), "node 1 holds it, node 2 is down");
    }

    #[test]
    fn leaders_without_a_cluster_listener_are_not_named() {
        let mut view = three_shards();
        view.nodes.get_mut(&NodeId(2)).unwrap().addrs.redis_cluster = None;
        let text = nodes(&view, local());
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().next().unwrap().ends_with(" 0-5461 5462-10922"));
    }

    #[test]
    fn info_says_ok_when_every_shard_is_led() {
        let view = three_shards();
        let text = info(&view);
        for line in ["cluster_state:ok", "cluster_slots_ok:16384", "cluster_known_nodes:3", "cluster_size:3"] {
            assert!(text.lines().any(|l| l == line), "{line}");
        }
        let empty = RoutingView::default();
        assert!(info(&empty).starts_with("cluster_state:fail\r\ncluster_slots_assigned:0\r\n"));
        assert_eq!(written(|out| slots(out, Proto::Resp2, &empty, local())), "*0\r\n");
        assert_eq!(nodes(&empty, local()), "");
        assert_eq!((quorum_others(&view), quorum_others(&empty)), (1, 0));
        assert_eq!(view.epoch, Epoch(7));
    }
}
