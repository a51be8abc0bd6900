//! PTO Connect's bodies: its field names, grouped by module as its pages show them. What it does not have stands beside it:
//! the position to wait for, and what a try would do.

use std::{collections::BTreeMap, str::FromStr};

use prost_types::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use utoipa::{IntoParams, ToSchema};

use crate::{
    grpc::{admin_service::UserOverride, v1},
    http::evidence::Reason,
};

/// Which organization.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OrganizationQuery {
    /// May be left out where the credential is for exactly one.
    #[param(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    pub(super) organization_id: Option<String>,
}

/// Which organization, and how to change it.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ChangeQuery {
    /// May be left out where the credential is for exactly one.
    #[param(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    pub(super) organization_id: Option<String>,
    /// Refuse unless this is what the list says now.
    #[serde(default, deserialize_with = "time")]
    #[param(value_type = Option<String>, format = DateTime, example = "2026-03-02T08:15:30.123456Z")]
    pub(super) expected_updated_at: Option<Timestamp>,
    /// Say what the change would do, and change nothing.
    #[serde(default)]
    #[param(example = true)]
    pub(super) validate_only: bool,
}

/// RFC 3339.
fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else {
        return Ok(None);
    };
    let time = Timestamp::from_str(&text);
    time.map(Some)
        .map_err(|_| D::Error::custom("must be a time such as `2026-03-02T08:15:30.123456Z`"))
}

/// An organization's own setting, whole: what is left out is as if it had never been set.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PutSetting {
    /// A role of the ladder; without one the template's applies. `min_role` is taken for it too.
    #[serde(alias = "min_role")]
    #[schema(example = "committee_lead")]
    min_role_required: Option<String>,
    /// Without it, true. What is not enabled nobody has.
    #[schema(example = true)]
    is_enabled: Option<bool>,
    /// Users who have the permission whatever their role.
    #[schema(example = json!(["7c9e6679-7425-40de-944b-e07fc1f90ae7"]))]
    specific_users: Option<Vec<String>>,
    /// Refuse unless this is what the list says now.
    #[serde(default, deserialize_with = "time")]
    #[schema(value_type = Option<String>, format = DateTime, example = json!(null))]
    expected_updated_at: Option<Timestamp>,
    /// Say what the change would do, and change nothing.
    #[serde(default)]
    validate_only: bool,
}

impl PutSetting {
    /// The setting, what it must replace, and whether it is only tried.
    pub(super) fn into_parts(self) -> (v1::PermissionSetting, Option<Timestamp>, bool) {
        let setting = setting(self.min_role_required, self.is_enabled, self.specific_users);
        (setting, self.expected_updated_at, self.validate_only)
    }
}

fn setting(
    min_role: Option<String>,
    enabled: Option<bool>,
    specific_users: Option<Vec<String>>,
) -> v1::PermissionSetting {
    v1::PermissionSetting {
        min_role: min_role.unwrap_or_default(),
        enabled,
        specific_user_ids: specific_users.unwrap_or_default(),
    }
}

/// Several settings.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BulkUpdate {
    /// From 1 to 1,000, each permission once.
    permissions: Vec<BulkItem>,
    /// Say what the changes would do, and change nothing.
    #[serde(default)]
    validate_only: bool,
}

/// A permission and its setting.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BulkItem {
    #[schema(example = "can_approve_expenses")]
    permission_key: String,
    /// A role of the ladder; without one the template's applies. `min_role` is taken for it too.
    #[serde(alias = "min_role")]
    #[schema(example = "committee_lead")]
    min_role_required: Option<String>,
    /// Without it, true. What is not enabled nobody has.
    #[schema(example = true)]
    is_enabled: Option<bool>,
    /// Users who have the permission whatever their role.
    #[schema(example = json!(["7c9e6679-7425-40de-944b-e07fc1f90ae7"]))]
    specific_users: Option<Vec<String>>,
    /// Refuse all unless this is what the list says now.
    #[serde(default, deserialize_with = "time")]
    #[schema(value_type = Option<String>, format = DateTime, example = json!(null))]
    expected_updated_at: Option<Timestamp>,
}

impl BulkUpdate {
    pub(super) fn into_parts(self) -> (Vec<v1::BulkSetItem>, bool) {
        let items = self.permissions.into_iter().map(|item| v1::BulkSetItem {
            permission: item.permission_key,
            setting: Some(setting(
                item.min_role_required,
                item.is_enabled,
                item.specific_users,
            )),
            expected_updated_at: item.expected_updated_at,
        });
        (items.collect(), self.validate_only)
    }
}

/// Permissions by name.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UserOverridesBody {
    /// From 1 to 1,000, each user and permission once.
    overrides: Vec<UserOverrideItem>,
    /// Say what the changes would do, and change nothing.
    #[serde(default)]
    validate_only: bool,
}

/// One user's permission by name.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UserOverrideItem {
    #[schema(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7")]
    user_id: String,
    #[schema(example = "can_approve_expenses")]
    permission_key: String,
    /// True grants it by name; false takes that back, and leaves what the user has by role.
    #[schema(example = true)]
    is_enabled: bool,
}

impl UserOverridesBody {
    pub(super) fn into_parts(self) -> (Vec<UserOverride>, bool) {
        let overrides = self.overrides.into_iter().map(|item| UserOverride {
            user_id: item.user_id,
            permission: item.permission_key,
            granted: item.is_enabled,
        });
        (overrides.collect(), self.validate_only)
    }
}

/// The catalog as it stands for an organization.
#[derive(Serialize, ToSchema)]
pub(super) struct Listed {
    /// By key.
    permissions: Vec<OrganizationPermission>,
    /// The same by module.
    grouped: BTreeMap<String, Vec<OrganizationPermission>>,
    #[schema(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    organization_id: String,
    /// What the list was read at.
    #[schema(example = "812-5f0c9ae1")]
    position: String,
}

/// A permission as it stands for an organization.
#[derive(Clone, Serialize, ToSchema)]
struct OrganizationPermission {
    #[serde(flatten)]
    template: Template,
    /// The organization's where it has one, else the template's.
    #[schema(example = "committee_lead")]
    current_min_role: String,
    /// Users who have the permission whatever their role.
    specific_users: Vec<String>,
    is_enabled: bool,
    /// Whether the organization has a setting of its own.
    has_custom_setting: bool,
    /// When the organization's setting was last changed where it has one, else the template.
    #[schema(format = DateTime, example = "2026-03-02T08:15:30.123456Z")]
    updated_at: Option<String>,
}

/// A permission of the catalog.
#[derive(Clone, Serialize, ToSchema)]
struct Template {
    #[schema(example = "can_approve_expenses")]
    permission_key: String,
    #[schema(example = "Approve expenses")]
    permission_name: String,
    permission_description: String,
    #[schema(example = "budget")]
    module_name: String,
    #[schema(example = "board_member")]
    default_min_role: String,
}

impl From<v1::OrganizationPermission> for OrganizationPermission {
    fn from(permission: v1::OrganizationPermission) -> Self {
        Self {
            template: Template {
                permission_key: permission.permission,
                permission_name: permission.name,
                permission_description: permission.description,
                module_name: permission.module,
                default_min_role: permission.default_min_role,
            },
            current_min_role: permission.effective_min_role,
            specific_users: permission.specific_user_ids,
            is_enabled: permission.enabled,
            has_custom_setting: permission.has_own_setting,
            updated_at: permission.updated_at.map(|time| time.to_string()),
        }
    }
}

fn grouped<T: Clone>(all: &[T], module: impl Fn(&T) -> &str) -> BTreeMap<String, Vec<T>> {
    let mut grouped: BTreeMap<String, Vec<T>> = BTreeMap::new();
    for one in all {
        let of_module = grouped.entry(module(one).to_owned()).or_default();
        of_module.push(one.clone());
    }
    grouped
}

impl Listed {
    pub(super) fn new(
        organization_id: String,
        listed: v1::ListOrganizationPermissionsResponse,
    ) -> Self {
        let permissions = listed.permissions.into_iter().map(Into::into);
        let permissions: Vec<OrganizationPermission> = permissions.collect();
        Self {
            grouped: grouped(&permissions, |permission| &permission.template.module_name),
            permissions,
            organization_id,
            position: listed.position,
        }
    }
}

/// The catalog.
#[derive(Serialize, ToSchema)]
pub(super) struct Templates {
    /// By key.
    templates: Vec<Template>,
    /// The same by module.
    grouped: BTreeMap<String, Vec<Template>>,
}

impl From<v1::ListOrganizationPermissionsResponse> for Templates {
    fn from(listed: v1::ListOrganizationPermissionsResponse) -> Self {
        let permissions = listed.permissions.into_iter();
        let templates =
            permissions.map(|permission| OrganizationPermission::from(permission).template);
        let templates: Vec<Template> = templates.collect();
        Self {
            grouped: grouped(&templates, |template| &template.module_name),
            templates,
        }
    }
}

/// All permissions of a member.
#[derive(Serialize, ToSchema)]
pub(super) struct MemberPermissions {
    user: Member,
    /// By module and key.
    permissions: BTreeMap<String, BTreeMap<String, MemberPermission>>,
    /// What they were read at.
    #[schema(example = "812-5f0c9ae1")]
    position: String,
}

#[derive(Serialize, ToSchema)]
struct Member {
    #[schema(format = Uuid, example = "7c9e6679-7425-40de-944b-e07fc1f90ae7")]
    user_id: String,
    #[schema(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    org_id: String,
    #[schema(example = "board_member")]
    role: String,
}

#[derive(Serialize, ToSchema)]
struct MemberPermission {
    has_permission: bool,
    #[schema(example = "Approve expenses")]
    permission_name: String,
    reason: Reason,
}

impl MemberPermissions {
    /// `None` where the user is no member.
    pub(super) fn of_member(
        org_id: String,
        user_id: String,
        listed: v1::ListUserPermissionsResponse,
    ) -> Option<Self> {
        let mut permissions: BTreeMap<String, BTreeMap<String, MemberPermission>> = BTreeMap::new();
        for permission in listed.permissions {
            if permission.reason() == v1::Reason::NotAMember {
                return None;
            }
            let reason = permission.reason().into();
            let of_module = permissions.entry(permission.module).or_default();
            let answer = MemberPermission {
                has_permission: permission.allowed,
                permission_name: permission.name,
                reason,
            };
            of_module.insert(permission.permission, answer);
        }
        Some(Self {
            user: Member {
                user_id,
                org_id,
                role: listed.role,
            },
            permissions,
            position: listed.evidence.unwrap_or_default().position,
        })
    }
}

/// An organization's own setting.
#[derive(Serialize, ToSchema)]
pub(super) struct Setting {
    #[schema(format = Uuid, example = "0f5a6c1e-3f0b-4d0e-9a63-0d4f6d0b8a11")]
    org_id: String,
    #[schema(example = "can_approve_expenses")]
    permission_key: String,
    /// Null: the template's.
    #[schema(example = "committee_lead")]
    min_role_required: Option<String>,
    specific_users: Vec<String>,
    is_enabled: bool,
}

impl Setting {
    pub(super) fn new(
        organization_id: &str,
        permission: &str,
        setting: &v1::PermissionSetting,
    ) -> Self {
        let min_role = Some(&setting.min_role).filter(|role| !role.is_empty());
        Self {
            org_id: organization_id.to_owned(),
            permission_key: permission.to_owned(),
            min_role_required: min_role.cloned(),
            specific_users: setting.specific_user_ids.clone(),
            is_enabled: setting.enabled.unwrap_or(true),
        }
    }

    pub(super) fn of_items(organization_id: &str, items: &[v1::BulkSetItem]) -> Vec<Self> {
        let set = items.iter().filter_map(|item| {
            let setting = item.setting.as_ref()?;
            Some(Self::new(organization_id, &item.permission, setting))
        });
        set.collect()
    }
}
