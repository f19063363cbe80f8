//! Frames: order, bounds, back-pressure.

use super::super::pace::Pace;
use super::*;
use tokio::io::DuplexStream;
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_arrive_in_order_on_all_channels() {
    let mut random = Random::seeded("frames_arrive_in_order_on_all_channels");
    let (mut one, mut two) = (Node::new(1, 11), Node::new(2, 22));
    one.dial(2, &two);
    let (peer, life, link) = one.up().await;
    assert_eq!((peer, life), (NodeId(2), Incarnation(22)));
    assert_eq!((link.peer(), link.incarnation()), (peer, life));
    let mut expected: [VecDeque<Bytes>; Channel::ALL.len()] = Default::default();
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
        let channel = Channel::ALL[random.below(3)];
        link.send(channel, frame.clone()).unwrap();
        expected[channel as usize].push_back(frame);
        left += 1;
        if random.below(10) == 0 {
            link.flush(channel);
        }
    }
    Channel::ALL.into_iter().for_each(|channel| link.flush(channel));
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
    let of_snapshots = &one.peers.stats().snapshot_bytes_out;
    assert!(count(&one.peers.stats().snapshot_wire_bytes_out) < count(of_snapshots) / 4, "they are compressed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_says_so_and_loses_nothing_it_took() {
    let small = PeerOptions { requests_queue_bytes: 300_000, queue_frames: 1000, ..options() };
    let mut one = Node::start(config(1, 11, small));
    // A driver that takes nothing for now, behind the shortest queue.
    let (sender, inputs) = crossbeam::channel::bounded(1);
    let two = Peers::start(config(2, 22, options()), listener(), sender).unwrap();
    one.peers.set_reach(NodeId(2), Reach::at(two.local_addr().to_string()));
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
    one.peers.set_reach(NodeId(1), Reach::at(node.local_addr().to_string()));
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
        let mut buffer = FrameBuffer::new(MAX_FRAME_BYTES);
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
    let mut buffer = FrameBuffer::new(MAX_FRAME_BYTES);
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
    assert_eq!(queue.take(&mut out, usize::MAX), Taken::Frames);
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
    assert_eq!(queue.take(&mut out, usize::MAX), Taken::End);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_waits_for_its_driver_and_nothing_waits_for_the_snapshot() {
    let (sender, inputs) = crossbeam::channel::bounded(1024);
    let two = Peers::start(config(2, 22, options()), listener(), sender).unwrap();
    let unlimited = PeerOptions { snapshot_bytes_per_second: 0, ..options() };
    let mut one = Node::start(config(1, 11, unlimited));
    one.peers.set_reach(NodeId(2), Reach::at(two.local_addr().to_string()));
    let (_, _, link) = one.up().await;
    // Until everything up to the driver, which keeps what it gets, is full.
    let chunk = noise(300_000);
    let (mut taken, mut refused) = (0_u32, 0);
    let mut kept = Vec::new();
    let all = async {
        while refused < 50 {
            let frame = [&taken.to_le_bytes()[..], &chunk].concat();
            match link.send(Channel::Snapshot, frame.into()) {
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
            link.flush(Channel::Snapshot);
            kept.extend(inputs.try_iter());
        }
    };
    timeout(PATIENCE, all).await.expect("the queue fills");
    // 300 kB six times; the seventh would go over the credit.
    assert_eq!(kept.len(), SNAPSHOT_CREDIT_BYTES / 300_004);
    for i in 0..100_u8 {
        for channel in [Channel::Raft, Channel::Requests] {
            link.send(channel, Bytes::copy_from_slice(&[i])).unwrap();
            link.flush(channel);
            let Ok(Input::Peers(batch)) = inputs.recv_timeout(PATIENCE) else { panic!("a batch") };
            let [PeerEvent::Frame { channel: on, frame, .. }] = &batch.events[..] else { panic!("{batch:?}") };
            assert_eq!((*on, &frame[..]), (channel, &[i][..]));
        }
    }
    // Whatever was taken arrives, and in order.
    let mut next = 0_u32;
    let mut batches = kept.into_iter();
    while next < taken {
        let input = batches.next().unwrap_or_else(|| inputs.recv_timeout(PATIENCE).expect("a batch in time"));
        let Input::Peers(batch) = input else { panic!("a batch") };
        for event in &batch.events {
            let PeerEvent::Frame { channel: Channel::Snapshot, frame, .. } = event else { panic!("{event:?}") };
            assert_eq!(frame[..4], next.to_le_bytes());
            assert!(frame[4..] == chunk);
            next += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_unpacks_to_much_counts_as_much() {
    let (sender, inputs) = crossbeam::channel::bounded(1024);
    let node = Peers::start(config(1, 11, options()), listener(), sender).unwrap();
    let mut one = Node::new(2, 22);
    one.peers.set_reach(NodeId(1), Reach::at(node.local_addr().to_string()));
    let (_, _, link) = one.up().await;
    // Four kilobytes each on the wire: all of them are in the reader's first buffer.
    let frames = 10 * SNAPSHOT_CREDIT_BYTES / LARGE_FRAME_BYTES;
    for _ in 0..frames {
        // The queue holds four of them.
        while link.send(Channel::Snapshot, vec![0; LARGE_FRAME_BYTES].into()) == Err(SendError::Full) {
            sleep(Duration::from_millis(1)).await;
        }
        link.flush(Channel::Snapshot);
    }
    let kept = [(); 2].map(|()| inputs.recv_timeout(PATIENCE).unwrap());
    assert!(inputs.recv_timeout(Duration::from_millis(300)).is_err(), "no credit is left");
    drop(kept);
    let mut events = drain(inputs);
    for _ in 2..frames {
        timeout(PATIENCE, events.recv()).await.unwrap().unwrap();
    }
    assert_eq!(count(&node.stats().bytes_in), (frames * LARGE_FRAME_BYTES) as u64);
    assert!(count(&one.peers.stats().snapshot_wire_bytes_out) < 10_000 * frames as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_does_not_unpack_closes_the_stream() {
    let mut node = Node::new(1, 11);
    let lies = [
        // Five bytes that claim to be 16 MiB; more than a frame may have; a flag of the future; nothing.
        [&[1][..], &(MAX_FRAME_BYTES as u32).to_le_bytes(), b"block"].concat(),
        [&[1][..], &(MAX_FRAME_BYTES as u32 + 1).to_le_bytes(), &[0; 100_000]].concat(),
        b"\x02body".to_vec(),
        vec![0],
    ];
    for (i, lie) in lies.iter().enumerate() {
        let snapshot = Hello { channel: 2, ..hello(i as u64 + 1) };
        let (mut stream, answer) = greet(&node, &snapshot).await;
        assert!(answer.is_ok());
        let mut bytes = framed(b"\0fine");
        bytes.extend_from_slice(&framed(lie));
        bytes.extend_from_slice(&framed(b"\0whatever follows"));
        stream.write_all(&bytes).await.unwrap();
        let (_, _, channel, frame) = node.frame().await;
        assert_eq!((channel, &frame[..]), (Channel::Snapshot, &b"fine"[..]));
        until_closed(&mut stream).await;
        eventually("counted", || count(&node.peers.stats().unpackable) == i as u64 + 1).await;
    }
    assert!(node.events.try_recv().is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_snapshot_frame_passes_compressible_or_not() {
    let (mut one, mut two) = (Node::new(1, 11), Node::new(2, 22));
    one.dial(2, &two);
    let (_, _, link) = one.up().await;
    for largest in [noise(MAX_FRAME_BYTES), Bytes::from(vec![5; MAX_FRAME_BYTES])] {
        link.send(Channel::Snapshot, largest.clone()).unwrap();
        link.flush(Channel::Snapshot);
        assert!(two.frame().await.3 == largest);
    }
}

/// Reads plain packed frames and says when each came, in milliseconds since `start`, with the empty ones before it.
async fn arrivals(mut from: DuplexStream, start: Instant) -> Vec<(u128, u32)> {
    let (mut all, mut empty) = (Vec::new(), 0);
    while let Ok(len) = from.read_u32_le().await {
        if len == 0 {
            empty += 1;
            continue;
        }
        let mut body = vec![0; len as usize];
        from.read_exact(&mut body).await.unwrap();
        assert_eq!(body[0], 0, "noise is sent as it is");
        all.push((start.elapsed().as_millis(), std::mem::take(&mut empty)));
    }
    all
}

fn full_queue(frames: usize) -> Queue {
    let queue = Queue::new(usize::MAX, usize::MAX);
    let frame = noise(300_000 - 5);
    (0..frames).for_each(|_| queue.push(frame.clone()).unwrap());
    queue
}

#[tokio::test(start_paused = true)]
async fn snapshots_of_all_peers_share_one_rate() {
    let pace = Pace::new(1_000_000);
    let options = PeerOptions { pulse: Duration::from_millis(70), ..options() };
    let stats = PeerStats::default();
    let start = Instant::now();
    let queues = [full_queue(4), full_queue(4)];
    queues.iter().for_each(Queue::drain);
    let one = |queue| {
        let (mut to, from) = tokio::io::duplex(1000);
        let (pace, stats, options) = (&pace, &stats, &options);
        async move {
            // The end of the stream is what ends the reading side.
            let write = async { write_frames(&mut to, queue, Some(pace), options, stats).await };
            let (end, arrivals) = tokio::join!(write, arrivals(from, start));
            assert!(matches!(end, StreamEnd::Flushed), "{end}");
            arrivals
        }
    };
    let (first, second) = tokio::join!(one(&queues[0]), one(&queues[1]));
    // 0.3 s a frame, in turns; the stream says that it lives every 70 ms of the 600 between.
    assert_eq!(first, [(0, 0), (600, 8), (1200, 8), (1800, 8)]);
    assert_eq!(second, [(300, 4), (900, 8), (1500, 8), (2100, 8)]);
    assert_eq!(count(&stats.snapshot_wire_bytes_out), 8 * 300_000);
    assert_eq!(start.elapsed(), Duration::from_millis(2100));
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_turn_ends_with_the_link() {
    let pace = Pace::new(1_000);
    let stats = PeerStats::default();
    let start = Instant::now();
    let queue = full_queue(3);
    let (mut to, from) = tokio::io::duplex(1000);
    let options = options();
    let close = async {
        sleep(Duration::from_secs(2)).await;
        // More to write wakes the writer, and changes nothing.
        queue.push(noise(100)).unwrap();
        queue.flush();
        sleep(Duration::from_secs(1)).await;
        assert_eq!(queue.close(), 3);
    };
    let write = async { write_frames(&mut to, &queue, Some(&pace), &options, &stats).await };
    let (end, arrivals, ()) = tokio::join!(write, arrivals(from, start), close);
    assert!(matches!(end, StreamEnd::Flushed), "{end}");
    assert_eq!(arrivals, [(0, 0)]);
    assert_eq!(start.elapsed(), Duration::from_secs(3));
    // The next link's first frame waits for what was sent, not for what was not.
    assert_eq!(pace.turn(1).at() - start, Duration::from_secs(300));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_does_not_wait_for_snapshots() {
    let slow = PeerOptions { snapshot_bytes_per_second: 1, flush_timeout: 10 * PATIENCE, ..options() };
    let (mut one, mut two) = (Node::start(config(1, 11, slow)), Node::new(2, 22));
    one.dial(2, &two);
    let (_, _, link) = one.up().await;
    for _ in 0..3 {
        link.send(Channel::Snapshot, noise(300_000)).unwrap();
        link.flush(Channel::Snapshot);
    }
    assert_eq!(two.frame().await.2, Channel::Snapshot);
    link.send(Channel::Requests, Bytes::from_static(b"last")).unwrap();
    timeout(PATIENCE, one.peers.shutdown()).await.expect("no turn is waited for");
    assert_eq!(two.frame().await.3, b"last"[..]);
    assert_eq!(count(&one.peers.stats().drops), 2);
    eventually("closed", || count(&two.peers.stats().incoming) == 0).await;
    assert!(two.events.try_recv().is_err());
}
