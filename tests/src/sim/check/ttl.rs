//! Lifetimes: a value written with PX is not gone before its time, not seen after it, and does not come back.
//!
//! ```text
//!   SET PX T   call |-----| ret                       T, less a little                 T, and a little more
//!                   '------------------------------------|   gone or not: both right   |-----------------> never seen
//!                   must be seen by all that end here ---'                             '--- by reads called here
//! ```
//!
//! A write took effect between its call and its return (one with an unknown outcome by the end of the first read that saw
//! it, or never). Log time runs at the leader's monotonic rate, so a lifetime in log time is one in real time but for the
//! rate of clocks, and for what changes with the leader.
//!
//! Besides, what is a matter of order: nothing is read before it was asked for, after it was refused, after it was
//! certainly overwritten or deleted, or after a later read saw the key without it. `Advance` entries promise the last of
//! these whoever leads: an expired key never comes back.
//!
//! Values are distinct; keys are written by SET PX, SET and DEL. Times are the nanoseconds of the history.

use crate::sim::model::{Command, Ended, Record, Value};
use crema_core::Reply;
use std::collections::{BTreeMap, BTreeSet};

/// Part of a lifetime by which it may be longer or shorter: steering takes 1/1,000 at most and clocks drift by 200 ppm in
/// the simulator, by less in machines; several leaders' faults may add up.
pub const RATE_PART: u64 = 100;

/// What a lifetime may be longer by. A new leader knows log time from the last message of the old one and from its own
/// clock since; that message may have been on its way for seconds (the longest delay of the simulator is 1.5 s).
pub const LATE_SLACK_NS: u64 = 3_000_000_000;

/// What a lifetime may be shorter by: log time counts whole milliseconds, at both ends, and a follower's estimate may run
/// a little ahead of its leader's before it leads.
pub const EARLY_SLACK_NS: u64 = 5_000_000;

const NS_OF_MS: u64 = 1_000_000;

struct Write<'a> {
    record: &'a Record,
    /// The value; none for a delete.
    value: Option<&'a [u8]>,
    /// Lifetime in milliseconds; for ever if none.
    px: Option<u64>,
    /// By then it had certainly taken effect; `u64::MAX` if that is not known.
    end: u64,
}

impl Write<'_> {
    fn begun(&self) -> u64 {
        self.record.call_ns
    }

    /// From then on nothing may be left of it.
    fn over(&self) -> u64 {
        let Some(px) = self.px else { return u64::MAX };
        let life = px.saturating_mul(NS_OF_MS);
        self.end.saturating_add(life).saturating_add(life / RATE_PART).saturating_add(LATE_SLACK_NS)
    }

    /// Before then it is not gone, if nothing ended it.
    fn alive(&self) -> u64 {
        let Some(px) = self.px else { return u64::MAX };
        let life = px.saturating_mul(NS_OF_MS);
        self.begun().saturating_add((life - life / RATE_PART).saturating_sub(EARLY_SLACK_NS))
    }

    fn tell(&self) -> String {
        let (call, ret) = (self.record.call_ns, self.record.ret_ns);
        format!("{:?} at {call}..{ret} ns -> {:?}", self.record.command, self.record.ended)
    }
}

/// What somebody saw: the number of the write whose value it was, or none if the key was absent.
struct Look<'a> {
    record: &'a Record,
    write: Option<usize>,
}

/// Whether the history is one that this check can judge: there are lifetimes, distinct values, and only SET PX, SET, DEL
/// and GET.
pub fn fits(history: &[&Record]) -> bool {
    let mut seen = BTreeSet::new();
    let mut lifetimes = false;
    history.iter().all(|r| match &r.command {
        Command::Get | Command::Del => true,
        Command::Set(v) => seen.insert(v),
        Command::SetPx { value, .. } => {
            lifetimes = true;
            seen.insert(value)
        }
        _ => false,
    }) && lifetimes
}

/// Checks the history of one key, which begins absent and [`fits`]. The error says what does not.
pub fn check(history: &[&Record]) -> Result<(), String> {
    let mut writes: Vec<Write<'_>> = Vec::new();
    let mut refused: BTreeSet<&[u8]> = BTreeSet::new();
    for &record in history {
        let (value, px) = match &record.command {
            Command::Set(v) => (Some(&v[..]), None),
            Command::SetPx { value, px } => (Some(&value[..]), Some(*px)),
            // One that found nothing changed nothing: a look.
            Command::Del if record.ended != Some(Ended::Replied(Reply::Int(0))) => (None, None),
            _ => continue,
        };
        let end = match record.ended {
            Some(Ended::NotApplied) => {
                refused.extend(value);
                continue;
            }
            Some(Ended::Replied(_)) => record.ret_ns,
            Some(Ended::Unknown) | None => u64::MAX,
        };
        writes.push(Write { record, value, px, end });
    }
    let by_value: BTreeMap<&[u8], usize> =
        writes.iter().enumerate().filter_map(|(i, w)| w.value.map(|v| (v, i))).collect();
    let mut looks: Vec<Look<'_>> = Vec::new();
    for &record in history {
        let Some(Ended::Replied(reply)) = &record.ended else { continue };
        let found: Value = match (&record.command, reply) {
            (Command::Get, reply) => {
                record.command.finds(reply).ok_or(format!("{}: a read answers {reply:?}", record.key))?
            }
            (Command::Del, Reply::Int(0)) => None,
            _ => continue,
        };
        let Some(value) = found else {
            looks.push(Look { record, write: None });
            continue;
        };
        let told = |what: &str| format!("{} {what}", tell_look(record, &String::from_utf8_lossy(&value)));
        let write = match by_value.get(&value[..]) {
            Some(i) => *i,
            None if refused.contains(&value[..]) => return Err(told("which was refused")),
            None => return Err(told("which nobody wrote")),
        };
        if record.ret_ns < writes[write].begun() {
            return Err(told("which was not written yet"));
        }
        writes[write].end = writes[write].end.min(record.ret_ns);
        looks.push(Look { record, write: Some(write) });
    }
    for look in &looks {
        match look.write {
            Some(write) => present(look, &writes[write], write, &writes, &looks)?,
            None => absent(look, &writes, &looks)?,
        }
    }
    Ok(())
}

fn tell_look(r: &Record, found: &str) -> String {
    format!("{}: {:?} at {}..{} ns finds {found},", r.key, r.command, r.call_ns, r.ret_ns)
}

/// A value was seen: it may be there.
fn present(
    look: &Look<'_>,
    w: &Write<'_>,
    number: usize,
    writes: &[Write<'_>],
    looks: &[Look<'_>],
) -> Result<(), String> {
    let call = look.record.call_ns;
    let told = |what: String| {
        let found = String::from_utf8_lossy(w.value.unwrap_or_default());
        Err(format!("{} {what}; it is of {}", tell_look(look.record, &found), w.tell()))
    };
    if call > w.over() {
        return told(format!("which expired by {} ns", w.over()));
    }
    if let Some(y) = writes.iter().find(|y| w.end < y.begun() && y.end < call) {
        return told(format!("which was ended by {}", y.tell()));
    }
    let without = |l: &&Look<'_>| l.write != Some(number) && w.end < l.record.call_ns && l.record.ret_ns < call;
    if let Some(l) = looks.iter().find(without) {
        let (command, from, to) = (&l.record.command, l.record.call_ns, l.record.ret_ns);
        return told(format!("which was gone by {command:?} at {from}..{to} ns"));
    }
    Ok(())
}

/// The key was absent: something must explain it.
fn absent(look: &Look<'_>, writes: &[Write<'_>], looks: &[Look<'_>]) -> Result<(), String> {
    let (call, ret) = (look.record.call_ns, look.record.ret_ns);
    // Nothing that was over before this stood last.
    let Some(last_call) = writes.iter().filter(|y| y.end < call).map(Write::begun).max() else {
        return Ok(());
    };
    // Another value that was seen in between stood after what was over before that look.
    let seen_after = |(i, x): (usize, &Write<'_>)| {
        looks.iter().any(|l| l.write.is_some_and(|w| w != i) && x.end < l.record.call_ns && l.record.ret_ns < call)
    };
    let mut last = writes
        .iter()
        .enumerate()
        .filter(|(i, x)| x.begun() <= ret && x.end >= last_call && !seen_after((*i, x)))
        .map(|(_, x)| x)
        .peekable();
    let mut known = String::new();
    while let Some(x) = last.next_if(|x| x.value.is_some() && x.alive() > ret) {
        known += &format!("\n      {}", x.tell());
    }
    if last.peek().is_some() {
        return Ok(());
    }
    Err(format!("{} but none of what may have been written last was over:{known}", tell_look(look.record, "nothing")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times in milliseconds.
    fn rec(command: Command, call: u64, ret: u64, ended: Ended) -> Record {
        let (call_ns, ret_ns) = (call * NS_OF_MS, ret * NS_OF_MS);
        Record { key: "t".into(), conn: 1, command, call, ret, call_ns, ret_ns, ended: Some(ended) }
    }
    fn px(v: &str, px: u64) -> Command {
        Command::SetPx { value: v.into(), px }
    }
    fn put(v: &str, life: u64, call: u64, ret: u64) -> Record {
        rec(px(v, life), call, ret, Ended::Replied(Reply::Ok))
    }
    fn lost(v: &str, life: u64, call: u64) -> Record {
        rec(px(v, life), call, call, Ended::Unknown)
    }
    fn set(v: &str, call: u64, ret: u64) -> Record {
        rec(Command::Set(v.into()), call, ret, Ended::Replied(Reply::Ok))
    }
    fn del(n: i64, call: u64, ret: u64) -> Record {
        rec(Command::Del, call, ret, Ended::Replied(Reply::Int(n)))
    }
    fn get(v: &str, call: u64, ret: u64) -> Record {
        rec(Command::Get, call, ret, Ended::Replied(Reply::Bulk(v.as_bytes().to_vec().into())))
    }
    fn nil(call: u64, ret: u64) -> Record {
        rec(Command::Get, call, ret, Ended::Replied(Reply::Nil))
    }
    fn judge(records: &[Record]) -> String {
        let history: Vec<&Record> = records.iter().collect();
        assert!(fits(&history));
        check(&history).err().unwrap_or_default()
    }

    #[test]
    fn a_value_that_is_seen_too_long_is_found() {
        // Written by 20, lives for 1,000, at most 1,010, and 3,000 of slack.
        assert_eq!(judge(&[put("a", 1_000, 10, 20), get("a", 4_030, 4_040)]), "");
        assert!(judge(&[put("a", 1_000, 10, 20), get("a", 4_031, 4_040)]).contains("which expired by 4030000000 ns"));
        // An unknown one may have happened late, but not after it was read.
        assert_eq!(judge(&[lost("a", 1_000, 10), get("a", 9_000, 9_001)]), "");
        assert!(judge(&[lost("a", 1_000, 10), get("a", 20, 30), get("a", 4_041, 4_050)]).contains("expired"));
        assert_eq!(judge(&[set("b", 1, 2), get("b", 9_000_000, 9_000_001), put("a", 1, 9_000_002, 9_000_003)]), "");
    }

    #[test]
    fn a_value_that_is_gone_too_early_is_found() {
        // Called at 10, lives for 1,000, at least 990 less 5.
        assert_eq!(judge(&[put("a", 1_000, 10, 20), nil(900, 995)]), "");
        assert!(judge(&[put("a", 1_000, 10, 20), nil(900, 994)]).contains("was over"));
        assert_eq!(judge(&[put("a", 1_000, 10, 20), nil(15, 18)]), "", "not written yet");
        assert_eq!(judge(&[put("a", 4, 10, 20), nil(21, 22)]), "", "too short to say anything");
        assert!(judge(&[lost("a", 1_000, 10), get("a", 11, 12), nil(13, 14)]).contains("was over"));
        assert_eq!(judge(&[lost("a", 1_000, 10), nil(13, 14)]), "");
        assert!(
            judge(&[put("a", 1_000, 10, 20), set("b", 30, 40), nil(9_000, 9_001)]).contains("was over"),
            "for ever"
        );
        // A delete that found nothing says the same as a read.
        assert!(judge(&[put("a", 1_000, 10, 20), del(0, 30, 40)]).contains("was over"));
    }

    #[test]
    fn deletes_and_overwrites_explain_an_absence() {
        let a = || put("a", 1_000, 10, 20);
        assert_eq!(judge(&[a(), del(1, 30, 40), nil(50, 60)]), "");
        assert_eq!(judge(&[a(), del(1, 30, 90), nil(50, 60)]), "", "perhaps by then");
        assert_eq!(judge(&[a(), rec(Command::Del, 30, 30, Ended::Unknown), nil(50, 60)]), "");
        assert!(judge(&[a(), rec(Command::Del, 30, 40, Ended::NotApplied), nil(50, 60)]).contains("was over"));
        assert!(judge(&[a(), nil(50, 60), del(1, 61, 62)]).contains("was over"), "later");
        assert!(judge(&[del(1, 5, 6), a(), nil(50, 60)]).contains("was over"), "earlier");
        // A short lifetime that overwrote it, or perhaps did.
        assert_eq!(judge(&[a(), put("b", 10, 30, 40), nil(50, 60)]), "");
        assert_eq!(judge(&[a(), lost("b", 10, 30), nil(50, 60)]), "");
        // It was overwritten in turn, which a later read shows.
        let b = || lost("b", 10, 5);
        assert_eq!(judge(&[b(), a(), nil(50, 60)]), "");
        assert!(judge(&[lost("b", 10, 1), get("b", 2, 3), a(), get("a", 21, 22), nil(50, 60)]).contains("was over"));
        // The earlier of two that overlap, seen before the later one.
        let both = [put("x", 10, 1, 9), put("y", 1_000, 1, 9), get("x", 2, 3), get("y", 10, 11), nil(50, 60)];
        assert!(judge(&both).contains("was over"));
    }

    #[test]
    fn what_is_out_of_order_is_found() {
        let a = || put("a", 1_000, 10, 20);
        assert!(judge(&[a(), get("a", 1, 9)]).contains("not written yet"));
        assert!(judge(&[a(), get("x", 30, 40)]).contains("nobody wrote"));
        assert!(judge(&[rec(px("r", 1_000), 1, 2, Ended::NotApplied), get("r", 3, 4)]).contains("refused"));
        assert!(judge(&[a(), set("b", 30, 40), get("a", 41, 42)]).contains("was ended by"));
        assert_eq!(judge(&[a(), set("b", 30, 45), get("a", 41, 42)]), "", "perhaps not yet");
        assert!(judge(&[a(), del(1, 30, 40), get("a", 41, 42)]).contains("was ended by"));
        assert!(judge(&[a(), lost("b", 900, 25), get("b", 30, 40), get("a", 41, 42)]).contains("was ended by"));
        let both = [put("x", 1_000, 1, 9), put("y", 1_000, 1, 9), get("x", 2, 3), get("y", 10, 11), get("x", 12, 13)];
        assert!(judge(&both).contains("was gone by"), "neither overwrote the other for certain");
    }

    #[test]
    fn a_value_that_comes_back_is_found() {
        // Within its tolerance it may be gone, but then it is.
        assert_eq!(judge(&[put("a", 1_000, 10, 20), nil(1_100, 1_101), nil(1_200, 1_201)]), "");
        let back = [put("a", 1_000, 10, 20), nil(1_100, 1_101), get("a", 1_200, 1_201)];
        assert!(judge(&back).contains("was gone by Get at 1100000000..1101000000 ns"));
        assert_eq!(judge(&[put("a", 1_000, 10, 20), nil(1_100, 1_201), get("a", 1_200, 1_201)]), "", "they overlap");
    }

    #[test]
    fn other_commands_and_repeated_values_do_not_fit() {
        let fits_all = |records: &[Record]| fits(&records.iter().collect::<Vec<_>>());
        assert!(!fits_all(&[put("a", 9, 1, 2), put("a", 9, 3, 4)]));
        assert!(!fits_all(&[put("a", 9, 1, 2), set("a", 3, 4)]));
        assert!(!fits_all(&[put("a", 9, 1, 2), rec(Command::Incr, 3, 4, Ended::Unknown)]));
        assert!(!fits_all(&[set("a", 1, 2)]));
    }
}
