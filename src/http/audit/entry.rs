//! An entry of the audit log as JSON: the fields of gRPC's `AuditEntry` under their names, what it does not have left out.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::grpc::v1;

/// What happened to a row.
#[derive(Clone, Copy, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(in crate::http) enum ChangeType {
    Insert,
    Update,
    Delete,
    /// A whole table was emptied; there is no row to show.
    Truncate,
    /// Changes went past the record. What changed is not known.
    Unrecorded,
    /// A row was removed so that the template applies again.
    Reset,
    /// A row came or was changed as one of several.
    BulkUpdate,
}

impl ChangeType {
    fn of(message: v1::ChangeType) -> Option<Self> {
        match message {
            v1::ChangeType::Unspecified => None,
            v1::ChangeType::Insert => Some(Self::Insert),
            v1::ChangeType::Update => Some(Self::Update),
            v1::ChangeType::Delete => Some(Self::Delete),
            v1::ChangeType::Truncate => Some(Self::Truncate),
            v1::ChangeType::Unrecorded => Some(Self::Unrecorded),
            v1::ChangeType::Reset => Some(Self::Reset),
            v1::ChangeType::BulkUpdate => Some(Self::BulkUpdate),
        }
    }

    pub(super) fn message(self) -> v1::ChangeType {
        match self {
            Self::Insert => v1::ChangeType::Insert,
            Self::Update => v1::ChangeType::Update,
            Self::Delete => v1::ChangeType::Delete,
            Self::Truncate => v1::ChangeType::Truncate,
            Self::Unrecorded => v1::ChangeType::Unrecorded,
            Self::Reset => v1::ChangeType::Reset,
            Self::BulkUpdate => v1::ChangeType::BulkUpdate,
        }
    }
}

/// Where the actor of a change comes from.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(in crate::http) enum ActorSource {
    /// The transaction's settings.
    Settings,
    /// The claims that PostgREST hands on.
    Jwt,
    /// Nobody said who it was.
    None,
}

/// One changed row. What it does not have is left out.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct AuditEntry {
    /// Its place in the log; rows that the log no longer has have none.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(example = "812-5f0c9ae1.20", required = false)]
    cursor: String,
    /// Stays the same however often the entry is sent.
    #[schema(format = Uuid)]
    id: String,
    /// The catalog and the role ladder belong to no organization.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(format = Uuid, required = false)]
    organization_id: String,
    /// The permission whose template or setting was changed.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(example = "can_create_events", required = false)]
    permission: String,
    /// Whose membership was changed.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(format = Uuid, required = false)]
    affected_user_id: String,
    #[schema(example = "organization_permissions")]
    table: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    change_type: Option<ChangeType>,
    /// The row as it was, with the columns that are recorded.
    #[serde(skip_serializing_if = "Value::is_null")]
    #[schema(value_type = Object, required = false)]
    before: Value,
    /// The row as it is.
    #[serde(skip_serializing_if = "Value::is_null")]
    #[schema(value_type = Object, required = false)]
    after: Value,
    /// The columns whose values differ, in alphabetical order.
    changed_fields: Vec<String>,
    /// Who made the change, as far as the application said so.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(format = Uuid, required = false)]
    actor_user_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(format = Uuid, required = false)]
    actor_profile_id: String,
    actor_source: ActorSource,
    /// Of the actor's request, as the application said; so are the next four.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(example = "203.0.113.7", required = false)]
    ip_address: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    user_agent: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    request_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    session_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    trace_id: String,
    /// The role that made the change.
    database_role: String,
    /// Who had logged in to the database.
    database_login: String,
    /// From where.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    client_address: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schema(required = false)]
    application_name: String,
    /// The transaction's number; 0 where the log no longer has it.
    transaction_id: u64,
    /// When it began, by the database's clock.
    #[schema(format = DateTime)]
    transaction_time: String,
    /// When it was committed, by the database's clock.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    commit_time: Option<String>,
}

impl From<v1::AuditEntry> for AuditEntry {
    fn from(entry: v1::AuditEntry) -> Self {
        // Empty where there is no such row; else as PostgreSQL prints it.
        let row = |json: &str| match json {
            "" => Value::Null,
            json => serde_json::from_str(json).unwrap_or_else(|_| json.into()),
        };
        let time = |time: prost_types::Timestamp| time.to_string();
        Self {
            change_type: ChangeType::of(entry.change_type()),
            actor_source: match entry.actor_source() {
                v1::ActorSource::Settings => ActorSource::Settings,
                v1::ActorSource::Jwt => ActorSource::Jwt,
                v1::ActorSource::None | v1::ActorSource::Unspecified => ActorSource::None,
            },
            before: row(&entry.before),
            after: row(&entry.after),
            cursor: entry.cursor,
            id: entry.id,
            organization_id: entry.organization_id,
            permission: entry.permission,
            affected_user_id: entry.affected_user_id,
            table: entry.table,
            changed_fields: entry.changed_fields,
            actor_user_id: entry.actor_user_id,
            actor_profile_id: entry.actor_profile_id,
            ip_address: entry.ip_address,
            user_agent: entry.user_agent,
            request_id: entry.request_id,
            session_id: entry.session_id,
            trace_id: entry.trace_id,
            database_role: entry.database_role,
            database_login: entry.database_login,
            client_address: entry.client_address,
            application_name: entry.application_name,
            transaction_id: entry.transaction_id,
            transaction_time: time(entry.transaction_time.unwrap_or_default()),
            commit_time: entry.commit_time.map(time),
        }
    }
}
