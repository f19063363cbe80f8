use super::*;
use crate::effect::Token;
use crate::message::ASKED_AT_ONCE;
use crema_core::{KeyRef, Op, Reply, SetCond, SetExpire, WallTime, encode_ops};
use std::collections::VecDeque;

/// Three hosts, perfect connections, one clock.
struct Net {
    hosts: BTreeMap<NodeId, Host>,
    frames: VecDeque<(NodeId, Send)>,
    now: Now,
    done: BTreeMap<(NodeId, u64), ClientResult>,
    notes: Vec<(NodeId, Note)>,
    next_token: u64,
}

fn incarnation(node: u64) -> Incarnation {
    Incarnation(1000 + u128::from(node))
}

impl Net {
    fn new(nodes: u64, shards: u32) -> Self {
        let now = Now { mono: MonoTime(1_000_000_000), wall: WallTime(1_700_000_000_000) };
        let hosts = (1..=nodes)
            .map(|n| {
                let config = HostConfig {
                    node: NodeId(n),
                    incarnation: incarnation(n),
                    cluster: "t".into(),
                    initial_members: (1..=nodes).map(NodeId).collect(),
                    uuid: None,
                    generation: 0,
                    shards,
                    replication: 3,
                    addrs: NodeAddrs { raft: format!("127.0.0.1:{}", 9000 + n), ..NodeAddrs::default() },
                    entropy: [n, 2, 3],
                    timing: Timing::default(),
                    max_log_bytes: 1 << 20,
                    read_mode: ReadMode::Lease,
                    snapshot_chunk_bytes: 256,
                    process: n,
                    checkpoint_log_bytes: None,
                    memory: MemoryOptions::default(),
                    auto_voters: AutoVoters::default(),
                };
                (NodeId(n), Host::new(config, now))
            })
            .collect();
        let mut net =
            Net { hosts, frames: VecDeque::new(), now, done: BTreeMap::new(), notes: Vec::new(), next_token: 0 };
        for a in 1..=nodes {
            for b in (1..=nodes).filter(|b| *b != a) {
                net.hosts.get_mut(&NodeId(a)).unwrap().peer_up(now, NodeId(b), incarnation(b));
            }
        }
        net
    }

    fn settle(&mut self) {
        loop {
            let mut idle = true;
            for (node, host) in &mut self.hosts {
                let mut e = Effects::default();
                host.poll(self.now, &mut e);
                idle &= e.is_empty();
                for b in &e.persist {
                    host.persisted(self.now, b.number);
                }
                self.frames.extend(e.sends.into_iter().map(|s| (*node, s)));
                for c in e.completions {
                    assert!(self.done.insert((*node, c.token.0), c.result).is_none(), "completed twice");
                }
                self.notes.extend(e.notes.into_iter().map(|n| (*node, n)));
            }
            while let Some((from, s)) = self.frames.pop_front() {
                idle = false;
                if let Some(host) = self.hosts.get_mut(&s.to) {
                    host.frame(self.now, from, incarnation(from.0), s.channel, s.frame).unwrap();
                }
            }
            if idle {
                return;
            }
        }
    }

    fn run(&mut self, ms: u64) {
        for _ in 0..ms / 10 {
            self.now.mono.0 += 10_000_000;
            self.now.wall.0 += 10;
            for host in self.hosts.values_mut() {
                if host.next_tick() <= self.now.mono {
                    host.tick(self.now);
                }
            }
            self.settle();
        }
    }

    fn submit(&mut self, node: u64, key: &[u8], write: bool, op: impl Fn(KeyRef<'_>) -> Bytes) -> u64 {
        let key = KeyRef::new(0, key).unwrap();
        let host = self.hosts.get_mut(&NodeId(node)).unwrap();
        let shard = host.view().shard_of(key.slot).expect("the placement is known");
        self.next_token += 1;
        let deadline = self.now.mono.after(Duration::from_secs(5));
        let request = ClientRequest {
            conn: ConnId(node),
            token: Token(self.next_token),
            shard,
            write,
            level: ReadLevel::Linearizable,
            ops: op(key),
            deadline,
        };
        host.submit(self.now, request);
        self.next_token
    }

    fn set(&mut self, node: u64, key: &[u8], value: &[u8]) -> u64 {
        self.submit(node, key, true, |key| {
            let op = Op::Set { key, value, cond: SetCond::Always, expire: SetExpire::Clear, get: false };
            encode_ops(&[op]).unwrap()
        })
    }

    fn get(&mut self, node: u64, key: &[u8]) -> u64 {
        self.submit(node, key, false, |key| encode_ops(&[Op::Get { key }]).unwrap())
    }

    fn leaders(&self) -> BTreeMap<NodeId, usize> {
        let mut count = BTreeMap::new();
        for (n, h) in &self.hosts {
            count.insert(
                *n,
                h.coordinator().replicas().filter(|r| r.leadership().leads && !r.shard().is_meta()).count(),
            );
        }
        count
    }
}

/// A founding record knows no limits of memory: until the table has them, shards would take more than the node has.
#[test]
fn a_node_is_not_ready_before_its_memory_is_registered() {
    let mut net = Net::new(3, 4);
    let limit = 64 << 20;
    for host in net.hosts.values_mut() {
        host.config.memory.max_memory = limit;
    }
    net.settle();
    let is_registered = |h: &Host| h.meta_state().is_some_and(|s| s.nodes[&h.config.node].max_memory == limit);
    while !net.hosts.values().all(|h| h.view().not_ready.is_none()) {
        assert!(net.hosts.values().all(|h| h.view().not_ready.is_some() || is_registered(h)));
        net.run(10);
        assert!(net.now.mono < MonoTime(20_000_000_000), "it registers");
    }
    assert!(net.hosts.values().all(is_registered));
}

/// Nobody gossips here, and nothing is asked of the cluster: nodes without a replica ask who leads, again and again.
#[test]
fn whoever_knows_no_leader_of_a_group_finds_out() {
    // More groups than are asked for at once.
    let mut net = Net::new(5, ASKED_AT_ONCE as u32 + 500);
    let leaders_known = |net: &Net| {
        let led = |h: &Host| {
            let led = h.coordinator().replicas().map(|r| (r.shard(), r.leadership())).filter(|(_, l)| l.leads);
            led.map(|(shard, l)| (shard, (h.config.node, l.term))).collect::<Vec<_>>()
        };
        let led: BTreeMap<ShardId, (NodeId, Term)> = net.hosts.values().flat_map(led).collect();
        for host in net.hosts.values() {
            let view = host.view();
            assert_eq!(view.not_ready, None, "node {}", host.config.node);
            assert_eq!(view.meta_leader, led.get(&ShardId::META).map(|(leader, _)| *leader));
            for (i, route) in view.shards.iter().enumerate() {
                let known = route.leader.map(|leader| (leader, route.term));
                assert_eq!(known, led.get(&ShardId(i as u32)).copied(), "node {}, shard {i}", host.config.node);
            }
        }
    };
    net.settle();
    net.run(2_500);
    leaders_known(&net);
    // One of them has been away.
    for node in 1..5 {
        net.hosts.get_mut(&NodeId(5)).unwrap().peer_down(net.now, NodeId(node));
    }
    net.settle();
    assert!(net.hosts[&NodeId(5)].view().not_ready.is_some());
    for node in 1..5 {
        net.hosts.get_mut(&NodeId(5)).unwrap().peer_up(net.now, NodeId(node), incarnation(node));
    }
    net.run(2_500);
    leaders_known(&net);
}

#[test]
fn a_cluster_is_founded_serves_everywhere_and_falls_asleep() {
    let mut net = Net::new(3, 16);
    net.settle();
    net.run(500);
    assert!(net.hosts.values().all(|h| h.view().not_ready.is_none()), "{:?}", net.hosts[&NodeId(1)].view().not_ready);
    assert!(net.leaders().values().all(|l| (5..=6).contains(l)), "{:?}", net.leaders());
    let tokens: Vec<(u64, u64)> = (1..=3).map(|n| (n, net.set(n, format!("k{n}").as_bytes(), b"v"))).collect();
    net.run(50);
    for (n, t) in tokens {
        assert_eq!(net.done.get(&(NodeId(n), t)), Some(&ClientResult::Reply(Reply::Ok)));
    }
    for n in 1..=3 {
        let t = net.get(n, b"k1");
        net.run(50);
        assert_eq!(net.done.get(&(NodeId(n), t)), Some(&ClientResult::Reply(Reply::Bulk("v".into()))), "node {n}");
    }
    net.run(5000);
    let awake: Vec<_> = net
        .hosts
        .iter()
        .flat_map(|(n, h)| {
            h.coordinator().replicas().filter(|r| !r.asleep()).map(move |r| (*n, r.shard(), r.leadership()))
        })
        .collect();
    assert!(awake.is_empty(), "idle groups sleep: {awake:?}");
    let t = net.set(2, b"k1", b"w");
    net.run(50);
    assert_eq!(net.done.get(&(NodeId(2), t)), Some(&ClientResult::Reply(Reply::Ok)), "and wake");
}

#[test]
fn the_loss_of_a_node_is_a_pause_and_a_drain_is_none() {
    let mut net = Net::new(3, 16);
    net.settle();
    net.run(6000);
    // Everything sleeps; node 3 vanishes without a word.
    net.hosts.remove(&NodeId(3));
    for n in [1, 2] {
        net.hosts.get_mut(&NodeId(n)).unwrap().peer_down(net.now, NodeId(3));
    }
    let tokens: Vec<u64> = (0..64).map(|i| net.set(1, format!("k{i}").as_bytes(), b"v")).collect();
    net.run(1500);
    for t in tokens {
        assert_eq!(net.done.get(&(NodeId(1), t)), Some(&ClientResult::Reply(Reply::Ok)));
    }
    net.hosts.get_mut(&NodeId(2)).unwrap().drain(net.now);
    net.run(200);
    assert_eq!(net.leaders()[&NodeId(2)], 0, "all led elsewhere");
    assert!(net.notes.contains(&(NodeId(2), Note::Drained)));
    let t = net.set(2, b"k1", b"w");
    net.run(20);
    assert_eq!(net.done.get(&(NodeId(2), t)), Some(&ClientResult::Reply(Reply::Ok)), "it still serves as a gateway");
    assert!(!net.hosts[&NodeId(2)].needed_by().is_empty(), "but its vote is needed");
}

#[test]
fn every_read_gets_the_log_time_that_it_needs() {
    let mut net = Net::new(3, 1);
    net.settle();
    net.run(1000);
    let l = net.leaders().into_iter().find(|(_, count)| *count > 0).unwrap().0;
    let mut put = |key: &[u8], ms| {
        net.submit(l.0, key, true, |key| {
            let (cond, expire) = (SetCond::Always, SetExpire::After(ms));
            encode_ops(&[Op::Set { key, value: b"v", cond, expire, get: false }]).unwrap()
        })
    };
    put(b"a", 100);
    put(b"b", 120);
    net.settle();
    // The first read proposes an Advance; before it commits, a second read needs a later one.
    let mut tokens = Vec::new();
    for (key, ms) in [(b"a", 110), (b"b", 20)] {
        net.now.mono.0 += ms * 1_000_000;
        net.now.wall.0 += ms;
        tokens.push(net.get(l.0, key));
        let mut e = Effects::default();
        net.hosts.get_mut(&l).unwrap().poll(net.now, &mut e);
        assert!(e.completions.is_empty(), "only the log can say that they have expired");
        let host = net.hosts.get_mut(&l).unwrap();
        e.persist.iter().for_each(|b| host.persisted(net.now, b.number));
        net.frames.extend(e.sends.into_iter().map(|s| (l, s)));
    }
    net.settle();
    for t in tokens {
        assert_eq!(net.done.get(&(l, t)), Some(&ClientResult::Reply(Reply::Nil)));
    }
}

#[test]
fn a_follower_answers_relaxed_reads_and_a_bound_costs_one_round() {
    let mut net = Net::new(3, 1);
    net.settle();
    net.run(1000);
    let l = net.leaders().into_iter().find(|(_, count)| *count > 0).unwrap().0;
    let f = *net.hosts.keys().find(|n| **n != l).unwrap();
    net.set(l.0, b"k", b"v");
    net.settle();
    let ask = |net: &mut Net, level| {
        let key = KeyRef::new(0, b"k").unwrap();
        net.next_token += 1;
        let (token, deadline) = (net.next_token, net.now.mono.after(Duration::from_secs(5)));
        let host = net.hosts.get_mut(&f).unwrap();
        let request = ClientRequest {
            conn: ConnId(9),
            token: Token(token),
            shard: ShardId(0),
            write: false,
            level,
            ops: encode_ops(&[Op::Get { key }]).unwrap(),
            deadline,
        };
        host.submit(net.now, request);
        // A follower learns of a commit by the next heartbeat.
        net.settle();
        (0..15).for_each(|_| {
            if !net.done.contains_key(&(f, token)) {
                net.run(10)
            }
        });
        net.done.remove(&(f, token))
    };
    let forwarded = |net: &Net| net.hosts[&f].requests_forwarded;
    let v = Some(ClientResult::Reply(Reply::Bulk("v".into())));
    let before = forwarded(&net);
    let age = Duration::from_millis(100);
    assert_eq!(ask(&mut net, ReadLevel::Bounded(age)), v);
    assert_eq!(forwarded(&net), before + 1, "a round to the leader");
    assert_eq!(ask(&mut net, ReadLevel::Bounded(age)), v);
    assert_eq!(forwarded(&net), before + 1, "fresh enough");
    // Alone, it still answers what it has; a bound it cannot keep is a linearizable read's business.
    net.hosts.retain(|n, _| *n == f);
    net.now.mono.0 += 101_000_000;
    assert_eq!(ask(&mut net, ReadLevel::Local), v);
    assert_eq!(ask(&mut net, ReadLevel::Bounded(age)), None, "too old by now, and nobody to ask");
    net.run(6_000);
    let refused = |r: &ClientResult| matches!(r, ClientResult::NotApplied(_));
    assert!(net.done.values().any(refused), "and in the end it says so");
}

#[test]
fn an_invitation_to_sleep_from_the_dead_is_not_followed() {
    use crate::message::{Body, Envelope, encode_envelope};
    let mut net = Net::new(3, 1);
    net.settle();
    net.run(1000);
    let sh = ShardId(0);
    let (l, lid) = net
        .hosts
        .iter()
        .find_map(|(n, h)| h.coordinator().replica(sh).filter(|r| r.leadership().leads).map(|r| (*n, r.id())))
        .unwrap();
    net.hosts.remove(&l);
    let others: Vec<NodeId> = net.hosts.keys().copied().collect();
    for n in &others {
        let now = net.now;
        let h = net.hosts.get_mut(n).unwrap();
        h.peer_down(now, l);
        let (to, term, index) = {
            let r = h.coordinator().replica(sh).unwrap();
            (r.id(), r.leadership().term, r.applied().0)
        };
        let mut f = vec![KIND_RAFT];
        encode_envelope(
            &mut f,
            &Envelope { shard: sh, log_time: 0, floor: 0, body: Body::Sleep { from: lid, to, term, index, ok: false } },
        );
        h.frame(now, l, incarnation(l.0), Channel::Raft, f.into()).unwrap();
    }
    net.run(10_000);
    let n = others[0];
    let t = net.set(n.0, b"a", b"v");
    net.run(10_000);
    let asleep: Vec<bool> = others.iter().map(|n| net.hosts[n].coordinator().replica(sh).unwrap().asleep()).collect();
    assert_eq!(
        net.done.get(&(n, t)),
        Some(&ClientResult::Reply(Reply::Ok)),
        "asleep {asleep:?} {:?}",
        net.hosts[&n].view().not_ready
    );
}

#[test]
fn large_values_never_make_a_frame_too_large() {
    let mut net = Net::new(3, 1);
    net.settle();
    net.run(1000);
    let l = *net.leaders().iter().find(|(_, c)| **c > 0).unwrap().0;
    let v = vec![7u8; 7 << 20];
    for i in 0..8 {
        net.set(l.0, format!("k{i}").as_bytes(), &v);
    }
    let mut largest = 0;
    for _ in 0..200 {
        let mut idle = true;
        let nodes: Vec<NodeId> = net.hosts.keys().copied().collect();
        for node in nodes {
            let host = net.hosts.get_mut(&node).unwrap();
            let mut e = Effects::default();
            host.poll(net.now, &mut e);
            idle &= e.is_empty();
            for b in &e.persist {
                host.persisted(net.now, b.number);
            }
            for s in e.sends {
                largest = largest.max(s.frame.len());
                net.frames.push_back((node, s));
            }
        }
        while let Some((from, s)) = net.frames.pop_front() {
            if let Some(host) = net.hosts.get_mut(&s.to) {
                host.frame(net.now, from, incarnation(from.0), s.channel, s.frame).unwrap();
            }
        }
        if idle {
            break;
        }
    }
    assert!(largest <= MAX_FRAME_BYTES, "{largest} > {MAX_FRAME_BYTES}");
}

#[test]
fn a_refusal_never_names_the_leader_of_another_term() {
    use crate::message::{Body, Envelope, encode_envelope};
    use raft::eraftpb::{Message, MessageType};
    let mut net = Net::new(3, 1);
    net.settle();
    net.run(1000);
    let sh = ShardId(0);
    let x = *net.leaders().iter().find(|(_, c)| **c > 0).unwrap().0;
    let fol: Vec<NodeId> = net.hosts.keys().copied().filter(|n| *n != x).collect();
    let (y, f) = (fol[0], fol[1]);
    let yid = net.hosts[&y].coordinator().replica(sh).unwrap().id();
    let now = net.now;
    let h = net.hosts.get_mut(&f).unwrap();
    let (to, term) = {
        let r = h.coordinator().replica(sh).unwrap();
        (r.id(), r.leadership().term)
    };
    let m = Message {
        msg_type: MessageType::MsgHeartbeat,
        to: to.0,
        from: yid.0,
        term: term.0 + 1,
        commit: 1,
        ..Message::default()
    };
    let mut fr = vec![KIND_RAFT];
    encode_envelope(&mut fr, &Envelope { shard: sh, log_time: 0, floor: 0, body: Body::Raft(m) });
    h.frame(now, y, incarnation(y.0), Channel::Raft, fr.into()).unwrap();
    let mut q = [&[KIND_REQUESTS][..], &[0; 8]].concat();
    encode_request(&mut q, &Request { shard: sh, id: 5, body: RequestBody::OpenSession });
    h.frame(now, y, incarnation(y.0), Channel::Requests, q.into()).unwrap();
    let mut e = Effects::default();
    h.poll(now, &mut e);
    let a = e.sends.iter().find(|s| s.channel == Channel::Requests).unwrap();
    let answers = decode_answers(&a.frame.slice(9..)).unwrap();
    assert_ne!(
        answers[0].2,
        Answer::NotLeader { leader: Some(x), term: Term(term.0 + 1) },
        "{x:?} never led in that term"
    );
}

#[test]
fn a_generation_that_somebody_made_up_is_no_end_of_the_world() {
    let net = Net::new(1, 1);
    let config = net.hosts[&NodeId(1)].config.clone();
    let config = HostConfig { uuid: Some(ClusterUuid(5)), generation: u32::MAX, ..config };
    let mut host = Host::new(config, net.now);
    let request = crate::recovery::RecoverRequest { id: 1, accept_data_loss: true, stopped: Vec::new() };
    host.recover(net.now, request);
    let now = Now { mono: net.now.mono.after(Duration::from_secs(1)), ..net.now };
    host.tick(now);
    let mut e = Effects::default();
    host.poll(now, &mut e);
    assert!(matches!(&e.recoveries[..], [(1, Err(why))] if why.contains("no generations")), "{:?}", e.recoveries);
}

#[test]
fn a_misaddressed_request_does_not_harm_the_meta_group() {
    let mut net = Net::new(3, 1);
    net.settle();
    net.run(1000);
    let l = *net.hosts.iter().find(|(_, h)| h.leads_meta()).unwrap().0;
    let from = *net.hosts.keys().find(|n| **n != l).unwrap();
    let mut q = [&[KIND_REQUESTS][..], &[0; 8]].concat();
    encode_request(&mut q, &Request { shard: ShardId::META, id: 5, body: RequestBody::OpenSession });
    let now = net.now;
    net.hosts.get_mut(&l).unwrap().frame(now, from, incarnation(from.0), Channel::Requests, q.into()).unwrap();
    net.settle();
    net.run(2000);
    let failed: Vec<bool> =
        net.hosts.values().map(|h| h.coordinator().replica(ShardId::META).unwrap().failed()).collect();
    assert!(!failed.contains(&true), "{failed:?} {:?}", net.notes);
}
