//! The small world that is asked about, the writes that change it, and what is decided of it, by the oracle.
//!
//! Invariant: what a write does follows from the order of the log alone. So statements set and never add up, each
//! organization has a writer of its own, and what writes meet in are rows that are always there.

use std::collections::BTreeSet;

use hallpass_client::v1::{BatchCheckPermissionsItem, Reason};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use crate::{
    history::Decision,
    names::{NO_PERMISSION, NO_USER, Names, id},
    oracle::{Override, Question, Template, World},
};

pub(super) const ORGANIZATIONS: [&str; 3] = ["adams", "baker", "clark"];

/// The last one moves between organizations, which no other write touches.
const USERS: [&str; 6] = ["ann", "bob", "cam", "dee", "eli", "mover"];
const SETTLED_USERS: usize = 5;
const MOVER: &str = USERS[SETTLED_USERS];

/// The first one's override is always there, in each organization.
const PERMISSIONS: [&str; 4] = [
    "can_approve",
    "can_view_budget",
    "can_edit_events",
    "can_invite",
];

const LADDER: [(&str, i32); 5] = [
    ("parent_member", 0),
    ("volunteer", 1),
    ("committee_lead", 2),
    ("board_member", 3),
    ("admin", 4),
];

/// One transaction of one statement.
#[derive(Clone, Debug)]
pub(super) enum Write {
    Member(&'static str, &'static str, &'static str),
    NoMember(&'static str, &'static str),
    /// Everybody's role, by one statement.
    Members(&'static str, &'static str),
    Move(Option<&'static str>),
    Override(&'static str, &'static str, Override),
    NoOverride(&'static str, &'static str),
    /// Who is granted, and nothing else.
    Grant(&'static str, &'static str, Vec<&'static str>),
    /// In every organization, by one statement.
    EnabledEverywhere(bool),
    Template(&'static str, &'static str),
    Rank(&'static str, i32),
}

fn pick<T: Copy>(random: &mut StdRng, among: &[T]) -> T {
    *among.choose(random).unwrap()
}

fn role(random: &mut StdRng) -> &'static str {
    pick(random, &LADDER).0
}

fn granted(random: &mut StdRng) -> Vec<&'static str> {
    let count = random.random_range(0..=2);
    USERS.choose_multiple(random, count).copied().collect()
}

impl Write {
    /// What the writer of one organization does; without one, what no organization's writer may.
    pub(super) fn random(random: &mut StdRng, organization: Option<&'static str>) -> Self {
        let Some(organization) = organization else {
            return match random.random_range(0..10) {
                0..3 => Self::Template(pick(random, &PERMISSIONS), role(random)),
                3..6 => Self::EnabledEverywhere(random.random_bool(0.8)),
                6..9 => Self::Move((random.random_bool(0.9)).then(|| pick(random, &ORGANIZATIONS))),
                _ => Self::Rank("committee_lead", random.random_range(1..=3)),
            };
        };
        let user = pick(random, &USERS[..SETTLED_USERS]);
        match random.random_range(0..20) {
            0..8 => Self::Member(organization, user, role(random)),
            8..10 => Self::NoMember(organization, user),
            10 => Self::Members(organization, role(random)),
            11..15 => {
                let setting = Override {
                    min_role: (random.random_bool(0.7)).then(|| role(random).to_owned()),
                    enabled: pick(random, &[None, Some(true), Some(true), Some(false)]),
                    users: (random.random_bool(0.5)).then(|| names(&granted(random))),
                };
                Self::Override(organization, pick(random, &PERMISSIONS), setting)
            }
            15 => Self::NoOverride(organization, pick(random, &PERMISSIONS[1..])),
            _ => Self::Grant(organization, pick(random, &PERMISSIONS), granted(random)),
        }
    }

    pub(super) fn sql(&self) -> String {
        let user_list = |users: &[&str]| {
            let ids: Vec<String> = users.iter().map(|user| format!("'{}'", id(user))).collect();
            format!("ARRAY[{}]::uuid[]", ids.join(","))
        };
        match self {
            Self::Member(organization, user, role) => format!(
                "INSERT INTO public.profiles (org_id, user_id, role) VALUES ('{}', '{}', '{role}')
                 ON CONFLICT (org_id, user_id) DO UPDATE SET role = EXCLUDED.role",
                id(organization),
                id(user)
            ),
            Self::NoMember(organization, user) => format!(
                "DELETE FROM public.profiles WHERE org_id = '{}' AND user_id = '{}'",
                id(organization),
                id(user)
            ),
            Self::Members(organization, role) => format!(
                "UPDATE public.profiles SET role = '{role}' WHERE org_id = '{}' AND user_id <> '{}'",
                id(organization),
                id(MOVER)
            ),
            Self::Move(to) => {
                let to = to.map_or("NULL".to_owned(), |to| format!("'{}'", id(to)));
                let mover = id(MOVER);
                format!("UPDATE public.profiles SET org_id = {to} WHERE user_id = '{mover}'")
            }
            Self::Override(organization, permission, setting) => {
                let users = setting.users.as_ref().map_or("NULL".to_owned(), |users| {
                    let users: Vec<&str> = users.iter().flatten().map(String::as_str).collect();
                    user_list(&users)
                });
                let min_role = (setting.min_role.as_ref())
                    .map_or("NULL".to_owned(), |role| format!("'{role}'"));
                let enabled = setting.enabled.map_or("NULL".to_owned(), |e| e.to_string());
                format!(
                    "INSERT INTO public.organization_permissions
                         (org_id, permission_key, min_role_required, is_enabled, specific_users)
                     VALUES ('{}', '{permission}', {min_role}, {enabled}, {users})
                     ON CONFLICT (org_id, permission_key) DO UPDATE
                     SET min_role_required = EXCLUDED.min_role_required, is_enabled = EXCLUDED.is_enabled,
                         specific_users = EXCLUDED.specific_users",
                    id(organization)
                )
            }
            Self::NoOverride(organization, permission) => format!(
                "DELETE FROM public.organization_permissions WHERE org_id = '{}' AND permission_key = '{permission}'",
                id(organization)
            ),
            Self::Grant(organization, permission, users) => format!(
                "UPDATE public.organization_permissions SET specific_users = {}
                 WHERE org_id = '{}' AND permission_key = '{permission}'",
                user_list(users),
                id(organization)
            ),
            Self::EnabledEverywhere(enabled) => format!(
                "UPDATE public.organization_permissions SET is_enabled = {enabled} WHERE permission_key = '{}'",
                PERMISSIONS[0]
            ),
            Self::Template(permission, role) => format!(
                "UPDATE public.organization_permission_templates SET default_min_role = '{role}'
                 WHERE permission_key = '{permission}'"
            ),
            Self::Rank(role, rank) => {
                format!(
                    "UPDATE public.permission_roles SET rank = {rank} WHERE role_key = '{role}'"
                )
            }
        }
    }

    pub(super) fn apply(&self, world: &mut World) {
        let pair = |organization: &str, name: &str| (organization.to_owned(), name.to_owned());
        match self {
            Self::Member(organization, user, role) => {
                let role = Some((*role).to_owned());
                world.members.insert(pair(organization, user), role);
            }
            Self::NoMember(organization, user) => {
                world.members.remove(&pair(organization, user));
            }
            Self::Members(organization, role) => {
                for ((of, user), held) in &mut world.members {
                    if of == organization && user != MOVER {
                        *held = Some((*role).to_owned());
                    }
                }
            }
            Self::Move(to) => {
                world.members.retain(|(_, user), _| user != MOVER);
                if let Some(to) = to {
                    let role = Some("board_member".to_owned());
                    world.members.insert(pair(to, MOVER), role);
                }
            }
            Self::Override(organization, permission, setting) => {
                (world.overrides).insert(pair(organization, permission), setting.clone());
            }
            Self::NoOverride(organization, permission) => {
                world.overrides.remove(&pair(organization, permission));
            }
            Self::Grant(organization, permission, users) => {
                if let Some(setting) = world.overrides.get_mut(&pair(organization, permission)) {
                    setting.users = Some(names(users));
                }
            }
            Self::EnabledEverywhere(enabled) => {
                for ((_, permission), setting) in &mut world.overrides {
                    if permission == PERMISSIONS[0] {
                        setting.enabled = Some(*enabled);
                    }
                }
            }
            Self::Template(permission, role) => {
                world.catalog.get_mut(*permission).unwrap().min_role = (*role).to_owned();
            }
            Self::Rank(role, rank) => {
                world.ladder.insert((*role).to_owned(), *rank);
            }
        }
    }
}

fn names(users: &[&str]) -> Vec<Option<String>> {
    users.iter().map(|user| Some((*user).to_owned())).collect()
}

/// Everybody is a volunteer of every organization, and the mover a board member of one.
pub(super) fn first_world() -> World {
    let mut world = World {
        ladder: (LADDER.iter())
            .map(|(role, rank)| ((*role).to_owned(), *rank))
            .collect(),
        ..World::default()
    };
    for permission in PERMISSIONS {
        let template = Template {
            module: "torture".to_owned(),
            min_role: "board_member".to_owned(),
        };
        world.catalog.insert(permission.to_owned(), template);
    }
    for organization in ORGANIZATIONS {
        for user in &USERS[..SETTLED_USERS] {
            Write::Member(organization, user, "volunteer").apply(&mut world);
        }
        Write::Override(organization, PERMISSIONS[0], Override::default()).apply(&mut world);
    }
    Write::Move(Some(ORGANIZATIONS[0])).apply(&mut world);
    world
}

/// Every question that is asked, by its key: of these names and of a user and a permission that mean nothing.
pub(super) struct Questions {
    pub(super) names: Names,
    questions: Vec<Question>,
    pub(super) items: Vec<BatchCheckPermissionsItem>,
}

impl Questions {
    pub(super) fn new() -> Self {
        let set = |names: &[&str]| -> BTreeSet<String> {
            names.iter().map(|name| (*name).to_owned()).collect()
        };
        let names = Names::new(set(&ORGANIZATIONS), set(&USERS), set(&PERMISSIONS)).unwrap();
        let mut questions = names.questions();
        questions.retain(|question| ORGANIZATIONS.contains(&&*question.organization));
        let items = (questions.iter())
            .map(|question| BatchCheckPermissionsItem {
                organization_id: id(&question.organization).to_string(),
                user_id: id(&question.user).to_string(),
                permission: question.permission.clone(),
            })
            .collect();
        Self {
            names,
            questions,
            items,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.questions.len()
    }

    pub(super) fn name(&self, key: usize) -> String {
        self.questions[key].to_string()
    }

    /// The key of a question about somebody nobody knows, which has the same answer for all of them.
    pub(super) fn of_a_stranger(&self) -> usize {
        let is_it = |q: &Question| q.user == NO_USER && q.permission != NO_PERMISSION;
        self.questions.iter().position(is_it).unwrap()
    }

    /// What is decided of every key.
    pub(super) fn decide(&self, world: &World) -> Vec<Decision> {
        (self.questions.iter())
            .map(|question| {
                let decided = world.decide(question);
                let name = format!("REASON_{}", decided.reason);
                let reason = Reason::from_str_name(&name).unwrap();
                Decision {
                    allowed: decided.allowed,
                    reason: u8::try_from(i32::from(reason)).unwrap(),
                }
            })
            .collect()
    }
}
