//! What runs in the background: the inspection of the log's triggers, the refresh of the matrix, the
//! maintenance of the audit log, the warm start.
//!
//! Invariant: nothing here is waited for by a request, and a failure is tried again, not passed on.

use std::{num::NonZeroU16, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use crate::{
    feed::Progress,
    loader::{Join, LoadError, Loader},
    model::{BootTime, OrganizationId, Subject, UserId},
    store::{
        DatabaseUrl, DedicatedConnection, Store, StoreError,
        samples::Sample,
        upkeep::{Inspection, Retention},
    },
};

/// How long the database may work on an inspection: it has waited its five seconds for a lock long before.
const INSPECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// How long to wait for an inspection: a database that is stopped or cut off does not keep its own limit.
const INSPECTION_WAIT_MAX: Duration = Duration::from_secs(65);

/// How long the database may work on a sample: some milliseconds, as a rule.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for a sample: as for an inspection.
const SAMPLE_WAIT_MAX: Duration = Duration::from_secs(6);

/// Inspections that may fail in a row before the log is not believed any more.
const INSPECTIONS_MISSED_MAX: u32 = 3;

/// The wait before background work that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// A refresh waits at least this many times its own duration before the next: at most a fifth of the time is refresh.
const REFRESH_REST: u32 = 4;

/// How long the database may work on one step of the audit log's maintenance: counting the rows of a month takes longest.
const MAINTENANCE_TIMEOUT: Duration = Duration::from_secs(300);

/// The wait before maintenance that failed is tried again. It asks for locks that writers wait behind, so not often.
const MAINTENANCE_RETRY: Duration = Duration::from_secs(60);

/// The wait between two steps of retention, for those who wait for the database.
const RETENTION_REST: Duration = Duration::from_millis(50);

/// Subjects a statement of the warm start.
const WARM_UP_PAGE: i32 = 500;

/// Statements of the warm start under way at once; the rest of the pool is left to misses.
const WARM_UP_FLIGHTS_MAX: usize = 4;

/// Samples the database at this interval, on a connection of its own: a scrape asks nobody.
pub async fn sample(
    url: DatabaseUrl,
    interval: Duration,
    samples: watch::Sender<Option<(Sample, BootTime)>>,
) {
    let mut said = String::new();
    loop {
        let Err(error) = sample_on_connection(&url, interval, &samples, &mut said).await;
        say_once(&error, &mut said, "the database was not sampled");
        sleep(RETRY).await;
    }
}

/// Logs a failure, unless it was logged last.
fn say_once(error: &StoreError, said: &mut String, message: &str) {
    let error = error.to_string();
    if error != *said {
        tracing::warn!(%error, "{message}");
        *said = error;
    }
}

async fn sample_on_connection(
    url: &DatabaseUrl,
    interval: Duration,
    samples: &watch::Sender<Option<(Sample, BootTime)>>,
    said: &mut String,
) -> Result<std::convert::Infallible, StoreError> {
    let connection = DedicatedConnection::open(url, Some(SAMPLE_TIMEOUT)).await?;
    loop {
        let at = BootTime::now();
        let sample = timeout(SAMPLE_WAIT_MAX, connection.sample()).await;
        let sample =
            sample.map_err(|_| StoreError::Unavailable("no sample in time".to_owned()))??;
        said.clear();
        samples.send_replace(Some((sample, at)));
        sleep(interval).await;
    }
}

/// Inspects the log at this interval and lets leases be believed while nothing is wrong; `inspected` is told once the
/// first inspection is done.
pub async fn inspect(
    url: DatabaseUrl,
    interval: Duration,
    progress: Arc<Progress>,
    inspected: watch::Sender<bool>,
) {
    let mut inspector = Inspector {
        interval,
        progress,
        inspected,
        known_problems: Vec::new(),
        said: String::new(),
    };
    loop {
        let Err(error) = inspector.inspect_on_connection(&url).await;
        inspector.failed(&error);
        sleep(RETRY).await;
    }
}

struct Inspector {
    interval: Duration,
    progress: Arc<Progress>,
    inspected: watch::Sender<bool>,
    known_problems: Vec<String>,
    /// The failure that was logged last.
    said: String,
}

impl Inspector {
    async fn inspect_on_connection(
        &mut self,
        url: &DatabaseUrl,
    ) -> Result<std::convert::Infallible, StoreError> {
        let connection = DedicatedConnection::open(url, Some(INSPECTION_TIMEOUT)).await?;
        loop {
            let inspection = timeout(INSPECTION_WAIT_MAX, connection.inspect())
                .await
                .map_err(|_| StoreError::Unavailable("no inspection in time".to_owned()))??;
            self.said.clear();
            self.take(inspection, BootTime::now());
            self.inspected.send_replace(true);
            connection.clear_pending().await?;
            sleep(self.interval).await;
        }
    }

    fn take(&mut self, inspection: Inspection, at: BootTime) {
        if inspection.problems.is_empty() {
            if !self.known_problems.is_empty() {
                tracing::info!("the log is complete again");
            }
            let due = at.after(INSPECTIONS_MISSED_MAX * self.interval.max(RETRY));
            self.progress.believe_from(inspection.head_seq, due);
        } else {
            self.progress.disbelieve_log();
            if inspection.problems != self.known_problems {
                for problem in &inspection.problems {
                    tracing::error!(%problem, "changes may go unrecorded: not serving from the cache");
                }
            }
        }
        self.known_problems = inspection.problems;
    }

    /// A database that is away changes nothing unseen; an inspection that fails may miss it. One that is overdue is
    /// noticed when a lease is renewed without it.
    fn failed(&mut self, error: &StoreError) {
        if !matches!(error, StoreError::Unavailable(_)) {
            self.progress.disbelieve_log();
        }
        say_once(error, &mut self.said, "the log was not inspected");
    }
}

/// Refreshes the matrix whenever it is behind the log, no more often than `interval`.
pub async fn refresh(url: DatabaseUrl, interval: Duration) {
    loop {
        let started = Instant::now();
        let refreshed = async {
            DedicatedConnection::open(&url, None)
                .await?
                .refresh_matrix()
                .await
        }
        .await;
        let elapsed = started.elapsed();
        let rest = match refreshed {
            Ok(true) => {
                tracing::info!(?elapsed, "refreshed the matrix");
                interval.max(elapsed * REFRESH_REST)
            }
            Ok(false) => interval,
            Err(error) => {
                tracing::warn!(%error, "the matrix was not refreshed");
                interval.max(RETRY)
            }
        };
        sleep(rest).await;
    }
}

/// Makes the audit log's partitions ahead and, where `retention_days` is set, removes what is older, at this interval.
pub async fn maintain_audit_log(
    url: DatabaseUrl,
    retention_days: Option<NonZeroU16>,
    interval: Duration,
) {
    loop {
        let rest = match maintain_on_connection(&url, retention_days).await {
            Ok(()) => interval,
            Err(error) => {
                tracing::warn!(%error, "the audit log was not maintained");
                interval.min(MAINTENANCE_RETRY)
            }
        };
        sleep(rest).await;
    }
}

async fn maintain_on_connection(
    url: &DatabaseUrl,
    retention_days: Option<NonZeroU16>,
) -> Result<(), StoreError> {
    let mut connection = DedicatedConnection::open(url, Some(MAINTENANCE_TIMEOUT)).await?;
    connection.make_audit_partitions().await?;
    let Some(days) = retention_days else {
        return Ok(());
    };
    let mut removed = 0;
    loop {
        match connection.remove_expired(days.get().into()).await? {
            Retention::Held => {
                tracing::info!("a legal hold is in force: nothing is removed from the audit log");
                break;
            }
            Retention::Elsewhere => break,
            Retention::Removed(rows) => removed += rows,
            Retention::Done(rows) => {
                removed += rows;
                break;
            }
        }
        sleep(RETENTION_REST).await;
    }
    if removed > 0 {
        tracing::info!(rows = removed, %days, "removed old rows of the audit log");
    }
    Ok(())
}

/// Loads members into the cache, up to `subjects_max` of them; returns how many.
///
/// # Errors
/// When the database cannot be asked.
pub async fn warm_up(store: &Store, loader: &Loader, subjects_max: u64) -> Result<u64, LoadError> {
    let nil = Subject {
        organization: OrganizationId(Uuid::nil()),
        user: UserId(Uuid::nil()),
    };
    let mut after = nil;
    let mut warmed = 0;
    let mut flights = JoinSet::new();
    loop {
        let page = store
            .next_members(after, WARM_UP_PAGE)
            .await
            .map_err(|error| {
                tracing::warn!(%error, "the cache was not warmed");
                LoadError::Unavailable
            })?;
        let (Some(last), true) = (page.last(), warmed < subjects_max) else {
            break;
        };
        after = *last;
        warmed += page.len() as u64;
        if flights.len() >= WARM_UP_FLIGHTS_MAX {
            landed(flights.join_next().await)?;
        }
        let loader = loader.clone();
        flights.spawn(async move {
            loader
                .load(page, Join::SentSince(BootTime::now()))
                .await
                .map(drop)
        });
    }
    while let Some(flight) = flights.join_next().await {
        landed(Some(flight))?;
    }
    Ok(warmed)
}

fn landed(
    flight: Option<Result<Result<(), LoadError>, tokio::task::JoinError>>,
) -> Result<(), LoadError> {
    match flight {
        Some(Ok(loaded)) => loaded,
        None => Ok(()),
        Some(Err(_panic)) => Err(LoadError::Unavailable),
    }
}
