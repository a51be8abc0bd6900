//! Short names for the organizations, users and permissions of a test, and the ids that follow from them.

use std::collections::{BTreeMap, BTreeSet};

use uuid::{Builder, Uuid};

use crate::oracle::Question;

/// No organization, user or permission of any test has these names: every test asks about them too.
pub(crate) const NO_ORGANIZATION: &str = "nowhere";
pub(crate) const NO_USER: &str = "stranger";
pub(crate) const NO_PERMISSION: &str = "no_such_permission";

/// What a test speaks of. Organizations and users have ids, so no two of them share a name.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    pub(crate) organizations: BTreeSet<String>,
    pub(crate) users: BTreeSet<String>,
    pub(crate) permissions: BTreeSet<String>,
    by_id: BTreeMap<Uuid, String>,
}

/// The id of the organization or user with this name.
pub(crate) fn id(name: &str) -> Uuid {
    let hash: [u8; 32] = blake3::hash(name.as_bytes()).into();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    Builder::from_random_bytes(bytes).into_uuid()
}

impl Names {
    /// These names, and the ones that mean nothing.
    pub(crate) fn new(
        mut organizations: BTreeSet<String>,
        mut users: BTreeSet<String>,
        mut permissions: BTreeSet<String>,
    ) -> Result<Self, String> {
        organizations.insert(NO_ORGANIZATION.to_owned());
        users.insert(NO_USER.to_owned());
        permissions.insert(NO_PERMISSION.to_owned());
        if let Some(name) = organizations.intersection(&users).next() {
            return Err(format!("`{name}` is an organization and a user"));
        }
        let by_id = organizations
            .union(&users)
            .map(|name| (id(name), name.clone()))
            .collect();
        Ok(Self {
            organizations,
            users,
            permissions,
            by_id,
        })
    }

    /// The name of an id; the id itself where it has none.
    pub(crate) fn of(&self, id: Uuid) -> String {
        self.by_id.get(&id).cloned().unwrap_or(id.to_string())
    }

    /// Every question that can be asked.
    pub(crate) fn questions(&self) -> Vec<Question> {
        let mut questions = Vec::new();
        for organization in &self.organizations {
            for user in &self.users {
                for permission in &self.permissions {
                    questions.push(Question {
                        organization: organization.clone(),
                        user: user.clone(),
                        permission: permission.clone(),
                    });
                }
            }
        }
        questions
    }

    /// Replaces `:name` by the id as an SQL literal; `::` is a cast, and `:'` cannot be a name.
    pub(crate) fn resolve(&self, sql: &str) -> Result<String, String> {
        let mut resolved = String::new();
        let mut rest = sql;
        while let Some(at) = rest.find(':') {
            let (before, after) = rest.split_at(at);
            resolved.push_str(before);
            if let Some(after_cast) = after.strip_prefix("::") {
                resolved.push_str("::");
                rest = after_cast;
                continue;
            }
            let after = &after[1..];
            let end = after
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(after.len());
            let (name, after) = after.split_at(end);
            if !self.organizations.contains(name) && !self.users.contains(name) {
                return Err(format!("`:{name}` names no organization and no user"));
            }
            resolved.push_str(&format!("'{}'", id(name)));
            rest = after;
        }
        resolved.push_str(rest);
        Ok(resolved)
    }
}
