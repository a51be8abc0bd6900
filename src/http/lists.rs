//! `/v1/organizations/{organization_id}/...`: what a user may do there, and how the organization has set its permissions.

use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    Services,
    call::{Call, InPath, InQuery, Json, answer},
    evidence::{Consistency, Evidence, Reason},
    failure::Failure,
};
use crate::grpc::v1::{self, permission_service_server::PermissionService};

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct UserPath {
    #[param(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    organization_id: String,
    #[param(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7")]
    user_id: String,
}

#[derive(Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct UserPermissionsQuery {
    /// Only permissions of this module; empty for all.
    #[param(example = "events")]
    module: String,
    /// Only permissions that the user has.
    allowed_only: bool,
    /// Decided by the database, in a snapshot that begins after the request.
    fully_consistent: bool,
    /// Includes everything up to this position.
    #[param(example = "812-5f0c9ae1")]
    at_least_as_fresh: Option<String>,
    /// At most so many milliseconds old.
    #[param(example = 200)]
    max_staleness_ms: Option<u32>,
}

/// What a user may do in an organization.
#[derive(Serialize, ToSchema)]
pub(super) struct UserPermissions {
    /// Ordered by key. For a user who is no member all are denied.
    permissions: Vec<UserPermission>,
    /// The user's role in the organization; empty for a user who is no member.
    #[schema(example = "board_member")]
    role: String,
    evidence: Evidence,
}

/// One permission as it stands for one user.
#[derive(Serialize, ToSchema)]
struct UserPermission {
    #[schema(example = "can_create_events")]
    permission: String,
    /// For people.
    #[schema(example = "Create events")]
    name: String,
    #[schema(example = "events")]
    module: String,
    allowed: bool,
    reason: Reason,
    /// The lowest role that the permission asks for in this organization; empty for a user who is no member.
    #[schema(example = "committee_lead")]
    effective_min_role: String,
    /// False when the organization has disabled the permission; false for a user who is no member.
    enabled: bool,
}

impl From<v1::ListUserPermissionsResponse> for UserPermissions {
    fn from(response: v1::ListUserPermissionsResponse) -> Self {
        let permissions = response
            .permissions
            .into_iter()
            .map(|permission| UserPermission {
                reason: permission.reason().into(),
                permission: permission.permission,
                name: permission.name,
                module: permission.module,
                allowed: permission.allowed,
                effective_min_role: permission.effective_min_role,
                enabled: permission.enabled,
            });
        Self {
            permissions: permissions.collect(),
            role: response.role,
            evidence: response.evidence.unwrap_or_default().into(),
        }
    }
}

/// What may this user do in this organization?
#[utoipa::path(
    get,
    path = "/v1/organizations/{organization_id}/users/{user_id}/permissions",
    tag = "Lists",
    params(UserPath, UserPermissionsQuery),
    responses(
        (status = 200, description = "Every permission, as it stands for the user", body = UserPermissions),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
pub(super) async fn user_permissions(
    State(services): State<Services>,
    call: Call,
    InPath(path): InPath<UserPath>,
    InQuery(query): InQuery<UserPermissionsQuery>,
) -> Result<Json<UserPermissions>, Failure> {
    let consistency = Consistency {
        fully_consistent: query.fully_consistent,
        at_least_as_fresh: query.at_least_as_fresh,
        max_staleness_ms: query.max_staleness_ms,
    };
    let request = call.with(v1::ListUserPermissionsRequest {
        organization_id: path.organization_id,
        user_id: path.user_id,
        module: query.module,
        allowed_only: query.allowed_only,
        consistency: consistency.into_message(),
    });
    answer(services.permissions.list_user_permissions(request).await)
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
pub(super) struct OrganizationPath {
    #[param(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    organization_id: String,
}

/// How an organization has set its permissions.
#[derive(Serialize, ToSchema)]
pub(super) struct Summary {
    summary: OrganizationSummary,
    evidence: Evidence,
}

/// Counts the permissions of the catalog, and among them the custom ones: those that the organization has a setting of
/// its own for.
#[derive(Serialize, ToSchema)]
struct OrganizationSummary {
    #[schema(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    organization_id: String,
    #[schema(example = "Lincoln Elementary PTO")]
    organization_name: String,
    /// Permissions of the catalog.
    #[schema(example = 42)]
    total_available_permissions: i32,
    /// Custom ones among them.
    #[schema(example = 7)]
    total_custom_permissions: i32,
    /// Custom and enabled; a setting that does not say is enabled.
    #[schema(example = 6)]
    enabled_custom_permissions: i32,
    /// Custom and disabled.
    #[schema(example = 1)]
    disabled_custom_permissions: i32,
    /// Custom, enabled or not, with a minimum role of its own: `admin`.
    #[schema(example = 2)]
    admin_only_permissions: i32,
    /// Custom, enabled or not, with a minimum role of its own: `board_member`.
    #[schema(example = 3)]
    board_member_permissions: i32,
    /// Custom, enabled or not, with a minimum role of its own: `committee_lead`.
    #[schema(example = 1)]
    committee_lead_permissions: i32,
    /// Custom, enabled or not, with a minimum role of its own: `volunteer`.
    #[schema(example = 0)]
    volunteer_permissions: i32,
    /// The newest `updated_at` among the custom ones; null without any.
    #[schema(format = DateTime, example = "2026-03-02T08:15:00.25Z")]
    last_permission_update: Option<String>,
}

impl From<v1::GetOrganizationSummaryResponse> for Summary {
    fn from(response: v1::GetOrganizationSummaryResponse) -> Self {
        let summary = response.summary.unwrap_or_default();
        Self {
            summary: OrganizationSummary {
                organization_id: summary.organization_id,
                organization_name: summary.organization_name,
                total_available_permissions: summary.total_available_permissions,
                total_custom_permissions: summary.total_custom_permissions,
                enabled_custom_permissions: summary.enabled_custom_permissions,
                disabled_custom_permissions: summary.disabled_custom_permissions,
                admin_only_permissions: summary.admin_only_permissions,
                board_member_permissions: summary.board_member_permissions,
                committee_lead_permissions: summary.committee_lead_permissions,
                volunteer_permissions: summary.volunteer_permissions,
                last_permission_update: summary.last_permission_update.map(|at| at.to_string()),
            },
            evidence: response.evidence.unwrap_or_default().into(),
        }
    }
}

/// How has this organization set its permissions?
#[utoipa::path(
    get,
    path = "/v1/organizations/{organization_id}/summary",
    tag = "Lists",
    params(OrganizationPath, Consistency),
    responses(
        (status = 200, description = "The counts", body = Summary),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
pub(super) async fn summary(
    State(services): State<Services>,
    call: Call,
    InPath(path): InPath<OrganizationPath>,
    InQuery(consistency): InQuery<Consistency>,
) -> Result<Json<Summary>, Failure> {
    let request = call.with(v1::GetOrganizationSummaryRequest {
        organization_id: path.organization_id,
        consistency: consistency.into_message(),
    });
    answer(services.permissions.get_organization_summary(request).await)
}
