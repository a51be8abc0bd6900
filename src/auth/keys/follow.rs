//! Follows the keys in the database, and records there which of them are used.
//!
//! Invariant: memory is dated from before the statement was sent that found it current, and nobody is told that the
//! database is away before a second connection and the pool have been tried.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    join,
    time::{sleep, timeout},
};

use super::{ApiKeys, Outcome};
use crate::{
    model::BootTime,
    store::{DatabaseUrl, DedicatedConnection, Store, StoreError},
};

/// How often the database is asked whether the keys are still the same, where the staleness bound is not so short that
/// memory would be too old in between.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
const POLL_INTERVAL_MIN: Duration = Duration::from_millis(10);

/// Polls within the staleness bound: one may be lost, and another connection be opened.
const POLLS_A_BOUND: u32 = 4;

/// A poll that takes longer has met a dead connection: within the default bound, so that another one can be asked.
const POLL_WAIT_MAX: Duration = Duration::from_millis(750);

/// How long the database may take to hand out all keys.
const READ_WAIT_MAX: Duration = Duration::from_secs(5);

/// How long a new connection may take: within a region it takes milliseconds.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(1);

/// Waits after the database was not reached: doubled from the first to the last, or to half of a shorter staleness bound.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(1);

/// How long recording the use of keys may take: no poll is sent meanwhile.
const RECORD_WAIT_MAX: Duration = Duration::from_millis(500);

impl ApiKeys {
    /// Follows the keys until it is dropped, through every loss of the connection.
    pub async fn follow(self, url: DatabaseUrl, store: Arc<Store>) {
        let bound = self.0.timing.staleness_bound;
        let retry_last = (bound / 2).clamp(RETRY_FIRST, RETRY_LAST);
        let mut follower = Follower {
            interval: (bound / POLLS_A_BOUND).clamp(POLL_INTERVAL_MIN, POLL_INTERVAL),
            keys: self,
            url,
            store,
            connection: None,
            recorded_at: BootTime::now(),
        };
        let mut retry = RETRY_FIRST;
        let mut said = String::new();
        loop {
            let (outcome, error) = follower.look().await;
            let rest = if let Some(error) = error {
                let error = error.to_string();
                if error != said {
                    tracing::warn!(%error, is_away = outcome == Outcome::Away, "lost the API keys");
                    said = error;
                }
                retry = (retry * 2).min(retry_last);
                retry
            } else {
                if !said.is_empty() {
                    tracing::info!("following the API keys again");
                    said.clear();
                }
                retry = RETRY_FIRST;
                follower.interval
            };
            follower.keys.0.outcome.send_replace(outcome);
            follower.record_use_if_due().await;
            sleep(rest).await;
        }
    }
}

struct Follower {
    keys: ApiKeys,
    url: DatabaseUrl,
    store: Arc<Store>,
    interval: Duration,
    connection: Option<DedicatedConnection>,
    /// Uses up to here are in the database.
    recorded_at: BootTime,
}

impl Follower {
    /// Looks at the keys, on another connection if the one there is does not answer.
    async fn look(&mut self) -> (Outcome, Option<StoreError>) {
        if let Some(connection) = self.connection.take()
            && self.renew(&connection).await.is_ok()
        {
            self.connection = Some(connection);
            return (Outcome::Renewed, None);
        }
        // The pool's question is a task of its own: a connection must not go back with half of it.
        let store = Arc::clone(&self.store);
        let ping = tokio::spawn(async move { store.ping().await });
        let (renewed, pinged) = join!(self.reconnect(), ping);
        match renewed {
            Ok(connection) => {
                self.connection = Some(connection);
                (Outcome::Renewed, None)
            }
            Err(error)
                if is_away(&error) && matches!(&pinged, Ok(Err(error)) if is_away(error)) =>
            {
                (Outcome::Away, Some(error))
            }
            Err(error) => (Outcome::Unreadable, Some(error)),
        }
    }

    async fn reconnect(&self) -> Result<DedicatedConnection, StoreError> {
        let open = DedicatedConnection::open(&self.url, Some(READ_WAIT_MAX));
        let connection = within(CONNECT_WAIT_MAX, open).await?;
        self.renew(&connection).await?;
        Ok(connection)
    }

    /// Makes memory what the database has.
    async fn renew(&self, connection: &DedicatedConnection) -> Result<(), StoreError> {
        let sent_at = BootTime::now();
        let state = within(POLL_WAIT_MAX, connection.api_keys_state()).await?;
        let known = self.keys.0.known.load_full();
        if let Some(known) = known.as_deref()
            && known.state.edition == state.edition
        {
            let keys = Arc::clone(&known.keys);
            self.keys.remember(keys, state, sent_at);
            return Ok(());
        }
        let sent_at = BootTime::now();
        let (state, stored) = within(READ_WAIT_MAX, connection.api_keys()).await?;
        tracing::info!(keys = stored.len(), "read the API keys");
        self.keys.take(stored, state, sent_at);
        Ok(())
    }

    /// What cannot be recorded is tried again with what comes to it: nobody waits for it.
    async fn record_use_if_due(&mut self) {
        let now = BootTime::now();
        let known = self.keys.0.known.load_full();
        let (Some(known), Some(connection)) = (known.as_deref(), &self.connection) else {
            return;
        };
        if now.since(self.recorded_at) < self.keys.0.timing.record_interval {
            return;
        }
        let since = self.recorded_at.as_secs();
        let used: Vec<(&str, f64)> = (known.keys.iter())
            .map(|(id, key)| (id.as_str(), key.used_at.load(Ordering::Relaxed)))
            .filter(|(_, used_at)| *used_at >= since && *used_at > 0)
            .map(|(id, used_at)| {
                let ago = Duration::from_secs(now.as_secs().saturating_sub(used_at));
                (id, ago.as_secs_f64())
            })
            .collect();
        if !used.is_empty() {
            let recorded = within(RECORD_WAIT_MAX, connection.record_api_key_use(&used)).await;
            if let Err(error) = recorded {
                tracing::warn!(%error, "the use of API keys was not recorded");
                self.connection = None;
                return;
            }
        }
        self.recorded_at = now;
    }
}

/// Whether this is what one hears of a database that is not there, rather than from one that is.
fn is_away(error: &StoreError) -> bool {
    matches!(error, StoreError::Unavailable(_) | StoreError::Standby)
}

async fn within<T>(
    wait_max: Duration,
    answer: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    timeout(wait_max, answer).await.unwrap_or_else(|_| {
        Err(StoreError::Unavailable(format!(
            "no answer about API keys within {wait_max:?}"
        )))
    })
}
