//! Rates for any number of keys in memory that does not grow: a count-min sketch whose counters are governor's.
//!
//! A key has a slot in each of two rows and is refused only when both refuse it. One who floods under n keys so slows a
//! stranger with a probability of (n / 65,536)², about 1 in 4,000 for a thousand. Nothing is swept, locked or allocated.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;

use governor::{
    NotUntil, Quota, RateLimiter,
    clock::{Clock, MonotonicClock},
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{InMemoryState, NotKeyed, StateStore},
};

/// Slots of a row: half a megabyte. A key's slot in each row is 16 bits of its hash.
const SLOTS: usize = 1 << 16;

type Instant = <MonotonicClock as Clock>::Instant;

/// So many cells a second for each key, a second's worth of them at once. Keys are hashes, evenly spread and secret.
pub(super) struct Rate(ArcSwapOption<Limited>);

struct Limited {
    limiter: RateLimiter<Asked, Sketch, MonotonicClock, NoOpMiddleware<Instant>>,
    burst: NonZeroU32,
}

/// A key, and whether its cells are taken or only asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Asked {
    key: u64,
    takes: bool,
}

struct Sketch {
    rows: [Box<[InMemoryState]>; 2],
}

impl Rate {
    /// 0: no limit.
    pub(super) fn a_second(cells: u32) -> Self {
        Self(ArcSwapOption::new(Self::limited(cells)))
    }

    /// Another rate from now on, with every key's share whole; what it is already changes nothing.
    pub(super) fn set(&self, cells: u32) {
        let now = self
            .0
            .load()
            .as_ref()
            .map_or(0, |limited| limited.burst.get());
        if now != cells {
            self.0.store(Self::limited(cells));
        }
    }

    fn limited(cells: u32) -> Option<Arc<Limited>> {
        NonZeroU32::new(cells).map(|burst| {
            let row = || (0..SLOTS).map(|_| InMemoryState::default()).collect();
            let sketch = Sketch {
                rows: [row(), row()],
            };
            Arc::new(Limited {
                limiter: RateLimiter::new(Quota::per_second(burst), sketch, MonotonicClock),
                burst,
            })
        })
    }

    /// Takes cells, all or none. What is more than a second's worth counts as a second's worth: it would never pass.
    ///
    /// # Errors
    /// How long until they are there.
    pub(super) fn take(&self, key: u64, cells: u32) -> Result<(), Duration> {
        self.ask(Asked { key, takes: true }, cells)
    }

    /// Whether a cell is there; takes none.
    ///
    /// # Errors
    /// How long until it is.
    pub(super) fn has_one(&self, key: u64) -> Result<(), Duration> {
        self.ask(Asked { key, takes: false }, 1)
    }

    fn ask(&self, asked: Asked, cells: u32) -> Result<(), Duration> {
        let limited = self.0.load();
        let (Some(limited), Some(cells)) = (limited.as_ref(), NonZeroU32::new(cells)) else {
            return Ok(());
        };
        let Limited { limiter, burst } = limited.as_ref();
        match limiter.check_key_n(&asked, cells.min(*burst)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(until)) => Err(wait(&until, limiter.clock())),
            // More than the burst, which it is not.
            Err(_) => Err(Duration::from_secs(1)),
        }
    }
}

fn wait(until: &NotUntil<Instant>, clock: &MonotonicClock) -> Duration {
    until.wait_time_from(clock.now())
}

impl StateStore for Sketch {
    type Key = Asked;

    fn measure_and_replace<T, F, E>(&self, asked: &Asked, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let [first, second] = &self.rows;
        let [a, b, c, d, ..] = asked.key.to_le_bytes();
        let slot = |low, high| usize::from(u16::from_le_bytes([low, high]));
        // Both are asked always, so that they count the same.
        let rows = [&first[slot(a, b)], &second[slot(c, d)]].map(|slot| {
            if asked.takes {
                slot.measure_and_replace(&NotKeyed::NonKey, &decide)
            } else {
                // An error replaces nothing.
                let answer: Result<(), _> =
                    slot.measure_and_replace(&NotKeyed::NonKey, |state| Err(decide(state)));
                answer.map_or_else(
                    |decided| decided.map(|(answer, _)| answer),
                    |()| unreachable!(),
                )
            }
        });
        let [first, second] = rows;
        first.or(second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_s_worth_at_once_and_then_no_more() {
        let rate = Rate::a_second(3);
        for cells in [1, 2] {
            assert_eq!(rate.take(7, cells), Ok(()));
        }
        let wait = rate.take(7, 1).unwrap_err();
        assert!(wait <= Duration::from_millis(334), "{wait:?}");
        // All or none: what does not fit took nothing.
        let longer = rate.take(7, 3).unwrap_err();
        assert!(longer > wait, "{longer:?}");
    }

    #[test]
    fn who_asks_whether_a_cell_is_there_takes_none() {
        let rate = Rate::a_second(2);
        assert!((0..10).all(|_| rate.has_one(7).is_ok()));
        assert_eq!(rate.take(7, 2), Ok(()));
        assert!(rate.has_one(7).is_err());
    }

    #[test]
    fn a_key_suffers_only_where_both_of_its_slots_are_taken() {
        let rate = Rate::a_second(1);
        let key = |first: u64, second: u64| first | second << 16;
        assert_eq!(rate.take(key(1, 1), 1), Ok(()));
        assert_eq!(rate.take(key(1, 2), 1), Ok(()));
        assert_eq!(rate.take(key(2, 1), 1), Ok(()));
        assert!(rate.take(key(1, 1), 1).is_err());
        assert!(rate.take(key(2, 2), 1).is_err());
    }

    #[test]
    fn more_than_a_second_s_worth_passes_when_nothing_else_did() {
        let rate = Rate::a_second(10);
        assert_eq!(rate.take(7, 1_000), Ok(()));
        assert!(rate.take(7, 1).is_err());
    }

    #[test]
    fn zero_is_no_limit() {
        let rate = Rate::a_second(0);
        assert!((0..100_000).all(|_| rate.take(7, u32::MAX).is_ok()));
    }
}
