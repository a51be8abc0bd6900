//! The indexes that hallpass adds to the application's tables: built beside its writers, once, and where none serves.

use hallpass::store::migrations::{MIGRATIONS, MigrateError, migrate, migrate_to};
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::{
    adopt_cases::{PHASE_1, PHASE_2},
    database::Shape,
    names::id,
    pto::{Phase, Pto, adopt, resolve},
    sql::{lines, run, sqlstate, value, wait_until},
};

const OURS: &str = "
SELECT indexrelid::regclass, indisvalid, pg_get_indexdef(indexrelid) FROM pg_index
WHERE indexrelid::regclass::text LIKE 'hallpass\\_%' AND indrelid::regclass::text !~ '^hallpass' ORDER BY 1";

const MEMBERS_KEY: &str = "hallpass_members_key | t | \
    CREATE UNIQUE INDEX hallpass_members_key ON public.profiles USING btree (org_id, user_id)";
const CATALOG_KEY: &str = "hallpass_catalog_key | t | \
    CREATE UNIQUE INDEX hallpass_catalog_key ON public.organization_permission_templates USING btree (permission_key)";
const USER_ORG: &str = "hallpass_profiles_user_org | t | \
    CREATE INDEX hallpass_profiles_user_org ON public.profiles USING btree (user_id, org_id)";

const DUPLICATE: &str =
    "INSERT INTO profiles (user_id, org_id, role) VALUES (:vic, :lincoln, 'teacher')";
const MEND: &str = "DELETE FROM profiles WHERE user_id = :vic AND role = 'teacher'";

async fn ours(client: &Client) -> Vec<String> {
    let mut ours = lines(client, OURS).await;
    ours.sort();
    ours
}

/// The application's own unique constraints serve, and its (user_id, org_id) with more columns included.
#[tokio::test]
async fn none_is_built_twice() {
    let in_shape_b = MEMBERS_KEY.replace("user_id", "id");
    for (pto, expected) in [
        (PHASE_1, vec![CATALOG_KEY, MEMBERS_KEY, USER_ORG]),
        (PHASE_2, vec![CATALOG_KEY, MEMBERS_KEY]),
        (Pto::new(Shape::B, Phase::Two), vec![in_shape_b.as_str()]),
    ] {
        let client = pto.adopted().await.client().await;
        assert_eq!(ours(&client).await, expected, "{pto:?}");
    }
    let own = "ALTER TABLE profiles ADD UNIQUE (org_id, user_id);
               CREATE UNIQUE INDEX of_any_sort ON organization_permission_templates (permission_key DESC)";
    let database = PHASE_2.found().await;
    let client = database.client().await;
    run(&client, own).await;
    adopt(&database.url).await;
    assert_eq!(ours(&client).await, [""; 0]);
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
        "CREATE INDEX hallpass_profiles_user_org ON profiles (role);
         CREATE INDEX hallpass_catalog_key ON organization_permission_templates (permission_key);
         ALTER INDEX hallpass_profiles_user_org OWNER TO pto_owner",
    )
    .await;
    adopt(&database.url).await;
    assert_eq!(ours(&client).await, [CATALOG_KEY, MEMBERS_KEY, USER_ORG]);
}

/// The survey saw none, and the application makes one while the tables are being taken.
#[tokio::test]
async fn a_duplicate_of_the_last_minute_is_named_and_can_be_mended() {
    let database = PHASE_1.found().await;
    let client = database.client().await;
    let url = database.url.parse().unwrap();
    migrate_to(&url, 9, |_| {}).await.unwrap();
    run(&client, &resolve(Shape::A, DUPLICATE)).await;
    let refused = migrate(&url, |p| panic!("{p:?}")).await.unwrap_err();
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
    assert_eq!(ours(&client).await, [CATALOG_KEY, MEMBERS_KEY, USER_ORG]);
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
        let url = database.url.parse().unwrap();
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
    assert_eq!(ours(&client).await, [CATALOG_KEY, MEMBERS_KEY, USER_ORG]);
    let applied = "SELECT count(*) FROM hallpass.schema_migrations";
    assert_eq!(value(&client, applied).await, MIGRATIONS.len().to_string());
}
