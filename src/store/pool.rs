//! Pools of connections: one for misses and one for everything that people ask for, so that neither can starve the other.
//!
//! Invariant: a connection in a pool has no question under way. One that does not answer in time is closed, and the
//! database is told to give the question up, which it would otherwise go on working at.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use deadpool_postgres::{
    Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime, TimeoutType,
};
use tokio::time::{sleep, timeout};
use tokio_postgres::{Row, types::ToSql};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    CONNECT_TIMEOUT, DatabaseUrl, StoreError,
    timings::{Question, Timings},
};
use crate::trail::{self, Kind};

/// How long a question waits for a connection: longer than most statements take, shorter than a caller's patience.
const ACQUIRE_WAIT_MAX: Duration = Duration::from_secs(1);

/// Questions that wait for a connection, of each pool. What would wait behind more would wait in vain.
const WAITING_MAX: usize = 1_000;

/// How long to wait for an answer: a database that is stopped or cut off does not keep its own limit.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(6);

/// How long the database may take to hear that a question is given up; one that is cut off never hears.
const CANCEL_WAIT_MAX: Duration = Duration::from_millis(500);

/// A pool.
pub struct Connections {
    pool: Pool,
    size: usize,
    /// What takes a question back goes the way that the question went.
    tls: MakeRustlsConnect,
    timings: Arc<Timings>,
}

/// How much of a pool is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolUse {
    pub in_use: usize,
    pub idle: usize,
    pub max: usize,
    /// Questions that wait for a connection, or for one to be opened.
    pub waiting: usize,
}

/// A connection of a pool, for one question.
pub struct Connection {
    connection: Object,
    tls: MakeRustlsConnect,
    timings: Arc<Timings>,
}

impl Connections {
    pub(super) fn new(
        url: &DatabaseUrl,
        size: usize,
        timings: &Arc<Timings>,
    ) -> Result<Self, StoreError> {
        let manager = Manager::from_config(
            url.config.clone(),
            url.tls.clone(),
            ManagerConfig {
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(size)
            .wait_timeout(Some(ACQUIRE_WAIT_MAX))
            .create_timeout(Some(CONNECT_TIMEOUT))
            .recycle_timeout(Some(CONNECT_TIMEOUT))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| StoreError::Wrong(error.to_string()))?;
        Ok(Self {
            pool,
            size,
            tls: url.tls.clone(),
            timings: Arc::clone(timings),
        })
    }

    pub(super) async fn fill(&self) -> Result<(), StoreError> {
        let mut held = Vec::with_capacity(self.size);
        for _ in 0..self.size {
            held.push(self.acquire().await?);
        }
        Ok(())
    }

    /// A connection, as soon as one is free.
    ///
    /// # Errors
    /// When none is in time, or none can be opened.
    pub async fn acquire(&self) -> Result<Connection, StoreError> {
        if self.pool.status().waiting >= WAITING_MAX {
            return Err(StoreError::Busy);
        }
        let _waits = trail::begin(Kind::Connection);
        Ok(Connection {
            connection: self.pool.get().await?,
            tls: self.tls.clone(),
            timings: Arc::clone(&self.timings),
        })
    }

    /// As of now; whoever a connection is being opened for waits.
    #[must_use]
    pub fn usage(&self) -> PoolUse {
        let status = self.pool.status();
        PoolUse {
            in_use: status.size.saturating_sub(status.available),
            idle: status.available,
            max: status.max_size,
            waiting: status.waiting,
        }
    }
}

impl Connection {
    /// Runs one prepared statement.
    ///
    /// Must not be dropped half-way, or the connection goes back with half a question: its callers are tasks of their
    /// own.
    pub(super) async fn query(
        self,
        question: Question,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        self.query_within(ANSWER_WAIT_MAX, question, sql, parameters)
            .await
    }

    pub(super) async fn query_within(
        self,
        wait_max: Duration,
        question: Question,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let timings = Arc::clone(&self.timings);
        let answer = self.work_until(question, sleep(wait_max), async |connection| {
            let statement = connection.prepare_cached(sql).await?;
            connection.query(&statement, parameters).await
        });
        match answer.await {
            Some(rows) => Ok(rows.inspect_err(|_| timings.failed(question))?),
            None => Err(StoreError::Unavailable(format!(
                "no answer within {wait_max:?}"
            ))),
        }
    }

    /// Does work of several statements, which leaves no transaction open; `None` where `given_up` was first.
    ///
    /// Must not be dropped half-way, as [`Connection::query`].
    pub(super) async fn work_until<T>(
        self,
        question: Question,
        given_up: impl Future<Output = ()>,
        work: impl AsyncFnOnce(&mut Object) -> T,
    ) -> Option<T> {
        let Self {
            mut connection,
            tls,
            timings,
        } = self;
        let since = Instant::now();
        let step = trail::begin(Kind::Statement(question.name()));
        let done = tokio::select! {
            biased;
            done = work(&mut connection) => Some(done),
            () = given_up => None,
        };
        drop(step);
        timings.ended(question, since);
        if done.is_some() {
            return done;
        }
        timings.failed(question);
        // Out of the pool first: another one may be opened in its place.
        let connection = Object::take(connection);
        let cancelled = connection.cancel_token();
        match timeout(CANCEL_WAIT_MAX, cancelled.cancel_query(tls)).await {
            Ok(Ok(())) => {}
            // It is cut off, and will notice when it writes its answer.
            Ok(Err(_)) | Err(_) => tracing::debug!("a question could not be cancelled"),
        }
        None
    }
}

impl From<PoolError> for StoreError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) => error.into(),
            PoolError::Timeout(TimeoutType::Wait) => Self::Busy,
            PoolError::Timeout(_) => {
                Self::Unavailable(format!("no connection within {CONNECT_TIMEOUT:?}"))
            }
            other => Self::Unavailable(other.to_string()),
        }
    }
}
