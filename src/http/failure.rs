//! The one place where errors become HTTP statuses and JSON.
//!
//! Invariant: within the stack a failure is a gRPC status, which the limits count and log; only outside of it does it
//! become JSON.

use std::{fmt::Write as _, time::Duration};

use axum::{
    extract::{MatchedPath, Request},
    http::{
        HeaderValue, StatusCode,
        header::{ALLOW, RETRY_AFTER, WWW_AUTHENTICATE},
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use utoipa::ToSchema;

use super::headers;
use crate::{
    auth::{access, bearer},
    grpc::status,
};

/// A call that failed.
pub(super) struct Failure {
    status: Status,
    /// Where HTTP is more precise than gRPC.
    http: Option<StatusCode>,
}

impl Failure {
    /// The request cannot be read: a part of it is not what it should be.
    pub(super) fn malformed(part: &str, complaint: &str) -> Self {
        status::malformed(part, complaint).into()
    }

    /// A failure of HTTP's own.
    pub(super) fn of_http(http: StatusCode, reason: &str, message: &str) -> Self {
        Self {
            status: status::of_http(reason, message),
            http: Some(http),
        }
    }

    /// A failure for which HTTP has a status that fits better than its code's.
    pub(super) fn with_http(status: Status, http: StatusCode) -> Self {
        Self {
            status,
            http: Some(http),
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self { status, http: None }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = headers::of_axum(self.status.into_http());
        if let Some(http) = self.http {
            response.extensions_mut().insert(http);
        }
        response
    }
}

pub(super) async fn no_such_path() -> Failure {
    status::no_such_method().into()
}

/// Why a call failed.
#[derive(Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// For people.
    #[schema(example = "user_id: is missing: a hyphenated UUID")]
    error: String,
    /// For programs; does not change.
    #[schema(example = "INVALID_REQUEST")]
    code: String,
    /// As in `x-request-id`.
    #[schema(example = "8f14e45f-ceea-467f-9c1b-3a0c8c4d2b11")]
    request_id: String,
    /// The fields that are wrong, each with what is wrong with it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fields: Vec<FieldError>,
}

/// A field that is wrong.
#[derive(Serialize, ToSchema)]
pub(super) struct FieldError {
    #[schema(example = "user_id")]
    field: String,
    #[schema(example = "is missing: a hyphenated UUID")]
    error: String,
}

/// Writes a failure as JSON.
pub(super) async fn as_json(request: Request, next: Next) -> Response {
    let request_id = headers::request_id(request.headers()).to_owned();
    let is_malformed = !matches!(bearer(request.headers()), Ok(Some(token)) if !token.is_empty());
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    let Some(failed) = Status::from_header_map(response.headers()) else {
        return response;
    };
    let more_precise = response.extensions().get::<StatusCode>().copied();
    let (reason, fields) = said(&failed);
    let no_such_method = reason == "METHOD_UNKNOWN";
    let allowed = route.filter(|_| no_such_method).map(|route| {
        let methods = access::methods_of(route.as_str()).map(|method| match method {
            "GET" => "GET, HEAD",
            other => other,
        });
        methods.collect::<Vec<_>>().join(", ")
    });
    let (http, code, message) = match (&*reason, &allowed) {
        ("METHOD_UNKNOWN", Some(allowed)) => (
            StatusCode::METHOD_NOT_ALLOWED,
            "METHOD_NOT_ALLOWED".to_owned(),
            format!("this path takes {allowed}"),
        ),
        ("METHOD_UNKNOWN", None) => (
            StatusCode::NOT_FOUND,
            "PATH_UNKNOWN".to_owned(),
            "no such path: see /openapi.json".to_owned(),
        ),
        // What PTO Connect's clients look for.
        ("CREDENTIAL_MISSING" | "CREDENTIAL_INVALID", _) if is_malformed => (
            StatusCode::UNAUTHORIZED,
            reason,
            "Missing or malformed auth token".to_owned(),
        ),
        _ => (
            more_precise.unwrap_or_else(|| http_status(failed.code())),
            code(&failed),
            failed.message().to_owned(),
        ),
    };
    let body = ErrorBody {
        error: message,
        code,
        request_id,
        fields,
    };
    let mut answer = (http, axum::Json(body)).into_response();
    let details = failed.get_error_details();
    let retry = details.retry_info().and_then(|retry| retry.retry_delay);
    let headers = answer.headers_mut();
    if let Some(retry) = retry {
        headers.insert(RETRY_AFTER, seconds(retry));
    }
    if http == StatusCode::UNAUTHORIZED {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(allowed) = allowed
        && let Ok(allowed) = HeaderValue::from_str(&allowed)
    {
        headers.insert(ALLOW, allowed);
    }
    answer
}

/// What a status says to programs: its code, and the fields that are wrong.
pub(super) fn said(failed: &Status) -> (String, Vec<FieldError>) {
    let details = failed.get_error_details();
    let code = match details.error_info() {
        Some(info) if !info.reason.is_empty() => info.reason.clone(),
        _ => code_name(failed.code()),
    };
    let violations = details.bad_request().map(|bad| &bad.field_violations);
    let fields = violations
        .into_iter()
        .flatten()
        .map(|violation| FieldError {
            field: violation.field.clone(),
            error: violation.description.clone(),
        });
    (code, fields.collect())
}

/// Whole seconds, rounded up: HTTP knows no others.
fn seconds(retry: Duration) -> HeaderValue {
    let seconds = retry.as_secs() + u64::from(retry.subsec_nanos() > 0);
    seconds.max(1).into()
}

/// Each gRPC code has one HTTP status, as google.rpc.Code has it.
fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        // What nginx calls a client that closed its request; nobody reads it.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What programs know a failure by.
pub(super) fn code(failed: &Status) -> String {
    let reason = status::reason(failed);
    if reason.is_empty() {
        code_name(failed.code())
    } else {
        reason
    }
}

/// `InvalidArgument` as `INVALID_ARGUMENT`.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        // Into a string nothing fails.
        let _ = write!(name, "{}", letter.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_one_status() {
        let table = [
            (Code::Ok, 200, "OK"),
            (Code::Cancelled, 499, "CANCELLED"),
            (Code::Unknown, 500, "UNKNOWN"),
            (Code::InvalidArgument, 400, "INVALID_ARGUMENT"),
            (Code::DeadlineExceeded, 504, "DEADLINE_EXCEEDED"),
            (Code::NotFound, 404, "NOT_FOUND"),
            (Code::AlreadyExists, 409, "ALREADY_EXISTS"),
            (Code::PermissionDenied, 403, "PERMISSION_DENIED"),
            (Code::ResourceExhausted, 429, "RESOURCE_EXHAUSTED"),
            (Code::FailedPrecondition, 400, "FAILED_PRECONDITION"),
            (Code::Aborted, 409, "ABORTED"),
            (Code::OutOfRange, 400, "OUT_OF_RANGE"),
            (Code::Unimplemented, 501, "UNIMPLEMENTED"),
            (Code::Internal, 500, "INTERNAL"),
            (Code::Unavailable, 503, "UNAVAILABLE"),
            (Code::DataLoss, 500, "DATA_LOSS"),
            (Code::Unauthenticated, 401, "UNAUTHENTICATED"),
        ];
        for (number, (code, http, name)) in table.into_iter().enumerate() {
            assert_eq!(code as usize, number);
            assert_eq!(http_status(code).as_u16(), http, "{code:?}");
            assert_eq!(code_name(code), name);
        }
    }
}
