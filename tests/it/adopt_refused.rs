//! What stands against putting hallpass on a database is told all at once, and then nothing of it has been changed.

use hallpass::store::migrations::{MigrateError, Progress, migrate, plan};
use tokio_postgres::Client;

use crate::{
    adopt_cases::{Case, PHASE_1, PHASE_2},
    commands::hallpass,
    database::{Database, Shape, as_role},
    dump::{assert_same, psql},
    names::id,
    pto::{OWNER, Phase, Pto, as_owner, resolve},
    sql::{lines, run, value},
};

/// Everything in the catalogs that somebody has made, and which transaction wrote it.
const CATALOG: &str = "
SELECT tableoid::regclass, oid, xmin FROM pg_class WHERE oid >= 16384
UNION ALL SELECT tableoid::regclass, oid, xmin FROM pg_proc WHERE oid >= 16384
UNION ALL SELECT tableoid::regclass, oid, xmin FROM pg_trigger
UNION ALL SELECT tableoid::regclass, oid, xmin FROM pg_rewrite WHERE oid >= 16384
UNION ALL SELECT tableoid::regclass, oid, xmin FROM pg_constraint WHERE oid >= 16384
UNION ALL SELECT tableoid::regclass, oid, xmin FROM pg_type WHERE oid >= 16384
UNION ALL SELECT tableoid::regclass, oid, xmin FROM pg_policy
UNION ALL SELECT tableoid::regclass, oid, xmin FROM pg_namespace
ORDER BY 1, 2";

async fn make(case: &Case) -> Database {
    let database = match case.on {
        None => {
            // Makes the roles.
            drop(PHASE_1.found().await);
            Database::copy("template0", OWNER, Shape::A).await
        }
        Some(pto) => pto.found().await,
    };
    let client = database.client().await;
    let done = resolve(Shape::A, case.done);
    run(&client, &format!("SET ROLE {OWNER}; {done}")).await;
    database
}

async fn expected(case: &Case, client: &Client) -> Vec<String> {
    let name = value(client, "SELECT current_database()").await;
    let resolve = |line: &&str| {
        let line = line.replace("$database", &name);
        ["lincoln", "vic"].iter().fold(line, |line, name| {
            line.replace(&format!("${name}"), &id(name).to_string())
        })
    };
    case.blockers.iter().map(resolve).collect()
}

#[tokio::test]
async fn what_stands_against_it_is_told_and_nothing_is_changed() {
    for case in crate::adopt_cases::CASES {
        let database = make(case).await;
        let client = database.client().await;
        let expected = expected(case, &client).await;
        let before = lines(&client, CATALOG).await;

        let url = as_owner(&database.url).parse().unwrap();
        let refused = migrate(&url, |told| panic!("{told:?}: {}", case.done)).await;
        let Err(MigrateError::Blocked(blockers)) = refused else {
            panic!("{refused:?}: {}", case.done);
        };
        assert_eq!(blockers, expected, "{}", case.done);
        // So is an operator who only asks what would be done.
        let script = plan(&url).await.unwrap();
        for line in expected {
            assert!(
                script.contains(&format!("-- NOT BEFORE THIS IS MENDED: {line}\n")),
                "{script}"
            );
        }
        assert_same(&before, &lines(&client, CATALOG).await, case.done);
    }
}

#[tokio::test]
async fn an_owner_from_whom_policies_hide_rows_is_told() {
    let admin = Database::empty().await.client().await;
    run(&admin, "CREATE ROLE plain_owner LOGIN").await;
    let database = Database::copy("template0", "plain_owner", Shape::A).await;
    let client = database.client().await;
    run(
        &client,
        "SET ROLE plain_owner; CREATE TABLE organizations (id uuid PRIMARY KEY, name text);
         ALTER TABLE organizations ENABLE ROW LEVEL SECURITY",
    )
    .await;
    run(
        &client,
        "ALTER TABLE organizations FORCE ROW LEVEL SECURITY",
    )
    .await;
    let url = as_role(&database.url, "plain_owner").parse().unwrap();
    let refused = migrate(&url, |_| {}).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "hallpass cannot be put on this database, and nothing was changed:\n\
         - row-level security on public.organizations hides rows from plain_owner, its owner: \
         ALTER TABLE public.organizations NO FORCE ROW LEVEL SECURITY"
    );
    run(
        &client,
        "ALTER TABLE organizations NO FORCE ROW LEVEL SECURITY",
    )
    .await;
    migrate(&url, |_| {}).await.unwrap();
}

#[tokio::test]
async fn the_command_lists_all_and_fails() {
    let database = PHASE_2.found().await;
    let client = database.client().await;
    run(&client, SIX).await;
    let ran = hallpass(&["migrate", "--database-url", &as_owner(&database.url)]).await;
    assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{ran:?}");
    let name = value(&client, "SELECT current_database()").await;
    let expected = [
        "hallpass: hallpass cannot be put on this database, and nothing was changed:",
        "- schema hallpass is there already, and is not hallpass's",
        "- public.organization_permissions inherits from another table, is a partition of one, or has heirs: its triggers would not see every row",
        "- public.permission_roles has no column rank (integer)",
        "- function public.set_session_variables(uuid) has other arguments than hallpass's (uuid, uuid, uuid, text, text, text), and calls would still reach it: drop or rename it",
        "- view public.latest depends on public.user_permission_matrix, which is replaced: drop it, and make it again afterwards",
        "- public.organization_permission_templates: 6 values of (permission_key) come more than once, such as (can_approve_expenses)",
    ];
    assert_eq!(ran.complaint(), expected, "{name}");
}

const SIX: &str = "
SET ROLE pto_owner;
CREATE SCHEMA hallpass;
CREATE TABLE heirs () INHERITS (organization_permissions);
CREATE TABLE permission_roles (role_key text PRIMARY KEY);
CREATE FUNCTION set_session_variables(uuid) RETURNS void LANGUAGE sql AS '';
CREATE VIEW latest AS SELECT matrix_generated_at FROM user_permission_matrix;
INSERT INTO organization_permission_templates (module_name, permission_key, permission_name)
SELECT module_name, permission_key, permission_name FROM organization_permission_templates";

/// What the operator reads before anything is done.
#[tokio::test]
async fn what_will_change_is_told() {
    let database = Pto::new(Shape::A, Phase::Two).found().await;
    let client = database.client().await;
    run(
        &client,
        "SET ROLE pto_owner; CREATE TABLE district_permission_templates ();
         UPDATE profiles SET role = E'chair\\n; of' WHERE role = 'teacher';
         CREATE FUNCTION log_by_hand() RETURNS void LANGUAGE sql AS
             $$ INSERT INTO public.\"permission_audit_log\" (org_id, permission_key, change_type)
                SELECT id, 'x', 'RESET' FROM organizations $$",
    )
    .await;
    let mut notes = Vec::new();
    migrate(&as_owner(&database.url).parse().unwrap(), |told| {
        if let Progress::Note(note) = told {
            notes.push(note);
        }
    })
    .await
    .unwrap();
    assert_eq!(
        notes,
        [
            "profiles.user_id is the user of a membership",
            "function public.user_has_org_permission(uuid, character varying) is replaced in place, with the privileges it has",
            "function public.user_has_org_permission_enhanced(uuid, text, boolean) is replaced in place, with the privileges it has",
            "replaced, the old ones set aside in schema hallpass_replaced: public.analyze_permission_performance(), public.cleanup_old_audit_logs(integer), public.get_user_permissions_bulk(uuid, text), public.org_permission_summary, public.refresh_permission_materialized_views(), public.set_session_variables(uuid, uuid, uuid, text, text, text), public.user_permission_matrix",
            "row-level security binds PUBLIC, anon, authenticated, who may no longer use public.analyze_permission_performance(), public.cleanup_old_audit_logs(integer), public.get_user_permissions_bulk(uuid, text), public.refresh_permission_materialized_views(), public.set_session_variables(uuid, uuid, uuid, text, text, text)",
            "row-level security binds anon, authenticated, who may no longer use public.org_permission_summary, public.user_permission_matrix",
            "public.permission_audit_log becomes public.permission_audit_log_before_hallpass",
            "trigger permission_audit_trigger on public.organization_permissions is disabled: hallpass records instead",
            "function public.log_by_hand inserts into permission_audit_log and will fail from now on",
            "district_permission_templates is not read: what a district locks, hallpass does not know",
            "role 'chair ; of' of 1 members is not on the role ladder: it satisfies no permission",
        ]
    );
}

/// The application's users may have put anything into the rows that the survey tells of.
#[tokio::test]
async fn what_is_told_in_a_script_stays_a_comment() {
    let database = PHASE_1.found().await;
    let client = database.client().await;
    run(
        &client,
        "SET ROLE pto_owner;
         UPDATE profiles SET role = E'x\\nDROP TABLE events;\\r\\n\\\\! exit' WHERE role = 'teacher';
         CREATE FUNCTION log_permission_changes() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN INSERT INTO permission_audit_log VALUES (1); RETURN NULL; END';
         CREATE TRIGGER \"t\nDROP TABLE events; --\" AFTER INSERT ON organizations
             EXECUTE FUNCTION log_permission_changes()",
    )
    .await;
    let script = plan(&as_owner(&database.url).parse().unwrap())
        .await
        .unwrap();
    assert_eq!(script.matches("DROP TABLE events").count(), 2);
    assert_eq!(
        psql(&as_owner(&database.url), &script).await,
        (0, String::new())
    );
    assert_eq!(lines(&client, "SELECT count(*) FROM events").await, ["2"]);
}
