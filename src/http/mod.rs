//! HTTP and JSON: the services of `grpc` under paths. A request becomes the message that gRPC has for it, is answered by
//! the same handler, and the answer is written as JSON.
//!
//! Invariants: nothing is decided here, so that both doors say the same; a call comes through the same gate and limits; every
//! answer names its request, and every error is `{"error", "code", "request_id"}`.

mod audit;
mod batch;
mod call;
mod check;
mod docs;
mod evidence;
mod failure;
mod headers;
mod health;
mod lists;
mod openapi;
mod ops;
mod organization_permissions;
mod packed;

use std::sync::Arc;

use axum::{Router, extract::DefaultBodyLimit, http::HeaderValue, middleware};
use tower::ServiceBuilder;
use utoipa_axum::{
    router::{OpenApiRouter, UtoipaMethodRouterExt},
    routes,
};

pub use self::health::{Dependency, Health, HealthReport};
use crate::{
    auth::Authenticator,
    counters::Calls,
    grpc::{
        admin_service::AdminService,
        audit_service::AuditService,
        gate::GateLayer,
        limit::{CallerLayer, DeadlineLayer, DoorLayer},
        observe::{HTTP_OUTCOMES, ObserveLayer},
        permission_service::PermissionService,
    },
    limits::Limits,
    telemetry::Metrics,
    traces::Traces,
};

/// Of a request but a batch: a setting that names 10,000 users by ids of 36 bytes, with room.
const BODY_BYTES_MAX: usize = 512 << 10;

/// As many items of a batch, of the same length, as gRPC takes, and 52 bytes for each that JSON spends on the names of its
/// fields.
const BATCH_BODY_BYTES_MAX: usize = 2 << 20;

/// What is HTTP's alone.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What health says of where the service runs.
    pub environment: String,
    /// Whose pages may call from a browser: origins as browsers send them; none: nobody's.
    pub cors_origins: Vec<HeaderValue>,
}

/// What answers, the same as over gRPC.
#[derive(Clone)]
pub struct Services {
    pub permissions: Arc<PermissionService>,
    pub admin: Arc<AdminService>,
    pub audit: Arc<AuditService>,
    pub health: HealthReport,
}

/// What every call comes through before it is answered.
#[derive(Clone)]
pub struct Entrance {
    pub authenticator: Arc<Authenticator>,
    pub limits: Arc<Limits>,
    /// By method and outcome: see [`HTTP_OUTCOMES`].
    pub calls: Arc<Calls>,
    pub traces: Arc<Traces>,
    /// With TLS, browsers are told never to come without it.
    pub has_tls: bool,
}

/// Everything that callers are served over HTTP.
pub fn router(services: Services, entrance: Entrance, settings: &Settings) -> Router {
    let batch_body = DefaultBodyLimit::max(BATCH_BODY_BYTES_MAX);
    let (routes, description) = OpenApiRouter::with_openapi(openapi::description())
        .routes(routes!(health::health))
        .routes(routes!(check::check))
        .routes(routes!(batch::batch_check).layer(batch_body))
        .routes(routes!(lists::user_permissions))
        .routes(routes!(lists::summary))
        .merge(organization_permissions::routes())
        .routes(routes!(audit::list))
        .routes(routes!(audit::stream))
        .split_for_parts();
    let routes = routes
        .merge(openapi::routes(&description))
        .merge(docs::routes())
        .fallback(failure::no_such_path)
        .with_state(services);
    entrance.before(routes, &settings.cors_origins)
}

/// What operators are served: metrics, and whether the service runs and answers.
pub fn ops_router(metrics: Metrics, health: HealthReport, entrance: Entrance) -> Router {
    entrance.before(ops::routes(metrics, health), &[])
}

impl Entrance {
    /// From outside: what every answer has, and what every call comes through.
    fn before(self, routes: Router, cors_origins: &[HeaderValue]) -> Router {
        let Self {
            authenticator,
            limits,
            calls,
            traces,
            has_tls,
        } = self;
        let is_open = authenticator.is_open();
        routes.layer(
            ServiceBuilder::new()
                .layer(middleware::from_fn(headers::with_request_id))
                .layer(ObserveLayer::new(calls, &HTTP_OUTCOMES, traces))
                .map_response(move |response| headers::secured(response, has_tls))
                .option_layer(headers::cors(cors_origins))
                .layer(middleware::from_fn(failure::as_json))
                .layer(middleware::from_fn(move |request, next| {
                    headers::asked_for_here(is_open, request, next)
                }))
                .layer(DoorLayer(Arc::clone(&limits)))
                .layer(DeadlineLayer(Arc::clone(&limits)))
                .layer(GateLayer(authenticator, Arc::clone(&limits)))
                .layer(CallerLayer(limits))
                .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
                .map_response(headers::of_tonic)
                .layer(middleware::from_fn(packed::answers)),
        )
    }
}
