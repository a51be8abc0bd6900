//! Puts the parts together and runs them: every task is started here, and ends before `run` does.
//!
//! Invariant: health says SERVING only once the schema was found current, while the log is believed and answers can be given.

use std::{
    future::Future,
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
    time::Duration,
};

use thiserror::Error;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::{JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{
    codec::CompressionEncoding,
    transport::{
        Server,
        server::{Router, TcpIncoming},
    },
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    cache::Cache,
    check::Checker,
    feed::{self, Progress},
    grpc::{permission_service::PermissionService, v1},
    loader::Loader,
    model::BootTime,
    selfcheck,
    store::{
        DatabaseUrl, DedicatedConnection, Store, StoreError,
        migrations::{self, SchemaState},
    },
    upkeep,
};

/// What the service needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    pub database: DatabaseUrl,
    /// Where the log is followed: `database`, or the same one without what stands between.
    pub feed_database: DatabaseUrl,
    pub staleness_bound: Duration,
    /// The most that a caller may ask for as `max_staleness`; not less than `staleness_bound`.
    pub staleness_ceiling: Duration,
    pub cache_capacity: u64,
    pub warm_up_max: Duration,
    pub matrix_refresh_interval: Duration,
    pub inspection_interval: Duration,
    /// `None`: nothing is ever removed.
    pub audit_retention_days: Option<NonZeroU16>,
    pub maintenance_interval: Duration,
    /// One cached answer in so many is compared with the tables.
    pub self_check_every: NonZeroU32,
    pub lame_duck: Duration,
    pub drain_max: Duration,
}

/// A bound socket.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Why the service ended otherwise than by being told to.
#[derive(Debug, Error)]
pub enum ServeError {
    /// It could not start, and waiting would not help.
    #[error(transparent)]
    Database(#[from] StoreError),
    #[error(
        "the database's schema is at version {0}, newer than this program knows: use a newer hallpass"
    )]
    SchemaAhead(i32),
    #[error("applied migrations differ from this program's: {}", .0.join(", "))]
    SchemaChanged(Vec<&'static str>),
    #[error("cannot serve: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("cannot serve: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("a task of the service ended: {0}")]
    Task(#[from] JoinError),
}

/// The name under which health is asked for.
const SERVICE: &str = v1::permission_service_server::SERVICE_NAME;

/// Waits between looks at a database that is away or behind at start.
const START_RETRY: Duration = Duration::from_millis(500);

/// A database that does not say within this time which schema it has is away.
const SCHEMA_WAIT_MAX: Duration = Duration::from_secs(10);

/// How often the start looks for the first lease.
const LEASE_POLL: Duration = Duration::from_millis(5);

/// How often health is decided anew.
const HEALTH_INTERVAL: Duration = Duration::from_millis(100);

/// A connection whose peer does not answer a ping is closed; so half-open ones do not pile up.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Calls at once on one connection: as many as a busy client's pool has in flight, few enough to bound their buffers.
const STREAMS_A_CONNECTION_MAX: u32 = 1_000;

/// A request of 10,000 items is about 1.2 MB.
const REQUEST_BYTES_MAX: usize = 4 << 20;

/// Runs the service until `shutdown` completes, then drains it; calls `on_ready` once answers can be given.
///
/// # Errors
/// When it cannot start, or a listener fails.
pub async fn run(
    config: Config,
    listener: Listener,
    on_ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let store = Arc::new(Store::new(&config.database)?);
    let cache = Arc::new(Cache::new(config.cache_capacity));
    let progress = Arc::new(Progress::default());
    // Nothing is believed until the first inspection.
    progress.disbelieve_log();
    let (loader, loader_task) = Loader::new(
        Arc::clone(&store),
        Arc::clone(&cache),
        Arc::clone(&progress),
    );
    let (sampler, self_check) = selfcheck::sampler(config.self_check_every);
    let checker = Arc::new(Checker::new(
        cache,
        progress,
        loader,
        store,
        config.staleness_bound,
        sampler,
    ));

    let (health, health_service) = tonic_health::server::health_reporter();
    report(&health, ServingStatus::NotServing).await;
    let router = router()
        .add_service(health_service)
        .add_service(
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .build_v1()?,
        )
        .add_service(
            v1::permission_service_server::PermissionServiceServer::new(PermissionService::new(
                Arc::clone(&checker),
                config.staleness_ceiling,
            ))
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .accept_compressed(CompressionEncoding::Gzip)
            .send_compressed(CompressionEncoding::Gzip),
        );

    // Both are aborted when this function returns.
    let mut background = JoinSet::new();
    background.spawn(loader_task);
    background.spawn(self_check.run(
        Arc::clone(&checker.store),
        Arc::clone(&checker.cache),
        Arc::clone(&checker.progress),
    ));
    let stop = CancellationToken::new();
    let mut server = AbortOnDropHandle::new(tokio::spawn(serve(
        router,
        listener,
        stop.clone().cancelled_owned(),
    )));
    let watched = async {
        prepare(&config, &checker.store).await?;
        let ready = spawn_background(&config, &checker, &mut background);
        let serving = async {
            wait_until_ready(&config, &checker, ready).await;
            watch_health(&checker, &health, on_ready).await
        };
        tokio::select! {
            never = serving => never,
            failure = first_failure(&mut background) => Err(failure),
        }
    };
    tokio::select! {
        fatal = watched => { let Err(error) = fatal; return Err(error); }
        ended = &mut server => return ended?,
        () = shutdown => {}
    }

    report(&health, ServingStatus::NotServing).await;
    drain(&config, health, &stop, server).await?;
    background.shutdown().await;
    Ok(())
}

/// Lets callers go elsewhere, takes no more calls, and waits for those under way.
async fn drain(
    config: &Config,
    mut health: HealthReporter,
    stop: &CancellationToken,
    server: AbortOnDropHandle<Result<(), ServeError>>,
) -> Result<(), ServeError> {
    tracing::info!("stopping");
    sleep(config.lame_duck).await;
    stop.cancel();
    // Ends the streams that watch health: by themselves they never would, and each stop would take the whole of the
    // drain wherever a client or a balancer has one open.
    for service in ["", SERVICE] {
        health.clear_service_status(service).await;
    }
    let Ok(ended) = timeout(config.drain_max, server).await else {
        tracing::warn!(
            "calls were still under way after {:?}: cut off",
            config.drain_max
        );
        return Ok(());
    };
    ended?
}

fn router() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_A_CONNECTION_MAX)
}

async fn serve(
    router: Router,
    listener: Listener,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    match listener {
        Listener::Tcp(listener) => {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            router.serve_with_incoming_shutdown(incoming, stop).await?;
        }
        Listener::Unix(listener) => {
            let incoming = UnixListenerStream::new(listener);
            router.serve_with_incoming_shutdown(incoming, stop).await?;
        }
    }
    Ok(())
}

async fn report(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status(SERVICE, status).await;
}

/// Returns when the schema is current and the pools are filled.
async fn prepare(config: &Config, store: &Store) -> Result<(), ServeError> {
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

/// What must have happened before the first answer. Each sender lives in a task that ends only with the service.
struct Readiness {
    inspected: watch::Receiver<bool>,
    warmed: watch::Receiver<bool>,
}

fn spawn_background(
    config: &Config,
    checker: &Arc<Checker>,
    background: &mut JoinSet<()>,
) -> Readiness {
    let (has_inspected, inspected) = watch::channel(false);
    let (has_warmed, warmed) = watch::channel(false);
    background.spawn(upkeep::inspect(
        config.database.clone(),
        config.inspection_interval,
        Arc::clone(&checker.progress),
        has_inspected,
    ));
    background.spawn(feed::follow(
        config.feed_database.clone(),
        Arc::clone(&checker.cache),
        Arc::clone(&checker.progress),
    ));
    background.spawn(upkeep::refresh(
        config.database.clone(),
        config.matrix_refresh_interval,
    ));
    background.spawn(upkeep::maintain_audit_log(
        config.database.clone(),
        config.audit_retention_days,
        config.maintenance_interval,
    ));
    background.spawn(warm_up(
        Arc::clone(checker),
        config.cache_capacity,
        has_warmed,
    ));
    Readiness { inspected, warmed }
}

/// Returns when the log is inspected and followed, and the cache is warm or its time is up.
async fn wait_until_ready(config: &Config, checker: &Checker, mut ready: Readiness) {
    let started = Instant::now();
    // An error is a task that has panicked, which ends the service.
    drop(ready.inspected.wait_for(|inspected| *inspected).await);
    wait_for_lease(checker).await;
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

async fn warm_up(checker: Arc<Checker>, capacity: u64, has_warmed: watch::Sender<bool>) {
    wait_for_lease(&checker).await;
    let started = Instant::now();
    if let Ok(users) = upkeep::warm_up(&checker.store, &checker.loader, capacity).await {
        tracing::info!(users, elapsed = ?started.elapsed(), "warmed the cache");
    }
    has_warmed.send_replace(true);
}

/// Returns when a background task panics. Only the warm-up ends by itself.
async fn first_failure(background: &mut JoinSet<()>) -> ServeError {
    loop {
        match background.join_next().await {
            Some(Ok(())) => {}
            Some(Err(panic)) => return panic.into(),
            None => std::future::pending().await,
        }
    }
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
async fn watch_health(
    checker: &Checker,
    health: &HealthReporter,
    on_ready: impl FnOnce(),
) -> Result<std::convert::Infallible, ServeError> {
    let mut serving = false;
    let mut on_ready = Some(on_ready);
    loop {
        let now = can_answer(checker).await;
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

/// From the cache, or else from the database; never while changes may go unrecorded.
async fn can_answer(checker: &Checker) -> bool {
    if !checker.progress.log_is_believed() {
        return false;
    }
    let staleness = checker
        .progress
        .lease()
        .map(|lease| BootTime::now().since(lease.sent_at));
    if staleness.is_some_and(|staleness| staleness <= checker.staleness_bound) {
        return true;
    }
    checker.store.ping().await.is_ok()
}
