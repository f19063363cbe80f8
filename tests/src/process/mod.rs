//! Real `crema` processes on free loopback ports or in network namespaces, for tests and benchmarks.
//!
//! ```text
//!   binary::crema()  -> path of the program, built once by cargo
//!   ports::reserve() -> a block of ports nobody else of us uses
//!        |
//!        v
//!   Cluster --spawn--> Process (log files in a Scratch directory; ended by its own pid when dropped)
//!      ^                  ^
//!      |  http::get       |  resp::Client, Load
//!   readiness, leaders    commands, writers that remember what was acknowledged
//!
//!   scenarios: a Cluster, on loopback or in a netns::Network -> Recorder -> fault -> history -> verdict
//!   partitions: a Cluster in a netns::Network -> cuts of gossip, of raft, of both -> one cluster, the same voters
//!   kills:     a Cluster, in memory or on disk -> rounds of Recorder -> kill -9, restart -> history -> verdict, Ledger
//! ```
//!
//! Nothing here waits without a deadline, and nothing ends a process that it did not start.

pub mod ballast;
pub mod binary;
pub mod child;
pub mod cluster;
pub mod http;
pub mod kills;
pub mod ledger;
pub mod load;
pub mod netns;
pub mod partitions;
pub mod ports;
pub mod recorder;
pub mod resp;
pub mod scenarios;
pub mod turn;

pub use child::{Process, Scratch};
pub use cluster::{Cluster, Keeps};
pub use load::{Load, WriterReport};
pub use turn::turn;

use std::fmt;
use std::time::{Duration, Instant};

/// What went wrong, in words for the person who reads the test's output.
pub struct Failure(String);

impl Failure {
    /// A failure that says `what`.
    pub fn new(what: impl Into<String>) -> Self {
        Failure(what.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// As `unwrap` prints it: the text, not its quoted form.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

/// A result of the harness.
pub type Result<T> = std::result::Result<T, Failure>;

/// Adds to an error what was being done.
pub trait Context<T> {
    /// The error becomes "`what`: error".
    fn context(self, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| Failure(format!("{what}: {e}")))
    }
}

/// Between two looks at a condition of another process, which cannot wake us.
const POLL: Duration = Duration::from_millis(20);

/// Asks `probe` until it succeeds, or fails with its last error once `within` is over. It is asked at least once.
pub fn eventually<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(e) if Instant::now() >= deadline => {
                return Err(Failure(format!("{what}: not within {} s; at last: {e}", within.as_secs_f64())));
            }
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eventually_returns_the_first_success_and_the_last_error() {
        let mut calls = 0;
        let third = eventually("counting", Duration::from_secs(60), || {
            calls += 1;
            if calls == 3 { Ok(calls) } else { Err(Failure::new("not yet")) }
        });
        assert_eq!(third.unwrap(), 3);
        let never: Result<()> = eventually("nothing", Duration::ZERO, || Err(Failure::new("no reason")));
        assert!(never.unwrap_err().to_string().contains("at last: no reason"));
    }
}
