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

use anyhow::{Context, Error, anyhow};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
};

use super::{
    answer,
    authenticator::authenticator,
    database::Database,
    interrupted, reload,
    settings::{self, Parsed},
    supervisor,
};
use crate::{
    audit,
    auth::Authenticator,
    config::{
        ConnectionSettings, DRAIN_MAX, DatabaseSettings, INSPECTION_INTERVAL, ListenAddress,
        MAINTENANCE_INTERVAL, MaybeListen, SAMPLE_INTERVAL, Secret, ServeSettings,
        TLS_RELOAD_INTERVAL, TlsSettings,
    },
    http,
    limits::Bounds,
    selfcheck::SAMPLE_EVERY,
    server::{
        self, Config, Connections, Listener, Listeners, Tls, TlsFiles,
        connections::OPS_CONNECTIONS_MAX,
        tls::{HTTP1, HTTP2, TlsError},
    },
    store::DatabaseUrl,
};

/// File descriptors for all but callers' connections: some dozens to the database, listeners, and as many again; and
/// the operators' connections.
const DESCRIPTORS_BESIDES: usize = 200 + OPS_CONNECTIONS_MAX;

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

    /// Print each setting, its value and where it comes from, and start nothing
    #[arg(long)]
    print_config: bool,

    #[command(flatten)]
    settings: ServeSettings,
}

impl Serve {
    pub(super) fn limits(&self) -> Bounds {
        Bounds::from(&self.settings.limits)
    }

    /// Whether the service could start with these settings, as far as they say it themselves.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        self.settings.check().map_err(Error::msg)?;
        parse_url("--database-url", self.database.database_url.as_ref())?;
        parse_url("--feed-database-url", self.feed_database_url.as_ref())?;
        parse_url("--admin-database-url", self.admin_database_url.as_ref())?;
        Ok(())
    }

    pub(super) async fn run(self, parsed: Parsed) -> anyhow::Result<ExitCode> {
        if self.print_config {
            answer(&settings::print(&parsed))?;
            self.check()?;
            return Ok(ExitCode::SUCCESS);
        }
        reload::survive_hangups()?;
        let mut interrupted = pin!(interrupted()?);
        self.check()?;
        let logins = OtherLogins {
            feed: parse_url("--feed-database-url", self.feed_database_url.as_ref())?,
            admin: parse_url("--admin-database-url", self.admin_database_url.as_ref())?,
        };
        let entrance = Entrance::open(&self.settings).await?;
        let database = tokio::select! {
            database = Database::open_migrated(&self.database) => database?,
            () = &mut interrupted => return Ok(ExitCode::SUCCESS),
        };
        serve(
            database,
            logins,
            (&self.settings, parsed),
            entrance,
            || (),
            interrupted,
        )
        .await
    }
}

/// Where callers come in, and what they are known by: opened before anything is started, for it holds the commonest mistakes.
pub(super) struct Entrance {
    authenticator: Authenticator,
    pub(super) tls: Option<Tls>,
    http_tls: Option<Tls>,
    pub(super) listeners: Listeners,
}

impl Entrance {
    pub(super) async fn open(settings: &ServeSettings) -> anyhow::Result<Self> {
        Ok(Self {
            authenticator: authenticator(settings)?,
            tls: load_tls(&settings.tls, &[HTTP2])?,
            http_tls: load_tls(&settings.tls, &[HTTP2, HTTP1])?,
            listeners: Listeners {
                grpc: bind("gRPC", &settings.grpc_listen).await?,
                http: bind_some("HTTP", &settings.http_listen).await?,
                ops: bind_some("ops", &settings.ops_listen).await?,
            },
        })
    }
}

/// The database by other ways than `--database-url`, where there are any.
#[derive(Default)]
pub(super) struct OtherLogins {
    feed: Option<DatabaseUrl>,
    admin: Option<DatabaseUrl>,
}

fn parse_url(flag: &str, url: Option<&Secret>) -> anyhow::Result<Option<DatabaseUrl>> {
    let url = url.map(|url| url.0.parse()).transpose();
    url.map_err(|error: String| anyhow!("{flag}: {error}"))
}

/// Serves until interrupted, calls `on_ready` when the first answer can be given, then stops the private database if
/// there is one.
pub(super) async fn serve(
    database: Database,
    logins: OtherLogins,
    (settings, parsed): (&ServeSettings, Parsed),
    entrance: Entrance,
    on_ready: impl FnOnce(),
    interrupted: impl Future<Output = ()>,
) -> anyhow::Result<ExitCode> {
    for (setting, address) in settings.listens() {
        say_who_can_listen(setting, address, entrance.tls.as_ref());
    }
    if let Some(warning) = parsed.open_secret() {
        tracing::warn!("{warning}");
    }
    let bounds = Bounds::from(&settings.limits);
    let (rates, changed_rates) = watch::channel(bounds.clone());
    let mut reloads = pin!(reload::at_each_hangup(parsed, rates)?);
    // The private database is ours to change.
    let private = database.private.as_ref().map(|_| database.url.clone());
    let config = Config {
        database: database.url.clone(),
        feed_database: logins.feed.unwrap_or_else(|| database.url.clone()),
        admin_database: logins.admin.or(private),
        staleness_bound: settings.staleness_bound,
        staleness_ceiling: settings.staleness_ceiling,
        authenticator: Arc::new(entrance.authenticator),
        tls: entrance.tls.map(Arc::new),
        http_tls: entrance.http_tls.map(Arc::new),
        connections: connections(&settings.connections)?,
        cache_capacity: settings.cache_capacity,
        warm_up_max: settings.warm_up_max,
        matrix_refresh_interval: settings.matrix_refresh_interval,
        inspection_interval: INSPECTION_INTERVAL,
        audit_retention_days: NonZeroU16::new(settings.audit_retention_days),
        maintenance_interval: MAINTENANCE_INTERVAL,
        sample_interval: SAMPLE_INTERVAL,
        self_check_every: SAMPLE_EVERY,
        lame_duck: settings.lame_duck,
        drain_max: DRAIN_MAX,
        audit: audit::Limits {
            age_max: bounds.stream_age_max,
            ..audit::Limits::default()
        },
        bounds,
        changed_rates: Some(changed_rates),
        http: http::Settings {
            environment: settings.http.environment.clone(),
            cors_origins: settings.http.cors_origins.clone(),
        },
        metrics_export: settings.traces.metrics_export(),
        traces: settings.traces.clone().into(),
    };
    let on_ready = || {
        supervisor::say_ready();
        on_ready();
    };
    let interrupted = async {
        interrupted.await;
        supervisor::say_stopping();
    };
    let served = tokio::select! {
        served = server::run(config, entrance.listeners, on_ready, interrupted) => served.map_err(Into::into),
        lost = database.lost() => Err(lost),
        never = &mut reloads => match never {},
        never = supervisor::say_alive() => match never {},
    };
    for (_, address) in settings.listens() {
        if let ListenAddress::Unix(path) = address {
            // Whoever comes next removes a socket that is left.
            drop(std::fs::remove_file(path));
        }
    }
    database.close().await?;
    served.map(|()| ExitCode::SUCCESS)
}

async fn bind_some(
    protocol: &'static str,
    address: &MaybeListen,
) -> anyhow::Result<Option<Listener>> {
    match &address.0 {
        Some(address) => bind(protocol, address).await.map(Some),
        None => Ok(None),
    }
}

async fn bind(protocol: &'static str, address: &ListenAddress) -> anyhow::Result<Listener> {
    match address {
        ListenAddress::Tcp(address) => {
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address}"))?;
            tracing::info!(protocol, address = %listener.local_addr()?, "listening");
            Ok(Listener::Tcp(listener))
        }
        ListenAddress::Unix(path) => {
            remove_dead_socket(path)?;
            let listener = UnixListener::bind(path)
                .with_context(|| format!("cannot listen on unix:{}", path.display()))?;
            tracing::info!(protocol, path = %path.display(), "listening");
            Ok(Listener::Unix(listener))
        }
    }
}

/// Reads certificates and key, before anything is started.
fn load_tls(settings: &TlsSettings, protocols: &[&[u8]]) -> Result<Option<Tls>, TlsError> {
    let (Some(certificate), Some(key)) = (&settings.tls_certificate, &settings.tls_key) else {
        return Ok(None);
    };
    let files = TlsFiles {
        certificate: certificate.clone(),
        key: key.clone(),
        client_ca: settings.tls_client_ca.clone(),
    };
    Tls::load(files, protocols, TLS_RELOAD_INTERVAL).map(Some)
}

fn say_who_can_listen(setting: &str, address: &ListenAddress, tls: Option<&Tls>) {
    match (address, tls) {
        (ListenAddress::Tcp(_), Some(tls)) => {
            let client_certificates = tls.asks_for_certificates();
            tracing::info!(setting, client_certificates, "TLS is on");
        }
        (address, None) if !address.is_local() => {
            tracing::warn!(
                setting,
                "TLS is off and other machines can reach the service: set --tls-certificate and --tls-key unless \
                 something in front of it speaks TLS"
            );
        }
        _ => tracing::info!(setting, "TLS is off"),
    }
}

/// The bounds on connections; fewer connections where the system gives this process too few file descriptors, so that
/// the database's are never short of them.
pub(super) fn connections(settings: &ConnectionSettings) -> anyhow::Result<Connections> {
    let asked = settings.connections_max.get();
    let descriptors = asked.saturating_add(DESCRIPTORS_BESIDES) as u64;
    let given = raise_descriptor_limit(descriptors)?;
    let connections_max = match usize::try_from(given.min(descriptors)) {
        Ok(given) => given.saturating_sub(DESCRIPTORS_BESIDES).max(1),
        Err(_) => asked,
    };
    if connections_max < asked {
        tracing::warn!(
            connections_max,
            "file descriptors are limited to {given}: fewer connections than --connections-max={asked}"
        );
    }
    let address_connections_max = match settings.address_connections_max {
        0 => connections_max,
        max => max,
    };
    let has_age = !settings.connection_age_max.is_zero();
    let age_max = has_age.then_some(settings.connection_age_max);
    Ok(Connections::new(
        connections_max,
        address_connections_max,
        age_max,
    ))
}

/// Raises this process's limit, where it is lower, as far as the system lets it; returns what it is then. A shell's
/// 1,024 are a convention.
fn raise_descriptor_limit(descriptors: u64) -> io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    let (current, maximum) = (
        limit.current.unwrap_or(u64::MAX),
        limit.maximum.unwrap_or(u64::MAX),
    );
    let raised = descriptors.min(maximum);
    if current >= raised {
        return Ok(current);
    }
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(raised),
            maximum: limit.maximum,
        },
    )?;
    Ok(raised)
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
