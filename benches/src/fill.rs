//! One state machine, written to through its log as a replica would.

use crema_core::limits::TARGET_ENTRY_BYTES;
use crema_core::{
    EntryBuilder, Epoch, Incarnation, KeyRef, LogIndex, LogTime, Op, SLOT_COUNT, Seq, SessionId, SessionTag, SetCond,
    SetExpire, ShardInit, SlotRange, StateMachine, encode_open_session, encode_ops, slot_of,
};

/// Log time at which everything happens.
const NOW: LogTime = LogTime(1_000_000);
/// Requests of one entry.
const BATCH: usize = 64;

/// A state machine and the entry that is being built for it.
pub(crate) struct Machine {
    pub(crate) m: StateMachine,
    session: SessionId,
    seq: u64,
    entry: EntryBuilder,
}

impl Machine {
    /// Without keys, for the slots from 0 on.
    pub(crate) fn new(slots: u16) -> Self {
        let range = SlotRange { start: 0, end: slots.min(SLOT_COUNT) };
        let init = ShardInit { range, epoch: Epoch(1), secret: 0x5EED, log_time: NOW, applied: LogIndex(0) };
        let mut m = StateMachine::new(init);
        m.apply(LogIndex(1), &encode_open_session(NOW, Incarnation(1))).expect("an entry that opens a session");
        Machine { m, session: SessionId(1), seq: 0, entry: EntryBuilder::new(NOW, 0) }
    }

    /// Writes one operation, with the others of its entry.
    pub(crate) fn write(&mut self, op: Op<'_>) {
        self.seq += 1;
        let tag = SessionTag { session: self.session, seq: Seq(self.seq), low: Seq(self.seq - 1) };
        self.entry.push(tag, &encode_ops(&[op]).expect("an operation within its limits"));
        if self.entry.len() >= BATCH || self.entry.size() >= TARGET_ENTRY_BYTES {
            self.flush();
        }
    }

    /// Sets a key.
    pub(crate) fn set(&mut self, key: &[u8], value: &[u8], expire: SetExpire) {
        self.write(Op::Set { key: reference(key), value, cond: SetCond::Always, expire, get: false });
    }

    /// Applies what has been written.
    pub(crate) fn flush(&mut self) {
        let entry = std::mem::replace(&mut self.entry, EntryBuilder::new(NOW, 0)).finish();
        self.apply(&entry);
    }

    /// Applies any entry.
    pub(crate) fn apply(&mut self, entry: &[u8]) {
        self.m.apply(LogIndex(self.m.applied().0 + 1), entry).expect("an entry that was just encoded");
    }
}

/// A key in database 0.
pub(crate) fn reference(key: &[u8]) -> KeyRef<'_> {
    KeyRef::new(0, key).expect("a key within its limits")
}

/// Names of `bytes` bytes in the slots below `slots`, without end: `key:000000000042`.
pub(crate) fn keys(slots: u16, bytes: usize) -> impl Iterator<Item = Vec<u8>> {
    let names = (0u64..).map(move |i| format!("key:{i:0width$}", width = bytes.saturating_sub(4)).into_bytes());
    names.filter(move |name| slot_of(name).0 < slots)
}
