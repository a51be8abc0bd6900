//! The description of everything that is served over HTTP, at `/openapi.json`.
//!
//! Invariant: it is made of the same rows as the routes, so neither has what the other has not.

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    http::{
        HeaderMap,
        header::{CONTENT_ENCODING, CONTENT_TYPE, VARY},
    },
    response::{IntoResponse, Response},
    routing::get,
};
use flate2::Compression;
use utoipa::{
    Modify, OpenApi, ToResponse,
    openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
};

use super::{
    Services,
    failure::{ErrorBody, FieldError},
    packed::{pack, takes_packed},
};

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
    components(responses(Refused, Failed), schemas(ErrorBody, FieldError)),
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

pub(super) fn routes(description: &utoipa::openapi::OpenApi) -> Router<Services> {
    let written = Arc::new(Written::new(description));
    let answer = async move |headers: HeaderMap| written.answer(&headers);
    Router::new().route("/openapi.json", get(answer))
}

/// The description as it is sent. Written out and packed once, for whoever asks needs no credential.
struct Written {
    plain: Bytes,
    packed: Option<Bytes>,
}

impl Written {
    fn new(description: &utoipa::openapi::OpenApi) -> Self {
        // Into memory nothing fails, and every field of it is JSON.
        let plain = description.to_json().unwrap_or_default();
        let packed = pack(plain.as_bytes(), Compression::best()).ok();
        Self {
            plain: plain.into(),
            packed: packed.map(Into::into),
        }
    }

    fn answer(&self, headers: &HeaderMap) -> Response {
        let json = [
            (CONTENT_TYPE, "application/json"),
            (VARY, "accept-encoding"),
        ];
        match &self.packed {
            Some(packed) if takes_packed(headers) => {
                (json, [(CONTENT_ENCODING, "gzip")], packed.clone()).into_response()
            }
            _ => (json, self.plain.clone()).into_response(),
        }
    }
}
