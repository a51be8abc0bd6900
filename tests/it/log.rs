//! What the log says: for each kind of statement the exact audit rows and organizations, and who made the change.

use std::future::poll_fn;

use tokio::sync::mpsc;
use tokio_postgres::{AsyncMessage, Client, NoTls};

use crate::{
    database::Database,
    sql::{lines, run, sqlstate, value},
};

/// Written `{A}` in SQL here and `A` in what comes back.
const NAMES: &[(&str, &str)] = &[
    ("A", "aaaaaaaa-0000-0000-0000-000000000000"),
    ("B", "bbbbbbbb-0000-0000-0000-000000000000"),
    ("C", "cccccccc-0000-0000-0000-000000000000"),
    ("ann", "00000000-0000-0000-0000-00000000000a"),
    ("bob", "00000000-0000-0000-0000-00000000000b"),
    ("cleo", "00000000-0000-0000-0000-00000000000c"),
    ("NIL", "00000000-0000-0000-0000-000000000000"),
];

/// Two organizations, ann an admin of A, bob a volunteer of A and of B; one override each; a catalog of two.
const SEED: &str = "
TRUNCATE organizations, profiles, organization_permissions, organization_permission_templates CASCADE;
INSERT INTO organization_permission_templates (module_name, permission_key, permission_name, default_min_role)
VALUES ('budget', 'view', 'View', 'volunteer'), ('budget', 'edit', 'Edit', 'admin');
INSERT INTO organizations (id, name) VALUES ({A}, 'Adams'), ({B}, 'Burr');
INSERT INTO profiles (org_id, user_id, role) VALUES
    ({A}, {ann}, 'admin'), ({A}, {bob}, 'volunteer'), ({B}, {bob}, 'volunteer');
INSERT INTO organization_permissions (org_id, permission_key, min_role_required) VALUES
    ({A}, 'view', 'admin'), ({B}, 'view', 'admin')";

/// The audit rows of the entries after `head`, entries counted from 1. Within an entry PostgreSQL may change the rows
/// in any order: here they are sorted.
const AUDIT_ROWS: &str = "
SELECT format('%s %s %s', dense_rank() OVER (ORDER BY seq), table_name, change_type)
       || coalesce(' org ' || org_id, '') || coalesce(' key ' || permission_key, '')
       || coalesce(' user ' || affected_user_id, '')
       || coalesce(' old ' || (old_values - '{org_id,user_id,permission_key,id,role_key}'::text[])::text, '')
       || coalesce(' new ' || (new_values - '{org_id,user_id,permission_key,id,role_key}'::text[])::text, '')
FROM hallpass.log JOIN permission_audit_log a USING (entry_id)
WHERE seq > $head AND a.created_at = log.created_at
ORDER BY seq, org_id, affected_user_id, permission_key";

/// Entries whose rows are not numbered 1, 2, 3 and so on.
const MISNUMBERED: &str = "
SELECT entry_id FROM permission_audit_log GROUP BY entry_id
HAVING min(n) <> 1 OR max(n) <> count(*) OR count(DISTINCT n) <> count(*)";

/// The organizations of each of those entries.
const ORGANIZATIONS: &str = "
SELECT string_agg(org_id::text, ',' ORDER BY org_id) FROM hallpass.log_org WHERE seq > $head GROUP BY seq ORDER BY seq";

struct Case {
    name: &'static str,
    sql: &'static str,
    rows: &'static [&'static str],
    /// One string an entry.
    organizations: &'static [&'static str],
}

fn named(sql: &str) -> String {
    NAMES.iter().fold(sql.to_owned(), |sql, (name, id)| {
        sql.replace(&format!("{{{name}}}"), &format!("'{id}'"))
    })
}

fn short(line: &str) -> String {
    NAMES
        .iter()
        .fold(line.to_owned(), |line, (name, id)| line.replace(id, name))
}

async fn head_seq(client: &Client) -> String {
    value(client, "SELECT coalesce(max(seq), 0) FROM hallpass.log").await
}

async fn since(client: &Client, head: &str, sql: &str) -> Vec<String> {
    lines(client, &sql.replace("$head", head))
        .await
        .iter()
        .map(|line| short(line))
        .collect()
}

const CASES: &[Case] = &[
    Case {
        name: "a membership comes",
        sql: "INSERT INTO profiles (org_id, user_id, role) VALUES ({A}, {cleo}, 'teacher')",
        rows: &[r#"1 profiles INSERT org A user cleo new {"role": "teacher"}"#],
        organizations: &["A"],
    },
    Case {
        name: "a membership changes its role",
        sql: "UPDATE profiles SET role = 'teacher' WHERE user_id = {ann}",
        rows: &[r#"1 profiles UPDATE org A user ann old {"role": "admin"} new {"role": "teacher"}"#],
        organizations: &["A"],
    },
    Case {
        name: "a role goes to NULL and stays a membership",
        sql: "UPDATE profiles SET role = NULL WHERE user_id = {ann}",
        rows: &[r#"1 profiles UPDATE org A user ann old {"role": "admin"} new {"role": null}"#],
        organizations: &["A"],
    },
    Case {
        name: "a membership goes",
        sql: "DELETE FROM profiles WHERE user_id = {ann}",
        rows: &[r#"1 profiles DELETE org A user ann old {"role": "admin"}"#],
        organizations: &["A"],
    },
    Case {
        name: "one statement on several rows of several organizations is one entry",
        sql: "UPDATE profiles SET role = 'teacher'",
        rows: &[
            r#"1 profiles UPDATE org A user ann old {"role": "admin"} new {"role": "teacher"}"#,
            r#"1 profiles UPDATE org A user bob old {"role": "volunteer"} new {"role": "teacher"}"#,
            r#"1 profiles UPDATE org B user bob old {"role": "volunteer"} new {"role": "teacher"}"#,
        ],
        organizations: &["A,B"],
    },
    Case {
        name: "a bulk update records the rows that change and no others",
        sql: "UPDATE profiles SET role = 'volunteer'",
        rows: &[r#"1 profiles UPDATE org A user ann old {"role": "admin"} new {"role": "volunteer"}"#],
        organizations: &["A"],
    },
    Case {
        name: "two statements of one transaction are two entries, in order",
        sql: "BEGIN; DELETE FROM profiles WHERE user_id = {ann};
              UPDATE organizations SET name = 'Adams II' WHERE id = {A}; COMMIT",
        rows: &[
            r#"1 profiles DELETE org A user ann old {"role": "admin"}"#,
            r#"2 organizations UPDATE org A old {"name": "Adams"} new {"name": "Adams II"}"#,
        ],
        organizations: &["A", "A"],
    },
    Case {
        name: "an upsert that updates",
        sql: "INSERT INTO organization_permissions (org_id, permission_key, min_role_required)
              VALUES ({A}, 'view', 'teacher')
              ON CONFLICT (org_id, permission_key) DO UPDATE SET min_role_required = excluded.min_role_required",
        rows: &[concat!(
            "1 organization_permissions UPDATE org A key view ",
            r#"old {"is_enabled": true, "specific_users": null, "min_role_required": "admin"} "#,
            r#"new {"is_enabled": true, "specific_users": null, "min_role_required": "teacher"}"#
        )],
        organizations: &["A"],
    },
    Case {
        name: "an upsert that inserts one row and updates another is an entry each",
        sql: "INSERT INTO profiles (org_id, user_id, role) VALUES ({B}, {cleo}, 'teacher'), ({A}, {ann}, 'teacher')
              ON CONFLICT (org_id, user_id) DO UPDATE SET role = excluded.role",
        rows: &[
            r#"1 profiles UPDATE org A user ann old {"role": "admin"} new {"role": "teacher"}"#,
            r#"2 profiles INSERT org B user cleo new {"role": "teacher"}"#,
        ],
        organizations: &["A", "B"],
    },
    Case {
        name: "an upsert that does nothing",
        sql: "INSERT INTO profiles (org_id, user_id, role) VALUES ({A}, {ann}, 'teacher')
              ON CONFLICT (org_id, user_id) DO NOTHING",
        rows: &[],
        organizations: &[],
    },
    Case {
        name: "one statement that changes a table by two commands",
        sql: "WITH gone AS (DELETE FROM profiles WHERE user_id = {ann} RETURNING user_id)
              INSERT INTO profiles (org_id, user_id, role) SELECT {B}, user_id, 'teacher' FROM gone",
        rows: &[
            r#"1 profiles DELETE org A user ann old {"role": "admin"}"#,
            r#"2 profiles INSERT org B user ann new {"role": "teacher"}"#,
        ],
        organizations: &["A", "B"],
    },
    Case {
        name: "COPY is one entry, without the profile that has no organization",
        sql: "DO $$ BEGIN EXECUTE format(
                  'COPY profiles (org_id, user_id, role) FROM PROGRAM %L WITH (FORMAT csv)',
                  format('echo %s,%s,teacher; echo %s,%s,admin; echo ,%2$s,admin',
                         {A}::uuid, {cleo}::uuid, {B}::uuid, {cleo}::uuid)); END $$",
        rows: &[
            r#"1 profiles INSERT org A user cleo new {"role": "teacher"}"#,
            r#"1 profiles INSERT org B user cleo new {"role": "admin"}"#,
        ],
        organizations: &["A,B"],
    },
    Case {
        name: "specific users",
        sql: "UPDATE organization_permissions SET specific_users = ARRAY[{bob}]::uuid[] WHERE org_id = {A}",
        rows: &[concat!(
            "1 organization_permissions UPDATE org A key view ",
            r#"old {"is_enabled": true, "specific_users": null, "min_role_required": "admin"} "#,
            r#"new {"is_enabled": true, "specific_users": ["bob"], "min_role_required": "admin"}"#
        )],
        organizations: &["A"],
    },
    Case {
        name: "an override for another key is one gone and one come",
        sql: "UPDATE organization_permissions SET permission_key = 'edit' WHERE org_id = {A}",
        rows: &[
            concat!(
                "1 organization_permissions INSERT org A key edit ",
                r#"new {"is_enabled": true, "specific_users": null, "min_role_required": "admin"}"#
            ),
            concat!(
                "1 organization_permissions DELETE org A key view ",
                r#"old {"is_enabled": true, "specific_users": null, "min_role_required": "admin"}"#
            ),
        ],
        organizations: &["A"],
    },
    Case {
        name: "a membership moves between organizations",
        sql: "UPDATE profiles SET org_id = {B} WHERE user_id = {ann}",
        rows: &[
            r#"1 profiles DELETE org A user ann old {"role": "admin"}"#,
            r#"1 profiles INSERT org B user ann new {"role": "admin"}"#,
        ],
        organizations: &["A,B"],
    },
    Case {
        name: "a membership changes its user",
        sql: "UPDATE profiles SET user_id = {cleo} WHERE user_id = {ann}",
        rows: &[
            r#"1 profiles DELETE org A user ann old {"role": "admin"}"#,
            r#"1 profiles INSERT org A user cleo new {"role": "admin"}"#,
        ],
        organizations: &["A"],
    },
    Case {
        name: "a profile loses its organization",
        sql: "UPDATE profiles SET org_id = NULL WHERE user_id = {ann}",
        rows: &[r#"1 profiles DELETE org A user ann old {"role": "admin"}"#],
        organizations: &["A"],
    },
    Case {
        name: "a profile without an organization is no membership",
        sql: "INSERT INTO profiles (org_id, user_id, role) VALUES (NULL, {cleo}, 'admin');
              UPDATE profiles SET role = 'teacher' WHERE user_id = {cleo};
              DELETE FROM profiles WHERE user_id = {cleo}",
        rows: &[],
        organizations: &[],
    },
    Case {
        name: "a statement that writes what was there, or touches no row, or no relevant column",
        sql: "UPDATE profiles SET role = role;
              UPDATE profiles SET first_name = 'Ann', last_name = 'Archer', email = 'ann@example.org';
              UPDATE profiles SET role = 'admin' WHERE false;
              DELETE FROM profiles WHERE false;
              INSERT INTO profiles (user_id) SELECT {cleo}::uuid WHERE false;
              UPDATE organizations SET updated_at = now();
              UPDATE organization_permissions SET updated_at = now(), is_enabled = true;
              UPDATE organization_permission_templates SET permission_description = 'x', updated_at = now()",
        rows: &[],
        organizations: &[],
    },
    Case {
        name: "the catalog is everything",
        sql: "INSERT INTO organization_permission_templates
                  (module_name, permission_key, permission_name, default_min_role)
              VALUES ('budget', 'burn', 'Burn', 'admin');
              UPDATE organization_permission_templates SET default_min_role = 'teacher' WHERE permission_key = 'burn';
              DELETE FROM organization_permission_templates WHERE permission_key = 'burn'",
        rows: &[
            r#"1 organization_permission_templates INSERT key burn new {"module_name": "budget", "permission_name": "Burn", "default_min_role": "admin"}"#,
            concat!(
                r#"2 organization_permission_templates UPDATE key burn old {"module_name": "budget", "permission_name": "Burn", "default_min_role": "admin"} "#,
                r#"new {"module_name": "budget", "permission_name": "Burn", "default_min_role": "teacher"}"#
            ),
            r#"3 organization_permission_templates DELETE key burn old {"module_name": "budget", "permission_name": "Burn", "default_min_role": "teacher"}"#,
        ],
        organizations: &["NIL", "NIL", "NIL"],
    },
    Case {
        name: "the role ladder is everything",
        sql: "INSERT INTO permission_roles VALUES ('chair', 9);
              UPDATE permission_roles SET rank = 8 WHERE role_key = 'chair';
              DELETE FROM permission_roles WHERE role_key = 'chair'",
        rows: &[
            r#"1 permission_roles INSERT new {"rank": 9}"#,
            r#"2 permission_roles UPDATE old {"rank": 9} new {"rank": 8}"#,
            r#"3 permission_roles DELETE old {"rank": 8}"#,
        ],
        organizations: &["NIL", "NIL", "NIL"],
    },
    Case {
        name: "a deleted organization takes its overrides and memberships along, and its audit rows stay",
        sql: "DELETE FROM organizations WHERE id = {A}",
        rows: &[
            r#"1 organizations DELETE org A old {"name": "Adams"}"#,
            r#"2 profiles DELETE org A user ann old {"role": "admin"}"#,
            r#"2 profiles DELETE org A user bob old {"role": "volunteer"}"#,
            concat!(
                "3 organization_permissions DELETE org A key view ",
                r#"old {"is_enabled": true, "specific_users": null, "min_role_required": "admin"}"#
            ),
        ],
        organizations: &["A", "A", "A"],
    },
    Case {
        name: "TRUNCATE is everything, for each table it reaches",
        sql: "TRUNCATE organizations CASCADE",
        rows: &[
            "1 organizations TRUNCATE",
            "2 profiles TRUNCATE",
            "3 organization_permissions TRUNCATE",
        ],
        organizations: &["NIL", "NIL", "NIL"],
    },
    Case {
        name: "replication's role does not switch the record off",
        sql: "SET session_replication_role = replica;
              UPDATE profiles SET role = 'teacher' WHERE user_id = {ann};
              TRUNCATE permission_roles;
              RESET session_replication_role;
              INSERT INTO permission_roles VALUES ('admin', 4)",
        rows: &[
            r#"1 profiles UPDATE org A user ann old {"role": "admin"} new {"role": "teacher"}"#,
            "2 permission_roles TRUNCATE",
            r#"3 permission_roles INSERT new {"rank": 4}"#,
        ],
        organizations: &["A", "NIL", "NIL"],
    },
    Case {
        name: "a rolled back transaction leaves nothing",
        sql: "BEGIN; DELETE FROM organizations; ROLLBACK",
        rows: &[],
        organizations: &[],
    },
    Case {
        name: "a rolled back savepoint leaves nothing and the rest stays",
        sql: "BEGIN; DELETE FROM profiles WHERE user_id = {ann};
              SAVEPOINT s; DELETE FROM organizations; ROLLBACK TO s;
              UPDATE organizations SET name = 'x' WHERE id = {B}; COMMIT",
        rows: &[
            r#"1 profiles DELETE org A user ann old {"role": "admin"}"#,
            r#"2 organizations UPDATE org B old {"name": "Burr"} new {"name": "x"}"#,
        ],
        organizations: &["A", "B"],
    },
    Case {
        name: "constraints made immediate twice number each change once",
        sql: "BEGIN; DELETE FROM profiles WHERE user_id = {ann}; SET CONSTRAINTS ALL IMMEDIATE;
              UPDATE organizations SET name = 'x' WHERE id = {B}; SET CONSTRAINTS ALL DEFERRED;
              UPDATE organizations SET name = 'y' WHERE id = {B}; COMMIT",
        rows: &[
            r#"1 profiles DELETE org A user ann old {"role": "admin"}"#,
            r#"2 organizations UPDATE org B old {"name": "Burr"} new {"name": "x"}"#,
            r#"3 organizations UPDATE org B old {"name": "x"} new {"name": "y"}"#,
        ],
        organizations: &["A", "B", "B"],
    },
];

/// From PostgreSQL 15 on.
const MERGE: Case = Case {
    name: "MERGE is an entry each for what it inserts, updates and deletes",
    sql: "MERGE INTO profiles p
          USING (VALUES ({A}::uuid, {ann}::uuid, NULL), ({A}, {bob}, 'teacher'), ({A}, {cleo}, 'volunteer'))
                wanted (org_id, user_id, role)
          ON p.org_id = wanted.org_id AND p.user_id = wanted.user_id
          WHEN MATCHED AND wanted.role IS NULL THEN DELETE
          WHEN MATCHED THEN UPDATE SET role = wanted.role
          WHEN NOT MATCHED THEN INSERT (org_id, user_id, role) VALUES (wanted.org_id, wanted.user_id, wanted.role)",
    rows: &[
        r#"1 profiles DELETE org A user ann old {"role": "admin"}"#,
        r#"2 profiles UPDATE org A user bob old {"role": "volunteer"} new {"role": "teacher"}"#,
        r#"3 profiles INSERT org A user cleo new {"role": "volunteer"}"#,
    ],
    organizations: &["A", "A", "A"],
};

#[tokio::test]
async fn every_kind_of_statement_writes_exactly_its_rows() {
    let database = Database::create().await;
    let client = database.client().await;
    let has_merge = value(&client, "SHOW server_version_num").await.as_str() >= "150000";
    let mut failures = Vec::new();
    for case in CASES.iter().chain(has_merge.then_some(&MERGE)) {
        run(&client, &named(SEED)).await;
        let head = head_seq(&client).await;
        run(&client, &named(case.sql)).await;
        let rows = since(&client, &head, AUDIT_ROWS).await;
        let organizations = since(&client, &head, ORGANIZATIONS).await;
        if rows != case.rows || organizations != case.organizations {
            failures.push(format!("{}: {rows:#?} {organizations:?}", case.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(lines(&client, MISNUMBERED).await, [""; 0]);
}

/// The old fault: they went with it, by a foreign key.
#[tokio::test]
async fn audit_rows_outlive_their_organization() {
    let database = Database::create().await;
    let client = database.client().await;
    run(&client, &named(SEED)).await;
    let ids = named("SELECT id FROM permission_audit_log WHERE org_id = {A} ORDER BY entry_id, n");
    let before = lines(&client, &ids).await;
    assert_eq!(before.len(), 4);
    run(&client, &named("DELETE FROM organizations WHERE id = {A}")).await;
    let after = lines(&client, &ids).await;
    assert_eq!(after[..before.len()], before);
    assert_eq!(after.len(), 8);
}

/// A thousand organizations in one statement are named one by one; one more is everything.
#[tokio::test]
async fn more_than_a_thousand_organizations_are_everything() {
    let database = Database::create().await;
    let client = database.client().await;
    for (count, expected) in [(1000, "1000 | f"), (1001, "1 | t"), (3000, "1 | t")] {
        let head = head_seq(&client).await;
        let insert = format!(
            "INSERT INTO organizations (name) SELECT 'many {count}' FROM generate_series(1, {count})"
        );
        run(&client, &insert).await;
        let touched = format!(
            "SELECT count(*), bool_or(org_id = '00000000-0000-0000-0000-000000000000')
             FROM hallpass.log_org WHERE seq > {head}"
        );
        assert_eq!(lines(&client, &touched).await, [expected], "{count}");
        let recorded = format!(
            "SELECT count(*), count(DISTINCT a.org_id), max(n)
             FROM hallpass.log JOIN permission_audit_log a USING (entry_id) WHERE seq > {head}"
        );
        let all = format!("{count} | {count} | {count}");
        assert_eq!(lines(&client, &recorded).await, [all]);
    }
}

/// One empty notification a commit that changed something, however many entries it has; none for the others.
#[tokio::test]
async fn commits_that_changed_something_notify() {
    let database = Database::create().await;
    let client = database.client().await;
    let (listener, mut connection) = tokio_postgres::connect(&database.url, NoTls).await.unwrap();
    let (sender, mut heard) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(n) = message {
                sender
                    .send(format!("{}:{}", n.channel(), n.payload()))
                    .unwrap();
            }
        }
    });
    run(&listener, "LISTEN hallpass_log; LISTEN done").await;
    run(
        &client,
        "BEGIN; INSERT INTO permission_roles VALUES ('a', 1); ROLLBACK",
    )
    .await;
    run(&client, "UPDATE permission_roles SET rank = rank").await;
    run(&client, "NOTIFY done, 'nothing so far'").await;
    run(
        &client,
        "INSERT INTO permission_roles VALUES ('a', 1); INSERT INTO permission_roles VALUES ('b', 1)",
    )
    .await;
    run(&client, "NOTIFY done, 'one'").await;
    for expected in ["done:nothing so far", "hallpass_log:", "done:one"] {
        assert_eq!(heard.recv().await.unwrap(), expected);
    }
}

/// What a session says of the actor, and what the audit row makes of it.
struct ActorCase {
    name: &'static str,
    session: &'static str,
    actor: &'static [&'static str],
}

/// Everything of an actor but the session's own address and name.
const ACTOR: &str = "
SELECT actor_source || coalesce(' user ' || changed_by, '') || coalesce(' profile ' || changed_by_profile_id, '')
       || coalesce(' ip ' || host(ip_address), '') || coalesce(' agent ' || user_agent, '')
       || coalesce(' request ' || request_id, '') || coalesce(' session ' || session_id, '')
       || coalesce(' trace ' || trace_id, '') || ' as ' || database_role
FROM hallpass.log JOIN permission_audit_log a USING (entry_id) WHERE seq > $head ORDER BY seq, n";

const ACTOR_CASES: &[ActorCase] = &[
    ActorCase {
        name: "nobody says",
        session: "",
        actor: &["NONE as hallpass"],
    },
    ActorCase {
        name: "set_session_variables",
        session: "SELECT set_session_variables({ann}, {bob}, {A}, 'req-1', '10.0.0.1', 'curl/8')",
        actor: &[
            "SETTINGS user ann profile bob ip 10.0.0.1 agent curl/8 request req-1 as hallpass",
        ],
    },
    ActorCase {
        name: "only a user",
        session: "SELECT set_session_variables({ann})",
        actor: &["SETTINGS user ann as hallpass"],
    },
    ActorCase {
        name: "only a profile",
        session: "SELECT set_session_variables(NULL, {bob})",
        actor: &["SETTINGS profile bob as hallpass"],
    },
    ActorCase {
        name: "settings without the function",
        session: "SELECT set_config('app.current_user_id', {ann}, true), set_config('app.current_profile_id', {bob}, true),
                  set_config('app.current_org_id', {A}, true), set_config('app.current_request_id', 'req-1', true),
                  set_config('app.current_ip', '10.0.0.1', true), set_config('app.current_user_agent', 'curl/8', true),
                  set_config('app.current_session_id', 's-1', true), set_config('app.current_trace_id', 't-1', true)",
        actor: &[
            "SETTINGS user ann profile bob ip 10.0.0.1 agent curl/8 request req-1 session s-1 trace t-1 as hallpass",
        ],
    },
    ActorCase {
        name: "a malformed user is lost alone",
        session: "SELECT set_session_variables(NULL, {bob}, {A}, 'req-1', '10.0.0.1', 'curl/8');
                  SET LOCAL app.current_user_id = 'ann'",
        actor: &["SETTINGS profile bob ip 10.0.0.1 agent curl/8 request req-1 as hallpass"],
    },
    ActorCase {
        name: "a malformed profile is lost alone",
        session: "SELECT set_session_variables({ann}, NULL, {A}, 'req-1', '::1', 'curl/8');
                  SET LOCAL app.current_profile_id = '42'",
        actor: &["SETTINGS user ann ip ::1 agent curl/8 request req-1 as hallpass"],
    },
    ActorCase {
        name: "a malformed address is lost alone",
        session: "SELECT set_session_variables({ann}, {bob}, {A}, 'req-1', '10.0.0.256', 'curl/8')",
        actor: &["SETTINGS user ann profile bob agent curl/8 request req-1 as hallpass"],
    },
    ActorCase {
        name: "a malformed organization changes nothing",
        session: "SELECT set_session_variables({ann}); SET LOCAL app.current_org_id = 'Adams'",
        actor: &["SETTINGS user ann as hallpass"],
    },
    ActorCase {
        name: "what set_session_variables has no parameter for",
        session: "SELECT set_session_variables({ann});
                  SET LOCAL app.current_session_id = 's-1'; SET LOCAL app.current_trace_id = 't-1'",
        actor: &["SETTINGS user ann session s-1 trace t-1 as hallpass"],
    },
    ActorCase {
        name: "an endless user agent is cut",
        session: "SELECT set_session_variables({ann}, user_agent => repeat('x', 1030))",
        actor: &[concat!(
            "SETTINGS user ann agent ...",
            "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx as hallpass"
        )],
    },
    ActorCase {
        name: "PostgREST",
        session: r#"SELECT set_config('request.jwt.claims', format('{"sub": "%s", "session_id": "s-1"}', {ann}::uuid), true),
                    set_config('request.headers', '{"x-forwarded-for": "10.0.0.2, 10.9.9.9", "user-agent": "fox", "x-request-id": "req-2"}', true)"#,
        actor: &["JWT user ann ip 10.0.0.2 agent fox request req-2 session s-1 as hallpass"],
    },
    ActorCase {
        name: "settings win over PostgREST's, one by one",
        session: r#"SELECT set_session_variables({bob}, request_id => 'req-1');
                    SELECT set_config('request.jwt.claims', format('{"sub": "%s"}', {ann}::uuid), true),
                    set_config('request.headers', '{"x-request-id": "req-2", "user-agent": "fox"}', true)"#,
        actor: &["SETTINGS user bob agent fox request req-1 as hallpass"],
    },
    ActorCase {
        name: "malformed claims, and the headers survive",
        session: r#"SELECT set_config('request.jwt.claims', '{"sub": ', true),
                    set_config('request.headers', '{"user-agent": "fox"}', true)"#,
        actor: &["NONE agent fox as hallpass"],
    },
    ActorCase {
        name: "malformed headers, and the claims survive",
        session: r#"SELECT set_config('request.jwt.claims', format('{"sub": "%s"}', {ann}::uuid), true),
                    set_config('request.headers', 'user-agent: fox', true)"#,
        actor: &["JWT user ann as hallpass"],
    },
    ActorCase {
        name: "claims of another shape than expected",
        session: r#"SELECT set_config('request.jwt.claims', '{"sub": {"id": 1}, "session_id": 7}', true),
                    set_config('request.headers', '["user-agent"]', true)"#,
        actor: &["JWT session 7 as hallpass"],
    },
    ActorCase {
        name: "claims nested deeper than the stack",
        session: "SELECT set_config('request.jwt.claims', repeat('[', 100000), true),
                  set_config('app.current_request_id', 'req-1', true)",
        actor: &["NONE request req-1 as hallpass"],
    },
    ActorCase {
        name: "claims with a character that text cannot hold",
        session: r#"SELECT set_config('request.jwt.claims', '{"sub": "\u0000"}', true),
                    set_config('app.current_request_id', 'req-1', true)"#,
        actor: &["NONE request req-1 as hallpass"],
    },
    ActorCase {
        name: "an anonymous visitor's claims",
        session: r#"SELECT set_config('request.jwt.claims', '{"role": "anon"}', true)"#,
        actor: &["NONE as hallpass"],
    },
    ActorCase {
        name: "SET ROLE shows beside the login",
        session: "SET LOCAL ROLE log_actor",
        actor: &["NONE as log_actor"],
    },
];

#[tokio::test]
async fn the_actor_is_who_the_session_says_value_by_value() {
    let database = Database::create().await;
    let client = database.client().await;
    run(
        &client,
        "DO $$ BEGIN CREATE ROLE log_actor; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
         GRANT SELECT, UPDATE ON permission_roles TO log_actor;
         SET application_name = 'the tests'",
    )
    .await;
    let mut failures = Vec::new();
    for case in ACTOR_CASES {
        let head = head_seq(&client).await;
        let change = "UPDATE permission_roles SET rank = rank + 1 WHERE role_key = 'admin'";
        run(
            &client,
            &format!("BEGIN; {}; {change}; COMMIT", named(case.session)),
        )
        .await;
        let actor: Vec<_> = since(&client, &head, ACTOR)
            .await
            .iter()
            .map(|line| line.replace(&"x".repeat(960), "..."))
            .collect();
        if actor != case.actor {
            failures.push(format!("{}: {actor:?}", case.name));
        }
        // The old fault: the connection goes back to the pool, and its next user is taken for the one before.
        let head = head_seq(&client).await;
        run(&client, change).await;
        let next = since(&client, &head, ACTOR).await;
        if next != ["NONE as hallpass"] {
            failures.push(format!("after {}: {next:?}", case.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let beside = "SELECT DISTINCT database_login, client_address, application_name
                  FROM permission_audit_log WHERE application_name IS NOT NULL";
    assert_eq!(lines(&client, beside).await, ["hallpass | - | the tests"]);
}

/// Who passes something else than an id is told so; a setting could only lose it.
#[tokio::test]
async fn a_malformed_id_is_the_error_of_who_passes_it() {
    let database = Database::create().await;
    let client = database.client().await;
    for arguments in ["'ann'", "{ann}, '42'", "{ann}, {bob}, 'Adams'"] {
        let call = named(&format!("SELECT set_session_variables({arguments})"));
        let error = client.batch_execute(&call).await.expect_err(&call);
        assert_eq!(sqlstate(&error), "22P02", "{call}");
    }
}

/// A savepoint that is rolled back takes the actor set within it along.
#[tokio::test]
async fn an_actor_of_a_rolled_back_savepoint_is_gone() {
    let database = Database::create().await;
    let client = database.client().await;
    let head = head_seq(&client).await;
    run(
        &client,
        &named(
            "BEGIN; SELECT set_session_variables({ann}); SAVEPOINT s; SELECT set_session_variables({bob});
             ROLLBACK TO s; UPDATE permission_roles SET rank = rank + 1 WHERE role_key = 'admin'; COMMIT",
        ),
    )
    .await;
    assert_eq!(
        since(&client, &head, ACTOR).await,
        ["SETTINGS user ann as hallpass"]
    );
}

/// Those of the caller's own transaction are not numbered yet.
#[tokio::test]
async fn entries_are_cleared_once_they_have_arrived() {
    let database = Database::create().await;
    let client = database.client().await;
    run(
        &client,
        "BEGIN; INSERT INTO permission_roles VALUES ('chair', 9)",
    )
    .await;
    let clear = "SELECT hallpass.clear_pending()";
    assert_eq!(value(&client, clear).await, "0");
    assert_eq!(value(&client, "SELECT hallpass.has_pending()").await, "t");
    run(&client, "COMMIT").await;
    // Written by the statement, and at COMMIT.
    assert_eq!(value(&client, clear).await, "2");
    assert_eq!(
        value(&client, "SELECT count(*) FROM hallpass.log_pending").await,
        "0"
    );
}
