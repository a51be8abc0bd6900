//! On whose behalf a change is made, as headers say it: a DELETE has no body.
//!
//! Invariant: a header that cannot be read is refused, not passed over, so that no change is recorded as nobody's by mistake.

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, request::Parts},
};
use utoipa::IntoParams;

use crate::{grpc::v1, http::failure::Failure};

pub(super) const USER_ID: &str = "x-actor-user-id";
pub(super) const PROFILE_ID: &str = "x-actor-profile-id";
pub(super) const SESSION_ID: &str = "x-actor-session-id";

/// What pages of other origins have to be let send.
pub(in crate::http) const HEADERS: [&str; 3] = [USER_ID, PROFILE_ID, SESSION_ID];

/// On whose behalf: with a JWT its subject, and another user is refused; with an API key whom it names here.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "it describes what `OnBehalf` reads")]
pub(super) struct ActorHeaders {
    /// The user who makes the change, for the audit log.
    #[param(rename = "x-actor-user-id", format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7")]
    user_id: Option<String>,
    /// The user's profile, for the audit log.
    #[param(rename = "x-actor-profile-id", format = Uuid, example = "16fd2706-8baf-433b-82eb-8c7fada847da")]
    profile_id: Option<String>,
    /// The user's session, for the audit log: up to 1,024 bytes.
    #[param(rename = "x-actor-session-id", example = "session 3")]
    session_id: Option<String>,
}

/// The actor that the headers name; address and user agent are the request's own.
pub(super) struct OnBehalf(pub(super) Option<v1::Actor>);

impl<S: Sync> FromRequestParts<S> for OnBehalf {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        Ok(Self(Some(v1::Actor {
            user_id: text(&parts.headers, USER_ID)?,
            profile_id: text(&parts.headers, PROFILE_ID)?,
            session_id: text(&parts.headers, SESSION_ID)?,
            ..v1::Actor::default()
        })))
    }
}

/// Empty where there is none.
fn text(headers: &HeaderMap, name: &str) -> Result<String, Failure> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(String::new());
    };
    if values.next().is_some() {
        return Err(Failure::malformed(name, "is there twice"));
    }
    match value.to_str() {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(Failure::malformed(name, "must be visible ASCII")),
    }
}
