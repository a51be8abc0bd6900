//! The private PostgreSQL: a cluster of our own under the data directory, run from the machine's server programs
//! and reachable through a Unix socket alone.
//!
//! Invariant: one postgres a cluster, and none outlives the service that started it, not even a `kill -9`. One
//! thread of its own does everything: the kernel's parent-death signal fires when the *thread* that started a
//! child ends. Must not touch a cluster that another hallpass runs: it attaches to it.

mod account;
mod cluster;
mod programs;
mod shim;

use std::{
    future::{Future, pending},
    io,
    path::{Path, PathBuf},
    process::Child,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid},
};
use tokio::sync::watch;
use tokio_postgres::NoTls;
use tracing::{info, warn};

pub use shim::{SHIM_COMMAND, run_shim};

use account::Account;
use cluster::{Cluster, Launcher};

/// The database, and the superuser that owns it.
const NAME: &str = "hallpass";

/// Names the socket `.s.PGSQL.5432`; nothing listens on TCP.
const PORT: &str = "5432";

/// The matrix refresh, the feed and a pool or two of a busy service, with room for psql.
const CONNECTIONS_MAX: &str = "200";

/// Crash recovery after a power cut replays up to max_wal_size (1 GB): tens of seconds on a slow disk.
const START_WAIT: Duration = Duration::from_secs(120);

/// What a fast shutdown (roll back, checkpoint) may take before the immediate one.
const FAST_STOP_WAIT: Duration = Duration::from_secs(10);

/// The postmaster itself kills what has not ended five seconds after an immediate shutdown began.
const IMMEDIATE_STOP_WAIT: Duration = Duration::from_secs(7);

/// How often the bounded waits here look again: short beside the 100 ms that postgres needs to start.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// One attempt to connect through a local socket; a postgres that is stuck must not use up [`START_WAIT`].
const CONNECT_WAIT: Duration = Duration::from_secs(5);

/// What to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// Made when missing; holds the cluster `postgres`, `postgres.log` and `postgres.lock`.
    pub data_dir: PathBuf,
    /// The hallpass program, which is run again as the shim in front of postgres.
    pub shim: PathBuf,
    /// More settings for postgres, as (name, value); they win over ours.
    pub settings: Vec<(String, String)>,
}

/// Why there is no private PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error(
        "no PostgreSQL 14 to 18 found on this machine: run `apt-get install postgresql` (Debian, Ubuntu) or `brew install postgresql@17` (macOS), or name a database of your own"
    )]
    NotInstalled,
    #[error(
        "the cluster `{}` needs PostgreSQL {major}, which was not found: install it, or move the cluster away", cluster.display()
    )]
    OtherVersion { cluster: PathBuf, major: u32 },
    #[error("cannot use `{}`: {problem}", path.display())]
    Unusable { path: PathBuf, problem: String },
    #[error("{program} failed: {problem} (more in `{}`)", log.display())]
    Failed {
        program: &'static str,
        problem: String,
        log: PathBuf,
    },
    #[error("gave up after {} s waiting for {event}", waited.as_secs())]
    Timeout {
        event: &'static str,
        waited: Duration,
    },
}

impl EmbeddedError {
    fn unusable(path: &Path, problem: impl ToString) -> Self {
        Self::Unusable {
            path: path.to_owned(),
            problem: problem.to_string(),
        }
    }
}

/// A running private PostgreSQL. Dropping it stops the postgres it started, as [`PrivatePostgres::stop`] does.
#[derive(Debug)]
pub struct PrivatePostgres {
    socket_dir: String,
    /// `None` when another hallpass runs the cluster.
    server: Option<Server>,
}

/// The postgres that we started. It is reaped, and `gone` set, under the channel's own lock: whoever reads
/// `false` may send a signal before letting go of the value, and meets no other process.
#[derive(Debug)]
struct Server {
    pid: Pid,
    gone: watch::Receiver<bool>,
}

impl PrivatePostgres {
    /// Starts the cluster of `options.data_dir`, made if missing, or attaches to it where another hallpass runs it.
    /// Returns when it answers queries. Blocks: for async callers, `spawn_blocking`.
    ///
    /// # Errors
    /// Says in one line what to do about it; a postgres that failed is quoted from its log.
    pub fn start(options: &Options) -> Result<Self, EmbeddedError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let owned = options.clone();
        let failed = |problem: String| EmbeddedError::unusable(&options.data_dir, problem);
        thread::Builder::new()
            .name("postgres".to_owned())
            .spawn(move || start_and_reap(&owned, &sender))
            .map_err(|error| failed(error.to_string()))?;
        receiver
            .recv()
            .map_err(|_| failed("the starting thread ended".to_owned()))?
    }

    /// The URL of the database `hallpass`, for psql and tokio-postgres alike.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_for(NAME)
    }

    /// The URL of another database of this cluster.
    #[must_use]
    pub fn url_for(&self, database: &str) -> String {
        // The port is named because libpq would take another one from PGPORT.
        format!(
            "postgresql:///{}?host={}&port={PORT}&user={NAME}",
            percent_encode(database, b""),
            percent_encode(&self.socket_dir, b"/"),
        )
    }

    /// Whether this process started the postgres, and so stops it.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.server.is_some()
    }

    /// Resolves when the postgres we started is gone, stopped or by itself (its log says why); never for one that
    /// another hallpass runs.
    pub fn exited(&self) -> impl Future<Output = ()> + Send + use<> {
        let gone = self.server.as_ref().map(|server| server.gone.clone());
        async move {
            match gone {
                // An error means the reaping thread has ended: it does so after the postgres.
                Some(mut gone) => drop(gone.wait_for(|gone| *gone).await),
                None => pending().await,
            }
        }
    }

    /// Stops the postgres that we started: rolls back what is open, waits for the checkpoint, and hurries it if
    /// that takes longer than ten seconds. Blocks. Leaves alone what another hallpass runs.
    ///
    /// # Errors
    /// [`EmbeddedError::Timeout`] when postgres has not even ended at once when told to.
    pub fn stop(mut self) -> Result<(), EmbeddedError> {
        self.server.take().map_or(Ok(()), |server| server.stop())
    }
}

impl Drop for PrivatePostgres {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.server.take().map(|server| server.stop()) {
            warn!("private PostgreSQL not stopped: {error}");
        }
    }
}

impl Server {
    fn stop(&self) -> Result<(), EmbeddedError> {
        // SIGINT is PostgreSQL's fast shutdown, SIGQUIT the immediate one, repaired at the next start.
        let stopped =
            self.end(Signal::INT, FAST_STOP_WAIT) || self.end(Signal::QUIT, IMMEDIATE_STOP_WAIT);
        stopped.then_some(()).ok_or(EmbeddedError::Timeout {
            event: "postgres to stop",
            waited: FAST_STOP_WAIT + IMMEDIATE_STOP_WAIT,
        })
    }

    /// Sends `signal` and says whether the postgres was gone in time.
    fn end(&self, signal: Signal, wait: Duration) -> bool {
        let gone = self.gone.borrow();
        if !*gone && let Err(error) = kill_process(self.pid, signal) {
            warn!("cannot signal postgres: {error}");
        }
        drop(gone);
        wait_until(wait, || Ok(self.gone.borrow().then_some(()))).is_ok_and(|gone| gone.is_some())
    }
}

/// The life of the thread that `start` makes: it reports once, then waits for the postgres as long as it lives.
fn start_and_reap(
    options: &Options,
    report: &mpsc::SyncSender<Result<PrivatePostgres, EmbeddedError>>,
) {
    let (outcome, child) = match launch(options) {
        Ok((socket_dir, child)) => (Ok(socket_dir), child),
        Err(error) => (Err(error), None),
    };
    let (gone, gone_receiver) = watch::channel(false);
    let outcome = outcome.map(|socket_dir| PrivatePostgres {
        socket_dir,
        server: child.as_ref().map(|child| Server {
            pid: Pid::from_child(child),
            gone: gone_receiver,
        }),
    });
    // The receiver cannot be gone: `start` blocks on it.
    drop(report.send(outcome));
    if let Some(child) = child {
        reap(child, &gone);
    }
}

fn reap(mut child: Child, gone: &watch::Sender<bool>) {
    let pid = Pid::from_child(&child);
    let exited = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    while matches!(waitid(WaitId::Pid(pid), exited), Err(Errno::INTR)) {}
    gone.send_modify(|gone| {
        match child.wait() {
            Ok(status) => info!("private PostgreSQL ended: {status}"),
            Err(error) => warn!("cannot tell how postgres ended: {error}"),
        }
        *gone = true;
    });
}

/// Brings the cluster up; returns its socket directory, and the postgres unless another hallpass runs it.
fn launch(options: &Options) -> Result<(String, Option<Child>), EmbeddedError> {
    let data_dir = cluster::prepare_data_dir(&options.data_dir)?;
    let _starting = cluster::lock(&data_dir)?;
    let account = Account::for_cluster(&data_dir.join(cluster::LINK))?;
    let cluster = Cluster::locate(&data_dir, account)?;
    let client = Client::new(&data_dir)?;

    if let Some(socket_dir) = attach(&cluster, &client)? {
        info!(
            socket_dir,
            "attached to a private PostgreSQL that runs already"
        );
        return Ok((socket_dir, None));
    }
    let programs = programs::choose(&programs::installed(), &cluster)?;
    let launcher = Launcher::new(options, &data_dir, account, programs)?;
    cluster.initialize(&launcher)?;
    let socket_dir = cluster.socket_dir(account)?;
    cluster.remove_stale_locks(&socket_dir)?;
    let mut child = launcher.spawn(
        "postgres",
        cluster.path(),
        &cluster.arguments(&socket_dir, options),
    )?;
    match await_ready(&mut child, &socket_dir, &client, &launcher) {
        Ok(()) => {
            info!(socket_dir, "private PostgreSQL started");
            Ok((socket_dir, Some(child)))
        }
        Err(error) => {
            launcher.give_up(child);
            Err(error)
        }
    }
}

/// The socket directory of the postgres that runs in `cluster` already. One that is starting is waited for, one
/// that is shutting down too: `None` is said when it is gone.
fn attach(cluster: &Cluster, client: &Client) -> Result<Option<String>, EmbeddedError> {
    let found = wait_until(START_WAIT, || {
        if !cluster.is_running() {
            return Ok(Some(None));
        }
        let socket_dir = cluster.running_socket_dir();
        Ok(socket_dir
            .filter(|socket_dir| client.connect(socket_dir).is_ok())
            .map(Some))
    })?;
    found.ok_or(EmbeddedError::Timeout {
        event: "another postgres in the same cluster to answer or to end",
        waited: START_WAIT,
    })
}

/// Waits until `child` answers queries, and makes the database.
fn await_ready(
    child: &mut Child,
    socket_dir: &str,
    client: &Client,
    launcher: &Launcher,
) -> Result<(), EmbeddedError> {
    let connected = wait_until(START_WAIT, || {
        if let Some(status) = child.try_wait().map_err(|error| launcher.failed(&error))? {
            return Err(launcher.failed(&status));
        }
        Ok(client.connect(socket_dir).ok())
    })?;
    let connected = connected.ok_or(EmbeddedError::Timeout {
        event: "postgres to answer",
        waited: START_WAIT,
    })?;
    client
        .create_database(&connected)
        .map_err(|error| launcher.failed(&error))
}

/// Blocking SQL for the few statements of a start.
struct Client(tokio::runtime::Runtime);

impl Client {
    fn new(data_dir: &Path) -> Result<Self, EmbeddedError> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map(Self)
            .map_err(|error| EmbeddedError::unusable(data_dir, error))
    }

    /// Errors while the server starts and while it shuts down.
    fn connect(&self, socket_dir: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(socket_dir)
            .user(NAME)
            .dbname("postgres")
            .connect_timeout(CONNECT_WAIT);
        self.0.block_on(async {
            let (client, connection) = config.connect(NoTls).await?;
            // Ends with the client or the runtime, whichever is first; its errors reach the client's queries.
            drop(tokio::spawn(connection));
            Ok(client)
        })
    }

    fn create_database(
        &self,
        client: &tokio_postgres::Client,
    ) -> Result<(), tokio_postgres::Error> {
        const EXISTS: &str = "SELECT FROM pg_database WHERE datname = 'hallpass'";
        const CREATE: &str = "CREATE DATABASE hallpass";
        self.0.block_on(async {
            if client.query_opt(EXISTS, &[]).await?.is_none() {
                client.batch_execute(CREATE).await?;
            }
            Ok(())
        })
    }
}

/// Asks `probe` until it has a value or an error; `None` when it had neither in time.
#[expect(clippy::disallowed_methods, reason = "on a thread of its own")]
fn wait_until<T>(
    wait: Duration,
    mut probe: impl FnMut() -> Result<Option<T>, EmbeddedError>,
) -> Result<Option<T>, EmbeddedError> {
    let deadline = Instant::now() + wait;
    loop {
        let value = probe()?;
        if value.is_some() || Instant::now() >= deadline {
            return Ok(value);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// RFC 3986: everything but the unreserved characters and those in `also_kept`.
fn percent_encode(text: &str, also_kept: &[u8]) -> String {
    text.bytes()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also_kept.contains(&byte)
            {
                char::from(byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_understood_by_tokio_postgres() {
        let postgres = PrivatePostgres {
            socket_dir: "/tmp/a b%&é/postgres".to_owned(),
            server: None,
        };
        assert_eq!(
            postgres.url_for("x/y"),
            "postgresql:///x%2Fy?host=/tmp/a%20b%25%26%C3%A9/postgres&port=5432&user=hallpass"
        );
        let config: tokio_postgres::Config = postgres.url_for("x/y").parse().unwrap();
        assert_eq!(config.get_dbname(), Some("x/y"));
        assert_eq!(
            config.get_hosts(),
            [tokio_postgres::config::Host::Unix(
                "/tmp/a b%&é/postgres".into()
            )]
        );
    }
}
