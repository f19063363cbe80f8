use super::*;
use proptest::prelude::*;

fn addrs(n: u64) -> NodeAddrs {
    NodeAddrs { raft: format!("127.0.0.1:{}", 9000 + n), http: Some("h:1".into()), ..NodeAddrs::default() }
}

fn life(n: u64) -> Incarnation {
    Incarnation(u128::from(n) << 100 | 7)
}

fn founded(members: u64, shards: u32, replication: u32) -> MetaState {
    let members: Vec<_> = (1..=members).map(|n| (NodeId(n), life(n), addrs(n))).collect();
    MetaState::found(ClusterUuid(5), "test".into(), 6, WallTime(7), &members, shards, replication)
}

fn machine() -> MetaMachine {
    MetaMachine::new(Arc::new(founded(3, 4, 3)), LogIndex(1))
}

fn run(m: &mut MetaMachine, command: MetaCommand) -> bool {
    m.apply(LogIndex(m.applied().0 + 1), &command.encode()).unwrap()
}

fn register(node: u64, incarnation: Incarnation) -> MetaCommand {
    MetaCommand::Register { node: NodeId(node), incarnation, addrs: addrs(node), max_memory: 0 }
}

fn draining(node: u64, incarnation: Incarnation, draining: bool) -> MetaCommand {
    MetaCommand::SetDraining { node: NodeId(node), incarnation, draining }
}

#[test]
fn a_founding_record_is_whole() {
    for (members, shards, replication) in [(1, 1, 1), (1, 16, 3), (2, 5, 3), (3, 16, 3), (5, 64, 3), (9, 100, 5)] {
        let s = founded(members, shards, replication);
        assert_eq!(s.check(), Ok(()), "{members} members");
        assert_eq!((s.generation, s.epoch, s.cluster_version), (1, Epoch(1), 1));
        assert!(s.nodes.values().all(|n| n.approved && !n.draining && n.past.is_empty()));
        let meta: Vec<u64> = s.meta.iter().map(|r| r.node.0).collect();
        assert_eq!(meta, (1..=members.min(7)).collect::<Vec<_>>(), "lowest ids first");
        let counts = s.shards.iter().map(|p| p.replicas.len());
        assert!(counts.clone().all(|c| c as u64 == members.min(replication.into())));
        // Ids are counted from 1 without gaps.
        let all: Vec<u64> = s.meta.iter().chain(s.shards.iter().flat_map(|p| &p.replicas)).map(|r| r.id.0).collect();
        assert_eq!(all, (1..=all.len() as u64).map(|c| 1 << 32 | c).collect::<Vec<_>>());
        assert_eq!(s.next_replica as usize, all.len() + 1);
        assert_eq!(s.underreplicated(), (0, counts.min().unwrap(), members.min(replication.into()) as usize));
        assert_eq!(MetaState::decode(&s.encode()), Ok(s));
    }
}

#[test]
fn every_broken_rule_is_named() {
    type Break = fn(&mut MetaState);
    let cases: [(&str, Break); 26] = [
        ("name is longer", |s| s.cluster = "x".repeat(256)),
        ("generation is 0", |s| s.generation = 0),
        ("cluster version", |s| s.cluster_version = 0),
        ("epoch 0 is out", |s| s.epoch = Epoch(0)),
        ("is out of range", |s| s.epoch = Epoch(u64::MAX)),
        ("0 nodes", |s| s.nodes.clear()),
        ("1025 nodes", |s| {
            s.nodes.extend((10..1032).map(|n| (NodeId(n), s.nodes[&NodeId(1)].clone())).collect::<Vec<_>>())
        }),
        ("id 0", |s| _ = s.nodes.insert(NodeId(0), s.nodes[&NodeId(1)].clone())),
        ("raft address", |s| s.nodes.get_mut(&NodeId(2)).unwrap().addrs.raft = "x".repeat(261)),
        ("http address", |s| s.nodes.get_mut(&NodeId(2)).unwrap().addrs.http = Some("x".repeat(261))),
        ("65 earlier", |s| s.nodes.get_mut(&NodeId(2)).unwrap().past = (1000..1065).map(Incarnation).collect()),
        ("life twice", |s| s.nodes.get_mut(&NodeId(2)).unwrap().past = vec![life(2)]),
        ("0 shards", |s| s.shards.clear()),
        ("end at slot", |s| _ = s.shards.pop()),
        ("shard 1 owns", |s| s.shards[1].range.start += 1),
        ("shard 2 owns", |s| s.shards[1].range.end -= 1),
        ("shard 1 owns", |s| s.shards[1].range.end = s.shards[1].range.start),
        ("shard 1 has epoch 2", |s| s.shards[1].epoch = Epoch(2)),
        ("shard 3 has 0 replicas", |s| s.shards[3].replicas.clear()),
        ("meta group has 0", |s| s.meta.clear()),
        ("never given", |s| s.shards[0].replicas[0].id = ReplicaId::new(1, s.next_replica)),
        ("never given", |s| s.shards[0].replicas[0].id = ReplicaId::new(2, 1)),
        ("occurs twice", |s| s.shards[0].replicas[0].id = s.meta[2].id),
        ("does not exist", |s| s.shards[0].replicas[0].node = NodeId(4)),
        ("never was", |s| s.meta[0].incarnation = life(9)),
        ("two replicas on node", |s| {
            let other = s.shards[0].replicas[1];
            let r = &mut s.shards[0].replicas[0];
            (r.node, r.incarnation) = (other.node, other.incarnation);
        }),
    ];
    for (expected, break_it) in cases {
        let mut s = founded(3, 4, 3);
        break_it(&mut s);
        let error = s.check().expect_err(expected);
        assert!(error.contains(expected), "{error:?} should contain {expected:?}");
    }
}

#[test]
fn the_largest_table_fits_its_bound() {
    let mut s = founded(7, MAX_SHARDS, 7);
    let long = || Some("a".repeat(MAX_ADDR_BYTES));
    let addrs = NodeAddrs {
        raft: long().unwrap(),
        redis: long(),
        redis_cluster: long(),
        http: long(),
        zone: Some("z".repeat(MAX_ZONE_BYTES)),
    };
    for n in 0..MAX_NODES as u64 {
        let past = (0..MAX_PAST_INCARNATIONS as u128).map(|i| Incarnation(u128::MAX - i)).collect();
        let record = NodeRecord {
            incarnation: Incarnation(u128::MAX - 99),
            past,
            addrs: addrs.clone(),
            approved: true,
            declined: true,
            draining: true,
            max_memory: u64::MAX,
        };
        s.nodes.insert(NodeId(u64::MAX - n), record);
    }
    (1..=7).for_each(|n| _ = s.nodes.remove(&NodeId(n)));
    s.cluster = "c".repeat(MAX_NAME_BYTES);
    (s.uuid, s.secret, s.founded_at) = (ClusterUuid(u128::MAX), u64::MAX, WallTime(u64::MAX));
    (s.generation, s.next_replica, s.cluster_version, s.epoch) = (u32::MAX, u32::MAX, u32::MAX, MAX_EPOCH);
    let mut counter = u32::MAX;
    for shard in &mut s.shards {
        shard.epoch = MAX_EPOCH;
    }
    for r in s.meta.iter_mut().chain(s.shards.iter_mut().flat_map(|p| &mut p.replicas)) {
        counter -= 1;
        r.id = ReplicaId::new(u32::MAX, counter);
        r.node = NodeId(u64::MAX - r.node.0);
        r.incarnation = Incarnation(u128::MAX - 99);
    }
    assert_eq!(s.check(), Ok(()));
    let bytes = s.encode();
    assert!(bytes.len() <= MAX_STATE_BYTES, "{} bytes", bytes.len());
    assert_eq!(MetaState::decode(&bytes), Ok(s));
}

#[test]
fn bytes_that_are_no_table_are_refused() {
    let s = founded(3, 4, 3);
    let bytes = s.encode();
    assert_eq!(MetaState::decode(&[]), Err(CodecError::Malformed));
    assert_eq!(MetaState::decode(&vec![1; MAX_STATE_BYTES + 1]), Err(CodecError::TooLarge));
    assert_eq!(MetaState::decode(&[&[9], &bytes[1..]].concat()), Err(CodecError::UnknownVersion(9)));
    assert_eq!(MetaState::decode(&[&bytes[..], &[0]].concat()), Err(CodecError::Malformed), "trailing bytes");
    for cut in 1..bytes.len() {
        assert_eq!(MetaState::decode(&bytes[..cut]), Err(CodecError::Malformed), "cut at {cut}");
    }
    let mut long = s.clone();
    long.meta = vec![long.meta[0]; 8];
    assert_eq!(MetaState::decode(&long.encode()), Err(CodecError::Malformed), "more than a group can have");
}

#[test]
fn a_list_that_claims_more_than_is_there_allocates_nothing() {
    #[derive(Debug, Deserialize)]
    struct List(#[serde(deserialize_with = "bounded_vec::<_, _, 3>")] Vec<u8>);
    #[derive(Debug, Deserialize)]
    struct Map(#[serde(deserialize_with = "bounded_map::<_, _, _, 2>")] BTreeMap<u8, u8>);
    assert_eq!(postcard::from_bytes::<List>(&[3, 1, 2, 3]).unwrap().0, vec![1, 2, 3]);
    assert!(postcard::from_bytes::<List>(&[4, 1, 2, 3, 4]).is_err());
    assert!(postcard::from_bytes::<List>(&[0xff, 0xff, 0xff, 0xff, 0x0f, 1]).is_err());
    assert_eq!(postcard::from_bytes::<Map>(&[2, 1, 0, 2, 0]).unwrap().0.len(), 2);
    assert!(postcard::from_bytes::<Map>(&[2, 2, 0, 1, 0]).is_err(), "descending");
    assert!(postcard::from_bytes::<Map>(&[2, 1, 0, 1, 0]).is_err(), "twice");
    assert!(postcard::from_bytes::<Map>(&[3, 1, 0, 2, 0, 3, 0]).is_err(), "too many");
}

#[test]
fn a_new_life_fences_the_old_one_for_good() {
    let mut m = machine();
    assert!(run(&mut m, draining(2, life(2), true)));
    assert!(run(&mut m, register(2, life(20))));
    let node = &m.state().nodes[&NodeId(2)];
    assert_eq!(
        (node.incarnation, &node.past[..], node.draining, node.approved),
        (life(20), &[life(2)][..], false, true)
    );
    assert_eq!(m.state().epoch, Epoch(3));
    let before = m.state().clone();
    assert!(!run(&mut m, register(2, life(2))), "a fenced life never comes back");
    assert!(!run(&mut m, draining(2, life(2), true)), "nor is it listened to");
    assert_eq!(*m.state(), before);
    assert_eq!(m.applied(), LogIndex(5));
    assert_eq!(m.state().check(), Ok(()));
}

#[test]
fn a_new_life_gets_new_replicas_in_the_places_of_the_old_ones() {
    let mut m = machine();
    let before = m.state().clone();
    assert!(run(&mut m, register(2, life(20))));
    let after = m.state().clone();
    let mut ids: BTreeSet<ReplicaId> =
        before.groups().flat_map(|g| before.replicas(g).to_vec()).map(|r| r.id).collect();
    for group in before.groups() {
        for (old, new) in before.replicas(group).iter().zip(after.replicas(group)) {
            if old.node == NodeId(2) {
                assert!(new.node == old.node && new.incarnation == life(20));
                assert!(ids.insert(new.id), "{:?} was used before", new.id);
            } else {
                assert_eq!(old, new);
            }
        }
        assert!(group.is_meta() || after.epoch_of(group) == after.epoch, "its placement has changed");
    }
    assert_eq!(after.check(), Ok(()));
    // Addresses alone change nothing of it.
    let moved = NodeAddrs { raft: "elsewhere:1".into(), ..NodeAddrs::default() };
    run(&mut m, MetaCommand::Register { node: NodeId(2), incarnation: life(20), addrs: moved, max_memory: 0 });
    assert!(after.groups().all(|g| m.state().replicas(g) == after.replicas(g)));
}

#[test]
fn the_same_life_changes_its_addresses_only() {
    let mut m = machine();
    assert!(!run(&mut m, register(1, life(1))), "nothing new");
    assert_eq!(m.state().epoch, Epoch(1));
    run(&mut m, draining(1, life(1), true));
    let moved = NodeAddrs { raft: "elsewhere:1".into(), ..NodeAddrs::default() };
    let command = MetaCommand::Register { node: NodeId(1), incarnation: life(1), addrs: moved.clone(), max_memory: 0 };
    assert!(run(&mut m, command));
    let node = &m.state().nodes[&NodeId(1)];
    assert_eq!((&node.addrs, node.incarnation, node.draining, node.past.len()), (&moved, life(1), true, 0));
    assert_eq!(m.state().epoch, Epoch(3));
    assert!(run(&mut m, draining(1, life(1), false)));
    assert!(!run(&mut m, draining(1, life(1), false)), "nothing new");
}

#[test]
fn unknown_nodes_become_gateways_up_to_the_bound() {
    let mut m = machine();
    assert!(!run(&mut m, register(0, life(8))), "ids count from 1");
    assert!(!run(&mut m, draining(8, life(8), true)), "unknown");
    for n in 4..=MAX_NODES as u64 {
        assert!(run(&mut m, register(n, life(n))));
        assert!(!m.state().nodes[&NodeId(n)].approved);
    }
    assert!(!run(&mut m, register(9999, life(1))), "the table is full");
    assert!(run(&mut m, register(4, life(2000))), "known nodes may restart");
    assert_eq!(m.state().check(), Ok(()));
    let long = NodeAddrs { raft: "x".repeat(MAX_ADDR_BYTES + 1), ..NodeAddrs::default() };
    assert!(long.check().is_err());
    let command = MetaCommand::Register { node: NodeId(1), incarnation: life(3000), addrs: long, max_memory: 0 };
    assert!(!run(&mut m, command), "a bad address is not taken");
}

#[test]
fn only_the_newest_earlier_lives_are_remembered() {
    let mut m = machine();
    for n in 100..100 + MAX_PAST_INCARNATIONS as u64 + 5 {
        assert!(run(&mut m, register(3, life(n))));
    }
    let node = &m.state().nodes[&NodeId(3)];
    assert_eq!(node.past.len(), MAX_PAST_INCARNATIONS);
    assert_eq!((node.past[0], node.past.last()), (life(104), Some(&life(167))));
    assert_eq!(node.incarnation, life(168));
    // Its replicas stand in a life that is forgotten; the table still holds together.
    assert_eq!(m.state().check(), Ok(()));
}

#[test]
fn entries_that_cannot_be_applied_change_nothing() {
    let mut m = machine();
    assert_eq!(m.apply(LogIndex(2), &[]), Ok(false));
    let (state, digest) = (m.state().clone(), m.digest());
    let good = register(7, life(7)).encode();
    for (index, payload) in [(3, &[9, 0][..]), (3, &[1][..]), (3, &[&good[..], &[0]].concat()), (2, &good), (4, &good)]
    {
        let error = m.apply(LogIndex(index), payload).unwrap_err();
        assert_eq!(error.index, index);
        assert_eq!((m.applied(), m.state(), m.digest()), (LogIndex(2), &state, digest), "{error}");
    }
    assert_eq!(m.apply(LogIndex(3), &good), Ok(true));
}

#[test]
fn readers_keep_the_table_they_hold_and_digests_follow_the_state() {
    let (mut a, mut b) = (machine(), machine());
    let held = a.state().clone();
    let first = a.digest();
    assert_eq!(first, b.digest());
    run(&mut a, register(2, life(20)));
    assert_ne!(a.digest(), first, "the cached digest is forgotten");
    assert_eq!(*held, founded(3, 4, 3));
    run(&mut b, register(2, life(20)));
    assert_eq!(a.digest(), b.digest());
    // What changes nothing copies nothing.
    let held = a.state().clone();
    run(&mut a, register(2, life(20)));
    assert!(Arc::ptr_eq(&held, a.state()));
}

fn any_command() -> impl Strategy<Value = MetaCommand> {
    let (node, incarnation) = (0u64..6, (0u64..5).prop_map(life));
    prop_oneof![
        (node.clone(), incarnation.clone(), 0u64..3).prop_map(|(node, incarnation, a)| {
            MetaCommand::Register { node: NodeId(node), incarnation, addrs: addrs(a), max_memory: 0 }
        }),
        (node, incarnation, any::<bool>()).prop_map(|(node, incarnation, d)| draining(node, incarnation, d)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_commands_keep_the_table_whole(commands in prop::collection::vec(any_command(), 0..60)) {
        let mut m = machine();
        for command in commands {
            let before = m.state().clone();
            prop_assert_eq!(&MetaCommand::decode(&command.encode()), &Ok(command.clone()));
            let changed = run(&mut m, command);
            prop_assert_eq!(changed, *m.state() != before);
            prop_assert_eq!(m.state().epoch.0, before.epoch.0 + u64::from(changed));
            prop_assert_eq!(m.state().check(), Ok(()));
            for (id, node) in &before.nodes {
                let now = &m.state().nodes[id];
                prop_assert!(!node.past.contains(&now.incarnation), "a fenced life came back");
                prop_assert!(node.past.iter().all(|p| now.past.contains(p)), "a life was forgotten");
            }
        }
    }

    #[test]
    fn decoders_take_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..400), version in any::<bool>()) {
        if let (Some(first), true) = (bytes.first_mut(), version) {
            *first = STATE_VERSION;
        }
        if let Ok(state) = MetaState::decode(&bytes) {
            let _ = state.check();
        }
        let mut m = machine();
        let _ = m.apply(LogIndex(2), &bytes);
        prop_assert_eq!(m.state().check(), Ok(()));
    }

    #[test]
    fn a_damaged_table_is_refused_or_still_usable(at in any::<prop::sample::Index>(), bit in 0u8..8, more in any::<u64>()) {
        let mut bytes = founded(3, 4, 3).encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(state) = MetaState::decode(&bytes) && state.check().is_ok() {
            // What passes the check must carry on like any other table.
            let mut m = MetaMachine::new(Arc::new(state), LogIndex(1));
            run(&mut m, register(1 + more % 5, life(50)));
            prop_assert_eq!(m.state().check(), Ok(()));
        }
    }
}

fn refounding(m: &MetaMachine, shard: u32, founder: u64) -> Refounding {
    let epoch = m.state().epoch_of(ShardId(shard));
    Refounding { shard: ShardId(shard), epoch, founder: NodeId(founder), index: LogIndex(7), term: Term(3) }
}

#[test]
fn a_group_founded_anew_has_new_ids_in_the_old_places_and_begins_beyond_everything() {
    let mut m = machine();
    let before = m.state().shards[1].clone();
    let founder = before.replicas[1].node;
    let r = refounding(&m, 1, founder.0);
    let command = MetaCommand::Refound { groups: vec![r], stopped: vec![] };
    assert!(run(&mut m, command.clone()));
    let after = &m.state().shards[1];
    assert_eq!(m.state().check(), Ok(()));
    let nodes = |s: &ShardPlacement| s.replicas.iter().map(|r| r.node).collect::<Vec<_>>();
    assert_eq!(nodes(after), nodes(&before), "who should lead should lead still");
    let begins = after.refounded.unwrap();
    assert_eq!((begins.index, begins.term), (LogIndex(1 << 44), Term(1 << 20)));
    let lowest = after.replicas.iter().map(|r| r.id).min();
    assert_eq!(lowest, Some(begins.founder));
    assert_eq!(after.replicas.iter().find(|r| r.id == begins.founder).map(|r| r.node), Some(founder));
    assert!(before.replicas.iter().all(|r| r.id < begins.founder));
    assert_eq!(after.epoch, m.state().epoch);
    assert!(!run(&mut m, command), "placement has changed since that census");
    let again = Refounding { index: LogIndex(1 << 50), ..refounding(&m, 1, founder.0) };
    assert!(run(&mut m, MetaCommand::Refound { groups: vec![again], stopped: vec![] }));
    let later = m.state().shards[1].refounded.unwrap();
    assert_eq!((later.index, later.term), (LogIndex((1 << 50) + (1 << 44)), Term(2 << 20)));
    for made_up in [
        Refounding { index: LogIndex(u64::MAX), ..refounding(&m, 1, founder.0) },
        Refounding { term: Term(u64::MAX), ..refounding(&m, 1, founder.0) },
    ] {
        run(&mut m, MetaCommand::Refound { groups: vec![made_up], stopped: vec![] });
        assert_eq!(m.state().check(), Ok(()));
        assert_eq!(m.state().shards[1].refounded, Some(later));
    }
    let meta = Refounding { shard: ShardId::META, ..again };
    assert!(!run(&mut m, MetaCommand::Refound { groups: vec![meta], stopped: vec![] }), "not by its own log");
}

#[test]
fn a_life_that_is_declared_over_is_fenced_and_begins_nothing() {
    let mut m = machine();
    let stopped = vec![(NodeId(2), life(2))];
    let groups = vec![refounding(&m, 0, 2), refounding(&m, 1, 1)];
    assert!(run(&mut m, MetaCommand::Refound { groups, stopped: stopped.clone() }));
    let s = m.state().clone();
    assert_eq!(s.check(), Ok(()));
    assert_eq!((s.nodes[&NodeId(2)].incarnation, &s.nodes[&NodeId(2)].past[..]), (NO_LIFE, &[life(2)][..]));
    assert!(s.shards[0].refounded.is_none() && s.shards[1].refounded.is_some());
    assert!(!run(&mut m, register(2, life(2))), "that one never comes back");
    assert!(!run(&mut m, register(2, NO_LIFE)));
    assert!(!run(&mut m, MetaCommand::Refound { groups: vec![], stopped }));
    assert!(run(&mut m, register(2, life(20))));
    let s = m.state();
    assert_eq!(s.check(), Ok(()));
    assert_eq!(s.nodes[&NodeId(2)].past, [life(2)], "no life is none that is over");
    assert!(s.shards[1].replicas.iter().any(|r| r.node == NodeId(2) && r.incarnation == life(20)));
}

#[test]
fn the_table_of_the_next_generation_is_beyond_every_other() {
    let m = machine();
    let base = m.state();
    let nodes = [(NodeId(1), life(10), addrs(1), 5), (NodeId(3), life(3), addrs(3), 0)];
    let groups = [Refounding { shard: ShardId::META, ..refounding(&m, 0, 3) }, refounding(&m, 2, 3)];
    let recovery = Recovery { at: WallTime(9), anew: false, mark: 4 };
    let s = base.recovered(&nodes, &[(NodeId(2), life(2))], &groups, Epoch(500), recovery).unwrap();
    assert_eq!(s.check(), Ok(()));
    assert_eq!((s.uuid, s.generation, s.recovery), (base.uuid, 2, Some(recovery)));
    assert!(s.epoch > Epoch(500 + (1 << 32) - 1) && s.version() > (1, Epoch(u64::MAX)));
    assert_eq!((s.nodes[&NodeId(1)].incarnation, s.nodes[&NodeId(2)].incarnation), (life(10), NO_LIFE));
    assert_eq!(s.meta_refounded.map(|r| (r.index, r.term)), Some((LogIndex(2 << 44), Term(2 << 20))));
    assert!(s.shards[0].refounded.is_none() && s.shards[2].refounded.is_some());
    // What was not lost keeps its replicas, but for those in lives that are over.
    let kept = |n: u64| s.shards[0].replicas.iter().find(|r| r.node == NodeId(n)).map(|r| r.id.0 >> 32);
    assert_eq!((kept(1), kept(3)), (Some(2), Some(1)));
    assert_eq!(MetaState::decode(&s.encode()), Ok(s));
}

fn place(m: &MetaMachine, shard: ShardId, nodes: &[u64]) -> MetaCommand {
    let was = m.state().replicas(shard).iter().map(|r| r.id).collect();
    MetaCommand::Place { shard, was, nodes: nodes.iter().map(|n| NodeId(*n)).collect() }
}

fn run_place(m: &mut MetaMachine, shard: ShardId, nodes: &[u64]) -> bool {
    let command = place(m, shard, nodes);
    run(m, command)
}

fn run_settled(m: &mut MetaMachine, shard: ShardId) -> bool {
    let members = m.state().replicas(shard).iter().map(|r| r.id).collect();
    let epoch = m.state().moving(shard).map_or(Epoch(0), |m| m.epoch);
    run(m, MetaCommand::Settled { shard, epoch, members })
}

fn approve(node: u64, approved: bool) -> MetaCommand {
    MetaCommand::Approve { node: NodeId(node), approved, operator: true }
}

fn on(m: &MetaMachine, shard: ShardId) -> Vec<(u64, u32)> {
    m.state().replicas(shard).iter().map(|r| (r.node.0, r.id.0 as u32)).collect()
}

#[test]
fn approval_is_given_and_taken_but_never_from_the_last() {
    let mut m = machine();
    assert!(!run(&mut m, approve(9, true)), "unknown");
    assert!(run(&mut m, register(4, life(4))));
    assert!(!m.state().nodes[&NodeId(4)].approved);
    assert!(run(&mut m, approve(4, true)));
    assert!(!run(&mut m, approve(4, true)), "already");
    for node in 1..=3 {
        assert!(run(&mut m, approve(node, false)));
    }
    assert!(!run(&mut m, approve(4, false)), "the last one");
    assert!(m.state().nodes[&NodeId(1)].declined && !m.state().nodes[&NodeId(4)].declined);
    // What an operator has taken away stays so for whatever is automatic, until an operator gives it back.
    let auto = |approved| MetaCommand::Approve { node: NodeId(2), approved, operator: false };
    assert!(!run(&mut m, auto(false)) && m.state().nodes[&NodeId(2)].declined);
    assert!(run(&mut m, approve(2, true)) && !m.state().nodes[&NodeId(2)].declined);
    assert!(run(&mut m, auto(false)) && !m.state().nodes[&NodeId(2)].declined);
    assert_eq!(m.state().check(), Ok(()));
}

#[test]
fn a_group_is_placed_elsewhere_and_settles() {
    let mut m = machine();
    run(&mut m, register(4, life(4)));
    let s = ShardId(0);
    let before = on(&m, s);
    let nodes: Vec<u64> = before.iter().map(|(n, _)| *n).collect();
    let next = m.state().next_replica;
    assert!(!run_place(&mut m, s, &[nodes[0], nodes[1], 4]), "not approved");
    run(&mut m, approve(4, true));
    for bad in [&[][..], &[1, 1, 2], &[1, 2, 9]] {
        assert!(!run_place(&mut m, s, bad), "{bad:?}");
    }
    let old = place(&m, s, &[nodes[0], nodes[1], 4]);
    assert!(run(&mut m, old.clone()));
    assert!(!run(&mut m, old), "decided upon what is no more");
    assert_eq!(on(&m, s), [before[0], before[1], (4, next)]);
    assert_eq!(m.state().leaving(s)[0].id.0 as u32, before[2].1);
    assert_eq!(m.state().check(), Ok(()));
    // Taken back: the one that was to go keeps its id, the other goes.
    assert!(run_place(&mut m, s, &nodes));
    assert_eq!(on(&m, s), before);
    assert_eq!(m.state().leaving(s)[0].node, NodeId(4));
    assert_eq!(m.state().check(), Ok(()));
    // Arrived by its leader's word, which has to fit.
    let epoch = m.state().moving(s).unwrap().epoch;
    let other = MetaCommand::Settled { shard: s, epoch, members: vec![ReplicaId(1)] };
    assert!(!run(&mut m, other));
    assert!(run_settled(&mut m, s));
    assert!(m.state().moving(s).is_none() && !run_settled(&mut m, s));
    // Another order moves nobody.
    let turned: Vec<u64> = nodes.iter().rev().copied().collect();
    assert!(run_place(&mut m, s, &turned));
    assert!(m.state().moving(s).is_none());
    // Nor does the meta group's way differ.
    assert!(run_place(&mut m, ShardId::META, &[1, 2, 4]));
    assert_eq!(m.state().leaving(ShardId::META)[0].node, NodeId(3));
    assert!(run_settled(&mut m, ShardId::META));
    assert_eq!(MetaState::decode(&m.state().encode()).as_ref(), Ok(&**m.state()));
}

#[test]
fn a_node_that_begins_anew_while_it_moves_is_nobody_that_stays() {
    let mut m = machine();
    run(&mut m, register(4, life(4)));
    run(&mut m, approve(4, true));
    let s = ShardId(0);
    let nodes: Vec<u64> = on(&m, s).iter().map(|(n, _)| *n).collect();
    run_place(&mut m, s, &[nodes[0], nodes[1], 4]);
    // What leaves was in the memory of a life that is over: coming back it begins empty, under another id.
    let gone = on(&m, s).len() as u64;
    assert_eq!(gone, 3);
    let leaves = m.state().leaving(s)[0];
    run(&mut m, register(leaves.node.0, life(77)));
    assert!(run_place(&mut m, s, &nodes));
    assert!(m.state().replicas(s).iter().all(|r| r.id != leaves.id));
    // Nor is it kept, since there is nothing to keep.
    assert!(m.state().leaving(s).iter().all(|r| r.id != leaves.id));
    assert_eq!(m.state().check(), Ok(()));
}

/// A group that went, came back and goes again: the news of its first arrival says nothing of the second.
#[test]
fn an_arrival_counts_for_its_own_decision_only() {
    let mut m = machine();
    run(&mut m, register(4, life(4)));
    run(&mut m, approve(4, true));
    let s = ShardId(0);
    let there: Vec<u64> = on(&m, s).iter().map(|(n, _)| *n).collect();
    let away = [there[0], there[1], 4];
    run_place(&mut m, s, &away);
    let epoch = m.state().moving(s).unwrap().epoch;
    let members = m.state().replicas(s).iter().map(|r| r.id).collect();
    let first = MetaCommand::Settled { shard: s, epoch, members };
    run_place(&mut m, s, &there);
    run_place(&mut m, s, &away);
    assert!(!run(&mut m, first), "late news");
    assert!(!m.state().leaving(s).is_empty());
    assert!(run_settled(&mut m, s));
}
