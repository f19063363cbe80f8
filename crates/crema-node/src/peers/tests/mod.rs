//! Nodes, dialers and acceptors for the tests, which are beside this file by theme.

mod auth;
mod boots;
mod claims;
mod flow;
mod handshake;
mod links;

use super::claims::{Claim, ConnNumber, LIFE_MEMORY, MAX_LIVES};
use super::dialer::jittered;
use super::link::{Queue, QueueInner, Taken};
use super::reader::{CHUNK_BYTES, CREDIT_BYTES, FrameBuffer, LARGE_FRAME_BYTES, SNAPSHOT_CREDIT_BYTES};
use super::wire::{Answer, Hello, MAGIC, MAX_HANDSHAKE_BYTES, MAX_REASON_BYTES, PREAMBLE_BYTES, Reject, VERSION, cut};
use super::wire::{decode_handshake, handshake_bytes, read_handshake};
use super::writer::{COPY_BELOW_BYTES, StreamEnd, write_frames};
use super::*;
use crate::clock;
use crema_core::MonoTime;
use crema_shard::message::MAX_FRAME_BYTES;
use crossbeam::channel::Receiver;
use std::collections::VecDeque;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Nothing here waits this long unless it is broken.
const PATIENCE: Duration = Duration::from_secs(20);

fn options() -> PeerOptions {
    PeerOptions {
        handshake_timeout: Duration::from_millis(1000),
        backoff_min: Duration::from_millis(5),
        backoff_max: Duration::from_millis(20),
        flush_timeout: Duration::from_secs(5),
        ..PeerOptions::default()
    }
}

fn config(node: u64, life: u128, options: PeerOptions) -> PeersConfig {
    PeersConfig {
        cluster: "test".to_owned(),
        node: NodeId(node),
        incarnation: Incarnation(life),
        boot: 0,
        addr: "127.0.0.1:1".to_owned(),
        keys: None,
        options,
    }
}

fn listener() -> std::net::TcpListener {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap()
}

/// A node whose driver does nothing but pass its events on.
struct Node {
    peers: PeersHandle,
    events: mpsc::UnboundedReceiver<PeerEvent>,
}

impl Node {
    fn start(config: PeersConfig) -> Node {
        let (sender, inputs) = crossbeam::channel::bounded(64);
        let peers = Peers::start(config, listener(), sender).unwrap();
        Node { peers, events: drain(inputs) }
    }

    fn new(node: u64, life: u128) -> Node {
        Node::start(config(node, life, options()))
    }

    fn addr(&self) -> String {
        self.peers.local_addr().to_string()
    }

    fn dial(&self, node: u64, to: &Node) {
        self.peers.set_reach(NodeId(node), Reach::at(to.addr()));
    }

    async fn next(&mut self) -> PeerEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("an event in time").expect("the node runs")
    }

    async fn up(&mut self) -> (NodeId, Incarnation, PeerLink) {
        match self.next().await {
            PeerEvent::Up { peer, incarnation, link } => (peer, incarnation, link),
            other => panic!("up expected, not {other:?}"),
        }
    }

    async fn down(&mut self) -> NodeId {
        match self.next().await {
            PeerEvent::Down { peer } => peer,
            other => panic!("down expected, not {other:?}"),
        }
    }

    async fn frame(&mut self) -> (NodeId, Incarnation, Channel, Bytes) {
        match self.next().await {
            PeerEvent::Frame { peer, incarnation, channel, frame } => (peer, incarnation, channel, frame),
            other => panic!("a frame expected, not {other:?}"),
        }
    }
}

fn drain(inputs: Receiver<Input>) -> mpsc::UnboundedReceiver<PeerEvent> {
    let (sender, events) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        while let Ok(Input::Peers(batch)) = inputs.recv() {
            for event in batch.events {
                if sender.send(event).is_err() {
                    return;
                }
            }
        }
    });
    events
}

/// Asks again and again until it holds; the events behind the counters have no other voice.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let all = async {
        while !holds() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, all).await.unwrap_or_else(|_| panic!("never: {what}"));
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Of a process whose every start is a new life.
fn number(counter: u64) -> ConnNumber {
    ConnNumber { boot: 0, counter }
}

fn hello(counter: u64) -> Hello<'static> {
    let number = number(counter);
    Hello {
        cluster: "test",
        from: NodeId(9),
        incarnation: Incarnation(90),
        to: NodeId(1),
        channel: 0,
        number,
        addr: "127.0.0.1:1",
    }
}

/// A dialer by hand: says `hello`, returns the connection and the answer.
async fn greet(node: &Node, hello: &Hello<'_>) -> (TcpStream, Result<Incarnation, u8>) {
    let mut stream = TcpStream::connect(node.peers.local_addr()).await.unwrap();
    stream.write_all(&handshake_bytes(hello)).await.unwrap();
    let body = timeout(PATIENCE, read_handshake(&mut stream)).await.unwrap().unwrap();
    let answer = match decode_handshake(&body).unwrap() {
        Answer::Welcome { incarnation, .. } => Ok(incarnation),
        Answer::Reject { code, .. } => Err(code),
    };
    (stream, answer)
}

/// Reads until the other side closes; a reset is a close, too.
async fn until_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("closed in time");
}

fn framed(body: &[u8]) -> Vec<u8> {
    let mut out = (body.len() as u32).to_le_bytes().to_vec();
    out.extend_from_slice(body);
    out
}

/// xorshift64*: enough to vary sizes, and a printed seed replays it.
struct Random(u64);

impl Random {
    fn seeded(name: &str) -> Random {
        let seed = getrandom::u64().unwrap() | 1;
        println_seed(name, seed);
        Random(seed)
    }
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}

/// What no compression makes shorter.
fn noise(len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    getrandom::fill(&mut bytes).unwrap();
    bytes.into()
}

#[allow(clippy::print_stdout)] // the seed of a failing run must be seen
fn println_seed(name: &str, seed: u64) {
    println!("{name}: seed {seed}");
}

/// An acceptor by hand: answers each Hello by `answer` (node, life, boot) and returns the connections.
fn fake_acceptor(
    answer: impl Fn(u64) -> (u64, u128, u64) + std::marker::Send + 'static,
) -> (String, mpsc::Receiver<TcpStream>) {
    let listener = listener();
    listener.set_nonblocking(true).unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let (sender, accepted) = mpsc::channel(16);
    tokio::spawn(async move {
        let listener = TcpListener::from_std(listener).unwrap();
        let mut n = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            if read_handshake(&mut stream).await.is_err() {
                continue;
            }
            let (node, life, boot) = answer(n);
            n += 1;
            let welcome = Answer::Welcome { node: NodeId(node), incarnation: Incarnation(life), boot };
            let _ = stream.write_all(&handshake_bytes(&welcome)).await;
            if sender.send(stream).await.is_err() {
                return;
            }
        }
    });
    (addr, accepted)
}
