//! One node without its shell: founding, placement, Raft groups and gateway behind one door.
//!
//! ```text
//!   life of a node:  founding --activate--> member --drain--> drained
//!                           \--join--> gateway --Register committed--> counted (its lost replicas stay lost)
//! ```
//!
//! Inputs change state and mark work; [`Host::poll`] does the work and returns [`Effects`]. A peer is *live* while beats
//! of it arrive; only a live node is routed to or given leadership.

use crate::coordinator::{Coordinator, GroupOptions, Round};
use crate::durable::Recovered;
use crate::effect::{
    Channel, ClientRequest, ClientResult, Completion, ConnId, Effects, Note, ReadLevel, Refusal, Send,
};
use crate::follower::{Due, FollowerReads};
use crate::founding::{Founding, FoundingConfig};
use crate::gateway::Gateway;
use crate::message::{
    Answer, Control, KIND_ANSWERS, KIND_CHUNK, KIND_CHUNK_ACK, KIND_CONTROL, KIND_RAFT, KIND_REQUESTS, MAX_FRAME_BYTES,
    Request, RequestBody, TARGET_FRAME_BYTES, decode_answers, decode_chunk, decode_chunk_ack, decode_control,
    decode_envelopes, decode_requests, encode_answer, encode_request, split_process,
};
use crate::meta::{MetaState, NodeAddrs, WHOLE_SHARE};
use crate::proposals::Ticket;
use crate::replica::{MemoryOptions, ReadMode};
use crate::router::{Router, RoutingView};
use crate::timing::Timing;
use bytes::Bytes;
use crema_core::{
    ClusterUuid, CodecError, Epoch, Incarnation, LogIndex, MonoTime, NodeId, Now, Outcome, ReplicaId, Reply, ShardId,
    Term,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

mod leading;
mod placing;
mod recovering;
mod table;
mod view;

use placing::Placing;
pub use placing::{AutoVoters, VoterError, VoterRequest, VoterResult};
use recovering::Recovering;
pub use view::{HostStatus, OwnReplica, ShardStatus};

/// Period of looking for leaderships to move.
const BALANCE: Duration = Duration::from_secs(1);
/// Most leaderships moved at once for balance; a drain moves all.
const LEADERS_AT_ONCE: usize = 16;
/// Lives of one node whose last sign is remembered.
const LIVES_HEARD: usize = 4;
/// A bounded read's round without an answer for this long is given up; the leader answers instead.
const INDEX_TIMEOUT: Duration = Duration::from_millis(500);
/// Kind of the marks of such rounds, beside those of [`crate::gateway`].
const KIND_INDEX: u64 = 3 << 62;

/// What a node is told at its start.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// This node's id.
    pub node: NodeId,
    /// This life.
    pub incarnation: Incarnation,
    /// The cluster's name.
    pub cluster: String,
    /// The nodes that found the cluster together, this one included if it is one of them.
    pub initial_members: Vec<NodeId>,
    /// The cluster that this node has been a member of: it founds none, and joins no other.
    pub uuid: Option<ClusterUuid>,
    /// The latest generation of that cluster's table that this node has known, 0 for none.
    pub generation: u32,
    /// Data shards to found the cluster with, 1 to 16,384.
    pub shards: u32,
    /// Replicas of each shard, 1 to 7; at most one a node.
    pub replication: u32,
    /// Own addresses.
    pub addrs: NodeAddrs,
    /// Random bits: the uuid and the hash secret of a cluster that this node founds are made of them.
    pub entropy: [u64; 3],
    /// Periods.
    pub timing: Timing,
    /// Most bytes of log kept over all groups for voters that lag; beyond, entries that a quorum has are dropped.
    pub max_log_bytes: usize,
    /// How this node, where it leads, confirms linearizable reads. Promises are kept either way, so nodes may differ.
    pub read_mode: ReadMode,
    /// About how many bytes of records one piece of a state holds on its way to another replica or to a file.
    pub snapshot_chunk_bytes: usize,
    /// Number of this process: different for every start, also of one that keeps its life because it kept its log.
    pub process: u64,
    /// Where logs are kept on disk: bytes of log, over all groups, behind which states are written to files.
    pub checkpoint_log_bytes: Option<u64>,
    /// Limits of memory.
    pub memory: MemoryOptions,
    /// When voters change without an operator, should this node lead the meta group; set it alike on all nodes.
    pub auto_voters: AutoVoters,
}

/// A claim of leadership heard by gossip. A hint: the highest term wins, Raft decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaderHint {
    /// The shard.
    pub shard: ShardId,
    /// Who claims to lead it.
    pub leader: NodeId,
    /// In which term.
    pub term: Term,
}

struct Peer {
    incarnation: Incarnation,
    last_heard: MonoTime,
    live_since: Option<MonoTime>,
    epoch: Epoch,
}

/// One node's coordinator, gateway, founding and placement. Feed it inputs, then call [`Host::poll`].
pub struct Host {
    config: HostConfig,
    coordinator: Coordinator,
    gateway: Gateway,
    followers: FollowerReads,
    next_round: u64,
    router: Router,
    founding: Founding,
    state: Option<Arc<MetaState>>,
    peers: BTreeMap<NodeId, Peer>,
    /// When the last few lives of each node were last heard, for the refusal of duplicate ids.
    heard: BTreeMap<NodeId, Vec<(Incarnation, MonoTime)>>,
    view: Arc<RoutingView>,
    view_stale: bool,
    view_sent: bool,
    out: Effects,
    requests: Vec<(NodeId, Request)>,
    round: Round,
    next_raft_tick: MonoTime,
    next_beat: MonoTime,
    next_ask: MonoTime,
    next_balance: MonoTime,
    /// Where among the groups asking for leaders goes on.
    next_asked: usize,
    last_id_note: Option<MonoTime>,
    draining: bool,
    drained: bool,
    frames_refused: u64,
    requests_forwarded: u64,
    digest_mismatches: u64,
    replicas_failed: u64,
    recovering: Recovering,
    placing: Placing,
    /// How much of its memory this node can use for data at present, in parts of [`WHOLE_SHARE`].
    share: u8,
}

impl Host {
    /// A node at the beginning of its life. `config` is taken as validated by the shell.
    pub fn new(mut config: HostConfig, now: Now) -> Host {
        config.initial_members.sort_unstable();
        config.initial_members.dedup();
        let founding = Founding::new(FoundingConfig {
            node: config.node,
            incarnation: config.incarnation,
            addrs: config.addrs.clone(),
            cluster: config.cluster.clone(),
            members: if config.uuid.is_none() { config.initial_members.clone() } else { Vec::new() },
            uuid: config.uuid,
            shards: config.shards,
            replication: config.replication,
            entropy: config.entropy,
        });
        let coordinator = Coordinator::new(GroupOptions {
            node: config.node,
            incarnation: config.incarnation,
            timing: config.timing,
            max_log_bytes: config.max_log_bytes,
            read_mode: config.read_mode,
            chunk_bytes: config.snapshot_chunk_bytes,
            process: config.process,
            checkpoint_log_bytes: config.checkpoint_log_bytes,
            memory: config.memory,
        });
        Host {
            coordinator,
            gateway: Gateway::default(),
            followers: FollowerReads::default(),
            next_round: 0,
            router: Router::default(),
            founding,
            state: None,
            peers: BTreeMap::new(),
            heard: BTreeMap::new(),
            view: Arc::new(RoutingView {
                this: config.node,
                not_ready: Some("starting".into()),
                ..RoutingView::default()
            }),
            view_stale: true,
            view_sent: false,
            out: Effects::default(),
            requests: Vec::new(),
            round: Round::default(),
            next_raft_tick: now.mono.after(config.timing.tick),
            next_beat: now.mono,
            next_ask: now.mono,
            next_balance: now.mono.after(BALANCE),
            next_asked: 0,
            last_id_note: None,
            draining: false,
            drained: false,
            frames_refused: 0,
            requests_forwarded: 0,
            digest_mismatches: 0,
            replicas_failed: 0,
            recovering: Recovering::default(),
            placing: Placing::default(),
            share: WHOLE_SHARE,
            config,
        }
    }

    /// A node that comes back with what it kept on disk, in the same life. Returns the node, and the replicas that cannot
    /// be trusted: with any of them, its life is over, and the shell must begin a new one instead.
    pub fn recovered(config: HostConfig, recovered: Vec<Recovered>, now: Now) -> (Host, Vec<(ShardId, String)>) {
        // Whoever has been a member founds nothing, even if it died before it wrote down of which cluster.
        let members = if recovered.is_empty() { config.initial_members.clone() } else { Vec::new() };
        let mut host = Host::new(HostConfig { initial_members: members, ..config }, now);
        let lost = host.coordinator.recover(recovered, now);
        if let Some(state) = host.coordinator.meta_state() {
            host.join(state, false, false, now);
        }
        (host, lost)
    }

    /// Takes a client's request; its completion comes with a later [`Host::poll`], once and only once.
    pub fn submit(&mut self, now: Now, request: ClientRequest) {
        let refusal = match &self.state {
            None => Some(Refusal::NotReady),
            Some(_) if request.deadline <= now.mono => Some(Refusal::Busy(request.shard)),
            Some(_) if request.write || request.level == ReadLevel::Linearizable => self.refusal_of_lost(request.shard),
            Some(_) => None,
        };
        match refusal {
            Some(r) => {
                let result = ClientResult::NotApplied(r);
                self.out.completions.push(Completion { conn: request.conn, token: request.token, result });
            }
            None => match request.level {
                ReadLevel::Linearizable => self.gateway.submit(request, &mut self.out.completions),
                _ if request.write => self.gateway.submit(request, &mut self.out.completions),
                level => self.submit_relaxed(request, level, now),
            },
        }
    }

    /// A read that a replica of this node may answer though it does not lead; else its leader does.
    fn submit_relaxed(&mut self, request: ClientRequest, level: ReadLevel, now: Now) {
        let mut due = Due::default();
        let follows = self.coordinator.replica(request.shard).is_some_and(|r| !r.failed() && !r.leadership().leads);
        match level {
            ReadLevel::Local => due.answer.push(request),
            ReadLevel::Bounded(max_age) if follows => self.followers.submit(request, max_age, now.mono, &mut due),
            _ => due.linearizable.push(request),
        }
        self.settle_relaxed(due);
    }

    fn settle_relaxed(&mut self, due: Due) {
        let Due { answer, mut linearizable } = due;
        for request in answer {
            match self.coordinator.replica(request.shard).and_then(|r| r.observe(&request.ops)) {
                Some(reply) => {
                    let result = crate::gateway::result_of(reply);
                    self.out.completions.push(Completion { conn: request.conn, token: request.token, result });
                }
                None => linearizable.push(request),
            }
        }
        for request in linearizable {
            self.gateway.submit(request, &mut self.out.completions);
        }
    }

    /// Rounds of bounded reads: begins those that are wanted, and answers what their indexes cover.
    fn relaxed_reads(&mut self, now: Now) {
        let mut due = Due::default();
        for shard in self.followers.confirmed() {
            let Some(replica) = self.coordinator.replica(shard) else { continue };
            if let Some(issued) = self.followers.applied(shard, replica.applied(), now.mono, &mut due)
                && let Some(published) = replica.published()
            {
                published.set_fresh(issued);
            }
        }
        for shard in self.followers.wanting() {
            self.next_round += 1;
            let mark = KIND_INDEX | self.next_round;
            self.followers.began(shard, mark, now.mono);
            match self.router.claim(shard).leader {
                Some(leader) => self.requests.push((leader, Request { shard, id: mark, body: RequestBody::ReadIndex })),
                None => self.followers.answered(shard, mark, None, &mut due),
            }
        }
        self.settle_relaxed(due);
    }

    /// The connection is gone: what it has not sent on is forgotten, and nothing of it is completed any more, but for what
    /// the next [`Host::poll`] was to bring already.
    pub fn connection_closed(&mut self, conn: ConnId) {
        self.gateway.connection_closed(conn);
        self.followers.connection_closed(conn);
    }

    /// Both outgoing streams to `peer` stand, and its process is `incarnation`.
    pub fn peer_up(&mut self, now: Now, peer: NodeId, incarnation: Incarnation) {
        if peer == self.config.node {
            return;
        }
        self.peers
            .insert(peer, Peer { incarnation, last_heard: now.mono, live_since: Some(now.mono), epoch: Epoch(0) });
        self.coordinator.set_connected(peer, Some(incarnation));
        if self.state.is_none() {
            let sends = self.founding.peer_up(peer, incarnation);
            self.control_all(sends);
        }
        let epoch = self.told_epoch();
        self.control(peer, &Control::Beat { epoch, share: self.share });
        self.node_back(now, peer);
    }

    /// The streams to `peer` are gone, or it was replaced; frames in flight may be lost.
    pub fn peer_down(&mut self, now: Now, peer: NodeId) {
        if self.peers.remove(&peer).is_none() {
            return;
        }
        self.founding.peer_down(peer);
        self.coordinator.set_connected(peer, None);
        self.node_lost(now, peer);
    }

    /// A node does not answer: no route leads there, groups with a voter there wake, and what was sent there is sent
    /// elsewhere.
    fn node_lost(&mut self, now: Now, node: NodeId) {
        self.coordinator.node_down(node);
        // Where it is short of memory it will say so again.
        if let Some(state) = &self.state {
            self.coordinator.set_share(node, WHOLE_SHARE, state);
        }
        self.router.node_gone(node);
        self.gateway.peer_lost(node, now.mono);
        // Rounds that it was asked for have no answer; of the others little is lost.
        let mut due = Due::default();
        self.followers.expire(now.mono, Duration::ZERO, &mut due);
        self.settle_relaxed(due);
        self.retarget_all(now);
        self.view_stale = true;
    }

    /// A frame of a peer. An error means that its sender cannot be trusted: drop the connection and count it.
    pub fn frame(
        &mut self,
        now: Now,
        peer: NodeId,
        incarnation: Incarnation,
        channel: Channel,
        frame: Bytes,
    ) -> Result<(), CodecError> {
        let result = self.take_frame(now, peer, incarnation, channel, frame);
        if result.is_err() {
            self.frames_refused += 1;
        }
        result
    }

    fn take_frame(
        &mut self,
        now: Now,
        peer: NodeId,
        incarnation: Incarnation,
        channel: Channel,
        frame: Bytes,
    ) -> Result<(), CodecError> {
        if peer == self.config.node || self.is_fenced(peer, incarnation) {
            return Ok(());
        }
        self.hear(now, peer, incarnation);
        let Some(kind) = frame.first().copied() else { return Err(CodecError::Malformed) };
        let body = frame.slice(1..);
        match (channel, kind) {
            (Channel::Raft, KIND_RAFT) => {
                let envelopes = decode_envelopes(&body)?;
                self.coordinator.step(peer, incarnation, envelopes, now);
            }
            (Channel::Raft, KIND_CONTROL) => {
                let control = decode_control(&body)?;
                self.take_control(now, peer, incarnation, control);
            }
            (Channel::Snapshot, KIND_CHUNK) => {
                let chunk = decode_chunk(&body)?;
                self.coordinator.take_chunk(peer, incarnation, &chunk, now);
            }
            (Channel::Snapshot, KIND_CHUNK_ACK) => {
                let ack = decode_chunk_ack(&body)?;
                self.coordinator.chunk_acked(peer, ack, now);
            }
            (Channel::Requests, KIND_REQUESTS) => {
                let (process, body) = split_process(&body)?;
                for r in decode_requests(&body)? {
                    self.serve(peer, incarnation, process, r);
                }
            }
            (Channel::Requests, KIND_ANSWERS) => {
                let (process, body) = split_process(&body)?;
                let answers = decode_answers(&body)?;
                if process == self.config.process {
                    for (shard, id, answer) in answers {
                        self.take_answer(now, peer, shard, id, answer);
                    }
                }
            }
            _ => return Err(CodecError::Malformed),
        }
        Ok(())
    }

    fn hear(&mut self, now: Now, node: NodeId, incarnation: Incarnation) {
        let lives = self.heard.entry(node).or_default();
        match lives.iter_mut().find(|(i, _)| *i == incarnation) {
            Some((_, at)) => *at = now.mono,
            None => {
                if lives.len() >= LIVES_HEARD {
                    lives.remove(0);
                }
                lives.push((incarnation, now.mono));
            }
        }
        let Some(p) = self.peers.get_mut(&node).filter(|p| p.incarnation == incarnation) else { return };
        p.last_heard = now.mono;
        if p.live_since.is_none() {
            p.live_since = Some(now.mono);
            self.node_back(now, node);
        }
    }

    /// A node answers (again): groups that still follow it lead there.
    fn node_back(&mut self, now: Now, node: NodeId) {
        let incarnation = self.peers.get(&node).map(|p| p.incarnation);
        let follow: Vec<(ShardId, Term)> = self
            .coordinator
            .replicas()
            .filter(|r| r.leadership().leader == Some(node))
            // Another life of the node leads nothing that its earlier one led.
            .filter(|r| r.members().all().any(|v| v.node == node && Some(v.incarnation) == incarnation))
            .map(|r| (r.shard(), r.leadership().term))
            .collect();
        for (shard, term) in follow {
            self.router.learn(shard, Some(node), term);
        }
        self.retarget_all(now);
        self.view_stale = true;
    }

    fn is_fenced(&self, node: NodeId, incarnation: Incarnation) -> bool {
        self.state.as_ref().and_then(|s| s.nodes.get(&node)).is_some_and(|n| n.past.contains(&incarnation))
    }

    fn serve(&mut self, origin: NodeId, incarnation: Incarnation, process: u64, r: Request) {
        let ticket = Ticket { origin, incarnation, process, id: r.id };
        // The meta group takes commands of its own leader only; anything else would be poison in its log.
        if r.shard.is_meta() {
            return;
        }
        match r.body {
            RequestBody::Write { tag, ops } => self.coordinator.write(r.shard, ticket, tag, ops),
            RequestBody::Read { ops } => self.coordinator.read(r.shard, ticket, ops),
            RequestBody::OpenSession => self.coordinator.open_session(r.shard, ticket),
            RequestBody::ReadIndex => self.coordinator.read(r.shard, ticket, Bytes::new()),
        }
    }

    fn take_answer(&mut self, now: Now, from: NodeId, shard: ShardId, id: u64, answer: Answer) {
        let hint = if id & KIND_INDEX == KIND_INDEX {
            self.take_index(shard, id, answer)
        } else {
            self.gateway.answer(shard, id, answer, now.mono, &mut self.out.completions)
        };
        if let Some((leader, term)) = hint {
            self.refused(shard, from, leader, term, now);
        }
    }

    /// `from` was asked and does not lead; perhaps it knows who does.
    fn refused(&mut self, shard: ShardId, from: NodeId, leader: Option<NodeId>, term: Term, now: Now) {
        let before = self.router.claim(shard);
        let own = self.coordinator.replica(shard).filter(|r| !r.is_empty() && !r.failed()).map(|r| r.leadership());
        if before.leader == Some(from) && term >= before.term {
            self.doubt(shard);
        }
        self.router.disown(shard, from, term);
        // Whoever names another does not lead.
        if let Some(l) = leader.filter(|l| *l != from) {
            self.learn(shard, Some(l), term);
        }
        if let Some(l) = own {
            let known = if l.leads { Some(self.config.node) } else { l.leader.filter(|n| self.is_live(*n)) };
            self.router.learn(shard, known, l.term);
        }
        if self.router.claim(shard) != before {
            self.route_changed(shard, now);
        }
    }

    /// The answer to a round of bounded reads; what a refusal says about the leader.
    fn take_index(&mut self, shard: ShardId, mark: u64, answer: Answer) -> Option<(Option<NodeId>, Term)> {
        let mut due = Due::default();
        let index = match answer {
            Answer::Outcome(Outcome::Reply(Reply::Int(index))) => Some(LogIndex(index as u64)),
            _ => None,
        };
        self.followers.answered(shard, mark, index, &mut due);
        self.settle_relaxed(due);
        match answer {
            Answer::NotLeader { leader, term } => Some((leader, term)),
            _ => None,
        }
    }

    /// Takes note of a leader that is not this node and is live; what this node leads its own replica tells.
    fn learn(&mut self, shard: ShardId, leader: Option<NodeId>, term: Term) -> bool {
        match leader {
            Some(l) if l == self.config.node || !self.is_live(l) => false,
            leader => self.router.learn(shard, leader, term),
        }
    }

    /// A frame to `peer` was dropped because its queue was full.
    pub fn send_dropped(&mut self, now: Now, peer: NodeId, channel: Channel) {
        match channel {
            Channel::Raft => self.coordinator.unreachable(peer),
            Channel::Requests => self.gateway.peer_lost(peer, now.mono),
            Channel::Snapshot => self.coordinator.filling_interrupted(peer),
        }
    }

    /// Takes a hint from gossip.
    pub fn leader_hint(&mut self, now: Now, hint: LeaderHint) {
        if hint.leader != self.config.node
            && self.is_live(hint.leader)
            && self.router.hear(hint.shard, hint.leader, hint.term)
        {
            self.route_changed(hint.shard, now);
        }
    }

    /// Gossip says that the node is dead or has left: routes to it are cleared, their terms kept. A node whose beats
    /// arrive is alive whatever gossip says.
    pub fn node_gone(&mut self, now: Now, node: NodeId) {
        if !self.is_live(node) {
            for shard in self.router.node_gone(node) {
                self.route_changed(shard, now);
            }
        }
    }

    /// This node can use so much of its memory for data at present, in parts of [`WHOLE_SHARE`]: the shell sees what is
    /// resident. Leaders hear of it with the next beat, and make their shards fit.
    pub fn set_memory_share(&mut self, now: Now, share: u8) {
        self.share = share.clamp(1, WHOLE_SHARE);
        self.next_beat = self.next_beat.min(now.mono);
        if let Some(state) = &self.state {
            self.coordinator.set_share(self.config.node, self.share, state);
        }
    }

    /// Begins a planned stop: marks this node draining and hands its leaderships over. `Note::Drained` tells the end.
    pub fn drain(&mut self, now: Now) {
        self.draining = true;
        self.next_ask = now.mono;
    }

    /// Hands the leadership of `shard` over to `to`'s replica. Returns whether that is under way: not if this node does not
    /// lead, or that replica is too far behind. Placement may move it back later. For the simulator: operators cannot ask
    /// for it yet.
    #[cfg(feature = "mutants")]
    pub fn transfer_leader(&mut self, shard: ShardId, to: NodeId) -> bool {
        let Some(replica) = self.coordinator.replica(shard) else { return false };
        let Some(id) = replica.members().voting().find(|v| v.node == to).map(|v| v.id) else { return false };
        self.coordinator.transfer(shard, id)
    }

    /// Groups that would lose their quorum if this node stopped now.
    pub fn needed_by(&self) -> Vec<ShardId> {
        self.coordinator.needed_by(|v| self.is_usable(v.node, v.incarnation))
    }

    fn is_live(&self, node: NodeId) -> bool {
        node == self.config.node || self.peers.get(&node).is_some_and(|p| p.live_since.is_some())
    }

    fn is_usable(&self, node: NodeId, incarnation: Incarnation) -> bool {
        if node == self.config.node {
            return incarnation == self.config.incarnation;
        }
        self.peers.get(&node).is_some_and(|p| p.live_since.is_some() && p.incarnation == incarnation)
    }

    fn epoch(&self) -> Epoch {
        self.state.as_ref().map_or(Epoch(0), |s| s.epoch)
    }

    /// The epoch that peers are told: none, while this node waits for the table from the one who has it for sure.
    fn told_epoch(&self) -> Epoch {
        if self.coordinator.waits_for_table() { Epoch(0) } else { self.epoch() }
    }

    // ---- time --------------------------------------------------------------------------------------------------

    /// Lets time pass; call at [`Host::next_tick`] or later. Several missed ticks count as one.
    pub fn tick(&mut self, now: Now) {
        let t = self.config.timing;
        if now.mono >= self.next_raft_tick {
            // Never a burst after a stall: heartbeats behind a burst would shorten what voters promised.
            self.next_raft_tick = now.mono.after(t.tick);
            self.coordinator.tick(now);
            self.gateway.tick(now.mono, &mut self.out.completions);
            let mut due = Due::default();
            self.followers.expire(now.mono, INDEX_TIMEOUT, &mut due);
            self.settle_relaxed(due);
            self.check_beats(now);
            if self.coordinator.waits_for_table()
                && self.coordinator.keeps_meta()
                && self.coordinator.knows_table()
                && let Some(state) = self.state.clone()
            {
                self.adopt(state, true, now);
            }
            self.keep_recovering(now);
            self.keep_placement(now);
            self.balance(now);
        }
        if now.mono >= self.next_beat {
            self.next_beat = now.mono.after(t.beat);
            let epoch = self.told_epoch();
            self.control_to_all(&Control::Beat { epoch, share: self.share });
        }
        if now.mono >= self.next_ask {
            self.next_ask = now.mono.after(t.ask_again);
            self.ask(now);
        }
        self.gateway.retry_due(now.mono);
    }

    /// When [`Host::tick`] is due.
    pub fn next_tick(&self) -> MonoTime {
        let due = self.next_raft_tick.min(self.next_beat).min(self.next_ask);
        self.gateway.next_due().map_or(due, |g| due.min(g))
    }

    fn check_beats(&mut self, now: Now) {
        let timeout = self.config.timing.beat_timeout;
        let mut lost = Vec::new();
        for (node, p) in &mut self.peers {
            if p.live_since.is_some() && now.mono.since(p.last_heard) >= timeout {
                p.live_since = None;
                lost.push(*node);
            }
        }
        for node in lost {
            self.node_lost(now, node);
        }
    }

    /// The batch is durable; batches are reported in order.
    pub fn persisted(&mut self, now: Now, number: u64) {
        self.coordinator.persisted(number, now);
    }

    /// A piece of a state was written to its file; the last one, when the whole file is durable.
    pub fn state_written(&mut self, shard: ShardId, replica: ReplicaId, file: u64, seq: u32) {
        self.coordinator.state_written(shard, replica, file, seq);
    }

    /// The log of a replica holds back files of the log on disk that could go otherwise.
    pub fn ask_checkpoint(&mut self, replica: ReplicaId) {
        self.coordinator.ask_checkpoint(replica);
    }

    // ---- work --------------------------------------------------------------------------------------------------

    /// Works off what the inputs have caused and adds what is to be done to `effects`. Call after every round of inputs,
    /// and again after [`Host::persisted`], until it adds nothing.
    pub fn poll(&mut self, now: Now, effects: &mut Effects) {
        let mut answers: Frames = BTreeMap::new();
        let mut forwards: Frames = BTreeMap::new();
        // Requests of this node to itself go round without leaving: gateway, leader, answer, gateway. What a group does
        // not finish at once waits for a message, so this ends; the bound is for the case that we are wrong.
        for _ in 0..64 {
            self.relaxed_reads(now);
            let mut requests = std::mem::take(&mut self.requests);
            self.gateway.poll(now.mono, &mut requests);
            let mut quiet = requests.is_empty();
            for (node, request) in requests.drain(..) {
                if node == self.config.node {
                    self.serve(node, self.config.incarnation, self.config.process, request);
                } else {
                    self.requests_forwarded += 1;
                    let to = (node, self.config.process);
                    append_frame(&mut self.out.sends, &mut forwards, to, KIND_REQUESTS, |f| {
                        encode_request(f, &request)
                    });
                }
            }
            self.requests = requests;
            let mut round = std::mem::take(&mut self.round);
            self.coordinator.poll(now, &mut round);
            for (to, frame) in round.frames.drain(..) {
                self.out.sends.push(Send { to, channel: Channel::Raft, frame });
            }
            for note in round.notes.drain(..) {
                match note {
                    Note::DigestMismatch { .. } => self.digest_mismatches += 1,
                    Note::ReplicaFailed { .. } => self.replicas_failed += 1,
                    _ => {}
                }
                self.out.notes.push(note);
            }
            self.out.garbage.append(&mut round.garbage);
            if let Some(batch) = round.persist.take() {
                self.out.persist.push(batch);
            }
            self.out.states.append(&mut round.states);
            for (to, frame) in round.snapshot_frames.drain(..) {
                self.out.sends.push(Send { to, channel: Channel::Snapshot, frame });
            }
            if std::mem::take(&mut round.meta_changed)
                && let Some(state) = self.coordinator.meta_state()
                // A replica that has just been filled may know less than was told before.
                && self.state.as_ref().is_none_or(|mine| state.version() >= mine.version())
            {
                self.adopt(state, true, now);
                let peers: Vec<NodeId> = self.peers.keys().copied().collect();
                peers.into_iter().for_each(|p| self.push_placement(p));
                self.retarget_all(now);
            }
            quiet &= round.roles.is_empty() && round.answers.is_empty();
            for shard in round.roles.drain(..) {
                self.leadership_changed(shard, now);
            }
            for (shard, ticket, answer) in round.answers.drain(..) {
                if ticket.origin == self.config.node {
                    if ticket.incarnation == self.config.incarnation && ticket.process == self.config.process {
                        self.take_answer(now, ticket.origin, shard, ticket.id, answer);
                    }
                } else if self.peers.get(&ticket.origin).is_some_and(|p| p.incarnation == ticket.incarnation) {
                    let to = (ticket.origin, ticket.process);
                    append_frame(&mut self.out.sends, &mut answers, to, KIND_ANSWERS, |f| {
                        let before = f.len();
                        encode_answer(f, shard, ticket.id, &answer);
                        if f.len() > MAX_FRAME_BYTES {
                            // Many large values in one reply. It happened, but its answer cannot travel.
                            f.truncate(before);
                            encode_answer(f, shard, ticket.id, &Answer::Outcome(Outcome::Unknown));
                        }
                    });
                }
            }
            self.round = round;
            if quiet {
                break;
            }
        }
        for ((to, _), frame) in forwards.into_iter().chain(answers) {
            self.out.sends.push(Send { to, channel: Channel::Requests, frame: frame.into() });
        }
        if self.view_stale {
            self.view_stale = false;
            let view = self.build_view();
            if view != *self.view || !self.view_sent {
                self.view_sent = true;
                self.view = Arc::new(view);
                self.out.view = Some(self.view.clone());
            }
        }
        let out = &mut self.out;
        effects.persist.append(&mut out.persist);
        effects.states.append(&mut out.states);
        effects.sends.append(&mut out.sends);
        effects.completions.append(&mut out.completions);
        effects.led.append(&mut out.led);
        effects.notes.append(&mut out.notes);
        effects.garbage.append(&mut out.garbage);
        effects.recoveries.append(&mut out.recoveries);
        effects.voters.append(&mut out.voters);
        if out.view.is_some() {
            effects.view = out.view.take();
        }
    }
}

/// Frames of the requests channel in the making: by receiver, and by the process whose requests they are about.
type Frames = BTreeMap<(NodeId, u64), Vec<u8>>;

/// Appends to a frame, closing it first when it is large enough.
fn append_frame(
    sends: &mut Vec<Send>,
    frames: &mut Frames,
    (node, process): (NodeId, u64),
    kind: u8,
    write: impl FnOnce(&mut Vec<u8>),
) {
    let frame = frames.entry((node, process)).or_default();
    if frame.len() >= TARGET_FRAME_BYTES {
        sends.push(Send { to: node, channel: Channel::Requests, frame: std::mem::take(frame).into() });
    }
    if frame.is_empty() {
        frame.push(kind);
        frame.extend_from_slice(&process.to_le_bytes());
    }
    write(frame);
}

#[cfg(test)]
mod tests;
