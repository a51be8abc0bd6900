//! PTO Connect's admin calls, in its shapes: an organization's permissions read and changed.
//!
//! Invariant: each change is one call of the admin service, so that it is all or nothing and the rules are gRPC's.

pub(super) mod actor;
mod outcome;
mod shapes;

use axum::{extract::State, http::StatusCode};
use tonic::Status;
use tonic_types::{FieldViolation, StatusExt};
use utoipa_axum::{router::OpenApiRouter, routes};

use self::{
    actor::{ActorHeaders, OnBehalf},
    outcome::{BulkSet, Overridden, Reset, SetAnswer},
    shapes::{
        BulkUpdate, ChangeQuery, Listed, MemberPermissions, OrganizationQuery, PutSetting, Setting,
        Templates, UserOverridesBody,
    },
};
use super::{
    Services,
    call::{Call, InPath, InQuery, Json},
    failure::Failure,
};
use crate::grpc::{
    admin_service::UserOverrides,
    status,
    v1::{
        self, admin_service_server::AdminService, consistency::Requirement,
        permission_service_server::PermissionService,
    },
};

pub(super) fn routes() -> OpenApiRouter<Services> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(templates))
        .routes(routes!(set, reset))
        .routes(routes!(bulk_update))
        .routes(routes!(user))
        .routes(routes!(user_overrides))
}

/// The catalog as it stands for an organization: each template, merged with the organization's own setting.
#[utoipa::path(
    get,
    path = "/api/admin/organization-permissions",
    operation_id = "list_organization_permissions",
    tag = "Organization permissions",
    params(OrganizationQuery),
    responses(
        (status = 200, description = "The permissions, by key and by module", body = Listed),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
async fn list(
    State(services): State<Services>,
    call: Call,
    InQuery(query): InQuery<OrganizationQuery>,
) -> Result<Json<Listed>, Failure> {
    let organization_id = organization(&call, query.organization_id)?;
    let listed = settings(&services, call, &organization_id).await?;
    Ok(Json(Listed::new(organization_id, listed)))
}

/// The catalog that all organizations share, without their own settings.
#[utoipa::path(
    get,
    path = "/api/admin/organization-permissions/templates",
    tag = "Organization permissions",
    params(OrganizationQuery),
    responses(
        (status = 200, description = "The templates, by key and by module", body = Templates),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
async fn templates(
    State(services): State<Services>,
    call: Call,
    InQuery(query): InQuery<OrganizationQuery>,
) -> Result<Json<Templates>, Failure> {
    let organization_id = organization(&call, query.organization_id)?;
    let listed = settings(&services, call, &organization_id).await?;
    Ok(Json(listed.into()))
}

/// Puts an organization's own setting in the place of what it had.
#[utoipa::path(
    put,
    path = "/api/admin/organization-permissions/{permission}",
    tag = "Organization permissions",
    params(
        ("permission" = String, Path, description = "The permission's key", example = "can_approve_expenses"),
        OrganizationQuery,
        ActorHeaders,
    ),
    request_body(
        content = PutSetting,
        example = json!({"min_role_required": "committee_lead", "is_enabled": true, "validate_only": true}),
    ),
    responses(
        (status = 200, description = "What was set, or with `validate_only` would be", body = SetAnswer),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
async fn set(
    State(services): State<Services>,
    call: Call,
    OnBehalf(actor): OnBehalf,
    InPath(permission): InPath<String>,
    InQuery(query): InQuery<OrganizationQuery>,
    Json(body): Json<PutSetting>,
) -> Result<Json<SetAnswer>, Failure> {
    let organization_id = organization(&call, query.organization_id)?;
    let (setting, expected_updated_at, validate_only) = body.into_parts();
    let set = Setting::new(&organization_id, &permission, &setting);
    let message = v1::SetOrganizationPermissionRequest {
        organization_id,
        permission,
        setting: Some(setting),
        expected_updated_at,
        actor,
        validate_only,
    };
    let made = services
        .admin
        .set_organization_permission(call.with(message));
    let made = made.await.map_err(in_json_s_names)?.into_inner();
    Ok(Json(SetAnswer::new(set, made.outcome)))
}

/// Removes an organization's own setting: the template's applies again.
#[utoipa::path(
    delete,
    path = "/api/admin/organization-permissions/{permission}",
    tag = "Organization permissions",
    params(
        ("permission" = String, Path, description = "The permission's key", example = "can_approve_expenses"),
        ChangeQuery,
        ActorHeaders,
    ),
    responses(
        (status = 200, description = "It was reset, or with `validate_only` would be", body = Reset),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
async fn reset(
    State(services): State<Services>,
    call: Call,
    OnBehalf(actor): OnBehalf,
    InPath(permission): InPath<String>,
    InQuery(query): InQuery<ChangeQuery>,
) -> Result<Json<Reset>, Failure> {
    let message = v1::ResetOrganizationPermissionRequest {
        organization_id: organization(&call, query.organization_id)?,
        permission,
        expected_updated_at: query.expected_updated_at,
        actor,
        validate_only: query.validate_only,
    };
    let made = services
        .admin
        .reset_organization_permission(call.with(message));
    let made = made.await.map_err(in_json_s_names)?.into_inner();
    Ok(Json(Reset::new(made.outcome)))
}

/// Puts several settings at once: all of them, or none.
#[utoipa::path(
    post,
    path = "/api/admin/organization-permissions/bulk-update",
    tag = "Organization permissions",
    params(OrganizationQuery, ActorHeaders),
    request_body = BulkUpdate,
    responses(
        (status = 200, description = "What was set, or with `validate_only` would be", body = BulkSet),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
async fn bulk_update(
    State(services): State<Services>,
    call: Call,
    OnBehalf(actor): OnBehalf,
    InQuery(query): InQuery<OrganizationQuery>,
    Json(body): Json<BulkUpdate>,
) -> Result<Json<BulkSet>, Failure> {
    let organization_id = organization(&call, query.organization_id)?;
    let (items, validate_only) = body.into_parts();
    let set = Setting::of_items(&organization_id, &items);
    let message = v1::BulkSetOrganizationPermissionsRequest {
        items,
        organization_id,
        actor,
        validate_only,
    };
    let admin = &services.admin;
    let made = admin.bulk_set_organization_permissions(call.with(message));
    let made = made.await.map_err(in_json_s_names)?.into_inner();
    Ok(Json(BulkSet::new(set, made.outcome)))
}

/// All permissions of a member, read from the database for this call.
#[utoipa::path(
    get,
    path = "/api/admin/organization-permissions/user/{user_id}",
    tag = "Organization permissions",
    params(
        ("user_id" = String, Path, format = Uuid, description = "A member of the organization", example = "7c9e6679-7425-40de-944b-e07fc1f90ae7"),
        OrganizationQuery,
    ),
    responses(
        (status = 200, description = "The member's permissions, by module", body = MemberPermissions),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
async fn user(
    State(services): State<Services>,
    call: Call,
    InPath(user_id): InPath<String>,
    InQuery(query): InQuery<OrganizationQuery>,
) -> Result<Json<MemberPermissions>, Failure> {
    let organization_id = organization(&call, query.organization_id)?;
    let message = v1::ListUserPermissionsRequest {
        organization_id: organization_id.clone(),
        user_id: user_id.clone(),
        // Whoever has just changed something looks here at what it came to.
        consistency: Some(v1::Consistency {
            requirement: Some(Requirement::FullyConsistent(true)),
        }),
        ..v1::ListUserPermissionsRequest::default()
    };
    let listed = services
        .permissions
        .list_user_permissions(call.with(message));
    let listed = listed.await.map_err(Failure::from)?.into_inner();
    let permissions = MemberPermissions::of_member(organization_id, user_id, listed);
    permissions.map(Json).ok_or_else(|| {
        let message = "the user is no member of the organization";
        Failure::of_http(StatusCode::NOT_FOUND, "MEMBER_NOT_FOUND", message)
    })
}

/// Gives users permissions by name, whatever their roles, or takes back what they have by name: all of it, or nothing.
#[utoipa::path(
    post,
    path = "/api/admin/organization-permissions/user-overrides",
    tag = "Organization permissions",
    params(OrganizationQuery, ActorHeaders),
    request_body = UserOverridesBody,
    responses(
        (status = 200, description = "It was done, or with `validate_only` would be", body = Overridden),
        (status = "4XX", response = super::openapi::Refused),
        (status = "5XX", response = super::openapi::Failed),
    ),
)]
async fn user_overrides(
    State(services): State<Services>,
    call: Call,
    OnBehalf(actor): OnBehalf,
    InQuery(query): InQuery<OrganizationQuery>,
    Json(body): Json<UserOverridesBody>,
) -> Result<Json<Overridden>, Failure> {
    let organization_id = organization(&call, query.organization_id)?;
    let (overrides, validate_only) = body.into_parts();
    let count = overrides.len();
    let message = UserOverrides {
        organization_id,
        overrides,
        actor,
        validate_only,
    };
    let made = services.admin.set_user_overrides(call.with(message)).await;
    let outcome = made.map_err(in_json_s_names)?;
    Ok(Json(Overridden::new(count, outcome)))
}

/// The organization that is meant: the one that the request names, else the only one that the credential is for.
fn organization(call: &Call, named: Option<String>) -> Result<String, Failure> {
    let listed = call
        .caller()
        .and_then(|caller| caller.organizations.listed());
    match (named, listed) {
        (Some(named), _) => Ok(named),
        (None, Some([only])) => Ok(only.0.to_string()),
        (None, _) => Err(Failure::malformed(
            "organization_id",
            "is missing: name it in the query, for the credential is not for exactly one",
        )),
    }
}

async fn settings(
    services: &Services,
    call: Call,
    organization_id: &str,
) -> Result<v1::ListOrganizationPermissionsResponse, Failure> {
    let message = v1::ListOrganizationPermissionsRequest {
        organization_id: organization_id.to_owned(),
        module: String::new(),
    };
    let admin = &services.admin;
    let listed = admin
        .list_organization_permissions(call.with(message))
        .await;
    Ok(listed?.into_inner())
}

/// What gRPC's fields are called here.
const NAMES: [(&str, &str); 7] = [
    ("items", "permissions"),
    ("].permission", "].permission_key"),
    ("setting.min_role", "min_role_required"),
    ("setting.specific_user_ids", "specific_users"),
    ("actor.user_id", actor::USER_ID),
    ("actor.profile_id", actor::PROFILE_ID),
    ("actor.session_id", actor::SESSION_ID),
];

/// A refusal that names the wrong fields as the caller has written them.
fn in_json_s_names(status: Status) -> Failure {
    match status.get_details_bad_request() {
        Some(bad) if status::reason(&status) == "INVALID_REQUEST" => {
            let violations = bad.field_violations.into_iter().map(|violation| {
                let field = NAMES.iter().fold(violation.field, |field, (theirs, ours)| {
                    field.replace(theirs, ours)
                });
                FieldViolation::new(field, violation.description)
            });
            status::invalid(violations.collect()).into()
        }
        _ => status.into(),
    }
}
