//! What is acknowledged is durable: an accepted append leaves only after the entries it speaks of are (Raft, figure 2:
//! "updated on stable storage before responding"; etcd 14370).

use super::Invariant;
use crema_core::{Incarnation, NodeId};
use crema_shard::Host;
use crema_shard::message::{Body, Envelope};
use raft::eraftpb::MessageType;

/// See the module.
#[derive(Default)]
pub(super) struct Durable;

impl Invariant for Durable {
    fn sent(
        &mut self,
        from: NodeId,
        _incarnation: Incarnation,
        _to: NodeId,
        envelope: &Envelope,
        host: &Host,
        bad: &mut Vec<String>,
    ) {
        let Body::Raft(m) = &envelope.body else { return };
        if m.msg_type != MessageType::MsgAppendResponse || m.reject {
            return;
        }
        let Some(replica) = host.coordinator().replica(envelope.shard).filter(|r| !r.failed()) else { return };
        // One of an earlier term speaks of entries that may have been overwritten since; the later term is durable before it
        // goes, and such an entry is never committed.
        if m.term < replica.leadership().term.0 {
            return;
        }
        let durable = replica.persisted_index().0;
        if m.index > durable {
            bad.push(format!(
                "{:?}: {from:?} acknowledges entry {} but is durable up to {durable}",
                envelope.shard, m.index
            ));
        }
    }
}
