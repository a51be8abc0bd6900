//! How many calls under way each key has, in memory that does not grow: a count-min sketch, as of the rates.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

/// Slots of a row: a quarter of a megabyte. A key's slot in each row is 16 bits of its hash.
const SLOTS: usize = 1 << 16;

/// So many for each key at once.
pub(super) struct Shares {
    rows: [Box<[AtomicU32]>; 2],
    max: u32,
}

/// One of a key's, or more, given back when it is dropped.
pub struct Share {
    shares: Arc<Shares>,
    key: u64,
    places: u32,
}

impl Shares {
    pub(super) fn new(max: u32) -> Self {
        let row = || (0..SLOTS).map(|_| AtomicU32::new(0)).collect();
        Self {
            rows: [row(), row()],
            max,
        }
    }

    /// `None` when the key has all of its own already.
    pub(super) fn take(self: &Arc<Self>, key: u64) -> Option<Share> {
        // From here on what is counted is given back, taken or not.
        let share = Share {
            shares: Arc::clone(self),
            key,
            places: 1,
        };
        self.fits(key, 1, self.max - 1).then_some(share)
    }

    /// Counts so many more, and says whether there were at most `before_max`.
    fn fits(&self, key: u64, places: u32, before_max: u32) -> bool {
        let before = self
            .slots(key)
            .map(|slot| slot.fetch_add(places, Ordering::Relaxed));
        before.iter().any(|before| *before <= before_max)
    }

    fn slots(&self, key: u64) -> [&AtomicU32; 2] {
        let [a, b, c, d, ..] = key.to_le_bytes();
        let slot = |low, high| usize::from(u16::from_le_bytes([low, high]));
        let [first, second] = &self.rows;
        [&first[slot(a, b)], &second[slot(c, d)]]
    }
}

impl Share {
    /// Takes so many more, past the key's own if need be, so that one call has what it needs however few there are; false when they were exceeded already.
    #[must_use]
    pub(super) fn grow(&mut self, places: u32) -> bool {
        self.places += places;
        self.shares.fits(self.key, places, self.shares.max)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        for slot in self.shares.slots(self.key) {
            slot.fetch_sub(self.places, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_so_many_and_no_more_until_one_is_given_back() {
        let shares = Arc::new(Shares::new(2));
        let first = shares.take(7);
        let second = shares.take(7);
        assert!(first.is_some() && second.is_some());
        for _ in 0..10 {
            assert!(shares.take(7).is_none());
        }
        // Another key that meets it in one row only.
        assert!(shares.take(7 | 1 << 16).is_some());
        drop(first);
        assert!(shares.take(7).is_some());
        drop(second);
        let mut whole = shares.take(7);
        // The first that exceeds what the key has may; nobody after it.
        assert!(whole.as_mut().is_some_and(|whole| whole.grow(5)));
        assert!(shares.take(7).is_none());
        assert!(whole.as_mut().is_some_and(|whole| !whole.grow(1)));
        drop(whole);
        let held: u32 = shares
            .rows
            .iter()
            .flatten()
            .map(|slot| slot.load(Ordering::Relaxed))
            .sum();
        assert_eq!(held, 0);
    }
}
