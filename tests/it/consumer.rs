//! A consumer of the audit log for tests, a database with changes in it, and the same log by a plain query of the tables.

use std::{fmt, time::Duration};

use hallpass_client::{
    tonic::{Code, Request, Status, Streaming, transport::Channel},
    v1::{
        AuditEntry, AuditFilter, AuditGap, ChangeType, StreamAuditEntriesRequest,
        StreamAuditEntriesResponse, audit_service_client::AuditServiceClient,
        stream_audit_entries_request::Start, stream_audit_entries_response::Event,
    },
};
use tokio_postgres::Client;
use tonic_types::StatusExt;

use crate::{
    database::Database,
    names::id,
    server::{Server, config, fill, head, run_sql, seq, within},
    sql::lines,
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
pub(crate) const CHANGES: &[&str] = &[
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

fn message(start: Start, filter: AuditFilter) -> StreamAuditEntriesRequest {
    StreamAuditEntriesRequest {
        start: Some(start),
        filter: Some(filter),
    }
}

impl Consumer {
    pub(crate) async fn start(
        channel: &Channel,
        start: Start,
        filter: AuditFilter,
    ) -> Result<Self, Status> {
        Self::open(channel, Request::new(message(start, filter))).await
    }

    /// As whoever has this API key or token.
    pub(crate) async fn start_as(
        channel: &Channel,
        credential: &str,
        start: Start,
        filter: AuditFilter,
    ) -> Result<Self, Status> {
        let mut request = Request::new(message(start, filter));
        let credential = format!("Bearer {credential}").parse().unwrap();
        request.metadata_mut().insert("authorization", credential);
        Self::open(channel, request).await
    }

    async fn open(
        channel: &Channel,
        request: Request<StreamAuditEntriesRequest>,
    ) -> Result<Self, Status> {
        let mut client = AuditServiceClient::new(channel.clone());
        Ok(Self {
            stream: client.stream_audit_entries(request).await?.into_inner(),
            entries: Vec::new(),
            gaps: Vec::new(),
            cursor: String::new(),
            checkpoints: 0,
        })
    }

    /// Takes the next event, which must come in time.
    pub(crate) async fn next(&mut self) -> Result<(), Status> {
        within("the next event", PATIENCE, self.wait()).await
    }

    /// Takes the next event, whenever it comes.
    pub(crate) async fn wait(&mut self) -> Result<(), Status> {
        let event = self.stream.message().await?;
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
pub(crate) async fn read(
    server: &Server,
    client: &Client,
    start: Start,
    filter: AuditFilter,
) -> Consumer {
    let mut consumer = Consumer::start(&server.channel, start, filter)
        .await
        .unwrap();
    consumer.until(head(client).await).await;
    consumer
}

pub(crate) async fn serve(database: &Database) -> Server {
    Server::start(config(&database.url)).await
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
