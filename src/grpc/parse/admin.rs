//! Requests for changes, as the steps that make them; and on whose behalf, from which request.

use std::{net::IpAddr, time::SystemTime};

use tonic::{Status, metadata::MetadataMap};
use uuid::Uuid;

use super::{Fields, shown};
use crate::{
    auth::Identity,
    grpc::{admin_service::UserOverride, v1},
    model::OrganizationId,
    store::admin::{Actor, Micros, Step},
    traces::Parent,
};

/// Settings of one bulk change: a catalog many times over.
const BULK_ITEMS_MAX: usize = 1_000;

/// Users that one setting names.
const SPECIFIC_USERS_MAX: usize = 10_000;

/// Bytes of what an actor's request said of itself, as much as the audit log keeps.
const ORIGIN_BYTES_MAX: usize = 1_024;

/// The beginning of the year 10000, which no row of the application's can have been changed in.
const MICROS_MAX: i64 = 253_402_300_800_000_000;

/// Bytes of a permission's name and of its description.
const NAME_BYTES_MAX: usize = 255;
const DESCRIPTION_BYTES_MAX: usize = 4_096;

/// A change, parsed.
pub(in crate::grpc) struct Change {
    pub(in crate::grpc) steps: Vec<Step>,
    pub(in crate::grpc) actor: Actor,
}

/// Which request a change comes with.
pub(in crate::grpc) struct Origin {
    address: Option<IpAddr>,
    user_agent: Option<String>,
    request_id: Option<String>,
    trace_id: Option<String>,
}

impl Origin {
    /// `address`: whose address the limits believe it to be.
    pub(in crate::grpc) fn of(metadata: &MetadataMap, address: Option<IpAddr>) -> Self {
        let text = |name| metadata.get(name).and_then(|value| value.to_str().ok());
        // Visible ASCII: it may be cut anywhere.
        let cut = |name| text(name).map(|text| text[..text.len().min(ORIGIN_BYTES_MAX)].to_owned());
        let parent = Parent::of(metadata.as_ref());
        Self {
            address,
            user_agent: cut("user-agent"),
            request_id: cut("x-request-id"),
            // Whether or not the call is traced here: the caller's own spans have it.
            trace_id: parent.map(|parent| parent.trace_id.to_string()),
        }
    }
}

impl Fields<'_> {
    /// The change, if every field fits and the caller may ask for it.
    pub(in crate::grpc) fn change(
        mut self,
        steps: Option<Vec<Step>>,
        actor: Option<v1::Actor>,
        origin: &Origin,
    ) -> Result<Change, Status> {
        let actor = self.actor(actor.unwrap_or_default(), origin);
        let (steps, actor) = self.all_fit(steps.zip(actor))?;
        Ok(Change { steps, actor })
    }

    /// Who is named as the actor. A token's subject speaks for itself alone.
    fn actor(&mut self, actor: v1::Actor, origin: &Origin) -> Option<Actor> {
        let mut user_id = self.optional_id("actor.user_id", &actor.user_id);
        if let Identity::Token(subject) = &self.caller.identity {
            let subject = Uuid::try_parse(subject).ok();
            if user_id.is_some() && user_id != subject {
                self.violation(
                    "actor.user_id",
                    "must be the subject of the credential, or empty",
                );
            }
            user_id = subject;
            let named = [
                ("actor.profile_id", &actor.profile_id),
                ("actor.ip_address", &actor.ip_address),
                ("actor.user_agent", &actor.user_agent),
            ];
            for (field, _) in named.iter().filter(|(_, named)| !named.is_empty()) {
                self.violation(
                    *field,
                    "must be empty: a token speaks for its subject alone",
                );
            }
        }
        let profile_id = self.optional_id("actor.profile_id", &actor.profile_id);
        let ip_address = match actor.ip_address.parse() {
            _ if actor.ip_address.is_empty() => None,
            Ok(address) => Some(address),
            Err(_) => {
                self.violation("actor.ip_address", "must be an IP address");
                None
            }
        };
        let user_agent = self.text("actor.user_agent", actor.user_agent, ORIGIN_BYTES_MAX);
        let session_id = self.text("actor.session_id", actor.session_id, ORIGIN_BYTES_MAX);
        Some(Actor {
            user_id,
            profile_id,
            ip_address: ip_address.or(origin.address),
            user_agent: user_agent.or_else(|| origin.user_agent.clone()),
            session_id,
            request_id: origin.request_id.clone(),
            trace_id: origin.trace_id.clone(),
            caller: match &self.caller.identity {
                Identity::Anyone => None,
                known => Some(known.to_string()),
            },
        })
    }

    /// A text that may be left out.
    fn text(&mut self, field: &str, text: String, bytes_max: usize) -> Option<String> {
        if text.len() > bytes_max {
            let found = text.len();
            self.violation(
                field,
                format!("must be at most {bytes_max} bytes, not {found}"),
            );
        } else if text.contains('\0') {
            self.violation(field, "must not contain a NUL character");
        }
        Some(text).filter(|text| !text.is_empty())
    }

    fn updated_at(&mut self, field: &str, time: Option<prost_types::Timestamp>) -> Option<Micros> {
        let time = SystemTime::try_from(time?).ok();
        let since_epoch = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        let micros = since_epoch.and_then(|time| i64::try_from(time.as_micros()).ok());
        let micros = micros.filter(|micros| *micros < MICROS_MAX);
        if micros.is_none() {
            self.violation(field, "is no time");
        }
        micros.map(Micros)
    }

    pub(in crate::grpc) fn set_override(
        &mut self,
        prefix: &str,
        organization: &str,
        item: v1::BulkSetItem,
    ) -> Option<Vec<Step>> {
        let organization = self.organization(organization);
        self.set_one(prefix, organization, item)
            .map(|step| vec![step])
    }

    pub(in crate::grpc) fn set_overrides(
        &mut self,
        organization: &str,
        items: Vec<v1::BulkSetItem>,
    ) -> Option<Vec<Step>> {
        let organization = self.organization(organization);
        if items.is_empty() || items.len() > BULK_ITEMS_MAX {
            let found = items.len();
            self.violation(
                "items",
                format!("must be 1 to {BULK_ITEMS_MAX} items, not {found}"),
            );
            return None;
        }
        // In one order for all: changes that come at once wait for each other, and none for ever.
        let mut items: Vec<(usize, v1::BulkSetItem)> = items.into_iter().enumerate().collect();
        items.sort_by(|(_, one), (_, other)| one.permission.cmp(&other.permission));
        let twice =
            |pair: &&[(usize, v1::BulkSetItem)]| pair[0].1.permission == pair[1].1.permission;
        if let Some(twice) = items.windows(2).find(twice) {
            let complaint = format!("`{}` is there twice", shown(&twice[0].1.permission));
            self.violation("items", complaint);
        }
        let steps = items.into_iter();
        let steps = steps
            .map(|(index, item)| self.set_one(&format!("items[{index}]."), organization, item));
        // All of them, so that a caller hears of every wrong field.
        let steps: Vec<Option<Step>> = steps.collect();
        steps.into_iter().collect()
    }

    fn set_one(
        &mut self,
        prefix: &str,
        organization: Option<OrganizationId>,
        item: v1::BulkSetItem,
    ) -> Option<Step> {
        self.key(format_args!("{prefix}permission"), &item.permission);
        let expected = self.updated_at(
            &format!("{prefix}expected_updated_at"),
            item.expected_updated_at,
        );
        let Some(setting) = item.setting else {
            self.violation(format!("{prefix}setting"), "is missing");
            return None;
        };
        if !setting.min_role.is_empty() {
            self.key(format_args!("{prefix}setting.min_role"), &setting.min_role);
        }
        let users = self.users(
            &format!("{prefix}setting.specific_user_ids"),
            &setting.specific_user_ids,
        );
        Some(Step::SetOverride {
            org_id: organization?.0,
            permission_key: item.permission,
            min_role: Some(setting.min_role).filter(|role| !role.is_empty()),
            enabled: setting.enabled.unwrap_or(true),
            specific_users: users?,
            expected_updated_at: expected,
        })
    }

    /// Each once, in the order given.
    fn users(&mut self, field: &str, ids: &[String]) -> Option<Vec<Uuid>> {
        if ids.len() > SPECIFIC_USERS_MAX {
            let found = ids.len();
            self.violation(
                field,
                format!("must be at most {SPECIFIC_USERS_MAX} users, not {found}"),
            );
            return None;
        }
        let mut users = Vec::with_capacity(ids.len());
        let mut seen = std::collections::HashSet::new();
        for (index, id) in ids.iter().enumerate() {
            let id = self.id(format_args!("{field}[{index}]"), id)?;
            if seen.insert(id) {
                users.push(id);
            }
        }
        Some(users)
    }

    pub(in crate::grpc) fn reset_override(
        &mut self,
        organization: &str,
        permission: String,
        expected: Option<prost_types::Timestamp>,
    ) -> Option<Vec<Step>> {
        let organization = self.organization(organization);
        self.key(format_args!("permission"), &permission);
        let expected = self.updated_at("expected_updated_at", expected);
        Some(vec![Step::ResetOverride {
            org_id: organization?.0,
            permission_key: permission,
            expected_updated_at: expected,
        }])
    }

    pub(in crate::grpc) fn put_member(
        &mut self,
        organization: &str,
        user: &str,
        role: String,
    ) -> Option<Vec<Step>> {
        let member = self.member(organization, user);
        self.key(format_args!("role"), &role);
        let (org_id, user_id) = member?;
        Some(vec![Step::PutMember {
            org_id,
            user_id,
            role,
        }])
    }

    pub(in crate::grpc) fn remove_member(
        &mut self,
        organization: &str,
        user: &str,
    ) -> Option<Vec<Step>> {
        let (org_id, user_id) = self.member(organization, user)?;
        Some(vec![Step::RemoveMember { org_id, user_id }])
    }

    pub(in crate::grpc) fn grant_user(
        &mut self,
        organization: &str,
        user: &str,
        permission_key: String,
    ) -> Option<Vec<Step>> {
        let member = self.member(organization, user);
        self.key(format_args!("permission"), &permission_key);
        let (org_id, user_id) = member?;
        Some(vec![Step::GrantUser {
            org_id,
            user_id,
            permission_key,
        }])
    }

    pub(in crate::grpc) fn revoke_user(
        &mut self,
        organization: &str,
        user: &str,
        permission_key: String,
    ) -> Option<Vec<Step>> {
        let member = self.member(organization, user);
        self.key(format_args!("permission"), &permission_key);
        let (org_id, user_id) = member?;
        Some(vec![Step::RevokeUser {
            org_id,
            user_id,
            permission_key,
        }])
    }

    pub(in crate::grpc) fn user_overrides(
        &mut self,
        organization: &str,
        overrides: Vec<UserOverride>,
    ) -> Option<Vec<Step>> {
        let organization = self.organization(organization);
        if overrides.is_empty() || overrides.len() > BULK_ITEMS_MAX {
            let found = overrides.len();
            self.violation(
                "overrides",
                format!("must be 1 to {BULK_ITEMS_MAX} overrides, not {found}"),
            );
            return None;
        }
        let mut users = Vec::with_capacity(overrides.len());
        for (
            index,
            UserOverride {
                user_id,
                permission,
                granted,
            },
        ) in overrides.into_iter().enumerate()
        {
            let prefix = format!("overrides[{index}].");
            let user = self.id(format_args!("{prefix}user_id"), &user_id);
            self.key(format_args!("{prefix}permission_key"), &permission);
            users.push(user.map(|user| (permission, user, granted)));
        }
        let mut users: Vec<(String, Uuid, bool)> = users.into_iter().collect::<Option<_>>()?;
        // In one order for all, as in a bulk change.
        users.sort();
        if let Some(twice) = users
            .windows(2)
            .find(|pair| (&pair[0].0, pair[0].1) == (&pair[1].0, pair[1].1))
        {
            let complaint = format!("`{}` is there twice for one user", shown(&twice[0].0));
            self.violation("overrides", complaint);
        }
        let org_id = organization?.0;
        let steps = users.into_iter().map(|(permission_key, user_id, granted)| {
            if granted {
                Step::GrantUser {
                    org_id,
                    user_id,
                    permission_key,
                }
            } else {
                Step::RevokeUser {
                    org_id,
                    user_id,
                    permission_key,
                }
            }
        });
        Some(steps.collect())
    }

    /// Whoever changes a membership changes the organization, its own membership too.
    fn member(&mut self, organization: &str, user: &str) -> Option<(Uuid, Uuid)> {
        let organization = self.organization(organization);
        let user = self.id(format_args!("user_id"), user);
        Some((organization?.0, user?))
    }

    pub(in crate::grpc) fn put_template(
        &mut self,
        asked: v1::PutPermissionTemplateRequest,
    ) -> Option<Vec<Step>> {
        let catalog = self.allow((), self.caller.may_change_the_catalog());
        for (field, key) in [
            ("permission", &asked.permission),
            ("module", &asked.module),
            ("default_min_role", &asked.default_min_role),
        ] {
            self.key(format_args!("{field}"), key);
        }
        let name = self.text("name", asked.name, NAME_BYTES_MAX);
        if name.is_none() {
            self.violation("name", "is missing");
        }
        let description = self.text("description", asked.description, DESCRIPTION_BYTES_MAX);
        let expected = self.updated_at("expected_updated_at", asked.expected_updated_at);
        catalog?;
        Some(vec![Step::PutTemplate {
            permission_key: asked.permission,
            name: name?,
            description,
            module: asked.module,
            min_role: asked.default_min_role,
            expected_updated_at: expected,
        }])
    }

    pub(in crate::grpc) fn delete_template(
        &mut self,
        permission_key: String,
        expected: Option<prost_types::Timestamp>,
    ) -> Option<Vec<Step>> {
        let catalog = self.allow((), self.caller.may_change_the_catalog());
        self.key(format_args!("permission"), &permission_key);
        let expected = self.updated_at("expected_updated_at", expected);
        catalog?;
        Some(vec![Step::DeleteTemplate {
            permission_key,
            expected_updated_at: expected,
        }])
    }
}
