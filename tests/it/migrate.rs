//! From an empty database to the current schema, and every way that must not go on.

use std::sync::{Arc, Mutex};

use hallpass::store::{
    DatabaseUrl, DedicatedConnection,
    migrations::{MIGRATIONS, MigrateError, Progress, SchemaState, migrate, schema_state},
};
use tokio::task::JoinSet;

use crate::{
    database::Database,
    sql::{lines, run, value},
};

const APPLIED: &str = "SELECT name FROM hallpass.schema_migrations ORDER BY version";

/// What was made in a database, and every migration's time.
pub(crate) const WHOLE_SCHEMA: &str = "
SELECT format('%s %s', oid, relname) FROM pg_class
WHERE relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('public', 'hallpass'))
UNION ALL SELECT format('%s %s', oid, proname) FROM pg_proc
WHERE pronamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN ('public', 'hallpass'))
UNION ALL SELECT format('%s %s', name, applied_at) FROM hallpass.schema_migrations
ORDER BY 1";

fn names() -> Vec<&'static str> {
    MIGRATIONS.iter().map(|migration| migration.name).collect()
}

/// What was applied, of all that is told.
fn applied_name(progress: Progress) -> Option<&'static str> {
    match progress {
        Progress::Applied(name) => Some(name),
        Progress::Note(_) | Progress::Building(_) | Progress::Waiting(_) => None,
    }
}

async fn state(url: &DatabaseUrl) -> SchemaState {
    let connection = DedicatedConnection::open(url, None).await.unwrap();
    schema_state(&connection).await.unwrap()
}

#[tokio::test]
async fn from_nothing_to_current_and_no_further() {
    let database = Database::empty().await;
    let url: DatabaseUrl = database.url.parse().unwrap();
    let client = database.client().await;
    assert_eq!(state(&url).await, SchemaState::Behind(names()));
    let nothing = "SELECT count(*) FROM pg_namespace WHERE nspname = 'hallpass'";
    assert_eq!(
        value(&client, nothing).await,
        "0",
        "looking at the state makes nothing"
    );

    let mut applied = Vec::new();
    migrate(&url, |p| applied.extend(applied_name(p)))
        .await
        .unwrap();
    assert_eq!(applied, names());
    assert_eq!(lines(&client, APPLIED).await, names());
    assert_eq!(state(&url).await, SchemaState::Current);
    let schema = lines(&client, WHOLE_SCHEMA).await;

    migrate(&url, |p| panic!("{p:?} again")).await.unwrap();
    assert_eq!(lines(&client, WHOLE_SCHEMA).await, schema);
}

#[tokio::test]
async fn migrators_at_once_apply_each_migration_once() {
    const MIGRATORS: usize = 8;
    let database = Database::empty().await;
    let applied = Arc::new(Mutex::new(Vec::new()));
    let mut migrators = JoinSet::new();
    for _ in 0..MIGRATORS {
        let url: DatabaseUrl = database.url.parse().unwrap();
        let applied = applied.clone();
        migrators.spawn(async move {
            migrate(&url, |p| applied.lock().unwrap().extend(applied_name(p))).await
        });
    }
    for migrated in migrators.join_all().await {
        migrated.unwrap();
    }
    assert_eq!(*applied.lock().unwrap(), names());
    assert_eq!(lines(&database.client().await, APPLIED).await, names());
}

struct Refused {
    name: &'static str,
    /// Done to a migrated database.
    tampering: &'static str,
    state: SchemaState,
    message: &'static str,
}

#[tokio::test]
async fn another_programs_schema_is_refused_and_left_alone() {
    let refused = [
        Refused {
            name: "a migration that was applied from another file",
            tampering: "UPDATE hallpass.schema_migrations SET checksum = md5('x') WHERE version = 2",
            state: SchemaState::Changed(vec!["0002_log"]),
            message: "applied migrations differ from this program's: 0002_log",
        },
        Refused {
            name: "two of them, and one that is missing",
            tampering:
                "UPDATE hallpass.schema_migrations SET checksum = '' WHERE version IN (1, 3);
                        DELETE FROM hallpass.schema_migrations WHERE version = 4",
            state: SchemaState::Changed(vec!["0001_tables", "0003_record_changes"]),
            message: "applied migrations differ from this program's: 0001_tables, 0003_record_changes",
        },
        Refused {
            name: "a later program's",
            tampering: "INSERT INTO hallpass.schema_migrations VALUES (9000, '9000_later', 'x')",
            state: SchemaState::Ahead(9000),
            message: "the schema is at version 9000, newer than this program knows: use a newer hallpass",
        },
        Refused {
            name: "a later program's that is not whole",
            tampering: "DELETE FROM hallpass.schema_migrations WHERE version = 3;
                        INSERT INTO hallpass.schema_migrations VALUES (9000, '9000_later', 'x')",
            state: SchemaState::Ahead(9000),
            message: "the schema is at version 9000, newer than this program knows: use a newer hallpass",
        },
    ];
    for case in refused {
        let database = Database::create().await;
        let url: DatabaseUrl = database.url.parse().unwrap();
        let client = database.client().await;
        run(&client, case.tampering).await;
        let schema = lines(&client, WHOLE_SCHEMA).await;
        assert_eq!(state(&url).await, case.state, "{}", case.name);
        let error = migrate(&url, |p| panic!("{p:?}")).await.unwrap_err();
        assert_eq!(error.to_string(), case.message, "{}", case.name);
        assert_eq!(lines(&client, WHOLE_SCHEMA).await, schema, "{}", case.name);
    }
}

/// A schema that is hallpass's, with nothing in it yet.
const BEGUN: &str = "
CREATE SCHEMA hallpass;
CREATE TABLE hallpass.schema_migrations (
    version integer PRIMARY KEY, name text NOT NULL, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now()
)";

/// Each migration in turn fails on something that is in its way: the ones before it stay, of itself there is nothing,
/// and once the way is free the rest is applied.
#[tokio::test]
async fn a_failing_migration_leaves_the_ones_before_it_and_nothing_of_itself() {
    for (in_the_way, free, failing, cause) in [
        (
            "VIEW hallpass.members AS SELECT 1",
            "VIEW hallpass.members",
            0,
            "relation \"members\" already exists",
        ),
        (
            "TABLE hallpass.log_org ()",
            "TABLE hallpass.log_org",
            1,
            "relation \"log_org\" already exists",
        ),
        (
            "TABLE hallpass.matrix_stamp ()",
            "TABLE hallpass.matrix_stamp",
            3,
            "relation \"matrix_stamp\" already exists",
        ),
        (
            "FUNCTION hallpass.only_organization(uuid) RETURNS uuid LANGUAGE sql AS 'SELECT $1'",
            "FUNCTION hallpass.only_organization(uuid)",
            4,
            "function \"only_organization\" already exists with same argument types",
        ),
    ] {
        let database = Database::empty().await;
        let url: DatabaseUrl = database.url.parse().unwrap();
        let client = database.client().await;
        run(&client, &format!("{BEGUN}; CREATE {in_the_way}")).await;
        let mut applied = Vec::new();
        let error = migrate(&url, |p| applied.extend(applied_name(p)))
            .await
            .unwrap_err();
        let name = names()[failing];
        let message = format!("{name} fails: {cause}");
        assert_eq!(error.to_string(), message);
        assert!(matches!(error, MigrateError::Failed { name: failed, .. } if failed == name));

        assert_eq!(applied, names()[..failing]);
        assert_eq!(
            state(&url).await,
            SchemaState::Behind(names()[failing..].to_vec())
        );

        run(&client, &format!("DROP {free}")).await;
        let mut applied = Vec::new();
        migrate(&url, |p| applied.extend(applied_name(p)))
            .await
            .unwrap();
        assert_eq!(applied, names()[failing..], "{name} had left something");
    }
}

/// Whoever has created the objects is who migrates; a login's search path leads nothing astray.
#[tokio::test]
async fn the_search_path_of_a_login_is_not_followed() {
    let database = Database::empty().await;
    let client = database.client().await;
    let name = value(&client, "SELECT current_database()").await;
    run(
        &client,
        &format!("CREATE SCHEMA astray; ALTER DATABASE {name} SET search_path = astray, public"),
    )
    .await;
    migrate(&database.url.parse().unwrap(), |_| {})
        .await
        .unwrap();
    let astray = "SELECT count(*) FROM pg_class WHERE relnamespace = 'astray'::regnamespace";
    assert_eq!(value(&client, astray).await, "0");
}
