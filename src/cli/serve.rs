//! `hallpass serve`: the service.

use std::{
    io,
    num::NonZeroU16,
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::Path,
    pin::pin,
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, Error, anyhow, ensure};
use tokio::net::{TcpListener, UnixListener};

use super::{database::Database, interrupted};
use crate::{
    auth::Authenticator,
    config::{
        DRAIN_MAX, DatabaseSettings, INSPECTION_INTERVAL, ListenAddress, MAINTENANCE_INTERVAL,
        Secret, ServeSettings,
    },
    selfcheck::SAMPLE_EVERY,
    server::{self, Config, Listener},
    store::DatabaseUrl,
};

/// Serve permission checks until interrupted
#[derive(Debug, clap::Args)]
pub(super) struct Serve {
    #[command(flatten)]
    database: DatabaseSettings,

    /// The same database without a pooler between, for LISTEN; as --database-url where that is direct
    #[arg(
        long,
        env = "HALLPASS_FEED_DATABASE_URL",
        hide_env_values = true,
        requires = "database_url"
    )]
    feed_database_url: Option<Secret>,

    /// The same database, by a login that may change permissions, for the admin API; without it nothing is changed here
    #[arg(
        long,
        env = "HALLPASS_ADMIN_DATABASE_URL",
        hide_env_values = true,
        requires = "database_url"
    )]
    admin_database_url: Option<Secret>,

    #[command(flatten)]
    settings: ServeSettings,
}

impl Serve {
    pub(super) async fn run(self) -> anyhow::Result<ExitCode> {
        let mut interrupted = pin!(interrupted()?);
        self.settings.check().map_err(Error::msg)?;
        let logins = OtherLogins {
            feed: parse_url("--feed-database-url", self.feed_database_url)?,
            admin: parse_url("--admin-database-url", self.admin_database_url)?,
        };
        // A port that is taken is the commonest mistake: found before a database is started.
        let listener = bind(&self.settings.grpc_listen).await?;
        let database = tokio::select! {
            database = Database::open_migrated(&self.database) => database?,
            () = &mut interrupted => return Ok(ExitCode::SUCCESS),
        };
        serve(
            database,
            logins,
            &self.settings,
            listener,
            || (),
            interrupted,
        )
        .await
    }
}

/// The database by other ways than `--database-url`, where there are any.
#[derive(Default)]
pub(super) struct OtherLogins {
    feed: Option<DatabaseUrl>,
    admin: Option<DatabaseUrl>,
}

fn parse_url(flag: &str, url: Option<Secret>) -> anyhow::Result<Option<DatabaseUrl>> {
    let url = url.map(|url| url.0.parse()).transpose();
    url.map_err(|error: String| anyhow!("{flag}: {error}"))
}

/// Serves until interrupted, calls `on_ready` when the first answer can be given, then stops the private database if
/// there is one.
pub(super) async fn serve(
    database: Database,
    logins: OtherLogins,
    settings: &ServeSettings,
    listener: Listener,
    on_ready: impl FnOnce(),
    interrupted: impl Future<Output = ()>,
) -> anyhow::Result<ExitCode> {
    // The private database is ours to change.
    let private = database.private.as_ref().map(|_| database.url.clone());
    let config = Config {
        database: database.url.clone(),
        feed_database: logins.feed.unwrap_or_else(|| database.url.clone()),
        admin_database: logins.admin.or(private),
        staleness_bound: settings.staleness_bound,
        staleness_ceiling: settings.staleness_ceiling,
        authenticator: Arc::new(Authenticator::open()),
        cache_capacity: settings.cache_capacity,
        warm_up_max: settings.warm_up_max,
        matrix_refresh_interval: settings.matrix_refresh_interval,
        inspection_interval: INSPECTION_INTERVAL,
        audit_retention_days: NonZeroU16::new(settings.audit_retention_days),
        maintenance_interval: MAINTENANCE_INTERVAL,
        self_check_every: SAMPLE_EVERY,
        lame_duck: settings.lame_duck,
        drain_max: DRAIN_MAX,
    };
    let served = tokio::select! {
        served = server::run(config, listener, on_ready, interrupted) => served.map_err(Into::into),
        lost = database.lost() => Err(lost),
    };
    if let ListenAddress::Unix(path) = &settings.grpc_listen {
        // Whoever comes next removes a socket that is left.
        drop(std::fs::remove_file(path));
    }
    database.close().await?;
    served.map(|()| ExitCode::SUCCESS)
}

pub(super) async fn bind(address: &ListenAddress) -> anyhow::Result<Listener> {
    ensure!(
        address.is_local(),
        "--grpc-listen can be reached from other machines, and callers are not authenticated yet: \
         use a loopback address or unix:PATH"
    );
    match address {
        ListenAddress::Tcp(address) => {
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address}"))?;
            tracing::info!(address = %listener.local_addr()?, "listening for gRPC");
            Ok(Listener::Tcp(listener))
        }
        ListenAddress::Unix(path) => {
            remove_dead_socket(path)?;
            let listener = UnixListener::bind(path)
                .with_context(|| format!("cannot listen on unix:{}", path.display()))?;
            tracing::info!(path = %path.display(), "listening for gRPC");
            Ok(Listener::Unix(listener))
        }
    }
}

/// A service that was killed leaves its socket behind; one that lives answers on it.
fn remove_dead_socket(path: &Path) -> io::Result<()> {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    Ok(())
}
