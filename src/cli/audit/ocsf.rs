//! Entries as events of the Open Cybersecurity Schema Framework, <https://schema.ocsf.io/1.3.0>, category Identity & Access
//! Management: 3005 User Access Management, 3006 Group Management, 3004 Entity Management.
//!
//! An organization is a group, its members the group's users; a role or a permission is a privilege. What the schema has
//! no name for is in `unmapped`, whole.

use hallpass_client::v1::{AuditEntry, ChangeType};
use serde_json::{Map, Value, json};

use super::{change_name, source_name, values};

const SCHEMA_VERSION: &str = "1.3.0";

const ENTITY_MANAGEMENT: u32 = 3004;
const USER_ACCESS: u32 = 3005;
const GROUP_MANAGEMENT: u32 = 3006;

const CATEGORY: u32 = 3;
const INFORMATIONAL: u32 = 1;
const OTHER: u32 = 99;

/// What an entry is an event of.
struct Activity {
    class: u32,
    id: u32,
    name: &'static str,
    /// The attributes that the class asks for.
    about: Value,
}

/// One event on one line.
pub(super) fn event(entry: &AuditEntry) -> String {
    let (before, after) = values(entry);
    let activity = activity(entry, &before, &after);
    let class_name = match activity.class {
        USER_ACCESS => "User Access Management",
        GROUP_MANAGEMENT => "Group Management",
        _ => "Entity Management",
    };
    let mut event = json!({
        "category_uid": CATEGORY,
        "category_name": "Identity & Access Management",
        "class_uid": activity.class,
        "class_name": class_name,
        "activity_id": activity.id,
        "activity_name": activity.name,
        "type_uid": activity.class * 100 + activity.id,
        "type_name": format!("{class_name}: {}", activity.name),
        "severity_id": INFORMATIONAL,
        "severity": "Informational",
        "status_id": 1,
        "status": "Success",
        "time": entry.commit_time.as_ref().map(millis),
        "metadata": metadata(entry),
        "actor": actor(entry),
        "src_endpoint": endpoint(entry),
        "unmapped": {
            "cursor": entry.cursor,
            "table": entry.table,
            "change_type": change_name(entry),
            "organization_id": entry.organization_id,
            "before": before,
            "after": after,
            "changed_fields": entry.changed_fields,
            "actor_source": source_name(entry),
            "actor_profile_id": entry.actor_profile_id,
            "database_role": entry.database_role,
            "database_login": entry.database_login,
            "database_client_address": entry.client_address,
            "application_name": entry.application_name,
            "user_agent": entry.user_agent,
            "trace_id": entry.trace_id,
            "transaction_id": entry.transaction_id,
        },
    });
    if let (Value::Object(event), Value::Object(about)) = (&mut event, activity.about) {
        event.extend(about);
    }
    without_absent(event).to_string()
}

fn activity(entry: &AuditEntry, before: &Value, after: &Value) -> Activity {
    match &*entry.table {
        _ if matches!(
            entry.change_type(),
            ChangeType::Truncate | ChangeType::Unrecorded
        ) =>
        {
            managed(entry, before, after)
        }
        "profiles" => membership(entry, before, after),
        "organization_permissions" => setting(entry, before, after),
        _ => managed(entry, before, after),
    }
}

/// Somebody comes into an organization, leaves it, or has another role there.
fn membership(entry: &AuditEntry, before: &Value, after: &Value) -> Activity {
    let role = |row: &Value| row.get("role").cloned().filter(|role| !role.is_null());
    let user = json!({"uid": entry.affected_user_id});
    let of_group = |id, name, row| Activity {
        class: GROUP_MANAGEMENT,
        id,
        name,
        about: json!({"group": group(entry), "user": user, "privileges": list(role(row))}),
    };
    let of_user = |id, name, row| Activity {
        class: USER_ACCESS,
        id,
        name,
        about: json!({"user": user, "privileges": list(role(row)), "resource": group(entry)}),
    };
    match entry.change_type() {
        ChangeType::Insert => of_group(3, "Add User", after),
        ChangeType::Delete => of_group(4, "Remove User", before),
        _ if role(after).is_none() => of_user(2, "Revoke Privileges", before),
        _ => of_user(1, "Assign Privileges", after),
    }
}

/// An organization's own setting for a permission. Where it names one user more or less and nothing else changes, it is
/// that user's privilege, else the group's.
fn setting(entry: &AuditEntry, before: &Value, after: &Value) -> Activity {
    let privileges = list(Some(entry.permission.clone().into()));
    if entry.changed_fields == ["specific_users"] {
        let named = |row: &Value| -> Vec<Value> {
            let users = row.get("specific_users").and_then(Value::as_array);
            users.cloned().unwrap_or_default()
        };
        let (before, after) = (named(before), named(after));
        let only = |these: &[Value], those: &[Value]| -> Vec<Value> {
            these
                .iter()
                .filter(|user| !those.contains(user))
                .cloned()
                .collect()
        };
        let (added, removed) = (only(&after, &before), only(&before, &after));
        let of_user = |id, name, user: &Value| Activity {
            class: USER_ACCESS,
            id,
            name,
            about: json!({"user": {"uid": user}, "privileges": privileges, "resource": group(entry)}),
        };
        match (added.as_slice(), removed.as_slice()) {
            ([user], []) => return of_user(1, "Assign Privileges", user),
            ([], [user]) => return of_user(2, "Revoke Privileges", user),
            _ => {}
        }
    }
    let is_enabled = |row: &Value| row.get("is_enabled") != Some(&Value::Bool(false));
    let (id, name) = match (is_enabled(before), is_enabled(after)) {
        (true, false) => (2, "Revoke Privileges"),
        (false, true) => (1, "Assign Privileges"),
        _ => (OTHER, "Other"),
    };
    Activity {
        class: GROUP_MANAGEMENT,
        id,
        name,
        about: json!({"group": group(entry), "privileges": privileges}),
    }
}

/// An organization, a permission's template, a role; or a whole table.
fn managed(entry: &AuditEntry, before: &Value, after: &Value) -> Activity {
    let row = if after.is_null() { before } else { after };
    let field = |name: &str| row.get(name).cloned().unwrap_or_default();
    let entity = match &*entry.table {
        "organizations" if !row.is_null() => {
            json!({"type": "organization", "uid": entry.organization_id, "name": field("name")})
        }
        "organization_permission_templates" if !row.is_null() => {
            json!({"type": "permission", "uid": entry.permission, "name": field("permission_name")})
        }
        "permission_roles" if !row.is_null() => {
            json!({"type": "role", "uid": field("role_key"), "name": field("role_key")})
        }
        table => json!({"type": "table", "uid": table, "name": table}),
    };
    let (id, name) = match entry.change_type() {
        ChangeType::Insert => (1, "Create"),
        ChangeType::Update => (3, "Update"),
        ChangeType::Delete | ChangeType::Truncate => (4, "Delete"),
        ChangeType::Reset
        | ChangeType::BulkUpdate
        | ChangeType::Unrecorded
        | ChangeType::Unspecified => (OTHER, "Other"),
    };
    Activity {
        class: ENTITY_MANAGEMENT,
        id,
        name,
        about: json!({"entity": entity}),
    }
}

fn metadata(entry: &AuditEntry) -> Value {
    json!({
        "version": SCHEMA_VERSION,
        "uid": entry.id,
        "correlation_uid": entry.request_id,
        "product": {
            "name": "hallpass",
            "vendor_name": "hallpass",
            "version": env!("CARGO_PKG_VERSION"),
        },
    })
}

fn actor(entry: &AuditEntry) -> Value {
    json!({
        "user": {"uid": entry.actor_user_id},
        "session": {"uid": entry.session_id},
        "app_name": entry.application_name,
    })
}

fn endpoint(entry: &AuditEntry) -> Value {
    json!({"ip": entry.ip_address})
}

fn group(entry: &AuditEntry) -> Value {
    json!({"uid": entry.organization_id, "type": "organization"})
}

fn list(privilege: Option<Value>) -> Value {
    privilege.into_iter().collect()
}

fn millis(time: &prost_types::Timestamp) -> i64 {
    time.seconds * 1_000 + i64::from(time.nanos) / 1_000_000
}

/// Without empty texts, NULLs, and objects that have nothing else in them; `unmapped.before` and `after` stay as they are.
fn without_absent(value: Value) -> Value {
    let Value::Object(fields) = value else {
        return value;
    };
    let fields: Map<String, Value> = (fields.into_iter())
        .map(|(name, value)| match &*name {
            "before" | "after" => (name, value),
            _ => (name, without_absent(value)),
        })
        .filter(|(_, value)| match value {
            Value::Null => false,
            Value::String(text) => !text.is_empty(),
            Value::Object(fields) => !fields.is_empty(),
            _ => true,
        })
        .collect();
    Value::Object(fields)
}
