//! The description of everything that is served over HTTP, and a page that shows it.

use axum::{Json, Router, routing::get};
use utoipa::{
    Modify, OpenApi, ToResponse,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};

use super::{Services, failure::ErrorBody};

/// The request is wrong, or this caller may not make it, or not now. `error` says what to do.
#[derive(ToResponse)]
#[response(description = "The request is wrong, or the caller may not make it, or not now")]
pub(super) struct Refused(#[expect(dead_code, reason = "its schema is what counts")] ErrorBody);

/// Nothing is decided. Not an allow.
#[derive(ToResponse)]
#[response(description = "No answer could be given: nothing is decided, and nothing is allowed")]
pub(super) struct Failed(#[expect(dead_code, reason = "its schema is what counts")] ErrorBody);

#[derive(OpenApi)]
#[openapi(
    info(
        title = "hallpass",
        description = "Permission checks served from your own PostgreSQL tables."
    ),
    components(responses(Refused, Failed)),
    security(("credential" = [])),
    modifiers(&Credential)
)]
struct Description;

/// How callers say who they are.
struct Credential;

impl Modify for Credential {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        let mut bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        bearer.description = Some("An API key (`hp_…`), or a JWT.".to_owned());
        let components = description.components.get_or_insert_default();
        components.add_security_scheme("credential", SecurityScheme::Http(bearer));
    }
}

/// Without its paths.
pub(super) fn description() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

pub(super) fn routes(description: utoipa::openapi::OpenApi) -> Router<Services> {
    Router::new().route("/openapi.json", get(async || Json(description)))
}
