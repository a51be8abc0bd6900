//! The hot path: one question, from the cache or from the database, with the evidence for its freshness.
//!
//! Invariant: nothing here decides. PostgreSQL did; this remembers, and refuses rather than answer from what is older
//! than the bound. Freshness is tested against the instant at which the request arrived.

mod position;

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use thiserror::Error;
use tokio::sync::Semaphore;

use crate::{
    cache::{Cache, Entry},
    counters::Cells,
    feed::Progress,
    loader::{Join, Load, LoadError, Loader},
    model::{BootTime, Position, Reason, Subject, SubjectPermissions},
    selfcheck::Sampler,
    store::{Store, StoreError, load::Explanation, pool::Connection},
    trail,
};

/// How fresh an answer must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// From the cache while its staleness is within the service's bound, else from the database.
    MinimizeLatency,
    /// As `MinimizeLatency`, within this bound instead.
    MaxStaleness(Duration),
    /// As `MinimizeLatency`, with every commit up to this position.
    AtLeastAsFresh(Position),
    /// From a database snapshot that began after the request arrived.
    FullyConsistent,
}

/// Why there is no answer.
#[derive(Clone, Debug, Error)]
pub enum CheckError {
    /// The database had to be asked, and could not be.
    #[error(transparent)]
    NotLoaded(#[from] LoadError),
    /// The position that the answer must be as fresh as is none of this database's history.
    #[error("`{0}` is no position of this database's history")]
    UnknownPosition(Position),
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Cache,
    Database,
}

/// How fresh an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The answer is at least as new as this.
    pub position: Position,
    pub source: Source,
    /// The answer was true no longer before the request's arrival than this.
    pub staleness: Duration,
}

impl Evidence {
    /// What holds for two answers together.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self {
            position: self.position.min(other.position),
            source: if self.source == other.source {
                self.source
            } else {
                Source::Database
            },
            staleness: self.staleness.max(other.staleness),
        }
    }
}

/// What is known of a subject, and how well.
pub struct Known {
    entry: Arc<Entry>,
    pub evidence: Evidence,
}

impl Known {
    #[must_use]
    pub fn permissions(&self) -> &SubjectPermissions {
        &self.entry.permissions
    }
}

/// What was answered since the start.
pub struct Counts {
    decisions: Cells,
    /// Subjects found in the cache and believed, and others.
    lookups: Cells,
    turned_away: AtomicU64,
    reads_turned_away: AtomicU64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            decisions: Cells::new(Reason::ALL.len() * 2),
            lookups: Cells::new(2),
            turned_away: AtomicU64::new(0),
            reads_turned_away: AtomicU64::new(0),
        }
    }
}

impl Counts {
    /// A decision that somebody was told.
    pub fn decided(&self, reason: Reason, source: Source) {
        self.decisions.add(decision(reason, source), 1);
    }

    #[must_use]
    pub fn decisions(&self, reason: Reason, source: Source) -> u64 {
        self.decisions.sum(decision(reason, source))
    }

    /// Subjects that were found in the cache.
    pub fn found(&self, subjects: usize) {
        self.lookups.add(1, subjects as u64);
    }

    /// Subjects that were found in the cache, and that were not.
    #[must_use]
    pub fn hits_and_misses(&self) -> (u64, u64) {
        (self.lookups.sum(1), self.lookups.sum(0))
    }
}

impl Counts {
    /// Checks whose question to the database was refused because too many waited already.
    #[must_use]
    pub fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }

    /// Lists and explained checks that were refused for that.
    #[must_use]
    pub fn reads_turned_away(&self) -> u64 {
        self.reads_turned_away.load(Ordering::Relaxed)
    }
}

fn count_if(counter: &AtomicU64, is_refusal: bool) {
    counter.fetch_add(u64::from(is_refusal), Ordering::Relaxed);
}

fn decision(reason: Reason, source: Source) -> usize {
    reason as usize * 2 + source as usize
}

/// Answers checks.
pub struct Checker {
    pub cache: Arc<Cache>,
    pub progress: Arc<Progress>,
    pub loader: Loader,
    pub store: Arc<Store>,
    pub staleness_bound: Duration,
    pub sampler: Sampler,
    pub counts: Counts,
    /// Questions to the database about positions: see `position.rs`.
    position_turns: Arc<Semaphore>,
}

impl Checker {
    #[must_use]
    pub fn new(
        cache: Arc<Cache>,
        progress: Arc<Progress>,
        loader: Loader,
        store: Arc<Store>,
        staleness_bound: Duration,
        sampler: Sampler,
    ) -> Self {
        Self {
            cache,
            progress,
            loader,
            store,
            staleness_bound,
            sampler,
            counts: Counts::default(),
            position_turns: Arc::new(Semaphore::new(position::QUESTIONS_MAX)),
        }
    }

    /// Everything that is decided for one subject.
    ///
    /// # Errors
    /// When neither the cache nor the database can answer as freshly as asked.
    pub async fn know(
        &self,
        subject: Subject,
        freshness: Freshness,
        arrived: BootTime,
    ) -> Result<Known, CheckError> {
        if let Freshness::AtLeastAsFresh(position) = freshness {
            self.reach(position, arrived).await?;
        }
        if let Some(known) = self.remember(&subject, freshness, arrived) {
            return Ok(known);
        }
        let load = self.load(vec![subject], freshness, arrived).await?;
        from_load(&load, &subject, arrived)
    }

    /// As [`Checker::know`] for many subjects, in their order, with at most one round trip. What is cached is
    /// answered whatever becomes of the rest.
    pub async fn know_all(
        &self,
        subjects: &[Subject],
        freshness: Freshness,
        arrived: BootTime,
    ) -> Vec<Result<Known, CheckError>> {
        if let Freshness::AtLeastAsFresh(position) = freshness
            && let Err(error) = self.reach(position, arrived).await
        {
            return subjects.iter().map(|_| Err(error.clone())).collect();
        }
        let remembered: Vec<Option<Known>> = subjects
            .iter()
            .map(|subject| self.remember(subject, freshness, arrived))
            .collect();
        let missing: HashSet<Subject> = subjects
            .iter()
            .zip(&remembered)
            .filter_map(|(subject, known)| known.is_none().then_some(*subject))
            .collect();
        let load = if missing.is_empty() {
            Err(LoadError::Unavailable.into())
        } else {
            self.load(missing.into_iter().collect(), freshness, arrived)
                .await
        };
        // What is cached and what was loaded share a position: they must not be of two histories.
        let is_lost = load.as_ref().is_ok_and(|load| !load.history_holds);
        remembered
            .into_iter()
            .zip(subjects)
            .map(|(known, subject)| match (known, &load) {
                (Some(_), _) if is_lost => Err(LoadError::Unavailable.into()),
                (Some(known), _) => Ok(known),
                (None, Ok(load)) => from_load(load, subject, arrived),
                (None, Err(error)) => Err(error.clone()),
            })
            .collect()
    }

    /// One decision and the facts behind it, read from the database together.
    ///
    /// # Errors
    /// As [`Checker::read`].
    pub async fn explain(
        &self,
        subject: Subject,
        permission: &str,
        freshness: Freshness,
        arrived: BootTime,
    ) -> Result<(Explanation, Evidence), CheckError> {
        let permission = permission.to_owned();
        self.read(freshness, arrived, async move |connection: Connection| {
            let explanation = connection.explain(subject, &permission).await?;
            Ok((explanation.head, explanation))
        })
        .await
    }

    /// What the cache does not hold, read from the database; the query says the head of its snapshot.
    ///
    /// # Errors
    /// When the database cannot be asked, or too many reads are under way, or the position is foreign.
    pub async fn read<T, Answer>(
        &self,
        freshness: Freshness,
        arrived: BootTime,
        query: impl FnOnce(Connection) -> Answer,
    ) -> Result<(T, Evidence), CheckError>
    where
        T: Send + 'static,
        Answer: Future<Output = Result<(Position, T), StoreError>> + Send + 'static,
    {
        trail::read_database();
        let connection = self.store.reads.acquire().await.map_err(|error| {
            count_if(
                &self.counts.reads_turned_away,
                matches!(error, StoreError::Busy),
            );
            unanswered(error)
        })?;
        let sent_at = BootTime::now();
        // A task of its own: a caller who goes away must not leave a connection with half a question.
        let asked = tokio::spawn(trail::carried(query(connection)));
        let (head, answer) = match asked.await {
            Ok(read) => read.map_err(unanswered)?,
            Err(_panic) => return Err(LoadError::Unavailable.into()),
        };
        self.progress.observe(head);
        if let Freshness::AtLeastAsFresh(position) = freshness {
            self.vouch(position, head).await?;
        }
        Ok((answer, from_database(head, sent_at, arrived)))
    }

    /// The decision for one permission, to be told to somebody.
    #[must_use]
    pub fn decide(&self, known: &Known, permission: &str) -> Reason {
        let reason = known.entry.permissions.decide(permission);
        self.counts.decided(reason, known.evidence.source);
        reason
    }

    /// What is cached of a subject, if that is fresh enough for who asks for nothing in particular. Counts nothing: whoever
    /// makes do with it counts it.
    #[must_use]
    pub fn recall(&self, subject: &Subject, arrived: BootTime) -> Option<Known> {
        self.look_up(subject, Freshness::MinimizeLatency, arrived)
    }

    /// The cached answer, if one may be given.
    fn remember(
        &self,
        subject: &Subject,
        freshness: Freshness,
        arrived: BootTime,
    ) -> Option<Known> {
        if freshness == Freshness::FullyConsistent {
            return None;
        }
        let known = self.look_up(subject, freshness, arrived);
        self.counts.lookups.add(usize::from(known.is_some()), 1);
        known
    }

    fn look_up(&self, subject: &Subject, freshness: Freshness, arrived: BootTime) -> Option<Known> {
        let staleness_max = match freshness {
            Freshness::MinimizeLatency | Freshness::AtLeastAsFresh(_) => self.staleness_bound,
            Freshness::MaxStaleness(max) => max,
            Freshness::FullyConsistent => return None,
        };
        // The lease, then the entry: what the lease says was applied has been applied to the entry too.
        let lease = self.progress.lease()?;
        let staleness = arrived.since(lease.sent_at);
        if staleness > staleness_max {
            return None;
        }
        if let Freshness::AtLeastAsFresh(position) = freshness
            && !self.progress.has_applied(position, &lease)
        {
            return None;
        }
        let entry = self.cache.get(subject)?;
        // The history may have become another since the lease was read.
        if entry.epoch != lease.epoch {
            return None;
        }
        let evidence = Evidence {
            position: entry.head.max(lease.applied),
            source: Source::Cache,
            staleness,
        };
        self.sampler.count(subject, &entry, evidence.position);
        Some(Known { entry, evidence })
    }

    /// What the database says, in a statement that is as fresh as asked.
    async fn load(
        &self,
        subjects: Vec<Subject>,
        freshness: Freshness,
        arrived: BootTime,
    ) -> Result<Arc<Load>, CheckError> {
        let join = match freshness {
            Freshness::MinimizeLatency => Join::SentSince(arrived.before(self.staleness_bound)),
            Freshness::MaxStaleness(max) => Join::SentSince(arrived.before(max)),
            // Whatever the caller has seen committed is in a snapshot that begins from now on.
            Freshness::AtLeastAsFresh(_) => Join::SentSince(arrived),
            Freshness::FullyConsistent => Join::None,
        };
        trail::read_database();
        let load = self.loader.load(subjects, join).await;
        let load = load.inspect_err(|error| {
            let is_refusal = matches!(error, LoadError::Overloaded);
            count_if(&self.counts.turned_away, is_refusal);
        })?;
        if let Freshness::AtLeastAsFresh(position) = freshness {
            self.vouch(position, load.head).await?;
        }
        Ok(load)
    }
}

/// The database's error is for the log alone.
fn unanswered(error: StoreError) -> CheckError {
    if !matches!(error, StoreError::Busy) {
        tracing::warn!(%error, "a question has no answer");
    }
    LoadError::from(error).into()
}

fn from_load(load: &Load, subject: &Subject, arrived: BootTime) -> Result<Known, CheckError> {
    let entry = load.entries.get(subject).ok_or(LoadError::Unavailable)?;
    Ok(Known {
        entry: Arc::clone(entry),
        evidence: from_database(load.head, load.sent_at, arrived),
    })
}

fn from_database(head: Position, sent_at: BootTime, arrived: BootTime) -> Evidence {
    Evidence {
        position: head,
        source: Source::Database,
        staleness: arrived.since(sent_at),
    }
}
