//! What must have happened before the first answer, and what health says from then on.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{Config, ServeError, report};
use crate::{
    auth::keys::ApiKeys,
    check::Checker,
    http::{Dependency, Health},
    model::BootTime,
    store::{
        DatabaseUrl, DedicatedConnection, Store, StoreError,
        migrations::{self, SchemaState},
    },
    upkeep,
};

/// Waits between looks at a database that is away or behind at start.
const START_RETRY: Duration = Duration::from_millis(500);

/// A database that does not say within this time which schema it has is away.
const SCHEMA_WAIT_MAX: Duration = Duration::from_secs(10);

/// How often the start looks for the first lease.
const LEASE_POLL: Duration = Duration::from_millis(5);

/// How often health is decided anew.
const HEALTH_INTERVAL: Duration = Duration::from_millis(100);

/// What must have happened before the first answer. Each sender lives in a task that ends only with the service.
pub(super) struct Readiness {
    pub(super) inspected: watch::Receiver<bool>,
    /// What is accepted as a credential, to be read once.
    pub(super) keys: Option<ApiKeys>,
    pub(super) warmed: watch::Receiver<bool>,
}

/// Returns when the schema is current and the pools are filled.
pub(super) async fn prepare(config: &Config, store: &Store) -> Result<(), ServeError> {
    wait_for_schema(&config.database).await?;
    let mut said = String::new();
    loop {
        match store.fill_pools().await {
            Ok(()) => return Ok(()),
            Err(StoreError::Refused(error)) => return Err(StoreError::Refused(error).into()),
            Err(error) => say_once(&mut said, format!("the pools are not filled yet: {error}")),
        }
        sleep(START_RETRY).await;
    }
}

/// Returns when the log is inspected and followed, callers can be told, and the cache is warm or its time is up.
pub(super) async fn wait_until_ready(config: &Config, checker: &Checker, mut ready: Readiness) {
    let started = Instant::now();
    // An error is a task that has panicked, which ends the service.
    drop(ready.inspected.wait_for(|inspected| *inspected).await);
    wait_for_lease(checker).await;
    if let Some(keys) = ready.keys {
        keys.read().await;
    }
    let warm = ready.warmed.wait_for(|warmed| *warmed);
    if timeout(config.warm_up_max, warm).await.is_err() {
        tracing::warn!(
            "the cache is not warm after {:?}: ready all the same",
            config.warm_up_max
        );
    }
    tracing::info!(elapsed = ?started.elapsed(), "ready");
}

/// Until there is a lease, the cache takes no entry or none is believed.
async fn wait_for_lease(checker: &Checker) {
    while checker.progress.lease().is_none() {
        sleep(LEASE_POLL).await;
    }
}

pub(super) async fn warm_up(checker: Arc<Checker>, capacity: u64, has_warmed: watch::Sender<bool>) {
    wait_for_lease(&checker).await;
    let started = Instant::now();
    if let Ok(users) = upkeep::warm_up(&checker.store, &checker.loader, capacity).await {
        tracing::info!(users, elapsed = ?started.elapsed(), "warmed the cache");
    }
    has_warmed.send_replace(true);
}

/// Returns when the schema is this program's; says once what it waits for.
async fn wait_for_schema(url: &DatabaseUrl) -> Result<(), ServeError> {
    let mut said = String::new();
    loop {
        let state = timeout(SCHEMA_WAIT_MAX, async {
            let connection = DedicatedConnection::open(url, None).await?;
            migrations::schema_state(&connection).await
        });
        let state = state.await.unwrap_or_else(|_| {
            Err(StoreError::Unavailable(format!(
                "no answer within {SCHEMA_WAIT_MAX:?}"
            )))
        });
        let waits_for = match state {
            Ok(SchemaState::Current) => return Ok(()),
            Ok(SchemaState::Ahead(version)) => return Err(ServeError::SchemaAhead(version)),
            Ok(SchemaState::Changed(names)) => return Err(ServeError::SchemaChanged(names)),
            Ok(SchemaState::Behind(missing)) => {
                format!(
                    "waiting for `hallpass migrate`: {} migrations to apply",
                    missing.len()
                )
            }
            Err(StoreError::Unavailable(error)) => format!("waiting for the database: {error}"),
            Err(StoreError::Standby) => "waiting for the primary: this is a standby".to_owned(),
            Err(fatal) => return Err(fatal.into()),
        };
        say_once(&mut said, waits_for);
        sleep(START_RETRY).await;
    }
}

/// Logs a change of what is said, not each time.
fn say_once(said: &mut String, now: String) {
    if now != *said {
        tracing::warn!("{now}");
        *said = now;
    }
}

/// Decides health until the service stops.
pub(super) async fn watch_health(
    checker: &Checker,
    health: &HealthReporter,
    known: &watch::Sender<Health>,
    on_ready: impl FnOnce(),
) -> Result<std::convert::Infallible, ServeError> {
    let mut serving = false;
    let mut on_ready = Some(on_ready);
    loop {
        let found = look(checker).await;
        known.send_replace(found);
        let now = found.serving;
        if now != serving {
            serving = now;
            let status = if now {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            };
            tracing::info!(%status, "health");
            report(health, status).await;
            if let (true, Some(on_ready)) = (now, on_ready.take()) {
                on_ready();
            }
        }
        sleep(HEALTH_INTERVAL).await;
    }
}

/// Answers come from the cache, or else from the database; never while changes may go unrecorded.
async fn look(checker: &Checker) -> Health {
    let log = checker.progress.log_is_believed();
    let staleness = checker
        .progress
        .lease()
        .map(|lease| BootTime::now().since(lease.sent_at));
    let cache = staleness.is_some_and(|staleness| staleness <= checker.staleness_bound);
    // Who has told of the log just now is there.
    let database = match (cache, log) {
        (true, _) => Dependency::Up,
        (false, true) => checker.store.ping().await.is_ok().into(),
        (false, false) => Dependency::Unknown,
    };
    Health {
        serving: log && database == Dependency::Up,
        database,
        log: log.into(),
        cache: cache.into(),
    }
}
