//! How fresh an answer is asked for, and what an answer says of itself, as JSON.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::grpc::v1::{self, consistency::Requirement};

/// How fresh an answer must be: one of these. Without any, the cache may answer as long as it is within the server's bound.
#[derive(Default, Deserialize, IntoParams, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Consistency {
    /// Decided by the database, in a snapshot that begins after the request.
    pub(super) fully_consistent: bool,
    /// Includes everything up to this position.
    #[schema(example = "812-5f0c9ae1")]
    pub(super) at_least_as_fresh: Option<String>,
    /// At most so many milliseconds old.
    #[schema(example = 200)]
    pub(super) max_staleness_ms: Option<u32>,
}

impl Consistency {
    /// As gRPC has it, where one requirement excludes the others: several fit none.
    pub(super) fn into_message(self) -> Option<v1::Consistency> {
        let several = v1::Consistency { requirement: None };
        let one = |requirement| {
            Some(v1::Consistency {
                requirement: Some(requirement),
            })
        };
        match (
            self.fully_consistent,
            self.at_least_as_fresh,
            self.max_staleness_ms,
        ) {
            (false, None, None) => None,
            (true, None, None) => one(Requirement::FullyConsistent(true)),
            (false, Some(position), None) => one(Requirement::AtLeastAsFresh(position)),
            (false, None, Some(milliseconds)) => {
                one(Requirement::MaxStaleness(duration(milliseconds)))
            }
            _ => Some(several),
        }
    }
}

fn duration(milliseconds: u32) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::from(milliseconds / 1_000),
        nanos: i32::try_from(milliseconds % 1_000 * 1_000_000).unwrap_or(0),
    }
}

/// What an answer was made from.
#[derive(Serialize, ToSchema)]
pub(super) struct Evidence {
    /// The answer is at least as new as this position in the log.
    #[schema(example = "812-5f0c9ae1")]
    position: String,
    source: Source,
    /// The answer was true at some instant no more milliseconds ago than these, when the request arrived.
    #[schema(example = 1.25)]
    staleness_ms: f64,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Source {
    /// A query made for this request, or joined by it.
    Database,
    /// The in-process cache.
    Cache,
}

impl From<v1::Evidence> for Evidence {
    fn from(evidence: v1::Evidence) -> Self {
        let staleness = evidence.staleness.unwrap_or_default();
        let source = match evidence.source() {
            v1::Source::Cache => Source::Cache,
            v1::Source::Database | v1::Source::Unspecified => Source::Database,
        };
        // A fraction of a millisecond in a double is exact enough for years.
        #[expect(clippy::cast_precision_loss, reason = "milliseconds of an age")]
        let staleness_ms = staleness.seconds as f64 * 1e3 + f64::from(staleness.nanos) / 1e6;
        Self {
            position: evidence.position,
            source,
            staleness_ms,
        }
    }
}

/// Why a user may, or may not.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum Reason {
    UnknownPermission,
    NotAMember,
    PermissionDisabled,
    GrantedByRole,
    GrantedToUser,
    RoleTooLow,
}

impl From<v1::Reason> for Reason {
    fn from(reason: v1::Reason) -> Self {
        match reason {
            // Our own handlers always say why; a reason that allows must not be made up.
            v1::Reason::UnknownPermission | v1::Reason::Unspecified => Self::UnknownPermission,
            v1::Reason::NotAMember => Self::NotAMember,
            v1::Reason::PermissionDisabled => Self::PermissionDisabled,
            v1::Reason::GrantedByRole => Self::GrantedByRole,
            v1::Reason::GrantedToUser => Self::GrantedToUser,
            v1::Reason::RoleTooLow => Self::RoleTooLow,
        }
    }
}
