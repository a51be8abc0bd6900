//! The schema: the files of `migrations/`, compiled in, applied in order and recorded with their checksums.
//!
//! Invariant: one process at a time migrates a database, and a file that was applied never changes.

use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use super::{DatabaseUrl, DedicatedConnection, StoreError};

/// One file of `migrations/`.
pub struct Migration {
    pub version: i32,
    pub name: &'static str,
    sql: &'static str,
}

macro_rules! migrations {
    ($($version:literal $name:literal),* $(,)?) => {
        &[$(Migration {
            version: $version,
            name: $name,
            sql: include_str!(concat!("../../migrations/", $name, ".sql")),
        }),*]
    };
}

/// All migrations, in order.
pub const MIGRATIONS: &[Migration] = migrations![
    1 "0001_tables",
    2 "0002_log",
    3 "0003_record_changes",
    4 "0004_decisions",
    5 "0005_functions",
    6 "0006_inspect",
    7 "0007_lists",
    8 "0008_retention",
    9 "0009_analysis",
];

/// A file whose first line is this runs outside a transaction, statement by statement; each ends its line with `;`.
const NO_TRANSACTION: &str = "-- hallpass: no transaction";

/// How long to wait for another process that is migrating. Polled: a session blocked in `pg_advisory_lock` would
/// deadlock with a CREATE INDEX CONCURRENTLY of the one that holds it.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(300);
const LOCK_POLL: Duration = Duration::from_millis(200);

impl Migration {
    fn checksum(&self) -> String {
        blake3::hash(self.sql.as_bytes()).to_hex().to_string()
    }
}

/// How the database's schema stands to this program's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SchemaState {
    Current,
    /// These are not applied yet.
    Behind(Vec<&'static str>),
    /// A later program has migrated it, up to this version.
    Ahead(i32),
    /// These were applied from files with another content.
    Changed(Vec<&'static str>),
}

/// Why a database was not migrated.
#[derive(Debug, Error)]
pub enum MigrateError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the schema is at version {0}, newer than this program knows: use a newer hallpass")]
    Ahead(i32),
    #[error("applied migrations differ from this program's: {}", .0.join(", "))]
    Changed(Vec<&'static str>),
    #[error("another process has been migrating this database for {LOCK_WAIT_MAX:?}")]
    Locked,
    #[error("migration {name} fails: {source}")]
    Failed {
        name: &'static str,
        source: StoreError,
    },
}

const READ_APPLIED: &str =
    "SELECT version, checksum FROM hallpass.schema_migrations ORDER BY version";

const IS_INSTALLED: &str = "SELECT to_regclass('hallpass.schema_migrations') IS NOT NULL";

const INSTALL: &str = "
CREATE SCHEMA IF NOT EXISTS hallpass;
CREATE TABLE IF NOT EXISTS hallpass.schema_migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)";

const RECORD: &str =
    "INSERT INTO hallpass.schema_migrations (version, name, checksum) VALUES ($1, $2, $3)";

const TRY_LOCK: &str = "SELECT pg_try_advisory_lock(1751215212, 1)";

/// Compares the database's schema with this program's.
///
/// # Errors
/// When the database cannot be asked.
pub async fn schema_state(connection: &DedicatedConnection) -> Result<SchemaState, StoreError> {
    let client = &connection.client;
    if !client.query_one(IS_INSTALLED, &[]).await?.get::<_, bool>(0) {
        return Ok(SchemaState::Behind(
            MIGRATIONS.iter().map(|m| m.name).collect(),
        ));
    }
    let applied: Vec<(i32, String)> = client
        .query(READ_APPLIED, &[])
        .await?
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    Ok(compare(&applied))
}

fn compare(applied: &[(i32, String)]) -> SchemaState {
    let recorded = |migration: &Migration| {
        applied
            .iter()
            .find(|(version, _)| *version == migration.version)
    };
    let changed: Vec<_> = MIGRATIONS
        .iter()
        .filter(|m| recorded(m).is_some_and(|(_, checksum)| *checksum != m.checksum()))
        .map(|m| m.name)
        .collect();
    let missing: Vec<_> = MIGRATIONS
        .iter()
        .filter(|m| recorded(m).is_none())
        .map(|m| m.name)
        .collect();
    let newest = applied.last().map_or(0, |(version, _)| *version);
    if !changed.is_empty() {
        SchemaState::Changed(changed)
    } else if newest > MIGRATIONS.last().map_or(0, |m| m.version) {
        SchemaState::Ahead(newest)
    } else if missing.is_empty() {
        SchemaState::Current
    } else {
        SchemaState::Behind(missing)
    }
}

/// Brings the database's schema up to this program's; `applied` is told of each migration as it is done.
///
/// # Errors
/// When a migration fails (the ones before it stay), the schema is not this program's, or the database is away.
pub async fn migrate(
    url: &DatabaseUrl,
    mut applied: impl FnMut(&'static str),
) -> Result<(), MigrateError> {
    let connection = DedicatedConnection::open(url, None).await?;
    lock(&connection.client).await?;
    let missing = match schema_state(&connection).await? {
        SchemaState::Current => return Ok(()),
        SchemaState::Ahead(version) => return Err(MigrateError::Ahead(version)),
        SchemaState::Changed(names) => return Err(MigrateError::Changed(names)),
        SchemaState::Behind(missing) => missing,
    };
    for migration in MIGRATIONS.iter().filter(|m| missing.contains(&m.name)) {
        apply(&connection.client, migration)
            .await
            .map_err(|error| MigrateError::Failed {
                name: migration.name,
                source: error.into(),
            })?;
        applied(migration.name);
    }
    Ok(())
}

/// The lock goes with the connection.
async fn lock(client: &Client) -> Result<(), MigrateError> {
    let deadline = Instant::now() + LOCK_WAIT_MAX;
    while Instant::now() < deadline {
        let row = client
            .query_one(TRY_LOCK, &[])
            .await
            .map_err(StoreError::from)?;
        if row.get(0) {
            return Ok(());
        }
        sleep(LOCK_POLL).await;
    }
    Err(MigrateError::Locked)
}

async fn apply(client: &Client, migration: &Migration) -> Result<(), tokio_postgres::Error> {
    let in_transaction = !migration.sql.starts_with(NO_TRANSACTION);
    // Every name in a migration is qualified; nothing is found, or made, by the login's search path.
    client.batch_execute("SET search_path = pg_catalog").await?;
    if in_transaction {
        client.batch_execute("BEGIN").await?;
    }
    let done = async {
        // With the first migration, which grants a look at it: a service that waits finds no schema, or one that it
        // may read.
        if migration.version == 1 {
            client.batch_execute(INSTALL).await?;
        }
        if in_transaction {
            client.batch_execute(migration.sql).await?;
        } else {
            // PostgreSQL wraps a batch in a transaction of its own: such a file goes one statement at a time.
            for statement in migration.sql.split(";\n") {
                client.batch_execute(statement).await?;
            }
        }
        client
            .execute(
                RECORD,
                &[&migration.version, &migration.name, &migration.checksum()],
            )
            .await
    }
    .await;
    if in_transaction {
        client
            .batch_execute(if done.is_ok() { "COMMIT" } else { "ROLLBACK" })
            .await?;
    }
    done.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(count: usize) -> Vec<(i32, String)> {
        MIGRATIONS
            .iter()
            .take(count)
            .map(|m| (m.version, m.checksum()))
            .collect()
    }

    #[test]
    fn versions_count_up_from_one_and_names_start_with_them() {
        for (index, migration) in MIGRATIONS.iter().enumerate() {
            assert_eq!(usize::try_from(migration.version).unwrap(), index + 1);
            assert!(
                migration
                    .name
                    .starts_with(&format!("{:04}_", migration.version))
            );
        }
    }

    #[test]
    fn state_is_told_from_what_was_applied() {
        let all = MIGRATIONS.len();
        assert_eq!(compare(&applied(all)), SchemaState::Current);
        assert_eq!(
            compare(&applied(all - 1)),
            SchemaState::Behind(vec![MIGRATIONS[all - 1].name])
        );
        let mut newer = applied(all);
        newer.push((1000, String::new()));
        assert_eq!(compare(&newer), SchemaState::Ahead(1000));
        let mut changed = applied(all);
        changed[0].1.push('x');
        assert_eq!(
            compare(&changed),
            SchemaState::Changed(vec![MIGRATIONS[0].name])
        );
    }
}
