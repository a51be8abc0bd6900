//! What goes past the triggers is noticed: each way around them, and what `hallpass.inspect()` makes of it.

use hallpass::store::migrations::migrate;
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::{
    database::Database,
    sql::{lines, pid, run, sqlstate, value, wait_until_blocked},
};

const INSPECT: &str = "SELECT * FROM hallpass.inspect()";

/// What the log says since it had `$head` as its head.
const LOGGED: &str = "
SELECT change_type || ' ' || table_name || ' ' || string_agg(o.org_id::text, ',')
FROM hallpass.log JOIN permission_audit_log USING (entry_id) JOIN hallpass.log_org o USING (seq)
WHERE seq > $head GROUP BY seq, change_type, table_name ORDER BY seq";

/// Everything may have changed.
const EVERYTHING: &str = "UNRECORDED * 00000000-0000-0000-0000-000000000000";

async fn head_seq(client: &Client) -> i64 {
    let head = value(client, "SELECT coalesce(max(seq), 0) FROM hallpass.log").await;
    head.parse().unwrap()
}

async fn logged_since(client: &Client, head: i64) -> Vec<String> {
    lines(client, &LOGGED.replace("$head", &head.to_string())).await
}

#[tokio::test]
async fn a_fresh_database_is_believed_and_an_inspection_writes_nothing() {
    let database = Database::create().await;
    let client = database.client().await;
    let head = head_seq(&client).await;
    for _ in 0..2 {
        assert_eq!(lines(&client, INSPECT).await, [""; 0]);
    }
    let recorded = "INSERT INTO permission_roles VALUES ('chair', 9)";
    run(&client, recorded).await;
    assert_eq!(lines(&client, INSPECT).await, [""; 0]);
    assert_eq!(
        logged_since(&client, head).await,
        ["INSERT permission_roles 00000000-0000-0000-0000-000000000000"]
    );
}

struct Case {
    name: &'static str,
    sql: &'static str,
    /// The problems, for as long as they are there.
    problems: &'static [&'static str],
    /// Puts it right again.
    repair: &'static str,
}

/// Each changes the fingerprint: everything is taken as changed, once.
const CASES: &[Case] = &[
    Case {
        name: "a trigger disabled",
        sql: "ALTER TABLE profiles DISABLE TRIGGER hallpass_record_update",
        problems: &["trigger hallpass_record_update on public.profiles is not ENABLE ALWAYS: changes go unrecorded"],
        repair: "ALTER TABLE profiles ENABLE ALWAYS TRIGGER hallpass_record_update",
    },
    Case {
        name: "all triggers of a table disabled",
        sql: "ALTER TABLE permission_roles DISABLE TRIGGER ALL",
        problems: &[
            "trigger hallpass_record_delete on public.permission_roles is not ENABLE ALWAYS: changes go unrecorded",
            "trigger hallpass_record_insert on public.permission_roles is not ENABLE ALWAYS: changes go unrecorded",
            "trigger hallpass_record_truncate on public.permission_roles is not ENABLE ALWAYS: changes go unrecorded",
            "trigger hallpass_record_update on public.permission_roles is not ENABLE ALWAYS: changes go unrecorded",
        ],
        repair: "ALTER TABLE permission_roles
                     ENABLE ALWAYS TRIGGER hallpass_record_delete, ENABLE ALWAYS TRIGGER hallpass_record_insert,
                     ENABLE ALWAYS TRIGGER hallpass_record_truncate, ENABLE ALWAYS TRIGGER hallpass_record_update",
    },
    Case {
        name: "a trigger that replication's role switches off",
        sql: "ALTER TABLE organizations ENABLE TRIGGER hallpass_record_delete",
        problems: &["trigger hallpass_record_delete on public.organizations is not ENABLE ALWAYS: changes go unrecorded"],
        repair: "ALTER TABLE organizations ENABLE ALWAYS TRIGGER hallpass_record_delete",
    },
    Case {
        name: "a trigger that fires in replication's role alone",
        sql: "ALTER TABLE organizations ENABLE REPLICA TRIGGER hallpass_record_delete",
        problems: &["trigger hallpass_record_delete on public.organizations is not ENABLE ALWAYS: changes go unrecorded"],
        repair: "ALTER TABLE organizations ENABLE ALWAYS TRIGGER hallpass_record_delete",
    },
    Case {
        name: "a trigger dropped",
        sql: "DROP TRIGGER hallpass_record_update ON organization_permissions",
        problems: &["trigger hallpass_record_update on public.organization_permissions is missing: changes go unrecorded"],
        repair: "CREATE TRIGGER hallpass_record_update AFTER UPDATE ON organization_permissions
                     REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
                     FOR EACH STATEMENT EXECUTE FUNCTION hallpass.record_organization_permissions_update();
                 ALTER TABLE organization_permissions ENABLE ALWAYS TRIGGER hallpass_record_update",
    },
    Case {
        name: "a trigger disabled and enabled again between two inspections",
        sql: "ALTER TABLE profiles DISABLE TRIGGER hallpass_record_update;
              UPDATE profiles SET role = 'admin';
              ALTER TABLE profiles ENABLE ALWAYS TRIGGER hallpass_record_update",
        problems: &[],
        repair: "",
    },
    Case {
        name: "the same with the trigger that numbers",
        sql: "ALTER TABLE hallpass.log_pending DISABLE TRIGGER number_entry;
              UPDATE permission_roles SET rank = rank;
              ALTER TABLE hallpass.log_pending ENABLE ALWAYS TRIGGER number_entry",
        problems: &[],
        repair: "",
    },
    Case {
        name: "a column's type changed, which fires no trigger",
        sql: "ALTER TABLE permission_roles ALTER rank TYPE bigint USING rank + 1",
        problems: &[],
        repair: "",
    },
    Case {
        name: "a column changed without a rewrite",
        sql: "ALTER TABLE profiles ALTER role TYPE varchar",
        problems: &[],
        repair: "",
    },
    Case {
        name: "a column renamed",
        sql: "ALTER TABLE profiles RENAME email TO mail",
        problems: &[],
        repair: "",
    },
    Case {
        name: "an enum that gains a label",
        sql: "ALTER TYPE public.state ADD VALUE 'closed' BEFORE 'open'",
        problems: &[],
        repair: "",
    },
    Case {
        name: "an enum's label renamed",
        sql: "ALTER TYPE public.state RENAME VALUE 'open' TO 'opened'",
        problems: &[],
        repair: "",
    },
    Case {
        name: "a table rewritten",
        sql: "VACUUM FULL organizations",
        problems: &[],
        repair: "",
    },
];

#[tokio::test]
async fn what_goes_past_the_triggers_is_seen_and_logged_once() {
    let database = Database::create().await;
    let client = database.client().await;
    run(
        &client,
        "CREATE TYPE public.state AS ENUM ('open');
         ALTER TABLE organizations ADD state public.state;
         DROP MATERIALIZED VIEW user_permission_matrix, org_permission_summary;
         DROP VIEW effective_user_permissions, hallpass.members;
         SELECT * FROM hallpass.inspect()",
    )
    .await;
    for case in CASES {
        let head = head_seq(&client).await;
        run(&client, case.sql).await;
        for _ in 0..2 {
            assert_eq!(
                lines(&client, INSPECT).await,
                case.problems,
                "{}",
                case.name
            );
        }
        let mut expected = vec![EVERYTHING];
        assert_eq!(logged_since(&client, head).await, expected, "{}", case.name);
        if case.repair.is_empty() {
            continue;
        }
        run(&client, case.repair).await;
        assert_eq!(lines(&client, INSPECT).await, [""; 0], "{}", case.name);
        expected.push(EVERYTHING);
        assert_eq!(logged_since(&client, head).await, expected, "{}", case.name);
    }
}

/// Without the trigger that numbers, an inspection cannot log either: it says so, and logs once it can.
#[tokio::test]
async fn a_missing_numbering_is_a_problem_until_it_is_back() {
    let database = Database::create().await;
    let client = database.client().await;
    let head = head_seq(&client).await;
    run(
        &client,
        "ALTER TABLE hallpass.log_pending DISABLE TRIGGER number_entry",
    )
    .await;
    run(&client, "INSERT INTO permission_roles VALUES ('chair', 9)").await;
    assert_eq!(
        lines(&client, INSPECT).await,
        [
            "trigger number_entry on hallpass.log_pending is not ENABLE ALWAYS: changes go unrecorded"
        ]
    );
    assert_eq!(logged_since(&client, head).await, [""; 0]);
    run(
        &client,
        "ALTER TABLE hallpass.log_pending ENABLE ALWAYS TRIGGER number_entry",
    )
    .await;
    assert_eq!(lines(&client, INSPECT).await, [""; 0]);
    assert_eq!(logged_since(&client, head).await, [EVERYTHING]);
}

/// It makes no decision, so nothing of the log is doubted when it is back.
#[tokio::test]
async fn a_trigger_that_tells_of_no_change_of_the_keys_is_a_problem_until_it_does() {
    let database = Database::create().await;
    let client = database.client().await;
    let head = head_seq(&client).await;
    run(
        &client,
        "ALTER TABLE hallpass.api_keys DISABLE TRIGGER api_keys_changed",
    )
    .await;
    assert_eq!(
        lines(&client, INSPECT).await,
        [
            "trigger api_keys_changed on hallpass.api_keys is not ENABLE ALWAYS: changes go unrecorded"
        ]
    );
    run(
        &client,
        "ALTER TABLE hallpass.api_keys ENABLE ALWAYS TRIGGER api_keys_changed",
    )
    .await;
    assert_eq!(lines(&client, INSPECT).await, [""; 0]);
    assert_eq!(logged_since(&client, head).await, [""; 0]);
}

/// A sequence behind the log would give a number away that the log has, or one below its head.
#[tokio::test]
async fn a_numbering_sequence_behind_the_log_is_repaired() {
    for set_back in [
        "SELECT setval('hallpass.log_seq', 1)",
        "SELECT setval('hallpass.log_seq', (SELECT max(seq) - 1 FROM hallpass.log))",
        // The next number is the head's.
        "SELECT setval('hallpass.log_seq', (SELECT max(seq) FROM hallpass.log), false)",
        "ALTER SEQUENCE hallpass.log_seq RESTART WITH 2",
    ] {
        let database = Database::create().await;
        let client = database.client().await;
        run(&client, "INSERT INTO organizations (name) VALUES ('a'); INSERT INTO organizations (name) VALUES ('b')").await;
        run(&client, set_back).await;
        let head = head_seq(&client).await;
        assert_eq!(lines(&client, INSPECT).await, [""; 0], "{set_back}");
        // Writers go on, all at once.
        let mut writers = JoinSet::new();
        for writer in 0..4 {
            let client = database.client().await;
            writers.spawn(async move {
                for _ in 0..5 {
                    run(
                        &client,
                        &format!("INSERT INTO organizations (name) VALUES ('{writer}')"),
                    )
                    .await;
                }
            });
        }
        writers.join_all().await;
        assert_eq!(lines(&client, INSPECT).await, [""; 0], "{set_back}");
        let since =
            format!("SELECT count(*), min(seq) > {head} FROM hallpass.log WHERE seq > {head}");
        assert_eq!(lines(&client, &since).await, ["20 | t"], "{set_back}");
    }
}

/// The repair waits for whoever is just numbering, and does not go below what that one has drawn.
#[tokio::test]
async fn a_repair_waits_for_the_commit_lock() {
    let database = Database::create().await;
    let (client, writer, observer) = (
        database.client().await,
        database.client().await,
        database.client().await,
    );
    run(&client, "INSERT INTO organizations (name) VALUES ('a'); INSERT INTO organizations (name) VALUES ('b')").await;
    let head = head_seq(&client).await;
    // Numbered, not committed: it holds the lock.
    run(
        &writer,
        "BEGIN; INSERT INTO organizations (name) VALUES ('c'); SET CONSTRAINTS ALL IMMEDIATE",
    )
    .await;
    run(&client, "SELECT setval('hallpass.log_seq', 1)").await;
    let (inspector, holder) = (pid(&client).await, pid(&writer).await);
    let inspecting = tokio::spawn(async move { lines(&client, INSPECT).await });
    wait_until_blocked(&observer, inspector, holder).await;
    run(&writer, "COMMIT").await;
    assert_eq!(inspecting.await.unwrap(), [""; 0]);
    run(&observer, "INSERT INTO organizations (name) VALUES ('d')").await;
    assert_eq!(head_seq(&observer).await, head + 2);
}

/// An owner whom row-level security binds reads no memberships: everyone would be NOT_A_MEMBER.
#[tokio::test]
async fn row_level_security_that_binds_the_owner_is_a_problem() {
    let database = Database::empty().await;
    let client = database.client().await;
    let name = value(&client, "SELECT current_database()").await;
    run(
        &client,
        &format!(
            "DO $$ BEGIN CREATE ROLE inspect_owner LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
             ALTER DATABASE {name} OWNER TO inspect_owner; ALTER SCHEMA public OWNER TO inspect_owner"
        ),
    )
    .await;
    let url = database.url.replace("user=hallpass", "user=inspect_owner");
    migrate(&url.parse().unwrap(), |_| {}).await.unwrap();
    assert_eq!(lines(&client, INSPECT).await, [""; 0]);
    run(&client, "ALTER TABLE profiles ENABLE ROW LEVEL SECURITY").await;
    assert_eq!(
        lines(&client, INSPECT).await,
        [""; 0],
        "does not bind the owner"
    );
    run(&client, "ALTER TABLE profiles FORCE ROW LEVEL SECURITY").await;
    assert_eq!(
        lines(&client, INSPECT).await,
        ["row-level security on public.profiles hides rows from inspect_owner"]
    );
    run(&client, "ALTER TABLE profiles NO FORCE ROW LEVEL SECURITY").await;
    assert_eq!(lines(&client, INSPECT).await, [""; 0]);
}

/// Nobody but the owner and the service may look: an inspection writes into the log.
#[tokio::test]
async fn an_inspection_is_not_for_strangers() {
    let database = Database::create().await;
    let client = database.client().await;
    run(
        &client,
        "DO $$ BEGIN CREATE ROLE inspect_stranger; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
         SET ROLE inspect_stranger",
    )
    .await;
    let refused = client.batch_execute(INSPECT).await.unwrap_err();
    assert_eq!(sqlstate(&refused), "42501");
}
