//! `hallpass.v1.AdminService`: each change is parsed into steps, made in one transaction or tried, and answered with the
//! position behind it or with its effects.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    parse::{self, Change, Fields, Origin},
    status, v1,
};
use crate::{
    auth::{Caller, Peer},
    limits::Limits,
    model::UserId,
    store::{
        Store,
        admin::{AdminError, ChangeKind, Effect, OrganizationPermission},
        pool::Connections,
    },
    trail,
};

/// Serves changes.
pub struct AdminService {
    store: Arc<Store>,
    /// Whose login may change something; `None`: nobody changes anything here.
    changes: Option<Arc<Connections>>,
    limits: Arc<Limits>,
}

/// One user's permission by name.
pub struct UserOverride {
    pub user_id: String,
    pub permission: String,
    /// Else it is taken back.
    pub granted: bool,
}

/// What several users have by name, changed at once: all of it, or nothing.
pub struct UserOverrides {
    pub organization_id: String,
    pub overrides: Vec<UserOverride>,
    pub actor: Option<v1::Actor>,
    pub validate_only: bool,
}

impl AdminService {
    #[must_use]
    pub fn new(store: Arc<Store>, changes: Option<Arc<Connections>>, limits: Arc<Limits>) -> Self {
        Self {
            store,
            changes,
            limits,
        }
    }

    /// Grants and revokes by name. HTTP alone has it: there it is one call of the pages that it is for.
    ///
    /// # Errors
    /// As those of a bulk change.
    pub async fn set_user_overrides(
        &self,
        request: Request<UserOverrides>,
    ) -> Result<Option<v1::ChangeOutcome>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let steps = fields.user_overrides(&request.organization_id, request.overrides);
        let change = fields.change(steps, request.actor, &origin)?;
        self.make(change, ChangeKind::Bulk, request.validate_only)
            .await
    }

    /// Who asks, in which request, and what.
    fn open<T>(&self, request: Request<T>) -> Result<(Arc<Caller>, Origin, T), Status> {
        let caller = parse::caller(&request)?;
        let peer = request.extensions().get::<Peer>().and_then(|p| p.address);
        let metadata = request.metadata();
        let address = self.limits.client_address(peer, metadata.as_ref());
        let origin = Origin::of(metadata, address);
        Ok((caller, origin, request.into_inner()))
    }

    /// Makes a change, or tries it.
    async fn make(
        &self,
        change: Change,
        kind: ChangeKind,
        validate_only: bool,
    ) -> Result<Option<v1::ChangeOutcome>, Status> {
        let changes = self.changes.as_ref().ok_or_else(status::admin_disabled)?;
        let connection = changes.acquire().await?;
        // A task of its own: a caller who goes away leaves no connection in the middle of a change, and is heard of.
        let called = CancellationToken::new();
        let gone = called.clone().cancelled_owned();
        let _called = called.drop_guard();
        let outcome = tokio::spawn(trail::carried(async move {
            if validate_only {
                let preview = connection.preview(&change.steps, gone).await?;
                return Ok(v1::ChangeOutcome {
                    position: String::new(),
                    effects: preview.effects.into_iter().map(effect_message).collect(),
                    effect_count: preview.effect_count,
                });
            }
            let position = connection
                .change(&change.steps, &change.actor, kind, gone)
                .await?;
            Ok(v1::ChangeOutcome {
                position: position.to_string(),
                effects: Vec::new(),
                effect_count: 0,
            })
        }));
        let outcome: Result<_, AdminError> = outcome.await.map_err(|_panic| status::internal())?;
        Ok(Some(outcome?))
    }
}

#[tonic::async_trait]
impl v1::admin_service_server::AdminService for AdminService {
    async fn list_organization_permissions(
        &self,
        request: Request<v1::ListOrganizationPermissionsRequest>,
    ) -> Result<Response<v1::ListOrganizationPermissionsResponse>, Status> {
        let caller = parse::caller(&request)?;
        let request = request.into_inner();
        let mut fields = Fields::new(&caller);
        let organization = fields.organization(&request.organization_id);
        if !request.module.is_empty() {
            fields.key(format_args!("module"), &request.module);
        }
        let organization = fields.all_fit(organization)?;
        let connection = self.store.reads.acquire().await?;
        let settings = tokio::spawn(trail::carried(
            connection.organization_settings(organization),
        ));
        let (head, settings) = settings.await.map_err(|_panic| status::internal())??;
        let permissions = settings
            .into_iter()
            .filter(|setting| request.module.is_empty() || setting.module == request.module);
        Ok(Response::new(v1::ListOrganizationPermissionsResponse {
            permissions: permissions.map(permission_message).collect(),
            position: head.to_string(),
        }))
    }

    async fn set_organization_permission(
        &self,
        request: Request<v1::SetOrganizationPermissionRequest>,
    ) -> Result<Response<v1::SetOrganizationPermissionResponse>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let item = v1::BulkSetItem {
            permission: request.permission,
            setting: request.setting,
            expected_updated_at: request.expected_updated_at,
        };
        let steps = fields.set_override("", &request.organization_id, item);
        let change = fields.change(steps, request.actor, &origin)?;
        let outcome = self
            .make(change, ChangeKind::Plain, request.validate_only)
            .await?;
        Ok(Response::new(v1::SetOrganizationPermissionResponse {
            outcome,
        }))
    }

    async fn bulk_set_organization_permissions(
        &self,
        request: Request<v1::BulkSetOrganizationPermissionsRequest>,
    ) -> Result<Response<v1::BulkSetOrganizationPermissionsResponse>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let steps = fields.set_overrides(&request.organization_id, request.items);
        let change = fields.change(steps, request.actor, &origin)?;
        let outcome = self
            .make(change, ChangeKind::Bulk, request.validate_only)
            .await?;
        Ok(Response::new(v1::BulkSetOrganizationPermissionsResponse {
            outcome,
        }))
    }

    async fn reset_organization_permission(
        &self,
        request: Request<v1::ResetOrganizationPermissionRequest>,
    ) -> Result<Response<v1::ResetOrganizationPermissionResponse>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let steps = fields.reset_override(
            &request.organization_id,
            request.permission,
            request.expected_updated_at,
        );
        let change = fields.change(steps, request.actor, &origin)?;
        let outcome = self
            .make(change, ChangeKind::Reset, request.validate_only)
            .await?;
        Ok(Response::new(v1::ResetOrganizationPermissionResponse {
            outcome,
        }))
    }

    async fn put_member(
        &self,
        request: Request<v1::PutMemberRequest>,
    ) -> Result<Response<v1::PutMemberResponse>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let steps = fields.put_member(&request.organization_id, &request.user_id, request.role);
        let change = fields.change(steps, request.actor, &origin)?;
        let outcome = self
            .make(change, ChangeKind::Plain, request.validate_only)
            .await?;
        Ok(Response::new(v1::PutMemberResponse { outcome }))
    }

    async fn remove_member(
        &self,
        request: Request<v1::RemoveMemberRequest>,
    ) -> Result<Response<v1::RemoveMemberResponse>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let steps = fields.remove_member(&request.organization_id, &request.user_id);
        let change = fields.change(steps, request.actor, &origin)?;
        let outcome = self
            .make(change, ChangeKind::Plain, request.validate_only)
            .await?;
        Ok(Response::new(v1::RemoveMemberResponse { outcome }))
    }

    async fn grant_user_permission(
        &self,
        request: Request<v1::GrantUserPermissionRequest>,
    ) -> Result<Response<v1::GrantUserPermissionResponse>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let steps = fields.grant_user(
            &request.organization_id,
            &request.user_id,
            request.permission,
        );
        let change = fields.change(steps, request.actor, &origin)?;
        let outcome = self
            .make(change, ChangeKind::Plain, request.validate_only)
            .await?;
        Ok(Response::new(v1::GrantUserPermissionResponse { outcome }))
    }

    async fn revoke_user_permission(
        &self,
        request: Request<v1::RevokeUserPermissionRequest>,
    ) -> Result<Response<v1::RevokeUserPermissionResponse>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let steps = fields.revoke_user(
            &request.organization_id,
            &request.user_id,
            request.permission,
        );
        let change = fields.change(steps, request.actor, &origin)?;
        let outcome = self
            .make(change, ChangeKind::Plain, request.validate_only)
            .await?;
        Ok(Response::new(v1::RevokeUserPermissionResponse { outcome }))
    }

    async fn delete_permission_template(
        &self,
        request: Request<v1::DeletePermissionTemplateRequest>,
    ) -> Result<Response<v1::DeletePermissionTemplateResponse>, Status> {
        let (caller, origin, request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let steps = fields.delete_template(request.permission, request.expected_updated_at);
        let change = fields.change(steps, request.actor, &origin)?;
        let outcome = self
            .make(change, ChangeKind::Plain, request.validate_only)
            .await?;
        Ok(Response::new(v1::DeletePermissionTemplateResponse {
            outcome,
        }))
    }

    async fn put_permission_template(
        &self,
        request: Request<v1::PutPermissionTemplateRequest>,
    ) -> Result<Response<v1::PutPermissionTemplateResponse>, Status> {
        let (caller, origin, mut request) = self.open(request)?;
        let mut fields = Fields::new(&caller);
        let (actor, validate_only) = (request.actor.take(), request.validate_only);
        let steps = fields.put_template(request);
        let change = fields.change(steps, actor, &origin)?;
        let outcome = self.make(change, ChangeKind::Plain, validate_only).await?;
        Ok(Response::new(v1::PutPermissionTemplateResponse { outcome }))
    }
}

fn effect_message(effect: Effect) -> v1::PermissionEffect {
    let ids = |users: Vec<UserId>| users.iter().map(|user| user.0.to_string()).collect();
    v1::PermissionEffect {
        organization_id: effect.organization.0.to_string(),
        permission: effect.permission,
        gained: effect.gained,
        lost: effect.lost,
        gaining_user_ids: ids(effect.gaining),
        losing_user_ids: ids(effect.losing),
    }
}

fn permission_message(setting: OrganizationPermission) -> v1::OrganizationPermission {
    v1::OrganizationPermission {
        permission: setting.permission,
        name: setting.name,
        description: setting.description.unwrap_or_default(),
        module: setting.module,
        default_min_role: setting.default_min_role,
        effective_min_role: setting.effective_min_role,
        enabled: setting.enabled,
        specific_user_ids: setting.specific_users.iter().map(Uuid::to_string).collect(),
        has_own_setting: setting.has_own_setting,
        updated_at: setting.updated_at.map(Into::into),
    }
}
