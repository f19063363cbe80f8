//! What must hold, one file a promise.

pub mod completion;
pub mod invariants;
pub mod linearizable;
pub mod list;
pub mod once;
pub mod order;
pub mod relaxed;
pub mod set;
pub mod ttl;
