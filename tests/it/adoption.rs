//! PTO Connect's own database, in each shape and phase, put under hallpass by its owner: nothing of the application's is
//! touched, its calls and policies go on, and what they are told is right from then on.

use std::collections::BTreeSet;

use hallpass::store::migrations::{Progress, migrate};
use tokio_postgres::Client;

use crate::{
    database::{Shape, as_role},
    migrate::WHOLE_SCHEMA,
    names::id,
    pto::{OLD_AUDIT_LOG, OWNER, Phase, Pto, USERS, adopt, log_in, resolve},
    sql::{lines, run, sqlstate, value},
};

/// Every row of the application: what it holds, where it lies, and which transaction wrote it.
async fn rows(client: &Client, audit_log: Option<&str>) -> Vec<String> {
    let tables = [
        "auth.users",
        "organizations",
        "profiles",
        "organization_permission_templates",
        "organization_permissions",
        "transactions",
        "events",
    ];
    let mut rows = Vec::new();
    for table in tables.into_iter().chain(audit_log) {
        let read = format!("SELECT ctid, xmin, r FROM {table} r ORDER BY ctid");
        let read = lines(client, &read).await;
        assert!(!read.is_empty(), "{table}");
        rows.extend(read);
    }
    rows
}

/// What the application has made and keeps, but for what speaks of its audit log: everything on and of its tables, who may
/// use them, and its functions.
const APPLICATION: &str = "
WITH ours AS (
    SELECT unnest(ARRAY['organizations', 'profiles', 'organization_permission_templates', 'organization_permissions',
                        'transactions', 'events'])::regclass AS oid
)
SELECT format('table %s %s %s', oid::regclass, relrowsecurity, relacl) FROM pg_class WHERE oid IN (SELECT oid FROM ours)
UNION ALL SELECT format('column %s %s %s', attrelid::regclass, attname, format_type(atttypid, atttypmod))
FROM pg_attribute WHERE attrelid IN (SELECT oid FROM ours) AND attnum > 0
UNION ALL SELECT format('constraint %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
FROM pg_constraint WHERE conrelid IN (SELECT oid FROM ours)
UNION ALL SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid IN (SELECT oid FROM ours)
UNION ALL SELECT format('trigger %s %s %s', tgrelid::regclass, tgname, tgenabled)
FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM ours) AND NOT tgisinternal AND tgname NOT LIKE 'hallpass%'
UNION ALL SELECT format('policy %s %s', p.tablename, p) FROM pg_policies p WHERE schemaname = 'public'
UNION ALL SELECT format('%s %s %s', oid, pg_get_functiondef(oid), proacl)
FROM pg_proc WHERE proname IN ('get_user_org_id', 'user_has_min_role', 'pto_rank', 'update_updated_at_column')
UNION ALL SELECT format('%s %s', oid::regprocedure, proacl)     -- replaced where they are
FROM pg_proc WHERE proname IN ('user_has_org_permission', 'user_has_org_permission_enhanced')
               AND pronamespace = 'public'::regnamespace AND oid = ANY ($known)
ORDER BY 1";

/// [`APPLICATION`] with those of the functions that the application had.
async fn application(client: &Client, known: &str) -> Vec<String> {
    lines(
        client,
        &APPLICATION.replace("$known", &format!("'{known}'")),
    )
    .await
}

const FUNCTIONS: &str = "
SELECT array_agg(oid) FROM pg_proc
WHERE proname IN ('user_has_org_permission', 'user_has_org_permission_enhanced')";

#[tokio::test]
async fn nothing_of_the_application_changes() {
    for pto in Pto::ALL {
        let database = pto.found().await;
        let client = database.client().await;
        let (old, new) = match pto.phase {
            Phase::One => (None, None),
            Phase::Two => (Some("permission_audit_log"), Some(OLD_AUDIT_LOG)),
        };
        let known = value(&client, FUNCTIONS).await;
        let rows_before = rows(&client, old).await;
        let before = application(&client, &known).await;
        let visible_before = visible(&client).await;
        assert!(visible_before.contains(&"vic: 1 | 1".to_owned()));
        assert!(visible_before.contains(&"pat: 0 | 0".to_owned()));

        adopt(&database.url).await;

        assert_eq!(visible(&client).await, visible_before, "{pto:?}");
        assert_eq!(rows(&client, new).await, rows_before, "{pto:?}");
        let after = application(&client, &known).await;
        let gone: Vec<_> = before.iter().filter(|l| !after.contains(l)).collect();
        let come: Vec<_> = after.iter().filter(|l| !before.contains(l)).collect();
        // Indexes where none of the application's serves; the unique ones keep out what decisions could not tell apart.
        let (indexes, come): (Vec<_>, Vec<_>) = come
            .into_iter()
            .partition(|line| line.starts_with("CREATE"));
        let indexes: Vec<_> = indexes
            .iter()
            .filter_map(|i| i.split(" ON ").next())
            .collect();
        let role = "CREATE INDEX idx_profiles_org_role";
        let user = "CREATE INDEX idx_profiles_user_org";
        let catalog = "CREATE UNIQUE INDEX hallpass_catalog_key";
        let members = "CREATE UNIQUE INDEX hallpass_members_key";
        let expected = match (pto.shape, pto.phase) {
            (Shape::A, Phase::One) => vec![role, user, catalog, members],
            (Shape::A, Phase::Two) => vec![catalog, members],
            (Shape::B, Phase::One) => vec![role, user, members],
            (Shape::B, Phase::Two) => vec![members],
        };
        assert_eq!(indexes, expected, "{pto:?}");
        // The one thing that is switched off: it would fail every change, for its audit log is another table now.
        let trigger = "trigger organization_permissions permission_audit_trigger";
        if (pto.shape, pto.phase) == (Shape::A, Phase::Two) {
            assert_eq!(gone, [&format!("{trigger} O")], "{pto:?}");
            assert_eq!(come, [&format!("{trigger} D")], "{pto:?}");
        } else {
            assert_eq!(
                (gone.len(), come.len()),
                (0, 0),
                "{pto:?} {gone:?} {come:?}"
            );
        }

        // Nor does anything of hallpass's, when it is done again.
        let schema = lines(&client, WHOLE_SCHEMA).await;
        let url = as_role(&database.url, OWNER).parse().unwrap();
        migrate(&url, |done| panic!("{done:?}")).await.unwrap();
        assert_eq!(lines(&client, WHOLE_SCHEMA).await, schema, "{pto:?}");
    }
}

const REFRESH: &str = "SELECT refresh_permission_materialized_views()";

const VISIBLE: &str = "SELECT (SELECT count(*) FROM transactions), (SELECT count(*) FROM events)";

/// The rows of [`VISIBLE`] that policies show to each user.
async fn visible(client: &Client) -> Vec<String> {
    let mut visible = Vec::new();
    for user in USERS {
        log_in(client, user).await;
        visible.push(format!("{user}: {}", lines(client, VISIBLE).await[0]));
    }
    run(client, "RESET ROLE").await;
    visible
}

#[tokio::test]
async fn policies_ask_hallpass() {
    for pto in Pto::ALL {
        let database = pto.adopted().await;
        let client = database.client().await;

        // An admin's own changes, which the policies let through and the triggers see.
        let change = async |sql: &str| {
            log_in(&client, "ann").await;
            run(&client, &resolve(pto.shape, sql)).await;
        };
        let sees = async |user: &str| {
            log_in(&client, user).await;
            lines(&client, VISIBLE).await.remove(0)
        };
        change(
            "INSERT INTO organization_permissions (org_id, permission_key, min_role_required, is_enabled)
             VALUES (:lincoln, 'can_view_budget', 'volunteer', false)",
        )
        .await;
        for user in ["vic", "ann"] {
            assert_eq!(sees(user).await, "0 | 1", "{pto:?} {user}: disabled");
        }
        assert_eq!(sees("eve").await, "1 | 1", "{pto:?}: another organization");
        change(
            "UPDATE organization_permissions
             SET is_enabled = true, min_role_required = 'admin', specific_users = ARRAY[:pat]::uuid[]
             WHERE permission_key = 'can_view_budget'",
        )
        .await;
        assert_eq!(sees("ann").await, "1 | 1", "{pto:?}: the role");
        assert_eq!(sees("pat").await, "1 | 0", "{pto:?}: by name");
        assert_eq!(sees("vic").await, "0 | 1", "{pto:?}: raised");
        change("DELETE FROM organization_permissions WHERE permission_key = 'can_view_budget'")
            .await;
        assert_eq!(sees("vic").await, "1 | 1", "{pto:?}: the template's again");

        run(&client, "RESET ROLE").await;
        let recorded = "
            SELECT change_type, permission_key, actor_source, database_role, changed_by
            FROM hallpass.log JOIN permission_audit_log USING (entry_id) ORDER BY seq DESC, n LIMIT 3";
        let by = format!("can_view_budget | JWT | authenticated | {}", id("ann"));
        let expected = ["DELETE", "UPDATE", "INSERT"].map(|change| format!("{change} | {by}"));
        assert_eq!(lines(&client, recorded).await, expected, "{pto:?}");
    }
}

/// PTO's function takes one of the organizations, whichever comes first. Better an error than another's rights; who
/// adopts is told.
#[tokio::test]
async fn users_of_several_organizations_are_noted() {
    let database = Pto::new(Shape::A, Phase::One).found().await;
    let client = database.client().await;
    let join = "INSERT INTO profiles (user_id, org_id, role) VALUES (:vic, :franklin, 'admin'), (:vic, NULL, 'admin')";
    run(&client, &resolve(Shape::A, join)).await;
    let mut notes = Vec::new();
    let url = as_role(&database.url, OWNER).parse().unwrap();
    migrate(&url, |progress| {
        if let Progress::Note(note) = progress {
            notes.push(note);
        }
    })
    .await
    .unwrap();
    let expected = "user_has_org_permission, and a policy that calls it, fails from now on for users of several \
                    organizations: 1";
    assert!(notes.iter().any(|note| note == expected), "{notes:#?}");
    log_in(&client, "vic").await;
    let error = client.batch_execute(VISIBLE).await.unwrap_err();
    assert_eq!(sqlstate(&error), "21000");
}

/// The statements that the application sends, behind its API, and what they return.
#[tokio::test]
async fn the_application_calls_as_before() {
    for shape in [Shape::A, Shape::B] {
        let pto = Pto::new(shape, Phase::Two);
        let (found, adopted) = (pto.found().await, pto.adopted().await);
        let (before, after) = (found.client().await, adopted.client().await);
        for client in [&before, &after] {
            let as_application =
                "SET ROLE service_role; SELECT refresh_permission_materialized_views()";
            run(client, as_application).await;
        }
        for sql in [
            "SELECT permission_key, module_name, user_has_permission FROM user_permission_matrix
             WHERE user_id = :bob AND org_id = :lincoln AND is_enabled = true ORDER BY 1",
            "SELECT user_has_org_permission_enhanced(
                 user_id_param => :cam, permission_key_param => 'can_view_budget', use_cache => true)",
            "SELECT user_has_org_permission_enhanced(
                 user_id_param => :cam, permission_key_param => 'can_create_budget_items', use_cache => true)",
            "SELECT user_has_org_permission(user_id_param => :cam, permission_key_param => 'can_view_budget')",
            "SELECT role FROM profiles WHERE :user = :bob AND org_id = :lincoln",
            "SELECT total_available_permissions, disabled_custom_permissions FROM org_permission_summary
             WHERE org_id = :lincoln",
            "SELECT permission_key, module_name, permission_name, has_permission, effective_min_role, is_enabled
             FROM get_user_permissions_bulk(user_id_param => :bob, module_filter => 'budget') ORDER BY 1",
            "SELECT count(metric_name) > 0, count(metric_value) >= 0, count(metric_unit) > 0, count(recommendation) > 0
             FROM analyze_permission_performance()",
            "SELECT set_session_variables(user_id => :ann, profile_id => :ann, org_id => :lincoln,
                 request_id => 'r-7', ip_address => '192.0.2.7', user_agent => 'Firefox')",
        ] {
            let sql = resolve(shape, sql);
            let said = lines(&after, &sql).await;
            assert_eq!(said, lines(&before, &sql).await, "{shape:?} {sql}");
            assert!(!said.is_empty(), "{sql}");
        }
        // What the replaced functions had wrong.
        for (sql, wrong) in [
            (
                "SELECT user_has_org_permission_enhanced(:vic, 'can_approve_expenses')",
                "f",
            ),
            (
                "SELECT user_has_org_permission(:pat, 'no_such_permission')",
                "t",
            ),
        ] {
            let sql = resolve(shape, sql);
            assert_eq!(value(&before, &sql).await, wrong, "{shape:?} {sql}");
            assert_ne!(value(&after, &sql).await, wrong, "{shape:?} {sql}");
        }
    }
}

const SUMMARY: &str = "
SELECT org_id, org_name, total_available_permissions, total_custom_permissions, enabled_custom_permissions,
       disabled_custom_permissions, admin_only_permissions, board_member_permissions, committee_lead_permissions,
       volunteer_permissions, last_permission_update
FROM org_permission_summary ORDER BY org_id";

/// A column of names, where the shape has one.
fn matrix(shape: Shape) -> String {
    let name = match shape {
        Shape::A => "first_name || ' ' || last_name",
        Shape::B => "NULL",
    };
    format!(
        "SELECT user_id, org_id, role, {name}, module_name, permission_key, permission_name, effective_min_role, is_enabled,
                user_has_permission
         FROM user_permission_matrix"
    )
}

#[tokio::test]
async fn the_summary_is_the_same_and_the_matrix_differs_where_it_was_wrong() {
    for shape in [Shape::A, Shape::B] {
        let database = Pto::new(shape, Phase::Two).found().await;
        let client = database.client().await;
        let read = async || BTreeSet::from_iter(lines(&client, &matrix(shape)).await);
        let matrix_before: BTreeSet<String> = read().await;
        let summary_before = lines(&client, SUMMARY).await;
        assert_eq!(summary_before.len(), 3);

        adopt(&database.url).await;
        run(&client, REFRESH).await;

        let matrix_after = read().await;
        assert_eq!(
            (matrix_before.len(), matrix_after.len()),
            (8 * 6, 8 * 6),
            "{shape:?}"
        );
        // Who is granted something by name. `tia` is not among them: what she is named for is disabled.
        let (eve, vic) = match shape {
            Shape::A => ("Eve Example", "Vic Example"),
            Shape::B => ("-", "-"),
        };
        for (rows, may) in [
            (&matrix_before - &matrix_after, "f"),
            (&matrix_after - &matrix_before, "t"),
        ] {
            let expected = [
                format!(
                    ":eve | :franklin | volunteer | {eve} | user_management | can_edit_user_roles | Edit User Roles | admin | t | {may}"
                ),
                format!(
                    ":vic | :lincoln | volunteer | {vic} | budget | can_approve_expenses | Approve Expenses | board_member | t | {may}"
                ),
            ];
            let expected = expected.map(|row| resolve(shape, &row).replace('\'', ""));
            assert_eq!(rows, BTreeSet::from(expected), "{shape:?}");
        }

        let summary = lines(&client, SUMMARY).await;
        assert_eq!(summary, summary_before, "{shape:?}");
    }
}
