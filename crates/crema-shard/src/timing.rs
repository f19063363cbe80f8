//! Periods of the protocol. All nodes of a cluster must agree on them.

use std::time::Duration;

/// Periods and limits in time; the defaults are the design's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// One Raft tick.
    pub tick: Duration,
    /// Ticks between heartbeats of a leader.
    pub heartbeat_ticks: usize,
    /// E: ticks after which a leader without a quorum steps down, and within which a voter that hears its leader votes
    /// for nobody else.
    pub election_ticks: usize,
    /// Ticks without a leader after which the voter of rank 0 campaigns.
    pub campaign_ticks: usize,
    /// Further ticks per rank.
    pub campaign_step_ticks: usize,
    /// Ticks without any work after which a group asks its voters to sleep.
    pub quiet_ticks: usize,
    /// Period of beats between a pair of nodes.
    pub beat: Duration,
    /// A peer without a beat for this long is down.
    pub beat_timeout: Duration,
    /// Period at which a registering or draining node repeats its request.
    pub ask_again: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            tick: Duration::from_millis(50),
            heartbeat_ticks: 2,
            election_ticks: 10,
            campaign_ticks: 12,
            campaign_step_ticks: 3,
            quiet_ticks: 40,
            beat: Duration::from_millis(100),
            beat_timeout: Duration::from_millis(600),
            ask_again: Duration::from_millis(100),
        }
    }
}

impl Timing {
    /// E as time: how long a voter that heard its leader helps nobody else.
    pub fn promise(&self) -> Duration {
        self.tick * self.election_ticks as u32
    }

    /// How long a lease lasts after the issue of its round: less than the promise by more than clocks differ in rate.
    pub fn lease(&self) -> Duration {
        self.promise() * 85 / 100
    }
}
