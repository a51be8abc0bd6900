//! hallpass taken off a database: everything is as it was, nothing recorded is lost, and it can be put there again.

use std::collections::BTreeSet;

use hallpass::store::migrations::{MIGRATIONS, MigrateError, migrate, migrate_to, uninstall};
use tokio_postgres::Client;

use crate::{
    adopt_cases::PHASE_2,
    commands::hallpass,
    database::{Database, Shape},
    dump::{assert_same, dump},
    names::id,
    pto::{Phase, Pto, adopt, as_owner, log_in, resolve},
    server::{Server, config},
    sql::{lines, run, value},
};

/// What stays of hallpass: the ladder, and the audit rows in their partitions.
const BUT_WHAT_STAYS: [&str; 4] = [
    "--exclude-table=public.permission_roles",
    "--exclude-table=public.hallpass_audit_log",
    "--exclude-table=public.permission_audit_log_default",
    "--exclude-table=public.permission_audit_log_2*",
];

async fn leave(url: &str) {
    uninstall(&as_owner(url).parse().unwrap(), |_| {})
        .await
        .unwrap();
}

async fn dumped(client: &Client, database: &Database) -> Vec<String> {
    dump(client, &as_owner(&database.url), &BUT_WHAT_STAYS).await
}

#[tokio::test]
async fn everything_is_as_it_was() {
    for pto in Pto::ALL {
        let database = pto.found().await;
        let client = database.client().await;
        let before = dumped(&client, &database).await;
        assert!(before.len() > 500, "{}", before.len());
        adopt(&database.url).await;
        assert_ne!(dumped(&client, &database).await, before);
        leave(&database.url).await;
        let what = format!("{pto:?}");
        assert_same(&before, &dumped(&client, &database).await, &what);

        works(&client, pto).await;

        // There and back once more, with the audit rows of both times.
        adopt(&database.url).await;
        leave(&database.url).await;
        works(&client, pto).await;
    }
}

/// The application is alone with its database, and all of it works.
async fn works(client: &Client, pto: Pto) {
    let change = resolve(
        pto.shape,
        "UPDATE organization_permissions SET is_enabled = NOT is_enabled
         WHERE org_id = :lincoln AND permission_key = 'can_create_budget_items'",
    );
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'hallpass%'";
    assert_eq!(value(client, schemas).await, "0", "{pto:?}");
    if pto.phase == Phase::Two {
        let audited = "SELECT count(*) FROM permission_audit_log";
        let before: i64 = value(client, audited).await.parse().unwrap();
        run(client, &change).await;
        let after: i64 = value(client, audited).await.parse().unwrap();
        assert_eq!(after - before, i64::from(pto.shape == Shape::A), "{pto:?}");
        let summary = "SELECT count(summary_generated_at) FROM org_permission_summary";
        assert_eq!(value(client, summary).await, "3");
        let matrix = "SELECT count(matrix_generated_at) FROM user_permission_matrix";
        assert_eq!(value(client, matrix).await, "48");
        run(client, "SET ROLE service_role").await;
        let refresh = "SELECT refresh_permission_materialized_views()";
        assert_eq!(value(client, refresh).await, "refreshed");
        let list = "SELECT count(*) FROM get_user_permissions_bulk(:bob)";
        assert_eq!(value(client, &resolve(pto.shape, list)).await, "6");
        let mistaken = "SELECT user_has_org_permission_enhanced(:vic, 'can_approve_expenses')";
        assert_eq!(value(client, &resolve(pto.shape, mistaken)).await, "f");
        run(client, "RESET ROLE").await;
    } else {
        run(client, &change).await;
    }
    // Its own function's mistakes too: whom it knows, it lets do what no template names.
    let mistaken = "SELECT user_has_org_permission(:pat, 'no_such_permission')";
    let mistaken = value(client, &resolve(pto.shape, mistaken)).await;
    assert_eq!(mistaken, "t", "{pto:?}");
    log_in(client, "vic").await;
    let visible = "SELECT count(*) FROM transactions";
    assert_eq!(value(client, visible).await, "1", "{pto:?}");
    run(client, "RESET ROLE").await;
}

const RECORDED: &str = "SELECT id, entry_id, n, table_name FROM $log ORDER BY entry_id, n";

async fn recorded(client: &Client, log: &str) -> Vec<String> {
    lines(client, &RECORDED.replace("$log", log)).await
}

#[tokio::test]
async fn the_record_goes_on_when_hallpass_comes_back() {
    for pto in [PHASE_2, Pto::new(Shape::B, Phase::One)] {
        let database = pto.adopted().await;
        let client = database.client().await;
        let mut all = Vec::new();
        for times in 1..=3 {
            let server = Server::start(config(&database.url)).await;
            for (enabled, said) in [
                (false, "deny PERMISSION_DISABLED"),
                (true, "allow GRANTED_BY_ROLE"),
            ] {
                let change = format!(
                    "INSERT INTO organization_permissions (org_id, permission_key, min_role_required, is_enabled)
                     VALUES (:lincoln, 'can_view_budget', 'volunteer', {enabled})
                     ON CONFLICT (org_id, permission_key) DO UPDATE SET is_enabled = excluded.is_enabled"
                );
                run(&client, &resolve(pto.shape, &change)).await;
                let answer = server.check_now("lincoln", "vic", "can_view_budget").await;
                assert_eq!(answer.said, said, "{pto:?}, time {times}");
            }
            server.stop().await;
            let now = recorded(&client, "permission_audit_log").await;
            assert_same(&all, &now[..all.len()], "the earlier rows");
            assert_eq!(now.len(), 2 * times, "{now:?}");
            let entries = "SELECT count(DISTINCT entry_id) FROM permission_audit_log";
            assert_eq!(value(&client, entries).await, now.len().to_string());

            leave(&database.url).await;
            assert_same(&now, &recorded(&client, "hallpass_audit_log").await, "left");
            all = now;
            adopt(&database.url).await;
            let again = recorded(&client, "permission_audit_log").await;
            assert_same(&all, &again, "back");
        }
    }
}

/// What an operator cannot have dropped, and everything else, is where it was.
#[tokio::test]
async fn what_uses_hallpass_is_named_and_nothing_is_changed() {
    let database = PHASE_2.adopted().await;
    let client = database.client().await;
    run(
        &client,
        "SET ROLE pto_owner;
         CREATE VIEW everybody AS SELECT * FROM hallpass.members;
         CREATE VIEW admins AS SELECT user_id FROM user_permission_matrix WHERE role = 'admin';
         CREATE POLICY by_name ON events USING (user_has_permission_in_org(org_id, auth.uid(), 'can_view_events'));
         CREATE POLICY by_role ON events USING (user_has_org_permission(auth.uid(), 'can_view_events'));
         CREATE TABLE heads (head text DEFAULT hallpass.head());
         CREATE FUNCTION rows_of() RETURNS SETOF org_permission_summary LANGUAGE sql AS
             'SELECT * FROM org_permission_summary';
         CREATE VIEW audited AS SELECT id FROM permission_audit_log;
         CREATE TABLE badges (org_id uuid, user_id uuid,
                              FOREIGN KEY (org_id, user_id) REFERENCES profiles (org_id, user_id));
         RESET ROLE",
    )
    .await;
    let before = dump(&client, &as_owner(&database.url), &["--schema-only"]).await;
    let populated = "SELECT oid, relfilenode FROM pg_class WHERE relkind = 'm' ORDER BY oid";
    let files = lines(&client, populated).await;
    let refused = uninstall(&as_owner(&database.url).parse().unwrap(), |_| {}).await;
    let Err(MigrateError::Used(users)) = &refused else {
        panic!("{refused:?}");
    };
    // What calls a function that stays, the application's own again, is no hindrance; nor is the audit log.
    let expected = [
        "constraint badges_org_id_user_id_fkey on table public.badges depends on index public.hallpass_members_key",
        "default value for column head of table public.heads depends on function hallpass.head()",
        "function public.rows_of() depends on type public.org_permission_summary",
        "policy by_name on table public.events depends on function public.user_has_permission_in_org(uuid,uuid,text)",
        "view public.admins depends on materialized view public.user_permission_matrix",
        "view public.everybody depends on view hallpass.members",
    ];
    assert_eq!(users, &expected);
    let ran = hallpass(&[
        "migrate",
        "--uninstall",
        "--database-url",
        &as_owner(&database.url),
    ])
    .await;
    assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{ran:?}");
    assert_eq!(ran.complaint().len(), 1 + expected.len(), "{ran:?}");
    let after = dump(&client, &as_owner(&database.url), &["--schema-only"]).await;
    assert_same(&before, &after, "refused");
    assert_eq!(lines(&client, populated).await, files);

    run(
        &client,
        "DROP POLICY by_name ON events; DROP VIEW everybody, admins; DROP TABLE heads, badges; DROP FUNCTION rows_of()",
    )
    .await;
    leave(&database.url).await;
    assert_eq!(value(&client, "SELECT count(*) FROM audited").await, "0");
}

#[tokio::test]
async fn where_hallpass_is_not_there_is_nothing_to_take_off() {
    for database in [Database::empty().await, PHASE_2.found().await] {
        let ran = hallpass(&[
            "migrate",
            "--uninstall",
            "--database-url",
            &as_owner(&database.url),
        ])
        .await;
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{ran:?}");
        assert_eq!(
            ran.complaint(),
            ["hallpass: hallpass is not on this database"]
        );
    }
}

/// However far `migrate` had come when it failed.
#[tokio::test]
async fn a_half_migrated_database_is_left_as_well() {
    for pto in [PHASE_2, Pto::new(Shape::B, Phase::One)] {
        let database = pto.found().await;
        let client = database.client().await;
        let url = as_owner(&database.url).parse().unwrap();
        let before = dumped(&client, &database).await;
        let mut audited = BTreeSet::new();
        for migration in MIGRATIONS {
            migrate_to(&url, migration.version, |_| {}).await.unwrap();
            if migration.version > 2 {
                // It leaves a row in hallpass's log and none in the application's: of the same values as before.
                let there_and_back = "
                    UPDATE profiles SET role = 'volunteer' WHERE role = 'teacher';
                    UPDATE profiles SET role = 'teacher' WHERE :user = :tia";
                run(&client, &resolve(pto.shape, there_and_back)).await;
            }
            leave(&database.url).await;
            let what = format!("{pto:?} {}", migration.name);
            let mut after = dumped(&client, &database).await;
            // The update has moved the row.
            let mut before = before.clone();
            if migration.version > 2 {
                let is_hers = |line: &String| !line.contains(&id("tia").to_string());
                before.retain(is_hers);
                after.retain(is_hers);
            }
            assert_same(&before, &after, &what);
            if migration.version > 1 {
                let now = BTreeSet::from_iter(recorded(&client, "hallpass_audit_log").await);
                assert!(now.is_superset(&audited), "{what}");
                let more = if migration.version > 2 { 2 } else { 0 };
                assert_eq!(now.len(), audited.len() + more, "{what}");
                audited = now;
            }
        }
    }
}

/// A function in SQL, whose names are looked up when it is made; a procedure; an index that did not serve. What has one of
/// our names besides stays.
#[tokio::test]
async fn what_was_replaced_comes_back_whatever_it_was() {
    let database = PHASE_2.found().await;
    let client = database.client().await;
    run(
        &client,
        "SET ROLE pto_owner;
         CREATE OR REPLACE FUNCTION user_has_org_permission(user_id_param uuid, permission_key_param varchar)
         RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER COST 7 AS
             $$ SELECT EXISTS (SELECT FROM profiles WHERE user_id = user_id_param) $$;
         COMMENT ON FUNCTION user_has_org_permission(uuid, varchar) IS 'whoever is there';
         DROP FUNCTION refresh_permission_materialized_views();
         CREATE PROCEDURE refresh_permission_materialized_views() LANGUAGE sql AS 'SELECT 1';
         DROP INDEX idx_profiles_user_org;
         CREATE INDEX idx_profiles_user_org ON profiles (user_id DESC) WHERE org_id IS NOT NULL;
         RESET ROLE",
    )
    .await;
    let before = dumped(&client, &database).await;
    adopt(&database.url).await;
    let overload = "CREATE FUNCTION public.get_user_permissions_bulk(uuid) RETURNS integer LANGUAGE sql AS 'SELECT 1'";
    run(&client, overload).await;
    leave(&database.url).await;
    run(
        &client,
        "DROP FUNCTION public.get_user_permissions_bulk(uuid)",
    )
    .await;
    assert_same(&before, &dumped(&client, &database).await, "replaced");
}

/// A view of the matrix that was empty stays so; and an uninstall that ended in the middle is ended by the next.
#[tokio::test]
async fn an_uninstall_that_was_cut_short_is_finished() {
    let database = PHASE_2.found().await;
    let client = database.client().await;
    run(
        &client,
        "REFRESH MATERIALIZED VIEW org_permission_summary WITH NO DATA",
    )
    .await;
    let before = dumped(&client, &database).await;
    adopt(&database.url).await;
    // Of the application, made between the two steps, by which the second fails.
    let url = as_owner(&database.url).parse().unwrap();
    run(&client, CUT_SHORT).await;
    let refused = uninstall(&url, |_| {}).await.unwrap_err().to_string();
    assert!(
        refused.contains("something has just come to depend on hallpass. Try again to see what."),
        "{refused}"
    );
    let refused = uninstall(&url, |_| {}).await.unwrap_err().to_string();
    assert!(
        refused.contains("- view public.meanwhile depends on view hallpass.members"),
        "{refused}"
    );
    let refused = migrate(&url, |_| {}).await.unwrap_err().to_string();
    assert!(
        refused.contains("`hallpass migrate --uninstall` did not finish here: run it again first"),
        "{refused}"
    );
    run(&client, "DROP VIEW meanwhile").await;
    leave(&database.url).await;
    assert_same(&before, &dumped(&client, &database).await, "finished");
    let populated = "SELECT relispopulated FROM pg_class WHERE relname = 'org_permission_summary'";
    assert_eq!(value(&client, populated).await, "f");
}

const CUT_SHORT: &str = "
INSERT INTO hallpass.undo (statement) VALUES ('CREATE VIEW public.meanwhile AS SELECT * FROM hallpass.members')";

/// Whoever tidies up what was set aside, or archives the old audit log, can still leave.
#[tokio::test]
async fn what_the_application_has_dropped_since_is_no_hindrance() {
    let database = PHASE_2.adopted().await;
    let client = database.client().await;
    run(
        &client,
        "DROP SCHEMA hallpass_replaced CASCADE;
         DROP TABLE permission_audit_log_before_hallpass;
         DROP TRIGGER permission_audit_trigger ON organization_permissions;
         DROP FUNCTION public.analyze_permission_performance();
         DROP INDEX idx_profiles_user_org",
    )
    .await;
    leave(&database.url).await;
    let left = "
        SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('v', 'm')
        UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT nspname FROM pg_namespace WHERE nspname LIKE 'hallpass%'
        ORDER BY 1";
    let expected = [
        "get_user_org_id",
        "log_permission_changes",
        "pto_rank",
        "update_updated_at_column",
        "user_has_min_role",
        "user_has_org_permission",
        "user_has_org_permission_enhanced",
    ];
    assert_eq!(lines(&client, left).await, expected);
    log_in(&client, "vic").await;
    let visible = "SELECT count(*) FROM transactions";
    assert_eq!(value(&client, visible).await, "1");
}
