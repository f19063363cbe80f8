//! The HTTP side of a node: health, metrics and the admin API. All but two paths only look.
//!
//! ```text
//!   GET /livez  /readyz ----------> AdminSource: is the process fit, is the node ready
//!   GET /v1/status /v1/members ---> RoutingView + HostStatus + gossip's members --pure--> the bodies below --> JSON
//!       /v1/shards /v1/voters
//!   POST /v1/recover /v1/voters --> see `recover` and `voters`: the paths that change something
//!   GET /metrics -----------------> the node's own registry as OpenMetrics text
//! ```
//!
//! The bodies are public types, so that `crema status` reads what the server writes. The server takes only GET there, no
//! bodies, short heads, and a bounded number of connections, each for a bounded time. Health is answered however many others
//! connect: a probe that goes unanswered ends the process that it asks about.

use crate::config::Secret;
use crate::driver::Recover;
use crate::newcomers::{Expulsion, Newcomer, Newcomers};
use crate::recover;
use crate::voters;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use crema_core::{NodeId, ShardId};
use crema_shard::{Down, HostStatus, RecoverResult, RoutingView, Standing, VoterResult};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Longest time for a request's head to arrive.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Most requests answered at once, those for health apart; further ones are answered with 503.
pub const MAX_REQUESTS: usize = 64;
/// Most connections whose request's head has not arrived, all together and of one host; for a further one the oldest goes.
pub const MAX_WAITING: usize = 256;
/// See [`MAX_WAITING`].
pub const MAX_WAITING_OF_ONE: usize = 32;
/// Connections that are about to close: told to go, or with a short answer on its way. No more are accepted beyond these, and
/// none of them lasts.
const MAX_CLOSING: usize = 64;

/// Longest body of a request.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Longest time of a connection: a recovery takes its time.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// A future that the admin API awaits.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A member as gossip sees it, in the admin API's own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GossipMember {
    /// The node.
    pub node: NodeId,
    /// `alive`, `suspect`, `dead` or `left`.
    pub state: &'static str,
    /// Incarnation in hexadecimal.
    pub incarnation: String,
    /// Where peers connect.
    pub raft_addr: String,
    /// Where gossip reaches it.
    pub gossip_addr: String,
    /// RESP, proxying.
    pub redis_addr: Option<String>,
    /// RESP, redirecting.
    pub redis_cluster_addr: Option<String>,
    /// HTTP.
    pub http_addr: Option<String>,
    /// Custom metadata.
    pub metadata: BTreeMap<String, String>,
}

/// What the admin API asks its node. A trait, so that the API can be tested without a cluster.
pub trait AdminSource: Send + Sync + 'static {
    /// Whether the process does its work; otherwise what has stopped.
    fn alive(&self) -> Result<(), String>;
    /// Whether this node is about to stop.
    fn draining(&self) -> bool;
    /// Whether another process is in this one's place, under its id; in a sentence.
    fn rivalry(&self) -> Option<String>;
    /// The present routing view.
    fn view(&self) -> Arc<RoutingView>;
    /// The driver's picture; an error says why there is none.
    fn host_status(&self) -> BoxFuture<'_, Result<HostStatus, String>>;
    /// Members by gossip; `None` on a node without gossip.
    fn members(&self) -> Option<Vec<GossipMember>>;
    /// Metrics as OpenMetrics text.
    fn metrics(&self) -> BoxFuture<'_, String>;
    /// Facts of this node that never change.
    fn facts(&self) -> &Facts;
    /// Lets a node hold replicas, or no longer.
    fn change_voters(&self, node: NodeId, approved: bool) -> BoxFuture<'_, VoterResult>;
    /// Founds groups anew that are lost; an error in the outer place says why the node cannot be asked.
    fn recover(&self, what: Recover) -> BoxFuture<'_, Result<RecoverResult, String>>;
}

/// Facts of a node that never change during its life.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The cluster's name.
    pub cluster: String,
    /// The node.
    pub node: NodeId,
    /// Its life, in hexadecimal.
    pub incarnation: String,
    /// Replicas of each shard that are wanted.
    pub replicas: u32,
    /// Own addresses as others are told them.
    pub raft_addr: String,
    /// Own gossip address, if it gossips.
    pub gossip_addr: Option<String>,
    /// Own metadata.
    pub metadata: BTreeMap<String, String>,
}

/// `GET /v1/status`: one node in a few words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusBody {
    /// The cluster's name.
    pub cluster: String,
    /// The cluster's identity in hexadecimal; null before founding or joining.
    pub uuid: Option<String>,
    /// This node.
    pub node_id: u64,
    /// Its life in hexadecimal.
    pub incarnation: String,
    /// Whether `/readyz` says 200.
    pub ready: bool,
    /// Why not.
    pub reason: Option<String>,
    /// Whether it is about to stop.
    pub draining: bool,
    /// Data shards; 0 before the placement is known.
    pub shards: u32,
    /// Data shards that this node leads.
    pub leaders: u32,
    /// Data shards without a known leader.
    pub leaderless: u32,
    /// Replicas of each shard that are wanted.
    pub replicas: u32,
    /// How many shards have how many of the wanted replicas standing.
    pub replication: Vec<ReplicationLine>,
    /// Leader of the meta group, if known.
    pub meta_leader: Option<u64>,
    /// Nodes that may hold replicas and to which the asked node has no working connection.
    pub away: Vec<u64>,
    /// Groups whose replicas are not where they should be.
    pub moving: u32,
    /// Placement epoch.
    pub epoch: u64,
    /// Generation of the cluster's table: 1, and one more for each recovery of the meta group.
    pub generation: u32,
    /// What an operator should know of the past: `founded anew: previous contents lost`, or that the table was recovered.
    pub notice: Option<String>,
    /// When that was, in milliseconds of Unix time.
    pub recovered_at_ms: Option<u64>,
    /// Groups that have had no leader for longer than an election takes, the meta group first.
    pub down: Vec<DownBody>,
    /// This build's version.
    pub version: String,
}

/// A part of [`StatusBody`]: a group without a leader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownBody {
    /// The shard; null for the meta group.
    pub shard: Option<u32>,
    /// Whether its majority is gone for good: only `crema recover` makes it writable again.
    pub lost: bool,
    /// Why it has no leader.
    pub reason: String,
}

/// A part of [`StatusBody`]: so many shards have so many replicas standing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicationLine {
    /// Number of shards.
    pub shards: u32,
    /// Replicas on live nodes, each held by the present life of its node.
    pub standing: u32,
    /// Replicas wanted.
    pub wanted: u32,
}

/// One element of `GET /v1/members`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberBody {
    /// The node.
    pub node_id: u64,
    /// `alive`, `suspect`, `dead` or `left`, by gossip; without gossip `alive` or `dead` by the peer connection.
    pub state: String,
    /// Where peers connect.
    pub raft_addr: String,
    /// Whether the cluster lets it hold replicas.
    pub voter: bool,
    /// Its newest life, by gossip, in hexadecimal.
    pub incarnation: String,
    /// The life that the cluster has registered, in hexadecimal; null if none is.
    pub registered: Option<String>,
    /// Custom metadata.
    pub metadata: BTreeMap<String, String>,
    /// Whether the asked node has a working peer connection to the registered life (true for itself).
    pub connected: bool,
    /// Whether it is about to stop.
    pub draining: bool,
    /// Where gossip reaches it.
    pub gossip_addr: Option<String>,
    /// RESP, proxying.
    pub redis_addr: Option<String>,
    /// RESP, redirecting.
    pub redis_cluster_addr: Option<String>,
    /// HTTP.
    pub http_addr: Option<String>,
}

/// One element of `GET /v1/shards`, as the asked node sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardBody {
    /// The shard.
    pub shard: u32,
    /// Known leader.
    pub leader: Option<u64>,
    /// Its term.
    pub term: u64,
    /// Applied index of the asked node's own replica; null where it has none. So for the next three.
    pub applied: Option<u64>,
    /// Digest of its state at that index, 16 hexadecimal digits.
    pub digest: Option<String>,
    /// Keys.
    pub keys: Option<u64>,
    /// Accounted bytes.
    pub bytes: Option<u64>,
    /// Whether it sleeps.
    pub asleep: Option<bool>,
    /// First slot.
    pub first_slot: Option<u16>,
    /// Last slot.
    pub last_slot: Option<u16>,
    /// Why it has no leader, if that has lasted longer than an election takes.
    pub down: Option<String>,
    /// Whether its majority is gone for good.
    pub lost: bool,
    /// Replicas by placement.
    pub replicas: Vec<ReplicaBody>,
}

/// A replica of a [`ShardBody`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaBody {
    /// The node that holds it.
    pub node: u64,
    /// Its id.
    pub replica: u64,
    /// `voter`; `learner` while it is being filled again, `incoming` while it is filled in the place of another, as far as the
    /// node that answers holds a replica of the shard and can know; `outgoing` if it goes once others have taken its place, or
    /// if the node's present life does not hold it.
    pub role: String,
}

/// One element of `GET /v1/voters`: a node that the cluster lets hold replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoterBody {
    /// The node.
    pub node_id: u64,
    /// Its registered life in hexadecimal.
    pub incarnation: String,
    /// Where peers connect.
    pub raft_addr: String,
    /// Whether the asked node has a working peer connection to it (true for itself).
    pub connected: bool,
    /// Whether it is about to stop.
    pub draining: bool,
    /// Replicas of data shards that placement gives it.
    pub replicas: u32,
}

/// Why the node is not ready, the most telling reason first; `None` if it is.
pub fn not_ready(source: &dyn AdminSource) -> Option<String> {
    if let Err(reason) = source.alive() {
        return Some(reason);
    }
    if source.draining() {
        return Some("this node is about to stop".to_owned());
    }
    // More telling than what it waits for in vain.
    source.rivalry().or_else(|| source.view().not_ready.clone())
}

/// The number of shards by the number of their standing replicas, fewest first.
fn replication(view: &RoutingView, wanted: u32) -> Vec<ReplicationLine> {
    let mut lines: BTreeMap<(u32, u32), u32> = BTreeMap::new();
    for shard in &view.shards {
        let live = |node: &NodeId| view.nodes.get(node).is_some_and(|n| n.live);
        let counts = |standing| matches!(standing, Standing::Voter | Standing::Outgoing);
        let standing =
            shard.replicas.iter().filter(|(node, _, standing)| counts(*standing) && live(node)).count() as u32;
        // During a move, placement may name more replicas than are wanted in the end.
        *lines.entry((standing.min(wanted), wanted)).or_default() += 1;
    }
    lines.into_iter().map(|((standing, wanted), shards)| ReplicationLine { shards, standing, wanted }).collect()
}

/// The body of `/v1/status`.
pub fn status_body(source: &dyn AdminSource) -> StatusBody {
    let (view, facts) = (source.view(), source.facts());
    let reason = not_ready(source);
    let count = |wanted: Option<NodeId>| view.shards.iter().filter(|s| s.leader == wanted).count() as u32;
    StatusBody {
        cluster: facts.cluster.clone(),
        uuid: view.uuid.map(|u| u.to_string()),
        node_id: facts.node.0,
        incarnation: facts.incarnation.clone(),
        ready: reason.is_none(),
        reason,
        draining: source.draining(),
        shards: view.shards.len() as u32,
        leaders: count(Some(facts.node)),
        leaderless: count(None),
        replicas: facts.replicas,
        replication: replication(&view, facts.replicas),
        meta_leader: view.meta_leader.map(|n| n.0),
        away: away(&view),
        moving: moving(&view),
        epoch: view.epoch.0,
        generation: view.generation,
        notice: notice(&view),
        recovered_at_ms: view.recovery.map(|r| r.at.0),
        down: down(&view),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn away(view: &RoutingView) -> Vec<u64> {
    let away = |(id, route): &(&NodeId, &crema_shard::NodeRoute)| route.approved && **id != view.this && !route.live;
    view.nodes.iter().filter(away).map(|(id, _)| id.0).collect()
}

fn moving(view: &RoutingView) -> u32 {
    let moves = |standing| matches!(standing, Standing::Incoming | Standing::Outgoing);
    view.shards.iter().filter(|s| s.replicas.iter().any(|(.., standing)| moves(*standing))).count() as u32
}

fn notice(view: &RoutingView) -> Option<String> {
    let recovery = view.recovery?;
    let what = if recovery.anew {
        "founded anew: previous contents lost"
    } else {
        "recovered after the loss of a majority: some contents may be lost"
    };
    Some(format!("{what} (generation {})", view.generation))
}

fn down(view: &RoutingView) -> Vec<DownBody> {
    let body = |shard, d: &Down| DownBody { shard, lost: d.lost, reason: d.reason.to_string() };
    let meta = view.meta_down.iter().map(|d| body(None, d));
    let shards = view.shards.iter().enumerate();
    meta.chain(shards.filter_map(|(i, s)| Some(body(Some(i as u32), s.down.as_ref()?)))).collect()
}

/// The body of `/v1/members`: everyone gossip or placement knows, joined by node id, ascending.
pub fn members_body(source: &dyn AdminSource) -> Vec<MemberBody> {
    let (view, facts, gossip) = (source.view(), source.facts(), source.members());
    let has_gossip = gossip.is_some();
    let by_gossip: BTreeMap<NodeId, GossipMember> =
        gossip.unwrap_or_default().into_iter().map(|m| (m.node, m)).collect();
    let ids: BTreeSet<NodeId> =
        by_gossip.keys().chain(view.nodes.keys()).copied().chain(std::iter::once(facts.node)).collect();
    let member = |id: NodeId| {
        let (heard, route) = (by_gossip.get(&id), view.nodes.get(&id));
        let this = id == facts.node;
        let live = this || route.is_some_and(|r| r.live);
        let state = match heard {
            Some(member) => member.state,
            // A node with gossip that does not hear another, registered one: it is gone, or cut off from gossip.
            None if live && (this || !has_gossip) => "alive",
            None if live => "suspect",
            None => "dead",
        };
        let from_route =
            |pick: fn(&crema_shard::NodeAddrs) -> &Option<String>| route.and_then(|r| pick(&r.addrs).clone());
        MemberBody {
            node_id: id.0,
            state: state.to_owned(),
            raft_addr: match (heard, route) {
                (Some(member), _) => member.raft_addr.clone(),
                (None, Some(route)) => route.addrs.raft.clone(),
                (None, None) => facts.raft_addr.clone(),
            },
            voter: route.is_some_and(|r| r.approved),
            incarnation: match (heard, route) {
                (Some(member), _) => member.incarnation.clone(),
                (None, Some(route)) => route.incarnation.to_string(),
                (None, None) => facts.incarnation.clone(),
            },
            registered: route.map(|r| r.incarnation.to_string()),
            metadata: match heard {
                Some(member) => member.metadata.clone(),
                None if this => facts.metadata.clone(),
                None => BTreeMap::new(),
            },
            connected: live,
            draining: route.is_some_and(|r| r.draining) || (this && source.draining()),
            gossip_addr: heard.map(|m| m.gossip_addr.clone()).or_else(|| facts.gossip_addr.clone().filter(|_| this)),
            redis_addr: heard.and_then(|m| m.redis_addr.clone()).or_else(|| from_route(|a| &a.redis)),
            redis_cluster_addr: heard
                .and_then(|m| m.redis_cluster_addr.clone())
                .or_else(|| from_route(|a| &a.redis_cluster)),
            http_addr: heard.and_then(|m| m.http_addr.clone()).or_else(|| from_route(|a| &a.http)),
        }
    };
    ids.into_iter().map(member).collect()
}

/// The body of `/v1/shards`, ascending by shard.
pub fn shards_body(status: &HostStatus, view: &RoutingView) -> Vec<ShardBody> {
    let body = |s: &crema_shard::ShardStatus| {
        let range = view.shard(s.shard).map(|route| route.range).filter(|range| !range.is_empty());
        ShardBody {
            shard: s.shard.0,
            leader: s.leader.map(|n| n.0),
            term: s.term.0,
            applied: s.own.map(|own| own.applied.0),
            digest: s.own.map(|own| format!("{:016x}", own.digest)),
            keys: s.own.map(|own| own.keys),
            bytes: s.own.map(|own| own.bytes),
            asleep: s.own.map(|own| own.asleep),
            first_slot: range.map(|r| r.start),
            last_slot: range.map(|r| r.end - 1),
            down: view.shard(s.shard).and_then(|route| route.down.as_ref()).map(|d| d.reason.to_string()),
            lost: view.shard(s.shard).and_then(|route| route.down.as_ref()).is_some_and(|d| d.lost),
            replicas: s
                .replicas
                .iter()
                .map(|&(node, replica, standing)| ReplicaBody {
                    node: node.0,
                    replica: replica.0,
                    role: match standing {
                        Standing::Voter => "voter",
                        Standing::Learner => "learner",
                        Standing::Incoming => "incoming",
                        Standing::Outgoing | Standing::Lost => "outgoing",
                    }
                    .to_owned(),
                })
                .collect(),
        }
    };
    status.shards.iter().filter(|s| !s.shard.is_meta()).map(body).collect()
}

/// The body of `/v1/voters`, ascending by node.
pub fn voters_body(view: &RoutingView) -> Vec<VoterBody> {
    let holds = |id: NodeId| {
        let has = |s: &&crema_shard::ShardRoute| s.replicas.iter().any(|(node, _, _)| *node == id);
        view.shards.iter().filter(has).count() as u32
    };
    let approved = view.nodes.iter().filter(|(_, route)| route.approved);
    approved
        .map(|(&id, route)| VoterBody {
            node_id: id.0,
            incarnation: route.incarnation.to_string(),
            raft_addr: route.addrs.raft.clone(),
            connected: route.live || id == view.this,
            draining: route.draining,
            replicas: holds(id),
        })
        .collect()
}

/// Lists shards for a person: at most eight of them by number.
pub fn name_shards(shards: &[ShardId]) -> String {
    let mut text = String::new();
    for (i, shard) in shards.iter().take(8).enumerate() {
        let comma = if i == 0 { "" } else { ", " };
        let _ = if shard.is_meta() { write!(text, "{comma}the meta group") } else { write!(text, "{comma}{shard}") };
    }
    if shards.len() > 8 {
        let _ = write!(text, " and {} more", shards.len() - 8);
    }
    text
}

type Source = State<Arc<dyn AdminSource>>;

fn reason_503(reason: String) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, Json(serde_json::json!({ "reason": reason }))).into_response()
}

async fn livez(State(source): Source) -> Response {
    match source.alive() {
        Ok(()) => (StatusCode::OK, "ok\n").into_response(),
        Err(reason) => reason_503(reason),
    }
}

async fn readyz(State(source): Source) -> Response {
    match not_ready(&*source) {
        None => (StatusCode::OK, "ready\n").into_response(),
        Some(reason) => reason_503(reason),
    }
}

async fn metrics(State(source): Source) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], source.metrics().await).into_response()
}

async fn shards(State(source): Source) -> Response {
    match source.host_status().await {
        Ok(status) => Json(shards_body(&status, &source.view())).into_response(),
        Err(reason) => reason_503(reason),
    }
}

async fn not_found() -> Response {
    (StatusCode::NOT_FOUND, Json(serde_json::json!({ "reason": "no such path" }))).into_response()
}

/// Whether a path tells of health: open to everybody, and answered at once.
fn is_health(path: &str) -> bool {
    matches!(path, "/livez" | "/readyz")
}

/// Whether a request may pass: health always, the rest with the password, if there is one.
async fn authenticate(State(password): State<Option<Secret>>, request: Request, next: Next) -> Response {
    let open = is_health(request.uri().path());
    let Some(password) = password.filter(|_| !open) else { return next.run(request).await };
    let given = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    match given.and_then(|value| value.strip_prefix(b"Bearer ")) {
        Some(token) if password.is(token) => next.run(request).await,
        _ => {
            let reason = "this needs the password, as a bearer token (client commands: --requirepass-file)";
            let body = Json(serde_json::json!({ "reason": reason }));
            (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], body).into_response()
        }
    }
}

/// The routes; all but those of health want the password, if there is one. HEAD is answered where GET is; a method that a path does not have is refused with 405.
pub fn router(source: Arc<dyn AdminSource>, password: Option<Secret>) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/v1/status", get(|State(source): Source| async move { Json(status_body(&*source)) }))
        .route("/v1/members", get(|State(source): Source| async move { Json(members_body(&*source)) }))
        .route(
            "/v1/voters",
            get(|State(source): Source| async move { Json(voters_body(&source.view())) })
                .post(voters::change)
                .layer(DefaultBodyLimit::max(MAX_BODY_BYTES)),
        )
        .route("/v1/moves", get(voters::moves))
        .route("/v1/shards", get(shards))
        .route("/v1/recover", post(recover::handle).layer(DefaultBodyLimit::max(MAX_BODY_BYTES)))
        .fallback(not_found)
        .layer(middleware::from_fn_with_state(password, authenticate))
        .with_state(source)
}

/// The running server. Dropping it stops it too, only a moment later.
#[derive(Debug)]
pub struct AdminServer {
    accepting: tokio::task::JoinHandle<()>,
}

impl AdminServer {
    /// Serves `router` on `listener`.
    pub fn start(listener: tokio::net::TcpListener, router: Router) -> AdminServer {
        AdminServer::start_with(listener, router, REQUEST_TIMEOUT)
    }
    fn start_with(listener: tokio::net::TcpListener, router: Router, head: Duration) -> AdminServer {
        AdminServer { accepting: tokio::spawn(accept(listener, router, head)) }
    }
    /// Stops; answers under way are cut off. The address is free when this returns.
    pub async fn stop(mut self) {
        self.accepting.abort();
        // The error is the cancellation that was just asked for.
        let _ = (&mut self.accepting).await;
    }
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Accepts connections. axum's own `serve` bounds neither their number nor their time, hence this loop.
async fn accept(listener: tokio::net::TcpListener, router: Router, head: Duration) {
    let waiting = Newcomers::new(MAX_WAITING, MAX_WAITING_OF_ONE);
    let places = Arc::new(Semaphore::new(MAX_REQUESTS));
    // Owning the connections here ends them with this task.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        while connections.len() >= MAX_WAITING + MAX_REQUESTS + MAX_CLOSING {
            connections.join_next().await;
        }
        let (stream, addr) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: accepting again at once would spin.
                tracing::warn!(%error, "the admin API cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (newcomer, expulsion) = waiting.admit(addr.ip());
        let arrival = Arrival { newcomer: Mutex::new(Some(newcomer)), places: places.clone(), place: Mutex::default() };
        connections.spawn(serve_one(stream, router.clone(), arrival, expulsion, head));
    }
}

/// What a connection counts as: a newcomer until its request's head is here, then, health apart, as a request.
#[derive(Debug)]
struct Arrival {
    newcomer: Mutex<Option<Newcomer>>,
    places: Arc<Semaphore>,
    /// Kept until the connection ends: an answer that nobody reads takes memory, too.
    place: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Arrival {
    /// A request's head is here; false if there is no place for it.
    fn head(&self, path: &str) -> bool {
        self.newcomer.lock().expect("no panic while held").take();
        if is_health(path) {
            return true;
        }
        let place = self.places.clone().try_acquire_owned().ok();
        let mut held = self.place.lock().expect("no panic while held");
        *held = place;
        held.is_some()
    }

    fn is_waiting(&self) -> bool {
        self.newcomer.lock().expect("no panic while held").is_some()
    }
}

/// Serves one connection: heads of at most 8 KiB that arrive within `head`, short bodies, one request.
async fn serve_one(
    stream: tokio::net::TcpStream,
    router: Router,
    arrival: Arrival,
    expulsion: Expulsion,
    head: Duration,
) {
    let router = hyper_util::service::TowerToHyperService::new(router);
    let service = hyper::service::service_fn(|request: hyper::Request<hyper::body::Incoming>| {
        let answer = match arrival.head(request.uri().path()) {
            true => Ok(hyper::service::Service::call(&router, request)),
            false => Err(reason_503("too many requests at once: ask again".to_owned())),
        };
        async {
            match answer {
                Ok(answer) => answer.await,
                Err(busy) => Ok(busy),
            }
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(hyper_util::rt::TokioTimer::new())
        .header_read_timeout(head)
        .max_buf_size(8 * 1024)
        .max_headers(64)
        // One request a connection: no client can hold a place for long, and scrapers do not mind.
        .keep_alive(false)
        .serve_connection(hyper_util::rt::TokioIo::new(stream), service);
    let expelled = async {
        expulsion.told().await;
        // Its head may have come at the same moment.
        if !arrival.is_waiting() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        biased;
        // The head, the answer's making and its writing together; a reader that stalls loses its connection.
        served = tokio::time::timeout(CONNECTION_TIMEOUT, connection) => if served.is_err() {
            tracing::debug!("an admin connection took too long and was closed");
        },
        () = expelled => tracing::debug!("an admin connection without a request was closed for a newer one"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crema_core::{ClusterUuid, Epoch, Incarnation, LogIndex, ReplicaId, SlotRange, Term};
    use crema_shard::host::OwnReplica;
    use crema_shard::{NodeAddrs, NodeRoute, ShardRoute, ShardStatus};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A node that answers what a test wants.
    pub(crate) struct Fake {
        pub(crate) alive: Result<(), String>,
        pub(crate) draining: bool,
        pub(crate) rivalry: Option<String>,
        pub(crate) view: RoutingView,
        pub(crate) status: HostStatus,
        pub(crate) members: Option<Vec<GossipMember>>,
        pub(crate) facts: Facts,
    }

    impl AdminSource for Fake {
        fn alive(&self) -> Result<(), String> {
            self.alive.clone()
        }
        fn draining(&self) -> bool {
            self.draining
        }
        fn rivalry(&self) -> Option<String> {
            self.rivalry.clone()
        }
        fn view(&self) -> Arc<RoutingView> {
            Arc::new(self.view.clone())
        }
        fn host_status(&self) -> BoxFuture<'_, Result<HostStatus, String>> {
            Box::pin(std::future::ready(Ok(self.status.clone())))
        }
        fn members(&self) -> Option<Vec<GossipMember>> {
            self.members.clone()
        }
        fn metrics(&self) -> BoxFuture<'_, String> {
            Box::pin(std::future::ready("# EOF\n".to_owned()))
        }
        fn facts(&self) -> &Facts {
            &self.facts
        }
        fn change_voters(&self, node: NodeId, _: bool) -> BoxFuture<'_, VoterResult> {
            let refusal = crema_shard::VoterError::Refused(format!("node {node} is the last voter"));
            Box::pin(std::future::ready(if node == NodeId(1) { Err(refusal) } else { Ok(()) }))
        }
        fn recover(&self, what: Recover) -> BoxFuture<'_, Result<RecoverResult, String>> {
            let nothing =
                crema_shard::recovery::Recovered { missing: what.stopped.into_iter().collect(), ..Default::default() };
            let answer = if what.accept_data_loss { Err("not here".to_owned()) } else { Ok(nothing) };
            Box::pin(std::future::ready(Ok(answer)))
        }
    }

    fn node(n: u64, live: bool) -> NodeRoute {
        NodeRoute {
            incarnation: Incarnation(u128::from(n)),
            fenced: vec![],
            addrs: NodeAddrs {
                raft: format!("127.0.0.1:900{n}"),
                redis: Some(format!("127.0.0.1:637{n}")),
                ..NodeAddrs::default()
            },
            live,
            draining: false,
            approved: true,
        }
    }

    /// Node 1 of three; node 3 is down. Shard 1's replica on node 2 belongs to an earlier life, that on node 3 is empty.
    pub(crate) fn fake() -> Fake {
        let replica = |n: u64, standing| (NodeId(n), ReplicaId::new(1, n as u32), standing);
        let route = |start, end, leader, [two, three]: [Standing; 2]| ShardRoute {
            range: SlotRange { start, end },
            leader,
            term: Term(3),
            published: None,
            own_term: Term(3),
            replicas: vec![replica(1, Standing::Voter), replica(2, two), replica(3, three)],
            down: None,
        };
        let shards = vec![
            route(0, 8192, Some(NodeId(1)), [Standing::Voter; 2]),
            route(8192, 16384, None, [Standing::Lost, Standing::Learner]),
        ];
        let own = OwnReplica {
            applied: LogIndex(812),
            digest: 0x9f,
            keys: 5,
            bytes: 640,
            asleep: false,
            leads: true,
            log_entries: 1,
        };
        let status = |shard: u32, own| ShardStatus {
            shard: ShardId(shard),
            leader: shards[shard as usize].leader,
            term: Term(3),
            own,
            replicas: shards[shard as usize].replicas.clone(),
            sent_bytes: None,
        };
        let status = HostStatus {
            uuid: Some(ClusterUuid(7)),
            epoch: Epoch(4),
            shards: vec![status(0, Some(own)), status(1, None)],
            meta_leader: Some(NodeId(2)),
            meta: vec![],
            moves_open: 0,
            counters: vec![("proposals", 12)],
        };
        let heard = |n: u64, state| GossipMember {
            node: NodeId(n),
            state,
            incarnation: Incarnation(u128::from(n)).to_string(),
            raft_addr: format!("127.0.0.1:900{n}"),
            gossip_addr: format!("127.0.0.1:800{n}"),
            redis_addr: None,
            redis_cluster_addr: None,
            http_addr: None,
            metadata: BTreeMap::from([("zone".to_owned(), format!("z{n}"))]),
        };
        Fake {
            alive: Ok(()),
            draining: false,
            rivalry: None,
            view: RoutingView {
                this: NodeId(1),
                uuid: Some(ClusterUuid(7)),
                epoch: Epoch(4),
                shards,
                nodes: BTreeMap::from([
                    (NodeId(1), node(1, true)),
                    (NodeId(2), node(2, true)),
                    (NodeId(3), node(3, false)),
                ]),
                meta_leader: Some(NodeId(2)),
                generation: 1,
                ..RoutingView::default()
            },
            status,
            members: Some(vec![heard(1, "alive"), heard(2, "alive"), heard(3, "dead"), heard(9, "alive")]),
            facts: Facts {
                cluster: "test".to_owned(),
                node: NodeId(1),
                incarnation: Incarnation(1).to_string(),
                replicas: 3,
                raft_addr: "127.0.0.1:9001".to_owned(),
                gossip_addr: Some("127.0.0.1:8001".to_owned()),
                metadata: BTreeMap::new(),
            },
        }
    }

    async fn serve(fake: Fake) -> (AdminServer, std::net::SocketAddr) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        (AdminServer::start(listener, router(Arc::new(fake), None)), addr)
    }

    async fn raw(addr: std::net::SocketAddr, request: &[u8]) -> String {
        let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn get(addr: std::net::SocketAddr, path: &str) -> (u16, String) {
        let answer = raw(addr, format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn with_a_password_only_health_is_open() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let secret = Secret::new("s3cret");
        let _server = AdminServer::start(listener, router(Arc::new(fake()), Some(secret.clone())));
        for path in ["/livez", "/readyz"] {
            assert_ne!(get(addr, path).await.0, 401, "{path}");
        }
        for path in ["/metrics", "/v1/status", "/v1/shards", "/v1/nowhere", "/"] {
            assert_eq!(get(addr, path).await.0, 401, "{path}");
        }
        for (given, code) in [("Bearer s3cret", 200), ("Bearer s3cre", 401), ("Bearer s3cret2", 401), ("s3cret", 401)] {
            let request = format!("GET /v1/status HTTP/1.1\r\nHost: x\r\nAuthorization: {given}\r\n\r\n");
            assert_eq!(raw(addr, request.as_bytes()).await[9..12].parse(), Ok(code), "{given}");
        }
        let body = r#"{"node_id":4,"approved":true}"#;
        let post = |bearer: &str| {
            let length = body.len();
            let kind = "Content-Type: application/json";
            format!("POST /v1/voters HTTP/1.1\r\nHost: x\r\n{bearer}{kind}\r\nContent-Length: {length}\r\n\r\n{body}")
        };
        assert!(raw(addr, post("").as_bytes()).await.starts_with("HTTP/1.1 401"));
        assert!(raw(addr, post("Authorization: Bearer s3cret\r\n").as_bytes()).await.starts_with("HTTP/1.1 200"));
        // As the client commands ask.
        let door = |password| crate::cli::Door { addr: addr.to_string(), password };
        let ask = |password| {
            let door = door(password);
            tokio::task::spawn_blocking(move || crate::cli::http_get(&door, "/v1/status", 1 << 20).unwrap().0)
        };
        assert_eq!(ask(Some(secret)).await.unwrap(), 200);
        assert_eq!(ask(None).await.unwrap(), 401);
    }

    #[tokio::test]
    async fn shapes_are_those_scripts_rely_on() {
        let (_server, addr) = serve(fake()).await;
        let json = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();

        let (code, body) = get(addr, "/v1/shards").await;
        assert_eq!(code, 200);
        let shards = json(body);
        assert_eq!(
            shards[0],
            serde_json::json!({"shard":0,"leader":1,"term":3,"applied":812,"digest":"000000000000009f","keys":5,"bytes":640,
                "asleep":false,"first_slot":0,"last_slot":8191,"down":null,"lost":false,"replicas":[
                {"node":1,"replica":(1u64<<32)+1,"role":"voter"},{"node":2,"replica":(1u64<<32)+2,"role":"voter"},
                {"node":3,"replica":(1u64<<32)+3,"role":"voter"}]})
        );
        for key in ["leader", "applied", "digest", "keys", "bytes", "asleep"] {
            assert!(shards[1][key].is_null(), "{key}");
        }
        assert_eq!(shards[1]["replicas"][1]["role"], "outgoing");
        assert_eq!(shards[1]["replicas"][2]["role"], "learner");

        // Only a POST of what it knows changes anything; a browser cannot be made to send one of this type.
        let post = |kind: &str, body: &str| {
            let length = body.len();
            format!(
                "POST /v1/recover HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}"
            )
        };
        let answer = raw(addr, post("application/json", r#"{"stopped":[2]}"#).as_bytes()).await;
        assert!(answer.contains(" 200 ") && answer.contains(r#""missing":[2]"#), "{answer}");
        let answer = raw(addr, post("application/json", r#"{"accept_data_loss":true}"#).as_bytes()).await;
        assert!(answer.contains(" 409 ") && answer.contains("not here"), "{answer}");
        for (kind, body) in [("text/plain", "{}"), ("application/json", "{"), ("application/json", r#"{"force":true}"#)]
        {
            let answer = raw(addr, post(kind, body).as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
        }
        assert_eq!(get(addr, "/v1/recover").await.0, 405);

        let members = json(get(addr, "/v1/members").await.1);
        assert_eq!(members[0]["node_id"], 1);
        assert_eq!(members[1]["metadata"]["zone"], "z2");
        assert_eq!(members[1]["incarnation"], "00000000000000000000000000000002");
        assert_eq!((&members[2]["state"], &members[2]["voter"]), (&"dead".into(), &true.into()));
        // Discovered by gossip, not approved.
        assert_eq!((&members[3]["node_id"], &members[3]["voter"]), (&9.into(), &false.into()));

        let status = json(get(addr, "/v1/status").await.1);
        for (key, value) in [
            ("cluster", "test".into()),
            ("node_id", 1.into()),
            ("ready", true.into()),
            ("shards", 2.into()),
            ("leaders", 1.into()),
            ("leaderless", 1.into()),
            ("meta_leader", 2.into()),
        ] {
            let value: serde_json::Value = value;
            assert_eq!(status[key], value, "{key}");
        }
        assert_eq!(status["uuid"], "00000000000000000000000000000007");
        assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
        // Node 3 is down, so shard 0 has two replicas standing; shard 1's on node 2 is of an earlier life.
        assert_eq!(
            status["replication"],
            serde_json::json!([{"shards":1,"standing":1,"wanted":3},{"shards":1,"standing":2,"wanted":3}])
        );

        let voters = json(get(addr, "/v1/voters").await.1);
        assert_eq!(voters.as_array().unwrap().len(), 3);
        assert_eq!((&voters[2]["connected"], &voters[2]["replicas"]), (&false.into(), &2.into()));
    }

    #[tokio::test]
    async fn health_says_why() {
        let (_server, addr) = serve(fake()).await;
        assert_eq!(get(addr, "/livez").await.0, 200);
        assert_eq!(get(addr, "/readyz").await.0, 200);
        let not_joined = Fake { view: RoutingView { not_ready: Some("joining".into()), ..fake().view }, ..fake() };
        let (_server, addr) = serve(not_joined).await;
        assert_eq!(get(addr, "/livez").await.0, 200);
        assert_eq!(get(addr, "/readyz").await, (503, r#"{"reason":"joining"}"#.to_owned()));
        // What it waits for is not why: another process is in its place.
        let not_joined = RoutingView { not_ready: Some("founding".into()), ..fake().view };
        let (_server, addr) = serve(Fake { rivalry: Some("in use".into()), view: not_joined, ..fake() }).await;
        assert_eq!(get(addr, "/livez").await.0, 200);
        assert_eq!(get(addr, "/readyz").await, (503, r#"{"reason":"in use"}"#.to_owned()));
        let (_server, addr) = serve(Fake { draining: true, ..fake() }).await;
        assert!(get(addr, "/readyz").await.1.contains("about to stop"));
        let (_server, addr) = serve(Fake { alive: Err("gossip has stopped".into()), ..fake() }).await;
        assert_eq!(get(addr, "/livez").await, (503, r#"{"reason":"gossip has stopped"}"#.to_owned()));
        assert_eq!(get(addr, "/readyz").await.0, 503);
    }

    #[tokio::test]
    async fn only_short_gets_are_served() {
        let (_server, addr) = serve(fake()).await;
        assert_eq!(get(addr, "/nowhere").await.0, 404);
        assert!(raw(addr, b"POST /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.contains(" 405 "));
        let long = format!("GET /livez HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "a".repeat(64 * 1024));
        assert!(!raw(addr, long.as_bytes()).await.contains(" 200 "));
        assert!(!raw(addr, b"\x00\xff\r\n\r\n").await.contains(" 200 "));
        assert_eq!(get(addr, "/livez").await.0, 200, "it still serves");
        let metrics = raw(addr, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(metrics.contains("openmetrics-text") && metrics.ends_with("# EOF\n"), "{metrics}");
    }

    /// Nothing here waits this long unless it is broken.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// A server that would wait for heads for ever, so that only newer connections can end those without one.
    async fn patient(source: Arc<dyn AdminSource>) -> (AdminServer, std::net::SocketAddr) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        (AdminServer::start_with(listener, router(source, None), Duration::from_secs(86_400)), addr)
    }

    #[tokio::test]
    async fn idle_connections_cannot_shut_others_out() {
        let told = async {
            let (_server, addr) = patient(Arc::new(fake())).await;
            let mut idle = Vec::new();
            for i in 0..2 * (MAX_WAITING + MAX_REQUESTS) {
                let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
                // Some have begun to speak, which is not enough.
                let (said, rest) = ("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").split_at(if i % 2 == 0 { 20 } else { 0 });
                stream.write_all(said.as_bytes()).await.unwrap();
                idle.push((stream, rest));
            }
            for path in ["/livez", "/readyz", "/v1/status"] {
                assert_eq!(get(addr, path).await.0, 200, "{path}");
            }
            // The newest are still heard: one place was enough for those who spoke.
            let newest = idle.split_off(idle.len() - (MAX_WAITING_OF_ONE - 1));
            for (mut stream, rest) in newest {
                stream.write_all(rest.as_bytes()).await.unwrap();
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).await.unwrap();
                assert!(answer.starts_with(b"HTTP/1.1 200"), "it was closed for none");
            }
            // The others were closed before, without a word.
            for (mut stream, _) in idle {
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer).await;
                assert!(answer.is_empty());
            }
        };
        tokio::time::timeout(PATIENCE, told).await.expect("answered, and closed");
    }

    #[tokio::test]
    async fn requests_that_take_long_shut_nobody_out_from_health() {
        let told = async {
            let (_server, addr) = patient(Arc::new(fake())).await;
            let head = "POST /v1/voters HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\
                Expect: 100-continue\r\n\r\n";
            let wanted = b"HTTP/1.1 100 Continue\r\n\r\n";
            let mut slow = Vec::new();
            for _ in 0..MAX_REQUESTS {
                let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
                stream.write_all(head.as_bytes()).await.unwrap();
                // Its body is waited for, and never comes.
                let mut answer = [0; 25];
                stream.read_exact(&mut answer).await.unwrap();
                assert_eq!(&answer, wanted);
                slow.push(stream);
            }
            assert_eq!(get(addr, "/v1/status").await.0, 503);
            assert_eq!(get(addr, "/livez").await.0, 200);
            assert_eq!(get(addr, "/readyz").await.0, 200);
            slow.pop();
            while get(addr, "/v1/status").await.0 != 200 {}
        };
        tokio::time::timeout(PATIENCE, told).await.expect("answered");
    }

    #[tokio::test]
    async fn a_body_that_nobody_reads_does_not_keep_its_connection() {
        let (_server, addr) = patient(Arc::new(fake())).await;
        let answer = raw(addr, b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n");
        let answer = tokio::time::timeout(PATIENCE, answer).await.expect("closed");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[test]
    fn without_gossip_members_come_from_placement() {
        let mut view = fake().view;
        view.nodes.remove(&NodeId(1));
        let members = members_body(&Fake { members: None, view, ..fake() });
        let states: Vec<_> = members.iter().map(|m| (m.node_id, m.state.as_str())).collect();
        assert_eq!(states, [(1, "alive"), (2, "alive"), (3, "dead")]);
        assert_eq!(members[0].raft_addr, "127.0.0.1:9001", "this node knows itself before it is registered");
    }

    #[test]
    fn shards_are_named_briefly() {
        let shards: Vec<ShardId> = (0..10).map(ShardId).collect();
        assert_eq!(name_shards(&shards), "0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
        assert_eq!(name_shards(&[ShardId(3), ShardId::META]), "3, the meta group");
    }
}
