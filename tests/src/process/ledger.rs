//! What a cluster must still hold after many rounds of kills.
//!
//! ```text
//!   history of a round, judged -> add: for each key its last value, and the writes nobody knows of
//!   after every later round    -> check: through every gateway each key holds that value, or such a write explains the new one
//! ```
//!
//! Each round works on keys of its own, so that its history stays short enough to be judged as a whole; the ledger is what
//! carries it on. Nobody writes a key of an earlier round: what it holds may only change by a write that was on its way
//! when its client lost sight of it, and by each of those once.

use super::resp::{Client, Value, encode};
use super::{Context, Failure, Result, eventually};
use crate::history::{Answer, Operation, Outcome};
use crate::sim::model::Command;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

/// Longer than any request's deadline.
const REPLY: Duration = Duration::from_secs(15);
/// GETs in one pipelined batch.
const BATCH: usize = 500;
/// Complaints in words.
const MOST_COMPLAINTS: usize = 10;

/// What a key holds, and what may still happen to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    value: Option<Vec<u8>>,
    /// Writes of unknown outcome that have not been seen. A SET among them that was carried out and overwritten unseen
    /// stays here: that it happens again would go unnoticed.
    open: Vec<Command>,
}

/// The keys of all rounds so far.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    entries: BTreeMap<String, Entry>,
}

/// Keys that hold what nothing explains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Through no gateway the right value was found.
    pub lost: u64,
    /// Another gateway had the right one.
    pub stale: u64,
    /// The first of them in words.
    pub told: Vec<String>,
}

impl Ledger {
    /// Number of keys.
    pub fn keys(&self) -> usize {
        self.entries.len()
    }

    /// Takes up the history of a round, in order of the calls, in which each key was read last of all. It must have been
    /// judged before.
    ///
    /// # Errors
    ///
    /// If a line is no operation, or a key has no answered read.
    pub fn add(&mut self, operations: &[Operation]) -> Result<()> {
        let mut by_key: BTreeMap<&str, Vec<(Command, &Operation)>> = BTreeMap::new();
        for operation in operations {
            let command = operation.command().map_err(Failure::new)?;
            by_key.entry(&operation.key).or_default().push((command, operation));
        }
        for (key, operations) in by_key {
            self.entries.insert(key.into(), entry(&operations).context(key)?);
        }
        Ok(())
    }

    /// Reads every key through each of `gateways`, while nobody writes them, asking again where the answer is an error.
    ///
    /// # Errors
    ///
    /// If a gateway does not answer within `within`.
    pub fn check(&mut self, gateways: &[(u64, SocketAddr)], within: Duration) -> Result<Losses> {
        let keys: Vec<String> = self.entries.keys().cloned().collect();
        let mut wrong = BTreeMap::<&String, Vec<String>>::new();
        for &(gateway, addr) in gateways {
            for keys in keys.chunks(BATCH) {
                let found = eventually(&format!("reading back through node {gateway}"), within, || get(addr, keys))?;
                for (key, found) in keys.iter().zip(found) {
                    let entry = self.entries.get_mut(key).expect("keys come from it");
                    match entry.settled(&found) {
                        Some(settled) => *entry = settled,
                        None => wrong.entry(key).or_default().push(format!("{} at node {gateway}", text(&found))),
                    }
                }
            }
        }
        let mut losses = Losses::default();
        for (key, found) in wrong {
            *if found.len() == gateways.len() { &mut losses.lost } else { &mut losses.stale } += 1;
            if losses.told.len() < MOST_COMPLAINTS {
                let Entry { value, open } = &self.entries[key];
                losses.told.push(format!("{key} was {}, is {}; unknown: {open:?}", text(value), found.join(", ")));
            }
        }
        Ok(losses)
    }
}

/// The values of `keys`, which must be strings.
fn get(addr: SocketAddr, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>> {
    let mut client = Client::connect(addr, REPLY).context("connecting")?;
    let mut bytes = Vec::new();
    keys.iter().for_each(|key| encode(&[b"GET", key.as_bytes()], &mut bytes));
    client.send(&bytes).context("sending")?;
    let value = |key: &String| match client.read().context(key)? {
        Value::Nil => Ok(None),
        Value::Bulk(bytes) => Ok(Some(bytes)),
        other => Err(Failure::new(format!("GET {key}: {other:?}"))),
    };
    keys.iter().map(value).collect()
}

fn text(value: &Option<Vec<u8>>) -> String {
    value.as_ref().map_or("absent".into(), |v| format!("{:?}", String::from_utf8_lossy(v)))
}

fn number(value: &Option<Vec<u8>>) -> Option<u64> {
    value.as_ref().map_or(Some(0), |v| std::str::from_utf8(v).ok()?.parse().ok())
}

/// The elements of a list, each with its comma.
fn elements(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.split_inclusive(|b| *b == b',')
}

/// What the history of one key leaves behind.
fn entry(operations: &[(Command, &Operation)]) -> Result<Entry> {
    let seen = |o: &Operation| match &o.reply {
        Some(Answer::Bulk(v)) => Some(Some(v.0.clone())),
        Some(Answer::Nil) => Some(None),
        _ => None,
    };
    let reads = operations.iter().filter(|(command, _)| *command == Command::Get);
    let read: Vec<Option<Vec<u8>>> = reads.filter_map(|(_, o)| seen(o)).collect();
    let value = read.last().cloned().ok_or_else(|| Failure::new("nobody read it"))?;
    let unknown = operations.iter().filter(|(c, o)| c.is_write() && o.outcome == Outcome::Unknown).map(|(c, _)| c);
    let known: BTreeSet<&[u8]> = read.iter().flatten().map(Vec::as_slice).collect();
    let in_list: BTreeSet<&[u8]> = value.iter().flat_map(|v| elements(v)).collect();
    let mut open: Vec<Command> = unknown
        .filter(|command| match command {
            Command::Set(v) => !known.contains(v.as_slice()),
            Command::Append(v) => !in_list.contains(v.as_slice()),
            _ => true,
        })
        .cloned()
        .collect();
    if operations.iter().any(|(c, _)| *c == Command::Incr) {
        // What the counter holds beyond the answered ones is some of the unknown ones, whichever.
        let answered =
            operations.iter().filter(|(c, o)| *c == Command::Incr && o.outcome == Outcome::Ok).count() as u64;
        let counted = number(&value).ok_or_else(|| Failure::new("it is no number"))?;
        let done = counted.checked_sub(answered).ok_or_else(|| Failure::new("it lost an increment"))?;
        open.truncate(open.len().saturating_sub(usize::try_from(done).context("its value")?));
    }
    Ok(Entry { value, open })
}

impl Entry {
    /// The entry after `found` was read; nothing if that is not explained.
    fn settled(&self, found: &Option<Vec<u8>>) -> Option<Entry> {
        if *found == self.value {
            return Some(self.clone());
        }
        let new = found.as_ref()?;
        let mut open = self.open.clone();
        match open.first()? {
            Command::Set(_) => {
                let at = open.iter().position(|c| matches!(c, Command::Set(v) if v == new))?;
                open.remove(at);
            }
            Command::Incr => {
                let more = usize::try_from(number(found)?.checked_sub(number(&self.value)?)?).ok()?;
                open.truncate(open.len().checked_sub(more)?);
            }
            Command::Append(_) => {
                for element in elements(new.strip_prefix(self.value.as_deref().unwrap_or_default())?) {
                    let at = open.iter().position(|c| matches!(c, Command::Append(v) if v == element))?;
                    open.remove(at);
                }
            }
            _ => return None,
        }
        Some(Entry { value: found.clone(), open })
    }
}

/// Keys of a judged and refused history whose last value misses something acknowledged: the others were read stale or
/// wrong on the way.
pub fn lost_keys(operations: &[Operation]) -> u64 {
    let mut by_key: BTreeMap<&str, Vec<(Command, &Operation)>> = BTreeMap::new();
    for operation in operations {
        if let Ok(command) = operation.command() {
            by_key.entry(&operation.key).or_default().push((command, operation));
        }
    }
    let misses = |operations: &Vec<(Command, &Operation)>| {
        let Ok(Entry { value, .. }) = entry(operations) else { return true };
        let answered = operations.iter().filter(|(_, o)| o.outcome == Outcome::Ok);
        let list: BTreeSet<&[u8]> = value.iter().flat_map(|v| elements(v)).collect();
        answered.into_iter().any(|(command, _)| match command {
            Command::Append(v) => !list.contains(v.as_slice()),
            Command::Set(_) => value.is_none(),
            _ => false,
        })
    };
    by_key.values().filter(|operations| misses(operations)).count() as u64
}

#[cfg(test)]
mod tests {
    use super::super::resp::fake;
    use super::*;
    use crema_core::Reply;

    fn done(key: &str, command: Command, reply: Reply) -> Operation {
        Operation::open(1, 0, key, &command).answered(1, &reply)
    }
    fn lost_sight(key: &str, command: Command) -> Operation {
        Operation::open(1, 0, key, &command)
    }
    fn bulk(v: &str) -> Reply {
        Reply::Bulk(v.as_bytes().to_vec().into())
    }
    fn entry_of(operations: &[Operation]) -> Entry {
        let mut ledger = Ledger::default();
        ledger.add(operations).unwrap();
        ledger.entries.into_values().next().unwrap()
    }
    fn after(entry: &Entry, found: Option<&str>) -> Option<Entry> {
        entry.settled(&found.map(|v| v.as_bytes().to_vec()))
    }

    #[test]
    fn a_register_may_only_become_what_somebody_wrote_unseen() {
        let (set, get) = (|v: &str| Command::Set(v.into()), Command::Get);
        let entry = entry_of(&[
            done("r", set("a"), Reply::Ok),
            lost_sight("r", set("b")),
            lost_sight("r", set("c")),
            done("r", get.clone(), bulk("b")),
            done("r", set("d"), Reply::Ok),
            done("r", get, bulk("d")),
        ]);
        assert_eq!(after(&entry, Some("d")), Some(entry.clone()));
        for gone in [Some("a"), Some("b"), Some("x"), None] {
            assert_eq!(after(&entry, gone), None, "{gone:?}");
        }
        let late = after(&entry, Some("c")).expect("the write nobody had seen");
        // Once, and there is no way back.
        assert_eq!((after(&late, Some("d")), after(&late, Some("c"))), (None, Some(late)));
    }

    #[test]
    fn a_counter_may_only_grow_by_what_is_unknown() {
        let incr = |n| done("c", Command::Incr, Reply::Int(n));
        let unknown = || lost_sight("c", Command::Incr);
        let read = done("c", Command::Get, bulk("3"));
        let entry = entry_of(&[incr(1), unknown(), unknown(), unknown(), incr(3), read]);
        assert_eq!(entry.open.len(), 2, "one of three was counted");
        for (found, explained) in [("3", true), ("4", true), ("5", true), ("6", false), ("2", false)] {
            assert_eq!(after(&entry, Some(found)).is_some(), explained, "{found}");
        }
        assert_eq!(after(&entry, None), None);
        assert_eq!(after(&after(&entry, Some("5")).unwrap(), Some("4")), None);
    }

    #[test]
    fn a_list_may_only_gain_what_is_unknown() {
        let append = |v: &str| Command::Append(v.into());
        let read = done("l", Command::Get, bulk("1.1,1.2,"));
        let known = done("l", append("1.1,"), Reply::Int(4));
        let entry = entry_of(&[known, lost_sight("l", append("1.2,")), lost_sight("l", append("1.3,")), read]);
        assert_eq!(entry.open, [append("1.3,")]);
        for (found, explained) in [("1.1,1.2,1.3,", true), ("1.1,1.2,1.2,", false), ("1.1,", false), ("1.3,", false)] {
            assert_eq!(after(&entry, Some(found)).is_some(), explained, "{found}");
        }
    }

    #[test]
    fn lost_and_stale_are_told_apart() {
        let mut ledger = Ledger::default();
        let set = |key: &str| done(key, Command::Set(b"v".to_vec()), Reply::Ok);
        let get = |key: &str| done(key, Command::Get, bulk("v"));
        ledger.add(&[set("a"), set("b"), set("c"), get("a"), get("b"), get("c")]).unwrap();
        let answers = |a: &'static str, b: &'static str| {
            fake::serve(10, move |line| {
                let value = match line {
                    "GET a" => a,
                    "GET b" => b,
                    _ => "v",
                };
                Some(Some(format!("${}\r\n{value}\r\n", value.len())))
            })
        };
        let (first, second) = (answers("x", "x"), answers("x", "v"));
        let losses = ledger.check(&[(1, first), (2, second)], REPLY).unwrap();
        assert_eq!((losses.lost, losses.stale), (1, 1), "{losses:?}");
        assert_eq!(ledger.check(&[(3, answers("v", "v"))], REPLY).unwrap(), Losses::default());
    }

    #[test]
    fn what_a_last_read_misses_is_lost() {
        let set = done("r", Command::Set(b"v".to_vec()), Reply::Ok);
        let append = done("l", Command::Append(b"1,".to_vec()), Reply::Int(2));
        let incr = done("c", Command::Incr, Reply::Int(1));
        let get = |key: &str, reply| done(key, Command::Get, reply);
        let well = [set, append, incr];
        let history = |r, l, c| [&well[..], &[get("r", r), get("l", l), get("c", c)]].concat();
        assert_eq!(lost_keys(&history(bulk("v"), bulk("1,"), bulk("1"))), 0);
        assert_eq!(lost_keys(&history(Reply::Nil, Reply::Nil, Reply::Nil)), 3);
        assert_eq!(lost_keys(&history(bulk("stale"), bulk("1,"), bulk("1"))), 0);
    }
}
