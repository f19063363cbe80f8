//! Exactly once: a counter that is only incremented holds at least every acknowledged increment, and at most those and
//! the unknown ones.
//!
//! The search for linearizability implies it; this check needs no search and so cannot give up.

use crate::sim::model::{Command, Ended, Record};

/// Checks a counter's history against its final value. The error says what does not add up.
pub fn check(history: &[&Record], value: i64) -> Result<(), String> {
    let mut acknowledged = 0;
    let mut unknown = 0;
    for r in history.iter().filter(|r| r.command == Command::Incr) {
        match r.ended {
            Some(Ended::Replied(_)) => acknowledged += 1,
            Some(Ended::NotApplied) => {}
            Some(Ended::Unknown) | None => unknown += 1,
        }
    }
    if (acknowledged..=acknowledged + unknown).contains(&value) {
        Ok(())
    } else {
        let key = history.first().map_or("", |r| &r.key);
        Err(format!("counter {key} is {value} after {acknowledged} acknowledged and {unknown} unknown increments"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::Reply;

    #[test]
    fn lost_and_repeated_increments_are_found() {
        let rec = |ended| Record {
            key: "c".into(),
            conn: 1,
            command: Command::Incr,
            call: 0,
            ret: 0,
            call_ns: 0,
            ret_ns: 0,
            ended: Some(ended),
        };
        let records = [
            rec(Ended::Replied(Reply::Int(1))),
            rec(Ended::Replied(Reply::Int(2))),
            rec(Ended::Unknown),
            rec(Ended::NotApplied),
        ];
        let h: Vec<&Record> = records.iter().collect();
        assert!(check(&h, 1).is_err());
        assert!(check(&h, 2).is_ok());
        assert!(check(&h, 3).is_ok());
        assert!(check(&h, 4).is_err());
    }
}
