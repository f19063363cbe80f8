//! Numbers of connections.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_higher_number_ends_the_lower_for_good() {
    let mut node = Node::new(1, 11);
    for round in 0..50_u64 {
        let (mut old, answer) = greet(&node, &hello(2 * round + 1)).await;
        assert_eq!(answer, Ok(Incarnation(11)));
        old.write_all(&framed(b"old")).await.unwrap();
        assert_eq!(node.frame().await.3, b"old"[..]);
        // These race with the new connection: they may arrive before its first frame, never after.
        let _ = old.write_all(&framed(b"late")).await;
        let (mut new, answer) = greet(&node, &hello(2 * round + 2)).await;
        assert_eq!(answer, Ok(Incarnation(11)));
        let _ = old.write_all(&framed(b"overtaken")).await;
        new.write_all(&framed(b"new")).await.unwrap();
        let mut frame = node.frame().await.3;
        if frame == b"late"[..] {
            frame = node.frame().await.3;
        }
        assert_eq!(frame, b"new"[..]);
        until_closed(&mut old).await;
        new.write_all(&framed(b"more")).await.unwrap();
        assert_eq!(node.frame().await.3, b"more"[..]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_is_welcomed_only_after_the_older_reader_has_ended() {
    let mut node = Node::new(1, 11);
    let (mut old, _) = greet(&node, &hello(1)).await;
    until_read(&mut old, &mut node).await;
    // In the place of a reader that takes its time to end.
    let life = (NodeId(9), Incarnation(90));
    let lingering = Claim::stream(&node.peers.inner.shared, life, Channel::Raft, number(2)).unwrap();
    until_closed(&mut old).await;
    let mut new = TcpStream::connect(node.peers.local_addr()).await.unwrap();
    new.write_all(&handshake_bytes(&hello(3))).await.unwrap();
    new.write_all(&framed(b"new")).await.unwrap();
    assert!(timeout(Duration::from_millis(200), new.readable()).await.is_err(), "welcomed too early");
    assert!(node.events.try_recv().is_err(), "read too early");
    drop(lingering);
    let body = timeout(PATIENCE, read_handshake(&mut new)).await.unwrap().unwrap();
    assert!(matches!(decode_handshake(&body), Ok(Answer::Welcome { .. })));
    assert_eq!(node.frame().await.3, b"new"[..]);
}

/// Sees that `stream` is being read.
async fn until_read(stream: &mut TcpStream, node: &mut Node) {
    stream.write_all(&framed(b"here")).await.unwrap();
    assert_eq!(node.frame().await.3, b"here"[..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_that_is_not_higher_is_rejected() {
    let node = Node::new(1, 11);
    let (_held, answer) = greet(&node, &hello(7)).await;
    assert_eq!(answer, Ok(Incarnation(11)));
    for number in [7, 6, 0] {
        assert_eq!(greet(&node, &hello(number)).await.1, Err(Reject::Stale as u8), "number {number}");
    }
    // Numbers count per stream: other channel, other life, other node.
    assert!(greet(&node, &Hello { channel: 1, ..hello(1) }).await.1.is_ok());
    assert!(greet(&node, &Hello { incarnation: Incarnation(91), ..hello(1) }).await.1.is_ok());
    assert!(greet(&node, &Hello { from: NodeId(8), ..hello(1) }).await.1.is_ok());
    assert_eq!(count(&node.peers.stats().handshakes_rejected), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn remembered_lives_are_limited() {
    let node = Node::new(1, 11);
    let shared = &node.peers.inner.shared;
    let life = |n: usize| (NodeId(9), Incarnation(n as u128));
    let stream = |n, counter| Claim::stream(shared, life(n), Channel::Raft, number(counter));
    for n in 0..MAX_LIVES {
        drop(stream(n, 1).unwrap());
    }
    let fresh = usize::MAX;
    // All of them ended a moment ago: forgetting one could let an older connection of it in.
    assert!(matches!(stream(fresh, 1), Err(Reject::Busy)));
    assert!(matches!(stream(5, 1), Err(Reject::Stale)));
    let held = stream(5, 2).unwrap();
    // Strangers cannot keep us from the peers that we dial; for these there is a limit, too.
    for n in 0..MAX_PEERS {
        drop(Claim::link(shared, life(MAX_LIVES + n), 0).unwrap());
    }
    assert!(matches!(Claim::link(shared, life(fresh), 0), Err(Reject::Busy)));
    for life in shared.lives().values_mut() {
        life.idle_since = MonoTime(0);
    }
    // The clock counts from the boot; a machine that has just booted remembers a little longer.
    if clock::mono().0 > LIFE_MEMORY.as_nanos() as u64 {
        assert!(Claim::link(shared, life(fresh), 0).is_ok());
        assert_eq!(shared.lives().len(), MAX_LIVES + MAX_PEERS);
    }
    assert!(shared.lives().contains_key(&held.life()), "a life in use is never forgotten");
}
