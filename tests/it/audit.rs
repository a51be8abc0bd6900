//! The audit log through the wire: every stream gets what a plain query of the tables gives, in order and whole.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use hallpass_client::{
    tonic::{Code, Status, Streaming, transport::Channel},
    v1::{
        AuditEntry, AuditFilter, AuditGap, ChangeType, ListAuditEntriesRequest,
        StreamAuditEntriesRequest, StreamAuditEntriesResponse,
        audit_service_client::AuditServiceClient, stream_audit_entries_request::Start,
        stream_audit_entries_response::Event,
    },
};
use tokio_postgres::Client;
use tonic_types::StatusExt;

use crate::{
    database::{Database, eventually},
    names::id,
    server::{Server, config, fill, head, run_sql, seq, set_role, within},
    sql::{lines, run, value},
};

/// What no event here should take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Every field of every entry that is in the log, in order. `changed_fields` in another way than the service's.
const ENTRIES: &str = "
SELECT array_to_string(ARRAY[
    l.seq || '-' || lpad(to_hex(l.uid), 8, '0') || '.' || a.n, a.id::text, a.org_id::text, a.permission_key,
    a.affected_user_id::text, a.table_name, a.change_type, a.old_values::text, a.new_values::text,
    (SELECT string_agg(key, ',' ORDER BY key COLLATE \"C\")
     FROM (SELECT DISTINCT jsonb_object_keys(coalesce(old_values, '{}') || coalesce(new_values, '{}')) AS key) keys
     WHERE (old_values -> key) IS DISTINCT FROM (new_values -> key)),
    a.changed_by::text, a.changed_by_profile_id::text, a.actor_source, host(a.ip_address), a.user_agent, a.request_id,
    a.session_id, a.trace_id, a.database_role, a.database_login, host(a.client_address), a.application_name, l.xid::text,
    (extract(epoch FROM a.created_at) * 1000000)::bigint::text,
    (extract(epoch FROM l.committed_at) * 1000000)::bigint::text], '|', '')
FROM hallpass.log l JOIN public.permission_audit_log a ON (a.entry_id, a.created_at) = (l.entry_id, l.created_at)
WHERE ";
const IN_ORDER: &str = " ORDER BY l.seq, a.n";

/// Changes of every kind, from several actors, some of many rows and two of them in one transaction.
const CHANGES: &[&str] = &[
    "INSERT INTO organization_permissions (org_id, permission_key, min_role_required) VALUES (:lincoln, 'can_view_budget', 'admin')",
    "BEGIN; SELECT set_session_variables(:ann, :bob, :lincoln, 'req-1', '203.0.113.7', 'curl/8');
     UPDATE organization_permissions SET is_enabled = false, specific_users = ARRAY[:vic] WHERE org_id = :lincoln; COMMIT",
    "UPDATE profiles SET role = 'volunteer'",
    "BEGIN; SELECT set_config('request.jwt.claims', format('{\"sub\":\"%s\",\"session_id\":\"s-9\"}', :bob), true);
     INSERT INTO organization_permissions (org_id, permission_key, is_enabled) VALUES (:franklin, 'can_view_budget', true);
     UPDATE profiles SET role = 'admin' WHERE org_id = :franklin; COMMIT",
    "UPDATE profiles SET org_id = :franklin, user_id = :eve WHERE org_id = :lincoln AND user_id = :pat",
    "UPDATE organization_permission_templates SET default_min_role = 'admin' WHERE permission_key = 'can_view_budget'",
    "UPDATE permission_roles SET rank = 9 WHERE role_key = 'admin'",
    "DELETE FROM organization_permissions WHERE org_id = :lincoln",
    "TRUNCATE organization_permissions",
    "UPDATE profiles SET role = 'committee_lead' WHERE user_id = :cam",
];

/// A database with all of [`CHANGES`] in it.
pub(crate) async fn changed() -> (Database, Client) {
    let database = Database::create().await;
    let client = database.client().await;
    fill(&client).await;
    for change in CHANGES {
        run_sql(&client, change).await;
    }
    (database, client)
}

/// What a query gives, as [`line`] prints it.
pub(crate) async fn entries_where(client: &Client, condition: &str) -> Vec<String> {
    lines(client, &format!("{ENTRIES}{condition}{IN_ORDER}")).await
}

/// An entry from the wire, as [`ENTRIES`] prints it.
pub(crate) fn line(entry: &AuditEntry) -> String {
    let micros = |time: Option<prost_types::Timestamp>| {
        time.map_or(String::new(), |time| {
            (time.seconds * 1_000_000 + i64::from(time.nanos) / 1_000).to_string()
        })
    };
    let change_type = entry.change_type().as_str_name();
    let actor_source = entry.actor_source().as_str_name();
    let transaction_id = entry.transaction_id.to_string();
    [
        &*entry.cursor,
        &entry.id,
        &entry.organization_id,
        &entry.permission,
        &entry.affected_user_id,
        &entry.table,
        change_type.trim_start_matches("CHANGE_TYPE_"),
        &entry.before,
        &entry.after,
        &entry.changed_fields.join(","),
        &entry.actor_user_id,
        &entry.actor_profile_id,
        actor_source.trim_start_matches("ACTOR_SOURCE_"),
        &entry.ip_address,
        &entry.user_agent,
        &entry.request_id,
        &entry.session_id,
        &entry.trace_id,
        &entry.database_role,
        &entry.database_login,
        &entry.client_address,
        &entry.application_name,
        &transaction_id,
        &micros(entry.transaction_time),
        &micros(entry.commit_time),
    ]
    .join("|")
}

pub(crate) fn cursor(cursor: impl Into<String>) -> Start {
    Start::Cursor(cursor.into())
}

/// One stream, and everything that it has said.
pub(crate) struct Consumer {
    stream: Streaming<StreamAuditEntriesResponse>,
    pub(crate) entries: Vec<AuditEntry>,
    pub(crate) gaps: Vec<AuditGap>,
    /// Of the last event.
    pub(crate) cursor: String,
    pub(crate) checkpoints: u64,
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} entries up to {}", self.entries.len(), self.cursor)
    }
}

impl Consumer {
    pub(crate) async fn start(
        channel: &Channel,
        start: Start,
        filter: AuditFilter,
    ) -> Result<Self, Status> {
        let request = StreamAuditEntriesRequest {
            start: Some(start),
            filter: Some(filter),
        };
        let mut client = AuditServiceClient::new(channel.clone());
        Ok(Self {
            stream: client.stream_audit_entries(request).await?.into_inner(),
            entries: Vec::new(),
            gaps: Vec::new(),
            cursor: String::new(),
            checkpoints: 0,
        })
    }

    /// Takes the next event.
    pub(crate) async fn next(&mut self) -> Result<(), Status> {
        let event = within("the next event", PATIENCE, self.stream.message()).await?;
        match event.expect("a stream ends with a status").event.unwrap() {
            Event::Entries(batch) => {
                self.cursor = batch.entries.last().unwrap().cursor.clone();
                self.entries.extend(batch.entries);
            }
            Event::Checkpoint(checkpoint) => {
                self.cursor = checkpoint.cursor;
                self.checkpoints += 1;
            }
            Event::Gap(gap) => {
                self.cursor.clone_from(&gap.to);
                self.gaps.push(gap);
            }
        }
        Ok(())
    }

    /// Takes events up to a checkpoint that says that everything up to the entry `last` has been sent.
    pub(crate) async fn until(&mut self, last: i64) {
        let mut checkpoints = 0;
        while self.cursor.is_empty()
            || self.checkpoints == checkpoints
            || seq(self.cursor.split('.').next().unwrap()) < last
        {
            checkpoints = self.checkpoints;
            self.next().await.unwrap();
        }
    }

    /// Takes events until the stream ends; says how, and its cursor.
    pub(crate) async fn until_it_ends(&mut self) -> (Code, String, String) {
        let ended = async {
            loop {
                if let Err(status) = self.next().await {
                    return status;
                }
            }
        };
        let status = within("the stream ends", 3 * PATIENCE, ended).await;
        let details = status.get_error_details();
        let info = details.error_info().cloned().unwrap();
        let cursor = info.metadata.get("cursor").cloned();
        (status.code(), info.reason, cursor.unwrap_or_default())
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.entries.iter().map(line).collect()
    }
}

/// Everything that there is from `start` on and fits.
async fn read(server: &Server, client: &Client, start: Start, filter: AuditFilter) -> Consumer {
    let mut consumer = Consumer::start(&server.channel, start, filter)
        .await
        .unwrap();
    consumer.until(head(client).await).await;
    consumer
}

async fn serve(database: &Database) -> Server {
    Server::start(config(&database.url)).await
}

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

/// Filters, and the same in SQL.
pub(crate) fn filters() -> Vec<(AuditFilter, String)> {
    let any = AuditFilter::default;
    let lincoln = id("lincoln").to_string();
    let (ann, cam) = (id("ann").to_string(), id("cam").to_string());
    let of_organization = AuditFilter {
        organization_id: lincoln.clone(),
        ..any()
    };
    let of_user = AuditFilter {
        affected_user_id: cam.clone(),
        ..any()
    };
    let by_actor = AuditFilter {
        actor_user_id: ann.clone(),
        ..any()
    };
    let of_permission = AuditFilter {
        permission: "can_view_budget".to_owned(),
        ..any()
    };
    let of_table = AuditFilter {
        table: "profiles".to_owned(),
        ..any()
    };
    let mut filters = vec![
        (any(), "true".to_owned()),
        (of_organization.clone(), format!("a.org_id = '{lincoln}'")),
        (of_user.clone(), format!("a.affected_user_id = '{cam}'")),
        (by_actor.clone(), format!("a.changed_by = '{ann}'")),
        (
            of_permission.clone(),
            "a.permission_key = 'can_view_budget'".to_owned(),
        ),
        (of_table.clone(), "a.table_name = 'profiles'".to_owned()),
        (
            AuditFilter {
                organization_id: lincoln.clone(),
                ..of_user
            },
            format!("a.affected_user_id = '{cam}' AND a.org_id = '{lincoln}'"),
        ),
        (
            AuditFilter {
                permission: "can_view_budget".to_owned(),
                organization_id: lincoln.clone(),
                ..by_actor
            },
            format!(
                "a.changed_by = '{ann}' AND a.permission_key = 'can_view_budget' AND a.org_id = '{lincoln}'"
            ),
        ),
        (
            AuditFilter {
                organization_id: id("nobody's").to_string(),
                ..any()
            },
            "false".to_owned(),
        ),
    ];
    for (change_type, name) in [
        (ChangeType::Insert, "INSERT"),
        (ChangeType::Update, "UPDATE"),
        (ChangeType::Delete, "DELETE"),
        (ChangeType::Truncate, "TRUNCATE"),
        (ChangeType::Unrecorded, "UNRECORDED"),
    ] {
        let of_type = AuditFilter {
            change_type: change_type.into(),
            ..any()
        };
        filters.push((of_type.clone(), format!("a.change_type = '{name}'")));
        let combined = AuditFilter {
            table: "organization_permissions".to_owned(),
            organization_id: lincoln.clone(),
            ..of_type
        };
        let sql = "a.table_name = 'organization_permissions' AND a.change_type";
        filters.push((
            combined,
            format!("a.org_id = '{lincoln}' AND {sql} = '{name}'"),
        ));
    }
    filters
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

/// Makes the log as if everything before the entry number `first` had been committed two years ago, and removes that.
async fn expire_before(client: &Client, first: i64) {
    let age = format!(
        "UPDATE hallpass.log SET committed_at = committed_at - interval '730 days' WHERE seq <= {first}"
    );
    run(client, &age).await;
    let step = "SELECT is_done FROM hallpass.remove_expired(365, 4)";
    while value(client, step).await == "f" {}
    let least = value(client, "SELECT min(seq) FROM hallpass.log").await;
    assert_eq!(least, first.to_string());
}

async fn ago(client: &Client, interval: &str) -> SystemTime {
    let sql = format!("SELECT now() - interval '{interval}'");
    client.query_one(&sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn what_retention_has_removed_is_a_gap_with_both_ends() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let all = entries_where(&client, "true").await;
    let seqs = lines(&client, "SELECT seq FROM hallpass.log ORDER BY seq").await;
    let first: i64 = seqs[seqs.len() / 2].parse().unwrap();
    let last_removed =
        "SELECT seq || '-' || lpad(to_hex(uid), 8, '0') FROM hallpass.log WHERE seq < ";
    let last_removed = value(
        &client,
        &format!("{last_removed} {first} ORDER BY seq DESC LIMIT 1"),
    )
    .await;
    let times = "SELECT committed_at - interval '1 hour' FROM hallpass.log ORDER BY seq LIMIT 1";
    run(&client, &format!("CREATE TABLE long_ago AS {times}")).await;
    expire_before(&client, first).await;
    let kept = entries_where(&client, "true").await;
    assert!(kept.len() < all.len());

    let from = async |start| read(&server, &client, start, AuditFilter::default()).await;
    // Who asks for what is kept has no gap, nor who had come to the end of what was removed.
    for start in [Start::Earliest(true), cursor(&*last_removed)] {
        let read = from(start.clone()).await;
        assert_eq!(
            (read.lines(), read.gaps),
            (kept.clone(), vec![]),
            "{start:?}"
        );
    }
    for line in &all[..all.len() - kept.len()] {
        let own = line.split('|').next().unwrap();
        let read = from(cursor(own)).await;
        assert_eq!(read.lines(), kept, "{own}");
        let gap = AuditGap {
            from: own.to_owned(),
            to: last_removed.clone(),
        };
        assert_eq!(read.gaps, [gap], "{own}");
        let again = from(cursor(&*read.gaps[0].to)).await;
        assert_eq!((again.lines(), again.gaps), (kept.clone(), vec![]));
    }
    let removed_since = ago(&client, "3 years").await;
    let read = from(Start::Since(removed_since.into())).await;
    assert_eq!(read.lines(), kept);
    let ends: Vec<_> = read.gaps.iter().map(|gap| (&*gap.from, &*gap.to)).collect();
    assert_eq!(ends, [("0-0", &*last_removed)]);
    // The entry that is kept though it is old was committed before: nothing since then is missing.
    let kept_since = ago(&client, "1 year").await;
    assert_eq!(from(Start::Since(kept_since.into())).await.gaps, []);
    // A cursor that was never of this log is nobody's gap once it is as new as what is kept.
    let foreign = format!("{first}-00000000");
    let consumer = Consumer::start(&server.channel, cursor(foreign), AuditFilter::default()).await;
    let (code, reason, _) = consumer.unwrap().until_it_ends().await;
    assert_eq!((code, &*reason), (Code::DataLoss, "CURSOR_UNKNOWN"));
}

#[tokio::test]
async fn an_entry_without_its_rows_is_a_gap() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let mut live = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    let gone = "SELECT seq || '-' || lpad(to_hex(uid), 8, '0') FROM hallpass.log ORDER BY seq OFFSET 8 LIMIT 1";
    let gone = value(&client, gone).await;
    let before = format!(
        "SELECT max(n) FROM permission_audit_log NATURAL JOIN (
        SELECT entry_id FROM hallpass.log WHERE seq < {} ORDER BY seq DESC LIMIT 1) of",
        seq(&gone)
    );
    let before = (seq(&gone), value(&client, &before).await);
    let delete = format!(
        "DELETE FROM permission_audit_log WHERE entry_id IN (SELECT entry_id FROM hallpass.log WHERE seq = {})",
        seq(&gone)
    );
    run(&client, &delete).await;
    for (filter, condition) in filters() {
        let read = read(&server, &client, Start::Earliest(true), filter).await;
        assert_eq!(read.lines(), entries_where(&client, &condition).await);
        assert_eq!(read.gaps.len(), 1, "{condition}");
        assert_eq!(read.gaps[0].to, gone, "{condition}");
    }
    let read = read(
        &server,
        &client,
        Start::Earliest(true),
        AuditFilter::default(),
    )
    .await;
    assert!(seq(read.gaps[0].from.split('.').next().unwrap()) < before.0);
    assert!(
        read.gaps[0].from.ends_with(&format!(".{}", before.1)),
        "{:?}",
        read.gaps
    );
    // Of what comes, too: rows that are gone before anybody has read them.
    let sql = "BEGIN; UPDATE profiles SET role = 'parent_member' WHERE role <> 'parent_member';
               DELETE FROM permission_audit_log WHERE created_at = now(); COMMIT";
    run(&client, sql).await;
    live.until(head(&client).await).await;
    assert_eq!((live.lines().len(), live.gaps.len()), (0, 1));
    assert_eq!(
        live.gaps[0].to,
        value(&client, "SELECT hallpass.head()").await
    );
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

#[tokio::test]
async fn no_stream_passes_a_history_that_was_lost() {
    let (database, client) = changed().await;
    let server = serve(&database).await;
    let mut live = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    let lost_cursor = live.cursor.clone();
    // The last three commits are lost, and others come under their numbers before anybody has looked.
    let lose = "BEGIN; LOCK TABLE hallpass.log;
                DELETE FROM hallpass.log WHERE seq > (SELECT max(seq) - 3 FROM hallpass.log);
                DELETE FROM hallpass.log_org WHERE seq > (SELECT max(seq) FROM hallpass.log);
                SELECT setval('hallpass.log_seq', (SELECT max(seq) FROM hallpass.log));
                UPDATE profiles SET role = 'admin' WHERE org_id = :lincoln;
                UPDATE profiles SET role = 'volunteer' WHERE org_id = :lincoln;
                UPDATE profiles SET role = 'admin' WHERE org_id = :lincoln;
                UPDATE profiles SET role = 'volunteer' WHERE org_id = :lincoln; COMMIT";
    run_sql(&client, lose).await;
    let (code, reason, at) = live.until_it_ends().await;
    assert_eq!((code, &*reason), (Code::DataLoss, "CURSOR_UNKNOWN"));
    assert_eq!(at, lost_cursor);
    assert_eq!(live.lines(), [""; 0]);
    let mut resumed = Consumer::start(&server.channel, cursor(lost_cursor), AuditFilter::default())
        .await
        .unwrap();
    assert_eq!(resumed.until_it_ends().await.0, Code::DataLoss);
}

/// A slow consumer is ended with its cursor, and nobody else waits for it.
#[tokio::test]
async fn a_slow_consumer_slows_itself_alone() {
    let (database, client) = changed().await;
    let mut config = config(&database.url);
    config.audit.slow_max = Duration::from_millis(300);
    let server = Server::start(config).await;
    let import = format!(
        "INSERT INTO profiles (org_id, user_id, role)
         SELECT '{}', md5(i::text)::uuid, 'volunteer' FROM generate_series(1, 40000) i",
        id("lincoln")
    );
    run(&client, &import).await;
    // A connection of its own: on a shared one what it does not take would be in the others' way.
    let channel = hallpass_client::connect(&server.endpoint).await.unwrap();
    let mut slow = Consumer::start(&channel, Start::Earliest(true), AuditFilter::default())
        .await
        .unwrap();
    let mut quick = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    for round in 0..10 {
        set_role(&client, "lincoln", "ann", ["admin", "volunteer"][round % 2]).await;
        let last = head(&client).await;
        within("the quick one's", Duration::from_secs(2), quick.until(last)).await;
    }
    let (code, reason, at) = slow.until_it_ends().await;
    assert_eq!((code, &*reason), (Code::ResourceExhausted, "SLOW_CONSUMER"));
    assert_eq!(at, slow.cursor);
    let rest = read(&server, &client, cursor(at), AuditFilter::default()).await;
    let expected = entries_where(&client, "true").await;
    let (taken, rest) = (slow.lines(), rest.lines());
    assert!(taken.len() < expected.len(), "{slow:?}");
    assert!(taken.into_iter().chain(rest).eq(expected));
}

#[tokio::test]
async fn streams_end_with_their_cursor_at_their_age_and_lose_nothing() {
    let (database, client) = changed().await;
    let mut config = config(&database.url);
    config.audit.age_max = Some(Duration::from_millis(150));
    let server = Server::start(config).await;
    let mut start = Start::Earliest(true);
    let mut taken = Vec::new();
    for round in 0..20 {
        let mut consumer = Consumer::start(&server.channel, start, AuditFilter::default())
            .await
            .unwrap();
        set_role(&client, "lincoln", "ann", ["admin", "volunteer"][round % 2]).await;
        let (code, reason, at) = consumer.until_it_ends().await;
        assert_eq!((code, &*reason), (Code::Unavailable, "STREAM_ENDED"));
        taken.extend(consumer.lines());
        start = cursor(at);
    }
    let mut last = Consumer::start(&server.channel, start, AuditFilter::default())
        .await
        .unwrap();
    last.until_it_ends().await;
    taken.extend(last.lines());
    assert_eq!(taken, entries_where(&client, "true").await);
}

#[tokio::test]
async fn streams_end_with_their_cursor_when_the_service_stops() {
    let (database, client) = changed().await;
    let mut server = serve(&database).await;
    let last = value(&client, "SELECT hallpass.head()").await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(
            read(
                &server,
                &client,
                Start::Earliest(true),
                AuditFilter::default(),
            )
            .await,
        );
    }
    server.begin_stop();
    for mut stream in streams {
        let (code, reason, at) = stream.until_it_ends().await;
        assert_eq!(
            (code, &*reason, &*at),
            (Code::Unavailable, "STREAM_ENDED", &*last)
        );
    }
    within("the service ends", Duration::from_secs(5), server.ended())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_stream_ends_when_the_database_is_away_for_long() {
    let (database, client) = changed().await;
    let mut config = config(&database.url);
    config.audit.away_max = Duration::from_millis(100);
    let server = Server::start(config).await;
    let mut live = read(&server, &client, Start::Now(true), AuditFilter::default()).await;
    let name = value(&client, "SELECT current_database()").await;
    run(
        &client,
        &format!("ALTER DATABASE {name} CONNECTION LIMIT 0"),
    )
    .await;
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE datname = current_database() AND usename = 'hallpass_service'";
    value(&client, cut).await;
    let (code, reason, at) = live.until_it_ends().await;
    assert_eq!(
        (code, &*reason),
        (Code::Unavailable, "DATABASE_UNAVAILABLE")
    );
    run(
        &client,
        &format!("ALTER DATABASE {name} CONNECTION LIMIT -1"),
    )
    .await;
    set_role(&client, "lincoln", "ann", "board_member").await;
    eventually("a stream goes on", async || {
        let resumed = Consumer::start(&server.channel, cursor(&*at), AuditFilter::default()).await;
        match resumed {
            Ok(mut resumed) => resumed.next().await.is_ok() && resumed.lines().len() == 1,
            Err(_) => false,
        }
    })
    .await;
}
