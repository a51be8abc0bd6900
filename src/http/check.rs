//! `/v1/check`: may this user do this in this organization?

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Services,
    call::{Call, Json, answer},
    evidence::{Consistency, Evidence, Reason},
    failure::Failure,
};
use crate::grpc::v1::{self, permission_service_server::PermissionService};

/// A question.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckRequest {
    #[schema(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    organization_id: String,
    #[schema(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7")]
    user_id: String,
    #[schema(example = "can_create_events")]
    permission: String,
    #[serde(default)]
    consistency: Consistency,
    /// Say how the decision came about.
    #[serde(default)]
    explain: bool,
}

impl From<CheckRequest> for v1::CheckPermissionRequest {
    fn from(request: CheckRequest) -> Self {
        Self {
            organization_id: request.organization_id,
            user_id: request.user_id,
            permission: request.permission,
            consistency: request.consistency.into_message(),
            explain: request.explain,
        }
    }
}

/// A decision.
#[derive(Serialize, ToSchema)]
pub(super) struct CheckAnswer {
    allowed: bool,
    reason: Reason,
    evidence: Evidence,
    /// Where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    explanation: Option<Explanation>,
}

impl From<v1::CheckPermissionResponse> for CheckAnswer {
    fn from(response: v1::CheckPermissionResponse) -> Self {
        Self {
            allowed: response.allowed,
            reason: response.reason().into(),
            evidence: response.evidence.unwrap_or_default().into(),
            explanation: response.explanation.map(Into::into),
        }
    }
}

/// The facts behind a decision, read in one snapshot with it.
#[derive(Serialize, ToSchema)]
pub(super) struct Explanation {
    /// The user's role in the organization; empty for a user who is no member.
    #[schema(example = "board_member")]
    role: String,
    /// The role's rank on the ladder; null where the ladder does not know the role.
    role_rank: Option<i32>,
    /// The lowest role that the permission asks for in this organization; empty for an unknown permission.
    #[schema(example = "committee_lead")]
    effective_min_role: String,
    /// Where `effective_min_role` comes from; null for an unknown permission.
    min_role_source: Option<MinRoleSource>,
    /// False when the organization has disabled the permission.
    enabled: bool,
    /// Whether the organization grants the permission to this user by name.
    specific_user: bool,
}

#[derive(Serialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum MinRoleSource {
    /// The permission's template.
    Template,
    /// The organization's own override.
    Override,
}

impl From<v1::Explanation> for Explanation {
    fn from(explanation: v1::Explanation) -> Self {
        let min_role_source = match explanation.min_role_source() {
            v1::MinRoleSource::Unspecified => None,
            v1::MinRoleSource::Template => Some(MinRoleSource::Template),
            v1::MinRoleSource::Override => Some(MinRoleSource::Override),
        };
        Self {
            role: explanation.role,
            role_rank: explanation.role_rank,
            effective_min_role: explanation.effective_min_role,
            min_role_source,
            enabled: explanation.enabled,
            specific_user: explanation.specific_user,
        }
    }
}

/// May this user do this in this organization?
#[utoipa::path(
    post,
    path = "/v1/check",
    tag = "Checks",
    request_body = CheckRequest,
    responses(
        (status = 200, description = "The decision; a denial is one too", body = CheckAnswer),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
pub(super) async fn check(
    State(services): State<Services>,
    call: Call,
    Json(request): Json<CheckRequest>,
) -> Result<Json<CheckAnswer>, Failure> {
    let request = call.with(request.into());
    answer(services.permissions.check_permission(request).await)
}
