//! The audit log through the wire: every stream gets what a plain query of the tables gives, in order and whole.

use std::time::{Duration, SystemTime};

use hallpass_client::{
    tonic::{Code, Status},
    v1::{
        AuditFilter, ListAuditEntriesRequest, StreamAuditEntriesRequest,
        audit_service_client::AuditServiceClient, stream_audit_entries_request::Start,
    },
};
use tonic_types::StatusExt;

use crate::{
    consumer::{CHANGES, changed, cursor, entries_where, filters, read, serve},
    names::id,
    server::{head, run_sql, seq, set_role, within},
    sql::{lines, run, value},
};

#[tokio::test]
async fn a_stream_from_the_earliest_is_the_log() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let read = read(
        &server,
        &client,
        Start::Earliest(true),
        AuditFilter::default(),
    )
    .await;
    let expected = entries_where(&client, "true").await;
    assert!(expected.len() > 30);
    assert_eq!(read.lines(), expected);
    assert_eq!(read.gaps, []);
}

#[tokio::test]
async fn a_stream_goes_on_from_every_cursor() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let all = entries_where(&client, "true").await;
    let from = async |start| {
        read(&server, &client, start, AuditFilter::default())
            .await
            .lines()
    };
    assert_eq!(from(cursor("0-0")).await, all);
    for (index, line) in all.iter().enumerate() {
        let own = line.split('|').next().unwrap();
        assert_eq!(from(cursor(own)).await, all[index + 1..], "{own}");
        // Without its row it stands behind the whole entry.
        let (entry, _) = own.split_once('.').unwrap();
        let rest = entries_where(&client, &format!("l.seq > {}", seq(entry))).await;
        assert_eq!(from(cursor(entry)).await, rest, "{entry}");
    }
}

#[tokio::test]
async fn a_stream_begins_with_what_was_committed_since() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let times = "SELECT (extract(epoch FROM committed_at) * 1000000)::bigint FROM hallpass.log ORDER BY seq";
    for micros in lines(&client, times).await {
        for micros in [
            micros.parse::<u64>().unwrap(),
            micros.parse::<u64>().unwrap() + 1,
        ] {
            let time = SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
            let since = Start::Since(time.into());
            let read = read(&server, &client, since, AuditFilter::default()).await;
            let condition = format!("extract(epoch FROM l.committed_at) * 1000000 >= {micros}");
            assert_eq!(read.lines(), entries_where(&client, &condition).await);
            assert_eq!(read.gaps, []);
        }
    }
}

#[tokio::test]
async fn a_stream_from_now_has_what_comes() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let before = head(&client).await;
    let mut read = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    assert_eq!(read.lines(), [""; 0]);
    for change in CHANGES {
        run_sql(&client, change).await;
        read.until(head(&client).await).await;
    }
    let expected = entries_where(&client, &format!("l.seq > {before}")).await;
    assert_eq!(read.lines(), expected);
}

#[tokio::test]
async fn a_filter_chooses_of_the_past_and_of_what_comes() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let mut streams = Vec::new();
    for (filter, condition) in filters() {
        let read = read(&server, &client, Start::Earliest(true), filter.clone()).await;
        assert_eq!(
            read.lines(),
            entries_where(&client, &condition).await,
            "{condition}"
        );
        streams.push((read, condition));
    }
    // The tables are as they were, but for what was emptied.
    for change in CHANGES {
        run_sql(&client, change).await;
    }
    for (mut read, condition) in streams {
        read.until(head(&client).await).await;
        assert_eq!(
            read.lines(),
            entries_where(&client, &condition).await,
            "{condition}"
        );
    }
}

#[tokio::test]
async fn an_idle_stream_gets_on_every_second() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let (nothing, _) = filters().swap_remove(8);
    let mut consumer = read(&server, &client, Start::Now(true), nothing).await;
    let second = Duration::from_secs(1);
    for round in 0..5 {
        let (checkpoints, before) = (consumer.checkpoints, head(&client).await);
        // What does not fit moves the cursor all the same.
        let role = ["admin", "volunteer"][round % 2];
        set_role(&client, "lincoln", "ann", role).await;
        within("a checkpoint", second, async {
            while consumer.checkpoints == checkpoints {
                consumer.next().await.unwrap();
            }
        })
        .await;
        consumer.until(before + 1).await;
    }
    assert_eq!(consumer.lines(), [""; 0]);
}

#[tokio::test]
async fn a_malformed_request_names_what_is_wrong() {
    let (database, _client) = changed().await;
    let server = serve(&database).await;
    let cases = [
        (Some(cursor("")), "cursor"),
        (Some(cursor("12")), "cursor"),
        (Some(cursor("12-5f0c9ae1.0")), "cursor"),
        (Some(cursor("12-5f0c9ae1.x")), "cursor"),
        (Some(cursor("12-5f0c9ae1.1.1")), "cursor"),
        (Some(cursor("12-5f0c9ae1.99999999999")), "cursor"),
        (Some(cursor("0-0.1")), "cursor"),
        (Some(Start::Earliest(false)), "earliest"),
        (Some(Start::Now(false)), "now"),
        (
            Some(Start::Since(prost_types::Timestamp {
                seconds: i64::MAX,
                nanos: 0,
            })),
            "since",
        ),
        (None, "start"),
    ];
    for (start, field) in cases {
        let request = StreamAuditEntriesRequest {
            start: start.clone(),
            filter: None,
        };
        let mut client = AuditServiceClient::new(server.channel.clone());
        let status = client.stream_audit_entries(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{start:?}");
        assert_eq!(violated(&status), [field], "{start:?}");
    }
    let wrong = AuditFilter {
        organization_id: "x".to_owned(),
        affected_user_id: "x".to_owned(),
        actor_user_id: "x".to_owned(),
        permission: "x".repeat(300),
        table: "x".repeat(300),
        change_type: 99,
    };
    let request = ListAuditEntriesRequest {
        filter: Some(wrong),
        page_size: -1,
        page_token: "x".to_owned(),
    };
    let mut client = AuditServiceClient::new(server.channel.clone());
    let status = client.list_audit_entries(request).await.unwrap_err();
    let mut fields = violated(&status);
    fields.sort();
    assert_eq!(
        fields,
        [
            "filter.actor_user_id",
            "filter.affected_user_id",
            "filter.change_type",
            "filter.organization_id",
            "filter.permission",
            "filter.table",
            "page_size",
            "page_token"
        ]
    );
}

pub(crate) fn violated(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    violations.iter().map(|v| v.field.clone()).collect()
}

#[tokio::test]
async fn an_import_comes_in_pages_and_goes_on_in_its_middle() {
    const ROWS: usize = 100_000;
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let mut live = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    let import = format!(
        "INSERT INTO profiles (org_id, user_id, role)
         SELECT '{}', md5(i::text)::uuid, 'volunteer' FROM generate_series(1, {ROWS}) i",
        id("lincoln")
    );
    run(&client, &import).await;
    let last = head(&client).await;
    live.until(last).await;
    let expected = entries_where(&client, &format!("l.seq = {last}")).await;
    assert!(live.lines() == expected, "{} of {ROWS}", live.entries.len());
    let middle = &live.entries[ROWS / 2].cursor;
    let rest = read(&server, &client, cursor(middle), AuditFilter::default()).await;
    assert!(rest.lines() == expected[ROWS / 2 + 1..], "{rest:?}");
}

/// Each value names 20,000 users, so that a few make a message larger than clients take.
#[tokio::test]
async fn large_values_come_in_messages_that_clients_take() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let before = head(&client).await;
    let large = format!(
        "INSERT INTO organization_permissions (org_id, permission_key, specific_users)
         SELECT '{0}', permission_key, ARRAY(SELECT md5(permission_key || i)::uuid FROM generate_series(1, 20000) i)
         FROM organization_permission_templates;
         UPDATE organization_permissions SET specific_users = specific_users[2:] WHERE org_id = '{0}'",
        id("lincoln")
    );
    run(&client, &large).await;
    let from = value(&client, "SELECT seq || '-' || lpad(to_hex(uid), 8, '0') FROM hallpass.log ORDER BY seq DESC OFFSET 2 LIMIT 1").await;
    let read = read(&server, &client, cursor(from), AuditFilter::default()).await;
    let expected = entries_where(&client, &format!("l.seq > {before}")).await;
    assert!(expected.len() > 20);
    assert!(read.lines() == expected, "{read:?}");
}
