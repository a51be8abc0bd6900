//! `hallpass.v1.PermissionService`.

use std::{sync::Arc, time::Duration};

use tonic::{Request, Response, Status};

use super::{
    parse::{self, Fields, PagedQuery},
    status, v1,
};
use crate::{
    check::{Checker, Evidence, Freshness, Source},
    limits::{Class, Limits},
    loader::LoadError,
    model::{
        BootTime, Membership, OrganizationId, PermissionTemplate, Reason, Subject,
        SubjectPermissions,
    },
    store::{
        lists::OrganizationSummary,
        load::{Explanation, ReadFrom},
        pool::Connection,
    },
};

/// Items of a batch: what one statement answers in about a second when nothing is cached.
pub const BATCH_ITEMS_MAX: usize = 10_000;

/// Malformed items of a batch whose errors have details. More would make an answer that clients refuse, who take 4 MiB.
const DETAILED_ITEMS_MAX: usize = 1_000;

/// Serves checks.
pub struct PermissionService {
    pub(super) checker: Arc<Checker>,
    /// The most that a caller may ask for as `max_staleness`.
    staleness_ceiling: Duration,
    pub(super) limits: Arc<Limits>,
}

impl PermissionService {
    #[must_use]
    pub fn new(checker: Arc<Checker>, staleness_ceiling: Duration, limits: Arc<Limits>) -> Self {
        Self {
            checker,
            staleness_ceiling,
            limits,
        }
    }
}

#[tonic::async_trait]
impl v1::permission_service_server::PermissionService for PermissionService {
    async fn check_permission(
        &self,
        request: Request<v1::CheckPermissionRequest>,
    ) -> Result<Response<v1::CheckPermissionResponse>, Status> {
        let arrived = BootTime::now();
        let caller = parse::caller(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        let subject = fields.subject("", &request.organization_id, &request.user_id);
        fields.key(format_args!("permission"), &request.permission);
        let freshness = fields.freshness(request.consistency, self.staleness_ceiling);
        let subject = fields.all_fit(subject)?;
        let within = match (request.explain, freshness) {
            (true, _) => self.limits.caller(&caller, Class::List),
            (false, Freshness::FullyConsistent) => self.limits.database_check(&caller),
            (false, _) => Ok(()),
        };
        within.map_err(status::refused)?;
        if request.explain {
            let (explanation, evidence) = self
                .checker
                .explain(subject, &request.permission, freshness, arrived)
                .await?;
            let counts = &self.checker.counts;
            counts.decided(explanation.reason, evidence.source);
            return Ok(Response::new(explained_response(explanation, evidence)));
        }
        let known = self.checker.know(subject, freshness, arrived).await?;
        let reason = self.checker.decide(&known, &request.permission);
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
        let caller = parse::caller(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        // gRPC's codec has not even decoded more than that.
        let items = request.items.len();
        if !(1..=BATCH_ITEMS_MAX).contains(&items) {
            fields.violation("items", status::wrong_count_of_items(items));
        }
        let freshness = fields.freshness(request.consistency, self.staleness_ceiling);
        fields.all_fit(Some(()))?;
        let within = match freshness {
            Freshness::FullyConsistent => self.limits.database_items(&caller, request.items.len()),
            _ => self.limits.batch_items(&caller, request.items.len()),
        };
        within.map_err(status::refused)?;
        let parsed: Vec<Result<Subject, Status>> = request
            .items
            .iter()
            .enumerate()
            .map(|(index, item)| parse::parse_item(&caller, index, item))
            .collect();
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
                    .unwrap_or(Err(LoadError::Unavailable.into()))
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
            let reason = answer.map(|known| self.checker.decide(&known, &item.permission));
            results.push(batch_result(reason));
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
        let caller = parse::caller(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        let subject = fields.subject("", &request.organization_id, &request.user_id);
        if !request.module.is_empty() {
            fields.key(format_args!("module"), &request.module);
        }
        let freshness = fields.freshness(request.consistency, self.staleness_ceiling);
        let subject = fields.all_fit(subject)?;
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

    async fn list_permission_holders(
        &self,
        request: Request<v1::ListPermissionHoldersRequest>,
    ) -> Result<Response<v1::ListPermissionHoldersResponse>, Status> {
        let arrived = BootTime::now();
        let caller = parse::caller(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        let organization = fields.organization(&request.organization_id);
        fields.key(format_args!("permission"), &request.permission);
        let query = organization.map(|organization| PagedQuery {
            call: "ListPermissionHolders",
            id: organization.0,
            key: &request.permission,
        });
        let bounds = fields.page(request.page_size, &request.page_token, query.as_ref());
        let freshness = fields.freshness(request.consistency, self.staleness_ceiling);
        let (organization, query) = fields.all_fit(organization.zip(query))?;
        let permission = request.permission.clone();
        let list = async move |connection: Connection| {
            let page = connection
                .permission_holders(organization, &permission, bounds)
                .await?;
            Ok((page.head, page))
        };
        let (page, evidence) = self.checker.read(freshness, arrived, list).await?;
        let holders = page.rows.into_iter().map(|holder| v1::PermissionHolder {
            user_id: holder.user.0.to_string(),
            role: holder.role,
            reason: v1::Reason::from(holder.reason).into(),
        });
        Ok(Response::new(v1::ListPermissionHoldersResponse {
            holders: holders.collect(),
            next_page_token: page.next.map_or_else(String::new, |next| query.token(next)),
            evidence: Some(evidence.into()),
        }))
    }

    async fn list_user_organizations(
        &self,
        request: Request<v1::ListUserOrganizationsRequest>,
    ) -> Result<Response<v1::ListUserOrganizationsResponse>, Status> {
        let arrived = BootTime::now();
        let caller = parse::caller(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        let user = fields.user(&request.user_id);
        let query = user.map(|user| PagedQuery {
            call: "ListUserOrganizations",
            id: user.0,
            key: "",
        });
        let bounds = fields.page(request.page_size, &request.page_token, query.as_ref());
        let freshness = fields.freshness(request.consistency, self.staleness_ceiling);
        let (user, query) = fields.all_fit(user.zip(query))?;
        let organizations = caller.organizations.clone();
        let list = async move |connection: Connection| {
            let page = connection
                .user_organizations(user, organizations.listed(), bounds)
                .await?;
            Ok((page.head, page))
        };
        let (page, evidence) = self.checker.read(freshness, arrived, list).await?;
        let organizations = page.rows.into_iter().map(|row| v1::UserOrganization {
            organization_id: row.organization.0.to_string(),
            role: row.role,
        });
        Ok(Response::new(v1::ListUserOrganizationsResponse {
            organizations: organizations.collect(),
            next_page_token: page.next.map_or_else(String::new, |next| query.token(next)),
            evidence: Some(evidence.into()),
        }))
    }

    async fn get_organization_summary(
        &self,
        request: Request<v1::GetOrganizationSummaryRequest>,
    ) -> Result<Response<v1::GetOrganizationSummaryResponse>, Status> {
        let arrived = BootTime::now();
        let caller = parse::caller(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        let organization = fields.organization(&request.organization_id);
        let freshness = fields.freshness(request.consistency, self.staleness_ceiling);
        let organization = fields.all_fit(organization)?;
        // What must be fresh is counted, whatever the log says of the summary.
        let from = match freshness {
            Freshness::FullyConsistent => ReadFrom::View,
            Freshness::MinimizeLatency
            | Freshness::MaxStaleness(_)
            | Freshness::AtLeastAsFresh(_) => self.checker.progress.read_from(),
        };
        let read = async move |connection: Connection| {
            connection.organization_summary(organization, from).await
        };
        let (summary, evidence) = self.checker.read(freshness, arrived, read).await?;
        let summary = summary.ok_or_else(|| status::organization_not_found(organization))?;
        Ok(Response::new(v1::GetOrganizationSummaryResponse {
            summary: Some(summary_message(organization, summary)),
            evidence: Some(evidence.into()),
        }))
    }
}

fn batch_result(reason: Result<Reason, Status>) -> v1::BatchCheckPermissionsResult {
    use v1::batch_check_permissions_result::Result as Outcome;
    let outcome = match reason {
        Ok(reason) => Outcome::Answer(v1::BatchCheckPermissionsAnswer {
            allowed: reason.allows(),
            reason: v1::Reason::from(reason).into(),
        }),
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

fn summary_message(
    organization: OrganizationId,
    summary: OrganizationSummary,
) -> v1::OrganizationSummary {
    v1::OrganizationSummary {
        organization_id: organization.0.to_string(),
        organization_name: summary.name,
        total_available_permissions: summary.total_available_permissions,
        total_custom_permissions: summary.total_custom_permissions,
        enabled_custom_permissions: summary.enabled_custom_permissions,
        disabled_custom_permissions: summary.disabled_custom_permissions,
        admin_only_permissions: summary.admin_only_permissions,
        board_member_permissions: summary.board_member_permissions,
        committee_lead_permissions: summary.committee_lead_permissions,
        volunteer_permissions: summary.volunteer_permissions,
        last_permission_update: summary.last_permission_update.map(Into::into),
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

impl From<Source> for v1::Source {
    fn from(source: Source) -> Self {
        match source {
            Source::Cache => Self::Cache,
            Source::Database => Self::Database,
        }
    }
}

impl From<Evidence> for v1::Evidence {
    fn from(evidence: Evidence) -> Self {
        Self {
            position: evidence.position.to_string(),
            source: v1::Source::from(evidence.source).into(),
            staleness: Some(prost_types::Duration {
                seconds: i64::try_from(evidence.staleness.as_secs()).unwrap_or(i64::MAX),
                nanos: i32::try_from(evidence.staleness.subsec_nanos()).unwrap_or(0),
            }),
        }
    }
}
