//! What `at_least_as_fresh` adds to a check: it waits for the feed, and tells positions of this history from others.
//!
//! Invariant: no answer is given at a position unless the position and the answer's own are of one history: both known
//! to the feed, or found together in one snapshot of the database.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{CheckError, Checker, unanswered};
use crate::{
    cache::Epoch,
    feed::POLL_INTERVAL,
    history::Standing,
    loader::LoadError,
    model::{BootTime, Position},
    store::log::FoundPositions,
    trail,
};

/// How long to wait for the feed to apply a position: a poll, and as long again for its page. The database has it already.
const APPLY_WAIT_MAX: Duration = POLL_INTERVAL.saturating_mul(2);

/// Questions about positions at once: a part of the connections that answer misses.
pub(super) const QUESTIONS_MAX: usize = 2;

/// How long a question about a position waits for its turn; each takes less than a millisecond.
const TURN_WAIT_MAX: Duration = Duration::from_secs(1);

impl Checker {
    /// Returns when the cache is known to have the position, or when only the database can give the answer.
    pub(super) async fn reach(
        &self,
        position: Position,
        arrived: BootTime,
    ) -> Result<(), CheckError> {
        let is_usable = self
            .progress
            .lease()
            .is_some_and(|lease| arrived.since(lease.sent_at) <= self.staleness_bound);
        if !is_usable {
            return Ok(());
        }
        // When the time is up the database decides: the position may be newer than what is applied here.
        let _elapsed = timeout(APPLY_WAIT_MAX, self.progress.applied(position.seq)).await;
        let Some(lease) = self.progress.lease() else {
            return Ok(());
        };
        if lease.applied.seq < position.seq {
            return Ok(());
        }
        let (history, epoch) = (&self.progress.history, lease.epoch);
        match history.recall(position, epoch) {
            Standing::Holds => return Ok(()),
            Standing::Foreign => return Err(CheckError::UnknownPosition(position)),
            Standing::Unknown => {}
        }
        let found = self.find(position, lease.applied, Some(epoch)).await?;
        // Where the lease is of a lost history nothing follows from it: the cache will not answer, the database will.
        if found.has_end {
            history.remember(position, epoch, found.has_asked);
            if !found.has_asked {
                return Err(CheckError::UnknownPosition(position));
            }
        }
        Ok(())
    }

    /// Makes sure that an answer of the database, read at `head` since the request arrived, includes the position.
    pub(super) async fn vouch(&self, position: Position, head: Position) -> Result<(), CheckError> {
        if head.seq < position.seq {
            return Err(CheckError::UnknownPosition(position));
        }
        if position == head || self.progress.history.has_both(position, head) {
            return Ok(());
        }
        match self.find(position, head, None).await? {
            FoundPositions { has_end: false, .. } => Err(LoadError::Unavailable.into()),
            FoundPositions {
                has_asked: false, ..
            } => Err(CheckError::UnknownPosition(position)),
            FoundPositions { .. } => Ok(()),
        }
    }

    /// Asks the database for both positions, unless `epoch`'s history has come to know the first one meanwhile.
    async fn find(
        &self,
        position: Position,
        end: Position,
        epoch: Option<Epoch>,
    ) -> Result<FoundPositions, CheckError> {
        let turn = Arc::clone(&self.position_turns).acquire_owned();
        let Ok(Ok(turn)) = timeout(TURN_WAIT_MAX, turn).await else {
            return Err(LoadError::Overloaded.into());
        };
        let standing = epoch.map(|epoch| self.progress.history.recall(position, epoch));
        if let Some(known @ (Standing::Holds | Standing::Foreign)) = standing {
            return Ok(FoundPositions {
                has_asked: known == Standing::Holds,
                has_end: true,
            });
        }
        let store = Arc::clone(&self.store);
        // A task of its own, as every question; the turn ends with the question, not with the caller.
        let asked = tokio::spawn(trail::carried(async move {
            let found = store.find_positions(position, end).await;
            drop(turn);
            found
        }));
        match asked.await {
            Ok(found) => found.map_err(unanswered),
            Err(_panic) => Err(LoadError::Unavailable.into()),
        }
    }
}
