//! `hallpass.v1.PermissionService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use tonic_types::FieldViolation;
use uuid::Uuid;

use super::{status, v1};
use crate::{
    check::{Checker, Evidence, Freshness, Known, Source},
    loader::LoadError,
    model::{
        BootTime, Membership, OrganizationId, PermissionTemplate, Reason, Subject,
        SubjectPermissions, UserId,
    },
    store::load::Explanation,
};

/// Items of a batch: what one statement answers in about a second when nothing is cached.
pub const BATCH_ITEMS_MAX: usize = 10_000;

/// Bytes of a permission key or module name.
pub const KEY_BYTES_MAX: usize = 255;

/// Malformed items of a batch whose errors have details. More would make an answer that clients refuse, who take 4 MiB.
const DETAILED_ITEMS_MAX: usize = 1_000;

/// Bytes of user input that a message repeats.
const SHOWN_BYTES_MAX: usize = 64;

/// Serves checks.
pub struct PermissionService {
    checker: Arc<Checker>,
}

impl PermissionService {
    #[must_use]
    pub fn new(checker: Arc<Checker>) -> Self {
        Self { checker }
    }
}

#[tonic::async_trait]
impl v1::permission_service_server::PermissionService for PermissionService {
    async fn check_permission(
        &self,
        request: Request<v1::CheckPermissionRequest>,
    ) -> Result<Response<v1::CheckPermissionResponse>, Status> {
        let arrived = BootTime::now();
        let request = request.into_inner();
        let mut wrong = Vec::new();
        let subject = subject(&mut wrong, "", &request.organization_id, &request.user_id);
        check_key(&mut wrong, format_args!("permission"), &request.permission);
        let freshness = freshness(&mut wrong, request.consistency)?;
        let (Some(subject), true) = (subject, wrong.is_empty()) else {
            return Err(status::invalid(wrong));
        };
        if request.explain {
            let (explanation, evidence) = self
                .checker
                .explain(subject, &request.permission, arrived)
                .await?;
            return Ok(Response::new(explained_response(explanation, evidence)));
        }
        let known = self.checker.know(subject, freshness, arrived).await?;
        let reason = known.decide(&request.permission);
        Ok(Response::new(v1::CheckPermissionResponse {
            allowed: reason.allows(),
            reason: v1::Reason::from(reason).into(),
            evidence: Some(known.evidence.into()),
            explanation: None,
        }))
    }

    async fn batch_check_permissions(
        &self,
        request: Request<v1::BatchCheckPermissionsRequest>,
    ) -> Result<Response<v1::BatchCheckPermissionsResponse>, Status> {
        let arrived = BootTime::now();
        let request = request.into_inner();
        let mut wrong = Vec::new();
        if request.items.is_empty() || request.items.len() > BATCH_ITEMS_MAX {
            let found = request.items.len();
            violation(
                &mut wrong,
                "items",
                format!("must be 1 to {BATCH_ITEMS_MAX} items, not {found}"),
            );
        }
        let freshness = freshness(&mut wrong, request.consistency)?;
        if !wrong.is_empty() {
            return Err(status::invalid(wrong));
        }
        let parsed: Vec<Result<Subject, Status>> =
            request.items.iter().enumerate().map(parse_item).collect();
        let subjects: Vec<Subject> = parsed
            .iter()
            .filter_map(|item| item.as_ref().ok().copied())
            .collect();
        let mut known = self
            .checker
            .know_all(&subjects, freshness, arrived)
            .await
            .into_iter();
        let mut evidence = None;
        let mut failure = None;
        let mut malformed = 0;
        let mut results = Vec::with_capacity(parsed.len());
        for (item, parsed) in request.items.iter().zip(parsed) {
            let answer = match parsed {
                Ok(_) => known
                    .next()
                    .unwrap_or(Err(LoadError::Unavailable))
                    .map_err(|error| {
                        failure = Some(error.clone());
                        error.into()
                    }),
                Err(status) => {
                    malformed += 1;
                    Err(if malformed <= DETAILED_ITEMS_MAX {
                        status
                    } else {
                        Status::new(status.code(), status.message())
                    })
                }
            };
            if let Ok(known) = &answer {
                evidence = Some(
                    evidence.map_or(known.evidence, |least: Evidence| least.min(known.evidence)),
                );
            }
            results.push(batch_result(answer, &item.permission));
        }
        // Nothing was answered and trying again may help: the call says so as a whole.
        if let (None, Some(error)) = (evidence, failure) {
            return Err(error.into());
        }
        Ok(Response::new(v1::BatchCheckPermissionsResponse {
            results,
            evidence: evidence.map(Into::into),
        }))
    }

    async fn list_user_permissions(
        &self,
        request: Request<v1::ListUserPermissionsRequest>,
    ) -> Result<Response<v1::ListUserPermissionsResponse>, Status> {
        let arrived = BootTime::now();
        let request = request.into_inner();
        let mut wrong = Vec::new();
        let subject = subject(&mut wrong, "", &request.organization_id, &request.user_id);
        if !request.module.is_empty() {
            check_key(&mut wrong, format_args!("module"), &request.module);
        }
        let freshness = freshness(&mut wrong, request.consistency)?;
        let (Some(subject), true) = (subject, wrong.is_empty()) else {
            return Err(status::invalid(wrong));
        };
        let known = self.checker.know(subject, freshness, arrived).await?;
        let permissions = list(known.permissions())
            .filter(|permission| request.module.is_empty() || permission.module == request.module)
            .filter(|permission| permission.allowed || !request.allowed_only)
            .collect();
        let membership = known.permissions().membership.as_ref();
        Ok(Response::new(v1::ListUserPermissionsResponse {
            permissions,
            role: membership.map_or_else(String::new, |membership| membership.role.to_string()),
            evidence: Some(known.evidence.into()),
        }))
    }
}

fn violation(
    wrong: &mut Vec<FieldViolation>,
    field: impl Into<String>,
    description: impl Into<String>,
) {
    wrong.push(FieldViolation::new(field, description));
}

/// Parses both ids, so that a caller hears of both when both are wrong.
fn subject(
    wrong: &mut Vec<FieldViolation>,
    prefix: &str,
    organization: &str,
    user: &str,
) -> Option<Subject> {
    let organization = id(wrong, format_args!("{prefix}organization_id"), organization);
    let user = id(wrong, format_args!("{prefix}user_id"), user);
    Some(Subject {
        organization: OrganizationId(organization?),
        user: UserId(user?),
    })
}

/// Only the hyphenated form: it is what PostgreSQL prints, and one id must not have two spellings in a log.
fn id(
    wrong: &mut Vec<FieldViolation>,
    field: std::fmt::Arguments<'_>,
    value: &str,
) -> Option<Uuid> {
    const HYPHENATED: usize = uuid::fmt::Hyphenated::LENGTH;
    match Uuid::try_parse(value) {
        Ok(id) if value.len() == HYPHENATED => Some(id),
        _ if value.is_empty() => {
            violation(wrong, field.to_string(), "is missing: a hyphenated UUID");
            None
        }
        _ => {
            violation(
                wrong,
                field.to_string(),
                format!("must be a hyphenated UUID, not `{}`", shown(value)),
            );
            None
        }
    }
}

/// User input for a message: short and on one line.
fn shown(value: &str) -> String {
    let mut shown = String::new();
    for c in value.escape_debug() {
        if shown.len() + c.len_utf8() > SHOWN_BYTES_MAX {
            break;
        }
        shown.push(c);
    }
    shown
}

/// A permission's or a module's key, as far as PostgreSQL can hold it.
fn check_key(wrong: &mut Vec<FieldViolation>, field: std::fmt::Arguments<'_>, key: &str) {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        let found = key.len();
        violation(
            wrong,
            field.to_string(),
            format!("must be 1 to {KEY_BYTES_MAX} bytes, not {found}"),
        );
    } else if key.contains('\0') {
        violation(wrong, field.to_string(), "must not contain a NUL character");
    }
}

/// The mode asked for. A mode that is in the contract but not served is an error of its own kind.
fn freshness(
    wrong: &mut Vec<FieldViolation>,
    consistency: Option<v1::Consistency>,
) -> Result<Freshness, Status> {
    use v1::consistency::Requirement;
    let Some(consistency) = consistency else {
        return Ok(Freshness::MinimizeLatency);
    };
    match consistency.requirement {
        Some(Requirement::MinimizeLatency(true)) => {}
        Some(Requirement::FullyConsistent(true)) => return Ok(Freshness::FullyConsistent),
        Some(Requirement::MaxStaleness(_)) => return Err(status::not_served("max_staleness")),
        Some(Requirement::AtLeastAsFresh(_)) => {
            return Err(status::not_served("at_least_as_fresh"));
        }
        Some(Requirement::MinimizeLatency(false)) => {
            violation(
                wrong,
                "consistency.minimize_latency",
                "must be true when set",
            );
        }
        Some(Requirement::FullyConsistent(false)) => {
            violation(
                wrong,
                "consistency.fully_consistent",
                "must be true when set",
            );
        }
        None => violation(
            wrong,
            "consistency",
            "holds no requirement that this server knows",
        ),
    }
    Ok(Freshness::MinimizeLatency)
}

fn parse_item((index, item): (usize, &v1::BatchCheckPermissionsItem)) -> Result<Subject, Status> {
    let mut wrong = Vec::new();
    let prefix = format!("items[{index}].");
    let subject = subject(&mut wrong, &prefix, &item.organization_id, &item.user_id);
    check_key(
        &mut wrong,
        format_args!("{prefix}permission"),
        &item.permission,
    );
    match subject {
        Some(subject) if wrong.is_empty() => Ok(subject),
        _ => Err(status::invalid(wrong)),
    }
}

fn batch_result(
    answer: Result<Known, Status>,
    permission: &str,
) -> v1::BatchCheckPermissionsResult {
    use v1::batch_check_permissions_result::Result as Outcome;
    let outcome = match answer {
        Ok(known) => {
            let reason = known.decide(permission);
            Outcome::Answer(v1::BatchCheckPermissionsAnswer {
                allowed: reason.allows(),
                reason: v1::Reason::from(reason).into(),
            })
        }
        Err(status) => Outcome::Error(status::to_message(&status)),
    };
    v1::BatchCheckPermissionsResult {
        result: Some(outcome),
    }
}

/// Every permission of the catalog, as it stands for a subject.
fn list(permissions: &SubjectPermissions) -> impl Iterator<Item = v1::UserPermission> {
    let membership = permissions.membership.as_ref();
    permissions
        .catalog
        .permissions()
        .iter()
        .enumerate()
        .map(move |(index, template)| match membership {
            Some(membership) => member_permission(template, membership, index),
            None => user_permission(template, Reason::NotAMember, "", false),
        })
}

fn member_permission(
    template: &PermissionTemplate,
    membership: &Membership,
    index: usize,
) -> v1::UserPermission {
    let decided = membership.decided[index];
    let min_role = &membership.min_roles[usize::from(decided.min_role)];
    user_permission(template, decided.reason, min_role, decided.enabled)
}

fn user_permission(
    template: &PermissionTemplate,
    reason: Reason,
    min_role: &str,
    enabled: bool,
) -> v1::UserPermission {
    v1::UserPermission {
        permission: template.key.to_string(),
        name: template.name.to_string(),
        module: template.module.to_string(),
        allowed: reason.allows(),
        reason: v1::Reason::from(reason).into(),
        effective_min_role: min_role.to_owned(),
        enabled,
    }
}

fn explained_response(explanation: Explanation, evidence: Evidence) -> v1::CheckPermissionResponse {
    let min_role_source = match explanation.min_role_is_override {
        None => v1::MinRoleSource::Unspecified,
        Some(false) => v1::MinRoleSource::Template,
        Some(true) => v1::MinRoleSource::Override,
    };
    v1::CheckPermissionResponse {
        allowed: explanation.reason.allows(),
        reason: v1::Reason::from(explanation.reason).into(),
        evidence: Some(evidence.into()),
        explanation: Some(v1::Explanation {
            role: explanation.role,
            role_rank: explanation.role_rank,
            effective_min_role: explanation.effective_min_role,
            min_role_source: min_role_source.into(),
            enabled: explanation.enabled,
            specific_user: explanation.specific_user,
        }),
    }
}

impl From<Reason> for v1::Reason {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::UnknownPermission => Self::UnknownPermission,
            Reason::NotAMember => Self::NotAMember,
            Reason::PermissionDisabled => Self::PermissionDisabled,
            Reason::GrantedByRole => Self::GrantedByRole,
            Reason::GrantedToUser => Self::GrantedToUser,
            Reason::RoleTooLow => Self::RoleTooLow,
        }
    }
}

impl From<Evidence> for v1::Evidence {
    fn from(evidence: Evidence) -> Self {
        let source = match evidence.source {
            Source::Cache => v1::Source::Cache,
            Source::Database => v1::Source::Database,
        };
        Self {
            position: evidence.position.to_string(),
            source: source.into(),
            staleness: Some(prost_types::Duration {
                seconds: i64::try_from(evidence.staleness.as_secs()).unwrap_or(i64::MAX),
                nanos: i32::try_from(evidence.staleness.subsec_nanos()).unwrap_or(0),
            }),
        }
    }
}
