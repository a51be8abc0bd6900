//! What `hallpass doctor` asks the database: one question a subject, each answered with the problems there and what mends
//! them.
//!
//! Invariant: it only reads (the session is read only), and a question that cannot be asked is a problem of its own.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::{Client, Row};

use super::{
    CONNECTIONS_MAX, DatabaseUrl, DedicatedConnection, StoreError,
    load::refuse_standby,
    log::{Cursor, LogReader, NOTIFY, read_head},
    migrations::{MIGRATIONS, RUNS_WHAT_IT_SELECTS, SchemaState, first_column, schema_state},
    upkeep::HIDDEN_FROM_US,
};

/// How long the database may work on one question: all members are read once, and nobody waits.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a notification may take from one connection to another: some milliseconds, as a rule.
const NOTIFICATION_WAIT_MAX: Duration = Duration::from_secs(3);

const FEED_REMEDY: &str = "let --feed-database-url lead to the primary of the same database directly, not through a pooler in transaction mode";

/// The versions of PostgreSQL that hallpass is tested on.
const SERVER_VERSIONS: std::ops::RangeInclusive<i32> = 14..=18;

const LOOK_ONLY: &str = "SET default_transaction_read_only = on";

const WHERE_WE_ARE: &str = "
SELECT pg_is_in_recovery(), current_user::text, current_database()::text,
       coalesce((SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl), 'no TLS'),
       current_setting('server_version'), current_setting('server_version_num')::integer / 10000";

const DIAGNOSE: &str = "SELECT status, problem, remedy FROM hallpass.diagnose($1, current_user)";

/// Indexes of hallpass's own tables and views, as the migrations make them.
const OWN_INDEXES: &str = "
SELECT 'failed', format('index %s is %s', name, CASE WHEN i.indexrelid IS NULL THEN 'missing' ELSE 'invalid' END),
       CASE WHEN i.indexrelid IS NULL THEN '' ELSE format('DROP INDEX %s.%s; ', schema, name) END
       || format('CREATE %s %s ON %s', kind, name, shape)
FROM (VALUES ('hallpass', 'log_entry', 'INDEX', 'hallpass.log (entry_id)'),
             ('hallpass', 'log_committed_at', 'INDEX', 'hallpass.log (committed_at, seq)'),
             ('hallpass', 'log_pending_xid', 'INDEX', 'hallpass.log_pending (xid)'),
             ('public', 'user_permission_matrix_key', 'UNIQUE INDEX',
              'public.user_permission_matrix (org_id, user_id, permission_key)'),
             ('public', 'org_permission_summary_key', 'UNIQUE INDEX', 'public.org_permission_summary (org_id)'),
             ('public', 'permission_audit_log_time', 'INDEX', 'public.permission_audit_log (created_at, entry_id, n)'),
             ('public', 'permission_audit_log_organization', 'INDEX',
              'public.permission_audit_log (org_id, created_at, entry_id, n)'),
             ('public', 'permission_audit_log_affected_user', 'INDEX',
              'public.permission_audit_log (affected_user_id, created_at, entry_id, n)'),
             ('public', 'permission_audit_log_actor', 'INDEX',
              'public.permission_audit_log (changed_by, created_at, entry_id, n)'),
             ('public', 'permission_audit_log_permission', 'INDEX',
              'public.permission_audit_log (permission_key, created_at, entry_id, n)')) wanted (schema, name, kind, shape)
LEFT JOIN pg_index i ON i.indexrelid = to_regclass(format('%I.%I', schema, name))
WHERE i.indisvalid IS NOT TRUE";

/// What the server is set to, for $1 connections of one service.
const SETTINGS: &str = "
SELECT status, problem, remedy
FROM (SELECT current_setting('max_connections')::integer - current_setting('superuser_reserved_connections')::integer AS given,
             (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user) AS allowed,
             (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS is_superuser) login,
     LATERAL (VALUES
    (given < $1, 'failed', format('max_connections leaves %s connections, and one service opens up to %s', given, $1),
     format('ALTER SYSTEM SET max_connections = %s, and restart the server', given + $1)),
    (given >= $1 AND given < 2 * $1, 'warning',
     format('max_connections leaves %s connections: enough for one service of up to %s, not for two', given, $1),
     format('ALTER SYSTEM SET max_connections = %s, and restart the server', given + $1)),
    (allowed < $1, 'failed', format('%s may open %s connections, and one service opens up to %s', current_user, allowed, $1),
     format('ALTER ROLE %I CONNECTION LIMIT %s', current_user, 2 * $1)),
    (current_setting('fsync') = 'off', 'warning', 'fsync is off: a crash may lose the database',
     'ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf()'),
    (current_setting('full_page_writes') = 'off', 'warning', 'full_page_writes is off: a crash may damage the database',
     'ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf()'),
    (current_setting('synchronous_commit') = 'off', 'warning',
     'synchronous_commit is off: a crash takes back changes whose positions were given out',
     'ALTER SYSTEM SET synchronous_commit = on; SELECT pg_reload_conf()'),
    (current_setting('track_activities') = 'off', 'warning', 'track_activities is off: nobody sees who holds a lock',
     'ALTER SYSTEM SET track_activities = on; SELECT pg_reload_conf()'),
    (NOT is_superuser AND current_setting('idle_in_transaction_session_timeout') = '0', 'warning',
     format('%s has no idle_in_transaction_session_timeout: a transaction that is left open keeps its locks', current_user),
     format('ALTER ROLE %I SET idle_in_transaction_session_timeout = %L', current_user, '1min'))
) rules (is_so, status, problem, remedy)
WHERE is_so";

/// Such a transaction keeps dead rows, and whoever builds an index or alters a table waits for it. Without
/// pg_read_all_stats, the transactions of this login's own role alone.
const OLD_TRANSACTIONS: &str = "
SELECT 'warning', format('transaction of %s (process %s) is open for %s', usename, pid,
                         date_trunc('second', clock_timestamp() - xact_start)),
       format('end it, or SELECT pg_terminate_backend(%s)', pid)
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - interval '10 minutes'
ORDER BY xact_start LIMIT 3";

/// Most often a privilege is not there, even to be told which.
const UNASKED_REMEDY: &str = "psql -X -f deploy/sql/roles.sql, as an administrator, grants what is intended; otherwise see the server's log";

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Hallpass does not work because of it, or not rightly; otherwise it may come to that.
    pub is_failure: bool,
    pub what: String,
    /// What to do, in order: SQL for the owner or an administrator, or a command.
    pub remedy: Vec<String>,
}

/// What was looked at, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub subject: &'static str,
    /// What is said where there is no problem.
    pub well: String,
    pub problems: Vec<Problem>,
}

/// Where the answer to a subject comes from.
enum Question {
    /// A topic of `hallpass.diagnose()`.
    Topic(&'static str),
    ApplicationIndexes,
    Hidden,
    /// Rows as of `hallpass.diagnose()`.
    Rows(&'static str),
    Settings,
}

/// What is looked at once the schema is there: the subject, what it is when all is well, and the question.
const QUESTIONS: &[(&str, &str, Question)] = &[
    (
        "privileges",
        "this login and hallpass's roles may do what they need",
        Question::Topic("privileges"),
    ),
    (
        "objects",
        "every function, table and view is there",
        Question::Topic("objects"),
    ),
    (
        "recording",
        "every trigger is ENABLE ALWAYS, and no row-level security is in the way",
        Question::Topic("recording"),
    ),
    (
        "feed",
        "no row-level security hides the log from this login",
        Question::Hidden,
    ),
    ("sequence", "ahead of the log", Question::Topic("sequence")),
    (
        "indexes",
        "those on the application's tables are there and valid",
        Question::ApplicationIndexes,
    ),
    (
        "own indexes",
        "those of hallpass's tables and views are there and valid",
        Question::Rows(OWN_INDEXES),
    ),
    (
        "partitions",
        "the audit log has this month's, the next two and DEFAULT",
        Question::Topic("partitions"),
    ),
    (
        "matrix",
        "refreshed lately, and believed",
        Question::Topic("matrix"),
    ),
    (
        "data",
        "there is a catalog, and every role in use is on the ladder",
        Question::Topic("data"),
    ),
    ("settings", "as hallpass needs them", Question::Settings),
    (
        "transactions",
        "none is open for 10 minutes, of those this login may see",
        Question::Rows(OLD_TRANSACTIONS),
    ),
    (
        "performance",
        "analyze_permission_performance() has nothing to say",
        Question::Topic("performance"),
    ),
];

/// Looks at the database as this URL's login sees it, and whether the feed's own way leads there, where it has one.
///
/// # Errors
/// When it cannot be reached, will not have us, or is a standby.
pub async fn examine(
    url: &DatabaseUrl,
    feed: Option<&DatabaseUrl>,
) -> Result<Vec<Finding>, StoreError> {
    let connection = DedicatedConnection::open(url, Some(QUESTION_TIMEOUT)).await?;
    let client = &connection.client;
    client.batch_execute(LOOK_ONLY).await?;
    let mut findings = Vec::with_capacity(QUESTIONS.len() + 3);
    let place = client.query_one(WHERE_WE_ARE, &[]).await?;
    refuse_standby(&place, 0)?;
    findings.extend(server(&place)?);
    let schema = schema(&connection).await;
    let is_usable = schema.problems.iter().all(|p| !p.is_failure);
    findings.push(schema);
    if is_usable {
        for (subject, well, question) in QUESTIONS {
            let problems = ask(client, question)
                .await
                .unwrap_or_else(|error| vec![unasked(&error)]);
            findings.push(Finding {
                subject,
                well: (*well).to_owned(),
                problems,
            });
        }
        if let Some(feed) = feed {
            let problem = feed_problem(client, feed).await;
            let problem = problem.unwrap_or_else(|error| Some(format!("cannot be used: {error}")));
            findings.push(Finding {
                subject: "feed's way",
                well: "to the same log, and it hears of changes".to_owned(),
                problems: Vec::from_iter(problem.map(|what| Problem {
                    is_failure: true,
                    what,
                    remedy: vec![FEED_REMEDY.to_owned()],
                })),
            });
        }
    }
    Ok(findings)
}

/// What keeps the feed from following the log over its own way. Whoever follows the log is woken once, and finds nothing.
async fn feed_problem(client: &Client, feed: &DatabaseUrl) -> Result<Option<String>, StoreError> {
    let reader = LogReader::open(feed).await?;
    let head = read_head(client).await?;
    let page = reader.page(Cursor::after(head), &[head], 1).await?;
    if !page.history_holds {
        let what =
            format!("leads to another log, without {head}, which is in that of --database-url");
        return Ok(Some(what));
    }
    client.batch_execute(NOTIFY).await?;
    if timeout(NOTIFICATION_WAIT_MAX, reader.notified())
        .await
        .is_err()
    {
        return Ok(Some(
            "hears of no change: changes would be found by asking alone".to_owned(),
        ));
    }
    // That its connection has ended is notified, too.
    reader.head().await.map(|_| None)
}

fn server(place: &Row) -> Result<[Finding; 2], StoreError> {
    let (login, database): (&str, &str) = (place.try_get(1)?, place.try_get(2)?);
    let (tls, version): (&str, &str) = (place.try_get(3)?, place.try_get(4)?);
    let is_tested = SERVER_VERSIONS.contains(&place.try_get(5)?);
    let untested = Problem {
        is_failure: true,
        what: format!("PostgreSQL {version}, which hallpass is not tested on"),
        remedy: vec![format!(
            "use PostgreSQL {} to {}",
            SERVER_VERSIONS.start(),
            SERVER_VERSIONS.end()
        )],
    };
    Ok([
        Finding {
            subject: "connection",
            well: format!("as {login} to {database}, {tls}"),
            problems: Vec::new(),
        },
        Finding {
            subject: "server",
            well: format!("PostgreSQL {version}, the primary"),
            problems: if is_tested {
                Vec::new()
            } else {
                vec![untested]
            },
        },
    ])
}

async fn schema(connection: &DedicatedConnection) -> Finding {
    let problem = |is_failure, what, remedy: &str| Problem {
        is_failure,
        what,
        remedy: vec![remedy.to_owned()],
    };
    let problems = match schema_state(connection).await {
        Ok(SchemaState::Current) => Vec::new(),
        Ok(SchemaState::Behind(names)) => vec![problem(
            true,
            format!("behind this program: {} to apply", names.join(", ")),
            "hallpass migrate",
        )],
        Ok(SchemaState::Ahead(version)) => vec![problem(
            false,
            format!("at version {version}, newer than this program"),
            "install the hallpass that migrated it",
        )],
        Ok(SchemaState::Changed(names)) => vec![problem(
            true,
            format!("{} differ from this program's", names.join(", ")),
            "install the hallpass that migrated it: `hallpass --version` there",
        )],
        Err(error) => vec![unasked(&error)],
    };
    Finding {
        subject: "schema",
        well: "every migration of this program is applied, unchanged".to_owned(),
        problems,
    }
}

async fn ask(client: &Client, question: &Question) -> Result<Vec<Problem>, StoreError> {
    let rows = match question {
        Question::Topic(topic) => client.query(DIAGNOSE, &[topic]).await?,
        Question::Rows(query) => client.query(*query, &[]).await?,
        Question::Settings => {
            let needed = i32::try_from(CONNECTIONS_MAX).unwrap_or(i32::MAX);
            client.query(SETTINGS, &[&needed]).await?
        }
        Question::Hidden => {
            let hidden = client.query(HIDDEN_FROM_US, &[]).await?;
            return hidden
                .iter()
                .map(|row| {
                    let target: &str = row.try_get(1)?;
                    Ok(Problem {
                        is_failure: true,
                        what: row.try_get(0)?,
                        remedy: vec![format!("ALTER TABLE {target} DISABLE ROW LEVEL SECURITY")],
                    })
                })
                .collect();
        }
        Question::ApplicationIndexes => {
            let statements = index_statements(client).await?;
            return Ok(missing_indexes(&statements));
        }
    };
    rows.iter()
        .map(|row| {
            Ok(Problem {
                is_failure: row.try_get::<_, &str>(0)? == "failed",
                what: row.try_get(1)?,
                remedy: row.try_get::<_, Option<String>>(2)?.into_iter().collect(),
            })
        })
        .collect()
}

/// What would build the indexes on the application's tables that are missing or invalid: the migration's own selection.
async fn index_statements(client: &Client) -> Result<Vec<String>, StoreError> {
    let mut statements = Vec::new();
    for migration in MIGRATIONS {
        if migration.sql.starts_with(RUNS_WHAT_IT_SELECTS) {
            statements.extend(first_column(client, migration.sql).await?);
        }
    }
    Ok(statements)
}

/// All are mended by the same statements, in this order.
fn missing_indexes(statements: &[String]) -> Vec<Problem> {
    let built = statements
        .iter()
        .filter(|s| s.starts_with("CREATE"))
        .count();
    if built == 0 {
        return Vec::new();
    }
    vec![Problem {
        is_failure: true,
        what: format!("{built} on the application's tables are missing or invalid"),
        remedy: statements.to_vec(),
    }]
}

fn unasked(error: &StoreError) -> Problem {
    Problem {
        is_failure: true,
        what: format!("cannot be looked at: {error}"),
        remedy: vec![UNASKED_REMEDY.to_owned()],
    }
}
