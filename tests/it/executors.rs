//! The ways to ask SQL for a decision. Each says where it disagrees with the oracle.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::{Client, Row};
use uuid::Uuid;

use crate::{
    names::{Names, id},
    oracle::{Question, World},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Executor {
    /// `effective_user_permissions`: rows 1 and 2 of the table by absence.
    View,
    /// `user_permission_matrix`, which must be the truth.
    Matrix,
    /// `hallpass.load` from the view alone.
    LoadLive,
    /// `hallpass.load`, believing the matrix where the log says so.
    LoadBelieving,
    /// `user_has_permission_in_org`
    InOrganization,
    /// `user_has_org_permission` and `user_has_org_permission_enhanced` for users of at most one organization.
    OfOneOrganization,
    /// `get_user_permissions_bulk`
    Bulk,
}

impl Executor {
    /// Right at any moment, in a transaction that has changed something too.
    pub(crate) const ALWAYS: [Self; 6] = [
        Self::View,
        Self::LoadLive,
        Self::LoadBelieving,
        Self::InOrganization,
        Self::OfOneOrganization,
        Self::Bulk,
    ];
}

/// What one executor says to one question.
enum Answer {
    /// No row.
    Absent,
    Verdict(bool),
    Reason(String),
    Row(Decided),
}

#[derive(Debug, PartialEq, Eq)]
struct Decided {
    allowed: bool,
    reason: String,
    role: Option<String>,
    min_role: Option<String>,
    enabled: bool,
}

const READ_VIEW: &str = "
SELECT e.user_has_permission, e.reason, e.role, e.effective_min_role, e.is_enabled
FROM unnest($1::uuid[], $2::uuid[], $3::text[]) WITH ORDINALITY q (org_id, user_id, permission_key, n)
LEFT JOIN public.effective_user_permissions e USING (org_id, user_id, permission_key) ORDER BY n";

const READ_MATRIX: &str = "
SELECT e.user_has_permission, e.reason, e.role, e.effective_min_role, e.is_enabled
FROM unnest($1::uuid[], $2::uuid[], $3::text[]) WITH ORDINALITY q (org_id, user_id, permission_key, n)
LEFT JOIN public.user_permission_matrix e USING (org_id, user_id, permission_key) ORDER BY n";

const LOAD: &str = "
SELECT org_id, user_id, role, permission_keys, reasons, min_roles, enabled FROM hallpass.load($1, $2, $3)";

const ASK_IN_ORGANIZATION: &str = "
SELECT public.user_has_permission_in_org(org_id, user_id, permission_key)
FROM unnest($1::uuid[], $2::uuid[], $3::text[]) WITH ORDINALITY q (org_id, user_id, permission_key, n) ORDER BY n";

/// Raises for a user of several organizations, whichever function is asked.
const ASK_OF_ONE_ORGANIZATION: &str = "
SELECT public.user_has_org_permission(user_id, permission_key::varchar),
       public.user_has_org_permission_enhanced(user_id, permission_key, true),
       public.user_has_org_permission_enhanced(user_id, permission_key, false)
FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY q (user_id, permission_key, n) ORDER BY n";

const READ_BULK: &str = "
SELECT p.has_permission, p.reason, p.role, p.effective_min_role, p.is_enabled,
       p.org_id, q.user_id, p.permission_key
FROM unnest($1::uuid[]) q (user_id) CROSS JOIN LATERAL public.get_user_permissions_bulk(q.user_id, $2) p";

impl Executor {
    /// A line for each question whose answer is not the oracle's.
    pub(crate) async fn disagreements(
        self,
        client: &Client,
        world: &World,
        names: &Names,
    ) -> Vec<String> {
        let found = match self {
            Self::View => ask_each(client, world, names, READ_VIEW, row_answer).await,
            Self::Matrix => ask_each(client, world, names, READ_MATRIX, row_answer).await,
            Self::InOrganization => {
                let verdict = |row: &Row| Answer::Verdict(row.get(0));
                ask_each(client, world, names, ASK_IN_ORGANIZATION, verdict).await
            }
            Self::LoadLive => load(client, world, names, false).await,
            Self::LoadBelieving => load(client, world, names, true).await,
            Self::OfOneOrganization => ask_of_one(client, world, names).await,
            Self::Bulk => bulk(client, world, names).await,
        };
        found
            .into_iter()
            .map(|line| format!("{self:?}: {line}"))
            .collect()
    }
}

async fn ask_each(
    client: &Client,
    world: &World,
    names: &Names,
    sql: &str,
    answer: impl Fn(&Row) -> Answer,
) -> Vec<String> {
    let questions = names.questions();
    let organizations: Vec<Uuid> = questions.iter().map(|q| id(&q.organization)).collect();
    let users: Vec<Uuid> = questions.iter().map(|q| id(&q.user)).collect();
    let permissions: Vec<&str> = questions.iter().map(|q| q.permission.as_str()).collect();
    let rows = client
        .query(sql, &[&organizations, &users, &permissions])
        .await
        .unwrap();
    assert_eq!(rows.len(), questions.len());
    questions
        .iter()
        .zip(&rows)
        .filter_map(|(question, row)| disagreement(world, question, &answer(row)))
        .collect()
}

fn row_answer(row: &Row) -> Answer {
    match row.get::<_, Option<bool>>(0) {
        None => Answer::Absent,
        Some(allowed) => Answer::Row(decided(row, allowed)),
    }
}

fn decided(row: &Row, allowed: bool) -> Decided {
    Decided {
        allowed,
        reason: row.get(1),
        role: row.get(2),
        min_role: row.get(3),
        enabled: row.get(4),
    }
}

fn disagreement(world: &World, question: &Question, answer: &Answer) -> Option<String> {
    let expected = world.decide(question);
    let agrees = match answer {
        Answer::Absent => ["UNKNOWN_PERMISSION", "NOT_A_MEMBER"].contains(&expected.reason),
        Answer::Verdict(allowed) => *allowed == expected.allowed,
        Answer::Reason(reason) => reason == expected.reason,
        Answer::Row(decided) => *decided == expected_row(world, question),
    };
    (!agrees).then(|| {
        let said = match answer {
            Answer::Absent => "no row".to_owned(),
            Answer::Verdict(allowed) => format!("{allowed}"),
            Answer::Reason(reason) => reason.clone(),
            Answer::Row(decided) => format!("{decided:?}"),
        };
        format!("{question}: says {said}, the oracle {}", expected.reason)
    })
}

fn expected_row(world: &World, question: &Question) -> Decided {
    let (organization, permission) = (&question.organization, &question.permission);
    let decision = world.decide(question);
    Decided {
        allowed: decision.allowed,
        reason: decision.reason.to_owned(),
        role: world
            .memberships(&question.user)
            .find(|(of, _)| of == organization)
            .and_then(|(_, role)| role.map(str::to_owned)),
        min_role: world.min_role(organization, permission).map(str::to_owned),
        enabled: world.is_enabled(organization, permission),
    }
}

async fn load(client: &Client, world: &World, names: &Names, believe_matrix: bool) -> Vec<String> {
    let questions = names.questions();
    let pairs: BTreeSet<(Uuid, Uuid)> = questions
        .iter()
        .map(|q| (id(&q.organization), id(&q.user)))
        .collect();
    let (organizations, users): (Vec<Uuid>, Vec<Uuid>) = pairs.into_iter().unzip();
    let rows = client
        .query(LOAD, &[&organizations, &users, &believe_matrix])
        .await
        .unwrap();
    let (header, members) = rows.split_first().unwrap();
    let catalog: Vec<String> = header.get::<_, Option<_>>(3).unwrap_or_default();
    let members: BTreeMap<(Uuid, Uuid), &Row> = members
        .iter()
        .map(|row| ((row.get(0), row.get(1)), row))
        .collect();
    assert_eq!(members.len() + 1, rows.len(), "a member comes once");
    questions
        .iter()
        .filter_map(|question| {
            let member = members.get(&(id(&question.organization), id(&question.user)));
            let answer = match member {
                _ if !catalog.contains(&question.permission) => {
                    Answer::Reason("UNKNOWN_PERMISSION".to_owned())
                }
                None => Answer::Reason("NOT_A_MEMBER".to_owned()),
                Some(row) => loaded(row, &question.permission),
            };
            disagreement(world, question, &answer)
        })
        .collect()
}

fn loaded(row: &Row, permission: &str) -> Answer {
    let keys: Vec<Option<String>> = row.get(3);
    let Some(at) = keys
        .iter()
        .position(|key| key.as_deref() == Some(permission))
    else {
        return Answer::Absent;
    };
    let reason = row.get::<_, Vec<String>>(4).swap_remove(at);
    Answer::Row(Decided {
        allowed: reason.starts_with("GRANTED"),
        reason,
        role: row.get(2),
        min_role: row.get::<_, Vec<Option<String>>>(5).swap_remove(at),
        enabled: row.get::<_, Vec<bool>>(6)[at],
    })
}

async fn ask_of_one(client: &Client, world: &World, names: &Names) -> Vec<String> {
    let asked: Vec<(&String, &String)> = names
        .users
        .iter()
        .filter(|user| world.memberships(user).count() <= 1)
        .flat_map(|user| names.permissions.iter().map(move |p| (user, p)))
        .collect();
    let users: Vec<Uuid> = asked.iter().map(|(user, _)| id(user)).collect();
    let permissions: Vec<&String> = asked.iter().map(|(_, permission)| *permission).collect();
    let rows = client
        .query(ASK_OF_ONE_ORGANIZATION, &[&users, &permissions])
        .await
        .unwrap();
    assert_eq!(rows.len(), asked.len());
    let mut found = Vec::new();
    for ((user, permission), row) in asked.into_iter().zip(&rows) {
        let expected = world.memberships(user).any(|(organization, _)| {
            let question = question(organization, user, permission);
            world.decide(&question).allowed
        });
        let said: [bool; 3] = [row.get(0), row.get(1), row.get(2)];
        if said != [expected; 3] {
            found.push(format!(
                "{user} {permission}: {said:?}, the oracle {expected}"
            ));
        }
    }
    found
}

fn question(organization: &str, user: &str, permission: &str) -> Question {
    Question {
        organization: organization.to_owned(),
        user: user.to_owned(),
        permission: permission.to_owned(),
    }
}

/// Without a module and with each: exactly the rows of the user's organizations.
async fn bulk(client: &Client, world: &World, names: &Names) -> Vec<String> {
    let modules: BTreeSet<&String> = world.catalog.values().map(|t| &t.module).collect();
    let filters: Vec<Option<&String>> = std::iter::once(None)
        .chain(modules.into_iter().map(Some))
        .collect();
    let mut found = Vec::new();
    for filter in filters {
        let users: Vec<Uuid> = names.users.iter().map(|user| id(user)).collect();
        let rows = client.query(READ_BULK, &[&users, &filter]).await.unwrap();
        let said: BTreeMap<Question, Decided> = rows
            .iter()
            .map(|row| {
                let question = question(&names.of(row.get(5)), &names.of(row.get(6)), row.get(7));
                (question, decided(row, row.get(0)))
            })
            .collect();
        let expected: BTreeMap<Question, Decided> = world
            .members
            .keys()
            .flat_map(|member| world.catalog.iter().map(move |entry| (member, entry)))
            .filter(|(_, (_, template))| filter.is_none_or(|module| *module == template.module))
            .map(|((organization, user), (permission, _))| {
                let question = question(organization, user, permission);
                let row = expected_row(world, &question);
                (question, row)
            })
            .collect();
        if said != expected || said.len() != rows.len() {
            found.push(format!(
                "module {filter:?}: says {said:?}, the oracle {expected:?}"
            ));
        }
    }
    found
}
