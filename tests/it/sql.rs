//! Reading PostgreSQL as text, and waiting for what it shows: what the tests of the SQL have in common.

use tokio_postgres::{Client, Error, SimpleQueryMessage, SimpleQueryRow};

use crate::database::eventually;

/// Runs statements and returns the rows of all of them as lines, columns separated by ` | `, NULL as `-`.
pub(crate) async fn lines(client: &Client, sql: &str) -> Vec<String> {
    let messages = client
        .simple_query(sql)
        .await
        .unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
    messages
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(line(row)),
            _ => None,
        })
        .collect()
}

fn line(row: &SimpleQueryRow) -> String {
    let values: Vec<_> = (0..row.len())
        .map(|column| row.get(column).unwrap_or("-"))
        .collect();
    values.join(" | ")
}

/// The one value of a query that returns one row of one column.
pub(crate) async fn value(client: &Client, sql: &str) -> String {
    let mut lines = lines(client, sql).await;
    assert_eq!(lines.len(), 1, "{sql}");
    lines.remove(0)
}

/// Runs statements that must succeed.
pub(crate) async fn run(client: &Client, sql: &str) {
    client
        .batch_execute(sql)
        .await
        .unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
}

/// The SQLSTATE of a failure; panics where PostgreSQL did not say one.
pub(crate) fn sqlstate(error: &Error) -> &str {
    error.code().unwrap_or_else(|| panic!("{error:?}")).code()
}

/// Waits until a query of one boolean is true.
pub(crate) async fn wait_until(client: &Client, condition: &str) {
    eventually(condition, async || value(client, condition).await == "t").await;
}

/// Waits until the session `pid` waits for a lock that the session `holder` has.
pub(crate) async fn wait_until_blocked(client: &Client, pid: i32, holder: i32) {
    wait_until(
        client,
        &format!("SELECT {holder} = ANY (pg_blocking_pids({pid}))"),
    )
    .await;
}

/// The process id of a session.
pub(crate) async fn pid(client: &Client) -> i32 {
    value(client, "SELECT pg_backend_pid()")
        .await
        .parse()
        .unwrap()
}
