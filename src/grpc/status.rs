//! The one place where errors become gRPC statuses.

use std::{collections::HashMap, time::Duration};

use prost::Message;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt, pb};

use crate::{
    audit::stream::StreamEnd,
    auth::{AuthError, Forbidden},
    check::CheckError,
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
pub(super) fn invalid(violations: Vec<FieldViolation>) -> Status {
    let message = violations
        .iter()
        .map(|violation| format!("{}: {}", violation.field, violation.description))
        .collect::<Vec<_>>()
        .join("; ");
    let mut details = ErrorDetails::with_bad_request(violations);
    details.set_error_info("INVALID_REQUEST", DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, message, details)
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
    let (code, reason) = match error {
        AuthError::Missing => (Code::Unauthenticated, "CREDENTIAL_MISSING"),
        AuthError::Invalid => (Code::Unauthenticated, "CREDENTIAL_INVALID"),
        AuthError::Expired => (Code::Unauthenticated, "CREDENTIAL_EXPIRED"),
        AuthError::Revoked => (Code::Unauthenticated, "CREDENTIAL_REVOKED"),
        AuthError::Unavailable => (Code::Unavailable, "CREDENTIALS_UNAVAILABLE"),
    };
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    if error == AuthError::Unavailable {
        details.set_retry_info(Some(RETRY_UNAVAILABLE));
    }
    Status::with_error_details(code, error.to_string(), details)
}

/// Who calls is known, and may not ask this.
pub(super) fn forbidden(forbidden: Forbidden) -> Status {
    let reason = match forbidden {
        Forbidden::Scope(_) => "SCOPE_MISSING",
        Forbidden::Organization => "ORGANIZATION_NOT_ALLOWED",
        Forbidden::User => "USER_NOT_ALLOWED",
        Forbidden::AllOrganizations => "ORGANIZATION_NOT_ALLOWED",
    };
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(Code::PermissionDenied, forbidden.to_string(), details)
}

/// Nobody serves this path.
pub(super) fn no_such_method() -> Status {
    let details = ErrorDetails::with_error_info("METHOD_UNKNOWN", DOMAIN, HashMap::new());
    Status::with_error_details(Code::Unimplemented, "no such method", details)
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
        StreamEnd::Slow => (Code::ResourceExhausted, "SLOW_CONSUMER"),
        StreamEnd::HistoryLost => (Code::DataLoss, "CURSOR_UNKNOWN"),
        StreamEnd::DatabaseAway => (Code::Unavailable, "DATABASE_UNAVAILABLE"),
        StreamEnd::Over => (Code::Unavailable, "STREAM_ENDED"),
    };
    let cursor = HashMap::from([("cursor".to_owned(), cursor.to_string())]);
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, cursor);
    if code != Code::DataLoss {
        details.set_retry_info(Some(RETRY_UNAVAILABLE));
    }
    Status::with_error_details(code, end.to_string(), details)
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
pub(super) fn internal() -> Status {
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
            AdminError::NotPossible(_) => (Code::FailedPrecondition, "NOT_POSSIBLE_HERE"),
            AdminError::Store(_) => (Code::Unavailable, "DATABASE_UNAVAILABLE"),
        };
        if let AdminError::Store(error) = error {
            return error.into();
        }
        let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
        Self::with_error_details(code, error.to_string(), details)
    }
}

/// A status as a message, for an item of a batch.
pub(super) fn to_message(status: &Status) -> pb::Status {
    // Details, where there are any, are a whole google.rpc.Status.
    let details = pb::Status::decode(status.details()).map(|whole| whole.details);
    pb::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: details.unwrap_or_default(),
    }
}
