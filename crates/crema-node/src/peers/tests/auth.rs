//! Who has no key of the cluster is not heard, and nothing of it is decoded.

use super::super::auth::{KEYED_MAGIC, MAC_BYTES};
use super::*;
use crema_gossip::ClusterKey;

fn key(n: u8) -> ClusterKey {
    ClusterKey::new([n; 32])
}

fn ring(keys: &[u8]) -> KeyRing {
    let mut ring = KeyRing::new(key(keys[0]));
    keys[1..].iter().for_each(|n| ring.install(key(*n)).unwrap());
    ring
}

fn keyed(node: u64, life: u128, keys: &[u8]) -> Node {
    let keys = (!keys.is_empty()).then(|| ring(keys));
    Node::start(PeersConfig { keys, ..config(node, life, options()) })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_with_a_common_key_talk() {
    for (left, right) in [(&[1][..], &[1][..]), (&[1, 2], &[2, 1]), (&[1], &[2, 1])] {
        let mut one = keyed(1, 11, left);
        let mut two = keyed(2, 22, right);
        one.dial(2, &two);
        let (peer, _, link) = one.up().await;
        assert_eq!(peer, NodeId(2));
        link.send(Channel::Raft, Bytes::from_static(b"x")).unwrap();
        link.flush(Channel::Raft);
        assert_eq!(two.frame().await.3, b"x"[..], "{left:?} {right:?}");
        assert_eq!(count(&two.peers.stats().unauthenticated), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_without_a_common_key_do_not_and_are_counted() {
    for (left, right) in [(&[1][..], &[2][..]), (&[1], &[]), (&[], &[1])] {
        let mut one = keyed(1, 11, left);
        let mut two = keyed(2, 22, right);
        one.dial(2, &two);
        eventually("refused twice", || count(&two.peers.stats().unauthenticated) >= 2).await;
        eventually("noticed", || count(&one.peers.stats().dials_failed) >= 1).await;
        assert!(one.events.try_recv().is_err() && two.events.try_recv().is_err(), "{left:?} {right:?}");
        assert_eq!(count(&two.peers.stats().garbage), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_changed_while_nodes_talk() {
    let mut one = keyed(1, 11, &[1]);
    let two = keyed(2, 22, &[1]);
    one.dial(2, &two);
    one.up().await;
    // The new one is accepted, then used, then alone.
    for keys in [&[1, 2][..], &[2, 1], &[2]] {
        one.peers.set_keys(ring(keys));
        two.peers.set_keys(ring(keys));
    }
    // What stands stays; what comes has the new one.
    assert!(one.events.try_recv().is_err());
    one.peers.set_reach(NodeId(2), Reach::default());
    one.down().await;
    one.dial(2, &two);
    one.up().await;
    let late = keyed(3, 33, &[1]);
    late.dial(2, &two);
    eventually("the old one is refused", || count(&two.peers.stats().unauthenticated) >= 1).await;
    // A node without keys does not get any this way.
    let open = keyed(4, 44, &[]);
    open.peers.set_keys(ring(&[1]));
    let mut other = keyed(5, 55, &[]);
    other.dial(4, &open);
    other.up().await;
}

/// However many connect without a key: peers come in, and stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_never_take_the_places_of_peers() {
    let (many, of_one) = (300, 16);
    let waits_for_ever = PeerOptions {
        handshake_timeout: Duration::from_secs(86_400),
        max_incoming: 8,
        max_unproven: 64,
        max_unproven_of_one: of_one,
        ..options()
    };
    let mut node = Node::start(PeersConfig { keys: Some(ring(&[1])), ..config(1, 11, waits_for_ever) });
    let strangers = async || {
        let mut all = Vec::new();
        for i in 0..many {
            let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
            // Some know how a peer begins.
            if i % 2 == 0 {
                stream.write_all(&KEYED_MAGIC).await.unwrap();
            }
            all.push(stream);
        }
        all
    };
    let before = strangers().await;
    let mut peer = keyed(2, 22, &[1]);
    peer.dial(1, &node);
    let (_, _, link) = peer.up().await;
    let after = strangers().await;
    let crowded_out = 2 * many - of_one;
    eventually("the oldest are closed", || count(&node.peers.stats().over_limit) >= crowded_out as u64).await;
    for mut stream in before.into_iter().chain(after).take(crowded_out) {
        until_closed(&mut stream).await;
    }
    link.send(Channel::Raft, Bytes::from_static(b"x")).unwrap();
    link.flush(Channel::Raft);
    assert_eq!(node.frame().await.3, b"x"[..]);
    assert!(peer.events.try_recv().is_err(), "its link stands");
    assert_eq!(count(&node.peers.stats().over_limit), crowded_out as u64);
}

/// Whatever byte of a dialer's words is changed on its way, or said again later: it is not heard.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_and_repeated_words_are_refused() {
    let node = keyed(1, 11, &[1]);
    let ours = ring(&[1]);
    let until_welcome = async |change: Option<usize>| {
        let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        let session = super::super::auth::dial(&mut stream, &ours).await.unwrap();
        let mut words = super::super::auth::prove(
            Some(&session),
            super::super::auth::Proof::Dialer,
            handshake_bytes(&hello(1 + change.map_or(0, |at| at as u64))),
        );
        if let Some(at) = change {
            words[at] ^= 1;
        }
        let _ = stream.write_all(&words).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an end in time");
        (words, answer)
    };
    let (words, answer) = until_welcome(None).await;
    assert!(answer.len() > MAC_BYTES + PREAMBLE_BYTES, "welcome");
    for at in 0..words.len() {
        let (_, answer) = until_welcome(Some(at)).await;
        // A wrong version is told of, and proved.
        let version = (MAC_BYTES + 4..MAC_BYTES + 6).contains(&at);
        assert_eq!(answer.is_empty(), !version, "byte {at} of {}", words.len());
    }
    // Recorded words are of no use for another connection.
    let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
    super::super::auth::dial(&mut stream, &ours).await.unwrap();
    stream.write_all(&words).await.unwrap();
    until_closed(&mut stream).await;
    // Nor is a node that cannot prove that it has the key.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut opening = vec![0; 42];
            let _ = stream.read_exact(&mut opening).await;
            opening.extend_from_slice(&[7; MAC_BYTES]);
            let _ = stream.write_all(&opening).await;
        }
    });
    node.peers.set_reach(NodeId(2), Reach::at(addr.to_string()));
    eventually("it is not trusted", || count(&node.peers.stats().dials_failed) >= 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_openings_harm_nothing() {
    let mut random = Random::seeded("random_openings_harm_nothing");
    let mut node = Node::start(PeersConfig {
        keys: Some(ring(&[1])),
        ..config(1, 11, PeerOptions { handshake_timeout: PATIENCE, ..options() })
    });
    for _ in 0..200 {
        let mut bytes = KEYED_MAGIC.to_vec();
        bytes.extend_from_slice(&1_u16.to_le_bytes());
        bytes.extend_from_slice(&key(1).id().0.to_le_bytes());
        bytes.extend_from_slice(&noise(32 + random.below(200)));
        for _ in 0..random.below(3) {
            let at = random.below(bytes.len());
            bytes[at] = random.below(256) as u8;
        }
        let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        until_closed(&mut stream).await;
    }
    assert!(node.events.try_recv().is_err(), "nobody got in");
    let other = keyed(2, 22, &[1]);
    node.dial(2, &other);
    node.up().await;
}
