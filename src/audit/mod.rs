//! The audit log as it grows: one [`tail`] reads the log for all live streams, and each [`stream`] reads its own past.
//!
//! Invariant: a stream passes no entry that it has not looked at. It moves its cursor only over what follows it without
//! a hole, and whatever is not sure of that reads from the database again.

pub mod stream;
pub mod tail;

use std::time::Duration;

/// How long a stream may last, and wait.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A stream ends after this long, so that callers spread over the replicas that have come since; `None`: never.
    pub age_max: Option<Duration>,
    /// A caller who takes nothing for this long is told to come back.
    pub slow_max: Duration,
    /// A database that is away for longer ends the stream.
    pub away_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            age_max: None,
            slow_max: Duration::from_secs(30),
            away_max: Duration::from_secs(30),
        }
    }
}
