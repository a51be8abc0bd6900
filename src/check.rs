//! The hot path: one question, from the cache or from the database, with the evidence for its freshness.
//!
//! Invariant: nothing here decides. PostgreSQL did; this remembers, and refuses rather than answer from what is older
//! than the bound. Freshness is tested against the instant at which the request arrived.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};

use crate::{
    cache::{Cache, Entry},
    feed::Progress,
    loader::{Join, Load, LoadError, Loader},
    model::{BootTime, Position, Reason, Subject, SubjectPermissions},
    store::{POOL_SIZE, Store, StoreError, load::Explanation},
};

/// How fresh an answer must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// From the cache while its staleness is within the service's bound, else from the database.
    MinimizeLatency,
    /// From a database snapshot that began after the request arrived.
    FullyConsistent,
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

    /// The decision for one permission.
    #[must_use]
    pub fn decide(&self, permission: &str) -> Reason {
        self.entry.permissions.decide(permission)
    }
}

/// Answers checks.
pub struct Checker {
    pub cache: Arc<Cache>,
    pub progress: Arc<Progress>,
    pub loader: Loader,
    pub store: Arc<Store>,
    pub staleness_bound: Duration,
    reads: Arc<Semaphore>,
}

/// Explained checks, lists and counts at once: people ask for them, and half of the pool is left to misses.
const READS_MAX: usize = POOL_SIZE / 2;

/// How long one of these waits for its turn.
const READ_WAIT_MAX: Duration = Duration::from_secs(1);

impl Checker {
    #[must_use]
    pub fn new(
        cache: Arc<Cache>,
        progress: Arc<Progress>,
        loader: Loader,
        store: Arc<Store>,
        staleness_bound: Duration,
    ) -> Self {
        Self {
            cache,
            progress,
            loader,
            store,
            staleness_bound,
            reads: Arc::new(Semaphore::new(READS_MAX)),
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
    ) -> Result<Known, LoadError> {
        if let Some(known) = self.remember(&subject, freshness, arrived) {
            return Ok(known);
        }
        let load = self
            .loader
            .load(vec![subject], self.join(freshness, arrived))
            .await?;
        from_load(&load, &subject, arrived).ok_or(LoadError::Unavailable)
    }

    /// As [`Checker::know`] for many subjects, in their order, with at most one round trip. What is cached is
    /// answered whatever becomes of the rest.
    pub async fn know_all(
        &self,
        subjects: &[Subject],
        freshness: Freshness,
        arrived: BootTime,
    ) -> Vec<Result<Known, LoadError>> {
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
            Err(LoadError::Unavailable)
        } else {
            self.loader
                .load(missing.into_iter().collect(), self.join(freshness, arrived))
                .await
        };
        remembered
            .into_iter()
            .zip(subjects)
            .map(|(known, subject)| match (known, &load) {
                (Some(known), _) => Ok(known),
                (None, Ok(load)) => from_load(load, subject, arrived).ok_or(LoadError::Unavailable),
                (None, Err(error)) => Err(error.clone()),
            })
            .collect()
    }

    /// One decision and the facts behind it, read from the database together.
    ///
    /// # Errors
    /// When the database cannot be asked.
    pub async fn explain(
        &self,
        subject: Subject,
        permission: &str,
        arrived: BootTime,
    ) -> Result<(Explanation, Evidence), LoadError> {
        let (store, permission) = (Arc::clone(&self.store), permission.to_owned());
        self.read(arrived, async move {
            let explanation = store.explain(subject, &permission).await?;
            Ok((explanation.head, explanation))
        })
        .await
    }

    /// What the cache does not hold, read from the database; the query says the head of its snapshot.
    ///
    /// # Errors
    /// When the database cannot be asked, or too many reads are under way.
    pub async fn read<T: Send + 'static>(
        &self,
        arrived: BootTime,
        query: impl Future<Output = Result<(Position, T), StoreError>> + Send + 'static,
    ) -> Result<(T, Evidence), LoadError> {
        let turn = timeout(READ_WAIT_MAX, Arc::clone(&self.reads).acquire_owned());
        let Ok(Ok(turn)) = turn.await else {
            return Err(LoadError::Overloaded);
        };
        let sent_at = BootTime::now();
        // A task of its own: a caller who goes away must not leave a connection with half a question. The turn ends
        // with the question, not with the caller.
        let asked = tokio::spawn(async move {
            let answer = query.await;
            drop(turn);
            answer
        });
        let (head, answer) = match asked.await {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => {
                tracing::warn!(%error, "a question has no answer");
                return Err(LoadError::Unavailable);
            }
            Err(_panic) => return Err(LoadError::Unavailable),
        };
        self.progress.observe(head);
        Ok((answer, from_database(head, sent_at, arrived)))
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
        // The lease, then the entry: what the lease says was applied has been applied to the entry too.
        let lease = self.progress.lease()?;
        let staleness = arrived.since(lease.sent_at);
        if staleness > self.staleness_bound {
            return None;
        }
        let entry = self.cache.get(subject)?;
        let evidence = Evidence {
            position: entry.head.max(lease.applied),
            source: Source::Cache,
            staleness,
        };
        Some(Known { entry, evidence })
    }

    fn join(&self, freshness: Freshness, arrived: BootTime) -> Join {
        match freshness {
            Freshness::MinimizeLatency => Join::SentSince(arrived.before(self.staleness_bound)),
            Freshness::FullyConsistent => Join::None,
        }
    }
}

fn from_load(load: &Load, subject: &Subject, arrived: BootTime) -> Option<Known> {
    Some(Known {
        entry: Arc::clone(load.entries.get(subject)?),
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
