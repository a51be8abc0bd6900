//! Puts the parts together and runs them: every task is started here, and ends before `run` does.
//!
//! Invariant: health says SERVING only once the schema was found current, while the log is believed and answers can be given.

pub mod accept;
mod batch;
pub mod connections;
mod drive;
pub mod io;
mod readiness;
mod rpc;
pub mod slots;
pub mod tls;
mod web;

use std::{
    future::{Future, pending},
    num::{NonZeroU16, NonZeroU32},
    sync::Arc,
    time::Duration,
};

use futures_util::future::OptionFuture;
use thiserror::Error;
use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use self::{
    accept::Acceptor,
    readiness::{Readiness, prepare, wait_until_ready, warm_up, watch_health},
    slots::Slots,
};
pub use self::{
    accept::Listener,
    connections::Connections,
    rpc::tonic_server,
    tls::{Tls, TlsFiles},
};
use crate::{
    audit::{self, tail::Tail},
    auth::Authenticator,
    cache::Cache,
    check::Checker,
    feed::{self, Progress},
    grpc::{
        admin_service::AdminService,
        audit_service::AuditService,
        observe::{GRPC_OUTCOMES, ObserveLayer},
        permission_service::PermissionService,
        v1,
    },
    http::{self, Services},
    limits::{Bounds, Limits},
    loader::Loader,
    model::BootTime,
    selfcheck,
    store::{DatabaseUrl, Store, StoreError, samples::Sample},
    telemetry::{Metrics, Observed, Reading, Telemetry, otlp::Export},
    traces::{self, EndpointError, Traces},
    upkeep,
};

/// What the service needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    pub database: DatabaseUrl,
    /// Where the log is followed: `database`, or the same one without what stands between.
    pub feed_database: DatabaseUrl,
    /// Who may change permissions, for the admin API; `None`: nobody changes anything through this service.
    pub admin_database: Option<DatabaseUrl>,
    pub staleness_bound: Duration,
    /// The most that a caller may ask for as `max_staleness`; not less than `staleness_bound`.
    pub staleness_ceiling: Duration,
    pub authenticator: Arc<Authenticator>,
    /// `None`: TCP is served in plain text.
    pub tls: Option<Arc<Tls>>,
    /// The same certificate for HTTP, where that is served.
    pub http_tls: Option<Arc<Tls>>,
    pub connections: Connections,
    pub cache_capacity: u64,
    pub warm_up_max: Duration,
    pub matrix_refresh_interval: Duration,
    pub inspection_interval: Duration,
    /// `None`: nothing is ever removed.
    pub audit_retention_days: Option<NonZeroU16>,
    pub maintenance_interval: Duration,
    /// How often the database is asked what the metrics show of it.
    pub sample_interval: Duration,
    /// One cached answer in so many is compared with the tables.
    pub self_check_every: NonZeroU32,
    pub lame_duck: Duration,
    pub drain_max: Duration,
    pub bounds: Bounds,
    /// Bounds whose rates are taken over while the service runs.
    pub changed_rates: Option<watch::Receiver<Bounds>>,
    pub audit: audit::Limits,
    pub http: http::Settings,
    pub traces: traces::Settings,
    /// Where metrics are sent besides being scraped.
    pub metrics_export: Option<Export>,
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
    #[error(transparent)]
    Traces(#[from] EndpointError),
    #[error("cannot serve: {0}")]
    Transport(#[from] tonic::transport::Error),
    #[error("cannot serve: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("a task of the service ended: {0}")]
    Task(#[from] JoinError),
}

/// Where callers come in.
pub struct Listeners {
    pub grpc: Listener,
    pub http: Option<Listener>,
    /// For operators.
    pub ops: Option<Listener>,
}

/// The name under which health is asked for.
const SERVICE: &str = v1::permission_service_server::SERVICE_NAME;

/// Runs the service until `shutdown` completes, then drains it; calls `on_ready` once answers can be given.
///
/// # Errors
/// When it cannot start, or a listener fails.
pub async fn run(
    config: Config,
    listeners: Listeners,
    on_ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let store = Arc::new(Store::new(&config.database)?);
    let changes = config.admin_database.as_ref();
    let changes = changes.map(|url| store.changes(url)).transpose()?;
    let changes = changes.map(Arc::new);
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

    let limits = Arc::new(Limits::new(config.bounds.clone()));
    let tail = Tail::default();
    let streams = TaskTracker::new();
    let stop = CancellationToken::new();
    // However this function returns, the streams end.
    let _stop = stop.clone().drop_guard();
    let (health, health_service) = tonic_health::server::health_reporter();
    report(&health, ServingStatus::NotServing).await;
    let permissions = Arc::new(PermissionService::new(
        Arc::clone(&checker),
        config.staleness_ceiling,
        Arc::clone(&limits),
    ));
    let admin = Arc::new(AdminService::new(
        Arc::clone(&checker.store),
        changes.clone(),
        Arc::clone(&limits),
    ));
    let audit = Arc::new(AuditService::new(
        Arc::clone(&checker.store),
        tail.clone(),
        config.audit,
        streams.clone(),
        stop.clone(),
    ));
    let (known, is_known) = watch::channel(http::Health::default());
    let is_known = http::HealthReport::new(is_known, &config.http);
    let services = Services {
        permissions,
        admin,
        audit,
        health: is_known.clone(),
    };
    let routes = rpc::grpc_routes(&services, health_service)?;

    // All are aborted when this function returns.
    let mut background = JoinSet::new();
    background.spawn(loader_task);
    background.spawn(self_check.run(
        Arc::clone(&checker.store),
        Arc::clone(&checker.cache),
        Arc::clone(&checker.progress),
    ));
    if let Some(rates) = config.changed_rates.clone() {
        background.spawn(follow_rates(rates, Arc::clone(&limits)));
    }
    let observed = Observed::default();
    let traces = Arc::new(Traces::new(&config.traces)?);
    let (samples, sampled) = watch::channel(None);
    let metrics = Metrics::new(Telemetry {
        checker: Arc::clone(&checker),
        limits: Arc::clone(&limits),
        tail: tail.clone(),
        observed: observed.clone(),
        traces: Arc::clone(&traces),
        is_serving: serving(&is_known),
        samples: sampled,
        changes,
        certificates: certificates(&config),
    });
    if let Some(export) = config.metrics_export.clone() {
        let channel = export.channel()?;
        background.spawn(export.run(channel, metrics.clone()));
    }
    background.spawn(tail.run(Arc::clone(&checker.store), Arc::clone(&checker.progress)));
    if let Some(tokens) = config.authenticator.tokens() {
        background.spawn(tokens.clone().follow());
    }
    for tls in config.tls.iter().chain(&config.http_tls) {
        background.spawn(Arc::clone(tls).follow());
    }
    let slots = Slots::new(&config.connections);
    let acceptor = |listener, tls: &Option<Arc<Tls>>, slots: &Arc<Slots>| {
        let (tls, connections) = (tls.clone(), config.connections.clone());
        Acceptor::new(listener, tls, connections, Arc::clone(slots))
    };
    let grpc = rpc::serve_grpc(
        routes,
        Arc::clone(&config.authenticator),
        Arc::clone(&limits),
        ObserveLayer::new(
            Arc::clone(&observed.grpc),
            &GRPC_OUTCOMES,
            Arc::clone(&traces),
        ),
        acceptor(listeners.grpc, &config.tls, &slots),
        config.connections.clone(),
        stop.clone().cancelled_owned(),
    );
    let entrance = |listener: &Listener| http::Entrance {
        authenticator: Arc::clone(&config.authenticator),
        limits: Arc::clone(&limits),
        calls: Arc::clone(&observed.http),
        traces: Arc::clone(&traces),
        has_tls: config.http_tls.is_some() && matches!(listener, Listener::Tcp(_)),
    };
    let http = listeners.http.map(|listener| {
        web::serve(
            http::router(services, entrance(&listener), &config.http),
            acceptor(listener, &config.http_tls, &slots),
            config.connections.clone(),
            stop.clone().cancelled_owned(),
        )
    });
    // Operators see the service stop, too.
    if let Some(listener) = listeners.ops {
        background.spawn(web::serve(
            http::ops_router(metrics, is_known, entrance(&listener)),
            acceptor(listener, &config.http_tls, &Slots::of_operators()),
            config.connections.clone(),
            pending(),
        ));
    }
    let mut server = AbortOnDropHandle::new(tokio::spawn(async {
        tokio::join!(grpc, OptionFuture::from(http));
    }));
    let watched = async {
        prepare(&config, &checker.store).await?;
        let ready = spawn_background(&config, &checker, samples, &mut background);
        let serving = async {
            wait_until_ready(&config, &checker, ready).await;
            watch_health(&checker, &health, &known, on_ready).await
        };
        tokio::select! {
            never = serving => never,
            failure = first_failure(&mut background) => Err(failure),
        }
    };
    tokio::select! {
        fatal = watched => { let Err(error) = fatal; return Err(error); }
        ended = &mut server => return Ok(ended?),
        () = shutdown => {}
    }

    report(&health, ServingStatus::NotServing).await;
    known.send_modify(|known| known.serving = false);
    drain(&config, health, &stop, server).await?;
    streams.close();
    streams.wait().await;
    background.shutdown().await;
    // Last: every call has ended.
    traces.shutdown().await;
    Ok(())
}

async fn follow_rates(mut rates: watch::Receiver<Bounds>, limits: Arc<Limits>) {
    while rates.changed().await.is_ok() {
        limits.set_rates(&rates.borrow_and_update());
    }
}

fn serving(known: &http::HealthReport) -> Reading<bool> {
    let known = known.clone();
    Box::new(move || known.serves())
}

fn certificates(config: &Config) -> Vec<(&'static str, Reading<Duration>)> {
    let listeners = [("grpc", &config.tls), ("http", &config.http_tls)];
    let with_one = listeners.into_iter();
    with_one
        .filter_map(|(name, tls)| {
            let tls = Arc::clone(tls.as_ref()?);
            let expires: Reading<Duration> = Box::new(move || tls.expires());
            Some((name, expires))
        })
        .collect()
}

/// Lets callers go elsewhere, takes no more calls, and waits for those under way.
async fn drain(
    config: &Config,
    mut health: HealthReporter,
    stop: &CancellationToken,
    server: AbortOnDropHandle<()>,
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
    Ok(ended?)
}

async fn report(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status(SERVICE, status).await;
}

fn spawn_background(
    config: &Config,
    checker: &Arc<Checker>,
    samples: watch::Sender<Option<(Sample, BootTime)>>,
    background: &mut JoinSet<()>,
) -> Readiness {
    let (has_inspected, inspected) = watch::channel(false);
    let (has_warmed, warmed) = watch::channel(false);
    // Not before the inspection: a database that is sampled and a log that is not believed are an alarm.
    background.spawn(upkeep::sample(
        config.database.clone(),
        config.sample_interval,
        samples,
    ));
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
    let keys = config.authenticator.keys().cloned();
    if let Some(keys) = keys.clone() {
        background.spawn(keys.follow(config.database.clone(), Arc::clone(&checker.store)));
    }
    background.spawn(warm_up(
        Arc::clone(checker),
        config.cache_capacity,
        has_warmed,
    ));
    Readiness {
        inspected,
        keys,
        warmed,
    }
}

/// Returns when a background task panics. Only the warm-up ends by itself.
async fn first_failure(background: &mut JoinSet<()>) -> ServeError {
    loop {
        match background.join_next().await {
            Some(Ok(())) => {}
            Some(Err(panic)) => return panic.into(),
            None => pending().await,
        }
    }
}
