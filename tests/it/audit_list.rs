//! Lists of the audit log through the wire, and by which indexes they are read.

use hallpass::store::audit::{AuditFilter as StoreFilter, list::SCAN_MAX};
use hallpass_client::{
    tonic::{Code, Status},
    v1::{
        AuditEntry, AuditFilter, ListAuditEntriesRequest, ListAuditEntriesResponse,
        audit_service_client::AuditServiceClient,
    },
};
use tokio_postgres::{Client, types::ToSql};
use uuid::Uuid;

use crate::{
    audit::violated,
    consumer::{changed, entries_where, filters, line},
    database::Database,
    indexes::{INDEXES_READ, LARGE_TABLES_SCANNED},
    names::id,
    server::{Server, config, run_sql},
    sql::{lines, run, value},
};

async fn page(
    server: &Server,
    filter: &AuditFilter,
    page_size: i32,
    page_token: &str,
) -> Result<ListAuditEntriesResponse, Status> {
    let request = ListAuditEntriesRequest {
        filter: Some(filter.clone()),
        page_size,
        page_token: page_token.to_owned(),
    };
    let mut client = AuditServiceClient::new(server.channel.clone());
    Ok(client.list_audit_entries(request).await?.into_inner())
}

/// All pages, each but the last of this size.
async fn list(server: &Server, filter: &AuditFilter, page_size: i32) -> Vec<AuditEntry> {
    let mut entries = Vec::new();
    let mut token = String::new();
    loop {
        let page = page(server, filter, page_size, &token).await.unwrap();
        let count = i32::try_from(page.entries.len()).unwrap();
        entries.extend(page.entries);
        token = page.next_page_token;
        if token.is_empty() {
            assert!(count <= page_size);
            return entries;
        }
        assert_eq!(count, page_size);
    }
}

#[tokio::test]
async fn pages_are_the_log_from_its_end() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    for (filter, condition) in filters() {
        // Nothing here was committed in another order than begun.
        let mut expected = entries_where(&client, &condition).await;
        expected.reverse();
        for page_size in [1, 2, 7, 1000] {
            let listed = list(&server, &filter, page_size).await;
            let listed: Vec<String> = listed.iter().map(line).collect();
            assert_eq!(listed, expected, "{condition} in pages of {page_size}");
        }
    }
}

#[tokio::test]
async fn what_is_committed_meanwhile_moves_no_page() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let any = AuditFilter::default();
    let before = list(&server, &any, 1000).await;
    let first = page(&server, &any, 5, "").await.unwrap();
    run_sql(&client, "UPDATE profiles SET role = 'admin'").await;
    let second = page(&server, &any, 1000, &first.next_page_token).await;
    let both: Vec<AuditEntry> = (first.entries.into_iter())
        .chain(second.unwrap().entries)
        .collect();
    assert_eq!(both, before);
}

#[tokio::test]
async fn a_token_is_of_its_filter() {
    let (database, _client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let filters = filters();
    let (any, _) = &filters[0];
    let token = page(&server, any, 2, "").await.unwrap().next_page_token;
    for (other, condition) in &filters[1..] {
        let refused = page(&server, other, 2, &token).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{condition}");
        assert_eq!(violated(&refused), ["page_token"], "{condition}");
    }
    assert!(page(&server, any, 3, &token).await.is_ok());
    let garbage = [
        token.to_uppercase(),
        token[1..].to_owned(),
        format!("{token}0"),
        format!("1{}", "f".repeat(72)),
        "é".repeat(40),
    ];
    for garbage in garbage {
        let refused = page(&server, any, 2, &garbage).await.unwrap_err();
        assert_eq!(violated(&refused), ["page_token"], "{garbage}");
    }
}

/// Retention takes the log first, and what was there before an uninstall has never been in this one.
#[tokio::test]
async fn rows_that_the_log_no_longer_has_are_listed_without_a_cursor() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let any = AuditFilter::default();
    let before = list(&server, &any, 1000).await;
    run(&client, "DELETE FROM hallpass.log WHERE seq < 10").await;
    let after = list(&server, &any, 1000).await;
    let mut without = 0;
    for (mut before, after) in before.into_iter().zip(after) {
        if after.cursor.is_empty() {
            without += 1;
            before.cursor = String::new();
            before.commit_time = None;
            before.transaction_id = 0;
        }
        assert_eq!(before, after);
    }
    assert_eq!(without, 9);
}

/// Values that are far larger than what clients take in one message.
#[tokio::test]
async fn a_page_of_large_values_is_short() {
    let (database, client) = changed().await;
    let server = Server::start(config(&database.url)).await;
    let large = format!(
        "INSERT INTO organization_permissions (org_id, permission_key, specific_users)
         SELECT '{}', permission_key, ARRAY(SELECT md5(permission_key || i)::uuid FROM generate_series(1, 20000) i)
         FROM organization_permission_templates",
        id("lincoln")
    );
    run(&client, &large).await;
    let any = AuditFilter::default();
    let mut listed = Vec::new();
    let mut token = String::new();
    loop {
        let page = page(&server, &any, 1000, &token).await.unwrap();
        assert!(!page.entries.is_empty());
        listed.extend(page.entries.iter().map(line));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let mut expected = entries_where(&client, "true").await;
    expected.reverse();
    assert!(listed == expected, "{} entries", listed.len());
}

/// Rows of 200 organizations, 20,000 users and 1,000 actors, straight into the log, by one statement each table: as
/// they lie after years, but for the months, since that makes no difference to how one partition is read.
pub(crate) async fn fill(client: &Client, rows: u32) {
    let fill = format!(
        "INSERT INTO permission_audit_log
             (entry_id, n, created_at, org_id, affected_user_id, changed_by, permission_key, table_name, change_type,
              actor_source, database_role, database_login, old_values, new_values)
         SELECT i, 1, now() - make_interval(secs => {rows} - i), md5('o' || i % 200)::uuid, md5('u' || i % 20000)::uuid,
                md5('a' || i % 1000)::uuid, 'p' || i % 50, CASE i % 2 WHEN 0 THEN 'profiles' ELSE 'organizations' END,
                'UPDATE', 'SETTINGS', 'x', 'x', '{{\"role\": \"admin\"}}', '{{\"role\": \"volunteer\"}}'
         FROM generate_series(1, {rows}) i;
         INSERT INTO hallpass.log (seq, uid, entry_id, xid, created_at, committed_at)
         SELECT entry_id, 1, entry_id, '1', created_at, created_at FROM permission_audit_log;
         SELECT setval('hallpass.log_seq', {rows}), setval('hallpass.entry_id', {rows})"
    );
    run(client, &fill).await;
    run(
        client,
        "VACUUM ANALYZE hallpass.log, public.permission_audit_log",
    )
    .await;
}

/// The rows that index scans have brought from the audit log.
const ROWS_FETCHED: &str = "
SELECT coalesce(sum(pg_stat_get_xact_tuples_fetched(c.oid)), 0) FROM pg_class c
WHERE c.oid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'public.permission_audit_log'::regclass)";

/// Every statement of the lists reads the rows of its page by the index meant for it, and sorts nothing else.
async fn expect_indexes(client: &Client, rows: u32) {
    let uuid = |name: &str| -> Option<Uuid> { Some(md5(name)) };
    let text = |text: &str| Some(text.to_owned());
    let any = StoreFilter::default;
    let cases = [
        (any(), "time"),
        (
            StoreFilter {
                organizations: Some(vec![md5("o7")]),
                ..any()
            },
            "organization",
        ),
        (
            StoreFilter {
                organizations: Some(vec![md5("o7"), md5("o8")]),
                ..any()
            },
            "time",
        ),
        (
            StoreFilter {
                affected_user: uuid("u7"),
                organizations: Some(vec![md5("o7")]),
                ..any()
            },
            "affected_user",
        ),
        (
            StoreFilter {
                actor: uuid("a7"),
                permission: text("p7"),
                ..any()
            },
            "actor",
        ),
        (
            StoreFilter {
                permission: text("p7"),
                table: text("organizations"),
                ..any()
            },
            "permission",
        ),
        (
            StoreFilter {
                table: text("nothing"),
                change_type: text("DELETE"),
                ..any()
            },
            "time",
        ),
    ];
    for plan in ["force_custom_plan", "force_generic_plan"] {
        for (filter, index) in &cases {
            let what = format!("{filter:?} {plan}");
            run(
                client,
                &format!("BEGIN; SET LOCAL plan_cache_mode = {plan}"),
            )
            .await;
            let after = value(client, "SELECT now() - interval '1 hour'").await;
            let statement = client.prepare(filter.list_sql()).await.unwrap();
            let after: std::time::SystemTime = client
                .query_one(&format!("SELECT '{after}'::timestamptz"), &[])
                .await
                .unwrap()
                .get(0);
            let parameters: [&(dyn ToSql + Sync); 12] = [
                &filter.organizations,
                &filter.affected_user,
                &filter.actor,
                &filter.permission,
                &filter.table,
                &filter.change_type,
                &after,
                &0_i64,
                &0_i32,
                &i64::from(SCAN_MAX),
                &100_i64,
                &i64::MAX,
            ];
            // The counters may still have what the transaction before has read.
            let before: u32 = value(client, ROWS_FETCHED).await.parse().unwrap();
            client.query(&statement, &parameters).await.unwrap();
            let scanned = lines(client, LARGE_TABLES_SCANNED).await;
            let read = lines(client, INDEXES_READ).await;
            let after: u32 = value(client, ROWS_FETCHED).await.parse().unwrap();
            let fetched = after - before;
            run(client, "ROLLBACK").await;
            assert_eq!(scanned, [""; 0], "{what} scans");
            let index = format!("permission_audit_log_{index}");
            assert!(read.contains(&index), "{what} reads {read:?}");
            assert!(
                fetched <= u32::from(SCAN_MAX) && fetched < rows,
                "{what} reads {fetched} rows"
            );
        }
    }
}

fn md5(text: &str) -> Uuid {
    MD5S.iter()
        .find(|(name, _)| *name == text)
        .map(|(_, id)| id.parse().unwrap())
        .unwrap()
}

/// `SELECT md5('o7')::uuid` and so on.
const MD5S: [(&str, &str); 4] = [
    ("o7", "5e749466-2ea0-4ad8-e731-cc25c6140eb6"),
    ("o8", "6a465704-5b01-3f0d-50a8-0b71b61a5bfe"),
    ("u7", "6bce05df-9831-da77-99a5-edc4f7abfbec"),
    ("a7", "c6925622-38d8-c12c-3243-4c50b96d56ae"),
];

#[tokio::test]
async fn lists_read_their_indexes() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client, 50_000).await;
    expect_indexes(&client, 50_000).await;
}

#[tokio::test]
#[ignore = "fills a million rows: make audit-plans"]
async fn lists_read_their_indexes_of_a_million_rows() {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client, 1_000_000).await;
    expect_indexes(&client, 1_000_000).await;
}
