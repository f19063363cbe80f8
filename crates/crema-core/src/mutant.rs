//! Deliberate faults, to prove that the proof works: each must be caught by the simulator within a stated number of seeds
//! (`tests/README.md`).
//!
//! They exist only under the feature `mutants`, which the test package alone enables; without it [`planted`] is the
//! constant `false` and nothing of them is compiled.

/// One deliberate fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mutant {
    /// A write is acknowledged when it is proposed.
    AckBeforeApply,
    /// All read rounds have the same context.
    ReusedReadContext,
    /// What depends on the log being durable is sent before it is.
    PersistAfterSend,
    /// A node that lost its memory takes its old replicas up again, empty.
    VoteAfterWipe,
    /// The lease counts from the confirmation of a round instead of its issue.
    LeaseFromReply,
    /// The lease stays while leadership is handed over.
    TransferUnderLease,
    /// A delayed TimeoutNow is acted on although its sender has gone on since.
    LateTimeoutNow,
    /// A voter that has heard its leader helps another candidate.
    NoPromise,
    /// A reader looks at the cell once, after it has read.
    CellLoadedOnce,
    /// A copy of an executed write is executed again.
    NoDedup,
    /// Expiry is judged by the clock of the replica that applies.
    LocalClockInApply,
    /// Leaders stamp entries with wall time.
    WallStamps,
    /// A node says it is ready before its replicas are voters.
    ReadyEarly,
    /// A retry sends the commands of a connection in another order.
    ReorderedRetry,
    /// Readers may look between the keys of one request.
    HalfVisible,
    /// The lowest member founds a cluster without asking anybody.
    FoundAlone,
    /// A follower does not take note of changes of members.
    IgnoredConfChange,
    /// A restarted replica has forgotten for whom it voted.
    ForgottenVote,
    /// The log on disk is cut before the state that stands for it is durable.
    CutBeforeState,
    /// Removals are decided by each replica's own clock, outside of the log.
    OwnExpiry,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Mutant; 20] = [
        Mutant::AckBeforeApply,
        Mutant::ReusedReadContext,
        Mutant::PersistAfterSend,
        Mutant::VoteAfterWipe,
        Mutant::LeaseFromReply,
        Mutant::TransferUnderLease,
        Mutant::LateTimeoutNow,
        Mutant::NoPromise,
        Mutant::CellLoadedOnce,
        Mutant::NoDedup,
        Mutant::LocalClockInApply,
        Mutant::WallStamps,
        Mutant::ReadyEarly,
        Mutant::ReorderedRetry,
        Mutant::HalfVisible,
        Mutant::FoundAlone,
        Mutant::IgnoredConfChange,
        Mutant::ForgottenVote,
        Mutant::CutBeforeState,
        Mutant::OwnExpiry,
    ];
}

/// Whether the fault is planted on this thread.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn planted(_: Mutant) -> bool {
    false
}

/// Something between two keys of one request.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub(crate) const fn between_keys() {}

#[cfg(feature = "mutants")]
pub(crate) use switch::between_keys;
#[cfg(feature = "mutants")]
pub use switch::{on_between_keys, plant, planted};

#[cfg(feature = "mutants")]
mod switch {
    use super::Mutant;
    use std::cell::{Cell, RefCell};

    type Hook = Box<dyn FnMut()>;

    thread_local! {
        static PLANTED: Cell<Option<Mutant>> = const { Cell::new(None) };
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    /// Whether the fault is planted on this thread.
    pub fn planted(mutant: Mutant) -> bool {
        PLANTED.get() == Some(mutant)
    }

    /// Plants a fault on this thread in place of any other.
    pub fn plant(mutant: Option<Mutant>) {
        PLANTED.set(mutant);
    }

    /// Calls `hook` between the operations of each request of several that this thread applies: where a reader on another
    /// thread could look.
    pub fn on_between_keys(hook: Option<Hook>) {
        HOOK.set(hook);
    }

    pub(crate) fn between_keys() {
        HOOK.with_borrow_mut(|hook| {
            if let Some(hook) = hook {
                hook();
            }
        });
    }
}
