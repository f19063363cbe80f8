//! Large values, so that logs grow until data is written as a whole and what is behind it is cut.
//!
//! One thread sets a few keys again and again, a batch at a time; each value begins with its number, and the rest follows
//! from that. What a key holds must be the last number that was acknowledged, or one that nobody knows of, and whole. It
//! is much data and little history: order among overlapping writes is what the recorder is for.

use super::resp::{Client, Value, encode};
use super::{Context, Failure, Result, eventually};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of a value.
const SIZE: usize = 32 * 1024;
/// Keys, a few in every shard.
const KEYS: usize = 48;
/// Keys that one pipelined batch sets.
const BATCH: usize = 8;
/// Pause between batches, and after a failed connection.
const PACE: Duration = Duration::from_millis(10);
/// Longer than any request's deadline.
const REPLY: Duration = Duration::from_secs(15);

#[derive(Clone, Debug, Default)]
struct Held {
    key: String,
    /// The last number that was acknowledged; 0 if none was.
    acknowledged: u64,
    /// Numbers that may be set at any time, or never.
    unknown: BTreeSet<u64>,
}

/// The keys, and what they must hold.
#[derive(Clone, Debug)]
pub struct Ballast {
    held: Vec<Held>,
    next: u64,
}

/// A thread that writes it.
#[derive(Debug)]
pub struct Loading {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Ballast>,
}

impl Loading {
    /// Ends the writing.
    ///
    /// # Errors
    ///
    /// If the thread panicked.
    pub fn finish(self) -> Result<Ballast> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| Failure::new("the ballast's thread panicked"))
    }
}

impl Ballast {
    /// Keys that begin absent, with these hash tags.
    pub fn new(tags: &[String]) -> Ballast {
        let key = |n: usize| format!("{{{}}}:ballast:{n}", tags[n % tags.len()]);
        Ballast { held: (0..KEYS).map(|n| Held { key: key(n), ..Held::default() }).collect(), next: 1 }
    }

    /// Bytes written so far, whatever became of them.
    pub fn bytes(&self) -> u64 {
        (self.next - 1) * SIZE as u64
    }

    /// Writes at most `most_bytes` through `gateways` by turns, each until it fails.
    ///
    /// # Errors
    ///
    /// If the thread does not start.
    pub fn load(mut self, gateways: Vec<SocketAddr>, most_bytes: u64) -> Result<Loading> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let goal = self.bytes() + most_bytes;
        let run = move || {
            let mut turns = gateways.iter().cycle();
            let mut open: Option<Client> = None;
            while self.bytes() < goal && !stopped.load(Ordering::Relaxed) {
                if open.is_none() {
                    open = turns.next().and_then(|addr| Client::connect(*addr, REPLY).ok());
                }
                if open.as_mut().is_some_and(|client| !self.batch(client)) {
                    // A late reply would be taken for that of the next command.
                    open = None;
                }
                // The pace of the load, not a wait for anything.
                std::thread::sleep(PACE);
            }
            self
        };
        let thread = std::thread::Builder::new().name("ballast".into()).spawn(run).context("the ballast's thread")?;
        Ok(Loading { stop, thread })
    }

    /// Sets the next keys; whether all was acknowledged.
    fn batch(&mut self, client: &mut Client) -> bool {
        let numbers: Vec<u64> = (self.next..self.next + BATCH as u64).collect();
        self.next += BATCH as u64;
        let mut bytes = Vec::new();
        for number in &numbers {
            let held = self.of(*number);
            held.unknown.insert(*number);
            encode(&[b"SET", held.key.as_bytes(), &value(*number)], &mut bytes);
        }
        if client.send(&bytes).is_err() {
            return false;
        }
        for number in numbers {
            match client.read() {
                Ok(reply) if reply == Value::ok() => {
                    let held = self.of(number);
                    held.unknown.remove(&number);
                    held.acknowledged = number;
                }
                // An error may promise that nothing was done: unknown allows that, too.
                _ => return false,
            }
        }
        true
    }

    fn of(&mut self, number: u64) -> &mut Held {
        &mut self.held[number as usize % KEYS]
    }

    /// Reads all of it through each of `gateways`, asking again where the answer is an error. The complaints.
    ///
    /// # Errors
    ///
    /// If a gateway does not answer within `within`.
    pub fn check(&self, gateways: &[(u64, SocketAddr)], within: Duration) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for &(gateway, addr) in gateways {
            let values = eventually(&format!("reading ballast through node {gateway}"), within, || {
                let mut client = Client::connect(addr, REPLY).context("connecting")?;
                let mut bytes = Vec::new();
                self.held.iter().for_each(|held| encode(&[b"GET", held.key.as_bytes()], &mut bytes));
                client.send(&bytes).context("sending")?;
                let one = |held: &Held| match client.read().context(&held.key)? {
                    Value::Nil => Ok(None),
                    Value::Bulk(bytes) => Ok(Some(bytes)),
                    other => Err(Failure::new(format!("GET {}: {other:?}", held.key))),
                };
                self.held.iter().map(one).collect::<Result<Vec<_>>>()
            })?;
            for (held, found) in self.held.iter().zip(values) {
                let number = found.as_deref().map_or(Some(0), number_of);
                if !number.is_some_and(|n| n == held.acknowledged || held.unknown.contains(&n)) {
                    let Held { key, acknowledged, unknown } = held;
                    let what = found.map_or("absent".into(), |v| format!("{number:?} of {} bytes", v.len()));
                    wrong.push(format!(
                        "{key} at node {gateway} is {what}; {acknowledged} was acknowledged, unknown: {unknown:?}"
                    ));
                }
            }
        }
        Ok(wrong)
    }
}

fn value(number: u64) -> Vec<u8> {
    number.to_be_bytes().into_iter().cycle().take(SIZE).enumerate().map(|(at, b)| b ^ at as u8).collect()
}

/// The number of a value, if all of it is right.
fn number_of(found: &[u8]) -> Option<u64> {
    let first: [u8; 8] = found.get(..8)?.try_into().ok()?;
    let number = u64::from_be_bytes(std::array::from_fn(|at| first[at] ^ at as u8));
    (found == value(number)).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::super::resp::fake;
    use super::*;

    #[test]
    fn a_value_tells_its_number_and_whether_it_is_whole() {
        for number in [1, 77, u64::MAX] {
            let mut bytes = value(number);
            assert_eq!(number_of(&bytes), Some(number));
            bytes[SIZE - 1] ^= 1;
            assert_eq!(number_of(&bytes), None);
        }
        assert_eq!((number_of(b""), number_of(b"12345678")), (None, None));
    }

    #[test]
    fn what_is_missing_is_found() {
        let tags = ["a".to_string()];
        let lost = fake::serve(10, |line| line.starts_with("GET").then(|| Some("$-1\r\n".into())));
        let ballast = Ballast::new(&tags);
        assert!(ballast.check(&[(1, lost)], REPLY).unwrap().is_empty());
        // The fake server splits lines at spaces and cannot keep these values: what counts is what it acknowledges.
        let mut ballast = ballast;
        ballast.of(3).acknowledged = 3;
        let wrong = ballast.check(&[(1, lost)], REPLY).unwrap();
        assert!(wrong.len() == 1 && wrong[0].contains("absent; 3 was acknowledged"), "{wrong:?}");
        // It may have been set, or not.
        ballast.of(3).acknowledged = 0;
        ballast.of(3).unknown.insert(3);
        assert!(ballast.check(&[(1, lost)], REPLY).unwrap().is_empty());
    }
}
