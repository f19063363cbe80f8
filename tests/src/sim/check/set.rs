//! A grow-only set kept in one key by APPEND of distinct elements: what was added is there, and nothing else.
//!
//! - An element is in every read that was called after its add was acknowledged, or after any read with it had ended.
//! - What is read was asked for by then, was not refused, and is read once.
//!
//! Elements end with a comma and hold no other, so that a value tells its elements. No search: the work is linear in the
//! bytes read (and a sort), and there is nothing to give up. The order of elements is the business of [`super::list`].

use crate::sim::model::{Command, Ended, Record, Value};
use std::collections::{BTreeMap, BTreeSet};

/// An answered read.
pub(super) struct Found<'a> {
    pub(super) record: &'a Record,
    /// What it found; the empty value if the key was absent.
    pub(super) value: Vec<u8>,
}

/// The elements of a value; `None` if it is not made of elements.
pub(super) fn elements(value: &[u8]) -> Option<Vec<&[u8]>> {
    let (last, rest) = value.split_last()?;
    let all: Vec<&[u8]> = rest.split(|b| *b == b',').collect();
    (*last == b',' && all.iter().all(|e| !e.is_empty())).then_some(all)
}

/// Whether the history is one that this check (and [`super::list`]) can judge: only appends, of distinct single elements,
/// and reads.
pub fn fits(history: &[&Record]) -> bool {
    let mut seen = BTreeSet::new();
    let mut appends = false;
    history.iter().all(|r| match &r.command {
        Command::Get => true,
        Command::Append(v) => {
            appends = true;
            elements(v).is_some_and(|e| e.len() == 1) && seen.insert(v)
        }
        _ => false,
    }) && appends
}

/// The answered reads in the order of the history. The error is an answer that no read of such a key has.
pub(super) fn reads<'a>(history: &[&'a Record]) -> Result<Vec<Found<'a>>, String> {
    let mut out = Vec::new();
    for r in history.iter().filter(|r| r.command == Command::Get) {
        let Some(Ended::Replied(reply)) = &r.ended else { continue };
        let value: Value = r.command.finds(reply).ok_or(format!("{}: a read answers {reply:?}", r.key))?;
        out.push(Found { record: r, value: value.unwrap_or_default() });
    }
    Ok(out)
}

struct Add<'a> {
    record: &'a Record,
    refused: bool,
    /// From this stamp on it is certainly there: calls after it must see it.
    there: u64,
}

/// Checks the history of one key, which begins absent and [`fits`]. The error says what does not.
pub fn check(history: &[&Record]) -> Result<(), String> {
    let mut adds: BTreeMap<&[u8], Add<'_>> = BTreeMap::new();
    for record in history {
        let Command::Append(v) = &record.command else { continue };
        let (refused, there) = match record.ended {
            Some(Ended::Replied(_)) => (false, record.ret),
            Some(Ended::NotApplied) => (true, u64::MAX),
            Some(Ended::Unknown) | None => (false, u64::MAX),
        };
        adds.insert(&v[..v.len().saturating_sub(1)], Add { record, refused, there });
    }
    let reads = reads(history)?;
    let mut contents = Vec::with_capacity(reads.len());
    for Found { record: r, value } in &reads {
        let told = |e: &[u8], what: &str| {
            Err(format!("{}: {} {what} by the read at {}..{}", r.key, String::from_utf8_lossy(e), r.call, r.ret))
        };
        let mut content: BTreeSet<&[u8]> = BTreeSet::new();
        let parts = if value.is_empty() { Some(Vec::new()) } else { elements(value) };
        let Some(parts) = parts else { return told(value, "is no list of elements, but is read") };
        for e in parts {
            let Some(add) = adds.get_mut(e) else { return told(e, "was never added, but is seen") };
            if add.refused {
                return told(e, "was refused, but is seen");
            }
            if add.record.call > r.ret {
                return told(e, "was not added yet, but is seen");
            }
            if !content.insert(e) {
                return told(e, "was added once, but is seen twice");
            }
            add.there = add.there.min(r.ret);
        }
        contents.push((r, content));
    }
    let mut there: Vec<(u64, &[u8])> =
        adds.iter().filter(|(_, a)| a.there != u64::MAX).map(|(e, a)| (a.there, *e)).collect();
    there.sort_unstable();
    for (r, content) in contents {
        // All that must be seen was seen in a right history, so that this is no more work than reading was.
        for (since, e) in there.iter().take_while(|(since, _)| *since < r.call) {
            if !content.contains(e) {
                let e = String::from_utf8_lossy(e);
                let (call, ret) = (r.call, r.ret);
                return Err(format!("{}: {e} is there since {since}, but missed by the read at {call}..{ret}", r.key));
            }
        }
    }
    Ok(())
}

/// What unit tests of this check and of [`super::list`] share.
#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use crema_core::Reply;

    pub(crate) fn rec(command: Command, call: u64, ret: u64, ended: Ended) -> Record {
        Record { key: "s".into(), conn: 1, command, call, ret, call_ns: call, ret_ns: ret, ended: Some(ended) }
    }
    /// An acknowledged append, after which the value had `len` bytes.
    pub(crate) fn append(e: &str, len: i64, call: u64, ret: u64) -> Record {
        rec(Command::Append(e.into()), call, ret, Ended::Replied(Reply::Int(len)))
    }
    pub(crate) fn lost(e: &str, call: u64) -> Record {
        rec(Command::Append(e.into()), call, call, Ended::Unknown)
    }
    pub(crate) fn read(v: &str, call: u64, ret: u64) -> Record {
        let reply = if v.is_empty() { Reply::Nil } else { Reply::Bulk(v.as_bytes().to_vec().into()) };
        rec(Command::Get, call, ret, Ended::Replied(reply))
    }
    /// What `check` says to these: nothing, or the error.
    pub(crate) fn verdict(check: fn(&[&Record]) -> Result<(), String>, records: &[Record]) -> String {
        let history: Vec<&Record> = records.iter().collect();
        assert!(fits(&history));
        check(&history).err().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{append, lost, read, rec};
    use super::*;

    fn judge(records: &[Record]) -> String {
        testing::verdict(check, records)
    }

    #[test]
    fn right_histories_pass() {
        // Overlapping adds are seen or not; an unknown one may come late; order is no matter here.
        let records = [
            read("", 1, 2),
            append("a,", 2, 3, 10),
            lost("u,", 4),
            append("b,", 4, 5, 11),
            read("", 6, 7),
            read("b,", 8, 12),
            read("b,a,", 13, 14),
            read("u,b,a,", 15, 16),
        ];
        assert_eq!(judge(&records), "");
    }

    #[test]
    fn a_lost_element_is_found() {
        let known = [append("a,", 2, 1, 2), append("b,", 4, 3, 4), read("b,", 5, 6)];
        assert!(judge(&known).contains("a is there since 2, but missed"));
        let seen = [lost("u,", 1), append("a,", 2, 2, 9), read("u,", 3, 4), read("a,", 5, 6)];
        assert!(judge(&seen).contains("u is there since 4, but missed"), "an unknown one that was read stays");
        assert!(judge(&[append("a,", 2, 1, 2), read("", 3, 4)]).contains("missed"));
    }

    #[test]
    fn what_was_not_added_is_found() {
        let a = || append("a,", 2, 1, 2);
        assert!(judge(&[a(), read("a,x,", 3, 4)]).contains("x was never added"));
        assert!(judge(&[a(), read("a,b,", 3, 4), append("b,", 4, 5, 6)]).contains("b was not added yet"));
        assert!(judge(&[a(), read("a,a,", 3, 4)]).contains("seen twice"));
        let refused = rec(Command::Append("r,".into()), 3, 4, Ended::NotApplied);
        assert!(judge(&[a(), refused, read("a,r,", 5, 6)]).contains("r was refused"));
        assert!(judge(&[a(), read("a", 5, 6)]).contains("no list of elements"));
        assert!(judge(&[a(), read("a,,", 5, 6)]).contains("no list of elements"));
        let odd = rec(Command::Get, 3, 4, Ended::Replied(crema_core::Reply::Int(1)));
        assert!(judge(&[a(), odd]).contains("a read answers"));
    }

    #[test]
    fn only_distinct_single_elements_fit() {
        let fits_all = |records: &[Record]| fits(&records.iter().collect::<Vec<_>>());
        assert!(fits_all(&[append("a,", 2, 1, 2), read("a,", 3, 4)]));
        assert!(!fits_all(&[append("a,", 2, 1, 2), append("a,", 4, 3, 4)]), "twice");
        for odd in ["a", ",", "", "a,b,", "a,b"] {
            assert!(!fits_all(&[append(odd, 2, 1, 2)]), "{odd:?}");
        }
        assert!(!fits_all(&[append("a,", 2, 1, 2), rec(Command::Del, 3, 4, Ended::Unknown)]));
        assert!(!fits_all(&[read("", 1, 2)]));
    }

    #[test]
    fn long_histories_are_judged_without_a_search() {
        let mut records: Vec<Record> = (0..300).map(|i| lost(&format!("u{i},"), i)).collect();
        let mut value = String::new();
        for i in 0..2_000u64 {
            let element = format!("k{i},");
            value += &element;
            records.push(append(&element, value.len() as i64, 1_000 + 10 * i, 2_000 + 10 * i));
            if i % 50 == 0 {
                records.push(read(&value, 2_001 + 10 * i, 2_002 + 10 * i));
            }
        }
        assert_eq!(judge(&records), "");
        let broken = value.replace("k77,", "");
        records.push(read(&broken, 900_000, 900_001));
        assert!(judge(&records).contains("k77 is there"));
    }
}
