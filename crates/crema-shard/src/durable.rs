//! What a replica leaves on disk, and how it comes back from there.
//!
//! ```text
//!   record: what the log stands on --- Founded | At(point) --- beside the entries, changed together with them
//!   state:  pieces of a machine at a point, in a file of its own; durable before a record names it
//!
//!   restart: record -> machine (founding state, or the file's) -> entries behind it -> Raft commits them again
//! ```
//!
//! A replica whose record names a state that cannot be read whole is lost, like one whose log was cut: it does not come
//! back, and the cluster fills another in its place.

use crate::log_store::FOUNDING_INDEX;
use crate::members::Members;
use crate::meta::{MetaMachine, MetaState};
use crate::replica::Machine;
use crate::transfer::Point;
use bytes::Bytes;
use crema_core::snapshot::Restore;
use crema_core::{CodecError, Epoch, LogIndex, LogTime, ReplicaId, ShardId, ShardInit, SlotRange, StateMachine};
use raft::eraftpb::{Entry, HardState};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// First byte of an encoded record.
const VERSION: u8 = 2;

/// What is on disk of one replica beside its entries. A replica without a state has nothing there: it has answered for
/// nothing, and may begin again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The group.
    pub shard: ShardId,
    /// The replica.
    pub id: ReplicaId,
    /// What its log stands on.
    pub start: Start,
}

/// The state behind which a log begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// That of a newly founded shard.
    FoundedShard {
        /// The members.
        members: Members,
        /// The slots.
        range: SlotRange,
        /// Placement epoch.
        epoch: Epoch,
        /// Seed of the key hash.
        secret: u64,
        /// Where log time begins.
        log_time: LogTime,
    },
    /// That of the newly founded meta group.
    FoundedMeta {
        /// The members.
        members: Members,
        /// The founding record, encoded.
        state: Vec<u8>,
    },
    /// One in a file of its own.
    At(Point),
}

impl GroupRecord {
    /// As bytes: a version, then postcard.
    pub fn encode(&self) -> Bytes {
        postcard::to_extend(self, vec![VERSION]).expect("derived serializers of plain data do not fail").into()
    }

    /// Reads what [`GroupRecord::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<GroupRecord, CodecError> {
        let [version, rest @ ..] = bytes else { return Err(CodecError::Malformed) };
        if *version != VERSION {
            return Err(CodecError::UnknownVersion(*version));
        }
        match postcard::take_from_bytes(rest) {
            Ok((record, [])) => Ok(record),
            _ => Err(CodecError::Malformed),
        }
    }

    /// Where the log begins.
    pub fn begins_at(&self) -> Point {
        let founded = |members: &Members| Point {
            index: FOUNDING_INDEX,
            term: crate::log_store::FOUNDING_TERM,
            members: members.clone(),
        };
        match &self.start {
            Start::FoundedShard { members, .. } | Start::FoundedMeta { members, .. } => founded(members),
            Start::At(point) => point.clone(),
        }
    }

    /// The point whose state stands in a file, if it does.
    pub fn point(&self) -> Option<&Point> {
        match &self.start {
            Start::At(point) => Some(point),
            _ => None,
        }
    }
}

/// A replica as it comes back from disk.
pub struct Recovered {
    /// Its record.
    pub record: GroupRecord,
    /// Its state where the log begins.
    pub machine: Machine,
    /// Term, vote and commit index.
    pub hard: HardState,
    /// The log behind that state, without gaps.
    pub entries: Vec<Entry>,
}

impl std::fmt::Debug for Recovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recovered")
            .field("record", &self.record)
            .field("entries", &self.entries.len())
            .finish_non_exhaustive()
    }
}

/// Makes a machine out of the pieces of its state, as [`crate::replica::Replica`] made them, without the first, which is
/// the point.
pub fn restore_machine(
    shard: ShardId,
    point: &Point,
    mut pieces: impl Iterator<Item = Result<Bytes, String>>,
) -> Result<Machine, String> {
    if shard.is_meta() {
        let mut bytes = Vec::new();
        for piece in pieces {
            bytes.extend_from_slice(&piece?);
            if bytes.len() > crate::meta::MAX_STATE_BYTES {
                return Err("a table beyond its bound".to_owned());
            }
        }
        let state = MetaState::decode(&bytes).map_err(|e| e.to_string())?;
        state.check()?;
        return Ok(Machine::Meta(Box::new(MetaMachine::new(Arc::new(state), LogIndex(point.index)))));
    }
    let head = pieces.next().ok_or("an empty state")??;
    let mut restore = Restore::begin(&head).map_err(|e| e.to_string())?;
    if restore.applied() != LogIndex(point.index) {
        return Err(format!("a state of index {} for one of {}", restore.applied(), point.index));
    }
    let mut whole = false;
    for piece in pieces {
        whole = restore.chunk(&piece?).map_err(|e| e.to_string())?;
    }
    if !whole {
        return Err("a state without its end".to_owned());
    }
    Ok(Machine::Data(Box::new(restore.finish().map_err(|e| e.to_string())?)))
}

impl Recovered {
    /// Puts a replica together. `pieces` are those of the state's file, where the record names one: the first is the point.
    ///
    /// # Errors
    /// What is there does not belong together, or is not whole: the replica is lost.
    pub fn new(
        record: GroupRecord,
        hard: HardState,
        mut entries: Vec<Entry>,
        mut pieces: impl Iterator<Item = Result<Bytes, String>>,
    ) -> Result<Recovered, String> {
        let (index, machine) = match &record.start {
            Start::FoundedShard { range, epoch, secret, log_time, .. } => {
                let applied = LogIndex(FOUNDING_INDEX);
                let (range, epoch, secret, log_time) = (*range, *epoch, *secret, *log_time);
                let init = ShardInit { range, epoch, secret, log_time, applied };
                (FOUNDING_INDEX, Machine::Data(Box::new(StateMachine::new(init))))
            }
            Start::FoundedMeta { state, .. } => {
                let state = MetaState::decode(state).map_err(|e| e.to_string())?;
                state.check()?;
                let applied = LogIndex(FOUNDING_INDEX);
                (FOUNDING_INDEX, Machine::Meta(Box::new(MetaMachine::new(Arc::new(state), applied))))
            }
            Start::At(point) => {
                let head = pieces.next().ok_or("no state")??;
                if postcard::from_bytes::<Point>(&head).ok().as_ref() != Some(point) {
                    return Err("a state of another point".to_owned());
                }
                (point.index, restore_machine(record.shard, point, pieces)?)
            }
        };
        entries.retain(|e| e.index > index);
        // Behind a state that came from a leader there may stand what it made void. What is of older terms goes here; what
        // a leader of a later term had added, before the state's last entry was committed under a still later one, is an
        // uncommitted tail like any other, and goes when a leader overwrites it.
        let mut term = record.begins_at().term;
        let stale = entries.iter().position(|e| std::mem::replace(&mut term, e.term) > e.term);
        entries.truncate(stale.unwrap_or(entries.len()));
        let gap = entries.iter().zip(index + 1..).any(|(e, wanted)| e.index != wanted);
        if gap {
            return Err(format!("the log does not continue the state at {index}"));
        }
        let last = entries.last().map_or(index, |e| e.index);
        if hard.commit > last {
            return Err(format!("it is committed up to {} but ends at {last}", hard.commit));
        }
        Ok(Recovered { record, machine, hard, entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::Member;
    use crema_core::{Incarnation, NodeId};

    fn members() -> Members {
        let one = Member { id: ReplicaId(1), node: NodeId(1), incarnation: Incarnation(1) };
        Members { voters: vec![one], epoch: Epoch(1), ..Members::default() }
    }

    fn founded() -> GroupRecord {
        let start = Start::FoundedShard {
            members: members(),
            range: SlotRange { start: 0, end: 9 },
            epoch: Epoch(1),
            secret: 5,
            log_time: LogTime(7),
        };
        GroupRecord { shard: ShardId(3), id: ReplicaId(1), start }
    }

    fn entry(index: u64) -> Entry {
        Entry { index, term: 1, ..Entry::default() }
    }

    #[test]
    fn records_round_trip_and_nonsense_does_not_decode() {
        let point = Point { index: 9, term: 2, members: members() };
        for start in [founded().start, Start::At(point)] {
            let record = GroupRecord { start, ..founded() };
            let bytes = record.encode();
            assert_eq!(GroupRecord::decode(&bytes), Ok(record));
            (0..bytes.len()).for_each(|cut| assert!(GroupRecord::decode(&bytes[..cut]).is_err()));
        }
        assert_eq!(GroupRecord::decode(&[7]), Err(CodecError::UnknownVersion(7)));
    }

    #[test]
    fn a_log_has_to_continue_its_state() {
        let none = || std::iter::empty::<Result<Bytes, String>>();
        let new = |entries| Recovered::new(founded(), HardState::default(), entries, none());
        assert_eq!(new(vec![entry(2), entry(3)]).unwrap().entries.len(), 2);
        assert!(new(vec![entry(3)]).is_err(), "2 is missing");
        assert_eq!(new(vec![entry(1), entry(2)]).unwrap().entries.len(), 1, "1 is in the state");
        let of_term = |index, term| Entry { index, term, ..Entry::default() };
        let cut = new(vec![of_term(2, 3), of_term(3, 2), of_term(4, 3)]).unwrap();
        assert_eq!(cut.entries.len(), 1, "what a state has made void");
        let lost = HardState { commit: 4, ..HardState::default() };
        assert!(Recovered::new(founded(), lost, vec![entry(2), entry(3)], none()).is_err(), "4 was committed");
        let at = GroupRecord { start: Start::At(Point { index: 5, term: 1, members: members() }), ..founded() };
        assert!(Recovered::new(at, HardState::default(), vec![], none()).is_err(), "its state is gone");
    }
}
