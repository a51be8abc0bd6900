//! Counters that every call adds to, and nobody waits for.
//!
//! Invariant: counting takes no lock and shares no cache line between threads; what is read is what was counted before, or
//! a little more.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Instant,
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

/// How values of some series are distributed.
pub struct Histograms {
    cells: Cells,
    bounds: &'static [u64],
}

/// What a series has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribution {
    pub sum: u64,
    /// By upper bound, the last without one; each without those before.
    pub buckets: Vec<u64>,
}

impl Histograms {
    #[must_use]
    pub fn new(series: usize, bounds: &'static [u64]) -> Self {
        Self {
            cells: Cells::new(series * (bounds.len() + 2)),
            bounds,
        }
    }

    #[must_use]
    pub fn bounds(&self) -> &'static [u64] {
        self.bounds
    }

    pub fn observe(&self, series: usize, value: u64) {
        let at = self.at(series);
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.cells.add(at, value);
        self.cells.add(at + 1 + bucket, 1);
    }

    /// In microseconds.
    pub fn observe_since(&self, series: usize, since: Instant) {
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.observe(series, micros);
    }

    #[must_use]
    pub fn read(&self, series: usize) -> Distribution {
        let at = self.at(series);
        let buckets = (0..=self.bounds.len()).map(|bucket| self.cells.sum(at + 1 + bucket));
        Distribution {
            sum: self.cells.sum(at),
            buckets: buckets.collect(),
        }
    }

    fn at(&self, series: usize) -> usize {
        series * (self.bounds.len() + 2)
    }
}

/// Calls of each method: begun, ended by outcome, and how long they took.
pub struct Calls {
    begun: Cells,
    ended: Cells,
    outcomes: usize,
    pub micros: Histograms,
}

impl Calls {
    #[must_use]
    pub fn new(methods: usize, outcomes: usize) -> Self {
        Self {
            begun: Cells::new(methods),
            ended: Cells::new(methods * outcomes),
            outcomes,
            micros: Histograms::new(methods, &BUCKETS_MICROS),
        }
    }

    pub fn begun(&self, method: usize) {
        self.begun.add(method, 1);
    }

    pub fn ended(&self, method: usize, outcome: usize, since: Instant) {
        self.ended.add(method * self.outcomes + outcome, 1);
        self.micros.observe_since(method, since);
    }

    #[must_use]
    pub fn count_begun(&self, method: usize) -> u64 {
        self.begun.sum(method)
    }

    #[must_use]
    pub fn count_ended(&self, method: usize, outcome: usize) -> u64 {
        self.ended.sum(method * self.outcomes + outcome)
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
        assert_eq!(calls.micros.read(1).buckets.iter().sum::<u64>(), 8_000);
        assert_eq!(calls.count_begun(0), 0);
        assert_eq!(calls.count_ended(0, 2), 0);
        assert_eq!(calls.micros.read(0).buckets.iter().sum::<u64>(), 0);
    }

    #[test]
    fn a_value_is_in_the_first_bucket_that_holds_it() {
        let sizes = Histograms::new(2, &[1, 10]);
        for value in [0, 1, 2, 10, 11, u64::MAX - 24] {
            sizes.observe(1, value);
        }
        let expected = Distribution {
            sum: u64::MAX,
            buckets: vec![2, 2, 2],
        };
        assert_eq!(sizes.read(1), expected);
        assert_eq!(sizes.read(0).sum, 0);
    }
}
