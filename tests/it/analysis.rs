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

/// Something to do, and the metrics that change with it: `metric | status`.
struct Case {
    sql: &'static str,
    findings: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        sql: DROP_MONTHS,
        findings: &["audit log: months made | critical"],
    },
    Case {
        sql: "INSERT INTO permission_roles VALUES ('chair', 9)",
        findings: &[
            "audit log: rows in the DEFAULT partition | warning",
            "matrix believed | critical",
            "age: public.user_permission_matrix | ok",
        ],
    },
    Case {
        sql: "CALL hallpass.make_audit_partitions()",
        findings: &["audit log: months made | warning"],
    },
    Case {
        sql: "INSERT INTO hallpass.permission_audit_log_default SELECT (r).* FROM (
                  SELECT r FROM hallpass.permission_audit_log_default r, generate_series(1, 100000)) r",
        findings: &["audit log: rows in the DEFAULT partition | critical"],
    },
    Case {
        sql: "TRUNCATE hallpass.permission_audit_log_default; CALL hallpass.make_audit_partitions()",
        findings: &[
            "audit log: rows in the DEFAULT partition | ok",
            "audit log: months made | ok",
        ],
    },
    Case {
        sql: "UPDATE hallpass.log SET committed_at = now() - interval '11 minutes'",
        findings: &[
            "age: public.user_permission_matrix | warning",
            "age: public.org_permission_summary | warning",
        ],
    },
    Case {
        sql: "UPDATE hallpass.log SET committed_at = now() - interval '61 minutes'",
        findings: &["age: public.user_permission_matrix | critical"],
    },
    Case {
        sql: REFRESH,
        findings: &[
            "age: public.user_permission_matrix | ok",
            "age: public.org_permission_summary | ok",
            "matrix believed | ok",
        ],
    },
    Case {
        sql: "UPDATE profiles SET role = 'volunteer' WHERE org_id = :lincoln",
        findings: &["matrix believed | critical"],
    },
    Case {
        sql: "INSERT INTO organizations (name) SELECT i::text FROM generate_series(1, 4) i",
        findings: &["matrix believed | critical"],
    },
    Case {
        sql: REFRESH,
        findings: &["matrix believed | ok"],
    },
    Case {
        sql: "UPDATE profiles SET role = 'admin' WHERE org_id = :lincoln",
        findings: &["matrix believed | warning"],
    },
    Case {
        sql: "REFRESH MATERIALIZED VIEW user_permission_matrix WITH NO DATA",
        findings: &[
            "age: public.user_permission_matrix | critical",
            "matrix believed | critical",
        ],
    },
    Case {
        sql: REFRESH,
        findings: &["matrix believed | ok"],
    },
    Case {
        sql: "ALTER TABLE hallpass.log_pending DISABLE TRIGGER number_entry;
              DELETE FROM hallpass.log_pending;
              INSERT INTO hallpass.log_pending SELECT i, '{}', '3' FROM generate_series(1, 9999) i",
        findings: &["log: entries not cleared | ok"],
    },
    Case {
        sql: "INSERT INTO hallpass.log_pending VALUES (0, '{}', '3')",
        findings: &["log: entries not cleared | warning"],
    },
    Case {
        sql: "INSERT INTO hallpass.log_pending SELECT i, '{}', '3' FROM generate_series(1, 100000) i",
        findings: &["log: entries not cleared | critical"],
    },
    Case {
        sql: "DELETE FROM hallpass.log_pending",
        findings: &["log: entries not cleared | ok"],
    },
    Case {
        sql: "UPDATE pg_index SET indisvalid = false
              WHERE indexrelid = 'public.user_permission_matrix_key'::regclass",
        findings: &["index: public.user_permission_matrix_key | critical"],
    },
];

/// Those that PostgreSQL's statistics tell, which come a second later.
const COUNTED: &[Case] = &[
    Case {
        sql: "ALTER TABLE permission_roles SET (autovacuum_enabled = off);
              INSERT INTO permission_roles SELECT i::text, i FROM generate_series(1, 3000) i;
              DELETE FROM permission_roles WHERE rank > 1500",
        findings: &["dead rows: public.permission_roles | warning"],
    },
    Case {
        sql: "DELETE FROM permission_roles WHERE rank > 500",
        findings: &["dead rows: public.permission_roles | critical"],
    },
    Case {
        sql: "VACUUM permission_roles",
        findings: &["dead rows: public.permission_roles | ok"],
    },
    Case {
        sql: "INSERT INTO permission_roles SELECT i::text, i FROM generate_series(5000, 15000) i",
        findings: &["index: public.permission_audit_log_entry | warning"],
    },
    Case {
        sql: "SET enable_seqscan = off; SET enable_bitmapscan = off;
              SELECT FROM permission_audit_log WHERE entry_id = 1",
        findings: &["index: public.permission_audit_log_entry | ok"],
    },
];

/// The findings, each as `metric | status`.
async fn findings(client: &Client) -> Vec<String> {
    let grades = "SELECT metric, status FROM analyze_permission_performance()";
    lines(client, grades).await
}

#[tokio::test]
async fn a_new_database_is_well() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    run(&client, REFRESH).await;
    let wrong = "SELECT * FROM analyze_permission_performance()
                 WHERE status NOT IN ('ok', 'info') OR status = 'ok' AND recommendation IS NOT NULL
                    OR metric IS NULL OR value IS NULL";
    assert_eq!(lines(&client, wrong).await, [""; 0]);
    let names = findings(&client).await;
    for expected in [
        "size: public.user_permission_matrix | info",
        "dead rows: public.profiles | ok",
        "reads from memory | info",
        "index: public.permission_audit_log_entry | ok",
        "age: public.user_permission_matrix | ok",
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
    let believed =
        "SELECT value FROM analyze_permission_performance() WHERE metric = 'matrix believed'";
    assert_eq!(value(&client, believed).await, "2 of 2 organizations");
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
    let holds = "SELECT value, recommendation IS NOT NULL FROM analyze_permission_performance()
                 WHERE metric = 'legal holds'";
    assert_eq!(lines(&client, holds).await, ["1 in force | t"]);
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
    const ASK: &str = "SELECT metric, status FROM hallpass.findings_of_statements()";
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
    let slow = "SELECT value, status FROM analyze_permission_performance() WHERE metric = 'slow statements'";
    assert_eq!(
        lines(&client, slow).await,
        ["not known: pg_stat_statements must be loaded via shared_preload_libraries | info"]
    );
}
