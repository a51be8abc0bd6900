//! The schema: the files of `migrations/`, compiled in, applied in order and recorded with their checksums.
//!
//! Invariant: one process at a time migrates a database, a file that was applied never changes, and nobody who uses the
//! database waits for us longer than a lock takes that we ask for briefly.

use std::time::Duration;

use thiserror::Error;
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, error::SqlState};

use super::{
    DatabaseUrl, DedicatedConnection, StoreError,
    adoption::{self, Survey},
    describe,
};

pub use super::uninstall::uninstall;

/// One file of `migrations/`.
pub struct Migration {
    pub version: i32,
    pub name: &'static str,
    pub(super) sql: &'static str,
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
    10 "0010_indexes",
    11 "0011_api_keys",
    12 "0012_audit",
    13 "0013_admin",
    14 "0014_doctor",
];

/// A file whose first line is this is a query, and the statements that it selects are what is run: each by itself and
/// outside a transaction, as CREATE INDEX CONCURRENTLY must be.
pub(super) const RUNS_WHAT_IT_SELECTS: &str =
    "-- hallpass: runs the statements that this query selects, each by itself";

/// How long a migration waits for one lock on a table that the application uses: those who come after it wait as long.
/// Several are asked for in a row, and all of that stays below half a second, and below PostgreSQL's deadlock_timeout.
const LOCK_TIMEOUT: Duration = Duration::from_millis(100);

/// How long a migration keeps trying to get its locks, and how long it leaves the application alone in between.
const TRIES_MAX: u32 = 300;
const TRY_INTERVAL: Duration = Duration::from_millis(500);

/// How long to wait for another process that is migrating. Polled: a session blocked in `pg_advisory_lock` would
/// deadlock with a CREATE INDEX CONCURRENTLY of the one that holds it.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(300);
pub(super) const LOCK_POLL: Duration = Duration::from_millis(200);

impl Migration {
    fn checksum(&self) -> String {
        blake3::hash(self.sql.as_bytes()).to_hex().to_string()
    }

    /// The first also makes the schema, which it opens to the service: one that waits finds none, or one it may look at.
    fn transaction(&self) -> String {
        let install = if self.version == 1 { INSTALL } else { "" };
        transaction(&[install, self.sql, "\n", &self.record()])
    }

    fn record(&self) -> String {
        format!(
            "INSERT INTO hallpass.schema_migrations (version, name, checksum) VALUES ({}, '{}', '{}');\n",
            self.version,
            self.name,
            self.checksum()
        )
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
    #[error("hallpass cannot be put on this database, and nothing was changed:\n- {}", .0.join("\n- "))]
    Blocked(Vec<String>),
    #[error(
        "a legal hold is in force, which would go with schema hallpass: set lifted_at in hallpass.legal_hold first"
    )]
    Held,
    #[error("hallpass is not on this database")]
    NotInstalled,
    #[error("hallpass cannot be taken off this database, and nothing was changed: drop or change what uses it\n- {}", .0.join("\n- "))]
    Used(Vec<String>),
    #[error(
        "{name} did not get its locks in {TRIES_MAX} tries: see in pg_stat_activity who holds them ({cause})"
    )]
    InUse { name: &'static str, cause: String },
    #[error("{name} fails: {cause}")]
    Failed { name: &'static str, cause: String },
}

const READ_APPLIED: &str =
    "SELECT version, checksum FROM hallpass.schema_migrations ORDER BY version";

const IS_INSTALLED: &str = "SELECT to_regclass('hallpass.schema_migrations') IS NOT NULL";

/// Every name of ours is qualified; nothing is found, or made, by the login's search path, where others may have made
/// functions of PostgreSQL's names. Filling a view or an index takes as long as it takes.
pub(super) const SESSION: &str = "SET search_path = pg_catalog, pg_temp; SET client_min_messages = warning; SET statement_timeout = 0;\n";

const INSTALL: &str = "
CREATE SCHEMA IF NOT EXISTS hallpass;
CREATE TABLE IF NOT EXISTS hallpass.schema_migrations (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
";

const TRY_LOCK: &str = "SELECT pg_try_advisory_lock(1751215212, 1)";

/// Compares the database's schema with this program's.
///
/// # Errors
/// When the database cannot be asked.
pub async fn schema_state(connection: &DedicatedConnection) -> Result<SchemaState, StoreError> {
    let client = &connection.client;
    if !is_true(client, IS_INSTALLED).await? {
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

/// What `migrate` and `uninstall` tell while they work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Of a database that hallpass is put on for the first time: what will change.
    Note(String),
    Applied(&'static str),
    /// An index is built or dropped CONCURRENTLY, which waits for every transaction that began before it.
    Building(String),
    /// Somebody holds a lock that is needed; it is tried again.
    Waiting(&'static str),
}

/// Brings the database's schema up to this program's. One that hallpass was not on before is surveyed first.
///
/// # Errors
/// When something stands against it (then nothing is changed), a migration fails (the ones before it stay), the schema is
/// not this program's, or the database is away.
pub async fn migrate(
    url: &DatabaseUrl,
    progress: impl FnMut(Progress),
) -> Result<(), MigrateError> {
    migrate_to(url, i32::MAX, progress).await
}

/// As [`migrate`], up to a version and no further: how tests make the databases of earlier programs.
///
/// # Errors
/// As [`migrate`].
pub async fn migrate_to(
    url: &DatabaseUrl,
    version: i32,
    mut progress: impl FnMut(Progress),
) -> Result<(), MigrateError> {
    let connection = open(url).await?;
    let client = &connection.client;
    lock(client).await?;
    let missing = missing(&connection).await?;
    if missing.len() == MIGRATIONS.len() {
        let Survey { blockers, notes } = adoption::survey(client).await?;
        if !blockers.is_empty() {
            return Err(MigrateError::Blocked(blockers));
        }
        notes.into_iter().for_each(|n| progress(Progress::Note(n)));
    }
    for migration in missing.into_iter().filter(|m| m.version <= version) {
        let name = migration.name;
        if migration.sql.starts_with(RUNS_WHAT_IT_SELECTS) {
            for statement in first_column(client, migration.sql).await? {
                if statement.contains("CONCURRENTLY") && !statement.starts_with("INSERT") {
                    progress(Progress::Building(statement.clone()));
                }
                run(client, name, &statement).await?;
            }
            run(client, name, &migration.record()).await?;
        } else {
            run_with_locks(client, name, &migration.transaction(), &mut progress).await?;
        }
        progress(Progress::Applied(name));
    }
    Ok(())
}

/// What [`migrate`] would do, as a script for psql that says what it does; changes nothing.
///
/// # Errors
/// When the schema is not this program's, or the database is away.
pub async fn plan(url: &DatabaseUrl) -> Result<String, MigrateError> {
    let connection = open(url).await?;
    let client = &connection.client;
    let missing = missing(&connection).await?;
    // What comes after a failure counts on what failed.
    let mut script = String::from(
        "-- What `hallpass migrate` would run on this database.\n\\set ON_ERROR_STOP on\n",
    );
    if missing.len() == MIGRATIONS.len() {
        let Survey { blockers, notes } = adoption::survey(client).await?;
        for (what, lines) in [("NOT BEFORE THIS IS MENDED", blockers), ("note", notes)] {
            for line in lines {
                script.push_str(&format!("-- {what}: {line}\n"));
            }
        }
    }
    script.push_str(&format!("\n{SESSION}"));
    for migration in missing {
        script.push_str(&format!("\n-- {}\n\n", migration.name));
        if migration.sql.starts_with(RUNS_WHAT_IT_SELECTS) {
            for statement in first_column(client, migration.sql).await? {
                script.push_str(&format!("{statement};\n"));
            }
            script.push_str(&migration.record());
        } else {
            script.push_str(&migration.transaction());
        }
    }
    Ok(script)
}

/// A connection on which nothing is found that others have made.
pub(super) async fn open(url: &DatabaseUrl) -> Result<DedicatedConnection, MigrateError> {
    let connection = DedicatedConnection::open(url, None).await?;
    run(&connection.client, "the first step", SESSION).await?;
    Ok(connection)
}

pub(super) async fn missing(
    connection: &DedicatedConnection,
) -> Result<Vec<&'static Migration>, MigrateError> {
    match schema_state(connection).await? {
        SchemaState::Current => Ok(Vec::new()),
        SchemaState::Ahead(version) => Err(MigrateError::Ahead(version)),
        SchemaState::Changed(names) => Err(MigrateError::Changed(names)),
        SchemaState::Behind(names) => {
            let missing = MIGRATIONS.iter().filter(|m| names.contains(&m.name));
            Ok(missing.collect())
        }
    }
}

pub(super) async fn is_true(client: &Client, query: &str) -> Result<bool, StoreError> {
    Ok(client.query_one(query, &[]).await?.try_get(0)?)
}

pub(super) async fn first_column(client: &Client, query: &str) -> Result<Vec<String>, StoreError> {
    let rows = client.query(query, &[]).await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

pub(super) fn transaction(parts: &[&str]) -> String {
    let lock_timeout = LOCK_TIMEOUT.as_millis();
    format!(
        "BEGIN;\nSET LOCAL lock_timeout = '{lock_timeout}ms';\n\n{}COMMIT;\n",
        parts.concat()
    )
}

pub(super) async fn run(
    client: &Client,
    name: &'static str,
    sql: &str,
) -> Result<(), MigrateError> {
    client.batch_execute(sql).await.map_err(|error| {
        let cause = in_full(&error);
        MigrateError::Failed { name, cause }
    })
}

/// All that PostgreSQL says: which row is in the way, what depends on what.
fn in_full(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else {
        return describe(error);
    };
    let parts = [Some(db.message()), db.detail(), db.hint()];
    let said: Vec<&str> = parts.into_iter().flatten().collect();
    said.join(". ").replace('\n', "; ")
}

/// Runs a transaction that needs locks on the application's tables, again and again until it gets them.
pub(super) async fn run_with_locks(
    client: &Client,
    name: &'static str,
    script: &str,
    progress: &mut impl FnMut(Progress),
) -> Result<(), MigrateError> {
    for tries in 1.. {
        let Err(error) = client.batch_execute(script).await else {
            break;
        };
        let in_use = [
            SqlState::LOCK_NOT_AVAILABLE,
            SqlState::T_R_DEADLOCK_DETECTED,
        ];
        let is_in_use = error.code().is_some_and(|code| in_use.contains(code));
        let cause = in_full(&error);
        // Fails only where the connection is gone, and the transaction with it.
        client.batch_execute("ROLLBACK").await.unwrap_or_default();
        if !is_in_use {
            return Err(MigrateError::Failed { name, cause });
        }
        if tries == TRIES_MAX {
            return Err(MigrateError::InUse { name, cause });
        }
        if tries == 1 {
            progress(Progress::Waiting(name));
        }
        sleep(TRY_INTERVAL).await;
    }
    Ok(())
}

/// The lock goes with the connection.
pub(super) async fn lock(client: &Client) -> Result<(), MigrateError> {
    let deadline = Instant::now() + LOCK_WAIT_MAX;
    while Instant::now() < deadline {
        if is_true(client, TRY_LOCK).await? {
            return Ok(());
        }
        sleep(LOCK_POLL).await;
    }
    Err(MigrateError::Locked)
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
