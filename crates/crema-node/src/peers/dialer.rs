//! The peer task: dials every stream of a peer, hands the driver a link once all stand, and dials again once one breaks.
//!
//! ```text
//!  dialing, one address after another --> link up --> (broken, fenced, moved) --> link down --> pause --> dialing ...
//!                                                                     no address: the task ends
//! ```

use super::auth::{self, Proof};
use super::claims::{Claim, ConnNumber};
use super::link::PeerLink;
use super::stats::add;
use super::wire::{Answer, HandshakeError, Hello, MAX_REASON_BYTES, Reject, cut, decode_handshake, handshake_bytes};
use super::wire::{read_handshake, within};
use super::writer::run_writer;
use super::{PeerEvent, PeerTasks, Reach, Shared, fenced, is_fenced, stopping};
use crate::clock;
use crema_core::{Incarnation, NodeId};
use crema_shard::Channel;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Most addresses of one name that are tried in one attempt.
const MAX_RESOLVED: usize = 4;

/// The streams to a peer, by channel.
type Streams = [TcpStream; Channel::ALL.len()];

/// What answered.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Process {
    incarnation: Incarnation,
    boot: u64,
}

/// Resolves, connects and shakes hands: all streams and the claim of the link, or nothing.
async fn dial_all(shared: &Arc<Shared>, peer: NodeId, address: &str) -> Result<(Streams, Claim), HandshakeError> {
    let limit = shared.options.handshake_timeout;
    let resolved = within(limit, async { Ok(tokio::net::lookup_host(address).await?) }).await?;
    let mut raft = Err(HandshakeError::NoAddress);
    for addr in resolved.take(MAX_RESOLVED) {
        raft = dial(shared, peer, addr, Channel::Raft).await.map(|(stream, process)| (stream, process, addr));
        if raft.is_ok() {
            break;
        }
    }
    let (raft, process, addr) = raft?;
    // To the same address: a name may lead to several machines.
    let (requests, of_requests) = dial(shared, peer, addr, Channel::Requests).await?;
    let (snapshot, of_snapshot) = dial(shared, peer, addr, Channel::Snapshot).await?;
    if process != of_requests || process != of_snapshot {
        return Err(HandshakeError::Torn);
    }
    if is_fenced(&shared.fences.borrow(), peer, process.incarnation) {
        return Err(HandshakeError::FencedPeer);
    }
    let claim = Claim::link(shared, (peer, process.incarnation), process.boot);
    let mut claim = claim.map_err(|reject| match reject {
        Reject::Stale => HandshakeError::EarlierBoot,
        _ => HandshakeError::Crowded,
    })?;
    // What an earlier process of that life has sent is with the driver before the Up of this one, or never.
    if !within(limit, async { Ok(claim.wait_alone().await) }).await? {
        return Err(HandshakeError::EarlierBoot);
    }
    Ok(([raft, requests, snapshot], claim))
}

async fn dial(
    shared: &Shared,
    peer: NodeId,
    addr: SocketAddr,
    channel: Channel,
) -> Result<(TcpStream, Process), HandshakeError> {
    let limit = shared.options.handshake_timeout;
    let mut stream = within(limit, async { Ok(TcpStream::connect(addr).await?) }).await?;
    // TCP lets a socket connect to itself when the system happens to choose the dialed port for our end. On one machine
    // this would even keep the port from the node that wants to listen on it.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(HandshakeError::OwnSocket);
    }
    stream.set_nodelay(true)?;
    let counter = shared.next_number.fetch_add(1, Ordering::Relaxed);
    let hello = Hello {
        cluster: &shared.cluster,
        from: shared.node,
        incarnation: shared.incarnation,
        to: peer,
        channel: channel as u8,
        number: ConnNumber { boot: shared.boot, counter },
        addr: &shared.addr,
    };
    let keys = shared.keys.load_full();
    within(limit, async {
        let session = match &keys {
            Some(ring) => Some(auth::dial(&mut stream, ring).await?),
            None => None,
        };
        let session = session.as_ref();
        stream.write_all(&auth::prove(session, Proof::Dialer, handshake_bytes(&hello))).await?;
        let proof = match session {
            Some(_) => Some(auth::read_proof(&mut stream).await?),
            None => None,
        };
        let body = read_handshake(&mut stream).await?;
        if let (Some(session), Some(proof)) = (session, &proof) {
            session.check(Proof::Answer, &body, proof)?;
        }
        match decode_handshake(&body)? {
            Answer::Welcome { node, .. } if node != peer => Err(HandshakeError::WrongNode(node)),
            Answer::Welcome { incarnation, boot, .. } => Ok(Process { incarnation, boot }),
            Answer::Reject { code, text } => Err(HandshakeError::Rejected {
                code: Reject::from_code(code),
                text: cut(text, MAX_REASON_BYTES).to_owned(),
            }),
        }
    })
    .await
    .map(|process| (stream, process))
}

/// `base`, a quarter more or less, so that nodes that lost each other together do not come back in step.
pub(super) fn jittered(base: Duration) -> Duration {
    let random = f64::from(getrandom::u32().unwrap_or(u32::MAX / 2)) / f64::from(u32::MAX);
    base.mul_f64(0.75 + random / 2.0)
}

/// Keeps a link to `peer` wherever it is reached, until the shutdown or until it is not to be reached any more.
pub(super) async fn run_peer(
    shared: Arc<Shared>,
    tasks: Weak<PeerTasks>,
    peer: NodeId,
    mut reach: watch::Receiver<Reach>,
) {
    let mut shutdown = shared.shutdown.clone();
    let options = shared.options;
    let mut backoff = options.backoff_min;
    let mut had_link = false;
    loop {
        let targets = reach.borrow_and_update().addresses.clone();
        if targets.is_empty() {
            let Some(tasks) = tasks.upgrade() else { return };
            let mut tasks = tasks.lock().expect("no panic while held");
            // Whoever tells addresses holds the lock: none can come that nobody reads.
            if reach.borrow().addresses.is_empty() {
                tasks.remove(&peer);
                return;
            }
            continue;
        }
        let dialed = tokio::select! {
            biased;
            () = stopping(&mut shutdown) => return,
            changed = other_addresses(&mut reach, &targets) => {
                if changed.is_err() {
                    return;
                }
                backoff = options.backoff_min;
                continue;
            }
            dialed = dial_any(&shared, peer, &targets) => dialed,
        };
        match dialed {
            Ok((address, streams, claim)) => {
                add(&shared.stats.links_up, 1);
                if had_link {
                    add(&shared.stats.reconnects, 1);
                }
                had_link = true;
                let since = clock::mono();
                let again = run_link(&shared, claim, streams, &address, &mut reach).await;
                if !again {
                    return;
                }
                if clock::mono().since(since) >= options.backoff_max {
                    backoff = options.backoff_min;
                }
            }
            Err(Fenced(fenced)) => {
                if fenced && shared.push(vec![PeerEvent::Fenced { by: peer }].into()).await.is_err() {
                    return;
                }
            }
        }
        let pause = jittered(backoff);
        backoff = (backoff * 2).min(options.backoff_max);
        tokio::select! {
            biased;
            () = stopping(&mut shutdown) => return,
            changed = other_addresses(&mut reach, &targets) => {
                if changed.is_err() {
                    return;
                }
                backoff = options.backoff_min;
            }
            () = sleep(pause) => {}
        }
    }
}

/// Waits until the node is reached at other addresses than `known`.
async fn other_addresses(reach: &mut watch::Receiver<Reach>, known: &[String]) -> Result<(), watch::error::RecvError> {
    reach.wait_for(|now| now.addresses != known).await.map(drop)
}

/// No address leads to the node; whether one of those that answered says that this life is over.
struct Fenced(bool);

/// Tries one address after another.
async fn dial_any(shared: &Arc<Shared>, peer: NodeId, targets: &[String]) -> Result<(String, Streams, Claim), Fenced> {
    let mut fenced = false;
    for target in targets {
        match dial_all(shared, peer, target).await {
            Ok((streams, claim)) => return Ok((target.clone(), streams, claim)),
            Err(error) => {
                add(&shared.stats.dials_failed, 1);
                fenced |= matches!(error, HandshakeError::Rejected { code: Some(Reject::Fenced), .. });
                if let HandshakeError::Rejected { .. }
                | HandshakeError::WrongNode(_)
                | HandshakeError::Version(_)
                | HandshakeError::Keys(_) = error
                {
                    if let Some(left_out) = shared.dial_log.allow() {
                        tracing::warn!(%peer, address = ?target, %error, left_out, "peer refused");
                    }
                } else {
                    tracing::debug!(%peer, address = ?target, %error, "peer not reached");
                }
            }
        }
    }
    Err(Fenced(fenced))
}

/// Waits until a link to `address` is not wanted any more: see [`Reach`].
async fn unwanted(reach: &mut watch::Receiver<Reach>, address: &str) {
    let mut registered: Option<String> = None;
    let unwanted = |now: &Reach| {
        let pinned = now.pinned.is_some() && (registered.is_none() || registered == now.pinned);
        if now.pinned.is_some() {
            registered.clone_from(&now.pinned);
        }
        let named = now.addresses.iter().any(|a| a == address);
        now.addresses.is_empty() || !(named || pinned)
    };
    let _ = reach.wait_for(unwanted).await;
}

/// One link from Up to Down. Returns whether to dial again.
async fn run_link(
    shared: &Arc<Shared>,
    mut claim: Claim,
    streams: Streams,
    address: &str,
    reach: &mut watch::Receiver<Reach>,
) -> bool {
    let (peer, incarnation) = claim.life();
    let boot = claim.number().boot;
    let mut shutdown = shared.shutdown.clone();
    let mut fences = shared.fences.clone();
    let link = PeerLink::new(peer, incarnation, &shared.options, shared.stats.clone());
    // Whoever holds a clone of the link learns of its end, even if this task is aborted.
    let _closer = CloseOnDrop(link.clone());
    let mut writers = JoinSet::new();
    for (channel, stream) in Channel::ALL.into_iter().zip(streams) {
        writers.spawn(run_writer(stream, link.clone(), channel, shared.pace.clone(), shared.options));
    }
    if shared.push(vec![PeerEvent::Up { peer, incarnation, link: link.clone() }].into()).await.is_err() {
        return false;
    }
    tracing::info!(%peer, %incarnation, boot, address, "link up");
    let why = tokio::select! {
        biased;
        () = stopping(&mut shutdown) => {
            link.drain();
            let all = async { while writers.join_next().await.is_some() {} };
            let _ = timeout(shared.options.flush_timeout, all).await;
            return false;
        }
        () = unwanted(reach, address) => "it is reached elsewhere, or not at all".to_owned(),
        () = fenced(&mut fences, peer, incarnation) => "it is fenced".to_owned(),
        () = claim.ended() => "a later start of its life has connected".to_owned(),
        end = writers.join_next() => match end {
            Some(Ok(end)) => end.to_string(),
            Some(Err(panic)) => panic.to_string(),
            None => "no writer".to_owned(),
        },
    };
    link.close();
    // All connections are closed before the next are dialed.
    writers.shutdown().await;
    tracing::info!(%peer, %incarnation, boot, why, "link down");
    // The claim ends after this: no frame of a later process comes before it.
    shared.push(vec![PeerEvent::Down { peer }].into()).await.is_ok()
}

struct CloseOnDrop(PeerLink);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}
