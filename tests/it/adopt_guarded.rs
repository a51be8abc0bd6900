//! What others have put in a database must not become hallpass's, nor be hurt by it.

use hallpass::store::migrations::{MigrateError, migrate, plan, uninstall};

use crate::{
    adopt_cases::PHASE_2,
    database::{Database, Shape},
    pto::{as_owner, resolve},
    sql::{lines, run, sqlstate, value},
};

/// As a role that may make objects in public and nothing else.
const STRANGER: &str = "
DO $$ BEGIN
    CREATE ROLE stranger;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL;
END $$;
GRANT CREATE, USAGE ON SCHEMA public TO stranger;
CREATE SCHEMA trap;
CREATE TABLE trap.caught (who text);
GRANT USAGE ON SCHEMA trap TO PUBLIC;
GRANT INSERT ON trap.caught TO PUBLIC;
SET ROLE stranger;";

/// Functions that fit a call better than ours, or than PostgreSQL's.
const SNARES: &str = "
CREATE FUNCTION public.user_has_permission_in_org(uuid, uuid, character varying) RETURNS boolean LANGUAGE sql AS
    'INSERT INTO trap.caught VALUES (current_user); SELECT true';
CREATE FUNCTION public.format(text, text) RETURNS text LANGUAGE sql AS
    'INSERT INTO trap.caught VALUES (current_user); SELECT $1';
CREATE FUNCTION public.num_nulls(uuid, uuid) RETURNS integer LANGUAGE sql AS
    'INSERT INTO trap.caught VALUES (current_user); SELECT 0';
RESET ROLE;";

#[tokio::test]
async fn functions_that_fit_better_are_not_called() {
    let database = Database::create().await;
    let client = database.client().await;
    run(&client, &format!("{STRANGER}{SNARES}")).await;
    let ask = "SELECT user_has_org_permission(gen_random_uuid(), 'can_view_budget')";
    assert_eq!(value(&client, ask).await, "f");
    assert_eq!(lines(&client, "SELECT who FROM trap.caught").await, [""; 0]);
}

#[tokio::test]
async fn a_look_at_a_database_calls_nobody_s_functions() {
    let database = PHASE_2.found().await;
    let client = database.client().await;
    // One that only the survey's own functions could call: ours are not there yet.
    let snares = SNARES
        .split_once("CREATE FUNCTION public.format")
        .unwrap()
        .1;
    run(
        &client,
        &format!("{STRANGER} CREATE FUNCTION public.format{snares}"),
    )
    .await;
    let url = as_owner(&database.url).parse().unwrap();
    plan(&url).await.unwrap();
    migrate(&url, |_| {}).await.unwrap();
    uninstall(&url, |_| {}).await.unwrap();
    assert_eq!(lines(&client, "SELECT who FROM trap.caught").await, [""; 0]);
}

#[tokio::test]
async fn privileges_that_two_have_granted_are_kept_once() {
    let database = PHASE_2.found().await;
    let client = database.client().await;
    run(
        &client,
        "SET ROLE pto_owner;
         GRANT SELECT ON user_permission_matrix TO authenticated WITH GRANT OPTION;
         SET ROLE authenticated;
         GRANT SELECT ON user_permission_matrix TO service_role; RESET ROLE",
    )
    .await;
    migrate(&as_owner(&database.url).parse().unwrap(), |_| {})
        .await
        .unwrap();
    let may =
        "SELECT has_table_privilege('service_role', 'public.user_permission_matrix', 'SELECT')";
    assert_eq!(value(&client, may).await, "t");
}

/// The application's own, which has nothing of ours but the name.
#[tokio::test]
async fn a_namesake_keeps_its_privileges() {
    let database = PHASE_2.adopted().await;
    let client = database.client().await;
    run(
        &client,
        "SET ROLE pto_owner;
         CREATE FUNCTION set_session_variables(uuid) RETURNS void LANGUAGE sql AS '';
         REVOKE ALL ON FUNCTION set_session_variables(uuid) FROM PUBLIC;
         GRANT EXECUTE ON FUNCTION set_session_variables(uuid) TO authenticated;
         CALL hallpass.reset_privileges(); RESET ROLE",
    )
    .await;
    let may = "SELECT has_function_privilege('authenticated', 'public.set_session_variables(uuid)', 'EXECUTE')";
    assert_eq!(value(&client, may).await, "t");
}

/// Logical replication of all tables asks of each row who it is.
#[tokio::test]
async fn upkeep_goes_on_where_everything_is_published() {
    let database = PHASE_2.adopted().await;
    let client = database.client().await;
    run(&client, "CREATE PUBLICATION everything FOR ALL TABLES").await;
    let change =
        "UPDATE organization_permissions SET is_enabled = NOT is_enabled WHERE org_id = :lincoln";
    run(&client, &resolve(Shape::A, change)).await;
    assert_ne!(value(&client, "SELECT hallpass.clear_pending()").await, "0");
    let old = "INSERT INTO permission_audit_log
                   (entry_id, n, table_name, change_type, actor_source, database_role, database_login, created_at)
               VALUES (0, 1, 'profiles', 'UPDATE', 'NONE', 'ann', 'ann', now() - interval '9 years')";
    run(&client, old).await;
    let removed = value(&client, "SELECT cleanup_old_audit_logs(3650)").await;
    assert!(removed.starts_with("Removed 0"), "{removed}");
    let removed = value(&client, "SELECT cleanup_old_audit_logs(3000)").await;
    assert!(!removed.starts_with("Removed 0"), "{removed}");
}

#[tokio::test]
async fn a_hold_in_force_keeps_hallpass_where_it_is() {
    let database = PHASE_2.adopted().await;
    let client = database.client().await;
    run(
        &client,
        "INSERT INTO hallpass.legal_hold (placed_by, reason) VALUES ('ann', 'a case')",
    )
    .await;
    let url = as_owner(&database.url).parse().unwrap();
    let refused = uninstall(&url, |_| {}).await;
    assert!(matches!(refused, Err(MigrateError::Held)), "{refused:?}");
    assert_eq!(
        value(&client, "SELECT count(*) FROM hallpass.legal_hold").await,
        "1"
    );
    run(&client, "UPDATE hallpass.legal_hold SET lifted_at = now()").await;
    uninstall(&url, |_| {}).await.unwrap();
    let gone = client.query_one("SELECT hallpass.head()", &[]).await;
    assert_eq!(sqlstate(&gone.unwrap_err()), "3F000");
}
