//! The atomics that [`crate::cell`] is made of; the model of its interleavings puts others in their place.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
