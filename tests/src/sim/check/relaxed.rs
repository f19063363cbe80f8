//! Reads below linearizable, of keys that only grow: what the weaker levels still promise.
//!
//! - *local* and *bounded*: a state that once was, so a beginning of every longer one; nothing from the future, nothing
//!   that was refused.
//! - *bounded* by an age: everything that was acknowledged longer ago than that when the read was called.
//!
//! A bound is measured by the clock of the node that answers, hence a little slack for its rate.

use super::set::elements;
use crate::sim::model::{Command, Ended, Record};
use std::collections::BTreeMap;

/// Part by which a bound may be exceeded: clocks in the simulator run up to 5 % slow.
pub const RATE_PART: u64 = 15;

const NS_OF_MS: u64 = 1_000_000;

/// Checks the relaxed reads among the history of one key that is only appended to and read. The error says what is wrong.
pub fn check(history: &[&Record]) -> Result<(), String> {
    let mut adds: BTreeMap<&[u8], &Record> = BTreeMap::new();
    let mut found: Vec<(&Record, Option<u64>, Vec<u8>)> = Vec::new();
    let mut longest: Vec<u8> = Vec::new();
    for r in history {
        if let Command::Append(v) = &r.command {
            adds.insert(&v[..v.len().saturating_sub(1)], r);
        }
        let Some(Ended::Replied(reply)) = &r.ended else { continue };
        let Some(value) = r.command.finds(reply).map(Option::unwrap_or_default) else { continue };
        if value.len() > longest.len() {
            longest.clone_from(&value);
        }
        if let Command::GetRelaxed { max_age_ms } = r.command {
            found.push((r, max_age_ms, value));
        }
    }
    for (read, max_age_ms, value) in found {
        let told = |what: String| {
            let text = String::from_utf8_lossy(&value);
            Err(format!(
                "{}: {:?} at {}..{} ns {what}; it found {text}",
                read.key, read.command, read.call_ns, read.ret_ns
            ))
        };
        if !longest.starts_with(&value) {
            return told("is no beginning of the longest value".into());
        }
        let there = elements(&value).unwrap_or_default();
        for e in &there {
            match adds.get(e) {
                Some(add) if add.call > read.ret => {
                    return told(format!("sees {} too early", String::from_utf8_lossy(e)));
                }
                Some(add) if add.ended == Some(Ended::NotApplied) => {
                    return told(format!("sees {}, which was refused", String::from_utf8_lossy(e)));
                }
                Some(_) => {}
                None => return told(format!("sees {}, which nobody added", String::from_utf8_lossy(e))),
            }
        }
        let Some(age) = max_age_ms.map(|ms| ms * NS_OF_MS) else { continue };
        let since = read.call_ns.saturating_sub(age + age / RATE_PART);
        let missing = adds
            .iter()
            .find(|(e, add)| matches!(add.ended, Some(Ended::Replied(_))) && add.ret_ns < since && !there.contains(e));
        if let Some((e, add)) = missing {
            return told(format!("misses {}, acknowledged at {} ns", String::from_utf8_lossy(e), add.ret_ns));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crema_core::Reply;

    fn rec(command: Command, call: u64, ret: u64, ended: Ended) -> Record {
        let (call_ns, ret_ns) = (call * NS_OF_MS, ret * NS_OF_MS);
        Record { key: "s".into(), conn: 1, command, call, ret, call_ns, ret_ns, ended: Some(ended) }
    }
    fn add(v: &str, call: u64, ret: u64) -> Record {
        rec(Command::Append(v.into()), call, ret, Ended::Replied(Reply::Int(0)))
    }
    fn get(max_age_ms: Option<u64>, v: &str, call: u64, ret: u64) -> Record {
        let reply = if v.is_empty() { Reply::Nil } else { Reply::Bulk(v.as_bytes().to_vec().into()) };
        rec(Command::GetRelaxed { max_age_ms }, call, ret, Ended::Replied(reply))
    }
    fn judge(records: &[Record]) -> String {
        check(&records.iter().collect::<Vec<_>>()).err().unwrap_or_default()
    }

    #[test]
    fn a_bound_is_kept_and_a_local_read_may_be_as_old_as_it_likes() {
        let adds = || vec![add("a,", 1, 2), add("b,", 10, 20)];
        let with = |r: Record| judge(&[adds(), vec![r, get(None, "a,b,", 900, 901)]].concat());
        assert_eq!(with(get(None, "", 500, 501)), "");
        assert_eq!(with(get(Some(100), "a,", 125, 130)), "", "b was acknowledged at 20: just within");
        assert!(with(get(Some(100), "a,", 130, 131)).contains("misses b"));
        assert!(with(get(Some(100), "", 110, 111)).contains("misses a"));
    }

    #[test]
    fn a_state_that_never_was_is_found() {
        let adds = || vec![add("a,", 1, 2), add("b,", 10, 20), get(None, "a,b,", 900, 901)];
        let with = |r: Record| judge(&[adds(), vec![r]].concat());
        assert!(with(get(None, "b,", 500, 501)).contains("no beginning"));
        assert!(with(get(None, "a,b,", 5, 6)).contains("too early"));
        let refused = rec(Command::Append(b"c,".to_vec()), 30, 40, Ended::NotApplied);
        assert!(judge(&[refused, get(None, "c,", 50, 51)]).contains("refused"));
        assert!(judge(&[get(None, "x,", 50, 51)]).contains("nobody added"));
    }
}
