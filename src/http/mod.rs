//! HTTP and JSON: the services of `grpc` under paths. A request becomes the message that gRPC has for it, is answered by
//! the same handler, and the answer is written as JSON.
//!
//! Invariants: nothing is decided here, so that both doors say the same; a call comes through the same gate and limits; every
//! answer names its request, and every error is `{"error", "code", "request_id"}`.

mod audit;
mod call;
mod check;
mod common;
mod docs;
mod failure;
mod headers;
mod openapi;

use std::sync::Arc;

use axum::{Router, middleware};
use tower::ServiceBuilder;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    auth::Authenticator,
    grpc::{
        admin_service::AdminService,
        audit_service::AuditService,
        gate::GateLayer,
        limit::{CallerLayer, DeadlineLayer, DoorLayer},
        permission_service::PermissionService,
    },
    limits::Limits,
};

/// What answers, the same as over gRPC.
#[derive(Clone)]
pub struct Services {
    pub permissions: Arc<PermissionService>,
    pub admin: Arc<AdminService>,
    pub audit: Arc<AuditService>,
}

/// Everything that is served over HTTP.
pub fn router(
    services: Services,
    authenticator: Arc<Authenticator>,
    limits: Arc<Limits>,
) -> Router {
    let (routes, description) = OpenApiRouter::with_openapi(openapi::description())
        .routes(routes!(check::check))
        .routes(routes!(audit::list))
        .routes(routes!(audit::stream))
        .split_for_parts();
    routes
        .merge(openapi::routes(&description))
        .merge(docs::routes())
        .fallback(failure::no_such_path)
        .with_state(services)
        // From outside: what every answer has, and what every call comes through.
        .layer(
            ServiceBuilder::new()
                .layer(middleware::from_fn(headers::with_request_id))
                .map_response(headers::secured)
                .layer(middleware::from_fn(failure::as_json))
                .layer(DoorLayer(Arc::clone(&limits)))
                .layer(DeadlineLayer(Arc::clone(&limits)))
                .layer(GateLayer(authenticator, Arc::clone(&limits)))
                .layer(CallerLayer(limits))
                .map_response(headers::of_tonic),
        )
}
