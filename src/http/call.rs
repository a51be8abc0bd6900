//! A call as it arrives over HTTP: who makes it, what its headers say, and its body.

use std::sync::Arc;

use axum::{
    extract::{FromRequest, FromRequestParts, Path, Query, Request, rejection::JsonRejection},
    http::{HeaderMap, HeaderValue, request::Parts},
};
use serde::{Serialize, de::DeserializeOwned};
use tonic::{Status, metadata::MetadataMap};

use super::failure::Failure;
use crate::auth::Caller;

/// What a handler needs of a call besides its message.
pub(super) struct Call {
    caller: Option<Arc<Caller>>,
    headers: HeaderMap,
}

impl Call {
    /// The call as gRPC has it. Without a caller the handler refuses it.
    pub(super) fn with<T>(self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        *request.metadata_mut() = MetadataMap::from_headers(self.headers);
        if let Some(caller) = self.caller {
            request.extensions_mut().insert(caller);
        }
        request
    }

    /// Where a browser says which event it has seen last.
    pub(super) fn last_event_id(&self) -> Option<&HeaderValue> {
        self.headers.get("last-event-id")
    }

    pub(super) fn caller(&self) -> Option<&Caller> {
        self.caller.as_deref()
    }
}

impl<S: Sync> FromRequestParts<S> for Call {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        Ok(Self {
            caller: parts.extensions.get().cloned(),
            headers: parts.headers.clone(),
        })
    }
}

/// A JSON body, both ways.
pub(super) struct Json<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        match axum::Json::from_request(request, state).await {
            Ok(axum::Json(body)) => Ok(Self(body)),
            Err(rejection) => Err(match rejection {
                JsonRejection::BytesRejection(rejection) => {
                    Failure::of_http(rejection.status(), "BODY_NOT_READ", &rejection.body_text())
                }
                JsonRejection::MissingJsonContentType(rejection) => {
                    Failure::of_http(rejection.status(), "NOT_JSON", &rejection.body_text())
                }
                malformed => Failure::malformed("body", &malformed.body_text()),
            }),
        }
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
            Err(rejection) => Err(Failure::malformed("path", &rejection.body_text())),
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
            Err(rejection) => Err(Failure::malformed("query", &rejection.body_text())),
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
