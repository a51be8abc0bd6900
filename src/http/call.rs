//! A call as it arrives over HTTP: who makes it, what its headers say, and its body.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{
        Extensions, HeaderMap, HeaderValue, StatusCode,
        header::{CONTENT_ENCODING, CONTENT_TYPE},
        request::Parts,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use tonic::{Status, metadata::MetadataMap};

use super::failure::Failure;
use crate::auth::Caller;

/// Enough of a complaint to see what is wrong.
const QUOTED_CHARS_MAX: usize = 300;

/// What a handler needs of a call besides its message.
pub(super) struct Call {
    /// What the layers outside have found out: who calls, from where, and for how long.
    extensions: Extensions,
    headers: HeaderMap,
}

impl Call {
    /// The call as gRPC has it. Without a caller the handler refuses it.
    pub(super) fn with<T>(self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        *request.metadata_mut() = MetadataMap::from_headers(self.headers);
        *request.extensions_mut() = self.extensions;
        request
    }

    /// Where a browser says which event it has seen last.
    pub(super) fn last_event_id(&self) -> Option<&HeaderValue> {
        self.headers.get("last-event-id")
    }

    pub(super) fn caller(&self) -> Option<&Caller> {
        self.extensions.get::<Arc<Caller>>().map(Arc::as_ref)
    }
}

impl<S: Sync> FromRequestParts<S> for Call {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        Ok(Self {
            extensions: parts.extensions.clone(),
            headers: parts.headers.clone(),
        })
    }
}

/// A JSON body, both ways.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        check_media_type(request.headers())?;
        let body = Bytes::from_request(request, state).await;
        let body = body.map_err(|rejection| {
            let reason = match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => "BODY_TOO_LONG",
                _ => "BODY_NOT_READ",
            };
            Failure::of_http(rejection.status(), reason, &rejection.body_text())
        })?;
        parse(&body).map(Self)
    }
}

/// Only JSON, and as it is: what is packed could be of any length.
fn check_media_type(headers: &HeaderMap) -> Result<(), Failure> {
    let unsupported = |reason, message| {
        Err(Failure::of_http(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            reason,
            message,
        ))
    };
    let is = |name, expected: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        let essence = value.and_then(|value| value.split(';').next());
        essence.is_some_and(|value| value.trim().eq_ignore_ascii_case(expected))
    };
    if !is(CONTENT_TYPE, "application/json") {
        return unsupported("NOT_JSON", "content-type: must be application/json");
    }
    if headers.contains_key(CONTENT_ENCODING) && !is(CONTENT_ENCODING, "identity") {
        return unsupported("BODY_ENCODED", "content-encoding: send the body as it is");
    }
    Ok(())
}

/// Names the field that is wrong, where it is JSON.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    const WHOLE: &str = "body";
    let malformed = |field: &str, error: &serde_json::Error| {
        Failure::malformed(&shortened(field), &shortened(&error.to_string()))
    };
    // serde would take a list of the fields' values, too.
    let first = body.iter().find(|byte| !byte.is_ascii_whitespace());
    if first.is_some_and(|byte| *byte != b'{') {
        return Err(Failure::malformed(WHOLE, "must be a JSON object"));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut deserializer);
    let parsed = parsed.map_err(|error| {
        let path = error.path().to_string();
        let is_whole = path == "." || !error.inner().is_data();
        malformed(if is_whole { WHOLE } else { &path }, error.inner())
    })?;
    let ended = deserializer.end();
    ended.map_err(|error| malformed(WHOLE, &error))?;
    Ok(parsed)
}

/// What is quoted of a request may be as long as it.
fn shortened(text: &str) -> String {
    let end = text.char_indices().nth(QUOTED_CHARS_MAX);
    match end {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl<T: Serialize> axum::response::IntoResponse for Json<T> {
    fn into_response(self) -> axum::response::Response {
        axum::Json(self.0).into_response()
    }
}

/// What stands in the path.
pub(super) struct InPath<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for InPath<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(path)) => Ok(Self(path)),
            Err(rejection) => Err(Failure::malformed(
                "path",
                &shortened(&rejection.body_text()),
            )),
        }
    }
}

/// What stands behind the question mark.
pub(super) struct InQuery<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for InQuery<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(query)) => Ok(Self(query)),
            Err(rejection) => Err(Failure::malformed(
                "query",
                &shortened(&rejection.body_text()),
            )),
        }
    }
}

/// What every handler ends with.
pub(super) fn answer<Message, Answer>(
    answered: Result<tonic::Response<Message>, Status>,
) -> Result<Json<Answer>, Failure>
where
    Answer: From<Message>,
{
    let message = answered.map_err(Failure::from)?.into_inner();
    Ok(Json(message.into()))
}
