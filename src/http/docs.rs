//! `/docs/`: a page that shows the description, and lets one try it. Everything that it is made of is in the program.
//!
//! Invariant: what a stranger can ask for is packed when the program is built, and never for a request; the
//! page loads nothing from anywhere else.

use axum::{
    Router,
    http::{
        StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION,
        },
    },
    response::{IntoResponse, Response},
    routing::get,
};

use super::{Services, call::InPath, failure::Failure};

/// Swagger UI sets styles of elements, and draws with images that are in its sheet.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page changes with the program only; who has just taken a new one into service looks at it again soon.
const CACHED: &str = "public, max-age=300";

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

pub(super) fn routes() -> Router<Services> {
    Router::new()
        .route("/docs", get(to_page))
        .route("/docs/", get(page))
        .route("/docs/{asset}", get(asset))
}

/// The page names what it is made of relative to itself.
async fn to_page() -> Response {
    (StatusCode::FOUND, [(LOCATION, "docs/")]).into_response()
}

async fn page() -> Response {
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (CACHE_CONTROL, CACHED),
    ];
    (headers, include_str!("docs/index.html")).into_response()
}

async fn asset(InPath(name): InPath<String>) -> Response {
    match &*name {
        "start.js" => {
            let headers = [(CONTENT_TYPE, JAVASCRIPT), (CACHE_CONTROL, CACHED)];
            (headers, include_str!("docs/start.js")).into_response()
        }
        "swagger-ui-bundle.js" => packed(
            JAVASCRIPT,
            include_bytes!(concat!(env!("OUT_DIR"), "/swagger-ui-bundle.js.gz")),
        ),
        "swagger-ui.css" => packed(
            "text/css; charset=utf-8",
            include_bytes!(concat!(env!("OUT_DIR"), "/swagger-ui.css.gz")),
        ),
        _ => {
            Failure::of_http(StatusCode::NOT_FOUND, "PATH_UNKNOWN", "no such path").into_response()
        }
    }
}

/// Every browser unpacks it, and nobody else has a use for it.
fn packed(content_type: &'static str, bytes: &'static [u8]) -> Response {
    let headers = [
        (CONTENT_TYPE, content_type),
        (CONTENT_ENCODING, "gzip"),
        (CACHE_CONTROL, CACHED),
    ];
    (headers, bytes).into_response()
}
