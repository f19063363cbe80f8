//! Between chitchat and the network: frames, sealed if there are keys, over UDP and TCP on one port.
//!
//! ```text
//!   chitchat --Socket::send--> Encoder: 127.0.0.1 --bytes--> route --+-- <= 8 parts --> seal, fragment --> UDP
//!                                                                    '-- larger, goodbye --> stream task --> TCP
//!   chitchat <--Socket::recv-- Decoder: 127.0.0.1 <--inspect-- open, reassemble <-------------------- UDP, TCP
//! ```
//!
//! Chitchat 0.13 tells nobody how to write or read its messages, except a socket of its own. So it writes them into one on the
//! loopback device, whose other end is ours, and reads them from another. Root on this machine could watch; it could read our
//! memory as well.
//!
//! No error of a socket ends gossip: it is counted, and said at most every ten seconds. What is foreign is counted by kind,
//! and a warning names who sent it.
//!
//! Peers are addressed as chitchat names them. A frame tells the peer's boot id back to it ([`crate::seal`]); which boot is
//! where is learnt from the datagrams' sources and from greetings, which name the frame that they answer.

use crate::fragment::{
    Body, MAX_DATAGRAM_BYTES, MAX_MESSAGE_BYTES, MAX_STREAM_FRAME_BYTES, Reassembler, part_count, split,
};
use crate::inspect::{Unfit, inspect};
use crate::seal::{BootId, Foreign, KeyRing, Opener, Refusal, Sealer};
use async_trait::async_trait;
use chitchat::transport::{RecvOutcome, SendOutcome, Socket, Transport, UdpSocket as ChitchatUdp};
use chitchat::{ChitchatEnvelope, ChitchatMessage, ProtocolVersion, Serializable};
use crema_core::{MonoTime, NodeId};
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// Messages of more parts than this go by TCP where the peer takes it.
const MAX_UDP_PARTS: usize = 8;
/// Messages that wait to be decoded, and decoded ones that wait for chitchat.
const RAW_QUEUE: usize = 64;
const ENVELOPE_QUEUE: usize = 16;
/// Most time that the loopback device may take for a message.
const PIPE_LIMIT: Duration = Duration::from_secs(1);
/// Most time that the system may take for a datagram.
const SEND_LIMIT: Duration = Duration::from_millis(200);
/// Pause after an error of a socket, so that a lasting one does not occupy a processor.
const ERROR_PAUSE: Duration = Duration::from_millis(20);
/// Connections: most to others, most from others, most from one address.
const MAX_OUT_STREAMS: usize = 256;
const MAX_IN_STREAMS: usize = 256;
const MAX_IN_STREAMS_PER_IP: usize = 64;
/// Messages that wait for one connection.
const STREAM_QUEUE: usize = 4;
const STREAM_CONNECT_LIMIT: Duration = Duration::from_secs(1);
const STREAM_WRITE_LIMIT: Duration = Duration::from_secs(2);
/// A connection without messages is closed by who opened it; the other side waits longer, so that nothing is written into a
/// closed one.
const STREAM_IDLE: Duration = Duration::from_secs(5);
const STREAM_READ_IDLE: Duration = Duration::from_secs(15);
/// The first frame, and the rest of any frame, must come within this time.
const STREAM_FRAME_LIMIT: Duration = Duration::from_secs(5);
/// For how long a peer that took no connection is not asked again.
const STREAM_REFUSED_PAUSE: Duration = Duration::from_secs(30);
/// A peer that used TCP is answered by TCP for this long.
const STREAM_ANSWER_TIME: Duration = Duration::from_secs(1);
/// Most peers whose state is kept. When there are more, it is learnt anew.
const MAX_PEERS: usize = 4_096;
/// Most greetings a second, and most of them to one host. An attacker may repeat what he captured, in the name of any host; he
/// must not make this node send much, and least of all to one that has not asked.
const HELLOS_PER_SECOND: u32 = 256;
const HELLOS_PER_SECOND_AND_IP: u32 = 64;
/// A kind of warning is given once in this time.
const WARN_PERIOD: Duration = Duration::from_secs(10);
/// Greeted peers that wait to be told again.
const GREET_QUEUE: usize = 64;
/// Goodbyes that wait to be noted. One that finds no place is not confirmed and comes again.
const GOODBYE_QUEUE: usize = 256;
/// How often a free port is looked for that is free in both protocols.
const BIND_ATTEMPTS: usize = 16;
/// Chitchat's shortest valid datagram, a refusal, which no peer of the same cluster sends. It marks the end of what is decoded.
const SENTINEL: [u8; 4] = [0x53, 0xB0, 0, 3];
const SENTINEL_KIND: u8 = 3;

/// Sees every datagram before it is sent; false loses it.
pub(crate) type Filter = Arc<dyn Fn(SocketAddr, &[u8]) -> bool + Send + Sync>;

/// A message that arrived: where it is answered, its bytes on the wire, and itself.
type RawMessage = (SocketAddr, usize, Vec<u8>);
type RawMessages = Arc<tokio::sync::Mutex<mpsc::Receiver<RawMessage>>>;

/// What tests may do to the network.
#[derive(Clone, Default)]
pub(crate) struct Hooks {
    /// Between this node and its peers.
    pub(crate) udp: Option<Filter>,
    /// Nobody takes connections.
    pub(crate) no_streams: bool,
    /// A start tells this that it is all but done, and goes no further.
    pub(crate) held: Option<Arc<Notify>>,
    /// Chitchat is given whatever comes.
    pub(crate) credulous: bool,
    /// The only DNS server, instead of the system's.
    pub(crate) dns: Option<SocketAddr>,
    /// How often names are looked up.
    pub(crate) resolve_period: Option<Duration>,
}

/// Traffic since the start, as it was on the wire.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) received_datagrams: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
    pub(crate) sent_datagrams: AtomicU64,
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) received_stream_messages: AtomicU64,
    pub(crate) received_stream_bytes: AtomicU64,
    pub(crate) sent_stream_messages: AtomicU64,
    pub(crate) sent_stream_bytes: AtomicU64,
    pub(crate) socket_errors: AtomicU64,
    pub(crate) dropped_messages: AtomicU64,
    pub(crate) undecodable_messages: AtomicU64,
    pub(crate) unproven: AtomicU64,
    pub(crate) hellos: AtomicU64,
    pub(crate) foreign: [AtomicU64; Foreign::ALL.len()],
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

#[derive(Debug, Default)]
struct PeerState {
    boot: Option<BootId>,
    /// Counters of the first and the last frame of the latest message to it.
    last: Option<(u64, u64)>,
    answer_by_stream_until: Option<Instant>,
    no_stream_until: Option<Instant>,
    prefer_stream: bool,
}

/// Whose parts belong together.
type Source = (SocketAddr, BootId);

struct State {
    ring: Option<KeyRing>,
    sealer: Sealer,
    opener: Opener,
    reassembler: Reassembler<Source>,
    peers: HashMap<SocketAddr, PeerState>,
    next_message: u32,
    warned: HashMap<&'static str, (Instant, u64)>,
    greetings: Greetings,
}

/// The greetings of one second.
#[derive(Debug, Default)]
struct Greetings {
    second: u64,
    all: u32,
    /// No more hosts than greetings.
    by_ip: HashMap<IpAddr, u32>,
}

impl Greetings {
    fn may_greet(&mut self, now_s: u64, ip: IpAddr) -> bool {
        if self.second != now_s {
            (self.second, self.all) = (now_s, 0);
            self.by_ip.clear();
        }
        if self.all >= HELLOS_PER_SECOND {
            return false;
        }
        let of_ip = self.by_ip.entry(ip).or_default();
        if *of_ip >= HELLOS_PER_SECOND_AND_IP {
            return false;
        }
        *of_ip += 1;
        self.all += 1;
        true
    }
}

impl State {
    fn peer(&mut self, addr: SocketAddr) -> &mut PeerState {
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&addr) {
            self.peers.clear();
        }
        self.peers.entry(addr).or_default()
    }

    /// Whether to warn of this now; if so, how often it was not said since the last time.
    fn may_warn(&mut self, what: &'static str) -> Option<u64> {
        let now = Instant::now();
        match self.warned.get_mut(what) {
            Some((last, unsaid)) if now.duration_since(*last) < WARN_PERIOD => {
                *unsaid += 1;
                None
            }
            said => {
                let unsaid = said.map_or(0, |(_, unsaid)| *unsaid);
                self.warned.insert(what, (now, 0));
                Some(unsaid)
            }
        }
    }
}

/// Which peers are known to know everything, as far as a leaving node cares.
#[derive(Debug, Default)]
enum Evidence {
    #[default]
    Off,
    /// The goodbye is said, but what chitchat had in hand may be older.
    Armed,
    Collecting {
        /// Peers that lack nothing.
        confirmed: HashSet<SocketAddr>,
        /// Peers that were just sent what they lacked.
        told: HashSet<SocketAddr>,
    },
}

/// What this node says when it leaves, and the peers that have sent a receipt for it.
#[derive(Debug, Default)]
struct Leaving {
    goodbye: Option<(NodeId, u64)>,
    heard: HashSet<SocketAddr>,
}

/// The network of one run of gossip.
pub(crate) struct Wire {
    bound: SocketAddr,
    advertise: SocketAddr,
    keyed: bool,
    state: Mutex<State>,
    pub(crate) traffic: Traffic,
    started: Instant,
    udp: Mutex<Option<Arc<UdpSocket>>>,
    streams: Mutex<HashMap<SocketAddr, mpsc::Sender<Vec<u8>>>>,
    inbound: Mutex<HashMap<IpAddr, usize>>,
    raw: mpsc::Sender<RawMessage>,
    greet: mpsc::Sender<SocketAddr>,
    goodbyes: mpsc::Sender<(NodeId, u64)>,
    leaving: Mutex<Leaving>,
    evidence: Mutex<Evidence>,
    answered: Notify,
    stop: watch::Sender<bool>,
    closed: AtomicBool,
    broken: AtomicBool,
    /// Every task holds a clone; when the last is gone, so are the sockets.
    alive: Mutex<Option<mpsc::Sender<()>>>,
    all_gone: tokio::sync::Mutex<mpsc::Receiver<()>>,
    hooks: Hooks,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic while held")
}

/// Sockets that are bound and not used yet.
pub(crate) struct Bound {
    udp: UdpSocket,
    tcp: TcpListener,
    pub(crate) addr: SocketAddr,
}

impl Bound {
    /// Binds both protocols to one port.
    pub(crate) async fn bind(addr: SocketAddr) -> io::Result<Bound> {
        let mut attempts = BIND_ATTEMPTS;
        loop {
            let udp = UdpSocket::bind(addr).await?;
            let bound = udp.local_addr()?;
            match TcpListener::bind(bound).await {
                Ok(tcp) => return Ok(Bound { udp, tcp, addr: bound }),
                // Somebody else has this number for TCP. With port 0 any other will do.
                Err(error) if addr.port() != 0 || attempts == 0 => return Err(error),
                Err(_) => attempts -= 1,
            }
        }
    }
}

/// Hands one socket to chitchat, once.
pub(crate) struct OpenedTransport {
    socket: Mutex<Option<Box<dyn Socket>>>,
}

#[async_trait]
impl Transport for OpenedTransport {
    async fn open(&self, _listen_addr: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        let socket = lock(&self.socket).take();
        socket.ok_or_else(|| anyhow::anyhow!("the gossip socket was handed out before"))
    }
}

/// What [`Wire::start`] gives.
pub(crate) struct Started {
    pub(crate) wire: Arc<Wire>,
    pub(crate) transport: OpenedTransport,
    /// Peers that ask to be told again, now that they are known.
    pub(crate) greeted: mpsc::Receiver<SocketAddr>,
    /// Nodes that said goodbye, and in which generation.
    pub(crate) heard_goodbyes: mpsc::Receiver<(NodeId, u64)>,
}

impl Wire {
    /// Starts the tasks. `advertise` is where others reach this node.
    pub(crate) async fn start(
        bound: Bound,
        advertise: SocketAddr,
        cluster: &str,
        ring: Option<KeyRing>,
        hooks: Hooks,
    ) -> anyhow::Result<Started> {
        let mut boot = BootId([0; 16]);
        getrandom::fill(&mut boot.0).map_err(|error| anyhow::anyhow!("no randomness from the system: {error}"))?;
        let (raw, raw_messages) = mpsc::channel(RAW_QUEUE);
        let (greet, greeted) = mpsc::channel(GREET_QUEUE);
        let (goodbyes, heard_goodbyes) = mpsc::channel(GOODBYE_QUEUE);
        let (alive, all_gone) = mpsc::channel(1);
        let udp = Arc::new(bound.udp);
        let wire = Arc::new(Wire {
            bound: bound.addr,
            advertise,
            keyed: ring.is_some(),
            state: Mutex::new(State {
                ring,
                sealer: Sealer::new(cluster, boot),
                opener: Opener::new(cluster, boot),
                reassembler: Reassembler::default(),
                peers: HashMap::new(),
                next_message: 0,
                warned: HashMap::new(),
                greetings: Greetings::default(),
            }),
            traffic: Traffic::default(),
            started: Instant::now(),
            udp: Mutex::new(Some(udp.clone())),
            streams: Mutex::default(),
            inbound: Mutex::default(),
            raw,
            greet,
            goodbyes,
            leaving: Mutex::default(),
            evidence: Mutex::default(),
            answered: Notify::new(),
            stop: watch::channel(false).0,
            closed: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            alive: Mutex::new(Some(alive.clone())),
            all_gone: tokio::sync::Mutex::new(all_gone),
            hooks,
        });
        let encoder = Encoder::open().await?;
        let (envelopes, decoded) = mpsc::channel(ENVELOPE_QUEUE);
        let raw_messages = Arc::new(tokio::sync::Mutex::new(raw_messages));
        wire.spawn_essential(wire.clone().decode(raw_messages, envelopes));
        wire.spawn_essential(wire.clone().receive_datagrams(udp));
        if !wire.hooks.no_streams {
            wire.spawn_essential(wire.clone().accept_streams(bound.tcp));
        }
        let socket = WireSocket { wire: wire.clone(), encoder, decoded, _alive: alive };
        let transport = OpenedTransport { socket: Mutex::new(Some(Box::new(socket))) };
        Ok(Started { wire, transport, greeted, heard_goodbyes })
    }

    /// A snapshot of the keys; `None` if there never were any.
    pub(crate) fn ring(&self) -> Option<KeyRing> {
        lock(&self.state).ring.clone()
    }

    /// Replaces the keys; false if there are none to replace.
    pub(crate) fn set_ring(&self, ring: KeyRing) -> bool {
        lock(&self.state).ring.as_mut().map(|present| *present = ring).is_some()
    }

    /// Whether small messages to this peer go by TCP too, if it takes it.
    pub(crate) fn prefer_stream(&self, peer: SocketAddr, prefer: bool) {
        lock(&self.state).peer(peer).prefer_stream = prefer;
    }

    /// Begins to collect which peers know of the end of this generation. Call it with chitchat locked, when the goodbye is set.
    pub(crate) fn arm_evidence(&self, node: NodeId, generation: u64) {
        *lock(&self.leaving) = Leaving { goodbye: Some((node, generation)), heard: HashSet::new() };
        *lock(&self.evidence) = Evidence::Armed;
    }

    /// Tells a peer directly, in one datagram, that this node leaves.
    pub(crate) async fn tell_goodbye(&self, to: SocketAddr, node: NodeId, generation: u64) {
        self.send_body(to, &Body::Goodbye { node: node.0, generation }).await;
    }

    /// The peers in question that are not known to know everything.
    pub(crate) fn unconfirmed(&self, peers: &HashSet<SocketAddr>) -> HashSet<SocketAddr> {
        let silent = peers - &lock(&self.leaving).heard;
        match &*lock(&self.evidence) {
            Evidence::Collecting { confirmed, .. } => &silent - confirmed,
            Evidence::Off | Evidence::Armed => silent,
        }
    }

    /// Waits until a peer is confirmed or was told.
    pub(crate) async fn answer(&self) {
        self.answered.notified().await;
    }

    /// Peers that were sent what they lacked since the last call: greeted again, they will confirm it.
    pub(crate) fn take_told(&self) -> HashSet<SocketAddr> {
        match &mut *lock(&self.evidence) {
            Evidence::Collecting { told, .. } => std::mem::take(told),
            Evidence::Off | Evidence::Armed => HashSet::new(),
        }
    }

    /// Ends all tasks; returns at once.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.stop.send_replace(true);
        lock(&self.udp).take();
        lock(&self.alive).take();
        lock(&self.streams).clear();
    }

    /// Waits until the sockets are closed; call [`Wire::close`] first, and end chitchat.
    pub(crate) async fn closed(&self) {
        while self.all_gone.lock().await.recv().await.is_some() {}
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let Some(alive) = lock(&self.alive).clone() else { return };
        let mut stop = self.stop.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = until_stopped(&mut stop) => {}
                () = work => {}
            }
            // The work, with its sockets, is dropped by now.
            drop(alive);
        });
    }

    /// A task without which gossip is deaf or dumb: if it ends by itself, which only a panic can cause, gossip ends visibly.
    fn spawn_essential(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        struct Guard(Arc<Wire>);
        impl Drop for Guard {
            fn drop(&mut self) {
                if !self.0.closed.load(Ordering::Relaxed) {
                    self.0.broken.store(true, Ordering::Relaxed);
                    self.0.close();
                }
            }
        }
        let guard = Guard(self.clone());
        self.spawn(async move {
            let _guard = guard;
            work.await;
        });
    }

    fn now_s(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
    }

    fn mono(&self) -> MonoTime {
        MonoTime(self.started.elapsed().as_nanos() as u64)
    }

    fn socket_error(&self, what: &'static str, peer: SocketAddr, error: &io::Error) {
        add(&self.traffic.socket_errors, 1);
        if let Some(unsaid) = lock(&self.state).may_warn(what) {
            tracing::warn!(%peer, %error, unsaid, "gossip: {what}");
        }
    }

    fn note_foreign(&self, kind: Foreign, peer: SocketAddr) {
        add(&self.traffic.foreign[kind as usize], 1);
        if let Some(unsaid) = lock(&self.state).may_warn(kind.reason()) {
            tracing::warn!(%peer, unsaid, "gossip ignores what it received: {}", kind.reason());
        }
    }

    // ---- sending

    /// Sends a message by the way that fits it. Never waits for a peer.
    async fn route(self: &Arc<Self>, to: SocketAddr, message: Vec<u8>) {
        let parts = part_count(message.len());
        let by_stream = {
            let now = Instant::now();
            let mut state = lock(&self.state);
            let peer = state.peer(to);
            let refused = peer.no_stream_until.is_some_and(|until| now < until);
            // Frames of an unknown boot would be refused; a datagram finds that out at less cost.
            let possible = !refused && (!self.keyed || peer.boot.is_some());
            let answer = peer.answer_by_stream_until.is_some_and(|until| now < until);
            possible && (parts > MAX_UDP_PARTS || answer || peer.prefer_stream)
        };
        let by_datagram = if by_stream { self.enqueue_stream(to, message).err() } else { Some(message) };
        if let Some(message) = by_datagram {
            self.send_datagrams(to, &message).await;
        }
    }

    async fn send_datagrams(&self, to: SocketAddr, message: &[u8]) {
        let frames: Vec<Vec<u8>> = {
            let now_s = self.now_s();
            let state = &mut *lock(&self.state);
            let id = state.next_message;
            state.next_message = id.wrapping_add(1);
            let boot = state.peer(to).boot;
            let first = state.sealer.next_counter();
            let frames = split(id, message)
                .map(|part| state.sealer.seal(state.ring.as_ref(), now_s, boot, &Body::Part(part).encode()))
                .collect();
            let last = state.sealer.next_counter().saturating_sub(1);
            state.peer(to).last = Some((first, last));
            frames
        };
        for frame in frames {
            self.send_datagram(to, &frame).await;
        }
    }

    async fn send_datagram(&self, to: SocketAddr, frame: &[u8]) {
        debug_assert!(frame.len() <= MAX_DATAGRAM_BYTES);
        let Some(udp) = lock(&self.udp).clone() else { return };
        if self.hooks.udp.as_ref().is_some_and(|filter| !filter(to, frame)) {
            return;
        }
        match timeout(SEND_LIMIT, udp.send_to(frame, to)).await {
            Ok(Ok(bytes)) => {
                add(&self.traffic.sent_datagrams, 1);
                add(&self.traffic.sent_bytes, bytes);
            }
            Ok(Err(error)) => self.socket_error("a datagram cannot be sent", to, &error),
            Err(_) => self.socket_error("a datagram cannot be sent", to, &io::ErrorKind::TimedOut.into()),
        }
    }

    async fn send_body(&self, to: SocketAddr, body: &Body<'_>) {
        let frame = {
            let now_s = self.now_s();
            let state = &mut *lock(&self.state);
            let boot = state.peer(to).boot;
            let counter = state.sealer.next_counter();
            state.peer(to).last = Some((counter, counter));
            state.sealer.seal(state.ring.as_ref(), now_s, boot, &body.encode())
        };
        self.send_datagram(to, &frame).await;
    }

    async fn greet_back(&self, to: SocketAddr, boot: BootId, counter: u64) {
        let frame = {
            let now_s = self.now_s();
            let state = &mut *lock(&self.state);
            if !state.greetings.may_greet(now_s, to.ip()) {
                return;
            }
            state.sealer.seal(state.ring.as_ref(), now_s, Some(boot), &Body::Hello { counter }.encode())
        };
        add(&self.traffic.hellos, 1);
        self.send_datagram(to, &frame).await;
    }

    /// Gives the message to the task that holds the connection; gives it back if it must go another way.
    fn enqueue_stream(self: &Arc<Self>, to: SocketAddr, message: Vec<u8>) -> Result<(), Vec<u8>> {
        let mut streams = lock(&self.streams);
        let queue = match streams.get(&to) {
            Some(queue) if !queue.is_closed() => queue,
            known => {
                if known.is_none() && streams.len() >= MAX_OUT_STREAMS {
                    return Err(message);
                }
                let (queue, messages) = mpsc::channel(STREAM_QUEUE);
                self.spawn(self.clone().write_stream(to, messages));
                streams.insert(to, queue);
                &streams[&to]
            }
        };
        queue.try_send(message).map_err(|error| error.into_inner())
    }

    async fn write_stream(self: Arc<Self>, to: SocketAddr, mut messages: mpsc::Receiver<Vec<u8>>) {
        let mut stream = None;
        loop {
            let message = match timeout(STREAM_IDLE, messages.recv()).await {
                Ok(Some(message)) => message,
                Ok(None) => return,
                Err(_) => {
                    // Under the lock nothing can be added between the last look and the end.
                    let mut streams = lock(&self.streams);
                    match messages.try_recv() {
                        Ok(message) => message,
                        Err(_) => {
                            streams.remove(&to);
                            return;
                        }
                    }
                }
            };
            match self.write_message(&mut stream, to, &message).await {
                Ok(bytes) => {
                    add(&self.traffic.sent_stream_messages, 1);
                    add(&self.traffic.sent_stream_bytes, bytes);
                }
                Err(error) => {
                    stream = None;
                    tracing::debug!(peer = %to, %error, "gossip: no connection; datagrams instead");
                    lock(&self.state).peer(to).no_stream_until = Some(Instant::now() + STREAM_REFUSED_PAUSE);
                    self.send_datagrams(to, &message).await;
                }
            }
        }
    }

    async fn write_message(&self, open: &mut Option<TcpStream>, to: SocketAddr, message: &[u8]) -> io::Result<usize> {
        // Nothing is ever sent back: whatever can be read is the end of the connection.
        if open.as_ref().is_some_and(|stream| !is_quiet(stream)) {
            *open = None;
        }
        let stream = match open {
            Some(stream) => stream,
            None => {
                let stream = timeout(STREAM_CONNECT_LIMIT, TcpStream::connect(to)).await??;
                stream.set_nodelay(true)?;
                open.insert(stream)
            }
        };
        let mut frame = {
            let now_s = self.now_s();
            let state = &mut *lock(&self.state);
            let boot = state.peer(to).boot;
            let counter = state.sealer.next_counter();
            state.peer(to).last = Some((counter, counter));
            let body = Body::Whole { from: self.advertise, message }.encode();
            state.sealer.seal(state.ring.as_ref(), now_s, boot, &body)
        };
        let length = (frame.len() as u32).to_be_bytes();
        frame.splice(..0, length);
        timeout(STREAM_WRITE_LIMIT, stream.write_all(&frame)).await??;
        Ok(frame.len())
    }

    // ---- receiving

    async fn receive_datagrams(self: Arc<Self>, udp: Arc<UdpSocket>) {
        // One byte more than any datagram of ours, to tell longer ones.
        let mut buffer = [0; MAX_DATAGRAM_BYTES + 1];
        let mut failed = false;
        loop {
            match udp.recv_from(&mut buffer).await {
                Ok((len, from)) => {
                    failed = false;
                    let Some((from, message)) = self.take_datagram(from, &buffer[..len]).await else { continue };
                    if self.raw.try_send((from, len, message)).is_err() {
                        // More than this node can decode. Gossip is told again.
                        add(&self.traffic.dropped_messages, 1);
                    }
                }
                Err(error) => {
                    // For instance the answer of a host where nobody listens any more, which is over at once.
                    self.socket_error("a datagram cannot be received", self.bound, &error);
                    if std::mem::replace(&mut failed, true) {
                        sleep(ERROR_PAUSE).await;
                    }
                }
            }
        }
    }

    async fn take_datagram(&self, from: SocketAddr, frame: &[u8]) -> Option<(SocketAddr, Vec<u8>)> {
        let now_s = self.now_s();
        let (mut receipt, mut again) = (None, None);
        let refusal = 'refused: {
            let state = &mut *lock(&self.state);
            let opened = match state.opener.open(state.ring.as_ref(), now_s, frame) {
                Ok(_) if frame.len() > MAX_DATAGRAM_BYTES => break 'refused Some(Foreign::Malformed.into()),
                Ok(opened) => opened,
                Err(refusal) => break 'refused Some(refusal),
            };
            add(&self.traffic.received_datagrams, 1);
            add(&self.traffic.received_bytes, frame.len());
            // Without keys anybody could say anything about boots, and nobody asks.
            if self.keyed {
                state.peer(from).boot = Some(opened.boot);
            }
            match Body::parse(&opened.body) {
                Some(Body::Part(part)) => {
                    let whole = state.reassembler.take(self.mono(), (from, opened.boot), part);
                    return whole.map(|message| (from, message));
                }
                Some(Body::Hello { counter }) if self.keyed => {
                    // A peer may be reached at another address than it sends from; the answered frame tells which.
                    let asked =
                        |peer: &PeerState| peer.last.is_some_and(|(first, last)| (first..=last).contains(&counter));
                    let addr = state.peers.iter().find(|(_, peer)| asked(peer)).map_or(from, |(addr, _)| *addr);
                    state.peer(addr).boot = Some(opened.boot);
                    // If many ask at once, some are told in the next round.
                    let _ = self.greet.try_send(addr);
                    again = Some(addr);
                    None
                }
                Some(Body::Goodbye { node, generation }) => {
                    let noted = self.goodbyes.try_send((NodeId(node), generation)).is_ok();
                    receipt = noted.then_some(generation);
                    None
                }
                Some(Body::Heard { generation }) => {
                    let mut leaving = lock(&self.leaving);
                    let mine = leaving.goodbye.is_some_and(|(_, said)| said == generation);
                    if mine && leaving.heard.len() < MAX_PEERS {
                        leaving.heard.insert(from);
                        self.answered.notify_one();
                    }
                    None
                }
                _ => Some(Foreign::Malformed.into()),
            }
        };
        if let Some(addr) = again {
            // A goodbye that was not taken is worth more than a greeting, and there is little time.
            let goodbye = lock(&self.leaving).goodbye;
            if let Some((node, generation)) = goodbye {
                self.tell_goodbye(addr, node, generation).await;
            }
        }
        if let Some(generation) = receipt {
            self.send_body(from, &Body::Heard { generation }).await;
        }
        match refusal? {
            Refusal::Foreign(kind) => self.note_foreign(kind, from),
            Refusal::Unproven(opened) => {
                add(&self.traffic.unproven, 1);
                // Greetings are not greeted: two nodes would never stop.
                if !matches!(Body::parse(&opened.body), Some(Body::Hello { .. }) | None) {
                    self.greet_back(from, opened.boot, opened.counter).await;
                }
            }
        }
        None
    }

    async fn accept_streams(self: Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, from)) => {
                    // Beyond the limits it is closed at once.
                    if let Some(place) = Place::take(&self, from.ip()) {
                        let wire = self.clone();
                        self.spawn(async move {
                            let _place = place;
                            wire.read_stream(stream, from).await;
                        });
                    }
                }
                Err(error) => {
                    // Too many open files, or a connection that ended before it was taken.
                    self.socket_error("a connection cannot be accepted", self.bound, &error);
                    sleep(ERROR_PAUSE).await;
                }
            }
        }
    }

    async fn read_stream(&self, mut stream: TcpStream, from: SocketAddr) {
        let mut idle = STREAM_FRAME_LIMIT;
        loop {
            // Who connects only to see whether somebody listens ends here.
            let Ok(Ok(first)) = timeout(idle, stream.read_u8()).await else { return };
            let deadline = Instant::now() + STREAM_FRAME_LIMIT;
            let mut rest = [0; 3];
            let Ok(Ok(_)) = timeout_at(deadline, stream.read_exact(&mut rest)).await else { return };
            let length = u32::from_be_bytes([first, rest[0], rest[1], rest[2]]) as usize;
            if length > MAX_STREAM_FRAME_BYTES {
                return self.note_foreign(Foreign::Garbage, from);
            }
            // Grows with what arrives, not with what is announced.
            let mut frame = Vec::new();
            let mut body = (&mut stream).take(length as u64);
            match timeout_at(deadline, body.read_to_end(&mut frame)).await {
                Ok(Ok(read)) if read == length => {}
                _ => return,
            }
            if !self.take_stream_frame(from, &frame).await {
                return;
            }
            idle = STREAM_READ_IDLE;
        }
    }

    /// Takes a frame; false ends the connection.
    async fn take_stream_frame(&self, peer: SocketAddr, frame: &[u8]) -> bool {
        let now_s = self.now_s();
        let taken = {
            let state = &mut *lock(&self.state);
            state.opener.open(state.ring.as_ref(), now_s, frame)
        };
        let opened = match taken {
            Ok(opened) => opened,
            Err(Refusal::Foreign(kind)) => {
                self.note_foreign(kind, peer);
                return false;
            }
            Err(Refusal::Unproven(opened)) => {
                add(&self.traffic.unproven, 1);
                // Its maker has the key, so that the address in it is the maker's.
                if let Some(Body::Whole { from, .. }) = Body::parse(&opened.body) {
                    self.greet_back(from, opened.boot, opened.counter).await;
                }
                return true;
            }
        };
        let Some(Body::Whole { from, message }) = Body::parse(&opened.body) else {
            self.note_foreign(Foreign::Malformed, peer);
            return false;
        };
        // Without keys the address could be anybody's, who would then be sent what he did not ask for.
        let from = if self.keyed { from } else { SocketAddr::new(peer.ip(), from.port()) };
        add(&self.traffic.received_stream_messages, 1);
        add(&self.traffic.received_stream_bytes, frame.len() + 4);
        {
            let mut state = lock(&self.state);
            let known = state.peer(from);
            known.answer_by_stream_until = Some(Instant::now() + STREAM_ANSWER_TIME);
            if self.keyed {
                known.boot = Some(opened.boot);
            }
        }
        // A full queue makes the peer wait, not this node remember.
        self.raw.send((from, frame.len(), message.to_vec())).await.is_ok()
    }

    /// Decodes what arrives. What makes chitchat's decoder panic, if anything does, is lost alone.
    async fn decode(self: Arc<Self>, messages: RawMessages, envelopes: mpsc::Sender<RecvOutcome>) {
        loop {
            let mut run = tokio::task::JoinSet::new();
            run.spawn(self.clone().decode_all(messages.clone(), envelopes.clone()));
            match run.join_next().await {
                Some(Err(error)) if error.is_panic() => {
                    add(&self.traffic.undecodable_messages, 1);
                    tracing::error!("gossip: a message made the decoder panic");
                }
                Some(Ok(Err(error))) => {
                    self.socket_error("the loopback device does not work", self.bound, &error);
                    sleep(ERROR_PAUSE).await;
                }
                _ => return,
            }
        }
    }

    async fn decode_all(
        self: Arc<Self>,
        messages: RawMessages,
        envelopes: mpsc::Sender<RecvOutcome>,
    ) -> io::Result<()> {
        let mut decoder = Decoder::open().await?;
        let mut messages = messages.lock().await;
        while let Some((from_addr, num_bytes_received, message)) = messages.recv().await {
            if let (Err(Unfit(reason)), false) = (inspect(&message), self.hooks.credulous) {
                add(&self.traffic.undecodable_messages, 1);
                tracing::debug!(peer = %from_addr, reason, "gossip: a message is kept from chitchat");
                self.note_foreign(Foreign::Malformed, from_addr);
                continue;
            }
            match decoder.decode(&message).await? {
                Some(envelope) => {
                    let outcome = RecvOutcome { from_addr, envelope, num_bytes_received };
                    if envelopes.send(outcome).await.is_err() {
                        return Ok(());
                    }
                }
                None => {
                    add(&self.traffic.undecodable_messages, 1);
                    self.note_foreign(Foreign::Malformed, from_addr);
                }
            }
        }
        Ok(())
    }

    fn note_sent(&self, to: SocketAddr, message: &ChitchatMessage) {
        let evidence = &mut *lock(&self.evidence);
        match (message, &mut *evidence) {
            // Chitchat works off one thing after the other: an answer after this greeting is computed after the goodbye.
            (ChitchatMessage::Syn { .. }, Evidence::Armed) => {
                *evidence = Evidence::Collecting { confirmed: HashSet::new(), told: HashSet::new() };
            }
            (ChitchatMessage::Ack { delta }, Evidence::Collecting { confirmed, told }) => {
                // An empty answer to a peer's digest: it lacks nothing that this node knows, the goodbye included.
                if delta.serialized_len() == 1 {
                    confirmed.insert(to)
                } else {
                    told.insert(to)
                };
                self.answered.notify_one();
            }
            _ => {}
        }
    }
}

/// Gives the guard of the value back at once: what is dropped on a stop may close the network, which changes the value.
async fn until_stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn is_quiet(stream: &TcpStream) -> bool {
    matches!(stream.try_read(&mut [0; 1]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// A place among the connections from others.
struct Place {
    wire: Arc<Wire>,
    ip: IpAddr,
}

impl Place {
    fn take(wire: &Arc<Wire>, ip: IpAddr) -> Option<Place> {
        let mut inbound = lock(&wire.inbound);
        let all: usize = inbound.values().sum();
        let of_ip = inbound.entry(ip).or_default();
        if all >= MAX_IN_STREAMS || *of_ip >= MAX_IN_STREAMS_PER_IP {
            if *of_ip == 0 {
                inbound.remove(&ip);
            }
            return None;
        }
        *of_ip += 1;
        drop(inbound);
        Some(Place { wire: wire.clone(), ip })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inbound = lock(&self.wire.inbound);
        if let Some(count) = inbound.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                inbound.remove(&self.ip);
            }
        }
    }
}

struct WireSocket {
    wire: Arc<Wire>,
    encoder: Encoder,
    decoded: mpsc::Receiver<RecvOutcome>,
    _alive: mpsc::Sender<()>,
}

#[async_trait]
impl Socket for WireSocket {
    fn local_addr(&self) -> anyhow::Result<SocketAddr> {
        Ok(self.wire.bound)
    }

    async fn send(&mut self, to: SocketAddr, envelope: ChitchatEnvelope) -> anyhow::Result<SendOutcome> {
        self.wire.note_sent(to, &envelope.message);
        match self.encoder.encode(envelope).await {
            Ok(message) => {
                let num_bytes_sent = message.len();
                self.wire.route(to, message).await;
                Ok(SendOutcome { num_bytes_sent })
            }
            Err(error) => {
                // Lost as a datagram may be; gossip is told again.
                self.wire.socket_error("the loopback device does not work", to, &error);
                self.encoder = Encoder::open().await?;
                Ok(SendOutcome { num_bytes_sent: 0 })
            }
        }
    }

    // Cancel-safe, as chitchat demands: the only await is a channel's, which is.
    async fn recv(&mut self) -> anyhow::Result<RecvOutcome> {
        if let Some(outcome) = self.decoded.recv().await {
            return Ok(outcome);
        }
        if self.wire.broken.load(Ordering::Relaxed) {
            anyhow::bail!("a task of gossip's socket has ended");
        }
        // Closed on purpose: chitchat is told by its own command.
        std::future::pending().await
    }
}

/// A socket of chitchat on the loopback device and ours at its other end.
async fn open_pipe() -> io::Result<(ChitchatUdp, SocketAddr, UdpSocket, SocketAddr)> {
    let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for loopback in ["127.0.0.1:0", "[::1]:0"] {
        let addr = loopback.parse().expect("an address");
        match (ChitchatUdp::open(addr).await, UdpSocket::bind(addr).await) {
            (Ok(theirs), Ok(ours)) => {
                let their_addr = theirs.local_addr().map_err(io::Error::other)?;
                let our_addr = ours.local_addr()?;
                // The system then passes on what comes from chitchat's socket only.
                ours.connect(their_addr).await?;
                return Ok((theirs, their_addr, ours, our_addr));
            }
            (_, Err(failed)) => error = failed,
            (Err(failed), _) => error = io::Error::other(failed),
        }
    }
    Err(error)
}

/// Has chitchat write its messages as bytes.
struct Encoder {
    theirs: ChitchatUdp,
    ours: UdpSocket,
    our_addr: SocketAddr,
    buffer: Box<[u8]>,
}

impl Encoder {
    async fn open() -> io::Result<Encoder> {
        let (theirs, _, ours, our_addr) = open_pipe().await?;
        Ok(Encoder { theirs, ours, our_addr, buffer: vec![0; MAX_MESSAGE_BYTES + 1].into() })
    }

    /// Errors: the loopback device does not work. What was underway may come late: open another.
    async fn encode(&mut self, envelope: ChitchatEnvelope) -> io::Result<Vec<u8>> {
        let sent = timeout(PIPE_LIMIT, self.theirs.send(self.our_addr, envelope)).await?;
        let expected = sent.map_err(io::Error::other)?.num_bytes_sent;
        let len = timeout(PIPE_LIMIT, self.ours.recv(&mut self.buffer)).await??;
        if len != expected {
            return Err(io::Error::other("a message came out of the loopback device with another length"));
        }
        Ok(self.buffer[..len].to_vec())
    }
}

/// Has chitchat read bytes as its messages.
struct Decoder {
    theirs: ChitchatUdp,
    ours: UdpSocket,
    our_addr: SocketAddr,
}

impl Decoder {
    async fn open() -> io::Result<Decoder> {
        let (theirs, _, ours, our_addr) = open_pipe().await?;
        Ok(Decoder { theirs, ours, our_addr })
    }

    /// `None` if it is not a message. Chitchat's socket skips what it cannot read and waits for the next: the sentinel after
    /// each message ends that wait at once, so that nobody can hold up gossip with nonsense.
    ///
    /// Errors: the loopback device does not work. What was underway may come late: open another.
    async fn decode(&mut self, message: &[u8]) -> io::Result<Option<ChitchatEnvelope>> {
        let plausible = message.len() > SENTINEL.len()
            && message.starts_with(&SENTINEL[..2])
            && ProtocolVersion::from_code(message[2]).is_some()
            && message[3] < SENTINEL_KIND;
        if !plausible {
            return Ok(None);
        }
        self.ours.send(message).await?;
        self.ours.send(&SENTINEL).await?;
        let mut found = None;
        loop {
            let outcome = timeout(PIPE_LIMIT, self.theirs.recv()).await?.map_err(io::Error::other)?;
            // Other programs on this machine may send to the socket too.
            if outcome.from_addr != self.our_addr {
                continue;
            }
            if outcome.num_bytes_received == SENTINEL.len() {
                return Ok(found);
            }
            found = Some(outcome.envelope);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_are_bounded_for_each_host_and_in_all() {
        let mut greetings = Greetings::default();
        let ip = |n: u16| IpAddr::from([10, 0, (n >> 8) as u8, n as u8]);
        for second in [5, 6] {
            let to_one = (0..1_000).filter(|_| greetings.may_greet(second, ip(0))).count();
            assert_eq!(to_one, HELLOS_PER_SECOND_AND_IP as usize);
            assert!(greetings.may_greet(second, ip(1)), "others are greeted all the same");
            let more = (2..10_000).filter(|n| greetings.may_greet(second, ip(*n))).count();
            assert_eq!(more, HELLOS_PER_SECOND as usize - to_one - 1);
            assert!(greetings.by_ip.len() <= HELLOS_PER_SECOND as usize);
        }
    }
}
