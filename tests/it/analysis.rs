//! What the analysis says of a database that is well, and of each thing that is not.

use hallpass::{embedded::PrivatePostgres, store::migrations::migrate};
use tokio_postgres::{Client, NoTls};

use crate::{
    database::{Database, eventually},
    server::{fill, resolve},
    sql::{lines, run, value},
    support,
};

const DROP_MONTHS: &str = "
DO $$ BEGIN
    EXECUTE (SELECT 'DROP TABLE ' || string_agg(name::text, ', ')
             FROM hallpass.audit_partitions() WHERE NOT is_default);
END $$";

const REFRESH: &str = "SELECT refresh_permission_materialized_views()";

/// Something to do, and the findings that change with it.
struct Case {
    sql: &'static str,
    findings: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        sql: DROP_MONTHS,
        findings: &["audit log: months made | 0 months | critical"],
    },
    Case {
        sql: "INSERT INTO permission_roles VALUES ('chair', 9)",
        findings: &[
            "audit log: rows in the DEFAULT partition | 1 rows | warning",
            "matrix believed | 0.0 % | critical",
            "behind the log: public.user_permission_matrix | 0 minutes | ok",
        ],
    },
    Case {
        sql: "CALL hallpass.make_audit_partitions()",
        findings: &["audit log: months made | 2 months | warning"],
    },
    Case {
        sql: "INSERT INTO hallpass.permission_audit_log_default SELECT (r).* FROM (
                  SELECT r FROM hallpass.permission_audit_log_default r, generate_series(1, 100000)) r",
        findings: &["audit log: rows in the DEFAULT partition | 100001 rows | critical"],
    },
    Case {
        sql: "TRUNCATE hallpass.permission_audit_log_default; CALL hallpass.make_audit_partitions()",
        findings: &[
            "audit log: rows in the DEFAULT partition | 0 rows | ok",
            "audit log: months made | 3 months | ok",
        ],
    },
    Case {
        sql: "UPDATE hallpass.log SET committed_at = now() - interval '11 minutes'",
        findings: &[
            "behind the log: public.user_permission_matrix | 11 minutes | warning",
            "behind the log: public.org_permission_summary | 11 minutes | warning",
        ],
    },
    Case {
        sql: "UPDATE hallpass.log SET committed_at = now() - interval '61 minutes'",
        findings: &["behind the log: public.user_permission_matrix | 61 minutes | critical"],
    },
    Case {
        sql: REFRESH,
        findings: &[
            "behind the log: public.user_permission_matrix | 0 minutes | ok",
            "behind the log: public.org_permission_summary | 0 minutes | ok",
            "matrix believed | 100.0 % | ok",
        ],
    },
    Case {
        sql: "UPDATE profiles SET role = 'volunteer' WHERE org_id = :lincoln",
        findings: &["matrix believed | 50.0 % | critical"],
    },
    Case {
        sql: "INSERT INTO organizations (name) SELECT i::text FROM generate_series(1, 4) i",
        findings: &["matrix believed | 16.7 % | critical"],
    },
    Case {
        sql: REFRESH,
        findings: &["matrix believed | 100.0 % | ok"],
    },
    Case {
        sql: "UPDATE profiles SET role = 'admin' WHERE org_id = :lincoln",
        findings: &["matrix believed | 83.3 % | warning"],
    },
    Case {
        sql: "REFRESH MATERIALIZED VIEW user_permission_matrix WITH NO DATA",
        findings: &[
            "behind the log: public.user_permission_matrix | unknown | critical",
            "matrix believed | 0.0 % | critical",
        ],
    },
    Case {
        sql: REFRESH,
        findings: &["matrix believed | 100.0 % | ok"],
    },
    Case {
        sql: "ALTER TABLE hallpass.log_pending DISABLE TRIGGER number_entry;
              DELETE FROM hallpass.log_pending;
              INSERT INTO hallpass.log_pending SELECT i, '{}', '3' FROM generate_series(1, 9999) i",
        findings: &["log: entries not cleared | 9999 entries | ok"],
    },
    Case {
        sql: "INSERT INTO hallpass.log_pending VALUES (0, '{}', '3')",
        findings: &["log: entries not cleared | 10000 entries | warning"],
    },
    Case {
        sql: "INSERT INTO hallpass.log_pending SELECT i, '{}', '3' FROM generate_series(1, 100000) i",
        findings: &["log: entries not cleared | 100001 entries | critical"],
    },
    Case {
        sql: "DELETE FROM hallpass.log_pending",
        findings: &["log: entries not cleared | 0 entries | ok"],
    },
    Case {
        sql: "UPDATE pg_index SET indisvalid = false
              WHERE indexrelid = 'public.user_permission_matrix_key'::regclass",
        findings: &["index: public.user_permission_matrix_key | scans | critical"],
    },
];

/// Those that PostgreSQL's statistics tell, which come a second later.
const COUNTED: &[Case] = &[
    Case {
        sql: "ALTER TABLE permission_roles SET (autovacuum_enabled = off);
              INSERT INTO permission_roles SELECT i::text, i FROM generate_series(1, 3000) i;
              DELETE FROM permission_roles WHERE rank > 1500",
        findings: &["dead rows: public.permission_roles | 50 % | warning"],
    },
    Case {
        sql: "DELETE FROM permission_roles WHERE rank > 500",
        findings: &["dead rows: public.permission_roles | 83 % | critical"],
    },
    Case {
        sql: "VACUUM permission_roles",
        findings: &["dead rows: public.permission_roles | 0 % | ok"],
    },
    Case {
        sql: "INSERT INTO permission_roles SELECT i::text, i FROM generate_series(5000, 15000) i",
        findings: &["index: public.permission_audit_log_time | scans | warning"],
    },
    Case {
        sql: "SET enable_seqscan = off; SET enable_bitmapscan = off;
              SELECT FROM permission_audit_log WHERE created_at = now()",
        findings: &["index: public.permission_audit_log_time | scans | ok"],
    },
];

/// The findings, each as `metric_name | metric_value metric_unit | status`. Seconds pass while a test runs: they are
/// whole minutes here; and nobody can tell how often an index was scanned.
async fn findings(client: &Client) -> Vec<String> {
    let graded = "
        SELECT metric_name,
               coalesce(CASE metric_unit WHEN 'seconds' THEN floor(metric_value / 60) || ' minutes'
                                         WHEN 'scans' THEN 'scans'
                                         ELSE metric_value || ' ' || metric_unit END, 'unknown'),
               status
        FROM analyze_permission_performance()";
    lines(client, graded).await
}

#[tokio::test]
async fn a_new_database_is_well() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    run(&client, REFRESH).await;
    let wrong = "SELECT * FROM analyze_permission_performance()
                 WHERE status NOT IN ('ok', 'info') OR status = 'ok' AND recommendation IS NOT NULL
                    OR metric_name IS NULL OR metric_unit IS NULL OR detail IS NULL
                    OR metric_value IS NULL AND metric_name NOT IN ('slow statements', 'reads from memory')";
    assert_eq!(lines(&client, wrong).await, [""; 0]);
    let grades = "SELECT metric_name, status FROM analyze_permission_performance()";
    let names = lines(&client, grades).await;
    for expected in [
        "size: public.user_permission_matrix | info",
        "dead rows: public.profiles | ok",
        "reads from memory | info",
        "index: public.permission_audit_log_time | ok",
        "behind the log: public.user_permission_matrix | ok",
        "matrix believed | ok",
        "audit log: months made | ok",
        "audit log: rows in the DEFAULT partition | ok",
        "audit log: growth | info",
        "log: entries not cleared | ok",
        "legal holds | info",
        "slow statements | info",
    ] {
        assert!(
            names.iter().any(|name| name == expected),
            "{expected} not in {names:#?}"
        );
    }
    let believed = "SELECT metric_value, metric_unit, detail FROM analyze_permission_performance()
                    WHERE metric_name = 'matrix believed'";
    assert_eq!(
        lines(&client, believed).await,
        ["100.0 | % | for 2 of 2 organizations"]
    );
}

#[tokio::test]
async fn each_status_follows_from_what_is_there() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    run(&client, "DELETE FROM permission_audit_log").await;
    run(&client, REFRESH).await;
    for case in CASES {
        run(&client, &resolve(case.sql)).await;
        let found = findings(&client).await;
        for expected in case.findings {
            assert!(
                found.iter().any(|f| f == expected),
                "{expected} after {}: {found:#?}",
                case.sql
            );
        }
        // Whatever is wrong has its advice, and what is not has none.
        let wrong = "SELECT * FROM analyze_permission_performance()
                     WHERE status <> 'info' AND (status = 'ok') <> (recommendation IS NULL)";
        assert_eq!(lines(&client, wrong).await, [""; 0], "{}", case.sql);
    }
    run(
        &client,
        "INSERT INTO hallpass.legal_hold (placed_by, reason) VALUES ('counsel', 'case 12')",
    )
    .await;
    let holds = "SELECT metric_value, metric_unit, detail, recommendation IS NOT NULL
                 FROM analyze_permission_performance() WHERE metric_name = 'legal holds'";
    assert_eq!(lines(&client, holds).await, ["1 | holds | in force | t"]);
}

#[tokio::test]
async fn each_status_follows_from_what_is_counted() {
    let database = Database::create().await;
    let client = database.client().await;
    for case in COUNTED {
        run(&client, case.sql).await;
        for expected in case.findings {
            eventually(expected, async || {
                findings(&client).await.iter().any(|f| f == expected)
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_number_is_graded_from_its_limits_on() {
    let database = Database::create().await;
    let client = database.client().await;
    for (number, grade) in [
        ("4.9", "ok"),
        ("5", "warning"),
        ("20", "critical"),
        ("NULL", "ok"),
    ] {
        let graded = format!("SELECT hallpass.graded({number}, 5, 20)");
        assert_eq!(value(&client, &graded).await, grade, "{number}");
    }
}

/// In a cluster of its own, whose libraries are loaded at its start.
#[tokio::test]
async fn slow_statements_are_named_where_they_are_recorded() {
    const ASK: &str = "SELECT metric_name, status FROM hallpass.findings_of_statements()";
    let directory = support::temporary_directory();
    let mut options = support::options(&directory.path().join("data"));
    let preload = ("shared_preload_libraries", "pg_stat_statements");
    options
        .settings
        .push((preload.0.to_owned(), preload.1.to_owned()));
    let cluster = tokio::task::spawn_blocking(move || PrivatePostgres::start(&options).unwrap())
        .await
        .unwrap();
    let url = cluster.url_for("postgres");
    migrate(&url.parse().unwrap(), |_| {}).await.unwrap();
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    drop(tokio::spawn(connection));
    assert_eq!(lines(&client, ASK).await, ["slow statements | info"]);
    run(
        &client,
        "CREATE SCHEMA \"Odd\"; CREATE EXTENSION pg_stat_statements SCHEMA \"Odd\"",
    )
    .await;
    assert_eq!(lines(&client, ASK).await, ["slow statements | ok"]);
    run(&client, "SELECT pg_sleep(0.06)").await;
    run(
        &client,
        "SELECT pg_sleep(0.06), (SELECT count(*) FROM profiles)",
    )
    .await;
    assert_eq!(
        lines(&client, ASK).await,
        ["slow statement: SELECT pg_sleep($1), (SELECT count(*) FROM profiles) | warning"]
    );
}

/// Installed and yet not loaded: the analysis goes on.
#[tokio::test]
async fn an_extension_that_is_not_loaded_is_no_error() {
    let database = Database::create().await;
    let client = database.client().await;
    run(&client, "CREATE EXTENSION pg_stat_statements").await;
    let slow = "SELECT metric_value, status, detail FROM analyze_permission_performance()
                WHERE metric_name = 'slow statements'";
    assert_eq!(
        lines(&client, slow).await,
        ["- | info | not known: pg_stat_statements must be loaded via shared_preload_libraries"]
    );
}
