//! Clients that keep a fixed number of requests in flight over loopback TCP.
//!
//! Each client sends a batch of `pipeline` requests for uniformly random keys and reads all replies before the next.
//! A request's latency runs from the sending of its batch to the reading of its reply. Values are noise: neither a log on
//! disk nor a state on its way to another node gets smaller by compression.

use crate::replies::{Reply, parse};
use hdrhistogram::Histogram;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// A reply that takes longer ends the run: requests have a deadline of 5 s.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);

/// What the clients ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// SET of a random key to a value of the plan's size.
    Set,
    /// GET of a random key.
    Get,
    /// SET of every key once, whatever the time it takes.
    Fill,
}

/// Whom a client talks to.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The server.
    pub addr: SocketAddr,
    /// The keys it is asked for; all of the plan's if not given. [`Operation::Fill`] asks for all in any case.
    pub keys: Option<Arc<[u32]>>,
}

impl Target {
    /// A server that is asked for any key.
    pub(crate) fn anything(addr: SocketAddr) -> Target {
        Target { addr, keys: None }
    }
}

/// What a phase of load looks like.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The servers; client i talks to target i modulo their number.
    pub targets: Vec<Target>,
    /// Number of connections.
    pub clients: u32,
    /// Requests in flight per connection.
    pub pipeline: u32,
    /// Number of keys.
    pub keys: u32,
    /// Bytes of a value.
    pub value_bytes: u32,
    /// How long a phase lasts; [`Operation::Fill`] ends by itself.
    pub duration: Duration,
}

/// What a phase achieved.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Measured {
    /// Correct replies a second.
    pub per_second: f64,
    /// Median latency in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile of latency in milliseconds.
    pub p99_ms: f64,
    /// Longest latency in milliseconds.
    pub max_ms: f64,
    /// Errors, missing values and values of a wrong length.
    pub wrong: u64,
    /// How long it took.
    pub seconds: f64,
}

struct Tally {
    latency_us: Histogram<u32>,
    right: u64,
    wrong: u64,
    first_wrong: Option<String>,
}

impl Tally {
    fn new() -> Self {
        // Up to a minute in microseconds, three digits: the bounds are valid for any such histogram.
        let latency_us = Histogram::new_with_bounds(1, 60_000_000, 3).expect("valid bounds");
        Tally { latency_us, right: 0, wrong: 0, first_wrong: None }
    }
}

/// Runs one phase.
///
/// # Errors
///
/// If a connection cannot be made or breaks, or a reply does not come or is no RESP.
pub(crate) async fn run(plan: &Plan, operation: Operation) -> io::Result<Measured> {
    let mut streams = Vec::new();
    for i in 0..plan.clients {
        let stream = TcpStream::connect(plan.targets[i as usize % plan.targets.len()].addr).await?;
        stream.set_nodelay(true)?;
        streams.push(stream);
    }
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    for (i, stream) in (0..).zip(streams) {
        tasks.spawn(client(stream, plan.clone(), operation, i, start + plan.duration));
    }
    let mut total = Tally::new();
    while let Some(done) = tasks.join_next().await {
        let tally = done.map_err(io::Error::other)??;
        total.latency_us.add(&tally.latency_us).map_err(io::Error::other)?;
        total.right += tally.right;
        total.wrong += tally.wrong;
        total.first_wrong = total.first_wrong.or(tally.first_wrong);
    }
    let seconds = start.elapsed().as_secs_f64();
    if let Some(wrong) = total.first_wrong {
        eprintln!("warning: {} wrong replies; the first: {wrong}", total.wrong);
    }
    let ms = |quantile| total.latency_us.value_at_quantile(quantile) as f64 / 1e3;
    let per_second = total.right as f64 / seconds;
    Ok(Measured { per_second, p50_ms: ms(0.5), p99_ms: ms(0.99), max_ms: ms(1.0), wrong: total.wrong, seconds })
}

async fn client(
    mut stream: TcpStream,
    plan: Plan,
    operation: Operation,
    number: u32,
    end: Instant,
) -> io::Result<Tally> {
    let mut tally = Tally::new();
    let mut random = Random::new(u64::from(number) + 1);
    let mut value = vec![0; plan.value_bytes as usize];
    let own = plan.targets[number as usize % plan.targets.len()].keys.clone();
    // Client i of n fills the keys i, i + n, i + 2n, …
    let mut fill = (number..plan.keys).step_by(plan.clients as usize);
    let (mut requests, mut replies) = (Vec::new(), Vec::with_capacity(64 * 1024));
    loop {
        requests.clear();
        let mut sent = 0;
        while sent < plan.pipeline {
            let key = match operation {
                Operation::Fill => fill.next(),
                Operation::Set | Operation::Get => Some(match &own {
                    Some(keys) => keys[random.below(keys.len() as u32) as usize],
                    None => random.below(plan.keys),
                }),
            };
            let Some(key) = key else { break };
            match operation {
                Operation::Fill => fill_value(key, &mut value),
                Operation::Set => random.fill(&mut value),
                Operation::Get => {}
            }
            encode(&mut requests, operation, key, &value);
            sent += 1;
        }
        if sent == 0 || operation != Operation::Fill && Instant::now() >= end {
            return Ok(tally);
        }
        let began = Instant::now();
        tokio::time::timeout(REPLY_TIMEOUT, stream.write_all(&requests)).await??;
        let mut got = 0;
        replies.clear();
        while got < sent {
            let read = tokio::time::timeout(REPLY_TIMEOUT, stream.read_buf(&mut replies)).await??;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let latency_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            let mut used = 0;
            while let Some((reply, length)) = parse(&replies[used..])? {
                let right = match operation {
                    Operation::Get => {
                        matches!(reply, Reply::Bulk(bytes) if bytes.len() == value.len())
                    }
                    Operation::Set | Operation::Fill => reply == Reply::Simple(b"OK"),
                };
                if right {
                    tally.right += 1;
                    tally.latency_us.saturating_record(latency_us);
                } else {
                    tally.wrong += 1;
                    tally.first_wrong.get_or_insert_with(|| describe(reply));
                }
                used += length;
                got += 1;
            }
            replies.drain(..used);
        }
        if got > sent {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "more replies than requests"));
        }
    }
}

fn describe(reply: Reply<'_>) -> String {
    match reply {
        Reply::Simple(text) => format!("+{}", String::from_utf8_lossy(text)),
        Reply::Error(text) => format!("-{}", String::from_utf8_lossy(text)),
        Reply::Bulk(bytes) => format!("a value of {} bytes", bytes.len()),
        Reply::Nil => "no value".into(),
    }
}

/// The key numbered `key`: sixteen bytes, as the peers in the performance section were measured with.
pub(crate) fn key_name(key: u32) -> String {
    format!("key:{key:012}")
}

/// The value that [`Operation::Fill`] sets the key numbered `key` to.
pub(crate) fn fill_value(key: u32, value: &mut [u8]) {
    Random::new(u64::from(key)).fill(value);
}

fn encode(into: &mut Vec<u8>, operation: Operation, key: u32, value: &[u8]) {
    use std::io::Write;
    // As `key_name`, without an allocation. Writing to a vector cannot fail.
    let done = match operation {
        Operation::Get => write!(into, "*2\r\n$3\r\nGET\r\n$16\r\nkey:{key:012}\r\n"),
        Operation::Set | Operation::Fill => {
            let head = write!(into, "*3\r\n$3\r\nSET\r\n$16\r\nkey:{key:012}\r\n${}\r\n", value.len());
            into.extend_from_slice(value);
            into.extend_from_slice(b"\r\n");
            head
        }
    };
    debug_assert!(done.is_ok());
}

/// xorshift64*: enough for spreading keys, and the same keys in every run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    /// A number below `bound`, nearly uniform.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        let high = self.next() >> 32;
        ((high * u64::from(bound)) >> 32) as u32
    }
    /// Noise.
    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Read, Write};

    #[test]
    fn requests_are_resp() {
        let mut bytes = Vec::new();
        encode(&mut bytes, Operation::Set, 7, b"xy");
        encode(&mut bytes, Operation::Get, 7, b"xy");
        let expected =
            "*3\r\n$3\r\nSET\r\n$16\r\nkey:000000000007\r\n$2\r\nxy\r\n*2\r\n$3\r\nGET\r\n$16\r\nkey:000000000007\r\n";
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
        assert_eq!(key_name(7), "key:000000000007");
    }

    #[test]
    fn values_are_noise_of_their_keys() {
        let value = |key| {
            let mut value = [0; 13];
            fill_value(key, &mut value);
            value
        };
        assert_eq!(value(7), value(7));
        assert_eq!((0..1_000).map(value).collect::<std::collections::BTreeSet<_>>().len(), 1_000);
        assert!(value(0).iter().filter(|byte| **byte == 0).count() < 3);
    }

    #[test]
    fn keys_are_spread_evenly() {
        let mut counts = BTreeMap::new();
        for client in 0..50 {
            let mut random = Random::new(client + 1);
            (0..2_000).for_each(|_| *counts.entry(random.below(100)).or_insert(0u32) += 1);
        }
        assert_eq!(counts.len(), 100);
        assert!(counts.values().all(|n| (800..1200).contains(n)), "{counts:?}");
    }

    /// Serves one connection: answers SET with OK and GET with what was set; every tenth GET with an error.
    fn serve(stream: std::net::TcpStream) -> io::Result<()> {
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        let (mut held, mut gets) = (BTreeMap::new(), 0);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let parts: usize = line[1..].trim().parse().expect("an array");
            let mut args = Vec::new();
            for _ in 0..parts {
                line.clear();
                reader.read_line(&mut line)?;
                let mut bytes = vec![0; line[1..].trim().parse::<usize>().expect("a length") + 2];
                reader.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                args.push(bytes);
            }
            if args[0] == b"SET" {
                held.insert(args[1].clone(), args[2].clone());
                writer.write_all(b"+OK\r\n")?;
            } else {
                gets += 1;
                match held.get(&args[1]) {
                    Some(value) if gets % 10 != 0 => {
                        write!(writer, "${}\r\n", value.len())?;
                        writer.write_all(&[value.as_slice(), b"\r\n"].concat())?;
                    }
                    _ => writer.write_all(b"-ERR no\r\n")?,
                }
            }
        }
    }

    #[tokio::test]
    async fn a_phase_counts_right_and_wrong_replies() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let targets = vec![Target::anything(listener.local_addr().unwrap())];
        // One connection a phase: each has the server's memory to itself, so GET finds nothing that Fill has set.
        let server = std::thread::spawn(move || (0..2).for_each(|_| serve(listener.accept().unwrap().0).unwrap_or(())));
        let duration = Duration::from_millis(50);
        let plan = Plan { targets, clients: 1, pipeline: 4, keys: 10, value_bytes: 3, duration };
        let fill = run(&plan, Operation::Fill).await.unwrap();
        assert_eq!(fill.wrong, 0);
        assert!(fill.per_second > 0.0 && fill.p50_ms <= fill.p99_ms);
        let get = run(&plan, Operation::Get).await.unwrap();
        assert!(get.wrong > 0 && get.per_second == 0.0, "{get:?}");
        server.join().unwrap();
    }

    #[tokio::test]
    async fn a_target_is_asked_for_its_own_keys_only() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut asked = std::collections::BTreeSet::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut writer, mut line) = (stream, String::new());
            while reader.read_line(&mut line).unwrap() > 0 {
                if line.starts_with("key:") {
                    asked.insert(line.trim().to_owned());
                    writer.write_all(b"$3\r\nabc\r\n").unwrap();
                }
                line.clear();
            }
            asked
        });
        let targets = vec![Target { addr, keys: Some(Arc::from([3, 5])) }];
        let duration = Duration::from_millis(50);
        let plan = Plan { targets, clients: 1, pipeline: 4, keys: 10, value_bytes: 3, duration };
        let get = run(&plan, Operation::Get).await.unwrap();
        assert!(get.wrong == 0 && get.per_second > 0.0, "{get:?}");
        assert_eq!(server.join().unwrap(), [key_name(3), key_name(5)].into());
    }
}
