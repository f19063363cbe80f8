//! Accepts connections, judges who they are from, and has those that may be read.
//!
//! ```text
//!   accepted --> unproven (few; the oldest goes for the next) --handshake--> proven (its own limit) --> read
//! ```
//!
//! Until its handshake is judged, a connection may be anybody's. So those are counted apart: however many come and say nothing,
//! they never take a peer's place.

use super::auth::{self, Proof, Session, prove};
use super::claims::{Claim, ConnNumber};
use super::reader::{read_frames, send_pulses};
use super::stats::add;
use super::wire::{Answer, HandshakeError, Hello, MAX_REASON_BYTES, Reject, VERSION, channel_from_code, cut};
use super::wire::{decode_handshake, handshake_bytes, read_handshake, within};
use super::writer::StreamEnd;
use super::{MAX_ADDRESS_BYTES, MAX_PEERS, Shared, fenced, is_fenced, stopping};
use crate::newcomers::{Expulsion, Newcomer, Newcomers};
use crema_core::NodeId;
use crema_shard::Channel;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connections that were told to go and are about to close. No more are accepted beyond these.
const MAX_CLOSING: usize = 256;

/// Accepts connections until the shutdown, then ends them all.
pub(super) async fn run_acceptor(shared: Arc<Shared>, listener: TcpListener) {
    let options = shared.options;
    let places = Arc::new(Semaphore::new(options.max_incoming));
    let unproven = Newcomers::new(options.max_unproven, options.max_unproven_of_one);
    let most = options.max_incoming + options.max_unproven + MAX_CLOSING;
    let mut shutdown = shared.shutdown.clone();
    let mut readers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stopping(&mut shutdown) => break,
            Some(_) = readers.join_next() => continue,
            accepted = listener.accept(), if readers.len() < most => accepted,
        };
        let (stream, addr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or the peer went away meanwhile. The pause keeps the first from spinning.
                tracing::debug!(%error, "accept failed");
                sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let newcomer = unproven.admit(addr.ip());
        let (shared, places) = (shared.clone(), places.clone());
        readers.spawn(async move {
            let _counted = Counted::new(shared.clone());
            serve_incoming(shared, stream, addr, newcomer, places).await;
        });
    }
    // Close the port first, so that nobody waits in its backlog for a process that is going away.
    drop(listener);
    readers.shutdown().await;
}

/// Counts a connection while it lives.
struct Counted(Arc<Shared>);

impl Counted {
    pub(super) fn new(shared: Arc<Shared>) -> Counted {
        shared.stats.incoming.fetch_add(1, Ordering::Relaxed);
        Counted(shared)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.stats.incoming.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Names a peer among those who call, while its connection lasts.
struct Caller {
    shared: Arc<Shared>,
    peer: NodeId,
    addr: Arc<str>,
}

impl Caller {
    fn new(shared: Arc<Shared>, peer: NodeId, addr: &str) -> Caller {
        let addr: Arc<str> = addr.into();
        shared.callers.send_if_modified(|callers| {
            let room = callers.len() < MAX_PEERS || callers.contains_key(&peer);
            room && callers.insert(peer, addr.clone()).as_ref() != Some(&addr)
        });
        Caller { shared, peer, addr }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.shared.callers.send_if_modified(|callers| {
            // Another life of the node may call meanwhile.
            let own = callers.get(&self.peer).is_some_and(|addr| Arc::ptr_eq(addr, &self.addr));
            own && callers.remove(&self.peer).is_some()
        });
    }
}

/// What a handshake has led to.
struct Greeted {
    session: Option<Session>,
    claim: Claim,
    channel: Channel,
    /// Where the peer is reached, by its own word.
    addr: String,
    /// Among those who have shown who they are.
    place: OwnedSemaphorePermit,
}

/// An incoming connection from its handshake to its end.
async fn serve_incoming(
    shared: Arc<Shared>,
    mut stream: TcpStream,
    addr: SocketAddr,
    (newcomer, expulsion): (Newcomer, Expulsion),
    places: Arc<Semaphore>,
) {
    let greeted = tokio::select! {
        // In this order: one that has just said what was missing need not go.
        biased;
        greeted = greet(&shared, &mut stream, addr, &places) => greeted,
        () = expulsion.told() => {
            add(&shared.stats.over_limit, 1);
            if let Some(left_out) = shared.accept_log.allow() {
                tracing::warn!(%addr, left_out, "many connect who do not show that they are peers: the oldest are closed");
            }
            return;
        }
    };
    drop(newcomer);
    let Some(Greeted { session, mut claim, channel, addr: reached_at, place: _place }) = greeted else { return };
    let mut fences = shared.fences.clone();
    let mut shutdown = shared.shutdown.clone();
    // The reader of a lower number has been told to end, and so have all streams and the link of an earlier process. Only
    // when they are gone, with all that they would still hand to the driver, does the dialer hear Welcome and this
    // connection get read.
    let alone = tokio::select! {
        biased;
        () = stopping(&mut shutdown) => false,
        alone = claim.wait_alone() => alone,
    };
    if !alone {
        return;
    }
    let ((peer, incarnation), number) = (claim.life(), claim.number());
    let limit = shared.options.handshake_timeout;
    let welcome = Answer::Welcome { node: shared.node, incarnation: shared.incarnation, boot: shared.boot };
    if !matches!(timeout(limit, stream.write_all(&answer_bytes(session.as_ref(), &welcome))).await, Ok(Ok(()))) {
        return;
    }
    // Gone before the claim is, so that an earlier connection never takes out what a later one has told.
    let _caller = (channel == Channel::Raft).then(|| Caller::new(shared.clone(), peer, &reached_at));
    let (mut from, to) = stream.into_split();
    let end = tokio::select! {
        biased;
        () = claim.ended() => None,
        () = fenced(&mut fences, peer, incarnation) => None,
        () = stopping(&mut shutdown) => None,
        () = send_pulses(&to, shared.options.pulse) => None,
        end = read_frames(&shared, &mut from, peer, incarnation, channel) => Some(end),
    };
    match end {
        Some(StreamEnd::Oversize(_)) => add(&shared.stats.oversize, 1),
        Some(StreamEnd::Unpackable) => add(&shared.stats.unpackable, 1),
        _ => {}
    }
    let why = end.map_or_else(|| "ended here".to_owned(), |e| e.to_string());
    tracing::debug!(%peer, %incarnation, ?channel, ?number, why, "incoming stream ended");
}

/// The handshake until it is known who the other side is. What is wrong with it is told to a peer; `None` then.
async fn greet(
    shared: &Arc<Shared>,
    stream: &mut TcpStream,
    addr: SocketAddr,
    places: &Arc<Semaphore>,
) -> Option<Greeted> {
    let limit = shared.options.handshake_timeout;
    let accepted = within(limit, async {
        let keys = shared.keys.load_full();
        let session = match &keys {
            Some(ring) => Some(auth::accept(stream, ring).await?),
            None => None,
        };
        let accepted = accept_hello(shared, stream, session.as_ref(), places).await?;
        Ok((session, accepted))
    });
    match accepted.await {
        Ok((session, Ok((claim, channel, addr, place)))) => Some(Greeted { session, claim, channel, addr, place }),
        Ok((session, Err((reject, text)))) => {
            add(&shared.stats.handshakes_rejected, 1);
            if let Some(left_out) = shared.accept_log.allow() {
                tracing::warn!(%addr, ?reject, text, left_out, "peer connection rejected");
            }
            let answer = Answer::Reject { code: reject as u8, text: cut(&text, MAX_REASON_BYTES) };
            let _ = timeout(limit, stream.write_all(&answer_bytes(session.as_ref(), &answer))).await;
            None
        }
        Err(error) => {
            let counter = match error {
                HandshakeError::TimedOut => &shared.stats.handshakes_timed_out,
                HandshakeError::Keys(_) => &shared.stats.unauthenticated,
                _ => &shared.stats.garbage,
            };
            add(counter, 1);
            if let Some(left_out) = shared.accept_log.allow() {
                tracing::warn!(%addr, %error, left_out, "not a peer connection");
            }
            None
        }
    }
}

/// An answer with its preamble, behind its proof where there is one.
fn answer_bytes(session: Option<&Session>, answer: &Answer<'_>) -> Vec<u8> {
    prove(session, Proof::Answer, handshake_bytes(answer))
}

/// Reads and judges a Hello. The inner error is told to the dialer.
#[allow(clippy::type_complexity)] // one use
async fn accept_hello(
    shared: &Arc<Shared>,
    stream: &mut TcpStream,
    session: Option<&Session>,
    places: &Arc<Semaphore>,
) -> Result<Result<(Claim, Channel, String, OwnedSemaphorePermit), (Reject, String)>, HandshakeError> {
    stream.set_nodelay(true)?;
    let proof = match session {
        Some(_) => Some(auth::read_proof(stream).await?),
        None => None,
    };
    let body = match read_handshake(stream).await {
        Err(HandshakeError::Version(theirs)) => {
            let text = format!("this node speaks version {VERSION} of the peer protocol, not {theirs}");
            return Ok(Err((Reject::Version, text)));
        }
        body => body?,
    };
    if let (Some(session), Some(proof)) = (session, &proof) {
        session.check(Proof::Dialer, &body, proof)?;
    }
    let hello: Hello<'_> = decode_handshake(&body)?;
    let channel = channel_from_code(hello.channel).ok_or(HandshakeError::Garbage("unknown channel"))?;
    if hello.addr.len() > MAX_ADDRESS_BYTES {
        return Err(HandshakeError::Garbage("overlong address"));
    }
    let addr = hello.addr.to_owned();
    let is_fenced = is_fenced(&shared.fences.borrow(), hello.from, hello.incarnation);
    let refusal = if hello.cluster != shared.cluster {
        Some((Reject::Cluster, format!("this is cluster {:?}, not {:?}", shared.cluster, hello.cluster)))
    } else if hello.to != shared.node {
        Some((Reject::Target, format!("this is node {}, not {}", shared.node, hello.to)))
    } else if hello.from == shared.node {
        Some((Reject::OwnId, format!("this process itself has node id {}", shared.node)))
    } else if is_fenced {
        Some((Reject::Fenced, format!("a newer life of node {} is registered", hello.from)))
    } else {
        None
    };
    if let Some(refusal) = refusal {
        return Ok(Err(refusal));
    }
    let Ok(place) = places.clone().try_acquire_owned() else {
        add(&shared.stats.over_limit, 1);
        return Ok(Err((Reject::Busy, "too many connections of peers".to_owned())));
    };
    let ConnNumber { boot, counter } = hello.number;
    let claim = Claim::stream(shared, (hello.from, hello.incarnation), channel, hello.number);
    Ok(claim.map(|claim| (claim, channel, addr, place)).map_err(|reject| {
        let text = match reject {
            Reject::Stale => format!("connection {counter} of start {boot} is not the newest"),
            _ => "too many lives".to_owned(),
        };
        (reject, text)
    }))
}
