//! What every answer's headers say: which request it is to, and what a browser may do with it.

use std::{net::IpAddr, time::Duration};

use axum::{
    body::Body,
    extract::Request,
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
        header::{
            AUTHORIZATION, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE,
            HOST, REFERRER_POLICY, RETRY_AFTER, STRICT_TRANSPORT_SECURITY, X_CONTENT_TYPE_OPTIONS,
            X_DNS_PREFETCH_CONTROL, X_FRAME_OPTIONS,
        },
        uri::Authority,
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body::Body as _;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use uuid::Uuid;

use super::{failure::Failure, organization_permissions};
use crate::auth::{Peer, access::OverHttp};

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// As long as a trace's and a span's together, twice.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// How long a browser remembers what it was allowed to send; Chromium believes no more than two hours.
const CORS_AGE_MAX: Duration = Duration::from_secs(60 * 60);

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Where TLS is on: a browser that has come once with it never comes without it.
const ONLY_WITH_TLS: HeaderValue = HeaderValue::from_static("max-age=31536000; includeSubDomains");

/// What helmet sends for a JSON API. A page that is meant to be shown says otherwise itself.
const SECURITY: [(HeaderName, &str); 11] = [
    (CACHE_CONTROL, "no-store"),
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; frame-ancestors 'none'",
    ),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    (HeaderName::from_static("origin-agent-cluster"), "?1"),
    (REFERRER_POLICY, "no-referrer"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_DNS_PREFETCH_CONTROL, "off"),
    (HeaderName::from_static("x-download-options"), "noopen"),
    (X_FRAME_OPTIONS, "DENY"),
    (
        HeaderName::from_static("x-permitted-cross-domain-policies"),
        "none",
    ),
];

/// Where nobody has to say who it is, the service is for this machine alone, and a page that a browser got from elsewhere
/// under a name that now leads here (DNS rebinding) is not of this machine.
pub(super) async fn asked_for_here(is_open: bool, request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>();
    let is_socket = peer.is_some_and(|peer| peer.address.is_none());
    if !is_open || is_socket || host(&request).is_some_and(is_this_machine) {
        return next.run(request).await;
    }
    let message =
        "without --auth this service is for its own machine: ask for localhost, 127.0.0.1 or [::1]";
    Failure::of_http(StatusCode::MISDIRECTED_REQUEST, "HOST_NOT_LOCAL", message).into_response()
}

/// Whom the request is for: HTTP/2 says so in its target, HTTP/1.1 in a header.
fn host(request: &Request) -> Option<&str> {
    let said = request
        .headers()
        .get(HOST)
        .and_then(|host| host.to_str().ok());
    request.uri().authority().map(Authority::as_str).or(said)
}

fn is_this_machine(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let name = authority
        .host()
        .trim_start_matches('[')
        .trim_end_matches(']');
    let address = name.parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// The request's id: the caller's where it can stand in a log and in the audit log, else one of ours.
pub(super) async fn with_request_id(mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(OverHttp);
    let given = request.headers().get(REQUEST_ID);
    let id = match given.filter(|id| is_usable(id)) {
        Some(id) => id.clone(),
        None => made(),
    };
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn is_usable(id: &HeaderValue) -> bool {
    let bytes = id.as_bytes();
    (1..=REQUEST_ID_BYTES_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
}

fn made() -> HeaderValue {
    let id = Uuid::new_v4().hyphenated().to_string();
    HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("none"))
}

/// Of a request that has come through [`with_request_id`].
pub(super) fn request_id(headers: &HeaderMap) -> &str {
    let id = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok());
    id.unwrap_or_default()
}

pub(super) fn secured(mut response: Response, has_tls: bool) -> Response {
    let headers = response.headers_mut();
    if has_tls {
        headers.insert(STRICT_TRANSPORT_SECURITY, ONLY_WITH_TLS);
    }
    for (name, value) in SECURITY {
        headers
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    response
}

/// Lets pages of these origins call from a browser; `None` without any. It answers a browser's question whether it may
/// (preflight) by itself, for that carries no credential.
pub(super) fn cors(origins: &[HeaderValue]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = [AUTHORIZATION, CONTENT_TYPE, REQUEST_ID, LAST_EVENT_ID];
    let actor = organization_permissions::actor::HEADERS.map(HeaderName::from_static);
    let layer = CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins.iter().cloned()))
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::DELETE])
        .allow_headers(AllowHeaders::list(allowed.into_iter().chain(actor)))
        .expose_headers([REQUEST_ID, RETRY_AFTER])
        .max_age(CORS_AGE_MAX);
    Some(layer)
}

/// As the layers that gRPC's calls come through have it. They do not pass on how long an answer is.
pub(super) fn of_tonic(mut response: Response) -> axum::http::Response<tonic::body::Body> {
    if let Some(bytes) = response.body().size_hint().exact() {
        response.headers_mut().insert(CONTENT_LENGTH, bytes.into());
    }
    response.map(tonic::body::Body::new)
}

pub(super) fn of_axum(response: axum::http::Response<tonic::body::Body>) -> Response {
    response.map(Body::new)
}
