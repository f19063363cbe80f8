//! Judges a history key by key, with every check that fits what was done to the key.
//!
//! ```text
//!   relaxed reads of a list           -> relaxed; the rest of the key as without them
//!   SET PX among SET, DEL, GET        -> ttl (what it holds depends on time: no search)
//!   only APPEND of elements, and GET  -> set, list          \
//!   only INCR and GET                 -> once                > and the search for an order of all
//!   pairs; anything else              ->                    /
//!   keys that begin with `own`        -> order, besides
//! ```

use super::check::{linearizable, list, once, order, relaxed, set, ttl};
use super::model::{Command, Record};
use std::collections::BTreeMap;

/// Keys of one client each, whose commands take effect in the order sent.
pub const OWN: &str = "own";

/// What came of a history.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Keys looked at.
    pub keys: usize,
    /// What is wrong, with the end of the key's history.
    pub violations: Vec<String>,
    /// Keys that no check fits, and why.
    pub unjudged: Vec<String>,
}

impl Verdict {
    /// Everything that stands against the history: what cannot be judged is not proved right.
    pub fn into_failures(self) -> impl Iterator<Item = String> {
        self.violations.into_iter().chain(self.unjudged)
    }
}

/// Judges a history, given in the order of calls. The search is left out for keys of which `without_search` says so and
/// which a check without search covers.
pub fn judge<'a>(
    history: impl IntoIterator<Item = &'a Record>,
    without_search: impl Fn(&str, usize) -> bool,
) -> Verdict {
    let mut by_key: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for r in history {
        by_key.entry(&r.key).or_default().push(r);
    }
    let mut verdict = Verdict { keys: by_key.len(), ..Verdict::default() };
    for (key, records) in &by_key {
        match judge_key(key, records, without_search(key, records.len())) {
            Ok(wrong) => {
                verdict.violations.extend(wrong.into_iter().map(|w| format!("{w}\n{}", tell(records))));
            }
            Err(why) => verdict.unjudged.push(format!("{key}: {why}")),
        }
    }
    verdict
}

/// Everything that is wrong with the history of a key. The error says why it cannot be judged.
fn judge_key(key: &str, records: &[&Record], without_search: bool) -> Result<Vec<String>, &'static str> {
    if records.iter().any(|r| matches!(r.command, Command::SetPx { .. })) {
        return if ttl::fits(records) {
            Ok(ttl::check(records).err().into_iter().collect())
        } else {
            Err("a key with set_px takes set, del and get besides, and no value twice")
        };
    }
    let relaxed = |r: &&&Record| matches!(r.command, Command::GetRelaxed { .. });
    if records.iter().any(|r| relaxed(&r)) {
        // The other operations are judged without them.
        let others: Vec<&Record> = records.iter().filter(|r| !relaxed(r)).copied().collect();
        if !set::fits(&others) && others.iter().any(|r| r.command != Command::Get) {
            return Err("only keys that are appended to take get_bounded and get_local");
        }
        let mut wrong = judge_key(key, &others, without_search)?;
        wrong.extend(relaxed::check(records).err());
        return Ok(wrong);
    }
    let pair = |r: &&Record| matches!(r.command, Command::PairSet(_) | Command::PairGet | Command::PairHalf(_));
    let pairs = records.iter().filter(|r| pair(r)).count();
    if pairs != 0 && pairs != records.len() {
        return Err("a pair takes no other operations");
    }
    let mut wrong = Vec::new();
    let mut covered = false;
    if set::fits(records) {
        covered = true;
        wrong.extend(set::check(records).err());
        wrong.extend(list::check(records).err());
    }
    if once::fits(records) {
        covered = true;
        wrong.extend(once::check(records).err());
    }
    if key.starts_with(OWN) {
        if records.windows(2).any(|w| w[0].conn != w[1].conn) {
            return Err("a key of one client's own is used by several");
        }
        wrong.extend(order::check(records).err());
    }
    if !(covered && without_search)
        && let Err(v) = linearizable::check(records)
    {
        wrong.push(format!("{key} is not linearizable: {v:?}"));
    }
    Ok(wrong)
}

/// The end of a key's history, for a report.
fn tell(records: &[&Record]) -> String {
    let mut out = String::new();
    for r in records.iter().rev().take(60).rev() {
        let text = format!("{:?}", r.command);
        out += &format!("    {:>6}..{:<6} conn {:>4} {text} -> {:?}\n", r.call, r.ret, r.conn, r.ended);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::model::{Ended, Half};
    use crema_core::Reply;

    fn rec(key: &str, command: Command, at: u64, reply: Reply) -> Record {
        let ended = Some(Ended::Replied(reply));
        let (call_ns, ret_ns) = (at * 1_000_000, at * 1_000_000 + 1);
        Record { key: key.into(), conn: 1, command, call: 2 * at, ret: 2 * at + 1, call_ns, ret_ns, ended }
    }
    fn bulk(v: &str) -> Reply {
        Reply::Bulk(v.as_bytes().to_vec().into())
    }

    /// One planted violation for each check, and what it is reported as.
    #[test]
    fn every_kind_of_key_meets_its_checks() {
        let a = || b"a,".to_vec();
        let own = [
            rec("own1-1", Command::Set(a()), 1, Reply::Ok),
            Record { call: 3, ret: 9, ..rec("own1-1", Command::Set(b"b,".to_vec()), 2, Reply::Ok) },
            // Allowed by real time, as they overlap; not by the order of a connection.
            Record { call: 4, ret: 8, ..rec("own1-1", Command::Get, 2, bulk("a,")) },
        ];
        let px = Command::SetPx { value: a(), px: 1_000 };
        let set_pair = Command::PairSet(a());
        for (records, says) in [
            (
                vec![rec("r", Command::Set(a()), 1, Reply::Ok), rec("r", Command::Get, 2, Reply::Nil)],
                &["linearizable"][..],
            ),
            (vec![rec("c", Command::Incr, 1, Reply::Int(2))], &["at most 1", "linearizable"]),
            (
                vec![rec("l", Command::Append(a()), 1, Reply::Int(2)), rec("l", Command::Get, 2, bulk("a,a,"))],
                &["seen twice", "but ends at 4", "linearizable"],
            ),
            (vec![rec("t", px.clone(), 1, Reply::Ok), rec("t", Command::Get, 2, Reply::Nil)], &["was over"]),
            (
                vec![
                    rec("{p}", set_pair, 1, Reply::Array(vec![Reply::Ok, Reply::Ok])),
                    rec("{p}", Command::PairHalf(Half::A), 2, bulk("a,")),
                    rec("{p}", Command::PairHalf(Half::B), 3, Reply::Nil),
                ],
                &["linearizable"],
            ),
            (own.to_vec(), &["connection 1"]),
        ] {
            let verdict = judge(&records, |_, _| false);
            assert!(verdict.unjudged.is_empty());
            assert_eq!((verdict.keys, verdict.violations.len()), (1, says.len()), "{:?}", verdict.violations);
            for (v, says) in verdict.violations.iter().zip(says) {
                assert!(v.contains(says), "{v}");
            }
        }
        // Without the search only where something else looks.
        let register = [rec("r", Command::Set(a()), 1, Reply::Ok), rec("r", Command::Get, 2, Reply::Nil)];
        assert_eq!(judge(&register, |_, _| true).violations.len(), 1);
        let counter = [rec("c", Command::Incr, 1, Reply::Int(2))];
        assert_eq!(judge(&counter, |_, _| true).violations.len(), 1);
        // What fits no check is said to be so.
        let odd = [rec("t", px, 1, Reply::Ok), rec("t", Command::Incr, 2, Reply::Int(1))];
        assert_eq!(judge(&odd, |_, _| false).unjudged.len(), 1);
        let odd = [rec("{p}", Command::PairGet, 1, Reply::Nil), rec("{p}", Command::Incr, 2, Reply::Int(1))];
        assert_eq!(judge(&odd, |_, _| false).unjudged.len(), 1);
        let several = [own[0].clone(), Record { conn: 2, ..own[1].clone() }];
        assert_eq!(judge(&several, |_, _| false).unjudged.len(), 1);
    }
}
