//! PostgreSQL: connections, and the SQL as a const above its caller, one file a noun.
//!
//! Invariant: nobody but this module (and the private server's own start-up) speaks to tokio_postgres, so an error
//! that leaves it says what the caller does next and carries no SQL to a caller of the service.

mod adoption;
pub mod demo;
pub mod lists;
pub mod load;
pub mod log;
pub mod migrations;
mod uninstall;
pub mod upkeep;

use std::{str::FromStr, time::Duration};

use arc_swap::ArcSwap;
use deadpool_postgres::{
    Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime,
};
use thiserror::Error;
use tokio::time::timeout;
use tokio_postgres::{
    Client, Config, Connection, NoTls, Row, Socket,
    config::{SslMode, TargetSessionAttrs},
    error::SqlState,
    tls::NoTlsStream,
    types::ToSql,
};
use tokio_util::task::AbortOnDropHandle;

/// How long a connection attempt may take. Longer than a handshake across regions, shorter than a caller waits.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// After this long without an acknowledgement the kernel gives a connection up.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that waits for a long statement is probed after this long, so that a peer that is gone is noticed.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// What went wrong with the database, by what to do next.
#[derive(Debug, Error)]
pub enum StoreError {
    /// It cannot be reached, or did not answer in time: try again later.
    #[error("database unavailable: {0}")]
    Unavailable(String),
    /// It will not have us (credentials, no such database): trying again does not help.
    #[error("database refuses the connection: {0}")]
    Refused(String),
    /// It is a standby, whose answers have no bound: look for the primary.
    #[error("database is a standby, not the primary")]
    Standby,
    /// It runs the statement and the statement fails, or answers what it must not: a defect, or tampering.
    #[error("database answers wrongly: {0}")]
    Wrong(String),
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        let message = describe(&error);
        match error.code() {
            Some(code)
                if [
                    SqlState::INVALID_PASSWORD,
                    SqlState::INVALID_AUTHORIZATION_SPECIFICATION,
                    SqlState::INVALID_CATALOG_NAME,
                ]
                .contains(code) =>
            {
                Self::Refused(message)
            }
            // Class 08 connection, 53 resources, 57 operator intervention (timeouts, shutdown), 55P03 lock timeout.
            Some(code)
                if ["08", "53", "57"].contains(&&code.code()[..2])
                    || *code == SqlState::LOCK_NOT_AVAILABLE =>
            {
                Self::Unavailable(message)
            }
            Some(_) => Self::Wrong(message),
            None if REFUSALS.iter().any(|kind| message.starts_with(kind)) => Self::Refused(message),
            None if ABSENCES.iter().any(|kind| message.starts_with(kind)) => {
                Self::Unavailable(message)
            }
            None => Self::Wrong(message),
        }
    }
}

/// How tokio-postgres begins the errors that come of what the URL says or leaves out (a password that the server asks
/// for, a mechanism that it does not know); it shows their kind in no other way.
const REFUSALS: [&str; 2] = ["invalid configuration", "authentication error"];

/// How it begins those of a database that is away. What is left are statements and answers that do not fit.
const ABSENCES: [&str; 5] = [
    "error communicating with the server",
    "error connecting to server",
    "error performing TLS handshake",
    "connection closed",
    "timeout waiting for server",
];

/// The error's own message and its causes, on one line.
fn describe(error: &tokio_postgres::Error) -> String {
    let mut message = match error.as_db_error() {
        Some(db) => db.message().to_owned(),
        None => error.to_string(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source.filter(|_| error.as_db_error().is_none()) {
        let cause_text = cause.to_string();
        if !message.contains(&cause_text) {
            message = format!("{message}: {cause_text}");
        }
        source = cause.source();
    }
    message.replace('\n', " ")
}

/// Where the database is and how to get in: a libpq URL, checked.
#[derive(Clone, Debug)]
pub struct DatabaseUrl(Config);

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let mut config = Config::from_str(url).map_err(|error| describe(&error))?;
        if config.get_hosts().is_empty() {
            return Err("no host: name one, or `?host=/directory` for a Unix socket".to_owned());
        }
        if config.get_user().is_none() {
            return Err("no user".to_owned());
        }
        if config.get_ssl_mode() == SslMode::Require {
            return Err(
                "sslmode=require: connections to the database are not encrypted yet".to_owned(),
            );
        }
        if config.get_application_name().is_none() {
            config.application_name("hallpass");
        }
        config
            .target_session_attrs(TargetSessionAttrs::ReadWrite)
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_user_timeout(TCP_USER_TIMEOUT)
            .keepalives_idle(KEEPALIVE_IDLE);
        Ok(Self(config))
    }
}

impl DatabaseUrl {
    /// The same database with a limit on how long any statement may run, `None` for none; and READ COMMITTED, in
    /// which a statement's snapshot is younger than the locks taken before it.
    fn with_statement_timeout(&self, timeout: Option<Duration>) -> Config {
        let mut config = self.0.clone();
        let millis = timeout.map_or(0, |timeout| timeout.as_millis());
        let options = format!(
            "{} -c statement_timeout={millis} -c default_transaction_isolation=read\\ committed",
            self.0.get_options().unwrap_or_default()
        );
        config.options(options.trim_start());
        config
    }
}

/// A connection of its own, outside the pool, driven until it is dropped.
pub struct DedicatedConnection {
    pub(crate) client: Client,
    _driver: AbortOnDropHandle<()>,
}

impl DedicatedConnection {
    /// # Errors
    /// When the database cannot be reached or will not have us.
    pub async fn open(
        url: &DatabaseUrl,
        statement_timeout: Option<Duration>,
    ) -> Result<Self, StoreError> {
        let (client, connection) = connect(&url.with_statement_timeout(statement_timeout)).await?;
        let driver = tokio::spawn(async move {
            // The client's next call reports the same error to whoever uses the connection.
            if let Err(error) = connection.await {
                tracing::debug!(error = %describe(&error), "database connection ended");
            }
        });
        Ok(Self {
            client,
            _driver: AbortOnDropHandle::new(driver),
        })
    }
}

async fn connect(config: &Config) -> Result<(Client, Connection<Socket, NoTlsStream>), StoreError> {
    match timeout(CONNECT_TIMEOUT, config.connect(NoTls)).await {
        Ok(connected) => Ok(connected?),
        Err(_) => Err(StoreError::Unavailable(format!(
            "no connection within {CONNECT_TIMEOUT:?}"
        ))),
    }
}

/// Connections that answer misses. More would not help: a load is CPU of the database, and misses share statements.
pub const POOL_SIZE: usize = 8;

/// How long a miss waits for a connection of the pool.
const POOL_WAIT_MAX: Duration = Duration::from_secs(2);

/// How long the database may work on one load.
const LOAD_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for an answer: a database that is stopped or cut off does not keep its own limit.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(6);

/// A database that takes longer to say which it is does not answer checks either.
const PING_WAIT_MAX: Duration = Duration::from_secs(1);

/// The database as the data path sees it: a pool of connections with a limit on every statement.
pub struct Store {
    pool: Pool,
    /// The catalog that was decoded last, shared by all entries while it does not change.
    catalog: ArcSwap<crate::model::Catalog>,
}

impl Store {
    /// Opens no connection yet.
    ///
    /// # Errors
    /// Never with the settings that this function makes; a defect otherwise.
    pub fn new(url: &DatabaseUrl) -> Result<Self, StoreError> {
        let manager = Manager::from_config(
            url.with_statement_timeout(Some(LOAD_TIMEOUT)),
            NoTls,
            ManagerConfig {
                recycling_method: RecyclingMethod::Fast,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(POOL_SIZE)
            .wait_timeout(Some(POOL_WAIT_MAX))
            .create_timeout(Some(CONNECT_TIMEOUT))
            .recycle_timeout(Some(CONNECT_TIMEOUT))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| StoreError::Wrong(error.to_string()))?;
        Ok(Self {
            pool,
            catalog: ArcSwap::default(),
        })
    }

    /// Opens every connection of the pool, so that the first misses need not.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub async fn fill_pool(&self) -> Result<(), StoreError> {
        let mut held = Vec::with_capacity(POOL_SIZE);
        for _ in 0..POOL_SIZE {
            held.push(self.pool.get().await?);
        }
        Ok(())
    }

    /// Asks the database whether it is the primary.
    ///
    /// # Errors
    /// When it is not, or does not answer.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let rows = self
            .query_within(PING_WAIT_MAX, "SELECT pg_is_in_recovery()", &[])
            .await?;
        rows.first()
            .map_or(Ok(()), |row| load::refuse_standby(row, 0))
    }

    /// Runs one prepared statement on a connection of the pool.
    ///
    /// A connection that does not answer in time is closed, not put back: whoever took it next would wait behind the
    /// same question. So this must not be dropped half-way: its callers are tasks of their own.
    async fn query(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        self.query_within(ANSWER_WAIT_MAX, sql, parameters).await
    }

    async fn query_within(
        &self,
        wait_max: Duration,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let connection = self.pool.get().await?;
        let answer = timeout(wait_max, async {
            let statement = connection.prepare_cached(sql).await?;
            connection.query(&statement, parameters).await
        })
        .await;
        let Ok(rows) = answer else {
            drop(Object::take(connection));
            return Err(StoreError::Unavailable(format!(
                "no answer within {wait_max:?}"
            )));
        };
        Ok(rows?)
    }
}

impl From<PoolError> for StoreError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) => error.into(),
            PoolError::Timeout(_) => {
                Self::Unavailable(format!("no connection within {POOL_WAIT_MAX:?}"))
            }
            other => Self::Unavailable(other.to_string()),
        }
    }
}
