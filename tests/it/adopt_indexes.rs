//! The indexes that hallpass adds to the application's tables: built beside its writers, once, and where none serves.

use hallpass::store::migrations::{MIGRATIONS, MigrateError, migrate, migrate_to};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::{
    adopt_cases::{PHASE_1, PHASE_2},
    database::Shape,
    names::id,
    pto::{Phase, Pto, adopt, as_owner, resolve},
    sql::{lines, run, sqlstate, value, wait_until},
};

/// Of the names that hallpass makes indexes under, on the application's tables.
const OURS: &str = "
SELECT c.relname, indisvalid, regexp_replace(pg_get_indexdef(indexrelid), '.* USING btree ', '')
FROM pg_index JOIN pg_class c ON c.oid = indexrelid
WHERE c.relname ~ '^hallpass_' AND indrelid::regclass::text !~ '^hallpass'
   OR c.relname IN ('idx_profiles_user_org', 'idx_profiles_org_role') ORDER BY 1";

const CATALOG_KEY: &str = "hallpass_catalog_key | t | (permission_key)";
const MEMBERS_KEY: &str = "hallpass_members_key | t | (org_id, user_id)";
const ORG_ROLE: &str = "idx_profiles_org_role | t | (org_id, role, user_id)";
const USER_ORG: &str = "idx_profiles_user_org | t | (user_id, org_id) INCLUDE (role)";
const ALL: [&str; 4] = [CATALOG_KEY, MEMBERS_KEY, ORG_ROLE, USER_ORG];

const DUPLICATE: &str =
    "INSERT INTO profiles (user_id, org_id, role) VALUES (:vic, :lincoln, 'teacher')";
const MEND: &str = "DELETE FROM profiles WHERE user_id = :vic AND role = 'teacher'";

async fn ours(client: &Client) -> Vec<String> {
    lines(client, OURS).await
}

/// The application's own unique constraints serve, and its indexes that have the columns, and more of them included.
#[tokio::test]
async fn none_is_built_twice() {
    let in_phase_2 =
        "idx_profiles_user_org | t | (user_id, org_id) INCLUDE (role, first_name, last_name)";
    let client = PHASE_1.adopted().await.client().await;
    assert_eq!(ours(&client).await, ALL);
    let client = PHASE_2.adopted().await.client().await;
    let expected = [CATALOG_KEY, MEMBERS_KEY, ORG_ROLE, in_phase_2];
    assert_eq!(ours(&client).await, expected);
    let client = Pto::new(Shape::B, Phase::Two)
        .adopted()
        .await
        .client()
        .await;
    let in_shape_b = [MEMBERS_KEY, ORG_ROLE, USER_ORG].map(|line| line.replace("user_id", "id"));
    assert_eq!(ours(&client).await, in_shape_b);

    let database = PHASE_2.found().await;
    let client = database.client().await;
    run(
        &client,
        "ALTER TABLE profiles ADD UNIQUE (org_id, user_id);
         CREATE UNIQUE INDEX of_any_sort ON organization_permission_templates (permission_key DESC)",
    )
    .await;
    let before = ours(&client).await;
    adopt(&database.url).await;
    assert_eq!(ours(&client).await, before);
}

/// INVALID, as a build leaves them that failed; of our name on other columns, or not unique.
#[tokio::test]
async fn what_does_not_serve_is_built_anew() {
    let database = PHASE_1.found().await;
    let client = database.client().await;
    run(&client, &resolve(Shape::A, DUPLICATE)).await;
    let fails =
        "CREATE UNIQUE INDEX CONCURRENTLY hallpass_members_key ON profiles (org_id, user_id)";
    let error = client.batch_execute(fails).await.unwrap_err();
    assert_eq!(sqlstate(&error), "23505");
    assert_eq!(ours(&client).await, [MEMBERS_KEY.replace("| t |", "| f |")]);
    run(&client, &resolve(Shape::A, MEND)).await;
    run(
        &client,
        "CREATE INDEX idx_profiles_user_org ON profiles (user_id, org_id);
         CREATE INDEX idx_profiles_org_role ON profiles (org_id, role, user_id) WHERE role = 'admin';
         CREATE INDEX hallpass_catalog_key ON organization_permission_templates (permission_key)",
    )
    .await;
    adopt(&database.url).await;
    assert_eq!(ours(&client).await, ALL);
}

/// The survey saw none, and the application makes one while the tables are being taken.
#[tokio::test]
async fn a_duplicate_of_the_last_minute_is_named_and_can_be_mended() {
    let database = PHASE_1.found().await;
    let client = database.client().await;
    let url = as_owner(&database.url).parse().unwrap();
    migrate_to(&url, 9, |_| {}).await.unwrap();
    run(&client, &resolve(Shape::A, DUPLICATE)).await;
    let refused = migrate(&url, |_| {}).await.unwrap_err();
    assert!(matches!(
        refused,
        MigrateError::Failed {
            name: "0010_indexes",
            ..
        }
    ));
    assert_eq!(
        refused.to_string(),
        format!(
            "0010_indexes fails: could not create unique index \"hallpass_members_key\". \
             Key (org_id, user_id)=({}, {}) is duplicated.",
            id("lincoln"),
            id("vic")
        )
    );
    let applied = "SELECT count(*) FROM hallpass.schema_migrations";
    assert_eq!(value(&client, applied).await, "9");
    // What the application does goes on and is recorded.
    let change = "UPDATE profiles SET role = 'board_member' WHERE user_id = :cam";
    run(&client, &resolve(Shape::A, change)).await;
    run(&client, &resolve(Shape::A, MEND)).await;
    let recorded = "SELECT array_agg(change_type ORDER BY entry_id) FROM permission_audit_log";
    assert_eq!(value(&client, recorded).await, "{INSERT,UPDATE,DELETE}");
    adopt(&database.url).await;
    assert_eq!(ours(&client).await, ALL);
}

/// Whoever waits for the first to migrate must not hold a snapshot, for which its index would wait.
#[tokio::test]
async fn migrators_at_once_do_not_wait_for_each_other_in_a_ring() {
    let database = PHASE_1.found().await;
    let client = database.client().await;
    let mut old = database.client().await;
    let transaction = old
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .start()
        .await
        .unwrap();
    transaction.batch_execute("SELECT 1").await.unwrap();
    let mut migrators = JoinSet::new();
    for _ in 0..3 {
        let url = as_owner(&database.url).parse().unwrap();
        migrators.spawn(async move { migrate(&url, |_| {}).await });
    }
    wait_until(
        &client,
        "SELECT count(*) FILTER (WHERE query ILIKE 'CREATE%INDEX CONCURRENTLY%' AND wait_event = 'virtualxid') = 1
            AND count(*) FILTER (WHERE query ILIKE '%pg_try_advisory_lock%') = 2
         FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    .await;
    transaction.rollback().await.unwrap();
    for migrated in migrators.join_all().await {
        migrated.unwrap();
    }
    assert_eq!(ours(&client).await, ALL);
    let applied = "SELECT count(*) FROM hallpass.schema_migrations";
    assert_eq!(value(&client, applied).await, MIGRATIONS.len().to_string());
}
