//! The one place where errors become gRPC statuses.

use std::{collections::HashMap, time::Duration};

use prost::Message;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt, pb};

use super::permission_service::BATCH_ITEMS_MAX;
use crate::{
    audit::stream::StreamEnd,
    auth::{AuthError, Forbidden, standing::Lost},
    check::CheckError,
    limits::{Limit, Refusal},
    loader::LoadError,
    model::{Cursor, OrganizationId, Position},
    store::{StoreError, admin::AdminError},
};

const DOMAIN: &str = "hallpass";

/// When to try again while the database is away: reconnecting takes about that long.
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(1);

/// When to try again after being turned away: most queues are empty by then.
const RETRY_OVERLOADED: Duration = Duration::from_millis(100);

/// The request is malformed; names every field that is.
#[must_use]
pub fn invalid(violations: Vec<FieldViolation>) -> Status {
    let message = violations
        .iter()
        .map(|violation| format!("{}: {}", violation.field, violation.description))
        .collect::<Vec<_>>()
        .join("; ");
    let mut details = ErrorDetails::with_bad_request(violations);
    details.set_error_info("INVALID_REQUEST", DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// The request, or a part of it, cannot be read at all.
#[must_use]
pub fn malformed(part: &str, complaint: &str) -> Status {
    invalid(vec![FieldViolation::new(part, complaint)])
}

/// A failure that HTTP alone knows.
#[must_use]
pub fn of_http(reason: &str, message: &str) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// A batch of so many items, refused before any is looked at.
pub fn too_many_items(found: usize) -> Status {
    let description = format!("must be 1 to {BATCH_ITEMS_MAX} items, not {found}");
    invalid(vec![FieldViolation::new("items", description)])
}

/// There is no such organization.
pub(super) fn organization_not_found(organization: OrganizationId) -> Status {
    let details = ErrorDetails::with_error_info("ORGANIZATION_NOT_FOUND", DOMAIN, HashMap::new());
    Status::with_error_details(
        Code::NotFound,
        format!("no organization has the id {}", organization.0),
        details,
    )
}

/// A request that has not come through the gate: a defect, and nobody is let in by one.
pub(super) fn no_caller() -> Status {
    Status::internal("the caller is not known")
}

/// Who calls is not known, and has to be.
pub(super) fn unauthenticated(error: AuthError) -> Status {
    unauthenticated_with(error, HashMap::new())
}

fn unauthenticated_with(error: AuthError, metadata: HashMap<String, String>) -> Status {
    let (code, reason) = match error {
        AuthError::Missing => (Code::Unauthenticated, "CREDENTIAL_MISSING"),
        AuthError::Invalid => (Code::Unauthenticated, "CREDENTIAL_INVALID"),
        AuthError::Expired => (Code::Unauthenticated, "CREDENTIAL_EXPIRED"),
        AuthError::Revoked => (Code::Unauthenticated, "CREDENTIAL_REVOKED"),
        AuthError::Unavailable => (Code::Unavailable, "CREDENTIALS_UNAVAILABLE"),
    };
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    if error == AuthError::Unavailable {
        details.set_retry_info(Some(RETRY_UNAVAILABLE));
    }
    Status::with_error_details(code, error.to_string(), details)
}

/// Who calls is known, and may not ask this.
pub(super) fn forbidden(forbidden: Forbidden) -> Status {
    forbidden_with(forbidden, HashMap::new())
}

fn forbidden_with(forbidden: Forbidden, metadata: HashMap<String, String>) -> Status {
    let reason = match forbidden {
        Forbidden::Scope(_) => "SCOPE_MISSING",
        Forbidden::Organization => "ORGANIZATION_NOT_ALLOWED",
        Forbidden::User => "USER_NOT_ALLOWED",
        Forbidden::AllOrganizations => "ORGANIZATION_NOT_ALLOWED",
    };
    let details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    Status::with_error_details(Code::PermissionDenied, forbidden.to_string(), details)
}

/// Nobody serves this path.
pub fn no_such_method() -> Status {
    let details = ErrorDetails::with_error_info("METHOD_UNKNOWN", DOMAIN, HashMap::new());
    Status::with_error_details(Code::Unimplemented, "no such method", details)
}

/// The service, or the caller, has enough to do.
pub(super) fn refused(refusal: Refusal) -> Status {
    let (reason, metadata, retry) = match refusal {
        Refusal::Overloaded => ("OVERLOADED", HashMap::new(), RETRY_OVERLOADED),
        Refusal::TooManyAtOnce => {
            let limit = ("limit".to_owned(), Limit::CallerInFlight.name().to_owned());
            let metadata = HashMap::from([limit]);
            ("RATE_LIMITED", metadata, RETRY_OVERLOADED)
        }
        Refusal::TooMany { limit, retry_after } => {
            let limit = ("limit".to_owned(), limit.name().to_owned());
            ("RATE_LIMITED", HashMap::from([limit]), retry_after)
        }
    };
    let mut details = ErrorDetails::with_retry_info(Some(retry));
    details.set_error_info(reason, DOMAIN, metadata);
    Status::with_error_details(Code::ResourceExhausted, refusal.to_string(), details)
}

/// The call's time is up: the caller's own, or what a call may take.
pub(super) fn deadline_exceeded() -> Status {
    let details = ErrorDetails::with_error_info("DEADLINE_EXCEEDED", DOMAIN, HashMap::new());
    let message = "no answer within the call's deadline";
    Status::with_error_details(Code::DeadlineExceeded, message, details)
}

/// The stream has lived as long as a stream may.
pub(super) fn stream_too_old() -> Status {
    let mut details = ErrorDetails::with_error_info("STREAM_TOO_OLD", DOMAIN, HashMap::new());
    details.set_retry_info(Some(Duration::ZERO));
    Status::with_error_details(
        Code::Unavailable,
        "the stream has reached its greatest age: open another",
        details,
    )
}

/// The reason of ours that a status carries.
pub fn reason(status: &Status) -> String {
    let info = status.get_details_error_info();
    info.map_or_else(String::new, |info| info.reason)
}

impl From<CheckError> for Status {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::NotLoaded(error) => not_loaded(&error),
            CheckError::UnknownPosition(position) => unknown_position(position),
        }
    }
}

fn not_loaded(error: &LoadError) -> Status {
    let (code, reason, retry) = match error {
        LoadError::Unavailable => (Code::Unavailable, "DATABASE_UNAVAILABLE", RETRY_UNAVAILABLE),
        LoadError::Overloaded => (Code::ResourceExhausted, "OVERLOADED", RETRY_OVERLOADED),
    };
    let mut details = ErrorDetails::with_retry_info(Some(retry));
    details.set_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, error.to_string(), details)
}

/// The position was never given out by this database, or was lost: no answer can be known to include it.
fn unknown_position(position: Position) -> Status {
    let field = "consistency.at_least_as_fresh";
    let description = format!(
        "`{position}` is not in this database's history: it is another database's, or its commit was lost when \
         the database failed over or was restored; ask without it, with fully_consistent"
    );
    let message = format!("{field}: {description}");
    let mut details = ErrorDetails::with_bad_request_violation(field, description);
    details.set_error_info("POSITION_UNKNOWN", DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// A stream of audit entries ends; `cursor` is where to go on.
pub(super) fn stream_end(end: &StreamEnd, cursor: Cursor) -> Status {
    let (code, reason) = match end {
        StreamEnd::Slow(_) => (Code::ResourceExhausted, "SLOW_CONSUMER"),
        StreamEnd::HistoryLost => (Code::DataLoss, "CURSOR_UNKNOWN"),
        StreamEnd::DatabaseAway => (Code::Unavailable, "DATABASE_UNAVAILABLE"),
        StreamEnd::Over => (Code::Unavailable, "STREAM_ENDED"),
    };
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, metadata(cursor));
    if code != Code::DataLoss {
        details.set_retry_info(Some(RETRY_UNAVAILABLE));
    }
    Status::with_error_details(code, end.to_string(), details)
}

/// A stream of audit entries ends as a call with its credential would be answered; `cursor` is where to go on.
pub(super) fn stream_lost_standing(lost: Lost, cursor: Cursor) -> Status {
    match lost {
        Lost::Credential(error) => unauthenticated_with(error, metadata(cursor)),
        Lost::Forbidden(forbidden) => forbidden_with(forbidden, metadata(cursor)),
        // A new stream is of what it is for now, or hears that it is not for this.
        Lost::Changed => stream_end(&StreamEnd::Over, cursor),
    }
}

fn metadata(cursor: Cursor) -> HashMap<String, String> {
    HashMap::from([("cursor".to_owned(), cursor.to_string())])
}

/// A stream of audit entries whose task has ended without a word: a defect.
pub(super) fn stream_lost() -> Status {
    Status::internal("the stream was lost: go on from the last cursor")
}

/// There are as many streams as there may be.
pub(super) fn too_many_streams() -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(RETRY_UNAVAILABLE));
    details.set_error_info("TOO_MANY_STREAMS", DOMAIN, HashMap::new());
    Status::with_error_details(Code::ResourceExhausted, "too many audit streams", details)
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        tracing::warn!(%error, "the database did not answer a request");
        let error = LoadError::from(error);
        not_loaded(&error)
    }
}

/// A defect.
pub fn internal() -> Status {
    Status::internal("the server has failed")
}

/// Nobody changes anything through this service.
pub(super) fn admin_disabled() -> Status {
    let details = ErrorDetails::with_error_info("ADMIN_DISABLED", DOMAIN, HashMap::new());
    Status::with_error_details(
        Code::FailedPrecondition,
        "this service has no database login that may change anything: start it with --admin-database-url",
        details,
    )
}

impl From<AdminError> for Status {
    fn from(error: AdminError) -> Self {
        let (code, reason) = match &error {
            AdminError::OrganizationNotFound => (Code::NotFound, "ORGANIZATION_NOT_FOUND"),
            AdminError::PermissionNotFound(_) => (Code::NotFound, "PERMISSION_NOT_FOUND"),
            AdminError::MemberNotFound(_) => (Code::NotFound, "MEMBER_NOT_FOUND"),
            AdminError::RoleUnknown(_) => (Code::InvalidArgument, "ROLE_UNKNOWN"),
            AdminError::UpdatedMeanwhile(_) => (Code::Aborted, "UPDATED_MEANWHILE"),
            AdminError::Conflict => (Code::Aborted, "CONCURRENT_CHANGE"),
            AdminError::NotPossible(_) => (Code::FailedPrecondition, "NOT_POSSIBLE_HERE"),
            AdminError::OutcomeUnknown => (Code::Unavailable, "OUTCOME_UNKNOWN"),
            AdminError::PositionUnknown => (Code::Unavailable, "POSITION_UNKNOWN"),
            AdminError::Store(_) => (Code::Unavailable, "DATABASE_UNAVAILABLE"),
        };
        let retry = match error {
            AdminError::Store(error) => return error.into(),
            AdminError::Conflict => Some(Duration::ZERO),
            AdminError::OutcomeUnknown | AdminError::PositionUnknown => Some(RETRY_UNAVAILABLE),
            _ => None,
        };
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
        // To set none would set an empty one.
        if retry.is_some() {
            details.set_retry_info(retry);
        }
        Self::with_error_details(code, error.to_string(), details)
    }
}

/// A status as a message, for an item of a batch.
pub fn to_message(status: &Status) -> pb::Status {
    // Details, where there are any, are a whole google.rpc.Status.
    let details = pb::Status::decode(status.details()).map(|whole| whole.details);
    pb::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: details.unwrap_or_default(),
    }
}
