//! What a decision is, a second time: DESIGN section 2 over plain data, naively.
//!
//! Invariant: shares nothing with the service and knows no SQL; it is what everything else is compared with.

use std::{collections::BTreeMap, fmt};

/// Everything that decisions are made of, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct World {
    /// role -> rank
    pub(crate) ladder: BTreeMap<String, i32>,
    /// permission -> template
    pub(crate) catalog: BTreeMap<String, Template>,
    /// (organization, user) -> role, which may be NULL
    pub(crate) members: BTreeMap<(String, String), Option<String>>,
    /// (organization, permission) -> override
    pub(crate) overrides: BTreeMap<(String, String), Override>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Template {
    pub(crate) module: String,
    pub(crate) min_role: String,
}

/// `None` is NULL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Override {
    pub(crate) min_role: Option<String>,
    pub(crate) enabled: Option<bool>,
    pub(crate) users: Option<Vec<Option<String>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Question {
    pub(crate) organization: String,
    pub(crate) user: String,
    pub(crate) permission: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) allowed: bool,
    pub(crate) reason: &'static str,
}

const fn allow(reason: &'static str) -> Decision {
    Decision {
        allowed: true,
        reason,
    }
}

const fn deny(reason: &'static str) -> Decision {
    Decision {
        allowed: false,
        reason,
    }
}

impl World {
    /// The table of section 2, row by row: the first that matches wins.
    pub(crate) fn decide(&self, question: &Question) -> Decision {
        let organization = &question.organization;
        if !self.catalog.contains_key(&question.permission) {
            return deny("UNKNOWN_PERMISSION");
        }
        let Some(role) = self
            .members
            .get(&(organization.clone(), question.user.clone()))
        else {
            return deny("NOT_A_MEMBER");
        };
        let setting = self.setting(organization, &question.permission);
        if setting.enabled == Some(false) {
            return deny("PERMISSION_DISABLED");
        }
        let needed = self.rank(self.min_role(organization, &question.permission));
        let held = self.rank(role.as_deref());
        if let (Some(held), Some(needed)) = (held, needed)
            && held >= needed
        {
            return allow("GRANTED_BY_ROLE");
        }
        if setting
            .users
            .is_some_and(|users| users.contains(&Some(question.user.clone())))
        {
            return allow("GRANTED_TO_USER");
        }
        deny("ROLE_TOO_LOW")
    }

    /// The effective minimum role; `None` for a permission that no template has.
    pub(crate) fn min_role(&self, organization: &str, permission: &str) -> Option<&str> {
        let template = self.catalog.get(permission)?;
        match self
            .overrides
            .get(&(organization.to_owned(), permission.to_owned()))
        {
            Some(Override {
                min_role: Some(min_role),
                ..
            }) => Some(min_role),
            _ => Some(&template.min_role),
        }
    }

    pub(crate) fn is_enabled(&self, organization: &str, permission: &str) -> bool {
        self.setting(organization, permission).enabled != Some(false)
    }

    /// The organizations that `user` is a member of, with the role in each.
    pub(crate) fn memberships<'a>(
        &'a self,
        user: &'a str,
    ) -> impl Iterator<Item = (&'a str, Option<&'a str>)> {
        self.members
            .iter()
            .filter(move |((_, member), _)| member == user)
            .map(|((organization, _), role)| (organization.as_str(), role.as_deref()))
    }

    fn setting(&self, organization: &str, permission: &str) -> Override {
        let key = (organization.to_owned(), permission.to_owned());
        self.overrides.get(&key).cloned().unwrap_or_default()
    }

    fn rank(&self, role: Option<&str>) -> Option<i32> {
        self.ladder.get(role?).copied()
    }
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            organization,
            user,
            permission,
        } = self;
        write!(f, "{organization} {user} {permission}")
    }
}
