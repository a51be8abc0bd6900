//! What calls came to: counted always, logged at a bounded rate.
//!
//! Invariant: a flood of refusals is no flood of lines, and no line that is left out goes unmentioned for good.

use std::{
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering},
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, MonotonicClock},
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};

use super::{Class, Limit};

/// google.rpc.Code has so many.
const CODES: usize = 17;

/// Lines of one code: what a person can follow.
const LINES_A_MINUTE: NonZeroU32 = NonZeroU32::new(60).unwrap();

/// Lines of one code at once: the beginning of a trouble tells most.
const LINES_AT_ONCE: NonZeroU32 = NonZeroU32::new(10).unwrap();

/// Counts since the start, by what calls ended with and by which limit refused them.
pub struct Tally {
    failures: [Failures; CODES],
    refusals: [AtomicU64; Limit::ALL.len()],
    /// Those of [`Limit::InFlight`], by the class of the call.
    turned_away: [AtomicU64; Class::ALL.len()],
}

struct Failures {
    count: AtomicU64,
    left_out: AtomicU64,
    lines: RateLimiter<
        NotKeyed,
        InMemoryState,
        MonotonicClock,
        NoOpMiddleware<<MonotonicClock as Clock>::Instant>,
    >,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            failures: std::array::from_fn(|_| Failures {
                count: AtomicU64::new(0),
                left_out: AtomicU64::new(0),
                lines: RateLimiter::direct_with_clock(
                    Quota::per_minute(LINES_A_MINUTE).allow_burst(LINES_AT_ONCE),
                    MonotonicClock,
                ),
            }),
            refusals: [const { AtomicU64::new(0) }; Limit::ALL.len()],
            turned_away: [const { AtomicU64::new(0) }; Class::ALL.len()],
        }
    }
}

impl Class {
    pub const ALL: [Self; 3] = [Self::Free, Self::Check, Self::List];

    /// As metrics have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Free => "health",
            Self::Check => "check",
            Self::List => "list",
        }
    }
}

impl Limit {
    /// The class of all calls that it refuses, as metrics have it; `any` where it is for all of them.
    #[must_use]
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Checks => Class::Check.name(),
            Self::Lists => Class::List.name(),
            Self::InFlight | Self::CallerInFlight | Self::Address | Self::Credentials => "any",
        }
    }
}

impl Tally {
    /// Counts a call that ended with this google.rpc.Code. Whoever gets a number logs a line with it: so many of the
    /// code were left out before.
    pub fn failed(&self, code: i32) -> Option<u64> {
        let failures = usize::try_from(code)
            .ok()
            .and_then(|code| self.failures.get(code))?;
        failures.count.fetch_add(1, Ordering::Relaxed);
        if failures.lines.check().is_ok() {
            return Some(failures.left_out.swap(0, Ordering::Relaxed));
        }
        failures.left_out.fetch_add(1, Ordering::Relaxed);
        None
    }

    pub(super) fn refused(&self, limit: Limit) {
        self.refusals[limit as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a call that found no place among those in flight.
    pub(super) fn turned_away(&self, class: Class) {
        self.refused(Limit::InFlight);
        self.turned_away[class as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Calls that ended with this google.rpc.Code.
    #[must_use]
    pub fn failures(&self, code: i32) -> u64 {
        let failures = usize::try_from(code)
            .ok()
            .and_then(|code| self.failures.get(code));
        failures.map_or(0, |failures| failures.count.load(Ordering::Relaxed))
    }

    /// Calls that this limit refused.
    #[must_use]
    pub fn refusals(&self, limit: Limit) -> u64 {
        self.refusals[limit as usize].load(Ordering::Relaxed)
    }

    /// Those of [`Limit::InFlight`] that were of this class.
    #[must_use]
    pub fn turned_away_of(&self, class: Class) -> u64 {
        self.turned_away[class as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_and_a_number() {
        let tally = Tally::default();
        let lines = (0..1_000).filter_map(|_| tally.failed(16)).count();
        assert!((10..20).contains(&lines), "{lines}");
        assert_eq!(tally.failures(16), 1_000);
        // Another trouble still has its lines.
        assert_eq!(tally.failed(13), Some(0));
        for unknown in [-1, 17, i32::MAX] {
            assert_eq!(tally.failed(unknown), None);
        }
    }
}
