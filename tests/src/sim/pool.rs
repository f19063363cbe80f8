//! Many seeds on several threads, their reports in the order of the seeds: a seed is a run of its own, so that only the
//! order of what is printed could depend on the number of threads.

use super::run::{Plan, Report, run_seed};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

/// Runs `plans` on `jobs` threads and shows each report in order to `each`, until that says no more.
pub fn run(plans: impl Iterator<Item = Plan> + Send, jobs: usize, mut each: impl FnMut(Report) -> bool) {
    let plans = Mutex::new(plans.enumerate());
    let over = AtomicBool::new(false);
    // Reports of later seeds wait for that of an earlier one: few, since every thread works on one.
    let (tell, told) = mpsc::sync_channel(4 * jobs);
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            let (plans, over, tell) = (&plans, &over, tell.clone());
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    // The iterator is arithmetic; it does not panic.
                    let Some((i, plan)) = plans.lock().expect("no panic while held").next() else { break };
                    if tell.send((i, run_seed(&plan))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(tell);
        let mut waiting = BTreeMap::new();
        let mut next = 0;
        'all: while let Ok((i, report)) = told.recv() {
            waiting.insert(i, report);
            while let Some(report) = waiting.remove(&next) {
                next += 1;
                if !each(report) {
                    break 'all;
                }
            }
        }
        over.store(true, Ordering::Relaxed);
        drop(told);
    });
}

/// As many threads as there are processors.
pub fn default_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Faults;

    #[test]
    fn reports_come_in_order_and_end_when_told() {
        let plan = |seed| Plan {
            seed,
            nodes: Some(3),
            shards: Some(1),
            faults: Faults::default(),
            always: false,
            reads: None,
            mutant: None,
            history: false,
        };
        let mut seen = Vec::new();
        run((5..100).map(plan), 3, |report| {
            seen.push(report.plan.seed);
            seen.len() < 4
        });
        assert_eq!(seen, [5, 6, 7, 8]);
    }
}
