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

pub(crate) const ASK_OF_ONE_ORGANIZATION: [&str; 3] = [
    "SELECT public.user_has_org_permission($1, $2::text::varchar)",
    "SELECT public.user_has_org_permission_enhanced($1, $2, true)",
    "SELECT public.user_has_org_permission_enhanced($1, $2, false)",
];

const READ_BULK: &str = "
SELECT user_has_permission, reason, role, effective_min_role, is_enabled, org_id, permission_key, module_name
FROM public.get_user_permissions_bulk($1, $2)";

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
    let mut found = Vec::new();
    for user in &names.users {
        let memberships: Vec<_> = world.memberships(user).collect();
        if memberships.len() > 1 {
            continue;
        }
        for permission in &names.permissions {
            let expected = memberships.first().is_some_and(|(organization, _)| {
                let question = Question {
                    organization: (*organization).to_owned(),
                    user: user.clone(),
                    permission: permission.clone(),
                };
                world.decide(&question).allowed
            });
            for sql in ASK_OF_ONE_ORGANIZATION {
                let row = client.query_one(sql, &[&id(user), permission]).await;
                let said: bool = row.unwrap().get(0);
                if said != expected {
                    found.push(format!("{user} {permission}: `{sql}` says {said}"));
                }
            }
        }
    }
    found
}

/// Without a module and with each: exactly the rows of the user's organizations.
async fn bulk(client: &Client, world: &World, names: &Names) -> Vec<String> {
    let mut found = Vec::new();
    let modules: BTreeSet<&String> = world.catalog.values().map(|t| &t.module).collect();
    let filters: Vec<Option<&String>> = std::iter::once(None)
        .chain(modules.into_iter().map(Some))
        .collect();
    for (user, filter) in names
        .users
        .iter()
        .flat_map(|user| filters.iter().map(move |filter| (user, filter)))
    {
        let rows = client.query(READ_BULK, &[&id(user), filter]).await.unwrap();
        let said: BTreeMap<Question, Decided> = rows
            .iter()
            .map(|row| {
                let question = Question {
                    organization: names.of(row.get(5)),
                    user: user.clone(),
                    permission: row.get(6),
                };
                (question, decided(row, row.get(0)))
            })
            .collect();
        let expected: BTreeMap<Question, Decided> = world
            .memberships(user)
            .flat_map(|(organization, _)| {
                world.catalog.iter().map(move |entry| (organization, entry))
            })
            .filter(|(_, (_, template))| filter.is_none_or(|module| *module == template.module))
            .map(|(organization, (permission, _))| {
                let question = Question {
                    organization: organization.to_owned(),
                    user: user.clone(),
                    permission: permission.clone(),
                };
                let row = expected_row(world, &question);
                (question, row)
            })
            .collect();
        if said != expected || said.len() != rows.len() {
            found.push(format!(
                "{user}, module {filter:?}: says {said:?}, the oracle {expected:?}"
            ));
        }
    }
    found
}
