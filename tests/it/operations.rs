//! Random changes: statements over a small world, put into transactions. An operation is what it says in SQL, with
//! `:name` for ids, so that a case prints itself as the steps of a scenario.

use std::fmt::{self, Write};

use proptest::{
    bool::weighted,
    collection::vec,
    prelude::{BoxedStrategy, Just, Strategy, prop_oneof},
    sample::select,
};

/// What every case starts from. Small enough that operations meet each other's rows.
pub(crate) const SEED: &str = "name: Found by the property test
ladder: {low: 1, middle: 2, high: 3}
catalog:
  can_a: {module: m, min_role: low}
  can_b: {module: m, min_role: middle}
  can_c: {module: m, min_role: high}
  can_d: {module: n, min_role: odd}
organizations:
  adams:
    members: {ann: high, bob: middle, cyd: low, dan: null}
    overrides: {can_b: {users: [cyd, dan]}, can_c: {min_role: low, enabled: true}}
  lincoln:
    members: {ann: low, eve: middle, fay: odd}
    overrides: {can_a: {enabled: false}, can_d: {min_role: middle, users: [ann, null]}}
  madison: {members: {bob: high}}
also: {permissions: [can_e]}
assertions: []
";
const ORGANIZATIONS: [&str; 3] = [":adams", ":lincoln", ":madison"];
const USERS: [&str; 6] = [":ann", ":bob", ":cyd", ":dan", ":eve", ":fay"];
const PERMISSIONS: [&str; 5] = ["can_a", "can_b", "can_c", "can_d", "can_e"];
const ROLES: [&str; 6] = ["'low'", "'middle'", "'high'", "'odd'", "''", "NULL"];
const ISOLATION: [&str; 3] = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"];
const TABLES: [&str; 5] = [
    "profiles",
    "organization_permissions",
    "organization_permission_templates",
    "permission_roles",
    "organizations CASCADE",
];
const VIEWS: [&str; 2] = ["user_permission_matrix", "org_permission_summary"];

/// Statements of one transaction, and transactions of one case, at most.
const STATEMENTS_MAX: usize = 6;
const TRANSACTIONS_MAX: usize = 60;

/// After how many of the transactions the decisions are looked at: the cache stays warm from look to look.
const LOOKS: f64 = 0.3;

/// SQL that goes to the server in one piece.
pub(crate) type Statement = String;

/// What one session does in one go.
#[derive(Clone, Debug)]
pub(crate) struct Transaction {
    pub(crate) session: Session,
    /// `None`: every statement is a transaction of its own.
    pub(crate) isolation: Option<&'static str>,
    pub(crate) statements: Vec<Statement>,
    pub(crate) commits: bool,
    /// Whether the decisions are looked at afterwards.
    pub(crate) looks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Session {
    Main,
    /// Its snapshot may be old by the time it does something.
    Old,
}

/// A run from the seed on.
#[derive(Clone)]
pub(crate) struct Case(pub(crate) Vec<Transaction>);

impl Case {
    pub(crate) fn operations(&self) -> usize {
        self.0.iter().map(|t| t.statements.len()).sum()
    }

    /// As a file for `tests/scenarios`; a step that failed still needs its `fails`.
    pub(crate) fn scenario(&self) -> String {
        let mut text = format!("{SEED}steps:\n");
        for transaction in &self.0 {
            for sql in transaction.pieces() {
                // Writing to a String does not fail.
                let sql = sql.replace('\n', "\n      ");
                let _written = writeln!(text, "  - sql: |\n      {sql}");
                if transaction.session == Session::Old {
                    text.push_str("    session: old\n");
                }
            }
        }
        text
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.scenario())
    }
}

impl Transaction {
    pub(crate) fn begin(&self) -> Option<String> {
        Some(format!("BEGIN ISOLATION LEVEL {}", self.isolation?))
    }

    pub(crate) fn end(&self) -> &'static str {
        if self.commits { "COMMIT" } else { "ROLLBACK" }
    }

    fn pieces(&self) -> Vec<String> {
        match self.begin() {
            None => self.statements.clone(),
            Some(begin) => vec![format!(
                "{begin};\n{};\n{}",
                self.statements.join(";\n"),
                self.end()
            )],
        }
    }
}

pub(crate) fn case(server_version: i32) -> impl Strategy<Value = Case> {
    let transaction = prop_oneof![
        20 => transaction(server_version),
        10 => alone(server_version),
        1 => old_snapshot(),
    ];
    vec(transaction, 1..TRANSACTIONS_MAX).prop_map(Case)
}

fn transaction(server_version: i32) -> impl Strategy<Value = Transaction> {
    let statement = prop_oneof![
        40 => change(server_version),
        2 => refresh(),
        4 => select(&["SET CONSTRAINTS ALL IMMEDIATE", "SET CONSTRAINTS ALL DEFERRED"][..])
            .prop_map(str::to_owned),
        // Ordinary triggers and foreign keys are off then.
        1 => Just("SET LOCAL session_replication_role = replica".to_owned()),
        6 => vec(change(server_version), 1..3).prop_map(|inner| {
            format!("SAVEPOINT s;\n{};\nROLLBACK TO s", inner.join(";\n"))
        }),
        2 => change(server_version).prop_map(|inner| {
            format!("SAVEPOINT s;\n{inner};\nSET CONSTRAINTS ALL IMMEDIATE;\nROLLBACK TO s")
        }),
        1 => change(server_version)
            .prop_map(|inner| format!("SAVEPOINT s;\n{inner};\nRELEASE s")),
    ];
    (
        select(&ISOLATION[..]),
        vec(statement, 1..=STATEMENTS_MAX),
        weighted(0.8),
        weighted(LOOKS),
    )
        .prop_map(|(isolation, statements, commits, looks)| Transaction {
            session: Session::Main,
            isolation: Some(isolation),
            statements,
            commits,
            looks,
        })
}

fn alone(server_version: i32) -> impl Strategy<Value = Transaction> {
    let statement = prop_oneof![20 => change(server_version), 1 => refresh()];
    (vec(statement, 1..=STATEMENTS_MAX), weighted(LOOKS)).prop_map(|(statements, looks)| {
        Transaction {
            session: Session::Main,
            isolation: None,
            statements,
            commits: true,
            looks,
        }
    })
}

/// Takes a snapshot, or refreshes from the one taken before. `SELECT 1` locks nothing that others could wait for.
fn old_snapshot() -> impl Strategy<Value = Transaction> {
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1".to_owned();
    let statement = prop_oneof![
        Just(begin),
        refresh().prop_map(|refresh| format!("{refresh}; COMMIT")),
    ];
    statement.prop_map(|statement| Transaction {
        session: Session::Old,
        isolation: None,
        statements: vec![statement],
        commits: true,
        looks: true,
    })
}

fn refresh() -> BoxedStrategy<Statement> {
    prop_oneof![
        4 => Just("SELECT public.refresh_permission_materialized_views()".to_owned()),
        4 => select(&VIEWS[..]).prop_map(|v| format!("REFRESH MATERIALIZED VIEW {v}")),
        2 => select(&VIEWS[..]).prop_map(|v| format!("REFRESH MATERIALIZED VIEW CONCURRENTLY {v}")),
        1 => select(&VIEWS[..]).prop_map(|v| format!("REFRESH MATERIALIZED VIEW {v} WITH NO DATA")),
    ]
    .boxed()
}

fn change(server_version: i32) -> BoxedStrategy<Statement> {
    prop_oneof![
        50 => membership(server_version),
        40 => setting(),
        4 => catalog(),
        3 => ladder(),
        6 => organization(),
        1 => select(&TABLES[..]).prop_map(|table| format!("TRUNCATE {table}")),
    ]
    .boxed()
}

fn membership(server_version: i32) -> BoxedStrategy<Statement> {
    let names = (
        select(&ORGANIZATIONS[..]),
        select(&ORGANIZATIONS[..]),
        select(&USERS[..]),
        select(&USERS[..]),
        select(&ROLES[..]),
    );
    (0..17, names)
        .prop_map(move |(kind, (o, o2, u, u2, r))| match kind {
            0 => format!("INSERT INTO profiles (org_id, user_id, role) VALUES ({o}, {u}, {r})"),
            1 => format!(
                "INSERT INTO profiles (org_id, user_id, role) VALUES ({o}, {u}, {r}), ({o2}, {u2}, {r})
ON CONFLICT DO NOTHING"
            ),
            2 if u != u2 => format!(
                "INSERT INTO profiles (org_id, user_id, role) VALUES ({o}, {u}, {r}), ({o}, {u2}, 'low')
ON CONFLICT (org_id, user_id) DO UPDATE SET role = excluded.role"
            ),
            3 if server_version >= 150_000 && (o, u) != (o2, u2) => format!(
                "MERGE INTO profiles p USING (VALUES ({o}::uuid, {u}::uuid), ({o2}, {u2})) v (o, u)
ON p.org_id = v.o AND p.user_id = v.u
WHEN MATCHED AND p.role = 'high' THEN DELETE
WHEN MATCHED THEN UPDATE SET role = {r}
WHEN NOT MATCHED THEN INSERT (org_id, user_id, role) VALUES (v.o, v.u, {r})"
            ),
            4 => {
                let role = r.trim_matches('\'').replace("NULL", "");
                format!(
                    "COPY profiles (org_id, user_id, role) FROM PROGRAM $$echo {o},{u},{role}$$ (FORMAT csv)"
                )
            }
            5 => format!("DELETE FROM profiles WHERE org_id = {o} AND user_id = {u}"),
            6 => format!("DELETE FROM profiles WHERE user_id = {u}"),
            7 => format!("UPDATE profiles SET org_id = {o2} WHERE org_id = {o} AND user_id = {u}"),
            8 => format!("UPDATE profiles SET user_id = {u2} WHERE org_id = {o} AND user_id = {u}"),
            9 => format!("UPDATE profiles SET org_id = NULL WHERE org_id = {o} AND user_id = {u}"),
            10 => format!("UPDATE profiles SET org_id = {o} WHERE org_id IS NULL AND user_id = {u}"),
            11 => format!(
                "UPDATE profiles SET user_id = CASE user_id WHEN {u} THEN {u2}::uuid ELSE {u} END, role = {r}
WHERE org_id = {o} AND user_id IN ({u}, {u2})"
            ),
            12 => format!(
                "WITH gone AS (DELETE FROM profiles WHERE org_id = {o} AND user_id = {u} RETURNING role)
INSERT INTO profiles (org_id, user_id, role) SELECT {o2}, {u2}, role FROM gone"
            ),
            13 => format!("UPDATE profiles SET role = {r} WHERE org_id = {o}"),
            14 => "UPDATE profiles SET first_name = 'F', updated_at = now()".to_owned(),
            _ => format!("UPDATE profiles SET role = {r} WHERE org_id = {o} AND user_id = {u}"),
        })
        .boxed()
}

fn setting() -> BoxedStrategy<Statement> {
    let names = (
        select(&ORGANIZATIONS[..]),
        select(&ORGANIZATIONS[..]),
        select(&PERMISSIONS[..]),
        select(&PERMISSIONS[..]),
        select(&USERS[..]),
        select(&ROLES[..]),
        select(&["true", "true", "false", "NULL"][..]),
    );
    (0..16, names)
        .prop_map(|(kind, (o, o2, p, p2, u, r, e))| {
            let row = format!("org_id = {o} AND permission_key = '{p}'");
            let columns = "org_id, permission_key, min_role_required, is_enabled, specific_users";
            match kind {
                0 => format!(
                    "INSERT INTO organization_permissions ({columns}) VALUES ({o}, '{p}', {r}, {e}, NULL)"
                ),
                1 | 2 => format!(
                    "INSERT INTO organization_permissions ({columns}) VALUES ({o}, '{p}', {r}, {e}, ARRAY[{u}]::uuid[])
ON CONFLICT (org_id, permission_key) DO UPDATE
SET min_role_required = excluded.min_role_required, is_enabled = excluded.is_enabled"
                ),
                3 => format!(
                    "INSERT INTO organization_permissions ({columns})
SELECT id, '{p}', {r}, {e}, '{{NULL}}' FROM organizations ON CONFLICT DO NOTHING"
                ),
                4 => format!("DELETE FROM organization_permissions WHERE {row}"),
                5 => format!("UPDATE organization_permissions SET permission_key = '{p2}' WHERE {row}"),
                6 => format!("UPDATE organization_permissions SET org_id = {o2} WHERE {row}"),
                7 => format!("UPDATE organization_permissions SET min_role_required = {r} WHERE {row}"),
                8 => format!("UPDATE organization_permissions SET is_enabled = {e} WHERE org_id = {o}"),
                9 => format!("UPDATE organization_permissions SET is_enabled = {e} WHERE {row}"),
                10 => format!(
                    "UPDATE organization_permissions SET specific_users = array_remove(specific_users, {u}) WHERE org_id = {o}"
                ),
                11 => format!(
                    "UPDATE organization_permissions SET specific_users = array_remove(specific_users, {u}),
min_role_required = {r} WHERE {row}"
                ),
                12 => format!(
                    "UPDATE organization_permissions SET specific_users = array_append(specific_users, NULL) WHERE {row}"
                ),
                13 => format!("UPDATE organization_permissions SET specific_users = NULL WHERE {row}"),
                _ => format!(
                    "UPDATE organization_permissions SET specific_users = array_append(specific_users, {u}) WHERE {row}"
                ),
            }
        })
        .boxed()
}

fn catalog() -> BoxedStrategy<Statement> {
    let names = (
        select(&PERMISSIONS[..]),
        select(&PERMISSIONS[..]),
        // Not NULL: a template has a minimum role.
        select(&ROLES[..5]),
    );
    (0..7, names)
        .prop_map(|(kind, (p, p2, r))| {
            let table = "organization_permission_templates";
            let columns = "module_name, permission_key, permission_name, default_min_role";
            match kind {
                0 => format!("DELETE FROM {table} WHERE permission_key = '{p}'"),
                1 => format!(
                    "UPDATE {table} SET permission_key = '{p2}' WHERE permission_key = '{p}'"
                ),
                2 => format!(
                    "UPDATE {table} SET default_min_role = {r} WHERE permission_key = '{p}'"
                ),
                3 => format!("UPDATE {table} SET module_name = 'o' WHERE permission_key = '{p}'"),
                _ => format!(
                    "INSERT INTO {table} ({columns}) VALUES ('m', '{p}', 'P', {r})
ON CONFLICT (permission_key) DO UPDATE SET default_min_role = excluded.default_min_role"
                ),
            }
        })
        .boxed()
}

fn ladder() -> BoxedStrategy<Statement> {
    (0..6, select(&ROLES[..5]), select(&ROLES[..5]), -1..5)
        .prop_map(|(kind, r, r2, rank)| match kind {
            0 => format!("DELETE FROM permission_roles WHERE role_key = {r}"),
            1 => format!("UPDATE permission_roles SET role_key = {r2} WHERE role_key = {r}"),
            2 => format!("UPDATE permission_roles SET rank = {rank} WHERE role_key = {r}"),
            _ => format!(
                "INSERT INTO permission_roles VALUES ({r}, {rank})
ON CONFLICT (role_key) DO UPDATE SET rank = excluded.rank"
            ),
        })
        .boxed()
}

fn organization() -> BoxedStrategy<Statement> {
    (0..6, select(&ORGANIZATIONS[..]))
        .prop_map(|(kind, o)| match kind {
            0 => format!("DELETE FROM organizations WHERE id = {o}"),
            1 => format!("UPDATE organizations SET name = name || '!' WHERE id = {o}"),
            _ => format!(
                "INSERT INTO organizations (id, name) VALUES ({o}, 'O') ON CONFLICT DO NOTHING"
            ),
        })
        .boxed()
}
