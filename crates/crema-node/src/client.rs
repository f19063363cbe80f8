//! How connection tasks and embedded callers reach the driver thread.
//!
//! ```text
//!   connection task --Vec<ClientRequest>--> bounded channel --> driver thread (Host)
//!         ^---- Notify + one lock a round ---- Outbox <---- completions of the round
//! ```

use arc_swap::ArcSwap;
use crema_shard::{ClientRequest, ClientResult, ConnId, RoutingView, Token};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

/// Results for one connection. The driver fills it once a round and wakes the connection once.
#[derive(Debug, Default)]
pub struct Outbox {
    done: Mutex<Vec<(Token, ClientResult)>>,
    notify: Notify,
}

impl Outbox {
    /// Adds a round's results and wakes the connection.
    pub fn deliver(&self, results: impl IntoIterator<Item = (Token, ClientResult)>) {
        self.done.lock().expect("no panic while held").extend(results);
        self.notify.notify_one();
    }
    /// Moves all results into `into`; returns whether there were any.
    pub fn take(&self, into: &mut Vec<(Token, ClientResult)>) -> bool {
        let mut done = self.done.lock().expect("no panic while held");
        into.append(&mut done);
        !into.is_empty()
    }
    /// Waits until there may be results. Cancel-safe.
    pub async fn ready(&self) {
        self.notify.notified().await;
    }
}

/// What the driver thread is told by connections.
#[derive(Debug)]
pub enum ClientInput {
    /// A connection begins; its results go to the outbox.
    Open(ConnId, Arc<Outbox>),
    /// Requests, in order.
    Requests(Vec<ClientRequest>),
    /// The connection is gone.
    Close(ConnId),
}

/// The driver's door for clients. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    inputs: crossbeam::channel::Sender<crate::driver::Input>,
    view: Arc<ArcSwap<RoutingView>>,
    next_conn: Arc<AtomicU64>,
}

/// The driver has stopped: the node is shutting down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the node is shutting down")]
pub struct Stopped;

impl Client {
    /// A client of the driver behind `inputs`.
    pub fn new(inputs: crossbeam::channel::Sender<crate::driver::Input>, view: Arc<ArcSwap<RoutingView>>) -> Self {
        Client { inputs, view, next_conn: Arc::new(AtomicU64::new(1)) }
    }
    /// The present routing view; lock-free.
    pub fn view(&self) -> arc_swap::Guard<Arc<RoutingView>> {
        self.view.load()
    }
    /// Begins a connection.
    pub async fn open(&self) -> Result<(ConnId, Arc<Outbox>), Stopped> {
        let conn = ConnId(self.next_conn.fetch_add(1, Ordering::Relaxed));
        let outbox = Arc::new(Outbox::default());
        self.send(ClientInput::Open(conn, outbox.clone())).await?;
        Ok((conn, outbox))
    }
    /// Hands requests to the driver. Waits while its queue is full: that is the back-pressure on the connection.
    pub async fn submit(&self, requests: Vec<ClientRequest>) -> Result<(), Stopped> {
        self.send(ClientInput::Requests(requests)).await
    }
    /// Ends a connection; its outstanding results are dropped.
    pub async fn close(&self, conn: ConnId) {
        let _ = self.send(ClientInput::Close(conn)).await;
    }
    async fn send(&self, input: ClientInput) -> Result<(), Stopped> {
        use crossbeam::channel::TrySendError;
        let mut input = crate::driver::Input::Client(input);
        loop {
            match self.inputs.try_send(input) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(Stopped),
                // Rare: tens of thousands of inputs are waiting. A crossbeam channel cannot be awaited.
                Err(TrySendError::Full(back)) => {
                    input = back;
                    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
                }
            }
        }
    }
}
