//! The format of `tests/scenarios/*.yaml`, read strictly: what is misspelled is an error, not an empty test.
//!
//! ```yaml
//! name: What this file shows
//! ladder: {volunteer: 1, admin: 4}            # role: rank
//! catalog:
//!   can_view: {module: budget, min_role: volunteer}
//! organizations:
//!   lincoln:
//!     members: {ann: admin, bob: null}        # user: role
//!     overrides:                              # what is left out is NULL
//!       can_view: {min_role: admin, enabled: true, users: [bob, null]}
//! also: {users: [dan]}                        # names that occur in no data above
//! assertions:
//!   - lincoln ann can_view = allow GRANTED_BY_ROLE
//! steps:                                      # then, one after the other
//!   - sql: UPDATE profiles SET role = 'admin' WHERE user_id = :bob
//!     session: other                          # optional: on a connection of this name
//!     fails: "23505"                          # optional: the SQLSTATE it must fail with
//!     assertions: [...]
//! ```
//! `nowhere`, `stranger` and `no_such_permission` are always there, and mean nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    marker::PhantomData,
    path::Path,
};

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

use crate::{
    names::Names,
    oracle::{Decision, Override, Question, Template, World},
};

pub(crate) const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scenarios");

/// One file, checked.
pub(crate) struct Scenario {
    pub(crate) file: String,
    pub(crate) names: Names,
    pub(crate) world: World,
    pub(crate) assertions: Vec<Assertion>,
    pub(crate) steps: Vec<Step>,
}

pub(crate) struct Step {
    pub(crate) sql: String,
    pub(crate) session: String,
    pub(crate) fails: Option<String>,
    pub(crate) assertions: Vec<Assertion>,
}

/// `lincoln ann can_view = allow GRANTED_BY_ROLE`
pub(crate) struct Assertion {
    pub(crate) line: String,
    pub(crate) question: Question,
    pub(crate) decision: Decision,
}

const REASONS: [(&str, &str); 6] = [
    ("deny", "UNKNOWN_PERMISSION"),
    ("deny", "NOT_A_MEMBER"),
    ("deny", "PERMISSION_DISABLED"),
    ("allow", "GRANTED_BY_ROLE"),
    ("allow", "GRANTED_TO_USER"),
    ("deny", "ROLE_TOO_LOW"),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// For the reader of the file.
    #[serde(rename = "name")]
    _name: String,
    ladder: Unique<i32>,
    catalog: Unique<TemplateFields>,
    organizations: Unique<OrganizationFields>,
    #[serde(default)]
    also: Also,
    assertions: Vec<String>,
    #[serde(default)]
    steps: Vec<StepFields>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TemplateFields {
    module: String,
    min_role: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OrganizationFields {
    #[serde(default)]
    members: Unique<Option<String>>,
    #[serde(default)]
    overrides: Unique<OverrideFields>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OverrideFields {
    min_role: Option<String>,
    enabled: Option<bool>,
    users: Option<Vec<Option<String>>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Also {
    users: BTreeSet<String>,
    permissions: BTreeSet<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StepFields {
    sql: String,
    #[serde(default)]
    session: String,
    fails: Option<String>,
    #[serde(default)]
    assertions: Vec<String>,
}

/// A map in which a key comes once: serde's own would keep the last of several.
struct Unique<T>(BTreeMap<String, T>);

/// Every file of the directory, by name.
pub(crate) fn all() -> Vec<Scenario> {
    let mut paths: Vec<_> = fs::read_dir(DIRECTORY)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths.iter().map(|path| read(path)).collect()
}

fn read(path: &Path) -> Scenario {
    let file = path.file_name().unwrap().to_string_lossy();
    let text = fs::read_to_string(path).unwrap();
    parse(&file, &text).unwrap_or_else(|error| panic!("{error}"))
}

/// Says in which file, and at which line or assertion, something is wrong.
pub(crate) fn parse(file: &str, text: &str) -> Result<Scenario, String> {
    let scenario = serde_norway::from_str(text).map_err(|error| error.to_string());
    scenario
        .and_then(|fields| check(file, fields))
        .map_err(|error| format!("{file}: {error}"))
}

fn check(file: &str, fields: File) -> Result<Scenario, String> {
    let names = names(&fields)?;
    let assertions = assertions(&names, &fields.assertions)?;
    let mut steps = Vec::new();
    for step in fields.steps.iter() {
        steps.push(Step {
            sql: names.resolve(&step.sql)?,
            session: step.session.clone(),
            fails: step.fails.clone(),
            assertions: self::assertions(&names, &step.assertions)?,
        });
    }
    Ok(Scenario {
        file: file.to_owned(),
        names,
        world: world(fields),
        assertions,
        steps,
    })
}

fn names(fields: &File) -> Result<Names, String> {
    let organizations = &fields.organizations.0;
    let mut users = fields.also.users.clone();
    let mut permissions = fields.also.permissions.clone();
    permissions.extend(fields.catalog.0.keys().cloned());
    for organization in organizations.values() {
        users.extend(organization.members.0.keys().cloned());
        for (permission, setting) in &organization.overrides.0 {
            permissions.insert(permission.clone());
            users.extend(setting.users.iter().flatten().flatten().cloned());
        }
    }
    Names::new(organizations.keys().cloned().collect(), users, permissions)
}

fn world(fields: File) -> World {
    let mut world = World {
        ladder: fields.ladder.0,
        ..World::default()
    };
    for (permission, TemplateFields { module, min_role }) in fields.catalog.0 {
        world
            .catalog
            .insert(permission, Template { module, min_role });
    }
    for (organization, OrganizationFields { members, overrides }) in fields.organizations.0 {
        for (user, role) in members.0 {
            world.members.insert((organization.clone(), user), role);
        }
        for (permission, setting) in overrides.0 {
            let setting = Override {
                min_role: setting.min_role,
                enabled: setting.enabled,
                users: setting.users,
            };
            let key = (organization.clone(), permission);
            world.overrides.insert(key, setting);
        }
    }
    world
}

fn assertions(names: &Names, lines: &[String]) -> Result<Vec<Assertion>, String> {
    let mut assertions: Vec<Assertion> = Vec::new();
    for line in lines {
        let assertion = assertion(names, line).map_err(|error| format!("`{line}`: {error}"))?;
        if let Some(earlier) = assertions.iter().find(|a| a.question == assertion.question) {
            return Err(format!("`{line}`: asked before, by `{}`", earlier.line));
        }
        assertions.push(assertion);
    }
    Ok(assertions)
}

fn assertion(names: &Names, line: &str) -> Result<Assertion, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [organization, user, permission, "=", verdict, reason] = words[..] else {
        return Err(
            "not of the form `organization user permission = allow|deny REASON`".to_owned(),
        );
    };
    for (name, known) in [
        (organization, &names.organizations),
        (user, &names.users),
        (permission, &names.permissions),
    ] {
        if !known.contains(name) {
            return Err(format!("no data has the name `{name}`"));
        }
    }
    let (verdict, reason) = REASONS
        .iter()
        .find(|known| **known == (verdict, reason))
        .ok_or_else(|| format!("`{verdict} {reason}` is no decision"))?;
    Ok(Assertion {
        line: line.to_owned(),
        question: Question {
            organization: organization.to_owned(),
            user: user.to_owned(),
            permission: permission.to_owned(),
        },
        decision: Decision {
            allowed: *verdict == "allow",
            reason,
        },
    })
}

impl<T> Default for Unique<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueVisitor(PhantomData))
    }
}

struct UniqueVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for UniqueVisitor<T> {
    type Value = Unique<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some((key, value)) = access.next_entry::<String, T>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("`{key}` comes twice")));
            }
            map.insert(key, value);
        }
        Ok(Unique(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOUND: &str = "
name: A file
ladder: {volunteer: 1, admin: 4}
catalog: {can_view: {module: budget, min_role: volunteer}}
organizations:
  lincoln: {members: {ann: admin}}
assertions:
  - lincoln ann can_view = allow GRANTED_BY_ROLE
";

    /// What `parse` says of the sound file with one thing in it replaced.
    fn error_after(replaced: &str, by: &str) -> String {
        assert!(SOUND.contains(replaced));
        match parse("file.yaml", &SOUND.replacen(replaced, by, 1)) {
            Ok(_) => "none".to_owned(),
            Err(error) => error,
        }
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (replaced, by, error) in [
            ("name:", "name:", "none"),
            (
                "module:",
                "modul:",
                "unknown field `modul`, expected `module` or `min_role` at line 4",
            ),
            (
                "admin: 4",
                "volunteer: 4",
                "ladder: `volunteer` comes twice at line 3",
            ),
            (
                "lincoln ann",
                "lincoln amy",
                "`lincoln amy can_view = allow GRANTED_BY_ROLE`: no data has the name `amy`",
            ),
            ("lincoln ann", "ann ann", "no data has the name `ann`"),
            (
                "ann can_view",
                "ann can_veiw",
                "no data has the name `can_veiw`",
            ),
            ("allow G", "deny G", "`deny GRANTED_BY_ROLE` is no decision"),
            (
                "BY_ROLE\n",
                "BY_ROLE\n  - lincoln ann can_view = deny ROLE_TOO_LOW\n",
                "`lincoln ann can_view = deny ROLE_TOO_LOW`: asked before",
            ),
            (" = allow", " allow", "not of the form"),
            (
                "ann: admin",
                "lincoln: admin",
                "`lincoln` is an organization and a user",
            ),
            (
                "assertions:",
                "steps: [{sql: 'SELECT :bob'}]\nassertions:",
                "`:bob` names no organization and no user",
            ),
        ] {
            let said = error_after(replaced, by);
            assert!(said.contains(error), "{by}: {said}");
            assert!(said == "none" || said.starts_with("file.yaml: "), "{said}");
        }
    }

    #[test]
    fn names_in_sql_become_ids_and_casts_stay() {
        let names = parse("file.yaml", SOUND)
            .unwrap_or_else(|e| panic!("{e}"))
            .names;
        let ann = crate::names::id("ann");
        assert_eq!(
            names.resolve("SELECT :ann, '1'::text").unwrap(),
            format!("SELECT '{ann}', '1'::text")
        );
    }
}
