//! Accepting clients: limits, refusals, and an end that lets what is in flight finish.
//!
//! ```text
//!   listener --accept--> under max_clients? --> connection task          shutdown: stop accepting,
//!        \ out of descriptors: back off            \-> error and close    let each finish, bounded, then close
//! ```

use crate::client::{Client, Outbox};
use crate::clock;
use crate::config::Secret;
use crate::peers::LogLimit;
use crate::resp::connection::{self, Link};
use crema_core::{MonoTime, NodeId};
use crema_shard::{ConnId, MemoryOptions};
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{Id, JoinHandle, JoinSet};
use tokio::time::Instant;

/// A connection without traffic is probed after this long, so that a client whose machine vanished is noticed.
pub const KEEPALIVE: Duration = Duration::from_secs(300);
/// First pause after a failure to accept; doubles up to [`MAX_PAUSE`].
const MIN_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Which of the two listeners a client has come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerKind {
    /// Takes every command to where its keys are; its clients never see a redirection.
    Proxy,
    /// Answers `MOVED` for slots that other nodes lead, as cluster clients expect.
    Cluster,
}

/// Counters of the front, monotonic unless said otherwise.
#[derive(Debug, Default)]
pub struct FrontStats {
    /// Connections at present (a gauge).
    pub connected: AtomicU64,
    /// Connections accepted, refused ones included.
    pub accepted: AtomicU64,
    /// Connections refused because there were too many.
    pub rejected: AtomicU64,
    /// Failures to accept.
    pub accept_errors: AtomicU64,
    /// Commands taken.
    pub commands: AtomicU64,
    /// Bytes read.
    pub bytes_in: AtomicU64,
    /// Bytes written.
    pub bytes_out: AtomicU64,
    /// Connections closed because what they sent was no RESP, or over a limit.
    pub protocol_errors: AtomicU64,
    /// Wrong passwords.
    pub auth_failures: AtomicU64,
    /// Commands that had to wait for a placement or a leader.
    pub holds: AtomicU64,
    /// Reads answered under the leader's lease by the connections themselves, without the driver.
    pub reads_local: AtomicU64,
}

/// What all connections of a node share: configuration, counters, and the list of clients. Fill the public fields
/// before the first listener starts.
#[derive(Debug)]
pub struct FrontConfig {
    /// The password that clients must give, if any.
    pub requirepass: Option<Secret>,
    /// Time in which a command must be executed or refused.
    pub deadline: Duration,
    /// Most connections, both listeners together.
    pub max_clients: usize,
    /// Time in which a connection must authenticate, if there is a password.
    pub auth_timeout: Duration,
    /// This node.
    pub node: NodeId,
    /// The cluster's name.
    pub cluster: String,
    /// Version of this program.
    pub version: String,
    /// When this node started.
    pub started: MonoTime,
    /// Counters.
    pub stats: FrontStats,
    /// Limits of this node's memory.
    pub memory: MemoryOptions,
    /// Whether it keeps its log on disk.
    pub durable: bool,
    /// Bytes of data on this node, for INFO; whoever knows it stores it here. 0 if unknown.
    pub used_memory: AtomicU64,
    clients: Mutex<BTreeMap<u64, Arc<ClientInfo>>>,
}

impl FrontConfig {
    /// Defaults: no password, 5 seconds for a command, 10,000 clients, 10 seconds to authenticate.
    pub fn new(node: NodeId, cluster: impl Into<String>) -> FrontConfig {
        FrontConfig {
            requirepass: None,
            deadline: Duration::from_secs(5),
            max_clients: 10_000,
            auth_timeout: Duration::from_secs(10),
            node,
            cluster: cluster.into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: clock::mono(),
            stats: FrontStats::default(),
            memory: MemoryOptions::default(),
            durable: false,
            used_memory: AtomicU64::new(0),
            clients: Mutex::default(),
        }
    }

    /// The connections at present, ascending by id.
    pub fn clients(&self) -> Vec<Arc<ClientInfo>> {
        self.clients.lock().expect("no panic while held").values().cloned().collect()
    }

    /// Those of the connections `ids` that are open, in the order asked for.
    pub fn clients_by_id(&self, ids: &[u64]) -> Vec<Arc<ClientInfo>> {
        let clients = self.clients.lock().expect("no panic while held");
        ids.iter().filter_map(|id| clients.get(id).cloned()).collect()
    }
}

#[derive(Debug, Default)]
struct Names {
    name: Box<[u8]>,
    lib_name: Box<[u8]>,
    lib_ver: Box<[u8]>,
}

/// A connection as CLIENT LIST tells it.
#[derive(Debug)]
pub struct ClientInfo {
    /// Its id, never used twice in a node's life.
    pub id: u64,
    /// The client's address.
    pub peer: SocketAddr,
    /// The node's address as the client reached it.
    pub local: SocketAddr,
    /// When it was accepted.
    pub since: MonoTime,
    /// When it last sent something, as nanoseconds of monotonic time.
    pub last_active: AtomicU64,
    /// The selected database.
    pub db: AtomicU8,
    /// Whether it speaks RESP3.
    pub resp3: AtomicBool,
    names: Mutex<Names>,
}

impl ClientInfo {
    /// A connection accepted at `now`.
    pub fn new(id: u64, peer: SocketAddr, local: SocketAddr, now: MonoTime) -> ClientInfo {
        ClientInfo {
            id,
            peer,
            local,
            since: now,
            last_active: AtomicU64::new(now.0),
            db: AtomicU8::new(0),
            resp3: AtomicBool::new(false),
            names: Mutex::default(),
        }
    }

    /// Its name; empty without one.
    pub fn name(&self) -> Box<[u8]> {
        self.names.lock().expect("no panic while held").name.clone()
    }

    /// Names it; an empty name takes the name away.
    pub fn set_name(&self, name: &[u8]) {
        self.names.lock().expect("no panic while held").name = name.into();
    }

    /// Name and version of its client library.
    pub fn library(&self) -> (Box<[u8]>, Box<[u8]>) {
        let names = self.names.lock().expect("no panic while held");
        (names.lib_name.clone(), names.lib_ver.clone())
    }

    /// Takes note of the library's name, or else of its version.
    pub fn set_library(&self, is_name: bool, value: &[u8]) {
        let mut names = self.names.lock().expect("no panic while held");
        let field = if is_name { &mut names.lib_name } else { &mut names.lib_ver };
        *field = value.into();
    }
}

/// An accepted connection's place among the clients; given back when dropped.
#[derive(Debug)]
struct Place {
    front: Arc<FrontConfig>,
    id: Option<u64>,
}

impl Place {
    /// A place, unless all are taken.
    fn take(front: &Arc<FrontConfig>) -> Option<Place> {
        let taken = front.stats.connected.fetch_add(1, Ordering::Relaxed);
        let place = Place { front: front.clone(), id: None };
        ((taken as usize) < front.max_clients).then_some(place)
    }

    fn register(&mut self, info: Arc<ClientInfo>) {
        self.id = Some(info.id);
        self.front.clients.lock().expect("no panic while held").insert(info.id, info);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.front.stats.connected.fetch_sub(1, Ordering::Relaxed);
        if let Some(id) = self.id {
            self.front.clients.lock().expect("no panic while held").remove(&id);
        }
    }
}

/// One RESP listener.
#[derive(Debug)]
pub struct Server;

impl Server {
    /// Serves `listener` until the handle is told to shut down, or dropped. Must be called within a tokio runtime.
    pub fn start(listener: TcpListener, kind: ListenerKind, client: Client, front: Arc<FrontConfig>) -> ServerHandle {
        let (stop, stopped) = watch::channel(None);
        let addr = listener.local_addr();
        let acceptor = Acceptor {
            kind,
            client,
            front,
            draining: Arc::new(AtomicBool::new(false)),
            tasks: JoinSet::new(),
            open: HashMap::new(),
            log: LogLimit::default(),
        };
        let task = tokio::spawn(acceptor.run(listener, stopped));
        ServerHandle { addr: addr.ok(), stop, task: tokio::sync::Mutex::new(Some(task)) }
    }
}

/// The door to a listener. Dropping it closes all its connections.
#[derive(Debug)]
pub struct ServerHandle {
    addr: Option<SocketAddr>,
    stop: watch::Sender<Option<Instant>>,
    task: tokio::sync::Mutex<Option<JoinHandle<()>>>,
}

impl ServerHandle {
    /// The address it listens on, if the system told it.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.addr
    }

    /// Stops accepting and reading; commands in flight finish and are answered, for at most `grace`; then every
    /// connection is closed. Returns when that is done; later calls wait for the first one.
    pub async fn shutdown(&self, grace: Duration) {
        self.stop.send_if_modified(|stop| {
            let first = stop.is_none();
            if first {
                *stop = Some(Instant::now() + grace);
            }
            first
        });
        let mut task = self.task.lock().await;
        if let Some(running) = task.as_mut() {
            // A panic of the acceptor has been logged by the runtime; its connections ended with it.
            let _ = running.await;
            *task = None;
        }
    }
}

struct Acceptor {
    kind: ListenerKind,
    client: Client,
    front: Arc<FrontConfig>,
    draining: Arc<AtomicBool>,
    tasks: JoinSet<()>,
    /// Connections by their task, for those whose task ended by a panic or was ended.
    open: HashMap<Id, (ConnId, Arc<Outbox>)>,
    log: LogLimit,
}

impl Acceptor {
    async fn run(mut self, listener: TcpListener, mut stop: watch::Receiver<Option<Instant>>) {
        let (mut pause, mut paused) = (MIN_PAUSE, None);
        loop {
            let rest = async {
                match paused {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                // Told to stop, or the handle is gone.
                () = async { let _ = stop.wait_for(Option::is_some).await; } => break,
                Some(ended) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => self.ended(ended).await,
                () = rest => paused = None,
                accepted = listener.accept(), if paused.is_none() => match accepted {
                    Ok((stream, peer)) => {
                        pause = MIN_PAUSE;
                        if self.admit(stream, peer).await.is_err() {
                            break;
                        }
                    }
                    // That one client has gone; the next is not concerned.
                    Err(e) if is_clients_own(&e) => {
                        self.front.stats.accept_errors.fetch_add(1, Ordering::Relaxed);
                    }
                    // Usually out of descriptors: the client stays in the queue, so asking again at once would spin.
                    Err(error) => {
                        self.front.stats.accept_errors.fetch_add(1, Ordering::Relaxed);
                        if let Some(left_out) = self.log.allow() {
                            tracing::warn!(%error, left_out, "cannot accept RESP connections");
                        }
                        paused = Some(Instant::now() + pause);
                        pause = (pause * 2).min(MAX_PAUSE);
                    }
                },
            }
        }
        drop(listener);
        let until = (*stop.borrow()).unwrap_or_else(Instant::now);
        self.drain(until).await;
    }

    /// Lets the connections finish until then, and ends what is left.
    async fn drain(&mut self, until: Instant) {
        self.draining.store(true, Ordering::Release);
        for (_, outbox) in self.open.values() {
            // Wakes the connection, which then sees the flag.
            outbox.deliver([]);
        }
        while let Ok(Some(ended)) = tokio::time::timeout_at(until, self.tasks.join_next_with_id()).await {
            self.ended(ended).await;
        }
        if !self.tasks.is_empty() {
            tracing::warn!(connections = self.tasks.len(), "RESP connections did not finish in time and are closed");
        }
        self.tasks.abort_all();
        while let Some(ended) = self.tasks.join_next_with_id().await {
            self.ended(ended).await;
        }
    }

    /// A connection's task is over. One that ended properly has told the driver; for any other it is told here.
    async fn ended(&mut self, result: Result<(Id, ()), tokio::task::JoinError>) {
        match result {
            Ok((id, ())) => {
                self.open.remove(&id);
            }
            Err(e) => {
                if e.is_panic() {
                    tracing::error!(error = %e, "a RESP connection's task panicked");
                }
                if let Some((conn, _)) = self.open.remove(&e.id()) {
                    self.client.close(conn).await;
                }
            }
        }
    }

    /// Starts a connection. An error means that the driver has stopped.
    async fn admit(&mut self, stream: TcpStream, peer: SocketAddr) -> Result<(), crate::client::Stopped> {
        let stats = &self.front.stats;
        stats.accepted.fetch_add(1, Ordering::Relaxed);
        let Some(mut place) = Place::take(&self.front) else {
            stats.rejected.fetch_add(1, Ordering::Relaxed);
            refuse(stream);
            return Ok(());
        };
        // A client that has gone already has no address any more.
        let Ok(local) = stream.local_addr() else { return Ok(()) };
        if let Err(error) = prepare(&stream)
            && let Some(left_out) = self.log.allow()
        {
            tracing::debug!(%error, left_out, "cannot set the options of a RESP connection");
        }
        let (conn, outbox) = self.client.open().await?;
        let info = Arc::new(ClientInfo::new(conn.0, peer, local, clock::mono()));
        place.register(info.clone());
        let link = Link {
            conn,
            outbox: outbox.clone(),
            client: self.client.clone(),
            front: self.front.clone(),
            kind: self.kind,
            info,
            draining: self.draining.clone(),
        };
        let task = self.tasks.spawn(async move {
            connection::run(stream, link).await;
            drop(place);
        });
        self.open.insert(task.id(), (conn, outbox));
        Ok(())
    }
}

/// Failures that concern the connection at the head of the queue, which is taken off it with them.
fn is_clients_own(e: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(e.kind(), ConnectionAborted | ConnectionReset | ConnectionRefused | BrokenPipe | Interrupted)
}

/// Small replies leave at once, and dead clients are noticed.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE / 3)?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    Ok(())
}

/// Tells a client that there is no place. The line fits any send buffer, so nothing is waited for.
fn refuse(stream: TcpStream) {
    if let Ok(mut stream) = stream.into_std() {
        // Whoever has gone does not need to be told.
        let _ = stream.write_all(b"-ERR max number of clients reached\r\n");
    }
}
