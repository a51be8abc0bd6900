//! Takes hallpass off a database: the application's tables and the audit rows stay, what was replaced comes back.
//!
//! Invariant: it is refused before anything is changed, and whatever it is cut short in is finished by the next one. What
//! takes long is done where nobody waits for it.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use super::{
    DatabaseUrl, StoreError,
    migrations::{
        LOCK_POLL, MIGRATIONS, MigrateError, Progress, SESSION, first_column, is_true, lock,
        missing, open, run, run_with_locks, transaction,
    },
};

const UNINSTALL: &str = include_str!("uninstall.sql");
const REMOVE: &str = include_str!("remove.sql");
const DEPENDENTS: &str = include_str!("dependents.sql");
const UNDO_FIRST: &str = "SELECT statement FROM hallpass.undo WHERE step = 'FIRST' ORDER BY n DESC";
const UNDO_LAST: &str = "SELECT statement FROM hallpass.undo WHERE step = 'LAST' ORDER BY n DESC";
const UNINSTALLING: &str = "uninstalling";

/// Whether an earlier uninstall came no further than to bring back what was replaced.
const IS_LEFT_OVER: &str = "
SELECT to_regclass('hallpass.schema_migrations') IS NULL AND to_regclass('hallpass.undo') IS NOT NULL";

/// Guarded: an installation that came to no end has no such table.
const HAS_HOLD: &str = "
SELECT to_regclass('hallpass.legal_hold') IS NOT NULL
   AND query_to_xml('SELECT FROM hallpass.legal_hold WHERE lifted_at IS NULL', false, false, '')::text LIKE '%<row>%'";

/// Those of this database; pg_locks shows everybody's to everybody.
const RUNNING_TRANSACTIONS: &str = "
SELECT virtualxid FROM pg_locks JOIN pg_stat_activity a USING (pid)
WHERE locktype = 'virtualxid' AND granted AND pid <> pg_backend_pid() AND datname = current_database()";

/// How long an uninstall waits for the transactions that began before it.
const OUTLAST_MAX: Duration = Duration::from_secs(10);

/// Takes hallpass off the database: the application's tables and the audit rows stay, what was replaced comes back.
///
/// # Errors
/// When it is not there, something else depends on it (then nothing is changed), or the database is away.
pub async fn uninstall(
    url: &DatabaseUrl,
    mut progress: impl FnMut(Progress),
) -> Result<(), MigrateError> {
    let connection = open(url).await?;
    let client = &connection.client;
    lock(client).await?;
    let is_left_over = is_true(client, IS_LEFT_OVER).await?;
    if !is_left_over && missing(&connection).await?.len() == MIGRATIONS.len() {
        return Err(MigrateError::NotInstalled);
    }
    if !is_left_over && is_true(client, HAS_HOLD).await? {
        return Err(MigrateError::Held);
    }
    let dependents = first_column(client, DEPENDENTS).await?;
    if !dependents.is_empty() {
        return Err(MigrateError::Used(dependents));
    }
    if !is_left_over {
        let first = first_column(client, UNDO_FIRST).await?;
        // By the search path that the application's names are found by.
        run(client, UNINSTALLING, "RESET search_path").await?;
        for statement in first {
            run(client, UNINSTALLING, &statement).await?;
        }
        run(client, UNINSTALLING, SESSION).await?;
        let script = transaction(&[UNINSTALL]);
        run_with_locks(client, UNINSTALLING, &script, &mut progress).await?;
        outlast_transactions(client).await?;
    }
    for statement in first_column(client, UNDO_LAST).await? {
        run(client, UNINSTALLING, &statement).await?;
    }
    let script = transaction(&[REMOVE, &drop_schema()]);
    run_with_locks(client, UNINSTALLING, &script, &mut progress).await
}

/// CASCADE, for the schema is hallpass's alone; what came to depend on it since the last look is not.
fn drop_schema() -> String {
    format!(
        "
DO $$
BEGIN
    IF EXISTS ({DEPENDENTS}) THEN
        RAISE EXCEPTION 'something has just come to depend on hallpass' USING HINT = 'Try again to see what.';
    END IF;
END $$;
DROP SCHEMA hallpass CASCADE;
"
    )
}

/// Waits until the transactions are over that may be calling what was replaced a moment ago. Not for ever: what calls it
/// for long holds locks on the tables, and was waited for already.
async fn outlast_transactions(client: &Client) -> Result<(), StoreError> {
    let deadline = Instant::now() + OUTLAST_MAX;
    let running: Vec<String> = first_column(client, RUNNING_TRANSACTIONS).await?;
    loop {
        let still_running = first_column(client, RUNNING_TRANSACTIONS).await?;
        let is_over = running.iter().all(|id| !still_running.contains(id));
        if is_over || Instant::now() > deadline {
            return Ok(());
        }
        sleep(LOCK_POLL).await;
    }
}
