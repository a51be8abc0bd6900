//! Who may do what in a database whose default privileges open everything to everyone, as a hosted one's do.

use tokio::sync::OnceCell;
use tokio_postgres::Client;

use hallpass::store::migrations::migrate;

use crate::{
    database::Database,
    sql::{lines, run, sqlstate},
};

/// Every privilege on hallpass's objects and on the tables `migrate` creates that somebody other than the owner has.
///
/// A grant that a migration makes on purpose, by `hallpass.intended_privilege`, goes here as the failing test prints it,
/// `object | grantee | privilege`; one that nobody meant is for `hallpass.reset_privileges` to revoke: most often a new
/// name in `public` that `hallpass.public_object` does not have. The service's consumers are the statements of
/// `src/store`.
pub(crate) const GRANTED: &[&str] = &[
    "routine hallpass.change(jsonb, jsonb, text) | hallpass_admin | EXECUTE",
    "routine hallpass.clear_pending() | hallpass_service | EXECUTE",
    "routine hallpass.diagnose(text, name) | hallpass_service | EXECUTE",
    "routine hallpass.explain(uuid, uuid, text) | hallpass_service | EXECUTE",
    "routine hallpass.head() | hallpass_admin | EXECUTE",
    "routine hallpass.head() | hallpass_auditor | EXECUTE",
    "routine hallpass.head() | hallpass_service | EXECUTE",
    "routine hallpass.inspect() | hallpass_service | EXECUTE",
    "routine hallpass.load(uuid[], uuid[], boolean) | hallpass_service | EXECUTE",
    "routine hallpass.make_audit_partitions(bigint) | hallpass_service | EXECUTE",
    "routine hallpass.next_members(uuid, uuid, integer) | hallpass_service | EXECUTE",
    "routine hallpass.organization_settings(uuid) | hallpass_service | EXECUTE",
    "routine hallpass.organization_summary(uuid, boolean) | hallpass_service | EXECUTE",
    "routine hallpass.permission_holders(uuid, text, uuid, integer) | hallpass_service | EXECUTE",
    "routine hallpass.preview(jsonb, integer, integer, integer) | hallpass_admin | EXECUTE",
    "routine hallpass.record_api_key_use(text[], double precision[]) | hallpass_service | EXECUTE",
    "routine hallpass.remove_expired(integer, integer) | hallpass_service | EXECUTE",
    "routine hallpass.user_organizations(uuid, uuid[], uuid, integer) | hallpass_service | EXECUTE",
    "routine public.analyze_permission_performance() | hallpass_auditor | EXECUTE",
    "routine public.refresh_permission_materialized_views() | hallpass_service | EXECUTE",
    "schema hallpass | hallpass_admin | USAGE",
    "schema hallpass | hallpass_auditor | USAGE",
    "schema hallpass | hallpass_service | USAGE",
    "table hallpass.api_keys | hallpass_service | SELECT",
    "table hallpass.api_keys_edition | hallpass_service | SELECT",
    "table hallpass.legal_hold | hallpass_auditor | SELECT",
    "table hallpass.legal_hold | hallpass_service | SELECT",
    "table hallpass.log | hallpass_auditor | SELECT",
    "table hallpass.log | hallpass_service | SELECT",
    "table hallpass.log_org | hallpass_auditor | SELECT",
    "table hallpass.log_org | hallpass_service | SELECT",
    "table hallpass.log_removed | hallpass_auditor | SELECT",
    "table hallpass.log_removed | hallpass_service | SELECT",
    "table hallpass.matrix_stamp | hallpass_service | SELECT",
    "table hallpass.schema_migrations | hallpass_auditor | SELECT",
    "table hallpass.schema_migrations | hallpass_service | SELECT",
    "table public.permission_audit_log | hallpass_auditor | SELECT",
    "table public.permission_audit_log | hallpass_service | SELECT",
];

/// What Supabase sets up, and somewhat more: for one schema and for all.
const OPEN_TO_ALL: &str = "
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['anon', 'authenticated', 'service_role'] LOOP
        BEGIN
            EXECUTE 'CREATE ROLE ' || name;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL;
        END;
    END LOOP;
END $$;
GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON SEQUENCES TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO anon, authenticated WITH GRANT OPTION;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO anon, PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON ROUTINES TO anon, authenticated;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO anon, authenticated, PUBLIC";

/// All there is, since nothing else was made in the database: everything of the schemas `public` and `hallpass`, types
/// aside, whose USAGE every PUBLIC has and which opens nothing.
pub(crate) const PRIVILEGES: &str = "
WITH object AS (
    SELECT 'schema ' || nspname AS name, nspowner AS owner, coalesce(nspacl, acldefault('n', nspowner)) AS acl
    FROM pg_namespace WHERE nspname = 'hallpass'
    UNION ALL
    SELECT format('%s %I.%I', CASE relkind WHEN 'S' THEN 'sequence' ELSE 'table' END, nspname, relname), relowner,
           coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::\"char\", relowner))
    FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname IN ('public', 'hallpass') AND relkind NOT IN ('i', 'I', 't', 'c')
    UNION ALL
    SELECT format('column %I.%I.%I', nspname, relname, attname), relowner, attacl
    FROM pg_attribute JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname IN ('public', 'hallpass') AND attacl IS NOT NULL
    UNION ALL
    SELECT format('routine %I.%I(%s)', nspname, proname, oidvectortypes(proargtypes)), proowner, coalesce(proacl, acldefault('f', proowner))
    FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
    WHERE nspname IN ('public', 'hallpass')
)
SELECT name, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(grantee) END, privilege_type
FROM object, aclexplode(acl) WHERE grantee <> owner ORDER BY 1, 2, 3";

const OBJECTS: &str = "
SELECT (SELECT count(*) FROM pg_class WHERE relnamespace = 'hallpass'::regnamespace) > 5
   AND (SELECT count(*) FROM pg_proc WHERE pronamespace = 'hallpass'::regnamespace) > 10";

const MAKE_A_PARTITION: &str = "
DO $$
BEGIN
    EXECUTE 'DROP TABLE ' || (SELECT name FROM hallpass.audit_partitions() ORDER BY begins_at DESC NULLS LAST LIMIT 1);
    CALL hallpass.make_audit_partitions();
    ASSERT (SELECT count(*) FROM hallpass.audit_partitions()) = 4;
END $$";

async fn open_database() -> (Database, Client) {
    // Roles are the cluster's, and two at once would meet.
    static TURN: OnceCell<tokio::sync::Mutex<()>> = OnceCell::const_new();
    let turn = TURN.get_or_init(async || tokio::sync::Mutex::new(())).await;
    let turn = turn.lock().await;
    let database = Database::empty().await;
    let client = database.client().await;
    run(&client, OPEN_TO_ALL).await;
    drop(turn);
    migrate(&database.url.parse().unwrap(), |_| {})
        .await
        .unwrap();
    (database, client)
}

#[tokio::test]
async fn default_privileges_do_not_reach_what_migrate_creates() {
    let (_database, client) = open_database().await;
    assert_eq!(lines(&client, OBJECTS).await, ["t"]);
    // A partition that is made later, when no migration closes it.
    run(&client, MAKE_A_PARTITION).await;
    assert_eq!(lines(&client, PRIVILEGES).await, GRANTED);
    // They do reach what others create: the test would see it.
    run(&client, "CREATE TABLE public.bait (x int)").await;
    assert!(
        lines(&client, PRIVILEGES)
            .await
            .contains(&"table public.bait | anon | SELECT".to_owned())
    );
}

/// The rows say all; a role or an object that is not there is no error, and what took the application's place keeps the
/// application's grants.
#[tokio::test]
async fn privileges_are_those_intended() {
    const RESET: &str = "CALL hallpass.reset_privileges()";
    let database = Database::create().await;
    let client = database.client().await;
    run(
        &client,
        "GRANT EXECUTE ON FUNCTION user_has_permission_in_org TO PUBLIC;
         GRANT EXECUTE ON FUNCTION user_has_org_permission TO PUBLIC;
         UPDATE hallpass.public_object SET keeps_grants = true WHERE name = 'user_has_org_permission';
         INSERT INTO hallpass.intended_privilege VALUES
             ('PUBLIC', 'SELECT', 'TABLE public.user_permission_matrix'),
             ('hallpass_auditor', 'USAGE', 'SEQUENCE hallpass.log_seq'),
             ('hallpass_auditor', 'SELECT', 'TABLE hallpass.later'),
             ('hallpass_auditor', 'EXECUTE', 'ROUTINE hallpass.later(uuid)'),
             ('No such role', 'SELECT', 'TABLE hallpass.log')",
    )
    .await;
    run(&client, RESET).await;
    let kept = "routine public.user_has_org_permission(uuid, character varying) | PUBLIC | EXECUTE";
    let intended = [
        "sequence hallpass.log_seq | hallpass_auditor | USAGE",
        "table public.user_permission_matrix | PUBLIC | SELECT",
    ];
    let with = |more: &[&'static str]| {
        let mut expected = [GRANTED, more].concat();
        expected.sort_unstable();
        expected
    };
    let expected = with(&[kept, intended[0], intended[1]]);
    assert_eq!(lines(&client, PRIVILEGES).await, expected);
    let no_more = "
        DELETE FROM hallpass.intended_privilege WHERE grantee = 'PUBLIC' OR object LIKE 'SEQUENCE %'";
    run(&client, no_more).await;
    run(&client, RESET).await;
    assert_eq!(lines(&client, PRIVILEGES).await, with(&[kept]));
}

/// What the catalogs say, tried.
#[tokio::test]
async fn a_stranger_is_refused() {
    let (_database, client) = open_database().await;
    run(&client, "SET ROLE anon").await;
    for refused in [
        "SELECT FROM profiles",
        "INSERT INTO permission_roles VALUES ('x', 9)",
        "SELECT FROM permission_audit_log",
        "DELETE FROM permission_audit_log",
        "SELECT FROM user_permission_matrix",
        "SELECT FROM effective_user_permissions",
        "SELECT refresh_permission_materialized_views()",
        "SELECT user_has_permission_in_org(NULL, NULL, NULL)",
        "SELECT set_session_variables(NULL)",
        "SELECT hallpass.head()",
        "SELECT cleanup_old_audit_logs()",
        "SELECT * FROM analyze_permission_performance()",
        "CALL hallpass.make_audit_partitions()",
        "SELECT hallpass.remove_expired(1, 1)",
        "INSERT INTO hallpass.legal_hold (placed_by, reason) VALUES ('x', 'y')",
        "SELECT * FROM hallpass.load('{}', '{}', true)",
        "INSERT INTO hallpass.log_pending VALUES (1, '{}')",
        "SELECT nextval('hallpass.log_seq')",
        "CREATE TABLE hallpass.mine (x int)",
    ] {
        let error = client.batch_execute(refused).await.expect_err(refused);
        assert_eq!(sqlstate(&error), "42501", "{refused}");
    }
}

/// Who may write the tables needs no privilege on what records it.
#[tokio::test]
async fn a_writer_of_the_tables_needs_nothing_of_hallpass() {
    let (_database, client) = open_database().await;
    run(
        &client,
        "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON permission_roles TO authenticated; SET ROLE authenticated",
    )
    .await;
    run(
        &client,
        "INSERT INTO permission_roles VALUES ('chair', 9);
         UPDATE permission_roles SET rank = 8 WHERE role_key = 'chair';
         DELETE FROM permission_roles WHERE role_key = 'chair';
         TRUNCATE permission_roles; RESET ROLE",
    )
    .await;
    let recorded = "SELECT change_type, database_role FROM hallpass.log JOIN permission_audit_log USING (entry_id)
                    ORDER BY seq";
    assert_eq!(
        lines(&client, recorded).await,
        [
            "INSERT | authenticated",
            "UPDATE | authenticated",
            "DELETE | authenticated",
            "TRUNCATE | authenticated"
        ]
    );
}

/// A function that runs as its owner must not find what its caller put in its way.
#[tokio::test]
async fn functions_pin_their_search_path() {
    let database = Database::create().await;
    let client = database.client().await;
    let unpinned = "
        SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
        WHERE (nspname = 'hallpass' OR nspname = 'public' AND prosecdef)
          AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)";
    assert_eq!(lines(&client, unpinned).await, [""; 0]);
    let definers = "SELECT count(*) > 5 FROM pg_proc WHERE prosecdef";
    assert_eq!(lines(&client, definers).await, ["t"]);
}
