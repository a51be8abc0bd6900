//! Which positions are of the history that the cache follows: the newest as the feed read them, older ones as the
//! database told.
//!
//! Invariant: what is known of one epoch is not known of another, and no position is taken to be foreign here unless
//! the database said so.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{cache::Epoch, model::Position};

/// The feed's entries that are remembered: those of the last minutes at any rate that a database commits at.
const RECENT_MAX: usize = 4_096;

/// Older positions that are remembered. Callers keep few, and what is forgotten is asked for again.
const ASKED_MAX: usize = 4_096;

/// What is known of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is in this history.
    Holds,
    /// The database said that it is not.
    Foreign,
    /// Only the database can tell.
    Unknown,
}

/// The positions of one epoch.
#[derive(Default)]
pub struct History(Mutex<Positions>);

#[derive(Default)]
struct Positions {
    /// `None` before the first.
    epoch: Option<Epoch>,
    /// In order: the head that the epoch began with and every entry since, the newest of them.
    recent: VecDeque<Position>,
    /// What the database told: whether they are in this history.
    asked: HashMap<Position, bool>,
}

impl History {
    /// Forgets what was known: another history begins at `head`.
    pub fn begin(&self, epoch: Epoch, head: Position) {
        *self.lock() = Positions {
            epoch: Some(epoch),
            recent: VecDeque::from([head]),
            asked: HashMap::new(),
        };
    }

    /// Adds the log's next entries.
    pub fn extend(&self, entries: &[Position]) {
        // Most pages are empty.
        if entries.is_empty() {
            return;
        }
        let mut known = self.lock();
        known.recent.extend(entries);
        let excess = known.recent.len().saturating_sub(RECENT_MAX);
        known.recent.drain(..excess);
    }

    /// What is known of a position in an epoch's history.
    pub fn recall(&self, position: Position, epoch: Epoch) -> Standing {
        let known = self.lock();
        if known.epoch != Some(epoch) {
            return Standing::Unknown;
        }
        known.recall(position)
    }

    /// Whether `position` is known to be of the history that has `end`.
    pub fn has_both(&self, position: Position, end: Position) -> bool {
        let known = self.lock();
        [position, end].map(|position| known.recall(position)) == [Standing::Holds; 2]
    }

    /// Keeps what the database told of a position in an epoch's history, if that is still this one.
    pub fn remember(&self, position: Position, epoch: Epoch, is_in: bool) {
        let mut known = self.lock();
        if known.epoch != Some(epoch) {
            return;
        }
        if known.asked.len() >= ASKED_MAX {
            known.asked.clear();
        }
        known.asked.insert(position, is_in);
    }

    /// A thread that panicked while it held this left it whole.
    fn lock(&self) -> MutexGuard<'_, Positions> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Positions {
    fn recall(&self, position: Position) -> Standing {
        if let Ok(index) = self
            .recent
            .binary_search_by_key(&position.seq, |entry| entry.seq)
            && self.recent[index] == position
        {
            return Standing::Holds;
        }
        match self.asked.get(&position) {
            Some(true) => Standing::Holds,
            Some(false) => Standing::Foreign,
            None => Standing::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Cache;

    fn at(seq: i64) -> Position {
        Position { seq, uid: 7 }
    }

    #[test]
    fn the_newest_entries_are_known_and_the_rest_is_what_was_told() {
        let (history, cache) = (History::default(), Cache::new(1));
        let epoch = cache.begin_epoch(at(10));
        assert_eq!(history.recall(at(10), epoch), Standing::Unknown);
        history.begin(epoch, at(10));
        history.extend(&[at(11), at(13)]);
        let stranger = Position { seq: 11, uid: 8 };
        for known in [10, 11, 13] {
            assert_eq!(history.recall(at(known), epoch), Standing::Holds, "{known}");
        }
        for unknown in [at(9), at(12), at(14), stranger] {
            assert_eq!(history.recall(unknown, epoch), Standing::Unknown);
        }
        history.remember(at(9), epoch, true);
        history.remember(stranger, epoch, false);
        assert_eq!(history.recall(at(9), epoch), Standing::Holds);
        assert_eq!(history.recall(stranger, epoch), Standing::Foreign);
        assert!(history.has_both(at(9), at(13)));
        assert!(!history.has_both(at(9), at(14)) && !history.has_both(stranger, at(13)));
    }

    #[test]
    fn another_epoch_knows_nothing_of_the_one_before() {
        let (history, cache) = (History::default(), Cache::new(1));
        let before = cache.begin_epoch(at(10));
        history.begin(before, at(10));
        history.remember(at(9), before, true);
        let epoch = cache.begin_epoch(at(8));
        history.begin(epoch, at(8));
        for position in [at(9), at(10)] {
            assert_eq!(history.recall(position, epoch), Standing::Unknown);
        }
        // An answer that was on its way, and a question that still leans on the epoch before.
        history.remember(at(9), before, true);
        assert_eq!(history.recall(at(9), epoch), Standing::Unknown);
        assert_eq!(history.recall(at(8), before), Standing::Unknown);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (history, cache) = (History::default(), Cache::new(1));
        let epoch = cache.begin_epoch(at(0));
        history.begin(epoch, at(0));
        let entries: Vec<Position> = (1..).take(3 * RECENT_MAX).map(at).collect();
        history.extend(&entries);
        for position in entries.iter().take(3 * ASKED_MAX) {
            history.remember(*position, epoch, true);
        }
        let known = history.lock();
        assert_eq!(known.recent.len(), RECENT_MAX);
        assert_eq!(known.recent.back(), entries.last());
        assert!(known.asked.len() <= ASKED_MAX);
    }
}
