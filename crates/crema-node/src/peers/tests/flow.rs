//! Frames: order, bounds, back-pressure.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_arrive_in_order_on_both_channels() {
    let mut random = Random::seeded("frames_arrive_in_order_on_both_channels");
    let (mut one, mut two) = (Node::new(1, 11), Node::new(2, 22));
    one.dial(2, &two);
    let (peer, life, link) = one.up().await;
    assert_eq!((peer, life), (NodeId(2), Incarnation(22)));
    assert_eq!((link.peer(), link.incarnation()), (peer, life));
    let mut expected: [VecDeque<Bytes>; 2] = Default::default();
    let mut left = 0;
    for i in 0..2000_u32 {
        // Mostly small, some beyond the copied size, a few beyond a read buffer, one beyond the shared budget's bar.
        let size = match i % 100 {
            99 if i == 999 => LARGE_FRAME_BYTES + 5,
            98 => CHUNK_BYTES + random.below(300_000),
            90..98 => COPY_BELOW_BYTES - 2 + random.below(4),
            _ => 4 + random.below(300),
        };
        let mut body = i.to_le_bytes().to_vec();
        body.resize(size, i as u8);
        let frame = Bytes::from(body);
        let channel = [Channel::Raft, Channel::Requests][random.below(2)];
        link.send(channel, frame.clone()).unwrap();
        expected[channel as usize].push_back(frame);
        left += 1;
        if random.below(10) == 0 {
            link.flush(channel);
        }
    }
    link.flush(Channel::Raft);
    link.flush(Channel::Requests);
    while left > 0 {
        let (peer, life, channel, frame) = two.frame().await;
        assert_eq!((peer, life), (NodeId(1), Incarnation(11)));
        assert_eq!(Some(frame), expected[channel as usize].pop_front());
        left -= 1;
    }
    assert_eq!(count(&two.peers.stats().frames_in), 2000);
    eventually("all written", || count(&one.peers.stats().frames_out) == 2000).await;
    assert_eq!(count(&one.peers.stats().bytes_out), count(&two.peers.stats().bytes_in));
    assert_eq!(count(&one.peers.stats().drops), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_so_and_loses_nothing_it_took() {
    let small = PeerOptions { requests_queue_bytes: 300_000, queue_frames: 1000, ..options() };
    let mut one = Node::start(config(1, 11, small));
    // A driver that takes nothing for now, behind the shortest queue.
    let (sender, inputs) = crossbeam::channel::bounded(1);
    let two = Peers::start(config(2, 22, options()), listener(), sender).unwrap();
    one.peers.set_address(NodeId(2), Some(two.local_addr().to_string()));
    let (_, _, link) = one.up().await;
    let mut taken = 0_u32;
    let mut refused = 0;
    // Until everything between the two drivers is full: ours, the kernel's, and what the reader may hold.
    let all = async {
        while refused < 50 {
            let mut body = taken.to_le_bytes().to_vec();
            body.resize(100_000, 1);
            match link.send(Channel::Requests, body.into()) {
                Ok(()) => {
                    taken += 1;
                    refused = 0;
                }
                Err(error) => {
                    assert_eq!(error, SendError::Full);
                    refused += 1;
                    sleep(Duration::from_millis(2)).await;
                }
            }
            link.flush(Channel::Requests);
        }
    };
    timeout(PATIENCE, all).await.expect("the queue fills");
    // Raft has a queue of its own.
    link.send(Channel::Raft, Bytes::from_static(b"beat")).unwrap();
    link.flush(Channel::Raft);
    assert!(count(&two.stats().driver_full) > 0);
    assert!(count(&two.stats().bytes_in) <= (CREDIT_BYTES + CHUNK_BYTES + 200_000) as u64);
    assert!(count(&one.peers.stats().drops) >= 50);

    let mut events = drain(inputs);
    let (mut next, mut beats) = (0_u32, 0);
    while next < taken || beats == 0 {
        match timeout(PATIENCE, events.recv()).await.unwrap().unwrap() {
            PeerEvent::Frame { channel: Channel::Raft, frame, .. } => {
                assert_eq!(frame, b"beat"[..]);
                beats += 1;
            }
            PeerEvent::Frame { frame, .. } => {
                assert_eq!(frame[..4], next.to_le_bytes());
                assert_eq!(frame.len(), 100_000);
                next += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((next, beats), (taken, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_driver_that_keeps_its_batches_stops_the_reader() {
    let (sender, inputs) = crossbeam::channel::bounded(1024);
    let node = Peers::start(config(1, 11, options()), listener(), sender).unwrap();
    let mut one = Node::new(2, 22);
    one.peers.set_address(NodeId(1), Some(node.local_addr().to_string()));
    let (_, _, link) = one.up().await;
    let frames = 4 * CREDIT_BYTES / 500_000;
    for _ in 0..frames {
        link.send(Channel::Requests, Bytes::from(vec![3; 500_000])).unwrap();
    }
    link.flush(Channel::Requests);
    let mut kept = Vec::new();
    let mut got = 0;
    while got < CREDIT_BYTES - 500_000 {
        let Input::Peers(batch) = inputs.recv_timeout(PATIENCE).unwrap() else { panic!("a batch") };
        got += batch.events.len() * 500_000;
        kept.push(batch);
    }
    // The credit is used up: the queue has room for hundreds of batches more, and none comes.
    assert!(inputs.recv_timeout(Duration::from_millis(300)).is_err());
    assert!(got <= CREDIT_BYTES);
    drop(kept);
    let mut events = drain(inputs);
    for _ in 0..frames - got / 500_000 {
        timeout(PATIENCE, events.recv()).await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oversize_frame_closes_the_stream() {
    let mut node = Node::new(1, 11);
    let (mut stream, _) = greet(&node, &hello(1)).await;
    let mut bytes = framed(b"fine");
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&framed(b"fine too"));
    bytes.extend_from_slice(&(MAX_FRAME_BYTES as u32 + 1).to_le_bytes());
    bytes.extend_from_slice(b"whatever follows");
    stream.write_all(&bytes).await.unwrap();
    assert_eq!(node.frame().await.3, b"fine"[..]);
    assert_eq!(node.frame().await.3, b"fine too"[..]);
    until_closed(&mut stream).await;
    assert_eq!(count(&node.peers.stats().oversize), 1);
    assert!(node.events.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_frame_passes_a_queue_that_is_smaller() {
    let small = PeerOptions { raft_queue_bytes: 1000, ..options() };
    let (mut one, mut two) = (Node::start(config(1, 11, small)), Node::new(2, 22));
    one.dial(2, &two);
    let (_, _, link) = one.up().await;
    let largest = Bytes::from(vec![5; MAX_FRAME_BYTES]);
    link.send(Channel::Raft, largest.clone()).unwrap();
    link.flush(Channel::Raft);
    assert!(two.frame().await.3 == largest);
    for wrong in [Bytes::new(), Bytes::from(vec![0; MAX_FRAME_BYTES + 1])] {
        assert_eq!(link.send(Channel::Raft, wrong.clone()), Err(SendError::Size(wrong.len())));
    }
}

#[test]
fn frames_survive_any_cutting() {
    let mut random = Random::seeded("frames_survive_any_cutting");
    for _ in 0..200 {
        let mut wire = Vec::new();
        let mut sent = Vec::new();
        for _ in 0..=random.below(20) {
            let most = [4, 300, 200_000][random.below(3)];
            let body = vec![random.below(256) as u8; random.below(most)];
            wire.extend_from_slice(&framed(&body));
            // Empty frames carry nothing and are swallowed.
            sent.extend((!body.is_empty()).then_some(body));
        }
        let mut buffer = FrameBuffer::new();
        let mut got = Vec::new();
        let mut rest = &wire[..];
        while !rest.is_empty() {
            let room = buffer.room();
            let spare = room.capacity() - room.len();
            assert!(spare > 0);
            let n = (1 + random.below(100_000)).min(spare).min(rest.len());
            room.extend_from_slice(&rest[..n]);
            rest = &rest[n..];
            while let Some(frame) = buffer.next().unwrap() {
                got.push(frame);
            }
        }
        assert!(got == sent);
        assert!(buffer.buf.is_empty());
    }
}

#[test]
fn a_declared_length_alone_allocates_nothing() {
    let mut buffer = FrameBuffer::new();
    let whole = MAX_FRAME_BYTES + 4;
    buffer.room().extend_from_slice(&(MAX_FRAME_BYTES as u32).to_le_bytes());
    let mut arrived = 4;
    loop {
        assert!(buffer.next().unwrap().is_none());
        let room = buffer.room();
        assert!(room.capacity() <= (2 * arrived).clamp(CHUNK_BYTES, whole), "{} at {arrived}", room.capacity());
        let n = (room.capacity() - room.len()).min(whole - arrived);
        room.resize(room.len() + n, 1);
        arrived += n;
        if arrived == whole {
            break;
        }
    }
    assert_eq!(buffer.next().unwrap().map(|f| f.len()), Some(MAX_FRAME_BYTES));
}

#[test]
fn a_queue_wakes_its_writer_once() {
    let queue = Queue::new(1000, 10);
    let wakes = || queue.lock().unflushed == 0;
    assert!(wakes());
    queue.push(Bytes::from_static(b"a")).unwrap();
    queue.push(Bytes::from_static(b"b")).unwrap();
    assert!(!wakes());
    queue.flush();
    assert!(wakes());
    let mut out = Vec::new();
    assert_eq!(queue.take(&mut out), Taken::Frames);
    // What is being written still counts.
    let held = |q: &QueueInner| (q.count, q.bytes);
    assert_eq!(held(&queue.lock()), (2, 2));
    for _ in 0..8 {
        queue.push(Bytes::from_static(b"c")).unwrap();
    }
    assert_eq!(queue.push(Bytes::from_static(b"d")), Err(SendError::Full));
    queue.written(2, 2);
    queue.push(Bytes::from(vec![0; 900])).unwrap();
    assert_eq!(queue.push(Bytes::from(vec![0; 100])), Err(SendError::Full));
    assert_eq!(queue.close(), 9);
    assert_eq!(queue.push(Bytes::from_static(b"e")), Err(SendError::Down));
    out.clear();
    assert_eq!(queue.take(&mut out), Taken::End);
}
