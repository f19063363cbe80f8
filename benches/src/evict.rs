//! Hit ratios of the eviction policies.
//!
//! Each trace is played against a state machine as a cache-aside client would: read a key, and write it if it is not there;
//! whatever is over the limit then is chosen by the leader's policy and removed by an entry. Exact LRU and moka hold as many
//! keys. The time of an access covers all of that: of a state machine, the encoding and applying of entries too.

use crate::fill::{Machine, reference};
use crate::stats::{table, thousands};
use crema_core::store::record_bytes;
use crema_core::{EvictionPolicy, LimitPolicy, LogTime, MemoryLimits, SetExpire, encode_remove, encode_set_limits};
use crema_tests::process::Result;
use std::collections::HashMap;
use std::time::Instant;

/// Flags of `evict`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Keys that a trace draws from; a scan adds others.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1_000..=100_000_000))]
    keys: u32,
    /// Accesses of a trace.
    #[arg(long, default_value_t = 2_000_000, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000_000))]
    accesses: u32,
    /// Sizes of the cache in percent of the keys.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10, 25], value_parser = clap::value_parser!(u32).range(1..=100))]
    percent: Vec<u32>,
}

/// Runs the benchmark and prints its tables.
pub(crate) fn run(args: &Args) -> Result<()> {
    let traces = [
        ("Zipf 1.0", zipf(args, 1.0)),
        ("Zipf 0.8", zipf(args, 0.8)),
        ("Zipf 1.0 and scans", scans(args, zipf(args, 1.0))),
    ];
    let mut rows = Vec::new();
    for (name, trace) in &traces {
        for percent in &args.percent {
            let size = (u64::from(args.keys) * u64::from(*percent) / 100) as usize;
            let players: [(&str, Box<dyn Player>); 5] = [
                ("s3-fifo", Box::new(Shard::new(size, EvictionPolicy::S3Fifo))),
                ("sieve", Box::new(Shard::new(size, EvictionPolicy::Sieve))),
                ("lru", Box::new(Shard::new(size, EvictionPolicy::Lru))),
                ("exact LRU", Box::new(Lru::new(size))),
                ("moka", Box::new(Moka(moka::sync::Cache::new(size as u64)))),
            ];
            let mut row = vec![name.to_string(), format!("{percent} %")];
            for (_, mut player) in players {
                let start = Instant::now();
                let hits: u64 = trace.iter().map(|key| u64::from(player.access(*key))).sum();
                let nanos = start.elapsed().as_nanos() as f64 / trace.len() as f64;
                row.push(format!("{:.2} %  {} ns", hits as f64 * 100.0 / trace.len() as f64, thousands(nanos)));
            }
            rows.push(row);
        }
    }
    print!("{}", table(&["trace", "size", "s3-fifo", "sieve", "lru", "exact LRU", "moka"], &rows));
    println!();
    let (off, on) = (read_nanos(args.keys, false), read_nanos(args.keys, true));
    println!("A read of a key that is there: {off:.0} ns, and {on:.0} ns while what is used is noted.");
    Ok(())
}

trait Player {
    /// Whether the key was there; it is afterwards.
    fn access(&mut self, key: u32) -> bool;
}

const VALUE: [u8; 16] = [b'v'; 16];

fn name(key: u32) -> [u8; 16] {
    let mut name = *b"key:000000000000";
    let mut rest = key;
    for digit in name[4..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    name
}

struct Shard {
    machine: Machine,
    policy: EvictionPolicy,
    most: u64,
}

impl Shard {
    fn new(keys: usize, policy: EvictionPolicy) -> Self {
        let mut machine = Machine::new(16_384);
        let each = record_bytes(16, VALUE.len(), false) + crema_core::limits::EVICTION_BYTES_PER_KEY;
        let most = keys as u64 * each;
        let limits = MemoryLimits { max_bytes: most, policy: LimitPolicy::Evict };
        machine.apply(&encode_set_limits(LogTime(0), limits));
        machine.m.victims(policy, 0, 0);
        Shard { machine, policy, most }
    }
}

impl Player for Shard {
    fn access(&mut self, key: u32) -> bool {
        let name = name(key);
        if self.machine.m.table().get(reference(&name), |entry| entry.is_some()) {
            return true;
        }
        self.machine.set(&name, &VALUE, SetExpire::Clear);
        self.machine.flush();
        while let Some(over) = self.machine.m.used().checked_sub(self.most).filter(|over| *over > 0) {
            let victims = self.machine.m.victims(self.policy, over, 64);
            self.machine.apply(&encode_remove(LogTime(0), &victims, false).expect("few victims"));
        }
        false
    }
}

struct Moka(moka::sync::Cache<u32, [u8; 16]>);

impl Player for Moka {
    fn access(&mut self, key: u32) -> bool {
        let found = self.0.get(&key).is_some();
        if !found {
            self.0.insert(key, VALUE);
        }
        found
    }
}

/// The least recently used goes: a ring of neighbours by position, position 0 standing between newest and oldest.
struct Lru {
    size: usize,
    places: HashMap<u32, usize>,
    /// Key, newer neighbour, older neighbour.
    ring: Vec<(u32, usize, usize)>,
}

impl Lru {
    fn new(size: usize) -> Self {
        Lru { size, places: HashMap::new(), ring: vec![(0, 0, 0)] }
    }

    fn unlink(&mut self, at: usize) {
        let (_, newer, older) = self.ring[at];
        self.ring[newer].2 = older;
        self.ring[older].1 = newer;
    }

    fn link(&mut self, at: usize) {
        let newest = self.ring[0].2;
        (self.ring[at].1, self.ring[at].2) = (0, newest);
        self.ring[newest].1 = at;
        self.ring[0].2 = at;
    }
}

impl Player for Lru {
    fn access(&mut self, key: u32) -> bool {
        if let Some(at) = self.places.get(&key).copied() {
            self.unlink(at);
            self.link(at);
            return true;
        }
        let at = if self.places.len() < self.size {
            self.ring.push((key, 0, 0));
            self.ring.len() - 1
        } else {
            let oldest = self.ring[0].1;
            self.unlink(oldest);
            self.places.remove(&self.ring[oldest].0);
            self.ring[oldest].0 = key;
            oldest
        };
        self.places.insert(key, at);
        self.link(at);
        false
    }
}

struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Keys by popularity: the k-th with probability in proportion to k to the power of minus `skew`.
fn zipf(args: &Args, skew: f64) -> Vec<u32> {
    let mut sum = 0.0;
    let up_to: Vec<f64> = (1..=args.keys)
        .map(|k| {
            sum += f64::from(k).powf(-skew);
            sum
        })
        .collect();
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    (0..args.accesses)
        .map(|_| {
            let at = random.unit() * sum;
            up_to.partition_point(|s| *s <= at) as u32
        })
        .collect()
}

/// The trace, interrupted ten times by a pass over as many other keys as a tenth of all, never seen before or after.
fn scans(args: &Args, trace: Vec<u32>) -> Vec<u32> {
    let mut mixed = Vec::new();
    let mut next = args.keys;
    for part in trace.chunks(trace.len() / 10) {
        mixed.extend_from_slice(part);
        mixed.extend(next..next + args.keys / 10);
        next += args.keys / 10;
    }
    mixed
}

/// Nanoseconds of a read, with and without the noting of what is used.
fn read_nanos(keys: u32, noted: bool) -> f64 {
    let mut machine = Machine::new(16_384);
    (0..keys).for_each(|key| machine.set(&name(key), &VALUE, SetExpire::Clear));
    machine.flush();
    if noted {
        (0..1 + keys / 50_000).for_each(|_| drop(machine.m.victims(EvictionPolicy::S3Fifo, 0, 0)));
    }
    let mut random = Random(7);
    let names: Vec<[u8; 16]> = (0..2_000_000).map(|_| name((random.unit() * f64::from(keys)) as u32)).collect();
    let start = Instant::now();
    let found = names.iter().filter(|name| machine.m.table().get(reference(*name), |e| e.is_some())).count();
    let nanos = start.elapsed().as_nanos() as f64 / names.len() as f64;
    assert_eq!(found, names.len(), "every key is there");
    nanos
}
