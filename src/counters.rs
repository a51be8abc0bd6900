//! Counters that every call adds to, and nobody waits for.
//!
//! Invariant: counting takes no lock and shares no cache line between threads; what is read is what was counted before, or
//! a little more.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// As many as threads on a large machine keep busy; more threads share.
const SHARDS: usize = 16;

/// Upper bounds of the buckets, in microseconds: from a cached check to the longest that a call may take.
pub const BUCKETS_MICROS: [u64; 16] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 10_000_000,
];

/// Numbers that only grow, by index.
pub struct Cells {
    shards: [Box<[AtomicU64]>; SHARDS],
}

thread_local! {
    static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
}

impl Cells {
    #[must_use]
    pub fn new(cells: usize) -> Self {
        Self {
            shards: std::array::from_fn(|_| (0..cells).map(|_| AtomicU64::new(0)).collect()),
        }
    }

    /// Adds to a cell; nothing where there is none.
    pub fn add(&self, cell: usize, count: u64) {
        if let Some(cell) = self.shards[shard()].get(cell) {
            cell.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// What all threads have added to a cell.
    #[must_use]
    pub fn sum(&self, cell: usize) -> u64 {
        let cells = self.shards.iter().filter_map(|shard| shard.get(cell));
        cells.map(|cell| cell.load(Ordering::Relaxed)).sum()
    }
}

/// This thread's, the same as long as it lives.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    SHARD.with(|shard| {
        shard.get().unwrap_or_else(|| {
            let next = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            shard.set(Some(next));
            next
        })
    })
}

/// Calls of each method: begun, ended by outcome, and how long they took.
pub struct Calls {
    cells: Cells,
    outcomes: usize,
}

/// How long calls took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Durations {
    pub sum: Duration,
    /// By upper bound as in [`BUCKETS_MICROS`], the last without one; each without those before.
    pub buckets: [u64; BUCKETS_MICROS.len() + 1],
}

/// Cells of a method before its outcomes: begun, microseconds, buckets.
const BEGUN: usize = 0;
const MICROS: usize = 1;
const BUCKETS: usize = 2;
const OUTCOMES: usize = BUCKETS + BUCKETS_MICROS.len() + 1;

impl Calls {
    #[must_use]
    pub fn new(methods: usize, outcomes: usize) -> Self {
        Self {
            cells: Cells::new(methods * (OUTCOMES + outcomes)),
            outcomes,
        }
    }

    pub fn begun(&self, method: usize) {
        self.cells.add(self.at(method) + BEGUN, 1);
    }

    /// An outcome that is none is not counted.
    pub fn ended(&self, method: usize, outcome: usize, since: Instant) {
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS_MICROS.partition_point(|bound| *bound < micros);
        let at = self.at(method);
        self.cells.add(at + BUCKETS + bucket, 1);
        self.cells.add(at + MICROS, micros);
        if outcome < self.outcomes {
            self.cells.add(at + OUTCOMES + outcome, 1);
        }
    }

    #[must_use]
    pub fn count_begun(&self, method: usize) -> u64 {
        self.cells.sum(self.at(method) + BEGUN)
    }

    #[must_use]
    pub fn count_ended(&self, method: usize, outcome: usize) -> u64 {
        self.cells.sum(self.at(method) + OUTCOMES + outcome)
    }

    #[must_use]
    pub fn durations(&self, method: usize) -> Durations {
        let at = self.at(method);
        Durations {
            sum: Duration::from_micros(self.cells.sum(at + MICROS)),
            buckets: std::array::from_fn(|bucket| self.cells.sum(at + BUCKETS + bucket)),
        }
    }

    fn at(&self, method: usize) -> usize {
        method * (OUTCOMES + self.outcomes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_threads_count_is_counted_once() {
        let calls = Calls::new(2, 3);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..1_000 {
                        calls.begun(1);
                        calls.ended(1, 2, Instant::now());
                    }
                });
            }
        });
        assert_eq!(calls.count_begun(1), 8_000);
        assert_eq!(calls.count_ended(1, 2), 8_000);
        assert_eq!(calls.durations(1).buckets.iter().sum::<u64>(), 8_000);
        assert_eq!(calls.count_begun(0), 0);
        assert_eq!(calls.durations(0), Durations::default());
    }

    #[test]
    fn a_duration_is_in_the_first_bucket_that_holds_it() {
        let calls = Calls::new(1, 1);
        let Some(long_ago) = Instant::now().checked_sub(Duration::from_secs(60)) else {
            return;
        };
        calls.ended(0, 0, long_ago);
        let durations = calls.durations(0);
        assert_eq!(durations.buckets[BUCKETS_MICROS.len()], 1);
        assert!(durations.sum >= Duration::from_secs(60));
    }
}
