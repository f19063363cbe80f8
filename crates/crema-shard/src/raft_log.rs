//! What raft-rs has to say, as `tracing` events of the target `raft`.
//!
//! Its elections and votes are news for whoever looks for a fault, not for an operator: its `info` becomes our `debug`.

use slog::{Drain, KV, Level, Logger, Never, OwnedKVList, Record, o};
use std::fmt;

/// A logger for raft-rs; each replica's is made of it with the shard's number.
pub fn logger() -> Logger {
    Logger::root(Bridge, o!())
}

struct Bridge;

impl Drain for Bridge {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        // A level must be known when the program is built, hence an arm for each. Nothing is formatted that nobody reads.
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "raft", "{}", Text(record, values)),
            Level::Warning => tracing::warn!(target: "raft", "{}", Text(record, values)),
            Level::Info => tracing::debug!(target: "raft", "{}", Text(record, values)),
            Level::Debug | Level::Trace => tracing::trace!(target: "raft", "{}", Text(record, values)),
        }
        Ok(())
    }
}

/// Message, then the record's values, then the logger's.
struct Text<'a>(&'a Record<'a>, &'a OwnedKVList);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.msg())?;
        let mut values = Values(f);
        let written = self.0.kv().serialize(self.0, &mut values).and_then(|()| self.1.serialize(self.0, &mut values));
        written.map_err(|_| fmt::Error)
    }
}

struct Values<'a, 'f>(&'a mut fmt::Formatter<'f>);

impl slog::Serializer for Values<'_, '_> {
    fn emit_arguments(&mut self, key: slog::Key, value: &fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}").map_err(slog::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_their_values_and_the_shard() {
        let logger = Logger::root(slog::Discard, o!("shard" => 7));
        let at = slog::record_static!(Level::Info, "");
        let text =
            Text(&Record::new(&at, &format_args!("became leader"), slog::b!("term" => 3)), logger.list()).to_string();
        assert_eq!(text, "became leader term=3 shard=7");
    }
}
