//! What operators ask: metrics, and whether the service runs and answers.

use axum::{
    Extension, Json, Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};

use super::{failure::Failure, health::HealthReport};
use crate::{
    grpc::status,
    telemetry::{self, Metrics},
};

pub(super) fn routes(metrics: Metrics, health: HealthReport) -> Router {
    Router::new()
        .route("/metrics", get(page))
        .route("/livez", get(lives))
        .route("/readyz", get(is_ready))
        .fallback(no_such_path)
        .layer(Extension(metrics))
        .layer(Extension(health))
}

async fn page(Extension(metrics): Extension<Metrics>) -> Response {
    match metrics.page() {
        Ok(page) => ([(CONTENT_TYPE, telemetry::CONTENT_TYPE)], page).into_response(),
        Err(_) => Failure::from(status::internal()).into_response(),
    }
}

/// Whoever answers lives: a database that is away is no reason to start the service anew.
async fn lives() -> Json<Value> {
    Json(json!({"status": "alive"}))
}

async fn is_ready(Extension(health): Extension<HealthReport>) -> (StatusCode, Json<Value>) {
    if health.serves() {
        (StatusCode::OK, Json(json!({"status": "ready"})))
    } else {
        let answer = json!({"status": "not ready"});
        (StatusCode::SERVICE_UNAVAILABLE, Json(answer))
    }
}

async fn no_such_path() -> Failure {
    let paths = "no such path: there are /metrics, /livez and /readyz";
    Failure::of_http(StatusCode::NOT_FOUND, "PATH_UNKNOWN", paths)
}
