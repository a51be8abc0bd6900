//! An adopted database in use: what is recorded and where, who may do what, and rows that only PTO Connect's tables have.

use tokio_postgres::Client;

use crate::{
    database::Shape,
    names::id,
    privileges::{GRANTED, PRIVILEGES},
    pto::{OLD_AUDIT_LOG, Phase, Pto, adopt, resolve},
    server::{Server, config},
    sql::{lines, run, sqlstate, value},
};

/// The application's server changes a setting: it says who does, in the same transaction.
const CHANGE: &str = "
SET ROLE service_role;
BEGIN;
SELECT set_session_variables(user_id => :ann, profile_id => :bob, org_id => :lincoln,
                             request_id => 'r-7', ip_address => '192.0.2.7', user_agent => 'Firefox');
UPDATE organization_permissions SET is_enabled = false
WHERE org_id = :lincoln AND permission_key IN ('can_approve_expenses', 'can_create_budget_items');
COMMIT;
RESET ROLE";

const RECORDED: &str = "
SELECT change_type, permission_key, new_values ->> 'is_enabled', changed_by, changed_by_profile_id, ip_address, user_agent,
       request_id, database_role
FROM permission_audit_log JOIN hallpass.log USING (entry_id) ORDER BY seq, permission_key";

#[tokio::test]
async fn a_change_is_recorded_once_and_in_the_new_log_alone() {
    for shape in [Shape::A, Shape::B] {
        let database = Pto::new(shape, Phase::Two).adopted().await;
        let client = database.client().await;
        assert_eq!(
            lines(&client, RECORDED).await,
            [""; 0],
            "adoption is no change"
        );
        let old =
            format!("SELECT change_type, count(*) FROM {OLD_AUDIT_LOG} GROUP BY 1 ORDER BY 1");
        let old_rows: &[&str] = match shape {
            // Its trigger saw the six overrides come.
            Shape::A => &["BULK_UPDATE | 1", "CREATE | 7", "RESET | 1", "UPDATE | 1"],
            Shape::B => &["BULK_UPDATE | 1", "CREATE | 1", "RESET | 1", "UPDATE | 1"],
        };
        assert_eq!(lines(&client, &old).await, old_rows, "{shape:?}");

        run(&client, &resolve(shape, CHANGE)).await;

        let by = format!(
            "{} | {} | 192.0.2.7 | Firefox | r-7 | service_role",
            id("ann"),
            id("bob")
        );
        let expected = ["can_approve_expenses", "can_create_budget_items"]
            .map(|permission| format!("UPDATE | {permission} | false | {by}"));
        assert_eq!(lines(&client, RECORDED).await, expected, "{shape:?}");
        let entries = "SELECT count(DISTINCT entry_id) FROM permission_audit_log";
        assert_eq!(value(&client, entries).await, "1", "one statement");
        assert_eq!(lines(&client, &old).await, old_rows, "{shape:?}");
        // Whoever read it before still may, under the new name.
        run(&client, "SET ROLE service_role").await;
        assert_eq!(lines(&client, &old).await, old_rows, "{shape:?}");
    }
}

/// Where a profile is a user, the membership ends with the user.
#[tokio::test]
async fn a_user_who_is_deleted_is_no_member_and_the_log_says_so() {
    let database = Pto::new(Shape::B, Phase::Two).adopted().await;
    let client = database.client().await;
    let server = Server::start(config(&database.url)).await;
    let asked = ("lincoln", "vic", "can_view_budget");
    let may = server.check_now(asked.0, asked.1, asked.2).await;
    assert_eq!(may.said, "allow GRANTED_BY_ROLE");
    run(
        &client,
        &resolve(Shape::B, "DELETE FROM auth.users WHERE id = :vic"),
    )
    .await;
    let may = server.check_now(asked.0, asked.1, asked.2).await;
    assert_eq!(may.said, "deny NOT_A_MEMBER");
    let recorded =
        "SELECT change_type, table_name, org_id, affected_user_id FROM permission_audit_log";
    let expected = format!("DELETE | profiles | {} | {}", id("lincoln"), id("vic"));
    assert_eq!(lines(&client, recorded).await, [expected]);
    server.stop().await;
}

/// Types that tables of this kind also have: roles as an enum, times without a zone.
const OTHER_TYPES: &str = "
CREATE TYPE user_role AS ENUM ('admin', 'board_member', 'committee_lead', 'volunteer', 'parent_member', 'teacher');
ALTER TABLE profiles ALTER role TYPE user_role USING role::user_role;
ALTER TABLE organization_permissions ALTER min_role_required TYPE user_role USING min_role_required::user_role;
ALTER TABLE organization_permissions ALTER updated_at DROP DEFAULT, ALTER updated_at TYPE timestamp;
ALTER TABLE organization_permission_templates
    ALTER default_min_role DROP DEFAULT, ALTER default_min_role TYPE user_role USING default_min_role::user_role";

#[tokio::test]
async fn columns_may_have_other_types() {
    let database = Pto::new(Shape::A, Phase::One).found().await;
    let client = database.client().await;
    run(&client, OTHER_TYPES).await;
    adopt(&database.url).await;
    let server = Server::start(config(&database.url)).await;
    for refreshed in [false, true] {
        if refreshed {
            run(&client, "SELECT refresh_permission_materialized_views()").await;
        }
        for (user, permission, said) in [
            ("bob", "can_approve_expenses", "allow GRANTED_BY_ROLE"),
            ("vic", "can_approve_expenses", "allow GRANTED_TO_USER"),
            ("pat", "can_approve_expenses", "deny ROLE_TOO_LOW"),
        ] {
            let answer = server.check_now("lincoln", user, permission).await;
            assert_eq!(answer.said, said, "{user} {permission}");
        }
        let holders =
            "SELECT role, reason FROM hallpass.permission_holders(:lincoln, 'can_approve_expenses',
                           '00000000-0000-0000-0000-000000000000', 9) ORDER BY 1";
        let holders = lines(&client, &resolve(Shape::A, holders)).await;
        let expected = [
            "admin | GRANTED_BY_ROLE",
            "board_member | GRANTED_BY_ROLE",
            "volunteer | GRANTED_TO_USER",
        ];
        assert_eq!(holders, expected);
        let summary = "SELECT disabled_custom_permissions, board_member_permissions, last_permission_update IS NOT NULL
                       FROM hallpass.organization_summary(:lincoln, true)";
        assert_eq!(
            lines(&client, &resolve(Shape::A, summary)).await,
            ["1 | 2 | t"]
        );
        let bulk = "SELECT count(*) FROM get_user_permissions_bulk(:bob)";
        assert_eq!(value(&client, &resolve(Shape::A, bulk)).await, "6");
    }
    let promote = "UPDATE profiles SET role = 'admin' WHERE user_id = :pat";
    run(&client, &resolve(Shape::A, promote)).await;
    let answer = server
        .check_now("lincoln", "pat", "can_approve_expenses")
        .await;
    assert_eq!(answer.said, "allow GRANTED_BY_ROLE");
    server.stop().await;
}

/// The column may be NULL, and then nobody's role is enough.
#[tokio::test]
async fn a_template_without_a_role_is_for_nobody_but_those_who_are_named() {
    for shape in [Shape::A, Shape::B] {
        let database = Pto::new(shape, Phase::One).adopted().await;
        let client = database.client().await;
        let server = Server::start(config(&database.url)).await;
        let insert = "
            INSERT INTO organization_permission_templates (module_name, permission_key, permission_name, default_min_role)
            VALUES ('m', 'can_wait', 'Wait', NULL), ('m', 'can_lead', 'Lead', DEFAULT)";
        run(&client, insert).await;
        for (user, permission, said) in [
            ("ann", "can_wait", "deny ROLE_TOO_LOW"),
            ("cam", "can_lead", "allow GRANTED_BY_ROLE"),
            ("vic", "can_lead", "deny ROLE_TOO_LOW"),
            ("lou", "can_lead", "deny NOT_A_MEMBER"),
        ] {
            let answer = server.check_now("lincoln", user, permission).await;
            assert_eq!(answer.said, said, "{shape:?} {user} {permission}");
        }
        // The matrix, which the service reads when it may be believed, says the same.
        run(&client, "SELECT refresh_permission_materialized_views()").await;
        let granted = "SELECT count(*) FROM user_permission_matrix
                       WHERE permission_key = 'can_wait' AND (user_has_permission OR effective_min_role IS NOT NULL)";
        assert_eq!(value(&client, granted).await, "0", "{shape:?}");
        server.stop().await;
    }
}

/// What is the application's: its privileges are its own affair.
const APPLICATION: [&str; 12] = [
    "table public.organizations ",
    "table public.profiles ",
    "table public.organization_permission_templates ",
    "table public.organization_permissions ",
    "table public.transactions ",
    "table public.events ",
    "table public.permission_audit_log_before_hallpass ",
    "routine public.update_updated_at_column()",
    "routine public.pto_rank(text)",
    "routine public.get_user_org_id()",
    "routine public.user_has_min_role(text)",
    "routine public.log_permission_changes()",
];

/// What the application had granted on the function that its policies call, which has kept it.
const GRANTED_IN_PHASE_1: &[&str] = &[
    "routine public.user_has_org_permission(uuid, character varying) | PUBLIC | EXECUTE",
    "routine public.user_has_org_permission(uuid, character varying) | anon | EXECUTE",
    "routine public.user_has_org_permission(uuid, character varying) | authenticated | EXECUTE",
    "routine public.user_has_org_permission(uuid, character varying) | service_role | EXECUTE",
];

/// On both such functions, and on what takes the place of the rest: that, to the one role that no policy concerns.
const GRANTED_IN_PHASE_2: &[&str] = &[
    "routine public.analyze_permission_performance() | service_role | EXECUTE",
    "routine public.cleanup_old_audit_logs(integer) | service_role | EXECUTE",
    "routine public.get_user_permissions_bulk(uuid, text) | service_role | EXECUTE",
    "routine public.refresh_permission_materialized_views() | service_role | EXECUTE",
    "routine public.set_session_variables(uuid, uuid, uuid, text, text, text) | service_role | EXECUTE",
    "routine public.user_has_org_permission(uuid, character varying) | PUBLIC | EXECUTE",
    "routine public.user_has_org_permission(uuid, character varying) | anon | EXECUTE",
    "routine public.user_has_org_permission(uuid, character varying) | authenticated | EXECUTE",
    "routine public.user_has_org_permission(uuid, character varying) | service_role | EXECUTE",
    "routine public.user_has_org_permission_enhanced(uuid, text, boolean) | PUBLIC | EXECUTE",
    "routine public.user_has_org_permission_enhanced(uuid, text, boolean) | anon | EXECUTE",
    "routine public.user_has_org_permission_enhanced(uuid, text, boolean) | authenticated | EXECUTE",
    "routine public.user_has_org_permission_enhanced(uuid, text, boolean) | service_role | EXECUTE",
    "table public.org_permission_summary | service_role | SELECT",
    "table public.permission_audit_log | service_role | SELECT",
    "table public.user_permission_matrix | service_role | SELECT",
];

#[tokio::test]
async fn who_may_do_what_with_hallpass() {
    for pto in Pto::ALL {
        let database = pto.adopted().await;
        let client = database.client().await;
        let granted = lines(&client, PRIVILEGES).await;
        let of_hallpass: Vec<_> = granted
            .iter()
            .filter(|line| !APPLICATION.iter().any(|name| line.starts_with(name)))
            .collect();
        let of_the_application = match pto.phase {
            Phase::One => GRANTED_IN_PHASE_1,
            Phase::Two => GRANTED_IN_PHASE_2,
        };
        let mut expected = [GRANTED, of_the_application].concat();
        expected.sort_unstable();
        assert_eq!(of_hallpass, expected, "{pto:?}");
        // Of what was set aside, nobody finds anything.
        let open = "SELECT rolname FROM pg_roles WHERE NOT rolsuper AND rolname !~ '^(pto_owner|pg_)'
                    AND has_schema_privilege(rolname, to_regnamespace('hallpass_replaced'), 'USAGE, CREATE')";
        assert_eq!(lines(&client, open).await, [""; 0], "{pto:?}");
        the_api_s_users_are_refused(&client).await;
    }
}

/// What the catalogs say, tried.
async fn the_api_s_users_are_refused(client: &Client) {
    for role in ["anon", "authenticated"] {
        run(client, &format!("SET ROLE {role}")).await;
        for refused in [
            "SELECT FROM permission_roles",
            "UPDATE permission_roles SET rank = 9",
            "SELECT FROM permission_audit_log",
            "DELETE FROM permission_audit_log",
            "SELECT FROM user_permission_matrix",
            "SELECT FROM org_permission_summary",
            "SELECT FROM effective_user_permissions",
            "SELECT refresh_permission_materialized_views()",
            "SELECT user_has_permission_in_org(NULL, NULL, NULL)",
            "SELECT * FROM get_user_permissions_bulk(NULL)",
            "SELECT cleanup_old_audit_logs()",
            "SELECT * FROM analyze_permission_performance()",
            "SELECT hallpass.head()",
            "SELECT FROM hallpass.members",
        ] {
            let error = client.batch_execute(refused).await.expect_err(refused);
            assert_eq!(sqlstate(&error), "42501", "{role} {refused}");
        }
        run(client, "RESET ROLE").await;
    }
}
