//! Chitchat's UDP socket, opened before chitchat is and counted.
//!
//! Opening it first tells the bound port before the node must say where it is reached, and gives the error of an occupied
//! port a name.

use async_trait::async_trait;
use chitchat::ChitchatEnvelope;
use chitchat::transport::{RecvOutcome, SendOutcome, Socket, Transport, UdpSocket};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Traffic since the start. Datagrams that do not decode are dropped before they are counted.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) received_datagrams: AtomicU64,
    pub(crate) received_bytes: AtomicU64,
    pub(crate) sent_datagrams: AtomicU64,
    pub(crate) sent_bytes: AtomicU64,
}

/// Hands one socket to chitchat, once.
pub(crate) struct OpenedTransport {
    socket: Mutex<Option<Box<dyn Socket>>>,
}

impl OpenedTransport {
    /// Opens the socket; returns it with the address that it is bound to.
    pub(crate) async fn open(bind: SocketAddr, traffic: Arc<Traffic>) -> anyhow::Result<(Self, SocketAddr)> {
        let socket = UdpSocket::open(bind).await?;
        let addr = socket.local_addr()?;
        let counted = CountedSocket { socket, traffic };
        Ok((OpenedTransport { socket: Mutex::new(Some(Box::new(counted))) }, addr))
    }
}

#[async_trait]
impl Transport for OpenedTransport {
    async fn open(&self, _listen_addr: SocketAddr) -> anyhow::Result<Box<dyn Socket>> {
        let socket = self.socket.lock().expect("no panic while held").take();
        socket.ok_or_else(|| anyhow::anyhow!("the gossip socket was handed out before"))
    }
}

struct CountedSocket {
    socket: UdpSocket,
    traffic: Arc<Traffic>,
}

#[async_trait]
impl Socket for CountedSocket {
    fn local_addr(&self) -> anyhow::Result<SocketAddr> {
        self.socket.local_addr()
    }

    async fn send(&mut self, to: SocketAddr, envelope: ChitchatEnvelope) -> anyhow::Result<SendOutcome> {
        let sent = self.socket.send(to, envelope).await?;
        self.traffic.sent_datagrams.fetch_add(1, Ordering::Relaxed);
        self.traffic.sent_bytes.fetch_add(sent.num_bytes_sent as u64, Ordering::Relaxed);
        Ok(sent)
    }

    // Cancel-safe, as chitchat demands: the only await is the inner socket's, which is.
    async fn recv(&mut self) -> anyhow::Result<RecvOutcome> {
        let received = self.socket.recv().await?;
        self.traffic.received_datagrams.fetch_add(1, Ordering::Relaxed);
        self.traffic.received_bytes.fetch_add(received.num_bytes_received as u64, Ordering::Relaxed);
        Ok(received)
    }
}
