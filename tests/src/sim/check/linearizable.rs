//! Linearizability of one key (Herlihy and Wing 1990), by the search of Wing and Gong (1993) as improved by Lowe (2017):
//! depth first over orders that respect real time, remembering every (set of executed commands, value) that led nowhere.
//!
//! ```text
//!   history of a key -> drop what was certainly not executed -> search an order -> ok | violation | gave up (a failure)
//! ```
//!
//! A command with an unknown outcome stays open to the end: it may stand anywhere after its call, or nowhere. Such ones
//! are tried last, and of several equal ones only the earliest, since any order with a later one has an equivalent with it.
//! Where the values tell, hopeless branches end early: the workload writes no value twice, so a value that was left does
//! not come back and must have been read by all who read it; a key that is only appended to only grows, so that until its
//! longest value was read every value is a beginning of that one; an unknown SET that nobody read need not have happened.

use crate::sim::model::{Command, Ended, Record, Value};
use crate::sim::rng::split_mix;
use crema_core::Reply;
use std::collections::{HashMap, HashSet};

/// Steps after which a search gives up. A giving up counts as a failure: the history was not proved right.
pub const MAX_STEPS: u64 = 30_000_000;

/// Why a key's history is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// No order explains the answers. The longest explained prefix, and the value after it.
    NotLinearizable {
        /// How many answered commands the best order explains, of how many.
        explained: (usize, usize),
        /// The value at that point.
        value: Value,
        /// The commands that could have come next and did not fit.
        stuck: Vec<String>,
    },
    /// The search took too long.
    GaveUp,
}

struct Item<'a> {
    command: &'a Command,
    call: u64,
    ret: u64,
    reply: Option<&'a Reply>,
    mark: u128,
}

fn wide(x: u64) -> u128 {
    u128::from(split_mix(x)) << 64 | u128::from(split_mix(x ^ 0x5bd1_e995_0000_0001))
}

fn hash_value(v: &Value) -> u128 {
    let Some(v) = v else { return 1 };
    // FNV-1a over 128 bits.
    v.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |h: u128, b| {
        (h ^ u128::from(*b)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013B)
    })
}

/// Commands that are not executed yet, in order of their calls, as a linked list so that executing one is cheap.
struct Open {
    next: Vec<usize>,
    prev: Vec<usize>,
    taken: Vec<bool>,
}

impl Open {
    fn new(n: usize) -> Self {
        // Position n is head and tail.
        Open {
            next: (1..=n).chain([0]).collect(),
            prev: std::iter::once(n).chain(0..n).collect(),
            taken: vec![false; n],
        }
    }
    fn first(&self) -> usize {
        self.next[self.next.len() - 1]
    }
    fn take(&mut self, i: usize) {
        let (p, n) = (self.prev[i], self.next[i]);
        self.next[p] = n;
        self.prev[n] = p;
        self.taken[i] = true;
    }
    fn put_back(&mut self, i: usize) {
        let (p, n) = (self.prev[i], self.next[i]);
        self.next[p] = i;
        self.prev[n] = i;
        self.taken[i] = false;
    }
}

struct Step {
    candidates: Vec<usize>,
    tried: usize,
    value: Value,
    executed: Option<usize>,
}

/// Checks the history of one key, which begins absent.
pub fn check(history: &[&Record]) -> Result<(), Violation> {
    check_within(history, MAX_STEPS)
}

/// Checks with a limit of steps.
pub fn check_within(history: &[&Record], max_steps: u64) -> Result<(), Violation> {
    let mut items: Vec<Item<'_>> = Vec::new();
    for r in history {
        let (reply, ret) = match &r.ended {
            Some(Ended::Replied(reply)) => (Some(reply), r.ret),
            Some(Ended::NotApplied) => continue,
            // An unanswered read says nothing and changes nothing.
            Some(Ended::Unknown) | None if !r.command.is_write() => continue,
            Some(Ended::Unknown) | None => (None, u64::MAX),
        };
        items.push(Item { command: &r.command, call: r.call, ret, reply, mark: 0 });
    }
    items.sort_by_key(|i| i.call);
    drop_unread_sets(&mut items);
    for (n, item) in items.iter_mut().enumerate() {
        item.mark = wide(n as u64);
    }
    let longest = longest_read(&items);
    let returns = values_return(&items);
    let mut readers = Readers::new(&items);
    let answered = items.iter().filter(|i| i.reply.is_some()).count();
    let mut open = Open::new(items.len());
    let mut seen: HashSet<u128> = HashSet::new();
    let mut set: u128 = 0;
    let mut done = 0;
    let mut best = (0, None, Vec::new());
    let mut stack = vec![Step { candidates: candidates(&items, &open), tried: 0, value: None, executed: None }];
    let mut steps = 0;
    if answered == 0 {
        return Ok(());
    }
    while let Some(top) = stack.last_mut() {
        steps += 1;
        if steps > max_steps {
            return Err(Violation::GaveUp);
        }
        let Some(&i) = top.candidates.get(top.tried) else {
            // Nothing fits: undo the command that led here.
            if done >= best.0 && best.2.is_empty() {
                let stuck = top.candidates.iter().map(|i| format!("{:?} -> {:?}", items[*i].command, items[*i].reply));
                best = (done, top.value.clone(), stuck.collect());
            }
            let executed = top.executed;
            stack.pop();
            if let Some(i) = executed {
                open.put_back(i);
                readers.change(&items[i], 1);
                set ^= items[i].mark;
                done -= usize::from(items[i].reply.is_some());
            }
            continue;
        };
        top.tried += 1;
        let item = &items[i];
        let (value, reply) = item.command.apply(&top.value);
        if item.reply.is_some_and(|r| *r != reply) {
            continue;
        }
        if !returns && value != top.value && readers.waiting(&top.value) {
            continue;
        }
        if let Some((reader, all)) = longest
            && i != reader
            && !open.taken[reader]
            && !value.as_ref().is_none_or(|v| all.starts_with(v))
        {
            continue;
        }
        if !seen.insert((set ^ item.mark).wrapping_add(hash_value(&value))) {
            continue;
        }
        open.take(i);
        readers.change(item, -1);
        set ^= item.mark;
        done += usize::from(item.reply.is_some());
        if done > best.0 {
            best = (done, value.clone(), Vec::new());
        }
        if done == answered {
            return Ok(());
        }
        stack.push(Step { candidates: candidates(&items, &open), tried: 0, value, executed: Some(i) });
    }
    Err(Violation::NotLinearizable { explained: (best.0, answered), value: best.1, stuck: best.2 })
}

/// Of a key that is only appended to and read: who read the longest value, and that value.
fn longest_read<'a>(items: &[Item<'a>]) -> Option<(usize, &'a [u8])> {
    if !items.iter().all(|i| matches!(i.command, Command::Append(_) | Command::Get)) {
        return None;
    }
    let read = |(n, i): (usize, &Item<'a>)| match (i.command, i.reply) {
        (Command::Get, Some(Reply::Bulk(v))) => Some((n, &v[..])),
        _ => None,
    };
    items.iter().enumerate().filter_map(read).max_by_key(|(_, v)| v.len())
}

/// Whether a value may come back after it was left.
fn values_return(items: &[Item<'_>]) -> bool {
    let mut values = HashSet::new();
    let counts = items.iter().any(|i| *i.command == Command::Incr);
    let other = |c: &Command| c.is_write() && *c != Command::Incr;
    let twice = items.iter().any(|i| match i.command {
        Command::Set(v) | Command::SetNx(v) | Command::Append(v) | Command::PairSet(v) => !values.insert(v),
        Command::CompareAndSet { value, .. } => !values.insert(value),
        _ => false,
    });
    twice || (counts && items.iter().any(|i| other(i.command)))
}

/// If a key is only set and read: an unknown SET whose value nobody read may be left out of any order.
fn drop_unread_sets(items: &mut Vec<Item<'_>>) {
    if !items.iter().all(|i| i.command.sets().is_some() || !i.command.is_write()) {
        return;
    }
    // Both halves of a pair count, even where they differ: then no order fits in any case.
    let mut read: HashSet<Vec<u8>> = HashSet::new();
    for reply in items.iter().filter_map(|i| i.reply) {
        let both = if let Reply::Array(both) = reply { &both[..] } else { std::slice::from_ref(reply) };
        let found = |r: &Reply| if let Reply::Bulk(v) = r { Some(v.to_vec()) } else { None };
        read.extend(both.iter().filter_map(found));
    }
    items.retain(|i| i.reply.is_some() || i.command.sets().is_none_or(|v| read.contains(v)));
}

/// How many open reads answered each value; absent counts where nothing deletes the key.
struct Readers {
    open: HashMap<Value, i64>,
    nil: bool,
}

impl Readers {
    fn new(items: &[Item<'_>]) -> Self {
        let nil = !items.iter().any(|i| *i.command == Command::Del);
        let mut readers = Readers { open: HashMap::new(), nil };
        items.iter().for_each(|i| readers.change(i, 1));
        readers
    }
    fn change(&mut self, item: &Item<'_>, by: i64) {
        let Some(value) = item.reply.and_then(|r| item.command.finds(r)) else { return };
        if value.is_none() && !self.nil {
            return;
        }
        *self.open.entry(value).or_default() += by;
    }
    fn waiting(&self, value: &Value) -> bool {
        self.open.get(value).is_some_and(|n| *n > 0)
    }
}

/// Which commands may come next: those called before the first end of any command still open. Answered ones first.
fn candidates(items: &[Item<'_>], open: &Open) -> Vec<usize> {
    let mut known = Vec::new();
    let mut unknown: Vec<usize> = Vec::new();
    let mut first_end = u64::MAX;
    let mut i = open.first();
    while i < items.len() && items[i].call < first_end {
        first_end = first_end.min(items[i].ret);
        if items[i].reply.is_some() {
            known.push(i);
        } else if !unknown.iter().any(|u| items[*u].command == items[i].command) {
            unknown.push(i);
        }
        i = open.next[i];
    }
    known.append(&mut unknown);
    known
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::model::Half;

    fn rec(command: Command, call: u64, ret: u64, ended: Ended) -> Record {
        Record { key: "k".into(), conn: 1, command, call, ret, call_ns: call, ret_ns: ret, ended: Some(ended) }
    }
    fn ok(command: Command, call: u64, ret: u64, reply: Reply) -> Record {
        rec(command, call, ret, Ended::Replied(reply))
    }
    fn set(v: &str, call: u64, ret: u64) -> Record {
        ok(Command::Set(v.into()), call, ret, Reply::Ok)
    }
    fn get(v: &str, call: u64, ret: u64) -> Record {
        ok(Command::Get, call, ret, Reply::Bulk(v.as_bytes().to_vec().into()))
    }
    fn nil(call: u64, ret: u64) -> Record {
        ok(Command::Get, call, ret, Reply::Nil)
    }
    fn incr(n: i64, call: u64, ret: u64) -> Record {
        ok(Command::Incr, call, ret, Reply::Int(n))
    }
    fn judge(records: &[Record]) -> Result<(), Violation> {
        check(&records.iter().collect::<Vec<_>>())
    }
    fn wrong(records: &[Record]) -> bool {
        matches!(judge(records), Err(Violation::NotLinearizable { .. }))
    }

    #[test]
    fn sequential_and_concurrent_histories_pass() {
        assert_eq!(judge(&[nil(1, 2), set("a", 3, 4), get("a", 5, 6)]), Ok(()), "one after the other");
        // The read overlaps the write: both answers are right.
        assert_eq!(judge(&[set("a", 1, 10), nil(2, 3), get("a", 4, 5)]), Ok(()));
        assert_eq!(judge(&[]), Ok(()));
    }

    #[test]
    fn a_stale_read_is_found() {
        assert!(wrong(&[set("a", 1, 2), set("b", 3, 4), get("a", 5, 6)]));
        assert!(wrong(&[set("a", 1, 10), get("a", 2, 3), nil(4, 5)]), "a value once read does not go away");
    }

    #[test]
    fn a_lost_write_is_found() {
        assert!(wrong(&[set("a", 1, 2), nil(3, 4)]));
    }

    #[test]
    fn a_double_increment_is_found() {
        assert!(wrong(&[incr(1, 1, 2), incr(3, 3, 4)]));
        assert!(wrong(&[incr(1, 1, 2), get("2", 3, 4)]));
        assert!(wrong(&[incr(1, 1, 5), incr(1, 2, 6)]), "two increments with one answer");
    }

    #[test]
    fn a_refused_command_that_happened_is_found() {
        let refused = rec(Command::Set("a".into()), 1, 2, Ended::NotApplied);
        assert!(wrong(&[refused.clone(), get("a", 3, 4)]));
        assert_eq!(judge(&[refused, nil(3, 4)]), Ok(()));
    }

    #[test]
    fn an_unknown_command_may_happen_late_or_never_but_once() {
        let unknown = rec(Command::Incr, 1, 2, Ended::Unknown);
        assert_eq!(judge(&[unknown.clone(), incr(1, 3, 4), incr(2, 5, 6)]), Ok(()), "never");
        assert_eq!(judge(&[unknown.clone(), incr(1, 3, 4), incr(3, 5, 6)]), Ok(()), "between");
        assert!(wrong(&[unknown.clone(), incr(2, 3, 4), incr(4, 5, 6)]), "twice");
        assert!(wrong(&[incr(2, 1, 2), rec(Command::Incr, 3, 4, Ended::Unknown)]), "before its call");
    }

    #[test]
    fn appends_and_conditions() {
        let append = |v: &str, len, call, ret| ok(Command::Append(v.into()), call, ret, Reply::Int(len));
        let nx = |v: &str, reply, call, ret| ok(Command::SetNx(v.into()), call, ret, reply);
        assert_eq!(judge(&[append("b,", 4, 1, 9), append("a,", 2, 2, 8), get("a,b,", 10, 11)]), Ok(()));
        assert!(wrong(&[append("b,", 4, 1, 9), append("a,", 2, 2, 8), get("b,a,", 10, 11)]));
        assert!(wrong(&[nx("a", Reply::Ok, 1, 4), nx("b", Reply::Ok, 2, 5)]), "two holders of a lock");
        let cas = |was: Option<&str>, v: &str, done, call, ret| {
            let command = Command::CompareAndSet { expected: was.map(|w| w.into()), value: v.into() };
            ok(command, call, ret, Reply::Int(done))
        };
        let chain =
            [cas(Some("a"), "b", 1, 1, 9), cas(None, "a", 1, 2, 8), cas(None, "c", 0, 10, 11), get("b", 12, 13)];
        assert_eq!(judge(&chain), Ok(()));
        assert!(wrong(&[set("a", 1, 2), cas(Some("a"), "b", 1, 3, 6), cas(Some("a"), "c", 1, 4, 7)]), "both have won");
        assert!(wrong(&[set("a", 1, 2), cas(Some("a"), "b", 0, 3, 4)]), "refused without a reason");
    }

    #[test]
    fn many_unknown_sets_do_not_explode() {
        let mut records: Vec<Record> =
            (0..60).map(|i| rec(Command::Set(format!("u{i}").into_bytes()), i, i, Ended::Unknown)).collect();
        for i in 0..100u64 {
            records.push(set(&i.to_string(), 100 + 4 * i, 101 + 4 * i));
            let seen = if i % 5 == 0 { format!("u{}", 59 - i / 5) } else { i.to_string() };
            records.push(get(&seen, 102 + 4 * i, 103 + 4 * i));
        }
        assert_eq!(judge(&records), Ok(()));
        records.push(get("u59", 900, 901));
        assert!(wrong(&records), "a value comes back");
    }

    #[test]
    fn a_key_that_is_deleted_may_be_absent_again() {
        let del = |n, call, ret| ok(Command::Del, call, ret, Reply::Int(n));
        assert_eq!(
            judge(&[nil(1, 2), set("a", 3, 4), del(1, 5, 6), nil(7, 8), set("b", 9, 10), del(1, 11, 12), nil(13, 14)]),
            Ok(())
        );
        assert!(wrong(&[set("a", 3, 4), del(1, 5, 6), get("a", 7, 8)]));
        // The same value twice: it does come back.
        assert_eq!(judge(&[set("a", 1, 2), set("b", 3, 4), set("a", 5, 6), get("a", 7, 8)]), Ok(()));
    }

    #[test]
    fn a_pair_is_one_register_with_two_names() {
        let put =
            |v: &str, call, ret| ok(Command::PairSet(v.into()), call, ret, Reply::Array(vec![Reply::Ok, Reply::Ok]));
        let bulk = |v: &str| Reply::Bulk(v.as_bytes().to_vec().into());
        let half = |half, v: &str, call, ret| ok(Command::PairHalf(half), call, ret, bulk(v));
        let both = |a: &str, b: &str, call, ret| ok(Command::PairGet, call, ret, Reply::Array(vec![bulk(a), bulk(b)]));
        let lost = rec(Command::PairSet("l".into()), 1, 2, Ended::Unknown);
        assert_eq!(judge(&[put("x", 1, 9), half(Half::A, "x", 2, 3), half(Half::B, "x", 4, 5)]), Ok(()));
        assert_eq!(judge(&[lost.clone(), put("x", 3, 4), both("x", "x", 5, 6), both("l", "l", 7, 8)]), Ok(()));
        // The write of y is seen in one half and not yet in the other.
        let story = [put("x", 1, 2), put("y", 3, 9), half(Half::A, "y", 4, 5), half(Half::B, "x", 6, 7)];
        assert!(wrong(&story), "half visible");
        assert!(wrong(&[put("x", 1, 2), put("y", 3, 9), both("y", "x", 4, 5)]), "half of it in one read");
        assert!(wrong(&[put("x", 1, 2), lost, both("l", "x", 4, 5)]), "half of an unknown one");
    }

    #[test]
    fn a_search_that_takes_too_long_counts_as_failure() {
        let records: Vec<Record> =
            (0..10).map(|i| incr(1 + (i as i64 + 3) % 11, i, 100 + i)).chain([get("x", 200, 201)]).collect();
        assert_eq!(check_within(&records.iter().collect::<Vec<_>>(), 3), Err(Violation::GaveUp));
    }

    #[test]
    fn many_unknown_increments_do_not_explode() {
        let mut records: Vec<Record> = (0..40).map(|i| rec(Command::Incr, i, i, Ended::Unknown)).collect();
        records.extend((0..100).map(|i| incr(i as i64 * 5 / 4 + 1, 100 + 2 * i, 101 + 2 * i)));
        assert_eq!(judge(&records), Ok(()));
    }

    #[test]
    fn many_unknown_appends_do_not_explode() {
        let mut records: Vec<Record> =
            (0..40).map(|i| rec(Command::Append(format!("u{i},").into_bytes()), i, i, Ended::Unknown)).collect();
        let mut value = String::new();
        for i in 0..60u64 {
            if i % 4 == 0 {
                value += &format!("u{},", 39 - i / 4);
            }
            value += &format!("k{i},");
            let known = Command::Append(format!("k{i},").into_bytes());
            records.push(ok(known, 100 + i, 101 + i, Reply::Int(value.len() as i64)));
        }
        records.push(get(&value, 500, 501));
        assert_eq!(judge(&records), Ok(()));
        let last = records.len() - 1;
        records[last] = get(&value.replace("k7,", ""), 500, 501);
        assert!(wrong(&records), "a lost append is found just as soon");
    }
}
