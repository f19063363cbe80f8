//! Who gets in, and what strangers cost.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_dropped_and_counted() {
    let mut node = Node::start(config(1, 11, options()));
    let mut overlong = handshake_bytes(&hello(1))[..6].to_vec();
    overlong.extend_from_slice(&u16::MAX.to_le_bytes());
    let mut trailing = handshake_bytes(&hello(1));
    trailing[6] += 1;
    trailing.push(0);
    let truncated = {
        let mut t = handshake_bytes(&hello(1));
        t.pop();
        t[6] -= 1;
        t
    };
    let cases = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 64],
        overlong,
        trailing,
        truncated,
        handshake_bytes(&Hello { channel: 3, ..hello(1) }),
    ];
    for (i, bytes) in cases.iter().enumerate() {
        let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        until_closed(&mut stream).await;
        assert_eq!(count(&node.peers.stats().garbage), i as u64 + 1, "case {i}");
    }
    // The port still serves peers.
    let (mut good, answer) = greet(&node, &hello(1)).await;
    assert_eq!(answer, Ok(Incarnation(11)));
    good.write_all(&framed(b"x")).await.unwrap();
    assert_eq!(node.frame().await.3, b"x"[..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_harm_nothing() {
    let mut random = Random::seeded("random_bytes_harm_nothing");
    let node = Node::start(config(1, 11, PeerOptions { handshake_timeout: PATIENCE, ..options() }));
    for i in 0..100 {
        let mut bytes = handshake_bytes(&hello(i + 1));
        bytes.extend_from_slice(&framed(b"body"));
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len());
            bytes[at] = random.below(256) as u8;
        }
        let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        // Either may fail when the node has hung up already.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        until_closed(&mut stream).await;
    }
    // Beyond whatever one of them may have claimed.
    let number = ConnNumber { boot: u64::MAX, counter: u64::MAX };
    assert!(greet(&node, &Hello { number, ..hello(1) }).await.1.is_ok());
    assert_eq!(count(&node.peers.stats().handshakes_timed_out), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incomplete_handshake_times_out() {
    let short = PeerOptions { handshake_timeout: Duration::from_millis(50), ..options() };
    let node = Node::start(config(1, 11, short));
    let whole = handshake_bytes(&hello(1));
    for sent in [0, 3, 7, whole.len() - 1] {
        let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        stream.write_all(&whole[..sent]).await.unwrap();
        until_closed(&mut stream).await;
    }
    assert_eq!(count(&node.peers.stats().handshakes_timed_out), 4);
    eventually("no connection left", || count(&node.peers.stats().incoming) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_rejected_with_the_reason() {
    let node = Node::new(1, 11);
    let cases = [
        (Hello { cluster: "other", ..hello(1) }, Reject::Cluster),
        (Hello { to: NodeId(2), ..hello(1) }, Reject::Target),
        (Hello { from: NodeId(1), ..hello(1) }, Reject::OwnId),
    ];
    for (hello, reject) in &cases {
        let (mut stream, answer) = greet(&node, hello).await;
        assert_eq!(answer, Err(*reject as u8), "{reject:?}");
        until_closed(&mut stream).await;
    }
    // A version that we do not know: its body is not ours to read.
    let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&(VERSION + 1).to_le_bytes());
    bytes.extend_from_slice(&0_u16.to_le_bytes());
    stream.write_all(&bytes).await.unwrap();
    let body = timeout(PATIENCE, read_handshake(&mut stream)).await.unwrap().unwrap();
    let Answer::Reject { code, text } = decode_handshake(&body).unwrap() else { panic!("rejected") };
    assert_eq!(Reject::from_code(code), Some(Reject::Version));
    assert!(text.contains(&format!("speaks version {VERSION} ")), "{text}");
    assert_eq!(count(&node.peers.stats().handshakes_rejected), 4);
    assert_eq!(count(&node.peers.stats().garbage), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_comes_not_up() {
    let mut one = Node::new(1, 11);
    let two = Node::start(PeersConfig { cluster: "other".to_owned(), ..config(2, 22, options()) });
    one.dial(2, &two);
    eventually("rejected twice", || count(&two.peers.stats().handshakes_rejected) >= 2).await;
    assert!(count(&one.peers.stats().dials_failed) >= 1);
    // Its own address: answered by itself, rejected as well.
    one.peers.set_reach(NodeId(2), Reach::at(one.addr()));
    eventually("rejected by itself", || count(&one.peers.stats().handshakes_rejected) >= 1).await;
    assert!(one.events.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incoming_connections_are_limited() {
    let few = PeerOptions { max_incoming: 2, handshake_timeout: PATIENCE, ..options() };
    let node = Node::start(config(1, 11, few));
    let first = greet(&node, &hello(1)).await;
    let _second = greet(&node, &Hello { channel: 1, ..hello(1) }).await;
    // Whoever has not said yet who it is takes no place among them.
    let _stranger = TcpStream::connect(node.peers.local_addr()).await.unwrap();
    let (mut third, answer) = greet(&node, &Hello { channel: 2, ..hello(1) }).await;
    assert_eq!(answer, Err(Reject::Busy as u8));
    until_closed(&mut third).await;
    assert_eq!(count(&node.peers.stats().over_limit), 1);
    drop(first);
    eventually("a place is free", || count(&node.peers.stats().incoming) == 2).await;
    assert!(greet(&node, &hello(2)).await.1.is_ok());
}

#[tokio::test]
async fn a_name_that_does_not_fit_the_handshake_is_refused() {
    let (sender, _inputs) = crossbeam::channel::bounded(1);
    for len in [0, MAX_CLUSTER_NAME_BYTES + 1] {
        let config = PeersConfig { cluster: "c".repeat(len), ..config(1, 1, options()) };
        assert!(
            matches!(Peers::start(config, listener(), sender.clone()), Err(PeersError::ClusterName(l)) if l == len)
        );
    }
    let longest = "c".repeat(MAX_CLUSTER_NAME_BYTES);
    let hello = Hello {
        cluster: &longest,
        number: ConnNumber { boot: u64::MAX, counter: u64::MAX },
        from: NodeId(u64::MAX),
        ..hello(1)
    };
    assert!(handshake_bytes(&hello).len() <= PREAMBLE_BYTES + MAX_HANDSHAKE_BYTES);
    let worst = format!("this is cluster {longest:?}, not {longest:?}");
    let answer = Answer::Reject { code: 2, text: cut(&worst, MAX_REASON_BYTES) };
    assert!(handshake_bytes(&answer).len() <= PREAMBLE_BYTES + MAX_HANDSHAKE_BYTES);
    assert_eq!(cut("aä", 2), "a");
}
