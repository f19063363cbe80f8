//! A list kept in one key by APPEND of distinct elements: there is one order of elements, and it respects time.
//!
//! - Every read is a beginning of every longer one, and no shorter than one that had ended before it was called.
//! - An element that was certainly there when another was asked for stands before it.
//! - An append answers where its element ends.
//!
//! Which elements must be there at all is the business of [`super::set`]; together they imply what the search would say,
//! in linear time after a sort.

use super::set::{Found, elements, reads};
use crate::sim::model::{Command, Ended, Record};
use crema_core::Reply;
use std::collections::BTreeMap;

struct Appended<'a> {
    record: &'a Record,
    /// Length of the value with it, if it answered.
    end: Option<usize>,
}

/// Checks the history of one key, which begins absent and fits ([`super::set::fits`]). The error says what does not.
pub fn check(history: &[&Record]) -> Result<(), String> {
    let key = history.first().map_or("", |r| &r.key);
    let mut appended: BTreeMap<&[u8], Appended<'_>> = BTreeMap::new();
    for &record in history {
        let Command::Append(v) = &record.command else { continue };
        let end = match &record.ended {
            Some(Ended::Replied(Reply::Int(n))) if *n >= v.len() as i64 => Some(*n as usize),
            Some(Ended::Replied(odd)) => return Err(format!("{key}: the append of {v:?} answers {odd:?}")),
            _ => None,
        };
        appended.insert(&v[..v.len().saturating_sub(1)], Appended { record, end });
    }
    let reads = reads(history)?;
    let longest: &[u8] = reads.iter().map(|f| &f.value[..]).max_by_key(|v| v.len()).unwrap_or_default();
    beginnings(key, &reads, longest)?;
    places(key, &appended, longest)?;
    order(key, &appended, &reads, longest)
}

/// Reads are beginnings of the longest, and grow with time.
fn beginnings(key: &str, reads: &[Found<'_>], longest: &[u8]) -> Result<(), String> {
    for Found { record, value } in reads {
        if !longest.starts_with(value) {
            let (call, ret) = (record.call, record.ret);
            let text = String::from_utf8_lossy(value);
            return Err(format!("{key}: the read at {call}..{ret} is no beginning of the longest one: {text}"));
        }
    }
    // In order of calls; what had ended before each, in order of ends.
    let mut by_call: Vec<&Found<'_>> = reads.iter().collect();
    let mut by_ret = by_call.clone();
    by_call.sort_by_key(|f| f.record.call);
    by_ret.sort_by_key(|f| f.record.ret);
    let mut ended = by_ret.into_iter().peekable();
    let mut least = 0;
    for f in by_call {
        while let Some(before) = ended.next_if(|b| b.record.ret < f.record.call) {
            least = least.max(before.value.len());
        }
        if f.value.len() < least {
            let (call, ret) = (f.record.call, f.record.ret);
            return Err(format!("{key}: the read at {call}..{ret} is shorter than one that ended before it"));
        }
    }
    Ok(())
}

/// Elements end where their appends said.
fn places(key: &str, appended: &BTreeMap<&[u8], Appended<'_>>, longest: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy;
    let mut at = 0;
    let mut read: BTreeMap<&[u8], usize> = BTreeMap::new();
    for e in elements(longest).unwrap_or_default() {
        at += e.len() + 1;
        read.insert(e, at);
    }
    let mut ends: Vec<(usize, usize, &[u8])> = Vec::new();
    for (e, a) in appended {
        let Some(end) = a.end else { continue };
        match read.get(e) {
            Some(place) if *place != end => {
                return Err(format!("{key}: {} answered {end}, but ends at {place}", text(e)));
            }
            None if end <= longest.len() => {
                return Err(format!("{key}: {} answered {end}, but something else is there", text(e)));
            }
            _ => ends.push((end, end - e.len() - 1, e)),
        }
    }
    ends.sort_unstable();
    for two in ends.windows(2) {
        if two[1].1 < two[0].0 {
            let (a, b) = (text(two[0].2), text(two[1].2));
            return Err(format!("{key}: {a} and {b} answered that they are in one place"));
        }
    }
    Ok(())
}

/// What was there before another was asked for stands before it: those that were read by their order, those that answered
/// by their ends.
fn order(
    key: &str,
    appended: &BTreeMap<&[u8], Appended<'_>>,
    reads: &[Found<'_>],
    longest: &[u8],
) -> Result<(), String> {
    // Lengths with the end of the first read that shows them: the element that ends there was there by then.
    let mut shown: Vec<(usize, u64)> = reads.iter().map(|f| (f.value.len(), f.record.ret)).collect();
    shown.sort_unstable();
    let mut places: Vec<(usize, &[u8])> = Vec::new();
    let mut at = 0;
    for e in elements(longest).unwrap_or_default() {
        at += e.len() + 1;
        places.push((at, e));
    }
    let unread = |a: &Appended<'_>| a.end.filter(|end| *end > longest.len());
    let mut later: Vec<(usize, &[u8])> = appended.iter().filter_map(|(e, a)| unread(a).map(|end| (end, *e))).collect();
    later.sort_unstable();
    places.append(&mut later);
    // From the last element to the first: since when is anything behind it certainly there?
    let mut behind = (u64::MAX, &b""[..]);
    for (end, e) in places.into_iter().rev() {
        // Foreign elements are found by the check of sets.
        let Some(a) = appended.get(e) else { continue };
        if behind.0 < a.record.call {
            return Err(format!(
                "{key}: {} was there at {}, before {} was asked for at {}, but stands behind it",
                String::from_utf8_lossy(behind.1),
                behind.0,
                String::from_utf8_lossy(e),
                a.record.call
            ));
        }
        while let Some((_, ret)) = shown.pop_if(|(len, _)| *len >= end) {
            behind = behind.min((ret, e));
        }
        if a.end.is_some() {
            behind = behind.min((a.record.ret, e));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::set::testing::{append, lost, read, rec, verdict};
    use super::*;

    fn judge(records: &[Record]) -> String {
        verdict(check, records)
    }

    #[test]
    fn right_histories_pass() {
        let records = [
            read("", 1, 2),
            append("a,", 4, 3, 10),
            append("b,", 2, 4, 11),
            lost("u,", 5),
            read("b,", 6, 9),
            read("b,a,", 12, 13),
            read("b,a,u,", 14, 20),
            read("b,a,", 15, 16),
            append("c,", 8, 21, 22),
            append("d,", 12, 21, 23),
        ];
        assert_eq!(judge(&records), "", "two bytes of an unread one may lie between c and d");
    }

    #[test]
    fn reads_of_two_orders_are_found() {
        let (a, b) = (|| append("a,", 2, 1, 9), || append("b,", 4, 2, 10));
        assert!(judge(&[a(), b(), read("a,b,", 11, 12), read("b,", 3, 4)]).contains("no beginning"));
        assert!(judge(&[a(), b(), read("a,b,", 3, 4), read("a,", 5, 6)]).contains("shorter"));
    }

    #[test]
    fn an_order_against_time_is_found() {
        let unknown = [lost("a,", 1), lost("b,", 2), lost("c,", 5), read("b,", 3, 4), read("b,c,a,", 8, 9)];
        assert_eq!(judge(&unknown), "", "a may be late");
        let seen = [lost("b,", 2), lost("c,", 5), read("b,", 3, 4), read("c,b,", 8, 9)];
        assert_ne!(judge(&seen), "", "b was read before c was asked for");
        let known = [append("a,", 4, 1, 2), append("b,", 2, 3, 4), read("b,a,", 5, 6)];
        assert!(judge(&known).contains("a was there at 2, before b was asked for at 3"));
        let mixed = [append("a,", 4, 1, 2), lost("b,", 3), read("b,a,", 5, 6)];
        assert!(judge(&mixed).contains("but stands behind it"));
        let unread = [append("a,", 4, 1, 2), append("b,", 2, 3, 4)];
        assert!(judge(&unread).contains("but stands behind it"), "without any read");
        // First read behind: the third was read before the second was asked for.
        let third = [lost("a,", 1), lost("c,", 2), lost("b,", 7), read("a,c,", 4, 5), read("a,c,b,", 8, 9)];
        assert_eq!(judge(&third), "");
    }

    #[test]
    fn answers_that_do_not_fit_their_places_are_found() {
        let two = |x, y| [append("a,", x, 1, 9), append("b,", y, 2, 10)];
        assert!(judge(&[&two(2, 2)[..], &[read("a,b,", 11, 12)]].concat()).contains("b answered 2, but ends at 4"));
        assert!(judge(&two(2, 3)).contains("in one place"));
        assert!(judge(&[&two(2, 4)[..], &[lost("c,", 1), read("a,c,", 11, 12)]].concat()).contains("something else"));
        let odd = rec(Command::Append("a,".into()), 1, 2, Ended::Replied(Reply::Ok));
        assert!(judge(&[odd]).contains("answers Ok"));
        assert!(judge(&[append("a,", 1, 1, 2)]).contains("answers Int(1)"), "shorter than the element");
    }
}
