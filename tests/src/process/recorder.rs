//! Clients whose every command is recorded, for the linearizability checks.
//!
//! ```text
//!   Spec --thread--> one connection to one gateway: one command, its reply, a pause, the next command
//!                       |  answered / refused / no word: then a new connection, which is a new client
//!                       v
//!                  Vec<Operation>  --Recorder::finish-->  Recorded::judge (crate::sim::judge), Recorded::write (JSON lines)
//! ```
//!
//! Three kinds of keys, a few of each: registers (SET, GET), counters (INCR, GET) and lists (APPEND, GET). No value is
//! written twice, so that a value tells which command wrote it. Some clients only read: one whose writes hang asks
//! nothing more, and would not see what a deposed leader answers. Their patience is short: a command is only proof
//! against stale answers if it was sent after what it must see, so one that waits through a whole fault proves nothing.

use super::resp::{Client, Value};
use super::{Context, Failure, Result, eventually};
use crate::history::{self, Operation, Outcome};
use crate::sim::judge::judge;
use crate::sim::model::Command;
use crate::sim::rng::Rng;
use crema_core::Reply;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::io::{BufWriter, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most clients of one recorder.
pub const MAX_CLIENTS: usize = 64;
/// Most commands of one client: beyond, it sends nothing more.
const MOST_COMMANDS: usize = 20_000;
/// Pause between an answer and the next command: the pace of the load, slow enough for an unoptimised build.
const PACE: Duration = Duration::from_millis(2);
/// Pause after an error or a failed connection: the state that caused it lasts longer.
const RETRY: Duration = Duration::from_millis(25);
/// Appends to one list; then the next one begins. A list is read and judged as a whole, so its length is squared.
const LIST_LENGTH: u64 = 60;
/// Complaints that are kept in words.
const MOST_COMPLAINTS: usize = 10;

/// One client thread.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The node that it asks.
    pub gateway: u64,
    /// That node's address for Redis clients.
    pub addr: SocketAddr,
    /// Whether it writes; if not, it only reads.
    pub writes: bool,
    /// How long it waits for a connection or a reply.
    pub timeout: Duration,
}

/// What became of the commands sent to one gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// Answered with a result.
    pub answered: u64,
    /// Refused with an error that says it was not executed.
    pub refused: u64,
    /// Executed or not, nobody said.
    pub unknown: u64,
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answered, {} refused, {} unknown", self.answered, self.refused, self.unknown)
    }
}

/// What was recorded.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Every command, in order of the calls. Times are nanoseconds since the recorder's start, of one clock.
    pub operations: Vec<Operation>,
    /// Outcomes by gateway, final reads included.
    pub outcomes: BTreeMap<u64, Outcomes>,
    /// Answers that are no answers to the command, and refusals in words; the first of them.
    pub refusals: Vec<String>,
    /// What a server must never send, whatever the fault: a reply of a wrong kind, bytes that are not RESP.
    pub nonsense: Vec<String>,
    /// Connections that were refused or not made in time.
    pub unreachable: u64,
}

/// What all client threads share.
struct Shared {
    name: String,
    /// Hash tags of the keys: for each a register, a counter and lists.
    tags: Vec<String>,
    start: Instant,
    stop: AtomicBool,
    next_client: AtomicU64,
    /// Appends so far, by tag.
    appends: Vec<AtomicU64>,
    unreachable: AtomicU64,
    refusals: Mutex<Vec<String>>,
    nonsense: Mutex<Vec<String>>,
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).expect("584 years have not passed")
    }

    fn register(&self, tag: usize) -> String {
        format!("{{{}}}:{}:register", self.tags[tag], self.name)
    }

    fn counter(&self, tag: usize) -> String {
        format!("{{{}}}:{}:counter", self.tags[tag], self.name)
    }

    fn list(&self, tag: usize, appends: u64) -> String {
        format!("{{{}}}:{}:list:{}", self.tags[tag], self.name, appends / LIST_LENGTH)
    }

    fn complain(list: &Mutex<Vec<String>>, what: impl FnOnce() -> String) {
        let mut list = list.lock().expect("nobody panics with it");
        if list.len() < MOST_COMPLAINTS {
            list.push(what());
        }
    }
}

/// Client threads at work.
pub struct Recorder {
    shared: Arc<Shared>,
    specs: Vec<Spec>,
    answered: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Vec<(u64, Operation)>>>,
}

impl Recorder {
    /// Starts a client for each of `specs`, which work on keys with each of `tags` as their hash tag. No two recorders on
    /// one cluster may have the same `name`: it is part of their keys, which must begin absent.
    ///
    /// # Errors
    ///
    /// If a thread does not start.
    ///
    /// # Panics
    ///
    /// If there are no tags, or over [`MAX_CLIENTS`] clients.
    pub fn start(name: &str, specs: Vec<Spec>, tags: Vec<String>) -> Result<Recorder> {
        assert!(!tags.is_empty() && specs.len() <= MAX_CLIENTS, "{} tags, {} clients", tags.len(), specs.len());
        let shared = Arc::new(Shared {
            name: name.into(),
            start: Instant::now(),
            stop: AtomicBool::new(false),
            next_client: AtomicU64::new(1),
            appends: tags.iter().map(|_| AtomicU64::new(0)).collect(),
            tags,
            unreachable: AtomicU64::new(0),
            refusals: Mutex::default(),
            nonsense: Mutex::default(),
        });
        let answered: Vec<Arc<AtomicU64>> = specs.iter().map(|_| Arc::default()).collect();
        let mut recorder = Recorder { shared, specs, answered, threads: Vec::new() };
        for (number, spec) in recorder.specs.iter().enumerate() {
            let mut worker = Worker {
                number,
                conn: Connection::new(spec.clone(), recorder.shared.clone()),
                rng: Rng::new(number as u64),
                written: 0,
            };
            let answered = recorder.answered[number].clone();
            let thread = std::thread::Builder::new().name(format!("client-{number}"));
            recorder.threads.push(thread.spawn(move || worker.run(&answered)).context("a client's thread")?);
        }
        Ok(recorder)
    }

    /// Waits until every client of `gateways` has had `more` further commands answered with a result.
    ///
    /// # Errors
    ///
    /// If that takes longer than `within`.
    pub fn wait_answers(&self, gateways: &[u64], more: u64, within: Duration) -> Result<()> {
        let clients = || self.specs.iter().zip(&self.answered).filter(|(spec, _)| gateways.contains(&spec.gateway));
        let goals: Vec<u64> = clients().map(|(_, answered)| answered.load(Ordering::Relaxed) + more).collect();
        eventually("progress of every client", within, || {
            for ((spec, answered), goal) in clients().zip(&goals) {
                let have = answered.load(Ordering::Relaxed);
                if have < *goal {
                    let (gateway, kind) = (spec.gateway, if spec.writes { "writer" } else { "reader" });
                    return Err(Failure::new(format!("a {kind} at node {gateway}: {have} of {goal} answers")));
                }
            }
            Ok(())
        })
    }

    /// Ends the clients, then reads every key through each of `gateways`, asking again until it is answered; these reads
    /// are part of the history. So it also says whether what was acknowledged is still there.
    ///
    /// # Errors
    ///
    /// If a client panicked, or a key stays unreadable for longer than `within`.
    pub fn finish(mut self, gateways: &[(u64, SocketAddr)], within: Duration) -> Result<Recorded> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for thread in std::mem::take(&mut self.threads) {
            all.extend(thread.join().map_err(|_| Failure::new("a client panicked"))?);
        }
        for &(gateway, addr) in gateways {
            let spec = Spec { gateway, addr, writes: false, timeout: Duration::from_secs(10) };
            let mut conn = Connection::new(spec, self.shared.clone());
            for key in self.keys() {
                eventually(&format!("reading {key} through node {gateway}"), within, || {
                    let operation = conn.command(&key, &Command::Get);
                    let outcome = operation.as_ref().map(|o| o.outcome);
                    all.extend(operation.map(|o| (gateway, o)));
                    match outcome {
                        Some(Outcome::Ok) => Ok(()),
                        Some(other) => Err(Failure::new(format!("its outcome is {other:?}"))),
                        None => Err(Failure::new("no connection")),
                    }
                })?;
            }
        }
        let mut outcomes = BTreeMap::<u64, Outcomes>::new();
        for (gateway, operation) in &all {
            let of = outcomes.entry(*gateway).or_default();
            *match operation.outcome {
                Outcome::Ok => &mut of.answered,
                Outcome::Fail => &mut of.refused,
                Outcome::Unknown => &mut of.unknown,
            } += 1;
        }
        let mut operations: Vec<Operation> = all.into_iter().map(|(_, operation)| operation).collect();
        operations.sort_by_key(|o| o.call);
        let take = |list: &Mutex<Vec<String>>| std::mem::take(&mut *list.lock().expect("nobody panics with it"));
        Ok(Recorded {
            operations,
            outcomes,
            refusals: take(&self.shared.refusals),
            nonsense: take(&self.shared.nonsense),
            unreachable: self.shared.unreachable.load(Ordering::Relaxed),
        })
    }

    /// Every key that was worked on.
    fn keys(&self) -> Vec<String> {
        let of = |tag: usize| {
            let lists = self.shared.appends[tag].load(Ordering::Relaxed).div_ceil(LIST_LENGTH);
            let lists = (0..lists).map(move |n| self.shared.list(tag, n * LIST_LENGTH));
            [self.shared.register(tag), self.shared.counter(tag)].into_iter().chain(lists)
        };
        (0..self.shared.tags.len()).flat_map(of).collect()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // After a failed test: the clients end by themselves with their present command.
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

struct Worker {
    number: usize,
    conn: Connection,
    rng: Rng,
    written: u64,
}

impl Worker {
    fn run(&mut self, answered: &AtomicU64) -> Vec<(u64, Operation)> {
        let mut operations = Vec::new();
        while !self.conn.shared.stop.load(Ordering::Relaxed) && operations.len() < MOST_COMMANDS {
            let (key, command) = self.choose();
            let operation = self.conn.command(&key, &command);
            let is_answered = operation.as_ref().is_some_and(|o| o.outcome == Outcome::Ok);
            answered.fetch_add(u64::from(is_answered), Ordering::Relaxed);
            operations.extend(operation.map(|o| (self.conn.spec.gateway, o)));
            // The pace of the load, not a wait for anything.
            std::thread::sleep(if is_answered { PACE } else { RETRY });
        }
        operations
    }

    fn choose(&mut self) -> (String, Command) {
        let shared = &self.conn.shared;
        let tag = self.rng.below(shared.tags.len() as u64) as usize;
        let appends = &shared.appends[tag];
        let kind = self.rng.below(3);
        if !self.conn.spec.writes || self.rng.permille(400) {
            let key = match kind {
                0 => shared.register(tag),
                1 => shared.counter(tag),
                _ => shared.list(tag, appends.load(Ordering::Relaxed)),
            };
            return (key, Command::Get);
        }
        if kind == 1 {
            return (shared.counter(tag), Command::Incr);
        }
        self.written += 1;
        let value = format!("{}.{}", self.number, self.written);
        match kind {
            0 => (shared.register(tag), Command::Set(value.into_bytes())),
            _ => {
                let key = shared.list(tag, appends.fetch_add(1, Ordering::Relaxed));
                (key, Command::Append(format!("{value},").into_bytes()))
            }
        }
    }
}

/// A connection that is made anew, as a new client, after each failure.
struct Connection {
    spec: Spec,
    shared: Arc<Shared>,
    open: Option<(u64, Client)>,
}

impl Connection {
    fn new(spec: Spec, shared: Arc<Shared>) -> Self {
        Connection { spec, shared, open: None }
    }

    /// Sends `command` and waits for its reply. Nothing if there is no connection: then nothing was sent.
    fn command(&mut self, key: &str, command: &Command) -> Option<Operation> {
        if self.open.is_none() {
            let Ok(client) = Client::connect(self.spec.addr, self.spec.timeout) else {
                self.shared.unreachable.fetch_add(1, Ordering::Relaxed);
                return None;
            };
            self.open = Some((self.shared.next_client.fetch_add(1, Ordering::Relaxed), client));
        }
        let (id, client) = self.open.as_mut()?;
        let line = line_of(key, command);
        let call = self.shared.now();
        let operation = Operation::open(*id, call, key, command);
        let reply = client.call(&line);
        let ret = self.shared.now();
        let waited = Duration::from_nanos(ret - call);
        let what = |text: &dyn fmt::Display| format!("{line} at node {}: {text} after {waited:?}", self.spec.gateway);
        let refusals = &self.shared.refusals;
        let operation = match reply.map(meaning) {
            Ok(Meaning::Answer(reply)) => return Some(operation.answered(ret, &reply)),
            Ok(Meaning::Refusal(text)) => {
                Shared::complain(refusals, || what(&text));
                return Some(operation.refused(ret));
            }
            Ok(Meaning::Unknown(text)) => {
                Shared::complain(refusals, || what(&text));
                operation
            }
            Ok(Meaning::Nonsense(reply)) => {
                Shared::complain(&self.shared.nonsense, || what(&format!("{reply:?}")));
                operation
            }
            Err(e) => {
                let list = if e.kind() == ErrorKind::InvalidData { &self.shared.nonsense } else { refusals };
                Shared::complain(list, || what(&e));
                operation
            }
        };
        // The command may still be executed on behalf of this client, and a late reply would be taken for that of the next
        // command: from here on it is a new client.
        self.open = None;
        Some(operation)
    }
}

/// The words that are sent.
fn line_of(key: &str, command: &Command) -> String {
    let text = |v: &[u8]| String::from_utf8(v.to_vec()).expect("our values are text");
    match command {
        Command::Get => format!("GET {key}"),
        Command::Set(v) => format!("SET {key} {}", text(v)),
        Command::Incr => format!("INCR {key}"),
        Command::Append(v) => format!("APPEND {key} {}", text(v)),
        other => unreachable!("this load has no {other:?}"),
    }
}

/// What a reply says about its command.
enum Meaning {
    Answer(Reply),
    /// It was not executed and will not be.
    Refusal(String),
    Unknown(String),
    /// No reply to any command of ours.
    Nonsense(Value),
}

fn meaning(reply: Value) -> Meaning {
    Meaning::Answer(match reply {
        Value::Error(text) if text.starts_with("UNKNOWN") => return Meaning::Unknown(text),
        // All other errors promise that the command had and will have no effect.
        Value::Error(text) => return Meaning::Refusal(text),
        Value::Simple(text) if text == "OK" => Reply::Ok,
        Value::Int(n) => Reply::Int(n),
        Value::Bulk(bytes) => Reply::Bulk(bytes.into()),
        Value::Nil => Reply::Nil,
        other => return Meaning::Nonsense(other),
    })
}

impl Recorded {
    /// Whether an order of the commands explains every answer, key by key, and no server sent nonsense. Counters and
    /// lists that lost something acknowledged, or did something twice, have no such order.
    ///
    /// # Errors
    ///
    /// Names each key whose history is not accepted.
    pub fn judge(&self) -> Result<()> {
        let wrong = self.wrong()?;
        if wrong.is_empty() { Ok(()) } else { Err(Failure::new(wrong.join("\n"))) }
    }

    /// As [`Recorded::judge`], with each complaint by itself.
    ///
    /// # Errors
    ///
    /// If an operation contradicts the form of histories.
    pub fn wrong(&self) -> Result<Vec<String>> {
        let records = history::records(&self.operations).map_err(Failure::new)?;
        let verdict = judge(&records, |_, _| false);
        let nonsense = self.nonsense.iter().map(|what| format!("no reply to that: {what}"));
        Ok(nonsense.chain(verdict.into_failures()).collect())
    }

    /// Writes the history as JSON lines.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let what = || format!("writing {}", path.display());
        let mut out = BufWriter::new(File::create(path).context(what())?);
        history::write(&mut out, self.operations.iter().cloned()).context(what())?;
        out.flush().context(what())
    }

    /// What became of all commands.
    pub fn total(&self) -> Outcomes {
        self.outcomes.values().fold(Outcomes::default(), |a, b| Outcomes {
            answered: a.answered + b.answered,
            refused: a.refused + b.refused,
            unknown: a.unknown + b.unknown,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::resp::fake;
    use super::*;
    use std::collections::HashMap;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// One client writes and reads at a server that `tamper` makes misbehave.
    fn record(tamper: impl FnMut(&str) -> Option<Option<String>> + Send + 'static) -> Recorded {
        // One connection at a time: there are as many as there are failures, and one for the final reads.
        let addr = fake::serve(1_000, tamper);
        let spec = Spec { gateway: 1, addr, writes: true, timeout: PATIENCE };
        let recorder = Recorder::start("t", vec![spec], vec!["a".into()]).unwrap();
        recorder.wait_answers(&[1], 100, PATIENCE).unwrap();
        recorder.finish(&[(1, addr)], PATIENCE).unwrap()
    }

    #[test]
    fn an_honest_server_passes_and_its_history_is_kept() {
        let recorded = record(|_| None);
        recorded.judge().unwrap();
        let total = recorded.total();
        assert!(total.answered >= 100 && (total.refused, total.unknown) == (0, 0), "{recorded:?}");
        let scratch = super::super::Scratch::new().unwrap();
        let path = scratch.path().join("history.jsonl");
        recorded.write(&path).unwrap();
        let file = std::io::BufReader::new(File::open(&path).unwrap());
        let read: Vec<Operation> = history::Reader::new(file).collect::<std::result::Result<_, _>>().unwrap();
        assert_eq!(read, recorded.operations);
    }

    #[test]
    fn a_stale_read_is_found() {
        // Once, it answers with what a register held two writes ago, as a leader would that does not know it is none.
        let mut written = HashMap::<String, Vec<String>>::new();
        let mut planted = false;
        let stale = move |line: &str| match line.split(' ').collect::<Vec<_>>()[..] {
            ["SET", key, value] => {
                written.entry(key.into()).or_default().push(value.into());
                None
            }
            ["GET", key] if !planted => {
                let values = written.get(key).filter(|values| values.len() > 2)?;
                planted = true;
                let old = &values[values.len() - 3];
                Some(Some(format!("${}\r\n{old}\r\n", old.len())))
            }
            _ => None,
        };
        let error = record(stale).judge().unwrap_err().to_string();
        assert!(error.contains("{a}:t:register is not linearizable"), "{error}");
    }

    #[test]
    fn a_lost_append_and_a_lost_increment_are_found() {
        for (command, reply) in [("APPEND", ":999\r\n"), ("INCR", ":1\r\n")] {
            let mut count = 0;
            let lose = move |line: &str| {
                count += usize::from(line.starts_with(command));
                (line.starts_with(command) && count == 5).then(|| Some(reply.to_string()))
            };
            record(lose).judge().unwrap_err();
        }
    }

    #[test]
    fn refusals_unknown_outcomes_and_broken_connections_are_no_violations() {
        let mut count = 0;
        let mut last = 0;
        let recorded = record(move |line| {
            count += usize::from(!line.starts_with("GET"));
            if count == last || line.starts_with("GET") {
                return None;
            }
            last = count;
            match count % 9 {
                3 => Some(Some("-CLUSTERDOWN not executed\r\n".into())),
                6 => Some(Some("-UNKNOWN perhaps\r\n".into())),
                8 => Some(None),
                _ => None,
            }
        });
        recorded.judge().unwrap();
        let total = recorded.total();
        assert!(total.refused > 0 && total.unknown > total.refused, "{total}");
        // Each unknown outcome ends a client.
        let clients: std::collections::BTreeSet<u64> = recorded.operations.iter().map(|o| o.client).collect();
        assert!(clients.len() as u64 > total.unknown, "{} clients, {total}", clients.len());
        assert!(recorded.refusals.iter().any(|r| r.contains("CLUSTERDOWN")), "{:?}", recorded.refusals);
    }

    #[test]
    fn a_reply_of_a_wrong_kind_is_found() {
        let mut count = 0;
        let recorded = record(move |_| {
            count += 1;
            (count == 20).then(|| Some("*1\r\n:1\r\n".into()))
        });
        assert!(recorded.judge().unwrap_err().to_string().contains("no reply to that"));
    }
}
