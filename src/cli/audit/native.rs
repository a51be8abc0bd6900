//! Entries as JSON: the fields of `AuditEntry` under their names, enum values without their prefix, absent ones left out.

use hallpass_client::v1::{AuditEntry, AuditGap};
use serde_json::{Map, Value};

use super::{change_name, source_name, values};

/// One object on one line.
pub(super) fn entry(entry: &AuditEntry) -> String {
    let time = |time: Option<prost_types::Timestamp>| match time {
        Some(time) => time.to_string().into(),
        None => Value::Null,
    };
    let (before, after) = values(entry);
    let fields = [
        ("cursor", entry.cursor.as_str().into()),
        ("id", entry.id.as_str().into()),
        ("organization_id", entry.organization_id.as_str().into()),
        ("permission", entry.permission.as_str().into()),
        ("affected_user_id", entry.affected_user_id.as_str().into()),
        ("table", entry.table.as_str().into()),
        ("change_type", change_name(entry).into()),
        ("before", before),
        ("after", after),
        ("changed_fields", entry.changed_fields.clone().into()),
        ("actor_user_id", entry.actor_user_id.as_str().into()),
        ("actor_profile_id", entry.actor_profile_id.as_str().into()),
        ("actor_source", source_name(entry).into()),
        ("ip_address", entry.ip_address.as_str().into()),
        ("user_agent", entry.user_agent.as_str().into()),
        ("request_id", entry.request_id.as_str().into()),
        ("session_id", entry.session_id.as_str().into()),
        ("trace_id", entry.trace_id.as_str().into()),
        ("database_role", entry.database_role.as_str().into()),
        ("database_login", entry.database_login.as_str().into()),
        ("client_address", entry.client_address.as_str().into()),
        ("application_name", entry.application_name.as_str().into()),
        ("transaction_id", entry.transaction_id.into()),
        ("transaction_time", time(entry.transaction_time)),
        ("commit_time", time(entry.commit_time)),
    ];
    object(fields)
}

/// A gap is an object without an id; its cursor is where to go on, as an entry's is.
pub(super) fn gap(gap: &AuditGap) -> String {
    object([
        ("cursor", gap.to.as_str().into()),
        ("gap_from", gap.from.as_str().into()),
    ])
}

fn object<const N: usize>(fields: [(&str, Value); N]) -> String {
    let is_there = |value: &Value| !(value.is_null() || value.as_str() == Some(""));
    let fields: Map<String, Value> = (fields.into_iter())
        .filter(|(_, value)| is_there(value))
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    Value::Object(fields).to_string()
}
