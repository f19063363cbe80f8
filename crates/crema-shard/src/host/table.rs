//! How a node comes to know the table of nodes and groups, has itself registered in it, and passes it on.

use super::{Host, placing::VoterError};
use crate::effect::{Channel, Note, Send};
use crate::founding::Decision;
use crate::message::{Control, encode_control};
use crate::meta::{MAX_NODES, MetaCommand, MetaState, NodeAddrs, WHOLE_SHARE};
use crema_core::mutant::{Mutant, planted};
use crema_core::{Incarnation, MonoTime, NodeId, Now, ShardId};
use std::sync::Arc;
use std::time::Duration;

/// An id in use is reported to the shell this often at most.
const NOTE_EVERY: Duration = Duration::from_secs(1);

impl Host {
    pub(super) fn control(&mut self, to: NodeId, c: &Control) {
        self.out.sends.push(Send { to, channel: Channel::Raft, frame: encode_control(c) });
    }

    pub(super) fn control_all(&mut self, sends: Vec<(NodeId, Control)>) {
        for (to, c) in sends {
            self.control(to, &c);
        }
    }

    pub(super) fn take_control(&mut self, now: Now, from: NodeId, incarnation: Incarnation, c: Control) {
        if let Control::Beat { epoch, share } = c {
            if let Some(p) = self.peers.get_mut(&from).filter(|p| p.incarnation == incarnation) {
                p.epoch = epoch;
                if let Some(state) = &self.state {
                    self.coordinator.set_share(from, share.clamp(1, WHOLE_SHARE), state);
                }
            }
            self.push_placement(from);
            return;
        }
        let Some(c) = self.take_recovery(now, from, incarnation, c) else { return };
        let Some(state) = self.state.clone() else {
            let (sends, decision) = self.founding.receive(from, c, now.wall);
            self.control_all(sends);
            if let Some(d) = decision {
                self.decided(d, now);
            }
            return;
        };
        match c {
            Control::Ask | Control::Propose { .. } => {
                let answer = Control::Answer { state: Some(state.encode()), addrs: self.config.addrs.clone() };
                self.control(from, &answer);
            }
            Control::Answer { state: Some(bytes), .. } => self.take_placement(&bytes, false, now),
            Control::Placement { state: bytes } => self.take_placement(&bytes, true, now),
            Control::Register { addrs, max_memory } => self.register(from, incarnation, addrs, max_memory, now),
            Control::RegisterRefused { refused, by } => {
                let mine = refused == self.config.incarnation;
                if mine && self.last_id_note.is_none_or(|t| now.mono.since(t) >= NOTE_EVERY) {
                    self.last_id_note = Some(now.mono);
                    self.out.notes.push(Note::IdInUse { by });
                }
            }
            Control::SetDraining { draining } => self.set_draining(from, incarnation, draining),
            Control::Approve { round, node, approved } => self.take_approve(from, round, node, approved, now),
            Control::Approved { round } => self.take_approve_answer(round, Ok(())),
            Control::ApproveRefused { round, reason } => {
                self.take_approve_answer(round, Err(VoterError::Refused(reason)));
            }
            Control::ApproveNotNow { round, reason } => {
                self.take_approve_answer(round, Err(VoterError::NotNow(reason)));
            }
            Control::ApproveNotJoined { round, node } => {
                self.take_approve_answer(round, Err(VoterError::NotJoined(node)));
            }
            Control::Settled { shard, epoch, members } => self.settle(shard, epoch, members),
            Control::AskLeaders { groups } => self.tell_leaders(from, &groups),
            Control::Leads { groups } => self.take_leaders(from, incarnation, groups, now),
            // Of foundings and recoveries that are over.
            _ => {}
        }
    }

    fn decided(&mut self, decision: Decision, now: Now) {
        let (state, founded) = match decision {
            Decision::Activate(s) => (Arc::new(*s), true),
            Decision::Join(s) => (Arc::new(*s), false),
        };
        if (founded || planted(Mutant::VoteAfterWipe))
            && let Err(reason) = self.coordinator.found(&state, now)
        {
            self.out.notes.push(Note::Misfit(reason));
            return;
        }
        self.join(state, founded, founded, now);
    }

    /// The cluster is known, and what its table was.
    /// `fresh` as [`Coordinator::adopt`] says.
    pub(super) fn join(&mut self, state: Arc<MetaState>, founded: bool, fresh: bool, now: Now) {
        self.gateway.set_shards(state.shards.len());
        self.router.set_shards(state.shards.len());
        let anew = state.recovery.is_some_and(|r| r.anew);
        self.out.notes.push(Note::Joined { uuid: state.uuid, generation: state.generation, founded, anew });
        self.adopt(state, fresh, now);
        self.retarget_all(now);
    }

    /// Takes a placement that came from outside the log.
    /// `fresh`: from the meta group's leader.
    fn take_placement(&mut self, bytes: &[u8], fresh: bool, now: Now) {
        let Some(mine) = &self.state else { return };
        let Ok(state) = MetaState::decode(bytes) else { return };
        if state.uuid != mine.uuid {
            let note = format!("cluster {} and cluster {} share the name {:?}", mine.uuid, state.uuid, state.cluster);
            self.out.notes.push(Note::Misfit(note));
            return;
        }
        let conflict = state.generation == mine.generation && state.recovery != mine.recovery;
        if conflict {
            let generation = state.generation;
            let note = format!("the cluster was recovered twice to generation {generation}: one of both has to go");
            self.out.notes.push(Note::Misfit(note));
            return;
        }
        let later = state.generation > mine.generation;
        // Also where there is a replica of the meta group: one that is a member no more hears nothing.
        let newer = later || state.version() > mine.version();
        let awaited = fresh && self.coordinator.waits_for_table() && state.version() == mine.version();
        if (newer || awaited) && state.shards.len() == mine.shards.len() && state.check().is_ok() {
            self.adopt(Arc::new(state), fresh, now);
        }
    }

    pub(super) fn adopt(&mut self, state: Arc<MetaState>, fresh: bool, now: Now) {
        if let Err(reason) = self.coordinator.adopt(&state, fresh, now) {
            self.out.notes.push(Note::Misfit(reason));
            return;
        }
        if let Some(me) = state.nodes.get(&self.config.node)
            && me.past.contains(&self.config.incarnation)
        {
            self.out.notes.push(Note::Fenced { by: me.incarnation });
        }
        if let Some(before) = self.state.take() {
            self.note_generation(&before, &state);
            for shard in state.groups().filter(|s| state.refounded(*s) != before.refounded(*s)) {
                self.gateway.refounded(shard, &mut self.out.completions);
            }
        }
        // What was said before a table was known.
        self.coordinator.set_share(self.config.node, self.share, &state);
        self.state = Some(state);
        self.view_stale = true;
        self.next_ask = now.mono;
    }

    pub(super) fn leads_meta(&self) -> bool {
        self.coordinator.replica(ShardId::META).is_some_and(|r| r.leadership().leads)
    }

    /// Sends the table to a peer that does not know its newest state and has no replica to learn it from.
    pub(super) fn push_placement(&mut self, to: NodeId) {
        let (Some(state), true) = (&self.state, self.leads_meta()) else { return };
        let Some(peer) = self.peers.get(&to) else { return };
        // One that is being filled does not know it yet.
        let has_replica = self
            .coordinator
            .replica(ShardId::META)
            .is_some_and(|r| r.members().voting().any(|v| v.node == to && v.incarnation == peer.incarnation));
        if peer.epoch < state.epoch && !has_replica {
            let c = Control::Placement { state: state.encode() };
            self.control(to, &c);
        }
    }

    pub(super) fn register(
        &mut self,
        node: NodeId,
        incarnation: Incarnation,
        addrs: NodeAddrs,
        max_memory: u64,
        now: Now,
    ) {
        if !self.leads_meta() {
            return;
        }
        let Some(state) = &self.state else { return };
        // What apply would ignore must not be proposed: the asker repeats itself for ever.
        if addrs.check().is_err() || (state.nodes.len() >= MAX_NODES && !state.nodes.contains_key(&node)) {
            return;
        }
        if let Some(record) = state.nodes.get(&node) {
            let known = record.incarnation == incarnation && record.addrs == addrs && record.max_memory == max_memory;
            if record.past.contains(&incarnation) || known {
                return;
            }
            let old = record.incarnation;
            let recent = |at: MonoTime| now.mono.since(at) < self.config.timing.beat_timeout;
            let answers =
                self.heard.get(&node).is_some_and(|lives| lives.iter().any(|(i, at)| *i == old && recent(*at)));
            let connected = self.peers.get(&node).is_some_and(|p| p.incarnation == old && p.live_since.is_some());
            if old != incarnation && (answers || connected) {
                self.control(node, &Control::RegisterRefused { refused: incarnation, by: old });
                return;
            }
        }
        // Of two lives that ask, the one counts that is connected: what the other has sent before may still be on its way, and
        // would fence its successor.
        let connected = self.peers.get(&node).is_some_and(|p| p.incarnation == incarnation);
        if !connected && node != self.config.node {
            return;
        }
        self.coordinator.meta_command(MetaCommand::Register { node, incarnation, addrs, max_memory }.encode().into());
    }

    pub(super) fn set_draining(&mut self, node: NodeId, incarnation: Incarnation, draining: bool) {
        let Some(record) = self.state.as_ref().and_then(|s| s.nodes.get(&node)) else { return };
        if self.leads_meta() && record.incarnation == incarnation && record.draining != draining {
            self.coordinator.meta_command(MetaCommand::SetDraining { node, incarnation, draining }.encode().into());
        }
    }

    /// Whether the table has this life of the node as it is.
    pub(super) fn is_registered(&self) -> bool {
        let me = self.state.as_ref().and_then(|state| state.nodes.get(&self.config.node));
        me.is_some_and(|r| {
            let max_memory = self.config.memory.max_memory;
            r.incarnation == self.config.incarnation && r.addrs == self.config.addrs && r.max_memory == max_memory
        })
    }

    /// What this node wants of the meta group's leader, repeated until the table shows it, and which leaders it does not know.
    pub(super) fn ask(&mut self, now: Now) {
        let Some(state) = self.state.clone() else {
            let (sends, decision) = self.founding.tick(now.wall);
            self.control_all(sends);
            if let Some(d) = decision {
                self.decided(d, now);
            }
            if let Some(refusal) = self.founding.take_lasting_refusal() {
                self.out.notes.push(Note::Misfit(refusal));
            }
            self.view_stale = true;
            self.repeat_recovery();
            return;
        };
        self.repeat_recovery();
        let me = state.nodes.get(&self.config.node);
        let max_memory = self.config.memory.max_memory;
        let registered = self.is_registered();
        let fenced = me.is_some_and(|r| r.past.contains(&self.config.incarnation));
        if !registered && !fenced {
            let addrs = self.config.addrs.clone();
            if me.is_some_and(|r| r.incarnation == self.config.incarnation) && self.leads_meta() {
                let (node, incarnation) = (self.config.node, self.config.incarnation);
                let command = MetaCommand::Register { node, incarnation, addrs, max_memory };
                self.coordinator.meta_command(command.encode().into());
            } else {
                self.control_to_all(&Control::Register { addrs, max_memory });
            }
        }
        // Also after a stop whose process has come back in the same life.
        let draining = self.draining;
        if me.is_some_and(|r| r.incarnation == self.config.incarnation && r.draining != draining) {
            self.set_draining(self.config.node, self.config.incarnation, draining);
            self.control_to_all(&Control::SetDraining { draining });
        }
        self.ask_for_leaders();
    }

    pub(super) fn control_to_all(&mut self, c: &Control) {
        let frame = encode_control(c);
        for to in self.peers.keys() {
            self.out.sends.push(Send { to: *to, channel: Channel::Raft, frame: frame.clone() });
        }
    }
}
