//! The proof that the proof works: every deliberate fault in the code under test is caught within a stated number of seeds.

use super::faults::Faults;
use super::pool;
use super::run::{Plan, Report};
use crema_core::mutant::Mutant;
use crema_shard::ReadMode;

/// How a mutant is hunted.
#[derive(Clone, Copy, Debug)]
pub struct Hunt {
    /// The mutant.
    pub mutant: Mutant,
    /// Its name on the command line.
    pub name: &'static str,
    /// Seeds within which it must be caught, from 1 on.
    pub within: u64,
    /// Faults, as on the command line; few where the mutant needs them together.
    pub faults: &'static str,
    /// Whether each seed gets all of these faults, or a random part.
    pub always: bool,
    /// How nodes confirm reads, where only one way is concerned.
    pub reads: Option<ReadMode>,
}

const fn hunt(mutant: Mutant, name: &'static str, within: u64) -> Hunt {
    Hunt { mutant, name, within, faults: "all", always: false, reads: None }
}

/// All mutants. The bounds are several times what was seen, so that a change of the workload does not break them.
pub const HUNTS: [Hunt; 20] = [
    hunt(Mutant::AckBeforeApply, "ack-before-apply", 20),
    Hunt {
        reads: Some(ReadMode::ReadIndex),
        faults: "estrange",
        always: true,
        ..hunt(Mutant::ReusedReadContext, "reused-read-context", 500)
    },
    hunt(Mutant::PersistAfterSend, "persist-after-send", 20),
    hunt(Mutant::VoteAfterWipe, "vote-after-wipe", 40),
    Hunt { faults: "estrange", always: true, ..hunt(Mutant::LeaseFromReply, "lease-from-reply", 300) },
    hunt(Mutant::TransferUnderLease, "transfer-under-lease", 200),
    Hunt {
        faults: "delay,reorder,duplicate,transfer",
        always: true,
        ..hunt(Mutant::LateTimeoutNow, "late-timeout-now", 8_000)
    },
    hunt(Mutant::NoPromise, "no-promise", 300),
    Hunt {
        faults: "stall,transfer,delay,lag",
        always: true,
        ..hunt(Mutant::CellLoadedOnce, "cell-loaded-once", 1_000)
    },
    hunt(Mutant::NoDedup, "no-dedup", 20),
    hunt(Mutant::LocalClockInApply, "local-clock-in-apply", 20),
    Hunt { faults: "clock,kill,transfer", always: true, ..hunt(Mutant::WallStamps, "wall-stamps", 100) },
    hunt(Mutant::ReadyEarly, "ready-early", 40),
    hunt(Mutant::ReorderedRetry, "reordered-retry", 300),
    hunt(Mutant::HalfVisible, "half-visible", 40),
    hunt(Mutant::FoundAlone, "found-alone", 100),
    hunt(Mutant::IgnoredConfChange, "ignored-conf-change", 40),
    hunt(Mutant::ForgottenVote, "forgotten-vote", 40),
    hunt(Mutant::CutBeforeState, "cut-before-state", 300),
    hunt(Mutant::OwnExpiry, "own-expiry", 40),
];

/// The name of a mutant on the command line.
pub fn name(mutant: Mutant) -> &'static str {
    HUNTS.iter().find(|h| h.mutant == mutant).map_or("", |h| h.name)
}

/// The mutant of that name.
pub fn parse(text: &str) -> Result<Mutant, String> {
    HUNTS.iter().find(|h| h.name == text).map(|h| h.mutant).ok_or_else(|| {
        let names: Vec<&str> = HUNTS.iter().map(|h| h.name).collect();
        format!("unknown mutant {text:?}; known are {}", names.join(", "))
    })
}

impl Hunt {
    fn plan(&self, seed: u64) -> Plan {
        // The table is ours; a name in it that is wrong shows in its test.
        let faults = self.faults.parse().unwrap_or_else(|_| Faults::all());
        Plan {
            seed,
            nodes: None,
            shards: None,
            faults,
            always: self.always,
            reads: self.reads,
            mutant: Some(self.mutant),
            history: false,
        }
    }

    /// Runs seeds from 1 on until one catches the mutant; `None` if it survives them all.
    pub fn run(&self, jobs: usize) -> Option<Report> {
        let plans = (1..=self.within).map(|seed| self.plan(seed));
        let mut caught = None;
        pool::run(plans, jobs, |report| {
            if !report.failures.is_empty() {
                caught = Some(report);
            }
            caught.is_none()
        });
        caught
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those that are caught soon; the others by command, `sim --mutants`.
    #[test]
    fn quick_mutants_are_caught() {
        for hunt in HUNTS.iter().filter(|h| h.within <= 40) {
            let caught = hunt.run(pool::default_jobs());
            assert!(caught.is_some(), "{} survives {} seeds", hunt.name, hunt.within);
        }
    }

    #[test]
    fn every_mutant_is_hunted_once_under_a_name_of_its_own() {
        for m in Mutant::ALL {
            assert_eq!(HUNTS.iter().filter(|h| h.mutant == m).count(), 1, "{m:?}");
            assert_eq!(parse(name(m)), Ok(m));
        }
        assert!(HUNTS.iter().all(|h| h.faults.parse::<Faults>().is_ok()));
        assert!(parse("none-such").is_err());
    }
}
