//! Writers that remember what was acknowledged to them.
//!
//! One thread a gateway. Each period it sends one pipelined batch: a SET of a new key in every shard, and an INCR of a
//! counter of its own; then it reads all replies. A pause of any shard is thus seen as the time between two
//! acknowledgements of writes to it, to within one period.

use super::resp::{Client, Value, encode};
use super::{Context, Failure, Result};
use crema_core::slot_of;
use crema_shard::placement::arcs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longer than any request's deadline: a reply that takes longer is a failure of its own.
const REPLY_TIMEOUT: Duration = Duration::from_secs(15);
/// Failures that a report keeps in words.
const MAX_FAILURES_KEPT: usize = 20;
/// GETs in one pipelined batch of the check.
const CHECK_BATCH: usize = 500;

/// For each shard a hash tag whose slot the shard owns, before any change of the shard count.
pub fn tag_per_shard(shards: u32) -> Vec<String> {
    let find =
        |arc: crema_core::SlotRange| (0u32..).map(|i| i.to_string()).find(|tag| arc.contains(slot_of(tag.as_bytes())));
    arcs(shards)
        .into_iter()
        .map(|arc| find(arc).expect("every arc holds slots, and numbers reach every slot"))
        .collect()
}

/// What one writer saw.
#[derive(Clone, Debug)]
pub struct WriterReport {
    /// Its gateway.
    pub gateway: u64,
    /// Keys whose SET was acknowledged, in order; each holds its own name as its value.
    pub acknowledged: Vec<String>,
    /// The key of its counter.
    pub counter: String,
    /// INCRs of it that were acknowledged; each answered the number before plus one, or it counts as failed.
    pub increments: u64,
    /// Requests that were answered with an error, wrongly or not at all.
    pub failed: u64,
    /// The first of them in words.
    pub failures: Vec<String>,
    /// The longest time between two acknowledgements of writes to one shard, over all shards.
    pub longest_gap: Duration,
}

/// Writers at work.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    batches: Arc<AtomicU64>,
    threads: Vec<JoinHandle<WriterReport>>,
}

impl Load {
    /// Starts a writer at each of `gateways`, writing a batch each `period`, for at most `most_batches` batches. No two
    /// loads on one cluster may have the same `name`; it is part of their keys.
    ///
    /// # Errors
    ///
    /// If a gateway does not accept a connection.
    pub fn start(
        name: &str,
        gateways: &[(u64, SocketAddr)],
        shards: u32,
        period: Duration,
        most_batches: u64,
    ) -> Result<Load> {
        let stop = Arc::new(AtomicBool::new(false));
        let batches = Arc::new(AtomicU64::new(0));
        let tags = Arc::new(tag_per_shard(shards));
        let mut load = Load { stop, batches, threads: Vec::new() };
        for &(gateway, addr) in gateways {
            let client = Client::connect(addr, REPLY_TIMEOUT).context(format!("writer at {addr}"))?;
            let (stop, batches, tags) = (load.stop.clone(), load.batches.clone(), tags.clone());
            let writer = Writer::new(name, gateway, client, tags);
            let run = move || writer.run(period, most_batches, &stop, &batches);
            load.threads
                .push(std::thread::Builder::new().name(format!("writer-{gateway}")).spawn(run).context("writer")?);
        }
        Ok(load)
    }

    /// Batches that all writers together have had answered completely.
    pub fn batches(&self) -> u64 {
        self.batches.load(Ordering::Relaxed)
    }

    /// Waits until `more` further batches have been answered.
    ///
    /// # Errors
    ///
    /// If that takes longer than `within`.
    pub fn wait_batches(&self, more: u64, within: Duration) -> Result<()> {
        let goal = self.batches() + more;
        super::eventually("progress of the writers", within, || match self.batches() {
            done if done >= goal => Ok(()),
            done => Err(Failure::new(format!("{done} of {goal} batches answered"))),
        })
    }

    /// Ends the writers and gives their reports.
    ///
    /// # Errors
    ///
    /// If a writer panicked.
    pub fn finish(mut self) -> Result<Vec<WriterReport>> {
        self.stop.store(true, Ordering::Relaxed);
        let threads = std::mem::take(&mut self.threads);
        threads.into_iter().map(|t| t.join().map_err(|_| Failure::new("a writer panicked"))).collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // After a failed test: the writers end by themselves at their next period.
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Writer {
    client: Client,
    name: String,
    tags: Arc<Vec<String>>,
    last: Vec<Option<Instant>>,
    report: WriterReport,
}

impl Writer {
    fn new(name: &str, gateway: u64, client: Client, tags: Arc<Vec<String>>) -> Self {
        let report = WriterReport {
            gateway,
            acknowledged: Vec::new(),
            counter: format!("{name}:{gateway}:counter"),
            increments: 0,
            failed: 0,
            failures: Vec::new(),
            longest_gap: Duration::ZERO,
        };
        Writer { client, name: name.into(), last: vec![None; tags.len()], tags, report }
    }

    fn run(mut self, period: Duration, most_batches: u64, stop: &AtomicBool, batches: &AtomicU64) -> WriterReport {
        let mut due = Instant::now();
        for number in 0..most_batches {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if let Err(e) = self.batch(number) {
                // What was sent and not answered may have been executed or not: its keys are not acknowledged.
                self.fail(format!("batch {number}: the connection to gateway {} failed: {e}", self.report.gateway));
                break;
            }
            batches.fetch_add(1, Ordering::Relaxed);
            // The pace of the writer, not a wait for anything. A batch that was held shortens no later period.
            due = (due + period).max(Instant::now());
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        self.report
    }

    fn batch(&mut self, number: u64) -> std::io::Result<()> {
        let gateway = self.report.gateway;
        let name = &self.name;
        let keys: Vec<String> = self.tags.iter().map(|tag| format!("{{{tag}}}:{name}:{gateway}:{number}")).collect();
        let mut bytes = Vec::new();
        for key in &keys {
            encode(&[b"SET", key.as_bytes(), key.as_bytes()], &mut bytes);
        }
        encode(&[b"INCR", self.report.counter.as_bytes()], &mut bytes);
        self.client.send(&bytes)?;
        for (shard, key) in keys.into_iter().enumerate() {
            match self.client.read()? {
                reply if reply == Value::ok() => {
                    let now = Instant::now();
                    if let Some(last) = self.last[shard].replace(now) {
                        self.report.longest_gap = self.report.longest_gap.max(now - last);
                    }
                    self.report.acknowledged.push(key);
                }
                other => self.fail(format!("SET {key} at gateway {gateway}: {other:?}")),
            }
        }
        match self.client.read()? {
            Value::Int(n) if u64::try_from(n) == Ok(self.report.increments + 1) => self.report.increments += 1,
            other => self.fail(format!("INCR number {} at gateway {gateway}: {other:?}", self.report.increments + 1)),
        }
        Ok(())
    }

    fn fail(&mut self, what: String) {
        self.report.failed += 1;
        if self.report.failures.len() < MAX_FAILURES_KEPT {
            self.report.failures.push(what);
        }
    }
}

/// Reads every acknowledged key of `reports`, and the counters, through the gateway at `addr`.
///
/// # Errors
///
/// Names the first acknowledged write that is missing or wrong, and how many there are.
pub fn check_acknowledged(addr: SocketAddr, reports: &[WriterReport]) -> Result<()> {
    let mut client = Client::connect(addr, REPLY_TIMEOUT).context(format!("reader at {addr}"))?;
    let (mut lost, mut first) = (0u64, None);
    for report in reports {
        for keys in report.acknowledged.chunks(CHECK_BATCH) {
            let mut bytes = Vec::new();
            keys.iter().for_each(|key| encode(&[b"GET", key.as_bytes()], &mut bytes));
            client.send(&bytes).context("reading back")?;
            for key in keys {
                let reply = client.read().context(format!("reading {key} back at {addr}"))?;
                if reply != Value::bulk(key) {
                    lost += 1;
                    first.get_or_insert_with(|| format!("GET {key} at {addr}: {reply:?}"));
                }
            }
        }
        let reply = client.call(&format!("GET {}", report.counter)).context("reading a counter back")?;
        // Without a failed request, nothing is unknown and the counter is exact.
        if report.failed == 0 && reply != Value::bulk(report.increments.to_string()) {
            lost += 1;
            first.get_or_insert_with(|| format!("{} is {reply:?} after {} INCRs", report.counter, report.increments));
        }
    }
    match first {
        None => Ok(()),
        Some(first) => Err(Failure::new(format!("{lost} acknowledged writes are lost or wrong; the first: {first}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONCE: Duration = Duration::from_secs(20);

    /// Writes ten batches to four shards at a server that `tamper` makes misbehave, and reads back.
    fn write_and_check(
        tamper: impl FnMut(&str) -> Option<Option<String>> + Send + 'static,
    ) -> (WriterReport, Result<()>) {
        let addr = super::super::resp::fake::serve(2, tamper);
        let load = Load::start("t", &[(1, addr)], 4, Duration::ZERO, 10).unwrap();
        let ended = |load: &Load| load.threads.iter().all(JoinHandle::is_finished);
        let wait = || {
            if ended(&load) { Ok(()) } else { Err(Failure::new("it writes")) }
        };
        super::super::eventually("the writer's end", ONCE, wait).unwrap();
        let reports = load.finish().unwrap();
        let check = check_acknowledged(addr, &reports);
        (reports.into_iter().next().unwrap(), check)
    }

    #[test]
    fn an_honest_server_passes() {
        let (report, check) = write_and_check(|_| None);
        check.unwrap();
        assert_eq!((report.acknowledged.len(), report.increments, report.failed), (40, 10, 0), "{report:?}");
        assert!(report.longest_gap > Duration::ZERO);
    }

    #[test]
    fn a_lost_write_is_found() {
        // Acknowledged and not executed.
        let lose = |line: &str| {
            line.starts_with("SET").then_some(()).filter(|()| line.ends_with(":7")).map(|()| Some("+OK\r\n".into()))
        };
        let (report, check) = write_and_check(lose);
        assert_eq!(report.failed, 0);
        assert!(check.unwrap_err().to_string().starts_with("4 acknowledged writes are lost"));
    }

    #[test]
    fn an_increment_applied_twice_is_found() {
        let (report, _) = write_and_check(|line| line.starts_with("INCR").then(|| Some(":2\r\n".into())));
        assert_eq!(
            (report.failed, report.increments),
            (10, 0),
            "the first INCR was answered as the second, and none after it right: {report:?}"
        );
    }

    #[test]
    fn errors_and_closed_connections_are_failures() {
        let (report, check) = write_and_check(|line| line.ends_with(":3").then(|| Some("-CLUSTERDOWN no\r\n".into())));
        assert_eq!((report.failed, report.acknowledged.len()), (4, 36), "{report:?}");
        // The four were refused, so nobody expects them.
        check.unwrap();
        let mut closed = false;
        let close = move |line: &str| (line.ends_with(":5") && !std::mem::replace(&mut closed, true)).then_some(None);
        let (report, check) = write_and_check(close);
        assert_eq!((report.failed, report.acknowledged.len()), (1, 20), "{report:?}");
        check.unwrap();
    }

    #[test]
    fn every_shard_has_a_tag_in_its_arc() {
        for shards in [1, 16, 1000] {
            let tags = tag_per_shard(shards);
            assert_eq!(tags.len(), shards as usize);
            for (arc, tag) in arcs(shards).into_iter().zip(&tags) {
                assert!(arc.contains(slot_of(format!("{{{tag}}}:1:0").as_bytes())));
            }
        }
    }
}
