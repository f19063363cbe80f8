//! Keeping a shard within its memory, where this replica leads: what has expired goes, what is used least makes room.
//!
//! Everything that is removed is removed by an entry, so that all replicas stay alike; only the choice is the leader's own,
//! from the accesses that it has served.

use super::{Machine, Queued, Replica};
use crema_core::limits::MAX_VICTIMS;
use crema_core::mutant::{Mutant, planted};
use crema_core::{
    EvictionPolicy, LimitPolicy, LogTime, MemoryLimits, Now, StateMachine, encode_remove, encode_set_limits,
};
use std::collections::VecDeque;

/// Expired keys that one tick looks for at first. Doubled while there are more, up to [`MAX_VICTIMS`]: with ticks of 50 ms,
/// 80,000 a second of each shard.
const FEW_EXPIRED: usize = 256;
/// Parts of the limit: room is made when less than half of one is left, until a whole one is.
const ROOM_PARTS: u64 = 64;
/// Ticks after which limits that were proposed and are not in force yet are proposed again.
const ASK_LIMITS_AGAIN: u32 = 20;

/// Bytes that a write may take in memory beyond those of its operations.
const WRITE_OVERHEAD: u64 = 64;

/// What a node is told about memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Most bytes of memory that the node may use; 0 for no limit.
    pub max_memory: u64,
    /// How this node, where it leads, chooses what goes when a shard is full; with none, writes are refused then.
    pub eviction: Option<EvictionPolicy>,
}

/// What a leader does about memory.
#[derive(Debug)]
pub(super) struct Memory {
    eviction: Option<EvictionPolicy>,
    /// What the shard may use, by placement: 0 for no limit, none as long as placement is not known.
    budget: Option<u64>,
    /// How many expired keys the next tick looks for.
    effort: usize,
    /// Index of an entry that makes room and is not applied yet.
    making_room: Option<u64>,
    /// Bytes that it frees.
    frees: u64,
    /// Writes on their way: up to which index, how many bytes, and their sum. Counted near a limit alone.
    flight: VecDeque<(u64, u64)>,
    flight_bytes: u64,
    /// Bytes of the writes that are about to be proposed.
    coming: u64,
    /// The same of one that removes what has expired: until then the same keys would be found again.
    removing: Option<u64>,
    limits_wait: u32,
}

impl Memory {
    pub(super) fn new(eviction: Option<EvictionPolicy>) -> Self {
        Memory {
            eviction,
            budget: None,
            effort: FEW_EXPIRED,
            making_room: None,
            frees: 0,
            flight: VecDeque::new(),
            flight_bytes: 0,
            coming: 0,
            removing: None,
            limits_wait: 0,
        }
    }

    fn limits(&self) -> MemoryLimits {
        let policy = if self.eviction.is_some() { LimitPolicy::Evict } else { LimitPolicy::Refuse };
        MemoryLimits { max_bytes: self.budget.unwrap_or(0), policy }
    }
}

impl Replica {
    /// What the shard may use by placement, 0 for no limit. Where this replica leads, it has the log say so.
    pub fn set_budget(&mut self, bytes: u64) {
        self.memory.budget = Some(bytes);
        // A sleeping leader would never get to it. One that needs not to remove anything may sleep on: budgets change often
        // while memory is short, and the shard is told when it wakes.
        let Machine::Data(machine) = &self.machine else { return };
        let held = machine.limits().max_bytes;
        let urgent = held == 0 || bytes == 0 || bytes < machine.used();
        if self.asleep && self.leads() && urgent && self.limits_differ() {
            self.wake();
        }
    }

    pub(super) fn limits_differ(&self) -> bool {
        // Two defaults are alike: without a limit the policy means nothing.
        if self.memory.budget.is_none() {
            return false;
        }
        let wanted = self.memory.limits();
        matches!(&self.machine, Machine::Data(m)
            if m.limits() != wanted && (m.limits().max_bytes != 0 || wanted.max_bytes != 0))
    }

    /// Whether the wanted limits can be set: a shard that removes keys is made to fit first, or writes would be refused
    /// meanwhile.
    fn fits_limits(&self) -> bool {
        let Machine::Data(machine) = &self.machine else { return false };
        let wanted = self.memory.limits();
        let evicts = wanted.policy == LimitPolicy::Evict && machine.limits().policy == LimitPolicy::Evict;
        wanted.max_bytes == 0 || !evicts || machine.limits().max_bytes == 0 || machine.used() <= wanted.max_bytes
    }

    /// The limit that room is made for: what is in force, or will be.
    fn room_limit(&self, machine: &StateMachine) -> u64 {
        let (held, wanted) = (machine.limits().max_bytes, self.memory.budget.unwrap_or(0));
        if wanted == 0 { held } else { held.min(wanted) }
    }

    /// Whether something has expired that this leader should remove.
    pub fn has_expired(&self, now: Now) -> bool {
        let Machine::Data(m) = &self.machine else { return false };
        self.leads() && m.next_expiry_hint().is_some_and(|at| at <= self.stamp(now))
    }

    /// Once a tick, where it leads.
    pub(super) fn keep_memory(&mut self, now: Now) {
        if self.limits_differ() {
            self.quiet_ticks = 0;
            if self.memory.limits_wait == 0 && self.fits_limits() {
                let entry = encode_set_limits(self.stamp(now), self.memory.limits());
                self.command(entry);
            }
            self.memory.limits_wait = (self.memory.limits_wait + 1) % ASK_LIMITS_AGAIN;
        } else {
            self.memory.limits_wait = 0;
        }
        self.remove_expired(now);
        self.make_room(0, now);
    }

    fn remove_expired(&mut self, now: Now) {
        if !self.has_expired(now) || self.raw.raft.lead_transferee.is_some() {
            self.memory.effort = FEW_EXPIRED;
            return;
        }
        self.quiet_ticks = 0;
        let applied = self.applied().0;
        self.memory.removing.take_if(|index| *index <= applied);
        if self.memory.removing.is_some() {
            return;
        }
        let estimate = self.stamp(now);
        if planted(Mutant::OwnExpiry) {
            return self.expire_by_own_clock(estimate);
        }
        let effort = self.memory.effort;
        let Machine::Data(machine) = &mut self.machine else { return };
        let victims = machine.expired(estimate, effort);
        let more = victims.len() >= effort;
        // Bounded above, so it encodes.
        if let (false, Ok(entry)) = (victims.is_empty(), encode_remove(estimate, &victims, true)) {
            self.queue.push(Queued::Command(entry));
            self.memory.removing = Some(self.raw.raft.raft_log.last_index() + 1);
        }
        self.memory.effort = if more { (effort * 2).min(MAX_VICTIMS) } else { (effort / 2).max(FEW_EXPIRED) };
    }

    /// What [`Mutant::OwnExpiry`] does.
    #[cfg(feature = "mutants")]
    fn expire_by_own_clock(&mut self, estimate: LogTime) {
        if let Machine::Data(m) = &mut self.machine {
            m.expire_alone(estimate);
        }
    }

    #[cfg(not(feature = "mutants"))]
    fn expire_by_own_clock(&mut self, _: LogTime) {}

    /// Queues an entry that evicts, if with `coming` bytes of writes the shard would come near its limit. One at a time:
    /// what it frees is seen when it is applied.
    pub(super) fn make_room(&mut self, coming: u64, now: Now) {
        self.land();
        let applied = self.applied().0;
        self.memory.making_room.take_if(|index| *index <= applied);
        // What an earlier leader chose may still be on its way: the same keys would be counted twice.
        if self.applied_term != self.term() {
            return;
        }
        let (Some(policy), stamp) = (self.memory.eviction, self.stamp(now)) else { return };
        let Machine::Data(machine) = &self.machine else { return };
        let (limits, max) = (machine.limits(), self.room_limit(machine));
        if limits.max_bytes == 0 || limits.policy != LimitPolicy::Evict || self.memory.making_room.is_some() {
            return;
        }
        let part = max / ROOM_PARTS;
        let coming = coming.min(max / 2);
        let used = machine.used() + self.memory.flight_bytes + coming;
        if used + part / 2 <= max {
            return;
        }
        let Machine::Data(machine) = &mut self.machine else { return };
        let wanted = used + part - max;
        let victims = machine.victims(policy, wanted, MAX_VICTIMS);
        let frees = if victims.len() < MAX_VICTIMS { wanted } else { 0 };
        if victims.is_empty() {
            return;
        }
        if let Ok(entry) = encode_remove(stamp, &victims, false) {
            self.quiet_ticks = 0;
            // Before the writes that need the room.
            self.queue.insert(0, Queued::Command(entry));
            self.memory.making_room = Some(self.raw.raft.raft_log.last_index() + 1);
            self.memory.frees = frees;
        }
    }

    /// Bytes of writes that may be proposed now: more might be refused, though there is something to remove; they wait
    /// until it is. The first write of a shard that has nothing on its way always may.
    fn allowance(&self) -> Option<u64> {
        let Machine::Data(machine) = &self.machine else { return None };
        let limits = machine.limits();
        if limits.max_bytes == 0 || limits.policy != LimitPolicy::Evict || self.memory.eviction.is_none() {
            return None;
        }
        let frees = if self.memory.making_room.is_some() { self.memory.frees } else { 0 };
        let room = limits.max_bytes + limits.max_bytes / 32 + frees;
        Some(room.saturating_sub(machine.used() + self.memory.flight_bytes))
    }

    /// Takes what may be proposed out of the queue: whatever takes no room, as an entry that makes some, and as many writes
    /// as there is room for, in their order.
    pub(super) fn take_proposable(&mut self) -> Vec<Queued> {
        let Some(allowance) = self.allowance() else {
            self.queue_bytes = 0;
            return std::mem::take(&mut self.queue);
        };
        let behind = self.applied_term != self.term();
        let under_way = behind || !self.memory.flight.is_empty() || self.memory.making_room.is_some();
        let fits = |q: &Queued| match q {
            Queued::Write { ops, .. } => ops.len() as u64 + WRITE_OVERHEAD <= allowance,
            _ => true,
        };
        // A full queue would otherwise be taken apart and put together again with every message that comes meanwhile.
        if under_way && !self.queue.iter().any(fits) {
            return Vec::new();
        }
        let (mut taken, mut left, mut bytes) = (Vec::with_capacity(self.queue.len()), Vec::new(), 0);
        for item in std::mem::take(&mut self.queue) {
            let Queued::Write { ops, .. } = &item else {
                taken.push(item);
                continue;
            };
            let size = ops.len() as u64 + WRITE_OVERHEAD;
            let alone = bytes == 0 && !under_way;
            if left.is_empty() && (alone || bytes + size <= allowance) {
                bytes += size;
                self.queue_bytes -= ops.len();
                taken.push(item);
            } else {
                left.push(item);
            }
        }
        self.queue = left;
        self.memory.coming = bytes;
        taken
    }

    /// What was taken is on its way, up to this index of the log.
    pub(super) fn took_off(&mut self, index: u64) {
        let bytes = std::mem::take(&mut self.memory.coming);
        if bytes > 0 {
            self.memory.flight.push_back((index, bytes));
            self.memory.flight_bytes += bytes;
        }
    }

    /// This replica leads: what earlier leaders have put into its log and is not applied yet takes room, too.
    pub(super) fn inherit_flight(&mut self) {
        let (applied, store) = (self.applied().0, self.raw.store());
        let (index, bytes) = (store.last(), store.bytes_behind(applied) as u64);
        if bytes > 0 {
            self.memory.flight.push_back((index, bytes));
            self.memory.flight_bytes += bytes;
        }
    }

    /// Forgets writes that have arrived.
    fn land(&mut self) {
        let applied = self.applied().0;
        while let Some((_, bytes)) = self.memory.flight.front().copied().filter(|(index, _)| *index <= applied) {
            self.memory.flight.pop_front();
            self.memory.flight_bytes -= bytes;
        }
    }

    /// What was to make room was not proposed, or is not known to be.
    pub(super) fn makes_no_room(&mut self) {
        self.memory.making_room = None;
        self.memory.removing = None;
        self.memory.coming = 0;
    }

    /// This replica leads no more: what it knew of accesses is of no use.
    pub(super) fn forget_accesses(&mut self) {
        self.makes_no_room();
        (self.memory.flight, self.memory.flight_bytes) = (VecDeque::new(), 0);
        self.memory.limits_wait = 0;
        if let Machine::Data(m) = &mut self.machine {
            m.forget_victims();
        }
    }
}
