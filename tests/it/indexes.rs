//! Each index and the SQL that it is there for, at 100,000 members: the real functions and statements are run, and
//! PostgreSQL's own counters say which indexes they read.

use hallpass::store::{audit::forward::BEFORE_TIME, log::READ_PAGE};
use tokio_postgres::Client;

use crate::{
    database::Database,
    sql::{lines, run, value},
};

/// 2,000 organizations, the first with 20,000 members, and every eighth permission set. Three permissions are enough:
/// what grows is the members.
const FILL: &str = "
DELETE FROM organization_permission_templates WHERE module_name <> 'documents';
INSERT INTO organizations (id, name) SELECT md5('o' || i)::uuid, 'School ' || i FROM generate_series(1, 2000) i;
INSERT INTO profiles (user_id, org_id, role, first_name, last_name)
SELECT md5('u' || i)::uuid, md5('o' || CASE WHEN i <= 20000 THEN 1 ELSE 2 + i % 1999 END)::uuid,
       CASE WHEN i % 100 = 0 THEN 'admin' WHEN i % 10 = 1 THEN 'committee_lead' ELSE 'volunteer' END, 'Ann', 'Archer'
FROM generate_series(1, 100000) i;
INSERT INTO organization_permissions (org_id, permission_key, min_role_required, specific_users)
SELECT o.id, t.permission_key, 'admin', ARRAY[md5('u1')::uuid]
FROM organizations o, organization_permission_templates t WHERE abs(hashtext(o.id || t.permission_key)) % 8 = 0;
DO $$ BEGIN
    FOR i IN 2..2000 LOOP
        UPDATE profiles SET role = 'board_member' WHERE user_id = md5('u' || 20000 + i)::uuid;
    END LOOP;
END $$";

/// Everything whose use is shown, found by no scan of a whole table.
struct Consumer {
    sql: &'static str,
    indexes: &'static [&'static str],
}

const MEMBER: &str = "idx_profiles_user_org";
const OVERRIDE: &str = "organization_permissions_org_id_permission_key_key";

const CONSUMERS: &[Consumer] = &[
    // The service.
    Consumer {
        sql: "SELECT hallpass.load(ARRAY[md5('o1')::uuid], ARRAY[md5('u7')::uuid], false)",
        indexes: &[MEMBER, OVERRIDE, "log_pkey"],
    },
    Consumer {
        sql: "SELECT hallpass.load(ARRAY[md5('o1')::uuid], ARRAY[md5('u7')::uuid], true)",
        indexes: &["user_permission_matrix_key", "log_org_pkey"],
    },
    Consumer {
        sql: "SELECT hallpass.explain(md5('o1')::uuid, md5('u7')::uuid, 'can_view_documents')",
        indexes: &[MEMBER, OVERRIDE, "log_pkey"],
    },
    Consumer {
        sql: "SELECT hallpass.permission_holders(md5('o1')::uuid, 'can_delete_documents', md5('u7')::uuid, 101)",
        indexes: &["idx_profiles_org_role", OVERRIDE],
    },
    Consumer {
        sql: "SELECT hallpass.user_organizations(md5('u7')::uuid, NULL, md5('o1')::uuid, 101)",
        indexes: &[MEMBER],
    },
    Consumer {
        sql: "SELECT hallpass.organization_summary(md5('o1')::uuid, false)",
        indexes: &["organizations_pkey", OVERRIDE],
    },
    Consumer {
        sql: "SELECT hallpass.organization_summary(md5('o1')::uuid, true)",
        indexes: &["org_permission_summary_key", "log_org_pkey"],
    },
    Consumer {
        sql: "SELECT hallpass.next_members(md5('o1')::uuid, md5('u7')::uuid, 1000)",
        indexes: &["profiles_org_id_user_id_key"],
    },
    // The application: its functions, policies and pages.
    Consumer {
        sql: "SELECT public.user_has_org_permission(md5('u7')::uuid, 'can_view_documents')",
        indexes: &[MEMBER, OVERRIDE],
    },
    Consumer {
        sql: "SELECT public.user_has_org_permission_enhanced(md5('u7')::uuid, 'can_view_documents')",
        indexes: &[MEMBER, "user_permission_matrix_key"],
    },
    Consumer {
        sql: "SELECT public.get_user_permissions_bulk(md5('u7')::uuid, 'documents')",
        indexes: &[MEMBER, OVERRIDE],
    },
    Consumer {
        sql: "SELECT permission_key, module_name, user_has_permission FROM public.user_permission_matrix
              WHERE user_id = md5('u7')::uuid AND org_id = md5('o1')::uuid AND is_enabled",
        indexes: &["user_permission_matrix_key"],
    },
    Consumer {
        sql: "SELECT * FROM public.org_permission_summary WHERE org_id = md5('o1')::uuid",
        indexes: &["org_permission_summary_key"],
    },
    // Every transaction that changes something, when it reads.
    Consumer {
        sql: "UPDATE profiles SET role = 'admin' WHERE org_id = md5('o1')::uuid AND user_id = md5('u7')::uuid;
              SELECT hallpass.has_pending()",
        indexes: &["log_pending_xid"],
    },
];

/// The tables that are small whatever the number of members: the ladder, the catalog, hallpass's own rows.
pub(crate) const LARGE_TABLES_SCANNED: &str = "
SELECT c.oid::regclass FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
WHERE nspname IN ('public', 'hallpass') AND relkind IN ('r', 'm') AND reltuples > 1000
  AND pg_stat_get_xact_numscans(c.oid) > 0 ORDER BY 1";

/// Of a partitioned table's index, its partitions' count.
pub(crate) const INDEXES_READ: &str = "
SELECT DISTINCT coalesce(inhparent, c.oid)::regclass::text
FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace LEFT JOIN pg_inherits ON inhrelid = c.oid
WHERE nspname IN ('public', 'hallpass') AND relkind = 'i' AND pg_stat_get_xact_numscans(c.oid) > 0 ORDER BY 1";

/// In a transaction of its own, whose counters begin at 0, and which is undone.
async fn expect(client: &Client, what: &str, query: impl AsyncFnOnce(), indexes: &[&str]) {
    run(client, "BEGIN").await;
    query().await;
    let scanned = lines(client, LARGE_TABLES_SCANNED).await;
    let read = lines(client, INDEXES_READ).await;
    run(client, "ROLLBACK").await;
    assert_eq!(scanned, [""; 0], "{what} scans");
    for index in indexes {
        let is_read = read
            .iter()
            .any(|name| name.rsplit('.').next() == Some(index));
        assert!(is_read, "{what} reads {read:?}, not {index}");
    }
}

#[tokio::test]
async fn every_index_has_a_consumer_that_uses_it() {
    let database = Database::create().await;
    let client = database.client().await;
    run(&client, FILL).await;
    run(&client, "SELECT refresh_permission_materialized_views()").await;
    // Without statistics a planner guesses; a running database has them.
    run(&client, "VACUUM ANALYZE").await;
    for Consumer { sql, indexes } in CONSUMERS {
        expect(&client, sql, async || run(&client, sql).await, indexes).await;
    }

    // A page of the feed, from the middle of the log.
    let from: i64 = value(&client, "SELECT max(seq) - 1000 FROM hallpass.log")
        .await
        .parse()
        .unwrap();
    let page = async || {
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
            [&vec![0_i64], &vec![0_i32], &from, &i32::MAX, &100_i64];
        assert_eq!(
            client.query(READ_PAGE, &parameters).await.unwrap().len(),
            100
        );
    };
    expect(
        &client,
        "a page",
        page,
        &["log_pkey", "log_org_pkey", "permission_audit_log_time"],
    )
    .await;

    // Where a stream that begins at a time begins. The lists of the audit log are in `audit_list`.
    let since = async || {
        let now = client.query_one("SELECT now()", &[]).await.unwrap();
        let now: std::time::SystemTime = now.get(0);
        client.query(BEFORE_TIME, &[&now]).await.unwrap();
    };
    expect(&client, "since", since, &["log_committed_at", "log_pkey"]).await;

    // No other index is made, but for the keys of small tables.
    let mut used: Vec<&str> = CONSUMERS
        .iter()
        .flat_map(|consumer| consumer.indexes)
        .copied()
        .collect();
    used.extend([
        "permission_audit_log_time",
        "permission_audit_log_organization",
        "permission_audit_log_affected_user",
        "permission_audit_log_actor",
        "permission_audit_log_permission",
        "log_entry",
        "log_committed_at",
        "organization_permission_templates_permission_key_key",
    ]);
    let without_consumer = lines(&client, SECONDARY_INDEXES)
        .await
        .into_iter()
        .filter(|name| !used.contains(&name.as_str()));
    assert_eq!(without_consumer.collect::<Vec<_>>(), [""; 0]);
}

/// All but primary keys, and the indexes of partitions, which are their parents'.
const SECONDARY_INDEXES: &str = "
SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = indexrelid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE nspname IN ('public', 'hallpass') AND NOT indisprimary
  AND NOT EXISTS (SELECT FROM pg_inherits WHERE inhrelid = c.oid) ORDER BY 1";
