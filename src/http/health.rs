//! `/api/health`, for balancers and whoever watches: no credential, and nothing is asked of the database for it.
//!
//! Invariant: a stranger learns whether answers can be given and which part is away, and no name, address or error.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use axum::{extract::State, http::StatusCode};
use serde::Serialize;
use tokio::sync::watch;
use utoipa::ToSchema;

use super::{Services, Settings, call::Json};

/// What the service knows of itself, as of its last look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Health {
    /// Checks can be answered.
    pub serving: bool,
    pub database: Dependency,
    /// Down: changes may go unrecorded, or are not followed yet.
    pub log: Dependency,
    /// Down: too old to answer from.
    pub cache: Dependency,
}

/// A part that answers lean on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dependency {
    Up,
    Down,
    /// It has not been looked at.
    #[default]
    Unknown,
}

impl From<bool> for Dependency {
    fn from(up: bool) -> Self {
        if up { Self::Up } else { Self::Down }
    }
}

/// What is told about the service.
#[derive(Clone)]
pub struct HealthReport {
    known: watch::Receiver<Health>,
    environment: Arc<str>,
    started_at: Instant,
}

impl HealthReport {
    #[must_use]
    pub fn new(known: watch::Receiver<Health>, settings: &Settings) -> Self {
        Self {
            known,
            environment: settings.environment.as_str().into(),
            started_at: Instant::now(),
        }
    }

    /// Whether checks can be answered.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.known.borrow().serving
    }
}

/// How the service is.
#[derive(Serialize, ToSchema)]
pub(super) struct HealthAnswer {
    status: HealthStatus,
    /// When this was answered.
    #[schema(format = DateTime, example = "2026-03-02T08:15:00.25Z")]
    timestamp: String,
    /// Seconds since the service was started.
    #[schema(example = 86_400.5)]
    uptime: f64,
    /// As `--environment` says.
    #[schema(example = "production")]
    environment: String,
    /// Of this program.
    #[schema(example = "0.1.0")]
    version: &'static str,
    dependencies: Dependencies,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum HealthStatus {
    Healthy,
    Unhealthy,
}

/// What answers lean on, as of the service's last look at it.
#[derive(Serialize, ToSchema)]
struct Dependencies {
    database: Dependency,
    /// The log of changes: every change is recorded in it, and it is followed.
    log: Dependency,
    /// Whether it is new enough to answer from; without it the database answers.
    cache: Dependency,
}

/// Whether checks can be answered.
#[utoipa::path(
    get,
    path = "/api/health",
    tag = "Operation",
    security(()),
    responses(
        (status = 200, description = "Checks are answered", body = HealthAnswer),
        (status = 503, description = "Checks are not answered: starting, stopping, or a part is away", body = HealthAnswer),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
#[expect(
    clippy::disallowed_methods,
    reason = "said to people; nothing is measured with it"
)]
pub(super) async fn health(State(services): State<Services>) -> (StatusCode, Json<HealthAnswer>) {
    let report = services.health;
    let known = *report.known.borrow();
    let (http, status) = if known.serving {
        (StatusCode::OK, HealthStatus::Healthy)
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, HealthStatus::Unhealthy)
    };
    let answer = HealthAnswer {
        status,
        timestamp: prost_types::Timestamp::from(SystemTime::now()).to_string(),
        uptime: report.started_at.elapsed().as_secs_f64(),
        environment: report.environment.to_string(),
        version: env!("CARGO_PKG_VERSION"),
        dependencies: Dependencies {
            database: known.database,
            log: known.log,
            cache: known.cache,
        },
    };
    (http, Json(answer))
}
