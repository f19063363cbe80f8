//! Links: up, down, and what ends them.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_streams_must_reach_the_named_node_in_one_life() {
    // The first connection is answered by life 0, the next by life 1, and so on: never twice the same.
    let mut one = Node::new(1, 11);
    let (torn, mut kept) = fake_acceptor(|n| (2, u128::from(n), 0));
    tokio::spawn(async move { while kept.recv().await.is_some() {} });
    one.peers.set_reach(NodeId(2), Reach::at(torn));
    eventually("torn", || count(&one.peers.stats().dials_failed) >= 3).await;
    // One life, but the process was restarted in between: before the second stream, or before the third.
    for restart in [1, 2] {
        let (torn, mut kept) = fake_acceptor(move |n| (2, 22, u64::from(n % 3 >= restart)));
        tokio::spawn(async move { while kept.recv().await.is_some() {} });
        let before = count(&one.peers.stats().dials_failed);
        one.peers.set_reach(NodeId(2), Reach::at(torn));
        eventually("torn", || count(&one.peers.stats().dials_failed) >= before + 3).await;
    }
    let (wrong, mut kept) = fake_acceptor(|_| (3, 33, 0));
    tokio::spawn(async move { while kept.recv().await.is_some() {} });
    one.peers.set_reach(NodeId(2), Reach::at(wrong));
    let before = count(&one.peers.stats().dials_failed);
    eventually("wrong node", || count(&one.peers.stats().dials_failed) >= before + 3).await;
    assert!(one.events.try_recv().is_err());
    assert_eq!(count(&one.peers.stats().links_up), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_falls_silent_goes_down() {
    let quick = PeerOptions { pulse_timeout: Duration::from_millis(100), ..options() };
    let mut one = Node::start(config(1, 11, quick));
    // It welcomes and keeps the connections open, but never sends a pulse.
    let (addr, mut kept) = fake_acceptor(|_| (2, 22, 0));
    one.peers.set_reach(NodeId(2), Reach::at(addr));
    one.up().await;
    let _held = (kept.recv().await, kept.recv().await, kept.recv().await);
    assert_eq!(one.down().await, NodeId(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_takes_nothing_goes_down() {
    let quick = PeerOptions { write_timeout: Duration::from_millis(100), ..options() };
    let mut one = Node::start(config(1, 11, quick));
    let (addr, mut kept) = fake_acceptor(|_| (2, 22, 0));
    one.peers.set_reach(NodeId(2), Reach::at(addr));
    let (_, _, link) = one.up().await;
    let streams = [(); Channel::ALL.len()].map(|()| kept.try_recv().unwrap());
    // Pulses go on: only the missing progress can give it away.
    tokio::spawn(async move {
        while streams.iter().all(|s| s.try_write(&[0]).is_ok()) {
            sleep(Duration::from_millis(20)).await;
        }
    });
    let frame = Bytes::from(vec![7; 4 * 1024 * 1024]);
    for _ in 0..4 {
        link.send(Channel::Requests, frame.clone()).unwrap();
    }
    link.flush(Channel::Requests);
    assert_eq!(one.down().await, NodeId(2));
    assert_eq!(link.send(Channel::Raft, Bytes::from_static(b"x")), Err(SendError::Down));
    // Nothing of the four was written as a whole, nor what came later.
    assert_eq!(count(&one.peers.stats().drops), 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incoming_stream_without_a_byte_is_closed() {
    let quick = PeerOptions { idle_timeout: Duration::from_millis(100), ..options() };
    let node = Node::start(config(1, 11, quick));
    let (mut stream, answer) = greet(&node, &hello(1)).await;
    assert!(answer.is_ok());
    until_closed(&mut stream).await;
    // A standing link with nothing to say lives on its empty frames: see that they are sent.
    let quick = PeerOptions { idle_timeout: Duration::from_millis(400), pulse: Duration::from_millis(20), ..options() };
    let (mut one, two) = (Node::start(config(1, 11, quick)), Node::start(config(2, 22, quick)));
    one.dial(2, &two);
    one.up().await;
    assert!(timeout(Duration::from_millis(1500), one.events.recv()).await.is_err(), "an idle link stays up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fenced_life_is_refused_and_told() {
    let (mut old, mut two) = (Node::new(1, 11), Node::new(2, 22));
    old.dial(2, &two);
    two.dial(1, &old);
    let (_, _, link) = old.up().await;
    let (_, life, _) = two.up().await;
    assert_eq!(life, Incarnation(11));
    link.send(Channel::Raft, Bytes::from_static(b"before")).unwrap();
    link.flush(Channel::Raft);
    assert_eq!(two.frame().await.3, b"before"[..]);

    two.peers.set_fenced(NodeId(1), &[Incarnation(10), Incarnation(11)]);
    // Both directions are closed; the old life is told, again and again.
    assert_eq!(two.down().await, NodeId(1));
    assert_eq!(old.down().await, NodeId(2));
    for _ in 0..2 {
        let event = old.next().await;
        assert!(matches!(event, PeerEvent::Fenced { by: NodeId(2) }), "{event:?}");
    }
    assert_eq!(link.send(Channel::Raft, Bytes::from_static(b"after")), Err(SendError::Down));
    // Its address is still known, but that life does not come up again.
    let failed = count(&two.peers.stats().dials_failed);
    eventually("dialed in vain", || count(&two.peers.stats().dials_failed) >= failed + 2).await;
    assert!(two.events.try_recv().is_err());

    let mut new = Node::new(1, 12);
    new.dial(2, &two);
    new.up().await;
    two.dial(1, &new);
    assert_eq!(two.up().await.1, Incarnation(12));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_life_of_a_peer_is_down_then_up() {
    let mut one = Node::new(1, 11);
    let two = Node::new(2, 22);
    let addr = two.peers.local_addr();
    one.dial(2, &two);
    let (_, life, link) = one.up().await;
    assert_eq!(life, Incarnation(22));
    // Queued for the first life, never flushed: it must not reach the second.
    link.send(Channel::Requests, Bytes::from_static(b"for 22")).unwrap();
    two.peers.shutdown().await;
    assert_eq!(one.down().await, NodeId(2));
    // The old process may leave its connections in TIME_WAIT; a listener of the standard library allows for that.
    let (sender, inputs) = crossbeam::channel::bounded(64);
    let again = std::net::TcpListener::bind(addr).unwrap();
    let peers = Peers::start(config(2, 23, options()), again, sender).unwrap();
    let mut two = Node { peers, events: drain(inputs) };
    let (_, life, fresh) = one.up().await;
    assert_eq!(life, Incarnation(23));
    assert_eq!(link.send(Channel::Requests, Bytes::from_static(b"for 22")), Err(SendError::Down));
    fresh.send(Channel::Requests, Bytes::from_static(b"for 23")).unwrap();
    fresh.flush(Channel::Requests);
    assert_eq!(two.frame().await.3, b"for 23"[..]);
    assert_eq!(count(&one.peers.stats().reconnects), 1);
    assert_eq!(count(&one.peers.stats().links_up), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_distrusted_stream_is_closed_and_may_come_again() {
    let (mut one, mut two) = (Node::new(1, 11), Node::new(2, 22));
    one.dial(2, &two);
    one.up().await;
    two.peers.distrust(NodeId(1), Incarnation(11), Channel::Requests);
    assert_eq!(one.down().await, NodeId(2));
    let (_, _, link) = one.up().await;
    link.send(Channel::Requests, Bytes::from_static(b"again")).unwrap();
    link.flush(Channel::Requests);
    assert_eq!(two.frame().await.3, b"again"[..]);
    assert_eq!(count(&two.peers.stats().distrusted), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_may_change_and_go() {
    let mut one = Node::new(1, 11);
    let (first, second) = (Node::new(2, 21), Node::new(2, 22));
    one.dial(2, &first);
    assert_eq!(one.up().await.1, Incarnation(21));
    // The same again changes nothing.
    one.dial(2, &first);
    one.dial(2, &second);
    assert_eq!(one.down().await, NodeId(2));
    assert_eq!(one.up().await.1, Incarnation(22));
    one.peers.set_reach(NodeId(2), Reach::default());
    assert_eq!(one.down().await, NodeId(2));
    eventually("both closed", || count(&second.peers.stats().incoming) == 0).await;
    // Names are resolved; nonsense is an attempt that failed, or ignored if overlong; the own id is ignored.
    one.peers.set_reach(NodeId(1), Reach::at(first.addr()));
    one.peers.set_reach(NodeId(2), Reach::at("no port".to_owned()));
    let failed = count(&one.peers.stats().dials_failed);
    eventually("nonsense fails", || count(&one.peers.stats().dials_failed) > failed).await;
    one.peers.set_reach(NodeId(2), Reach::at("x".repeat(300)));
    one.peers.set_reach(NodeId(2), Reach::at(format!("localhost:{}", second.peers.local_addr().port())));
    assert_eq!(one.up().await.1, Incarnation(22));
    assert!(one.events.try_recv().is_err());
}

/// What is on record may be of before a restart: the next address is tried, and the link to it stays while it is named, or
/// the node answers and registers no other one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_stays_where_the_node_was_found() {
    let mut one = Node::new(1, 11);
    let (mut first, second, third) = (Node::new(2, 21), Node::new(2, 22), Node::new(2, 23));
    // Nobody listens there.
    let nobody = listener().local_addr().unwrap().to_string();
    let reach = |addresses: &[&String], pinned: Option<&str>| Reach {
        addresses: addresses.iter().map(|a| (*a).clone()).collect(),
        pinned: pinned.map(str::to_owned),
    };
    let (there, elsewhere, wrong) = (first.addr(), second.addr(), third.addr());
    one.peers.set_reach(NodeId(2), reach(&[&nobody, &there], None));
    let (_, incarnation, link) = one.up().await;
    assert_eq!(incarnation, Incarnation(21));
    for kept in [
        reach(&[&wrong, &nobody, &there], None),
        reach(&[&wrong, &there], Some("registered")),
        reach(&[&wrong], Some("registered")),
    ] {
        one.peers.set_reach(NodeId(2), kept);
        link.send(Channel::Requests, Bytes::from_static(b"still here")).unwrap();
        link.flush(Channel::Requests);
        assert_eq!(first.frame().await.3, b"still here"[..]);
    }
    one.peers.set_reach(NodeId(2), reach(&[&elsewhere], Some("registered anew")));
    assert_eq!(one.down().await, NodeId(2));
    assert_eq!(one.up().await.1, Incarnation(22));
    // Nobody answers any more: what is pinned no longer holds the link to an address that is not named.
    one.peers.set_reach(NodeId(2), reach(&[&there], Some("registered anew")));
    one.peers.set_reach(NodeId(2), reach(&[&there], None));
    assert_eq!(one.down().await, NodeId(2));
    assert_eq!(one.up().await.1, Incarnation(21));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_come_and_go_use_no_places_up() {
    let mut one = Node::new(1, 11);
    for id in 2..MAX_PEERS as u64 * 3 {
        one.peers.set_reach(NodeId(id), Reach::at("127.0.0.1:1"));
        one.peers.set_reach(NodeId(id), Reach::default());
        if id % 256 == 0 {
            eventually("places are free again", || one.peers.inner.peers.lock().unwrap().is_empty()).await;
        }
    }
    let two = Node::new(2, 22);
    one.dial(2, &two);
    assert_eq!(one.up().await.1, Incarnation(22));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_writes_what_is_queued() {
    let (mut one, mut two) = (Node::new(1, 11), Node::new(2, 22));
    one.dial(2, &two);
    let (_, _, link) = one.up().await;
    for i in 0..5000_u32 {
        link.send(Channel::Requests, Bytes::copy_from_slice(&i.to_le_bytes())).unwrap();
    }
    // Not flushed by us.
    one.peers.shutdown().await;
    assert_eq!(link.send(Channel::Requests, Bytes::from_static(b"late")), Err(SendError::Down));
    for i in 0..5000_u32 {
        assert_eq!(two.frame().await.3, i.to_le_bytes()[..]);
    }
    one.dial(2, &two);
    assert!(TcpStream::connect(one.peers.local_addr()).await.is_err(), "the port is closed");
    one.peers.shutdown().await;
    assert_eq!(count(&two.peers.stats().links_up), 0);
    eventually("closed", || count(&two.peers.stats().incoming) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_handle_ends_the_connections() {
    let (mut one, two) = (Node::new(1, 11), Node::new(2, 22));
    one.dial(2, &two);
    one.up().await;
    drop(two);
    assert_eq!(one.down().await, NodeId(2));
}

#[test]
fn pauses_vary_by_a_quarter() {
    let base = Duration::from_millis(100);
    for _ in 0..1000 {
        let pause = jittered(base);
        assert!(pause >= base * 3 / 4 && pause <= base * 5 / 4 + Duration::from_nanos(1), "{pause:?}");
    }
}
