//! What PTO Connect's callers rely on in SQL: names, arguments, columns, and the order of rows.

use crate::{
    database::Database,
    sql::{lines, run, value},
};

/// Callers name arguments and columns. Ours come after theirs.
const SIGNATURES: &[&str] = &[
    "analyze_permission_performance() TABLE(metric_name text, metric_value numeric, metric_unit text, \
     recommendation text, status text, detail text)",
    "cleanup_old_audit_logs(retention_days integer DEFAULT 365) text",
    "get_user_permissions_bulk(user_id_param uuid, module_filter text DEFAULT NULL::text) \
     TABLE(permission_key text, module_name text, permission_name text, has_permission boolean, \
     effective_min_role text, is_enabled boolean, org_id uuid, role text, reason text)",
    "refresh_permission_materialized_views() text",
    "set_session_variables(user_id uuid, profile_id uuid DEFAULT NULL::uuid, org_id uuid DEFAULT NULL::uuid, \
     request_id text DEFAULT NULL::text, ip_address text DEFAULT NULL::text, user_agent text DEFAULT NULL::text) void",
    "user_has_org_permission(user_id_param uuid, permission_key_param character varying) boolean",
    "user_has_org_permission_enhanced(user_id_param uuid, permission_key_param text, \
     use_cache boolean DEFAULT true) boolean",
    "user_has_permission_in_org(org_id uuid, user_id uuid, permission_key text) boolean",
];

#[tokio::test]
async fn functions_have_the_signatures_that_callers_know() {
    let database = Database::create().await;
    let client = database.client().await;
    let signatures = "
        SELECT format('%s(%s) %s', proname, pg_get_function_arguments(oid), pg_get_function_result(oid))
        FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY proname";
    assert_eq!(lines(&client, signatures).await, SIGNATURES);
}

/// By their keys the two of the budget come the other way round; the filter is a module.
#[tokio::test]
async fn permissions_in_bulk_come_by_organization_module_and_name() {
    const SEED: &str = "
        TRUNCATE organization_permission_templates;
        INSERT INTO organization_permission_templates (module_name, permission_key, permission_name, default_min_role)
        VALUES ('events', 'attend', 'Attend', 'volunteer'), ('budget', 'a', 'Spend', 'admin'),
               ('budget', 'b', 'Look', 'volunteer');
        INSERT INTO organizations (id, name)
        SELECT repeat(digit, 32)::uuid, digit FROM unnest('{2,1}'::text[]) digit;
        INSERT INTO profiles (org_id, user_id, role) SELECT id, repeat('9', 32)::uuid, 'volunteer' FROM organizations;
        INSERT INTO organization_permissions (org_id, permission_key, is_enabled)
        VALUES (repeat('1', 32)::uuid, 'b', false)";
    let database = Database::create().await;
    let client = database.client().await;
    run(&client, SEED).await;
    let bulk = async |arguments: &str| {
        let ask = format!(
            "SELECT permission_key, module_name, permission_name, has_permission, effective_min_role, is_enabled,
                    left(org_id::text, 1), role, reason FROM get_user_permissions_bulk({arguments})"
        );
        lines(&client, &ask).await
    };
    let (first, second) = (
        [
            "b | budget | Look | f | volunteer | f | 1 | volunteer | PERMISSION_DISABLED",
            "a | budget | Spend | f | admin | t | 1 | volunteer | ROLE_TOO_LOW",
        ],
        [
            "b | budget | Look | t | volunteer | t | 2 | volunteer | GRANTED_BY_ROLE",
            "a | budget | Spend | f | admin | t | 2 | volunteer | ROLE_TOO_LOW",
        ],
    );
    let user = "repeat('9', 32)::uuid";
    let budget = bulk(&format!("{user}, 'budget'")).await;
    assert_eq!(budget, [first, second].concat());
    let attend = |organization| {
        format!(
            "attend | events | Attend | t | volunteer | t | {organization} | volunteer | GRANTED_BY_ROLE"
        )
    };
    let (attend_first, attend_second) = (attend("1"), attend("2"));
    let all = bulk(user).await;
    assert_eq!(all[..3], [first[0], first[1], &attend_first]);
    assert_eq!(all[3..], [second[0], second[1], &attend_second]);
}

#[tokio::test]
async fn a_refresh_says_how_long_it_took() {
    let database = Database::create().await;
    let client = database.client().await;
    let said = value(&client, "SELECT refresh_permission_materialized_views()").await;
    let seconds = said
        .strip_prefix("Refreshed user_permission_matrix and org_permission_summary in ")
        .and_then(|said| said.strip_suffix(" s."));
    let seconds: f64 = seconds.unwrap_or_else(|| panic!("{said}")).parse().unwrap();
    assert!(seconds > 0.0);
}
