//! The audit log's months: made ahead, and taken away when they are old, while everybody goes on.

use std::{
    num::NonZeroU16,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use hallpass::store::log::READ_PAGE;
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::{
    database::{Database, eventually},
    server::{APPROVE, Server, config, fill, resolve, set_role},
    sql::{lines, pid, run, sqlstate, value, wait_until_blocked},
};

const MAKE: &str = "CALL hallpass.make_audit_partitions()";

/// The months that have a partition, as months from this one.
const MONTHS: &str = "
SELECT round(extract(epoch FROM begins_at - date_trunc('month', now(), 'UTC')) / 86400 / 30.4)
FROM hallpass.audit_partitions() WHERE NOT is_default ORDER BY begins_at";

/// Each audit row's entry and where it is.
const PLACES: &str =
    "SELECT entry_id, tableoid::regclass FROM permission_audit_log ORDER BY entry_id";

const ROWS_IN_DEFAULT: &str = "SELECT count(*) FROM hallpass.permission_audit_log_default";

/// No monthly partition, as before this was made, or after nobody had run the service for long.
const DROP_MONTHS: &str = "
DO $$ BEGIN
    EXECUTE (SELECT 'DROP TABLE ' || string_agg(name::text, ', ')
             FROM hallpass.audit_partitions() WHERE NOT is_default);
END $$";

/// An audit row from another time, which only the owner can write; a month is the owner's, as
/// `hallpass.make_audit_partitions` makes it.
const PAST: &str = "
CREATE FUNCTION past_row(entry bigint, org uuid, at timestamptz) RETURNS void LANGUAGE sql AS $$
    INSERT INTO permission_audit_log (entry_id, n, org_id, created_at, table_name, change_type, actor_source,
                                      database_role, database_login)
    VALUES (entry, 1, org, at, 'profiles', 'UPDATE', 'NONE', 'x', 'x')
$$;
CREATE FUNCTION past(entry bigint, org uuid, days integer) RETURNS void LANGUAGE sql AS $$
    SELECT past_row(entry, org, now() - make_interval(days => days));
    INSERT INTO hallpass.log VALUES (entry, 1, entry, '1', now() - make_interval(days => days),
                                     now() - make_interval(days => days));
    INSERT INTO hallpass.log_org VALUES (org, entry)
$$;
CREATE PROCEDURE past_month(days integer) LANGUAGE plpgsql SET role = 'hallpass_owner' AS $$
DECLARE
    month timestamptz := date_trunc('month', now() - make_interval(days => days), 'UTC');
BEGIN
    EXECUTE format('CREATE TABLE hallpass.%I PARTITION OF permission_audit_log FOR VALUES FROM (%L) TO (%L)',
                   'permission_audit_log_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM'), month,
                   (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC');
END $$";

/// Everything that is in the log happened 400 days earlier.
const BACKDATE: &str = "
BEGIN;
UPDATE hallpass.log SET created_at = created_at - interval '400 days', committed_at = committed_at - interval '400 days';
UPDATE permission_audit_log SET created_at = created_at - interval '400 days';
COMMIT";

async fn create() -> (Database, Client) {
    let database = Database::create().await;
    let client = database.client().await;
    run(&client, PAST).await;
    (database, client)
}

/// The number in the sentence that a cleanup by hand returns.
fn number_removed(said: &str, days: u32) -> u64 {
    let rest = format!(" of the audit log's rows at a retention of {days} days.");
    let number = said
        .strip_prefix("Removed ")
        .and_then(|said| said.strip_suffix(&rest));
    number.unwrap_or_else(|| panic!("{said}")).parse().unwrap()
}

async fn removed_by_hand(client: &Client, days: u32) -> u64 {
    let said = value(client, &format!("SELECT cleanup_old_audit_logs({days})")).await;
    number_removed(&said, days)
}

#[tokio::test]
async fn a_row_lands_in_the_partition_of_its_month() {
    let (_database, client) = create().await;
    assert_eq!(lines(&client, MONTHS).await, ["0", "1", "2"]);
    run(
        &client,
        "SET timezone = 'Pacific/Auckland';
         SELECT past_row(1, NULL, m) FROM date_trunc('month', now(), 'UTC') m;
         SELECT past_row(2, NULL, m - interval '1 microsecond') FROM date_trunc('month', now(), 'UTC') m;
         SELECT past_row(3, NULL, now() - interval '2 years');
         SELECT past_row(4, NULL, now() + interval '10 months');
         INSERT INTO permission_roles VALUES ('chair', 9);
         UPDATE permission_audit_log SET entry_id = 5 WHERE table_name = 'permission_roles'",
    )
    .await;
    let this_month = value(
        &client,
        "SELECT 'permission_audit_log_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')",
    )
    .await;
    let default = "permission_audit_log_default";
    assert_eq!(
        lines(&client, PLACES).await,
        [
            format!("1 | {this_month}"),
            format!("2 | {default}"),
            format!("3 | {default}"),
            format!("4 | {default}"),
            format!("5 | {this_month}"),
        ]
    );
    // Nothing to do; and in whatever time zone and date style, the same months are found again.
    run(&client, "SET datestyle = 'German'").await;
    run(&client, MAKE).await;
    assert_eq!(lines(&client, MONTHS).await, ["0", "1", "2"]);
    // The parent's index, and the defaults.
    let made_alike = "
        SELECT DISTINCT (SELECT count(*) FROM pg_index WHERE indrelid = name),
               (SELECT count(*) FROM pg_attrdef WHERE adrelid = name),
               (SELECT count(*) FROM pg_attribute WHERE attrelid = name AND attnotnull AND attnum > 0)
        FROM hallpass.audit_partitions()";
    assert_eq!(lines(&client, made_alike).await.len(), 1);
}

#[tokio::test]
async fn a_month_that_began_in_default_stays_there() {
    let (_database, client) = create().await;
    run(&client, DROP_MONTHS).await;
    run(&client, "INSERT INTO permission_roles VALUES ('chair', 9)").await;
    run(&client, MAKE).await;
    assert_eq!(lines(&client, MONTHS).await, ["1", "2"]);
    run(
        &client,
        "DELETE FROM permission_roles WHERE role_key = 'chair'",
    )
    .await;
    assert_eq!(value(&client, ROWS_IN_DEFAULT).await, "2");

    // A large DEFAULT is not scanned under a lock, unless somebody says so.
    run(&client, DROP_MONTHS).await;
    run(&client, "CALL hallpass.make_audit_partitions(8191)").await;
    assert_eq!(lines(&client, MONTHS).await, [""; 0]);
    run(&client, "CALL hallpass.make_audit_partitions(8192)").await;
    assert_eq!(lines(&client, MONTHS).await, ["1", "2"]);

    run(&client, "DELETE FROM hallpass.permission_audit_log_default").await;
    run(&client, MAKE).await;
    assert_eq!(lines(&client, MONTHS).await, ["0", "1", "2"]);
}

/// A writer who is under way may have chosen DEFAULT for its row already.
#[tokio::test]
async fn this_months_partition_waits_for_writers_but_not_long() {
    let (database, client) = create().await;
    run(&client, DROP_MONTHS).await;
    let writer = database.client().await;
    run(
        &writer,
        "BEGIN; INSERT INTO permission_roles VALUES ('chair', 9)",
    )
    .await;
    let started = Instant::now();
    let error = client.batch_execute(MAKE).await.unwrap_err();
    assert_eq!(sqlstate(&error), "55P03");
    assert!(started.elapsed() < Duration::from_secs(1));
    run(
        &writer,
        "INSERT INTO permission_roles VALUES ('vice chair', 8); COMMIT",
    )
    .await;
    assert_eq!(value(&client, ROWS_IN_DEFAULT).await, "2");
    run(&client, MAKE).await;
    assert_eq!(lines(&client, MONTHS).await, ["1", "2"]);
}

/// One who waits for DEFAULT would fail if DEFAULT no longer took this month's rows by the time it is free.
#[tokio::test]
async fn no_writer_loses_default_while_it_waits_for_it() {
    let (database, client) = create().await;
    run(&client, DROP_MONTHS).await;
    let writer = database.client().await;
    let (holder, waiter) = (pid(&client).await, pid(&writer).await);
    run(
        &client,
        "BEGIN; LOCK TABLE hallpass.permission_audit_log_default IN ACCESS EXCLUSIVE MODE",
    )
    .await;
    let written = tokio::spawn(async move {
        run(&writer, "INSERT INTO permission_roles VALUES ('chair', 9)").await;
    });
    let watcher = database.client().await;
    wait_until_blocked(&watcher, waiter, holder).await;
    let error = client.batch_execute(MAKE).await.unwrap_err();
    assert_eq!(sqlstate(&error), "55P03");
    run(&client, "ROLLBACK").await;
    written.await.unwrap();
    assert_eq!(value(&client, ROWS_IN_DEFAULT).await, "1");
}

#[tokio::test]
async fn cleanup_removes_what_is_older_and_keeps_what_others_stand_on() {
    const LOG: &str = "SELECT string_agg(seq::text, ' ' ORDER BY seq) FROM hallpass.log";
    const LOG_ORG: &str = "
        SELECT string_agg(left(org_id::text, 1) || seq, ' ' ORDER BY seq) FROM hallpass.log_org";
    const ROWS: &str = "
        SELECT string_agg(entry_id::text, ' ' ORDER BY entry_id) FROM permission_audit_log";
    let (_database, client) = create().await;
    run(&client, "CALL past_month(500); CALL past_month(366)").await;
    for (entry, organization, days) in [
        (1, 'a', 500),
        (2, 'b', 500),
        (3, '0', 450), // the nil UUID's
        (4, 'a', 420),
        (5, 'a', 400),
        (6, 'b', 100),
        (7, 'c', 50),
        (8, 'a', 0),
    ] {
        let organization = format!("{}", organization).repeat(8);
        let past =
            format!("SELECT past({entry}, '{organization}-0000-0000-0000-000000000000', {days})");
        run(&client, &past).await;
    }
    // In a month that is not over for as long as 365 days: it goes as a whole or not at all.
    run(
        &client,
        "SELECT past_row(9, NULL, now() - interval '366 days')",
    )
    .await;
    let month_is_whole = value(
        &client,
        "SELECT ends_at > now() - interval '365 days' FROM hallpass.audit_partitions() p
         WHERE now() - interval '366 days' BETWEEN begins_at AND ends_at",
    )
    .await;
    let (removed, left) = match month_is_whole.as_str() {
        "t" => ("5", "6 7 8 9"),
        _ => ("6", "6 7 8"),
    };
    assert_eq!(
        value(&client, "SELECT cleanup_old_audit_logs()").await,
        format!("Removed {removed} of the audit log's rows at a retention of 365 days.")
    );
    assert_eq!(value(&client, ROWS).await, left);
    assert_eq!(value(&client, LOG).await, "5 6 7 8");
    assert_eq!(value(&client, LOG_ORG).await, "03 a5 b6 c7 a8");
    assert_eq!(removed_by_hand(&client, 365).await, 0);

    let step = "SELECT audit_rows, is_done FROM hallpass.remove_expired(60, 100)";
    run(
        &client,
        "DELETE FROM permission_audit_log WHERE entry_id = 9",
    )
    .await;
    assert_eq!(lines(&client, step).await, ["0 | f"], "the log first");
    assert_eq!(lines(&client, step).await, ["1 | f"]);
    assert_eq!(lines(&client, step).await, ["0 | t"]);
    assert_eq!(value(&client, LOG).await, "6 7 8");
    assert_eq!(value(&client, LOG_ORG).await, "03 b6 c7 a8");

    assert_eq!(removed_by_hand(&client, 1).await, 1);
    assert_eq!(value(&client, LOG).await, "7 8");
    assert_eq!(value(&client, LOG_ORG).await, "03 b6 c7 a8");
    assert_eq!(value(&client, ROWS).await, "8");
    assert_eq!(lines(&client, MONTHS).await, ["0", "1", "2"]);

    run(
        &client,
        "UPDATE hallpass.log SET committed_at = now() - interval '1 year'",
    )
    .await;
    run(&client, "SELECT cleanup_old_audit_logs(1)").await;
    assert_eq!(value(&client, LOG).await, "8", "the head");
    assert_eq!(value(&client, LOG_ORG).await, "03 b6 c7 a8");
}

#[tokio::test]
async fn steps_are_bounded() {
    let (_database, client) = create().await;
    for entry in 1..=7 {
        let past = format!("SELECT past({entry}, '{entry:08}-0000-0000-0000-000000000000', 400)");
        run(&client, &past).await;
    }
    let step = "SELECT audit_rows, is_done FROM hallpass.remove_expired(365, 3)";
    let log = "SELECT count(*) FROM hallpass.log";
    for left in ["4", "1"] {
        assert_eq!(lines(&client, step).await, ["0 | f"]);
        assert_eq!(value(&client, log).await, left);
    }
    for expected in ["3 | f", "3 | f", "1 | f", "0 | t"] {
        assert_eq!(lines(&client, step).await, [expected]);
    }
    let kept = "SELECT count(*) FROM hallpass.log_org";
    assert_eq!(
        value(&client, kept).await,
        "7",
        "each organization's newest"
    );
}

/// By the newest row of log_org it is known that the matrix has not seen a change, however old that is.
#[tokio::test]
async fn the_matrix_is_believed_no_more_after_a_cleanup() {
    let (_database, client) = create().await;
    fill(&client).await;
    run(&client, "SELECT refresh_permission_materialized_views()").await;
    let believed =
        resolve("SELECT hallpass.matrix_is_true(:lincoln), hallpass.matrix_is_true(:franklin)");
    set_role(&client, "lincoln", "bob", "volunteer").await;
    run(&client, BACKDATE).await;
    assert_ne!(removed_by_hand(&client, 1).await, 0);
    assert_eq!(lines(&client, &believed).await, ["f | t"]);
    run(&client, "UPDATE permission_roles SET rank = rank + 1").await;
    set_role(&client, "franklin", "bob", "admin").await;
    run(&client, BACKDATE).await;
    assert_ne!(removed_by_hand(&client, 1).await, 0);
    assert_eq!(lines(&client, &believed).await, ["f | f"]);
    assert_eq!(
        value(&client, "SELECT count(*) FROM hallpass.log").await,
        "1"
    );
}

#[tokio::test]
async fn a_running_service_removes_what_is_old_and_notices_nothing() {
    let (database, client) = create().await;
    run(&client, DROP_MONTHS).await;
    fill(&client).await;
    let mut config = config(&database.url);
    config.audit_retention_days = NonZeroU16::new(365);
    config.maintenance_interval = Duration::from_millis(100);
    let server = Server::start(config).await;
    eventually("answers come from the cache", async || {
        server.check("lincoln", "bob", APPROVE).await.is_cached()
    })
    .await;
    eventually("the months are made", async || {
        lines(&client, MONTHS).await == ["1", "2"]
    })
    .await;
    let rows = value(&client, "SELECT count(*) FROM permission_audit_log").await;
    assert_ne!(rows, "0");
    run(&client, BACKDATE).await;
    eventually("nothing old is left", async || {
        let answer = server.check("lincoln", "bob", APPROVE).await;
        assert!(answer.is_cached(), "{answer}");
        assert!(answer.response.allowed, "{answer}");
        value(&client, "SELECT count(*) FROM permission_audit_log").await == "0"
    })
    .await;
    assert_eq!(
        value(&client, "SELECT count(*) FROM hallpass.log").await,
        "1"
    );
    eventually("the month is made once it has left DEFAULT", async || {
        lines(&client, MONTHS).await == ["0", "1", "2"]
    })
    .await;
    set_role(&client, "lincoln", "bob", "volunteer").await;
    eventually("the feed goes on", async || {
        let answer = server.check("lincoln", "bob", APPROVE).await;
        answer.is_cached() && !answer.response.allowed
    })
    .await;
    server.stop().await;
}

/// An entry whose rows are gone may have changed anything.
#[tokio::test]
async fn an_entry_without_its_rows_ends_every_cached_answer() {
    let (database, client) = create().await;
    fill(&client).await;
    let server = Server::start(config(&database.url)).await;
    eventually("answers come from the cache", async || {
        server.check("lincoln", "bob", APPROVE).await.is_cached()
    })
    .await;
    run(
        &client,
        &resolve(
            "BEGIN; UPDATE profiles SET role = 'volunteer' WHERE org_id = :lincoln AND user_id = :bob;
             DELETE FROM permission_audit_log; COMMIT",
        ),
    )
    .await;
    eventually("the change is seen", async || {
        !server
            .check("lincoln", "bob", APPROVE)
            .await
            .response
            .allowed
    })
    .await;
}

#[tokio::test]
async fn a_legal_hold_stops_removal() {
    const PLACE: &str = "
        INSERT INTO hallpass.legal_hold (placed_by, reason) VALUES ('counsel', 'case 12') RETURNING id";
    let (database, client) = create().await;
    fill(&client).await;
    run(&client, BACKDATE).await;
    let rows = value(&client, "SELECT count(*) FROM permission_audit_log").await;

    // Being placed right now.
    let counsel = database.client().await;
    run(&counsel, "BEGIN").await;
    assert_eq!(value(&counsel, PLACE).await, "1");
    let cleanup = "SELECT cleanup_old_audit_logs()";
    let error = client.simple_query(cleanup).await.unwrap_err();
    assert_eq!(sqlstate(&error), "55P03");
    run(&counsel, "COMMIT").await;

    for refused in [cleanup, "SELECT hallpass.remove_expired(1, 1)"] {
        let error = client.simple_query(refused).await.unwrap_err();
        assert_eq!(sqlstate(&error), "55000");
        let message = error.as_db_error().unwrap().message().to_owned();
        assert_eq!(message, "legal hold 1 by counsel forbids removal: case 12");
    }
    let mut config = config(&database.url);
    config.audit_retention_days = NonZeroU16::new(1);
    let server = Server::start(config).await;
    assert_eq!(value(&counsel, PLACE).await, "2");
    run(
        &client,
        "UPDATE hallpass.legal_hold SET lifted_at = now() WHERE id = 1",
    )
    .await;
    let error = client.simple_query(cleanup).await.unwrap_err();
    assert_eq!(sqlstate(&error), "55000");
    server.stop().await;
    let now = value(&client, "SELECT count(*) FROM permission_audit_log").await;
    assert_eq!(now, rows);

    // None is in force any more; one that is placed now waits for the step that is under way.
    run(
        &client,
        "UPDATE hallpass.legal_hold SET lifted_at = now() WHERE id = 2; BEGIN",
    )
    .await;
    assert_eq!(removed_by_hand(&client, 365).await.to_string(), rows);
    let (holder, waiter) = (pid(&client).await, pid(&counsel).await);
    let placed = tokio::spawn(async move { value(&counsel, PLACE).await });
    let watcher = database.client().await;
    wait_until_blocked(&watcher, waiter, holder).await;
    run(&client, "COMMIT").await;
    assert_eq!(placed.await.unwrap(), "3");
}

#[tokio::test]
async fn wrong_arguments_are_refused() {
    let (_database, client) = create().await;
    for days in ["0", "-1", "36501", "NULL"] {
        let error = client
            .simple_query(&format!("SELECT cleanup_old_audit_logs({days})"))
            .await
            .unwrap_err();
        assert_eq!(sqlstate(&error), "22023", "{days}");
        let message = error.as_db_error().unwrap().message().to_owned();
        assert_eq!(
            message,
            format!("retention_days must be from 1 to 36500, not {days}")
        );
    }
    run(&client, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let error = client.simple_query("SELECT cleanup_old_audit_logs()").await;
    assert_eq!(sqlstate(&error.unwrap_err()), "25000");
}

/// Writers change permissions all the while, at every isolation level, and none fails or waits for long.
#[tokio::test]
async fn writers_go_on_while_months_come_and_go() {
    const ROUNDS: usize = 15;
    const WRITERS: usize = 4;
    const WAIT_MAX: Duration = Duration::from_secs(1);
    /// This month's partition and its rows disappear, and ones that are old appear.
    const BEGIN_ROUND: &str = "
        BEGIN;
        LOCK TABLE permission_audit_log IN ACCESS EXCLUSIVE MODE;
        DO $$ BEGIN
            EXECUTE (SELECT coalesce('DROP TABLE ' || string_agg(name::text, ', '), 'SELECT')
                     FROM hallpass.audit_partitions() WHERE NOT is_default);
        END $$;
        TRUNCATE hallpass.permission_audit_log_default;
        CALL past_month(500);
        CALL past_month(600);
        SELECT past_row(-i, NULL, now() - make_interval(days => 400 + i % 300)) FROM generate_series(1, 2000) i;
        COMMIT";
    let (database, client) = create().await;
    fill(&client).await;
    let stopped = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let client = database.client().await;
        let stopped = Arc::clone(&stopped);
        writers.spawn(async move {
            let user = ["ann", "bob", "cam", "vic"][writer];
            let mut slowest = Duration::ZERO;
            let mut written = 0;
            while !stopped.load(Ordering::Relaxed) {
                let change = resolve(&format!(
                    "BEGIN ISOLATION LEVEL {};
                     UPDATE profiles SET role = 'role {written}' WHERE org_id = :lincoln AND user_id = :{user};
                     UPDATE profiles SET role = 'role {written}' WHERE org_id = :franklin AND user_id = :{user};
                     COMMIT",
                    ["READ COMMITTED", "REPEATABLE READ"][written % 2]
                ));
                let started = Instant::now();
                run(&client, &change).await;
                slowest = slowest.max(started.elapsed());
                written += 1;
            }
            (written, slowest)
        });
    }
    let (mut made, mut removed) = (0, 0);
    for _ in 0..ROUNDS {
        run(&client, BEGIN_ROUND).await;
        // As the service does: what is in somebody's way is tried again.
        for _ in 0..3 {
            if client.batch_execute(MAKE).await.is_ok() {
                break;
            }
        }
        made += usize::from(lines(&client, MONTHS).await.contains(&"0".to_owned()));
        if let Ok(row) = client
            .query_one("SELECT cleanup_old_audit_logs(100)", &[])
            .await
        {
            removed += number_removed(row.get(0), 100);
        }
    }
    stopped.store(true, Ordering::Relaxed);
    let mut written = 0;
    for (count, slowest) in writers.join_all().await {
        assert!(slowest < WAIT_MAX, "a writer waited for {slowest:?}");
        written += count;
    }
    assert!(written > ROUNDS * WRITERS, "only {written} transactions");
    assert!(removed >= 2000, "only {removed} rows were removed");
    println!("{written} transactions, this month made {made} times of {ROUNDS}");
}

/// A page of the log reads the partition that an entry is in, and no other.
#[tokio::test]
async fn a_page_of_the_log_reads_one_month() {
    let (_database, client) = create().await;
    run(&client, "CALL past_month(500); CALL past_month(400)").await;
    run(
        &client,
        "SELECT past(i, gen_random_uuid(), 400) FROM generate_series(1, 2000) i",
    )
    .await;
    run(&client, "VACUUM ANALYZE").await;
    let page: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
        [&vec![0_i64], &vec![0_i32], &1000_i64, &i32::MAX, &10_i64];
    let explain = format!("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {READ_PAGE}");
    let plan: Vec<String> = client
        .query(&explain, &page)
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    let month = value(
        &client,
        "SELECT to_char(now() AT TIME ZONE 'UTC' - interval '400 days', 'YYYY_MM')",
    )
    .await;
    let read: Vec<&String> = plan
        .iter()
        .filter(|line| {
            line.contains("on permission_audit_log_") && !line.contains("never executed")
        })
        .collect();
    assert_eq!(read.len(), 1, "{plan:#?}");
    assert!(
        read[0].contains(&format!("on permission_audit_log_{month}")),
        "{plan:#?}"
    );
    assert!(read[0].contains("Index Scan"), "{plan:#?}");
}
