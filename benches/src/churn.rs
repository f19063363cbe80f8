//! Resident memory of one full state machine whose values change their sizes.
//!
//! What is evicted leaves gaps of its own size, and what comes needs others: the worst that an allocator meets. The machine
//! is alone in this process, so what it keeps resident beyond what it accounts is the allocator's.

use crate::fill::{Machine, keys};
use crate::load::Random;
use crate::memory::resident;
use crate::soak::{SIZES, size};
use crate::stats::table;
use crema_core::limits::{LimitPolicy, MemoryLimits};
use crema_core::{EvictionPolicy, LogTime, SetExpire, encode_remove, encode_set_limits};
use crema_tests::process::Result;

/// Flags of `churn`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Megabytes of the limit.
    #[arg(long, default_value_t = 192, value_parser = clap::value_parser!(u64).range(8..=65_536))]
    limit_mb: u64,
    /// Slots that the shard owns.
    #[arg(long, default_value_t = 16_384, value_parser = clap::value_parser!(u16).range(1..=16_384))]
    slots: u16,
    /// What goes when the machine is full.
    #[arg(long, value_enum, default_value_t)]
    eviction: Policy,
    /// Forget before each turn what was used, as a change of leaders does: what was there then goes in the order of hashes.
    #[arg(long)]
    forget: bool,
    /// How often each range of sizes has its turn.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Bytes written in a turn, in limits.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    limits: u64,
}

/// [`EvictionPolicy`] as a flag.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum Policy {
    #[default]
    S3Fifo,
    Sieve,
    Lru,
}

impl From<Policy> for EvictionPolicy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::S3Fifo => EvictionPolicy::S3Fifo,
            Policy::Sieve => EvictionPolicy::Sieve,
            Policy::Lru => EvictionPolicy::Lru,
        }
    }
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    let policy = EvictionPolicy::from(args.eviction);
    let limit = args.limit_mb << 20;
    let mut machine = Machine::new(args.slots);
    machine.apply(&encode_set_limits(LogTime(0), MemoryLimits { max_bytes: limit, policy: LimitPolicy::Evict }));
    machine.m.victims(policy, 0, 0);
    let base = resident()?;
    let mut random = Random::new(1);
    let noise = vec![b'v'; 16_384];
    let mut names = keys(args.slots, 16);
    let mut rows = Vec::new();
    for round in 1..=args.rounds {
        for (least, most) in SIZES {
            let (mut written, mut peak) = (0, 0);
            if args.forget {
                machine.m.forget_victims();
            }
            for count in 0u64.. {
                let value = &noise[..size(&mut random, least, most)];
                machine.set(&names.next().expect("names without end"), value, SetExpire::Clear);
                written += value.len() as u64 + 60;
                while let Some(over) = machine.m.used().checked_sub(limit).filter(|over| *over > 0) {
                    let victims = machine.m.victims(policy, over + limit / 64, 4_096);
                    machine.apply(&encode_remove(LogTime(0), &victims, false).expect("few victims"));
                }
                if count % 4_096 == 0 {
                    peak = peak.max(resident()?);
                }
                if written > args.limits * limit {
                    break;
                }
            }
            machine.flush();
            let (used, now) = (machine.m.used(), resident()?);
            peak = peak.max(now);
            let mb = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
            let percent = |bytes: u64| format!("{:.1} %", (bytes - base) as f64 * 100.0 / used as f64);
            let sizes = format!("{least}–{most}");
            rows.push(vec![
                round.to_string(),
                sizes,
                mb(used),
                mb(now - base),
                percent(now),
                mb(peak - base),
                percent(peak),
            ]);
        }
    }
    print!("{}", table(&["round", "sizes", "accounted MB", "resident MB", "of it", "peak MB", "of it"], &rows));
    Ok(())
}
