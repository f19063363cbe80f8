//! Exactly once: whoever looks at a counter that is only incremented sees at least every increment acknowledged before,
//! and at most those and what else was asked for by then and not refused.
//!
//! An INCR looks, too. No two of them see the same number, and numbers grow with time. The search for linearizability
//! implies it; this check needs no search and so cannot give up.

use crate::sim::model::{Command, Ended, Record};
use std::collections::BTreeMap;

/// Whether the history is one of increments and reads.
pub fn fits(history: &[&Record]) -> bool {
    history.iter().all(|r| matches!(r.command, Command::Incr | Command::Get))
        && history.iter().any(|r| r.command == Command::Incr)
}

/// What a command saw: the counter after it.
fn seen(r: &Record) -> Result<Option<i64>, String> {
    use crema_core::Reply;
    let Some(Ended::Replied(reply)) = &r.ended else { return Ok(None) };
    let number = match (&r.command, reply) {
        (Command::Incr, Reply::Int(n)) => Some(*n),
        (Command::Get, Reply::Nil) => Some(0),
        (Command::Get, Reply::Bulk(v)) => std::str::from_utf8(v).ok().and_then(|v| v.parse().ok()),
        _ => None,
    };
    number.map(Some).ok_or(format!("counter {}: {:?} answers {reply:?}", r.key, r.command))
}

/// Checks a counter's history. The error says what does not add up.
pub fn check(history: &[&Record]) -> Result<(), String> {
    let mut acknowledged: Vec<u64> = Vec::new();
    let mut asked: Vec<u64> = Vec::new();
    for r in history.iter().filter(|r| r.command == Command::Incr) {
        match r.ended {
            Some(Ended::Replied(_)) => {
                acknowledged.push(r.ret);
                asked.push(r.call);
            }
            Some(Ended::NotApplied) => {}
            Some(Ended::Unknown) | None => asked.push(r.call),
        }
    }
    acknowledged.sort_unstable();
    asked.sort_unstable();
    let mut looks: Vec<(&Record, i64)> = Vec::new();
    for &r in history {
        looks.extend(seen(r)?.map(|n| (r, n)));
    }
    looks.sort_by_key(|(r, _)| r.call);
    let mut by_end = looks.clone();
    by_end.sort_by_key(|(r, _)| r.ret);
    let mut ended = by_end.into_iter().peekable();
    let mut most_before = 0;
    let mut numbers: BTreeMap<i64, &Record> = BTreeMap::new();
    for (r, n) in looks {
        let (key, call, ret) = (&r.key, r.call, r.ret);
        let own = i64::from(r.command == Command::Incr);
        let least = acknowledged.partition_point(|end| *end < call) as i64 + own;
        let most = asked.partition_point(|begin| *begin < ret) as i64;
        if !(least..=most).contains(&n) {
            return Err(format!(
                "counter {key} is {n} at {call}..{ret}, where at least {least} increments were done and at most {most}"
            ));
        }
        while let Some((_, before)) = ended.next_if(|(b, _)| b.ret < call) {
            most_before = most_before.max(before);
        }
        if n < most_before + own {
            return Err(format!("counter {key} is {n} at {call}..{ret}, after it was {most_before}"));
        }
        if own == 1
            && let Some(other) = numbers.insert(n, r)
        {
            return Err(format!("counter {key}: the increments at {} and {call} both answer {n}", other.call));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::Reply;

    fn rec(command: Command, call: u64, ret: u64, ended: Ended) -> Record {
        Record { key: "c".into(), conn: 1, command, call, ret, call_ns: call, ret_ns: ret, ended: Some(ended) }
    }
    fn incr(n: i64, call: u64, ret: u64) -> Record {
        rec(Command::Incr, call, ret, Ended::Replied(Reply::Int(n)))
    }
    fn read(n: i64, call: u64, ret: u64) -> Record {
        let reply = if n == 0 { Reply::Nil } else { Reply::Bulk(n.to_string().into()) };
        rec(Command::Get, call, ret, Ended::Replied(reply))
    }
    fn lost(call: u64) -> Record {
        rec(Command::Incr, call, call, Ended::Unknown)
    }
    fn right(records: &[Record]) -> bool {
        let history: Vec<&Record> = records.iter().collect();
        assert!(fits(&history));
        check(&history).is_ok()
    }

    #[test]
    fn lost_and_repeated_increments_are_found_in_the_end() {
        let refused = rec(Command::Incr, 5, 6, Ended::NotApplied);
        for n in 0..6 {
            let history = [incr(1, 1, 2), incr(2, 3, 4), lost(4), refused.clone(), read(n, 9, 10)];
            assert_eq!(right(&history), (2..=3).contains(&n), "{n}");
        }
    }

    #[test]
    fn reads_in_the_middle_are_bounded_too() {
        let later = || [incr(3, 20, 21), incr(4, 22, 23)];
        for n in 0..5 {
            let middle = [incr(1, 1, 2), incr(2, 3, 10), read(n, 5, 6)];
            assert_eq!(right(&[&middle[..], &later()].concat()), (1..=2).contains(&n), "{n}");
        }
        assert!(!right(&[lost(1), lost(2), lost(3), read(2, 4, 5), read(1, 6, 7)]), "it runs back");
        assert!(right(&[lost(1), lost(2), lost(3), read(2, 4, 7), read(1, 5, 6)]), "they overlap");
    }

    #[test]
    fn increments_look_as_well() {
        assert!(!right(&[incr(1, 1, 5), incr(1, 2, 6)]), "two with one answer");
        assert!(!right(&[incr(2, 1, 2)]), "more than was asked for");
        assert!(!right(&[incr(1, 1, 9), lost(1), incr(2, 2, 3), incr(2, 4, 5)]), "not more than before");
        assert!(!right(&[lost(1), read(1, 2, 3), lost(4), incr(1, 5, 6)]), "no more than a read before");
        assert!(right(&[lost(1), lost(1), incr(3, 2, 4), incr(1, 2, 5)]));
    }

    #[test]
    fn what_is_no_number_is_found() {
        let odd = rec(Command::Get, 3, 4, Ended::Replied(Reply::Bulk("x".into())));
        assert!(!right(&[incr(1, 1, 2), odd]));
        assert!(!right(&[rec(Command::Incr, 1, 2, Ended::Replied(Reply::Ok))]));
    }
}
