//! Ids as newtypes, so that a shard cannot be mistaken for a node.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id!(
    /// One Crema process, named by its operator with a small integer from 1 on.
    NodeId(u64), "n"
);
id!(
    /// A set of slots kept by one Raft group. Data shards count from 0; [`ShardId::META`] is the meta group.
    ShardId(u32), "s"
);
id!(
    /// One member of one Raft group; also its raft-rs peer id. Meta generation in the upper 32 bits, a counter below;
    /// never used twice (Ongaro 2014, section 4.1 takes server ids to be unique for ever).
    ReplicaId(u64), "r"
);
id!(
    /// Version of the placement table; grows with every change.
    Epoch(u64), "e"
);
id!(
    /// Raft term.
    Term(u64), "t"
);
id!(
    /// Raft log index.
    LogIndex(u64), "i"
);
id!(
    /// A replicated session: the log index of the entry that opened it, hence never reused within a shard.
    SessionId(u64), "S"
);
id!(
    /// Position of a write within its session, from 1 on without gaps.
    Seq(u64), "q"
);

impl ShardId {
    /// The Raft group that holds the cluster's own table.
    pub const META: ShardId = ShardId(u32::MAX);

    /// Whether this is the meta group.
    pub fn is_meta(self) -> bool {
        self == Self::META
    }
}

impl ReplicaId {
    /// The id numbered `counter` in meta generation `generation`.
    pub fn new(generation: u32, counter: u32) -> Self {
        ReplicaId(u64::from(generation) << 32 | u64::from(counter))
    }
}

/// One life of a node whose log is in memory: a random 128-bit number drawn at its start. Ordered only by the meta
/// group's `Register`, never by value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Incarnation(pub u128);

/// Names one cluster for ever; drawn when it is founded.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ClusterUuid(pub u128);

macro_rules! hex_id {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:08x}", self.0 >> 96)
            }
        }
        impl std::str::FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                u128::from_str_radix(s, 16).map(Self)
            }
        }
    };
}
hex_id!(Incarnation);
hex_id!(ClusterUuid);
