//! Resident memory per key of one state machine, under the allocator of the binary.
//!
//! Each case is filled in a process of its own, so that nothing an earlier one left behind is counted: this program calls
//! itself. Resident memory is read from `/proc/self/statm`, before the first key and after the last.

use crate::fill::{Machine, keys, reference};
use crate::stats::{table, thousands};
use crema_core::{Op, SetExpire};
use crema_tests::process::{Failure, Result};
use std::process::Command;

/// Flags of `memory`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Number of keys.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000_000], value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    keys: Vec<u64>,
    /// Bytes of a key.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(12..=60_000))]
    key_bytes: u64,
    /// Bytes of a value.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 128, 1_000, 4_000], value_parser = clap::value_parser!(u64).range(1..=8_388_608))]
    value_bytes: Vec<u64>,
    /// Slots that the shard owns.
    #[arg(long, default_value_t = 16_384, value_parser = clap::value_parser!(u16).range(1..=16_384))]
    slots: u16,
    /// Fill one case in this process and print its figures.
    #[arg(long, hide = true)]
    one: bool,
    /// Whether the keys of that case expire.
    #[arg(long, hide = true)]
    ttl: bool,
}

/// Runs the benchmark and prints its table.
pub(crate) fn run(args: &Args) -> Result<()> {
    if args.one {
        return one(args);
    }
    let program = std::env::current_exe().map_err(|e| Failure::new(format!("this program's name: {e}")))?;
    let mut rows = Vec::new();
    let mut sizes: Vec<_> = args.value_bytes.iter().flat_map(|v| args.keys.iter().map(move |k| (*k, *v))).collect();
    sizes.sort_unstable();
    for (keys, value) in sizes {
        for ttl in [false, true] {
            let mut command = Command::new(&program);
            command.args(["memory", "--one", "--keys", &keys.to_string(), "--value-bytes", &value.to_string()]);
            command.args(["--key-bytes", &args.key_bytes.to_string(), "--slots", &args.slots.to_string()]);
            if ttl {
                command.arg("--ttl");
            }
            let output = command.output().map_err(|e| Failure::new(format!("running this program again: {e}")))?;
            let text = String::from_utf8_lossy(&output.stdout);
            let figures: Vec<f64> = text.split_whitespace().filter_map(|n| n.parse().ok()).collect();
            let [resident, accounted] = figures[..] else {
                return Err(Failure::new(format!("no figures: {text} {}", String::from_utf8_lossy(&output.stderr))));
            };
            let each = |bytes: f64| format!("{:.1}", bytes / keys as f64);
            rows.push(vec![
                thousands(keys as f64),
                args.key_bytes.to_string(),
                value.to_string(),
                if ttl { "yes" } else { "no" }.into(),
                each(resident),
                each(accounted),
                each(resident - (keys * (args.key_bytes + value)) as f64),
                format!("{:+.1} %", (accounted / resident - 1.0) * 100.0),
            ]);
        }
    }
    let head = ["keys", "key", "value", "expires", "resident/key", "accounted/key", "overhead/key", "error"];
    print!("{}", table(&head, &rows));
    Ok(())
}

fn one(args: &Args) -> Result<()> {
    let (count, key_bytes) = (args.keys[0], args.key_bytes as usize);
    let mut machine = Machine::new(args.slots);
    // What the first entries allocate for good is not the keys'.
    for key in keys(args.slots, key_bytes).take(1000) {
        machine.set(&key, &[0], SetExpire::Clear);
        machine.write(Op::Del { key: reference(&key) });
    }
    machine.flush();
    let before = resident()?;
    let value = vec![b'v'; args.value_bytes[0] as usize];
    let expire = if args.ttl { SetExpire::After(3_600_000) } else { SetExpire::Clear };
    for key in keys(args.slots, key_bytes).take(count as usize) {
        machine.set(&key, &value, expire);
    }
    machine.flush();
    println!("{} {}", resident()?.saturating_sub(before), machine.m.bytes());
    Ok(())
}

/// Resident bytes of this process.
pub(crate) fn resident() -> Result<u64> {
    let text =
        std::fs::read_to_string("/proc/self/statm").map_err(|e| Failure::new(format!("/proc/self/statm: {e}")))?;
    let pages = text.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    pages.map(|p| p * 4096).ok_or_else(|| Failure::new("/proc/self/statm has no number"))
}
