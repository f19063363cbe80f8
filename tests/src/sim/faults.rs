//! The faults that a seed may enable.

use super::rng::Rng;
use std::fmt;
use std::str::FromStr;

/// One kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Frames vanish without notice.
    Drop,
    /// Spikes of delay, in order.
    Delay,
    /// Frames of one channel overtake each other.
    Reorder,
    /// Frames arrive twice.
    Duplicate,
    /// Two groups of nodes do not hear each other.
    Partition,
    /// One node does not hear another, which hears it; or hears nobody, or is heard by nobody.
    OneWay,
    /// Everything between two nodes, or to or from one, takes a long while in one direction.
    Lag,
    /// A leader hears late, and a moment later is heard by nobody, while what it hears is still of before. By name only: the
    /// faults above come to it by chance, and mutants of leases and read rounds would be hunted for long.
    Estrange,
    /// Connections break and are built anew.
    Reset,
    /// A full queue: the sender learns that its frame was dropped.
    Full,
    /// A node stands still while its clocks run and its frames queue.
    Pause,
    /// A node dies and comes back: with its log, where that is on disk, else as another life.
    Kill,
    /// Batches become durable late.
    SlowDisk,
    /// Wall clocks jump, monotonic clocks drift.
    Clock,
    /// No load for seconds, so that groups fall asleep under the other faults.
    Lull,
    /// Gossip: late claims of leadership, none at all (cut off while Raft is up), and wrong news that a node is gone.
    Gossip,
    /// Leaderships are handed over.
    Transfer,
    /// Tasks of connections get no processor for a while, in the middle of a read.
    Stall,
    /// A node is stopped as planned, and comes back.
    Stop,
    /// A node dies and its disk with it: what comes back is another life, and may keep its log elsewhere: on a disk instead of
    /// in memory, or the reverse.
    Wipe,
    /// All nodes die at once. Only where all have their logs on disk.
    Outage,
    /// A write to a log or a state finds no room: its node ends.
    Enospc,
    /// A sync of a log or a state fails: its node ends, and what was written since the last one may be there in part.
    Eio,
    /// A bit flips in what is at rest on a disk: noticed by the next restart, which then begins another life, or of no account.
    BitFlip,
    /// Nodes are given replicas, or have to give theirs away.
    Voters,
    /// Gossip names leaders that there never were, in terms that there never were.
    Lie,
}

impl Fault {
    /// All of them that a seed chooses from unless others are named.
    pub const ALL: [Fault; 25] = [
        Fault::Drop,
        Fault::Delay,
        Fault::Reorder,
        Fault::Duplicate,
        Fault::Partition,
        Fault::OneWay,
        Fault::Lag,
        Fault::Reset,
        Fault::Full,
        Fault::Pause,
        Fault::Kill,
        Fault::SlowDisk,
        Fault::Clock,
        Fault::Lull,
        Fault::Gossip,
        Fault::Transfer,
        Fault::Stall,
        Fault::Stop,
        Fault::Wipe,
        Fault::Outage,
        Fault::Enospc,
        Fault::Eio,
        Fault::BitFlip,
        Fault::Voters,
        Fault::Lie,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Drop => "drop",
            Fault::Delay => "delay",
            Fault::Reorder => "reorder",
            Fault::Duplicate => "duplicate",
            Fault::Partition => "partition",
            Fault::OneWay => "oneway",
            Fault::Lag => "lag",
            Fault::Estrange => "estrange",
            Fault::Reset => "reset",
            Fault::Full => "full",
            Fault::Pause => "pause",
            Fault::Kill => "kill",
            Fault::SlowDisk => "slowdisk",
            Fault::Clock => "clock",
            Fault::Lull => "lull",
            Fault::Gossip => "gossip",
            Fault::Transfer => "transfer",
            Fault::Stop => "stop",
            Fault::Wipe => "wipe",
            Fault::Outage => "outage",
            Fault::Enospc => "enospc",
            Fault::Eio => "eio",
            Fault::BitFlip => "bit-flip",
            Fault::Voters => "voters",
            Fault::Lie => "lie",
            Fault::Stall => "stall",
        }
    }
}

/// A set of faults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// Every fault.
    pub fn all() -> Self {
        Faults(Fault::ALL.to_vec())
    }

    /// Whether the set holds `fault`.
    pub fn has(&self, fault: Fault) -> bool {
        self.0.contains(&fault)
    }

    /// Swarm testing (Groce et al. 2012): a random subset, since some bugs show only while other faults are absent.
    /// About one seed in ten gets none.
    pub fn swarm(&self, rng: &mut Rng) -> Faults {
        if rng.permille(100) {
            return Faults::default();
        }
        let part = rng.range(150, 700);
        Faults(self.0.iter().copied().filter(|_| rng.permille(part)).collect())
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        let names: Vec<&str> = self.0.iter().map(|x| x.name()).collect();
        f.write_str(&names.join(","))
    }
}

impl FromStr for Faults {
    type Err = String;

    /// Names separated by commas; `all`, `none`.
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "all" => return Ok(Faults::all()),
            "none" => return Ok(Faults::default()),
            _ => {}
        }
        let mut set = Vec::new();
        for name in s.split(',') {
            let mut named = Fault::ALL.into_iter().chain([Fault::Estrange]);
            let Some(fault) = named.find(|f| f.name() == name) else {
                let known: Vec<&str> = Fault::ALL.iter().map(|f| f.name()).collect();
                return Err(format!("unknown fault {name:?}; known are all, none, {}", known.join(", ")));
            };
            if !set.contains(&fault) {
                set.push(fault);
            }
        }
        set.sort_unstable();
        Ok(Faults(set))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for text in ["none", "drop,kill", "pause", "enospc,bit-flip"] {
            assert_eq!(text.parse::<Faults>().unwrap().to_string(), text);
        }
        let all = Faults::all();
        assert_eq!(all.to_string().parse::<Faults>().unwrap(), all);
        assert!("drop,flood".parse::<Faults>().is_err());
    }

    #[test]
    fn the_swarm_has_seeds_with_none_and_with_several() {
        let sizes: Vec<usize> = (0..200).map(|s| Faults::all().swarm(&mut Rng::new(s)).0.len()).collect();
        assert!(sizes.contains(&0));
        assert!(sizes.iter().any(|n| *n > 6));
    }
}
