//! PostgreSQL: connections, and the SQL as a const above its caller, one file a noun.
//!
//! Invariant: nobody but this module (and the private server's own start-up) speaks to tokio_postgres, so an error
//! that leaves it says what the caller does next and carries no SQL to a caller of the service.

pub mod admin;
mod adoption;
pub mod api_keys;
pub mod audit;
pub mod demo;
pub mod doctor;
pub mod lists;
pub mod load;
pub mod log;
pub mod migrations;
pub mod pool;
pub mod samples;
pub mod timings;
mod tls;
mod uninstall;
pub mod upkeep;

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, Mutex},
    time::Duration,
};

use arc_swap::ArcSwap;
use thiserror::Error;
use tokio::time::timeout;
use tokio_postgres::{
    Client, Config, Connection, Socket, config::TargetSessionAttrs, error::SqlState,
    tls::MakeTlsConnect,
};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::task::AbortOnDropHandle;

use self::{
    load::Memberships,
    pool::Connections,
    timings::{Question, Timings},
};

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
    /// Every connection to it is taken: try again in a moment.
    #[error("every connection to the database is taken")]
    Busy,
    /// It will not have us (credentials, no such database), or we not it (its certificate): trying again does not help.
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
            None if tls::is_refusal(&error) => Self::Refused(format!("{message}; {TLS_ADVICE}")),
            None if REFUSALS.iter().any(|kind| message.starts_with(kind)) => Self::Refused(message),
            None if ABSENCES.iter().any(|kind| message.starts_with(kind)) => {
                Self::Unavailable(message)
            }
            None => Self::Wrong(message),
        }
    }
}

/// What to look at when the server is not who it must be.
const TLS_ADVICE: &str = "what is asked of it is in the URL, sslmode and sslrootcert";

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

/// Where the database is, how to get in and what it must prove: a libpq URL, checked.
#[derive(Clone)]
pub struct DatabaseUrl {
    config: Config,
    tls: MakeRustlsConnect,
}

impl fmt::Debug for DatabaseUrl {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.config.fmt(f)
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    /// Reads the certificates that the URL names, too.
    fn from_str(url: &str) -> Result<Self, String> {
        let (url, tls) = tls::Options::take_from(url);
        let mut config = Config::from_str(&url).map_err(|error| describe(&error))?;
        if config.get_hosts().is_empty() {
            return Err("no host: name one, or `?host=/directory` for a Unix socket".to_owned());
        }
        if config.get_user().is_none() {
            return Err("no user".to_owned());
        }
        if config.get_application_name().is_none() {
            config.application_name("hallpass");
        }
        let mode = tls.mode(&config)?;
        config
            .ssl_mode(tls::ssl_mode(mode))
            .target_session_attrs(TargetSessionAttrs::ReadWrite)
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_user_timeout(TCP_USER_TIMEOUT)
            .keepalives_idle(KEEPALIVE_IDLE);
        let tls = tls.connector(mode)?;
        Ok(Self { config, tls })
    }
}

impl DatabaseUrl {
    /// The same database with a limit on how long any statement may run, `None` for none; and READ COMMITTED, in
    /// which a statement's snapshot is younger than the locks taken before it. What has a limit is short, and compiling
    /// it would take longer than running it.
    fn with_statement_timeout(mut self, timeout: Option<Duration>) -> Self {
        let millis = timeout.map_or(0, |timeout| timeout.as_millis());
        let jit = if timeout.is_some() { "-c jit=off" } else { "" };
        let options = format!(
            "{} -c statement_timeout={millis} -c default_transaction_isolation=read\\ committed {jit}",
            self.config.get_options().unwrap_or_default()
        );
        self.config.options(options.trim_start());
        self
    }

    async fn connect(self) -> Result<(Client, Driver), StoreError> {
        match timeout(CONNECT_TIMEOUT, self.config.connect(self.tls)).await {
            Ok(connected) => Ok(connected?),
            Err(_) => Err(StoreError::Unavailable(format!(
                "no connection within {CONNECT_TIMEOUT:?}"
            ))),
        }
    }
}

/// What moves a client's questions and answers while it is polled.
type Driver = Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>;

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
        let (client, connection) = (url.clone())
            .with_statement_timeout(statement_timeout)
            .connect()
            .await?;
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

/// Connections that answer misses. More would not help: a load is CPU of the database, and misses share statements.
pub const MISS_CONNECTIONS_MAX: usize = 8;

/// Connections beside these for short questions, so that no load waits behind them: two about positions, one
/// about health, and one about whether the database is away when API keys cannot be read.
const ASIDE_CONNECTIONS_MAX: usize = 4;

/// Connections that answer what people ask for: explained checks, lists and counts. Few, and none of them a miss's.
pub const READ_CONNECTIONS_MAX: usize = 4;

/// Connections that read the past of the audit log: streams that catch up take turns with them, page by page.
pub const AUDIT_CONNECTIONS_MAX: usize = 2;

/// Connections that change permissions. Changes go through the commit lock one by one anyway.
const CHANGE_CONNECTIONS_MAX: usize = 2;

/// Connections of their own that one service keeps: the feed's, the API keys', and inspection, refresh, maintenance and
/// samples.
const DEDICATED_CONNECTIONS: usize = 6;

/// Connections that one service opens at most, those of the admin API and of API keys included.
const CONNECTIONS_MAX: usize = MISS_CONNECTIONS_MAX
    + ASIDE_CONNECTIONS_MAX
    + READ_CONNECTIONS_MAX
    + AUDIT_CONNECTIONS_MAX
    + 1
    + CHANGE_CONNECTIONS_MAX
    + DEDICATED_CONNECTIONS;

/// How long the database may work on one load.
const LOAD_TIMEOUT: Duration = Duration::from_secs(5);

/// A database that takes longer to say which it is does not answer checks either.
const PING_WAIT_MAX: Duration = Duration::from_secs(1);

/// The database as the data path sees it: pools of connections with a limit on every statement.
pub struct Store {
    pub misses: Connections,
    pub reads: Connections,
    pub audits: Connections,
    /// One, for what is new in the audit log: the past must not keep it waiting.
    pub audit_tail: Connections,
    /// The catalog that was decoded last, shared by all entries while it does not change.
    catalog: ArcSwap<crate::model::Catalog>,
    /// As of the catalog: one for all entries that are alike.
    memberships: Mutex<Memberships>,
    pub timings: Arc<Timings>,
}

impl Store {
    /// Opens no connection yet.
    ///
    /// # Errors
    /// Never with the settings that this function makes; a defect otherwise.
    pub fn new(url: &DatabaseUrl) -> Result<Self, StoreError> {
        let url = url.clone().with_statement_timeout(Some(LOAD_TIMEOUT));
        let timings = Arc::default();
        let pool = |size| Connections::new(&url, size, &timings);
        Ok(Self {
            misses: pool(MISS_CONNECTIONS_MAX + ASIDE_CONNECTIONS_MAX)?,
            reads: pool(READ_CONNECTIONS_MAX)?,
            audits: pool(AUDIT_CONNECTIONS_MAX)?,
            audit_tail: pool(1)?,
            catalog: ArcSwap::default(),
            memberships: Mutex::default(),
            timings,
        })
    }

    /// Connections that may change permissions, of a login of their own. Opens none yet.
    ///
    /// # Errors
    /// As [`Store::new`].
    pub fn changes(&self, url: &DatabaseUrl) -> Result<Connections, StoreError> {
        let url = url.clone().with_statement_timeout(Some(LOAD_TIMEOUT));
        Connections::new(&url, CHANGE_CONNECTIONS_MAX, &self.timings)
    }

    /// Opens every connection of the pools, so that the first questions need not.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub async fn fill_pools(&self) -> Result<(), StoreError> {
        self.misses.fill().await?;
        self.reads.fill().await
    }

    /// Asks the database whether it is the primary.
    ///
    /// # Errors
    /// When it is not, or does not answer.
    pub async fn ping(&self) -> Result<(), StoreError> {
        let connection = self.misses.acquire().await?;
        let rows = connection
            .query_within(
                PING_WAIT_MAX,
                Question::Ping,
                "SELECT pg_is_in_recovery()",
                &[],
            )
            .await?;
        rows.first()
            .map_or(Ok(()), |row| load::refuse_standby(row, 0))
    }
}
