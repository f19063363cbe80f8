//! Order of one connection: its commands on a key of its own take effect in the order sent, and at most once.
//!
//! Stronger than linearizability, which lets two pipelined commands take effect in either order. Nobody else writes the
//! key, so the answers follow from the order. A write with an unknown outcome may still take effect while only reads
//! follow; once a later write of the connection was answered, it may not.

use crate::sim::model::{Ended, Record, Value};
use std::collections::BTreeSet;

/// Checks the history of one connection's own key, in the order sent. The error says what does not fit.
pub fn check(history: &[&Record]) -> Result<(), String> {
    // Possible worlds: the value, and how many of the unknown writes can no longer happen (or have happened).
    let mut worlds: BTreeSet<(Value, usize)> = BTreeSet::from([(None, 0)]);
    let mut unknown = Vec::new();
    for (n, r) in history.iter().enumerate() {
        let reply = match &r.ended {
            Some(Ended::NotApplied) => continue,
            Some(Ended::Unknown) | None => {
                if r.command.is_write() {
                    unknown.push(&r.command);
                }
                continue;
            }
            Some(Ended::Replied(reply)) => reply,
        };
        // Unknown writes may have taken effect by now: some of them, in order.
        let mut all = worlds.clone();
        let mut fresh: Vec<(Value, usize)> = worlds.iter().cloned().collect();
        while let Some((value, from)) = fresh.pop() {
            for (i, command) in unknown.iter().enumerate().skip(from) {
                let next = (command.apply(&value).0, i + 1);
                if all.insert(next.clone()) {
                    fresh.push(next);
                }
            }
        }
        let before = all.clone();
        worlds = BTreeSet::new();
        for (value, from) in all {
            let (value, answer) = r.command.apply(&value);
            if answer == *reply {
                worlds.insert((value, if r.command.is_write() { unknown.len() } else { from }));
            }
        }
        if worlds.is_empty() {
            let values: Vec<String> = before
                .iter()
                .take(4)
                .map(|(v, _)| v.as_ref().map_or("nil".into(), |v| String::from_utf8_lossy(v).into_owned()))
                .collect();
            return Err(format!(
                "connection {}, key {}: command {n}, {:?}, answered {reply:?}; possible values before it: {values:?}",
                r.conn, r.key, r.command
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::model::Command;
    use crema_core::Reply;

    fn rec(command: Command, ended: Ended) -> Record {
        Record { key: "k".into(), conn: 1, command, call: 0, ret: 0, call_ns: 0, ret_ns: 0, ended: Some(ended) }
    }
    fn set(v: &str) -> Record {
        rec(Command::Set(v.into()), Ended::Replied(Reply::Ok))
    }
    fn get(v: &str) -> Record {
        rec(Command::Get, Ended::Replied(Reply::Bulk(v.as_bytes().to_vec().into())))
    }
    fn lost(v: &str) -> Record {
        rec(Command::Set(v.into()), Ended::Unknown)
    }
    fn judge(h: &[Record]) -> Result<(), String> {
        check(&h.iter().collect::<Vec<_>>())
    }

    #[test]
    fn pipelined_commands_answer_in_order() {
        assert_eq!(judge(&[set("1"), get("1"), set("2"), get("2")]), Ok(()));
        assert!(judge(&[set("1"), get("2"), set("2"), get("2")]).is_err());
        assert!(judge(&[set("1"), set("2"), get("1")]).is_err());
    }

    #[test]
    fn an_unknown_write_ends_with_the_next_answered_one() {
        assert_eq!(judge(&[set("1"), lost("2"), get("1"), get("2"), get("2")]), Ok(()));
        assert!(judge(&[set("1"), lost("2"), get("2"), get("1")]).is_err());
        assert!(judge(&[lost("2"), set("3"), get("3"), get("2")]).is_err());
        assert_eq!(judge(&[lost("2"), lost("3"), get("3")]), Ok(()));
        assert!(judge(&[lost("2"), lost("3"), get("3"), get("2")]).is_err(), "in order");
    }

    #[test]
    fn a_refused_write_never_happens() {
        let refused = rec(Command::Set("2".into()), Ended::NotApplied);
        assert!(judge(&[set("1"), refused, get("2")]).is_err());
    }
}
