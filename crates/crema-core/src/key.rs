//! A key as it travels: its slot, its database and its bytes.

use crate::{
    limits,
    slot::{Slot, slot_of},
};
use serde::{Deserialize, Serialize};

/// A borrowed key. A database is a namespace: it does not change the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRef<'a> {
    /// The hash slot, computed once by the gateway; every operation carries its own.
    pub slot: Slot,
    /// Database 0 to 15.
    pub db: u8,
    /// The key's bytes, at most [`limits::MAX_KEY_BYTES`].
    #[serde(borrow)]
    pub bytes: &'a [u8],
}

impl<'a> KeyRef<'a> {
    /// The key `bytes` of database `db`. `None` if it is longer than a key may be or the database does not exist.
    pub fn new(db: u8, bytes: &'a [u8]) -> Option<Self> {
        (bytes.len() <= limits::MAX_KEY_BYTES && db < limits::DATABASES).then(|| KeyRef {
            slot: slot_of(bytes),
            db,
            bytes,
        })
    }
}
