//! From every earlier version to the present one, on databases that are filled, and what a dry run says of it.

use std::collections::BTreeSet;

use hallpass::store::{
    DedicatedConnection,
    migrations::{MIGRATIONS, SchemaState, migrate, migrate_to, plan, schema_state},
};
use tokio_postgres::Client;

use crate::{
    adopt_cases::PHASE_2,
    database::{Database, Shape, as_role, read_world},
    dump::{assert_same, dump, psql},
    executors::Executor,
    names::Names,
    pto::{ORGANIZATIONS, OWNER, USERS, as_owner, resolve},
    sql::{lines, run, value},
};

const FILL: &str = "
INSERT INTO organizations (id, name) VALUES (:lincoln, 'Lincoln'), (:franklin, 'Franklin'), (:madison, 'Madison');
INSERT INTO profiles (user_id, org_id, role) VALUES
    (:ann, :lincoln, 'admin'), (:bob, :lincoln, 'board_member'), (:vic, :lincoln, 'volunteer'),
    (:pat, :lincoln, 'chair'), (:vic, :franklin, 'admin'), (:dan, :franklin, NULL), (:lou, NULL, 'admin');
INSERT INTO organization_permissions (org_id, permission_key, min_role_required, is_enabled, specific_users) VALUES
    (:lincoln, 'can_view_budget', NULL, NULL, ARRAY[:pat, NULL]::uuid[]),
    (:lincoln, 'can_send_emails', 'volunteer', false, ARRAY[:vic]::uuid[]),
    (:franklin, 'can_view_budget', 'nobody', true, '{}'),
    (:franklin, 'can_fly_kites', 'volunteer', true, NULL);
DELETE FROM organization_permission_templates WHERE module_name IN ('fundraising', 'documents', 'communications', 'events')
    AND permission_key <> 'can_send_emails'";

/// A change that is recorded, from the version on that records.
const CHANGE: &str = "
UPDATE profiles SET role = 'committee_lead' WHERE role = 'board_member';
UPDATE organization_permissions SET specific_users = ARRAY[:bob]::uuid[]
WHERE org_id = :lincoln AND permission_key = 'can_view_budget'";

const ROWS: [&str; 4] = [
    "organizations",
    "profiles",
    "organization_permission_templates",
    "organization_permissions",
];

async fn rows(client: &Client) -> Vec<String> {
    let mut rows = Vec::new();
    for table in ROWS {
        let read = format!("SELECT ctid, xmin, r FROM {table} r ORDER BY ctid");
        rows.extend(lines(client, &read).await);
    }
    rows
}

const AUDITED: &str = "SELECT id, entry_id, n FROM permission_audit_log ORDER BY entry_id, n";

/// Every way to ask SQL says what the tables mean.
async fn decides(client: &Client, shape: Shape) {
    let known = "SELECT permission_key FROM organization_permission_templates
                 UNION SELECT permission_key FROM organization_permissions";
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let known = BTreeSet::from_iter(lines(client, known).await);
    let names = Names::new(set(&ORGANIZATIONS), set(&USERS), known).unwrap();
    let world = read_world(client, shape, &names).await;
    assert!(world.members.len() > 5);
    for executor in Executor::ALWAYS {
        let wrong = executor.disagreements(client, &world, &names).await;
        assert_eq!(wrong, [""; 0]);
    }
    run(client, "SELECT refresh_permission_materialized_views()").await;
    for executor in [Executor::Matrix, Executor::LoadBelieving] {
        let wrong = executor.disagreements(client, &world, &names).await;
        assert_eq!(wrong, [""; 0]);
    }
}

async fn upgrades(database: &Database, owner: &str, version: i32, fill: &str) {
    let client = database.client().await;
    let url = as_role(&database.url, owner).parse().unwrap();
    migrate_to(&url, version, |_| {}).await.unwrap();
    run(&client, &resolve(database.shape, fill)).await;
    run(&client, &resolve(database.shape, CHANGE)).await;
    // The application refreshes what it has at that time, and hallpass what it has.
    if version >= 5 {
        run(&client, "SELECT refresh_permission_materialized_views()").await;
        run(
            &client,
            &resolve(
                database.shape,
                "DELETE FROM profiles WHERE role = 'teacher'",
            ),
        )
        .await;
    }
    let records = version >= 3;
    let audited = if records {
        lines(&client, AUDITED).await
    } else {
        Vec::new()
    };
    assert_eq!(records, !audited.is_empty(), "{version}");
    let before = rows(&client).await;

    migrate(&url, |_| {}).await.unwrap();

    let connection = DedicatedConnection::open(&url, None).await.unwrap();
    assert_eq!(
        schema_state(&connection).await.unwrap(),
        SchemaState::Current
    );
    assert_same(&before, &rows(&client).await, &format!("from {version}"));
    assert_eq!(lines(&client, AUDITED).await, audited, "from {version}");
    decides(&client, database.shape).await;
    // And it records.
    let change =
        "UPDATE profiles SET role = 'volunteer' WHERE role = 'admin' AND org_id = :lincoln";
    run(&client, &resolve(database.shape, change)).await;
    let more = lines(&client, AUDITED).await.len();
    assert_eq!(more, audited.len() + 1, "from {version}");
}

#[tokio::test]
async fn from_every_version_of_our_own_tables() {
    for migration in &MIGRATIONS[..MIGRATIONS.len() - 1] {
        let database = Database::empty().await;
        upgrades(&database, "hallpass", migration.version, FILL).await;
    }
}

#[tokio::test]
async fn from_every_version_on_the_applications_tables() {
    for migration in &MIGRATIONS[..MIGRATIONS.len() - 1] {
        let database = PHASE_2.found().await;
        upgrades(&database, OWNER, migration.version, "").await;
    }
}

/// Names that are given at random, and when each was applied.
async fn schema(client: &Client, database: &Database) -> Vec<String> {
    let mut schema = dump(client, &as_owner(&database.url), &["--schema-only"]).await;
    let recorded =
        "SELECT version, name, checksum FROM hallpass.schema_migrations ORDER BY version";
    schema.extend(lines(client, recorded).await);
    schema
}

#[tokio::test]
async fn a_dry_run_prints_what_migrate_does() {
    for pto in [None, Some(PHASE_2)] {
        // The first one makes the roles.
        drop(PHASE_2.found().await);
        let make = async || match pto {
            None => Database::copy("template0", OWNER, Shape::A).await,
            Some(pto) => pto.found().await,
        };
        let (migrated, scripted) = (make().await, make().await);
        let (m, s) = (migrated.client().await, scripted.client().await);
        let before = dump(&s, &as_owner(&scripted.url), &[]).await;
        let script = plan(&as_owner(&scripted.url).parse().unwrap())
            .await
            .unwrap();
        assert_same(
            &before,
            &dump(&s, &as_owner(&scripted.url), &[]).await,
            "planned",
        );
        let mut rest = script.as_str();
        for migration in MIGRATIONS {
            let heading = format!("\n-- {}\n", migration.name);
            let (_, after) = rest.split_once(&heading).expect(migration.name);
            rest = after;
        }

        assert_eq!(
            psql(&as_owner(&scripted.url), &script).await,
            (0, String::new())
        );
        migrate(&as_owner(&migrated.url).parse().unwrap(), |_| {})
            .await
            .unwrap();
        let (migrated, scripted) = (schema(&m, &migrated).await, schema(&s, &scripted).await);
        assert_same(&migrated, &scripted, &format!("{pto:?}"));
    }
}

/// What comes after a failure counts on what failed.
#[tokio::test]
async fn a_script_stops_where_it_fails() {
    let database = PHASE_2.found().await;
    let client = database.client().await;
    let script = plan(&as_owner(&database.url).parse().unwrap())
        .await
        .unwrap();
    let mut holder = database.client().await;
    let transaction = holder.transaction().await.unwrap();
    transaction
        .batch_execute("LOCK TABLE profiles IN ROW EXCLUSIVE MODE")
        .await
        .unwrap();
    let (code, error) = psql(&as_owner(&database.url), &script).await;
    assert_eq!(code, 3, "{error}");
    assert!(error.contains("lock timeout"), "{error}");
    let applied = "SELECT array_agg(version ORDER BY version) FROM hallpass.schema_migrations";
    assert_eq!(value(&client, applied).await, "{1,2}");
    transaction.rollback().await.unwrap();
    let url = as_owner(&database.url).parse().unwrap();
    let script = plan(&url).await.unwrap();
    assert_eq!(
        psql(&as_owner(&database.url), &script).await,
        (0, String::new())
    );
    migrate(&url, |p| panic!("{p:?}")).await.unwrap();
}
