//! Processes of one life that follow each other.

use super::*;

fn start(boot: u64, counter: u64, channel: Channel) -> Hello<'static> {
    Hello { number: ConnNumber { boot, counter }, channel: channel as u8, ..hello(1) }
}

/// On the snapshot stream, too, this is a frame.
fn frame(body: &str) -> Vec<u8> {
    framed(format!("\0{body}").as_bytes())
}

fn is(frame: &Bytes, body: &str) -> bool {
    frame.ends_with(body.as_bytes())
}

/// Whether the claim's turn has come.
async fn is_alone(claim: &mut Claim) -> bool {
    tokio::select! {
        biased;
        alone = claim.wait_alone() => alone,
        () = std::future::ready(()) => false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_start_ends_all_streams_of_the_earlier_for_good() {
    let mut node = Node::new(1, 11);
    for boot in 1..30 {
        let mut old = Vec::new();
        for channel in Channel::ALL {
            let (mut stream, answer) = greet(&node, &start(boot, 50, channel)).await;
            assert_eq!(answer, Ok(Incarnation(11)), "{boot} {channel:?}");
            stream.write_all(&frame("old")).await.unwrap();
            assert!(is(&node.frame().await.3, "old"));
            old.push(stream);
        }
        // These race with the next process: they may arrive before its first frame, never after.
        for stream in &mut old {
            let _ = stream.write_all(&frame("late")).await;
        }
        // It counts from 1 again, and is heard on one of the streams only.
        let channel = Channel::ALL[boot as usize % 3];
        let (mut new, answer) = greet(&node, &start(boot + 1, 1, channel)).await;
        assert_eq!(answer, Ok(Incarnation(11)), "{boot}");
        for stream in &mut old {
            let _ = stream.write_all(&frame("overtaken")).await;
        }
        new.write_all(&frame("new")).await.unwrap();
        let mut late = 0;
        let mut got = node.frame().await.3;
        while is(&got, "late") {
            late += 1;
            got = node.frame().await.3;
        }
        assert!(is(&got, "new") && late <= old.len(), "{got:?}");
        for stream in &mut old {
            until_closed(stream).await;
        }
        // Whatever number the earlier process had still to come with: on no stream.
        for channel in Channel::ALL {
            assert_eq!(greet(&node, &start(boot, 1000, channel)).await.1, Err(Reject::Stale as u8));
        }
        new.write_all(&frame("more")).await.unwrap();
        assert!(is(&node.frame().await.3, "more"));
    }
}

/// A node 2 of life 22, started for the `boot`th time, at `address` or a new one.
fn second(boot: u64, address: Option<SocketAddr>) -> Node {
    let (sender, inputs) = crossbeam::channel::bounded(64);
    let listener = address.map_or_else(listener, |a| std::net::TcpListener::bind(a).unwrap());
    let peers = Peers::start(PeersConfig { boot, ..config(2, 22, options()) }, listener, sender).unwrap();
    Node { peers, events: drain(inputs) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_process_of_a_life_is_down_then_up() {
    let mut one = Node::new(1, 11);
    let mut two = second(1, None);
    let addr = two.peers.local_addr();
    one.dial(2, &two);
    for boot in 2..5 {
        two.dial(1, &one);
        let (peer, life, link) = one.up().await;
        assert_eq!((peer, life), (NodeId(2), Incarnation(22)));
        let (_, _, back) = two.up().await;
        back.send(Channel::Requests, Bytes::from_static(b"answer")).unwrap();
        back.flush(Channel::Requests);
        assert_eq!(one.frame().await.3, b"answer"[..]);
        // Queued for this process, never flushed: it must not reach the next.
        link.send(Channel::Requests, Bytes::from_static(b"before")).unwrap();
        // The last handle goes: the sudden end of a process, as far as one can have it within a test.
        drop(back);
        drop(two);
        assert_eq!(one.down().await, NodeId(2));
        assert_eq!(link.send(Channel::Raft, Bytes::from_static(b"late")), Err(SendError::Down));
        eventually("its port is free", || std::net::TcpListener::bind(addr).is_ok()).await;
        two = second(boot, Some(addr));
    }
    let (_, life, link) = one.up().await;
    assert_eq!(life, Incarnation(22));
    link.send(Channel::Requests, Bytes::from_static(b"after")).unwrap();
    link.flush(Channel::Requests);
    assert_eq!(two.frame().await.3, b"after"[..]);
    assert_eq!(count(&one.peers.stats().reconnects), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_start_takes_the_place_of_one_that_still_lives() {
    let mut one = Node::new(1, 11);
    let mut old = second(7, None);
    one.dial(2, &old);
    old.dial(1, &one);
    let (_, _, link) = one.up().await;
    let (_, _, from_old) = old.up().await;

    // One knows nothing of it until it connects. Its address is not known yet.
    let mut new = second(8, None);
    new.dial(1, &one);
    let (_, _, from_new) = new.up().await;
    from_new.send(Channel::Raft, Bytes::from_static(b"new")).unwrap();
    from_new.flush(Channel::Raft);
    // The link to the earlier process goes down, before anything that the later one says.
    assert_eq!(one.down().await, NodeId(2));
    assert_eq!(one.frame().await.3, b"new"[..]);
    assert_eq!(link.send(Channel::Raft, Bytes::from_static(b"x")), Err(SendError::Down));
    assert_eq!(old.down().await, NodeId(1));
    assert_eq!(from_old.send(Channel::Raft, Bytes::from_static(b"x")), Err(SendError::Down));
    // Neither dials the other again with success.
    let (ours, theirs) = (count(&one.peers.stats().dials_failed), count(&old.peers.stats().dials_failed));
    eventually("refused by one", || count(&old.peers.stats().dials_failed) >= theirs + 3).await;
    eventually("refused as it answers", || count(&one.peers.stats().dials_failed) >= ours + 3).await;
    assert!(old.events.try_recv().is_err());
    assert!(one.events.try_recv().is_err());

    one.dial(2, &new);
    let (_, life, link) = one.up().await;
    assert_eq!(life, Incarnation(22));
    link.send(Channel::Snapshot, Bytes::from_static(b"for the later")).unwrap();
    link.flush(Channel::Snapshot);
    assert_eq!(new.frame().await.3, b"for the later"[..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_later_start_that_was_dialed_ends_the_streams_of_the_earlier_before_it_is_up() {
    let mut node = Node::new(1, 11);
    let life = (NodeId(9), Incarnation(90));
    let (mut old, _) = greet(&node, &start(3, 1, Channel::Requests)).await;
    old.write_all(&frame("old")).await.unwrap();
    assert!(is(&node.frame().await.3, "old"));
    // In the place of a reader that takes its time to end.
    let mut lingering =
        Claim::stream(&node.peers.inner.shared, life, Channel::Raft, ConnNumber { boot: 3, counter: 2 }).unwrap();
    let (addr, mut kept) = fake_acceptor(|_| (9, 90, 4));
    node.peers.set_reach(NodeId(9), Reach::at(addr));
    // Only the answers tell of the later start.
    until_closed(&mut old).await;
    timeout(PATIENCE, lingering.ended()).await.expect("told to end");
    assert_eq!(greet(&node, &start(3, 9, Channel::Snapshot)).await.1, Err(Reject::Stale as u8));
    assert!(timeout(Duration::from_millis(200), node.events.recv()).await.is_err(), "up too early");
    drop(lingering);
    let _held = (kept.recv().await, kept.recv().await, kept.recv().await);
    assert_eq!(node.up().await.0, NodeId(9));
}

#[tokio::test]
async fn claims_wait_for_what_they_have_ended_and_for_nothing_else() {
    let node = Node::new(1, 11);
    let life = (NodeId(9), Incarnation(90));
    let shared = &node.peers.inner.shared;
    let stream = |channel, boot, counter| Claim::stream(shared, life, channel, ConnNumber { boot, counter });
    let mut link = Claim::link(shared, life, 1).unwrap();
    let mut raft = stream(Channel::Raft, 1, 5).unwrap();
    let mut requests = stream(Channel::Requests, 1, 4).unwrap();
    for claim in [&mut link, &mut raft, &mut requests] {
        assert!(is_alone(claim).await, "{claim:?}");
    }
    let mut next = stream(Channel::Raft, 1, 6).unwrap();
    assert!(!is_alone(&mut next).await);
    drop(raft);
    assert!(is_alone(&mut next).await, "the other stream and the link go on");
    assert!(is_alone(&mut requests).await && is_alone(&mut link).await);

    let mut later = stream(Channel::Snapshot, 2, 1).unwrap();
    for claim in [link, requests, next] {
        let mut claim = claim;
        assert!(!is_alone(&mut later).await, "{claim:?}");
        claim.ended().await;
        assert!(!claim.wait_alone().await, "it was ended itself");
    }
    assert!(is_alone(&mut later).await);
    // Of what has ended, nothing comes again.
    assert!(matches!(Claim::link(shared, life, 1), Err(Reject::Stale)));
    assert!(matches!(stream(Channel::Requests, 1, u64::MAX), Err(Reject::Stale)));
    // Another life, another order.
    let other = (NodeId(9), Incarnation(91));
    assert!(Claim::stream(shared, other, Channel::Raft, ConnNumber { boot: 0, counter: 1 }).is_ok());
}
