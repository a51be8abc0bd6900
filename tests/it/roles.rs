//! The roles of `deploy/sql/roles.sql`: made as an operator makes them; and what they must not do, tried.

use hallpass::{embedded::PrivatePostgres, store::migrations::migrate};
use tokio::{process::Command, task::spawn_blocking};
use tokio_postgres::Client;

use crate::{
    database::{Database, as_role, connect},
    privileges::{GRANTED, PRIVILEGES},
    sql::{lines, run, sqlstate, value},
    support::{options, temporary_directory},
};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/sql/roles.sql");

/// What is not the owner's, of all that hallpass and `migrate` make.
const NOT_OF: &str = "
SELECT object FROM (
    SELECT 'schema ' || nspname, nspowner FROM pg_namespace WHERE nspname = 'hallpass'
    UNION ALL
    SELECT 'relation ' || oid::regclass, relowner FROM pg_class
    WHERE relnamespace IN ('public'::regnamespace, 'hallpass'::regnamespace)
    UNION ALL
    SELECT 'routine ' || oid::regprocedure, proowner FROM pg_proc
    WHERE pronamespace IN ('public'::regnamespace, 'hallpass'::regnamespace)
    UNION ALL
    SELECT 'type ' || oid::regtype, typowner FROM pg_type
    WHERE typnamespace IN ('public'::regnamespace, 'hallpass'::regnamespace)
) owned (object, owner) WHERE owner <> ";

/// Runs the script, for the owner that it has by default or another; an error is what psql says.
pub(crate) async fn make_roles(url: &str, owner: Option<&str>) -> Result<(), String> {
    let output = Command::new("psql")
        .args(["-X", "-f", SCRIPT, "-d", url])
        .args(owner.map(|owner| format!("--set=owner={owner}")))
        .output()
        .await
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    if !output.status.success() {
        return Err(said);
    }
    assert_eq!(said, "");
    Ok(())
}

async fn login(database: &Database, role: &str) -> Client {
    connect(&as_role(&database.url, role)).await
}

/// In a cluster of its own, since roles are the cluster's.
#[tokio::test]
async fn roles_are_made_before_migrating_or_after() {
    let directory = temporary_directory();
    let options = options(&directory.path().join("data"));
    let postgres = spawn_blocking(move || PrivatePostgres::start(&options).unwrap());
    let postgres = postgres.await.unwrap();
    let (fresh, filled) = (postgres.url_for("fresh"), postgres.url_for("filled"));
    let superuser = connect(&postgres.url()).await;
    run(
        &superuser,
        "CREATE ROLE administrator LOGIN CREATEROLE; CREATE ROLE application LOGIN",
    )
    .await;
    // Each alone: not for a transaction.
    run(&superuser, "CREATE DATABASE fresh OWNER administrator").await;
    run(&superuser, "CREATE DATABASE filled OWNER application").await;

    // Without the roles, nobody is given anything.
    let application = as_role(&filled, "application").parse().unwrap();
    migrate(&application, |_| {}).await.unwrap();
    let in_filled = connect(&filled).await;
    assert_eq!(lines(&in_filled, PRIVILEGES).await, [""; 0]);

    // By an administrator who is no superuser, before migrating.
    let administrator = as_role(&fresh, "administrator");
    make_roles(&administrator, None).await.unwrap();
    make_roles(&administrator, None).await.unwrap();
    assert_migrator_is(&fresh, "hallpass_owner").await;
    let migrator = as_role(&fresh, "hallpass_migrator").parse().unwrap();
    migrate(&migrator, |_| {}).await.unwrap();
    let in_fresh = connect(&fresh).await;
    assert_eq!(lines(&in_fresh, PRIVILEGES).await, GRANTED);
    let not_of = format!("{NOT_OF} 'hallpass_owner'::regrole");
    assert_eq!(lines(&in_fresh, &not_of).await, [""; 0]);

    // Where the application has its tables, nothing is done for another owner than theirs.
    let refused = make_roles(&filled, None).await.unwrap_err();
    let expected = "public.profiles belongs to application, not to hallpass_owner";
    assert!(refused.contains(expected), "{refused}");
    assert_eq!(lines(&in_filled, PRIVILEGES).await, [""; 0]);
    for _ in 0..2 {
        make_roles(&filled, Some("application")).await.unwrap();
        assert_eq!(lines(&in_filled, PRIVILEGES).await, GRANTED);
    }
    assert_migrator_is(&filled, "application").await;
    // The other database's roles are as they were.
    assert_eq!(lines(&in_fresh, PRIVILEGES).await, GRANTED);
    spawn_blocking(move || postgres.stop().unwrap())
        .await
        .unwrap();
}

async fn assert_migrator_is(url: &str, owner: &str) {
    let migrator = connect(&as_role(url, "hallpass_migrator")).await;
    assert_eq!(
        lines(&migrator, "SELECT session_user, current_user").await,
        [format!("hallpass_migrator | {owner}")]
    );
}

#[tokio::test]
async fn a_migrated_database_is_the_owners() {
    let database = Database::create().await;
    let client = database.client().await;
    let not_of = format!("{NOT_OF} 'hallpass_owner'::regrole");
    assert_eq!(lines(&client, &not_of).await, [""; 0]);
    // Nor can the service or the auditor become anybody else.
    let more = "
        SELECT rolname FROM pg_roles
        WHERE rolname IN ('hallpass_service', 'hallpass_auditor')
          AND (rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls
               OR EXISTS (SELECT FROM pg_auth_members WHERE member = pg_roles.oid))";
    assert_eq!(lines(&client, more).await, [""; 0]);
}

/// What the catalogs say, tried.
#[tokio::test]
async fn neither_the_service_nor_the_auditor_does_more() {
    let database = Database::create().await;
    // As PostgreSQL 15 and later have it.
    let client = database.client().await;
    run(&client, "REVOKE CREATE ON SCHEMA public FROM PUBLIC").await;
    for role in ["hallpass_service", "hallpass_auditor"] {
        let client = login(&database, role).await;
        for refused in [
            "UPDATE hallpass.log SET seq = 0",
            "DELETE FROM hallpass.log",
            "TRUNCATE hallpass.log",
            "INSERT INTO hallpass.log VALUES (1, 1, 1, '3', now(), now())",
            "UPDATE hallpass.log_removed SET seq = 0",
            "DELETE FROM hallpass.log_removed",
            "TRUNCATE hallpass.log_removed",
            "UPDATE hallpass.log_org SET seq = 0",
            "DELETE FROM hallpass.log_org",
            "TRUNCATE hallpass.log_org",
            "INSERT INTO hallpass.log_org VALUES (gen_random_uuid(), 1)",
            "UPDATE permission_audit_log SET old_values = NULL",
            "DELETE FROM permission_audit_log",
            "TRUNCATE permission_audit_log",
            "INSERT INTO permission_audit_log (entry_id) VALUES (1)",
            "SELECT FROM hallpass.permission_audit_log_default",
            "DELETE FROM hallpass.permission_audit_log_default",
            "SELECT FROM hallpass.log_pending",
            "DELETE FROM hallpass.log_pending",
            "INSERT INTO hallpass.log_pending VALUES (1, '{}')",
            "SELECT nextval('hallpass.log_seq')",
            "SELECT nextval('hallpass.entry_id')",
            "UPDATE hallpass.legal_hold SET lifted_at = now()",
            "INSERT INTO hallpass.legal_hold (placed_by, reason) VALUES ('x', 'y')",
            "UPDATE hallpass.matrix_stamp SET seq = 9",
            "UPDATE hallpass.fingerprint SET value = ''",
            "UPDATE hallpass.retention_floor SET days = 1",
            "INSERT INTO hallpass.schema_migrations VALUES (1000, 'x', 'y')",
            "INSERT INTO hallpass.intended_privilege VALUES ('hallpass_service', 'ALL', 'TABLE hallpass.log')",
            "SELECT FROM profiles",
            "SELECT FROM organizations",
            "SELECT FROM organization_permissions",
            "SELECT FROM organization_permission_templates",
            "SELECT FROM permission_roles",
            "UPDATE profiles SET role = 'admin'",
            "SELECT FROM hallpass.members",
            "SELECT FROM effective_user_permissions",
            "SELECT FROM user_permission_matrix",
            "SELECT FROM org_permission_summary",
            "SELECT cleanup_old_audit_logs()",
            "SELECT user_has_permission_in_org(NULL, NULL, NULL)",
            "SELECT set_session_variables(gen_random_uuid())",
            "SELECT * FROM hallpass.load_in_snapshot('{}', '{}', true)",
            "CALL hallpass.log_everything('UPDATE', '*')",
            "CALL hallpass.reset_privileges()",
            "CREATE TABLE hallpass.mine (x int)",
            "CREATE TABLE public.mine (x int)",
            "ALTER TABLE profiles DISABLE TRIGGER ALL",
            "SET session_replication_role = replica",
            "SET ROLE hallpass_owner",
            "SET ROLE hallpass_migrator",
        ] {
            let error = client.batch_execute(refused).await.expect_err(refused);
            assert_eq!(sqlstate(&error), "42501", "{role}: {refused}");
        }
    }
    let auditor = login(&database, "hallpass_auditor").await;
    for refused in [
        "SELECT * FROM hallpass.load('{}', '{}', true)",
        "SELECT hallpass.inspect()",
        "SELECT hallpass.clear_pending()",
        "SELECT refresh_permission_materialized_views()",
        "SELECT hallpass.remove_expired(365, 1)",
    ] {
        let error = auditor.batch_execute(refused).await.expect_err(refused);
        assert_eq!(sqlstate(&error), "42501", "{refused}");
    }
}

#[tokio::test]
async fn the_auditor_reads_what_happened() {
    let database = Database::create().await;
    let client = database.client().await;
    run(&client, "INSERT INTO permission_roles VALUES ('chair', 9)").await;
    let auditor = login(&database, "hallpass_auditor").await;
    let happened = "
        SELECT change_type, table_name, new_values ->> 'role_key', hallpass.head() = seq || '-' || lpad(to_hex(uid), 8, '0')
        FROM hallpass.log JOIN permission_audit_log USING (entry_id) JOIN hallpass.log_org USING (seq)
        ORDER BY seq DESC LIMIT 1";
    assert_eq!(
        lines(&auditor, happened).await,
        ["INSERT | permission_roles | chair | t"]
    );
    for read in [
        "SELECT * FROM hallpass.legal_hold",
        "SELECT * FROM hallpass.schema_migrations",
        "SELECT * FROM analyze_permission_performance()",
    ] {
        run(&auditor, read).await;
    }
}

/// Who steals the service's password must not be able to wipe out the traces.
#[tokio::test]
async fn nobody_but_the_owner_removes_what_is_younger_than_the_floor() {
    let database = Database::create().await;
    let owner = login(&database, "hallpass_migrator").await;
    let service = login(&database, "hallpass_service").await;
    // Somebody else, to whom the application gave a way in.
    let client = database.client().await;
    let grant = "GRANT EXECUTE ON FUNCTION cleanup_old_audit_logs(integer) TO hallpass_auditor";
    run(&client, grant).await;
    let auditor = login(&database, "hallpass_auditor").await;
    let step = |days: i32| format!("SELECT hallpass.remove_expired({days}, 1)");
    let cleanup = "SELECT cleanup_old_audit_logs(29)".to_owned();
    let nothing = "Removed 0 of the audit log's rows at a retention of 29 days.";
    for (client, refused) in [(&service, step(29)), (&auditor, cleanup.clone())] {
        let error = client.simple_query(&refused).await.unwrap_err();
        assert_eq!(sqlstate(&error), "42501", "{refused}");
        let message = error.as_db_error().unwrap().message();
        let expected = "may not remove what is younger than 30 days";
        assert!(message.ends_with(expected), "{message}");
    }
    assert_eq!(value(&service, &step(30)).await, "(0,t)");
    // The superuser, and a member of the owner.
    assert_eq!(value(&client, &cleanup).await, nothing);
    run(&owner, "SET ROLE hallpass_owner").await;
    assert_eq!(value(&owner, &cleanup).await, nothing);
    run(&owner, "UPDATE hallpass.retention_floor SET days = 7").await;
    assert_eq!(value(&service, &step(7)).await, "(0,t)");
}
