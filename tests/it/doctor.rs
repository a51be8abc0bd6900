//! `hallpass doctor` as the service's login runs it: silent where all is well; and of everything that is broken here, what
//! it says mends it does.

use hallpass::store::migrations::migrate_to;
use serde_json::Value;
use tokio_postgres::Client;

use crate::{
    commands::{Ran, hallpass},
    database::{Database, as_role},
    proxy::{Proxy, Way},
    server::fill,
    sql::{lines, run},
    support::temporary_directory,
};

const REFRESH: &str = "SELECT public.refresh_permission_materialized_views()";

const OK: i32 = 0;
const FAILED: i32 = 1;
const ERROR: i32 = 2;

struct Case {
    name: &'static str,
    sql: &'static str,
    /// Whose line is red.
    subject: &'static str,
    /// In what it says.
    problem: &'static str,
}

/// Each breaks a healthy database, and is mended by the SQL that is printed.
const CASES: &[Case] = &[
    Case {
        name: "a trigger disabled",
        sql: "ALTER TABLE public.profiles DISABLE TRIGGER hallpass_record_update",
        subject: "recording",
        problem: "hallpass_record_update on public.profiles is not ENABLE ALWAYS",
    },
    Case {
        name: "all triggers of a table dropped",
        sql: "DROP TRIGGER hallpass_record_insert ON public.organization_permissions;
              DROP TRIGGER hallpass_record_update ON public.organization_permissions;
              DROP TRIGGER hallpass_record_delete ON public.organization_permissions;
              DROP TRIGGER hallpass_record_truncate ON public.organization_permissions",
        subject: "recording",
        problem: "hallpass_record_truncate on public.organization_permissions is missing",
    },
    Case {
        name: "the triggers of hallpass's own tables dropped",
        sql: "DROP TRIGGER number_entry ON hallpass.log_pending; DROP TRIGGER api_keys_changed ON hallpass.api_keys",
        subject: "recording",
        problem: "number_entry on hallpass.log_pending is missing",
    },
    Case {
        name: "row-level security that binds the owner",
        sql: "ALTER TABLE public.profiles ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        subject: "recording",
        problem: "row-level security on public.profiles hides rows",
    },
    Case {
        name: "row-level security that hides the log",
        sql: "ALTER TABLE hallpass.log ENABLE ROW LEVEL SECURITY",
        subject: "feed",
        problem: "row-level security on hallpass.log hides rows from hallpass_service",
    },
    Case {
        name: "an index dropped",
        sql: "DROP INDEX public.idx_profiles_org_role",
        subject: "indexes",
        problem: "1 on the application's tables are missing or invalid",
    },
    Case {
        name: "an index invalid",
        sql: "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.idx_profiles_user_org'::regclass",
        subject: "indexes",
        problem: "1 on the application's tables are missing or invalid",
    },
    Case {
        name: "indexes of hallpass's own dropped",
        sql: "DROP INDEX hallpass.log_entry, public.permission_audit_log_actor, public.user_permission_matrix_key",
        subject: "own indexes",
        problem: "index permission_audit_log_actor is missing",
    },
    Case {
        name: "a privilege of the service revoked",
        sql: "REVOKE SELECT ON hallpass.log FROM hallpass_service",
        subject: "privileges",
        problem: "hallpass_service lacks SELECT on TABLE hallpass.log",
    },
    Case {
        name: "a privilege of another role revoked",
        sql: "REVOKE EXECUTE ON ROUTINE hallpass.change(jsonb, jsonb, text) FROM hallpass_admin",
        subject: "privileges",
        problem: "hallpass_admin lacks EXECUTE on ROUTINE hallpass.change(jsonb, jsonb, text)",
    },
    Case {
        name: "the sequence behind the log",
        sql: "SELECT setval('hallpass.log_seq', 1)",
        subject: "sequence",
        problem: "hallpass.log_seq is behind the log",
    },
    Case {
        name: "the matrix emptied",
        sql: "REFRESH MATERIALIZED VIEW public.user_permission_matrix WITH NO DATA",
        subject: "matrix",
        problem: "holds nothing",
    },
    Case {
        name: "this month's partition gone",
        sql: "DO $$ BEGIN
                  EXECUTE (SELECT 'DROP TABLE ' || name FROM hallpass.audit_partitions()
                           WHERE begins_at <= now() AND ends_at > now());
              END $$",
        subject: "partitions",
        problem: "the audit log has no partition for 2",
    },
];

async fn doctor(url: &str, more: &[&str]) -> Ran {
    hallpass(&[&["doctor", "--database-url", url], more].concat()).await
}

/// The findings that are not ok, as (subject, message, remedy).
fn problems(ran: &Ran) -> Vec<(String, String, Vec<String>)> {
    let findings = ran.out.lines().map(|line| {
        let finding: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{ran:?}"));
        finding
    });
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    findings
        .filter(|finding| finding["status"] == "failed")
        .map(|finding| {
            let remedy = finding["remedy"].as_array().unwrap();
            (
                text(&finding["subject"]),
                text(&finding["message"]),
                remedy.iter().map(text).collect(),
            )
        })
        .collect()
}

/// What is printed, up to the words that follow the SQL.
async fn follow(client: &Client, remedy: &[String]) {
    for step in remedy {
        let sql = step.split("; and ").next().unwrap();
        run(client, sql).await;
    }
}

async fn healthy() -> (Database, Client, String) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    let url = as_role(&database.url, "hallpass_service");
    (database, client, url)
}

#[tokio::test]
async fn a_matrix_that_was_never_refreshed_is_red_and_a_refreshed_database_is_green() {
    let (_database, client, url) = healthy().await;
    let before = doctor(&url, &[]).await;
    assert_eq!(before.code, FAILED, "{before:?}");
    assert!(
        before
            .out
            .contains("FAILED  matrix       public.user_permission_matrix was never refreshed"),
        "{before:?}"
    );
    assert!(
        before.out.contains(&format!("        → {REFRESH}")),
        "{before:?}"
    );

    run(&client, REFRESH).await;
    let log = "SELECT (SELECT count(*) FROM hallpass.log), hallpass.take_fingerprint(), last_value FROM hallpass.log_seq";
    let untouched = lines(&client, log).await;
    let after = doctor(&url, &[]).await;
    assert_eq!(after.code, OK, "{after:?}");
    assert!(
        after
            .out
            .starts_with("ok      connection   as hallpass_service to test_"),
        "{after:?}"
    );
    assert!(!after.out.contains("FAILED"), "{after:?}");
    for subject in [
        "privileges",
        "recording",
        "sequence",
        "indexes",
        "matrix",
        "data",
    ] {
        assert!(
            after.out.contains(&format!("ok      {subject:12} ")),
            "{subject}: {after:?}"
        );
    }
    assert_eq!(lines(&client, log).await, untouched);
}

#[tokio::test]
async fn what_is_broken_is_red_and_what_is_printed_mends_it() {
    for case in CASES {
        let (_database, client, url) = healthy().await;
        run(&client, REFRESH).await;
        run(&client, case.sql).await;
        let broken = doctor(&url, &["--json"]).await;
        assert_eq!(broken.code, FAILED, "{}: {broken:?}", case.name);
        let found: Vec<_> = problems(&broken)
            .into_iter()
            .filter(|(subject, ..)| subject == case.subject)
            .collect();
        let is_said = found.iter().any(|(_, what, _)| what.contains(case.problem));
        assert!(is_said, "{}: {broken:?}", case.name);
        for (_, _, remedy) in &found {
            assert!(!remedy.is_empty(), "{}: {broken:?}", case.name);
            follow(&client, remedy).await;
        }
        let mended = doctor(&url, &["--json"]).await;
        assert_eq!(mended.code, OK, "{}: {mended:?}", case.name);
    }
}

#[tokio::test]
async fn a_question_that_may_not_be_asked_is_red_and_the_others_are_asked() {
    let (_database, client, url) = healthy().await;
    run(
        &client,
        "REVOKE EXECUTE ON ROUTINE hallpass.diagnose(text, name) FROM hallpass_service",
    )
    .await;
    let ran = doctor(&url, &[]).await;
    assert_eq!(ran.code, FAILED, "{ran:?}");
    assert!(
        ran.out
            .contains("FAILED  privileges   cannot be looked at: "),
        "{ran:?}"
    );
    assert!(ran.out.contains("ok      indexes "), "{ran:?}");
    assert!(
        ran.out.contains("→ psql -X -f deploy/sql/roles.sql"),
        "{ran:?}"
    );
}

#[tokio::test]
async fn a_role_that_is_not_on_the_ladder_is_a_warning_with_a_count() {
    let (_database, client, url) = healthy().await;
    run(
        &client,
        "UPDATE public.profiles SET role = 'prin''cipal' WHERE role = 'admin'",
    )
    .await;
    run(&client, REFRESH).await;
    let ran = doctor(&url, &[]).await;
    assert_eq!(ran.code, OK, "{ran:?}");
    let members = lines(
        &client,
        "SELECT count(*) FROM public.profiles WHERE role = 'prin''cipal'",
    )
    .await;
    let expected = format!(
        "warning data         role 'prin''cipal' is not on the role ladder: {} members satisfy no minimum role",
        members[0]
    );
    assert!(ran.out.contains(&expected), "{expected}: {ran:?}");
}

#[tokio::test]
async fn a_schema_that_is_behind_is_red_until_migrated() {
    let database = Database::empty().await;
    for version in [0, 13] {
        migrate_to(&database.url.parse().unwrap(), version, |_| {})
            .await
            .unwrap();
        let behind = doctor(&database.url, &["--json"]).await;
        assert_eq!(behind.code, FAILED, "{behind:?}");
        let found = problems(&behind);
        assert_eq!(found.len(), 1, "{behind:?}");
        assert!(found[0].1.contains("0014_doctor to apply"), "{behind:?}");
        assert_eq!(found[0].2, ["hallpass migrate"]);
    }
    let migrated = hallpass(&["migrate", "--database-url", &database.url]).await;
    assert_eq!(migrated.code, OK, "{migrated:?}");
    run(&database.client().await, REFRESH).await;
    let current = doctor(&database.url, &[]).await;
    assert_eq!(current.code, OK, "{current:?}");
}

/// Nobody makes hallpass's roles there, and its login owns everything.
#[tokio::test]
async fn a_private_database_is_green() {
    let directory = temporary_directory();
    let data = directory.path().join("data");
    let data = data.to_str().unwrap();
    let migrated = hallpass(&["migrate", "--data-dir", data]).await;
    assert_eq!(migrated.code, OK, "{migrated:?}");
    let ran = hallpass(&["doctor", "--data-dir", data]).await;
    assert_eq!(ran.code, OK, "{ran:?}");
    assert!(
        ran.out.lines().all(|line| line.starts_with("ok      ")),
        "{ran:?}"
    );
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_is_an_error_that_says_what_to_look_at() {
    for url in ["postgresql://nobody@127.0.0.1:1/nothing", "postgresql://"] {
        let ran = doctor(url, &[]).await;
        assert_eq!(ran.code, ERROR, "{ran:?}");
        assert_eq!(ran.out, "", "{ran:?}");
        assert_eq!(ran.complaint().len(), 1, "{ran:?}");
    }
    let ran = doctor("postgresql://nobody@127.0.0.1:1/nothing", &[]).await;
    ran.assert_one_line("see that the server runs");
}

/// A way that connects is not yet one over which changes are heard of.
#[tokio::test]
async fn a_feed_s_way_is_green_when_it_hears_of_changes_to_the_same_log() {
    let (database, client, url) = healthy().await;
    run(&client, REFRESH).await;
    let (other, ..) = healthy().await;
    let empty = Database::empty().await;
    let unnotified = Proxy::to(&url, Way::Unnotified);
    let closed = Proxy::to(&url, Way::Closed);
    for (name, feed, problem) in [
        ("the same", &database.url, ""),
        ("another", &other.url, "leads to another log"),
        ("without hallpass", &empty.url, "hallpass.log"),
        ("a pooler", &unnotified.url, "hears of no change"),
        ("nothing", &closed.url, "database unavailable"),
    ] {
        let ran = doctor(&url, &["--json", "--feed-database-url", feed]).await;
        let found: Vec<_> = problems(&ran)
            .into_iter()
            .filter(|(subject, ..)| subject == "feed's way")
            .collect();
        if problem.is_empty() {
            assert_eq!(ran.code, OK, "{name}: {ran:?}");
            assert!(ran.out.contains("hears of changes"), "{name}: {ran:?}");
            continue;
        }
        assert_eq!(ran.code, FAILED, "{name}: {ran:?}");
        assert_eq!(found.len(), 1, "{name}: {ran:?}");
        assert!(found[0].1.contains(problem), "{name}: {ran:?}");
    }
}
